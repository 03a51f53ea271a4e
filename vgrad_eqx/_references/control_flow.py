"""Equations that contain jaxprs, such as loops, over values instead of references."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn
from jax.extend.core.primitives import cond_p, jit_p, remat_p, scan_p, while_p

from .._tree.flat import replace_at
from .._tree.types import PyTree


# Takes the values of all references and the other inputs, with `None` in place of references.
# Returns the outputs, and the values of the references that are written.
Pure = Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], list[Any]]]


# The index of the reference that each input is, or `None` for other inputs.
Slots = tuple[int | None, ...]


class NestedEquation(NamedTuple):
    """An equation some of whose inputs are references."""

    params: dict[str, Any]
    slots: Slots
    written: Sequence[int]
    purify: Callable[[Any, Slots, Sequence[int]], Pure]

    def pure(self, jaxpr: Any, slots: Slots) -> Pure:
        return self.purify(jaxpr, slots, self.written)

    def update(self, states: Sequence[Any], finals: Sequence[Any]) -> list[Any]:
        return replace_at(states, self.written, finals)


def _call(inner: NestedEquation, states: Sequence[Any], inputs: Sequence[Any]) -> Any:
    pure = inner.pure(inner.params["jaxpr"], inner.slots)
    outputs, finals = pure(states, _constrain(inputs, inner.params["in_shardings"]))
    return _constrain(outputs, inner.params["out_shardings"]), finals


def _constrain(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    return [
        jax.lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, jax.sharding.Sharding) and value is not None
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]


def _checkpoint(inner: NestedEquation, states: Sequence[Any], inputs: Sequence[Any]) -> Any:
    pure = inner.pure(inner.params["jaxpr"], inner.slots)
    options = {name: inner.params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(pure, **options)(states, inputs)


def _switch(inner: NestedEquation, states: Sequence[Any], inputs: Sequence[Any]) -> Any:
    branches = [inner.pure(branch, inner.slots[1:]) for branch in inner.params["branches"]]
    return jax.lax.switch(inputs[0], branches, states, inputs[1:])


def _scan(inner: NestedEquation, states: Sequence[Any], inputs: Sequence[Any]) -> Any:
    pure = inner.pure(inner.params["jaxpr"], inner.slots)
    num_consts, num_carry = _count_scan(inner.params)
    consts, rest = inputs[:num_consts], inputs[num_consts:]

    def body(carry: PyTree, xs: PyTree) -> Any:
        values, finals = carry
        outputs, finals = pure(inner.update(states, finals), [*consts, *values, *xs])
        return (outputs[:num_carry], finals), outputs[num_carry:]

    options = {name: inner.params[name] for name in ("length", "reverse", "unroll")}
    init = (list(rest[:num_carry]), [states[i] for i in inner.written])
    (values, finals), ys = jax.lax.scan(body, init, list(rest[num_carry:]), **options)
    return [*values, *ys], finals


def _count_scan(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values."""
    if "ft_in" in params:  # since JAX 0.12
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
        return num_consts, num_carry
    return params["num_consts"], params["num_carry"]


def _while(inner: NestedEquation, states: Sequence[Any], inputs: Sequence[Any]) -> Any:
    num_cond, num_body = inner.params["cond_nconsts"], inner.params["body_nconsts"]
    num_consts = num_cond + num_body
    slots = inner.slots
    keep_on = inner.pure(inner.params["cond_jaxpr"], (*slots[:num_cond], *slots[num_consts:]))
    step = inner.pure(inner.params["body_jaxpr"], slots[num_cond:])

    def cond(carry: PyTree) -> Any:
        values, finals = carry
        outputs, _ = keep_on(inner.update(states, finals), [*inputs[:num_cond], *values])
        return outputs[0]

    def body(carry: PyTree) -> Any:
        values, finals = carry
        args = [*inputs[num_cond:num_consts], *values]
        return step(inner.update(states, finals), args)

    init = (list(inputs[num_consts:]), [states[i] for i in inner.written])
    return jax.lax.while_loop(cond, body, init)


_rules = {jit_p: _call, remat_p: _checkpoint, cond_p: _switch, scan_p: _scan, while_p: _while}


def find_rule(eqn: JaxprEqn, slots: Slots) -> Any:
    """A function that evaluates an equation with values, or `None` if it needs references."""
    # A reference in the carry or the scanned inputs of a scan must stay a reference.
    if eqn.primitive is scan_p:
        num_consts, _ = _count_scan(eqn.params)
        if any(slot is not None for slot in slots[num_consts:]):
            return None
    return _rules.get(eqn.primitive)
