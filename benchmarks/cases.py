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
from .peers import is_of_peer, leave_out_peers
from .states import choosing, states_compiled, states_eager, states_tracing
from .training import training, training_vit, training_wide
from .units import unit_aware, unit_aware_eager


class Case(NamedTuple):
    """What is measured, and in which sizes: numbers of leaves, or of points.

    If `apart`, each way of this library has processes of its own, of which every other one
    makes the first calls in reverse order. Elsewhere, all ways share one.
    """

    title: str
    make: Any
    sizes: list[int]
    quick: list[int] = []
    apart: bool = False


CASES = {
    "compiled": Case("compiled gradient", compiled, [8, 100, 1000], [8], True),
    "compiled_wide": Case("compiled gradient, 1024 wide", compiled_wide, [8]),
    "eager": Case("eager gradient", eager, [8, 100], [8], True),
    "training": Case("training step with adam", training, [8, 100, 1000], [8], True),
    "training_wide": Case("training step, 1024 wide", training_wide, [8]),
    "training_vit": Case("training step, vision transformer", training_vit, [4]),
    "tracing": Case("tracing a gradient", tracing, [100], apart=True),
    "unit_aware": Case("compiled gradient with units", unit_aware, [8, 100], [8], True),
    "unit_aware_eager": Case("eager gradient with units", unit_aware_eager, [8]),
    "first_derivative": Case("derivative at points", first_derivative, [4096], [512]),
    "second_derivative": Case("second derivative at points", second_derivative, [4096]),
    "jacobian_diagonal": Case("diagonal of the Jacobian", jacobian_diagonal, [1024]),
    "states_eager": Case("eager gradient over states", states_eager, [8, 100], apart=True),
    "states_tracing": Case("tracing over states", states_tracing, [100], apart=True),
    "states_compiled": Case("compiled gradient over states", states_compiled, [100]),
    "choosing": Case("choosing half of the leaves", choosing, [10_000]),
    "import": Case("import, beyond JAX, Equinox and optax", imports, [1]),
    "saving": Case("saving, in MB", saving, [500], [20]),
    "loading": Case("loading, in MB", loading, [500], [20]),
}
TITLES = {name: case.title for name, case in CASES.items()}
PROCESSES = 2
# In how many seconds the last process begins that measures a way.
LATEST = 20


def measure(
    name: str, size: int, most: int, way: str | None = None, is_reversed: bool = False
) -> dict[str, Timing]:
    """One case, in this process: all ways, or one of this library and the floor."""
    if way is not None:
        leave_out_peers()
    ways = CASES[name].make(size)
    if way is not None:
        floor = next(iter(ways))
        ways = {floor: ways[floor], way: ways[way]}
    return _interleave(name, size, ways, most, is_reversed)


def measure_peers(name: str, size: int, most: int) -> tuple[dict[str, Timing], list[str]]:
    """The floor and the peers, in this process, and the names of all ways."""
    ways = CASES[name].make(size)
    names = list(ways)
    of_peers = {way: ways[way] for way in names if way == names[0] or is_of_peer(way)}
    return _interleave(name, size, of_peers, most), names


def _interleave(
    name: str, size: int, ways: dict[str, Any], most: int, is_reversed: bool = False
) -> dict[str, Timing]:
    if not ways:  # of a peer that is not installed
        return {}

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name}, {size:,}: {text}", end="", file=sys.stderr, flush=True)

    timings = interleave(ways, most, show, is_reversed=is_reversed)
    show("")
    return timings


def measure_together(name: str, size: int, most: int) -> dict[str, Timing]:
    """One case, with all ways in one new process."""
    return _run_apart(measure, name, size, most)


def measure_apart(name: str, size: int, most: int) -> dict[str, Timing]:
    """One case, each way of this library with the floor in new processes of its own.

    Where many programs share one, it is chance how their memory lies, for as long as it lives.
    """
    total: dict[str, Timing] = collections.defaultdict(Timing)
    ways: list[str | None] = [None]
    names: list[str] = []
    if CASES[name].apart:
        timings, names = _run_apart(measure_peers, name, size, most)
        total |= timings
        ways = [way for way in names[1:] if way not in timings]
    for way in ways:
        end = time.monotonic() + LATEST
        for i in range(PROCESSES):
            timings = _run_apart(measure, name, size, most, way, i % 2 == 1)
            for each, timing in timings.items():
                total[each] += timing
            if time.monotonic() > end:
                break
    return {way: total[way] for way in names} if names else dict(total)


def _run_apart(func: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(func, *args).result()


def summarize(name: str, size: int, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    return [
        {"case": name, "size": size, "way": way, **timing.summarize()}
        for way, timing in timings.items()
    ]
