"""Shardings of arrays, and how to give them to other arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def shard_like(arrays: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """Asks the compiler to shard each array like the leaf with its shape and dtype.

    A traced leaf does not know its devices, unless its mesh axes are explicit, and then JAX
    gives them to its gradient. So the two are tied together: the compiler shards the operands
    and the result of an elementwise operation alike, and removes a `where` that always chooses
    the same side.
    """
    if not _is_automatic(jax.sharding.get_abstract_mesh()):
        return list(arrays)
    # Not `lax.select`, which is removed before the sharding is chosen.
    return [jnp.where(False, leaf, array) for array, leaf in zip(arrays, leaves, strict=True)]


def _is_automatic(mesh: Any) -> bool:
    return all(kind is AxisType.Auto for kind in mesh.axis_types)


def spread(arrays: Sequence[Any], others: Sequence[Any] = ()) -> list[Any]:
    """Replicates arrays that are on one device, if another array is on several devices."""
    shardings = [getattr(array, "sharding", None) for array in (*arrays, *others)]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
            everywhere = NamedSharding(sharding.mesh, PartitionSpec())
            return [
                jax.device_put(array, everywhere) if array.sharding.num_devices == 1 else array
                for array in arrays
            ]
    return list(arrays)


def find_sharding(array: jax.Array) -> NamedSharding | None:
    """The sharding of an array that JAX would not preserve automatically."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    return sharding if _is_automatic(sharding.mesh) else None


def constrain(arrays: Sequence[Any], shardings: Sequence[NamedSharding | None]) -> list[Any]:
    return [
        array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)
        for array, sharding in zip(arrays, shardings, strict=True)
    ]
