import doctest
import inspect
import subprocess
import sys

import pytest
import vgrad_eqx as vg


PUBLIC = {name: getattr(vg, name) for name in dir(vg) if not name.startswith("_")}


def test_what_is_public():
    assert set(PUBLIC) == {
        "GradientTransform",
        "Metrics",
        "Optimizer",
        "State",
        "StateOptimizer",
        "TrainState",
        "TrainStep",
        "apply_updates",
        "at",
        "elementwise_grad",
        "grad",
        "grad_norms",
        "hessian",
        "instance",
        "jacfwd",
        "jacrev",
        "jit",
        "leaf",
        "load",
        "partition",
        "path",
        "plot_grad_norms",
        "replace_states",
        "save",
        "states",
        "summary",
        "train_step",
        "unitful",
        "vector_grad",
    }


@pytest.mark.parametrize(("name", "public"), PUBLIC.items(), ids=PUBLIC.keys())
def test_docstring_is_complete(name, public):
    doc = inspect.getdoc(public)
    assert doc
    for heading in ("**Returns:**", "**Example:**"):
        assert heading in doc
    assert doctest.DocTestParser().get_examples(doc)
    # A sibling names only its own, after it has opened with "Like".
    if inspect.isfunction(public) and not doc.startswith("Like ["):
        for parameter in inspect.signature(public).parameters:
            assert f"- `{parameter}`:" in doc


def test_private_names_are_not_needed():
    assert vg.GradientTransform.__call__.__module__ == "vgrad_eqx._gradients.engine"
    assert vg.__version__.count(".") == 2


def test_brainunit_is_not_imported_for_functions_without_units():
    code = (
        "import sys, jax.numpy as jnp, vgrad_eqx as vg;"
        "vg.vector_grad(lambda tree: tree['a']**2, 'a')({'a': jnp.ones(2)});"
        "assert not {'brainunit', 'saiunit'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
