from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import segment_causal_conv1d, segment_causal_conv1d_reference
from geo.testing import assert_close, check_compile, check_derivatives

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [3, 0, 1, 20, 2, 0, 4, 300, 5, 0]  # shorter and longer than the taps, empty ones at both ends of a run


def segments(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def tensors(rows: int, channels: int, taps: int, device="cpu", dtype=torch.float32) -> list[Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight, bias = torch.randn(rows, channels), torch.randn(channels, taps), torch.randn(channels)
    return [x.to(device, dtype), weight.to(device, wide), bias.to(device, wide)]


def dense(x: Tensor, weight: Tensor, bias: Tensor, ptr: Tensor, reverse: bool) -> Tensor:
    """By torch's convolution, a segment at a time, padded with zeros."""
    taps, out = weight.size(1), []
    for segment in x.double().tensor_split(ptr[1:-1].cpu()):
        rows = segment.flip(0) if reverse else segment
        padded = torch.cat([rows.new_zeros(taps - 1, rows.size(1)), rows]).T[None]
        if len(rows):
            y = torch.nn.functional.conv1d(
                padded, weight.double().flip(1)[:, None], bias.double(), groups=padded.size(1)
            )[0].T
            out.append(y.flip(0) if reverse else y)
    return torch.cat([x.double()[:0], *out])


def check(op, reference, inputs: list[Tensor]) -> None:
    """Forward and gradients against float64; the cotangent is rounded as the output is, for weights stay wide."""
    ours = [t.detach().clone().requires_grad_() for t in inputs]
    theirs = [t.detach().double().requires_grad_() for t in inputs]
    actual, expected = op(*ours), reference(*theirs)
    assert actual.dtype == inputs[0].dtype
    assert_close(actual, expected)
    g = torch.randn_like(actual)
    got, wanted = torch.autograd.grad(actual, ours, g), torch.autograd.grad(expected, theirs, g.double())
    for i, (a, e, t) in enumerate(zip(got, wanted, ours, strict=True)):
        assert a.dtype == t.dtype
        scale = max(1.0, float(e.abs().max()) ** 0.5 if e.numel() else 1.0)  # sums of up to 1000 terms
        assert_close(a, e, scale, f"gradient of argument {i}")


def test_table(device):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], device=device)
    weight = torch.tensor([[1.0, 10.0, 100.0], [1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([0.0, 0.5], device=device)
    ptr = torch.tensor([0, 0, 3, 3, 4], device=device)
    forward = segment_causal_conv1d(x, weight, bias, ptr)
    assert forward.tolist() == [[1.0, 2.5], [13.0, 4.5], [135.0, 4.5], [7.0, 8.5]]
    backward = segment_causal_conv1d(x, weight, bias, ptr, reverse=True)
    assert backward.tolist() == [[531.0, -3.5], [53.0, 4.5], [5.0, 6.5], [7.0, 8.5]]


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device, dtype, rows):
    """Each number of taps that is unrolled, one that is not, and channels around the width of a vector."""
    half = rows // 3
    for ptr in (segments([rows], device), segments([half, 0, rows - half], device), segments([1] * rows, device)):
        for channels, taps in [
            (0, 4),
            (1, 1),
            (3, 2),
            (16, 3),
            (17, 4),
            (64, 4),
            (5, 5),
            (8, 6),
            (2, 7),
            (9, 8),
            (5, 11),
        ]:
            inputs = tensors(rows, channels, taps, device, dtype)
            for reverse in (False, True):
                check(
                    lambda x, w, b, ptr=ptr, reverse=reverse: segment_causal_conv1d(x, w, b, ptr, reverse),
                    lambda x, w, b, ptr=ptr, reverse=reverse: segment_causal_conv1d_reference(x, w, b, ptr, reverse),
                    inputs,
                )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("taps", [1, 4, 11])
def test_equals_dense_convolution(device, taps, reverse):
    inputs, ptr = tensors(sum(LENGTHS), 5, taps, device), segments(LENGTHS, device)
    check(
        lambda x, w, b: segment_causal_conv1d(x, w, b, ptr, reverse),
        lambda x, w, b: dense(x, w, b, ptr, reverse),
        inputs,
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 30), max_size=30),
    channels=st.integers(1, 40),
    taps=st.integers(1, 10),
    reverse=st.booleans(),
)
def test_any_size(seed, lengths, channels, taps, reverse):
    torch.manual_seed(seed)
    inputs, ptr = tensors(sum(lengths), channels, taps), segments(lengths)
    check(
        lambda x, w, b: segment_causal_conv1d(x, w, b, ptr, reverse),
        lambda x, w, b: segment_causal_conv1d_reference(x, w, b, ptr, reverse),
        inputs,
    )


def test_converts_from_torch(device):
    """The docstring's rule for weights that hold the oldest tap first; ``ptr=None`` is one segment."""
    conv = torch.nn.Conv1d(3, 3, 4, groups=3, padding=3).to(device)
    x = torch.randn(20, 3, device=device)
    expected = conv(x.T[None])[0].T[:20]
    assert_close(segment_causal_conv1d(x, conv.weight[:, 0].flip(-1), conv.bias), expected)


def test_non_contiguous(device):
    x = torch.randn(5, sum(LENGTHS), device=device).T
    weight, bias = torch.randn(4, 5, device=device).T, torch.randn(10, device=device)[::2]
    ptr = torch.stack([segments(LENGTHS, device)] * 2, 1)[:, 0]
    expected = segment_causal_conv1d(x.contiguous(), weight.contiguous(), bias.contiguous(), ptr.contiguous())
    assert torch.equal(segment_causal_conv1d(x, weight, bias, ptr), expected)


def test_nan_stays_in_its_segment_channel_and_window(device):
    x, weight, _ = tensors(9, 3, 2, device)
    x[4, 1] = float("nan")
    ptr = torch.tensor([0, 4, 6, 9], device=device)
    for reverse, rows in ((False, [4, 5]), (True, [4])):
        nan = segment_causal_conv1d(x, weight, None, ptr, reverse).isnan()
        assert nan.nonzero().tolist() == [[row, 1] for row in rows]


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_same_bits_on_any_number_of_threads():
    inputs = [t.requires_grad_() for t in tensors(20000, 20, 4)]
    ptr = segments([10000, 0, 1, 1999, *[20] * 400])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = segment_causal_conv1d(*inputs, ptr)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_order_of_segments_permutes_the_bits(device):
    x, weight, bias = tensors(100, 20, 4, device)
    parts = x.split([30, 0, 5, 65])
    forward = segment_causal_conv1d(torch.cat(parts), weight, bias, segments([30, 0, 5, 65], device)).split(
        [30, 0, 5, 65]
    )
    order = [3, 1, 0, 2]
    lengths = [len(parts[i]) for i in order]
    other = segment_causal_conv1d(torch.cat([parts[i] for i in order]), weight, bias, segments(lengths, device))
    for part, i in zip(other.split(lengths), order, strict=True):
        assert torch.equal(part, forward[i])


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives(device, reverse):
    ptr = segments([3, 0, 1, 2], device)
    check_derivatives(lambda *t: segment_causal_conv1d(*t, ptr, reverse), tensors(6, 2, 3, device))
    check_derivatives(lambda x, w: segment_causal_conv1d(x, w, reverse=reverse), tensors(1, 1, 2, device)[:2])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, grad, dtype):
    x, weight, bias = (t.requires_grad_(grad) for t in tensors(6, 3, 4, device, dtype))
    g, ptr = torch.randn(6, 3, device=device, dtype=dtype, requires_grad=grad), segments([2, 0, 4], device)
    ops = torch.ops.geo
    torch.library.opcheck(ops.segment_causal_conv1d.default, (x, weight, bias, ptr, False))
    torch.library.opcheck(ops.segment_causal_conv1d.default, (x, weight, None, ptr, True))
    torch.library.opcheck(ops.segment_causal_conv1d_weight.default, (g, x, ptr, 4, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    ptr = segments([2, 0, 4], device)
    check_compile(
        lambda x, w, b: segment_causal_conv1d(torch.sin(x), w, b, ptr, True), tensors(6, 3, 4, device), dynamic=dynamic
    )
    check_compile(lambda x, w: segment_causal_conv1d(torch.sin(x), w), tensors(6, 3, 4, device)[:2], dynamic=dynamic)


BAD = [
    ([0, 4, 2, 6], r"ptr\[2\] = 2 is out of range \[4, 6\]"),
    ([1, 6], r"ptr\[0\] = 1 is out of range \[0, 0\]"),
    ([0, 5], r"ptr\[1\] = 5 is out of range \[6, 6\]"),
    ([0, 7, 6], r"ptr\[1\] = 7 is out of range \[0, 6\]"),
    ([0], r"ptr\[0\] = 0 is out of range \[6, 6\]"),
]


@pytest.mark.parametrize(("ptr", "sentence"), BAD)
def test_bad_ptr(device, ptr, sentence):
    x, weight, _ = tensors(6, 3, 4, device)
    with pytest.raises(IndexError, match=f"segment_causal_conv1d: {sentence}"):
        segment_causal_conv1d(x, weight, ptr=torch.tensor(ptr, device=device))
    with pytest.raises(IndexError, match=sentence):
        segment_causal_conv1d_reference(x, weight, ptr=torch.tensor(ptr, device=device))


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_empty_ptr_of_the_raw_ops():
    x, weight, _ = tensors(6, 3, 4)
    ptr = torch.empty(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="segment_causal_conv1d: ptr must not be empty"):
        torch.ops.geo.segment_causal_conv1d(x, weight, None, ptr, False)
    with pytest.raises(RuntimeError, match="segment_causal_conv1d_weight: ptr must not be empty"):
        torch.ops.geo.segment_causal_conv1d_weight(x, x, ptr, 4, False)


def test_refusals():
    x, weight, bias = tensors(6, 3, 4)
    ptr = torch.tensor([0, 6])
    with pytest.raises(ValueError, match=r"x: expected \[T, E\], got shape \[6\]"):
        segment_causal_conv1d(x[:, 0], weight)
    with pytest.raises(
        ValueError, match=r"weight: expected \[E, K\] with E = 3 as in x and K >= 1, got shape \[4, 3\]"
    ):
        segment_causal_conv1d(x, weight.T)
    with pytest.raises(ValueError, match=r"weight: expected \[E, K\] .* got shape \[3, 0\]"):
        segment_causal_conv1d(x, weight[:, :0])
    with pytest.raises(ValueError, match=r"bias: expected \[E\] = \[3\], got shape \[2\]"):
        segment_causal_conv1d(x, weight, bias[:2])
    with pytest.raises(ValueError, match=r"ptr: expected int64 \[S \+ 1\], got torch\.int32 \[2\]"):
        segment_causal_conv1d(x, weight, bias, ptr.int())
    with pytest.raises(TypeError, match=r"bias: expected float16, bfloat16, float32 or float64, got torch\.int64"):
        segment_causal_conv1d(x, weight, bias.long())
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.segment_causal_conv1d_reference there"):
        torch.func.grad(lambda x: segment_causal_conv1d(x, weight).sum())(x)
    grad = torch.func.grad(lambda w: segment_causal_conv1d_reference(x, w, bias, ptr).sum())(weight)
    assert_close(grad[:, 0], x.sum(0))


def test_dtypes():
    x, weight, bias = tensors(6, 3, 4)
    assert segment_causal_conv1d(x.bfloat16(), weight, bias).dtype == torch.bfloat16
    assert segment_causal_conv1d(x, weight.double(), bias).dtype == torch.float64
    assert segment_causal_conv1d(x, weight.half(), bias.half()).dtype == torch.float32
