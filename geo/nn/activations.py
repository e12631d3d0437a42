"""Activations by name; GELU is :func:`geo.ops.gelu`, since losses on forces differentiate it twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from geo.ops import gelu

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "silu": F.silu, "tanh": torch.tanh, "relu": F.relu}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called `name`; raises ValueError for an unknown one."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"act is {name!r}, but must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[name]
