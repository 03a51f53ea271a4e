"""What is refused is named, and an error leaves every state as it was."""

import jax
import jax.numpy as jnp
import jax.ref
import pytest
import vgrad_eqx as vg
from vgrad_eqx import vector_grad

from ..helpers import tree_allclose


X = jnp.array([0.5, -1.0, 2.0])


def test_debug_nan_names_the_state_and_leaves_it():
    w, count = vg.State({"a": jnp.zeros(2)}), vg.State(0)

    def func():
        count.value += 1
        return jnp.sqrt(w.value["a"])

    for grad_states, name in ((w, "a"), ({"w": w}, "w.a"), ([w], "0.a")):
        with pytest.raises(FloatingPointError, match=f"Got infinity in `{name}`"):
            vector_grad(func, grad_states, debug_nan=True)()
    assert count.value == 0


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
        r"touch State\(f(32|64)\[2\], name='idle'\)\. Remove": idle,
        r"`layers.0`, State\(.*; `layers.1`, a `jax.Ref`\. Remove": {"layers": [idle, ref]},
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
        ValueError, match=r"To differentiate by states, pass the states themselves: `vg.states"
    ):
        vector_grad(lambda tree, x: tree["w"].value * x, "w")({"w": vg.State(X)}, X)
