"""Compares this library with the same work by hand, and with its peers.

Each case runs in processes of its own, because compiled programs fill the memory map of one.
"""

import argparse
from pathlib import Path
from typing import Any

import tqdm

from .cases import CASES, measure_apart, measure_together, summarize, TITLES
from .report import describe_machine, format_tables, plot, print_rows, save


MOST, QUICK_MOST = 1000, 2


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="small sizes, in two minutes")
    parser.add_argument("--json", type=Path, default="benchmarks.json", help="the results")
    parser.add_argument("--plot", type=Path, default="benchmarks.png", help="the plot")
    parser.add_argument("--size", type=int, action="append", help="only this size")
    parser.add_argument("--most", type=int, default=MOST, help="how many measurements of a way")
    args = parser.parse_args()
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"There is no case {unknown[0]!r}. The cases are {', '.join(CASES)}.")
    machine = describe_machine()
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    print("Ratios to the first way of each case: median [quartiles].", flush=True)
    results: list[dict[str, Any]] = []
    runs = [
        (name, size)
        for name in args.cases
        for size in args.size or (CASES[name].quick if args.quick else CASES[name].sizes)
    ]
    for name, size in tqdm.tqdm(runs, desc="cases"):
        if args.quick:
            timings = measure_together(name, size, QUICK_MOST)
        else:
            timings = measure_apart(name, size, args.most)
        rows = summarize(name, size, timings)
        print_rows(name, size, rows)
        results += rows
        save(args.json, machine, results)  # so that a long run can be broken off
    plot(args.plot, machine, results, TITLES)
    print(f"\n{format_tables(results, TITLES)}")
    print(f"\nresults: {args.json}, plot: {args.plot}")
    if machine["not installed"]:
        print(f"not installed, and so left out: {', '.join(machine['not installed'])}")


if __name__ == "__main__":
    main()
