"""Quantities with units: gradients are the same whatever units they are written in."""

from typing import Any

import brainunit as u
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import saiunit
import vgrad_eqx as vg
from vgrad_eqx import vector_grad

from ..helpers import tree_allclose


FAMILIES = [
    [u.volt, u.mvolt, u.uvolt, u.Mohm * u.nA, u.ohm * u.mA],
    [u.second, u.ms, u.us],
    [u.meter, u.inch, u.cm],
    [u.radian, u.degree],
    [u.kelvin],
    [u.siemens / u.cm**2, u.mS / u.meter**2],
]
units = st.sampled_from(FAMILIES).flatmap(
    lambda family: st.tuples(*2 * [st.sampled_from(family)])
)
seeds = st.integers(0, 2**31 - 1)


def si(x):
    """The same in SI units, without a unit."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(u.get_mantissa(leaf)) * u.get_unit(leaf).magnitude,
        x,
        is_leaf=lambda node: isinstance(node, u.Quantity),
    )


def write(number, unit):
    """A number in SI units, written in another one."""
    return (number / unit.magnitude) * unit


FUNCS = {
    "linear": lambda p, c: 3 * p + c,
    "product": lambda p, c: p * c * p,
    "ratio": lambda p, c: (p / c) ** 3,
    "reciprocal": lambda p, c: 1 / p,
    "root": lambda p, c: u.math.sqrt(p * p * p * c),
    "exponential": lambda p, c: c * u.math.exp(-p / c),
    "mixing": lambda p, c: u.math.cumsum(p) * c,
    "several": lambda p, c: (p * c, {"a": c * c, "b": 2 * p * p}),
    "tree": lambda p, c: [p[0] * c, p[1] / c * p[1] * p[1]],
}


@hypothesis.given(units, seeds)
@pytest.mark.parametrize("func", FUNCS.values(), ids=FUNCS.keys())
def test_gradient_is_that_of_the_same_function_in_si_units(func, units, seed):
    numbers = np.random.default_rng(seed).uniform(0.5, 2.0, (2, 2))
    p, c = jnp.asarray(numbers)
    expected, value = vector_grad(func, argnums=[0, 1], return_value=True)(p, c)
    quantities = write(p, units[0]), write(c, units[1])
    transform = vector_grad(func, argnums=[0, 1], return_value=True, unit_aware=True)
    for wrapped in (transform, jax.jit(transform)):
        grads, out = wrapped(*quantities)
        assert tree_allclose(si(grads), expected, rtol=1e-4, atol=1e-4)
        assert tree_allclose(si(out), value, rtol=1e-4, atol=1e-4)


def mantissas(tree):
    return jax.tree.map(u.get_mantissa, tree, is_leaf=lambda node: isinstance(node, u.Quantity))


@hypothesis.given(units, seeds)
@pytest.mark.parametrize("func", FUNCS.values(), ids=FUNCS.keys())
def test_without_units_it_is_the_derivative_of_mantissas_by_mantissas(func, units, seed):
    p, c = jnp.asarray(np.random.default_rng(seed).uniform(0.5, 2.0, (2, 2)))
    outputs, pull_back = jax.vjp(lambda p, c: mantissas(func(p * units[0], c * units[1])), p, c)
    expected = pull_back(jax.tree.map(jnp.ones_like, outputs))
    transform = vector_grad(func, argnums=[0, 1])
    written = jax.tree.leaves(
        func(p * units[0], c * units[1]), is_leaf=lambda node: isinstance(node, u.Quantity)
    )
    if len({u.get_unit(each).magnitude for each in written}) > 1:
        with pytest.raises(u.UnitMismatchError, match="adds up bare numbers, so all outputs"):
            transform(p * units[0], c * units[1])
    else:
        assert tree_allclose(transform(p * units[0], c * units[1]), expected)


def test_a_change_of_unit_has_the_factor_of_its_numbers():
    volts = jnp.array([1.0, 2.0]) * u.volt
    to_mvolt = lambda v: v.in_unit(u.mvolt)
    assert tree_allclose(vector_grad(to_mvolt)(volts), jnp.full(2, 1000.0))
    assert tree_allclose(vg.jacrev(to_mvolt)(volts), 1000.0 * jnp.eye(2))
    assert tree_allclose(vg.elementwise_grad(to_mvolt)(volts), jnp.full(2, 1000.0))
    theirs = saiunit.autograd.vector_grad(to_mvolt, unit_aware=False)(volts)
    assert tree_allclose(jnp.asarray(u.get_mantissa(theirs)), jnp.full(2, 1000.0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_outputs_in_several_units_are_refused_without_units(compiled):
    func = lambda v: (v, v.in_unit(u.mvolt))
    transform = vector_grad(func)
    match = r"`vector_grad\(unit_aware=False\)` adds up bare numbers.*`0` in V, `1` in mV"
    with pytest.raises(u.UnitMismatchError, match=match):
        (jax.jit(transform) if compiled else transform)(jnp.ones(2) * u.volt)
    rows = vg.jacrev(func)(jnp.ones(2) * u.volt)
    assert tree_allclose(rows, (jnp.eye(2), 1000.0 * jnp.eye(2)))


@hypothesis.given(units, seeds)
def test_arguments_leaves_and_states_agree(units, seed):
    numbers = np.random.default_rng(seed).uniform(0.5, 2.0, (2, 2))
    p, c = (write(jnp.asarray(x), unit) for x, unit in zip(numbers, units, strict=True))
    func = FUNCS["product"]
    options = {"unit_aware": True, "return_value": True}
    expected, value = vector_grad(func, **options)(p, c)
    by_leaf, leaf_value = vector_grad(lambda t, c: func(t["p"], c), "p", **options)({"p": p}, c)
    state = vg.State({"p": p})
    by_state, state_value = vector_grad(
        lambda c: func(state.value["p"], c), {"s": state}, **options
    )(c)
    for grad in (by_leaf["p"], by_state["s"]["p"]):
        assert u.get_unit(grad) == u.get_unit(expected)
        assert tree_allclose(si(grad), si(expected))
    assert tree_allclose([si(leaf_value), si(state_value)], 2 * [si(value)])


@hypothesis.given(units, seeds)
def test_agrees_with_saiunit(units, seed):
    p, c = (
        write(jnp.asarray(x), unit)
        for x, unit in zip(
            np.random.default_rng(seed).uniform(0.5, 2, (2, 2)), units, strict=True
        )
    )
    func = FUNCS["product"]
    theirs = saiunit.autograd.vector_grad(func, argnums=0, unit_aware=True)(p, c)
    assert tree_allclose(si(vector_grad(func, unit_aware=True)(p, c)), si(theirs))


def test_units_of_gradients():
    voltage, time = jnp.ones(2) * u.mvolt, jnp.ones(2) * u.ms
    gradient = vector_grad(lambda v, t: v / t, argnums=[0, 1], unit_aware=True)
    by_voltage, by_time = gradient(voltage, time)
    assert u.get_unit(by_voltage) == 1 / u.ms
    assert u.get_unit(by_time) == u.mvolt / u.ms**2
    assert tree_allclose(u.get_mantissa(by_time), -jnp.ones(2))


def test_gradient_without_dimension_is_an_array():
    voltage = jnp.ones(2) * u.mvolt
    grad = vector_grad(lambda v: v.in_unit(u.volt), unit_aware=True)(voltage)
    assert tree_allclose(grad, jnp.ones(2))
    for unit_aware in (False, True):
        grad = vector_grad(lambda v: v / u.volt, unit_aware=unit_aware)(voltage)
        assert isinstance(grad, jax.Array) is not unit_aware
    angle = jnp.array([30.0]) * u.degree
    grad = vector_grad(lambda a: u.math.sin(a), unit_aware=True)(angle)
    assert tree_allclose(grad, jnp.cos(jnp.deg2rad(jnp.array([30.0]))))


@pytest.mark.parametrize("unit_aware", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_outputs_of_several_dimensions_are_refused(unit_aware, compiled):
    def func(v):
        return {"voltage": v, "charge": [v * u.siemens * u.ms]}

    transform = vector_grad(func, unit_aware=unit_aware)
    match = r"`vector_grad\(func=...\)` must return outputs of one dimension, .* `charge.0` in"
    with pytest.raises(u.UnitMismatchError, match=match):
        (jax.jit(transform) if compiled else transform)(jnp.ones(2) * u.mvolt)


def test_an_array_beside_a_quantity_is_refused():
    with pytest.raises(u.UnitMismatchError, match="`0` in 1, `1` in mV|`0` in .*, `1` in mV"):
        vector_grad(lambda v: (v / v, v))(jnp.ones(2) * u.mvolt)


def test_values_are_given_back_as_they_were_written():
    def func(v):
        return v, v.in_unit(u.volt), 3

    transform = vector_grad(func, return_value=True, unit_aware=True)
    _, (first, second, third) = transform(jnp.ones(2) * u.mvolt)
    assert u.get_unit(first) == u.mvolt
    assert u.get_unit(second) == u.volt
    assert third == 3
    assert tree_allclose(si((first, second)), 2 * (jnp.full(2, 1e-3),))


def test_integers_and_numbers_among_quantities():
    tree = {"a": jnp.ones(2) * u.mvolt, "n": jnp.arange(2) * u.ms, "i": 3 * u.ms, "k": 2}
    grads = vector_grad(lambda t: t["a"] * t["n"] * t["k"], unit_aware=True)(tree)
    assert grads["n"] is grads["i"] is grads["k"] is None
    assert u.get_unit(grads["a"]) == u.ms
    assert list(vg.states(tree)) == ["a"]


def test_a_quantity_of_a_python_number_is_differentiated():
    transform = vector_grad(lambda t: t["tau"] ** 2, unit_aware=True)
    for wrapped in (transform, jax.jit(transform)):
        grad = wrapped({"tau": 3.0 * u.ms})["tau"]
        assert u.get_unit(grad) == u.ms
        assert u.get_mantissa(grad) == 6.0
    assert u.get_mantissa(vector_grad(lambda t: t**2, unit_aware=True)(3.0 * u.ms)) == 6.0
    assert list(vg.states({"tau": 3.0 * u.ms})) == ["tau"]


def test_python_numbers_as_outputs():
    assert vector_grad(lambda t: (3.0 * u.ms, t), unit_aware=True)(2.0 * u.ms) == 1.0
    assert vector_grad(lambda x: (3.0, x), unit_aware=True)(2.0) == 1.0


def test_paths_and_aux():
    model = {"cell": {"tau": jnp.ones(2) * u.ms}, "w": jnp.ones(2)}

    @vector_grad(grad_states="**", unit_aware=True, has_aux=True)
    def func(model, v):
        return v * model["w"] / model["cell"]["tau"], {"v": v, "text": "aux"}

    grads, aux = func(model, jnp.ones(2) * u.mvolt)
    assert list(grads) == ["cell.tau", "w"]
    assert u.get_unit(grads["cell.tau"]) == u.mvolt / u.ms**2
    assert u.get_unit(grads["w"]) == u.mvolt / u.ms
    assert u.get_unit(aux["v"]) == u.mvolt
    with pytest.raises(ValueError, match="does not depend on `cell.tau`"):
        vector_grad(lambda model: model["w"], "**")(model)


def test_debug_nan_names_the_path_of_a_quantity():
    transform = vector_grad(lambda t: t["a"] * jnp.nan, "a", unit_aware=True, debug_nan=True)
    with pytest.raises(FloatingPointError, match="Got NaN in `a`"):
        transform({"a": jnp.ones(2) * u.ms})


def test_states_that_are_written_have_units():
    total = vg.State(jnp.zeros(2) * u.mvolt)

    def func(v):
        total.value = total.value + v
        return total.value * v

    grad = vector_grad(func, unit_aware=True)(jnp.ones(2) * u.mvolt)
    assert u.get_unit(grad) == u.mvolt
    assert u.get_unit(total.value) == u.mvolt
    assert tree_allclose(u.get_mantissa(total.value), jnp.ones(2))
    gradient = vector_grad(lambda v: total.value * v, {"a": [total]}, unit_aware=True)
    assert u.get_unit(gradient(1.0 * u.ms)["a"][0]) == u.ms


def test_integers_with_a_unit_are_converted_by_a_product():
    x: Any = jnp.array(2) * u.ms
    with pytest.raises(TypeError, match="nothing can be differentiated. .* by `1.0 . x`"):
        vector_grad(jnp.square, unit_aware=True)(x)


@pytest.mark.parametrize("wrap", [jax.jit, eqx.filter_jit])
def test_one_trace_per_unit(wrap):
    calls = []

    def func(v):
        calls.append(1)
        return v * v

    transform = wrap(vector_grad(func, unit_aware=True))
    for _ in range(2):
        for i, unit in enumerate((u.mvolt, u.volt)):
            transform(jnp.ones(2) * unit)
            assert len(calls) == (i + 1 if _ == 0 else 2)


def test_units_leave_no_operation_in_the_program():
    def count(func, *args):
        return len(
            jax.make_jaxpr(lambda *args: vector_grad(func, unit_aware=True)(*args))(*args).eqns
        )

    def func(v):
        return v * v * 2

    v = jnp.ones(2)
    assert count(func, v * u.mvolt) == count(func, v)
    assert count(lambda v: (v * v, v * 3 * v), v * u.mvolt) == count(
        lambda v: (v * v, v * 3 * v), v
    )


@pytest.mark.parametrize("wrap", [jax.vmap, lambda f: lambda xs: jax.lax.map(f, xs)])
def test_under_vmap_and_scan(wrap):
    transform = vector_grad(lambda v: v**3, unit_aware=True)
    xs = jnp.arange(1.0, 4.0) * u.ms
    assert tree_allclose(si(wrap(transform)(xs)), si(transform(xs)))


def make_tree():
    return {"v": jnp.ones(2) * u.mvolt, "tau": 10.0 * u.ms, "w": jnp.ones(3)}


def test_values_in_other_units_are_converted():
    tree = vg.replace_states(
        make_tree(), {"v": jnp.full(2, 2.0) * u.volt, "tau": jnp.asarray(1.0) * u.second}
    )
    assert u.get_unit(tree["v"]) == u.mvolt
    assert tree_allclose(u.get_mantissa(tree["v"]), jnp.full(2, 2000.0))
    assert u.get_mantissa(tree["tau"]) == 1000.0
    tree = vg.apply_updates(make_tree(), {"v": jnp.ones(2) * u.volt, "tau": 1e-3 * u.second})
    assert u.get_unit(tree["v"]) == u.mvolt
    assert tree_allclose(u.get_mantissa(tree["v"]), jnp.full(2, 1001.0))
    assert tree_allclose(si(tree["tau"]), jnp.asarray(11e-3))


@pytest.mark.parametrize("update", [vg.replace_states, vg.apply_updates])
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("v", jnp.ones(2) * u.ms),
        ("v", jnp.ones(2)),
        ("w", jnp.ones(3) * u.mvolt),
    ],
    ids=["another dimension", "bare", "of a bare leaf"],
)
def test_values_of_another_dimension_are_refused(update, path, value):
    match = f"at `{path}` must have the dimension of the leaf. Got `leaf` in .*, `value` in"
    with pytest.raises(u.UnitMismatchError, match=match):
        update(make_tree(), {path: value})


def test_states_and_back():
    tree = make_tree()
    states = vg.states(tree)
    assert {path: u.get_unit(leaf) for path, leaf in states.items()} == {
        "v": u.mvolt,
        "tau": u.ms,
        "w": u.UNITLESS,
    }
    assert tree_allclose(si(vg.replace_states(tree, states)), si(tree))
    assert list(vg.states(tree, eqx.is_inexact_array)) == ["v", "w"]
    assert list(vg.states(tree, vg.instance(u.Quantity))) == ["tau", "v"]
    assert list(vg.states(tree, vg.at(lambda tree: tree["v"]))) == ["v"]
    assert list(vg.states(tree, vg.leaf(lambda leaf: leaf.shape == (2,)))) == ["v"]


def test_summary_shows_units():
    tree = {"a": jnp.ones((), "bfloat16") * u.mvolt, "b": jnp.ones(2, "bfloat16")}
    assert str(vg.summary([tree, tree["b"]], "0")).splitlines() == [
        "path  shape  dtype     unit  size",
        "0.a   ()     bfloat16  mV       1  chosen",
        "0.b   (2,)   bfloat16           2  chosen",
        "1     (2,)   bfloat16           2  frozen",
        "chosen: 3 of 5 parameters, in 2 of 3 arrays",
    ]
