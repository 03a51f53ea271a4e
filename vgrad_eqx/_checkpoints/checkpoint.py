"""Checkpoints: all arrays of a pytree by name, in one file that is written atomically."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.tree_util as jtu

from .._optimizers.unitful import list_scales
from .._training.train_state import TrainState
from .._tree.flat import FlatTree, refuse_foreign
from .._tree.state import list_content, read, refuse_brainstate, State, write
from .._tree.text import check_flag, quote, shorten
from .._tree.types import PyTree
from .._tree.units import split_unit
from .archive import Tensor, write_archive
from .differences import check_rename, Differences, offer_rename
from .files import check_path, replace_file
from .leaves import cast_array, describe, Entry, fetch, find_obstacle, is_saved, restore
from .sources import escape, make_error, open_source, Shards, Source, VERSION


_T = TypeVar("_T")
# The most bytes to hold on the host before their arrays are put on their devices.
_BATCH = 1 << 25


def save(path: str | os.PathLike[str], tree: PyTree) -> None:
    """Writes all arrays of a pytree to a file, by name.

    The file is in the safetensors format, and contains no code. It is written next to `path`
    and then moved into place, so that at any moment there is a complete file: the new one or
    the previous one. This holds even if several processes write to the same path; the last one
    wins. Saving takes no more memory than the largest array.

    **Arguments:**

    - `path`: where to write. An existing file is replaced, and its mode is kept. If `path` is
        a link, its target is replaced.
    - `tree`: a [`vgrad_eqx.TrainState`][], or any pytree, such as
        `{"model": model, "opt": opt}`, or part of a model from [`vgrad_eqx.states`][]. Its JAX
        and NumPy arrays, NumPy scalars, PRNG keys, Quantities and Python numbers are saved, and
        the values of states by reference. Strings, functions and so on are not.

    **Returns:**

    Nothing.

    **Raises:**

    - `TypeError`: if a leaf contains arrays but cannot be saved; the error names its path.
        These are NumPy arrays of strings or objects, structured and masked arrays,
        `jax.ShapeDtypeStruct`s, arrays that are sharded over several hosts, and objects that
        contain arrays but are not pytrees.
    - `ValueError`: if there is nothing to save, or two leaves have the same dotted path.
    - `RuntimeError`: if a [`vgrad_eqx.TrainState`][] has been donated to a step.
    - `OSError`: if the file cannot be written, for example because the disk is full. A previous
        file is left as it was, and no other file is left behind.

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
    target = check_path(path, "save(path=...)")
    flat = FlatTree(_expand(tree))
    items = _list_items(flat, "save(tree=...)")
    if not items:
        raise ValueError(
            "`save(tree=...)` must hold an array or a number. Got a "
            f"`{type(tree).__name__}` without one."
        )
    for name, (_, leaf) in items.items():
        if isinstance(split_unit(leaf)[0], jax.ShapeDtypeStruct):
            raise TypeError(
                f"`save(tree=...)` must hold arrays. Got a shape without values, {leaf}, at "
                f"`{name}`. Pass such a tree to `load(like=...)`."
            )
    entries = _describe(flat.tree, items)
    leaves = {escape(name): leaf for name, (_, leaf) in items.items()}
    tensors = {
        escape(name): Tensor.of(entry.dtype, entry.shape) for name, entry in entries.items()
    }
    metadata = {"format": f"vgrad_eqx {VERSION}", "entries": json.dumps(entries)}
    with replace_file(target) as file:
        write_archive(file, tensors, lambda name: fetch(leaves[name]), metadata)


def load(
    path: str | os.PathLike[str],
    like: _T,
    *,
    strict: bool = True,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    cast: bool = False,
) -> _T:
    """Reads a file written by [`vgrad_eqx.save`][] or a safetensors file of another program.

    Nothing in the file is executed. Its contents are checked against `like` and, if the file
    was written by this library, against a digest, before anything is returned or set.

    **Arguments:**

    - `path`: the file to read. With `rename`, this may also be the index of several files,
        whose name ends with `.json`.
    - `like`: a pytree with the structure of the result, such as a
        [`vgrad_eqx.TrainState`][] created by `init`. Its arrays and PRNG keys may be
        `jax.ShapeDtypeStruct`s, as returned by `equinox.filter_eval_shape`.
    - `strict`: whether `like` and the file must have the same entries, with the same shapes,
        dtypes and units, and, for the state of a [`vgrad_eqx.unitful`][], the same scales and
        unit of the loss. If `False`, entries that differ keep their value in `like`, and a
        warning lists them.
    - `rename`: the name in the file of each array, as a dict from its path in `like` or a
        function of that path. A path that is not in the dict is itself the name. Required
        for files of other programs, from which only arrays are read: Python numbers and PRNG
        keys keep their value in `like`, and an array for a Quantity must be in the unit of that
        Quantity in `like`.
    - `cast`: whether to convert arrays to their dtype in `like`, if that is of the same kind or
        a more general one.

    **Returns:**

    A pytree like `like` with the arrays of the file, each with the type, byte order and
    sharding that it has in `like`. States by reference in `like` are set in place.

    **Raises:**

    - `ValueError`: if `path` is not a complete checkpoint; with `strict`, if it differs from
        `like` (the error counts the differences, and shows the first of each kind); with
        `cast`, if a value is too large for its new dtype.
    - `TypeError`: if `like` contains a leaf that `save` refuses.
    - `RuntimeError`: if a [`vgrad_eqx.TrainState`][] in `like` has been donated to a step.
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
    if isinstance(like, type):
        raise TypeError(
            "`load(like=...)` must be a pytree, such as a model. Got the class "
            f"`{like.__name__}`. Create a model of that class, or its shapes with "
            "`eqx.filter_eval_shape`."
        )
    check_flag(strict, "load(strict=...)")
    check_flag(cast, "load(cast=...)")
    refuse_foreign(like, "load(like=...)")
    flat = FlatTree(_expand(like))
    items = _list_items(flat, "load(like=...)")
    check_rename(rename, items)
    with open_source(check_path(path, "load(path=...)")) as source:
        wanted = _describe(flat.tree, items, with_scales=source.has_scales)
        if source.is_foreign and rename is None:
            raise make_error(source.path, offer_rename(source, wanted))
        if source.is_foreign:
            wanted = {
                name: entry._replace(unit=None)
                for name, entry in wanted.items()
                if entry.kind == "array"
            }
        differences = Differences(wanted, source, rename, cast)
        if differences and strict:
            for _ in source.read(()):  # is it damaged?
                pass
            raise ValueError(
                f"`load(like=...)` must be like the checkpoint. There is {differences}."
                f"{differences.hint} Pass `strict=False` to load what fits."
            )
        loaded = _read(source, differences.fitting, items, wanted)
    if differences:
        warnings.warn(
            f"`load(strict=False)` has left out what does not fit. There is {differences}."
            f"{differences.hint}{_name_shapes(items, loaded)}",
            stacklevel=2,
        )
    return _collect(like, flat.unflatten(_fill(flat.leaves, items, loaded)))


def _name_shapes(items: Mapping[str, tuple[int, Any]], loaded: Mapping[str, Any]) -> str:
    shapes = [
        quote(name)
        for name, (_, leaf) in items.items()
        if name not in loaded and isinstance(split_unit(leaf)[0], jax.ShapeDtypeStruct)
    ]
    return f" The result has shapes without values at {shorten(shapes)}." if shapes else ""


def _describe(
    tree: PyTree, items: Mapping[str, tuple[int, Any]], with_scales: bool = True
) -> dict[str, Entry]:
    entries = {name: describe(leaf) for name, (_, leaf) in items.items()}
    for name, scale in list_scales(tree) if with_scales else ():
        entries[name] = entries[name]._replace(unit=list(scale))
    return entries


def _read(
    source: Source | Shards,
    fitting: Mapping[str, list[str]],
    items: Mapping[str, tuple[int, Any]],
    wanted: Mapping[str, Entry],
) -> dict[str, Any]:
    """The loaded leaves by name. `fitting` gives the names in `like` of each array to read."""
    loaded, batch, size = {}, {}, 0

    def restore_batch() -> None:
        leaves = [items[name][1] for name in batch]
        loaded.update(zip(batch, restore(leaves, list(batch.values())), strict=True))
        batch.clear()

    for file_name, array in source.read(fitting):
        for i, name in enumerate(fitting[file_name]):
            # The first use owns the array, so JAX may take it over without a copy.
            own = array if i == 0 else array.copy()
            if wanted[name].kind == "array":
                own = cast_array(own, wanted[name].dtype, f"The array of `{name}`")
            batch[name] = own
            size += own.nbytes
        if size >= _BATCH:
            restore_batch()
            size = 0
    restore_batch()
    return loaded


def _fill(
    leaves: list[Any], items: Mapping[str, tuple[int, Any]], loaded: Mapping[str, Any]
) -> list[Any]:
    """The leaves with what was loaded. States by reference are all set, or none is."""
    leaves, refs = list(leaves), {}
    for name, value in loaded.items():
        index, leaf = items[name]
        if isinstance(ref := split_unit(leaf)[0], jax.Ref):
            refs[name] = ref
        elif not isinstance(leaves[index], State):
            leaves[index] = value
        elif str(value) != str(leaf):
            raise ValueError(
                f"`load(like=...)` must be like the checkpoint. There is {leaf} at `{name}`, "
                f"and {value} in the file. The Python numbers in the value of a state are "
                f"fixed, so create the state with {value}."
            )
    before = {name: read(ref) for name, ref in refs.items()}
    try:
        for name, ref in refs.items():
            write(ref, loaded[name], f"The state `{name}`")
    except BaseException:
        for name, ref in refs.items():
            write(ref, before[name], f"The state `{name}`")
        raise
    return leaves


def _is_train_state(node: object) -> bool:
    return isinstance(node, TrainState)


def _expand(tree: PyTree) -> Any:
    """The pytree with each training state replaced by its arrays, by name."""
    return jtu.tree_map(
        lambda node: node.to_tree() if _is_train_state(node) else node,
        tree,
        is_leaf=_is_train_state,
    )


def _collect(like: PyTree, expanded: PyTree) -> Any:
    """The inverse of `_expand`."""
    nodes, structure = jtu.tree_flatten(like, is_leaf=_is_train_state)
    filled = [
        node.from_tree(part) if _is_train_state(node) else part
        for node, part in zip(nodes, structure.flatten_up_to(expanded), strict=True)
    ]
    return jtu.tree_unflatten(structure, filled)


def _list_items(flat: FlatTree, caller: str) -> dict[str, tuple[int, Any]]:
    """Everything to save, by name, each with the index of its leaf."""
    refuse_brainstate(flat.leaves, caller)
    items: dict[str, tuple[int, Any]] = {}
    for index, (name, leaf) in enumerate(zip(flat.names, flat.leaves, strict=True)):
        inner = list_content(leaf, name) if isinstance(leaf, State) else {name: leaf}
        for each, array in inner.items():
            if obstacle := find_obstacle(array):
                raise TypeError(
                    f"`{caller}` must hold what can be saved. Got, at {quote(each)}, "
                    f"{obstacle}."
                )
            if not is_saved(array):
                continue
            if each in items:
                raise ValueError(
                    f"`{caller}` has two leaves with the dotted path `{each}`. Arrays are "
                    "saved by that path, so rename one of the keys."
                )
            items[each] = index, array
    return items
