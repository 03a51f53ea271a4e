"""Checkpoints come back as they were saved, or not at all."""

import os
from typing import Any

import brainunit as u
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import safetensors.numpy
import vgrad_eqx as vg

from ..helpers import make_mlp, tree_allclose


def test_a_module_comes_back(path):
    vg.save(path, make_mlp(seed=1))
    assert eqx.tree_equal(vg.load(str(path), make_mlp(seed=2)), make_mlp(seed=1))
    assert os.listdir(path.parent) == ["checkpoint"]


DTYPES = ["float32", "bfloat16", "float16", "complex64", "int8", "uint32", "bool", "int4"]
DTYPES += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back(path, dtype, shape):
    tree = {"a": jnp.ones(shape, dtype)}
    vg.save(path, tree)
    loaded = vg.load(path, {"a": jnp.zeros(shape, dtype)})
    assert eqx.tree_equal(loaded, tree, typematch=True)
    shapes = {"a": jax.ShapeDtypeStruct(shape, dtype)}
    assert eqx.tree_equal(vg.load(path, shapes), tree, typematch=True)


def test_numpy_arrays_keys_and_python_numbers_come_back(path):
    tree = {
        "numpy": np.arange(3.0),
        "complex": np.ones(2, "complex128"),
        "key": jr.key(3),
        "keys": jr.split(jr.key(4, impl="rbg"), 3),
        "int": 3,
        "bool": True,
        "float": 0.1,
        "number": 1 + 2j,
        "text": "left out",
    }
    vg.save(path, tree)
    like = tree | {"numpy": np.zeros(3), "key": jr.key(0), "int": 0, "float": 0.0}
    loaded = vg.load(path, like)
    assert eqx.tree_equal(loaded, tree, typematch=True)
    assert type(loaded["bool"]) is bool


names = st.text("ab.", min_size=1, max_size=4)
leaves = st.integers(0, 2**31 - 1) | st.floats(allow_nan=False) | st.booleans()
trees = st.recursive(
    leaves,
    lambda t: st.lists(t, min_size=1, max_size=3) | st.dictionaries(names, t, min_size=1),
)


@hypothesis.given(trees)
def test_any_tree_comes_back_or_is_refused(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "checkpoint"
    paths = [
        jax.tree_util.keystr(each, simple=True, separator=".")
        for each, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if len(set(paths)) < len(paths):
        with pytest.raises(ValueError, match="two leaves with the dotted path"):
            vg.save(path, tree)
        assert not path.exists()
    else:
        vg.save(path, tree)
        assert eqx.tree_equal(vg.load(path, tree), tree, typematch=True)


def loss(model, x, key):
    return jnp.mean(jax.vmap(model)(x) ** 2) + 0.1 * jr.normal(key) * model.layers[0].bias[0]


X = jnp.ones((5, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_goes_on_with_the_same_numbers(path, packed):
    step = vg.train_step(loss, optax.adam(1e-2), "layers.[01]", packed=packed)
    state = step.init(make_mlp(), key=jr.key(1))
    for _ in range(3):
        state, _ = step(state, X)
    vg.save(path, {"state": state, "epoch": 7})
    # As in another process, and whether it is packed there or not.
    again = vg.train_step(loss, optax.adam(1e-2), "layers.[01]", packed=not packed)
    like = {"state": again.init(make_mlp(seed=2), key=jr.key(0)), "epoch": 0}
    loaded = vg.load(path, like)
    assert loaded["epoch"] == 7
    resumed = loaded["state"]
    assert resumed.count == 3
    for _ in range(3):
        state, metrics = step(state, X)
        resumed, same = again(resumed, X)
        assert tree_allclose(metrics.value, same.value, rtol=1e-6, atol=1e-6)
    assert tree_allclose(resumed.model, state.model, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="was donated to a step"):
        vg.save(path, loaded)


def test_names_are_paths(path):
    step = vg.train_step(loss, {"**.weight": optax.adam(1e-2), "**.bias": optax.sgd(1.0)})
    vg.save(path, step.init(make_mlp(depth=1), key=jr.key(0)))
    names = set(safetensors.numpy.load_file(path))
    assert "model.layers.0.weight" in names
    assert "opt_state.**.weight.0.mu.layers.1.weight" in names
    assert {"count", "key.0", "opt_state.**.weight.0.count"} <= names


def test_batch_statistics_come_back(path):
    norm, nn_state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="ema")

    def func(norm, nn_state, x):
        out, nn_state = jax.vmap(
            norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )(x, nn_state)
        return jnp.sum(out**2), nn_state

    step = vg.train_step(func, optax.sgd(0.1))
    state, _ = step(step.init(norm, nn_state=nn_state), X + jnp.arange(5.0)[:, None])
    vg.save(path, state)
    loaded = vg.load(path, step.init(norm, nn_state=nn_state))
    assert eqx.tree_equal(jax.tree.leaves(loaded.nn_state), jax.tree.leaves(state.nn_state))
    assert eqx.tree_equal(loaded.model, state.model)


def test_an_optimizer_and_its_model_come_back(path):
    model = make_mlp()
    opt = vg.Optimizer(optax.adam(1e-2), model)
    model, opt = opt.step(model, vg.states(model))
    vg.save(path, {"model": model, "opt": opt})
    like = {"model": make_mlp(seed=3), "opt": vg.Optimizer(optax.adam(1e-2), make_mlp(seed=3))}
    assert eqx.tree_equal(vg.load(path, like), {"model": model, "opt": opt})


def test_states_by_reference_are_set(path):
    def make():
        states = {"w": vg.State(jnp.ones(2) * u.ms), "n": vg.State({"a": 0, "b": jnp.zeros(1)})}
        tx = vg.unitful(optax.adam(0.1), u.ms)
        return states, vg.StateOptimizer(tx, {"w": states["w"]})

    states, opt = make()
    opt.step({"w": jnp.ones(2)})
    states["n"].value = {"a": 0, "b": jnp.ones(1)}
    vg.save(path, [states, opt])
    others, other_opt = make()
    loaded = vg.load(path, (others, other_opt))[0]
    assert loaded["w"] is others["w"]
    assert tree_allclose(u.get_mantissa(others["w"].value), u.get_mantissa(states["w"].value))
    assert others["n"].value["b"].tolist() == [1.0]
    assert int(other_opt.count) == 1
    assert tree_allclose(other_opt.opt_state, opt.opt_state)


def test_a_training_over_states_goes_on(path):
    def make():
        w, calls = vg.State(jnp.array([1.0, 2.0])), vg.State(0)

        def func(x):
            calls.value += 1
            return (w.value * x) ** 2

        return w, calls, vg.train_step(func, optax.adam(0.1), {"w": w})

    _, _, step = make()
    state = step.init()
    for _ in range(3):
        state, _ = step(state, 2.0)
    vg.save(path, state)
    w, calls, step = make()
    with pytest.raises(ValueError, match="`others.0`.*known after `step.init.batch=...."):
        vg.load(path, step.init())
    resumed = vg.load(path, step.init(batch=(2.0,)))
    resumed.sync()
    assert int(calls.value) == 3
    assert resumed.count == 3
    with resumed:
        resumed, _ = step(resumed, 2.0)
    assert int(calls.value) == 4
    assert float(w.value[0]) < 0.75


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x, "order": 1}])
def test_states_that_have_names_are_saved_by_them(path, wrap):
    def make(order):
        states = {name: vg.State(wrap(jnp.zeros(2)), name=name) for name in "ab"}
        w = vg.State(jnp.ones(2))

        def func(x):
            for name in order:
                old = states[name].value
                old = old["x"] if isinstance(old, dict) else old
                states[name].value = wrap(old + (10 * x if name == "b" else x))
            return jnp.sum(w.value * x)

        return states, vg.train_step(func, optax.sgd(0.1), {"w": w})

    _, step = make("ab")
    vg.save(path, step(step.init(), jnp.ones(2))[0])
    states, step = make("ba")
    vg.load(path, step.init(batch=(jnp.ones(2),))).sync()
    a, b = (states[name].value for name in "ab")
    assert (a["x"] if isinstance(a, dict) else a).tolist() == [1.0, 1.0]
    assert (b["x"] if isinstance(b, dict) else b).tolist() == [10.0, 10.0]


def test_states_that_nobody_has_any_more_are_not_saved(path):
    w, holder = vg.State(jnp.ones(2)), {}

    def func(x):
        holder["hidden"].value = holder["hidden"].value + x
        return jnp.sum(w.value) * jnp.sum(holder["hidden"].value)

    def reset(size):
        holder["hidden"] = vg.State(jnp.zeros((size, 2)))
        return jnp.ones((size, 2))

    step = vg.train_step(func, optax.sgd(0.1), {"w": w})
    state = step.init()
    for size in (4, 2, 4):
        state, _ = step(state, reset(size))
    vg.save(path, state)
    x = reset(4)
    step = vg.train_step(func, optax.sgd(0.1), {"w": w})
    vg.load(path, step.init(batch=(x,))).sync()
    assert holder["hidden"].value.tolist() == x.tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_a_training_state_of_shapes_is_filled(path, packed):
    def loss(w, x):
        return jnp.sum(w["a"] * x) ** 2

    step = vg.train_step(loss, optax.adam(0.1), packed=packed)
    make = lambda: step.init({"a": jnp.ones(2)})
    state, _ = step(make(), 2.0)
    vg.save(path, state)
    loaded = vg.load(path, jax.eval_shape(make))
    assert loaded.count == 1
    assert tree_allclose(step(loaded, 2.0)[0].model, step(state, 2.0)[0].model)


def test_ten_milliseconds_never_come_back_as_ten_seconds(path):
    vg.save(path, {"tau": 10.0 * u.ms})
    assert vg.load(path, {"tau": 1.0 * u.msecond})["tau"] == 10.0 * u.ms
    with pytest.raises(
        ValueError, match=r"32\[\] in s at `tau`, and .*32\[\] in ms in the f|64"
    ):
        vg.load(path, {"tau": 1.0 * u.second})
    with pytest.raises(ValueError, match="at `tau`, and"):
        vg.load(path, {"tau": jnp.array(1.0)})
    with pytest.warns(UserWarning, match="in s at `tau`"):
        kept = vg.load(path, {"tau": 1.0 * u.second}, strict=False)
    assert kept["tau"] == 1.0 * u.second


def test_every_difference_is_listed_and_nothing_is_set(path):
    vg.save(
        path, {"a": jnp.ones(2), "b": jnp.ones(3), "gone": 1, "s": jnp.ones(2), "k": jr.key(0)}
    )
    state = vg.State(jnp.zeros(2))
    like = {
        "a": jnp.zeros(3),
        "b": jnp.zeros(3, "bfloat16"),
        "new": jnp.zeros(1),
        "s": state,
        "k": jr.key(0, impl="rbg"),
    }
    with pytest.raises(ValueError, match="must be like the checkpoint") as caught:
        vg.load(path, like)
    for part in (
        "[3] at `a`, and",
        "bfloat16[3] at `b`, and",
        "[1] at `new`, and nothing in the file",
        "nothing at `gone`, and a Python int in the file",
        "a key of rbg, uint32[4] at `k`, and a key of threefry2x32, uint32[2] in the file",
    ):
        assert part in str(caught.value)
    assert "`s`" not in str(caught.value)
    assert "Python numbers" not in str(caught.value)
    assert state.value.tolist() == [0.0, 0.0]
    with pytest.warns(UserWarning, match="left out what does not fit.*`gone`"):
        loaded = vg.load(path, like, strict=False)
    assert state.value.tolist() == [1.0, 1.0]
    assert loaded["a"] is like["a"]


def test_arrays_alone_do_not_make_a_model_with_numbers(path):
    model = {"w": jnp.ones(2), "p": 0.5}
    vg.save(path, vg.states(model))
    with pytest.raises(ValueError, match="These are Python numbers in the model. To load only"):
        vg.load(path, model)
    loaded = vg.replace_states(model, vg.load(path, vg.states(model)))
    assert loaded["w"].tolist() == [1.0, 1.0]


def test_what_cannot_be_saved(path):
    with pytest.raises(
        ValueError, match="must hold an array or a number. Got a `dict` without"
    ):
        vg.save(path, {"a": "text", "b": None})
    with pytest.raises(ValueError, match="two leaves with the dotted path `a.b`.*rename one"):
        vg.save(path, {"a.b": 1.0, "a": {"b": 2.0}})
    with pytest.raises(FileNotFoundError):
        vg.save(path.parent / "nowhere" / "checkpoint", {"a": 1.0})
    with pytest.raises(FileNotFoundError):
        vg.load(path, {"a": 1.0})
    assert not path.exists()


PARAMS = {"a": {"g": jnp.array(8.0) * u.nS}, "w": jnp.ones(2)}


def make_scaled(scale, loss_unit: Any = u.mvolt):
    return vg.Optimizer(vg.unitful(optax.adam(0.1), loss_unit, {"a.g": scale}), PARAMS)


SCALES: dict[str, tuple[Any, str | None]] = {
    "the same": (make_scaled(100.0 * u.nS), None),
    "in other words": (make_scaled(0.1 * u.uS), None),
    "another scale": (
        make_scaled(10.0 * u.nS),
        "units of 10 nS, loss in mV at .*units of 100 nS",
    ),
    "another loss": (
        make_scaled(100.0 * u.nS, u.volt),
        "loss in V at .*loss in mV in the file",
    ),
}


@pytest.mark.parametrize(("like", "match"), SCALES.values(), ids=SCALES.keys())
def test_moments_are_loaded_only_into_the_scale_that_they_are_in(path, like, match):
    grads = {"a.g": 1.0 * u.mvolt / u.nS, "w": jnp.ones(2) * u.mvolt}
    _, opt = make_scaled(100.0 * u.nS).step(PARAMS, grads)
    vg.save(path, {"opt": opt})
    if match is None:
        loaded = vg.load(path, {"opt": like})["opt"]
        assert tree_allclose(loaded.opt_state.inner_state, opt.opt_state.inner_state)
        return
    with pytest.raises(ValueError, match=f"must be like the checkpoint. There is .*{match}"):
        vg.load(path, {"opt": like})
    with pytest.warns(UserWarning, match="has left out what does not fit"):
        loaded = vg.load(path, {"opt": like}, strict=False)["opt"]
    assert float(loaded.opt_state.inner_state[0].mu["a.g"]) == 0.0
    assert int(loaded.count) == 1


def test_moments_of_states_and_trainings_have_scales(path):
    w = vg.State(jnp.ones(2) * u.ms)

    def make_states(size):
        return vg.StateOptimizer(
            vg.unitful(optax.adam(0.1), scale={"w": size * u.ms}), {"w": w}
        )

    def make_training(size):
        tx = vg.unitful(optax.adam(0.1), scale={"a.g": size * u.nS})
        return vg.train_step(lambda tree: (tree["a"]["g"] / u.nS) ** 2, tx, "a.g").init(PARAMS)

    for make, name in [(make_states, "memory.opt_state"), (make_training, "opt_state")]:
        vg.save(path, make(1.0))
        vg.load(path, make(1.0))
        with pytest.raises(
            ValueError, match=f"units of 2 .S at `{name}|units of 2 ms at `{name}"
        ):
            vg.load(path, make(2.0))
