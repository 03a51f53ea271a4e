"""Wrong calls are answered: which argument, what it must be, what was given, and what to do.

The table is made by kind: each argument of the interface, with values that it cannot be.
"""

import atexit
import functools as ft
import os
import pathlib
import shutil
import tempfile
import traceback
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vgrad_eqx as vg

from .helpers import make_mlp


ONES = jnp.ones(2)
MODEL = make_mlp(10)
TREE = {"a": ONES, "b": {"c": 2 * ONES}, "n": 3, "none": None}
LONG = {f"layer_{i}_{'x' * 100}": ONES for i in range(100)}
WEIGHT = vg.State(ONES, name="weight")
SGD = optax.sgd(0.1)
Q: Any = ONES * u.ms


class Odd:
    """It can neither be printed nor hashed."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self):
        raise RuntimeError("never printed")


def total(tree):
    return jnp.sum(tree["a"]) + jnp.sum(tree["b"]["c"])


VALUES: dict[str, Any] = {
    "int": 3,
    "float": 2.5,
    "str": "layers",
    "none": None,
    "array": ONES,
    "quantity": Q,
    "model": MODEL,
    "long": LONG,
    "list": [1, 2],
    "bytes": b"w",
    "odd": Odd(),
    "tuple": (),
    "bool": True,
    "type": float,
    "func": total,
}


def pick(*names):
    return {name: VALUES[name] for name in names}


NO_FUNC = pick("int", "float", "str", "none", "array", "quantity", "long", "list", "odd")
NO_SELECTOR = pick("int", "float", "array", "quantity", "model", "long", "bytes", "odd", "type")
NO_INTS = pick("float", "str", "bool", "model", "odd", "type", "bytes", "func")
NO_COUNT = pick("float", "str", "bool", "none", "array", "model", "odd", "list")
NO_FLAG = pick("int", "str", "list", "array", "model", "odd", "type")
NO_STRING = pick("int", "float", "array", "model", "list", "bytes", "odd", "type")
NO_DICT = pick("int", "str", "array", "model", "list", "odd", "type", "func", "none")
NO_TX = pick("int", "str", "none", "array", "model", "list", "odd") | {"factory": optax.adam}
NO_UNIT = pick("int", "str", "array", "quantity", "model", "odd", "type")
NO_CLASS = pick("int", "str", "none", "array", "model", "list", "odd", "tuple", "func")
NO_TRAINING_STATE = pick("int", "none", "array", "model", "long", "odd", "list")

# A function of the wrong value, the wrong values, and the words of the message.
Rows = dict[str, tuple[Any, dict[str, Any], str]]
OPERATORS = ["vector_grad", "grad", "jacrev", "jacfwd", "hessian", "elementwise_grad"]


def list_operators() -> Rows:
    rows: Rows = {}
    for name in OPERATORS:
        operator = getattr(vg, name)
        rows[f"{name}.func"] = operator, NO_FUNC, f"`{name}(func=...)` must be a callable"
        rows[f"{name}.grad_states"] = (
            ft.partial(operator, total),
            NO_SELECTOR,
            "A selector must be a path such as",
        )
        rows[f"{name}.argnums"] = (
            lambda x, operator=operator: operator(total, argnums=x),
            NO_INTS,
            f"`{name}(argnums=...)` must be an int, or a list or tuple of ints",
        )
        for flag in ("return_value", "has_aux", "unit_aware", "check_states", "debug_nan"):
            rows[f"{name}.{flag}"] = (
                lambda x, flag=flag, operator=operator: operator(total, **{flag: x}),
                NO_FLAG,
                f"`{name}({flag}=...)` must be True or False",
            )
        rows[f"{name} of nothing to differentiate"] = (
            lambda x, operator=operator: operator(lambda x: x)(x),
            pick("int", "str", "none", "list", "odd", "tuple", "bytes"),
            "must name an argument with an inexact array in it",
        )
        rows[f"{name} with an output of nothing"] = (
            lambda out, operator=operator: operator(lambda x: out)(ONES),
            pick("int", "str", "none", "list", "tuple", "odd"),
            f"`{name}(func=...)` must return an inexact array",
        )
        rows[f"{name} without a pair"] = (
            lambda out, operator=operator: operator(lambda x: out, has_aux=True)(ONES),
            pick("int", "none", "array", "model", "tuple", "odd"),
            f"`{name}(has_aux=True)` needs a `func` that returns a pair",
        )
        rows[f"{name} of a position"] = (
            lambda x, operator=operator: operator(total, argnums=x)(TREE),
            {"above": 1, "below": -2, "of a list": [0, 7]},
            f"`{name}(argnums=...)` must name a positional argument",
        )
    rows["elementwise_grad.order"] = (
        lambda x: vg.elementwise_grad(jnp.sin, order=x),
        NO_COUNT,
        "`elementwise_grad(order=...)` must be an int",
    )
    rows["elementwise_grad.check"] = (
        lambda x: vg.elementwise_grad(jnp.sin, check=x),
        NO_FLAG | pick("none"),
        "`elementwise_grad(check=...)` must be True or False",
    )
    rows["elementwise_grad.order of no program"] = (
        lambda x: vg.elementwise_grad(jnp.tanh, order=x)(ONES),
        {"50": 50, "1000": 1000},
        "`elementwise_grad(order=...)` must give a program of at most 50,000 operations",
    )
    rows["vector_grad.cotangent"] = (
        lambda x: vg.vector_grad(jnp.sin, cotangent=x)(ONES),
        pick("str", "long", "list", "odd"),
        "`vector_grad(cotangent=...)` must",
    )
    return rows


def list_selecting() -> Rows:
    selecting = {
        "states": lambda x: vg.states(TREE, x),
        "summary": lambda x: vg.summary(TREE, x),
        "Optimizer": lambda x: vg.Optimizer(SGD, TREE, x),
        "train_step": lambda x: vg.train_step(total, SGD, x),
        "and": lambda x: vg.path("a") & x,
        "or": lambda x: x | vg.path("a"),
    }
    unmatched = {
        "typo": ("aa", "nearest paths are `a`"),
        "inner typo": ("b.d", "nearest paths are `b.c`"),
        "number": ("n", "(3)"),
        "none": ("none", "nothing at `none`"),
        "below": ("a.x", "nearest paths are"),
    }
    rows: Rows = {}
    for name, select in selecting.items():
        wrong = {k: v for k, v in NO_SELECTOR.items() if k != "quantity" or name != "or"}
        wrong = {k: v for k, v in wrong.items() if k != "array" or name != "or"}
        rows[f"{name}.selector"] = select, wrong, "A selector must be a path such as"
        if name in ("states", "summary", "Optimizer"):
            for kind, (glob, words) in unmatched.items():
                rows[f"{name} of a {kind}"] = select, {"path": glob}, words
    rows["path"] = vg.path, NO_STRING | pick("none"), "`path(*globs)` takes strings"
    rows["instance"] = vg.instance, NO_CLASS, "`instance(node_type)` takes a class"
    for name in ("at", "leaf"):
        wrong = NO_FUNC | pick("type")
        rows[name] = getattr(vg, name), wrong, f"`{name}("
    rows["at elsewhere"] = (
        lambda x: vg.states(TREE, vg.at(lambda tree: x)),
        pick("model", "quantity", "odd") | {"array": jnp.ones(2)},
        "`at(where)` must return a node of the tree",
    )
    rows["leaf without an answer"] = (
        lambda x: vg.states(TREE, vg.leaf(lambda leaf: x)),
        pick("none", "str", "array", "model", "list", "odd"),
        "must return True or False for a leaf",
    )
    globs = ["[z-a]", "{a", "a}", "a**", "**a", "[", "{a,b}" * 24, "{" * 500, "[]"]
    rows["malformed glob"] = (
        ft.partial(vg.states, TREE),
        {str(i): glob for i, glob in enumerate(globs)},
        "must be a glob",
    )
    return rows


def list_values() -> Rows:
    rows: Rows = {}
    for name in ("replace_states", "apply_updates"):
        merge = getattr(vg, name)
        place = {"replace_states": "values", "apply_updates": "updates"}[name]
        caller = f"`{name}({place}=...)`"
        rows[f"{name}.{place}"] = ft.partial(merge, TREE), NO_DICT, f"{caller} must be a dict"
        rows[f"{name} of no array"] = (
            lambda x, merge=merge: merge(TREE, {"a": x}),
            pick("str", "none", "model", "list", "odd", "type", "func"),
            f"{caller} at `a` must be an",
        )
        rows[f"{name} of another shape"] = (
            lambda x, merge=merge: merge(TREE, {"a": x}),
            {"longer": jnp.ones(3), "scalar": jnp.ones(()), "matrix": jnp.ones((2, 1))},
            f"{caller} at `a` must have the shape",
        )
        rows[f"{name} of another unit"] = (
            lambda x, merge=merge: merge(TREE, {"a": x}),
            {"ms": Q, "mV": ONES * u.mvolt},
            f"{caller} at `a` must have the dimension of the leaf",
        )
        unknown = {
            "aa": "nearest paths are `a`",
            "b": "It is a node with the leaves `b.c`",
            "n": "There is 3 at that path",
            "none": "There is None, or an empty node",
            "": "It is",
            "x" * 500: "nearest paths",
        }
        for i, (path, words) in enumerate(unknown.items()):
            if path:
                rows[f"{name} at {i}"] = (
                    lambda x, merge=merge: merge(TREE, {x: ONES}),
                    {"path": path},
                    words,
                )
    rows["grad_norms"] = (
        vg.grad_norms,
        pick("int", "str", "none", "list", "tuple", "odd"),
        "`grad_norms(var_grads=...)` must hold inexact arrays",
    )
    rows["plot_grad_norms.history"] = (
        vg.plot_grad_norms,
        pick("int", "str", "none", "list", "long", "odd", "model", "type", "array"),
        "`plot_grad_norms(history=...)` must be a list of dicts",
    )
    rows["plot_grad_norms of no norm"] = (
        lambda x: vg.plot_grad_norms([{"a": x}]),
        pick("str", "none", "list", "odd") | {"matrix": jnp.ones((2, 2))},
        "`plot_grad_norms(history=...)` must hold a number for each path",
    )
    rows["State.value"] = (
        vg.State,
        pick("str", "none", "list", "tuple", "odd", "type", "func"),
        "`State(value=...)` must hold an array",
    )
    rows["State.name"] = (
        lambda x: vg.State(ONES, x),
        {k: v for k, v in NO_STRING.items()},
        "`State(name=...)` must be a string",
    )
    return rows


def list_training() -> Rows:
    rows: Rows = {}
    rows["unitful.tx"] = vg.unitful, NO_TX, "`unitful(tx=...)` must be an optax transformation"
    rows["unitful.loss_unit"] = (
        ft.partial(vg.unitful, SGD),
        NO_UNIT,
        "`unitful(loss_unit=...)` must be a unit",
    )
    rows["unitful.scale"] = (
        lambda x: vg.unitful(SGD, scale=x),
        {k: v for k, v in NO_DICT.items() if k != "none"},
        "`unitful(scale=...)` must be a dict from path to scale",
    )
    rows["unitful.scale of no number"] = (
        lambda x: vg.unitful(SGD, scale={"a": x}),
        pick("str", "none", "model", "list", "odd", "type", "bool"),
        "`unitful(scale=...)` must hold a Quantity or a number",
    )
    rows["unitful.scale that is not positive"] = (
        lambda x: vg.unitful(SGD, scale={"a": x}),
        {"zero": 0.0, "below": -1, "nan": float("nan"), "quantity": 0 * u.ms},
        "`unitful(scale=...)` must hold positive sizes",
    )
    rows["unitful.scale at no path"] = (
        lambda x: vg.Optimizer(vg.unitful(SGD, scale={x: 1.0}), TREE, "a"),
        {"typo": "aa", "glob": "*.d", "below": "b.x"},
        "`unitful(scale=...)` must name paths of the parameters",
    )
    rows["unitful.scale of another shape"] = (
        lambda x: vg.unitful(SGD, scale={"a": x}).init(TREE),
        {"longer": jnp.ones(3), "matrix": jnp.ones((2, 2))},
        "`unitful(scale=...)` at `a` must be a number, or of the shape",
    )
    rows["unitful.scale of another unit"] = (
        lambda x: vg.unitful(SGD, scale={"a": x}).init({"a": Q}),
        {"number": 1.0, "mV": 1.0 * u.mvolt},
        "`unitful(scale=...)` at `a` must have the dimension",
    )
    rows["Optimizer.tx"] = (
        lambda x: vg.Optimizer(x, TREE),
        NO_TX,
        "`Optimizer(tx=...)` must be an optax transformation",
    )
    rows["Optimizer.step.var_grads"] = (
        lambda x: vg.Optimizer(SGD, TREE).step(TREE, x),
        NO_DICT,
        "`Optimizer.step(var_grads=...)` must be a dict",
    )
    rows["StateOptimizer.tx"] = (
        lambda x: vg.StateOptimizer(x, WEIGHT),
        NO_TX,
        "`StateOptimizer(tx=...)` must be an optax transformation",
    )
    rows["StateOptimizer.states"] = (
        lambda x: vg.StateOptimizer(SGD, x),
        VALUES,
        "`StateOptimizer(states=...)` must be a `vg.State`",
    )
    rows["partition.groups"] = vg.partition, NO_DICT, "`partition(groups=...)` must be a dict"
    rows["partition.groups of no transformation"] = (
        lambda x: vg.partition({"a": x}),
        NO_TX,
        "`partition(groups=...)` must be an optax transformation",
    )
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    optimizers = vg.Optimizer(injected, TREE), vg.StateOptimizer(injected, WEIGHT)
    for opt in (*optimizers, vg.train_step(total, injected).init(TREE)):
        name = f"{type(opt).__name__}.set_hyperparams"
        rows[f"{name} of a value"] = (
            lambda x, opt=opt: opt.set_hyperparams(learning_rate=x),
            pick(
                "str", "none", "array", "model", "long", "list", "bytes", "odd", "type", "func"
            ),
            "`set_hyperparams(...)` at `learning_rate` must be a number",
        )
        rows[f"{name} of a group"] = (
            lambda x, opt=opt: opt.set_hyperparams(x, learning_rate=1.0),
            pick("int", "float", "array", "model", "long", "list", "bytes", "odd"),
            "`set_hyperparams(...)` must name one group",
        )
    rows["train_step.func"] = (
        lambda x: vg.train_step(x, SGD),
        NO_FUNC,
        "`train_step(func=...)` must be a callable",
    )
    rows["train_step.tx"] = (
        lambda x: vg.train_step(total, x),
        NO_TX,
        "`train_step(tx=...)` must be an optax transformation",
    )
    for count in ("steps_per_call", "accumulate"):
        rows[f"train_step.{count}"] = (
            lambda x, count=count: vg.train_step(total, SGD, **{count: x}),
            NO_COUNT,
            f"`train_step({count}=...)` must be an int",
        )
    rows["train_step.keep_every"] = (
        lambda x: vg.train_step(total, SGD, keep_every=x),
        NO_COUNT,
        "`train_step(keep_every=...)` must be an int",
    )
    rows["train_step.extra_args"] = (
        lambda x: vg.train_step(total, SGD, extra_args=x),
        pick("int", "str", "array", "long", "list", "odd"),
        "`train_step(extra_args=...)` must be",
    )
    for flag in ("has_aux", "check_states", "packed", "grad_norms", "donate"):
        rows[f"train_step.{flag}"] = (
            lambda x, flag=flag: vg.train_step(total, SGD, **{flag: x}),
            NO_FLAG,
            f"`train_step({flag}=...)` must be True or False",
        )
    step = vg.train_step(total, SGD)
    rows["init.model"] = (
        step.init,
        pick("int", "str", "odd", "type", "bytes", "tuple"),
        "`train_step(grad_states=...)` must select inexact arrays",
    )
    rows["init.key"] = (
        lambda x: step.init(TREE, key=x),
        pick("int", "str", "array", "model", "long", "list", "odd", "func"),
        "`init(key=...)` must be a PRNG key",
    )
    rows["init.nn_state"] = (
        lambda x: step.init(TREE, nn_state=x),
        pick("int", "str", "array", "model", "long", "list", "odd"),
        "`init(nn_state=...)` must be the `equinox.nn.State`",
    )
    rows["init.optimizer"] = (
        lambda x: step.init(TREE, optimizer=x),
        pick("int", "str", "array", "model", "long", "list", "odd"),
        "`init(optimizer=...)` must be a `vg.Optimizer`",
    )
    rows["init.batch"] = (
        lambda x: step.init(TREE, batch=x),
        pick("int", "str", "array", "quantity", "model", "long", "odd"),
        "`init(batch=...)` must be a tuple",
    )
    rows["step"] = (
        step,
        NO_TRAINING_STATE,
        "takes the `TrainState` of `init`",
    )
    rows["jit.func"] = vg.jit, NO_FUNC, "`jit(func=...)` must be a callable"
    rows["jit.donate"] = (
        lambda x: vg.jit(total, donate=x),
        NO_STRING | {"typo": "every"},
        "`jit(donate=...)` must be one of 'all'",
    )
    return rows


class Opaque:
    """It holds an array, and is no pytree."""

    def __init__(self):
        self.array = ONES


def list_checkpoints() -> Rows:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = os.path.join(folder, "checkpoint")
    vg.save(path, {"a": ONES})
    no_path = {k: v for k, v in NO_STRING.items() if k != "bytes"} | pick("none")
    not_saved = {
        "object": Opaque(),
        "strings": np.array(["a"]),
        "masked": np.ma.masked_array([1.0], [True]),
        "structured": np.zeros(2, [("x", "f4")]),
    }
    rows: Rows = {}
    for name, call in {
        "save": lambda x: vg.save(x, {"a": ONES}),
        "load": lambda x: vg.load(x, {"a": ONES}),
    }.items():
        rows[f"{name}.path"] = call, no_path, f"`{name}(path=...)` must be a path"
        rows[f"{name} to nothing"] = call, {"empty": ""}, "must be the path of a file"
    rows["save.tree"] = (
        lambda x: vg.save(os.path.join(folder, "never"), x),
        pick("str", "none", "odd", "tuple", "type", "func"),
        "`save(tree=...)` must hold an array or a number",
    )
    for name, call in {
        "save(tree=...)": lambda x: vg.save(os.path.join(folder, "never"), {"w": x}),
        "load(like=...)": lambda x: vg.load(path, {"w": x}),
    }.items():
        rows[f"{name} of what is not saved"] = (
            call,
            not_saved,
            f"`{name}` must hold what can be saved. Got, at `w`",
        )
    rows["save of a shape"] = (
        lambda x: vg.save(os.path.join(folder, "never"), {"w": x}),
        {"shape": jax.ShapeDtypeStruct((2,), "float32")},
        "Pass such a tree to `load(like=...)`",
    )
    others = {"longer": {"a": jnp.ones(3)}, "dtype": {"a": jnp.ones(2, int)}, "unit": {"a": Q}}
    rows["load.like"] = (
        lambda x: vg.load(path, x),
        pick("int", "none", "array", "model", "long", "list") | others,
        "`load(like=...)` must be like the checkpoint",
    )
    rows["load.rename"] = (
        lambda x: vg.load(path, {"a": ONES}, rename=x),
        pick("int", "str", "array", "list", "bool"),
        "`load(rename=...)` must be a dict from paths in `like`",
    )
    rows["load.rename to no name"] = (
        lambda x: vg.load(path, {"a": ONES}, rename=lambda _: x),
        pick("int", "none", "array", "list"),
        "`load(rename=...)` must give the name of an array",
    )
    rows["load.rename of no path"] = (
        lambda x: vg.load(path, {"a": ONES}, rename={x: "a"}),
        {"typo": "aa", "int": 3},
        "`load(rename=...)` must have paths of arrays",
    )
    for flag in ("strict", "cast"):
        rows[f"load.{flag}"] = (
            lambda x, flag=flag: vg.load(path, {"a": ONES}, **{flag: x}),
            NO_FLAG | pick("none"),
            f"`load({flag}=...)` must be True or False",
        )
    return rows


ROWS = list_operators() | list_selecting() | list_values() | list_training()
ROWS |= list_checkpoints()
CASES = {
    f"{name}-{kind}": (call, value, words)
    for name, (call, values, words) in ROWS.items()
    for kind, value in values.items()
}


def test_the_table_covers_the_interface():
    assert len(CASES) >= 500


@pytest.mark.parametrize(("call", "value", "words"), CASES.values(), ids=CASES.keys())
def test_a_wrong_call_is_answered(call, value, words):
    with pytest.raises((TypeError, ValueError, u.UnitMismatchError)) as info:
        call(value)
    message = str(info.value)
    assert words in message
    assert len(message) <= 600
    assert "0x" not in message
    frames = traceback.extract_tb(info.value.__traceback__)
    package = pathlib.Path(vg.__file__).parent
    assert package in pathlib.Path(frames[-1].filename).parents
    assert "raise" in (frames[-1].line or "")
