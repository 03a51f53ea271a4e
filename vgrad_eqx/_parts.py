"""The parts of a call that are differentiated: arguments, and leaves of the state tree."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._flat import is_scalar, name_of, put
from ._flatten import flatten
from ._home import find_home
from ._select import parse_selectors, select
from ._state import is_reference, read, State


Func = Callable[..., Any]


class ArgPart:
    """An argument, of which every inexact array is differentiated."""

    def __init__(self, args: Sequence[Any], position: int, caller: str):
        self._position = position
        self._flat = flat = flatten(args[position])
        self._indices = [0] if is_scalar(flat.tree) else flat.differentiable
        if not self._indices:
            raise TypeError(
                f"`{caller}` must name an argument with an inexact array in it, or "
                f"a float. Got argument {position}: {eqx.tree_pformat(flat.tree)}, in which "
                "nothing can be differentiated. Convert numbers by `jnp.asarray(x, float)`."
            )
        self.diff = [flat.leaves[i] for i in self._indices]

    @property
    def names(self) -> list[str]:
        names = [self._flat.names[i] for i in self._indices]
        return [f"args[{self._position}]" + (name and f".{name}") for name in names]

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        """Puts these values into `args`. Returns the function to call."""
        leaves = put(self._flat.leaves, self._indices, diff)
        args[self._position] = self._flat.unflatten(leaves)
        return func

    def collect(self, grads: Sequence[Any]) -> Any:
        """The gradients in the structure of the argument."""
        nothing = [None] * len(self._flat.leaves)
        return self._flat.unflatten(put(nothing, self._indices, grads))


class StatePart:
    """The state tree, of which the selected leaves are differentiated."""

    def __init__(self, func: Func, args: Sequence[Any], grad_states: Any, caller: str):
        self._home = find_home(func)
        self.in_args = self._home is None
        if self.in_args and not args:
            raise TypeError(
                f"`{caller}` selects leaves of the first positional argument of `func`. "
                "Got no positional argument."
            )
        self._flat = flat = flatten(args[0] if self._home is None else self._home.tree)
        selectors, self._groups = jtu.tree_flatten(grad_states)
        self._selections = [select(flat, each, caller) for each in selectors]
        chosen = [each.indices for each in self._selections]
        self.indices = chosen[0] if len(chosen) == 1 else sorted(set().union(*chosen))
        self.diff = [flat.leaves[i] for i in self.indices]

    @property
    def names(self) -> list[str]:
        return [self._flat.names[i] for i in self.indices]

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        tree = self._flat.unflatten(put(self._flat.leaves, self.indices, diff))
        if self._home is not None:
            return self._home.rebuild(tree)
        args[0] = tree
        return func

    def collect(self, grads: Sequence[Any]) -> Any:
        """The gradients by path, in the structure of `grad_states`."""
        by_index = dict(zip(self.indices, grads, strict=True))
        return jtu.tree_unflatten(
            self._groups,
            [
                {name: by_index[i] for i, name in zip(*selection, strict=True)}
                for selection in self._selections
            ],
        )


class RefPart:
    """States by reference, which no argument holds."""

    in_args = False

    def __init__(self, grad_states: Any, caller: str):
        entries, self._groups = jtu.tree_flatten_with_path(grad_states, is_leaf=is_reference)
        self._entries = [_Entry(key_path, reference) for key_path, reference in entries]
        for entry in self._entries:
            if not any(map(_can_train, entry.leaves)):
                raise TypeError(
                    f"`{caller}` must name states with an inexact array in them. Got {entry}, "
                    "in which nothing can be differentiated."
                )
        leaves = [leaf for entry in self._entries for leaf in entry.leaves]
        self.refs = {id(leaf): leaf for leaf in leaves if _can_train(leaf)}
        self.diff = [read(ref) for ref in self.refs.values()]

    @property
    def names(self) -> list[str]:
        names = {
            id(leaf): f"{entry.name}.{name_of(key_path)}".strip(".")
            for entry in self._entries
            for key_path, leaf in jtu.tree_leaves_with_path(entry.unflatten(entry.leaves))
        }
        return [names[key] for key in self.refs]

    def find_untouched(self, touched: Iterable[jax.Ref]) -> list[str]:
        """The states of which no reference is among these."""
        ids = set(map(id, touched))
        return [str(entry) for entry in self._entries if ids.isdisjoint(map(id, entry.leaves))]

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        return func

    def collect(self, grads: Sequence[Any]) -> Any:
        """The gradients in the structure of `grad_states`, each in that of its state."""
        by_id = dict(zip(self.refs, grads, strict=True))
        collected = [
            entry.unflatten([by_id.get(id(leaf)) for leaf in entry.leaves])
            for entry in self._entries
        ]
        return jtu.tree_unflatten(self._groups, collected)


class _Entry:
    """A state in its place in `grad_states`."""

    def __init__(self, key_path: jtu.KeyPath, reference: State | jax.Ref):
        self._key_path = key_path
        self._reference = reference
        if isinstance(reference, State):
            self.leaves, self._structure = reference.leaves, reference.structure
        else:
            self.leaves, self._structure = jtu.tree_flatten(reference)

    @property
    def name(self) -> str:
        return name_of(self._key_path)

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jtu.tree_unflatten(self._structure, leaves)

    def __str__(self) -> str:
        is_state = isinstance(self._reference, State)
        described = repr(self._reference) if is_state else "a `jax.Ref`"
        return f"`{self.name}`, {described}" if self.name else described


def _can_train(leaf: Any) -> bool:
    return isinstance(leaf, jax.Ref) and jnp.issubdtype(leaf.dtype, jnp.inexact)


Part = ArgPart | StatePart | RefPart


def find_positions(
    argnums: int | tuple[int, ...],
    num_args: int,
    states: StatePart | RefPart | None,
    caller: str,
) -> list[int]:
    """The arguments that `argnums` names, counted from the start."""
    positions = []
    for argnum in argnums if isinstance(argnums, tuple) else (argnums,):
        position = argnum + num_args if argnum < 0 else argnum
        if not 0 <= position < num_args:
            raise ValueError(
                f"`{caller}` must name a positional argument. Got {argnum} in a call with "
                f"{num_args} of them. Keyword arguments are not differentiated."
            )
        if position in positions:
            raise ValueError(
                f"`{caller}` must not name an argument twice. Got {argnums} in a call with "
                f"{num_args} positional arguments."
            )
        if states is not None and states.in_args and position == 0:
            raise ValueError(
                f"`{caller}` must not name the argument that `grad_states` selects from. "
                f"Got {argnum}, the first argument. Its gradients come with `grad_states`."
            )
        positions.append(position)
    return positions


def parse_grad_states(grad_states: Any, caller: str) -> Any:
    """States by reference or selectors, in the containers that the user gave, or `None`."""
    leaves = jtu.tree_leaves(grad_states, is_leaf=is_reference)
    if not any(map(is_reference, leaves)):
        return parse_selectors(grad_states, caller)
    others = [leaf for leaf in leaves if not is_reference(leaf)]
    if others:
        raise TypeError(
            f"`{caller}` must be states by reference or selectors, and not both. Got "
            f"{eqx.tree_pformat(others[0])} among the states. For the states in a module, "
            "pass `vg.states(module)`."
        )
    return jtu.tree_map(lambda reference: reference, grad_states, is_leaf=is_reference)


def holds_references(grad_states: Any) -> bool:
    return any(map(is_reference, jtu.tree_leaves(grad_states)))


def parse_argnums(argnums: Any, caller: str) -> int | tuple[int, ...] | None:
    """An int or a tuple of ints, as they were given."""
    if argnums is None:
        return None
    if isinstance(argnums, list | tuple):
        if not argnums:
            raise ValueError(f"`{caller}` must name at least one argument. Got {argnums!r}.")
        return tuple([_parse_argnum(argnum, argnums, caller) for argnum in argnums])
    return _parse_argnum(argnums, argnums, caller)


def _parse_argnum(argnum: Any, argnums: Any, caller: str) -> int:
    try:
        if isinstance(argnum, bool):
            raise TypeError
        return operator.index(argnum)
    except TypeError:
        raise TypeError(
            f"`{caller}` must be an int, or a list or tuple of ints. Got {argnums!r}."
        ) from None
