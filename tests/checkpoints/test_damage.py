"""A file that is no checkpoint, whatever is in it, gives one error."""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import brainunit as u
import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy
import vgrad_eqx as vg
from vgrad_eqx._checkpoints import sources

from .test_leaves import is_same


TREE = {"w": jnp.arange(9.0), "tau": 10.0 * u.ms, "n": 3, "large": 2**70, "k": jr.key(0)}
ERROR = "must be a checkpoint written by `vg.save`"


def test_every_flipped_bit_is_found(path):
    vg.save(path, TREE)
    data = path.read_bytes()
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=ERROR):
            vg.load(path, TREE)


def make_large_tree():
    """Arrays of several chunks and of less than one, of which threads read some ahead."""
    generator = np.random.default_rng(0)
    sizes = {"first": 3, "large": 3_000_000, "small": 50, "larger": 9_000_001, "last": 1}
    return {name: generator.integers(0, 256, size, "uint8") for name, size in sizes.items()}


def test_large_arrays_are_read_by_several_threads(path):
    tree: dict[str, Any] = make_large_tree()
    like: dict[str, Any] = {name: np.zeros_like(array) for name, array in tree.items()}
    tree["jax"] = jnp.arange(3_000_000)
    like["jax"] = jnp.zeros_like(tree["jax"])
    vg.save(path, tree)
    loaded = vg.load(path, like)
    assert all(is_same(leaf, loaded[name]) for name, leaf in tree.items())
    data = path.read_bytes()
    for position in np.linspace(len(data) // 50, len(data) - 1, 9, dtype=int):
        flipped = bytearray(data)
        flipped[position] ^= 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=ERROR):
            vg.load(path, like)


def test_a_file_that_is_cut_off_while_it_is_read_is_found(path, monkeypatch):
    tree = make_large_tree()
    vg.save(path, tree)
    read_header = sources.read_header

    def read_and_cut(file):
        header = read_header(file)
        os.truncate(path, path.stat().st_size - 5_000_000)
        return header

    monkeypatch.setattr(sources, "read_header", read_and_cut)
    with pytest.raises(ValueError, match="It was cut off while it was read"):
        vg.load(path, tree)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, -64])
def test_a_cut_off_file_is_found(path, size):
    vg.save(path, TREE)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="It is cut off or damaged, or of another format"):
        vg.load(path, TREE)


@pytest.mark.parametrize("tail", [b"\0", b"text" * 100])
def test_a_file_with_a_tail_is_found(path, tail):
    vg.save(path, TREE)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(ValueError, match="It is cut off or damaged, or of another format"):
        vg.load(path, TREE)


@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"PK\x03\x04", b"text" * 100])
@pytest.mark.parametrize("rename", [None, {}])
def test_a_file_of_another_format_is_refused(path, content, rename):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="of another format"):
        vg.load(path, TREE, rename=rename)


edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)


@hypothesis.given(edits)
@hypothesis.settings(max_examples=200)
def test_edited_files_give_the_one_error(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("edited") / "checkpoint"
    vg.save(path, TREE)
    original = data = path.read_bytes()
    for where, length, new in edits:
        i = int(where * len(data))
        data = data[:i] + new + data[i + length :]
    path.write_bytes(data)
    with (
        contextlib.nullcontext() if data == original else pytest.raises(ValueError, match=ERROR)
    ):
        vg.load(path, TREE)


def write(path, header, numbers=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def make_tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "list": [],
    "number": 3,
    "metadata": {"__metadata__": 3},
    "metadata of numbers": {"__metadata__": {"a": 3}},
    "tensor": {"a": 3},
    "no offsets": {"a": {"dtype": "F32", "shape": [1]}},
    "dtype": make_tensor(3),
    "negative": make_tensor(shape=[-1]),
    "fraction": make_tensor(shape=[1.0]),
    "bool": make_tensor(shape=[True]),
    "huge": make_tensor(shape=[2**70]),
    "long": make_tensor(shape=[2**62] * 1000),
    "more than 63 bits": make_tensor("F4", [2**63]),
    "many dimensions": make_tensor("F4", [1] * 67),
    "one dimension too many": make_tensor(shape=[1] * 65),
    "wrong size": make_tensor(shape=[2]),
    "reversed": make_tensor(offsets=[4, 0]),
    "beyond": make_tensor(offsets=[4, 8]),
    "gap": make_tensor("U8", [2], [2, 4]),
    "overlap": {**make_tensor(), "b": make_tensor()["a"]},
    "deep": b"[" * 200_000,
    "utf-16": json.dumps({}).encode("utf-16"),
    "long number": b'{"a": ' + b"1" * 10_000 + b"}",
    "surrogate": b'{"\xed\xa0\x80": 3}',
    "nan": b'{"a": NaN}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("rename", [None, {}])
def test_hostile_headers_give_the_one_error(path, header, rename):
    write(path, header, b"\0" * 4)
    with pytest.raises(ValueError, match=ERROR):
        vg.load(path, {"a": jnp.zeros(1)}, rename=rename)


def test_a_header_that_is_longer_than_the_file(path):
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=ERROR):
        vg.load(path, TREE)


def forge(path, entries, tensors=None, numbers=bytes(4), version="vgrad_eqx 2"):
    """Writes a file with a right digest."""
    text = entries if isinstance(entries, str) else json.dumps(entries)
    crc = zlib.crc32(numbers).to_bytes(4, "little") if numbers else b""
    digest = hashlib.sha256(text.encode() + crc).hexdigest()
    metadata = {"format": version, "entries": text, "digest": digest}
    write(path, {"__metadata__": metadata, **(tensors or make_tensor())}, numbers)


GOOD = ["array", "float32", [1], None]


def test_what_is_forged_is_read_otherwise(path):
    """The cases below fail for what is wrong in them alone."""
    forge(path, {"a": GOOD})
    assert vg.load(path, {"a": jnp.ones(1, "float32")})["a"].tolist() == [0.0]


ENTRIES = {
    "json": "{",
    "a number": "3",
    "list": ["a"],
    "pairs": [["a", GOOD]],
    "lists": [[[], GOOD]],
    "deep": "[" * 200_000,
    "number": {"a": 3},
    "short": {"a": GOOD[:3]},
    "kind": {"a": [3, *GOOD[1:]]},
    "dtype": {"a": ["array", "nonsense", [1], None]},
    "another dtype": {"a": ["array", "int32", [1], None]},
    "objects": {"a": ["array", "object", [1], None]},
    "fields": {"a": ["array", "i4,i4", [1], None]},
    "void": {"a": ["array", "void32", [1], None]},
    "shape": {"a": ["array", "float32", None, None]},
    "another shape": {"a": ["array", "float32", [2], None]},
    "many dimensions": {"a": ["array", "float32", [1] * 67, None]},
    "shape of a dict": {"a": ["array", "float32", {}, None]},
    "huge shape": {"a": ["array", "int4", [2**70], None]},
    "unit": {"a": ["array", "float32", [1], "ms"]},
    "units": {"a": ["array", "float32", [1], [1, 2, 3]]},
    "name": {"b": GOOD},
    "more": {"a": GOOD, "b": GOOD},
    "none": {},
}


@pytest.mark.parametrize("entries", ENTRIES.values(), ids=ENTRIES)
def test_hostile_entries_give_the_one_error(path, entries):
    forge(path, entries)
    with pytest.raises(ValueError, match=ERROR):
        vg.load(path, {"a": jnp.zeros(1)})


KINDS = {
    "int of floats": ["Python int", "float32", [1], None],
    "another key": ["key of nonsense", "float32", [1], None],
    "number": ["Python str", "float32", [1], None],
    "code": ["__import__('os')", "float32", [1], None],
}


@pytest.mark.parametrize("like", [0, 0.0, jnp.zeros(1), jr.key(0)], ids=str)
@pytest.mark.parametrize("entry", KINDS.values(), ids=KINDS)
def test_another_kind_is_a_difference(path, like, entry):
    forge(path, {"a": entry})
    with pytest.raises(ValueError, match="must be like the checkpoint"):
        vg.load(path, {"a": like})


@pytest.mark.parametrize("version", [3, 999])
def test_a_newer_version_is_named(path, version):
    forge(path, "of a future", version=f"vgrad_eqx {version}")
    match = (
        f"is of version {version} of the format, and this `vgrad_eqx` reads versions up to 2"
    )
    with pytest.raises(ValueError, match=match):
        vg.load(path, {"a": jnp.zeros(1)})


@pytest.mark.parametrize("version", ["0", "-1", "1.5", "", "x", "9" * 30])
def test_no_version_is_damage(path, version):
    forge(path, {"a": GOOD}, version=f"vgrad_eqx {version}")
    with pytest.raises(ValueError, match="It is cut off or damaged"):
        vg.load(path, {"a": jnp.zeros(1)})


def make_tree_of_version_1():
    return {
        "w": jnp.arange(6, dtype="float32").reshape(2, 3),
        "half": jnp.ones(3, "bfloat16"),
        "small": jnp.ones(3, "int4"),
        "key": jr.key(3),
        "tau": jnp.array(10.0, "float32") * u.ms,
        "n": 3,
        "rate": 0.1,
        "on": True,
        "number": 1 + 2j,
        "state": vg.State(jnp.ones(2, "float32")),
        '"quoted"': np.arange(3),
    }


VERSION_1 = Path(__file__).parent / "version_1.safetensors"


def test_checkpoints_of_version_1_are_read():
    tree = make_tree_of_version_1()
    like = tree | {"w": jnp.zeros((2, 3), "float32"), "n": 0, "key": jr.key(0)}
    like |= {"state": vg.State(jnp.zeros(2, "float32")), "rate": 0.0, "on": False}
    loaded = vg.load(VERSION_1, like)
    for name, leaf in tree.items():
        assert is_same(leaf, loaded[name]), name


def test_flipped_bits_of_version_1_are_found(path):
    tree = make_tree_of_version_1()
    shutil.copy(VERSION_1, path)
    data = path.read_bytes()
    for i in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[i] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=ERROR):
            vg.load(path, tree)


def test_damage_comes_before_differences(path):
    vg.save(path, TREE)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="It is damaged: its contents do not have its digest"):
        vg.load(path, {"other": 3})


def test_many_differences_are_counted(path):
    vg.save(path, {f"old.{i}": i for i in range(5000)} | {"a": jnp.zeros(1)})
    with pytest.raises(ValueError, match="must be like the checkpoint") as caught:
        vg.load(path, {f"new.{i}": i for i in range(5000)} | {"a": jnp.zeros(2)})
    assert "a Python int at `new.0`, and nothing in the file" in str(caught.value)
    assert "nothing at `old.0`, and a Python int in the file" in str(caught.value)
    assert str(caught.value).count("and 4997 more") == 2
    assert len(str(caught.value)) < 700


def test_a_safetensors_file_is_as_ours(path):
    """What writes safetensors files may order and pad them in its own way."""
    tensors = {"b": np.ones(3, "int8"), "a": np.ones(2), "c": np.ones((0, 2), "float16")}
    safetensors.numpy.save_file(tensors, path)
    like = {name: np.zeros_like(array) for name, array in tensors.items()}
    loaded = vg.load(path, like, rename={})
    assert all(is_same(loaded[name], array) for name, array in tensors.items())
