"""Layers: equivariant and permutation-equivariant modules, one family a file.

:mod:`geo.nn.aggr` is imported on first use: PyG, whose classes it extends, takes longer to import than all the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from geo.nn.frame_conv import SE2Conv, SE3Conv
from geo.nn.kernel_basis import KernelBasis
from geo.nn.orientation_grid import FrameGrid, OrientationGrid
from geo.nn.ponita import PONITA
from geo.nn.se_conv import ConvNeXtBlock, PointConv, PoniConv

if TYPE_CHECKING:
    from types import ModuleType

    from geo.nn import aggr

__all__ = [
    "PONITA",
    "ConvNeXtBlock",
    "FrameGrid",
    "KernelBasis",
    "OrientationGrid",
    "PointConv",
    "PoniConv",
    "SE2Conv",
    "SE3Conv",
    "aggr",
]


def __getattr__(name: str) -> ModuleType:
    if name == "aggr":
        return importlib.import_module("geo.nn.aggr")
    raise AttributeError(f"module 'geo.nn' has no attribute {name!r}")
