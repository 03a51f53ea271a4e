"""Optax on parameters with units: the fit is the same in whatever units they are written."""

import functools as ft
from typing import Any, NamedTuple

import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vgrad_eqx as vg

from ..helpers import tree_allclose
from .transformations import TABLE


# Updates of optax are typed as trees in which nothing can be looked up.
unitful: Any = vg.unitful

SI = {"current": [2e-9], "resistance": [5e6], "tau": [0.02, 0.03], "gain": [1.0, 2.0, 0.5]}
SPELLINGS = {
    "small": {"current": u.nA, "resistance": u.Mohm, "tau": u.ms, "loss": u.mvolt**2},
    "large": {"current": u.amp, "resistance": u.ohm, "tau": u.second, "loss": u.volt**2},
    "odd": {"current": u.uA, "resistance": u.kohm, "tau": u.us, "loss": u.volt * u.mvolt},
}
LOSS_UNIT = u.mvolt**2
SCALE = {"current": 1.0 * u.nA, "resistance": 2e6 * u.ohm, "tau": 10.0 * u.ms, "gain": 0.5}


def make_params(spelling):
    return {
        name: jnp.asarray(number)
        if name == "gain"
        else jnp.asarray(number) / spelling[name].magnitude * spelling[name]
        for name, number in SI.items()
    }


def make_loss(spelling):
    """A smooth loss in squared volts, with its least value elsewhere."""

    def loss(params):
        voltage = params["resistance"] * params["current"] * params["gain"]
        slow = (params["tau"] / (25.0 * u.ms)) ** 2 - 1
        total = (voltage - 14.0 * u.mvolt) ** 2
        total = total.sum() + 3.0 * (u.mvolt**2) * jnp.sum(slow**2)
        return total.in_unit(spelling["loss"])

    return loss


def si(params):
    return {
        name: u.get_mantissa(leaf) * u.get_unit(leaf).magnitude for name, leaf in params.items()
    }


@ft.cache
def make_gradient(name):
    loss = make_loss(SPELLINGS[name])
    transform = vg.vector_grad(lambda p: loss(p), "**", return_value=True, unit_aware=True)
    return loss, jax.jit(transform)


def fit(tx, name, scale=None, steps=3):
    """The parameters after some steps, in SI units, relative to those at the start."""
    params = make_params(SPELLINGS[name])
    loss, gradient = make_gradient(name)
    tx = unitful(tx, LOSS_UNIT, scale)
    opt_state = tx.init(params)
    for _ in range(steps):
        grads, value = gradient(params)
        extra_args = {"value": value, "grad": grads, "value_fn": loss}
        updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
        params = vg.apply_updates(params, updates)
    for path, leaf in make_params(SPELLINGS[name]).items():
        assert u.get_unit(params[path]) == u.get_unit(leaf)
    return {path: value / jnp.asarray(SI[path]) for path, value in si(params).items()}


LONG = "lbfgs with zoom line search"  # to compile
ROWS = [
    pytest.param(row, id=name, marks=[pytest.mark.slow] if name == LONG else [])
    for name, row in TABLE.items()
]


@pytest.mark.parametrize("row", ROWS)
def test_with_a_scale_the_fit_does_not_depend_on_the_units(row):
    reference = fit(row.make(), "small", SCALE)
    assert max(float(jnp.max(jnp.abs(value - 1))) for value in reference.values()) > 1e-6
    large = fit(row.make(), "large", SCALE)
    assert tree_allclose(large, reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("row", ROWS)
def test_without_a_scale_it_does(row):
    small, large = fit(row.make(), "small"), fit(row.make(), "large")
    holds = tree_allclose(small, large, rtol=1e-2, atol=1e-2)
    assert holds is row.holds_without_scale, row.why


@pytest.mark.parametrize(
    "name", ["momentum", "adamw", pytest.param(LONG, marks=pytest.mark.slow)]
)
def test_mixed_spellings_agree_too(name):
    small, odd = [fit(TABLE[name].make(), each, SCALE, steps=5) for each in ("small", "odd")]
    assert tree_allclose(small, odd, rtol=2e-3, atol=2e-3)


def make_problem():
    params = {"tau": jnp.array([20.0, 30.0]) * u.ms, "gain": jnp.ones(2)}

    def loss(params):
        return (params["gain"] * params["tau"] - 10.0 * u.ms) ** 2

    return params, vg.vector_grad(loss, "**", unit_aware=True)(params), loss


def test_updates_have_the_unit_of_the_parameter():
    params, grads, _ = make_problem()
    tx = unitful(optax.sgd(0.5), u.ms**2, {"tau": 2.0 * u.second})
    updates, _ = tx.update(grads, tx.init(params), params)
    assert u.get_unit(updates["tau"]) == u.ms
    expected = -0.5 * u.get_mantissa(grads["tau"]) * 2000.0**2
    assert tree_allclose(u.get_mantissa(updates["tau"]), expected)
    assert tree_allclose(updates["gain"], -0.5 * u.get_mantissa(grads["gain"]))
    apply_updates: Any = optax.apply_updates
    assert u.get_unit(apply_updates(params, updates)["tau"]) == u.ms


def test_a_scale_may_be_an_array():
    params, grads, _ = make_problem()
    tx = unitful(optax.adam(0.1), u.ms**2, {"tau": jnp.array([10.0, 1.0]) * u.ms})
    updates, _ = tx.update(grads, tx.init(params))
    assert tree_allclose(u.get_mantissa(updates["tau"]), -0.1 * jnp.array([10.0, 1.0]))


def test_arrays_are_optimized_as_by_optax():
    params = {"w": jnp.array([1.0, 2.0])}
    tx, ours = optax.adamw(0.1), unitful(optax.adamw(0.1))
    expected, _ = tx.update(params, tx.init(params), params)
    updates, _ = ours.update(params, ours.init(params), params)
    assert tree_allclose(updates, expected)


def test_dtypes_stay():
    params = {"tau": jnp.ones(2, "bfloat16") * u.ms}
    tx = unitful(optax.sgd(0.5), u.mvolt, {"tau": jnp.ones(2) * u.second})
    grads = {"tau": jnp.ones(2, "bfloat16") * u.mvolt / u.ms}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["tau"].dtype == jnp.bfloat16


def test_the_checks_leave_nothing_in_the_program():
    params, grads, _ = make_problem()
    bare = {path: u.get_mantissa(leaf) for path, leaf in params.items()}

    def count(tx, params, grads):
        update = lambda params, grads: tx.update(grads, tx.init(params), params)[0]
        return len(jax.make_jaxpr(update)(params, grads).eqns)

    assert count(unitful(optax.adam(0.1), u.ms**2), params, grads) == count(
        optax.adam(0.1), bare, {path: u.get_mantissa(leaf) for path, leaf in grads.items()}
    )


def test_one_trace_per_unit_and_the_state_can_be_carried():
    params, _, loss = make_problem()
    tx = unitful(optax.adam(0.1), u.ms**2)
    gradient = vg.vector_grad(loss, "**", unit_aware=True)

    def step(carry, _):
        params, opt_state = carry
        updates, opt_state = tx.update(gradient(params), opt_state, params)
        return (vg.apply_updates(params, updates), opt_state), None

    carry = (params, tx.init(params))
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3))(carry)
    for _ in range(3):
        carry, _ = step(carry, None)
    assert tree_allclose(si(scanned[0]), si(carry[0]))
    assert int(optax.tree.get(carry[1], "count")) == 3


def update(tx, grads, **extra_args):
    params, _, _ = make_problem()
    return tx.update(grads, tx.init(params), params, **extra_args)


def with_tau(grad):
    return {**make_problem()[1], "tau": grad}


REFUSED_GRADS = {
    "own unit": (
        with_tau(jnp.ones(2) * u.second),
        "Got one in the unit of the parameter, as from `jax.grad`. Differentiate with",
    ),
    "bare": (with_tau(jnp.ones(2)), "one without a unit. Differentiate with `unit_aware=True`"),
    "other unit": (with_tau(jnp.ones(2) * u.mvolt), "Got another one. Check `loss_unit`"),
}


@pytest.mark.parametrize(("grads", "match"), REFUSED_GRADS.values(), ids=REFUSED_GRADS.keys())
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_gradients_that_are_refused(grads, match, compiled):
    # The square of a volt, so that the unit of the parameter is not that of the gradient.
    tx = unitful(optax.adam(0.1), u.mvolt**2)
    call = (
        jax.jit(lambda grads: update(tx, grads))
        if compiled
        else lambda grads: update(tx, grads)
    )
    match = f"gradient at `tau` in the unit of the loss over that of the parameter. .*{match}"
    with pytest.raises(u.UnitMismatchError, match=match):
        call({**grads, "gain": jnp.ones(2) * u.mvolt**2})


def test_a_gradient_in_the_own_unit_is_right_for_a_loss_of_its_square():
    params, grads, _ = make_problem()
    assert u.get_unit(grads["tau"]) == u.get_unit(params["tau"])
    updates, _ = update(unitful(optax.sgd(1.0), u.ms**2), grads)
    assert tree_allclose(u.get_mantissa(updates["tau"]), -u.get_mantissa(grads["tau"]))


@pytest.mark.parametrize("loss_unit", [None, u.ms, u.mvolt**2], ids=str)
def test_a_wrong_loss_unit_is_refused(loss_unit):
    _, grads, _ = make_problem()
    with pytest.raises(u.UnitMismatchError, match="Check `loss_unit`|in the unit of the param"):
        update(unitful(optax.adam(0.1), loss_unit), grads)


def test_a_scale_without_a_path_is_refused():
    scale: Any = {3: 2.0}
    with pytest.raises(TypeError, match="must have paths as keys. Got 3"):
        unitful(optax.sgd(0.1), u.mvolt, scale)


def test_a_value_of_another_dimension_is_refused():
    _, grads, loss = make_problem()
    tx = unitful(optax.lbfgs(), u.ms**2)
    match = (
        r"`unitful\(loss_unit=...\)` must have the dimension of the loss. Got `loss_unit` in"
    )
    with pytest.raises(u.UnitMismatchError, match=match):
        update(tx, grads, value=1.0 * u.ms, grad=grads, value_fn=loss)
    with pytest.raises(u.UnitMismatchError, match=match):
        update(tx, grads, value=1.0 * u.ms**2, grad=grads, value_fn=lambda p: 1.0 * u.ms)


def test_a_parameter_in_another_unit_than_on_init_is_refused():
    params, grads, _ = make_problem()
    tx = unitful(optax.adam(0.1), u.ms**2)
    opt_state = tx.init(params)
    for tau in (params["tau"].in_unit(u.second), u.get_mantissa(params["tau"])):
        with pytest.raises(
            u.UnitMismatchError, match="parameter at `tau` in the unit that it had"
        ):
            tx.update(grads, opt_state, {**params, "tau": tau})


def test_a_path_that_was_not_there_on_init_is_refused():
    _, grads, _ = make_problem()
    with pytest.raises(
        ValueError, match="had on `init`. Got one at `other`, which is not among `gain`, `tau`"
    ):
        update(unitful(optax.adam(0.1), u.ms**2), {**grads, "other": jnp.ones(2)})


def test_a_scale_of_another_dimension_is_refused():
    params, _, _ = make_problem()
    for scale in ({"tau": 1.0 * u.mvolt}, {"tau": 1.0}, {"gain": 1.0 * u.ms}):
        (name,) = scale
        match = rf"`unitful\(scale=...\)` at `{name}` must have the dimension of the parameter"
        with pytest.raises(u.UnitMismatchError, match=match):
            unitful(optax.adam(0.1), u.ms**2, scale).init(params)


def test_a_scale_at_an_unknown_path_is_refused():
    params, _, _ = make_problem()
    tx = unitful(optax.adam(0.1), u.ms**2, {"taw": 1.0 * u.ms})
    with pytest.raises(ValueError, match="Got `taw`. Its nearest paths are `tau`"):
        tx.init(params)


def test_a_loss_unit_that_is_no_unit_is_refused():
    match = r"`unitful\(loss_unit=...\)` must be a unit, .* Got one of type `int`"
    with pytest.raises(TypeError, match=match):
        unitful(optax.adam(0.1), 3)


def make_cell():
    return {
        name: {"g": jnp.array(g) * u.nS, "n": 1} for name, g in [("axon", 20.0), ("soma", 10.0)]
    }


def conductances(params):
    return sum((each["g"] / u.nS) ** 2 for each in params.values())


SCALES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "glob": ({"*.g": 5.0 * u.nS}, (19.0, 9.5)),
    "the path before the glob": ({"*.g": 5.0 * u.nS, "soma.g": 10.0 * u.nS}, (19.0, 8.0)),
    "node": ({"axon": 5.0 * u.nS}, (19.0, 9.98)),
}


@pytest.mark.parametrize(("scale", "expected"), SCALES.values(), ids=SCALES.keys())
def test_a_scale_may_be_at_a_glob(scale, expected):
    params = make_cell()
    tx = vg.unitful(optax.sgd(1e-3), scale=scale)
    grads = vg.grad(conductances, "**.g", unit_aware=True)(params)
    params, _ = vg.Optimizer(tx, params, "**.g").step(params, grads)
    got = [float(params[name]["g"] / u.nS) for name in ("axon", "soma")]
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_scale_may_name_more_than_is_optimized():
    params = make_cell()
    tx = vg.unitful(optax.sgd(1e-3), scale={"axon.g": 5.0 * u.nS, "soma.g": 2.0 * u.nS})
    opt = vg.Optimizer(tx, params, "axon.g")
    assert list(opt.reselect(params, "soma.g").params(params)) == ["soma.g"]
    step = vg.train_step(conductances, tx, "axon.g")
    state, _ = step(step.init(params))
    assert float(state.model["axon"]["g"] / u.nS) == pytest.approx(19.0, rel=1e-5)
    with pytest.raises(ValueError, match="Got `axn.g`. Its nearest paths are `axon.g`"):
        vg.Optimizer(vg.unitful(optax.sgd(1.0), scale={"axn.g": 1.0}), params, "soma.g")
    # By optax alone, the parameters are the whole model.
    with pytest.raises(ValueError, match="must name paths of the parameters. Got `axon.g`"):
        tx.init(vg.states(params, "soma.g"))


def test_two_globs_for_one_parameter_are_refused():
    tx = vg.unitful(optax.sgd(1.0), scale={"*.g": 1.0 * u.nS, "axon.*": 1.0 * u.nS})
    with pytest.raises(
        ValueError, match=r"one scale to `axon.g`. Got two, at `\*.g` and `axon"
    ):
        tx.init(vg.states(make_cell()))


def make_channel(unit=u.nS):
    return {"g": jnp.array(8.0 * u.nS.magnitude / unit.magnitude) * unit, "w": jnp.ones(2)}


def channel_loss(params):
    return ((params["g"] - 5 * u.nS) / u.nS) ** 2 + jnp.sum(params["w"] ** 2)


channel_grad = vg.grad(channel_loss, "**", unit_aware=True)


def make_tx(size: Any = 10.0, unit: Any = u.nS, tx=None):
    """A heavy ball with a scale."""
    return vg.unitful(
        optax.sgd(0.1, momentum=0.9) if tx is None else tx, scale={"g": size * unit}
    )


SGD = optax.sgd(0.1)
CLIP = optax.clip_by_global_norm(1.0)


class Wrapped(NamedTuple):
    inner_state: Any


def wrap(tx):
    init = lambda params: Wrapped(tx.init(params))
    update: Any = tx.update
    return optax.GradientTransformation(init, update)


SEEING = {
    "one's own": lambda: wrap(make_tx()),
    "clip before": lambda: optax.chain(CLIP, make_tx()),
    "clip after": lambda: optax.chain(make_tx(), CLIP),
    "clip by value": lambda: optax.chain(optax.clip(1.0), make_tx()),
    "named": lambda: optax.named_chain(("clip", CLIP), ("inner", make_tx())),
    "clip before a partition": lambda: optax.chain(
        CLIP, vg.partition({"g": make_tx(), "w": SGD})
    ),
    "clip in a group": lambda: {"g": optax.chain(CLIP, make_tx()), "w": SGD},
    "clip in a masked one": lambda: optax.masked(
        optax.chain(CLIP, make_tx()), {"g": True, "w": True}
    ),
    "several steps": lambda: optax.MultiSteps(make_tx(), 2).gradient_transformation(),
    "flat": lambda: optax.flatten(make_tx()),
}


@pytest.mark.parametrize("make", SEEING.values(), ids=SEEING.keys())
def test_what_would_see_numbers_of_quantities_is_refused(make):
    match = "another one for `g`, .*Put the whole `optax.chain` or `vg.partition` inside"
    with pytest.raises(TypeError, match=match):
        vg.Optimizer(make(), make_channel())


def test_a_clip_may_see_parameters_and_gradients_without_units():
    bare = {"g": jnp.array(8.0), "w": jnp.ones(2)}
    opt = vg.Optimizer(optax.chain(CLIP, vg.unitful(SGD)), bare)
    new, _ = opt.step(bare, {"g": jnp.array(10.0), "w": jnp.zeros(2)})
    assert tree_allclose(new["g"], jnp.array(7.9))
    grads = {name: grad * u.mvolt for name, grad in bare.items()}
    opt = vg.Optimizer(optax.chain(CLIP, vg.unitful(SGD, u.mvolt)), bare)
    with pytest.raises(ValueError, match="Got a gradient in mV without `vg.unitful.* around"):
        opt.step(bare, grads)


PASSING = {
    "clip inside": lambda: make_tx(tx=optax.chain(CLIP, SGD)),
    "a partition inside": lambda: make_tx(
        tx=optax.chain(CLIP, vg.partition({"g": SGD, "w": optax.sgd(0.01)}))
    ),
    "groups": lambda: {"g": make_tx(), "w": SGD},
    "a partition": lambda: vg.partition({"g": make_tx(), "w": optax.chain(CLIP, SGD)}),
    "a chain of one": lambda: optax.chain(make_tx()),
    "masked": lambda: optax.masked(make_tx(), {"g": True, "w": True}),
    "partition of optax": lambda: optax.partition(
        {"with": make_tx(), "without": SGD}, {"g": "with", "w": "without"}
    ),
    "hyperparameters": lambda: optax.inject_hyperparams(
        lambda rate: make_tx(tx=optax.sgd(rate))
    )(rate=0.1),
}


@pytest.mark.parametrize("make", PASSING.values(), ids=PASSING.keys())
def test_what_passes_quantities_on_does_not_depend_on_units(make):
    found = []
    for unit in (u.nS, u.uS):
        params = make_channel(unit)
        new, _ = vg.Optimizer(make(), params).step(params, channel_grad(params))
        found.append({"g": jnp.asarray(new["g"] / u.nS), "w": new["w"]})
    assert tree_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert float(found[0]["g"]) < 8.0


def test_a_partition_inside_is_clipped_globally():
    tx = optax.chain(CLIP, vg.partition({"g": SGD, "w": optax.sgd(0.01)}))
    params = make_channel()
    new, _ = vg.Optimizer(make_tx(tx=tx), params).step(params, channel_grad(params))
    bare = {"g": jnp.array(0.8), "w": jnp.ones(2)}
    grads = {"g": jnp.array(60.0), "w": jnp.full(2, 2.0)}
    updates: Any = tx.update(grads, tx.init(bare), bare)[0]
    assert tree_allclose(jnp.asarray(new["g"] / u.nS), 8.0 + 10.0 * updates["g"], rtol=1e-5)
    assert tree_allclose(new["w"], bare["w"] + updates["w"])


def heavy(size=None, unit: Any = u.nS, loss_unit=None):
    scale = None if size is None else {"g": size * unit}
    return vg.unitful(optax.sgd(0.0, momentum=0.9), loss_unit, scale)


def momentum(opt):
    return opt.opt_state.inner_state[0].trace


ROOTS = {"nS": u.nS, "uS": u.uS}
RESELECTED: dict[str, tuple[Any, Any, str, bool]] = {
    "the same": (heavy(100.0), heavy(100.0), "nS", True),
    "another scale": (heavy(100.0), heavy(1.0), "nS", False),
    "in other words": (heavy(100.0), heavy(0.1, u.uS), "nS", True),
    "another unit with a scale": (heavy(100.0), heavy(100.0), "uS", True),
    "another unit without one": (heavy(), heavy(), "uS", False),
    "written out": (heavy(), heavy(1.0), "nS", True),
    "array": (heavy(jnp.array(100.0)), heavy(100.0), "nS", True),
}


@pytest.mark.parametrize("case", RESELECTED.values(), ids=RESELECTED.keys())
def test_moments_are_kept_only_in_the_scale_that_they_are_in(case):
    before, after, unit, is_kept = case
    params = make_channel()
    _, opt = vg.Optimizer(before, params).step(params, channel_grad(params))
    new = opt.reselect({**params, "g": params["g"].to(ROOTS[unit])}, tx=after)
    old, kept = momentum(opt), momentum(new)
    assert old["g"] != 0.0
    assert tree_allclose(kept["g"], old["g"] if is_kept else jnp.zeros_like(old["g"]))
    assert tree_allclose(kept["w"], old["w"])
    assert int(new.count) == 1


def test_moments_are_kept_only_in_the_unit_of_the_loss():
    params = {"w": jnp.ones(2)}
    _, opt = vg.Optimizer(heavy(loss_unit=u.mvolt), params).step(
        params, {"w": jnp.ones(2) * u.mvolt}
    )
    kept = momentum(opt.reselect(params, tx=heavy(loss_unit=u.mvolt)))
    fresh = momentum(opt.reselect(params, tx=heavy(loss_unit=u.volt)))
    assert (kept["w"].tolist(), fresh["w"].tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_hyperparameters_outlive_another_scale():
    tx = vg.unitful(optax.inject_hyperparams(optax.adam)(learning_rate=0.1))
    params = {"g": make_channel()["g"]}
    opt = vg.Optimizer(tx, params).set_hyperparams(learning_rate=0.5)
    grads = vg.grad(lambda p: (p["g"] / u.nS) ** 2, "**", unit_aware=True)(params)
    opt = opt.step(params, grads)[1].reselect({"g": params["g"].to(u.uS)})
    assert float(opt.hyperparams["learning_rate"]) == 0.5
    # The first step after it has the size of a first step.
    assert int(opt.opt_state.inner_state.inner_state[0].count) == 0


def test_a_traced_scale_is_its_own():
    params = {"w": jnp.ones(2)}

    @jax.jit
    def fit(size):
        make = lambda size: vg.unitful(optax.sgd(0.1, momentum=0.9), scale={"w": size})
        _, opt = vg.Optimizer(make(size), params).step(params, params)
        return momentum(opt.reselect(params)), momentum(opt.reselect(params, tx=make(2 * size)))

    kept, fresh = fit(3.0)
    assert (kept["w"].tolist(), fresh["w"].tolist()) == ([3.0, 3.0], [0.0, 0.0])


def test_a_changed_unit_is_named_by_an_optimizer_too():
    params = make_channel()
    opt = vg.Optimizer(make_tx(), params)
    changed = {**params, "g": params["g"].to(u.uS)}
    with pytest.raises(u.UnitMismatchError, match="parameter at `g` in the unit that it had"):
        opt.step(changed, channel_grad(params))


def make_optimizer_of_arrays(scale):
    return vg.Optimizer(vg.unitful(optax.adam(0.1), u.mvolt, scale), {"g": jnp.ones(2)})


ALIKE = {
    "no scale": lambda: None,
    "number": lambda: {"g": 10.0},
    "integer": lambda: {"g": 10},
    "array of one number": lambda: {"g": jnp.array(10.0)},
    "NumPy": lambda: {"*": np.float32(10.0)},
}


@pytest.mark.parametrize("make", ALIKE.values(), ids=ALIKE.keys())
def test_optimizers_with_units_that_are_made_alike_are_one_program(make):
    first, second = [make_optimizer_of_arrays(make()) for _ in range(2)]
    assert jax.tree.structure(first) == jax.tree.structure(second)
    traces = []

    @vg.jit
    def count(opt):
        traces.append(opt.count)
        return opt.count

    for opt in (first, second, make_optimizer_of_arrays({"g": 11.0})):
        count(opt)
    assert len(traces) == 2
