"""Functions over states by reference, and the choice of leaves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import vgrad_eqx as vg

from .gradients import differentiate, Ways
from .models import apply_params, Net
from .peers import by_peers


def make_states(num_leaves: int) -> tuple[tuple, Callable, dict[str, Callable]]:
    """The same function over a tuple of arrays, over our states, and over those of a peer."""
    params = tuple(jnp.full((8, 8) if i % 2 == 0 else (8, 1), 0.1) for i in range(num_leaves))

    def over(states):
        return lambda x: apply_params([each.value for each in states], num_leaves, x[None])

    def by_hand(params, x):
        return differentiate(lambda params: apply_params(params, num_leaves, x[None]), params)

    def by_brainstate(brainstate):
        theirs = [brainstate.ParamState(param) for param in params]
        return {"brainstate": brainstate.transform.vector_grad(over(theirs), theirs)}

    ours = [vg.State(param) for param in params]
    transforms = by_peers(
        {"vg.State": vg.vector_grad(over(ours), ours)}, brainstate=by_brainstate
    )
    return params, by_hand, transforms


def states_eager(num_leaves: int) -> Ways:
    params, by_hand, transforms = make_states(num_leaves)
    x = jnp.ones((8, 1))
    return {
        "by hand": lambda: by_hand(params, x),
        **{name: lambda func=func: func(x) for name, func in transforms.items()},
    }


def states_tracing(num_leaves: int) -> Ways:
    params, by_hand, transforms = make_states(num_leaves)
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
    params, by_hand, transforms = make_states(num_leaves)
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
        return vg.states(tree, f"layers.*.[w{next(counter)}]eight")

    def choose_again():
        change()
        return vg.states(tree, "layers.*.weight")

    return {
        "jtu.tree_leaves": lambda: jtu.tree_leaves(tree),
        "a new glob": choose_anew,
        "a new model": choose_again,
        "nothing new": lambda: vg.states(tree, "layers.*.weight"),
    }
