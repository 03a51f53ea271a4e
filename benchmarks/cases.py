"""The cases, and how one is measured in processes of its own."""

import collections
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from .checkpoints import loading, saving
from .derivatives import first_derivative, jacobian_diagonal, second_derivative
from .gradients import compiled, compiled_wide, eager, tracing
from .imports import imports
from .interleave import interleave, Timing
from .states import choosing, states_compiled, states_eager, states_tracing
from .training import training, training_wide
from .units import unit_aware, unit_aware_eager


class Case(NamedTuple):
    """What is measured, and in which sizes: numbers of leaves, or of points.

    So many processes measure each way, every other one with the first calls in reverse order.
    """

    title: str
    make: Any
    sizes: list[int]
    quick: list[int] = []
    processes: int = 2


CASES = {
    "compiled": Case("compiled gradient", compiled, [8, 100, 1000, 4000], [8], 4),
    "compiled_wide": Case("compiled gradient, 1024 wide", compiled_wide, [8]),
    "eager": Case("eager gradient", eager, [8, 100, 1000, 4000], [8]),
    "training": Case("training step with adam", training, [8, 100, 1000], [8], 4),
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
    "saving": Case("saving, in MB", saving, [500], [20]),
    "loading": Case("loading, in MB", loading, [500], [20]),
}
TITLES = {name: case.title for name, case in CASES.items()}
# In how many seconds the last process begins that measures a way.
LATEST = 60


def measure(
    name: str, size: int, most: int, way: str | None = None, is_reversed: bool = False
) -> dict[str, Timing]:
    """One case, in this process: all ways, or one of them and the floor."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name}, {size:,}: {text}", end="", file=sys.stderr, flush=True)

    ways = CASES[name].make(size)
    if way is not None:
        floor = next(iter(ways))
        ways = {floor: ways[floor], way: ways[way]}
    timings = interleave(ways, most, show, is_reversed=is_reversed)
    show("")
    return timings


def measure_together(name: str, size: int, most: int) -> dict[str, Timing]:
    """One case, with all ways in one new process."""
    return _run_apart(measure, name, size, most)


def measure_apart(name: str, size: int, most: int) -> dict[str, Timing]:
    """One case, each way with the floor in new processes of its own.

    Where many programs share one, it is chance how their memory lies, for as long as it lives.
    """
    total: dict[str, Timing] = collections.defaultdict(Timing)
    for way in _run_apart(list_ways, name, size)[1:]:
        end = time.monotonic() + LATEST
        for i in range(CASES[name].processes):
            timings = _run_apart(measure, name, size, most, way, i % 2 == 1)
            for each, timing in timings.items():
                total[each] += timing
            if time.monotonic() > end:
                break
    return total


def list_ways(name: str, size: int) -> list[str]:
    return list(CASES[name].make(size))


def _run_apart(func: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(func, *args).result()


def summarize(name: str, size: int, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    return [
        {"case": name, "size": size, "way": way, **timing.summarize()}
        for way, timing in timings.items()
    ]
