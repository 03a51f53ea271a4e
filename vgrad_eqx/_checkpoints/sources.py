"""The contents of a file, written by this library or another program."""

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from io import BufferedReader
from typing import Any

import jax.numpy as jnp
import numpy as np

from .archive import check_sizes, Digest, parse_dict, read_header, read_tensors, Tensor
from .leaves import Entry


# The version that is written. All earlier versions can be read.
VERSION = 2


def escape(name: str) -> str:
    """The name of an array in a file, quoted if JSON or the format would not accept it."""
    is_plain = name != "__metadata__" and not name.startswith('"')
    return name if is_plain and not re.search("[\ud800-\udfff]", name) else json.dumps(name)


class Source:
    """The arrays of a file by name: their descriptions, and their values.

    The values in files of this library are checked against their digest.
    """

    def __init__(self, path: str, file: BufferedReader):
        self.path = path
        self._file = file
        self.entries: dict[str, Entry] = {}
        try:
            self._metadata, self._tensors = read_header(file)
            self._version = self._find_version()
            self.is_foreign = self._version is None
            self.has_scales = self._version == VERSION
            if self._version is None:
                self.entries = {
                    name: Entry("array", tensor.dtype, tensor.shape, None)
                    for name, tensor in self._tensors.items()
                }
            elif self._version <= VERSION:
                self._parse_entries()
        except ValueError as error:
            raise make_error(
                self.path, "It is cut off or damaged, or of another format"
            ) from error
        if (self._version or 0) > VERSION:
            raise make_error(
                self.path,
                f"It is of version {self._version} of the format, and this `vgrad_eqx` reads "
                f"versions up to {VERSION}. Install a newer one",
            )

    def _find_version(self) -> int | None:
        name, _, version = self._metadata.get("format", "").partition(" ")
        if name != "vgrad_eqx":
            return None
        if not re.fullmatch("[1-9][0-9]{0,8}", version):
            raise ValueError("The version must be a number.")
        return int(version)

    def _parse_entries(self) -> None:
        tensors = {}
        for name, value in parse_dict(self._metadata.get("entries", "")).items():
            entry = _parse_entry(value)
            tensor = self._tensors.pop(name if self._version == 1 else escape(name), None)
            if tensor is None or tensor[:2] != Tensor.of(entry.dtype, entry.shape)[:2]:
                raise ValueError("An entry must be as its tensor.")
            self.entries[name], tensors[name] = entry, tensor
        if self._tensors:
            raise ValueError("A tensor must have an entry.")
        self._tensors = tensors

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the wanted arrays, and raises an error at the end if the file is damaged."""
        digest = {None: _NoDigest, 1: _DigestOf1}.get(self._version, Digest)
        digest = digest(self._metadata.get("entries", ""))
        # Version 1 has a digest in the order of the names.
        key = None if self._version == 1 else lambda name: (self._tensors[name][2:], name)
        names = sorted(wanted if self.is_foreign else self._tensors, key=key)
        tensors = {name: self._tensors[name] for name in names}
        for name, buffer in read_tensors(self._file, tensors, digest):
            if buffer is None:
                raise make_error(self.path, "It was cut off while it was read")
            if name in wanted:
                entry = self.entries[name]
                yield name, buffer.view(jnp.dtype(entry.dtype)).reshape(entry.shape)
        if not self.is_foreign and digest.finish() != self._metadata.get("digest"):
            raise make_error(self.path, "It is damaged: its contents do not have its digest")


def make_error(path: str, reason: str) -> ValueError:
    return ValueError(
        "`load(path=...)` must be a checkpoint written by `vg.save`, or with `rename` a "
        f"safetensors file. Got {path!r}. "
        f"{reason}."
    )


def _parse_entry(value: object) -> Entry:
    match value:
        case [str(), str(), [*_], None | [str(), str(), str()]]:
            pass
        case _:
            raise ValueError("An entry must have a kind, a dtype, a shape and a unit.")
    kind, dtype, shape, unit = list[Any](value)
    check_sizes(shape)
    try:
        is_known = jnp.dtype(dtype).name == dtype and not jnp.dtype(dtype).hasobject
    except TypeError:
        is_known = False
    if not is_known:
        raise ValueError("An entry must have a dtype of numbers.")
    return Entry(kind, dtype, tuple(shape), unit)


class _DigestOf1(Digest):
    """The digest of version 1: a single SHA-256 of everything."""

    def begin(self, name: str) -> None:
        self.update(name.encode())

    def hash(self, chunk: memoryview) -> Any:
        return chunk


class _NoDigest(Digest):
    """For files of other programs, which have no digest."""

    def hash(self, chunk: memoryview) -> Any:
        return b""


class Shards:
    """The arrays of several files with an index, as if they were in one file."""

    is_foreign = True
    has_scales = False

    def __init__(self, path: str, sources: Mapping[str, Source], files: Mapping[str, str]):
        self.path = path
        self._sources = sources
        self._files = files
        self.entries = {name: sources[file].entries[name] for name, file in files.items()}

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        for file, source in self._sources.items():
            yield from source.read([name for name in wanted if self._files[name] == file])


@contextlib.contextmanager
def open_source(path: str) -> Iterator[Source | Shards]:
    """Opens a file, or all files in an index, whose name ends with `.json`."""
    with contextlib.ExitStack() as stack:
        if not path.endswith(".json"):
            yield Source(path, stack.enter_context(open(path, "rb")))
            return
        files = _read_index(path)
        sources = {}
        for file in dict.fromkeys(files.values()):
            shard = os.path.join(os.path.dirname(path), file)
            sources[file] = Source(shard, stack.enter_context(open(shard, "rb")))
        for name, file in files.items():
            if name not in sources[file].entries:
                raise make_error(path, f"It is an index, by which {file!r} must have `{name}`")
        yield Shards(path, sources, files)


def _read_index(path: str) -> dict[str, str]:
    """The name of the file of each array."""
    try:
        with open(path, encoding="utf-8") as file:
            index = parse_dict(file.read())
    except ValueError as error:
        raise make_error(path, "It ends with `.json`, but is not an index of files") from error
    match index:
        case {"weight_map": dict(files)} if all(map(_is_file_name, files.values())):
            return files
    raise make_error(
        path,
        "It ends with `.json`, and has no `weight_map` from each array to a file beside it",
    )


def _is_file_name(name: object) -> bool:
    return (
        isinstance(name, str) and name not in ("", ".", "..") and os.path.basename(name) == name
    )
