"""A jaxpr evaluated again, with the values of references instead of the references.

It is meant to be differentiated: operations that are alike are differentiated only once, and
JAX is handed a reference only where it has to be.
"""

import functools as ft
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax.extend.core import DebugInfo, DropVar, Jaxpr, jaxprs_in_params, Literal
from jax.extend.core.primitives import get_p, jit_p, remat_p, swap_p
from jax.ref import AbstractRef

from ._memory import Memory


class Cell:
    """The value of a reference, while a function is replayed without it."""

    def __init__(self, value: Any):
        self.value = value


def replay(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, which is given cells for some or all of its references."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    uses = Counter(_keep_vars(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        uses.update(_keep_vars(eqn.invars))
    for eqn in jaxpr.eqns:
        invars, outvars = _keep_vars(eqn.invars), _keep_vars(eqn.outvars)
        env.update(zip(outvars, _evaluate(eqn, env), strict=True))
        uses.subtract(invars)
        for var in [*invars, *outvars]:
            if not uses[var]:  # its value may be large, and need not live on
                env.pop(var, None)
    return [_read(atom, env) for atom in jaxpr.outvars]


def find_written(jaxpr_or_eqn: Any, inputs: Sequence[Any]) -> list[bool]:
    """Which of the first inputs of a jaxpr or an equation are references that it writes."""
    written = [
        # JAX 0.10.2 replaced the position of an input by its variable.
        getattr(effect, "input", getattr(effect, "input_index", None))
        for effect in jaxpr_or_eqn.effects
        if type(effect).__name__ in ("WriteEffect", "AccumEffect")
    ]
    return [any(w is var or w is i for w in written) for i, var in enumerate(inputs)]


def checkpoints_a_reference(jaxpr: Any) -> bool:
    """Whether a reference is used in `jax.checkpoint`, at any depth."""
    return any(
        any(isinstance(atom.aval, AbstractRef) for atom in eqn.invars)
        if eqn.primitive is remat_p
        else any(map(checkpoints_a_reference, jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _keep_vars(atoms: Sequence[Any]) -> list[Any]:
    """Leaves out literals, and outputs that are thrown away."""
    return [atom for atom in atoms if not isinstance(atom, Literal | DropVar)]


def _read(atom: Any, env: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def _evaluate(eqn: Any, env: dict[Any, Any]) -> Sequence[Any]:
    """The outputs of an equation, but for those that are thrown away."""
    inputs = [_read(atom, env) for atom in eqn.invars]
    cells = [value for value in inputs if isinstance(value, Cell)]
    if not cells:
        return _make_function(eqn)(*[env[var] for var in _find_distinct(eqn.invars)])
    if eqn.primitive is get_p and len(inputs) == 1:
        return [cells[0].value]
    if eqn.primitive is swap_p and len(inputs) == 2:
        old, cells[0].value = cells[0].value, inputs[1]
        return [old for _ in _keep_vars(eqn.outvars)]
    if eqn.primitive is remat_p:
        # JAX fails to differentiate it while there is a reference in it.
        params = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        return _replay_inside(ft.partial(jax.checkpoint, **params), eqn, inputs)
    if eqn.primitive is jit_p and checkpoints_a_reference(eqn.params["jaxpr"].jaxpr):
        return _replay_inside(jax.jit, eqn, inputs)
    return _evaluate_with_references(eqn, env)


def _replay_inside(transform: Any, eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates an equation that has a jaxpr, with cells for the references in there too."""
    inner = eqn.params["jaxpr"]
    jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", [])
    is_cell = [isinstance(value, Cell) for value in inputs]
    is_written = find_written(eqn, eqn.invars)

    def run(values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        args = [Cell(v) if is_cell[i] else v for i, v in enumerate(values)]
        outputs = replay(jaxpr, consts, args)
        return outputs, [cell.value for cell in itertools.compress(args, is_written)]

    values = [value.value if isinstance(value, Cell) else value for value in inputs]
    outputs, finals = transform(run)(values)
    for cell, final in zip(itertools.compress(inputs, is_written), finals, strict=True):
        cell.value = final
    return [
        output
        for output, var in zip(outputs, eqn.outvars, strict=True)
        if not isinstance(var, DropVar)
    ]


def _evaluate_with_references(eqn: Any, env: dict[Any, Any]) -> Sequence[Any]:
    """Makes references for the time of one equation, such as a scan or an indexed write."""
    variables = _find_distinct(eqn.invars)
    values = [env[var] for var in variables]
    refs = {id(cell): jax.new_ref(cell.value) for cell in values if isinstance(cell, Cell)}
    args = [refs.get(id(value), value) for value in values]
    outputs = jax.core.eval_jaxpr(_isolate(eqn), (), *args)
    for var, is_written in zip(eqn.invars, find_written(eqn, eqn.invars), strict=True):
        if is_written:
            cell = env[var]
            cell.value = refs[id(cell)][...]
    return outputs


# Each occurrence of an operation is traced on its own. Inside of a jitted function, JAX
# remembers how to differentiate it, which takes most of the time.
_functions = Memory(4096)


def _make_function(eqn: Any) -> Callable[..., Any]:
    if eqn.effects or any(True for _ in jaxprs_in_params(eqn.params)):
        return ft.partial(jax.core.eval_jaxpr, _isolate(eqn), ())
    distinct = {var: i for i, var in enumerate(_find_distinct(eqn.invars))}
    inputs = [
        repr(atom.val) if isinstance(atom, Literal) else distinct[atom] for atom in eqn.invars
    ]
    key = (
        eqn.primitive,
        tuple(eqn.params.items()),
        tuple(inputs),
        tuple([atom.aval for atom in eqn.invars]),
        tuple([isinstance(var, DropVar) for var in eqn.outvars]),
        eqn.ctx,
        eqn.source_info.name_stack,
    )
    try:
        function = _functions.get(key)
    except TypeError:  # a parameter without a hash
        return ft.partial(jax.core.eval_jaxpr, _isolate(eqn), ())
    if function is None:
        function = ft.partial(jax.core.eval_jaxpr, _isolate(eqn), ())
        function = _functions[key] = jax.jit(function, inline=True)
    return function


def _isolate(eqn: Any) -> Any:
    """A jaxpr that consists of one equation."""
    debug_info = DebugInfo("replay", eqn.primitive.name, None, None)
    variables, outvars = _find_distinct(eqn.invars), _keep_vars(eqn.outvars)
    return Jaxpr([], variables, outvars, [eqn], eqn.effects, debug_info)


def _find_distinct(atoms: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(_keep_vars(atoms)))
