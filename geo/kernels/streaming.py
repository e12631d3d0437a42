"""Walks that follow a graph through its changes: only those that the change could reach are walked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.kernels.features import normalized_adjacency
from geo.kernels.ragged import Ragged
from geo.ops import WalkDeposits, csr_from_index, grf_paths, grf_walks
from geo.ops.grf_walks import deposits_of, steps_of_paths
from geo.ops.plan import index_from_csr
from geo.ops.walk_step import checked_law

_STALE = 8  # the index is built anew when the walks that it does not know make up one part in so many


class WalkUpdate(NamedTuple):
    """What one :meth:`StreamingWalks.update` did; nodes have their numbers after it.

    Walk ``walk[i]`` from ``start[i]`` was simulated, for each i; ``touched`` are the nodes whose edges had changed, and
    ``rows`` the starts whose deposits were put together anew.
    """

    touched: Tensor
    start: Tensor
    walk: Tensor
    rows: Tensor


class StreamingWalks:
    r"""Random walks for graph random features on a graph that changes, equal bit for bit to sampling them anew.

    Each step of a walk is a pure function of the seed, the start, the number of the walk, the step, and the edges of
    the present node, whose neighbours are chosen by rendezvous (the one with the least hash). So a change of edges
    leaves the walks alone that visit no touched node. :meth:`update` finds the others by an index from nodes to walks,
    simulates exactly these, and puts the deposits of their starts together anew. Beside that it passes over the edges
    once, and now and then, when enough has changed, packs the store and sorts the index.

    Touched are both ends of every edge that is added, removed or given another weight; with ``normalization=None``,
    when the weights of other edges stay, its source alone.

    Args:
        edge_index: int64 [2, E], sources and targets; both directions of an undirected edge. Repeated edges add up.
        edge_weight: [E], of any sign (default: ones).
        num_nodes: Number of nodes (default: the largest in ``edge_index`` plus one).
        num_walks: m, walks from each node; even for ``'antithetic'``.
        seed: An integer, as in :func:`geo.ops.grf_walks`.
        p_halt: As in :func:`geo.ops.grf_walks`, like ``survival``, ``first_walk`` and ``max_length``.
        survival: See there.
        coupling: ``'iid'`` or ``'antithetic'``.
        normalization: ``'sym'``, or None for the weights as they are (see :func:`normalized_adjacency`).
        node_key: int64 [N], different numbers that the nodes keep while others come and go (default: their positions).
        first_walk: See there.
        max_length: See there.
        dtype: Of the deposits' values (default: that of ``edge_weight``, or PyTorch's default).

    Attributes:
        num_nodes, num_walks: N and m.
        edge_index, edge_weight: The graph of now, sorted; weights as float64, before normalization.
        matrix: The normalised graph, ``(rowptr, col, weight)``.
        node_key: int64 [N], the key of every node.
        deposits: What :func:`geo.ops.grf_walks` returns on the graph of now, with ``choice='rendezvous'``.

    Raises:
        IndexError: A node is not below ``num_nodes``.
        ValueError: A wrong shape, dtype, probability or coupling.

    Example:
        >>> ring = torch.tensor([[0, 1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 0, 0, 1, 2, 3]])
        >>> walks = StreamingWalks(ring, num_walks=4, seed=0)
        >>> chord = torch.tensor([[0, 2], [2, 0]])
        >>> done = walks.update(edges_added=chord)
        >>> anew = StreamingWalks(torch.cat([ring, chord], dim=1), num_walks=4, seed=0)
        >>> done.touched.tolist(), all(torch.equal(*pair) for pair in zip(walks.deposits, anew.deposits))
        ([0, 2], True)
    """

    _index: Ragged  # of each node, the walks that visited it when this was built
    _moved: Tensor  # bool [N * m], the walks that have been simulated since
    _recent: Tensor  # and their numbers

    def __init__(
        self,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        num_nodes: int | None = None,
        *,
        num_walks: int,
        seed: int,
        p_halt: float = 0.5,
        survival: Sequence[float] | Tensor | None = None,
        coupling: str = "antithetic",
        normalization: str | None = "sym",
        node_key: Tensor | None = None,
        first_walk: int = 0,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._law = checked_law(num_walks, seed, p_halt, survival, coupling, "rendezvous", first_walk, max_length)
        self._options: dict[str, Any] = {
            "num_walks": num_walks, "seed": seed, "p_halt": p_halt, "survival": survival, "coupling": coupling,
            "choice": "rendezvous", "first_walk": first_walk, "max_length": max_length,
        }  # fmt: skip
        weight = None if edge_weight is None else edge_weight.detach()
        if dtype is None:
            dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.get_default_dtype()
        self._dtype, self.normalization = dtype, normalization
        rowptr, self._col, self.edge_weight = normalized_adjacency(edge_index, weight, num_nodes, None, torch.float64)
        self._row = index_from_csr(rowptr, None, self._col.size(0))
        self.num_nodes, self.num_walks = rowptr.size(0) - 1, num_walks
        self.node_key = _checked_keys(node_key, self._row, self.num_nodes)
        self._next_key = int(self.node_key.max()) + 1 if self.num_nodes else 0
        key = self._set_matrix()
        found = grf_walks(*self.matrix, **self._options, node_key=key)
        self._rows = Ragged(found.ptr, found.col, found.length, found.value)
        ptr, node, _ = grf_paths(*self.matrix, **self._options, node_key=key)
        self._paths = Ragged(ptr, node)
        self._build_index()

    @property
    def edge_index(self) -> Tensor:
        """int64 [2, E], the edges of now."""
        return torch.stack([self._row, self._col])

    @property
    def deposits(self) -> WalkDeposits:
        """Equal to those of :func:`geo.ops.grf_walks` on the graph of now."""
        return WalkDeposits(*self._rows.packed())

    def paths(self) -> tuple[Tensor, Tensor]:
        """``(ptr, node)``: the nodes of walk k from node v are ``node[ptr[v * m + k]:ptr[v * m + k + 1]]``."""
        ptr, node = self._paths.packed()
        return ptr, node

    def walks_through(self, nodes: Tensor) -> Tensor:
        """The walks that visit any of some nodes.

        Args:
            nodes: int64 [K].

        Returns:
            int64 [R], ascending: v * m + k for walk k from node v.
        """
        nodes = torch.unique(nodes)
        _, known = self._index.take(nodes[nodes < len(self._index.begin)])
        known = known[~self._moved[known]]
        ptr, node = self._paths.take(self._recent)
        hit = self._recent[index_from_csr(ptr, None, len(node))[torch.isin(node, nodes)]]
        found: Tensor = torch.unique(torch.cat([known, hit]))
        return found

    def update(
        self,
        edges_added: Tensor | None = None,
        edges_removed: Tensor | None = None,
        weight_added: Tensor | None = None,
        nodes_added: int = 0,
        nodes_removed: Tensor | None = None,
    ) -> WalkUpdate:
        """Change the graph and bring the walks up to date.

        Nodes are added first, under the numbers after the present ones; then edges are removed, then edges added, then
        nodes removed, with their edges. The nodes that stay keep their order and their keys and close the gaps.

        Args:
            edges_added: int64 [2, A], none of them twice. One that is there already is given its new weight.
            edges_removed: int64 [2, R], edges that are there.
            weight_added: [A], the weights of the edges added (default: ones).
            nodes_added: How many nodes to add.
            nodes_removed: int64 [K], nodes to remove.

        Returns:
            What was done. The cost is that of ``len(start)`` walks and one pass over the graph's edges.

        Raises:
            IndexError: A node is out of range.
            ValueError: A wrong shape or dtype, an edge added twice, one removed that is not there, or a weight that is
                not finite. The walks are then as they were.
        """
        if nodes_added < 0:
            raise ValueError(f"nodes_added: expected a number of at least 0, got {nodes_added}")
        total, m = self.num_nodes + nodes_added, self.num_walks
        added = _checked_nodes("edges_added", edges_added, 2, total, self._row)
        removed = _checked_nodes("edges_removed", edges_removed, 2, total, self._row)
        gone = torch.zeros(total, dtype=torch.bool, device=self._row.device)
        gone[_checked_nodes("nodes_removed", nodes_removed, 1, total, self._row)] = True
        row, col, weight, changed = self._edit(added, _checked_weight(weight_added, added), removed, gone)
        touched = torch.unique(changed.flatten() if self.normalization == "sym" else changed[0])
        walks = torch.cat([self.walks_through(touched), torch.arange(self.num_nodes * m, total * m, device=row.device)])

        kept = (~gone).nonzero().flatten()
        number = gone.cumsum(0)  # of each node after the change; -1 for those that go
        number = torch.where(gone, -1, torch.arange(total, device=row.device) - number)
        start, walk = number[walks // m], walks % m
        start, walk, touched = start[start >= 0], walk[start >= 0], number[touched]
        self._renumber(nodes_added, kept, number)
        self._row, self._col, self.edge_weight = number[row], number[col], weight
        key = self._set_matrix()
        ptr, node, _ = grf_paths(*self.matrix, start, **self._options, node_key=key, walk=walk)
        self._paths.replace(start * m + walk, ptr, node)
        rows = torch.unique(start)
        self._rows.replace(rows, *self._deposits_of(rows))
        if len(kept) < total:
            self._build_index()
        else:
            self._remember(start * m + walk)
        return WalkUpdate(touched[touched >= 0], start, walk, rows)

    def __repr__(self) -> str:
        return f"StreamingWalks(num_nodes={self.num_nodes}, num_edges={len(self._row)}, num_walks={self.num_walks})"

    def _set_matrix(self) -> Tensor | None:
        """Normalise the graph of now; returns the keys of its nodes where they are not their numbers."""
        edges = self.edge_index, self.edge_weight
        self.matrix = normalized_adjacency(*edges, self.num_nodes, self.normalization, self._dtype)
        plain = torch.equal(self.node_key, torch.arange(self.num_nodes, device=self._row.device))
        return None if plain else self.node_key

    def _edit(
        self, added: Tensor, weight_added: Tensor, removed: Tensor, gone: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, columns and weights of the edges after a change, sorted, and the edges [2, C] that it concerns."""
        row, col, weight, total = self._row, self._col, self.edge_weight, len(gone)
        key = row * total + col
        place, found = _search(key, removed[0] * total + removed[1])
        if not bool(found.all()):
            edge = removed[:, int((~found).nonzero()[0])].tolist()
            raise ValueError(f"edges_removed: expected edges of the graph, got {edge}, which is not there")
        new_key, order = (added[0] * total + added[1]).sort()
        twice = new_key[1:] == new_key[:-1]
        if bool(twice.any()):
            edge = added[:, order[int(twice.nonzero()[0])]].tolist()
            raise ValueError(f"edges_added: expected each edge once, got {edge} twice: add up their weights")
        order = order[~gone[added[:, order]].any(0)]
        added, weight_added = added[:, order], weight_added[order]
        keep = ~(gone[row] | gone[col])
        keep[place] = False
        changed = torch.cat([added, self.edge_index[:, ~keep]], dim=1)
        place, found = _search(key[keep], added[0] * total + added[1])
        weight = weight[keep].index_copy(0, place[found], weight_added[found])
        new = (*added[:, ~found], weight_added[~found])
        row, col, weight = _insert((row[keep], col[keep], weight), place[~found], new)
        return row, col, weight, changed

    def _renumber(self, nodes_added: int, kept: Tensor, number: Tensor) -> None:
        """Make room for new nodes, and forget those that have gone."""
        m = self.num_walks
        self._rows.append(nodes_added)
        self._paths.append(nodes_added * m)
        self._moved = torch.cat([self._moved, self._moved.new_ones(nodes_added * m)])
        keys = self._next_key + torch.arange(nodes_added, device=kept.device)
        self.node_key = torch.cat([self.node_key, keys])[kept]
        self.num_nodes, self._next_key = len(kept), self._next_key + nodes_added
        if len(kept) < len(number):
            ptr, node = self._paths.take(_walks_from(kept, m))
            self._paths = Ragged(ptr, number[node])
            ptr, col, length, value = self._rows.take(kept)
            self._rows = Ragged(ptr, number[col], length, value)

    def _deposits_of(self, rows: Tensor) -> WalkDeposits:
        """The deposits of all walks from some starts, from their paths."""
        ptr, node = self._paths.take(_walks_from(rows, self.num_walks))
        first = torch.zeros_like(node, dtype=torch.bool)
        first[ptr[:-1]] = True
        key = self._row * self.num_nodes + self._col
        edge, _ = _search(key, node.roll(1) * self.num_nodes + node)
        edge = torch.where(first, -1, edge)
        rowptr, _, weight = self.matrix
        return deposits_of(steps_of_paths(ptr, node, edge), rowptr, weight, None, self._law, len(rows))

    def _build_index(self) -> None:
        ptr, node = self._paths.packed()
        index, perm = csr_from_index(node, self.num_nodes)
        self._index = Ragged(index, index_from_csr(ptr, None, len(node))[perm])
        self._moved = torch.zeros(len(ptr) - 1, dtype=torch.bool, device=ptr.device)
        self._recent = ptr.new_empty(0)

    def _remember(self, walks: Tensor) -> None:
        """Note that the index does not know the present paths of some walks."""
        self._moved[walks] = True
        self._recent = torch.unique(torch.cat([self._recent, walks]))
        if int(self._paths.count[self._recent].sum()) * _STALE > int(self._paths.count.sum()):
            self._build_index()


def _walks_from(starts: Tensor, num_walks: int) -> Tensor:
    """The numbers of all walks from some starts."""
    return (starts.unsqueeze(1) * num_walks + torch.arange(num_walks, device=starts.device)).flatten()


def _search(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted key stands, or would stand, among ascending keys; and whether it is there."""
    place = torch.searchsorted(keys, wanted)
    if not len(keys):
        return place, torch.zeros_like(wanted, dtype=torch.bool)
    return place, keys[place.clamp(max=len(keys) - 1)] == wanted


def _insert(columns: tuple[Tensor, ...], place: Tensor, new: tuple[Tensor, ...]) -> list[Tensor]:
    """Put new entries, whose places ascend, before those that stand there."""
    old = torch.ones(len(columns[0]) + len(place), dtype=torch.bool, device=place.device)
    old[place + torch.arange(len(place), device=place.device)] = False
    out = [column.new_empty(len(old)) for column in columns]
    for merged, column, values in zip(out, columns, new, strict=True):
        merged[old], merged[~old] = column, values
    return out


def _checked_nodes(name: str, nodes: Tensor | None, axes: int, num_nodes: int, like: Tensor) -> Tensor:
    """Numbers of nodes along one axis, or edges along two."""
    if nodes is None:
        return like.new_empty((2, 0) if axes == 2 else 0)
    if nodes.dtype != torch.int64 or nodes.dim() != axes or (axes == 2 and nodes.size(0) != 2):
        shape = "[2, E]" if axes == 2 else "[K]"
        raise ValueError(f"{name}: expected int64 {shape}, got {nodes.dtype} {list(nodes.shape)}")
    bad = (nodes < 0) | (nodes >= num_nodes)
    if bool(bad.any()):
        raise IndexError(f"{name}: expected nodes from 0 to {num_nodes - 1}, got {int(nodes[bad][0])}")
    return nodes


def _checked_weight(weight: Tensor | None, edges: Tensor) -> Tensor:
    if weight is None:
        return torch.ones(edges.size(1), dtype=torch.float64, device=edges.device)
    if weight.shape != edges.shape[1:]:
        raise ValueError(f"weight_added: expected [{edges.size(1)}], one for each edge, got {list(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight_added: expected finite numbers, got infinity or NaN")
    return weight.detach().double()


def _checked_keys(node_key: Tensor | None, like: Tensor, num_nodes: int) -> Tensor:
    if node_key is None:
        return torch.arange(num_nodes, device=like.device)
    if node_key.shape != (num_nodes,) or node_key.dtype != torch.int64:
        raise ValueError(f"node_key: expected int64 [{num_nodes}], got {node_key.dtype} {list(node_key.shape)}")
    if len(torch.unique(node_key)) < num_nodes:
        raise ValueError("node_key: expected different numbers, got one of them twice")
    return node_key
