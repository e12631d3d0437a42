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
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows += [(f"gaunt on {device}", _gaunt_methods(device)) for device in devices]
    rows += [("threads", f"{torch.get_num_threads()} (of {os.cpu_count()} cores)")]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), file=file)


def _gaunt_methods(device: str) -> str:
    """What ``method='auto'`` of the Gaunt products means where all degrees are L: "sparse for L = 0-4, ..."."""
    import itertools

    import torch

    from geo.ops.gaunt import auto_method

    like, kinds = torch.empty(0, device=device), []
    for name, bracket in (("product", False), ("bracket", True)):
        found = [auto_method(like, l, l, l, bracket) for l in range(13)]
        runs = [(method, [l for l, _ in run]) for method, run in itertools.groupby(enumerate(found), lambda lm: lm[1])]
        words = [
            f"{method} for L = {degrees[0]}-{degrees[-1]}" if i + 1 < len(runs) else f"{method} above"
            for i, (method, degrees) in enumerate(runs)
        ]
        kinds.append(f"{name} {', '.join(words)}")
    return "; ".join(kinds)
