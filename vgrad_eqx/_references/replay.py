"""Evaluates operations on references, such as a loop that sets one, over their values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend as jex
import jax.tree_util as jtu

# Nothing public reads and writes a part of a value as an indexed reference does. JAX 0.10.2
# cannot differentiate everything that it does with its own references, so drop this with 0.10.
from jax._src.state.discharge import discharge_state  # noqa: TID251
from jax.extend.core import DebugInfo, DropVar, Jaxpr, JaxprEqn, jaxprs_in_params, Literal
from jax.extend.core.primitives import get_p, jit_p, scan_p, swap_p

from .._tree.cache import Cache
from .control_flow import find_rule, NestedEquation, Pure, Slots


_NO_INDEX = jtu.tree_structure(())


class Cell:
    """Holds the value of a reference while an operation is replayed without the reference."""

    def __init__(self, value: object):
        self.value = value


class NotFollowed(Exception):
    """Raised for an operation that takes references but has no rule."""


def replay(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr with cells in place of some or all of its references."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    last_uses = _find_last_uses(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        outvars = _keep_vars(eqn.outvars)
        env.update(zip(outvars, _evaluate(eqn, env), strict=True))
        for var in _keep_vars(eqn.invars) + outvars:
            if last_uses[var] == i:  # frees its value, which may be large
                env.pop(var, None)
    return [_read(atom, env) for atom in jaxpr.outvars]


def _find_last_uses(jaxpr: Any) -> dict[Any, int]:
    """The last equation in which each variable occurs."""
    last_uses = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last_uses.update(dict.fromkeys(_keep_vars(eqn.invars) + _keep_vars(eqn.outvars), i))
    last_uses.update(dict.fromkeys(_keep_vars(jaxpr.outvars), len(jaxpr.eqns)))
    return last_uses


def find_written(jaxpr_or_eqn: Any, inputs: Sequence[Any]) -> list[bool]:
    """Which inputs of a jaxpr or an equation are references that it writes."""
    # JAX exports none of these types. An unknown one is treated as a write.
    written = {
        id(effect.input)
        for effect in jaxpr_or_eqn.effects
        if hasattr(effect, "input") and type(effect).__name__ != "ReadEffect"
    }
    return [id(var) in written for var in inputs]


def _keep_vars(atoms: Sequence[Any]) -> list[Any]:
    """Leaves out literals and dropped outputs."""
    return [atom for atom in atoms if not isinstance(atom, Literal | DropVar)]


def _read(atom: object, env: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def _evaluate(eqn: JaxprEqn, env: dict[Any, Any]) -> Sequence[Any]:
    """The outputs of an equation, except dropped ones."""
    inputs = [_read(atom, env) for atom in eqn.invars]
    cells = list({id(value): value for value in inputs if isinstance(value, Cell)}.values())
    if not cells:
        inputs = [env[var] for var in _find_distinct(eqn.invars)]
        return jax.core.eval_jaxpr(_isolate(eqn), (), *inputs)
    if eqn.primitive in (get_p, swap_p) and eqn.params["tree"] == _NO_INDEX:
        old = cells[0].value
        if eqn.primitive is swap_p:
            cells[0].value = inputs[1]
        return [old for _ in _keep_vars(eqn.outvars)]
    slots = tuple([cells.index(x) if isinstance(x, Cell) else None for x in inputs])
    flags = find_written(eqn, eqn.invars)
    written = [
        slot for slot, flag in zip(slots, flags, strict=True) if flag and slot is not None
    ]
    written = tuple(dict.fromkeys(written))
    others = [None if isinstance(value, Cell) else value for value in inputs]
    function = _make_pure_function(eqn, slots, written)
    outputs, finals = function([cell.value for cell in cells], others)
    for slot, final in zip(written, finals, strict=True):
        cells[slot].value = final
    return outputs


def _make_pure_function(eqn: JaxprEqn, slots: Slots, written: Sequence[int]) -> Pure:
    """An equation on references, as a function of their values, without dropped outputs."""
    rule = find_rule(eqn, slots)
    if rule is not None:
        inner = NestedEquation(eqn.params, slots, written, _purify)
        more = (slots, written)
        return _remember(eqn, more, lambda: _jit_rule(eqn, rule, inner))
    if eqn.primitive is scan_p:
        return _use_references(eqn, slots, written)
    if any(True for _ in jaxprs_in_params(eqn.params)):
        raise NotFollowed(str(eqn.primitive))
    return _discharge(eqn, slots, written)


def _use_references(eqn: JaxprEqn, slots: Slots, written: Sequence[int]) -> Pure:
    """An equation with temporary references, which exist only while it is evaluated."""
    jaxpr, places = _isolate(eqn), _find_places(eqn)

    def run(states: Sequence[Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        refs = [jax.new_ref(state) for state in states]
        filled = _fill(slots, refs, inputs)
        outputs = jax.core.eval_jaxpr(jaxpr, (), *[filled[i] for i in places])
        return outputs, [refs[slot][...] for slot in written]

    return run


def _discharge(eqn: JaxprEqn, slots: Slots, written: Sequence[int]) -> Pure:
    """An indexed read or write, as a slice or an update."""
    jaxpr, places = _isolate(eqn), _find_places(eqn)
    order = [slots[i] for i in places if slots[i] is not None]
    core: Any = jex.core  # to a type checker, 0.12 has only one of the two classes of 0.10
    pure = discharge_state(
        core.ClosedJaxpr(jaxpr, []),
        should_discharge=[slots[i] is not None for i in places],
        lower=False,
    )

    def run(states: Sequence[Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        filled = _fill(slots, states, inputs)
        results = jax.core.eval_jaxpr(pure.jaxpr, pure.consts, *[filled[i] for i in places])
        outputs, finals = results[: len(jaxpr.outvars)], results[len(jaxpr.outvars) :]
        by_slot = dict(zip(order, finals, strict=True))
        return outputs, [by_slot[slot] for slot in written]

    return run


def _jit_rule(eqn: JaxprEqn, rule: Any, inner: NestedEquation) -> Pure:
    def replay(states: Sequence[Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        outputs, finals = rule(inner, states, inputs)
        pairs = zip(outputs, eqn.outvars, strict=True)
        return [output for output, var in pairs if not isinstance(var, DropVar)], finals

    if eqn.primitive is not jit_p:
        return jax.jit(replay, inline=True)
    replay.__name__ = eqn.params["name"]
    return jax.jit(replay, inline=eqn.params["inline"])


def _purify(jaxpr: Any, slots: Slots, written: Sequence[int]) -> Pure:
    """A jaxpr, as a function of values instead of references."""
    # It is closed or open, depending on the primitive it comes from.
    inner, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())

    def run(states: Sequence[Any], inputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        cells = [Cell(state) for state in states]
        outputs = replay(inner, consts, _fill(slots, cells, inputs))
        return outputs, [cells[slot].value for slot in written]

    return run


def _fill(slots: Slots, states: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    pairs = zip(slots, inputs, strict=True)
    return [value if slot is None else states[slot] for slot, value in pairs]


# Small, because an entry keeps the jaxpr of a loop alive.
_functions = Cache(64)


def _remember(eqn: JaxprEqn, more: object, make: Callable[[], Any]) -> Any:
    """Creates a function once for equal equations, unless it would keep arrays alive."""
    params = jtu.tree_leaves(list(eqn.params.values()))
    if any(getattr(param, "consts", ()) for param in params):  # of closed jaxprs
        return make()
    dropped = tuple([isinstance(var, DropVar) for var in eqn.outvars])
    context = (eqn.ctx, eqn.source_info.name_stack)
    key = (eqn.primitive, tuple(eqn.params.items()), more, dropped, context)
    function = _functions.get(key)
    if function is None:
        function = make()
        _functions.set(key, function)
    return function


def _isolate(eqn: JaxprEqn) -> Any:
    """A jaxpr with this equation alone, as a function of its distinct variables."""
    debug_info = DebugInfo("replay", eqn.primitive.name, None, None)
    variables, outvars = _find_distinct(eqn.invars), _keep_vars(eqn.outvars)
    return Jaxpr([], variables, outvars, [eqn], eqn.effects, debug_info)


def _find_distinct(atoms: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(_keep_vars(atoms)))


def _find_places(eqn: JaxprEqn) -> list[int]:
    """The positions of the distinct variables among the inputs."""
    places = {atom: i for i, atom in enumerate(eqn.invars) if not isinstance(atom, Literal)}
    return [places[var] for var in _find_distinct(eqn.invars)]
