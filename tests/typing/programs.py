"""Programs of users, which type checkers read, and nobody runs.

A line that ends with `# error` is an error to each checker, and no other line is. After a colon
comes the only checker that says so: to mypy, optax has no types, and brainunit has no units.
"""

from collections.abc import Callable
from typing import Any, assert_type

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import vgrad_eqx as vg


model = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (2,))


def loss(model: eqx.nn.MLP, x: jax.Array, scale: float = 1.0) -> jax.Array:
    return scale * jnp.sum(model(x) ** 2)


# Gradients


@vg.vector_grad(grad_states="layers.*.weight", return_value=True)
def decorated(model: eqx.nn.MLP, x: jax.Array) -> jax.Array:
    return model(x)


@vg.grad
def plain(model: eqx.nn.MLP, x: jax.Array) -> jax.Array:
    return jnp.sum(model(x))


var_grads, value = decorated(model, x)
decorated(model)  # error
decorated(model, x, 3)  # error
plain(model, x)
plain(model, y=x)  # error
for operator in (vg.grad, vg.jacrev, vg.jacfwd, vg.hessian):
    operator(loss, "**")(model, x, scale=2.0)
    operator(grad_states="**", argnums=[1])(loss)(model, x)
    operator(loss)(model)  # error
vg.elementwise_grad(loss, argnums=1, order=2)(model, x)
vg.elementwise_grad(order=2)(loss)(model)  # error
vg.vector_grad(loss, cotangent=x)(model, x)
vg.grad(loss, "**", None, True, None, False)(model, x)
vg.grad(loss, {"a": "layers.0", "b": vg.instance(eqx.nn.Linear)})(model, x)
vg.grad(loss, jax.tree.map(eqx.is_inexact_array, model))(model, x)
vg.grad(loss, eqx.is_inexact_array)(model, x)
vg.grad(model)(x)
vg.grad(loss, wrt="**")  # error
vg.grad(loss, 3)  # error
vg.grad(loss, argnums="model")  # error
vg.grad(3)  # error
assert_type(vg.grad(loss)(model, x), Any)


class Problem(eqx.Module):
    weight: jax.Array

    @vg.grad
    def gradient(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self.weight * x)

    @vg.jit
    @vg.vector_grad(argnums=0)
    def compiled(self, x: jax.Array) -> jax.Array:
        return self.weight * x

    @vg.jit
    def value(self, x: jax.Array) -> jax.Array:
        return jnp.sum(self.weight * x)


problem = Problem(x)
problem.gradient(x)
problem.gradient()  # error
problem.compiled(x)
problem.compiled(x, x)  # error
assert_type(problem.value(x), jax.Array)
problem.value(x, x)  # error

# Compiled functions


@vg.jit(donate="all")
def make_step(
    model: eqx.nn.MLP, opt: vg.Optimizer, x: jax.Array
) -> tuple[eqx.nn.MLP, vg.Optimizer]:
    return opt.step(model, vg.grad(loss, "**")(model, x))


assert_type(vg.jit(loss)(model, x, scale=2.0), jax.Array)
vg.jit(loss)(model)  # error
vg.jit(loss, donate="some")  # error
vg.jit(vg.grad(loss))(model)  # error
vg.jit(loss).lower(model, x)
vg.jit(loss).lower(model)  # error
assert_type(make_step(model, vg.Optimizer(optax.adam(1e-3), model), x)[0], eqx.nn.MLP)
step_like: Callable[[eqx.nn.MLP, vg.Optimizer, jax.Array], Any] = make_step

# Choosing leaves

assert_type(vg.states(model, "**.bias"), dict[str, Any])
assert_type(vg.replace_states(model, {"layers.0.bias": x}), eqx.nn.MLP)
assert_type(vg.apply_updates(model, {"layers.0.bias": x}), eqx.nn.MLP)
vg.replace_states(model, x)  # error
vg.states(model, vg.path("layers") & ~vg.leaf(lambda leaf: leaf.ndim == 2) | "layers.0")
vg.states(model, 3)  # error
vg.path(3)  # error
vg.instance("Linear")  # error
vg.at("layers")  # error
print(vg.summary(model, "**", values=True))
vg.summary(model, "**", True)  # error

# States by reference

weight = vg.State({"a": x}, name="weight")
assert_type(weight.value, dict[str, jax.Array])
count = vg.State(x)
count.value += 1
count.value = 3
assert_type(count.value, jax.Array)
count.value = "three"  # error
vg.State(x, 3)  # error
vg.grad(lambda: jnp.sum(weight.value["a"]), weight)()
vg.grad(lambda: jnp.sum(weight.value["a"]), [weight, count])()


class Hidden(vg.State[jax.Array]):
    pass


assert_type(Hidden(x).value, jax.Array)

# Optimizers

opt = vg.Optimizer({"**.weight": optax.adamw(1e-3), "**.bias": optax.sgd(0.1)}, model)
new_model, new_opt = opt.step(model, {"layers.0.bias": x}, value=1.0)
assert_type(new_model, eqx.nn.MLP)
assert_type(new_opt, vg.Optimizer)
assert_type(opt.set_hyperparams(learning_rate=1e-3), vg.Optimizer)
vg.Optimizer(optax.adam, model)  # error: pyright
vg.Optimizer({"**": 1e-3}, model)  # error: pyright
opt.step(model, x)  # error
tx = optax.chain(optax.clip_by_global_norm(1.0), vg.partition({"**": optax.sgd(0.1)}))
params = vg.states(model)
updates, _ = tx.update(params, tx.init(params), params)
assert_type(vg.apply_updates(model, updates), eqx.nn.MLP)
vg.unitful(optax.sgd(0.1), loss_unit=u.mV**2, scale={"tau": 10.0 * u.ms})  # error: mypy
vg.unitful(optax.sgd(0.1), loss_unit=u.mV / u.ms)  # error: mypy
vg.unitful(optax.sgd)  # error: pyright
vg.StateOptimizer(optax.adam(1e-3), {"w": weight}).step({"w": x})

# Training

step = vg.train_step(loss, optax.adam(1e-3), "**", steps_per_call=2)
state = step.init(model, key=jax.random.key(0))
state, metrics = step(state, x)
assert_type(state, vg.TrainState[eqx.nn.MLP])
assert_type(state.model, eqx.nn.MLP)
assert_type(state.optimizer, vg.Optimizer)
assert_type(metrics, vg.Metrics)
step(model, x)  # error
step.init(model, seed=0)  # error
step.init(model, key=0)  # error
vg.train_step(loss, optax.adam(1e-3), packing=True)  # error
over_states = vg.train_step(lambda: jnp.sum(weight.value["a"]), optax.sgd(0.1), weight)
with over_states.init(batch=()) as state_of_states:
    assert_type(over_states(state_of_states)[0], vg.TrainState[None])
axes = vg.plot_grad_norms([{"a": 1.0}])
axes.clear()
vg.plot_grad_norms(3)  # error

# Checkpoints

vg.save("checkpoint", {"model": model, "state": state})
assert_type(vg.load("checkpoint", model, rename={"a": "b"}), eqx.nn.MLP)
vg.load("checkpoint")  # error
