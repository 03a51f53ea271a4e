"""What the README and the pages of the site say is true."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import vgrad_eqx as vg


ROOT = Path(__file__).parent.parent
README, PAGES = ROOT / "README.md", ROOT / "docs" / "pages"
DOCUMENTS = [README, *sorted(PAGES.rglob("*.md"))]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.py"))
# A file in the place of a block, as the extension `pymdownx.snippets` includes it.
INCLUDE = r"^--8<--\n(.*)\n--8<--\n"
# Blocks with many programs to compile.
SLOW = {"training-2", "all-of-vgrad-eqx-5"}


def include(match):
    return (ROOT / match[1]).read_text()


def blocks(document, language):
    found = re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.M | re.S)
    return [re.sub(INCLUDE, include, block, flags=re.M) for block in found]


def find_blocks():
    """The Python in all documents, but for the guides, which are run as scripts."""
    guides = {guide.read_text() for guide in GUIDES}
    for document in DOCUMENTS:
        for i, code in enumerate(blocks(document, "python")):
            if code not in guides:
                name = f"{document.stem}-{i}"
                yield pytest.param(code, id=name, marks=[pytest.mark.slow] * (name in SLOW))


def skip_without_imports(code):
    """Skips what needs a library that is missing, as in an environment without extras."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                pytest.importorskip(alias.name)


@pytest.mark.parametrize("code", list(find_blocks()))
def test_code_runs(code):
    skip_without_imports(code)
    exec(code, {})


@pytest.mark.parametrize(
    "document", [PAGES / "all-of-vgrad-eqx.md"], ids=lambda document: document.stem
)
def test_printed_summary_is_what_is_printed(document, capsys):
    (text,) = blocks(document, "text")
    (code,) = [code for code in blocks(document, "python") if "vg.summary" in code]
    exec(code, {})
    printed = capsys.readouterr().out
    # With x64 a model is of float64, which takes as many characters.
    assert printed.replace("float64", "float32") == text


def mask_numbers(text):
    """The text without its numbers, whose last digits depend on the machine."""
    return re.sub(r"[-+.\d]+(e[-+]\d+)?", "#", re.sub(r" +", " ", text))


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guide_prints_and_draws_what_its_page_shows(guide, tmp_path):
    skip_without_imports(guide.read_text())
    result = subprocess.run(
        [sys.executable, guide],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    recorded = PAGES / "guides" / f"{guide.stem}.txt"
    assert mask_numbers(result.stdout) == mask_numbers(recorded.read_text())
    for folder in (tmp_path, recorded.parent):
        assert (folder / f"{guide.stem}.png").stat().st_size > 10_000


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guide_is_short_and_shown(guide):
    code = guide.read_text()
    assert code.count("\n") <= 60
    assert code in blocks(PAGES / "guides" / f"{guide.stem}.md", "python")


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) < 120


@pytest.mark.parametrize("document", [README, PAGES / "index.md"], ids=["README", "index"])
def test_two_commands_set_everything_up(document):
    assert blocks(document, "bash") == [
        'pip install -e ".[examples]" && python examples/digits.py\n',
        'pip install -e ".[test]" && pytest\n',
        'pip install -e ".[benchmarks]" && python -m benchmarks\n',
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"examples", "test", "benchmarks"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: each.stem)
def test_what_is_linked_exists(document):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert link.startswith("https://") or (document.parent / link).exists()


def test_the_site_describes_each_public_name_once():
    pages = (page.read_text() for page in (PAGES / "api").glob("*.md"))
    described = re.findall(r"^::: vgrad_eqx\.(\w+)$", "\n".join(pages), re.M)
    assert sorted(described) == sorted(name for name in dir(vg) if not name.startswith("_"))


def test_citation_names_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version = {{{project['version']}}}" in README.read_text()
