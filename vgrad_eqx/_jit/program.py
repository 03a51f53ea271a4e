"""A gradient compiled for one kind of arguments."""

import weakref
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._gradients.engine import GradientTransform
from .._tree.flat import is_any_traced, is_scalar, Split, split_arrays
from .._tree.missing import MISSING
from .._tree.state import is_reference
from .reader import find_contents, make_guard, make_reader


Inputs = tuple[Any, Any]  # the first argument taken apart, and the others


class Unlike(Exception):
    """The inputs may not be what they were when the program was made."""


class NoProgram:
    """None that is known yet."""

    @staticmethod
    def fetch(first: Any) -> None:
        return None


class Program:
    """A gradient compiled for arguments that differ in their arrays only.

    The first argument is taken apart by a reader; the others are passed to `jax.jit` as they
    are, if they are but arrays. To compare the types of all leaves at each call would take as
    long as reading them. In place of that it relies on `jax.jit`, which traces inputs of new
    shapes and dtypes: a number in the place of an array is noticed by its weak type then.
    Where arrays have one as well, the program is *exact*, and does compare types. So it does
    where not only arrays are returned.
    """

    def __init__(
        self,
        transform: GradientTransform,
        first: Any,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_exact: bool,
    ):
        marked_first, *marked_rest = _mark_numbers(transform, [first, *rest])
        marked = (tuple(marked_rest), kwargs)
        transform_split = split_arrays(transform, _is_array)
        own, rebuild = transform_split.diff, transform_split.rest.combine
        combine_first = split_arrays(marked_first, _is_array).rest.combine
        combine_rest = split_arrays(marked, _is_array).rest.combine
        is_plain = not kwargs and _is_plain(marked)
        is_bare = not own and _is_plain(marked_first) and not _is_flat(first)
        num_own = len(own)

        def run(leaves: Any, rest: Any) -> Any:
            if not is_exact:
                _check(leaves, rest)
            rest, kwargs = (rest, {}) if is_plain else combine_rest(rest)
            first = leaves if is_bare else combine_first(leaves[num_own:])
            args = rest if first is MISSING else (first, *rest)
            out = rebuild([] if is_bare else leaves[:num_own])(*args, **kwargs)
            out_split = split_arrays(out, _is_array)
            if len(out_split.diff) == out_split.rest.structure.num_leaves:
                return out
            if not is_exact:
                raise Unlike
            return out_split

        run.__name__ = getattr(transform, "__name__", run.__name__)
        self.compiled = jax.jit(run, inline=True)
        self._is_exact = is_exact
        # The arrays of the transform are passed as well, or they would be constants.
        self._read_first = _pass if is_bare else make_reader(marked_first, _is_array, own)
        self._read_rest = _pass_positional if is_plain else make_reader(marked, _is_array)
        self._kinds = [_list_kinds(self._take(first, rest, kwargs))]
        # How to read the first argument, if the others are passed as they are.
        self.fetch: Callable[[Any], Any] = NoProgram.fetch
        if is_plain and not is_exact:
            self.fetch = self._watch() if isinstance(first, eqx.Module) else self._read_first

    def _watch(self) -> Callable[[Any], list[Any] | None]:
        """Reads modules, and remembers one that is passed often."""
        read_first, seen, times = self._read_first, weakref.ref(self), 0

        def fetch(first: Any) -> list[Any] | None:
            nonlocal seen, times
            leaves = read_first(first)
            if leaves is None:
                return None
            if seen() is not first:
                seen, times = weakref.ref(first), 0
                return leaves
            times += 1
            if times == _OFTEN:
                self._remember(first, leaves)
            return leaves

        return fetch

    def _remember(self, module: eqx.Module, leaves: list[Any]) -> None:
        """Looks for this module first from now on. That takes as long as many calls."""
        contents = find_contents(module)
        if contents is None or is_any_traced(leaves):
            return
        watch = self._watch()

        def forget(_: Any) -> None:
            self.fetch = watch

        self.fetch = make_guard(module, contents, leaves, watch, forget)

    def read(self, first: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """What the compiled function takes for these arguments, if it can."""
        inputs = self._take(first, rest, kwargs)
        if inputs is None or (self._is_exact and _list_kinds(inputs) not in self._kinds):
            return None
        return inputs

    def read_again(self, first: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for arguments that look different, such as arrays of NumPy, not of JAX."""
        inputs = self._take(first, rest, kwargs)
        if inputs is None:
            return None
        kinds = _list_kinds(inputs)
        known = self._kinds[0]
        if len(kinds) != len(known) or not all(map(_is_alike, kinds, known)):
            return None
        if kinds not in self._kinds:
            self._kinds.append(kinds)
        return inputs

    def _take(self, first: Any, rest: Any, kwargs: Any) -> Any:
        leaves, others = self._read_first(first), self._read_rest((rest, kwargs))
        return None if leaves is None or others is None else (leaves, others)


def _is_plain(arguments: Any) -> bool:
    """Whether these are arrays, in containers that JAX takes apart without Python."""
    leaves = jtu.tree_leaves(arguments, is_leaf=lambda node: isinstance(node, eqx.Module))
    return all(map(_is_array, leaves))


def _is_flat(first: Any) -> bool:
    """Whether this is a dict of arrays, which a reader takes apart faster than JAX."""
    return type(first) is dict and all(map(_is_array, first.values()))


def _pass(first: Any) -> Any:
    """Reads an argument that JAX takes apart by itself."""
    return first


def _pass_positional(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    rest, kwargs = arguments
    return None if kwargs else rest


def _check(*inputs: Any) -> None:
    """Raises if not all of what is traced was an array."""
    for leaf in jtu.tree_leaves(inputs):
        kind = jax.typeof(leaf)
        if kind.weak_type or (kind.shape == () and kind.dtype == bool):
            raise Unlike


def _list_kinds(inputs: Inputs | None) -> list[type]:
    return list(map(type, jtu.tree_leaves(inputs)))


def _mark_numbers(transform: GradientTransform, args: list[Any]) -> list[Any]:
    """The arguments, with an array for each Python number that is differentiated."""
    argnums: Any = transform.argnums
    if argnums is None:
        argnums = 0 if transform.grad_states is None else ()
    positions = [i % len(args) for i in jtu.tree_leaves(argnums)]
    return [
        np.asarray(arg) if i in positions and is_scalar(arg) else arg
        for i, arg in enumerate(args)
    ]


_OFTEN = 16
_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, _ARRAYS) and not is_reference(leaf)


def _is_alike(kind: type, known: type) -> bool:
    return kind is known or (issubclass(kind, _ARRAYS) and issubclass(known, _ARRAYS))


def unwrap(out: Any) -> Any:
    """What the gradient has returned, if there are not only arrays in it."""
    return out.combine() if isinstance(out, Split) else out
