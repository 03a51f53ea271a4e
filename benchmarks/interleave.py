"""Timing of several ways to do the same, interleaved in one process."""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


# Visits of a way begin for as long as the first calls took, within these limits in seconds.
BRIEFEST, LENGTHIEST = 3, 10
# How many measurements there are in a visit at most, and of each way at least.
FEWEST = 5
# For how many seconds a way is called before it is measured, and for how many it is then.
WARM_UP = 0.04


@dataclasses.dataclass(frozen=True)
class Way:
    """A way that is not only called.

    With `prepare`, it is passed what that returns, anew at each call and outside of the
    measurement. If `is_timer`, it returns the seconds that it has measured itself.
    """

    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    is_timer: bool = False

    def measure(self, times: int, warm_up: float = 0.0) -> float:
        """Seconds for a call, called `times` times, and again until `warm_up` seconds are over.

        It is called for as long before, without being measured.
        """
        if self.is_timer:
            return self.call()
        gc.collect()
        gc.disable()  # as `timeit` does
        try:
            if warm_up:
                self._repeat(times, warm_up)
            return self._repeat(times, warm_up)
        finally:
            gc.enable()

    def _repeat(self, times: int, seconds: float) -> float:
        spent, count = 0.0, 0
        while count == 0 or spent < seconds:
            prepared = [(self.prepare(),) if self.prepare else () for _ in range(times)]
            start = time.perf_counter()
            for args in prepared:
                out = self.call(*args)
            jax.block_until_ready(out)
            spent += time.perf_counter() - start
            count += times
        return spent / count


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of first calls, which may compile, of second ones, and of the others, and ratios
    of these to the first way."""

    first_calls: list[float] = dataclasses.field(default_factory=list)
    second_calls: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(
            self.first_calls + other.first_calls,
            self.second_calls + other.second_calls,
            self.seconds + other.seconds,
            self.ratios + other.ratios,
        )

    def summarize(self) -> dict[str, float]:
        """Medians, and the quartiles of the ratios.

        Of first and second calls the longest, because ways may share a program, which the first
        one of them compiles.
        """
        low, ratio, high = statistics.quantiles(self.ratios, n=4)
        return {
            "first": max(self.first_calls),
            "second": max(self.second_calls),
            "seconds": statistics.median(self.seconds),
            "ratio": ratio,
            "low": low,
            "high": high,
            "count": len(self.ratios),
        }


def interleave(
    ways: dict[str, Any],
    most: int,
    show: Callable[[str], None] = print,
    *,
    is_reversed: bool = False,
) -> dict[str, Timing]:
    """Times several ways, each between two measurements of the first one, its floor.

    The noise of the machine, which comes and goes in seconds, then hits both alike. What a way
    leaves behind, in caches and in the heap, slows down the next one for many calls; so a way
    is visited: called first, and then measured in turns with the floor, when both are equally
    warm. Each way gets as much time as the others, and is measured `most` times at most, so
    that of fast ones there are many ratios.

    Programs and their results lie in memory in the order of the first calls, and the earlier
    ones are a few percent faster for it. `is_reversed` makes the last way the first.
    """
    ways = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    timings = {name: Timing() for name in ways}
    start = time.monotonic()
    for name in reversed(ways) if is_reversed else ways:
        show(f"first call: {name}")
        timings[name].first_calls.append(ways[name].measure(1))
        timings[name].second_calls.append(ways[name].measure(1))
    now = time.monotonic()
    end = now + min(max(BRIEFEST, now - start), LENGTHIEST)
    times, warm_up = _choose_times(list(ways.values()))
    gc.freeze()  # or each collection would look through all that JAX holds
    floor, *others = ways
    spent = dict.fromkeys(others, 0.0)
    while True:
        now = time.monotonic()
        wanted = most if now < end else min(most, FEWEST)
        left = [name for name in others if len(timings[name].ratios) < wanted]
        if not left:
            break
        name = min(left, key=spent.__getitem__)
        show(f"{max(0, end - now):.0f} s left, {name}")
        ways[name].measure(times, warm_up)
        before = ways[floor].measure(times, warm_up)
        for _ in range(min(FEWEST, wanted - len(timings[name].ratios))):
            seconds = ways[name].measure(times, warm_up)
            after = ways[floor].measure(times, warm_up)
            timings[name].seconds.append(seconds)
            timings[name].ratios.append(2 * seconds / (before + after))
            timings[floor].seconds.append(after)
            timings[floor].ratios.append(after / before)
            before = after
        spent[name] += time.monotonic() - now
    gc.unfreeze()
    return timings


def _choose_times(ways: list[Way]) -> tuple[int, float]:
    """How often to call between two looks at the clock, and how long to warm up."""
    if any(way.is_timer for way in ways):
        return 1, 0.0
    shortest = min(way.measure(1) for way in ways)
    if shortest >= 0.1:
        return 1, 0.0
    # For 10 ms and more, and several, which overlap where nothing waits for a result.
    return max(5, min(200, int(1e-2 / shortest))), WARM_UP
