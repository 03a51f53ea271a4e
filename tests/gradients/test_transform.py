"""What a call refuses, `check_states` and `debug_nan`."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import vgrad_eqx as vg

from ..helpers import apply, make_mlp, tree_allclose


X = jnp.ones(3)
# Untyped, because most of these calls are wrong on purpose.
vector_grad: Any = vg.vector_grad


def square(x):
    return x**2


WRONG_OPTIONS = {
    "misspelt": (lambda: vector_grad(square, argnum=0), TypeError, "'argnum'"),
    "misspelt in decorator": (
        lambda: vector_grad(hasaux=True),
        TypeError,
        "'hasaux'",
    ),
    "func": (
        lambda: vector_grad("layers.*"),
        TypeError,
        r"`vector_grad\(func=...\)` must be a callable. Got 'layers.\*'. .* `@vector_grad\(",
    ),
    "func of decorator": (
        lambda: vector_grad(argnums=0)(3),
        TypeError,
        r"`vector_grad\(func=...\)` must be a callable. Got 3",
    ),
    "bool argnums": (
        lambda: vector_grad(square, argnums=True),
        TypeError,
        r"`vector_grad\(argnums=...\)` must be an int, or a list or .* Got True",
    ),
    "float argnums": (
        lambda: vector_grad(square, argnums=1.0),
        TypeError,
        "Got 1.0",
    ),
    "text argnums": (lambda: vector_grad(square, argnums="x"), TypeError, "Got 'x'"),
    "nested argnums": (
        lambda: vector_grad(square, argnums=((0, 1),)),
        TypeError,
        r"Got \(\(0, 1\),\)",
    ),
    "bool in argnums": (
        lambda: vector_grad(square, argnums=(0, False)),
        TypeError,
        r"Got \(0, False\)",
    ),
    "empty argnums": (
        lambda: vector_grad(square, argnums=()),
        ValueError,
        r"`vector_grad\(argnums=...\)` must name at least one argument. Got \(\)",
    ),
    "int for grad_states": (
        lambda: vector_grad(square, 0),
        TypeError,
        "A selector must be .* Got 0. To differentiate an argument, use `argnums`",
    ),
    "arrays for grad_states": (
        lambda: vector_grad(apply, vg.states(make_mlp())),
        TypeError,
        "(?s)A selector must be .* says which leaves to choose, and does not contain them",
    ),
    "model for grad_states": (
        lambda: vector_grad(apply, make_mlp()),
        TypeError,
        "(?s)A selector must be .* pass the tree itself as an argument",
    ),
    "no selector": (
        lambda: vector_grad(apply, {"a": []}),
        ValueError,
        r"`vector_grad\(grad_states=...\)` must name at least one selector. Got {'a': \[\]}",
    ),
    "object for grad_states": (
        lambda: vector_grad(apply, ["weight", 1.5]),
        TypeError,
        "A selector must be a path such as .* Got 1.5",
    ),
}


@pytest.mark.parametrize(
    ("wrap", "error", "match"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys()
)
def test_wrong_options_are_refused_on_wrapping(wrap, error, match):
    with pytest.raises(error, match=match):
        wrap()


WRONG_CALLS = {
    "no argument": (
        vector_grad(square),
        (),
        TypeError,
        "`vector_grad` differentiates positional arguments of `func`. Got none",
    ),
    "no state tree": (
        vector_grad(apply, True),
        (),
        TypeError,
        r"`vector_grad\(grad_states=...\)` selects leaves of the first positional",
    ),
    "out of range": (
        vector_grad(square, argnums=1),
        (X,),
        ValueError,
        r"`vector_grad\(argnums=...\)` must name a positional .* Got 1 in a call with 1",
    ),
    "out of range from the end": (
        vector_grad(square, argnums=-2),
        (X,),
        ValueError,
        "Got -2 in a call with 1",
    ),
    "repeated": (
        vector_grad(apply, argnums=(0, 0)),
        (make_mlp(), X),
        ValueError,
        r"must not name an argument twice. Got \(0, 0\)",
    ),
    "repeated from the end": (
        vector_grad(apply, argnums=(1, -1)),
        (make_mlp(), X),
        ValueError,
        r"must not name an argument twice. Got \(1, -1\)",
    ),
    "state tree": (
        vector_grad(apply, True, argnums=0),
        (make_mlp(), X),
        ValueError,
        "must not name the argument that `grad_states` selects from. Got 0",
    ),
    "state tree from the end": (
        vector_grad(apply, True, argnums=[1, -2]),
        (make_mlp(), X),
        ValueError,
        "must not name the argument that `grad_states` selects from. Got -2",
    ),
    "python int": (
        vector_grad(square),
        (3,),
        TypeError,
        "Got argument 0: 3, in which nothing can be differentiated. Convert numbers "
        r"by `jnp.asarray\(x, float\)`",
    ),
    "bool": (vector_grad(square), (True,), TypeError, "Got argument 0: True"),
    "self": (
        vector_grad(lambda self, x: x),
        (object(), X),
        TypeError,
        "Got argument 0: a `object`, .* Name another one, such as that after `self` by `argn",
    ),
    "int array": (
        vector_grad(square),
        (np.arange(2, dtype=np.int32),),
        TypeError,
        r"Got argument 0: i32\[2\]\(numpy\)",
    ),
    "text": (vector_grad(square), ("text",), TypeError, "Got argument 0: 'text'"),
    "key": (vector_grad(square), (jr.key(0),), TypeError, r"argument 0: key<fry>\[\]"),
    "pytree of ints": (
        vector_grad(square, argnums=[1]),
        (X, {"a": 3}),
        TypeError,
        "Got argument 1: {'a': 3}",
    ),
    "output of ints": (
        vector_grad(lambda x: {"n": 3}),
        (X,),
        TypeError,
        r"`vector_grad\(func=...\)` must return an inexact array .* Got {'n': 3}",
    ),
    "output of nothing": (
        vector_grad(lambda x: None),
        (X,),
        TypeError,
        "Got None, in",
    ),
    "no pair": (
        vector_grad(square, has_aux=True),
        (X,),
        TypeError,
        r"`vector_grad\(has_aux=True\)` needs a `func` that returns a pair .* Got f",
    ),
    "triple": (
        vector_grad(lambda x: (x, x, x), has_aux=True),
        (X,),
        TypeError,
        "needs a `func` that returns a pair",
    ),
    "unmatched path": (
        vector_grad(apply, "layer.0.weight"),
        (make_mlp(), X),
        ValueError,
        "The path 'layer.0.weight' matches nothing in the `MLP`. .*`layers.0.weight`",
    ),
    "nothing selected": (
        vector_grad(apply, "activation"),
        (make_mlp(), X),
        ValueError,
        r"`vector_grad\(grad_states=...\)` must select inexact arrays. Got path\('act",
    ),
    "filter spec": (
        vector_grad(apply, {"layers": True}),
        (make_mlp(), X),
        ValueError,
        "A filter spec must have the structure of the tree",
    ),
    "compiled module": (
        vector_grad(eqx.filter_jit(make_mlp()), True),
        (X,),
        TypeError,
        "(?s)Leaves of `MLP` cannot be selected inside .* Wrap the gradient instead",
    ),
}


@pytest.mark.parametrize(
    ("transform", "args", "error", "match"),
    WRONG_CALLS.values(),
    ids=WRONG_CALLS.keys(),
)
def test_wrong_calls_are_refused(transform, args, error, match):
    with pytest.raises(error, match=match):
        transform(*args)


@pytest.mark.parametrize(
    "make", [lambda s: s, lambda s: {"s": s}, lambda s: {"n": 3, "s": s}], ids=range(3)
)
def test_a_state_that_is_passed_as_an_argument_is_refused(make):
    state = vg.State(jnp.ones(2))
    with pytest.raises(TypeError, match=r"Got argument 0: .*State.*Pass the `value` of a"):
        vg.vector_grad(lambda argument: state.value)(make(state))


HIDDEN = {
    "jax.vmap": lambda model: jax.vmap(model),
    "jax.jit of jax.vmap": lambda model: jax.jit(jax.vmap(model)),
    "a method": lambda model: jax.vmap(model.__call__),
    "functools.partial": lambda model: ft.partial(model, key=None),
    "argument of functools.partial": lambda model: ft.partial(apply, model),
    "jax.tree_util.Partial": lambda model: jax.tree_util.Partial(apply, model),
    "jax.vmap of functools.partial": lambda model: jax.vmap(ft.partial(apply, model)),
    "another transform": lambda model: vg.vector_grad(jax.vmap(model)),
}


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN.keys())
@pytest.mark.parametrize("grad_states", ["**", True, "layers.0", {"a": "layers.0.weight"}])
def test_data_is_not_taken_for_the_leaves_of_a_hidden_module(hide, grad_states):
    func = hide(make_mlp())
    match = r"`jacrev\(grad_states=...\)` would .* f\d+\[4,3\], because `func` hides the `MLP`"
    with pytest.raises(TypeError, match=f"{match}.*`equinox.filter_vmap.*use `argnums`"):
        vg.jacrev(func, grad_states)(jnp.ones((4, 3)))


def test_data_beside_a_hidden_module_is_differentiated():
    model, x = make_mlp(), jnp.ones((2, 3))
    expected = jax.jacrev(jax.vmap(model))(x)
    assert tree_allclose(vg.jacrev(jax.vmap(model))(x), expected)
    of_tree = ft.partial(lambda model, tree: jax.vmap(model)(tree["x"]), model)
    assert tree_allclose(vg.jacrev(of_tree, "**")({"x": x}), {"x": expected})
    by_weight = vg.vector_grad(eqx.filter_vmap(model), "layers.0.bias")(x)
    summed = lambda bias: eqx.tree_at(lambda m: m.layers[0].bias, model, bias)
    expected = jax.grad(lambda bias: jax.vmap(summed(bias))(x).sum())(model.layers[0].bias)
    assert tree_allclose(by_weight, {"layers.0.bias": expected})
    assert tree_allclose(vg.vector_grad(jax.vmap(jnp.sin), "**")(x), {"": jnp.cos(x)})
    no_arrays = jax.vmap(eqx.nn.Lambda(jnp.sin))
    assert tree_allclose(vg.vector_grad(no_arrays, "**")(x), {"": jnp.cos(x)})


def test_state_tree_by_keyword_is_refused():
    with pytest.raises(TypeError, match="Got no positional argument"):
        vector_grad(apply, True)(model=make_mlp(), x=X)


TREE = {"used": jnp.ones(3), "idle": jnp.ones(3)}


def through_scan(tree, x):
    def body(carry, _):
        used, idle = carry
        return (used * x, idle), None

    (used, _), _ = jax.lax.scan(body, (tree["used"], tree["idle"]), length=2)
    return used


def through_while(tree, x):
    def body(carry):
        count, used, idle = carry
        return count + 1, used * x, idle

    _, used, _ = jax.lax.while_loop(
        lambda carry: carry[0] < 2, body, (0, tree["used"] * 1, tree["idle"])
    )
    return jax.lax.stop_gradient(used) + tree["used"]


def through_printing(tree, x):
    return tree["used"] * x, len(str(tree["idle"].shape))


INDEPENDENT = {
    "direct": lambda tree, x: tree["used"] * x,
    "integer output": lambda tree, x: (tree["used"] * x, tree["idle"].astype(int)),
    "jit": lambda tree, x: jax.jit(lambda used, idle: used * x)(**tree),
    "scan": through_scan,
    "cond": lambda tree, x: jax.lax.cond(
        x[0] > 0,
        lambda used, idle: used * x,
        lambda used, idle: used,
        *map(tree.get, ("used", "idle")),
    ),
    "checkpoint": lambda tree, x: jax.checkpoint(lambda used, idle: used * x)(**tree),
    "shape only": through_printing,
}


@pytest.mark.parametrize("func", INDEPENDENT.values(), ids=INDEPENDENT.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_leaf_on_which_the_output_does_not_depend_is_named(func, compiled):
    wrap = jax.jit if compiled else lambda func: func
    transform = wrap(lambda tree, x: vector_grad(func, True)(tree, x))
    match = (
        r"`vector_grad\(grad_states=...\)` must select leaves on which the output of `func` "
        "depends. It does not depend on `idle`. .* pass `check_states=False`"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            transform(TREE, X)
    unchecked = vector_grad(func, True, check_states=False)(TREE, X)
    assert tree_allclose(unchecked["idle"], jnp.zeros(3))
    assert set(vector_grad(func, "used")(TREE, X)) == {"used"}


BEHIND = {
    "stop_gradient": lambda tree, x: tree["used"] * x + jax.lax.stop_gradient(tree["idle"]),
    "sign": lambda tree, x: tree["used"] * jnp.sign(tree["idle"]),
    "integers": lambda tree, x: tree["used"] * tree["idle"].astype(int),
    "loop": lambda tree, x: jax.lax.map(
        lambda pair: pair[0] + jnp.floor(pair[1]), (tree["used"] * x, tree["idle"])
    ),
}


@pytest.mark.parametrize("func", BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_leaf_that_no_gradient_can_reach_is_named(func, compiled):
    wrap = jax.jit if compiled else lambda func: func
    with pytest.raises(ValueError, match="It does not depend on `idle`.*No gradient reaches"):
        wrap(lambda tree, x: vector_grad(func, True)(tree, x))(TREE, X)


def test_leaf_that_only_python_looks_at_is_named():
    func = lambda tree, x: tree["used"] * x if tree["idle"][0] > 0 else x
    with pytest.raises(ValueError, match="does not depend on `idle`"):
        vector_grad(func, True)(TREE, X)


def ignore_cotangent():
    func = jax.custom_vjp(lambda used, idle: used)
    func.defvjp(lambda used, idle: (used, None), lambda _, ct: (ct, jnp.zeros_like(ct)))
    return lambda tree, x: func(**tree) * x


DEPENDENT = {
    "custom_vjp": ignore_cotangent(),
    "times zero": lambda tree, x: tree["used"] * x + 0 * tree["idle"],
    "while": lambda tree, x: through_while({**tree, "used": tree["used"] * tree["idle"]}, x),
    "carry": lambda tree, x: (
        jax.lax.scan(
            lambda carry, _: ((carry[1], carry[0]), None),
            (tree["used"], tree["idle"]),
            length=3,
        )[0][0]
        + tree["used"]
    ),
}


@pytest.mark.parametrize("func", DEPENDENT.values(), ids=DEPENDENT.keys())
def test_leaf_on_which_the_output_depends_is_not_refused(func):
    for _ in range(2):
        checked = vector_grad(func, True)(TREE, X)
        assert tree_allclose(checked, vector_grad(func, True, check_states=False)(TREE, X))


def test_auxiliary_data_does_not_count_as_output():
    def func(tree, x):
        return tree["used"] * x, tree["idle"]

    with pytest.raises(ValueError, match="does not depend on `idle`"):
        vector_grad(func, True, has_aux=True)(TREE, X)


def test_arguments_are_not_checked():
    grads = vector_grad(lambda tree, x, y: tree["used"] * x, "used", argnums=[1, 2])
    assert tree_allclose(grads(TREE, X, X)[1], (jnp.ones(3), jnp.zeros(3)))


def test_each_call_is_checked_by_itself():
    def func(tree, x, flag=False):
        return tree["used"] * x + (tree["idle"] if flag else 0)

    transform = vector_grad(func, True)
    for flag in (True, False, True, False):
        if flag:
            assert set(transform(TREE, X, flag=True)) == {"used", "idle"}
        else:
            with pytest.raises(ValueError, match="does not depend on `idle`"):
                transform(TREE, X, flag=False)


def test_a_call_that_was_refused_is_refused_again():
    transform = vector_grad(lambda tree: tree["used"], True)
    for _ in range(3):
        with pytest.raises(ValueError, match="does not depend on `idle`"):
            transform(TREE)


NOT_FINITE = {
    "nan": (lambda tree, x: tree["a"] * jnp.nan, r"Got NaN in `a`"),
    "infinity": (
        lambda tree, x: jnp.log(tree["a"] * 0) * 1.0,
        "Got .*(NaN|infinity) in `a`",
    ),
    "both": (lambda tree, x: tree["a"] * x[0], "Got NaN and infinity in `a`"),
    "each": (
        lambda tree, x: tree["a"] * x[0] + tree["c"] * x[0][0] + tree["b"],
        "Got NaN and infinity in `a`, infinity in `c`",
    ),
}
BAD = jnp.array([[jnp.inf, jnp.nan]])


@pytest.mark.parametrize(("func", "match"), NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_debug_nan_names_the_paths(func, match):
    tree = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    transform = vector_grad(func, True, check_states=False, debug_nan=True)
    with pytest.raises(FloatingPointError, match=r"`vector_grad\(debug_nan=True\)` must"):
        transform(tree, BAD)
    for wrapped in (transform, jax.jit(transform), eqx.filter_jit(transform)):
        with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match=match):
            jax.block_until_ready(wrapped(tree, BAD))


def test_debug_nan_names_arguments():
    transform = vector_grad(lambda x, y: x * y["b"] / 0, argnums=[0, 1], debug_nan=True)
    with pytest.raises(FloatingPointError, match=r"`args\[0\]`, .* in `args\[1\].b`"):
        transform(1.0, {"a": jnp.ones(1), "b": jnp.ones(1)})


def test_debug_nan_under_vmap_and_scan():
    transform = vector_grad(lambda x: jnp.sqrt(x), debug_nan=True)
    xs = jnp.array([1.0, 0.0])
    match = r"Got infinity in `args\[0\]`"
    with pytest.raises((FloatingPointError, jax.errors.JaxRuntimeError), match=match):
        jax.block_until_ready(jax.vmap(transform)(xs))
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        jax.block_until_ready(jax.lax.map(transform, xs))


def test_debug_nan_is_quiet_about_finite_gradients():
    transform = vector_grad(apply, True, debug_nan=True)
    expected = vector_grad(apply, True)(make_mlp(), X)
    assert tree_allclose(transform(make_mlp(), X), expected)
    assert tree_allclose(eqx.filter_jit(transform)(make_mlp(), X), expected)
    assert vector_grad(square, debug_nan=True)(jnp.zeros((0,))).shape == (0,)


@pytest.mark.parametrize("check_states", [False, True])
def test_while_it_is_traced_the_function_is_called_once(check_states):
    calls = []

    def func(model, x):
        calls.append(x)
        return model(x)

    transform = vg.vector_grad(func, True, check_states=check_states)
    model, x = make_mlp(), jnp.ones(3)
    grads = eqx.filter_jit(transform)(model, x)
    assert len(calls) == 1
    assert tree_allclose(grads, vg.vector_grad(apply, True)(model, x))


@pytest.mark.parametrize("check_states", [False, True])
def test_while_it_is_traced_the_function_may_use_states(check_states):
    scale, calls = vg.State(jnp.array(2.0)), vg.State(0)

    def func(model, x):
        calls.value += 1
        scale.value = 2 * scale.value
        return scale.value * model(x)

    transform = vg.vector_grad(func, True, check_states=check_states)
    model, x = make_mlp(), jnp.ones(3)
    compiled = eqx.filter_jit(transform)
    for factor, count in [(4.0, 1), (8.0, 2)]:
        grads = compiled(model, x)
        expected = vg.vector_grad(lambda m, x, f=factor: f * m(x), True)(model, x)
        assert tree_allclose(grads, expected)
        assert int(calls.value) == count


def test_while_it_is_traced_an_error_of_the_function_is_raised():
    def func(model, x):
        raise RuntimeError("as asked for")

    with pytest.raises(RuntimeError, match="as asked for"):
        eqx.filter_jit(vg.vector_grad(func, True, check_states=False))(make_mlp(), jnp.ones(3))


class Wave(eqx.Module):
    frequency: jax.Array

    def __call__(self, x):
        return jnp.sin(self.frequency * x)


MAPPED = {"vmap": jax.vmap, "jit of vmap": lambda net: jax.jit(jax.vmap(net))}


@pytest.mark.parametrize("wrap", MAPPED.values(), ids=MAPPED.keys())
@pytest.mark.parametrize("name", ["elementwise_grad", "vector_grad", "jacrev"])
def test_a_mapped_module_is_differentiated_without_a_warning(wrap, name):
    """A warning is an error in these tests. Equinox warns of leaves such as `jax.vmap(net)`."""
    net, x = Wave(jnp.array(2.0)), jnp.linspace(0.0, 1.0, 5)
    transform = getattr(vg, name)(wrap(net))
    expected = 2 * jnp.cos(2 * x)
    expected = jnp.diag(expected) if name == "jacrev" else expected
    for each in (transform, jax.jit(transform), eqx.filter_jit(transform), vg.jit(transform)):
        assert tree_allclose(each(x), expected)
    assert callable(transform.func)
    assert transform.__wrapped__ is transform.func
