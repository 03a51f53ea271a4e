"""Optax transformations that update the chosen leaves of a module, or states by reference."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, Self, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax.typing import ArrayLike

from .._select.selectors import as_selector, select, SelectorLike
from .._select.states import add
from .._tree.flat import FlatTree, replace_at
from .._tree.prompt import AtPrompt, write_call
from .._tree.text import near_misses, quote, shorten, show
from .._tree.types import PyTree
from .._tree.units import attach_unit, split_unit
from .entries import carry_over, Entry, locate
from .fingerprint import Fingerprinted
from .hyperparams import is_hyperparam, read_hyperparams, write_hyperparams
from .partition import (
    assign,
    check_tx,
    Groups,
    GroupStates,
    keep_dtypes,
    make_partition,
    map_extra_args,
    strengthen,
    take_extra_args,
    TxLike,
)
from .unitful import naming_leaves_of, UnitfulState


_T = TypeVar("_T")
_O = TypeVar("_O", bound="Optimizer")


class Optimizer(AtPrompt, eqx.Module):
    """An optax transformation that updates the chosen leaves of a module.

    It is immutable, and a pytree that contains the state of the transformation, so it passes
    through `jax.jit`, `equinox.filter_jit` and `jax.lax.scan`. Leaves that are not chosen are
    frozen: they have no optimizer state and no weight decay. Two optimizers with equal
    transformations, such as two calls of `optax.adam(1e-3)`, share their compiled programs.

    **Arguments:**

    - `tx`: an optax transformation, or a dict from selector to transformation, with one
        transformation for each group of leaves. For leaves with units, it must be a
        [`vgrad_eqx.unitful`][] one.
    - `model`: any pytree, such as an Equinox module.
    - `selector`: which of its leaves to update, as in [`vgrad_eqx.states`][]. Defaults to
        all inexact arrays. With groups, each of these leaves must be in exactly one group.

    **Returns:**

    An optimizer. It has the optax `opt_state` (with groups, a dict from the text of the
    selector to the state of its group); the `count` of steps, an `int32` scalar; the
    `hyperparams` kept by `optax.inject_hyperparams`; and the methods `step`, `params`,
    `reselect` and `set_hyperparams`.

    **Raises:**

    - `TypeError`: if `tx` is not an optax transformation; if a chosen leaf has a unit, and its
        transformation was not made by [`vgrad_eqx.unitful`][], or is inside anything other
        than groups, `optax.masked`, `optax.partition` and `optax.inject_hyperparams`. In an
        `optax.chain`, a clip would see values that depend on the units.
    - `ValueError`: if `selector` chooses no inexact array; if a chosen leaf is in no group
        or in two, or a group has no chosen leaf.

    **Example:**

        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> tx = {"**.weight": optax.adamw(1e-2), "**.bias": optax.sgd(1e-1)}
        >>> opt = vg.Optimizer(tx, mlp, "layers.1")
        >>> loss = lambda mlp, x: jnp.sum(mlp(x) ** 2)
        >>> grads = vg.vector_grad(loss, "layers.1")(mlp, jnp.ones(2))
        >>> mlp, opt = opt.step(mlp, grads)
        >>> list(opt.params(mlp)), int(opt.count)
        (['layers.1.bias', 'layers.1.weight'], 1)
    """

    opt_state: Any
    count: jax.Array
    tx: Fingerprinted = eqx.field(static=True)
    groups: Groups | None = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    def __init__(self, tx: TxLike, model: PyTree, selector: SelectorLike = True):
        flat = FlatTree(model)
        chosen = select(flat, as_selector(selector), "Optimizer(selector=...)")
        check_tx(tx, "Optimizer(tx=...)")
        self.tx = Fingerprinted(tx)
        self.names = chosen.names
        params = {name: flat.leaves[i] for i, name in zip(*chosen, strict=True)}
        is_partition = isinstance(tx, dict)
        self.groups = assign(tx, flat, chosen, "Optimizer(tx=...)") if is_partition else None
        with naming_leaves_of(flat):
            self.opt_state = strengthen(_find_transformation(self).init(params))
        _check_units(self.opt_state, params)
        self.count = jnp.zeros((), jnp.int32)

    _inner = frozenset({"advance", "entries", "groups", "names", "tx"})

    def __repr__(self) -> str:
        groups = {label: len(names) for label, names in self.groups or ()}
        return write_call("Optimizer", count=self.count, leaves=groups or len(self.names))

    @property
    def entries(self) -> list[Entry]:
        """The leaves of the `opt_state`, with the parameters that they belong to."""
        return list(locate(self.opt_state, self.names))

    def params(self, model: PyTree) -> dict[str, Any]:
        """Returns the leaves of a module that are updated, as a dict `{path: leaf}`."""
        flat = FlatTree(model)
        indices = _find(flat, self.names)
        return {name: flat.leaves[i] for i, name in zip(indices, self.names, strict=True)}

    def step(
        self, model: _T, var_grads: Mapping[str, Any], **extra_args: object
    ) -> tuple[_T, Self]:
        """Updates the chosen leaves along their gradients.

        **Arguments:**

        - `model`: a pytree with the structure of the one that the optimizer was made for.
        - `var_grads`: a dict `{path: gradient}` with exactly the chosen leaves, as returned by
            [`vgrad_eqx.vector_grad`][]. Each gradient has the shape of its leaf. A complex
            gradient follows JAX's convention, and the step is along its conjugate.
        - `extra_args`: extra arguments of the transformation, such as `value`, `grad` (a
            dict like `var_grads`) and `value_fn` for the line searches of optax. A function
            whose name ends with `_fn` must take the model, and `grad_fn` must return a dict
            like `var_grads`. Arguments that the transformation does not accept are ignored.

        **Returns:**

        The updated model and the next optimizer. Each leaf keeps its dtype.

        **Raises:**

        - `TypeError`: if `var_grads` is not a dict.
        - `ValueError`: if a gradient is missing, is `None`, has an unknown path, or differs
            from its leaf in shape; if `opt_state` belongs to another selection; if `model`
            lacks a leaf. Nothing is updated then.
        - `brainunit.UnitMismatchError`: as [`vgrad_eqx.unitful`][].
        """
        return advance(self, model, var_grads, extra_args, "Optimizer.step")

    def reselect(
        self, model: PyTree, selector: SelectorLike = True, tx: TxLike | None = None
    ) -> "Optimizer":
        """Changes which leaves are trained, and keeps the optimizer state of those that stay.

        **Arguments:**

        - `model`: the current pytree.
        - `selector`: which of its leaves to update from now on. Defaults to all.
        - `tx`: a new transformation or new groups. Defaults to the current ones; the selectors
            of the groups are then applied again.

        **Returns:**

        An optimizer with the same count. Optimizer state that belongs to a leaf, such as its
        moments, is kept for each leaf that stays, even if it moves to another group. It is
        initialized for each new leaf, and for a leaf whose transformation or shape has
        changed, or, inside a [`vgrad_eqx.unitful`][], its scale or the unit of the loss. State
        that belongs to a group, such as its step count, follows these leaves, and is
        initialized for a group without any. If `tx` is given, its hyperparameters replace
        those kept by `optax.inject_hyperparams`.

        **Raises:**

        - `TypeError`, `ValueError`: as [`vgrad_eqx.Optimizer`][]; and if the transformation
            keeps one array for all leaves together.
        """
        fresh = Optimizer(self.tx.value if tx is None else tx, model, selector)
        # A new `tx` comes with its own hyperparameters.
        old = [each for each in self.entries if tx is None or not is_hyperparam(each.path)]
        leaves = carry_over(fresh.entries, old, set(self.names))
        opt_state = jtu.tree_unflatten(jtu.tree_structure(fresh.opt_state), leaves)
        return _replace(fresh, opt_state, self.count)

    @property
    def hyperparams(self) -> dict[str, Any]:
        """The hyperparameters kept by `optax.inject_hyperparams`, by name.

        With groups, there is one dict of them for each group, by the label of the group.
        """
        return read_hyperparams(self.opt_state)

    def set_hyperparams(self, group: str | None = None, /, **values: ArrayLike) -> Self:
        """Changes hyperparameters kept by `optax.inject_hyperparams`.

        **Arguments:**

        - `group`: the label of the group to change. Defaults to all groups that have these
            hyperparameters.
        - `values`: the new values by name, such as `learning_rate=1e-4`.

        **Returns:**

        An optimizer with these values, cast to the dtypes of the old ones. Nothing is retraced.

        **Raises:**

        - `ValueError`: if a hyperparameter does not exist, or follows a schedule.
        """
        caller = "set_hyperparams(...)"
        opt_state = write_hyperparams(self.opt_state, group, values, caller)
        return _replace(self, opt_state, self.count)


# A function rather than a method, because Equinox wraps a method at each access. So is
# everything else that a step calls.
def advance(
    opt: _O, model: _T, var_grads: object, extra_args: dict[str, Any], caller: str
) -> tuple[_T, _O]:
    flat = FlatTree(model)
    indices = _find(flat, opt.names)
    params = {name: flat.leaves[i] for i, name in zip(indices, opt.names, strict=True)}
    units = _find_units(opt.opt_state)
    grads = _parse_grads(var_grads, params, units, f"{caller}(var_grads=...)")

    def rebuild(params: dict[str, Any]) -> Any:
        values = [params[name] for name in opt.names]
        return flat.unflatten(replace_at(flat.leaves, indices, values))

    extra_args = map_extra_args(
        extra_args,
        rebuild,
        lambda grads: _parse_grads(grads, params, units, f"{caller}(grad=...)"),
    )
    transformation = _find_transformation(opt)
    try:
        updates, opt_state = transformation.update(grads, opt.opt_state, params, **extra_args)
    except Exception as error:
        _check_state(opt, params, units, error)
        raise
    opt_state = keep_dtypes(opt.opt_state, opt_state)
    new = [
        add(leaf, updates[name], f"The update of `{caller}` at `{name}`")
        for name, leaf in params.items()
    ]
    new_opt = _replace(opt, opt_state, jnp.minimum(opt.count, _MOST_STEPS - 1) + 1)
    return flat.unflatten(replace_at(flat.leaves, indices, new)), new_opt


def _find_transformation(opt: Optimizer) -> Any:
    groups = opt.groups
    if groups is None:
        return take_extra_args(opt.tx.value)
    return make_partition(opt.tx.value, lambda _: groups)


def _replace(opt: _O, opt_state: PyTree, count: jax.Array) -> _O:
    _, structure = jtu.tree_flatten(opt, is_leaf=lambda node: node is not opt)
    return jtu.tree_unflatten(structure, [opt_state, count])


def _check_state(
    opt: Optimizer, params: dict[str, Any], units: dict[str, Any], error: Exception
) -> None:
    """Raises a clear error if the state belongs to another selection."""
    params = {
        name: attach_unit(split_unit(leaf)[0], units[name]) if name in units else leaf
        for name, leaf in params.items()
    }
    expected = jtu.tree_structure(jax.eval_shape(_find_transformation(opt).init, params))
    if jtu.tree_structure(opt.opt_state) != expected:
        raise ValueError(
            "`Optimizer(...).opt_state` must be for the selection that the optimizer was "
            f"made for, {shorten(list(map(quote, opt.names)))}. Got "
            f"{show(opt.opt_state)}. To change what is trained, use `reselect`."
        ) from error


# The count stays here instead of overflowing.
_MOST_STEPS = jnp.iinfo(jnp.int32).max


def check_structure(old: Optimizer, new: Optimizer, caller: str, instead: str) -> None:
    """Raises an error if the next optimizer has another structure, where it must not."""
    if jtu.tree_structure(old) != jtu.tree_structure(new):
        raise ValueError(
            f"`{caller}(tx=...)` must be a transformation whose state keeps its structure. Got "
            f"one whose first step changes it, as `optax.monitor` does. {instead}"
        )


def _find(flat: FlatTree, names: Sequence[str]) -> list[int]:
    """The indices of the leaves with these names."""
    places = {flat.names[i]: i for i in flat.differentiable}
    for name in names:
        if name not in places:
            raise ValueError(
                "`Optimizer.step(model=...)` must have the leaves that the optimizer was made "
                f"for. Got a `{type(flat.tree).__name__}` without an inexact array at "
                f"`{name}`. {near_misses(name, flat)}"
            )
    return [places[name] for name in names]


def _find_units(opt_state: PyTree) -> dict[str, Any]:
    """The units of the parameters whose units are hidden from optax."""
    match opt_state:
        case UnitfulState():
            return dict(opt_state.units.by_path)
        case GroupStates():
            inner = opt_state.values()
        case optax.PartitionState():
            inner = opt_state.inner_states.values()
        case _ if isinstance(opt_state, _TRANSPARENT):
            inner = [opt_state.inner_state]
        case (only,) if type(opt_state) is tuple:  # an `optax.chain` of one
            inner = [only]
        case _:
            return {}
    return {name: unit for each in inner for name, unit in _find_units(each).items()}


# Wrappers that pass gradients on unchanged. Any other computes with the values of Quantities.
_TRANSPARENT = (
    optax.MaskedState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)


def _check_units(opt_state: PyTree, params: dict[str, Any]) -> None:
    units = _find_units(opt_state)
    for name, leaf in params.items():
        if split_unit(leaf)[1] is not None and name not in units:
            raise TypeError(
                "`Optimizer(tx=...)` must be made by `vg.unitful(tx, loss_unit=...)` for "
                "leaves with units, which optax does not know. Got another one for "
                f"{quote(name)}, {show(leaf)}. What is around a `unitful`, such as a clip, "
                "depends on the units. Put the whole `optax.chain` or `vg.partition` inside "
                "one `vg.unitful`."
            )


def _parse_grads(
    grads: PyTree, params: dict[str, Any], with_units: Container[str], caller: str
) -> dict[str, Any]:
    """The gradients as optax takes them: those of complex leaves are conjugated."""
    if not isinstance(grads, Mapping):
        is_value = eqx.is_array_like(split_unit(grads)[0]) or isinstance(grads, tuple)
        hint = (
            "With `return_value=True` it gives `(var_grads, value)`."
            if is_value
            else "For gradients with the structure of a model, as from `eqx.filter_grad`, "
            "`vg.states(grads)` is such a dict."
        )
        raise TypeError(
            f"`{caller}` must be a dict from dotted path to gradient, as "
            "`vg.vector_grad(..., grad_states=...)` gives it. Got "
            f"{show(grads) if is_value else f'a `{type(grads).__name__}`'}. {hint}"
        )
    faults = [
        *[f"none at {quote(name)}" for name in params if name not in grads],
        *[
            f"one at {quote(str(name))}, which is not chosen"
            for name in grads
            if name not in params
        ],
    ]
    for name in params:
        if name in grads:
            fault = _find_fault(grads[name], params[name], name in with_units)
            faults += [] if fault is None else [f"{fault} at {quote(name)}"]
    if faults:
        raise ValueError(
            f"`{caller}` must hold a gradient for each chosen leaf, of the shape of the leaf, "
            f"and no other. Got {shorten(faults)}."
        )
    return {name: _conjugate(grads[name]) for name in params}


def _find_fault(grad: object, param: object, with_units: bool) -> str | None:
    (number, unit), shape = split_unit(grad), jnp.shape(split_unit(param)[0])
    is_array = eqx.is_array_like(number)
    if not (is_array and jnp.issubdtype(jnp.result_type(number), jnp.inexact)):
        return show(grad)
    if jnp.shape(number) != shape:
        return f"{show(grad)} for a leaf of shape {shape}"
    if unit is not None and not with_units:
        return f"a gradient in {unit} without `vg.unitful(tx, loss_unit=...)` around the whole"
    return None


def _conjugate(grad: object) -> Any:
    number, unit = split_unit(grad)
    return attach_unit(jnp.conj(number), unit) if jnp.iscomplexobj(number) else grad
