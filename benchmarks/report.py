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
    print(f"\n{name}, {size:,}")
    for row in rows:
        print(
            f"  {row['way']:24}{row['seconds'] * 1e3:10.3f} ms"
            f"   {row['ratio']:6.2f} [{row['low']:.2f} {row['high']:.2f}]"
            f"   first call {row['first']:.2f} s",
            flush=True,
        )


def save(path: Path, machine: dict[str, Any], results: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


# The cases that are plotted, and those of which the first call, which compiles, is shown.
PLOTTED = ("compiled", "eager", "training", "tracing")
COMPILING = ("compiled", "training")


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
        if case in COMPILING:
            firsts = [_format_time(each["first"]) for each in chosen]
            tables.append(_format_table(f"{titles[case]}: first call", chosen, firsts))
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
    """The ratios of all ways, in logarithmic bars."""
    drawn = [name for name in PLOTTED if any(each["case"] == name for each in results)]
    if not drawn:
        return
    figure, axes = plt.subplots(
        len(drawn), 1, figsize=(9, 2.6 * len(drawn)), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[:, 0], drawn, strict=True):
        _draw_case(axis, [each for each in results if each["case"] == name], titles[name])
    versions = machine["versions"]
    figure.suptitle(
        f"Time relative to JAX by hand: {machine['device']}, {machine['cores']} cores, Python "
        f"{machine['python']},\nJAX {versions['jax']}, Equinox {versions['equinox']}, "
        f"{machine['date']}",
        fontsize=10,
    )
    plt.savefig(path, dpi=120)


def _draw_case(axis: Any, results: list[dict[str, Any]], title: str) -> None:
    ways = list(dict.fromkeys(each["way"] for each in results))
    sizes = sorted({each["size"] for each in results})
    for i, size in enumerate(sizes):
        chosen = {each["way"]: each for each in results if each["size"] == size}
        places = [k + (i - len(sizes) / 2 + 0.5) * 0.8 / len(sizes) for k in range(len(ways))]
        pairs = [(x, chosen[way]) for x, way in zip(places, ways, strict=True) if way in chosen]
        ratios = [each["ratio"] for _, each in pairs]
        below = [each["ratio"] - each["low"] for _, each in pairs]
        above = [each["high"] - each["ratio"] for _, each in pairs]
        axis.bar(
            [x for x, _ in pairs],
            ratios,
            0.75 / len(sizes),
            yerr=[below, above],
            error_kw={"lw": 0.7},
            label=f"{size:,}",
        )
    axis.axhline(1.0, color="black", lw=0.8)
    axis.set_yscale("log")
    axis.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"])
    axis.minorticks_off()
    axis.set_xticks(range(len(ways)), [way.replace(", ", ",\n") for way in ways], fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, ncols=len(sizes), loc="upper left")
