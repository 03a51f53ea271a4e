"""Adapts the network of another program to digits upside down, by low-rank adapters (LoRA)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
import safetensors.numpy
import sklearn.datasets
import sklearn.neural_network
import vgrad_eqx as vg


images, labels = sklearn.datasets.load_digits(return_X_y=True)
images = np.float32(images / 16)
flipped = images.reshape(-1, 8, 8)[:, ::-1].reshape(-1, 64)
# What the other program has written: names and layout of a `torch.nn.Sequential`.
net = sklearn.neural_network.MLPClassifier(64, max_iter=60, tol=0.01, random_state=0)
net.fit(images[:1400], labels[:1400])
tensors = {f"net.{2 * i}.bias": np.float32(b) for i, b in enumerate(net.intercepts_)}
tensors |= {f"net.{2 * i}.weight": np.float32(w).T.copy() for i, w in enumerate(net.coefs_)}
safetensors.numpy.save_file(tensors, "pretrained.safetensors")
# A model of shapes alone, into which the file is loaded by names.
shapes = eqx.filter_eval_shape(eqx.nn.MLP, 64, 10, 64, 1, key=jr.key(0))
rename = lambda path: path.replace("layers.1", "net.2").replace("layers.0", "net.0")
pretrained = vg.load("pretrained.safetensors", shapes, rename=rename)


class Adapted(eqx.Module):
    linear: eqx.nn.Linear
    down: jax.Array
    up: jax.Array

    def __call__(self, x):
        return self.linear(x) + self.up @ (self.down @ x)


def loss(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


first, last = pretrained.layers
downs, ups = 0.1 * jr.normal(jr.key(1), (2, 4, 64)), (jnp.zeros((64, 4)), jnp.zeros((10, 4)))
layers = Adapted(first, downs[0], ups[0]), Adapted(last, downs[1], ups[1])
model = eqx.tree_at(lambda mlp: mlp.layers, pretrained, layers)
print(vg.summary(model, "layers.*.{down,up}"))
step = vg.train_step(loss, optax.adam(1e-2), "layers.*.{down,up}")
state, losses = step.init(model), []
for rows in np.random.default_rng(0).choice(1400, (400, 64)):
    state, metrics = step(state, flipped[rows], labels[rows])
    losses.append(metrics.value)
vg.save("adapters.safetensors", vg.states(state.model, "layers.*.{down,up}"))
for text, net in {"pretrained": pretrained, "with adapters": state.model}.items():
    correct = jnp.argmax(jax.vmap(net)(flipped[1400:]), axis=1) == labels[1400:]
    print(f"{text}: {correct.mean():.1%} of the digits upside down")
plt.semilogy(jnp.stack(losses))
plt.gca().set(xlabel="step", ylabel="cross-entropy of a batch")
plt.savefig("leaves.png")
