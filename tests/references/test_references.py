"""Gradients over states by reference, against the same functions written without them."""

import functools as ft
import re
import threading
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.ref
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from vgrad_eqx import vector_grad

from ..helpers import tree_allclose


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
WAYS = {"eager": lambda func: func, "jit": jax.jit, "filter_jit": eqx.filter_jit}


@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("name", FUNCS)
def test_equals_the_functional_program(name, wrap):
    values = jnp.array([0.3, 1.1, -0.4]), jnp.array([1.0, 0.2, -2.0])
    w, h = vg.State(values[0]), vg.State(values[1])
    transform = vector_grad(
        lambda x: FUNCS[name](w, h, x),
        {"w": w, "h": h},
        argnums=0,
        return_value=True,
        check_states=False,
    )
    (var_grads, arg_grad), out = wrap(transform.__call__)(X)

    def by_hand(w, h, x):
        value, pull_back, last = jax.vjp(functional(name), w, h, x, has_aux=True)
        return value, pull_back(jax.tree.map(jnp.ones_like, value)), last

    value, grads, last = wrap(by_hand)(*values, X)
    assert tree_allclose(out, value)
    assert tree_allclose((var_grads["w"], var_grads["h"], arg_grad), grads)
    assert tree_allclose(h.value, last)
    assert tree_allclose(w.value, values[0])


@pytest.mark.parametrize("name", FUNCS)
def test_arguments_alone_and_selectors_go_the_same_way(name):
    h = vg.State(jnp.array([1.0, 0.2, -2.0]))
    tree = {"w": jnp.array([0.3, 1.1, -0.4])}
    start = h.value

    def func(tree, x):
        return FUNCS[name](Value(tree["w"]), h, x)

    _, pull_back, last = jax.vjp(functional(name), tree["w"], start, X, has_aux=True)
    out = functional(name)(tree["w"], start, X)[0]
    expected = pull_back(jax.tree.map(jnp.ones_like, out))
    for _ in range(2):
        h.value = start
        (var_grads, arg_grad) = vector_grad(func, "w", argnums=1, check_states=False)(tree, X)
        assert tree_allclose((var_grads["w"], arg_grad), (expected[0], expected[2]))
        assert tree_allclose(h.value, last)
        h.value = start
        assert tree_allclose(vector_grad(func, argnums=1)(tree, X), expected[2])
        assert tree_allclose(h.value, last)


def test_containers_and_bare_references():
    w, b, ref = vg.State(2.0), vg.State({"x": jnp.ones(3), "n": 1}), jax.new_ref(jnp.ones(3))

    def func(x):
        return w.value * x * b.value["x"] * ref[...]

    scaled = 2 * X
    single = vector_grad(func, w)(X)
    assert tree_allclose(single, X.sum())
    nested = vector_grad(func, {"all": [w, (b, ref)], "w": w})(X)
    expected = {
        "all": [X.sum(), ({"x": scaled, "n": None}, scaled)],
        "w": X.sum(),
    }
    assert tree_allclose(nested, expected)
    assert tree_allclose(vector_grad(func, [ref])(X), [scaled])


def test_indexed_reads_and_writes_of_a_reference():
    ref = jax.new_ref(jnp.array([1.0, 2.0, 3.0]))

    def func(x):
        ref[1] = x[0] * ref[0]
        jax.ref.addupdate(ref, 0, x[2])
        ref[jnp.array([2, 0])] += x[:2]

        def body(i, total):
            ref[i] = ref[i] * 2
            return total + ref[i]

        return lax.fori_loop(0, 3, body, 0.0) * ref[:2]

    def by_hand(start, x):
        value = start.at[1].set(x[0] * start[0]).at[0].add(x[2])
        value = 2 * value.at[jnp.array([2, 0])].add(x[:2])
        return value.sum() * value[:2], value

    start = ref[...]
    var_grads, arg_grad = vector_grad(func, ref, argnums=0)(X)
    out, pull_back, last = jax.vjp(by_hand, start, X, has_aux=True)
    assert tree_allclose((var_grads, arg_grad), pull_back(jnp.ones_like(out)))
    assert tree_allclose(ref[...], last)


def test_a_scan_through_the_rows_of_a_reference():
    w, rows = vg.State(jnp.ones(3)), jax.new_ref(jnp.arange(6.0).reshape(2, 3))

    def body(total, row):
        row[...] = 2 * row[...]
        return total + row[...] * w.value, None

    grads = vector_grad(lambda x: lax.scan(body, x, rows)[0], [w, rows])(X)
    assert tree_allclose(grads, [jnp.array([6.0, 10.0, 14.0]), jnp.full((2, 3), 2.0)])
    assert tree_allclose(rows[...], 2 * jnp.arange(6.0).reshape(2, 3))


def test_a_jitted_helper_keeps_its_shardings():
    w = vg.State(jnp.ones(4))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    @ft.partial(jax.jit, out_shardings=sharding)
    def helper(x):
        return x * w.value

    x = jnp.arange(4.0)
    text = jax.jit(lambda x: vector_grad(lambda x: helper(x) ** 2, w)(x)).lower(x).as_text()
    assert '"data"' in text
    assert tree_allclose(vector_grad(lambda x: helper(x) ** 2, w)(x), 2 * x**2)


def test_a_reference_that_is_only_added_to():
    ref = jax.new_ref(jnp.zeros(3))

    def func(x):
        jax.ref.addupdate(ref, ..., x)
        return x**2

    assert tree_allclose(vector_grad(func)(X), 2 * X)
    assert tree_allclose(ref[...], X)


def test_none_among_states():
    w = vg.State(jnp.ones(3))
    grads = vector_grad(lambda x: x * w.value, {"w": w, "none": None})(X)
    assert tree_allclose(grads, {"w": X, "none": None})


def test_options_together():
    w, count = vg.State(jnp.ones(3), "w"), vg.State(0)

    @vector_grad(grad_states={"w": w}, argnums=[0], return_value=True, has_aux=True)
    def func(x, *, scale):
        count.value += 1
        return x * w.value * scale, {"count": count.value, "text": "aux"}

    (var_grads, arg_grads), value, aux = func(X, scale=2)
    assert tree_allclose(var_grads, {"w": 2 * X})
    assert tree_allclose(arg_grads, (jnp.full(3, 2.0),))
    assert tree_allclose(value, 2 * X)
    assert aux["text"] == "aux"
    assert aux["count"] == count.value == 1


def test_debug_nan_names_the_state_and_leaves_it():
    w, count = vg.State({"a": jnp.zeros(2)}), vg.State(0)

    def func():
        count.value += 1
        return jnp.sqrt(w.value["a"])

    for grad_states, name in ((w, "a"), ({"w": w}, "w.a"), ([w], "0.a")):
        with pytest.raises(FloatingPointError, match=f"Got infinity in `{name}`"):
            vector_grad(func, grad_states, debug_nan=True)()
    assert count.value == 0


class Rnn(eqx.Module):
    """A recurrent network, whose memory is a state."""

    weight_x: vg.State
    weight_h: vg.State
    hidden: vg.State

    def __init__(self, key):
        key_x, key_h = jr.split(key)
        self.weight_x = vg.State(jr.normal(key_x, (4, 2)))
        self.weight_h = vg.State(0.5 * jr.normal(key_h, (4, 4)))
        self.hidden = vg.State(jnp.zeros(4))

    def step(self, x):
        pre = self.weight_x.value @ x + self.weight_h.value @ self.hidden.value
        self.hidden.value = jnp.tanh(pre)
        return self.hidden.value


def step_by_hand(params, hidden, x):
    hidden = jnp.tanh(params["weight_x"] @ x + params["weight_h"] @ hidden)
    return hidden, hidden


UNROLLED = {
    "scan": (
        lambda rnn, xs: lax.scan(lambda _, x: (None, rnn.step(x)), None, xs)[1],
        lambda params, h, xs: lax.scan(lambda h, x: step_by_hand(params, h, x), h, xs),
    ),
    "loop": (
        lambda rnn, xs: [rnn.step(x) for x in xs],
        lambda params, h, xs: loop_by_hand(step_by_hand, params, h, xs),
    ),
    "jitted step": (
        lambda rnn, xs: [jax.jit(rnn.step)(x) for x in xs],
        lambda params, h, xs: loop_by_hand(jax.jit(step_by_hand), params, h, xs),
    ),
}


def loop_by_hand(step, params, hidden, xs):
    outs = []
    for x in xs:
        hidden, out = step(params, hidden, x)
        outs.append(out)
    return hidden, outs


@pytest.mark.parametrize(("unroll", "by_hand"), UNROLLED.values(), ids=UNROLLED.keys())
@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS.keys())
def test_recurrent_network_equals_the_scan_to_the_last_bit(unroll, by_hand, wrap):
    rnn, xs = Rnn(jr.key(0)), jr.normal(jr.key(1), (5, 2))
    weights = vg.states(rnn, "weight_*")
    params = {path: state.value for path, state in weights.items()}
    start = rnn.hidden.value
    transform = vector_grad(lambda xs: unroll(rnn, xs), weights, argnums=0, return_value=True)
    (var_grads, arg_grad), outs = wrap(lambda xs: transform(xs))(xs)

    def gradient(params, start, xs):
        def func(params, xs):
            hidden, outs = by_hand(params, start, xs)
            return outs, hidden

        outs, pull_back, hidden = jax.vjp(func, params, xs, has_aux=True)
        return pull_back(jax.tree.map(jnp.ones_like, outs)), outs, hidden

    grads, expected, hidden = wrap(gradient)(params, start, xs)
    assert eqx.tree_equal(outs, expected)
    assert eqx.tree_equal((var_grads, arg_grad), grads)
    assert eqx.tree_equal(rnn.hidden.value, hidden)


def test_order_of_calls_does_not_matter():
    def gradients(order):
        w = vg.State(jnp.array(3.0))
        helper = jax.jit(lambda x: x * w.value**2)
        results = []
        for call in order:
            if call == "helper":
                helper(2.0)
            else:
                results.append(vector_grad(helper, w)(2.0))
                results.append(vector_grad(lambda x: helper(x) * 2, w)(2.0))
                results.append(vector_grad(jax.jit(lambda x: helper(x)), w)(2.0))
        return results

    expected = [12.0, 24.0, 12.0]
    assert gradients(["gradient"]) == expected
    assert gradients(["helper", "gradient"]) == expected
    assert gradients(["gradient", "helper", "gradient"]) == 2 * expected


def test_compiled_gradient_reads_the_current_value():
    w = vg.State(jnp.array(3.0))
    calls = []

    @jax.jit
    def gradient(x):
        def func(x):
            calls.append(1)
            return x * w.value**2

        return vector_grad(func, w)(x)

    assert gradient(1.0) == 6.0
    w.value = 10.0
    assert gradient(1.0) == 20.0
    assert len(calls) == 1


def test_func_is_called_once():
    w, calls = vg.State(jnp.ones(2)), []

    def func(x):
        calls.append(1)
        return x * w.value

    for count in (1, 2):
        vector_grad(func, w)(X[:2])
        assert len(calls) == count


@hypothesis.given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gradient_of_a_gradient(power, seed):
    start, x = jr.normal(jr.key(seed), (2, 3))
    w = vg.State(start)
    inner = vector_grad(lambda x: jnp.sin(x * w.value) ** power, w)
    outer = vector_grad(lambda x: inner(x), w, argnums=0)

    def by_hand(w, x):
        return jax.grad(lambda w: jnp.sum(jnp.sin(x * w) ** power))(w)

    expected = jax.grad(lambda *args: by_hand(*args).sum(), argnums=(0, 1))(start, x)
    assert tree_allclose(outer(x), expected, rtol=1e-4, atol=1e-4)
    assert tree_allclose(jax.grad(lambda x: inner(x).sum())(x), expected[1], 1e-4, 1e-4)


def test_under_vmap_scan_grad_and_checkpoint():
    w = vg.State(jnp.array([1.0, 2.0, 3.0]))
    gradient = vector_grad(lambda x: jnp.sin(x * w.value), w)
    xs = jnp.outer(jnp.arange(1.0, 3.0), X)
    expected = jnp.stack([gradient(x) for x in xs])
    assert tree_allclose(jax.vmap(gradient)(xs), expected)
    assert tree_allclose(lax.map(gradient, xs), expected)
    assert tree_allclose(jax.checkpoint(lambda x: gradient(x))(X), gradient(X))
    second = jax.grad(lambda x: gradient(x).sum())(X)
    assert tree_allclose(jax.grad(jax.checkpoint(lambda x: gradient(x).sum()))(X), second)


def test_a_write_under_vmap_says_what_to_do():
    w, h = vg.State(jnp.ones(3)), vg.State(jnp.zeros(3), "h")

    def func(x):
        h.value = x * w.value
        return h.value

    xs = jnp.outer(X, X)
    match = "cannot be set inside of `jax.vmap`, .* set it outside of"
    for mapped in (jax.vmap(vector_grad(func, w)), vector_grad(jax.vmap(func), w)):
        with pytest.raises(ValueError, match=match):
            mapped(xs)
        assert tree_allclose(h.value, jnp.zeros(3))


@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_threads_share_a_state(times):
    w, h = vg.State(jnp.array([1.0, 2.0, 3.0])), vg.State(jnp.zeros(3))
    gradient = vector_grad(lambda x: (h.value + x * w.value) ** 2, [w])
    results: dict[int, list] = {1: [], 2: []}

    def work(scale):
        for _ in range(times):
            results[scale].append(gradient(scale * X)[0])
            w.value = w.value

    threads = [threading.Thread(target=work, args=(scale,)) for scale in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale, grads in results.items():
        expected = np.tile(2 * (scale * X) ** 2 * w.value, (times, 1))
        np.testing.assert_allclose(np.stack(grads), expected, rtol=1e-5)


def test_an_exception_leaves_every_state():
    w, h = vg.State(jnp.ones(3)), vg.State(jnp.zeros(3))

    def func(tree, x):
        h.value = x
        w.value = w.value * 2
        raise RuntimeError("mine")

    tree = {"a": jnp.ones(3)}
    for transform in (
        vector_grad(func, [w]),
        vector_grad(func, "a"),
        vector_grad(func, "a", check_states=False),
        vector_grad(func, argnums=1),
    ):
        for wrapped in (transform, lambda *args: jax.jit(lambda *a: transform(*a))(*args)):  # noqa: B023
            with pytest.raises(RuntimeError, match="mine"):
                wrapped(tree, X)
            assert tree_allclose((w.value, h.value), (jnp.ones(3), jnp.zeros(3)))


def test_a_refused_output_leaves_every_state():
    w = vg.State(jnp.ones(3))

    def func():
        w.value = w.value * 2
        return 1

    with pytest.raises(TypeError, match="must return an inexact array"):
        vector_grad(func, w)()
    assert tree_allclose(w.value, jnp.ones(3))


def test_a_state_that_is_not_touched_is_named():
    w, idle, ref = vg.State(jnp.ones(3)), vg.State(jnp.ones(2), "idle"), jax.new_ref(1.0)

    def func(x):
        return x * w.value

    cases = {
        r"`b`, State\(f(32|64)\[2\], name='idle'\)": {"a": w, "b": idle},
        r"`1`, State\(f(32|64)\[2\], name='idle'\)": [w, idle],
        r"touch State\(f(32|64)\[2\], name='idle'\)\. Leave": idle,
        r"`layers.0`, State\(.*; `layers.1`, a `jax.Ref`\. Leave": {"layers": [idle, ref]},
    }
    for match, grad_states in cases.items():
        for _ in range(2):
            with pytest.raises(ValueError, match=f"It does not touch .*{match}|{match}"):
                vector_grad(func, grad_states)(X)
    grads = vector_grad(func, [w, idle, ref], check_states=False)(X)
    assert tree_allclose(grads, [X, jnp.zeros(2), jnp.asarray(0.0)])


def test_selected_leaf_that_only_reaches_a_state_is_named():
    h = vg.State(jnp.zeros(3))

    def func(tree, x):
        h.value = tree["idle"] * x
        return tree["used"] * x

    tree = {"used": jnp.ones(3), "idle": jnp.ones(3)}
    for _ in range(2):
        with pytest.raises(ValueError, match="It does not depend on `idle`"):
            vector_grad(func, True)(tree, X)
    assert tree_allclose(h.value, jnp.zeros(3))
    grads = vector_grad(lambda tree, x: (func(tree, x), h.value), True)(tree, X)
    assert tree_allclose(grads["idle"], X)


def looks(w, x):
    return x if w.value[0] > 0 else -x


LOOKING = {
    "if": looks,
    "float": lambda w, x: x * float(w.value[0]),
    "int": lambda w, x: x * range(int(w.value[0]))[0],
    "NumPy": lambda w, x: x * np.asarray(w.value),
    "index": lambda w, x: x * [1, 2][w.value[0].astype(int)],
    "mask": lambda w, x: x[w.value > 0],
}


@pytest.mark.parametrize("func", LOOKING.values(), ids=LOOKING.keys())
def test_a_gradient_by_a_state_may_look_at_the_value_of_another(func):
    w, h = vg.State(jnp.ones(3)), vg.State(jnp.ones(3))
    grads = vector_grad(lambda x: func(w, x) * h.value, h)(X)
    assert tree_allclose(grads, func(w, X))


@pytest.mark.parametrize("func", LOOKING.values(), ids=LOOKING.keys())
def test_a_gradient_by_an_argument_may_look_at_the_value_of_a_state(func):
    w = vg.State(jnp.ones(3))
    y, pull_back = jax.vjp(lambda x: func(w, x), X)
    expected = pull_back(jnp.ones_like(y))[0]
    assert tree_allclose(vector_grad(lambda x: func(w, x))(X), expected)


def test_looking_at_other_values_still_works_without_states():
    def func(tree, x):
        return tree["a"] * x if tree["a"][0] > 0 else x

    tree = {"a": jnp.ones(3)}
    for transform in (vector_grad(func, "a"), vector_grad(func, argnums=1)):
        for _ in range(2):
            transform(tree, X)


MISUSED = {
    "mixed": (
        [vg.State(1.0), "a"],
        TypeError,
        "states by reference or selectors, and not both",
    ),
    "integers": ([vg.State(1)], TypeError, r"Got `0`, State\(i(32|64)\[\]\), in which nothing"),
    "integer reference": (jax.new_ref(1), TypeError, "Got a `jax.Ref`, in which nothing"),
}


@pytest.mark.parametrize(("grad_states", "kind", "match"), MISUSED.values(), ids=MISUSED.keys())
def test_grad_states_that_are_refused(grad_states, kind, match):
    with pytest.raises(kind, match=r"`vector_grad\(grad_states=...\)` must .*" + match):
        vector_grad(lambda x: x, grad_states)(1.0)


def test_a_selector_that_finds_states_says_how_to_name_them():
    with pytest.raises(
        ValueError, match=r"To differentiate by states, pass them, as `vg.states"
    ):
        vector_grad(Rnn(jr.key(0)).step, "weight_x")(X[:2])


def test_a_selector_beside_a_hidden_state():
    class Integrator(eqx.Module):
        weight: jax.Array
        hidden: vg.State

        def __call__(self, x):
            self.hidden.value = self.hidden.value + self.weight * x
            return self.hidden.value**2

    model = Integrator(jnp.array(2.0), vg.State(0.0))
    for wrap in (lambda f: f, eqx.filter_jit):
        model.hidden.value = 0.0
        step = wrap(vector_grad(lambda model, x: model(x), "weight"))
        assert step(model, 3.0)["weight"] == 2 * 6 * 3
        assert model.hidden.value == 6.0
        assert step(model, 1.0)["weight"] == 2 * 8 * 1
        assert model.hidden.value == 8.0


def test_optax_takes_the_gradients_and_the_loss_falls():
    rnn, xs = Rnn(jr.key(0)), jr.normal(jr.key(1), (5, 2))
    states = vg.states(rnn, "weight_*")
    tx = optax.adam(0.05)
    opt_state = tx.init({path: state.value for path, state in states.items()})

    def errors(xs):
        rnn.hidden.value = jnp.zeros(4)
        return (lax.scan(lambda _, x: (None, rnn.step(x)), None, xs)[1] - 0.5) ** 2

    @jax.jit
    def step(opt_state: Any) -> Any:
        grads, losses = vector_grad(errors, states, return_value=True)(xs)
        updates: Any
        updates, opt_state = tx.update(grads, opt_state)
        for path, state in states.items():
            state.value += updates[path]
        return opt_state, losses.mean()

    losses = []
    for _ in range(40):
        opt_state, loss = step(opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_tracers_do_not_leak():
    w, h = vg.State(jnp.ones(3)), vg.State(jnp.zeros(3))
    with jax.checking_leaks():
        transform = vector_grad(lambda x: through_all(w, h, x), [w], argnums=0)
        transform(X)
        jax.jit(lambda x: transform(x))(X)


def test_scopes_keep_their_names():
    w = vg.State(jnp.ones(3))

    def func(x):
        with jax.named_scope("first"):
            x = jnp.sin(x * w.value)
        with jax.named_scope("second"):
            return jnp.sin(x * w.value)

    text = jax.jit(lambda x: vector_grad(func, w)(x)).lower(X).as_text(debug_info=True)
    assert re.search(r"first\)*/cos", text)
    assert re.search(r"second\)*/cos", text)


POLICIES = {
    "alone": lambda func: func,
    "jit": jax.jit,
    "scan": lambda func: lambda x: lax.scan(lambda c, _: (func(c), None), x, length=2)[0],
}


@pytest.mark.parametrize("wrap", POLICIES.values(), ids=POLICIES.keys())
def test_checkpoint_keeps_its_policy(wrap):
    w = vg.State(jnp.ones(3))
    policy = jax.checkpoint_policies.everything_saveable
    func = wrap(jax.checkpoint(lambda x: jnp.sin(x * w.value), policy=policy))
    text = str(jax.make_jaxpr(lambda x: vector_grad(func, w)(x))(X))
    assert "policy=<function everything_saveable" in text


def test_intermediate_values_are_let_go():
    w, counts = vg.State(jnp.ones((17, 19))), []

    def func():
        x = w.value
        for _ in range(20):
            x = x + w.value
            jax.debug.callback(lambda _: counts.append(count()), x[0, 0], ordered=True)
        return x

    def count():
        return sum(array.shape == (17, 19) for array in jax.live_arrays())

    vector_grad(func, w)()
    jax.effects_barrier()
    assert len(counts) == 20
    assert max(counts) < min(counts) + 5


def test_compiled_program_has_the_cost_of_the_functional_one():
    names = [f"w{i}" for i in range(20)]
    params = {name: jnp.full((8, 8), 0.1) for name in names}
    states = {name: vg.State(value) for name, value in params.items()}

    def apply(read, x):
        for name in names:
            x = jnp.tanh(read(name) @ x)
        return x

    def measure(func, *args):
        compiled = jax.jit(func).lower(*args).compile()
        cost, text = compiled.cost_analysis(), compiled.as_text()
        assert cost is not None
        assert text is not None
        return cost["flops"], len(re.findall(r"^\s+(ROOT )?%\S+ = ", text, re.MULTILINE))

    def func(x):
        return apply(lambda name: states[name].value, x)

    ours = measure(lambda x: vector_grad(func, states)(x), jnp.ones(8))
    by_hand = measure(
        lambda p, x: vector_grad(lambda p, x: apply(p.get, x))(p, x), params, jnp.ones(8)
    )
    assert ours == by_hand
