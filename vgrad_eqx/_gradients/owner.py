"""Where the state tree is: in the function, or first among its arguments."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu


class Home(NamedTuple):
    """A state tree inside a function, and the same function around another tree."""

    tree: Any
    rebuild: Callable[[Any], Callable[..., Any]]


def find_home(func: Callable[..., Any]) -> Home | None:
    """The state tree that `func` brings along, or `None` if it must be passed."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, eqx.Module):
        method: Any = func
        return Home(owner, lambda tree: type(method)(method.__func__, tree))
    if not isinstance(func, eqx.Module):
        return None
    if isinstance(func, eqx.Partial):
        return _find_in_partial(func)
    if hasattr(func, "__wrapped__"):
        return _find_in_wrapper(func)
    return Home(func, lambda tree: tree)


def _find_in_partial(func: eqx.Partial) -> Home | None:
    # A bound method of a decorated function is one, such as of `eqx.filter_jit`.
    args, keywords = func.args, func.keywords
    inner = find_home(func.func)
    if inner is not None:
        return Home(
            inner.tree, lambda tree: eqx.Partial(inner.rebuild(tree), *args, **keywords)
        )
    if args:
        return Home(args[0], lambda tree: eqx.Partial(func.func, tree, *args[1:], **keywords))
    return None


def _find_in_wrapper(func: Any) -> Home | None:
    wrapped = func.__wrapped__
    inner = find_home(wrapped)
    if inner is None:
        return None

    def is_wrapped(node: Any) -> bool:
        return node is wrapped

    if not any(map(is_wrapped, jtu.tree_leaves(func, is_leaf=is_wrapped))):
        raise TypeError(
            f"Leaves of `{type(wrapped).__name__}` cannot be selected inside of {func!r}, "
            "which does not hold it as a part of its pytree. Wrap the gradient instead, "
            "say as `eqx.filter_jit(vg.vector_grad(model, ...))`."
        )

    def rebuild(tree: Any) -> Any:
        new = inner.rebuild(tree)
        return jtu.tree_map(
            lambda node: new if is_wrapped(node) else node, func, is_leaf=is_wrapped
        )

    return Home(inner.tree, rebuild)
