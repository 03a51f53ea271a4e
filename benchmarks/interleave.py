"""Timing of several ways to do the same, interleaved in one process."""

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of the first call, which may compile, and of the median round, and the ratio
    to the first way with its quartiles."""

    first: float
    seconds: float
    ratio: float
    low: float
    high: float


def interleave(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times every way in every round, so that the noise of the machine hits all alike.

    A way leaves caches and garbage behind for the next one, so their order changes too.
    """
    firsts = {}
    for name, way in ways.items():
        start = time.perf_counter()
        jax.block_until_ready(way())
        firsts[name] = time.perf_counter() - start
        jax.block_until_ready(way())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for seed in range(rounds):
        random.Random(seed).shuffle(order)
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(ways[name]())
            seconds[name].append(time.perf_counter() - start)
    floor = next(iter(seconds.values()))
    timings = {}
    for name, times in seconds.items():
        ratios = [time / base for time, base in zip(times, floor, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        timings[name] = Timing(firsts[name], statistics.median(times), ratio, low, high)
    return timings
