from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import (
    SegmentPlan,
    check_bounds,
    gather_mul,
    gather_mul_reference,
    gather_mul_segment_sum,
    gather_mul_segment_sum_reference,
)
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (features of x, features of weight): full, shared scalars, outer and inner axes shared, and every alternation
SHARING = [
    ((), ()),
    ((1,), (1,)),
    ((67,), (67,)),
    ((67,), (1,)),
    ((16, 64), (16, 64)),
    ((16, 64), (1, 64)),
    ((16, 64), (16, 1)),
    ((16, 64), (1, 1)),
    ((5, 3), (1, 3)),
    ((5, 3), (5, 1)),
    ((2, 9, 35), (2, 1, 35)),
    ((2, 9, 35), (1, 9, 1)),
    ((2, 3, 2, 5), (2, 1, 2, 1)),
    ((2, 3, 2, 5), (1, 3, 1, 5)),
    ((2, 0), (2, 1)),
]


def graph(num_edges: int, num_src: int, num_dst: int, device: torch.device | str = "cpu") -> SegmentPlan:
    src = torch.randint(num_src, (num_edges,))
    dst = torch.randint(num_dst, (num_edges,))
    return SegmentPlan.from_edge_index(torch.stack([src, dst]).to(device), (num_src, num_dst))


def with_plan(plan: SegmentPlan):
    return lambda x, w: gather_mul_segment_sum(x, w, plan=plan)


def without_plan(plan: SegmentPlan):
    return lambda x, w: gather_mul_segment_sum(x, w, plan.src_index, plan.ptr, plan.perm)


def reference(plan: SegmentPlan):
    return lambda x, w: gather_mul_segment_sum_reference(x, w, plan=plan)


def test_table(device):
    edge_index = torch.tensor([[0, 1, 1], [1, 0, 1]], device=device)
    plan = SegmentPlan.from_edge_index(edge_index, (2, 3))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    w = torch.tensor([[10.0, 20.0], [1.0, 1.0], [100.0, 1000.0]], device=device)
    assert gather_mul_segment_sum(x, w, plan=plan).tolist() == [[3.0, 4.0], [310.0, 4040.0], [0.0, 0.0]]
    assert gather_mul_segment_sum(x, w[:, :1], plan=plan).tolist() == [[3.0, 4.0], [310.0, 420.0], [0.0, 0.0]]
    g = torch.tensor([[1.0, 0.5], [2.0, 0.0], [7.0, 7.0]], device=device)
    assert gather_mul(x, g, *edge_index).tolist() == [[2.0, 0.0], [3.0, 2.0], [6.0, 0.0]]


@pytest.mark.parametrize("num_edges", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device, dtype, num_edges):
    for shape, weight_shape in SHARING:
        plan = graph(num_edges, 31, 17, device)
        x = torch.randn(31, *shape).to(device, dtype)
        w = torch.randn(num_edges, *weight_shape).to(device, dtype)
        for run in (with_plan(plan), without_plan(plan)):
            check_op(run, reference(plan), (x, w), factor=2)
        g = torch.randn(17, *shape).to(device, dtype)
        check_op(gather_mul, gather_mul_reference, (x, g, plan.src_index, plan.index), factor=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_one_number(device, dtype):
    """They take a path of their own."""
    plan = graph(200, 31, 17, device)
    ordered = SegmentPlan(plan.index.sort().values, 17, plan.src_index, 31)
    x, w = torch.randn(31, 1).to(device, dtype), torch.randn(200, 1).to(device, dtype)
    for chosen in (plan, ordered):
        assert (chosen.perm is None) == (chosen is ordered)
        check_op(with_plan(chosen), reference(chosen), (x, w), factor=2)
        wide = gather_mul_segment_sum(x.expand(31, 33), w.expand(200, 33), plan=chosen)
        assert_close(gather_mul_segment_sum(x, w, plan=chosen), wide[:, :1])
        with pytest.raises(IndexError, match="src_index"):
            gather_mul_segment_sum(x[:3], w, plan.src_index, chosen.ptr, chosen.perm)


def test_sorted_edges_take_no_perm(device):
    index = torch.tensor([0, 0, 1, 3, 3], device=device)
    src = torch.tensor([2, 0, 1, 1, 2], device=device)
    plan = SegmentPlan(index, 4, src, 3)
    assert plan.perm is None
    x, w = torch.randn(3, 4, 2, device=device), torch.randn(5, 4, 2, device=device)
    check_op(with_plan(plan), reference(plan), (x, w))
    check_op(lambda x, w: gather_mul_segment_sum(x, w, src, plan.ptr), reference(plan), (x, w))


def test_non_contiguous(device):
    plan = graph(40, 6, 5, device)
    x = torch.randn(4, 6, 3, device=device).transpose(0, 1)[:, ::2]
    w = torch.randn(3, 40, 2, device=device).permute(1, 2, 0)
    check_op(with_plan(plan), reference(plan), (x, w))
    check_op(with_plan(plan), reference(plan), (x, w[:, :1].expand(40, 2, 3)))
    g = torch.randn(5, 3, 2, device=device).transpose(1, 2)
    check_op(gather_mul, gather_mul_reference, (x, g, plan.src_index, plan.index))


def test_dtypes_are_promoted(device):
    plan = graph(10, 4, 4, device)
    x, w = torch.randn(4, 3, device=device), torch.randn(10, 3, dtype=torch.float64, device=device)
    out = gather_mul_segment_sum(x, w, plan=plan)
    assert out.dtype == torch.float64
    assert_close(out, gather_mul_segment_sum_reference(x.double(), w, plan=plan))
    assert gather_mul(x.bfloat16(), x, plan.src_index, plan.index).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_edges=st.integers(0, 150),
    axes=st.lists(st.tuples(st.sampled_from([1, 2, 3, 16, 33]), st.booleans()), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_sharing(seed, num_edges, axes, dtype):
    torch.manual_seed(seed)
    plan = graph(num_edges, 7, 5)
    x = torch.randn(7, *[size for size, _ in axes], dtype=dtype)
    w = torch.randn(num_edges, *[1 if shared else size for size, shared in axes], dtype=dtype)
    check_op(with_plan(plan), reference(plan), (x, w), factor=5)


def test_hub(device):
    """Targets and sources with enough edges to be cut, in a power law."""
    weights = 1.0 / torch.arange(1, 101).double() ** 2
    edge_index = torch.stack([torch.multinomial(weights, 60000, True), torch.multinomial(weights, 60000, True)])
    plan = SegmentPlan.from_edge_index(edge_index.to(device), 100)
    assert plan.splits.size(0) > 2
    for shape, weight_shape in (((3,), (3,)), ((2, 40), (1, 40)), ((), ())):
        x = torch.randn(100, *shape, dtype=torch.float64, device=device)
        w = torch.randn(60000, *weight_shape, dtype=torch.float64, device=device)
        check_op(with_plan(plan), reference(plan), (x, w), factor=10)


def test_same_bits_on_any_number_of_threads():
    index = torch.cat([torch.full((30000,), 3), torch.randint(50, (5000,))])[torch.randperm(35000)]
    plan = SegmentPlan(index, 50, torch.randint(40, (35000,)), 40)
    threads = torch.get_num_threads()
    for shape, weight_shape in (((5, 7), (5, 7)), ((5, 7), (1, 7)), ((5, 7), (5, 1))):
        x = torch.randn(40, *shape, requires_grad=True)
        w = torch.randn(35000, *weight_shape, requires_grad=True)
        results = []
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                out = gather_mul_segment_sum(x, w, plan=plan)
                results.append((out, *torch.autograd.grad(out.square().sum(), (x, w))))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize(("shape", "weight_shape"), [((2, 3), (2, 3)), ((2, 3), (1, 3)), ((2, 3), (2, 1)), ((), ())])
def test_derivatives(device, shape, weight_shape):
    plan = graph(9, 4, 3, device)
    x, g = torch.randn(4, *shape, device=device), torch.randn(3, *shape, device=device)
    w = torch.randn(9, *weight_shape, device=device)
    check_derivatives(with_plan(plan), (x, w))
    check_derivatives(without_plan(plan), (x, w))
    check_derivatives(lambda x, g: gather_mul(x, g, plan.src_index, plan.index), (x, g))


def test_third_derivative(device):
    plan = graph(9, 4, 3, device)
    x = torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)
    w = torch.randn(9, 2, dtype=torch.float64, device=device, requires_grad=True)

    def second(x: Tensor, w: Tensor) -> Tensor:
        energy = gather_mul_segment_sum(x * x, w * w, plan=plan).square().sum()
        force = torch.autograd.grad(energy, (x, w), create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in force), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (x, w))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weight_shape", [(2, 3), (1, 3)])
def test_opcheck(device, grad, weight_shape):
    plan = graph(9, 4, 3, device)
    x = torch.randn(4, 2, 3, device=device, requires_grad=grad)
    g = torch.randn(3, 2, 3, device=device, requires_grad=grad)
    w = torch.randn(9, *weight_shape, device=device, requires_grad=grad)
    src, dst = plan.src_index, plan.index
    order = (plan.ptr, plan.perm, plan.t_ptr, plan.t_perm)
    shared = 1 if weight_shape[0] == 1 else 0
    torch.library.opcheck(torch.ops.geo.gather_mul_segment_sum.default, (x, w, src, dst, *order))
    torch.library.opcheck(
        torch.ops.geo.gather_mul_segment_sum.default, (x, w, src, None, plan.ptr, plan.perm, None, None)
    )
    torch.library.opcheck(torch.ops.geo.gather_mul.default, (x, g, src, dst, *order, shared))
    torch.library.opcheck(torch.ops.geo.gather_mul.default, (x, g, src, dst, None, None, None, None, shared))


def compiled_model(x: Tensor, w: Tensor, edge_index: Tensor) -> Tensor:
    plan = SegmentPlan.from_edge_index(edge_index, x.size(0))
    h = gather_mul_segment_sum(torch.sin(x), w, plan=plan)
    return gather_mul(h, x, edge_index[0], edge_index[1])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("weight_shape", [(2, 3), (1, 3)])
def test_compile(device, dynamic, weight_shape):
    edge_index = torch.randint(4, (2, 9), device=device)
    x, w = torch.randn(4, 2, 3, device=device), torch.randn(9, *weight_shape, device=device)
    check_compile(compiled_model, (x, w, edge_index), dynamic=dynamic)


@pytest.mark.slow
def test_inductor(device):
    edge_index = torch.randint(4, (2, 9), device=device)
    x, w = torch.randn(4, 2, 3, device=device), torch.randn(9, 2, 3, device=device)
    check_compile(compiled_model, (x, w, edge_index), "inductor")


def test_bad_index(device):
    x, w = torch.zeros(4, 3, device=device), torch.zeros(5, 3, device=device)
    src = torch.tensor([0, 3, 1, 2, 0], device=device)
    ptr = torch.tensor([0, 2, 5], device=device)
    good = gather_mul_segment_sum(x, w, src, ptr)
    assert good.shape == (2, 3)
    for position, value in ((1, 4), (4, -1), (0, 2**62)):
        bad = src.clone()
        bad[position] = value
        with pytest.raises(IndexError, match=rf"src_index\[{position}\] = {value} is out of range \[0, 3\]"):
            gather_mul_segment_sum(x, w, bad, ptr)
        with pytest.raises(
            IndexError, match=rf"gather_mul: src_index\[{position}\] = {value} is out of range \[0, 3\]"
        ):
            gather_mul(x, x, bad, src)
        with pytest.raises(
            IndexError, match=rf"gather_mul: dst_index\[{position}\] = {value} is out of range \[0, 3\]"
        ):
            gather_mul(x, x, src, bad)
    perm = torch.tensor([0, 1, 5, 2, 3], device=device)
    with pytest.raises(IndexError, match=r"edge_perm\[2\] = 5 is out of range \[0, 4\]"):
        gather_mul_segment_sum(x, w, src, ptr, perm)
    with pytest.raises(IndexError, match=r"ptr\[1\] = 7 is out of range \[0, 5\]"):
        gather_mul_segment_sum(x, w, src, torch.tensor([0, 7, 5], device=device))
    with pytest.raises(IndexError, match="out of range"):
        gather_mul_segment_sum_reference(x, w, src + 9, ptr)


def test_bad_index_among_many_is_the_first():
    """The position in the message is the least one, whichever thread saw it."""
    src = torch.randint(100, (50000,))
    src[[40000, 777, 12345]] = 100
    x = torch.zeros(100, 64)
    for _ in range(3):
        with pytest.raises(IndexError, match=r"src_index\[777\] = 100 is out of range \[0, 99\]"):
            gather_mul(x, x, src, src.clamp(max=99))


@pytest.mark.cuda
def test_unchecked_bad_index_is_skipped():
    """With check_bounds(False) the edge is left out, and nothing is raised, then or later."""
    x = torch.ones(4, 3, device="cuda")
    src, ptr = torch.tensor([0, 9, 1, 2, 0], device="cuda"), torch.tensor([0, 2, 5], device="cuda")
    check_bounds(False)
    try:
        out = gather_mul_segment_sum(x, torch.ones(5, 3, device="cuda"), src, ptr)
    finally:
        check_bounds(True)
    assert out.tolist() == [[1.0] * 3, [3.0] * 3]
    assert gather_mul(x, x, src.clamp(max=3), src.clamp(max=3)).sum() == 15.0


def test_bad_index_in_a_compiled_graph():
    torch.compiler.reset()
    x, w, ptr = torch.zeros(4, 3), torch.zeros(5, 3), torch.tensor([0, 2, 5])
    compiled = torch.compile(
        lambda s: gather_mul_segment_sum(x, w, s, ptr), fullgraph=True, backend="aot_eager", dynamic=False
    )
    with pytest.raises((RuntimeError, IndexError), match=r"src_index\[1\] = 4 is out of range \[0, 3\]"):
        compiled(torch.tensor([0, 4, 1, 2, 0]))


def test_refusals():
    x, w = torch.zeros(4, 3), torch.zeros(5, 3)
    src, ptr = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 2, 5])
    plan = SegmentPlan(torch.tensor([0, 0, 1, 1, 1]), 2, src, 9)
    with pytest.raises(ValueError, match="needs src_index and ptr, or a plan"):
        gather_mul_segment_sum(x, w)
    with pytest.raises(ValueError, match="needs src_index and ptr, or a plan"):
        gather_mul_segment_sum(x, w, plan=SegmentPlan(plan.index, 2))
    with pytest.raises(ValueError, match="either plan or src_index, ptr and edge_perm"):
        gather_mul_segment_sum(x, w, src, ptr, plan=plan)
    with pytest.raises(
        ValueError, match="either plan or src_index"
    ):  # its gradient would follow the plan's own sources
        gather_mul_segment_sum(x, w, src, plan=plan)
    with pytest.raises(ValueError, match="x has 4 rows, the plan was built for 9 sources"):
        gather_mul_segment_sum(x, w, plan=plan)
    with pytest.raises(ValueError, match=r"weight must match x \[4, 3\] or be 1 on each feature axis, got \[5, 2\]"):
        gather_mul_segment_sum(x, w[:, :2], src, ptr)
    with pytest.raises(ValueError, match=r"as many axes as x, got \[5\] for x \[4, 3\]"):
        gather_mul_segment_sum(x, w[:, 0], src, ptr)
    with pytest.raises(ValueError, match=r"one row per edge \(5\), got \[4, 3\]"):
        gather_mul_segment_sum(x, w[:4], src, ptr)
    with pytest.raises(ValueError, match="src_index must be int64 with one axis"):
        gather_mul_segment_sum(x, w, src.int(), ptr)
    with pytest.raises(ValueError, match="ptr must be int64 with one axis"):
        gather_mul_segment_sum(x, w, src, ptr.view(1, 3))
    with pytest.raises(ValueError, match=r"edge_perm must have one entry per edge \(5\), got 3"):
        gather_mul_segment_sum(x, w, src, ptr, ptr)
    with pytest.raises(ValueError, match="expected floating tensors"):
        gather_mul_segment_sum(x.long(), w.long(), src, ptr)
    with pytest.raises(ValueError, match="equal length, got 5 and 3"):
        gather_mul(x, x, src, src[:3])
    with pytest.raises(ValueError, match="x and g must agree after the first axis"):
        gather_mul(x, w[:, :2], src, src)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gather_mul_segment_sum_reference there"):
        torch.func.grad(lambda x: gather_mul_segment_sum(x, w, src, ptr).sum())(x)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gather_mul_reference there"):
        torch.func.vmap(lambda x: gather_mul(x, x, src, src))(torch.zeros(2, 4, 3))


def test_references_under_torch_func():
    plan = graph(9, 4, 3)
    x, w = torch.randn(4, 2), torch.randn(9, 2, requires_grad=True)
    grad = torch.func.grad(lambda w: gather_mul_segment_sum_reference(x, w, plan=plan).square().sum())(w.detach())
    wanted = torch.autograd.grad(gather_mul_segment_sum(x, w, plan=plan).square().sum(), w)
    assert_close(grad, wanted[0])


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_memory_is_the_output():
    """Forward keeps nothing of size [E, *S]: what torch allocates during the call is the output alone."""
    from torch.profiler import ProfilerActivity, profile

    plan = graph(2000, 50, 40)
    x, w = torch.randn(50, 64), torch.randn(2000, 64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = gather_mul_segment_sum(x, w, plan=plan)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in prof.key_averages())
    assert allocated <= out.numel() * out.element_size() + 1024
