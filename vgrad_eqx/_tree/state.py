"""States: named references to values."""

import collections
import itertools
import operator
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.ref
import numpy as np
from jax.extend.core import Primitive, take_current_trace
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike

from .cache import is_equal
from .flat import FlatTree, refuse_foreign, Split
from .prompt import AtPrompt, brief
from .text import show
from .types import PyTree
from .units import find_factor, scale_number, split_unit


_T = TypeVar("_T")


class State(AtPrompt, Generic[_T]):
    """A named reference to a value, which a function may read and set.

    Functions share a state by closing over it. Compiled functions read its current value and
    set it at each call. Its shapes, dtypes and structure never change, because compiled
    functions rely on them.

    Several threads may read it and differentiate with respect to it at the same time, but JAX
    does not allow two threads to run compiled functions that use the same state at the same
    time.

    To JAX, it is one `jax.Ref` per array. As a field of an Equinox module, it is a leaf, which
    copies of the module share; `copy.deepcopy` and `pickle` create an independent state.
    Subclasses can distinguish kinds of states, as in `vg.instance(Hidden)`.

    **Arguments:**

    - `value`: the initial value, any pytree. Its JAX and NumPy arrays may be set to others with
        the same shape and dtype; all other leaves are fixed. A value that is itself a Python
        number, or a Quantity of one, becomes an array. A Quantity may be set to another one of
        the same dimension, which is converted to the unit of the first.
    - `name`: the name to use in error messages. Defaults to none.

    **Returns:**

    A state. Read and set its value through the attribute `value`. It also has the attribute
    `name`.

    **Raises:**

    - `TypeError`: if `value` contains no array.
    - `ValueError`: on setting a value that differs in structure, shape, dtype or dimension, and
        on setting any value under `jax.vmap`. The state then keeps its old value.
    - `RuntimeError`: on reading, if a function under `jax.jit` that uses the state has failed
        at run time. JAX has then donated the array of the state, and its `value` must be set
        again. Under [`vgrad_eqx.jit`][], which does not donate it, it keeps its old value.

    **Example:**

        >>> import jax, jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> count = vg.State(jnp.array(0, "int32"), name="count")
        >>> @jax.jit
        ... def step():
        ...     count.value += 1
        >>> step(), step(), count
        (None, None, State(i32[], name='count'))
        >>> int(count.value)
        2

    **Source:** `brainstate.State`, brainstate 0.5, for the interface; `jax.new_ref`, JAX 0.10,
    for what it means under transformations.
    """

    __slots__ = ("__weakref__", "content", "name", "stand_ins")

    _inner = frozenset({"content", "refs", "stand_ins"})

    def __init__(self, value: _T, name: str | None = None):
        if isinstance(value, bool | int | float | complex):
            value = np.asarray(value)  # pyright: ignore[reportAssignmentType]
        flat = FlatTree(value)
        # Quantities of other libraries that are pytrees keep their unit.
        refuse_foreign(flat.leaves, "State(value=...)")
        arrays = flat.split([i for i, leaf in enumerate(flat.leaves) if _holds_array(leaf)])
        if not arrays.diff:
            raise TypeError(f"`State(value=...)` must hold an array. Got {show(value)}.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`State(name=...)` must be a string. Got {show(name)}.")
        # The value, with a reference in place of each array.
        self.content = Split(list(map(_make_ref, arrays.diff)), arrays.rest)
        self.name = name
        self.stand_ins = [StandIn(ref, self) for ref in self.refs if not is_traced(ref)]
        exists.set()

    @property
    def refs(self) -> Sequence[jax.Ref]:
        return self.content.diff

    @property
    def value(self) -> _T:
        return self.content.rest.combine(list(map(read, self.refs)))

    @value.setter
    def value(self, value: _T | ArrayLike) -> None:
        arrays = self._find_arrays(value)
        if arrays is None:
            raise ValueError(
                f"The value of {self!r} must keep its structure, shapes and dtypes, and "
                f"the dimensions of units, {self._describe()}. Got "
                f"{show(value)}. Create another state for it."
            )
        pairs = zip(self.refs, arrays, strict=True)
        arrays = [x if eqx.is_array(x) else jnp.asarray(x, ref.dtype) for ref, x in pairs]
        write_all(self.refs, arrays, self)

    def _find_arrays(self, value: object) -> Sequence[Any] | None:
        """The arrays in a value for this state, or `None` if the value does not fit."""
        flat, rest = FlatTree(value), self.content.rest
        if flat.structure != rest.structure:
            return None
        arrays = flat.split(rest.indices)
        numbers = arrays.diff
        if arrays.rest.units != rest.units:
            blank = [None] * len(numbers)
            pairs = zip(arrays.rest.units or blank, rest.units or blank, strict=True)
            factors = [find_factor(unit, to) for unit, to in pairs]
            found = [factor for factor in factors if factor is not None]
            if len(found) < len(factors):
                return None
            numbers = list(map(scale_number, numbers, found))
        if not all(map(_fits, numbers, self.refs)):
            return None
        if not all(map(is_equal, arrays.rest.constants, rest.constants)):
            return None
        return numbers

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"{type(self).__name__}({self._describe()}{name})"

    def _describe(self) -> str:
        shapes = [jax.ShapeDtypeStruct(ref.shape, ref.dtype) for ref in self.refs]
        return brief(self.content.rest.combine(shapes))

    def __reduce__(self) -> Any:
        # The attributes of a subclass, in the form that `copy` and `pickle` take.
        slots = [
            name for each in type(self).__mro__ for name in vars(each).get("__slots__", ())
        ]
        others = {
            name: getattr(self, name)
            for name in slots
            if name not in State.__slots__ and name != "__dict__" and hasattr(self, name)
        }
        attributes = (getattr(self, "__dict__", None) or None, others)
        return _make_state, (type(self), self.value, self.name), attributes

    # Without this, NumPy would make an object array of it, and Equinox would silently skip it
    # when saving a module.
    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise TypeError(self._describe_mistake())

    # Raises on lookup, since JAX does not always call it; and not a `TypeError`, which JAX
    # would replace with its own.
    @property
    def __jax_array__(self) -> Any:
        raise ValueError(self._describe_mistake())

    def _describe_mistake(self) -> str:
        return (
            f"{self!r} is a reference, not an array. Use its `value`. To save the states of a "
            "module, use `vg.save`."
        )

    def __getattr__(self, name: str) -> Any:
        hint = " It is a reference. Use its `value`." if hasattr(jax.Array, name) else ""
        raise AttributeError(
            f"`{type(self).__name__}` has no attribute `{name}`.{hint}", name=name, obj=self
        )


# Array operations, which users try on a state when they forget its `value`. Equality is left
# alone, because states may be dict keys.
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
_OTHERS = (
    "lt le gt ge neg pos abs invert getitem setitem len bool int float complex round".split()
)
for _name in [*_BINARY, *[f"r{name}" for name in _BINARY], *_OTHERS]:
    setattr(State, f"__{_name}__", State.__array__)


def list_content(state: State, name: str | None) -> dict[str, Any]:
    """The leaves of the value of a state by name, with references in place of arrays."""
    value = FlatTree(state.content.combine())
    names = [".".join(filter(None, (name, each))) for each in value.names]
    return dict(zip(names, value.leaves, strict=True))


def _make_state(cls: type[State], value: object, name: str | None) -> State:
    state = cls.__new__(cls)
    State.__init__(state, value, name)
    return state


def is_of_brainstate(value: object) -> bool:
    return any(
        each.__module__.partition(".")[0] == "brainstate" for each in type(value).__mro__
    )


def refuse_brainstate(leaves: Sequence[Any], caller: str) -> None:
    """Raises an error if a leaf is a state or module of brainstate."""
    if "brainstate" not in sys.modules:
        return
    for leaf in leaves:
        if is_of_brainstate(leaf):
            raise TypeError(
                f"`{caller}` must not hold objects of brainstate. Got a "
                f"`{type(leaf).__name__}`. Use `vg.State(value)` for it, or the arrays in "
                "`states` of `graphdef, states = brainstate.graph.treefy_split(net)`, and "
                "rebuild the net with `brainstate.graph.treefy_merge` in `func`."
            )


def is_reference(node: object) -> bool:
    return isinstance(node, State | jax.Ref)


# Set once a state has been created. Until then, calls skip all handling of states.
exists = threading.Event()


class Overlay(jax.core.Trace):
    """Values that replace those in references while a function runs."""

    busy: Any = None  # the operation that JAX evaluates


class _Active(threading.local):
    def __init__(self):
        self.overlays: list[Any] = []


# The overlays of this thread. The last one is in effect.
active = _Active()


# The trace that evaluates operations eagerly.
with jax.ensure_compile_time_eval(), take_current_trace() as _evaluation:
    pass


def is_evaluating() -> bool:
    """Whether operations are evaluated eagerly, on the actual values of states."""
    with take_current_trace() as trace:
        return trace is _evaluation and not active.overlays


class _StandInTrace(jax.core.Trace):
    def __init__(self, state: State):
        super().__init__()
        self.state = weakref.ref(state)

    def describe(self) -> str:
        state = self.state()
        return "A state" if state is None else repr(state)

    def is_valid(self) -> bool:
        """Called by JAX whenever an operation takes a stand-in."""
        overlay = active.overlays[-1] if active.overlays else None
        if overlay is None or overlay.busy is not None:
            where = "after the call" if overlay is None else f"inside of `{overlay.busy}`"
            raise ValueError(
                f"{self.describe()} is used {where} by a function that was traced during a "
                "gradient. Read its `value` before, and pass it as an argument."
            )
        return True


class StandIn(jax.core.Tracer):
    """Stands for the value of a state in a function that JAX traces separately.

    The function may be cached, so each reference has one stand-in for its whole life. The
    overlay that evaluates the function supplies the value.
    """

    __slots__ = ("describe", "ref", "state")

    def __init__(self, ref: jax.Ref, state: State):
        trace = _StandInTrace(state)
        super().__init__(trace, jax.typeof(ref).inner_aval)
        self.ref = ref
        self.state = trace.state
        self.describe = trace.describe
        _stand_ins[id(ref)] = self


_stand_ins: weakref.WeakValueDictionary[int, StandIn] = weakref.WeakValueDictionary()


def find_stand_in(ref: object) -> StandIn | None:
    return _stand_ins.get(id(ref))


def describe(ref: object) -> str:
    """The name of a reference in errors."""
    stand_in = find_stand_in(ref)
    return "A `jax.Ref`" if stand_in is None else stand_in.describe()


hold_p = Primitive("read_state")
hold_p.def_impl(lambda value: value)
hold_p.def_abstract_eval(lambda aval: aval)
ad.deflinear2(hold_p, lambda cotangent, _: [cotangent])
batching.defvectorized(hold_p)
mlir.register_lowering(hold_p, lambda ctx, value: [value])


def hold(value: object) -> Any:
    """The value unchanged, as the result of an operation."""
    return hold_p.bind(value)


# JAX removes the buffer of a reference while reading it.
lock = threading.RLock()


def is_traced(ref: object) -> bool:
    """Whether a reference was made in a function while JAX traced it."""
    return isinstance(ref, jax.core.Tracer)


def read(ref: jax.Ref) -> Any:
    if active.overlays and not is_traced(ref):
        return active.overlays[-1].read(ref)
    try:
        with lock:
            return ref[...]
    except RuntimeError as error:
        if "deleted" not in str(error):
            raise
        raise RuntimeError(
            f"{describe(ref)} has lost its value: JAX had taken its array for a compiled "
            "function, which then failed. Set its `value`, for example from a checkpoint, and "
            "call the function again. Under `vg.jit`, states keep their old values."
        ) from error


def write(ref: jax.Ref, value: object, name: object = None) -> Any:
    """Sets a reference, with a clear error where JAX cannot. Returns the old value."""
    overlay = active.overlays[-1] if active.overlays and not is_traced(ref) else None
    if overlay is not None and overlay.is_current():
        return overlay.write(ref, value)
    with lock:
        old = read(ref) if isinstance(value, jax.core.Tracer) else None
        try:
            return _swap(ref, value) if overlay is None else overlay.write(ref, value)
        except Exception as error:
            if type(error) is not Exception:  # JAX has no type for these two errors
                raise
            name = describe(ref) if name is None else name
            if "vmapped" in str(error):
                raise ValueError(
                    f"{name} cannot be set inside of `jax.vmap`, where each element would "
                    "set it. Return the value from the mapped function, and set it "
                    "outside of `jax.vmap`."
                ) from error
            ref[...] = old  # JAX sets it before raising
            raise ValueError(
                f"{name} cannot be set to a value that another transformation "
                "differentiates. Differentiate with an operator of `vgrad_eqx`, which supports "
                "this, or return the value as auxiliary data and set it afterwards."
            ) from error


def write_all(refs: Iterable[jax.Ref], values: Iterable[object], name: object = None) -> None:
    """Sets all references, or none."""
    written = []
    try:
        for ref, value in zip(refs, values, strict=True):
            written.append((ref, write(ref, value, name)))
    except BaseException:
        for ref, old in written:
            write(ref, old, name)
        raise


def _swap(ref: jax.Ref, value: object) -> Any:
    try:
        return jax.ref.swap(ref, ..., value)
    except RuntimeError as error:
        if "deleted" not in str(error) or isinstance(value, jax.core.Tracer):
            raise
    # JAX keeps the array of a reference in a private attribute, and reads it to swap.
    ref._refs._buf = jax.new_ref(value)._refs._buf  # noqa: SLF001
    return value


def find_arrays(refs: Sequence[jax.Ref]) -> list[Any]:
    """The arrays in references, not copied (which takes 0.2 ms). Never give them to users."""
    arrays = [ref._refs._buf for ref in refs]  # noqa: SLF001
    if any(map(operator.methodcaller("is_deleted"), arrays)):
        for ref in refs:
            read(ref)  # raises a clear error
    return arrays


def set_arrays(refs: Sequence[jax.Ref], old: Sequence[Any], new: Mapping[int, Any]) -> None:
    """Sets references, by their index, to arrays that nothing else refers to.

    All or none is set, even on an interrupt. Raises an error if one has changed since `old`.
    """
    homes = [refs[i]._refs for i in new]  # noqa: SLF001
    with lock:
        for i, home in zip(new, homes, strict=True):
            if home._buf is not old[i]:  # noqa: SLF001
                raise RuntimeError(
                    f"{describe(refs[i])} was set elsewhere while a function under `vg.jit` "
                    "that sets it was running, and keeps that value. Run one after the other."
                )
        collections.deque(map(setattr, homes, itertools.repeat("_buf"), new.values()), 0)


def find_states(leaves: Sequence[Any]) -> list[int]:
    """The indices of the states among leaves."""
    if not any(issubclass(leaf_type, State) for leaf_type in set(map(type, leaves))):
        return []
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, State)]


def _holds_array(leaf: object) -> bool:
    number, unit = split_unit(leaf)
    return _is_array(number) or (unit is not None and isinstance(number, int | float | complex))


def _is_array(leaf: object) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _make_ref(leaf: object) -> jax.Ref:
    array = jnp.asarray(leaf)
    return jax.new_ref(
        jnp.asarray(array, array.dtype) if jax.typeof(array).weak_type else array
    )


def _fits(new: PyTree, ref: jax.Ref) -> bool:
    """Whether a reference may be set to an array or a number."""
    if not _is_array(new) and not isinstance(new, bool | int | float | complex):
        return False
    # Without x64, a NumPy array of float64 is float32 to JAX, and a number has no dtype.
    others = [ref.dtype] if jax.typeof(new).weak_type else []
    return jnp.shape(new) == ref.shape and jnp.result_type(new, *others) == ref.dtype
