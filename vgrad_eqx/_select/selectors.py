"""The public ways to say which leaves of a pytree are meant."""

import functools as ft
import operator
from collections.abc import Callable
from typing import Any

from .kinds import At, Instance, Leaf, Path, Selector


def path(*globs: str) -> Selector:
    """Selects leaves by their dotted path.

    The path of a leaf is its `jax.tree_util.keystr(..., simple=True, separator=".")`, such
    as `layers.0.weight`. A path that names an inner node selects everything under it. A
    plain string means the same wherever a selector is taken.

    **Arguments:**

    - `globs`: one or more paths, in which `*` is one segment or a part of one, `**` any
        number of segments, `[01]` one of some characters (`[!01]` any other), and `{a,b}`
        one of some texts. A leaf is selected if one of `globs` matches it.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`, `ValueError`: at once, without a glob or with one that is no string or
        not well-formed.
    - `ValueError`: on selecting, if one of `globs` matches nothing. The message lists
        the nearest paths.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.path("layers.*.bias") & ~vg.path("layers.2")))
        ['layers.0.bias', 'layers.1.bias']
        >>> list(vg.states(mlp, "layers.{0,2}.weight"))
        ['layers.0.weight', 'layers.2.weight']
    """
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(
                f"`path(*globs)` takes strings such as 'layers.*.weight'. Got {glob!r}."
            )
    if not globs:
        raise TypeError("`path(*globs)` needs at least one string. Got none.")
    return ft.reduce(operator.or_, map(Path, globs))


def instance(node_type: type | tuple[type, ...]) -> Selector:
    """Selects everything under the nodes of a type.

    **Arguments:**

    - `node_type`: a class, or a tuple of classes, as for `isinstance`.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `node_type` is no class.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> model = [eqx.nn.Conv1d(1, 1, 3, key=jax.random.key(0)), eqx.nn.LayerNorm(8)]
        >>> list(vg.states(model, vg.instance(eqx.nn.LayerNorm)))
        ['1.weight', '1.bias']
    """
    types = node_type if isinstance(node_type, tuple) else (node_type,)
    if not types or not all(isinstance(each, type) for each in types):
        raise TypeError(
            f"`instance(node_type)` takes a class or a tuple of classes. Got {node_type!r}."
        )
    return Instance(node_type)


def at(where: Callable[[Any], Any]) -> Selector:
    """Selects a node, or several, by a function that looks them up.

    **Arguments:**

    - `where`: takes the tree and returns a node of it or a tuple of nodes, as the
        `where` of `equinox.tree_at`. Everything under those nodes is selected.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `where` is not callable; on selecting, if it returns
        something that is no part of the tree.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 2, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.at(lambda mlp: mlp.layers[-1])))
        ['layers.2.weight', 'layers.2.bias']
    """
    if not callable(where):
        raise TypeError(
            "`at(where)` takes a function of the tree, such as "
            f"`lambda model: model.layers[0]`. Got {where!r}."
        )
    return At(where)


def leaf(predicate: Callable[[Any], Any]) -> Selector:
    """Selects leaves by a test of the leaf.

    **Arguments:**

    - `predicate`: takes an inexact array and returns a bool. Other leaves are never
        selected, so it is not asked about them. Under `jax.jit` it may use the shape and
        the dtype of an array, but not its values.

    **Returns:**

    A selector. It combines with others by `&`, `|` and `~`.

    **Raises:**

    - `TypeError`: at once, if `predicate` is not callable.

    **Example:**

        >>> import equinox as eqx, jax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> list(vg.states(mlp, vg.leaf(lambda leaf: leaf.ndim == 2)))
        ['layers.0.weight', 'layers.1.weight']
    """
    if not callable(predicate):
        raise TypeError(
            "`leaf(predicate)` takes a function of an array, such as "
            f"`lambda leaf: leaf.ndim == 2`. Got {predicate!r}."
        )
    return Leaf(predicate)
