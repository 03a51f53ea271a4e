"""A gradient inside other transformations of JAX and Equinox."""

import dataclasses
import functools as ft
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
import vgrad_eqx as vg
from jax.sharding import AxisType, PartitionSpec

from ..helpers import apply, Counted, make_mlp, tree_allclose


PATHS = ["layers.0.weight", "layers.2.bias"]


@pytest.fixture
def transform():
    with jax.checking_leaks():
        yield vg.vector_grad(apply, vg.path(*PATHS), argnums=1, return_value=True)


@eqx.filter_jit
def expected(model, x):
    value, pull_back = eqx.filter_vjp(apply, model, x)
    grads, grad = pull_back(jnp.ones(2))
    by_path = {PATHS[0]: grads.layers[0].weight, PATHS[1]: grads.layers[2].bias}
    return (by_path, grad), value


def test_eager_calls_repeat(transform, getkey):
    for _ in range(3):
        x = jr.normal(getkey(), (3,))
        assert tree_allclose(transform(make_mlp(), x), expected(make_mlp(), x))


def test_jit(transform):
    model, x = make_mlp(), jnp.ones(3)
    params, static = eqx.partition(model, eqx.is_array)
    compiled = jax.jit(lambda params, x: transform(eqx.combine(params, static), x))
    assert tree_allclose(compiled(params, x), expected(model, x))


def func_of_tree(tree):
    return tree["a"] * tree["b"]


GROUPS = {"one": "a", "list": ["a", "b"], "dict": {"first": "a", "second": vg.path("b")}}


@pytest.mark.parametrize("grad_states", GROUPS.values(), ids=GROUPS.keys())
def test_jit_of_the_transform_itself(grad_states):
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    transform = vg.vector_grad(func_of_tree, grad_states)
    assert tree_allclose(jax.jit(transform)(tree), transform(tree))
    state = vg.State(tree["a"])
    nested = {"one": [state], "other": (state,)}
    by_state = vg.vector_grad(lambda x: x * state.value, nested)
    assert tree_allclose(jax.jit(by_state)(tree["b"]), by_state(tree["b"]))


LINEAR = eqx.nn.Linear(2, 2, key=jr.key(0))
ARGUMENTS = {
    "module": vg.vector_grad(LINEAR),
    "path": vg.vector_grad(LINEAR, "weight"),
    "several selectors": vg.jacrev(
        LINEAR, [vg.leaf(eqx.is_array), ~vg.path("bias")], argnums=0
    ),
    "filter spec": vg.vector_grad(LINEAR, eqx.is_array),
    "function": vg.hessian(lambda x: jnp.sum(x**3)),
    "functools.partial": vg.grad(ft.partial(lambda n, x: jnp.sum(x**n), 3)),
    "of jax.vmap": vg.elementwise_grad(jax.vmap(jnp.tanh)),
    "cotangent": vg.vector_grad(LINEAR, "bias", cotangent=jnp.array([1.0, 2.0])),
    "function as cotangent": vg.vector_grad(jnp.cumsum, cotangent=jnp.cos),
    "nested": vg.vector_grad(vg.vector_grad(lambda x: x**3)),
}
PASSED = {
    "jit": lambda transform, x: jax.jit(lambda transform, x: transform(x))(transform, x),
    "vmap": lambda transform, x: jax.tree.map(
        lambda each: each[0],
        jax.vmap(lambda transform, x: transform(x), (None, 0))(transform, x[None]),
    ),
    "scan": lambda transform, x: jax.tree.map(
        lambda each: each[0],
        jax.lax.scan(lambda each, _: (each, each(x)), transform, length=1)[1],
    ),
    "tree.map": lambda transform, x: jax.tree.map(jnp.asarray, transform)(x),
}


@pytest.mark.parametrize("transform", ARGUMENTS.values(), ids=ARGUMENTS.keys())
@pytest.mark.parametrize("way", PASSED)
def test_a_transform_passes_as_an_argument(transform, way):
    x = jnp.array([0.5, -2.0])
    assert tree_allclose(PASSED[way](transform, x), transform(x))


def test_the_leaves_of_a_transform_are_those_of_func_and_cotangent():
    weight, bias, cotangent = LINEAR.weight, LINEAR.bias, jnp.ones(2)
    transform = vg.vector_grad(LINEAR, ["weight", vg.at(lambda linear: linear.bias)])
    assert jax.tree.leaves(transform) == [weight, bias]
    assert jax.tree.leaves(vg.vector_grad(LINEAR, cotangent=cotangent))[2:] == [cotangent]
    assert (
        jax.tree.leaves(vg.vector_grad(jnp.sin, vg.leaf(eqx.is_array), cotangent=jnp.cos)) == []
    )
    options: Any = {
        name: True for name in ("return_value", "has_aux", "unit_aware", "debug_nan")
    }
    options |= {"argnums": (0, 1), "check_states": False}
    assert jax.tree.leaves(vg.vector_grad(jnp.sin, {"a": "b"}, **options)) == []


def test_a_transform_made_anew_is_not_traced_anew_as_an_argument():
    func = Counted(lambda tree: tree["a"] ** 2)
    call = jax.jit(lambda transform, tree: transform(tree))
    for _ in range(3):
        call(vg.vector_grad(func, "a"), {"a": jnp.ones(2)})
    call(vg.vector_grad(func, "*"), {"a": jnp.ones(2)})
    assert func.calls == 2


@dataclasses.dataclass
class Scaled:
    scale: float

    def __call__(self, x):
        return self.scale * x


def test_a_function_that_may_change_is_not_static():
    transform = vg.vector_grad(Scaled(2.0))
    assert tree_allclose(transform(jnp.ones(2)), jnp.full(2, 2.0))
    with pytest.raises(ValueError, match="Non-hashable static arguments"):
        eqx.filter_jit(transform)(jnp.ones(2))


@pytest.mark.parametrize("donate", ["none", "all"])
def test_filter_jit(transform, donate):
    x = jnp.ones(3)
    compiled = eqx.filter_jit(lambda *args: transform(*args), donate=donate)
    with warnings.catch_warnings():
        # The CPU cannot reuse the input of another shape than every output.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        result = compiled(make_mlp(), jnp.ones(3))
    assert tree_allclose(result, expected(make_mlp(), x))


def test_vmap_over_arguments(transform, getkey):
    model, xs = make_mlp(), jr.normal(getkey(), (4, 3))
    result = jax.vmap(lambda x: transform(model, x))(xs)
    assert tree_allclose(result, jax.vmap(lambda x: expected(model, x))(xs))


def test_vmap_over_models(transform):
    models = eqx.filter_vmap(lambda key: eqx.nn.MLP(3, 2, 8, 2, key=key))(
        jr.split(jr.key(0), 4)
    )
    in_axes = (eqx.if_array(0), None)
    result = eqx.filter_vmap(transform, in_axes=in_axes)(models, jnp.ones(3))
    reference = eqx.filter_vmap(expected, in_axes=in_axes)(models, jnp.ones(3))
    assert tree_allclose(result, reference)


def test_vmap_with_a_collective():
    def func(w, x):
        return w["a"] * jax.lax.psum(x, "batch")

    transform = vg.vector_grad(func, "a")
    xs, w = jnp.arange(4.0), {"a": jnp.array(2.0)}
    result = jax.vmap(lambda x: transform(w, x), axis_name="batch")(xs)
    assert tree_allclose(result, {"a": jnp.full(4, 6.0)})


def test_scan(transform, getkey):
    model, xs = make_mlp(), jr.normal(getkey(), (4, 3))
    _, result = jax.lax.scan(lambda carry, x: (carry, transform(model, x)), None, xs)
    assert tree_allclose(result, jax.vmap(lambda x: expected(model, x))(xs))


@pytest.mark.slow
def test_checkpoint(transform):
    model, x = make_mlp(), jnp.ones(3)
    assert tree_allclose(jax.checkpoint(lambda x: transform(model, x))(x), expected(model, x))
    inner = vg.vector_grad(eqx.filter_checkpoint(apply), True)(model, x)
    assert tree_allclose(inner, vg.vector_grad(apply, True)(model, x))


def test_shard_map():
    # `checking_leaks` reports a leak of `shard_map` itself, so it is off here.
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("i")
    transform = vg.vector_grad(lambda w, x: w["a"] * x**2, "a", argnums=1)

    def func(w, x):
        return transform({"a": w}, x)

    sharded = jax.shard_map(func, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    w, x = jnp.arange(1.0, 4.0), jnp.arange(3.0)
    assert tree_allclose(sharded(w, x), ({"a": x**2}, 2 * w * x))


def test_nested_in_itself():
    with jax.checking_leaks():
        second = vg.vector_grad(vg.vector_grad(lambda x: x**3))
        assert float(second(2.0)) == 12.0
        assert float(vg.vector_grad(second)(2.0)) == 6.0


def test_nested_with_selectors():
    tree, x = {"w": jnp.array([1.0, 2.0])}, jnp.array([3.0, 4.0])

    def func(tree, x):
        return tree["w"] ** 2 * x

    inner = vg.vector_grad(func, "w")
    with jax.checking_leaks():
        outer = vg.vector_grad(inner, "w", argnums=1)
        var_grads, arg_grads = outer(tree, x)
        compiled = jax.jit(outer)(tree, x)
    assert tree_allclose(var_grads, {"w": 2 * x})
    assert tree_allclose(arg_grads, 2 * tree["w"])
    assert tree_allclose(compiled, (var_grads, arg_grads))


def test_forward_over_reverse():
    x = jnp.array([1.0, 2.0])
    hessian = jax.jacfwd(vg.vector_grad(lambda x: jnp.sum(x**3)))(x)
    assert tree_allclose(hessian, jnp.diag(6 * x))
    by_selector = vg.vector_grad(lambda tree: jnp.sum(tree["x"] ** 3), "x")
    jacobian = jax.jacfwd(lambda x: by_selector({"x": x})["x"])(x)
    assert tree_allclose(jacobian, jnp.diag(6 * x))


def test_custom_derivatives_are_used():
    @jax.custom_vjp
    def func(w):
        return w

    func.defvjp(lambda w: (w, None), lambda _, ct: (7 * ct,))
    for _ in range(2):
        assert float(vg.vector_grad(func, True)(jnp.array(1.0))[""]) == 7.0


@pytest.mark.parametrize("inside", [False, True], ids=["step", "func"])
@pytest.mark.parametrize("check_states", [False, True])
def test_one_trace_while_only_values_change(inside, check_states):
    once = eqx.debug.assert_max_traces(max_traces=1)
    func = once(apply) if inside else apply
    tx = optax.adam(1e-3)

    def step(model, opt_state, x):
        transform = vg.vector_grad(func, "layers.*.weight", check_states=check_states)
        grads = transform(model, x)
        updates, opt_state = tx.update(grads, opt_state)
        return vg.apply_updates(model, updates), opt_state

    compiled = eqx.filter_jit(step if inside else once(step))
    model = make_mlp()
    opt_state = tx.init(vg.states(model, "layers.*.weight"))
    for i in range(100):
        model, opt_state = compiled(model, opt_state, jnp.full(3, float(i)))


def test_transform_itself_is_traced_once(getkey):
    transform = vg.vector_grad(apply, True)
    once = eqx.debug.assert_max_traces(max_traces=1)(lambda *args: transform(*args))  # pyright: ignore[reportCallIssue]
    compiled = eqx.filter_jit(once)
    for seed in range(3):
        compiled(make_mlp(seed=seed), jr.normal(getkey(), (3,)))
