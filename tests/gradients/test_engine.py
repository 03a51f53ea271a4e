"""A gradient runs `func` as `jax.vjp` does: once, with the same values, errors and programs."""

import functools as ft
import pathlib
import subprocess
import sys
import threading
import traceback

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from vgrad_eqx._tree import state

from ..helpers import Counted, tree_allclose


X = jnp.array([1.0, 2.0, 3.0])


def by_argument(func, **options):
    return vg.vector_grad(func, **options)


def by_selector(func, **options):
    inner = vg.vector_grad(lambda tree, *rest: func(tree["w"], *rest), "w", **options)
    return lambda w, *rest: inner({"w": w}, *rest)["w"]


both_ways = pytest.mark.parametrize("gradient", [by_argument, by_selector])


def by_hand(func, w, *rest):
    y, pull_back = jax.vjp(lambda w: func(w, *rest), w)
    return pull_back(jnp.ones_like(y))[0]


PACKAGE = str(pathlib.Path(vg.__file__).parent)


def list_calls(func, *args):
    """The files of the package in which functions are called, one after the other.

    Comprehensions are functions in Python 3.11 only, so they do not count.
    """
    func(*args)
    files = []

    def watch(frame, event, _):
        code = frame.f_code
        is_comprehension = code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>")
        if event == "call" and code.co_filename.startswith(PACKAGE) and not is_comprehension:
            files.append(code.co_filename)

    sys.setprofile(watch)
    try:
        func(*args)
    finally:
        sys.setprofile(None)
    return files


@pytest.mark.parametrize("selector", [None, "**"])
def test_a_call_goes_through_few_files(selector, monkeypatch):
    # As before any state was made, which other tests have done.
    monkeypatch.setattr(state, "exists", threading.Event())
    tree = {f"p{i}": jnp.ones(3) for i in range(8)}
    gradient = vg.grad(lambda tree: sum(jnp.sum(x**2) for x in tree.values()), selector)
    files = list_calls(gradient, tree)
    assert len(set(files)) <= 6
    assert sum(a != b for a, b in zip(files, files[1:], strict=False)) <= 15
    assert len(files) <= 45


def test_a_training_step_is_two_calls():
    step = vg.train_step(lambda tree, x: jnp.sum(tree["w"] * x), optax.sgd(0.1))
    states = [step.init({"w": X})]

    def take_step():
        states.append(step(states.pop(), X)[0])

    take_step()
    assert len(list_calls(take_step)) == 2


COUNT_COMPILATIONS = """
import equinox as eqx, jax, jax.numpy as jnp, vgrad_eqx as vg

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
)
mlp, x = eqx.nn.MLP(3, 2, 8, 2, key=jax.random.key(0)), jnp.ones((4, 3))
apply = lambda mlp, x: jnp.tanh(jax.vmap(mlp)(x))

def by_hand(mlp, x):
    diff, nondiff = eqx.partition(mlp, eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(diff)
    rebuild = lambda leaves: eqx.combine(jax.tree.unflatten(structure, leaves), nondiff)
    y, pull_back = jax.vjp(lambda *leaves: apply(rebuild(leaves), x), *leaves)
    return pull_back(jnp.ones_like(y))

def count(func):
    jax.clear_caches()
    counts = []
    for _ in range(2):
        compiled.clear()
        jax.block_until_ready(jax.tree.leaves(func(mlp, x)))
        counts.append(len(compiled))
    return counts

expected = count(by_hand)
assert expected[0] > 1 and expected[1] == 0
for options in ({}, {"grad_states": "**"}, {"grad_states": "**", "check_states": False}):
    assert count(vg.vector_grad(apply, **options)) == expected
"""


@pytest.mark.slow
def test_eager_calls_compile_what_they_do_by_hand():
    # In a process of its own, in which no other test has made a state.
    subprocess.run([sys.executable, "-c", COUNT_COMPILATIONS], check=True)


@both_ways
@pytest.mark.parametrize("check_states", [False, True])
def test_func_runs_once_a_call(gradient, check_states):
    func = Counted(lambda w, n: w**2 * n)
    transform = gradient(func, check_states=check_states)
    for calls, n in enumerate([1, 2, 2, 3.0], 1):
        transform(X, n)
        assert func.calls == calls


def test_a_leaf_may_be_in_several_groups():
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    groups = vg.vector_grad(lambda tree: tree["a"] * tree["b"], ["a", "**"])
    for transform in (groups, jax.jit(groups), vg.jit(groups)):
        first, every = transform(tree)
        assert tree_allclose(first, {"a": tree["b"]})
        assert tree_allclose(every, {"a": tree["b"], "b": tree["a"]})


@both_ways
def test_func_that_raises_runs_once(gradient):
    def fail(w):
        raise RuntimeError("mine")

    func = Counted(fail)
    with pytest.raises(RuntimeError, match="mine"):
        gradient(func)(X)
    assert func.calls == 1


@both_ways
def test_arrays_that_func_keeps_stay_arrays(gradient):
    @ft.lru_cache
    def make_window():
        return jnp.hanning(3)

    kept = []

    def func(w, batch):
        kept.append(batch.mean())
        return w**2 * make_window() * batch

    for _ in range(2):
        assert tree_allclose(gradient(func)(X, X), by_hand(func, X, X))
    assert all(isinstance(x, jax.Array) and not is_traced(x) for x in [*kept, make_window()])


def is_traced(x):
    return isinstance(x, jax.core.Tracer)


def spy(seen):
    """A function that notes which of its inputs Python sees as tracers."""

    def func(w, constant, batched):
        seen.append([is_traced(x) for x in (w, constant, batched)])
        return jnp.sum(w * constant * batched)

    return func


@both_ways
@pytest.mark.parametrize("outer", ["vmap", "grad"])
def test_python_sees_what_it_sees_by_hand_in_other_transformations(gradient, outer):
    def run(differentiate):
        inner = lambda batched: jnp.sum(differentiate(X, X, batched))
        return jax.grad(inner)(X) if outer == "grad" else jax.vmap(inner)(jnp.stack([X, X]))

    ours, theirs = [], []
    expected = run(ft.partial(by_hand, spy(theirs)))
    assert tree_allclose(run(gradient(spy(ours))), expected)
    assert ours == theirs == [[True, False, True]]


@both_ways
def test_a_custom_rule_may_look_at_values(gradient):
    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, 3.0 if x > 0 else 4.0), lambda factor, ct: (factor * ct,))
    for _ in range(2):
        assert float(gradient(double)(jnp.array(1.0))) == 3.0
        assert float(gradient(double)(jnp.array(-1.0))) == 4.0


@both_ways
def test_a_rule_of_lax_types_under_vmap(gradient):
    # The cotangent of a float32 comes back as a NumPy scalar, of which JAX is tolerant.
    halve = jax.custom_vjp(lambda x: x / 2)
    halve.defvjp(lambda x: (x / 2, None), lambda _, ct: (ct * np.float32(0.5),))
    func = lambda w: jax.vmap(halve)(w) ** 2
    assert tree_allclose(gradient(func)(X), by_hand(func, X))
    mapped = jax.vmap(gradient(lambda w: halve(w) ** 2))
    assert tree_allclose(mapped(X), by_hand(func, X))


@both_ways
def test_errors_of_equinox_are_those_of_equinox(gradient):
    transform = gradient(lambda w: eqx.error_if(w, w[0] > 0, "too large") ** 2)
    for _ in range(2):
        with pytest.raises(eqx.EquinoxRuntimeError, match="too large"):
            transform(X)


def overflow(w):
    return jnp.log(-w)  # makes a NaN


@both_ways
def test_debug_nans_shows_the_line_of_func(gradient):
    for _ in range(2):
        with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
            gradient(overflow)(X)
        assert "makes a NaN" in "".join(traceback.format_exception(caught.value))


class Sensor(eqx.Module):
    gain: jax.Array
    grid: np.ndarray = eqx.field(static=True)

    def __call__(self, x):
        return self.gain * jnp.interp(x, self.grid, self.grid**2)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_models_with_arrays_in_static_fields_one_after_the_other():
    transform = vg.vector_grad(lambda sensor, x: sensor(x), "gain", return_value=True)
    for end in (1.0, 2.0, 3.0):
        grads, value = transform(Sensor(jnp.array(2.0), np.linspace(0, end, 5)), 0.5)
        assert tree_allclose(2 * grads["gain"], value)


def test_the_message_of_the_check_says_what_to_write_for_frozen_wrappers():
    paramax = pytest.importorskip("paramax")
    model = {"frozen": paramax.non_trainable(X), "free": X}
    func = lambda model, x: jnp.sum(paramax.unwrap(model)["frozen"] * model["free"] * x)
    with pytest.raises(ValueError, match=r"`~vg.instance\(paramax.NonTrainable\)`"):
        vg.grad(func, "**")(model, X)
    selector = ~vg.instance(paramax.NonTrainable)
    assert list(vg.grad(func, selector)(model, X)) == ["free"]


OPERATORS = {
    "vector_grad": vg.vector_grad,
    "grad": vg.grad,
    "jacrev": vg.jacrev,
    "jacfwd": vg.jacfwd,
    "hessian": vg.hessian,
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_each_operator_checks_by_its_own_linear_program(name, compiled):
    wrap = eqx.filter_jit if compiled else lambda func: func
    tree = {"a": jnp.array(2.0), "idle": jnp.array(1.0)}
    func = lambda tree, x: tree["a"] ** 3 * x + jnp.floor(tree["idle"])
    transform = wrap(OPERATORS[name](func, "**"))
    with pytest.raises(ValueError, match="does not depend on `idle`"):
        transform(tree, 3.0)
    func = Counted(func)
    result = OPERATORS[name](func, "a", return_value=True)(tree, 3.0)
    assert func.calls == 1
    assert tree_allclose(result[1], jnp.array(25.0))


def test_jacobians_of_functions_that_transformations_surround():
    func = lambda a, b: {"p": a * b**2, "s": jnp.sum(a) * b}
    a, b = jr.normal(jr.key(0), (2, 3))
    for ours, theirs in [
        (vg.jacrev, jax.jacrev),
        (vg.jacfwd, jax.jacfwd),
        (vg.hessian, jax.hessian),
    ]:
        expected, transform = theirs(func, argnums=(0, 1)), ours(func, argnums=(0, 1))
        assert tree_allclose(transform(a, b), jax.jit(expected)(a, b))
        batch = jnp.stack([a, b]), jnp.stack([b, a])
        by_jax = jax.jit(jax.vmap(expected))(*batch)
        assert tree_allclose(jax.vmap(transform)(*batch), by_jax)
        outer = lambda f: jax.jit(jax.grad(lambda a, f=f: jnp.sum(f(a, b)["p"][0] ** 2)))
        if ours is not vg.hessian:
            assert tree_allclose(outer(transform)(a), outer(expected)(a))
