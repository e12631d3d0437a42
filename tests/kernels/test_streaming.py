"""Walks on a changing graph equal walks sampled anew, and only those are walked again that the change could reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo.kernels import (
    GRFKernel,
    StreamingWalks,
    heat,
    katz,
    normalized_adjacency,
    personalised_pagerank,
    regularised_laplacian,
)
from geo.kernels.ragged import Ragged
from geo.ops import WalkDeposits, grf_paths, grf_walks

SEED = 2**63 + 77  # uses all 64 bits


class Model:
    """A graph as a matrix: the plainest way to change one."""

    def __init__(self, num_nodes: int, degree: float = 3.0, directed: bool = False, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.directed = directed
        present = self.draw(num_nodes, num_nodes) < degree / max(num_nodes, 1)
        weight = self.draw(num_nodes, num_nodes) + 0.5
        self.present = present if directed else present | present.t()
        self.weight = weight if directed else weight + weight.t()
        self.key = torch.arange(num_nodes)

    def draw(self, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator)

    @property
    def edges(self) -> tuple[Tensor, Tensor]:
        edge_index = self.present.nonzero().t().contiguous()
        return edge_index, self.weight[edge_index[0], edge_index[1]]

    def pick(self, mask: Tensor, num: int) -> Tensor:
        """Some edges of a mask, both directions where the graph has no direction."""
        found = mask.nonzero().t() if self.directed else mask.triu().nonzero().t()
        found = found[:, torch.randperm(found.size(1), generator=self.generator)[:num]]
        return found if self.directed else torch.unique(torch.cat([found, found.flip(0)], dim=1), dim=1)

    def set(self, edges: Tensor) -> Tensor:
        """Give edges new weights."""
        weight = self.draw(*self.present.shape) + 0.5
        weight = weight if self.directed else weight + weight.t()
        self.present[edges[0], edges[1]] = True
        self.weight[edges[0], edges[1]] = weight[edges[0], edges[1]]
        return weight[edges[0], edges[1]]

    def add_nodes(self, num: int, first_key: int) -> None:
        self.present = torch.nn.functional.pad(self.present, (0, num, 0, num))
        self.weight = torch.nn.functional.pad(self.weight, (0, num, 0, num))
        self.key = torch.cat([self.key, torch.arange(first_key, first_key + num)])

    def remove_nodes(self, nodes: Tensor) -> None:
        kept = torch.ones(len(self.key), dtype=torch.bool)
        kept[nodes] = False
        self.present, self.weight = self.present[kept][:, kept], self.weight[kept][:, kept]
        self.key = self.key[kept]


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())


def assert_like_new(walks: StreamingWalks, model: Model, options: dict, normalization: str | None) -> None:
    edge_index, weight = model.edges
    device = walks.deposits.value.device
    args = (edge_index.to(device), weight.to(device), len(model.key), normalization, walks.deposits.value.dtype)
    graph, key = normalized_adjacency(*args), model.key.to(device)
    assert walks.num_nodes == len(model.key)
    assert_same((walks.node_key,), (model.key,))
    assert_same((walks.edge_index, walks.edge_weight), (edge_index, weight))
    options = {**options, "seed": SEED, "node_key": key, "choice": "rendezvous"}
    assert_same(walks.deposits, grf_walks(*graph, **options))
    assert_same(walks.paths(), grf_paths(*graph, **options)[:2])


LAWS = {
    "iid": {"num_walks": 33, "coupling": "iid", "p_halt": 0.3},  # enough for the order of sums to show
    "antithetic": {"num_walks": 4, "coupling": "antithetic", "p_halt": 0.2, "first_walk": 4},
    "cut": {"num_walks": 4, "coupling": "antithetic", "p_halt": 0.1, "max_length": 3},
    "survival": {"num_walks": 2, "coupling": "iid", "survival": [1.0, 0.9, 0.5, 0.5, 0.0]},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("normalization", ["sym", None])
@pytest.mark.parametrize("directed", [False, True])
def test_oracle_8_streaming_equals_sampling_anew(law, normalization, directed, device):
    """Bit for bit, over a long story of all kinds of changes."""
    options, model = LAWS[law], Model(40, directed=directed, seed=3)
    edge_index, weight = (t.to(device) for t in model.edges)
    walks = StreamingWalks(
        edge_index, weight, 40, **options, seed=SEED, normalization=normalization, dtype=torch.float32
    )
    assert_like_new(walks, model, options, normalization)
    next_key = 40
    for step in range(8):
        change: dict = {}
        if step % 4 != 1:
            change["edges_removed"] = model.pick(model.present, 3)
            model.present[tuple(change["edges_removed"])] = False
        if step in (2, 6, 7):
            change["nodes_added"] = 2
            model.add_nodes(2, next_key)
            next_key += 2
        if step % 4 != 0:  # new edges, and new weights of edges that are there
            change["edges_added"] = torch.unique(
                torch.cat([model.pick(~model.present, 3), model.pick(model.present, 2)], dim=1), dim=1
            )
            change["weight_added"] = model.set(change["edges_added"])
        if step % 4 == 3:
            change["nodes_removed"] = torch.randperm(len(model.key), generator=model.generator)[:3]
            model.remove_nodes(change["nodes_removed"])
        done = walks.update(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in change.items()})
        assert len(done.start) > 0
        assert_like_new(walks, model, options, normalization)


def test_exactly_the_walks_that_visited_touched_nodes_are_simulated(monkeypatch):
    model, calls = Model(400, degree=2.0, seed=1), []
    walks = StreamingWalks(*model.edges, 400, num_walks=4, seed=SEED)
    before, deposits = walks.paths(), walks.deposits

    def recorded(self, start, walk):
        calls.append(start * 4 + walk)
        return simulate(self, start, walk)

    simulate = StreamingWalks._walk
    monkeypatch.setattr(StreamingWalks, "_walk", recorded)
    removed, added = model.pick(model.present, 2), model.pick(~model.present, 1)
    done = walks.update(added, removed)
    touched = set(removed.flatten().tolist()) | set(added.flatten().tolist())
    assert done.touched.tolist() == sorted(touched)

    ptr, node = before
    visited = [not touched.isdisjoint(node[ptr[w] : ptr[w + 1]].tolist()) for w in range(1600)]
    expected = torch.tensor(visited).nonzero().flatten()
    assert 0 < len(expected) < 400  # local: less than a quarter of all walks
    assert torch.equal(done.start * 4 + done.walk, expected)
    assert len(calls) == 1
    assert torch.equal(calls[0], expected)

    rows = torch.unique(expected // 4)
    assert torch.equal(done.rows, rows)
    others = sorted(set(range(1600)) - set(expected.tolist()))
    assert_same(*(Ragged(*paths).take(torch.tensor(others)) for paths in (walks.paths(), before)))
    others = sorted(set(range(400)) - set(rows.tolist()))
    assert len(others) > 200
    assert_same(*(Ragged(*found).take(torch.tensor(others)) for found in (walks.deposits, deposits)))


def test_weights_alone():
    """A walk that visits a touched node keeps its path; with weights as they are the source alone is touched."""
    model = Model(30, directed=True, seed=2)
    edge = model.pick(model.present, 1)
    for normalization, expected in (("sym", sorted(edge.flatten().tolist())), (None, edge[0].tolist())):
        walks = StreamingWalks(
            *model.edges, 30, num_walks=4, seed=SEED, normalization=normalization, dtype=torch.float32
        )
        before = walks.paths()
        done = walks.update(edges_added=edge, weight_added=torch.tensor([7.0]))
        assert done.touched.tolist() == expected
        assert_same(walks.paths(), before)
        changed = Model(30, directed=True, seed=2)
        changed.weight[edge[0], edge[1]] = 7.0
        assert_like_new(walks, changed, {"num_walks": 4, "coupling": "antithetic"}, normalization)


def test_a_component_of_its_own_is_left_alone():
    """Two paths, 0 - 1 - 2 and 3 - 4: cutting the second reaches the walks from 3 and 4, all of which start there."""
    edges = torch.tensor([[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]])
    walks = StreamingWalks(edges, num_walks=2, seed=0, coupling="iid")
    done = walks.update(edges_removed=torch.tensor([[3, 4], [4, 3]]))
    assert done.start.tolist() == [3, 3, 4, 4]
    assert done.walk.tolist() == [0, 1, 0, 1]
    ptr, node = walks.paths()
    assert node[ptr[6] :].tolist() == [3, 3, 4, 4]
    assert walks.deposits.ptr[3:].diff().tolist() == [1, 1]
    assert walks.deposits.value[-2:].tolist() == [1.0, 1.0]


def test_walks_through_finds_what_a_search_of_all_paths_finds():
    """Also while the index is out of date, and after it has been built anew."""
    model = Model(60, seed=5)
    walks = StreamingWalks(*model.edges, 60, num_walks=4, seed=SEED)
    stale = []
    for _ in range(12):
        edge = model.pick(~model.present, 1)
        model.present[tuple(edge)] = True
        walks.update(edges_added=edge)
        stale.append(len(walks._recent))
        ptr, node = walks.paths()
        owner = torch.arange(240).repeat_interleave(ptr.diff())
        for nodes in (torch.tensor([7]), torch.tensor([3, 50, 3]), torch.tensor([], dtype=torch.int64)):
            assert torch.equal(walks.walks_through(nodes), torch.unique(owner[torch.isin(node, nodes)]))
    assert max(stale) > 0
    assert 0 in stale


def test_nodes_that_leave_take_their_keys_along():
    model = Model(12, seed=4)
    walks = StreamingWalks(*model.edges, 12, num_walks=2, seed=SEED, node_key=torch.arange(12) * 5)
    assert walks.update(nodes_removed=torch.tensor([11, 0])).rows.max() < 10
    assert walks.node_key.tolist() == list(range(5, 55, 5))
    assert walks.update(nodes_added=1).start.tolist() == [10, 10]
    assert walks.node_key.tolist() == [*range(5, 55, 5), 56]  # 55 is not given again
    assert "num_nodes=11" in repr(walks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_graphs(dtype, device):
    none = torch.empty((2, 0), dtype=torch.int64, device=device)
    walks = StreamingWalks(none, num_walks=2, seed=0, dtype=dtype)
    assert walks.deposits.ptr.tolist() == [0]
    done = walks.update()
    assert [len(part) for part in done] == [0, 0, 0, 0]
    assert walks.update(nodes_added=3).rows.tolist() == [0, 1, 2]
    assert walks.deposits.value.dtype == dtype
    assert walks.deposits.value.tolist() == [1.0, 1.0, 1.0]
    loop = torch.tensor([[1], [1]], device=device)
    assert walks.update(edges_added=loop).start.tolist() == [1, 1]
    graph = normalized_adjacency(loop, num_nodes=3, dtype=dtype)
    assert_same(walks.deposits, grf_walks(*graph, num_walks=2, seed=0, coupling="antithetic", choice="rendezvous"))
    assert walks.update(nodes_removed=torch.arange(3, device=device)).rows.tolist() == []
    assert walks.num_nodes == 0


def test_repeated_edges_and_whole_weights():
    edges = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]])
    walks = StreamingWalks(edges, torch.tensor([1, 2, 3, 2]), num_walks=2, seed=0)
    assert walks.edge_weight.tolist() == [4.0, 4.0]
    assert walks.deposits.value.dtype == torch.float32


def test_oracle_8_threads():
    """The same bits on one thread and on two."""
    model, found = Model(300, seed=6), []
    removed = model.pick(model.present, 20)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            walks = StreamingWalks(*model.edges, 300, num_walks=4, seed=SEED)
            walks.update(edges_removed=removed)
            found.append(walks.deposits)
    finally:
        torch.set_num_threads(before)
    assert_same(*found)


KERNELS = {
    "two sets": (heat(), {"coupling": "antithetic"}),
    "one set": (regularised_laplacian(), {"coupling": "iid", "two_sets": False, "debias_diag": True}),
    "directed": (heat(), {"coupling": "iid", "survival": [1.0, 0.8, 0.5, 0.2, 0.0]}),
    "raw": (katz(0.05), {"coupling": "antithetic", "p_halt": 0.3}),
    "pagerank": (personalised_pagerank(0.5), {"coupling": "antithetic", "p_halt": 0.3}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_updated_equals_one_of_the_changed_graph(name):
    model, (series, options) = Model(40, directed=name == "directed", seed=8), KERNELS[name]
    options = {"num_walks": 4, "choice": "rendezvous", "dtype": torch.float32, **options}

    def fresh(num_nodes: int) -> GRFKernel:
        return GRFKernel(model.edges[0], series, model.edges[1], num_nodes, generator=torch.Generator(), **options)

    kernel = fresh(40)
    other = kernel.with_series(series)
    before = other.dense()
    for _ in range(2):
        removed = model.pick(model.present, 2)
        model.present[tuple(removed)] = False
        added = model.pick(~model.present, 3)
        done = kernel.update(added, removed, model.set(added))
        assert all(len(update.start) > 0 for update in done)
        assert len(done) == {"one set": 5}.get(name, 2)
        expected = fresh(40)
        for phi, psi in zip(kernel.features(), expected.features(), strict=True):
            assert_same((phi.ptr, phi.col, phi.value), (psi.ptr, psi.col, psi.value))
        assert_same((kernel.dense(), kernel.exact()), (expected.dense(), expected.exact()))
    model.add_nodes(2, 40)
    kernel.update(nodes_added=2)
    assert_same((kernel.dense(),), (fresh(42).dense(),))
    kernel.update(nodes_removed=torch.tensor([0]))
    assert kernel.shape == (41, 41)
    shared, features = kernel.with_series(series), kernel.dense()
    shared.update()  # finds its own paths, by the same keys
    assert_same((shared.dense(), other.dense()), (features, before))
    assert kernel.resample().dense().shape == (41, 41)


def test_what_the_update_of_a_kernel_refuses():
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    with pytest.raises(ValueError, match=r"update: needs a kernel with choice='rendezvous'.*got choice='slot'"):
        GRFKernel(edges, heat()).update()
    options = {"coupling": "antithetic", "choice": "rendezvous", "p_halt": 0.2}
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"update: edge_weight requires a gradient.*detach\(\)"):
        GRFKernel(edges, heat(), weight, **options).update()
    kernel = GRFKernel(edges, katz(0.5), **options)
    before = kernel.dense()
    with pytest.raises(ValueError, match=r"would become directed: give each edge in both directions"):
        kernel.update(edges_added=torch.tensor([[0], [2]]))
    with pytest.raises(ValueError, match=r"series: the modulation of .* converges for spectral radii below"):
        kernel.update(edges_added=edges, weight_added=torch.full((4,), 5.0))
    assert_same((kernel.dense(),), (before,))
    assert_same((kernel._graph[0],), (edges,))
    kernel.update()
    assert_same((kernel.dense(),), (before,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edges_removed": [[0, 2], [1, 0]]}, ValueError, r"edges_removed: .* got \[2, 0\], which is not there"),
        ({"edges_added": [[0, 0], [2, 2]]}, ValueError, r"edges_added: .* got \[0, 2\] twice: add up"),
        ({"edges_added": [[0], [3]]}, IndexError, "edges_added: expected nodes from 0 to 2, got 3"),
        ({"edges_added": [0, 1]}, ValueError, r"edges_added: expected int64 \[2, E\]"),
        ({"edges_added": [[0], [2]], "weight_added": [1.0, 2.0]}, ValueError, r"weight_added: expected \[1\]"),
        ({"edges_added": [[0], [2]], "weight_added": [float("nan")]}, ValueError, "weight_added: expected finite"),
        ({"nodes_removed": [-1]}, IndexError, "nodes_removed: expected nodes from 0 to 2, got -1"),
        ({"nodes_removed": [0.5]}, ValueError, r"nodes_removed: expected int64 \[K\]"),
        ({"nodes_added": -1}, ValueError, "nodes_added: expected a number of at least 0"),
    ],
)
def test_what_an_update_refuses(change, error, message):
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    walks = StreamingWalks(edges, num_walks=2, seed=0)
    before: WalkDeposits = walks.deposits
    change = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in change.items()}
    with pytest.raises(error, match=message):
        walks.update(**change)
    assert_same(walks.deposits, before)
    assert_same((walks.edge_index,), (edges,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "repelling"}, "'rendezvous' needs coupling='iid' or 'antithetic', got coupling='repelling'"),
        ({"coupling": "antithetic+repelling"}, "'rendezvous' needs coupling='iid' or 'antithetic'"),
        ({"num_walks": 3}, "num_walks: coupling='antithetic' needs an even number, got 3"),
        ({"p_halt": 1.0}, "p_halt: expected a probability between 0 and 1"),
        ({"node_key": torch.tensor([1, 1])}, "node_key: expected different numbers"),
        ({"node_key": torch.tensor([1])}, r"node_key: expected int64 \[2\]"),
    ],
)
def test_what_a_new_one_refuses(options, message):
    edges = torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=message):
        StreamingWalks(edges, **{"num_walks": 2, "seed": 0, **options})


def test_rows_replaced_many_times_take_bounded_room():
    generator = torch.Generator().manual_seed(0)
    expected = [torch.arange(3) + 10 * i for i in range(20)]
    rows = Ragged(torch.arange(0, 63, 3), torch.cat(expected))
    for _ in range(100):
        which = torch.randperm(20, generator=generator)[:4]
        lengths = torch.randint(6, (4,), generator=generator)
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        values = torch.randint(1000, (int(ptr[-1]),), generator=generator)
        rows.replace(which, ptr, values)
        for i, row in enumerate(which.tolist()):
            expected[row] = values[ptr[i] : ptr[i + 1]]
        assert torch.equal(rows.packed()[1], torch.cat(expected))
        assert rows.columns[0].size(0) < 4 * 20 * 6
