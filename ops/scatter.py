"""torch_scatter's functions with an ``index``: ``import geo.ops as torch_scatter`` runs what was written for it.

Where torch_scatter leaves a case open, these hold: of equal extremes the first row is taken; NaN is an extreme of every
segment that holds one; an index out of range raises IndexError; every result is bitwise the same on each run.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from geo.ops import bounds, segment
from geo.ops.gather_mul import widen
from geo.ops.plan import SegmentPlan, csr_from_index_reference
from geo.ops.rows import Rows, by_index
from geo.ops.segment import Reduce, segment_reduce_reference
from geo.ops.segment_softmax import (
    segment_log_softmax_reference,
    segment_logsumexp_reference,
    segment_softmax_reference,
    segment_std_reference,
)

Rounding = Literal["floor", "trunc"]


def scatter(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce the entries of ``src`` along ``dim`` that have the same ``index``: ``out[i] = reduce(src[index == i])``.

    Integers are reduced exactly, float16 and bfloat16 in float32; bool has "min" (all) and "max" (any). Everything
    floating is differentiable any number of times, with respect to ``out``, too. With ``dim_size`` or ``out`` (whose
    size needs no look at the values) the call compiles in one graph.

    Args:
        src: [..., E, ...], any number of axes.
        index: the segment of each entry, int64, in any order: [E], or one that broadcasts to ``src`` when axes of size
            1 are appended. A :class:`SegmentPlan` in its place keeps the order of an unsorted index for all layers
            and the backward pass.
        dim: the axis that holds E. (default: the last)
        out: [..., N, ...]: reduced into, in place, together with the rows of ``src``, and returned. ("mean" adds, and
            then divides by the number of rows of ``src``.)
        dim_size: N; by default ``index.max() + 1`` (0 for an empty index), which waits for a GPU.
        reduce: "sum" or "add", "mul", "mean", "min" or "max".

    Returns:
        [..., N, ...], of the dtype of ``src``; 0 ("mul": 1) for a segment without rows, or what ``out`` held.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N), or ``dim`` is no axis.
        ValueError: a shape, dtype, device or ``reduce`` that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter
        >>> scatter(torch.tensor([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]]), torch.tensor([2, 0, 2])).tolist()
        [[2.0, 0.0, 5.0], [1.0, 0.0, 2.0]]
    """
    name = REDUCES[check_reduce("scatter", reduce, "mul")]
    return reduced("scatter", name, src, index, dim, out, dim_size, positions=False)[0]


def scatter_sum(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:
    """Sum by index; see :func:`scatter`.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: added to, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...].

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_sum
        >>> scatter_sum(torch.tensor([1, 2, 4]), torch.tensor([2, 0, 2])).tolist()
        [2, 0, 5]
    """
    return reduced("scatter_sum", "sum", src, index, dim, out, dim_size)[0]


def scatter_add(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:
    """The same as :func:`scatter_sum`.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: added to, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...].

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_add
        >>> scatter_add(torch.tensor([1, 2, 4]), torch.tensor([1, 0, 1]), out=torch.tensor([10, 20])).tolist()
        [12, 25]
    """
    return reduced("scatter_add", "sum", src, index, dim, out, dim_size)[0]


def scatter_mul(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:
    """Product by index; see :func:`scatter`. The gradient is exact where factors are 0, too.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: multiplied, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...]; 1 for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_mul
        >>> scatter_mul(torch.tensor([3.0, 2.0, 4.0]), torch.tensor([2, 0, 2])).tolist()
        [2.0, 1.0, 12.0]
    """
    return reduced("scatter_mul", "mul", src, index, dim, out, dim_size)[0]


def scatter_mean(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> Tensor:
    """Mean by index; see :func:`scatter`. Means of integers are rounded down.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: added to and then divided by the number of rows of ``src``, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...]; 0 for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_mean
        >>> scatter_mean(torch.tensor([-1, 2, -4]), torch.tensor([2, 0, 2])).tolist()
        [2, 0, -3]
    """
    return reduced("scatter_mean", "mean", src, index, dim, out, dim_size)[0]


def scatter_min(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimum by index, and where along ``dim`` it stands: the first place of several. See :func:`scatter_max`.

    Args:
        src: [..., E, ...], floating, integer or bool (all).
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: compared with, and overwritten by what is smaller, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        ``(values, positions)``, both [..., N, ...]; 0 and E for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_min
        >>> [t.tolist() for t in scatter_min(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([2, 0, 2]))]
        [[2.0, 0.0, 1.0], [1, 3, 0]]
    """
    return reduced("scatter_min", "min", src, index, dim, out, dim_size)


def scatter_max(
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Maximum by index, and where along ``dim`` it stands: the first place of several. See :func:`scatter`.

    The gradient goes to that place alone. NaN beats every number, as in :func:`torch.max` (torch_scatter drops it).

    Args:
        src: [..., E, ...], floating, integer or bool (any).
        index: int64 [E] or broadcasting to ``src``, or a plan.
        dim: the axis that holds E.
        out: compared with, and overwritten by what is greater, in place; where it stays, the position is E.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        ``(values, positions)``, both [..., N, ...]; 0 and E for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import scatter_max
        >>> [t.tolist() for t in scatter_max(torch.tensor([4.0, 2.0, 4.0]), torch.tensor([2, 0, 2]))]
        [[2.0, 0.0, 4.0], [1, 3, 0]]
    """
    return reduced("scatter_max", "max", src, index, dim, out, dim_size)


def sort_by_index(
    src: Tensor, index: Tensor | SegmentPlan, dim_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows grouped by their index, for the functions that take ``ptr``; inside a segment they keep their order.

    Args:
        src: [E, *F].
        index: int64 [E], or a plan.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        ``(sorted, ptr, perm)`` with ``sorted = src[perm]`` [E, *F] and the rows of segment i
        ``sorted[ptr[i]:ptr[i + 1]]``; ``perm`` is None where ``src`` was sorted already and is itself returned.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_csr, sort_by_index
        >>> rows, ptr, perm = sort_by_index(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]))
        >>> rows.tolist(), segment_csr(rows, ptr, reduce="max").tolist()
        ([2.0, 1.0, 4.0], [2.0, 0.0, 4.0])
    """
    rows = rows_by_index("sort_by_index", src, index, 0, None, dim_size)
    if rows.varying:
        raise ValueError(f"sort_by_index: index must be one vector [E], got {list(src.shape)}")
    order = rows.sorted()
    if order.perm is None:
        return src, order.ptr, None
    return bounds.call("sort_by_index", torch.ops.geo.gather_index, (src, order.perm)), order.ptr, order.perm


# -- the same for the *_coo and *_csr functions ------------------------------------------------------------------------
REDUCES: dict[str, Reduce] = {"sum": "sum", "add": "sum", "mean": "mean", "min": "min", "max": "max", "mul": "mul"}


def check_reduce(op: str, reduce: str, *more: str) -> str:
    """``reduce``, or ValueError where it is none of torch_scatter's."""
    allowed = ("sum", "add", "mean", "min", "max", *more)
    if reduce not in allowed:
        raise ValueError(f"{op}: reduce must be one of {', '.join(map(repr, allowed))}, got {reduce!r}")
    return reduce


def reduced(
    op: str,
    reduce: Reduce,
    src: Tensor,
    index: Tensor | SegmentPlan,
    dim: int,
    out: Tensor | None,
    dim_size: int | None,
    rounding: Rounding = "floor",
    positions: bool = True,
) -> tuple[Tensor, Tensor]:
    """Reduce by index, into ``out`` where it is given: the values, and for min and max their positions (else again)."""
    return reduce_rows(reduce, rows_by_index(op, src, index, dim, out, dim_size), src, out, rounding, positions)


def reduce_rows(
    reduce: Reduce,
    rows: Rows,
    src: Tensor,
    out: Tensor | None,
    rounding: Rounding = "floor",
    positions: bool = True,
) -> tuple[Tensor, Tensor]:
    """Reduce ``src`` by ``rows``, into ``out`` where it is given."""
    op = rows.op
    check_out(rows, out, rows.size, src.dtype)
    if reduce in ("min", "max"):
        return _extreme(rows, src, reduce == "max", out, positions or out is not None)
    refuse_bool(op, src)
    values = rows.flat(src)
    if reduce == "mul":
        result = rows.back(segment.product(values, rows.sorted(), op), rows.size)
        result = result if out is None else out.mul_(result)
        return result, result
    if reduce == "mean" and (out is not None or not src.is_floating_point()):
        # in float32 or int64: neither the sum nor the count need fit into the dtype of src
        wide = rows.total(widen(values) if src.is_floating_point() else values.long())
        result = rows.back(wide, rows.size)
        if out is not None:
            result = result + out
        many = rows.per_segment(rows.counts().clamp(min=1)).to(result.dtype)
        result = result.div(many, rounding_mode=None if src.is_floating_point() else rounding)
        result = result.to(src.dtype) if out is None else out.copy_(result)
        return result, result
    result = rows.back(rows.total(values, reduce == "mean"), rows.size)
    result = result if out is None else out.add_(result)
    return result, result


def _extreme(rows: Rows, src: Tensor, largest: bool, out: Tensor | None, positions: bool) -> tuple[Tensor, Tensor]:
    values = rows.flat(src.to(torch.uint8) if src.dtype == torch.bool else src)
    if not positions:
        value = rows.back(rows.extreme_value(values, largest).to(src.dtype), rows.size)
        return value, value
    value, arg = rows.extreme(values, largest)
    value, arg = rows.back(value.to(src.dtype), rows.size), rows.back(rows.positions(arg), rows.size)
    if out is None:
        return value, arg
    wins = (value > out if largest else value < out) | ((value != value) & (out == out))
    wins = wins & (arg < rows.num_rows)
    return out.copy_(torch.where(wins, value, out)), torch.where(wins, arg, rows.num_rows)


def rows_by_index(
    op: str, src: Tensor, index: Tensor | SegmentPlan, dim: int, out: Tensor | None, dim_size: int | None
) -> Rows:
    """:func:`by_index` for the public functions; ``out`` decides over ``dim_size``."""
    bounds.refuse_functorch(op, "scatter_reference")
    if out is not None:
        if out.dim() != src.dim():
            raise ValueError(f"{op}: out must have the {src.dim()} axes of src, got {list(out.shape)}")
        dim_size = out.size(dim)
    return by_index(op, src, index, dim, dim_size)


def check_out(rows: Rows, out: Tensor | None, num: int, dtype: torch.dtype) -> None:
    """Refuse an ``out`` that is not of the shape (``num`` along dim), dtype and device of the result."""
    if out is None:
        return
    axis = rows.axes[rows.varying]
    shape = [*rows.shape[:axis], num, *rows.shape[axis + 1 :]]
    if list(out.shape) != shape or out.dtype != dtype:
        raise ValueError(f"{rows.op}: out must be {dtype} {shape}, got {out.dtype} {list(out.shape)}")
    if out.device != rows.device:
        raise ValueError(f"{rows.op}: out is on {out.device}, src on {rows.device}: they must be on one device")


def refuse_bool(op: str, src: Tensor) -> None:
    """Refuse what has no sum, product or deviation."""
    if src.dtype == torch.bool:
        raise ValueError(f"{op}: src is bool, which has only min and max: cast it, for example src.long()")


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def scatter_reference(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """The functions by index in plain PyTorch, which works under torch.func; ``src`` is floating.

    ``reduce`` is one of :func:`scatter`'s, "std", "logsumexp", "softmax" or "log_softmax". For ``segment_*_coo`` pass
    ``dim = index.dim() - 1``.
    """
    rows = by_index("scatter_reference", src, index, dim, dim_size)
    assert rows.segments is not None
    bounds.check_index("scatter_reference", "index", rows.segments, rows.copies * rows.size)
    ptr, perm = csr_from_index_reference(rows.segments, rows.copies * rows.size)
    return reference(reduce, rows, rows.flat(src).index_select(0, perm), ptr, perm)


def reference(reduce: str, rows: Rows, values: Tensor, ptr: Tensor, perm: Tensor | None = None) -> Tensor:
    """Reduce rows that stand in the order of ``ptr`` and, for what has one value a row, put them back."""
    if reduce in ("softmax", "log_softmax"):
        by_row = (segment_softmax_reference if reduce == "softmax" else segment_log_softmax_reference)(values, ptr)
        return rows.back(by_row if perm is None else by_row.index_select(0, perm.argsort()), rows.num_rows)
    if reduce == "logsumexp":
        out = segment_logsumexp_reference(values, ptr)
        return rows.back(torch.where(out == float("-inf"), 0, out), rows.size)
    if reduce == "std":
        freedom = rows.per_segment((ptr.diff() - 1).clamp(min=1).to(values.dtype))
        return rows.back(segment_std_reference(values, ptr), rows.size) * (freedom / (freedom + 1e-6)).sqrt()
    return rows.back(
        segment_reduce_reference(values, ptr, REDUCES[check_reduce("reference", reduce, "mul")]), rows.size
    )
