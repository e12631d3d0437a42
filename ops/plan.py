"""The order in which a reduction over edges reads them: built once per graph, used by every layer and its backward."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define

HUB_CHUNK = 4096  # edges; a segment of at least two chunks is a hub (the same number stands in csrc/segments.h)


def csr_from_index_reference(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sort edges by segment, keeping their order inside each: see :func:`csr_from_index`."""
    order = torch.sort(index, stable=True)
    ptr = torch.searchsorted(order.values, torch.arange(size + 1, device=index.device))
    return ptr, order.indices


def _csr_kernel(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    bounds.check_index("csr_from_index", "index", index, size)
    return csr_from_index_reference(index, size)


def _csr_fake(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    torch._check(index.dim() == 1)
    return index.new_empty(size + 1), torch.empty_like(index)


define("csr_from_index(Tensor index, SymInt size) -> (Tensor, Tensor)", _csr_kernel, _csr_fake)


def csr_from_index(index: Tensor, size: int, name: str = "index") -> tuple[Tensor, Tensor]:
    """Group edges by segment: ``ptr`` [size + 1] and ``perm`` [E] with segment i = ``perm[ptr[i]:ptr[i + 1]]``.

    Args:
        index: the segment of each edge, int64 [E], unsorted.
        size: number of segments.
        name: what the error message calls ``index``.

    Returns:
        ``(ptr, perm)``, both int64; within a segment edges keep their order.

    Raises:
        IndexError: an entry is not in [0, size).

    Example:
        >>> import torch
        >>> from geo.ops import csr_from_index
        >>> ptr, perm = csr_from_index(torch.tensor([2, 0, 2]), 3)
        >>> ptr.tolist(), perm.tolist()
        ([0, 1, 1, 3], [1, 0, 2])
    """
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [E], got {index.dtype} {list(index.shape)}")
    try:
        checks = (("dst_index", index, size - 1),)
        ptr, perm = bounds.call("csr_from_index", torch.ops.geo.csr_from_index, (index, size), checks)
    except IndexError as err:  # the CPU kernel says index, the CUDA kernel dst_index
        raise IndexError(re.sub(r" (dst_)?index\[", f" {name}[", str(err))) from None
    return ptr, perm


def index_from_csr(ptr: Tensor, perm: Tensor | None, num_edges: int) -> Tensor:
    """The segment of each edge, int64 [E]: the inverse of :func:`csr_from_index`."""
    segments = torch.arange(ptr.size(0) - 1, device=ptr.device)
    rows = torch.repeat_interleave(segments, ptr.diff(), output_size=num_edges)
    return rows if perm is None else torch.empty_like(rows).scatter_(0, perm, rows)


def complete(
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
    num_src: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fill in what a backward pass needs and the forward call did not have: ``(dst_index, t_ptr, t_perm)``."""
    if dst_index is None:
        dst_index = index_from_csr(ptr, perm, src_index.size(0))
    if t_ptr is None:
        t_ptr, t_perm = torch.ops.geo.csr_from_index(src_index, num_src)
    return dst_index, t_ptr, t_perm


class SegmentPlan:
    r"""Edges grouped by target and, for the backward pass, by source.

    A reduction over the edges of each node reads them in CSR order: the edges of node ``i`` are
    ``perm[ptr[i]:ptr[i + 1]]``. Its gradient reads the same edges grouped by source. Both orders depend on the graph
    alone, so one plan serves all layers of a model and both passes. Nothing is copied or reordered: tensors with one
    row per edge stay in the order of ``index``.

    Args:
        index: the target of each edge, int64 [E], in any order.
        dim_size: number of targets N; by default ``index.max() + 1``, which waits for a GPU.
        src_index: the source of each edge, int64 [E]; needed for the orders of the backward pass.
        src_size: number of sources M (default: ``dim_size``).

    Attributes:
        index, src_index: as given.
        ptr: int64 [N + 1].
        perm: int64 [E], or None where ``index`` was already sorted.
        dim_size, src_size: N and M.

    Raises:
        IndexError: an entry of ``index`` or ``src_index`` is out of range.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import SegmentPlan
        >>> plan = SegmentPlan(torch.tensor([1, 0, 1]), dim_size=3)
        >>> plan.ptr.tolist(), plan.perm.tolist()
        ([0, 1, 3, 3], [1, 0, 2])
    """

    def __init__(
        self,
        index: Tensor,
        dim_size: int | None = None,
        src_index: Tensor | None = None,
        src_size: int | None = None,
    ) -> None:
        for name, value in (("index", index), ("src_index", src_index)):
            if value is not None and (value.dim() != 1 or value.dtype != torch.int64):
                raise ValueError(f"{name} must be int64 [E], got {value.dtype} {list(value.shape)}")
        if src_index is not None and src_index.size(0) != index.size(0):
            raise ValueError(f"src_index must have one entry per edge ({index.size(0)}), got {src_index.size(0)}")
        if dim_size is None:
            dim_size = int(index.max()) + 1 if index.numel() else 0
        self.index = index
        self.src_index = src_index
        self.dim_size = dim_size
        self.src_size = dim_size if src_size is None else src_size
        self.ptr, perm = csr_from_index(index, dim_size)
        self.perm: Tensor | None = None if _is_sorted(index) else perm
        self._transposed: tuple[Tensor, Tensor | None] | None = None

    @classmethod
    def from_edge_index(cls, edge_index: Tensor, num_nodes: int | tuple[int, int]) -> SegmentPlan:
        """The plan of a graph: row 0 of ``edge_index`` [2, E] holds sources, row 1 targets (PyG's order).

        ``num_nodes`` is the number of nodes, or (number of sources, number of targets) for a bipartite graph.
        """
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index must be [2, E], got {list(edge_index.shape)}")
        num_src, num_dst = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
        return cls(edge_index[1], num_dst, edge_index[0], num_src)

    def _transpose(self) -> tuple[Tensor, Tensor | None] | None:
        if self._transposed is None and self.src_index is not None:
            t_ptr, t_perm = csr_from_index(self.src_index, self.src_size, "src_index")
            self._transposed = (t_ptr, None if _is_sorted(self.src_index) else t_perm)
        return self._transposed

    @property
    def t_ptr(self) -> Tensor | None:
        """Like ``ptr``, by source: int64 [M + 1]; None without ``src_index``. Built at first use, then kept."""
        transposed = self._transpose()
        return None if transposed is None else transposed[0]

    @property
    def t_perm(self) -> Tensor | None:
        """Like ``perm``, by source: int64 [E], or None where ``src_index`` is sorted or was not given."""
        transposed = self._transpose()
        return None if transposed is None else transposed[1]

    @property
    def splits(self) -> Tensor:
        """The pieces that kernels cut hub segments into, int64 [K, 3]: (segment, first, last + 1) in CSR order.

        A segment of ``len >= 2 * HUB_CHUNK`` edges is summed as ``len // HUB_CHUNK`` pieces, the last one holding the
        remainder, and the pieces are then added in order. The rule reads ``ptr`` alone, so sums are bitwise the same
        on any number of threads; the kernels find the pieces themselves.
        """
        length = self.ptr.diff()
        count = torch.where(length >= 2 * HUB_CHUNK, length // HUB_CHUNK, 0)
        segment = torch.repeat_interleave(torch.arange(self.dim_size, device=count.device), count)
        piece = torch.arange(segment.size(0), device=count.device) - (count.cumsum(0) - count)[segment]
        begin = self.ptr[segment] + piece * HUB_CHUNK
        end = torch.where(piece + 1 == count[segment], self.ptr[segment + 1], begin + HUB_CHUNK)
        return torch.stack([segment, begin, end], dim=1)

    def to(self, device: torch.device | str) -> SegmentPlan:
        """The same plan on another device."""
        plan = SegmentPlan.__new__(SegmentPlan)
        plan.index, plan.ptr = self.index.to(device), self.ptr.to(device)
        plan.src_index = None if self.src_index is None else self.src_index.to(device)
        plan.perm = None if self.perm is None else self.perm.to(device)
        plan.dim_size, plan.src_size = self.dim_size, self.src_size
        plan._transposed = None
        if self._transposed is not None:
            t_ptr, t_perm = self._transposed
            plan._transposed = (t_ptr.to(device), None if t_perm is None else t_perm.to(device))
        return plan

    def __repr__(self) -> str:
        return f"SegmentPlan(num_edges={self.index.size(0)}, dim_size={self.dim_size}, src_size={self.src_size})"


def _is_sorted(index: Tensor) -> bool:
    """Whether the edges already stand in CSR order; not asked in a traced graph, where it would read values."""
    return not torch.compiler.is_compiling() and bool((index[1:] >= index[:-1]).all())
