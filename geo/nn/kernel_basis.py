"""Functions of invariants: monomials, a smooth radial window, and the MLP on them that all layers' kernels share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.activations import activation
from geo.ops import gelu

_ENOUGH = 20000  # rows of a sample that calibration looks at: monomials of many invariants are wide
_SMALLEST = 1e-6  # of the eigenvalues of the monomials' correlation matrix: float32 tells no smaller from zero


def polynomial_features(x: Tensor, degree: int) -> Tensor:
    """All distinct monomials of degree 1 to ``degree`` of the last axis, by degree, each in lexicographic order.

    Example:
        >>> polynomial_features(torch.tensor([2., 3.]), 2)
        tensor([2., 3., 4., 6., 9.])
    """
    d = x.size(-1)
    parts, start = (
        [x],
        list(range(d)),
    )  # start[i]: where monomials of the last degree begin to hold no variable before i
    for _ in range(degree - 1):
        last, pieces, begin, total = parts[-1], [], [], 0
        for i in range(d):
            pieces.append(x[..., i : i + 1] * last[..., start[i] :])
            begin.append(total)
            total += last.size(-1) - start[i]
        parts.append(torch.cat(pieces, -1))
        start = begin
    return torch.cat(parts, -1) if degree > 1 else x


def num_polynomial_features(dim: int, degree: int) -> int:
    """Number of columns of :func:`polynomial_features`: 3, 9 and 19 for degree 3 and 1, 2 and 3 variables."""
    return math.comb(dim + degree, degree) - 1


def radial_window(dist: Tensor, r_max: float, p: int = 6) -> Tensor:
    r"""Envelope of DimeNet (https://arxiv.org/abs/2003.03123): 1 at 0, 0 from `r_max` on, smooth to second order.

    .. math::
        1 - \tfrac{(p+1)(p+2)}{2} x^p + p(p+2) x^{p+1} - \tfrac{p(p+1)}{2} x^{p+2}, \qquad x = d / r_{max}

    Example:
        >>> radial_window(torch.tensor([0., 5., 6.]), 5.0)
        tensor([1., 0., 0.])
    """
    x = (dist / r_max).clamp(max=1.0)
    value = 1 - x**p * ((p + 1) * (p + 2) / 2 - x * (p * (p + 2) - x * (p * (p + 1) / 2)))
    return torch.where(dist < r_max, value, torch.zeros_like(value))


def all_reduce(total: Tensor) -> Tensor:
    """Sum over the ranks of ``torch.distributed``, where that is initialised."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def _moments(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weighted mean and covariance of rows, over all parts and ranks."""
    total = all_reduce(torch.stack([torch.cat((share.sum().view(1), (x * share).sum(0))) for x, share in rows]).sum(0))
    mean = total[1:] / total[0].clamp(min=1e-300)
    spread = all_reduce(torch.stack([((x - mean) * share).t() @ (x - mean) for x, share in rows]).sum(0))
    return mean, spread / total[0].clamp(min=1e-300)


def _to_unit_spread(weight: Tensor, covariance: Tensor) -> Tensor:
    """Rows scaled so that ``weight @ x`` has standard deviation one."""
    spread = ((weight @ covariance) * weight).sum(1, keepdim=True).clamp(min=0).sqrt()
    return torch.where(spread > 0, weight / spread.clamp(min=1e-300), weight)


def _per_edge(scale: Tensor, out: Tensor) -> Tensor:
    return scale.to(out.dtype).view(-1, *([1] * (out.dim() - 1)))


def _fixed(attr: Tensor, scale: Tensor | None) -> bool:
    """Whether the basis is one of fixed geometry on a CPU, where it is computed tile by tile."""
    if torch.compiler.is_compiling() or attr.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    moving = attr.requires_grad or (scale is not None and scale.requires_grad)
    return not (moving and torch.is_grad_enabled())


class _TiledBasis(torch.autograd.Function):
    """The MLP with GELU and the factor per edge, a cache-sized tile of edges at a time, recomputed in the backward.

    The plain way stores five tensors of the size of the result; here none of them leaves the cache. For fixed
    invariants only: gradients are those of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any, attr: Tensor, scale: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, degree: int
    ) -> Tensor:
        ctx.save_for_backward(attr, scale, w1, b1, w2, b2)
        ctx.degree = degree
        out = attr.new_empty(*attr.shape[:-1], w2.size(0))
        for tile in _tiles(attr):
            *_, z = _mlp(attr[tile], w1, b1, w2, b2, degree)
            part = out[tile]
            torch.ops.aten.gelu.out(z.view_as(part), out=part)
            if scale is not None:
                part.mul_(_per_edge(scale[tile], part))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        attr, scale, *weights = ctx.saved_tensors
        need, degree = ctx.needs_input_grad, ctx.degree
        if torch.is_grad_enabled():  # a gradient that is itself differentiated: composed
            w1, b1, w2, b2 = weights
            out = gelu(F.linear(gelu(F.linear(polynomial_features(attr, degree), w1, b1)), w2, b2))
            out = out if scale is None else out * _per_edge(scale, out)
            wanted = [w for w, n in zip(weights, need[2:6], strict=True) if n]
            found = iter(torch.autograd.grad(out, wanted, grads[0], create_graph=True))
            return (None, None, *(next(found) if n else None for n in need[2:6]), None)
        sums = [torch.zeros_like(w) for w in weights]
        for tile in _tiles(attr):
            features, h, g, z = _mlp(attr[tile], weights[0], weights[1], weights[2], weights[3], degree)
            d = grads[0][tile]
            d = (d if scale is None else d * _per_edge(scale[tile], d)).reshape(z.shape)
            d = torch.ops.geo.gelu_mul(z, d, 1)
            sums[2].addmm_(d.t(), g)
            sums[3] += d.sum(0)
            d = torch.ops.geo.gelu_mul(h, d @ weights[2], 1)
            sums[0].addmm_(d.t(), features)
            sums[1] += d.sum(0)
        return (None, None, *(s if n else None for s, n in zip(sums, need[2:6], strict=True)), None)


def _tiles(attr: Tensor) -> list[slice]:
    rows = max(1, math.prod(attr.shape[1:-1]))
    step = max(1, 4096 // rows)
    return [slice(begin, begin + step) for begin in range(0, attr.size(0), step)]


def _mlp(attr: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, degree: int) -> tuple[Tensor, ...]:
    """Features, and the values before and after the first activation and before the second."""
    features = polynomial_features(attr, degree).flatten(0, -2)
    h = torch.addmm(b1, features, w1.t())
    g = F.gelu(h)
    return features, h, g, torch.addmm(b2, g, w2.t())


class KernelBasis(nn.Module):
    r"""Basis functions of invariants: an MLP on their monomials, times a window that ends smoothly at a radius.

    .. math::
        \phi(a) = \mathrm{act}(W_2\, \mathrm{act}(W_1\, P(a) + b_1) + b_2)\; u(|r| / r_{max})

    where :math:`P` lists the monomials up to a degree and :math:`u` is :func:`radial_window`. The basis of PONITA
    (https://arxiv.org/abs/2310.02970); its code lists each monomial once per order of its factors (14 columns instead
    of 9 for two attributes), the same span with more work.

    Args:
        in_dim: Number of invariants.
        out_dim: Number of basis functions.
        hidden: Width of the hidden layer. (default: ``out_dim``)
        degree: Largest degree of the monomials. (default: ``3``)
        act: ``'gelu'``, ``'silu'``, ``'tanh'`` (smooth: forces) or ``'relu'``. (default: ``'gelu'``)
        r_max: Where the window ends; ``None``: no window. (default: ``None``)
        p: Exponent of the window. (default: ``6``)

    Shapes:
        attr :math:`(E, *, d)`, dist :math:`(E)`, scale :math:`(E)`; output :math:`(E, *, B)`.

    Symmetry and derivatives:
        Invariant, being a function of invariants; twice differentiable, through the window's end too.

    Example:
        >>> basis = KernelBasis(2, 32, r_max=5.0)
        >>> basis(torch.randn(7, 16, 2), dist=torch.rand(7)).shape
        torch.Size([7, 16, 32])
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden: int | None = None,
        degree: int = 3,
        act: str = "gelu",
        r_max: float | None = None,
        p: int = 6,
    ) -> None:
        super().__init__()
        if degree < 1:
            raise ValueError(f"degree is {degree}, but must be at least 1")
        if p < 3:
            raise ValueError(f"p is {p}, but must be at least 3 for a window that is twice differentiable")
        if r_max is not None and not (r_max > 0 and math.isfinite(r_max)):
            raise ValueError(f"r_max is {r_max}, but must be a positive length or None")
        self.in_dim, self.out_dim, self.degree, self.r_max, self.p = in_dim, out_dim, degree, r_max, p
        self.act = activation(act)
        hidden = out_dim if hidden is None else hidden
        self.lin1 = nn.Linear(num_polynomial_features(in_dim, degree), hidden)
        self.lin2 = nn.Linear(hidden, out_dim)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        self.lin1.reset_parameters()
        self.lin2.reset_parameters()

    @torch.no_grad()
    def calibrate(self, samples: Sequence[tuple[Tensor, Tensor | None]]) -> KernelBasis:
        """Turns the drawn weights so that the functions start as varied as the invariants are, whatever their unit.

        Monomials of one variable are nearly multiples of each other: a hidden unit on freshly drawn weights follows the
        largest of them, and the functions start almost equal. Here hidden units become random directions of the
        *whitened* monomials, with a standard deviation of one and means in [-1, 1]; so do functions before the last
        activation. Weights that were trained would be lost: call it once, before.

        Args:
            samples: Pairs of invariants :math:`(E, *, d)` and weights :math:`(E)`, ``None`` for ones. With
                ``torch.distributed`` initialised the samples of all ranks count, and ranks end with equal weights.

        Returns:
            The basis, unchanged if the samples do not vary.

        Raises:
            ValueError: No samples.
        """
        if not samples:
            raise ValueError("samples is empty, but calibration needs at least one")
        rows = []
        for attr, weight in samples:
            share = attr.new_ones(attr.size(0)) if weight is None else weight
            share = share.repeat_interleave(math.prod(attr.shape[1:-1])).double()
            flat = attr.flatten(0, -2).double()
            if len(flat) > _ENOUGH:
                chosen = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:_ENOUGH].to(flat.device)
                flat, share = flat[chosen], share[chosen] * (len(flat) / _ENOUGH)
            rows.append((polynomial_features(flat, self.degree), share.unsqueeze(1)))
        mean, covariance = _moments(rows)
        scale = covariance.diagonal().clamp(min=0).sqrt()
        varies = scale > 1e-6 * mean.abs()  # float32 rounding alone is no variation
        if not bool(varies.any()):
            return self
        inverse = torch.where(varies, 1 / scale.clamp(min=1e-300), torch.zeros_like(scale))
        values, vectors = torch.linalg.eigh(inverse.unsqueeze(1) * covariance * inverse)
        kept = torch.where(values > _SMALLEST, values.clamp(min=_SMALLEST).rsqrt(), torch.zeros_like(values))
        whitening = (vectors * kept) @ vectors.t() * inverse
        w1, b1, w2, b2 = (p.double() for p in (self.lin1.weight, self.lin1.bias, self.lin2.weight, self.lin2.bias))
        # nn.Linear draws biases from +-1 / sqrt(fan-in): these are uniform in [-1, 1].
        w1 = _to_unit_spread(w1 @ whitening, covariance)
        b1 = b1 * math.sqrt(w1.size(1)) - w1 @ mean
        hidden = [(self.act(F.linear(features, w1, b1)), share) for features, share in rows]
        mean, covariance = _moments(hidden)
        w2 = _to_unit_spread(w2, covariance)
        b2 = b2 * math.sqrt(w2.size(1)) / 2 - w2 @ mean
        for parameter, value in zip(self.parameters(), (w1, b1, w2, b2), strict=True):
            parameter.copy_(value)
        return self

    def window(self, dist: Tensor | None, scale: Tensor | None = None) -> Tensor | None:
        """The factor of each edge, :func:`radial_window` times ``scale``; ``None`` if there is neither."""
        if self.r_max is None:
            return scale
        if dist is None:
            raise ValueError(f"dist is needed for the window that ends at r_max={self.r_max}")
        window = radial_window(dist, self.r_max, self.p)
        return window if scale is None else window * scale

    def forward(self, attr: Tensor, dist: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Basis of each row of ``attr``; ``dist`` feeds the window and ``scale`` is one more factor per edge."""
        scale = self.window(dist, scale)
        if self.act is gelu and _fixed(attr, scale):
            weights = (self.lin1.weight, self.lin1.bias, self.lin2.weight, self.lin2.bias)
            tiled: Tensor = _TiledBasis.apply(attr, scale, *weights, self.degree)  # type: ignore[no-untyped-call]
            return tiled
        out = self.act(self.lin2(self.act(self.lin1(polynomial_features(attr, self.degree)))))
        return out if scale is None else out * _per_edge(scale, out)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.in_dim}, {self.out_dim}, degree={self.degree}, r_max={self.r_max}"
