"""Linear maps with a norm and an activation between them, shared by several layers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.activations import activation

NORMS: dict[str, Callable[[int], nn.Module]] = {"layer_norm": nn.LayerNorm, "batch_norm": nn.BatchNorm1d}


def make_norm(norm: str | None, width: int) -> nn.Module:
    """A norm by name; None gives the identity, an unknown name a ValueError."""
    if norm is None:
        return nn.Identity()
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}, but must be 'layer_norm', 'batch_norm' or None")
    return NORMS[norm](width)


class MLP(nn.Module):
    """Linear maps with a norm, an activation and dropout after each but the last."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int,
        norm: str | None,
        act: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [in_channels, *[hidden] * (num_layers - 1), out_channels]
        self.lins = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(num_layers - 1))
        self._act, self.dropout = activation(act), float(dropout)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for module in (*self.lins, *self.norms):
            if not isinstance(module, nn.Identity):
                module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """[*, in_channels] to [*, out_channels]."""
        for lin, norm in zip(self.lins[:-1], self.norms, strict=True):
            x = F.dropout(self._act(norm(lin(x))), self.dropout, self.training)
        out: Tensor = self.lins[-1](x)
        return out
