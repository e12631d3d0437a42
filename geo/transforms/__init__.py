"""Transforms: Data in, Data out."""

from __future__ import annotations

from geo.transforms.add_directed_random_walk_pe import AddDirectedRandomWalkPE
from geo.transforms.add_grf import AddGRF, read_grf
from geo.transforms.add_laplacian_spectrum import AddLaplacianSpectrum
from geo.transforms.add_magnetic_laplacian_spectrum import AddMagneticLaplacianSpectrum
from geo.transforms.add_radius_graph import AddRadiusGraph
from geo.transforms.add_walk_tokens import AddWalkTokens, WalkTokenData
from geo.transforms.lift_to_position_orientation import LiftToPositionOrientation

__all__ = [
    "AddDirectedRandomWalkPE",
    "AddGRF",
    "AddLaplacianSpectrum",
    "AddMagneticLaplacianSpectrum",
    "AddRadiusGraph",
    "AddWalkTokens",
    "LiftToPositionOrientation",
    "WalkTokenData",
    "read_grf",
]
