"""What is cached, refused and kept, where a state is read below the level of a call."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose


W, X = jnp.array([0.5, -1.2, 2.0]), jnp.array([1.0, 2.0, 3.0])
CONDUCTANCE = vg.State(W, name="conductance")


def function_operator(lx, x):
    return lx.FunctionLinearOperator(lambda v: v * (CONDUCTANCE.value + 3), jax.typeof(x))


def operator_with_default(lx, x):
    return lx.FunctionLinearOperator(lambda v, s=CONDUCTANCE: v * (s.value + 3), jax.typeof(x))


def read_elsewhere(v):
    return v * (CONDUCTANCE.value + 3)


def operator_of_a_helper(lx, x):
    return lx.FunctionLinearOperator(lambda v: read_elsewhere(v), jax.typeof(x))


OPERATORS = [function_operator, operator_with_default, operator_of_a_helper]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_function_without_a_closure_that_is_solved_with_is_refused(operator, compiled):
    lx = pytest.importorskip("lineax")
    solve = lambda x: lx.linear_solve(operator(lx, x), x).value
    assert tree_allclose(solve(X), X / (W + 3))
    for helper in (solve, jax.jit(solve), lambda x: jax.jit(solve)(x)):
        grad = vg.vector_grad(lambda x, helper=helper: helper(x), CONDUCTANCE)
        for _ in range(2):
            with pytest.raises(
                ValueError, match="conductance.*close over it|conductance.*argument"
            ):
                (jax.jit(lambda x, grad=grad: grad(x)) if compiled else grad)(X)


BODIES = {
    "jit": lambda s: jax.jit(lambda x: x * s.value),
    "checkpoint": lambda s: jax.checkpoint(lambda x: x * s.value),
}


@pytest.mark.parametrize("make", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("order", ["ghghg", "hghg", "agha", "gag", "sghsg", "hsgag"])
def test_a_helper_gives_the_same_whatever_was_called_before(make, order):
    """By the state (g), by the argument (a), outside (h), and after the state was set (s)."""
    s = vg.State(W)
    helper = make(s)
    by_state, by_argument = vg.vector_grad(lambda x: helper(x), s), vg.vector_grad(helper)

    def set_before(x):
        s.value = s.value + x
        return helper(x)

    for each in order:
        w = s.value
        if each == "g":
            assert tree_allclose(by_state(X), X)
        elif each == "a":
            assert tree_allclose(by_argument(X), w)
        elif each == "h":
            assert tree_allclose(helper(X), X * w)
        else:
            assert tree_allclose(vg.vector_grad(set_before)(X), w + 2 * X)
            assert tree_allclose(s.value, w + X)


def test_a_second_eager_call_traces_no_helper_again():
    s, h = vg.State(W), vg.State(jnp.zeros(3))
    traces = []

    @jax.jit
    def read(x):
        traces.append(None)
        return x * s.value

    @jax.jit
    def advance(x):
        h.value = h.value + x * s.value
        return h.value

    grad = vg.vector_grad(lambda x: read(x) + advance(x), s)
    grad(X)
    count = len(traces)
    assert tree_allclose(grad(X), 2 * X)
    assert len(traces) == count
    assert tree_allclose(h.value, 2 * X * W)


def test_a_write_after_a_read_in_a_helper_reads_the_value_of_that_moment():
    s = vg.State(W)

    def func(x):
        first = jax.jit(lambda: s.value)()
        s.value = first * x
        return first + jax.jit(lambda: s.value)()

    assert tree_allclose(vg.vector_grad(func, s)(X), 1 + X)
    assert tree_allclose(s.value, W * X)


def test_a_rule_may_read_no_state_and_says_what_to_do():
    s = vg.State(W, name="threshold")

    @jax.custom_jvp
    def spike(v):
        s.value = s.value + 1
        return 2 * v

    spike.defjvps(lambda t, _, v: 2 * t)
    match = "threshold.* inside of `custom_jvp_call`.* pass it as an argument; set it outside"
    with pytest.raises(ValueError, match=match):
        vg.vector_grad(lambda x: jax.jit(spike)(x))(X)
    with pytest.raises(ValueError, match="threshold"):
        vg.vector_grad(spike)(X)
    assert tree_allclose(s.value, W)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU sets the state meanwhile")
def test_a_state_that_compiled_code_has_lost_says_so_and_is_set_anew():
    s = vg.State(jnp.array(3.0), name="count")

    @jax.jit
    def step(x):
        s.value += 1.0
        return eqx.error_if(x, x > 0, "too large")

    with pytest.raises(Exception, match="too large"):
        jax.block_until_ready(step(1.0))
    with pytest.raises(RuntimeError, match="count.* has lost its value.* Set its `value`"):
        _ = s.value
    s.value = jnp.array(5.0)
    step(-1.0)
    assert float(s.value) == 6.0


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: [s], lambda s: {"a": s}])
def test_debug_nan_names_a_state_by_its_name(wrap):
    s = vg.State({"w": W}, name="threshold")
    func = lambda x: jnp.sqrt(0 * s.value["w"]) * x
    with pytest.raises(FloatingPointError, match=r"NaN in `threshold\.w`"):
        vg.vector_grad(func, wrap(s), debug_nan=True)(X)
    unnamed = vg.State(W)
    with pytest.raises(FloatingPointError, match="in `grad_states`"):
        vg.grad(lambda: jnp.sum(jnp.sqrt(0 * unnamed.value)), unnamed, debug_nan=True)()
