"""The parts of a call that are differentiated: arguments, and leaves of the state tree."""

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._select.resolve import parse_selectors, select
from .._tree.flat import FlatTree, is_scalar, name_of, put
from .._tree.flatten import flatten
from .._tree.state import is_reference, read, State
from .._tree.units import attach_unit, quantity_test, split_unit
from .owner import find_home


Func = Callable[..., Any]


class GradStates(eqx.Module):
    """What gradients are wanted of, in any nesting, and so that it can be hashed."""

    entries: tuple[Any, ...]
    structure: Any = eqx.field(static=True)
    by_reference: bool = eqx.field(static=True)

    @classmethod
    def of(cls, tree: Any, by_reference: bool) -> "GradStates":
        entries, structure = jtu.tree_flatten(tree, is_leaf=is_reference)
        return cls(tuple(entries), structure, by_reference)

    def unflatten(self, entries: Sequence[Any]) -> Any:
        return jtu.tree_unflatten(self.structure, entries)

    @property
    def names(self) -> list[str]:
        tree = self.unflatten(self.entries)
        paths, _ = jtu.tree_flatten_with_path(tree, is_leaf=is_reference)
        return [name_of(key_path) for key_path, _ in paths]


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

    def __init__(self, func: Func, args: Sequence[Any], grad_states: GradStates, caller: str):
        self._grad_states = grad_states
        self._home = find_home(func)
        self.in_args = self._home is None
        if self.in_args and not args:
            raise TypeError(
                f"`{caller}` selects leaves of the first positional argument of `func`. "
                "Got no positional argument."
            )
        self._flat = flat = flatten(args[0] if self._home is None else self._home.tree)
        self._selections = [select(flat, each, caller) for each in grad_states.entries]
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
        return self._grad_states.unflatten(
            [
                {name: by_index[i] for i, name in zip(*selection, strict=True)}
                for selection in self._selections
            ]
        )


class RefPart:
    """States by reference, which no argument holds."""

    in_args = False

    def __init__(self, grad_states: GradStates, caller: str):
        self._grad_states = grad_states
        self._values = [_split_reference(reference) for reference in grad_states.entries]
        useless = [not any(map(_can_train, each.leaves)) for each in self._values]
        if any(useless):
            raise TypeError(
                f"`{caller}` must name states with an inexact array in them. Got "
                f"{'; '.join(self._describe(useless))}, in which nothing can be "
                "differentiated."
            )
        units = {
            id(leaf): (leaf, unit)
            for each in self._values
            for leaf, unit in zip(each.leaves, each.units, strict=True)
            if _can_train(leaf)
        }
        self.refs = {key: ref for key, (ref, _) in units.items()}
        self.diff = [attach_unit(read(ref), unit) for ref, unit in units.values()]

    @property
    def names(self) -> list[str]:
        names = {
            id(leaf): f"{name}.{inner}".strip(".")
            for name, each in zip(self._grad_states.names, self._values, strict=True)
            for inner, leaf in zip(each.names, each.leaves, strict=True)
        }
        return [names[key] for key in self.refs]

    def list_gradients(self, grads: Any) -> list[Any]:
        """The inverse of `collect`: a gradient for each reference, in their order."""
        entries = self._grad_states.structure.flatten_up_to(grads)
        by_id = {
            id(leaf): grad
            for each, entry in zip(self._values, entries, strict=True)
            for leaf, grad in zip(each.leaves, each.structure.flatten_up_to(entry), strict=True)
        }
        return [by_id[key] for key in self.refs]

    def find_untouched(self, touched: Iterable[jax.Ref]) -> list[str]:
        """The states of which no reference is among these."""
        ids = set(map(id, touched))
        untouched = [ids.isdisjoint(map(id, each.leaves)) for each in self._values]
        return self._describe(untouched) if any(untouched) else []

    def _describe(self, chosen: Sequence[bool]) -> list[str]:
        pairs = zip(self._grad_states.names, self._grad_states.entries, strict=True)
        described = []
        for name, reference in itertools.compress(pairs, chosen):
            text = repr(reference) if isinstance(reference, State) else "a `jax.Ref`"
            described.append(f"`{name}`, {text}" if name else text)
        return described

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        return func

    def collect(self, grads: Sequence[Any]) -> Any:
        """The gradients in the structure of `grad_states`, each in that of its state."""
        by_id = dict(zip(self.refs, grads, strict=True))
        return self._grad_states.unflatten(
            [
                jtu.tree_unflatten(each.structure, [by_id.get(id(x)) for x in each.leaves])
                for each in self._values
            ]
        )


class _Reference(NamedTuple):
    """What is in a state, of which a Quantity is one leaf, and its number a reference."""

    leaves: Sequence[Any]
    units: Sequence[Any]
    structure: Any

    @property
    def names(self) -> list[str]:
        value = jtu.tree_unflatten(self.structure, self.leaves)
        return [name_of(key_path) for key_path, _ in jtu.tree_leaves_with_path(value)]


def _split_reference(reference: State | jax.Ref) -> _Reference:
    if isinstance(reference, jax.Ref):
        return _Reference(*_split_units([reference]), jtu.tree_structure(reference))
    if quantity_test() is None:
        return _Reference(*_split_units(reference.leaves), reference.structure)
    flat = FlatTree(jtu.tree_unflatten(reference.structure, reference.leaves))
    return _Reference(*_split_units(flat.leaves), flat.treedef)


def _split_units(leaves: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    pairs = list(map(split_unit, leaves))
    return [number for number, _ in pairs], [unit for _, unit in pairs]


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


def parse_grad_states(grad_states: Any, caller: str) -> GradStates | None:
    """States by reference or selectors, in the containers that the user gave."""
    if grad_states is None:
        return None
    leaves = jtu.tree_leaves(grad_states, is_leaf=is_reference)
    if not any(map(is_reference, leaves)):
        return GradStates.of(parse_selectors(grad_states, caller), by_reference=False)
    others = [leaf for leaf in leaves if not is_reference(leaf)]
    if others:
        raise TypeError(
            f"`{caller}` must be states by reference or selectors, and not both. Got "
            f"{eqx.tree_pformat(others[0])} among the states. For the states in a module, "
            "pass `vg.states(module)`."
        )
    return GradStates.of(grad_states, by_reference=True)


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
