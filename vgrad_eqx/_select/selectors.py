"""Selectors: how to say which leaves of a pytree are meant, and finding these leaves."""

import abc
import copy
import dataclasses
import functools as ft
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np

from .._tree.flat import FlatTree, refuse_endless, replace_at
from .._tree.numpy_leaves import as_given
from .._tree.prompt import AtPrompt, brief
from .._tree.state import find_states, is_of_brainstate, refuse_brainstate
from .._tree.text import names_without_leaves, near_misses, quote, shorten, show
from .._tree.units import split_unit
from .glob import compile_glob, find_unmatched, list_paths


class Selector(AtPrompt, abc.ABC):
    """Chooses leaves of a pytree. Combines with `&`, `|` and `~`."""

    _inner = frozenset(
        ["combine", "entries", "glob", "indices", "list_paths", "mask", "node_type"]
        + ["predicate", "selectors", "structure", "where"]
    )

    @abc.abstractmethod
    def mask(self, flat: FlatTree) -> Sequence[bool]:
        """One bool for each leaf; it may be true for leaves that are never trained."""

    def list_paths(self) -> Sequence[str]:
        """The paths that must each choose a leaf, if there is a leaf at that path."""
        return ()

    def __and__(self, other: "SelectorLike") -> "Selector":
        return _Combined(operator.and_, (self, as_selector(other)))

    def __rand__(self, other: "SelectorLike") -> "Selector":
        return _Combined(operator.and_, (as_selector(other), self))

    def __or__(self, other: "SelectorLike") -> "Selector":
        return _Combined(operator.or_, (self, as_selector(other)))

    def __ror__(self, other: "SelectorLike") -> "Selector":
        return _Combined(operator.or_, (as_selector(other), self))

    def __invert__(self) -> "Selector":
        return _Combined(operator.not_, (self,))


# Anything accepted as a selector: a selector, a path, or an Equinox filter spec.
SelectorLike: TypeAlias = (
    Selector
    | str
    | bool
    | Callable[[Any], Any]
    | eqx.Module
    | Sequence[Any]
    | Mapping[Any, Any]
)


@dataclasses.dataclass(frozen=True)
class _Combined(Selector):
    combine: Callable[..., bool]
    selectors: tuple[Selector, ...]

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        return list(map(self.combine, *[each.mask(flat) for each in self.selectors]))

    def list_paths(self) -> Sequence[str]:
        if self.combine is not operator.or_:
            return ()
        return [path for each in self.selectors for path in each.list_paths()]

    def __repr__(self) -> str:
        if self.combine is operator.not_:
            return f"~{self.selectors[0]!r}"
        symbol = " & " if self.combine is operator.and_ else " | "
        return f"({symbol.join(map(repr, self.selectors))})"


_MARK = "'"  # around globs


@dataclasses.dataclass(frozen=True)
class Path(Selector):
    glob: str

    def __post_init__(self):
        compile_glob(self.glob)

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        matches = compile_glob(self.glob).fullmatch
        mask = [matches(name) is not None for name in flat.names]
        if "{" in self.glob or not any(mask):
            self._refuse_unmatched(flat)
        return mask

    def _refuse_unmatched(self, flat: FlatTree) -> None:
        """Raises an error if the glob, or an alternative in its braces, matches nothing."""
        if find_unmatched(self.glob, flat.names) is None:
            return
        unmatched = find_unmatched(self.glob, [*flat.names, *names_without_leaves(flat.tree)])
        if unmatched is not None:
            part = "" if unmatched == self.glob else f" for {quote(unmatched, _MARK)}"
            raise ValueError(
                f"The path {quote(self.glob, _MARK)} matches nothing in the "
                f"`{type(flat.tree).__name__}`{part}. {near_misses(unmatched, flat)}"
            )

    def list_paths(self) -> Sequence[str]:
        if "*" in self.glob and "{" not in self.glob:
            return ()
        return list_paths(self.glob)

    def __repr__(self) -> str:
        return f"path({self.glob!r})"


@dataclasses.dataclass(frozen=True)
class Instance(Selector):
    node_type: type | tuple[type, ...]

    def _is_instance(self, node: object) -> bool:
        return isinstance(node, self.node_type)

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        leaves, mask = iter(as_given(flat.leaves)), []
        for node in jtu.tree_leaves(flat.tree, is_leaf=self._is_instance):
            inside = list(itertools.islice(leaves, len(FlatTree(node).leaves)))
            is_inside = self._is_instance(inside[0] if jtu.all_leaves([node]) else node)
            mask += [is_inside] * len(inside)
        return mask

    def __repr__(self) -> str:
        types = self.node_type if isinstance(self.node_type, tuple) else (self.node_type,)
        return f"instance({' | '.join(node_type.__name__ for node_type in types)})"


@dataclasses.dataclass(frozen=True)
class At(Selector):
    where: Callable[[Any], Any]

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        leaves, tree = flat.leaves, flat.tree
        # Leaves are found by identity, which is ambiguous for a leaf that appears twice.
        if len(set(map(id, leaves))) < len(leaves):
            places = [*flat.differentiable, *find_states(leaves)]
            twins = [copy.copy(leaves[i]) for i in places]
            tree = flat.unflatten(replace_at(leaves, places, twins))
            leaves = FlatTree(tree).leaves
        found, known = FlatTree(self.where(tree)).leaves, set(map(id, leaves))
        for leaf in found:
            if id(leaf) not in known:
                raise TypeError(
                    "`at(where)` must return a node of the tree, or a tuple of nodes, as "
                    f"in `equinox.tree_at`. Got {show(leaf)}, which is not a leaf of the "
                    f"`{type(flat.tree).__name__}`."
                )
        chosen = set(map(id, found))
        return [id(leaf) in chosen for leaf in leaves]

    def __repr__(self) -> str:
        return f"at({_name_function(self.where)})"


@dataclasses.dataclass(frozen=True)
class Leaf(Selector):
    predicate: Callable[[Any], Any]

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        mask, leaves = [False] * len(flat.leaves), as_given(flat.leaves)
        for i in flat.differentiable:
            mask[i] = _ask(self.predicate, leaves[i])
        return mask

    def __repr__(self) -> str:
        return f"leaf({_name_function(self.predicate)})"


def _name_function(func: Callable[..., Any]) -> str:
    return getattr(func, "__name__", type(func).__name__)


def _ask(predicate: Callable[[Any], Any], leaf: object) -> bool:
    answer = predicate(leaf)
    if isinstance(answer, bool | np.bool_) or (eqx.is_array(answer) and answer.shape == ()):
        return bool(answer)
    raise TypeError(
        "The predicate of a selector must return True or False for a leaf. Got "
        f"{show(answer)} for {show(leaf)}. For a test of all elements, use `.all()`."
    )


@dataclasses.dataclass(frozen=True)
class Indices(Selector):
    """Leaves that are already known by index."""

    indices: frozenset[int]

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        return [i in self.indices for i in range(len(flat.leaves))]

    def __repr__(self) -> str:
        return f"{len(self.indices):,} leaves"


@dataclasses.dataclass(frozen=True)
class _Spec(Selector):
    """An Equinox filter spec: bools and predicates, in a prefix of the tree."""

    entries: tuple[bool | Callable[[Any], Any], ...]
    structure: Any

    def mask(self, flat: FlatTree) -> Sequence[bool]:
        try:
            # Users' classes are not rebuilt with bools, because they may check their fields.
            subtrees = self.structure.flatten_up_to(flat.tree)
        except ValueError as error:
            raise ValueError(
                "A filter spec must have the structure of the tree that it selects from, or of "
                f"its first levels. Got {self!r} for {show(flat.tree)}. Make it from that tree "
                "with `jax.tree.map`."
            ) from error
        leaves = flat.leaves
        if any(map(callable, self.entries)):
            leaves = as_given(leaves)
        sizes = [len(FlatTree(subtree).leaves) for subtree in subtrees]
        entries = [e for e, size in zip(self.entries, sizes, strict=True) for _ in range(size)]
        return [
            _ask(entry, split_unit(leaf)[0]) if callable(entry) else bool(entry)
            for entry, leaf in zip(entries, leaves, strict=True)
        ]

    def __repr__(self) -> str:
        if len(self.entries) == 1 and jtu.treedef_is_leaf(self.structure):
            return brief(self.entries[0])
        if self.entries == (True,):
            return "True"
        number = len(self.entries)
        return f"a filter spec of {number} {'entry' if number == 1 else 'entries'}"


def as_selector(selector: object) -> Selector:
    """Converts every accepted form of a selector to a `Selector`."""
    if isinstance(selector, Selector):
        return selector
    if isinstance(selector, str):
        return Path(selector)
    refuse_endless(selector)
    entries, structure = jtu.tree_flatten(selector)
    # A module of brainstate can be called, but not as a predicate.
    if entries and all(map(_is_entry, entries)) and not is_of_brainstate(selector):
        return _Spec(tuple(entries), structure)
    hint = ""
    if any(map(eqx.is_array, entries)):
        hint = (
            " It says which leaves to choose, and does not contain them: pass the tree itself "
            "as an argument of the function."
        )
    elif is_of_brainstate(selector):
        hint = " For one of brainstate, make a `vg.State` of its `value`."
    elif isinstance(selector, int):
        hint = " To differentiate an argument, use `argnums`."
    elif any(isinstance(entry, type) for entry in entries):
        hint = " For what is under the nodes of a type, use `vg.instance(...)`."
    raise TypeError(
        "A selector must be a path such as 'layers.*.weight', one of `path(...)`, "
        "`instance(...)`, `at(...)` and `leaf(...)`, `True` for all inexact arrays, or "
        f"another Equinox filter spec, of bools and predicates. Got {show(selector)}.{hint}"
    )


def _is_entry(entry: object) -> bool:
    is_predicate = callable(entry) and not isinstance(entry, type)
    return is_predicate or isinstance(entry, bool | np.bool_)


def path(*globs: str) -> Selector:
    """Selects leaves by their dotted path.

    The path of a leaf is its `jax.tree_util.keystr(..., simple=True, separator=".")`, such
    as `layers.0.weight`. A path that names an inner node selects everything under it. A
    plain string means the same wherever a selector is accepted.

    **Arguments:**

    - `globs`: one or more paths, in which `*` matches a segment or a part of one, `**` any
        number of segments, `[01]` one of these characters (`[!01]` any other), and `{a,b}`
        either of these alternatives. A leaf is selected if any of `globs` matches it.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`, `ValueError`: at once, if there is no glob, or one is not a string or is
        malformed.
    - `ValueError`: on selecting, if one of `globs`, or an alternative in its braces, matches
        nothing; the message lists the nearest paths. Also if one of them is the exact path of
        a leaf that is not an inexact array; `*` and `**` skip such leaves.

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
                f"`path(*globs)` takes strings such as 'layers.*.weight'. Got {show(glob)}."
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

    - `TypeError`: at once, if `node_type` is not a class or a tuple of classes.

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
            f"`instance(node_type)` takes a class or a tuple of classes. Got {show(node_type)}."
        )
    return Instance(node_type)


def at(where: Callable[[Any], Any]) -> Selector:
    """Selects one or more nodes with a function that returns them.

    **Arguments:**

    - `where`: a function that takes the tree and returns a node of it or a tuple of nodes,
        like the `where` of `equinox.tree_at`. Everything under those nodes is selected.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `where` is not callable; on selecting, if it returns
        something that is not part of the tree.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.at(lambda mlp: mlp.layers[-1])))
        ['layers.2.bias', 'layers.2.weight']
    """
    if not callable(where) or isinstance(where, type):
        raise TypeError(
            "`at(where)` takes a function of the tree, such as "
            f"`lambda model: model.layers[0]`. Got {show(where)}."
        )
    return At(where)


def leaf(predicate: Callable[[Any], Any]) -> Selector:
    """Selects the leaves for which a predicate is true.

    **Arguments:**

    - `predicate`: a function that takes an inexact array and returns a bool. It is not called
        for other leaves, which are never selected. Under `jax.jit`, it may use the shape and
        dtype of an array, but not its values.

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
    if not callable(predicate) or isinstance(predicate, type):
        raise TypeError(
            "`leaf(predicate)` takes a function of an array, such as "
            f"`lambda leaf: leaf.ndim == 2`. Got {show(predicate)}."
        )
    return Leaf(predicate)


class Selection(NamedTuple):
    """The chosen leaves of a flat pytree, sorted by name, as JAX sorts dict keys."""

    indices: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, flat: FlatTree, indices: Sequence[int]) -> "Selection":
        chosen = sorted(indices, key=flat.names.__getitem__)
        return cls(tuple(chosen), tuple([flat.names[i] for i in chosen]))


def select(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    """Chooses among the differentiable leaves of `flat`."""
    check_names(flat, flat.differentiable)
    mask = selector.mask(flat)
    indices = [i for i in flat.differentiable if mask[i]]
    if not indices:
        _refuse(flat, selector, mask, caller)
    _check_paths(flat, selector, flat.differentiable, caller)
    return Selection.of(flat, indices)


def select_any(flat: FlatTree, selector: Selector, caller: str) -> Selection:
    """Chooses among the differentiable leaves of `flat`, or else its states by reference."""
    refuse_brainstate(flat.leaves, caller.replace("selector=...", "tree=..."))
    states = find_states(flat.leaves)
    check_names(flat, [*flat.differentiable, *states])
    mask = selector.mask(flat) if states else ()
    chosen = [i for i in states if mask[i]]
    if not chosen:
        return select(flat, selector, caller)
    arrays = [flat.names[i] for i in flat.differentiable if mask[i]]
    if arrays:
        raise ValueError(
            f"`{caller}` must select arrays or states by reference, and not both. Got "
            f"{selector!r}, which selects the array {quote(arrays[0])} and the state "
            f"{quote(flat.names[chosen[0]])}. Select states by `vg.instance(vg.State)`, and "
            "arrays by `~vg.instance(vg.State)`."
        )
    _check_paths(flat, selector, [*flat.differentiable, *states], caller)
    return Selection.of(flat, chosen)


def _check_paths(
    flat: FlatTree, selector: Selector, indices: Sequence[int], caller: str
) -> None:
    """Raises an error if a path that is spelled out leads to a leaf that cannot be chosen."""
    if paths := selector.list_paths():
        names = set(flat.names).difference([flat.names[i] for i in indices])
        for path in paths:
            if path in names:
                _refuse(flat, Path(path), [name == path for name in flat.names], caller)


def _refuse(flat: FlatTree, selector: Selector, mask: Sequence[bool], caller: str) -> NoReturn:
    refuse_brainstate(flat.leaves, caller)
    raise ValueError(
        f"`{caller}` must select inexact arrays. Got {selector!r}, which selects "
        f"{_describe_chosen(flat, mask)} of the `{type(flat.tree).__name__}`. "
        f"{_describe_choice(flat)}{_describe_states(flat, mask)}"
    )


def check_names(flat: FlatTree, indices: Sequence[int]) -> None:
    """Raises an error if two leaves have the same dotted path."""
    all_names = flat.names
    names = [all_names[i] for i in indices]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        both = [jtu.keystr(flat.key_paths[i]) for i in indices if all_names[i] == twice]
        raise ValueError(
            f"Two leaves share the dotted path {quote(twice)}: "
            f"{' and '.join(map(quote, both[:2]))}. "
            "Gradients are named by that path, so rename one of the keys."
        )


def _describe_chosen(flat: FlatTree, mask: Sequence[bool]) -> str:
    chosen = [
        f"{quote(name)} ({show(leaf)})"
        for name, leaf, is_chosen in zip(flat.names, flat.leaves, mask, strict=True)
        if is_chosen
    ]
    return shorten(chosen, 3) or "nothing"


def _describe_choice(flat: FlatTree) -> str:
    names = [quote(flat.names[i]) for i in flat.differentiable]
    empty = [quote(name) for name in names_without_leaves(flat.tree) if name]
    choice = f"Its inexact arrays are {shorten(names, 3)}." if names else "It has none."
    if not names and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat.numbers):
        return "It has shapes instead of arrays. Create the arrays first."
    return f"{choice} There is nothing at {shorten(empty, 3)}." if empty else choice


def _describe_states(flat: FlatTree, mask: Sequence[bool]) -> str:
    if not any(mask[i] for i in find_states(flat.leaves)):
        return ""
    return " To differentiate by states, pass the states themselves: `vg.states(...)`."
