from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geo.ops import (
    WalkDeposits,
    csr_from_index,
    grf_paths,
    grf_paths_reference,
    grf_walks,
    grf_walks_reference,
    random_walk,
)
from geo.ops.walk_step import COUPLINGS

SEED = 2**63 + 123456789  # uses all 64 bits


def csr_of(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = matrix.nonzero().t()
    rowptr, _ = csr_from_index(index[0], matrix.size(0))
    return rowptr, index[1].contiguous(), matrix[index[0], index[1]]


def weighted_digraph(num_nodes: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """With self-loops, negative entries and rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_nodes, num_nodes)
    there = torch.rand(size, generator=generator) < density
    sign = torch.where(torch.rand(size, generator=generator) < 0.7, 1.0, -1.0).double()
    return there * sign * (0.15 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64))


def powers_of(deposits: WalkDeposits, num_starts: int, num_nodes: int, lengths: int) -> Tensor:
    """M_0, .., M_{lengths - 1} as dense matrices."""
    row = torch.arange(num_starts).repeat_interleave(deposits.ptr.diff())
    keep = deposits.length < lengths
    out = deposits.value.new_zeros(lengths, num_starts, num_nodes)
    out[deposits.length[keep].long(), row[keep], deposits.col[keep]] = deposits.value[keep]
    return out


def test_path_of_two_nodes():
    """P(length >= 1) = 1 - p, and the load is c / (1 - p) exactly."""
    c, p, walks = 0.375, 0.25, 4000
    rowptr, col, weight = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([c, c])
    for walk in (grf_walks, grf_walks_reference):
        out = walk(rowptr, col, weight, torch.tensor([0]), num_walks=walks, seed=1, p_halt=p, coupling="iid")
        one = (out.col == 1) & (out.length == 1)
        share = out.value[one] / (c / (1 - p))
        assert abs(float(share) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / walks)
        first = (out.col == 0) & (out.length == 0)
        assert float(out.value[first]) == 1
        alone = walk(rowptr, col, weight, torch.tensor([0]), num_walks=1, seed=1, p_halt=p, coupling="iid")
        assert torch.equal(alone.value, (c / (1 - p)) ** alone.length)
        assert torch.equal(alone.col, torch.where(alone.length % 2 == 1, 1, 0))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("proposal", ["uniform", "weight"])
@pytest.mark.parametrize("survival", [None, [1.0, 0.9, 0.5, 0.3]])
def test_mean_of_deposits(coupling, proposal, survival):
    """E[M_l] = U^l, as a z-test over repeats."""
    matrix = weighted_digraph(6)
    rowptr, col, weight = csr_of(matrix)
    repeats = 300
    samples = torch.stack(
        [
            powers_of(
                grf_walks(
                    *(rowptr, col, weight),
                    num_walks=8,
                    seed=3,
                    first_walk=8 * k,
                    coupling=coupling,
                    proposal=proposal,
                    survival=survival,
                    p_halt=0.4,
                ),
                6,
                6,
                4,
            )
            for k in range(repeats)
        ]
    )
    expected = torch.stack([torch.linalg.matrix_power(matrix, k) for k in range(4)])
    error = samples.mean(0) - expected
    spread = samples.std(0) / math.sqrt(repeats)
    random = spread > 1e-9
    assert error[~random].abs().max() < 1e-6
    z = error[random] / spread[random]
    assert z.abs().max() < 4.5
    assert 0.8 < z.square().mean().sqrt() < 1.25


@pytest.mark.parametrize("p_halt", [0.2, 0.5])
def test_independent_walks_are_those_of_random_walk(p_halt):
    rowptr, col, _ = csr_of(weighted_digraph(20, 0.2))
    ptr, node, edge = grf_paths(rowptr, col, num_walks=5, seed=SEED, p_halt=p_halt, coupling="iid", first_walk=3)
    nodes, edges = random_walk(
        rowptr, col, torch.arange(20), 40, 5, seed=SEED, p_halt=p_halt, first_walk=3, return_edges=True
    )
    nodes, edges = nodes.view(-1, 41), edges.view(-1, 40)
    steps = (edges >= 0).sum(1)
    assert torch.equal(ptr.diff() - 1, steps)
    present = torch.arange(41) <= steps[:, None]
    assert torch.equal(node, nodes[present])
    assert torch.equal(edge, torch.cat([torch.full((100, 1), -1), edges], dim=1)[present])


def test_repelling_walks_take_different_edges():
    """At the first step the walks of a start take all edges equally often, up to one."""
    rowptr, col, _ = csr_of(torch.ones(7, 7))
    ptr, node, _ = grf_paths(rowptr, col, num_walks=23, seed=0, survival=[1, 1, 0], coupling="repelling")
    first = node[ptr[:-1] + 1].view(7, 23)
    for row in first:
        counts = torch.bincount(row, minlength=7)
        assert sorted(counts.tolist()) == [3, 3, 3, 3, 3, 4, 4]
        assert sorted(row[:7].tolist()) == list(range(7))


def test_antithetic_pairs_never_halt_together():
    rowptr, col, _ = csr_of(torch.ones(5, 5))
    for coupling in ("antithetic", "antithetic+repelling"):
        ptr, _, _ = grf_paths(rowptr, col, num_walks=400, seed=0, p_halt=0.5, coupling=coupling)
        length = ptr.diff().view(5, 2, 200)
        assert (length[:, 0] != length[:, 1]).all()
    ptr, _, _ = grf_paths(rowptr, col, num_walks=400, seed=0, p_halt=0.5, coupling="iid")
    length = ptr.diff().view(5, 2, 200)
    assert (length[:, 0] == length[:, 1]).any()


def test_refusals():
    rowptr, col, weight = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
    for walk in (grf_walks, grf_walks_reference, grf_paths, grf_paths_reference):
        for p_halt in (0, 1, -0.1, math.nan):
            with pytest.raises(ValueError, match=r"p_halt: expected a probability between 0 and 1, both excluded, got"):
                walk(rowptr, col, weight, num_walks=2, seed=0, p_halt=p_halt)
        with pytest.raises(ValueError, match=r"num_walks: coupling='antithetic' needs an even number, got 3: take one"):
            walk(rowptr, col, weight, num_walks=3, seed=0, coupling="antithetic")
        with pytest.raises(ValueError, match=r"num_walks: expected at least 1, got 0"):
            walk(rowptr, col, weight, num_walks=0, seed=0)
