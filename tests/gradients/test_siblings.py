"""The siblings of `vector_grad`: the same options, and each its own derivative."""

import functools as ft
from typing import Any

import brainunit as u
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import pytest
import vgrad_eqx as vg

from ..helpers import apply, count_instructions, draw, make_mlp, tree_allclose
from .test_laws import funcs, normal, scalar_funcs, trees


JACOBIANS = {
    "jacrev": (vg.jacrev, jax.jacrev),
    "jacfwd": (vg.jacfwd, jax.jacfwd),
    "hessian": (vg.hessian, jax.hessian),
}
SIBLINGS: dict[str, Any] = {
    "vector_grad": (
        vg.vector_grad,
        lambda f, argnums: jax.grad(lambda *a: jnp.sum(f(*a)), argnums),
    ),
    "grad": (vg.grad, lambda f, argnums: jax.grad(lambda *a: jnp.sum(f(*a)), argnums)),
    **JACOBIANS,
}
each_sibling = pytest.mark.parametrize("name", SIBLINGS)


def of_tree(tree, x, scale):
    """A scalar for `grad`, of which all derivatives are there."""
    return jnp.sum(tree["a"] ** 2 * scale) * jnp.sum(jnp.sin(x)) + tree["b"][0] ** 3


TREE = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array(0.5)], "n": 3}
X, SCALE = jnp.array([0.1, 0.2, 0.3]), jnp.array(2.0)


@ft.cache
def expected_of(name, argnums, selected):
    """The blocks of JAX, over the selected leaves by path and the other arguments."""
    peer = SIBLINGS[name][1]

    def func(params, *args):
        args = list(args)
        if selected:
            args[0] = {**TREE, "a": params["a"], "b": [params["b.0"]]}
        return of_tree(*args)

    params = {"a": TREE["a"], "b.0": TREE["b"][0]}
    results = [peer(func, 0)(params, TREE, X, SCALE)] if selected else []
    if argnums is not None or not selected:
        positions = (0,) if argnums is None else argnums
        is_int = isinstance(positions, int) or argnums is None
        # JAX does not take an argument with an int in it.
        positions = tuple(
            i % 3 + 1 for i in ((positions,) if isinstance(positions, int) else positions)
        )
        diff, rest = eqx.partition([params, TREE, X, SCALE], eqx.is_inexact_array)
        of_diff = lambda *d: func(*eqx.combine(list(d), rest))
        blocks = peer(of_diff, positions)(*diff)
        if is_int:
            blocks = blocks[0]
            if name == "hessian":
                blocks = jtu.tree_map(
                    lambda block: block[0], blocks, is_leaf=lambda b: isinstance(b, tuple)
                )
        results.append(blocks)
    return results[0] if len(results) == 1 else tuple(results)


@pytest.mark.parametrize("return_value", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize(
    ("argnums", "selected"),
    [(None, False), (1, False), (-1, False), ((1,), False), ([2, 1], False)]
    + [(None, True), (1, True), ((2, 1), True)],
)
@each_sibling
def test_results_are_those_of_both_tables(name, argnums, selected, has_aux, return_value):
    func = (lambda *args: (of_tree(*args), {"tag": "s", "x": args[1]})) if has_aux else of_tree
    grad_states = "**" if selected else None
    transform = SIBLINGS[name][0](
        func, grad_states, argnums, has_aux=has_aux, return_value=return_value
    )
    positions = tuple(argnums) if isinstance(argnums, list) else argnums
    expected: Any = [expected_of(name, positions, selected)]
    expected += [of_tree(TREE, X, SCALE)] if return_value else []
    expected += [{"tag": "s", "x": X}] if has_aux else []
    expected = expected[0] if len(expected) == 1 else tuple(expected)
    for result in (transform(TREE, X, SCALE), transform(TREE, X, SCALE)):
        assert tree_allclose(result, expected)


@each_sibling
def test_plain_decorated_and_as_a_method(name):
    sibling = SIBLINGS[name][0]
    func = lambda tree: jnp.sum(tree["a"] ** 3)
    expected = sibling(func)(TREE)

    @sibling
    def plain(tree):
        return func(tree)

    @sibling(argnums=-1)
    def with_options(scale, tree):
        return func(tree)

    class Owner(eqx.Module):
        @sibling(argnums=1)
        def method(self, tree):
            return func(tree)

    for result in (plain(TREE), with_options(1.0, TREE), Owner().method(TREE)):
        assert tree_allclose(result, expected)
    assert plain.__wrapped__ is not None
    with pytest.raises(TypeError, match=rf"`{name}\(func=...\)` must be a callable. Got 3"):
        sibling(3)
    with pytest.raises(TypeError, match="unexpected keyword"):
        sibling(func, return_values=True)


@each_sibling
def test_under_jit_vmap_and_one_trace(name):
    sibling = SIBLINGS[name][0]
    once = eqx.debug.assert_max_traces(max_traces=1)
    func = lambda tree, x: jnp.sum(tree["a"] ** 3 * x)
    transform = sibling(func, "a", argnums=1)
    expected = transform(TREE, SCALE)
    compiled = eqx.filter_jit(once(lambda *args: transform(*args)))
    for _ in range(3):
        assert tree_allclose(compiled(TREE, SCALE), expected)
    xs = jnp.array([1.0, 2.0])
    batched = eqx.filter_vmap(transform, in_axes=(None, 0))(TREE, xs)
    assert tree_allclose(jtu.tree_map(lambda leaf: leaf[1], batched), expected)


@each_sibling
def test_over_states_by_reference(name):
    sibling, peer = SIBLINGS[name]
    w, calls = vg.State(jnp.array([1.0, 2.0])), vg.State(0)

    def func(x):
        calls.value += 1
        return jnp.sum(w.value**3 * x)

    states = {"w": w}
    grads, value = sibling(func, states, return_value=True)(2.0)
    expected = peer(lambda params: jnp.sum(params["w"] ** 3 * 2.0), 0)({"w": w.value})
    assert tree_allclose(grads, expected)
    assert tree_allclose(value, jnp.array(18.0))
    assert int(calls.value) == 1
    compiled = jax.jit(lambda x: sibling(func, states)(x))
    assert tree_allclose(compiled(2.0), expected)


@pytest.mark.parametrize(
    "name", ["jacrev", "jacfwd", pytest.param("hessian", marks=pytest.mark.slow)]
)
@draw(3)
@hypothesis.given(func=funcs, tree=trees([jnp.float32, jnp.float16]))
def test_jacobians_are_those_of_jax(name, func, tree):
    ours, theirs = JACOBIANS[name]
    diff, rest = eqx.partition(tree, eqx.is_inexact_array)
    of_diff = lambda diff: func(eqx.combine(diff, rest))
    inexact = lambda out: eqx.filter(out, eqx.is_inexact_array)
    expected = jax.jit(theirs(lambda diff: inexact(of_diff(diff))))(diff)
    assert tree_allclose(ours(func)(tree), expected, rtol=1e-3, atol=1e-3)


@hypothesis.given(scalar_funcs, trees([jnp.float32, jnp.bfloat16]))
def test_grad_is_that_of_equinox(func, tree):
    expected = eqx.filter_grad(func)(tree)
    assert tree_allclose(vg.grad(func)(tree), expected)
    selected = vg.grad(func, True)(tree)
    assert tree_allclose(selected, vg.states(expected))


@draw(2)
@hypothesis.given(funcs, trees([jnp.float32]))
def test_jacobians_by_path_are_those_over_a_dict(func, tree):
    params = vg.states(tree)
    of_params = lambda params: eqx.filter(
        func(vg.replace_states(tree, params)), eqx.is_inexact_array
    )
    for ours, theirs in JACOBIANS.values():
        expected = jax.jit(theirs(of_params))(params)
        assert tree_allclose(ours(func, True)(tree), expected, 1e-4, 1e-4)


UNITS = [None, u.ms, u.second, u.mvolt]


@hypothesis.given(
    st.sampled_from(list(SIBLINGS)),
    st.integers(0, 2**31 - 8),
    st.sampled_from(UNITS),
    st.sampled_from(UNITS),
    st.booleans(),
)
def test_laws_over_states_and_units(name, seed, unit, out_unit, by_reference):
    ours, theirs = SIBLINGS[name]
    x, mixing = jnp.asarray(normal(seed, (3,))), normal(seed + 1, (2, 3))
    number = lambda x: jnp.sum(jnp.tanh(mixing @ x)) if name == "grad" else jnp.tanh(mixing @ x)
    with_unit = lambda x, unit: x if unit is None else x * unit
    state = vg.State(with_unit(x, unit))

    def func(value):
        value = state.value if by_reference else value
        return with_unit(number(u.get_mantissa(value)), out_unit)

    states = [state] if by_reference else None
    result = ours(func, states, unit_aware=True)(with_unit(x, unit))
    if name == "hessian" and by_reference:
        result = result[0][0]
    elif by_reference:
        result = result[0]
    one = lambda unit: u.UNITLESS if unit is None else unit
    expected_unit = one(out_unit) / one(unit) ** (2 if name == "hessian" else 1)
    expected = jax.jit(theirs(number, 0))(x) * (
        expected_unit.magnitude if expected_unit.dim.is_dimensionless else 1.0
    )
    assert tree_allclose(u.get_mantissa(result), jnp.asarray(expected, x.dtype), 1e-4, 1e-4)
    if not expected_unit.dim.is_dimensionless:
        assert u.get_unit(result) == expected_unit


@hypothesis.given(st.sampled_from(["vector_grad", "grad", "jacrev"]), st.integers(0, 2**31 - 8))
def test_laws_over_complex_arguments(name, seed):
    ours, theirs = SIBLINGS[name]
    z = jnp.asarray(normal(seed, (3,)) + 1j * normal(seed + 1, (3,)))
    mixing = normal(seed + 2, (2, 3))
    number = lambda z: jnp.abs(mixing @ z) ** 2 if name != "grad" else jnp.sum(jnp.abs(z) ** 3)
    expected = jax.jit(theirs(number, 0))(z)
    assert tree_allclose(ours(number)(z), expected)
    assert tree_allclose(ours(lambda tree: number(tree["z"]), "z")({"z": z}), {"z": expected})


def test_a_hessian_by_path_has_all_blocks():
    model, x = make_mlp(), jnp.ones(3)
    func = lambda model, x: jnp.sum(jnp.tanh(model(x)))
    hessian = vg.hessian(func, "layers.[12].bias")(model, x)
    shapes = {
        path: {by: block.shape for by, block in row.items()} for path, row in hessian.items()
    }
    a, b = "layers.1.bias", "layers.2.bias"
    assert shapes == {a: {a: (8, 8), b: (8, 2)}, b: {a: (2, 8), b: (2, 2)}}
    assert tree_allclose(hessian[a][b], hessian[b][a].T)


TAU = jnp.array([1.0, 2.0]) * u.ms


@pytest.mark.parametrize("unit_aware", [True, False])
def test_units_of_jacobians(unit_aware):
    func = lambda tree: {"v": tree["tau"] ** 2 * u.mvolt / u.ms, "t": tree["tau"] * tree["g"]}
    tree = {"tau": TAU, "g": jnp.array(3.0)}
    for operator in (vg.jacrev, vg.jacfwd):
        jacobian = operator(func, "**", unit_aware=unit_aware)(tree)
        # With outputs of several dimensions, for nothing is added up.
        numbers = jtu.tree_map(u.get_mantissa, jacobian, is_leaf=u.math.is_quantity)
        assert tree_allclose(numbers["v"]["tau"], jnp.diag(jnp.array([2.0, 4.0])))
        assert tree_allclose(numbers["t"]["tau"], 3.0 * jnp.eye(2))
        if unit_aware:
            assert u.get_unit(jacobian["v"]["tau"]) == u.mvolt * u.ms / u.ms / u.ms * u.ms
            assert u.get_unit(jacobian["t"]["g"]) == u.ms
            assert isinstance(jacobian["t"]["tau"], jax.Array)


def test_units_of_hessians():
    func = lambda tau: jnp.sum(u.get_mantissa(tau) ** 3) * u.volt
    hessian = vg.hessian(func, unit_aware=True)(TAU)
    assert u.get_unit(hessian) == u.volt / u.ms**2
    assert tree_allclose(u.get_mantissa(hessian), jnp.diag(jnp.array([6.0, 12.0])))
    number = vg.hessian(func)(TAU)
    assert tree_allclose(number, u.get_mantissa(hessian))


@pytest.mark.parametrize("name", JACOBIANS)
def test_the_program_is_that_of_jax(name):
    ours, theirs = JACOBIANS[name]
    model, x = make_mlp(), jnp.ones(3)
    params = vg.states(model, "layers.*.bias")
    replace = lambda params: vg.replace_states(model, params)
    count = lambda func: count_instructions(jax.jit(func).lower(params).compile())
    expected = count(theirs(lambda params: replace(params)(x)))
    for check_states in (False, True):
        transform = ours(apply, "layers.*.bias", check_states=check_states)
        func = lambda params, transform=transform: transform(replace(params), x)
        assert count(func) == expected > 10


@each_sibling
def test_the_family_refuses_alike(name):
    sibling = SIBLINGS[name][0]
    func = lambda tree, x: jnp.sum(tree["a"] ** 2 * x)
    with pytest.raises(TypeError, match=rf"`{name}\(argnums=...\)` must be an int"):
        sibling(func, argnums=1.5)
    with pytest.raises(
        TypeError, match=rf"`{name}\(argnums=...\)` must name an argument with an in"
    ):
        sibling(func, argnums=1)(TREE, 3)
    with pytest.raises(ValueError, match=rf"`{name}\(grad_states=...\)`.*not depend on `b.0`"):
        sibling(func, "**")(TREE, X[0])
    with pytest.raises(TypeError, match=rf"`{name}\(func=...\)` must return an inexact array"):
        sibling(lambda tree: 3)(TREE)
    with pytest.raises(TypeError, match=rf"`{name}\(has_aux=True\)` needs a `func`"):
        sibling(func, has_aux=True)(TREE, X[0])
    infinite = lambda tree: jnp.sum(jnp.sqrt(tree["a"] * 0.0))
    with pytest.raises(FloatingPointError, match=f"`{name}.*in `a`"):
        sibling(infinite, "a", debug_nan=True)(TREE)


@pytest.mark.parametrize("out", [lambda x: x, lambda x: (x[0], x[1]), lambda x: x[0] + 1j])
def test_grad_of_no_real_scalar_says_what_to_use(out):
    hint = " Pass `has_aux=True`" if isinstance(out(X), tuple) else ""
    with pytest.raises(
        TypeError,
        match=rf"must return a real scalar. Got .*\]\.{hint}.* `vector_grad`.*`jacrev`",
    ):
        vg.grad(out)(X)


def test_complex_outputs_and_inputs_are_those_of_jax():
    z = jnp.array([1 + 2j, 3 - 1j])
    func = lambda z: jnp.sum(jnp.abs(z) ** 2)
    assert tree_allclose(vg.grad(func)(z), jax.grad(func)(z))
    assert tree_allclose(vg.jacrev(func)(z), jax.jacrev(func)(z))
    by_real = lambda x: (1 + 2j) * x**2
    assert tree_allclose(vg.jacfwd(by_real)(X), jax.jacfwd(by_real)(X))


Z = {"x": jnp.array([1.0, 2.0]), "z": jnp.array([1 + 2j])}
COMPLEX_LEAVES = {
    "argument": ({}, Z["z"], r"argnums=...\)` must name .* complex\d+ in `args\[0\]`. Split"),
    "inside": ({}, Z, r"argnums=...\)` must name real leaves. Got complex\d+ in `args\[0\].z`"),
    "number": ({"argnums": -1}, 1j, r"argnums=...\)` must name real leaves. Got complex"),
    "path": (
        {"grad_states": "**"},
        Z,
        r"grad_states=...\)` must name .* complex\d+ in `z`. Sp",
    ),
}


def sum_of_squares(tree):
    return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ["jacfwd", "hessian"])
@pytest.mark.parametrize("case", COMPLEX_LEAVES.values(), ids=COMPLEX_LEAVES.keys())
def test_complex_leaves_are_named_where_real_ones_are_needed(name, case):
    options, arg, match = case
    with pytest.raises(TypeError, match=rf"`{name}\({match}"):
        getattr(vg, name)(sum_of_squares, **options)(arg)


@pytest.mark.parametrize("name", ["jacfwd", "hessian"])
def test_a_complex_state_is_named_where_real_ones_are_needed(name):
    state = vg.State(Z["z"], name="wave")
    match = rf"`{name}\(grad_states=...\)` must name real leaves. Got complex\d+ in `wave`"
    with pytest.raises(TypeError, match=match):
        getattr(vg, name)(lambda: sum_of_squares(state.value), state)()


def test_complex_leaves_that_are_not_differentiated_pass():
    func = lambda tree: jnp.abs(tree["z"] @ tree["z"].T * tree["x"]) ** 2
    by_x = lambda x: func({**Z, "x": x})
    for operator, theirs in JACOBIANS.values():
        expected = theirs(by_x)(Z["x"])
        result = operator(func, "x")(Z)
        assert tree_allclose(
            result["x"]["x"] if operator is vg.hessian else result["x"], expected
        )


@pytest.mark.parametrize("name", ["jacrev", "hessian"])
@pytest.mark.parametrize("options", [{"grad_states": "x"}, {"argnums": 1}], ids=str)
def test_complex_outputs_are_refused_where_real_ones_are_needed(name, options):
    func = lambda tree, x: {"out": tree["x"] * tree["z"] * x, "real": x}
    match = rf"`{name}\(func=...\)` must return real .* c\d+\[2\], f\d+\[2\]. Return the pair"
    with pytest.raises(TypeError, match=rf"{match} .* `jacfwd`"):
        getattr(vg, name)(func, **options)(Z, Z["x"])
    split = lambda *args: (func(*args)["out"].real, func(*args)["out"].imag)
    real, imag = vg.jacrev(split, **options)(Z, Z["x"])
    expected = vg.jacfwd(func, **options)(Z, Z["x"])["out"]
    assert tree_allclose(jax.tree.map(jax.lax.complex, real, imag), expected)


def test_dtypes_of_jacobians_are_those_of_jax():
    tree = {"a": jnp.ones(2, "bfloat16"), "b": jnp.ones(2)}
    func = lambda tree: tree["a"] ** 2 * tree["b"] ** 2
    dtypes = {
        name: jax.tree.map(jnp.result_type, ours(func, "**")(tree))
        for name, (ours, _) in JACOBIANS.items()
    }
    half, single = jnp.dtype("bfloat16"), jnp.result_type(float)
    assert dtypes == {
        "jacrev": {"a": half, "b": single},
        "jacfwd": {"a": single, "b": single},
        "hessian": {"a": {"a": half, "b": half}, "b": {"a": single, "b": single}},
    }
    for name, (_, theirs) in JACOBIANS.items():
        assert dtypes[name] == jax.tree.map(jnp.result_type, theirs(func)(tree))


# Cotangents


@pytest.mark.parametrize("jit", [False, True])
def test_a_cotangent_weighs_the_rows_of_the_jacobian(jit):
    x = jnp.array([1.0, 2.0, 3.0])
    weights = jnp.array([1.0, 0.0, -2.0])
    func = lambda x: jnp.cumsum(x) * x[0]
    expected = weights @ jax.jacrev(func)(x)
    for cotangent in (weights, lambda y: weights + 0 * y):
        transform = vg.vector_grad(func, cotangent=cotangent)
        assert tree_allclose((eqx.filter_jit(transform) if jit else transform)(x), expected)


def test_a_cotangent_has_the_structure_of_the_output():
    func = lambda tree: {"y": tree["a"] ** 2, "z": jnp.sum(tree["a"]), "n": 3}
    cotangent = {"y": jnp.array([1.0, 2.0]), "z": 10.0, "n": None}
    grads = vg.vector_grad(func, "a", cotangent=cotangent)(TREE)
    assert tree_allclose(grads, {"a": jnp.array([12.0, 18.0])})
    half = vg.vector_grad(lambda x: x**2, cotangent=lambda y: y / 2)
    assert tree_allclose(half(X), X**3)
    w = vg.State(jnp.array([1.0, 2.0]))
    over_states = vg.vector_grad(lambda x: w.value * x, [w], cotangent=lambda y: y)
    assert tree_allclose(over_states(3.0), [jnp.array([9.0, 18.0])])


def test_the_unit_of_a_cotangent_multiplies():
    func = lambda tau: (tau**2 * u.mvolt / u.ms**2, tau)
    cotangent = (jnp.array([1.0, 1.0]) / u.mvolt, jnp.array([1.0, 0.0]) / u.second)
    grads = vg.vector_grad(func, cotangent=cotangent, unit_aware=True)(TAU)
    assert u.get_unit(grads) == u.ms**-1
    assert tree_allclose(u.get_mantissa(grads), jnp.array([2.001, 4.0]))


WRONG_COTANGENTS = {
    "structure": (
        (jnp.ones(3), jnp.ones(3)),
        ValueError,
        "must have the structure of the outp",
    ),
    "shape": (
        {"y": jnp.ones(2)},
        ValueError,
        r"shape and dtype of the output, \(3,\) and.*\(2,\)",
    ),
    "dtype": ({"y": jnp.ones(3, "float16")}, ValueError, "shape and dtype.*float16. Convert"),
    "text": (
        {"y": "ones"},
        TypeError,
        "must hold an array for each inexact output. Got 'ones'",
    ),
}


@pytest.mark.parametrize("case", WRONG_COTANGENTS.values(), ids=WRONG_COTANGENTS.keys())
def test_wrong_cotangents(case):
    cotangent, error, match = case
    with pytest.raises(error, match=rf"(?s)`vector_grad\(cotangent=...\)`.*{match}"):
        vg.vector_grad(lambda x: {"y": x}, cotangent=cotangent)(X)


def test_cotangents_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for number in (2, 2.0):
            scaled = vg.vector_grad(lambda x: x[0] * x[1], cotangent=number)
            assert tree_allclose(scaled(X), jnp.array([2.0 * X[1], 2.0 * X[0], 0.0]))
        assert vg.vector_grad(lambda z: z * 2, cotangent=1j)(jnp.array(1j)) == 2j
        for wrong in (jnp.ones(3, "float16"), jnp.ones(3, int), X.astype(complex)):
            with pytest.raises(ValueError, match="must have the shape and dtype"):
                vg.vector_grad(lambda x: x, cotangent=wrong)(X)
        with pytest.raises(ValueError, match="must have the shape and dtype.*complex"):
            vg.vector_grad(lambda x: x[0], cotangent=1j)(X)


def test_cotangents_of_several_units_are_refused():
    cotangent = (jnp.ones(2), jnp.ones(2))
    func = lambda tau: (tau, tau**2)
    with pytest.raises(u.UnitMismatchError, match="times the output must have one dimension"):
        vg.vector_grad(func, cotangent=cotangent)(TAU)


def test_outputs_of_several_dtypes():
    def func(tree):
        return {
            "half": jnp.sin(tree["a"]).astype("float16"),
            "single": tree["b"] * tree["a"][0],
        }

    tree = {"a": jnp.array([0.1, 0.2]), "b": jnp.array([1.0, 2.0], "float16")}
    for ours, theirs in JACOBIANS.values():
        assert tree_allclose(ours(func)(tree), theirs(func)(tree), rtol=1e-3, atol=1e-3)
    total = lambda tree: sum(jnp.sum(leaf.astype("float32")) for leaf in func(tree).values())
    expected = jax.grad(total)(tree)
    assert tree_allclose(vg.vector_grad(func)(tree), expected, rtol=1e-3, atol=1e-3)


def test_a_hessian_leaves_integers_out():
    hessian = vg.hessian(lambda tree: tree["x"] ** 3 * tree["n"])({"x": jnp.array(2.0), "n": 3})
    assert tree_allclose(hessian, {"x": {"x": jnp.array(36.0), "n": None}, "n": None})
    with pytest.raises(
        TypeError, match=r"`hessian\(argnums=...\)` must name an argument with an"
    ):
        vg.hessian(lambda n: 2.0 * n)(jnp.arange(3))
