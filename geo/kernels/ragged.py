"""Rows of unequal length that can be replaced: paths, deposits, and the edges of a graph that changes."""

from __future__ import annotations

import torch
from torch import Tensor

from geo.ops import segment_sum_csr
from geo.ops.plan import index_from_csr


class Ragged:
    """Rows of unequal length, any of which can be replaced at a cost that depends on the new row alone."""

    def __init__(self, ptr: Tensor, *columns: Tensor) -> None:
        self.begin, self.count, self.columns = ptr[:-1].clone(), ptr.diff(), list(columns)
        self.used = columns[0].size(0)

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Some rows one after the other: where each begins, and the columns."""
        count = self.count[rows]
        ptr = ptr_of(count)
        source = (self.begin[rows] - ptr[:-1]).repeat_interleave(count)
        source += torch.arange(len(source), device=source.device)
        return ptr, *(column[source] for column in self.columns)

    def packed(self) -> tuple[Tensor, ...]:
        """All rows."""
        return self.take(torch.arange(len(self.begin), device=self.begin.device))

    def append(self, num: int) -> None:
        """Add empty rows."""
        zeros = self.begin.new_zeros(num)
        self.begin, self.count = torch.cat([self.begin, zeros]), torch.cat([self.count, zeros])

    def replace(self, rows: Tensor, ptr: Tensor, *columns: Tensor) -> None:
        """Put other rows in place of some, written behind all others: what was there before is left behind."""
        end = self.used + columns[0].size(0)
        self.count[rows] = 0
        if end > self.columns[0].size(0):  # leave the garbage behind, and room for half as much again
            packed = self.packed()
            self.begin, self.used = packed[0][:-1].clone(), packed[1].size(0)
            end = self.used + columns[0].size(0)
            self.columns = [torch.cat([c, c.new_zeros(end - self.used + end // 2)]) for c in packed[1:]]
        for column, values in zip(self.columns, columns, strict=True):
            column[self.used : end] = values
        self.begin[rows], self.count[rows] = self.used + ptr[:-1], ptr.diff()
        self.used = end


def search(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted key stands, or would stand, among ascending keys; and whether it is there."""
    place = torch.searchsorted(keys, wanted)
    if not len(keys):
        return place, torch.zeros_like(wanted, dtype=torch.bool)
    return place, keys[place.clamp(max=len(keys) - 1)] == wanted


def edited(rows: Ragged, added: Tensor, weight: Tensor, removed: Tensor, width: int) -> tuple[Tensor, ...]:
    """The rows that a change of edges concerns: which, where each begins then, and what is in them."""
    nodes, place = torch.unique(torch.cat([added[0], removed[0]]), return_inverse=True)
    ptr, col, old = rows.take(nodes[nodes < len(rows.begin)])  # the others are new
    key = index_from_csr(ptr, None, len(col)) * width + col
    key_added, by_key = (place[: added.size(1)] * width + added[1]).sort()
    place, found = search(key, place[added.size(1) :] * width + removed[1])
    if not bool(found.all()):
        edge = removed[:, int((~found).nonzero()[0])].tolist()
        raise ValueError(f"edges_removed: expected edges of the graph, got {edge}, which is not there")
    twice = key_added[1:] == key_added[:-1]
    if bool(twice.any()):
        edge = added[:, by_key[int(twice.nonzero()[0])]].tolist()
        raise ValueError(f"edges_added: expected each edge once, got {edge} twice: add up their weights")
    keep = torch.ones_like(key, dtype=torch.bool)
    keep[place] = False
    place, found = search(key, key_added)
    keep[place[found]] = False  # a new weight
    key, order = torch.cat([key[keep], key_added]).sort()
    ptr = torch.searchsorted(key, torch.arange(len(nodes) + 1, device=key.device) * width)
    return nodes, ptr, key % max(width, 1), torch.cat([old[keep], weight[by_key]])[order]


def edges_of(rows: Ragged, nodes: Tensor) -> Tensor:
    """int64 [2, E]: some nodes, and what stands in their rows."""
    ptr, other, _ = rows.take(nodes)
    return torch.stack([nodes[index_from_csr(ptr, None, len(other))], other])


def renumbered(rows: Ragged, kept: Tensor, number: Tensor) -> Ragged:
    """Some rows, whose first column is of nodes."""
    ptr, node, *columns = rows.take(kept)
    return Ragged(ptr, number[node], *columns)


def ptr_of(count: Tensor) -> Tensor:
    """Where rows of such lengths begin, and the last one ends."""
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


def row_sums(ptr: Tensor, weight: Tensor) -> Tensor:
    """Of absolute values, in a fixed order: those that :func:`normalized_adjacency` divides by, bit for bit."""
    out: Tensor = segment_sum_csr(weight.abs(), ptr)
    return out
