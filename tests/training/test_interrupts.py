"""What is left of a training after an error, and after Ctrl-C at any moment."""

import _thread
import random
import signal
import sys
import threading
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import vgrad_eqx as vg
from vgrad_eqx._training.interrupts import hold, release
from vgrad_eqx._tree.state import write


def loss(w, x):
    return sum(jnp.sum((leaf * x) ** 2) for leaf in w.values())


def guarded(w, x):
    return w["a"] * eqx.error_if(x, jnp.any(x > 5), "x must be below 5")


ONE = {"a": jnp.array(1.0)}


class Training:
    """A training of a module, whose state is the one that a loop has stored."""

    def __init__(self, num_leaves, width, waits, steps_per_call):
        self.step = vg.train_step(loss, optax.adam(1e-6), steps_per_call=steps_per_call)
        self.x = jnp.ones((steps_per_call, width) if steps_per_call > 1 else width)
        self.waits = waits
        self.state = self.step.init({f"p{i}": jnp.ones(width) for i in range(num_leaves)})
        self.take_steps(0.0)

    def take_steps(self, seconds, begin=lambda: None):
        begin()
        step, x, end = self.step, self.x, time.monotonic() + seconds
        while True:
            self.state, metrics = step(self.state, x)
            if self.waits:
                jax.block_until_ready(metrics.value)
            if time.monotonic() >= end:
                return

    def check(self):
        assert all(np.all(np.isfinite(leaf)) for leaf in self.state.model.values())
        assert int(self.state.optimizer.opt_state[0].count) == self.state.count
        self.take_steps(0.0)


class StateTraining:
    """A training in a `with` block, over states by reference."""

    def __init__(self):
        self.w, self.calls = vg.State(jnp.ones(3)), vg.State(0)
        self.step = vg.train_step(self.func, optax.adam(1e-6), self.w)
        self.opt = vg.StateOptimizer(optax.adam(1e-6), self.w)
        self.take_steps(0.0)

    def func(self, x):
        self.calls.value += 1
        return jnp.sum((self.w.value * x) ** 2)

    def take_steps(self, seconds, begin=lambda: None):
        x = jnp.ones(3)
        with self.step.init(optimizer=self.opt) as state:
            state, _ = self.step(state, x)  # which compiles
            begin()
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                state, _ = self.step(state, x)

    def check(self):
        assert np.all(np.isfinite(self.w.value))
        assert int(self.calls.value) == int(self.opt.count)


TRAININGS = {
    "small": lambda: Training(1, 3, False, 1),
    "small, waiting": lambda: Training(1, 3, True, 1),
    "wide": lambda: Training(40, 256, False, 1),
    "steps_per_call": lambda: Training(4, 8, False, 5),
}


def interrupt(training, seconds):
    """Takes steps until Ctrl-C, which comes after so many seconds."""
    timer = threading.Timer(seconds, _thread.interrupt_main)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        training.take_steps(0.5, timer.start)
        raise KeyboardInterrupt  # it came inside of a destructor, which swallows it
    timer.join()


@pytest.mark.parametrize("times", [8, pytest.param(250, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("make", TRAININGS.values(), ids=TRAININGS.keys())
def test_ctrl_c_loses_no_step(make, times):
    training, moments = make(), random.Random(times)
    for _ in range(times):
        interrupt(training, 0.002 + 0.01 * moments.random())
        training.check()


def print_loss(w, x):
    jax.debug.callback(lambda x: None, x)  # because of which JAX runs Python in each call
    return loss(w, x)


def count_events(training, interrupt_at=None):
    """Takes a step, with Ctrl-C at one of the calls and returns since it was traced."""
    count, is_traced = 0, not training.is_new

    def note(frame, event, arg):
        nonlocal count, is_traced
        is_traced |= event == "return" and frame.f_code.co_name == "run"
        count += is_traced
        if count == interrupt_at:
            sys.setprofile(None)
            _thread.interrupt_main()

    sys.setprofile(note)
    try:
        training.take_steps(0.0)
    finally:
        sys.setprofile(None)
    return count


class NewTraining(Training):
    """A training whose first steps are to come."""

    def __init__(self, func, num_steps):
        self.step = vg.train_step(func, optax.adam(1e-6))
        self.x, self.waits, self.is_new = jnp.ones(3), False, num_steps == 0
        self.state = self.step.init({"a": jnp.ones(3)})
        for _ in range(num_steps):
            self.take_steps(0.0)


CALLS = {
    "first": (loss, 0),
    "second": (loss, 1),
    "with a callback": (print_loss, 3),
}


@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_ctrl_c_where_jax_runs_python_loses_nothing(call, times):
    """Before the program is called, while it is, and after it."""
    # The second one, because JAX does less for it.
    number = [count_events(NewTraining(*call)) for _ in range(2)][-1]
    training: Any = None
    # Half of the moments are among the last events, where results are on their way.
    late = np.linspace(max(1, number - 150), number - 1, times // 2, dtype=int)
    for moment in [*np.linspace(1, number - 1, times // 2, dtype=int), *late]:
        if training is None or call[1] < 2:
            training = NewTraining(*call)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            count_events(training, moment)
            raise KeyboardInterrupt  # it came inside of a destructor, which swallows it
        training.is_new = False
        training.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_after_another_size_of_a_batch():
    training = NewTraining(loss, 3)
    training.x, training.is_new = jnp.ones(()), True
    with pytest.raises(KeyboardInterrupt):
        count_events(training, 200)
    training.check()
    assert training.state.count == 5


def test_the_second_ctrl_c_is_not_held_back():
    count = 0
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        hold()
        for count in range(1, 4):  # noqa: B007
            _thread.interrupt_main()
    assert count == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    release()


def test_a_handler_of_the_user_is_called_after_the_step():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *args: seen.append(args))
    try:
        training = NewTraining(loss, 0)
        count_events(training, 200)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [number for number, _ in seen] == [signal.SIGINT]
    assert training.state.count == 1


def test_other_threads_hold_nothing_back():
    training = NewTraining(loss, 0)
    thread = threading.Thread(target=training.take_steps, args=(0.0,))
    thread.start()
    thread.join()
    assert training.state.count == 1
    training.check()


def test_ctrl_c_while_a_with_block_ends_sets_all_states_or_none(monkeypatch):
    training = StateTraining()
    writes = []

    def write_slowly(*args):
        writes.append(args)
        _thread.interrupt_main() if len(writes) == 1 else None
        return write(*args)

    monkeypatch.setattr("vgrad_eqx._training.flat_step.write", write_slowly)
    with pytest.raises(KeyboardInterrupt):
        training.take_steps(0.0)
    training.check()
    assert len(writes) > 1


def test_ctrl_c_in_a_with_block_sets_the_states():
    training, moments = StateTraining(), random.Random(0)
    count = int(training.opt.count)
    for _ in range(4):
        interrupt(training, 0.002 + 0.01 * moments.random())
        training.check()
    assert int(training.opt.count) > count + 8


def test_an_interrupt_within_a_step_is_an_interrupt_and_keeps_what_was_done(monkeypatch):
    step = vg.train_step(loss, optax.sgd(0.1))
    state, _ = step(step.init(ONE), 1.0)
    before = state.model["a"]

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("vgrad_eqx._training.train_step.Metrics", stop)
    with pytest.raises(KeyboardInterrupt):
        step(state, 1.0)
    monkeypatch.undo()
    np.testing.assert_allclose(state.model["a"], 0.8 * before, rtol=1e-6)
    assert state.count == 2
    state, _ = step(state, 1.0)
    assert state.count == 3


# Errors


OPTIONS = {
    "none": {},
    "packed": {"packed": True},
    "steps_per_call": {"steps_per_call": 2},
    "accumulate": {"accumulate": 2},
}


def fail(step, state, *shape):
    jax.block_until_ready(step(state, jnp.full(shape, 9.0))[1].value)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_error_of_the_loss_is_what_is_raised(options):
    step = vg.train_step(guarded, optax.sgd(0.1), **options)
    with pytest.raises(Exception, match="x must be below 5"):
        fail(step, step.init(ONE), *[2] * (len(options) and "packed" not in options))


def test_an_error_keeps_its_type_its_cause_and_the_state_before_the_program_runs():
    class Mine(Exception):
        pass

    def func(w, x):
        try:
            raise KeyError("first")
        except KeyError as error:
            raise Mine from error

    step = vg.train_step(func, optax.sgd(0.1))
    state = step.init(ONE)
    with pytest.raises(Mine) as info:
        step(state, 1.0)
    assert isinstance(info.value.__cause__, KeyError)
    assert float(state.model["a"]) == 1.0


def test_the_error_of_a_callback_is_what_is_raised():
    def check(x):
        raise ZeroDivisionError("mine")

    def func(w, x):
        jax.debug.callback(check, x)
        return w["a"] * x

    step = vg.train_step(func, optax.sgd(0.1))
    with pytest.raises(Exception, match="mine"):  # noqa: PT012
        fail(step, step.init(ONE))
        jax.effects_barrier()


def test_without_donation_the_last_good_state_is_there():
    step = vg.train_step(guarded, optax.sgd(0.1), donate=False)
    state, _ = step(step.init(ONE), jnp.array(1.0))
    with pytest.raises(Exception, match="x must be below 5"):
        fail(step, state)
    assert float(state.model["a"]) == pytest.approx(0.9)
    assert step(state, jnp.array(1.0))[0].count == 2


def test_a_copy_is_kept_now_and_then():
    step = vg.train_step(guarded, optax.sgd(0.1), keep_every=2)
    state: Any = step.init(ONE)
    assert state.kept is None
    for _ in range(5):
        state, _ = step(state, jnp.array(1.0))
    with pytest.raises(Exception, match="x must be below 5"):
        fail(step, state)
    kept: Any = state.kept
    assert kept.count == 4
    state, _ = step(kept, jnp.array(1.0))
    assert float(state.model["a"]) == pytest.approx(0.5)


def test_a_state_that_an_error_has_taken_says_so():
    step = vg.train_step(loss, optax.sgd(0.1))
    state, _ = step(step.init(ONE), 1.0)
    jax.tree.map(lambda leaf: leaf.delete(), state.leaves)
    with pytest.raises(RuntimeError, match="was donated to a step"):
        step(state, 1.0)
    with pytest.raises(RuntimeError, match="was donated to a step"):
        _ = state.model


@pytest.mark.parametrize("keep_every", [0, 2])
def test_leaving_a_with_block_by_an_error_sets_what_is_good(keep_every):
    w = vg.State(jnp.array(1.0))
    func = lambda x: guarded({"a": w.value}, x)
    step = vg.train_step(func, optax.sgd(0.1), w, keep_every=keep_every)
    with pytest.raises(Exception, match="x must be below 5"), step.init() as state:  # noqa: PT012
        for _ in range(3):
            state, _ = step(state, jnp.array(1.0))
        fail(step, state)
    assert float(w.value) == pytest.approx(0.8 if keep_every else 1.0)
