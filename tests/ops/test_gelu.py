from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import gelu, gelu_reference
from geo.ops.gelu import MAX_ORDER
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF = math.inf


def derivative(x: Tensor, order: int) -> Tensor:
    """The derivative of that order by PyTorch's own autograd of x Phi(x), in float64."""
    x = x.double().requires_grad_()
    out = x * torch.special.erfc(x * -math.sqrt(0.5)) / 2
    for _ in range(order):
        (out,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.detach()


def test_table(device):
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], device=device, dtype=torch.float64)
    phi = [0.24197072451914337, 0.3989422804014327, 0.24197072451914337, 0.05399096651318806]
    normal = [0.15865525393145707, 0.5, 0.8413447460685429, 0.9772498680518208]
    rows = {
        0: [v * p for v, p in zip(x.tolist(), normal, strict=True)],
        1: [p + v * d for v, p, d in zip(x.tolist(), normal, phi, strict=True)],
        2: [phi[0], 2 * phi[1], phi[2], -2 * phi[3]],  # phi (2 - x^2)
        3: [3 * phi[0], 0.0, -3 * phi[2], 0.0],  # phi (x^3 - 4 x)
        4: [0.0 + phi[0] * (-1 + 7 - 4), -4 * phi[1], 2 * phi[2], phi[3] * (-16 + 28 - 4)],  # phi (-x^4 + 7 x^2 - 4)
    }
    for order, row in rows.items():
        assert_close(torch.ops.geo.gelu_mul(x, None, order), torch.tensor(row, dtype=x.dtype), msg=f"order {order}")
    assert_close(torch.ops.geo.gelu_mul(x, x, 2), x * torch.tensor(rows[2], device=device, dtype=x.dtype))


@pytest.mark.parametrize("size", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device, dtype, size):
    x = (3 * torch.randn(size)).to(device, dtype)
    check_op(gelu, gelu_reference, (x,))
    check_op(gelu, gelu_reference, (x.reshape(1, size, 1),))


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_order_equals_reference(device, dtype, order):
    x = torch.linspace(-20, 20, 2001).to(device, dtype)
    expected = derivative(x, order)
    actual = torch.ops.geo.gelu_mul(x, None, order)
    g = torch.randn(x.shape, device=device).to(dtype)
    assert_close(actual, expected.to(dtype), msg=f"order {order}")
    assert_close(torch.ops.geo.gelu_mul(x, g, order), (expected * g).to(dtype))
    if order < MAX_ORDER:
        dx, dg = torch.ops.geo.gelu_mul_grad(x, g, 2 * g, order)
        assert_close(dg, (expected * 2 * g).to(dtype))
        assert_close(dx, (derivative(x, order + 1) * g * 2 * g).to(dtype))


def test_second_derivative_equals_pytorch(device):
    x, h, k = (torch.randn(37, 5, device=device, dtype=torch.float64) for _ in range(3))
    results = []
    for f in (gelu, F.gelu):
        leaves = x.clone().requires_grad_(), h.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(leaves[0]), leaves[0], leaves[1], create_graph=True)
        results.append((slope, *torch.autograd.grad(slope, leaves, k)))
    assert_close(*results)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_table_of_errors():
    """Of the kernels alone: units of the last place, and relative in the left tail, where x Phi(x) cancels."""
    x = torch.linspace(-13, 13, 20001, dtype=torch.float64)
    normal = torch.special.erfc(x * -math.sqrt(0.5)) / 2
    for order, expected in enumerate((x * normal, normal + x * (x.square() / -2).exp() / math.sqrt(2 * math.pi))):
        scale = expected.abs().clamp_min(1)
        assert ((torch.ops.geo.gelu_mul(x, None, order) - expected).abs() / scale).max() < 1e-15
    single = x.float()
    for order in range(4):
        exact = torch.ops.geo.gelu_mul(single.double(), None, order)
        assert ((torch.ops.geo.gelu_mul(single, None, order) - exact).abs() / exact.abs().clamp_min(1)).max() < 3e-7
    tail = torch.linspace(-13, -0.1, 1001)
    exact = torch.ops.geo.gelu_mul(tail.double(), None, 0)
    assert ((gelu(tail) - exact) / exact).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extremes(device, dtype):
    """At infinity each order gives its limit; NaN stays NaN; nothing overflows."""
    big = torch.finfo(dtype).max
    x = torch.tensor([-INF, -big, -50.0, INF, big, 50.0, math.nan], device=device, dtype=dtype)
    limits = {0: [0.0, 0.0, 0.0, INF, big, 50.0], 1: [0.0] * 3 + [1.0] * 3}
    for order in range(MAX_ORDER + 1):
        out = torch.ops.geo.gelu_mul(x, None, order)
        assert out[:-1].tolist() == limits.get(order, [0.0] * 6), f"order {order}"
        assert out[-1].isnan()
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30], device=device, dtype=dtype)
    assert gelu(tiny).tolist() == (tiny / 2).tolist()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(0, 300), scale=st.floats(0.01, 20))
def test_any_size(seed, size, scale):
    torch.manual_seed(seed)
    check_op(gelu, gelu_reference, (scale * torch.randn(size),))


def test_non_contiguous(device):
    x = torch.randn(6, 4, 5, device=device).transpose(0, 2)
    check_op(gelu, gelu_reference, (x,))
    check_op(gelu, gelu_reference, (torch.randn(7, 1, device=device).expand(7, 3),))
    assert gelu(x).is_contiguous()
    slope = torch.autograd.grad(gelu(x.requires_grad_()).sum(), x)[0]  # the cotangent is one number, expanded
    assert_close(slope, derivative(x.detach(), 1).float())


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
def test_same_bits_on_any_number_of_threads():
    x, h, k = torch.randn(3, 100_003).unbind()
    x.requires_grad_()
    h.requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = gelu(x)
            (slope,) = torch.autograd.grad(out, x, h, create_graph=True)
            results.append((out, slope, *torch.autograd.grad(slope, (x, h), k)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_derivatives(device):
    x = torch.linspace(-3, 3, 9, device=device)
    check_derivatives(gelu, (x,))

    def slope(x: Tensor, h: Tensor) -> Tensor:
        return torch.autograd.grad(gelu(x), x, h, create_graph=True)[0]

    def bend(x: Tensor, h: Tensor, k: Tensor) -> Tensor:
        return torch.cat(torch.autograd.grad(slope(x, h), (x, h), k, create_graph=True))

    check_derivatives(slope, (x, torch.randn_like(x)))
    check_derivatives(bend, (x, torch.randn_like(x), torch.randn_like(x)))  # third and fourth


def test_ninth_derivative_is_refused(device):
    x = torch.randn(3, device=device, dtype=torch.float64, requires_grad=True)
    out = gelu(x)
    for order in range(1, MAX_ORDER + 1):
        (out,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        assert_close(out, derivative(x.detach(), order))
    with pytest.raises(ValueError, match="gelu: derivatives are implemented up to order 8, got order 9"):
        torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    x, g, h = (torch.randn(5, 3, device=device, requires_grad=grad) for _ in range(3))
    for order in (0, 1, 4):
        torch.library.opcheck(torch.ops.geo.gelu_mul.default, (x, None, order))
        torch.library.opcheck(torch.ops.geo.gelu_mul.default, (x, g, order))
        torch.library.opcheck(torch.ops.geo.gelu_mul_grad.default, (x, g, h, order))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    check_compile(lambda x: gelu(torch.sin(x)), (torch.randn(5, 3, device=device),), dynamic=dynamic)


@pytest.mark.slow
def test_compile_inductor():
    check_compile(lambda x: gelu(torch.sin(x)), (torch.randn(5, 3),), backend="inductor")


def test_autocast(device):
    layer = torch.nn.Linear(4, 3, device=device)
    x = torch.randn(6, 4, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = gelu(layer(x))
        expected = F.gelu(layer(x))
    assert out.dtype == torch.bfloat16
    assert_close(out, expected)
    (slope,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(slope.sum(), x)[0].isfinite().all(), torch.tensor(True))


def test_refusals():
    x = torch.randn(3)
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch\.int64"):
        gelu(x.long())
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gelu_reference there"):
        torch.func.grad(lambda x: gelu(x).sum())(x)
    assert_close(torch.func.grad(lambda x: gelu_reference(x).sum())(x), derivative(x, 1).float())
