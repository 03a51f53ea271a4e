"""What a training step passes to the `update` of its transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import make_mlp, tree_allclose


PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
X = jnp.array([1.0, 3.0])


def loss(w, x):
    return jnp.sum((w["a"] * x - w["b"]) ** 2)


def record(seen: dict[str, Any], *names):
    """A transformation that takes some extra arguments, and updates nothing."""

    def update(updates, state, params=None, **extra_args):
        seen.update({name: extra_args[name] for name in names})
        return jax.tree.map(jnp.zeros_like, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_arguments_are_made_of_the_auxiliary_data():
    taken = []

    def update(updates, state, params=None, *, value, mine, **extra_args):
        taken.append((value, mine))
        return jax.tree.map(lambda u: mine * u, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]
    step = vg.train_step(
        lambda w, x, scale: (loss(w, x), {"scale": scale}),
        tx,
        has_aux=True,
        extra_args=lambda aux: {"value": 2.0, "mine": -aux["scale"]},
    )
    for scale in (0.5, 0.25):
        state, _ = step(step.init(PARAMS), X, scale)
        grads = jax.grad(loss)(PARAMS, X)
        expected = jax.tree.map(lambda p, g, s=scale: p - s * g, PARAMS, grads)
        assert tree_allclose(state.model, expected)
    assert [value for value, _ in taken] == [2.0]


def test_a_plateau_of_the_validation_loss():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    step = vg.train_step(
        lambda w, x, validation: (loss(w, x), validation),
        tx,
        has_aux=True,
        extra_args=lambda validation: {"value": validation},
    )
    state = step.init(PARAMS)
    for validation in (1.0, 2.0, 3.0, 4.0):
        state, _ = step(state, X, validation)
    assert float(state.optimizer.opt_state[1].scale) < 1.0


OPTIONS = {
    "plain": {},
    "accumulate": {"accumulate": 2},
    "steps_per_call": {"steps_per_call": 2},
    "packed": {"packed": True},
}


@pytest.mark.parametrize("over_states", [False, True], ids=["module", "states"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_functions_of_the_model_agree_with_value_and_gradient(options, over_states):
    def update(updates, state, params=None, *, value, grad, value_fn, obj_fn, grad_fn):
        other = jax.tree.map(lambda p: p + 1.0, params)
        pairs = [
            (value_fn(params), value),
            (obj_fn(params), value),
            (grad_fn(params), grad),
            (grad_fn(other, 0), jax.grad(value_fn)(other)),
        ]
        errors = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), *zip(*pairs, strict=True))
        return updates, optax.tree.max(errors)

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.array(1.0), update)  # pyright: ignore[reportArgumentType]
    x = jnp.stack([X, 2 * X]) if {"accumulate", "steps_per_call"} & options.keys() else X
    if over_states:
        states = {name: vg.State(value) for name, value in PARAMS.items()}
        func = lambda x: loss({name: state.value for name, state in states.items()}, x)
        step = vg.train_step(func, tx, states, **options)
        state = step.init()
    else:
        step = vg.train_step(loss, tx, **options)
        state = step.init(PARAMS)
    state, _ = step(state, x)
    assert float(state.optimizer.opt_state) < 1e-5


def sam(opaque):
    return optax.contrib.sam(
        optax.sgd(0.01), optax.sgd(0.05), sync_period=2, opaque_mode=opaque
    )


def test_opaque_sharpness_aware_minimization_in_all_ways():
    grad_fn = jax.grad(lambda w: loss(w, X))
    params, opt_state = PARAMS, sam(True).init(PARAMS)
    model, opt = PARAMS, vg.Optimizer(sam(True), PARAMS)
    states = {name: vg.State(value) for name, value in PARAMS.items()}
    state_opt = vg.StateOptimizer(sam(True), states)
    step = vg.train_step(loss, sam(True))
    state = step.init(PARAMS)
    gradient = vg.vector_grad(loss, "**")
    func = lambda: loss({name: each.value for name, each in states.items()}, X)
    over_states = vg.vector_grad(lambda _: func(), states)
    for _ in range(3):
        updates, opt_state = sam(True).update(
            grad_fn(params), opt_state, params, grad_fn=lambda w, _: grad_fn(w)
        )
        params = optax.apply_updates(params, updates)
        grads = gradient(model, X)
        model, opt = opt.step(model, grads, grad_fn=lambda model, _: gradient(model, X))
        state_opt.step(over_states(None), grad_fn=lambda _: over_states(None))
        state, _ = step(state, X)
    assert not tree_allclose(params, PARAMS, rtol=1e-2)
    values = {name: each.value for name, each in states.items()}
    for trained in (model, state.model, values):
        assert tree_allclose(trained, params)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip(1e3), tx),
    "chain in chain": lambda tx: optax.chain(optax.chain(tx), optax.scale(1.0)),
    "groups": lambda tx: {"**": tx},
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("opaque", [False, True], ids=["transparent", "opaque"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_a_transformation_within_others_gets_what_it_takes(wrap, opaque):
    plain, wrapped = [vg.train_step(loss, tx) for tx in (sam(opaque), wrap(sam(opaque)))]
    expected, state = plain.init(PARAMS), wrapped.init(PARAMS)
    for _ in range(2):
        expected, _ = plain(expected, X)
        state, _ = wrapped(state, X)
    assert tree_allclose(state.model, expected.model)


def test_gradients_of_a_function_are_of_the_group_and_conjugated():
    seen: dict[str, Any] = {}
    tree = {"a": jnp.array(1.0 + 2.0j), "b": jnp.array(1.0)}
    func = lambda w: jnp.sum(jnp.abs(w["a"]) ** 2 + w["b"] ** 2)
    opt = vg.Optimizer({"a": record(seen, "grad_fn"), "b": optax.sgd(0.1)}, tree)
    gradient = vg.vector_grad(func, "**")
    opt.step(tree, gradient(tree), grad_fn=lambda tree: gradient(tree))
    assert tree_allclose(seen["grad_fn"]({"a": tree["a"]}), {"a": 2 * tree["a"]})


def test_a_gradient_of_another_shape_is_refused():
    tx = sam(True)
    wrong = lambda model, _: {"a": jnp.ones(3), "b": jnp.ones(())}
    with pytest.raises(ValueError, match=r"`Optimizer.step\(grad=...\)` must hold a gradient"):
        vg.Optimizer(tx, PARAMS).step(PARAMS, PARAMS, grad_fn=wrong)


def test_units_of_functions():
    u = pytest.importorskip("brainunit")
    params = {"t": jnp.array(3.0) * u.ms}
    func = lambda w: (w["t"] / u.ms) ** 2 * u.mvolt
    make = lambda: vg.unitful(sam(True), loss_unit=u.mvolt)
    step = vg.train_step(func, make())
    state, _ = step(step.init(params))
    bare = vg.train_step(lambda w: w["t"] ** 2, sam(True))
    expected, _ = bare(bare.init({"t": jnp.array(3.0)}))
    assert tree_allclose(state.model["t"].to_decimal(u.ms), expected.model["t"])


def test_sophia_takes_the_loss():
    step = vg.train_step(
        lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2), optax.contrib.sophia(1e-2)
    )
    state = step.init(make_mlp())
    x = jr.normal(jr.key(0), (5, 3))
    values = []
    for _ in range(4):
        state, metrics = step(state, x)
        values.append(float(metrics.value))
    assert values[3] < values[0]


NO_DICT: Any = [lambda aux: 3.0, lambda aux: {1: 2.0}]


@pytest.mark.parametrize("extra_args", NO_DICT)
def test_what_is_no_dict_is_refused(extra_args):
    step = vg.train_step(loss, optax.sgd(0.1), extra_args=extra_args)
    with pytest.raises(TypeError, match=r"`train_step\(extra_args=...\)` must be a function"):
        step(step.init(PARAMS), X)
    wrong: Any = {"value": 1.0}
    with pytest.raises(TypeError, match=r"`train_step\(extra_args=...\)` must be a function"):
        vg.train_step(loss, optax.sgd(0.1), extra_args=wrong)
