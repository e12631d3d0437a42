from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from geo.o3 import orientation_points, quadrature_weights, random_rotations, rotation_frames
from geo.o3.grids import STORED_SIZES, repulsion_points

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("num", STORED_SIZES)
def test_stored_points_are_unit_distinct_and_nearly_tight(num):
    n = orientation_points(3, num)
    assert n.dtype == torch.float64
    assert n.shape == (num, 3)
    assert (n.norm(dim=1) - 1).abs().max() < 1e-12
    frame = (n.t() @ n / num - torch.eye(3) / 3).norm()
    assert frame < 0.03
    away = torch.cdist(n, n) + 9 * torch.eye(num)
    assert away.min() > 2.9 / math.sqrt(num)
    # Converged: the force on each point has no part along the sphere.
    diff = n[:, None] - n[None]
    square = diff.square().sum(-1) + torch.eye(num)
    force = (diff / square.square()[..., None]).sum(1)
    along = force - (force * n).sum(1, keepdim=True) * n
    assert along.norm(dim=1).max() < 1e-4 * force.norm(dim=1).max()


def test_stored_points_are_what_the_code_computes():
    energy = lambda p: float(sum(1 / np.square(a - b).sum() for a, b in itertools.combinations(p, 2)))  # noqa: E731
    assert energy(repulsion_points(6)) == pytest.approx(energy(orientation_points(3, 6).numpy()), rel=1e-9)


def test_converged_12_is_the_icosahedron():
    for kind in ("repulsion", "platonic"):
        n = orientation_points(3, 12, kind)
        cosines = (n @ n.t()).flatten().sort().values
        expected = torch.tensor([-1.0] * 12 + [-1 / math.sqrt(5)] * 60 + [1 / math.sqrt(5)] * 60 + [1.0] * 12)
        assert (cosines - expected).abs().max() < 1e-7


@pytest.mark.parametrize("num", [4, 6, 8, 12, 20])
def test_platonic_solids_are_regular_and_tight(num):
    n = orientation_points(3, num, "platonic")
    assert (n.t() @ n / num - torch.eye(3) / 3).abs().max() < 1e-12
    assert n.sum(0).abs().max() < 1e-12
    nearest = (n @ n.t() - 2 * torch.eye(num)).max(1).values
    assert (nearest - nearest[0]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["repulsion", "fibonacci", "random", "platonic"])
@pytest.mark.parametrize("dim", [2, 3])
def test_same_on_every_call_and_antipodal(kind, dim):
    a = orientation_points(dim, 12, kind)
    a[0] = 0  # what is handed out may be changed without harm
    b = orientation_points(dim, 12, kind)
    assert torch.equal(b, orientation_points(dim, 12, kind))
    assert (b.norm(dim=1) - 1).abs().max() < 1e-12
    both = orientation_points(dim, 12, kind, antipodal=True)
    assert torch.allclose(both[6:], -both[:6])
    assert len({tuple(row) for row in (both * 1e6).round().tolist()}) == 12


def test_seeds():
    for kind in ("random", "repulsion"):
        assert not torch.allclose(orientation_points(3, 9, kind, seed=1), orientation_points(3, 9, kind, seed=2))


def test_circle_is_equispaced():
    n = orientation_points(2, 5)
    angle = torch.atan2(n[:, 1], n[:, 0]) % (2 * math.pi)
    assert (angle - torch.arange(5) * 2 * math.pi / 5).abs().max() < 1e-12


@pytest.mark.parametrize("order", [12, 24, 60])
def test_rotation_groups_are_closed(order):
    group = rotation_frames(3, order)
    assert group.shape == (order, 3, 3)
    assert (torch.linalg.det(group) - 1).abs().max() < 1e-12
    assert (group[0] - torch.eye(3)).abs().max() < 1e-12
    products = (group[:, None] @ group[None]).reshape(-1, 9)
    gap = (products[:, None] - group.reshape(1, -1, 9)).abs().amax(-1)
    assert gap.min(1).values.max() < 1e-12


def test_rotations_are_haar():
    """First and second moments of a matrix entry under Haar measure: 0 and 1/n."""
    for dim in (2, 3):
        r = random_rotations(20000, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert (r @ r.transpose(1, 2) - torch.eye(dim)).abs().max() < 1e-12
        assert (torch.linalg.det(r) - 1).abs().max() < 1e-12
        assert r.mean(0).abs().max() < 0.02
        assert (r.square().mean(0) - 1 / dim).abs().max() < 0.02
    for dim in (2, 3):
        f = rotation_frames(dim, 7, "random", seed=3)
        assert torch.equal(f, rotation_frames(dim, 7, "random", seed=3))
        assert (f @ f.transpose(1, 2) - torch.eye(dim)).abs().max() < 1e-12


def test_quadrature_weights_integrate():
    for kind, num in (("fibonacci", 16), ("random", 64), ("repulsion", 20)):
        n = orientation_points(3, num, kind)
        w = quadrature_weights(n)
        assert w.min() > 0
        assert float(w.sum()) == pytest.approx(1, abs=1e-12)
        if kind != "random":
            assert torch.einsum("o,oa,ob->ab", w, n, n).sub(torch.eye(3) / 3).abs().max() < 1e-9
            uniform = n.t() @ n / num - torch.eye(3) / 3
            assert uniform.abs().max() > 1e-4  # which equal weights do not
    for num in (12, 20, 6):
        assert torch.equal(
            quadrature_weights(orientation_points(3, num, "platonic")), torch.full((num,), 1 / num).double()
        )
    n = orientation_points(2, 40, "random")
    w = quadrature_weights(n)
    assert float(w.sum()) == pytest.approx(1)
    assert (w @ n).norm() < (n.mean(0)).norm()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: orientation_points(4, 8), "dim is 4"),
        (lambda: orientation_points(3, 0), "num_ori is 0"),
        (lambda: orientation_points(3, 2.5), "num_ori is 2.5"),
        (lambda: orientation_points(3, 7, antipodal=True), "must be even"),
        (lambda: orientation_points(3, 7, "platonic"), "num_ori is 7"),
        (lambda: orientation_points(3, 4, "platonic", antipodal=True), "tetrahedron"),
        (lambda: orientation_points(3, 7, "cube"), "kind is 'cube'"),
        (lambda: rotation_frames(3, 10), "num_ori is 10"),
        (lambda: rotation_frames(3, 12, "repulsion"), "kind is 'repulsion'"),
        (lambda: rotation_frames(1, 12), "dim is 1"),
        (lambda: random_rotations(3, 4), "dim is 4"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
