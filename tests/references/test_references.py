"""Gradients by states and references, alone and beside arguments and selectors."""

import threading

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.ref
import numpy as np
import pytest
import vgrad_eqx as vg
from jax import lax
from vgrad_eqx import vector_grad

from ..helpers import tree_allclose


X = jnp.array([0.5, -1.0, 2.0])


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

    @jax.jit
    def pull_back_by_hand(start, x):
        out, pull_back, last = jax.vjp(by_hand, start, x, has_aux=True)
        return pull_back(jnp.ones_like(out)), last

    expected, last = pull_back_by_hand(start, X)
    assert tree_allclose((var_grads, arg_grad), expected)
    assert tree_allclose(ref[...], last)


def test_a_scan_through_the_rows_of_a_reference():
    w, rows = vg.State(jnp.ones(3)), jax.new_ref(jnp.arange(6.0).reshape(2, 3))

    def body(total, row):
        row[...] = 2 * row[...]
        return total + row[...] * w.value, None

    grads = vector_grad(lambda x: lax.scan(body, x, rows)[0], [w, rows])(X)
    assert tree_allclose(grads, [jnp.array([6.0, 10.0, 14.0]), jnp.full((2, 3), 2.0)])
    assert tree_allclose(rows[...], 2 * jnp.arange(6.0).reshape(2, 3))


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
