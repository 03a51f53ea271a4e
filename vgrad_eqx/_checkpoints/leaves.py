"""Converts a leaf to a plain array and a description, and back."""

import collections
import functools as ft
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.typing import ArrayLike

from .._tree.flat import replace_at
from .._tree.state import read
from .._tree.units import attach_unit, describe_unit, is_unit, split_unit


class Entry(NamedTuple):
    """The description of an array, without its values."""

    kind: str  # an array, a key of some kind, or a Python number
    dtype: str
    shape: tuple[int, ...]
    unit: list[str] | None

    def fits(self, other: "Entry") -> bool:
        if self.kind == other.kind and self.is_python and self.is_integer:
            return other.is_integer  # whatever its size
        # A unit is compared by scale and dimension, not by name.
        ours, theirs = (self.unit or [])[1:], (other.unit or [])[1:]
        return self[:3] == other[:3] and ours == theirs

    def fits_cast(self, other: "Entry") -> bool:
        """Whether `other` fits once its values are converted, without losing any."""
        rank, other_rank = _find_rank(self.dtype), _find_rank(other.dtype)
        if not self.kind == other.kind == "array" or rank is None or other_rank is None:
            return False
        return rank >= other_rank and self.fits(other._replace(dtype=self.dtype))

    @property
    def is_python(self) -> bool:
        return self.kind.startswith("Python")

    @property
    def is_integer(self) -> bool:
        """Whether it has the form of a Python int, which is written in 64 bits or as bytes."""
        return self[1:3] == ("int64", ()) or (self.dtype == "uint8" and len(self.shape) == 1)

    def __str__(self) -> str:
        if self.is_python:
            return f"a {self.kind}"
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.kind != "array":
            text = f"a {self.kind}, {text}"
        return text if self.unit is None else f"{text} in {self.unit[0]}"


def _find_rank(dtype: str) -> int | None:
    """The rank of a dtype among bools, integers, reals and complex numbers."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    try:
        found = [i for i, kind in enumerate(kinds) if jnp.issubdtype(jnp.dtype(dtype), kind)]
    except TypeError:  # a code that NumPy has no dtype for
        return None
    return found[0] if found else None


_ARRAYS = jax.Array | jax.Ref | np.ndarray | np.generic | jax.ShapeDtypeStruct
_NUMBERS = bool | int | float | complex


def is_saved(leaf: object) -> bool:
    number, _ = split_unit(leaf)
    return isinstance(number, _ARRAYS | _NUMBERS) and not isinstance(number, str | bytes)


def is_python_number(leaf: object) -> bool:
    return isinstance(leaf, _NUMBERS) and not isinstance(leaf, np.generic)


def is_key(number: Any) -> bool:
    return hasattr(number, "dtype") and _is_key_dtype(number.dtype)


@ft.cache
def _is_key_dtype(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


@ft.cache
def _name_dtype(dtype: Any) -> str:
    return dtype.name


def describe(leaf: object) -> Entry:
    number, unit = split_unit(leaf)
    if is_key(number):
        impl, data = _describe_key(number)
        return Entry(f"key of {impl}", data.dtype.name, data.shape, None)
    if is_python_number(number) and unit is None:
        array = fetch(number)
        return Entry(f"Python {type(number).__name__}", array.dtype.name, array.shape, None)
    if is_python_number(number):
        dtype, shape = jnp.result_type(number), ()
    else:
        dtype, shape = number.dtype, number.shape
    if isinstance(number, jax.ShapeDtypeStruct):
        dtype = jax.dtypes.canonicalize_dtype(dtype)  # as JAX would convert it
    return Entry("array", _name_dtype(dtype), shape, describe_unit(unit))


def _describe_key(key: jax.Array) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The implementation of a key, which depends only on its shape and dtype, and its data."""
    impls = []

    def get_data(key: jax.Array) -> jax.Array:
        impls.append(jr.key_impl(key))
        return jr.key_data(key)

    data = jax.eval_shape(get_data, jax.ShapeDtypeStruct(key.shape, key.dtype))
    return impls[0], data


def fetch(leaf: object) -> np.ndarray:
    """The values of a leaf, in C order and little-endian."""
    number, unit = split_unit(leaf)
    if isinstance(number, jax.Ref):
        number = read(number)
    if is_key(number):
        number = jr.key_data(number)
    if isinstance(number, jax.Array) and not isinstance(number, jax.core.Tracer):
        number = _share(number)
    if is_python_number(number):
        number = (
            _as_array(number) if unit is None else np.asarray(number, jnp.result_type(number))
        )
    array = np.asarray(number, order="C")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _share(array: jax.Array) -> jax.Array:
    """Another array with the same buffers, because JAX caches the host copy of an array."""
    if array.is_fully_replicated:
        return array.addressable_data(0)
    buffers = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)


def _as_array(number: ArrayLike) -> np.ndarray:
    if not isinstance(number, int) or isinstance(number, bool):
        return np.asarray(number)
    if -(2**63) <= number < 2**63:
        return np.asarray(number, np.int64)
    size = number.bit_length() // 8 + 1  # with the bit of the sign
    return np.frombuffer(number.to_bytes(size, "little", signed=True), np.uint8)


def restore(leaves: Sequence[Any], arrays: Sequence[np.ndarray]) -> list[Any]:
    """Converts arrays, which nothing else refers to, to the types of these leaves.

    JAX arrays are put on their devices together, which is three times as fast for small ones.
    """
    values = list(map(_restore_one, leaves, arrays))
    indices = [i for i, leaf in enumerate(leaves) if not _is_of_host(leaf)]
    shardings = [_find_sharding(split_unit(leaves[i])[0]) for i in indices]
    if indices:
        moved = jax.device_put([values[i] for i in indices], shardings)
        values = replace_at(values, indices, moved)
    return [
        value if isinstance(number, jax.Ref) else attach_unit(value, unit)
        for value, (number, unit) in zip(values, map(split_unit, leaves), strict=True)
    ]


def _is_of_host(leaf: Any) -> bool:
    number, unit = split_unit(leaf)
    is_numpy = isinstance(number, np.ndarray | np.generic)
    return is_numpy or (is_python_number(number) and unit is None)


def _restore_one(leaf: Any, array: np.ndarray) -> Any:
    """The value of a leaf, before JAX puts it on its devices."""
    number, unit = split_unit(leaf)
    if is_python_number(number) and unit is None:
        is_large = isinstance(number, int) and array.dtype == np.uint8
        value = (
            int.from_bytes(array.tobytes(), "little", signed=True) if is_large else array.item()
        )
        return type(number)(value)
    if isinstance(number, np.ndarray | np.generic):
        array = array.astype(number.dtype, copy=False)
        return array if isinstance(number, np.ndarray) else array[()]
    if is_key(number):
        return jr.wrap_key_data(jnp.asarray(array), impl=_describe_key(number)[0])
    if getattr(number, "weak_type", False):
        zeros = jnp.full(array.shape, array.dtype.type(0).item())
        return zeros.at[...].set(array) if zeros.dtype == array.dtype else array
    return array


def _find_sharding(number: Any) -> Any:
    """The sharding for an array. An uncommitted array remains uncommitted."""
    is_free = isinstance(number, jax.Array) and not getattr(number, "committed", False)
    return None if is_free else getattr(number, "sharding", None)


def find_obstacle(leaf: object) -> str | None:
    """Why a leaf can be neither saved nor left out, and what to do."""
    number, _ = split_unit(leaf)
    if isinstance(number, np.ndarray | np.generic) and not isinstance(number, str | bytes):
        return _find_obstacle_of_numpy(number)
    if isinstance(number, jax.Array) and not isinstance(number, jax.core.Tracer):
        if not (number.is_fully_addressable or number.is_fully_replicated):
            return (
                "an array that is sharded over several hosts. Save it with orbax, where each "
                "host writes its shards"
            )
    elif not is_saved(leaf) and _holds_array(leaf):
        return (
            f"a `{type(leaf).__name__}`, which holds arrays but is not a pytree. Register its "
            "class, for example as an `equinox.Module`, or put its arrays into a dict"
        )
    return None


def _find_obstacle_of_numpy(array: np.ndarray | np.generic) -> str | None:
    if isinstance(array, np.ma.MaskedArray):
        return "a masked array. Put its `data` and its `mask` into a dict"
    if isinstance(array, np.ndarray) and type(array) not in (np.ndarray, np.memmap):
        return f"a `{type(array).__name__}`. Make it a plain array by `numpy.asarray`"
    if array.dtype.names or array.dtype.subdtype:
        return "a structured array. Put its fields into a dict"
    if not _has_numbers(array.dtype):
        return (
            f"an array of {array.dtype}, which are not numbers. Keep it as a list, which is "
            "not saved, or write it to a separate file"
        )
    return None


def _has_numbers(dtype: Any) -> bool:
    return dtype.kind in "bmM" or jnp.issubdtype(dtype, np.number)


# These are not saved, whatever they close over.
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_HARMLESS = (str, bytes, type, np.dtype, *_FUNCTIONS)
_MOST_OBJECTS = 10_000  # takes 10 ms, for an object that refers to half of the program


def _holds_array(leaf: object) -> bool:
    """Whether an object that is not a pytree contains an array, which would not be saved."""
    seen: dict[int, Any] = {}  # kept alive, so that each `id` is unique
    pending = collections.deque([leaf])
    while pending and len(seen) < _MOST_OBJECTS:
        node = pending.popleft()
        if isinstance(node, _HARMLESS) or is_unit(node) or id(node) in seen:
            continue
        seen[id(node)] = node
        if _is_array(node):
            return True
        pending.extend(jtu.tree_leaves(_list_parts(node)))
    return False


def _is_array(node: object) -> bool:
    number, _ = split_unit(node)
    if isinstance(number, np.ndarray | np.generic):
        return isinstance(number, np.ndarray) and _has_numbers(number.dtype)
    return isinstance(number, _ARRAYS) or hasattr(node, "__array__")


def _list_parts(node: object) -> list[Any]:
    if hasattr(node, "__wrapped__"):  # a compiled function, or one with custom rules
        return []
    if isinstance(node, ft.partial):
        return [node.args, node.keywords]
    parts = [getattr(node, "__dict__", {})]
    for node_type in type(node).__mro__:
        slots = node_type.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            parts.append(getattr(node, name, None))
    if isinstance(node, Mapping):
        parts += node.values()
    elif isinstance(node, list | tuple | set | frozenset | collections.deque | np.ndarray):
        parts += node
    return parts


def cast_array(array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """The same values in another dtype, up to rounding."""
    if _name_dtype(array.dtype) == dtype:
        return array
    with np.errstate(all="ignore"):
        cast = array.astype(jnp.dtype(dtype))
    if jnp.issubdtype(cast.dtype, jnp.inexact):
        is_lost = bool(np.any(np.isfinite(array) & ~np.isfinite(cast)))
    else:
        limits = (0, 1) if cast.dtype == bool else _find_limits(cast.dtype)
        is_lost = array.size > 0 and not (
            limits[0] <= int(array.min()) and int(array.max()) <= limits[1]
        )
    if is_lost:
        raise ValueError(
            f"{what} has values that are too large for {dtype}: `load(cast=True)` converts "
            f"{array.dtype.name} only where none is lost."
        )
    return cast


def _find_limits(dtype: Any) -> tuple[int, int]:
    info = jnp.iinfo(dtype)
    return int(info.min), int(info.max)
