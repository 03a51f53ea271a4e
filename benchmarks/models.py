"""The same network for all: layers of 8 x 8, if not said otherwise, where calls cost more than
arithmetic. The output is differentiated as a vector, or as the sum of it where a peer takes a
scalar only."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr


class Net(eqx.Module):
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


def apply_params(params, num_leaves, xs):
    """The same of a flat sequence, weight and bias in turns."""
    x = xs[0]
    for i in range(0, num_leaves, 2):
        x = jnp.tanh(params[i] @ x + params[i + 1])
    return x


def list_params(net: Net) -> tuple[jax.Array, ...]:
    return tuple([leaf for layer in net.layers for leaf in (layer.weight, layer.bias)])


def make_nnx_net(nnx: Any, net: Net) -> Any:
    """The same network of Flax."""

    class FlaxNet(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(
                [nnx.Linear(*layer.weight.shape, rngs=nnx.Rngs(0)) for layer in net.layers]
            )

        def __call__(self, xs):
            x = xs[0]
            for layer in self.layers:
                x = jnp.tanh(layer(x))
            return x

    return FlaxNet()


def make_brain_states(brainstate: Any, net: Net) -> list[Any]:
    return [brainstate.ParamState(param) for param in list_params(net)]
