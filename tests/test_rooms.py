"""The package is a house of rooms, which import one way."""

import ast
from pathlib import Path

import pytest
import vgrad_eqx as vg


PACKAGE = Path(vg.__file__).parent

# From the ground up. A room imports from those before it alone.
ROOMS = [
    "_tree",
    "_select",
    "_references",
    "_gradients",
    "_jit",
    "_optimizers",
    "_training",
    "_checkpoints",
]


def list_imports(path):
    """The modules of the package that a file imports, as `(room, module)`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = (node.module or "").split(".")
            if node.level == 1:
                yield path.parent.name, parts[0]
            else:
                yield parts[0], parts[1] if parts[1:] else node.names[0].name


def test_all_rooms_are_known_and_have_a_door_plate():
    folders = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert sorted(path.name for path in folders) == sorted(ROOMS)
    for folder in folders:
        assert 5 <= len((folder / "README.md").read_text().splitlines()) <= 40


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    below = ROOMS[: ROOMS.index(room) + 1]
    for path in (PACKAGE / room).glob("*.py"):
        assert {other for other, _ in list_imports(path)} <= set(below), path


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle_within_a_room(room):
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py")}
    imports = {
        name: {module for other, module in list_imports(path) if other == room} - {name}
        for name, path in files.items()
    }
    while imports:
        ready = [name for name, needed in imports.items() if needed.isdisjoint(imports)]
        assert ready, f"a circle among {sorted(imports)}"
        for name in ready:
            del imports[name]
