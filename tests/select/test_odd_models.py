"""Models with odd parts: any name, many leaves, classes that check what they hold."""

import dataclasses
import time
from typing import Any

import equinox as eqx
import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import pytest
import vgrad_eqx as vg
from beartype import beartype
from jaxtyping import Array, Float, jaxtyped
from vgrad_eqx._select.glob import compile_glob


ONES = jnp.ones(2)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@hypothesis.given(NAMES, NAMES)
def test_every_name_is_selected_by_itself(name, other):
    """A `[a]` in a glob is a set, and in a name is a name."""
    hypothesis.assume(name != other and not other.startswith(f"{name}."))
    try:
        vg.path(name)
    except ValueError:  # a glob that is malformed
        name = "".join(f"[{each}]" if each in "*[{}" else each for each in name)
        hypothesis.assume(other != name and "**" not in name)
    model = {name: ONES, other: ONES}
    assert name in vg.states(model, name)
    assert set(vg.states(model)) == {name, other}


def match_segments(pattern: list[str], segments: list[str]) -> bool:
    """What a glob means, as it is defined."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(match_segments(pattern[1:], segments[i:]) for i in range(len(segments) + 1))
    is_first = bool(segments) and match_characters(pattern[0], segments[0])
    return is_first and match_segments(pattern[1:], segments[1:])


def match_characters(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(match_characters(pattern[1:], text[i:]) for i in range(len(text) + 1))
    if not text:
        return False
    if pattern.startswith("["):
        inside, _, rest = pattern[1:].partition("]")
        is_in = (text[0] in inside.lstrip("!")) != inside.startswith("!")
        return is_in and match_characters(rest, text[1:])
    return text[0] == pattern[0] and match_characters(pattern[1:], text[1:])


SEGMENTS = st.lists(
    st.sampled_from(["a", "b", "*", "[ab]", "[!a]", "a*b", "*a*", "*ab", "**"]),
    min_size=1,
    max_size=4,
)
PATHS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@hypothesis.settings(max_examples=400)
@hypothesis.given(SEGMENTS, PATHS)
def test_a_glob_matches_what_its_definition_does(pattern, segments):
    matched = compile_glob(".".join(pattern)).fullmatch(".".join(segments)) is not None
    assert matched == match_segments(pattern, segments)


@hypothesis.given(st.sampled_from(["a,b", "a,b,", "{a,b},b"]), PATHS)
def test_braces_are_one_of_their_choices(choices, segments):
    name = ".".join(segments)
    matched = compile_glob(f"*{{{choices}}}").fullmatch(name) is not None
    texts = choices.replace("{", "").replace("}", "").split(",")
    assert matched == any(compile_glob(f"*{text}").fullmatch(name) for text in texts)


SLOW = {
    "stars": "*a" * 40 + "*b",
    "double stars": "**." + "a.**." * 20 + "b",
    "both": ".".join(["**", "a*a*a*a"] * 10) + ".c",
    "sets": "*" + "[ab]" * 50 + "*c",
    "braces": "{a,*a}" * 9 + "b",
}


@pytest.mark.parametrize("glob", SLOW.values(), ids=SLOW.keys())
@pytest.mark.parametrize("name", ["a" * 3000, ".".join(["a" * 5] * 500)], ids=["one", "many"])
def test_no_glob_takes_more_than_linear_time(glob, name):
    start = time.process_time()
    assert compile_glob(glob).fullmatch(name) is None
    assert time.process_time() - start < 2


def make_cyclic_list():
    tree: list[Any] = [ONES]
    tree.append(tree)
    return tree


def make_cyclic_dict():
    tree: dict[str, Any] = {"a": ONES}
    tree["self"] = {"inner": tree}
    return tree


class Tree(eqx.Module):
    w: jax.Array
    children: list[Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    w: jax.Array
    parent: Any


def make_cyclic_module():
    tree = Tree(ONES, [])
    tree.children.append({"root": tree})
    return tree


def make_cyclic_node():
    node = Node(ONES, None)
    node.parent = (ONES, Tree(ONES, [node]))
    return node


def use_sgd(tree):
    return vg.Optimizer(optax.sgd(0.1), tree)


def of_second(tree, x):
    return jnp.sum(x)


def take_step(*batch, **kwargs):
    step = vg.train_step(lambda w, *_, **__: jnp.sum(w**2), optax.sgd(0.1))
    step(step.init(ONES), {"x": ONES})  # from now on, the type of an array is known
    return step(step.init(ONES), *batch, **kwargs)


CYCLIC = [make_cyclic_list, make_cyclic_dict, make_cyclic_module, make_cyclic_node]
CALLS = {
    **{name: getattr(vg, name) for name in ("states", "summary", "grad_norms", "State")},
    "grad by a selector": vg.grad(len, "**"),
    "grad": vg.grad(len),
    "jit": vg.jit(len),
    "jit of a function": lambda tree: vg.jit(jax.tree_util.Partial(len, tree))(),
    "in a dict": lambda tree: vg.states({"model": tree}),
    "save": lambda tree: vg.save("never written", tree),
    "load": lambda tree: vg.load("never read", tree),
    "Optimizer": use_sgd,
    "train_step": lambda tree: vg.train_step(len, optax.sgd(0.1)).init(tree),
    "batch": take_step,
    "named batch": lambda tree: take_step(label=tree),
    "selector": lambda tree: vg.grad(len, tree),
    "cotangent": lambda tree: vg.vector_grad(jnp.sin, cotangent=tree),
    "output": lambda tree: vg.vector_grad(lambda x: tree)(ONES),
    "output under jit": lambda tree: vg.jit(lambda: tree)(),
    "auxiliary data": lambda tree: vg.grad(lambda x: (x[0], tree), has_aux=True)(ONES),
    "beside units": lambda tree: vg.grad(of_second, argnums=1, unit_aware=True)(tree, ONES),
    "StateOptimizer": lambda tree: vg.StateOptimizer(optax.sgd(0.1), tree),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("make", CYCLIC)
def test_what_holds_itself_is_refused(make, call):
    with pytest.raises(ValueError, match="must not contain itself"):
        call(make())


@pytest.mark.parametrize("make", CYCLIC)
def test_errors_show_the_class_of_what_holds_itself(make):
    with pytest.raises(TypeError, match=r"must be a PRNG key.* Got a `\w+`\.$"):
        vg.train_step(len, optax.sgd(0.1)).init(ONES, key=make())


def test_what_is_shared_does_not_hold_itself():
    shared = [ONES]
    tree = {"a": shared, "b": [shared, Tree(ONES, shared)]}
    assert list(vg.states(tree)) == ["a.0", "b.0.0", "b.1.children.0", "b.1.w"]


def test_a_hundred_levels():
    model: Any = ONES
    for _ in range(100):
        model = {"a": [model]}
    (name,) = vg.states(model)
    assert list(vg.states(model, "**.a.0")) == [name]
    grad = vg.grad(lambda tree: jnp.sum(jax.tree.leaves(tree)[0]), "**")(model)
    assert grad[name].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"matches nothing") as info:
        vg.states(model, "a.0.b")
    assert len(str(info.value)) <= 600


@pytest.mark.slow
def test_a_hundred_thousand_leaves():
    array = jnp.ones(())
    model = {f"layer_{i}": array for i in range(100_000)}
    start = time.process_time()
    assert len(vg.states(model, "layer_*9")) == 10_000
    with pytest.raises(ValueError, match="nearest paths are"):
        vg.states(model, "leyer_5")
    assert time.process_time() - start < 10


class Unhashable:
    __hash__ = None  # pyright: ignore[reportAssignmentType]


def test_objects_without_a_hash_are_not_trained():
    model = {"w": ONES, "odd": Unhashable(), "list": [Unhashable()]}
    assert list(vg.states(model)) == ["w"]
    grad = vg.grad(lambda m: jnp.sum(m["w"] ** 2), "w")(model)
    assert grad["w"].tolist() == [2.0, 2.0]
    assert vg.replace_states(model, {"w": 2 * ONES})["odd"] is model["odd"]


@flax.struct.dataclass
class Pose:
    """Checks its field whenever it is built, and changes it."""

    q: Any
    n: Any = 3

    def __post_init__(self):
        if self.q.ndim != 1 or not isinstance(self.n, int):
            raise ValueError("one axis")
        object.__setattr__(self, "q", jnp.asarray(self.q) * 1)


@jtu.register_pytree_with_keys_class
@jaxtyped(typechecker=beartype)
@dataclasses.dataclass
class Annotated:
    q: Float[Array, "2"]

    def tree_flatten_with_keys(self):
        return [(jtu.GetAttrKey("q"), self.q)], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


CHECKED = {"flax": Pose(ONES), "annotated": Annotated(ONES)}


@pytest.mark.parametrize("node", CHECKED.values(), ids=CHECKED.keys())
def test_classes_that_check_what_they_hold_are_not_disturbed(node):
    shared = jnp.ones(2)
    model = {"pose": node, "a": shared, "b": shared}
    assert list(vg.states(model, vg.at(lambda m: m["pose"]))) == ["pose.q"]
    assert list(vg.states(model, vg.at(lambda m: (m["pose"].q, m["b"])))) == ["b", "pose.q"]
    assert list(vg.states(model, vg.instance(type(node)))) == ["pose.q"]
    assert list(vg.states(model, {"pose": True, "a": eqx.is_array, "b": False})) == [
        "a",
        "pose.q",
    ]
    loss = lambda m, x: jnp.sum(m["pose"].q ** 2) * x
    grads = vg.grad(loss, vg.at(lambda m: m["pose"].q))(model, 1.0)
    assert grads["pose.q"].tolist() == [2.0, 2.0]
    assert vg.apply_updates(model, grads)["pose"].q.tolist() == [3.0, 3.0]
    step = vg.train_step(loss, optax.sgd(0.25), "pose")
    state, _ = step(step.init(model), 1.0)
    assert state.model["pose"].q.tolist() == [0.5, 0.5]


def test_at_finds_one_of_two_places_of_an_array_and_of_a_state():
    array, state = jnp.ones(2), vg.State(jnp.ones(2))
    at_b = vg.at(lambda m: m["b"])
    assert list(vg.states({"a": array, "b": array}, at_b)) == ["b"]
    assert list(vg.states({"a": state, "b": state}, at_b)) == ["b"]
    assert list(jax.jit(lambda x: vg.states({"a": x, "b": x}, at_b))(array)) == ["b"]
