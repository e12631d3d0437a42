"""``geo``: graph and geometric deep learning layers, ops, datasets and examples for PyTorch.

The rooms are imported on first use, so ``import geo`` itself costs nothing beyond the standard library:
``geo.nn``, ``geo.transforms``, ``geo.o3``, ``geo.ops``, ``geo.datasets``, ``geo.atoms``, ``geo.training``,
``geo.testing``, ``geo.bench``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TextIO

__version__ = "0.1.0"
__all__ = ["__version__", "atoms", "bench", "datasets", "info", "nn", "o3", "ops", "testing", "training", "transforms"]

_ROOMS = frozenset(__all__) - {"__version__", "info"}


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"geo.{name}")
    raise AttributeError(f"module 'geo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def info(file: TextIO | None = None) -> None:
    """Print versions and, for each native backend, whether it is loaded or why not.

    Args:
        file: Where to print (default: standard output). ``python -m geo`` prints the same.
    """
    import os
    import platform
    from importlib import metadata

    import torch

    from geo import _native

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    rows = [("geo", __version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    rows += [(name, version(name)) for name in ("torch-geometric", "e3nn", "numpy", "scipy", "lightning", "ase")]
    rows += [(f"{kind} kernels", status) for kind, status in _native.build_info().items()]
    if torch.cuda.is_available():
        rows += [("cuda device", torch.cuda.get_device_name())]
    rows += [("threads", f"{torch.get_num_threads()} (of {os.cpu_count()} cores)")]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), file=file)
