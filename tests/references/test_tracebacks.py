"""Errors show the line of the user where they do by hand, and no more frames of JAX."""

import traceback

import jax
import jax.numpy as jnp
import pytest
import vgrad_eqx as vg


X = jnp.ones(3)


def make_nan(x):
    return jnp.sqrt(x - 2)  # the line of the user


def fail(x):
    raise KeyError("mine")  # the line of the user


def misfit(x):
    return x + jnp.ones(5)  # the line of the user


FAULTS = {"NaN": make_nan, "exception": fail, "shape": misfit}


def scan(func, state):
    return lambda x: jax.lax.scan(lambda c, _: (func(c), None), x, length=2)[0]


def scan_that_sets(func, state):
    def body(c, _):
        state.value = state.value + 1
        return func(c), None

    return lambda x: jax.lax.scan(body, x, length=2)[0]


CONSTRUCTS = {
    "plain": lambda func, state: func,
    "jit": lambda func, state: jax.jit(func),
    "checkpoint": lambda func, state: jax.checkpoint(func),
    "scan": scan,
    "scan that sets a state": scan_that_sets,
}


def by_argument(func, state):
    return vg.vector_grad(func)(X)


def by_selector(func, state):
    return vg.vector_grad(lambda tree: func(tree["w"]), "w")({"w": X})


def by_state(func, state):
    return vg.vector_grad(lambda: func(state.value), state)()


def beside_a_state(func, state):
    return vg.vector_grad(lambda x: func(x) * state.value, state)(X)


def forward(func, state):
    return vg.jacfwd(lambda: func(state.value), state)()


def compiled_by_argument(func, state):
    return vg.jit(vg.vector_grad(func))(X)


def compiled_by_state(func, state):
    return vg.jit(vg.vector_grad(lambda: func(state.value), state))()


ROADS = [by_argument, by_selector, by_state, beside_a_state, forward]
COMPILED = [compiled_by_argument, compiled_by_state]


def by_hand(func):
    return jax.vjp(func, X)


def by_hand_compiled(func):
    return jax.jit(lambda x: jax.vjp(func, x)[0])(X)


def show(call, *args):
    """The kind of the error, whether it shows the line, and how many frames of JAX."""
    with pytest.raises((KeyError, TypeError, FloatingPointError)) as caught:
        call(*args)
    error = caught.value
    frames = traceback.extract_tb(error.__traceback__)
    inner = [frame for frame in frames if "/jax/_src/" in frame.filename]
    text = "".join(traceback.format_exception(error))
    return type(error), "# the line of the user" in text, len(inner)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("construct", CONSTRUCTS)
@pytest.mark.parametrize("road", [*ROADS, *COMPILED], ids=lambda road: road.__name__)
def test_an_error_is_shown_as_by_hand(road, construct, fault):
    state = vg.State(jnp.zeros(3) + 1)
    func = CONSTRUCTS[construct](FAULTS[fault], state)
    # By hand, no state is set.
    alike = CONSTRUCTS["scan" if "scan" in construct else construct](FAULTS[fault], state)
    with jax.debug_nans(fault == "NaN"):
        expected = show(by_hand_compiled if road in COMPILED else by_hand, alike)
        *shown, num_frames = show(road, func, state)
    assert shown == [*expected[:2]]
    assert num_frames <= expected[2]
    assert expected[1] or fault == "NaN"
    assert state.value.tolist() == [1.0, 1.0, 1.0]
