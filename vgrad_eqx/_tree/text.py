"""Parts of error messages, and errors that many functions share."""

import difflib
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .flat import FlatTree, name_of, refuse_endless
from .types import PyTree


_MOST_LEAVES = 16
_MOST_CHARACTERS = 100
_MOST_COMPARED = 2000


def shorten(texts: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first few texts, and the number of the others."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])


def show(value: object) -> str:
    """A value as shown in an error, on one line. A long value is shown by its class."""
    kind = f"a `{type(value).__name__}`"
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and callable(value):
        return f"`{name}`"
    text = print_on_one_line(value)
    return kind if text is None else text


def print_on_one_line(value: object, **options: Any) -> str | None:
    """The text that Equinox prints for a value, or `None` if it is long."""
    try:
        refuse_endless(value)
        if len(jtu.tree_leaves(value)) > _MOST_LEAVES:
            return None
        text = " ".join(eqx.tree_pformat(value, width=10_000, **options).split())
    except Exception:  # of a class of the user
        return None
    return None if len(text) > _MOST_CHARACTERS or " at 0x" in text else text


def quote(name: str, mark: str = "`") -> str:
    """A name in quotation marks. The middle of a long name is left out."""
    shown = name if len(name) <= 60 else f"{name[:30]}...{name[-27:]}"
    return f"{mark}{shown}{mark}"


def check_flag(flag: object, caller: str) -> None:
    """Raises an error for anything but a bool, such as an argument at the wrong position."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"`{caller}` must be True or False. Got {show(flag)}.")


def name_shapes(arrays: Sequence[Any]) -> str:
    """The dtypes and shapes of arrays, as text."""
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays]
    return shorten([eqx.tree_pformat(shape, struct_as_array=True) for shape in shapes])


def names_without_leaves(tree: PyTree) -> list[str]:
    """The dotted paths of the `None`s and of the empty nodes."""
    nodes, _ = jtu.tree_flatten_with_path(tree, is_leaf=lambda n: not jtu.tree_leaves(n))
    return [name_of(key_path) for key_path, node in nodes if not jtu.tree_leaves(node)]


def near_misses(text: str, flat: FlatTree) -> str:
    """A sentence with the paths closest to `text`, or with what is at that path."""
    if text in flat.names:
        return f"There is {show(flat.leaves[flat.names.index(text)])} at that path."
    if text in names_without_leaves(flat.tree):
        return "There is None, or an empty node, at that path."
    if flat.names == [""]:
        return (
            f"It is {show(flat.leaves[0])}, one leaf of the path '', which `True` selects. To "
            "select leaves of a model, pass the model in its place."
        )
    below = [name for name in flat.names if name.startswith(f"{text}.")]
    if below:
        return f"It is a node with the leaves {shorten(list(map(quote, below)), 3)}."
    names = dict.fromkeys(
        name_of(key_path[: i + 1])
        for key_path in flat.key_paths[:_MOST_COMPARED]
        for i in range(len(key_path))
    )
    if not names:
        return "It has no leaves."
    # What follows `**` is compared with the same number of trailing segments.
    tail = text.removeprefix("**.")
    num_segments = 0 if tail == text else tail.count(".") + 1
    tails: dict[str, str] = {}
    for name in names:
        tails.setdefault(".".join(name.split(".")[-num_segments:]), name)
    near = difflib.get_close_matches(tail[:200], tails, n=3, cutoff=0.4)
    near = [tails[each] for each in near]
    return f"Its nearest paths are {shorten(list(map(quote, near or names)), 3)}."
