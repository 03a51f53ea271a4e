"""Puts faults into the rooms, one at a time, and says which of them no test notices.

    python .ci/mutate.py tree select --faults 15

The tests of a room are those in `tests/ROOM`, and those of all rooms together, which are in
`tests` itself. They run once, to find the lines that each test runs. Then faults are drawn by
a seed and put, one at a time, into a copy of the project, in which the tests that run the line
are run, the quickest first, up to the first that fails. A fault that survives is printed with
its line. It is one of these: the tests do not look at what the line does, or the fault changes
nothing that can be seen from outside. The coverage is that by `tests/ROOM`.

The time of a run is limited by that of its processor, so that other work does no harm. Runs
are forked from a process that has imported what the tests need, but not the project.
"""

import argparse
import ast
import copy
import json
import multiprocessing
import os
import queue
import random
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import as_completed, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import coverage
import pytest


ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.name[1:] for path in (ROOT / "vgrad_eqx").glob("_[a-z]*/"))
# Of a run with a fault: what the tests take without it, so many times, and a start.
SLOWER, START = 5, 60
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["brainstate", "equinox", "flax", "hypothesis", "optax", "pytest"])

OPERATORS = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Fault:
    file: Path
    line: int
    statement: int  # the line where its statement begins
    before: str
    after: str
    source: str  # of the whole file, with the fault


def change(node, **fields):
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def swap_operator(node):
    if isinstance(node, ast.Compare):
        ops = [OPERATORS[type(op)]() for op in node.ops if type(op) in OPERATORS]
        return [change(node, ops=ops)] if len(ops) == 1 == len(node.ops) else []
    # `X | None` and the like are types.
    is_type = isinstance(getattr(node, "op", None), ast.BitOr) and any(
        isinstance(part, ast.Constant) or ast.unparse(part) in ("type", "Any", "Callable")
        for part in ast.walk(node)
    )
    other = None if is_type else OPERATORS.get(type(node.op))
    return [change(node, op=other())] if other else []


def negate_test(node):
    return [change(node, test=ast.UnaryOp(ast.Not(), node.test))]


def change_constant(node):
    if isinstance(node.value, bool):
        return [change(node, value=not node.value)]
    return [change(node, value=node.value + 1)] if isinstance(node.value, int) else []


def drop_keywords(node):
    keywords = node.keywords
    # That both have the same length is an invariant, not a behavior.
    if ast.unparse(node.func) in ("zip", "map"):
        return []
    return [
        change(node, keywords=keywords[:i] + keywords[i + 1 :]) for i in range(len(keywords))
    ]


def drop_last(node):
    is_read = isinstance(node.ctx, ast.Load) and len(node.elts) > 1
    return [change(node, elts=node.elts[:-1])] if is_read else []


def return_none(node):
    is_none = node.value is None or ast.unparse(node.value) == "None"
    return [] if is_none else [change(node, value=ast.Constant(None))]


# What may be wrong with a node of each type: copies of it, each with one fault.
MUTATIONS = {
    ast.Compare: swap_operator,
    ast.BoolOp: swap_operator,
    ast.BinOp: swap_operator,
    ast.UnaryOp: lambda node: [node.operand] if isinstance(node.op, ast.Not) else [],
    ast.If: negate_test,
    ast.IfExp: negate_test,
    ast.While: negate_test,
    ast.Constant: change_constant,
    ast.Return: return_none,
    ast.Expr: lambda node: [ast.Pass()] if isinstance(node.value, ast.Call) else [],
    ast.Call: drop_keywords,
    ast.Tuple: drop_last,
}


# What does not change behavior, or is text for people.
LEFT_OUT = (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)


def is_left_out(node):
    is_overload = "overload" in map(ast.unparse, getattr(node, "decorator_list", []))
    is_invariant = getattr(node, "arg", None) == "strict"
    return isinstance(node, LEFT_OUT) or is_overload or is_invariant


def list_nodes(node, statement=0, parent=None, field=None, index=None):
    """The nodes that may have a fault, each with its statement and its place in its parent."""
    if is_left_out(node):
        return
    statement = node.lineno if isinstance(node, ast.stmt) else statement
    yield node, statement, parent, field, index
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.AST):
                index = i if isinstance(value, list) else None
                yield from list_nodes(child, statement, node, name, index)


def list_faults(file):
    source = file.read_text()
    tree = ast.parse(source)
    for node, statement, parent, field, index in list(list_nodes(tree)):
        if parent is None or not hasattr(node, "lineno"):
            continue
        for mutated in MUTATIONS.get(type(node), lambda _: [])(node):
            before = ast.unparse(node).splitlines()[0]
            ast.copy_location(mutated, node)
            place = parent if index is None else getattr(parent, field)
            put = setattr if index is None else list.__setitem__
            put(place, field if index is None else index, mutated)
            after = ast.unparse(ast.fix_missing_locations(mutated)).splitlines()[0]
            yield Fault(file, node.lineno, statement, before, after, ast.unparse(tree))
            put(place, field if index is None else index, node)


class Coverage:
    """A plugin of pytest: which tests run which lines of the package, and how long each takes.

    It also finds the coverage of a folder.
    """

    def __init__(self, package, measured, found):
        self.coverage = coverage.Coverage(branch=True, include=[f"{package}/*"], data_file=None)
        self.measured = measured
        self.found = found
        self.times = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.times[item.nodeid] = time.process_time() - start
            self.coverage.switch_context("")

    def pytest_sessionfinish(self):
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {file: data.contexts_by_lineno(file) for file in data.measured_files()}
        with open(os.devnull, "w") as file:
            percent = self.coverage.report(file=file, include=[f"{self.measured}/*"])
        found = {"lines": lines, "times": self.times, "percent": percent}
        self.found.write_text(json.dumps(found))


def run_pytest(folder, args, seconds=None, measured=None):
    """The whole of a forked process. Prints into a file, and finds `Coverage` of a folder."""
    os.chdir(folder)
    os.environ["MPLBACKEND"] = "agg"
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    if seconds:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with open(folder / "printed.txt", "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    plugins = []
    if measured:
        plugin = Coverage(folder / "vgrad_eqx", folder / measured, folder / "found.json")
        plugin.coverage.start()
        plugins.append(plugin)
    # What is imported already is not the project's.
    ignore = "ignore::pytest.PytestAssertRewriteWarning"
    # All runs share what they compile, which few faults change.
    cache = f"cache_dir={folder.parent / 'cache'}"
    options = ["-q", "--tb=no", "-W", ignore, "-o", cache]
    status = pytest.main([*options, *args], plugins)
    sys.stdout.flush()
    os._exit(status)


def fork_pytest(folder, args, seconds=None, measured=None):
    """Runs pytest in a copy of the project. Returns what it prints, and its exit status."""
    process = FORKS.Process(target=run_pytest, args=(folder, args, seconds, measured))
    process.start()
    process.join(seconds and 10 * seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return (folder / "printed.txt").read_text(), process.exitcode


def copy_project(folder):
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, folder, ignore=ignore)


def find_lines(folder, tests, measured):
    """The tests that run each line, with their times, and the coverage of a folder."""
    copy_project(folder)
    printed, status = fork_pytest(folder, tests, measured=measured)
    if status:
        raise RuntimeError(f"The tests fail without a fault:\n{printed}")
    found = json.loads((folder / "found.json").read_text())
    found["lines"] = {
        (str(Path(file).relative_to(folder)), int(line)): runs
        for file, lines in found["lines"].items()
        for line, runs in lines.items()
    }
    return found


def find_tests(found, fault):
    times = {test: time for each in found for test, time in each["times"].items()}
    for line in (fault.line, fault.statement):
        place = str(fault.file.relative_to(ROOT)), line
        runs = [test for each in found for test in each["lines"].get(place, [])]
        if runs:
            # What runs as the module is imported is for all tests.
            tests = [test for test in runs if test] or list(times)
            return {test: times[test] for test in sorted(tests, key=times.__getitem__)}
    return {}


def try_fault(folders, fault, found):
    """The number of tests that run a line, and whether one of them notices its fault."""
    tests = find_tests(found, fault)
    if not tests:
        return 0, False
    folder = folders.get()
    file = folder / fault.file.relative_to(ROOT)
    original = file.read_text()
    file.write_text(fault.source)
    try:
        seconds = int(START + SLOWER * sum(tests.values()))
        _, status = fork_pytest(folder, ["-x", *tests], seconds)
    finally:
        file.write_text(original)
        folders.put(folder)
    return len(tests), status != 0


def draw_faults(room, num_faults, seed):
    files = sorted((ROOT / "vgrad_eqx" / f"_{room}").glob("*.py"))
    faults = [fault for file in files for fault in list_faults(file)]
    faults.sort(key=lambda fault: (str(fault.file), fault.line, fault.after))
    return random.Random(seed).sample(faults, min(num_faults, len(faults)))


def try_faults(executor, folders, faults, found):
    """Prints what happens to each fault, and returns the number of those that survive."""
    num_survivors = 0
    runs = {executor.submit(try_fault, folders, fault, found): fault for fault in faults}
    for run in as_completed(runs):
        fault, (num_tests, is_noticed) = runs[run], run.result()
        what = "noticed " if is_noticed else "SURVIVED" if num_tests else "NOT RUN "
        print(f"  {what} {fault.file.relative_to(ROOT)}:{fault.line} ({num_tests} tests)")
        print(f"    {fault.before}  ->  {fault.after}", flush=True)
        num_survivors += not is_noticed
    return num_survivors


def try_rooms(folder, rooms, num_faults, num_processes, seed):
    folders = queue.Queue()
    for i in range(num_processes):
        folders.put(folder / str(i))
        copy_project(folder / str(i))
    of_all = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_*.py"))
    with ThreadPoolExecutor(num_processes) as executor:
        find = lambda *args: executor.submit(find_lines, *args)
        of_all = find(folder / "all", of_all, "vgrad_eqx")
        runs = [find(folder / room, [f"tests/{room}"], f"vgrad_eqx/_{room}") for room in rooms]
        for room, run in zip(rooms, runs, strict=True):
            found = [run.result(), of_all.result()]
            print(room)
            faults = draw_faults(room, num_faults, seed)
            num_survivors = try_faults(executor, folders, faults, found)
            yield room, len(faults), num_survivors, found[0]["percent"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", default=ROOMS, help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--faults", type=int, default=50, help="of each room")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        rows = list(try_rooms(folder, args.rooms, args.faults, args.processes, args.seed))
    print(f"\n{'room':<12} {'faults':>6} {'noticed':>8} {'coverage':>9}")
    for room, num_faults, num_survivors, percent in rows:
        noticed = 1 - num_survivors / num_faults
        print(f"{room:<12} {num_faults:>6} {noticed:>8.0%} {percent:>8.1f}%")


if __name__ == "__main__":
    main()
