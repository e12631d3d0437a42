from __future__ import annotations

import pytest
import torch
from e3nn import o3

from geo.o3 import SphereGrid, solid_harmonics
from geo.testing import assert_close, check_compile, check_derivatives

F64 = torch.float64


@pytest.mark.parametrize("lmax", [0, 1, 4, 8])
def test_equals_e3nn(lmax):
    vec = torch.randn(3, 7, 3, dtype=F64)
    expected = o3.spherical_harmonics(list(range(lmax + 1)), vec, False, "component")
    out = solid_harmonics(vec, lmax)
    assert out.shape == (3, 7, (lmax + 1) ** 2)
    assert (out - expected).abs().max() < 1e-12 * max(1, expected.abs().max())


def test_equals_the_grid_at_a_high_degree():
    grid = SphereGrid(60)
    assert (solid_harmonics(grid.points, 30) - grid.to_matrix(30)).abs().max() < 1e-11


def test_derivatives_also_at_zero():
    vec = torch.stack((torch.zeros(3), torch.tensor([0.0, 1.3, 0.0]), torch.randn(3))).double()
    check_derivatives(lambda v: solid_harmonics(v, 4), [vec])
    hessian = torch.autograd.functional.hessian(lambda v: solid_harmonics(v, 2)[6], torch.zeros(3, dtype=F64))
    assert_close(hessian, torch.diag(torch.tensor([-1.0, 2.0, -1.0], dtype=F64)) * 5**0.5)


def test_compile_and_no_vectors():
    check_compile(lambda v: solid_harmonics(v, 3), (torch.randn(4, 3),))
    assert solid_harmonics(torch.ones(0, 3), 2).shape == (0, 9)


@pytest.mark.parametrize(
    ("vec", "lmax", "words"),
    [
        (torch.ones(4, 2), 1, r"vec has shape \(4, 2\), but must be \(\.\.\., 3\)"),
        (torch.ones(3), -1, "lmax is -1"),
        (torch.ones(3), True, "lmax is True"),
    ],
)
def test_refusals(vec, lmax, words):
    with pytest.raises(ValueError, match=words):
        solid_harmonics(vec, lmax)
