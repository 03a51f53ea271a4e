"""The hyperparameters of `optax.inject_hyperparams` are read and set by name."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import make_ones, sgd, tree_allclose


def test_the_rates_of_groups():
    tree = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    groups = {"a": sgd(0.1), "b": sgd(0.2)}
    clip = optax.clip_by_global_norm(1e3)
    for tx in (groups, optax.chain(clip, vg.partition(groups))):
        opt = vg.Optimizer(tx, tree)
        opt = opt.set_hyperparams("b", learning_rate=0.5)
        new, _ = opt.step(tree, {name: jnp.ones(1) for name in tree})
        assert tree_allclose(new, {"a": jnp.array([-0.1]), "b": jnp.array([-0.5])})
        rates = {label: float(each["learning_rate"]) for label, each in opt.hyperparams.items()}
        assert rates == pytest.approx({"a": 0.1, "b": 0.5})
        both = opt.set_hyperparams(learning_rate=0.25).hyperparams
        assert [float(each["learning_rate"]) for each in both.values()] == [0.25, 0.25]


def test_an_array_that_is_set_is_not_donated():
    step = vg.train_step(lambda tree: jnp.sum(tree["a"]), sgd(0.1))
    state = step.init(make_ones())
    rate = jnp.array(0.5, state.hyperparams["learning_rate"].dtype)
    step(state.set_hyperparams(learning_rate=rate))
    assert float(rate) == 0.5


def test_the_rate_of_states_is_set_in_place():
    w = vg.State(jnp.ones(3))
    opt = vg.StateOptimizer(sgd(0.1), w)
    opt.set_hyperparams(learning_rate=0.5)
    assert float(opt.hyperparams["learning_rate"]) == 0.5
    opt.step(jnp.ones(3))
    assert w.value.tolist() == [0.5] * 3


def test_reselect_takes_the_rate_of_a_new_transformation_and_keeps_one_that_was_set():
    opt = vg.Optimizer(sgd(0.1), make_ones())
    new = opt.reselect(make_ones(), tx=sgd(0.5))
    assert float(new.hyperparams["learning_rate"]) == 0.5
    kept = opt.set_hyperparams(learning_rate=0.25).reselect(make_ones())
    assert float(kept.hyperparams["learning_rate"]) == 0.25


WRONG = {
    "unknown": (sgd(0.1), {"rate": 1.0}, "Got `rate`. There are {'learning_rate': '0.1"),
    "none": (optax.sgd(0.1), {"learning_rate": 1.0}, "There are none. Wrap it"),
    "scheduled": (
        optax.inject_hyperparams(optax.sgd)(learning_rate=optax.constant_schedule(0.1)),
        {"learning_rate": 1.0},
        "that follow no schedule. Got `learning_rate`",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_hyperparameters(case):
    tx, values, match = case
    with pytest.raises(ValueError, match=match):
        vg.Optimizer(tx, make_ones()).set_hyperparams(**values)


def test_a_group_that_is_not_there():
    opt = vg.Optimizer({"a": sgd(0.1)}, make_ones())
    with pytest.raises(ValueError, match="Got `learning_rate` in the group 'b'. There are"):
        opt.set_hyperparams("b", learning_rate=1.0)


def test_values_of_another_shape_are_refused():
    opt = vg.Optimizer(sgd(jnp.ones(3)), make_ones())
    kept = opt.set_hyperparams(learning_rate=2.0).hyperparams["learning_rate"]
    assert kept.tolist() == [2.0] * 3
    with pytest.raises(TypeError, match=r"must be an array of shape \(3,\). Got f32\[2\]"):
        opt.set_hyperparams(learning_rate=jnp.ones(2, "float32"))
    wrong: Any = "fast"
    with pytest.raises(TypeError, match="must be a number. Got 'fast'"):
        vg.Optimizer(sgd(0.1), make_ones()).set_hyperparams(learning_rate=wrong)


def test_a_value_is_on_the_device_of_the_one_before():
    free = vg.Optimizer(sgd(0.1), make_ones())
    placed = jax.device_put(free, jax.devices()[0])
    rates = [opt.set_hyperparams(learning_rate=0.5).hyperparams for opt in (free, placed)]
    assert [rate["learning_rate"].committed for rate in rates] == [False, True]


def test_a_value_is_set_in_a_compiled_function():
    opt = vg.Optimizer(sgd(0.1), make_ones())
    new = jax.jit(lambda opt, rate: opt.set_hyperparams(learning_rate=rate))(opt, 0.5)
    assert tree_allclose(new.hyperparams["learning_rate"], jnp.array(0.5))
