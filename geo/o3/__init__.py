"""Geometry as pure functions: pair invariants of homogeneous spaces and grids of orientations."""

from __future__ import annotations

from geo.o3.grids import (
    angles_to_frames,
    orientation_points,
    quadrature_weights,
    random_rotations,
    rotation_frames,
)
from geo.o3.invariants import (
    edge_vectors,
    grid_invariants,
    grid_invariants_from_vectors,
    num_grid_invariants,
    num_pair_invariants,
    pair_invariants,
    pair_invariants_from_vectors,
    safe_norm,
    zero_invariants,
)

__all__ = [
    "angles_to_frames",
    "edge_vectors",
    "grid_invariants",
    "grid_invariants_from_vectors",
    "num_grid_invariants",
    "num_pair_invariants",
    "orientation_points",
    "pair_invariants",
    "pair_invariants_from_vectors",
    "quadrature_weights",
    "random_rotations",
    "rotation_frames",
    "safe_norm",
    "zero_invariants",
]
