"""Many arrays in few buffers, so that a compiled call has few arguments."""

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


# Copying a larger array into a buffer and out of it takes longer than passing it.
_LARGEST = 4096

# Compilation time grows faster than the number of arrays in a buffer.
_MOST = 32

# XLA fuses the slices of a buffer into the operations that use them. For few arrays this is
# fast. For many, it makes kernels that take several times as long to compile.
_MOST_FUSED = 16


class _Slot(NamedTuple):
    """A buffer: the indices of its arrays, and their shapes. A large array has its own."""

    indices: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


class Packing:
    """Packs arrays of the same kind and dtype into shared buffers."""

    def __init__(self, kinds: Sequence[Hashable], arrays: Sequence[Any]):
        slots: dict[Any, list[int]] = {}
        for i, (kind, array) in enumerate(zip(kinds, arrays, strict=True)):
            key = (kind, jnp.result_type(array)) if jnp.size(array) <= _LARGEST else i
            slots.setdefault(key, []).append(i)
        self._num_arrays = len(arrays)
        parts = [
            indices[start : start + _MOST]
            for indices in slots.values()
            for start in range(0, len(indices), _MOST)
        ]
        self._slots = [
            _Slot(tuple(indices), tuple([jnp.shape(arrays[i]) for i in indices]))
            for indices in parts
        ]
        self._is_fused = max(map(len, parts)) <= _MOST_FUSED

    def pack(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        if not self._is_fused:
            arrays = jax.lax.optimization_barrier(arrays)
        return tuple(
            [
                arrays[indices[0]]
                if len(indices) == 1
                else jnp.concatenate([arrays[i].ravel() for i in indices])
                for indices, _ in self._slots
            ]
        )

    def unpack(self, buffers: Sequence[Array]) -> list[Array]:
        arrays: list[Any] = [None] * self._num_arrays
        for (indices, shapes), buffer in zip(self._slots, buffers, strict=True):
            if len(indices) == 1:
                arrays[indices[0]] = buffer
                continue
            stops = list(itertools.accumulate(map(math.prod, shapes)))
            starts = [0, *stops[:-1]]
            for i, shape, start, stop in zip(indices, shapes, starts, stops, strict=True):
                arrays[i] = buffer[start:stop].reshape(shape)
        return arrays if self._is_fused else jax.lax.optimization_barrier(arrays)
