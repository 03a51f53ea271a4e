import equinox.internal as eqxi
import hypothesis
import jax
import pytest


jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling is most of the time of an example, and its share of it varies from run to run.
hypothesis.settings.register_profile("jax", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jax")


@pytest.fixture
def getkey():
    return eqxi.GetKey()
