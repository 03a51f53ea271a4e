"""Elementwise derivatives are right where a function is elementwise, and refused elsewhere."""

import functools as ft
from typing import Any

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import vgrad_eqx as vg
from vgrad_eqx._gradients.elementwise import make_weights

from ..helpers import tree_allclose


pytestmark = pytest.mark.optimized
ELEMENTWISE = [
    jnp.sin,
    jnp.tanh,
    jnp.square,
    jnp.abs,
    jax.nn.softplus,
    jax.nn.relu,
    jax.nn.gelu,
    lambda x: jnp.exp(-(x**2)),
    lambda x: x / (1 + x**2),
    lambda x: jnp.where(x > 0.3, x**3, -x),
    lambda x: 0.7 * x - 0.2,
    lambda x: jnp.clip(x, -0.5, 0.5) + x,
]
# They never saturate, so that what is mixed in between is not hidden.
INCREASING = [
    lambda x: x + 0.5 * jnp.sin(x),
    lambda x: jnp.arctan(x / 4),
    lambda x: 2 * x + 1,
    jnp.arcsinh,
]
MIXING = {
    "cumsum": lambda x, w: jnp.cumsum(x),
    "batch norm": lambda x, w: (x - x.mean()) / jnp.sqrt(x.var() + 1e-5),
    "softmax": lambda x, w: jax.nn.softmax(x),
    "matmul": lambda x, w: w @ x,
    "sort": lambda x, w: jnp.sort(x),
    "flip": lambda x, w: jnp.flip(x),
    "roll": lambda x, w: x + 1e-3 * jnp.roll(x, 3),
    "sum": lambda x, w: x * jnp.sum(x),
    "one pair": lambda x, w: x.at[0].add(0.1 * x[7]),
    "max": lambda x, w: x - 0.5 * jnp.max(x),
}


def compose(funcs, x):
    return ft.reduce(lambda x, func: func(x), funcs, x)


def draw(generator, funcs, most):
    size = generator.integers(1, most + 1)
    return [funcs[i] for i in generator.integers(0, len(funcs), size)]


def draw_point(generator):
    x = generator.normal(size=8)
    return jnp.asarray(x if np.any(np.diff(x) < 0) else x[::-1], jnp.float32)


@pytest.mark.parametrize(
    "seed", [0, 1, *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5)]]
)
def test_right_on_random_elementwise_functions(seed):
    generator = np.random.default_rng(seed)
    for _ in range(12):
        func = ft.partial(compose, draw(generator, ELEMENTWISE, 4))
        x = draw_point(generator)
        expected = jax.jit(jax.vmap(jax.grad(func)))(x)
        assert tree_allclose(vg.elementwise_grad(func)(x), expected)


@pytest.mark.parametrize(
    "seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)]]
)
def test_random_mixing_functions_are_refused(seed):
    generator = np.random.default_rng(seed)
    for name in MIXING:
        weights = jnp.asarray(generator.normal(size=(8, 8)), jnp.float32)
        before, after = [draw(generator, INCREASING, 2) for _ in range(2)]
        mix = ft.partial(MIXING[name], w=weights)
        func = ft.partial(compose, [*before, mix, *after])
        with pytest.raises(
            ValueError, match=r"depends on other elements of `args\[0\]`, first"
        ):
            vg.elementwise_grad(func)(draw_point(generator))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_high_order_of_a_polynomial(dtype):
    x = jnp.linspace(0.5, 1.0, 8, dtype=dtype)
    got = jax.jit(vg.elementwise_grad(lambda x: x**3, order=9, check_states=False))(x)
    assert tree_allclose(got, jnp.zeros_like(x))
    with pytest.raises(Exception, match="depends on other elements"):
        vg.elementwise_grad(lambda x: x**3 + x[::-1], order=8, check_states=False)(x)


@pytest.mark.parametrize("order", [1, 2])
def test_a_function_that_sets_a_state_may_be_compiled(order):
    seen = vg.State(jnp.zeros(2))

    def func(x):
        seen.value = jax.lax.stop_gradient(2 * x)
        return x**3

    x = jnp.array([1.0, 2.0])
    for wrap in (lambda f: f, jax.jit, vg.jit):
        expected = {1: 3 * x**2, 2: 6 * x}[order]
        assert tree_allclose(wrap(vg.elementwise_grad(func, order=order))(x), expected)
        assert seen.value.tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("order", "dtype"), [(1, "float32"), (2, "float32"), (4, "float32"), (9, "float16")]
)
def test_all_elements_of_a_large_batch_have_their_own_weights(order, dtype):
    weights = make_weights((5000,), [jnp.ones(1, dtype)], order)
    powers = {tuple(column) for column in np.stack(weights, 1) ** order}
    assert len(powers) == 5000


def test_a_long_program_is_refused_and_a_short_one_is_not():
    x = jnp.linspace(0.1, 1.0, 4)
    assert tree_allclose(vg.elementwise_grad(jnp.sin, order=6)(x), -jnp.sin(x), 1e-3)
    with pytest.raises(ValueError, match="at most 50,000 operations. Got 40, for about 1e1"):
        vg.elementwise_grad(jnp.sin, order=40)(x)


def test_the_result_is_that_without_the_check():
    net = eqx.nn.MLP(1, "scalar", 8, 2, jnp.tanh, key=jr.key(0))
    func = lambda x: jax.vmap(net)(x[:, None])
    x = jnp.linspace(0.0, 1.0, 32)
    for order in (1, 2):
        checked, plain = (
            jax.jit(vg.elementwise_grad(func, order=order, check=check))(x)
            for check in (True, False)
        )
        assert tree_allclose(checked, plain, 1e-5, 1e-6)


def test_only_the_result_is_differentiated():
    """The loop of the check has no part in the program of the backward pass."""
    func = lambda x, w: jnp.sin(w * x)
    loss = lambda w, x: vg.elementwise_grad(func)(x, w).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(2.0, jnp.ones(8))
    assert str(jaxpr).count("scan[") == 1


def test_no_pair_of_elements_is_missed():
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=1000), jnp.float32)
    for _ in range(40):
        i, j = generator.choice(len(x), 2, replace=False)
        with pytest.raises(ValueError, match="depends on other elements"):
            vg.elementwise_grad(lambda x, i=i, j=j: x.at[i].add(0.1 * x[j]))(x)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_functions_are_refused_in_higher_orders_and_compiled(name, jit, order):
    weights = jr.normal(jr.key(0), (8, 8))
    transform = vg.elementwise_grad(lambda x: MIXING[name](x, weights), order=order)
    x = draw_point(np.random.default_rng(1))
    wrapped = eqx.filter_jit(transform) if jit else transform
    with pytest.raises((ValueError, RuntimeError), match="depends on other elements of `args"):
        jax.block_until_ready(wrapped(x))
    unchecked = vg.elementwise_grad(
        lambda x: MIXING[name](x, weights), order=order, check=False
    )
    assert unchecked(x).shape == x.shape


@pytest.mark.parametrize("func", ELEMENTWISE, ids=range(len(ELEMENTWISE)))
@pytest.mark.parametrize("order", [2, 3])
def test_higher_orders_are_those_of_nested_gradients(func, order):
    x = draw_point(np.random.default_rng(0))
    scalar = func
    for _ in range(order):
        scalar = jax.grad(scalar)
    expected = jax.vmap(scalar)(x)
    assert tree_allclose(vg.elementwise_grad(func, order=order)(x), expected, 1e-4, 1e-4)


# A matrix product may round the rows of a batch in different ways.
@pytest.mark.slow
@pytest.mark.parametrize(("num_points", "width"), [(77, 33), (1000, 20), (1000, 128)])
def test_no_false_alarm_for_a_network_over_a_batch(num_points, width):
    mlp = eqx.nn.MLP(2, "scalar", width, 4, jnp.tanh, key=jr.key(width))
    t, x = jr.normal(jr.key(num_points), (2, num_points))
    func = lambda t, x: jax.vmap(lambda t, x: mlp(jnp.stack([t, x])))(t, x)
    point = lambda t, x: mlp(jnp.stack([t, x]))
    derivatives = vg.elementwise_grad(func, argnums=(0, 1))(t, x)
    assert tree_allclose(derivatives, jax.jit(jax.vmap(jax.grad(point, (0, 1))))(t, x))
    for order in (2, 3):
        transform = vg.elementwise_grad(func, argnums=(0, 1), order=order)
        compiled = eqx.filter_jit(transform)(t, x)
        assert tree_allclose(compiled, transform(t, x), 1e-3, 1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_dtypes(dtype):
    x = jnp.asarray(jnp.linspace(0.1, 2.0, 300), dtype)
    derivative = vg.elementwise_grad(lambda x: x**2 * jnp.asarray(3.0, dtype))(x)
    assert derivative.dtype == dtype
    assert tree_allclose(derivative, 6 * x, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="depends on other elements"):
        vg.elementwise_grad(lambda x: x - x.mean())(x)


def test_complex_outputs_of_real_leaves():
    x, func = jnp.array([1.0, 2.0]), lambda x: (1 + 2j) * x**3
    match = (
        r"order=1\)` must return real outputs .* leaf `args\[0\]`, f32\[2\]. Got c64\[2\]. Ret"
    )
    with pytest.raises(TypeError, match=match.replace("f32", r"f\d+").replace("c64", r"c\d+")):
        vg.elementwise_grad(func)(x)
    real, imag = vg.elementwise_grad(lambda x: (func(x).real, func(x).imag))(x)
    assert tree_allclose(real + 1j * imag, (1 + 2j) * 3 * x**2)
    assert tree_allclose(vg.elementwise_grad(func, order=2)(x), (1 + 2j) * 6 * x)


def test_complex_leaves():
    z, squared = jnp.array([1 + 2j, 3 - 1j]), lambda z: jnp.abs(z) ** 2
    assert tree_allclose(vg.elementwise_grad(lambda z: z**3, order=2)(z), 6 * z)
    assert tree_allclose(vg.elementwise_grad(squared)(z), 2 * jnp.conj(z))
    match = (
        r"order=2\)` must return complex outputs for the complex leaf `z`.* `jax.lax.complex"
    )
    with pytest.raises(TypeError, match=match):
        vg.elementwise_grad(lambda tree: squared(tree["z"]), "z", order=2)({"z": z})


def test_small_derivatives_and_those_that_are_not_finite_pass():
    x = jnp.linspace(0.0, 12.0, 64)
    for order in (1, 2):
        vg.elementwise_grad(lambda x: jnp.exp(-(x**2)), order=order)(x)
    assert bool(jnp.isinf(vg.elementwise_grad(jnp.sqrt)(x)[0]))


def test_several_outputs_and_arguments():
    func = lambda tree, y: {"p": tree["a"] * y, "q": jnp.sin(y), "n": 3}
    tree, y = {"a": jnp.array([1.0, 2.0])}, jnp.array([3.0, 4.0])
    grads = vg.elementwise_grad(func, "a", argnums=1)(tree, y)
    by_p, by_q = ({"a": y}, tree["a"]), ({"a": jnp.zeros(2)}, jnp.cos(y))
    assert tree_allclose(grads, {"p": by_p, "q": by_q, "n": None})


def test_over_states_by_reference():
    w = vg.State(jnp.array([1.0, 2.0]))
    assert tree_allclose(
        vg.elementwise_grad(lambda x: w.value**3 * x, [w], order=2)(2.0),
        [12.0 * w.value],
    )
    with pytest.raises(ValueError, match="depends on other elements of `0`, first at index"):
        vg.elementwise_grad(lambda x: jnp.cumsum(w.value) * x, [w])(2.0)


@pytest.mark.parametrize("order", [1, 2])
def test_units(order):
    tau = jnp.array([1.0, 2.0]) * u.ms
    func = lambda tau: tau**3 * u.mvolt
    result = vg.elementwise_grad(func, order=order, unit_aware=True)(tau)
    expected = {1: (3.0, 12.0), 2: (6.0, 12.0)}[order]
    assert u.get_unit(result) == u.mvolt * u.ms ** (3 - order)
    assert tree_allclose(u.get_mantissa(result), jnp.array(expected))


def test_an_index_is_named():
    func = lambda x: x.at[1, 2].add(x[0, 0])
    with pytest.raises(
        ValueError, match=r"elements of `args\[1\]`, first at index \(0, 0\). Use"
    ):
        vg.elementwise_grad(lambda _, x: func(x), argnums=1)(0, jnp.ones((2, 3)))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"of the shape of `args\[0\]`, f.*\[3\]. Got f.*\[\]"):
        vg.elementwise_grad(jnp.sum)(jnp.ones(3))
    assert float(vg.elementwise_grad(lambda x: x**2)(3.0)) == 6.0


@pytest.mark.parametrize(
    ("order", "error"), [(1.5, TypeError), (True, TypeError), (0, ValueError)]
)
def test_wrong_orders(order: Any, error):
    with pytest.raises(error, match=r"`elementwise_grad\(order=...\)` must be"):
        vg.elementwise_grad(jnp.sin, order=order)


def of_tree(tree, x, scale):
    return {"p": tree["a"] * jnp.sin(x) * scale, "n": 3}


def of_tree_with_aux(tree, x, scale):
    return of_tree(tree, x, scale), {"tag": "s"}


@pytest.mark.parametrize("return_value", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("argnums", "selected"),
    [(None, False), (1, False), ((1,), False), ([-1, 0], False), (None, True), ((2, 1), True)],
)
def test_results_are_those_of_both_tables(argnums, selected, order, has_aux, return_value):
    tree = {"a": jnp.array([1.0, 2.0]), "n": 3}
    x, scale = jnp.array([0.1, 0.2]), jnp.array([2.0, 3.0])
    a, s, c = tree["a"], jnp.sin(x), jnp.cos(x)
    zero = jnp.zeros(2)
    by_a, by_scale = (s * scale, a * s) if order == 1 else (zero, zero)
    by_x = a * c * scale if order == 1 else -a * s * scale
    wrap = lambda entry: {"p": entry, "n": None}
    by_arg = [{"a": by_a, "n": None}, by_x, by_scale]
    grads: Any = [{"a": by_a}] if selected else []
    if isinstance(argnums, tuple | list):
        grads.append(tuple([by_arg[i] for i in argnums]))
    elif not selected:
        grads.append(by_arg[argnums or 0])
    expected: Any = [wrap(grads[0] if len(grads) == 1 else tuple(grads))]
    expected += [of_tree(tree, x, scale)] if return_value else []
    expected += [{"tag": "s"}] if has_aux else []
    transform = vg.elementwise_grad(
        of_tree_with_aux if has_aux else of_tree,
        "a" if selected else None,
        argnums,
        has_aux=has_aux,
        return_value=return_value,
        order=order,
    )
    expected = expected[0] if len(expected) == 1 else tuple(expected)
    assert tree_allclose(transform(tree, x, scale), expected)


def test_the_program_is_that_of_the_gradient_of_the_sum():
    mlp = eqx.nn.MLP(2, "scalar", 16, 3, jnp.tanh, key=jr.key(0))
    t, x = jr.normal(jr.key(1), (2, 64))
    func = lambda t, x: jax.vmap(lambda t, x: mlp(jnp.stack([t, x])))(t, x)

    def measure(derivative):
        compiled = jax.jit(derivative).lower(t, x).compile()
        cost, text = compiled.cost_analysis(), compiled.as_text()
        assert cost is not None
        assert text is not None
        return text.count(" = "), cost["flops"], cost["bytes accessed"]

    ours = measure(vg.elementwise_grad(func, argnums=1, check=False))
    assert ours == measure(jax.grad(lambda t, x: func(t, x).sum(), 1))
