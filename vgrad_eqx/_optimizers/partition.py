"""An optax transformation for each group of the parameters in a flat dict."""

import functools as ft
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax

from .._select.selectors import as_selector, select, Selection
from .._tree.flat import cast, FlatTree
from .._tree.text import show
from .._tree.types import PyTree


# An optax transformation, or one for each selector.
TxLike: TypeAlias = optax.GradientTransformation | Mapping[Any, optax.GradientTransformation]

# For each group, its label and the paths of its parameters.
Groups = tuple[tuple[str, tuple[str, ...]], ...]


@jtu.register_pytree_with_keys_class
class GroupStates(dict[str, Any]):
    """The optax state of each group, by its label. The paths of each group are static."""

    def __init__(self, groups: Groups, states: Sequence[Any]):
        super().__init__(zip([label for label, _ in groups], states, strict=True))
        self.groups = groups

    def tree_flatten_with_keys(self) -> tuple[Any, Groups]:
        return [(jtu.DictKey(label), self[label]) for label, _ in self.groups], self.groups

    @classmethod
    def tree_unflatten(cls, groups: Groups, states: Sequence[Any]) -> "GroupStates":
        return cls(groups, states)


def partition(
    groups: Mapping[Any, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Updates each group of the parameters in a flat dict with its own transformation.

    It is an ordinary optax transformation, so a transformation before it in an `optax.chain`
    sees the gradients of all groups. Passing a dict to [`vgrad_eqx.Optimizer`][] is a shorthand
    for it. For parameters with units, put the whole chain inside one [`vgrad_eqx.unitful`][].

    **Arguments:**

    - `groups`: a dict from selector to transformation. The selectors are applied to the flat
        dict `{path: leaf}` of the parameters, as returned by [`vgrad_eqx.states`][]. Each
        parameter must be in exactly one group.

    **Returns:**

    An `optax.GradientTransformationExtraArgs`. Its state is a dict from the text of the
    selector to the state of the group.

    **Raises:**

    - `TypeError`: at once, if a group has no optax transformation; on `init`, if the
        parameters are not a dict.
    - `ValueError`: at once, if `groups` is empty; on `init`, if a parameter is in no group or
        in two, or a group has no parameter.

    **Example:**

        >>> import jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> groups = {"*.weight": optax.sgd(1.0), "*.bias": optax.sgd(0.1)}
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), vg.partition(groups))
        >>> params = {"a.weight": jnp.array(0.0), "a.bias": jnp.array(0.0)}
        >>> grads = {"a.weight": jnp.array(3.0), "a.bias": jnp.array(4.0)}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> [round(float(updates[name]), 2) for name in params]
        [-0.6, -0.08]
    """
    caller = "partition(groups=...)"
    if not isinstance(groups, dict):
        raise TypeError(
            f"`{caller}` must be a dict from selector to transformation. Got {show(groups)}."
        )
    check_tx(groups, caller)

    def find_groups(params: PyTree) -> Groups:
        if not isinstance(params, Mapping):
            raise TypeError(
                "`partition(...).init(params)` must be a flat dict from path to leaf, as "
                f"`vg.states(model)` gives it. Got a `{type(params).__name__}`."
            )
        flat = FlatTree(params)
        chosen = Selection(tuple(range(len(flat.names))), tuple(flat.names))
        return assign(groups, flat, chosen, caller)

    return make_partition(groups, find_groups)


def make_partition(
    txs: Mapping[Any, Any], find_groups: Callable[[Any], Groups]
) -> optax.GradientTransformationExtraArgs:
    """A transformation for each of the groups, in the order of `txs`."""
    inner: list[Any] = list(map(take_extra_args, txs.values()))

    def init(params: PyTree) -> GroupStates:
        groups = find_groups(params)
        pairs = zip(inner, groups, strict=True)
        states = [tx.init(_pick(names, params)) for tx, (_, names) in pairs]
        return GroupStates(groups, states)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: object
    ) -> tuple[Any, GroupStates]:
        new_updates, states = {}, []
        for tx, (label, names) in zip(inner, state.groups, strict=True):
            group_params = None if params is None else _pick(names, params)
            extra = _narrow(extra_args, names, params)
            new, inner_state = tx.update(
                _pick(names, updates), state[label], group_params, **extra
            )
            new_updates.update(new)
            states.append(inner_state)
        return {name: new_updates[name] for name in updates}, GroupStates(state.groups, states)

    return optax.GradientTransformationExtraArgs(init, update)


def take_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation that takes any extra arguments, and ignores those it does not accept."""
    tx = optax.with_extra_args_support(tx)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: object
    ) -> Any:
        while True:
            try:
                return tx.update(updates, state, params, **extra_args)
            except TypeError as error:
                # Only a call shows what the transformations in an `optax.chain` accept.
                refused = extra_args.keys() & _find_refused(error)
                if not refused:
                    if "required keyword-only argument" in str(error):
                        error.add_note(
                            "The transformation takes extra arguments. Pass them as in "
                            "`opt.step(model, var_grads, value=value, grad=var_grads, ...)`. "
                            "`vg.train_step` passes these and `value_fn` automatically."
                        )
                    raise
                for name in refused:
                    del extra_args[name]

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _find_refused(error: TypeError) -> set[str]:
    """The keyword arguments that a function or an optax line search does not take."""
    known = r"got an unexpected keyword argument ('.*?')|not consumed by .*?: (\[.*?\])"
    found = re.search(known, str(error))
    return set() if found is None else set(re.findall(r"'(\w+)'", found[0]))


def _pick(names: Sequence[str], by_path: Mapping[str, Any]) -> dict[str, Any]:
    return {name: by_path[name] for name in names}


def _narrow(extra_args: dict[str, Any], names: Sequence[str], params: PyTree) -> dict[str, Any]:
    """The extra arguments of `update`, translated to the parameters of one group."""
    return map_extra_args(
        extra_args, lambda part: {**params, **part}, lambda grads: _pick(names, grads)
    )


def map_extra_args(
    extra_args: Mapping[str, Any],
    prepare: Callable[[Any], Any],
    map_grads: Callable[[Any], Any],
    map_value: Callable[[Any], Any] = lambda value: value,
) -> dict[str, Any]:
    """The extra arguments of `update`, translated to other parameters.

    Functions, which optax calls `value_fn`, `obj_fn`, `grad_fn` and so on, are applied to what
    `prepare` makes of the new parameters. Gradients and values are mapped, including those that
    such functions return.
    """
    mapped = dict(extra_args)
    for name, each in extra_args.items():
        is_function = name.endswith("_fn") and callable(each)
        finish = {"grad": map_grads, "value": map_value, "obj": map_value}.get(
            name.removesuffix("_fn") if is_function else name, lambda result: result
        )
        if is_function:
            mapped[name] = _compose(finish, each, prepare)
        elif each is not None:
            mapped[name] = finish(each)
    return mapped


def _compose(
    finish: Callable[[Any], Any], func: Callable[..., Any], prepare: Callable[[Any], Any]
) -> Callable[..., Any]:
    @ft.wraps(func)  # optax reads the names of its arguments
    def composed(params: PyTree, *args: object, **kwargs: object) -> Any:
        return finish(func(prepare(params), *args, **kwargs))

    return composed


def assign(txs: Mapping[Any, Any], flat: FlatTree, chosen: Selection, caller: str) -> Groups:
    """Puts each chosen leaf into one group."""
    groups, homes = [], {}
    for label, selector in zip(_make_labels(list(txs)), txs, strict=True):
        selected = set(select(flat, as_selector(selector), caller).indices)
        names = tuple([n for i, n in zip(*chosen, strict=True) if i in selected])
        if not names:
            raise ValueError(
                f"`{caller}` must give a leaf to each group. Got none for {label!r}, because "
                "`selector` chooses none of its leaves. Remove the group, or choose more."
            )
        for name in names:
            if name in homes:
                raise ValueError(
                    f"`{caller}` must put each chosen leaf into one group. Got `{name}` in "
                    f"two: {homes[name]!r} and {label!r}. Narrow one of them, for example to "
                    "`a & ~b`."
                )
            homes[name] = label
        groups.append((label, names))
    homeless = [f"`{name}`" for name in chosen.names if name not in homes]
    if homeless:
        raise ValueError(
            f"`{caller}` must put each chosen leaf into one group. Got {', '.join(homeless)} "
            "in none. Add a group, or freeze these leaves with a narrower `selector`."
        )
    return tuple(groups)


def _make_labels(selectors: list[Any]) -> list[str]:
    labels = [key if isinstance(key, str) else repr(as_selector(key)) for key in selectors]
    return [
        label if labels.count(label) == 1 else f"{label} ({i})"
        for i, label in enumerate(labels)
    ]


def check_tx(tx: Any, caller: str) -> None:
    """Raises an error unless `tx` is an optax transformation or a dict of them."""
    if isinstance(tx, dict) and not tx:
        raise ValueError(f"`{caller}` must have at least one group. Got {{}}.")
    for each in tx.values() if isinstance(tx, dict) else [tx]:
        methods = getattr(each, "init", None), getattr(each, "update", None)
        if not all(map(callable, methods)):
            raise TypeError(
                f"`{caller}` must be an optax transformation, such as `optax.adam(1e-3)`, or a "
                f"dict from selector to transformation. Got {show(each)}."
            )


def keep_dtypes(old: PyTree, new: PyTree) -> Any:
    """The next state of a transformation, in the dtypes of the old one.

    Some optax transformations change dtypes, or start with weak types and continue with strong
    ones, so a compiled step would be retraced.
    """
    if jtu.tree_structure(old) != jtu.tree_structure(new):
        return new

    def keep(x: Any, like: Any) -> Any:
        is_alike = jax.typeof(x) == jax.typeof(like)  # faster than comparing dtypes
        return x if is_alike else cast(x, jnp.result_type(like))

    return jtu.tree_map(keep, new, old)


def strengthen(opt_state: PyTree) -> Any:
    """An initial state whose arrays have strong types."""
    is_array = eqx.is_array_like
    return jtu.tree_map(lambda x: cast(x, jnp.result_type(x)) if is_array(x) else x, opt_state)
