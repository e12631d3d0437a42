from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import csr_from_index, random_walk, random_walk_reference
from geo.ops.random_walk import philox

SEED = 2**63 + 123456789  # uses all 64 bits


def csr(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    rowptr, perm = csr_from_index(edge_index[0], num_nodes)
    return rowptr, edge_index[1][perm]


def random_graph(num_nodes: int, num_edges: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """With loops, multi-edges, and nodes without edges."""
    generator = torch.Generator().manual_seed(seed)
    return csr(torch.randint(max(num_nodes, 1), (2, num_edges if num_nodes else 0), generator=generator), num_nodes)


def path(num_nodes: int) -> tuple[Tensor, Tensor]:
    forth = torch.stack([torch.arange(num_nodes - 1), torch.arange(1, num_nodes)])
    return csr(torch.cat([forth, forth.flip(0)], dim=1), num_nodes)


def complete(num_nodes: int) -> tuple[Tensor, Tensor]:
    return csr(
        torch.cartesian_prod(*[torch.arange(num_nodes)] * 2).t()[:, ~torch.eye(num_nodes).bool().flatten()], num_nodes
    )


def star(num_leaves: int) -> tuple[Tensor, Tensor]:
    forth = torch.stack([torch.zeros(num_leaves, dtype=torch.int64), torch.arange(1, num_leaves + 1)])
    return csr(torch.cat([forth, forth.flip(0)], dim=1), num_leaves + 1)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """The statistic, in standard deviations from its mean."""
    expected = counts.sum() * probabilities
    assert expected.min() >= 20
    statistic = float(((counts - expected).square() / expected).sum())
    freedom = counts.numel() - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


def test_known_answers_of_philox():
    """Random123, kat_vectors: philox4x32 10."""

    def words(counter: tuple[int, ...], key: int) -> list[int]:
        return [int(word) for word in philox(key, *(torch.tensor([c]) for c in counter))]

    assert words((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((0xFFFFFFFF,) * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(counter, 0x299F31D0A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_table(device):
    """The documented rule, by hand: 64 bits of the block times the degree, less 64 bits."""
    rowptr, col = complete(7)
    walk = random_walk(rowptr.to(device), col.to(device), torch.tensor([5], device=device), 3, 2, seed=SEED)
    node = 5
    for step in range(3):
        words = philox(SEED, *(torch.tensor([c]) for c in (5, 1, step, 0)))
        edge = int(rowptr[node]) + ((int(words[0]) << 32 | int(words[1])) * 6 >> 64)
        node = int(col[edge])
        assert int(walk[0, 1, step + 1]) == node


@pytest.mark.parametrize("non_backtracking", [False, True])
@pytest.mark.parametrize("p_halt", [0.0, 0.3, 1.0])
def test_equals_reference(device, non_backtracking, p_halt):
    for num_nodes, num_edges in ((0, 0), (1, 0), (1, 3), (2, 5), (63, 90), (1000, 4000)):
        rowptr, col = (t.to(device) for t in random_graph(num_nodes, num_edges))
        start = torch.arange(num_nodes, device=device)
        for length, walks in ((0, 1), (1, 5), (7, 0), (9, 3)):
            options = {"seed": SEED, "non_backtracking": non_backtracking, "p_halt": p_halt, "return_edges": True}
            actual = random_walk(rowptr, col, start, length, walks, first_walk=3, **options)
            expected = random_walk_reference(rowptr, col, start, length, walks, first_walk=3, **options)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            assert actual[0].shape == (num_nodes, walks, length + 1)
            assert actual[1].shape == (num_nodes, walks, length)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    nodes=st.integers(1, 80),
    edges=st.integers(0, 300),
    walks=st.integers(1, 9),
    length=st.integers(0, 9),
    non_backtracking=st.booleans(),
    p_halt=st.sampled_from([0.0, 1e-9, 0.4]),
)
def test_any_graph(seed, nodes, edges, walks, length, non_backtracking, p_halt):
    rowptr, col = random_graph(nodes, edges, seed % 1000)
    start = torch.randint(nodes, (40,))
    key = torch.randint(2**33, (40,))
    args = (rowptr, col, start, length, walks)
    options = {"seed": seed, "node_key": key, "non_backtracking": non_backtracking, "p_halt": p_halt}
    assert torch.equal(random_walk(*args, **options), random_walk_reference(*args, **options))


def test_non_contiguous(device):
    rowptr, col = (t.to(device) for t in random_graph(50, 200))
    start, key = torch.arange(40, device=device), torch.arange(7, 47, device=device)
    wide = [torch.stack([t, t * 0 - 7], dim=1)[:, 0] for t in (rowptr, col, start, key)]
    assert not wide[0].is_contiguous()
    expected = random_walk(rowptr, col, start, 5, 2, seed=1, node_key=key)
    assert torch.equal(random_walk(*wide[:3], 5, 2, seed=1, node_key=wide[3]), expected)


def test_large_enough_to_be_packed():
    """Many steps on few edges take the packed copy of the graph, few steps on many edges the graph itself."""
    rowptr, col = random_graph(3000, 20000)
    many = random_walk(rowptr, col, torch.arange(3000), 6, 20, seed=1)
    few = random_walk(rowptr, col, torch.arange(100), 6, 20, seed=1)
    assert torch.equal(many[:100], few)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize("non_backtracking", [False, True])
def test_same_bits_on_any_number_of_threads(non_backtracking):
    rowptr, col = random_graph(3000, 12000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            options = {"seed": 5, "non_backtracking": non_backtracking, "p_halt": 0.1, "return_edges": True}
            results.append(random_walk(rowptr, col, torch.arange(3000), 9, 7, **options))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("walk", [random_walk, random_walk_reference])
def test_walks_do_not_depend_on_what_else_is_asked_for(walk):
    rowptr, col = random_graph(200, 900)
    start = torch.arange(200)
    whole = walk(rowptr, col, start, 8, 6, seed=3)
    order = torch.randperm(200)
    assert torch.equal(walk(rowptr, col, order, 8, 6, seed=3), whole[order])
    assert torch.equal(walk(rowptr, col, start[50:60], 8, 6, seed=3), whole[50:60])
    assert torch.equal(walk(rowptr, col, start, 5, 6, seed=3), whole[..., :6])
    assert torch.equal(walk(rowptr, col, start, 8, 2, seed=3, first_walk=4), whole[:, 4:])
    # two copies of the graph side by side, with the keys of the one
    pair = torch.cat([rowptr, rowptr[1:] + col.size(0)]), torch.cat([col, col + 200])
    key = start.repeat(2)
    both = walk(*pair, torch.arange(400), 8, 6, seed=3, node_key=key)
    assert torch.equal(both, torch.cat([whole, whole + 200]))


def test_seeds_keys_and_walks_draw_independently():
    rowptr, col = complete(9)
    start = torch.full((500,), 4)
    base = random_walk(rowptr, col, start, 4, 1, seed=1, node_key=torch.arange(500))
    for other in (
        random_walk(rowptr, col, start, 4, 1, seed=2, node_key=torch.arange(500)),
        random_walk(rowptr, col, start, 4, 1, seed=2**32 + 1, node_key=torch.arange(500)),
        random_walk(rowptr, col, start, 4, 1, seed=1, node_key=torch.arange(500, 1000)),
        random_walk(rowptr, col, start, 4, 1, seed=1, node_key=torch.arange(500), first_walk=1),
    ):
        pairs = torch.bincount((base * 9 + other)[..., 1].flatten(), minlength=81).view(9, 9)
        seen = torch.cat([pairs[:4], pairs[5:]])
        seen = torch.cat([seen[:, :4], seen[:, 5:]], dim=1).flatten()
        statistic = float((seen - 500 / 64).square().sum() / (500 / 64))
        assert abs(statistic - 63) < 4 * math.sqrt(2 * 63)
    assert torch.equal(base, random_walk(rowptr, col, start, 4, 1, seed=1 - 2**64, node_key=torch.arange(500)))


def test_every_step_is_an_edge():
    rowptr, col = random_graph(300, 700)
    nodes, edges = random_walk(rowptr, col, torch.arange(300), 12, 4, seed=0, return_edges=True)
    source = torch.repeat_interleave(torch.arange(300), rowptr.diff())
    moved = edges >= 0
    assert torch.equal(nodes[..., 1:][moved], col[edges[moved]])
    assert torch.equal(nodes[..., :-1][moved], source[edges[moved]])
    assert torch.equal(moved, rowptr.diff()[nodes[..., :-1]] > 0)  # a dead end is stayed at
    assert torch.equal(nodes[..., 1:][~moved], nodes[..., :-1][~moved])


@pytest.mark.parametrize("degree", [2, 3, 7, 100])
def test_neighbours_are_equally_likely(degree):
    rowptr, col = star(degree)
    counts = torch.bincount(
        random_walk(rowptr, col, torch.tensor([0]), 1, 40000, seed=degree)[0, :, 1], minlength=degree + 1
    )
    assert abs(chi_square(counts[1:], torch.full((degree,), 1 / degree))) < 4


def test_multi_edges_count_as_several():
    rowptr, col = csr(torch.tensor([[0, 0, 0, 0], [1, 2, 2, 0]]), 3)
    counts = torch.bincount(random_walk(rowptr, col, torch.tensor([0]), 1, 20000, seed=0)[0, :, 1], minlength=3)
    assert abs(chi_square(counts, torch.tensor([0.25, 0.25, 0.5]))) < 4


@pytest.mark.parametrize("walk", [random_walk, random_walk_reference])
def test_non_backtracking_law(walk):
    """On a path the walk turns round at the ends alone; elsewhere the others are equally likely."""
    rowptr, col = path(6)
    for row in walk(rowptr, col, torch.arange(6), 20, 8, seed=0, non_backtracking=True).view(-1, 21).tolist():
        assert all(a != c or b in (0, 5) for a, b, c in zip(row, row[1:], row[2:], strict=False))
        assert all(abs(a - b) == 1 for a, b in pairwise(row))
    rowptr, col = complete(5)
    nodes = walk(rowptr, col, torch.tensor([0]), 2, 30000, seed=1, non_backtracking=True)[0]
    pairs = torch.bincount(nodes[:, 1] * 5 + nodes[:, 2], minlength=25).view(5, 5)
    allowed = ~torch.eye(5).bool() & (torch.arange(5) > 0) & (torch.arange(5) > 0).view(5, 1)
    assert pairs[~allowed].eq(0).all()
    assert abs(chi_square(pairs[allowed], torch.full((12,), 1 / 12))) < 4


@pytest.mark.parametrize("walk", [random_walk, random_walk_reference])
@pytest.mark.parametrize("back", [1, 2, 30])
def test_non_backtracking_with_many_edges_back(walk, back):
    """The rare row whose redraws all lead back: the edges that do not are counted, and are equally likely."""
    edge_index = torch.tensor([[0] + [1] * (back + 3), [1] + [0] * back + [2, 3, 3]])
    rowptr, col = csr(edge_index, 4)
    nodes = walk(rowptr, col, torch.tensor([0]), 2, 20000, seed=2, non_backtracking=True)[0, :, 2]
    counts = torch.bincount(nodes, minlength=4)
    assert counts[:2].eq(0).all()
    assert abs(chi_square(counts[2:], torch.tensor([1 / 3, 2 / 3]))) < 4
    rowptr, col = csr(torch.tensor([[0] + [1] * back, [1] + [0] * back]), 2)  # all edges lead back: they are taken
    assert (
        walk(rowptr, col, torch.tensor([0]), 3, 50, seed=2, non_backtracking=True)[0]
        .eq(torch.tensor([0, 1, 0, 1]))
        .all()
    )


def test_non_backtracking_on_a_directed_graph():
    """A node whose only edge leads to the previous one; a loop that is not taken twice running."""
    rowptr, col = csr(torch.tensor([[0, 1], [1, 0]]), 2)
    assert random_walk(rowptr, col, torch.tensor([0]), 3, seed=0, non_backtracking=True).tolist() == [[[0, 1, 0, 1]]]
    rowptr, col = csr(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2)
    nodes = random_walk(rowptr, col, torch.tensor([0]), 2, 100, seed=0, non_backtracking=True)[0]
    assert set(map(tuple, nodes.tolist())) == {(0, 0, 1), (0, 1, 1)}


@pytest.mark.parametrize("p_halt", [0.1, 0.5])
def test_halting_law(p_halt):
    """The number of steps is geometric, and what comes after the end is -1."""
    rowptr, col = complete(4)
    nodes, edges = random_walk(rowptr, col, torch.tensor([0]), 8, 40000, seed=0, p_halt=p_halt, return_edges=True)
    steps = (edges[0] >= 0).sum(1)
    assert torch.equal(nodes[0] >= 0, torch.arange(9) <= steps.view(-1, 1))
    assert nodes[nodes < 0].eq(-1).all()
    law = torch.tensor([p_halt * (1 - p_halt) ** k for k in range(8)] + [(1 - p_halt) ** 8])
    assert abs(chi_square(torch.bincount(steps, minlength=9), law)) < 4
    # what is chosen does not depend on when it ends
    free = random_walk(rowptr, col, torch.tensor([0]), 8, 40000, seed=0)[0]
    assert torch.equal(nodes[0], torch.where(nodes[0] < 0, -1, free))


def test_opcheck(device):
    rowptr, col = (t.to(device) for t in random_graph(20, 60))
    start = torch.arange(20, device=device)
    args = (rowptr, col, start, start + 1, 4, 2, -5, 1, True, 0.2)
    for return_edges in (False, True):
        torch.library.opcheck(torch.ops.geo.random_walk.default, (*args, return_edges))


def test_compile(device):
    rowptr, col = (t.to(device) for t in random_graph(20, 60))

    def walk(start: Tensor, seed: int) -> Tensor:
        return random_walk(rowptr, col, start + 1, 4, 2, seed=seed)

    compiled = torch.compile(walk, fullgraph=True, backend="aot_eager")
    for seed in (1, 2, 3):
        start = torch.arange(5 + seed, device=device)
        assert torch.equal(compiled(start, seed), walk(start, seed))


@pytest.mark.parametrize("walk", [random_walk, random_walk_reference])
@pytest.mark.parametrize("num_walks", [1, 200])  # without and with the packed copy
def test_bad_indices(device, walk, num_walks):
    rowptr, col = torch.tensor([0, 1, 2, 3], device=device), torch.tensor([1, 2, 0], device=device)
    start = torch.arange(3, device=device)

    def refused(message: str, rowptr: Tensor = rowptr, col: Tensor = col, start: Tensor = start) -> None:
        with pytest.raises(IndexError, match=rf"random_walk: {message}"):
            walk(rowptr, col, start, 3, num_walks, seed=0)

    refused(r"start\[1\] = 3 is out of range \[0, 2\]", start=torch.tensor([0, 3], device=device))
    refused(r"start\[0\] = -1 is out of range \[0, 2\]", start=torch.tensor([-1, 0], device=device))
    refused(r"col\[1\] = 3 is out of range \[0, 2\]", col=torch.tensor([1, 3, 0], device=device))
    refused(r"col\[2\] = -9 is out of range \[0, 2\]", col=torch.tensor([1, 2, -9], device=device))
    refused(r"col\[0\] = 4294967297 is out of range", col=torch.tensor([2**32 + 1, 2, 0], device=device))
    refused(r"rowptr\[3\] = 4 is out of range \[2, 3\]", rowptr=torch.tensor([0, 1, 2, 4], device=device))
    refused(r"rowptr\[1\] = -1 is out of range \[0, 3\]", rowptr=torch.tensor([0, -1, 2, 3], device=device))
    refused(r"rowptr\[0\] = -2 is out of range", rowptr=torch.tensor([-2, 1, 2, 3], device=device))


def test_refusals():
    rowptr, col, start = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.arange(2)
    for walk in (random_walk, random_walk_reference):
        with pytest.raises(ValueError, match=r"col: expected an int64 tensor with one axis, got torch\.int32 \[2\]"):
            walk(rowptr, col.int(), start, 2, seed=0)
        with pytest.raises(
            ValueError, match=r"start: expected an int64 tensor with one axis, got torch\.int64 \[1, 2\]"
        ):
            walk(rowptr, col, start[None], 2, seed=0)
        with pytest.raises(ValueError, match=r"rowptr: expected one entry more than nodes, got none"):
            walk(rowptr[:0], col, start, 2, seed=0)
        with pytest.raises(ValueError, match=r"node_key: expected 2 entries, one for each start, got 1"):
            walk(rowptr, col, start, 2, seed=0, node_key=start[:1])
        with pytest.raises(ValueError, match=r"first_walk: walks have numbers below 2\^32, got 3 from 4294967294 on"):
            walk(rowptr, col, start, 1, 3, seed=0, first_walk=2**32 - 2)
        for name in ("walk_length", "num_walks", "first_walk"):
            with pytest.raises(ValueError, match=rf"{name}: expected a number of at least 0, got -1"):
                walk(rowptr, col, start, **{"walk_length": 2, "seed": 0, name: -1})
        for p_halt in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=r"p_halt: expected a probability in \[0, 1\], got"):
                walk(rowptr, col, start, 2, seed=0, p_halt=p_halt)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.random_walk_reference there"):
        torch.func.vmap(lambda s: random_walk(rowptr, col, s, 2, seed=0))(start[None])
