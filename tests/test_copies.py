"""Operators, selectors, optimizers and training steps compare, hash and are copied by value."""

import copy
import pickle

import cloudpickle
import equinox as eqx
import jax.numpy as jnp
import optax
import pytest
import vgrad_eqx as vg

from .helpers import make_mlp, tree_allclose


def cube(x):
    return x**3


def is_matrix(leaf):
    return leaf.ndim == 2


def get_layers(model):
    return model.layers


OPERATORS = {
    name: getattr(vg, name)
    for name in ("vector_grad", "grad", "jacrev", "jacfwd", "hessian", "elementwise_grad")
}
SELECTORS = {
    "path": lambda: vg.path("layers.0", "**.bias"),
    "instance": lambda: vg.instance(eqx.nn.Linear),
    "at": lambda: vg.at(get_layers),
    "leaf": lambda: vg.leaf(is_matrix),
    "and": lambda: vg.path("layers.0") & vg.leaf(is_matrix),
    "or": lambda: vg.path("layers.0") | vg.path("layers.1"),
    "not": lambda: ~vg.path("layers.0"),
}
MAKE = {
    **{name: lambda make=make: make(cube, argnums=0) for name, make in OPERATORS.items()},
    **SELECTORS,
    "Metrics": lambda: vg.Metrics(1.0, None, None),
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "cloudpickle": lambda x: cloudpickle.loads(cloudpickle.dumps(x)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("name", MAKE)
def test_a_copy_is_equal_and_works_alike(name, make_copy):
    original = MAKE[name]()
    twin = make_copy(original)
    assert twin == original
    if name != "Metrics":
        assert hash(twin) == hash(original)
    if name in OPERATORS:
        assert tree_allclose(twin(jnp.array(2.0)), original(jnp.array(2.0)))
    if name in SELECTORS:
        assert vg.states(make_mlp(), twin).keys() == vg.states(make_mlp(), original).keys()


@pytest.mark.parametrize("name", OPERATORS | SELECTORS)
def test_alike_by_value_and_other_by_options(name):
    assert len({MAKE[name](), MAKE[name]()}) == 1
    others = [make() for other, make in MAKE.items() if other != name]
    assert MAKE[name]() not in others


def test_options_make_other_operators():
    assert vg.grad(cube) != vg.grad(cube, argnums=0)
    assert vg.grad(cube) != vg.vector_grad(cube)


def test_optimizers_compare_as_modules_of_equinox():
    params = {"a": jnp.ones(3)}
    opt = vg.Optimizer(optax.adam(0.1), params)
    assert opt == vg.Optimizer(optax.adam(0.1), params)
    assert copy.deepcopy(opt) == opt
    assert opt != vg.Optimizer(optax.adam(0.2), params)
    _, following = opt.step(params, params)
    assert following != opt


def test_a_step_is_a_function():
    step, other = [vg.train_step(cube, optax.sgd(0.1)) for _ in range(2)]
    assert step == step
    assert step != other
    assert len({step, step, other}) == 2
    assert copy.deepcopy(step) == step
    assert "are donated" in str(step.__doc__)
