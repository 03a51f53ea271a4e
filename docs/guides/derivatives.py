"""Fits a decay by SciPy and optimistix, and samples its posterior by blackjax."""

import blackjax
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optimistix as optx
import scipy.optimize
import vgrad_eqx as vg
from jax.flatten_util import ravel_pytree


times = jnp.linspace(0.0, 4.0, 40)
data = 2.0 * jnp.exp(-0.7 * times) + 0.1 * jr.normal(jr.key(0), times.shape)


def residuals(params, t=times, y=data):
    return (params["amplitude"] * jnp.exp(-params["rate"] * t) - y) / 0.1


def loss(params, *example):
    return 0.5 * jnp.sum(residuals(params, *example) ** 2)


# SciPy takes flat vectors: a value, its gradient, and products of the Hessian with a vector.
start, unravel = ravel_pytree({"amplitude": jnp.array(1.0), "rate": jnp.array(0.1)})
value = lambda x: loss(unravel(x))
gradient = lambda x: ravel_pytree(vg.grad(loss, "**")(unravel(x)))[0]
product = lambda x, v: jax.jvp(gradient, (x,), (v,))[1]
func, jac, hessp = map(jax.jit, (value, gradient, product))
fit = scipy.optimize.minimize(func, start, method="trust-ncg", jac=jac, hessp=hessp)
print("SciPy:", [round(float(x), 3) for x in fit.x])

# Optimistix takes the dict as it is.
solver = optx.LevenbergMarquardt(rtol=1e-5, atol=1e-5)
params = optx.least_squares(lambda p, _: residuals(p), solver, unravel(start)).value
print("optimistix:", {name: round(float(x), 3) for name, x in params.items()})

# The gradient of each example, and standard errors from the Hessian, a dict of dicts.
each = jax.vmap(vg.grad(loss, "**"), (None, 0, 0))(params, times, data)
print(f"largest gradient by the rate: at t = {times[jnp.argmax(abs(each['rate']))]:.2f} s")
hessian = vg.hessian(loss, "**")(params)
matrix = jnp.array([list(row.values()) for row in hessian.values()])
errors = jnp.sqrt(jnp.diag(jnp.linalg.inv(matrix)))

# Blackjax samples the posterior: the dict of parameters becomes a dict of samples.
nuts = blackjax.nuts(lambda params: -loss(params), 0.02, jnp.ones(2))
advance = lambda state, key: (nuts.step(key, state)[0],) * 2
_, samples = jax.lax.scan(advance, nuts.init(params), jr.split(jr.key(1), 2000))
for (name, x), error in zip(samples.position.items(), errors, strict=True):
    print(f"{name}: ± {error:.3f} by the Hessian, {x.std():.3f} by sampling")
plt.scatter(*samples.position.values(), s=2, alpha=0.3, label="samples")
plt.errorbar(*params.values(), *errors[::-1], fmt="ro", label="standard errors")
plt.gca().set(xlabel="amplitude (V)", ylabel="rate (1/s)")
plt.legend()
plt.savefig("derivatives.png")
