"""Geometry as pure functions: pair invariants of homogeneous spaces and grids of orientations."""

from __future__ import annotations

from geo.o3.grids import orientation_points, quadrature_weights, random_rotations, rotation_frames
from geo.o3.invariants import (
    grid_invariants,
    num_grid_invariants,
    num_pair_invariants,
    pair_invariants,
    safe_norm,
)

__all__ = [
    "grid_invariants",
    "num_grid_invariants",
    "num_pair_invariants",
    "orientation_points",
    "pair_invariants",
    "quadrature_weights",
    "random_rotations",
    "rotation_frames",
    "safe_norm",
]
