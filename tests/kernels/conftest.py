from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
import torch
from torch import Tensor

GRAPHS: dict[str, Callable[[], nx.Graph]] = {
    "karate": nx.karate_club_graph,
    "er100": lambda: nx.gnp_random_graph(100, 0.04, seed=3),
    "tree127": lambda: nx.balanced_tree(2, 6),
    "reg100": lambda: nx.random_regular_graph(10, 100, seed=0),
}


@pytest.fixture
def named_graph() -> Callable[[str], Tensor]:
    """The largest component of a graph of the papers' experiments, both directions of each edge, unweighted."""

    def edge_index(name: str) -> Tensor:
        graph = GRAPHS[name]()
        graph = graph.subgraph(max(nx.connected_components(graph), key=len))
        graph = nx.convert_node_labels_to_integers(graph, ordering="sorted")
        half = torch.tensor(list(graph.edges)).t()
        return torch.cat([half, half.flip(0)], dim=1)

    return edge_index
