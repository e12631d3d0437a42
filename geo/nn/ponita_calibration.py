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


def spread(values: list[Tensor]) -> Tensor:
    """Standard deviation of all entries, over all batches and ranks."""
    parts = [v.double() for v in values]
    rows = [torch.stack((p.sum(), p.square().sum(), p.new_tensor(float(p.numel())))) for p in parts]
    moments = all_reduce(torch.stack(rows).sum(0))
    mean = moments[0] / moments[2].clamp(min=1)
    return (moments[1] / moments[2].clamp(min=1) - mean.square()).clamp(min=0).sqrt()


def ratio_or_one(wanted: Tensor, found: Tensor) -> Tensor:
    """Wanted / found, and 1 where one of them is zero (a constant input, no edges)."""
    fine = (wanted > 0) & (found > 0)
    return torch.where(fine, wanted / torch.where(fine, found, torch.ones_like(found)), torch.ones_like(found))
