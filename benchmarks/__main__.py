"""Compares this library with the same work by hand, and with its peers.

Each case runs in a process of its own, because compiled programs fill the memory map of one.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from .derivatives import first_derivative, jacobian_diagonal, second_derivative
from .gradients import compiled, compiled_wide, eager, tracing
from .imports import imports
from .interleave import interleave
from .report import describe_machine, format_tables, plot, print_timings, save
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
ROUNDS, QUICK_ROUNDS = 301, 2


def run(name: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """One case, in this process."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{name}, {size:,}: {text}", end="", file=sys.stderr, flush=True)

    timings = interleave(CASES[name].make(size), rounds, show)
    show("")
    print_timings(name, size, timings)
    return [
        {"case": name, "size": size, "way": way, **dataclasses.asdict(timing)}
        for way, timing in timings.items()
    ]


def run_apart(name: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """One case, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        options = ["--size", str(size), "--rounds", str(rounds), "--json", str(path)]
        subprocess.run([sys.executable, "-m", "benchmarks", name, *options], check=True)
        return json.loads(path.read_text())


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="small sizes, in two minutes")
    parser.add_argument("--json", type=Path, default="benchmarks.json", help="the results")
    parser.add_argument("--plot", type=Path, default="benchmarks.png", help="the plot")
    parser.add_argument("--size", type=int, help="only this size, in this process")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how many at most")
    args = parser.parse_args()
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"There is no case {unknown[0]!r}. The cases are {', '.join(CASES)}.")
    if args.size:
        results = [row for name in args.cases for row in run(name, args.size, args.rounds)]
        args.json.write_text(json.dumps(results))
        return
    machine = describe_machine()
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    print("Ratios to the first way of each case: median [quartiles].", flush=True)
    results: list[dict[str, Any]] = []
    runs = [
        (name, size)
        for name in args.cases
        for size in (CASES[name].quick if args.quick else CASES[name].sizes)
    ]
    for name, size in tqdm.tqdm(runs, desc="cases"):
        rounds = QUICK_ROUNDS if args.quick else args.rounds
        results += run_apart(name, size, rounds)
        save(args.json, machine, results)  # so that a long run can be broken off
    plot(args.plot, machine, results, TITLES)
    print(f"\n{format_tables(results, TITLES)}")
    print(f"\nresults: {args.json}, plot: {args.plot}")
    if machine["not installed"]:
        print(f"not installed, and so left out: {', '.join(machine['not installed'])}")


if __name__ == "__main__":
    main()
