from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import chain, pairwise

import pytest
import torch
from torch import Tensor

import geo.ops as ops
from geo import _native
from geo.ops import SegmentPlan
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FUNCTIONS = ["segment_softmax", "segment_log_softmax", "segment_logsumexp", "segment_std"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (2,), (3,), (8,), (16,), (64,), (5, 13), (0,), (130,)]
LENGTHS = [3, 0, 1, 20, 16, 64, 2, 0, 1, 33, 300]  # empty, single, and around the width of a vector
HUBS = [20000, 3, 0, 8191, 8192, 1, 100, 0, 12289]
nan, inf = float("nan"), float("inf")


def op(name: str):
    return getattr(ops, name)


def reference(name: str):
    return getattr(ops, f"{name}_reference")


def segments(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def shuffled(lengths: list[int], device: torch.device | str = "cpu") -> SegmentPlan:
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return SegmentPlan(index[torch.randperm(index.numel())].to(device), len(lengths))


def loop(name: str, src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    """The same in float64, a segment at a time."""
    plan = isinstance(ptr, SegmentPlan)
    bounds = (ptr.ptr if plan else ptr).tolist()
    order = ptr.perm if plan and ptr.perm is not None else torch.arange(src.size(0), device=src.device)
    wide = src.double()
    out = torch.zeros_like(wide) if "softmax" in name else wide.new_zeros(len(bounds) - 1, *src.shape[1:])
    for i, (begin, end) in enumerate(pairwise(bounds)):
        rows = order[begin:end]
        if name == "segment_softmax":
            out[rows] = torch.softmax(wide[rows], 0)
        elif name == "segment_log_softmax":
            out[rows] = torch.log_softmax(wide[rows], 0)
        elif name == "segment_logsumexp" and begin < end:
            out[i] = torch.logsumexp(wide[rows], 0)
        elif name == "segment_std" and end - begin > 1 and wide.numel():
            out[i] = torch.std(wide[rows], 0)
    return out


LARGE = 9984.0  # about 1e4, and a number of every dtype
# column, softmax, log-sum-exp and std of one segment
TABLE = [
    ([0.0, 0.0], [0.5, 0.5], math.log(2), 0.0),
    ([LARGE, -LARGE, LARGE], [0.5, 0.0, 0.5], LARGE + math.log(2), 2 * LARGE / math.sqrt(3)),
    ([-LARGE, -LARGE], [0.5, 0.5], -LARGE + math.log(2), 0.0),
    ([2.0], [1.0], 2.0, 0.0),
    ([-inf, 1.0], [0.0, 1.0], 1.0, nan),
    ([-inf, -inf], [nan, nan], -inf, nan),
    ([inf, 1.0], [nan, nan], inf, nan),
    ([inf, -inf], [nan, nan], inf, nan),
    ([nan, 1.0], [nan, nan], nan, nan),
    ([1.0, nan, 2.0], [nan, nan, nan], nan, nan),
    ([inf, nan], [nan, nan], nan, nan),
    ([nan, -inf], [nan, nan], nan, nan),
    ([], [], 0.0, 0.0),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (2,), (3,), (70,)], ids=str)
def test_table(device, dtype, shape):
    """Also where every segment has 40 rows, or 9000, of which all but the first few are -inf and weigh nothing."""
    for tail in (0, 40, 9000):
        table = [row for row in TABLE if tail == 0 or len(row[0]) > 0]
        columns = [row[0] + [-inf] * tail for row in table]
        src = torch.tensor([*chain(*columns)], dtype=dtype, device=device).view(-1, *[1] * len(shape))
        src = src.expand(-1, *shape).contiguous()
        ptr = segments([len(column) for column in columns], device)
        shares = [row[1] + [0 * row[1][0]] * tail if row[1] else [] for row in table]
        share = torch.tensor([*chain(*shares)], dtype=torch.float64, device=device)
        total = torch.tensor([row[2] for row in table], dtype=torch.float64, device=device)
        softmax, log = ops.segment_softmax(src, ptr), ops.segment_log_softmax(src, ptr)
        logsumexp, std = ops.segment_logsumexp(src, ptr), ops.segment_std(src, ptr)
        assert softmax.dtype == log.dtype == logsumexp.dtype == std.dtype == dtype
        column = (slice(None), *[-1] * len(shape))
        torch.testing.assert_close(softmax[column], share.to(dtype), equal_nan=True)
        torch.testing.assert_close(logsumexp[column], total.to(dtype), equal_nan=True)
        rows = torch.repeat_interleave(torch.arange(len(table), device=device), ptr.diff())
        wide = src[column].double() - total[rows]
        wide[share.isnan()] = nan
        torch.testing.assert_close(log[column], wide.to(dtype), equal_nan=True)
        if tail == 0:
            torch.testing.assert_close(
                std[column], torch.tensor([row[3] for row in table], device=device).to(dtype), equal_nan=True
            )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_loop(device, name, shape):
    for dtype in FLOATS:
        src = (3 * torch.randn(sum(LENGTHS), *shape)).to(device, dtype)
        for ptr in (segments(LENGTHS, device), shuffled(LENGTHS, device)):
            out = op(name)(src, ptr)
            assert out.dtype == dtype
            assert_close(out, loop(name, src, ptr))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_reference(device, name, shape):
    for dtype in FLOATS:
        src = torch.randn(sum(LENGTHS), *shape).to(device, dtype)
        for ptr in (segments(LENGTHS, device), shuffled(LENGTHS, device)):
            check_op(op(name), reference(name), (src, ptr))


def test_biased_std_equals_reference(device):
    src, ptr = torch.randn(sum(LENGTHS), 3, device=device), segments(LENGTHS, device)
    check_op(ops.segment_std, ops.segment_std_reference, (src, ptr, False))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hub(device, name):
    """Segments long enough to be cut into pieces."""
    for shape in ((), (2,), (3,), (65,)):
        src = torch.randn(sum(HUBS), *shape, device=device)
        for ptr in (segments(HUBS, device), shuffled(HUBS, device)):
            assert_close(op(name)(src, ptr), loop(name, src, ptr))
            check_op(op(name), reference(name), (src, ptr), factor=10)  # sums of 20000 terms


def test_no_rows_and_no_segments(device):
    for count in (1, 4):
        ptr = torch.zeros(count, dtype=torch.int64, device=device)
        src = torch.zeros(0, 3, device=device)
        assert ops.segment_softmax(src, ptr).shape == ops.segment_log_softmax(src, ptr).shape == (0, 3)
        assert (
            ops.segment_logsumexp(src, ptr).tolist() == ops.segment_std(src, ptr).tolist() == [[0.0] * 3] * (count - 1)
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_non_contiguous(device, name):
    src = torch.randn(5, sum(LENGTHS), 3, device=device).transpose(0, 1)[:, ::2]
    ptr = segments(LENGTHS, device)
    check_op(op(name), reference(name), (src, ptr))
    strided = torch.stack([ptr, ptr], 1)[:, 0]
    assert torch.equal(op(name)(src, strided), op(name)(src.contiguous(), ptr))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exp_and_log_are_accurate(device, dtype):
    """Against float64's (and, there, torch's own), in units in the last place: 2, of subnormal results too.

    The softmax of (x, 0) is exp(x) where x < -38: then 1 + exp(x) is 1. The log-sum-exp of n zeros is log n.
    """
    low = -103.0 if dtype == torch.float32 else -744.0
    x = torch.linspace(low, -38.0, 50000, dtype=torch.float64).to(device, dtype)
    ptr = torch.arange(0, 2 * x.numel() + 1, 2, device=device)
    ours = ops.segment_softmax(torch.stack([x, torch.zeros_like(x)], 1).flatten(), ptr)[::2]
    wanted = x.double().exp()
    unit = torch.finfo(dtype).eps * wanted.clamp(min=torch.finfo(dtype).tiny)
    assert ((ours.double() - wanted).abs() / unit).max() < 2
    lengths = torch.arange(1, 700)
    ours = ops.segment_logsumexp(
        torch.zeros(int(lengths.sum()), dtype=dtype, device=device), segments(lengths.tolist()).to(device)
    )
    wanted = lengths.double().log().to(device)
    assert ours[0] == 0
    assert ((ours.double() - wanted).abs() / (torch.finfo(dtype).eps * wanted.clamp(min=0.5))).max() < 2


SINGLE = ["ptr", "perm", "plan", "sorted index", "index"]


def per_order(order: str, src: Tensor, index: Tensor, size: int):
    """The rows as ``order`` asks for them, the segment of each, and both ops on them, log-sum-exp as it is inside."""
    geo, perm = torch.ops.geo, torch.randperm(index.numel(), device=index.device)
    if order in ("ptr", "sorted index"):
        perm = torch.arange(index.numel(), device=index.device)
    src, index = src[perm].detach().requires_grad_(), index[perm]
    if "index" in order:
        args = (index, size)
        return src, index, lambda s, log: geo.scatter_softmax(s, *args, log), lambda s: geo.scatter_logsumexp(s, *args)
    plan = SegmentPlan(index, size)
    args = (plan.ptr, None if order == "ptr" else plan.perm, plan.index if order == "plan" else None)
    return src, index, lambda s, log: geo.segment_softmax(s, *args, log), lambda s: geo.segment_logsumexp(s, *args)


@pytest.mark.parametrize("order", SINGLE)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (8,), (16,), (64,), (70,)], ids=str)
def test_single_rows_are_exact(device, shape, order):
    """Alone in its segment a row is its log-sum-exp bit for bit, its softmax 1 and its share of a gradient all of it.

    Of all sizes, among segments of no and of more rows; where every row is as large also with maxima.
    """
    for lengths in ([1] * 300, [1, 0, 1, 2, 1, 1, 40, 1] * 40):
        length = torch.tensor(lengths)
        index = torch.repeat_interleave(torch.arange(len(lengths)), length).to(device)
        single = (length == 1).to(device)
        for dtype in FLOATS:
            for scale in (1e-5, 1e-2, 1.0, 20.0, 3000.0):
                rows = (scale * torch.randn(index.numel(), *shape)).to(device, dtype)
                rows[0] = -0.0
                src, segment, softmax, logsumexp = per_order(order, rows, index, len(lengths))
                alone = single[segment]
                out = logsumexp(src)
                assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                bits = torch.int64 if dtype == torch.float64 else torch.int32
                wanted = src[alone].detach().to(out.dtype)
                assert torch.equal(out[segment[alone]].detach().view(bits), wanted.view(bits))
                assert torch.all(softmax(src, False)[alone] == 1)
                assert torch.all(softmax(src, True)[alone] == 0)
                g = torch.randn(out.shape, device=device).to(out.dtype)
                (grad,) = torch.autograd.grad(out, src, g)
                assert torch.equal(grad[alone], g[segment[alone]].to(dtype))


@pytest.mark.parametrize("order", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (2,), (3,), (64,)], ids=str)
def test_logsumexp_is_accurate(device, shape, dtype, order):
    """To 4 eps of max(1, |result|), also about 0 and where one row outweighs the others by far."""
    held = (torch.arange(9) <= torch.arange(400).view(-1, 1) % 9).to(device)  # 1 to 9 rows each
    index = held.nonzero()[:, 0]
    count = (index % 9 + 1).double().view(-1, *[1] * len(shape))
    for spread in (1e-6, 1e-3, 1.0, 30.0, 500.0):
        rows = spread * torch.randn(index.numel(), *shape, dtype=torch.float64, device=device)
        rows = (rows - count.log()).to(dtype)
        src, _, _, logsumexp = per_order(order, rows, index, 400)
        filled = rows.new_full((*held.shape, *shape), -inf, dtype=torch.float64)
        filled[held] = rows.double()
        wanted = filled.logsumexp(1)
        error = (logsumexp(src).double() - wanted).abs() / wanted.abs().clamp(min=1)
        assert error.max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits_on_any_number_of_threads_and_every_run(name):
    lengths = [30000, 5, 2000, 9000, 0, 7]
    for shape, dtype in (((), torch.float32), ((17,), torch.float32), ((3,), torch.bfloat16), ((64,), torch.float32)):
        for ptr in (segments(lengths), shuffled(lengths)):
            src = torch.randn(sum(lengths), *shape).to(dtype).requires_grad_()
            threads = torch.get_num_threads()
            try:
                results = []
                for count in [1, 2, 3] + ([2] * 8 if shape == () else []):
                    torch.set_num_threads(count)
                    out = op(name)(src, ptr)
                    results.append((out, *torch.autograd.grad(out.square().sum(), src)))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(device, name):
    src = torch.randn(7, 3, device=device)
    ptr = torch.tensor([0, 2, 2, 5, 7], device=device)
    plan = SegmentPlan(torch.tensor([3, 0, 2, 2, 0, 2, 3], device=device), 4)
    for order in (ptr, plan):
        check_derivatives(lambda s, order=order: op(name)(s, order), (src,))


def test_gradient_where_a_segment_is_flat_or_masked(device):
    """0 through a standard deviation of 0, and of what is -inf beside numbers."""
    src = torch.tensor([2.0, 2.0, 5.0, -inf, 1.0], device=device, requires_grad=True)
    ptr = torch.tensor([0, 2, 3, 5], device=device)
    (grad,) = torch.autograd.grad(ops.segment_std(src, ptr)[:2].sum(), src)
    assert grad[:3].tolist() == [0.0] * 3
    (grad,) = torch.autograd.grad(ops.segment_logsumexp(src, ptr).sum(), src)
    assert grad.tolist() == [0.5, 0.5, 1.0, 0.0, 1.0]
    (grad,) = torch.autograd.grad(ops.segment_softmax(src, ptr).square().sum(), src)
    assert grad[3:].tolist() == [0.0, 0.0]
    masked = torch.full((3, 2), -inf, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.segment_logsumexp(masked, torch.tensor([0, 3], device=device)).sum(), masked)
    assert grad.tolist() == [[0.0] * 2] * 3


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, grad, dtype):
    plan = SegmentPlan(torch.tensor([3, 0, 2, 2, 0, 2, 3], device=device), 4)
    src = torch.randn(7, 3, device=device).to(dtype).requires_grad_(grad)
    wide = torch.randn(4, 3, device=device).requires_grad_(grad)
    geo = torch.ops.geo
    for order in ((plan.ptr, None, None), (plan.ptr, plan.perm, plan.index)):
        for flag in (False, True):
            torch.library.opcheck(geo.segment_softmax.default, (src, *order, flag))
            torch.library.opcheck(geo.segment_softmax_grad.default, (src, src.detach().square(), *order, flag))
            torch.library.opcheck(geo.segment_std.default, (src, *order, flag))
        torch.library.opcheck(geo.segment_logsumexp.default, (src, *order))
        torch.library.opcheck(geo.segment_logsumexp_grad.default, (wide, src, wide.detach().exp(), *order))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, name, dynamic):
    ptr = torch.tensor([0, 2, 2, 5, 6], device=device)
    src = torch.randn(6, 3, device=device)
    check_compile(lambda s, p: op(name)(torch.sin(s), p), (src, ptr), dynamic=dynamic)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func(name):
    ptr, src = torch.tensor([0, 2, 2, 5, 6]), torch.randn(6, 3)
    with pytest.raises(RuntimeError, match=rf"use geo\.ops\.{name}_reference there"):
        torch.func.grad(lambda s: op(name)(s, ptr).square().sum())(src)
    grad = torch.func.grad(lambda s: reference(name)(s, ptr).square().sum())(src)
    leaf = src.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(op(name)(leaf, ptr).square().sum(), leaf)
    assert_close(grad, wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
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
def test_bad_ptr(device, name, ptr, sentence):
    with pytest.raises(IndexError, match=f"{name}: {sentence}"):
        op(name)(torch.zeros(6, 2, device=device), torch.tensor(ptr, device=device))


@pytest.mark.parametrize("value", [-1, 7])
def test_bad_perm(value):
    plan = SegmentPlan(torch.tensor([3, 0, 2, 2, 0, 2, 3]), 4)
    assert plan.perm is not None
    plan.perm[5] = value
    for name in FUNCTIONS:
        with pytest.raises(IndexError, match=rf"{name}: edge_perm\[5\] = {value} is out of range \[0, 6\]"):
            op(name)(torch.zeros(7, 2), plan)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_refusals(name):
    src, ptr = torch.zeros(6, 2), torch.tensor([0, 6])
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"{name}: src must be floating.*, got {dtype}"):
            op(name)(src.to(dtype), ptr)
    for bad in (ptr.int(), ptr.float(), ptr[:0], ptr.view(1, 2)):
        with pytest.raises(ValueError, match=rf"{name}: ptr must be int64 \[N \+ 1\]"):
            op(name)(src, bad)
    with pytest.raises(ValueError, match=f"{name}: src has 6 rows, the plan was built for 5"):
        op(name)(src, SegmentPlan(torch.zeros(5, dtype=torch.int64)))
    with pytest.raises(ValueError, match="got a scalar"):
        op(name)(torch.tensor(1.0), ptr)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_kernels_refuse_gradients_that_do_not_fit():
    ptr, x, level = torch.tensor([0, 6]), torch.zeros(6, 2), torch.zeros(1, 2)
    geo = torch.ops.geo
    with pytest.raises(RuntimeError, match="grad must be Float, got Double"):
        geo.segment_softmax_grad(x.double(), x, ptr, None, None, False)
    with pytest.raises(RuntimeError, match="grad must have 6 rows"):
        geo.segment_softmax_grad(x[:5], x, ptr, None, None, False)
    with pytest.raises(RuntimeError, match="out must have 1 rows"):
        geo.segment_logsumexp_grad(level, x, level[:, :1], ptr, None, None)
    with pytest.raises(RuntimeError, match="out must be Float, got BFloat16"):
        geo.segment_logsumexp_grad(level, x.bfloat16(), level.bfloat16(), ptr, None, None)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize("level", _native.SIMD_LEVELS)
def test_every_simd_level(level):
    """Sums in vectors of each width: these tests in a process of their own; test_native.py runs the tables so."""
    if level == _native.simd_level():
        pytest.skip(f"{level} is what the other tests run")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "equals_loop or accurate or exact or hub", __file__]
    done = subprocess.run(command, env={**os.environ, "GEO_SIMD": level}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
