"""Compiled functions whose calls cost little more in Python than `jax.jit` on flat arrays."""

import contextlib
import dataclasses
import functools as ft
import inspect
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    overload,
    ParamSpec,
    Self,
    TYPE_CHECKING,
    TypeVar,
)

import jax
import jax.tree_util as jtu
import numpy as np

from .._gradients.engine import expose, GradientTransform
from .._references.trace import is_concrete_ref
from .._tree.cache import Cache
from .._tree.flat import is_any_traced, is_scalar, Rest, split_arrays
from .._tree.missing import MISSING
from .._tree.numpy_leaves import is_numpy, remember_types
from .._tree.prompt import AtPrompt, write_call
from .._tree.state import is_evaluating, is_reference
from .._tree.text import show
from .callbacks import ANY_CALLBACK, CALLBACKS, explain, has_callback, wait
from .generated import Arrays, make_builder, make_reader
from .over_states import MoreStates, StateProgram


Donate = Literal["all", "all-except-first", "warn", "warn-except-first", "none"]


_P = ParamSpec("_P")
_Q = ParamSpec("_Q")
_T = TypeVar("_T")
_Owner = TypeVar("_Owner")


# A `functools.partial`, because Python calls it faster than any other object.
class Jitted(AtPrompt, ft.partial[_T], Generic[_P, _T]):
    """A function that [`vgrad_eqx.jit`][] has compiled."""

    _inner = frozenset({"args", "func", "keywords"})

    __name__: str
    __qualname__: str
    lower: Callable[_P, Any]

    if TYPE_CHECKING:

        def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _T: ...

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(
        self: "Jitted[Concatenate[_Owner, _Q], _T]", instance: _Owner, owner: type
    ) -> Callable[_Q, _T]: ...

    def __reduce__(self) -> Any:
        return self.__qualname__  # pickled by name, like functions

    def __repr__(self) -> str:
        return write_call("jit", vars(self)["__wrapped__"])

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else types.MethodType(self, instance)


@overload
def jit(*, donate: Donate = "none") -> Callable[[Callable[_P, _T]], Jitted[_P, _T]]: ...


@overload
def jit(func: Callable[_P, _T], *, donate: Donate = "none") -> Jitted[_P, _T]: ...


def jit(func: Callable[..., Any] = MISSING, *, donate: Donate = "none") -> Any:
    """Compiles a function so that a call costs little more than `jax.jit` on flat arrays.

    It does the same as `equinox.filter_jit`, for gradients and any other function: JAX and
    NumPy arrays in the arguments are traced, and everything else is static. Where `filter_jit`
    flattens and rebuilds every module, it generates code for the structure of the arguments
    and results, which extracts the arrays and builds the results. It can be used as a
    decorator, with or without options, also on methods: `@vg.jit` above
    `@vg.vector_grad(...)`.

    **Arguments:**

    - `func`: any function, or a [`vgrad_eqx.GradientTransform`][], as returned by
        [`vgrad_eqx.vector_grad`][] and its siblings.
    - `donate`: which JAX arrays in the arguments to donate, so that their memory can be reused,
        as in `equinox.filter_jit`: those of `"all"` arguments, `"all-except-first"`, or
        `"none"`. `"all"` also donates the arrays of states by reference. `"warn"` and
        `"warn-except-first"` donate the same arrays as these, and JAX warns if it could not
        reuse one.

    **Returns:**

    A function with the arguments and results of `func`. It is recompiled for each new static
    value, such as a number or a flag; the one exception is a Python float to differentiate
    with respect to, which is traced. Arrays in the results are JAX arrays. Inside `jax.jit`, it
    becomes part of the outer program. If `func` is omitted, a decorator is returned.

    States by reference that `func` uses are set when the program has finished: all of them, or
    none if it fails, unless they are donated. If such a program calls back into Python, the
    call blocks until it has finished.

    Its method `lower(*args, **kwargs)` lowers the function as `jax.jit(...).lower(...)` does,
    to inspect the program or to `compile()` it for arguments like these.

    **Raises:**

    - `TypeError`: at once, if `func` is not callable; on calling, if a static value is not
        hashable, because it could change unnoticed.
    - `ValueError`: at once, if `donate` is none of these; on calling, if a `custom_jvp` or
        `custom_vjp` function reads or sets a state by reference.
    - `RuntimeError`: on calling, if a state that `func` sets was set elsewhere in the meantime.
    - `equinox.EquinoxRuntimeError`: on calling, if an `equinox.error_if` in `func` fails.

    **Example:**

        >>> import equinox as eqx, jax, jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> opt = vg.Optimizer(optax.adam(1e-2), mlp)
        >>> loss = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)
        >>> @vg.jit(donate="all")
        ... def make_step(model, opt, x, y):
        ...     var_grads, value = vg.grad(loss, "**", return_value=True)(model, x, y)
        ...     return *opt.step(model, var_grads), value
        >>> for _ in range(3):
        ...     mlp, opt, value = make_step(mlp, opt, jnp.ones((5, 2)), jnp.ones((5, 1)))
        >>> int(opt.count), value.shape
        (3, ())

    **Source:** `equinox.filter_jit`, Equinox 0.13, for what is traced and donated.
    """
    if func is MISSING:
        return ft.partial(jit, donate=donate)
    if not callable(func):
        raise TypeError(f"`jit(func=...)` must be a callable. Got {show(func)}.")
    if not isinstance(donate, str) or donate not in _DONATED:
        raise ValueError(
            f"`jit(donate=...)` must be one of {', '.join(map(repr, _DONATED))}. Got "
            f"{show(donate)}."
        )
    return _compile(func, donate)


def _compile(func: Callable[..., Any], donate: Donate) -> Any:
    programs = _find_programs(func, donate)
    # The arrays of the function are arguments, too; otherwise they would be constants.
    own = split_arrays(func, _is_array).diff

    def call(first=MISSING, /, *rest, **kwargs):
        program = programs.latest
        is_bound = first is not MISSING or not kwargs
        inputs = program.read(first, rest, kwargs) if is_bound else None
        if inputs is None:
            program, inputs = programs.find(func, first, rest, kwargs)
        if own:
            inputs[1].extend(own)
        try:
            result = program.compiled(*inputs)
            if program.is_traced:
                result = program.finish(inputs, result)
        except BaseException as error:
            program.fail(error)
            raise
        return result()

    def read(first=MISSING, /, *rest, **kwargs):
        program, (arrays, others) = programs.find(func, first, rest, kwargs)
        return program, (arrays, [*others, *own])

    jitted = Jitted(ft.update_wrapper(call, func, updated=()))
    jitted.lower = ft.partial(_lower, read)
    return ft.update_wrapper(jitted, func, updated=())


def _lower(
    read: Callable[..., tuple["_Program", Arrays]], *args: object, **kwargs: object
) -> Any:
    program, inputs = read(*args, **kwargs)
    return _Lowered(program.lower(inputs), read)


def _bind(
    func: Callable[..., Any], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Keyword arguments as the first argument, other positional ones, and the rest."""
    try:
        bound = inspect.signature(func).bind(**kwargs)
    except (TypeError, ValueError):  # the call itself says what is wrong
        return MISSING, (), kwargs
    first, *rest = bound.args or (MISSING,)
    return first, tuple(rest), bound.kwargs


class _NoProgram:
    """Stands for the latest program before there is one."""

    @staticmethod
    def read(first: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        return None


class _Programs:
    """The programs of one function, one for each kind of arguments.

    `find_func` gives the function with these arrays.
    """

    def __init__(self, find_func: Callable[[Sequence[Any]], Any], name: str, donate: Donate):
        self._make = ft.partial(_Program, find_func, name, donate)
        self._lock = threading.Lock()
        self._programs: list[_Program] = []
        self.latest: Any = _NoProgram

    def find(
        self,
        func: Callable[..., Any],
        first: Any,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple["_Program", Arrays]:
        """A program for these arguments, and its inputs."""
        if first is MISSING and kwargs:
            first, rest, kwargs = _bind(func, kwargs)
        with self._lock:
            for program in self._programs:
                inputs = program.read(first, rest, kwargs)
                if inputs is not None:
                    self.latest = program
                    return program, inputs
            given = [first, *rest]
            args = _mark_numbers(func, given)
            numbers = [x for x, arg in zip(args, given, strict=True) if x is not arg]
            program = self._make(args, kwargs, numbers)
            inputs = program.read(first, rest, kwargs)
            assert inputs is not None
            self.latest = program
            self._programs = [program, *self._programs[:_MOST]]
        return program, inputs


def _find_programs(func: Callable[..., Any], donate: Donate) -> _Programs:
    """The programs of a function, which are reused if it is passed to `jit` again.

    Modules that differ only in their arrays share them. The programs hold the Python functions
    in a module weakly, and live as long as the first of these functions.
    """
    rest = split_arrays(expose(func), _is_array).rest
    _refuse_unhashable(rest)
    places = {i for i, x in enumerate(rest.constants) if isinstance(x, types.FunctionType)}
    held = [weakref.ref(x) if i in places else x for i, x in enumerate(rest.constants)]
    weak_rest = dataclasses.replace(rest, constants=held)

    def find_func(arrays: Sequence[Any]) -> Any:
        constants = [x() if i in places else x for i, x in enumerate(held)]
        return dataclasses.replace(weak_rest, constants=constants).combine(arrays)

    programs = _Programs(find_func, getattr(func, "__name__", "run"), donate)
    if jtu.all_leaves([func]) and not places:
        return programs
    cache = _of_modules
    if places:
        cache = _of_functions.setdefault(rest.constants[min(places)], Cache())
    key = (donate, rest.structure, *rest.indices, *[(type(x), x) for x in held])
    found = cache.get(key)
    if found is None:
        cache.set(key, programs)
    return programs if found is None else found


_of_functions: weakref.WeakKeyDictionary[Any, Cache] = weakref.WeakKeyDictionary()
_of_modules = Cache()


class _Program:
    """A function compiled for arguments that differ in their arrays only."""

    def __init__(
        self,
        find_func: Callable[[Sequence[Any]], Any],
        name: str,
        donate: Donate,
        args: list[Any],
        kwargs: dict[str, Any],
        numbers: Sequence[Any],
    ):
        """`numbers` are those arguments that stand for Python numbers."""
        trees = args[0], (tuple(args[1:]), kwargs)
        split, other_split = [split_arrays(tree, _is_array) for tree in trees]
        first_rest, other_rest = split.rest, other_split.rest
        num_others = len(other_split.diff)
        _refuse_unhashable(first_rest, other_rest)
        array_types = list(map(type, [*split.diff, *other_split.diff]))
        scalars = [
            any(x is number for number in numbers) for x in [*split.diff, *other_split.diff]
        ]

        def call(arrays: Sequence[Any], others: Sequence[Any]) -> _Result:
            first = first_rest.combine(arrays)
            rest, kwargs = other_rest.combine(others[:num_others])
            func = find_func(others[num_others:])
            args = rest if first is MISSING else (first, *rest)
            with remember_types([*arrays, *others[:num_others]], array_types) as answer:
                out = func(*args, **kwargs)
            self._types_matter |= answer[0]
            arrays = split_arrays(out, _is_array).diff
            return _Result(make_builder(out, _is_array), arrays)

        def run(*inputs: Any) -> _Result:
            if not is_evaluating():  # as under `jax.disable_jit`
                self._begin()
            return call(*inputs)

        # Nothing is donated under `vmap` and `grad`, which cannot reuse a donated array.
        donated = () if is_any_traced([*split.diff, *other_split.diff]) else _DONATED[donate]

        def check(arrays: Sequence[Any], others: Sequence[Any]) -> bool:
            leaves = [*arrays, *others]
            if _DONATED[donate] and is_any_traced(leaves) == bool(donated):
                return False
            return all(
                _is_array(leaf)
                and not (self._types_matter and is_numpy(type(leaf)) != is_numpy(known))
                or (number and is_scalar(leaf))
                for leaf, known, number in zip(leaves, array_types, scalars, strict=True)
            )

        run.__name__ = name
        self._func = call
        self._jitted = jax.jit(run, inline=True, donate_argnums=donated)
        self.compiled: Callable[..., _Result] = self._start
        self.is_traced = False  # by this call
        others = {"rest": trees[1][0], "kwargs": kwargs}
        self.read = make_reader(args[0], others, _is_array, check)
        self._types_matter = False
        self._donate = donate
        self._refs: dict[int, jax.Ref] = {}
        self._waits = False
        self._filters = contextlib.ExitStack()

    def _start(self, *inputs: Any) -> "_Result":
        """The first call, which first finds out what the function does at run time."""
        if is_evaluating() and _is_disabled(jax.config):
            return self._jitted(*inputs)
        self._learn(inputs)
        return self.compiled(*inputs)

    def _begin(self) -> None:
        """Marks the current call as traced, and filters warnings until it ends."""
        self.is_traced = True
        if self._donate.startswith("all"):
            self._filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")

    def _end(self) -> None:
        self.is_traced = False
        self._filters.close()

    def finish(self, inputs: Arrays, result: "_Result") -> Any:
        """Ends a call that was traced, possibly for new shapes."""
        self._end()
        self._learn(inputs)
        return wait(lambda: result) if self._waits else result

    def fail(self, error: BaseException) -> None:
        self._end()
        clear = explain(error)
        if clear is not error:
            raise clear from None

    def lower(self, inputs: Arrays) -> Any:
        try:
            self._learn(inputs)
            return self._jitted.lower(*inputs)
        finally:
            self._end()

    def _learn(self, inputs: Sequence[Any]) -> None:
        """Traces the function to find out what it does at run time, and so how to call it."""
        known = self.compiled != self._start, len(self._refs), self._waits
        jaxpr = self._jitted.trace(*inputs).jaxpr
        self._refs |= {id(ref): ref for ref in jaxpr.consts if is_concrete_ref(ref)}
        self._waits |= has_callback(jaxpr.jaxpr, ANY_CALLBACK if self._refs else CALLBACKS)
        if known == (True, len(self._refs), self._waits):
            return
        self.compiled = ft.partial(wait, self._jitted) if self._waits else self._jitted
        if self._refs:
            refs, is_donated = list(self._refs.values()), self._donate in ("all", "warn")
            over_states = StateProgram(self._func, self._jitted, refs, is_donated, self._waits)
            self.compiled = ft.partial(self._call_over_states, over_states)

    def _call_over_states(self, over_states: StateProgram, *inputs: Any) -> "_Result":
        try:
            return over_states(*inputs)
        except MoreStates:
            self._learn(inputs)
            return self.compiled(*inputs)


# The types of JAX 0.10 do not have it.
_is_disabled = operator.attrgetter("jax_disable_jit")


class _Result(ft.partial):
    """A function that builds the result, bound to the arrays in it.

    To JAX, it is a pytree of those arrays. No Python runs when it is created.
    """


jtu.register_pytree_node(_Result, lambda result: (result.args[0], result.func), _Result)


class _Lowered:
    """What `jax.jit(...).lower(...)` returns, and its `compile()`, for whole pytrees."""

    def __init__(self, lowered: Any, read: Callable[..., tuple[Any, Arrays]]):
        self._lowered = lowered
        self._read = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)

    def compile(self, *args: object, **kwargs: object) -> "_Lowered":
        return _Lowered(self._lowered.compile(*args, **kwargs), self._read)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        _, inputs = self._read(*args, **kwargs)
        return self._lowered(*inputs)()


def _refuse_unhashable(*rests: Rest) -> None:
    """Raises an error for static values that could change unnoticed."""
    for rest in rests:
        for constant in (rest.structure, *rest.constants):
            try:
                hash(constant)
            except TypeError as error:
                raise TypeError(
                    "`jit` recompiles for each static value, so each must be hashable. Got "
                    f"{show(constant)}. Make its class hashable, for example with "
                    "`@dataclasses.dataclass(frozen=True)`, or pass an array."
                ) from error


def _mark_numbers(func: Callable[..., Any], args: list[Any]) -> list[Any]:
    """The arguments, with an array for each Python number to differentiate with respect to."""
    if not isinstance(func, GradientTransform):
        return args
    argnums: Any = func.argnums
    if argnums is None:
        argnums = 0 if func.grad_states is None else ()
    positions = [i % len(args) for i in jtu.tree_leaves(argnums)]
    return [
        np.asarray(arg) if i in positions and is_scalar(arg) else arg
        for i, arg in enumerate(args)
    ]


# The inputs that JAX is told to donate: the first argument, and the others.
_DONATED = {
    "all": (0, 1),
    "all-except-first": (1,),
    "warn": (0, 1),
    "warn-except-first": (1,),
    "none": (),
}
_MOST = 63
_ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, _ARRAYS) and not is_reference(leaf)
