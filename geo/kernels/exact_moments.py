r"""Exact moments of graph random features with independent walks: what the estimates are tested against.

One walk from i deposits :math:`\phi_i = \sum_l f_l\, \mathrm{load}_l\, e_{v_l}`. Let :math:`U` be the matrix, q(a, b)
the probability of a step's choice and :math:`Q_l` that of a length of at least l. A load squared has the mean
:math:`S_l = B^l / Q_l` with :math:`B_{ab} = U_{ab}^2 / q(a, b)`, and what a walk deposits after length l depends on its
past through its place alone: with :math:`G_l = \sum_{r \ge 1} f_{l + r} U^r`,

.. math:: E[\phi_i \phi_i^\top] = \sum_l f_l^2\, \mathrm{diag}(s_l) + f_l (\mathrm{diag}(s_l) G_l
          + G_l^\top \mathrm{diag}(s_l)), \qquad s_l = (S_l)_{i \cdot}
"""

from __future__ import annotations

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

    def second(self, f: Tensor) -> Tensor:
        """E[phi phi^T] of one walk from each start, [N, N, N]."""
        power = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
        powers = [power]
        for on in self.going_on[: f.size(0) - 1]:
            power = power @ self.squares / on
            powers.append(power)
        loads = torch.stack(powers)  # [L, start, column]
        once = torch.einsum("lia,lab->iab", loads * f.view(-1, 1, 1), self.later(f))
        same = torch.einsum("lia,l->ia", loads, f.square())
        return once + once.transpose(1, 2) + torch.diag_embed(same)

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


def variance(first: WalkMoments, second: WalkMoments, f1: Tensor, f2: Tensor, num_walks: int) -> Tensor:
    """The variance of the dot product of each feature of one set with each of an independent set, [N, N]."""

    def moments(walks: WalkMoments, f: Tensor) -> tuple[Tensor, Tensor]:
        mean = walks.mean(f)
        both = walks.second(f) / num_walks + (1 - 1 / num_walks) * mean.unsqueeze(2) * mean.unsqueeze(1)
        return mean, both.flatten(1)

    mean1, second1 = moments(first, f1)
    mean2, second2 = (mean1, second1) if second is first and torch.equal(f1, f2) else moments(second, f2)
    return second1 @ second2.t() - (mean1 @ mean2.t()).square()


def matrix_series(series: Series, matrix: Tensor) -> Tensor:
    """The sum of the series of a dense float64 matrix, without its scale.

    Raises:
        ValueError: It does not converge within 4096 terms.
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
            if small == 32:
                return out
    raise ValueError(f"series: {series.name} does not converge within 4096 terms on this matrix")
