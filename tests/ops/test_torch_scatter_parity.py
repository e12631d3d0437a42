"""The same calls give what torch_scatter gives, where it is installed (extra ``scatter``)."""

from __future__ import annotations

import inspect

import pytest
import torch

import geo.ops
from geo.testing import assert_close

torch_scatter = pytest.importorskip("torch_scatter", reason="torch_scatter is not installed (extra: scatter)")

REDUCES = ["sum", "add", "mul", "mean", "min", "max"]
SORTED = [reduce for reduce in REDUCES if reduce != "mul"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
# (shape of src, shape of index, dim): all ways to broadcast
CALLS = [
    ((50,), (50,), 0),
    ((50,), (50,), -1),
    ((50, 3), (50,), 0),
    ((3, 50), (50,), -1),
    ((4, 50, 3), (50,), 1),
    ((4, 50, 3), (50,), -2),
    ((4, 50, 3), (4, 50), 1),
    ((4, 50, 3), (4, 50, 1), 1),
    ((4, 50, 3), (4, 50, 3), 1),
    ((4, 50, 3), (1, 50, 1), -2),
    ((50, 4, 3), (50, 1, 3), 0),
    ((1, 4), (1, 4), 0),
    ((4, 2, 50), (4, 1, 50), -1),
    ((0, 3), (0,), 0),
    ((3, 0), (0,), -1),
]
NAMES = [name for name in torch_scatter.__all__ if name not in ("torch_scatter", "__version__")]


def values(shape, dtype):
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(1 if dtype == torch.uint8 else -4, 5, shape).to(dtype)  # theirs takes the least uint8 for none


def both(name, *args, factor=1.0, grad=True, positions=True, **kwargs):
    """Call the two functions on copies (``out=`` is overwritten) and compare results, ``out`` and gradients."""
    answers = []
    for package in (geo.ops, torch_scatter):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        named = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        src = copies[0]
        if grad and src.dtype in (torch.float32, torch.float64):
            src.requires_grad_()
        result = getattr(package, name)(*copies, **named)
        result = list(result[: 1 + positions]) if isinstance(result, tuple) else [result]
        if src.requires_grad and result[0].requires_grad:
            weight = torch.arange(1.0, result[0].numel() + 1, dtype=src.dtype).view(result[0].shape)
            (result[0] * weight.sin()).sum().backward()
            result.append(src.grad)
        if "out" in named:
            result.append(named["out"])
        answers.append([t.detach() for t in result])
    ours, theirs = answers
    assert [(t.dtype, t.shape, t.is_contiguous()) for t in ours] == [
        (t.dtype, t.shape, t.is_contiguous()) for t in theirs
    ]
    assert_close(ours, theirs, factor)
    return ours


def test_every_function_is_there_with_the_same_arguments():
    for name in NAMES:
        assert name in geo.ops.__all__, name
        theirs = inspect.signature(getattr(torch_scatter, name)).parameters
        ours = inspect.signature(getattr(geo.ops, name)).parameters
        for (n, p), (m, q) in zip(ours.items(), theirs.items(), strict=False):
            assert (n, p.default) == (m, q.default), name
        extra = [p for n, p in ours.items() if n not in theirs]
        assert all(p.kind == p.KEYWORD_ONLY for p in extra), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_scatter(call, dtype):
    shape, index_shape, dim = call
    src, index = values(shape, dtype), torch.randint(12, index_shape)
    for reduce in REDUCES:
        if reduce == "mul" and dtype not in (torch.float64, torch.float32):
            src = src.clamp(0, 1)  # products of 16 bits round at each step there, and 8 bits wrap in both
        both("scatter", src, index, dim, reduce=reduce, factor=10)
        if reduce != "mul" or src.numel():  # an empty src: theirs gives 0 there, and 1 for empty segments else
            both("scatter", src, index, dim, None, 15, reduce, factor=10)
    for name in ("scatter_sum", "scatter_mean", "scatter_min", "scatter_max"):
        both(name, src, index, dim, dim_size=13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_scatter_out(call, dtype):
    shape, index_shape, dim = call
    src, index = values(shape, dtype), torch.randint(12, index_shape)
    sizes = list(shape)
    sizes[dim] = 14
    out = values(sizes, dtype)
    for name in ("sum", "add", "mean", "min", "max"):
        both(f"scatter_{name}", src, index, dim, out=out, factor=4)
    if dtype.is_floating_point:
        both("scatter_mul", src.clamp(0.5, 1), index, dim, out=out, factor=10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_composites(call, dtype):
    shape, index_shape, dim = call
    src, index = values(shape, dtype), torch.randint(12, index_shape)
    sizes = list(shape)
    sizes[dim] = 14
    if index.numel():
        for eps in (1e-12, 1e-3):
            both("scatter_logsumexp", src, index, dim, eps=eps)
            both("scatter_log_softmax", src, index, dim, eps)
        both("scatter_softmax", src, index, dim)
    both("scatter_softmax", src, index, dim, 15)
    for unbiased in (True, False):  # their gradient is NaN where a deviation is 0
        both("scatter_std", src, index, dim, None, 15, unbiased, grad=False)
        both("scatter_std", src, index, dim, out=torch.rand(sizes, dtype=dtype), unbiased=unbiased, grad=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", [((), ()), ((4,), (4,)), ((4,), (1,)), ((2, 3), (2, 3)), ((2, 3), (2, 1))], ids=str)
@pytest.mark.parametrize("trail", [(), (3,), (2, 5)], ids=str)
def test_segments(lead, trail, dtype):
    src = values((*lead[0], 50, *trail), dtype)
    index = torch.randint(12, (*lead[1], 50)).sort(-1).values
    cuts = torch.randint(51, (*lead[1], 8)).sort(-1).values
    ptr = torch.cat([torch.zeros_like(cuts[..., :1]), cuts, torch.full_like(cuts[..., :1], 50)], -1)
    out = values((*lead[0], 14, *trail), dtype)
    filled = values((*lead[0], 9, *trail), dtype)
    same = lead[0] == lead[1]  # their gather_coo, and the gradient of segment_coo, do not broadcast the index
    for reduce in SORTED:
        both("segment_coo", src, index, reduce=reduce, grad=same)
        both("segment_coo", src, index, None, 15, reduce, grad=same)
        both("segment_csr", src, ptr, reduce=reduce)
        both(f"segment_{reduce}_coo", src, index, None, 13, grad=same)
        # their positions and gradients are unset where out wins
        both(f"segment_{reduce}_coo", src, index, out=out, factor=4, grad=False, positions=False)
        both(f"segment_{reduce}_csr", src, ptr)
        both(f"segment_{reduce}_csr", src, ptr, out=filled)
    both("gather_csr", filled, ptr)
    both("gather_csr", filled, ptr, out=torch.zeros_like(src))
    if same:
        both("gather_coo", out, index)
        both("gather_coo", out, index, out=torch.zeros_like(src))


def test_zero_elements():
    src = torch.randn(0, 0, 0, 16)
    index = torch.zeros(0, dtype=torch.int64)
    for reduce in REDUCES:
        both("scatter", src, index, 0, dim_size=0, reduce=reduce)
    for reduce in SORTED:
        both("segment_coo", src, index, dim_size=0, reduce=reduce)
        both("segment_csr", src, index, reduce=reduce)
    both("gather_coo", src, index)
    both("gather_csr", src, index)


def test_strided_inputs():
    src = torch.randn(6, 40, 10)[::2, ::2].transpose(0, 2)  # [10, 20, 3]
    index = torch.randint(7, (40,))[::2]
    for reduce in REDUCES:
        both("scatter", src, index, 1, reduce=reduce)
        both("scatter", src, index.view(1, 20, 1).expand(10, 20, 3), 1, reduce=reduce)
    for reduce in SORTED:
        both("segment_csr", src, torch.tensor([[0, 3, 3, 20]]).expand(10, 4), reduce=reduce)
