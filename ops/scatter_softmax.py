"""torch_scatter's composite functions: softmax, log-softmax, log-sum-exp and standard deviation by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geo.ops import bounds, segment
from geo.ops.gather_mul import widen
from geo.ops.plan import SegmentPlan
from geo.ops.rows import Rows, call_by_index
from geo.ops.scatter import check_out, refuse_bool, rows_by_index

_NARROW = 1  # columns: as takes_rows_in_order in csrc/cpu/scatter_softmax.cpp
_NO_EPS = 1e-12  # torch_scatter's default eps: added to a sum that is at least 1, it moves no digit that counts


def scatter_std(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    unbiased: bool = True,
) -> Tensor:
    r"""Standard deviation by index, :math:`\sqrt{\sum_e (x_e - \bar x_i)^2 / (\max(n_i - 1, 1) + 10^{-6})}`.

    The :math:`10^{-6}` is torch_scatter's; :func:`segment_std` has none. Where the deviation is 0 so is the gradient.

    Args:
        src: [..., E, ...]; integers are taken as floating numbers.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: the sums of squares are added to it, in place, and the result computed from it.
        dim_size: N. (default: ``index.max() + 1``)
        unbiased: divide by :math:`n - 1` in place of :math:`n`. (default: ``True``)

    Returns:
        [..., N, ...]; 0 for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_std
        >>> out = scatter_std(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([2, 0, 2]), unbiased=False)
        >>> out.round(decimals=4).tolist()
        [0.0, 0.0, 1.0]
    """
    op = "scatter_std"
    rows = rows_by_index(op, src, index, dim, out, dim_size)
    refuse_bool(op, src)
    if not src.is_floating_point():
        src = src.to(torch.get_default_dtype())
    check_out(rows, out, rows.size, src.dtype)
    order = rows.sorted()
    values = rows.flat(src)
    std, _ = bounds.call(op, torch.ops.geo.segment_std, (values, *order, unbiased), order.checks(values.size(0)))
    freedom = rows.per_segment((rows.counts() - int(unbiased)).clamp(min=1).to(widen(src).dtype))
    std = rows.back(std, rows.size)
    if out is None:
        return std * (freedom / (freedom + 1e-6)).sqrt().to(std.dtype)
    out.add_((widen(std).square() * freedom).to(out.dtype))
    return (widen(out) / (freedom + 1e-6)).sqrt().to(out.dtype)


def scatter_logsumexp(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    eps: float = 1e-12,
) -> Tensor:
    r"""Logarithm of the sum of exponentials by index, :math:`m_i + \log(\sum_e \exp(x_e - m_i) + \epsilon)`.

    Here :math:`m_i` is the maximum of the segment, so nothing overflows. A segment of -inf alone gives 0, as in
    torch_scatter (:func:`segment_logsumexp` gives -inf); +inf and NaN come through.

    Args:
        src: [..., E, ...], floating.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: taken as one summand more of each segment that has rows, and overwritten.
        dim_size: N. (default: ``index.max() + 1``)
        eps: added to a sum that is at least 1; up to the default it makes no difference and is left out.

    Returns:
        [..., N, ...]; 0 for a segment without rows, or what ``out`` held.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_logsumexp
        >>> scatter_logsumexp(torch.zeros(3), torch.tensor([2, 0, 2])).exp().tolist()
        [1.0, 1.0, 2.0]
    """
    op = "scatter_logsumexp"
    rows = rows_by_index(op, src, index, dim, out, dim_size)
    _check_floating(op, src)
    check_out(rows, out, rows.size, src.dtype)
    values = rows.flat(src)
    if (segments := _taken_in_order(rows, values, eps)) is not None:
        size = rows.copies * rows.size
        total = call_by_index(op, torch.ops.geo.scatter_logsumexp, (values, segments, size), segments, size)
    else:
        order = rows.sorted()
        total = bounds.call(op, torch.ops.geo.segment_logsumexp, (values, *order), order.checks(values.size(0)))
    if eps > _NO_EPS:
        top = segment.extreme(values, order, True, op)[0].to(total.dtype)
        filled = (rows.counts() > 0).view(-1, *[1] * (total.dim() - 1)) & total.isfinite()
        total = total + torch.where(filled, eps * torch.where(filled, top - total, 0).exp(), 0).log1p()
    total = rows.back(total, rows.size)
    if out is None:
        return torch.where(total == float("-inf"), 0, total).to(src.dtype)
    empty = rows.per_segment(rows.counts() == 0)
    return out.copy_(torch.where(empty, out, torch.logaddexp(out.to(total.dtype, copy=True), total).to(out.dtype)))


def scatter_softmax(src: Tensor, index: Tensor | SegmentPlan, dim: int = -1, dim_size: int | None = None) -> Tensor:
    r"""Softmax over the entries with the same index: :math:`\exp(x_e - m_i) / \sum_{e' \in i} \exp(x_{e'} - m_i)`.

    Args:
        src: [..., E, ...], floating; float16 and bfloat16 are computed in float32.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., E, ...], of the dtype of ``src``.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_softmax
        >>> scatter_softmax(torch.tensor([0.0, 7.0, 0.0]), torch.tensor([2, 0, 2])).tolist()
        [0.5, 1.0, 0.5]
    """
    return _normalised("scatter_softmax", src, index, dim, dim_size, False, 0.0)


def scatter_log_softmax(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    eps: float = 1e-12,
    dim_size: int | None = None,
) -> Tensor:
    r"""Logarithm of :func:`scatter_softmax`: :math:`x_e - m_i - \log(\sum_{e' \in i} \exp(x_{e'} - m_i) + \epsilon)`.

    Args:
        src: [..., E, ...], floating; float16 and bfloat16 are computed in float32.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        eps: added to a sum that is at least 1; up to the default it makes no difference and is left out.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., E, ...], of the dtype of ``src``.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_log_softmax
        >>> scatter_log_softmax(torch.tensor([3.0, 7.0]), torch.tensor([1, 0])).tolist()
        [0.0, 0.0]
    """
    return _normalised("scatter_log_softmax", src, index, dim, dim_size, True, eps)


def _normalised(
    op: str, src: Tensor, index: Tensor | SegmentPlan, dim: int, dim_size: int | None, log: bool, eps: float
) -> Tensor:
    rows = rows_by_index(op, src, index, dim, None, dim_size)
    _check_floating(op, src)
    values = rows.flat(src)
    if (segments := _taken_in_order(rows, values, eps)) is not None:
        size = rows.copies * rows.size
        out = call_by_index(op, torch.ops.geo.scatter_softmax, (values, segments, size, log), segments, size)
        return rows.back(out, rows.num_rows)
    order = rows.sorted()
    out = bounds.call(op, torch.ops.geo.segment_softmax, (values, *order, log), order.checks(values.size(0)))
    if eps > _NO_EPS:
        top = segment.extreme(out, order, True, op)[0]
        out = out - rows.spread((eps * top.exp()).log1p())
    return rows.back(out, rows.num_rows)


def _taken_in_order(rows: Rows, values: Tensor, eps: float) -> Tensor | None:
    """The segment of each row, where that is all that is needed: narrow rows are not sorted first."""
    narrow = rows.order is None and eps <= _NO_EPS and math.prod(values.shape[1:]) <= _NARROW
    return rows.segments if narrow else None


def _check_floating(op: str, src: Tensor) -> None:
    if not src.is_floating_point():
        raise ValueError(f"{op}: src must be floating, got {src.dtype}")
