from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo.ops import SegmentPlan, csr_from_index, gather_csr, segment_reduce, segment_reduce_reference
from geo.testing import assert_close, check_compile, check_derivatives, check_op

REDUCES = ["sum", "mean", "mul", "min", "max"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
nan, inf = float("nan"), float("inf")


def random_ptr(num_segments: int, num_edges: int, device: torch.device | str = "cpu") -> Tensor:
    """Segments of random length, some of them empty."""
    if num_segments == 0:
        return torch.zeros(1, dtype=torch.int64, device=device)
    cuts = torch.randint(num_edges + 1, (num_segments - 1,)).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([num_edges])]).to(device)


def by_loop(src: Tensor, index: Tensor, num_segments: int, reduce: str) -> tuple[Tensor, Tensor]:
    """The law itself, row by row in float64: the values, and the rows that the extremes stand in."""
    rows = src.double()
    out = torch.full((num_segments, *src.shape[1:]), float(reduce == "mul"), dtype=torch.float64)
    arg = torch.full(out.shape, src.size(0))
    for e, i in enumerate(index.tolist()):
        if reduce in ("sum", "mean"):
            out[i] += rows[e]
        elif reduce == "mul":
            out[i] *= rows[e]
        else:
            beyond = rows[e] > out[i] if reduce == "max" else rows[e] < out[i]
            takes = ((beyond | rows[e].isnan()) & ~out[i].isnan()) | (arg[i] == src.size(0))
            out[i], arg[i] = torch.where(takes, rows[e], out[i]), torch.where(takes, e, arg[i])
    if reduce == "mean":
        out /= torch.bincount(index, minlength=num_segments).clamp(min=1).view(-1, *[1] * (src.dim() - 1))
    return out, arg


# the values of three segments, the middle one empty, by reduce
TABLE = {
    "sum": [[11.0, -3.0], [0.0, 0.0], [7.0, 5.0]],
    "mean": [[5.5, -1.5], [0.0, 0.0], [7.0, 5.0]],
    "mul": [[10.0, -10.0], [1.0, 1.0], [7.0, 5.0]],
    "min": [[1.0, -5.0], [0.0, 0.0], [7.0, 5.0]],
    "max": [[10.0, 2.0], [0.0, 0.0], [7.0, 5.0]],
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32])
@pytest.mark.parametrize("reduce", REDUCES)
def test_table(device, dtype, reduce):
    if reduce == "mean" and not dtype.is_floating_point:
        pytest.skip("the mean of integers is refused")
    src = torch.tensor([[1, -5], [10, 2], [7, 5]], dtype=dtype, device=device)
    out = segment_reduce(src, torch.tensor([0, 2, 2, 3], device=device), reduce)
    assert out.dtype == dtype
    assert out.tolist() == TABLE[reduce]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_gather_table(device, dtype):
    src = torch.tensor([5, 6, 7], dtype=dtype, device=device)
    ptr = torch.tensor([0, 2, 2, 3], device=device)
    assert gather_csr(src, ptr).tolist() == [5, 5, 7]
    assert gather_csr(src, ptr, num_out=3).tolist() == [5, 5, 7]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (64,), (5, 13), (0,), (2, 300)], ids=str)
@pytest.mark.parametrize("num_edges", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("reduce", REDUCES)
def test_equals_reference(device, reduce, num_edges, shape):
    for dtype in FLOATS:
        ptr = random_ptr(20, num_edges, device)
        src = torch.randn(num_edges, *shape).to(device, dtype)
        check_op(segment_reduce, segment_reduce_reference, (src, ptr, reduce))
        values = torch.randn(20, *shape).to(device, dtype)
        assert torch.equal(gather_csr(values, ptr), values.repeat_interleave(ptr.diff(), 0))


def test_no_segments(device):
    ptr = torch.zeros(1, dtype=torch.int64, device=device)
    for reduce in REDUCES:
        assert segment_reduce(torch.zeros(0, 3, device=device), ptr, reduce).shape == (0, 3)
    assert gather_csr(torch.zeros(0, 3, device=device), ptr).shape == (0, 3)


@pytest.mark.parametrize("reduce", REDUCES)
def test_non_contiguous(device, reduce):
    ptr = random_ptr(7, 40, device)
    src = torch.randn(5, 40, 3, device=device).transpose(0, 1)[:, ::2]
    check_op(segment_reduce, segment_reduce_reference, (src, ptr, reduce))
    strided = torch.stack([ptr, ptr], 1)[:, 0]
    torch.testing.assert_close(segment_reduce(src, strided, reduce), segment_reduce(src.contiguous(), ptr, reduce))


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("width", [1, 64, 67])
def test_extreme_takes_the_first(device, reduce, width):
    src = torch.tensor([2.0, 3.0, 3.0, 2.0, 2.0], device=device).unsqueeze(1).repeat(1, width).requires_grad_()
    out = segment_reduce(src, torch.tensor([0, 5], device=device), reduce)
    out.sum().backward()
    first = 1 if reduce == "max" else 0
    assert src.grad.nonzero().tolist() == [[first, j] for j in range(width)]


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("width", [1, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_lets_nan_and_inf_through(device, reduce, width, dtype):
    column = torch.tensor([1, nan, 3, nan, inf, -inf, -1], dtype=dtype, device=device)
    src = column.unsqueeze(1).repeat(1, width).requires_grad_()
    out = segment_reduce(src, torch.tensor([0, 4, 4, 7], device=device), reduce)
    wanted = torch.tensor([nan, 0.0, inf if reduce == "max" else -inf], dtype=dtype, device=device)
    torch.testing.assert_close(out, wanted.unsqueeze(1).repeat(1, width), equal_nan=True)
    out.sum().backward()
    assert src.grad[:, 0].nonzero().flatten().tolist() == [1, 4 if reduce == "max" else 5]


@pytest.mark.parametrize("reduce", REDUCES)
def test_hub(device, reduce):
    """Segments long enough to be cut: a power law of lengths with hubs at the start, in the middle and at the end."""
    lengths = torch.tensor([20000, 3, 0, 8191, 8192, 1, 100, 0, 12289, 5, 70000])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    for shape in ((), (3,), (65,)):
        src = torch.randn(int(ptr[-1]), *shape, device=device)
        check_op(segment_reduce, segment_reduce_reference, (src, ptr, reduce), factor=10)
    src = torch.zeros(int(ptr[-1]), device=device)
    src[19000] = nan
    out = segment_reduce(src, ptr, reduce)
    assert out.isnan().nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("reduce", REDUCES)
def test_same_bits_on_any_number_of_threads(reduce):
    ptr = torch.cat([torch.tensor([0]), torch.tensor([30000, 5, 2000, 9000, 0, 7]).cumsum(0)])
    for shape, dtype in (((), torch.float32), ((17,), torch.float32), ((3,), torch.bfloat16)):
        src = torch.randn(int(ptr[-1]), *shape).to(dtype)
        threads = torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results.append(segment_reduce(src, ptr, reduce))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("reduce", REDUCES)
def test_derivatives(device, reduce):
    ptr = torch.tensor([0, 2, 2, 5, 6], device=device)
    check_derivatives(lambda s: segment_reduce(s, ptr, reduce), (torch.randn(6, 3, device=device),))
    check_derivatives(lambda s: gather_csr(s * s, ptr, num_out=6), (torch.randn(4, 3, device=device),))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    ptr = torch.tensor([0, 2, 2, 5, 6], device=device)
    src = torch.randn(6, 3, device=device, requires_grad=grad)
    for flag in (False, True):
        torch.library.opcheck(torch.ops.geo.segment_sum.default, (src, ptr, None, None, flag))
        torch.library.opcheck(torch.ops.geo.segment_extreme.default, (src, ptr, None, flag))
    torch.library.opcheck(torch.ops.geo.gather_csr.default, (torch.randn(4, 3, requires_grad=grad), ptr, None, None, 6))
    torch.library.opcheck(torch.ops.geo.csr_from_index.default, (torch.tensor([1, 0, 1], device=device), 2))


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, reduce, dynamic):
    ptr = torch.tensor([0, 2, 2, 5, 6], device=device)
    src = torch.randn(6, 3, device=device)
    check_compile(lambda s, p: segment_reduce(torch.sin(s), p, reduce), (src, ptr), dynamic=dynamic)
    check_compile(lambda s, p: gather_csr(s, p, num_out=6), (src[:4], ptr), dynamic=dynamic)


@pytest.mark.slow
def test_inductor(device):
    ptr = torch.tensor([0, 2, 2, 5, 6], device=device)
    check_compile(lambda s, p: segment_reduce(torch.sin(s), p), (torch.randn(6, 3, device=device), ptr), "inductor")


@pytest.mark.parametrize(
    ("ptr", "sentence"),
    [
        ([1, 6], r"ptr\[0\] = 1 is out of range \[0, 0\]"),
        ([0, 5], r"ptr\[1\] = 5 is out of range \[6, 6\]"),
        ([0, 4, 3, 6], r"ptr\[2\] = 3 is out of range \[4, 6\]"),
        ([0, 9, 6], r"ptr\[1\] = 9 is out of range \[0, 6\]"),
        ([0, -1, 6], r"ptr\[1\] = -1 is out of range \[0, 6\]"),
        ([0], r"ptr\[0\] = 0 is out of range \[6, 6\]"),
    ],
)
def test_bad_ptr(ptr, sentence):
    ptr = torch.tensor(ptr)
    for reduce in REDUCES:
        with pytest.raises(IndexError, match=f"segment_reduce: {sentence}"):
            segment_reduce(torch.zeros(6, 2), ptr, reduce)
    with pytest.raises(IndexError, match=f"segment_reduce: {sentence}"):
        segment_reduce(torch.zeros(6, dtype=torch.int64), ptr)
    with pytest.raises(IndexError, match=f"gather_csr: {sentence}"):
        gather_csr(torch.zeros(len(ptr) - 1, 2), ptr, num_out=6)


def test_refusals():
    src, ptr = torch.zeros(6, 2), torch.tensor([0, 6])
    with pytest.raises(ValueError, match="reduce must be 'sum', 'mean', 'mul', 'min' or 'max', got 'prod'"):
        segment_reduce(src, ptr, "prod")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ptr must be int64"):
        segment_reduce(src, ptr.int())
    with pytest.raises(ValueError, match="ptr must be int64"):
        gather_csr(src[:1], ptr.float())
    with pytest.raises(ValueError, match="got a scalar"):
        segment_reduce(torch.tensor(1.0), ptr)
    with pytest.raises(ValueError, match=r"src must be floating for reduce='mean', got torch\.int64"):
        segment_reduce(src.long(), ptr, "mean")
    with pytest.raises(ValueError, match=r"got torch\.complex64"):
        segment_reduce(src.to(torch.complex64), ptr)
    with pytest.raises(ValueError, match=r"src must have ptr\.numel"):
        gather_csr(src, ptr)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.segment_reduce_reference there"):
        torch.func.grad(lambda s: segment_reduce(s, ptr).sum())(src)


def test_reference_under_torch_func():
    ptr = torch.tensor([0, 2, 2, 5, 6])
    src = torch.randn(6, 3)
    grad = torch.func.grad(lambda s: segment_reduce_reference(s * s, ptr).sum())(src)
    torch.testing.assert_close(grad, 2 * src)


# -- rows in any order, through a plan ---------------------------------------------------------------------------------
def test_plan_table(device):
    plan = SegmentPlan(torch.tensor([2, 0, 2, 1], device=device), 4)
    src = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    assert segment_reduce(src, plan).tolist() == [2.0, 4.0, 4.0, 0.0]
    assert segment_reduce(src, plan, "mean").tolist() == [2.0, 4.0, 2.0, 0.0]
    assert segment_reduce(src, plan, "mul").tolist() == [2.0, 4.0, 3.0, 1.0]
    assert segment_reduce(src, plan, "min").tolist() == [2.0, 4.0, 1.0, 0.0]
    assert segment_reduce(src, plan, "max").tolist() == [2.0, 4.0, 3.0, 0.0]
    assert torch.ops.geo.segment_extreme(src, plan.ptr, plan.perm, True)[1].tolist() == [1, 3, 2, 4]
    assert gather_csr(src, plan).tolist() == [3.0, 1.0, 3.0, 2.0]


@pytest.mark.parametrize("shape", [(), (2,), (3,), (4,), (7,), (8,), (16,), (17,), (5, 13), (0,), (150,)], ids=str)
@pytest.mark.parametrize("num_edges", [0, 1, 63, 400])
@pytest.mark.parametrize("reduce", REDUCES)
def test_plan_equals_reference_loop(device, reduce, num_edges, shape):
    for dtype in FLOATS:
        index = torch.randint(20, (num_edges,))
        src = (torch.randn(num_edges, *shape).sign() * (0.5 + torch.rand(num_edges, *shape))).to(dtype)
        for order in (index, index.sort().values):  # segments 20 to 22 are empty
            plan = SegmentPlan(order.to(device), 23)
            wanted, arg = by_loop(src, order, 23, reduce)
            assert_close(segment_reduce(src.to(device), plan, reduce), wanted)
            values = torch.randn(23, *shape).to(device, dtype)
            assert torch.equal(gather_csr(values, plan), values[plan.index])
            ptr, perm = csr_from_index(order.to(device), 23)
            if reduce in ("min", "max"):
                found = torch.ops.geo.segment_extreme(src.to(device), ptr, perm, reduce == "max")
                assert torch.equal(found[1].cpu(), arg)
                by_index = torch.ops.geo.scatter_extreme(src.to(device), order.to(device), 23, reduce == "max")
                assert all(torch.equal(a, b) for a, b in zip(by_index, found, strict=True))
                value = torch.ops.geo.segment_extreme_value(src.to(device), ptr, perm, reduce == "max")
                assert torch.equal(value, found[0])
            elif reduce == "mul":
                assert_close(torch.ops.geo.segment_prod(src.to(device), ptr, perm, None), wanted)
            else:
                mean = reduce == "mean"
                assert_close(torch.ops.geo.segment_sum(src.to(device), ptr, perm, None, mean), wanted)
                assert_close(torch.ops.geo.scatter_sum(src.to(device), order.to(device), 23, mean), wanted)
            assert torch.equal(torch.ops.geo.gather_csr(values, ptr, perm, None, num_edges), values[plan.index])


@pytest.mark.parametrize("reduce", REDUCES)
def test_plan_hub(device, reduce):
    """Hubs, cut into pieces or added in parts, among short and empty segments."""
    lengths = torch.tensor([20000, 3, 0, 8191, 8192, 1, 12289, 5])
    index = torch.repeat_interleave(torch.arange(8), lengths)[torch.randperm(int(lengths.sum()))]
    for shape in ((), (3,), (70,)):
        src = 1 + torch.rand(index.size(0), *shape) / 1e4 if reduce == "mul" else torch.rand(index.size(0), *shape)
        wanted, _ = by_loop(src, index, 8, reduce)
        assert_close(segment_reduce(src.to(device), SegmentPlan(index.to(device), 8), reduce), wanted)
        if reduce in ("sum", "mean"):
            assert_close(torch.ops.geo.scatter_sum(src.to(device), index.to(device), 8, reduce == "mean"), wanted)
        if reduce in ("min", "max"):
            order = csr_from_index(index.to(device), 8)
            found = torch.ops.geo.segment_extreme(src.to(device), *order, reduce == "max")
            by_index = torch.ops.geo.scatter_extreme(src.to(device), index.to(device), 8, reduce == "max")
            assert all(torch.equal(a, b) for a, b in zip(by_index, found, strict=True))
            assert torch.equal(torch.ops.geo.segment_extreme_value(src.to(device), *order, reduce == "max"), found[0])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extremes_of_special_values(device, dtype, width):
    """Ties, zeros of both signs, infinities and NaN: the first row of several, on every way."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 65504.0, 1e-7]).to(dtype)
    for share in (1, 0.02):  # few NaN, else nearly all segments have one
        pick = torch.randint(9, (3000, width))
        pick = torch.where((pick == 6) & (torch.rand(pick.shape) > share), 0, pick)
        src, index = special[pick].to(device), torch.randint(200, (3000,), device=device)
        for order in (index, index.sort().values):
            ptr, perm = csr_from_index(order, 201)
            for largest in (False, True):
                value, arg = torch.ops.geo.scatter_extreme(src, order, 201, largest)
                expected = segment_reduce_reference(src, SegmentPlan(order, 201), "max" if largest else "min")
                torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
                ways = [torch.ops.geo.segment_extreme(src, ptr, perm, largest)]
                if order is not index:
                    ways.append(torch.ops.geo.segment_extreme(src, ptr, None, largest))
                for found in ways:
                    assert torch.equal(found[1], arg)
                    assert torch.equal(found[0].isnan(), value.isnan())  # with no care for what else a NaN holds
                    bits = [torch.where(v.isnan(), 1, v).view(torch.uint8) for v in (found[0], value)]
                    assert torch.equal(*bits)
                alone = torch.ops.geo.segment_extreme_value(src, ptr, perm, largest)
                torch.testing.assert_close(alone, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("largest", [False, True])
def test_gradients_of_extremes_by_index(largest):
    index = torch.tensor([3, 0, 3, 1, 1, 3])
    src = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    ptr, perm = csr_from_index(index, 5)
    for call in (
        lambda s: torch.ops.geo.scatter_extreme(s, index, 5, largest)[0],
        lambda s: torch.ops.geo.segment_extreme_value(s, ptr, perm, largest),
    ):
        torch.autograd.gradcheck(call, src)
        torch.autograd.gradgradcheck(call, src)


def test_forward_mode_is_refused():
    ptr, src = torch.tensor([0, 2, 3]), torch.randn(3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(src, torch.ones(3))
        with pytest.raises(RuntimeError, match="segment_reduce has no forward-mode derivative"):
            segment_reduce(dual, ptr)
        assert segment_reduce(src, ptr).shape == (2,)
        tangent = torch.autograd.forward_ad.unpack_dual(segment_reduce_reference(dual, ptr)).tangent
        assert tangent.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int16, torch.int64, torch.bfloat16, torch.complex64])
def test_rows_of_any_type_by_index(device, dtype):
    for shape in ((), (1,), (2,), (3,), (5,), (7,), (9,), (4, 4), (33,), (0,)):
        src = torch.randint(0, 2, (5, *shape), device=device).to(dtype)
        for index in (torch.randint(5, (300,), device=device), torch.empty(0, dtype=torch.int64, device=device)):
            assert torch.equal(torch.ops.geo.gather_index(src, index), src[index])
    torch.library.opcheck(torch.ops.geo.gather_index.default, (src, index))


@pytest.mark.parametrize("mean", [False, True])
def test_plan_of_far_more_segments_than_rows(device, mean):
    index, src = torch.randint(70000, (500,)), torch.randn(500, 130)
    wanted, _ = by_loop(src, index, 70000, "mean" if mean else "sum")
    src, index = src.to(device), index.to(device)
    assert_close(segment_reduce(src, SegmentPlan(index, 70000), "mean" if mean else "sum"), wanted)
    assert_close(torch.ops.geo.scatter_sum(src, index, 70000, mean), wanted)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("reduce", ["sum", "mul", "min", "max"])
def test_plan_integers(device, reduce, dtype):
    index, src = torch.tensor([2, 0, 2, 1, 0, 2]), torch.randint(-5, 6, (6, 3), dtype=dtype)
    plan = SegmentPlan(index.to(device), 4)
    out = segment_reduce(src.to(device), plan, reduce)
    assert out.dtype == dtype
    assert out.tolist() == by_loop(src, index, 4, reduce)[0].tolist()
    assert torch.equal(gather_csr(out, plan), out[plan.index])


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("width", [1, 5, 16, 70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_plan_extreme_ties_and_nan(device, reduce, width, dtype):
    column = torch.tensor([3, 1, nan, 3, 1, 7, nan, 1, -inf, inf, -inf, inf], dtype=dtype)
    index = torch.tensor([1, 1, 0, 1, 1, 0, 0, 1, 3, 3, 3, 3])
    src = column.unsqueeze(1).repeat(1, width)
    wanted, arg = by_loop(src, index, 4, reduce)
    plan = SegmentPlan(index.to(device), 4)
    leaf = src.to(device).requires_grad_()
    out = segment_reduce(leaf, plan, reduce)
    assert_close(out, wanted)
    out.sum().backward()
    assert leaf.grad[:, -1].nonzero().flatten().tolist() == sorted(arg[[0, 1, 3], 0].tolist())


@pytest.mark.parametrize("reduce", REDUCES)
def test_plan_non_contiguous(device, reduce):
    index = torch.randint(6, (40,))
    src = torch.randn(5, 40, 3).transpose(0, 1)[:, ::2]
    wanted, _ = by_loop(src, index, 7, reduce)
    assert_close(
        segment_reduce(src.to(device), SegmentPlan(torch.stack([index, index], 1)[:, 0].to(device), 7), reduce), wanted
    )


@pytest.mark.parametrize("reduce", REDUCES)
def test_plan_derivatives(device, reduce):
    plan = SegmentPlan(torch.tensor([3, 0, 3, 1, 1, 3], device=device), 4)
    check_derivatives(lambda s: segment_reduce(s, plan, reduce), (torch.randn(6, 3, device=device),))
    check_derivatives(lambda s: gather_csr(s * s, plan), (torch.randn(4, 3, device=device),))


def test_gradient_of_a_product_with_zeros(device):
    src = torch.tensor([2.0, 0.0, 3.0, 0.0, 0.0, 5.0], device=device, requires_grad=True)
    segment_reduce(src, torch.tensor([0, 3, 6], device=device), "mul").sum().backward()
    assert src.grad.tolist() == [0.0, 6.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("grad", [False, True])
def test_plan_opcheck(device, grad):
    index = torch.tensor([3, 0, 3, 1, 1, 3], device=device)
    plan = SegmentPlan(index, 4)
    src = torch.randn(6, 3, device=device, requires_grad=grad)
    opcheck, ops = torch.library.opcheck, torch.ops.geo
    opcheck(ops.segment_prod.default, (src, plan.ptr, plan.perm, index))
    opcheck(ops.gather_csr.default, (src[:4].detach().requires_grad_(grad), plan.ptr, plan.perm, index, 6))
    for flag in (False, True):
        opcheck(ops.segment_sum.default, (src, plan.ptr, plan.perm, index, flag))
        opcheck(ops.segment_extreme.default, (src, plan.ptr, plan.perm, flag))
        opcheck(ops.segment_extreme_value.default, (src, plan.ptr, plan.perm, flag))
        opcheck(ops.scatter_sum.default, (src.detach(), index, 4, flag))
        opcheck(ops.scatter_extreme.default, (src, index, 4, flag))


@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_plan_compile(device, reduce, dynamic):
    plan = SegmentPlan(torch.tensor([3, 0, 3, 1, 1, 3], device=device), 4)
    check_compile(
        lambda s: segment_reduce(torch.sin(s), plan, reduce), (torch.randn(6, 3, device=device),), dynamic=dynamic
    )


@pytest.mark.parametrize("reduce", REDUCES)
def test_plan_same_bits_on_any_number_of_threads(reduce):
    lengths = torch.tensor([30000, 5, 2000, 9000, 0, 7])
    index = torch.repeat_interleave(torch.arange(6), lengths)[torch.randperm(int(lengths.sum()))]
    threads = torch.get_num_threads()
    for shape, dtype in (((), torch.float32), ((17,), torch.float32), ((40,), torch.float32), ((3,), torch.bfloat16)):
        src = torch.randn(index.size(0), *shape).to(dtype)
        try:
            results = []
            for count in (1, 2) * 10:
                torch.set_num_threads(count)
                plan = SegmentPlan(index, 6)
                results.append(
                    [
                        segment_reduce(src, plan, reduce),
                        torch.ops.geo.scatter_sum(src, index, 6, True),
                        *torch.ops.geo.scatter_extreme(src, index, 6, True),
                        plan.perm,
                    ]
                )
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("width", [1, 4, 40])
def test_bad_perm_and_index(width):
    src, ptr = torch.zeros(6, width), torch.tensor([0, 2, 6])
    perm, index = torch.tensor([1, 0, 2, 3, 4, 5]), torch.tensor([1, 0, 1, 1, 1, 1])
    ops = torch.ops.geo
    for value in (6, -1, 2**62):
        bad = perm.clone()
        bad[3] = value
        for call in (
            lambda p=bad: ops.segment_sum(src, ptr, p, None, False),
            lambda p=bad: ops.segment_prod(src, ptr, p, None),
            lambda p=bad: ops.segment_extreme(src, ptr, p, True),
            lambda p=bad: ops.gather_csr(src[:2], ptr, p, None, 6),
        ):
            with pytest.raises((IndexError, RuntimeError), match=rf"edge_perm\[3\] = {value} is out of range \[0, 5\]"):
                call()
        bad = index.clone()
        bad[3] = value
        sentence = rf"dst_index\[3\] = {value} is out of range \[0, 1\]"
        if width < 40:  # wide rows are read through perm alone
            with pytest.raises((IndexError, RuntimeError), match=sentence):
                ops.segment_sum(src, ptr, perm, bad, False)
        with pytest.raises((IndexError, RuntimeError), match=sentence):
            ops.gather_csr(src[:2], ptr, perm, bad, 6)
        for order in (bad, torch.tensor([0, 0, 0, value])):
            with pytest.raises((IndexError, RuntimeError), match=rf"scatter_sum: index\[3\] = {value} is out of range"):
                ops.scatter_sum(src[: order.size(0)], order, 2, False)
            with pytest.raises((IndexError, RuntimeError), match=rf"index\[3\] = {value} is out of range"):
                ops.scatter_extreme(src[: order.size(0)], order, 2, False)
    plan = SegmentPlan(index, 2)
    plan.perm = torch.tensor([1, 9, 2, 3, 4, 5])
    with pytest.raises(IndexError, match=r"segment_reduce: edge_perm\[1\] = 9 is out of range \[0, 5\]"):
        segment_reduce(src.double(), plan, "max")  # which narrow rows of 32 bits are not read through
    with pytest.raises(ValueError, match="src has 5 rows, the plan was built for 6"):
        segment_reduce(src[:5], plan)
