"""What `equinox.filter_jit` does, `vg.jit` does with any function."""

import collections
import dataclasses
import functools as ft
import gc
import logging
import os
import subprocess
import sys
import threading
import warnings
import weakref
from typing import Any

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from hypothesis import given, settings
from hypothesis import strategies as st

from ..helpers import Counted, make_mlp, tree_allclose


def add_one(tree):
    def add(leaf):
        is_number = eqx.is_array(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf + 1 if is_number else leaf

    return jtu.tree_map(add, tree)


@jtu.register_pytree_node_class
class Flagged:
    """A node that holds a static value beside its child."""

    def __init__(self, child, flag):
        self.child = child
        self.flag = flag

    def tree_flatten(self):
        return (self.child,), self.flag

    @classmethod
    def tree_unflatten(cls, flag, children):
        return cls(children[0], flag)


TREES: dict[str, Any] = {
    "array": jnp.ones(2),
    "module": make_mlp(),
    "statics": [1, True, len, "text", None, 2.0, 1j],
    "containers": {"b": (jnp.ones(2), [jnp.zeros(3)]), "a": {}, "c": ()},
    "ordered": collections.OrderedDict(b=jnp.ones(2), a=1),
    "default": collections.defaultdict(list, {"a": [jnp.ones(2)]}),
    "optax": optax.adam(1e-3).init({"w": jnp.ones(2)}),
    "quantity": {"t": jnp.ones(2) * u.ms, "v": 3.0 * u.mV},
    "bound method": make_mlp().layers[0].__call__,
    "partial": jtu.Partial(jnp.add, jnp.ones(2)),
    "key": jr.key(3),
    "node": Flagged([jnp.ones(2), 3], "flag"),
    "numpy": np.arange(3.0, dtype=np.float32),
    "keys of other types": {3: jnp.ones(2), 1: jnp.zeros(2)},
}


@pytest.mark.parametrize("donate", ["all", "none"])
@pytest.mark.parametrize("name", TREES)
def test_results_are_those_of_equinox(name, donate):
    counted = Counted(add_one)
    ours, theirs = vg.jit(counted, donate=donate), eqx.filter_jit(add_one, donate="none")
    copy = lambda: jtu.tree_map(lambda x: x.copy() if eqx.is_array(x) else x, TREES[name])
    expected = theirs(copy())
    result = ours(copy())
    for _ in range(2):
        assert jtu.tree_structure(result) == jtu.tree_structure(expected)
        assert tree_allclose(result, expected)
        result, expected = ours(result), theirs(expected)
    assert counted.calls == 1


def test_how_often_a_function_is_traced():
    counted = Counted(lambda *args, **kwargs: None)
    func = vg.jit(counted)
    calls: list[tuple[int, tuple[Any, ...]]] = [
        (1, (jnp.zeros(2),)),
        (1, (jnp.ones(2),)),
        (2, (jnp.zeros(3),)),
        (3, ([jnp.zeros(2)],)),
        (4, ([jnp.zeros(2), True],)),
        (5, ([jnp.zeros(2), False],)),
        (6, ([jnp.zeros(2), 1],)),
        (7, (True, {"a": 1, "b": 1}, 5)),
        (8, (True, {"a": 2, "b": 1}, 5)),
        (8, (True, {"b": 1, "a": 2}, 5)),
        (8, (True, {"a": 1, "b": 1}, 5)),
        (9, ()),
    ]
    for expected, args in calls:
        assert func(*args) is None
        assert counted.calls == expected


class Model(eqx.Module):
    increment: Any
    count: Any = eqx.field(static=True)

    def method(self, x):
        self.count.append(x)
        return x + self.increment

    @vg.jit
    def compiled(self, x):
        return self.method(x)

    @vg.jit(donate="all")
    def donating(self, x):
        return Model(self.increment + x, self.count)


class Calls:
    """Counts what is appended."""

    def __init__(self):
        self.length = 0

    def append(self, _: Any) -> None:
        self.length += 1


@pytest.mark.parametrize("wrap", [lambda model: vg.jit(model.method), lambda m: m.compiled])
def test_methods(wrap):
    calls = Calls()
    for increment, traced in [(1, 1), (1, 1), (2, 2), (jnp.array(1), 3), (jnp.array(2), 3)]:
        assert float(wrap(Model(increment, calls))(jnp.array(1.0))) == 1 + int(increment)
        assert calls.length == traced


def test_a_method_donates_its_module():
    model = Model(jnp.zeros(1000), Calls())
    first, pointer = model.increment, model.increment.unsafe_buffer_pointer()
    for _ in range(3):
        model = model.donating(jnp.ones(()))
    assert first.is_deleted()
    assert model.increment.unsafe_buffer_pointer() == pointer
    assert float(model.increment[0]) == 3.0


@pytest.mark.parametrize(
    "wrap", [lambda func: func, eqx.filter_vmap, eqx.filter_grad, vg.grad, jtu.Partial]
)
def test_a_function_that_is_wrapped_again_is_not_traced_again(wrap):
    counted = Counted(lambda x: x + 1)

    def func(x):
        return counted(x)

    x = jnp.array(1.0) if wrap in (eqx.filter_grad, vg.grad) else jnp.ones(3)
    for _ in range(3):
        vg.jit(wrap(func))(x)
    assert counted.calls == 1
    vg.jit(wrap(func), donate="all")(x + 1)
    assert counted.calls == 2
    vg.jit(wrap(lambda x: func(2 * x)))(x)
    assert counted.calls == 3


def test_a_function_and_what_it_closes_over_are_collected():
    def compile_and_forget():
        array = jnp.ones(100)

        def func(x):
            return x + array

        gradient = vg.grad(lambda x: jnp.sum(x * array))
        vg.jit(func)(jnp.ones(100))
        vg.jit(gradient)(jnp.ones(100))
        return weakref.ref(func), weakref.ref(array)

    func, array = compile_and_forget()
    gc.collect()
    assert func() is None
    assert array() is None


def test_keyword_arguments_are_bound_as_positional_ones():
    counted = Counted(lambda x, y: (x + 1, y + 1))

    @vg.jit(donate="all-except-first")
    def func(x, y, **others):
        return counted(x, y)

    for kwargs in ({"x": jnp.ones(2), "y": jnp.ones(2)}, {"y": jnp.ones(2), "x": jnp.ones(2)}):
        func(**kwargs)
        assert not kwargs["x"].is_deleted()
        assert kwargs["y"].is_deleted()
    func(jnp.ones(2), y=jnp.ones(2))
    assert counted.calls == 2
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        func(y=jnp.ones(2))  # pyright: ignore[reportCallIssue]


def test_a_function_without_a_signature_takes_keyword_arguments():
    make: Any = vg.jit(dict)
    assert make(a=jnp.ones(2))["a"].tolist() == [1.0, 1.0]


def test_what_is_compiled_has_no_fields_of_its_module():
    compiled: Any = vg.jit(make_mlp())
    assert compiled.__wrapped__.depth == 2
    assert not hasattr(compiled, "depth")


@jtu.register_pytree_node_class
class Power:
    def __init__(self, x, exponent):
        self.x, self.exponent = x, exponent

    def tree_flatten(self):
        return (self.x,), self.exponent

    @classmethod
    def tree_unflatten(cls, exponent, children):
        return cls(children[0], exponent)


def test_another_constant_of_a_registered_node_is_noticed():
    raise_number = vg.jit(lambda power: power.x**power.exponent)
    x = jnp.array(3.0)
    assert [raise_number(Power(x, n)) for n in (1, 1, 2, 2, 1)] == [3.0, 3.0, 9.0, 9.0, 3.0]


def test_warnings_of_donated_arrays():
    shrink, before = lambda x, y: x + jnp.sum(y), list(warnings.filters)
    for donate in ("all", "all-except-first", "none"):
        func = vg.jit(shrink, donate=donate)
        for size in (10, 11):
            func(jnp.array(1.0), jnp.ones(size))
    for donate in ("warn", "warn-except-first"):
        with pytest.warns(UserWarning, match="Some donated buffers were not usable"):
            vg.jit(shrink, donate=donate)(jnp.array(1.0), jnp.ones(10))
    with pytest.raises(TypeError, match="incompatible shapes"):
        vg.jit(lambda x, y: x + y, donate="all")(jnp.ones(2), jnp.ones(3))
    total = vg.jit(lambda x: jnp.sum(jnp.sin(x)), donate="all")
    total(jnp.ones(4))
    jax.vmap(total)(jnp.ones((3, 4)))
    jax.grad(total)(jnp.ones(4))
    assert warnings.filters == before


def test_lowered_and_compiled_ahead_of_time():
    def func(x, y, *, scale, power):
        return {"a": x**power * scale, "b": y}

    lowered = vg.jit(func).lower(jnp.ones(2), {"c": (3,)}, scale=jnp.array(2.0), power=2)
    assert "func.func public @main" in lowered.as_text()
    compiled = lowered.compile()
    assert compiled.as_text().startswith("HloModule jit_func")
    result = compiled(jnp.full(2, 3.0), {"c": (3,)}, scale=jnp.array(5.0), power=2)
    assert tree_allclose(result, {"a": jnp.full(2, 45.0), "b": {"c": (3,)}})


def test_to_lower_leaves_nothing_behind():
    func = vg.jit(lambda x: 2 * x, donate="all")
    filters = list(warnings.filters)
    func.lower(jnp.ones(2))
    assert list(warnings.filters) == filters


def test_a_repeated_call_does_not_search_for_its_program(monkeypatch):
    func = vg.jit(lambda *args, by=2: args[0] * by if args else by)
    calls = [((jnp.ones(2),), {}), ((jnp.ones(2),), {"by": 3}), ((), {})]
    results = []
    for args, kwargs in calls:
        results.append(func(*args, **kwargs))
        with monkeypatch.context() as patch:
            patch.delattr("vgrad_eqx._jit.jit._Programs.find")
            assert tree_allclose(func(*args, **kwargs), results[-1])
            with pytest.raises(AttributeError, match="find"):
                func(1)


def test_a_call_with_an_equal_unit_does_not_search_for_its_program(monkeypatch):
    double = vg.jit(lambda x: 2 * x)
    double(3.0 * u.mvolt)
    monkeypatch.delattr("vgrad_eqx._jit.jit._Programs.find")
    for unit in (u.mvolt * u.second / u.second, u.mvolt):
        assert double(3.0 * unit) == 6.0 * u.mvolt
    with pytest.raises(AttributeError, match="find"):
        double(3.0 * u.volt)


def test_inside_of_each_other_and_of_transformations():
    model, xs = make_mlp(), jnp.ones((4, 3))
    loss = lambda model, x: jnp.sum(model(x) ** 2)
    compiled = vg.jit(loss)
    expected = loss(model, xs[0])
    for outer in (jax.jit, eqx.filter_jit, vg.jit, jax.checkpoint, lambda func: func):
        assert tree_allclose(outer(lambda x: compiled(model, x))(xs[0]), expected)
    assert tree_allclose(jax.vmap(ft.partial(compiled, model))(xs), jnp.full(4, expected))
    grads, by_hand = (eqx.filter_grad(f)(model, xs[0]) for f in (compiled, loss))
    assert tree_allclose(grads, by_hand)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, compiled(model, x)), None, xs)
    assert tree_allclose(scanned, jnp.full(4, expected))
    assert tree_allclose(jax.jvp(lambda x: compiled(model, x), (xs[0],), (xs[0],))[0], expected)


def test_states_that_a_function_closes_over():
    state = vg.State(jnp.zeros(2))

    @vg.jit
    def func(x, flag):
        state.value = state.value + x if flag else x
        return state.value * 2

    for x, flag, expected in [(1.0, True, 1.0), (2.0, True, 3.0), (5.0, False, 5.0)]:
        assert tree_allclose(func(jnp.full(2, x), flag), jnp.full(2, 2 * expected))
        assert tree_allclose(state.value, jnp.full(2, expected))


def check(x):
    return eqx.error_if(x, x[0] > 1, "x is too large") * 2


@pytest.mark.parametrize("func", [vg.jit(check), vg.jit(jax.jit(check)), vg.jit(vg.jit(check))])
def test_an_error_at_run_time_is_that_of_equinox(func, caplog):
    caplog.set_level(logging.ERROR)
    assert tree_allclose(func(jnp.ones(2)), jnp.full(2, 2.0))
    for _ in range(2):
        with pytest.raises(eqx.EquinoxRuntimeError, match="x is too large") as caught:
            func(jnp.full(2, 3.0))
        assert "filter_jit" not in str(caught.value)
        assert caught.value.__suppress_context__
    assert not caplog.records
    assert tree_allclose(func(jnp.ones(2)), jnp.full(2, 2.0))


def test_an_error_at_run_time_of_other_shapes():
    func = vg.jit(lambda x: check(x) if x.shape == (3,) else x + 1)
    func(jnp.ones(2))
    with pytest.raises(eqx.EquinoxRuntimeError, match="x is too large"):
        func(jnp.full(3, 3.0))


def test_predicates_tell_numpy_arrays_from_jax_arrays():
    of_jax = vg.leaf(lambda leaf: isinstance(leaf, jax.Array))
    counted = Counted(lambda tree: jtu.tree_map(jnp.sum, vg.states(tree, of_jax)))
    func = vg.jit(counted)
    trees = [
        {"a": jnp.ones(2), "b": np.ones(2)},
        {"a": np.ones(2), "b": jnp.ones(2)},
        {"a": jnp.ones(2), "b": jnp.ones(2)},
    ]
    for tree in trees * 2:
        assert list(func(tree)) == list(vg.states(tree, of_jax))
    for selector in (vg.instance(np.ndarray), lambda leaf: isinstance(leaf, np.ndarray)):
        assert list(vg.jit(vg.states)(trees[0], selector)) == ["b"]
    assert counted.calls == 3
    with pytest.raises(TypeError, match="but not its values"):
        vg.jit(vg.states)({"b": np.ones(2)}, lambda leaf: leaf.sum() > 0)


def test_a_bool_and_an_array_of_a_bool_are_told_apart():
    is_bool = vg.jit(lambda flag: isinstance(flag, bool))
    for flag in (jnp.array(True), True, jnp.array(True), False, 1, True, 1.0):
        assert is_bool(flag) is isinstance(flag, bool)


LEAVES = st.sampled_from([jnp.ones(2), jnp.zeros(2), jnp.ones(3), 1, 2.0, True, "a", None])


class Box(eqx.Module):
    items: list
    named: dict


CHANGES = st.lists(
    st.tuples(st.sampled_from(["item", "name", "append", "pop", "delete"]), LEAVES), max_size=6
)


@settings(max_examples=40)
@given(CHANGES)
def test_an_object_that_was_returned_and_changed_is_read_again(changes):
    func = _IDENTITY
    box = func(Box([jnp.ones(2), 1], {"a": jnp.ones(2)}))
    for kind, leaf in changes:
        if kind == "item" and box.items:
            box.items[0] = leaf
        elif kind == "name":
            box.named["a"] = leaf
        elif kind == "append":
            box.items.append(leaf)
        elif kind == "pop" and box.items:
            box.items.pop()
        elif kind == "delete":
            box.named.pop("a", None)
        result = func(box)
        assert jtu.tree_structure(result) == jtu.tree_structure(box)
        assert eqx.tree_equal(result, box, typematch=True)


_IDENTITY = vg.jit(lambda box: box)


def test_threads():
    counted = Counted(lambda x, flag: x + flag)
    func, barrier, results = vg.jit(counted), threading.Barrier(8), {}

    def work(i):
        barrier.wait()
        results[i] = [float(func(jnp.array(float(j)), i % 4)) for j in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [j + i % 4 for j in range(20)] for i in range(8)}


@pytest.mark.parametrize("times", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_calls_keep_nothing(times):
    func = vg.jit(lambda tree, x: (add_one(tree), x * 2), donate="all-except-first")
    tree, _ = func({"w": jnp.ones(2), "s": "text"}, jnp.ones(2))
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(times):
        tree, _ = func(tree, jnp.ones(2))
    gc.collect()
    assert len(gc.get_objects()) - before < 100


RESTART = """
import equinox as eqx, jax, jax.numpy as jnp, optax
import vgrad_eqx as vg

hits = []
jax.monitoring.register_event_listener(
    lambda event, **kwargs: hits.append(event.endswith("/cache_hits"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
mlp = eqx.nn.MLP(2, 1, 8, 1, key=jax.random.key(0))
opt = vg.Optimizer(optax.adam(1e-2), mlp)

@vg.jit(donate="all")
def make_step(model, opt, x):
    loss = lambda model, x: jnp.sum(jax.vmap(model)(x) ** 2)
    return opt.step(model, vg.grad(loss, "**")(model, x))

lowered = make_step.lower(mlp, opt, jnp.ones((3, 2)))
del hits[:]
lowered.compile()
print(sum(hits))
"""


@pytest.mark.slow
def test_the_persistent_cache_is_hit_after_a_restart(tmp_path):
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", RESTART]
    hits = [
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert hits == ["0\n", "1\n"]


def test_a_call_like_the_one_before_enters_no_python_of_jax():
    state = vg.State(jnp.ones(2))
    for func in (lambda tree, x: add_one(tree), lambda tree, x: x * jnp.sum(state.value)):
        compiled, files = vg.jit(func), set()
        for x in (jnp.ones(2), jnp.ones(2), jnp.ones((3, 2)), jnp.ones((3, 2))):
            compiled({"a": x}, x)

        def note(frame, event, arg, files=files):
            if event == "call":
                files.add(frame.f_code.co_filename)

        sys.setprofile(note)
        try:
            compiled({"a": x}, x)
        finally:
            sys.setprofile(None)
        assert files
        assert not [file for file in files if "pjit" in file]


def test_a_function_without_a_hash_is_refused():
    @dataclasses.dataclass
    class Scale:
        factor: float

        def __call__(self, x):
            return self.factor * x

    with pytest.raises(TypeError, match="must be hashable. Got .*Scale"):
        vg.jit(Scale(2.0))
