from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from torch_geometric.loader import DataLoader
from torch_geometric.utils import from_networkx

from geo.datasets import CycleCounting, count_cycles, count_directed_cycles


def enumerated(graph: networkx.Graph) -> list[int]:
    lengths = [len(cycle) for cycle in networkx.simple_cycles(graph, length_bound=6)]
    return [lengths.count(length) for length in (3, 4, 5, 6)]


def counted(graph: networkx.Graph) -> list[int]:
    return count_cycles(from_networkx(graph).edge_index, graph.number_of_nodes()).tolist()


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("num_nodes", [0, 1, 2, 3, 6, 9, 11])
def test_counts_equal_enumeration(num_nodes, p):
    for seed in range(3):
        graph = networkx.gnp_random_graph(num_nodes, p, seed=seed)
        assert counted(graph) == enumerated(graph)


@pytest.mark.parametrize(
    ("graph", "counts"),
    [
        (networkx.petersen_graph(), [0, 0, 12, 10]),
        (networkx.complete_graph(6), [20, 45, 72, 60]),
        (networkx.cycle_graph(6), [0, 0, 0, 1]),
        (networkx.disjoint_union(networkx.cycle_graph(3), networkx.cycle_graph(5)), [1, 0, 1, 0]),
        (networkx.hypercube_graph(3), [0, 6, 0, 16]),
        (networkx.star_graph(5), [0, 0, 0, 0]),
    ],
)
def test_known_graphs(graph, counts):
    assert counted(graph) == counts


def test_loops_and_repeated_edges_do_not_count():
    triangle = from_networkx(networkx.complete_graph(3)).edge_index
    more = torch.cat([triangle, triangle[:, :2], torch.tensor([[1], [1]])], dim=1)
    assert count_cycles(more, 3).tolist() == [1, 0, 0, 0]


def test_refused_graphs():
    with pytest.raises(ValueError, match="edge_index holds 0 to 3, but there are 3 nodes"):
        count_cycles(torch.tensor([[0, 3], [3, 0]]), 3)
    with pytest.raises(ValueError, match="both directions of every edge"):
        count_cycles(torch.tensor([[0], [1]]), 2)
    dense = (1 - torch.eye(200)).nonzero().t()
    with pytest.raises(ValueError, match="the largest degree is 199, too many for exact counts"):
        count_cycles(dense, 200)


def test_regular_graphs_without_as_many_edges_as_nodes():
    data = CycleCounting(num_graphs=60, seed=1)
    kinds = set()
    for graph in data:
        num_nodes = graph.num_nodes
        degree = {10: 6, 15: 6, 20: 5, 30: 5}[num_nodes]
        kinds.add(num_nodes)
        assert graph.num_edges == 2 * (num_nodes * degree // 2 - num_nodes)
        assert graph.edge_index[0].bincount(minlength=num_nodes).max() <= degree
        assert not graph.has_self_loops()
        assert graph.is_undirected()
        assert graph.is_coalesced()
        assert graph.y.dtype == torch.float32
        assert graph.x.tolist() == [[1.0]] * num_nodes
    assert kinds == {10, 15, 20, 30}
    for graph in data[:4]:
        oracle = networkx.Graph()
        oracle.add_nodes_from(range(graph.num_nodes))
        oracle.add_edges_from(graph.edge_index.t().tolist())
        assert graph.y.tolist() == [enumerated(oracle)]


def test_erdos_renyi():
    data = CycleCounting(num_graphs=400, kind="erdos-renyi", num_nodes=10, p=0.3)
    assert {graph.num_nodes for graph in data} == {10}
    edges = np.array([graph.num_edges // 2 for graph in data])
    assert abs(edges.mean() - 0.3 * 45) < 4 * np.sqrt(45 * 0.3 * 0.7 / 400)
    none, full = (CycleCounting(num_graphs=1, kind="erdos-renyi", num_nodes=5, p=p)[0] for p in (0.0, 1.0))
    assert none.edge_index.shape == (2, 0)
    assert full.y.tolist() == [[10, 15, 12, 0]]


def test_splits_are_parts_of_one_draw():
    settings = {"num_graphs": 20, "sizes": [(8, 4)], "seed": 5}
    together = CycleCounting(**settings)
    parts = [CycleCounting(split=split, **settings) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [6, 4, 10]
    for graph, expected in zip([graph for part in parts for graph in part], together, strict=True):
        assert torch.equal(graph.edge_index, expected.edge_index)
        assert torch.equal(graph.y, expected.y)


def test_seed():
    first, again, other = (CycleCounting(num_graphs=5, seed=seed) for seed in (0, 0, 1))
    for graph, same in zip(first, again, strict=True):
        assert torch.equal(graph.edge_index, same.edge_index)
    assert not torch.equal(first._data.y, other._data.y)


def test_batch():
    batch = next(iter(DataLoader(CycleCounting(num_graphs=6), batch_size=6)))
    assert batch.y.shape == (6, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "split='dev' is unknown; allowed: 'train', 'val', 'test', 'all'"),
        ({"kind": "tree"}, "kind='tree' is unknown"),
        ({"num_graphs": 0}, "num_graphs is 0"),
        ({"num_nodes": 0}, "num_nodes is 0"),
        ({"p": 1.5}, "p is 1.5"),
        ({"sizes": [(5, 3)]}, r"sizes holds \(5, 3\)"),
        ({"sizes": [(4, 4)]}, r"sizes holds \(4, 4\)"),
        ({"sizes": []}, "sizes is empty"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CycleCounting(**{"num_graphs": 2, **settings})


def oriented(num_nodes: int, p: float, seed: int) -> networkx.DiGraph:
    rng = np.random.default_rng(seed)
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(num_nodes))
    edges = networkx.gnp_random_graph(num_nodes, p, seed=seed).edges
    graph.add_edges_from((u, v) if rng.random() < 0.5 else (v, u) for u, v in edges)
    return graph


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("num_nodes", [0, 1, 3, 6, 9, 11])
def test_directed_counts_equal_enumeration(num_nodes, p):
    for seed in range(3):
        graph = oriented(num_nodes, p, seed)
        edges = torch.tensor(list(graph.edges), dtype=torch.int64).view(-1, 2).t()
        assert count_directed_cycles(edges, num_nodes).tolist() == enumerated(graph)


def test_directed_graphs():
    data = CycleCounting(num_graphs=20, sizes=[(12, 8)], directed=True)
    assert data.y.sum(0).min() > 0
    for graph in data:
        assert graph.num_edges == 12 * 8 // 2 - 12
        assert graph.is_directed()
        assert torch.equal(graph.y[0].long(), count_directed_cycles(graph.edge_index, 12))
    with pytest.raises(ValueError, match="opposite edges"):
        count_directed_cycles(torch.tensor([[0, 1], [1, 0]]), 2)
