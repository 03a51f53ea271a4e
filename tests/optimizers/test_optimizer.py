"""Optax transformations on the chosen leaves of a module."""

from typing import Any

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import apply, make_mlp, tree_allclose


def loss(model, x):
    return jnp.sum(model(x) ** 2)


def gradients(model, selector: Any = True, x=None):
    return vg.vector_grad(loss, selector)(model, jnp.ones(3) if x is None else x)


def train(opt, model, selector: Any = True, steps=3):
    for i in range(steps):
        model, opt = opt.step(model, gradients(model, selector, jnp.arange(3.0) + i))
    return model, opt


def test_equals_optax_over_the_chosen_leaves():
    model, selector = make_mlp(), "**.weight"
    tx = optax.adamw(1e-2, weight_decay=0.1)
    ours, opt = train(vg.Optimizer(tx, model, selector), model, selector)
    params = vg.states(model, selector)
    opt_state = tx.init(params)
    for i in range(3):
        grads = gradients(model, selector, jnp.arange(3.0) + i)
        updates, opt_state = tx.update(grads, opt_state, params)
        model = vg.apply_updates(model, updates)
        params = vg.states(model, selector)
    assert tree_allclose(ours, model)
    assert tree_allclose(opt.opt_state, opt_state)
    assert int(opt.count) == 3
    assert opt.count.dtype == jnp.int32
    assert tree_allclose(opt.params(ours), params)


def test_what_is_not_chosen_is_frozen():
    model = make_mlp()
    tx = optax.adamw(1e-2, weight_decay=0.5)
    trained, opt = train(vg.Optimizer(tx, model, "layers.1"), model, "layers.1")
    for i in (0, 2):
        assert eqx.tree_equal(trained.layers[i], model.layers[i])
    assert not eqx.tree_equal(trained.layers[1], model.layers[1])
    sizes = sum(leaf.size for leaf in jax.tree.leaves(opt.opt_state))
    assert sizes == 1 + 2 * (8 * 8 + 8)


GROUPS = {
    "**.weight": optax.adamw(1e-2, weight_decay=0.1),
    vg.path("**.bias") & ~vg.path("layers.0"): optax.sgd(1e-1, momentum=0.9),
    "layers.0.bias": optax.lion(1e-3),
}


def test_groups_equal_optax_partition():
    model = make_mlp()
    ours, opt = train(vg.Optimizer(GROUPS, model), model)

    def label(params):
        kinds = {path: "weight" if path.endswith("weight") else "bias" for path in params}
        return kinds | {"layers.0.bias": "first"}

    txs: Any = dict(zip(["weight", "bias", "first"], GROUPS.values(), strict=True))
    tx = optax.partition(txs, label)
    opt_state = tx.init(vg.states(model))
    for i in range(3):
        grads = gradients(model, True, jnp.arange(3.0) + i)
        updates, opt_state = tx.update(grads, opt_state, vg.states(model))
        model = vg.apply_updates(model, updates)
    assert tree_allclose(ours, model)
    labels = {"**.weight", "(path('**.bias') & ~path('layers.0'))", "layers.0.bias"}
    assert opt.opt_state.keys() == labels


def test_an_optimizer_passes_through_jit_and_scan():
    model = make_mlp()
    opt = vg.Optimizer(GROUPS, model)
    expected, _ = train(opt, model)

    @eqx.filter_jit
    def run(model, opt):
        arrays, static = eqx.partition((model, opt), eqx.is_array)

        def body(arrays, i):
            model, opt = eqx.combine(arrays, static)
            new = opt.step(model, gradients(model, True, jnp.arange(3.0) + i))
            return eqx.filter(new, eqx.is_array), None

        arrays, _ = jax.lax.scan(body, arrays, jnp.arange(3))
        return eqx.combine(arrays, static)

    scanned, opt = run(model, opt)
    assert tree_allclose(scanned, expected)
    assert int(opt.count) == 3


@pytest.mark.parametrize("make", [lambda: optax.adam(1e-3), lambda: optax.lbfgs()])
def test_another_optimizer_made_alike_is_not_traced_again(make):
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def step(model, opt, x):
        value_fn = lambda model: loss(model, x)
        grads, value = vg.vector_grad(loss, True, return_value=True)(model, x)
        return opt.step(model, grads, value=value, grad=grads, value_fn=value_fn)

    model = make_mlp()
    for _ in range(3):
        model, opt = step(model, vg.Optimizer(make(), model), jnp.ones(3))
        model, opt = step(model, opt, jnp.ones(3))


@pytest.mark.parametrize(
    "make",
    [
        optax.lbfgs,
        lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)
        ),
    ],
)
def test_line_searches_take_a_function_of_the_model(make):
    model, x = make_mlp(), jnp.ones(3)
    value_fn = lambda model: loss(model, x)
    gradient = vg.vector_grad(loss, "layers.*.weight", return_value=True)
    opt = vg.Optimizer(make(), model, "layers.*.weight")
    tx: Any = make()
    params = vg.states(model, "layers.*.weight")
    opt_state = tx.init(params)
    by_hand = model
    of_params = lambda params: loss(vg.replace_states(by_hand, params), x)

    @jax.jit
    def step_by_hand(params, opt_state):
        value, grads = jax.value_and_grad(of_params)(params)
        extra_args = {"value": value, "grad": grads, "value_fn": of_params}
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(3):
        grads, value = gradient(model, x)
        model, opt = opt.step(model, grads, value=value, grad=grads, value_fn=value_fn)
        params, opt_state = step_by_hand(params, opt_state)
    assert tree_allclose(opt.params(model), params)
    assert loss(model, x) < loss(make_mlp(), x)


def test_a_line_search_in_one_of_two_groups():
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    func = lambda tree: jnp.sum((tree["a"] * tree["b"] - 1.0) ** 2)
    opt = vg.Optimizer({"a": optax.lbfgs(), "b": optax.sgd(0.0)}, tree)

    @jax.jit
    def step(tree, opt):
        grads, value = vg.vector_grad(func, True, return_value=True)(tree)
        return opt.step(tree, grads, value=value, grad=grads, value_fn=func)

    for _ in range(5):
        tree, opt = step(tree, opt)
    assert tree_allclose(tree, {"a": jnp.full(2, 1 / 3), "b": jnp.array(3.0)})


def test_the_arguments_of_a_value_fn_are_passed_on():
    tree = {"a": jnp.array([1.0, 2.0])}
    func = lambda tree, target: jnp.sum((tree["a"] - target) ** 2)
    opt = vg.Optimizer(optax.lbfgs(), tree)

    @jax.jit
    def step(tree, opt):
        grads, value = vg.vector_grad(func, True, return_value=True)(tree, 5.0)
        return opt.step(tree, grads, value=value, grad=grads, value_fn=func, target=5.0)

    for _ in range(5):
        tree, opt = step(tree, opt)
    assert tree_allclose(tree, {"a": jnp.full(2, 5.0)})


def test_complex_leaves_descend():
    tree = {"z": jnp.array(0j), "w": jnp.array([3.0, -2j])}
    func = lambda tree: jnp.abs(tree["z"] - (1 + 2j)) ** 2 + jnp.sum(jnp.abs(tree["w"]) ** 2)
    opt = vg.Optimizer(optax.sgd(0.1), tree)
    step = jax.jit(lambda tree, opt: opt.step(tree, vg.vector_grad(func, True)(tree)))
    for _ in range(200):
        tree, opt = step(tree, opt)
    assert tree_allclose(tree, {"z": jnp.array(1 + 2j), "w": jnp.zeros(2) + 0j})


def test_bfloat16_leaves_stay_bfloat16():
    tree = {"a": jnp.ones(3, "bfloat16")}
    opt = vg.Optimizer(optax.adam(0.25, mu_dtype="float32"), tree)
    grads = {"a": jnp.ones(3, "float32")}
    for _ in range(2):
        tree, opt = opt.step(tree, grads)
    assert tree["a"].dtype == jnp.bfloat16
    assert tree["a"].tolist() == [0.5] * 3


def test_units_go_through_unitful():
    tree = {"tau": jnp.array([20.0, 30.0]) * u.ms, "gain": jnp.ones(2)}
    func = lambda tree: (tree["gain"] * tree["tau"] - 10.0 * u.ms) ** 2
    tx = vg.unitful(optax.sgd(0.1), u.ms**2)
    opt = vg.Optimizer({"tau": tx, "gain": vg.unitful(optax.sgd(1e-4), u.ms**2)}, tree)
    grads = vg.vector_grad(func, "**", unit_aware=True)(tree)
    updated, _ = opt.step(tree, grads)
    assert u.get_unit(updated["tau"]) == u.ms
    assert tree_allclose(u.get_mantissa(updated["tau"]), jnp.array([18.0, 26.0]))


# The leaves that stay go on as if nothing had been added.
@pytest.mark.parametrize(
    "make", [lambda: optax.adam(1e-2), lambda: optax.sgd(1e-2, momentum=0.9)]
)
def test_unfreezing_keeps_the_moments_of_the_leaves_that_stay(make):
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    func = lambda tree: jnp.sum(tree["a"] ** 2) + jnp.sum(tree["b"] ** 2)
    alone, never_touched = tree, vg.Optimizer(make(), tree, "a")
    opt = never_touched
    for i in range(10):
        if i == 5:
            opt = opt.reselect(tree, True)
        selector = "a" if i < 5 else True
        tree, opt = opt.step(tree, vg.vector_grad(func, selector)(tree))
        grads = vg.vector_grad(func, "a")(alone)
        alone, never_touched = never_touched.step(alone, grads)
    assert tree_allclose(tree["a"], alone["a"], rtol=1e-6, atol=1e-6)
    assert bool(tree["b"][0] < 3.0)
    assert int(opt.count) == 10
    back = opt.reselect(tree, "a")
    assert tree_allclose(back.opt_state, never_touched.opt_state, rtol=1e-6, atol=1e-6)


def test_new_leaves_start_at_zero_and_dropped_ones_are_forgotten():
    model = make_mlp()
    model, opt = train(vg.Optimizer(optax.adam(1e-2), model, "layers.0"), model, "layers.0")
    opt = opt.reselect(model, "layers.[01]").reselect(model, "layers.1")
    (mu,) = [state.mu for state in opt.opt_state if hasattr(state, "mu")]
    assert set(mu) == {"layers.1.weight", "layers.1.bias"}
    assert all(not leaf.any() for leaf in mu.values())


def test_a_leaf_takes_its_moments_into_another_group():
    model = make_mlp()
    model, opt = train(vg.Optimizer(optax.adam(1e-2), model, "layers.2"), model, "layers.2")
    groups = {"layers.[01]": optax.adam(1e-4), "layers.2": optax.adam(1e-3)}
    new = opt.reselect(model, tx=groups)
    assert tree_allclose(new.opt_state["layers.2"], opt.opt_state)
    assert int(new.opt_state["layers.[01]"][0].count) == 0
    assert int(new.count) == 3
    train(new, model)


def test_a_leaf_of_another_shape_is_new():
    tree = {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, opt = vg.Optimizer(optax.adam(0.1), tree).step(tree, tree)
    opt = opt.reselect({"a": jnp.ones(4), "b": jnp.ones(3)})
    assert opt.opt_state[0].mu["a"].tolist() == [0.0] * 4
    assert opt.opt_state[0].mu["b"].any()


def test_a_state_that_mixes_leaves_cannot_be_taken_apart():
    tree = {"a": jnp.ones(2), "b": jnp.ones(3)}
    opt = vg.Optimizer(optax.flatten(optax.adam(0.1)), tree)
    with pytest.raises(ValueError, match="a state that mixes the leaves, in a f.*Make a new"):
        opt.reselect(tree, "a")


MODEL = {"a": jnp.ones(2), "b": jnp.ones(3), "n": jnp.arange(2)}
WRONG_MAKING = {
    "not a transformation": (
        lambda: vg.Optimizer(optax.adam, MODEL),  # pyright: ignore[reportArgumentType]
        TypeError,
        r"`Optimizer\(tx=...\)` must be an optax transformation, such as `optax.adam",
    ),
    "not one in a group": (
        lambda: vg.Optimizer({"a": 1e-3}, MODEL),  # pyright: ignore[reportArgumentType]
        TypeError,
        "or a dict from selector to transformation. Got 0.001",
    ),
    "no group": (
        lambda: vg.Optimizer({}, MODEL),
        ValueError,
        "must have at least one group. Got {}",
    ),
    "in two groups": (
        lambda: vg.Optimizer({"*": optax.sgd(1.0), "b": optax.sgd(1.0)}, MODEL),
        ValueError,
        "into one group. Got `b` in two: '\\*' and 'b'. Narrow one",
    ),
    "in no group": (
        lambda: vg.Optimizer({"a": optax.sgd(1.0)}, MODEL),
        ValueError,
        "into one group. Got `b` in none. Add a group, or freeze",
    ),
    "an empty group": (
        lambda: vg.Optimizer({"a": optax.sgd(1.0), "b": optax.sgd(1.0)}, MODEL, "a"),
        ValueError,
        "must give a leaf to each group. Got none for 'b', because `selector` chooses no",
    ),
    "a group of nothing": (
        lambda: vg.Optimizer({"n": optax.sgd(1.0)}, MODEL),
        ValueError,
        r"`Optimizer\(tx=...\)` must select inexact arrays. Got path\('n'\)",
    ),
    "units without unitful": (
        lambda: vg.Optimizer(optax.sgd(1.0), {"t": 1.0 * u.ms}),
        TypeError,
        r"must be made by `vg.unitful\(tx, loss_unit=...\)`.* Got another one for `t`",
    ),
}


@pytest.mark.parametrize("case", WRONG_MAKING.values(), ids=WRONG_MAKING.keys())
def test_wrong_optimizers(case):
    make, error, match = case
    with pytest.raises(error, match=match):
        make()


GOOD = {"a": jnp.ones(2), "b": jnp.ones(3)}
WRONG_GRADIENTS = {
    "missing": ({"a": jnp.ones(2)}, ValueError, "Got none at `b`"),
    "unknown": (GOOD | {"c": jnp.ones(1)}, ValueError, "Got one at `c`, which is not chosen"),
    "shape": (
        GOOD | {"b": jnp.ones(4)},
        ValueError,
        r"Got f\d+\[4\] for a leaf of shape \(3,\)",
    ),
    "None": (GOOD | {"b": None}, ValueError, "Got None at `b`"),
    "integers": (GOOD | {"b": jnp.arange(3)}, ValueError, r"Got i\d+\[3\] at `b`"),
    "unit": (
        GOOD | {"b": jnp.ones(3) * u.ms},
        ValueError,
        r"Got a gradient in ms without `vg.unitful",
    ),
    "two faults": ({"a": jnp.ones(3)}, ValueError, "Got none at `b`, f.* at `a`"),
    "a module": (
        make_mlp(),
        TypeError,
        r"a dict from dotted path.*Got a `MLP`.*`vg.states\(grads\)` is such a dict",
    ),
}


@pytest.mark.parametrize("name", ["var_grads", "grad"])
@pytest.mark.parametrize("case", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS.keys())
def test_wrong_gradients(case, name):
    grads, error, match = case
    opt = vg.Optimizer(optax.sgd(1.0), MODEL)
    arguments = {"var_grads": GOOD, name: grads}
    with pytest.raises(error, match=rf"(?s)`Optimizer.step\({name}=...\)` must.*{match}"):
        opt.step(MODEL, **arguments)


def test_gradients_of_equinox_are_named_by_states():
    model, x = make_mlp(), jnp.ones(3)
    grads = eqx.filter_grad(loss)(model, x)
    opt = vg.Optimizer(optax.sgd(0.1), model)
    ours, _ = opt.step(model, vg.states(grads))
    assert tree_allclose(ours, opt.step(model, gradients(model))[0])


def test_the_state_of_another_selection_is_refused():
    opt, other = [vg.Optimizer(optax.adam(0.1), MODEL, name) for name in ("a", "b")]
    wrong = eqx.tree_at(lambda opt: opt.opt_state, opt, other.opt_state)
    with pytest.raises(ValueError, match="must be for the selection.*`a`. Got (.|\n)*resel"):
        wrong.step(MODEL, {"a": jnp.ones(2)})


def test_a_model_without_the_leaf_is_refused():
    opt = vg.Optimizer(optax.adam(0.1), MODEL, "a")
    with pytest.raises(
        ValueError, match="Got a `dict` without an inexact array at `a`. Its ne"
    ):
        opt.step({"b": jnp.ones(3)}, {"a": jnp.ones(2)})


def test_one_optimizer_for_each_model_of_an_ensemble(getkey):
    models = eqx.filter_vmap(lambda key: eqx.nn.MLP(3, 2, 8, 2, key=key))(jr.split(getkey(), 4))

    @eqx.filter_vmap
    def fit(model):
        return vg.Optimizer(optax.adam(1e-2), model).step(model, gradients(model))[0]

    fitted = fit(models)
    arrays, static = eqx.partition(models, eqx.is_array)
    second = eqx.combine(jax.tree.map(lambda leaf: leaf[1], arrays), static)
    alone, _ = vg.Optimizer(optax.adam(1e-2), second).step(second, gradients(second))
    assert tree_allclose(
        jax.tree.map(lambda leaf: leaf[1], eqx.filter(fitted, eqx.is_array)),
        eqx.filter(alone, eqx.is_array),
    )
    assert apply(alone, jnp.ones(3)).shape == (2,)


@pytest.mark.parametrize(
    "given", [jnp.array(1.0), 1.0 * u.mvolt, (GOOD, jnp.array(1.0))], ids=["", "unit", "both"]
)
def test_value_and_gradients_in_the_wrong_order(given):
    opt = vg.Optimizer(optax.sgd(1.0), MODEL)
    match = r"With `return_value=True` it gives `\(var_grads, value\)`"
    with pytest.raises(TypeError, match=match):
        opt.step(MODEL, given)


def test_a_scheduled_hyperparameter_says_so():
    schedule = optax.constant_schedule(0.1)
    opt = vg.Optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=schedule), MODEL)
    with pytest.raises(ValueError, match="Got `learning_rate`, which a schedule sets.* a num"):
        opt.set_hyperparams(learning_rate=0.2)
