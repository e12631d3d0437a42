"""What `PONITA.forward` accepts: checks with clear errors, and one flat form for sparse and dense batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import geo.ops.bounds as bounds
from geo.nn.se_conv import complete_edges


class Expected(NamedTuple):
    """What a model expects of its inputs."""

    in_channels: int
    in_vec: int
    dim: int
    num_ori: int
    frames: bool
    dtype: torch.dtype
    device: torch.device


class Inputs(NamedTuple):
    """Checked, flat (not padded) arguments of `PONITA.forward`."""

    x: Tensor
    pos: Tensor
    edge_index: Tensor
    batch: Tensor | None
    vec: Tensor | None
    ori: Tensor | None
    edge_shift: Tensor | None
    node_mask: Tensor | None
    num_graphs: int


def flat_inputs(
    expected: Expected,
    x: Tensor,
    pos: Tensor,
    edge_index: Tensor | None = None,
    batch: Tensor | None = None,
    vec: Tensor | None = None,
    ori: Tensor | None = None,
    mask: Tensor | None = None,
    edge_shift: Tensor | None = None,
    batch_size: int | None = None,
) -> Inputs:
    """Checks the arguments and lays a dense batch out flat, with edges between all pairs where none are given."""
    for name, value in (("x", x), ("pos", pos)):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is {type(value).__name__}, but must be a tensor")
    _check_features(expected, x, pos, vec, ori)
    _check_types(expected, x, pos, vec, ori, edge_shift)
    _check_graph(expected, x, edge_index, batch, mask, edge_shift)
    node_mask = None
    if x.dim() == 3:
        num_graphs, num_nodes = x.shape[:2]
        node_mask = None if mask is None else mask.flatten()
        x, pos = _flat(x, node_mask), _flat(pos, node_mask)
        vec = None if vec is None else _flat(vec, node_mask)
        ori = None if ori is None else _flat(ori, node_mask)
        edge_index = complete_edges(num_graphs, num_nodes, x.device)
        batch = torch.arange(num_graphs, device=x.device).unsqueeze(1).expand(-1, num_nodes).flatten()
    elif batch_size is not None:
        num_graphs = batch_size
    elif batch is not None:
        num_graphs = int(batch.max()) + 1 if batch.numel() else 0
    else:
        num_graphs = 1
    if not torch.compiler.is_compiling():
        _check_values(x, pos, edge_index, edge_shift, batch, vec, ori, num_graphs)
    if edge_index is None:
        edge_index = _all_pairs(batch, x.size(0), x.device)
    return Inputs(x, pos, edge_index, batch, vec, ori, edge_shift, node_mask, num_graphs)


def _flat(value: Tensor, node_mask: Tensor | None) -> Tensor:
    value = value.flatten(0, 1)
    if node_mask is None:
        return value
    return torch.where(node_mask.view(-1, *([1] * (value.dim() - 1))), value, torch.zeros_like(value))


def _check_features(expected: Expected, x: Tensor, pos: Tensor, vec: Tensor | None, ori: Tensor | None) -> None:
    channels, dim, num_ori = expected.in_channels, expected.dim, expected.num_ori
    lead = tuple(x.shape[:-1])
    if x.dim() not in (2, 3) or x.size(-1) != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {channels}) or (B, N, {channels})")
    if pos.shape != (*lead, dim):
        raise ValueError(f"pos has shape {tuple(pos.shape)}, but x of shape {tuple(x.shape)} needs {(*lead, dim)}")
    if (vec is None) != (expected.in_vec == 0):
        raise ValueError(
            f"vec is {'missing' if vec is None else 'given'}, but in_vec is {expected.in_vec} (num_ori={num_ori}): "
            "vectors are given if and only if in_vec > 0"
        )
    if vec is not None and vec.shape != (*lead, expected.in_vec, dim):
        raise ValueError(f"vec has shape {tuple(vec.shape)}, but must be {(*lead, expected.in_vec, dim)}")
    if (ori is None) != (num_ori != -1):
        raise ValueError(
            f"ori is {'missing' if ori is None else 'given'}, but num_ori is {num_ori}: "
            "orientations per node are given with num_ori=-1, and only then"
        )
    frame = (dim, dim) if expected.frames else (dim,)
    if ori is not None and ori.shape != (*lead, *frame):
        raise ValueError(f"ori has shape {tuple(ori.shape)}, but must be {(*lead, *frame)}")


def _check_types(
    expected: Expected, x: Tensor, pos: Tensor, vec: Tensor | None, ori: Tensor | None, edge_shift: Tensor | None
) -> None:
    for name, value in (("x", x), ("pos", pos), ("vec", vec), ("ori", ori), ("edge_shift", edge_shift)):
        if value is None:
            continue
        autocast = value.is_floating_point() and torch.is_autocast_enabled(value.device.type)
        if value.dtype != expected.dtype and not autocast:
            raise ValueError(f"{name} is {value.dtype}, but the model is {expected.dtype}: convert one of them")
        if value.device != expected.device:
            raise ValueError(f"{name} is on {value.device}, but the model is on {expected.device}: move one of them")


def _check_graph(
    expected: Expected,
    x: Tensor,
    edge_index: Tensor | None,
    batch: Tensor | None,
    mask: Tensor | None,
    edge_shift: Tensor | None,
) -> None:
    lead = tuple(x.shape[:-1])
    if x.dim() == 3:
        for name, value in (("edge_index", edge_index), ("batch", batch), ("edge_shift", edge_shift)):
            if value is not None:
                raise ValueError(f"{name} is given, but x of shape {tuple(x.shape)} is dense: (B, N, F) has no edges")
        if mask is not None and (mask.shape != lead or mask.dtype != torch.bool):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, but must be bool {lead}")
        return
    if mask is not None:
        raise ValueError(f"mask is given, but x of shape {tuple(x.shape)} is not dense: masks go with (B, N, F)")
    if edge_index is not None and (edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64):
        raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")
    if edge_shift is not None:
        if edge_index is None:
            raise ValueError("edge_shift is given, but edge_index is None: a shift belongs to an edge")
        if edge_shift.shape != (edge_index.size(1), expected.dim):
            wanted = (edge_index.size(1), expected.dim)
            raise ValueError(f"edge_shift has shape {tuple(edge_shift.shape)}, but must be {wanted}: one row per edge")
    if batch is not None and (batch.shape != lead or batch.dtype != torch.int64):
        raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}, but must be int64 {lead}")


def _check_values(
    x: Tensor,
    pos: Tensor,
    edge_index: Tensor | None,
    edge_shift: Tensor | None,
    batch: Tensor | None,
    vec: Tensor | None,
    ori: Tensor | None,
    num_graphs: int,
) -> None:
    """Finite numbers, indices in range. On a GPU this waits once; `geo.ops.check_bounds(False)` leaves it out."""
    if not bounds.reads_values(pos):
        return
    named = (("x", x), ("pos", pos), ("vec", vec), ("ori", ori), ("edge_shift", edge_shift))
    finite = [(name, t.detach()) for name, t in named if t is not None]
    named_indices = (("edge_index", edge_index, pos.size(0)), ("batch", batch, num_graphs))
    indices = [(name, t, bound) for name, t, bound in named_indices if t is not None]
    fine = [torch.isfinite(t).all() for _, t in finite]
    fine += [((t >= 0) & (t < bound)).all() for _, t, bound in indices]
    if bool(torch.stack(fine).all()):
        return
    for name, t in finite:
        bad = (~torch.isfinite(t)).nonzero()
        if len(bad):
            raise ValueError(f"{name}{bad[0].tolist()} is {t[tuple(bad[0])].item()}, but must be finite")
    for name, t, bound in indices:
        bad = ((t < 0) | (t >= bound)).nonzero()
        if len(bad):
            allowed = f"one of the {bound} {'nodes' if name == 'edge_index' else 'graphs'}, in [0, {bound})"
            raise IndexError(f"{name}{bad[0].tolist()} is {t[tuple(bad[0])].item()}, but must be {allowed}")


def _all_pairs(batch: Tensor | None, num_nodes: int, device: torch.device) -> Tensor:
    """All ordered pairs of nodes of the same graph, sorted by receiver (with loops, which the model leaves out)."""
    if batch is None:
        return complete_edges(1, num_nodes, device)
    order = torch.sort(batch, stable=True).indices
    count = torch.bincount(batch)
    start = count.cumsum(0) - count
    partners = count[batch]  # of each node, in the order of nodes
    target = torch.repeat_interleave(torch.arange(num_nodes, device=device), partners)
    step = torch.arange(target.numel(), device=device) - (partners.cumsum(0) - partners)[target]
    return torch.stack((order[start[batch][target] + step], target))


def check_size(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
