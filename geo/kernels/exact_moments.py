r"""Exact moments of graph random features with independent walks: what the estimates are tested against.

One walk from i deposits :math:`\phi_i = \sum_l f_l\, \mathrm{load}_l\, e_{v_l}`. Let :math:`U` be the matrix, q(a, b)
the probability of a step's choice and :math:`Q_l` that of a length of at least l. A load squared has the mean
:math:`S_l = B^l / Q_l` with :math:`B_{ab} = U_{ab}^2 / q(a, b)`, and what a walk deposits after length l depends on its
past through its place alone: with :math:`G_l = \sum_{r \ge 1} f_{l + r} U^r`,

.. math:: E[\phi_i \phi_i^\top] = \sum_l f_l^2\, \mathrm{diag}(s_l) + f_l (\mathrm{diag}(s_l) G_l
          + G_l^\top \mathrm{diag}(s_l)), \qquad s_l = (S_l)_{i \cdot}
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geo.kernels.series import Series

_LONGEST = 1024  # lengths after which what is left must be negligible
_REST = 1e-18  # of the largest term of a second moment


@dataclass(frozen=True)
class WalkMoments:
    """The dense matrices of a set of walks, float64.

    Args:
        matrix: U, [N, N].
        squares: B, [N, N]: the squared entries of U over the probabilities of the steps.
        going_on: [L], the probability of a step after length l, for as many lengths as walks may have.
    """

    matrix: Tensor
    squares: Tensor
    going_on: Tensor

    def transposed(self, squares: Tensor) -> WalkMoments:
        """The set of walks on the transposed matrix."""
        return WalkMoments(self.matrix.t(), squares, self.going_on)

    def mean(self, f: Tensor) -> Tensor:
        """E[phi] of each start, [N, N]."""
        eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        out = torch.zeros_like(eye)
        for value in f.flip(0):
            out = out @ self.matrix + value * eye
        return out

    def later(self, f: Tensor) -> Tensor:
        """G_l for each length, [L, N, N]."""
        eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        out = [torch.zeros_like(eye)]
        for value in f[1:].flip(0):
            out.append(self.matrix @ (value * eye + out[-1]))
        return torch.stack(out[::-1])

    def second(self, f1: Tensor, f2: Tensor) -> Tensor:
        """E[phi1 phi2^T] of one walk from each start under two modulations, [N, N, N]."""
        power = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        powers = [power]
        for on in self.going_on[: f1.size(0) - 1]:
            power = power @ self.squares / on
            powers.append(power)
        loads = torch.stack(powers)  # [L, start, column]
        first, then = (
            torch.einsum("lia,lab->iab", loads * early.view(-1, 1, 1), self.later(late))
            for early, late in ((f1, f2), (f2, f1))
        )
        same = torch.einsum("lia,l->ia", loads, f1 * f2)
        return first + then.transpose(1, 2) + torch.diag_embed(same)

    def dot(self, f1: Tensor, f2: Tensor) -> Tensor:
        """E[phi1 . phi2] of the features of one walk under two modulations, for each start, [N]."""
        later1 = later2 = torch.zeros_like(self.matrix)
        out = self.matrix.new_zeros(len(self.matrix))
        eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        for length in range(f1.size(0) - 1, -1, -1):
            if length + 1 < f1.size(0):
                later1, later2 = (
                    self.matrix @ (f1[length + 1] * eye + later1),
                    self.matrix @ (f2[length + 1] * eye + later2),
                )
                out = self.squares @ out / self.going_on[length]
            out = out + f1[length] * f2[length] + f1[length] * later2.diagonal() + f2[length] * later1.diagonal()
        return out

    def modulations(self, series: Series) -> tuple[Tensor, Tensor]:
        """The modulations as far as they matter.

        Raises:
            ValueError: Terms do not become negligible within 1024 lengths.
        """
        most = self.going_on.size(0) + 1
        n = min(64, most)
        while True:
            f1, f2 = (f.to(self.matrix) for f in series.modulations(n))
            if n == most or self._negligible(torch.maximum(f1.abs(), f2.abs())):
                return f1, f2
            if n >= _LONGEST:
                raise ValueError(
                    f"series: the second moments of {series.name} do not converge within {_LONGEST} lengths, so their "
                    "variance is infinite or nearly so: take a smaller p_halt, or a series of shorter range"
                )
            n = min(2 * n, most)

    def _negligible(self, size: Tensor) -> bool:
        """Whether the last quarter of the terms adds nothing, by the row sums of their absolute values."""
        if len(self.matrix) == 0:
            return True
        load, path = (torch.ones(len(self.matrix), dtype=torch.float64, device=self.matrix.device) for _ in range(2))
        absolute = self.matrix.abs()
        terms = []
        for length, value in enumerate(size):
            if length:
                load, path = self.squares @ load / self.going_on[length - 1], absolute @ path
            terms.append(torch.stack([value.square() * load.max(), value.square() * path.max().square()]))
        table = torch.stack(terms)
        return bool((table[-len(terms) // 4 :] <= _REST * table.amax(0)).all())


def _moments(walks: WalkMoments, f1: Tensor, f2: Tensor, num_walks: int) -> tuple[Tensor, Tensor]:
    """The mean products of each feature of all walks under two modulations, [N, N, N], and the mean under f1."""
    mean1, mean2 = walks.mean(f1), walks.mean(f2)
    both = walks.second(f1, f2) / num_walks + (1 - 1 / num_walks) * mean1.unsqueeze(2) * mean2.unsqueeze(1)
    return both, mean1


def variance(first: WalkMoments, second: WalkMoments, f1: Tensor, f2: Tensor, num_walks: int) -> Tensor:
    """The variance of the dot product of each feature of one set with each of an independent set, [N, N]."""
    second1, mean1 = _moments(first, f1, f1, num_walks)
    equal = second is first and torch.equal(f1, f2)
    second2, mean2 = (second1, mean1) if equal else _moments(second, f2, f2, num_walks)
    return second1.flatten(1) @ second2.flatten(1).t() - (mean1 @ mean2.t()).square()


def covariance(walks: WalkMoments, f1: Tensor, f2: Tensor, num_walks: int) -> Tensor:
    """Of the dot products phi1_i . phi2_j and phi1_j . phi2_i of one set of walks, for i other than j, [N, N]."""
    both, _ = _moments(walks, f1, f2, num_walks)
    product = walks.mean(f1) @ walks.mean(f2).t()
    return both.flatten(1) @ both.transpose(1, 2).flatten(1).t() - product * product.t()


def relative_error(
    series: Series,
    num_walks: int,
    halting: list[float],
    max_length: int | None,
    rho: float,
    squares: float,
    dtype: torch.dtype,
) -> float:
    r"""About the relative error of an estimate of a typical entry, for independent walks; rather below it than above.

    Entries of a walk's feature have squares that sum to about :math:`\sum_l f_l^2 b^l / Q_l`, where :math:`Q_l` is the
    probability of l steps and b that of ``squares``, the spectral radius of B; those of its mean to less than
    :math:`(\sum_l |f_l| \rho^l)^2`. Infinite where the modulations are beyond their ``dtype``.
    """
    if rho == 0 or squares == 0:
        return 0.0
    most = _LONGEST if max_length is None else min(max_length + 1, _LONGEST)
    n = min(128, most)
    while True:
        length = torch.arange(n, dtype=torch.float64)
        halts = torch.tensor(halting[: n - 1], dtype=torch.float64)
        going_on = 1 - torch.cat([halts, halts.new_full((n - 1 - len(halts),), halting[-1])])
        load = torch.cat([length[:1], (squares / going_on).log().cumsum(0)])  # logarithms: terms may be huge
        ratios, small = [], True
        for f in series.modulations(n):
            size = f.detach().to(dtype).double().cpu().abs()
            if not bool(size.isfinite().all()):
                return math.inf
            square = torch.where(load.isfinite(), 2 * size.log() + load, -math.inf)[1:]
            mean = (size.log() + length * math.log(rho)).logsumexp(0)
            ratios.append(float((square.logsumexp(0) - 2 * mean).exp()) / num_walks)
            small &= n == most or bool(square[-n // 4 :].logsumexp(0) <= square.logsumexp(0) - 7)
        if n == most or small:
            return math.sqrt(ratios[0] + ratios[1] + ratios[0] * ratios[1])
        n = min(2 * n, most)


def matrix_series(series: Series, matrix: Tensor) -> Tensor:
    """The sum of the series of a dense float64 matrix, without its scale.

    Raises:
        ValueError: It does not converge within 4096 terms, or its sum is beyond float64.
    """
    for n in (64, 512, 4096):
        power = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
        out: Tensor = torch.zeros_like(matrix)
        small = 0
        for value in series.alpha(n).detach().to(matrix):
            term = value * power
            out, power = out + term, power @ matrix
            below = len(matrix) == 0 or float(term.abs().max()) <= 1e-17 * float(out.abs().max())
            small = small + 1 if below else 0
            if small == 32 and bool(out.isfinite().all()):
                return out
    raise ValueError(
        f"series: {series.name} does not converge within 4096 terms on this matrix, or its sum is beyond float64"
    )
