r"""Sets of nodes that random walks visit, as subgraphs: tokens.

Token :math:`t` of a root holds the root and what its walks visit in their first ``lengths[t]`` steps, and all edges
between these nodes. Nothing of size nodes x nodes is built; tokens stand one after the other, their sizes beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geo.ops import bounds
from geo.ops.registration import define

_PAIRS = 1 << 22  # pairs of members that the plain-PyTorch kernel looks up at a time


def walk_tokens(
    rowptr: Tensor,
    col: Tensor,
    root: Tensor,
    walks: Tensor,
    lengths: Tensor,
    num_root_tokens: int = 0,
    induced: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""The subgraphs that walks span: for every root and token the nodes visited and the edges between them.

    Each root has the tokens of ``walks``, in order, and then ``num_root_tokens`` that hold the root alone. The first
    member of a token is its root, the others ascend. A token has every stored edge with both ends in it, loops and
    repeated edges among them, in the order (place of the source in the token, position in ``col``). Runs on integers:
    not differentiable.

    Args:
        rowptr: int64 [N + 1], the first edge of each node.
        col: int64 [E], where each edge leads; ascending in each row.
        root: int64 [S].
        walks: int64 [S, T, M, W], M walks for each root and token; -1 where a walk has ended.
        lengths: int64 [T], the steps of the walks that count: positions beyond are not looked at.
        num_root_tokens: R, tokens of the root alone.
        induced: find the edges; else there are none.

    Returns:
        With K members and F edges in all S * (T + R) tokens, all int64: members [K]; members of each token
        [S * (T + R)]; edges [F], as positions in ``col``; their sources and targets [2, F], as positions among the
        members; edges of each token [S * (T + R)].

    Raises:
        IndexError: an entry of ``rowptr``, ``root``, ``walks`` or ``lengths`` is out of range.
        ValueError: a wrong shape or dtype, or rows that do not ascend.

    Example:
        >>> import torch
        >>> from geo.ops import walk_tokens
        >>> rowptr, col = torch.tensor([0, 1, 3, 4]), torch.tensor([1, 0, 2, 1])  # the path 0 - 1 - 2
        >>> walks = torch.tensor([[[[2, 1, 2]]]])  # one walk of two steps from node 2
        >>> nodes, size, edges, index, _ = walk_tokens(rowptr, col, torch.tensor([2]), walks, torch.tensor([2]))
        >>> nodes.tolist(), size.tolist(), edges.tolist(), index.tolist()
        ([2, 1], [2], [3, 2], [[0, 1], [1, 0]])
    """
    _check_indices(rowptr=rowptr, col=col, root=root, lengths=lengths)
    if walks.dim() != 4 or walks.dtype != torch.int64:
        raise ValueError(f"walks: expected int64 [S, T, M, W], got {walks.dtype} {list(walks.shape)}")
    if root.size(0) != walks.size(0):
        raise ValueError(f"root: expected {walks.size(0)} entries as walks has rows, got {root.size(0)}")
    if lengths.size(0) != walks.size(1):
        raise ValueError(f"lengths: expected {walks.size(1)} entries as walks has tokens, got {lengths.size(0)}")
    if num_root_tokens < 0:
        raise ValueError(f"num_root_tokens: expected a number of at least 0, got {num_root_tokens}")
    _check_rows("walk_tokens", rowptr, col)
    args = (rowptr, col, root, walks, lengths, num_root_tokens, induced)
    nodes, size, edges, index, edge_size = bounds.call("walk_tokens", torch.ops.geo.walk_tokens, args)
    return nodes, size, edges, index, edge_size


def walk_adjacency(rowptr: Tensor, col: Tensor, walks: Tensor, window: int) -> Tensor:
    r"""For each position of each walk, which of the positions before it are neighbours of it.

    Bit :math:`k - 2` of position :math:`t` says whether an edge joins :math:`w_t` and :math:`w_{t-k}`, in either
    direction, for :math:`k = 2, \dots, \text{window}` (CRaWl's adjacency features; :math:`w_{t-1}` is always one).

    Args:
        rowptr: int64 [N + 1], the first edge of each node.
        col: int64 [E], where each edge leads; ascending in each row.
        walks: int64 [..., W]; -1 where a walk has ended.
        window: how far to look back.

    Returns:
        bool [..., W, ``window`` - 1]; False before the start of a walk and after its end.

    Raises:
        IndexError: an entry of ``rowptr`` or ``walks`` is out of range.
        ValueError: a wrong shape, dtype or window, or rows that do not ascend.

    Example:
        >>> import torch
        >>> from geo.ops import walk_adjacency
        >>> rowptr, col = torch.tensor([0, 2, 4, 6]), torch.tensor([1, 2, 0, 2, 0, 1])  # a triangle
        >>> walk_adjacency(rowptr, col, torch.tensor([0, 1, 2, 1]), window=3).int().tolist()
        [[0, 0], [0, 0], [1, 0], [0, 1]]
    """
    _check_indices(rowptr=rowptr, col=col)
    if walks.dim() == 0 or walks.dtype != torch.int64:
        raise ValueError(f"walks: expected int64 [..., W], got {walks.dtype} {list(walks.shape)}")
    if window < 1:
        raise ValueError(f"window: expected a number of at least 1, got {window}")
    _check_rows("walk_adjacency", rowptr, col)
    flat = walks.reshape(-1, walks.size(-1)) if walks.numel() else walks.new_empty(0, walks.size(-1))
    out: Tensor = bounds.call("walk_adjacency", torch.ops.geo.walk_adjacency, (rowptr, col, flat, window))
    return out.view(*walks.shape, window - 1)


def _check_indices(**indices: Tensor) -> None:
    for name, index in indices.items():
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"{name}: expected an int64 tensor with one axis, got {index.dtype} {list(index.shape)}")
    if indices["rowptr"].size(0) == 0:
        raise ValueError("rowptr: expected one entry more than nodes, got none")


def _check_rows(op: str, rowptr: Tensor, col: Tensor) -> None:
    """That rowptr rises from 0 to E, and that col ascends in each row."""
    if torch.compiler.is_compiling() or not bounds.reads_values(col):
        return
    try:
        bounds.check_ptr(op, rowptr, col.size(0))
    except IndexError as err:
        raise IndexError(str(err).replace(" ptr[", " rowptr[")) from None
    descends = col[1:] < col[:-1]
    inner = rowptr[1:-1]
    descends[inner[(inner > 0) & (inner < col.size(0))] - 1] = False  # where a new row starts
    if bool(descends.any()):
        i = int(descends.to(torch.uint8).argmax())
        raise ValueError(f"col: expected ascending rows, but col[{i}] = {col[i]} and col[{i + 1}] = {col[i + 1]}")


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def walk_tokens_reference(
    rowptr: Tensor,
    col: Tensor,
    root: Tensor,
    walks: Tensor,
    lengths: Tensor,
    num_root_tokens: int = 0,
    induced: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`walk_tokens` in vectorised PyTorch."""
    return _tokens_kernel(rowptr, col, root, walks, lengths, num_root_tokens, induced)


def walk_adjacency_reference(rowptr: Tensor, col: Tensor, walks: Tensor, window: int) -> Tensor:
    """:func:`walk_adjacency` in vectorised PyTorch."""
    return _adjacency_kernel(rowptr, col, walks.reshape(-1, walks.size(-1)), window).view(*walks.shape, window - 1)


def _edge_keys(rowptr: Tensor, col: Tensor, num_nodes: int) -> Tensor:
    """A number for each edge that ascends over the whole graph."""
    rows = torch.repeat_interleave(torch.arange(num_nodes, device=col.device), rowptr.diff(), output_size=col.size(0))
    return rows * num_nodes + col


def _check_walks(op: str, walks: Tensor, num_nodes: int) -> None:
    bad = (walks < -1) | (walks >= num_nodes)
    if bool(bad.any()):
        position = int(bad.flatten().to(torch.uint8).argmax())
        value = int(walks.flatten()[position])
        raise IndexError(bounds.out_of_range(op, "walks", position, value, -1, num_nodes - 1))


def _tokens_kernel(
    rowptr: Tensor,
    col: Tensor,
    root: Tensor,
    walks: Tensor,
    lengths: Tensor,
    num_root_tokens: int,
    induced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_nodes, num_roots, num_tokens, steps = rowptr.size(0) - 1, walks.size(0), walks.size(1), walks.size(3)
    bounds.check_index("walk_tokens", "lengths", lengths, steps)
    bounds.check_index("walk_tokens", "root", root, num_nodes)
    seen = torch.arange(steps, device=walks.device) <= lengths.view(-1, 1, 1)
    visited = torch.where(seen, walks, -1)
    _check_walks("walk_tokens", visited, num_nodes)
    all_tokens = num_tokens + num_root_tokens
    token = torch.arange(num_roots * all_tokens, device=walks.device).view(num_roots, all_tokens)
    # A number for each member that ascends over tokens, and in a token from the root over the other nodes.
    own = root.view(-1, 1, 1, 1)
    key = token[:, :num_tokens, None, None] * (num_nodes + 1) + torch.where(visited == own, 0, visited + 1)
    keys = torch.cat([key[visited >= 0], token.flatten() * (num_nodes + 1)]).unique()
    owner, rank = keys // (num_nodes + 1), keys % (num_nodes + 1)
    nodes = torch.where(rank == 0, root[owner // max(all_tokens, 1)], rank - 1)
    size = torch.bincount(owner, minlength=token.numel())
    none = nodes.new_empty(0)
    if not induced or not len(nodes):
        return nodes, size, none, none.new_empty(2, 0), torch.zeros_like(size)
    edge_keys = _edge_keys(rowptr, col, num_nodes)
    begin = size.cumsum(0) - size
    chunk = max(1, _PAIRS // int(size.max()) ** 2)
    found = [
        _edges_between(edge_keys, num_nodes, nodes, begin[k : k + chunk], size[k : k + chunk])
        for k in range(0, len(size), chunk)
    ]
    edges, source, target = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nodes, size, edges, torch.stack([source, target]), torch.bincount(owner[source], minlength=token.numel())


def _edges_between(
    edge_keys: Tensor, num_nodes: int, nodes: Tensor, begin: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All edges between members of the same token, by looking up each pair of members: (edge, source, target)."""
    width = size.repeat_interleave(size)  # of each member: the members of its token
    first = begin.repeat_interleave(size)
    member = _ranges(begin, size)
    source, target = member.repeat_interleave(width), _ranges(first, width)
    key = nodes[source] * num_nodes + nodes[target]
    low = torch.searchsorted(edge_keys, key)
    count = torch.searchsorted(edge_keys, key, right=True) - low
    edge, source, target = _ranges(low, count), source.repeat_interleave(count), target.repeat_interleave(count)
    order = torch.argsort(edge, stable=True)
    order = order[torch.argsort(source[order], stable=True)]
    return edge[order], source[order], target[order]


def _ranges(begin: Tensor, count: Tensor) -> Tensor:
    """begin, begin + 1, .., begin + count - 1 for each entry."""
    start = (begin - (count.cumsum(0) - count)).repeat_interleave(count)
    return start + torch.arange(len(start), device=start.device)


def _adjacency_kernel(rowptr: Tensor, col: Tensor, walks: Tensor, window: int) -> Tensor:
    num_nodes = rowptr.size(0) - 1
    _check_walks("walk_adjacency", walks, num_nodes)
    edge_keys = torch.cat([_edge_keys(rowptr, col, num_nodes), col.new_full((1,), num_nodes * num_nodes)])
    out = torch.zeros((*walks.shape, window - 1), dtype=torch.bool, device=walks.device)
    for k in range(2, min(window, walks.size(1) - 1) + 1):
        now, then = walks[:, k:], walks[:, :-k]
        keys = torch.stack([then * num_nodes + now, now * num_nodes + then])
        joined = (edge_keys[torch.searchsorted(edge_keys, keys)] == keys).any(0)
        out[:, k:, k - 2] = joined & (now >= 0) & (then >= 0)
    return out


# -- shapes ------------------------------------------------------------------------------------------------------------
def _tokens_fake(
    rowptr: Tensor,
    col: Tensor,
    root: Tensor,
    walks: Tensor,
    lengths: Tensor,
    num_root_tokens: int,
    induced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check(walks.dim() == 4)
    context = torch.library.get_ctx()
    members = context.new_dynamic_size()
    edges = context.new_dynamic_size() if induced else 0
    tokens = walks.size(0) * (walks.size(1) + num_root_tokens)
    sizes = ((members,), (tokens,), (edges,), (2, edges), (tokens,))
    nodes, size, edge, index, edge_size = (root.new_empty(shape) for shape in sizes)
    return nodes, size, edge, index, edge_size


def _adjacency_fake(rowptr: Tensor, col: Tensor, walks: Tensor, window: int) -> Tensor:
    torch._check(walks.dim() == 2)
    return walks.new_empty((*walks.shape, window - 1), dtype=torch.bool)


define(
    "walk_tokens(Tensor rowptr, Tensor col, Tensor root, Tensor walks, Tensor lengths, SymInt num_root_tokens, "
    "bool induced) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _tokens_kernel,
    _tokens_fake,
)
define(
    "walk_adjacency(Tensor rowptr, Tensor col, Tensor walks, SymInt window) -> Tensor",
    _adjacency_kernel,
    _adjacency_fake,
)
