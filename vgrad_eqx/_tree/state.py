"""States: named references to values."""

import re
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.ref
import numpy as np

from .cache import is_equal
from .flat import FlatTree, Split
from .text import show
from .units import split_unit


class State:
    """A named reference to a value, which a function may read and set.

    Functions share a state by closing over it. Compiled functions read its current value at
    each call, and set it. Its shapes, dtypes and structure are fixed for life, because
    compiled functions rely on them.

    Threads may read it, and differentiate by it, at once. But JAX does not let two threads run
    compiled functions at once that use the same state.

    To JAX it is a `jax.Ref` for each array. In the fields of an Equinox module it is a leaf,
    shared by copies of the module; `copy.deepcopy` and `pickle` make a state of its own.

    **Arguments:**

    - `value`: the first value, any pytree. Its JAX and NumPy arrays may be set to others of
        the same shape and dtype; all other leaves are fixed. A value that is itself a Python
        number becomes an array.
    - `name`: what to call it in errors. Defaults to nothing.

    **Returns:**

    A state. Its `value` is read and set, by reading and setting the attribute. It also has
    the `name`.

    **Raises:**

    - `TypeError`: if there is no array in `value`.
    - `ValueError`: on setting a value of another structure, shape or dtype, and
        on setting any under `jax.vmap`. The state keeps its old value then.

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

    __slots__ = ("__weakref__", "content", "name")

    def __init__(self, value: Any, name: str | None = None):
        if isinstance(value, bool | int | float | complex):
            value = np.asarray(value)
        flat = FlatTree(value)
        arrays = flat.split([i for i, leaf in enumerate(flat.leaves) if _holds_array(leaf)])
        if not arrays.diff:
            raise TypeError(f"`State(value=...)` must hold an array. Got {show(value)}.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`State(name=...)` must be a string. Got {show(name)}.")
        # The value, with a reference in the place of each array.
        self.content = Split(list(map(_make_ref, arrays.diff)), arrays.rest)
        self.name = name
        exists.set()

    @property
    def refs(self) -> Sequence[jax.Ref]:
        return self.content.diff

    @property
    def value(self) -> Any:
        return self.content.rest.combine(list(map(read, self.refs)))

    @value.setter
    def value(self, value: Any) -> None:
        arrays = self._find_arrays(value)
        if arrays is None:
            raise ValueError(
                f"The value of {self!r} must keep its structure, shapes and dtypes, "
                f"{self._describe()}. Got {show(value)}. Make another state for "
                "it."
            )
        written = []
        try:
            for ref, array in zip(self.refs, arrays, strict=True):
                array = array if eqx.is_array(array) else jnp.asarray(array, ref.dtype)
                written.append((ref, write(ref, array, self)))
        except ValueError:
            for ref, old in written:
                write(ref, old, self)
            raise

    def _find_arrays(self, value: Any) -> Sequence[Any] | None:
        """The arrays in a value for this state, or `None` if the value does not fit."""
        flat, rest = FlatTree(value), self.content.rest
        if flat.structure != rest.structure:
            return None
        arrays = flat.split(rest.indices)
        if not all(map(_fits, arrays.diff, self.refs)) or arrays.rest.units != rest.units:
            return None
        if not all(map(is_equal, arrays.rest.constants, rest.constants)):
            return None
        return arrays.diff

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"State({self._describe()}{name})"

    def _describe(self) -> str:
        shapes = [jax.ShapeDtypeStruct(ref.shape, ref.dtype) for ref in self.refs]
        return eqx.tree_pformat(self.content.rest.combine(shapes), struct_as_array=True)

    def __reduce__(self) -> Any:
        return State, (self.value, self.name)

    # Without these, NumPy would make an array of objects of it, and Equinox, when it saves a
    # module, would leave it out and say nothing.
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self!r} is a reference and no array. Take its `value`. To save the states of a "
            "module, use `vg.save`."
        )

    __jax_array__ = __array__


def is_reference(node: Any) -> bool:
    return isinstance(node, State | jax.Ref)


# Whether a state was ever made. Without one, no call has to look after any.
exists = threading.Event()


class Journal(dict[int, tuple[jax.Ref, jax.Array]]):
    """References that were set, by their `id`, each with the value that it had before.

    JAX runs a function that is differentiated with the references themselves. The journal
    undoes what it has set, after an exception.
    """

    def restore(self) -> None:
        with lock, jax.core.eval_context():
            for ref, old in self.values():
                ref[...] = old


class _Journals(threading.local):
    def __init__(self):
        self.active: list[Journal] = []


# The journals of this thread. The call that begins one takes it away again.
journals = _Journals()

# References that compiled code sets, of which a journal is not told.
set_by_compiled: weakref.WeakSet[jax.Ref] = weakref.WeakSet()

# JAX takes the buffer of a reference away while it reads it.
lock = threading.RLock()


def read(ref: jax.Ref) -> jax.Array:
    with lock:
        return ref[...]


def write(ref: jax.Ref, value: Any, name: Any) -> jax.Array:
    """Sets a reference, or says what to do where JAX cannot. Returns the old value."""
    with lock:
        is_traced = isinstance(ref, jax.core.Tracer)
        before = None
        if journals.active and not is_traced:
            with jax.core.eval_context():  # the value now, also while a loop is traced
                before = ref[...]
        old = ref[...] if isinstance(value, jax.core.Tracer) else None
        if isinstance(old, jax.core.Tracer) and not is_traced:
            set_by_compiled.add(ref)
        try:
            swapped = jax.ref.swap(ref, ..., value)
        except Exception as error:
            if type(error) is not Exception:  # JAX has no type for these two errors
                raise
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
        for journal in journals.active:
            if before is not None:
                journal.setdefault(id(ref), (ref, before))
        return swapped


def is_about_references(error: BaseException | None) -> bool:
    """Whether JAX has refused what a function does with references."""
    while error is not None:
        if _ABOUT_REFERENCES.search(str(error)):
            return True
        error = error.__cause__
    return False


# JAX has no types for these errors: of a value that is differentiated, and set or added to a
# reference that is not; and one of a loop whose condition and body share a reference.
_ABOUT_REFERENCES = re.compile(
    r"non-differentiated array reference|reference to a mutable array|Zero\(Ref|to addupdate"
)


def find_states(leaves: Sequence[Any]) -> list[int]:
    """The indices of the states among leaves."""
    if not any(issubclass(leaf_type, State) for leaf_type in set(map(type, leaves))):
        return []
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, State)]


def _holds_array(leaf: Any) -> bool:
    number, unit = split_unit(leaf)
    return _is_array(number) or (unit is not None and isinstance(number, int | float | complex))


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _make_ref(leaf: Any) -> jax.Ref:
    array = jnp.asarray(leaf)
    return jax.new_ref(
        jnp.asarray(array, array.dtype) if jax.typeof(array).weak_type else array
    )


def _fits(new: Any, ref: jax.Ref) -> bool:
    """Whether a reference may be set to an array or a number."""
    if not _is_array(new) and not isinstance(new, bool | int | float | complex):
        return False
    # Without x64, a NumPy array of float64 is float32 to JAX, and a number has no dtype.
    others = [ref.dtype] if jax.typeof(new).weak_type else []
    return jnp.shape(new) == ref.shape and jnp.result_type(new, *others) == ref.dtype
