"""Convolution of irreps over a point cloud, with products of functions on the sphere for tensor products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.aggr import Aggregation

from geo.nn.aggr import MeanAggregation, SumAggregation
from geo.nn.gaunt import GauntTensorProduct, both_signals, flat, mixed, split_signals
from geo.nn.kernel_basis import radial_window
from geo.o3.gaunt import parse_signals
from geo.o3.harmonics import solid_harmonics
from geo.ops import SegmentPlan, gather_coo

if TYPE_CHECKING:
    from e3nn.o3 import Irreps

_AGGREGATIONS = {"sum": SumAggregation, "add": SumAggregation, "mean": MeanAggregation}
_SILU = 1.6765  # over its root mean square on normal inputs


class GauntConv(MessagePassing):  # type: ignore[misc]
    r"""Convolution with spherical harmonics of the edges and radial weights, by Gaunt tensor products.

    The convolution of Tensor Field Networks, NequIP (https://arxiv.org/abs/2101.03164) and SEGNN with the product of
    "Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt Tensor Products"
    (https://arxiv.org/abs/2401.10216): the features of a sender are functions on the sphere, each edge has a
    filter on the sphere, and they are multiplied point by point,

    .. math::
        f'_i = \sum_{j \in N(i)} f_j \cdot h_{ij} \;\Big(+ \{f_j, h_{ij}\}\Big), \qquad
        h_{ij}(u) = \sum_{lm} R_l(d_{ij}) \, \hat Y_{lm}(r_{ij}) \, Y_{lm}(u), \qquad r_{ij} = x_j + s_{ij} - x_i

    :math:`R_l`, one for each degree, channel and kind of product, is an MLP of cosines of the distance (and of
    `edge_attr`) times a window that ends at `radius`. The harmonics and the distance are softened,
    :math:`d = \sqrt{|r|^2 + \delta^2}` and :math:`\hat Y_{lm} = Y_{lm}(r / d)` as polynomials, :math:`\delta` =
    `softening` times `radius`: everything is smooth where an edge has length zero, and there only degree 0 is left.

    What differs from NequIP: a weight for each degree of the filter instead of each path; without the bracket no path
    with :math:`l_1 + l_2 + l_3` odd, so pseudo-features never arise from true ones; with it every path
    (https://arxiv.org/abs/2605.15073).

    Args:
        irreps_in: Irreps of the input, one multiplicity C and no irrep twice, such as ``'32x0e + 32x1o + 32x2e'``.
        irreps_out: Irreps of the output. (default: all that are reached, up to the higher of `lmax` and the degree of
            the input)
        lmax: Highest degree of the edges' harmonics. (default: ``2``)
        radius: Where the window ends, in the units of the positions.
        mode: ``'uvu'``: channels stay apart, so `irreps_out` has multiplicity C; ``'uvw'``: they are mixed, degree by
            degree, after the sum, and `irreps_out` may have any. (default: ``'uvu'``)
        antisymmetric: ``'bracket'`` adds the odd paths. (default: ``False``)
        aggr: ``'sum'``, ``'mean'``, or an aggregation that commutes with rotations. (default: ``'sum'``)
        num_basis: Cosines of the distance. (default: ``8``)
        hidden_channels: Width of the radial MLP. (default: ``64``)
        edge_dim: Width of `edge_attr`. (default: ``0``)
        softening: Length below which edges lose their direction, in units of `radius`. (default: ``0.02``)
        method: See :func:`geo.ops.gaunt_product`. (default: ``'auto'``)
        layout: ``'e3nn'``: features as e3nn has them; ``'dense'``: :math:`(|V|, D, C)`, see :func:`geo.o3.pack`.
            (default: ``'e3nn'``)

    Shapes:
        x :math:`(|V|, \text{dim})` or :math:`(|V|, D, C)`, pos :math:`(|V|, 3)`, edge_index :math:`(2, |E|)`, edge_attr
        :math:`(|E|, F_e)`, edge_shift :math:`(|E|, 3)`; output :math:`(|V|, \text{dim}')` or :math:`(|V|, D', C')`,
        in the dtype of x; positions may have a finer one.

    Symmetry and derivatives:
        Equivariant to O(3), translations and node permutation; differentiable any number of times in x, pos and the
        weights, also where an edge has length zero or that of the radius (there twice). A graph's output does not
        depend on its batch.

    Raises:
        ValueError: Irreps that are no signals or cannot be reached, inputs that do not fit together, or an unknown
            option.
        IndexError: An edge to a node that is not there.

    Example:
        >>> conv = GauntConv("8x0e + 8x1o", "8x0e + 8x1o + 8x1e", radius=5.0, antisymmetric="bracket")
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 32), torch.randn(3, 3), edge_index).shape
        torch.Size([3, 56])
    """

    def __init__(
        self,
        irreps_in: str | Irreps,
        irreps_out: str | Irreps | None = None,
        lmax: int = 2,
        *,
        radius: float,
        mode: str = "uvu",
        antisymmetric: bool | str = False,
        aggr: str | Aggregation = "sum",
        num_basis: int = 8,
        hidden_channels: int = 64,
        edge_dim: int = 0,
        softening: float = 0.02,
        method: str = "auto",
        layout: str = "e3nn",
    ) -> None:
        from e3nn.o3 import Irreps

        if isinstance(aggr, str):
            if aggr not in _AGGREGATIONS:
                raise ValueError(
                    f"aggr is {aggr!r}, but must be 'sum', 'mean' or an aggregation that commutes with rotations: "
                    "one that looks at each component alone does not"
                )
            aggr = _AGGREGATIONS[aggr]()
        super().__init__(aggr=aggr, node_dim=0)
        if mode not in ("uvu", "uvw"):
            raise ValueError(f"mode is {mode!r}, but must be one of 'uvu', 'uvw'")
        for name, value, least in (
            ("lmax", lmax, 0),
            ("num_basis", num_basis, 1),
            ("hidden_channels", hidden_channels, 1),
            ("edge_dim", edge_dim, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        for name, length in (("radius", radius), ("softening", softening)):
            if not 0 < length < math.inf:
                raise ValueError(f"{name} is {length!r}, but must be positive")
        self.lmax, self.radius, self.mode, self.layout = lmax, float(radius), mode, layout
        self.antisymmetric, self.edge_dim, self.softening = antisymmetric, edge_dim, softening
        self._in = parse_signals(irreps_in, "irreps_in")
        wanted = irreps_out
        if irreps_out is not None and mode == "uvw":  # the product keeps the channels, the mixing makes those wanted
            parse_signals(irreps_out, "irreps_out")
            wanted = Irreps([(self._in.mul, ir) for _, ir in Irreps(irreps_out)])
        self.tp = GauntTensorProduct(
            irreps_in,
            Irreps([(1, (l, (-1) ** l)) for l in range(lmax + 1)]),
            wanted,
            None if wanted is not None else max(lmax, *(self._in.lmax(parity) for parity in (1, -1))),
            mode="uvu",
            antisymmetric=antisymmetric,
            method=method,
            layout=layout,
        )
        self.irreps_in = self.tp.irreps_in1
        self.irreps_out = self.tp.irreps_out if irreps_out is None else Irreps(irreps_out)
        self._out = parse_signals(self.irreps_out, "irreps_out")
        channels = self._in.mul
        self.weight_numel = self.tp.num_terms * (lmax + 1) * channels
        self.lin1 = nn.Linear(num_basis + edge_dim, hidden_channels)
        self.lin2 = nn.Linear(hidden_channels, self.weight_numel)
        self.register_buffer("_order", torch.arange(num_basis) + 0.5, persistent=False)  # exact in every dtype
        degrees = sum(self._out.lmax(parity) + 1 for parity in (1, -1))
        self.weight: nn.Parameter | None
        shape = (degrees, channels, self._out.mul)
        self.register_parameter("weight", nn.Parameter(torch.empty(shape)) if mode == "uvw" else None)
        self._columns = str(self.irreps_in.dim) if layout == "e3nn" else f"{self._in.rows()}, {channels}"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, such that radial weights and channels have unit variance."""
        super().reset_parameters()
        for linear in (self.lin1, self.lin2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if self.weight is not None:
            nn.init.normal_(self.weight)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        edge_shift: Tensor | None = None,
    ) -> Tensor:
        """Runs the convolution.

        Args:
            x: Features.
            pos: Positions.
            edge_index: Senders and receivers.
            edge_attr: Invariant features of the edges, where `edge_dim` is not 0.
            edge_shift: Shift of each edge's sender to the periodic image that is meant. (default: zero)
        """
        self._check(x, pos, edge_index, edge_attr, edge_shift)
        num_nodes = x.size(0)
        signals = split_signals("x", x, self._in, self.layout)
        # Gathered by our op and not by PyG: its gradient is summed in a fixed order.
        source, target = (SegmentPlan(index, num_nodes) for index in edge_index)
        present = [signal for signal in (signals[1], signals[-1]) if signal.size(-2)]
        sent = gather_coo(present[0] if len(present) == 1 else torch.cat(present, -2), source)
        r = gather_coo(pos, source) - gather_coo(pos, target)
        harmonics, weight = self._filter(r if edge_shift is None else r + edge_shift, edge_attr)
        size = (num_nodes, num_nodes)
        out: Tensor = self.propagate(edge_index, size=size, sent=sent, harmonics=harmonics, weight=weight)
        if self.weight is not None:
            true = self._out.lmax(1) + 1
            parts = (out[:, : true**2], self.weight[:true]), (out[:, true**2 :], self.weight[true:])
            out = torch.cat([mixed(part, w.to(part) * w.size(1) ** -0.5) for part, w in parts if len(w)], -2)
        out = out.to(x.dtype)
        return out if self.layout == "dense" else flat(out, self._out)

    def message(self, sent: Tensor, harmonics: Tensor, weight: Tensor) -> Tensor:
        """The products of the senders' functions with the filters of the edges, in dense rows."""
        return self.tp.multiply(both_signals(sent, self._in), {1: harmonics}, weight)

    def _filter(self, r: Tensor, edge_attr: Tensor | None) -> tuple[Tensor, Tensor]:
        """Harmonics [E, (lmax+1)^2, 1] and radial weights [E, terms, lmax+1, C] of edge vectors."""
        d = ((r * r).sum(-1, keepdim=True) + (self.softening * self.radius) ** 2).sqrt()
        radial = math.sqrt(2) * torch.cos(d * (self.get_buffer("_order").to(d) * (math.pi / self.radius)))
        features = radial if edge_attr is None else torch.cat((radial, edge_attr.to(radial)), -1)
        hidden = _SILU * F.silu(self.lin1(features.to(self.lin1.weight)))
        weight = self.lin2(hidden) * radial_window(d, self.radius)
        shape = (r.size(0), self.tp.num_terms, self.lmax + 1, self._in.mul)
        return solid_harmonics(r / d, self.lmax).unsqueeze(-1), weight.view(shape)

    def _check(
        self, x: Tensor, pos: Tensor, edge_index: Tensor, edge_attr: Tensor | None, edge_shift: Tensor | None
    ) -> None:
        if x.dim() != (2 if self.layout == "e3nn" else 3):
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self._columns})")
        if pos.shape != (x.size(0), 3):
            raise ValueError(f"pos has shape {tuple(pos.shape)}, but must be ({x.size(0)}, 3)")
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
            raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")
        num_edges = edge_index.size(1)
        if edge_shift is not None and edge_shift.shape != (num_edges, 3):
            raise ValueError(f"edge_shift has shape {tuple(edge_shift.shape)}, but must be ({num_edges}, 3)")
        if edge_attr is None:
            if self.edge_dim:
                raise ValueError(f"edge_attr is None, but edge_dim is {self.edge_dim}")
        elif edge_attr.shape != (num_edges, self.edge_dim):
            raise ValueError(
                f"edge_attr has shape {tuple(edge_attr.shape)}, but must be ({num_edges}, {self.edge_dim})"
            )

    def extra_repr(self) -> str:
        """Sizes and options."""
        options = f"mode={self.mode!r}, antisymmetric={self.antisymmetric!r}"
        return f"{self.irreps_in} -> {self.irreps_out}, lmax={self.lmax}, radius={self.radius}, {options}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
