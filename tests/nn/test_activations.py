from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from geo.nn.activations import activation
from geo.ops import gelu
from geo.testing import assert_close, check_compile, check_derivatives


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (70000,), (3, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gelu_is_gelu_to_the_third_derivative(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    results = []
    for f in (gelu, F.gelu):
        v = x.clone().requires_grad_()
        y = f(v)
        (first,) = torch.autograd.grad((y * y).sum(), v, create_graph=True)
        (second,) = torch.autograd.grad((first * first.sin()).sum(), v, create_graph=True)
        (third,) = torch.autograd.grad(second.square().sum(), v, retain_graph=True)
        (fast,) = torch.autograd.grad((first * first.sin()).sum(), v)  # without a graph
        results.append((y, first, second, fast) + ((third,) if dtype == torch.float64 else ()))
    assert_close(results[0], results[1], factor=4)


def test_gelu_of_strided_input():
    x = torch.randn(40, 30).t().requires_grad_()
    y = torch.randn(40, 30, requires_grad=True)
    for f in (gelu, F.gelu):
        (g,) = torch.autograd.grad(f(x * y.t()).square().sum(), y, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), y)
        last = h if f is gelu else last  # noqa: F821
    assert_close(last, h)


def test_derivatives_and_compile():
    check_derivatives(gelu, [torch.randn(5, 3)])
    check_compile(gelu, [torch.randn(5, 3)])


def test_names():
    assert activation("silu") is F.silu
    assert activation("gelu") is gelu
    with pytest.raises(ValueError, match="act is 'swish'"):
        activation("swish")
