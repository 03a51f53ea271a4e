"""Gradients of quantities with units, against the same numbers without."""

from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import vgrad_eqx as vg

from .gradients import differentiate, Ways
from .peers import by_peers


def make_problem(num_leaves: int) -> tuple[Any, Any, Any]:
    """A function of times and a potential, the times as numbers, and in ms."""
    numbers = {f"t{i}": jnp.full(8, 1.0 + i) for i in range(num_leaves)}
    quantities = {name: number * u.ms for name, number in numbers.items()}

    def func(times, potential):
        return sum([times["t0"] / time * potential for time in times.values()], 0 * potential)

    return func, numbers, quantities


def unit_aware(num_leaves: int, wrap: Any = jax.jit) -> Ways:
    func, numbers, quantities = make_problem(num_leaves)
    plain, potential = jnp.ones(8), jnp.ones(8) * u.mV
    by_hand = wrap(
        lambda numbers, potential: differentiate(lambda n: func(n, potential), numbers)
    )
    transform = vg.vector_grad(func, argnums=0, unit_aware=True)
    ours = transform if wrap is not jax.jit else vg.jit(transform)
    ways = {
        "by hand, no units": lambda: by_hand(numbers, plain),
        "vg.vector_grad, no units": lambda: ours(numbers, plain),
        "vg.vector_grad": lambda: ours(quantities, potential),
    }

    def by_saiunit(saiunit):
        theirs = wrap(saiunit.autograd.vector_grad(func, argnums=0, unit_aware=True))
        values = {name: number * saiunit.ms for name, number in numbers.items()}
        volts = plain * saiunit.mV
        return {"saiunit": lambda: theirs(values, volts)}

    return by_peers(ways, saiunit=by_saiunit)


def unit_aware_eager(num_leaves: int) -> Ways:
    return unit_aware(num_leaves, wrap=lambda func: func)
