from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from geo.o3 import (
    grid_invariants,
    num_grid_invariants,
    num_pair_invariants,
    orientation_points,
    pair_invariants,
    rotation_frames,
    safe_norm,
)
from geo.o3.invariants import zero_invariants
from geo.testing import check_derivatives, random_rotations

F64 = torch.float64
ALL = [
    ("R2", "universal"),
    ("R3", "universal"),
    ("R2xS1", "universal"),
    ("R2xS1", "ponita"),
    ("R3xS2", "universal"),
    ("R3xS2", "ponita"),
    ("R3xS2", "chiral"),
    ("SE2", "universal"),
    ("SE3", "universal"),
]


def dim_of(space: str) -> int:
    return 2 if space in ("R2", "R2xS1", "SE2") else 3


def draw(space: str, num: int = 12, seed: int = 0):
    """Random points of the space, all pairs but loops as edges, and shifts of the senders."""
    generator = torch.Generator().manual_seed(seed)
    n = dim_of(space)
    pos = torch.randn(num, n, dtype=F64, generator=generator)
    ori = None
    if "S" in space:
        ori = random_rotations(num, n, seed=seed)
        ori = ori if space.startswith("SE") else ori[..., 0].contiguous()
    pairs = torch.combinations(torch.arange(num)).t()
    edge_index = torch.cat((pairs, pairs.flip(0)), 1)
    shift = torch.randn(edge_index.size(1), n, dtype=F64, generator=generator)
    return pos, edge_index, ori, shift


def act(g: torch.Tensor, ori: torch.Tensor | None) -> torch.Tensor | None:
    if ori is None:
        return None
    return g @ ori if ori.dim() == 3 else ori @ g.t()


@pytest.mark.parametrize(("space", "kind"), ALL)
def test_invariant_under_the_group(space, kind):
    pos, edge_index, ori, shift = draw(space)
    expected = pair_invariants(space, pos, edge_index, ori, kind, shift)
    assert expected.shape == (edge_index.size(1), num_pair_invariants(space, kind))
    for k, g in enumerate(random_rotations(100, dim_of(space), seed=7)):
        t = torch.randn(dim_of(space), dtype=F64)
        moved = pair_invariants(space, pos @ g.t() + t, edge_index, act(g, ori), kind, shift @ g.t())
        assert (moved - expected).abs().max() < 1e-12 * max(1, float(expected.abs().max())), (space, kind, k)


@pytest.mark.parametrize("kind", ["ponita", "universal", "chiral"])
def test_reflection_flips_the_last_chiral_column_alone(kind):
    pos, edge_index, ori, shift = draw("R3xS2")
    expected = pair_invariants("R3xS2", pos, edge_index, ori, kind, shift)
    if kind == "chiral":
        assert expected[:, 4].abs().min() > 1e-6
        expected = expected * torch.tensor([1.0, 1, 1, 1, -1], dtype=F64)
    for g in random_rotations(20, 3, reflect=True, seed=3):
        mirrored = pair_invariants("R3xS2", pos @ g.t(), edge_index, ori @ g.t(), kind, shift @ g.t())
        torch.testing.assert_close(mirrored, expected, rtol=1e-11, atol=1e-12)


def test_column_order_by_hand():
    pos = torch.tensor([[0.0, 0, 0], [1, 2, 3]], dtype=F64)
    ori = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=F64)
    edge = torch.tensor([[1], [0]])  # from 1 to 0: r = (1, 2, 3), n_i = z, n_j = x
    assert pair_invariants("R3xS2", pos, edge, ori).tolist() == [[3, 1, 14, 0]]
    assert pair_invariants("R3xS2", pos, edge, ori, "chiral").tolist() == [[3, 1, 14, 0, 2]]  # r . (z x x) = r . y
    assert torch.allclose(
        pair_invariants("R3xS2", pos, edge, ori, "ponita"), torch.tensor([[3, math.sqrt(5), 0]], dtype=F64)
    )
    assert torch.allclose(pair_invariants("R3", pos, edge), torch.tensor([[math.sqrt(14)]], dtype=F64))
    shift = torch.tensor([[-1.0, -2, 1]], dtype=F64)
    assert pair_invariants("R3", pos, edge, edge_shift=shift).tolist() == [[4]]
    flat, east, north = pos[:, :2], torch.tensor([[1.0, 0]], dtype=F64), torch.tensor([[0.0, 1]], dtype=F64)
    two = pair_invariants("R2xS1", flat, edge, torch.cat((east, north)))
    assert two.tolist() == [[1, 2, 0, 1]]  # r in the frame of node 0, cos 90, sin 90
    assert pair_invariants("R2xS1", flat, edge, torch.cat((north, east))).tolist() == [[2, -1, 0, -1]]


def kabsch_residual(a: np.ndarray, b: np.ndarray, proper: bool) -> float:
    """How far the best rotation (or, with ``proper=False``, rotation or reflection) leaves the rows of a from b."""
    u, _, vt = np.linalg.svd(a.T @ b)
    sign = np.sign(np.linalg.det(u @ vt)) if proper else 1.0
    rotation = u @ np.diag([1.0, 1.0, sign]) @ vt
    return float(np.abs(a @ rotation - b).max())


def pair(r: np.ndarray, n_i: np.ndarray, n_j: np.ndarray, kind: str) -> np.ndarray:
    pos = torch.from_numpy(np.stack((np.zeros(3), r)))
    return pair_invariants("R3xS2", pos, torch.tensor([[1], [0]]), torch.from_numpy(np.stack((n_i, n_j))), kind)[0]


def test_universal_separates_exactly_what_alignment_separates():
    rng = np.random.default_rng(0)
    seen = {"same": 0, "mirror": 0, "other": 0}
    for trial in range(300):
        r, n_i, n_j = rng.normal(size=(3, 3))
        n_i, n_j = n_i / np.linalg.norm(n_i), n_j / np.linalg.norm(n_j)
        first = np.stack((r, n_i, n_j))
        rotation = random_rotations(1, 3, reflect=trial % 3 == 1, seed=trial)[0].numpy()
        second = first @ rotation.T
        if trial % 3 == 2:  # a third keeps r.n_i, |r| and n_i.n_j, but turns n_j about n_i
            angle, axis = rng.uniform(0.2, 3.0), n_i
            turned = (
                n_j * np.cos(angle) + np.cross(axis, n_j) * np.sin(angle) + axis * (axis @ n_j) * (1 - np.cos(angle))
            )
            second = np.stack((r, n_i, turned)) @ rotation.T
        free, proper = (kabsch_residual(first, second, p) < 1e-9 for p in (False, True))
        seen["same" if proper else "mirror" if free else "other"] += 1
        gap = {
            kind: float((pair(*first, kind) - pair(*second, kind)).abs().max())
            for kind in ("universal", "chiral", "ponita")
        }
        assert (gap["universal"] < 1e-9) == free
        assert (gap["chiral"] < 1e-9) == proper
        assert gap["ponita"] < 1e-9  # blind to all of this
    assert min(seen.values()) >= 90


def counterexample() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    polar = 1.0
    n_j = [
        np.array([math.sin(polar) * math.cos(psi), math.sin(polar) * math.sin(psi), math.cos(polar)])
        for psi in (0.3, 2.0)
    ]
    return np.array([1.0, 0.0, 0.5]), np.array([0.0, 0.0, 1.0]), n_j


def test_the_papers_three_numbers_do_not_separate_and_the_four_do():
    r, n_i, n_j = counterexample()
    assert kabsch_residual(np.stack((r, n_i, n_j[0])), np.stack((r, n_i, n_j[1])), proper=False) > 0.1
    gap = (pair(r, n_i, n_j[0], "ponita") - pair(r, n_i, n_j[1], "ponita")).abs().max()
    assert gap < 1e-15
    universal = [pair(r, n_i, n, "universal") for n in n_j]
    assert universal[0][1] == pytest.approx(1.074, abs=1e-3)
    assert universal[1][1] == pytest.approx(-0.080, abs=1e-3)


@pytest.mark.xfail(strict=True, reason="the paper's three invariants are not complete: the A1 counterexample")
def test_ponita_separates():
    r, n_i, n_j = counterexample()
    assert (pair(r, n_i, n_j[0], "ponita") - pair(r, n_i, n_j[1], "ponita")).abs().max() > 1e-3


def test_chirality():
    polar, psi, r, n_i = 1.0, 0.3, np.array([1.0, 0, 0.5]), np.array([0.0, 0, 1])
    n_j = [
        np.array([math.sin(polar) * math.cos(p), math.sin(polar) * math.sin(p), math.cos(polar)]) for p in (psi, -psi)
    ]
    assert (pair(r, n_i, n_j[0], "universal") - pair(r, n_i, n_j[1], "universal")).abs().max() < 1e-15
    tau = [float(pair(r, n_i, n, "chiral")[4]) for n in n_j]
    assert tau[0] == pytest.approx(-tau[1])
    assert abs(tau[0]) == pytest.approx(0.249, abs=1e-3)


@pytest.mark.parametrize("space", ["SE2", "SE3", "R2xS1"])
def test_frames_recover_the_relative_pose(space):
    pos, edge_index, ori, _ = draw(space)
    n = dim_of(space)
    frames = ori
    if space == "R2xS1":
        frames = torch.stack((ori, torch.stack((-ori[:, 1], ori[:, 0]), 1)), 2)
    pose = torch.zeros(len(pos), n + 1, n + 1, dtype=F64)
    pose[:, :n, :n], pose[:, :n, n], pose[:, n, n] = frames, pos, 1
    relative = torch.linalg.inv(pose[edge_index[1]]) @ pose[edge_index[0]]
    attr = pair_invariants(space, pos, edge_index, ori)
    torch.testing.assert_close(attr[:, :n], relative[:, :n, n], rtol=1e-12, atol=1e-12)
    if n == 3:
        turn = attr[:, 3:].view(-1, 3, 3)
    else:
        c, s = attr[:, 2], attr[:, 3]
        turn = torch.stack((torch.stack((c, -s), 1), torch.stack((s, c), 1)), 1)
    torch.testing.assert_close(turn, relative[:, :n, :n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        ("R2xS1", "universal"),
        ("R2xS1", "ponita"),
        ("R3xS2", "universal"),
        ("R3xS2", "chiral"),
        ("SE2", "universal"),
        ("SE3", "universal"),
    ],
)
def test_full_grid_is_pair_invariants_on_all_orientations(space, kind):
    pos, edge_index, _, shift = draw(space, num=4)
    n = dim_of(space)
    grid = rotation_frames(n, 12) if space.startswith("SE") else orientation_points(n, 5)
    attr, fiber = grid_invariants(space, pos, edge_index, grid, kind, separable=False, edge_shift=shift)
    assert fiber is None
    for p in range(len(grid)):
        for o in range(len(grid)):
            both = torch.cat((pos, pos))  # senders carry orientation o, receivers orientation p
            ori = torch.cat((grid[o].expand(4, *grid.shape[1:]), grid[p].expand(4, *grid.shape[1:])))
            edges = torch.stack((edge_index[0], edge_index[1] + 4))
            expected = pair_invariants(space, both, edges, ori, kind, shift)
            torch.testing.assert_close(attr[:, p, o], expected, rtol=1e-12, atol=1e-12)
    zero = zero_invariants(space, grid, kind, separable=False)
    loops = torch.zeros(2, 1, dtype=torch.int64)
    torch.testing.assert_close(zero, grid_invariants(space, pos, loops, grid, kind, separable=False)[0])


def test_separable_attributes_by_hand():
    pos = torch.tensor([[0.0, 0, 0], [1, 2, 2]], dtype=F64)
    edge = torch.tensor([[1], [0]])
    grid = torch.eye(3, dtype=F64)
    attr, fiber = grid_invariants("R3xS2", pos, edge, grid)
    assert attr.tolist() == [[[1, 3], [2, 3], [2, 3]]]
    assert fiber.squeeze(-1).tolist() == grid.tolist()
    paper, _ = grid_invariants("R3xS2", pos, edge, grid, "ponita")
    assert torch.allclose(paper[0, :, 1] ** 2, torch.tensor([8.0, 5, 5], dtype=F64))
    for space, kind in (("R2xS1", "universal"), ("R2xS1", "ponita"), ("SE2", "universal"), ("SE3", "universal")):
        n = dim_of(space)
        frames = rotation_frames(n, 12) if space.startswith("SE") else orientation_points(n, 12)
        first, second = grid_invariants(space, pos[:, :n], edge, frames, kind)
        assert (first.size(-1), second.size(-1)) == num_grid_invariants(space, kind)


@pytest.mark.parametrize(("space", "kind"), [(s, k) for s, k in ALL if (s, k) != ("R3xS2", "ponita")])
def test_twice_differentiable_at_loops_and_collinear_edges(space, kind):
    """r = 0, and r parallel to the orientation; the paper's |r_perp| is left out: it has no derivative there."""
    n = dim_of(space)
    pos = torch.zeros(3, n, dtype=F64)
    pos[1, 0], pos[2, 1] = 1.3, 0.7
    edge_index = torch.tensor([[0, 1, 1, 2, 0], [0, 0, 1, 0, 2]])
    ori = None
    if "S" in space:
        ori = torch.eye(n, dtype=F64).expand(3, n, n).contiguous()
        ori = ori if space.startswith("SE") else ori[..., 0].contiguous()
    if space in (
        "R2",
        "R3",
    ):  # |r| itself bends at 0: there the derivatives are set to 0, and finite differences see the bend
        edge_index = edge_index[:, [1, 3, 4]]
    check_derivatives(lambda p: pair_invariants(space, p, edge_index, ori, kind), [pos])


def test_safe_norm():
    x = torch.tensor([[0.0, 0, 0], [3, 4, 0]], dtype=F64, requires_grad=True)
    assert safe_norm(x).tolist() == [0, 5]
    assert safe_norm(x, dim=0).shape == (3,)
    assert safe_norm(x, keepdim=True).shape == (2, 1)
    (first,) = torch.autograd.grad(safe_norm(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum() + first.sum(), x)
    assert first[0].tolist() == [0, 0, 0]
    assert second[0].tolist() == [0, 0, 0]
    assert torch.isfinite(second).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, e: pair_invariants("R4", p, e), "'R4'"),
        (lambda p, e: pair_invariants("R3", p, e, kind="ponita"), "'ponita'"),
        (lambda p, e: pair_invariants("SE3", p, e, kind="chiral"), "'chiral'"),
        (lambda p, e: pair_invariants("R2xS1", p[:, :2], e, p[:, :2], kind="chiral"), "'chiral'"),
        (lambda p, e: pair_invariants("R3xS2", p, e), "ori has shape None"),
        (lambda p, e: pair_invariants("R3xS2", p, e, p[:2]), r"ori has shape \(2, 3\)"),
        (lambda p, e: pair_invariants("R3", p, e, p), "ori is given"),
        (lambda p, e: pair_invariants("R2", p, e), r"pos has shape \(4, 3\)"),
        (lambda p, e: pair_invariants("R3", p, e.flatten()), "edge_index has shape"),
        (lambda p, e: pair_invariants("R3", p, e, edge_shift=p), "edge_shift has shape"),
        (lambda p, e: grid_invariants("R3", p, e, p), "no orientations"),
        (lambda p, e: grid_invariants("R3xS2", p, e, p, "chiral"), "'chiral'"),
        (lambda p, e: grid_invariants("R3xS2", p, e, p[:, :2]), "grid has shape"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(4, 3), torch.tensor([[0, 1], [1, 2]]))
