"""Named arrays in a file of the safetensors format, with what that format does not hold."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors


class Entry(NamedTuple):
    """What is known of an array beside its numbers."""

    kind: str  # an array, a key of some kind, or a Python number
    dtype: str
    shape: tuple[int, ...]
    unit: list[str] | None

    def fits(self, other: "Entry") -> bool:
        # Of a unit, its size and its dimension count, and not how it is written.
        ours, theirs = (self.unit or [])[1:], (other.unit or [])[1:]
        return self[:3] == other[:3] and ours == theirs

    def __str__(self) -> str:
        if self.kind.startswith("Python"):
            return f"a {self.kind}"
        text = f"{self.dtype}[{','.join(map(str, self.shape))}]"
        if self.kind != "array":
            text = f"a {self.kind}, {text}"
        return text if self.unit is None else f"{text} in {self.unit[0]}"


_FORMAT = "vgrad_eqx 1"

# The others are written as bytes.
_KNOWN_TO_SAFETENSORS = {
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"),
}


def write_archive(path: Path, entries: Mapping[str, Entry], arrays: Mapping[str, Any]) -> None:
    """Writes a file beside `path`, and puts it in the place of `path` when it is whole."""
    numbers = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    text = json.dumps(entries)
    metadata = {"format": _FORMAT, "entries": text, "digest": _digest(text, numbers)}
    tensors = {
        name: array if array.dtype.name in _KNOWN_TO_SAFETENSORS else _view_bytes(array)
        for name, array in numbers.items()
    }
    # They point to the memory of the arrays, which outlive them.
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in tensors.items()
    }
    part = path.with_name(f".{path.name}.part")
    # Not `serialize_file`, which leaves a file of another name behind each time it is killed.
    part.write_bytes(safetensors.serialize(specs, metadata))
    _flush(part)
    os.replace(part, path)
    _flush(path.parent)


def read_archive(path: Path) -> dict[str, tuple[Entry, np.ndarray]]:
    """Reads a file, and refuses one that is not as it was written."""
    data = path.read_bytes()
    try:
        tensors = {name: tensor["data"] for name, tensor in safetensors.deserialize(data)}
    except safetensors.SafetensorError as error:
        raise _make_error(path, "It is cut off or damaged, or of another format") from error
    start = 8  # after the length of the header
    header = json.loads(data[start : start + int.from_bytes(data[:start], "little")])
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise _make_error(path, "It is of another program")
    text = metadata.get("entries", "{}")
    if metadata.get("digest") != _digest(text, tensors):
        raise _make_error(path, "It is damaged: its contents do not have its digest")
    entries = {
        name: Entry(kind, dtype, tuple(shape), unit)
        for name, (kind, dtype, shape, unit) in json.loads(text).items()
    }
    return {
        name: (
            entry,
            np.frombuffer(tensors[name], jnp.dtype(entry.dtype)).reshape(entry.shape),
        )
        for name, entry in entries.items()
    }


def _make_error(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`load(path=...)` must be a checkpoint that `vg.save` has written. Got {str(path)!r}. "
        f"{reason}."
    )


def _digest(text: str, arrays: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        array = arrays[name]
        digest.update(_view_bytes(array).data if isinstance(array, np.ndarray) else array)
    return digest.hexdigest()


def _view_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
