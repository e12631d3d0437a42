"""From points to points with directions: one for each edge that arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from geo.transforms.add_radius_graph import AddRadiusGraph


class PositionOrientationData(Data):  # type: ignore[misc]
    """Lifted data; in a batch, ``proj_index`` counts base nodes (``num_proj`` of each graph), not lifted ones."""

    def __inc__(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """PyG's increment of an attribute when graphs are batched."""
        if key == "proj_index":
            return int(self.num_proj)
        return super().__inc__(key, value, *args, **kwargs)


class LiftToPositionOrientation(BaseTransform):  # type: ignore[misc]
    r"""Makes a cloud in position-orientation space: a node at :math:`x_t` with direction to :math:`x_s` for each edge.

    Each edge :math:`(s, t)` that is not a loop becomes the lifted node :math:`(x_t, n)`,
    :math:`n = (x_s + s_{st} - x_t) / |\cdot|`. All lifted nodes of :math:`s` are joined to all of :math:`t` for each
    base edge :math:`(s, t)`, and those of one node among themselves. For ``geo.nn.PONITA(num_ori=-1)``, whose output
    ``proj_index`` brings back to base nodes; the point-cloud mode of https://arxiv.org/abs/2310.02970.

    It differs from the official code in working without torch_scatter and torch_sparse, and in periodic images. A base
    node where no edge arrives has no lifted node, and gets zeros when projected back.

    Args:
        source: Which edges give directions: ``'edges'``, those of ``edge_index``, or ``'bonds'``, those of
            ``bond_index``; base edges are those of ``edge_index`` in both cases. (default: ``'edges'``)
        radius: If given, base edges are all pairs within this distance instead. (default: ``None``)
        max_edges: Bound on the edges of that radius graph. (default: no limit)

    Shapes:
        Reads pos :math:`(|V|, n)`, edge_index :math:`(2, |E|)`, edge_shift :math:`(|E|, n)`, x, vec and z with one row
        per node. Returns lifted pos and ori :math:`(|V'|, n)`, x, vec, z, edge_index :math:`(2, |E'|)`, edge_shift
        :math:`(|E'|, n)`, proj_index :math:`(|V'|)` and num_proj. Lifted nodes are ordered by base node, then by edge.

    Symmetry and derivatives:
        Directions turn with the positions; what is kept of graph-level attributes is unchanged.

    Example:
        >>> data = Data(pos=torch.eye(3), edge_index=torch.tensor([[0, 1, 2], [1, 0, 0]]))
        >>> lifted = LiftToPositionOrientation()(data)
        >>> lifted.proj_index.tolist(), lifted.ori.shape
        ([0, 0, 1], torch.Size([3, 3]))
    """

    def __init__(self, source: str = "edges", radius: float | None = None, max_edges: int | None = None) -> None:
        if source not in ("edges", "bonds"):
            raise ValueError(f"source is {source!r}, but must be 'edges' or 'bonds'")
        self.source = source
        self.graph = None if radius is None else AddRadiusGraph(radius, max_edges)

    def forward(self, data: Data) -> Data:
        """Returns the lifted cloud."""
        pos = data.pos
        if pos is None or pos.dim() != 2 or not pos.is_floating_point():
            given = "missing" if pos is None else f"{pos.dtype} {tuple(pos.shape)}"
            raise ValueError(f"pos is {given}, but must be a floating tensor (|V|, n)")
        num_nodes = pos.size(0)
        edge_index, edge_shift = _edges(data, "edge_index", "edge_shift", required=self.graph is None)
        if self.source == "bonds":
            bonds, bond_shift = _edges(data, "bond_index", "bond_shift", required=True)
        else:
            bonds, bond_shift = _edges(data, "edge_index", "edge_shift", required=True)
        if self.graph is not None:
            near = self.graph(Data(pos=pos, cell=data.get("cell"), pbc=data.get("pbc")))
            edge_index, edge_shift = near.edge_index, near.edge_shift

        loop = (bonds[0] == bonds[1]) & (bond_shift == 0).all(1)
        bonds, bond_shift = bonds[:, ~loop], bond_shift[~loop]
        proj_index, order = torch.sort(bonds[1], stable=True)
        bonds, bond_shift = bonds[:, order], bond_shift[order]
        direction = pos[bonds[0]] + bond_shift - pos[bonds[1]]
        length = direction.norm(dim=1, keepdim=True)
        if bool((length == 0).any()):
            s, t = bonds[:, int((length[:, 0] == 0).nonzero()[0])].tolist()
            raise ValueError(f"pos[{s}] equals pos[{t}], so the edge ({s}, {t}) has no direction")

        base_loop = (edge_index[0] == edge_index[1]) & (edge_shift == 0).all(1)
        node = torch.arange(num_nodes, device=pos.device)
        edge_index = torch.cat((edge_index[:, ~base_loop], node.expand(2, -1)), 1)
        edge_shift = torch.cat((edge_shift[~base_loop], edge_shift.new_zeros(num_nodes, pos.size(1))))
        count = torch.bincount(proj_index, minlength=num_nodes)
        start = count.cumsum(0) - count
        of_source, of_target = count[edge_index[0]], count[edge_index[1]]
        pairs = of_source * of_target
        edge = torch.repeat_interleave(torch.arange(len(pairs), device=pos.device), pairs)
        step = torch.arange(edge.numel(), device=pos.device) - (pairs.cumsum(0) - pairs)[edge]
        lifted_source = start[edge_index[0]][edge] + step // of_target[edge].clamp(min=1)
        lifted_target = start[edge_index[1]][edge] + step % of_target[edge].clamp(min=1)

        out = PositionOrientationData()
        dropped = (
            "pos",
            "edge_index",
            "edge_shift",
            "edge_attr",
            "edge_weight",
            "bond_index",
            "bond_shift",
            "num_nodes",
        )
        for key, value in data:
            if key not in dropped:
                out[key] = value[bonds[1]] if key in ("x", "vec", "z") else value
        out.pos, out.ori = pos[bonds[1]], direction / length
        sort = torch.sort(lifted_target, stable=True).indices
        out.edge_index = torch.stack((lifted_source, lifted_target))[:, sort]
        out.edge_shift = edge_shift[edge][sort]
        out.proj_index, out.num_proj = proj_index, num_nodes
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}(source={self.source!r}, radius={None if self.graph is None else self.graph.r})"


def _edges(data: Data, key: str, shift_key: str, required: bool) -> tuple[Tensor, Tensor]:
    index, shift, pos = data.get(key), data.get(shift_key), data.pos
    if index is None:
        if required:
            raise ValueError(f"{key} is missing, but the lifting makes a node of each of its edges")
        index = torch.zeros(2, 0, dtype=torch.int64, device=pos.device)
    if index.dim() != 2 or index.size(0) != 2 or index.dtype != torch.int64:
        raise ValueError(f"{key} is {index.dtype} {tuple(index.shape)}, but must be int64 (2, |E|)")
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= pos.size(0)):
        raise IndexError(f"{key} has entries in [{index.min()}, {index.max()}], but must be in [0, {pos.size(0)})")
    if shift is None:
        shift = pos.new_zeros(index.size(1), pos.size(1))
    if shift.shape != (index.size(1), pos.size(1)):
        raise ValueError(f"{shift_key} has shape {tuple(shift.shape)}, but must be {(index.size(1), pos.size(1))}")
    return index, shift
