"""States that a function sets which is differentiated by its arguments or by selectors."""

import functools as ft
import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import vgrad_eqx as vg
from hypothesis import given, settings
from hypothesis import strategies as st

from ..helpers import Counted, tree_allclose


X = jnp.array([1.0, 2.0, 3.0])
START = jnp.array([0.5, -1.0, 2.0])


# What a function does with a state `s`, and the same as a function of its value `h`, which
# returns the next one. They get the number by which they are differentiated, and an input.
def set_constant(s, w, x):
    s.value = s.value + x
    return w * x


def set_differentiated(s, w, x):
    s.value = s.value + w * x
    return w * s.value


def set_in_scan(s, w, x):
    def body(carry, _):
        s.value = jnp.sin(s.value * w)
        return carry * s.value, None

    return jax.lax.scan(body, x, length=2)[0]


def set_in_checkpoint(s, w, x):
    @jax.checkpoint
    def body(w):
        s.value = s.value + x
        return jnp.sin(w * s.value)

    return body(w)


def read_in_checkpoint(s, w, x):
    y = jax.checkpoint(lambda w: jnp.sin(w * s.value))(w)
    s.value = x
    return y


def read(s, w, x):
    return w * x * s.value


def look(s, w, x):
    return w * x if s.value[0] > 0 else w * x**2


def scan_by_hand(h, w, x):
    for _ in range(2):
        h = jnp.sin(h * w)
        x = x * h
    return x, h


KINDS = {
    "set constant": (set_constant, lambda h, w, x: (w * x, h + x), 1),
    "set differentiated": (set_differentiated, lambda h, w, x: (w * (h + w * x), h + w * x), 1),
    "set in scan": (set_in_scan, scan_by_hand, 2),
    "set in checkpoint": (set_in_checkpoint, lambda h, w, x: (jnp.sin(w * (h + x)), h + x), 2),
    "read in checkpoint": (read_in_checkpoint, lambda h, w, x: (jnp.sin(w * h), x), 1),
    "read": (read, lambda h, w, x: (w * x * h, h), 1),
    "look": (look, lambda h, w, x: (jnp.where(h[0] > 0, w * x, w * x**2), h), 1),
}


def by_hand(functional, h, w, x):
    y, pull_back, h = jax.vjp(lambda w: functional(h, w, x), w, has_aux=True)
    return pull_back(jnp.ones_like(y))[0], y, h


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("selected", [False, True], ids=["argument", "selector"])
def test_states_are_set_as_by_hand(kind, compiled, selected):
    func, functional, runs = KINDS[kind]
    if compiled and kind == "look":
        pytest.skip("Compiled code cannot decide by a value.")
    s = vg.State(START)
    counted = Counted(ft.partial(func, s))
    of_tree = lambda tree, x: counted(tree["w"], x)
    transform = vg.vector_grad(of_tree, "w", return_value=True)
    if not selected:
        transform = vg.vector_grad(counted, return_value=True)
    wrapped = jax.jit(transform.__call__) if compiled else transform
    h = START
    for w in (X, X + 1):
        grads, value = wrapped({"w": w} if selected else w, X)
        grad, y, h = by_hand(functional, h, w, X)
        assert tree_allclose((grads["w"] if selected else grads, value), (grad, y))
        assert tree_allclose(s.value, h)
    assert counted.calls == (runs if compiled else 2 * runs)


@pytest.mark.parametrize("kind", ["set constant", "set differentiated", "set in scan"])
def test_an_exception_leaves_every_state_as_it_was(kind):
    s, other = vg.State(START), vg.State(jnp.zeros(3))
    for error in (RuntimeError("mine"), KeyboardInterrupt()):

        def fail(w, error=error):
            other.value = X
            KINDS[kind][0](s, w, X)
            raise error

        with pytest.raises(type(error)):
            vg.vector_grad(fail)(X)
        assert tree_allclose(s.value, START)
        assert tree_allclose(other.value, jnp.zeros(3))


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_compiled_helper_has_set_is_set_back(warm):
    count, mean = vg.State(jnp.array(0)), vg.State(jnp.zeros(3))

    @jax.jit
    def bump():
        count.value += 1

    def func(w):
        bump()
        mean.value = mean.value + w  # which JAX refuses at first, after the helper has run
        return w**2

    if warm:
        bump()
    assert tree_allclose(vg.vector_grad(func)(X), 2 * X)
    assert int(count.value) == 1 + warm
    assert tree_allclose(mean.value, X)

    def fail(w):
        bump()
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        vg.vector_grad(fail)(X)
    assert int(count.value) == 1 + warm


def test_a_gradient_within_a_gradient_sets_states():
    s = vg.State(jnp.zeros(3))

    def inner(w):
        s.value = s.value + w
        return jnp.sum(w**3)

    outer = vg.vector_grad(lambda w: vg.vector_grad(inner)(w) * w)
    assert tree_allclose(outer(X), 9 * X**2)
    assert tree_allclose(s.value, X)


def fresh(kind, w, x, h):
    """The gradient, the value, and the next value of the state, or an error."""
    if kind == "raise":
        return RuntimeError
    if kind == "unused":
        return ValueError
    return by_hand(KINDS[kind][1], h, w, x)


CALLS = st.tuples(
    st.sampled_from([*KINDS, "raise", "unused"]),
    st.sampled_from([1, 2, 0.5, True]),
    st.sampled_from([(3,), (2, 3)]),
    st.sampled_from(["eager", "jit", "filter_jit"]),
)


@settings(max_examples=15)
@given(st.lists(CALLS, min_size=2, max_size=5))
def test_what_a_call_does_never_depends_on_which_calls_came_before(calls):
    s = vg.State(START)

    def func(tree, x, kind, scale):
        x = x * scale
        if kind == "raise":
            s.value = x
            raise RuntimeError("mine")
        return x**2 if kind == "unused" else KINDS[kind][0](s, tree["w"], x)

    gradient = vg.vector_grad(func, "w", return_value=True)
    h = START
    for kind, scale, shape, way in calls:
        if kind == "look" and way != "eager":
            continue
        x = X if shape == (3,) else jnp.ones(3)
        tree = {"w": jnp.cos(x), "idle": jnp.ones(shape)}
        call = lambda tree, x, kind=kind, scale=scale: gradient(tree, x, kind, scale)
        run = {"eager": call, "jit": jax.jit(call), "filter_jit": eqx.filter_jit(call)}[way]
        expected = fresh(kind, tree["w"], x * scale, h)
        if isinstance(expected, type):
            with pytest.raises(expected, match="mine|does not depend on `w`"):
                run(tree, x)
        else:
            grads, value = run(tree, x)
            assert tree_allclose((grads["w"], value), expected[:2])
            h = expected[2]
        assert tree_allclose(s.value, h)


def test_a_checkpoint_over_a_bare_reference_is_right():
    ref = jax.new_ref(START)

    def func(w):
        y = jax.checkpoint(lambda w: jnp.sin(w * ref[...]))(w)
        ref[...] = X
        return y

    assert tree_allclose(vg.vector_grad(func)(X), START * jnp.cos(X * START))
    assert tree_allclose(ref[...], X)


@pytest.mark.parametrize("by_state", [False, True])
def test_arrays_that_a_helper_closes_over_are_not_kept_alive(by_state):
    s = vg.State(START)

    def run():
        big = jnp.full(12_345, 2.0)
        helper = jax.jit(lambda w: w * s.value * big[0])
        grads = vg.vector_grad(helper, s)(X) if by_state else vg.vector_grad(helper)(X)
        assert tree_allclose(grads, 2 * (X if by_state else START))

    for _ in range(2):
        run()
    gc.collect()
    assert not [array for array in jax.live_arrays() if array.size == 12_345]


def test_setting_a_state_under_vmap_says_so_and_sets_nothing():
    s = vg.State(START)

    def func(w):
        s.value = w
        return w**2

    with pytest.raises(ValueError, match="cannot be set inside of `jax.vmap`"):
        jax.vmap(vg.vector_grad(func))(jnp.stack([X, X]))
    assert tree_allclose(s.value, START)
    assert tree_allclose(vg.vector_grad(func)(X), 2 * X)


def test_a_state_that_compiled_code_has_deleted_is_no_hindrance():
    s = vg.State(START)

    @jax.jit
    def fail():
        s.value = eqx.error_if(s.value, s.value[0] > 0, "mine")
        return s.value

    with pytest.raises(Exception, match="mine"):
        jax.block_until_ready(fail())
    assert tree_allclose(vg.vector_grad(lambda w: w**2)(X), 2 * X)
