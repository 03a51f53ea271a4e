"""Gradients by selector against the same work by hand: compiled, eager, and while tracing."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import vgrad_eqx as vg

from .interleave import Way
from .models import apply, apply_params, list_params, make_brain_states, make_nnx_net, Net
from .peers import by_peers


Ways = dict[str, Any]


def differentiate(func: Callable[..., Any], params: Any) -> Any:
    value, pull_back = jax.vjp(func, params)
    return pull_back(jnp.ones_like(value))[0]


def by_equinox(spec: Any) -> Callable[..., Any]:
    def gradient(net, xs):
        diff, nondiff = eqx.partition(net, spec)
        value, pull_back = eqx.filter_vjp(
            lambda diff: apply(eqx.combine(diff, nondiff), xs), diff
        )
        return pull_back(jnp.ones_like(value))[0]

    return gradient


def by_brainstate(brainstate: Any, net: Net) -> Callable[..., Any]:
    states = make_brain_states(brainstate, net)

    def func(xs):
        return apply_params([state.value for state in states], len(states), xs)

    return brainstate.transform.vector_grad(func, states)


def by_nnx(nnx: Any, **options: Any) -> Callable[..., Any]:
    return nnx.grad(lambda net, xs: jnp.sum(net(xs)), **options)


def by_saiunit(saiunit: Any, num_leaves: int) -> Callable[..., Any]:
    func = lambda params, xs: apply_params(params, num_leaves, xs)
    return saiunit.autograd.vector_grad(func)


def renew(net: Net) -> Net:
    return jtu.tree_unflatten(jtu.tree_structure(net), jtu.tree_leaves(net))


def compiled(num_leaves: int) -> Ways:
    """Calls of a compiled gradient. All leaves are chosen."""
    net, xs = Net(num_leaves), jnp.ones((1, 8))
    params, named = list_params(net), vg.states(net)
    names = list(named)
    ours = vg.jit(vg.vector_grad(apply, "layers.**"))
    spec = jtu.tree_map(eqx.is_inexact_array, net)
    theirs = eqx.filter_jit(by_equinox(spec))

    @vg.jit
    @vg.vector_grad(grad_states="**")
    def over_dict(named, xs):
        return apply(vg.replace_states(net, named), xs)

    @jax.jit
    def by_hand(params, xs):
        return differentiate(lambda params: apply_params(params, num_leaves, xs), params)

    @jax.jit
    def by_hand_of_dict(named, xs):
        func = lambda named: apply_params([named[name] for name in names], num_leaves, xs)
        return differentiate(func, named)

    ways = {
        "by hand": lambda: by_hand(params, xs),
        "by hand, dicts": lambda: by_hand_of_dict(named, xs),
        "vg.jit, new module": Way(lambda new: ours(new, xs), lambda: renew(net)),
        "vg.jit, same module": lambda: ours(net, xs),
        "vg.jit, vg.states": lambda: over_dict(named, xs),
        "Equinox": lambda: theirs(net, xs),
    }
    if num_leaves > 1000:  # the programs of more would not fit into one process
        return ways
    return by_peers(
        ways,
        brainstate=lambda bst: {
            "brainstate": ft.partial(bst.transform.jit(by_brainstate(bst, net)), xs)
        },
        saiunit=lambda sai: {
            "saiunit": ft.partial(jax.jit(by_saiunit(sai, num_leaves)), params, xs)
        },
        nnx=lambda nnx: {
            "nnx, graph": ft.partial(nnx.jit(by_nnx(nnx)), make_nnx_net(nnx, net), xs),
            "nnx, tree": ft.partial(
                nnx.jit(by_nnx(nnx, graph=False), graph=False), make_nnx_net(nnx, net), xs
            ),
        },
    )


def compiled_wide(num_leaves: int) -> Ways:
    """Layers of 1024, where only the arithmetic counts."""
    net, xs = Net(num_leaves, 1024), jnp.ones((64, 1024))
    leaves, structure = jtu.tree_flatten(net)

    def over_rows(net, xs):
        return jax.vmap(net)(xs)

    @jax.jit
    def by_hand(leaves, xs):
        func = lambda leaves: over_rows(jtu.tree_unflatten(structure, leaves), xs)
        return differentiate(func, leaves)

    ours = vg.jit(vg.vector_grad(over_rows, True))
    theirs = eqx.filter_jit(
        lambda net, xs: eqx.filter_grad(lambda net: jnp.sum(over_rows(net, xs)))(net)
    )
    return {
        "by hand": lambda: by_hand(leaves, xs),
        "vg.jit, same module": lambda: ours(net, xs),
        "Equinox": lambda: theirs(net, xs),
    }


def eager(num_leaves: int) -> Ways:
    """Calls of a gradient that is not compiled."""
    net, xs = Net(num_leaves), jnp.ones((1, 8))
    params = list_params(net)
    unchecked = vg.vector_grad(apply, "layers.**", check_states=False)
    checked = vg.vector_grad(apply, "layers.**")
    theirs = by_equinox(jtu.tree_map(eqx.is_inexact_array, net))
    # By hand over the module, because its layers do more in Python than a product and a sum.
    leaves, structure = jtu.tree_flatten(net)
    ways = {
        "by hand": lambda: differentiate(
            lambda leaves: apply(jtu.tree_unflatten(structure, leaves), xs), leaves
        ),
        "vg.vector_grad": lambda: checked(net, xs),
        "vg, check_states=False": lambda: unchecked(net, xs),
        "Equinox": lambda: theirs(net, xs),
        "over a tuple, by hand": lambda: differentiate(
            lambda params: apply_params(params, num_leaves, xs), params
        ),
    }
    return by_peers(
        ways,
        brainstate=lambda bst: {"brainstate": ft.partial(by_brainstate(bst, net), xs)},
        saiunit=lambda sai: {"saiunit": ft.partial(by_saiunit(sai, num_leaves), params, xs)},
        nnx=lambda nnx: {"nnx": ft.partial(by_nnx(nnx), make_nnx_net(nnx, net), xs)},
    )


def tracing(num_leaves: int) -> Ways:
    """Each trace is of an input of another length, so that nothing is remembered."""
    net = Net(num_leaves)
    params = list_params(net)
    leaves, structure = jtu.tree_flatten(net)
    sizes = iter(range(2, 10**9))

    def trace(func, *args):
        xs = jax.ShapeDtypeStruct((next(sizes), 8), jnp.float32)
        jax.make_jaxpr(lambda *args: func(*args))(*args, xs)

    def over_leaves(func):
        return lambda leaves, xs: func(jtu.tree_unflatten(structure, leaves), xs)

    def by_hand(leaves, xs):
        func = lambda leaves: apply(jtu.tree_unflatten(structure, leaves), xs)
        return differentiate(func, leaves)

    unchecked = over_leaves(vg.vector_grad(apply, "layers.**", check_states=False))
    checked = over_leaves(vg.vector_grad(apply, "layers.**"))
    theirs = over_leaves(by_equinox(jtu.tree_map(eqx.is_inexact_array, net)))
    ways = {
        "by hand": lambda: trace(by_hand, leaves),
        "vg, check_states=False": lambda: trace(unchecked, leaves),
        "vg.vector_grad": lambda: trace(checked, leaves),
        "Equinox": lambda: trace(theirs, leaves),
        "over a tuple, by hand": lambda: trace(
            lambda params, xs: differentiate(
                lambda params: apply_params(params, num_leaves, xs), params
            ),
            params,
        ),
    }

    def by_nnx_state(nnx):
        graph, state = nnx.split(make_nnx_net(nnx, net))
        gradient = by_nnx(nnx)
        return lambda: trace(
            lambda state, xs: nnx.state(gradient(nnx.merge(graph, state), xs)), state
        )

    return by_peers(
        ways,
        brainstate=lambda bst: {"brainstate": ft.partial(trace, by_brainstate(bst, net))},
        saiunit=lambda sai: {"saiunit": ft.partial(trace, by_saiunit(sai, num_leaves), params)},
        nnx=lambda nnx: {"nnx": by_nnx_state(nnx)},
    )
