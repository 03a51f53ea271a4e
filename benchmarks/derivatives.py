"""Derivatives of a network at a batch of points, in all known ways."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import vgrad_eqx as vg
from jax.experimental.jet import jet

from .gradients import Ways
from .peers import by_peers


def make_problem(num_points: int):
    """A network of two coordinates: for one point, for all of them, and its arrays."""
    mlp = eqx.nn.MLP(2, "scalar", 64, 4, jnp.tanh, key=jr.key(0))
    arrays, static = eqx.partition(mlp, eqx.is_array)
    t, x = jr.uniform(jr.key(1), (2, num_points))

    def point(arrays, t, x):
        return eqx.combine(arrays, static)(jnp.stack([t, x]))

    def batch(arrays, t, x):
        return jax.vmap(point, (None, 0, 0))(arrays, t, x)

    return point, batch, (arrays, t, x)


def compile_all(funcs: dict[str, Callable], args) -> Ways:
    compiled = {name: jax.jit(func) for name, func in funcs.items()}
    return {name: lambda func=func: func(*args) for name, func in compiled.items()}


def first_derivative(num_points: int) -> Ways:
    point, batch, args = make_problem(num_points)
    fixed = lambda arrays, t: lambda x: batch(arrays, t, x)
    funcs = {
        "vmap(grad)": jax.vmap(jax.grad(point, 2), (None, 0, 0)),
        "grad of the sum": jax.grad(lambda *args: batch(*args).sum(), 2),
        "jvp with ones": lambda arrays, t, x: jax.jvp(
            fixed(arrays, t), (x,), (jnp.ones_like(x),)
        )[1],
        "elementwise_grad": vg.elementwise_grad(batch, argnums=2, check=False),
        "with its check": vg.elementwise_grad(batch, argnums=2),
        "vector_grad": vg.vector_grad(batch, argnums=2),
    }
    funcs = by_peers(
        funcs,
        brainstate=lambda bst: {"brainstate": bst.transform.vector_grad(batch, argnums=2)},
        saiunit=lambda sai: {"saiunit": sai.autograd.vector_grad(batch, argnums=2)},
    )
    return compile_all(funcs, args)


def jacobian_diagonal(num_points: int) -> Ways:
    """Of few points, because the Jacobian of many does not fit into the memory."""
    _, batch, args = make_problem(num_points)
    funcs = {
        "elementwise_grad": vg.elementwise_grad(batch, argnums=2, check=False),
        "diag of jacrev": lambda *args: jnp.diag(jax.jacrev(batch, 2)(*args)),
    }
    return compile_all(funcs, args)


def push(func: Callable) -> Callable:
    return lambda x: jax.jvp(func, (x,), (jnp.ones_like(x),))[1]


def pull(func: Callable) -> Callable:
    def derivative(x):
        value, pull_back = jax.vjp(func, x)
        return pull_back(jnp.ones_like(value))[0]

    return derivative


def use_jet(func: Callable) -> Callable:
    def derivative(x):
        series = (jnp.ones_like(x), jnp.zeros_like(x))
        return jet(func, (x,), (series,))[1][1]

    return derivative


def second_derivative(num_points: int) -> Ways:
    point, batch, args = make_problem(num_points)
    outer_inner = {
        "forward, forward": lambda func: push(push(func)),
        "forward, reverse": lambda func: push(pull(func)),
        "reverse, forward": lambda func: pull(push(func)),
        "reverse, reverse": lambda func: pull(pull(func)),
        "Taylor mode": use_jet,
    }
    by_batch = {
        name: lambda arrays, t, x, way=way: way(lambda x: batch(arrays, t, x))(x)
        for name, way in outer_inner.items()
    }
    funcs = {
        "vmap(grad(grad))": jax.vmap(jax.grad(jax.grad(point, 2), 2), (None, 0, 0)),
        "vmap(hessian)": jax.vmap(jax.hessian(point, 2), (None, 0, 0)),
        **by_batch,
        "elementwise_grad": vg.elementwise_grad(batch, argnums=2, order=2, check=False),
        "with its check": vg.elementwise_grad(batch, argnums=2, order=2),
    }
    return compile_all(funcs, args)
