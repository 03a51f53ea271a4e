"""Optax transformations of a flat dict of parameters, one for all or one for each group."""

import dataclasses
import functools as ft
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax

from .._select.selectors import as_selector, select, Selection
from .._tree.flat import FlatTree
from .._tree.text import show
from .fingerprint import Fingerprinted


@dataclasses.dataclass(frozen=True)
class Group:
    """A transformation, and the paths of the parameters that it updates."""

    names: tuple[str, ...]
    tx: Fingerprinted

    def pick(self, by_path: Mapping[str, Any]) -> dict[str, Any]:
        return {name: by_path[name] for name in self.names}


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of an optimizer. Without labels there is one, which takes all."""

    labels: tuple[str, ...] | None
    groups: tuple[Group, ...]

    def init(self, params: dict[str, Any]) -> Any:
        opt_states = [group.tx.value.init(group.pick(params)) for group in self.groups]
        return self._join(opt_states)

    def update(
        self,
        grads: dict[str, Any],
        opt_state: Any,
        params: dict[str, Any],
        extra_args: dict[str, Any],
    ) -> tuple[dict[str, Any], Any]:
        updates: dict[str, Any] = {}
        opt_states = []
        for group, state in zip(self.groups, self.split(opt_state), strict=True):
            tx: Any = optax.with_extra_args_support(group.tx.value)
            extra = _narrow(extra_args, group, params)
            group_updates, state = tx.update(
                group.pick(grads), state, group.pick(params), **extra
            )
            updates.update(group_updates)
            opt_states.append(state)
        return updates, self._join(opt_states)

    def split(self, opt_state: Any) -> list[Any]:
        """The state of each group."""
        if self.labels is None:
            return [opt_state]
        return [opt_state[label] for label in self.labels]

    def _join(self, opt_states: Sequence[Any]) -> Any:
        opt_states = jtu.tree_map(_strengthen, opt_states)
        if self.labels is None:
            return opt_states[0]
        return dict(zip(self.labels, opt_states, strict=True))

    def carry_over(self, fresh: Any, old: "Groups", old_state: Any, caller: str) -> Any:
        """A fresh state, with what an old one knows of the parameters that stay."""
        tables = [
            {(slot, name): leaf for slot, name, leaf in locate(state, group.names)}
            for group, state in zip(old.groups, old.split(old_state), strict=True)
        ]
        homes = {name: i for i, group in enumerate(old.groups) for name in group.names}
        opt_states = [
            _carry_over(state, group, tables, homes, caller)
            for group, state in zip(self.groups, self.split(fresh), strict=True)
        ]
        return self._join(opt_states)

    def find_slots(self, opt_state: Any) -> Iterator[tuple[Any, str | None]]:
        """For each leaf of the state, what it is, and the parameter that it belongs to."""
        if self.labels is None:
            groups = [(None, self.groups[0])]
        else:  # as JAX flattens a dict
            groups = sorted(zip(self.labels, self.groups, strict=True))
        for label, group in groups:
            state = opt_state if label is None else opt_state[label]
            for slot, name, _ in locate(state, group.names):
                yield (label, slot), name


def _strengthen(leaf: Any) -> Any:
    """The same number or array, as an array of a dtype that promotion keeps.

    Some states of optax start with weak types and go on with others, so that a compiled step
    would be traced again.
    """
    if not eqx.is_array_like(leaf) or (eqx.is_array(leaf) and not jax.typeof(leaf).weak_type):
        return leaf
    return jnp.asarray(leaf, jnp.result_type(leaf))


def _carry_over(
    state: Any,
    group: Group,
    tables: Sequence[dict[Any, Any]],
    homes: dict[str, int],
    caller: str,
) -> Any:
    # What belongs to no parameter, such as a count, comes from where most of the group was.
    staying = [homes[name] for name in group.names if name in homes]
    shared = max(staying, key=staying.count, default=None)
    leaves = []
    for slot, name, leaf in locate(state, group.names):
        home = shared if name is None else homes.get(name)
        old = None if home is None else tables[home].get((slot, name))
        if old is not None and _is_alike(old, leaf):
            leaf = old
        elif old is not None and name is None:
            raise ValueError(
                f"`{caller}` keeps what the optimizer knows of each leaf. Got one that mixes "
                f"the leaves, in a {eqx.tree_pformat(old)} that would be a "
                f"{eqx.tree_pformat(leaf)}, as `optax.flatten` does. Make another optimizer, "
                "which starts anew."
            )
        leaves.append(leaf)
    return jtu.tree_unflatten(jtu.tree_structure(state), leaves)


def _is_alike(old: Any, new: Any) -> bool:
    return jnp.shape(old) == jnp.shape(new) and jnp.result_type(old) == jnp.result_type(new)


def locate(opt_state: Any, names: Sequence[str]) -> Iterator[tuple[Any, str | None, Any]]:
    """For each leaf of an optax state, what it is, its parameter if it has one, and itself.

    What optax keeps for each parameter it keeps in a dict like that of the parameters.
    """
    keys = set(names)

    def is_by_path(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == keys

    nodes, _ = jtu.tree_flatten_with_path(opt_state, is_leaf=is_by_path)
    for key_path, node in nodes:
        if not is_by_path(node):
            yield (key_path, ()), None, node
            continue
        for inner_path, leaf in jtu.tree_leaves_with_path(node):
            yield (key_path, inner_path[1:]), inner_path[0].key, leaf


def _narrow(extra_args: dict[str, Any], group: Group, params: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments of `update`, for the parameters of one group."""
    narrowed = dict(extra_args)
    if extra_args.get("grad") is not None:
        narrowed["grad"] = group.pick(extra_args["grad"])
    if extra_args.get("value_fn") is not None:
        narrowed["value_fn"] = precompose(
            extra_args["value_fn"], lambda part: {**params, **part}
        )
    return narrowed


def precompose(value_fn: Callable[..., Any], prepare: Callable[[Any], Any]) -> Any:
    """The function of what is to be prepared first. Optax reads the names of its arguments."""

    @ft.wraps(value_fn)
    def prepared(params: Any, *args: Any, **kwargs: Any) -> Any:
        return value_fn(prepare(params), *args, **kwargs)

    return prepared


def make_groups(tx: Any, flat: FlatTree, chosen: Selection, caller: str) -> Groups:
    """Assigns each chosen leaf to the one transformation, or to that of its group."""
    check_tx(tx, caller)
    if not isinstance(tx, dict):
        return Groups(None, (Group(chosen.names, Fingerprinted(tx)),))
    labels = _make_labels(list(tx))
    homes: dict[str, str] = {}
    groups = []
    for label, (selector, group_tx) in zip(labels, tx.items(), strict=True):
        selected = set(select(flat, as_selector(selector), caller).indices)
        names = tuple([n for i, n in zip(*chosen, strict=True) if i in selected])
        if not names:
            raise ValueError(
                f"`{caller}` must give a leaf to each group. Got none for {label!r}, because "
                "`selector` chooses no leaf of it. Leave the group out, or choose more."
            )
        for name in names:
            if name in homes:
                raise ValueError(
                    f"`{caller}` must put each chosen leaf into one group. Got `{name}` in "
                    f"two: {homes[name]!r} and {label!r}. Narrow one of them, say by "
                    "`a & ~b`."
                )
            homes[name] = label
        groups.append(Group(names, Fingerprinted(group_tx)))
    homeless = [f"`{name}`" for name in chosen.names if name not in homes]
    if homeless:
        raise ValueError(
            f"`{caller}` must put each chosen leaf into one group. Got {', '.join(homeless)} "
            "in none. Add a group, or freeze what is in none by a narrower `selector`."
        )
    return Groups(tuple(labels), tuple(groups))


_ADDRESS = re.compile(r"(?: at)? 0x[0-9a-fA-F]+")


def _make_labels(selectors: list[Any]) -> list[str]:
    # Without the addresses of functions, which the labels of another process do not have.
    labels = [
        key if isinstance(key, str) else _ADDRESS.sub("", repr(as_selector(key)))
        for key in selectors
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({i})"
        for i, label in enumerate(labels)
    ]


def check_tx(tx: Any, caller: str) -> None:
    """Refuses what is no optax transformation, and no dict of them."""
    if isinstance(tx, dict):
        if not tx:
            raise ValueError(f"`{caller}` must have at least one group. Got {{}}.")
        for group_tx in tx.values():
            _check_one(group_tx, caller)
    else:
        _check_one(tx, caller)


def _check_one(tx: Any, caller: str) -> None:
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"`{caller}` must be an optax transformation, such as `optax.adam(1e-3)`, or a "
            f"dict from selector to transformation. Got {show(tx)}."
        )
