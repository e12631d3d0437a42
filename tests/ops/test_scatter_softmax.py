"""Softmax and log-sum-exp by index of narrow rows, which are taken in their order: no plan, no sort."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import geo.ops as ops
from geo import _native
from geo.ops import SegmentPlan
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ["softmax", "log_softmax", "logsumexp"]
ORDERS = ["sorted", "shuffled", "plan"]
nan, inf = float("nan"), float("inf")
scatter = torch.ops.geo


def in_order(index: Tensor, order: str) -> Tensor:
    return index.sort().values if order == "sorted" else index[torch.randperm(index.numel())]


def ours(name: str, src: Tensor, index: Tensor, size: int, order: str) -> Tensor:
    if order == "plan":
        return getattr(ops, f"segment_{name}")(src, SegmentPlan(index, size))
    if name == "logsumexp":
        return scatter.scatter_logsumexp(src, index, size).to(src.dtype)
    return scatter.scatter_softmax(src, index, size, name == "log_softmax")


def loop(name: str, src: Tensor, index: Tensor, size: int) -> Tensor:
    """The same in float64, a segment at a time."""
    wide = src.double()
    out = wide.new_zeros(size, *src.shape[1:]) if name == "logsumexp" else torch.zeros_like(wide)
    for i in index.unique().tolist():
        rows = index == i
        if name == "logsumexp":
            out[i] = torch.logsumexp(wide[rows], 0)
        else:
            out[rows] = getattr(torch, name)(wide[rows], 0)
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_loop(device, name, order):
    """Of single columns as of more, which the ops take as well; in several parts from 70000 rows on."""
    for rows, size in ((0, 3), (1, 1), (2, 5), (63, 7), (1000, 300), (70000, 11)):
        index = in_order(torch.randint(size, (rows,)), order).to(device)
        for dtype in FLOATS:
            for shape in ((), (1,), (3,), (0,), (2, 150)):
                if rows * math.prod(shape) <= 70000:
                    src = (3 * torch.randn(rows, *shape)).to(device, dtype)
                    out = ours(name, src, index, size, order)
                    assert out.dtype == dtype
                    factor = 10 if rows == 70000 else 1  # sums of 6000 terms
                    assert_close(out, loop(name, src, index, size), factor)


# column of one segment; what no sum of plain exponentials stands for among them
COLUMNS = [
    [0.0, 0.0],
    [9984.0, -9984.0, 9984.0],
    [-9984.0, -9984.0],
    [-60.0, -61.0],
    [60.0, 61.0],
    [2.0],
    [-inf, 1.0],
    [-inf, -inf],
    [-inf],
    [inf, 1.0],
    [inf, -inf],
    [nan, 1.0],
    [1.0, nan, 2.0],
    [inf, nan],
    [nan, -inf],
    [],
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_no_number_stands_for(device, name, dtype, order):
    """Each column beside others, and each alone: one out of the range of exponentials changes how all are summed."""
    for columns in (COLUMNS, *([[0.5, 1.0], column, [0.25]] for column in COLUMNS)):
        index = torch.repeat_interleave(torch.arange(len(columns)), torch.tensor([len(c) for c in columns]))
        src = torch.tensor([x for column in columns for x in column], dtype=dtype)
        perm = torch.arange(index.numel()) if order == "sorted" else torch.randperm(index.numel())
        src, index = src[perm].to(device), index[perm].to(device)
        wanted = loop(name, src, index, len(columns))
        torch.testing.assert_close(ours(name, src, index, len(columns), order), wanted.to(dtype), equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [-300.0, -90.0, -40.0, -20.0, 0.0, 20.0, 55.0, 90.0, 300.0])
def test_digits(device, dtype, shift, order):
    """Whatever is added to all rows: as many digits as the sum of exponentials below the maximum has."""
    index = in_order(torch.arange(4000) % 500, order).to(device)
    src = (torch.randn(4000, dtype=torch.float64) + shift).to(device, dtype)
    eps = torch.finfo(dtype).eps
    wanted = loop("softmax", src, index, 500)
    error = (ours("softmax", src, index, 500, order).double() - wanted).abs() / wanted
    assert error.max() < 8 * eps
    wanted = loop("logsumexp", src, index, 500)
    error = (ours("logsumexp", src, index, 500, order).double() - wanted).abs() / wanted.abs().clamp(min=1)
    assert error.max() < 4 * eps


def test_shares_of_one_and_of_half_are_exact(device):
    index = torch.tensor([3, 0, 2, 2, 4, 4], device=device)
    src = torch.tensor([0.3, -7.1, 5.2, 5.2, -inf, 0.7], device=device)
    assert ops.scatter_softmax(src, index).tolist() == [1.0, 1.0, 0.5, 0.5, 0.0, 1.0]
    assert ops.scatter_log_softmax(src, index).tolist()[:2] == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_single_rows_are_exact_in_several_parts(device, shape):
    """Each in the table of one part alone, beside segments that all parts add to."""
    singles, rows = 2000, 200000
    index = torch.cat([torch.arange(singles), singles + torch.randint(50, (rows,))])[torch.randperm(singles + rows)]
    index, src = index.to(device), torch.randn(singles + rows, *shape, device=device)
    alone = index < singles
    out = scatter.scatter_logsumexp(src, index, singles + 50)
    assert torch.equal(out[index[alone]], src[alone])
    wanted = torch.stack([torch.logsumexp(src[index == i].double(), 0) for i in range(singles, singles + 50)])
    assert_close(out[singles:], wanted, factor=10)  # sums of 4000 terms


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_any_number_of_threads(name):
    index = torch.randint(700, (200000,))
    for dtype in (torch.float32, torch.bfloat16):
        for shift in (0, 500):  # without maxima and with them
            src = (torch.randn(200000) + shift).to(dtype).requires_grad_()
            threads, results = torch.get_num_threads(), []
            try:
                for count in (1, 2, 3, 2, 2):
                    torch.set_num_threads(count)
                    out = ours(name, src, index, 700, "shuffled")
                    results.append((out, *torch.autograd.grad(out.float().square().sum(), src)))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_reference(device, name, order):
    reference = getattr(ops, f"segment_{name}_reference")
    for shape in ((), (1,), (3,)):
        index = in_order(torch.randint(40, (1000,)), order).to(device)
        plan = SegmentPlan(index, 40)
        for dtype in FLOATS:
            src = torch.randn(1000, *shape).to(device, dtype)
            check_op(lambda s, i=index: ours(name, s, i, 40, order), lambda s, p=plan: reference(s, p), (src,))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", NAMES)
def test_derivatives(device, name, order):
    index = in_order(torch.tensor([3, 0, 2, 2, 0, 2, 3]), order).to(device)
    for shape in ((), (2,)):
        check_derivatives(lambda s: ours(name, s, index, 4, order), (torch.randn(7, *shape, device=device),))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, grad, dtype):
    wide = torch.randn(4, device=device).requires_grad_(grad)
    for values in ([3, 0, 2, 2, 0, 2, 3], [0, 0, 2, 2, 2, 3, 3]):
        index = torch.tensor(values, device=device)
        src = torch.randn(7, device=device).to(dtype).requires_grad_(grad)
        for log in (False, True):
            torch.library.opcheck(scatter.scatter_softmax.default, (src, index, 4, log))
            torch.library.opcheck(scatter.scatter_softmax_grad.default, (src, src.detach().square(), index, 4, log))
        torch.library.opcheck(scatter.scatter_logsumexp.default, (src, index, 4))
        torch.library.opcheck(scatter.scatter_logsumexp_grad.default, (wide, src, wide.detach().exp(), index))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, name, dynamic):
    index, src = torch.tensor([3, 0, 2, 2, 0, 3], device=device), torch.randn(6, device=device)
    function = getattr(ops, f"scatter_{name}")
    check_compile(lambda s, i: function(torch.sin(s), i, dim_size=4), (src, index), dynamic=dynamic)


@pytest.mark.parametrize("value", [-1, 4, 2**62])
@pytest.mark.parametrize("name", NAMES)
def test_bad_index(device, name, value):
    """The first bad entry is named, and nothing is read or written beside the tables."""
    for position in (0, 5, 700, 999):
        index = torch.randint(4, (1000,))
        index[position] = value
        index[position + 1 :: 7] = -9
        sentence = rf"scatter_{name}: index\[{position}\] = {value} is out of range \[0, 3\]"
        with pytest.raises(IndexError, match=sentence):
            getattr(ops, f"scatter_{name}")(torch.zeros(1000, device=device), index.to(device), dim_size=4)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize("value", [-1, 4])
def test_bad_index_of_a_plan(value):
    plan = SegmentPlan(torch.tensor([3, 0, 2, 2, 0, 2, 3]), 4)
    plan.index[5] = value
    src, level = torch.zeros(7), torch.zeros(4)
    order = (plan.ptr, plan.perm, plan.index)
    calls = [
        lambda: scatter.segment_softmax(src, *order, False),
        lambda: scatter.segment_softmax_grad(src, src, *order, False),
        lambda: scatter.segment_logsumexp(src, *order),
        lambda: scatter.segment_logsumexp_grad(level, src, level, *order),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"\[5\] = {value} is out of range \[0, 3\]"):
            call()


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_kernels_refuse_what_does_not_fit():
    src, index, level = torch.zeros(3), torch.tensor([1, 0, 1]), torch.zeros(2)
    with pytest.raises(RuntimeError, match="index must have one entry per row of src"):
        scatter.scatter_softmax(src, index[:2], 2, False)
    with pytest.raises(RuntimeError, match="index must be int64"):
        scatter.scatter_logsumexp(src, index.int(), 2)
    with pytest.raises(RuntimeError, match="size must not be negative"):
        scatter.scatter_logsumexp(src, index, -1)
    with pytest.raises(RuntimeError, match="grad must have 3 rows"):
        scatter.scatter_softmax_grad(src[:2], src, index, 2, False)
    with pytest.raises(RuntimeError, match="grad must be Float, got Double"):
        scatter.scatter_logsumexp_grad(level.double(), src, level, index)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize("level", _native.SIMD_LEVELS)
def test_every_simd_level(level):
    if level == _native.simd_level():
        pytest.skip(f"{level} is what the other tests run")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-k",
        "loop or stands or digits or exact or gradients",
        __file__,
    ]
    done = subprocess.run(command, env={**os.environ, "GEO_SIMD": level}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
