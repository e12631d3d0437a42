"""Transforms: Data in, Data out."""

from __future__ import annotations

from geo.transforms.add_radius_graph import AddRadiusGraph

__all__ = ["AddRadiusGraph"]
