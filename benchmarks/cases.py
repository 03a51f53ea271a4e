"""What is measured: gradients by selector against the same work by hand."""

from collections.abc import Callable

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import vgrad_eqx as vg


Ways = dict[str, Callable[[], object]]


class Net(eqx.Module):
    """Layers of 8 x 8 if not said otherwise, so that calls cost more than arithmetic."""

    layers: list[eqx.nn.Linear]

    def __init__(self, num_leaves: int, width: int = 8):
        keys = jr.split(jr.key(0), num_leaves // 2)
        self.layers = [eqx.nn.Linear(width, width, key=key) for key in keys]

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def apply(net, xs):
    return net(xs[0])


def gradient_by_hand(spec) -> Callable:
    def gradient(net, xs):
        diff, nondiff = eqx.partition(net, spec)
        value, pull_back = eqx.filter_vjp(
            lambda diff: apply(eqx.combine(diff, nondiff), xs), diff
        )
        return pull_back(jnp.ones_like(value))[0]

    return gradient


def gradients(num_leaves: int) -> tuple[Net, jax.Array, dict[str, Callable]]:
    net = Net(num_leaves)
    spec = jtu.tree_map(eqx.is_inexact_array, net)
    return (
        net,
        jnp.ones((1, 8)),
        {
            "eqx.filter_vjp": gradient_by_hand(spec),
            "unchecked": vg.vector_grad(apply, "layers.**", check_states=False),
            "checked": vg.vector_grad(apply, "layers.**"),
        },
    )


def eager(num_leaves: int) -> Ways:
    net, xs, funcs = gradients(num_leaves)
    return {name: lambda func=func: func(net, xs) for name, func in funcs.items()}


def tracing(num_leaves: int) -> Ways:
    """Each trace is of an input of another length, so that nothing is remembered."""
    net, _, funcs = gradients(num_leaves)
    arrays, static = eqx.partition(net, eqx.is_array)
    counts = dict.fromkeys(funcs, 0)

    def trace(name):
        counts[name] += 1
        xs = jax.ShapeDtypeStruct((counts[name], 8), jnp.float32)

        def gradient(arrays, xs):
            return funcs[name](eqx.combine(arrays, static), xs)

        jax.make_jaxpr(gradient)(arrays, xs)

    return {name: lambda name=name: trace(name) for name in funcs}


def apply_pairs(read, num_leaves, x):
    for i in range(0, num_leaves, 2):
        x = jnp.tanh(read(i) @ x + read(i + 1))
    return x


def make_references(num_leaves: int) -> tuple[tuple, Callable, dict[str, Callable]]:
    """The same function over a tuple of arrays, over our states, and over those of a peer."""
    params = tuple(jnp.full((8, 8) if i % 2 == 0 else (8, 1), 0.1) for i in range(num_leaves))
    ours = [vg.State(param) for param in params]
    theirs = [brainstate.ParamState(param) for param in params]

    def over(states):
        return lambda x: apply_pairs(lambda i: states[i].value, num_leaves, x)

    def by_hand(params, x):
        func = lambda params: apply_pairs(params.__getitem__, num_leaves, x)
        value, pull_back = jax.vjp(func, params)
        return pull_back(jnp.ones_like(value))

    transforms = {
        "vg.State": vg.vector_grad(over(ours), ours),
        "brainstate": brainstate.transform.vector_grad(over(theirs), theirs),
    }
    return params, by_hand, transforms


def states_eager(num_leaves: int) -> Ways:
    params, by_hand, transforms = make_references(num_leaves)
    x = jnp.ones((8, 1))
    return {
        "by hand": lambda: by_hand(params, x),
        **{name: lambda func=func: func(x) for name, func in transforms.items()},
    }


def states_tracing(num_leaves: int) -> Ways:
    params, by_hand, transforms = make_references(num_leaves)
    widths = iter(range(1, 10**9))

    def trace(func, *args):
        # A width that was not traced before.
        x = jax.ShapeDtypeStruct((8, next(widths)), jnp.float32)
        jax.make_jaxpr(lambda *args: func(*args))(*args, x)

    return {
        "by hand": lambda: trace(by_hand, params),
        **{name: lambda func=func: trace(func) for name, func in transforms.items()},
    }


def states_compiled(num_leaves: int) -> Ways:
    params, by_hand, transforms = make_references(num_leaves)
    x = jnp.ones((8, 8192))
    compiled = jax.jit(by_hand)
    ours = jax.jit(lambda x: transforms["vg.State"](x))
    return {"by hand": lambda: compiled(params, x), "vg.State": lambda: ours(x)}


def choosing(num_leaves: int) -> Ways:
    """Flattening alone, then the choice: anew, in a model of a known kind, in the same one."""
    tree = Net(num_leaves)
    counter = iter(range(10**9))

    def change():
        # To the library, other layers make another model. Copying one would take longer.
        tree.layers[0], tree.layers[1] = tree.layers[1], tree.layers[0]

    def choose_anew():
        change()
        # A glob that was not asked before, and matches the same leaves.
        return vg.states(tree, f"layers.*.{{weight,{next(counter)}}}")

    def choose_again():
        change()
        return vg.states(tree, "layers.*.weight")

    return {
        "jtu.tree_leaves": lambda: jtu.tree_leaves(tree),
        "a new glob": choose_anew,
        "a new model": choose_again,
        "nothing new": lambda: vg.states(tree, "layers.*.weight"),
    }
