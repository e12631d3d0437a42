from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo import _native
from geo.ops import (
    csr_from_index,
    random_walk,
    walk_adjacency,
    walk_adjacency_reference,
    walk_tokens,
    walk_tokens_reference,
)


def sorted_csr(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    edge_index = edge_index[:, edge_index[1].argsort(stable=True)]
    rowptr, perm = csr_from_index(edge_index[0], num_nodes)
    return rowptr, edge_index[1][perm]


def random_graph(num_nodes: int, num_edges: int, hubs: int = 0) -> tuple[Tensor, Tensor]:
    """With loops, multi-edges, isolated nodes and, where asked for, rows much longer than a token."""
    generator = torch.Generator().manual_seed(num_nodes)
    edge_index = torch.randint(max(num_nodes, 1), (2, num_edges if num_nodes else 0), generator=generator)
    for hub in range(hubs):
        edge_index = torch.cat([edge_index, torch.stack([torch.full((num_nodes,), hub), torch.arange(num_nodes)])], 1)
        edge_index = torch.cat([edge_index, edge_index[:, -num_nodes:].flip(0)], 1)
    return sorted_csr(edge_index, num_nodes)


def sample(rowptr: Tensor, col: Tensor, tokens: int, walks: int, steps: int, p_halt: float = 0.0):
    """Walks [N, tokens, walks, steps + 1] and lengths that differ between tokens."""
    start = torch.arange(rowptr.numel() - 1, device=col.device)
    nodes = random_walk(rowptr, col, start, steps, tokens * walks, seed=0, p_halt=p_halt)
    lengths = torch.arange(tokens, device=col.device) % (steps + 1)
    return start, nodes.view(len(start), tokens, walks, steps + 1), lengths


CASES = [(0, 0, 0), (1, 0, 0), (1, 2, 0), (2, 3, 0), (63, 120, 0), (300, 900, 0), (300, 300, 2)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("p_halt", [0.0, 0.4])
def test_tokens_equal_reference(device, case, p_halt):
    rowptr, col = (t.to(device) for t in random_graph(*case))
    for tokens, walks, steps, roots, induced in (
        (3, 4, 5, 1, True),
        (2, 1, 1, 0, True),
        (0, 1, 2, 2, True),
        (2, 3, 2, 1, False),
    ):
        root, nodes, lengths = sample(rowptr, col, tokens, walks, steps, p_halt)
        args = (rowptr, col, root, nodes, lengths, roots, induced)
        actual, expected = walk_tokens(*args), walk_tokens_reference(*args)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("tokens", [walk_tokens, walk_tokens_reference])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_by_sets(tokens, case):
    """Every token against Python's sets and a loop over all edges."""
    rowptr, col = random_graph(*case)
    source = torch.repeat_interleave(torch.arange(case[0]), rowptr.diff()).tolist()
    root, nodes, lengths = sample(rowptr, col, 3, 2, 2)
    members, size, edges, index, edge_size = tokens(rowptr, col, root, nodes, lengths, 1)
    assert size.numel() == edge_size.numel() == 4 * case[0]
    first = first_edge = 0
    for token in range(size.numel()):
        v, t = divmod(token, 4)
        visited = set(nodes[v, t, :, : int(lengths[t]) + 1].flatten().tolist()) if t < 3 else {v}
        here = members[first : first + int(size[token])].tolist()
        assert here == [v, *sorted(visited - {v})]
        place = {node: first + i for i, node in enumerate(here)}
        inside = [e for e in range(col.numel()) if source[e] in visited and int(col[e]) in visited]
        inside.sort(key=lambda e: (place[source[e]], e))
        part = slice(first_edge, first_edge + int(edge_size[token]))
        assert edges[part].tolist() == inside
        assert index[:, part].tolist() == [[place[source[e]] for e in inside], [place[int(col[e])] for e in inside]]
        first, first_edge = first + int(size[token]), part.stop
    assert first == members.numel()
    assert first_edge == edges.numel()


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_same_on_any_number_of_threads():
    rowptr, col = random_graph(500, 2500, 1)
    root, nodes, lengths = sample(rowptr, col, 4, 3, 4)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            tokens = walk_tokens(rowptr, col, root, nodes, lengths, 1)
            results.append((*tokens, walk_adjacency(rowptr, col, nodes, 8)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_adjacency(device, case, window):
    rowptr, col = (t.to(device) for t in random_graph(*case))
    _, nodes, _ = sample(rowptr, col, 1, 3, 6, p_halt=0.1)
    out = walk_adjacency(rowptr, col, nodes, window)
    assert out.dtype == torch.bool
    assert torch.equal(out, walk_adjacency_reference(rowptr, col, nodes, window))
    joined = torch.zeros(case[0] + 1, case[0] + 1, dtype=torch.bool, device=device)  # the last for -1
    joined[torch.repeat_interleave(torch.arange(case[0], device=device), rowptr.diff()), col] = True
    joined |= joined.t().clone()
    for k in range(2, window + 1):
        expected = torch.zeros_like(nodes, dtype=torch.bool)
        expected[..., k:] = joined[nodes[..., k:], nodes[..., : max(nodes.size(-1) - k, 0)]]
        assert torch.equal(out[..., k - 2], expected)


def test_non_contiguous(device):
    rowptr, col = (t.to(device) for t in random_graph(50, 200))
    root, nodes, lengths = sample(rowptr, col, 3, 2, 4)
    wide = [torch.stack([t, t * 0 - 7], dim=-1)[..., 0] for t in (rowptr, col, root, nodes, lengths)]
    expected = walk_tokens(rowptr, col, root, nodes, lengths)
    assert all(torch.equal(a, b) for a, b in zip(walk_tokens(*wide), expected, strict=True))
    assert torch.equal(walk_adjacency(wide[0], wide[1], wide[3], 4), walk_adjacency(rowptr, col, nodes, 4))


def test_opcheck(device):
    rowptr, col = (t.to(device) for t in random_graph(20, 60))
    root, nodes, lengths = sample(rowptr, col, 2, 2, 3)
    torch.library.opcheck(torch.ops.geo.walk_tokens.default, (rowptr, col, root, nodes, lengths, 1, True))
    torch.library.opcheck(torch.ops.geo.walk_adjacency.default, (rowptr, col, nodes.view(-1, 4), 3))


@pytest.mark.parametrize("native", [True, False])
def test_bad_indices(device, native):
    rowptr, col = torch.tensor([0, 1, 2], device=device), torch.tensor([1, 0], device=device)
    root, lengths = torch.tensor([0, 1], device=device), torch.tensor([1], device=device)
    walks = torch.tensor([[0, 1, 9], [1, 0, 9]], device=device).view(2, 1, 1, 3)
    tokens = walk_tokens if native else walk_tokens_reference
    assert tokens(rowptr, col, root, walks, lengths)[0].tolist() == [0, 1, 1, 0]  # 9 is beyond the length
    with pytest.raises(IndexError, match=r"walk_tokens: walks\[2\] = 9 is out of range \[-1, 1\]"):
        tokens(rowptr, col, root, walks, lengths + 1)
    with pytest.raises(IndexError, match=r"walk_tokens: lengths\[0\] = 3 is out of range \[0, 2\]"):
        tokens(rowptr, col, root, walks, lengths + 2)
    with pytest.raises(IndexError, match=r"walk_tokens: root\[1\] = 2 is out of range \[0, 1\]"):
        tokens(rowptr, col, root + 1, walks, lengths)
    adjacency = walk_adjacency if native else walk_adjacency_reference
    with pytest.raises(IndexError, match=r"walk_adjacency: walks\[2\] = 9 is out of range \[-1, 1\]"):
        adjacency(rowptr, col, walks, 3)


def test_bad_graphs(device):
    root, lengths = torch.tensor([0], device=device), torch.tensor([1], device=device)
    walks = torch.tensor([[[[0, 1]]]], device=device)
    col = torch.tensor([1, 0, 1], device=device)
    for call in (
        lambda ptr, col: walk_tokens(ptr, col, root, walks, lengths),
        lambda ptr, col: walk_adjacency(ptr, col, walks, 3),
    ):
        with pytest.raises(ValueError, match=r"col: expected ascending rows, but col\[0\] = 1 and col\[1\] = 0"):
            call(torch.tensor([0, 2, 3], device=device), col)
        call(torch.tensor([0, 1, 3], device=device), col)
        with pytest.raises(IndexError, match=r"rowptr\[2\] = 4 is out of range \[3, 3\]"):
            call(torch.tensor([0, 1, 4], device=device), col)
        with pytest.raises(IndexError, match=r"rowptr\[1\] = -1 is out of range \[0, 3\]"):
            call(torch.tensor([0, -1, 3], device=device), col)
    # what a row leads to is only compared with members
    wild = torch.tensor([-5, 7, 2**40], device=device)
    assert walk_tokens(torch.tensor([0, 2, 3], device=device), wild, root, walks, lengths)[4].tolist() == [0]


def test_refusals():
    rowptr, col = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
    root, walks, lengths = torch.tensor([0]), torch.zeros(1, 2, 1, 1, dtype=torch.int64), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"root: expected an int64 tensor with one axis, got torch\.int32 \[1\]"):
        walk_tokens(rowptr, col, root.int(), walks, lengths)
    with pytest.raises(ValueError, match=r"walks: expected int64 \[S, T, M, W\], got torch\.int64 \[2, 1, 1\]"):
        walk_tokens(rowptr, col, root, walks[0], lengths)
    with pytest.raises(ValueError, match=r"root: expected 1 entries as walks has rows, got 2"):
        walk_tokens(rowptr, col, torch.tensor([0, 1]), walks, lengths)
    with pytest.raises(ValueError, match=r"lengths: expected 2 entries as walks has tokens, got 1"):
        walk_tokens(rowptr, col, root, walks, lengths[:1])
    with pytest.raises(ValueError, match=r"num_root_tokens: expected a number of at least 0, got -1"):
        walk_tokens(rowptr, col, root, walks, lengths, -1)
    with pytest.raises(ValueError, match=r"rowptr: expected one entry more than nodes, got none"):
        walk_adjacency(rowptr[:0], col, walks, 2)
    with pytest.raises(ValueError, match=r"walks: expected int64 \[\.\.\., W\], got torch\.float32 \[1\]"):
        walk_adjacency(rowptr, col, torch.zeros(1), 2)
    with pytest.raises(ValueError, match=r"window: expected a number of at least 1, got 0"):
        walk_adjacency(rowptr, col, walks, 0)
