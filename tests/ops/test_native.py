from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from geo import _native

ROOT = Path(__file__).parents[2]
needs_cpu = pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")


def python(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not os.environ.get("CI"), reason="CI is not set: the kernels may be left unbuilt")
def test_ci_has_the_kernels():
    assert _native.have("cpu"), _native.build_info()


def test_build_info():
    info = _native.build_info()
    assert set(info) == {"cpu", "cuda"}
    assert all(text.startswith(("loaded: ", "not built: ", "off: ", "failed: ")) for text in info.values())
    assert _native.simd_level() in (*_native.SIMD_LEVELS, "none")


def test_without_the_library():
    """The plain-PyTorch kernels pass the same table, and info says why they are used."""
    done = python("-m", "geo", GEO_DISABLE_NATIVE="1")
    assert "cpu kernels      off: GEO_DISABLE_NATIVE is set" in done.stdout, done.stderr
    tests = "table or derivatives or bad or refusals or compile or hub or laws or empty"
    files = [f"tests/ops/test_{name}.py" for name in ("segment", "gather_mul", "plan")]
    files += ["tests/nn/test_se_conv.py"]  # a layer that writes to what an op returned
    done = python("-m", "pytest", "-q", "-m", "not slow", "-k", tests, *files, GEO_DISABLE_NATIVE="1")
    assert done.returncode == 0, done.stdout


@needs_cpu
@pytest.mark.parametrize("level", _native.SIMD_LEVELS)
def test_simd_level(level):
    """Each level that the machine has passes the kernel tests; the default one has passed them in this run already."""
    if level == _native.simd_level():
        pytest.skip(f"{level} is what the other tests run")
    done = python("-c", "from geo import _native; print(_native.simd_level())", GEO_SIMD=level)
    if done.stdout.strip() != level:
        assert f"GEO_SIMD={level} is not supported by this processor" in done.stderr
        pytest.skip(f"this processor has no {level}")
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/ops").glob("test_*.py"))]
    tests = "(table or equals_reference or extreme) and not simd and not library"
    done = python("-m", "pytest", "-q", "-x", "-m", "not slow", "-k", tests, *files, GEO_SIMD=level)
    assert done.returncode == 0, done.stdout


@needs_cpu
def test_unknown_simd_level_is_said():
    done = python("-m", "geo", GEO_SIMD="sse9")
    assert "GEO_SIMD='sse9' is not one of baseline, avx2, avx512" in done.stderr
    assert "GEO_SIMD='sse9' is not one of" in done.stdout


def test_damaged_library(tmp_path):
    (tmp_path / "libgeo_cpu.so").write_bytes(b"not a library")
    done = python("-c", "import geo.ops, geo; geo.info()", GEO_LIBRARY_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "cpu kernels      failed:" in done.stdout
    assert "using the plain-PyTorch kernels instead" in done.stderr


def test_ops_is_not_a_top_level_package():
    done = python("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ops")
    assert "import it under that name" in done.stderr
