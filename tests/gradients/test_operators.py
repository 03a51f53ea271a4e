import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import vgrad_eqx as vg

from ..helpers import apply, make_mlp, tree_allclose


FUNCS = {
    "elementwise": lambda x: x**3,
    "mixing": lambda x: jnp.cumsum(x) * x[0],
    "matrix": lambda x: x[:, None] * x[None, :],
    "scalar": lambda x: jnp.sum(x**2),
    "constant": lambda x: jnp.ones(3),
}


@pytest.mark.parametrize("func", FUNCS.values(), ids=FUNCS.keys())
def test_equals_column_sums_of_jacobian(func, getkey):
    x = jr.normal(getkey(), (4,))
    jacobian = jax.jacrev(func)(x).reshape(-1, 4)
    assert tree_allclose(vg.vector_grad(func)(x), jacobian.sum(axis=0))


def scaled(model, x, scale):
    return model(x) * scale


def scaled_with_aux(model, x, scale):
    value = model(x) * scale
    return value, {"norm": jnp.sum(value**2), "tag": "s", "count": 3, "func": jnp.sin}


def expected_grads(argnums, selected):
    model, x, scale = make_mlp(), jnp.arange(3.0), jnp.array(2.0)
    ones = jnp.ones(2)
    _, pull_back = eqx.filter_vjp(scaled, model, x, scale)
    by_arg = pull_back(ones)
    var_grads = {
        "layers.0.bias": by_arg[0].layers[0].bias,
        "layers.1.bias": by_arg[0].layers[1].bias,
        "layers.2.bias": by_arg[0].layers[2].bias,
    }
    if argnums is None:
        return var_grads if selected else by_arg[0]
    is_int = isinstance(argnums, int)
    arg_grads = by_arg[argnums] if is_int else tuple(by_arg[i] for i in argnums)
    return (var_grads, arg_grads) if selected else arg_grads


@pytest.mark.parametrize("return_value", [False, True])
@pytest.mark.parametrize("has_aux", [None, False, True])
@pytest.mark.parametrize(
    ("argnums", "selected"),
    [
        (None, False),
        (0, False),
        (1, False),
        (-1, False),
        ((1,), False),
        ([2, 1], False),
        (None, True),
        (1, True),
        (np.int64(2), True),
        ((2,), True),
        ((-1, 1), True),
    ],
)
def test_results_are_those_of_both_tables(argnums, selected, has_aux, return_value):
    grad_states = "layers.*.bias" if selected else None
    func = scaled_with_aux if has_aux else scaled
    transform = vg.vector_grad(
        func, grad_states, argnums, has_aux=has_aux, return_value=return_value
    )
    model, x, scale = make_mlp(), jnp.arange(3.0), jnp.array(2.0)
    results = transform(model, x, scale)
    argnums = argnums if argnums is None or isinstance(argnums, list | tuple) else int(argnums)
    grads = expected_grads(argnums, selected)
    out = func(model, x, scale)
    value, aux = out if has_aux else (out, None)
    expected = [grads] + [value] * return_value + [aux] * bool(has_aux)
    assert tree_allclose(results, expected[0] if len(expected) == 1 else tuple(expected))


def test_var_grads_are_a_plain_dict_in_leaf_order():
    grads = vg.vector_grad(apply, True)(make_mlp(), jnp.ones(3))
    assert type(grads) is dict
    assert list(grads) == list(vg.states(make_mlp()))


def test_several_selectors_keep_their_structure():
    first = vg.path("layers.0")
    groups = {"first": first, "rest": [~first, ("layers.2.bias",)]}
    grads = vg.vector_grad(apply, groups)(make_mlp(), jnp.ones(3))
    every = vg.vector_grad(apply, True)(make_mlp(), jnp.ones(3))
    chosen = {
        "first": list(every)[:2],
        "rest": [list(every)[2:], (["layers.2.bias"],)],
    }
    expected = jax.tree.map(
        lambda names: {name: every[name] for name in names},
        chosen,
        is_leaf=lambda node: isinstance(node, list) and isinstance(node[0], str),
    )
    assert tree_allclose(grads, expected)


def test_decorates_with_and_without_options():
    @vg.vector_grad
    def plain(x):
        return x**2

    @vg.vector_grad(argnums=1, return_value=True)
    def with_options(x, y):
        """Docs."""
        return x * y

    assert float(plain(3.0)) == 6.0
    assert tuple(map(float, with_options(3.0, 4.0))) == (3.0, 12.0)
    assert (with_options.__name__, with_options.__doc__) == ("with_options", "Docs.")
    assert isinstance(with_options, vg.GradientTransform)


class Affine(eqx.Module):
    weight: jax.Array
    bias: jax.Array
    power: int = eqx.field(static=True, default=2)

    def __call__(self, x):
        return self.weight * x**self.power + self.bias

    @vg.vector_grad(grad_states="weight")
    def grad_of_weight(self, x):
        return self(x)

    @vg.vector_grad(argnums=1)
    def grad_of_x(self, x):
        return self(x)

    @eqx.filter_jit
    def compiled(self, x):
        return self(x)


def make_affine():
    return Affine(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))


X = jnp.array([2.0, 3.0])


def test_decorates_a_method():
    affine = make_affine()
    assert tree_allclose(affine.grad_of_weight(X), {"weight": X**2})
    assert tree_allclose(affine.grad_of_x(X), 2 * X * affine.weight)
    assert isinstance(Affine.grad_of_weight, vg.GradientTransform)


def test_decorates_a_method_of_a_plain_class():
    class Plain:
        @vg.vector_grad(argnums=1)
        def square(self, x):
            return x**2

    assert float(Plain().square(3.0)) == 6.0


def scale(affine, x, *, by):
    return by * affine(x)


AFFINES = {
    "module": lambda affine: affine,
    "bound method": lambda affine: affine.__call__,
    "bound compiled method": lambda affine: affine.compiled,
    "Partial": lambda affine: eqx.Partial(apply, affine),
    "Partial of a module": lambda affine: eqx.Partial(affine),
    "Partial with keywords": lambda affine: eqx.Partial(scale, affine, by=1.0),
    "Partial of a Partial": lambda affine: eqx.Partial(eqx.Partial(scale, affine), by=1.0),
    "filter_vmap": lambda affine: eqx.filter_vmap(affine, in_axes=None, axis_size=1),
}


@pytest.mark.parametrize("wrap", AFFINES.values(), ids=AFFINES.keys())
def test_state_tree_is_the_module_in_func(wrap):
    func = wrap(make_affine())
    grads = vg.vector_grad(func, "weight")(X)
    assert tree_allclose(grads, {"weight": X**2})
    both = vg.vector_grad(func, "bias", argnums=0)(X)
    assert tree_allclose(both, ({"bias": jnp.ones(2)}, 2 * X * make_affine().weight))


WRAPPERS = {
    "jit": jax.jit,
    "filter_jit": eqx.filter_jit,
    "partial": lambda func: ft.partial(func),
    "eqx.Partial": lambda func: eqx.Partial(func),
    "checkpoint": eqx.filter_checkpoint,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_state_tree_is_the_first_argument_of_a_wrapped_function(wrap):
    tree = {"w": jnp.array([1.0, 2.0])}
    func = wrap(lambda tree, x: tree["w"] * x)
    assert tree_allclose(vg.vector_grad(func, "w")(tree, X), {"w": X})


def test_keyword_arguments_reach_func_and_are_not_differentiated():
    def func(x, /, *, scale, shift=0.0):
        return scale * x + shift

    assert float(vg.vector_grad(func)(3.0, scale=jnp.array(2.0), shift=1.0)) == 2.0


def test_pytree_argument_has_none_where_nothing_can_be_differentiated():
    arg = {"x": jnp.ones(2), "n": jnp.arange(2), "f": jnp.sin, "p": 0.5, "none": None}
    grads = vg.vector_grad(lambda arg: arg["f"](arg["x"]) * arg["p"])(arg)
    expected = {"x": 0.5 * jnp.cos(jnp.ones(2)), "n": None, "f": None, "p": None}
    assert tree_allclose(grads, expected | {"none": None})


SCALARS = [3.0, 3.0 + 0j, np.float32(3.0), np.array(3.0, np.float32), jnp.float32(3.0)]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: type(scalar).__name__)
def test_a_number_is_differentiated(scalar):
    grad = vg.vector_grad(lambda x: x**2)(scalar)
    assert isinstance(grad, jax.Array)
    assert complex(grad) == 6.0
    assert grad.dtype == jnp.result_type(scalar)


def test_output_may_be_any_pytree():
    def func(x):
        return {
            "y": x**2,
            "n": 3,
            "tag": "s",
            "i": jnp.arange(2),
            "z": [x[0]],
            "c": 1.5,
        }

    grads, value = vg.vector_grad(func, return_value=True)(X)
    assert tree_allclose(grads, 2 * X + jnp.array([1.0, 0.0]))
    assert tree_allclose(value["y"], X**2)
    assert (value["n"], value["tag"], float(value["c"])) == (3, "s", 1.5)
    assert value["i"].tolist() == [0, 1]


def test_python_float_as_output_gives_zeros():
    assert vg.vector_grad(lambda x: 2.0)(X).tolist() == [0.0, 0.0]


def test_output_dtypes_may_be_mixed():
    def func(x):
        return x.astype(jnp.float16), x**2

    assert tree_allclose(vg.vector_grad(func)(X), 1 + 2 * X)


def test_bfloat16_stays_bfloat16():
    x = jnp.ones(3, jnp.bfloat16)
    assert tree_allclose(vg.vector_grad(lambda x: 3 * x)(x), jnp.full(3, 3, jnp.bfloat16))


def test_complex_follows_the_convention_of_jax():
    z = jnp.array([1.0 + 2.0j, 3.0 - 1.0j])
    holomorphic = vg.vector_grad(lambda z: z**2)(z)
    assert tree_allclose(holomorphic, 2 * z)
    real = vg.vector_grad(lambda z: jnp.abs(z) ** 2)(z)
    assert tree_allclose(real, jax.grad(lambda z: jnp.sum(jnp.abs(z) ** 2))(z))
    assert tree_allclose(real, 2 * jnp.conj(z))


def test_of_a_complex_output_a_real_leaf_sees_the_real_part():
    x, func = jnp.array([1.0, 2.0]), lambda x: (1 + 3j) * x**2
    assert tree_allclose(vg.vector_grad(func)(x), 2 * x)
    assert tree_allclose(vg.vector_grad(func)(x), vg.vector_grad(lambda x: func(x).real)(x))


def test_argnums_may_be_a_range():
    func = lambda x, y: x * y
    assert vg.vector_grad(func, argnums=range(2))(2.0, 3.0) == (3.0, 2.0)


def test_empty_arrays_work():
    x = jnp.zeros((0, 3))
    assert tree_allclose(vg.vector_grad(lambda x: x**2)(x), x)
    assert tree_allclose(vg.vector_grad(lambda x: x["a"] * 2, "a")({"a": x}), {"a": x})


def test_python_control_flow_on_values_works_eagerly():
    def func(model, x):
        return model["w"] * x if model["w"].sum() > 0 else -model["w"]

    for _ in range(2):
        grads = vg.vector_grad(func, "w")({"w": jnp.ones(2)}, X)
        assert tree_allclose(grads, {"w": X})


def test_func_is_called_once_when_compiled():
    calls = []

    def func(model, x):
        calls.append(1)
        return model(x)

    jax.jit(lambda x: vg.vector_grad(func, True)(make_mlp(), x))(jnp.ones(3))
    assert len(calls) == 1


def test_exceptions_of_func_come_through():
    def func(model, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vg.vector_grad(func, True)(make_mlp(), jnp.ones(3))


def test_transform_is_a_pytree_with_the_leaves_of_func():
    transform = vg.vector_grad(make_affine(), "weight")
    assert tree_allclose(vg.states(transform.func), vg.states(make_affine()))

    @eqx.filter_jit
    def call(transform, x):
        return transform(x)

    assert tree_allclose(call(transform, X), {"weight": X**2})


def test_unit_aware_makes_no_difference_to_arrays():
    grads = [vg.vector_grad(jnp.cumsum, unit_aware=aware)(X) for aware in (False, True)]
    assert tree_allclose(*grads)
