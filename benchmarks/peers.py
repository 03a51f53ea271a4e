"""The peers, of which those that are not installed are left out."""

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


# The import, and the name under which it is installed.
PEERS = {
    "brainstate": "brainstate",
    "braintools": "braintools",
    "saiunit": "saiunit",
    "flax.nnx": "flax",
    "orbax.checkpoint": "orbax-checkpoint",
}


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def find_missing() -> list[str]:
    return [name for name in PEERS if not is_installed(name)]


def list_versions() -> dict[str, str]:
    names = ["jax", "equinox", "optax", "brainunit", *PEERS.values()]
    return {name: version(name) for name in names if is_installed(name)}


def by_peers(ways: dict[str, Callable[[], Any]], **peers: Callable[..., dict[str, Any]]) -> Any:
    """Adds the ways of the peers that are installed, by functions that take their modules."""
    for name, make in peers.items():
        imports = {"nnx": ["flax.nnx"], "brain": ["brainstate", "braintools"]}.get(name, [name])
        if all(map(is_installed, imports)):
            ways |= make(*map(importlib.import_module, imports))
    return ways
