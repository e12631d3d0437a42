r"""The fused heart of a depthwise convolution: kernel linear, gather, multiply and segment sum in one pass.

Everything here is one quadrilinear form and its derivatives. With :math:`s(e), t(e)` the source and target of an edge,

.. math::
    T(x, g, W, \phi) = \sum_{e,o,c,b} x_{s(e)oc} \; g_{t(e)oc} \; W_{cb} \; \phi_{eob} .

The derivative in the ``g`` slot is the convolution itself, that in the ``x`` slot is the same convolution along the
reversed edges, and the ``basis`` and ``weight`` slots share the product ``x[src] * g[dst]``. Two ops are closed under
differentiation to any order: ``gather_linear_mul_segment_sum`` (one slot) and ``gather_linear_mul_grad`` (the three
others in one pass). Neither ever stores a tensor of the size of the kernel, [E, O, C].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import check_one_device, check_sources, promote, resolve, widen
from geo.ops.plan import SegmentPlan, complete, index_from_csr
from geo.ops.registration import define

_NAME = "gather_linear_mul_segment_sum"


# -- the public function -----------------------------------------------------------------------------------------------
def gather_linear_mul_segment_sum(
    x: Tensor,
    basis: Tensor,
    weight: Tensor,
    src_index: Tensor | None = None,
    ptr: Tensor | None = None,
    edge_perm: Tensor | None = None,
    *,
    plan: SegmentPlan | None = None,
) -> Tensor:
    r"""Depthwise convolution with the kernel's last linear fused in; the kernel itself is never stored.

    .. math::
        \text{out}_{ioc} = \sum_{e \in \text{edges}(i)} x_{\text{src}(e)\,oc} \sum_b \text{basis}_{eob} \, W_{cb}

    where ``edges(i) = edge_perm[ptr[i]:ptr[i + 1]]`` (or ``ptr[i] .. ptr[i + 1]`` without ``edge_perm``). It equals
    ``linear(basis, weight)``, ``index_select``, multiply and ``index_add`` done one after the other, with the extra
    memory of the output alone. Differentiable in ``x``, ``basis`` and ``weight``, any number of times; sums run in a
    fixed order, so results are bitwise the same for any number of threads.

    Args:
        x: Features of the sources, [M, O, C].
        basis: Kernel basis of each edge, [E, O, B], or [E, 1, B] when shared over the axis O.
        weight: Weight of the kernel's last linear, [C, B] (the layout of :class:`torch.nn.Linear`).
        src_index: Source of each edge, [E] int64 in ``[0, M)``. Taken from ``plan`` when that is given.
        ptr: Segment boundaries, [N + 1] int64, from 0 to E. Taken from ``plan`` when that is given.
        edge_perm: Edges ordered by target, [E] int64 (default: already sorted). Taken from ``plan``.
        plan: A :class:`~geo.ops.SegmentPlan` with ``src_index``; it also keeps the transposed order that backward
            needs, which is otherwise computed (a sort) in every backward.

    Returns:
        out: [N, O, C], in the promoted dtype of ``x``, ``basis`` and ``weight``; 16-bit types accumulate in float32.

    Raises:
        ValueError: A wrong shape, dtype or device, or not exactly one of ``plan`` and ``ptr``.
        IndexError: An index or ``ptr`` out of bounds.

    Example:
        >>> import torch
        >>> from geo.ops import SegmentPlan, gather_linear_mul_segment_sum
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 1, 0]])
        >>> plan = SegmentPlan.from_edge_index(edge_index, 3)
        >>> x, basis, weight = torch.randn(3, 4, 5), torch.randn(3, 4, 8), torch.randn(5, 8)
        >>> gather_linear_mul_segment_sum(x, basis, weight, plan=plan).shape
        torch.Size([3, 4, 5])
    """
    src_index, dst_index, ptr, edge_perm = resolve(_NAME, src_index, ptr, edge_perm, plan)
    _check_shapes_fit(x, basis, weight, src_index)
    check_one_device(_NAME, x=x, basis=basis, weight=weight, src_index=src_index)
    x, basis, weight = promote(x, basis, weight)
    t_ptr = t_perm = None
    if plan is not None:
        check_sources(_NAME, plan, x)
        if torch.is_grad_enabled() and (x.requires_grad or basis.requires_grad or weight.requires_grad):
            t_ptr, t_perm = plan.t_ptr, plan.t_perm
    num_edges = basis.size(0)
    checks = (
        ("src_index", src_index, x.size(0) - 1),
        ("dst_index", dst_index, ptr.size(0) - 2),
        ("edge_perm", edge_perm, num_edges - 1),
        ("ptr", ptr, num_edges),
    )
    args = (x, basis, weight, src_index, dst_index, ptr, edge_perm, t_ptr, t_perm)
    out: Tensor = bounds.call(_NAME, torch.ops.geo.gather_linear_mul_segment_sum, args, checks)
    return out


def _check_shapes_fit(x: Tensor, basis: Tensor, weight: Tensor, src_index: Tensor) -> None:
    for name, tensor, dims, layout in (
        ("x", x, 3, "[M, O, C]"),
        ("basis", basis, 3, "[E, O, B] or [E, 1, B]"),
        ("weight", weight, 2, "[C, B]"),
    ):
        if tensor.dim() != dims:
            raise ValueError(f"{_NAME}: {name} must be {layout}, got shape {list(tensor.shape)}")
    if basis.size(1) not in (x.size(1), 1):
        raise ValueError(f"{_NAME}: axis 1 of basis must have the size of x's ({x.size(1)}) or 1, got {basis.size(1)}")
    if weight.size(0) != x.size(2) or weight.size(1) != basis.size(2):
        raise ValueError(
            f"{_NAME}: weight must be [C, B] with the C = {x.size(2)} channels of x and the B = {basis.size(2)} "
            f"functions of basis, got {list(weight.shape)}"
        )
    if src_index.size(0) != basis.size(0):
        raise ValueError(
            f"{_NAME}: src_index must have one entry per row of basis ({basis.size(0)}), got {src_index.size(0)}"
        )


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def gather_linear_mul_segment_sum_reference(
    x: Tensor,
    basis: Tensor,
    weight: Tensor,
    src_index: Tensor | None = None,
    ptr: Tensor | None = None,
    edge_perm: Tensor | None = None,
    *,
    plan: SegmentPlan | None = None,
) -> Tensor:
    """:func:`gather_linear_mul_segment_sum` composed of PyTorch ops: the specification, also under torch.func."""
    src_index, dst_index, ptr, edge_perm = resolve(_NAME, src_index, ptr, edge_perm, plan)
    if dst_index is None:
        dst_index = index_from_csr(ptr, edge_perm, basis.size(0))
    x, basis, weight = promote(x, basis, weight)
    dtype = x.dtype
    x, basis, weight = widen(x), widen(basis), widen(weight)
    message = x.index_select(0, src_index) * (basis @ weight.t())
    out = message.new_zeros((ptr.size(0) - 1, x.size(1), x.size(2))).index_add(0, dst_index, message)
    return out.to(dtype)


def _forward_kernel(
    x: Tensor,
    basis: Tensor,
    weight: Tensor,
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
) -> Tensor:
    num_edges = basis.size(0)
    bounds.check_ptr(_NAME, ptr, num_edges)
    if perm is not None:
        bounds.check_index(_NAME, "edge_perm", perm, num_edges)
    bounds.check_index(_NAME, "src_index", src_index, x.size(0))
    return gather_linear_mul_segment_sum_reference(x, basis, weight, src_index, ptr, perm)


def _grad_kernel(
    x: Tensor,
    g: Tensor,
    basis: Tensor,
    weight: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor,
    t_perm: Tensor | None,
    need_x: bool,
    need_basis: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bounds.check_index("gather_linear_mul_grad", "src_index", src_index, x.size(0))
    bounds.check_index("gather_linear_mul_grad", "dst_index", dst_index, g.size(0))
    dtype = x.dtype
    x, g, basis, weight = widen(x), widen(g), widen(basis), widen(weight)
    dx, dbasis, dweight = x.new_empty(0), x.new_empty(0), x.new_empty(0)
    g_edge = g.index_select(0, dst_index)
    if need_x:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        dx = dx.index_add(0, src_index, g_edge * (basis @ weight.t()))
    if need_basis or need_weight:
        product = x.index_select(0, src_index) * g_edge
        if basis.size(1) != x.size(1):
            product = product.sum(1, keepdim=True)
        if need_basis:
            dbasis = product @ weight
        if need_weight:
            dweight = product.flatten(0, 1).t() @ basis.flatten(0, 1)
    return dx.to(dtype), dbasis.to(dtype), dweight.to(dtype)


# -- shapes ------------------------------------------------------------------------------------------------------------
def _check_shapes(x: Tensor, basis: Tensor, weight: Tensor, src_index: Tensor) -> None:
    torch._check(x.dim() == 3 and basis.dim() == 3 and weight.dim() == 2)
    torch._check(weight.size(0) == x.size(2))
    torch._check(weight.size(1) == basis.size(2))
    torch._check(src_index.size(0) == basis.size(0))


def _forward_fake(
    x: Tensor,
    basis: Tensor,
    weight: Tensor,
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
) -> Tensor:
    _check_shapes(x, basis, weight, src_index)
    return x.new_empty((ptr.size(0) - 1, x.size(1), x.size(2)))


def _grad_fake(
    x: Tensor,
    g: Tensor,
    basis: Tensor,
    weight: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor,
    t_perm: Tensor | None,
    need_x: bool,
    need_basis: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(x, basis, weight, src_index)
    torch._check(g.dim() == 3 and g.size(1) == x.size(1) and g.size(2) == x.size(2))
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(basis.shape if need_basis else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
    )


# -- gradients ---------------------------------------------------------------------------------------------------------
class _Form:
    """The form T on given edges, differentiated in any slot."""

    def __init__(
        self, src: Tensor, dst: Tensor, csr: tuple[Tensor, Tensor | None], t_csr: tuple[Tensor, Tensor | None]
    ) -> None:
        self.src, self.dst, self.csr, self.t_csr = src, dst, csr, t_csr

    def by_g(self, x: Tensor | None, basis: Tensor | None, weight: Tensor | None) -> Tensor | None:
        """dT/dg; ``None`` (zero) when a slot is."""
        if x is None or basis is None or weight is None:
            return None
        out: Tensor = torch.ops.geo.gather_linear_mul_segment_sum(
            x, basis, weight, self.src, self.dst, *self.csr, *self.t_csr
        )
        return out

    def by_others(
        self, x: Tensor, g: Tensor, basis: Tensor, weight: Tensor, need: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """[dT/dx, dT/dbasis, dT/dweight], ``None`` where not needed."""
        if not any(need):
            return [None, None, None]
        if need == (True, False, False):  # the same convolution along the reversed edges
            flipped = _Form(self.dst, self.src, self.t_csr, self.csr)
            return [flipped.by_g(g, basis, weight), None, None]
        grads = torch.ops.geo.gather_linear_mul_grad(
            x, g, basis, weight, self.src, self.dst, *self.csr, *self.t_csr, *need
        )
        return [grad if needed else None for grad, needed in zip(grads, need, strict=True)]


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _forward_backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    x, basis, weight, src, dst, ptr, perm, t_ptr, t_perm = ctx.saved_tensors
    if g is None:
        return (None,) * 9
    dst, t_ptr, t_perm = complete(src, dst, ptr, perm, t_ptr, t_perm, x.size(0))
    form = _Form(src, dst, (ptr, perm), (t_ptr, t_perm))
    return (*form.by_others(x, g, basis, weight, tuple(ctx.needs_input_grad[:3])), *(None,) * 6)


def _grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.need = inputs[10:]


def _grad_backward(ctx: Any, hx: Tensor | None, hb: Tensor | None, hw: Tensor | None) -> tuple[Tensor | None, ...]:
    # The outputs are derivatives of T, so <h, outputs> = T(hx, g, W, basis) + T(x, g, W, hb) + T(x, g, hw, basis).
    x, g, basis, weight, src, dst, ptr, perm, t_ptr, t_perm = ctx.saved_tensors
    hx, hb, hw = (h if need else None for h, need in zip((hx, hb, hw), ctx.need, strict=True))
    form = _Form(src, dst, (ptr, perm), (t_ptr, t_perm))
    need_x, need_g, need_basis, need_weight = ctx.needs_input_grad[:4]
    terms: list[list[Tensor | None]] = [[None, None, None]]
    if hx is not None:
        terms.append(form.by_others(hx, g, basis, weight, (False, need_basis, need_weight)))
    if hb is not None:
        terms.append(form.by_others(x, g, hb, weight, (need_x, False, need_weight)))
    if hw is not None:
        terms.append(form.by_others(x, g, basis, hw, (need_x, need_basis, False)))
    dx, dbasis, dweight = (_sum(*slot) for slot in zip(*terms, strict=True))
    dg = _sum(form.by_g(hx, basis, weight), form.by_g(x, hb, weight), form.by_g(x, basis, hw)) if need_g else None
    return (dx, dg, dbasis, dweight, *(None,) * 9)


define(
    "gather_linear_mul_segment_sum(Tensor x, Tensor basis, Tensor weight, Tensor src_index, Tensor? dst_index, "
    "Tensor ptr, Tensor? perm, Tensor? t_ptr, Tensor? t_perm) -> Tensor",
    _forward_kernel,
    _forward_fake,
    _forward_backward,
    _forward_setup,
)
define(
    "gather_linear_mul_grad(Tensor x, Tensor g, Tensor basis, Tensor weight, Tensor src_index, Tensor dst_index, "
    "Tensor ptr, Tensor? perm, Tensor t_ptr, Tensor? t_perm, bool need_x, bool need_basis, bool need_weight) "
    "-> (Tensor, Tensor, Tensor)",
    _grad_kernel,
    _grad_fake,
    _grad_backward,
    _grad_setup,
)
