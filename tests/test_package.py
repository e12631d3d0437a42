from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geo
from geo import _native
from geo.__main__ import main

ROOT = Path(__file__).parents[1]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def test_import_is_light():
    done = python(
        "import sys, torch; before = set(sys.modules); import geo; new = set(sys.modules) - before;"
        "print(*sorted({m.split('.')[0] for m in new} - set(sys.stdlib_module_names)))"
    )
    assert done.stdout.split() == ["geo"], done.stdout + done.stderr


def test_ops_import_torch_only():
    done = python(
        "import sys, torch; before = set(sys.modules); import geo.ops;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert not set(done.stdout.split()) & {"torch_geometric", "e3nn", "scipy", "lightning"}, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["ops", "datasets"])
def test_folders_are_not_top_level_packages(name):
    done = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}")
    assert done.returncode != 0
    assert f"geo.{name}" in done.stderr


def test_info_and_command_line_print_the_same(capsys):
    text = io.StringIO()
    geo.info(text)
    assert main([]) == 0
    assert capsys.readouterr().out == text.getvalue()
    assert geo.__version__ in text.getvalue()
    assert re.search(r"cpu kernels +(loaded|not built|off|failed)", text.getvalue())


def test_info_says_what_auto_means():
    from geo.ops.gaunt import auto_method

    text = io.StringIO()
    geo.info(text)
    (line,) = (line for line in text.getvalue().splitlines() if line.startswith("gaunt on cpu"))
    product, bracket = line.split("; ")
    for words, is_bracket in ((product, False), (bracket, True)):
        runs = re.findall(r"(\w+) for L = (\d+)-(\d+)", words)
        assert runs
        for method, first, last in runs:
            assert all(
                auto_method(torch.empty(0), l, l, l, is_bracket) == method for l in range(int(first), int(last) + 1)
            )
        assert auto_method(torch.empty(0), 12, 12, 12, is_bracket) in words.split(", ")[-1]


def test_native_kernels_are_there_in_ci():
    if not os.environ.get("CI"):
        pytest.skip("only a CI run must have the compiled kernels")
    assert _native.build_info()["cpu"].startswith("loaded"), _native.build_info()


def test_works_without_compiled_library():
    done = python(
        "import torch, geo.ops; from geo import _native; print(_native.build_info()['cpu']);"
        "print(geo.ops.segment_reduce(torch.ones(3, 2), torch.tensor([0, 1, 3]), 'sum').tolist())",
        GEO_DISABLE_NATIVE="1",
    )
    assert done.stdout.splitlines() == ["off: GEO_DISABLE_NATIVE is set", "[[1.0, 1.0], [2.0, 2.0]]"], done.stderr


def test_a_damaged_library_is_reported_not_fatal(tmp_path):
    (tmp_path / "libgeo_cpu.so").write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-m", "geo"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GEO_LIBRARY_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"cpu kernels +failed: .*libgeo_cpu.so", done.stdout), done.stdout
    assert "cannot load" in done.stderr


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = geo.nothing


def test_all_names_resolve():
    for name in geo.__all__:
        assert getattr(geo, name) is not None
