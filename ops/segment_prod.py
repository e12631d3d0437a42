"""The product of each segment and its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geo.ops.registration import define
from geo.ops.segment import Order, check_order, per_segment, product_reference


def _prod_kernel(src: Tensor, ptr: Tensor, perm: Tensor | None, index: Tensor | None) -> Tensor:
    order = Order(ptr, perm, index)
    check_order("segment_prod", order, src.size(0))
    return product_reference(src, order)


def _prod_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _prod_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The product of the others: out / x; where one factor is 0, that of the non-zero ones, for this factor alone.
    src, ptr, perm, index = ctx.saved_tensors
    zero = src == 0
    factors = torch.where(zero, 1, src)
    rest = torch.ops.geo.segment_prod(factors, ptr, perm, index)
    zeros = torch.ops.geo.segment_sum(zero.to(src.dtype), ptr, perm, index, False)
    rest, zeros = (torch.ops.geo.gather_csr(t, ptr, perm, index, src.size(0)) for t in (grad * rest, zeros))
    return torch.where(zeros - zero.to(src.dtype) == 0, rest / factors, 0), None, None, None


define(
    "segment_prod(Tensor src, Tensor ptr, Tensor? perm, Tensor? index) -> Tensor",
    _prod_kernel,
    per_segment,
    _prod_backward,
    _prod_setup,
)
