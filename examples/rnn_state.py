"""Trains a recurrent network to foresee the potential of a neuron, with its memory in a state.

The recording comes with matplotlib, as `membrane.dat`: the membrane potential of a neuron that
fires under a constant current. The network sees the potential as it comes in, and says by how
much it will have changed five milliseconds later. It is trained on one window after the
other, and starts each with what it remembers of the one before: its memory is a state.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.cbook
import numpy as np
import optax
import tqdm
import vgrad_eqx as vg


matplotlib.use("agg")
import matplotlib.pyplot as plt


HORIZON = 5  # ms, which are samples, too
WINDOW = 100
HIGHEST_ERROR = 0.5  # relative to the forecast that nothing changes


def load_potential():
    """The potential in mV at each ms, while the current is constant."""
    with matplotlib.cbook.get_sample_data("membrane.dat") as file:
        samples = np.frombuffer(file.read(), np.float32)  # one each 0.5 ms, of 100 mV
    return 100 * samples[1000:7000:2]


class Forecaster(eqx.Module):
    """A recurrent network whose weights and whose memory are states."""

    cell: vg.State
    readout: vg.State
    memory: vg.State

    def __init__(self, key, width=32):
        cell_key, readout_key = jr.split(key)
        self.cell = vg.State(eqx.nn.GRUCell(1, width, key=cell_key))
        self.readout = vg.State(eqx.nn.Linear(width, "scalar", key=readout_key))
        self.memory = vg.State(jnp.zeros(width))

    def forget(self):
        self.memory.value = jnp.zeros_like(self.memory.value)

    def __call__(self, x):
        self.memory.value = self.cell.value(x[None], self.memory.value)
        return self.readout.value(self.memory.value)


def forecast(net, series):
    """The potential that the network foresees at each time."""
    _, changes = jax.lax.scan(lambda _, x: (None, net(x)), None, series)
    return series + changes


def errors(net, series):
    return jnp.square(forecast(net, series[:-HORIZON]) - series[HORIZON:])


def train(net, series, num_epochs):
    """Trains the weights. Returns the mean error of each epoch."""
    weights = vg.states(net, vg.path("cell", "readout"))
    schedule = optax.cosine_decay_schedule(1e-2, num_epochs * (len(series) // WINDOW))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = tx.init({path: state.value for path, state in weights.items()})

    @jax.jit
    def step(opt_state, window):
        func = lambda window: errors(net, window)
        grads, values = vg.vector_grad(func, weights, return_value=True)(window)
        updates, opt_state = tx.update(grads, opt_state)
        for path, state in weights.items():
            state.value = optax.apply_updates(state.value, updates[path])
        return opt_state, jnp.mean(values)

    means = []
    for _ in tqdm.trange(num_epochs, desc="training"):
        net.forget()
        means.append([])
        for start in range(0, len(series) - WINDOW - HORIZON + 1, WINDOW):
            window = series[start : start + WINDOW + HORIZON]
            opt_state, mean = step(opt_state, window)
            means[-1].append(mean)
    return np.array(means).mean(axis=1)


def plot(out, errors, potential, foreseen, start):
    """All in ms and mV."""
    figure, (top, bottom) = plt.subplots(2, figsize=(8, 6), constrained_layout=True)
    top.semilogy(errors)
    top.set(xlabel="epoch", ylabel="root mean square error (mV)", title="Training")
    times = np.arange(len(potential))
    bottom.plot(times, potential, label="recorded")
    bottom.plot(times[HORIZON:], foreseen[:-HORIZON], label="foreseen", linewidth=1)
    bottom.set(
        xlim=(start, start + 300),
        xlabel="time (ms)",
        ylabel="membrane potential (mV)",
        title=f"Not seen in training: the forecast, made {HORIZON} ms before",
    )
    bottom.legend(loc="lower right")
    figure.savefig(out)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150, help="passes through the recording")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--out", type=Path, default=Path("rnn_state.png"), help="the plot")
    args = parser.parse_args()

    potential = load_potential()
    mean, deviation = potential.mean(), potential.std()
    series = (potential - mean) / deviation
    split = len(series) * 3 // 5
    net = Forecaster(jr.key(args.seed))
    means = train(net, series[:split], args.epochs)

    net.forget()
    foreseen = np.asarray(jax.jit(lambda series: forecast(net, series))(series))
    unchanged = np.square(series[split:-HORIZON] - series[split + HORIZON :]).mean()
    error = np.square(foreseen[split:-HORIZON] - series[split + HORIZON :]).mean()
    plot(args.out, deviation * means**0.5, potential, mean + deviation * foreseen, split)
    relative = np.sqrt(error / unchanged)
    print(f"error on new data, relative to a forecast of no change: {relative:.3f}")
    print(f"plot: {args.out}")
    if relative > HIGHEST_ERROR:
        raise SystemExit(f"The relative error is above {HIGHEST_ERROR}.")


if __name__ == "__main__":
    main()
