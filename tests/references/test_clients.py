"""The integrators of brainstate and braintools, with our `vector_grad` instead of theirs."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import brainstate
import jax.numpy as jnp
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose


def drift(x):
    return -x * 2.0 + brainstate.random.normal(size=x.shape)


def drift_that_counts(x):
    count.value = count.value + 1
    return -x + 0.1 * jnp.sin(x)


count = brainstate.ShortTermState(jnp.array(0))
WAYS = {"eager": lambda func: func, "jit": brainstate.transform.jit}


@pytest.mark.parametrize("func", [drift, drift_that_counts])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_step_with_states_of_brainstate_in_its_drift(way, func, monkeypatch):
    """A noisy drift sets the state of the generator of brainstate, a jitted one as well."""
    module = importlib.import_module("brainstate.nn._exp_euler")

    def integrate():
        brainstate.random.seed(3)
        count.value = jnp.array(0)
        step = way(lambda x: brainstate.nn.exp_euler_step(func, x))
        x = jnp.array([1.0, -2.0])
        with brainstate.environ.context(dt=0.1):
            for _ in range(3):
                x = step(x)
        return x, count.value, brainstate.random.normal()

    expected = integrate()
    monkeypatch.setattr(module, "vector_grad", vg.vector_grad)
    assert tree_allclose(integrate(), expected)


# Each file, the tests of it that are run, and those that are left out.
FILES = {
    "brainstate/nn/_exp_euler_test.py": ("", []),
    "braintools/quad/_ode_integrator_test.py": ("", []),
    "braintools/quad/_sde_integrator_test.py": ("", []),
    "brainstate/transform/_grad_grad_test.py": (
        "vector_grad or TestArgnumsValidation",
        [
            "test_vector_grad_decorator_factory",  # differentiates by a state of brainstate
            "test_negative_int_argnums_raises",  # ours count from the end, as JAX's do
            "test_negative_argnums_in_sequence_raises",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_their_tests_pass(file):
    spec = importlib.util.find_spec(file.partition("/")[0])
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parents[1] / file
    if not path.exists():
        pytest.skip("This release does not ship its tests.")
    chosen, left_out = FILES[file]
    words = " and ".join([f"({chosen})"] * bool(chosen) + [f"not {name}" for name in left_out])
    plugin = f"{__package__}.as_brainstate"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin]
        + ["--rootdir", str(path.parent), "-c", os.devnull, "-k", words, str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    assert " passed" in result.stdout
