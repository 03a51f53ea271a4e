"""Programs over states are equal to the same programs, written without them."""

import functools as ft
import logging

import jax
import jax.numpy as jnp
import jax.ref
import pytest
import vgrad_eqx as vg
from jax import lax
from vgrad_eqx import vector_grad

from ..helpers import tree_allclose, WAYS


W, H = jnp.array([0.3, 1.1, -0.4]), jnp.array([1.0, 0.2, -2.0])
X = jnp.array([0.5, -1.0, 2.0])


@jax.custom_vjp
def seven(x):
    return x


seven.defvjp(lambda x: (x, None), lambda _, grad: (0 * grad + 7,))


def straight(w, h, x):
    h.value = jnp.tanh(h.value * w.value + x)
    return h.value * w.value


def untouched_after_write(w, h, x):
    before = h.value
    h.value = w.value * x
    return before * x


def through_scan(w, h, x):
    def body(carry, scale):
        h.value = jnp.tanh(h.value * w.value + carry * scale)
        return carry * w.value, h.value

    return lax.scan(body, x, jnp.arange(1.0, 4.0))


def through_reverse_scan(w, h, x):
    def body(_, scale):
        h.value = h.value * w.value + scale
        return None, h.value

    return lax.scan(body, None, jnp.outer(jnp.arange(3.0), x), reverse=True, unroll=2)[1]


def through_fori_loop(w, h, x):
    def body(_, carry):
        h.value = h.value * w.value
        return carry + h.value

    return lax.fori_loop(0, 3, body, x)


def through_map(w, h, x):
    return lax.map(lambda row: row * w.value + h.value, jnp.outer(x, x))


def through_cond(w, h, x):
    def write(x):
        h.value = h.value + w.value * x
        return x * w.value

    return lax.cond(x[0] > 0, write, lambda x: x * h.value, x) * h.value


def through_switch(w, h, x):
    def write(x):
        h.value = w.value * x
        return x

    return lax.switch(2, [lambda x: x, lambda x: w.value, write], x) * h.value


def through_while(w, h, x):
    def body(count):
        h.value = h.value * 0.5 + 1
        return count + 1

    lax.while_loop(lambda count: (count < 3) & (h.value[0] < 10), body, 0)
    return lax.stop_gradient(h.value) * w.value * x


def through_jit(w, h, x):
    @jax.jit
    def helper(x):
        h.value = h.value + x * w.value
        return jax.jit(lambda x: x * w.value)(x)

    return helper(x) + helper(2 * x)


def through_checkpoint(w, h, x):
    def helper(x):
        h.value = jnp.sin(h.value * w.value + x)
        return h.value * x

    return jax.checkpoint(helper)(jax.checkpoint(helper)(x)) * h.value


def through_checkpointed_scan(w, h, x):
    @jax.checkpoint
    def body(carry, _):
        h.value = jnp.sin(h.value * w.value)
        return carry * h.value, carry

    return lax.scan(body, x, length=3)


def through_all(w, h, x):
    @jax.jit
    def body(carry, scale):
        def write(carry):
            h.value = h.value + jax.checkpoint(lambda c: jnp.sin(c * w.value))(carry)
            return carry * scale

        return lax.cond(scale > 1, write, lambda carry: carry + h.value, carry), h.value

    return lax.scan(body, x, jnp.arange(3.0))


def through_custom_vjp(w, h, x):
    def body(carry, _):
        h.value = jax.nn.relu(h.value + w.value)
        return seven(carry * w.value), h.value

    return lax.scan(body, x, length=2)


def through_vmap(w, h, x):
    return jax.vmap(lambda row: row * w.value + h.value)(jnp.outer(x, x))


def through_unused_results(w, h, x):
    def body(carry, _):
        h.value = h.value * w.value
        return (carry[0] * w.value, carry[1] + 1), (h.value, carry[1])

    lax.scan(body, (x, x), length=2)
    return h.value * x


def through_printing(w, h, x):
    jax.debug.callback(lambda *_: None, h.value)
    h.value = h.value * w.value * x
    return h.value


FUNCS = {
    name: func
    for name, func in list(globals().items())
    if name.startswith("through_") or name in ("straight", "untouched_after_write")
}


class Value:
    """Has a `value` as a `State`, and is no reference to JAX."""

    def __init__(self, value):
        self.value = value


def functional(name):
    """The same function of values, which returns the last `h` as well.

    Loops and branches carry `h`, so each is written out again.
    """

    def func(w, h, x):
        if name in FUNCTIONAL:
            return FUNCTIONAL[name](w, h, x)
        cell = Value(h)
        out = FUNCS[name](Value(w), cell, x)
        return out, cell.value

    return func


def scan_by_hand(w, h, x):
    def body(carry, scale):
        carry, h = carry
        h = jnp.tanh(h * w + carry * scale)
        return (carry * w, h), h

    (carry, h), hs = lax.scan(body, (x, h), jnp.arange(1.0, 4.0))
    return (carry, hs), h


def reverse_scan_by_hand(w, h, x):
    def body(h, scale):
        h = h * w + scale
        return h, h

    xs = jnp.outer(jnp.arange(3.0), x)
    h, hs = lax.scan(body, h, xs, reverse=True, unroll=2)
    return hs, h


def fori_loop_by_hand(w, h, x):
    def body(_, carry):
        carry, h = carry
        return carry + h * w, h * w

    return lax.fori_loop(0, 3, body, (x, h))


def cond_by_hand(w, h, x):
    out, h = lax.cond(
        x[0] > 0,
        lambda x, h: (x * w, h + w * x),
        lambda x, h: (x * h, h),
        x,
        h,
    )
    return out * h, h


def switch_by_hand(w, h, x):
    return x * (w * x), w * x


def while_by_hand(w, h, x):
    _, h = lax.while_loop(
        lambda carry: (carry[0] < 3) & (carry[1][0] < 10),
        lambda carry: (carry[0] + 1, carry[1] * 0.5 + 1),
        (0, h),
    )
    return lax.stop_gradient(h) * w * x, h


def jit_by_hand(w, h, x):
    return x * w + 2 * x * w, h + x * w + 2 * x * w


def checkpoint_by_hand(w, h, x):
    for _ in range(2):
        h = jnp.sin(h * w + x)
        x = h * x
    return x * h, h


def checkpointed_scan_by_hand(w, h, x):
    def body(carry, _):
        carry, h = carry
        h = jnp.sin(h * w)
        return (carry * h, h), carry

    (carry, h), carries = lax.scan(body, (x, h), length=3)
    return (carry, carries), h


def all_by_hand(w, h, x):
    hs = []
    for scale in (0.0, 1.0, 2.0):
        x, h = (x * scale, h + jnp.sin(x * w)) if scale > 1 else (x + h, h)
        hs.append(h)
    return (x, jnp.stack(hs)), h


def custom_vjp_by_hand(w, h, x):
    hs = []
    for _ in range(2):
        h = jax.nn.relu(h + w)
        x = seven(x * w)
        hs.append(h)
    return (x, jnp.stack(hs)), h


def unused_results_by_hand(w, h, x):
    return h * w * w * x, h * w * w


FUNCTIONAL = {
    "through_scan": scan_by_hand,
    "through_reverse_scan": reverse_scan_by_hand,
    "through_fori_loop": fori_loop_by_hand,
    "through_cond": cond_by_hand,
    "through_switch": switch_by_hand,
    "through_while": while_by_hand,
    "through_jit": jit_by_hand,
    "through_checkpoint": checkpoint_by_hand,
    "through_checkpointed_scan": checkpointed_scan_by_hand,
    "through_all": all_by_hand,
    "through_custom_vjp": custom_vjp_by_hand,
    "through_unused_results": unused_results_by_hand,
}


@ft.cache
def by_hand(name):
    """The output, its gradients by `w`, `h` and `x`, and the last `h`."""

    @jax.jit
    def differentiate(*args):
        value, pull_back, last = jax.vjp(functional(name), *args, has_aux=True)
        return value, pull_back(jax.tree.map(jnp.ones_like, value)), last

    return differentiate(W, H, X)


@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("name", FUNCS)
def test_equals_the_functional_program(name, wrap):
    w, h = vg.State(W), vg.State(H)
    transform = vector_grad(
        lambda x: FUNCS[name](w, h, x),
        {"w": w, "h": h},
        argnums=0,
        return_value=True,
        check_states=False,
    )
    (var_grads, arg_grad), out = wrap(transform.__call__)(X)

    value, grads, last = by_hand(name)
    assert tree_allclose(out, value)
    assert tree_allclose((var_grads["w"], var_grads["h"], arg_grad), grads)
    assert tree_allclose(h.value, last)
    assert tree_allclose(w.value, W)


@pytest.mark.parametrize("name", FUNCS)
def test_arguments_alone_and_selectors_go_the_same_way(name):
    h, tree = vg.State(H), {"w": W}

    def func(tree, x):
        return FUNCS[name](Value(tree["w"]), h, x)

    _, expected, last = by_hand(name)
    for _ in range(2):
        h.value = H
        (var_grads, arg_grad) = vector_grad(func, "w", argnums=1, check_states=False)(tree, X)
        assert tree_allclose((var_grads["w"], arg_grad), (expected[0], expected[2]))
        assert tree_allclose(h.value, last)
        h.value = H
        assert tree_allclose(vector_grad(func, argnums=1)(tree, X), expected[2])
        assert tree_allclose(h.value, last)


def test_tracers_do_not_leak():
    w, h = vg.State(jnp.ones(3)), vg.State(jnp.zeros(3))
    with jax.checking_leaks():
        transform = vector_grad(lambda x: through_all(w, h, x), [w], argnums=0)
        transform(X)
        jax.jit(lambda x: transform(x))(X)


@pytest.mark.parametrize("by_state", [False, True])
def test_a_repeated_eager_call_compiles_nothing(by_state, caplog):
    s = vg.State(H)

    @jax.jit
    def helper(w):
        s.value = jnp.sin(s.value)
        return w * s.value

    block = jax.checkpoint(lambda w: helper(w) * s.value)
    func = lambda w: helper(block(w))
    gradient = vector_grad(func, s) if by_state else vector_grad(func)
    for _ in range(2):
        gradient(X)
    with jax.log_compiles(), caplog.at_level(logging.DEBUG):
        gradient(X)
        assert "ompil" not in caplog.text
        jax.jit(lambda x: x)(X)
        assert "ompil" in caplog.text
