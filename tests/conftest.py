import importlib
from importlib.metadata import version

import equinox.internal as eqxi
import hypothesis
import jax
import pytest


# To import brainstate 0.5 turns x64 off, so it is done before any test, and x64 set back.
x64 = jax.config.read("jax_enable_x64")
importlib.import_module("brainstate")
jax.config.update("jax_enable_x64", x64)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the time of an example, and its share of it varies from run to run.
hypothesis.settings.register_profile("jax", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jax")


# Nobody imports it, not even to look for doctests.
collect_ignore = ["typing/programs.py"]


def pytest_addoption(parser):
    for mark in ("slow", "nightly"):
        parser.addoption(f"--{mark}", action="store_true", help=f"run the {mark} tests as well")


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests that were not asked for."""
    left_out = [mark for mark in ("slow", "nightly") if not config.getoption(mark)]
    chosen = [not any(map(item.get_closest_marker, left_out)) for item in items]
    config.hook.pytest_deselected(
        items=[item for item, is_chosen in zip(items, chosen, strict=True) if not is_chosen]
    )
    items[:] = [item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen]


def pytest_report_header():
    versions = [f"{name} {version(name)}" for name in ("jax", "equinox", "optax", "brainunit")]
    return f"{', '.join(versions)}, {jax.numpy.result_type(float)}"


@pytest.fixture
def getkey():
    return eqxi.GetKey()
