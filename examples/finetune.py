"""Teaches a classifier of eight digits the other two, by training some leaves at a time.

A convolutional network learns the digits 0 to 7 of the images that come with scikit-learn. It
then gets a new head for all ten: first the head is trained alone, with a frozen body, and
then both, the body with a smaller rate in a group of its own. Half-way through that, the
training is saved, and a new process resumes it: it must end with the same numbers.
"""

import argparse
import subprocess
import sys
import tempfile
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


BATCH_SIZE = 64
LOWEST_ACCURACY = 0.96
HEAD = "layers.8"
GROUPS = {HEAD: optax.adam(3e-3), ~vg.path(HEAD): optax.adam(1e-3)}


def load_data(seed):
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 1, 8, 8)
    return sklearn.model_selection.train_test_split(
        images, labels, test_size=0.25, random_state=seed, stratify=labels
    )


def make_model(num_classes, key):
    keys = jr.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 16, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(16, 32, 3, padding=1, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Dropout(0.2),
            eqx.nn.Linear(128, num_classes, key=keys[2]),
        ]
    )


def loss(model, images, labels, key):
    keys = jr.split(key, len(images))
    logits = jax.vmap(lambda image, key: model(image, key=key))(images, keys)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@eqx.filter_jit
def predict(model, images):
    return jnp.argmax(jax.vmap(eqx.nn.inference_mode(model))(images), axis=1)


class Trainer:
    """Takes steps, and keeps the history of all phases."""

    def __init__(self, data, seed):
        self.train_images, self.test_images, self.train_labels, self.test_labels = data
        self.seed = seed
        self.losses, self.norms, self.accuracies, self.starts = [], [], [], {}

    def accuracy(self, model, labels=range(10)):
        chosen = np.isin(self.test_labels, labels)
        correct = predict(model, self.test_images[chosen]) == self.test_labels[chosen]
        return float(correct.mean())

    def train(self, step, state, stop, phase, labels=range(10)):
        """Trains until `stop` steps. The batch of a step depends on its number alone."""
        chosen = np.flatnonzero(np.isin(self.train_labels, labels))
        self.starts.setdefault(phase, len(self.losses))
        with tqdm.trange(state.count, stop, desc=phase) as progress:
            for i in progress:
                rng = np.random.default_rng((self.seed, i))
                batch = rng.choice(chosen, BATCH_SIZE, replace=False)
                state, metrics = step(state, self.train_images[batch], self.train_labels[batch])
                self.losses.append(metrics.value)
                self.norms.append(metrics.grad_norms)
                if i % 20 == 0 or i == stop - 1:
                    accuracy = self.accuracy(state.model)
                    self.accuracies.append((len(self.losses) - 1, accuracy))
                    progress.set_postfix(
                        loss=f"{float(metrics.value):.3f}",
                        accuracy=f"{accuracy:.1%}",
                        refresh=False,
                    )
        return state


def make_last_step():
    return vg.train_step(loss, GROUPS, grad_norms=True)


def fit(trainer, steps, checkpoint):
    """All three phases. Saves half-way through the last one."""
    seed = trainer.seed
    model = make_model(8, jr.key(seed))
    tx = optax.adam(3e-3)
    step = vg.train_step(loss, tx, grad_norms=True)
    state = step.init(model, key=jr.key(seed + 1))
    state = trainer.train(step, state, steps, "eight digits", range(8))
    print(f"accuracy on the eight digits: {trainer.accuracy(state.model, range(8)):.2%}")

    head = make_model(10, jr.key(seed + 2)).layers[-1]
    model = eqx.tree_at(lambda model: model.layers[-1], state.model, head)
    print(vg.summary(model, HEAD))
    step = vg.train_step(loss, tx, HEAD, grad_norms=True)
    # The new head has other shapes, so its moments start at zero.
    opt = state.optimizer.reselect(model, HEAD)
    state = step.init(model, key=state.key, optimizer=opt)
    state = trainer.train(step, state, state.count + steps // 2, "the head")

    opt = state.optimizer.reselect(state.model, tx=GROUPS)
    step = make_last_step()
    state = step.init(state.model, key=state.key, optimizer=opt)
    stop = state.count + steps
    state = trainer.train(step, state, stop - steps // 2, "head and body")
    vg.save(checkpoint, state)
    return trainer.train(step, state, stop, "head and body").model


def resume(trainer, steps, checkpoint):
    """The end of the last phase, in a process that has nothing but the checkpoint."""
    step = make_last_step()
    like = step.init(make_model(10, jr.key(0)), key=jr.key(0))
    state = vg.load(checkpoint, like)
    stop = state.count + steps - (steps - steps // 2)
    model = trainer.train(step, state, stop, "resumed").model
    vg.save(checkpoint, model)


def resume_in_new_process(args, checkpoint):
    options = ["--steps", str(args.steps), "--seed", str(args.seed)]
    command = [sys.executable, __file__, *options, "--resume", str(checkpoint)]
    subprocess.run(command, check=True)
    return vg.load(checkpoint, make_model(10, jr.key(0)))


def plot(trainer, out):
    figure, axes = plt.subplots(3, 1, figsize=(9, 10), sharex=True, layout="constrained")
    axes[0].semilogy(np.array(trainer.losses), lw=0.8)
    axes[0].set_ylabel("mean loss of a batch")
    axes[0].set_title("A classifier of eight digits learns ten")
    axes[1].plot(*zip(*trainer.accuracies, strict=True))
    axes[1].axhline(LOWEST_ACCURACY, color="gray", ls=":", label="must be reached")
    axes[1].set_ylabel("test accuracy, ten digits")
    axes[1].legend(loc="center right")
    vg.plot_grad_norms(trainer.norms, ax=axes[2])
    for phase, start in trainer.starts.items():
        for axis in axes[:2]:
            axis.axvline(start, color="black", lw=0.8, ls="--")
        axes[1].annotate(f" {phase}", (start, 0.02), xycoords=("data", "axes fraction"))
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240, help="number of steps of a phase")
    parser.add_argument("--seed", type=int, default=0, help="seed of model, split, batches")
    parser.add_argument("--out", type=Path, default=Path("finetune.png"), help="the plot")
    parser.add_argument("--resume", type=Path, help="only resume from this checkpoint")
    args = parser.parse_args()
    trainer = Trainer(load_data(args.seed), args.seed)
    if args.resume:
        resume(trainer, args.steps, args.resume)
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        model = fit(trainer, args.steps, checkpoint)
        resumed = resume_in_new_process(args, checkpoint)
    plot(trainer, args.out)
    same = bool(eqx.tree_equal(model, resumed))
    reached = trainer.accuracy(model)
    print(f"test accuracy: {reached:.2%}, plot: {args.out}")
    print(f"resumed in a new process: {'the same numbers' if same else 'OTHER numbers'}")
    if reached < LOWEST_ACCURACY:
        raise SystemExit(f"The test accuracy is below {LOWEST_ACCURACY:.0%}.")
    if not same:
        raise SystemExit("The resumed training has ended with other numbers.")


if __name__ == "__main__":
    main()
