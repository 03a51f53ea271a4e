import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import vgrad_eqx as vg


def errors(model, x, y):
    return jnp.square(jax.vmap(model)(x)[:, 0] - y)  # one for each example


@vg.jit
def make_step(model, opt, x, y):
    var_grads, value = vg.vector_grad(errors, weights, return_value=True)(model, x, y)
    return *opt.step(model, var_grads), value


x = jax.random.normal(jax.random.key(0), (64, 2))
y = jnp.sin(x[:, 0]) * x[:, 1]
model = eqx.nn.MLP(2, 1, 32, 2, key=jax.random.key(1))
weights = "layers.*.weight"
opt = vg.Optimizer(optax.adam(1e-2), model, weights)
for _ in range(500):
    model, opt, value = make_step(model, opt, x, y)
print(f"mean squared error: {value.mean():.1e}")
