r"""Depthwise causal convolution along the rows of each segment.

With :math:`T(w, x, g) = \sum_{t,j} w_j \, x_{t-j} \, g_t` over pairs of rows of one segment, the convolution is the
derivative in g (and, run the other way, in x), ``segment_causal_conv1d_weight`` the one in w: the two are closed under
differentiation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import check_one_device, widen
from geo.ops.registration import define
from geo.ops.selective_scan import FLOATS, check_ptr_tensor, one_segment


def segment_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, ptr: Tensor | None = None, reverse: bool = False
) -> Tensor:
    r"""Depthwise causal convolution of each segment of rows, with zeros before its first row.

    .. math::
        \text{out}_{te} = \text{bias}_e + \sum_{j=0}^{K-1} \text{weight}_{ej} \, x_{t-j,e}
        \qquad (t - j \text{ in the segment of } t)

    and :math:`x_{t+j,e}` with ``reverse``. Tap 0 meets the row itself. ``torch.nn.Conv1d`` and mamba_ssm's
    ``causal_conv1d`` store the oldest tap first: give ``conv.weight[:, 0].flip(-1)`` here. Differentiable any number
    of times; results are bitwise the same on any number of threads.

    Args:
        x: Rows of all segments, [T, E].
        weight: Taps of each channel, [E, K].
        bias: [E]. (default: 0)
        ptr: int64 [S + 1], rising from 0 to T: segment s is rows ``ptr[s]`` to ``ptr[s + 1] - 1``; empty ones are
            allowed. (default: one segment)
        reverse: Look ahead in place of back. (default: ``False``)

    Returns:
        out: [T, E] in the dtype of ``x`` (float64 where any argument is); 16-bit rows are computed in float32, which
        weight and bias are then kept in.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to T.
        ValueError: Shapes that do not fit together.
        TypeError: Tensors that are not floating point.

    Example:
        >>> import torch
        >>> from geo.ops import segment_causal_conv1d
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> segment_causal_conv1d(x, torch.tensor([[1.0, 10.0]]), ptr=torch.tensor([0, 2, 4])).flatten().tolist()
        [1.0, 12.0, 3.0, 34.0]
    """
    x, weight, bias, ptr = _prepare(x, weight, bias, ptr)
    args = (x, weight, bias, ptr, bool(reverse))
    checks = (("ptr", ptr, x.size(0)),)
    out: Tensor = bounds.call("segment_causal_conv1d", torch.ops.geo.segment_causal_conv1d, args, checks)
    return out


def _prepare(
    x: Tensor, weight: Tensor, bias: Tensor | None, ptr: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    if x.dim() != 2:
        raise ValueError(f"x: expected [T, E], got shape {list(x.shape)}")
    channels = x.size(1)
    if weight.dim() != 2 or weight.size(0) != channels or weight.size(1) < 1:
        raise ValueError(
            f"weight: expected [E, K] with E = {channels} as in x and K >= 1, got shape {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias: expected [E] = [{channels}], got shape {list(bias.shape)}")
    ptr = one_segment(x) if ptr is None else ptr
    check_ptr_tensor(ptr, x)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    check_one_device("segment_causal_conv1d", x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    double = torch.float64 in (x.dtype, weight.dtype, None if bias is None else bias.dtype)
    dtype = torch.float64 if double else x.dtype
    wide = torch.float64 if double else torch.float32
    return x.to(dtype), weight.to(wide), None if bias is None else bias.to(wide), ptr


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def segment_causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, ptr: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """:func:`segment_causal_conv1d` in plain PyTorch, one tap after the other; also under torch.func."""
    x, weight, bias, ptr = _prepare(x, weight, bias, ptr)
    bounds.check_ptr("segment_causal_conv1d", ptr, x.size(0))
    return _conv(x, weight, bias, ptr, reverse)


def _shifted(x: Tensor, ptr: Tensor, tap: int, reverse: bool) -> Tensor:
    """Row t - tap (or t + tap) at row t, 0 where that is not in the segment."""
    if tap == 0:
        return x
    row = torch.arange(x.size(0), device=x.device)
    ends = torch.repeat_interleave(ptr[1:] if reverse else ptr[:-1], ptr.diff())
    there = row + tap < ends if reverse else row - tap >= ends
    return torch.where(there[:, None], x.roll(-tap if reverse else tap, 0), 0)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, ptr: Tensor, reverse: bool) -> Tensor:
    wide = widen(x)
    out = wide * weight[:, 0] if bias is None else bias + wide * weight[:, 0]
    for tap in range(1, weight.size(1)):
        out = out + _shifted(wide, ptr, tap, reverse) * weight[:, tap]
    return out.to(x.dtype)


def _conv_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, ptr: Tensor, reverse: bool) -> Tensor:
    bounds.check_ptr("segment_causal_conv1d", ptr, x.size(0))
    return _conv(x, weight, bias, ptr, reverse)


def _weight_kernel(grad: Tensor, x: Tensor, ptr: Tensor, kernel_size: int, reverse: bool) -> Tensor:
    bounds.check_ptr("segment_causal_conv1d_weight", ptr, x.size(0))
    g, wide = widen(grad), widen(x)
    return torch.stack([(g * _shifted(wide, ptr, tap, reverse)).sum(0) for tap in range(kernel_size)], 1)


# -- shapes ------------------------------------------------------------------------------------------------------------
def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None, ptr: Tensor, reverse: bool) -> Tensor:
    torch._check(x.dim() == 2 and weight.dim() == 2 and ptr.dim() == 1)
    torch._check(weight.size(0) == x.size(1))
    return x.new_empty(x.shape)


def _weight_fake(grad: Tensor, x: Tensor, ptr: Tensor, kernel_size: int, reverse: bool) -> Tensor:
    torch._check(grad.dim() == 2 and x.dim() == 2 and ptr.dim() == 1)
    torch._check(grad.size(0) == x.size(0))
    torch._check(grad.size(1) == x.size(1))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((x.size(1), kernel_size), dtype=dtype)


# -- gradients ---------------------------------------------------------------------------------------------------------
def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ptr, ctx.reverse = inputs
    ctx.save_for_backward(x, weight, ptr)


def _conv_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ptr = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.geo.segment_causal_conv1d(g, weight, None, ptr, not ctx.reverse)
    if ctx.needs_input_grad[1]:
        dweight = torch.ops.geo.segment_causal_conv1d_weight(g, x, ptr, weight.size(1), ctx.reverse)
    if ctx.needs_input_grad[2]:  # not by torch's sum, whose order depends on the threads
        dbias = torch.ops.geo.segment_sum(widen(g), one_segment(g), None, None, False)[0]
    return dx, dweight, dbias, None, None


def _weight_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, ptr, _, ctx.reverse = inputs
    ctx.save_for_backward(grad, x, ptr)


def _weight_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, ptr = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = torch.ops.geo.segment_causal_conv1d(x, h, None, ptr, ctx.reverse)
    if ctx.needs_input_grad[1]:
        dx = torch.ops.geo.segment_causal_conv1d(grad, h, None, ptr, not ctx.reverse)
    return dgrad, dx, None, None, None


# weight, its gradient and bias are in the type that x, of any floating dtype, is accumulated in.
define(
    "segment_causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor ptr, bool reverse) -> Tensor",
    _conv_kernel,
    _conv_fake,
    _conv_backward,
    _conv_setup,
)
define(
    "segment_causal_conv1d_weight(Tensor grad, Tensor x, Tensor ptr, int kernel_size, bool reverse) -> Tensor",
    _weight_kernel,
    _weight_fake,
    _weight_backward,
    _weight_setup,
)
