"""Timing of several ways to do the same, interleaved in one process."""

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


# New rounds begin for as long as the first calls took, within these limits in seconds, and
# there are so many at least.
BRIEFEST, LENGTHIEST, FEWEST = 20, 240, 5
# A short call is repeated before it is measured, and then again: for so many seconds and so
# often at least, but for no more than that many seconds.
SHORTEST, FEWEST_CALLS, LONGEST = 0.04, 40, 1.0


@dataclasses.dataclass(frozen=True)
class Way:
    """A way that is not only called.

    With `prepare`, it is passed what that returns, anew at each call and outside of the
    measurement. If `is_timer`, it returns the seconds that it has measured itself.
    """

    call: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    is_timer: bool = False

    def measure(self, times: int, warm_up: bool = False) -> float:
        """Seconds for a call, called `times` times, or with a warm-up, for longer."""
        if self.is_timer:
            return self.call()
        gc.collect()
        gc.disable()  # as `timeit` does
        try:
            if warm_up:
                self._repeat(times, SHORTEST, FEWEST_CALLS)
                return self._repeat(times, SHORTEST, FEWEST_CALLS)
            return self._repeat(times)
        finally:
            gc.enable()

    def _repeat(self, times: int, seconds: float = 0.0, calls: int = 1) -> float:
        spent, count = 0.0, 0
        while (spent < seconds or count < calls) and spent < LONGEST:
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
    """Seconds of first calls, which may compile, seconds of the others, and ratios of these
    to the first way."""

    firsts: list[float]
    seconds: list[float] = dataclasses.field(default_factory=list)
    ratios: list[float] = dataclasses.field(default_factory=list)

    def __add__(self, other: "Timing") -> "Timing":
        return Timing(
            self.firsts + other.firsts,
            self.seconds + other.seconds,
            self.ratios + other.ratios,
        )

    def summarize(self) -> dict[str, float]:
        """Medians, and the quartiles of the ratios."""
        low, ratio, high = statistics.quantiles(self.ratios, n=4)
        return {
            "first": statistics.median(self.firsts),
            "seconds": statistics.median(self.seconds),
            "ratio": ratio,
            "low": low,
            "high": high,
            "rounds": len(self.ratios),
        }


def interleave(
    ways: dict[str, Any], rounds: int, show: Callable[[str], None] = print
) -> dict[str, Timing]:
    """Times several ways, each between two measurements of the first one, its floor.

    The noise of the machine, which comes and goes in seconds, then hits both alike. A way
    leaves caches and a heap behind for the next one, so that one is warmed up, their order
    changes, and garbage is collected in between. There are fewer rounds if they take long.
    """
    ways = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    timings = {}
    start = time.monotonic()
    for name, way in ways.items():
        show(f"first call: {name}")
        timings[name] = Timing([way.measure(1)])
    end = time.monotonic() + min(max(BRIEFEST, time.monotonic() - start), LENGTHIEST)
    times, warm_up = _choose_times(list(ways.values()))
    gc.freeze()  # or each collection would look through all that JAX holds
    floor, *order = ways
    for number in range(rounds):
        if number >= FEWEST and time.monotonic() > end:
            break
        show(f"round {number + 1} of {rounds}")
        random.Random(number).shuffle(order)
        after = ways[floor].measure(times, warm_up)
        for name in order:
            seconds = ways[name].measure(times, warm_up)
            before, after = after, ways[floor].measure(times, warm_up)
            timings[name].seconds.append(seconds)
            timings[name].ratios.append(2 * seconds / (before + after))
            timings[floor].seconds.append(after)
            timings[floor].ratios.append(after / before)
    gc.unfreeze()
    return timings


def _choose_times(ways: list[Way]) -> tuple[int, bool]:
    """How often to call between two looks at the clock, and whether to warm up."""
    if any(way.is_timer for way in ways):
        return 1, False
    shortest = min(way.measure(1) for way in ways)
    if shortest >= 0.1:
        return 1, False
    # For 10 ms and more, and several, which overlap where nothing waits for a result.
    return max(5, min(200, int(1e-2 / shortest))), True
