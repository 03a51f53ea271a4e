"""Trains an Equinox classifier of handwritten digits, with some of its leaves at a time.

The 1 797 images of 8 x 8 pixels come with scikit-learn. The output that is differentiated
is the vector of losses, one for each image: its vector gradient is the gradient of their
sum. Half-way the first layer is frozen, by a narrower selector.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
import tqdm
import vgrad_eqx as vg


matplotlib.use("agg")
import matplotlib.pyplot as plt


BATCH_SIZE = 128
LOWEST_ACCURACY = 0.96


def load_data(seed):
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8)
    return sklearn.model_selection.train_test_split(
        images, labels, test_size=0.2, random_state=seed, stratify=labels
    )


def make_model(key):
    keys = jr.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(256, 10, key=keys[2]),
        ]
    )


def losses(model, images, labels):
    """The cross-entropy of each image."""
    logits = jax.vmap(model)(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@eqx.filter_jit
def accuracy(model, images, labels):
    return jnp.mean(jnp.argmax(jax.vmap(model)(images), axis=1) == labels)


def make_step(selector):
    """A training step for the leaves that `selector` chooses."""

    @eqx.filter_jit
    def step(model, opt, images, labels):
        transform = vg.vector_grad(losses, grad_states=selector, return_value=True)
        var_grads, values = transform(model, images, labels)
        model, opt = opt.step(model, var_grads)
        return model, opt, jnp.mean(values), vg.grad_norms(var_grads)

    return step


def train(model, data, steps, seed):
    train_images, test_images, train_labels, test_labels = data
    tx = optax.adamw(
        optax.cosine_decay_schedule(5e-3, steps),
        weight_decay=1e-2,
        mask=lambda params: {path: path.endswith("weight") for path in params},
    )
    opt = vg.Optimizer(tx, model)
    step = make_step(vg.path("**"))
    rng = np.random.default_rng(seed)
    history = {
        "loss": [],
        "accuracy": [],
        "norms": {path: {} for path in vg.states(model)},
    }
    with tqdm.trange(steps, desc="training") as progress:
        for i in progress:
            if i == steps // 2:
                selector = ~vg.path("layers.0")
                opt = opt.reselect(model, selector)  # keeps the moments of the others
                step = make_step(selector)
            batch = rng.choice(len(train_images), BATCH_SIZE, replace=False)
            model, opt, loss, norms = step(model, opt, train_images[batch], train_labels[batch])
            history["loss"].append(float(loss))
            for path, norm in norms.items():
                history["norms"][path][i] = float(norm)
            if i % 10 == 0 or i == steps - 1:
                correct = float(accuracy(model, test_images, test_labels))
                history["accuracy"].append((i, correct))
                progress.set_postfix(
                    loss=f"{loss:.3f}", accuracy=f"{correct:.1%}", refresh=False
                )
    return model, history


def plot(history, frozen_at, out):
    _, axes = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    axes[0].semilogy(history["loss"], lw=0.8)
    axes[0].set_ylabel("mean loss of a batch")
    axes[1].plot(*zip(*history["accuracy"], strict=True))
    axes[1].axhline(LOWEST_ACCURACY, color="gray", ls=":", label="must be reached")
    axes[1].set_ylabel("test accuracy")
    for path, norms in history["norms"].items():
        axes[2].semilogy(list(norms), list(norms.values()), lw=0.8, label=path)
    axes[2].set_ylabel("norm of the gradient")
    axes[2].set_xlabel("step")
    for axis in axes:
        axis.axvline(frozen_at, color="black", lw=0.8, ls="--")
    axes[0].set_title("Digits: the first layer is frozen at the dashed line")
    axes[1].legend(loc="lower right")
    axes[2].legend(ncols=2, fontsize="small", loc="upper right")
    plt.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="number of steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of model, split, batches")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the plot")
    args = parser.parse_args()
    model = make_model(jr.key(args.seed))
    print("What is trained after half of the steps:")
    print(vg.summary(model, ~vg.path("layers.0")))
    data = load_data(args.seed)
    model, history = train(model, data, args.steps, args.seed)
    plot(history, args.steps // 2, args.out)
    reached = float(accuracy(model, data[1], data[3]))
    print(f"test accuracy: {reached:.2%}, plot: {args.out}")
    if reached < LOWEST_ACCURACY:
        raise SystemExit(f"The test accuracy is below {LOWEST_ACCURACY:.0%}.")


if __name__ == "__main__":
    main()
