from __future__ import annotations

import pytest
import torch

from geo.nn import FrameGrid, OrientationGrid
from geo.testing import assert_state_dict_roundtrip, random_rotations

GRIDS = [
    lambda: OrientationGrid(3, 20),
    lambda: OrientationGrid(3, 7, "random", seed=4),
    lambda: OrientationGrid(3, 17, "fibonacci"),
    lambda: OrientationGrid(3, 12, "platonic", antipodal=True),
    lambda: OrientationGrid(2, 5),
    lambda: OrientationGrid(2, 6, "random"),
    lambda: FrameGrid(3, 24),
    lambda: FrameGrid(3, 5, "random"),
    lambda: FrameGrid(2, 7),
]


@pytest.mark.parametrize("make", GRIDS)
def test_round_trip_is_exact(make):
    grid = make()
    v, s = torch.randn(6, 2, grid.dim).double(), torch.randn(6, 3).double()
    lifted = grid.lift(s, v)
    assert lifted.shape == (6, grid.num_ori, 3 + 2 * grid.vec_factor)
    assert (grid.vector(lifted[..., 3:]) - v).abs().max() < 1e-12
    assert (grid.scalar(lifted[..., :3]) - s).abs().max() < 1e-12
    assert torch.equal(grid.lift(vec=v), lifted[..., 3:])
    assert abs(float(grid.weight.sum()) - 1) < 1e-12


def test_the_naive_readout_is_off_and_the_dual_is_not():
    v = torch.randn(50, 1, 3).double()
    naive = OrientationGrid(3, 14, "fibonacci", dual=False)
    naive.weight.fill_(1 / 14)
    error = (naive.vector(naive.lift(vec=v)) - v).abs().max()
    assert error > 1e-2


@pytest.mark.parametrize("make", GRIDS)
def test_rotated(make):
    grid = make()
    rotations = random_rotations(3, grid.dim)
    turned = grid.rotated(rotations)
    assert turned.shape == (3, *grid.ori.shape)
    assert torch.allclose(turned[1], grid.rotated(rotations[1]))
    v = torch.randn(4, 2, grid.dim).double()
    u = grid.lift(vec=v)
    once = make()
    once.ori.copy_(turned[0])
    if isinstance(once, OrientationGrid):
        once.dual.copy_(grid.dual @ rotations[0].t())
    assert torch.allclose(once.vector(u), grid.vector(u) @ rotations[0].t())


def test_the_grid_is_saved():
    def make():
        seed = int(torch.randint(1000, (1,)))
        return OrientationGrid(3, 10, "random", seed=seed)

    v = torch.randn(4, 2, 3)
    assert_state_dict_roundtrip(make, lambda grid: grid.lift(vec=v))
    assert set(OrientationGrid().state_dict()) == {"ori", "dual", "weight"}


def test_too_few_orientations_do_not_span():
    assert not OrientationGrid(3, 2, "fibonacci").spans
    assert not OrientationGrid(2, 2).spans
    assert OrientationGrid(3, 4).spans
    assert OrientationGrid(2, 3).spans


def test_refusals_and_repr():
    with pytest.raises(ValueError, match="kind is 'cube'"):
        OrientationGrid(3, 12, "cube")
    with pytest.raises(ValueError, match="num_ori is 10"):
        FrameGrid(3, 10)
    with pytest.raises(ValueError, match="neither"):
        OrientationGrid().lift()
    with pytest.raises(ValueError, match="neither"):
        FrameGrid().lift()
    assert repr(OrientationGrid(3, 12)) == "OrientationGrid(dim=3, num_ori=12, kind='repulsion')"
    assert repr(FrameGrid(3, 12)) == "FrameGrid(dim=3, num_ori=12, kind='platonic')"
