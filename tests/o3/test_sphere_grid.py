from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3 as e3nn_o3

from geo.o3 import SphereGrid, from_grid, to_grid
from geo.ops.gaunt import gaunt_product
from geo.testing import assert_close

F64 = torch.float64


@pytest.mark.parametrize("degree", [0, 1, 2, 5, 6, 12])
@pytest.mark.parametrize("octant", [False, True])
def test_harmonics_are_e3nns_and_orthonormal(degree, octant):
    grid = SphereGrid(degree, octant)
    lmax = degree // 2
    Y = grid.to_matrix(lmax)
    assert Y.dtype == grid.points.dtype == grid.weights.dtype == F64
    theirs = e3nn_o3.spherical_harmonics(list(range(lmax + 1)), grid.points, True, "component")
    assert_close(Y, theirs)
    assert ((Y.t() * grid.weights) @ Y - torch.eye(Y.size(1))).abs().max() < 1e-13
    assert abs(float(grid.weights.sum()) - 1) < 1e-14
    assert (grid.points.norm(dim=1) - 1).abs().max() < 1e-14
    assert grid.weights.min() > 0


def test_sizes():
    """The counts of the paper's table, and of the symmetric variant."""
    assert [len(SphereGrid(3 * l)) for l in range(2, 7)] == [28, 50, 91, 128, 190]
    assert [len(SphereGrid(4 * l)) for l in (2, 3)] == [45, 91]
    assert [len(SphereGrid(3 * l, octant=True)) // 8 for l in (2, 3, 4)] == [4, 9, 16]
    assert "num_polar=4, num_azimuth=7" in repr(SphereGrid(6))


def test_octant_grid_is_symmetric():
    grid = SphereGrid(9, octant=True)
    assert grid.points.abs().min() > 1e-3
    eighth = (grid.points > 0).all(1)
    assert int(eighth.sum()) * 8 == len(grid)
    for axis in range(3):
        mirrored = grid.points.clone()
        mirrored[:, axis] *= -1
        distance = torch.cdist(mirrored, grid.points)
        assert distance.min(1).values.max() < 1e-7  # cdist squares
        assert (grid.weights[distance.argmin(1)] - grid.weights).abs().max() < 1e-15
    plain = SphereGrid(8).points
    assert torch.cdist(plain * torch.tensor([1, 1, -1.0]), plain).min(1).values.max() > 0.01


def test_gradients_by_autograd():
    grid = SphereGrid(7)
    lmax = 3
    polar, azimuth = grid.gradient_matrices(lmax)
    ambient = torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda u: e3nn_o3.spherical_harmonics(list(range(lmax + 1)), u, True, "component"), u
            )
            for u in grid.points
        ]
    )
    u = grid.points
    pole = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    e_polar = torch.nn.functional.normalize(u * u[:, 1:2] - pole, dim=1)
    e_azimuth = torch.linalg.cross(u, e_polar)
    assert_close(polar, torch.einsum("nka,na->nk", ambient, e_polar))
    assert_close(azimuth, torch.einsum("nka,na->nk", ambient, e_azimuth))


@pytest.mark.parametrize("degree", [1, 2, 5, 8])
def test_exact_at_the_bound_and_wrong_one_node_below(degree):
    fewest = (degree // 2 + 1, degree + 1)
    grid = SphereGrid(degree, num_polar=fewest[0], num_azimuth=fewest[1])
    mean = grid.weights @ grid.to_matrix(degree)
    mean[0] -= 1
    assert mean.abs().max() < 1e-13
    if degree > 1:
        with pytest.raises(
            ValueError, match=rf"num_polar is {fewest[0] - 1}, but degree {degree} is integrated exactly"
        ):
            SphereGrid(degree, num_polar=fewest[0] - 1)
        coarse = SphereGrid(degree - 2, num_polar=fewest[0] - 1, num_azimuth=fewest[1])
        mean = coarse.weights @ coarse.to_matrix(degree)
        assert mean[1:].abs().max() > 0.1
    with pytest.raises(ValueError, match=rf"num_azimuth is {degree}, but degree {degree} is integrated exactly from"):
        SphereGrid(degree, num_azimuth=degree)
    coarse = SphereGrid(degree - 1, num_polar=fewest[0], num_azimuth=degree)
    mean = coarse.weights @ coarse.to_matrix(degree)
    assert mean[1:].abs().max() > 0.1


@pytest.mark.parametrize("octant", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2), (2, 3, 5), (6, 7, 11)])
def test_product_on_the_grid(sizes, octant):
    """The product of functions is exact on the grid of its degree, and wrong with one node fewer either way."""
    lmax1, lmax2, lmax3 = sizes
    degree = sum(sizes)
    x, y = torch.randn(3, (lmax1 + 1) ** 2, 2, dtype=F64), torch.randn(3, (lmax2 + 1) ** 2, 2, dtype=F64)
    expected = gaunt_product(x, y, lmax3)

    def product(grid):
        values = to_grid(x, grid) * to_grid(y, grid)
        back = (grid.to_matrix(lmax3) * grid.weights[:, None]).t()
        return torch.matmul(back, values)

    grid = SphereGrid(degree, octant)
    assert (product(grid) - expected).abs().max() < 1e-11
    assert_close(product(grid), from_grid(to_grid(x, grid) * to_grid(y, grid), grid, lmax3))
    fewer_polar = SphereGrid(2 * (degree // 2) - 1, num_azimuth=degree + 1)
    assert (fewer_polar.num_polar, fewer_polar.num_azimuth) == (degree // 2, degree + 1)
    assert (product(fewer_polar) - expected).abs().max() > 1e-2
    fewer_azimuth = SphereGrid(degree - 1, num_polar=degree // 2 + 1)
    assert (fewer_azimuth.num_polar, fewer_azimuth.num_azimuth) == (degree // 2 + 1, degree)
    assert (product(fewer_azimuth) - expected).abs().max() > 1e-2


def test_e3nn_grid_agrees(double):
    """e3nn's own transforms, equiangular with twice the polar angles, in their 'integral' normalisation."""
    lmax = 2
    to = e3nn_o3.ToS2Grid(lmax, (8, 7), normalization="integral", dtype=F64)
    back = e3nn_o3.FromS2Grid((8, 7), lmax, normalization="integral", dtype=F64)
    x, y = torch.randn(4, 9, dtype=F64), torch.randn(4, 9, dtype=F64)
    theirs = math.sqrt(4 * math.pi) * back(to(x) * to(y))
    ours = gaunt_product(x[..., None], y[..., None], lmax)[..., 0]
    assert_close(ours, theirs)


def test_refusals():
    for degree in (-1, 2.0, True):
        with pytest.raises(ValueError, match="degree is"):
            SphereGrid(degree)
    with pytest.raises(ValueError, match="octant=True needs an even num_polar"):
        SphereGrid(4, octant=True, num_polar=5)
    with pytest.raises(ValueError, match="at least one angle"):
        SphereGrid(0, num_polar=0)
    grid = SphereGrid(4)
    with pytest.raises(ValueError, match="lmax is -1"):
        grid.to_matrix(-1)
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 1\)"):
        to_grid(torch.ones(2, 5, 1), grid)
    with pytest.raises(ValueError, match=r"f has shape \(3, 1\), but must be \(\.\.\., 15, C\)"):
        from_grid(torch.ones(3, 1), grid, 2)
    with pytest.raises(ValueError, match="lmax is 3, but a grid of degree 4 resolves degrees up to 2"):
        from_grid(torch.ones(15, 1), grid, 3)
