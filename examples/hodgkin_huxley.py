"""Simulates the neuron of Hodgkin and Huxley with units, by exponential Euler.

Each of the four equations is linearized in its own variable by `vector_grad`, which returns the
derivative, in 1/ms, along with the right side. The voltage is compared with that of the
same equations without units, which SciPy solves to ten digits.

The equations and constants are those of Hodgkin and Huxley, J. Physiol. 117 (1952), with the
voltage counted as it is today.
"""

import argparse
from pathlib import Path

import brainunit as u
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.integrate
import tqdm
import vgrad_eqx as vg


matplotlib.use("agg")
import matplotlib.pyplot as plt


CAPACITANCE = 1.0 * u.ufarad / u.cm**2
CONDUCTANCES = {
    name: g * u.msiemens / u.cm**2 for name, g in {"Na": 120.0, "K": 36.0, "L": 0.3}.items()
}
REVERSALS = {name: e * u.mvolt for name, e in {"Na": 50.0, "K": -77.0, "L": -54.387}.items()}
CURRENT = 10.0 * u.uA / u.cm**2
START = {"V": -65.0 * u.mvolt, "m": 0.05, "h": 0.6, "n": 0.32}
CHUNKS = 20
# Steps of first order shift each action potential: those of 1 µs by 0.01 ms and less.
LARGEST_SHIFT = 0.05 * u.ms
LARGEST_DEVIATION = 1.0 * u.mvolt


def rates(voltage):
    """The rates, in 1/ms, at which each gate opens and closes."""
    v = voltage / u.mvolt
    opening = {
        "m": 1.0 / u.math.exprel(-(v + 40) / 10),
        "h": 0.07 * jnp.exp(-(v + 65) / 20),
        "n": 0.1 / u.math.exprel(-(v + 55) / 10),
    }
    closing = {
        "m": 4.0 * jnp.exp(-(v + 65) / 18),
        "h": 1.0 / (1 + jnp.exp(-(v + 35) / 10)),
        "n": 0.125 * jnp.exp(-(v + 65) / 80),
    }
    return [{gate: rate / u.ms for gate, rate in each.items()} for each in (opening, closing)]


def change_of_voltage(voltage, m, h, n):
    """In mV/ms."""
    open_share = {"Na": m**3 * h, "K": n**4, "L": 1.0}
    current = CURRENT
    for name, share in open_share.items():
        current = current + CONDUCTANCES[name] * share * (REVERSALS[name] - voltage)
    return (current / CAPACITANCE).in_unit(u.mvolt / u.ms)


def change_of_gate(gate, opening, closing):
    """In 1/ms."""
    return opening * (1 - gate) - closing * gate


def advance(func, value, dt, *args):
    """One step of exponential Euler, exact for a `func` that is linear in `value`."""
    linearize = vg.vector_grad(func, argnums=0, return_value=True, unit_aware=True)
    slope, change = linearize(value, *args)
    return value + dt * u.math.exprel(dt * slope) * change


def simulate(duration, dt):
    """The time and the voltage at each step."""

    def step(state, _):
        voltage, gates = state["V"], {gate: state[gate] for gate in "mhn"}
        opening, closing = rates(voltage)
        new = {
            gate: advance(change_of_gate, value, dt, opening[gate], closing[gate])
            for gate, value in gates.items()
        }
        new["V"] = advance(change_of_voltage, voltage, dt, *gates.values()).in_unit(u.mvolt)
        return new, voltage

    num_steps = round(float(duration / dt))
    run = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps // CHUNKS))
    state = {name: jnp.asarray(1.0) * value for name, value in START.items()}
    voltages = []
    for _ in tqdm.trange(CHUNKS, desc="simulating"):
        state, chunk = run(state)
        voltages.append(np.asarray(chunk / u.mvolt))
    voltage = np.concatenate(voltages)
    return np.arange(len(voltage)) * float(dt / u.ms), voltage


def solve_without_units(times):
    """The voltage in mV at times in ms, by SciPy, from plain numbers."""

    def right_side(_, state):
        v, m, h, n = state
        a_m = 0.1 * (v + 40) / -np.expm1(-(v + 40) / 10)
        a_h, a_n = 0.07 * np.exp(-(v + 65) / 20), 0.01 * (v + 55) / -np.expm1(-(v + 55) / 10)
        b_m, b_h = 4 * np.exp(-(v + 65) / 18), 1 / (1 + np.exp(-(v + 35) / 10))
        b_n = 0.125 * np.exp(-(v + 65) / 80)
        sodium, potassium = 120 * m**3 * h * (50 - v), 36 * n**4 * (-77 - v)
        return [
            10 + sodium + potassium + 0.3 * (-54.387 - v),
            a_m * (1 - m) - b_m * m,
            a_h * (1 - h) - b_h * h,
            a_n * (1 - n) - b_n * n,
        ]

    solution = scipy.integrate.solve_ivp(
        right_side,
        (0, times[-1]),
        [-65.0, 0.05, 0.6, 0.32],
        method="DOP853",
        t_eval=times,
        rtol=1e-10,
        atol=1e-10,
    )
    return solution.y[0]


def find_spikes(times, voltage):
    """When the voltage rises through zero."""
    before = np.flatnonzero((voltage[:-1] < 0) & (voltage[1:] >= 0))
    share = -voltage[before] / (voltage[before + 1] - voltage[before])
    return times[before] + share * (times[before + 1] - times[before])


def plot(out, times, voltage, reference, shift):
    figure, (top, bottom) = plt.subplots(
        2, figsize=(8, 6), sharex=True, height_ratios=[3, 1], constrained_layout=True
    )
    top.plot(times, reference, color="lightgray", lw=4, label="SciPy, without units")
    top.plot(times, voltage, lw=1, label="exponential Euler, with units")
    top.set(
        ylabel="membrane potential (mV)", title="Hodgkin and Huxley, 10 µA/cm²", ylim=(-80, 65)
    )
    top.legend(loc="upper right", ncols=2)
    bottom.plot(times, voltage - reference, lw=0.8)
    bottom.set(xlabel="time (ms)", ylabel="difference (mV)")
    title = f"grows: each action potential is shifted in time, the last by {shift:.3f} ms"
    bottom.set_title(f"The difference {title}", fontsize="medium")
    figure.savefig(out)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=60.0, help="in ms")
    parser.add_argument("--step", type=float, default=0.001, help="in ms")
    parser.add_argument("--out", type=Path, default=Path("hodgkin_huxley.png"), help="the plot")
    args = parser.parse_args()

    times, voltage = simulate(args.duration * u.ms, args.step * u.ms)
    reference = solve_without_units(times)
    spikes, expected = find_spikes(times, voltage), find_spikes(times, reference)
    print(f"action potentials at {np.array2string(spikes, precision=2)} ms, plot: {args.out}")
    if len(spikes) != len(expected):
        raise SystemExit(
            f"There are {len(spikes)} action potentials instead of {len(expected)}."
        )
    shift = np.abs(spikes - expected).max() * u.ms
    deviation = np.sqrt(np.mean((voltage - reference) ** 2)) * u.mvolt
    plot(args.out, times, voltage, reference, float(shift / u.ms))
    print(f"largest shift of one: {shift:.4f}, root mean square difference: {deviation:.4f}")
    if shift > LARGEST_SHIFT or deviation > LARGEST_DEVIATION:
        raise SystemExit(f"That is more than {LARGEST_SHIFT} or {LARGEST_DEVIATION}.")


if __name__ == "__main__":
    main()
