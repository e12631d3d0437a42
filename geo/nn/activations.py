"""Activations by name; GELU with a second derivative that is cheap, since losses on forces differentiate twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 15  # elements that a chain of elementwise steps keeps in a core's cache


class _Gelu(torch.autograd.Function):
    """x Phi(x), Phi the normal distribution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = _GeluSlope.apply(x, grads[0])  # type: ignore[no-untyped-call]
        return out


class _GeluSlope(torch.autograd.Function):
    """g (Phi(x) + x phi(x)), and its derivative g h phi(x) (2 - x^2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(x, g)
        return torch.ops.aten.gelu_backward(g, x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, g = ctx.saved_tensors
        h = grads[0]
        dx = _bend(x, g, h) if ctx.needs_input_grad[0] else None
        dg = _GeluSlope.apply(x, h) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        return dx, dg


def _bend(x: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """G h phi(x) (2 - x^2)."""
    scale = 1 / math.sqrt(2 * math.pi)
    if torch.is_grad_enabled() or x.is_cuda or not (x.is_contiguous() and g.is_contiguous() and h.is_contiguous()):
        square = x * x
        return g * h * (2 - square) * torch.exp(-0.5 * square) * scale
    out = torch.empty_like(x)
    parts = (t.view(-1).split(_CHUNK) for t in (x, g, h, out))
    buffer = x.new_empty(min(_CHUNK, x.numel()))
    for x_part, g_part, h_part, out_part in zip(*parts, strict=True):
        square = torch.mul(x_part, x_part, out=buffer[: x_part.numel()])
        torch.mul(square, -0.5, out=out_part).exp_().mul_(g_part).mul_(h_part)
        out_part.mul_(square.sub_(2).mul_(-scale))
    return out


def gelu(x: Tensor) -> Tensor:
    r"""The exact GELU, :math:`x \Phi(x)`; as `torch.nn.functional.gelu`, with a faster double backward.

    Args:
        x: Any floating tensor.

    Example:
        >>> gelu(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.8413])
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return F.gelu(x)
    out: Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
    return out


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": F.silu, "tanh": torch.tanh, "relu": F.relu}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called `name`; raises ValueError for an unknown one."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"act is {name!r}, but must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[name]
