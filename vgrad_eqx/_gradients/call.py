"""A call of `func` as a function of numbers: where they stand in its arguments and its output.

The user's pytrees stop here. What JAX differentiates takes and returns flat lists of arrays, in
which a Quantity is its number.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax.tree_util as jtu

from .._references.values import StateValues
from .._select.grad_states import GradStates
from .._select.selectors import select
from .._tree.flat import FlatTree, is_scalar, Rest
from .._tree.units import split_units


Func = Callable[..., Any]


class Call:
    """One call of `func`, as a function of the numbers by which it is differentiated."""

    def __init__(
        self,
        name: str,
        func: Func,
        grad_states: GradStates | None,
        argnums: int | tuple[int, ...] | None,
        has_aux: bool | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self._name = name
        self._func = func
        self._has_aux = has_aux
        self._args = args
        self._kwargs = kwargs
        self.states = None
        if grad_states is not None:
            caller = f"{name}(grad_states=...)"
            if grad_states.by_reference:
                self.states = StateValues(grad_states, caller)
            else:
                self.states = _SelectedLeaves(func, args, grad_states, caller)
        elif not args:
            raise TypeError(
                f"`{name}` differentiates positional arguments of `func`. Got none. Pass the "
                "argument by position, not by keyword."
            )
        if argnums is None:
            argnums = () if grad_states is not None else 0
        self._is_one_arg = not isinstance(argnums, tuple)
        caller = f"{name}(argnums=...)"
        positions = _find_positions(argnums, len(args), self.states, caller)
        inputs = [] if self.states is None else [self.states]
        self._inputs = [*inputs, *[_Argument(args, i, caller) for i in positions]]
        self._spans: list[slice] = []
        self.diff: list[Any] = []
        for each in self._inputs:
            start = len(self.diff)
            self.diff += each.diff
            self._spans.append(slice(start, len(self.diff)))

    def __call__(self, *diff: Any) -> tuple[tuple[Any, ...], "Output"]:
        """The numbers in the output of `func` that are differentiated, and the rest of it."""
        func, args = self._func, list(self._args)
        for each, span in zip(self._inputs, self._spans, strict=True):
            func = each.insert(func, args, diff[span])
        value = func(*args, **self._kwargs)
        if not self._has_aux:
            return split_output(value, None, self._name)
        return split_output(*_split_pair(value, self._name), self._name)

    @property
    def names(self) -> list[str]:
        """The paths of what is differentiated."""
        return [name for each in self._inputs for name in each.names]

    @property
    def selected(self) -> list[str]:
        """The paths of the selected leaves, which come first."""
        return self.states.names if isinstance(self.states, _SelectedLeaves) else []

    @property
    def units(self) -> list[Any]:
        return [unit for each in self._inputs for unit in each.units or [None] * len(each.diff)]

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The derivatives as the user is to see them: by the states, the arguments, or both."""
        pairs = zip(self._inputs, self._spans, strict=True)
        arranged = [each.arrange(grads[span]) for each, span in pairs]
        return self._join(arranged, self.states is not None)

    def arrange_second(self, rows: Sequence[Sequence[Any]]) -> Any:
        """The derivatives of derivatives. Those by one state and one argument are left out."""
        pairs = list(zip(self._inputs, self._spans, strict=True))
        arranged = []
        for part, span in pairs:
            is_state = part is self.states
            by = [pair for pair in pairs if (pair[0] is self.states) == is_state]
            entries = [
                self._join([each.arrange(row[place]) for each, place in by], is_state)
                for row in rows[span]
            ]
            arranged.append(part.arrange(entries))
        return self._join(arranged, self.states is not None)

    def _join(self, arranged: list[Any], has_states: bool) -> Any:
        var_grads, arg_grads = arranged[:has_states], arranged[has_states:]
        if arg_grads and not self._is_one_arg:
            arg_grads = [tuple(arg_grads)]
        results = [*var_grads, *arg_grads]
        return results[0] if len(results) == 1 else tuple(results)


class _Argument:
    """An argument, of which every inexact array is differentiated."""

    def __init__(self, args: Sequence[Any], position: int, caller: str):
        self._position = position
        self._flat = flat = FlatTree(args[position])
        indices = [0] if is_scalar(flat.tree) else flat.differentiable
        if not indices:
            raise TypeError(
                f"`{caller}` must name an argument with an inexact array in it, or "
                f"a float. Got argument {position}: {eqx.tree_pformat(flat.tree)}, in which "
                f"nothing can be differentiated. {_explain_conversion(flat)}"
            )
        self._split = flat.split(indices)
        self.diff, self.units = self._split.diff, self._split.rest.units

    @property
    def names(self) -> list[str]:
        names = [self._flat.names[i] for i in self._split.rest.indices]
        return [f"args[{self._position}]" + (name and f".{name}") for name in names]

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        """Puts these numbers into `args`. Returns the function to call."""
        args[self._position] = self._split.rest.combine(diff)
        return func

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The gradients in the structure of the argument."""
        return self._split.rest.arrange(grads)


class _SelectedLeaves:
    """The state tree, of which the selected leaves are differentiated."""

    def __init__(self, func: Func, args: Sequence[Any], grad_states: GradStates, caller: str):
        self._grad_states = grad_states
        self._owner = _find_owner(func)
        self.in_args = self._owner is None
        if self.in_args and not args:
            raise TypeError(
                f"`{caller}` selects leaves of the first positional argument of `func`. "
                "Got no positional argument."
            )
        self._flat = flat = FlatTree(args[0] if self._owner is None else self._owner.tree)
        self._selections = [select(flat, each, caller) for each in grad_states.entries]
        indices = dict.fromkeys([i for each in self._selections for i in each.indices])
        self._split = flat.split(list(indices))
        self.diff, self.units = self._split.diff, self._split.rest.units

    @property
    def names(self) -> list[str]:
        return [self._flat.names[i] for i in self._split.rest.indices]

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        tree = self._split.rest.combine(diff)
        if self._owner is not None:
            return self._owner.rebuild(tree)
        args[0] = tree
        return func

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The gradients by path, in the structure of `grad_states`."""
        if len(self._selections) == 1:
            dicts = [dict(zip(self._selections[0].names, grads, strict=True))]
        else:
            by_index = dict(zip(self._split.rest.indices, grads, strict=True))
            dicts = [
                {name: by_index[i] for i, name in zip(*selection, strict=True)}
                for selection in self._selections
            ]
        return self._grad_states.unflatten(dicts)


def _explain_conversion(flat: FlatTree) -> str:
    if split_units(flat.leaves)[1] is not None:
        return "Make the number in the Quantity a float, say by `1.0 * x`."
    return "Convert numbers by `jnp.asarray(x, float)`."


def _find_positions(
    argnums: int | tuple[int, ...], num_args: int, states: Any, caller: str
) -> list[int]:
    """The arguments that `argnums` names, counted from the start."""
    positions: list[int] = []
    for argnum in argnums if isinstance(argnums, tuple) else (argnums,):
        position = argnum + num_args if argnum < 0 else argnum
        if not 0 <= position < num_args:
            raise ValueError(
                f"`{caller}` must name a positional argument. Got {argnum} in a call with "
                f"{num_args} of them. Keyword arguments are not differentiated."
            )
        if position in positions:
            raise ValueError(
                f"`{caller}` must not name an argument twice. Got {argnums} in a call with "
                f"{num_args} positional arguments."
            )
        if states is not None and states.in_args and position == 0:
            raise ValueError(
                f"`{caller}` must not name the argument that `grad_states` selects from. "
                f"Got {argnum}, the first argument. Its gradients come with `grad_states`."
            )
        positions.append(position)
    return positions


class _Owner(NamedTuple):
    """A state tree inside a function, and the same function around another tree."""

    tree: Any
    rebuild: Callable[[Any], Func]


def _find_owner(func: Func) -> _Owner | None:
    """The state tree that `func` brings along, or `None` if it must be passed."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, eqx.Module):
        method: Any = func
        return _Owner(owner, lambda tree: type(method)(method.__func__, tree))
    if not isinstance(func, eqx.Module):
        return None
    if isinstance(func, eqx.Partial):
        return _find_in_partial(func)
    if hasattr(func, "__wrapped__"):
        return _find_in_wrapper(func)
    return _Owner(func, lambda tree: tree)


def _find_in_partial(func: eqx.Partial) -> _Owner | None:
    # A bound method of a decorated function is one, such as of `eqx.filter_jit`.
    args, keywords = func.args, func.keywords
    inner = _find_owner(func.func)
    if inner is not None:
        return _Owner(
            inner.tree, lambda tree: eqx.Partial(inner.rebuild(tree), *args, **keywords)
        )
    if args:
        return _Owner(args[0], lambda tree: eqx.Partial(func.func, tree, *args[1:], **keywords))
    return None


def _find_in_wrapper(func: Any) -> _Owner | None:
    wrapped = func.__wrapped__
    inner = _find_owner(wrapped)
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

    return _Owner(inner.tree, rebuild)


@ft.partial(
    jtu.register_dataclass, data_fields=["arrays", "finals"], meta_fields=["rest", "names"]
)
@dataclasses.dataclass(frozen=True)
class Output:
    """An output and its auxiliary data, without the numbers that are differentiated.

    To JAX it is a pytree of the other arrays. What a function over references leaves in them
    comes along as `finals`.
    """

    arrays: Sequence[Any]
    finals: Sequence[Any]
    rest: Rest
    names: Sequence[str]  # of all leaves of the output, if there are several to differentiate

    @property
    def num_diff(self) -> int:
        return len(self.rest.indices) - len(self.arrays)

    @property
    def units(self) -> list[Any]:
        """The units of the numbers that are differentiated."""
        return [*(self.rest.units or [None] * self.num_diff)][: self.num_diff]

    @property
    def diff_names(self) -> list[str]:
        return [self.names[i] for i in self.rest.indices[: self.num_diff]]

    @property
    def structure(self) -> Any:
        """The structure of the output alone."""
        return self.rest.structure.children()[0]

    def combine(self, numbers: Sequence[Any]) -> tuple[Any, Any]:
        """The output and the auxiliary data."""
        return self.rest.combine([*numbers, *self.arrays])

    def arrange(self, entries: Sequence[Any]) -> Any:
        """An entry in the place of each differentiated leaf, and `None` in the others."""
        indices = self.rest.indices[: self.num_diff]
        return Rest(self.structure, (), indices, None).arrange(entries)

    def replace(self, finals: Sequence[Any]) -> Self:
        return dataclasses.replace(self, finals=finals)


def split_output(value: Any, aux: Any, name: str) -> tuple[tuple[Any, ...], Output]:
    """The inexact leaves of `value`, and what remains."""
    flat = FlatTree(value)
    scalars = [i for i, leaf in enumerate(flat.leaves) if is_scalar(leaf)]
    diff = sorted([*flat.differentiable, *scalars]) if scalars else flat.differentiable
    if not diff:
        raise TypeError(
            f"`{name}(func=...)` must return an inexact array or a float, or a pytree with "
            f"one in it. Got {eqx.tree_pformat(value)}, in which nothing can be "
            "differentiated."
        )
    whole = FlatTree((value, aux))
    numbers, _ = split_units(whole.leaves)
    chosen = set(diff)
    arrays = [i for i, x in enumerate(numbers) if i not in chosen and eqx.is_array(x)]
    parts = whole.split([*diff, *arrays])
    names = tuple(flat.names) if len(diff) > 1 else ("",) * len(flat.leaves)
    output = Output(parts.diff[len(diff) :], (), parts.rest, names)
    return tuple(parts.diff[: len(diff)]), output


def _split_pair(out: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(
            f"`{name}(has_aux=True)` needs a `func` that returns a pair `(value, aux)`. Got "
            f"{eqx.tree_pformat(out)}."
        )
    value, aux = out
    return value, aux
