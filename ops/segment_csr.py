"""torch_scatter's functions of sorted segments: ``*_csr`` with a ``ptr``, ``*_coo`` with the segment of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.plan import SegmentPlan, index_from_csr
from geo.ops.rows import Rows, by_index, by_ptr
from geo.ops.scatter import REDUCES, check_out, check_reduce, reduce_rows, reduced, reference
from geo.ops.segment import Reduce


def segment_csr(src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """Reduce segments of consecutive entries: ``out[i] = reduce(src[indptr[i]:indptr[i + 1]])``.

    The segments run along the last axis of ``indptr``. Integers are reduced exactly (means rounded towards 0), float16
    and bfloat16 in float32; bool has "min" (all) and "max" (any). Differentiable any number of times.

    Args:
        src: [..., E, ...].
        indptr: int64 [N + 1], or [..., N + 1] with leading axes of the sizes of ``src`` or of size 1; along the last
            axis each rises from 0 to E. An empty one means no segments. A :class:`SegmentPlan` may stand in its place,
            for axis 0.
        out: [..., N, ...]: overwritten and returned.
        reduce: "sum" or "add", "mean", "min" or "max".

    Returns:
        [..., N, ...], of the dtype of ``src``; 0 for an empty segment.

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype, device or ``reduce`` that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_csr
        >>> segment_csr(torch.tensor([[1, 2, 4], [1, 1, 1]]), torch.tensor([[0, 2, 2, 3]])).tolist()
        [[3, 0, 4], [2, 0, 1]]
    """
    return _csr("segment_csr", REDUCES[check_reduce("segment_csr", reduce)], src, indptr, out, positions=False)[0]


def segment_sum_csr(src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None) -> Tensor:
    """Sum of each segment; see :func:`segment_csr`.

    Args:
        src: [..., E, ...], floating or integer.
        indptr: int64 [..., N + 1], or a plan.
        out: overwritten and returned.

    Returns:
        [..., N, ...].

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_sum_csr
        >>> segment_sum_csr(torch.tensor([1, 2, 4]), torch.tensor([0, 2, 2, 3])).tolist()
        [3, 0, 4]
    """
    return _csr("segment_sum_csr", "sum", src, indptr, out)[0]


def segment_add_csr(src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None) -> Tensor:
    """The same as :func:`segment_sum_csr`.

    Args:
        src: [..., E, ...], floating or integer.
        indptr: int64 [..., N + 1], or a plan.
        out: overwritten and returned.

    Returns:
        [..., N, ...].

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_add_csr
        >>> segment_add_csr(torch.tensor([1, 2, 4]), torch.tensor([0, 2, 2, 3])).tolist()
        [3, 0, 4]
    """
    return _csr("segment_add_csr", "sum", src, indptr, out)[0]


def segment_mean_csr(src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None) -> Tensor:
    """Mean of each segment; see :func:`segment_csr`. Means of integers are rounded towards 0.

    Args:
        src: [..., E, ...], floating or integer.
        indptr: int64 [..., N + 1], or a plan.
        out: overwritten and returned.

    Returns:
        [..., N, ...].

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_mean_csr
        >>> segment_mean_csr(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [1.5, 0.0, 4.0]
    """
    return _csr("segment_mean_csr", "mean", src, indptr, out)[0]


def segment_min_csr(src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minimum of each segment and its (first) position along the axis of E; see :func:`segment_max_csr`.

    Args:
        src: [..., E, ...], floating, integer or bool (all).
        indptr: int64 [..., N + 1], or a plan.
        out: overwritten and returned as the values.

    Returns:
        ``(values, positions)``, both [..., N, ...]; 0 and E for an empty segment.

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_min_csr
        >>> [t.tolist() for t in segment_min_csr(torch.tensor([1, 1, 4]), torch.tensor([0, 2, 2, 3]))]
        [[1, 0, 4], [0, 3, 2]]
    """
    return _csr("segment_min_csr", "min", src, indptr, out)


def segment_max_csr(src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Maximum of each segment and its (first) position along the axis of E; see :func:`segment_csr`.

    The gradient goes to that place alone. NaN beats every number.

    Args:
        src: [..., E, ...], floating, integer or bool (any).
        indptr: int64 [..., N + 1], or a plan.
        out: overwritten and returned as the values.

    Returns:
        ``(values, positions)``, both [..., N, ...]; 0 and E for an empty segment.

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_max_csr
        >>> [t.tolist() for t in segment_max_csr(torch.tensor([1, 2, 4]), torch.tensor([0, 2, 2, 3]))]
        [[2, 0, 4], [1, 3, 2]]
    """
    return _csr("segment_max_csr", "max", src, indptr, out)


def gather_csr(
    src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None = None, *, num_out: int | None = None
) -> Tensor:
    """Repeat each entry over its segment: ``out[e] = src[i]`` for ``indptr[i] <= e < indptr[i + 1]``.

    Args:
        src: [..., N, ...].
        indptr: int64 [N + 1], or [..., N + 1] with leading axes of the sizes of ``src`` or of size 1; along the last
            axis each rises from 0 to E. Or a :class:`SegmentPlan`, for axis 0.
        out: [..., E, ...]: overwritten and returned.
        num_out: E; by default the last entry of ``indptr``, which waits for a GPU and cannot be compiled.

    Returns:
        [..., E, ...].

    Raises:
        IndexError: ``indptr`` does not rise from 0 to E.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import gather_csr
        >>> gather_csr(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [5.0, 5.0, 7.0]
    """
    bounds.refuse_functorch("gather_csr", "gather_csr_reference")
    return _spread(_gather_rows("gather_csr", src, indptr, out, num_out), src, out)


def segment_coo(
    src: Tensor,
    index: Tensor | SegmentPlan,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """Reduce the entries with the same index along the last axis of ``index``.

    What :func:`scatter` does along ``dim = index.dim() - 1``, with torch_scatter's name for a sorted index; one that is
    not sorted is right, too. Means of integers are rounded towards 0.

    Args:
        src: [..., E, ...].
        index: int64 [E], or [..., E] with leading axes of the sizes of ``src`` or of size 1, or a
            :class:`SegmentPlan`, for axis 0.
        out: [..., N, ...]: reduced into, in place, together with ``src``, and returned.
        dim_size: N; by default ``index.max() + 1`` (0 for an empty index), which waits for a GPU.
        reduce: "sum" or "add", "mean", "min" or "max".

    Returns:
        [..., N, ...], of the dtype of ``src``; 0 for a segment without rows, or what ``out`` held.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype, device or ``reduce`` that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_coo
        >>> segment_coo(torch.tensor([[1, 2, 4], [1, 1, 1]]), torch.tensor([[0, 0, 2]])).tolist()
        [[3, 0, 4], [2, 0, 1]]
    """
    return _coo("segment_coo", REDUCES[check_reduce("segment_coo", reduce)], src, index, out, dim_size)[0]


def segment_sum_coo(
    src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Sum by index; see :func:`segment_coo`.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [..., E], or a plan.
        out: added to, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...].

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_sum_coo
        >>> segment_sum_coo(torch.tensor([1, 2, 4]), torch.tensor([0, 0, 2])).tolist()
        [3, 0, 4]
    """
    return _coo("segment_sum_coo", "sum", src, index, out, dim_size)[0]


def segment_add_coo(
    src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """The same as :func:`segment_sum_coo`.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [..., E], or a plan.
        out: added to, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...].

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_add_coo
        >>> segment_add_coo(torch.tensor([1, 2, 4]), torch.tensor([0, 0, 2])).tolist()
        [3, 0, 4]
    """
    return _coo("segment_add_coo", "sum", src, index, out, dim_size)[0]


def segment_mean_coo(
    src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Mean by index; see :func:`segment_coo`. Means of integers are rounded towards 0.

    Args:
        src: [..., E, ...], floating or integer.
        index: int64 [..., E], or a plan.
        out: added to and then divided by the number of rows of ``src``, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        [..., N, ...].

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_mean_coo
        >>> segment_mean_coo(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2])).tolist()
        [1.5, 0.0, 4.0]
    """
    return _coo("segment_mean_coo", "mean", src, index, out, dim_size)[0]


def segment_min_coo(
    src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Minimum by index and its (first) position along the axis of E; see :func:`segment_max_coo`.

    Args:
        src: [..., E, ...], floating, integer or bool (all).
        index: int64 [..., E], or a plan.
        out: compared with, and overwritten by what is smaller, in place.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        ``(values, positions)``, both [..., N, ...]; 0 and E for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_min_coo
        >>> [t.tolist() for t in segment_min_coo(torch.tensor([1, 1, 4]), torch.tensor([0, 0, 2]))]
        [[1, 0, 4], [0, 3, 2]]
    """
    return _coo("segment_min_coo", "min", src, index, out, dim_size)


def segment_max_coo(
    src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Maximum by index and its (first) position along the axis of E; see :func:`segment_coo`.

    The gradient goes to that place alone. NaN beats every number.

    Args:
        src: [..., E, ...], floating, integer or bool (any).
        index: int64 [..., E], or a plan.
        out: compared with, and overwritten by what is greater, in place; where it stays, the position is E.
        dim_size: N. (default: ``index.max() + 1``)

    Returns:
        ``(values, positions)``, both [..., N, ...]; 0 and E for a segment without rows.

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import segment_max_coo
        >>> [t.tolist() for t in segment_max_coo(torch.tensor([1, 2, 4]), torch.tensor([0, 0, 2]))]
        [[2, 0, 4], [1, 3, 2]]
    """
    return _coo("segment_max_coo", "max", src, index, out, dim_size)


def gather_coo(src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None = None) -> Tensor:
    """Entries of ``src`` by index, along the last axis of ``index``: ``out[e] = src[index[e]]``. In any order.

    Args:
        src: [..., N, ...].
        index: int64 [E], or [..., E] with leading axes of the sizes of ``src`` or of size 1, or a
            :class:`SegmentPlan`, for axis 0.
        out: [..., E, ...]: overwritten and returned.

    Returns:
        [..., E, ...].

    Raises:
        IndexError: an entry of ``index`` is not in [0, N).
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from geo.ops import gather_coo
        >>> gather_coo(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 0, 2])).tolist()
        [5.0, 5.0, 7.0]
    """
    bounds.refuse_functorch("gather_coo", "gather_coo_reference")
    return _spread(_gather_coo_rows(src, index), src, out)


# -- what they share ---------------------------------------------------------------------------------------------------
def _csr(
    op: str,
    reduce: Reduce,
    src: Tensor,
    indptr: Tensor | SegmentPlan,
    out: Tensor | None,
    positions: bool = True,
) -> tuple[Tensor, Tensor]:
    bounds.refuse_functorch(op, "segment_csr_reference")
    rows = by_ptr(op, src, indptr)
    check_out(rows, out, rows.size, src.dtype)
    value, arg = reduce_rows(reduce, rows, src, None, "trunc", positions)
    return (value if out is None else out.copy_(value)), arg


def _coo(
    op: str, reduce: Reduce, src: Tensor, index: Tensor | SegmentPlan, out: Tensor | None, dim_size: int | None
) -> tuple[Tensor, Tensor]:
    return reduced(op, reduce, src, index, _last_axis(op, src, index), out, dim_size, "trunc")


def _last_axis(op: str, src: Tensor, index: Tensor | SegmentPlan) -> int:
    if isinstance(index, SegmentPlan):
        return 0
    if not 1 <= index.dim() <= src.dim():
        raise ValueError(
            f"{op}: index must have 1 to {src.dim()} axes, got {list(index.shape)} for src {list(src.shape)}"
        )
    return index.dim() - 1


def _gather_rows(op: str, src: Tensor, indptr: Tensor | SegmentPlan, out: Tensor | None, num_out: int | None) -> Rows:
    if isinstance(indptr, SegmentPlan):
        num_out = indptr.index.size(0)
    elif num_out is None:
        if out is not None and 1 <= indptr.dim() <= out.dim():
            num_out = out.size(indptr.dim() - 1)
        else:
            num_out = int(indptr.flatten()[-1]) if indptr.numel() else 0
    return by_ptr(op, src, indptr, num_out)


def _gather_coo_rows(src: Tensor, index: Tensor | SegmentPlan) -> Rows:
    axis = _last_axis("gather_coo", src, index)
    size = src.size(axis) if src.dim() and not isinstance(index, SegmentPlan) else None
    return by_index("gather_coo", src, index, axis, size, gather=True)


def _spread(rows: Rows, src: Tensor, out: Tensor | None) -> Tensor:
    check_out(rows, out, rows.num_rows, src.dtype)
    values = rows.flat(src.to(torch.uint8) if src.dtype == torch.bool else src)
    result = rows.back(rows.spread(values).to(src.dtype), rows.num_rows)
    return result if out is None else out.copy_(result)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def segment_csr_reference(src: Tensor, indptr: Tensor, reduce: str = "sum") -> Tensor:
    """:func:`segment_csr` in plain PyTorch; ``reduce`` as in :func:`scatter_reference`."""
    rows = by_ptr("segment_csr_reference", src, indptr)
    assert rows.order is not None
    return reference(reduce, rows, rows.flat(src), rows.order.ptr)


def gather_csr_reference(src: Tensor, indptr: Tensor, num_out: int | None = None) -> Tensor:
    """:func:`gather_csr` in plain PyTorch."""
    rows = _gather_rows("gather_csr_reference", src, indptr, None, num_out)
    assert rows.order is not None
    index = index_from_csr(rows.order.ptr, None, rows.copies * rows.num_rows)
    return rows.back(rows.flat(src).index_select(0, index), rows.num_rows)


def gather_coo_reference(src: Tensor, index: Tensor) -> Tensor:
    """:func:`gather_coo` in plain PyTorch."""
    rows = _gather_coo_rows(src, index)
    assert rows.segments is not None
    return rows.back(rows.flat(src).index_select(0, rows.segments), rows.num_rows)
