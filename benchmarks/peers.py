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
    "equimo": "equimo",
}
# What a case needs of them, where that is not the peer itself.
IMPORTS = {
    "nnx": ["flax.nnx"],
    "brain": ["brainstate", "braintools"],
    "vit": ["equimo.vision.models.vit"],
}
# The first words of the ways of others.
NAMES = {"Equinox", "brainstate", "saiunit", "nnx"}
# Peers that were left out are neither imported nor built, which takes some seconds.
_are_left_out = False


def leave_out_peers() -> None:
    """From here on, in this process, there are no peers."""
    global _are_left_out
    _are_left_out = True


def is_of_peer(way: str) -> bool:
    return way.split(",")[0] in NAMES


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def find_missing() -> list[str]:
    return [name for name in PEERS if not is_installed(name)]


def list_versions() -> dict[str, str]:
    names = ["jax", "equinox", "optax", "brainunit", *PEERS.values()]
    return {name: version(name) for name in names if is_installed(name)}


def by_peers(ways: dict[str, Callable[[], Any]], **peers: Callable[..., dict[str, Any]]) -> Any:
    """Adds the ways of the peers that are installed, by functions that take their modules."""
    if _are_left_out:
        return ways
    for name, make in peers.items():
        imports = IMPORTS.get(name, [name])
        if all(map(is_installed, imports)):
            ways |= make(*map(importlib.import_module, imports))
    return ways
