"""Calls a function with other values in its references."""

import contextlib
import inspect
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import jax.ref
from jax.extend.core import jaxprs_in_params, set_current_trace, take_current_trace

from .._tree.state import active, describe, find_stand_in, hold, Overlay, read, StandIn
from .._tree.text import shorten
from .trace import find_refs, is_concrete_ref, trace_operation


class Called(NamedTuple):
    """The output of a function, the references it uses, and final values of those it sets."""

    output: Any
    refs: Mapping[int, jax.Ref]
    finals: Mapping[int, Any]


def call_with(
    func: Callable[..., Any],
    values: Mapping[int, Any],
    *args: object,
    refs: dict[int, jax.Ref] | None = None,
) -> Called:
    """Calls a function with other values in its references, by their `id`.

    Every other reference has its current value. None is set. The references that the function
    uses are added to `refs`, even if it raises.
    """
    refs = {} if refs is None else refs
    shared: dict[int, jax.Ref] = {}
    while True:
        overlay = _Overlay(values, shared, refs)
        try:
            with overlay.enter():
                output = func(*args)
                finals = {key: overlay.find_value(ref) for key, ref in overlay.written.items()}
            return Called(output, refs, finals)
        except _SetBelow as request:
            if request.overlay is not overlay:
                raise
            shared[id(request.ref)] = request.ref
        except Exception as error:
            reason = _find_reason(error)
            if reason is None or not refs:
                raise
            names = shorten(list(map(describe, refs.values())))
            raise ValueError(f"{names}: {reason}") from error


def _find_reason(error: Exception) -> str | None:
    """Why JAX cannot trace a function over references, if it is because of one of them."""
    # JAX has no public type for these errors.
    if type(error).__name__ in ("CustomJVPException", "CustomVJPException"):
        return (
            "a `custom_jvp` or `custom_vjp` function cannot be differentiated by a state "
            "that it reads, because its rule covers only its arguments. Read the `value` "
            "outside, and pass it as an argument."
        )
    # JAX 0.12 fails while it puts the first of these messages together.
    if re.search("not have a corresponding jaxpr input|'Fake' .* 'arg_names'", str(error)):
        return (
            "a state that is set in a loop or compiled function cannot be read in a function "
            "of `jax.lax.custom_linear_solve`, on which `custom_root`, `cg` and `gmres` are "
            "built. Read its `value` before, and pass it as an argument; set it outside."
        )
    return None


class _SetBelow(BaseException):
    """Raised when a state is set in a function that JAX traces separately, such as a loop."""

    def __init__(self, overlay: Overlay, ref: jax.Ref):
        super().__init__()
        self.overlay, self.ref = overlay, ref


# Part of the key of JAX's trace caches. A cached trace holds references for the states with
# these `id`s, and stand-ins for other states.
_shared_refs = jax.make_user_context()


class _Overlay(Overlay):
    def __init__(
        self,
        values: Mapping[int, Any],
        shared: Mapping[int, jax.Ref],
        refs: dict[int, jax.Ref],
    ):
        super().__init__()
        self._values = dict(values)
        self._shared = shared  # states that are references while the function runs
        self._parent: Any = None  # the trace around this one
        self.refs = refs
        self.written: dict[int, jax.Ref] = {}

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        with take_current_trace() as parent:
            self._parent = parent
        self.requires_low = self._parent.requires_low
        active.overlays.append(self)
        try:
            with set_current_trace(self), _shared_refs(frozenset(self._shared)):
                yield
        finally:
            active.overlays.remove(self)
            self._values, self._parent = {}, None  # JAX may keep traces within this one

    # What `State` asks for.

    def read(self, ref: jax.Ref) -> Any:
        self._note(ref)
        stand_in = find_stand_in(ref)
        if self.is_current():
            return self.find_value(ref)
        if stand_in is None or id(ref) in self._shared:
            return ref[...]
        _note_readers(describe(ref))
        return hold(stand_in)

    def write(self, ref: jax.Ref, value: object) -> Any:
        self._note(ref)
        if not self.is_current():
            if id(ref) not in self._shared and find_stand_in(ref) is not None:
                raise _SetBelow(self, ref)
            return jax.ref.swap(ref, ..., value)
        old = self.find_value(ref)
        self._set(ref, jnp.asarray(value, old.dtype))
        return old

    def _set(self, ref: jax.Ref, value: object) -> None:
        self.written[id(ref)] = ref
        self._values[id(ref)] = value

    def is_current(self) -> bool:
        with take_current_trace() as trace:
            return trace is self

    def _note(self, ref: jax.Ref) -> None:
        self.refs[id(ref)] = ref
        if self.busy is not None:
            raise ValueError(
                f"{describe(ref)} is read or set inside of `{self.busy}`, by a rule that JAX "
                "calls while it differentiates, so its gradient would be lost. Read its "
                "`value` before, and pass it as an argument; set it outside."
            )

    def find_value(self, ref: jax.Ref) -> Any:
        """The current value, at the top level of the call."""
        key = id(ref)
        if key not in self._values:
            with self._outside(), set_current_trace(self._parent):
                self._values[key] = read(ref)
        return self._values[key]

    @contextlib.contextmanager
    def _outside(self) -> Iterator[None]:
        overlays = active.overlays
        index = overlays.index(self)
        inner = overlays[index:]
        del overlays[index:]
        try:
            yield
        finally:
            overlays += inner

    # What JAX asks for: to evaluate an operation.

    def _resolve(self, value: object) -> Any:
        if not isinstance(value, StandIn):
            return value
        self.refs[id(value.ref)] = value.ref
        return self.find_value(value.ref)

    def stage_value(self, val: object) -> Any:
        return self._parent.stage_value(self._resolve(val))

    def process_primitive(self, primitive: Any, tracers: Sequence[Any], params: Any, /) -> Any:
        is_reading = any(isinstance(value, StandIn) for value in tracers)
        _refuse_hidden_readers(primitive, params, is_reading)
        values = list(map(self._resolve, tracers))
        refs = find_refs(values, params)
        before, self.busy = self.busy, primitive
        try:
            if not refs:
                return self._parent.process_primitive(primitive, values, params)
            self.refs.update({id(ref): ref for ref in refs})
            with set_current_trace(self._parent):
                traced = trace_operation(primitive, params, values)
                now = {id(ref): self.find_value(ref) for ref in traced.refs}
                others = [value for value in values if not is_concrete_ref(value)]
                results, finals = traced.call(others, now)
        finally:
            self.busy = before
        for ref, value in zip(traced.written, finals, strict=True):
            self._set(ref, value)
        return results

    def _pass_on(self, method: str, primitive: Any, *more: Any, **params: Any) -> Any:
        *functions, values = more
        values = list(map(self._resolve, values))
        before, self.busy = self.busy, primitive
        try:
            return getattr(self._parent, method)(primitive, *functions, values, **params)
        finally:
            self.busy = before

    def process_custom_jvp_call(self, primitive: Any, *args: object, **params: Any) -> Any:
        return self._pass_on("process_custom_jvp_call", primitive, *args, **params)

    def process_custom_vjp_call(self, primitive: Any, *args: object, **params: Any) -> Any:
        return self._pass_on("process_custom_vjp_call", primitive, *args, **params)

    def process_shard_map(
        self, primitive: Any, fun: Callable[..., Any], values: object, **params: Any
    ) -> Any:
        return self._pass_on("process_shard_map", primitive, fun, values, **params)


# The code of functions that were running while a state was read below the top level of a call,
# and the name of that state.
_readers: weakref.WeakKeyDictionary[types.CodeType, str] = weakref.WeakKeyDictionary()


def _note_readers(name: str) -> None:
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not call_with.__code__:
        _readers[frame.f_code] = name
        frame = frame.f_back


def _refuse_hidden_readers(primitive: Any, params: Any, is_reading: bool) -> None:
    """Raises an error if an operation has a function that reads a state but has no closure.

    Equinox closure-converts only functions that have a closure. A value that another function
    reads is a constant to Equinox and lineax, and gets no gradient.
    """
    for param in params.values():
        for part in param if isinstance(param, tuple) else (param,):
            if not isinstance(part, types.FunctionType) or part.__closure__ is not None:
                continue
            name = _readers.get(part.__code__)
            if name is not None:
                raise ValueError(
                    f"{name} is read by `{part.__qualname__}`, which has no closure, and which "
                    f"`{primitive}` treats as a constant, so its gradient would be lost. Read "
                    "its `value` in the function that calls the solver, and close over it."
                )
    if is_reading:  # so the operation may be a compiled function
        for jaxpr in jaxprs_in_params(params):
            for eqn in jaxpr.eqns:
                _refuse_hidden_readers(eqn.primitive, eqn.params, True)
