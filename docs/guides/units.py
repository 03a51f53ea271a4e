"""Fits the activation curve of an ion channel, with units and standard errors."""

import brainunit as u
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import optax
import vgrad_eqx as vg


TRUTH = {"g_max": 20.0 * u.nS, "half": -25.0 * u.mV, "slope": 6.0 * u.mV}
NOISE = 0.4 * u.nS


def conductance(params, voltage):
    return params["g_max"] / (1 + u.math.exp((params["half"] - voltage) / params["slope"]))


def residuals(params, voltage, measured):
    return (conductance(params, voltage) - measured) / NOISE


def loss(params, *data):
    return jnp.sum(residuals(params, *data) ** 2)


@vg.jit
def make_step(params, opt, *data):
    gradient = vg.grad(loss, "**", return_value=True, unit_aware=True)
    grads, value = gradient(params, *data)
    return *opt.step(params, grads), value


voltage = jnp.linspace(-70.0, 20.0, 31) * u.mV
measured = conductance(TRUTH, voltage) + jr.normal(jr.key(0), (31,)) * NOISE
start = {"g_max": 10.0 * u.nS, "half": 0.0 * u.mV, "slope": 0.01 * u.volt}
params = {name: jnp.array(1.0) * value for name, value in start.items()}
scale = {"g_max": 10.0 * u.nS, "{half,slope}": 10.0 * u.mV}
opt, losses = vg.Optimizer(vg.unitful(optax.adam(0.05), scale=scale), params), []
for _ in range(400):
    params, opt, value = make_step(params, opt, voltage, measured)
    losses.append(value)

# The covariance of the estimates is the inverse of JᵀJ. Without `unit_aware`, the Jacobian is
# that of numbers by numbers, so each error is in the unit of its parameter.
jacobian = vg.jacfwd(residuals, "**")(params, voltage, measured)
J = jnp.stack(list(jacobian.values()), axis=1)
errors = jnp.sqrt(jnp.diag(jnp.linalg.inv(J.T @ J)))
for name, error in zip(jacobian, errors, strict=True):
    number, unit = u.split_mantissa_unit(params[name])
    print(f"{name:6}{number:9.3g} ± {error:7.2g} {unit!s:4} truth: {TRUTH[name]}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
mV, nS = lambda x: x.to_decimal(u.mV), lambda x: x.to_decimal(u.nS)
left.errorbar(mV(voltage), nS(measured), nS(NOISE), fmt="o", ms=3)
left.plot(mV(voltage), nS(conductance(params, voltage)))
left.set(xlabel="membrane potential (mV)", ylabel="conductance (nS)", title="data and fit")
right.semilogy(jnp.stack(losses))
right.set(xlabel="step", ylabel="χ², the sum of squared residuals")
plt.savefig("units.png")
