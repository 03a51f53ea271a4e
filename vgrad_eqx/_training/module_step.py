"""The training step of a module."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._optimizers.optimizer import Optimizer
from .._select.selectors import Indices
from .._tree.flat import FlatTree
from .._tree.text import show
from .._tree.units import split_unit
from .accumulation import accumulate, Result
from .flat_step import FlatStep, list_kinds, Metrics, name_key, Options, strip_key


class _Carry(NamedTuple):
    """What a step changes."""

    params: list[Any]
    opt_state: Any
    key: list[Any]
    nn_state: Any


class ModuleStep(FlatStep):
    """Chosen leaves of a module are trained, and its other arrays are frozen."""

    def __init__(
        self,
        owner: Any,
        options: Options,
        flat: FlatTree,
        optimizer: Optimizer,
        key: Any,
        nn_state: Any,
    ):
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
        params = [flat.leaves[i] for i in self._chosen]
        arrays, self._carry = jtu.tree_flatten(
            _Carry(params, optimizer.opt_state, strip_key(key), nn_state)
        )
        self._optimizer = jtu.tree_structure(optimizer)
        self._avals = tuple([(jnp.shape(array), jnp.result_type(array)) for array in arrays])
        super().__init__(owner, options, list_kinds(len(params), optimizer), arrays, key)
        self._transform = self.make_gradient(
            _call_with_model(options.func),
            grad_states=Indices(frozenset(self._chosen)),
            has_aux=options.has_aux or nn_state is not None,
        )

    @property
    def signature(self) -> Any:
        """What tells plans apart that compile to different programs."""
        static = tuple([(type(leaf), leaf) for leaf in self._rest.constants])
        structures = (self._rest.structure, self._carry, self._optimizer)
        return structures, static, tuple(self._chosen), self._avals, self.impl, self.shardings

    def start(
        self, flat: FlatTree, optimizer: Optimizer, key: Any, nn_state: Any
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """The leaves to begin with, and the frozen ones."""
        params = [flat.leaves[i] for i in self._chosen]
        carry = _Carry(params, optimizer.opt_state, strip_key(key), nn_state)
        frozen = [flat.leaves[i] for i in self._frozen]
        return self.enter(jtu.tree_leaves(carry)), frozen

    def once(self, arrays: list[Any], frozen: Any, batch: Any) -> tuple[list[Any], Metrics]:
        params, opt_state, keys, nn_state = jtu.tree_unflatten(self._carry, arrays)
        optimizer = self._build_optimizer(opt_state, jnp.zeros((), jnp.int32))
        keys, subkey = self.split_key(keys)
        model = self._build(params, frozen)

        def differentiate(nn_state: Any, key: Any, batch: Any) -> Result:
            args, kwargs = _list_arguments(model, nn_state, key, batch)
            grads, value, *rest = self._transform(*args, **kwargs)
            aux, nn_state = self._split_aux(rest, nn_state)
            return Result([grads[name] for name in optimizer.names], value, aux, nn_state)

        def evaluate(model: Any) -> Any:
            def value(_: Any, key: Any, batch: Any) -> Result:
                args, kwargs = _list_arguments(model, nn_state, key, batch)
                out = self.options.func(*args, **kwargs)
                return Result([], out[0] if self._transform.has_aux else out, None, None)

            result = accumulate(value, [], self.options.accumulate, None, subkey, batch)
            return self.average(result.value)

        result = accumulate(
            differentiate, params, self.options.accumulate, nn_state, subkey, batch
        )
        grads = dict(zip(optimizer.names, result.grads, strict=True))
        model, optimizer = optimizer.step(
            model, grads, value=self.average(result.value), grad=grads, value_fn=evaluate
        )
        params = list(optimizer.params(model).values())
        carry = _Carry(params, optimizer.opt_state, keys, result.nn_state)
        leaves, structure = jtu.tree_flatten(carry)
        if structure != self._carry:
            raise ValueError(
                "`train_step(tx=...)` must be a transformation whose state keeps its "
                "structure. Got one whose first step changes it, as that of `optax.monitor`. "
                "Take that step by a `vg.Optimizer`, and go on by `step.init(model, "
                "optimizer=opt)`."
            )
        return leaves, self.measure(result.value, result.aux, grads)

    def _build(self, params: Sequence[Any], frozen: Sequence[Any]) -> Any:
        return self._rest.combine([*params, *frozen])

    def _split_aux(self, rest: list[Any], nn_state: Any) -> tuple[Any, Any]:
        """The auxiliary data, and the next `equinox.nn.State`."""
        if nn_state is None:
            return (rest[0] if rest else None), None
        (aux,) = rest
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
                f"{show(rest[0])} beside the value."
            )
        return aux, nn_state

    def get_model(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> Any:
        params, *_ = self._copy_carry(leaves, self.params)
        return self._build(params, frozen)

    def get_optimizer(self, leaves: Sequence[Any], count: int) -> Optimizer:
        opt_state = self._copy_carry(leaves, self.opt_state).opt_state
        return self._build_optimizer(opt_state, jnp.asarray(count, jnp.int32))

    def _build_optimizer(self, opt_state: Any, count: Any) -> Optimizer:
        return jtu.tree_unflatten(self._optimizer, [*jtu.tree_leaves(opt_state), count])

    def get_nn_state(self, leaves: Sequence[Any]) -> Any:
        return self._copy_carry(leaves, self.others).nn_state

    def _copy_carry(self, leaves: Sequence[Any], part: slice) -> _Carry:
        """Copies of one part. The others are empty."""
        arrays: list[Any] = [None] * self._carry.num_leaves
        arrays[part] = self.copy(leaves, part)
        return jtu.tree_unflatten(self._carry, arrays)

    def to_tree(self, leaves: Sequence[Any], frozen: Sequence[Any]) -> dict[str, Any]:
        """All arrays by name, for a checkpoint."""
        carry = jtu.tree_unflatten(self._carry, self.unpack(leaves))
        arrays = dict(zip(self._chosen, carry.params, strict=True))
        arrays.update(zip(self._frozen, frozen, strict=True))
        return {
            "model": {self._names[i]: arrays[i] for i in sorted(arrays)},
            "opt_state": carry.opt_state,
            "key": [self.wrap_key(data) for data in carry.key],
            "nn_state": carry.nn_state,
        }

    def from_tree(self, tree: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
        """The inverse of `to_tree`."""
        arrays = tree["model"]
        params = [arrays[self._names[i]] for i in self._chosen]
        keys = [data for key in tree["key"] for data in strip_key(key)]
        carry = _Carry(params, tree["opt_state"], keys, tree["nn_state"])
        frozen = [arrays[self._names[i]] for i in self._frozen]
        return self.enter(jtu.tree_leaves(carry)), frozen


def _is_array(leaf: Any) -> bool:
    number, unit = split_unit(leaf)
    return unit is not None or eqx.is_array(number) or isinstance(number, np.ndarray)


def _list_arguments(
    model: Any, nn_state: Any, key: Any, batch: Sequence[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # A copy, because an `equinox.nn.State` is used up by the function that changes it.
    states = () if nn_state is None else (jtu.tree_map(lambda leaf: leaf, nn_state),)
    return (model, *states, *batch), name_key(key)


def _call_with_model(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function without its own fields, so that the first argument is the model."""
    return lambda *args, **kwargs: func(*args, **kwargs)
