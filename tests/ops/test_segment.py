from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo.ops import SegmentPlan, gather_csr, segment_reduce, segment_reduce_reference
from geo.testing import check_compile, check_derivatives, check_op

REDUCES = ["sum", "mean", "min", "max"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
nan, inf = float("nan"), float("inf")


def random_ptr(num_segments: int, num_edges: int, device: torch.device | str = "cpu") -> Tensor:
    """Segments of random length, some of them empty."""
    if num_segments == 0:
        return torch.zeros(1, dtype=torch.int64, device=device)
    cuts = torch.randint(num_edges + 1, (num_segments - 1,)).sort().values
    return torch.cat([torch.tensor([0]), cuts, torch.tensor([num_edges])]).to(device)


# the values of three segments, the middle one empty, by reduce
TABLE = {
    "sum": [[11.0, -3.0], [0.0, 0.0], [7.0, 5.0]],
    "mean": [[5.5, -1.5], [0.0, 0.0], [7.0, 5.0]],
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


def test_unsorted_through_a_plan():
    index = torch.tensor([2, 0, 2, 1])
    plan = SegmentPlan(index, 3)
    src = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert segment_reduce(src[plan.perm], plan.ptr).tolist() == [2.0, 4.0, 4.0]
