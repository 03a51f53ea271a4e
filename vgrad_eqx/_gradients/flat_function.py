"""One call of `func`, as a function of flat arrays from its arguments to its output.

The user's pytrees stop here. The function that JAX differentiates takes and returns flat lists
of arrays, in which a Quantity is represented by its mantissa.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._references.values import StateValues
from .._select.grad_states import GradStates
from .._select.selectors import select
from .._tree.flat import FlatTree, is_scalar, refuse_foreign, Rest
from .._tree.state import find_states, refuse_brainstate
from .._tree.text import show
from .._tree.types import PyTree


Func = Callable[..., Any]


class FlatFunction:
    """`func` with its arguments, as a function of the arrays that are differentiated."""

    def __init__(
        self, transform: Any, func: Func, args: tuple[Any, ...], kwargs: dict[str, Any]
    ):
        self.transform = transform
        self.name = name = transform.operator.name
        self._func, self._has_aux = func, transform.has_aux
        self._args, self._kwargs = args, kwargs
        self._is_one_arg = not isinstance(transform.argnums, tuple)
        grad_states, argnums = transform.grad_states, transform.argnums
        self._inputs: list[Any] = []
        if transform.unit_aware:
            refuse_foreign((args, kwargs), f"{name}(unit_aware=True)")
        if grad_states is not None:
            caller = f"{name}(grad_states=...)"
            if grad_states.states:
                self._inputs.append(StateValues(grad_states, caller))
            else:
                self._inputs.append(_SelectedLeaves(self._func, args, grad_states, caller))
        elif not args:
            raise TypeError(
                f"`{name}` differentiates positional arguments of `func`. Got none. Pass the "
                "argument by position, not by keyword."
            )
        self.states: Any = self._inputs[0] if self._inputs else None
        if argnums is not None or grad_states is None:
            caller = f"{name}(argnums=...)"
            positions = _find_positions(argnums or 0, len(args), self.states, caller)
            self._inputs += [_Argument(args, position, caller) for position in positions]
        if transform.unit_aware:
            refuse_foreign([each.tree for each in self._inputs], f"{name}(unit_aware=True)")
        self.diff: list[Any] = []
        self._spans: list[slice] = []
        for each in self._inputs:
            self._spans.append(slice(len(self.diff), len(self.diff) + len(each.diff)))
            self.diff += each.diff
        is_selected = isinstance(self.states, _SelectedLeaves)
        self.num_selected = len(self.states.diff) if is_selected else 0

    def __call__(self, *diff: jax.Array) -> tuple[tuple[Any, ...], "Output"]:
        """The differentiated arrays in the output of `func`, and the rest of the output."""
        func, args = self._func, list(self._args)
        for each, span in zip(self._inputs, self._spans, strict=True):
            func = each.insert(func, args, diff[span])
        value, aux = func(*args, **self._kwargs), None
        if self._has_aux:
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(
                    f"`{self.name}(has_aux=True)` needs a `func` that returns a pair `(value, "
                    f"aux)`. Got {show(value)}."
                )
            value, aux = value
        if self.transform.unit_aware:
            refuse_foreign(value, f"{self.name}(unit_aware=True)")
        return split_output(value, aux, self.name)

    def refuse_complex(self) -> None:
        """Raises an error if a differentiated leaf is complex."""
        for each in self._inputs:
            for name, number in zip(each.labels, each.diff, strict=True):
                if jnp.iscomplexobj(number):
                    option = "grad_states" if each is self.states else "argnums"
                    raise TypeError(
                        f"`{self.name}({option}=...)` must name real leaves. Got "
                        f"{jnp.result_type(number)} in `{name}`. Split it into two real "
                        "leaves, which `func` joins by `jax.lax.complex(real, imag)`, or leave "
                        "it out."
                    )

    @property
    def names(self) -> list[str]:
        """The name in errors of each differentiated array. Selected leaves come first."""
        return [name for each in self._inputs for name in each.labels]

    @property
    def units(self) -> list[Any]:
        units = [each.units or [None] * len(each.diff) for each in self._inputs]
        return [unit for part in units for unit in part]

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The derivatives for the user: with respect to the states, the arguments, or both."""
        pairs = zip(self._inputs, self._spans, strict=True)
        return self._join([each.arrange(grads[span]) for each, span in pairs])

    def arrange_second(self, rows: Sequence[Sequence[Any]]) -> Any:
        """The second derivatives, without mixed ones of a state and an argument."""
        pairs = list(zip(self._inputs, self._spans, strict=True))
        num_states = self.states is not None
        arranged = []
        for i, (part, span) in enumerate(pairs):
            others = pairs[:num_states] if i < num_states else pairs[num_states:]
            entries = [
                self._join([each.arrange(row[by]) for each, by in others], i < num_states)
                for row in rows[span]
            ]
            arranged.append(part.arrange(entries))
        return self._join(arranged)

    def _join(self, arranged: list[Any], num_states: int | None = None) -> Any:
        """Joins the derivatives of the states and of the arguments, in the form requested."""
        if num_states is None:
            num_states = self.states is not None
        arg_grads = arranged[num_states:]
        if arg_grads and not self._is_one_arg:
            arg_grads = [tuple(arg_grads)]
        results = [*arranged[:num_states], *arg_grads]
        return results[0] if len(results) == 1 else tuple(results)


class _Argument:
    """An argument whose inexact arrays are all differentiated."""

    def __init__(self, args: Sequence[Any], position: int, caller: str):
        self._position = position
        self._flat = flat = FlatTree(args[position])
        self.tree = flat.tree
        indices = [0] if is_scalar(flat.tree) else flat.differentiable
        if not indices:
            refuse_brainstate(flat.leaves, caller)
            number = "jnp.asarray(x, float)" if flat.units is None else "1.0 * x"
            way_out = f"Convert numbers by `{number}`."
            if find_states(flat.leaves):
                way_out = "Pass the `value` of a state, or name the state in `grad_states`."
            elif not any(map(eqx.is_array_like, flat.numbers)):
                way_out = "Name another one, such as that after `self` by `argnums=1`."
            raise TypeError(
                f"`{caller}` must name an argument with an inexact array in it, or "
                f"a float. Got argument {position}: {show(flat.tree)}, in which "
                f"nothing can be differentiated. {way_out}"
            )
        split = flat.split(indices)
        self.diff, self.units, self._rest = split.diff, split.rest.units, split.rest

    @property
    def labels(self) -> list[str]:
        names = [self._flat.names[i] for i in self._rest.indices]
        return [f"args[{self._position}]" + (name and f".{name}") for name in names]

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        """Inserts these arrays into `args`. Returns the function to call."""
        args[self._position] = self._rest.combine(diff)
        return func

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The gradients in the structure of the argument."""
        return self._rest.arrange(grads)


class _SelectedLeaves:
    """The state tree, whose selected leaves are differentiated."""

    def __init__(self, func: Func, args: Sequence[Any], grad_states: GradStates, caller: str):
        self._structure = grad_states.structure
        self._owner = _find_owner(func)
        self.in_args = self._owner is None
        if self.in_args and not args:
            raise TypeError(
                f"`{caller}` selects leaves of the first positional argument of `func`. "
                "Got no positional argument."
            )
        self.tree = args[0] if self._owner is None else self._owner.tree
        flat = FlatTree(self.tree)
        if self.in_args and jtu.treedef_is_leaf(flat.structure):
            _refuse_hidden(func, flat.tree, caller)
        self._selections = []
        by_index = {}  # because several selections may share leaves
        for selector in grad_states.selectors:
            self._selections.append(selection := select(flat, selector, caller))
            by_index.update(zip(*selection, strict=True))
        by_index = dict(
            sorted(by_index.items())
        )  # errors name leaves in the order of the model
        split = flat.split(list(by_index))
        self.diff, self.units, self._rest = split.diff, split.rest.units, split.rest
        self.labels = list(by_index.values())

    def insert(self, func: Func, args: list[Any], diff: Sequence[Any]) -> Func:
        tree = self._rest.combine(diff)
        if self._owner is not None:
            return self._owner.rebuild(tree)
        args[0] = tree
        return func

    def arrange(self, grads: Sequence[Any]) -> Any:
        """The gradients by path, in the structure of `grad_states`."""
        by_name = dict(zip(self.labels, grads, strict=True))
        dicts = [{name: by_name[name] for name in each.names} for each in self._selections]
        return jtu.tree_unflatten(self._structure, dicts)


def _find_positions(
    argnums: int | tuple[int, ...], num_args: int, states: PyTree, caller: str
) -> list[int]:
    """The positions in `argnums`, counted from the start."""
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
    """A state tree inside a function, and a way to rebuild the function with another tree."""

    tree: Any
    rebuild: Callable[[Any], Func]


def _find_owner(func: Func) -> _Owner | None:
    """The state tree inside `func`, or `None` if it is passed as an argument."""
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
    # A bound method of a decorated function, such as with `eqx.filter_jit`, is a `Partial`.
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

    def is_wrapped(node: object) -> bool:
        return node is wrapped

    if not any(map(is_wrapped, jtu.tree_leaves(func, is_leaf=is_wrapped))):
        raise TypeError(
            f"Leaves of `{type(wrapped).__name__}` cannot be selected inside of {show(func)}, "
            "which does not contain it as a part of its pytree. Wrap the gradient instead, "
            "as in `eqx.filter_jit(vg.vector_grad(model, ...))`."
        )

    def rebuild(tree: PyTree) -> Any:
        new = inner.rebuild(tree)
        return jtu.tree_map(
            lambda node: new if is_wrapped(node) else node, func, is_leaf=is_wrapped
        )

    return _Owner(inner.tree, rebuild)


def _find_hidden(func: Any) -> _Owner | None:
    """The state tree inside the function that `func` wraps, if `func` is not a pytree."""
    owner = _find_owner(func)
    if owner is not None or func is None:
        return owner
    if isinstance(func, ft.partial):
        return _find_hidden(func.func) or _find_hidden(next(iter(func.args), None))
    return _find_hidden(getattr(func, "__wrapped__", None))


def _refuse_hidden(func: Func, data: object, caller: str) -> None:
    """Raises an error for an array in place of the state tree, if `func` hides a module."""
    owner = _find_hidden(func)
    if owner is not None and FlatTree(owner.tree).differentiable:
        raise TypeError(
            f"`{caller}` would select from the first positional argument of `func`, "
            f"{show(data)}, because `func` hides the `{type(owner.tree).__name__}` inside a "
            "function. Use `equinox.filter_vmap(model)` or `equinox.Partial(func, model)`, "
            "which are pytrees, or pass the model as the first argument. To differentiate "
            "the array, use `argnums`."
        )


@ft.partial(
    jtu.register_dataclass, data_fields=["arrays", "finals"], meta_fields=["rest", "names"]
)
@dataclasses.dataclass(frozen=True)
class Output:
    """An output and its auxiliary data, without the differentiated arrays.

    To JAX, it is a pytree of the other arrays. `finals` are the final values of the references
    that the function sets.
    """

    arrays: Sequence[Any]
    finals: Mapping[int, Any]
    rest: Rest  # of the pair of both, without the differentiated numbers and the arrays
    names: Sequence[str]  # of the differentiated numbers, if there are several

    @property
    def indices(self) -> Sequence[int]:
        """The indices of the differentiated arrays among the leaves of the output."""
        return self.rest.indices[: len(self.rest.indices) - len(self.arrays)]

    @property
    def units(self) -> Sequence[Any]:
        """The units of the differentiated arrays."""
        num_diff = len(self.indices)
        return [None] * num_diff if self.rest.units is None else self.rest.units[:num_diff]

    @property
    def structure(self) -> Any:
        """The structure of the output alone."""
        return self.rest.structure.children()[0]

    def combine(self, numbers: Sequence[Any]) -> tuple[Any, Any]:
        """The output and the auxiliary data."""
        return self.rest.combine([*numbers, *self.arrays])

    def arrange(self, entries: Sequence[Any]) -> Any:
        """The output with an entry for each differentiated array, and `None` elsewhere."""
        return Rest(self.structure, (), self.indices, None).arrange(entries)


def split_output(value: object, aux: PyTree, name: str) -> tuple[tuple[Any, ...], Output]:
    """The arrays in the inexact leaves of `value`, and the rest."""
    flat = FlatTree((value, aux))
    num_leaves, inexact = flat.structure.children()[0].num_leaves, set(flat.differentiable)
    diff, arrays = [], []
    for i, leaf in enumerate(flat.numbers):
        if i < num_leaves and (i in inexact or isinstance(leaf, float | complex)):
            diff.append(i)
        elif eqx.is_array(leaf):
            arrays.append(i)
    if not diff:
        raise TypeError(
            f"`{name}(func=...)` must return an inexact array or a float, or a pytree with "
            f"one in it. Got {show(value)}, in which nothing can be "
            "differentiated."
        )
    split = flat.split([*diff, *arrays])
    names = ("",) if len(diff) == 1 else tuple(map(FlatTree(value).names.__getitem__, diff))
    output = Output(split.diff[len(diff) :], {}, split.rest, names)
    return tuple(split.diff[: len(diff)]), output
