"""Compiled training steps, and the states that they take over."""

import dataclasses
import gc
from typing import Any

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import count_instructions, make_mlp, tree_allclose


def loss(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2)


def make_batch(seed=0, lead=()):
    keys = jr.split(jr.key(seed))
    return jr.normal(keys[0], (*lead, 5, 3)), jr.normal(keys[1], (*lead, 5, 2))


def by_hand(model, tx, num_steps, selector: Any = True, func=loss):
    opt_state = tx.init(vg.states(model, selector))

    @eqx.filter_jit
    def step(model, opt_state, *batch):
        grads = vg.vector_grad(func, selector)(model, *batch)
        updates, opt_state = tx.update(grads, opt_state, vg.states(model, selector))
        return vg.apply_updates(model, updates), opt_state

    for i in range(num_steps):
        model, opt_state = step(model, opt_state, *make_batch(i))
    return model


def run(step: Any, state, num_calls):
    metrics: Any = None
    for i in range(num_calls):
        state, metrics = step(state, *make_batch(i))
    return state, metrics


PACKED = pytest.mark.parametrize("packed", [False, True], ids=["flat", "packed"])


@PACKED
@pytest.mark.parametrize("selector", [True, "**.weight", ["layers.0", "layers.2.bias"]])
def test_equals_a_loop_by_hand(selector, packed):
    model = make_mlp()
    step = vg.train_step(loss, optax.adamw(1e-2), selector, packed=packed)
    state, metrics = run(step, step.init(model), 4)
    union = vg.path("layers.0", "layers.2.bias") if isinstance(selector, list) else selector
    assert tree_allclose(state.model, by_hand(model, optax.adamw(1e-2), 4, union))
    before = by_hand(model, optax.adamw(1e-2), 3, union)
    assert tree_allclose(metrics.value, loss(before, *make_batch(3)))
    assert metrics.aux is None
    assert metrics.grad_norms is None


def test_many_small_arrays_and_a_large_one_are_packed():
    model = eqx.nn.MLP(3, 2, 80, 12, key=jr.key(0))
    states = {}
    for packed in (False, True):
        step = vg.train_step(
            loss, {"**.weight": optax.adam(1e-2), "**.bias": optax.lion(1e-3)}, packed=packed
        )
        states[packed], _ = run(step, step.init(model), 3)
    assert tree_allclose(states[True].model, states[False].model)
    assert tree_allclose(states[True].optimizer, states[False].optimizer)
    # Each of the 11 matrices of 80 x 80 stays alone, in the parameters and in two moments.
    assert len(states[True].leaves) == 3 * 11 + 5


def test_a_vector_of_losses_is_added_up():
    losses = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2, axis=1)
    step = vg.train_step(losses, optax.sgd(1e-2))
    state, metrics = run(step, step.init(make_mlp()), 2)
    assert metrics.value.shape == (5,)
    total = lambda model, x, y: jnp.sum(losses(model, x, y))
    assert tree_allclose(state.model, by_hand(make_mlp(), optax.sgd(1e-2), 2, func=total))


def test_auxiliary_data_and_norms_come_with_the_metrics():
    func = lambda model, x, y: (loss(model, x, y), {"mean": x.mean()})
    step = vg.train_step(func, optax.sgd(1e-2), "**.bias", has_aux=True, grad_norms=True)
    _, metrics = run(step, step.init(make_mlp()), 1)
    x, y = make_batch(0)
    assert tree_allclose(metrics.aux, {"mean": x.mean()})
    grads = vg.vector_grad(loss, "**.bias")(make_mlp(), x, y)
    assert tree_allclose(metrics.grad_norms, vg.grad_norms(grads))
    assert tree_allclose(metrics.value, loss(make_mlp(), x, y))


@PACKED
def test_several_steps_in_one_call(packed):
    step = vg.train_step(loss, optax.adam(1e-2), steps_per_call=3, packed=packed)
    batches = jax.tree.map(lambda *x: jnp.stack(x), *[make_batch(i) for i in range(3)])
    state, metrics = step(step.init(make_mlp()), *batches)
    assert tree_allclose(state.model, by_hand(make_mlp(), optax.adam(1e-2), 3))
    assert metrics.value.shape == (3,)
    assert state.count == 3
    assert int(state.optimizer.count) == 3


def test_accumulated_gradients_are_those_of_the_whole_batch():
    x, y = make_batch(0, (4,))
    step = vg.train_step(loss, optax.adam(1e-2), accumulate=4, grad_norms=True)
    state, metrics = step(step.init(make_mlp()), x, y)
    whole = vg.train_step(loss, optax.adam(1e-2), grad_norms=True)
    at_once, whole_metrics = whole(whole.init(make_mlp()), x.reshape(-1, 3), y.reshape(-1, 2))
    assert tree_allclose(state.model, at_once.model)
    assert tree_allclose(metrics.grad_norms, whole_metrics.grad_norms)
    assert metrics.value.shape == (4,)
    assert tree_allclose(metrics.value.mean(), whole_metrics.value)


def test_accumulated_gradients_of_bfloat16_are_added_in_float32():
    func = lambda tree, x: jnp.sum(tree["a"] * x)
    step = vg.train_step(func, optax.sgd(1.0), accumulate=3)
    x = jnp.array([[256.0], [1.0], [1.0]], "bfloat16")
    state, _ = step(step.init({"a": jnp.zeros(1, "bfloat16")}), x)
    assert state.model["a"].dtype == jnp.bfloat16
    assert float(state.model["a"][0]) == -86.0


@pytest.mark.slow
def test_accumulation_within_several_steps_and_a_line_search():
    x, y = make_batch(0, (2, 4))
    step = vg.train_step(loss, optax.lbfgs(), steps_per_call=2, accumulate=4)
    state, _ = step(step.init(make_mlp()), x, y)
    whole = vg.train_step(loss, optax.lbfgs())
    at_once = whole.init(make_mlp())
    for i in range(2):
        at_once, _ = whole(at_once, x[i].reshape(-1, 3), y[i].reshape(-1, 2))
    assert tree_allclose(state.model, at_once.model, rtol=1e-3, atol=1e-3)


def test_each_step_is_passed_a_fresh_key():
    seen = lambda tree, key: (jnp.sum(tree["a"] ** 2), jr.normal(key))
    step = vg.train_step(seen, optax.sgd(0.1), has_aux=True)
    for key in (jr.key(3), jr.PRNGKey(3)):
        state = step.init({"a": jnp.ones(2)}, key=key)
        for _ in range(3):
            key, subkey = jr.split(key)
            state, metrics = step(state)
            assert metrics.aux == jr.normal(subkey)
        assert jnp.array_equal(state.key, key)
        assert state.key.dtype == key.dtype
    assert step.init({"a": jnp.ones(2)}, key=jr.key(0)).optimizer.count == 0
    parts = vg.train_step(seen, optax.sgd(0.1), has_aux=True, accumulate=2)
    _, metrics = parts(parts.init({"a": jnp.ones(2)}, key=jr.key(3)))
    assert tree_allclose(metrics.aux, jax.vmap(jr.normal)(jr.split(jr.split(jr.key(3))[1], 2)))


class Normed(eqx.Module):
    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self, key):
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")
        self.linear = eqx.nn.Linear(3, 2, key=key)

    def __call__(self, x, state):
        x, state = self.norm(x, state)
        return self.linear(x), state


def normed_loss(model, state, x, y):
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    pred, state = batched(x, state)
    return jnp.mean((pred - y) ** 2), state


@pytest.mark.parametrize("has_aux", [False, True])
def test_the_state_of_batch_norm_is_carried_along(has_aux):
    def func(model, state, x, y):
        value, state = normed_loss(model, state, x, y)
        return value, ((state, x.mean()) if has_aux else state)

    model, nn_state = eqx.nn.make_with_state(Normed)(jr.key(0))
    step = vg.train_step(func, optax.sgd(1e-1), has_aux=has_aux)
    state, metrics = run(step, step.init(model, nn_state=nn_state), 3)
    expected, opt_state = model, None
    tx = optax.sgd(1e-1)
    for i in range(3):
        gradient = eqx.filter_value_and_grad(normed_loss, has_aux=True)
        (_, nn_state), grads = gradient(expected, nn_state, *make_batch(i))
        updates, _ = tx.update(grads, tx.init(eqx.filter(expected, eqx.is_inexact_array)))
        expected = eqx.apply_updates(expected, updates)
    assert opt_state is None
    assert tree_allclose(state.model, expected)
    assert tree_allclose(
        jax.tree.leaves(state.nn_state), jax.tree.leaves(nn_state), rtol=1e-4, atol=1e-4
    )
    assert (metrics.aux is not None) is has_aux


def test_each_part_of_an_accumulated_batch_sets_the_state_of_batch_norm():
    model, nn_state = eqx.nn.make_with_state(Normed)(jr.key(0))
    step = vg.train_step(normed_loss, optax.sgd(1e-1), accumulate=2)
    x, y = make_batch(lead=(2,))
    state, _ = step(step.init(model, nn_state=nn_state), x, y)
    for i in range(2):
        _, nn_state = normed_loss(model, nn_state, x[i], y[i])
    assert tree_allclose(jax.tree.leaves(state.nn_state), jax.tree.leaves(nn_state))


def test_a_line_search_with_the_state_of_batch_norm():
    model, nn_state = eqx.nn.make_with_state(Normed)(jr.key(0))
    step = vg.train_step(normed_loss, optax.lbfgs())
    state = step.init(model, nn_state=nn_state)
    values = []
    for _ in range(3):
        state, metrics = step(state, *make_batch())
        values.append(float(metrics.value))
    assert values[2] < values[0]


def test_what_is_frozen_stays_and_is_not_copied():
    model = make_mlp()
    step = vg.train_step(loss, optax.adamw(1e-2, weight_decay=0.5), "layers.2")
    state, _ = run(step, step.init(model), 2)
    assert state.model.layers[0].weight is model.layers[0].weight
    assert tree_allclose(
        state.model, by_hand(model, optax.adamw(1e-2, weight_decay=0.5), 2, "layers.2")
    )


def test_the_first_model_and_all_that_is_taken_out_live_on():
    model = make_mlp()
    step = vg.train_step(loss, optax.adam(1e-2))
    state, _ = run(step, step.init(model), 1)
    taken, optimizer = state.model, state.optimizer
    assert state.model is taken
    run(step, state, 3)
    for tree in (model, taken, optimizer):
        assert all(
            jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))
        )


def test_a_state_that_was_taken_over_says_so():
    step = vg.train_step(loss, optax.adam(1e-2))
    old = step.init(make_mlp(), key=None)
    run(step, old, 1)
    assert repr(old) == "TrainState(donated)"
    for use in (
        lambda: step(old, *make_batch()),
        lambda: old.model,
        lambda: old.optimizer,
        lambda: old.key,
        lambda: old.nn_state,
        lambda: step.lower(old, *make_batch()),
    ):
        with pytest.raises(
            RuntimeError, match="This `TrainState` was donated to a step.*Go on"
        ):
            use()


def test_an_error_leaves_the_state_as_it_was():
    step = vg.train_step(loss, optax.adam(1e-2))
    state, _ = run(step, step.init(make_mlp()), 1)
    with pytest.raises(TypeError, match="incompatible shapes"):
        step(state, jnp.ones((5, 3)), jnp.ones((4, 2)))
    assert run(step, state, 1)[0].count == 2


def test_an_optimizer_goes_on_in_another_step():
    model = make_mlp()
    first = vg.train_step(loss, optax.adam(1e-2), "layers.2")
    state, _ = run(first, first.init(model), 3)
    groups = {"layers.[01]": optax.adam(1e-3), "layers.2": optax.adam(1e-2)}
    opt = state.optimizer.reselect(state.model, tx=groups)
    second = vg.train_step(loss, groups)
    state, _ = run(second, second.init(state.model, optimizer=opt), 2)
    assert state.count == 5
    assert int(state.optimizer.opt_state["layers.2"][0].count) == 5
    assert int(state.optimizer.opt_state["layers.[01]"][0].count) == 2


def test_an_optimizer_that_is_given_is_not_made_again():
    adam, calls = optax.adam(1e-2), []

    def init(params):
        calls.append(params)
        return adam.init(params)

    tx = optax.GradientTransformation(init, adam.update)
    step = vg.train_step(loss, tx)
    opt = vg.Optimizer(tx, make_mlp())
    step.init(make_mlp(), optimizer=opt)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"packed": True}, {"grad_norms": True}])
def test_one_trace_for_a_thousand_steps(options):
    once = eqx.debug.assert_max_traces(max_traces=1)
    step = vg.train_step(once(loss), optax.adam(1e-3), **options)
    state = step.init(make_mlp())
    x, y = make_batch()
    for _ in range(1000):
        state, _ = step(state, x, y)
    assert state.count == 1000
    again = step.init(make_mlp(seed=1))
    again, _ = step(again, x, y)
    assert again.count == 1


def test_steps_keep_nothing_alive():
    step = vg.train_step(loss, optax.adam(1e-3))
    state, _ = run(step, step.init(make_mlp()), 2)
    gc.collect()
    before = len(jax.live_arrays())
    x, y = make_batch()
    for _ in range(50):
        state, _ = step(state, x, y)
    del x, y
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_donation_halves_the_peak():
    model = eqx.nn.MLP(3, 2, 256, 4, key=jr.key(0))
    tx = optax.adam(1e-3)
    step = vg.train_step(loss, tx)
    state = step.init(model)
    ours = step.lower(state, *make_batch()).compile().memory_analysis()
    params, static = eqx.partition(model, eqx.is_array)

    def by_hand(params, opt_state, x, y):
        value, grads = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), x, y))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, value

    lowered = jax.jit(by_hand).lower(params, tx.init(params), *make_batch())
    theirs = lowered.compile().memory_analysis()
    peak = lambda m: m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    assert peak(ours) < 0.51 * peak(theirs)


def test_the_program_is_that_of_a_step_by_hand():
    model, tx, batch = make_mlp(), optax.adam(1e-3), make_batch()
    step = vg.train_step(loss, tx)
    leaves, structure = jax.tree.flatten(model)
    places = [i for i, leaf in enumerate(leaves) if eqx.is_array(leaf)]
    params = tuple([leaves[i] for i in places])

    def by_hand(params, opt_state, x, y):
        def value(params):
            filled = list(leaves)
            for i, param in zip(places, params, strict=True):
                filled[i] = param
            return loss(jax.tree.unflatten(structure, filled), x, y)

        result, grads = jax.value_and_grad(value)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, result

    lowered = jax.jit(by_hand, donate_argnums=(0, 1)).lower(params, tx.init(params), *batch)
    expected = count_instructions(lowered.compile())
    compiled = step.lower(step.init(model), *batch).compile()
    assert count_instructions(compiled) == expected
    states = [vg.State(param) for param in params]

    def of_states(x, y):
        filled = list(leaves)
        for i, state in zip(places, states, strict=True):
            filled[i] = state.value
        return loss(jax.tree.unflatten(structure, filled), x, y)

    over_states = vg.train_step(of_states, tx, states)
    compiled = over_states.lower(over_states.init(), *batch).compile()
    assert count_instructions(compiled) == expected


def test_units_go_through_unitful():
    tree = {"tau": jnp.array([20.0, 30.0]) * u.ms, "gain": jnp.ones(2)}
    func = lambda tree: (tree["gain"] * tree["tau"] - 10.0 * u.ms) ** 2
    step = vg.train_step(func, vg.unitful(optax.sgd(1e-4), u.ms**2), packed=True)
    state, metrics = step(step.init(tree))
    assert u.get_unit(metrics.value) == u.ms**2
    assert u.get_unit(state.model["tau"]) == u.ms
    assert tree_allclose(u.get_mantissa(state.model["tau"]), jnp.array([19.998, 29.996]))


def test_complex_leaves_descend():
    func = lambda tree: jnp.abs(tree["z"] - (1 + 2j)) ** 2
    step = vg.train_step(func, optax.sgd(0.1))
    state = step.init({"z": jnp.array(0j)})
    for _ in range(200):
        state, _ = step(state)
    assert tree_allclose(state.model, {"z": jnp.array(1 + 2j)})


def test_a_state_is_a_pytree():
    step = vg.train_step(loss, optax.adam(1e-2))
    state = jax.block_until_ready(step.init(make_mlp()))
    moved = jax.device_put(state, jax.devices()[0])
    assert repr(moved) == "TrainState(count=0, arrays=19)"
    assert run(step, moved, 1)[0].count == 1


def test_steps_do_not_wait():
    step = vg.train_step(loss, optax.adam(1e-2))
    state = step.init(make_mlp())
    with jax.transfer_guard_device_to_host("disallow"):
        run(step, state, 3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda value, nn_state: value,
            r"return a pair `\(value, nn_state\)`, because .* Got f(32|64)\[\]",
        ),
        (lambda value, nn_state: (nn_state, value), r"return `\(value, nn_state\)`\."),
    ],
)
def test_an_output_without_its_state_is_refused(change, match):
    def make(key):
        return eqx.nn.BatchNorm(2, "batch", mode="batch")

    def loss(model, nn_state, x):
        batched = jax.vmap(lambda x: model(x, nn_state), axis_name="batch", out_axes=(0, None))
        y, nn_state = batched(x)
        return change(jnp.mean(y**2), nn_state)

    model, nn_state = eqx.nn.make_with_state(make)(jr.key(0))
    step = vg.train_step(loss, optax.sgd(0.1))
    with pytest.raises(TypeError, match=match):
        step(step.init(model, nn_state=nn_state), jnp.ones((4, 2)))


def test_metrics_show_their_numbers():
    aux = {"a": jnp.array(0.5), "b": jnp.ones(3, "float32")}
    metrics = vg.Metrics(jnp.array(2.0), aux, None)
    assert repr(metrics) == "Metrics(value=2.0, aux={'a': 0.5, 'b': f32[3]})"


def test_a_line_search_without_its_arguments_says_how_to_pass_them():
    opt = vg.Optimizer(optax.lbfgs(), {"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="'value_fn'") as info:
        opt.step({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    assert "opt.step(model, var_grads, value=value" in "".join(info.value.__notes__)


# Over states by reference


def make_states():
    w = vg.State(jnp.array([1.0, 2.0]), name="w")
    calls, scale = vg.State(0), vg.State(jnp.array(3.0))

    def func(x):
        calls.value += 1
        return jnp.sum((w.value * x - scale.value) ** 2)

    return w, calls, func


@PACKED
@pytest.mark.parametrize("options", [{}, {"steps_per_call": 2}, {"accumulate": 2}])
def test_states_are_set_when_asked(options, packed):
    w, calls, func = make_states()
    step = vg.train_step(func, optax.adam(0.1), {"w": w}, packed=packed, **options)
    state = step.init()
    x = jnp.full(2, 2.0) if options else 2.0
    for _ in range(3):
        state, _ = step(state, x)
    assert w.value.tolist() == [1.0, 2.0]
    assert int(calls.value) == 0
    state.sync()
    other, other_calls, func = make_states()
    opt = vg.StateOptimizer(optax.adam(0.1), {"w": other})
    for _ in range(3 * options.get("steps_per_call", 1)):
        opt.step(vg.vector_grad(func, {"w": other})(2.0))
    assert tree_allclose(w.value, other.value)
    assert int(calls.value) == 3 * len(options) + 3
    assert int(other_calls.value) in (3, 6)
    step(state, x)  # what was set is a copy
    assert jnp.isfinite(w.value).all()


def test_leaving_a_with_block_sets_the_states():
    w, calls, func = make_states()
    step = vg.train_step(func, optax.sgd(0.01), [w])
    with step.init() as state:
        for _ in range(3):
            state, _ = step(state, 2.0)
        assert int(calls.value) == 0
    assert int(calls.value) == 3
    with pytest.raises(ZeroDivisionError), step.init() as state:  # noqa: PT012
        state, _ = step(state, 2.0)
        raise ZeroDivisionError
    assert int(calls.value) == 4


@pytest.mark.parametrize("how", ["jit", "scan", "tree.map"])
def test_a_with_block_takes_no_other_state_for_the_last(how):
    w, calls, func = make_states()
    step = vg.train_step(func, optax.sgd(0.01), [w])

    def advance(state):
        if how == "jit":
            return jax.jit(step)(state, 2.0)[0]
        if how == "scan":
            return jax.lax.scan(step, state, jnp.array([2.0]))[0]
        return jax.tree.map(lambda new, old: new, step(state.copy(), 2.0)[0], state)

    def train(*, is_synced, num_more):
        with step.init(batch=(2.0,)) as state:
            state = advance(state)
            if is_synced:
                state.sync()
            for _ in range(num_more):
                state, _ = step(state, 2.0)
        return state

    with pytest.raises(RuntimeError, match=r"cannot tell which .* call `state.sync\(\)`"):
        train(is_synced=False, num_more=0)
    assert int(calls.value) == 0
    train(is_synced=True, num_more=0)
    assert int(calls.value) == 1
    train(is_synced=False, num_more=2)
    assert int(calls.value) == 4


def test_a_copy_goes_on_in_a_with_block():
    w, calls, func = make_states()
    step = vg.train_step(func, optax.sgd(0.01), [w])
    with step.init() as state:
        state, _ = step(state, 2.0)
        state, _ = step(state.copy(), 2.0)
        sums = jax.tree.map(jnp.sum, state)  # nobody's state any more
        del sums
        jax.tree.map(lambda _: None, state, is_leaf=lambda node: node is not state)
    assert int(calls.value) == 2


def test_a_step_that_is_only_traced_is_not_the_last_of_a_with_block():
    w, calls, func = make_states()
    step = vg.train_step(func, optax.sgd(0.01), [w])
    with step.init() as state:
        state, _ = step(state, 2.0)
        jax.eval_shape(step, state, 2.0)
    assert int(calls.value) == 1


@pytest.mark.parametrize("inside", [True, False])
def test_a_whole_training_over_states_under_jit(inside):
    (w, calls, func), (other, _, other_func) = make_states(), make_states()
    step = vg.train_step(func, optax.adam(0.1), {"w": w})

    @jax.jit
    def train(xs):
        state, _ = jax.lax.scan(step, step.init(batch=(xs[0],)), xs)
        if inside:
            state.sync()
        return state

    state = train(jnp.full(3, 2.0))
    if not inside:
        state.sync()
    by_steps = vg.train_step(other_func, optax.adam(0.1), {"w": other})
    with by_steps.init() as state:
        for _ in range(3):
            state, _ = by_steps(state, 2.0)
    assert tree_allclose(w.value, other.value)
    assert int(calls.value) == 3


def test_states_are_traced_twice_at_most():
    # Once to find out which states the function uses, and once with their values.
    w, _, func = make_states()
    twice = eqx.debug.assert_max_traces(max_traces=2)(func)
    step = vg.train_step(twice, optax.adam(0.1), [w])
    state = step.init(batch=(2.0,))
    for _ in range(100):
        state, _ = step(state, 2.0)
    assert state.count == 100


def test_a_key_and_an_optimizer_over_states():
    w = vg.State(jnp.array([1.0, 2.0]))
    opt = vg.StateOptimizer(optax.adam(0.1), [w])
    func = lambda key: (jnp.sum(w.value**2), jr.normal(key))
    step = vg.train_step(func, optax.adam(0.1), [w], has_aux=True)
    state = step.init(key=jr.key(3), optimizer=opt)
    key, subkey = jr.split(jr.key(3))
    state, metrics = step(state)
    assert metrics.aux == jr.normal(subkey)
    assert jnp.array_equal(state.key, key)
    assert int(opt.count) == 0
    assert int(state.optimizer.count) == 1
    state.sync()
    assert int(opt.count) == 1


def test_a_model_whose_loss_touches_states_sets_them_at_each_step():
    calls = vg.State(0)

    def func(model, x, y):
        calls.value += 1
        return loss(model, x, y)

    step = vg.train_step(func, optax.sgd(0.1))
    run(step, step.init(make_mlp()), 3)
    assert int(calls.value) == 3


STATE = vg.State(jnp.ones(2))
SGD = optax.sgd(1.0)


def call(step, *args):
    return step(step.init(make_mlp()), *args)


train_step: Any = vg.train_step
WRONG = {
    "func": (lambda: train_step(1, SGD), TypeError, r"`train_step\(func=...\)` must be a c"),
    "tx": (
        lambda: train_step(loss, 1e-3),
        TypeError,
        r"`train_step\(tx=...\)` must be an opt",
    ),
    "steps": (
        lambda: train_step(loss, SGD, steps_per_call=1.5),
        TypeError,
        r"`train_step\(steps_per_call=...\)` must be an int. Got 1.5",
    ),
    "parts": (
        lambda: train_step(loss, SGD, accumulate=0),
        ValueError,
        r"`train_step\(accumulate=...\)` must be at least 1. Got 0",
    ),
    "grad_states": (
        lambda: train_step(loss, SGD, None),
        TypeError,
        r"`train_step\(grad_states=...\)` must be a selector or states.*leave it out",
    ),
    "no model": (
        lambda: train_step(loss, SGD).init(),
        TypeError,
        r"needs the module whose leaves `grad_states` selects. Got none",
    ),
    "nothing": (
        lambda: train_step(loss, SGD, "activation").init(make_mlp()),
        ValueError,
        r"`train_step\(grad_states=...\)` must select inexact arrays",
    ),
    "a model for states": (
        lambda: train_step(loss, SGD, STATE).init({"a": 1.0}),
        TypeError,
        "so `init` takes no module. Got {'a': 1.0}. Let `func` close over it",
    ),
    "another selection": (
        lambda: train_step(loss, SGD, "layers.0.weight").init(
            make_mlp(), optimizer=vg.Optimizer(SGD, make_mlp(), "layers.1.bias")
        ),
        ValueError,
        "`layers.0.weight`. Got `layers.1.bias`. Use `optimizer.reselect",
    ),
    "no optimizer": (
        lambda: train_step(loss, SGD, "layers.0.weight").init(make_mlp(), optimizer=SGD),
        ValueError,
        "must be a `vg.Optimizer`.*Got `GradientTransformation",
    ),
    "other states": (
        lambda: train_step(loss, SGD, STATE).init(
            optimizer=vg.StateOptimizer(SGD, vg.State(jnp.ones(3)))
        ),
        ValueError,
        r"must be a `vg.StateOptimizer` for the states.*\[2\].*Got.*\[3\]",
    ),
    "no state": (
        lambda: train_step(loss, SGD)(make_mlp(), *make_batch()),
        TypeError,
        "takes the `TrainState` of `init`, and then the batch.*Got a `MLP`",
    ),
    "a state of another step": (
        lambda: train_step(loss, SGD)(train_step(loss, SGD).init(make_mlp())),
        ValueError,
        "Got one of another `train_step`. Make one with",
    ),
    "first axis": (
        lambda: call(train_step(loss, SGD, steps_per_call=2), *make_batch()),
        ValueError,
        r"steps_per_call=2\)` takes a batch.*has the length 2. Got f.*\[5,3\]",
    ),
    "no axis": (
        lambda: call(train_step(loss, SGD, accumulate=2), jnp.ones((2, 5, 3)), 1.0),
        ValueError,
        r"accumulate=2\)` takes a batch.*has the length 2. Got .*\[\]",
    ),
    "sync of a model": (
        lambda: train_step(loss, SGD).init(make_mlp()).sync(),
        TypeError,
        "`TrainState.sync` is not for a state of a module. Its module is `model`",
    ),
    "model of states": (
        lambda: train_step(loss, SGD, STATE).init().model,
        TypeError,
        r"`TrainState.model` is not for a state of states by ref.*Read the states after `sync",
    ),
    "no nn_state": (
        lambda: (
            lambda step: step(
                step.init(Normed(jr.key(0)), nn_state=eqx.nn.State(Normed(jr.key(0)))),
            )
        )(
            train_step(
                lambda model, state: (jnp.sum(model.linear.weight), 1.0), SGD, "linear.weight"
            )
        ),
        TypeError,
        r"must return the next `equinox.nn.State`, as `\(value, nn_state\)`.*Got",
    ),
    "unused leaves": (
        lambda: (lambda step: step(step.init({"a": 1.0 * jnp.ones(2), "b": jnp.ones(1)})))(
            train_step(lambda tree: tree["a"], SGD)
        ),
        ValueError,
        r"`train_step\(grad_states=...\)` must select leaves.*does not depend on `b`",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_wrong_uses(case):
    use, error, match = case
    with pytest.raises(error, match=f"(?s){match}"):
        use()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Checked:
    angles: Any

    def __post_init__(self):
        if self.angles.shape != (3,):
            raise ValueError("three angles")


def test_nodes_that_check_what_they_hold_are_never_rebuilt_with_anything_else():
    step = vg.train_step(lambda tree: jnp.sum(tree["node"].angles * tree["w"]), optax.sgd(0.5))
    model = {"node": Checked(jnp.ones(3)), "w": jnp.array(2.0)}
    state, metrics = step(step.init(model))
    assert float(metrics.value) == 6.0
    assert tree_allclose(state.model["node"].angles, jnp.zeros(3))


def test_models_that_differ_in_a_static_leaf_have_programs_of_their_own():
    func = lambda model, x: jnp.sum(model["w"] * x) * model["scale"]
    step = vg.train_step(func, optax.sgd(0.5), "w")
    for scale in (2, 3, 2.0, True):
        state, metrics = step(step.init({"w": jnp.ones(3), "scale": scale}), jnp.ones(3))
        assert float(metrics.value) == 3 * scale
        assert state.model["w"].tolist() == [1 - scale / 2] * 3


def test_keywords_reach_a_function_that_uses_more_states():
    w, calls = vg.State(jnp.ones(3)), vg.State(jnp.array(0))

    def func(x, *, by):
        calls.value += 1
        return jnp.sum(by * w.value * x)

    step = vg.train_step(func, optax.sgd(0.5), w)
    state, _ = step(step.init(), jnp.ones(3), by=2.0)
    state.sync()
    assert w.value.tolist() == [0.0] * 3
    assert int(calls.value) == 1
