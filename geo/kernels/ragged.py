"""Rows of unequal length that can be replaced."""

from __future__ import annotations

import torch
from torch import Tensor


class Ragged:
    """Rows of unequal length, any of which can be replaced at a cost that depends on the new row alone."""

    def __init__(self, ptr: Tensor, *columns: Tensor) -> None:
        self.begin, self.count, self.columns = ptr[:-1].clone(), ptr.diff(), list(columns)
        self.used = columns[0].size(0)

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Some rows one after the other: where each begins, and the columns."""
        count = self.count[rows]
        ptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
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
