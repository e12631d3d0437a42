"""Each node's neighbourhood as a sequence of small subgraphs: what random walks from it visit."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import BaseTransform

from geo.ops import csr_from_index, random_walk, walk_adjacency, walk_tokens
from geo.ops.random_walk import philox

_CHUNK = 1 << 24  # visited nodes held at a time
_WALKS = ("walk_nodes", "walk_edge_id", "walk_moved", "walk_adjacency")
_TOKENS = ("token_node_id", "token_edge_id", "token_sub_edge_index", "token_size", "token_esize", "token_setting")
_STORED = (*_TOKENS, *_WALKS)


class WalkTokenData(Data):  # type: ignore[misc]
    """Data with walk tokens: what :class:`AddWalkTokens` returns, with indices that batching shifts as it should.

    Batch it as any Data. Sizes of tokens stay a list of counts, so the offsets of tokens are their sums after batching.

    Args:
        *args: As of :class:`torch_geometric.data.Data`.
        **kwargs: The same.

    Example:
        >>> from torch_geometric.data import Batch
        >>> data = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), num_nodes=2)
        >>> data = AddWalkTokens(walk_length=1)(data)
        >>> Batch.from_data_list([data, data]).token_node_id.tolist()
        [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    """

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Shift of an attribute per graph: number of nodes, of edges or of token members."""
        if key in ("token_node_id", "walk_nodes"):
            return self.num_nodes
        if key in ("token_edge_id", "walk_edge_id"):
            return self.num_edges
        if key == "token_sub_edge_index":
            return self.token_node_id.size(0)
        return super().__inc__(key, value, *args, **kwargs)


torch.serialization.add_safe_globals([WalkTokenData])  # so that datasets of PyG can load what they saved


class AddWalkTokens(BaseTransform):  # type: ignore[misc]
    r"""Gives each node the token sequence of `Graph Mamba Networks <https://arxiv.org/abs/2402.08678>`_.

    For every node :math:`v`, every length :math:`\hat m = m, \dots, 1` and every repeat, ``num_walks`` independent
    random walks of :math:`\hat m` steps start at :math:`v`. The token is the set :math:`T` of all nodes they visit,
    with the subgraph :math:`G[T]` of all edges between them:

    .. math::
        v \mapsto \big( G[T_m^{(1)}], \dots, G[T_m^{(s)}], \; G[T_{m-1}^{(1)}], \dots, G[T_1^{(s)}], \; G[\{v\}], \dots
        \big)

    so that a node has :math:`L = s \, m + r` tokens, from the widest to :math:`r` (``num_root_tokens``) times the node
    itself. All of them together are one graph, the disjoint union that message passing needs.

    The paper leaves open what follows. Walks follow ``edge_index`` from row 0 to row 1, each out-edge being equally
    likely; where there is none they stay. Induced subgraphs keep directions, loops and repeated edges. Draws are
    independent for every length, repeat and walk: tokens are not prefixes of one another. Random numbers are a function
    of (seed, index of the node in its graph, walk, step), so neither threads nor batches change them; walk :math:`k` of
    token :math:`j` is walk :math:`j M + k` of :func:`geo.ops.random_walk`. No matrix of nodes by nodes is built, as
    PyG's ``RootedRWSubgraph`` does.

    Args:
        walk_length: m, the steps of the longest walks.
        num_walks: M, walks of each token. (default: ``1``)
        num_repeats: s, tokens of each length. (default: ``1``)
        num_root_tokens: r, tokens of the node alone at the end. (default: ``1``)
        non_backtracking: Walks do not return over the edge just taken where there is another. (default: ``False``)
        induced: Store the edges inside tokens; an encoder of walks needs none. (default: ``True``)
        walks: Store the walks themselves, too. (default: ``False``)
        window: How far back adjacency along a walk is stored. (default: ``8``)
        seed: An integer. (default: ``0``)
        resample: ``'once'``: always the same tokens, so that they can be drawn before training. ``'epoch'``: others in
            each epoch, which :meth:`set_epoch` sets. (default: ``'once'``)

    Shapes:
        Reads ``edge_index`` :math:`(2, |E|)` and the number of nodes. Returns a :class:`WalkTokenData` with, tokens in
        the order of nodes and K members in all of them:

        - ``token_size``, ``token_esize`` :math:`(|V| L)`: numbers of members and of edges of each token
        - ``token_node_id`` :math:`(K)`: the members; the first of a token is its root, the others ascend
        - ``token_edge_id`` :math:`(F)`: columns of ``edge_index``, by (source's place, target's node, column)
        - ``token_sub_edge_index`` :math:`(2, F)`: the same edges between members, as positions in ``token_node_id``
        - ``token_setting`` :math:`(1, 5)`: ``walk_length``, ``num_walks``, ``num_repeats``, ``num_root_tokens`` and
          whether ``induced`` (0 or 1), by which a model sees whether the tokens are those it expects; a row a graph in
          a batch

        and with ``walks=True``, for the :math:`s \, m` tokens that are not roots alone

        - ``walk_nodes`` :math:`(|V|, s m, M, m + 1)`: beyond its length a walk repeats its last node
        - ``walk_moved`` and ``walk_edge_id`` :math:`(|V|, s m, M, m)`: whether a step was made, and the column of
          ``edge_index`` it took (0 where none was made)
        - ``walk_adjacency`` :math:`(|V|, s m, M, m + 1, \text{window} - 1)`: entry :math:`k - 2` of position :math:`t`
          says whether an edge joins :math:`w_t` and :math:`w_{t - k}`, in either direction

    Symmetry and derivatives:
        A renumbering of nodes changes what is drawn but not its distribution. Not differentiable.

    Example:
        >>> data = Data(edge_index=torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), num_nodes=3)  # a path
        >>> data = AddWalkTokens(walk_length=1, num_walks=8, seed=1)(data)
        >>> data.token_size.tolist(), data.token_node_id.tolist()
        ([2, 1, 3, 1, 2, 1], [0, 1, 0, 1, 0, 2, 1, 2, 1, 2])
        >>> data.token_sub_edge_index[:, :2].tolist(), data.token_edge_id[:2].tolist()
        ([[0, 1], [1, 0]], [0, 1])
    """

    def __init__(
        self,
        walk_length: int,
        num_walks: int = 1,
        num_repeats: int = 1,
        num_root_tokens: int = 1,
        non_backtracking: bool = False,
        induced: bool = True,
        walks: bool = False,
        window: int = 8,
        seed: int = 0,
        resample: Literal["once", "epoch"] = "once",
    ) -> None:
        for name, value, least in (
            ("walk_length", walk_length, 1),
            ("num_walks", num_walks, 1),
            ("num_repeats", num_repeats, 1),
            ("num_root_tokens", num_root_tokens, 0),
            ("window", window, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        if not isinstance(seed, int):
            raise ValueError(f"seed is {seed!r}, but must be an integer")
        if resample not in ("once", "epoch"):
            raise ValueError(f"resample is {resample!r}, but must be 'once' or 'epoch'")
        self.walk_length, self.num_walks, self.num_repeats = walk_length, num_walks, num_repeats
        self.num_root_tokens, self.non_backtracking, self.induced = num_root_tokens, non_backtracking, induced
        self.walks, self.window, self.seed, self.resample = walks, window, seed, resample
        # in memory that the workers of a DataLoader share, those that outlive an epoch, too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_() if resample == "epoch" else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose tokens are drawn; only for ``resample='epoch'``.

        Their seed is the first 64 bits of the Philox block with key ``seed`` and counter (lower and upper 32 bits of
        the epoch, 0, 2^32 - 1).
        """
        if self._epoch is None:
            raise ValueError("set_epoch is for resample='epoch', but resample is 'once'")
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, but must not be negative")
        self._epoch.fill_(epoch)

    def _seed(self) -> int:
        if self._epoch is None:
            return self.seed
        epoch, zero = self._epoch.view(1), torch.zeros(1, dtype=torch.int64)
        words = philox(self.seed, epoch, epoch >> 32, zero, zero - 1)
        return int(words[0]) << 32 | int(words[1])

    def forward(self, data: Data) -> WalkTokenData:
        """Adds the tokens."""
        edge_index, num_nodes = _graph(data)
        # edges by source, then target, then column
        _, by_target = csr_from_index(edge_index[1], num_nodes)
        rowptr, by_source = csr_from_index(edge_index[0][by_target], num_nodes)
        perm = by_target[by_source]
        col = edge_index[1][perm]
        steps, tokens = self.walk_length, self.num_repeats * self.walk_length
        lengths = steps - torch.arange(tokens, device=col.device) // self.num_repeats
        found, stored = [], []
        seed = self._seed()
        rows = max(1, _CHUNK // (tokens * self.num_walks * (steps + 1)))
        for root in torch.arange(num_nodes, device=col.device).split(rows):
            args = (rowptr, col, root, steps, tokens * self.num_walks)
            nodes, edges = random_walk(*args, seed=seed, non_backtracking=self.non_backtracking, return_edges=True)
            nodes = nodes.view(-1, tokens, self.num_walks, steps + 1)
            found.append(walk_tokens(rowptr, col, root, nodes, lengths, self.num_root_tokens, self.induced))
            if self.walks:
                stored.append(self._stored(rowptr, col, perm, nodes, edges.view(*nodes.shape[:3], steps), lengths))
        out: WalkTokenData = WalkTokenData.from_dict(
            {key: value for key, value in data.to_dict().items() if key not in _STORED}
        )
        out.num_nodes = num_nodes  # PyG would infer it from whatever has 'node' in its name
        members, size, edge, index, edge_size = zip(*found, strict=True)
        before = 0
        for part, ids in zip(index, members, strict=True):
            part += before
            before += ids.size(0)
        out.token_node_id, out.token_size, out.token_esize = torch.cat(members), torch.cat(size), torch.cat(edge_size)
        out.token_edge_id, out.token_sub_edge_index = perm[torch.cat(edge)], torch.cat(index, dim=1)
        setting = (steps, self.num_walks, self.num_repeats, self.num_root_tokens, int(self.induced))
        out.token_setting = torch.tensor([setting], device=col.device)
        if self.walks:
            for name, values in zip(_WALKS, zip(*stored, strict=True), strict=True):
                out[name] = torch.cat(values)
        return out

    def _stored(
        self, rowptr: Tensor, col: Tensor, perm: Tensor, nodes: Tensor, edges: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nodes, columns of ``edge_index``, steps made and adjacency, each walk cut to its token's length."""
        place = torch.arange(self.walk_length + 1, device=col.device)
        length = lengths.view(-1, 1, 1)
        nodes = nodes.gather(-1, torch.minimum(place, length).expand_as(nodes))
        moved = (edges >= 0) & (place[1:] <= length)
        columns = torch.zeros_like(edges)
        columns[moved] = perm[edges[moved]]
        adjacency = walk_adjacency(rowptr, col, nodes, self.window) & (place <= length).unsqueeze(-1)
        return nodes, columns, moved, adjacency

    def __repr__(self) -> str:  # all options, since PyG tells by it whether what it has on disk is still right
        names = [name for name in vars(self) if name != "_epoch"]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _graph(data: Data) -> tuple[Tensor, int]:
    """``edge_index`` and the number of nodes of one graph."""
    kind = type(data)
    if not isinstance(data, Data) or isinstance(data, Batch):
        raise ValueError(f"data is a {kind.__name__}, but tokens are added to one graph: a Data, before it is batched")
    if kind is not WalkTokenData and (kind.__inc__ is not Data.__inc__ or kind.__cat_dim__ is not Data.__cat_dim__):
        raise ValueError(f"data is a {kind.__name__} with a batching of its own, but must be a plain Data")
    edge_index = data.get("edge_index")
    if isinstance(edge_index, EdgeIndex):
        edge_index = edge_index.as_tensor()
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64 or edge_index.dim() != 2:
        given = f"{edge_index.dtype} {tuple(edge_index.shape)}" if isinstance(edge_index, Tensor) else "missing"
        raise ValueError(f"edge_index is {given}, but must be an int64 tensor (2, |E|)")
    if edge_index.size(0) != 2:
        raise ValueError(f"edge_index has shape {tuple(edge_index.shape)}, but must be (2, |E|)")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            num_nodes = int(data.num_nodes)
        except UserWarning:  # PyG would guess it from the edges, and miss isolated nodes
            raise ValueError("the number of nodes is not given: set num_nodes, or node features x") from None
    bad = ((edge_index < 0) | (edge_index >= num_nodes)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        value = int(edge_index[row, column])
        raise ValueError(f"edge_index[{row}, {column}] is {value}, but must be a node of 0..{num_nodes - 1}")
    return edge_index, num_nodes
