from __future__ import annotations

import copy
import inspect
import math
from collections import deque
from itertools import pairwise

import networkx as nx
import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.utils import subgraph

from geo.ops import random_walk
from geo.transforms import AddWalkTokens, WalkTokenData, add_walk_tokens

TOKENS = ("token_node_id", "token_edge_id", "token_sub_edge_index", "token_size", "token_esize", "token_setting")
WALKS = ("walk_nodes", "walk_edge_id", "walk_moved", "walk_adjacency")


def undirected(graph: nx.Graph) -> Data:
    edges = torch.tensor([*graph.edges], dtype=torch.int64).view(-1, 2).t()
    return Data(edge_index=torch.cat([edges, edges.flip(0)], dim=1), num_nodes=graph.number_of_nodes())


def random_data(num_nodes: int, num_edges: int, seed: int = 0) -> Data:
    """Directed, with loops, multi-edges and nodes without edges."""
    generator = torch.Generator().manual_seed(seed)
    return Data(
        edge_index=torch.randint(num_nodes, (2, num_edges), generator=generator),
        edge_attr=torch.randn(num_edges, 3, generator=generator),
        x=torch.randn(num_nodes, 4, generator=generator),
    )


def tokens_of(data: WalkTokenData) -> list[dict[str, Tensor]]:
    """The tokens one by one, with edges inside them relabelled from 0."""
    out = []
    for nodes, edges, index, first in zip(
        data.token_node_id.split(data.token_size.tolist()),
        data.token_edge_id.split(data.token_esize.tolist()),
        data.token_sub_edge_index.split(data.token_esize.tolist(), dim=1),
        (data.token_size.cumsum(0) - data.token_size).tolist(),
        strict=True,
    ):
        out.append({"nodes": nodes, "edges": edges, "index": index - first})
    return out


def hops(edge_index: Tensor, source: int, num_nodes: int) -> list[float]:
    out = [math.inf] * num_nodes
    out[source], queue = 0, deque([source])
    while queue:
        v = queue.popleft()
        for u in edge_index[1, edge_index[0] == v].tolist():
            if out[u] == math.inf:
                out[u] = out[v] + 1
                queue.append(u)
    return out


GRAPHS = {"path": nx.path_graph(6), "star": nx.star_graph(5), "complete": nx.complete_graph(5)}


def visiting(graph: nx.Graph, steps: int, non_backtracking: bool = False) -> Tensor:
    """[v, u]: the probability that a walk of so many steps from v visits u, by powers of transition matrices."""
    num = graph.number_of_nodes()
    arcs = [(a, b) for a in graph for b in graph[a]]
    states = [(v, v) for v in graph] + arcs  # (previous, present); at the start there is no previous
    place = {state: i for i, state in enumerate(states)}
    out = torch.empty(num, num, dtype=torch.float64)
    for u in graph:
        move = torch.zeros(len(states), len(states), dtype=torch.float64)
        for i, (before, v) in enumerate(states):
            if v == u:
                move[i, i] = 1
                continue
            targets = [b for b in graph[v] if not non_backtracking or b != before or graph.degree(v) == 1]
            for b in targets:
                move[i, place[v, b]] += 1 / len(targets)
        reached = torch.linalg.matrix_power(move, steps)[:num]
        out[:, u] = reached[:, [i for i, (_, v) in enumerate(states) if v == u]].sum(1)
    return out


def law_deviations(graph: nx.Graph, num_walks: int, claimed: int, non_backtracking: bool = False) -> list[float]:
    """Chi-square of the membership counts of each node over all roots, in standard deviations, per length and node."""
    steps, repeats, num = 3, 400, graph.number_of_nodes()
    transform = AddWalkTokens(steps, num_walks, repeats, non_backtracking=non_backtracking, seed=7)
    data = transform(undirected(graph))
    owner = torch.arange(data.token_size.numel()).repeat_interleave(data.token_size)
    per_node = repeats * steps + 1
    root, token = owner // per_node, owner % per_node
    out = []
    for length in range(1, steps + 1):
        here = (token // repeats == steps - length) & (token < repeats * steps)
        counts = torch.bincount(root[here] * num + data.token_node_id[here], minlength=num * num).view(num, num)
        law = 1 - (1 - visiting(graph, length, non_backtracking)) ** claimed
        sure = (law < 1e-12) | (law > 1 - 1e-12)
        assert torch.equal(counts[sure], (law[sure].round() * repeats).long())
        z = (counts - repeats * law)[~sure].square() / (repeats * law * (1 - law))[~sure]
        column = (~sure).nonzero()[:, 1]
        for u in column.unique():
            freedom = int((column == u).sum())
            out.append((float(z[column == u].sum()) - freedom) / math.sqrt(2 * freedom))
    return out


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("num_walks", [1, 3])
@pytest.mark.parametrize("non_backtracking", [False, True])
def test_check_12_membership_law(name, num_walks, non_backtracking):
    """P(u in T) = 1 - (1 - p)^M with p from powers of the transition matrix."""
    deviations = law_deviations(GRAPHS[name], num_walks, num_walks, non_backtracking)
    assert max(map(abs, deviations)) < 5


def test_membership_law_notices_another_number_of_walks():
    assert max(law_deviations(GRAPHS["complete"], 2, 3)) > 20


def test_draws_are_independent_between_tokens_and_walks():
    """Pairs of first neighbours of the centre of a star, over two lengths, two repeats and two walks."""
    data = undirected(nx.star_graph(4))
    pairs = torch.zeros(8, 8, 4, 4)
    for seed in range(800):
        walks = AddWalkTokens(2, 2, 2, walks=True, induced=False, seed=seed)(data).walk_nodes
        first = walks[0, :, :, 1].flatten() - 1
        pairs[torch.arange(8)[:, None], torch.arange(8), first[:, None], first] += 1
    for a in range(8):
        for b in range(a):
            statistic = float((pairs[a, b] - 50).square().sum() / 50)
            assert abs(statistic - 15) < 5 * math.sqrt(30)


@pytest.mark.parametrize("directed", [False, True])
def test_check_13_induced_subgraph_equals_pyg(directed):
    data = random_data(30, 70)
    if not directed:
        data = Data(edge_index=torch.cat([data.edge_index, data.edge_index.flip(0)], dim=1), num_nodes=30)
    out = AddWalkTokens(3, 3, 2, seed=1)(data)
    assert out.token_esize.sum() > out.token_size.sum()
    for token in tokens_of(out):
        expected, _, mask = subgraph(token["nodes"], data.edge_index, num_nodes=30, return_edge_mask=True)
        assert sorted(token["edges"].tolist()) == mask.nonzero().flatten().tolist()
        assert torch.equal(data.edge_index[:, token["edges"]], token["nodes"][token["index"]])
        assert sorted(token["nodes"][token["index"]].t().tolist()) == sorted(expected.t().tolist())


def test_order_of_edges():
    """By place of the source, then target's node, then column, with loops and repeated edges."""
    out = AddWalkTokens(2, 40, seed=0)(
        Data(edge_index=torch.tensor([[2, 0, 2, 1, 0, 2], [1, 2, 0, 1, 2, 1]]), num_nodes=3)
    )
    token = tokens_of(out)[out.token_size.numel() // 3 * 2]  # the widest of node 2
    assert token["nodes"].tolist() == [2, 0, 1]
    assert token["edges"].tolist() == [2, 0, 5, 1, 4, 3]
    assert token["index"].tolist() == [[0, 0, 0, 1, 1, 2], [1, 2, 2, 0, 0, 2]]


@pytest.mark.parametrize("roots", [0, 1, 3])
def test_check_14_roots_sizes_and_hops(roots):
    steps, walks, repeats = 4, 3, 2
    data = random_data(40, 60)
    out = AddWalkTokens(steps, walks, repeats, num_root_tokens=roots, seed=2)(data)
    length = repeats * steps + roots
    assert out.token_size.numel() == 40 * length
    for v in range(40):
        distance = hops(data.edge_index, v, 40)
        for j, token in enumerate(tokens_of(out)[v * length : (v + 1) * length]):
            reach = max(steps - j // repeats, 0)
            nodes = token["nodes"].tolist()
            assert nodes[0] == v
            assert nodes[1:] == sorted(set(nodes) - {v})
            assert len(nodes) <= 1 + walks * reach
            assert all(distance[u] <= reach for u in nodes)
            if j >= repeats * steps:
                assert nodes == [v]


def test_check_15_tokens_do_not_depend_on_the_batch():
    """Alone = in a batch, for every attribute; and the batch comes apart again."""
    graphs = [random_data(9, 20, 1), random_data(1, 0, 2), undirected(nx.path_graph(3)), random_data(30, 70, 3)]
    graphs = [Data(edge_index=g.edge_index, num_nodes=g.num_nodes) for g in graphs]
    transform = AddWalkTokens(3, 2, 2, walks=True, window=4, seed=5)
    alone = [transform(g) for g in graphs]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 1, 2]):
        batch = Batch.from_data_list([alone[i] for i in order])
        nodes = edges = members = 0
        found = {name: [] for name in (*TOKENS, *WALKS)}
        for i in order:
            data = transform(graphs[i])
            shift = dict.fromkeys(found, 0) | {
                "token_node_id": nodes, "walk_nodes": nodes, "token_edge_id": edges, "walk_edge_id": edges,
                "token_sub_edge_index": members,
            }  # fmt: skip
            for name in found:
                found[name].append(data[name] + shift[name] if shift[name] else data[name])
            nodes, edges, members = nodes + data.num_nodes, edges + data.num_edges, members + data.token_node_id.numel()
        assert (batch.num_nodes, batch.num_edges) == (nodes, edges)
        for name, parts in found.items():
            assert torch.equal(batch[name], torch.cat(parts, dim=1 if name == "token_sub_edge_index" else 0)), name
        assert batch.edge_index[:, batch.token_edge_id].equal(batch.token_node_id[batch.token_sub_edge_index])
        for data, i in zip(batch.to_data_list(), order, strict=True):
            assert all(torch.equal(data[name], alone[i][name]) for name in found)


def test_setting():
    """A row a graph, so that a model sees graphs whose tokens are not those it expects."""
    data = random_data(6, 9)
    one, other = AddWalkTokens(3, 2, 4, 1)(data), AddWalkTokens(1, 5, 1, 0, induced=False)(data)
    assert one.token_setting.dtype == torch.int64
    assert one.token_setting.tolist() == [[3, 2, 4, 1, 1]]
    batch = Batch.from_data_list([one, other, one])
    assert batch.token_setting.tolist() == [[3, 2, 4, 1, 1], [1, 5, 1, 0, 0], [3, 2, 4, 1, 1]]
    assert [part.token_setting.tolist() for part in batch.to_data_list()] == [
        [row] for row in batch.token_setting.tolist()
    ]
    assert AddWalkTokens(2)(one).token_setting.tolist() == [[2, 1, 1, 1, 1]]


def test_seeds():
    data = random_data(60, 200)
    first = AddWalkTokens(3, 2, seed=1)(data)
    again, other = AddWalkTokens(3, 2, seed=1)(copy.deepcopy(data)), AddWalkTokens(3, 2, seed=2)(data)
    assert all(torch.equal(first[name], again[name]) for name in TOKENS)
    assert not torch.equal(first.token_size, other.token_size)


def test_walks_are_those_of_the_op():
    """Walk k of token j is walk j M + k; tokens use its first steps."""
    data = undirected(nx.complete_graph(6))
    out = AddWalkTokens(3, 4, 2, walks=True, seed=9)(data)
    rowptr, col = torch.arange(0, 31, 5), data.edge_index[1][(data.edge_index[0] * 6 + data.edge_index[1]).argsort()]
    walks = random_walk(rowptr, col, torch.arange(6), 3, 24, seed=9).view(6, 6, 4, 4)
    for j in range(6):
        length = 3 - j // 2
        assert torch.equal(out.walk_nodes[:, j, :, : length + 1], walks[:, j, :, : length + 1])


@pytest.mark.parametrize("kind", ["bipartite", "odd", "directed"])
def test_check_16_many_walks_reach_the_ball(kind):
    """Walks record all nodes they visit: both parities of a bipartite graph."""
    graph = {"bipartite": nx.grid_2d_graph(3, 3), "odd": nx.cycle_graph(7)}.get(kind)
    data = random_data(8, 14) if graph is None else undirected(nx.convert_node_labels_to_integers(graph))
    out = AddWalkTokens(3, 3000, seed=0)(data)
    for token, nodes in enumerate(tokens_of(out)):
        distance = hops(data.edge_index, token // 4, data.num_nodes)
        ball = [u for u in range(data.num_nodes) if distance[u] <= 3 - token % 4]
        assert sorted(nodes["nodes"].tolist()) == ball


@pytest.mark.parametrize("non_backtracking", [False, True])
def test_stored_walks(non_backtracking):
    steps, repeats, window = 4, 2, 5
    data = random_data(25, 60)
    transform = AddWalkTokens(steps, 3, repeats, walks=True, window=window, non_backtracking=non_backtracking, seed=1)
    out = transform(data)
    assert out.walk_nodes.shape == (25, 8, 3, 5)
    assert out.walk_edge_id.shape == out.walk_moved.shape == (25, 8, 3, 4)
    assert out.walk_adjacency.shape == (25, 8, 3, 5, 4)
    moved, length = out.walk_moved, steps - torch.arange(8).view(8, 1, 1) // repeats
    before, after = out.walk_nodes[..., :-1], out.walk_nodes[..., 1:]
    assert torch.equal(data.edge_index[:, out.walk_edge_id[moved]], torch.stack([before[moved], after[moved]]))
    assert out.walk_edge_id[~moved].eq(0).all()
    assert torch.equal(after[~moved], before[~moved])
    inside = torch.arange(1, steps + 1) <= length
    dead = torch.bincount(data.edge_index[0], minlength=25) == 0
    assert torch.equal(moved, inside & ~dead[before])
    tokens = tokens_of(out)
    for v in range(25):
        for j in range(8):
            assert set(out.walk_nodes[v, j].flatten().tolist()) == set(tokens[v * 9 + j]["nodes"].tolist())
    joined = torch.zeros(25, 25, dtype=torch.bool)
    joined[data.edge_index[0], data.edge_index[1]] = True
    joined |= joined.t().clone()
    for t in range(steps + 1):
        for k in range(2, window + 1):
            expected = torch.zeros(25, 8, 3, dtype=torch.bool)
            if k <= t:
                expected = joined[out.walk_nodes[..., t], out.walk_nodes[..., t - k]] & (t <= length[..., 0])
            assert torch.equal(out.walk_adjacency[..., t, k - 2], expected)


def test_walks_can_do_without_subgraphs():
    data = random_data(25, 60)
    out = AddWalkTokens(2, 3, walks=True, induced=False)(data)
    assert out.token_edge_id.numel() == out.token_sub_edge_index.numel() == int(out.token_esize.sum()) == 0
    assert torch.equal(out.walk_nodes, AddWalkTokens(2, 3, walks=True)(data).walk_nodes)


@pytest.mark.parametrize("walks", [False, True])
def test_degenerate_graphs(device, walks):
    for num_nodes, edges in ((0, []), (1, []), (3, []), (1, [[0, 0]]), (2, [[0, 1]])):
        edge_index = torch.tensor(edges, dtype=torch.int64, device=device).view(-1, 2).t()
        out = AddWalkTokens(2, 3, 2, walks=walks)(Data(edge_index=edge_index, num_nodes=num_nodes))
        assert out.token_size.shape == out.token_esize.shape == (num_nodes * 5,)
        assert out.token_node_id.device == edge_index.device
        if not edges:
            assert out.token_node_id.tolist() == [v for v in range(num_nodes) for _ in range(5)]
            assert out.token_edge_id.numel() == 0
        if num_nodes == 2:
            assert out.token_node_id.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, *[1] * 5]
            assert out.token_edge_id.tolist() == [0] * 4
        if walks:
            assert out.walk_nodes.shape == (num_nodes, 4, 3, 3)
            assert out.walk_adjacency.shape == (num_nodes, 4, 3, 3, 7)


def test_attributes_of_the_data_are_kept():
    data = random_data(10, 30)
    out = AddWalkTokens(2, walks=True)(data)
    assert isinstance(out, WalkTokenData)
    assert (out.num_nodes, out.num_edges, out.num_node_features) == (10, 30, 4)
    assert torch.equal(out.x, data.x)
    assert torch.equal(out.edge_attr, data.edge_attr)
    assert "token_size" not in data
    fewer = AddWalkTokens(2)(out)  # once more: what is not asked for any more is gone
    assert set(TOKENS) <= set(fewer.keys())
    assert not set(WALKS) & set(fewer.keys())
    sparse = Data(edge_index=EdgeIndex(data.edge_index, sparse_size=(10, 10)), x=data.x)
    assert torch.equal(AddWalkTokens(2)(sparse).token_edge_id, fewer.token_edge_id)


def test_parts_do_not_change_the_result(monkeypatch):
    data = random_data(40, 120)
    transform = AddWalkTokens(3, 2, 2, walks=True)
    whole = transform(data)
    monkeypatch.setattr(add_walk_tokens, "_CHUNK", 7 * 6 * 2 * 4)
    parts = transform(data)
    assert all(torch.equal(whole[name], parts[name]) for name in (*TOKENS, *WALKS))


def test_epochs():
    data = random_data(60, 200)
    transform = AddWalkTokens(3, 2, seed=4, resample="epoch")
    draws = []
    for epoch in (0, 1, 2**32, 0):
        transform.set_epoch(epoch)
        draws.append(transform(data).token_node_id)
    assert torch.equal(draws[0], draws[3])
    assert all(a.shape != b.shape or not torch.equal(a, b) for a, b in pairwise(draws))
    other = AddWalkTokens(3, 2, seed=5, resample="epoch")(data).token_node_id
    assert other.shape != draws[0].shape or not torch.equal(other, draws[0])
    again = copy.deepcopy(transform)
    again.set_epoch(1)
    assert torch.equal(again(data).token_node_id, draws[1])
    with pytest.raises(ValueError, match=r"set_epoch is for resample='epoch', but resample is 'once'"):
        AddWalkTokens(3).set_epoch(1)
    with pytest.raises(ValueError, match=r"epoch is -1, but must not be negative"):
        transform.set_epoch(-1)


class Graphs(torch.utils.data.Dataset):
    def __init__(self, transform: AddWalkTokens) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Data:
        return self.transform(random_data(20, 60, i))


def test_workers_see_the_epoch():
    """Also those that live on from epoch to epoch, which hold a copy of the transform."""
    transform = AddWalkTokens(3, 2, resample="epoch")
    loader = DataLoader(Graphs(transform), batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        transform.set_epoch(epoch)
        expected = Batch.from_data_list([transform(random_data(20, 60, i)) for i in range(4)])
        assert torch.equal(next(iter(loader)).token_node_id, expected.token_node_id)


def test_refusals():
    edge_index = torch.tensor([[0, 1], [1, 0]])
    data = Data(edge_index=edge_index, num_nodes=2)
    for options, message in (
        ({"walk_length": 0}, r"walk_length is 0, but must be an integer of at least 1"),
        ({"num_walks": 0}, r"num_walks is 0, but must be an integer of at least 1"),
        ({"num_repeats": 1.5}, r"num_repeats is 1\.5, but must be an integer of at least 1"),
        ({"num_root_tokens": -1}, r"num_root_tokens is -1, but must be an integer of at least 0"),
        ({"window": 0}, r"window is 0, but must be an integer of at least 1"),
        ({"seed": None}, r"seed is None, but must be an integer"),
        ({"resample": "always"}, r"resample is 'always', but must be 'once' or 'epoch'"),
    ):
        with pytest.raises(ValueError, match=message):
            AddWalkTokens(**{"walk_length": 2, **options})

    class Paired(Data):
        def __inc__(self, key, value, *args, **kwargs):
            return 7

    transform = AddWalkTokens(2)
    for given, message in (
        (Data(num_nodes=2), r"edge_index is missing, but must be an int64 tensor \(2, \|E\|\)"),
        (Data(edge_index=edge_index.float(), num_nodes=2), r"edge_index is torch\.float32 \(2, 2\), but must be"),
        (Data(edge_index=edge_index.repeat(2, 1), num_nodes=2), r"edge_index has shape \(4, 2\), but must be"),
        (Data(edge_index=edge_index), r"the number of nodes is not given: set num_nodes, or node features x"),
        (Data(edge_index=edge_index + 1, num_nodes=2), r"edge_index\[0, 1\] is 2, but must be a node of 0\.\.1"),
        (Data(edge_index=edge_index - 1, num_nodes=2), r"edge_index\[0, 0\] is -1, but must be a node of 0\.\.1"),
        (Batch.from_data_list([data]), r"data is a DataBatch, but tokens are added to one graph"),
        (HeteroData(), r"data is a HeteroData, but tokens are added to one graph"),
        (Paired(edge_index=edge_index, num_nodes=2), r"data is a Paired with a batching of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            transform(given)


def test_repr():
    assert repr(AddWalkTokens(4, 2, resample="epoch")) == (
        "AddWalkTokens(walk_length=4, num_walks=2, num_repeats=1, num_root_tokens=1, non_backtracking=False, "
        "induced=True, walks=False, window=8, seed=0, resample='epoch')"
    )


OTHERS = {
    "walk_length": 2, "num_walks": 2, "num_repeats": 2, "num_root_tokens": 2, "non_backtracking": True,
    "induced": False, "walks": True, "window": 2, "seed": 2, "resample": "epoch",
}  # fmt: skip


@pytest.mark.parametrize("name", inspect.signature(AddWalkTokens).parameters)
def test_every_option_is_in_the_repr(name):
    """PyG compares it with the one that a dataset was processed with."""
    one, other = (repr(AddWalkTokens(**{"walk_length": 1, **options})) for options in ({}, {name: OTHERS[name]}))
    assert one != other
    assert f"{name}={OTHERS[name]!r}" in other
