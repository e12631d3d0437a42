r"""Features of irreps, from e3nn's layout to the one of the kernels and back.

e3nn keeps an irrep of multiplicity C as a block [C, 2l+1], blocks side by side: components together, channels apart.
Kernels that treat all channels alike want it the other way: [..., D, C], a row for each component. Both directions are
one op, each the gradient of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define


def pack_irreps(x: Tensor, degrees: Sequence[int], starts: Sequence[int], mul: int) -> Tensor:
    """Blocks [mul, 2l+1] of ``x`` as rows of components, channels last.

    Args:
        x: Features, [..., F], floating point.
        degrees: Degree l of each block, in the order of the rows wanted.
        starts: Where each block begins in the last axis, or -1: its rows are zero.
        mul: Channels of every block.

    Returns:
        out: [..., D, mul] with D the sum of 2l+1.

    Raises:
        ValueError: Blocks that do not lie in ``x`` or overlap, or as many degrees as starts not given.

    Example:
        >>> import torch
        >>> from geo.ops import pack_irreps
        >>> pack_irreps(torch.arange(8.0), [0, 1], [0, 2], 2).tolist()
        [[0.0, 1.0], [2.0, 5.0], [3.0, 6.0], [4.0, 7.0]]
    """
    if x.dim() < 1:
        raise ValueError("pack_irreps: x must be [..., F], got a tensor of no axis")
    check_places("pack_irreps", degrees, starts, mul, x.size(-1))
    args = (x.reshape(math.prod(x.shape[:-1]), x.size(-1)), list(degrees), list(starts), mul, x.size(-1), False)
    out: Tensor = bounds.call("pack_irreps", torch.ops.geo.pack_irreps, args)
    return out.view(*x.shape[:-1], *out.shape[1:])


def unpack_irreps(x: Tensor, degrees: Sequence[int], starts: Sequence[int], mul: int, size: int) -> Tensor:
    """The inverse of :func:`pack_irreps`; what no block fills is zero.

    Args:
        x: Rows of components, [..., D, mul].
        degrees: Degree l of each block, in the order of the rows.
        starts: Where each block begins in the output, or -1: its rows are left out.
        mul: Channels of every block.
        size: Length F of the output's last axis.

    Returns:
        out: [..., F].

    Raises:
        ValueError: Blocks that do not lie in [0, F) or overlap, or rows that are not those of the degrees.

    Example:
        >>> import torch
        >>> from geo.ops import pack_irreps, unpack_irreps
        >>> x = torch.arange(8.0)
        >>> torch.equal(unpack_irreps(pack_irreps(x, [0, 1], [0, 2], 2), [0, 1], [0, 2], 2, 8), x)
        True
    """
    check_places("unpack_irreps", degrees, starts, mul, size)
    rows = sum(2 * l + 1 for l in degrees)
    if x.dim() < 2 or x.shape[-2:] != (rows, mul):
        raise ValueError(f"unpack_irreps: x has shape {tuple(x.shape)}, but must be (..., {rows}, {mul})")
    args = (x.reshape(math.prod(x.shape[:-2]), rows, mul), list(degrees), list(starts), mul, size, True)
    out: Tensor = bounds.call("unpack_irreps", torch.ops.geo.pack_irreps, args)
    return out.view(*x.shape[:-2], size)


def check_places(name: str, degrees: Sequence[int], starts: Sequence[int], mul: int, size: int) -> None:
    """Raise ValueError unless the blocks lie in [0, size) and apart."""
    if len(degrees) != len(starts):
        raise ValueError(f"{name}: got {len(degrees)} degrees and {len(starts)} starts")
    if mul < 0 or size < 0:
        raise ValueError(f"{name}: channels and size must not be negative, got {mul} and {size}")
    end = 0
    for start, l in sorted(zip(starts, degrees, strict=True)):
        if l < 0 or start < -1 or (start >= 0 and start + mul * (2 * l + 1) > size):
            raise ValueError(f"{name}: {mul} channels of degree {l} from {start} on do not lie in [0, {size})")
        if start >= 0:
            if start < end:
                raise ValueError(f"{name}: the block of degree {l} from {start} on overlaps the one before it")
            end = start + mul * (2 * l + 1)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def pack_irreps_reference(x: Tensor, degrees: Sequence[int], starts: Sequence[int], mul: int) -> Tensor:
    """:func:`pack_irreps` block by block: the specification, also under torch.func."""
    rows = [x.new_zeros(*x.shape[:-1], 0, mul)]
    for l, start in zip(degrees, starts, strict=True):
        n = 2 * l + 1
        if start < 0:
            rows.append(x.new_zeros(*x.shape[:-1], n, mul))
        else:
            rows.append(x[..., start : start + mul * n].unflatten(-1, (mul, n)).transpose(-1, -2))
    return torch.cat(rows, -2)


def unpack_irreps_reference(x: Tensor, degrees: Sequence[int], starts: Sequence[int], mul: int, size: int) -> Tensor:
    """:func:`unpack_irreps` block by block."""
    row = 0
    blocks: list[tuple[int, Tensor]] = []
    for l, start in zip(degrees, starts, strict=True):
        n = 2 * l + 1
        if start >= 0:
            blocks.append((start, x[..., row : row + n, :].transpose(-1, -2).flatten(-2)))
        row += n
    placed, end = [], 0
    for start, block in sorted(blocks, key=lambda entry: entry[0]):
        placed += [x.new_zeros(*x.shape[:-2], start - end), block]
        end = start + block.size(-1)
    return torch.cat([*placed, x.new_zeros(*x.shape[:-2], size - end)], -1)


def _kernel(x: Tensor, degrees: list[int], starts: list[int], mul: int, size: int, inverse: bool) -> Tensor:
    if inverse:
        return unpack_irreps_reference(x, degrees, starts, mul, size)
    return pack_irreps_reference(x, degrees, starts, mul)


# -- shapes and gradients ----------------------------------------------------------------------------------------------
def _fake(x: Tensor, degrees: list[int], starts: list[int], mul: int, size: int, inverse: bool) -> Tensor:
    torch._check(x.dim() == (3 if inverse else 2))
    return x.new_empty((x.size(0), size) if inverse else (x.size(0), sum(2 * l + 1 for l in degrees), mul))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    *options, inverse = ctx.options
    return (torch.ops.geo.pack_irreps(g, *options, not inverse), *(None,) * 5)


define(
    "pack_irreps(Tensor x, int[] degrees, int[] starts, int mul, int size, bool inverse) -> Tensor",
    _kernel,
    _fake,
    _backward,
    _setup,
)
