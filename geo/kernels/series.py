r"""Kernels on graphs as power series :math:`K = s \sum_k \alpha_k W^k`, and the square roots that features need.

:math:`W` is the normalised adjacency matrix (or the adjacency matrix itself where ``normalization`` is None). Random
features estimate K as a product of two series, :math:`\alpha = f * f`, so each kernel also knows its modulation
:math:`f`. Constants that the papers put into the matrix (:math:`U = c W`) stand in the coefficients as :math:`c^k`:
walks on W then serve every value of the hyper-parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

Coefficients = Callable[[int], Tensor]
P = ParamSpec("P")
_TERMS = 256  # from which a radius of convergence is estimated
_SMALL = 16 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Series:
    r"""A kernel :math:`K = s \sum_k \alpha_k W^k` and two modulations with :math:`f_1 * f_2 = \alpha`.

    Made by the functions of this module.

    Args:
        name: What errors and ``repr`` call it.
        coefficients: Number of terms -> :math:`\alpha`, float64.
        factors: Number of terms -> :math:`(f_1, f_2)`, float64; the same twice where the square root is taken.
        scale: s.
        normalization: The matrix W that the series is meant for: ``'sym'`` (:math:`D^{-1/2} W D^{-1/2}`) or None.
        radius: Radius of convergence of the modulations, in W; infinite for entire series and for polynomials.
        on_circle: Whether they still converge absolutely where the spectral radius of W equals ``radius``.
        degree: The last length with a modulation other than zero, or None where there is no last.
        function: :math:`s \sum_k \alpha_k x^k` in closed form, or None.
        conjugate: ``'degree'`` for :math:`D^{-1/2} K D^{1/2}` (personalised PageRank), else None.

    Example:
        >>> series = heat(t=1.0)
        >>> series.modulation(4)
        tensor([1.0000, 0.5000, 0.1250, 0.0208], dtype=torch.float64)
    """

    name: str
    coefficients: Coefficients = field(repr=False)
    factors: Callable[[int], tuple[Tensor, Tensor]] = field(repr=False)
    scale: float = 1.0
    normalization: Literal["sym"] | None = "sym"
    radius: float = math.inf
    on_circle: bool = False
    degree: int | None = None
    function: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    conjugate: Literal["degree"] | None = None
    _recipe: Callable[[], Series] | None = field(default=None, init=False, repr=False, compare=False)

    def __reduce__(self) -> Any:  # data loaders send transforms, and the series in them, to other processes
        return super().__reduce__() if self._recipe is None else (self._recipe, ())

    def alpha(self, n: int) -> Tensor:
        """The first n coefficients of the kernel, float64 [n], without ``scale``."""
        return self.coefficients(_count(n))

    def modulation(self, n: int) -> Tensor:
        """The first n entries of the modulation of the first set of walks, float64 [n]."""
        return self.factors(_count(n))[0]

    def modulations(self, n: int) -> tuple[Tensor, Tensor]:
        """The first n entries of both modulations; they differ only where :func:`pair` made the series."""
        return self.factors(_count(n))


def _remembered(make: Callable[P, Series]) -> Callable[P, Series]:
    """A series that ``make`` returns is pickled as the call that made it."""

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Series:
        series = make(*args, **kwargs)
        object.__setattr__(series, "_recipe", functools.partial(made, *args, **kwargs))
        return series

    return made


# -- arithmetic of series ----------------------------------------------------------------------------------------------
def sqrt_series(alpha: Tensor | Sequence[float]) -> Tensor:
    r"""The series f with :math:`f * f = \alpha` and :math:`f_0 > 0`.

    A coefficient below the rounding error of its own sum is set to zero, so that the root of a square of a polynomial
    ends.

    Args:
        alpha: [n], the series; differentiable.

    Returns:
        float64 [n].

    Raises:
        ValueError: :math:`\alpha_0` is not positive, or alpha is empty.

    Example:
        >>> sqrt_series([1.0, 4.0, 4.0, 0.0]).tolist()
        [1.0, 2.0, 0.0, 0.0]
    """
    alpha = _series(alpha, "alpha")
    first = float(alpha[0].detach())
    if not first > 0:
        raise ValueError(
            f"alpha: the first coefficient must be positive for a real square root, got {first:g}; use "
            "pair(alpha, f1), which estimates the kernel by two modulations f1 and f2 = divide_series(alpha, f1)"
        )
    f = [alpha[0].sqrt()]
    for k in range(1, alpha.size(0)):
        inner = torch.stack(f[1:]) if k > 1 else alpha[:0]
        products = inner * inner.flip(0)
        rest = alpha[k] - products.sum()
        size = alpha[k].abs() + products.abs().sum()
        f.append(torch.where(rest.abs() <= _SMALL * size, 0.0, rest / (2 * f[0])))
    return torch.stack(f)


def divide_series(alpha: Tensor | Sequence[float], f1: Tensor | Sequence[float]) -> Tensor:
    r"""The series :math:`f_2` with :math:`f_1 * f_2 = \alpha`.

    Args:
        alpha: [n], the series; differentiable.
        f1: [n] or shorter (then zero beyond), the divisor; differentiable.

    Returns:
        float64 [n].

    Raises:
        ValueError: :math:`f_{1,0}` is zero, or one of the two is empty.

    Example:
        >>> divide_series([1.0, 0.0, 0.0, 0.0], [1.0, -0.5]).tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    alpha, f1 = _series(alpha, "alpha"), _series(f1, "f1")
    if float(f1[0].detach()) == 0:
        raise ValueError("f1: the first coefficient must not be zero, since the division starts with it")
    f1 = _padded(f1, alpha.size(0)).to(alpha.device)
    quotient: list[Tensor] = []
    for k in range(alpha.size(0)):
        known = torch.stack(quotient) if k else alpha[:0]
        quotient.append((alpha[k] - (f1[1 : k + 1].flip(0) * known).sum()) / f1[0])
    return torch.stack(quotient)


# -- kernels -----------------------------------------------------------------------------------------------------------
@_remembered
def regularised_laplacian(s: float = 1.0, d: float = 1.0) -> Series:
    r"""The d-regularised Laplacian kernel :math:`(I + s^2 L)^{-d}`, with :math:`L = I - W`.

    Args:
        s: Length scale, positive.
        d: Exponent, a positive real number.

    Returns:
        The series, of radius :math:`(1 + s^2) / s^2`.

    Raises:
        ValueError: s or d is not positive.

    Example:
        >>> regularised_laplacian(s=1.0, d=2.0).modulation(4).tolist()
        [1.0, 0.5, 0.25, 0.125]
    """
    _positive(s=s, d=d)
    name = f"regularised_laplacian(s={s:g}, d={d:g})"
    return _negative_power(name, s * s / (1 + s * s), d, 1 + s * s)


@_remembered
def matern(nu: float, kappa: float) -> Series:
    r"""The Matern kernel :math:`(2 \nu / \kappa^2 \, I + L)^{-\nu}`, with :math:`L = I - W`.

    Args:
        nu: Smoothness, a positive real number.
        kappa: Length scale, positive.

    Returns:
        The series, of radius :math:`1 + 2 \nu / \kappa^2`.

    Raises:
        ValueError: nu or kappa is not positive.

    Example:
        >>> series = matern(nu=1.0, kappa=1.0)
        >>> series.radius, series.alpha(2)
        (3.0, tensor([1.0000, 0.3333], dtype=torch.float64))
    """
    _positive(nu=nu, kappa=kappa)
    top = 1 + 2 * nu / kappa**2
    return _negative_power(f"matern(nu={nu:g}, kappa={kappa:g})", 1 / top, nu, top)


@_remembered
def random_walk(p: int, a: float = 2.0) -> Series:
    r"""The p-step random walk kernel :math:`(a I - L)^p`, with :math:`L = I - W`.

    The modulation ends at length p / 2 for even p. For odd p it does not end, and its variance is infinite near a = 2.

    Args:
        p: Number of steps, at least 1.
        a: At least 2, so that the kernel is positive semi-definite.

    Returns:
        The series, of radius a - 1 for odd p.

    Raises:
        ValueError: p is not a positive integer, or a is below 2.

    Example:
        >>> random_walk(p=2).modulation(3).tolist(), random_walk(p=2).alpha(4).tolist()
        ([1.0, 1.0, 0.0], [1.0, 2.0, 1.0, 0.0])
    """
    if isinstance(p, bool) or not isinstance(p, int) or p < 1:
        raise ValueError(f"p: expected a number of steps of at least 1, got {p!r}")
    if not 2 <= a < math.inf:
        raise ValueError(f"a: expected a number of at least 2, so that the kernel is positive semi-definite, got {a}")
    c = 1 / (a - 1)
    even = p % 2 == 0

    def root(n: int) -> tuple[Tensor, Tensor]:
        f = _by_ratio(n, lambda k: c * (p / 2 - k + 1) / k)
        return f, f

    return Series(
        f"random_walk(p={p}, a={a:g})",
        lambda n: _by_ratio(n, lambda k: c * (p - k + 1) / k),
        root,
        scale=(a - 1) ** p,
        radius=math.inf if even else a - 1,
        on_circle=True,
        degree=p // 2 if even else None,
        function=lambda x: (a - 1 + x) ** p,
    )


@_remembered
def heat(t: float = 1.0) -> Series:
    r"""The heat (diffusion) kernel :math:`\exp(-t L)`, with :math:`L = I - W`.

    The variance is finite for every t, but that of one walk grows as :math:`\exp(t / \sqrt{1 - p} - t)` with the
    probability p of halting. For large t take p near 2 / t, or a product of short times
    (:class:`geo.kernels.StitchedKernel`). Features reach :math:`\exp(t / 2)`: float32 ends near t = 170.

    Args:
        t: Time, positive.

    Returns:
        The series, which converges everywhere.

    Raises:
        ValueError: t is not positive.

    Example:
        >>> heat(t=2.0).alpha(4)
        tensor([1.0000, 2.0000, 2.0000, 1.3333], dtype=torch.float64)
    """
    _positive(t=t)

    def root(n: int) -> tuple[Tensor, Tensor]:
        f = _by_ratio(n, lambda k: t / 2 / k)
        return f, f

    return Series(
        f"heat(t={t:g})",
        lambda n: _by_ratio(n, lambda k: t / k),
        root,
        scale=math.exp(-t),
        function=lambda x: (t * (x - 1)).exp(),
    )


@_remembered
def inverse_cosine(c: float = math.pi / 4) -> Series:
    r"""The inverse cosine kernel :math:`\cos(\pi/4 \, I - c W)`, which is :math:`\cos(\pi/4 \, L)` at the default c.

    The modulation has no closed form, and at the default c the spectral radius of W equals its radius of convergence:
    the mean converges, but the variance is infinite with uniform proposals. A smaller c (the published experiments take
    0.25) has a finite variance.

    Args:
        c: Factor of W, positive.

    Returns:
        The series, of radius :math:`\pi / 4 / c`.

    Raises:
        ValueError: c is not positive.

    Example:
        >>> inverse_cosine(c=1.0).modulation(4)
        tensor([ 1.0000,  0.5000, -0.3750,  0.1042], dtype=torch.float64)
    """
    _positive(c=c)

    def alpha(n: int) -> Tensor:
        sign = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(n // 4 + 1)[:n]
        return sign * _by_ratio(n, lambda k: c / k)

    return Series(
        f"inverse_cosine(c={c:g})",
        alpha,
        lambda n: (sqrt_series(alpha(n)),) * 2,
        scale=math.sqrt(0.5),
        radius=math.pi / 4 / c,
        on_circle=True,
        function=lambda x: (math.pi / 4 - c * x).cos(),
    )


@_remembered
def katz(beta: float) -> Series:
    r"""The Katz (von Neumann) kernel :math:`(I - \beta A)^{-1}` on the adjacency matrix A itself.

    Args:
        beta: Positive, and below one over the spectral radius of A.

    Returns:
        The series, of radius :math:`1 / \beta` and ``normalization`` None.

    Raises:
        ValueError: beta is not positive.

    Example:
        >>> series = katz(beta=0.5)
        >>> series.normalization, series.alpha(3).tolist(), series.modulation(3).tolist()
        (None, [1.0, 0.5, 0.25], [1.0, 0.25, 0.09375])
    """
    _positive(beta=beta)
    return _negative_power(f"katz(beta={beta:g})", beta, 1.0, 1.0, None)


@_remembered
def personalised_pagerank(a: float) -> Series:
    r"""Personalised PageRank :math:`a (I - (1 - a) P)^{-1}`, with :math:`P = D^{-1} A`.

    It is not symmetric: row i holds the PageRank of a walk that restarts at i. The features are those of the symmetric
    matrix :math:`a (I - (1 - a) W)^{-1}`, with rows scaled by :math:`D^{-1/2}` and columns by :math:`D^{1/2}`.

    Args:
        a: Probability of a restart, between 0 and 1.

    Returns:
        The series, of radius 1 / (1 - a).

    Raises:
        ValueError: a is not between 0 and 1.

    Example:
        >>> personalised_pagerank(a=0.5).alpha(3).tolist()
        [1.0, 0.5, 0.25]
    """
    if not 0 < a < 1:
        raise ValueError(f"a: expected a probability between 0 and 1, both excluded, got {a}")
    return _negative_power(f"personalised_pagerank(a={a:g})", 1 - a, 1.0, 1 / a, "sym", "degree")


@_remembered
def custom(
    alpha: Sequence[float] | Tensor | Coefficients,
    *,
    scale: float = 1.0,
    normalization: Literal["sym"] | None = "sym",
    radius: float | None = None,
    name: str = "custom",
) -> Series:
    r"""Any series :math:`K = s \sum_k \alpha_k W^k` with :math:`\alpha_0 > 0`.

    Args:
        alpha: The coefficients of a polynomial, or a function from a number of terms n to the first n coefficients.
        scale: s.
        normalization: ``'sym'``, or None for a series in the adjacency matrix itself.
        radius: Radius of convergence of the square root (not of the series: the root has branch points where the series
            is zero); estimated from 256 terms by default, to about three digits. Rounded coefficients of an entire
            series have zeros far out, so that a large number is found instead of infinity: give it where that matters.
        name: What errors and ``repr`` call it.

    Returns:
        The series.

    Raises:
        ValueError: :math:`\alpha_0` is not positive (the error names :func:`pair`), or ``normalization`` is unknown.

    Example:
        >>> series = custom([1.0, 1.0, 0.25])  # (1 + x / 2)^2
        >>> series.modulation(4).tolist(), series.degree
        ([1.0, 0.5, 0.0, 0.0], 1)
    """
    coefficients = _coefficients(alpha, "alpha")
    f = sqrt_series(coefficients(_TERMS))
    return Series(
        name,
        coefficients,
        lambda n: (sqrt_series(coefficients(n)),) * 2,
        scale,
        _normalization(normalization),
        _radius(f) if radius is None else radius,
        degree=_degree(f),
    )


@_remembered
def pair(
    alpha: Sequence[float] | Tensor | Coefficients,
    f1: Sequence[float] | Tensor | Coefficients,
    *,
    scale: float = 1.0,
    normalization: Literal["sym"] | None = "sym",
    radius: float | None = None,
    name: str = "pair",
) -> Series:
    r"""A series estimated with two different modulations, :math:`f_1` and :math:`f_2 = \alpha / f_1`.

    It needs no square root, so :math:`\alpha_0` may be zero or negative. The estimate of the kernel is neither
    symmetric nor positive semi-definite. With :math:`f_1 = (1)` the second set's features alone estimate the kernel.

    Args:
        alpha: The coefficients of a polynomial, or a function from a number of terms n to the first n coefficients.
        f1: The modulation of the first set, in the same form; its first entry is not zero.
        scale: Factor of the kernel.
        normalization: ``'sym'``, or None for a series in the adjacency matrix itself.
        radius: The smaller radius of convergence of the two modulations; estimated from 256 terms by default.
        name: What errors and ``repr`` call it.

    Returns:
        The series.

    Raises:
        ValueError: The first entry of f1 is zero, or ``normalization`` is unknown.

    Example:
        >>> series = pair([0.0, 1.0, 1.0], f1=[1.0])  # W + W^2
        >>> [f.tolist() for f in series.modulations(3)]
        [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    """
    coefficients, first = _coefficients(alpha, "alpha"), _coefficients(f1, "f1")

    def factors(n: int) -> tuple[Tensor, Tensor]:
        return first(n), divide_series(coefficients(n), first(n))

    both = factors(_TERMS)
    degrees = [_degree(f) for f in both]
    return Series(
        name,
        coefficients,
        factors,
        scale,
        _normalization(normalization),
        min(map(_radius, both)) if radius is None else radius,
        degree=None if None in degrees else max(d for d in degrees if d is not None),
    )


# -- parts -------------------------------------------------------------------------------------------------------------
def _negative_power(
    name: str,
    c: float,
    d: float,
    base: float,
    normalization: Literal["sym"] | None = "sym",
    conjugate: Literal["degree"] | None = None,
) -> Series:
    """(base (I - c W))^-d: coefficients (d)_k / k! c^k, whose root has d / 2 for d."""

    def root(n: int) -> tuple[Tensor, Tensor]:
        f = _by_ratio(n, lambda k: c * (d / 2 + k - 1) / k)
        return f, f

    return Series(
        name,
        lambda n: _by_ratio(n, lambda k: c * (d + k - 1) / k),
        root,
        base**-d,
        normalization,
        1 / c,
        function=lambda x: (base * (1 - c * x)) ** -d,
        conjugate=conjugate,
    )


def _by_ratio(n: int, ratio: Callable[[Tensor], Tensor]) -> Tensor:
    """The sequence that starts with 1 and has the given ratio of term k to term k - 1."""
    k = torch.arange(1, n, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), ratio(k)]).cumprod(0)[:n]


def _series(values: Tensor | Sequence[float], name: str) -> Tensor:
    out = torch.as_tensor(values, dtype=torch.float64)
    if out.dim() != 1 or out.size(0) == 0:
        raise ValueError(f"{name}: expected at least one coefficient, got shape {list(out.shape)}")
    return out


def _padded(values: Tensor, n: int) -> Tensor:
    return torch.cat([values[:n], values.new_zeros(max(n - values.size(0), 0))])


def _coefficients(values: Sequence[float] | Tensor | Coefficients, name: str) -> Coefficients:
    """A function from a number of terms to the terms, from that or from the coefficients of a polynomial."""
    if callable(values):
        function = values

        def checked(n: int) -> Tensor:
            out = _series(function(n), name)
            if out.size(0) != n:
                raise ValueError(f"{name}: the function returned {out.size(0)} coefficients where {n} were asked for")
            return out

        return checked
    polynomial = _series(values, name)
    return lambda n: _padded(polynomial, n)


def _degree(f: Tensor) -> int | None:
    """The last entry that is not zero, where the second half is all zero."""
    last = int(f.nonzero().max()) if bool(f.any()) else 0
    return last if last < f.size(0) // 2 else None


def _radius(f: Tensor) -> float:
    r"""The radius of convergence, from a fit of :math:`\log|f_k| = a - b \log k - k \log R` to the largest terms."""
    if _degree(f) is not None:
        return math.inf
    n = f.size(0)
    size = f.abs()
    if not bool(size.isfinite().all()):
        return 0.0
    peaks = [begin + int(size[begin : begin + n // 16].argmax()) for begin in range(n // 4, n, n // 16)]
    k = torch.tensor([p for p in peaks if size[p] > torch.finfo(torch.float64).tiny], dtype=torch.float64)
    if k.size(0) < 4:  # it falls faster than any power that float64 can tell
        return math.inf
    table = torch.stack([torch.ones_like(k), k, k.log()], dim=1)
    slope = torch.linalg.lstsq(table, size[k.long()].log().unsqueeze(1)).solution[1]
    return math.exp(-float(slope))


def _count(n: int) -> int:
    if n < 1:
        raise ValueError(f"n: expected a number of terms of at least 1, got {n}")
    return n


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _normalization(value: str | None) -> Literal["sym"] | None:
    if value is None:
        return None
    if value != "sym":
        raise ValueError(f"normalization: expected 'sym' or None, got {value!r}")
    return "sym"
