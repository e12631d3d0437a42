"""Maps of eigenvalues to spectral filters, R -> R^m for each eigenvalue or for all of a graph together."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPECTRUM = 2.0  # the largest eigenvalue that a normalised Laplacian can have


class MLPFilter(nn.Module):
    """One MLP R -> R with ReLU for each of m filters, applied to each eigenvalue by itself."""

    def __init__(self, num_channels: int, hidden: int, num_layers: int, lipschitz: float | None) -> None:
        super().__init__()
        self.lipschitz = lipschitz
        widths = [1, *[hidden] * (num_layers - 1), 1]
        sizes = list(zip(widths[1:], widths, strict=False))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_channels, *size)) for size in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_channels, size[0], 1)) for size in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as ``torch.nn.Linear`` does."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.size(2))
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def bound(self) -> Tensor:
        """A Lipschitz constant of the map R -> R^m of the weights as they are."""
        each = torch.stack([torch.linalg.matrix_norm(weight, ord=2) for weight in self.weights]).prod(0)
        out: Tensor = each.norm()
        return out

    def forward(self, eigvals: Tensor) -> Tensor:
        """[B, K] to [B, K, m]."""
        x = eigvals.flatten().expand(self.weights[0].size(0), 1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, weight, F.relu(x) if i else x)
        z: Tensor = x.squeeze(1).t().unflatten(0, eigvals.shape)
        return z if self.lipschitz is None else z * (self.lipschitz / self.bound().clamp(min=self.lipschitz))


class SplineFilter(nn.Module):
    """A uniform cubic B-spline [0, 2] -> R^m; eigenvalues beyond are taken as 0 and 2."""

    def __init__(self, num_channels: int, num_points: int, lipschitz: float | None) -> None:
        super().__init__()
        self.lipschitz = lipschitz
        self.pieces = num_points - 3
        self.points = nn.Parameter(torch.empty(num_points, num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the control points anew."""
        nn.init.normal_(self.points)

    def bound(self) -> Tensor:
        """A Lipschitz constant of the control points as they are: a derivative is a mean of their slopes."""
        steepest: Tensor = self.points.diff(dim=0).norm(dim=1).max() * (self.pieces / SPECTRUM)
        return steepest

    def forward(self, eigvals: Tensor) -> Tensor:
        """[B, K] to [B, K, m]."""
        place = eigvals.clamp(0, SPECTRUM) * (self.pieces / SPECTRUM)
        first = place.detach().floor().clamp(max=self.pieces - 1)
        t = (place - first).unsqueeze(-1)
        weights = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
        points, index = self._limited(), first.long()
        terms = [weight / 6 * points[index + i] for i, weight in enumerate(weights)]
        return torch.stack(terms).sum(0)

    def _limited(self) -> Tensor:
        """The control points, their steps shortened to the constant that was asked for."""
        if self.lipschitz is None:
            return self.points
        longest = self.lipschitz * SPECTRUM / self.pieces
        steps = self.points.diff(dim=0)
        steps = steps * (longest / steps.norm(dim=1, keepdim=True).clamp(min=longest))
        return torch.cat([self.points[:1], self.points[:1] + steps.cumsum(0)])


class DeepSetsFilter(nn.Module):
    """One DeepSets for each of m filters, over the eigenvalues of a graph: equal eigenvalues get equal values."""

    def __init__(self, num_channels: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        widths = [1, *[hidden] * (num_layers - 1), 1]
        sizes = list(zip(widths[1:], widths, strict=False))
        self.own = nn.ParameterList(nn.Parameter(torch.empty(num_channels, *size)) for size in sizes)
        self.all = nn.ParameterList(nn.Parameter(torch.empty(num_channels, *size)) for size in sizes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_channels, size[0], 1)) for size in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as ``torch.nn.Linear`` does."""
        for own, every, bias in zip(self.own, self.all, self.biases, strict=True):
            bound = 1 / math.sqrt(own.size(2))
            for tensor in (own, every, bias):
                nn.init.uniform_(tensor, -bound, bound)

    def forward(self, eigvals: Tensor, eig_mask: Tensor) -> Tensor:
        """[B, K] to [B, K, m]."""
        x = eigvals[:, None, None, :]  # [B, m, F, K]
        mask = eig_mask[:, None, None, :]
        for i, (own, every, bias) in enumerate(zip(self.own, self.all, self.biases, strict=True)):
            x = F.relu(x) if i else x
            x = own @ x + bias + every @ (x * mask).sum(3, keepdim=True)
        return x.squeeze(2).transpose(1, 2)
