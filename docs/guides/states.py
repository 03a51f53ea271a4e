"""Trains a layer of spiking neurons, whose weights and membrane potentials are states."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
import vgrad_eqx as vg


class ParamState(vg.State): ...  # to be trained


class SpikingLayer(eqx.Module):
    weight: ParamState
    readout: ParamState
    potential: vg.State

    def __call__(self, inputs):
        potential = 0.9 * self.potential.value + self.weight.value @ inputs
        smooth = jax.nn.sigmoid(10 * (potential - 1.0))  # its slope is the surrogate
        spikes = smooth + jax.lax.stop_gradient((potential > 1.0) - smooth)
        self.potential.value = potential * (1 - spikes)  # back to rest after a spike
        return spikes, self.readout.value @ spikes


inputs = jr.bernoulli(jr.key(0), 0.1, (200, 50)).astype("float32")  # 200 steps of 1 ms
target = jnp.sin(jnp.arange(200) / 15)
weight, readout = 0.3 * jr.normal(jr.key(1), (40, 50)), 0.1 * jr.normal(jr.key(2), (40,))
layer = SpikingLayer(ParamState(weight), ParamState(readout), vg.State(jnp.zeros(40)))
params = vg.states(layer, vg.instance(ParamState))
opt = vg.StateOptimizer(optax.adam(5e-3), params)


def loss(inputs):
    layer.potential.value = jnp.zeros(40)
    _, (spikes, currents) = jax.lax.scan(lambda _, x: (None, layer(x)), None, inputs)
    output = jnp.convolve(currents, 0.9 ** jnp.arange(50))[:200]
    return jnp.mean((output - target) ** 2), (spikes, output)


@jax.jit
def make_step(inputs):
    grads, *results = vg.grad(loss, params, has_aux=True, return_value=True)(inputs)
    opt.step(grads)  # in place
    return results


errors = [make_step(inputs) for _ in range(300)]
error, (spikes, output) = errors[-1]
print(f"error: {errors[0][0]:.3f}, then {error:.4f}; spikes: {spikes.sum():.0f}")
figure, (top, bottom) = plt.subplots(2, figsize=(8, 5), sharex=True, layout="constrained")
top.scatter(*jnp.nonzero(spikes), s=2, color="black")
top.set(ylabel="neuron", title="spikes of the trained layer")
bottom.plot(jnp.stack([target, output], axis=1), label=["target", "filtered readout"])
bottom.set(xlabel="time (ms)", ylabel="output")
bottom.legend()
plt.savefig("states.png")
