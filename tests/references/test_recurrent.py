"""A recurrent network whose memory is a state, against the scan that carries it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.ref
import optax
import pytest
import vgrad_eqx as vg
from jax import lax
from vgrad_eqx import vector_grad

from ..helpers import WAYS


class Rnn(eqx.Module):
    """A recurrent network, whose memory is a state."""

    weight_x: vg.State
    weight_h: vg.State
    hidden: vg.State

    def __init__(self, key):
        key_x, key_h = jr.split(key)
        self.weight_x = vg.State(jr.normal(key_x, (4, 2)))
        self.weight_h = vg.State(0.5 * jr.normal(key_h, (4, 4)))
        self.hidden = vg.State(jnp.zeros(4))

    def step(self, x):
        pre = self.weight_x.value @ x + self.weight_h.value @ self.hidden.value
        self.hidden.value = jnp.tanh(pre)
        return self.hidden.value


def step_by_hand(params, hidden, x):
    hidden = jnp.tanh(params["weight_x"] @ x + params["weight_h"] @ hidden)
    return hidden, hidden


UNROLLED = {
    "scan": (
        lambda rnn, xs: lax.scan(lambda _, x: (None, rnn.step(x)), None, xs)[1],
        lambda params, h, xs: lax.scan(lambda h, x: step_by_hand(params, h, x), h, xs),
    ),
    "loop": (
        lambda rnn, xs: [rnn.step(x) for x in xs],
        lambda params, h, xs: loop_by_hand(step_by_hand, params, h, xs),
    ),
    "jitted step": (
        lambda rnn, xs: [jax.jit(rnn.step)(x) for x in xs],
        lambda params, h, xs: loop_by_hand(jax.jit(step_by_hand), params, h, xs),
    ),
}


def loop_by_hand(step, params, hidden, xs):
    outs = []
    for x in xs:
        hidden, out = step(params, hidden, x)
        outs.append(out)
    return hidden, outs


@pytest.mark.parametrize(("unroll", "by_hand"), UNROLLED.values(), ids=UNROLLED.keys())
@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS.keys())
def test_recurrent_network_equals_the_scan_to_the_last_bit(unroll, by_hand, wrap):
    rnn, xs = Rnn(jr.key(0)), jr.normal(jr.key(1), (5, 2))
    weights = vg.states(rnn, "weight_*")
    params = {path: state.value for path, state in weights.items()}
    start = rnn.hidden.value
    transform = vector_grad(lambda xs: unroll(rnn, xs), weights, argnums=0, return_value=True)
    (var_grads, arg_grad), outs = wrap(lambda xs: transform(xs))(xs)

    def gradient(params, start, xs):
        def func(params, xs):
            hidden, outs = by_hand(params, start, xs)
            return outs, hidden

        outs, pull_back, hidden = jax.vjp(func, params, xs, has_aux=True)
        return pull_back(jax.tree.map(jnp.ones_like, outs)), outs, hidden

    grads, expected, hidden = wrap(gradient)(params, start, xs)
    assert eqx.tree_equal(outs, expected)
    assert eqx.tree_equal((var_grads, arg_grad), grads)
    assert eqx.tree_equal(rnn.hidden.value, hidden)


def test_optax_takes_the_gradients_and_the_loss_falls():
    rnn, xs = Rnn(jr.key(0)), jr.normal(jr.key(1), (5, 2))
    states = vg.states(rnn, "weight_*")
    tx = optax.adam(0.05)
    opt_state = tx.init({path: state.value for path, state in states.items()})

    def errors(xs):
        rnn.hidden.value = jnp.zeros(4)
        return (lax.scan(lambda _, x: (None, rnn.step(x)), None, xs)[1] - 0.5) ** 2

    @jax.jit
    def step(opt_state: Any) -> Any:
        grads, losses = vector_grad(errors, states, return_value=True)(xs)
        updates: Any
        updates, opt_state = tx.update(grads, opt_state)
        for path, state in states.items():
            state.value += updates[path]
        return opt_state, losses.mean()

    losses = []
    for _ in range(40):
        opt_state, loss = step(opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
