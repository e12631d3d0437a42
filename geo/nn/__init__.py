"""Layers: equivariant and permutation-equivariant modules, one family a file."""

from __future__ import annotations

from geo.nn import aggr
from geo.nn.frame_conv import SE2Conv, SE3Conv
from geo.nn.kernel_basis import KernelBasis
from geo.nn.orientation_grid import FrameGrid, OrientationGrid
from geo.nn.ponita import PONITA
from geo.nn.se_conv import ConvNeXtBlock, PointConv, PoniConv

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
