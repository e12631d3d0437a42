r"""Grids on the sphere that integrate exactly, and functions on them.

A function with coefficients :math:`x_{lm}`, :math:`l \le L`, in real spherical harmonics of mean square 1 (e3nn's
``'component'``, its order :math:`l^2 + l + m` and its axes, polar axis y) has the values
:math:`f(u_n) = \sum_{lm} x_{lm} Y_{lm}(u_n)`. On nodes :math:`u_n` with weights :math:`w_n` that integrate every
polynomial of the sphere up to degree D, :math:`x_{lm} = \sum_n w_n f(u_n) Y_{lm}(u_n)` for :math:`2 L \le D`; and
the product of functions of degree :math:`L_1` and :math:`L_2` has its coefficients up to :math:`L_3` exactly if
:math:`L_1 + L_2 + L_3 \le D`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_EXACT = 1e-12


class SphereGrid:
    r"""Gauss-Legendre nodes in the cosine of the polar angle times uniform azimuths.

    ``degree // 2 + 1`` polar angles and ``degree + 1`` azimuths are the fewest of their kind that integrate every
    polynomial of that degree; this is checked when the grid is made.

    Args:
        degree: Degree D that is integrated exactly: L1 + L2 + L3 for a product, nu L + L3 for a power.
        octant: Choose angles such that the grid is symmetric under each of x, y, z -> -x, -y, -z with no node on a
            mirror: the nodes with positive coordinates, an eighth, tell all. (default: ``False``)
        num_polar: Polar angles. (default: as few as allowed)
        num_azimuth: Azimuths. (default: as few as allowed)

    Shapes:
        ``points`` :math:`(N, 3)`, ``weights`` :math:`(N)`, which sum to one; float64 on the CPU. Node
        ``b * num_azimuth + a`` has polar angle b and azimuth a.

    Raises:
        ValueError: A degree that is no integer of at least 0, or angles with which the grid is not exact or not
            symmetric.

    Example:
        >>> grid = SphereGrid(6)
        >>> len(grid), len(SphereGrid(6, octant=True))
        (28, 32)
        >>> Y = grid.to_matrix(3)
        >>> ((Y.t() * grid.weights) @ Y - torch.eye(16)).abs().max() < 1e-12
        tensor(True)
    """

    def __init__(
        self, degree: int, octant: bool = False, num_polar: int | None = None, num_azimuth: int | None = None
    ) -> None:
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
            raise ValueError(f"degree is {degree!r}, but must be an integer of at least 0")
        polar, azimuth = degree // 2 + 1, degree + 1
        if octant:
            polar, azimuth = polar + polar % 2, azimuth + -azimuth % 4
        self.degree, self.octant = degree, octant
        self.num_polar = polar if num_polar is None else num_polar
        self.num_azimuth = azimuth if num_azimuth is None else num_azimuth
        if self.num_polar < 1 or self.num_azimuth < 1:
            raise ValueError(f"a grid needs at least one angle of each kind, got {self.num_polar}, {self.num_azimuth}")
        if octant and (self.num_polar % 2 or self.num_azimuth % 4):
            raise ValueError(
                f"octant=True needs an even num_polar and a num_azimuth divisible by 4, "
                f"got {self.num_polar} and {self.num_azimuth}"
            )
        self._cosine, weight = np.polynomial.legendre.leggauss(self.num_polar)
        self._azimuth = (np.arange(self.num_azimuth) + octant / 2) * (2 * math.pi / self.num_azimuth)
        self._check_exact(weight / 2)
        sine = np.sqrt(1 - self._cosine**2)[:, None]
        height = np.broadcast_to(self._cosine[:, None], (self.num_polar, self.num_azimuth))
        points = np.stack((sine * np.sin(self._azimuth), height, sine * np.cos(self._azimuth)), -1)
        self.points = torch.from_numpy(points.reshape(-1, 3))
        self.weights = torch.from_numpy(np.repeat(weight / 2, self.num_azimuth) / self.num_azimuth)

    def _check_exact(self, weight: np.ndarray) -> None:
        """Y_lm is a function of each angle: its mean is right iff the polar one is (m = 0) or the azimuthal one is."""
        polar = np.polynomial.legendre.legvander(self._cosine, self.degree).T @ weight
        azimuthal = np.exp(1j * np.arange(1, self.degree + 1)[:, None] * self._azimuth).mean(1)
        polar[0] -= 1
        for name, error, fewest in (
            ("num_polar", np.abs(polar), self.degree // 2 + 1),
            ("num_azimuth", np.abs(azimuthal), self.degree + 1),
        ):
            if error.size and error.max() > _EXACT:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but degree {self.degree} is integrated exactly from {fewest} on"
                )

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        sizes = f"num_polar={self.num_polar}, num_azimuth={self.num_azimuth}"
        return f"SphereGrid(degree={self.degree}, octant={self.octant}, {sizes})"

    def to_matrix(self, lmax: int) -> Tensor:
        """Values of the harmonics at the nodes, float64 ``[N, (lmax+1)^2]``."""
        return self._matrix(lmax, "value")

    def gradient_matrices(self, lmax: int) -> tuple[Tensor, Tensor]:
        """Slopes of the harmonics along the polar angle and along the azimuth, float64 ``[N, (lmax+1)^2]`` each.

        The two directions are of unit length and, with the outward normal before them, right-handed.
        """
        return self._matrix(lmax, "polar"), self._matrix(lmax, "azimuth")

    def _matrix(self, lmax: int, field: str) -> Tensor:
        if isinstance(lmax, bool) or not isinstance(lmax, int) or lmax < 0:
            raise ValueError(f"lmax is {lmax!r}, but must be an integer of at least 0")
        legendre, slope = _legendre(lmax, self._cosine)
        sine = np.sqrt(1 - self._cosine**2)
        out = np.empty((self.num_polar, self.num_azimuth, (lmax + 1) ** 2))
        for l in range(lmax + 1):
            for m in range(-l, l + 1):
                k, turn = abs(m), abs(m) * self._azimuth
                root = math.sqrt(2) if m else 1.0
                along = np.sin(turn) if m < 0 else np.cos(turn)
                across = legendre[l, k]
                if field == "polar":
                    across = slope[l, k]
                elif field == "azimuth":
                    across, along = legendre[l, k] / sine, k * (np.cos(turn) if m < 0 else -np.sin(turn))
                out[..., l * l + l + m] = across[:, None] * along * root
        return torch.from_numpy(out.reshape(-1, (lmax + 1) ** 2))


def _legendre(lmax: int, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Legendre functions [l, m, b], normalised to mean square 1 with the exponential, and their polar slopes."""
    sine = np.sqrt(1 - cosine**2)
    value = np.zeros((lmax + 1, lmax + 1, len(cosine)))
    slope = np.zeros_like(value)
    value[0, 0] = 1
    for l in range(1, lmax + 1):
        value[l, l] = math.sqrt((2 * l + 1) / (2 * l)) * sine * value[l - 1, l - 1]
        for m in range(l):
            two = value[l - 2, m] * math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1)) if m < l - 1 else 0.0
            value[l, m] = math.sqrt((4 * l * l - 1) / (l * l - m * m)) * (cosine * value[l - 1, m] - two)
        for m in range(l + 1):
            down = math.sqrt((2 * l + 1) / (2 * l - 1) * (l * l - m * m))
            slope[l, m] = (l * cosine * value[l, m] - down * value[l - 1, m]) / sine
    return value, slope


def to_grid(x: Tensor, grid: SphereGrid) -> Tensor:
    r"""Values at the nodes of the functions with coefficients `x`.

    Args:
        x: Coefficients.
        grid: The nodes.

    Shapes:
        x :math:`(..., (L+1)^2, C)`; output :math:`(..., N, C)`.

    Raises:
        ValueError: A second-to-last axis whose size is no square.

    Example:
        >>> grid = SphereGrid(4)
        >>> x = torch.randn(5, 9, 8)
        >>> (from_grid(to_grid(x, grid), grid, 2) - x).abs().max() < 1e-5
        tensor(True)
    """
    lmax = math.isqrt(x.size(-2)) - 1 if x.dim() > 1 else -1
    if lmax < 0 or (lmax + 1) ** 2 != x.size(-2):
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (..., (L+1)^2, C)")
    return torch.matmul(grid.to_matrix(lmax).to(x), x)


def from_grid(f: Tensor, grid: SphereGrid, lmax: int) -> Tensor:
    r"""Coefficients up to degree `lmax` of the functions with values `f` at the nodes.

    Exact for functions of degree at most ``grid.degree - lmax``, else their projection with errors of aliasing.

    Args:
        f: Values at the nodes.
        grid: The nodes.
        lmax: Highest degree.

    Shapes:
        f :math:`(..., N, C)`; output :math:`(..., (L+1)^2, C)`.

    Raises:
        ValueError: Values that are not one per node, or ``2 lmax`` above ``grid.degree``: not even such functions
            come back exactly.

    Example:
        >>> grid = SphereGrid(6)
        >>> f, h = torch.randn(5, 9, 8), torch.randn(5, 9, 8)
        >>> from_grid(to_grid(f, grid) * to_grid(h, grid), grid, 2).shape
        torch.Size([5, 9, 8])
    """
    if f.dim() < 2 or f.size(-2) != len(grid):
        raise ValueError(f"f has shape {tuple(f.shape)}, but must be (..., {len(grid)}, C)")
    if 2 * lmax > grid.degree:
        raise ValueError(
            f"lmax is {lmax}, but a grid of degree {grid.degree} resolves degrees up to {grid.degree // 2}"
        )
    back = (grid.to_matrix(lmax) * grid.weights[:, None]).t()
    return torch.matmul(back.to(f), f)
