"""Checkpoints: all arrays of a pytree by name, in one file that is whole or not there."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from .._training.train_state import TrainState
from .._tree.flat import FlatTree
from .._tree.state import read, State, write
from .._tree.units import attach_unit, describe_unit, refuse_foreign, split_unit
from .archive import Entry, read_archive, write_archive


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes all arrays of a pytree to a file, by name.

    The file is in the format of safetensors, and holds no code. It is written beside `path`
    first and then put in its place, so that there is a whole file at any moment: the new
    one, or the one before. One process at a time may write to a path.

    **Arguments:**

    - `path`: where to write. What was there is replaced.
    - `tree`: a [`vgrad_eqx.TrainState`][], or any pytree, such as
        `{"model": model, "opt": opt}`. Its arrays, PRNG keys, Quantities and Python numbers
        are saved, and the values of states by reference. Strings, functions and the like are
        not.

    **Returns:**

    Nothing.

    **Raises:**

    - `ValueError`: if there is nothing to save, or if two leaves have one dotted path.
    - `RuntimeError`: for a [`vgrad_eqx.TrainState`][] that a step has taken over.
    - `OSError`: if it cannot be written. What was there before is there still.

    **Example:**

        >>> import os, tempfile
        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> path = os.path.join(tempfile.mkdtemp(), "checkpoint")
        >>> vg.save(path, {"w": jnp.array([1.0, 2.0]), "epoch": 3})
        >>> loaded = vg.load(path, {"w": jnp.zeros(2), "epoch": 0})
        >>> loaded["w"].tolist(), loaded["epoch"]
        ([1.0, 2.0], 3)
    """
    refuse_foreign(tree, "save(tree=...)")
    items = _list_items(FlatTree(_expand(tree)), "save(tree=...)")
    if not items:
        raise ValueError(
            "`save(tree=...)` must hold an array or a number. Got a "
            f"`{type(tree).__name__}` without one."
        )
    entries = {name: _describe(leaf) for name, (_, leaf) in items.items()}
    arrays = {name: _find_array(leaf) for name, (_, leaf) in items.items()}
    write_archive(Path(path), entries, jax.device_get(arrays))


def load(path: str | os.PathLike[str], like: Any, *, strict: bool = True) -> Any:
    """Reads what [`vgrad_eqx.save`][] has written.

    Nothing in the file is executed. Its contents are checked against a digest, and against
    `like`, before anything is returned or set.

    **Arguments:**

    - `path`: where to read.
    - `like`: a pytree of the structure of the result, such as a
        [`vgrad_eqx.TrainState`][] that `init` has made. Its arrays may be
        `jax.ShapeDtypeStruct`s.
    - `strict`: whether all that is in `like` must be in the file and the other way round, with
        the same shape, dtype and unit. If `False`, what differs stays as it is in `like`, and
        a warning lists it.

    **Returns:**

    A pytree like `like` with the arrays of the file, each with the sharding that it has in
    `like`. States by reference in `like` are set.

    **Raises:**

    - `ValueError`: if `path` is no whole checkpoint, or, with `strict`, if it differs from
        `like`; it lists every difference.
    - `RuntimeError`: for a [`vgrad_eqx.TrainState`][] that a step has taken over.
    - `FileNotFoundError`: if there is no file.

    **Example:**

        >>> import os, tempfile
        >>> import brainunit as u, jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> path = os.path.join(tempfile.mkdtemp(), "checkpoint")
        >>> vg.save(path, {"tau": jnp.array(10.0, "float32") * u.ms})
        >>> zero = jnp.array(0.0, "float32")
        >>> vg.load(path, {"tau": zero * u.ms})["tau"]
        Quantity(10., "ms")
        >>> vg.load(path, {"tau": zero * u.second})
        Traceback (most recent call last):
        ValueError: `load(like=...)` must be like the checkpoint. There is float32[] in s at \
`tau`, and float32[] in ms in the file. Pass `strict=False` to load what fits.
    """
    flat = FlatTree(_expand(like))
    items = _list_items(flat, "load(like=...)")
    found = read_archive(Path(path))
    differences = _list_differences(items, found)
    if differences and strict:
        raise ValueError(
            "`load(like=...)` must be like the checkpoint. There is "
            f"{'; '.join(differences.values())}. Pass `strict=False` to load what fits."
            f"{_hint(differences)}"
        )
    if differences:
        warnings.warn(
            "`load(strict=False)` has left out what does not fit. There is "
            f"{'; '.join(differences.values())}.",
            stacklevel=2,
        )
    leaves = list(flat.leaves)
    for name, (index, leaf) in items.items():
        if name not in differences:
            value = _restore(leaf, found[name][1])
            if isinstance(leaf := split_unit(leaf)[0], jax.Ref):
                write(leaf, value, f"The state `{name}`")
            else:
                leaves[index] = value
    return _collect(like, flat.unflatten(leaves))


def _hint(differences: dict[str, str]) -> str:
    if not any("others." in name for name in differences):
        return ""
    return " States that `func` uses are known after `step.init(batch=...)`."


def _is_train_state(node: Any) -> bool:
    return isinstance(node, TrainState)


def _expand(tree: Any) -> Any:
    """The pytree with the arrays of training states by name."""
    return jtu.tree_map(
        lambda node: node.to_tree() if _is_train_state(node) else node,
        tree,
        is_leaf=_is_train_state,
    )


def _collect(like: Any, expanded: Any) -> Any:
    """The inverse of `_expand`."""
    nodes, structure = jtu.tree_flatten(like, is_leaf=_is_train_state)
    filled = [
        node.from_tree(part) if _is_train_state(node) else part
        for node, part in zip(nodes, structure.flatten_up_to(expanded), strict=True)
    ]
    return jtu.tree_unflatten(structure, filled)


def _list_items(flat: FlatTree, caller: str) -> dict[str, tuple[int, Any]]:
    """What is saved, by name, each with the index of the leaf that it is in."""
    items: dict[str, tuple[int, Any]] = {}
    for index, (name, leaf) in enumerate(zip(flat.names, flat.leaves, strict=True)):
        inner = {name: leaf}
        if isinstance(leaf, State):
            value = FlatTree(leaf.content.combine())
            names = [f"{name}.{each}".strip(".") for each in value.names]
            inner = {
                each: inner_leaf
                for each, inner_leaf in zip(names, value.leaves, strict=True)
                if isinstance(split_unit(inner_leaf)[0], jax.Ref)  # the others are fixed
            }
        for each, array in inner.items():
            if each in items and _is_saved(array):
                raise ValueError(
                    f"`{caller}` has two leaves of the dotted path `{each}`. Arrays are saved "
                    "by that path, so rename one of the keys."
                )
            if _is_saved(array):
                items[each] = index, array
    return items


def _is_saved(leaf: Any) -> bool:
    number, _ = split_unit(leaf)
    arrays = jax.Array | jax.Ref | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(number, arrays | bool | int | float | complex)


def _describe(leaf: Any) -> Entry:
    number, unit = split_unit(leaf)
    kind, dtype, shape = "array", getattr(number, "dtype", None), jnp.shape(number)
    if dtype is None:
        kind = "array" if unit is not None else f"Python {type(number).__name__}"
        dtype = jnp.result_type(number) if unit is not None else np.asarray(number).dtype
    elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
        kind = f"key of {jr.key_impl(number)}"
        data = jax.eval_shape(jr.key_data, number)
        dtype, shape = data.dtype, data.shape
    return Entry(kind, jnp.dtype(dtype).name, shape, describe_unit(unit))


def _find_array(leaf: Any) -> Any:
    number, unit = split_unit(leaf)
    if isinstance(number, jax.Ref):
        return read(number)
    if not hasattr(number, "dtype"):
        return np.asarray(number, jnp.result_type(number) if unit is not None else None)
    return jr.key_data(number) if jnp.issubdtype(number.dtype, jax.dtypes.prng_key) else number


def _restore(leaf: Any, array: np.ndarray) -> Any:
    """The array, as what stands in the place of `leaf`."""
    number, unit = split_unit(leaf)
    if isinstance(number, jax.Ref):
        return jnp.asarray(array)
    if isinstance(number, bool | int | float | complex) and unit is None:
        return array.item()
    if isinstance(number, np.ndarray | np.generic):
        return attach_unit(array, unit)
    if jnp.issubdtype(jnp.result_type(number), jax.dtypes.prng_key):
        return jr.wrap_key_data(jnp.asarray(array), impl=jr.key_impl(number))
    # What JAX may move to other devices may be moved still.
    is_free = isinstance(number, jax.Array) and not number.committed
    sharding = None if is_free else getattr(number, "sharding", None)
    return attach_unit(jax.device_put(array, sharding), unit)


def _list_differences(
    items: dict[str, tuple[int, Any]], found: dict[str, tuple[Entry, Any]]
) -> dict[str, str]:
    """What differs, in words, by name."""
    wanted = {name: _describe(leaf) for name, (_, leaf) in items.items()}
    differences = {}
    for name in [*wanted, *[name for name in found if name not in wanted]]:
        if name not in found:
            differences[name] = f"{wanted[name]} at `{name}`, and nothing in the file"
        elif name not in wanted:
            differences[name] = f"nothing at `{name}`, and {found[name][0]} in the file"
        elif not wanted[name].fits(found[name][0]):
            in_file = found[name][0]
            differences[name] = f"{wanted[name]} at `{name}`, and {in_file} in the file"
    return differences
