"""What the interpreter, a notebook and an editor show."""

import copy
import inspect
import pickle
import pydoc
import re

import cloudpickle
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
import vgrad_eqx as vg

from .helpers import make_mlp


def square(model, x):
    return jnp.sum(model(x) ** 2)


@vg.jit
def double(x):
    return 2 * x


class Loss(eqx.Module):
    weight: jax.Array

    @vg.jit
    def call(self, x):
        return jnp.sum(self.weight * x)


MODEL = make_mlp()
DEEP = eqx.nn.MLP(2, 1, 2, 500, key=jax.random.key(0))
W = vg.State(jnp.ones(2), name="w")
MANY = vg.State({f"p{i}": jnp.ones(2) for i in range(1000)})
TX = {"**.weight": optax.adam(1e-3), "**.bias": optax.sgd(0.1)}
STEP = vg.train_step(square, optax.adam(1e-3), "**.weight", packed=True)
STATE, METRICS = STEP(STEP.init(MODEL), jnp.ones(3))

SHOWN = {
    "vector_grad(square, grad_states=path('**.weight'), return_value=True)": vg.vector_grad(
        square, "**.weight", return_value=True
    ),
    "grad(square, argnums=1, check_states=False)": vg.grad(
        square, argnums=1, check_states=False
    ),
    "grad(square, has_aux=True, unit_aware=True, debug_nan=True)": vg.grad(
        square, has_aux=True, unit_aware=True, debug_nan=True
    ),
    "vector_grad(square, cotangent=ones_like)": vg.vector_grad(square, cotangent=jnp.ones_like),
    "jacrev(MLP of 1,004 leaves, grad_states=True)": vg.jacrev(DEEP, True),
    "grad(<lambda>, grad_states={'a': State(f32[2], name='w')})": vg.grad(
        lambda: W.value, {"a": W}
    ),
    "elementwise_grad(sin, order=2)": vg.elementwise_grad(jnp.sin, order=2),
    "jit(square)": vg.jit(square),
    "jit(hessian(square))": vg.jit(vg.hessian(square)),
    "Optimizer(count=0, leaves=1002)": vg.Optimizer(optax.adam(1e-3), DEEP),
    "Optimizer(count=0, leaves={'**.weight': 3, '**.bias': 3})": vg.Optimizer(TX, MODEL),
    "StateOptimizer([State(f32[2], name='w')])": vg.StateOptimizer(optax.adam(1e-3), [W]),
    "<bound method TrainStep of train_step(square, packed=True, "
    "grad_states=path('**.weight'))>": STEP,
    "TrainState(count=1, arrays=4)": jax.tree.map(lambda x: x, STATE),
    "Metrics(value=f32[3])": vg.Metrics(jnp.ones(3), None, None),
    "Metrics(value=2.5, grad_norms=dict of 20 leaves)": vg.Metrics(
        jnp.array(2.5), None, {str(i): jnp.ones(()) for i in range(20)}
    ),
    "State(f32[2], name='w')": W,
    "State(dict of 1,000 leaves)": MANY,
    "leaf(MLP)": vg.leaf(MODEL),
    "(at(<lambda>) & ~instance(MLP))": vg.at(lambda x: x) & ~vg.instance(eqx.nn.MLP),
}


class Holder(eqx.Module):
    held: object


@pytest.mark.parametrize(("text", "shown"), SHOWN.items(), ids=SHOWN.keys())
def test_public_objects_are_shown_in_short(text, shown):
    assert repr(shown) == text.replace(
        "f32", "f64" if jax.config.read("jax_enable_x64") else "f32"
    )
    # And so they are where Equinox prints them.
    assert eqx.tree_pformat(Holder(shown), width=200) == f"Holder(held={shown!r})"


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN.keys())
def test_completion_by_tab_shows_what_is_documented(shown):
    names = [name for name in dir(shown) if not name.startswith("_")]
    documented = {
        vg.Optimizer: vg.Optimizer,
        vg.StateOptimizer: vg.StateOptimizer,
        vg.TrainState: vg.TrainState,
        vg.GradientTransform: vg.GradientTransform,
        vg.Metrics: vg.Metrics,
        vg.State: vg.State,
    }.get(type(shown), vg.train_step if shown is STEP else vg.jit)
    doc = inspect.getdoc(documented) or ""
    assert {name for name in names if not re.search(rf"`{name}\b", doc)} == set()
    assert all(hasattr(shown, name) for name in names if name not in ("kept", "nn_state"))


def test_a_state_shows_the_attributes_of_its_subclass():
    class Tagged(vg.State):
        def __init__(self, value, tag):
            super().__init__(value)
            self.tag = tag

    assert [name for name in dir(Tagged(1.0, "a")) if not name.startswith("_")] == [
        "name",
        "tag",
        "value",
    ]


def test_metrics_are_shown_under_a_trace():
    @jax.jit
    def show(x):
        return jnp.array(len(repr(vg.Metrics(x, None, None))))

    assert int(show(jnp.ones(2, "int8"))) == len("Metrics(value=i8[2])")


def test_help_lists_the_public_names():
    text = pydoc.plain(pydoc.render_doc(vg))
    lines = text[: text.index("PACKAGE CONTENTS")].splitlines()
    listed = [line.strip().split("  ")[0] for line in lines if re.match(r" {8}\w", line)]
    assert sorted(", ".join(listed).split(", ")) == sorted(vg.__all__)


def test_what_is_compiled_is_found_by_its_name_as_functions_are():
    assert pickle.loads(pickle.dumps(double)) is double
    assert copy.deepcopy(double) is copy.copy(double) is double
    assert (double.__name__, double.__doc__) == ("double", None)
    assert list(inspect.signature(double).parameters) == ["x"]
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(vg.jit(lambda x: x))


def test_a_compiled_method_binds():
    loss = Loss(jnp.array([1.0, 2.0]))
    assert float(loss.call(jnp.ones(2))) == 3.0
    assert isinstance(inspect.getattr_static(Loss, "call"), type(double))
    assert vg.grad(double).func is double


def test_a_copy_of_a_step_goes_on_with_its_states():
    copied = copy.deepcopy({"step": STEP})["step"]
    state, _ = copied(STEP.init(MODEL), jnp.ones(3))
    assert state.count == 1
    assert isinstance(copied, vg.TrainStep)
    assert not isinstance(square, vg.TrainStep)


def test_a_step_is_pickled_with_its_states():
    step, state = pickle.loads(cloudpickle.dumps((STEP, STEP.init(MODEL))))
    state, _ = step(state, jnp.ones(3))
    assert state.count == 1
