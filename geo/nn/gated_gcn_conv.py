"""Gated graph convolution with a state on each edge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.activations import activation
from geo.nn.mlp import make_norm
from geo.ops import SegmentPlan, gather_coo, gather_mul_segment_sum, segment_reduce


class GatedGCNConv(nn.Module):
    r"""Gated graph convolution that carries a state along each edge.

    The layer of "Residual Gated Graph ConvNets" (https://arxiv.org/abs/1711.07553) in the form of "Benchmarking Graph
    Neural Networks" (https://arxiv.org/abs/2003.00982), the MPNN of Graph Mamba (https://arxiv.org/abs/2402.08678):

    .. math::
        \hat e_{ij} &= D x_i + E x_j + C e_{ij}, \qquad \eta_{ij} = \sigma(\hat e_{ij}) \\
        x'_i &= x_i + \mathrm{act}\Big(\mathrm{norm}\Big(A x_i +
            \frac{\sum_{j \in N(i)} \eta_{ij} \odot B x_j}{\sum_{j \in N(i)} \eta_{ij} + \epsilon}\Big)\Big) \\
        e'_{ij} &= e_{ij} + \mathrm{act}(\mathrm{norm}(\hat e_{ij}))

    for each edge from j to i, :math:`A` to :math:`E` linear maps with bias. PyG has this layer only without edge
    states (``ResGatedGraphConv``), where the gates of one layer cannot build on those of the one before.

    What differs from the papers: layer norm by default, since batch norm makes a graph's output depend on the graphs
    beside it; and edges without a state start at zero, which the bias of :math:`C` makes a learned constant.

    Args:
        in_channels: Width of the nodes.
        out_channels: Width of the output, of nodes and edges alike. (default: `in_channels`)
        edge_dim: Width of the incoming edge states; ``0``: there are none. (default: `out_channels`)
        norm: ``'layer_norm'``, ``'batch_norm'`` or ``None``. (default: ``'layer_norm'``)
        act: ``'relu'``, ``'gelu'``, ``'silu'`` or ``'tanh'``. (default: ``'relu'``)
        dropout: Probability with which an entry of both updates is dropped. (default: ``0.0``)
        residual: Adds x to the output where the widths agree. The edge states have their residual in any case, where
            the widths agree. (default: ``True``)
        update_edges: Computes new edge states; ``False`` in a last layer, whose edge states nobody reads, saves the
            time and returns those given. (default: ``True``)
        eps: Added to the sum of the gates. (default: ``1e-6``)

    Shapes:
        x :math:`(|V|, F)`, edge_index :math:`(2, |E|)` in any order, edge_attr :math:`(|E|, F_e)`; output
        :math:`(|V|, F')` and :math:`(|E|, F')`.

    Symmetry and derivatives:
        Equivariant to permutations of nodes and edges; differentiable any number of times, but for ``'relu'`` at 0.
        Sums run in a fixed order. A graph's output does not depend on its batch, but with ``'batch_norm'``.

    Raises:
        ValueError: An unknown option, or inputs that do not fit together.
        IndexError: An edge to a node that is not there.

    Example:
        >>> conv = GatedGCNConv(16)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> x, edge_attr = conv(torch.randn(3, 16), edge_index)  # edge states start at zero
        >>> x, edge_attr = conv(x, edge_index, edge_attr)
        >>> x.shape, edge_attr.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        edge_dim: int | None = None,
        *,
        norm: str | None = "layer_norm",
        act: str = "relu",
        dropout: float = 0.0,
        residual: bool = True,
        update_edges: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        edge_dim = out_channels if edge_dim is None else edge_dim
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("out_channels", out_channels, 1),
            ("edge_dim", edge_dim, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout!r}, but must be between 0 and 1")
        if not eps > 0:
            raise ValueError(f"eps is {eps!r}, but must be positive")
        self.in_channels, self.out_channels, self.edge_dim = in_channels, out_channels, edge_dim
        self.norm, self.act, self.dropout, self.eps = norm, act, float(dropout), float(eps)
        self.residual, self.update_edges = bool(residual), bool(update_edges)
        self.lin_node = nn.Linear(in_channels, 4 * out_channels)  # A, B, D, E; the bias of C is that of D
        self.lin_edge = nn.Linear(edge_dim, out_channels, bias=False) if edge_dim else None
        self.norm_node = make_norm(norm, out_channels)
        self.norm_edge = make_norm(norm, out_channels) if update_edges else None
        self._act = activation(act)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for module in self.children():
            if not isinstance(module, nn.Identity):
                module.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        *,
        plan: SegmentPlan | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the convolution and returns the new states of nodes and edges.

        Args:
            x: States of the nodes.
            edge_index: Senders and receivers.
            edge_attr: States of the edges. (default: zero)
            plan: The :class:`geo.ops.SegmentPlan` of `edge_index`, to share between layers. (default: made here)
        """
        self._check(x, edge_index, edge_attr, plan)
        if plan is None:
            plan = SegmentPlan.from_edge_index(edge_index, x.size(0))
        own, sent, at_target, at_source = self.lin_node(x).chunk(4, -1)
        e = gather_coo(at_target, plan)  # of the size of the edges: added to in place
        e += gather_coo(at_source, edge_index[0])
        if self.lin_edge is not None and edge_attr is not None:
            e += self.lin_edge(edge_attr)
        gate = e.sigmoid()
        h = own + gather_mul_segment_sum(sent, gate, plan=plan) / (segment_reduce(gate, plan) + self.eps)
        h = self._update(h, self.norm_node)
        if self.residual and self.in_channels == self.out_channels:
            h = x + h
        if self.norm_edge is None:
            return h, edge_attr
        e = self._update(e, self.norm_edge)
        if edge_attr is not None and self.edge_dim == self.out_channels:
            e = edge_attr + e
        return h, e

    def _update(self, h: Tensor, norm: nn.Module) -> Tensor:
        return F.dropout(self._act(norm(h)), self.dropout, self.training)

    def _check(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None, plan: SegmentPlan | None) -> None:
        if x.dim() != 2 or x.size(1) != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self.in_channels})")
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
            raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")
        num_edges = edge_index.size(1)
        if edge_attr is not None:
            if not self.edge_dim:
                raise ValueError("edge_attr is given, but edge_dim is 0: it would not be read")
            if edge_attr.shape != (num_edges, self.edge_dim):
                wanted = (num_edges, self.edge_dim)
                raise ValueError(f"edge_attr has shape {tuple(edge_attr.shape)}, but must be {wanted}")
        if plan is not None and (plan.src_index is None or plan.index.size(0) != num_edges):
            raise ValueError(f"plan is {plan}, but must be that of the {num_edges} edges, with their senders")
        if plan is not None and (plan.dim_size != x.size(0) or plan.src_size != x.size(0)):
            raise ValueError(f"plan is of {plan.dim_size} nodes, but x has {x.size(0)}")

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.out_channels}, edge_dim={self.edge_dim}, norm={self.norm!r}, act={self.act!r}, "
            f"dropout={self.dropout}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
