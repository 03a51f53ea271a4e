"""Trains a classifier of handwritten digits, and keeps and saves the best model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import sklearn.datasets
import vgrad_eqx as vg


def make_model(key):
    conv, norm = eqx.nn.Conv2d(1, 16, 3, key=key), eqx.nn.BatchNorm(16, "batch", mode="batch")
    head = [eqx.nn.Dropout(0.3), eqx.nn.Linear(144, 10, key=jr.fold_in(key, 1))]
    relu, ravel, pool = map(eqx.nn.Lambda, (jax.nn.relu, jnp.ravel, eqx.nn.MaxPool2d(2, 2)))
    return eqx.nn.Sequential([conv, norm, relu, pool, ravel, *head])


def loss(model, nn_state, images, labels, key):
    run = lambda image, key: model(image, nn_state, key=key)
    keys = jr.split(key, len(images))
    logits, nn_state = jax.vmap(run, axis_name="batch", out_axes=(0, None))(images, keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), nn_state


@vg.jit
def make_step(model, nn_state, opt, *batch):
    gradient = vg.grad(loss, "**", has_aux=True, return_value=True)
    grads, value, nn_state = gradient(model, nn_state, *batch)
    return *opt.step(model, grads), nn_state, value


@vg.jit
def evaluate(model, nn_state, images, labels):
    run = lambda image: eqx.nn.inference_mode(model)(image, nn_state)[0]
    return jnp.mean(jnp.argmax(jax.vmap(run)(images), axis=1) == labels)


images, labels = sklearn.datasets.load_digits(return_X_y=True)
images, rng = np.float32(images / 16).reshape(-1, 1, 8, 8), np.random.default_rng(0)
train, test = np.split(rng.permutation(len(images)), [1400])
decayed = lambda params: {p: p.endswith("weight") and x.ndim > 1 for p, x in params.items()}
adamw = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 280), mask=decayed)
model, nn_state = eqx.nn.make_with_state(make_model)(jr.key(0))
opt = vg.Optimizer(optax.chain(optax.clip_by_global_norm(1.0), adamw), model)
accuracies, best = [], (0.0,)
for i in range(280):
    rows, key = rng.choice(train, 100), jr.fold_in(jr.key(1), i)
    batch = images[rows], labels[rows], key
    model, opt, nn_state, value = make_step(model, nn_state, opt, *batch)
    if i % 14 == 13:
        accuracies.append(float(evaluate(model, nn_state, images[test], labels[test])))
        best = max(best, (accuracies[-1], model, nn_state), key=lambda each: each[0])
vg.save("digits.safetensors", best[1:])
print(f"best accuracy: {best[0]:.1%}, after {14 * (accuracies.index(best[0]) + 1)} steps")
plt.plot(range(14, 281, 14), accuracies)
plt.gca().set(xlabel="step", ylabel="accuracy on the test set")
plt.savefig("training.png")
