"""GatedGCN, the message-passing baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.activations import activation
from geo.nn.gated_gcn_conv import GatedGCNConv
from geo.ops import SegmentPlan


class GatedGCN(nn.Module):
    r"""Gated graph convolutions with residuals and layer normalisation, between two linear maps.

    The network of "Residual Gated Graph ConvNets" (https://arxiv.org/abs/1711.07553) as a baseline to measure others
    against: with residuals, normalisation and enough layers, plain message passing is far better than the untuned
    baselines of many papers (https://arxiv.org/abs/2302.11640):

    .. math::
        x^0 = W_\text{in} x, \quad (x^l, e^l) = \mathrm{GatedGCNConv}(x^{l-1}, e^{l-1}), \quad
        \mathrm{out} = W_2 \, \mathrm{act}(W_1 \, \mathrm{LayerNorm}(x^L))

    What differs from the paper: layer instead of batch normalisation, and edges without features, whose states start
    at zero.

    Args:
        in_channels: Size of the node features.
        hidden_channels: Size of nodes and edges inside.
        num_layers: Convolutions.
        out_channels: Size of the output; None leaves the last two linear maps and their normalisation out.
        edge_dim: Size of the edge features, or None.
        dropout: Probability in training.
        act: As of :class:`GatedGCNConv`.

    Shapes:
        x :math:`(|V|, F)`, edge_index :math:`(2, |E|)`, edge_attr :math:`(|E|, \text{edge\_dim})`; output
        :math:`(|V|, \text{out\_channels})`.

    Symmetry and derivatives:
        Equivariant to permutations of nodes and edges; differentiable any number of times, but for ``'relu'`` at 0. A
        graph's output does not depend on its batch.

    Raises:
        ValueError: Sizes that are not positive, an unknown option, or inputs that do not fit together.

    Example:
        >>> import torch
        >>> model = GatedGCN(8, 16, num_layers=3, out_channels=2)
        >>> model(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]])).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        *,
        edge_dim: int | None = None,
        dropout: float = 0.0,
        act: str = "relu",
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "hidden_channels": hidden_channels, "num_layers": num_layers}
        for name, value in {**sizes, "out_channels": 1 if out_channels is None else out_channels}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")
        self.in_channels, self.hidden_channels, self.out_channels = in_channels, hidden_channels, out_channels
        self.num_layers, self.edge_dim, self.dropout = num_layers, edge_dim or 0, dropout
        self._act = activation(act)
        self.encoder = nn.Linear(in_channels, hidden_channels)
        self.edge_encoder = nn.Linear(self.edge_dim, hidden_channels) if self.edge_dim else None
        self.convs = nn.ModuleList(
            GatedGCNConv(
                hidden_channels,
                edge_dim=hidden_channels if layer or self.edge_dim else 0,  # the first layer makes the edge states
                dropout=dropout,
                act=act,
                update_edges=layer < num_layers - 1,
            )
            for layer in range(num_layers)
        )
        last = None if out_channels is None else nn.Linear(hidden_channels, out_channels)
        self.norm = None if last is None else nn.LayerNorm(hidden_channels)
        self.lin = None if last is None else nn.Linear(hidden_channels, hidden_channels)
        self.last = last

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in (self.encoder, self.edge_encoder, *self.convs, self.norm, self.lin, self.last):
            if module is not None:
                module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        """Runs the model.

        Args:
            x: Node features.
            edge_index: Senders and receivers.
            edge_attr: Edge features; must be given just where `edge_dim` is.

        Returns:
            out: [N, out_channels], or [N, hidden_channels] without output.
        """
        if (edge_attr is None) != (self.edge_encoder is None):
            given = "missing" if edge_attr is None else "given"
            raise ValueError(f"edge_attr is {given}, but the model was built with edge_dim={self.edge_dim or None}")
        if edge_attr is not None and self.edge_encoder is not None:
            edge_attr = self.edge_encoder(edge_attr)
        x = self.encoder(x)
        plan = SegmentPlan.from_edge_index(edge_index, x.size(0))
        for conv in self.convs:
            x, edge_attr = conv(x, edge_index, edge_attr, plan=plan)
        if self.norm is None or self.lin is None or self.last is None:
            return x
        x = F.dropout(self._act(self.lin(self.norm(x))), self.dropout, self.training)
        out: Tensor = self.last(x)
        return out

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, num_layers={self.num_layers}, "
            f"out_channels={self.out_channels})"
        )
