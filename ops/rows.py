"""Tensors of any shape as rows with one segment each: how torch_scatter's calls come down to the row ops.

The index (or ptr) of a call runs along one axis and may differ along others. The axes along which it differs and its
own axis are flattened to rows, segment ``v * N + i`` for copy v of the index; what is left are features. An index that
is the same for all features, the usual case, is thus never expanded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds, segment
from geo.ops.plan import SegmentPlan
from geo.ops.registration import define
from geo.ops.segment import Order


class Rows(NamedTuple):
    """How the tensors of one call are read as rows, and the segment of each row."""

    op: str
    device: torch.device
    shape: tuple[int, ...]  # of the caller's tensor; the entry of ``dim`` is not looked at
    axes: tuple[int, ...]  # the axes along which the index differs, then ``dim``, then the others
    varying: int  # how many of the first kind
    num_rows: int  # E, along dim
    size: int  # N, along dim
    segments: Tensor | None  # [V * E] in [0, V * N), or None where only the order is known
    order: Order | None  # where it is known: a plan or a ptr was given

    @property
    def copies(self) -> int:
        """V."""
        return math.prod([self.shape[axis] for axis in self.axes[: self.varying]]) if self.varying else 1

    @property
    def is_rows(self) -> bool:
        """Whether the caller's tensor is [E, *S] as it stands."""
        return self.axes[0] == 0 and not self.varying

    def flat(self, src: Tensor) -> Tensor:
        """[..., n at dim, ...] as [V * n, *S]."""
        return src if self.is_rows else src.permute(self.axes).flatten(0, self.varying)

    def back(self, rows: Tensor, num: int) -> Tensor:
        """[V * num, *S] in the caller's shape, with ``num`` at dim."""
        if self.is_rows:
            return rows
        sizes = [num if i == self.varying else self.shape[axis] for i, axis in enumerate(self.axes)]
        return self._unpermute(rows.reshape(sizes))

    def per_segment(self, values: Tensor) -> Tensor:
        """[V * N] shaped to broadcast against a result in the caller's shape."""
        sizes = [self.shape[axis] if i < self.varying else 1 for i, axis in enumerate(self.axes)]
        sizes[self.varying] = self.size
        return self._unpermute(values.reshape(sizes))

    def _unpermute(self, moved: Tensor) -> Tensor:
        return moved.permute([self.axes.index(axis) for axis in range(len(self.axes))]).contiguous()

    def positions(self, arg: Tensor) -> Tensor:
        """Rows [V * N, *S] as positions along dim: E where ``arg`` names no row."""
        if not self.varying:
            return arg
        first = torch.arange(self.copies, device=arg.device) * self.num_rows
        local = arg.unflatten(0, (self.copies, self.size)) - first.view(-1, *[1] * arg.dim())
        return torch.where(arg == self.copies * self.num_rows, self.num_rows, local.flatten(0, 1))

    def sorted(self) -> Order:
        """The rows grouped by segment."""
        if self.order is not None:
            return self.order
        assert self.segments is not None
        args = (self.segments, self.copies * self.size)
        ptr, perm = call_by_index(self.op, torch.ops.geo.csr_from_index, args, *args)
        return Order(ptr, None if _in_order(self.segments, perm) else perm, self.segments)

    def counts(self) -> Tensor:
        """The number of rows of each segment, int64 [V * N]."""
        return self.order.ptr.diff() if self.order is not None else count(self.segments, self.copies * self.size)

    def total(self, values: Tensor, mean: bool = False) -> Tensor:
        """Sum (mean of floating values) of each segment, [V * N, *S]."""
        if self.order is not None:
            return segment.total(values, self.order, mean, self.op)
        assert self.segments is not None
        size = self.copies * self.size
        if not values.is_floating_point():
            if not torch.compiler.is_compiling():
                bounds.check_index(self.op, "index", self.segments, size)
            return values.new_zeros(size, *values.shape[1:]).index_add(0, self.segments, values)
        args = (values, self.segments, size, mean)
        out: Tensor = call_by_index(self.op, torch.ops.geo.scatter_sum, args, self.segments, size)
        return out

    def extreme(self, values: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
        """Largest (smallest) of each segment and its row, [V * N, *S] both; see :func:`segment.extreme`."""
        if self.order is None and values.is_floating_point():
            size = self.copies * self.size
            args = (values, self.segments, size, largest)
            out: tuple[Tensor, Tensor] = call_by_index(
                self.op, torch.ops.geo.scatter_extreme, args, self.segments, size
            )
            return out
        return segment.extreme(values, self.sorted(), largest, self.op)

    def extreme_value(self, values: Tensor, largest: bool) -> Tensor:
        """The first of both."""
        if self.order is None:
            return self.extreme(values, largest)[0]
        return segment.extreme_value(values, self.order, largest, self.op)

    def spread(self, values: Tensor) -> Tensor:
        """Each segment's row of ``values`` [V * N, *S] at all its rows, [V * E, *S]."""
        if self.order is not None:
            return segment.spread(values, self.order, self.copies * self.num_rows, self.op)
        args = (values, self.segments)
        out: Tensor = call_by_index(self.op, torch.ops.geo.gather_index, args, self.segments, values.size(0))
        return out


def call_by_index(name: str, op: Any, args: Sequence[Any], index: Tensor | None, size: int) -> Any:
    """:func:`bounds.call` of an op whose ``index`` must lie in [0, size); kernels may call it dst_index."""
    try:
        return bounds.call(name, op, args, (("dst_index", index, size - 1),))
    except IndexError as err:
        raise IndexError(str(err).replace(" dst_index[", " index[")) from None


def _in_order(index: Tensor, perm: Tensor) -> bool:
    """Whether rows stand in CSR order already; not asked where values may not be read."""
    if torch.compiler.is_compiling() or not bounds.reads_values(index):
        return False
    last = index.numel() - 1
    return last < 0 or (int(perm[-1]) == last and bool((index[1:] >= index[:-1]).all()))


def count(index: Tensor | None, size: int) -> Tensor:
    """How often each of 0 .. size - 1 stands in ``index``."""
    assert index is not None
    return index.new_zeros(size).index_add_(0, index, index.new_ones(()).expand_as(index))


# -- what a call's index, ptr or plan means ----------------------------------------------------------------------------
def axis_of(op: str, src: Tensor, dim: int) -> int:
    """``dim`` counted from the front."""
    if not -src.dim() <= dim < src.dim():
        raise IndexError(f"{op}: dim = {dim}{bounds.MARK}[{-src.dim()}, {src.dim() - 1}] for src {list(src.shape)}")
    return dim % src.dim()


def check_src(op: str, src: Tensor, other: Tensor, name: str) -> None:
    """Refuse what no function takes: scalars, complex numbers, tensors on two devices."""
    if src.dim() < 1:
        raise ValueError(f"{op}: src must have at least one axis, got a scalar")
    if src.is_complex():
        raise ValueError(f"{op}: src must be floating, integer or bool, got {src.dtype}")
    if other.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be int64, got {other.dtype}")
    if src.device != other.device:
        raise ValueError(f"{op}: src is on {src.device}, {name} on {other.device}: they must be on one device")


def by_plan(op: str, src: Tensor, plan: SegmentPlan, dim: int, num_rows: int | None = None) -> Rows:
    """The rows of ``src`` along ``dim`` in a plan's order; with ``num_rows`` ``src`` holds segments."""
    check_src(op, src, plan.index, "the plan")
    axis = axis_of(op, src, dim)
    expected = plan.index.size(0) if num_rows is None else plan.dim_size
    if src.size(axis) != expected:
        what = "rows" if num_rows is None else "segments"
        raise ValueError(f"{op}: src has {src.size(axis)} {what} along dim {axis}, the plan {expected}")
    axes = (axis, *(a for a in range(src.dim()) if a != axis))
    order = Order(plan.ptr, plan.perm, plan.index)
    return Rows(op, src.device, tuple(src.shape), axes, 0, plan.index.size(0), plan.dim_size, None, order)


def by_index(
    op: str, src: Tensor, index: Tensor | SegmentPlan, dim: int, size: int | None, gather: bool = False
) -> Rows:
    """The rows of ``src`` along ``dim`` with the segments ``index``; with ``gather`` ``src`` holds segments.

    ``index`` broadcasts to ``src``: one vector along ``dim``, or the leading axes up to ``dim`` or all of them, each of
    its size or of size 1.
    """
    if isinstance(index, SegmentPlan):
        if size not in (None, index.dim_size):
            raise ValueError(f"{op}: the output has {size} segments, the plan {index.dim_size}")
        return by_plan(op, src, index, dim, index.index.size(0) if gather else None)
    check_src(op, src, index, "index")
    axis = axis_of(op, src, dim)
    shape = list(src.shape)
    if gather:
        shape[axis] = index.size(-1)
    if size is not None and size < 0:
        raise ValueError(f"{op}: dim_size must not be negative, got {size}")
    rows, axes, varying = _unexpanded(op, "index", index, shape, axis, shape[axis])
    if size is None:
        size = max(int(index.max()) + 1, 0) if index.numel() else 0
    flat = _flattened(op, torch.ops.geo.flat_index, _flat_index, rows, size) if varying else rows
    return Rows(op, src.device, tuple(src.shape), axes, varying, shape[axis], size, flat, None)


def by_ptr(op: str, src: Tensor, ptr: Tensor | SegmentPlan, num_rows: int | None = None) -> Rows:
    """The rows of ``src`` along the last axis of ``ptr``; with ``num_rows`` ``src`` holds segments."""
    if isinstance(ptr, SegmentPlan):
        return by_plan(op, src, ptr, 0, num_rows)
    check_src(op, src, ptr, "indptr")
    if not 1 <= ptr.dim() <= src.dim():
        raise ValueError(
            f"{op}: indptr must have 1 to {src.dim()} axes, got {list(ptr.shape)} for src {list(src.shape)}"
        )
    axis = ptr.dim() - 1
    if ptr.size(axis) == 0:  # torch_scatter's way to say no segments
        ptr = ptr.new_zeros(*ptr.shape[:axis], 1)
    size = ptr.size(axis) - 1
    if num_rows is None:
        num_rows = src.size(axis)
    elif src.size(axis) != size:
        raise ValueError(f"{op}: src must have ptr.numel() - 1 = {size} rows along dim {axis}, got {list(src.shape)}")
    rows, axes, varying = _unexpanded(op, "indptr", ptr, list(src.shape), axis, size + 1)
    flat = _flattened(op, torch.ops.geo.flat_ptr, _flat_ptr, rows, num_rows) if varying else rows
    return Rows(op, src.device, tuple(src.shape), axes, varying, num_rows, size, None, Order(flat))


def _unexpanded(
    op: str, name: str, index: Tensor, shape: list[int], axis: int, length: int
) -> tuple[Tensor, tuple[int, ...], int]:
    """``index`` without the axes along which it does not differ, [V, length] or [length], and the order of the axes."""
    others = [a for a in range(len(shape)) if a != axis]
    if index.dim() == 1 and index.size(0) == length:
        return index, (axis, *others), 0
    shape = [*shape[:axis], length, *shape[axis + 1 :]]
    lead = axis if index.dim() == 1 else 0
    viewed = index[(None,) * lead + (...,) + (None,) * (len(shape) - index.dim() - lead)]
    if viewed.dim() != len(shape) or any(n not in (1, m) for n, m in zip(viewed.shape, shape, strict=True)):
        raise ValueError(f"{op}: {name} {list(index.shape)} does not broadcast to {shape} along dim {axis}")
    varying = [a for a in others if viewed.size(a) != 1 and (viewed.stride(a) != 0 or shape[a] == 0)]
    for a in others:
        if a not in varying:
            viewed = viewed.narrow(a, 0, 1)
    axes = (*varying, axis, *(a for a in others if a not in varying))
    sizes = [shape[a] if a == axis or a in varying else 1 for a in range(len(shape))]
    rows = viewed.expand(sizes).permute(axes)
    rows = rows.reshape(math.prod([shape[a] for a in varying]), length) if varying else rows.reshape(length)
    return rows, axes, len(varying)


def _flattened(op: str, flat: Any, plain: Callable[[Tensor, int], Tensor], rows: Tensor, size: int) -> Tensor:
    if bounds.in_functorch():  # a reference at work
        return plain(rows, size)
    out: Tensor = bounds.call(op, flat, (rows, size), ())
    return out


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def _flat_index(index: Tensor, size: int) -> Tensor:
    bounds.check_index("flat_index", "index", index.flatten(), size)
    return (index + torch.arange(index.size(0), device=index.device).unsqueeze(1) * size).flatten()


def _flat_ptr(ptr: Tensor, num_rows: int) -> Tensor:
    if bounds.reads_values(ptr):
        bad = (ptr[:, 0] != 0) | (ptr[:, -1] != num_rows) | (ptr.diff(dim=1) < 0).any(1)
        for copy in bad.nonzero().flatten()[:1].tolist():
            bounds.check_ptr("flat_ptr", ptr[copy], num_rows)
    first = torch.arange(ptr.size(0), device=ptr.device).unsqueeze(1) * num_rows
    return torch.cat([(ptr[:, :-1] + first).flatten(), ptr.new_full((1,), ptr.size(0) * num_rows)])


def _scatter_sum_kernel(src: Tensor, index: Tensor, dim_size: int, mean: bool) -> Tensor:
    bounds.check_index("scatter_sum", "index", index, dim_size)
    ptr, perm = torch.ops.geo.csr_from_index(index, dim_size)
    out: Tensor = torch.ops.geo.segment_sum(src, ptr, perm, index, mean)
    return out


def _scatter_sum_fake(src: Tensor, index: Tensor, dim_size: int, mean: bool) -> Tensor:
    torch._check(src.dim() >= 1 and index.dim() == 1)
    return src.new_empty(dim_size, *src.shape[1:])


def _scatter_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ctx.dim_size, ctx.mean = inputs
    ctx.save_for_backward(index)


def _scatter_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    if ctx.mean:
        many = count(index, ctx.dim_size).clamp(min=1).to(grad.dtype)
        grad = grad / many.view(-1, *[1] * (grad.dim() - 1))
    return torch.ops.geo.gather_index(grad, index), None, None, None


def _gather_index_kernel(src: Tensor, index: Tensor) -> Tensor:
    if not bounds.reads_values(index):  # nobody will be told: a bad entry gives zeros
        if src.size(0) == 0:
            return src.new_zeros(index.size(0), *src.shape[1:])
        bad = (index < 0) | (index >= src.size(0))
        rows = src.index_select(0, index.masked_fill(bad, 0))
        return torch.where(bad.view(-1, *[1] * (src.dim() - 1)), 0, rows)
    if index.is_cuda:  # where index_select on a bad index ends all use of the GPU
        bounds.check_index("gather_index", "index", index, src.size(0))
    try:
        return src.index_select(0, index)
    except (IndexError, RuntimeError):  # it looks at each entry itself, but does not say which is bad
        bounds.check_index("gather_index", "index", index, src.size(0))
        raise


def _gather_index_fake(src: Tensor, index: Tensor) -> Tensor:
    torch._check(src.dim() >= 1 and index.dim() == 1)
    return src.new_empty(index.size(0), *src.shape[1:])


def _gather_index_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    src, index = inputs
    ctx.save_for_backward(index)
    ctx.size = src.size(0)


def _gather_index_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.geo.scatter_sum(grad, *ctx.saved_tensors, ctx.size, False), None


define("flat_index(Tensor index, SymInt size) -> Tensor", _flat_index, lambda i, _: i.new_empty(i.numel()))
define(
    "flat_ptr(Tensor ptr, SymInt num_rows) -> Tensor",
    _flat_ptr,
    lambda ptr, _: ptr.new_empty(ptr.size(0) * (ptr.size(1) - 1) + 1),
)
define(
    "scatter_sum(Tensor src, Tensor index, SymInt dim_size, bool mean) -> Tensor",
    _scatter_sum_kernel,
    _scatter_sum_fake,
    _scatter_sum_backward,
    _scatter_sum_setup,
)
define(
    "gather_index(Tensor src, Tensor index) -> Tensor",
    _gather_index_kernel,
    _gather_index_fake,
    _gather_index_backward,
    _gather_index_setup,
)
