"""On eight devices, which JAX must be told of before it starts: in a process of their own."""

import re
from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import pytest
import vgrad_eqx as vg
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ..helpers import NUM_DEVICES, run_on_eight_devices, tree_allclose


inside = pytest.mark.skipif(
    jax.device_count() < NUM_DEVICES, reason="runs in a process with eight devices, see above"
)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() >= NUM_DEVICES, reason="this is that process")
def test_on_eight_devices():
    output = run_on_eight_devices(__file__)
    assert re.search(r"\d\d passed, 1 deselected", output), output


# For each layout: how a matrix and a vector lie, and a batch.
LAYOUTS: dict[str, Any] = {
    "data-parallel": (P(), P(), P(("data", "model"))),
    "fully sharded": (P(("data", "model")), P(("data", "model")), P(("data", "model"))),
    "two axes": (P("data", "model"), P("data"), P("data")),
    "model-parallel": (P("model"), P("model"), P("data")),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def make_problem(layout, mesh=None):
    """A model, a batch, and both on all devices."""
    matrix, vector, rows = layout
    mesh = make_mesh() if mesh is None else mesh
    model = eqx.nn.MLP(16, 16, 64, 2, key=jr.key(0))
    x = jr.normal(jr.key(1), (32, 16))

    def put(leaf):
        if not eqx.is_array(leaf):
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, matrix if leaf.ndim == 2 else vector))

    return model, x, jtu.tree_map(put, model), jax.device_put(x, NamedSharding(mesh, rows))


def loss(model, x):
    return jnp.mean(jax.vmap(model)(x) ** 2, axis=0)


def lies_like(array, leaf):
    return array.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def assert_lie_alike(arrays, leaves):
    assert [name for name in leaves if not lies_like(arrays[name], leaves[name])] == []


def compile_by_jax(func, model, *args):
    arrays, static = eqx.partition(model, eqx.is_array)
    compiled = jax.jit(lambda arrays, *args: func(eqx.combine(arrays, static), *args))
    return compiled.lower(arrays, *args), lambda: compiled(arrays, *args)


GRADIENTS: dict[str, Any] = {
    "jax.jit": lambda func, *args: compile_by_jax(func, *args)[1](),
    "vg.jit": lambda func, *args: vg.jit(func)(*args),
    "eqx.filter_jit": lambda func, *args: eqx.filter_jit(func)(*args),
}


@inside
@layouts
@pytest.mark.parametrize("way", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_lie_like_their_leaves(way, layout):
    model, x, sharded, xs = make_problem(layout)
    transform = vg.vector_grad(loss, True)
    grads = way(transform, sharded, xs)
    assert_lie_alike(grads, vg.states(sharded))
    assert tree_allclose(jax.device_get(grads), jax.device_get(transform(model, x)))


@inside
@layouts
def test_gradients_of_states_lie_like_their_values(layout):
    model, x, sharded, xs = make_problem(layout)
    names = list(vg.states(model))
    states = {name: vg.State(leaf) for name, leaf in vg.states(sharded).items()}

    def func(x):
        return loss(vg.replace_states(model, {name: states[name].value for name in names}), x)

    grads = jax.jit(lambda xs: vg.vector_grad(func, states)(xs))(xs)
    assert_lie_alike(grads, vg.states(sharded))
    expected = vg.vector_grad(loss, True)(model, x)
    assert tree_allclose(jax.device_get(grads), jax.device_get(expected))


@inside
def test_gradients_over_explicit_axes():
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        w = jax.device_put(jr.normal(jr.key(0), (16, 8)), P(None, "model"))
        x = jax.device_put(jr.normal(jr.key(1), (32, 16)), P("data", None))
        func = vg.vector_grad(lambda tree, x: jnp.tanh(x @ tree["w"]), True)
        for grads in (jax.jit(func)({"w": w}, x), vg.jit(func)({"w": w}, x)):
            assert lies_like(grads["w"], w)
        assert "_where" not in str(jax.make_jaxpr(func)({"w": w}, x))
        expected = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)
        assert tree_allclose(jax.device_get(grads["w"]), jax.device_get(expected))


@inside
def test_inside_of_shard_map():
    model, x, sharded, xs = make_problem(LAYOUTS["data-parallel"])
    mesh = make_mesh()
    arrays, static = eqx.partition(sharded, eqx.is_array)

    def gradient(arrays, x):
        grads = vg.vector_grad(loss, True)(eqx.combine(arrays, static), x)
        return jax.lax.pmean(grads, ("data", "model"))

    each = jax.jit(
        jax.shard_map(
            gradient,
            mesh=mesh,
            in_specs=(P(), P(("data", "model"))),
            out_specs=P(),
            check_vma=False,
        )
    )
    grads = each(arrays, xs)
    expected = vg.vector_grad(loss, True)(model, x)
    assert tree_allclose(jax.device_get(grads), jax.device_get(expected))
    assert "_where" not in str(jax.make_jaxpr(each)(arrays, xs))


TRANSFORMATIONS = {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(1e-2)}


def step_in_one(tx, model, x, steps=3, **options):
    step = vg.train_step(loss, tx, **options)
    state = step.init(model)
    for _ in range(steps):
        state, _ = step(state, x)
    return step, state


@inside
@layouts
@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys())
def test_a_training_step_keeps_where_everything_lies(tx, layout):
    model, x, sharded, xs = make_problem(layout)
    step, state = step_in_one(tx, sharded, xs)
    before = step.init(sharded)
    for array, leaf in zip(state.leaves, before.leaves, strict=True):
        assert leaf.sharding.num_devices == NUM_DEVICES
        assert lies_like(array, leaf)
    assert (
        step.lower(before, xs).compile().as_text() == step.lower(state, xs).compile().as_text()
    )
    _, alone = step_in_one(tx, model, x)
    assert tree_allclose(
        jax.device_get(vg.states(state.model)), jax.device_get(vg.states(alone.model))
    )


@inside
@layouts
def test_a_training_step_over_states_keeps_where_everything_lies(layout):
    model, x, sharded, xs = make_problem(layout)
    states = {name: vg.State(leaf) for name, leaf in vg.states(sharded).items()}

    def func(x):
        values = {name: state.value for name, state in states.items()}
        return loss(vg.replace_states(model, values), x)

    step = vg.train_step(func, TRANSFORMATIONS["adam"], states)
    with step.init() as state:
        for _ in range(3):
            state, _ = step(state, xs)
    values = {name: state.value for name, state in states.items()}
    assert_lie_alike(values, vg.states(sharded))
    _, alone = step_in_one(TRANSFORMATIONS["adam"], model, x)
    assert tree_allclose(jax.device_get(values), jax.device_get(vg.states(alone.model)))


@inside
@layouts
def test_optimizers_keep_where_everything_lies(layout):
    model, x, sharded, xs = make_problem(layout)
    tx = TRANSFORMATIONS["adam"]

    @eqx.filter_jit
    def step(model, opt, x):
        return opt.step(model, vg.vector_grad(loss, True)(model, x))

    def run(model, x):
        opt = vg.Optimizer(tx, model)
        for _ in range(3):
            model, opt = step(model, opt, x)
        return vg.states(model), opt

    params, opt = run(sharded, xs)
    assert_lie_alike(params, vg.states(sharded))
    for moment in (opt.opt_state[0].mu, opt.opt_state[0].nu):
        assert_lie_alike(moment, vg.states(sharded))
    expected, _ = run(model, x)
    assert tree_allclose(jax.device_get(params), jax.device_get(expected))


@inside
@layouts
@pytest.mark.parametrize("tx", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys())
def test_optimizers_of_states_keep_where_everything_lies(tx, layout):
    model, x, sharded, xs = make_problem(layout)
    states = {name: vg.State(leaf) for name, leaf in vg.states(sharded).items()}
    opt = vg.StateOptimizer(tx, states)

    def func(x):
        values = {name: state.value for name, state in states.items()}
        return loss(vg.replace_states(model, values), x)

    @jax.jit
    def step(x):
        opt.step(vg.vector_grad(func, states)(x))

    for _ in range(3):
        step(xs)
    values = {name: state.value for name, state in states.items()}
    assert_lie_alike(values, vg.states(sharded))
    _, alone = step_in_one(tx, model, x)
    assert tree_allclose(jax.device_get(values), jax.device_get(vg.states(alone.model)))


@inside
@layouts
def test_a_state_that_is_set_to_a_constant_keeps_where_it_lies(layout):
    _, _, sharded, _ = make_problem(layout)
    states = {name: vg.State(leaf) for name, leaf in vg.states(sharded).items()}

    @vg.jit
    def reset():
        for state in states.values():
            state.value = jnp.zeros(state.value.shape)

    reset()
    values = {name: state.value for name, state in states.items()}
    assert_lie_alike(values, vg.states(sharded))
    assert not any(value.any() for value in values.values())


def count_collectives(compiled):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return Counter(re.findall(rf" ({names})(?:-start)?\(", compiled.as_text()))


def compile_by_hand(tx, model, xs):
    """The same step over a tuple of arrays, with the layout that each has asked for."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    arrays, structure = jtu.tree_flatten((params, tx.init(params)))

    def step(arrays, xs):
        params, opt_state = jtu.tree_unflatten(structure, arrays)
        func = lambda params: jnp.sum(loss(eqx.combine(params, static), xs))
        updates, opt_state = tx.update(jax.grad(func)(params), opt_state, params)
        return jtu.tree_leaves((optax.apply_updates(params, updates), opt_state))

    shardings = [leaf.sharding if leaf.ndim else None for leaf in arrays]
    return jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(arrays, xs).compile()


@inside
@layouts
def test_no_array_is_gathered_without_need(layout):
    _, _, sharded, xs = make_problem(layout)
    tx = TRANSFORMATIONS["adam"]
    step = vg.train_step(loss, tx)
    ours = count_collectives(step.lower(step.init(sharded), xs).compile())
    by_hand = count_collectives(compile_by_hand(tx, sharded, xs))
    assert sum(ours.values()) > 0
    assert ours["all-gather"] <= by_hand["all-gather"]
    assert sum(ours.values()) <= sum(by_hand.values())
    if layout is LAYOUTS["data-parallel"]:
        assert set(ours) == {"all-reduce"}


@inside
def test_another_layout_is_another_program():
    tx = TRANSFORMATIONS["sgd"]
    step = vg.train_step(loss, tx)
    for layout in LAYOUTS.values():
        _, _, sharded, xs = make_problem(layout)
        state, _ = step(step.init(sharded), xs)
        assert_lie_alike(vg.states(state.model), vg.states(sharded))


@inside
def test_a_checkpoint_is_loaded_to_where_it_is_asked_for(tmp_path):
    _, _, sharded, xs = make_problem(LAYOUTS["two axes"])
    step, state = step_in_one(TRANSFORMATIONS["adam"], sharded, xs)
    vg.save(tmp_path / "checkpoint", state)
    loaded = vg.load(tmp_path / "checkpoint", step.init(sharded))
    assert_lie_alike(vg.states(loaded.model), vg.states(sharded))
    before, _ = step(state, xs)
    after, _ = step(loaded, xs)
    assert tree_allclose(
        jax.device_get(vg.states(before.model)), jax.device_get(vg.states(after.model))
    )
