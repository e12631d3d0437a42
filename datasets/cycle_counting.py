"""How many short cycles does a graph have? Random graphs with exact counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import choose, fill

_SHARES = {"train": (0.0, 0.3), "val": (0.3, 0.5), "test": (0.5, 1.0), "all": (0.0, 1.0)}


def count_cycles(edge_index: Tensor, num_nodes: int) -> Tensor:
    r"""Count the cycles of 3, 4, 5 and 6 nodes in a simple graph, exactly.

    Traces of powers of the adjacency matrix count closed walks; from them are taken the walks that are no cycles, by
    the formulas of Harary and Manvel (1971) and of Alon, Yuster and Zwick (https://doi.org/10.1007/BF02523189). The
    cycles need not be induced: a complete graph of four nodes has four triangles and three cycles of four.

    Args:
        edge_index: Both directions of every edge [2, E]. Self-loops and repeated edges count as none and as one.
        num_nodes: Number of nodes.

    Returns:
        Four counts, int64.

    Raises:
        ValueError: An index out of range, an edge without its other direction, or a graph so dense that its walks of
            length six cannot be counted exactly.

    Example:
        >>> import torch
        >>> from geo.datasets import count_cycles
        >>> complete = (1 - torch.eye(4)).nonzero().t()
        >>> count_cycles(complete, 4).tolist()
        [4, 3, 0, 0]
    """
    a = _adjacency(edge_index, num_nodes)
    if not np.array_equal(a, a.T):
        raise ValueError("edge_index must hold both directions of every edge, as ToUndirected makes them")
    a2 = a @ a
    a3, a4 = a2 @ a, a2 @ a2
    degree, triangles, closed4 = np.diag(a2), np.diag(a3), np.diag(a4)
    closed5, closed6 = (a4 * a).sum(), (a3 * a3).sum()
    counts = [
        triangles.sum() / 6,
        (closed4.sum() - 2 * (degree**2).sum() + degree.sum()) / 8,
        (closed5 - 5 * (triangles * (degree - 1)).sum()) / 10,
        (
            closed6
            - 3 * (triangles**2).sum()
            + 9 * (a2 * a2 * a).sum()
            - 6 * (closed4 * degree).sum()
            + 6 * closed4.sum()
            - 4 * triangles.sum()
            + 4 * (degree**3).sum()
            + 3 * a3.sum()
            - 12 * (degree**2).sum()
            + 4 * degree.sum()
        )
        / 12,
    ]
    return torch.tensor([round(float(count)) for count in counts])


def count_directed_cycles(edge_index: Tensor, num_nodes: int) -> Tensor:
    r"""Count the directed cycles of 3, 4, 5 and 6 nodes in an oriented graph, exactly.

    An oriented graph has no pair of opposite edges, so that closed walks of three, four and five steps are cycles; of
    those of six steps are taken the walks that are two triangles with a common node.

    Args:
        edge_index: Edges from row 0 to row 1 [2, E]. Self-loops and repeated edges count as none and as one.
        num_nodes: Number of nodes.

    Returns:
        Four counts, int64.

    Raises:
        ValueError: An index out of range, opposite edges, or a graph too dense to count exactly.

    Example:
        >>> import torch
        >>> from geo.datasets import count_directed_cycles
        >>> count_directed_cycles(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 3]]), 4).tolist()
        [1, 0, 0, 0]
    """
    a = _adjacency(edge_index, num_nodes)
    if (a * a.T).any():
        raise ValueError("edge_index holds opposite edges, but the graph must be oriented")
    a2 = a @ a
    a3 = a2 @ a
    triangles = np.diag(a3)
    twice = 3 * (triangles**2).sum() - 3 * (a * a2.T**2).sum() + triangles.sum()
    counts = [triangles.sum() / 3, (a2 * a2.T).sum() / 4, (a2 * a3.T).sum() / 5, ((a3 * a3.T).sum() - twice) / 6]
    return torch.tensor([round(float(count)) for count in counts])


def _adjacency(edge_index: Tensor, num_nodes: int) -> np.ndarray:
    """The matrix of a graph without loops, checked."""
    edges = edge_index.detach().cpu().numpy()
    if edges.size and (edges.min() < 0 or edges.max() >= num_nodes):
        raise ValueError(f"edge_index holds {edges.min()} to {edges.max()}, but there are {num_nodes} nodes")
    a = np.zeros((num_nodes, num_nodes))
    a[edges[0], edges[1]] = 1
    np.fill_diagonal(a, 0)
    if num_nodes * float(a.sum(1).max(initial=0)) ** 6 >= 2**53:
        raise ValueError(f"the largest degree is {int(a.sum(1).max())}, too many for exact counts in float64")
    return a


class CycleCounting(InMemoryDataset):
    """Random graphs with the numbers of their cycles of 3, 4, 5 and 6 nodes, for regression.

    The graphs of "Can Graph Neural Networks Count Substructures?" (https://arxiv.org/abs/2002.04025), drawn anew:

    * 'regular': a random regular graph of n nodes and degree d, with (n, d) one of `sizes`, from which n edges are
      taken out at random. With the default sizes this is the benchmark's: 18.75 nodes and 31.25 edges on average.
    * 'erdos-renyi': each pair of `num_nodes` nodes is joined with probability `p`.

    Errors on these graphs cannot be compared with those on the published file, which is one draw by its authors. The
    splits have 30 %, 20 % and 50 % of the graphs, as there; which graph is drawn does not depend on the split.

    Items have ``x`` [V, 1] float32 (ones), ``edge_index`` [2, E] int64 with both directions, sorted, and ``y`` [1, 4]
    float32, the counts (:func:`count_cycles`). With `directed` each edge keeps one direction, drawn at random, and what
    is counted are directed cycles (:func:`count_directed_cycles`).

    Args:
        root: Not used for files; kept for the interface of PyG.
        num_graphs: Graphs of all splits together.
        split: 'train', 'val', 'test' or 'all'.
        kind: 'regular' or 'erdos-renyi'.
        sizes: Nodes and degree of the regular graphs, one pair drawn for each graph.
        num_nodes: Nodes of an Erdős-Rényi graph.
        p: Probability of its edges.
        directed: Give each edge one direction.
        seed: Seed of everything.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the samples for which it is true.

    Raises:
        ValueError: An unknown kind or split, or numbers no graph can have.

    Example:
        >>> from geo.datasets import CycleCounting
        >>> data = CycleCounting(num_graphs=20, split='train')
        >>> len(data), data[0].y.shape
        (6, torch.Size([1, 4]))
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        num_graphs: int = 5000,
        split: str = "all",
        *,
        kind: str = "regular",
        sizes: Sequence[tuple[int, int]] = ((10, 6), (15, 6), (20, 5), (30, 5)),
        num_nodes: int = 10,
        p: float = 0.3,
        directed: bool = False,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        choose("split", split, _SHARES)
        choose("kind", kind, ("regular", "erdos-renyi"))
        for name, number in (("num_graphs", num_graphs), ("num_nodes", num_nodes)):
            if number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1")
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}, but must be between 0 and 1")
        for nodes, degree in sizes:
            if not 2 <= degree < nodes or nodes * degree % 2:
                raise ValueError(
                    f"sizes holds ({nodes}, {degree}): no regular graph of so many nodes and such a degree, of which "
                    "as many edges as nodes could be taken out"
                )
        if not sizes:
            raise ValueError("sizes is empty, but must hold pairs of nodes and degree")
        super().__init__(None if root is None else os.fspath(root), transform, pre_transform, pre_filter)
        rng = np.random.default_rng(seed)
        graphs = []
        for _ in range(num_graphs):
            if kind == "regular":
                nodes, degree = sizes[int(rng.integers(len(sizes)))]
                pairs = _regular(nodes, degree, rng)
            else:
                nodes = num_nodes
                upper = np.stack(np.triu_indices(nodes, 1), axis=1)
                pairs = upper[rng.random(len(upper)) < p]
            if directed:
                edges = np.where(rng.random((len(pairs), 1)) < 0.5, pairs, pairs[:, ::-1])
            else:
                edges = np.concatenate([pairs, pairs[:, ::-1]])
            edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
            edge_index = torch.as_tensor(edges.T.astype(np.int64)).contiguous()
            count = count_directed_cycles if directed else count_cycles
            y = count(edge_index, nodes).to(torch.float32).view(1, 4)
            graphs.append(Data(x=torch.ones(nodes, 1), edge_index=edge_index, y=y))
        low, high = (round(share * num_graphs) for share in _SHARES[split])
        fill(self, graphs[low:high])


def _regular(num_nodes: int, degree: int, rng: np.random.Generator) -> np.ndarray:
    """Edges of a random regular graph, without a random choice of as many as there are nodes.

    Half-edges are paired at random; those that would make a loop or a double edge are shuffled and paired again, and
    where none can be paired everything starts anew (Steger and Wormald 1999: nearly uniform).
    """
    edges: set[tuple[int, int]] = set()
    halves: list[int] = []
    while len(edges) < num_nodes * degree // 2:
        if not halves:
            edges, halves = set(), [node for node in range(num_nodes) for _ in range(degree)]
        shuffled = rng.permutation(halves).tolist()
        halves = []
        for pair in zip(shuffled[::2], shuffled[1::2], strict=True):
            edge = (min(pair), max(pair))
            if edge[0] == edge[1] or edge in edges:
                halves += pair
            else:
                edges.add(edge)
        if len(halves) == len(shuffled):
            halves = []
    return np.array(sorted(edges), dtype=np.int64)[rng.permutation(len(edges))[num_nodes:]]
