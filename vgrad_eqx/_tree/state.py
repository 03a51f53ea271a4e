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
from .flat import FlatTree, Split
from .prompt import AtPrompt, brief
from .text import show
from .types import PyTree
from .units import find_factor, refuse_foreign, scale_number, split_unit


_T = TypeVar("_T")


class State(AtPrompt, Generic[_T]):
    """A named reference to a value, which a function may read and set.

    Functions share a state by closing over it. Compiled functions read its current value at
    each call, and set it. Its shapes, dtypes and structure are fixed for life, because
    compiled functions rely on them.

    Threads may read it, and differentiate by it, at once. But JAX does not let two threads run
    compiled functions at once that use the same state.

    To JAX it is a `jax.Ref` for each array. In the fields of an Equinox module it is a leaf,
    shared by copies of the module; `copy.deepcopy` and `pickle` make a state of its own.
    Subclasses tell kinds of states apart, as in `vg.instance(Hidden)`.

    **Arguments:**

    - `value`: the first value, any pytree. Its JAX and NumPy arrays may be set to others of
        the same shape and dtype; all other leaves are fixed. A value that is itself a Python
        number becomes an array, and so does a Quantity of one. A Quantity may be set to one of
        the same dimension, which is converted to its unit.
    - `name`: what to call it in errors. Defaults to nothing.

    **Returns:**

    A state. Its `value` is read and set, by reading and setting the attribute. It also has
    the `name`.

    **Raises:**

    - `TypeError`: if there is no array in `value`.
    - `ValueError`: on setting a value of another structure, shape, dtype or dimension, and
        on setting any under `jax.vmap`. The state keeps its old value then.
    - `RuntimeError`: on reading, after a function under `jax.jit` that uses the state has
        failed at run time. JAX has taken the array of the state then; set its `value` anew.
        Under [`vgrad_eqx.jit`][], which donates none, it has its old value instead.

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
        # Those that are pytrees keep their unit.
        refuse_foreign(flat.leaves, "State(value=...)")
        arrays = flat.split([i for i, leaf in enumerate(flat.leaves) if _holds_array(leaf)])
        if not arrays.diff:
            raise TypeError(f"`State(value=...)` must hold an array. Got {show(value)}.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`State(name=...)` must be a string. Got {show(name)}.")
        # The value, with a reference in the place of each array.
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
                f"{show(value)}. Make another state for it."
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

    # Without these, NumPy would make an array of objects of it, and Equinox, when it saves a
    # module, would leave it out and say nothing.
    def __array__(self, *args: object, **kwargs: object) -> Any:
        raise TypeError(self._describe_mistake())

    # Raises when it is looked for, since JAX does not call it everywhere, and another error
    # than a `TypeError`, in the place of which JAX raises its own.
    @property
    def __jax_array__(self) -> Any:
        raise ValueError(self._describe_mistake())

    def _describe_mistake(self) -> str:
        return (
            f"{self!r} is a reference and no array. Take its `value`. To save the states of a "
            "module, use `vg.save`."
        )

    def __getattr__(self, name: str) -> Any:
        hint = " It is a reference. Take its `value`." if hasattr(jax.Array, name) else ""
        raise AttributeError(
            f"`{type(self).__name__}` has no attribute `{name}`.{hint}", name=name, obj=self
        )


# What people do with arrays, and so with a state whose `value` they forgot. But two states
# compare, because they are keys of dicts.
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and xor or".split()
_OTHERS = (
    "lt le gt ge neg pos abs invert getitem setitem len bool int float complex round".split()
)
for _name in [*_BINARY, *[f"r{name}" for name in _BINARY], *_OTHERS]:
    setattr(State, f"__{_name}__", State.__array__)


def _make_state(cls: type[State], value: object, name: str | None) -> State:
    state = cls.__new__(cls)
    State.__init__(state, value, name)
    return state


def refuse_brainstate(leaves: Sequence[Any], caller: str) -> None:
    """Raises if there are states or modules of brainstate among leaves."""
    if "brainstate" not in sys.modules:
        return
    for leaf in leaves:
        if any(
            each.__module__.partition(".")[0] == "brainstate" for each in type(leaf).__mro__
        ):
            raise TypeError(
                f"`{caller}` must not hold objects of brainstate. Got a "
                f"`{type(leaf).__name__}`. Use `vg.State(value)` for it, or the arrays in "
                "`states` of `graphdef, states = brainstate.graph.treefy_split(net)`, and put "
                "the net together by `brainstate.graph.treefy_merge` in `func`."
            )


def is_reference(node: object) -> bool:
    return isinstance(node, State | jax.Ref)


# Whether a state was ever made. Without one, no call has to look after any.
exists = threading.Event()


class Overlay(jax.core.Trace):
    """Values in the place of those in references, while a function runs."""

    busy: Any = None  # the operation that JAX evaluates


class _Active(threading.local):
    def __init__(self):
        self.overlays: list[Any] = []


# The overlays of this thread. The last one counts.
active = _Active()


# What evaluates operations at once.
with jax.ensure_compile_time_eval(), take_current_trace() as _evaluation:
    pass


def is_evaluating() -> bool:
    """Whether operations are evaluated now, on the values that states have."""
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
        """JAX asks this whenever an operation takes a stand-in."""
        overlay = active.overlays[-1] if active.overlays else None
        if overlay is None or overlay.busy is not None:
            where = "after the call" if overlay is None else f"inside of `{overlay.busy}`"
            raise ValueError(
                f"{self.describe()} is used {where} by a function that was traced during a "
                "gradient. Read its `value` before, and pass it as an argument."
            )
        return True


class StandIn(jax.core.Tracer):
    """What a function sees of the value of a state, where JAX traces it by itself.

    The function may be cached, so there is one for each reference, for life. The overlay that
    evaluates the function knows the value.
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
    """What errors call a reference."""
    stand_in = find_stand_in(ref)
    return "A `jax.Ref`" if stand_in is None else stand_in.describe()


hold_p = Primitive("read_state")
hold_p.def_impl(lambda value: value)
hold_p.def_abstract_eval(lambda aval: aval)
ad.deflinear2(hold_p, lambda cotangent, _: [cotangent])
batching.defvectorized(hold_p)
mlir.register_lowering(hold_p, lambda ctx, value: [value])


def hold(value: object) -> Any:
    """The value itself, as the result of an operation."""
    return hold_p.bind(value)


# JAX takes the buffer of a reference away while it reads it.
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
            "function, which then failed. Set its `value`, say to that of a checkpoint, and "
            "call the function again. Under `vg.jit`, states keep their old values."
        ) from error


def write(ref: jax.Ref, value: object, name: object = None) -> Any:
    """Sets a reference, or says what to do where JAX cannot. Returns the old value."""
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
                    "set it. Return the value from the function that is mapped, and set it "
                    "outside of `jax.vmap`."
                ) from error
            ref[...] = old  # JAX has set it before it raised
            raise ValueError(
                f"{name} cannot be set to a value that another transformation "
                "differentiates. Differentiate by an operator of `vgrad_eqx`, which passes it "
                "on, or return it as auxiliary data and set it afterwards."
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
    # JAX keeps the array of a reference in a place that is not public, and reads it to swap.
    ref._refs._buf = jax.new_ref(value)._refs._buf  # noqa: SLF001
    return value


def find_arrays(refs: Sequence[jax.Ref]) -> list[Any]:
    """The arrays in references, not copied (which takes 0.2 ms), so they are not for users."""
    arrays = [ref._refs._buf for ref in refs]  # noqa: SLF001
    if any(map(operator.methodcaller("is_deleted"), arrays)):
        for ref in refs:
            read(ref)  # which says what has happened
    return arrays


def set_arrays(refs: Sequence[jax.Ref], old: Sequence[Any], new: Mapping[int, Any]) -> None:
    """Sets references, by their index, to arrays that nobody else holds.

    All or none, whenever an interrupt comes. Raises if one is not what it was before.
    """
    homes = [refs[i]._refs for i in new]  # noqa: SLF001
    with lock:
        for i, home in zip(new, homes, strict=True):
            if home._buf is not old[i]:  # noqa: SLF001
                raise RuntimeError(
                    f"{describe(refs[i])} was set elsewhere while a function under `vg.jit` "
                    "ran that sets it, and has kept that value. Let one run after the other."
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
