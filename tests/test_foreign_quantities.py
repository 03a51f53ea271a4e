"""Quantities of other libraries are refused by name, because their units would be lost."""

import importlib
from typing import Any

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vgrad_eqx as vg


class AbstractQuantity(eqx.Module):
    """Like that of unxt."""

    value: jax.Array
    unit: str = eqx.field(static=True)

    def __pow__(self, power):
        return type(self)(self.value**power, f"{self.unit}{power}")


class Length(AbstractQuantity):
    pass


class Quantity(np.ndarray):
    """Like that of astropy."""

    unit = "km"


class PlainQuantity:
    """Like that of pint."""

    units = "km"

    def __init__(self, magnitude):
        self.magnitude = magnitude

    def __pow__(self, power):
        return self


def make_pint():
    return importlib.import_module("pint").UnitRegistry().Quantity(np.array(2.0), "km")


def make_unxt():
    return importlib.import_module("unxt").Quantity(jnp.array(2.0), "km")


def make_astropy():
    return importlib.import_module("astropy.units").Quantity(np.array(2.0), "km")


def make(kind):
    if not kind.startswith("like"):
        pytest.importorskip(kind)
    return {
        "like unxt": lambda: Length(jnp.array(2.0), "km"),
        "like astropy": lambda: np.array([2.0]).view(Quantity),
        "like pint": lambda: PlainQuantity(np.array(2.0)),
        "pint": make_pint,
        "unxt": make_unxt,
        "astropy": make_astropy,
    }[kind]()


KINDS = ["like unxt", "like astropy", "like pint", "unxt", "astropy", "pint"]
MATCH = "supports only units of brainunit. Got a `.*` of `.*`. Pass its value"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vector_grad", "jacrev", "hessian", "elementwise_grad"])
def test_refused_as_an_argument(kind, name):
    with pytest.raises(TypeError, match=rf"`{name}\(unit_aware=True\)` {MATCH}"):
        getattr(vg, name)(lambda q: q**3, unit_aware=True)(make(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_in_the_state_tree_and_in_the_output(kind):
    q = make(kind)
    with pytest.raises(TypeError, match=MATCH):
        vg.grad(lambda tree: jnp.sum(tree["w"]), "w", unit_aware=True)(
            {"w": jnp.ones(2), "q": q}
        )
    with pytest.raises(TypeError, match=MATCH):
        vg.vector_grad(lambda x: {"x": x, "q": q}, unit_aware=True)(jnp.ones(2))


@pytest.mark.parametrize("kind", KINDS)
def test_refused_in_the_arguments_that_are_not_differentiated(kind):
    with pytest.raises(TypeError, match=MATCH):
        vg.vector_grad(lambda x, q: x, unit_aware=True)(jnp.ones(2), make(kind))
    with pytest.raises(TypeError, match=MATCH):
        vg.vector_grad(lambda x, q: x, unit_aware=True)(jnp.ones(2), q=[make(kind)])


@pytest.mark.parametrize("kind", KINDS)
def test_refused_beside_units_of_brainunit(kind):
    q: Any = make(kind)
    x: Any = jnp.ones(()) * u.ms
    with pytest.raises(TypeError, match=rf"`unitful\(scale=...\)` {MATCH}"):
        vg.unitful(optax.sgd(0.1), scale={"x": q})
    params: Any = {"x": x, "q": q}
    with pytest.raises(TypeError, match=rf"init\(params=...\)` {MATCH}"):
        vg.unitful(optax.sgd(0.1)).init(params)
    with pytest.raises(TypeError, match=rf"`vector_grad\(cotangent=...\)` {MATCH}"):
        vg.vector_grad(lambda x: x**2, unit_aware=True, cotangent=q)(x)


def test_a_state_keeps_the_unit_or_refuses():
    kept = vg.State(Length(jnp.array(2.0), "km")).value
    assert (kept.unit, float(kept.value)) == ("km", 2.0)
    with pytest.raises(TypeError, match=rf"`State\(value=...\)` {MATCH}"):
        vg.State({"q": make("like astropy")})


def test_refused_as_the_derivative_by_a_state():
    state = vg.State(Length(jnp.array(2.0), "km"))
    with pytest.raises(TypeError, match=MATCH):
        vg.vector_grad(lambda: state.value.value**2, state, unit_aware=True)()


@pytest.mark.parametrize("kind", KINDS)
def test_refused_in_a_checkpoint(kind, tmp_path):
    with pytest.raises(TypeError, match=rf"`save\(tree=...\)` {MATCH}"):
        vg.save(tmp_path / "checkpoint", {"q": make(kind)})
    with pytest.raises(TypeError, match=rf"`load\(like=...\)` {MATCH}"):
        vg.load(tmp_path / "checkpoint", {"q": make(kind)})
    assert not list(tmp_path.iterdir())


def test_numbers_of_them_are_differentiated_as_by_jax():
    q = Length(jnp.array(2.0), "km")
    assert float(vg.vector_grad(lambda q: q.value**3)(q).value) == 12.0


def test_those_of_brainunit_are_not_refused():
    q = jnp.array(2.0) * u.kmeter
    grad = vg.vector_grad(lambda q: q**3, unit_aware=True)(q)
    assert float(grad / u.kmeter**2) == 12.0


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_norms_are_in_float32_and_results_in_the_dtype_of_the_leaf(dtype):
    leaf, update = jnp.asarray([3.0, 4.0], dtype), jnp.asarray([0.5, 1.0], "float32")
    with jax.numpy_dtype_promotion("strict"):
        norms = vg.grad_norms({"w": leaf})
        new = vg.apply_updates({"w": leaf}, {"w": update})["w"]
        half = vg.apply_updates({"w": update}, {"w": leaf})["w"]
    assert float(norms["w"]) == 5.0
    assert norms["w"].dtype == "float32"
    assert new.dtype == dtype
    assert new.astype(float).tolist() == [3.5, 5.0]
    assert half.dtype == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_under_strict_promotion(dtype, accumulate):
    loss = lambda m, x: jnp.sum((m["w"].astype("float32") * x) ** 2)
    for tx in (optax.sgd(0.125), vg.unitful(optax.sgd(0.125), scale={"*": 1.0})):
        step = vg.train_step(loss, tx, accumulate=accumulate, grad_norms=True)
        batch = jnp.ones(2 if accumulate == 1 else (2, 2), "float32")
        with jax.numpy_dtype_promotion("strict"):
            state, metrics = step(step.init({"w": jnp.asarray([1.0, 2.0], dtype)}), batch)
        assert state.model["w"].dtype == dtype
        assert state.model["w"].astype(float).tolist() == [0.75, 1.5]
        assert float(metrics.grad_norms["w"]) == pytest.approx(20**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_under_strict_promotion(dtype):
    weight = vg.State(jnp.asarray([1.0, 2.0], dtype))
    opt = vg.StateOptimizer(optax.sgd(0.125), weight)
    with jax.numpy_dtype_promotion("strict"):
        opt.step(vg.vector_grad(lambda: weight.value.astype("float32") ** 2, weight)())
    assert weight.value.astype(float).tolist() == [0.75, 1.5]


def test_an_update_of_bfloat16_is_rounded_once():
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.bfloat16)
    update = jnp.asarray(np.random.default_rng(1).normal(size=1000) / 100, "float32")
    new = vg.apply_updates({"w": leaf}, {"w": update})["w"]
    assert jnp.array_equal(new, (leaf.astype("float32") + update).astype(jnp.bfloat16))
