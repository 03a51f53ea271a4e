"""Tables of what is chosen."""

import html.parser

import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import vgrad_eqx as vg

from ..helpers import make_mlp


class Block(eqx.Module):
    attn: dict
    heads: list


def make_blocks(num_blocks):
    make = lambda: Block({"weight": jnp.zeros((4, 4))}, [jnp.zeros(3), jnp.zeros(3)])
    return {"layers": [make() for _ in range(num_blocks)]}


def list_paths(table):
    return [line.split("  ")[0] for line in str(table).splitlines()[1:-1]]


def test_a_table_is_returned_and_compared(capsys):
    table = vg.summary(make_mlp(), "layers.0")
    assert table == vg.summary(make_mlp(), "layers.0") != vg.summary(make_mlp())
    assert [row.path for row in table.rows if row.fate == "chosen"] == [
        "layers.0.weight",
        "layers.0.bias",
    ]
    assert repr(table) == str(table)
    assert capsys.readouterr().out == ""


def test_equal_arrays_of_equal_layers_share_a_row_of_a_long_table():
    table = vg.summary(make_blocks(300))
    assert list_paths(table) == ["layers.[0-299].attn.weight", "layers.[0-299].heads.[0-1]"]
    assert "300 × (4, 4)" in str(table)
    assert "4,800" in str(table)
    assert len(table.rows) == 900


def test_a_short_table_has_a_row_for_each_array():
    assert len(list_paths(vg.summary(make_blocks(13)))) == 39


def test_only_equal_arrays_share_a_row():
    tree = make_blocks(20)
    tree["layers"][7].attn["weight"] = jnp.zeros((4, 5))
    tree["layers"][8].heads[1] = jnp.zeros(3) * u.mvolt
    table = vg.summary(tree, ~vg.path("layers.3"))
    assert list_paths(table) == [
        "layers.[0-2,4-6,8-19].attn.weight",
        "layers.[0-2,4-19].heads.0",
        "layers.[0-2,4-7,9-19].heads.1",
        "layers.3.attn.weight",
        "layers.3.heads.[0-1]",
        "layers.7.attn.weight",
        "layers.8.heads.1",
    ]


@pytest.mark.parametrize("num_blocks", [1, 14, 40])
def test_rows_that_are_merged_keep_the_sum_of_sizes(num_blocks):
    lines = str(vg.summary(make_blocks(num_blocks))).splitlines()[1:-1]
    sizes = [int(line.split()[-2].replace(",", "")) for line in lines]
    assert sum(sizes) == 22 * num_blocks


def test_values_are_shown_in_their_units():
    fit = {
        "few": jnp.array([0.5, -2.0, 0.0, 1.0], "bfloat16"),
        "many": jnp.arange(5, dtype="float16") * u.mvolt,
        "tau": vg.State(jnp.array(12.5, "float16") * u.ms),
    }
    assert str(vg.summary(fit, vg.path("few", "many"), values=True)).splitlines() == [
        "path  shape  dtype     value          unit  size",
        "few   (4,)   bfloat16  0.5, -2, 0, 1           4  chosen",
        "many  (5,)   float16   0 ... 4        mV       5  chosen",
        "tau   ()     float16   12.5           ms       1  frozen",
        "chosen: 9 of 10 parameters, in 2 of 3 arrays",
    ]


def test_values_of_each_layer_have_a_row():
    assert len(list_paths(vg.summary(make_blocks(20), values=True))) == 60


def test_values_that_are_not_known_are_left_out():
    tree = {"key": jax.random.key(0), "z": jnp.zeros(9, complex), "x": jnp.zeros(2)}
    values = {row.path: row.value for row in vg.summary(tree, values=True).rows}
    assert values == {"key": "", "z": "", "x": "0, 0"}

    @jax.jit
    def look(x):
        assert vg.summary({"x": x}, values=True).rows[0].value == ""

    look(jnp.zeros(2))


def test_values_must_be_a_flag():
    with pytest.raises(
        TypeError, match=r"`summary\(values=...\)` must be True or False. Got 3"
    ):
        vg.summary(make_mlp(), values=3)  # pyright: ignore[reportArgumentType]


class Reader(html.parser.HTMLParser):
    """Collects the rows of a table, and checks that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.opened, self.rows = [], []

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        if self.opened[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_notebook_shows_the_same_cells():
    table, reader = vg.summary({"<b>": jnp.zeros((2, 3)), "n": jnp.arange(3)}), Reader()
    reader.feed(table._repr_html_())
    assert reader.opened == []
    lines = str(table).splitlines()[:-1]
    assert [" ".join(row).split() for row in reader.rows] == [line.split() for line in lines]
    assert reader.rows[1][0] == "<b>"


def test_an_integer_with_a_unit_has_a_row():
    tree = {"g_k": jnp.array(12.0) * u.nS, "g_leak": 8 * u.nS, "n": 3}
    rows = {row.path: (row.fate, str(row.unit)) for row in vg.summary(tree, "g_*").rows}
    assert rows == {"g_k": ("chosen", "nS"), "g_leak": ("not differentiable", "nS")}
    assert "in 1 of 1 arrays" in str(vg.summary(tree, "g_*"))
