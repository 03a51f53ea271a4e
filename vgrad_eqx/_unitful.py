"""Any optax transformation for parameters with units."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ._flat import FlatTree, near_misses
from ._units import attach_unit, find_factors, find_quotient, parse_unit, same_dimension, split_unit


class _Units(eqx.Module):
    """The units in which parameters are written, which belong to the structure."""

    units: tuple[Any, ...] = eqx.field(static=True)


class UnitfulState(NamedTuple):
    """The state of [`vgrad_eqx.unitful`][]: that of the optimizer inside, and units."""

    inner_state: Any
    units: _Units


def unitful(
    tx: optax.GradientTransformation,
    loss_unit: Any = None,
    scale: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets any optax transformation optimize parameters with units.

    With a scale `S` for each parameter `p` and the unit `L` of the loss, optax sees `x = p/S`
    and the gradient `g·S/L`, and its update `dx` becomes `S·dx`, in the unit of `p`. All
    of these are pure numbers, so every hyperparameter is one, and a fit does not depend
    on the units that parameters are written in.

    **Arguments:**

    - `tx`: the transformation.
    - `loss_unit`: the unit of the loss, such as `brainunit.mvolt**2`. Defaults to none.
    - `scale`: a dict `{path: scale}`, of what is a typical size of the parameter at that
        path: a Quantity of its dimension, or a number for one without a unit. Defaults to
        one of the unit in which the parameter is written, and then the fit does depend on
        that unit.

    **Returns:**

    An `optax.GradientTransformationExtraArgs`. Its `update` takes gradients with units, as
    `vector_grad(..., unit_aware=True)` gives them, and returns updates in the unit of each
    parameter, for [`vgrad_eqx.apply_updates`][]. It converts the extra arguments `value`,
    `grad` and `value_fn`, so that line searches work, and passes others on. All units are
    checked while it is traced, which leaves nothing in the compiled program.

    **Raises:**

    - `TypeError`: if `loss_unit` is no unit.
    - `ValueError`: on `init`, for a scale at an unknown path.
    - `brainunit.UnitMismatchError`: on `init`, for a scale of another dimension than its
        parameter; on `update`, for a gradient that is not in the unit of the loss over that
        of the parameter, or a parameter whose unit is another one than on `init`.

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
    inner = optax.with_extra_args_support(tx)
    loss_unit = parse_unit(loss_unit, "unitful(loss_unit=...)")
    scale = dict(scale or {})

    def init(params: Any) -> UnitfulState:
        scaling = _Scaling(params, loss_unit, scale)
        return UnitfulState(inner.init(scaling.shrink(params)), _Units(scaling.units))

    def update(
        updates: Any, state: UnitfulState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, UnitfulState]:
        ...

    return optax.GradientTransformationExtraArgs(init, update)
