"""Solves the heat equation `u_t = κ u_xx` by a network, with Adam and then L-BFGS."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
import vgrad_eqx as vg


KAPPA = 0.1


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, x):  # all points at once: two arrays of shape (n,)
        return jax.vmap(lambda *point: self.mlp(jnp.stack(point)))(t, x)


def loss(u, t, x):
    u_t = vg.elementwise_grad(u, argnums=0)(t, x)
    u_xx = vg.elementwise_grad(u, argnums=1, order=2)(t, x)
    start, ends = u(jnp.zeros_like(x), x) - jnp.sin(jnp.pi * x), u(t, jnp.round(x))
    edges = jnp.mean(start**2) + jnp.mean(ends**2)
    parts = {"equation": jnp.mean((u_t - KAPPA * u_xx) ** 2), "start and ends": edges}
    return parts["equation"] + 10 * edges, parts


def train(u, tx, num_steps, *points):
    step = vg.train_step(loss, tx, has_aux=True)
    state, history = step.init(u), []
    for _ in range(num_steps):
        state, metrics = step(state, *points)
        history.append(metrics.aux)
    return state.model, history


u = Network(eqx.nn.MLP(2, "scalar", 24, 3, jnp.tanh, key=jr.key(0)))
points = jr.uniform(jr.key(1), (2, 400))
u, by_adam = train(u, optax.adam(3e-3), 1500, *points)
u, by_lbfgs = train(u, optax.lbfgs(), 500, *points)
t, x = jnp.meshgrid(jnp.linspace(0, 1, 51), jnp.linspace(0, 1, 51), indexing="ij")
exact = jnp.exp(-KAPPA * jnp.pi**2 * t) * jnp.sin(jnp.pi * x)
error = u(t.ravel(), x.ravel()).reshape(t.shape) - exact
print(f"largest error: {jnp.max(jnp.abs(error)):.1e}")
for name in by_adam[0]:
    print(f"{name}: {by_adam[-1][name]:.1e} after Adam, {by_lbfgs[-1][name]:.1e} after L-BFGS")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
image = left.pcolormesh(t, x, error, cmap="PuOr")
left.set(xlabel="time t", ylabel="position x", title="network - exact solution")
figure.colorbar(image, label="error of u")
for name in by_adam[0]:
    right.semilogy([float(parts[name]) for parts in by_adam + by_lbfgs], label=name)
right.axvline(len(by_adam), color="gray", ls="--", label="Adam, then L-BFGS")
right.set(xlabel="step", ylabel="mean square")
right.legend()
plt.savefig("pinn.png")
