"""Geometry as pure functions: pair invariants of homogeneous spaces, grids of orientations, products on the sphere."""

from __future__ import annotations

from geo.o3.gaunt import bracket_coefficient, gaunt_coefficient, pack, unpack
from geo.o3.grids import orientation_points, quadrature_weights, random_rotations, rotation_frames
from geo.o3.harmonics import solid_harmonics
from geo.o3.invariants import (
    grid_invariants,
    num_grid_invariants,
    num_pair_invariants,
    pair_invariants,
    safe_norm,
)
from geo.o3.sphere_grid import SphereGrid, from_grid, to_grid

__all__ = [
    "SphereGrid",
    "bracket_coefficient",
    "from_grid",
    "gaunt_coefficient",
    "grid_invariants",
    "num_grid_invariants",
    "num_pair_invariants",
    "orientation_points",
    "pack",
    "pair_invariants",
    "quadrature_weights",
    "random_rotations",
    "rotation_frames",
    "safe_norm",
    "solid_harmonics",
    "to_grid",
    "unpack",
]
