"""What type checkers know of the library."""

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import vgrad_eqx as vg


PACKAGE = Path(vg.__file__).parent
PROGRAMS = Path(__file__).parent / "programs.py"


def find_program(name):
    scripts = sysconfig.get_path("scripts")
    found = shutil.which(name, path=scripts) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def run_pyright(mode, folder):
    options = {"typeCheckingMode": mode, "reportMissingTypeStubs": False}
    (folder / "pyrightconfig.json").write_text(
        json.dumps({**options, "extraPaths": [str(PACKAGE.parent)]})
    )
    command = [find_program("pyright"), "--outputjson", "--pythonpath", sys.executable]
    out = subprocess.run([*command, PROGRAMS.name], cwd=folder, capture_output=True, text=True)
    if not out.stdout.startswith("{"):
        pytest.skip("pyright does not run")
    found = json.loads(out.stdout)["generalDiagnostics"]
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found}


def run_mypy(folder):
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path = {PACKAGE.parent}\n"
        "[mypy-optax.*]\nignore_missing_imports = True\n"
        "[mypy-vgrad_eqx.*]\nignore_errors = True\n"
    )
    command = [find_program("mypy"), "--python-executable", sys.executable, PROGRAMS.name]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = re.findall(rf"^{PROGRAMS.name}:(\d+): error: (.*)$", out.stdout, re.MULTILINE)
    assert found, out.stdout + out.stderr
    return {int(line): message for line, message in found}


CHECKERS = {
    "pyright": lambda folder: run_pyright("standard", folder),
    "pyright, strict": lambda folder: run_pyright("strict", folder),
    "mypy": run_mypy,
}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_lines_are_errors_and_no_others(checker, tmp_path):
    shutil.copy(PROGRAMS, tmp_path)
    name = checker.partition(",")[0]
    lines = PROGRAMS.read_text().splitlines()
    wrong = {i for i, line in enumerate(lines, 1) if re.search(rf"  # error(: {name})?$", line)}
    found = CHECKERS[checker](tmp_path)
    assert {i: message for i, message in found.items() if i not in wrong} == {}
    assert {i: lines[i - 1] for i in wrong if i not in found} == {}


def list_parameters(path):
    """The annotations of all parameters in a file, as text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            args = node.args
            others = [arg for arg in (args.vararg, args.kwarg) if arg is not None]
            for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs, *others]:
                if arg.annotation is not None:
                    yield ast.unparse(arg.annotation)


def test_few_parameters_may_be_anything():
    counts = Counter(text for path in PACKAGE.rglob("*.py") for text in list_parameters(path))
    assert counts["Any"] <= 0.1 * counts.total()
