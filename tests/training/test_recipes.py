"""Trainings as users write them, each equal to the same by hand."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import vgrad_eqx as vg

from ..helpers import make_mlp, tree_allclose


X, Y = jr.normal(jr.key(1), (5, 3)), jr.normal(jr.key(2), (5, 2))


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def test_the_best_model_lives_on():
    step = vg.train_step(loss, optax.sgd(0.5))
    state, best = step.init(make_mlp()), None
    values = []
    for i in range(6):
        state, _ = step(state, X, Y if i < 3 else -Y)  # from then on, it gets worse
        values.append(float(vg.jit(loss)(state.model, X, Y)))
        best = state.model if values[-1] == min(values) else best
    assert min(values) == values[2]
    assert np.isclose(loss(best, X, Y), values[2])


def test_an_average_of_the_parameters_for_evaluation():
    decay = 0.9
    step = vg.train_step(loss, optax.adam(1e-2))

    @vg.jit(donate="all")
    def average(ema: Any, params: Any) -> Any:
        return optax.incremental_update(params, ema, 1 - decay)

    state = step.init(make_mlp())
    ema = vg.states(state.model)
    expected = {name: np.asarray(leaf) for name, leaf in ema.items()}
    for _ in range(4):
        state, _ = step(state, X, Y)
        params = vg.states(state.model)
        expected = {
            n: decay * e + (1 - decay) * np.asarray(params[n]) for n, e in expected.items()
        }
        ema = average(ema, params)
    evaluated = vg.replace_states(state.model, ema)
    assert tree_allclose(vg.states(evaluated), jax.tree.map(jnp.asarray, expected))
    assert not tree_allclose(vg.states(state.model), vg.states(evaluated))


def test_bfloat16_computes_and_a_wider_dtype_is_trained():
    dtypes, wide = [], jnp.result_type(float)

    def half(model, x, y):
        lower = lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf
        model, x = jax.tree.map(lower, (model, x))
        out = jax.vmap(model)(x)
        dtypes.append(out.dtype)
        return jnp.mean((out.astype(wide) - y) ** 2)

    step = vg.train_step(half, optax.adam(1e-2))
    state, metrics = step(step.init(make_mlp()), X, Y)
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    assert metrics.value.dtype == wide
    leaves = jax.tree.leaves((vg.states(state.model), state.optimizer.opt_state[0].mu))
    assert {leaf.dtype for leaf in leaves} == {wide}
    assert np.allclose(metrics.value, loss(make_mlp(), X, Y), rtol=0.02)


def test_the_rate_of_a_schedule_is_read():
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    step = vg.train_step(loss, optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
    state = step.init(make_mlp())
    rates = []
    for _ in range(4):
        state, _ = step(state, X, Y)
        rates.append(float(state.hyperparams["learning_rate"]))
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_a_target_network():
    """Q-learning: the targets are those of an older copy of the network in the batch."""

    def td_loss(net, target, state, action, reward, following):
        q = jax.vmap(net)(state)[jnp.arange(action.size), action]
        best = jnp.max(jax.vmap(target)(following), axis=-1)
        return jnp.mean((q - (reward + 0.9 * jax.lax.stop_gradient(best))) ** 2)

    func = eqx.debug.assert_max_traces(max_traces=1)(td_loss)
    step = vg.train_step(func, optax.sgd(0.1))
    state, target = step.init(make_mlp()), make_mlp(seed=1)
    online, old = make_mlp(), target
    for i in range(5):
        keys = jr.split(jr.key(i), 4)
        batch = (
            jr.normal(keys[0], (6, 3)),
            jr.randint(keys[1], (6,), 0, 2),
            jr.normal(keys[2], (6,)),
            jr.normal(keys[3], (6, 3)),
        )
        state, metrics = step(state, target, *batch)
        value, grads = eqx.filter_value_and_grad(td_loss)(online, old, *batch)
        online = eqx.apply_updates(online, jax.tree.map(lambda g: -0.1 * g, grads))
        assert np.allclose(metrics.value, value, rtol=1e-5)
        if i % 2 == 1:
            target, old = state.model, online
    assert tree_allclose(vg.states(state.model), vg.states(online))


def test_float8_parameters_are_trained_in_all_ways():
    def func(w, x):
        return jnp.sum((w["a"].astype(jnp.float32) * x) ** 2)

    tree = {"a": jnp.ones(2, jnp.float8_e4m3fn)}
    ways: list[dict[str, Any]] = [
        {},
        {"packed": True},
        {"accumulate": 2},
        {"steps_per_call": 2},
    ]
    for options in ways:
        step = vg.train_step(func, optax.sgd(0.1), grad_norms=True, **options)
        shape = (2, 2) if {"accumulate", "steps_per_call"} & options.keys() else 2
        x = jnp.ones(shape, "float32")
        with jax.numpy_dtype_promotion("strict"):
            state, metrics = step(step.init(tree), x)
        assert state.model["a"].dtype == jnp.float8_e4m3fn
        number = options.get("steps_per_call", 1)
        assert np.allclose(
            state.model["a"].astype(jnp.float32), 0.8125 if number == 1 else 0.625
        )
        assert metrics.grad_norms["a"].dtype == jnp.float32
