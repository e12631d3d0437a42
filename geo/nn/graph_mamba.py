"""Graph Mamba networks: tokens of each node read by Mamba, then all nodes of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.conv import GINEConv
from torch_geometric.nn.inits import reset

from geo.nn.activations import activation
from geo.nn.gated_gcn_conv import GatedGCNConv
from geo.nn.gps_conv import GPSGlobalConv
from geo.nn.mamba import BiMamba
from geo.nn.node_order import NodeOrder
from geo.nn.token_encoder import MPNNTokenEncoder, RWFTokenEncoder, takes_edge_attr
from geo.ops import SegmentPlan, bounds


class GraphMamba(nn.Module):
    r"""Graph Mamba network: Mamba over tokens of each node's neighbourhood, then over all nodes of its graph.

    Algorithm 1 of "Graph Mamba: Towards Learning on Graphs with State Space Models" (https://arxiv.org/abs/2402.08678).
    With tokens (``walk_length`` of at least 1) the neighbourhood of each node v is a sequence of subgraphs, longest
    walks first and the node itself last, made by :class:`geo.transforms.AddWalkTokens`. An encoder :math:`\phi` makes
    them vectors, `num_layers` of :class:`BiMamba` read them, and the last one is the node's; then all nodes of a graph
    are one sequence, ordered by importance:

    .. math::
        y_v = \mathrm{BiMamba}^{L}(\phi(T_m(v)), \dots, \phi(T_1(v)), \phi(\{v\}))_\text{last}, \quad
        Y' = \mathrm{BiMamba}(Y_\text{ordered}) + \Psi(G, X \| P)

    Without tokens (``walk_length=0``) the local sequences have one row, and the model is `num_layers` of
    :class:`GPSGlobalConv` with message passing and a BiMamba over the ordered nodes, summed in every layer.

    The paper leaves most choices open and has no public code; the defaults are ours: Mamba's sizes with a residual
    around each BiMamba, layer instead of batch normalisation (which would let graphs see their batch), one token for
    the node itself, :math:`\Psi` of `num_mpnn_layers`. The nodes are put in order once in a call, for all layers. Ties
    of the order are broken at random, anew in every training step; in evaluation the outputs of `num_samples` orders
    are averaged, or choose ``tie='wl'``.

    Args:
        in_channels: Size of the node features.
        hidden_channels: Size of everything inside.
        num_layers: Local BiMamba layers, or GPS layers without tokens.
        out_channels: Size of the output, through a head of two linear maps; None leaves the head out.
        walk_length: Longest walk m of the tokens; 0: no tokens.
        num_node_layers: BiMamba layers over all nodes, with tokens; default 1.
        num_mpnn_layers: Layers of :math:`\Psi`, with tokens; default `num_layers`.
        token_encoder: ``'mpnn'``, ``'rwf'`` or a module called as ``encoder(x, edge_attr, tokens)`` that returns
            [N, L, hidden_channels]; default ``'mpnn'`` with `mpnn` and ``'rwf'`` without.
        mpnn: Message passing: ``'gatedgcn'``, ``'gine'`` (with edge features), None, or a function of the channels that
            makes a layer called as ``conv(x, edge_index, edge_attr=...)``, or without the last where there are none.
        order: Key of :class:`NodeOrder`: ``'degree'``, ``'pagerank'``, ``'kcore'``, ``'index'`` or a function.
        tie: ``'random'``, ``'wl'`` or ``'index'``.
        num_samples: Random orders averaged in evaluation.
        edge_dim: Size of the edge features, or None.
        pe_dim: Size of the positional encoding given in the call, or None.
        dropout: Probability in training.
        act: Activation of the head and of GPS layers.
        norm: Normalisation of GPS layers.
        **kwargs: Of :class:`BiMamba`: bidirectional, combine, share_A, d_state, d_conv, expand, ...

    Shapes:
        x :math:`(|V|, F)`, edge_index :math:`(2, |E|)`, edge_attr :math:`(|E|, \text{edge\_dim})`, pe
        :math:`(|V|, \text{pe\_dim})`, batch :math:`(|V|)` sorted; tokens: the data with what
        :class:`geo.transforms.AddWalkTokens` stores; output :math:`(|V|, \text{out\_channels})`.

    Symmetry and derivatives:
        Permuting the nodes together with their sampled tokens and the order permutes the output; over samples and ties
        it is equivariant in distribution. A graph's output does not depend on its batch (with random ties: for the same
        `seed`). Differentiable twice. ``tie='wl'`` sees node features and encodings, not edge features.

    Raises:
        ValueError: Unknown names, sizes that are not positive, inputs that are missing, unexpected or do not fit
            together, or an unsorted batch.

    Example:
        >>> model = GraphMamba(8, 16, num_layers=2, out_channels=3, tie="wl")
        >>> edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> model(torch.randn(4, 8), edge_index).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        *,
        walk_length: int = 0,
        num_node_layers: int | None = None,
        num_mpnn_layers: int | None = None,
        token_encoder: str | nn.Module | None = None,
        mpnn: str | Callable[[int], nn.Module] | None = "gatedgcn",
        order: str | Callable[..., Tensor] = "degree",
        tie: str = "random",
        num_samples: int = 5,
        edge_dim: int | None = None,
        pe_dim: int | None = None,
        dropout: float = 0.0,
        act: str = "relu",
        norm: str | None = "layer_norm",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not walk_length:
            for name, given in (
                ("token_encoder", token_encoder),
                ("num_node_layers", num_node_layers),
                ("num_mpnn_layers", num_mpnn_layers),
            ):
                if given is not None:
                    raise ValueError(f"{name} is {given!r}, but a model without tokens (walk_length=0) has none")
        num_node_layers = 1 if num_node_layers is None else num_node_layers
        num_mpnn_layers = num_layers if num_mpnn_layers is None else num_mpnn_layers
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("hidden_channels", hidden_channels, 1),
            ("num_layers", num_layers, 1),
            ("out_channels", 1 if out_channels is None else out_channels, 1),
            ("walk_length", walk_length, 0),
            ("num_node_layers", num_node_layers, 1),
            ("num_mpnn_layers", num_mpnn_layers, 1),
            ("num_samples", num_samples, 1),
            ("edge_dim", edge_dim or 0, 0),
            ("pe_dim", pe_dim or 0, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        if isinstance(mpnn, str) and mpnn not in ("gatedgcn", "gine"):
            raise ValueError(f"mpnn is {mpnn!r}, but must be 'gatedgcn', 'gine', None or a function that makes a layer")
        if mpnn == "gine" and not edge_dim:
            raise ValueError("mpnn='gine' needs edge features: give edge_dim")
        if isinstance(token_encoder, str) and token_encoder not in ("mpnn", "rwf"):
            raise ValueError(f"token_encoder is {token_encoder!r}, but must be 'mpnn', 'rwf' or a module")
        if edge_dim and mpnn is None and not walk_length:
            raise ValueError(f"edge_dim is {edge_dim}, but without message passing and tokens nobody reads edges")
        if token_encoder == "mpnn" and mpnn is None:
            raise ValueError("token_encoder='mpnn' needs message passing, but mpnn is None")
        self.in_channels, self.hidden_channels, self.out_channels = in_channels, hidden_channels, out_channels
        self.num_layers, self.walk_length, self.num_samples = num_layers, walk_length, num_samples
        self.edge_dim, self.pe_dim = edge_dim or 0, pe_dim or 0
        self._act = activation(act)
        self.encoder = nn.Linear(in_channels + self.pe_dim, hidden_channels)
        self.edge_encoder = nn.Linear(self.edge_dim, hidden_channels) if self.edge_dim else None
        self.order = NodeOrder(order, tie=tie)

        def conv(layer: int, num: int, dropout: float = 0.0, residual: bool = True) -> nn.Module:
            assert mpnn is not None
            edges = layer > 0 or self.edge_dim > 0
            return _conv(mpnn, hidden_channels, dropout, residual, edges, bool(self.edge_dim), layer == num - 1)

        if walk_length:
            if token_encoder is None:
                token_encoder = "rwf" if mpnn is None else "mpnn"
            if token_encoder == "mpnn":
                token_encoder = MPNNTokenEncoder(conv(0, 1), hidden_channels)
            elif token_encoder == "rwf":
                width = hidden_channels if self.edge_dim else None
                token_encoder = RWFTokenEncoder(hidden_channels, hidden_channels, edge_dim=width)
            self.token_encoder: nn.Module | None = cast(nn.Module, token_encoder)
            self.layers = nn.ModuleList(BiMamba(hidden_channels, dropout=dropout, **kwargs) for _ in range(num_layers))
            self.node_layers = nn.ModuleList(
                BiMamba(hidden_channels, dropout=dropout, **kwargs) for _ in range(num_node_layers)
            )
            self.mpnn = nn.ModuleList(
                _Residual(conv(layer, num_mpnn_layers, dropout), hidden_channels, act, dropout)
                for layer in range(0 if mpnn is None else num_mpnn_layers)
            )
        else:
            self.token_encoder = None
            self.layers = nn.ModuleList(
                GPSGlobalConv(
                    hidden_channels,
                    None if mpnn is None else conv(layer, num_layers, residual=False),
                    _Sequence(BiMamba(hidden_channels, residual=False, **kwargs)),
                    dropout=dropout,
                    act=act,
                    norm=norm,
                    norm_kwargs={"mode": "node"} if norm == "layer_norm" else None,
                )
                for layer in range(num_layers)
            )
            self.node_layers, self.mpnn = nn.ModuleList(), nn.ModuleList()
        self.head: nn.Sequential | None = None
        if out_channels is not None:
            self.head = nn.Sequential(
                nn.LayerNorm(hidden_channels),
                nn.Linear(hidden_channels, hidden_channels),
                _Activation(act),
                nn.Dropout(dropout),
                nn.Linear(hidden_channels, out_channels),
            )

    @classmethod
    def gmn(cls, in_channels: int, hidden_channels: int, num_layers: int, *args: Any, **kwargs: Any) -> GraphMamba:
        """The paper's GMN: tokens, message passing in the tokens and beside the last layer, and a positional encoding.

        Give `pe_dim` and `walk_length` (2 unless given); all else as in the class.
        """
        if not kwargs.get("pe_dim"):
            raise ValueError("pe_dim is missing: GMN reads a positional encoding; GraphMamba.gmn_minus does not")
        if kwargs.get("mpnn", "gatedgcn") is None:
            raise ValueError("mpnn is None, but GMN passes messages; GraphMamba.gmn_minus does not")
        return cls(in_channels, hidden_channels, num_layers, *args, **_with_tokens(kwargs))

    @classmethod
    def gmn_minus(
        cls, in_channels: int, hidden_channels: int, num_layers: int, *args: Any, **kwargs: Any
    ) -> GraphMamba:
        """The paper's GMN-: tokens read as walks, no message passing and no positional encoding."""
        for name in ("mpnn", "pe_dim"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is {kwargs[name]!r}, but GMN- has none")
        kwargs.pop("mpnn", None)
        return cls(in_channels, hidden_channels, num_layers, *args, mpnn=None, **_with_tokens(kwargs))

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        reset(self.encoder)
        reset(self.edge_encoder)
        for module in (self.token_encoder, self.layers, self.node_layers, self.mpnn, self.head):
            reset(module)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        pe: Tensor | None = None,
        batch: Tensor | None = None,
        tokens: Any = None,
        score: Tensor | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Runs the model.

        Args:
            x: Node features.
            edge_index: Senders and receivers.
            edge_attr: Edge features; must be given just where `edge_dim` is.
            pe: Positional encoding; must be given just where `pe_dim` is.
            batch: The graph of each node, sorted; None: one graph.
            tokens: What :class:`geo.transforms.AddWalkTokens` returned, batched with the rest.
            score: Importance of each node, in place of the key of the order; computed once, it saves PageRank, say, in
                each call.
            batch_size: Number of graphs; needed by torch.compile where `batch` is given, which else counts them.
            seed: Of the random ties; None: drawn anew from torch's generator, in evaluation too.

        Returns:
            out: [N, out_channels], or [N, hidden_channels] without head.
        """
        self._check(x, edge_index, edge_attr, pe, tokens)
        if edge_attr is not None and self.edge_encoder is not None:
            edge_attr = self.edge_encoder(edge_attr)
        tied = self.order.tie == "random" and (score is not None or self.order.key != "index")
        samples = self.num_samples if tied and not self.training else 1
        features = x if pe is None else torch.cat([x, pe.to(x.dtype)], dim=-1)
        perm, ptr = self.order(
            edge_index,
            batch,
            x.size(0),
            x=features,
            score=score,
            batch_size=batch_size,
            num_samples=samples,
            seed=seed,
        )
        orders = perm.view(samples, -1)
        h = self.encoder(features)
        if self.token_encoder is None:
            outs = [self._layers_in_order(h, edge_index, edge_attr, batch, perm, ptr) for perm in orders]
        else:
            local = self._nodes_from_tokens(h, edge_attr, tokens)
            psi = self._psi(h, edge_index, edge_attr)
            outs = [self._scan_in_order(local, perm, ptr) + psi for perm in orders]
        outs = outs if self.head is None else [self.head(out) for out in outs]
        return outs[0] if samples == 1 else torch.stack(outs).mean(dim=0)

    def _nodes_from_tokens(self, h: Tensor, edge_attr: Tensor | None, tokens: Any) -> Tensor:
        """What the local layers make of the tokens of each node: the last row of its sequence."""
        assert self.token_encoder is not None
        rows = self.token_encoder(h, edge_attr, tokens)
        num_nodes, length, channels = rows.shape
        rows = rows.reshape(-1, channels)
        ptr = torch.arange(num_nodes + 1, device=h.device) * length
        for layer in self.layers:
            rows = layer(rows, ptr)
        out: Tensor = rows.view(num_nodes, length, channels)[:, -1]
        return out

    def _scan_in_order(self, h: Tensor, perm: Tensor, ptr: Tensor) -> Tensor:
        """The layers over all nodes, with tokens."""
        h = h[perm]
        for layer in self.node_layers:
            h = layer(h, ptr)
        return h[_inverse(perm)]

    def _psi(self, h: Tensor, edge_index: Tensor, edge_attr: Tensor | None) -> Tensor:
        """Message passing beside the layers over all nodes; 0 without."""
        if not self.mpnn:
            return h.new_zeros(())
        plan = SegmentPlan.from_edge_index(edge_index, h.size(0))
        for layer in self.mpnn:
            h, edge_attr = layer(h, edge_index, edge_attr, plan)
        return h

    def _layers_in_order(
        self,
        h: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None,
        batch: Tensor | None,
        perm: Tensor,
        ptr: Tensor,
    ) -> Tensor:
        """The GPS layers, on the graph with its nodes put in order: so each need not do it."""
        place = _inverse(perm)
        h, edge_index = h[perm], place[edge_index]
        plan = SegmentPlan.from_edge_index(edge_index, h.size(0))
        for layer in self.layers:
            out = layer(
                h,
                edge_index,
                batch,
                global_kwargs={"ptr": ptr},
                **_conv_arguments(cast(GPSGlobalConv, layer).conv, edge_attr, plan),
            )
            h, edge_attr = out if isinstance(out, tuple) else (out, edge_attr)
        return h[place]

    def _check(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None, pe: Tensor | None, tokens: Any) -> None:
        if x.dim() != 2 or x.size(1) != self.in_channels:
            raise ValueError(f"x: expected [N, {self.in_channels}], got shape {list(x.shape)}")
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index: expected [2, E], got shape {list(edge_index.shape)}")
        for name, value, rows, size in (
            ("edge_attr", edge_attr, edge_index.size(1), self.edge_dim),
            ("pe", pe, x.size(0), self.pe_dim),
        ):
            dim = "edge_dim" if name == "edge_attr" else "pe_dim"
            if value is None and size:
                raise ValueError(f"{name} is missing, but the model was built with {dim}={size}")
            if value is not None and not size:
                raise ValueError(f"{name} is given, but the model was built without {dim}")
            if value is not None and tuple(value.shape) != (rows, size):
                raise ValueError(f"{name}: expected [{rows}, {size}], got shape {list(value.shape)}")
        if (tokens is None) != (self.walk_length == 0):
            raise ValueError(
                f"tokens is {'missing' if tokens is None else 'given'}, but the model was built with "
                f"walk_length={self.walk_length}"
            )
        setting = None if tokens is None else getattr(tokens, "token_setting", None)
        if setting is None or torch.compiler.is_compiling() or not bounds.reads_values(setting):
            return
        for walk_length, _, _, num_root_tokens, induced in setting.unique(dim=0).tolist():
            if walk_length != self.walk_length:
                raise ValueError(
                    f"tokens were made with walk_length={walk_length}, but the model is for {self.walk_length}"
                )
            if not num_root_tokens:
                raise ValueError("tokens were made with num_root_tokens=0, but the last token must be the node itself")
            if not induced and isinstance(self.token_encoder, MPNNTokenEncoder):
                raise ValueError("tokens were made with induced=False, but message passing in them needs their edges")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.in_channels}, {self.hidden_channels}, num_layers={self.num_layers}, "
            f"out_channels={self.out_channels}, walk_length={self.walk_length}, order={self.order.key!r})"
        )


class _Sequence(nn.Module):
    """A BiMamba as the global module of a layer whose nodes stand in order."""

    def __init__(self, mamba: BiMamba) -> None:
        super().__init__()
        self.mamba = mamba

    def reset_parameters(self) -> None:
        self.mamba.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None, ptr: Tensor) -> Tensor:
        out: Tensor = self.mamba(x, ptr)
        return out


class _Residual(nn.Module):
    """A message-passing layer with what it lacks of normalisation, activation, dropout and residual."""

    def __init__(self, conv: nn.Module, channels: int, act: str, dropout: float) -> None:
        super().__init__()
        self.conv, self.dropout, self._act = conv, dropout, activation(act)
        self.norm = None if isinstance(conv, GatedGCNConv) else nn.LayerNorm(channels)

    def reset_parameters(self) -> None:
        reset(self.conv)
        reset(self.norm)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_attr: Tensor | None, plan: SegmentPlan
    ) -> tuple[Tensor, Tensor | None]:
        rows = x if self.norm is None else self.norm(x)
        out = self.conv(rows, edge_index, **_conv_arguments(self.conv, edge_attr, plan))
        out, edge_attr = out if isinstance(out, tuple) else (out, edge_attr)
        if self.norm is None:
            return out, edge_attr
        return x + F.dropout(self._act(out), self.dropout, self.training), edge_attr


class _Activation(nn.Module):
    def __init__(self, act: str) -> None:
        super().__init__()
        self._act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self._act(x)


def _conv(
    mpnn: str | Callable[[int], nn.Module],
    channels: int,
    dropout: float,
    residual: bool,
    edges: bool,
    features: bool,
    last: bool,
) -> nn.Module:
    """A layer; `edges`: it is given edge states, `features`: the model has some, `last`: nobody reads its own."""
    if mpnn == "gatedgcn":
        edge_dim = channels if edges else 0
        return GatedGCNConv(channels, edge_dim=edge_dim, residual=residual, dropout=dropout, update_edges=not last)
    if mpnn == "gine":
        mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, channels))
        gine: nn.Module = GINEConv(mlp, train_eps=True)
        return gine
    made = cast(Callable[[int], nn.Module], mpnn)(channels)
    if features and not takes_edge_attr(made):
        raise ValueError(f"mpnn makes {type(made).__name__}, which takes no edge_attr, but edge_dim is given")
    return made


def _conv_arguments(conv: nn.Module | None, edge_attr: Tensor | None, plan: SegmentPlan) -> dict[str, Any]:
    given: dict[str, Any] = {} if edge_attr is None or conv is None else {"edge_attr": edge_attr}
    if isinstance(conv, GatedGCNConv):
        given["plan"] = plan
    return given


def _with_tokens(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("walk_length", 2) == 0:
        raise ValueError("walk_length is 0, but GMN and GMN- read tokens; without, it is GraphMamba(...)")
    return {"walk_length": 2, **kwargs}


def _inverse(perm: Tensor) -> Tensor:
    place = torch.empty_like(perm)
    place[perm] = torch.arange(perm.numel(), device=perm.device)
    return place
