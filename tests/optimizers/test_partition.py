"""A transformation for each group, anywhere in a chain, and what each is passed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import make_mlp, tree_allclose


SGD = optax.sgd(1.0)
TREE = {"a": jnp.array(0.0), "b": jnp.array(0.0)}


def test_clipping_sees_all_groups():
    groups = {"a": SGD, "b": optax.sgd(0.1)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), vg.partition(groups))
    new, _ = vg.Optimizer(tx, TREE).step(TREE, {"a": jnp.array(3.0), "b": jnp.array(4.0)})
    assert tree_allclose(new, {"a": jnp.array(-0.6), "b": jnp.array(-0.08)})


def test_a_dict_is_short_for_it():
    groups = {"**.weight": optax.adamw(1e-2), "**.bias": optax.sgd(1e-1, momentum=0.9)}
    model = make_mlp()
    grads = vg.states(model)
    by_dict, opt = vg.Optimizer(groups, model).step(model, grads)
    other, same = vg.Optimizer(vg.partition(groups), model).step(model, grads)
    assert tree_allclose(by_dict, other)
    assert tree_allclose(opt.opt_state, same.opt_state)


def test_it_is_a_transformation_alone_and_compiled():
    params = vg.states(make_mlp())
    tx = vg.partition({"**.weight": SGD, "**.bias": optax.adam(0.1)})
    updates, opt_state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates.keys() == params.keys()
    assert updates["layers.0.weight"].tolist() == (-params["layers.0.weight"]).tolist()
    assert int(opt_state["**.bias"][0].count) == 1


def test_reselect_moves_what_belongs_to_a_leaf_between_groups():
    tree = {name: jnp.ones(2) for name in "abc"}
    chain = lambda groups: optax.chain(optax.trace(0.9), vg.partition(groups))
    first = {"a": optax.adam(0.1), vg.path("b", "c"): optax.adam(0.2)}
    opt = vg.Optimizer(chain(first), tree)
    for _ in range(3):
        tree, opt = opt.step(tree, tree)
    second = {vg.path("a", "b"): optax.adam(0.1), "c": optax.sgd(0.1)}
    new = opt.reselect(tree, tx=chain(second))
    assert tree_allclose(new.opt_state[0], opt.opt_state[0])
    old_b = list(opt.opt_state[1].values())[1][0].mu["b"]
    new_group = next(iter(new.opt_state[1].values()))[0]
    assert tree_allclose(new_group.mu["b"], old_b)
    assert int(new_group.count) == 3
    assert (
        vg.Optimizer(optax.adam(0.1), tree, "a").reselect(tree).opt_state[0].mu["b"].any() == 0
    )


def test_groups_that_become_one_go_on_with_the_count_of_most_leaves():
    tree = {name: jnp.ones(2) for name in "abcde"}
    counts = []
    for early in ("a", "{a,b}", "{a,b,c}"):
        late = vg.path("*") & ~vg.path(early)
        groups = {early: optax.adam(0.1), late: optax.adam(0.1)}
        opt = vg.Optimizer(optax.adam(0.1), tree, early)
        _, opt = opt.step(tree, vg.states(tree, early))
        _, opt = opt.reselect(tree, tx=groups).step(tree, tree)
        counts.append(int(opt.reselect(tree, tx=optax.adam(0.1)).opt_state[0].count))
    assert counts == [1, 1, 2]


def test_a_type_error_of_a_transformation_is_raised_as_it_is():
    def fail(updates, state, params=None, **extra_args):
        raise TypeError("mine")

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), fail)
    opt = vg.Optimizer(optax.chain(tx), TREE)
    with pytest.raises(TypeError, match="^mine$"):
        opt.step(TREE, TREE, value=1.0)


def test_labels_may_be_named_like_leaves():
    opt = vg.Optimizer({"a": optax.adam(0.1), "b": optax.adam(0.1)}, TREE)
    _, opt = opt.step(TREE, {"a": jnp.array(3.0), "b": jnp.array(4.0)})
    assert tree_allclose(opt.reselect(TREE).opt_state, opt.opt_state)


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: {"a": tx, "b": SGD}])
def test_a_transformation_gets_the_extra_arguments_it_takes(wrap):
    seen = {}

    def update(updates, state, params=None, *, mine, value_fn):
        seen.update(mine=mine, value=value_fn(params))
        return updates, state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)  # pyright: ignore[reportArgumentType]
    opt = vg.Optimizer(wrap(tx), TREE)
    value_fn = lambda tree: tree["a"] + tree["b"] + 1.0
    extra_args = {"mine": 5, "others": 6, "value_fn": value_fn}
    opt.step(TREE, TREE, **extra_args)
    assert (seen["mine"], float(seen["value"])) == (5, 1.0)


def test_functions_take_the_model():
    model = make_mlp()
    tx = optax.contrib.sophia(1e-3)
    loss = lambda model: jnp.sum(model(jnp.ones(3)) ** 2)
    opt = vg.Optimizer(tx, model, "**.weight")
    grads = vg.vector_grad(loss, "**.weight")(model)
    new, _ = opt.step(model, grads, obj_fn=loss)
    assert jnp.isfinite(loss(new))


def test_sharpness_aware_minimization_in_a_training_step():
    make = lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    loss = lambda w, x: jnp.sum((w["a"] * x - w["b"]) ** 2)
    model, opt = TREE, vg.Optimizer(make(), TREE)
    step = vg.train_step(loss, make())
    state = step.init(TREE)
    for _ in range(4):
        model, opt = opt.step(model, vg.vector_grad(loss, "**")(model, 2.0))
        state, _ = step(state, 2.0)
    assert tree_allclose(state.model, model)


partition: Any = vg.partition
WRONG = {
    "no dict": (lambda: partition(SGD), TypeError, "must be a dict from selector"),
    "no group": (lambda: vg.partition({}), ValueError, "must have at least one group"),
    "no transformation": (lambda: partition({"a": 1.0}), TypeError, "must be an optax tr"),
    "a module": (
        lambda: partition({"**": SGD}).init(make_mlp()),
        TypeError,
        "must be a flat dict from path to leaf.*Got a `MLP`",
    ),
    "in no group": (
        lambda: vg.partition({"a": SGD}).init(TREE),
        ValueError,
        r"`partition\(groups=...\)` must put each chosen leaf.*Got `b` in none",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_partitions(case):
    make, error, match = case
    with pytest.raises(error, match=match):
        make()
