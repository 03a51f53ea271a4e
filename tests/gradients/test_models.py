"""Models that people have, each against Equinox's own gradient."""

from typing import Any

import equinox as eqx
import flax.linen as linen
import flax.nnx as nnx
import jax
import jax.experimental.sparse as sparse
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose


KEY = jr.key(0)
BATCH = jr.normal(jr.key(1), (4, 3))
IMAGE = jr.normal(jr.key(2), (1, 6, 6))


class Fields(eqx.Module):
    """Leaves of every kind, of which only `weight` and `numpy` can be trained."""

    weight: jax.Array
    numpy: np.ndarray
    steps: jax.Array
    mask: jax.Array
    key: jax.Array
    scale: float
    name: str

    def __call__(self, x):
        noise = jr.normal(self.key, x.shape)
        return jnp.where(self.mask, self.weight * x * self.scale, noise) + self.numpy


def make_fields():
    return Fields(
        weight=jnp.ones(3),
        numpy=np.ones(3, np.float32),
        steps=jnp.arange(3),
        mask=jnp.array([True, False, True]),
        key=jr.key(3),
        scale=0.5,
        name="fields",
    )


class Recurrent(eqx.Module):
    cell: eqx.nn.LSTMCell

    def __call__(self, xs):
        def body(carry, x):
            return self.cell(x, carry), None

        (hidden, _), _ = jax.lax.scan(body, (jnp.zeros(5), jnp.zeros(5)), xs)
        return hidden


class Positive(eqx.Module):
    weight: jax.Array

    def __check_init__(self):
        if not isinstance(self.weight, jax.Array):
            raise TypeError("half-empty")

    def __call__(self, x):
        return self.weight * x


class Sparse(eqx.Module):
    matrix: sparse.BCOO

    def __call__(self, x):
        return self.matrix @ x


def make_shared():
    embedding = eqx.nn.Embedding(3, 4, key=KEY)
    linear = eqx.nn.Linear(4, 3, use_bias=False, key=KEY)
    return eqx.nn.Shared(
        (embedding, linear), lambda pair: pair[1].weight, lambda pair: pair[0].weight
    )


def call_shared(shared, x):
    embedding, linear = shared()
    return linear(embedding(0) * x)


def call_attention(attention, x):
    return attention(x, x, x)


# Made by the tests, since every process imports this file.
MODELS = {
    "MLP": lambda: (eqx.nn.MLP(3, 2, 8, 2, key=KEY), lambda model, x: model(x), BATCH[0]),
    "Conv": lambda: (eqx.nn.Conv2d(1, 2, 3, key=KEY), lambda model, x: model(x), IMAGE),
    "Dropout": lambda: (
        eqx.nn.Sequential([eqx.nn.Linear(3, 3, key=KEY), eqx.nn.Dropout(0.5)]),
        lambda model, x: model(x, key=jr.key(7)),
        BATCH[0],
    ),
    "MultiheadAttention": lambda: (
        eqx.nn.MultiheadAttention(1, 3, key=KEY),
        call_attention,
        BATCH,
    ),
    "LSTM": lambda: (
        Recurrent(eqx.nn.LSTMCell(3, 5, key=KEY)),
        lambda model, x: model(x),
        BATCH,
    ),
    "Fields": lambda: (make_fields(), lambda model, x: model(x), BATCH[0]),
    "Shared": lambda: (make_shared(), call_shared, jnp.ones(4)),
    "__check_init__": lambda: (
        Positive(jnp.ones(3)),
        lambda model, x: model(x),
        BATCH[0],
    ),
    "BCOO": lambda: (
        Sparse(sparse.BCOO.fromdense(jnp.eye(3))),
        lambda model, x: model(x),
        BATCH[0],
    ),
    "dict": lambda: (
        {"head": eqx.nn.Linear(3, 2, key=KEY), "n": 3, "none": None},
        lambda tree, x: tree["head"](x),
        BATCH[0],
    ),
    "list": lambda: (
        [eqx.nn.Linear(3, 3, key=KEY), jnp.tanh, eqx.nn.Linear(3, 2, key=KEY)],
        lambda layers, x: layers[2](layers[1](layers[0](x))),
        BATCH[0],
    ),
    "array": lambda: (jnp.ones(3), lambda weight, x: weight * x, BATCH[0]),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_gradient_is_that_of_filter_vjp(make):
    model, func, x = make()
    value, pull_back = eqx.filter_vjp(lambda model: func(model, x), model)
    (expected,) = eqx.filter_jit(pull_back)(jnp.ones_like(value))
    transform = vg.vector_grad(func, True, return_value=True)
    with jax.checking_leaks():
        for wrap in (lambda func: func, eqx.filter_jit):
            assert tree_allclose(wrap(transform)(model, x), (vg.states(expected), value))
    by_argument = vg.vector_grad(func)(model, x)
    assert tree_allclose(by_argument, expected)


def test_only_inexact_arrays_are_states():
    assert list(vg.states(make_fields())) == ["numpy", "weight"]
    assert list(vg.states(make_shared())) == ["pytree.0.weight"]
    assert list(vg.states(MODELS["BCOO"]()[0])) == ["matrix.0"]
    assert list(vg.states(MODELS["Dropout"]()[0])) == ["layers.0.bias", "layers.0.weight"]


def test_batch_norm_carries_its_state_as_aux():
    class Net(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(self.linear(x), state)

    def make(key):
        return Net(eqx.nn.Linear(3, 2, key=key), eqx.nn.BatchNorm(2, "batch", mode="batch"))

    net, state = eqx.nn.make_with_state(make)(KEY)

    def func(net, xs, state):
        batched = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        ys, state = batched(xs, state)
        return ys**2, state

    transform = vg.vector_grad(func, True, has_aux=True, return_value=True)
    grads, value, new_state = eqx.filter_jit(transform)(net, BATCH, state)
    expected_value, expected_state = func(net, BATCH, state)
    assert tree_allclose(value, expected_value)
    assert tree_allclose(new_state, expected_state)
    expected = eqx.filter_grad(lambda net: jnp.sum(func(net, BATCH, state)[0]))(net)
    assert tree_allclose(grads, vg.states(expected), atol=1e-4)


def test_flax_linen_variables():
    module: Any = linen.Dense(2)
    variables = module.init(KEY, BATCH)
    transform = vg.vector_grad(module.apply, "params.*")
    grads = transform(variables, BATCH)
    expected = jax.grad(lambda variables: module.apply(variables, BATCH).sum())(variables)
    assert tree_allclose(grads, vg.states(expected))
    assert list(grads) == ["params.bias", "params.kernel"]


def test_flax_nnx_module():
    module: Any = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    transform = vg.vector_grad(lambda module, x: module(x), True)
    grads = {path: jnp.asarray(grad) for path, grad in transform(module, BATCH).items()}
    expected = nnx.grad(lambda module: module(BATCH).sum())(module)
    by_name = {"kernel": expected["kernel"][...], "bias": expected["bias"][...]}
    assert {path.split(".")[0]: grad.shape for path, grad in grads.items()} == {
        name: grad.shape for name, grad in by_name.items()
    }
    for path, grad in grads.items():
        assert tree_allclose(grad, by_name[path.split(".")[0]])
    updated = vg.apply_updates(module, {path: -grad for path, grad in grads.items()})
    assert tree_allclose(updated.bias[...], module.bias[...] - by_name["bias"])
