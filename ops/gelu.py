r"""GELU whose derivatives of every order cost one pass.

``geo::gelu_mul`` is :math:`g \, \mathrm{gelu}^{(n)}(x)`; its gradient is made of the same product at
orders n and n + 1, so a force that is trained on, which differentiates an activation twice, never leaves it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define

MAX_ORDER = 8  # csrc/gelu.h: kGeluOrders


def gelu(x: Tensor) -> Tensor:
    r"""The exact GELU, for models that are differentiated more than once.

    .. math::
        \mathrm{gelu}(x) = x \, \Phi(x), \qquad \Phi(x) = \tfrac12 \operatorname{erfc}(-x / \sqrt 2)

    The function of ``torch.nn.functional.gelu(x)``. There the second derivative is a chain of a dozen elementwise
    operations; here each derivative, to the eighth, is one pass over memory. At infinity every derivative is its limit
    (PyTorch's are NaN, or depend on the dtype).

    Args:
        x: Tensor of any shape.

    Returns:
        out: Same shape and dtype, contiguous; 16-bit types compute in float32.

    Raises:
        TypeError: A tensor that is not floating point.
        ValueError: A ninth derivative.

    Example:
        >>> import torch
        >>> from geo.ops import gelu
        >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1587,  0.0000,  0.8413])
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if not torch.compiler.is_compiling():
        bounds.refuse_functorch("gelu")
    out: Tensor = torch.ops.geo.gelu_mul(x, None, 0)
    return out


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def gelu_reference(x: Tensor) -> Tensor:
    """:func:`gelu` by PyTorch: the specification at finite ``x``, also under torch.func."""
    return F.gelu(x)


def _polynomial(order: int) -> list[int]:
    """Coefficients of p_n in gelu^(n) = phi p_n: p_2 = 2 - x^2, p_{n+1} = p_n' - x p_n."""
    p = [2, 0, -1]
    for _ in range(order - 2):
        slope = [*(i * c for i, c in enumerate(p) if i), 0, 0]
        p = [a - b for a, b in zip(slope, [0, *p], strict=True)]
    return p


def _derivative(x: Tensor, order: int) -> Tensor:
    v = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    cut = v.clamp(-40.0, 40.0)  # outside, phi is 0
    phi = (cut * cut * -0.5).exp() / math.sqrt(2 * math.pi)
    if order < 2:
        normal = torch.special.erfc(cut * -math.sqrt(0.5)) * 0.5
        out: Tensor = torch.where(v > 0, v, cut) * normal if order == 0 else normal + cut * phi
        return out
    total = torch.zeros_like(cut)
    for c in reversed(_polynomial(order)):
        total = total * cut + c
    return total * phi


def _mul_kernel(x: Tensor, g: Tensor | None, order: int) -> Tensor:
    out = _derivative(x, order)
    if g is not None:
        out = out * g
    return out.to(x.dtype).contiguous()


def _grad_kernel(x: Tensor, g: Tensor, h: Tensor, order: int) -> tuple[Tensor, Tensor]:
    wide = h.float() if h.dtype in (torch.float16, torch.bfloat16) else h
    return _mul_kernel(x, wide * g, order + 1), _mul_kernel(x, h, order)


# -- shapes ------------------------------------------------------------------------------------------------------------
def _mul_fake(x: Tensor, g: Tensor | None, order: int) -> Tensor:
    torch._check(0 <= order <= MAX_ORDER)
    torch._check(g is None or g.shape == x.shape)
    return x.new_empty(x.shape)


def _grad_fake(x: Tensor, g: Tensor, h: Tensor, order: int) -> tuple[Tensor, Tensor]:
    return _mul_fake(x, g, order + 1), _mul_fake(x, h, order)


# -- gradients ---------------------------------------------------------------------------------------------------------
def _check_order(order: int) -> None:
    if order > MAX_ORDER:
        raise ValueError(f"gelu: derivatives are implemented up to order {MAX_ORDER}, got order {order}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.order = inputs[-1]


def _mul_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, g = ctx.saved_tensors
    mul, n = torch.ops.geo.gelu_mul, ctx.order
    need_x, need_g = ctx.needs_input_grad[0], g is not None and ctx.needs_input_grad[1]
    if need_x:
        _check_order(n + 1)
    if need_x and need_g:
        return *torch.ops.geo.gelu_mul_grad(x, g, h, n), None
    dx = mul(x, h if g is None else h * g, n + 1) if need_x else None
    return dx, mul(x, h, n) if need_g else None, None


def _grad_backward(ctx: Any, kx: Tensor, kg: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    """Of dx = h g f', dg = h f with f = gelu^(n), in the directions kx, kg."""
    x, g, h = ctx.saved_tensors
    mul, n = torch.ops.geo.gelu_mul, ctx.order
    dx, dg, dh = None, None, None
    if ctx.needs_input_grad[0]:
        _check_order(n + 2)
        dx = mul(x, kx * g * h, n + 2) + mul(x, kg * h, n + 1)
    if ctx.needs_input_grad[1]:
        dg = mul(x, kx * h, n + 1)
    if ctx.needs_input_grad[2]:
        dh = mul(x, kx * g, n + 1) + mul(x, kg, n)
    return dx, dg, dh, None


define("gelu_mul(Tensor x, Tensor? g, int order) -> Tensor", _mul_kernel, _mul_fake, _mul_backward, _setup)
define(
    "gelu_mul_grad(Tensor x, Tensor g, Tensor h, int order) -> (Tensor, Tensor)",
    _grad_kernel,
    _grad_fake,
    _grad_backward,
    _setup,
)
