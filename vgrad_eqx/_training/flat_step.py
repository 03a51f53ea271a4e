"""A training step as a function of flat arrays, built once per structure."""

import contextlib
import dataclasses
import functools as ft
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

from .._gradients.engine import make_transform, Operator, pull_back
from .._gradients.flat_function import split_output
from .._jit.callbacks import has_callback
from .._optimizers.norms import grad_norms
from .._optimizers.optimizer import check_structure, Optimizer
from .._select.selectors import Indices
from .._tree.cache import Cache
from .._tree.flat import FlatTree, is_any_traced, refuse_endless, Rest, split_arrays
from .._tree.prompt import AtPrompt, write_call
from .._tree.sharding import constrain, find_sharding, spread
from .._tree.state import is_traced, read, State, write
from .._tree.text import show
from .._tree.types import PyTree
from .._tree.units import attach_unit, find_factors, scale_number, split_unit
from .accumulation import accumulate, check_leading_axis, is_array, Result
from .interrupts import hold
from .loss import make_loss
from .over_states import StateFunction, UnknownStates
from .packing import Packing


# Made once a step: a named tuple would take twice as long.
@jtu.register_dataclass
@dataclasses.dataclass(slots=True, repr=False)
class Metrics(AtPrompt):
    """What a step of [`vgrad_eqx.train_step`][] returns along with the next state.

    **Arguments:**

    Created by the step.

    **Returns:**

    A pytree with three fields. With `steps_per_call`, all three are stacked; with `accumulate`,
    `value` and `aux` are.

    - `value`: the output of `func`, before the update.
    - `aux`: its auxiliary data, or `None`.
    - `grad_norms`: `{path: norm}` if requested, otherwise `None`.

    **Example:**

        >>> import jax.numpy as jnp, optax
        >>> import vgrad_eqx as vg
        >>> func = lambda w, x: jnp.sum(w["a"] * x)
        >>> step = vg.train_step(func, optax.sgd(0.1), grad_norms=True)
        >>> _, metrics = step(step.init({"a": jnp.ones(2)}), jnp.array([3.0, 4.0]))
        >>> float(metrics.value), float(metrics.grad_norms["a"])
        (7.0, 5.0)
    """

    value: Any
    aux: Any
    grad_norms: Any

    def __repr__(self) -> str:
        return write_call("Metrics", value=self.value, aux=self.aux, grad_norms=self.grad_norms)


class Options(NamedTuple):
    """The options of [`vgrad_eqx.train_step`][]."""

    func: Any
    tx: Any
    has_aux: bool
    check_states: bool
    steps_per_call: int
    accumulate: int
    packed: bool
    grad_norms: bool
    donate: bool
    keep_every: int
    extra_args: Any


class Carry(NamedTuple):
    """What a step changes."""

    params: list[Any]
    opt_state: Any
    key: list[Any]
    nn_state: Any


class Batch(NamedTuple):
    """What a step takes besides the model."""

    inputs: Sequence[Any]
    rest: Rest
    nn_state: Any
    key: Any

    def list_arguments(self, model: Any, nn_state: Any, key: Any, inputs: Sequence[Any]) -> Any:
        """The arguments of `func` for some of the inputs."""
        args, kwargs = self.rest.combine(inputs)
        # A copy, because a function that updates an `equinox.nn.State` invalidates the old one.
        states = () if nn_state is None else (jtu.tree_map(lambda leaf: leaf, nn_state),)
        kwargs = kwargs if key is None else dict(key=key, **kwargs)
        return (model, *states, *args), kwargs


class FlatStep:
    """A training step that takes the arrays of a `Carry` and the module's frozen arrays.

    The steps are counted outside, which takes less time than passing one more array. Over
    states by reference, the module is the dict of the trained states, and `nn_state` is a list
    of all others.
    """

    def __init__(
        self,
        owner: object,
        options: Options,
        flat: FlatTree,
        optimizer: Optimizer,
        key: jax.Array | None,
        nn_state: PyTree,
        states: StateFunction | None = None,
    ):
        self.owner = owner
        self.options = options
        self.states = states
        self.steps_per_call = options.steps_per_call
        places = {flat.names[i]: i for i in flat.differentiable}
        self._chosen = [places[name] for name in optimizer.names]
        chosen = set(self._chosen)
        self._frozen = [
            i for i, leaf in enumerate(flat.leaves) if _is_array(leaf) and i not in chosen
        ]
        # Without units, because parameters travel as Quantities, as optax gets them.
        rest = flat.split([*self._chosen, *self._frozen]).rest
        self._rest = dataclasses.replace(rest, units=None)
        self._names = flat.names
        self._optimizer = jtu.tree_structure(optimizer)
        params = [flat.leaves[i] for i in self._chosen]
        carry = Carry(params, optimizer.opt_state, _strip_key(key), nn_state)
        arrays, self._carry = jtu.tree_flatten(carry)
        self._avals = tuple([(jnp.shape(array), jnp.result_type(array)) for array in arrays])
        self._shardings = tuple(map(find_sharding, arrays))
        self._impl = _find_impl(key)
        self._packing = (
            Packing(_list_kinds(carry, optimizer), arrays) if options.packed else None
        )
        self._has_aux = options.has_aux or nn_state is not None
        self._func: Callable[..., Any] = states or make_loss(
            options.func, options.has_aux, nn_state is not None
        )
        self._transform = make_transform(
            Operator("train_step", pull_back, adds_up=True),
            lambda *args, **kwargs: self._func(*args, **kwargs),
            grad_states=Indices(frozenset(self._chosen)),
            argnums=None,
            return_value=True,
            has_aux=self._has_aux,
            unit_aware=True,
            check_states=options.check_states and states is None,
            debug_nan=False,
        )
        self.program = Program(self.run, options.donate)
        self._programs = Cache()
        # The states by reference that it was found to lack.
        self.unknown: UnknownStates | None = None

    def find_program(self, batch: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A compiled step for such a batch, and its inputs from the batch.

        Everything but arrays and numbers is static, and so is a number in a module, because
        the module may branch on it.
        """
        with contextlib.suppress(RecursionError):  # of what is refused below
            if not kwargs and all(map(_is_plain, batch)):
                return self.program, batch
        for each in (*batch, *kwargs.values()):
            refuse_endless(each)
        inputs = batch, kwargs
        leaves = jtu.tree_leaves(inputs, is_leaf=_is_module)
        PLAIN.update([type(leaf) for leaf in leaves if isinstance(leaf, jax.Array)])
        if not kwargs and PLAIN.issuperset(map(type, leaves)):
            return self.program, batch
        inputs = jtu.tree_map(_trace_number, inputs, is_leaf=_is_module)
        split = split_arrays(inputs, is_array)
        rest = split.rest
        if not kwargs and len(split.diff) == rest.structure.num_leaves:
            return self.program, inputs[0]
        constants = tuple([(type(leaf), leaf) for leaf in rest.constants])
        try:
            hash((rest.structure, constants))
        except TypeError as error:
            raise TypeError(
                "A training step compiles again for each constant in its batch, so each must "
                f"have a hash. Got {show(inputs)}. Close over it, or pass an array."
            ) from error
        program = self._programs.get((rest.structure, constants))
        if program is None:
            program = Program(
                lambda leaves, frozen, arrays: self._run(leaves, frozen, rest.combine(arrays)),
                self.options.donate,
            )
            self._programs.set((rest.structure, constants), program)
        return program, split.diff

    @property
    def signature(self) -> Any:
        """A key that differs between steps that compile to different programs."""
        static = tuple([(type(leaf), leaf) for leaf in self._rest.constants])
        structures = (self._rest.structure, self._carry, self._optimizer)
        arrays = (tuple(self._chosen), self._avals, self._impl, self._shardings)
        return structures, static, arrays, self.states

    def start(
        self, flat: FlatTree, optimizer: Optimizer, key: jax.Array | None, nn_state: PyTree
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """The initial leaves, and the frozen ones."""
        params = [flat.leaves[i] for i in self._chosen]
        carry = Carry(params, optimizer.opt_state, _strip_key(key), nn_state)
        return self._write(carry), [flat.leaves[i] for i in self._frozen]

    def extend(self, leaves: Sequence[Any], unknown: UnknownStates) -> Any:
        """A step with the values of more states in its carry, and its leaves."""
        assert self.states is not None
        self.unknown = unknown
        states, values = self.states.extend(unknown)
        carry = self._read(leaves)
        key = self._wrap_key(carry.key)
        optimizer = self._build_optimizer(carry.opt_state, 0)
        flat = FlatTree(self._build(carry.params, []))
        nn_state = [*carry.nn_state, *values]
        flat_step = FlatStep(self.owner, self.options, flat, optimizer, key, nn_state, states)
        return flat_step, flat_step.start(flat, optimizer, key, nn_state)[0]

    def run(
        self, leaves: Sequence[jax.Array], frozen: Sequence[jax.Array], batch: PyTree
    ) -> Any:
        """Takes the steps of one call, for a batch without keyword arguments."""
        return self._run(leaves, frozen, (batch, {}))

    def _run(
        self, leaves: Sequence[jax.Array], frozen: Sequence[jax.Array], batch: PyTree
    ) -> Any:
        """Takes the steps of one call. Returns the next leaves and the three metrics."""
        arrays = list(leaves) if self._packing is None else self._packing.unpack(leaves)
        inputs = split_arrays(batch, is_array)
        once = lambda arrays, inputs: self._once(arrays, frozen, inputs, rest)
        rest, length = inputs.rest, self.steps_per_call
        if length == 1:
            arrays, metrics = once(arrays, inputs.diff)
        else:
            check_leading_axis(inputs.diff, length, "steps_per_call")
            arrays, metrics = jax.lax.scan(once, arrays, inputs.diff, length)
        arrays = constrain(arrays, self._shardings)
        leaves = tuple(arrays) if self._packing is None else self._packing.pack(arrays)
        return leaves, metrics.value, metrics.aux, metrics.grad_norms

    def _once(
        self,
        arrays: Sequence[Any],
        frozen: Sequence[jax.Array],
        inputs: Sequence[Any],
        rest: Rest,
    ) -> tuple[list[Any], Metrics]:
        """Takes one step."""
        params, opt_state, keys, first_nn_state = jtu.tree_unflatten(self._carry, arrays)
        optimizer = self._build_optimizer(opt_state, jnp.zeros((), jnp.int32))
        model = self._build(params, frozen)
        keys, subkey = self._split_key(keys)
        batch = Batch(inputs, rest, first_nn_state, subkey)
        result = self._differentiate(model, params, batch)
        grads = dict(zip(optimizer.names, result.grads, strict=True))
        value, aux = self._average(result.value), result.aux
        if self.states is not None:
            aux, written = aux
            model = {**model, **self._take_last(written)}
        extra_args = {
            "value": value,
            "grad": grads,
            **self._make_functions(params, batch),
            **self._make_extra_args(aux),
        }
        model, following = optimizer.step(model, grads, **extra_args)
        check_structure(
            optimizer,
            following,
            "train_step",
            "Take that step with a `vg.Optimizer`, then call `init(model, optimizer=opt)`.",
        )
        params = list(optimizer.params(model).values())
        nn_state = result.nn_state
        if nn_state is not None and self.states is None:
            nn_state = _drop_if_rejected(following.opt_state, nn_state, old=first_nn_state)
        carry = Carry(params, following.opt_state, keys, nn_state)
        arrays = jtu.tree_leaves(carry)
        norms = grad_norms(grads) if self.options.grad_norms else None
        return arrays, Metrics(result.value, aux, norms)

    def _differentiate(self, model: Any, params: Sequence[Any], batch: Batch) -> Result:
        def part(nn_state: Any, key: Any, inputs: Any) -> Result:
            args, kwargs = batch.list_arguments(model, nn_state, key, inputs)
            grads, value, *others = self._transform(*args, **kwargs)
            aux, nn_state = self._split_aux(others, nn_state)
            return Result([grads[self._names[i]] for i in self._chosen], value, aux, nn_state)

        return self._accumulate(part, params, batch)

    def _evaluate(self, model: Any, batch: Batch) -> Any:
        def part(_: Any, key: Any, inputs: Any) -> Result:
            args, kwargs = batch.list_arguments(model, batch.nn_state, key, inputs)
            out = self._func(*args, **kwargs)
            return Result([], out[0] if self._has_aux else out, None, None)

        return self._average(self._accumulate(part, [], batch._replace(nn_state=None)).value)

    def _accumulate(self, part: Any, params: Sequence[Any], batch: Batch) -> Result:
        number = self.options.accumulate
        return accumulate(part, params, number, batch.nn_state, batch.key, batch.inputs)

    def _make_functions(self, params: Sequence[Any], batch: Batch) -> dict[str, Any]:
        """The functions of the model that some transformations accept."""

        def grad_fn(model: Any, *_: Any) -> Any:  # `sam` passes the number of its step as well
            grads = self._differentiate(model, params, batch).grads
            return {self._names[i]: grad for i, grad in zip(self._chosen, grads, strict=True)}

        value_fn = lambda model: self._evaluate(model, batch)
        return {"value_fn": value_fn, "obj_fn": value_fn, "grad_fn": grad_fn}

    def _make_extra_args(self, aux: Any) -> Mapping[str, Any]:
        """The extra arguments that the user computes from the auxiliary data."""
        if self.options.extra_args is None:
            return {}
        extra_args = self.options.extra_args(aux)
        if not isinstance(extra_args, Mapping) or not all(map(_is_string, extra_args)):
            raise TypeError(
                "`train_step(extra_args=...)` must be a function that returns a dict from name "
                f"to argument of the `update` of `tx`. Got {show(extra_args)}."
            )
        return extra_args

    def _take_last(self, written: dict[str, Any]) -> dict[str, Any]:
        """The values that `func` has set trained states to."""
        if written and self.options.accumulate > 1:
            raise ValueError(
                "`train_step(func=..., accumulate=...)` must not set a state that is trained, "
                "because all parts of a batch are differentiated by the same values. Got one "
                f"that sets {list_names(written)}."
            )
        return written

    def _average(self, value: object) -> Any:
        """The sum of all outputs, which is differentiated, or its mean over microbatches."""
        numbers, output = split_output(value, None, "train_step")
        text = "`train_step(func=...)` must return outputs of one dimension."
        factors = find_factors(output.units, text, output.names)
        total = sum(jnp.sum(scale_number(x, f)) for x, f in zip(numbers, factors, strict=True))
        return attach_unit(total / self.options.accumulate, output.units[0])

    def _split_aux(self, others: list[Any], nn_state: PyTree) -> tuple[Any, Any]:
        """The auxiliary data, and the next `equinox.nn.State`."""
        if nn_state is None:
            return (others[0] if others else None), None
        (aux,) = others
        if self.states is not None:
            return aux[1], aux[0]
        if not self.options.has_aux:
            nn_state, aux = aux, None
        elif isinstance(aux, tuple | list) and len(aux) == 2:
            nn_state, aux = aux
        else:
            nn_state = None
        if not isinstance(nn_state, eqx.nn.State):
            wanted = "(value, (nn_state, aux))" if self.options.has_aux else "(value, nn_state)"
            raise TypeError(
                "`train_step(func=...)` must return the next `equinox.nn.State`, as "
                f"`{wanted}`, because the state was made by `init(..., nn_state=...)`. Got "
                f"{show(others[0])} beside the value."
            )
        return aux, nn_state

    def get_model(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> Any:
        return self._build(_copy(self._read(leaves).params), frozen)

    def get_optimizer(self, leaves: Sequence[Any], count: int | jax.Array) -> Optimizer:
        opt_state = _copy(self._read(leaves).opt_state)
        return self._build_optimizer(opt_state, jnp.asarray(count, jnp.int32))

    def set_hyperparams(
        self, leaves: Sequence[Any], group: str | None, values: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        carry = self._read(leaves)
        optimizer = self._build_optimizer(carry.opt_state, 0).set_hyperparams(group, **values)
        return self._join(jtu.tree_leaves(carry._replace(opt_state=optimizer.opt_state)))

    def get_nn_state(self, leaves: Sequence[Any]) -> Any:
        return _copy(self._read(leaves).nn_state)

    def get_key(self, leaves: Sequence[Any]) -> Any:
        return self._wrap_key(_copy(self._read(leaves).key))

    def sync(self, leaves: Sequence[Any], count: Any, memory: State) -> None:
        """Sets the states by reference to the values in the carry."""
        assert self.states is not None
        carry = _copy(self._read(leaves))
        optimizer = self._build_optimizer(carry.opt_state, jnp.asarray(count, jnp.int32))
        params = [split_unit(param)[0] for param in carry.params]
        trained = [self.states.trained[self._names[i]] for i in self._chosen]
        refs = [*trained, *self.states.others, *memory.refs]
        arrays = [*params, *carry.nn_state, *jtu.tree_leaves(optimizer)]
        for ref, array in zip(refs, arrays, strict=True):
            if not is_traced(ref):
                write(ref, jax.device_put(array, ref.sharding), "A state")
            elif is_any_traced([array]):
                write(ref, array, "A state")

    def to_tree(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> dict[str, Any]:
        """All arrays by name, for a checkpoint."""
        carry = self._read(leaves)
        arrays = dict(zip(self._chosen, carry.params, strict=True))
        arrays.update(zip(self._frozen, frozen, strict=True))
        model, others = self._tree_keys
        return {
            model: {self._names[i]: arrays[i] for i in sorted(arrays)},
            "opt_state": carry.opt_state,
            "key": [self._wrap_key([data]) for data in carry.key],
            others: carry.nn_state
            if self.states is None
            else {name: carry.nn_state[i] for name, i in self.states.name_others().items()},
        }

    def from_tree(self, tree: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """The inverse of `to_tree`."""
        model, others = self._tree_keys
        params = [tree[model][self._names[i]] for i in self._chosen]
        keys = [data for key in tree["key"] for data in _strip_key(key)]
        frozen = [tree[model][self._names[i]] for i in self._frozen]
        nn_state = tree[others]
        if self.states is not None:
            nn_state = list(map(read, self.states.others))
            for name, i in self.states.name_others().items():
                nn_state[i] = tree[others][name]
        return self._write(Carry(params, tree["opt_state"], keys, nn_state)), frozen

    @property
    def _tree_keys(self) -> tuple[str, str]:
        return ("model", "nn_state") if self.states is None else ("states", "others")

    def _read(self, leaves: Sequence[Any]) -> Carry:
        arrays = list(leaves)
        if self._packing is not None:
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                arrays = jax.eval_shape(self._packing.unpack, leaves)
            else:
                arrays = _unpack(self._packing, leaves)
        return jtu.tree_unflatten(self._carry, arrays)

    def _write(self, carry: Carry) -> tuple[Any, ...]:
        """Copies of the arrays, so that they may be donated."""
        arrays = [jnp.array(x, jnp.result_type(x), copy=True) for x in jtu.tree_leaves(carry)]
        CONCRETE.update([type(array) for array in arrays if not is_any_traced([array])])
        return self._join(spread(arrays))

    def _join(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(arrays) if self._packing is None else _pack(self._packing, arrays)

    def _build(self, params: Sequence[Any], frozen: Sequence[Any]) -> Any:
        return self._rest.combine([*params, *frozen])

    def _build_optimizer(self, opt_state: PyTree, count: int | jax.Array) -> Optimizer:
        return jtu.tree_unflatten(self._optimizer, [*jtu.tree_leaves(opt_state), count])

    def _split_key(self, keys: list[Any]) -> tuple[list[Any], Any]:
        """The data of the next key and a key for this step; or nothing and `None`."""
        if not keys:
            return [], None
        key, subkey = jr.split(self._wrap_key(keys))
        return _strip_key(key), subkey

    def _wrap_key(self, keys: Sequence[Any]) -> Any:
        if not keys or self._impl is None:
            return keys[0] if keys else None
        return jr.wrap_key_data(keys[0], impl=self._impl)


class Program:
    """A compiled step, with a `call` whose results Ctrl-C cannot lose.

    On JAX's fast path, a call takes and returns arrays in C++. Other calls run Python in
    between: those that compile the program, for which Ctrl-C is held back from the end of the
    trace on, and every call of a program with a callback.
    """

    def __init__(self, run: Callable[..., Any], donate: bool):
        def run_step(leaves: Any, frozen: Any, batch: Any) -> Any:
            results = run(leaves, frozen, batch)
            hold()
            return results

        self.compiled: Any = jax.jit(run_step, donate_argnums=0) if donate else jax.jit(run)
        self.call: Any = self._call_with_care if donate else self.compiled
        self._num_calls = 0
        self._calls_python = False

    def _call_with_care(self, leaves: Any, frozen: Any, batch: Any) -> Any:
        if is_any_traced(leaves):
            return self.compiled(leaves, frozen, batch)
        if self._num_calls == 0:
            jaxpr = self.compiled.trace(leaves, frozen, batch).jaxpr
            self._calls_python = bool(jaxpr.effects) or has_callback(jaxpr.jaxpr)
        self._num_calls += 1
        # JAX runs Python once more for arrays that are the results of the first call.
        if self._num_calls > 1 and not self._calls_python:
            self.call = self.compiled
        hold()
        return self.compiled(leaves, frozen, batch)


# Types of batch leaves that are traced. Those of JAX arrays are added when first seen.
PLAIN: set[type] = {int, float, complex, np.ndarray}

# The types of JAX arrays that are not tracers, which can be donated. They have no public name.
CONCRETE: set[type] = set()


# `isinstance` with its second argument bound, so that JAX calls no Python for each node.
_is_module = type.__instancecheck__.__get__(eqx.Module)
_is_string = type.__instancecheck__.__get__(str)


def _is_plain(node: Any) -> bool:
    """Whether JAX takes this part of a batch as is. It may say no where JAX would take it."""
    kind = type(node)
    if kind in PLAIN:
        return True
    if kind is dict:
        return all(map(_is_plain, node.values()))
    return kind in (tuple, list) and all(map(_is_plain, node))


def _trace_number(leaf: object) -> Any:
    is_number = isinstance(leaf, int | float | complex) and not isinstance(leaf, bool)
    return jnp.asarray(leaf) if is_number else leaf


def _is_array(leaf: object) -> bool:
    number, unit = split_unit(leaf)
    return unit is not None or eqx.is_array(number) or isinstance(number, np.ndarray)


def _drop_if_rejected(opt_state: PyTree, new: PyTree, old: PyTree) -> Any:
    """The next `equinox.nn.State`, or the old one if `optax.apply_if_finite` sees a NaN."""
    is_guard = lambda node: isinstance(node, optax.ApplyIfFiniteState)
    guards = list(filter(is_guard, jtu.tree_leaves(opt_state, is_leaf=is_guard)))
    if not guards:
        return new
    is_finite = jnp.all(jnp.stack([guard.last_finite for guard in guards]))
    return jtu.tree_map(lambda x, y: jnp.where(is_finite, x, y), new, old)


def _list_kinds(carry: Carry, optimizer: Optimizer) -> list[Hashable]:
    """The kind of each array. Those of one kind are packed together."""
    entries = optimizer.entries
    of_state = [None if each.name is None else (each.path, each.group) for each in entries]
    others = jtu.tree_leaves((carry.key, carry.nn_state))
    return [*["parameter"] * len(carry.params), *of_state, *[None] * len(others)]


def _find_impl(key: jax.Array | None) -> Any:
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return None
    return jr.key_impl(key)


def _strip_key(key: jax.Array | None) -> list[Any]:
    """The numbers of a key, which JAX passes to compiled functions faster than the key."""
    if key is None:
        return []
    return [key if _find_impl(key) is None else jr.key_data(key)]


def list_names(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


_copy = ft.partial(jtu.tree_map, lambda array: jnp.array(array, copy=True))
_pack = jax.jit(Packing.pack, static_argnums=0)
_unpack = jax.jit(Packing.unpack, static_argnums=0)
