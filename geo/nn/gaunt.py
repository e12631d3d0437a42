"""Tensor products of irreps as products of functions on the sphere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from geo.o3.gaunt import (
    Signals,
    bracket_coefficient,
    gaunt_coefficient,
    parse_signals,
    path_variances,
)
from geo.ops import Blocks, gaunt_product_irreps, pack_irreps, unpack_irreps
from geo.ops.gaunt import LMAX, METHODS, check_method, gaunt_product

if TYPE_CHECKING:
    from e3nn.o3 import Irreps

MODES = ("uuu", "uvu", "uvw", "full")


class _Term(NamedTuple):
    """One product of two signals: their parities (1 true, -1 pseudo), that of the result, and the kind."""

    first: int
    second: int
    out: int
    bracket: bool


class GauntTensorProduct(nn.Module):
    r"""Tensor product of irreps by multiplying functions on the sphere, with the lost paths recovered.

    "Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt Tensor Products"
    (https://arxiv.org/abs/2401.10216). Each channel of an input is a function :math:`f(u) = \sum_{lm} x_{lm}
    Y_{lm}(u)`, and the output holds the coefficients, degree by degree, of

    .. math::
        z = c\, (a f \cdot b h) \quad\text{and, with the bracket,}\quad
        z = c\, \{a f, b h\}, \qquad \{f, h\}(u) = u \cdot (\nabla f \times \nabla h)

    where a, b, c are factors of each degree: constants, and weights if asked for. One product costs
    :math:`O(L^3)` to :math:`O(L^4)` instead of the :math:`O(L^6)` of all Clebsch-Gordan paths, and couples them with
    fixed relative coefficients: :func:`as_e3nn` writes them out.

    What differs from the paper: the grid is the smallest that is exact (Gauss-Legendre), not a Fourier
    grid (https://arxiv.org/abs/2506.13523 finds it faster); a pointwise product has no path with
    :math:`l_1 + l_2 + l_3` odd, such as the cross product, and ``antisymmetric='bracket'`` adds all of them by the
    Poisson bracket on the same grid (https://arxiv.org/abs/2605.15073); and irreps of either parity are allowed: those
    with :math:`p = (-1)^l` are true functions, the others pseudo-functions, and every pair is multiplied.

    Args:
        irreps_in1: First input, one multiplicity and no irrep twice, such as ``'32x0e + 32x1o + 32x2e'``.
        irreps_in2: Second input.
        irreps_out: Irreps wanted. (default: all that can be reached, up to `lmax_out`)
        lmax_out: Highest degree of the output, in place of `irreps_out`. (default: the sum of those of the inputs)
        mode: ``'uuu'``: channel by channel; ``'uvu'``: the one channel of the second input with each of the first;
            ``'full'``: every channel of the first with every one of the second, C1 C2 channels; ``'uvw'``: channels
            are mixed, degree by degree, before and after. (default: ``'uuu'``)
        weights: ``'per_l'`` learns a, b, c for every channel; ``'none'`` leaves constants. ``'uvw'`` has its mixing
            matrices in either case. (default: ``'none'``)
        rank: Products with weights of their own that are added; in ``'uvw'`` a factor of the hidden width, which is
            the largest multiplicity. (default: ``1``)
        antisymmetric: ``'bracket'`` adds the odd paths. (default: ``False``)
        normalize: ``'component'``: unit variance of each output component from independent inputs of unit variance
            (brackets take their inputs over :math:`\sqrt{l (l + 1)}`, which gives them the size of products);
            ``'gaunt'``: the pointwise product and the bracket themselves. (default: ``'component'``)
        method: ``'sparse'``, ``'grid'``, ``'separable'`` or ``'auto'``, see :func:`geo.ops.gaunt.gaunt_product`.
            (default: ``'auto'``)
        layout: ``'e3nn'``: features as e3nn has them; ``'dense'``: :math:`(..., D, C)`, see :func:`geo.o3.pack`, which
            saves the change of layout. (default: ``'e3nn'``)

    Shapes:
        x :math:`(..., \text{dim}_1)` and y :math:`(..., \text{dim}_2)`, or :math:`(..., D, C)` in the dense layout;
        output :math:`(..., \text{dim})` or :math:`(..., D, C)`. Leading axes broadcast.

    Symmetry and derivatives:
        Equivariant to O(3); bilinear; differentiable any number of times. A row's output does not depend on the others.

    Raises:
        ValueError: Irreps that are no signals, multiplicities that do not fit the mode, outputs that cannot be reached,
            or an unknown option.

    Example:
        >>> tp = GauntTensorProduct("8x0e + 8x1o", "8x0e + 8x1o", antisymmetric="bracket")
        >>> tp.irreps_out
        8x0e+8x1o+8x1e+8x2e
        >>> tp(torch.randn(5, 32), torch.randn(5, 32)).shape
        torch.Size([5, 96])
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        irreps_in1: str | Irreps,
        irreps_in2: str | Irreps,
        irreps_out: str | Irreps | None = None,
        lmax_out: int | None = None,
        mode: str = "uuu",
        weights: str = "none",
        rank: int = 1,
        antisymmetric: bool | str = False,
        normalize: str = "component",
        method: str = "auto",
        layout: str = "e3nn",
    ) -> None:
        super().__init__()
        from e3nn.o3 import Irreps

        for name, value, allowed in (
            ("mode", mode, MODES),
            ("weights", weights, ("none", "per_l")),
            ("antisymmetric", antisymmetric, (False, "bracket")),
            ("normalize", normalize, ("component", "gaunt")),
            ("method", method, METHODS),
            ("layout", layout, ("e3nn", "dense")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is {rank!r}, but must be a positive integer")
        if rank > 1 and weights == "none" and mode != "uvw":
            raise ValueError(
                f"rank is {rank}, but products that have no weights are all alike: it needs weights='per_l'"
            )
        self.mode, self.weights, self.rank, self.antisymmetric = mode, weights, rank, antisymmetric
        self.normalize, self.method, self.layout = normalize, method, layout
        self._in1, self._in2 = parse_signals(irreps_in1, "irreps_in1"), parse_signals(irreps_in2, "irreps_in2")
        self.irreps_in1, self.irreps_in2 = Irreps(irreps_in1), Irreps(irreps_in2)
        for name, signals in (("irreps_in1", self._in1), ("irreps_in2", self._in2)):
            if max(signals.lmax(1), signals.lmax(-1)) > LMAX:
                raise ValueError(f"{name} has degrees above {LMAX}, the highest that products go to")
        mul = self._multiplicity()
        reach = self._reachable()
        if irreps_out is None:
            lmax = max(reach[1] | reach[-1]) if lmax_out is None else lmax_out
            if isinstance(lmax, bool) or not isinstance(lmax, int) or lmax < 0:
                raise ValueError(f"lmax_out is {lmax_out!r}, but must be an integer of at least 0")
            found = [(l, p) for l in range(lmax + 1) for p in (1, -1) if l in reach[p]]
            if not found:
                raise ValueError(f"lmax_out is {lmax_out}, and no degree up to it is reached")
            self.irreps_out = Irreps([(mul, (l, p * (-1) ** l)) for l, p in found])
        elif lmax_out is not None:
            raise ValueError("irreps_out and lmax_out were both given, but each says where the output ends: give one")
        else:
            parse_signals(irreps_out, "irreps_out")
            self.irreps_out = Irreps(irreps_out)
        self._out = parse_signals(self.irreps_out, "irreps_out")
        self._check_out(mul, reach)
        self._terms = [
            term
            for term in self._all_terms()
            if self._out.lmax(term.out) >= 0 and self._degrees(term) & set(self._out.degrees(term.out))
        ]
        for term in self._terms:
            check_method(method, self._lmax(term))
        self._register_constants()
        self._shapes = [self._weight_shapes(term) for term in self._terms]
        self.weight_numel = sum(math.prod(shape) for shapes in self._shapes for shape in shapes)
        self.register_parameter("weight", nn.Parameter(torch.empty(self.weight_numel)) if self._shapes[0] else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, from the unit normal distribution."""
        if self.weight is not None:
            nn.init.normal_(self.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiplies.

        Args:
            x: First input.
            y: Second input.
        """
        if self.layout == "e3nn" and self.mode in ("uuu", "uvu"):
            for name, t, signals in (("x", x, self._in1), ("y", y, self._in2)):
                if t.dim() < 1 or t.size(-1) != signals.size:
                    raise ValueError(f"{name} has shape {tuple(t.shape)}, but must be (..., {signals.size})")
            outs = [out for i in range(len(self._terms)) for out in self._products(i, x, y, None, True)]
            return sum(outs[1:], start=outs[0])
        first = split_signals("x", x, self._in1, self.layout)
        second = split_signals("y", y, self._in2, self.layout)
        dense = self.multiply(first, second)
        return dense if self.layout == "dense" else flat(dense, self._out)

    def multiply(self, first: dict[int, Tensor], second: dict[int, Tensor], weight: Tensor | None = None) -> Tensor:
        """The product of dense signals, dense; `weight` [..., terms, L2+1, C] scales the degrees of the second."""
        sums: dict[int, Tensor] = {}
        weights = [None] * len(self._terms) if weight is None else weight.unbind(-3)
        for i, (term, scale) in enumerate(zip(self._terms, weights, strict=True)):
            for out in self._products(i, first[term.first], second[term.second], scale):
                sums[term.out] = sums[term.out] + out if term.out in sums else out
        rows = [sums[parity] for parity in (1, -1) if parity in sums]
        return rows[0] if len(rows) == 1 else torch.cat(rows, -2)

    @property
    def num_terms(self) -> int:
        """Products and brackets of pairs of signals that are taken."""
        return len(self._terms)

    @property
    def paths(self) -> list[tuple[int, int, int, bool]]:
        """The couplings in the product: places of the irreps in both inputs and the output, and whether by bracket."""
        return [(i, j, k, term.bracket) for term, i, j, k in self._paths()]

    def extra_repr(self) -> str:
        """Sizes and options."""
        options = f"mode={self.mode!r}, weights={self.weights!r}, rank={self.rank}"
        kind = f"antisymmetric={self.antisymmetric!r}, normalize={self.normalize!r}"
        return f"{self.irreps_in1} x {self.irreps_in2} -> {self.irreps_out}, {options}, {kind}"

    # -- what couples with what ----------------------------------------------------------------------------------------
    def _multiplicity(self) -> int:
        """Channels of the output; for ``'uvw'`` those it has by default."""
        one, two = self._in1.mul, self._in2.mul
        if self.mode == "uuu" and one != two:
            raise ValueError(f"mode 'uuu' needs equal multiplicities, got {one} in irreps_in1 and {two} in irreps_in2")
        if self.mode == "uvu" and two != 1:
            raise ValueError(f"mode 'uvu' needs multiplicity 1 in irreps_in2, got {two}: 'full' and 'uvw' take any")
        return one * two if self.mode == "full" else one

    def _all_terms(self) -> list[_Term]:
        kinds = (False, True) if self.antisymmetric else (False,)
        return [
            _Term(p, q, -p * q if bracket else p * q, bracket)
            for bracket in kinds
            for p in (1, -1)
            for q in (1, -1)
            if self._in1.blocks[p] and self._in2.blocks[q]
        ]

    def _degrees(self, term: _Term) -> set[int]:
        return {
            l3
            for l1 in self._in1.degrees(term.first)
            for l2 in self._in2.degrees(term.second)
            for l3 in range(abs(l1 - l2), l1 + l2 + 1)
            if (l1 + l2 + l3) % 2 == term.bracket
        }

    def _reachable(self) -> dict[int, set[int]]:
        reach: dict[int, set[int]] = {1: set(), -1: set()}
        for term in self._all_terms():
            reach[term.out] |= self._degrees(term)
        return reach

    def _check_out(self, mul: int, reach: dict[int, set[int]]) -> None:
        if self.mode != "uvw" and self._out.mul != mul:
            raise ValueError(f"irreps_out has multiplicity {self._out.mul}, but mode {self.mode!r} makes {mul}")
        if self.layout == "dense":
            for name, signals in (("irreps_in1", self._in1), ("irreps_in2", self._in2)):
                if any(signals.degrees(parity) != list(range(signals.lmax(parity) + 1)) for parity in (1, -1)):
                    raise ValueError(f"layout 'dense' has rows for every degree up to the highest, {name} has not")
        for parity in (1, -1):
            for l in self._out.degrees(parity):
                if l not in reach[parity]:
                    letter = "e" if parity * (-1) ** l == 1 else "o"
                    hint = "" if self.antisymmetric else "; antisymmetric='bracket' adds those with l1 + l2 + l3 odd"
                    raise ValueError(
                        f"irreps_out asks for {l}{letter}, which no product of {self.irreps_in1} and "
                        f"{self.irreps_in2} reaches{hint}"
                    )
            missing = {l for l in reach[parity] if l <= self._out.lmax(parity)} - set(self._out.degrees(parity))
            if self.layout == "dense" and missing:
                raise ValueError(f"layout 'dense' has rows for every degree, but irreps_out leaves out {missing}")

    def _paths(self) -> list[tuple[_Term, int, int, int]]:
        def places(irreps: Irreps, parity: int) -> list[tuple[int, int]]:
            return [(i, ir.l) for i, (_, ir) in enumerate(irreps) if ir.p * (-1) ** ir.l == parity]

        return [
            (term, i, j, k)
            for term in self._terms
            for i, l1 in places(self.irreps_in1, term.first)
            for j, l2 in places(self.irreps_in2, term.second)
            for k, l3 in places(self.irreps_out, term.out)
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == term.bracket
        ]

    # -- factors of degrees --------------------------------------------------------------------------------------------
    def _lmax(self, term: _Term) -> tuple[int, int, int]:
        return self._in1.lmax(term.first), self._in2.lmax(term.second), self._out.lmax(term.out)

    def _register_constants(self) -> None:
        """Buffers in float64: of each term, the constant factors of both inputs and the output, or none."""
        if self.normalize == "gaunt":
            return
        inputs = []
        variance = {p: torch.zeros(self._out.lmax(p) + 1, dtype=torch.float64, device="cpu") for p in (1, -1)}
        for term in self._terms:
            lmax = self._lmax(term)
            factors = [_input_factors(top, term.bracket) for top in lmax[:2]]
            present = self._in1.degrees(term.first), self._in2.degrees(term.second)
            for factor, degrees in zip(factors, present, strict=True):
                factor[sorted(set(range(len(factor))) - set(degrees))] = 0
            path = path_variances(*lmax, term.bracket)
            variance[term.out] += torch.einsum("i,j,ijk->k", factors[0].square(), factors[1].square(), path)
            inputs.append(factors)
        for i, (term, factors) in enumerate(zip(self._terms, inputs, strict=True)):
            v = variance[term.out] * (1 if self.mode == "uvw" else self.rank)
            out = torch.where(v > 1e-9, v, 1).rsqrt()
            for name, factor in zip(("first", "second", "out"), (*factors, out), strict=True):
                self.register_buffer(f"_{name}{i}", factor[:, None], persistent=False)

    def _constants(self, i: int) -> list[Tensor | None]:
        """Factors [L+1, 1] of both inputs and the output, ``None`` where all are one."""
        if self.normalize == "gaunt":
            return [None, None, None]
        found = [self.get_buffer(f"_{name}{i}") for name in ("first", "second", "out")]
        return [*found] if self._terms[i].bracket else [None, None, found[2]]

    def _hidden(self) -> int:
        return self.rank * max(self._in1.mul, self._in2.mul, self._out.mul)

    def _weight_shapes(self, term: _Term) -> list[tuple[int, ...]]:
        """Shapes of the weights a, b, c of a term."""
        one, two, three = (lmax + 1 for lmax in self._lmax(term))
        if self.mode == "uvw":
            hidden = self._hidden()
            return [(one, self._in1.mul, hidden), (two, self._in2.mul, hidden), (three, hidden, self._out.mul)]
        if self.weights == "none":
            return []
        second = self._in1.mul if self.mode == "uvu" else self._in2.mul
        return [(self.rank, one, self._in1.mul), (self.rank, two, second), (self.rank, three, self._out.mul)]

    def _term_weights(self, i: int) -> list[Tensor]:
        """The weights a, b, c of a term; matrices over the root of their width."""
        if self.weight is None:
            return []
        start = sum(math.prod(shape) for shapes in self._shapes[:i] for shape in shapes)
        found = []
        for shape in self._shapes[i]:
            stop = start + math.prod(shape)
            part = self.weight[start:stop].view(shape)
            found.append(part * max(shape[1], 1) ** -0.5 if self.mode == "uvw" else part)
            start = stop
        return found

    # -- the product ---------------------------------------------------------------------------------------------------
    def _products(self, i: int, x: Tensor, y: Tensor, scale: Tensor | None, whole: bool = False) -> list[Tensor]:
        """The products of one term, one a rank; of dense signals, or of `whole` features in e3nn's layout."""
        term, weights = self._terms[i], self._term_weights(i)
        lmax = self._lmax(term)[2]
        dtype = torch.promote_types(x.dtype, y.dtype)
        constants = [None if c is None else c.to(dtype) for c in self._constants(i)]
        if scale is not None:
            constants[1] = scale if constants[1] is None else scale * constants[1]

        def product(x: Tensor, y: Tensor, scales: list[Tensor | None]) -> Tensor:
            a, b, c = scales
            if whole:
                parts = ((self._in1, term.first), (self._in2, term.second), (self._out, term.out))
                first, second, out = (signal_blocks(signals, parity) for signals, parity in parts)
                return gaunt_product_irreps(x, y, first, second, out, term.bracket, a, b, c, self.method)
            return gaunt_product(x, y, lmax, term.bracket, a, b, c, self.method)

        if self.mode == "uvw":
            a, b, c = weights
            return [mixed(product(mixed(x, a), mixed(y, b), constants), c)]
        if self.mode == "full":
            x, y = self._outer(x, True), self._outer(y, False)
        if not weights:
            return [product(x, y, constants)]
        outs = []
        for r in range(self.rank):
            a, b, c = (weight[r] for weight in weights)
            if self.mode == "full":
                a, b = self._outer(a, True), self._outer(b, False)
            scales: list[Tensor | None] = [w if k is None else w * k for w, k in zip((a, b, c), constants, strict=True)]
            outs.append(product(x, y, scales))
        return outs

    def _outer(self, x: Tensor, first: bool) -> Tensor:
        """Channels repeated such that those of both inputs meet each other: channel u C2 + v."""
        x = x.unsqueeze(-1 if first else -2)
        return x.expand(*x.shape[:-2], self._in1.mul, self._in2.mul).flatten(-2)


def split_signals(name: str, x: Tensor, signals: Signals, layout: str) -> dict[int, Tensor]:
    """The dense rows of the true and of the pseudo signal."""
    if layout == "dense":
        if x.dim() < 2 or x.shape[-2:] != (signals.rows(), signals.mul):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be (..., {signals.rows()}, {signals.mul})")
    else:
        if x.dim() < 1 or x.size(-1) != signals.size:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be (..., {signals.size})")
        x = pack_irreps(x, signals.row_degrees, signals.row_starts, signals.mul)
    return both_signals(x, signals)


def both_signals(x: Tensor, signals: Signals) -> dict[int, Tensor]:
    """The rows of the true and of the pseudo signal; dense rows themselves where there is one of them."""
    true = (signals.lmax(1) + 1) ** 2
    if true in (0, signals.rows()):
        return {1: x if true else x[..., :0, :], -1: x[..., :0, :] if true else x}
    return {1: x[..., :true, :], -1: x[..., true:, :]}


def signal_blocks(signals: Signals, parity: int) -> Blocks:
    """Where one signal stands in features of both."""
    true = signals.lmax(1) + 1
    starts = signals.row_starts[:true] if parity == 1 else signals.row_starts[true:]
    return Blocks(tuple(starts), signals.mul, signals.size)


def flat(x: Tensor, signals: Signals) -> Tensor:
    """Dense rows in e3nn's layout."""
    return unpack_irreps(x, signals.row_degrees, signals.row_starts, signals.mul, signals.size)


def _input_factors(lmax: int, bracket: bool) -> Tensor:
    l = torch.arange(lmax + 1, dtype=torch.float64, device="cpu")
    return (l * (l + 1)).clamp_min(1).rsqrt() if bracket else torch.ones_like(l)


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    """Channels of each degree times its matrix: [..., (L+1)^2, C] and [L+1, C, H] to [..., (L+1)^2, H]."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    return torch.cat([x[..., l * l : (l + 1) ** 2, :] @ weight[l] for l in range(len(weight))], -2)


def as_e3nn(tp: GauntTensorProduct, dtype: torch.dtype | None = None) -> Any:
    r"""The same function as an explicit ``e3nn.o3.TensorProduct``, with one instruction a path.

    Each path carries the coefficient :math:`g_{l_1 l_2 l_3}` or :math:`d_{l_1 l_2 l_3}` of
    :func:`geo.o3.gaunt_coefficient` or :func:`geo.o3.bracket_coefficient` (https://arxiv.org/abs/2401.10216) times the
    factors of its degrees, copied as they are now: for comparison and for export.

    Args:
        tp: The product to write out.
        dtype: Of the result. (default: that of the weights of `tp`, or torch's default where it has none)

    Shapes:
        The module returned takes and gives features in e3nn's flat layout, whatever the layout of `tp`.

    Symmetry and derivatives:
        Equivariant to O(3); its weights are constants and do not follow those of `tp`.

    Example:
        >>> tp = GauntTensorProduct("4x0e + 4x1o", "4x0e + 4x1o", antisymmetric="bracket")
        >>> x, y = torch.randn(5, 16), torch.randn(5, 16)
        >>> (as_e3nn(tp)(x, y) - tp(x, y)).abs().max() < 1e-5
        tensor(True)
    """
    from e3nn.o3 import TensorProduct

    connection = {"uuu": "uuu", "uvu": "uvu", "full": "uvuv", "uvw": "uvw"}[tp.mode]
    equation = {"uuu": "ru,ru,ru->u", "uvu": "ru,ru,ru->u", "full": "ru,rv,ruv->uv", "uvw": "uh,vh,hw->uvw"}[tp.mode]
    instructions, values = [], []
    with torch.no_grad():
        for term, i, j, k in tp._paths():
            degrees = [irreps[n].ir.l for irreps, n in ((tp.irreps_in1, i), (tp.irreps_in2, j), (tp.irreps_out, k))]
            value = (bracket_coefficient if term.bracket else gaunt_coefficient)(*degrees)
            index = tp._terms.index(term)
            for constant, l in zip(tp._constants(index), degrees, strict=True):
                value *= 1.0 if constant is None else float(constant[l])
            weights = [weight.double() for weight in tp._term_weights(index)]
            shape = {"uuu": (tp._in1.mul,), "uvu": (tp._in1.mul, 1), "full": (tp._in1.mul, tp._in2.mul)}.get(tp.mode)
            if weights:
                axis = 0 if tp.mode == "uvw" else 1
                factors = [weight.select(axis, l) for weight, l in zip(weights, degrees, strict=True)]
                if tp.mode == "full":
                    factors[2] = factors[2].unflatten(-1, (tp._in1.mul, tp._in2.mul))
                matrix = torch.einsum(equation, *factors) * value
            else:
                assert shape is not None
                matrix = torch.full(shape, value, dtype=torch.float64)
            instructions.append((i, j, k, connection, True, 1.0))
            values.append(matrix.flatten())
    default = torch.get_default_dtype()
    if dtype is None:
        dtype = default if tp.weight is None else tp.weight.dtype
    torch.set_default_dtype(torch.float64)  # e3nn builds its Wigner symbols in the default dtype
    try:
        product = TensorProduct(
            tp.irreps_in1,
            tp.irreps_in2,
            tp.irreps_out,
            instructions,
            irrep_normalization="none",
            path_normalization="none",
            internal_weights=True,
            shared_weights=True,
        )
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        product.weight.copy_(torch.cat(values))
    return product.to(dtype).requires_grad_(False)
