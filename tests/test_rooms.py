"""Who may import whom (the design's section 3), read from the source by ast."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {"geo.ops", "geo.o3", "geo.kernels", "geo.gp", "geo.nn", "geo.transforms", "geo.datasets"}
# room -> (rooms of geo it may import, packages it may import at module level)
LAWS: dict[str, tuple[set[str], set[str]]] = {
    "ops": ({"geo.ops", "geo._native"}, {"torch"}),
    "geo/_native.py": ({"geo", "geo.ops"}, {"torch"}),
    "geo/o3": ({"geo.o3"}, {"torch", "numpy"}),
    "geo/kernels": ({"geo.ops", "geo.kernels"}, {"torch", "numpy", "scipy"}),
    "geo/gp.py": ({"geo.ops", "geo.kernels"}, {"torch", "numpy", "scipy"}),
    "geo/nn": ({"geo.ops", "geo.o3", "geo.kernels", "geo.nn"}, {"torch", "torch_geometric"}),
    "geo/transforms": (
        {"geo.ops", "geo.o3", "geo.kernels", "geo.transforms"},
        {"torch", "torch_geometric", "numpy", "scipy"},
    ),
    "datasets": ({"geo.datasets", "geo.transforms"}, {"torch", "torch_geometric", "numpy"}),
    "geo/atoms.py": (BELOW, {"torch", "torch_geometric", "numpy", "ase"}),
    "geo/training.py": (BELOW | {"geo.atoms"}, {"torch", "torch_geometric", "numpy", "lightning"}),
    "geo/bench": (BELOW | {"geo.bench", "geo._native", "geo.testing"}, {"torch", "torch_geometric", "numpy"}),
    "geo/testing.py": ({"geo.o3"}, {"torch"}),
    "geo/__init__.py": ({"geo.ops", "geo._native"}, set()),
    "geo/__main__.py": ({"geo", "geo.bench"}, set()),
}


def files(room: str) -> list[Path]:
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file()


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool, int]]:
    """Every imported module: (dotted name, whether at module level, line)."""

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"relative import in {package}, line {child.lineno}"
                if child.module == "geo":
                    yield from ((f"geo.{alias.name}", top, child.lineno) for alias in child.names)
                else:
                    yield child.module or "", top, child.lineno
            elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                continue
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, top and not inside)

    return visit(tree, True)


def offences(source: str, room: str) -> list[str]:
    rooms, packages = LAWS[room]
    found = []
    for name, top, line in imports(ast.parse(source), room):
        head = name.split(".")[0]
        if head == "geo":
            if name not in {"geo.__version__"} and not any(
                name == r or (r != "geo" and name.startswith(f"{r}.")) for r in rooms
            ):
                found.append(f"line {line}: {room} may not import {name}")
        elif top and head not in sys.stdlib_module_names and head not in packages:
            found.append(f"line {line}: {room} may import {head} only inside a function")
    return found


@pytest.mark.parametrize("room", LAWS)
def test_imports(room):
    for path in files(room):
        assert not (bad := offences(path.read_text(), room)), f"{path.relative_to(ROOT)}: {bad}"


def test_every_room_has_a_law():
    for path in [*(ROOT / "geo").rglob("*.py"), *(ROOT / "ops").rglob("*.py"), *(ROOT / "datasets").rglob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        assert any(name == room or name.startswith(f"{room}/") for room in LAWS) or name.startswith(
            ("geo/ops/", "geo/datasets/")
        ), f"{name} stands in no room of tests/test_rooms.py"


def test_no_rag_bag_modules():
    banned = {"utils", "core", "common", "compat", "helpers", "config"}
    for room in ("geo", "ops", "csrc", "datasets"):
        assert not [p for p in (ROOT / room).rglob("*") if p.stem in banned], room


def test_a_broken_law_is_seen():
    assert offences("import scipy\n", "ops")
    assert offences("def f():\n    from geo.nn import PONITA\n", "datasets")
    assert offences("import torch\nfrom geo import nn\n", "geo/o3")
    assert not offences("import torch\ndef f():\n    import e3nn\n", "geo/o3")
