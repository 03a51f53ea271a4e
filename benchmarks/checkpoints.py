"""Saving and loading arrays, each written to the same disk in its own format."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import vgrad_eqx as vg

from .gradients import Ways
from .peers import is_installed


NUM_ARRAYS = 100


def make_arrays(megabytes: int) -> dict[str, jax.Array]:
    """Arrays of a float32, of so many megabytes together."""
    width = megabytes * 10**6 // (4 * NUM_ARRAYS * 1000)
    return {f"layers.{i}": jnp.full((1000, width), i, "float32") for i in range(NUM_ARRAYS)}


def make_ways(arrays: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """How each program saves and loads them. The first is the floor."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shapes = jax.eval_shape(lambda: arrays)

    def load_npz():
        with np.load(folder / "numpy.npz") as file:
            return {name: jnp.asarray(file[name]) for name in file.files}

    ways = {
        "safetensors": (
            lambda: safetensors.flax.save_file(dict(arrays), folder / "safetensors"),
            lambda: safetensors.flax.load_file(folder / "safetensors"),
        ),
        "vg.save, vg.load": (
            lambda: vg.save(folder / "vg", arrays),
            lambda: vg.load(folder / "vg", shapes),
        ),
        "np.savez": (lambda: np.savez(folder / "numpy.npz", **arrays), load_npz),
        "Equinox": (
            lambda: eqx.tree_serialise_leaves(folder / "equinox", arrays),
            lambda: eqx.tree_deserialise_leaves(folder / "equinox", shapes),
        ),
    }
    if is_installed("orbax.checkpoint"):
        import orbax.checkpoint as ocp

        checkpointer = ocp.StandardCheckpointer()

        def save_by_orbax():
            checkpointer.save(folder / "orbax", arrays, force=True)
            checkpointer.wait_until_finished()

        ways["orbax"] = (save_by_orbax, lambda: checkpointer.restore(folder / "orbax", arrays))
    return ways


def saving(megabytes: int) -> Ways:
    return {name: save for name, (save, _) in make_ways(make_arrays(megabytes)).items()}


def loading(megabytes: int) -> Ways:
    ways = make_ways(make_arrays(megabytes))
    for save, _ in ways.values():
        save()
    return {name: load for name, (_, load) in ways.items()}
