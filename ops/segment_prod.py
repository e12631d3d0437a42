r"""Derivatives of the product of each segment, to any order and whatever the number of zeros.

Nothing is divided. The gradient of :math:`\prod_e x_e` is the product of the other rows. Its derivatives are those of

.. math:: M(v_1, \dots, v_K; x)_e = \frac{\partial^K}{\partial \epsilon_1 \cdots \partial \epsilon_K}
    \prod_{e' \ne e} \Big( x_{e'} + \sum_j \epsilon_j v_{j e'} \Big) \Big|_{\epsilon = 0},

a family closed under differentiation: with :math:`u` the gradient of the result, that with respect to :math:`x` is
:math:`M(v_1, \dots, v_K, u; x)`, and that with respect to :math:`v_j` has :math:`u` in place of :math:`v_j`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import widen
from geo.ops.registration import define
from geo.ops.segment import Order, check_order, per_segment, product_reference, rows_of

Polynomial = list[Tensor]  # the coefficient of each subset of the epsilons, numbered by its bits; none holds a square


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    out = []
    for s in range(len(a)):
        terms = [a[t] * b[s - t] for t in range(s + 1) if t & s == t]
        out.append(sum(terms[1:], terms[0]))
    return out


def _before(rows: Polynomial, place: Tensor, longest: int) -> Polynomial:
    """The product of the rows before each in its segment, where it is number ``place``, by doubling."""

    def earlier(rows: Polynomial, step: int) -> Polynomial:
        return [torch.where(place >= step, row.roll(step, 0), int(s == 0)) for s, row in enumerate(rows)]

    rows = earlier(rows, 1)
    for k in range(max(longest - 2, 0).bit_length()):
        rows = _times(earlier(rows, 1 << k), rows)
    return rows


def _mixed(tangents: Tensor, src: Tensor, order: Order) -> Tensor:
    """:math:`M(v; x)` for v = ``tangents`` [K, E, *F] and x = ``src`` [E, *F]."""
    num_rows, ptr, perm = src.size(0), order.ptr, order.perm
    if num_rows == 0:
        return torch.empty_like(src, memory_format=torch.contiguous_format)
    x, v = widen(src), widen(tangents)
    if perm is not None:
        x, v = x.index_select(0, perm), v.index_select(1, perm)
    rows = [x, *[torch.zeros_like(x)] * ((1 << v.size(0)) - 1)]
    for j in range(v.size(0)):
        rows[1 << j] = v[j]
    segment, here = rows_of(Order(ptr), num_rows), torch.arange(num_rows, device=ptr.device)
    shape = (-1, *[1] * (src.dim() - 1))
    longest = int(ptr.diff().max()) if bounds.reads_values(ptr) else num_rows
    before = _before(rows, (here - ptr[segment]).view(shape), longest)
    after = _before([row.flip(0) for row in rows], (ptr[segment + 1] - 1 - here).flip(0).view(shape), longest)
    out = _times(before, [row.flip(0) for row in after])[-1].to(src.dtype)
    return out if perm is None else torch.empty_like(out).index_copy_(0, perm, out)


# -- schemas, shapes and gradients -------------------------------------------------------------------------------------
def _prod_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_prod", order, src.size(0))
    return product_reference(src, order)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _prod_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.geo.segment_prod_grad(grad, *ctx.saved_tensors), None, None, None


# grad_i times the product of the other rows: no case for zeros, and NaN only where the others give it (also by 0 * inf)
def _grad_kernel(grad: Tensor, src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_prod_grad", order, src.size(0))
    others = _mixed(src.new_empty(0, *src.shape), widen(src), order)
    return (widen(grad).index_select(0, rows_of(order, src.size(0))) * others).to(src.dtype)


def _grad_fake(grad: Tensor, src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None) -> Tensor:
    torch._check(grad.dim() == src.dim() and ptr.dim() == 1)
    return torch.empty_like(src, memory_format=torch.contiguous_format)


def _grad_backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
    grad, src, *order = ctx.saved_tensors
    by_grad = by_src = None
    if ctx.needs_input_grad[0]:
        others = torch.ops.geo.segment_prod_grad(torch.ones_like(grad), src, *order)
        by_grad = torch.ops.geo.segment_sum(u * others, *order, False)
    if ctx.needs_input_grad[1]:
        scaled = u * torch.ops.geo.gather_csr(grad, *order, src.size(0))
        by_src = torch.ops.geo.segment_prod_mixed(scaled.unsqueeze(0), src, *order)
    return by_grad, by_src, None, None, None


# An infinite factor meets coefficients of 0 here: it makes the second and higher derivatives of its segment NaN.
def _mixed_kernel(tangents: Tensor, src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_prod_mixed", order, src.size(0))
    return _mixed(tangents, src, order).contiguous()


def _mixed_fake(tangents: Tensor, src: Tensor, *_: Any) -> Tensor:
    torch._check(tangents.dim() == src.dim() + 1)
    return torch.empty_like(src, memory_format=torch.contiguous_format)


def _mixed_backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
    tangents, src, *order = ctx.saved_tensors

    def mixed(*parts: Tensor) -> Tensor:
        out: Tensor = torch.ops.geo.segment_prod_mixed(torch.cat([*parts, u.unsqueeze(0)]), src, *order)
        return out

    by_tangents = by_src = None
    if ctx.needs_input_grad[0]:
        by_tangents = torch.stack([mixed(tangents[:j], tangents[j + 1 :]) for j in range(tangents.size(0))])
    if ctx.needs_input_grad[1]:
        by_src = mixed(tangents)
    return by_tangents, by_src, None, None, None


_ORDER = "Tensor ptr, Tensor? perm, Tensor? index"
define(f"segment_prod(Tensor src, {_ORDER}) -> Tensor", _prod_kernel, per_segment, _prod_backward, _save)
define(
    f"segment_prod_grad(Tensor grad, Tensor src, {_ORDER}) -> Tensor", _grad_kernel, _grad_fake, _grad_backward, _save
)
define(
    f"segment_prod_mixed(Tensor tangents, Tensor src, {_ORDER}) -> Tensor",
    _mixed_kernel,
    _mixed_fake,
    _mixed_backward,
    _save,
)
