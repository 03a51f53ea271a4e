"""The kinds of selectors, each of which turns a pytree into a mask."""

import abc
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._tree.flat import FlatTree, names_without_leaves, near_misses
from .._tree.units import split_unit
from .glob import compile_glob


class Selector(abc.ABC):
    """Says which leaves of a pytree are meant. Combines with `&`, `|` and `~`."""

    # Whether the mask follows from structure and types alone, so that it can be
    # remembered for the next pytree of that kind.
    structural: bool = True

    @abc.abstractmethod
    def mask(self, flat: FlatTree) -> Sequence[bool]:
        """One bool for each leaf; it may be true for leaves that are never trained."""

    def __and__(self, other: Any) -> "Selector":
        return _Combined(operator.and_, self, as_selector(other))

    def __rand__(self, other: Any) -> "Selector":
        return _Combined(operator.and_, as_selector(other), self)

    def __or__(self, other: Any) -> "Selector":
        return _Combined(operator.or_, self, as_selector(other))

    def __ror__(self, other: Any) -> "Selector":
        return _Combined(operator.or_, as_selector(other), self)

    def __invert__(self) -> "Selector":
        return _Inverted(self)


@dataclasses.dataclass(frozen=True)
class _Combined(Selector):
    combine: Callable[[bool, bool], bool]
    left: Selector
    right: Selector

    @property
    def structural(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.structural and self.right.structural

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        return list(map(self.combine, self.left.mask(flat), self.right.mask(flat)))

    def __repr__(self) -> str:
        symbol = "&" if self.combine is operator.and_ else "|"
        return f"({self.left!r} {symbol} {self.right!r})"


@dataclasses.dataclass(frozen=True)
class _Inverted(Selector):
    selector: Selector

    @property
    def structural(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.selector.structural

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        return list(map(operator.not_, self.selector.mask(flat)))

    def __repr__(self) -> str:
        return f"~{self.selector!r}"


@dataclasses.dataclass(frozen=True)
class Path(Selector):
    glob: str

    def __post_init__(self):
        compile_glob(self.glob)

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        matches = compile_glob(self.glob).fullmatch
        mask = [matches(name) is not None for name in flat.names]
        if not any(mask) and not any(map(matches, names_without_leaves(flat.tree))):
            raise ValueError(
                f"The path {self.glob!r} matches nothing in the "
                f"`{type(flat.tree).__name__}`. {near_misses(self.glob, flat)}"
            )
        return mask

    def __repr__(self) -> str:
        return f"path({self.glob!r})"


@dataclasses.dataclass(frozen=True)
class Instance(Selector):
    node_type: type | tuple[type, ...]

    def _is_instance(self, node: Any) -> bool:
        return isinstance(node, self.node_type)

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        nodes = jtu.tree_map(self._is_instance, flat.tree, is_leaf=self._is_instance)
        return _Spec.of(nodes).mask(flat)

    def __repr__(self) -> str:
        types = self.node_type if isinstance(self.node_type, tuple) else (self.node_type,)
        return f"instance({' | '.join(node_type.__name__ for node_type in types)})"


class _Marker:
    """Stands in the place of a leaf while `at` looks for it."""

    def __init__(self, index: int):
        self.index = index


@dataclasses.dataclass(frozen=True)
class At(Selector):
    where: Callable[[Any], Any]

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        marked = flat.unflatten([_Marker(i) for i in range(len(flat.leaves))])
        mask = [False] * len(flat.leaves)
        for leaf in jtu.tree_leaves(self.where(marked)):
            if not isinstance(leaf, _Marker):
                raise TypeError(
                    "`at(where)` must return a node of the tree, or a tuple of nodes, as "
                    f"in `equinox.tree_at`. Got {leaf!r}, which is no leaf of the "
                    f"`{type(flat.tree).__name__}`."
                )
            mask[leaf.index] = True
        return mask

    def __repr__(self) -> str:
        return f"at({getattr(self.where, '__name__', self.where)})"


@dataclasses.dataclass(frozen=True)
class Leaf(Selector):
    predicate: Callable[[Any], Any]
    structural = False

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        mask = [False] * len(flat.leaves)
        for i in flat.differentiable:
            mask[i] = bool(self.predicate(flat.leaves[i]))
        return mask

    def __repr__(self) -> str:
        return f"leaf({getattr(self.predicate, '__name__', self.predicate)})"


@dataclasses.dataclass(frozen=True)
class _Spec(Selector):
    """An Equinox filter spec: bools and predicates, in a prefix of the tree."""

    entries: tuple[bool | Callable[[Any], Any], ...]
    structure: Any

    @classmethod
    def of(cls, filter_spec: Any) -> "_Spec":
        entries, structure = jtu.tree_flatten(filter_spec)
        return cls(tuple(entries), structure)

    @property
    def structural(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not any(map(callable, self.entries))

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        filter_spec = jtu.tree_unflatten(self.structure, self.entries)
        parts: list[tuple[Any, Any]] = []
        try:
            jtu.tree_map(lambda *part: parts.append(part), filter_spec, flat.tree)
        except ValueError as error:
            raise ValueError(
                "A filter spec must have the structure of the tree that it selects from, "
                "or of its first levels. Got "
                f"{eqx.tree_pformat(filter_spec)} for the tree "
                f"{eqx.tree_pformat(flat.tree)}."
            ) from error
        return [
            bool(entry(split_unit(leaf)[0])) if callable(entry) else bool(entry)
            for entry, subtree in parts
            for leaf in FlatTree(subtree).leaves
        ]

    def __repr__(self) -> str:
        return eqx.tree_pformat(jtu.tree_unflatten(self.structure, self.entries))


def as_selector(selector: Any) -> Selector:
    """The one form that all ways to write a selector are turned into."""
    if isinstance(selector, Selector):
        return selector
    if isinstance(selector, str):
        return Path(selector)
    spec = _Spec.of(selector)
    if not spec.entries or not all(map(_is_entry, spec.entries)):
        given = eqx.tree_pformat(selector)
        if any(map(eqx.is_array, spec.entries)):
            given += ". It says which leaves are meant, and does not hold them: pass the "
            given += "tree itself as an argument of the function"
        elif isinstance(selector, int):
            given += ". To differentiate an argument, use `argnums`"
        raise TypeError(
            "A selector must be a path such as 'layers.*.weight', one of `path(...)`, "
            "`instance(...)`, `at(...)` and `leaf(...)`, `True` for all inexact arrays, or "
            f"another Equinox filter spec, of bools and predicates. Got {given}."
        )
    return spec


def _is_entry(entry: Any) -> bool:
    return callable(entry) or isinstance(entry, bool | np.bool_)
