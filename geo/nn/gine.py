"""GINE, the message-passing network under the positional encodings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.conv import GINEConv

from geo.nn.mlp import MLP
from geo.ops import scatter


class GINE(nn.Module):
    r"""Graph isomorphism network with edge features, residuals and a positional encoding added once at the input.

    The base network of "On the Stability of Expressive Positional Encodings for Graphs"
    (https://arxiv.org/abs/2310.02579), with the convolutions of https://arxiv.org/abs/1905.12265:

    .. math::
        x^0_i = \mathrm{emb}(x_i) + W \, \mathrm{PE}_i, \qquad
        x^l_i = x^{l-1}_i + \mathrm{MLP}^l\Big((1 + \epsilon^l) \, x^{l-1}_i
        + \sum_{(j, i) \in E} \mathrm{relu}\big(x^{l-1}_j + \mathrm{emb}^l(e_{ji})\big)\Big)

    then the mean or sum over the nodes of each graph, and a last MLP. Every MLP is linear maps with normalisation and
    activation between them.

    What differs from the paper: layer instead of batch normalisation, with which a graph's output would depend on its
    batch (``norm='batch_norm'`` has as many parameters and is the paper's), and :math:`\epsilon` starts at 0.
    ``GINE(None, 200, 4, 1, node_types=28, edge_types=4)`` has the 575,805 parameters of its ZINC model without
    encoding; with one it is 128 wide.

    Args:
        in_channels: Size of the node features, or None with `node_types`.
        hidden_channels: Size of everything inside.
        num_layers: Convolutions.
        out_channels: Size of the output; None leaves the last MLP out.
        node_types: Where ``x`` holds the types of the nodes, how many there are.
        edge_dim: Size of the edge features, or None.
        edge_types: Where ``edge_attr`` holds the types of the edges, how many there are.
        pe: Module that makes the encoding from the spectrum: called as ``pe(eigvals, eigvecs, edge_index, batch=...,
            eig_mask=...)`` and with an attribute ``out_channels``, such as :class:`SPE`.
        pe_dim: Size of an encoding that is given in the call instead.
        pool: ``'mean'`` or ``'sum'`` over the nodes of a graph; None: an output for each node.
        mlp_layers: Linear maps in each MLP.
        norm: Normalisation in the MLPs: ``'layer_norm'``, ``'batch_norm'`` or None.
        residual: Add the input of a convolution to its output.
        dropout: Probability in training, after each activation of the MLPs.
        act: Activation of the MLPs.

    Shapes:
        x :math:`(|V|, F)`, or :math:`(|V|)` or :math:`(|V|, 1)` int64 types; edge_index :math:`(2, |E|)`; edge_attr
        :math:`(|E|, \text{edge\_dim})`, or :math:`(|E|)` or :math:`(|E|, 1)` int64 types; batch :math:`(|V|)`; spectrum
        eigvals :math:`(B, K)`, eigvecs :math:`(|V|, K)`, eig_mask :math:`(B, K)`; pe :math:`(|V|, \text{pe\_dim})`;
        output :math:`(B, \text{out\_channels})`, without pooling :math:`(|V|, \text{out\_channels})`.

    Symmetry and derivatives:
        Invariant (without pooling equivariant) to permutations of nodes and edges where the encoding is equivariant;
        differentiable any number of times, but for ``'relu'`` at 0. A graph's output does not depend on its batch, but
        with ``'batch_norm'`` in training.

    Raises:
        ValueError: Sizes that are not positive, an unknown option, or inputs that are missing, unexpected or do not fit
            together.

    Example:
        >>> import torch
        >>> model = GINE(None, 16, 2, 1, node_types=28, edge_types=4, pe_dim=8)
        >>> x, edge_index = torch.tensor([5, 0, 3]), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> model(x, edge_index, torch.tensor([1, 1, 2, 2]), pe=torch.randn(3, 8)).shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        in_channels: int | None,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        *,
        node_types: int | None = None,
        edge_dim: int | None = None,
        edge_types: int | None = None,
        pe: nn.Module | None = None,
        pe_dim: int | None = None,
        pool: str | None = "mean",
        mlp_layers: int = 3,
        norm: str | None = "layer_norm",
        residual: bool = True,
        dropout: float = 0.0,
        act: str = "relu",
    ) -> None:
        super().__init__()
        for name, value, optional in (
            ("in_channels", in_channels, True),
            ("hidden_channels", hidden_channels, False),
            ("num_layers", num_layers, False),
            ("out_channels", out_channels, True),
            ("node_types", node_types, True),
            ("edge_dim", edge_dim, True),
            ("edge_types", edge_types, True),
            ("pe_dim", pe_dim, True),
            ("mlp_layers", mlp_layers, False),
        ):
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")
        if (in_channels is None) == (node_types is None):
            raise ValueError(f"in_channels is {in_channels}, node_types is {node_types}: give just one of them")
        if edge_dim is not None and edge_types is not None:
            raise ValueError(f"edge_dim is {edge_dim}, edge_types is {edge_types}: give at most one of them")
        if pe is not None and pe_dim is not None:
            raise ValueError(f"pe_dim is {pe_dim}, but pe is given, which knows its size: give at most one of them")
        if pool not in ("mean", "sum", None):
            raise ValueError(f"pool is {pool!r}, but must be 'mean', 'sum' or None")
        self.in_channels, self.hidden_channels, self.out_channels = in_channels, hidden_channels, out_channels
        self.num_layers, self.node_types, self.edge_dim, self.edge_types = num_layers, node_types, edge_dim, edge_types
        self.pe, self.pe_dim, self.pool, self.norm, self.residual = pe, pe_dim, pool, norm, residual
        inner: Any = (mlp_layers, norm, act, dropout)
        self.encoder = _encoder(in_channels, node_types, hidden_channels)
        size = pe_dim if pe is None else int(pe.out_channels)  # type: ignore[arg-type]
        self.pe_lin = None if size is None else nn.Linear(size, hidden_channels)
        self.convs = nn.ModuleList(
            GINEConv(MLP(hidden_channels, hidden_channels, hidden_channels, *inner), train_eps=True)
            for _ in range(num_layers)
        )
        edges = edge_dim is not None or edge_types is not None
        self.edge_encoders = nn.ModuleList(
            _encoder(edge_dim, edge_types, hidden_channels) for _ in range(num_layers if edges else 0)
        )
        self.head = None if out_channels is None else MLP(hidden_channels, hidden_channels, out_channels, *inner)

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in (self.encoder, self.pe, self.pe_lin, *self.convs, *self.edge_encoders, self.head):
            if module is not None:
                module.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        spectrum: tuple[Tensor, Tensor, Tensor | None] | None = None,
        pe: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Runs the network.

        Args:
            x: Node features or types.
            edge_index: Senders and receivers.
            edge_attr: Edge features or types; must be given just where `edge_dim` or `edge_types` is.
            batch: Graph of each node; None: one graph.
            spectrum: ``(eigvals, eigvecs, eig_mask)`` as :func:`pad_spectrum` gives them, just where the model has a
                module for the encoding.
            pe: The encoding, just where `pe_dim` is given.
            batch_size: Number of graphs, needed where the last ones are empty.

        Returns:
            out: [B, out_channels], without pooling [N, out_channels]; hidden_channels instead without output.
        """
        for name, given, wanted in (
            ("edge_attr", edge_attr is not None, len(self.edge_encoders) > 0),
            ("spectrum", spectrum is not None, self.pe is not None),
            ("pe", pe is not None, self.pe_dim is not None),
        ):
            if given != wanted:
                raise ValueError(f"{name} is {'given' if given else 'missing'}, but the model is {self}")
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index: expected [2, E], got shape {list(edge_index.shape)}")
        h = _encode(self.encoder, "x", x)
        num_nodes = h.size(0)
        if batch is not None and batch.shape != (num_nodes,):
            raise ValueError(f"batch: expected [{num_nodes}], got shape {list(batch.shape)}")
        if spectrum is not None and self.pe is not None:
            eigvals, eigvecs, eig_mask = spectrum
            pe = self.pe(eigvals, eigvecs, edge_index, batch=batch, eig_mask=eig_mask)
            batch_size = eigvals.size(0) if batch_size is None else batch_size
        if pe is not None and self.pe_lin is not None:
            if pe.shape != (num_nodes, self.pe_lin.in_features):
                raise ValueError(f"pe: expected [{num_nodes}, {self.pe_lin.in_features}], got shape {list(pe.shape)}")
            h = h + self.pe_lin(pe.to(h.dtype))
        edges = h.new_zeros(1, self.hidden_channels)  # without edge features
        for layer, conv in enumerate(self.convs):
            if edge_attr is not None:
                edges = _encode(self.edge_encoders[layer], "edge_attr", edge_attr)
                if edges.size(0) != edge_index.size(1):
                    raise ValueError(f"edge_attr has {edges.size(0)} rows, edge_index {edge_index.size(1)} edges")
            update = conv(h, edge_index, edges)
            h = h + update if self.residual else update
        if self.pool is not None:
            if batch is None:
                batch, batch_size = torch.zeros(num_nodes, dtype=torch.long, device=h.device), 1
            h = scatter(h, batch, dim=0, dim_size=batch_size, reduce=self.pool)
        return h if self.head is None else self.head(h)

    def __repr__(self) -> str:
        given = {
            "node_types": self.node_types,
            "edge_dim": self.edge_dim,
            "edge_types": self.edge_types,
            "pe": None if self.pe is None else type(self.pe).__name__,
            "pe_dim": self.pe_dim,
        }
        options = "".join(f"{name}={value}, " for name, value in given.items() if value is not None)
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, num_layers={self.num_layers}, "
            f"out_channels={self.out_channels}, {options}pool={self.pool!r}, norm={self.norm!r})"
        )


def _encoder(channels: int | None, types: int | None, hidden: int) -> nn.Linear | nn.Embedding:
    if types is not None:
        return nn.Embedding(types, hidden)
    assert channels is not None
    return nn.Linear(channels, hidden)


def _encode(encoder: nn.Module, name: str, value: Tensor) -> Tensor:
    out: Tensor
    if isinstance(encoder, nn.Linear):
        if value.dim() != 2 or value.size(1) != encoder.in_features:
            raise ValueError(f"{name}: expected [*, {encoder.in_features}], got shape {list(value.shape)}")
        out = encoder(value.to(encoder.weight.dtype))
        return out
    assert isinstance(encoder, nn.Embedding)
    if value.dim() == 2 and value.size(1) == 1:
        value = value.squeeze(1)
    if value.dim() != 1 or value.is_floating_point():
        raise ValueError(f"{name}: expected integer types [*] or [*, 1], got {value.dtype} {list(value.shape)}")
    # elsewhere torch's own check must do: reading the values would wait for the GPU
    if value.device.type == "cpu" and value.numel() and not torch.compiler.is_compiling():
        low, high = (int(extreme) for extreme in value.aminmax())
        if low < 0 or high >= encoder.num_embeddings:
            bad = low if low < 0 else high
            raise ValueError(f"{name} holds the type {bad}, but the model knows 0 to {encoder.num_embeddings - 1}")
    out = encoder(value)
    return out
