from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import SegmentPlan, gather_linear_mul_segment_sum, gather_linear_mul_segment_sum_reference
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (O, O of basis, C, B): whole vectors, odd sizes, one orientation, one channel, a basis shared by the orientations
SIZES = [
    (16, 16, 64, 64),
    (5, 5, 33, 17),
    (1, 1, 64, 32),
    (1, 1, 1, 1),
    (2, 2, 96, 3),
    (7, 1, 20, 10),
    (3, 1, 64, 16),
    (130, 130, 8, 9),
    (2, 2, 3, 0),
    (2, 2, 0, 3),
    (0, 0, 3, 2),
]


def graph(num_edges: int, num_src: int, num_dst: int, device: torch.device | str = "cpu") -> SegmentPlan:
    edge_index = torch.stack([torch.randint(num_src, (num_edges,)), torch.randint(num_dst, (num_edges,))])
    return SegmentPlan.from_edge_index(edge_index.to(device), (num_src, num_dst))


def tensors(plan: SegmentPlan, sizes: tuple[int, int, int, int], device="cpu", dtype=torch.float32) -> list[Tensor]:
    num_ori, basis_ori, channels, basis_dim = sizes
    x = torch.randn(plan.src_size, num_ori, channels)
    basis = torch.randn(plan.index.size(0), basis_ori, basis_dim)
    weight = torch.randn(channels, basis_dim) / max(basis_dim, 1) ** 0.5
    return [t.to(device, dtype) for t in (x, basis, weight)]


def with_plan(plan: SegmentPlan):
    return lambda x, basis, weight: gather_linear_mul_segment_sum(x, basis, weight, plan=plan)


def without_plan(plan: SegmentPlan):
    return lambda x, basis, weight: gather_linear_mul_segment_sum(x, basis, weight, plan.src_index, plan.ptr, plan.perm)


def reference(plan: SegmentPlan):
    return lambda x, basis, weight: gather_linear_mul_segment_sum_reference(x, basis, weight, plan=plan)


def test_table(device):
    plan = SegmentPlan.from_edge_index(torch.tensor([[0, 1, 1], [1, 0, 1]], device=device), (2, 3))
    x = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]], device=device)  # two nodes, one orientation, two channels
    basis = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 1.0]]], device=device)
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], device=device)
    # kernels: edge 0 (1, 100), edge 1 (10, 1000), edge 2 (11, 1100)
    out = gather_linear_mul_segment_sum(x, basis, weight, plan=plan)
    assert out.tolist() == [[[30.0, 4000.0]], [[1.0 + 33.0, 200.0 + 4400.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize("num_edges", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device, dtype, num_edges):
    plan = graph(num_edges, 31, 17, device)
    for sizes in SIZES:
        inputs = tensors(plan, sizes, device, dtype)
        check_op(with_plan(plan), reference(plan), inputs, factor=10)
    check_op(without_plan(plan), reference(plan), tensors(plan, SIZES[1], device, dtype), factor=10)


@pytest.mark.parametrize("needed", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_each_gradient_alone_equals_reference(device, needed):
    plan = graph(200, 31, 17, device)
    for sizes in ((16, 16, 64, 64), (5, 1, 33, 17)):
        inputs = [t.requires_grad_(bool(n)) for t, n in zip(tensors(plan, sizes, device), needed, strict=True)]
        leaves = [t for t in inputs if t.requires_grad]
        g = torch.randn(17, sizes[0], sizes[2], device=device)
        got = torch.autograd.grad(with_plan(plan)(*inputs), leaves, g)
        assert_close(got, torch.autograd.grad(reference(plan)(*inputs), leaves, g), factor=20)


def test_equals_reference_where_sorted_or_crowded(device):
    """Edges sorted by target or by source, all into one node, far more nodes than edges, several chunks."""
    for index, src, num_dst, num_src in (
        (torch.randint(9, (3000,)).sort().values, torch.randint(7, (3000,)), 9, 7),
        (torch.randint(9, (3000,)), torch.randint(7, (3000,)).sort().values, 9, 7),
        (torch.full((3000,), 2), torch.randint(7, (3000,)), 5, 7),
        (torch.randint(5, (3000,)), torch.full((3000,), 6), 5, 7),
        (torch.randint(900, (300,)), torch.randint(800, (300,)), 900, 800),
    ):
        plan = SegmentPlan(index.to(device), num_dst, src.to(device), num_src)
        inputs = tensors(plan, (6, 6, 20, 16), device, torch.float64)
        check_op(with_plan(plan), reference(plan), inputs, factor=100)


def test_non_contiguous(device):
    plan = graph(40, 6, 5, device)
    x = torch.randn(4, 6, 6, device=device).transpose(0, 1)[:, ::2]
    basis = torch.randn(3, 40, 2, device=device).permute(1, 2, 0)
    weight = torch.randn(3, 6, device=device).t()
    check_op(with_plan(plan), reference(plan), (x, basis, weight), factor=2)
    check_op(with_plan(plan), reference(plan), (x, basis[:, :1].expand(40, 2, 3), weight), factor=2)


def test_dtypes_are_promoted(device):
    plan = graph(10, 4, 4, device)
    x, basis, weight = tensors(plan, (2, 2, 3, 5), device)
    out = gather_linear_mul_segment_sum(x, basis.double(), weight.bfloat16(), plan=plan)
    assert out.dtype == torch.float64
    assert_close(out, reference(plan)(x.double(), basis.double(), weight.bfloat16().double()))


def test_sixteen_bits_accumulate_in_float32(device):
    """4000 terms of one: bfloat16 sums would stop at 256, float16 ones at 2048."""
    plan = SegmentPlan(torch.zeros(2048, dtype=torch.int64, device=device), 1, torch.zeros_like(torch.arange(2048)), 1)
    plan = plan.to(device)
    for dtype in (torch.bfloat16, torch.float16):
        x, basis = torch.ones(1, 1, 3, dtype=dtype, device=device), torch.ones(2048, 1, 2, dtype=dtype, device=device)
        weight = torch.ones(3, 2, dtype=dtype, device=device)
        assert gather_linear_mul_segment_sum(x, basis, weight, plan=plan).tolist() == [[[4096.0] * 3]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_edges=st.integers(0, 150),
    num_ori=st.sampled_from([1, 2, 5, 16, 20]),
    shared=st.booleans(),
    channels=st.integers(1, 140),
    basis_dim=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size(seed, num_edges, num_ori, shared, channels, basis_dim, dtype):
    torch.manual_seed(seed)
    plan = graph(num_edges, 7, 5)
    inputs = tensors(plan, (num_ori, 1 if shared else num_ori, channels, basis_dim), dtype=dtype)
    check_op(with_plan(plan), reference(plan), inputs, factor=20)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_same_bits_on_any_number_of_threads():
    index = torch.cat([torch.full((3000,), 3), torch.randint(50, (2000,))])[torch.randperm(5000)]
    plan = SegmentPlan(index, 50, torch.randint(40, (5000,)), 40)
    threads = torch.get_num_threads()
    for sizes in ((5, 5, 33, 20), (5, 1, 64, 16)):
        inputs = [t.requires_grad_() for t in tensors(plan, sizes)]
        results = []
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                out = with_plan(plan)(*inputs)
                results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("sizes", [(3, 3, 4, 5), (3, 1, 4, 5), (1, 1, 2, 1)])
def test_derivatives(device, sizes):
    plan = graph(9, 4, 3, device)
    inputs = tensors(plan, sizes, device)
    check_derivatives(with_plan(plan), inputs)
    check_derivatives(without_plan(plan), inputs)


def test_third_derivative(device):
    plan = graph(7, 3, 3, device)
    inputs = [t.requires_grad_() for t in tensors(plan, (2, 2, 2, 2), device, torch.float64)]

    def second(x: Tensor, basis: Tensor, weight: Tensor) -> Tensor:
        energy = gather_linear_mul_segment_sum(x * x, basis * basis, weight, plan=plan).square().sum()
        force = torch.autograd.grad(energy, (x, basis, weight), create_graph=True)
        grads = torch.autograd.grad(sum(f.square().sum() for f in force), (x, basis, weight), create_graph=True)
        return torch.cat([g.flatten() for g in grads])

    assert torch.autograd.gradcheck(second, inputs)


def test_force_training_equals_reference(device):
    """The double backward of a force loss, in float32 through the kernels, against the reference in float64."""
    plan = graph(300, 20, 20, device)
    x, basis, weight = tensors(plan, (4, 4, 24, 16), device)

    def loss(conv, x: Tensor, basis: Tensor, weight: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, basis, weight)]
        energy = conv(conv(*leaves).tanh(), *leaves[1:]).square().mean()
        forces = torch.autograd.grad(energy, leaves[:2], create_graph=True)
        return list(torch.autograd.grad(sum(f.square().sum() for f in forces), leaves))

    ours = loss(with_plan(plan), x, basis, weight)
    theirs = loss(reference(plan), x.double(), basis.double(), weight.double())
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max()
        assert_close(a.double() / scale, b / scale, factor=1e11)  # float64's table; 1e-4 or so relative to the largest


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("basis_ori", [2, 1])
def test_opcheck(device, grad, basis_ori):
    plan = graph(9, 4, 3, device)
    x, basis, weight = (t.requires_grad_(grad) for t in tensors(plan, (2, basis_ori, 3, 5), device))
    g = torch.randn(3, 2, 3, device=device, requires_grad=grad)
    src, dst, order = plan.src_index, plan.index, (plan.ptr, plan.perm, plan.t_ptr, plan.t_perm)
    op = torch.ops.geo.gather_linear_mul_segment_sum.default
    torch.library.opcheck(op, (x, basis, weight, src, dst, *order))
    torch.library.opcheck(op, (x, basis, weight, src, None, plan.ptr, plan.perm, None, None))
    op = torch.ops.geo.gather_linear_mul_grad.default
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.library.opcheck(op, (x, g, basis, weight, src, dst, *order, *need))


def compiled_model(x: Tensor, basis: Tensor, weight: Tensor, edge_index: Tensor) -> Tensor:
    plan = SegmentPlan.from_edge_index(edge_index, x.size(0))
    return gather_linear_mul_segment_sum(torch.sin(x), basis, weight, plan=plan)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("basis_ori", [2, 1])
def test_compile(device, dynamic, basis_ori):
    edge_index = torch.randint(4, (2, 9), device=device)
    plan = SegmentPlan.from_edge_index(edge_index, 4)
    inputs = tensors(plan, (2, basis_ori, 3, 5), device)
    check_compile(compiled_model, (*inputs, edge_index), dynamic=dynamic)


@pytest.mark.slow
def test_inductor(device):
    edge_index = torch.randint(4, (2, 9), device=device)
    inputs = tensors(SegmentPlan.from_edge_index(edge_index, 4), (2, 2, 3, 5), device)
    check_compile(compiled_model, (*inputs, edge_index), "inductor")


def test_bad_index(device):
    plan = SegmentPlan(torch.tensor([0, 0, 1, 1, 1], device=device), 2, torch.tensor([0, 3, 1, 2, 0], device=device), 4)
    x, basis, weight = tensors(plan, (2, 2, 3, 5), device)
    src, ptr = plan.src_index, plan.ptr
    assert gather_linear_mul_segment_sum(x, basis, weight, src, ptr).shape == (2, 2, 3)
    for position, value in ((1, 4), (4, -1), (0, 2**62)):
        bad = src.clone()
        bad[position] = value
        with pytest.raises(IndexError, match=rf"src_index\[{position}\] = {value} is out of range \[0, 3\]"):
            gather_linear_mul_segment_sum(x, basis, weight, bad, ptr)
    perm = torch.tensor([0, 1, 5, 2, 3], device=device)
    with pytest.raises(IndexError, match=r"edge_perm\[2\] = 5 is out of range \[0, 4\]"):
        gather_linear_mul_segment_sum(x, basis, weight, src, ptr, perm)
    for bad, message in (([0, 7, 5], r"ptr\[1\] = 7"), ([0, 3, 4], r"ptr\[2\] = 4"), ([1, 3, 5], r"ptr\[0\] = 1")):
        with pytest.raises(IndexError, match=message):
            gather_linear_mul_segment_sum(x, basis, weight, src, torch.tensor(bad, device=device))
    with pytest.raises(IndexError):
        gather_linear_mul_segment_sum_reference(x, basis, weight, src + 9, ptr)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_bad_index_in_the_gradient_op():
    plan = graph(5, 4, 3)
    x, basis, weight = tensors(plan, (2, 2, 3, 5))
    args = [x, torch.randn(3, 2, 3), basis, weight, plan.src_index, plan.index + 2, plan.ptr, plan.perm]
    with pytest.raises(RuntimeError, match=r"dst_index\[\d\] = \d is out of range \[0, 2\]"):
        torch.ops.geo.gather_linear_mul_grad(*args, plan.t_ptr, plan.t_perm, True, True, True)
    args[5] = plan.index
    with pytest.raises(RuntimeError, match=r"t_perm\[0\] = 7 is out of range \[0, 4\]"):
        torch.ops.geo.gather_linear_mul_grad(*args, plan.t_ptr, torch.full((5,), 7), False, True, True)
    with pytest.raises(RuntimeError, match=r"ptr\[4\] = 4 is out of range \[5, 5\]"):
        torch.ops.geo.gather_linear_mul_grad(*args, torch.tensor([0, 1, 2, 3, 4]), None, False, True, True)


def test_bad_index_in_a_compiled_graph():
    torch.compiler.reset()
    plan = graph(5, 4, 3)
    inputs = tensors(plan, (2, 2, 3, 5))
    compiled = torch.compile(
        lambda s: gather_linear_mul_segment_sum(*inputs, s, plan.ptr),
        fullgraph=True,
        backend="aot_eager",
        dynamic=False,
    )
    with pytest.raises((RuntimeError, IndexError), match=r"src_index\[1\] = 4 is out of range \[0, 3\]"):
        compiled(torch.tensor([0, 4, 1, 2, 0]))


def test_refusals():
    plan = graph(5, 4, 3)
    x, basis, weight = tensors(plan, (2, 2, 3, 5))
    src, ptr = plan.src_index, plan.ptr
    conv = gather_linear_mul_segment_sum
    with pytest.raises(ValueError, match="needs src_index and ptr, or a plan"):
        conv(x, basis, weight)
    with pytest.raises(ValueError, match="needs src_index and ptr, or a plan"):
        conv(x, basis, weight, plan=SegmentPlan(plan.index, 3))
    with pytest.raises(ValueError, match="either plan or src_index"):
        conv(x, basis, weight, src, ptr, plan=plan)
    with pytest.raises(ValueError, match="x has 3 rows, the plan was built for 4 sources"):
        conv(x[1:], basis, weight, plan=plan)
    with pytest.raises(ValueError, match=r"x must be \[M, O, C\], got shape \[4, 2\]"):
        conv(x[..., 0], basis, weight, src, ptr)
    with pytest.raises(ValueError, match=r"axis 1 of basis must have the size of x's \(2\) or 1, got 3"):
        conv(x, basis[:, :1].expand(5, 3, 5), weight, src, ptr)
    with pytest.raises(ValueError, match=r"weight must be \[C, B\] with the C = 3 channels .* got \[2, 5\]"):
        conv(x, basis, weight[:2], src, ptr)
    with pytest.raises(ValueError, match=r"weight must be .* B = 5 functions of basis, got \[3, 4\]"):
        conv(x, basis, weight[:, :4], src, ptr)
    with pytest.raises(ValueError, match=r"src_index must have one entry per row of basis \(5\), got 4"):
        conv(x, basis, weight, src[:4], ptr)
    with pytest.raises(ValueError, match=r"edge_perm must have one entry per edge \(5\), got 4"):
        conv(x, basis, weight, src, ptr, src[:4])
    with pytest.raises(ValueError, match="ptr must have at least one entry"):
        conv(x, basis, weight, src, ptr[:0])
    with pytest.raises(ValueError, match=r"expected floating tensors, got torch\.int64"):
        conv(x.long(), basis.long(), weight.long(), src, ptr)
    with pytest.raises(ValueError, match=r"src_index must be int64 with one axis, got torch\.int32"):
        conv(x, basis, weight, src.int(), ptr)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gather_linear_mul_segment_sum_reference there"):
        torch.func.grad(lambda x: conv(x, basis, weight, src, ptr).sum())(x)


def test_reference_under_torch_func():
    plan = graph(9, 4, 3)
    x, basis, weight = tensors(plan, (2, 2, 3, 5))
    grad = torch.func.grad(lambda w: reference(plan)(x, basis, w).square().sum())(weight)
    weight.requires_grad_()
    assert_close(grad, torch.autograd.grad(with_plan(plan)(x, basis, weight).square().sum(), weight)[0], factor=2)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_memory_is_the_output():
    """Forward allocates the output, backward the gradients: nothing of size [E, O, C]."""
    from torch.profiler import ProfilerActivity, profile

    plan = graph(2000, 50, 40)
    plan.t_ptr  # noqa: B018 (built and kept)
    inputs = [t.requires_grad_() for t in tensors(plan, (4, 4, 32, 8))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = with_plan(plan)(*inputs)
        grads = torch.autograd.grad(out, inputs, out)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in prof.key_averages())
    assert allocated <= 4 * (out.numel() + sum(g.numel() for g in grads)) + 4096
    assert allocated < 4 * 2000 * 4 * 32
