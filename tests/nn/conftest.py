from __future__ import annotations

import pytest
import torch
from e3nn import o3

from geo.o3 import SphereGrid


@pytest.fixture
def representation():
    """D(irreps, g) of a rotation or a rotation with inversion."""

    def matrix(irreps: o3.Irreps, g: torch.Tensor) -> torch.Tensor:
        # by quadrature of Y(R u) = D(R) Y(u): e3nn goes through angles, which costs six digits
        turn, flip = g * torch.linalg.det(g), torch.linalg.det(g).round()
        blocks = []
        for mul, ir in irreps:
            grid = SphereGrid(2 * ir.l)
            here = o3.spherical_harmonics(ir.l, grid.points, True, "component")
            there = o3.spherical_harmonics(ir.l, grid.points @ turn.t(), True, "component")
            d = (there.t() * grid.weights) @ here
            blocks += [d if flip > 0 else ir.p * d] * mul
        return torch.block_diag(*blocks)

    return matrix
