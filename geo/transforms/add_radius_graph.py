"""Edges between all points closer than a radius, with or without a periodic cell."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform


class AddRadiusGraph(BaseTransform):  # type: ignore[misc]
    r"""Joins all pairs of points at a distance of at most `r`: complete, never silently truncated.

    Edge :math:`(j, i)` has the vector :math:`p_j + s_{ij} - p_i`, where the shift :math:`s` is a vector of the cell's
    lattice that picks the periodic image of the sender. In a cell shorter than the radius a pair has several edges, and
    a point is joined to its own images. Without a cell the search is scipy's ``cKDTree``, with one ``vesin`` (extra
    ``atoms``). PyG's own radius graph keeps at most ``max_num_neighbors`` (32) neighbours and has no cell.

    A point is not joined to itself: :class:`geo.nn.PONITA` adds a node's own term without an edge.

    Args:
        r: The radius, in the unit of ``pos``.
        max_edges: A graph with more edges is refused with a ValueError. (default: no limit)
        loop: Also join each point to itself with shift zero. (default: ``False``)

    Shapes:
        Reads ``pos`` :math:`(|V|, n)` and, if present, ``cell`` :math:`(3, 3)` or :math:`(1, 3, 3)` (rows are lattice
        vectors) and ``pbc`` :math:`(3)` or :math:`(1, 3)`; a cell without ``pbc`` is periodic along all three. Writes
        ``edge_index`` :math:`(2, |E|)`, sorted by receiver, sender and shift, and ``edge_shift`` :math:`(|E|, n)`.

    Symmetry and derivatives:
        The set of edge vectors does not change under rotation, translation or wrapping of points into the cell. No
        gradient flows through the choice of edges; recompute vectors from ``pos`` and ``edge_shift``.

    Example:
        >>> data = Data(pos=torch.tensor([[0., 0., 0.], [1., 0., 0.], [3., 0., 0.]]))
        >>> AddRadiusGraph(r=2.0)(data).edge_index.tolist()
        [[1, 0, 2, 1], [0, 1, 1, 2]]
    """

    def __init__(self, r: float, max_edges: int | None = None, loop: bool = False) -> None:
        if not (isinstance(r, (int, float)) and r > 0 and math.isfinite(r)):
            raise ValueError(f"r is {r!r}, but must be a positive length")
        if max_edges is not None and max_edges < 0:
            raise ValueError(f"max_edges is {max_edges!r}, but must be a number of edges or None")
        self.r, self.max_edges, self.loop = float(r), max_edges, loop

    def forward(self, data: Data) -> Data:
        """Writes ``edge_index`` and ``edge_shift``."""
        pos = data.pos
        if pos is None or pos.dim() != 2 or not pos.is_floating_point():
            given = "missing" if pos is None else f"{pos.dtype} {tuple(pos.shape)}"
            raise ValueError(f"pos is {given}, but must be a floating tensor (|V|, n)")
        points = pos.detach().cpu().double().numpy()
        if not np.isfinite(points).all():
            row = int(np.argwhere(~np.isfinite(points))[0, 0])
            raise ValueError(f"pos[{row}] is {points[row].tolist()}, but must be finite")
        cell, periodic = _cell(data, points)
        if cell is None:
            source, target = self._open(points)
            shift = np.zeros((len(source), points.shape[1]))
        else:
            source, target, shift = self._periodic(points, cell, periodic)
        if self.loop:
            node = np.arange(len(points))
            source, target = np.concatenate((source, node)), np.concatenate((target, node))
            shift = np.concatenate((shift, np.zeros((len(node), points.shape[1]))))
        self._limit(len(source))
        order = np.lexsort((*shift.T[::-1], source, target))
        data.edge_index = torch.from_numpy(np.stack((source, target))[:, order]).to(pos.device, torch.int64)
        data.edge_shift = torch.from_numpy(shift[order]).to(pos.device, pos.dtype)
        return data

    def _limit(self, count: int) -> None:
        if self.max_edges is not None and count > self.max_edges:
            raise ValueError(
                f"the radius graph with r={self.r} has {count} edges, but max_edges is {self.max_edges}: "
                "take a smaller radius or a larger limit"
            )

    def _open(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(points):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        from scipy.spatial import cKDTree

        tree = cKDTree(points)
        if self.max_edges is not None:  # counted before they are stored
            self._limit(int(tree.count_neighbors(tree, self.r)) - len(points) * (not self.loop))
        pairs = tree.query_pairs(self.r, output_type="ndarray")
        return np.concatenate((pairs[:, 0], pairs[:, 1])), np.concatenate((pairs[:, 1], pairs[:, 0]))

    def _periodic(
        self, points: np.ndarray, cell: np.ndarray, periodic: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not len(points):
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3))
        try:
            from vesin import NeighborList
        except ImportError as error:
            raise ImportError("radius graphs in a periodic cell need vesin: pip install 'torch-geo[atoms]'") from error
        # A hair more than r: vesin's test at the very radius is not ours, so the last word is the line below.
        search = NeighborList(cutoff=self.r * (1 + 1e-9), full_list=True)
        target, source, image = search.compute(points=points, box=cell, periodic=periodic, quantities="ijS")
        source, target = source.astype(np.int64), target.astype(np.int64)
        shift = image.astype(np.float64) @ cell
        vector = points[source] + shift - points[target]
        keep = (vector * vector).sum(1) <= self.r * self.r
        return source[keep], target[keep], shift[keep]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(r={self.r}, max_edges={self.max_edges})"


def _cell(data: Data, points: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The lattice (rows) and which of its directions are periodic; no lattice where none is."""
    cell, pbc = getattr(data, "cell", None), getattr(data, "pbc", None)
    none = np.zeros(3, dtype=bool)
    if pbc is not None:
        pbc = torch.as_tensor(pbc).cpu().reshape(-1).bool().numpy()
        if pbc.shape != (3,):
            raise ValueError(f"pbc has {pbc.size} entries, but must have 3")
    if cell is None:
        if pbc is not None and pbc.any():
            raise ValueError(f"pbc is {pbc.tolist()}, but the data have no cell")
        return None, none
    box = torch.as_tensor(cell).detach().cpu().double().numpy()
    if box.shape not in ((3, 3), (1, 3, 3)):
        raise ValueError(f"cell has shape {box.shape}, but must be (3, 3) or (1, 3, 3)")
    box = box.reshape(3, 3)
    periodic = np.ones(3, dtype=bool) if pbc is None else pbc
    if not periodic.any():
        return None, none
    if points.shape[1] != 3:
        raise ValueError(f"pos has shape {points.shape}, but a periodic cell needs three dimensions")
    if not np.isfinite(box).all():
        raise ValueError(f"cell is {box.tolist()}, but must be finite")
    return _complete_cell(box, periodic, points), periodic


def _complete_cell(box: np.ndarray, periodic: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The cell, with directions that are not periodic replaced by unit vectors across the periodic ones."""
    box = box.copy()
    if not periodic.all():
        _, _, basis = np.linalg.svd(box[periodic])
        box[~periodic] = basis[periodic.sum() :]
    lengths = np.linalg.norm(box, axis=1)
    if abs(np.linalg.det(box)) <= 1e-9 * max(float(np.prod(lengths)), 1e-300):
        raise ValueError(f"cell is {box.tolist()}, but its periodic vectors must span a volume")
    return box
