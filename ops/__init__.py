"""Functions of tensors that run compiled kernels where they are built, and plain PyTorch where they are not.

Each op ``f`` has ``f_reference`` beside it: its definition in plain PyTorch, and the supported path under torch.func.
"""

from __future__ import annotations

if __name__ != "geo.ops":  # the repository root is on sys.path and this folder was found by its own name
    raise ImportError("this folder is the package geo.ops: import it under that name")

from geo import _native
from geo.ops import segment_prod as _segment_prod  # noqa: F401  (registers the product behind reduce="mul")
from geo.ops.bounds import check_bounds
from geo.ops.fiber import fiber_mul_sum, fiber_mul_sum_reference
from geo.ops.gather_linear import gather_linear_mul_segment_sum, gather_linear_mul_segment_sum_reference
from geo.ops.gather_mul import (
    gather_mul,
    gather_mul_reference,
    gather_mul_segment_sum,
    gather_mul_segment_sum_reference,
)
from geo.ops.gather_tensor_product import (
    gather_tensor_product_segment_sum,
    gather_tensor_product_segment_sum_reference,
)
from geo.ops.gaunt import gaunt_product, gaunt_product_reference
from geo.ops.gaunt_irreps import Blocks, gaunt_product_irreps, gaunt_product_irreps_reference
from geo.ops.gelu import gelu, gelu_reference
from geo.ops.grf_paths import grf_paths, grf_paths_reference
from geo.ops.grf_walks import WalkDeposits, grf_walks, grf_walks_reference
from geo.ops.gru_merge import gru_merge, gru_merge_reference
from geo.ops.irreps import pack_irreps, pack_irreps_reference, unpack_irreps, unpack_irreps_reference
from geo.ops.pair_mlp import pair_mlp, pair_mlp_reference
from geo.ops.plan import SegmentPlan, csr_from_index, csr_from_index_reference
from geo.ops.random_walk import random_walk, random_walk_reference
from geo.ops.scatter import (
    scatter,
    scatter_add,
    scatter_max,
    scatter_mean,
    scatter_min,
    scatter_mul,
    scatter_reference,
    scatter_sum,
    sort_by_index,
)
from geo.ops.scatter_softmax import scatter_log_softmax, scatter_logsumexp, scatter_softmax, scatter_std
from geo.ops.segment import segment_reduce, segment_reduce_reference
from geo.ops.segment_conv import segment_causal_conv1d, segment_causal_conv1d_reference
from geo.ops.segment_csr import (
    gather_coo,
    gather_coo_reference,
    gather_csr,
    gather_csr_reference,
    segment_add_coo,
    segment_add_csr,
    segment_coo,
    segment_csr,
    segment_csr_reference,
    segment_max_coo,
    segment_max_csr,
    segment_mean_coo,
    segment_mean_csr,
    segment_min_coo,
    segment_min_csr,
    segment_sum_coo,
    segment_sum_csr,
)
from geo.ops.segment_softmax import (
    segment_log_softmax,
    segment_log_softmax_reference,
    segment_logsumexp,
    segment_logsumexp_reference,
    segment_softmax,
    segment_softmax_reference,
    segment_std,
    segment_std_reference,
)
from geo.ops.selective_scan import selective_scan, selective_scan_reference
from geo.ops.spectral_filter import spectral_filter, spectral_filter_reference
from geo.ops.tree_reduce import TreePlan, fold, tree_reduce
from geo.ops.walk_tokens import walk_adjacency, walk_adjacency_reference, walk_tokens, walk_tokens_reference

_native.load()

__all__ = [
    "Blocks",
    "SegmentPlan",
    "TreePlan",
    "WalkDeposits",
    "check_bounds",
    "csr_from_index",
    "csr_from_index_reference",
    "fiber_mul_sum",
    "fiber_mul_sum_reference",
    "fold",
    "gather_coo",
    "gather_coo_reference",
    "gather_csr",
    "gather_csr_reference",
    "gather_linear_mul_segment_sum",
    "gather_linear_mul_segment_sum_reference",
    "gather_mul",
    "gather_mul_reference",
    "gather_mul_segment_sum",
    "gather_mul_segment_sum_reference",
    "gather_tensor_product_segment_sum",
    "gather_tensor_product_segment_sum_reference",
    "gaunt_product",
    "gaunt_product_irreps",
    "gaunt_product_irreps_reference",
    "gaunt_product_reference",
    "gelu",
    "gelu_reference",
    "grf_paths",
    "grf_paths_reference",
    "grf_walks",
    "grf_walks_reference",
    "gru_merge",
    "gru_merge_reference",
    "pack_irreps",
    "pack_irreps_reference",
    "pair_mlp",
    "pair_mlp_reference",
    "random_walk",
    "random_walk_reference",
    "scatter",
    "scatter_add",
    "scatter_log_softmax",
    "scatter_logsumexp",
    "scatter_max",
    "scatter_mean",
    "scatter_min",
    "scatter_mul",
    "scatter_reference",
    "scatter_softmax",
    "scatter_std",
    "scatter_sum",
    "segment_add_coo",
    "segment_add_csr",
    "segment_causal_conv1d",
    "segment_causal_conv1d_reference",
    "segment_coo",
    "segment_csr",
    "segment_csr_reference",
    "segment_log_softmax",
    "segment_log_softmax_reference",
    "segment_logsumexp",
    "segment_logsumexp_reference",
    "segment_max_coo",
    "segment_max_csr",
    "segment_mean_coo",
    "segment_mean_csr",
    "segment_min_coo",
    "segment_min_csr",
    "segment_reduce",
    "segment_reduce_reference",
    "segment_softmax",
    "segment_softmax_reference",
    "segment_std",
    "segment_std_reference",
    "segment_sum_coo",
    "segment_sum_csr",
    "selective_scan",
    "selective_scan_reference",
    "sort_by_index",
    "spectral_filter",
    "spectral_filter_reference",
    "tree_reduce",
    "unpack_irreps",
    "unpack_irreps_reference",
    "walk_adjacency",
    "walk_adjacency_reference",
    "walk_tokens",
    "walk_tokens_reference",
]
