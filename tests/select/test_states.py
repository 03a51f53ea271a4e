from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped

from ..helpers import make_mlp, tree_allclose


@jaxtyped(typechecker=beartype)
class Checked(eqx.Module):
    """Refuses to be made half-empty."""

    weight: Float[Array, "2 3"]
    count: Array
    constructed: list = eqx.field(static=True, default_factory=list)

    def __check_init__(self):
        self.constructed.append(1)
        assert self.weight.shape == (2, 3)


def make_tree():
    return {
        "checked": Checked(jnp.ones((2, 3)), jnp.arange(3)),
        "list": [jnp.zeros(2, jnp.float32), np.ones(2, np.float32), jax.nn.relu, None],
        "half": jnp.ones(2, jnp.bfloat16),
    }


@hypothesis.given(st.sets(st.sampled_from(list(vg.states(make_tree()))), min_size=1))
def test_replace_states_inverts_states(chosen):
    tree = make_tree()
    values = vg.states(tree, vg.path(*chosen))
    assert tree_allclose(vg.replace_states(tree, values), tree)
    doubled = {path: 2 * value for path, value in values.items()}
    replaced = vg.states(vg.replace_states(tree, doubled))
    expected = {path: 2 * x if path in chosen else x for path, x in vg.states(tree).items()}
    assert eqx.tree_equal(
        jax.tree.map(jnp.asarray, replaced), jax.tree.map(jnp.asarray, expected)
    )


def test_modules_are_not_constructed_again():
    tree = make_tree()
    vg.apply_updates(vg.replace_states(tree, vg.states(tree)), vg.states(tree))
    assert len(tree["checked"].constructed) == 1


def test_replacing_nothing_gives_the_tree_back():
    tree = {"n": 3}
    assert vg.replace_states(tree, {}) is tree
    assert vg.apply_updates(tree, {}) is tree


def test_replace_states_under_jit_and_vmap():
    mlp = make_mlp()
    params = vg.states(mlp, "layers.0")
    compiled = jax.jit(lambda params: vg.states(vg.replace_states(mlp, params), "layers.0"))
    assert tree_allclose(compiled(params), params)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    outs = jax.vmap(lambda params: vg.replace_states(mlp, params)(jnp.ones(3)))(stacked)
    assert tree_allclose(outs[0], mlp(jnp.ones(3)))


def test_apply_updates_agrees_with_optax(getkey):
    mlp = make_mlp()
    params = vg.states(mlp, "layers.*.weight")
    grads = jax.tree.map(lambda x: jr.normal(getkey(), x.shape), params)
    tx = optax.adam(1e-2)
    updates, _ = tx.update(grads, tx.init(params), params)
    updated: Any = optax.apply_updates(params, updates)
    ours = vg.states(vg.apply_updates(mlp, updates))
    assert tree_allclose(ours, {**vg.states(mlp), **updated})


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_apply_updates_keeps_the_dtype(dtype):
    tree = {"w": jnp.ones(2, dtype)}
    updated = vg.apply_updates(tree, {"w": jnp.full(2, 0.5, jnp.float32)})
    assert tree_allclose(updated, {"w": jnp.full(2, 1.5, dtype)})


def test_numpy_leaves_of_float64_can_be_replaced_and_updated():
    tree = {"w": np.ones(2)}
    new = vg.replace_states(tree, {"w": jnp.zeros(2)})
    assert tree_allclose(vg.apply_updates(tree, {"w": -jnp.ones(2)}), new)


def test_updates_may_be_numpy():
    assert vg.apply_updates({"w": jnp.ones(2)}, {"w": np.ones(2, np.float32)})[
        "w"
    ].tolist() == [
        2.0,
        2.0,
    ]


MERGES = {"replace_states": vg.replace_states, "apply_updates": vg.apply_updates}
WRONG_FOR_BOTH = {
    "unknown path": (
        {"lst.0": 1},
        ValueError,
        "Got `lst.0`. Its nearest paths are `list",
    ),
    "path of ints": ({"checked.count": 1}, ValueError, "Got `checked.count`"),
    "inner node": ({"list": jnp.zeros(2)}, ValueError, "Got `list`"),
    "shape": (
        {"list.0": jnp.zeros(3, "float32")},
        ValueError,
        r"at `list.0` .* f32\[2\]. Got f32\[3\]",
    ),
    "broadcast": (
        {"list.0": jnp.zeros((), "float32")},
        ValueError,
        r"f32\[2\]. Got f32\[\]",
    ),
    "integers": ({"list.0": jnp.array([1, 2], "int32")}, ValueError, r"Got i32\[2\]"),
    "text": ({"list.0": "a"}, ValueError, "at `list.0` must be an .*array. Got 'a'"),
    "none": ({"list.0": None}, ValueError, "at `list.0` must be an array. Got None"),
    "list": (
        [jnp.zeros(2)],
        TypeError,
        r"must be a dict from dotted path .* Got \[f\d\d",
    ),
}


@pytest.mark.parametrize(("name", "merge"), MERGES.items(), ids=MERGES.keys())
@pytest.mark.parametrize(
    ("values", "error", "match"), WRONG_FOR_BOTH.values(), ids=WRONG_FOR_BOTH.keys()
)
def test_wrong_values_are_refused(name, merge, values, error, match):
    tree = make_tree()
    with pytest.raises(error, match=f"`{name}"):
        merge(tree, values)
    with pytest.raises(error, match=match):
        merge(tree, values)


def test_replace_states_refuses_another_dtype():
    match = r"shape and dtype of the leaf, bf16\[2\]. Got f32\[2\]"
    with pytest.raises(ValueError, match=match):
        vg.replace_states(make_tree(), {"half": jnp.zeros(2, jnp.float32)})
    with pytest.raises(ValueError, match="at `half` must be an array. Got 0.0"):
        vg.replace_states({"half": jnp.float16(0)}, {"half": 0.0})


def test_apply_updates_refuses_a_complex_update_of_a_real_leaf():
    with pytest.raises(ValueError, match=r"must be real, as the leaf .* Got c64\[2\]"):
        vg.apply_updates(make_tree(), {"half": jnp.zeros(2, jnp.complex64)})


def test_summary_lists_every_array_once():
    lines = str(vg.summary(make_tree(), "list")).splitlines()
    assert [line.split()[0] for line in lines] == [
        "path",
        "checked.weight",
        "checked.count",
        "half",
        "list.0",
        "list.1",
        "chosen:",
    ]
    assert [line.split("  ")[-1] for line in lines[1:-1]] == [
        "frozen",
        "not differentiable",
        "frozen",
        "chosen",
        "chosen",
    ]
    assert lines[-1] == "chosen: 4 of 12 parameters, in 2 of 4 arrays"


def test_summary_of_a_large_and_of_an_empty_array():
    out = str(vg.summary({"a": jnp.zeros((1000, 1200)), "b": jnp.zeros(0)}, "a"))
    assert "1,200,000  chosen" in out
    assert "        0  frozen" in out


def test_summary_selects_as_states_does():
    with pytest.raises(ValueError, match=r"`summary\(selector=...\)` must select"):
        vg.summary(make_mlp(), "activation")
