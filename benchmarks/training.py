"""Whole training steps with adam: by hand, by the peers, and by this library."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import vgrad_eqx as vg

from .gradients import Ways
from .models import apply_params, make_brain_states, make_nnx_net, Net
from .peers import by_peers


TX = optax.adam(1e-3)
DONATING = vg.jit(donate="all-except-first")
LABELS = jnp.arange(4)


def loss(net, xs):
    return jnp.sum(jax.vmap(net)(xs) ** 2)


def loss_of_params(params, xs):
    return jnp.sum(apply_params(params, len(params), xs) ** 2)


def copy(arrays):
    return tuple([jnp.array(array, copy=True) for array in arrays])


def loss_of_vit(net, images):
    logits = jax.vmap(lambda image: net(image, inference=True))(images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))


def step_by_hand(net: Any, xs: jax.Array, loss: Any = loss) -> Callable[[], object]:
    """The floor: one donated call of `jax.jit` over flat tuples of arrays."""
    leaves, structure = jtu.tree_flatten(net)
    places = [i for i, leaf in enumerate(leaves) if eqx.is_inexact_array(leaf)]
    params = copy([leaves[i] for i in places])
    arrays, arrays_structure = jtu.tree_flatten((params, TX.init(params)))

    def value(params, xs):
        filled = list(leaves)
        for i, param in zip(places, params, strict=True):
            filled[i] = param
        return loss(jtu.tree_unflatten(structure, filled), xs)

    @ft.partial(jax.jit, donate_argnums=0)
    def step(arrays, xs):
        params, opt_state = jtu.tree_unflatten(arrays_structure, arrays)
        result, grads = jax.value_and_grad(value)(params, xs)
        updates, opt_state = TX.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return tuple(jtu.tree_leaves((params, opt_state))), result

    arrays = tuple(arrays)

    def call():
        nonlocal arrays
        arrays, result = step(arrays, xs)
        return result

    return call


def copy_module(net: Any) -> Any:
    """One of its own, whose arrays may be donated."""
    return jtu.tree_map(lambda leaf: jnp.array(leaf) if eqx.is_array(leaf) else leaf, net)


def step_by_optax(net: Any, xs: jax.Array, jit: Any, loss: Any = loss) -> Callable[[], object]:
    """The loop of the tutorials of Equinox."""
    net = copy_module(net)
    opt_state = TX.init(eqx.filter(net, eqx.is_inexact_array))

    @jit
    def step(xs, net, opt_state):
        result, grads = eqx.filter_value_and_grad(loss)(net, xs)
        updates, opt_state = TX.update(grads, opt_state, eqx.filter(net, eqx.is_inexact_array))
        return eqx.apply_updates(net, updates), opt_state, result

    def call():
        nonlocal net, opt_state
        net, opt_state, result = step(xs, net, opt_state)
        return result

    return call


def step_by_optimizer(
    net: Any, xs: jax.Array, jit: Any, loss: Any = loss
) -> Callable[[], object]:
    """The same loop with `vg.Optimizer`."""
    net = copy_module(net)
    opt = vg.Optimizer(TX, net)

    @jit
    def step(xs, net, opt):
        grads, result = vg.vector_grad(loss, True, return_value=True)(net, xs)
        return *opt.step(net, grads), result

    def call():
        nonlocal net, opt
        net, opt, result = step(xs, net, opt)
        return result

    return call


def step_by_train_step(
    net: Any, xs: jax.Array, loss: Any = loss, **options: Any
) -> Callable[[], object]:
    step = vg.train_step(loss, TX, **options)
    state = step.init(net)

    def call():
        nonlocal state
        state, metrics = step(state, xs)
        return metrics.value

    return call


def step_over_states(net: Net, xs: jax.Array) -> Callable[[], object]:
    leaves, structure = jtu.tree_flatten(net)
    states = [vg.State(leaf) if eqx.is_array(leaf) else leaf for leaf in leaves]
    trained = [state for state in states if isinstance(state, vg.State)]

    def func(xs):
        values = [each.value if isinstance(each, vg.State) else each for each in states]
        return loss(jtu.tree_unflatten(structure, values), xs)

    step = vg.train_step(func, TX, trained)
    state = step.init()

    def call():
        nonlocal state
        state, metrics = step(state, xs)
        return metrics.value

    return call


def step_by_brainstate(
    brainstate: Any, braintools: Any, net: Net, xs: jax.Array
) -> Callable[[], object]:
    states = dict(enumerate(make_brain_states(brainstate, net)))
    opt = braintools.optim.Adam(lr=1e-3)
    opt.register_trainable_weights(states)

    def func():
        return loss_of_params([state.value for state in states.values()], xs)

    @brainstate.transform.jit
    def step():
        grads, result = brainstate.transform.grad(func, states, return_value=True)()
        opt.update(grads)
        return result

    return step


def step_by_nnx(nnx: Any, net: Net, xs: jax.Array) -> Callable[[], object]:
    model = make_nnx_net(nnx, net)
    opt = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model, opt, xs):
        result, grads = nnx.value_and_grad(lambda model: jnp.sum(model(xs) ** 2))(model)
        opt.update(model, grads)
        return result

    return lambda: step(model, opt, xs)


def training(num_leaves: int) -> Ways:
    net, xs = Net(num_leaves), jnp.ones((1, 8))
    ways = {
        "by hand": step_by_hand(net, xs),
        "Equinox": step_by_optax(net, xs, eqx.filter_jit),
        "vg.jit, optax": step_by_optax(net, xs, DONATING),
        "vg.jit, vg.Optimizer": step_by_optimizer(net, xs, DONATING),
        "vg.train_step": step_by_train_step(net, xs),
        "packed": step_by_train_step(net, xs, packed=True),
        "over states": step_over_states(net, xs),
    }
    return by_peers(
        ways,
        brain=lambda bst, tools: {"brainstate": step_by_brainstate(bst, tools, net, xs)},
        nnx=lambda nnx: {"nnx": step_by_nnx(nnx, net, xs)},
    )


def training_wide(num_leaves: int) -> Ways:
    """Layers of 1024, where only the arithmetic counts."""
    net, xs = Net(num_leaves, width=1024), jnp.ones((64, 1024))
    return {
        "by hand": step_by_hand(net, xs),
        "vg.train_step": step_by_train_step(net, xs),
        "packed": step_by_train_step(net, xs, packed=True),
        "over states": step_over_states(net, xs),
    }


def training_vit(num_images: int) -> Ways:
    """ViT-Tiny, of 152 arrays and 5.7 million parameters, on images of 64 x 64."""

    def by_equimo(models):
        net = models.vit_tiny_patch16_224(img_size=64, key=jr.key(0))
        images = jr.normal(jr.key(1), (num_images, 3, 64, 64))
        return {
            "by hand": step_by_hand(net, images, loss_of_vit),
            "Equinox": step_by_optax(net, images, eqx.filter_jit, loss_of_vit),
            "vg.jit, vg.Optimizer": step_by_optimizer(net, images, DONATING, loss_of_vit),
            "vg.train_step": step_by_train_step(net, images, loss_of_vit),
            "packed": step_by_train_step(net, images, loss_of_vit, packed=True),
        }

    return by_peers({}, vit=by_equimo)
