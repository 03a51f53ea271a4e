"""Whatever can be saved comes back bit for bit and of its own type, and the rest is refused."""

import collections
import dataclasses
import enum
import functools as ft
import sys
import types
from typing import Any

import brainunit as u
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from vgrad_eqx._tree.state import write


class Phase(enum.IntEnum):
    FIRST = 1
    LAST = 2


def is_same(x, y):
    """Whether two leaves have the same type, dtype and bits."""
    if isinstance(x, vg.State):
        return is_same(x.value, y.value)
    if isinstance(x, u.Quantity):
        return x.unit == y.unit and is_same(x.mantissa, y.mantissa)
    if type(x) is not type(y):
        return False
    if not isinstance(x, np.ndarray | np.generic | jax.Array):
        return x == y
    types = [(z.dtype, z.shape, getattr(z, "weak_type", None)) for z in (x, y)]
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x, y = [jr.key_data(z) for z in (x, y)]  # pyright: ignore[reportArgumentType]
    return types[0] == types[1] and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def make_blank(leaf):
    """What a new process has in the place of a leaf."""
    if isinstance(leaf, vg.State):
        return vg.State(make_blank(leaf.value))
    if isinstance(leaf, u.Quantity):
        return u.Quantity(make_blank(leaf.mantissa), unit=leaf.unit)
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jnp.zeros_like(jr.key_data(leaf))
            return jr.wrap_key_data(data, impl=jr.key_impl(leaf))
        return jnp.full(leaf.shape, 0) if leaf.weak_type else jnp.zeros_like(leaf)
    if isinstance(leaf, np.generic):
        return np.zeros((), leaf.dtype)[()]
    if isinstance(leaf, np.ndarray):
        return np.zeros(leaf.shape, leaf.dtype)
    return Phase.FIRST if isinstance(leaf, Phase) else type(leaf)(0)


def has_arrays(dtype):
    """Whether JAX has arrays of a dtype that it names, of which 0.10 lacks some."""
    try:
        return jax.device_put(np.zeros(1, dtype)).dtype.name == dtype
    except jax.errors.JaxRuntimeError:
        return False


JAX_DTYPES = [
    name
    for name in dir(jnp)
    if isinstance(getattr(jnp, name), type(jnp.float32))
    and name == jnp.dtype(getattr(jnp, name)).name
    and jax.dtypes.canonicalize_dtype(name).name == name
    and name not in ("int1", "uint1")  # `jnp.full` gives bools once it has made some
    and has_arrays(name)
]
NUMPY_DTYPES = ["?", "i1", "u2", "<i4", ">i4", ">u8", "<f2", ">f4", "<f8", ">f8", ">c8", "c16"]
NUMPY_DTYPES += [
    "<M8[ns]",
    ">M8[D]",
    "m8[25s]",
    "bfloat16",
    "float8_e5m2",
    "int4",
]
SHAPES = [(), (1,), (3,), (0,), (2, 0), (2, 3), (2, 1, 3)]


def make_bits(shape, seed):
    return np.random.default_rng(seed).integers(0, 2, shape)


def make_numpy(dtype, shape, seed):
    """Any bytes, NaNs among them, where each is a number."""
    dtype = jnp.dtype(dtype)
    if dtype.name in ("bool", "int4"):
        return np.asarray(make_bits(shape, seed)).astype(dtype)
    data = np.random.default_rng(seed).bytes(int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).copy()


arrays = st.builds(
    make_numpy, st.sampled_from(NUMPY_DTYPES), st.sampled_from(SHAPES), st.integers(0, 99)
)
leaves = st.one_of(
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.booleans(),
    st.sampled_from(Phase),
    arrays,
    arrays.map(lambda array: array.T),
    arrays.map(lambda array: array.reshape(-1)[::2]),
    arrays.filter(lambda array: array.size).map(lambda array: array.reshape(-1)[0]),
    st.builds(
        lambda dtype, shape, seed: jax.device_put(make_bits(shape, seed).astype(dtype)),
        st.sampled_from(JAX_DTYPES),
        st.sampled_from(SHAPES),
        st.integers(0, 99),
    ),
    st.integers(-9, 9).map(jnp.asarray),
    st.builds(
        lambda seed, impl, shape: jr.split(jr.key(seed, impl=impl), shape),
        st.integers(0, 99),
        st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"]),
        st.sampled_from(SHAPES[1:]),
    ),
    st.integers(0, 99).map(lambda seed: vg.State(jr.key(seed))),
    st.floats(width=32, allow_nan=False).map(lambda x: jnp.full(3, x, "float32") * u.ms),
    st.floats(width=32, allow_nan=False).map(lambda x: vg.State(jnp.full(2, x) * u.mvolt)),
)
# With halves of surrogate pairs, and what the format or the quoting could take for its own.
names = st.text(st.characters(codec=None), max_size=5) | st.sampled_from(
    ["__metadata__", '"__metadata__"', '"a"', "\ud800", '"\\ud800"', "", ".", "a.", "\0", "é"]
)


@hypothesis.given(st.dictionaries(names, leaves, min_size=1, max_size=6))
@hypothesis.settings(max_examples=100)
def test_every_leaf_comes_back_bit_for_bit(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "checkpoint"
    vg.save(path, tree)
    loaded = vg.load(path, {name: make_blank(leaf) for name, leaf in tree.items()})
    assert loaded.keys() == tree.keys()
    for name, leaf in tree.items():
        assert is_same(leaf, loaded[name]), (name, leaf, loaded[name])


@pytest.mark.parametrize("shape", [(), (3,), (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", JAX_DTYPES)
def test_every_dtype_of_jax_comes_back(path, dtype, shape):
    # Not by `jnp.ones`, because XLA compiles nothing for some of them.
    ones, zeros = (jax.device_put(make(shape, dtype)) for make in (np.ones, np.zeros))
    vg.save(path, {"a": ones, "b": ones})
    loaded = vg.load(path, {"a": zeros, "b": jax.ShapeDtypeStruct(shape, dtype)})
    assert is_same(loaded["a"], ones)
    assert is_same(loaded["b"], ones)


def test_arrays_are_on_the_devices_of_those_before(path):
    device = jax.devices()[0]
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = {
        "anywhere": jnp.zeros(2),
        "committed": jax.device_put(jnp.zeros(2), device),
        "sharded": jax.device_put(jnp.zeros(2), sharding),
    }
    vg.save(path, dict.fromkeys(like, jnp.ones(2)))
    loaded = vg.load(path, like)
    assert [loaded[name].committed for name in like] == [False, True, True]
    assert loaded["sharded"].sharding == sharding


def test_long_doubles_come_back(path):
    array = np.array([1, 2], "longdouble") / 3
    vg.save(path, {"a": array, "b": array[0]})
    loaded = vg.load(path, {"a": np.zeros(2, "longdouble"), "b": np.longdouble(0)})
    np.testing.assert_array_equal(loaded["a"], array, strict=True)
    assert loaded["b"] == array[0]


def test_loaded_numpy_arrays_can_be_written_to(path):
    vg.save(path, {"a": np.ones(3), "b": np.ones(3)})
    loaded = vg.load(path, {"a": np.zeros(3), "b": np.zeros(3)})
    loaded["a"][:] = 2.0
    assert loaded["b"].tolist() == [1.0, 1.0, 1.0]


def test_a_mapped_array_comes_back_as_an_array(path, tmp_path):
    mapped = np.memmap(tmp_path / "mapped", "float32", "w+", shape=(3,))
    mapped[:] = [1, 2, 3]
    vg.save(path, {"a": mapped})
    assert vg.load(path, {"a": mapped})["a"].tolist() == [1.0, 2.0, 3.0]


def test_a_random_generator_goes_on(path):
    def draw(state):
        rng = np.random.default_rng()
        rng.bit_generator.state = state
        return rng.normal()

    state = np.random.default_rng(0).bit_generator.state
    vg.save(path, {"rng": state})
    loaded = vg.load(path, {"rng": np.random.default_rng(1).bit_generator.state})
    assert draw(loaded["rng"]) == draw(state)


def test_shapes_of_a_module_are_enough(path):
    class Net(eqx.Module):
        linear: eqx.nn.Linear
        key: jax.Array
        rate: float

    def make():
        return Net(eqx.nn.Linear(2, 3, key=jr.key(1)), jr.split(jr.key(2, impl="rbg"), 4), 0.5)

    vg.save(path, make())
    loaded = vg.load(path, eqx.filter_eval_shape(make))
    assert eqx.tree_equal(loaded, make(), typematch=True)


class Plain:
    def __init__(self, value):
        self.value = value


class Called(Plain):
    def __call__(self):
        return self.value


@dataclasses.dataclass
class Statistics:
    mean: Any


class Slotted:
    __slots__ = ("mean",)

    def __init__(self, mean):
        self.mean = mean


class Params(dict):
    pass


class Tagged(np.ndarray):
    pass


X = jnp.ones(2)
OBJECTS = {
    "plain": Plain(X),
    "dataclass": Statistics(np.ones(2)),
    "slots": Slotted(X),
    "callable": Called(X),
    "nested": Plain([{"a": Plain((X,))}]),
    "unit": Plain(X * u.ms),
    "state": Plain(vg.State(X)),
    "key": Plain(jr.key(0)),
    "dict": Params(a=X),
    "deque": collections.deque([X]),
    "proxy": types.MappingProxyType({"a": X}),
    "namespace": types.SimpleNamespace(a=X),
    "partial": ft.partial(jnp.add, X),
}


@pytest.mark.parametrize("leaf", OBJECTS.values(), ids=OBJECTS)
def test_an_object_that_holds_arrays_is_refused(path, leaf):
    match = "at `stats.0`, a `.*`, which holds arrays but is not a pytree. Register its class"
    with pytest.raises(TypeError, match=r"`save\(tree=...\)`.*" + match):
        vg.save(path, {"w": X, "stats": [leaf]})
    assert not path.exists()
    vg.save(path, {"w": X})
    with pytest.raises(TypeError, match=r"`load\(like=...\)`.*" + match):
        vg.load(path, {"w": X, "stats": [leaf]})


ARRAYS = {
    "strings": (
        np.array(["cat", "dog"]),
        "an array of <U3, which are not numbers. Keep it as a",
    ),
    "bytes": (np.array([b"cat"]), "an array of .S3, which are not numbers"),
    "objects": (np.array([1, "a"], object), "an array of object, which are not numbers"),
    "structured": (np.zeros(2, "i4,f4"), "a structured array. Put its fields into a dict"),
    "void": (np.zeros(2, "i4,f4")[0], "a structured array"),
    "masked": (np.ma.masked_array([1.0], [True]), "a masked array. Put its `data` and its"),
    "subclass": (np.zeros(2).view(Tagged), "a `Tagged`. Make it a plain array by `numpy.as"),
}


@pytest.mark.parametrize(("leaf", "match"), ARRAYS.values(), ids=ARRAYS)
def test_an_array_that_is_no_plain_one_is_refused(path, leaf, match):
    with pytest.raises(TypeError, match=f"Got, at `classes`, {match}"):
        vg.save(path, {"w": X, "classes": leaf})
    assert not path.exists()


def test_shapes_are_not_saved(path):
    with pytest.raises(TypeError, match=r"a shape without values, ShapeDtypeStruct.*at `w`"):
        vg.save(path, {"w": jax.ShapeDtypeStruct((2,), "float32")})


def test_traced_arrays_are_not_saved(path):
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(lambda x: vg.save(path, {"w": x}))(X)
    assert list(path.parent.iterdir()) == []


NO_ARRAYS = {
    "string": "text",
    "bytes": b"text",
    "numpy string": np.str_("text"),
    "function": jax.nn.relu,
    "compiled": jax.jit(lambda x: x + X),
    "closure": lambda: X,
    "module": eqx.nn.Lambda(jax.nn.gelu),
    "method": Plain(X).__init__,
    "class": Plain,
    "dtype": jnp.float32,
    "numpy dtype": np.dtype("float32"),
    "unit": u.ms,
    "object": Plain(["text", u.ms]),
    "sharding": jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    "mesh": jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec("x")
    ),
    "optax": optax.adam(1e-3),
    "modules": sys,
    "partial": ft.partial(jnp.sum, axis=0),
    "none": None,
}


@pytest.mark.parametrize("leaf", NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array_is_left_out(path, leaf):
    vg.save(path, {"w": X, "other": leaf})
    loaded = vg.load(path, {"w": jnp.zeros(2), "other": leaf})
    assert loaded["w"].tolist() == [1.0, 1.0]
    assert jtu.tree_leaves(loaded["other"]) == jtu.tree_leaves(leaf)


def test_too_many_leaves_are_refused(path, monkeypatch):
    monkeypatch.setattr("vgrad_eqx._checkpoints.archive._LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="must have fewer leaves or shorter names. Got 50, wi"):
        vg.save(path, dict.fromkeys(map(str, range(50)), 0))
    assert list(path.parent.iterdir()) == []


def test_each_array_is_moved_to_its_device_once(path, monkeypatch):
    counts, device_put = [], jax.device_put
    tree = {name: jnp.ones(100) for name in "abcd"}
    vg.save(path, tree)

    def count(arrays, *args):
        counts.append(len(arrays))
        return device_put(arrays, *args)

    monkeypatch.setattr("vgrad_eqx._checkpoints.checkpoint._BATCH", 2 * tree["a"].nbytes)
    monkeypatch.setattr(jax, "device_put", count)
    vg.load(path, tree)
    assert counts == [2, 2]


def test_a_part_comes_back_into_the_model(path):
    model, other = (eqx.nn.MLP(2, 2, 4, 1, key=jr.key(seed)) for seed in (0, 1))
    vg.save(path, vg.states(model, "layers.0"))
    loaded = vg.replace_states(other, vg.load(path, vg.states(other, "layers.0")))
    assert eqx.tree_equal(loaded.layers[0], model.layers[0])
    assert eqx.tree_equal(loaded.layers[1], other.layers[1])


def test_a_part_of_states_by_reference_is_set(path):
    class Net(eqx.Module):
        a: vg.State
        b: vg.State

    net, other = (Net(vg.State(i * X), vg.State(i * X)) for i in (1.0, 2.0))
    vg.save(path, vg.states(net, "a"))
    vg.load(path, vg.states(other, "a"))
    assert other.a.value.tolist() == [1.0, 1.0]
    assert other.b.value.tolist() == [2.0, 2.0]


def test_labels_of_groups_have_no_addresses(path):
    def has_ndim(leaf, ndim):
        return leaf.ndim == ndim

    def make():
        tests = [ft.partial(has_ndim, ndim=n) for n in (1, 2)]
        return vg.Optimizer(
            {vg.leaf(tests[0]): optax.adam(1.0), ~vg.leaf(tests[0]): optax.sgd(1.0)},
            {"w": jnp.ones((2, 2)), "b": X},
        )

    vg.save(path, make())
    assert "0x" not in "".join(make().opt_state)
    assert int(vg.load(path, make()).count) == 0


def test_numbers_beside_the_arrays_of_a_state_are_compared(path):
    make = lambda x, **numbers: vg.State({"x": x * X, "nan": float("nan"), **numbers})
    vg.save(path, [make(1.0, steps=3)])
    loaded = vg.load(path, [make(0.0, steps=3)])[0]
    assert jnp.array_equal(loaded.value["x"], X)
    like = [make(0.0, steps=4)]
    match = "There is 4 at `0.steps`, and 3 in the file.* fixed, so create the state with 3"
    with pytest.raises(ValueError, match=match):
        vg.load(path, like)
    assert jnp.array_equal(like[0].value["x"], 0 * X)


def test_states_are_set_all_or_none(path, monkeypatch):
    tree = {"a": vg.State(X), "b": vg.State(X)}
    vg.save(path, tree)
    like = {"a": vg.State(0 * X), "b": vg.State(0 * X)}

    def fail_at_b(ref, value, name):
        if "`b`" in name:
            raise KeyboardInterrupt
        return write(ref, value, name)

    monkeypatch.setattr("vgrad_eqx._checkpoints.checkpoint.write", fail_at_b)
    with pytest.raises(KeyboardInterrupt):
        vg.load(path, like)
    assert like["a"].value.tolist() == [0.0, 0.0]
