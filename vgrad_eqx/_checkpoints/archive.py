"""Named arrays in a file in the safetensors format, and a digest of them.

https://huggingface.co/docs/safetensors describes the format: the length of a header, the header
in JSON, and the numbers, without gaps.
"""

import collections
import contextlib
import functools as ft
import hashlib
import json
import math
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from .files import sync


# Those that NumPy can represent, with the dtypes of JAX.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
# Those that other programs have long supported. Arrays of other dtypes are written as bytes.
_CODES = {dtype: code for code, dtype in list(DTYPES.items())[:16]}

_LARGEST_HEADER = 100_000_000  # of the format
_MOST_DIMENSIONS = 64  # of NumPy
_ALIGNMENT = 64  # of JAX, which uses an aligned buffer without a copy

# The number of bytes to hash at once, to write before a sync to disk starts, and to read ahead.
_CHUNK, _SYNCED, _AHEAD = 1 << 22, 1 << 26, 1 << 25
# Threads that read and hash, or hash what the main thread writes, except for small chunks.
_NUM_THREADS = min(4, os.cpu_count() or 1)
_WORTH_A_THREAD = 1 << 20


class Tensor(NamedTuple):
    """The place of an array in a file. `dtype` is its code if NumPy cannot represent it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> "Tensor":
        """The form in which an array is written: as is, or as bytes."""
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        return cls(*((dtype, shape) if dtype in _CODES else ("uint8", (size,))), 0, size)


def write_archive(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    fetch: Callable[[str], np.ndarray],
    metadata: dict[str, str],
) -> None:
    """Writes arrays, which are fetched one by one, and then their digest."""
    # Largest item size first, so that each array is aligned.
    names = sorted(tensors, key=lambda name: (-jnp.dtype(tensors[name].dtype).itemsize, name))
    tensors, offset = {name: tensors[name] for name in names}, 0
    for name, (dtype, shape, _, size) in tensors.items():
        tensors[name] = Tensor(dtype, shape, offset, offset + size)
        offset += size
    digest, hashes = Digest(metadata["entries"]), collections.deque()
    file.write(_format_header(tensors, {**metadata, "digest": "0" * 64}))
    # A separate thread syncs to disk while the rest is fetched, hashed and written.
    syncs: list[Future[None]] = []
    synced = 0
    with ThreadPoolExecutor(_NUM_THREADS + 1) as pool:
        for name in tensors:
            for chunk in _split_chunks(_view_bytes(fetch(name))):
                hashes.append(_start(pool, digest.hash, chunk))
                file.write(chunk)
                while len(hashes) > 2 * _NUM_THREADS:
                    digest.update(hashes.popleft()())
                if file.tell() - synced >= _SYNCED and all(each.done() for each in syncs):
                    with contextlib.suppress(RuntimeError):  # at the end of the program
                        syncs.append(pool.submit(sync, file.fileno()))
                    synced = file.tell()
        for each in hashes:
            digest.update(each())
    for each in syncs:
        each.result()
    file.seek(0)
    file.write(_format_header(tensors, {**metadata, "digest": digest.finish()}))


def _format_header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, (dtype, shape, begin, end) in tensors.items():
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(
            f"`save(tree=...)` must have fewer leaves or shorter names. Got {len(tensors):,}, "
            f"with a header of {len(text):,} bytes, where safetensors files have at most "
            f"{_LARGEST_HEADER:,}. Stack arrays, or save parts."
        )
    return len(text).to_bytes(8, "little") + text


def read_header(file: BufferedReader) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors in a file. Raises a `ValueError` if it has none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if start > size or length > _LARGEST_HEADER:
        raise ValueError("The header is longer than the file.")
    header = parse_dict(file.read(length).decode())
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError("The metadata must be a dict of strings.")
    tensors = {name: _parse_tensor(value, start) for name, value in header.items()}
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor[2:]):
        if tensor.begin != start:
            raise ValueError("There must be no gap and no overlap.")
        start = tensor.end
    if start != size:
        raise ValueError("The file must end with the last tensor.")
    return metadata, tensors


def parse_dict(text: str) -> dict[str, Any]:
    """A dict in JSON, or a `ValueError`."""
    try:
        parsed = json.loads(text)
    except RecursionError as error:
        raise ValueError("It is nested too deeply.") from error
    match parsed:
        case dict():
            return parsed
    raise ValueError("It must be a dict.")


def _parse_tensor(value: object, start: int) -> Tensor:
    match value:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]}:
            check_sizes([*shape, begin, end])
        case _:
            raise ValueError("A tensor must have a dtype, a shape and offsets.")
    if begin > end:
        raise ValueError("A tensor must begin before it ends.")
    dtype = DTYPES.get(code, code)
    if code in DTYPES and end - begin != math.prod(shape) * jnp.dtype(dtype).itemsize:
        raise ValueError("A tensor must have the size of its shape.")
    return Tensor(dtype, tuple(shape), start + begin, start + end)


def check_sizes(sizes: Any) -> None:
    """Raises an error for anything but a shape, or for sizes that are slow to multiply."""
    is_shape = isinstance(sizes, list) and len(sizes) <= 2 + _MOST_DIMENSIONS
    if not (is_shape and all(type(n) is int and 0 <= n < 2**63 for n in sizes)):
        raise ValueError("A size must be an integer of 63 bits.")


def read_tensors(
    file: BufferedReader, tensors: Mapping[str, Tensor], digest: "Digest"
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields the bytes of each tensor, in this order, or `None` if the file ends too early.

    Threads read ahead, one at a time, and hash each chunk while it is in the CPU cache.
    """
    ahead: collections.deque[tuple[str, np.ndarray, list[Any]]] = collections.deque()
    size, reading = 0, threading.Lock()

    def read(chunk: memoryview, offset: int) -> Any:
        with reading:
            file.seek(offset)
            is_whole = file.readinto(chunk) == len(chunk)
        return digest.hash(chunk) if is_whole else None

    def finish() -> tuple[str, np.ndarray | None]:
        name, buffer, started = ahead.popleft()
        digest.begin(name)
        for each in started:
            if (chunk_hash := each()) is None:
                return name, None
            digest.update(chunk_hash)
        return name, buffer

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for name, (_, _, begin, end) in tensors.items():
            buffer = _make_buffer(end - begin)
            offsets = range(begin, end, _CHUNK)
            chunks = zip(_split_chunks(buffer), offsets, strict=True)
            started = [_start(pool, read, chunk, offset) for chunk, offset in chunks]
            ahead.append((name, buffer, started))
            size += len(buffer)
            while size > _AHEAD:
                size -= len(ahead[0][1])
                yield finish()
        while ahead:
            yield finish()


def _make_buffer(size: int) -> np.ndarray:
    """A buffer for bytes. JAX can use a large one without a copy."""
    if size < _WORTH_A_THREAD:
        return np.empty(size, np.uint8)
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size]


def _view_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _split_chunks(array: np.ndarray) -> Iterable[memoryview]:
    view = array.data
    return [view[i : i + _CHUNK] for i in range(0, len(view), _CHUNK)]


def _start(
    pool: ThreadPoolExecutor, func: Callable[..., Any], chunk: memoryview, *args: Any
) -> Callable[[], Any]:
    """A function that returns the result, which a thread computes if that is worth it."""
    if len(chunk) >= _WORTH_A_THREAD:
        with contextlib.suppress(RuntimeError):  # no thread starts at the end of the program
            return pool.submit(func, chunk, *args).result
    return ft.partial(func, chunk, *args)


class Digest:
    """A SHA-256 of a text and of the CRC-32 of each chunk.

    It detects damage, but not forgery: a forger can compute it. A SHA-256 of everything would
    take twice as long, or six times where the processor has no instructions for it.
    """

    def __init__(self, text: str):
        self._total = hashlib.sha256(text.encode())

    def begin(self, name: str) -> None:
        """Starts the tensor whose chunks follow. The text already contains its name."""

    def hash(self, chunk: memoryview) -> Any:
        return zlib.crc32(chunk).to_bytes(4, "little")

    def update(self, chunk_hash: Any) -> None:
        self._total.update(chunk_hash)

    def finish(self) -> str:
        return self._total.hexdigest()
