"""torch_scatter's functions."""

from __future__ import annotations

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.plan import SegmentPlan
from geo.ops.registration import define
from geo.ops.segment import Order, spread


def gather_csr(src: Tensor, indptr: Tensor | SegmentPlan, *, num_out: int | None = None) -> Tensor:
    """Repeat each row over its segment: ``out[e] = src[i]`` for ``indptr[i] <= e < indptr[i + 1]``.

    Args:
        src: [N, *F].
        indptr: int64 [N + 1], rising from 0 to E, or a :class:`SegmentPlan`.
        num_out: E; by default ``indptr[-1]``, which waits for a GPU and cannot be compiled.

    Returns:
        [E, *F].

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import gather_csr
        >>> gather_csr(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [5.0, 5.0, 7.0]
    """
    order = Order(indptr.ptr, indptr.perm, indptr.index) if isinstance(indptr, SegmentPlan) else Order(indptr)
    if order.ptr.dim() != 1 or order.ptr.dtype != torch.int64:
        raise ValueError(f"gather_csr: ptr must be int64 [N + 1], got {order.ptr.dtype} {list(order.ptr.shape)}")
    if src.dim() < 1 or src.size(0) != order.num_segments:
        raise ValueError(
            f"gather_csr: src must have ptr.numel() - 1 = {order.num_segments} rows, got {list(src.shape)}"
        )
    if num_out is None:
        num_out = int(order.ptr[-1])
    return spread(src, order, num_out, "gather_csr")


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def _scatter_sum_kernel(src: Tensor, index: Tensor, dim_size: int, mean: bool) -> Tensor:
    bounds.check_index("scatter_sum", "index", index, dim_size)
    ptr, perm = torch.ops.geo.csr_from_index(index, dim_size)
    out: Tensor = torch.ops.geo.segment_sum(src, ptr, perm, index, mean)
    return out


def _scatter_sum_fake(src: Tensor, index: Tensor, dim_size: int, mean: bool) -> Tensor:
    torch._check(src.dim() >= 1 and index.dim() == 1)
    return src.new_empty(dim_size, *src.shape[1:])


define(
    "scatter_sum(Tensor src, Tensor index, SymInt dim_size, bool mean) -> Tensor",
    _scatter_sum_kernel,
    _scatter_sum_fake,
)
