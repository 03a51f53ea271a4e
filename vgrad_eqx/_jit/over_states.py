"""A compiled function over states by reference, called with their values."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.tree_util as jtu

from .._references.overlay import call_with
from .._references.replay import find_written
from .._references.trace import is_concrete_ref
from .._tree.sharding import shard_like
from .._tree.state import describe, find_arrays, is_evaluating, set_arrays
from .._tree.text import shorten
from .callbacks import wait


class MoreStates(Exception):
    """Raised when, for arguments of other shapes, a function uses additional states."""


class StateProgram:
    """`func`, compiled as `jitted`, which uses these references. They are set at the end.

    JAX takes the arrays of references away while a function runs that sets them, and they are
    lost if it fails. Here they are inputs and outputs like any others.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        jitted: Any,
        refs: Sequence[jax.Ref],
        is_donated: bool,
        waits: bool,
    ):
        def run(values: Sequence[Any], *inputs: Any) -> Any:
            return self._run(values, *inputs)

        run.__name__ = jitted.__name__
        self._func = func
        self._jitted = jitted
        self._refs = refs
        self._is_donated = is_donated
        compiled = jax.jit(run, donate_argnums=(0,) if is_donated else ())
        self._compiled = ft.partial(wait, compiled) if waits else compiled

    def __call__(self, *inputs: Any) -> Any:
        if not is_evaluating():
            return self._jitted(*inputs)
        values = find_arrays(self._refs)
        try:
            result, finals = self._compiled(values, *inputs)
        except NotImplementedError as error:
            if "discharge" not in str(error):
                raise
            raise ValueError(
                "`jit(func=...)` must not read or set a state inside of a `custom_jvp` or "
                f"`custom_vjp` function. JAX cannot compile that ({error}). It uses "
                f"{shorten(list(map(describe, self._refs)))}. Read the `value` before, and "
                "pass it as an argument."
            ) from error
        set_arrays(self._refs, values, finals)
        return result

    def _run(self, values: Sequence[Any], *inputs: Any) -> tuple[Any, dict[int, Any]]:
        """The result, and what is left in the references that are set, by their index."""
        ids = list(map(id, self._refs))
        if is_evaluating():  # by `jax.debug_nans`, to find the operation, or `jax.disable_jit`
            called = call_with(self._func, dict(zip(ids, values, strict=True)), *inputs)
            return called.output, {ids.index(key): x for key, x in called.finals.items()}
        traced = self._jitted.trace(*inputs)
        jaxpr, consts = traced.jaxpr.jaxpr, traced.jaxpr.consts
        if not {id(ref) for ref in filter(is_concrete_ref, consts)}.issubset(ids):
            raise MoreStates
        fresh = dict(zip(ids, map(jax.new_ref, values), strict=True))
        consts_with_fresh = [fresh.get(id(const), const) for const in consts]
        leaves = jax.core.eval_jaxpr(jaxpr, consts_with_fresh, *jtu.tree_leaves(inputs))
        pairs = zip(consts, find_written(jaxpr, jaxpr.constvars), strict=True)
        written = {id(const) for const, is_written in pairs if is_written}
        # A donated array no longer exists, so it is an output, too.
        kept = [i for i, key in enumerate(ids) if self._is_donated or key in written]
        finals = [fresh[ids[i]][...] for i in kept]
        if jax.device_count() > 1:
            finals = shard_like(finals, [values[i] for i in kept])
        result = jtu.tree_unflatten(jtu.tree_structure(traced.out_info), leaves)
        return result, dict(zip(kept, finals, strict=True))
