from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from geo.testing import random_rotations
from geo.transforms import AddRadiusGraph


def brute_force(pos: np.ndarray, r: float, cell: np.ndarray | None = None, pbc=(True, True, True), reach: int = 4):
    """Every (sender, receiver, lattice steps) whose distance is at most r, by loops."""
    if cell is None:
        cell, pbc = np.eye(3)[: pos.shape[1], : pos.shape[1]], (False,) * pos.shape[1]
    steps = [range(-reach, reach + 1) if p else range(1) for p in pbc]
    found = {}
    for n in itertools.product(*steps):
        shift = np.array(n) @ cell
        for i, j in itertools.product(range(len(pos)), repeat=2):
            if (i, j) == (j, i) and not any(n):
                continue
            if np.linalg.norm(pos[j] + shift - pos[i]) <= r:
                found[j, i, tuple(np.round(shift, 6) + 0.0)] = shift
    return found


def edges(data: Data) -> list[tuple]:
    shift = data.edge_shift.double().numpy()
    assert data.edge_index.dtype == torch.int64
    assert data.edge_shift.dtype == data.pos.dtype
    return [(int(j), int(i), tuple(np.round(s, 6) + 0.0)) for (j, i), s in zip(data.edge_index.t(), shift, strict=True)]


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("num", [0, 1, 2, 40])
def test_open(dim, num):
    pos = torch.from_numpy(np.random.default_rng(0).uniform(size=(num, dim)))
    data = AddRadiusGraph(0.4)(Data(pos=pos))
    assert data.edge_shift.shape == (data.num_edges, dim)
    assert data.edge_shift.eq(0).all()
    found = edges(data)
    assert len(found) == len(set(found))
    assert set(found) == set(brute_force(pos.numpy(), 0.4))
    assert data.edge_index.flip(0).t().tolist() == sorted(
        data.edge_index.flip(0).t().tolist()
    )  # by receiver, then sender


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, True)])
@pytest.mark.parametrize("r", [0.7, 1.6, 3.1])
def test_periodic_skew_cell(pbc, r):
    """Radii shorter and longer than the cell, atoms outside it, mixed boundary conditions."""
    rng = np.random.default_rng(1)
    cell = np.array([[1.5, 0.0, 0.0], [0.5, 1.4, 0.0], [0.2, -0.4, 1.6]])
    pos = rng.uniform(-1, 2, size=(5, 3)) @ cell
    data = Data(pos=torch.from_numpy(pos), cell=torch.from_numpy(cell)[None], pbc=torch.tensor([pbc]))
    found = edges(AddRadiusGraph(r)(data))
    assert len(found) == len(set(found))
    assert set(found) == set(brute_force(pos, r, cell, pbc, reach=12 if r < 3 else 10))


def test_wrapping_and_rotation_keep_the_edge_vectors():
    rng = np.random.default_rng(2)
    cell = torch.from_numpy(np.eye(3) * 3 + rng.normal(scale=0.3, size=(3, 3)))
    pos = torch.from_numpy(rng.uniform(size=(12, 3))) @ cell

    def vectors(pos, cell):
        data = AddRadiusGraph(2.2)(Data(pos=pos, cell=cell, pbc=torch.ones(3).bool()))
        r = data.pos[data.edge_index[0]] + data.edge_shift - data.pos[data.edge_index[1]]
        order = np.lexsort((*r.numpy().T.round(8), data.edge_index[0], data.edge_index[1]))
        return data.edge_index[:, order], r[order]

    index, r = vectors(pos, cell)
    assert (r.norm(dim=1) <= 2.2).all()
    moved = pos + torch.randint(-3, 4, (12, 3)).double() @ cell
    index2, r2 = vectors(moved, cell)
    assert torch.equal(index, index2)
    torch.testing.assert_close(r, r2)
    g = random_rotations(1)[0]
    index3, r3 = vectors(pos @ g.t(), cell @ g.t())
    back = r3 @ g
    order = np.lexsort((*back.numpy().T.round(8), index3[0], index3[1]))
    torch.testing.assert_close(back[order], r)


def test_complete_where_pyg_truncates():
    pos = torch.zeros(60, 3) + 0.01 * torch.rand(60, 3)
    assert AddRadiusGraph(1.0)(Data(pos=pos)).num_edges == 60 * 59


def test_the_limit_is_an_error_and_never_a_cut():
    pos = torch.rand(20, 3)
    full = AddRadiusGraph(9.0, max_edges=380)(Data(pos=pos))
    assert full.num_edges == 380
    with pytest.raises(ValueError, match="has 380 edges, but max_edges is 379"):
        AddRadiusGraph(9.0, max_edges=379)(Data(pos=pos))
    with pytest.raises(ValueError, match="max_edges is 10"):
        AddRadiusGraph(1.5, max_edges=10)(Data(pos=pos, cell=torch.eye(3)))


def test_loops_on_request():
    data = AddRadiusGraph(0.5, loop=True)(Data(pos=torch.tensor([[0.0, 0], [0.4, 0], [3, 0]])))
    assert data.edge_index.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 1, 2]]
    alone = AddRadiusGraph(1.1)(Data(pos=torch.zeros(1, 3), cell=torch.eye(3)))
    assert alone.edge_index.tolist() == [[0] * 6, [0] * 6]  # its own images
    assert sorted(map(tuple, alone.edge_shift.tolist())) == sorted(
        tuple(s * v for v in axis) for axis in np.eye(3).tolist() for s in (1.0, -1.0)
    )


def test_same_on_every_call_and_in_batches():
    pos = torch.rand(50, 3)
    first, second = (AddRadiusGraph(0.3)(Data(pos=pos.clone())) for _ in range(2))
    assert torch.equal(first.edge_index, second.edge_index)
    cell = torch.eye(3)[None] * 2
    graphs = [
        AddRadiusGraph(1.0)(Data(pos=torch.rand(n, 3), cell=cell, pbc=torch.ones(1, 3).bool())) for n in (3, 0, 5)
    ]
    batch = Batch.from_data_list(graphs)
    assert batch.edge_shift.shape == (batch.num_edges, 3)
    assert batch.edge_index[:, graphs[0].num_edges :].min() >= 3


def test_a_pbc_of_false_is_no_cell():
    data = AddRadiusGraph(1.0)(Data(pos=torch.rand(4, 3), cell=torch.zeros(1, 3, 3), pbc=torch.zeros(1, 3).bool()))
    assert data.num_edges == len(brute_force(data.pos.numpy(), 1.0))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Data(), "pos is missing"),
        (Data(pos=torch.zeros(3)), "pos is torch.float32"),
        (Data(pos=torch.zeros(3, 3, dtype=torch.int64)), "pos is torch.int64"),
        (Data(pos=torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]])), r"pos\[1\] is .*, but must be finite"),
        (Data(pos=torch.zeros(3, 3), pbc=torch.ones(3).bool()), "no cell"),
        (Data(pos=torch.zeros(3, 3), cell=torch.zeros(2, 3, 3)), "cell has shape"),
        (Data(pos=torch.zeros(3, 3), cell=torch.zeros(3, 3)), "must span a volume"),
        (Data(pos=torch.zeros(3, 3), cell=torch.full((3, 3), float("nan"))), "must be finite"),
        (Data(pos=torch.zeros(3, 2), cell=torch.eye(3)), "three dimensions"),
        (Data(pos=torch.zeros(3, 3), cell=torch.eye(3), pbc=torch.ones(2).bool()), "pbc has 2 entries"),
    ],
)
def test_refusals(data, words):
    with pytest.raises(ValueError, match=words):
        AddRadiusGraph(1.0)(data)


def test_bad_settings():
    for r in (0, -1.0, float("nan"), "3"):
        with pytest.raises(ValueError, match="r is"):
            AddRadiusGraph(r)
    with pytest.raises(ValueError, match="max_edges is -1"):
        AddRadiusGraph(1.0, max_edges=-1)
    assert repr(AddRadiusGraph(2.5, 9)) == "AddRadiusGraph(r=2.5, max_edges=9)"
