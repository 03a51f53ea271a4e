"""Parts of error messages."""

import difflib
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .flat import FlatTree, name_of


def shorten(texts: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first of them, and how many there are besides."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])


def name_shapes(arrays: Sequence[Any]) -> str:
    """The dtypes and shapes of arrays, to be read."""
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays]
    return ", ".join(eqx.tree_pformat(shape, struct_as_array=True) for shape in shapes)


def names_without_leaves(tree: Any) -> list[str]:
    """The dotted paths of the `None`s and of the empty nodes."""
    nodes, _ = jtu.tree_flatten_with_path(tree, is_leaf=lambda n: not jtu.tree_leaves(n))
    return [name_of(key_path) for key_path, node in nodes if not jtu.tree_leaves(node)]


def near_misses(text: str, flat: FlatTree) -> str:
    """A sentence with the paths that are spelled most like `text`, which may be a node's."""
    if text in flat.names:
        leaf = flat.leaves[flat.names.index(text)]
        return f"There is {eqx.tree_pformat(leaf)} at that path."
    below = [name for name in flat.names if name.startswith(f"{text}.")]
    if below:
        return f"It is a node with the leaves {shorten([f'`{name}`' for name in below])}."
    names = dict.fromkeys(
        name_of(key_path[: i + 1]) for key_path in flat.key_paths for i in range(len(key_path))
    )
    names.pop(text, None)
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.4) or list(names)[:3]
    listed = ", ".join(f"`{name}`" for name in near)
    return f"Its nearest paths are {listed}." if near else "It has no leaves."
