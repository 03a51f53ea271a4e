"""The `grad_states` of the user: selectors or states by reference, in any nesting."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.tree_util as jtu

from .._tree.flat import name_of, refuse_endless
from .._tree.state import is_reference, refuse_brainstate, State
from .._tree.text import show
from .._tree.types import PyTree
from .selectors import as_selector, Selector, SelectorLike


# Accepted as `grad_states`: a selector, a container of several, or states by reference.
GradStatesLike: TypeAlias = SelectorLike | State[Any] | jax.Ref


class GradStates(eqx.Module):
    """What to differentiate with respect to, in any nesting. Selectors are static to JAX."""

    states: tuple[Any, ...]
    selectors: tuple[Selector, ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    @classmethod
    def of(cls, tree: PyTree, by_reference: bool) -> "GradStates":
        entries, structure = jtu.tree_flatten(tree, is_leaf=is_reference)
        states, selectors = (entries, ()) if by_reference else ((), entries)
        return cls(tuple(states), tuple(selectors), structure)

    @property
    def by_reference(self) -> bool:
        return bool(self.states)

    @property
    def entries(self) -> tuple[Any, ...]:
        return self.states or self.selectors

    def unflatten(self, entries: Sequence[Any]) -> Any:
        return jtu.tree_unflatten(self.structure, entries)

    @property
    def names(self) -> list[str]:
        tree = self.unflatten(self.entries)
        paths, _ = jtu.tree_flatten_with_path(tree, is_leaf=is_reference)
        return [name_of(key_path) for key_path, _ in paths]


def parse_grad_states(grad_states: object, caller: str) -> GradStates | None:
    """States by reference or selectors, in the containers that the user gave."""
    if grad_states is None:
        return None
    refuse_endless(grad_states)
    leaves = jtu.tree_leaves(grad_states, is_leaf=is_reference)
    refuse_brainstate(leaves, caller)
    if not any(map(is_reference, leaves)):
        return GradStates.of(_parse_selectors(grad_states, caller), by_reference=False)
    others = [leaf for leaf in leaves if not is_reference(leaf)]
    if others:
        raise TypeError(
            f"`{caller}` must be states by reference or selectors, and not both. Got "
            f"{show(others[0])} among the states. For the states in a module, "
            "pass `vg.states(module)`."
        )
    return GradStates.of(grad_states, by_reference=True)


def _parse_selectors(grad_states: object, caller: str) -> Any:
    """A selector, or the user's container of selectors."""
    if isinstance(grad_states, list | tuple | dict) and not jtu.tree_leaves(grad_states):
        raise ValueError(
            f"`{caller}` must name at least one selector. Got {show(grad_states)}. "
            "To differentiate arguments alone, leave `grad_states` out."
        )
    if _is_group(grad_states):
        return jtu.tree_map(
            lambda each: None if each is None else _parse_selectors(each, caller),
            grad_states,
            is_leaf=lambda node: node is not grad_states,
        )
    return as_selector(grad_states)


def _is_group(grad_states: object) -> bool:
    """Whether this is a container of selectors, rather than a filter spec."""
    return isinstance(grad_states, list | tuple | dict) and any(
        isinstance(each, str | Selector) for each in jtu.tree_leaves(grad_states)
    )
