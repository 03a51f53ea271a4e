"""Every way to train gives the parameters of a loop written by hand."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose
from .transformations import LINE_SEARCH, NAMES, TABLE


STEPS = 200


class Model(eqx.Module):
    current: jax.Array
    resistance: jax.Array
    tau: jax.Array
    gain: jax.Array

    def __call__(self, x):
        slow = jnp.stack([jnp.sin(self.tau[0] * x), jnp.cos(self.tau[1] * x)])
        return self.current * self.resistance + jnp.sum(self.gain) * slow.sum()


def make_model():
    return Model(
        jnp.array([2.0]), jnp.array([0.7]), jnp.array([1.0, 1.5]), jnp.array([1.0, 2.0, 0.5])
    )


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)


@ft.cache
def make_batches(row):
    """Another batch for each step, but for line searches, which are for the same loss."""
    num_batches = 1 if row.why == LINE_SEARCH else STEPS
    xs = jr.uniform(jr.key(0), (num_batches, 4))
    ys = jnp.cos(3 * xs) + 0.1 * jr.normal(jr.key(1), (num_batches, 4))
    return [jnp.broadcast_to(each, (STEPS, 4)) for each in (xs, ys)]


def by_hand(row):
    tx = optax.with_extra_args_support(row.make())

    @eqx.filter_jit
    def step(params, opt_state, x, y):
        value_fn = lambda params: loss(Model(**params), x, y)
        value, grads = eqx.filter_value_and_grad(value_fn)(params)
        extra_args = {"value": value, "grad": grads, "value_fn": value_fn}
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        return eqx.apply_updates(params, updates), opt_state

    params = vars(make_model())
    opt_state: Any = tx.init(params)
    for x, y in zip(*make_batches(row), strict=True):
        params, opt_state = step(params, opt_state, x, y)
    return params


def by_optimizer(row):
    gradient = vg.vector_grad(loss, True, return_value=True)

    @eqx.filter_jit
    def step(model, opt, x, y):
        grads, value = gradient(model, x, y)
        value_fn = lambda model: loss(model, x, y)
        return opt.step(model, grads, value=value, grad=grads, value_fn=value_fn)

    model = make_model()
    opt = vg.Optimizer(row.make(), model)
    for x, y in zip(*make_batches(row), strict=True):
        model, opt = step(model, opt, x, y)
    assert opt.count == STEPS
    return vars(model)


def make_states():
    return {name: vg.State(getattr(make_model(), name)) for name in NAMES}


def loss_of(states, x, y):
    return loss(Model(**{name: state.value for name, state in states.items()}), x, y)


def by_state_optimizer(row):
    states = make_states()
    opt = vg.StateOptimizer(row.make(), states)

    @jax.jit
    def step(x, y):
        func = lambda: loss_of(states, x, y)
        gradient = vg.vector_grad(lambda _: func(), states, return_value=True)
        grads, value = gradient(None)
        opt.step(grads, value=value, grad=grads, value_fn=func)

    for x, y in zip(*make_batches(row), strict=True):
        step(x, y)
    assert opt.count == STEPS
    return {name: state.value for name, state in states.items()}


def by_train_step(row, **options):
    step = vg.train_step(loss, row.make(), **options)
    state = step.init(make_model())
    num_steps = options.get("steps_per_call", 1)
    xs, ys = make_batches(row)
    if num_steps > 1:
        xs, ys = [each.reshape(-1, num_steps, 4) for each in (xs, ys)]
    for x, y in zip(xs, ys, strict=True):
        state, _ = step(state, x, y)
    assert state.count == STEPS
    return vars(state.model)


def by_train_step_over_states(row):
    states = make_states()
    step = vg.train_step(lambda x, y: loss_of(states, x, y), row.make(), states)
    with step.init() as state:
        for x, y in zip(*make_batches(row), strict=True):
            state, _ = step(state, x, y)
    return {name: state.value for name, state in states.items()}


# In float32, some line searches take another way after a rounding error.
@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# Its first step changes the structure of its state.
FOR_OPTIMIZERS_ONLY = {"monitor"}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", TABLE)
def test_all_ways_agree(name):
    row = TABLE[name]
    expected = by_hand(row)
    assert all(jnp.all(jnp.isfinite(value)) for value in expected.values())
    assert not tree_allclose(expected, vars(make_model()), rtol=1e-3, atol=1e-3)
    ways: dict[str, Any] = {"Optimizer": by_optimizer}
    if name not in FOR_OPTIMIZERS_ONLY:
        ways["StateOptimizer"] = by_state_optimizer
        ways["train_step"] = by_train_step
        ways["10 steps a call"] = ft.partial(by_train_step, steps_per_call=10)
    for way, train in ways.items():
        assert tree_allclose(train(row), expected, rtol=1e-7, atol=1e-7), way


LONG = pytest.param("lbfgs with zoom line search", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["adamw", "lamb", "momentum", LONG])
def test_packed_steps_and_steps_over_states_agree(name):
    expected = by_hand(TABLE[name])
    packed = by_train_step(TABLE[name], packed=True)
    assert tree_allclose(packed, expected, rtol=1e-7, atol=1e-7)
    over_states = by_train_step_over_states(TABLE[name])
    assert tree_allclose(over_states, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", sorted(FOR_OPTIMIZERS_ONLY & TABLE.keys()))
def test_a_state_of_changing_structure_is_refused(name):
    row = TABLE[name]
    with pytest.raises(ValueError, match="one whose first step changes it.*`vg.Optimizer`"):
        by_state_optimizer(row)
    with pytest.raises(ValueError, match=r"one whose first step.*`init\(model, optimizer"):
        by_train_step(row)
    gradient = vg.vector_grad(loss)
    model, (xs, ys) = make_model(), make_batches(row)
    opt = vg.Optimizer(row.make(), model)
    model, opt = opt.step(model, vg.states(gradient(model, xs[0], ys[0])))
    step = vg.train_step(loss, row.make())
    state, _ = step(step.init(model, optimizer=opt), xs[1], ys[1])
    assert state.count == 2
