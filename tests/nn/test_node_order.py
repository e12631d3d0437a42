from __future__ import annotations

from collections import Counter
from itertools import pairwise

import networkx as nx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_undirected

from geo.nn import NodeOrder, node_order
from geo.ops import bounds
from geo.ops.random_walk import philox
from geo.testing import assert_close

KEYS = ("degree", "pagerank", "kcore", "index")
TIES = ("random", "wl", "index")


def random_graph(num_nodes, num_edges, seed=0, undirected=True):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, num_nodes), (2, num_edges), generator=g)
    edges = to_undirected(edges, num_nodes=num_nodes) if undirected else edges
    return Data(edge_index=edges, edge_attr=torch.rand(edges.size(1), generator=g), num_nodes=num_nodes)


def undirected(graph):
    edges = torch.tensor(list(graph.edges)).view(-1, 2).t()
    return torch.cat((edges, edges.flip(0)), 1)


def both_ways(*pairs):
    edges = torch.tensor(pairs).t()
    return torch.cat((edges, edges.flip(0)), 1)


def graphs():
    sizes = ((5, 6), (0, 0), (1, 0), (1, 1), (3, 2), (30, 40), (0, 0), (30, 40))
    return [random_graph(n, e, seed=i) for i, (n, e) in enumerate(sizes)]


def importance(key, data, batch=None, weight=None):
    order = NodeOrder(key)
    batch = torch.zeros(data.num_nodes, dtype=torch.int64) if batch is None else batch
    ptr = torch.searchsorted(batch, torch.arange(int(batch.max()) + 2))
    return order._importance(data.edge_index, batch, ptr, weight)


# -- keys --------------------------------------------------------------------------------------------------------------
def test_degree_by_hand():
    edges = torch.tensor([[0, 0, 1, 2, 2, 3], [1, 1, 2, 2, 0, 0]])  # parallel edges and a loop count
    data, weight = Data(edge_index=edges, num_nodes=5), torch.tensor([0.5, 0.25, 1.0, 1.0, 4.0, 2.0])
    assert importance("degree", data).tolist() == [2, 2, 2, 0, 0]
    assert importance("degree", data, weight=weight).tolist() == [6.0, 0.75, 2.0, 0.0, 0.0]
    order = NodeOrder(tie="index")
    assert order(edges, num_nodes=5)[0].tolist() == [3, 4, 0, 1, 2]
    assert order(edges, num_nodes=5, edge_weight=weight)[0].tolist() == [3, 4, 1, 2, 0]
    assert NodeOrder(tie="index", descending=True)(edges, num_nodes=5)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("undirected", [False, True])  # directed ones hold nodes that lead nowhere
def test_pagerank_is_that_of_networkx(undirected, weighted):
    some = [random_graph(n, e, i, undirected) for i, (n, e) in enumerate(((12, 20), (1, 0), (40, 60), (3, 0)))]
    if not undirected:
        assert any(len(d.edge_index[0].unique()) < d.num_nodes for d in some)
    batch = Batch.from_data_list(some)
    weight = batch.edge_attr.double() if weighted else None
    expected = []
    for data in some:
        graph = nx.MultiDiGraph()
        graph.add_nodes_from(range(data.num_nodes))
        for (i, j), w in zip(data.edge_index.t().tolist(), data.edge_attr.double().tolist(), strict=True):
            graph.add_edge(i, j, weight=w if weighted else 1.0)
        rank = nx.pagerank(graph, alpha=0.85, tol=1e-14, max_iter=1000)
        expected += [rank[i] for i in range(data.num_nodes)]
    assert_close(importance("pagerank", batch, batch.batch, weight), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_core_numbers_are_those_of_networkx(seed):
    data = random_graph(60, 40 * (seed + 1), seed, undirected=False)  # with loops, parallel edges and isolated nodes
    graph = nx.Graph(data.edge_index.t().tolist())
    graph.add_nodes_from(range(60))
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    core = nx.core_number(graph)
    assert importance("kcore", data).tolist() == [core[i] for i in range(60)]
    assert len(set(core.values())) > 1


def test_core_numbers_of_a_path_peeled_from_its_ends():
    edges = both_ways(*((i, i + 1) for i in range(30)), (30, 31), (31, 32), (32, 30))
    assert importance("kcore", Data(edge_index=edges, num_nodes=33)).tolist() == [1] * 30 + [2] * 3


def test_a_function_as_key():
    def negative(edge_index, batch, num_nodes, edge_weight):
        assert edge_weight is None
        return -torch.arange(num_nodes) + 10 * batch

    batch = torch.tensor([0, 0, 0, 1, 1])
    perm, ptr = NodeOrder(negative)(torch.zeros(2, 0, dtype=torch.int64), batch)
    assert perm.tolist() == [2, 1, 0, 4, 3]
    assert ptr.tolist() == [0, 3, 5]


def test_scores_given():
    batch, score = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([3.0, 1.0, 2.0, -1.0, -5.0])
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert NodeOrder("pagerank")(none, batch, score=score)[0].tolist() == [1, 2, 0, 4, 3]
    assert NodeOrder("pagerank", descending=True)(none, batch, score=score)[0].tolist() == [0, 2, 1, 3, 4]


# -- the order ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_is_a_lexicographic_sort(key, descending):
    data = Batch.from_data_list(graphs())
    perm, ptr = NodeOrder(key, descending, tie="index")(data.edge_index, data.batch, batch_size=8)
    score, batch = importance(key, data, data.batch).float().tolist(), data.batch.tolist()
    sign = -1 if descending else 1
    assert perm.tolist() == sorted(range(data.num_nodes), key=lambda i: (batch[i], sign * score[i], i))
    assert ptr.tolist() == data.ptr.tolist()


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("key", KEYS)
def test_no_graph_enters_another_and_keys_ascend(key, tie):
    data = Batch.from_data_list(graphs())
    score = importance(key, data, data.batch).float()
    perm, ptr = NodeOrder(key, tie=tie)(data.edge_index, data.batch, batch_size=8)
    for b in range(8):
        part = perm[ptr[b] : ptr[b + 1]]
        assert sorted(part.tolist()) == list(range(int(data.ptr[b]), int(data.ptr[b + 1])))
        assert bool((score[part].diff() >= 0).all())


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("key", KEYS)
def test_alone_equals_batched(key, tie, num_samples):
    order, some = NodeOrder(key, tie=tie, num_samples=num_samples), graphs()
    data = Batch.from_data_list(some)
    perm, ptr = order(data.edge_index, data.batch, data.num_nodes, data.edge_attr, batch_size=8, seed=7)
    alone = [order(d.edge_index, None, d.num_nodes, d.edge_attr, seed=7) for d in some]
    shifted = [p + start for (p, _), start in zip(alone, data.ptr, strict=False)]
    assert torch.equal(perm, torch.cat(shifted, -1))
    assert [int(p[-1]) for _, p in alone] == ptr.diff().tolist()


def test_a_tie_that_knows_the_batch_would_be_seen(monkeypatch):
    """The law above fails, and for the ties alone, where random numbers belong to the place of a node in the batch."""

    def of_the_batch(seed, place, *words):
        return philox(seed, torch.arange(place.size(0)), *words)

    monkeypatch.setattr(node_order, "philox", of_the_batch)
    for key, tie in (("degree", "random"), ("kcore", "random"), ("degree", "wl")):
        with pytest.raises(AssertionError):
            test_alone_equals_batched(key, tie, 1)
    for key, tie in (("index", "random"), ("degree", "index")):
        test_alone_equals_batched(key, tie, 1)


def test_random_ties_are_fair_and_new_each_time():
    triangle = both_ways((0, 1), (1, 2), (2, 0))
    order = NodeOrder(num_samples=6000)
    perm, _ = order(triangle, num_nodes=3, seed=0)
    counts = Counter(map(tuple, perm.tolist()))
    assert len(counts) == 6
    assert sum((c - 1000) ** 2 / 1000 for c in counts.values()) < 20.5  # chi-square of 5 degrees, p = 0.001
    again, _ = order(triangle, num_nodes=3, seed=0)
    other, _ = order(triangle, num_nodes=3, seed=1)
    assert torch.equal(perm, again)
    assert not torch.equal(perm, other)
    first, second = (order(triangle, num_nodes=3, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0))
    assert torch.equal(first, second)
    torch.manual_seed(0)
    assert not torch.equal(order(triangle, num_nodes=3)[0], order(triangle, num_nodes=3)[0])


def test_samples():
    data = random_graph(30, 40)
    perm, ptr = NodeOrder(num_samples=4)(data.edge_index, num_nodes=30)
    assert perm.shape == (4, 30)
    assert ptr.tolist() == [0, 30]
    assert NodeOrder()(data.edge_index, num_nodes=30, num_samples=2)[0].shape == (2, 30)
    assert NodeOrder(num_samples=4)(data.edge_index, num_nodes=30, num_samples=1)[0].shape == (30,)
    index = NodeOrder(num_samples=4, tie="index")(data.edge_index, num_nodes=30)[0]
    assert bool((index == index[0]).all())


# -- Weisfeiler-Leman ties ---------------------------------------------------------------------------------------------
def relabelled(data, seed):
    new = torch.randperm(data.num_nodes, generator=torch.Generator().manual_seed(seed))
    edge = torch.randperm(data.edge_index.size(1), generator=torch.Generator().manual_seed(seed))
    return new, new[data.edge_index[:, edge]]


def asymmetric():
    """A graph whose only automorphism is the identity (a tree with three legs of different length, and a chord)."""
    edges = both_ways((0, 1), (0, 2), (2, 3), (0, 4), (4, 5), (5, 6), (6, 7), (3, 5))
    return Data(edge_index=edges, num_nodes=8)


@pytest.mark.parametrize("key", ["degree", "pagerank", "kcore"])
def test_exactly_equivariant_without_automorphisms(key):
    data = asymmetric()
    order = NodeOrder(key, tie="wl")
    expected = order(data.edge_index, num_nodes=8)[0]
    for seed in range(20):
        new, edges = relabelled(data, seed)
        assert torch.equal(order(edges, num_nodes=8)[0], new[expected])


def test_other_ties_are_not_equivariant():
    data = asymmetric()
    for tie in ("index", "random"):
        order = NodeOrder(tie=tie)
        expected = order(data.edge_index, num_nodes=8, seed=0)[0]
        runs = [(new, order(edges, num_nodes=8, seed=0)[0]) for new, edges in (relabelled(data, s) for s in range(20))]
        assert not all(torch.equal(perm, new[expected]) for new, perm in runs)


def test_only_equivalent_nodes_stay_tied():
    """Orders of many draws agree on all but the swaps of nodes that an automorphism swaps."""
    path = both_ways(*((i, i + 1) for i in range(6)))
    perm, _ = NodeOrder(tie="wl", num_samples=50)(path, num_nodes=7, seed=0)
    classes = (perm - 3).abs()
    assert bool((classes == classes[0]).all())
    assert len(perm.unique(dim=0)) == 8
    assert len(NodeOrder(num_samples=50)(path, num_nodes=7, seed=0)[0].unique(dim=0)) > 8


def test_return_probabilities_separate_what_refinement_cannot():
    rings = nx.disjoint_union_all([nx.cycle_graph(n) for n in (3, 6, 4, 3)])  # one graph, all its nodes alike to 1-WL
    edges = undirected(rings)
    members = {3: {0, 1, 2, 13, 14, 15}, 6: set(range(3, 9)), 4: set(range(9, 13))}

    def runs(order):
        perm = order(edges, num_nodes=16, seed=3)[0].tolist()
        names = [next(size for size, nodes in members.items() if i in nodes) for i in perm]
        return 1 + sum(a != b for a, b in pairwise(names))

    assert runs(NodeOrder(tie="wl")) == 3
    assert runs(NodeOrder(tie="wl", rwse_steps=3)) > 3  # rings of 4 and 6 return alike within three steps
    assert runs(NodeOrder(tie="wl", rwse_steps=0)) > 3


@pytest.mark.parametrize("steps", range(1, 7))
def test_return_probabilities_are_diagonals_of_powers(steps, monkeypatch):
    data = random_graph(25, 60, undirected=False)
    weight, wanted = data.edge_attr.double(), torch.arange(25) % 3 > 0
    dense = torch.zeros(25, 25, dtype=torch.float64).index_put_(tuple(data.edge_index), weight, accumulate=True)
    move = dense / dense.sum(1, keepdim=True).clamp(min=1e-300)
    expected = torch.where(wanted, sum(torch.linalg.matrix_power(move, k).diagonal() for k in range(1, steps + 1)), 0)
    assert_close(node_order._return_probabilities(data.edge_index, 25, weight, wanted, steps), expected)
    monkeypatch.setattr(node_order, "_WALKS", 7)  # many portions
    assert_close(node_order._return_probabilities(data.edge_index, 25, weight, wanted, steps), expected)


@pytest.mark.parametrize("leaves", [511, 512, 3000])
def test_returns_are_not_counted_next_to_a_hub(leaves, monkeypatch):
    """From a leaf 1 + leaves walks of up to two steps lead on, and as many up to it; a ring beside is as alone."""
    product, entries = torch.sparse.mm, []

    def counted(*args):
        entries.append((out := product(*args))._nnz())
        return out

    monkeypatch.setattr(torch.sparse, "mm", counted)
    ring, n = undirected(nx.cycle_graph(3)), leaves + 1
    edges = torch.cat((undirected(nx.star_graph(leaves)), ring + n), 1)
    back = node_order._return_probabilities(edges, n + 3, None, torch.ones(n + 3, dtype=torch.bool), 4)
    assert_close(back[n:], torch.full((3,), 2 / 4 + 2 / 8 + 6 / 16, dtype=torch.float64))
    ahead = 511 * (1 + 511) if leaves == 511 else 0
    assert back[1:n].allclose(torch.tensor(2 / 511 if ahead else 0.0, dtype=torch.float64), rtol=1e-12)
    assert sum(entries) == 2 * (ahead + 3 * (2 + 3))
    perm, _ = NodeOrder(tie="wl").eval()(edges, torch.tensor([0] * n + [1] * 3))
    assert perm.tolist() == [*range(1, n), 0, *range(n, n + 3)]


def test_direction_counts_in_colours():
    """In the directed path 0 -> 1 -> 2, and its union with 4 -> 3 <- 5, the senders differ by where they lead."""
    edges = torch.tensor([[0, 1, 4, 5], [1, 2, 3, 3]])
    order = NodeOrder(lambda edge_index, batch, num_nodes, edge_weight: torch.zeros(num_nodes), tie="wl")
    perm, _ = order(edges, num_nodes=6, seed=0, num_samples=40)
    place = perm.argsort(-1)
    for node in (0, 1, 2, 3):
        assert len(place[:, node].unique()) == 1
    assert len(place[:, 4].unique()) == 2
    assert bool(((place[:, 4] - place[:, 5]).abs() == 1).all())


def test_features_tell_nodes_apart():
    ring = undirected(nx.cycle_graph(6))
    x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [-0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    order = NodeOrder(tie="wl", num_samples=20)
    assert len(order(ring, num_nodes=6, x=x, seed=0)[0].unique(dim=0)) == 1
    assert len(order(ring, num_nodes=6, x=torch.zeros(6, 2), seed=0)[0].unique(dim=0)) > 1


def test_what_is_left_goes_by_index_in_evaluation():
    ring, order = undirected(nx.cycle_graph(6)), NodeOrder(tie="wl").eval()
    assert order(ring, num_nodes=6)[0].tolist() == list(range(6))
    order.train()
    assert any(order(ring, num_nodes=6)[0].tolist() != list(range(6)) for _ in range(5))


# -- inputs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("key", KEYS)
def test_nothing_and_isolated_nodes(key, tie):
    order, none = NodeOrder(key, tie=tie), torch.zeros(2, 0, dtype=torch.int64)
    perm, ptr = order(none)
    assert perm.shape == (0,)
    assert ptr.tolist() == [0, 0]
    assert order(none, none[0], batch_size=3)[1].tolist() == [0, 0, 0, 0]
    perm, ptr = order(none, num_nodes=4)
    assert sorted(perm.tolist()) == [0, 1, 2, 3]
    assert order(none, torch.tensor([1]), batch_size=3)[1].tolist() == [0, 0, 1, 1]


def test_number_of_nodes():
    edges = both_ways((0, 1), (1, 4))
    assert NodeOrder()(edges)[0].shape == (5,)
    assert NodeOrder()(edges, score=torch.zeros(7))[0].shape == (7,)
    assert NodeOrder()(edges, x=torch.zeros(6, 2))[0].shape == (6,)


@pytest.mark.parametrize("tie", ["random", "index"])
@pytest.mark.parametrize("key", ["degree", "index"])
def test_compiles_in_one_graph(key, tie):
    data = Batch.from_data_list(graphs())
    order = NodeOrder(key, tie=tie)

    def run(edge_index, batch):
        return order(edge_index, batch, batch_size=8, seed=5)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(data.edge_index, data.batch), run(data.edge_index, data.batch), strict=True):
        assert torch.equal(a, b)
    drawn = torch.compile(lambda e, b: order(e, b, batch_size=8)[0], fullgraph=True, backend="aot_eager")
    assert sorted(drawn(data.edge_index, data.batch).tolist()) == list(range(data.num_nodes))


@pytest.mark.parametrize(("key", "tie"), [("kcore", "random"), ("pagerank", "random"), ("degree", "wl")])
def test_what_breaks_the_graph(key, tie):
    """What loops as long as values say, or a hundred times, or has sparse matrices, is not traced, but still right."""
    data = Batch.from_data_list(graphs())
    order = NodeOrder(key, tie=tie)
    torch.compiler.reset()
    compiled = torch.compile(lambda e, b: order(e, b, batch_size=8, seed=5), backend="aot_eager")
    for a, b in zip(
        compiled(data.edge_index, data.batch), order(data.edge_index, data.batch, batch_size=8, seed=5), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("key", KEYS)
def test_every_device(device, key, tie):
    data = Batch.from_data_list(graphs())
    order = NodeOrder(key, tie=tie)
    expected, _ = order(data.edge_index, data.batch, seed=5)
    perm, _ = order(data.edge_index.to(device), data.batch.to(device), seed=5)
    assert torch.equal(perm.cpu(), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"key": "betweenness"},
            "key is 'betweenness', but must be 'degree', 'pagerank', 'kcore', 'index' or a function",
        ),
        ({"tie": "hash"}, "tie is 'hash', but must be 'random', 'wl' or 'index'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"rwse_steps": -1}, "rwse_steps is -1"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        NodeOrder(**options)


def test_wrong_inputs():
    order, edges = NodeOrder(), both_ways((0, 1), (1, 2))
    with pytest.raises(ValueError, match="batch is not sorted"):
        order(edges, torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"batch is torch\.int64 \(3,\), but must be int64 \(4,\)"):
        order(edges, torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"batch has graphs 0 to 2, but batch_size is 2"):
        order(edges, torch.tensor([0, 1, 2]), batch_size=2)
    with pytest.raises(ValueError, match=r"batch has graphs -1 to 1"):
        order(edges, torch.tensor([-1, 0, 1]))
    with pytest.raises(ValueError, match=r"edge_index is torch\.int32"):
        order(edges.int())
    with pytest.raises(ValueError, match=r"score has shape \(3, 1\), but must be \(3,\)"):
        order(edges, score=torch.zeros(3, 1))
    with pytest.raises(ValueError, match="score is NaN for node 1"):
        order(edges, score=torch.tensor([0.0, torch.nan, 1.0]))
    with pytest.raises(ValueError, match=r"edge_weight has shape \(3,\), but must be \(4,\)"):
        order(edges, edge_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"edge_weight has -2\.0, but must not be negative"):
        NodeOrder("pagerank")(edges, edge_weight=torch.tensor([1.0, -2.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"key returned a tensor of shape \(2,\), but must be \(3,\)"):
        NodeOrder(lambda *args: torch.zeros(2))(edges)
    with pytest.raises(ValueError, match="num_samples is 0"):
        order(edges, num_samples=0)
    for key in ("degree", "pagerank", "kcore"):
        for bad in (-1, 3):
            with pytest.raises(IndexError, match=f"{bad} is out of range"):
                NodeOrder(key)(torch.tensor([[0, 1], [1, bad]]), num_nodes=3)


class NoReads(TorchDispatchMode):
    """Refuses what makes the host wait for values, outside ops of geo."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"):
            raise AssertionError(f"{name} reads values")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("key", "tie"), [(k, t) for k in ("degree", "index") for t in TIES])
def test_without_checks_nothing_is_read_on_the_host(key, tie, monkeypatch):
    """As under graph capture on CUDA: with the number of graphs given, and no walks to count."""
    data = Batch.from_data_list(graphs())
    order, score = NodeOrder(key, tie=tie, num_samples=2, rwse_steps=0), torch.rand(data.num_nodes)
    calls = (
        lambda: order(data.edge_index, data.batch, edge_weight=data.edge_attr, batch_size=8, seed=5),
        lambda: order(data.edge_index, data.batch, score=score, batch_size=8, seed=5),
        lambda: order(data.edge_index, num_nodes=data.num_nodes, seed=5),
        lambda: order(data.edge_index, data.batch, batch_size=8),
    )
    expected = [call() for call in calls]
    for call in calls:
        with pytest.raises(AssertionError, match="reads values"), NoReads():
            call()
    monkeypatch.setattr(bounds, "reads_values", lambda like: False)
    for i, (call, (perm, ptr)) in enumerate(zip(calls, expected, strict=True)):
        with NoReads():
            out = call()
        assert torch.equal(out[1], ptr)
        assert i == 3 or torch.equal(out[0], perm)
    with NoReads():
        node_order._transition(data.edge_index, data.num_nodes, data.edge_attr)


@pytest.mark.cuda
def test_captured_in_a_cuda_graph():
    """Drawn from the device's own generator: each replay has other ties."""
    data = Batch.from_data_list(graphs()).to("cuda")
    order = NodeOrder()
    order(data.edge_index, data.batch, batch_size=8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        perm, ptr = order(data.edge_index, data.batch, batch_size=8)
    seen = set()
    for _ in range(5):
        graph.replay()
        seen.add(tuple(perm.tolist()))
        assert torch.equal(data.batch[perm], data.batch)
    assert ptr.tolist() == data.ptr.tolist()
    assert len(seen) == 5


def test_module():
    order = NodeOrder("pagerank", True, "wl", 3)
    order.reset_parameters()
    assert not order.state_dict()
    assert repr(order) == "NodeOrder('pagerank', descending=True, tie='wl', num_samples=3)"
    assert "importance" in repr(NodeOrder(importance))
