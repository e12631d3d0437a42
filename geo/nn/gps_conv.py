"""GPS layers with any global module on ragged nodes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.inits import reset
from torch_geometric.nn.resolver import activation_resolver, normalization_resolver

from geo.nn.mamba import BiMamba
from geo.nn.node_order import NodeOrder


class GPSGlobalConv(nn.Module):
    r"""Local message passing and any global module side by side, with the residuals, norms and MLP of GPS.

    The layer of "Recipe for a General, Powerful, Scalable Graph Transformer" (https://arxiv.org/abs/2205.12454) as
    PyG's ``GPSConv`` has it,

    .. math::
        h_i &= \mathrm{norm}_1(x_i + \mathrm{conv}(x, G)_i) + \mathrm{norm}_2(x_i + \mathrm{global}(x, G)_i) \\
        x'_i &= \mathrm{norm}_3(h_i + \mathrm{MLP}(h_i)), \qquad \mathrm{MLP} = W_2 \, \mathrm{act} \, W_1

    What differs from ``GPSConv``: the global module is yours, in place of two kinds of attention by name, and gets the
    nodes of all graphs as they are, in place of a dense batch filled up with zeros. With attention it computes the
    same. A convolution that also makes new edge states, as :class:`GatedGCNConv` does, is understood.

    Args:
        channels: Width of the nodes.
        conv: Message passing, called as ``conv(x, edge_index, **kwargs)``, or None. It returns the nodes or (nodes,
            edge states). The residual of the nodes is added here: build it without one of its own, such as
            ``GatedGCNConv(channels, residual=False)``.
        global_module: Called as ``global_module(x, edge_index, batch)``, with batch None for a single graph; returns
            the nodes, or is None.
        dropout: Probability in training. (default: ``0.0``)
        act: Activation of the MLP, as PyG names it. (default: ``'relu'``)
        act_kwargs: Its arguments.
        norm: Normalisation, as PyG names it, or None. The default is that of ``GPSConv``; in training it lets the
            graphs of a batch see each other, in ``eval()`` not: ``'layer_norm'`` with ``norm_kwargs={'mode': 'node'}``
            never does. (default: ``'batch_norm'``)
        norm_kwargs: Its arguments.

    Shapes:
        x :math:`(|V|, C)`, edge_index :math:`(2, |E|)`, batch :math:`(|V|)`; output :math:`(|V|, C)`, with the edge
        states behind it where the convolution makes some.

    Symmetry and derivatives:
        Those of the two modules: equivariant to node permutation where both are, differentiable as often as both, the
        norm and the activation are. A graph's output depends on its batch in training with ``'batch_norm'`` only.

    Raises:
        ValueError: Neither module, an unknown option, or nodes of another width.

    Example:
        >>> import torch
        >>> from geo.nn import GatedGCNConv
        >>> def mean(x, edge_index, batch):
        ...     return x.mean(0, keepdim=True).expand_as(x)
        >>> gps = GPSGlobalConv(8, GatedGCNConv(8, residual=False), mean)
        >>> x, edge_attr = gps(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> x.shape, edge_attr.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        channels: int,
        conv: nn.Module | None,
        global_module: Callable[..., Tensor] | None,
        dropout: float = 0.0,
        act: str = "relu",
        act_kwargs: dict[str, Any] | None = None,
        norm: str | None = "batch_norm",
        norm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels is {channels!r}, but must be an integer of at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout!r}, but must be between 0 and 1")
        if conv is None and global_module is None:
            raise ValueError("conv and global_module are None, but one of them must be given")
        self.channels, self.dropout = channels, float(dropout)
        self.conv = conv
        self.global_module = global_module
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels * 2),
            activation_resolver(act, **(act_kwargs or {})),
            nn.Dropout(dropout),
            nn.Linear(channels * 2, channels),
            nn.Dropout(dropout),
        )
        self.norm1 = None if conv is None else _norm(norm, channels, norm_kwargs)
        self.norm2 = None if global_module is None else _norm(norm, channels, norm_kwargs)
        self.norm3 = _norm(norm, channels, norm_kwargs)
        self._norm_with_batch = self.norm3 is not None and "batch" in inspect.signature(self.norm3.forward).parameters

    def reset_parameters(self) -> None:
        """Draws the weights anew, also those of the two modules."""
        for module in (self.conv, self.global_module, self.mlp, self.norm1, self.norm2, self.norm3):
            reset(module)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
        *,
        global_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Runs the layer; returns the nodes, or (nodes, edge states) where the convolution does.

        Args:
            x: States of the nodes.
            edge_index: Senders and receivers.
            batch: The graph of each node. (default: one graph)
            global_kwargs: Go to the global module.
            **kwargs: Go to the convolution.
        """
        if x.dim() != 2 or x.size(1) != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self.channels})")
        if batch is not None and batch.shape != x.shape[:1]:
            raise ValueError(f"batch has shape {tuple(batch.shape)}, but must be ({x.size(0)},)")
        parts: list[Tensor] = []
        rest: list[Any] = []
        if self.conv is not None:
            local = self.conv(x, edge_index, **kwargs)
            if isinstance(local, tuple):
                local, *rest = local
            parts.append(self._added(x, local, self.norm1, batch))
        if self.global_module is not None:
            far = self.global_module(x, edge_index, batch, **(global_kwargs or {}))
            parts.append(self._added(x, far, self.norm2, batch))
        h = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        out = self._normed(h + self.mlp(h), self.norm3, batch)
        return (out, *rest) if rest else out

    def _added(self, x: Tensor, h: Tensor, norm: nn.Module | None, batch: Tensor | None) -> Tensor:
        return self._normed(F.dropout(h, self.dropout, self.training) + x, norm, batch)

    def _normed(self, h: Tensor, norm: nn.Module | None, batch: Tensor | None) -> Tensor:
        if norm is None:
            return h
        out: Tensor = norm(h, batch=batch) if self._norm_with_batch else norm(h)
        return out

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.channels}, dropout={self.dropout}"


class GPSMambaConv(GPSGlobalConv):
    r"""GPS layer that reads the nodes of each graph, put in order, with a bidirectional Mamba in place of attention.

    The "GPS + Mamba" of Graph Mamba (https://arxiv.org/abs/2402.08678) and its model without tokens:
    :class:`GPSGlobalConv` with

    .. math::
        \mathrm{global}(x, G)_{\pi} = \mathrm{BiMamba}(x_{\pi})

    for an order :math:`\pi` of the nodes by :class:`NodeOrder`. Its time grows linearly with the nodes, that of
    ``torch_geometric.nn.GPSConv`` quadratically. The order is found anew in every call;
    :class:`GraphMamba` does that once for all its layers. Under ``torch.compile`` a batch of several graphs needs
    ``global_kwargs={'batch_size': B}`` in the call.

    Args:
        channels: Width of the nodes.
        conv: As of :class:`GPSGlobalConv`.
        order: Key of :class:`NodeOrder`, which see. (default: ``'degree'``)
        tie: How it breaks ties. (default: ``'random'``)
        dropout: Probability in training. (default: ``0.0``)
        act: Activation of the MLP, as PyG names it. (default: ``'relu'``)
        act_kwargs: Its arguments.
        norm: Normalisation, as of :class:`GPSGlobalConv`. (default: ``'batch_norm'``)
        norm_kwargs: Its arguments.
        **kwargs: Of :class:`BiMamba`: combine, bidirectional, share_A, d_state, d_conv, expand, ...

    Shapes:
        x :math:`(|V|, C)`, edge_index :math:`(2, |E|)`, batch :math:`(|V|)` sorted; output :math:`(|V|, C)`, with the
        edge states behind it where the convolution makes some.

    Symmetry and derivatives:
        Equivariant to node permutation where the order has no ties, else in distribution; differentiable twice where
        the convolution, the norm and the activation are. A graph's output depends on its batch in training with
        ``'batch_norm'`` only.

    Raises:
        ValueError: An unknown option, nodes of another width, or an unsorted batch.

    Example:
        >>> from torch_geometric.nn import SAGEConv
        >>> gps = GPSMambaConv(8, SAGEConv(8, 8), d_state=4)
        >>> gps(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]])).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        channels: int,
        conv: nn.Module | None,
        *,
        order: str | Callable[..., Tensor] = "degree",
        tie: str = "random",
        dropout: float = 0.0,
        act: str = "relu",
        act_kwargs: dict[str, Any] | None = None,
        norm: str | None = "batch_norm",
        norm_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("heads", "attn_type", "attn_kwargs"):
            if name in kwargs:
                raise ValueError(f"{name} belongs to the attention of GPSConv, which a Mamba replaces here")
        mamba = _OrderedMamba(NodeOrder(order, tie=tie), BiMamba(channels, **{"residual": False, **kwargs}))
        super().__init__(channels, conv, mamba, dropout, act, act_kwargs, norm, norm_kwargs)


class _OrderedMamba(nn.Module):
    def __init__(self, order: NodeOrder, mamba: BiMamba) -> None:
        super().__init__()
        self.order, self.mamba = order, mamba

    def reset_parameters(self) -> None:
        self.mamba.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None, batch_size: int | None = None) -> Tensor:
        perm, ptr = self.order(edge_index, batch, x.size(0), batch_size=batch_size)
        place = torch.empty_like(perm)
        place[perm] = torch.arange(perm.numel(), device=perm.device)
        out: Tensor = self.mamba(x[perm], ptr)[place]
        return out


def _norm(norm: str | None, channels: int, kwargs: dict[str, Any] | None) -> nn.Module | None:
    if norm is None:
        return None
    if not isinstance(norm, str):  # a module would be shared by the three places
        raise ValueError(f"norm is {norm!r}, but must be a name of PyG's or None")
    module: nn.Module = normalization_resolver(norm, channels, **(kwargs or {}))
    return module
