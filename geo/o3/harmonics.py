"""Real spherical harmonics as polynomials of a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def solid_harmonics(vec: Tensor, lmax: int) -> Tensor:
    r"""Polynomials :math:`|r|^l \, Y_{lm}(r / |r|)` of vectors, for all degrees up to `lmax`.

    The order, axes and normalisation of the rest of :mod:`geo.o3`: e3nn's ``spherical_harmonics`` with
    ``normalize=False`` and ``'component'``, written as a recurrence in plain PyTorch for any degree. Polynomials: the
    derivatives of every order are right at the zero vector too.

    Args:
        vec: Vectors (x, y, z).
        lmax: Highest degree.

    Shapes:
        vec :math:`(..., 3)`; output :math:`(..., (L+1)^2)`.

    Raises:
        ValueError: Vectors that have not three components, or a degree below 0.

    Example:
        >>> solid_harmonics(torch.tensor([0.0, 2.0, 0.0]), 1)
        tensor([1.0000, 0.0000, 3.4641, 0.0000])
    """
    if vec.dim() < 1 or vec.size(-1) != 3:
        raise ValueError(f"vec has shape {tuple(vec.shape)}, but must be (..., 3)")
    if isinstance(lmax, bool) or not isinstance(lmax, int) or lmax < 0:
        raise ValueError(f"lmax is {lmax!r}, but must be an integer of at least 0")
    x, y, z = vec.unbind(-1)
    square = (vec * vec).sum(-1)
    cosine, sine = torch.ones_like(x), torch.zeros_like(x)  # real and imaginary part of (z + i x)^m
    sectoral = 1.0
    columns: dict[int, Tensor] = {}
    for m in range(lmax + 1):
        if m:
            cosine, sine = z * cosine - x * sine, z * sine + x * cosine
            sectoral *= math.sqrt((2 * m + 1) / (2 * m))
        root = math.sqrt(2) if m else 1.0
        below, last = torch.zeros_like(x), torch.full_like(x, sectoral * root)
        for l in range(m, lmax + 1):
            if l > m:
                two = math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))
                step = math.sqrt((4 * l * l - 1) / (l * l - m * m)) * (y * last - two * square * below)
                below, last = last, step
            columns[l * l + l + m] = last * cosine
            if m:
                columns[l * l + l - m] = last * sine
    return torch.stack([columns[i] for i in range((lmax + 1) ** 2)], -1)
