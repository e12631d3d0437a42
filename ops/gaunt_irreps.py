"""Products of functions on the sphere on features as e3nn has them: blocks [mul, 2l+1] of irreps, side by side.

``geo::gaunt_product_irreps`` is ``geo::gaunt_product`` with the change of layout inside: at small degrees copies to the
other layout and back cost more than the product. Its gradients are the op itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.gaunt import LMAX, check_method, gaunt_product, gaunt_product_reference, gradients
from geo.ops.irreps import (
    check_places,
    pack_irreps,
    pack_irreps_reference,
    unpack_irreps,
    unpack_irreps_reference,
)
from geo.ops.registration import define


class Blocks(NamedTuple):
    """Where a function on the sphere stands in features of irreps: blocks [mul, 2l+1] of its degrees.

    Args:
        starts: Of each degree from 0 on, the place of its block, or -1: it is absent.
        mul: Channels.
        size: Length of the features.
    """

    starts: tuple[int, ...]
    mul: int
    size: int


def gaunt_product_irreps(
    x: Tensor,
    y: Tensor,
    blocks_x: Blocks,
    blocks_y: Blocks,
    blocks_out: Blocks,
    bracket: bool = False,
    scale_x: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_out: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """:func:`gaunt_product` of features in e3nn's layout, without a copy in the other one.

    Args:
        x: Features, [..., blocks_x.size].
        y: Features, [..., blocks_y.size]; all have the same channels, or one.
        blocks_x: Where the first function stands in ``x``.
        blocks_y: Where the second function stands in ``y``.
        blocks_out: Where the result stands in the output; the rest of that is zero.
        bracket: Take the Poisson bracket. (default: ``False``)
        scale_x: Factor of each degree of ``x``, [..., L1+1, C] or with one channel. (default: 1)
        scale_y: Factor of each degree of ``y``, [..., L2+1, C] or with one channel. (default: 1)
        scale_out: Factor of each degree of the output, [..., L3+1, C] or with one channel. (default: 1)
        method: As of :func:`gaunt_product`. (default: ``'auto'``)

    Returns:
        out: [..., blocks_out.size] in the promoted dtype.

    Raises:
        ValueError: Shapes that do not fit together, or an unknown method.
        TypeError: Tensors that are not floating point.

    Example:
        >>> import torch
        >>> from geo.ops.gaunt_irreps import Blocks, gaunt_product_irreps
        >>> blocks = Blocks(starts=(0, 8), mul=8, size=32)  # 8x0e + 8x1o
        >>> gaunt_product_irreps(torch.randn(5, 32), torch.randn(5, 32), blocks, blocks, blocks).shape
        torch.Size([5, 32])
    """
    x, y, scales, lead = _prepare(x, y, blocks_x, blocks_y, blocks_out, scale_x, scale_y, scale_out, method)
    if lead is None:
        return _by_packing(x, y, blocks_x, blocks_y, blocks_out, bracket, scales, method)
    if method == "grid":
        out = _by_packing(x, y, blocks_x, blocks_y, blocks_out, bracket, scales, method)
    else:
        starts = (list(blocks_x.starts), list(blocks_y.starts), list(blocks_out.starts))
        sizes = (blocks_x.mul, blocks_y.mul, blocks_out.size, blocks_out.mul)
        args = (x, y, *scales, *starts, *sizes, bool(bracket), method)
        out = bounds.call("gaunt_product_irreps", torch.ops.geo.gaunt_product_irreps, args)
    return out if len(lead) == 1 else out.view(*lead, out.size(1))


def gaunt_product_irreps_reference(
    x: Tensor,
    y: Tensor,
    blocks_x: Blocks,
    blocks_y: Blocks,
    blocks_out: Blocks,
    bracket: bool = False,
    scale_x: Tensor | None = None,
    scale_y: Tensor | None = None,
    scale_out: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    """:func:`gaunt_product_irreps` by the other layout: the specification, also under torch.func."""
    scales = (scale_x, scale_y, scale_out)
    _prepare(x, y, blocks_x, blocks_y, blocks_out, *scales, method)
    first, second = (
        pack_irreps_reference(t, range(len(b.starts)), b.starts, b.mul) for t, b in ((x, blocks_x), (y, blocks_y))
    )
    degrees = range(len(blocks_out.starts))
    out = gaunt_product_reference(first, second, len(degrees) - 1, bracket, *scales, method)
    return unpack_irreps_reference(out, degrees, blocks_out.starts, blocks_out.mul, blocks_out.size)


_Scales = tuple[Tensor | None, Tensor | None, Tensor | None]


def _prepare(
    x: Tensor,
    y: Tensor,
    blocks_x: Blocks,
    blocks_y: Blocks,
    blocks_out: Blocks,
    scale_x: Tensor | None,
    scale_y: Tensor | None,
    scale_out: Tensor | None,
    method: str,
) -> tuple[Tensor, Tensor, _Scales, torch.Size | None]:
    """The operands in one dtype, and as rows with the leading shape, or ``None`` where they have to be broadcast."""
    named = (("blocks_x", blocks_x, LMAX), ("blocks_y", blocks_y, LMAX), ("blocks_out", blocks_out, 2 * LMAX))
    for name, blocks, most in named:
        _check_blocks(name, blocks, most)
    lmax = (len(blocks_x.starts) - 1, len(blocks_y.starts) - 1, len(blocks_out.starts) - 1)
    check_method(method, lmax)
    tensors = [x, y]
    for name, t, blocks in (("x", x, blocks_x), ("y", y, blocks_y)):
        if t.dim() < 1 or t.size(-1) != blocks.size:
            raise ValueError(f"{name}: expected [..., {blocks.size}], got shape {list(t.shape)}")
    wide = {blocks_x.mul, blocks_y.mul}
    scales: _Scales = (scale_x, scale_y, scale_out)
    for name, scale, top in zip(("scale_x", "scale_y", "scale_out"), scales, lmax, strict=True):
        if scale is None:
            continue
        if scale.dim() < 2 or scale.size(-2) != top + 1:
            raise ValueError(f"{name}: expected [..., {top + 1}, C], one row a degree, got {list(scale.shape)}")
        tensors.append(scale)
        wide.add(scale.size(-1))
    for t in tensors:
        if not t.is_floating_point():
            raise TypeError(f"expected floating-point tensors, got {t.dtype}")
    if len(wide - {1}) > 1 or {blocks_out.mul} != (wide - {1} or {1}):
        raise ValueError(
            f"operands have {sorted(wide)} channels, the output {blocks_out.mul}: they must agree but for single ones"
        )
    if any(t.dtype != x.dtype for t in tensors):
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        x, y = x.to(dtype), y.to(dtype)
        a, b, c = (None if s is None else s.to(dtype) for s in scales)
        scales = (a, b, c)
    lead = x.shape[:-1]
    rows = math.prod(lead)
    fits = all(s is None or math.prod(s.shape[:-2]) == 1 or s.shape[:-2] == lead for s in scales)
    if y.shape[:-1] != lead or not fits:
        return x, y, scales, None
    a, b, c = (None if s is None else s.reshape(rows if s.shape[:-2] == lead else 1, *s.shape[-2:]) for s in scales)
    return x.reshape(rows, x.size(-1)), y.reshape(rows, y.size(-1)), (a, b, c), lead


def _check_blocks(name: str, blocks: Blocks, most: int) -> None:
    if not 0 < len(blocks.starts) <= most + 1:
        raise ValueError(f"{name} has {len(blocks.starts)} degrees, but must have from 1 to {most + 1}")
    check_places(name, range(len(blocks.starts)), blocks.starts, blocks.mul, blocks.size)


def _by_packing(
    x: Tensor,
    y: Tensor,
    blocks_x: Blocks,
    blocks_y: Blocks,
    blocks_out: Blocks,
    bracket: bool,
    scales: _Scales,
    method: str,
) -> Tensor:
    first, second = (pack_irreps(t, range(len(b.starts)), b.starts, b.mul) for t, b in ((x, blocks_x), (y, blocks_y)))
    degrees = range(len(blocks_out.starts))
    out = gaunt_product(first, second, len(degrees) - 1, bracket, *scales, method)
    return unpack_irreps(out, degrees, blocks_out.starts, blocks_out.mul, blocks_out.size)


def _pack(x: Tensor, starts: list[int], mul: int) -> Tensor:
    packed: Tensor = torch.ops.geo.pack_irreps(x, list(range(len(starts))), starts, mul, x.size(1), False)
    return packed


def _unpack(x: Tensor, starts: list[int], mul: int, size: int) -> Tensor:
    flat: Tensor = torch.ops.geo.pack_irreps(x, list(range(len(starts))), starts, mul, size, True)
    return flat


def _irreps_kernel(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor | None,
    scale_y: Tensor | None,
    scale_out: Tensor | None,
    starts_x: list[int],
    starts_y: list[int],
    starts_out: list[int],
    mul_x: int,
    mul_y: int,
    size: int,
    channels: int,
    bracket: bool,
    method: str,
) -> Tensor:
    lmax = [len(starts) - 1 for starts in (starts_x, starts_y, starts_out)]
    packed = _pack(x, starts_x, mul_x), _pack(y, starts_y, mul_y)
    out = torch.ops.geo.gaunt_product(*packed, scale_x, scale_y, scale_out, *lmax, channels, bracket, method)
    return _unpack(out, starts_out, channels, size)


def _irreps_fake(
    x: Tensor,
    y: Tensor,
    scale_x: Tensor | None,
    scale_y: Tensor | None,
    scale_out: Tensor | None,
    starts_x: list[int],
    starts_y: list[int],
    starts_out: list[int],
    mul_x: int,
    mul_y: int,
    size: int,
    channels: int,
    bracket: bool,
    method: str,
) -> Tensor:
    torch._check(x.dim() == 2 and y.dim() == 2)
    torch._check(x.size(0) == y.size(0))
    return x.new_empty((x.size(0), size))


def _irreps_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _irreps_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, y, *scales = ctx.saved_tensors
    *starts, mul_x, mul_y, size, channels, bracket, method = ctx.options
    slots, need = [x, y, g], ctx.needs_input_grad
    muls, sizes = (mul_x, mul_y, channels), (x.size(1), y.size(1), size)
    if any(need[2:5]):
        packed = [_pack(t, s, mul) for t, s, mul in zip(slots, starts, muls, strict=True)]
        lmax = [len(s) - 1 for s in starts]
        grads = gradients(packed, scales, lmax, bracket, method, need)
        for i in range(2):
            grad = grads[i]
            grads[i] = None if grad is None else _unpack(grad, starts[i], muls[i], sizes[i])
        return (*grads, *(None,) * 9)
    found: list[Tensor | None] = [None, None]
    for i in range(2):
        j, k = (i + 1) % 3, (i + 2) % 3
        if need[i]:
            arguments = (slots[j], slots[k], scales[j], scales[k], scales[i], starts[j], starts[k], starts[i])
            found[i] = torch.ops.geo.gaunt_product_irreps(
                *arguments, muls[j], muls[k], sizes[i], muls[i], bracket, method
            )
    return (*found, *(None,) * 12)


define(
    "gaunt_product_irreps(Tensor x, Tensor y, Tensor? scale_x, Tensor? scale_y, Tensor? scale_out, int[] starts_x, "
    "int[] starts_y, int[] starts_out, int mul_x, int mul_y, int size, int channels, bool bracket, str method) "
    "-> Tensor",
    _irreps_kernel,
    _irreps_fake,
    _irreps_backward,
    _irreps_setup,
)
