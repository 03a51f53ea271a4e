"""Selectors: how to say which leaves of a pytree are meant, and finding these leaves."""

import abc
import dataclasses
import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from .._tree.flat import FlatTree
from .._tree.state import find_states, refuse_brainstate
from .._tree.text import names_without_leaves, near_misses, shorten
from .._tree.units import split_unit
from .glob import compile_glob


class Selector(abc.ABC):
    """Says which leaves of a pytree are meant. Combines with `&`, `|` and `~`."""

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

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        return list(map(self.combine, self.left.mask(flat), self.right.mask(flat)))

    def __repr__(self) -> str:
        symbol = "&" if self.combine is operator.and_ else "|"
        return f"({self.left!r} {symbol} {self.right!r})"


@dataclasses.dataclass(frozen=True)
class _Inverted(Selector):
    selector: Selector

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
        nodes = jtu.tree_leaves(flat.tree, is_leaf=self._is_instance)
        return [
            self._is_instance(node) for node in nodes for _ in range(len(FlatTree(node).leaves))
        ]

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

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        mask = [False] * len(flat.leaves)
        for i in flat.differentiable:
            mask[i] = bool(self.predicate(flat.leaves[i]))
        return mask

    def __repr__(self) -> str:
        return f"leaf({getattr(self.predicate, '__name__', self.predicate)})"


@dataclasses.dataclass(frozen=True)
class Indices(Selector):
    """Leaves that were resolved before."""

    indices: frozenset[int]

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        return [i in self.indices for i in range(len(flat.leaves))]


@dataclasses.dataclass(frozen=True)
class _Spec(Selector):
    """An Equinox filter spec: bools and predicates, in a prefix of the tree."""

    entries: tuple[bool | Callable[[Any], Any], ...]
    structure: Any

    @classmethod
    def of(cls, filter_spec: Any) -> "_Spec":
        entries, structure = jtu.tree_flatten(filter_spec)
        return cls(tuple(entries), structure)

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


def path(*globs: str) -> Selector:
    """Selects leaves by their dotted path.

    The path of a leaf is its `jax.tree_util.keystr(..., simple=True, separator=".")`, such
    as `layers.0.weight`. A path that names an inner node selects everything under it. A
    plain string means the same wherever a selector is taken.

    **Arguments:**

    - `globs`: one or more paths, in which `*` is one segment or a part of one, `**` any
        number of segments, `[01]` one of some characters (`[!01]` any other), and `{a,b}`
        one of some texts. A leaf is selected if one of `globs` matches it.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`, `ValueError`: at once, without a glob or with one that is no string or
        not well-formed.
    - `ValueError`: on selecting, if one of `globs` matches nothing. The message lists
        the nearest paths.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.path("layers.*.bias") & ~vg.path("layers.2")))
        ['layers.0.bias', 'layers.1.bias']
        >>> list(vg.states(mlp, "layers.{0,2}.weight"))
        ['layers.0.weight', 'layers.2.weight']
    """
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(
                f"`path(*globs)` takes strings such as 'layers.*.weight'. Got {glob!r}."
            )
    if not globs:
        raise TypeError("`path(*globs)` needs at least one string. Got none.")
    return ft.reduce(operator.or_, map(Path, globs))


def instance(node_type: type | tuple[type, ...]) -> Selector:
    """Selects everything under the nodes of a type.

    **Arguments:**

    - `node_type`: a class, or a tuple of classes, as for `isinstance`.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `node_type` is no class.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> model = [eqx.nn.Conv1d(1, 1, 3, key=jax.random.key(0)), eqx.nn.LayerNorm(8)]
        >>> list(vg.states(model, vg.instance(eqx.nn.LayerNorm)))
        ['1.bias', '1.weight']
    """
    types = node_type if isinstance(node_type, tuple) else (node_type,)
    if not types or not all(isinstance(each, type) for each in types):
        raise TypeError(
            f"`instance(node_type)` takes a class or a tuple of classes. Got {node_type!r}."
        )
    return Instance(node_type)


def at(where: Callable[[Any], Any]) -> Selector:
    """Selects a node, or several, by a function that looks them up.

    **Arguments:**

    - `where`: takes the tree and returns a node of it or a tuple of nodes, as the
        `where` of `equinox.tree_at`. Everything under those nodes is selected.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `where` is not callable; on selecting, if it returns
        something that is no part of the tree.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.at(lambda mlp: mlp.layers[-1])))
        ['layers.2.bias', 'layers.2.weight']
    """
    if not callable(where):
        raise TypeError(
            "`at(where)` takes a function of the tree, such as "
            f"`lambda model: model.layers[0]`. Got {where!r}."
        )
    return At(where)


def leaf(predicate: Callable[[Any], Any]) -> Selector:
    """Selects leaves by a test of the leaf.

    **Arguments:**

    - `predicate`: takes an inexact array and returns a bool. Other leaves are never
        selected, so it is not asked about them. Under `jax.jit` it may use the shape and
        the dtype of an array, but not its values.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `predicate` is not callable.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.leaf(lambda leaf: leaf.ndim == 2)))
        ['layers.0.weight', 'layers.1.weight']
    """
    if not callable(predicate):
        raise TypeError(
            "`leaf(predicate)` takes a function of an array, such as "
            f"`lambda leaf: leaf.ndim == 2`. Got {predicate!r}."
        )
    return Leaf(predicate)


class Selection(NamedTuple):
    """The chosen leaves of a flat pytree, sorted by name, as JAX sorts the keys of a dict."""

    indices: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, flat: FlatTree, indices: Sequence[int]) -> "Selection":
        chosen = sorted(indices, key=flat.names.__getitem__)
        return cls(tuple(chosen), tuple([flat.names[i] for i in chosen]))


def select(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    """Chooses among the differentiable leaves of `flat`."""
    candidates = flat.differentiable
    check_names(flat, candidates)
    mask = selector.mask(flat)
    indices = [i for i in candidates if mask[i]]
    if not indices:
        raise ValueError(
            f"`{caller}` must select inexact arrays. Got {selector!r}, which selects "
            f"{_describe_chosen(flat, mask)} of the `{type(flat.tree).__name__}`. "
            f"{_describe_choice(flat)}{_describe_states(flat, mask)}"
        )
    return Selection.of(flat, indices)


def select_any(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    """Chooses among the differentiable leaves of `flat`, or else its states by reference."""
    refuse_brainstate(flat.leaves, caller.replace("selector=...", "tree=..."))
    states = find_states(flat.leaves)
    if not states:
        return select(flat, selector, caller)
    check_names(flat, [*flat.differentiable, *states])
    mask = selector.mask(flat)
    chosen = [i for i in states if mask[i]]
    if not chosen:
        return select(flat, selector, caller)
    arrays = [flat.names[i] for i in flat.differentiable if mask[i]]
    if arrays:
        raise ValueError(
            f"`{caller}` must select arrays or states by reference, and not both. Got "
            f"{selector!r}, which selects the array `{arrays[0]}` and the state "
            f"`{flat.names[chosen[0]]}`. Select states by `vg.instance(vg.State)`, and arrays "
            "by `~vg.instance(vg.State)`."
        )
    return Selection.of(flat, chosen)


def check_names(flat: FlatTree, indices: Sequence[int]) -> None:
    """Refuses two leaves with one dotted path."""
    all_names = flat.names
    names = [all_names[i] for i in indices]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        both = [jtu.keystr(flat.key_paths[i]) for i in indices if all_names[i] == twice]
        raise ValueError(
            f"Two leaves share the dotted path `{twice}`: `{'` and `'.join(both)}`. "
            "Gradients are named by that path, so rename one of the keys."
        )


def _describe_chosen(flat: FlatTree, mask: Any) -> str:
    chosen = [
        f"`{name}` ({eqx.tree_pformat(leaf)})"
        for name, leaf, is_chosen in zip(flat.names, flat.leaves, mask, strict=True)
        if is_chosen
    ]
    return shorten(chosen) or "nothing"


def _describe_choice(flat: FlatTree) -> str:
    names = [f"`{flat.names[i]}`" for i in flat.differentiable]
    empty = [f"`{name}`" for name in names_without_leaves(flat.tree)]
    choice = f"Its inexact arrays are {shorten(names)}." if names else "It has none."
    return f"{choice} There is nothing at {shorten(empty)}." if empty else choice


def _describe_states(flat: FlatTree, mask: Any) -> str:
    if not any(mask[i] for i in find_states(flat.leaves)):
        return ""
    return " To differentiate by states, pass them, as `vg.states(...)` gives them."
