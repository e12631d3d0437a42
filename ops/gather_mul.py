r"""Gather rows, multiply by edge weights, sum by segment: the heart of a depthwise convolution.

Both ops are derivatives of one trilinear form over the edges e, with source s(e), target t(e) and any feature axes,

.. math:: T(x, w, g) = \sum_e \langle x_{s(e)} \odot w_e,\, g_{t(e)} \rangle .

``gather_mul_segment_sum`` is its derivative in g (and, with sources and targets exchanged, in x), ``gather_mul`` its
derivative in w. So each one's gradient is the other, to any order, and no pass ever reorders or copies w: the
transposed pass reads it through the CSR order by source. An axis along which w is shared has size 1 in w, and
``gather_mul`` sums over it while it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.plan import SegmentPlan, complete, index_from_csr
from geo.ops.registration import define


def gather_mul_segment_sum(
    x: Tensor,
    weight: Tensor,
    src_index: Tensor | None = None,
    ptr: Tensor | None = None,
    edge_perm: Tensor | None = None,
    *,
    plan: SegmentPlan | None = None,
) -> Tensor:
    r"""Sum of source rows times edge weights, over the edges of each target.

    .. math:: out_i = \sum_{e \in \mathcal E(i)} x_{s(e)} \odot w_e, \qquad
              \mathcal E(i) = \{ \mathrm{edge\_perm}[k] : \mathrm{ptr}_i \le k < \mathrm{ptr}_{i+1} \}

    Nothing of size [E, \*S] is stored. float16 and bfloat16 are summed in float32. Differentiable any number of times.

    Args:
        x: [M, \*S], the sources.
        weight: [E, ...] with ``x.dim()`` axes, each of the size of x's or 1 (shared along it). x and weight are
            promoted to their common dtype.
        src_index: the source of each edge, int64 [E], in the order of the rows of ``weight``.
        ptr: int64 [N + 1], rising from 0 to E.
        edge_perm: int64 [E], each edge once, or None where the edges already stand in segment order.
        plan: a :class:`SegmentPlan` with ``src_index``, in place of the three above; it also keeps the order by
            source that the backward pass needs, which is otherwise sorted anew in each call.

    Returns:
        [N, \*S].

    Raises:
        IndexError: an index is out of range, or ``ptr`` does not rise from 0 to E.
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> import torch
        >>> from geo.ops import SegmentPlan, gather_mul_segment_sum
        >>> plan = SegmentPlan.from_edge_index(torch.tensor([[0, 1, 1], [1, 0, 1]]), 2)
        >>> gather_mul_segment_sum(torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [3.0], [5.0]]), plan=plan)
        tensor([[ 6.],
                [20.]])
    """
    op = "gather_mul_segment_sum"
    src_index, dst_index, ptr, edge_perm = resolve(op, src_index, ptr, edge_perm, plan)
    check_rows(op, x, weight, src_index)
    x, weight = promote(x, weight)
    t_ptr = t_perm = None
    if plan is not None:
        check_sources(op, plan, x)
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            t_ptr, t_perm = plan.t_ptr, plan.t_perm
    args = (x, weight, src_index, dst_index, ptr, edge_perm, t_ptr, t_perm)
    num_edges = src_index.size(0)
    checks = (
        ("src_index", src_index, x.size(0) - 1),
        ("dst_index", dst_index, ptr.size(0) - 2),
        ("edge_perm", edge_perm, num_edges - 1),
        ("ptr", ptr, num_edges),
    )
    out: Tensor = bounds.call(op, torch.ops.geo.gather_mul_segment_sum, args, checks)
    return out


def gather_mul(x: Tensor, g: Tensor, src_index: Tensor, dst_index: Tensor) -> Tensor:
    """Product of a source row and a target row for each edge: ``out[e] = x[src_index[e]] * g[dst_index[e]]``.

    Differentiable any number of times; the gradient of :func:`gather_mul_segment_sum` with respect to its weight.

    Args:
        x: [M, *S].
        g: [N, *S]; x and g are promoted to their common dtype.
        src_index: int64 [E], rows of x.
        dst_index: int64 [E], rows of g.

    Returns:
        [E, *S].

    Raises:
        IndexError: an index is out of range.
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> import torch
        >>> from geo.ops import gather_mul
        >>> x, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])
        >>> gather_mul(x, g, torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])).tolist()
        [[5.0], [6.0], [10.0]]
    """
    op = "gather_mul"
    for name, index in (("src_index", src_index), ("dst_index", dst_index)):
        check_index_tensor(op, name, index)
    if src_index.shape != dst_index.shape:
        raise ValueError(
            f"{op}: src_index and dst_index must have equal length, got {src_index.size(0)} and {dst_index.size(0)}"
        )
    if x.dim() < 1 or x.shape[1:] != g.shape[1:]:
        raise ValueError(f"{op}: x and g must agree after the first axis, got {list(x.shape)} and {list(g.shape)}")
    check_one_device(op, x=x, g=g, src_index=src_index, dst_index=dst_index)
    x, g = promote(x, g)
    checks = (("src_index", src_index, x.size(0) - 1), ("dst_index", dst_index, g.size(0) - 1))
    args = (x, g, src_index, dst_index, None, None, None, None, 0)
    out: Tensor = bounds.call(op, torch.ops.geo.gather_mul, args, checks)
    return out


# -- what the arguments must be (also used by gather_linear) -----------------------------------------------------------
def resolve(
    op: str, src_index: Tensor | None, ptr: Tensor | None, edge_perm: Tensor | None, plan: SegmentPlan | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """``(src_index, dst_index, ptr, edge_perm)`` from the arguments or, where they are None, from the plan."""
    dst_index = None
    if plan is not None:
        if src_index is not None or ptr is not None or edge_perm is not None:
            raise ValueError(f"{op}: give either plan or src_index, ptr and edge_perm, not both")
        src_index, dst_index, ptr, edge_perm = plan.src_index, plan.index, plan.ptr, plan.perm
    if src_index is None or ptr is None:
        raise ValueError(f"{op}: needs src_index and ptr, or a plan that was built with src_index")
    check_index_tensor(op, "src_index", src_index)
    check_index_tensor(op, "ptr", ptr)
    if ptr.size(0) < 1:
        raise ValueError(f"{op}: ptr must have at least one entry")
    if edge_perm is not None:
        check_index_tensor(op, "edge_perm", edge_perm)
        if edge_perm.size(0) != src_index.size(0):
            raise ValueError(
                f"{op}: edge_perm must have one entry per edge ({src_index.size(0)}), got {edge_perm.size(0)}"
            )
    check_one_device(op, src_index=src_index, ptr=ptr)
    return src_index, dst_index, ptr, edge_perm


def check_index_tensor(op: str, name: str, index: Tensor) -> None:
    """Refuse an index that is not int64 with one axis."""
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be int64 with one axis, got {index.dtype} {list(index.shape)}")


def check_one_device(op: str, **tensors: Tensor) -> None:
    """Refuse tensors on different devices."""
    if len({t.device for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {found}")


def check_sources(op: str, plan: SegmentPlan, x: Tensor) -> None:
    """Refuse a plan built for another number of sources."""
    if plan.src_size != x.size(0):
        raise ValueError(f"{op}: x has {x.size(0)} rows, the plan was built for {plan.src_size} sources")


def check_rows(op: str, x: Tensor, weight: Tensor, src_index: Tensor) -> None:
    """Refuse a weight that does not go with x and the edges."""
    if x.dim() < 1 or weight.dim() != x.dim():
        raise ValueError(f"{op}: weight must have as many axes as x, got {list(weight.shape)} for x {list(x.shape)}")
    if weight.size(0) != src_index.size(0):
        raise ValueError(f"{op}: weight must have one row per edge ({src_index.size(0)}), got {list(weight.shape)}")
    if any(w not in (1, s) for w, s in zip(weight.shape[1:], x.shape[1:], strict=True)):
        raise ValueError(
            f"{op}: weight must match x {list(x.shape)} or be 1 on each feature axis, got {list(weight.shape)}"
        )
    check_one_device(op, x=x, weight=weight, src_index=src_index)


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common floating dtype."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    if not dtype.is_floating_point:
        raise ValueError(f"expected floating tensors, got {', '.join(str(t.dtype) for t in tensors)}")
    return tuple(t.to(dtype) for t in tensors)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def gather_mul_segment_sum_reference(
    x: Tensor,
    weight: Tensor,
    src_index: Tensor | None = None,
    ptr: Tensor | None = None,
    edge_perm: Tensor | None = None,
    *,
    plan: SegmentPlan | None = None,
) -> Tensor:
    """:func:`gather_mul_segment_sum` in plain PyTorch; stores the [E, *S] messages."""
    src_index, dst_index, ptr, edge_perm = resolve("gather_mul_segment_sum", src_index, ptr, edge_perm, plan)
    x, weight = promote(x, weight)
    if dst_index is None:
        dst_index = index_from_csr(ptr, edge_perm, src_index.size(0))
    return _gather_mul_segment_sum(x, weight, src_index, dst_index, ptr.size(0) - 1)


def gather_mul_reference(x: Tensor, g: Tensor, src_index: Tensor, dst_index: Tensor) -> Tensor:
    """:func:`gather_mul` in plain PyTorch."""
    return x.index_select(0, src_index) * g.index_select(0, dst_index)


def widen(t: Tensor) -> Tensor:
    """float32 for the narrow dtypes, the tensor itself for the others."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _gather_mul_segment_sum(x: Tensor, weight: Tensor, src_index: Tensor, dst_index: Tensor, num_out: int) -> Tensor:
    messages = widen(x).index_select(0, src_index) * widen(weight)
    out = messages.new_zeros(num_out, *x.shape[1:])
    return out.index_add(0, dst_index, messages).to(x.dtype)


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def check_edges(
    op: str, num_src: int, src_index: Tensor, dst_index: Tensor | None, ptr: Tensor, perm: Tensor | None
) -> Tensor:
    """Check the indices of one reduction and return the target of each edge."""
    num_edges, num_out = src_index.size(0), ptr.size(0) - 1
    bounds.check_ptr(op, ptr, num_edges)
    bounds.check_index(op, "src_index", src_index, num_src)
    if perm is not None:
        bounds.check_index(op, "edge_perm", perm, num_edges)
    if dst_index is None:
        return index_from_csr(ptr, perm, num_edges)
    bounds.check_index(op, "dst_index", dst_index, num_out)
    return dst_index


def _sum_kernel(
    x: Tensor,
    weight: Tensor,
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
) -> Tensor:
    dst_index = check_edges("gather_mul_segment_sum", x.size(0), src_index, dst_index, ptr, perm)
    return _gather_mul_segment_sum(x, weight, src_index, dst_index, ptr.size(0) - 1)


def _sum_fake(
    x: Tensor,
    weight: Tensor,
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
) -> Tensor:
    torch._check(weight.dim() == x.dim() and x.dim() >= 1)
    torch._check(weight.size(0) == src_index.size(0))
    torch._check(x.dtype == weight.dtype)
    return x.new_empty(ptr.size(0) - 1, *x.shape[1:])


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, src_index, dst_index, ptr, perm, t_ptr, t_perm = ctx.saved_tensors
    dst_index, t_ptr, t_perm = complete(src_index, dst_index, ptr, perm, t_ptr, t_perm, x.size(0))
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.geo.gather_mul_segment_sum(grad, weight, dst_index, src_index, t_ptr, t_perm, ptr, perm)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.geo.gather_mul(
            x, grad, src_index, dst_index, ptr, perm, t_ptr, t_perm, _shared(x, weight)
        )
    return grad_x, grad_weight, None, None, None, None, None, None


def _shared(x: Tensor, weight: Tensor) -> int:
    """The feature axes along which ``weight`` is shared, as bits: bit d for axis d + 1."""
    pairs = enumerate(zip(x.shape[1:], weight.shape[1:], strict=True))
    return sum(1 << d for d, (s, w) in pairs if w == 1 and s != 1)


def _mul_kernel(
    x: Tensor,
    g: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    ptr: Tensor | None,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
    shared: int,
) -> Tensor:
    bounds.check_index("gather_mul", "src_index", src_index, x.size(0))
    bounds.check_index("gather_mul", "dst_index", dst_index, g.size(0))
    out = widen(x).index_select(0, src_index) * widen(g).index_select(0, dst_index)
    axes = [d + 1 for d in range(x.dim() - 1) if shared >> d & 1]
    return (out.sum(axes, keepdim=True) if axes else out).to(x.dtype)


def _mul_fake(
    x: Tensor,
    g: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    ptr: Tensor | None,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
    shared: int,
) -> Tensor:
    torch._check(x.dim() == g.dim() and x.dim() >= 1)
    torch._check(src_index.size(0) == dst_index.size(0))
    torch._check(x.dtype == g.dtype)
    sizes = [1 if shared >> d & 1 else s for d, s in enumerate(x.shape[1:])]
    return x.new_empty(src_index.size(0), *sizes)


def _mul_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _mul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, g, src_index, dst_index, ptr, perm, t_ptr, t_perm = ctx.saved_tensors
    if ptr is None:
        ptr, perm = torch.ops.geo.csr_from_index(dst_index, g.size(0))
    if t_ptr is None:
        t_ptr, t_perm = torch.ops.geo.csr_from_index(src_index, x.size(0))
    grad_x = grad_g = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.geo.gather_mul_segment_sum(g, grad, dst_index, src_index, t_ptr, t_perm, ptr, perm)
    if ctx.needs_input_grad[1]:
        grad_g = torch.ops.geo.gather_mul_segment_sum(x, grad, src_index, dst_index, ptr, perm, t_ptr, t_perm)
    return grad_x, grad_g, None, None, None, None, None, None, None


define(
    "gather_mul_segment_sum(Tensor x, Tensor weight, Tensor src_index, Tensor? dst_index, Tensor ptr, Tensor? perm,"
    " Tensor? t_ptr, Tensor? t_perm) -> Tensor",
    _sum_kernel,
    _sum_fake,
    _sum_backward,
    _sum_setup,
)
define(
    "gather_mul(Tensor x, Tensor g, Tensor src_index, Tensor dst_index, Tensor? ptr, Tensor? perm, Tensor? t_ptr,"
    " Tensor? t_perm, int shared) -> Tensor",
    _mul_kernel,
    _mul_fake,
    _mul_backward,
    _mul_setup,
)
