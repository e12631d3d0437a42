"""Where random walks along, and against, the edges of a directed graph end up."""

from __future__ import annotations

import numpy as np
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from geo.transforms.add_laplacian_spectrum import WeightedGraph, read_edges
from geo.transforms.spectrum_solver import Array

_COLUMNS = 256  # end nodes of walks treated at a time


class AddDirectedRandomWalkPE(BaseTransform):  # type: ignore[misc]
    r"""Adds return probabilities of random walks along the edges and against them.

    The random-walk encodings of `Transformers Meet Directed Graphs <https://arxiv.org/abs/2302.00049>`_. With :math:`T`
    the transition matrix of walks along the edges (out-adjacency with rows divided by their sums, a walk stays where no
    edge leaves) and :math:`R` that of the reversed graph, the encoding of a pair of nodes is

    .. math::
        \phi_{ij} = \big[ (T^1)_{ij}, \dots, (T^K)_{ij}, \; (R^1)_{ij}, \dots, (R^K)_{ij} \big]

    and with ``ppr`` :math:`= a` also personalised PageRank, :math:`\big( a (I - (1 - a) T)^{-1} \big)_{ij}`, at the end
    of each half. A node gets :math:`\phi_{ii}`. Repeated edges count once, with the mean of their weights; loops stay.

    Args:
        walk_length: K, the steps of the longest walks.
        ppr: Restart probability :math:`0 < a \le 1` of PageRank; None: without. (default: ``None``)
        relative: Also store the encodings of all pairs. (default: ``False``)
        attr_name: Attribute for the encoding of nodes. (default: ``'directed_rw_pe'``)
        weight_name: Attribute with the edge weights; where it is absent, and for None, they are 1. (default:
            ``'edge_weight'``)
        dtype: Of what is stored. (default: ``torch.float32``)

    Raises:
        ValueError: If an argument is not allowed or, when called, a node is out of range or a weight is negative, not
            finite or requires grad.

    Shapes:
        Reads ``edge_index``, the weights and the number of nodes :math:`n`. Adds, with :math:`F = 2 K`, or
        :math:`2 K + 2` with ``ppr``

        - ``directed_rw_pe`` :math:`(n, F)`
        - with ``relative``: ``directed_rw_pe_pairs`` :math:`(n^2, F)`, pair (i, j) in row :math:`i n + j`, so that
          graphs batch one after the other

    Example:
        >>> ring = Data(edge_index=torch.tensor([[0, 1, 2], [1, 2, 0]]), num_nodes=3)
        >>> AddDirectedRandomWalkPE(walk_length=3)(ring).directed_rw_pe[0].tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    """

    def __init__(
        self,
        walk_length: int,
        ppr: float | None = None,
        relative: bool = False,
        attr_name: str = "directed_rw_pe",
        weight_name: str | None = "edge_weight",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(walk_length, int) or isinstance(walk_length, bool) or walk_length < 1:
            raise ValueError(f"walk_length={walk_length!r} must be an integer of at least 1")
        if ppr is not None and not 0 < ppr <= 1:
            raise ValueError(f"ppr={ppr} must be above 0 and at most 1, or None")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype} must be a floating point type")
        self.walk_length = walk_length
        self.ppr = ppr
        self.relative = relative
        self.attr_name = attr_name
        self.weight_name = weight_name
        self.dtype = dtype

    def forward(self, data: Data) -> Data:
        """Add the encodings to a graph."""
        graph = read_edges(data, self.weight_name, loops=True)
        num_nodes = graph.num_nodes
        reverse = WeightedGraph(num_nodes, graph.target, graph.source, graph.weight)
        parts = [self._encode(graph), self._encode(reverse)]
        nodes = np.concatenate([part[0] for part in parts], axis=1)
        device = None if data.edge_index is None else data.edge_index.device
        data[self.attr_name] = torch.from_numpy(nodes).to(device, self.dtype)
        if self.relative:
            pairs = np.concatenate([part[1] for part in parts], axis=2).reshape(num_nodes**2, nodes.shape[1])
            data[f"{self.attr_name}_pairs"] = torch.from_numpy(pairs).to(device, self.dtype)
        return data

    def _encode(self, graph: WeightedGraph) -> tuple[Array, Array]:
        """Of walks along the edges: encodings of nodes [n, F / 2], and of pairs [n, n, F / 2] if they are wanted."""
        from scipy.sparse import coo_array, eye_array
        from scipy.sparse.linalg import splu

        size = graph.num_nodes
        total = np.bincount(graph.source, weights=graph.weight, minlength=size)
        sink = np.flatnonzero(total == 0)
        moves = graph.weight > 0
        source, target = graph.source[moves], graph.target[moves]
        entries = np.concatenate([graph.weight[moves] / total[source], np.ones(sink.size)])
        ends = (np.concatenate([source, sink]), np.concatenate([target, sink]))
        transition = coo_array((entries, ends), shape=(size, size)).tocsr()
        width = self.walk_length + (self.ppr is not None)
        nodes = np.zeros((size, width))
        pairs = np.zeros((size, size if self.relative else 0, width))
        if self.ppr is not None and size:
            factor = splu((eye_array(size) - (1 - self.ppr) * transition).tocsc())
        for start in range(0, size, _COLUMNS):
            column = np.arange(start, min(start + _COLUMNS, size))
            arrived = np.zeros((size, column.size))
            arrived[column, column - start] = 1
            found = [factor.solve(self.ppr * arrived)] if self.ppr is not None else []
            for step in range(self.walk_length):
                arrived = transition @ arrived
                found.insert(step, arrived)
            for at, values in enumerate(found):
                nodes[column, at] = values[column, column - start]
                if self.relative:
                    pairs[:, column, at] = values
        return nodes, pairs

    def __repr__(self) -> str:
        return f"{type(self).__name__}(walk_length={self.walk_length}, ppr={self.ppr}, relative={self.relative})"
