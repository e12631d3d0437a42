"""Powers of functions on the sphere: the many-body features of a node from its two-body ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geo.nn.gaunt import flat, split_signals
from geo.o3.gaunt import Signals, parse_signals
from geo.o3.sphere_grid import SphereGrid
from geo.ops import SegmentPlan, gather_coo

if TYPE_CHECKING:
    from e3nn.o3 import Irreps


class GauntPower(nn.Module):
    r"""All powers up to `correlation` of functions on the sphere, on one grid: MACE's symmetric contraction.

    "Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt Tensor Products"
    (https://arxiv.org/abs/2401.10216), in the place where MACE (https://arxiv.org/abs/2206.07697) has its symmetric
    contraction. Each channel of a node is a function :math:`f(u) = \frac{1}{N} \sum_{lm} x_{lm} Y_{lm}(u)`, and

    .. math::
        B_{lm} = \sum_{\nu = 1}^{n} \frac{w^{z \nu}_{l}}{\sqrt{(2 \nu - 1)!!}} \, \langle f^\nu \, Y_{lm} \rangle

    with one weight for each element z of the node, order :math:`\nu`, degree and channel.
    :math:`N^2` is the sum of 2l+1 over the input (N = L+1 where it has all degrees): inputs of unit variance give an f
    of unit variance, and the double factorial does the same for its powers.

    What differs from MACE: one weight for each degree and order where MACE has one for each symmetric coupling. Those
    of order 2 are all there; from order 3 on those through an intermediate of the odd kind are not. What differs from
    the paper: the grid is the smallest that is exact for degree n L + L_out, and nothing is cut off between factors.
    Irreps of either parity are allowed: an even number of pseudo-functions makes a true one.

    Args:
        irreps_in: Irreps of the input, one multiplicity C and no irrep twice, such as ``'32x0e + 32x1o + 32x2e'``.
        irreps_out: Irreps wanted, with the same multiplicity.
        correlation: Highest order n, the body order less one.
        num_elements: Kinds of nodes that have weights of their own. (default: ``1``)
        layout: ``'e3nn'``: features as e3nn has them; ``'dense'``: :math:`(|V|, D, C)`, see :func:`geo.o3.pack`.
            (default: ``'e3nn'``)

    Shapes:
        x :math:`(|V|, \text{dim})` or :math:`(|V|, D, C)`, node_attrs :math:`(|V|)` or :math:`(|V|, Z)`; output
        :math:`(|V|, \text{dim}')` or :math:`(|V|, D', C)`.

    Symmetry and derivatives:
        Equivariant to O(3) and to node permutation; differentiable any number of times. A node's output does not
        depend on the others. 16-bit features, and features under autocast, are multiplied in float32.

    Raises:
        ValueError: Irreps that are no signals, unequal multiplicities, outputs that no power reaches, or an unknown
            option.

    Example:
        >>> power = GauntPower("8x0e + 8x1o + 8x2e", "8x0e + 8x1o", correlation=3, num_elements=2)
        >>> power(torch.randn(5, 72), torch.tensor([0, 1, 0, 0, 1])).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        irreps_in: str | Irreps,
        irreps_out: str | Irreps,
        correlation: int,
        num_elements: int = 1,
        layout: str = "e3nn",
    ) -> None:
        super().__init__()
        from e3nn.o3 import Irreps

        for name, value in (("correlation", correlation), ("num_elements", num_elements)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be a positive integer")
        if layout not in ("e3nn", "dense"):
            raise ValueError(f"layout is {layout!r}, but must be one of 'e3nn', 'dense'")
        self.correlation, self.num_elements, self.layout = correlation, num_elements, layout
        self._in, self._out = parse_signals(irreps_in, "irreps_in"), parse_signals(irreps_out, "irreps_out")
        self.irreps_in, self.irreps_out = Irreps(irreps_in), Irreps(irreps_out)
        if self._in.mul != self._out.mul:
            raise ValueError(
                f"irreps_out has multiplicity {self._out.mul}, but powers keep the {self._in.mul} of irreps_in"
            )
        self._check_out()
        self._columns = str(self.irreps_in.dim) if layout == "e3nn" else f"{self._in.rows()}, {self._in.mul}"
        top_in = max(self._in.lmax(parity) for parity in (1, -1))
        top_out = max(self._out.lmax(parity) for parity in (1, -1))
        self.grid = SphereGrid(max(correlation * top_in + top_out, 2 * top_out))
        self._norm = math.sqrt(sum(2 * l + 1 for parity in (1, -1) for l in self._in.degrees(parity)))
        back = (self.grid.to_matrix(top_out) * self.grid.weights[:, None]).t().contiguous()
        self.register_buffer("_to", self.grid.to_matrix(top_in).view(torch.int64), persistent=False)
        self.register_buffer(
            "_from", back.view(torch.int64), persistent=False
        )  # bits: no cast of the module rounds them
        rows = [(parity, l) for parity in (1, -1) for l in range(self._out.lmax(parity) + 1)]
        self._sizes = [2 * l + 1 for _, l in rows]
        wanted = [float(l in self._out.degrees(parity)) for parity, l in rows]
        self.register_buffer("_wanted", torch.tensor(wanted)[:, None], persistent=False)
        self.weight = nn.Parameter(torch.empty(num_elements, correlation, len(rows), self._in.mul))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, from a normal distribution of variance 1 / correlation."""
        nn.init.normal_(self.weight, std=self.correlation**-0.5)

    def forward(self, x: Tensor, node_attrs: Tensor | None = None) -> Tensor:
        """Takes the powers.

        Args:
            x: Features.
            node_attrs: The element of each node as an index, or as a row of factors (one-hot or not) for the weights of
                the elements. (default: all are of the one element)
        """
        if x.dim() != (2 if self.layout == "e3nn" else 3):
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self._columns})")
        signals = split_signals("x", x, self._in, self.layout)
        weight = self._node_weights(node_attrs, x.size(0)).movedim(1, 0)  # [order, V or 1, rows, C]
        dtype = x.dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        with torch.autocast(x.device.type, enabled=False):
            powers = self._powers({parity: signal.to(wide) for parity, signal in signals.items()})
            total: Tensor | None = None
            for power, w in zip(powers, weight.to(wide), strict=True):
                term = power * _spread(w * self._wanted.to(w), self._sizes)
                total = term if total is None else total + term
        assert total is not None
        total = total.to(dtype)
        return total if self.layout == "dense" else flat(total, self._out)

    def _powers(self, signals: dict[int, Tensor]) -> list[Tensor]:
        """Coefficients of every power, in the rows of the output."""
        like = signals[1]
        to, back = (self.get_buffer(name).view(torch.float64).to(like) for name in ("_to", "_from"))
        true, pseudo = (signals[parity] / self._norm for parity in (1, -1))
        fields = [to[:, : part.size(-2)] @ part for part in (true, pseudo)]
        # a + b and a - b have the powers p and q whose half sum is even in b, the true part, and half difference odd.
        if not pseudo.size(-2):
            f, g = fields[0], None
        elif not true.size(-2):
            f, g = fields[1], -fields[1]
        else:
            f, g = fields[0] + fields[1], fields[0] - fields[1]
        p, q = f, g
        found = []
        for order in range(1, self.correlation + 1):
            if order > 1:
                p, q = p * f, None if q is None or g is None else q * g
            scale = math.prod(range(1, 2 * order, 2)) ** -0.5
            halves = {1: p} if q is None else {1: (p + q) / 2, -1: (p - q) / 2}
            rows = [
                back[: (self._out.lmax(parity) + 1) ** 2] @ half
                for parity, half in halves.items()
                if self._out.lmax(parity) >= 0
            ]
            found.append(torch.cat(rows, -2) * scale)
        return found

    def _node_weights(self, node_attrs: Tensor | None, num_nodes: int) -> Tensor:
        """[V, order, rows, C], or one row for all nodes."""
        if node_attrs is None:
            if self.num_elements > 1:
                raise ValueError(f"node_attrs is None, but the {self.num_elements} elements have weights of their own")
            return self.weight
        if node_attrs.size(0) != num_nodes:
            raise ValueError(f"node_attrs has {node_attrs.size(0)} rows, but x has {num_nodes}")
        if node_attrs.dim() == 1 and node_attrs.dtype == torch.int64:
            return gather_coo(self.weight, SegmentPlan(node_attrs, self.num_elements))
        if node_attrs.dim() != 2 or node_attrs.size(1) != self.num_elements:
            raise ValueError(
                f"node_attrs is {node_attrs.dtype} {tuple(node_attrs.shape)}, but must be int64 ({num_nodes},) or "
                f"({num_nodes}, {self.num_elements})"
            )
        mixed: Tensor = torch.tensordot(node_attrs.to(self.weight.dtype), self.weight, 1)
        return mixed

    def _check_out(self) -> None:
        reach = _reachable(self._in, self.correlation)
        for parity in (1, -1):
            degrees = self._out.degrees(parity)
            for l in degrees:
                if l not in reach[parity]:
                    letter = "e" if parity * (-1) ** l == 1 else "o"
                    raise ValueError(
                        f"irreps_out asks for {l}{letter}, which no power of {self.irreps_in} up to {self.correlation} "
                        "reaches"
                    )
            if self.layout == "dense" and degrees != list(range(len(degrees))):
                raise ValueError("layout 'dense' has rows for every degree up to the highest, irreps_out has not")
            there = self._in.degrees(parity)
            if self.layout == "dense" and there != list(range(len(there))):
                raise ValueError("layout 'dense' has rows for every degree up to the highest, irreps_in has not")

    def extra_repr(self) -> str:
        """Sizes and options."""
        sizes = f"correlation={self.correlation}, num_elements={self.num_elements}"
        return f"{self.irreps_in} -> {self.irreps_out}, {sizes}, grid of {len(self.grid)}"


def _reachable(signals: Signals, correlation: int) -> dict[int, set[int]]:
    """Degrees of the true and of the pseudo part of all powers."""
    first = {(parity, l) for parity in (1, -1) for l in signals.degrees(parity)}
    power, reach = first, set(first)
    for _ in range(correlation - 1):
        power = {(p * q, l3) for p, l1 in power for q, l2 in first for l3 in range(abs(l1 - l2), l1 + l2 + 1, 2)}
        reach |= power
    return {parity: {l for p, l in reach if p == parity} for parity in (1, -1)}


def _spread(scale: Tensor, sizes: list[int]) -> Tensor:
    """Rows [..., degrees, C] repeated for the components of each degree."""
    lead = scale.shape[:-2]
    return torch.cat([scale[..., i : i + 1, :].expand(*lead, n, -1) for i, n in enumerate(sizes)], -2)
