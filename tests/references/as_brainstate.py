"""A plugin of pytest: brainstate and braintools differentiate by our `vector_grad`."""

import importlib

import brainstate
import vgrad_eqx as vg


def pytest_configure():
    exp_euler = importlib.import_module("brainstate.nn._exp_euler")
    for module in (brainstate.transform, exp_euler):
        assert callable(module.vector_grad)
        setattr(module, "vector_grad", vg.vector_grad)  # noqa: B010
