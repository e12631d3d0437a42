"""Where are the mines? A grid graph for node classification."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import fill

_SEEN = 5  # the largest number of neighbouring mines with a feature of its own: 5 or more share one


class Minesweeper(InMemoryDataset):
    """The game of mines as a graph, made by the rule of Platonov et al. (https://arxiv.org/abs/2302.11640).

    A square grid in which each cell is joined to its up to eight neighbours; a fixed share of the cells, drawn without
    replacement, are mines. The class of a cell is whether it is one. Its features are one-hot: the number of mines
    around it, except for a share of the cells where that is unknown and the first feature says so. The published file,
    :class:`torch_geometric.datasets.HeterophilousGraphDataset`, is one draw of this rule at the default settings; this
    class draws another with each seed, without a download. Splits are 50 % training, 25 % validation and 25 % test
    cells, stratified by class as the published ones are.

    The one item has ``x`` [V, 7] float32 (unknown; 0, 1, 2, 3, 4 and "5 or more" mines around), ``y`` [V] int64 (1 is a
    mine), ``edge_index`` [2, E] int64 with both directions, and ``train_mask``, ``val_mask``, ``test_mask``
    [V, num_splits] bool. Nodes are numbered row by row.

    Args:
        root: Not used for files; kept for the interface of PyG.
        size: Cells on a side; the graph has ``size * size`` nodes.
        mine_ratio: Share of the cells that are mines.
        unknown_ratio: Share of the cells that do not show their number.
        num_splits: Random splits.
        seed: Seed of the mines, of what is unknown and of the splits.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the samples for which it is true.

    Raises:
        ValueError: A size or a number of splits below 1, or a share outside [0, 1].

    Example:
        >>> from geo.datasets import Minesweeper
        >>> data = Minesweeper(size=20)[0]
        >>> data.x.shape, int(data.y.sum()), data.train_mask.shape
        (torch.Size([400, 7]), 80, torch.Size([400, 10]))
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        size: int = 100,
        *,
        mine_ratio: float = 0.2,
        unknown_ratio: float = 0.5,
        num_splits: int = 10,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        for name, number in (("size", size), ("num_splits", num_splits)):
            if number < 1:
                raise ValueError(f"{name} is {number}, but must be at least 1")
        for name, share in (("mine_ratio", mine_ratio), ("unknown_ratio", unknown_ratio)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, but must be between 0 and 1")
        super().__init__(None if root is None else os.fspath(root), transform, pre_transform, pre_filter)
        rng = np.random.default_rng(seed)
        num_nodes = size * size
        edges = _grid(size)
        mines = np.zeros(num_nodes, dtype=np.int64)
        mines[rng.permutation(num_nodes)[: round(mine_ratio * num_nodes)]] = 1
        around = np.bincount(edges[1], weights=mines[edges[0]], minlength=num_nodes).astype(np.int64)
        column = 1 + np.minimum(around, _SEEN)
        column[rng.permutation(num_nodes)[: round(unknown_ratio * num_nodes)]] = 0
        masks = np.stack([_split(mines, rng) for _ in range(num_splits)], axis=-1)
        data = Data(
            x=torch.as_tensor(np.eye(_SEEN + 2, dtype=np.float32)[column]),
            y=torch.as_tensor(mines),
            edge_index=torch.as_tensor(edges),
            **{f"{name}_mask": torch.as_tensor(masks == part) for part, name in enumerate(("train", "val", "test"))},
        )
        fill(self, [data])


def _grid(size: int) -> np.ndarray:
    """Both directions of all edges, sorted by source and target."""
    row, column = np.divmod(np.arange(size * size), size)
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    there = np.stack([(row + i) * size + column + j for i, j in steps], axis=1)
    inside = np.stack(
        [(0 <= row + i) & (row + i < size) & (0 <= column + j) & (column + j < size) for i, j in steps], 1
    )
    here = np.broadcast_to(np.arange(size * size)[:, None], there.shape)
    return np.stack([here[inside], there[inside]])


def _split(mines: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0, 1 or 2 for each node: half, a quarter and the rest of each class."""
    part = np.full(len(mines), 2)
    for value in (0, 1):
        nodes = rng.permutation(np.nonzero(mines == value)[0])
        half, quarter = round(0.5 * len(nodes)), round(0.75 * len(nodes))
        part[nodes[:half]], part[nodes[half:quarter]] = 0, 1
    return part
