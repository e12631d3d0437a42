"""What the documentation shows, runs: doctests, the README's code, and the parts a layer's docstring must have."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import geo

ROOT = Path(__file__).parents[1]
ROOMS = ("nn", "o3", "ops", "kernels", "transforms", "datasets")


def modules() -> list[str]:
    names = ["geo", "geo.testing", "geo.atoms", "geo.training", "geo.gp"]
    for room in (*ROOMS, "bench"):
        module = importlib.import_module(f"geo.{room}")
        names += [f"geo.{room}", *(f"geo.{room}.{m.name}" for m in pkgutil.iter_modules(module.__path__))]
    return names


@pytest.mark.parametrize("name", modules())
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may write files
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def public() -> list[tuple[str, str]]:
    found = []
    for room in ROOMS:
        module = importlib.import_module(f"geo.{room}")
        assert len(module.__all__) == len(set(module.__all__)), f"geo.{room}.__all__ repeats a name"
        found += [(room, name) for name in module.__all__]
    return found


@pytest.mark.parametrize(("room", "name"), public())
def test_public_names_are_documented(room, name):
    thing = getattr(importlib.import_module(f"geo.{room}"), name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    text = inspect.getdoc(thing) or ""
    assert text, f"geo.{room}.{name} has no docstring"
    parameters = [p for p in inspect.signature(thing).parameters if p != "self"]
    result = inspect.isclass(thing) and issubclass(thing, tuple)  # a named tuple documents each field
    if parameters and not result and not name.endswith("_reference"):
        assert "Args:" in text, f"geo.{room}.{name}: no Args section"
    parts: tuple[str, ...] = ()
    if room == "ops" and inspect.isfunction(thing) and not name.endswith("_reference") and name != "check_bounds":
        parts = ("Returns:", "Raises:", "Example:")
    if room == "nn":
        parts = ("Shapes:", "Example:")
        if not name.endswith("Grid"):  # a grid is data, not a layer
            parts += ("Symmetry and derivatives:", "https://")
    for part in parts:
        assert part in text, f"geo.{room}.{name}: no {part!r}"


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_lists_every_layer_and_example():
    text = (ROOT / "README.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert script.name in text, f"README.md does not mention examples/{script.name}"
    for name in geo.nn.__all__:
        if name.endswith(("Conv", "Aggregation", "TensorProduct")) or name == "PONITA":
            assert f"`{name}`" in text, f"README.md does not mention {name}"


def test_links_point_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "examples").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
