"""States: named references to values."""

import threading
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.ref
import jax.tree_util as jtu
import numpy as np


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

    __slots__ = ("__weakref__", "leaves", "name", "places", "structure")

    def __init__(self, value: Any, name: str | None = None):
        if isinstance(value, bool | int | float | complex):
            value = np.asarray(value)
        leaves, self.structure = jtu.tree_flatten(value)
        if not any(map(_is_array, leaves)):
            raise TypeError(
                f"`State(value=...)` must hold an array. Got {eqx.tree_pformat(value)}."
            )
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`State(name=...)` must be a string. Got {name!r}.")
        # With a reference in each place where there is an array.
        self.leaves = [_make_ref(leaf) if _is_array(leaf) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        self.name = name

    @property
    def value(self) -> Any:
        leaves = list(self.leaves)
        for i in self.places:
            leaves[i] = read(leaves[i])
        return jtu.tree_unflatten(self.structure, leaves)

    @value.setter
    def value(self, value: Any) -> None:
        leaves, structure = jtu.tree_flatten(value)
        if structure != self.structure or not all(map(_fits, leaves, self.leaves)):
            raise ValueError(
                f"The value of {self!r} must keep its structure, shapes and dtypes, "
                f"{self._describe()}. Got {eqx.tree_pformat(value)}. Make another state for "
                "it."
            )
        written = []
        try:
            for i in self.places:
                ref, leaf = self.leaves[i], leaves[i]
                array = leaf if eqx.is_array(leaf) else jnp.asarray(leaf, ref.dtype)
                written.append((ref, write(ref, array, self)))
        except ValueError:
            for ref, old in written:
                write(ref, old, self)
            raise

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"State({self._describe()}{name})"

    def _describe(self) -> str:
        shapes = list(self.leaves)
        for i in self.places:
            shapes[i] = jax.ShapeDtypeStruct(shapes[i].shape, shapes[i].dtype)
        value = jtu.tree_unflatten(self.structure, shapes)
        return eqx.tree_pformat(value, struct_as_array=True)

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


# JAX takes the buffer of a reference away while it reads it.
_lock = threading.RLock()


def read(ref: jax.Ref) -> jax.Array:
    with _lock:
        return ref[...]


def write(ref: jax.Ref, value: Any, name: Any) -> jax.Array:
    """Sets a reference, or says what to do where JAX cannot. Returns the old value."""
    with _lock:
        old = ref[...] if isinstance(value, jax.core.Tracer) else None
        try:
            return jax.ref.swap(ref, ..., value)
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


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _make_ref(leaf: Any) -> jax.Ref:
    array = jnp.asarray(leaf)
    return jax.new_ref(
        jnp.asarray(array, array.dtype) if jax.typeof(array).weak_type else array
    )


def _fits(new: Any, old: Any) -> bool:
    """Whether a leaf may be set to another one."""
    if not isinstance(old, jax.Ref):
        return new is old or (type(new) is type(old) and bool(new == old))
    if not _is_array(new) and not isinstance(new, bool | int | float | complex):
        return False
    # Without x64, a NumPy array of float64 is float32 to JAX, and a number has no dtype.
    others = [old.dtype] if jax.typeof(new).weak_type else []
    return jnp.shape(new) == old.shape and jnp.result_type(new, *others) == old.dtype
