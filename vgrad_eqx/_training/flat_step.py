"""What a training step does with flat arrays, worked out once for a structure."""

import abc
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu

from .._gradients.engine import make_transform, Operator, pull_back
from .._gradients.flat_function import split_output
from .._optimizers.norms import grad_norms
from .._tree.sharding import constrain, find_sharding, spread
from .._tree.units import attach_unit, find_factors, scale_number
from .accumulation import check_leading_axis
from .packing import Packing


# Made once a step: a named tuple would take twice as long.
@jtu.register_dataclass
@dataclasses.dataclass(slots=True)
class Metrics:
    """What a step of [`vgrad_eqx.train_step`][] returns beside the next state.

    **Arguments:**

    It is made by the step.

    **Returns:**

    A pytree of three. With `steps_per_call`, and value and aux with `accumulate`, they are
    stacked.

    - `value`: the output of `func`, before the step.
    - `aux`: its auxiliary data, or `None`.
    - `grad_norms`: `{path: norm}` if asked for, or `None`.

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


class FlatStep(abc.ABC):
    """A training step of flat arrays: parameters, optax state, key, and others, in this order.

    The steps are counted outside, which takes less time than to pass one array more.
    """

    def __init__(
        self,
        owner: Any,
        options: Options,
        kinds: Sequence[Hashable],
        arrays: Sequence[Any],
        key: Any,
    ):
        """`kinds` are those of the parameters and of the optax state."""
        self.owner = owner
        self.options = options
        self.steps_per_call = options.steps_per_call
        self.num_params = kinds.count(_PARAMETER)
        self.num_trained = len(kinds)
        self.has_key = key is not None
        self.impl = find_impl(key)
        self.packing = None
        if options.packed:
            others = [None] * (len(arrays) - len(kinds))
            self.packing = Packing([*kinds, *others], arrays)
        self.shardings = tuple(map(find_sharding, arrays))
        self.compiled = jax.jit(self.run, donate_argnums=0)

    @abc.abstractmethod
    def once(self, arrays: list[Any], frozen: Any, batch: Any) -> tuple[list[Any], Metrics]:
        """Takes one step."""

    def make_gradient(self, func: Any, grad_states: Any, has_aux: bool) -> Any:
        """What a step differentiates by: value, and auxiliary data if any, come along."""
        return make_transform(
            Operator("train_step", pull_back, adds_up=True),
            func,
            grad_states=grad_states,
            argnums=None,
            return_value=True,
            has_aux=has_aux,
            unit_aware=True,
            check_states=self.options.check_states,
            debug_nan=False,
        )

    def unpack(self, leaves: Sequence[Any]) -> list[Any]:
        return list(leaves) if self.packing is None else _unpack(self.packing, leaves)

    def run(self, leaves: Any, frozen: Any, batch: Any) -> Any:
        """Takes the steps of one call. Returns the next leaves and the three metrics."""
        arrays = list(leaves) if self.packing is None else self.packing.unpack(leaves)
        if self.steps_per_call == 1:
            arrays, metrics = self.once(arrays, frozen, batch)
        else:
            length = self.steps_per_call
            check_leading_axis(batch, length, "steps_per_call")
            arrays, metrics = jax.lax.scan(
                lambda arrays, batch: self.once(arrays, frozen, batch), arrays, batch, length
            )
        arrays = constrain(arrays, self.shardings)
        leaves = tuple(arrays) if self.packing is None else self.packing.pack(arrays)
        return leaves, metrics.value, metrics.aux, metrics.grad_norms

    def enter(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Copies of arrays, which may be donated, as a step takes them."""
        own = spread([jnp.array(x, jnp.result_type(x), copy=True) for x in arrays])
        return tuple(own) if self.packing is None else _pack(self.packing, own)

    def copy(self, leaves: Sequence[Any], part: slice) -> list[Any]:
        """Some of the arrays, which live on when the leaves are donated."""
        return [jnp.array(array, copy=True) for array in self.unpack(leaves)[part]]

    @property
    def params(self) -> slice:
        return slice(0, self.num_params)

    @property
    def opt_state(self) -> slice:
        return slice(self.num_params, self.num_trained)

    @property
    def key(self) -> slice:
        return slice(self.num_trained, self.num_trained + self.has_key)

    @property
    def others(self) -> slice:
        return slice(self.num_trained + self.has_key, None)

    def split_key(self, keys: list[Any]) -> tuple[list[Any], Any]:
        """The numbers of the next key, and a key for this step; or nothing, and `None`."""
        if not keys:
            return [], None
        key, subkey = jr.split(self.wrap_key(keys[0]))
        return strip_key(key), subkey

    def average(self, value: Any) -> Any:
        """The sum of all outputs, of which the gradient is taken, or its mean over parts."""
        numbers, output = split_output(value, None, "train_step")
        text = "`train_step(func=...)` must return outputs of one dimension."
        factors = find_factors(output.units, text, output.names)
        total = sum(jnp.sum(scale_number(x, f)) for x, f in zip(numbers, factors, strict=True))
        return attach_unit(total / self.options.accumulate, output.units[0])

    def measure(self, value: Any, aux: Any, var_grads: Any) -> Metrics:
        norms = grad_norms(var_grads) if self.options.grad_norms else None
        return Metrics(value, aux, norms)

    def wrap_key(self, data: Any) -> Any:
        return data if self.impl is None else jr.wrap_key_data(data, impl=self.impl)


_PARAMETER = "parameter"


def list_kinds(num_params: int, optimizer: Any) -> list[Hashable]:
    """The kind of each parameter and of each array in its optax state.

    Those of one kind are packed together.
    """
    slots = optimizer.groups.find_slots(optimizer.opt_state)
    of_state = [None if name is None else slot for slot, name in slots]
    return [*[_PARAMETER] * num_params, *of_state]


def find_impl(key: Any) -> Any:
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return None
    return jr.key_impl(key)


def strip_key(key: Any) -> list[Any]:
    """The numbers of a key, which JAX passes to compiled functions faster than the key."""
    if key is None:
        return []
    return [key if find_impl(key) is None else jr.key_data(key)]


def name_key(key: Any) -> dict[str, Any]:
    """The keyword argument by which a function is passed a key, if there is one."""
    return {} if key is None else {"key": key}


_pack = jax.jit(Packing.pack, static_argnums=0)
_unpack = jax.jit(Packing.unpack, static_argnums=0)
