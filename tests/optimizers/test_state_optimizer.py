"""Optax transformations on states by reference."""

import itertools

import brainunit as u
import jax
import jax.numpy as jnp
import jax.ref
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose


def make_states():
    return {
        "w": vg.State(jnp.array([1.0, 2.0])),
        "inner": [vg.State({"b": jnp.ones(3), "n": 2})],
    }


def func_of(states):
    return lambda x: (
        jnp.sum((states["w"].value * x) ** 2) + jnp.sum(states["inner"][0].value["b"] ** 2)
    )


def values(states):
    return {"w": states["w"].value, "inner.0.b": states["inner"][0].value["b"]}


@pytest.mark.parametrize("wrap", [lambda step: step, jax.jit], ids=["eager", "jit"])
def test_equals_optax_on_the_values(wrap):
    states = make_states()
    params, tx = values(states), optax.adamw(0.1, weight_decay=0.1)
    opt = vg.StateOptimizer(tx, states)
    step = wrap(lambda x: opt.step(vg.vector_grad(func_of(states), states)(x)))
    opt_state = tx.init(params)
    of_params = lambda p: jnp.sum((p["w"] * 3.0) ** 2) + jnp.sum(p["inner.0.b"] ** 2)
    for _ in range(3):
        step(3.0)
        updates, opt_state = tx.update(jax.grad(of_params)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert tree_allclose(values(states), params)
    assert tree_allclose(opt.params(), params)
    assert tree_allclose(opt.opt_state, opt_state)
    assert int(opt.count) == 3


def test_inside_of_a_scan():
    states, other = make_states(), make_states()
    opt, by_loop = vg.StateOptimizer(optax.adam(0.1), states), None

    @jax.jit
    def run(xs):
        def body(carry, x):
            opt.step(vg.vector_grad(func_of(states), states)(x))
            return carry, None

        jax.lax.scan(body, None, xs)

    run(jnp.arange(3.0))
    by_loop = vg.StateOptimizer(optax.adam(0.1), other)
    for x in jnp.arange(3.0):
        by_loop.step(vg.vector_grad(func_of(other), other)(x))
    assert tree_allclose(values(states), values(other))


def test_groups_are_chosen_by_the_names_of_states():
    states = make_states()
    opt = vg.StateOptimizer({"w": optax.sgd(0.5), "inner.**": optax.sgd(0.0)}, states)
    opt.step(vg.vector_grad(func_of(states), states)(1.0))
    assert tree_allclose(values(states), {"w": jnp.zeros(2), "inner.0.b": jnp.ones(3)})


def test_a_single_state_or_reference():
    for state in (vg.State(jnp.ones(2)), jax.new_ref(jnp.ones(2))):
        read = lambda state=state: state.value if isinstance(state, vg.State) else state[...]
        opt = vg.StateOptimizer(optax.sgd(0.25), state)
        opt.step(vg.vector_grad(lambda x, read=read: read() ** 2 * x, state)(1.0))
        assert read().tolist() == [0.5, 0.5]


def test_line_searches_take_a_function_over_the_states():
    state, target = vg.State(jnp.array([1.0, 2.0]) * u.ms), vg.State(jnp.array(5.0) * u.ms)
    calls = vg.State(0)

    def func(scale=1.0):
        calls.value += 1
        return scale * jnp.sum(u.get_mantissa(state.value - target.value) ** 2)

    opt = vg.StateOptimizer(vg.unitful(optax.lbfgs()), [state])

    @jax.jit
    def step():
        gradient = vg.vector_grad(lambda _: func(), [state], return_value=True, unit_aware=True)
        grads, value = gradient(None)
        opt.step(grads, value=value, grad=grads, value_fn=func)

    for _ in range(5):
        step()
    assert u.get_unit(state.value) == u.ms
    assert tree_allclose(u.get_mantissa(state.value), jnp.full(2, 5.0))
    assert int(calls.value) == 5  # what a trial sets is thrown away


def test_an_error_in_a_value_fn_is_raised():
    state = vg.State(jnp.ones(2))
    opt = vg.StateOptimizer(optax.lbfgs(), [state])
    grads = [jnp.ones(2)]

    def fail():
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        opt.step(grads, value=1.0, grad=grads, value_fn=fail)
    assert state.value.tolist() == [1.0, 1.0]


def test_complex_states_descend():
    state = vg.State(jnp.array(0j))
    opt = vg.StateOptimizer(optax.sgd(0.1), [state])
    gradient = vg.vector_grad(lambda _: jnp.abs(state.value - (1 + 2j)) ** 2, [state])
    step = jax.jit(lambda: opt.step(gradient(None)))
    for _ in range(200):
        step()
    assert tree_allclose(state.value, jnp.array(1 + 2j))


def test_wrong_states():
    with pytest.raises(TypeError, match="must be a `vg.State` or `jax.Ref`.*`vg.Optimizer`"):
        vg.StateOptimizer(optax.sgd(1.0), "**.weight")
    with pytest.raises(TypeError, match="must name states with an inexact array in them"):
        vg.StateOptimizer(optax.sgd(1.0), [vg.State(1)])
    twice = {"a.b": vg.State(1.0), "a": {"b": vg.State(2.0)}, "c": vg.State(3.0)}
    with pytest.raises(ValueError, match="names that differ. Got `a.b` twice. Rename"):
        vg.StateOptimizer(optax.sgd(1.0), twice)


@pytest.mark.parametrize("name", ["var_grads", "grad"])
@pytest.mark.parametrize("grads", [{"w": jnp.ones(2)}, jnp.ones(2), [jnp.ones(2), jnp.ones(3)]])
def test_wrong_gradients(name, grads):
    states = make_states()
    opt = vg.StateOptimizer(optax.sgd(1.0), states)
    good = {"w": jnp.ones(2), "inner": [{"b": jnp.ones(3), "n": None}]}
    with pytest.raises(
        ValueError, match=rf"`StateOptimizer.step\({name}=...\)` must have the st"
    ):
        opt.step(**{"var_grads": good, name: grads})
    assert states["w"].value.tolist() == [1.0, 2.0]
    wrong = {"w": jnp.ones(5), "inner": [{"b": None, "n": None}]}
    match = r"`StateOptimizer.step\(var_grads=...\)`.*None at `inner.0.b`, f.*\[5\] for a leaf"
    with pytest.raises(ValueError, match=match):
        opt.step(wrong)
    assert int(opt.count) == 0


@pytest.mark.parametrize("at", range(5))
def test_an_interrupt_in_a_step_leaves_everything_as_it_was(monkeypatch, at):
    states = {"a": vg.State(jnp.ones(2)), "b": vg.State(jnp.ones(2))}
    opt = vg.StateOptimizer(optax.sgd(0.1, momentum=0.9), states)
    grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
    swap, calls = jax.ref.swap, itertools.count()

    def interrupt(*args):
        if next(calls) == at:
            raise KeyboardInterrupt
        return swap(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jax.ref, "swap", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.step(grads)
    assert int(opt.count) == 0
    for state in states.values():
        assert state.value.tolist() == [1.0, 1.0]
    opt.step(grads)
    assert int(opt.count) == 1
    assert tree_allclose(states["b"].value, jnp.full(2, 0.9))
