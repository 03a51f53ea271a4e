"""Prints how long this library takes, against the same work by hand.

Each case runs in a process of its own, because compiled programs fill the memory map of one.
"""

import argparse
import platform
import subprocess
import sys
from importlib.metadata import version

import jax
import tqdm

from .cases import choosing, eager, states_compiled, states_eager, states_tracing, tracing
from .derivatives import first_derivative, jacobian_diagonal, second_derivative
from .interleave import interleave
from .training import training, training_wide


# The case, the sizes (leaves of a tree, or points), and the rounds of each: 7 at least.
CASES = {
    "eager": (eager, [8, 100], 31),
    "tracing": (tracing, [8, 100, 1000], 11),
    "choosing": (choosing, [10_000], 31),
    "states_eager": (states_eager, [8, 100], 31),
    "states_tracing": (states_tracing, [8, 100, 1000], 11),
    "states_compiled": (states_compiled, [100, 1000], 31),
    "first_derivative": (first_derivative, [4096], 201),
    "second_derivative": (second_derivative, [4096], 31),
    "jacobian_diagonal": (jacobian_diagonal, [1024], 15),
    "training": (training, [8, 100, 1000], 31),
    "training_wide": (training_wide, [8], 15),
}


def run(name: str, size: int) -> None:
    case, _, rounds = CASES[name]
    print(f"\n{name}, {size:,}")
    for way, timing in interleave(case(size), rounds).items():
        print(
            f"  {way:16}{timing.seconds * 1e3:10.2f} ms"
            f"   {timing.ratio:5.2f} [{timing.low:.2f} {timing.high:.2f}]"
            f"   first call {timing.first:.2f} s"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--size", type=int, help="only this size, in this process")
    args = parser.parse_args()
    if args.size:
        for name in args.cases:
            run(name, args.size)
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "equinox", "brainstate"))
    print(f"{jax.devices()[0]}, Python {platform.python_version()}, {versions}")
    print("Ratios to the first way of each case: median [quartiles].", flush=True)
    runs = [(name, size) for name in args.cases for size in CASES[name][1]]
    for name, size in tqdm.tqdm(runs, desc="cases", leave=False):
        command = [sys.executable, "-m", "benchmarks", name, "--size", str(size)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
