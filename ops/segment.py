"""Reductions over consecutive segments, and the gather that is their transpose.

Segment i of ``src`` is the rows ``ptr[i]:ptr[i + 1]``. Sums go in a fixed order whatever the number of threads.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define

Reduce = Literal["sum", "mean", "min", "max"]


def segment_reduce(src: Tensor, ptr: Tensor, reduce: Reduce = "sum") -> Tensor:
    """Reduce each segment of rows to one row: ``out[i] = reduce(src[ptr[i]:ptr[i + 1]])``.

    Empty segments give 0. ``"min"`` and ``"max"`` hand their gradient to the first row that attains the extreme, and
    let NaN through. float16 and bfloat16 are summed in float32. Rows that are not sorted by segment go through
    ``src[plan.perm]`` of a :class:`SegmentPlan` first. Differentiable any number of times.

    Args:
        src: [E, *F], floating; for sum, min and max also integer.
        ptr: int64 [N + 1], rising from 0 to E.
        reduce: "sum", "mean", "min" or "max".

    Returns:
        [N, *F], of the dtype of ``src``.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape, dtype or ``reduce``.

    Example:
        >>> import torch
        >>> from geo.ops import segment_reduce
        >>> segment_reduce(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 2, 3]), "mean").tolist()
        [1.5, 0.0, 4.0]
    """
    _check("segment_reduce", src, ptr, reduce)
    if not src.is_floating_point():
        if not torch.compiler.is_compiling():
            bounds.check_ptr("segment_reduce", ptr, src.size(0))
        return segment_reduce_reference(src, ptr, reduce)
    checks = (("ptr", ptr, src.size(0)),)
    if reduce in ("sum", "mean"):
        out: Tensor = bounds.call("segment_reduce", torch.ops.geo.segment_sum, (src, ptr, reduce == "mean"), checks)
        return out
    values, _ = bounds.call("segment_reduce", torch.ops.geo.segment_extreme, (src, ptr, reduce == "max"), checks)
    extreme: Tensor = values
    return extreme


def gather_csr(src: Tensor, ptr: Tensor, num_out: int | None = None) -> Tensor:
    """Repeat each row over its segment: ``out[e] = src[i]`` for ``ptr[i] <= e < ptr[i + 1]``.

    The transpose of ``segment_reduce(..., "sum")``. Differentiable any number of times.

    Args:
        src: [N, *F].
        ptr: int64 [N + 1], rising from 0 to E.
        num_out: E; by default ``ptr[-1]``, which waits for a GPU and cannot be compiled.

    Returns:
        [E, *F].

    Raises:
        IndexError: ``ptr`` does not rise from 0 to ``num_out``.
        ValueError: a wrong shape or dtype.

    Example:
        >>> import torch
        >>> from geo.ops import gather_csr
        >>> gather_csr(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [5.0, 5.0, 7.0]
    """
    if ptr.dim() != 1 or ptr.dtype != torch.int64:
        raise ValueError(f"gather_csr: ptr must be int64 [N + 1], got {ptr.dtype} {list(ptr.shape)}")
    if src.dim() < 1 or src.size(0) != ptr.size(0) - 1:
        raise ValueError(f"gather_csr: src must have ptr.numel() - 1 = {ptr.size(0) - 1} rows, got {list(src.shape)}")
    if num_out is None:
        num_out = int(ptr[-1])
    if not src.is_floating_point():
        if not torch.compiler.is_compiling():
            bounds.check_ptr("gather_csr", ptr, num_out)
        return gather_csr_reference(src, ptr, num_out)
    out: Tensor = bounds.call("gather_csr", torch.ops.geo.gather_csr, (src, ptr, num_out), (("ptr", ptr, num_out),))
    return out


def _check(op: str, src: Tensor, ptr: Tensor, reduce: str) -> None:
    if reduce not in ("sum", "mean", "min", "max"):
        raise ValueError(f"{op}: reduce must be 'sum', 'mean', 'min' or 'max', got {reduce!r}")
    if src.dim() < 1:
        raise ValueError(f"{op}: src must have one row per edge [E, *F], got a scalar")
    if ptr.dim() != 1 or ptr.size(0) < 1 or ptr.dtype != torch.int64:
        raise ValueError(f"{op}: ptr must be int64 [N + 1], got {ptr.dtype} {list(ptr.shape)}")
    if src.device != ptr.device:
        raise ValueError(f"{op}: src is on {src.device}, ptr on {ptr.device}: they must be on one device")
    if src.dtype in (torch.bool, torch.complex64, torch.complex128) or (
        reduce == "mean" and not src.dtype.is_floating_point
    ):
        allowed = "floating" if reduce == "mean" else "floating or integer"
        raise ValueError(f"{op}: src must be {allowed} for reduce={reduce!r}, got {src.dtype}")


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def segment_reduce_reference(src: Tensor, ptr: Tensor, reduce: Reduce = "sum") -> Tensor:
    """:func:`segment_reduce` in plain PyTorch."""
    if reduce in ("sum", "mean"):
        return _segment_sum(src, ptr, reduce == "mean")
    return _segment_extreme(src, ptr, reduce == "max")[0]


def gather_csr_reference(src: Tensor, ptr: Tensor, num_out: int) -> Tensor:
    """:func:`gather_csr` in plain PyTorch."""
    return src.index_select(0, _rows(ptr, num_out))


def _rows(ptr: Tensor, num_edges: int) -> Tensor:
    """The segment of each edge [E]."""
    segments = torch.arange(ptr.size(0) - 1, device=ptr.device)
    return torch.repeat_interleave(segments, ptr.diff(), output_size=num_edges)


def _count(ptr: Tensor, like: Tensor) -> Tensor:
    """The length of each segment, at least 1, shaped to divide ``like`` [N, *F]."""
    return ptr.diff().clamp(min=1).to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _segment_sum(src: Tensor, ptr: Tensor, mean: bool) -> Tensor:
    wide = src.float() if src.dtype in (torch.float16, torch.bfloat16) else src
    out = wide.new_zeros(ptr.size(0) - 1, *src.shape[1:]).index_add(0, _rows(ptr, src.size(0)), wide)
    return (out / _count(ptr, out) if mean else out).to(src.dtype)


def _segment_extreme(src: Tensor, ptr: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    num_edges, num_segments = src.size(0), ptr.size(0) - 1
    rows = _rows(ptr, num_edges).view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    detached = src.detach()
    extreme = detached.new_zeros(num_segments, *src.shape[1:]).scatter_reduce(
        0, rows, detached, "amax" if largest else "amin", include_self=False
    )
    attained = extreme.gather(0, rows)
    hit = (detached == attained) | ((detached != detached) & (attained != attained))
    position = torch.arange(num_edges, device=src.device).view(-1, *[1] * (src.dim() - 1)).expand_as(src)
    arg = torch.full(extreme.shape, num_edges, dtype=torch.int64, device=src.device).scatter_reduce(
        0, rows, torch.where(hit, position, num_edges), "amin"
    )
    return _take(src, arg), arg


def _take(src: Tensor, arg: Tensor) -> Tensor:
    """``src[arg]`` along rows, 0 where ``arg`` is the number of rows."""
    if src.size(0) == 0:
        return src.new_zeros(arg.shape)
    return torch.where(arg < src.size(0), src.gather(0, arg.clamp(max=src.size(0) - 1)), 0)


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def _segment_sum_kernel(src: Tensor, ptr: Tensor, mean: bool) -> Tensor:
    bounds.check_ptr("segment_sum", ptr, src.size(0))
    return _segment_sum(src, ptr, mean)


def _segment_sum_fake(src: Tensor, ptr: Tensor, mean: bool) -> Tensor:
    torch._check(src.dim() >= 1 and ptr.dim() == 1)
    return src.new_empty(ptr.size(0) - 1, *src.shape[1:])


def _segment_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    src, ptr, ctx.mean = inputs
    ctx.save_for_backward(ptr)
    ctx.num_edges = src.size(0)


def _segment_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ptr,) = ctx.saved_tensors
    scaled = grad / _count(ptr, grad) if ctx.mean else grad
    return torch.ops.geo.gather_csr(scaled, ptr, ctx.num_edges), None, None


def _gather_kernel(src: Tensor, ptr: Tensor, num_out: int) -> Tensor:
    bounds.check_ptr("gather_csr", ptr, num_out)
    return gather_csr_reference(src, ptr, num_out)


def _gather_fake(src: Tensor, ptr: Tensor, num_out: int) -> Tensor:
    torch._check(src.dim() >= 1 and ptr.dim() == 1)
    torch._check(src.size(0) == ptr.size(0) - 1)
    return src.new_empty(num_out, *src.shape[1:])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ptr,) = ctx.saved_tensors
    return torch.ops.geo.segment_sum(grad, ptr, False), None, None


def _extreme_kernel(src: Tensor, ptr: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    bounds.check_ptr("segment_extreme", ptr, src.size(0))
    return _segment_extreme(src, ptr, largest)


def _extreme_fake(src: Tensor, ptr: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    torch._check(src.dim() >= 1 and ptr.dim() == 1)
    shape = (ptr.size(0) - 1, *src.shape[1:])
    return src.new_empty(shape), ptr.new_empty(shape)


def _extreme_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.num_edges = inputs[0].size(0)


def _extreme_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (arg,) = ctx.saved_tensors
    # one row more takes what empty segments would hand down; segments are disjoint, so no two entries meet elsewhere
    wide = grad.new_zeros(ctx.num_edges + 1, *grad.shape[1:]).scatter(0, arg, grad)
    return wide[: ctx.num_edges], None, None


define(
    "segment_sum(Tensor src, Tensor ptr, bool mean) -> Tensor",
    _segment_sum_kernel,
    _segment_sum_fake,
    _segment_sum_backward,
    _segment_sum_setup,
)
define(
    "gather_csr(Tensor src, Tensor ptr, SymInt num_out) -> Tensor",
    _gather_kernel,
    _gather_fake,
    _gather_backward,
    _gather_setup,
)
define(
    "segment_extreme(Tensor src, Tensor ptr, bool largest) -> (Tensor, Tensor)",
    _extreme_kernel,
    _extreme_fake,
    _extreme_backward,
    _extreme_setup,
)
