"""The product of two sparse matrices as a matrix: what is asked of it is computed, no more."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.kernels.features import SparseFeatures
from geo.ops import segment_sum_csr

_CHUNK = 2**24  # entries of a dense block that is worked on at a time


class Estimate(NamedTuple):
    r"""The matrix :math:`s R (\Phi_1 \Phi_2^\top + E) C`, with diagonal E, R and C."""

    phi1: SparseFeatures
    phi2: SparseFeatures
    extra: Tensor | None  # E, zero if None
    sides: tuple[Tensor, Tensor] | None  # R and C, one if None
    scale: float
    symmetrise: bool  # the product and its transpose, halved

    def matmul(self, v: Tensor) -> Tensor:
        """The product with v [N, ...]."""
        column = (-1,) + (1,) * (v.dim() - 1)
        v = v if self.sides is None else self.sides[1].view(column) * v
        out = self.phi1.matmul(self.phi2.t_matmul(v))
        if self.symmetrise and self.phi2 is not self.phi1:
            out = (out + self.phi2.matmul(self.phi1.t_matmul(v))) / 2
        if self.extra is not None:
            out = out + self.extra.view(column) * v
        if self.sides is not None:
            out = self.sides[0].view(column) * out
        product: Tensor = self.scale * out
        return product

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The entries of all pairs, [R, C]."""

        def product(left: SparseFeatures, right: SparseFeatures) -> Tensor:
            chosen = left.select_rows(rows)
            parts = columns.split(max(_CHUNK // max(right.num_cols, 1), 1))
            return torch.cat([chosen.matmul(right.select_rows(part).to_dense().t()) for part in parts], dim=1)

        out = product(self.phi1, self.phi2)
        if self.symmetrise and self.phi2 is not self.phi1:
            out = (out + product(self.phi2, self.phi1)) / 2
        return self._finished(out, rows.unsqueeze(1), columns)

    def entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """One entry for each pair, [R] with R rows and columns."""
        out = _dots(self.phi1, rows, self.phi2, columns)
        if self.symmetrise and self.phi2 is not self.phi1:
            out = (out + _dots(self.phi2, rows, self.phi1, columns)) / 2
        return self._finished(out, rows, columns)

    def _finished(self, out: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if self.extra is not None:
            out = out + torch.where(rows == columns, self.extra[rows], 0)
        if self.sides is not None:
            out = self.sides[0][rows] * out * self.sides[1][columns]
        finished: Tensor = self.scale * out
        return finished


def places_of(index: Any, num_nodes: int, device: torch.device) -> Tensor:
    """The nodes that one index of a matrix means."""
    if isinstance(index, tuple) or index is None or index is Ellipsis:
        raise IndexError(f"a kernel is indexed by one or two integers, slices, lists or tensors, got {index!r}")
    if isinstance(index, slice):
        return torch.arange(num_nodes, device=device)[index]
    place = torch.as_tensor(index, device=device)
    if place.dtype == torch.bool:
        if place.shape != (num_nodes,):
            raise IndexError(f"a mask must have {num_nodes} entries, got {list(place.shape)}")
        return place.nonzero().flatten()
    if place.numel() == 0:
        return place.long()
    if place.is_floating_point():
        raise IndexError(f"an index must be an integer, got {place.dtype}")
    low, high = int(place.min()), int(place.max())
    if low < -num_nodes or high >= num_nodes:
        bad = low if low < -num_nodes else high
        raise IndexError(f"node {bad} is out of range for a kernel of {num_nodes} nodes")
    return torch.where(place < 0, place + num_nodes, place).long()


def row_sums(ptr: Tensor, value: Tensor) -> Tensor:
    """The sum of each row's values."""
    out: Tensor = segment_sum_csr(value, ptr)
    return out


def row_dots(left: SparseFeatures, right: SparseFeatures) -> Tensor:
    """The dot product of each row with the same row of a matrix of the same pattern."""
    return row_sums(left.ptr, left.value * right.value)


def _dots(left: SparseFeatures, i: Tensor, right: SparseFeatures, j: Tensor) -> Tensor:
    """The dot product of row i[k] of one matrix with row j[k] of another, for each k."""
    chosen = left.select_rows(i)
    if chosen.col.size(0) == 0 or right.col.size(0) == 0:
        return left.value.new_zeros(i.size(0))
    place = right.row * right.num_cols + right.col  # ascending
    wanted = j[chosen.row] * right.num_cols + chosen.col
    at = torch.searchsorted(place, wanted).clamp(max=place.size(0) - 1)
    product = torch.where(place[at] == wanted, chosen.value * right.value[at], 0)
    return row_sums(chosen.ptr, product)
