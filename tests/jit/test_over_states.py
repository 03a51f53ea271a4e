"""States that a function under `vg.jit` uses: set when it has ended, and kept when it fails."""

import threading

import equinox as eqx
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
import vgrad_eqx as vg

from ..helpers import Counted, tree_allclose


X = jnp.array([1.0, 2.0, 3.0])


def check(x):
    return eqx.error_if(x, x[0] > 1, "too large")


def call_back(x):
    def raise_if_large(value):
        if value[0] > 1:
            raise RuntimeError("too large")

    jax.experimental.io_callback(raise_if_large, None, x)
    return x


def debug_nan(x):
    func = lambda x: jnp.sqrt(1.5 - x[0]) * x
    return vg.vector_grad(func, debug_nan=True)(x)


def interrupt(x):
    if x.shape == (2,):
        raise KeyboardInterrupt
    return x


FAILURES = {
    "error_if": (check, X + 1, "too large"),
    "callback": (call_back, X + 1, "too large"),
    "debug_nan": (debug_nan, X + 1, "NaN in"),
    "exception while tracing": (lambda x: x + jnp.ones(x.size % 2 + 2), jnp.ones(5), None),
    "Ctrl-C while tracing": (interrupt, jnp.ones(2), None),
}


@pytest.mark.parametrize("is_warm", [True, False])
@pytest.mark.parametrize("name", FAILURES)
def test_states_have_their_old_values_after_a_failure(name, is_warm):
    func, bad, match = FAILURES[name]
    count, total = vg.State(jnp.array(0)), vg.State({"sum": jnp.array(0.0)})

    @vg.jit
    def step(x):
        count.value += 1
        total.value = {"sum": total.value["sum"] + x[0]}
        y = func(x)
        count.value += 1
        return y

    if is_warm:
        step(X)
    before = count.value, total.value
    for _ in range(2):
        with pytest.raises(BaseException, match=match):
            jax.block_until_ready(step(bad))
        assert tree_allclose((count.value, total.value), before)
    step(X)
    assert int(count.value) == 2 + int(before[0])
    assert float(total.value["sum"]) == 1 + float(before[1]["sum"])


def test_a_nan_that_jax_looks_for_leaves_the_states():
    count = vg.State(jnp.array(0))

    @vg.jit
    def step(x):
        count.value += 1
        return jnp.sqrt(x)

    step(X)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="sqrt"):
        step(-X)
    assert int(count.value) == 1


def test_an_optimizer_over_states_goes_on_after_a_failure():
    optax = pytest.importorskip("optax")
    w = vg.State(X)
    optimizer = vg.StateOptimizer(optax.adam(0.1), w)

    @vg.jit
    def step(x):
        optimizer.step(vg.grad(lambda: jnp.sum(w.value**2 * check(x)), w)())

    step(X)
    before = w.value, optimizer.count
    with pytest.raises(eqx.EquinoxRuntimeError):
        step(X + 1)
    assert tree_allclose((w.value, optimizer.count), before)
    step(X)
    assert int(optimizer.count) == 2


def test_a_function_is_traced_once():
    count, seen = vg.State(jnp.array(0)), vg.State(X)

    def func(x):
        count.value += 1
        if x.shape == (2,):
            seen.value += x[0]
        return x * seen.value[0]

    counted = Counted(func)
    step = vg.jit(counted)
    for x, total in [(X, 1.0), (X, 1.0), (X[:2], 2.0), (X[:2], 3.0), (X, 3.0)]:
        assert tree_allclose(step(x), x * total)
        assert float(seen.value[0]) == total
    assert int(count.value) == 5
    assert counted.calls == 2


def test_a_function_that_first_uses_no_state():
    count = vg.State(jnp.array(0))

    @vg.jit
    def step(x):
        if x.shape == (2,):
            count.value += 1
        return check(x)

    step(X)
    step(X[:2])
    with pytest.raises(eqx.EquinoxRuntimeError):
        step(X[:2] + 1)
    assert int(count.value) == 1


def test_arrays_of_states_are_nobody_elses():
    a, b = vg.State(jnp.zeros(3)), vg.State(jnp.ones(3))

    @vg.jit
    def func(x):
        a.value = b.value = x
        return x, a.value

    @vg.jit
    def swap():
        a.value, b.value = b.value, 2 * a.value

    @jax.jit
    def set_in_place():
        a.value, b.value = jnp.zeros(3), jnp.zeros(3)

    results = func(X)
    assert tree_allclose((a.value, b.value), (X, X))
    held = a.value
    swap()
    assert tree_allclose((a.value, b.value), (X, 2 * X))
    set_in_place()
    assert tree_allclose((results, held), ((X, X), X))
    assert tree_allclose((a.value, b.value), (jnp.zeros(3), jnp.zeros(3)))


@pytest.mark.parametrize("donate", ["all", "warn"])
def test_donated_states_are_lost_and_say_so(donate):
    count, idle = vg.State(jnp.array(0), name="count"), vg.State(X)

    @vg.jit(donate=donate)
    def step(x):
        count.value += 1
        return check(x) * idle.value

    step(X + 0)
    assert int(count.value) == 1
    assert tree_allclose(idle.value, X)
    with pytest.raises(eqx.EquinoxRuntimeError):
        step(X + 1)
    for use in (lambda: count.value, lambda: step(X + 0)):
        with pytest.raises(RuntimeError, match="has lost its value.* Set its `value`"):
            use()
    count.value, idle.value = jnp.array(5), X
    step(X + 0)
    assert int(count.value) == 6


def test_of_two_threads_that_set_a_state_at_once_one_is_refused():
    count = vg.State(jnp.array(0), name="count")
    is_inside, is_done, errors = threading.Event(), threading.Event(), []

    def pause(_):
        is_inside.set()
        is_done.wait(1)

    @vg.jit
    def slow():
        count.value += 1
        jax.debug.callback(pause, count.value)

    @vg.jit
    def quick():
        count.value += 10

    def run(func):
        try:
            func()
        except RuntimeError as error:
            errors.append(str(error))
        is_done.set()

    quick()
    thread = threading.Thread(target=run, args=(slow,))
    thread.start()
    is_inside.wait()
    run(quick)
    thread.join()
    (error,) = errors
    assert "'count'" in error
    assert "was set elsewhere while a function under `vg.jit` that sets it was running" in error
    assert int(count.value) in (11, 20)


def spike(state, x):
    @jax.custom_jvp
    def func(x):
        return jnp.tanh(x - state.value)

    func.defjvp(lambda p, t: (func(*p), t[0]))
    return func(x)


WAYS = {
    "jax.jit": jax.jit,
    "vmap": lambda func: lambda x: jax.vmap(func)(x[None])[0],
    "grad": lambda func: lambda x: jax.vjp(func, x)[0],
    "vector_grad": lambda func: lambda x: vg.vector_grad(func, return_value=True)(x)[1],
    "scan": lambda func: lambda x: jax.lax.scan(lambda c, _: (func(c), 0), x, length=1)[0],
    "vg.jit": lambda func: vg.jit(lambda x: func(x)),
    "lowered": lambda func: lambda x: func.lower(x).compile()(x),
    "lowered before": lambda func: lambda x: (func.lower(x), func(x))[1],
    "disable_jit": lambda func: jax.disable_jit()(func),
}


@pytest.mark.parametrize("name", WAYS)
def test_inside_of_other_transformations(name):
    state, count = vg.State(X), vg.State(jnp.array(0))

    @vg.jit
    def func(x):
        if name != "vmap":
            count.value += 1
        return x * state.value

    for i in range(2):
        assert tree_allclose(WAYS[name](func)(X), X**2)
        assert tree_allclose(func(X), X**2)
        assert int(count.value) == (name != "vmap") * (2 * i + 2)


def test_a_rule_that_reads_a_state_is_refused_by_name():
    """JAX has no way to compile one."""
    state = vg.State(X, name="threshold")
    step = vg.jit(lambda x: spike(state, x))
    for _ in range(2):
        with pytest.raises(ValueError, match="'threshold'.* pass it as an argument"):
            step(2 * X)
    assert tree_allclose(state.value, X)


def test_results_have_the_types_that_jax_gives():
    state = vg.State(jnp.ones(3, "bfloat16"))

    def func(x):
        state.value = state.value + 1
        return jnp.asarray(1.0), state.value * 2, x * 2.0, np.float32(3.0) * x, 2, None

    for x in (jnp.arange(3), jnp.asarray(2.0), np.arange(3)):
        results, expected = vg.jit(func)(x), jax.jit(func)(x)
        types = [
            [(y.dtype, jax.typeof(y).weak_type) for y in each if isinstance(y, jax.Array)]
            for each in (results, expected)
        ]
        assert types[0] == types[1][: len(types[0])]
    assert state.value.dtype == jnp.bfloat16


@pytest.mark.parametrize("donate", ["none", "all"])
def test_other_shapes_may_use_other_states(donate):
    calls, large = vg.State(jnp.array(0)), vg.State(jnp.zeros(3))

    @vg.jit(donate=donate)
    def count(x):
        calls.value += 1
        if x.shape == (3,):
            large.value += x
        return calls.value * 1

    for number, x in enumerate([jnp.ones(2), X, jnp.ones(2), X], start=1):
        assert int(count(jnp.array(x))) == number
    assert int(calls.value) == 4
    assert large.value.tolist() == [2.0, 4.0, 6.0]
