r"""The sum over orientations at one position: a matrix of orientations for each channel.

With :math:`T(x, k, g) = \sum_{v,p,o,c} x_{voc} \, k_{poc} \, g_{vpc}`, ``fiber_mul_sum`` is the derivative in ``g``
(and, with the first two axes of the kernel exchanged, in ``x``), ``fiber_outer`` the one in ``k``: the two are closed
under differentiation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define


def fiber_mul_sum(x: Tensor, kernel: Tensor) -> Tensor:
    r"""Depthwise sum over the orientations of each node.

    .. math::
        \text{out}_{vpc} = \sum_o \text{kernel}_{poc} \, x_{voc}

    It equals ``torch.einsum("voc,poc->vpc", x, kernel)``, which copies both operands to another layout first.
    Differentiable any number of times; sums run in a fixed order.

    Args:
        x: Features, [V, O, C].
        kernel: [P, O, C], shared by all nodes.

    Returns:
        out: [V, P, C] in the promoted dtype; 16-bit types accumulate in float32.

    Raises:
        ValueError: Shapes that do not fit together.
        TypeError: Tensors that are not floating point.

    Example:
        >>> import torch
        >>> from geo.ops import fiber_mul_sum
        >>> fiber_mul_sum(torch.randn(5, 4, 8), torch.randn(3, 4, 8)).shape
        torch.Size([5, 3, 8])
    """
    for name, tensor, layout in (("x", x, "[V, O, C]"), ("kernel", kernel, "[P, O, C]")):
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected {layout}, got shape {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if kernel.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"kernel: expected [P, O, C] with [O, C] = {list(x.shape[1:])} as in x, got shape {list(kernel.shape)}"
        )
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    out: Tensor = bounds.call("fiber_mul_sum", torch.ops.geo.fiber_mul_sum, (x.to(dtype), kernel.to(dtype), False))
    return out


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def fiber_mul_sum_reference(x: Tensor, kernel: Tensor) -> Tensor:
    """:func:`fiber_mul_sum` as an einsum: the specification, also under torch.func."""
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    return torch.einsum("voc,poc->vpc", _wide(x, dtype), _wide(kernel, dtype)).to(dtype)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype)


def _sum_kernel(x: Tensor, kernel: Tensor, transposed: bool) -> Tensor:
    return fiber_mul_sum_reference(x, kernel.transpose(0, 1) if transposed else kernel).contiguous()


def _outer_kernel(a: Tensor, b: Tensor) -> Tensor:
    out = torch.einsum("vpc,voc->poc", _wide(a, a.dtype), _wide(b, b.dtype))
    return out.to(a.dtype).contiguous()


# -- shapes ------------------------------------------------------------------------------------------------------------
def _sum_fake(x: Tensor, kernel: Tensor, transposed: bool) -> Tensor:
    torch._check(x.dim() == 3 and kernel.dim() == 3)
    torch._check(kernel.size(0 if transposed else 1) == x.size(1))
    torch._check(kernel.size(2) == x.size(2))
    return x.new_empty((x.size(0), kernel.size(1 if transposed else 0), x.size(2)))


def _outer_fake(a: Tensor, b: Tensor) -> Tensor:
    torch._check(a.dim() == 3 and b.dim() == 3)
    torch._check(a.size(0) == b.size(0))
    torch._check(a.size(2) == b.size(2))
    return a.new_empty((a.size(1), b.size(1), a.size(2)))


# -- gradients ---------------------------------------------------------------------------------------------------------
def _sum_setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.transposed = inputs[2]


def _sum_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, kernel = ctx.saved_tensors
    dx, dkernel = None, None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.geo.fiber_mul_sum(g, kernel, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        dkernel = torch.ops.geo.fiber_outer(x, g) if ctx.transposed else torch.ops.geo.fiber_outer(g, x)
    return dx, dkernel, None


def _outer_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    da = torch.ops.geo.fiber_mul_sum(b, h, False) if ctx.needs_input_grad[0] else None
    db = torch.ops.geo.fiber_mul_sum(a, h, True) if ctx.needs_input_grad[1] else None
    return da, db


define(
    "fiber_mul_sum(Tensor x, Tensor kernel, bool transposed) -> Tensor",
    _sum_kernel,
    _sum_fake,
    _sum_backward,
    _sum_setup,
)
define("fiber_outer(Tensor a, Tensor b) -> Tensor", _outer_kernel, _outer_fake, _outer_backward, _outer_setup)
