"""Compiled functions, whose calls cost little more in Python than `jax.jit` of flat arrays."""

import functools as ft
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.tree_util as jtu
import numpy as np

from .._gradients.engine import GradientTransform
from .._tree.flat import is_any_traced, is_scalar, Rest, Split, split_arrays
from .._tree.missing import MISSING
from .._tree.state import is_reference
from .._tree.text import show
from .reader import find_contents, make_guard, make_reader


def jit(func: Any = MISSING, *, donate: str = "none") -> Any:
    """Compiles a function, whose calls then cost little more than `jax.jit` over flat arrays.

    What `equinox.filter_jit` does, for gradients and for any other function: JAX and NumPy
    arrays in the arguments are traced, and all else is constant. It remembers how the arguments
    are put together, and fetches their arrays by code that is written for them, while
    `filter_jit` flattens and rebuilds every module. It may also decorate, with options and
    without: `@vg.jit` above `@vg.vector_grad(...)`, of a method as well.

    **Arguments:**

    - `func`: the function, such as a [`vgrad_eqx.GradientTransform`][], which
        [`vgrad_eqx.vector_grad`][] and its siblings return.
    - `donate`: which JAX arrays in the arguments are donated, so that their memory is used
        again: `"all"`, `"all-except-first"` or `"none"`, as in `equinox.filter_jit`.

    **Returns:**

    A function that takes and returns what `func` does. Another static value, such as a number
    or a flag, means to compile again. Only a Python float that a gradient is by is traced,
    too. Arrays in the results are those of JAX. Inside of `jax.jit`, nothing is compiled
    apart. Without `func`, it returns a decorator.

    Its `lower(*args, **kwargs)` gives what `jax.jit(...).lower(...)` does, to look at the
    program.

    **Raises:**

    - `TypeError`: at once, if `func` is not callable; on calling, for a static value that has
        no hash, since it could change unnoticed.
    - `ValueError`: at once, for another `donate`.

    **Example:**

        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> @vg.jit
        ... @vg.vector_grad(grad_states="layers.*.bias", return_value=True)
        ... def errors(model, x, y):
        ...     return jnp.square(jax.vmap(model)(x) - y)
        >>> var_grads, value = errors(mlp, jnp.ones((5, 2)), jnp.ones((5, 1)))
        >>> list(var_grads), value.shape
        (['layers.0.bias', 'layers.1.bias'], (5, 1))
    """
    if func is MISSING:
        return ft.partial(jit, donate=donate)
    if not callable(func):
        raise TypeError(f"`jit(func=...)` must be a callable. Got {show(func)}.")
    if donate not in ("all", "all-except-first", "none"):
        raise ValueError(
            f"`jit(donate=...)` must be 'all', 'all-except-first' or 'none'. "
            f"Got {show(donate)}."
        )
    programs = _Programs(func, donate)

    # A function, because Python calls one faster than an object, and a module slower yet.
    def call(first=MISSING, /, *rest, **kwargs):
        program = programs.latest
        leaves = program.read_first(first)
        others = None if leaves is None else program.read_others(rest, kwargs)
        if others is None:
            program, (leaves, others) = programs.find(first, rest, kwargs)
        out = program.compiled(leaves, others)
        return out.combine() if type(out) is Split else out

    def lower(first=MISSING, /, *rest, **kwargs):
        program, inputs = programs.find(first, rest, kwargs)
        return program.compiled.lower(*inputs)

    vars(call)["lower"] = lower
    return ft.update_wrapper(call, func, updated=())


class _NoProgram:
    """None that was made yet."""

    @staticmethod
    def read_first(first: Any) -> None:
        return None


class _Programs:
    """The programs of one function, one for each kind of arguments."""

    def __init__(self, func: Any, donate: str):
        self._func = func
        self._donate = {"none": (), "all-except-first": (1,), "all": (0, 1)}[donate]
        self._programs: list[_Program] = []
        self.latest: Any = _NoProgram

    def find(self, first: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A program for these arguments, and what it takes."""
        for program in self._programs:
            inputs = program.read(first, rest, kwargs)
            if inputs is not None:
                self.latest = program
                return program, inputs
        self.latest = program = _Program(self._func, self._donate, first, rest, kwargs)
        self._programs = [program, *self._programs[:_MOST]]
        return program, program.read(first, rest, kwargs)


class _Program:
    """A function compiled for arguments that differ in their arrays only."""

    def __init__(
        self,
        func: Any,
        donate: tuple[int, ...],
        first: Any,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        given = [first, *rest]
        marked = _mark_numbers(func, given)
        numbers = [x for x, arg in zip(marked, given, strict=True) if x is not arg]
        # The arrays of the function are arguments as well, or they would be constants.
        own_func = func if split_arrays(func, _is_array).diff else None
        first, others = marked[0], (own_func, tuple(marked[1:]), kwargs)
        first_rest, other_rest = (split_arrays(x, _is_array).rest for x in (first, others))
        _refuse_unhashable(first_rest, other_rest)

        def run(leaves: Sequence[Any], other_leaves: Sequence[Any]) -> Any:
            first = first_rest.combine(leaves)
            own_func, rest, kwargs = other_rest.combine(other_leaves)
            args = rest if first is MISSING else (first, *rest)
            out = (func if own_func is None else own_func)(*args, **kwargs)
            split = split_arrays(out, _is_array)
            return out if len(split.diff) == split.rest.structure.num_leaves else split

        run.__name__ = getattr(func, "__name__", run.__name__)
        self.compiled = jax.jit(run, inline=True, donate_argnums=donate)
        # Give the arrays in the first argument, and in the others, or `None` if these differ.
        self.read_first = read_first = _make_array_reader(first, numbers)
        if isinstance(first, eqx.Module):
            self.read_first = self._watch(read_first)
        read_others = _make_array_reader(others, numbers)
        self.read_others = lambda rest, kwargs: read_others((own_func, rest, kwargs))
        if own_func is None and not kwargs and all(map(_is_array, marked[1:])) and not numbers:
            self.read_others = _make_plain_reader(len(rest))

    def read(self, first: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the compiled function takes for these arguments, or `None` if they differ."""
        leaves = self.read_first(first)
        others = None if leaves is None else self.read_others(rest, kwargs)
        return None if others is None else (leaves, others)

    def _watch(self, read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Reads modules, and recognizes one that is passed often."""
        seen, times = weakref.ref(self), 0

        def watch(module: Any) -> Any:
            nonlocal seen, times
            leaves = read(module)
            if leaves is None or seen() is not module:
                seen, times = weakref.ref(self if leaves is None else module), 0
                return leaves
            times += 1
            if times == _OFTEN:
                self._recognize(module, leaves, read)
            return leaves

        return watch

    def _recognize(self, module: eqx.Module, leaves: list[Any], read: Any) -> None:
        """Looks for this module first from now on. That takes as long as many calls."""
        contents = find_contents(module)
        if contents is None or is_any_traced(leaves):
            return
        watch = self._watch(read)

        def forget(_: Any) -> None:
            self.read_first = watch

        self.read_first = make_guard(module, contents, leaves, watch, forget)


def _refuse_unhashable(*rests: Rest) -> None:
    """Refuses static values that could change unnoticed."""
    for rest in rests:
        for constant in (rest.structure, *rest.constants):
            try:
                hash(constant)
            except TypeError as error:
                raise TypeError(
                    "`jit` compiles again for each static value, so each must have a hash. Got "
                    f"{show(constant)}. Make its class hashable, say by "
                    "`@dataclasses.dataclass(frozen=True)`, or pass an array."
                ) from error


def _make_array_reader(tree: Any, numbers: Sequence[Any]) -> Callable[[Any], Any]:
    """A reader that takes arrays alone, and a Python number in the place of each of these."""
    leaves = split_arrays(tree, _is_array).diff
    scalars = {i for i, x in enumerate(leaves) if any(x is number for number in numbers)}

    def check(leaves: Sequence[Any]) -> Any:
        for i, leaf in enumerate(leaves):
            if not _is_array(leaf) and not (i in scalars and is_scalar(leaf)):
                return None
        return leaves

    return make_reader(tree, _is_array, _is_array_type, check)


def _make_plain_reader(num_args: int) -> Callable[[Any, Any], Any]:
    """Passes arrays as they are."""

    def read(rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(rest) != num_args:
            return None
        is_known = all(map(_is_array_type, map(type, rest)))
        return rest if is_known or all(map(_is_array, rest)) else None

    return read


def _mark_numbers(func: Any, args: list[Any]) -> list[Any]:
    """The arguments, with an array for each Python number that a gradient is by."""
    if not isinstance(func, GradientTransform):
        return args
    argnums: Any = func.argnums
    if argnums is None:
        argnums = 0 if func.grad_states is None else ()
    positions = [i % len(args) for i in jtu.tree_leaves(argnums)]
    return [
        np.asarray(arg) if i in positions and is_scalar(arg) else arg
        for i, arg in enumerate(args)
    ]


_MOST = 63
_OFTEN = 16
_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, _ARRAYS) and not is_reference(leaf)


class _ArrayTypes(dict[type, bool]):
    """Whether all objects of a type are arrays. A tracer may stand for a reference."""

    def __missing__(self, kind: type) -> bool:
        is_array = issubclass(kind, _ARRAYS) and not issubclass(kind, jax.core.Tracer | jax.Ref)
        self[kind] = is_array
        return is_array


_is_array_type = _ArrayTypes().__getitem__
