"""The cases, and how one is measured in processes of its own."""

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from .derivatives import first_derivative, jacobian_diagonal, second_derivative
from .gradients import compiled, compiled_wide, eager, tracing
from .imports import imports
from .interleave import interleave, Timing
from .states import choosing, states_compiled, states_eager, states_tracing
from .training import training, training_wide
from .units import unit_aware, unit_aware_eager


class Case(NamedTuple):
    """What is measured, and in which sizes: numbers of leaves, or of points."""

    title: str
    make: Any
    sizes: list[int]
    quick: list[int] = []


CASES = {
    "compiled": Case("compiled gradient", compiled, [8, 100, 1000, 4000], [8]),
    "compiled_wide": Case("compiled gradient, 1024 wide", compiled_wide, [8]),
    "eager": Case("eager gradient", eager, [8, 100, 1000, 4000], [8]),
    "training": Case("training step with adam", training, [8, 100, 1000], [8]),
    "training_wide": Case("training step, 1024 wide", training_wide, [8]),
    "tracing": Case("tracing a gradient", tracing, [8, 100, 1000]),
    "unit_aware": Case("compiled gradient with units", unit_aware, [8, 100], [8]),
    "unit_aware_eager": Case("eager gradient with units", unit_aware_eager, [8]),
    "first_derivative": Case("derivative at points", first_derivative, [4096], [512]),
    "second_derivative": Case("second derivative at points", second_derivative, [4096]),
    "jacobian_diagonal": Case("diagonal of the Jacobian", jacobian_diagonal, [1024]),
    "states_eager": Case("eager gradient over states", states_eager, [8, 100]),
    "states_tracing": Case("tracing over states", states_tracing, [8, 100, 1000]),
    "states_compiled": Case("compiled gradient over states", states_compiled, [100, 1000]),
    "choosing": Case("choosing half of the leaves", choosing, [10_000]),
    "import": Case("import, beyond JAX, Equinox and optax", imports, [1], [1]),
}
TITLES = {name: case.title for name, case in CASES.items()}
# How many processes measure a case, every other one with the first calls in reverse order, so
# that no way has the better memory, and in how many seconds the last one begins.
PROCESSES, LATEST = 2, 200


def measure(name: str, size: int, most: int, is_reversed: bool) -> dict[str, Timing]:
    """One case, in this process."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name}, {size:,}: {text}", end="", file=sys.stderr, flush=True)

    timings = interleave(CASES[name].make(size), most, show, is_reversed=is_reversed)
    show("")
    return timings


def measure_apart(name: str, size: int, most: int, processes: int) -> list[dict[str, Any]]:
    """One case, in new processes, of which the measurements are put together."""
    total: dict[str, Timing] = {}
    end = time.monotonic() + LATEST
    for i in range(processes):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            timings = executor.submit(measure, name, size, most, i % 2 == 1).result()
        total = {
            way: total[way] + timing if total else timing for way, timing in timings.items()
        }
        if time.monotonic() > end:
            break
    return [
        {"case": name, "size": size, "way": way, **timing.summarize()}
        for way, timing in total.items()
    ]
