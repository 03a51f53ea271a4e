"""Timing of several ways to do the same, interleaved in one process."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


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
    to the first way with its quartiles."""

    first: float
    seconds: float
    ratio: float
    low: float
    high: float


def interleave(
    ways: dict[str, Any], rounds: int, show: Callable[[str], None] = print
) -> dict[str, Timing]:
    """Times every way in every round, so that the noise of the machine hits all alike.

    A way leaves caches behind for the next one, so their order changes too, and its garbage is
    collected before the next one is timed.
    """
    ways = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    firsts = {}
    for name, way in ways.items():
        show(f"first call: {name}")
        firsts[name] = way.measure(1)
    times, is_warm = 1, False
    if not any(way.is_timer for way in ways.values()):
        for way in ways.values():
            way.measure(1)
        # Short calls are repeated, for 10 ms and more.
        shortest = min(way.measure(1) for way in ways.values())
        times, is_warm = max(1, min(200, int(1e-2 / shortest))), shortest < 0.1
        for way in ways.values():
            way.measure(times)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for number in range(rounds):
        show(f"round {number + 1} of {rounds}")
        random.Random(number).shuffle(order)
        for name in order:
            seconds[name].append(ways[name].measure(times, is_warm))
    floor = next(iter(seconds.values()))
    timings = {}
    for name, measured in seconds.items():
        ratios = [each / base for each, base in zip(measured, floor, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        timings[name] = Timing(firsts[name], statistics.median(measured), ratio, low, high)
    return timings
