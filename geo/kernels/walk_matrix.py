"""What decides whether random features exist on a matrix: its transpose, its spectral radius, its squared loads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo.ops import csr_from_index, gather_mul_segment_sum
from geo.ops.plan import index_from_csr
from geo.ops.walk_step import proposal_units

Matrix = tuple[Tensor, Tensor, Tensor]
_ONE = 2**32  # probabilities of steps are multiples of one over this


def transposed(rowptr: Tensor, col: Tensor, weight: Tensor) -> tuple[Matrix, bool]:
    """The transposed matrix, the same one where they are equal, and whether they differ."""
    t_ptr, t_perm = csr_from_index(col, rowptr.size(0) - 1)
    t_col = index_from_csr(rowptr, None, col.size(0))[t_perm]
    t_weight = weight[t_perm]
    tolerance = 8 * torch.finfo(weight.dtype).eps
    if torch.equal(t_ptr, rowptr) and torch.equal(t_col, col) and torch.allclose(t_weight, weight, tolerance, 0):
        return (rowptr, col, weight), False
    return (t_ptr, t_col, t_weight), True


def spectral_radius(rowptr: Tensor, col: Tensor, weight: Tensor) -> float:
    """Of a matrix without negative entries, by power iteration in float64."""
    x = torch.ones(rowptr.size(0) - 1, 1, dtype=torch.float64, device=col.device)
    weight = weight.double().unsqueeze(1)
    growth: list[float] = []
    before = math.inf
    for _ in range(25):
        for _ in range(12):  # means over twelve steps do not see the periods of bipartite graphs and short cycles
            y = gather_mul_segment_sum(x, weight, col, rowptr)
            size, old = float(y.norm()), float(x.norm())
            if size == 0:
                return 0.0
            growth.append(math.log(size / old))
            x = y / size
        now = math.exp(sum(growth[-12:]) / 12)
        if abs(now - before) <= 1e-9 * now:
            break
        before = now
    return now


def step_squares(matrix: Matrix, proposal: str) -> Tensor:
    """The squared entries over the probabilities of the steps along them, float64 [E]."""
    rowptr, _, weight = matrix
    weight = weight.detach()
    if proposal == "uniform":
        degree = rowptr.diff().repeat_interleave(rowptr.diff(), output_size=weight.size(0))
        return weight.double().square() * degree
    until = proposal_units(rowptr, weight)
    before = torch.cat([until.new_zeros(1), until[:-1]])
    before[rowptr[:-1][rowptr.diff() > 0]] = 0
    probability = (until - before).double() / _ONE
    return torch.where(probability > 0, weight.double().square() / probability, 0)
