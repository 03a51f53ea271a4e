"""What is changed in a module, or in a list or dict of it, is seen by the next call."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import vgrad_eqx as vg

from ..helpers import make_mlp, tree_allclose


class Lists(eqx.Module):
    items: list
    by_name: dict


def make_lists():
    return Lists([jnp.zeros(2), [jnp.ones(3)]], {"a": jnp.zeros(1)})


def test_a_leaf_set_in_a_list_is_seen():
    lists = make_lists()
    vg.states(lists)
    lists.items[1][0] = jnp.full(3, 7.0)
    assert tree_allclose(vg.states(lists)["items.1.0"], jnp.full(3, 7.0))


def test_a_leaf_added_to_a_list_is_seen():
    lists = make_lists()
    vg.states(lists)
    lists.items.append(jnp.ones(4))
    assert list(vg.states(lists)) == ["by_name.a", "items.0", "items.1.0", "items.2"]


def test_a_leaf_set_in_a_dict_is_seen():
    lists = make_lists()
    vg.states(lists)
    lists.by_name["a"] = jnp.full(1, 7.0)
    assert tree_allclose(vg.states(lists)["by_name.a"], jnp.full(1, 7.0))


def test_a_key_renamed_in_a_dict_is_seen():
    lists = make_lists()
    vg.states(lists)
    lists.by_name["b"] = lists.by_name.pop("a")
    assert list(vg.states(lists, "by_name")) == ["by_name.b"]


def test_a_field_set_again_in_init_is_seen():
    seen = []

    class Indecisive(eqx.Module):
        weight: jax.Array

        def __init__(self):
            for value in (0.0, 1.0):
                self.weight = jnp.asarray(value)
                seen.append(float(vg.states(self)["weight"]))

    Indecisive()
    assert seen == [0.0, 1.0]


def test_a_changed_list_reaches_the_gradient():
    lists = make_lists()
    gradient = vg.vector_grad(lambda m: m.items[0] ** 2, "items.0")
    gradient(lists)
    lists.items[0] = jnp.array([3.0, 4.0])
    assert gradient(lists)["items.0"].tolist() == [6.0, 8.0]


def test_a_node_that_may_change_is_taken_apart_each_time():
    class Box:
        def __init__(self, value):
            self.value = value

    jax.tree_util.register_pytree_with_keys(
        Box,
        lambda box: (((jax.tree_util.GetAttrKey("value"), box.value),), None),
        lambda _, children: Box(*children),
    )
    lists = Lists([Box(jnp.zeros(1))], {})
    vg.states(lists)
    lists.items[0].value = jnp.ones(1)
    assert vg.states(lists)["items.0.value"].tolist() == [1.0]


def test_a_remembered_module_is_collected():
    mlp = make_mlp()
    vg.states(mlp)
    module, leaf = weakref.ref(mlp), weakref.ref(mlp.layers[0].weight)
    del mlp
    gc.collect()
    assert module() is None
    assert leaf() is None


def test_tracers_do_not_leak():
    @eqx.filter_jit
    def choose(mlp):
        vg.states(mlp)
        return mlp

    with jax.checking_leaks():
        choose(make_mlp())
