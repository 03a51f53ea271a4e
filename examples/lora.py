"""Loads the weights of another program, and fine-tunes them by low-rank adapters (LoRA).

A classifier of handwritten digits was trained elsewhere. Its weights are in a safetensors file
under the names and in the layout of PyTorch. They are loaded into a model of Equinox by a table
of names, and the outputs are compared with a forward pass in NumPy. Then the digits are turned
upside down. Only adapters of a low rank learn them, and only these and their optimizer are
saved, half-way. A new process reads both files, goes on, and must end with the same numbers.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
import safetensors.numpy
import sklearn.datasets
import sklearn.exceptions
import sklearn.model_selection
import sklearn.neural_network
import tqdm
import vgrad_eqx as vg


matplotlib.use("agg")
import matplotlib.pyplot as plt


WIDTH, RANK, BATCH_SIZE = 128, 8, 64
LOWEST_ACCURACY = 0.95
LARGEST_DIFFERENCE = 1e-4
ADAPTERS = "layers.*.{down,up}"
TX = optax.adam(1e-2)
# The path of each array here, and its name in a file of a `torch.nn.Sequential`.
RENAME = {
    f"layers.{i}.{name}": f"net.{2 * i}.{name}" for i in range(3) for name in ("weight", "bias")
}


def load_data(seed):
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).astype("float32")
    return sklearn.model_selection.train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )


def turn(images):
    """The images upside down."""
    return images.reshape(-1, 8, 8)[:, ::-1].reshape(-1, 64)


def pretrain(path, images, labels, seed):
    """What the other program does. PyTorch keeps a weight as outputs by inputs."""
    net = sklearn.neural_network.MLPClassifier((WIDTH, WIDTH), max_iter=30, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        net.fit(images, labels)
    tensors = {}
    for i, (weight, bias) in enumerate(zip(net.coefs_, net.intercepts_, strict=True)):
        tensors[f"net.{2 * i}.weight"] = np.ascontiguousarray(weight.T, "float32")
        tensors[f"net.{2 * i}.bias"] = bias.astype("float32")
    safetensors.numpy.save_file(tensors, path)


def run_by_hand(path, images):
    """The forward pass of the other program."""
    tensors = safetensors.numpy.load_file(path)
    for i in (0, 2, 4):
        outputs = images @ tensors[f"net.{i}.weight"].T + tensors[f"net.{i}.bias"]
        images = np.maximum(outputs, 0)
    return outputs


class Adapted(eqx.Module):
    """A linear layer whose weight `W` becomes `W + up @ down`, which is `W` at first."""

    linear: eqx.nn.Linear
    down: jax.Array
    up: jax.Array

    def __init__(self, linear, key):
        self.linear = linear
        self.down = jr.normal(key, (RANK, linear.in_features)) / linear.in_features**0.5
        self.up = jnp.zeros((linear.out_features, RANK))

    def __call__(self, x):
        return self.linear(x) + self.up @ (self.down @ x)


def load_pretrained(path):
    """The model with the weights of the file, which needs no numbers before."""
    shapes = eqx.filter_eval_shape(eqx.nn.MLP, 64, 10, WIDTH, 2, key=jr.key(0))
    return vg.load(path, shapes, rename=RENAME)


def adapt(model, key):
    keys = jr.split(key, len(model.layers))
    layers = tuple(map(Adapted, model.layers, keys))
    return eqx.tree_at(lambda model: model.layers, model, layers)


def loss(model, images, labels):
    logits = jax.vmap(model)(images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@eqx.filter_jit
def predict(model, images):
    return jax.vmap(model)(images)


def accuracy(model, images, labels):
    return float(np.mean(np.argmax(predict(model, images), axis=1) == labels))


def train(step, state, stop, data, seed, desc):
    """Trains until `stop` steps. The batch of a step depends on its number alone."""
    images, labels = turn(data[0]), data[2]
    losses = []
    with tqdm.trange(state.count, stop, desc=desc) as progress:
        for i in progress:
            rows = np.random.default_rng((seed, i)).choice(len(images), BATCH_SIZE)
            state, metrics = step(state, images[rows], labels[rows])
            losses.append(metrics.value)
            if i % 20 == 0 or i == stop - 1:
                progress.set_postfix(loss=f"{float(metrics.value):.3f}", refresh=False)
    return state, losses


def save_adapters(path, state):
    tree = {"adapters": vg.states(state.model, ADAPTERS), "optimizer": state.optimizer}
    vg.save(path, tree)


def load_adapters(path, model):
    """The model with the adapters of a file, and their optimizer."""
    optimizer = vg.Optimizer(TX, model, ADAPTERS)
    like = {"adapters": vg.states(model, ADAPTERS), "optimizer": optimizer}
    loaded = vg.load(path, like)
    return vg.replace_states(model, loaded["adapters"]), loaded["optimizer"]


def resume(args, data):
    """The second half, in a process that has nothing but the two files."""
    model = adapt(load_pretrained(args.resume / "pretrained"), jr.key(args.seed + 1))
    model, optimizer = load_adapters(args.resume / "adapters", model)
    step = vg.train_step(loss, TX, ADAPTERS)
    state = step.init(model, optimizer=optimizer)
    state, _ = train(step, state, args.steps, data, args.seed, "resumed")
    save_adapters(args.resume / "adapters", state)


def resume_in_new_process(args, folder):
    options = ["--steps", str(args.steps), "--seed", str(args.seed)]
    command = [sys.executable, __file__, *options, "--resume", str(folder)]
    subprocess.run(command, check=True)


def plot(losses, accuracies, half, out):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axes[0].semilogy(np.array(losses), lw=0.8)
    axes[0].axvline(half, color="black", lw=0.8, ls="--", label="saved")
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("mean loss of a batch, upside down")
    axes[0].legend()
    axes[1].bar(list(accuracies), list(accuracies.values()))
    axes[1].set_ylabel("test accuracy")
    axes[1].set_title(f"Adapters of rank {RANK}")
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="number of steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights, batches")
    parser.add_argument("--out", type=Path, default=Path("lora.png"), help="the plot")
    parser.add_argument("--resume", type=Path, help="only resume from this folder")
    args = parser.parse_args()
    data = load_data(args.seed)
    if args.resume:
        resume(args, data)
        return
    _, images, _, labels = data
    with tempfile.TemporaryDirectory() as folder:
        weights, adapters = Path(folder) / "pretrained", Path(folder) / "adapters"
        pretrain(weights, data[0], data[2], args.seed)
        pretrained = load_pretrained(weights)
        difference = np.max(np.abs(predict(pretrained, images) - run_by_hand(weights, images)))
        model = adapt(pretrained, jr.key(args.seed + 1))
        print(vg.summary(model, ADAPTERS))
        step = vg.train_step(loss, TX, ADAPTERS)
        half = args.steps // 2
        state, losses = train(step, step.init(model), half, data, args.seed, "adapters")
        save_adapters(adapters, state)
        sizes = [file.stat().st_size for file in (weights, adapters)]
        state, others = train(step, state, args.steps, data, args.seed, "adapters")
        resume_in_new_process(args, folder)
        resumed, _ = load_adapters(adapters, model)
    same = bool(eqx.tree_equal(resumed, state.model))
    accuracies = {
        "pretrained": accuracy(pretrained, images, labels),
        "upside down": accuracy(pretrained, turn(images), labels),
        "with adapters": accuracy(state.model, turn(images), labels),
    }
    plot(losses + others, accuracies, half, args.out)
    print(f"largest difference to the other program: {difference:.1e}")
    print(f"weights: {sizes[0]:,} bytes, adapters and optimizer: {sizes[1]:,} bytes")
    print(", ".join(f"{name}: {value:.1%}" for name, value in accuracies.items()))
    print(f"resumed in a new process: {'the same numbers' if same else 'OTHER numbers'}")
    print(f"plot: {args.out}")
    if difference > LARGEST_DIFFERENCE:
        raise SystemExit(f"The outputs differ by more than {LARGEST_DIFFERENCE}.")
    if not same:
        raise SystemExit("The resumed training has ended with other numbers.")
    if accuracies["with adapters"] < LOWEST_ACCURACY:
        raise SystemExit(f"The test accuracy is below {LOWEST_ACCURACY:.0%}.")


if __name__ == "__main__":
    main()
