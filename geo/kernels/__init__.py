r"""Kernels on graphs: power series, and their unbiased estimates by graph random features.

A kernel :math:`K = \sum_k \alpha_k W^k` of a graph's (normalised) adjacency matrix costs the cube of the number of
nodes to compute. Features from random walks estimate it without bias at a cost linear in the number of nodes.
"""

from __future__ import annotations

from geo.kernels.features import FeatureMap, SparseFeatures, features_of, normalized_adjacency, tail_mass
from geo.kernels.grf_kernel import GRFKernel
from geo.kernels.partition import PartitionedSampler, Traffic, sample_partitioned
from geo.kernels.series import (
    Series,
    custom,
    divide_series,
    heat,
    inverse_cosine,
    katz,
    matern,
    pair,
    personalised_pagerank,
    random_walk,
    regularised_laplacian,
    sqrt_series,
)
from geo.kernels.stitched_kernel import StitchedKernel
from geo.kernels.streaming import StreamingWalks, WalkUpdate

__all__ = [
    "FeatureMap",
    "GRFKernel",
    "PartitionedSampler",
    "Series",
    "SparseFeatures",
    "StitchedKernel",
    "StreamingWalks",
    "Traffic",
    "WalkUpdate",
    "custom",
    "divide_series",
    "features_of",
    "heat",
    "inverse_cosine",
    "katz",
    "matern",
    "normalized_adjacency",
    "pair",
    "personalised_pagerank",
    "random_walk",
    "regularised_laplacian",
    "sample_partitioned",
    "sqrt_series",
    "tail_mass",
]
