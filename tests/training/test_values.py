"""A training state is a value like any other: copied, pickled, mapped, scanned and changed."""

import copy
import io
import pickle
from typing import Any

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import make_mlp, make_ones, sgd, tree_allclose


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


X, Y = jr.normal(jr.key(1), (5, 3)), jr.normal(jr.key(2), (5, 2))


def square(w, x):
    return jnp.sum((w["a"] * x) ** 2)


def take_steps(step, state, number=2):
    for _ in range(number):
        state, _ = step(state, X, Y)
    return state


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "method": lambda state: state.copy(),
    "tree_map": lambda state: jax.tree.map(jnp.copy, state),
    "cloudpickle": lambda state: state,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_a_copy_lives_on_and_goes_on_alike(make_copy, packed):
    step = vg.train_step(loss, optax.adam(1e-2), "**.weight", packed=packed)
    state = take_steps(step, step.init(make_mlp()))
    snapshot = make_copy(state)
    if make_copy is COPIES["cloudpickle"]:
        step, snapshot = cloudpickle.loads(cloudpickle.dumps((step, state)))
        assert isinstance(step, vg.TrainStep)
        assert tree_allclose(vg.states(snapshot.model), vg.states(state.model))
        assert take_steps(step, snapshot).count == 4
        return
    assert jax.tree.structure(snapshot) == jax.tree.structure(state)
    after = take_steps(step, state)
    again = take_steps(step, snapshot)
    assert int(again.count) == after.count == 4
    assert tree_allclose(again.model, after.model)


def test_a_state_of_a_key_and_an_nn_state_is_pickled():
    norm, nn_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")

    def func(norm, nn_state, x, key):
        apply = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        out, nn_state = apply(x + jr.normal(key, x.shape), nn_state)
        return jnp.mean(out**2), nn_state

    step = vg.train_step(func, optax.adam(0.1))
    state, _ = step(step.init(norm, nn_state=nn_state, key=jr.key(0)), X)
    step, resumed = cloudpickle.loads(cloudpickle.dumps((step, state)))
    assert resumed.count == 1
    assert jnp.array_equal(resumed.key, state.key)
    assert tree_allclose(jax.tree.leaves(resumed.nn_state), jax.tree.leaves(state.nn_state))
    assert step(resumed, X)[0].count == 2


def test_a_state_over_states_is_copied_and_not_pickled():
    w = vg.State(jnp.ones(3))
    step = vg.train_step(lambda x: jnp.sum((w.value * x) ** 2), optax.sgd(0.1), w)
    state = step.init()
    snapshot = copy.deepcopy(state)
    state, _ = step(state, 1.0)
    snapshot.sync()
    assert w.value.tolist() == [1.0] * 3
    with pytest.raises(TypeError, match="over states by reference cannot be pickled.*vg.save"):
        pickle.dumps(state)


def test_an_optimizer_is_copied_and_pickled():
    opt = vg.Optimizer({"a": optax.adam(0.1)}, make_ones())
    grads = {"a": jnp.arange(3.0)}
    expected, _ = opt.step(make_ones(), grads)
    for twin in (copy.deepcopy(opt), cloudpickle.loads(cloudpickle.dumps(opt))):
        assert tree_allclose(twin.step(make_ones(), grads)[0], expected)
    assert copy.deepcopy(opt).tx == opt.tx


def test_leaves_are_serialised_by_equinox():
    step = vg.train_step(loss, optax.adam(1e-2))
    state = take_steps(step, step.init(make_mlp()))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    resumed = eqx.tree_deserialise_leaves(file, step.init(make_mlp(seed=3)))
    assert int(resumed.count) == 2
    assert tree_allclose(take_steps(step, resumed).model, take_steps(step, state).model)


def test_a_scan_of_steps_and_steps_in_jit():
    step = vg.train_step(square, optax.adam(0.1))
    xs = jnp.arange(9.0).reshape(3, 3)
    expected = step.init(make_ones())
    for x in xs:
        expected, _ = step(expected, x)
    scanned, metrics = jax.lax.scan(step, step.init(make_ones()), xs)
    assert tree_allclose(scanned.model, expected.model)
    assert (int(scanned.count), metrics.value.shape) == (3, (3,))
    compiled = jax.jit(lambda: jax.lax.scan(step, step.init(make_ones()), xs)[0].model)
    assert tree_allclose(compiled(), expected.model)
    again, _ = step(scanned, xs[0])
    assert int(again.count) == 4


def test_a_step_with_a_loss_that_is_not_finite_is_skipped():
    step = vg.train_step(square, optax.adam(0.1))

    @jax.jit
    def guarded_step(state, x):
        new, metrics = step(state, x)
        is_finite = jnp.isfinite(metrics.value)
        return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, state), metrics

    state, _ = guarded_step(step.init(make_ones()), jnp.full(3, jnp.nan))
    assert state.model["a"].tolist() == [1.0] * 3
    assert int(state.count) == 0
    state, _ = guarded_step(state, jnp.ones(3))
    assert int(state.count) == 1
    chosen = jax.jit(lambda a, b: jax.lax.cond(True, lambda: a, lambda: b))
    assert int(chosen(step.init(make_ones()), state).count) == 0


def test_an_ensemble_of_trainings():
    step = vg.train_step(loss, optax.inject_hyperparams(optax.adam)(learning_rate=1e-2))
    make = lambda key: eqx.nn.MLP(3, 2, 8, 2, key=key)
    keys = jr.split(jr.key(0), 4)
    states = eqx.filter_vmap(lambda key: step.init(make(key)))(keys)
    states = states.set_hyperparams(learning_rate=jnp.array([1e-2, 1e-2, 0.0, 1e-3]))
    axes = jax.tree.map(lambda _: 0, states)
    metrics: Any = None
    mapped = jax.jit(jax.vmap(step, in_axes=(axes, None, None)))
    for _ in range(3):
        states, metrics = mapped(states, X, Y)
    assert metrics.value.shape == (4,)
    alone = take_steps(step, step.init(make(keys[1])), 3)
    second = jax.tree.map(lambda leaf: leaf[1], states)
    assert tree_allclose(second.model, alone.model, rtol=1e-4, atol=1e-5)
    third = jax.tree.map(lambda leaf: leaf[2], states)
    assert tree_allclose(third.model, make(keys[2]))


def test_trainings_over_states_share_their_programs():
    func, traces = count_traces(lambda x: jnp.sum((w.value * x) ** 2) + 0 * count.value)
    w, count = vg.State(jnp.ones(3)), vg.State(0.0)
    step = vg.train_step(func, optax.adam(0.1), w)

    def train():
        with step.init() as state:
            for _ in range(3):
                state, _ = step(state, jnp.ones(3))
        return state

    first = train()
    number, after_first = len(traces), w.value
    second = train()
    assert len(traces) == number
    assert not tree_allclose(w.value, after_first)
    assert first.training.flat_step is second.training.flat_step
    # Each has an optimizer of its own.
    first.sync()
    assert tree_allclose(w.value, after_first)
    assert jax.tree.structure(first) != jax.tree.structure(second)


def test_two_trainings_over_states_at_once():
    w, calls = vg.State(jnp.ones(3)), vg.State(0)

    def func(x):
        calls.value += 1
        return jnp.sum((w.value * x) ** 2)

    step = vg.train_step(func, sgd(0.1), w, donate=False)
    first = step.init()
    second, other = step.init(), first.set_hyperparams(learning_rate=0.0)
    # The first step finds out that `calls` is used, after these were made.
    following, _ = step(first, jnp.ones(3))
    for state, value in ((second, 0.8), (other, 1.0), (first, 0.8), (following, 0.64)):
        state, _ = step(state, jnp.ones(3))
        state.sync()
        np.testing.assert_allclose(w.value, value, rtol=1e-6)


# Hyperparameters


@pytest.mark.parametrize("packed", [False, True])
def test_a_rate_is_set_and_read_without_another_trace(packed):
    func = eqx.debug.assert_max_traces(max_traces=1)(lambda w, x: jnp.sum(w["a"] * x))
    step = vg.train_step(func, sgd(0.1), packed=packed)
    state, _ = step(step.init(make_ones()), jnp.ones(3))
    rate = jnp.array(0.0)
    state = state.set_hyperparams(learning_rate=rate)
    assert float(state.hyperparams["learning_rate"]) == 0.0
    state, _ = step(state, jnp.ones(3))
    np.testing.assert_allclose(state.model["a"], 0.9, rtol=1e-6)
    assert not rate.is_deleted()


@pytest.mark.parametrize("options", [{}, {"steps_per_call": 2}, {"packed": True}])
def test_the_optimizer_state_keeps_its_dtypes(options):
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}

    def func(w, x):
        return sum(jnp.sum((leaf.astype(jnp.float32) * x) ** 2) for leaf in w.values())

    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
    step = vg.train_step(eqx.debug.assert_max_traces(max_traces=3)(func), tx, **options)
    state = step.init(tree)
    before = [leaf.dtype for leaf in jax.tree.leaves(state)]
    x = jnp.ones((2, 2)) if "steps_per_call" in options else jnp.ones(2)
    for _ in range(3):
        state, _ = step(state, x)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == before


# What a step takes


class Teacher(eqx.Module):
    weight: jax.Array
    scale: float
    act: Any

    def __call__(self, x):
        assert isinstance(self.scale, float)  # a number in a module is constant
        return self.act(self.weight * x) * self.scale


def distill(w, x, teacher, *, mode="sum", training=False):
    reduce = {"sum": jnp.sum, "mean": jnp.mean}[mode]
    return (2.0 if training else 1.0) * reduce((w["a"] * x - teacher(x)) ** 2)


def count_traces(func):
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return func(*args, **kwargs)

    return counted, traces


@pytest.mark.parametrize("over_states", [False, True])
def test_modules_strings_and_flags_in_a_batch(over_states):
    func, traces = count_traces(distill)
    w = vg.State(jnp.ones(3))
    if over_states:
        step = vg.train_step(lambda *args, **kw: func({"a": w.value}, *args, **kw), SGD, w)
        state = step.init()
    else:
        step = vg.train_step(func, SGD)
        state = step.init(make_ones())
    x = jnp.arange(3.0)
    first, student, teacher = 0, make_ones(), None
    for i in range(4):
        teacher = Teacher(jnp.full(3, float(i)), 0.5, jnp.tanh)
        state, metrics = step(state, x, teacher, mode="mean", training=True)
        value = distill(student, x, teacher, mode="mean", training=True)
        np.testing.assert_allclose(metrics.value, value, rtol=1e-6)
        grads = jax.grad(distill)(student, x, teacher, mode="mean", training=True)
        student = {"a": student["a"] - 0.1 * grads["a"]}
        if i == 0:
            first = len(traces)
    assert len(traces) == first
    state, metrics = step(state, x, teacher, training=False)
    np.testing.assert_allclose(metrics.value, distill(student, x, teacher), rtol=1e-6)
    step.lower(state, x, teacher, mode="mean", training=True)


SGD = optax.sgd(0.1)


def test_two_networks_that_train_against_each_other():
    make = lambda seed: eqx.nn.MLP(2, 1, 4, 1, key=jr.key(seed))
    real, noise = jr.normal(jr.key(0), (8, 2)), jr.normal(jr.key(1), (8, 2))
    score = lambda critic, x: jnp.mean(jax.vmap(critic)(x))
    critic_loss = lambda critic, actor, real, noise: score(critic, noise) - score(critic, real)
    actor_loss = lambda actor, critic, noise: (
        -score(critic, jax.vmap(lambda x: actor(x))(noise) + noise)
    )
    critic_step = vg.train_step(critic_loss, optax.adam(1e-2), check_states=False)
    actor_step = vg.train_step(actor_loss, optax.adam(1e-2))
    critic, actor = critic_step.init(make(0)), actor_step.init(make(1))
    metrics: Any = None
    for _ in range(3):
        critic, _ = critic_step(critic, actor.model, real, noise)
        actor, metrics = actor_step(actor, critic.model, noise)
    assert jnp.isfinite(metrics.value)
    assert actor.count == critic.count == 3


def test_static_values_with_arrays_in_scanned_steps():
    func = lambda w, x, mode: jnp.sum(w["a"] * x) if mode == "sum" else jnp.mean(w["a"] * x)
    every: list[Any] = [{"steps_per_call": 2}, {"accumulate": 2}]
    for options in every:
        step = vg.train_step(func, SGD, **options)
        _, metrics = step(step.init(make_ones()), jnp.ones((2, 3)), "sum")
        assert float(metrics.value[0]) == 3.0


class Scale(eqx.Module):
    array: jax.Array
    number: float


def test_numbers_in_modules_are_constant():
    def func(w, x, scale):
        assert isinstance(scale.number, float)
        return square(w, x) * jnp.sum(scale.array) * scale.number

    step = vg.train_step(func, SGD)
    _, metrics = step(step.init(make_ones()), jnp.ones(3), Scale(jnp.ones(2), 0.5))
    assert float(metrics.value) == 3.0


def test_numbers_are_traced():
    func, traces = count_traces(lambda w, x, scale, mode=None: scale * square(w, x))
    step = vg.train_step(func, SGD)
    state = step.init(make_ones())
    for i in range(4):
        state, _ = step(state, jnp.ones(3), float(i))
        state, _ = step(state, jnp.ones(3), float(i), "mode")
    assert len(traces) == 2


class NoHash:
    __hash__: Any = None


def call(func, *args, init=None, **kwargs):
    step = vg.train_step(func, SGD)
    return step(step.init(make_ones(), **(init or {})), *args, **kwargs)


REFUSED = {
    "no hash": (lambda: call(square, NoHash()), TypeError, "must have a hash.*Close over it"),
    "a pair": (lambda: call(lambda w: (w["a"].sum(), 1.0)), TypeError, "has_aux=True"),
    "a dict": (lambda: call(lambda w: {"loss": w["a"].sum()}), TypeError, "has_aux=True"),
    "an nn state": (
        lambda: call(lambda w: (w["a"].sum(), eqx.nn.State(w))),
        TypeError,
        r"init\(model, nn_state=nn_state\)",
    ),
    "a seed": (
        lambda: call(square, init={"key": 3}),
        TypeError,
        r"`init\(key=...\)` must be a PRNG key.*Got 3",
    ),
    "a dict of statistics": (
        lambda: call(square, init={"nn_state": {"mean": 1.0}}),
        TypeError,
        r"`init\(nn_state=...\)` must be the `equinox.nn.State`.*Got {'mean': 1.0}",
    ),
    "a batch that is no tuple": (
        lambda: call(square, init={"batch": jnp.ones(3)}),
        TypeError,
        r"`init\(batch=...\)` must be a tuple.*Got f\d\d",
    ),
    "another transformation": (
        lambda: call(square, init={"optimizer": vg.Optimizer(optax.sgd(0.2), make_ones())}),
        ValueError,
        r"have the transformation of `train_step\(tx=...\)`.*reselect",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(case):
    use, error, match = case
    with pytest.raises(error, match=f"(?s){match}"):
        use()


def test_a_forgotten_key_is_named():
    with pytest.raises(TypeError, match="key") as info:
        call(lambda w, x, *, key: square(w, x), jnp.ones(3))
    assert "step.init(model, key=key)" in info.value.__notes__[0]


def test_a_type_error_in_the_loss_has_no_note():
    with pytest.raises(TypeError) as info:
        call(lambda w: w["a"] + "a")
    assert not any("step.init" in note for note in info.value.__notes__)


def test_a_trained_state_that_the_loss_sets():
    every: list[Any] = [{}, {"steps_per_call": 2}]
    for options in every:
        w, other = vg.State(jnp.array(3.0)), vg.State(jnp.array(3.0))

        def func(state):
            state.value = jnp.clip(state.value, 0.0, 1.0)
            return state.value**2

        step = vg.train_step(lambda w=w: func(w), SGD, w, **options)
        with step.init() as state:
            state, _ = step(state)
        opt = vg.StateOptimizer(SGD, other)
        for _ in range(options.get("steps_per_call", 1)):
            opt.step(vg.vector_grad(lambda _, other=other: func(other), other)(None))
        assert tree_allclose(w.value, other.value)
    w = vg.State(jnp.array(3.0))
    step = vg.train_step(lambda x: func(w) * x, SGD, w, accumulate=2)
    with pytest.raises(ValueError, match="must not set a state that is trained"):
        step(step.init(), jnp.ones(2))


def test_parts_of_a_batch_with_different_numbers_of_tokens():
    tokens = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    x, num_parts = jnp.arange(6.0).reshape(2, 3), 2

    def func(w, x, tokens, total):
        errors = jnp.broadcast_to(w["a"], x.shape) * x - 1.0
        return jnp.sum(tokens * errors**2) / total

    parts = vg.train_step(func, SGD, accumulate=num_parts)
    total = jnp.full(num_parts, tokens.sum() / num_parts)
    state, _ = parts(parts.init(make_ones()), x, tokens, total)
    whole = vg.train_step(func, SGD)
    expected, _ = whole(whole.init(make_ones()), x, tokens, tokens.sum())
    assert tree_allclose(state.model, expected.model)


def test_a_rejected_step_drops_the_statistics_of_its_batch():
    norm, nn_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")

    def func(norm, nn_state, x):
        apply = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        out, nn_state = apply(x, nn_state)
        return jnp.mean(out**2), nn_state

    step = vg.train_step(func, optax.apply_if_finite(SGD, 5))
    state, _ = step(step.init(norm, nn_state=nn_state), X)
    before = jax.tree.leaves(state.nn_state)
    state, _ = step(state, jnp.full((5, 3), jnp.nan))
    assert tree_allclose(jax.tree.leaves(state.nn_state), before)
    state, _ = step(state, X + 1.0)
    assert not tree_allclose(jax.tree.leaves(state.nn_state), before)
