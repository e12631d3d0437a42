from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geo import _native
from geo.ops import (
    WalkDeposits,
    csr_from_index,
    grf_paths,
    grf_paths_reference,
    grf_walks,
    grf_walks_reference,
    random_walk,
)
from geo.ops.walk_step import COUPLINGS, checked_law, proposal_units, walk_step

SEED = 2**63 + 123456789  # uses all 64 bits
LAWS = [  # coupling, proposal, choice
    *itertools.product(COUPLINGS, ("uniform", "weight"), ("slot",)),
    ("iid", "uniform", "rendezvous"),
    ("antithetic", "uniform", "rendezvous"),
]


def csr_of(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = matrix.nonzero().t()
    rowptr, _ = csr_from_index(index[0], matrix.size(0))
    return rowptr, index[1].contiguous(), matrix[index[0], index[1]]


def weighted_digraph(num_nodes: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """With self-loops, negative entries, and rows of different lengths, some empty where they are short."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_nodes, num_nodes)
    there = torch.rand(size, generator=generator) < density
    sign = torch.where(torch.rand(size, generator=generator) < 0.7, 1.0, -1.0).double()
    scale = min(1.0, 3 / max(1.0, num_nodes * density))
    return there * sign * (0.15 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)) * scale


def copies(graph: tuple[Tensor, Tensor, Tensor], many: int) -> tuple[Tensor, Tensor, Tensor]:
    """The graph many times over, side by side."""
    rowptr, col, weight = graph
    shift = torch.arange(many).view(-1, 1)
    ends = (rowptr[1:] + shift * len(col)).flatten()
    return torch.cat([rowptr[:1], ends]), (col + shift * (len(rowptr) - 1)).flatten(), weight.repeat(many)


def powers_of(deposits: WalkDeposits, num_nodes: int, lengths: int) -> Tensor:
    """M_0, .., M_{lengths - 1} of each copy of a graph, dense."""
    num_starts = len(deposits.ptr) - 1
    row = torch.arange(num_starts).repeat_interleave(deposits.ptr.diff())
    keep = deposits.length < lengths
    out = deposits.value.new_zeros(lengths, num_starts, num_nodes)
    out[deposits.length[keep].long(), row[keep], deposits.col[keep] % num_nodes] = deposits.value[keep]
    return out.view(lengths, -1, num_nodes, num_nodes).transpose(0, 1)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The statistic, in standard deviations from its mean."""
    expected = counts.sum() * probabilities
    assert expected.min() >= 20
    statistic = float(((counts - expected).square() / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_oracle_6_path_of_two_nodes():
    """P(length >= 1) = 1 - p, and the load is c / (1 - p) exactly."""
    c, p, walks = 0.375, 0.25, 4000
    rowptr, col, weight = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([c, c])
    start = torch.tensor([0])
    for walk in (grf_walks, grf_walks_reference):
        out = walk(rowptr, col, weight, start, num_walks=walks, seed=1, p_halt=p, coupling="iid")
        one = (out.col == 1) & (out.length == 1)
        share = float(out.value[one]) / (c / (1 - p))
        assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / walks)
        first = (out.col == 0) & (out.length == 0)
        assert float(out.value[first]) == 1
        halves = walk(rowptr, col, weight, start, num_walks=1, seed=1, p_halt=0.5, coupling="iid")
        assert len(halves.value) > 1
        assert torch.equal(halves.value, (c / 0.5) ** halves.length)
        assert torch.equal(halves.col, halves.length.long() % 2)


@pytest.mark.parametrize(("coupling", "proposal", "choice"), LAWS)
@pytest.mark.parametrize("survival", [None, [1.0, 0.9, 0.5, 0.3]])
def test_oracle_2_mean_of_deposits(coupling, proposal, choice, survival):
    """E[M_l] = U^l, as a z-test over repeats; some weights are 0."""
    matrix = weighted_digraph(6)
    rowptr, col, weight = csr_of(matrix)
    zero = int(rowptr[1])
    matrix[1, col[zero]] = weight[zero] = 0
    repeats = 2500
    options = {"coupling": coupling, "proposal": proposal, "choice": choice, "survival": survival, "p_halt": 0.4}
    out = grf_walks(*copies((rowptr, col, weight), repeats), num_walks=8, seed=3, **options)
    samples = powers_of(out, 6, 4)
    error = samples.mean(0) - torch.stack([torch.linalg.matrix_power(matrix, k) for k in range(4)])
    spread = samples.std(0) / math.sqrt(repeats)
    random = spread > 1e-9
    assert error[~random].abs().max() < 1e-6
    z = error[random] / spread[random]
    assert z.abs().max() < 4.5
    assert 0.8 < z.square().mean().sqrt() < 1.25


@pytest.mark.parametrize(("coupling", "proposal", "choice"), LAWS)
def test_marginal_law_of_each_step(coupling, proposal, choice):
    """Whatever the coupling, each walk takes each edge with the probability of the proposal."""
    matrix = torch.tensor([[0.0, 2.0, -1.0, 4.0, 0.5]] * 5)
    law = {"uniform": torch.full((4,), 0.25), "weight": torch.tensor([2.0, 1.0, 4.0, 0.5]) / 7.5}[proposal]
    many = 3000
    graph = copies(csr_of(matrix), many)
    options = {"coupling": coupling, "proposal": proposal, "choice": choice, "survival": [1, 1, 1, 0]}
    ptr, node, _ = grf_paths(*graph, torch.arange(many) * 5, num_walks=6, seed=5, **options)
    nodes = node.view(many, 6, 3) % 5
    assert torch.equal(ptr.diff(), torch.full((many * 6,), 3))
    for walk in range(6):
        for step in (1, 2):
            counts = torch.bincount(nodes[:, walk, step], minlength=5)[1:]
            assert abs(chi_square(counts, law)) < 4.5


@pytest.mark.parametrize(("coupling", "proposal", "choice"), LAWS)
def test_equals_reference(device, coupling, proposal, choice):
    generator = torch.Generator().manual_seed(0)

    def one_of(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    for num_nodes, density in ((0, 0.0), (1, 1.0), (1, 0.0), (2, 0.9), (7, 0.5), (63, 0.05), (200, 0.02), (120, 0.5)):
        for dtype in (torch.float32, torch.float64):
            graph = [t.to(device) for t in csr_of(weighted_digraph(num_nodes, density).to(dtype))]
            for survival in (None, [1, 0.7, 0.7, 0.2], [1, 1, 0.5, 0.5, 0]):
                start = one_of(None, torch.randint(max(num_nodes, 1), (5 * (num_nodes > 0),), generator=generator))
                key = one_of(None, torch.randperm(num_nodes, generator=generator) + 2**35)
                options = {
                    "num_walks": one_of(2, 6, 40),
                    "seed": one_of(0, SEED, -7),
                    "p_halt": one_of(0.05, 0.3, 0.7),
                    "survival": survival,
                    "coupling": coupling,
                    "proposal": proposal,
                    "choice": choice,
                    "node_key": key if key is None else key.to(device),
                    "first_walk": one_of(0, 17),
                    "max_length": one_of(None, None, 0, 3),
                }
                args = (*graph, start if start is None else start.to(device))
                assert equal(grf_walks(*args, **options), grf_walks_reference(*args, **options))
                assert equal(grf_paths(*args, **options), grf_paths_reference(*args, **options))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_many_walks_and_long_rows(coupling):
    """More walks from a start than a batch has, thousands of deposits in a row, and a hub of more edges than walks."""
    num_nodes = 3000
    spokes = torch.stack([torch.zeros(num_nodes - 1, dtype=torch.int64), torch.arange(1, num_nodes)])
    index = torch.cat([spokes, spokes.flip(0)], dim=1)
    rowptr, perm = csr_from_index(index[0], num_nodes)
    col, weight = index[1][perm], torch.rand(index.size(1)) * 0.1
    start = torch.tensor([0, 5, 7])
    options = {"num_walks": 1000, "seed": 2, "p_halt": 0.2, "coupling": coupling}
    out = grf_walks(rowptr, col, weight, start, **options)
    assert int(out.ptr.diff().min()) > 1000
    assert equal(out, grf_walks_reference(rowptr, col, weight, start, **options))
    if "repelling" in coupling:  # all walks leave the hub along different edges
        ptr, node, _ = grf_paths(rowptr, col, None, start[:1], num_walks=1000, seed=2, coupling=coupling, max_length=1)
        ends = node[ptr[1:] - 1]
        moved = ends[ends > 0]
        assert len(moved) > 300
        assert len(moved.unique()) == len(moved)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_more_nodes_than_three_bytes_count():
    """Many deposits of a row are sorted by the bytes of the node: here all four of them."""
    num_nodes = 2**24 + 2
    nodes = torch.arange(num_nodes - 300, num_nodes)
    rowptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    rowptr[-300:] = torch.arange(1, 301) * 300
    col, weight = nodes.flip(0).repeat(300), torch.full((90000,), 0.5 / 300)
    options = {"num_walks": 400, "seed": 0, "coupling": "iid"}
    out = grf_walks(rowptr, col, weight, nodes[-1:], **options)
    assert len(out.col) > 200
    assert equal(out, grf_walks_reference(rowptr, col, weight, nodes[-1:], **options))


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_time_of_repelling_walks_grows_with_their_number():
    num_nodes = 10**5
    spokes = torch.stack([torch.zeros(num_nodes - 1, dtype=torch.int64), torch.arange(1, num_nodes)])
    index = torch.cat([spokes, spokes.flip(0)], dim=1)
    rowptr, perm = csr_from_index(index[0], num_nodes)
    args = (rowptr, index[1][perm], torch.full((index.size(1),), 0.1), torch.tensor([0]))
    options = {"num_walks": 32000, "seed": 2, "coupling": "repelling"}
    begin = time.process_time()
    out = grf_walks(*args, **options)
    assert time.process_time() - begin < 0.4  # a second where each walk goes back over all before it
    assert equal(out, grf_walks_reference(*args, **options))


@pytest.mark.parametrize("num_walks", [60, 70, 500])
def test_many_repelling_walks_in_short_rows(num_walks):
    """Many walks at few nodes with few edges: blocks of all sizes, of all nodes at once."""
    rowptr, col, weight = csr_of(weighted_digraph(40, 0.4).float())
    options = {"num_walks": num_walks, "seed": 4, "p_halt": 0.1, "coupling": "repelling"}
    start = torch.tensor([0, 39, 3, 3])
    assert equal(
        grf_paths(rowptr, col, None, start, **options), grf_paths_reference(rowptr, col, None, start, **options)
    )
    assert equal(
        grf_walks(rowptr, col, weight, start, **options), grf_walks_reference(rowptr, col, weight, start, **options)
    )


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_long_rows_with_units_and_keys(device, coupling):
    generator = torch.Generator().manual_seed(0)
    rowptr, col, weight = (t.to(device) for t in csr_of(weighted_digraph(400, 0.9)))
    options = {
        "num_walks": 300,
        "seed": 4,
        "p_halt": 0.2,
        "proposal": "weight",
        "coupling": coupling,
        "node_key": torch.randperm(400, generator=generator).to(device),
    }
    args = (rowptr, col, weight, torch.tensor([0, 399, 3], device=device))
    assert equal(grf_walks(*args, **options), grf_walks_reference(*args, **options))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("proposal", ["uniform", "weight"])
def test_walks_of_other_numbers_are_independent(coupling, proposal):
    """The mean of the product of the deposits of two sets is the product of their means, on the diagonal, too."""
    matrix = weighted_digraph(4, 0.9)
    repeats, options = 12000, {"num_walks": 2, "seed": 7, "coupling": coupling, "proposal": proposal}
    many = copies(csr_of(matrix), repeats)
    one, two = (powers_of(grf_walks(*many, **options, first_walk=k), 4, 4).sum(1) for k in (0, 2))
    exact = sum(torch.linalg.matrix_power(matrix, k) for k in range(4))
    samples = torch.einsum("rik,rjk->rij", one, two)
    z = (samples.mean(0) - exact @ exact.t()) / (samples.std(0) / math.sqrt(repeats))
    assert z.abs().max() < 4.5


def test_rows_are_sorted_and_coalesced():
    graph = csr_of(weighted_digraph(40, 0.2))
    out = grf_walks(*graph, num_walks=20, seed=0, p_halt=0.1)
    row = torch.arange(40).repeat_interleave(out.ptr.diff())
    key = (row * 40 + out.col) * 10**6 + out.length
    assert (key[1:] > key[:-1]).all()
    assert out.length.dtype == torch.int32


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize(("coupling", "proposal", "choice"), LAWS)
def test_same_bits_on_any_number_of_threads(coupling, proposal, choice):
    graph = csr_of(weighted_digraph(3000, 0.002).float())
    options = {"num_walks": 12, "seed": 5, "coupling": coupling, "proposal": proposal, "choice": choice, "p_halt": 0.1}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((*grf_walks(*graph, **options), *grf_paths(*graph, **options)))
    finally:
        torch.set_num_threads(threads)
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("num_starts", [40, 3000])
def test_with_and_without_the_packed_graph(num_starts):
    """Few steps on many edges read the graph itself."""
    graph = csr_of(weighted_digraph(3000, 0.005).float())
    for proposal in ("uniform", "weight"):
        options = {"num_walks": 4, "seed": 5, "proposal": proposal}
        few = grf_walks(*graph, torch.arange(40), **options)
        some = grf_walks(*graph, torch.arange(num_starts), **options)
        last = int(some.ptr[40])
        assert equal(few, (some.ptr[:41], some.col[:last], some.length[:last], some.value[:last]))


@pytest.mark.parametrize("p_halt", [0.2, 0.5])
@pytest.mark.parametrize("coupling", ["iid", "antithetic"])
def test_independent_walks_are_those_of_random_walk(p_halt, coupling):
    """Antithetic walks of the second half go the same way, but end elsewhere."""
    rowptr, col, _ = csr_of(weighted_digraph(20, 0.2))
    ptr, node, edge = grf_paths(rowptr, col, num_walks=6, seed=SEED, p_halt=p_halt, coupling=coupling, first_walk=3)
    nodes, edges = random_walk(rowptr, col, torch.arange(20), 60, 6, seed=SEED, first_walk=3, return_edges=True)
    halting = random_walk(rowptr, col, torch.arange(20), 60, 6, seed=SEED, first_walk=3, p_halt=p_halt)
    alone = rowptr.diff() == 0
    for w in range(120):
        s, k = w // 6, w % 6
        path = slice(int(ptr[w]), int(ptr[w + 1]))
        steps = len(node[path]) - 1
        assert torch.equal(node[path], nodes[s, k, : steps + 1])
        assert torch.equal(edge[path][1:], edges[s, k, :steps])
        assert int(edge[path][0]) == -1
        stuck = bool((edges[s, k, :61] < 0).any()) or bool(alone[s])
        if (coupling == "iid" or k < 3) and not stuck:
            assert steps == int((halting[s, k] >= 0).sum()) - 1


def test_repelling_walks_take_different_edges():
    """At the first step the walks of a start take all edges equally often, up to one."""
    rowptr, col, _ = csr_of(torch.ones(7, 7))
    for paths in (grf_paths, grf_paths_reference):
        ptr, node, _ = paths(rowptr, col, num_walks=23, seed=0, survival=[1, 1, 0], coupling="repelling")
        first = node[ptr[:-1] + 1].view(7, 23)
        for row in first:
            counts = torch.bincount(row, minlength=7)
            assert sorted(counts.tolist()) == [3, 3, 3, 3, 3, 4, 4]
            assert sorted(row[:7].tolist()) == list(range(7))
            assert sorted(row[7:14].tolist()) == list(range(7))


def test_repelling_walks_take_any_order():
    """The slots of a block are a uniform permutation: all 24 of 4 edges are equally likely."""
    many = 12000
    rowptr, col, weight = copies(csr_of(torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]] * 5)), many)
    options = {"num_walks": 4, "seed": 1, "survival": [1, 1, 0], "coupling": "repelling"}
    _, node, _ = grf_paths(rowptr, col, weight, torch.arange(many) * 5, **options)
    order = (node.view(many, 4, 2)[:, :, 1] % 5 - 1) @ torch.tensor([64, 16, 4, 1])
    values, counts = order.unique(return_counts=True)
    assert len(values) == 24
    assert abs(chi_square(counts, torch.full((24,), 1 / 24))) < 4


def test_repelling_walks_in_proportion_to_weights():
    """Points at equal distances: each edge has its share of the walks, up to one."""
    rowptr, col, weight = csr_of(torch.tensor([[0.0, 3.0, 1.0, 4.0]] * 4))
    options = {"num_walks": 20, "seed": 1, "survival": [1, 1, 0], "coupling": "repelling", "proposal": "weight"}
    _, node, _ = grf_paths(rowptr, col, weight, **options)
    for row in node.view(4, 20, 2)[:, :, 1]:
        counts = torch.bincount(row, minlength=4)[1:]
        assert (counts - 20 * torch.tensor([3.0, 1.0, 4.0]) / 8).abs().max() < 1


def test_antithetic_pairs_never_halt_together():
    rowptr, col, _ = csr_of(torch.ones(5, 5))
    for coupling in ("antithetic", "antithetic+repelling"):
        for paths in (grf_paths, grf_paths_reference):
            ptr, _, _ = paths(rowptr, col, num_walks=400, seed=0, p_halt=0.5, coupling=coupling)
            length = ptr.diff().view(5, 2, 200)
            assert (length[:, 0] != length[:, 1]).all()
    ptr, _, _ = grf_paths(rowptr, col, num_walks=400, seed=0, p_halt=0.5, coupling="iid")
    length = ptr.diff().view(5, 2, 200)
    assert (length[:, 0] == length[:, 1]).any()


def test_rendezvous_keeps_the_choices_that_a_removed_edge_does_not_touch():
    rowptr, col = torch.tensor([0, 5, 5, 5, 5, 5, 5]), torch.arange(1, 6)
    options = {"num_walks": 4000, "seed": 0, "survival": [1, 1, 0], "coupling": "iid", "choice": "rendezvous"}
    start = torch.tensor([0])
    before = grf_paths(rowptr, col, None, start, **options)[1].view(-1, 2)[:, 1]
    kept = torch.tensor([1, 2, 4, 5])
    after = grf_paths((rowptr - 1).clamp(min=0), kept.flip(0), None, start, **options)[1].view(-1, 2)[:, 1]
    assert torch.equal(before[before != 3], after[before != 3])
    assert (after != 3).all()
    assert abs(chi_square(torch.bincount(after[before == 3], minlength=6)[kept], torch.full((4,), 0.25))) < 4


def test_walks_do_not_depend_on_what_else_is_asked_for():
    rowptr, col, _ = graph = csr_of(weighted_digraph(60, 0.1).float())
    for coupling in COUPLINGS:
        options = {"num_walks": 8, "seed": 3, "coupling": coupling}
        whole = grf_walks(*graph, **options)
        some = grf_walks(*graph, torch.tensor([9, 2]), **options)
        for i, s in enumerate((9, 2)):
            for a, b in zip(some[1:], whole[1:], strict=True):
                assert torch.equal(a[some.ptr[i] : some.ptr[i + 1]], b[whole.ptr[s] : whole.ptr[s + 1]])
        short = grf_walks(*graph, **options, max_length=2)
        keep = whole.length <= 2
        assert equal(short[1:], tuple(t[keep] for t in whole[1:]))
        pair = grf_walks(*copies(graph, 2), **options, node_key=torch.arange(60).repeat(2))
        half = len(whole.col)
        assert torch.equal(pair.ptr, torch.cat([whole.ptr, whole.ptr[1:] + half]))
        assert torch.equal(pair.col, torch.cat([whole.col, whole.col + 60]))
        assert torch.equal(pair.value, whole.value.repeat(2))
    paths = grf_paths(rowptr, col, num_walks=8, seed=3, coupling="iid")
    later = grf_paths(rowptr, col, num_walks=2, seed=3, coupling="iid", first_walk=6)
    for s in range(60):
        assert torch.equal(
            paths[1][paths[0][s * 8 + 6] : paths[0][s * 8 + 8]], later[1][later[0][s * 2] : later[0][s * 2 + 2]]
        )


@pytest.mark.parametrize("paths", [grf_paths, grf_paths_reference])
@pytest.mark.parametrize("coupling", ["iid", "antithetic"])
def test_one_walk_of_each_start(paths, coupling):
    rowptr, col, _ = csr_of(weighted_digraph(30, 0.2))
    options = {"num_walks": 6, "seed": 3, "coupling": coupling, "first_walk": 2}
    ptr, node, edge = paths(rowptr, col, **options)
    start, walk = torch.tensor([4, 4, 29, 0]), torch.tensor([0, 5, 3, 2])
    some = paths(rowptr, col, None, start, walk=walk, **options)
    for i, w in enumerate((start * 6 + walk).tolist()):
        at, own = slice(int(ptr[w]), int(ptr[w + 1])), slice(int(some[0][i]), int(some[0][i + 1]))
        assert torch.equal(some[1][own], node[at])
        assert torch.equal(some[2][own], edge[at])


def test_a_step_alone():
    """What partitions of a graph go by: a step of any walks, in any order."""
    rowptr, col, _ = csr_of(weighted_digraph(30, 0.2))
    law = checked_law(6, SEED, 0.2, coupling="antithetic", choice="rendezvous", first_walk=4)
    ptr, node, edge = grf_paths(
        rowptr, col, num_walks=6, seed=SEED, p_halt=0.2, coupling="antithetic", choice="rendezvous", first_walk=4
    )
    walker = torch.randperm(180)
    for step in range(3):
        walker = walker[(ptr.diff()[walker] > step)]
        at = ptr[walker] + step
        found = walk_step(law, rowptr, len(col), node[at], walker // 6, 4 + walker % 6, step, edge_key=col)
        goes = ptr.diff()[walker] > step + 1
        assert torch.equal(found[goes], edge[at[goes] + 1])
        assert (found[~goes] == -1).all()


def test_units_of_a_proposal():
    rowptr = torch.tensor([0, 3, 3, 5, 9])
    weight = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, 1e30, 0.0, 1e-30, -1e30])
    units = proposal_units(rowptr, weight)
    assert units[:3].tolist() == [2**30, 2**31, 2**32]
    assert units[3:5].tolist() == [0, 0]
    last = units[5:] - torch.cat([torch.zeros(1, dtype=torch.int64), units[5:-1]])
    assert int(units[-1]) == 2**32
    assert int(last[1]) == 0
    assert 1 <= int(last[2]) <= 8
    assert abs(int(last[0]) - int(last[3])) <= 8
    assert torch.equal(proposal_units(torch.tensor([0, 4]), weight[5:]), units[5:])  # whatever rows are beside it


def features(out: WalkDeposits, f: Tensor, num_nodes: int) -> Tensor:
    powers = powers_of(out, num_nodes, len(f))
    return torch.einsum("l,rlij->rij", f, powers)


@pytest.mark.parametrize("graph", ["tree", "random"])
@pytest.mark.parametrize("kernel", ["regularised", "heat"])
def test_couplings_halve_the_squared_error(graph, kernel):
    """Relative squared error of Phi Phi^T against the exact kernel, and its published values."""
    if graph == "tree":
        child = torch.arange(1, 127)
        index = torch.stack([child, (child - 1) // 2])
        num_nodes = 127
    else:
        generator = torch.Generator().manual_seed(3)
        num_nodes = 100
        index = torch.ones(num_nodes, num_nodes).triu(1).nonzero().t()
        index = index[:, torch.rand(index.size(1), generator=generator) < 0.04]
    matrix = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    matrix[index[0], index[1]] = matrix[index[1], index[0]] = 1
    root = matrix.sum(1).clamp(min=1).rsqrt()
    matrix = 0.25 * root[:, None] * matrix * root
    length = torch.arange(30, dtype=torch.float64)
    heat = torch.exp(-length * math.log(2) - torch.lgamma(length + 1))
    f = torch.ones_like(length) if kernel == "regularised" else heat
    root_of_kernel = sum(a * torch.linalg.matrix_power(matrix, k) for k, a in enumerate(f))
    exact = root_of_kernel @ root_of_kernel.t()
    repeats, error = 120, {}
    many = copies(csr_of(matrix), repeats)
    for coupling in COUPLINGS:
        phi = features(grf_walks(*many, num_walks=8, seed=1, coupling=coupling), f, num_nodes)
        difference = (phi @ phi.transpose(1, 2) - exact).square().sum((1, 2)) / exact.square().sum()
        error[coupling] = float(difference.mean())
    assert error["iid"] >= 2 * error["antithetic+repelling"]
    assert error["antithetic"] < error["iid"]
    assert error["repelling"] < error["iid"]
    if graph == "tree":
        table = {"regularised": (2.96e-2, 1.98e-2, 1.53e-2, 7.18e-3), "heat": (6.03e-3, 4.21e-3, 2.51e-3, 1.08e-3)}
        for coupling, published in zip(COUPLINGS, table[kernel], strict=True):
            assert abs(error[coupling] / published - 1) < 0.15


@pytest.mark.parametrize("coupling", ["iid", "antithetic+repelling"])
@pytest.mark.parametrize("proposal", ["uniform", "weight"])
def test_gradient_of_weights(coupling, proposal):
    """Of the loads of fixed walks: with weights as proposal, those that the choice of walks was made by."""
    rowptr, col, weight = csr_of(weighted_digraph(6))
    options = {"num_walks": 4, "seed": 0, "coupling": coupling, "proposal": proposal}
    fixed = grf_walks(rowptr, col, weight, **options)
    leaf = weight.clone().requires_grad_()
    out = grf_walks(rowptr, col, leaf, **options)
    assert equal(fixed, tuple(t.detach() for t in out))
    reference = grf_walks_reference(rowptr, col, leaf, **options)
    cotangent = torch.randn_like(fixed.value)
    (gradient,) = torch.autograd.grad(out.value, leaf, cotangent)
    (expected,) = torch.autograd.grad(reference.value, leaf, cotangent)
    assert torch.equal(gradient, expected)
    # a load is a product of as many weights as it has steps: Euler's identity
    (slope,) = torch.autograd.grad(grf_walks(rowptr, col, leaf, **options).value.sum(), leaf)
    assert math.isclose(float(slope @ weight), float((fixed.value * fixed.length).sum()), rel_tol=1e-9)
    if proposal == "uniform":
        torch.autograd.gradcheck(lambda w: grf_walks(rowptr, col, w, **options).value, leaf)
        torch.autograd.gradgradcheck(lambda w: grf_walks(rowptr, col, w, **options).value, leaf)


class NoCollisions(TorchDispatchMode):
    """Refuses to add several numbers at one place: on CUDA, and on threads, their order would be left to chance."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("index_add", "scatter_add", "scatter_reduce", "embedding_dense_backward"):
            index = args[2]
        elif name in ("index_put", "_index_put_impl", "_unsafe_index_put") and len(args) > 3 and args[3]:
            (index,) = args[1]
        else:
            index = torch.arange(1)
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            assert len(index.unique()) == len(index), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("coupling", ["iid", "antithetic+repelling"])
def test_gradients_are_summed_in_a_fixed_order(device, coupling):
    """Bit for bit the same on any number of threads, without torch's slower deterministic algorithms."""
    rowptr, col, weight = (t.to(device) for t in csr_of(weighted_digraph(300, 0.02).float()))
    leaf, threads, results = weight.requires_grad_(), torch.get_num_threads(), []
    cotangent = None
    torch.use_deterministic_algorithms(False)
    try:
        for count in (1, 2, 4, 4):
            torch.set_num_threads(count)
            with NoCollisions():
                out = grf_walks(rowptr, col, leaf, num_walks=200, seed=1, coupling=coupling, p_halt=0.1)
                cotangent = torch.randn_like(out.value) if cotangent is None else cotangent
                (gradient,) = torch.autograd.grad(out.value, leaf, cotangent, create_graph=True)
                (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
            results.append((out.value.detach(), gradient.detach(), second))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert equal(results[0], other)


def test_half_precision():
    rowptr, col, weight = csr_of(weighted_digraph(10).float())
    for dtype in (torch.bfloat16, torch.float16):
        for walk in (grf_walks, grf_walks_reference):
            out = walk(rowptr, col, weight.to(dtype), num_walks=4, seed=0)
            full = walk(rowptr, col, weight.to(dtype).float(), num_walks=4, seed=0)
            assert out.value.dtype == dtype
            assert torch.equal(out.value, full.value.to(dtype))


def test_non_contiguous(device):
    rowptr, col, weight = (t.to(device) for t in csr_of(weighted_digraph(30, 0.2)))
    wide = [torch.stack([t, t * 0 - 7], dim=1)[:, 0] for t in (rowptr, col, weight, torch.arange(20, device=device))]
    assert not wide[0].is_contiguous()
    expected = grf_walks(rowptr, col, weight, torch.arange(20, device=device), num_walks=4, seed=1)
    assert equal(grf_walks(*wide, num_walks=4, seed=1), expected)


def test_nothing_to_walk_on(device):
    """No nodes, no edges, no starts, nodes without edges, rows of zero weights."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    for walk, paths in ((grf_walks, grf_paths), (grf_walks_reference, grf_paths_reference)):
        out = walk(none.new_zeros(1), none, torch.empty(0, device=device), num_walks=2, seed=0)
        assert [t.tolist() for t in out] == [[0], [], [], []]
        assert [t.tolist() for t in paths(none.new_zeros(1), none, num_walks=2, seed=0)] == [[0], [], []]
        out = walk(none.new_zeros(3), none, torch.empty(0, device=device), num_walks=2, seed=0)
        assert [t.tolist() for t in out] == [[0, 1, 2], [0, 1], [0, 0], [1.0, 1.0]]
        rowptr, col = torch.tensor([0, 1, 2], device=device), torch.tensor([1, 0], device=device)
        out = walk(rowptr, col, torch.ones(2, device=device), none, num_walks=2, seed=0)
        assert [t.tolist() for t in out] == [[0], [], [], []]
        out = walk(rowptr, col, torch.zeros(2, device=device), num_walks=2, seed=0, proposal="weight")
        assert [t.tolist() for t in out] == [[0, 1, 2], [0, 1], [0, 0], [1.0, 1.0]]


def test_opcheck(device):
    rowptr, col, weight = (t.to(device) for t in csr_of(weighted_digraph(8)))
    start = torch.arange(8, device=device)
    halt = torch.tensor([2**31, 2**30], device=device)
    units = proposal_units(rowptr, weight)
    for flags, some in ((0, None), (1, units), (2, None), (3, units), (4, None)):
        tail = (some, halt, 4, -5, 1, 9, flags)
        torch.library.opcheck(torch.ops.geo.grf_walks.default, (rowptr, col, start, weight, start + 1, *tail))
        torch.library.opcheck(torch.ops.geo.grf_paths.default, (rowptr, col, start, start + 1, None, *tail))
    torch.library.opcheck(torch.ops.geo.grf_paths.default, (rowptr, col, start, None, start % 4, None, *tail[1:]))


def test_compile(device):
    rowptr, col, weight = (t.to(device) for t in csr_of(weighted_digraph(8)))

    def walk(start: Tensor, seed: int) -> Tensor:
        out = grf_walks(rowptr, col, weight, start + 1, num_walks=4, seed=seed)
        return out.value * out.length + out.col

    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        start = torch.arange(2 + seed, device=device)
        assert torch.equal(compiled(start, seed), walk(start, seed))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks behind the break
def test_compile_with_a_gradient(device):
    rowptr, col, weight = (t.to(device) for t in csr_of(weighted_digraph(8)))

    def loss(weight: Tensor) -> Tensor:
        return grf_walks(rowptr, col, weight * 2, num_walks=4, seed=0).value.square().sum()

    leaf = weight.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    (gradient,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(leaf), leaf)
    assert torch.equal(gradient, expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="grf_walks: how many steps there are"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_rows_that_overlap():
    """Where no walk meets them, results do not depend on them, whether there are few steps or many."""
    bad, rowptr = torch.tensor([0, 4, 6, 3, 6]), torch.tensor([0, 4, 6, 6, 6])
    tail = (torch.tensor([0, 0, 0, 0, 3, 3]), torch.arange(1.0, 7.0))
    start = torch.tensor([0])
    for num_walks in (2, 400):
        options = {"num_walks": num_walks, "seed": 0, "coupling": "iid", "max_length": 9}
        assert equal(grf_walks(bad, *tail, start, **options), grf_walks(rowptr, *tail, start, **options))
        assert equal(grf_paths(bad, *tail, start, **options), grf_paths(rowptr, *tail, start, **options))
        for walk, weight in ((grf_walks, tail[1].requires_grad_()), (grf_walks_reference, tail[1].detach())):
            with pytest.raises(IndexError, match=r"grf_walks: rowptr\[3\] = 3 is out of range \[6, 6\]"):
                walk(bad, tail[0], weight, start, **options)
        tail[1].requires_grad_(False)


@pytest.mark.parametrize("walk", [grf_walks, grf_walks_reference, grf_paths, grf_paths_reference])
@pytest.mark.parametrize("num_walks", [2, 200])  # without and with the packed copy
def test_bad_indices(device, walk, num_walks):
    rowptr, col = torch.tensor([0, 1, 2, 3], device=device), torch.tensor([1, 2, 0], device=device)
    start, weight = torch.arange(3, device=device), torch.ones(3, device=device)

    def refused(message: str, rowptr: Tensor = rowptr, col: Tensor = col, start: Tensor = start) -> None:
        with pytest.raises(IndexError, match=rf"{walk.__name__.removesuffix('_reference')}: {message}"):
            walk(rowptr, col, weight, start, num_walks=num_walks, seed=0, survival=[1, 1, 1, 1, 0])

    refused(r"start\[1\] = 3 is out of range \[0, 2\]", start=torch.tensor([0, 3], device=device))
    refused(r"start\[0\] = -1 is out of range \[0, 2\]", start=torch.tensor([-1, 0], device=device))
    refused(r"col\[1\] = 3 is out of range \[0, 2\]", col=torch.tensor([1, 3, 0], device=device))
    refused(r"col\[2\] = -9 is out of range \[0, 2\]", col=torch.tensor([1, 2, -9], device=device))
    refused(r"col\[0\] = 4294967297 is out of range", col=torch.tensor([2**32 + 1, 2, 0], device=device))
    refused(r"rowptr\[3\] = 4 is out of range \[3, 3\]", rowptr=torch.tensor([0, 1, 2, 4], device=device))
    refused(r"rowptr\[3\] = 2 is out of range \[3, 3\]", rowptr=torch.tensor([0, 1, 2, 2], device=device))
    refused(r"rowptr\[0\] = 1 is out of range \[0, 0\]", rowptr=torch.tensor([1, 1, 2, 3], device=device))
    refused(r"rowptr\[1\] = -1 is out of range \[0, 3\]", rowptr=torch.tensor([0, -1, 2, 3], device=device))
    for options in ({"proposal": "weight"}, {"choice": "rendezvous", "coupling": "iid"}):
        with pytest.raises(IndexError, match=r"col\[1\] = 3 is out of range \[0, 2\]"):
            walk(rowptr, torch.tensor([1, 3, 0], device=device), weight, num_walks=num_walks, seed=0, **options)
        with pytest.raises(IndexError, match=r"rowptr\[3\] = 4 is out of range"):
            walk(torch.tensor([0, 1, 2, 4], device=device), col, weight, num_walks=num_walks, seed=0, **options)


REFUSALS = [
    *(({"p_halt": p}, r"p_halt: expected a probability between 0 and 1, both excluded, got") for p in (0, 1, -0.1)),
    ({"p_halt": math.nan}, r"p_halt: expected a probability between 0 and 1, both excluded, got nan"),
    ({"num_walks": 3, "coupling": "antithetic"}, r"num_walks: coupling='antithetic' needs an even number, got 3: take"),
    ({"num_walks": 3}, r"needs an even number, got 3: take one more, or coupling='repelling'"),
    ({"num_walks": 0}, r"num_walks: expected at least 1, got 0"),
    ({"first_walk": -1}, r"first_walk: expected a number of at least 0, got -1"),
    ({"first_walk": 2**32 - 1}, r"first_walk: walks have numbers below 2\^32, got 2 from 4294967295 on: take another"),
    ({"first_walk": 2**40}, r"first_walk: walks have numbers below 2\^32, got 2 from 1099511627776 on"),
    ({"num_walks": 2.0}, r"num_walks: expected an integer, got 2\.0"),
    ({"num_walks": True}, r"num_walks: expected an integer, got True"),
    ({"seed": 1.5}, r"seed: expected an integer, got 1\.5"),
    ({"max_length": 3.0}, r"max_length: expected an integer, got 3\.0"),
    ({"p_halt": 1e-12}, r"p_halt: with this walks halt with probability 2\.3e-10 before a step and take 4e\+09 steps"),
    ({"p_halt": 9e-7}, r"take 1e\+06 steps: give max_length, or a probability of at least 1e-06"),
    ({"survival": [1, 1 - 1e-12]}, r"survival: with the last ratio walks halt with probability 2\.3e-10 before a step"),
    ({"survival": torch.ones(1, 2)}, r"survival: expected one axis, got \[1, 2\]"),
    ({"max_length": -1}, r"max_length: expected None or a number from 0 to 2147483647, got -1"),
    (
        {"coupling": "q"},
        r"coupling: expected one of 'iid', 'antithetic', 'repelling', 'antithetic\+repelling', got 'q'",
    ),
    ({"proposal": "q"}, r"proposal: expected 'uniform' or 'weight', got 'q'"),
    ({"choice": "q"}, r"choice: expected 'slot' or 'rendezvous', got 'q'"),
    ({"choice": "rendezvous"}, r"choice: 'rendezvous' needs coupling='iid' or 'antithetic', got coupling='anti"),
    (
        {"choice": "rendezvous", "coupling": "iid", "proposal": "weight"},
        r"proposal: choice='rendezvous' needs 'uniform'",
    ),
    ({"survival": [1.0]}, r"survival: expected at least two probabilities, the first of which is 1, got \[1\.0\]"),
    ({"survival": [0.9, 0.5]}, r"survival: expected at least two probabilities, the first of which is 1"),
    ({"survival": [1, 0.5, 0.6]}, r"survival: expected probabilities that never rise, got 0\.5 and then 0\.6"),
    ({"survival": [1, -0.5]}, r"survival: expected probabilities that never rise, got 1\.0 and then -0\.5"),
    ({"survival": [1, math.nan]}, r"survival: expected probabilities that never rise"),
    ({"survival": [1, 0.5, 0.5]}, r"survival: the last two entries are equal, 0\.5, so walks would never end: end it"),
    ({"node_key": torch.arange(2)}, r"node_key: expected 3 entries, one a node, got 2"),
    (
        {"start": torch.zeros(1, 2, dtype=torch.int64)},
        r"start: expected an int64 tensor with one axis, got torch\.int64",
    ),
    (
        {"weight": torch.ones(2)},
        r"weight: expected floating numbers, one for each of 4 edges, got torch\.float32 \[2\]",
    ),
    ({"weight": torch.ones(4).long()}, r"weight: expected floating numbers, one for each of 4 edges, got torch\.int64"),
    ({"weight": torch.tensor([1, math.inf, 1, 1]), "proposal": "weight"}, r"weight: proposal='weight' needs finite"),
    (
        {"choice": "rendezvous", "coupling": "iid"},
        r"choice: 'rendezvous' needs different neighbours, but the edges 1 and 2 of node 1 lead to one node: merge",
    ),
    (
        {
            "choice": "rendezvous",
            "coupling": "iid",
            "col": torch.tensor([1, 0, 2, 1]),
            "node_key": torch.tensor([5, 6, 5]),
        },
        r"but the edges 1 and 2 of node 1 lead to two nodes with one node_key",
    ),
]


@pytest.mark.parametrize("walk", [grf_walks, grf_walks_reference, grf_paths, grf_paths_reference])
@pytest.mark.parametrize(("options", "message"), REFUSALS)
def test_refusals(walk, options, message):
    usual = {
        "rowptr": torch.tensor([0, 1, 3, 4]),
        "col": torch.tensor([1, 2, 2, 1]),
        "weight": torch.ones(4),
        "num_walks": 2,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=message):
        walk(**{**usual, **options})


def test_refusals_of_paths():
    rowptr, col, start = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.arange(2)
    for paths in (grf_paths, grf_paths_reference):
        with pytest.raises(ValueError, match=r"walk: repelling walks depend on each other: take coupling='iid' or"):
            paths(rowptr, col, num_walks=2, seed=0, walk=start)
        with pytest.raises(ValueError, match=r"walk: expected int64 \[2\], one for each start, got torch\.int64 \[1\]"):
            paths(rowptr, col, num_walks=2, seed=0, coupling="iid", walk=start[:1])
        with pytest.raises(IndexError, match=r"grf_paths: walk\[1\] = 2 is out of range \[0, 1\]"):
            paths(rowptr, col, num_walks=2, seed=0, coupling="iid", walk=start + 1)
        with pytest.raises(ValueError, match=r"weight: proposal='weight' needs it, got None"):
            paths(rowptr, col, num_walks=2, seed=0, proposal="weight")
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.grf_walks_reference there"):
        torch.func.vmap(lambda s: grf_walks(rowptr, col, torch.ones(2), s, num_walks=2, seed=0)[0])(start[None])
