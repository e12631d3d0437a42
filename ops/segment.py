"""Reductions over segments of rows, and the gather that is their transpose.

Segment i of ``src`` is the rows ``ptr[i]:ptr[i + 1]``, or, with a :class:`SegmentPlan`, ``perm[ptr[i]:ptr[i + 1]]``.
Sums go in a fixed order whatever the number of threads.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import widen
from geo.ops.plan import SegmentPlan, index_from_csr
from geo.ops.registration import define

Reduce = Literal["sum", "mean", "mul", "min", "max"]


def segment_reduce(src: Tensor, ptr: Tensor | SegmentPlan, reduce: Reduce = "sum") -> Tensor:
    """Reduce each segment of rows to one row: ``out[i] = reduce(src[ptr[i]:ptr[i + 1]])``.

    Empty segments give 0 (``"mul"``: 1). ``"min"`` and ``"max"`` hand their gradient to the first row that attains the
    extreme, and let NaN through. float16 and bfloat16 are summed in float32. Rows that are not sorted by segment are
    reduced where they lie, with a :class:`SegmentPlan` in place of ``ptr``. Differentiable any number of times.

    Args:
        src: [E, *F], floating; for sum, mul, min and max also integer.
        ptr: int64 [N + 1], rising from 0 to E, or the plan of the segment of each row.
        reduce: "sum", "mean", "mul", "min" or "max".

    Returns:
        [N, *F], of the dtype of ``src``.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape, dtype or ``reduce``.

    Example:
        >>> import torch
        >>> from geo.ops import SegmentPlan, segment_reduce
        >>> segment_reduce(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3]), "mean").tolist()
        [1.5, 0.0, 4.0]
        >>> segment_reduce(torch.tensor([1.0, 2.0, 4.0]), SegmentPlan(torch.tensor([1, 0, 1])), "sum").tolist()
        [2.0, 5.0]
    """
    if reduce not in ("sum", "mean", "mul", "min", "max"):
        raise ValueError(f"segment_reduce: reduce must be 'sum', 'mean', 'mul', 'min' or 'max', got {reduce!r}")
    order = csr_order("segment_reduce", src, ptr)
    if reduce == "mean" and not src.is_floating_point():
        raise ValueError(f"segment_reduce: src must be floating for reduce='mean', got {src.dtype}")
    if reduce in ("min", "max"):
        return extreme_value(src, order, reduce == "max", "segment_reduce")
    if reduce == "mul":
        return product(src, order, "segment_reduce")
    return total(src, order, reduce == "mean", "segment_reduce")


# -- the same for the other functions of this folder -------------------------------------------------------------------
class Order(NamedTuple):
    """Which rows belong to which segment: segment i holds the rows ``perm[ptr[i]:ptr[i + 1]]``.

    ``perm`` is None where rows are sorted; ``rows``, where at hand, is the segment of each row.
    """

    ptr: Tensor
    perm: Tensor | None = None
    rows: Tensor | None = None

    @property
    def num_segments(self) -> int:
        """N."""
        return self.ptr.size(0) - 1

    def checks(self, num_rows: int) -> tuple[tuple[str, Tensor | None, int], ...]:
        """What :func:`bounds.call` looks up when a CUDA kernel noted a bad entry."""
        return (
            ("ptr", self.ptr, num_rows),
            ("edge_perm", self.perm, num_rows - 1),
            ("dst_index", self.rows, self.num_segments - 1),
        )


def csr_order(op: str, src: Tensor, ptr: Tensor | SegmentPlan) -> Order:
    """The order that a caller's ``ptr`` means, and a refusal of what does not fit ``src``."""
    if src.dim() < 1:
        raise ValueError(f"{op}: src must have one row per edge [E, *F], got a scalar")
    if isinstance(ptr, SegmentPlan):
        if ptr.index.size(0) != src.size(0):
            raise ValueError(f"{op}: src has {src.size(0)} rows, the plan was built for {ptr.index.size(0)}")
        order = Order(ptr.ptr, ptr.perm, ptr.index)
    else:
        if ptr.dim() != 1 or ptr.size(0) < 1 or ptr.dtype != torch.int64:
            raise ValueError(f"{op}: ptr must be int64 [N + 1], got {ptr.dtype} {list(ptr.shape)}")
        order = Order(ptr)
    if src.device != order.ptr.device:
        raise ValueError(f"{op}: src is on {src.device}, ptr on {order.ptr.device}: they must be on one device")
    if src.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(f"{op}: src must be floating or integer, got {src.dtype}")
    return order


def total(src: Tensor, order: Order, mean: bool, op: str) -> Tensor:
    """Sum (or mean) of each segment, [N, *F]."""
    if not src.is_floating_point():
        _check_integers(op, order, src.size(0))
        return _segment_sum(src, order, mean)
    out: Tensor = bounds.call(op, torch.ops.geo.segment_sum, (src, *order, mean), order.checks(src.size(0)))
    return out


def extreme(src: Tensor, order: Order, largest: bool, op: str) -> tuple[Tensor, Tensor]:
    """Largest (smallest) of each segment and its row, [N, *F] both; 0 and E for an empty segment."""
    if not src.is_floating_point():
        _check_integers(op, order, src.size(0))
        return _segment_extreme(src, order, largest)
    out: tuple[Tensor, Tensor]
    if _ranks_in_place(src, order):
        out = bounds.call(op, torch.ops.geo.scatter_extreme, (src, order.rows, order.num_segments, largest), ())
    else:
        args = (src, order.ptr, order.perm, largest)
        out = bounds.call(op, torch.ops.geo.segment_extreme, args, order.checks(src.size(0)))
    return out


def extreme_value(src: Tensor, order: Order, largest: bool, op: str) -> Tensor:
    """Largest (smallest) of each segment, [N, *F], without its row, unless a gradient needs that."""
    differentiable = torch.is_grad_enabled() and src.requires_grad
    if differentiable or not src.is_floating_point() or _ranks_in_place(src, order):
        return extreme(src, order, largest, op)[0]
    args = (src, order.ptr, order.perm, largest)
    out: Tensor = bounds.call(op, torch.ops.geo.segment_extreme_value, args, order.checks(src.size(0)))
    return out


def _ranks_in_place(src: Tensor, order: Order) -> bool:
    """Whether the CPU kernel by index, which goes through narrow rows in the order they stand, beats that by perm."""
    unsorted = order.perm is not None and order.rows is not None
    return unsorted and src.is_cpu and src.dtype != torch.float64 and math.prod(src.shape[1:]) <= 4


def product(src: Tensor, order: Order, op: str) -> Tensor:
    """Product of each segment, [N, *F]; 1 for an empty one."""
    if not src.is_floating_point():
        _check_integers(op, order, src.size(0))
        return product_reference(src, order)
    out: Tensor = bounds.call(op, torch.ops.geo.segment_prod, (src, *order), order.checks(src.size(0)))
    return out


def spread(src: Tensor, order: Order, num_rows: int, op: str) -> Tensor:
    """Each row ``src[i]`` at all rows of segment i, [E, *F]: the transpose of :func:`total`."""
    if not src.is_floating_point():
        _check_integers(op, order, num_rows)
        return _spread(src, order, num_rows)
    out: Tensor = bounds.call(op, torch.ops.geo.gather_csr, (src, *order, num_rows), order.checks(num_rows))
    return out


def _check_integers(op: str, order: Order, num_rows: int) -> None:
    """Integers have no compiled kernels; in a traced graph, where values cannot be read, torch's own ops check."""
    if not torch.compiler.is_compiling():
        bounds.refuse_functorch(op)
        check_order(op, order, num_rows)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def segment_reduce_reference(src: Tensor, ptr: Tensor | SegmentPlan, reduce: Reduce = "sum") -> Tensor:
    """:func:`segment_reduce` in plain PyTorch."""
    order = csr_order("segment_reduce", src, ptr)
    if reduce in ("sum", "mean"):
        return _segment_sum(src, order, reduce == "mean")
    return product_reference(src, order) if reduce == "mul" else _segment_extreme(src, order, reduce == "max")[0]


def rows_of(order: Order, num_rows: int) -> Tensor:
    """The segment of each row [E]."""
    return index_from_csr(order.ptr, order.perm, num_rows) if order.rows is None else order.rows


def count_of(ptr: Tensor, like: Tensor) -> Tensor:
    """The length of each segment, at least 1, shaped to divide ``like`` [N, *F]."""
    return ptr.diff().clamp(min=1).to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _segment_sum(src: Tensor, order: Order, mean: bool) -> Tensor:
    wide = widen(src)
    out = wide.new_zeros(order.num_segments, *src.shape[1:]).index_add(0, rows_of(order, src.size(0)), wide)
    return (out / count_of(order.ptr, out) if mean else out).to(src.dtype)


def _spread(src: Tensor, order: Order, num_rows: int) -> Tensor:
    return src.index_select(0, rows_of(order, num_rows))


def product_reference(src: Tensor, order: Order) -> Tensor:
    """:func:`product` in plain PyTorch."""
    wide = widen(src)
    rows = _expand(rows_of(order, src.size(0)), src)
    return wide.new_ones(order.num_segments, *src.shape[1:]).scatter_reduce(0, rows, wide, "prod").to(src.dtype)


def _segment_extreme(src: Tensor, order: Order, largest: bool) -> tuple[Tensor, Tensor]:
    num_rows = src.size(0)
    rows = _expand(rows_of(order, num_rows), src)
    detached = src.detach()
    extreme = detached.new_zeros(order.num_segments, *src.shape[1:]).scatter_reduce(
        0, rows, detached, "amax" if largest else "amin", include_self=False
    )
    attained = extreme.gather(0, rows)
    hit = (detached == attained) | ((detached != detached) & (attained != attained))
    position = _expand(torch.arange(num_rows, device=src.device), src)
    arg = torch.full(extreme.shape, num_rows, dtype=torch.int64, device=src.device).scatter_reduce(
        0, rows, torch.where(hit, position, num_rows), "amin"
    )
    return _take(src, arg), arg


def _expand(index: Tensor, src: Tensor) -> Tensor:
    return index.view(-1, *[1] * (src.dim() - 1)).expand_as(src)


def _take(src: Tensor, arg: Tensor) -> Tensor:
    """``src[arg]`` along rows, 0 where ``arg`` is the number of rows."""
    if src.size(0) == 0:
        return src.new_zeros(arg.shape)
    return torch.where(arg < src.size(0), src.gather(0, arg.clamp(max=src.size(0) - 1)), 0)


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def check_order(op: str, order: Order, num_rows: int) -> None:
    """What the compiled kernels check while they read, for the plain ones."""
    bounds.check_ptr(op, order.ptr, num_rows)
    if order.perm is not None:
        bounds.check_index(op, "edge_perm", order.perm, num_rows)
    if order.rows is not None:
        bounds.check_index(op, "dst_index", order.rows, order.num_segments)


def _segment_sum_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, mean: bool) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_sum", order, src.size(0))
    return _segment_sum(src, order, mean)


def per_segment(src: Tensor, ptr: Tensor, *_: Any) -> Tensor:
    """Fake of an op that gives one row per segment."""
    torch._check(src.dim() >= 1 and ptr.dim() == 1)
    return src.new_empty(ptr.size(0) - 1, *src.shape[1:])


def _segment_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    src, ptr, perm, index, ctx.mean = inputs
    ctx.save_for_backward(ptr, perm, index)
    ctx.num_rows = src.size(0)


def _segment_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ptr, perm, index = ctx.saved_tensors
    scaled = grad / count_of(ptr, grad) if ctx.mean else grad
    return torch.ops.geo.gather_csr(scaled, ptr, perm, index, ctx.num_rows), None, None, None, None


def _gather_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, num_out: int) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("gather_csr", order, num_out)
    return _spread(src, order, num_out)


def _gather_fake(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None, num_out: int) -> Tensor:
    torch._check(src.dim() >= 1 and ptr.dim() == 1)
    torch._check(src.size(0) == ptr.size(0) - 1)
    return src.new_empty(num_out, *src.shape[1:])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:4])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.geo.segment_sum(grad, *ctx.saved_tensors, False), None, None, None, None


def _extreme_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    order = Order(ptr, perm)
    check_order("segment_extreme", order, src.size(0))
    return _segment_extreme(src, order, largest)


def _extreme_fake(src: Tensor, ptr: Tensor, perm: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    out = per_segment(src, ptr)
    return out, ptr.new_empty(out.shape)


def _scatter_extreme_kernel(src: Tensor, index: Tensor, size: int, largest: bool) -> tuple[Tensor, Tensor]:
    bounds.check_index("scatter_extreme", "index", index, size)
    ptr, perm = torch.ops.geo.csr_from_index(index, size)
    out: tuple[Tensor, Tensor] = torch.ops.geo.segment_extreme(src, ptr, perm, largest)
    return out


def _scatter_extreme_fake(src: Tensor, index: Tensor, size: int, largest: bool) -> tuple[Tensor, Tensor]:
    torch._check(src.dim() >= 1 and index.dim() == 1)
    out = src.new_empty(size, *src.shape[1:])
    return out, index.new_empty(out.shape)


def _extreme_value_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, largest: bool) -> Tensor:
    out: tuple[Tensor, Tensor] = torch.ops.geo.segment_extreme(src, ptr, perm, largest)
    return out[0]


def _extreme_value_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    src, ptr, perm, ctx.largest = inputs
    ctx.save_for_backward(src, ptr, perm)


def _extreme_value_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    src, ptr, perm = ctx.saved_tensors
    return (
        _hand_down(grad, torch.ops.geo.segment_extreme(src, ptr, perm, ctx.largest)[1], src.size(0)),
        None,
        None,
        None,
    )


def _extreme_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.num_rows = inputs[0].size(0)


def _extreme_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (arg,) = ctx.saved_tensors
    return _hand_down(grad, arg, ctx.num_rows), None, None, None


def _hand_down(grad: Tensor, arg: Tensor, num_rows: int) -> Tensor:
    """[N, *F] to the rows ``arg`` of [E, *F]."""
    # one row more takes what empty segments would hand down; segments are disjoint, so no two entries meet elsewhere
    return grad.new_zeros(num_rows + 1, *grad.shape[1:]).scatter(0, arg, grad)[:num_rows]


define(
    "segment_sum(Tensor src, Tensor ptr, Tensor? perm, Tensor? index, bool mean) -> Tensor",
    _segment_sum_kernel,
    per_segment,
    _segment_sum_backward,
    _segment_sum_setup,
)
define(
    "gather_csr(Tensor src, Tensor ptr, Tensor? perm, Tensor? index, SymInt num_out) -> Tensor",
    _gather_kernel,
    _gather_fake,
    _gather_backward,
    _gather_setup,
)
define(
    "segment_extreme(Tensor src, Tensor ptr, Tensor? perm, bool largest) -> (Tensor, Tensor)",
    _extreme_kernel,
    _extreme_fake,
    _extreme_backward,
    _extreme_setup,
)
define(
    "scatter_extreme(Tensor src, Tensor index, SymInt size, bool largest) -> (Tensor, Tensor)",
    _scatter_extreme_kernel,
    _scatter_extreme_fake,
    _extreme_backward,
    _extreme_setup,
)
define(
    "segment_extreme_value(Tensor src, Tensor ptr, Tensor? perm, bool largest) -> Tensor",
    _extreme_value_kernel,
    per_segment,
    _extreme_value_backward,
    _extreme_value_setup,
)
