"""Fits resistance and time constant of a passive membrane to noisy recordings, with units.

Steps of current are injected into a model neuron. Its voltage is computed by exponential
Euler, whose linear part is the derivative of dV/dt, in 1/ms, by `vector_grad`. The fit is by
adam, on pure numbers, inside of `unitful`. It is the same fit with parameters in GΩ and s.
"""

import argparse
from pathlib import Path

import brainunit as u
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
import tqdm
import vgrad_eqx as vg


matplotlib.use("agg")
import matplotlib.pyplot as plt


TRUTH = {"resistance": 120.0 * u.Mohm, "tau": 18.0 * u.ms}
START = {"resistance": jnp.array(60.0) * u.Mohm, "tau": jnp.array(40.0) * u.ms}
SCALE = {"resistance": 100.0 * u.Mohm, "tau": 20.0 * u.ms}
REST = -70.0 * u.mvolt
NOISE = 0.5 * u.mvolt
STEP = 0.5 * u.ms
TIMES = jnp.arange(0.0, 150.0, 0.5) * u.ms
AMPLITUDES = jnp.array([-0.1, 0.05, 0.1]) * u.nA
LARGEST_ERROR = 0.03


def inject(time):
    """The current of each recording at some time."""
    is_on = (time > 20 * u.ms) & (time < 100 * u.ms)
    return jnp.where(is_on, 1.0, 0.0) * AMPLITUDES


def simulate(params):
    """The voltage of each recording at all times."""

    def derivative(voltage, current):
        return (REST - voltage + params["resistance"] * current) / params["tau"]

    linearize = vg.vector_grad(derivative, argnums=0, return_value=True, unit_aware=True)

    def step(voltage, time):
        slope, change = linearize(voltage, inject(time))  # in 1/ms and mV/ms
        new = voltage + STEP * u.math.exprel(STEP * slope) * change
        return new.in_unit(u.mvolt), voltage

    start = jnp.ones(AMPLITUDES.shape) * REST
    _, voltages = jax.lax.scan(step, start, TIMES)
    return voltages


def record(key):
    voltages = simulate(TRUTH)
    return voltages + jr.normal(key, voltages.shape) * NOISE


def fit(params, recorded, steps):
    """Fits the parameters. Returns them, and the root of the mean error at each step."""
    tx = vg.unitful(optax.adam(0.05), loss_unit=u.mvolt**2, scale=SCALE)

    def loss(params):
        return u.math.mean((simulate(params) - recorded) ** 2)

    gradient = vg.vector_grad(loss, grad_states="**", return_value=True, unit_aware=True)

    @jax.jit
    def step(params, opt_state):
        grads, value = gradient(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return vg.apply_updates(params, updates), opt_state, u.math.sqrt(value)

    opt_state = tx.init(params)
    errors = []
    for _ in tqdm.trange(steps, desc=f"fitting in {params['resistance'].unit}"):
        params, opt_state, error = step(params, opt_state)
        errors.append(float(error / u.mvolt))
    return params, errors


def plot(out, params, recorded, errors):
    figure, (top, bottom) = plt.subplots(2, figsize=(8, 6), constrained_layout=True)
    times = np.asarray(TIMES / u.ms)
    fitted = np.asarray(simulate(params) / u.mvolt)
    for i, trace in enumerate(np.asarray(recorded / u.mvolt).T):
        top.plot(times, trace, color=f"C{i}", alpha=0.4, lw=0.8)
        top.plot(times, fitted[:, i], color=f"C{i}", label=f"{AMPLITUDES[i]}")
    title = "Recordings (thin) and fit (thick), with a step of current from 20 to 100 ms"
    top.set(xlabel="time (ms)", ylabel="membrane potential (mV)", title=title)
    top.legend(title="current")
    bottom.semilogy(errors)
    bottom.axhline(
        float(NOISE / u.mvolt), color="gray", ls=":", label="standard deviation of the noise"
    )
    bottom.set(xlabel="step of the fit", ylabel="root mean square error (mV)")
    bottom.legend()
    figure.savefig(out)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="number of steps of the fit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--out", type=Path, default=Path("membrane.png"), help="the plot")
    args = parser.parse_args()

    recorded = record(jr.key(args.seed))
    params, errors = fit(START, recorded, args.steps)
    rewritten = {
        "resistance": START["resistance"].in_unit(u.Gohm),
        "tau": START["tau"].in_unit(u.second),
    }
    others, _ = fit(rewritten, recorded, args.steps)
    plot(args.out, params, recorded, errors)

    print(f"{'':12}{'truth':>14}{'estimate':>18}{'written otherwise':>24}")
    for name, truth in TRUTH.items():
        print(f"{name:12}{truth!s:>14}{params[name]!s:>18}{others[name]!s:>24}")
    print(f"plot: {args.out}")
    for name, truth in TRUTH.items():
        if not np.isclose(float(others[name] / params[name]), 1, rtol=1e-3):
            raise SystemExit(f"The fit of the {name} depends on the unit it is written in.")
        if abs(float(params[name] / truth) - 1) > LARGEST_ERROR:
            raise SystemExit(f"The {name} is off by more than {LARGEST_ERROR:.0%}.")


if __name__ == "__main__":
    main()
