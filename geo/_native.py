"""Find and load the compiled kernels. Every failure is recorded, none is fatal.

The libraries hold no Python code: they only register kernels with PyTorch's dispatcher, so one file serves every
Python and every torch from 2.10 on. ``GEO_DISABLE_NATIVE=1`` leaves them out, ``GEO_LIBRARY_DIR`` names another folder
to look in first, and ``GEO_SIMD=baseline|avx2|avx512`` forces the instruction set of the CPU kernels.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

import torch

SIMD_LEVELS = ("baseline", "avx2", "avx512")

_STATUS: dict[str, str] = {}
_SIMD: list[str] = []


def _search_path() -> list[Path]:
    """The folders of the compiled files: beside this file in a wheel, on ``geo.__path__`` in an editable install."""
    import geo

    folders = [Path(path) / "_lib" for path in geo.__path__]
    if extra := os.environ.get("GEO_LIBRARY_DIR"):
        folders.insert(0, Path(extra))
    return folders


def _read_simd_level(path: Path) -> str:
    """Ask the CPU library which instruction set it chose, and say so when ``GEO_SIMD`` could not be obeyed."""
    library = ctypes.CDLL(str(path))
    library.geo_simd_level.restype = ctypes.c_char_p
    chosen: str = library.geo_simd_level().decode()
    _SIMD[:] = [chosen]
    wanted = os.environ.get("GEO_SIMD", "")
    if wanted in ("", chosen):
        return f"SIMD {chosen}"
    if wanted in SIMD_LEVELS:
        why = f"GEO_SIMD={wanted} is not supported by this processor or build, using {chosen}"
    else:
        why = f"GEO_SIMD={wanted!r} is not one of {', '.join(SIMD_LEVELS)}, using {chosen}"
    warnings.warn(f"geo: {why}", stacklevel=2)
    return f"SIMD {chosen} ({why})"


def _load(kind: str) -> None:
    name = f"libgeo_{kind}.so"
    if os.environ.get("GEO_DISABLE_NATIVE", "") not in ("", "0"):
        _STATUS[kind] = "off: GEO_DISABLE_NATIVE is set"
        return
    if kind == "cuda" and torch.version.cuda is None:
        _STATUS[kind] = "off: this torch is a CPU build"
        return
    for folder in _search_path():
        path = folder / name
        if not path.is_file():
            continue
        try:
            torch.ops.load_library(str(path))
            note = f" ({_read_simd_level(path)})" if kind == "cpu" else ""
        except (OSError, RuntimeError, AttributeError) as err:  # damaged file, wrong torch, missing symbol
            why = err.__cause__ or err  # torch hides the loader's own message in __cause__
            _STATUS[kind] = f"failed: {path}: {why}"
            warnings.warn(f"geo: cannot load {path}, using the plain-PyTorch kernels instead: {why}", stacklevel=2)
        else:
            _STATUS[kind] = f"loaded: {path}{note}"
        return
    _STATUS[kind] = f"not built: no {name} in " + ", ".join(map(str, _search_path()))


def load() -> None:
    """Load the CPU and the CUDA library, once; called when :mod:`geo.ops` is imported."""
    if not _STATUS:
        _load("cpu")
        _load("cuda")


def build_info() -> dict[str, str]:
    """What was loaded or why not, by backend: ``{"cpu": "loaded: ...", "cuda": "off: ..."}``."""
    import geo.ops  # noqa: F401  (importing the ops loads the libraries)

    return dict(_STATUS)


def have(kind: str) -> bool:
    """Whether the compiled kernels of backend ``kind`` ("cpu" or "cuda") are loaded."""
    return build_info().get(kind, "").startswith("loaded")


def simd_level() -> str:
    """The instruction set the CPU kernels use, one of ``SIMD_LEVELS``; "none" where they are not loaded."""
    build_info()
    return _SIMD[0] if _SIMD else "none"
