"""The error for gradients that are not finite."""

import functools as ft
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array


def raise_if_not_finite(grads: Sequence[tuple[Array, str]], caller: str) -> None:
    """Raises an error if a gradient contains a NaN or infinity, also in compiled code."""
    faults = jnp.stack([_faults(grad) for grad, _ in grads])
    report = ft.partial(_report, names=tuple([name for _, name in grads]), caller=caller)
    if isinstance(faults, jax.core.Tracer):
        # Not `eqx.error_if`, whose message cannot depend on values.
        jax.debug.callback(report, faults)
    else:
        report(faults)


def _faults(grad: Array) -> Array:
    return jnp.stack([jnp.isnan(grad).any(), jnp.isinf(grad).any()])


def _report(faults: Array, *, names: Sequence[str], caller: str) -> None:
    found = [
        f"{' and '.join(np.array(['NaN', 'infinity'])[np.asarray(fault)])} in `{name}`"
        for name, fault in zip(names, faults, strict=True)
        if fault.any()
    ]
    if found:
        raise FloatingPointError(
            f"`{caller}` must give finite gradients. Got {', '.join(found)}. To find the "
            "operation that produces the first NaN, run under `jax.debug_nans(True)`."
        )
