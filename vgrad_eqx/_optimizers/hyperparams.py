"""The hyperparameters that `optax.inject_hyperparams` keeps in an optax state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import optax

from .._tree.text import show
from .._tree.types import PyTree
from .partition import GroupStates


_Injected = optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState


def read_hyperparams(opt_state: PyTree) -> dict[str, Any]:
    """All hyperparameters by name; with groups, in one dict for each label."""
    found: dict[str, Any] = {}

    def note(label: str | None, node: Any) -> Any:
        (found if label is None else found.setdefault(label, {})).update(node.hyperparams)
        return node

    _walk(opt_state, None, note)
    return found


def write_hyperparams(
    opt_state: PyTree, group: str | None, values: Mapping[str, Any], caller: str
) -> Any:
    """A state with other values, in the shapes and dtypes of the old values."""
    if group is not None and not isinstance(group, str):
        raise TypeError(
            f"`{caller}` must name one group by its label, or none for all. Got {show(group)}. "
            "Pass values by name, as in `set_hyperparams(learning_rate=1e-4)`."
        )
    written: set[str] = set()
    scheduled: set[str] = set()

    def change(label: str | None, node: Any) -> Any:
        names = set(values) & set(node.hyperparams) if group in (None, label) else set()
        written.update(names)
        scheduled.update(names & set(getattr(node, "hyperparams_states", ())))
        new = {
            name: _like(values[name], node.hyperparams[name], f"`{caller}` at `{name}`")
            for name in names
        }
        return node._replace(hyperparams={**node.hyperparams, **new})

    changed = _walk(opt_state, None, change)
    if scheduled:
        names = ", ".join(f"`{name}`" for name in sorted(scheduled))
        raise ValueError(
            f"`{caller}` must name hyperparameters that follow no schedule. Got {names}, "
            "which a schedule sets at each step. To set it yourself, pass a number instead of "
            "the schedule to `optax.inject_hyperparams`."
        )
    wrong = set(values) - written
    if wrong or not values:
        found = read_hyperparams(opt_state)
        known = jtu.tree_map(str, found) if found else "none"
        names = ", ".join(f"`{name}`" for name in sorted(wrong)) or "none"
        where = "" if group is None else f" in the group {group!r}"
        raise ValueError(
            f"`{caller}` must name hyperparameters of `optax.inject_hyperparams`. Got "
            f"{names}{where}. There are {known}. Wrap it, as in "
            "`optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)`."
        )
    return changed


def _like(value: object, old: PyTree, where: str) -> Any:
    shape, dtype = jnp.shape(old), jnp.result_type(old)
    try:
        new = jnp.broadcast_to(jnp.array(value, dtype, copy=True), shape)
    except (TypeError, ValueError) as error:
        kind = "a number" if not shape else f"an array of shape {shape}"
        raise TypeError(f"{where} must be {kind}. Got {show(value)}.") from error
    is_placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer)
    return jax.device_put(new, old.sharding) if is_placed and old.committed else new


def _walk(node: object, label: str | None, change: Callable[[str | None, Any], Any]) -> Any:
    """The state with `change` applied to each node that has hyperparameters."""

    def visit(node: Any) -> Any:
        if isinstance(node, GroupStates):
            states = [_walk(node[each], each, change) for each, _ in node.groups]
            return GroupStates(node.groups, states)
        if isinstance(node, _Injected):
            inner_state = _walk(node.inner_state, label, change)
            return change(label, node)._replace(inner_state=inner_state)
        return node

    return jtu.tree_map(visit, node, is_leaf=lambda x: isinstance(x, GroupStates | _Injected))


def is_hyperparam(path: jtu.KeyPath) -> bool:
    """Whether this is the path of a hyperparameter in an optax state."""
    return jtu.GetAttrKey("hyperparams") in path
