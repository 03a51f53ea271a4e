"""Norms of gradients, and their picture."""

import sys
from typing import Any

import brainunit as u
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import vgrad_eqx as vg

from ..helpers import make_mlp, tree_allclose


def test_norms_are_those_of_the_gradients():
    grads = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([3 + 4j, 0]), "n": jnp.arange(2)}
    expected = {"a": jnp.array(5.0), "b": jnp.array(5.0)}
    assert tree_allclose(vg.grad_norms(grads), expected)
    assert tree_allclose(jax.jit(vg.grad_norms)(grads), expected)
    model = make_mlp()
    assert list(vg.grad_norms(model)) == list(vg.states(model))


def test_norms_of_small_dtypes_do_not_overflow():
    norms = vg.grad_norms({"a": jnp.full(4, 3e4, "float16"), "b": jnp.ones(9, "bfloat16")})
    assert tree_allclose(
        norms, {"a": jnp.array(6e4, "float32"), "b": jnp.array(3.0, "float32")}
    )


def test_norms_have_the_unit_of_the_gradient():
    norms = vg.grad_norms({"tau": jnp.array([3.0, 4.0]) * u.ms})
    assert u.get_unit(norms["tau"]) == u.ms
    assert float(u.get_mantissa(norms["tau"])) == 5.0


def test_norms_of_nothing_are_refused():
    with pytest.raises(ValueError, match="must hold inexact arrays. Got a `dict` without one"):
        vg.grad_norms({"n": jnp.arange(2)})
    with pytest.raises(ValueError, match="Two leaves share the dotted path `a.b`"):
        vg.grad_norms({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


HISTORY = [
    {"dead": 0.0, "body": 1e-3},
    {"dead": 0.0, "body": 1e-2, "head": 1.0},
    {"dead": np.zeros(2), "body": np.array([1e-1, np.inf]), "head": np.array([10.0, np.nan])},
]


def test_the_picture_shows_each_path_at_each_step():
    ax: Any = vg.plot_grad_norms(HISTORY)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["body", "dead", "head"]
    regular, zero, not_finite = [image.get_array() for image in ax.images]
    shown = ~np.ma.getmaskarray(np.ma.masked_invalid(regular))
    assert shown.tolist() == [[True] * 3 + [False], [False] * 4, [False, True, True, False]]
    marked = [~np.ma.getmaskarray(np.ma.masked_invalid(each)) for each in (zero, not_finite)]
    assert marked[0].tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert marked[1].tolist() == [[False] * 3 + [True], [False] * 4, [False] * 3 + [True]]
    plt.close("all")


def test_the_picture_is_drawn_into_given_axes():
    figure, axes = plt.subplots()
    assert vg.plot_grad_norms([{"a": 1.0 * u.ms}], ax=axes) is axes
    assert len(figure.axes) == 2
    plt.close("all")


def test_paths_are_in_natural_order():
    norms = {f"layers.{i}.weight": 1.0 for i in (0, 1, 10, 2)}
    ax = vg.plot_grad_norms(norms for _ in range(2))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [f"layers.{i}.weight" for i in (0, 1, 2, 10)]
    plt.close("all")


def test_wrong_pictures(monkeypatch):
    with pytest.raises(ValueError, match="must hold a step. Got none"):
        vg.plot_grad_norms([])
    wrong: Any = [{"a": 1.0}, 3]
    with pytest.raises(TypeError, match="dicts from path to norm.*Got 3 in it"):
        vg.plot_grad_norms(wrong)
    wrong = {"a": 1.0}
    with pytest.raises(TypeError, match=r"Got \{'a': 1.0\}. For a single step, pass"):
        vg.plot_grad_norms(wrong)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ImportError, match=r'needs matplotlib.*pip install "vgrad_eqx\[plot\]"'):
        vg.plot_grad_norms(HISTORY)


def test_a_picture_of_many_paths_fits_on_a_page():
    ax: Any = vg.plot_grad_norms([{f"layers.{i}": 1.0 + i for i in range(1000)}])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:3] == ["layers.0", "layers.16", "layers.32"]
    assert ax.figure.get_figheight() < 20
    assert ax.images[0].get_extent()[2] == 999.5
    assert {image.get_interpolation() for image in ax.images} == {"nearest"}
    plt.close(ax.figure)
