"""Encoders of walk tokens: a vector for each small subgraph around each node."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geo.nn.gated_gcn_conv import GatedGCNConv
from geo.ops import SegmentPlan, gather_coo, segment_causal_conv1d, segment_reduce

_POOLINGS = {"mean": 1, "sum": 1, "root": 1, "mean+root": 2}


class MPNNTokenEncoder(nn.Module):
    r"""Message passing inside each token, and a vector for each token.

    The encoder of "Graph Mamba: Towards Learning on Graphs with State Space Models"
    (https://arxiv.org/abs/2402.08678): all tokens together are one graph of small components, on which any convolution
    runs, and

    .. math::
        z_T = W \Big( \frac{1}{|T|} \sum_{u \in T} h_u \,\Big\|\, h_{\text{root}(T)} \Big) + b

    What differs from the paper: it does not say how the states of a token become one vector. The mean next to the root
    is our choice, since the size of tokens grows with the degree, and a sum would too.

    Args:
        convs: One layer or several, called as ``conv(x, edge_index)``, with ``edge_attr=...`` where they take one and
            one is given. One that returns (nodes, edge states), such as :class:`GatedGCNConv`, hands both on; other
            layers have a ReLU between them. With batch norm, tokens and graphs see each other.
        channels: Width of what the last layer returns.
        out_channels: Width of the vectors. (default: `channels`)
        pooling: ``'mean+root'``, ``'mean'``, ``'root'`` or ``'sum'``. (default: ``'mean+root'``)
        level_emb: Longest walk of the tokens, for a learned vector that is added for each length; ``0``: none.
            (default: ``0``)
        num_root_tokens: Tokens at the end that hold the root alone; read with `level_emb` only. (default: ``1``)
        chunk_size: Nodes whose tokens are encoded at a time, then anew in the backward pass: less memory, more time.
            (default: all)

    Shapes:
        x :math:`(|V|, C)`, edge_attr :math:`(|E|, F_e)`, tokens: the data with what
        :class:`geo.transforms.AddWalkTokens` stores; output :math:`(|V|, L, C')`.

    Symmetry and derivatives:
        Equivariant to node permutation with the tokens given; differentiable as often as the convolutions. A token's
        vector depends on no other token, but with batch norm.

    Raises:
        ValueError: An unknown option, or tokens that are missing or do not fit.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from geo.nn import GatedGCNConv
        >>> from geo.transforms import AddWalkTokens
        >>> data = Data(x=torch.randn(3, 8), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> data = AddWalkTokens(walk_length=2, num_walks=4)(data)
        >>> MPNNTokenEncoder(GatedGCNConv(8), 8)(data.x, None, data).shape
        torch.Size([3, 3, 8])
    """

    def __init__(
        self,
        convs: nn.Module | Sequence[nn.Module],
        channels: int,
        out_channels: int | None = None,
        pooling: str = "mean+root",
        *,
        level_emb: int = 0,
        num_root_tokens: int = 1,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        _check_numbers(channels=channels, out_channels=out_channels, chunk_size=chunk_size)
        _check_numbers(0, level_emb=level_emb, num_root_tokens=num_root_tokens)
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, but must be one of {', '.join(map(repr, _POOLINGS))}")
        self.convs = nn.ModuleList([convs] if isinstance(convs, nn.Module) else convs)
        if not len(self.convs):
            raise ValueError("convs is empty, but at least one layer is needed")
        self.channels, self.out_channels, self.pooling = channels, out_channels, pooling
        self.level_emb, self.num_root_tokens, self.chunk_size = level_emb, num_root_tokens, chunk_size
        self.lin = nn.Linear(_POOLINGS[pooling] * channels, out_channels)
        self.levels = nn.Embedding(level_emb + 1, out_channels) if level_emb else None
        self._takes = [takes_edge_attr(conv) for conv in self.convs]

    def reset_parameters(self) -> None:
        """Draws the weights anew, also those of the convolutions."""
        for module in (*self.convs, self.lin, self.levels):
            if module is not None:
                module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, edge_attr: Tensor | None, tokens: Any) -> Tensor:
        """Encodes the tokens of each node.

        Args:
            x: Features of the nodes.
            edge_attr: Features of the edges, or None.
            tokens: Data or batch with the tokens.
        """
        names = ("token_node_id", "token_edge_id", "token_sub_edge_index", "token_size", "token_esize")
        node, edge, index, size, esize = _read(tokens, names)
        num_nodes = x.size(0)
        if size.size(0) % max(1, num_nodes) or (size.size(0) > 0) != (num_nodes > 0):
            raise ValueError(f"tokens are {size.size(0)}, but must be as many for each of the {num_nodes} nodes")
        length = size.size(0) // num_nodes if num_nodes else 1
        if self.chunk_size is None or num_nodes <= self.chunk_size:
            z = self._encode(x, edge_attr, node, edge, index, size)
        else:
            parts = []
            cut = torch.arange(0, num_nodes, self.chunk_size, device=size.device) * length
            rows = [int(total) for total in _ptr(size)[cut]] + [node.size(0)]
            edges = [int(total) for total in _ptr(esize)[cut]] + [edge.size(0)]
            for k, part in enumerate(size.split(self.chunk_size * length)):
                some, links = slice(rows[k], rows[k + 1]), slice(edges[k], edges[k + 1])
                args = (x, edge_attr, node[some], edge[links], index[:, links] - rows[k], part)
                parts.append(checkpoint(self._encode, *args, use_reentrant=False))
            z = torch.cat(parts)
        z = z.view(num_nodes, length, self.out_channels)
        return z if self.levels is None else z + _levels(self.levels, length, self.num_root_tokens)

    def _encode(
        self, x: Tensor, edge_attr: Tensor | None, node: Tensor, edge: Tensor, index: Tensor, size: Tensor
    ) -> Tensor:
        """Vectors of some tokens, one after the other."""
        h = gather_coo(x, node)
        e = None if edge_attr is None else gather_coo(edge_attr, edge)
        plan = SegmentPlan.from_edge_index(index, h.size(0)) if _has_gated(self.convs) else None
        plain = False
        for conv, takes in zip(self.convs, self._takes, strict=True):
            kwargs: dict[str, Any] = {"edge_attr": e} if e is not None and takes else {}
            if isinstance(conv, GatedGCNConv):
                kwargs["plan"] = plan
            out = conv(F.relu(h) if plain else h, index, **kwargs)
            plain = not isinstance(out, tuple)
            h, e = (out, e) if plain else out
        if h.dim() != 2 or h.size(1) != self.channels:
            raise ValueError(f"convs return shape {tuple(h.shape)}, but must return (..., {self.channels})")
        ptr = _ptr(size)
        pooled = []
        if self.pooling != "root":
            pooled.append(segment_reduce(h, ptr, "sum" if self.pooling == "sum" else "mean"))
        if "root" in self.pooling:
            pooled.append(gather_coo(h, ptr[:-1]))
        z: Tensor = self.lin(torch.cat(pooled, -1))
        return z

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.channels}, {self.out_channels}, pooling={self.pooling!r}, level_emb={self.level_emb}"


def takes_edge_attr(conv: nn.Module) -> bool:
    """Whether a convolution can be called with ``edge_attr=...``."""
    parameters = inspect.signature(conv.forward).parameters
    return "edge_attr" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


class RWFTokenEncoder(nn.Module):
    r"""Features of random walks, and a vector for each token from its walks.

    The walk features of CRaWl, "Walking Out of the Weisfeiler Leman Hierarchy" (https://arxiv.org/abs/2102.08786), as
    Graph Mamba (https://arxiv.org/abs/2402.08678) uses them without message passing. Position t of a walk :math:`w` has

    .. math::
        r_t = \big[\, x_{w_t} \,\|\, e_{w_{t-1} w_t} \,\|\, [w_t = w_{t-k}]_{k=1}^{s} \,\|\,
            [w_t \sim w_{t-k}]_{k=2}^{s} \,\big]

    for the window s, with zeros before the start and where no edge was taken; a token with M walks becomes

    .. math::
        z_T = W_2 \, \frac{1}{M (m + 1)} \sum_{w, t} \mathrm{ReLU}\big( \mathrm{conv}(\mathrm{ReLU}(W_1 r)) \big)_{w, t}

    with a depthwise convolution along each walk, zeros beyond its two ends. A token of the root alone is a linear map
    of its features.

    What differs from the papers: CRaWl pools walks into the nodes they visit, and Graph Mamba leaves open how walks
    become one vector; a depthwise convolution, a mean and a pointwise map are our choice.

    Args:
        in_channels: Width of the nodes.
        out_channels: Width of the vectors.
        edge_dim: Width of the edge features; None: they are not read. (default: ``None``)
        window: How far back a position looks; that of the transform. (default: ``8``)
        kernel_size: Positions under the convolution, odd. (default: ``5``)
        level_emb: Longest walk of the tokens, for a learned vector that is added for each length; ``0``: none.
            (default: ``0``)
        num_root_tokens: Tokens at the end that hold the root alone, as in the transform. (default: ``1``)
        chunk_size: Nodes whose tokens are encoded at a time, then anew in the backward pass: less memory, more time.
            (default: all)

    Shapes:
        x :math:`(|V|, F)`, edge_attr :math:`(|E|, F_e)`, tokens: the data with what
        ``geo.transforms.AddWalkTokens(..., walks=True)`` stores; output :math:`(|V|, L, F')`.

    Symmetry and derivatives:
        Equivariant to node permutation with the walks given; differentiable any number of times where no ReLU is at 0.
        A token's vector depends on no other token.

    Raises:
        ValueError: An unknown option, or walks that are missing or do not fit.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from geo.transforms import AddWalkTokens
        >>> data = Data(x=torch.randn(3, 8), edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> data = AddWalkTokens(walk_length=2, num_walks=4, walks=True)(data)
        >>> RWFTokenEncoder(8, 16)(data.x, None, data).shape
        torch.Size([3, 3, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        edge_dim: int | None = None,
        window: int = 8,
        *,
        kernel_size: int = 5,
        level_emb: int = 0,
        num_root_tokens: int = 1,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_numbers(
            in_channels=in_channels,
            out_channels=out_channels,
            edge_dim=edge_dim,
            window=window,
            kernel_size=kernel_size,
            chunk_size=chunk_size,
        )
        _check_numbers(0, level_emb=level_emb, num_root_tokens=num_root_tokens)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, but must be odd: a convolution looks as far back as ahead")
        self.in_channels, self.out_channels, self.edge_dim = in_channels, out_channels, edge_dim
        self.window, self.kernel_size, self.level_emb = window, kernel_size, level_emb
        self.num_root_tokens, self.chunk_size = num_root_tokens, chunk_size
        # W_1 in three parts: nodes and edges pass through theirs before they are repeated along walks
        self.lin_node = nn.Linear(in_channels, out_channels)
        self.lin_edge = nn.Linear(edge_dim, out_channels, bias=False) if edge_dim is not None else None
        self.lin_bits = nn.Linear(2 * window - 1, out_channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(out_channels, kernel_size))  # oldest first, as in nn.Conv1d
        self.conv_bias = nn.Parameter(torch.empty(out_channels))
        self.lin_out = nn.Linear(out_channels, out_channels)
        self.lin_root = nn.Linear(in_channels, out_channels) if num_root_tokens else None
        self.levels = nn.Embedding(level_emb + 1, out_channels) if level_emb else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]
        bound = self.kernel_size**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, x: Tensor, edge_attr: Tensor | None, tokens: Any) -> Tensor:
        """Encodes the tokens of each node.

        Args:
            x: Features of the nodes.
            edge_attr: Features of the edges; read where `edge_dim` is given.
            tokens: Data or batch with the walks of the tokens.
        """
        walks = _read(tokens, ("walk_nodes", "walk_edge_id", "walk_moved", "walk_adjacency"), "walks=True")
        self._check(x, edge_attr, walks, getattr(tokens, "token_size", None))
        node = self.lin_node(x)
        edge = None
        if self.lin_edge is not None and edge_attr is not None:
            edge = F.pad(self.lin_edge(edge_attr), (0, 0, 0, 1))  # the last row for where no step was made
        if self.chunk_size is None or x.size(0) <= self.chunk_size:
            z = self._encode(node, edge, *walks)
        else:
            parts = zip(*(walk.split(self.chunk_size) for walk in walks), strict=True)
            z = torch.cat([checkpoint(self._encode, node, edge, *part, use_reentrant=False) for part in parts])
        if self.lin_root is not None:
            root = self.lin_root(x).unsqueeze(1)
            z = torch.cat((z, root.expand(-1, self.num_root_tokens, -1)), 1)
        return z if self.levels is None else z + _levels(self.levels, z.size(1), self.num_root_tokens)

    def _encode(
        self, node: Tensor, edge: Tensor | None, nodes: Tensor, edges: Tensor, moved: Tensor, adjacency: Tensor
    ) -> Tensor:
        """Vectors of the tokens of some nodes; only the positions that walks reach are looked at."""
        num_nodes, num_tokens, num_walks, steps = nodes.shape
        steps -= 1
        place = torch.arange(steps + 1, device=nodes.device)
        length = steps - torch.arange(num_tokens, device=nodes.device) * steps // num_tokens
        inside = (place <= length.unsqueeze(-1)).unsqueeze(1).expand(num_tokens, num_walks, steps + 1).flatten()
        # their number is known without a look at them
        total = num_walks * (num_tokens // steps) * (steps * (steps + 3) // 2)
        inside = inside.to(torch.uint8).sort(descending=True, stable=True).indices[:total]

        def rows(value: Tensor) -> Tensor:
            """Of [nodes, tokens, walks, places, ...] the places that count, in one axis."""
            return value.flatten(1, 3).index_select(1, inside).flatten(0, 1)

        def along(value: Tensor, fill: int) -> Tensor:
            """Steps as places: the first has none."""
            return F.pad(value, (1, 0), value=fill)

        h = gather_coo(node, rows(nodes))
        if edge is not None:
            taken = along(torch.where(moved, edges, edge.size(0) - 1), edge.size(0) - 1)
            h += gather_coo(edge, rows(taken))
        same = [F.pad(nodes[..., k:] == nodes[..., :-k], (min(k, steps + 1), 0)) for k in range(1, self.window + 1)]
        bits = torch.cat((torch.stack(same, -1), adjacency), -1)
        h += self.lin_bits(rows(bits).to(h.dtype))
        h = F.relu(h)
        walk = (length + 1).repeat_interleave(num_walks).repeat(num_nodes)
        h = F.relu(self._convolved(h, _ptr(walk)))
        token = ((length + 1) * num_walks).repeat(num_nodes)
        z: Tensor = self.lin_out(segment_reduce(h, _ptr(token), "mean"))
        return z.view(num_nodes, num_tokens, self.out_channels)

    def _convolved(self, h: Tensor, ptr: Tensor) -> Tensor:
        """The convolution as one that looks back from each row, with it, and one that looks ahead, without."""
        half = self.kernel_size // 2
        back, ahead = self.conv_weight[:, : half + 1].flip(-1), F.pad(self.conv_weight[:, half + 1 :], (1, 0))
        out = segment_causal_conv1d(h, back, self.conv_bias, ptr)
        return out + segment_causal_conv1d(h, ahead, None, ptr, reverse=True) if half else out

    def _check(self, x: Tensor, edge_attr: Tensor | None, walks: tuple[Tensor, ...], size: Tensor | None) -> None:
        if x.dim() != 2 or x.size(1) != self.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self.in_channels})")
        if self.edge_dim is not None:
            if edge_attr is None:
                raise ValueError(f"edge_attr is None, but edge_dim is {self.edge_dim}")
            if edge_attr.dim() != 2 or edge_attr.size(1) != self.edge_dim:
                raise ValueError(f"edge_attr has shape {tuple(edge_attr.shape)}, but must be (|E|, {self.edge_dim})")
        nodes, *_, adjacency = walks
        if nodes.dim() != 4 or nodes.size(0) != x.size(0) or nodes.size(3) < 2 or nodes.size(1) % (nodes.size(3) - 1):
            raise ValueError(f"walk_nodes has shape {tuple(nodes.shape)}, but must be ({x.size(0)}, s * m, M, m + 1)")
        if adjacency.size(-1) != self.window - 1:
            raise ValueError(f"window is {self.window}, but walk_adjacency was stored for {adjacency.size(-1) + 1}")
        if self.level_emb and self.level_emb != nodes.size(3) - 1:
            raise ValueError(f"level_emb is {self.level_emb}, but the longest walk has {nodes.size(3) - 1} steps")
        if size is not None and size.size(0) != x.size(0) * (nodes.size(1) + self.num_root_tokens):
            has = size.size(0) // max(1, x.size(0)) - nodes.size(1)
            raise ValueError(f"num_root_tokens is {self.num_root_tokens}, but each node has {has} tokens without walks")

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.out_channels}, edge_dim={self.edge_dim}, window={self.window}, "
            f"kernel_size={self.kernel_size}, level_emb={self.level_emb}"
        )


def _check_numbers(least: int = 1, /, **numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")


def _read(tokens: Any, names: tuple[str, ...], option: str = "") -> tuple[Tensor, ...]:
    found = [getattr(tokens, name, None) for name in names]
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, Tensor):
            raise ValueError(f"tokens has no {name}: make them with geo.transforms.AddWalkTokens(..., {option})")
    return tuple(found)  # type: ignore[arg-type]


def _ptr(size: Tensor) -> Tensor:
    return F.pad(size.cumsum(0), (1, 0))


def _levels(levels: nn.Embedding, num_tokens: int, num_root_tokens: int) -> Tensor:
    """The learned vectors of the tokens of a node, [num_tokens, C]: longest walks first, roots last."""
    longest = levels.num_embeddings - 1
    walked = num_tokens - num_root_tokens
    if walked % longest or walked < 0:
        raise ValueError(
            f"level_emb is {longest}, but {num_tokens} tokens less {num_root_tokens} for the root are no multiple of it"
        )
    repeats = max(1, walked // longest)
    place = torch.arange(num_tokens, device=levels.weight.device)
    out: Tensor = levels((longest - place // repeats).clamp(min=0))
    return out


def _has_gated(convs: nn.ModuleList) -> bool:
    return any(isinstance(conv, GatedGCNConv) for conv in convs)
