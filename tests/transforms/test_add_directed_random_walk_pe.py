from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data, HeteroData

from geo.testing import assert_close, assert_permutation_equivariant
from geo.transforms import AddDirectedRandomWalkPE, add_directed_random_walk_pe


def directed(graph: nx.DiGraph) -> Data:
    edges = torch.tensor([*graph.edges], dtype=torch.int64).view(-1, 2).t()
    return Data(edge_index=edges.contiguous(), num_nodes=graph.number_of_nodes())


def weighted() -> Data:
    data = directed(nx.gnp_random_graph(9, 0.2, seed=1, directed=True))
    data.edge_weight = torch.rand(data.num_edges, dtype=torch.float64) + 0.1
    return data


def transition(data: Data, reverse: bool = False) -> np.ndarray:
    adjacency = np.zeros((data.num_nodes, data.num_nodes))
    weight = data.edge_weight if "edge_weight" in data else torch.ones(data.num_edges)
    adjacency[data.edge_index[0], data.edge_index[1]] = weight
    adjacency = adjacency.T.copy() if reverse else adjacency
    sink = adjacency.sum(1) == 0
    adjacency[sink, sink] = 1
    return adjacency / adjacency.sum(1, keepdims=True)


@pytest.mark.parametrize("columns", [256, 4])
@pytest.mark.parametrize("ppr", [None, 0.2])
def test_equals_matrix_powers(columns, ppr, monkeypatch):
    monkeypatch.setattr(add_directed_random_walk_pe, "_COLUMNS", columns)
    data = weighted()
    out = AddDirectedRandomWalkPE(4, ppr, relative=True, dtype=torch.float64)(data)
    expected = []
    for reverse in (False, True):
        matrix = transition(data, reverse)
        expected += [np.linalg.matrix_power(matrix, step) for step in range(1, 5)]
        if ppr is not None:
            expected.append(ppr * np.linalg.inv(np.eye(9) - (1 - ppr) * matrix))
    pairs = torch.from_numpy(np.stack(expected, axis=2))
    assert_close(out.directed_rw_pe_pairs.view(9, 9, -1), pairs)
    assert_close(out.directed_rw_pe, pairs.diagonal().t())


def test_directed_ring_returns_after_a_round():
    out = AddDirectedRandomWalkPE(8)(directed(nx.cycle_graph(4, create_using=nx.DiGraph)))
    assert out.directed_rw_pe.tolist() == [[0.0, 0.0, 0.0, 1.0] * 4] * 4


def test_walks_end_in_sinks():
    """From 0 and 1 to 2 and 3 along a path: only the last node returns, and against the edges only the first."""
    out = AddDirectedRandomWalkPE(2, relative=True)(directed(nx.path_graph(4, create_using=nx.DiGraph)))
    assert out.directed_rw_pe.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert out.directed_rw_pe_pairs.view(4, 4, 4)[1, :, 1].tolist() == [0, 0, 0, 1]


def test_reversing_all_edges_exchanges_the_halves():
    data = weighted()
    back = Data(edge_index=data.edge_index.flip(0), edge_weight=data.edge_weight, num_nodes=9)
    transform = AddDirectedRandomWalkPE(3, 0.1)
    assert torch.equal(transform(back).directed_rw_pe, transform(data).directed_rw_pe.roll(4, 1))


def test_pagerank_equals_networkx():
    graph = nx.gnp_random_graph(8, 0.3, seed=2, directed=True)
    graph.add_edges_from((v, v) for v in graph if graph.out_degree(v) == 0)
    out = AddDirectedRandomWalkPE(1, 0.15, relative=True, dtype=torch.float64)(directed(graph))
    for node in graph:
        rank = nx.pagerank(graph, alpha=0.85, personalization={node: 1}, tol=1e-14, max_iter=1000)
        found = out.directed_rw_pe_pairs.view(8, 8, 4)[node, :, 1]
        assert_close(found, torch.tensor([rank[v] for v in range(8)], dtype=torch.float64), factor=100)  # its tolerance


def test_loops_stay_and_repetitions_count_once():
    edges = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0]])
    out = AddDirectedRandomWalkPE(1, relative=True)(Data(edge_index=edges, num_nodes=2))
    assert out.directed_rw_pe_pairs[:, 0].tolist() == [0.5, 0.5, 1.0, 0.0]
    weight = torch.tensor([1.0, 2.0, 4.0, 0.0])
    out = AddDirectedRandomWalkPE(1, relative=True)(Data(edge_index=edges, edge_weight=weight, num_nodes=2))
    assert out.directed_rw_pe_pairs[:, 0].tolist() == [0.25, 0.75, 0.0, 1.0]  # an edge of weight 0 leaves a sink


def test_permutation_and_batches():
    transform = AddDirectedRandomWalkPE(5, 0.3, dtype=torch.float64)
    assert_permutation_equivariant(lambda data: transform(data).directed_rw_pe, weighted())
    small = [directed(nx.path_graph(n, create_using=nx.DiGraph)) for n in (2, 5)]
    relative = [AddDirectedRandomWalkPE(2, relative=True)(data) for data in small]
    batch = Batch.from_data_list(relative)
    assert batch.directed_rw_pe.shape == (7, 4)
    assert torch.equal(batch.directed_rw_pe_pairs[4:], relative[1].directed_rw_pe_pairs)


@pytest.mark.parametrize("ppr", [None, 0.5])
def test_nothing_and_a_single_node(ppr):
    width = 4 if ppr is None else 6
    empty = AddDirectedRandomWalkPE(2, ppr, relative=True)(Data(num_nodes=0))
    assert empty.directed_rw_pe.shape == empty.directed_rw_pe_pairs.shape == (0, width)
    single = AddDirectedRandomWalkPE(2, ppr)(Data(num_nodes=1))
    assert single.directed_rw_pe.tolist() == [[1.0] * width]
    assert "directed_rw_pe_pairs" not in single


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"walk_length": 0}, "walk_length=0 must be an integer of at least 1"),
        ({"walk_length": 1.5}, r"walk_length=1\.5 must be"),
        ({"walk_length": 1, "ppr": 0.0}, r"ppr=0\.0 must be above 0 and at most 1"),
        ({"walk_length": 1, "ppr": math.nan}, "ppr=nan must be"),
        ({"walk_length": 1, "dtype": torch.int64}, "must be a floating point type"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AddDirectedRandomWalkPE(**kwargs)


def test_bad_input():
    data = weighted()
    data.edge_weight[0] = math.nan
    with pytest.raises(ValueError, match="edge_weight is nan at edge 0"):
        AddDirectedRandomWalkPE(1)(data)
    with pytest.raises(ValueError, match="HeteroData"):
        AddDirectedRandomWalkPE(1)(HeteroData())


def test_name_dtype_and_repr():
    transform = AddDirectedRandomWalkPE(2, 0.1, attr_name="walks", dtype=torch.float64)
    assert transform(weighted()).walks.dtype == torch.float64
    assert repr(transform) == "AddDirectedRandomWalkPE(walk_length=2, ppr=0.1, relative=False)"
