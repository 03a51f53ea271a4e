"""Prints how long gradients by selector take, against the same work by hand."""

import argparse
import platform
from importlib.metadata import version

import jax
import tqdm

from .cases import choosing, eager, states_compiled, states_eager, states_tracing, tracing
from .interleave import interleave


# The case, the sizes of the tree, and the rounds of each: 7 at least.
CASES = [
    (eager, [8, 100], 31),
    (tracing, [8, 100, 1000], 11),
    (choosing, [10_000], 31),
    (states_eager, [8, 100], 31),
    (states_tracing, [8, 100, 1000], 11),
    (states_compiled, [100, 1000], 31),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "equinox", "brainstate"))
    print(f"{jax.devices()[0]}, Python {platform.python_version()}, {versions}")
    print("Ratios to the first way of each case: median [quartiles].")
    runs = [(case, size, rounds) for case, sizes, rounds in CASES for size in sizes]
    for case, size, rounds in tqdm.tqdm(runs, desc="cases", leave=False):
        timings = interleave(case(size), rounds)
        tqdm.tqdm.write(f"\n{case.__name__}, {size:,} leaves")
        for name, timing in timings.items():
            tqdm.tqdm.write(
                f"  {name:16}{timing.seconds * 1e3:10.2f} ms"
                f"   {timing.ratio:5.2f} [{timing.low:.2f} {timing.high:.2f}]"
            )


if __name__ == "__main__":
    main()
