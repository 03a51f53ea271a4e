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


def pytest_report_header():
    versions = [f"{name} {version(name)}" for name in ("jax", "equinox", "optax", "brainunit")]
    return f"{', '.join(versions)}, {jax.numpy.result_type(float)}"


@pytest.fixture
def getkey():
    return eqxi.GetKey()
