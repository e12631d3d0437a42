from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader

from geo.testing import random_rotations
from geo.transforms import AddRadiusGraph, LiftToPositionOrientation


def sample(num: int = 6, seed: int = 0, dim: int = 3, loops: bool = True) -> Data:
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(num), torch.arange(num)).t()
    pairs = pairs[:, torch.rand(pairs.size(1)) < 0.5]
    if not loops:
        pairs = pairs[:, pairs[0] != pairs[1]]
    pairs = pairs[:, torch.randperm(pairs.size(1))]
    return Data(
        x=torch.randn(num, 2),
        z=torch.arange(num),
        vec=torch.randn(num, 1, dim),
        pos=torch.randn(num, dim).double(),
        edge_index=pairs,
        y=torch.tensor([3.0]),
    )


def by_loops(data: Data, shift: torch.Tensor, directions=None, direction_shift=None, base=None):
    """The definition: lifted nodes in the order of (base node, edge), and the set of lifted edges."""
    directions = data.edge_index if directions is None else directions
    direction_shift = shift if direction_shift is None else direction_shift
    nodes = []
    for t in range(data.num_nodes):
        for e in range(directions.size(1)):
            s, end = directions[:, e].tolist()
            if end == t and not (s == t and direction_shift[e].eq(0).all()):
                r = data.pos[s] + direction_shift[e] - data.pos[t]
                nodes.append((t, r / r.norm()))
    joined = (
        []
        if base is not None
        else [(s, t, tuple(v.tolist())) for (s, t), v in zip(data.edge_index.t().tolist(), shift, strict=True)]
    )
    joined = base if base is not None else joined
    zero = (0.0,) * data.pos.size(1)
    joined = [(s, t, v) for s, t, v in joined if s != t or v != zero] + [(t, t, zero) for t in range(data.num_nodes)]
    edges = []
    for s, t, v in joined:
        for a, (ta, _) in enumerate(nodes):
            for b, (tb, _) in enumerate(nodes):
                if ta == s and tb == t:
                    edges.append((a, b, v))
    return nodes, edges


def check(lifted: Data, nodes, edges) -> None:
    assert lifted.proj_index.tolist() == [t for t, _ in nodes]
    if nodes:
        torch.testing.assert_close(lifted.ori, torch.stack([n for _, n in nodes]))
    found = [
        (a, b, tuple(v.tolist())) for (a, b), v in zip(lifted.edge_index.t().tolist(), lifted.edge_shift, strict=True)
    ]
    assert sorted(found) == sorted(edges)
    assert lifted.edge_index[1].diff().ge(0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dim", [2, 3])
def test_equals_loops(seed, dim):
    data = sample(seed=seed, dim=dim)
    lifted = LiftToPositionOrientation()(data)
    check(lifted, *by_loops(data, torch.zeros(data.num_edges, dim).double()))
    base = lifted.proj_index
    assert torch.equal(lifted.pos, data.pos[base])
    assert torch.equal(lifted.x, data.x[base])
    assert torch.equal(lifted.vec, data.vec[base])
    assert torch.equal(lifted.z, data.z[base])
    assert torch.equal(lifted.y, data.y)
    assert lifted.num_proj == 6
    assert (lifted.ori.norm(dim=1) - 1).abs().max() < 1e-12


def test_periodic_images():
    data = Data(pos=torch.rand(3, 3).double(), cell=torch.eye(3)[None], pbc=torch.ones(1, 3).bool())
    data = AddRadiusGraph(0.9)(data)
    check(LiftToPositionOrientation()(data), *by_loops(data, data.edge_shift))
    bonds = data.edge_index[:, :4].clone()
    data.bond_index, data.bond_shift = bonds, data.edge_shift[:4].clone()
    expected = by_loops(data, data.edge_shift, bonds, data.bond_shift)
    check(LiftToPositionOrientation("bonds")(data), *expected)


def test_radius_replaces_the_edges_that_join():
    data = sample()
    near = AddRadiusGraph(1.5)(Data(pos=data.pos))
    base = [(s, t, (0.0, 0.0, 0.0)) for s, t in near.edge_index.t().tolist()]
    expected = by_loops(data, torch.zeros(data.num_edges, 3).double(), base=base)
    lifted = LiftToPositionOrientation(radius=1.5)(data)
    check(lifted, *expected)
    # The same as a radius graph on the lifted positions, points at one place included.
    distance = torch.cdist(lifted.pos, lifted.pos, compute_mode="donot_use_mm_for_euclid_dist")
    assert lifted.num_edges == int((distance <= 1.5).sum())


def test_turns_with_the_data():
    data, g = sample(), random_rotations(1)[0]
    lifted = LiftToPositionOrientation()(data)
    moved = data.clone()
    moved.pos = data.pos @ g.t() + 1
    turned = LiftToPositionOrientation()(moved)
    torch.testing.assert_close(turned.ori, lifted.ori @ g.t())
    assert torch.equal(turned.edge_index, lifted.edge_index)


def test_batches():
    graphs = [LiftToPositionOrientation()(sample(n, n)) for n in (4, 1, 6)]
    batch = Batch.from_data_list(graphs)
    assert torch.equal(batch.proj_index, torch.cat([g.proj_index + o for g, o in zip(graphs, (0, 4, 5), strict=True)]))
    assert int(batch.num_proj.sum()) == 11
    loaded = next(iter(DataLoader(graphs, batch_size=3)))
    assert torch.equal(loaded.proj_index, batch.proj_index)
    assert torch.equal(loaded.edge_index, batch.edge_index)


def test_empty():
    for num in (0, 1, 3):
        data = Data(pos=torch.zeros(num, 3), x=torch.zeros(num, 2), edge_index=torch.zeros(2, 0, dtype=torch.int64))
        lifted = LiftToPositionOrientation()(data)
        assert lifted.pos.shape == (0, 3)
        assert lifted.x.shape == (0, 2)
        assert lifted.edge_index.shape == (2, 0)
        assert lifted.num_proj == num


def test_refusals():
    lift = LiftToPositionOrientation()
    pos, edge = torch.zeros(2, 3), torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="source is 'atoms'"):
        LiftToPositionOrientation("atoms")
    with pytest.raises(ValueError, match="pos is missing"):
        lift(Data(edge_index=edge))
    with pytest.raises(ValueError, match="edge_index is missing"):
        lift(Data(pos=pos))
    with pytest.raises(ValueError, match=r"edge \(0, 1\) has no direction"):
        lift(Data(pos=pos, edge_index=edge))
    with pytest.raises(IndexError, match="edge_index has entries"):
        lift(Data(pos=pos, edge_index=edge + 1))
    with pytest.raises(ValueError, match="edge_shift has shape"):
        lift(Data(pos=pos, edge_index=edge, edge_shift=torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="bond_index is missing"):
        LiftToPositionOrientation("bonds")(Data(pos=pos, edge_index=edge))
    assert repr(LiftToPositionOrientation("bonds", 2.0)) == "LiftToPositionOrientation(source='bonds', radius=2.0)"
