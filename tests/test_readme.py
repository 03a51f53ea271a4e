"""What the README says is true."""

import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_code_runs(code):
    exec(code, {})


def test_printed_summary_is_what_is_printed(capsys):
    (text,) = blocks("text")
    (code,) = [code for code in blocks("python") if "vg.summary" in code]
    exec(code, {})
    printed = capsys.readouterr().out
    # With x64 a model is of float64, which takes as many characters.
    assert printed.replace("float64", "float32") == text


def test_two_commands_set_everything_up():
    commands = blocks("bash")
    assert commands == [
        'pip install -e ".[examples]" && python examples/digits.py\n',
        'pip install -e ".[test]" && pytest\n',
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"examples", "test"} <= set(project["optional-dependencies"])


def test_what_is_linked_exists():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists()
