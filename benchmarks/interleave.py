"""Timing of several ways to do the same, interleaved in one process."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


# How long new rounds begin, and how many there are at least.
SECONDS, FEWEST = 60, 5


@dataclasses.dataclass(frozen=True)
class Way:
    """A way that is not only called.

    With `prepare`, it is passed what that returns, anew at each call and outside of the
    measurement. If `is_timer`, it returns the seconds that it has measured itself.
    """

    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    is_timer: bool = False

    def measure(self, times: int, is_warm: bool = False) -> float:
        """Seconds for a call, of several, with warm caches if `is_warm`, as in a loop."""
        if self.is_timer:
            return self.call()
        prepared = [(self.prepare(),) if self.prepare else () for _ in range(times + 1)]
        gc.collect()
        gc.disable()  # as `timeit` does
        try:
            if is_warm:
                jax.block_until_ready(self.call(*prepared[0]))
            start = time.perf_counter()
            for args in prepared[1:]:
                out = self.call(*args)
            jax.block_until_ready(out)
            return (time.perf_counter() - start) / times
        finally:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the first call, which may compile, and of the median round, and the ratio
    to the first way with its quartiles, of so many rounds."""

    first: float
    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def interleave(
    ways: dict[str, Any], rounds: int, show: Callable[[str], None] = print
) -> dict[str, Timing]:
    """Times every way in every round, so that the noise of the machine hits all alike.

    A way leaves caches behind for the next one, so their order changes too, and its garbage is
    collected before the next one is timed. There are fewer rounds if they take long.
    """
    ways = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    firsts = {}
    for name, way in ways.items():
        show(f"first call: {name}")
        firsts[name] = way.measure(1)
    times, is_warm = _warm_up(list(ways.values()))
    gc.freeze()  # or each collection would look through all that JAX holds
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order, end = list(ways), time.monotonic() + SECONDS
    for number in range(rounds):
        if number >= FEWEST and time.monotonic() > end:
            break
        show(f"round {number + 1} of {rounds}")
        random.Random(number).shuffle(order)
        for name in order:
            seconds[name].append(ways[name].measure(times, is_warm))
    gc.unfreeze()
    floor = next(iter(seconds.values()))
    return {
        name: _summarize(firsts[name], measured, floor) for name, measured in seconds.items()
    }


def _warm_up(ways: list[Way]) -> tuple[int, bool]:
    """How often to call in a round, and whether with warm caches."""
    if any(way.is_timer for way in ways):
        return 1, False
    shortest = min(way.measure(1) for way in ways)
    if shortest >= 0.1:
        return 1, False
    # For 10 ms and more, and several, which overlap where nothing waits for a result.
    times = max(5, min(200, int(1e-2 / shortest)))
    for way in ways:
        way.measure(times)
    return times, True


def _summarize(first: float, measured: list[float], floor: list[float]) -> Timing:
    ratios = [each / base for each, base in zip(measured, floor, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Timing(first, statistics.median(measured), ratio, low, high, len(measured))
