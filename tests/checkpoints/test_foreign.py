"""The safetensors files of other programs are read by name."""

import json

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import safetensors.numpy
import vgrad_eqx as vg


class Net(eqx.Module):
    layers: list[eqx.nn.Linear]
    dropout: eqx.nn.Dropout
    key: jax.Array

    def __init__(self, seed=0):
        keys = jr.split(jr.key(seed), 2)
        self.layers = [eqx.nn.Linear(3, 4, key=keys[0]), eqx.nn.Linear(4, 2, key=keys[1])]
        self.dropout = eqx.nn.Dropout(0.25)
        self.key = keys[0]


RENAME = {
    f"layers.{i}.{name}": f"fc{i + 1}.{name}" for i in range(2) for name in ("weight", "bias")
}
SHAPES = {"fc1.weight": (4, 3), "fc1.bias": (4,), "fc2.weight": (2, 4), "fc2.bias": (2,)}


def make_tensors(dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


@pytest.fixture(autouse=True)
def without_x64():
    """The files hold float32, as those of torch do."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(make_tensors(), path, {"format": "pt"})
    return path


def check(model, tensors):
    for name, file_name in RENAME.items():
        leaf = vg.states(model)[name]
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, tensors[file_name])


@pytest.mark.parametrize(
    "rename", [RENAME, RENAME.get, RENAME.__getitem__], ids=["dict", "get", "item"]
)
def test_a_file_of_another_program_is_read_by_name(path, rename):
    model = vg.load(path, Net(), rename=rename)
    check(model, make_tensors())
    assert model.dropout == Net().dropout
    assert jnp.array_equal(jr.key_data(model.key), jr.key_data(Net().key))


def test_shapes_and_other_trees_may_be_filled(path):
    check(vg.load(path, eqx.filter_eval_shape(Net), rename=RENAME), make_tensors())
    like = {"fc1.weight": np.zeros((4, 3), "float32"), "b": vg.State(jnp.zeros(4))}
    with pytest.warns(UserWarning, match="nothing at `fc2.weight`, and float32"):
        loaded = vg.load(path, like, rename={"b": "fc1.bias"}, strict=False)
    np.testing.assert_array_equal(loaded["fc1.weight"], make_tensors()["fc1.weight"])
    np.testing.assert_array_equal(loaded["b"].value, make_tensors()["fc1.bias"])


def test_a_training_may_begin_with_them(path):
    step = vg.train_step(lambda model, x: model.layers[0](x), optax.adam(1e-2))
    state = step.init(Net())
    rename = {f"model.{name}": file_name for name, file_name in RENAME.items()}
    with pytest.warns(UserWarning, match="at `opt_state.0.count`, and nothing in the file"):
        loaded = vg.load(path, state, rename=rename, strict=False)
    check(loaded.model, make_tensors())


def test_one_array_may_be_at_two_paths(path):
    like = {"a": np.zeros(2, "float32"), "b": np.zeros(2, "float32"), "c": jnp.zeros(2)}
    with pytest.warns(UserWarning, match="left out what does not fit"):
        loaded = vg.load(path, like, rename=lambda name: "fc2.bias", strict=False)
    expected = make_tensors()["fc2.bias"]
    loaded["a"][:] = 0
    np.testing.assert_array_equal(loaded["b"], expected)
    np.testing.assert_array_equal(loaded["c"], expected)


def test_a_quantity_takes_its_number(tmp_path):
    safetensors.numpy.save_file({"t": np.ones(2, "float32")}, tmp_path / "c")
    loaded = vg.load(tmp_path / "c", {"tau": jnp.zeros(2) * u.ms}, rename={"tau": "t"})
    assert u.get_unit(loaded["tau"]) == u.ms
    assert u.get_mantissa(loaded["tau"]).tolist() == [1.0, 1.0]


def test_a_checkpoint_may_be_renamed_too(tmp_path):
    vg.save(tmp_path / "c", {"old": jr.key(3), "n": 3, "t": jnp.ones(2) * u.ms})
    like = {"new": jr.key(0), "n": 0, "t": jnp.zeros(2) * u.ms}
    loaded = vg.load(tmp_path / "c", like, rename={"new": "old"})
    assert jr.key_data(loaded["new"]).tolist() == jr.key_data(jr.key(3)).tolist()
    assert loaded["n"] == 3
    with pytest.raises(ValueError, match=r"in s at `t`, and float\d\d\[2\] in ms in the file"):
        vg.load(tmp_path / "c", like | {"t": jnp.zeros(2) * u.second}, rename={"new": "old"})


def test_the_error_shows_the_call(path):
    with pytest.raises(ValueError, match="must be a checkpoint written by `vg.save`") as caught:
        vg.load(path, Net())
    assert "another program, with `fc1.bias`, `fc1.weight`, `fc2.bias`" in str(caught.value)
    call = "vg.load(path, like, rename={'layers.0.weight': 'fc1.weight'})"
    assert f"`{call}`" in str(caught.value)
    with pytest.warns(UserWarning, match="left out what does not fit"):
        eval(call.replace("})", "}, strict=False)"), {"vg": vg, "path": path, "like": Net()})


def test_names_that_are_not_there_are_listed_with_their_nearest(path):
    rename = RENAME | {"layers.0.weight": "fc1.weigth"}
    with pytest.raises(ValueError, match="must be like the checkpoint. There is ") as caught:
        vg.load(path, Net(), rename=rename)
    missing = "float32[4,3] at `layers.0.weight`, and nothing in the file at `fc1.weigth` "
    assert f"{missing}(nearest: `fc1.weight`)" in str(caught.value)
    assert "nothing at `fc1.weight`, and float32[4,3] in the file" in str(caught.value)


def test_shapes_are_checked(path):
    rename = RENAME | {"layers.0.weight": "fc2.weight", "layers.1.weight": "fc1.weight"}
    match = r"float32\[4,3\] at `layers.0.weight`, and float32\[2,4\] at `fc2.weight` in the f"
    with pytest.raises(ValueError, match=match):
        vg.load(path, Net(), rename=rename)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_dtypes_are_converted_when_asked(path, dtype):
    safetensors.numpy.save_file(make_tensors(dtype), path)
    with pytest.raises(ValueError, match=f"{dtype}.*Pass `cast=True` to convert dtypes."):
        vg.load(path, Net(), rename=RENAME)
    check(
        vg.load(path, Net(), rename=RENAME, cast=True),
        {name: array.astype("float32") for name, array in make_tensors(dtype).items()},
    )


CASTS = {
    "overflow": ("float64", "float32", 1e300),
    "half": ("float32", "float16", 1e5),
    "int": ("int64", "int32", 2**40),
    "sign": ("int32", "uint8", -1),
    "unsigned": ("uint64", "int32", 2**63),
    "float8": ("float32", "float8_e4m3fn", 1e9),
    "int4": ("int32", "int4", 8),
}


@pytest.mark.parametrize(("file", "dtype", "value"), CASTS.values(), ids=CASTS)
def test_numbers_that_are_too_large_are_not_converted(tmp_path, file, dtype, value):
    safetensors.numpy.save_file({"a": np.array([1, value], file)}, tmp_path / "c")
    like = {"a": np.zeros(2, jnp.dtype(dtype))}
    with pytest.raises(ValueError, match="The array of `a` has values that are too large fo"):
        vg.load(tmp_path / "c", like, rename={}, cast=True)
    safetensors.numpy.save_file({"a": np.array([1, 0], file)}, tmp_path / "c")
    loaded = vg.load(tmp_path / "c", like, rename={}, cast=True)["a"]
    assert loaded.dtype == dtype
    assert loaded.astype("float32").tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("file", "dtype"), [("float32", "int32"), ("complex64", "float32")])
def test_no_kind_is_converted_to_a_narrower_one(tmp_path, file, dtype):
    safetensors.numpy.save_file({"a": np.ones(2, file)}, tmp_path / "c")
    with pytest.raises(
        ValueError, match=f"{dtype}.2. at `a`, and {file}.2. in the file"
    ) as info:
        vg.load(tmp_path / "c", {"a": np.zeros(2, dtype)}, rename={}, cast=True)
    assert "cast" not in str(info.value)


def test_what_rename_must_be(path):
    with pytest.raises(
        TypeError, match=r"`load\(rename=...\)` must be a dict from paths in `li"
    ):
        vg.load(path, Net(), rename="fc1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        TypeError, match="must give the name of an array in the file. Got None fo"
    ):
        vg.load(path, Net(), rename=lambda name: None)  # pyright: ignore[reportArgumentType]
    match = "must have paths of arrays in `like`. Got 'layers.0.weigth'. Its nearest paths are"
    with pytest.raises(ValueError, match=f"{match} `layers.0.weight`"):
        vg.load(path, Net(), rename={"layers.0.weigth": "fc1.weight"})


@pytest.fixture
def index(path):
    """The same tensors in two files."""
    tensors, files = make_tensors(), {}
    for i, name in enumerate(tensors):
        files[name] = f"model-{i // 2}.safetensors"
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        safetensors.numpy.save_file(part, path.parent / file)
    path.unlink()
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


def test_several_files_are_read_by_their_index(index):
    check(vg.load(index, Net(), rename=RENAME), make_tensors())
    with pytest.raises(ValueError, match=r"vg.load\(path, like, rename={'layers.0.weight': '"):
        vg.load(index, Net())


INDEXES = {
    "text": ("{", "is not an index of files"),
    "list": ("[]", "is not an index of files"),
    "no names": ('{"weight_map": {"a": 3}}', "has no `weight_map`"),
    "elsewhere": ('{"weight_map": {"a": "../x"}}', "has no `weight_map`"),
    "absolute": ('{"weight_map": {"a": "/etc/passwd"}}', "has no `weight_map`"),
    "nothing": ('{"weight_map": {"a": "model-0.safetensors"}}', "must have `a`"),
}


@pytest.mark.parametrize(("text", "match"), INDEXES.values(), ids=INDEXES)
def test_an_index_that_is_none(index, text, match):
    index.write_text(text)
    with pytest.raises(ValueError, match=f"must be a checkpoint.*{match}"):
        vg.load(index, Net(), rename=RENAME)


def test_every_file_of_an_index_must_be_there(index):
    (index.parent / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-1.safetensors"):
        vg.load(index, Net(), rename=RENAME)


def test_dtypes_that_numpy_has_not_are_named(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (tmp_path / "c").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(ValueError, match=r"float32\[4\] at `a`, and F4\[4\] in the file"):
        vg.load(tmp_path / "c", {"a": jnp.zeros(4)}, rename={}, cast=True)


def test_bfloat16_and_float8_are_read(tmp_path):
    tensors = {"a": jnp.ones(3, "bfloat16"), "b": jnp.ones(3, "float8_e4m3fn")}
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=np.asarray(array).ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in tensors.items()
    }
    safetensors.serialize_file(specs, tmp_path / "c")
    like = {name: jnp.zeros_like(array) for name, array in tensors.items()}
    assert eqx.tree_equal(vg.load(tmp_path / "c", like, rename={}), tensors, typematch=True)


def test_other_programs_read_what_is_saved(tmp_path):
    tree = {
        "a": jnp.arange(3.0),
        "b": jnp.ones((2, 0), "bfloat16"),
        "n": 3,
        "é": np.ones(2, ">f4"),
    }
    vg.save(tmp_path / "c", tree)
    loaded = safetensors.numpy.load_file(tmp_path / "c")
    assert loaded["a"].tolist() == [0.0, 1.0, 2.0]
    assert loaded["b"].shape == (2, 0)
    assert loaded["n"] == 3
    assert loaded["é"].tolist() == [1.0, 1.0]


def test_errors_name_the_next_thing_to_do(tmp_path):
    path, linear = tmp_path / "file", eqx.nn.Linear(2, 2, key=jr.key(0))
    with pytest.raises(TypeError, match="must be a pytree.* Got the class `Linear`"):
        vg.load(path, eqx.nn.Linear)
    model = eqx.nn.Sequential([linear, eqx.nn.Dropout(0.1)])
    vg.save(path, vg.states(model))
    with pytest.raises(ValueError, match=r"vg.load\(path, vg.states\(model\)\)"):
        vg.load(path, model)
    assert vg.load(path, vg.states(model)).keys() == vg.states(model).keys()
    safetensors.numpy.save_file({"weight": np.ones((2, 2), "float32")}, path)
    shapes = eqx.filter_eval_shape(lambda: linear)
    with pytest.warns(UserWarning, match="shapes without values at `bias`"):
        vg.load(path, shapes, rename={}, strict=False)
    with pytest.raises(ValueError, match="shapes instead of arrays"):
        vg.states(shapes)
