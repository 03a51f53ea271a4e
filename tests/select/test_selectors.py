import operator
import re
from typing import Any

import brainstate
import brainunit as u
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import make_mlp


class Body(eqx.Module):
    weight: jax.Array
    bias: jax.Array | None
    count: jax.Array
    key: jax.Array
    activation: object
    rate: float


class Net(eqx.Module):
    encoder: list
    head: dict
    norm: eqx.nn.LayerNorm


def make_body():
    return Body(
        jnp.ones((2, 3)),
        None,
        jnp.arange(3, dtype=jnp.int32),
        jr.key(0),
        jax.nn.relu,
        0.5,
    )


def make_net():
    head = {
        "kernel": jnp.ones(2),
        "9": np.ones(3, np.float32),
        "mask": np.ones(2, bool),
    }
    return Net([make_body(), make_body()], head, eqx.nn.LayerNorm(2))


make_spec: Any = Net


EVERY = [
    "encoder.0.weight",
    "encoder.1.weight",
    "head.9",
    "head.kernel",
    "norm.bias",
    "norm.weight",
]

GLOBS = {
    "encoder.0.weight": ["encoder.0.weight"],
    "encoder.*.weight": ["encoder.0.weight", "encoder.1.weight"],
    "*.weight": ["norm.weight"],
    "**.weight": ["encoder.0.weight", "encoder.1.weight", "norm.weight"],
    "**": EVERY,
    "encoder": EVERY[:2],
    "encoder.**": EVERY[:2],
    "encoder.1": ["encoder.1.weight"],
    "enc*.[1-9].w*": ["encoder.1.weight"],
    "encoder.[!0].weight": ["encoder.1.weight"],
    "{head,norm}.{kernel,bias}": ["head.kernel", "norm.bias"],
    "{head.{9,kernel},norm.bias}": ["head.9", "head.kernel", "norm.bias"],
    "**.{9,weight}": ["encoder.0.weight", "encoder.1.weight", "head.9", "norm.weight"],
    "encoder.**.weight": ["encoder.0.weight", "encoder.1.weight"],
}


@pytest.mark.parametrize(("glob", "expected"), GLOBS.items(), ids=GLOBS.keys())
def test_glob(glob, expected):
    assert list(vg.states(make_net(), glob)) == expected
    assert list(vg.states(make_net(), vg.path(glob))) == expected


def test_glob_matches_regular_characters_literally():
    tree = {"a+b": jnp.ones(1), "aab": jnp.ones(1), "(c": jnp.ones(1), "^": jnp.ones(1)}
    assert list(vg.states(tree, "a+b")) == ["a+b"]
    assert list(vg.states(tree, "(c")) == ["(c"]
    assert list(vg.states(tree, "[^]")) == ["^"]


# Names that a glob selects, and others that it does not.
EDGES = {
    "a.**.**": (["a", "a.b", "a.b.c"], ["ab", "b", "b.a"]),
    "a[!b]c": (["acc", "axc"], ["a.c", "abc"]),
    r"[\a]": (["\\", "a"], ["\\a", "b"]),
    r"[!\a]": (["b"], ["\\", "a", "bb"]),
}


@pytest.mark.parametrize(("glob", "names"), EDGES.items(), ids=EDGES.keys())
def test_edges_of_globs(glob, names):
    tree = {name: jnp.ones(1) for name in sum(names, [])}
    assert list(vg.states(tree, glob)) == names[0]


@pytest.mark.parametrize("second", ["{b,c}", "{b,c,d}"])
def test_braces_for_more_than_a_thousand_paths_are_refused(second):
    glob = f"{{{','.join(f'a{i}' for i in range(500))}}}{second}"
    tree = {f"a{i}{end}": jnp.ones(1) for i in range(500) for end in ("b", "c", "")}
    if second == "{b,c}":
        assert len(vg.states(tree, glob)) == 1000
    else:
        with pytest.raises(ValueError, match="braces for more than 1,000 paths"):
            vg.states(tree, glob)


@pytest.mark.parametrize(
    ("glob", "unmatched"),
    [
        ("**.{down,upp}", "**.upp"),
        ("{embed,blocks.{0,1}}", "blocks.1"),
        ("{embed,none}.{weight,scale}", "embed.scale"),
        ("blocks.{0,1,2}.{down,up}", "blocks.1.down"),
    ],
)
def test_each_text_in_braces_must_match(glob, unmatched):
    one = jnp.ones(1)
    tree = {"embed": {"weight": one}, "blocks": [{"down": one, "up": one}]}
    tree["none"] = {"weight": one, "bias": None}
    match = f"matches nothing in the `dict` for '{re.escape(unmatched)}'"
    with pytest.raises(ValueError, match=match):
        vg.states(tree, glob)
    assert list(vg.states(tree, "{embed,none}.{weight,bias}")) == [
        "embed.weight",
        "none.weight",
    ]


def test_the_nearest_paths_of_a_name_after_two_stars_are_deep():
    tree = {"embed": jnp.ones(1), "blocks": [{"attn": {"down": jnp.ones(1)}}]}
    with pytest.raises(ValueError, match="nearest paths are `blocks.0.attn.down`"):
        vg.states(tree, "**.dwon")


SELECTORS = {
    "all": (True, EVERY),
    "several globs": (vg.path("head.9", "norm.bias"), ["head.9", "norm.bias"]),
    "instance": (vg.instance(Body), EVERY[:2]),
    "several types": (vg.instance((Body, eqx.nn.LayerNorm)), EVERY[:2] + EVERY[4:]),
    "type of a leaf": (vg.instance(np.ndarray), ["head.9"]),
    "at a leaf": (vg.at(lambda net: net.norm.bias), ["norm.bias"]),
    "at a node": (vg.at(lambda net: net.encoder[1]), ["encoder.1.weight"]),
    "at several": (
        vg.at(lambda net: (net.norm, net.head["9"])),
        EVERY[2:3] + EVERY[4:],
    ),
    "leaf": (vg.leaf(lambda leaf: leaf.ndim == 2), EVERY[:2]),
    "and": (vg.path("**.weight") & vg.instance(Body), EVERY[:2]),
    "string and": ("**.weight" & vg.instance(Body), EVERY[:2]),
    "and string": (vg.instance(Body) & "encoder.1", EVERY[1:2]),
    "or": (vg.path("norm") | "head", EVERY[2:]),
    "string or": ("norm" | vg.path("head"), EVERY[2:]),
    "not": (
        ~vg.instance((Body, eqx.nn.LayerNorm)) | "norm.bias",
        [*EVERY[2:4], "norm.bias"],
    ),
    "not not": (~~vg.path("norm"), EVERY[4:]),
    "predicate": (eqx.is_inexact_array, EVERY),
    "predicate and": (vg.path("norm") & eqx.is_array, EVERY[4:]),
    "prefix": (make_spec(True, {"9": True, "kernel": False, "mask": True}, False), EVERY[:3]),
    "prefix of predicates": (make_spec(False, False, eqx.is_array), EVERY[4:]),
}


@pytest.mark.parametrize(("selector", "expected"), SELECTORS.values(), ids=SELECTORS.keys())
def test_selector(selector, expected):
    for _ in range(2):
        assert list(vg.states(make_net(), selector)) == expected


def test_full_filter_spec_as_for_eqx_partition():
    net = make_net()
    spec = jtu.tree_map(lambda _: False, net)
    spec = eqx.tree_at(lambda net: net.norm, spec, jtu.tree_map(lambda _: True, net.norm))
    assert list(vg.states(net, spec)) == EVERY[4:]


def test_only_objects_of_brainstate_are_told_of_it():
    with pytest.raises(TypeError, match="brainstate, make a `vg.State` of its `value`"):
        vg.states(make_net(), brainstate.nn.Module())
    with pytest.raises(TypeError) as info:
        vg.states(make_net(), object())  # pyright: ignore[reportArgumentType]
    assert "brainstate" not in str(info.value)


def test_a_misspelled_node_is_suggested():
    with pytest.raises(ValueError, match="Its nearest paths are `encoder`, "):
        vg.states(make_net(), "encodr")


def test_reprs_say_what_was_written():
    selector = ~(vg.path("a.*") | vg.instance((Net, Body))) & vg.leaf(eqx.is_array)
    assert repr(selector) == "(~(path('a.*') | instance(Net | Body)) & leaf(is_array))"
    assert repr(vg.at(lambda net: net)) == "at(<lambda>)"
    assert repr(vg.path("a") | eqx.is_array) == "(path('a') | is_array)"
    assert repr(vg.path("a") | True) == "(path('a') | True)"
    assert repr(vg.path("a") | [True]) == "(path('a') | True)"
    assert repr(vg.path("a") | [False]) == "(path('a') | a filter spec of 1 entry)"
    assert repr(vg.path("a") | [True, False]) == "(path('a') | a filter spec of 2 entries)"


def test_selectors_are_equal_when_written_alike():
    assert vg.path("a", "b") == vg.path("a", "b") != vg.path("a")
    assert len({vg.instance(Net) & "a", vg.instance(Net) & "a"}) == 1
    assert vg.path("a") & vg.path("b") != vg.path("a") | vg.path("b")


def test_a_remembered_choice_heeds_dtypes():
    tree = {"a": jnp.ones(2), "b": jnp.arange(2)}
    assert list(vg.states(tree, True)) == ["a"]
    swapped = {"a": tree["b"], "b": tree["a"]}
    assert list(vg.states(swapped, True)) == ["b"]


def test_a_remembered_choice_heeds_shapes():
    selector = vg.leaf(lambda leaf: leaf.ndim == 1)
    assert list(vg.states({"a": jnp.ones(2), "b": jnp.ones(())}, selector)) == ["a"]
    assert list(vg.states({"a": jnp.ones(()), "b": jnp.ones(2)}, selector)) == ["b"]


class Unhashable(eqx.Module):
    weight: jax.Array
    table: list = eqx.field(static=True)


def test_static_fields_that_cannot_be_hashed():
    module = Unhashable(jnp.ones(2), [1, 2])
    assert list(vg.states(module)) == ["weight"]
    assert vg.vector_grad(lambda m: m.weight**2, True)(module)["weight"].tolist() == [
        2,
        2,
    ]


segments = st.sampled_from(["a", "b", "ab", "layers", "0", "1"])


@hypothesis.given(
    st.lists(segments, min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_a_path_matches_itself_with_any_segment_starred(names, starred):
    tree = jnp.ones(1)
    for name in reversed(names):
        tree = {name: tree}
    path = ".".join(names)
    glob = ".".join("*" if star else name for name, star in zip(names, starred, strict=False))
    assert list(vg.states(tree, glob)) == [path]
    assert list(vg.states(tree, f"**.{names[-1]}")) == [path]
    assert list(vg.states(tree, f"{names[0]}.**")) == [path]
    with pytest.raises(ValueError, match="matches nothing"):
        vg.states(tree, f"{path}.more")


MALFORMED = {
    "a.{b": "a `{` without its `}`",
    "{a,{b}": "a `{` without its `}`",
    "{" * 3000: "a `{` without its `}`",
    "a.b}": "a `}` without its `{`",
    "a.[b": r"a `\[` without its `\]`",
    "a.[]": r"a `\[` without its `\]`, or an empty set",
    "a**.b": r"a `\*\*` that does not stand alone",
    "a.b**": r"a `\*\*` that does not stand alone",
    "[z-a]": "a reversed range `z-a`",
    "{a,b}" * 24: "braces for more than 1,000 paths",
}


@pytest.mark.parametrize(("glob", "fault"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_malformed_globs_are_refused_at_once(glob, fault):
    match = f"The path '.*' must be a glob, .* Got one with {fault}"
    with pytest.raises(ValueError, match=match):
        vg.path(glob)
    with pytest.raises(ValueError, match=match):
        vg.vector_grad(lambda x: x, glob)


# The constructor, what it is wrongly given, and what it says then.
WRONG: dict[str, tuple[Any, list[Any], str]] = {
    "path": (vg.path, [3], r"`path\(\*globs\)` takes strings .* Got 3"),
    "no path": (vg.path, [], "needs at least one string. Got none"),
    "instance": (vg.instance, ["a"], "takes a class or a tuple of .* Got 'a'"),
    "no type": (vg.instance, [()], r"takes a class or a tuple of .* Got \(\)"),
    "at": (vg.at, ["a"], r"`at\(where\)` takes a function .* Got 'a'"),
    "leaf": (vg.leaf, [True], r"`leaf\(predicate\)` takes a function .* Got True"),
    "and": (operator.and_, [vg.path("a"), 3], "A selector must be .* Got 3"),
}


@pytest.mark.parametrize(("make", "args", "match"), WRONG.values(), ids=WRONG.keys())
def test_wrong_selectors_are_refused_at_once(make, args, match):
    with pytest.raises(TypeError, match=match):
        make(*args)


def test_at_must_return_a_part_of_the_tree():
    with pytest.raises(TypeError, match=r"`at\(where\)` must return a node .* f\d\d\[3\]"):
        vg.states(make_net(), vg.at(lambda net: jnp.ones(3)))


@pytest.mark.parametrize("way", ["states", "Optimizer", "grad"])
def test_an_array_alone_has_the_path_of_no_characters(way):
    x = jnp.ones((4, 2))
    select = {
        "states": lambda glob: vg.states(x, glob),
        "Optimizer": lambda glob: vg.Optimizer(optax.sgd(0.1), x, glob).params(x),
        "grad": lambda glob: vg.grad(jnp.sum, glob)(x),
    }[way]
    match = r"It is f32\[4,2\], one leaf of the path '', which `True` .* the model in its place"
    with pytest.raises(ValueError, match=match.replace("f32", r"f\d+")):
        select("layers.*")
    for selector in (True, "**", ""):
        assert list(select(selector)) == [""]


def test_a_tree_without_leaves_says_so():
    with pytest.raises(ValueError, match=r"selects nothing of the `dict`. It has none.$"):
        vg.states({}, "**")


def test_unmatched_path_lists_the_nearest_ones():
    match = r"The path 'layrs\.0\.wieght' matches nothing in the `MLP`.* `layers.0.weight`"
    with pytest.raises(ValueError, match=match):
        vg.states(make_mlp(), "layrs.0.wieght")


def test_unmatched_path_is_found_in_a_complement_too():
    with pytest.raises(ValueError, match="The path 'layer.0' matches nothing"):
        vg.states(make_mlp(), ~vg.path("layer.0"))


def test_path_of_none_may_be_excluded():
    mlp = eqx.nn.MLP(3, 2, 8, 1, use_bias=False, key=jr.key(0))
    assert list(vg.states(mlp, ~vg.path("layers.*.bias"))) == [
        "layers.0.weight",
        "layers.1.weight",
    ]


NOTHING = {
    "integers": (
        "encoder.*.count",
        r"selects `encoder.0.count` \(i32\[3\]\), `encoder.1",
    ),
    "inner node": ("encoder.0.activation", r"selects `encoder.0.activation` \(.*relu"),
    "key": ("encoder.0.key", r"selects `encoder.0.key` \(key<fry>\[\]\)"),
    "python float": ("encoder.0.rate", r"selects `encoder.0.rate` \(0.5\)"),
    "none": (
        "encoder.*.bias",
        r"selects nothing.*nothing at `encoder.0.bias`, `encoder.1.b",
    ),
    "false": (
        False,
        "selects nothing of the `Net`. Its inexact arrays are `encoder.0.we",
    ),
    "instance": (
        vg.instance(eqx.nn.Conv),
        r"Got instance\(Conv\), which selects nothing",
    ),
    "disjoint": (
        vg.path("head") & "norm",
        r"\(path\('head'\) & path\('norm'\)\), which",
    ),
}


@pytest.mark.parametrize(("selector", "match"), NOTHING.values(), ids=NOTHING.keys())
def test_selecting_nothing_that_can_be_trained(selector, match):
    net = make_net()
    with pytest.raises(ValueError, match=r"`states\(selector=...\)` must select inexact"):
        vg.states(net, selector)
    with pytest.raises(ValueError, match=match):
        vg.states(net, selector)


def test_a_tree_without_inexact_arrays():
    with pytest.raises(ValueError, match="selects `n` .* It has none"):
        vg.states({"n": jnp.arange(2)})


def test_two_leaves_with_one_path_are_shown():
    tree = {"a.b": jnp.ones(1), "a": {"b": jnp.ones(2)}}
    match = r"Two leaves share the dotted path `a.b`: `\['a'\]\['b'\]` and `\['a.b'\]`"
    with pytest.raises(ValueError, match=match):
        vg.states(tree)
    with pytest.raises(ValueError, match=match):
        vg.vector_grad(lambda tree: tree["a"]["b"], "a")(tree)


def test_filter_spec_of_another_structure():
    with pytest.raises(ValueError, match="A filter spec must have the structure .* Got"):
        vg.states(make_net(), {"encoder": True, "head": False})


def test_errors_of_a_predicate_come_through():
    def predicate(leaf):
        raise ValueError("mine")

    for selector in (predicate, vg.leaf(predicate)):
        with pytest.raises(ValueError, match="^mine$"):
            vg.states(make_net(), selector)


FLAWED = {
    "g_leak": 8 * u.nS,
    "g_k": 12.0 * u.nS,
    "n": 3,
    "m": jnp.arange(2),
    "w": jnp.ones(2),
    "inner": {"n": 1, "w": jnp.ones(1)},
}
NAMED = {
    "a Quantity": (
        vg.path("g_leak", "g_k"),
        r"path\('g_leak'\), which selects `g_leak` \(Q.*8",
    ),
    "an int": (vg.path("w", "n"), r"path\('n'\), which selects `n` \(3\)"),
    "integers": ("{m,w}", r"path\('m'\), which selects `m` \(i\d+\[2\]\)"),
    "beside a star": ("{m,*.w}", r"path\('m'\), which selects `m` \(i\d+\[2\]\)"),
    "deep": ("inner.{n,w}", r"path\('inner.n'\), which selects `inner.n` \(1\)"),
    "a union": (vg.instance(jax.Array) | "n", r"path\('n'\), which selects `n`"),
}


@pytest.mark.parametrize(("selector", "match"), NAMED.values(), ids=NAMED.keys())
def test_each_path_that_is_spelled_out_must_choose_a_leaf(selector, match):
    with pytest.raises(ValueError, match=f"must select inexact arrays. Got {match}"):
        vg.states(FLAWED, selector)


PASSED_OVER = {
    "all": ("**", ["g_k", "inner.w", "w"]),
    "star": ("g_*", ["g_k"]),
    "node": (vg.path("inner", "w"), ["inner.w", "w"]),
    "complement": (~vg.path("n"), ["g_k", "inner.w", "w"]),
    "difference": (vg.path("*") & ~vg.path("m"), ["g_k", "inner.w", "w"]),
}


@pytest.mark.parametrize(("selector", "expected"), PASSED_OVER.values(), ids=PASSED_OVER.keys())
def test_what_is_not_spelled_out_may_hold_integers(selector, expected):
    assert list(vg.states(FLAWED, selector)) == expected


def test_an_integer_beside_a_state_is_refused_too():
    tree = {"s": vg.State(jnp.ones(1)), "n": 3}
    assert list(vg.states(tree, vg.path("s"))) == ["s"]
    with pytest.raises(ValueError, match=r"Got path\('n'\), which selects `n` \(3\)"):
        vg.states(tree, vg.path("s", "n"))
