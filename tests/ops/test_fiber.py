from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import fiber_mul_sum, fiber_mul_sum_reference
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(16, 16, 64), (1, 1, 1), (3, 2, 7), (20, 7, 33), (5, 6, 100), (2, 3, 0), (0, 2, 4), (2, 0, 4)]  # O, P, C


def tensors(nodes: int, sizes: tuple[int, int, int], device="cpu", dtype=torch.float32) -> list[Tensor]:
    num_in, num_out, channels = sizes
    x, kernel = torch.randn(nodes, num_in, channels), torch.randn(num_out, num_in, channels)
    return [t.to(device, dtype) for t in (x, kernel)]


def test_table(device):
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device)  # one node, two orientations, two channels
    kernel = torch.tensor([[[1.0, 10.0], [100.0, 1000.0]], [[0.0, 1.0], [1.0, 0.0]]], device=device)
    assert fiber_mul_sum(x, kernel).tolist() == [[[301.0, 4020.0], [3.0, 2.0]]]


@pytest.mark.parametrize("nodes", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device, dtype, nodes):
    for sizes in SIZES:
        check_op(fiber_mul_sum, fiber_mul_sum_reference, tensors(nodes, sizes, device, dtype), factor=10)


def test_non_contiguous(device):
    x = torch.randn(4, 6, 3, device=device).transpose(0, 1)
    kernel = torch.randn(3, 4, 5, device=device).permute(2, 1, 0)
    check_op(fiber_mul_sum, fiber_mul_sum_reference, (x, kernel), factor=2)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    nodes=st.integers(0, 200),
    sizes=st.tuples(st.integers(1, 22), st.integers(1, 22), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size(seed, nodes, sizes, dtype):
    torch.manual_seed(seed)
    check_op(fiber_mul_sum, fiber_mul_sum_reference, tensors(nodes, sizes, dtype=dtype), factor=10)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_same_bits_on_any_number_of_threads():
    x, kernel = (t.requires_grad_() for t in tensors(3000, (6, 5, 20)))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = fiber_mul_sum(x, kernel)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, kernel))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_derivatives(device):
    check_derivatives(fiber_mul_sum, tensors(5, (3, 2, 4), device))
    check_derivatives(fiber_mul_sum, tensors(1, (1, 1, 1), device))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    x, kernel = (t.requires_grad_(grad) for t in tensors(5, (3, 2, 4), device))
    g = torch.randn(5, 2, 4, device=device, requires_grad=grad)
    torch.library.opcheck(torch.ops.geo.fiber_mul_sum.default, (x, kernel, False))
    torch.library.opcheck(torch.ops.geo.fiber_mul_sum.default, (g, kernel, True))
    torch.library.opcheck(torch.ops.geo.fiber_outer.default, (g, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    check_compile(lambda x, k: fiber_mul_sum(torch.sin(x), k), tensors(5, (3, 2, 4), device), dynamic=dynamic)


def test_refusals():
    x, kernel = tensors(5, (3, 2, 4))
    with pytest.raises(ValueError, match=r"x: expected \[V, O, C\], got shape \[5, 3\]"):
        fiber_mul_sum(x[..., 0], kernel)
    with pytest.raises(ValueError, match=r"kernel: expected \[P, O, C\] with \[O, C\] = \[3, 4\] as in x, got shape"):
        fiber_mul_sum(x, kernel[:, :2])
    with pytest.raises(TypeError, match=r"kernel: expected a floating-point tensor, got torch\.int64"):
        fiber_mul_sum(x, kernel.long())
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.fiber_mul_sum_reference there"):
        torch.func.grad(lambda x: fiber_mul_sum(x, kernel).sum())(x)
    grad = torch.func.grad(lambda x: fiber_mul_sum_reference(x, kernel).sum())(x)
    assert_close(grad, kernel.sum(0).expand_as(x))
