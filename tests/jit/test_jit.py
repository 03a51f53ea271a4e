import dataclasses
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import apply, Counted, make_mlp, tree_allclose


def compile_counted(func, *args, **kwargs) -> Any:
    counted = Counted(func)
    compiled = vg.jit(vg.vector_grad(counted, *args, check_states=False, **kwargs))
    return compiled, counted


def renew(tree):
    return jtu.tree_map(lambda leaf: leaf, tree)


class Scaled(eqx.Module):
    weight: Any
    scale: Any
    power: Any = eqx.field(static=True)
    activation: Callable = jnp.tanh

    def __call__(self, x):
        return self.scale * self.activation(self.weight * x) ** self.power


TRANSFORMS: dict[str, Any] = {
    "selector": lambda: vg.vector_grad(apply, "layers.*.weight"),
    "value": lambda: vg.vector_grad(apply, "**", return_value=True),
    "groups": lambda: vg.vector_grad(apply, {"a": "layers.0", "b": ["layers.1"]}),
    "argument": lambda: vg.vector_grad(apply, argnums=1),
    "both": lambda: vg.vector_grad(apply, "layers.1", argnums=(1,), return_value=True),
    "module as argument": lambda: vg.vector_grad(apply),
    "aux": lambda: vg.vector_grad(
        lambda m, x: (m(x), {"b": "text", "a": x, "n": 3}), True, has_aux=True
    ),
    "cotangent": lambda: vg.vector_grad(apply, True, cotangent=jnp.arange(2.0)),
    "grad": lambda: vg.grad(lambda m, x: jnp.sum(m(x)), "**.bias"),
    "jacrev": lambda: vg.jacrev(apply, "layers.*.bias"),
    "jacfwd": lambda: vg.jacfwd(apply, "layers.0.bias"),
    "hessian": lambda: vg.hessian(apply, "layers.*.bias"),
    "elementwise": lambda: vg.elementwise_grad(lambda m, x: x * m.layers[0].bias[0], argnums=1),
    "nan": lambda: vg.vector_grad(apply, True, debug_nan=True),
}


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_equals_the_gradient_that_is_not_compiled(make):
    transform = make()
    compiled = vg.jit(transform)
    model, x = make_mlp(), jnp.arange(1.0, 4.0)
    expected = transform(model, x)
    for result in (compiled(model, x), compiled(renew(model), x), compiled(model, x)):
        assert tree_allclose(result, expected)


def test_new_modules_are_not_traced_again():
    compiled, counted = compile_counted(apply, True)
    for seed in range(5):
        model = make_mlp(seed=seed)
        expected = vg.vector_grad(apply, True)(model, jnp.ones(3))
        assert tree_allclose(compiled(model, jnp.ones(3)), expected)
    assert counted.calls == 1


def test_an_unchanged_module_is_not_traced_again():
    compiled, counted = compile_counted(apply, True)
    model = make_mlp()
    expected = compiled(model, jnp.ones(3))
    for _ in range(3):
        assert tree_allclose(compiled(model, jnp.ones(3)), expected)
    other = make_mlp(seed=1)
    expected = vg.vector_grad(apply, True)(other, jnp.ones(3))
    assert tree_allclose(compiled(other, jnp.ones(3)), expected)
    assert counted.calls == 1


def test_other_shapes_are_traced_again():
    compiled, counted = compile_counted(lambda m, x: jax.vmap(m)(x), True, return_value=True)
    model = make_mlp()
    for size in (1, 2, 1, 2):
        _, value = compiled(model, jnp.ones((size, 3)))
        assert value.shape == (size, 2)
    assert counted.calls == 2


CHANGES = {
    "static field": lambda: Scaled(jnp.ones(2), 2.0, 3),
    "number": lambda: Scaled(jnp.ones(2), 3.0, 2),
    "int for float": lambda: Scaled(jnp.ones(2), 2, 2),
    "array for number": lambda: Scaled(jnp.ones(2), jnp.array(2.0), 2),
    "number for array": lambda: Scaled(5.0, 2.0, 2),
    "numpy array": lambda: Scaled(np.full(2, 2.0, "float32"), 2.0, 2),
    "weak array": lambda: Scaled(jnp.asarray(5.0), 2.0, 2),
    "function": lambda: Scaled(jnp.ones(2), 2.0, 2, jnp.sin),
    "shape": lambda: Scaled(jnp.ones(()), 2.0, 2),
    "none": lambda: Scaled(jnp.ones(2), 2.0, None),
    "quantity": lambda: Scaled(jnp.ones(2) * u.ms, 2.0, 2, lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_another_kind_of_module_is_noticed(change):
    def func(module, tree):
        return tree["w"] * (module(1.0) if module.power is not None else 1.0)

    compiled = vg.jit(vg.vector_grad(func, argnums=1, return_value=True))
    first, other, tree = Scaled(jnp.ones(2), 2.0, 2), change(), {"w": jnp.ones(2)}
    compiled(first, tree)
    for module in (other, first, other):
        expected = vg.vector_grad(func, argnums=1, return_value=True)(module, tree)
        assert tree_allclose(compiled(module, tree), expected)


def test_what_is_chosen_follows_what_is_an_array():
    compiled = vg.jit(vg.vector_grad(lambda m, x: m.weight * m.scale * x, True))
    both = Scaled(jnp.ones(2), jnp.ones(()), 1)
    one = Scaled(jnp.ones(2), 1.0, 1)
    for module, names in [(both, ["scale", "weight"]), (one, ["weight"])] * 2:
        assert list(compiled(module, 2.0)) == names


def test_a_number_in_the_place_of_an_array_of_a_dict_is_not_chosen():
    compiled = vg.jit(vg.vector_grad(lambda tree: tree["a"] * tree["b"], True))
    arrays = {"a": jnp.array(2.0, "float32"), "b": jnp.array(3.0, "float32")}
    assert list(compiled(arrays)) == ["a", "b"]
    assert list(compiled({**arrays, "b": 3.0})) == ["a"]


def test_keys_of_a_dict_are_noticed():
    compiled = vg.jit(vg.vector_grad(lambda tree: sum(map(jnp.sum, tree.values())), True))
    one, two = jnp.ones(1), jnp.ones(2)
    for keys in (["b", "a"], ["a", "b"], ["a", "c"], ["a", "b", "c"]):
        assert sorted(compiled(dict.fromkeys(keys, one))) == sorted(keys)
    assert compiled({"a": one, "b": two})["b"].shape == (2,)


def test_numbers_flags_and_texts_are_constants():
    compiled, counted = compile_counted(
        lambda w, x, flag=False, power=1: w * x**power if flag is True else w * power
    )
    w = jnp.array(3.0)
    assert float(compiled(w, jnp.array(2.0))) == 1.0
    assert float(compiled(w, jnp.array(2.0), True, 3)) == 8.0
    assert float(compiled(w, jnp.array(3.0), flag=True, power=3)) == 27.0
    assert float(compiled(w, jnp.array(2.0), flag=True, power=3)) == 8.0
    assert float(compiled(w, 2.0, True)) == 2.0
    assert float(compiled(w, 3.0, True)) == 3.0
    assert counted.calls == 5


def test_a_flag_is_not_taken_for_an_array():
    compiled = vg.jit(vg.vector_grad(lambda w, flag: w * 2 if flag is True else w * 3))
    w = jnp.array(1.0)
    for flag, expected in [(jnp.array(True), 3.0), (True, 2.0), (jnp.array(True), 3.0)]:
        assert float(compiled(w, flag)) == expected


@pytest.mark.parametrize("position", [0, 1, -1])
def test_a_python_number_that_is_differentiated_is_traced(position):
    compiled, counted = compile_counted(lambda x, y: x**2 * y**3, argnums=position)
    derivatives = {0: lambda x, y: 2 * x * y**3, 1: lambda x, y: 3 * x**2 * y**2}
    for x, y in [(2.0, 3.0), (3.0, 3.0), (2.0, 5.0)]:
        expected = derivatives[position % 2](x, y)
        assert float(compiled(x, y)) == pytest.approx(expected)
    assert counted.calls <= 3


def test_numpy_arrays_are_traced():
    compiled, counted = compile_counted(apply, True)
    model = make_mlp()
    dtype = jnp.ones(()).dtype
    for x in (jnp.ones(3), np.ones(3, dtype), np.full(3, 2.0, dtype)):
        assert tree_allclose(compiled(model, x), vg.vector_grad(apply, True)(model, x))
    of_numpy = jtu.tree_map(lambda x: np.asarray(x) if eqx.is_array(x) else x, model)
    assert tree_allclose(compiled(of_numpy, jnp.ones(3)), compiled(model, jnp.ones(3)))
    assert counted.calls == 1


def test_another_module_as_a_later_argument():
    def distill(student, teacher, x, y=None):
        return student(x) - teacher(x)

    compiled, counted = compile_counted(distill, True)
    for seed in range(3):
        models = make_mlp(seed=seed), make_mlp(seed=seed + 1, depth=3)
        expected = vg.vector_grad(distill, True)(*models, jnp.ones(3))
        assert tree_allclose(compiled(*models, jnp.ones(3)), expected)
    assert counted.calls == 1


class Lists(eqx.Module):
    items: list[jax.Array]
    by_name: dict[str, jax.Array]


@pytest.mark.parametrize("num_calls", [1, 40])
@pytest.mark.parametrize("length", [2, 20])
def test_a_changed_list_of_a_module_is_noticed(length, num_calls):
    compiled = vg.jit(vg.vector_grad(lambda m: sum(x**2 for x in m.items), "items"))
    module = Lists([jnp.ones(2)] * length, {})
    for _ in range(num_calls):
        compiled(module)
    module.items[1] = jnp.full(2, 3.0)
    assert compiled(module)["items.1"].tolist() == [6.0, 6.0]
    module.items.append(jnp.full(2, 4.0))
    assert compiled(module)[f"items.{length}"].tolist() == [8.0, 8.0]


def test_a_changed_dict_of_a_module_is_noticed():
    compiled = vg.jit(vg.vector_grad(lambda m: sum(m.by_name.values()), "by_name"))
    module = Lists([], {"a": jnp.ones(2)})
    compiled(module)
    module.by_name["b"] = module.by_name.pop("a")
    assert list(compiled(module)) == ["by_name.b"]


def test_a_module_that_was_passed_is_collected():
    compiled = vg.jit(vg.vector_grad(apply, True))
    model = make_mlp()
    compiled(model, jnp.ones(3))
    module, leaf = weakref.ref(model), weakref.ref(model.layers[0].weight)
    del model
    gc.collect()
    assert module() is None
    assert leaf() is None
    assert tree_allclose(
        compiled(make_mlp(), jnp.ones(3)), vg.vector_grad(apply, True)(make_mlp(), jnp.ones(3))
    )


def test_decorates_functions_and_methods():
    class Loss(eqx.Module):
        weight: jax.Array

        @vg.jit
        @vg.vector_grad(grad_states="weight", return_value=True)
        def gradient(self, x):
            """The gradient."""
            return self.weight * x

    grads, value = Loss(jnp.full(2, 3.0)).gradient(jnp.array([1.0, 2.0]))
    assert grads["weight"].tolist() == [1.0, 2.0]
    assert value.tolist() == [3.0, 6.0]
    assert Loss.gradient.__name__ == "gradient"
    assert Loss.gradient.__doc__ == "The gradient."


def test_the_module_that_is_called():
    model, x = make_mlp(), jnp.ones(3)
    transform = vg.vector_grad(model, "layers.0", argnums=0)
    compiled = vg.jit(transform)
    assert tree_allclose(compiled(x), transform(x))
    # Its arrays are passed, and the constants are but numbers.
    constants = re.findall("dense<(.*?)>", compiled.lower(x).as_text())
    assert {float(constant) for constant in constants} <= {0.0, 1.0}


def test_over_states_by_reference():
    w, calls = vg.State(jnp.array([1.0, 2.0])), vg.State(0)

    def func(x):
        calls.value += 1
        return w.value * x

    compiled = vg.jit(vg.vector_grad(func, [w], argnums=0))
    for count in (1, 2):
        grads, x_grad = compiled(jnp.array([3.0, 4.0]))
        assert grads[0].tolist() == [3.0, 4.0]
        assert x_grad.tolist() == [count, 2.0 * count]
        assert int(calls.value) == count
        w.value = 2 * w.value


def test_of_units():
    compiled = vg.jit(vg.vector_grad(lambda tree: tree["v"] ** 2, "v", unit_aware=True))
    for unit in (u.mvolt, u.volt, u.mvolt):
        grads = compiled({"v": jnp.array(3.0) * unit})
        assert u.get_unit(grads["v"]) == unit
        assert float(u.get_mantissa(grads["v"])) == 6.0


def test_inside_of_other_transformations():
    compiled, x = vg.jit(vg.vector_grad(apply, True)), jnp.ones(3)
    model = make_mlp()
    expected = vg.vector_grad(apply, True)(model, x)
    with jax.checking_leaks():
        assert tree_allclose(eqx.filter_jit(compiled)(model, x), expected)
    compiled(model, x)
    assert tree_allclose(eqx.filter_jit(lambda x: compiled(model, x))(x), expected)
    stacked = jax.vmap(lambda x: compiled(model, x)["layers.0.bias"])(jnp.stack([x, x]))
    assert tree_allclose(stacked[1], expected["layers.0.bias"])
    of_square = jax.grad(lambda x: vg.jit(vg.vector_grad(lambda x: x**3))(x))(2.0)
    assert float(of_square) == pytest.approx(12.0)


def read_program(func, model, x):
    params, static = eqx.partition(model, eqx.is_array)
    lowered = jax.jit(lambda params, x: func(eqx.combine(params, static), x)).lower(params, x)
    return lowered.as_text()


def test_inside_of_jit_it_is_the_same_program():
    model, x = make_mlp(), jnp.ones(3)
    # Of its own, because another test may have traced `apply` before there was any state.
    transform = vg.vector_grad(lambda model, x: model(x), "layers.*.weight")
    assert read_program(vg.jit(transform), model, x) == read_program(transform, model, x)


def test_an_error_of_the_function_is_raised_and_changes_nothing():
    def func(model, x, fail=False):
        if fail:
            raise TypeError("as asked for")
        return model(x)

    compiled = vg.jit(vg.vector_grad(func, True))
    model, x = make_mlp(), jnp.ones(3)
    with pytest.raises(TypeError, match="as asked for"):
        compiled(model, x, fail=True)
    compiled(model, x)
    with pytest.raises(TypeError, match="as asked for"):
        compiled(model, x, True)
    with pytest.raises(TypeError, match="dot_general"):
        compiled(model, jnp.ones(4))
    assert tree_allclose(compiled(model, x), vg.vector_grad(apply, True)(model, x))


def test_errors_of_the_gradient_are_raised():
    compiled = vg.jit(vg.vector_grad(apply, "layers.*.kernel"))
    with pytest.raises(ValueError, match="nearest paths are `layers.2`"):
        compiled(make_mlp(), jnp.ones(3))
    with pytest.raises(TypeError, match="Got no positional argument"):
        compiled()  # pyright: ignore[reportCallIssue]


def make_step(model, opt, x):
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    grads, value = vg.grad(loss, return_value=True)(model, x)
    return *opt.step(model, vg.states(grads)), value


def make_step_args():
    model = make_mlp()
    return model, vg.Optimizer(optax.adam(0.1), model), jnp.ones((4, 3))


FUNCS = {
    "step": (make_step, make_step_args),
    "static output": (lambda m, x: (m, x, "text", 3), lambda: (make_mlp(), jnp.ones(2))),
    "no array": (lambda power: jnp.ones(2) ** power, lambda: (3,)),
    "quantity": (lambda t: t * 2.0, lambda: (jnp.ones(2) * u.ms,)),
    "partial": (eqx.Partial(apply, make_mlp()), lambda: (jnp.ones(3),)),
    "nothing": (lambda: jnp.zeros(2), lambda: ()),
}


@pytest.mark.parametrize("name", FUNCS)
def test_any_function_is_compiled_as_by_equinox(name):
    func, make_args = FUNCS[name]
    counted = Counted(func) if name != "partial" else func
    ours, theirs = vg.jit(counted), eqx.filter_jit(func)
    for _ in range(3):
        assert tree_allclose(ours(*make_args()), theirs(*make_args()))
    assert name == "partial" or counted.calls == 1


def test_keyword_arguments_and_options_of_the_decorator():
    @vg.jit(donate="none")
    def func(x, *, power):
        return x**power

    assert float(func(jnp.array(3.0), power=2)) == 9.0
    assert float(func(jnp.array(3.0), power=3)) == 27.0
    assert "stablehlo.power" in func.lower(jnp.array(3.0), power=2.5).as_text()


@pytest.mark.parametrize(
    ("donate", "first", "rest"),
    [("none", False, False), ("all-except-first", False, True), ("all", True, True)],
)
def test_arguments_are_donated(donate, first, rest):
    x, tree = jnp.ones(100), {"w": jnp.ones(100)}
    y, others = vg.jit(lambda x, tree: (x + 1, {"w": tree["w"] + 1}), donate=donate)(x, tree)
    jax.block_until_ready(y)
    assert (x.is_deleted(), tree["w"].is_deleted()) == (first, rest)


def test_an_object_that_is_changed_is_read_again():
    model = [jnp.ones(2), {"w": jnp.ones(2)}]
    func = vg.jit(lambda model: model[0] + model[1]["w"])
    for value in (1.0, 2.0, 3.0):
        model[1]["w"] = jnp.full(2, value)
        assert tree_allclose(func(model), jnp.full(2, 1.0 + value))
    model.append(1)
    assert tree_allclose(func(model), jnp.full(2, 4.0))


@dataclasses.dataclass
class Config:
    scale: float


def test_a_static_value_without_a_hash_is_refused():
    with pytest.raises(TypeError, match=r"each must be hashable. Got Config.*frozen=True"):
        vg.jit(lambda x, config: x * config.scale)(jnp.ones(2), Config(2.0))


def test_wrong_uses():
    with pytest.raises(TypeError, match=r"`jit\(func=...\)` must be a callable. Got 3"):
        vg.jit(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        ValueError, match=r"`jit\(donate=...\)` must be one of .*, .none.. Got .first'"
    ):
        vg.jit(jnp.sin, donate="first")  # pyright: ignore[reportArgumentType]


def test_many_kinds_of_arguments(monkeypatch):
    monkeypatch.setattr("vgrad_eqx._jit.jit._MOST", 3)
    compiled = vg.jit(vg.vector_grad(lambda w, power: w**power))
    for power in [*range(2, 9), 2, 3, 8]:
        assert float(compiled(jnp.array(1.0), power)) == power


def test_a_float_that_is_differentiated_by_default_is_traced():
    compiled, counted = compile_counted(lambda x: x**3)
    for x in (1.0, 2.0, 3.0):
        assert float(compiled(x)) == 3 * x**2
    assert counted.calls == 1


class Pair(NamedTuple):
    left: Any
    right: Any


def test_named_tuples_and_keys():
    def func(pair, key):
        return pair.left * jr.normal(key) * pair.right["b"]

    compiled, counted = compile_counted(func, True)
    pair = Pair(jnp.ones(()), {"b": jnp.ones(2)})
    for seed in range(3):
        key = jr.key(seed)
        assert tree_allclose(compiled(pair, key), vg.vector_grad(func, True)(pair, key))
    assert counted.calls == 1
