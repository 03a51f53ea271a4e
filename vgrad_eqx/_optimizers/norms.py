"""The norms of gradients, by path, and a plot of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TYPE_CHECKING

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from .._select.selectors import check_names
from .._tree.flat import FlatTree, widen
from .._tree.text import quote, show
from .._tree.types import PyTree
from .._tree.units import attach_unit, split_unit


if TYPE_CHECKING:
    from matplotlib.axes import Axes


def grad_norms(var_grads: PyTree) -> dict[str, Any]:
    """The Euclidean norm of each gradient, by its path.

    **Arguments:**

    - `var_grads`: a dict `{path: gradient}`, or any pytree of gradients.

    **Returns:**

    A flat dict `{path: norm}` of real scalars, in the unit of the gradient. Norms are computed
    in float32 at least, so that squares do not overflow in small dtypes. Works under `jax.jit`.

    **Raises:**

    - `ValueError`: if `var_grads` has no inexact array, or two with the same dotted path.

    **Example:**

        >>> import jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> norms = vg.grad_norms({"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)})
        >>> {path: float(norm) for path, norm in norms.items()}
        {'a': 5.0, 'b': 0.0}
    """
    flat = FlatTree(var_grads)
    check_names(flat, flat.differentiable)
    if not flat.differentiable:
        raise ValueError(
            "`grad_norms(var_grads=...)` must hold inexact arrays. Got a "
            f"`{type(var_grads).__name__}` without one."
        )
    norms = {flat.names[i]: _norm(flat.leaves[i]) for i in flat.differentiable}
    return dict(sorted(norms.items()))


def _norm(grad: object) -> Any:
    number, unit = split_unit(grad)
    dtype = widen(jnp.result_type(number))
    return attach_unit(jnp.linalg.norm(jnp.asarray(number, dtype).ravel()), unit)


def plot_grad_norms(history: Iterable[Mapping[str, Any]], ax: "Axes | None" = None) -> "Axes":
    """Plots the norms of gradients as a heat map of path against step, on a log scale.

    A layer whose gradients vanish is dark, and a layer whose gradients explode is bright. Norms
    that are exactly zero are blue, norms that are not finite are red, and steps in which a path
    was not trained are blank. Paths are in natural order, `layers.2` before `layers.10`. If
    there are more than 64 paths, only some are labelled. Requires matplotlib, which is
    installed by `pip install "vgrad_eqx[plot]"`.

    **Arguments:**

    - `history`: a list, or any iterable, of dicts as returned by [`vgrad_eqx.grad_norms`][].
        Each holds the norms of one step or, with a leading axis, of several steps, as stacked
        by [`vgrad_eqx.train_step`][].
    - `ax`: the `matplotlib.axes.Axes` to draw into. Defaults to those of a new figure.

    **Returns:**

    The axes.

    **Raises:**

    - `ImportError`: if matplotlib is not installed.
    - `TypeError`: if `history` is not a list of dicts of norms.
    - `ValueError`: if `history` is empty, or a norm is neither a scalar nor a vector.

    **Example:**

        >>> import matplotlib
        >>> matplotlib.use("agg")
        >>> import vgrad_eqx as vg
        >>> ax = vg.plot_grad_norms([{"a": 1.0, "b": 10.0}, {"a": 0.1, "b": 1e3}])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['a', 'b']
    """
    history = _parse_history(history)
    try:
        import matplotlib.colors as colors
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            '`plot_grad_norms` needs matplotlib. Run `pip install "vgrad_eqx[plot]"`.'
        ) from error
    paths, norms, given = _arrange(history)
    if ax is None:
        height = 1 + 0.25 * min(len(paths), _MOST_LABELS)
        _, ax = plt.subplots(figsize=(8, height), layout="constrained")
    regular = given & np.isfinite(norms) & (norms > 0)
    low, high = (norms[regular].min(), norms[regular].max()) if regular.any() else (1.0, 1.0)
    scale = colors.LogNorm(low, high if high > low else 2 * low)
    extent = (-0.5, norms.shape[1] - 0.5, len(paths) - 0.5, -0.5)
    options: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "extent": extent}
    drawn = np.where(regular, norms, np.nan)
    image = ax.imshow(drawn, norm=scale, cmap="inferno", **options)
    for fault, color in [(norms == 0, "tab:blue"), (~np.isfinite(norms), "red")]:
        marked = np.where(given & fault, 1.0, np.nan)
        ax.imshow(marked, cmap=colors.ListedColormap([color]), **options)
    labelled = range(0, len(paths), -(-len(paths) // _MOST_LABELS))
    ax.set_yticks(labelled, [paths[i] for i in labelled], fontsize="small")
    ax.set_xlabel("step")
    ax.figure.colorbar(image, ax=ax, label="norm of the gradient (blue: 0, red: not finite)")
    return ax


# With more rows, only some are labelled, or a plot of 1 000 leaves would be six meters high.
_MOST_LABELS = 64


def _parse_history(history: Any) -> list[Mapping[str, Any]]:
    """The steps as a list, also from an iterator."""
    caller = "`plot_grad_norms(history=...)`"
    is_steps = isinstance(history, Iterable) and not isinstance(history, Mapping | str)
    steps: list[Any] = list(history) if is_steps else [None]
    for step in steps:
        if not isinstance(step, Mapping):
            given = f"{show(step)} in it" if is_steps else show(history)
            raise TypeError(
                f"{caller} must be a list of dicts from path to norm, one for each step, as "
                f"`vg.grad_norms` gives them. Got {given}. For a single step, pass `[norms]`."
            )
        for path, norm in step.items():
            number = split_unit(norm)[0]
            if not eqx.is_array_like(number) or np.ndim(number) > 1:
                raise ValueError(
                    f"{caller} must hold a number for each path, or one for each of several "
                    f"steps. Got {show(norm)} at {quote(str(path))}."
                )
    if not steps:
        raise ValueError(f"{caller} must hold a step. Got none.")
    return steps


def _split_numbers(path: str) -> list[Any]:
    """A sort key that puts `layers.2` before `layers.10`."""
    parts = re.split(r"([0-9]+)", path)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def _arrange(history: Sequence[Mapping[str, Any]]) -> tuple[list[str], Any, Any]:
    """The paths, the norm at each path and step, and whether there is one."""
    paths = sorted({path for entry in history for path in entry}, key=_split_numbers)
    columns = []
    for entry in history:
        numbers = {path: np.atleast_1d(split_unit(norm)[0]) for path, norm in entry.items()}
        blank = np.full(max(map(len, numbers.values()), default=1), -1.0)
        columns.append(np.stack([numbers.get(path, blank) for path in paths]))
    norms = np.concatenate(columns, axis=1).astype(float)
    given = norms != -1.0  # a norm is never negative
    return paths, norms, given
