r"""Couplings of functions on the sphere, and the two layouts of their coefficients.

With e3nn's ``wigner_3j`` :math:`w` (norm 1) and harmonics of mean square 1,

.. math::
    \langle Y_{l_1 i} Y_{l_2 j} Y_{l_3 k} \rangle = g_{l_1 l_2 l_3} w_{ijk}, \qquad
    \langle \{Y_{l_1 i}, Y_{l_2 j}\} Y_{l_3 k} \rangle = d_{l_1 l_2 l_3} w_{ijk}

The first vanishes unless :math:`l_1 + l_2 + l_3` is even, the second unless it is odd: the product of two functions
and their Poisson bracket :math:`\{f, h\}(u) = u \cdot (\nabla f \times \nabla h)` have no path in common, and all
paths together.

A signal is a function on the sphere, true (parity :math:`(-1)^l`) or pseudo (:math:`(-1)^{l+1}`); irreps with both are
two signals. e3nn's flat layout holds a block [C, 2l+1] for each irrep; the dense one, [..., (L+1)^2, C], has channels
last and a row for every degree up to L, first those of the true signal, then those of the pseudo one.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from geo.o3.sphere_grid import SphereGrid

if TYPE_CHECKING:
    from e3nn.o3 import Irreps

NORMALIZATIONS = ("component", "norm", "integral")


class Block(NamedTuple):
    """Where one irrep stands in the flat layout."""

    l: int
    start: int
    stop: int


class Signals(NamedTuple):
    """What irreps say of signals: channels, and the blocks of the true (1) and of the pseudo (-1) one.

    In the order of the dense rows: the degrees, and where each begins in the flat layout (-1: it is absent).
    """

    mul: int
    blocks: dict[int, list[Block]]
    row_degrees: list[int]
    row_starts: list[int]
    size: int

    def lmax(self, parity: int) -> int:
        """Highest degree of a signal, -1 where there is none."""
        return max([-1, *[block.l for block in self.blocks[parity]]])

    def degrees(self, parity: int) -> list[int]:
        """Degrees of a signal that are present."""
        return sorted(block.l for block in self.blocks[parity])

    def rows(self) -> int:
        """Rows of the dense layout."""
        return sum((self.lmax(parity) + 1) ** 2 for parity in (1, -1))


def parse_signals(irreps: str | Irreps, name: str = "irreps") -> Signals:
    """The signals of `irreps`; ValueError where they are none."""
    from e3nn.o3 import Irreps

    try:
        parsed = Irreps(irreps)
    except (ValueError, TypeError, AssertionError) as err:
        raise ValueError(f"{name} is {irreps!r}, which e3nn does not read: {err}") from None
    if not len(parsed):
        raise ValueError(f"{name} is empty, but needs at least one irrep")
    if len({mul for mul, _ in parsed}) > 1:
        raise ValueError(f"{name} is '{parsed}', but the multiplicities of signals on the sphere must be equal")
    blocks: dict[int, list[Block]] = {1: [], -1: []}
    for (_, ir), where in zip(parsed, parsed.slices(), strict=True):
        parity = ir.p * (-1) ** ir.l
        if any(block.l == ir.l for block in blocks[parity]):
            raise ValueError(f"{name} is '{parsed}', which has {ir} twice: merge them with .sort().irreps.simplify()")
        blocks[parity].append(Block(ir.l, where.start, where.stop))
    degrees: list[int] = []
    starts: list[int] = []
    for parity in (1, -1):
        at = {block.l: block.start for block in blocks[parity]}
        degrees += range(max(at, default=-1) + 1)
        starts += [at.get(l, -1) for l in range(max(at, default=-1) + 1)]
    return Signals(parsed[0].mul, blocks, degrees, starts, parsed.dim)


def pack(x: Tensor, irreps: str | Irreps) -> Tensor:
    r"""e3nn's flat layout as the dense one: a row for each component, channels last, absent degrees zero.

    Args:
        x: Features in the order of `irreps`.
        irreps: Irreps with one multiplicity C and no irrep twice.

    Shapes:
        x :math:`(..., \text{dim})`; output :math:`(..., D, C)` with :math:`D = (L+1)^2`, or the sum of two such squares
        for irreps of both parities.

    Raises:
        ValueError: Irreps that are no signals, or `x` of another size.

    Example:
        >>> pack(torch.randn(5, 32), "8x0e + 8x1o").shape
        torch.Size([5, 4, 8])
    """
    signals = parse_signals(irreps)
    if x.dim() < 1 or x.size(-1) != signals.size:
        raise ValueError(f"x has shape {tuple(x.shape)}, but irreps '{irreps}' need (..., {signals.size})")
    rows = []
    for l, start in zip(signals.row_degrees, signals.row_starts, strict=True):
        n = 2 * l + 1
        if start >= 0:
            rows.append(x[..., start : start + signals.mul * n].unflatten(-1, (signals.mul, n)).transpose(-1, -2))
        else:
            rows.append(x.new_zeros(*x.shape[:-1], n, signals.mul))
    return torch.cat(rows, -2)


def unpack(x: Tensor, irreps: str | Irreps) -> Tensor:
    r"""The dense layout as e3nn's flat one: the inverse of `pack`; rows of degrees that `irreps` lack are left out.

    Args:
        x: Coefficients in the dense layout.
        irreps: Irreps with one multiplicity C and no irrep twice.

    Shapes:
        x :math:`(..., D, C)`; output :math:`(..., \text{dim})`.

    Raises:
        ValueError: Irreps that are no signals, or `x` of another size.

    Example:
        >>> x = torch.randn(5, 32)
        >>> torch.equal(unpack(pack(x, "8x0e + 8x1o"), "8x0e + 8x1o"), x)
        True
    """
    signals = parse_signals(irreps)
    if x.dim() < 2 or x.shape[-2:] != (signals.rows(), signals.mul):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but irreps '{irreps}' need (..., {signals.rows()}, {signals.mul})"
        )
    placed: list[tuple[int, int, Tensor]] = []
    for parity, first in ((1, 0), (-1, (signals.lmax(1) + 1) ** 2)):
        for block in signals.blocks[parity]:
            rows = x[..., first + block.l**2 : first + (block.l + 1) ** 2, :]
            placed.append((block.start, len(placed), rows.transpose(-1, -2).flatten(-2)))
    return torch.cat([flat for _, _, flat in sorted(placed, key=lambda entry: entry[:2])], -1)


def gaunt_coefficient(l1: int, l2: int, l3: int, normalization: str = "component") -> float:
    r"""The factor g between the mean of three harmonics over the sphere and e3nn's ``wigner_3j``.

    :math:`g = \sqrt{(2 l_1 + 1)(2 l_2 + 1)(2 l_3 + 1)} \, w_{l_1 l_2 l_3}` with the symbol's middle entry, all
    m = 0 (https://arxiv.org/abs/2401.10216); zero off the triangle and for odd sums.

    Args:
        l1: First degree.
        l2: Second degree.
        l3: Third degree.
        normalization: ``'component'``; ``'norm'``: harmonics of norm 1, multiplied and read back as coefficients of
            such; ``'integral'``: orthonormal ones, integrated over the sphere. (default: ``'component'``)

    Raises:
        ValueError: A degree below 0, or an unknown normalization.

    Example:
        >>> round(gaunt_coefficient(1, 1, 0) ** 2, 12), gaunt_coefficient(1, 1, 1)
        (3.0, 0.0)
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization is {normalization!r}, but must be one of {', '.join(map(repr, NORMALIZATIONS))}"
        )
    if not _coupled(l1, l2, l3) or (l1 + l2 + l3) % 2:
        return 0.0
    centre = float(_wigner_3j(l1, l2, l3)[l1, l2, l3])
    if normalization == "norm":
        return (2 * l3 + 1) * centre
    g = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1)) * centre
    return g if normalization == "component" else g / math.sqrt(4 * math.pi)


def bracket_coefficient(l1: int, l2: int, l3: int) -> float:
    r"""The factor d between the mean of a Poisson bracket times a harmonic and e3nn's ``wigner_3j``.

    For harmonics of mean square 1; computed, with its sign, by quadrature. Zero off the triangle and for even sums,
    and nonzero on every odd path (https://arxiv.org/abs/2605.15073):
    :math:`|d|^2 = l_1 (l_1 + 1) \, l_2 (l_2 + 1) \prod (2 l_i + 1) \binom{l_1\; l_2\; l_3}{1\;-1\;0}^2`.

    Args:
        l1: First degree.
        l2: Second degree.
        l3: Third degree.

    Raises:
        ValueError: A degree below 0.

    Example:
        >>> round(bracket_coefficient(1, 1, 1) ** 2, 12), bracket_coefficient(1, 1, 2)
        (18.0, 0.0)
    """
    if not _coupled(l1, l2, l3) or (l1 + l2 + l3) % 2 == 0:
        return 0.0
    return _bracket(l1, l2, l3)


def path_variances(lmax1: int, lmax2: int, lmax3: int, bracket: bool) -> Tensor:
    """Variance of a component of degree l3 made from independent unit components of l1 and l2: float64 [l1, l2, l3].

    The same for all components of a degree, so those with m = 0 tell.
    """
    grid = SphereGrid(lmax1 + lmax2 + lmax3)
    middle = [l * l + l for l in range(lmax3 + 1)]
    third = grid.weights[:, None] * grid.to_matrix(lmax3)[:, middle]
    if bracket:
        (f_polar, f_azimuth), (h_polar, h_azimuth) = grid.gradient_matrices(lmax1), grid.gradient_matrices(lmax2)
        terms = [(f_polar, h_azimuth), (-f_azimuth, h_polar)]
    else:
        terms = [(grid.to_matrix(lmax1), grid.to_matrix(lmax2))]
    out = torch.zeros(lmax1 + 1, lmax2 + 1, lmax3 + 1, dtype=torch.float64, device="cpu")
    for l1 in range(lmax1 + 1):
        for i in range(l1 * l1, (l1 + 1) ** 2):
            means = torch.stack([(f[:, i, None] * h).t() @ third for f, h in terms]).sum(0)
            for l2 in range(lmax2 + 1):
                out[l1, l2] += means[l2 * l2 : (l2 + 1) ** 2].square().sum(0)
    return out


def _coupled(l1: int, l2: int, l3: int) -> bool:
    for l in (l1, l2, l3):
        if isinstance(l, bool) or not isinstance(l, int) or l < 0:
            raise ValueError(f"a degree is {l!r}, but must be an integer of at least 0")
    return abs(l1 - l2) <= l3 <= l1 + l2


@functools.lru_cache(maxsize=4096)
def _bracket(l1: int, l2: int, l3: int) -> float:
    grid = SphereGrid(l1 + l2 + l3)

    def rows(matrix: Tensor, l: int) -> Tensor:
        return matrix[:, l * l :]

    (f_polar, f_azimuth), (h_polar, h_azimuth) = grid.gradient_matrices(l1), grid.gradient_matrices(l2)
    f = (rows(f_polar, l1), rows(f_azimuth, l1))
    h = (rows(h_polar, l2), rows(h_azimuth, l2))
    weighted = grid.weights[:, None] * rows(grid.to_matrix(l3), l3)
    bracket = f[0][:, :, None] * h[1][:, None] - f[1][:, :, None] * h[0][:, None]
    mean = torch.einsum("nij,nk->ijk", bracket, weighted)
    return float((mean * _wigner_3j(l1, l2, l3)).sum())


def _wigner_3j(l1: int, l2: int, l3: int) -> Any:
    from e3nn.o3 import wigner_3j

    return wigner_3j(l1, l2, l3, dtype=torch.float64, device="cpu")
