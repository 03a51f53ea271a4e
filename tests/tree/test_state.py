"""A `State` by itself: its value, what it refuses, and how it is copied and saved."""

import copy
import io
import operator
import pickle
from typing import Any

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose


class Layer(eqx.Module):
    weight: vg.State
    bias: vg.State
    scale: jax.Array | None = None

    def __call__(self, x):
        return self.weight.value @ x + self.bias.value


def make_layer():
    return Layer(vg.State(jnp.ones((2, 3)), "weight"), vg.State(jnp.zeros(2)))


VALUES = {
    "array": lambda: jnp.arange(3.0),
    "number": lambda: 2.5,
    "int": lambda: 3,
    "bool": lambda: True,
    "NumPy array": lambda: np.arange(3.0),
    "dict": lambda: {"a": jnp.ones(2), "b": [jnp.zeros(1), None]},
    "module": lambda: eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)),
    "PRNG key": lambda: jax.random.key(0),
    "integers": lambda: jnp.arange(3),
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())
def test_any_pytree_is_a_value(make):
    value = make()
    state = vg.State(value)
    arrays = jax.tree.leaves(eqx.filter(value, eqx.is_array_like))
    for got in (state.value, eqx.filter_jit(lambda: state.value)()):
        assert jax.tree.structure(got) == jax.tree.structure(value)
        leaves = jax.tree.leaves(eqx.filter(got, eqx.is_array_like))
        assert all(map(jnp.array_equal, leaves, arrays))


def test_number_becomes_an_array_of_strong_type():
    for number, dtype in ((2.5, jnp.result_type(float)), (3, jnp.result_type(int))):
        value: Any = vg.State(number).value
        assert value.dtype == dtype
        assert not value.weak_type
    assert not vg.State(jnp.asarray(2.5)).value.weak_type


def test_value_is_not_shared_with_what_it_was_made_of():
    array = np.zeros(2)
    state = vg.State(array)
    array[0] = 1
    before = state.value
    state.value = before + 1
    assert state.value.tolist() == [1.0, 1.0]
    assert before.tolist() == [0.0, 0.0]


def test_numbers_can_be_set_where_the_dtype_stays():
    state = vg.State(jnp.zeros((), jnp.bfloat16))
    for number in (1.5, 2):
        state.value = number
        assert tree_allclose(state.value, jnp.asarray(number, jnp.bfloat16))


def test_numpy_arrays_can_be_set():
    state = vg.State(np.zeros(2))
    state.value = np.ones(2)
    assert state.value.tolist() == [1.0, 1.0]


def test_repr():
    assert repr(vg.State(jnp.zeros((2, 3), "float16"), name="w")) == "State(f16[2,3], name='w')"
    assert repr(vg.State({"a": jnp.zeros(2, "int8")})) == "State({'a': i8[2]})"


REFUSED = {
    "shape": (lambda: jnp.zeros(2), jnp.ones(3), r"f32\[2\].* Got f32\[3\]"),
    "dtype": (lambda: jnp.zeros(2), jnp.ones(2, "int8"), r"f32\[2\].* Got i8\[2\]"),
    "number": (lambda: jnp.zeros(2, "int8"), 1.5, r"i8\[2\].* Got 1.5"),
    "structure": (lambda: jnp.zeros(2), [jnp.ones(2)], r"f32\[2\].* Got \[f32\[2\]\]"),
    "key": (lambda: {"a": jnp.zeros(2)}, {"b": jnp.zeros(2)}, r"'a'.* Got \{'b': f32\[2\]\}"),
    "fixed leaf": (lambda: (jnp.zeros(2), "a"), (jnp.zeros(2), "b"), r"'a'.* Got .*'b'"),
    "None": (lambda: jnp.zeros(2), None, r"f32\[2\].* Got None"),
    "no array": (lambda: jnp.zeros(2), "a", r"f32\[2\].* Got 'a'"),
}


@pytest.mark.parametrize(("make", "new", "match"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_another_kind_of_value_is_refused(make, new, match, compiled):
    state = vg.State(jax.tree.map(lambda x: x, make()), "w")

    def put():
        state.value = new

    with pytest.raises(ValueError, match=r"The value of State\(.*, name='w'\) must keep"):
        jax.jit(put)() if compiled else put()
    with pytest.raises(ValueError, match=match.replace("f32", "f(32|64)")):
        put()
    assert tree_allclose(
        eqx.filter(state.value, eqx.is_array), eqx.filter(make(), eqx.is_array)
    )


def test_another_unit_is_refused():
    import brainunit as u

    state = vg.State(jnp.ones(2) * u.ms)
    state.value = state.value * 3
    assert u.get_mantissa(state.value).tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="ms.* Got .*mV"):
        state.value = jnp.ones(2) * u.mV


@pytest.mark.parametrize("value", [None, [], "a", jax.nn.relu])
def test_a_value_without_an_array_is_refused(value):
    with pytest.raises(TypeError, match=r"`State\(value=...\)` must hold an array. Got "):
        vg.State(value)


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match=r"`State\(name=...\)` must be a string. Got 3."):
        vg.State(1.0, 3)  # pyright: ignore[reportArgumentType]


def test_compiled_functions_read_the_current_value_and_set_it():
    state = vg.State(jnp.array(1.0))
    calls = []

    @jax.jit
    def step(x):
        calls.append(1)
        state.value = state.value * x
        return state.value + 1

    assert step(3.0) == 4.0
    state.value = 10.0
    assert step(3.0) == 31.0
    assert state.value == 30.0
    assert len(calls) == 1


def test_a_state_is_set_in_loops():
    state = vg.State(jnp.zeros(2))

    @jax.jit
    def run(xs):
        def body(_, x):
            state.value += x
            return None, state.value

        return jax.lax.scan(body, None, xs)[1]

    assert run(jnp.ones((3, 2))).tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert state.value.tolist() == [3.0, 3.0]


def test_setting_under_vmap_is_refused_and_the_way_out_is_said():
    state = vg.State(jnp.zeros(()), "total")

    def put(x):
        state.value = x
        return x

    match = r"name=.total.\) cannot be set inside of `jax.vmap`, where each .* Return the value"
    with pytest.raises(ValueError, match=match):
        jax.vmap(put)(jnp.arange(3.0))
    state.value = jax.vmap(lambda x: x)(jnp.arange(3.0)).sum()
    assert state.value == 3.0


def test_a_value_that_is_refused_in_part_changes_nothing():
    state = vg.State({"a": jnp.zeros(2), "b": jnp.zeros(())})

    def put(x):
        state.value = {"a": jnp.ones(2), "b": x}
        return x

    with pytest.raises(ValueError, match="another transformation differentiates"):
        jax.grad(put)(1.0)
    assert tree_allclose(state.value, {"a": jnp.zeros(2), "b": jnp.zeros(())})


def test_a_value_that_jax_differentiates_is_refused_and_the_way_out_is_said():
    state = vg.State(jnp.zeros(()))

    def func(x):
        state.value = x * 2
        return x**2

    match = "cannot be set to a value that another transformation differentiates"
    with pytest.raises(ValueError, match=match):
        jax.grad(func)(3.0)
    assert vg.vector_grad(func)(3.0) == 6.0
    assert state.value == 6.0


X = jnp.ones(2)

# What people do with a state whose `value` they forgot.
FORGOTTEN = {
    "np.asarray": lambda s: np.asarray(s),
    "jnp.asarray": lambda s: jnp.asarray(s),
    "NumPy operator": lambda s: np.ones(2) + s,
    "jnp.dot": lambda s: jnp.dot(s, X),
    "jnp.sum": lambda s: jnp.sum(s),
    "jnp.where": lambda s: jnp.where(s, X, X),
    "jnp.stack": lambda s: jnp.stack([s, X]),
    "index of an array": lambda s: X[s],
    "@": lambda s: s @ X,
    "right @": lambda s: X @ s,
    "+": lambda s: s + 1,
    "right +": lambda s: 1 + s,
    "+=": lambda s: operator.iadd(s, 1),
    "-": lambda s: -s,
    "**": lambda s: s**2,
    "<": lambda s: s < 1,
    "[]": lambda s: s[0],
    "[] =": lambda s: operator.setitem(s, 0, 1),
    "iteration": lambda s: list(s),
    "len": len,
    "float": float,
    "if": bool,
    "shape": lambda s: s.shape,
    "method": lambda s: s.sum(),
    "at": lambda s: s.at[0].set(1),
    "jit": lambda s: jax.jit(lambda x: x)(s),
    "jax.grad": lambda s: jax.grad(lambda x: x)(s),
    "vmap": lambda s: jax.vmap(lambda x: x)(s),
    "vg.grad": lambda s: vg.grad(lambda x: x)(s),
    "a layer": lambda s: eqx.nn.Linear(2, 2, key=jax.random.key(0))(s),
}


@pytest.mark.parametrize("use", FORGOTTEN.values(), ids=FORGOTTEN.keys())
def test_a_forgotten_value_is_named(use):
    kinds = (TypeError, ValueError, AttributeError)
    with pytest.raises(kinds, match=r"is a reference.* Use its `value`|`value` of a state"):
        use(vg.State(X, "w"))


def test_a_state_is_a_key_and_has_no_attributes_of_its_own():
    state, other = vg.State(X), vg.State(X)
    assert {state: 1, other: 2}[state] == 1
    assert state != other
    assert state != X.tolist()
    assert not hasattr(state, "shape")
    with pytest.raises(AttributeError, match="`State` has no attribute `vlaue`.$"):
        state.vlaue  # noqa: B018


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deep_copies_and_pickles_are_independent(duplicate):
    layer = make_layer()
    layer = eqx.tree_at(
        lambda layer: layer.scale, layer, jnp.ones(1), is_leaf=lambda x: x is None
    )
    shared = [layer, layer.weight]
    other, weight = duplicate(shared)
    assert weight is other.weight
    assert weight.name == "weight"
    other.weight.value *= 2
    assert layer.weight.value[0, 0] == 1
    assert other.weight.value[0, 0] == 2
    assert tree_allclose(other(jnp.ones(3)), 2 * layer(jnp.ones(3)))


def test_copies_of_a_module_share_its_states():
    layer = make_layer()
    for other in (copy.copy(layer), jax.tree.map(lambda leaf: leaf, layer)):
        assert other.weight is layer.weight


def test_saving_a_module_with_states_is_refused_and_the_way_out_works(tmp_path):
    layer, file = make_layer(), io.BytesIO()
    with pytest.raises(Exception, match="Error at leaf with path") as caught:
        eqx.tree_serialise_leaves(file, layer)
    error: BaseException = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert "To save the states of a module, use `vg.save`" in str(error)
    assert file.getvalue() == b""

    vg.save(tmp_path / "checkpoint", layer)
    other = make_layer()
    other.weight.value *= 5
    vg.load(tmp_path / "checkpoint", other)
    assert tree_allclose(other.weight.value, layer.weight.value)


def test_filters_leave_a_state_alone():
    layer = make_layer()
    diff, nondiff = eqx.partition(layer, eqx.is_inexact_array)
    assert jax.tree.leaves(diff) == []
    assert eqx.combine(diff, nondiff).weight is layer.weight
    assert tree_allclose(eqx.filter_jit(lambda m, x: m(x))(layer, jnp.ones(3)), 3 * jnp.ones(2))
    mapped = eqx.filter_vmap(lambda m, x: m(x), in_axes=(None, 0))(layer, jnp.ones((4, 3)))
    assert tree_allclose(mapped, 3 * jnp.ones((4, 2)))


def test_a_state_may_be_made_in_a_compiled_function():
    @jax.jit
    def count(x):
        state = vg.State(jnp.zeros(()))
        for _ in range(3):
            state.value += x
        return state.value

    assert count(2.0) == 6.0
    assert vg.vector_grad(count)(2.0) == 3.0


def test_states_of_a_module_by_path():
    layers = [make_layer(), make_layer()]
    states = vg.states(layers)
    assert list(states) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert states["1.bias"] is layers[1].bias
    assert list(vg.states(layers, "*.weight")) == ["0.weight", "1.weight"]
    assert list(vg.states(layers, vg.instance(vg.State) & ~vg.path("0"))) == [
        "1.bias",
        "1.weight",
    ]


def test_arrays_and_states_are_not_chosen_together():
    tree = {"layer": make_layer(), "scale": jnp.ones(2)}
    match = (
        "arrays or states by reference, and not both. .* the array `scale` and the state "
        r"`layer.weight`. Select states by `vg.instance\(vg.State\)`"
    )
    with pytest.raises(ValueError, match=match):
        vg.states(tree)
    assert list(vg.states(tree, vg.instance(vg.State))) == ["layer.bias", "layer.weight"]
    assert list(vg.states(tree, ~vg.instance(vg.State))) == ["scale"]
    assert list(vg.states(tree, "scale")) == ["scale"]


def test_two_states_with_one_path_are_refused():
    tree = {"a.b": vg.State(1.0), "a": {"b": vg.State(1.0)}}
    with pytest.raises(ValueError, match="Two leaves share the dotted path `a.b`"):
        vg.states(tree)


@pytest.mark.parametrize("update", [vg.replace_states, vg.apply_updates])
def test_updates_of_a_pytree_refuse_states(update):
    with pytest.raises(ValueError, match="Got `weight`, a state by reference. Set its `value`"):
        update(make_layer(), {"weight": jnp.ones((2, 3))})


def test_summary_shows_states():
    tree = [vg.State({"n": jnp.zeros(2, "int8"), "w": jnp.zeros((2, 3), "bfloat16")})]
    table = vg.summary([*tree, vg.State(jnp.zeros(1, "bfloat16"))], "0")
    assert str(table).splitlines() == [
        "path  shape   dtype     size",
        "0.n   (2,)    int8         2  not differentiable",
        "0.w   (2, 3)  bfloat16     6  chosen",
        "1     (1,)    bfloat16     1  frozen",
        "chosen: 6 of 7 parameters, in 1 of 2 arrays",
    ]


class Hidden(vg.State):
    def __init__(self, size):
        super().__init__(jnp.zeros(size), name="hidden")
        self.size = size


class Slotted(vg.State):
    __slots__ = ("size",)


DUPLICATES = [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_copies_of_a_subclass_keep_its_class_and_attributes(duplicate):
    slotted = Slotted(jnp.ones(2))
    slotted.size = 3
    for state in (Hidden(3), slotted):
        copied = duplicate(state)
        assert type(copied) is type(state)
        assert (copied.name, copied.size) == (state.name, 3)
        copied.value = copied.value + 1
        assert bool(jnp.all(copied.value == state.value + 1))
    assert repr(Hidden(3)).startswith("Hidden(")


def test_subclasses_are_selected():
    tree = {"hidden": Hidden(3), "weight": vg.State(jnp.ones(2))}
    assert list(vg.states(tree, vg.instance(Hidden))) == ["hidden"]
    assert list(vg.states(tree, ~vg.instance(Hidden))) == ["weight"]


def test_a_quantity_is_converted_to_the_unit_of_the_state():
    state = vg.State({"V": jnp.array(-65.0) * u.mV, "n": jnp.array(1.0)})
    state.value = {"V": jnp.array(-0.06) * u.volt, "n": jnp.array(2.0)}
    assert state.value["V"].unit == u.mV
    assert float(state.value["V"].mantissa) == pytest.approx(-60.0)
    for other in (jnp.array(1.0) * u.ms, jnp.array(1.0)):
        with pytest.raises(ValueError, match="dimensions of units.* Got"):
            state.value = {"V": other, "n": jnp.array(3.0)}
    assert float(state.value["n"]) == 2.0
