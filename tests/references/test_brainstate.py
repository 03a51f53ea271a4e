"""The behavior of `brainstate.transform.vector_grad`, case by case, and where ours differs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose


class Library(NamedTuple):
    State: Any
    vector_grad: Callable[..., Any]


OURS = Library(vg.State, vg.vector_grad)
THEIRS = Library(brainstate.State, brainstate.transform.vector_grad)
X = jnp.array([2.0, 5.0])


class Setting:
    """Two parameters, a counter, and functions that use them."""

    def __init__(self, library):
        self.vector_grad = library.vector_grad
        self.weight = library.State(jnp.array([1.0, 2.0]))
        self.bias = library.State(jnp.array([3.0, 3.0]))
        self.count = library.State(jnp.array([0.0, 0.0]))

    def linear(self, x):
        return x * self.weight.value + self.bias.value

    def with_aux(self, x):
        return self.linear(x), x.sum()

    def counting(self, x):
        self.count.value = self.count.value + x * self.weight.value
        return self.count.value * self.weight.value

    def of_two(self, x, y):
        return x * y * self.weight.value


CASES = {
    "pure function": lambda s: s.vector_grad(jnp.square)(X),
    "several outputs": lambda s: s.vector_grad(lambda x: (2 * x, 3 * x))(X),
    "single state": lambda s: s.vector_grad(s.linear, s.weight)(X),
    "list": lambda s: s.vector_grad(s.linear, [s.weight, s.bias])(X),
    "tuple": lambda s: s.vector_grad(s.linear, (s.weight, s.bias))(X),
    "dict": lambda s: s.vector_grad(s.linear, {"w": s.weight, "b": s.bias})(X),
    "one state twice": lambda s: s.vector_grad(s.linear, [s.weight, s.weight])(X),
    "value": lambda s: s.vector_grad(s.linear, [s.weight], return_value=True)(X),
    "aux": lambda s: s.vector_grad(s.with_aux, [s.weight], has_aux=True)(X),
    "value and aux": lambda s: s.vector_grad(
        s.with_aux, [s.weight], has_aux=True, return_value=True
    )(X),
    "argnums int": lambda s: s.vector_grad(s.linear, [s.weight], argnums=0)(X),
    "argnums list": lambda s: s.vector_grad(s.linear, [s.weight], argnums=[0])(X),
    "argnums of two": lambda s: s.vector_grad(s.of_two, s.weight, [1, 0])(X, X + 1),
    "argnums alone": lambda s: s.vector_grad(s.of_two, argnums=1)(X, X + 1),
    "argnums, value and aux": lambda s: s.vector_grad(
        s.with_aux, s.weight, 0, return_value=True, has_aux=True
    )(X),
    "keyword argument": lambda s: s.vector_grad(s.of_two, [s.weight])(X, y=X + 1),
    "decorator with options": lambda s: s.vector_grad(grad_states=[s.weight])(s.linear)(X),
    "decorator": lambda s: s.vector_grad(s.linear)(X),
    "state that is written": lambda s: (
        s.vector_grad(s.counting, [s.weight])(X),
        s.count.value,
    ),
    "state that is written, argnums alone": lambda s: (
        s.vector_grad(s.counting)(X),
        s.count.value,
    ),
    "state that is not touched": lambda s: s.vector_grad(
        s.linear, [s.weight, s.count], check_states=False
    )(X),
    "twice": lambda s: [s.vector_grad(s.counting, [s.weight])(X) for _ in range(2)],
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_as_brainstate(case):
    assert tree_allclose(case(Setting(OURS)), case(Setting(THEIRS)))


REFUSED = {
    "state that is not touched": (
        lambda s: s.vector_grad(s.linear, [s.weight, s.count])(X),
        ValueError,
    ),
    "argument that is not there": (lambda s: s.vector_grad(s.linear, argnums=3)(X), Exception),
    "bool for argnums": (
        lambda s: s.vector_grad(s.linear, argnums=True)(X),
        (TypeError, ValueError),
    ),
    "misspelt option": (lambda s: s.vector_grad(s.linear, return_valu=True)(X), TypeError),
    "aux without a pair": (lambda s: s.vector_grad(s.linear, has_aux=True)(X), Exception),
    "error in func": (
        lambda s: s.vector_grad(lambda x: 1 / 0, [s.weight])(X),
        ZeroDivisionError,
    ),
}


@pytest.mark.parametrize(("case", "kind"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("library", [OURS, THEIRS], ids=["vgrad_eqx", "brainstate"])
def test_refused_as_by_brainstate(case, kind, library):
    with pytest.raises(kind):
        case(Setting(library))


class Net(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = brainstate.ParamState(jnp.ones((2, 2)))

    def __call__(self, x):
        return self.weight.value @ x


def test_object_with_states():
    theirs = Net()
    ours = Net.__new__(Net)
    vars(ours)["weight"] = weight = vg.State(jnp.ones((2, 2)))
    states = theirs.states()
    expected = THEIRS.vector_grad(lambda x: theirs(x), states)(X)
    grads = OURS.vector_grad(lambda x: Net.__call__(ours, x), {"weight": weight})(X)
    assert tree_allclose(list(grads.values()), list(expected.values()))


@pytest.mark.parametrize("library", [OURS, THEIRS], ids=["vgrad_eqx", "brainstate"])
def test_first_example_of_its_docstring(library):
    def f(x):
        return jnp.array([x[0] ** 2, x[1] ** 3, x[0] * x[1]])

    gradients = library.vector_grad(f)(jnp.array([2.0, 3.0]))
    # The docstring says that the shape is (3, 2), which is that of the Jacobian.
    assert gradients.shape == (2,)
    assert gradients.tolist() == [7.0, 29.0]


@pytest.mark.parametrize("library", [OURS, THEIRS], ids=["vgrad_eqx", "brainstate"])
def test_second_example_of_its_docstring(library):
    params = library.State(jnp.array([1.0, 2.0]))

    def model(x):
        return jnp.array([x * params.value[0], x**2 * params.value[1]])

    (gradient,) = library.vector_grad(model, grad_states=[params])(3.0)
    assert gradient.shape == (2,)
    assert gradient.tolist() == [3.0, 9.0]


def test_differs_in_negative_argnums():
    """They count from the end, as in `jax.grad`, and are not refused."""
    ours, theirs = Setting(OURS), Setting(THEIRS)
    assert tree_allclose(ours.vector_grad(ours.of_two, argnums=-1)(X, X), X * ours.weight.value)
    with pytest.raises(ValueError, match="argnums -1 is negative"):
        theirs.vector_grad(theirs.of_two, argnums=-1)(X, X)


def test_differs_in_integers():
    """They get `None` as in Equinox, and no `float0` array."""
    tree = {"a": X, "n": jnp.array(2)}
    assert OURS.vector_grad(lambda t: t["a"] * t["n"])(tree)["n"] is None
    assert THEIRS.vector_grad(lambda t: t["a"] * t["n"])(tree)["n"].dtype == jax.dtypes.float0


def test_differs_in_states_of_integers():
    """Nothing in them can be differentiated, which is an error."""
    with pytest.raises(TypeError, match="in which nothing can be differentiated"):
        OURS.vector_grad(lambda x: x, [vg.State(1)])(X)
    (grad,) = THEIRS.vector_grad(
        lambda x: x, [brainstate.State(jnp.array(1))], check_states=False
    )(X)
    assert grad.dtype == jax.dtypes.float0


def test_differs_in_aux():
    """It may hold anything, because only its arrays leave the traced function."""
    ours, theirs = Setting(OURS), Setting(THEIRS)
    _, aux = ours.vector_grad(lambda x: (ours.linear(x), "text"), ours.weight, has_aux=True)(X)
    assert aux == "text"
    with pytest.raises(TypeError, match="str"):
        theirs.vector_grad(lambda x: (theirs.linear(x), "text"), theirs.weight, has_aux=True)(X)


def test_differs_in_no_states():
    """An empty list is a mistake, and not the same as leaving `grad_states` out."""
    with pytest.raises(ValueError, match="must name at least one"):
        OURS.vector_grad(jnp.square, [])
    assert tree_allclose(THEIRS.vector_grad(lambda x: x**2, [])(X), 2 * X)


def test_differs_in_shapes_for_life():
    """Compiled functions hold the state, so another shape is refused when it is set."""
    ours, theirs = vg.State(X), brainstate.State(X)
    with pytest.raises(ValueError, match="must keep its structure, shapes and dtypes"):
        ours.value = jnp.ones(3)
    theirs.value = jnp.ones(3)
    assert theirs.value.shape == (3,)


def test_differs_in_jit():
    """`jax.jit` knows states by reference, and there is no other one to use."""
    ours = Setting(OURS)
    step = jax.jit(lambda x: ours.vector_grad(ours.counting, [ours.weight])(x))
    step(X)
    ours.count.value = jnp.zeros(2)
    theirs = Setting(THEIRS)
    transform = theirs.vector_grad(theirs.counting, [theirs.weight])
    compiled: Any = brainstate.transform.jit(transform)
    assert tree_allclose(step(X), compiled(X))
    assert tree_allclose(ours.count.value, theirs.count.value)


USES = {
    "grad_states": lambda net: vg.vector_grad(lambda x: net(x), net.states()),
    "one of them": lambda net: vg.vector_grad(lambda x: net(x), [net.weight]),
    "StateOptimizer": lambda net: vg.StateOptimizer(optax.sgd(0.1), net.states()),
    "states of a tree": lambda net: vg.states({"net": net}),
    "states of states": lambda net: vg.states(dict(net.states())),
    "argument": lambda net: vg.grad(lambda net: 0.0)(net),
    "selector": lambda net: vg.grad(lambda tree: 0.0, "**")({"net": net}),
    "Optimizer": lambda net: vg.Optimizer(optax.sgd(0.1), net.states()),
    "train_step": lambda net: vg.train_step(lambda net: 0.0, optax.sgd(0.1)).init([net]),
    "save a net": lambda net: vg.save("checkpoint", net),
    "save states": lambda net: vg.save("checkpoint", net.states()),
    "save beside arrays": lambda net: vg.save("checkpoint", [X, {"w": net.weight}]),
    "load": lambda net: vg.load("checkpoint", [X, {"w": net.weight}]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_its_objects_are_refused_by_the_name_of_ours(use):
    with pytest.raises(TypeError, match=r"`vg\.State\(value\)`.*treefy_split"):
        use(brainstate.nn.Linear(3, 2))


def test_a_split_net_is_differentiated_by_selector():
    net = brainstate.nn.Linear(3, 2)
    graphdef, states = brainstate.graph.treefy_split(net)
    x = jnp.ones(3)

    def apply(states, x):
        return brainstate.graph.treefy_merge(graphdef, states)(x)

    grads = vg.vector_grad(apply, "**")(states, x)
    assert sorted(map(jnp.shape, grads.values())) == [(2,), (3, 2)]
    assert all(bool(jnp.all(grad == 1.0)) for grad in grads.values())


def test_a_split_net_is_saved_and_loaded(tmp_path):
    graphdef, states = brainstate.graph.treefy_split(brainstate.nn.Linear(3, 2))
    vg.save(tmp_path / "net", states)
    zeros = jax.tree.map(jnp.zeros_like, states)
    assert tree_allclose(vg.load(tmp_path / "net", zeros), states)
