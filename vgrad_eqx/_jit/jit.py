"""Compiled gradients, whose calls cost little more in Python than `jax.jit` of flat arrays."""

import functools as ft
from collections.abc import Callable
from typing import Any

from .._gradients.engine import GradientTransform
from .._tree.missing import MISSING
from .program import NoProgram, Program, Unlike, unwrap


def jit(transform: Callable[..., Any]) -> Any:
    """Compiles a gradient, whose calls then cost little more than `jax.jit` over flat arrays.

    It remembers how the arguments are put together, and fetches their arrays by code that is
    written for them, while `equinox.filter_jit` takes every module apart and puts it together
    again. It may also decorate: `@vg.jit` above `@vg.vector_grad(...)`, of a method
    as well.

    **Arguments:**

    - `transform`: a [`vgrad_eqx.GradientTransform`][], which
        [`vgrad_eqx.vector_grad`][] and its siblings return.

    **Returns:**

    A function that takes and returns what `transform` does. As in `equinox.filter_jit`, JAX
    and NumPy arrays in the arguments are traced, and all else is constant: another number or
    flag means to compile again. Only a Python float that is differentiated is traced, too.
    Arrays in the results are those of JAX. Inside of `jax.jit`, nothing is compiled apart.

    Its `lower(*args, **kwargs)` gives what `jax.jit(...).lower(...)` does, to look at the
    program.

    **Raises:**

    - `TypeError`: at once, if `transform` is no gradient.

    **Example:**

        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> import vgrad_eqx as vg
        >>> mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
        >>> @vg.jit
        ... @vg.vector_grad(grad_states="layers.*.bias", return_value=True)
        ... def errors(model, x, y):
        ...     return jnp.square(jax.vmap(model)(x) - y)
        >>> var_grads, value = errors(mlp, jnp.ones((5, 2)), jnp.ones((5, 1)))
        >>> list(var_grads), value.shape
        (['layers.0.bias', 'layers.1.bias'], (5, 1))
    """
    if not isinstance(transform, GradientTransform):
        raise TypeError(
            "`jit(transform)` compiles a gradient, such as `vg.vector_grad(func)`. Got "
            f"{transform!r}. For another function use `jax.jit` or `equinox.filter_jit`."
        )
    programs = _Programs(transform)

    # A function, because Python calls one faster than an object, and a module slower yet.
    def call(first=MISSING, /, *rest, **kwargs):
        program = programs.latest
        leaves = program.fetch(first)
        if leaves is not None and not kwargs:
            try:
                return program.compiled(leaves, rest)
            except (Unlike, TypeError):
                pass  # other arguments, or an error that is raised again below
        return programs.call(first, rest, kwargs)

    vars(call)["lower"] = programs.lower
    return ft.update_wrapper(call, transform, updated=())


class _Programs:
    """The programs of one gradient, one for each kind of arguments."""

    def __init__(self, transform: GradientTransform):
        self._transform = transform
        self._programs: list[Program] = []
        self.latest: Any = NoProgram

    def call(self, first: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for program in self._programs:
            inputs = program.read(first, rest, kwargs)
            if inputs is not None:
                try:
                    out = program.compiled(*inputs)
                except (Unlike, TypeError):
                    break
                self.latest = program
                return unwrap(out)
        program, inputs = self._find(first, rest, kwargs)
        try:
            return unwrap(program.compiled(*inputs))
        except Unlike:
            program, inputs = self._add(first, rest, kwargs, is_exact=True)
            return unwrap(program.compiled(*inputs))

    def lower(self, first=MISSING, /, *rest: Any, **kwargs: Any) -> Any:
        """The program for such arguments, as `jax.jit(...).lower(...)` gives it."""
        program, inputs = self._find(first, rest, kwargs)
        return program.compiled.lower(*inputs)

    def _find(self, first: Any, rest: Any, kwargs: Any) -> tuple[Program, Any]:
        """A program for these arguments, and what it takes."""
        for program in self._programs:
            inputs = program.read_again(first, rest, kwargs)
            if inputs is not None:
                return program, inputs
        return self._add(first, rest, kwargs, is_exact=False)

    def _add(self, first: Any, rest: Any, kwargs: Any, is_exact: bool) -> tuple[Program, Any]:
        program = Program(self._transform, first, rest, kwargs, is_exact)
        self._programs = [program, *self._programs[:_MOST]]
        return program, program.read(first, rest, kwargs)


_MOST = 63
