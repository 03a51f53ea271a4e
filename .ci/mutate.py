"""Puts faults into the rooms, one at a time, and says which of them no test notices.

    python .ci/mutate.py tree select --faults 15

For each room, its tests run once, to find the lines that each test runs. Then faults are
drawn by a seed and put, one at a time, into a copy of the project, in which the tests that run
the line are run, the quickest first, up to the first that fails. A fault that survives is
printed with its line. It is one of these: the tests do not look at what the line does, or
the fault changes nothing that can be seen from outside.

The time of a run is limited by that of its processor, so that other work does no harm.
"""

import argparse
import ast
import copy
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.name[1:] for path in (ROOT / "vgrad_eqx").glob("_*/"))
# Of a run with a fault: what the tests take without it, so many times, and a start.
SLOWER, START = 5, 60

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
    ast.Return: lambda node: [change(node, value=ast.Constant(None))] if node.value else [],
    ast.Expr: lambda node: [ast.Pass()] if isinstance(node.value, ast.Call) else [],
    ast.Call: drop_keywords,
    ast.Tuple: drop_last,
}


# What does not change behavior, or is text for people.
LEFT_OUT = (ast.Raise, ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)


def is_left_out(node):
    return isinstance(node, LEFT_OUT) or getattr(node, "arg", None) == "strict"


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


# Runs as a plugin of pytest: which tests run which lines, and how long each takes.
PLUGIN = """
import json, os, time
import coverage, pytest

cov = coverage.Coverage(branch=True, include=[os.environ["ROOM"] + "/*"], data_file=None)
cov.start()
times = {}

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    cov.switch_context(item.nodeid)
    start = time.process_time()
    yield
    times[item.nodeid] = time.process_time() - start
    cov.switch_context("")

def pytest_sessionfinish():
    cov.stop()
    data = cov.get_data()
    lines = {file: data.contexts_by_lineno(file) for file in data.measured_files()}
    with open(os.environ["FOUND"] + ".txt", "w") as file:
        percent = cov.report(file=file)
    with open(os.environ["FOUND"], "w") as file:
        json.dump({"lines": lines, "times": times, "percent": percent}, file)
"""


def run_pytest(folder, args, *, seconds=None, env=None):
    """Runs pytest in a copy of the project. Returns what it prints, and its exit status."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider"]
    limit = lambda: seconds and resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    result = subprocess.run(
        [*command, *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg", **(env or {})},
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    return result.stdout, result.returncode


def copy_project(folder):
    for name in ("vgrad_eqx", "tests", "README.md", "pyproject.toml", "examples", "docs"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def find_lines(folder, room):
    """The tests that run each line of a room, with the times of the tests and the coverage."""
    (folder / "found_plugin.py").write_text(PLUGIN)
    found = folder / "found.json"
    env = {"ROOM": str(folder / "vgrad_eqx" / f"_{room}"), "FOUND": str(found)}
    printed, status = run_pytest(folder, ["-p", "found_plugin", f"tests/{room}"], env=env)
    if status:
        sys.exit(f"The tests of {room} fail without a fault:\n{printed}")
    return json.loads(found.read_text())


def try_fault(folder, fault, tests, times):
    """The first test that notices a fault, or `None`."""
    file = folder / fault.file.relative_to(ROOT)
    original = file.read_text()
    file.write_text(fault.source)
    try:
        limit = int(START + SLOWER * sum(times[test] for test in tests))
        printed, status = run_pytest(folder, ["-x", "-rfE", *tests], seconds=limit)
    finally:
        file.write_text(original)
    failed = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return None if status == 0 else failed[0] if failed else f"exit status {status}"


def find_tests(lines, fault, all_tests):
    for line in (fault.line, fault.statement):
        runs = lines.get(str(line), [])
        tests = [test for test in runs if test]
        if runs:
            # What runs as the module is imported is for all tests.
            return tests or all_tests
    return []


def try_room(folder, room, num_faults, seed):
    found = find_lines(folder, room)
    faults = [
        f for file in (ROOT / "vgrad_eqx" / f"_{room}").glob("*.py") for f in list_faults(file)
    ]
    faults.sort(key=lambda fault: (str(fault.file), fault.line, fault.after))
    survivors = []
    drawn = random.Random(seed).sample(faults, min(num_faults, len(faults)))
    for fault in drawn:
        lines = found["lines"].get(str(folder / fault.file.relative_to(ROOT)), {})
        tests = find_tests(lines, fault, list(found["times"]))
        tests.sort(key=found["times"].__getitem__)
        first = try_fault(folder, fault, tests, found["times"]) if tests else None
        place = f"{fault.file.relative_to(ROOT)}:{fault.line}"
        what = "noticed " if first else "SURVIVED" if tests else "NOT RUN "
        print(f"  {what} {place} ({len(tests)} tests)")
        print(f"    {fault.before}  ->  {fault.after}", flush=True)
        if not first:
            survivors.append(fault)
    return len(drawn), len(survivors), found["percent"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", default=ROOMS, help=f"of {', '.join(ROOMS)}")
    parser.add_argument("--faults", type=int, default=50, help="of each room")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        copy_project(folder)
        for room in args.rooms:
            print(room)
            rows.append((room, *try_room(folder, room, args.faults, args.seed)))
    print(f"\n{'room':<12} {'faults':>6} {'noticed':>8} {'coverage':>9}")
    for room, num_faults, num_survivors, percent in rows:
        noticed = 1 - num_survivors / num_faults
        print(f"{room:<12} {num_faults:>6} {noticed:>8.0%} {percent:>8.1f}%")


if __name__ == "__main__":
    main()
