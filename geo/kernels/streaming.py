"""Walks that follow a graph through its changes: only those that the change could reach are walked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geo.kernels.features import normalized_adjacency
from geo.kernels.ragged import Ragged, edges_of, edited, ptr_of, renumbered, row_sums, search
from geo.ops import WalkDeposits, csr_from_index, grf_paths, grf_walks
from geo.ops.grf_walks import deposits_of, steps_of_paths
from geo.ops.plan import index_from_csr
from geo.ops.walk_step import LONGEST, checked_law, walk_step

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
    simulates exactly these, and puts the deposits of their starts together anew. It reads the rows of nodes that are
    touched or visited, no others; now and then, when enough has changed, it packs its stores and sorts the index, and
    when nodes are removed it passes over everything once.

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
        matrix: The graph of now, normalised: ``(rowptr, col, weight)``.
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
        self._longest = LONGEST if max_length is None else max_length
        self._options: dict[str, Any] = {
            "num_walks": num_walks, "seed": seed, "p_halt": p_halt, "survival": survival, "coupling": coupling,
            "choice": "rendezvous", "first_walk": first_walk, "max_length": max_length,
        }  # fmt: skip
        weight = None if edge_weight is None else edge_weight.detach().clone()  # what is kept is not the caller's
        if dtype is None:
            dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.get_default_dtype()
        self._dtype, self.normalization = dtype, normalization
        rowptr, col, weight = normalized_adjacency(edge_index.clone(), weight, num_nodes, None, torch.float64)
        self.num_nodes, self.num_walks = rowptr.size(0) - 1, num_walks
        by_target, perm = csr_from_index(col, self.num_nodes)
        row = index_from_csr(rowptr, None, col.size(0))[perm]
        self._edges = Ragged(rowptr, col, weight), Ragged(by_target, row, weight[perm])  # by source, by target
        self._sums = [row_sums(rowptr, weight), row_sums(by_target, weight[perm])]
        self.node_key = _checked_keys(node_key, rowptr)
        self._next_key = int(self.node_key.max()) + 1 if self.num_nodes else 0
        graph = self.matrix
        found = grf_walks(*graph, **self._options, node_key=node_key)
        self._rows = Ragged(found.ptr, found.col, found.length, found.value)
        ptr, node, _ = grf_paths(*graph, **self._options, node_key=node_key)
        self._paths = Ragged(ptr, node)
        self._build_index()

    @property
    def edge_index(self) -> Tensor:
        """int64 [2, E], the edges of now, sorted."""
        ptr, col, _ = self._edges[0].packed()
        return torch.stack([index_from_csr(ptr, None, len(col)), col])

    @property
    def edge_weight(self) -> Tensor:
        """float64 [E], their weights before normalization."""
        return self._edges[0].packed()[2]

    @property
    def matrix(self) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised graph of now, ``(rowptr, col, weight)``."""
        edges = self.edge_index, self.edge_weight
        return normalized_adjacency(*edges, self.num_nodes, self.normalization, self._dtype)

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
            What was done.

        Raises:
            IndexError: A node is out of range.
            ValueError: A wrong shape or dtype, an edge added twice, one removed that is not there, or a weight that is
                not finite. The walks are then as they were.
        """
        if nodes_added < 0:
            raise ValueError(f"nodes_added: expected a number of at least 0, got {nodes_added}")
        total, m = self.num_nodes + nodes_added, self.num_walks
        added = _checked_nodes("edges_added", edges_added, 2, total, self.node_key)
        removed = _checked_nodes("edges_removed", edges_removed, 2, total, self.node_key)
        gone = torch.unique(_checked_nodes("nodes_removed", nodes_removed, 1, total, self.node_key))
        weight = _checked_weight(weight_added, added)
        if len(gone):  # their edges go first
            falls = [edges_of(rows, gone[gone < self.num_nodes]) for rows in self._edges]
            removed = torch.cat([removed, falls[0], falls[1].flip(0)], dim=1)
            stays = ~torch.isin(added, gone).any(0)
            added, weight = added[:, stays], weight[stays]
        by_source = edited(self._edges[0], added, weight, removed, total)
        by_target = edited(self._edges[1], added.flip(0), weight, removed.flip(0), total)
        changed = torch.cat([added, removed], dim=1)
        touched = torch.unique(changed if self.normalization == "sym" else changed[0])
        new = torch.arange(self.num_nodes * m, total * m, device=touched.device)
        walks = torch.cat([self.walks_through(touched), new])

        self._grow(nodes_added)
        for edges, sums, (nodes, ptr, other, kept) in zip(self._edges, self._sums, (by_source, by_target), strict=True):
            edges.replace(nodes, ptr, other, kept)
            sums[nodes] = row_sums(ptr, kept)
        if len(gone):
            number = self._forget(gone)
            start, touched = number[walks // m], number[touched]
            walks, touched = (start * m + walks % m)[start >= 0], touched[touched >= 0]
        start, walk = walks // m, walks % m
        self._paths.replace(walks, *self._walk(start, walk))
        rows = torch.unique(start)
        self._rows.replace(rows, *self._deposits_of(rows))
        if len(gone):
            self._build_index()
        else:
            self._remember(walks)
        return WalkUpdate(touched, start, walk, rows)

    def __repr__(self) -> str:
        num_edges = int(self._edges[0].count.sum())
        return f"StreamingWalks(num_nodes={self.num_nodes}, num_edges={num_edges}, num_walks={self.num_walks})"

    def _grow(self, num: int) -> None:
        """Make room for new nodes."""
        keys = torch.arange(self._next_key, self._next_key + num, device=self.node_key.device)
        self.node_key, self._next_key = torch.cat([self.node_key, keys]), self._next_key + num
        self.num_nodes += num
        for rows in (*self._edges, self._rows):
            rows.append(num)
        self._paths.append(num * self.num_walks)
        self._sums = [torch.cat([sums, sums.new_zeros(num)]) for sums in self._sums]
        self._moved = torch.cat([self._moved, self._moved.new_ones(num * self.num_walks)])

    def _forget(self, gone: Tensor) -> Tensor:
        """Close the gaps that nodes leave behind; returns the number of each node then, -1 for those."""
        stays = torch.ones(self.num_nodes, dtype=torch.bool, device=gone.device)
        stays[gone] = False
        number, kept = torch.where(stays, stays.cumsum(0) - 1, -1), stays.nonzero().flatten()
        self.num_nodes, self.node_key = len(kept), self.node_key[kept]
        by_source, by_target = self._edges
        self._edges = renumbered(by_source, kept, number), renumbered(by_target, kept, number)
        self._sums = [sums[kept] for sums in self._sums]
        self._rows = renumbered(self._rows, kept, number)
        self._paths = renumbered(self._paths, _walks_from(kept, self.num_walks), number)
        return number

    def _walk(self, start: Tensor, walk: Tensor) -> tuple[Tensor, Tensor]:
        """The paths of some walks: where each begins, and the nodes."""
        alive, at = torch.arange(len(start), device=start.device), start
        steps = [(alive, at)]
        while len(alive) and len(steps) <= self._longest:
            here, row = torch.unique(at, return_inverse=True)
            ptr, col, _ = self._edges[0].take(here)
            key, number = self.node_key[start[alive]], self._law.first_walk + walk[alive]
            edge_key = self.node_key[col]
            edge = walk_step(self._law, ptr, len(col), row, key, number, len(steps) - 1, edge_key=edge_key)
            going = (edge >= 0).nonzero().flatten()
            alive, at = alive[going], col[edge[going]]
            steps.append((alive, at))
        ptr = ptr_of(torch.bincount(torch.cat([alive for alive, _ in steps]), minlength=len(start)))
        node = start.new_empty(int(ptr[-1]))
        for step, (alive, at) in enumerate(steps):
            node[ptr[alive] + step] = at
        return ptr, node

    def _deposits_of(self, rows: Tensor) -> WalkDeposits:
        """The deposits of all walks from some starts, from their paths; columns are counted over the nodes on them."""
        ptr, node = self._paths.take(_walks_from(rows, self.num_walks))
        nodes, local = torch.unique(node, return_inverse=True)
        rowptr, col, weight = self._edges[0].take(nodes)
        row = index_from_csr(rowptr, None, len(col))
        if self.normalization == "sym":
            product = self._sums[0][nodes][row] * self._sums[1][col]
            weight = weight / torch.where(product > 0, product, 1).sqrt()
        edge, _ = search(row * self.num_nodes + col, local.roll(1) * self.num_nodes + node)
        edge[ptr[:-1]] = -1
        steps = steps_of_paths(ptr, local, edge)
        found = deposits_of(steps, rowptr, weight.to(self._dtype), None, self._law, len(rows))
        return found._replace(col=nodes[found.col])

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


def _checked_keys(node_key: Tensor | None, rowptr: Tensor) -> Tensor:
    num_nodes = len(rowptr) - 1
    if node_key is None:
        return torch.arange(num_nodes, device=rowptr.device)
    if node_key.shape != (num_nodes,) or node_key.dtype != torch.int64:
        raise ValueError(f"node_key: expected int64 [{num_nodes}], got {node_key.dtype} {list(node_key.shape)}")
    if len(torch.unique(node_key)) < num_nodes:
        raise ValueError("node_key: expected different numbers, got one of them twice")
    return node_key.clone()
