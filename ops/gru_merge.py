r"""Merges of pairs of rows by a GRU cell, averaged over both ways, as one op.

The merge of the learned monoid of `Learnable Commutative Monoids for Graph Neural Networks
<https://arxiv.org/abs/2212.08541>`_: rows are gathered and go through all gates in panels, and the gradient makes the
gates anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import check_one_device, promote, widen
from geo.ops.registration import define


def gru_merge(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Merge pairs of rows by a GRU cell, averaged over which row is the input and which the state.

    .. math:: out_p = \tfrac12 \bigl( g(a, b) + g(b, a) \bigr), \qquad a = x_{left_p}, \; b = x_{right_p}

    where :math:`g(input, state)` is :class:`torch.nn.GRUCell`:

    .. math::
        r &= \sigma(W_r a + U_r b + \dots), \quad z = \sigma(W_z a + U_z b + \dots), \\
        n &= \tanh(W_n a + w_n + r \odot (U_n b + u_n)), \quad g(a, b) = (1 - z) \odot n + z \odot b

    Commutative bit for bit. On the CPU r and z come from sums and differences of rows and of weights: their error is
    relative to the larger row and the larger weight, so scale rows alike; infinite rows or weights, and rows beyond
    half the largest number of the dtype, give NaN. Memory is that of the results and of some tens of weights, also for
    the gradient, which is exact where rows occur many times as well. Results are bitwise the same on any number of
    threads. Second derivatives, of any order, run in plain PyTorch.

    Args:
        x: floating [R, F].
        left: int64 [P], rows of ``x``.
        right: int64 [P] likewise.
        weight: [6 F, F], the cell's ``weight_ih`` above its ``weight_hh``.
        bias: [6 F], ``bias_ih`` and ``bias_hh`` likewise.

    Returns:
        [P, F], in the common dtype of all arguments; float16 and bfloat16 are computed in float32.

    Raises:
        IndexError: an entry of ``left`` or ``right`` is not in [0, R).
        ValueError: a wrong shape, dtype or device.

    Example:
        >>> import torch
        >>> from geo.ops import gru_merge
        >>> x, pair = torch.tensor([[2.0], [6.0], [4.0]]), torch.tensor([0, 1])
        >>> gru_merge(x, pair, pair.flip(0), torch.zeros(6, 1), torch.zeros(6)).flatten().tolist()  # z is 1/2, n is 0
        [2.0, 2.0]
    """
    args, dtype = _prepare(x, left, right, weight, bias)
    checks = (("src_index", left, x.size(0) - 1), ("dst_index", right, x.size(0) - 1))
    try:
        out: Tensor = bounds.call("gru_merge", torch.ops.geo.gru_merge, args, checks)
    except IndexError as err:  # the CUDA kernel's flag has other names
        text = str(err).replace(" src_index[", " left[").replace(" dst_index[", " right[")
        raise IndexError(text) from None
    return out.to(dtype)


def _prepare(
    x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor
) -> tuple[tuple[Tensor, ...], torch.dtype]:
    """What the op takes, and the dtype of the result."""
    if x.dim() != 2:
        raise ValueError(f"gru_merge: x must be [R, F], got {list(x.shape)}")
    for name, index in (("left", left), ("right", right)):
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"gru_merge: {name} must be int64 [P], got {index.dtype} {list(index.shape)}")
    if left.size(0) != right.size(0):
        raise ValueError(f"gru_merge: left has {left.size(0)} rows and right {right.size(0)}, they must be as many")
    width = x.size(1)
    for name, t, shape in (("weight", weight, [6 * width, width]), ("bias", bias, [6 * width])):
        if list(t.shape) != shape:
            raise ValueError(f"gru_merge: {name} must be {shape} for x {list(x.shape)}, got {list(t.shape)}")
    check_one_device("gru_merge", x=x, left=left, right=right, weight=weight, bias=bias)
    x, weight, bias = promote(x, weight, bias)
    return (widen(x), left, right, widen(weight), widen(bias)), x.dtype


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def gru_merge_reference(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`gru_merge` in plain PyTorch, the specification, also under torch.func."""
    args, dtype = _prepare(x, left, right, weight, bias)
    for name, index in (("left", left), ("right", right)):
        bounds.check_index("gru_merge", name, index, x.size(0))
    return _plain(*args).to(dtype)


class _Cells(NamedTuple):
    """Both ways of all pairs, [2 P, F]: first the left rows as inputs, then the right ones."""

    rows: Tensor
    state: Tensor
    reset: Tensor
    update: Tensor
    new: Tensor
    scaled: Tensor  # what the reset gate is multiplied with

    def value(self) -> Tensor:
        return torch.lerp(self.new, self.state, self.update)


def _cells(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> _Cells:
    rows = x.index_select(0, torch.cat([left, right]))
    products = F.linear(rows, weight, bias).view(rows.size(0), 6, x.size(1))
    of_input, of_state = products[:, :3], _swapped(products[:, 3:])
    reset, update = torch.sigmoid(of_input[:, :2] + of_state[:, :2]).unbind(1)
    scaled = of_state[:, 2]
    return _Cells(rows, _swapped(rows), reset, update, torch.tanh(of_input[:, 2] + reset * scaled), scaled)


def _swapped(both: Tensor) -> Tensor:
    """What belongs to the other row of each pair."""
    return both.roll(both.size(0) // 2, 0)


def _plain(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        there, back = _cells(x, left, right, weight, bias).value().view(2, left.size(0), x.size(1)).unbind()
        return 0.5 * (there + back)


def _kernel(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    bounds.check_index("gru_merge", "left", left, x.size(0))
    bounds.check_index("gru_merge", "right", right, x.size(0))
    return _plain(x, left, right, weight, bias)


def _backward_kernel(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor, need_x: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        rows, state, reset, update, new, scaled = _cells(x, left, right, weight, bias)
        g = 0.5 * grad.repeat(2, 1)
        by_new = g * (1 - update) * (1 - new * new)
        by_update = g * (state - new) * update * (1 - update)
        by_reset = by_new * scaled * reset * (1 - reset)
        by_state = _swapped(torch.cat([by_reset, by_update, by_new * reset], 1))
        by_products = torch.cat([by_reset, by_update, by_new, by_state], 1)
        sides = torch.addmm(_swapped(g * update), by_products, weight) if need_x else x.new_zeros(0, x.size(1))
        if not need_weights:
            return sides, *_no_weights(weight, bias)
        return sides, by_products.t() @ rows, by_products.sum(0)


def _no_weights(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(0, weight.size(1)), bias.new_empty(0)


# -- shapes ------------------------------------------------------------------------------------------------------------
def _check_shapes(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> None:
    torch._check(x.dim() == 2 and left.dim() == 1 and right.dim() == 1 and weight.dim() == 2 and bias.dim() == 1)
    torch._check(left.size(0) == right.size(0))
    torch._check(weight.size(1) == x.size(1))
    torch._check(weight.size(0) == bias.size(0))


def _fake(x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_shapes(x, left, right, weight, bias)
    return x.new_empty(left.size(0), x.size(1))


def _backward_fake(
    grad: Tensor, x: Tensor, left: Tensor, right: Tensor, weight: Tensor, bias: Tensor, need_x: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(x, left, right, weight, bias)
    sides = x.new_empty(2 * left.size(0) if need_x else 0, x.size(1))
    if not need_weights:
        return sides, *_no_weights(weight, bias)
    return sides, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


# -- gradients ---------------------------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: a checkpoint around this op gives them out once
    x, left, right, _, _ = saved
    need_x, _, _, need_weight, need_bias = ctx.needs_input_grad[:5]
    sides, by_weight, by_bias = torch.ops.geo.gru_merge_backward(grad, *saved, need_x, need_weight or need_bias)
    by_x = torch.ops.geo.scatter_sum(sides, torch.cat([left, right]), x.size(0), False) if need_x else None
    return by_x, None, None, by_weight if need_weight else None, by_bias if need_bias else None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """By autograd, of the plain forward; that is differentiable itself, hence derivatives of any order."""
    again = torch.is_grad_enabled()
    g, x, left, right, weight, bias = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [
            t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_() for t in (g, x, weight, bias)
        ]
        rows = leaves[1].index_select(0, torch.cat([left, right]))
        number = torch.arange(rows.size(0), device=x.device)
        out = _plain(rows, number[: left.size(0)], number[left.size(0) :], *leaves[2:])
        first = torch.autograd.grad(out, [rows, *leaves[2:]], leaves[0], create_graph=True)
        pairs = [(f, t) for f, t in zip(first, grads, strict=True) if t is not None and t.numel() == f.numel()]
    second: Sequence[Tensor | None] = [None] * 4
    if pairs:
        second = torch.autograd.grad(
            [f for f, _ in pairs], leaves, [t for _, t in pairs], create_graph=again, allow_unused=True
        )
    by_grad, by_x, by_weight, by_bias = second
    return by_grad, by_x, None, None, by_weight, by_bias, None, None


# All floating tensors are float32, or all float64. `sides` are the gradients of the left rows, then of the right ones;
# what is not needed is empty.
define(
    "gru_merge(Tensor x, Tensor left, Tensor right, Tensor weight, Tensor bias) -> Tensor",
    _kernel,
    _fake,
    _backward,
    _setup,
)
define(
    "gru_merge_backward(Tensor grad, Tensor x, Tensor left, Tensor right, Tensor weight, Tensor bias, bool need_x, "
    "bool need_weights) -> (Tensor sides, Tensor dweight, Tensor dbias)",
    _backward_kernel,
    _backward_fake,
    _backward_backward,
    _backward_setup,
)
