"""The values of states to differentiate with respect to, in the structure of `grad_states`."""

import functools as ft
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._select.grad_states import GradStates
from .._tree.flat import FlatTree, Split
from .._tree.state import read, State
from .._tree.types import PyTree
from .._tree.units import attach_unit


class StateValues:
    """The values of states by reference, which are not in any argument."""

    in_args = False
    tree = None  # states by reference have no state tree

    def __init__(self, grad_states: GradStates, caller: str):
        self._grad_states = grad_states
        self._contents = [_find_content(reference) for reference in grad_states.entries]
        useless = [not any(map(_can_train, each.diff)) for each in self._contents]
        if any(useless):
            raise TypeError(
                f"`{caller}` must name states with an inexact array in them. Got "
                f"{'; '.join(self._describe(useless))}, in which nothing can be "
                "differentiated."
            )
        pairs = {
            id(ref): (ref, unit)
            for each in self._contents
            for ref, unit in zip(each.diff, _list_units(each), strict=True)
            if _can_train(ref)
        }
        self.refs = {key: ref for key, (ref, _) in pairs.items()}
        self.units = [unit for _, unit in pairs.values()]

    @ft.cached_property
    def diff(self) -> list[Any]:
        return list(map(read, self.refs.values()))

    @property
    def params(self) -> list[Any]:
        """The values with their units."""
        return list(map(attach_unit, self.diff, self.units))

    @property
    def names(self) -> list[str]:
        """The paths of the values."""
        return self._name_values(self._grad_states.names)

    @property
    def labels(self) -> list[str]:
        """The names of the values in errors, with the name of their state if it has one."""
        pairs = zip(self._grad_states.entries, self._grad_states.names, strict=True)
        names = [getattr(entry, "name", None) or name for entry, name in pairs]
        return [label or "grad_states" for label in self._name_values(names)]

    def _name_values(self, entries: Sequence[str]) -> list[str]:
        names = {}
        for name, each in zip(entries, self._contents, strict=True):
            inner = FlatTree(each.combine()).names
            for i, ref in zip(each.rest.indices, each.diff, strict=True):
                names[id(ref)] = f"{name}.{inner[i]}".strip(".")
        return [names[key] for key in self.refs]

    def refuse_untouched(self, touched: Iterable[jax.Ref], caller: str) -> None:
        """Raises an error if there is a state none of whose references is among these."""
        ids = set(map(id, touched))
        untouched = [ids.isdisjoint(map(id, each.diff)) for each in self._contents]
        if any(untouched):
            raise ValueError(
                f"`{caller}` must name states that `func` reads. It does not touch "
                f"{'; '.join(self._describe(untouched))}. Remove them, or pass "
                "`check_states=False` to get zeros."
            )

    def _describe(self, chosen: Sequence[bool]) -> list[str]:
        pairs = zip(self._grad_states.names, self._grad_states.entries, strict=True)
        described = []
        for name, reference in itertools.compress(pairs, chosen):
            text = repr(reference) if isinstance(reference, State) else "a `jax.Ref`"
            described.append(f"`{name}`, {text}" if name else text)
        return described

    def insert(
        self, func: Callable[..., Any], args: list[Any], diff: Sequence[Any]
    ) -> Callable[..., Any]:
        return func

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The gradients in the structure of `grad_states`, each with that of its state."""
        by_id = dict(zip(self.refs, grads, strict=True))
        return self._grad_states.unflatten(
            [
                each.rest.arrange([by_id.get(id(ref)) for ref in each.diff])
                for each in self._contents
            ]
        )

    def list_gradients(self, grads: PyTree) -> list[Any]:
        """The inverse of `arrange`: a gradient for each reference, in their order."""
        entries = self._grad_states.structure.flatten_up_to(grads)
        by_id = {}
        for each, entry in zip(self._contents, entries, strict=True):
            leaves = each.rest.structure.flatten_up_to(entry)
            for i, ref in zip(each.rest.indices, each.diff, strict=True):
                by_id[id(ref)] = leaves[i]
        return [by_id[key] for key in self.refs]


def _find_content(reference: State | jax.Ref) -> Split:
    """The content of a state, with a reference in place of each array."""
    if isinstance(reference, State):
        return reference.content
    return FlatTree(reference).split([0])


def _list_units(content: Split) -> Sequence[Any]:
    return content.rest.units or [None] * len(content.diff)


def _can_train(ref: jax.Ref) -> bool:
    return jnp.issubdtype(ref.dtype, jnp.inexact)
