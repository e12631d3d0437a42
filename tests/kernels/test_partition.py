"""The rows that parts sample together equal those of one process, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from geo.kernels import PartitionedSampler, Traffic, normalized_adjacency, sample_partitioned
from geo.ops import WalkDeposits, grf_paths, grf_walks

SEED = 2**63 + 5


def graph(num_nodes: int = 120, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Directed, with loops, signs and nodes without edges."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(num_nodes, 1), (2, 3 * num_nodes), generator=generator)
    weight = torch.randn(edges.size(1), generator=generator)
    return normalized_adjacency(edges, weight, num_nodes, dtype=dtype)


def assert_same(actual: WalkDeposits, expected: WalkDeposits) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())


LAWS = {
    "iid": {"num_walks": 33, "coupling": "iid"},  # enough for the order of sums to show
    "antithetic": {"num_walks": 4, "p_halt": 0.2, "first_walk": 6},
    "cut": {"num_walks": 4, "p_halt": 0.1, "max_length": 2},
    "starts": {"num_walks": 2, "max_length": 0},
    "survival": {"num_walks": 2, "coupling": "iid", "survival": [1.0, 0.9, 0.9, 0.4, 0.0]},
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_oracle_8_parts_1_equal_2_equal_5(law, dtype, device):
    rows = [t.to(device) for t in graph(dtype=dtype)]
    options = {"coupling": "antithetic", **LAWS[law], "seed": SEED}
    whole = grf_walks(*rows, **options, choice="rendezvous")
    for parts in (1, 2, 5):
        sampler = PartitionedSampler(parts)
        assert_same(sampler.sample(*rows, **options), whole)
        assert len(sampler.traffic) == parts


def test_any_partition_and_any_keys(device):
    rows = [t.to(device) for t in graph()]
    key = torch.randperm(120).to(device) + 1000
    owner = torch.randint(6, (120,)).to(device)
    whole = grf_walks(*rows, num_walks=4, seed=SEED, coupling="antithetic", choice="rendezvous", node_key=key)
    assert_same(PartitionedSampler(owner).sample(*rows, num_walks=4, seed=SEED, node_key=key), whole)


@pytest.mark.parametrize("num_nodes", [0, 1])
def test_small_graphs(num_nodes, device):
    rows = [t.to(device) for t in graph(num_nodes)]
    whole = grf_walks(*rows, num_walks=2, seed=0, coupling="antithetic", choice="rendezvous")
    for parts in (1, 3, torch.zeros(num_nodes, dtype=torch.int64, device=device)):
        assert_same(PartitionedSampler(parts).sample(*rows, num_walks=2, seed=0), whole)


def test_oracle_8_threads():
    """The same bits on one thread and on two."""
    rows, found, before = graph(500), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(PartitionedSampler(2).sample(*rows, num_walks=16, seed=SEED))
    finally:
        torch.set_num_threads(before)
    assert_same(*found)


def test_traffic_is_what_crosses_the_cut():
    """Against a count over all paths: walkers that step from part to part, deposits away from the part of the start."""
    rows = graph()
    owner = torch.randint(3, (120,))
    sampler = PartitionedSampler(owner)
    sampler.sample(*rows, num_walks=4, seed=SEED)
    ptr, node, edge = grf_paths(*rows, num_walks=4, seed=SEED, coupling="antithetic", choice="rendezvous")
    start = torch.arange(120).repeat_interleave(4).repeat_interleave(ptr.diff())
    step = (edge >= 0).nonzero().flatten()
    for part, traffic in enumerate(sampler.traffic):
        left = owner[node[step - 1]] == part
        crossed = int((left & (owner[node[step]] != part)).sum())
        away = int((left & (owner[start[step]] != part)).sum())
        assert min(crossed, away) > 0
        assert traffic == Traffic(int(ptr.diff().max()), crossed, away, 32 * crossed + 40 * away)
    sampler = PartitionedSampler(1)
    sampler.sample(*rows, num_walks=4, seed=SEED)
    assert sampler.traffic == [Traffic(int(ptr.diff().max()), 0, 0, 0)]


def torchrun(tmp_path: Path, processes: int, sizes: tuple[int, ...], device: str = "cpu") -> None:
    """Samples with real processes, and compares with one; needs no network but the loopback."""
    rows = graph()
    owners = {size: torch.randint(size, (120,)) for size in sizes}
    arrays = {name: t.numpy() for name, t in zip(("rowptr", "col", "weight"), rows, strict=True)}
    np.savez(tmp_path / "graph.npz", **arrays, **{f"owner_{size}": owner.numpy() for size, owner in owners.items()})
    worker = Path(__file__).with_name("partition_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    ran = subprocess.run(
        [*command, worker, tmp_path / "graph.npz", tmp_path, device, *map(str, sizes)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]

    whole = grf_walks(*rows, num_walks=4, seed=SEED, p_halt=0.2, coupling="antithetic", choice="rendezvous")
    for size in sizes:
        blocks = torch.arange(120) * size // 120
        for name, owner in (("blocks", blocks), ("owner", owners[size])):
            sampler = PartitionedSampler(owner)
            sampler.sample(*rows, num_walks=4, seed=SEED, p_halt=0.2)
            seen = []
            for rank in range(size):
                with np.load(tmp_path / f"{name}_{size}_{rank}.npz") as found:
                    nodes = found["nodes"]
                    expected = np.split(np.arange(len(whole.col)), whole.ptr[1:-1])
                    entries = np.concatenate([expected[v] for v in nodes])
                    assert (found["ptr"][1:] == np.cumsum(whole.ptr.diff().numpy()[nodes])).all()
                    for key in ("col", "length", "value"):
                        assert (found[key] == getattr(whole, key).numpy()[entries]).all()
                    assert Traffic(*found["traffic"]) == sampler.traffic[rank]
                    seeds, columns, walks, keys = found["said"]
                    assert seeds.startswith("ValueError: seed, num_walks" if size > 1 else "accepted")
                    last = rank == size - 1
                    assert columns.startswith("IndexError" if last else "RuntimeError: sample_partitioned: process")
                    assert walks.startswith(
                        "ValueError: num_walks: coupling" if last else "ValueError: seed, num_walks"
                    )
                    assert keys[:14] == seeds[:14]
                    seen += nodes.tolist()
            assert sorted(seen) == list(range(120))


def test_oracle_8_processes_1_equal_2_equal_4(tmp_path):
    """Four real processes, and groups of the first one and the first two of them."""
    torchrun(tmp_path, 4, (1, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_fewer_processes(processes, tmp_path):
    """One launch each, with nothing left over."""
    torchrun(tmp_path, processes, (processes,))


@pytest.mark.cuda
def test_nccl(tmp_path):
    """One process on one GPU: the exchange goes through nccl all the same."""
    torchrun(tmp_path, 1, (1,), "cuda")


def test_what_is_refused():
    rowptr, col, weight = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]), torch.ones(3)
    sampler = PartitionedSampler(2)
    with pytest.raises(ValueError, match="'rendezvous' needs coupling='iid' or 'antithetic', got coupling='repelling'"):
        sampler.sample(rowptr, col, weight, num_walks=2, seed=0, coupling="repelling")
    with pytest.raises(ValueError, match="num_walks: coupling='antithetic' needs an even number, got 3"):
        sampler.sample(rowptr, col, weight, num_walks=3, seed=0)
    with pytest.raises(ValueError, match="two entries in the row of node 0 have one key: add"):
        sampler.sample(rowptr, torch.tensor([1, 1, 0]), weight, num_walks=2, seed=0)
    with pytest.raises(ValueError, match="two entries in the row of node 0 have one"):
        sampler.sample(rowptr, col, weight, num_walks=2, seed=0, node_key=torch.tensor([4, 4]))
    with pytest.raises(ValueError, match=r"node_key: expected int64 \[2\]"):
        sampler.sample(rowptr, col, weight, num_walks=2, seed=0, node_key=torch.tensor([4]))
    with pytest.raises(IndexError, match=r"col\[1\] = 2 is out of range"):
        sampler.sample(rowptr, torch.tensor([0, 2, 0]), weight, num_walks=2, seed=0)
    with pytest.raises(ValueError, match="parts: expected at least 1, got 0"):
        PartitionedSampler(0)
    with pytest.raises(ValueError, match=r"parts: expected int64 \[2\]"):
        PartitionedSampler(torch.zeros(3, dtype=torch.int64)).sample(rowptr, col, weight, num_walks=2, seed=0)
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group"):
        sample_partitioned(rowptr, col, weight, num_walks=2, seed=0)
