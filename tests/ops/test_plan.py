from __future__ import annotations

import pytest
import torch

from geo.ops import SegmentPlan, csr_from_index, csr_from_index_reference
from geo.ops.plan import HUB_CHUNK


def test_table(device):
    edge_index = torch.tensor([[0, 1, 1, 3], [2, 0, 2, 0]], device=device)
    plan = SegmentPlan.from_edge_index(edge_index, (4, 3))
    assert plan.ptr.tolist() == [0, 2, 2, 4]
    assert plan.perm.tolist() == [1, 3, 0, 2]
    assert plan.t_ptr.tolist() == [0, 1, 3, 3, 4]
    assert plan.t_perm is None  # the sources are sorted
    assert (plan.dim_size, plan.src_size) == (3, 4)
    assert repr(plan) == "SegmentPlan(num_edges=4, dim_size=3, src_size=4)"


def test_sorted_index_needs_no_perm(device):
    plan = SegmentPlan(torch.tensor([0, 0, 2], device=device))
    assert plan.perm is None
    assert plan.ptr.tolist() == [0, 2, 2, 3]
    assert plan.t_ptr is None
    assert plan.t_perm is None


@pytest.mark.parametrize("num_edges", [0, 1, 2, 63, 1000])
def test_csr_equals_reference(device, num_edges):
    index = torch.randint(50, (num_edges,), device=device)
    for ours, theirs in zip(csr_from_index(index, 50), csr_from_index_reference(index, 50), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_edges", [1, 1024, 1025, 40000])
@pytest.mark.parametrize("in_order", [False, True])
def test_csr_of_any_order_on_any_number_of_threads(num_edges, in_order):
    index = torch.randint(10, 50, (num_edges,))  # the first and last segments are empty
    index = index.sort().values if in_order else index
    wanted = csr_from_index_reference(index, 60)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(csr_from_index(index, 60), wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [60, -1, 2**62])
def test_csr_refuses_a_bad_last_entry(value):
    index = torch.arange(60)
    index[-1] = value
    with pytest.raises(IndexError, match=rf"csr_from_index: index\[59\] = {value} is out of range \[0, 59\]"):
        csr_from_index(index, 60)


def test_empty():
    assert SegmentPlan(torch.zeros(0, dtype=torch.int64)).ptr.tolist() == [0]
    assert SegmentPlan(torch.zeros(0, dtype=torch.int64), 2).ptr.tolist() == [0, 0, 0]


def test_splits():
    lengths = [3, 2 * HUB_CHUNK - 1, 2 * HUB_CHUNK, 0, 3 * HUB_CHUNK + 5]
    index = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    pieces = SegmentPlan(index, 5).splits
    a, b = 3 + 2 * HUB_CHUNK - 1, 3 + 4 * HUB_CHUNK - 1
    assert pieces.tolist() == [
        [2, a, a + HUB_CHUNK],
        [2, a + HUB_CHUNK, b],
        [4, b, b + HUB_CHUNK],
        [4, b + HUB_CHUNK, b + 2 * HUB_CHUNK],
        [4, b + 2 * HUB_CHUNK, b + 3 * HUB_CHUNK + 5],
    ]


def test_to_keeps_everything():
    plan = SegmentPlan.from_edge_index(torch.tensor([[1, 0, 1], [1, 0, 0]]), 2)
    assert plan.t_perm.tolist() == [1, 0, 2]
    moved = plan.to("cpu")
    for name in ("index", "src_index", "ptr", "perm", "t_ptr", "t_perm"):
        assert torch.equal(getattr(moved, name), getattr(plan, name)), name
    assert repr(moved) == repr(plan)


def test_compiled():
    torch.compiler.reset()

    def degrees(edge_index):
        return SegmentPlan.from_edge_index(edge_index, 5).ptr.diff()

    edge_index = torch.tensor([[0, 1, 1, 3], [2, 0, 2, 0]])
    compiled = torch.compile(degrees, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(edge_index), degrees(edge_index))


def test_refusals():
    index = torch.tensor([0, 3, 1])
    with pytest.raises(IndexError, match=r"index\[1\] = 3 is out of range \[0, 2\]"):
        SegmentPlan(index, 3)
    with pytest.raises(IndexError, match=r"index\[2\] = -1 is out of range \[0, 3\]"):
        SegmentPlan(torch.tensor([0, 3, -1]), 4)
    with pytest.raises(IndexError, match=r"src_index\[0\] = 9 is out of range \[0, 3\]"):
        _ = SegmentPlan(index, 4, src_index=torch.tensor([9, 0, 0])).t_ptr
    with pytest.raises(ValueError, match="index must be int64"):
        SegmentPlan(index.int(), 4)
    with pytest.raises(ValueError, match="src_index must be int64"):
        SegmentPlan(index, 4, src_index=torch.zeros(3))
    with pytest.raises(ValueError, match=r"src_index must have one entry per edge \(3\), got 2"):
        SegmentPlan(index, 4, src_index=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"edge_index must be \[2, E\], got \[3\]"):
        SegmentPlan.from_edge_index(index, 4)
