"""Statistics of `PONITA.calibrate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from geo.nn.kernel_basis import all_reduce


def batch_arguments(data: Any) -> list[dict[str, Any]]:
    """The arguments of `flat_inputs` that each of the batches holds."""
    if isinstance(data, Mapping) or hasattr(data, "pos"):
        data = [data]
    if not isinstance(data, Iterable):
        raise ValueError(f"data is {type(data).__name__}, but must be a batch or an iterable of batches")
    names = ("x", "pos", "edge_index", "batch", "vec", "ori", "mask", "edge_shift")
    batches = []
    for batch in data:
        found = {n: batch.get(n) if isinstance(batch, Mapping) else getattr(batch, n, None) for n in names}
        for name in ("x", "pos"):
            if found[name] is None:
                raise ValueError(
                    f"data has no {name!r}: calibration needs batches with the arguments of PONITA.forward"
                )
        batches.append(found)
    if not batches:
        raise ValueError("data holds no batch, but calibration needs at least one")
    return batches


def center_and_spread(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of each channel (the last axis), and the standard deviation about them, over all batches and ranks."""
    rows = []
    for value in values:
        flat = value.double().flatten(0, -2)
        rows.append(torch.stack((flat.sum(0), flat.square().sum(0), flat.new_full(flat.shape[1:], float(len(flat))))))
    total, squares, count = all_reduce(torch.stack(rows).sum(0))
    mean, square = total / count.clamp(min=1), squares / count.clamp(min=1)
    variance = (square - mean.square()).mean()
    # A constant with what float32 rounding adds in a few layers is no variation: it would be blown up.
    return mean, torch.where(variance > 1e-8 * square.mean(), variance, torch.zeros_like(variance)).sqrt()


def inverse_or_one(spread: Tensor) -> Tensor:
    """1 / spread, and 1 where nothing varies (constant inputs that all nodes see alike, no edges)."""
    return torch.where(spread > 0, 1 / spread.clamp(min=1e-300), torch.ones_like(spread))
