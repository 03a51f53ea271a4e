"""Results as tables, as a plot, and as JSON."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib

from .peers import find_missing, list_versions


matplotlib.use("agg")
import matplotlib.pyplot as plt


def describe_machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": list_versions(),
        "not installed": find_missing(),
    }


def print_rows(name: str, size: int, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}, {size:,}{'' if rows else ': not installed'}")
    for row in rows:
        print(
            f"  {row['way']:24}{row['seconds'] * 1e3:10.3f} ms"
            f"   {row['ratio']:6.2f} [{row['low']:.2f} {row['high']:.2f}]"
            f"   first calls {row['first']:.3f}, {row['second']:.3f} s",
            flush=True,
        )


def save(path: Path, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


# The cases to plot, and those whose first calls, which compile, are shown.
PLOTTED = ("compiled", "training", "eager", "tracing")
FIRST_CALLS = {
    "compiled": ["first"],
    "training": ["first"],
    "training_vit": ["first"],
    "eager": ["first", "second"],
}


def format_tables(results: list[dict[str, Any]], titles: dict[str, str]) -> str:
    """Markdown: a table for each case, with a row for each way and a column for each size."""
    tables = []
    for case in dict.fromkeys(each["case"] for each in results):
        chosen = [each for each in results if each["case"] == case]
        floor = chosen[0]["way"]
        times = [
            _format_time(each["seconds"]) if each["way"] == floor else _format_ratio(each)
            for each in chosen
        ]
        tables.append(_format_table(titles[case], chosen, times))
        for which in FIRST_CALLS.get(case, []):
            times = [_format_time(each[which]) for each in chosen]
            tables.append(_format_table(f"{titles[case]}: {which} call", chosen, times))
    return "\n\n".join(tables)


def _format_table(title: str, results: list[dict[str, Any]], texts: list[str]) -> str:
    cells = {
        (each["way"], each["size"]): text for each, text in zip(results, texts, strict=True)
    }
    ways, sizes = [list(dict.fromkeys(each)) for each in zip(*cells, strict=True)]
    rows = [[title, *[f"{size:,}" for size in sizes]], ["---"] * (1 + len(sizes))]
    rows += [[way, *[cells.get((way, size), "") for size in sizes]] for way in ways]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _format_ratio(result: dict[str, Any]) -> str:
    return f"{result['ratio']:.2f} [{result['low']:.2f} {result['high']:.2f}]"


def _format_time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def plot(
    path: Path, machine: dict[str, Any], results: list[dict[str, Any]], titles: dict[str, str]
) -> None:
    """The ratios of all ways as points with their quartiles, on a logarithmic axis."""
    drawn = [name for name in PLOTTED if any(each["case"] == name for each in results)]
    if not drawn:
        return
    rows = (len(drawn) + 1) // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, 3.4 * rows), layout="constrained", squeeze=False, sharex=True
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    sizes = sorted({each["size"] for each in results if each["case"] in drawn})
    for axis, name in zip(axes.flat, drawn, strict=False):
        _draw_case(axis, [each for each in results if each["case"] == name], sizes)
        axis.set_title(titles[name])
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=len)
    figure.legend(handles, labels, title="leaves", loc="outside right upper")
    for axis in axes[-1]:
        axis.set_xlabel("time relative to JAX by hand")
    versions = machine["versions"]
    figure.suptitle(
        f"{machine['device']}, {machine['cores']} cores, Python {machine['python']}, "
        f"JAX {versions['jax']}, Equinox {versions['equinox']}, {machine['date']}",
        fontsize=10,
    )
    plt.savefig(path, dpi=120)


def _draw_case(axis: Any, results: list[dict[str, Any]], sizes: list[int]) -> None:
    ways = list(dict.fromkeys(each["way"] for each in results))[1:]
    for i, size in enumerate(sizes):
        chosen = [each for each in results if each["size"] == size and each["way"] in ways]
        ratios = [each["ratio"] for each in chosen]
        axis.errorbar(
            ratios,
            [ways.index(each["way"]) + (i + 1) / (len(sizes) + 1) - 0.5 for each in chosen],
            xerr=[
                [each["ratio"] - each["low"] for each in chosen],
                [each["high"] - each["ratio"] for each in chosen],
            ],
            fmt="o",
            markersize=4,
            color=f"C{i}",
            label=f"{size:,}",
        )
    axis.axvline(1.0, color="black", lw=0.8)
    axis.set_xscale("log")
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.1", "0.2", "0.5", *"125", "10", "20"])
    axis.minorticks_off()
    axis.set_yticks(range(len(ways)), ways)
    axis.set_ylim(len(ways) - 0.5, -0.5)
    axis.grid(axis="x", lw=0.4)
