"""Optax transformations for parameters with units."""

import contextlib
import contextvars
import dataclasses
import functools as ft
import hashlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.typing import ArrayLike

from .._select.glob import compile_glob
from .._tree.flat import FlatTree, is_any_traced, name_of, refuse_foreign, widen
from .._tree.state import State
from .._tree.text import names_without_leaves, near_misses, quote, shorten, show
from .._tree.types import PyTree, Unit
from .._tree.units import (
    attach_unit,
    describe_unit,
    find_factor,
    find_factors,
    find_quotient,
    parse_unit,
    raise_mismatch,
    split_unit,
)
from .partition import map_extra_args, take_extra_args


_TRACED = "traced"
_MOST_SIZES = 8  # the most elements to write out


class Scale(NamedTuple):
    """The scale of a parameter and the unit of the loss. All but `text` is compared.

    The state of an optimizer is relative to these, so its values mean nothing with others.
    """

    text: str
    scale: str
    loss: str

    @property
    def is_traced(self) -> bool:
        return self.scale.startswith(_TRACED)


class _Units(eqx.Module):
    """The units of the parameters, which are part of the tree structure."""

    by_path: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    scale_by_path: tuple[tuple[str, Scale], ...] = eqx.field(static=True)

    @property
    def scales(self) -> dict[str, Scale]:
        return dict(self.scale_by_path)


class UnitfulState(NamedTuple):
    """The state of [`vgrad_eqx.unitful`][]: the inner state, and the units."""

    inner_state: Any
    units: _Units


def unitful(
    tx: optax.GradientTransformation,
    loss_unit: Unit | None = None,
    scale: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets any optax transformation optimize parameters with units.

    For a parameter `p` with scale `S` and a loss with unit `L`, optax sees `x = p/S` and the
    gradient `g·S/L`, and its update `dx` becomes `S·dx`, in the unit of `p`. All of `x`,
    `g·S/L` and `dx` are dimensionless, and so is every hyperparameter, and a fit does not
    depend on the units of the parameters. Outside of it, values do depend on them, so put a
    whole `optax.chain` inside, also one with a [`vgrad_eqx.partition`][].

    **Arguments:**

    - `tx`: the transformation.
    - `loss_unit`: the unit of the loss, such as `brainunit.mvolt**2`. Defaults to none.
    - `scale`: a dict `{path: scale}`. The path may be a glob, and the scale is a typical size
        of the parameters at that path: a Quantity with their dimension, or a number for
        parameters without a unit. If several paths match a parameter, its exact path takes
        precedence. The dict may name leaves of the model that are not optimized. The default
        scale is one in the unit of the parameter, and then the fit does depend on that unit.

    **Returns:**

    An `optax.GradientTransformationExtraArgs`. Its `update` takes gradients with units, as
    returned by `vector_grad(..., unit_aware=True)`, and returns updates in the unit of each
    parameter, for [`vgrad_eqx.apply_updates`][]. It converts the extra arguments `value`,
    `grad`, `value_fn`, `obj_fn` and `grad_fn`, so that line searches work, and passes on all
    others. Units are checked during tracing, at no cost in the compiled program. Its state
    records units and scales: with another scale, `Optimizer.reselect` initializes it, and
    [`vgrad_eqx.load`][] raises an error.

    **Raises:**

    - `TypeError`: if `tx` is not an optax transformation, `loss_unit` is not a unit, or `scale`
        is not a dict of numbers and Quantities.
    - `ValueError`: if a scale is not positive, or a glob is malformed; on `init`, if a path
        matches nothing in the whole model, if two match the same parameter, or if a scale is
        neither a scalar nor has the shape of its parameter; on `update`, if a gradient or a
        parameter has a path that was not there on `init`.
    - `brainunit.UnitMismatchError`: on `init`, if a scale and its parameter have different
        dimensions; on `update`, if a gradient is not in the unit of the loss divided by that
        of the parameter, or a parameter has another unit than on `init`.

    **Example:**

        >>> import brainunit as u, jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> params = {"tau": jnp.array(20.0) * u.ms}
        >>> loss = lambda params: (params["tau"] - 30.0 * u.ms) ** 2
        >>> tx = vg.unitful(optax.sgd(0.25), loss_unit=u.ms**2)
        >>> opt_state = tx.init(params)
        >>> grads = vg.vector_grad(loss, "tau", unit_aware=True)(params)
        >>> updates, opt_state = tx.update(grads, opt_state, params)
        >>> vg.apply_updates(params, updates)["tau"]
        Quantity(25., "ms")
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            "`unitful(tx=...)` must be an optax transformation, such as `optax.adam(1e-3)`. "
            f"Got {show(tx)}."
        )
    inner = take_extra_args(tx)
    scaling = _Scaling(parse_unit(loss_unit, "unitful(loss_unit=...)"), _parse_scale(scale))

    def init(params: PyTree) -> Any:
        refuse_foreign(params, "unitful(...).init(params=...)")
        flat = FlatTree(params)
        units = {
            name: split_unit(leaf)[1]
            for name, leaf in zip(flat.names, flat.leaves, strict=True)
        }
        scaling.check(flat)
        inner_state = inner.init(scaling.shrink_params(params, units))
        scales = [(name, scaling.describe(name, unit)) for name, unit in units.items()]
        return UnitfulState(inner_state, _Units(tuple(units.items()), tuple(scales)))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: object
    ) -> tuple[Any, Any]:
        units = dict(state.units.by_path)
        if params is not None:
            params = scaling.shrink_params(params, units)
        extra_args = scaling.shrink_extra_args(extra_args, units)
        updates, inner_state = inner.update(
            scaling.shrink_grads(updates, units), state.inner_state, params, **extra_args
        )
        return scaling.grow(updates, units), UnitfulState(inner_state, state.units)

    return optax.GradientTransformationExtraArgs(init, update)


# The whole tree, when an optimizer passes only some of its leaves to `init`.
_whole: contextvars.ContextVar[FlatTree | None] = contextvars.ContextVar("whole", default=None)


@contextlib.contextmanager
def naming_leaves_of(flat: FlatTree) -> Iterator[None]:
    """In this context, a scale may name any leaf of this tree."""
    token = _whole.set(flat)
    try:
        yield
    finally:
        _whole.reset(token)


def _parse_scale(scale: object) -> dict[str, tuple[Any, Any]]:
    """A scalar or array and its unit for each glob.

    Scalars become Python floats where possible, so that equal transformations compare equal.
    """
    caller = "`unitful(scale=...)`"
    if scale is None:
        return {}
    if not isinstance(scale, Mapping):
        raise TypeError(
            f"{caller} must be a dict from path to scale, such as `{{'*.tau': 20.0}}`. Got "
            f"{show(scale)}."
        )
    parsed = {}
    for glob, size in scale.items():
        if not isinstance(glob, str):
            raise TypeError(f"{caller} must have paths as keys. Got {show(glob)}.")
        compile_glob(glob)
        refuse_foreign(size, "unitful(scale=...)")
        number, unit = split_unit(size)
        if not eqx.is_array_like(number) or isinstance(number, bool | complex):
            raise TypeError(
                f"{caller} must hold a Quantity or a number for each path. Got {show(size)} "
                f"at {quote(glob)}."
            )
        if not is_any_traced([number]):
            if not (np.asarray(number, float) > 0).all():
                raise ValueError(
                    f"{caller} must hold positive sizes. Got {show(size)} at {quote(glob)}."
                )
            number = float(number) if jnp.ndim(number) == 0 else number
        parsed[glob] = number, unit
    return parsed


@dataclasses.dataclass(frozen=True)
class _Scaling:
    """Converts quantities to dimensionless arrays and back. Units are given by path."""

    loss_unit: Unit
    scale: dict[str, tuple[Any, Any]]

    def check(self, flat: FlatTree) -> None:
        """Checks the scales for these parameters."""
        whole = _whole.get() or flat
        names = {*flat.names, *whole.names, *names_without_leaves(flat.tree)}
        for glob in self.scale:
            if not any(map(compile_glob(glob).fullmatch, names)):
                raise ValueError(
                    "`unitful(scale=...)` must name paths of the parameters. Got "
                    f"{quote(glob)}. {near_misses(glob, whole)}"
                )
        for name, leaf in zip(flat.names, flat.leaves, strict=True):
            glob = self._find_glob(name)
            if glob is None:
                continue
            (number, unit), (size, size_unit) = split_unit(leaf), self.scale[glob]
            text = f"`unitful(scale=...)` at {quote(name)} must have the dimension of the "
            text += "parameter."
            find_factors([unit, size_unit], text, ["parameter", "scale"])
            if jnp.shape(size) not in ((), jnp.shape(number)):
                raise ValueError(
                    f"`unitful(scale=...)` at {quote(name)} must be a number, or of the shape "
                    f"of the parameter, {jnp.shape(number)}. Got "
                    f"{show(attach_unit(size, size_unit))}."
                )

    def _find_glob(self, name: str) -> str | None:
        """The key of the scale for a parameter."""
        if name in self.scale:
            return name
        found = [glob for glob in self.scale if compile_glob(glob).fullmatch(name)]
        if len(found) > 1:
            raise ValueError(
                f"`unitful(scale=...)` must give one scale to {quote(name)}. Got two, at "
                f"{quote(found[0])} and {quote(found[1])}. Use the exact path as a key."
            )
        return found[0] if found else None

    def shrink_params(self, params: PyTree, units: dict[str, Any]) -> Any:
        def shrink(name: str, leaf: object) -> Any:
            number, unit = split_unit(leaf)
            if unit != _find_unit(name, units):
                raise_mismatch(
                    f"`unitful(...)` needs the parameter at `{name}` in the unit that it had "
                    "on `init`. Make another state by `init`, or an optimizer by `reselect`",
                    units[name],
                    unit,
                )
            return _divide(number, self._find_scale(name, unit))

        return _map(shrink, params)

    def shrink_grads(self, grads: PyTree, units: dict[str, Any]) -> Any:
        def shrink(name: str, leaf: object) -> Any:
            number, unit = split_unit(leaf)
            expected = find_quotient(self.loss_unit, _find_unit(name, units))
            factor = find_factor(unit, expected)
            if factor is None:
                raise_mismatch(_explain(name, unit, units[name]), expected, unit)
            return _multiply(_multiply(number, factor), self._find_scale(name, units[name]))

        return _map(shrink, grads)

    def grow(self, tree: PyTree, units: dict[str, Any]) -> Any:
        def grow(name: str, leaf: ArrayLike) -> Any:
            number = _multiply(leaf, self._find_scale(name, units[name]))
            return attach_unit(number, units[name])

        return _map(grow, tree)

    def shrink_extra_args(self, extra_args: dict[str, Any], units: dict[str, Any]) -> Any:
        """Values, gradients and functions of the parameters, without units."""
        grow, shrink_grads = [
            ft.partial(f, units=units) for f in (self.grow, self.shrink_grads)
        ]
        return map_extra_args(extra_args, grow, shrink_grads, self._shrink_value)

    def _shrink_value(self, value: object) -> Any:
        number, unit = split_unit(value)
        text = "`unitful(loss_unit=...)` must have the dimension of the loss."
        _, factor = find_factors([self.loss_unit, unit], text, ["loss_unit", "loss"])
        return _multiply(number, factor)

    def _find_scale(self, name: str, unit: Unit) -> Any:
        """The scale of a parameter, as a number in the unit of the parameter."""
        glob = self._find_glob(name)
        if glob is None:
            return 1.0
        number, scale_unit = self.scale[glob]
        factor = find_factor(scale_unit, unit)
        assert factor is not None
        return number * factor

    def describe(self, name: str, unit: Unit) -> Scale:
        """The scale of a parameter as text, which is the same for equal scales."""
        glob = self._find_glob(name)
        size, unit = (1.0, unit) if glob is None else self.scale[glob]
        is_short = not is_any_traced([size]) and np.size(size) <= _MOST_SIZES
        text = f"units of {_list(size) if is_short else show(size)}"
        text += "" if unit is None else f" {unit}"
        text += "" if self.loss_unit is None else f", loss in {self.loss_unit}"
        return Scale(text, _write(size, unit), _write(1.0, self.loss_unit))


def list_scales(tree: PyTree, prefix: str = "") -> Iterator[tuple[str, Scale]]:
    """The dotted paths of the leaves that are relative to a scale, each with that scale."""
    is_leaf = lambda node: isinstance(node, UnitfulState | State)
    for path, node in jtu.tree_leaves_with_path(tree, is_leaf=is_leaf):
        where = [*filter(None, (prefix, name_of(path)))]
        if isinstance(node, State):
            yield from list_scales(node.content.combine(), ".".join(where))
        elif isinstance(node, UnitfulState):
            scales = node.units.scales
            for name in FlatTree(node.inner_state).names:
                ends = [name.split(".", i)[-1] for i in range(name.count(".") + 1)]
                found = [scales[end] for end in ends if end in scales]
                if found and not found[0].is_traced:
                    yield ".".join([*where, "inner_state", name]), found[0]


def _write(size: Any, unit: Unit) -> str:
    if is_any_traced([size]):
        return f"{_TRACED} {id(size)}"
    _, magnitude, dim = describe_unit(unit) or ("1", "1", "1")
    text = _list(np.asarray(size, float) * float(magnitude))
    if np.size(size) > _MOST_SIZES:
        text = hashlib.sha256(text.encode()).hexdigest()
    return f"{text} {dim}"


def _list(size: Any) -> str:
    # Few digits, because the same scale in another unit differs by rounding.
    return ",".join([f"{number:.5g}" for number in np.ravel(np.asarray(size, float))])


def _map(func: Callable[[str, Any], Any], tree: PyTree) -> Any:
    flat = FlatTree(tree)
    return flat.unflatten(list(map(func, flat.names, flat.leaves)))


def _find_unit(name: str, units: dict[str, Any]) -> Any:
    if name not in units:
        raise ValueError(
            "`unitful(...)` needs gradients and parameters with the structure that the "
            f"parameters had on `init`. Got one at {quote(name)}, which is not among "
            f"{shorten(list(map(quote, units)))}."
        )
    return units[name]


def _explain(name: str, unit: Unit, param_unit: Unit) -> str:
    text = (
        f"`unitful(...)` needs the gradient at `{name}` in the unit of the loss over that of "
        "the parameter. Got "
    )
    if unit is None:
        return f"{text}one without a unit. Differentiate with `unit_aware=True`"
    if find_factor(unit, param_unit) is not None:
        return (
            f"{text}one in the unit of the parameter, as from `jax.grad`. Differentiate with "
            "`vg.vector_grad(..., unit_aware=True)`"
        )
    return f"{text}another one. Check `loss_unit`"


def _multiply(number: ArrayLike, factor: Any) -> Any:
    """The product, in the dtype of the number. For a factor of one, the number itself."""
    return _apply(operator.mul, number, factor)


def _divide(number: ArrayLike, factor: Any) -> Any:
    return _apply(operator.truediv, number, factor)


def _apply(combine: Callable[[Any, Any], Any], number: ArrayLike, factor: Any) -> Any:
    if isinstance(factor, float) and factor == 1.0:
        return number
    dtype = jnp.result_type(number)
    wide = widen(dtype)
    return combine(jnp.asarray(number, wide), jnp.asarray(factor, wide)).astype(dtype)
