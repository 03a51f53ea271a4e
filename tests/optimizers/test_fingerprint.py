"""Functions that are made alike are equal, and others are not."""

import dataclasses
import functools as ft

import jax.numpy as jnp
import optax
import pytest

# The class is not public: an optimizer compares by it.
from vgrad_eqx._optimizers.fingerprint import Fingerprinted


MAKERS = {
    "adam": lambda rate: optax.adam(rate),
    "schedule": lambda rate: optax.sgd(optax.cosine_decay_schedule(rate, 10)),
    "chain": lambda rate: optax.chain(optax.clip(1.0), optax.lion(rate)),
    "hyperparameters": lambda rate: optax.inject_hyperparams(optax.adam)(learning_rate=rate),
    "masked": lambda rate: optax.masked(optax.sgd(rate), {"a": True, "b": False}),
    "partial": lambda rate: ft.partial(max, rate),
    "list": lambda rate: [rate, {"rate": rate}],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_alike_if_made_by_the_same_code_with_the_same_constants(make):
    assert Fingerprinted(make(0.1)) == Fingerprinted(make(0.1))
    assert hash(Fingerprinted(make(0.1))) == hash(Fingerprinted(make(0.1)))
    assert Fingerprinted(make(0.1)) != Fingerprinted(make(0.2))


DIFFERENT = {
    "types": (1, 1.0),
    "bools": (True, 1),
    "signs": (0.0, -0.0),
    "arrays": (optax.sgd, object()),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "defaults": (lambda x=1: x, lambda x=2: x),
    "methods": ([].append, [].append),
    "lists": ([1], (1,)),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_not_alike(pair):
    left, right = pair
    assert Fingerprinted(left) != Fingerprinted(right)
    assert Fingerprinted(left) == Fingerprinted(left)


def test_arrays_are_alike_only_if_they_are_the_same():

    array = jnp.ones(2)
    assert Fingerprinted(lambda: array) != Fingerprinted(lambda: jnp.ones(2))
    make = lambda array: lambda: array
    assert Fingerprinted(make(array)) == Fingerprinted(make(array))
    assert Fingerprinted(make(array)) != Fingerprinted(make(jnp.ones(2)))


def test_a_function_may_refer_to_itself():
    def make():
        def count(n):
            return n and count(n - 1)

        return count

    assert Fingerprinted(make()) == Fingerprinted(make())
    assert Fingerprinted(1) != 1


def test_a_list_that_has_changed_since_is_another_one():
    def make(rates):
        return Fingerprinted(lambda count: rates[0])

    first, second = [0.1], [0.1]
    one, other = make(first), make(second)
    assert one == other
    second[0] = 100.0
    assert one != other
    assert other == other.__class__(other.value)
    assert one == make([0.1])


class Incomparable:
    def __hash__(self):
        return 0

    def __eq__(self, other):
        raise ValueError("ambiguous")


def test_constants_that_do_not_compare_make_others():
    def make(constant):
        return Fingerprinted(lambda: constant)

    assert make(Incomparable()) != make(Incomparable())


@dataclasses.dataclass(frozen=True)
class Options:
    rates: dict[str, float]
    schedule: object = None


def test_dataclasses_are_alike_by_their_fields():
    assert Fingerprinted(Options({"a": 0.1})) == Fingerprinted(Options({"a": 0.1}))
    assert Fingerprinted(Options({"a": 0.1})) != Fingerprinted(Options({"a": 0.2}))
    make = lambda: Options({}, lambda count: 0.1)
    assert Fingerprinted(make()) == Fingerprinted(make())
    assert Fingerprinted(Options) != Fingerprinted(Options({}))
