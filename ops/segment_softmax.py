"""Softmax, log-softmax, log-sum-exp and standard deviation of each segment of rows, fused.

Segments are those of :mod:`geo.ops.segment`. Every function takes ``ptr`` or a :class:`SegmentPlan`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import widen
from geo.ops.plan import SegmentPlan
from geo.ops.registration import define
from geo.ops.segment import Order, check_order, count_of, csr_order, per_segment, rows_of


def segment_softmax(src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    r"""Softmax over the rows of each segment: :math:`\exp(x_e - m_i) / \sum_{e' \in i} \exp(x_{e'} - m_i)`.

    The maximum :math:`m_i` is taken off first, so nothing overflows. A segment that holds +inf or NaN, or nothing but
    -inf, gives NaN, as :func:`torch.softmax` does. Differentiable any number of times.

    Args:
        src: [E, *F], floating; float16 and bfloat16 are computed in float32.
        ptr: int64 [N + 1], rising from 0 to E, or the plan of the segment of each row.

    Returns:
        [E, *F], of the dtype of ``src``.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import segment_softmax
        >>> segment_softmax(torch.tensor([0.0, 0.0, 7.0]), torch.tensor([0, 2, 3])).tolist()
        [0.5, 0.5, 1.0]
    """
    return _normalised("segment_softmax", src, ptr, False)


def segment_log_softmax(src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    r"""Logarithm of :func:`segment_softmax`: :math:`x_e - \log \sum_{e' \in i} \exp(x_{e'})`.

    NaN where the softmax is. Differentiable any number of times.

    Args:
        src: [E, *F], floating.
        ptr: int64 [N + 1], or a plan.

    Returns:
        [E, *F], of the dtype of ``src``.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import segment_log_softmax
        >>> segment_log_softmax(torch.tensor([3.0, 7.0]), torch.tensor([0, 1, 2])).tolist()
        [0.0, 0.0]
    """
    return _normalised("segment_log_softmax", src, ptr, True)


def segment_logsumexp(src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    r"""Logarithm of the sum of exponentials of each segment, :math:`\log \sum_{e \in i} \exp(x_e)`.

    An empty segment gives 0 (as in torch_scatter; the limit would be -inf). Infinities come out as they should: +inf
    where there is one, -inf where there is nothing else, and then no gradient. NaN goes through. A single row
    is given as it stands. Differentiable any number of times.

    Args:
        src: [E, *F], floating.
        ptr: int64 [N + 1], or a plan.

    Returns:
        [N, *F], of the dtype of ``src``.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import segment_logsumexp
        >>> segment_logsumexp(torch.zeros(4), torch.tensor([0, 1, 4])).exp().tolist()
        [1.0, 3.0]
    """
    order = _floating_order("segment_logsumexp", src, ptr)
    args = (src, *order)
    out: Tensor = bounds.call("segment_logsumexp", torch.ops.geo.segment_logsumexp, args, order.checks(src.size(0)))
    return out.to(src.dtype)


def segment_std(src: Tensor, ptr: Tensor | SegmentPlan, unbiased: bool = True) -> Tensor:
    r"""Standard deviation of each segment, :math:`\sqrt{\sum_e (x_e - \bar x_i)^2 / \max(n_i - 1, 1)}`.

    Where the deviation is 0 (empty and single rows, equal rows) so is the gradient. A segment that holds an infinity or
    NaN gives NaN. Differentiable any number of times.

    Args:
        src: [E, *F], floating.
        ptr: int64 [N + 1], or a plan.
        unbiased: divide by :math:`n - 1` in place of :math:`n`. (default: ``True``)

    Returns:
        [N, *F], of the dtype of ``src``.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import segment_std
        >>> segment_std(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([0, 2, 3]), unbiased=False).tolist()
        [1.0, 0.0]
    """
    order = _floating_order("segment_std", src, ptr)
    args = (src, *order, unbiased)
    out, _ = bounds.call("segment_std", torch.ops.geo.segment_std, args, order.checks(src.size(0)))
    std: Tensor = out
    return std


def _floating_order(op: str, src: Tensor, ptr: Tensor | SegmentPlan) -> Order:
    order = csr_order(op, src, ptr)
    if not src.is_floating_point():
        raise ValueError(f"{op}: src must be floating, got {src.dtype}")
    return order


def _normalised(op: str, src: Tensor, ptr: Tensor | SegmentPlan, log: bool) -> Tensor:
    order = _floating_order(op, src, ptr)
    out: Tensor = bounds.call(op, torch.ops.geo.segment_softmax, (src, *order, log), order.checks(src.size(0)))
    return out


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def segment_softmax_reference(src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    """:func:`segment_softmax` in plain PyTorch."""
    return _softmax(src, csr_order("segment_softmax", src, ptr), False)


def segment_log_softmax_reference(src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    """:func:`segment_log_softmax` in plain PyTorch."""
    return _softmax(src, csr_order("segment_log_softmax", src, ptr), True)


def segment_logsumexp_reference(src: Tensor, ptr: Tensor | SegmentPlan) -> Tensor:
    """:func:`segment_logsumexp` in plain PyTorch."""
    return _logsumexp(src, csr_order("segment_logsumexp", src, ptr)).to(src.dtype)


def segment_std_reference(src: Tensor, ptr: Tensor | SegmentPlan, unbiased: bool = True) -> Tensor:
    """:func:`segment_std` in plain PyTorch."""
    return _std(src, csr_order("segment_std", src, ptr), unbiased)[0]


def _shifted(src: Tensor, order: Order) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wide: rows' segments, rows less their segment's maximum, that maximum, sums of exponentials."""
    wide, rows = widen(src), rows_of(order, src.size(0))
    shape = (order.num_segments, *src.shape[1:])
    expanded = rows.view(-1, *[1] * (src.dim() - 1)).expand_as(wide)
    top = wide.detach().new_zeros(shape).scatter_reduce(0, expanded, wide.detach(), "amax", include_self=False)
    shifted = wide - top.index_select(0, rows)
    return rows, shifted, top, wide.new_zeros(shape).index_add(0, rows, shifted.exp())


def _softmax(src: Tensor, order: Order, log: bool) -> Tensor:
    rows, shifted, _, total = _shifted(src, order)
    below = total.index_select(0, rows)
    return (shifted - below.log() if log else shifted.exp() / below).to(src.dtype)


def _logsumexp(src: Tensor, order: Order) -> Tensor:
    wide = widen(src)
    rows = rows_of(order, src.size(0))
    expanded = rows.view(-1, *[1] * (src.dim() - 1)).expand_as(wide)
    top = wide.detach().new_zeros(order.num_segments, *src.shape[1:])
    top = top.scatter_reduce(0, expanded, wide.detach(), "amax", include_self=False)
    top = torch.where(top.isfinite(), top, 0)  # +-inf less itself would be NaN
    total = wide.new_zeros(top.shape).index_add(0, rows, (wide - top.index_select(0, rows)).exp())
    empty = (order.ptr.diff() == 0).view(-1, *[1] * (src.dim() - 1))
    return torch.where(empty, 0, -(-torch.where(empty, 1, total).log() - top))  # of -0 alone, -0


def _std(src: Tensor, order: Order, unbiased: bool) -> tuple[Tensor, Tensor]:
    wide = widen(src)
    rows, shape = rows_of(order, src.size(0)), (order.num_segments, *src.shape[1:])
    mean = wide.new_zeros(shape).index_add(0, rows, wide) / count_of(order.ptr, wide)
    squares = wide.new_zeros(shape).index_add(0, rows, (wide - mean.index_select(0, rows)).square())
    variance = squares / _freedom(order.ptr, wide, unbiased)
    flat = variance == 0
    std = torch.where(flat, 0, torch.where(flat, 1, variance).sqrt())
    return std.to(src.dtype), mean


def _freedom(ptr: Tensor, like: Tensor, unbiased: bool) -> Tensor:
    """What the sum of squares is divided by, shaped to divide ``like`` [N, *F]."""
    return (ptr.diff() - int(unbiased)).clamp(min=1).to(like.dtype).view(-1, *[1] * (like.dim() - 1))


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def _sum(src: Tensor, order: Order) -> Tensor:
    out: Tensor = torch.ops.geo.segment_sum(src, *order, False)
    return out


def _spread(src: Tensor, order: Order, num_rows: int) -> Tensor:
    out: Tensor = torch.ops.geo.gather_csr(src, *order, num_rows)
    return out


def _softmax_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, log: bool) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_softmax", order, src.size(0))
    return _softmax(src, order, log)


def _softmax_fake(src: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    torch._check(src.dim() >= 1 and ptr.dim() == 1)
    return torch.empty_like(src, memory_format=torch.contiguous_format)


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ptr, perm, index, ctx.log = inputs
    ctx.save_for_backward(output, ptr, perm, index)


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    out, ptr, perm, index = ctx.saved_tensors
    return torch.ops.geo.segment_softmax_grad(grad, out, ptr, perm, index, ctx.log), None, None, None, None


# With y the output and s the sum over a segment: dx = y (g - s(g y)), and for the logarithm dx = g - exp(y) s(g).
def _softmax_grad_kernel(
    grad: Tensor, out: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, log: bool
) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_softmax_grad", order, out.size(0))
    g, y, rows = widen(grad), widen(out), rows_of(order, out.size(0))
    sums = y.new_zeros(order.num_segments, *y.shape[1:]).index_add(0, rows, g if log else g * y).index_select(0, rows)
    return (g - y.exp() * sums if log else y * (g - sums)).to(out.dtype)


def _softmax_grad_fake(
    grad: Tensor, out: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, log: bool
) -> Tensor:
    torch._check(grad.dim() == out.dim())
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _softmax_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.log = inputs[-1]
    ctx.save_for_backward(*inputs[:-1])


def _softmax_grad_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    grad, out, *order = ctx.saved_tensors
    return *_softmax_second(ctx, h, grad, out, Order(*order)), None, None, None, None


def _softmax_second(
    ctx: Any, h: Tensor, grad: Tensor, out: Tensor, order: Order
) -> tuple[Tensor | None, Tensor | None]:
    num_rows = out.size(0)
    by_grad = by_out = None
    if ctx.log:
        p = out.exp()
        if ctx.needs_input_grad[0]:
            by_grad = h - _spread(_sum(h * p, order), order, num_rows)
        if ctx.needs_input_grad[1]:
            by_out = -h * p * _spread(_sum(grad, order), order, num_rows)
    else:
        if ctx.needs_input_grad[0]:  # the map from g to dx is its own transpose
            by_grad = torch.ops.geo.segment_softmax_grad(h, out, *order, False)
        if ctx.needs_input_grad[1]:
            along, across = _sum(grad * out, order), _sum(h * out, order)
            by_out = h * (grad - _spread(along, order, num_rows)) - grad * _spread(across, order, num_rows)
    return by_grad, by_out


def _logsumexp_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_logsumexp", order, src.size(0))
    return _logsumexp(src, order)


def _wide_per_segment(src: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    """In the accumulation type: what the gradient is computed from must not be rounded to 16 bits."""
    out = per_segment(src, ptr)
    return out.float() if src.dtype in (torch.float16, torch.bfloat16) else out


def _logsumexp_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    src, ptr, perm, index = inputs
    ctx.save_for_backward(src, output, ptr, perm, index)


def _logsumexp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.geo.segment_logsumexp_grad(grad, *ctx.saved_tensors), None, None, None


# dx_e = g_i exp(x_e - out_i); 0 where out_i is -inf
def _logsumexp_grad_kernel(
    grad: Tensor, src: Tensor, out: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None
) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_logsumexp_grad", order, src.size(0))
    rows = rows_of(order, src.size(0))
    below = widen(out).index_select(0, rows)
    share = torch.where(below == float("-inf"), 0, (widen(src) - below).exp())
    return (widen(grad).index_select(0, rows) * share).to(src.dtype)


def _logsumexp_grad_fake(
    grad: Tensor, src: Tensor, out: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None
) -> Tensor:
    torch._check(grad.dim() == src.dim() and out.dim() == src.dim())
    return torch.empty_like(src, memory_format=torch.contiguous_format)


def _logsumexp_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _logsumexp_grad_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    grad, src, out, *order = ctx.saved_tensors
    return *_logsumexp_second(ctx, h, grad, src, out, Order(*order)), None, None, None


def _logsumexp_second(
    ctx: Any, h: Tensor, grad: Tensor, src: Tensor, out: Tensor, order: Order
) -> tuple[Tensor, Tensor | None, Tensor]:
    # With p = exp(x - out): by g s(h p), by x h g p, by out -s(h g p).
    p = torch.ops.geo.segment_logsumexp_grad(torch.ones_like(out), src, out, *order)
    along = _sum(h * p, order)
    by_src = h * p * _spread(grad, order, src.size(0)) if ctx.needs_input_grad[1] else None
    return along, by_src, -grad * along


def _std_kernel(
    src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, unbiased: bool
) -> tuple[Tensor, Tensor]:
    order = Order(ptr, perm, index)
    check_order("segment_std", order, src.size(0))
    return _std(src, order, unbiased)


def _std_fake(src: Tensor, ptr: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return per_segment(src, ptr), _wide_per_segment(src, ptr)


def _std_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    src, ptr, perm, index, ctx.unbiased = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(src, *output, ptr, perm, index)


def _std_backward(ctx: Any, g_std: Tensor | None, g_mean: Tensor | None) -> tuple[Tensor | None, ...]:
    src, std, mean, *order_ = ctx.saved_tensors
    order, num_rows = Order(*order_), src.size(0)
    grad: Tensor | None = None
    if g_std is not None:
        flat = std == 0
        share = torch.where(flat, 0, g_std / torch.where(flat, 1, std)) / _freedom(order.ptr, std, ctx.unbiased)
        grad = (src - _spread(mean, order, num_rows)) * _spread(share, order, num_rows)
    if g_mean is not None:
        by_mean = _spread(g_mean / count_of(order.ptr, g_mean), order, num_rows)
        grad = by_mean if grad is None else grad + by_mean
    return None if grad is None else grad.to(src.dtype), None, None, None, None


# -- by the segment of each row: sorted rows as segments, narrow ones in their order -----------------------------------
def _by_index(index: Tensor, size: int) -> Order:
    ptr, perm = torch.ops.geo.csr_from_index(index, size)
    return Order(ptr, perm, index)


def _scatter_softmax_kernel(src: Tensor, index: Tensor, dim_size: int, log: bool) -> Tensor:
    out: Tensor = torch.ops.geo.segment_softmax(src, *_by_index(index, dim_size), log)
    return out


def _scatter_softmax_fake(src: Tensor, index: Tensor, dim_size: int, log: bool) -> Tensor:
    torch._check(src.dim() >= 1 and index.dim() == 1)
    return torch.empty_like(src, memory_format=torch.contiguous_format)


def _scatter_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ctx.dim_size, ctx.log = inputs
    ctx.save_for_backward(output, index)


def _scatter_softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.geo.scatter_softmax_grad(grad, *ctx.saved_tensors, ctx.dim_size, ctx.log), None, None, None


def _scatter_softmax_grad_kernel(grad: Tensor, out: Tensor, index: Tensor, dim_size: int, log: bool) -> Tensor:
    to: Tensor = torch.ops.geo.segment_softmax_grad(grad, out, *_by_index(index, dim_size), log)
    return to


def _scatter_softmax_grad_fake(grad: Tensor, out: Tensor, index: Tensor, dim_size: int, log: bool) -> Tensor:
    torch._check(grad.dim() == out.dim() and index.dim() == 1)
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _scatter_softmax_grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dim_size, ctx.log = inputs
    ctx.save_for_backward(*tensors)


def _scatter_softmax_grad_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    grad, out, index = ctx.saved_tensors
    order = _by_index(index, ctx.dim_size)
    return *_softmax_second(ctx, h, grad, out, order), None, None, None


def _scatter_logsumexp_kernel(src: Tensor, index: Tensor, dim_size: int) -> Tensor:
    out: Tensor = torch.ops.geo.segment_logsumexp(src, *_by_index(index, dim_size))
    return out


def _scatter_logsumexp_fake(src: Tensor, index: Tensor, dim_size: int) -> Tensor:
    torch._check(src.dim() >= 1 and index.dim() == 1)
    out = src.new_empty(dim_size, *src.shape[1:])
    return out.float() if src.dtype in (torch.float16, torch.bfloat16) else out


def _scatter_logsumexp_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    src, index, _ = inputs
    ctx.save_for_backward(src, output, index)


def _scatter_logsumexp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.geo.scatter_logsumexp_grad(grad, *ctx.saved_tensors), None, None


def _scatter_logsumexp_grad_kernel(grad: Tensor, src: Tensor, out: Tensor, index: Tensor) -> Tensor:
    to: Tensor = torch.ops.geo.segment_logsumexp_grad(grad, src, out, *_by_index(index, out.size(0)))
    return to


def _scatter_logsumexp_grad_fake(grad: Tensor, src: Tensor, out: Tensor, index: Tensor) -> Tensor:
    torch._check(grad.dim() == src.dim() and out.dim() == src.dim() and index.dim() == 1)
    return torch.empty_like(src, memory_format=torch.contiguous_format)


def _scatter_logsumexp_grad_backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    grad, src, out, index = ctx.saved_tensors
    return *_logsumexp_second(ctx, h, grad, src, out, _by_index(index, out.size(0))), None


_ORDER = "Tensor ptr, Tensor? perm, Tensor? index"
define(
    f"segment_softmax(Tensor src, {_ORDER}, bool log) -> Tensor",
    _softmax_kernel,
    _softmax_fake,
    _softmax_backward,
    _softmax_setup,
)
define(
    f"segment_softmax_grad(Tensor grad, Tensor out, {_ORDER}, bool log) -> Tensor",
    _softmax_grad_kernel,
    _softmax_grad_fake,
    _softmax_grad_backward,
    _softmax_grad_setup,
)
define(
    f"segment_logsumexp(Tensor src, {_ORDER}) -> Tensor",
    _logsumexp_kernel,
    _wide_per_segment,
    _logsumexp_backward,
    _logsumexp_setup,
)
define(
    f"segment_logsumexp_grad(Tensor grad, Tensor src, Tensor out, {_ORDER}) -> Tensor",
    _logsumexp_grad_kernel,
    _logsumexp_grad_fake,
    _logsumexp_grad_backward,
    _logsumexp_grad_setup,
)
define(
    f"segment_std(Tensor src, {_ORDER}, bool unbiased) -> (Tensor, Tensor)",
    _std_kernel,
    _std_fake,
    _std_backward,
    _std_setup,
)
define(
    "scatter_softmax(Tensor src, Tensor index, SymInt dim_size, bool log) -> Tensor",
    _scatter_softmax_kernel,
    _scatter_softmax_fake,
    _scatter_softmax_backward,
    _scatter_softmax_setup,
)
define(
    "scatter_softmax_grad(Tensor grad, Tensor out, Tensor index, SymInt dim_size, bool log) -> Tensor",
    _scatter_softmax_grad_kernel,
    _scatter_softmax_grad_fake,
    _scatter_softmax_grad_backward,
    _scatter_softmax_grad_setup,
)
define(
    "scatter_logsumexp(Tensor src, Tensor index, SymInt dim_size) -> Tensor",
    _scatter_logsumexp_kernel,
    _scatter_logsumexp_fake,
    _scatter_logsumexp_backward,
    _scatter_logsumexp_setup,
)
define(
    "scatter_logsumexp_grad(Tensor grad, Tensor src, Tensor out, Tensor index) -> Tensor",
    _scatter_logsumexp_grad_kernel,
    _scatter_logsumexp_grad_fake,
    _scatter_logsumexp_grad_backward,
    _logsumexp_grad_setup,
)
