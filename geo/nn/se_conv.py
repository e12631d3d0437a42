r"""Convolutions that share their weights over SE(n): kernel bases, point and bundle convolutions, ConvNeXt block.

A kernel is a function of the invariants of a pair of points (:mod:`geo.o3`). It is computed in two steps: an MLP turns
invariants into a basis, once per forward pass and shared by all layers, and each layer has a bias-free linear map of
its own from basis to channels. The layers here do the second step, and never store the kernel: the linear map, the
product with the sender's features and the sum over neighbours are one op
(:func:`geo.ops.gather_linear_mul_segment_sum`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.activations import activation
from geo.ops import SegmentPlan, fiber_mul_sum, gather_linear_mul_segment_sum, gather_mul_segment_sum


class PointConv(nn.Module):
    r"""Convolution over a point cloud of any homogeneous space, with a kernel that depends on invariants only.

    .. math::
        f'_i = \sum_{j \in N(i)} k(a_{ij})\, f_j + b, \qquad k(a) = W \phi(a)

    from "Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in Position-Orientation Space"
    (https://arxiv.org/abs/2310.02970). The space is in the invariants :math:`a_{ij}` that made the basis: R^n,
    positions with orientations, or frames. With ``groups=1`` the kernel is a matrix; the sum over neighbours is then
    done on the basis and no matrix per edge is stored.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; with ``'depthwise'`` the same.
        basis_dim: Number of basis functions :math:`B`.
        groups: ``'depthwise'``, or 1 for a dense kernel. (default: ``'depthwise'``)
        bias: Adds a bias. (default: ``True``)

    Shapes:
        x :math:`(|V|, C)`, edge_index :math:`(2, |E|)`, kernel_basis :math:`(|E|, B)`; output :math:`(|V|, C')`. Dense:
        x :math:`(N_b, N, C)`, kernel_basis :math:`(N_b, N, N, B)` (receiver first), mask :math:`(N_b, N)`.

    Symmetry and derivatives:
        Equivariant to node permutation; differentiable twice; a graph's output does not depend on its batch.

    Example:
        >>> conv = PointConv(8, 8, basis_dim=16)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 8), edge_index, torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        basis_dim: int,
        groups: str | int = "depthwise",
        bias: bool = True,
    ) -> None:
        super().__init__()
        _check_groups(groups, in_channels, out_channels)
        self.in_channels, self.out_channels, self.basis_dim, self.groups = in_channels, out_channels, basis_dim, groups
        shape = (out_channels, basis_dim) if groups == "depthwise" else (out_channels, in_channels, basis_dim)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _reset_kernel(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None,
        kernel_basis: Tensor,
        *,
        self_basis: Tensor | None = None,
        plan: SegmentPlan | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Runs the convolution.

        Args:
            x: Features.
            edge_index: Senders and receivers; ``None`` for the dense layout.
            kernel_basis: Basis of each edge.
            self_basis: Basis of a point with itself ``[1, B]``: adds the node's own term. (default: no such term)
            plan: The edges' :class:`geo.ops.SegmentPlan`, to share between layers. (default: made here)
            mask: Which points of a dense batch are real. (default: all)
        """
        if edge_index is None and plan is None:
            flat, edge_index, kernel_basis = _flatten_dense(x, kernel_basis, mask)
            flat_out = self.forward(flat, edge_index, kernel_basis, self_basis=self_basis)
            return flat_out.view(*x.shape[:2], self.out_channels)
        if plan is None:
            plan = SegmentPlan.from_edge_index(_edges(edge_index), x.size(0))
        out = self.spatial(x, kernel_basis, self_basis, plan)
        return out if self.bias is None else out + self.bias

    def spatial(self, x: Tensor, kernel_basis: Tensor, self_basis: Tensor | None, plan: SegmentPlan) -> Tensor:
        """The convolution without bias."""
        x, weight = x.to(kernel_basis.dtype), self.weight.to(kernel_basis.dtype)
        if self.groups == "depthwise":
            out = gather_linear_mul_segment_sum(
                x.unsqueeze(1), kernel_basis.unsqueeze(1), weight, None, None, plan=plan
            ).squeeze(1)
            return out if self_basis is None else out + x * F.linear(self_basis, weight)
        per_basis = _sum_per_basis(x, kernel_basis, plan)
        if self_basis is not None:
            per_basis = per_basis + x.unsqueeze(1) * self_basis.unsqueeze(-1)
        return torch.einsum("vbc,dcb->vd", per_basis, weight)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.in_channels}, {self.out_channels}, basis_dim={self.basis_dim}, groups={self.groups!r}"


class PoniConv(nn.Module):
    r"""Convolution in position-orientation space where every position carries the same grid of orientations.

    Separable (three factors, the third being the channel mixing of the block around it):

    .. math::
        f^1(x_i, n) &= \sum_{j \in N(i)} k_1(r_{ij} \cdot n, |r_{ij}|)\, f(x_j, n) \\
        f^2(x_i, n) &= \sum_{n'} w_{n'}\, k_2(n \cdot n')\, f^1(x_i, n')

    full: :math:`f'(x_i, n) = \sum_j \sum_{n'} w_{n'}\, k(a_{ij}(n, n'))\, f(x_j, n')`. From "Fast, Expressive SE(n)
    Equivariant Networks through Weight-Sharing in Position-Orientation Space" (https://arxiv.org/abs/2310.02970).

    It differs from the official code in the quadrature weights :math:`w` (there 1/O), in ``groups=1`` (there broken:
    here :math:`k_2`, or :math:`k`, is a matrix), and in calibrating only when asked to
    (:meth:`geo.nn.PONITA.calibrate`).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; with ``'depthwise'`` the same.
        basis_dim: Number of basis functions :math:`B`.
        groups: ``'depthwise'``, or 1 for a dense kernel. (default: ``'depthwise'``)
        separable: The two factors instead of the full kernel. (default: ``True``)
        bias: Adds a bias. (default: ``True``)
        num_ori: If given, inputs must have this many orientations. (default: ``None``)

    Shapes:
        x :math:`(|V|, O, C)`, edge_index :math:`(2, |E|)`, kernel_basis :math:`(|E|, O, B)`, or full
        :math:`(|E|, O, O, B)`, fiber_basis :math:`(O, O, B)`; receiving orientation first; output :math:`(|V|, O, C')`.
        Dense: x :math:`(N_b, N, O, C)`, kernel_basis :math:`(N_b, N, N, O, B)` (receiver first), mask :math:`(N_b, N)`.

    Symmetry and derivatives:
        Equivariant to node permutation, and to the rotations that map the grid to itself exactly, to others within the
        grid's error; differentiable twice; a graph's output does not depend on its batch.

    Example:
        >>> conv = PoniConv(8, 8, basis_dim=16)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 12, 8), edge_index, torch.randn(3, 12, 16), torch.randn(12, 12, 16)).shape
        torch.Size([3, 12, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        basis_dim: int,
        groups: str | int = "depthwise",
        separable: bool = True,
        bias: bool = True,
        num_ori: int | None = None,
    ) -> None:
        super().__init__()
        _check_groups(groups, in_channels, out_channels)
        self.in_channels, self.out_channels, self.basis_dim, self.groups = in_channels, out_channels, basis_dim, groups
        self.separable, self.num_ori = separable, num_ori
        dense = groups != "depthwise"
        kernel = (out_channels, in_channels, basis_dim) if dense and not separable else (in_channels, basis_dim)
        self.weight = nn.Parameter(torch.empty(kernel))
        self.fiber_weight: nn.Parameter | None = None
        if separable:
            fiber = (out_channels, in_channels, basis_dim) if dense else (in_channels, basis_dim)
            self.fiber_weight = nn.Parameter(torch.empty(fiber))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _reset_kernel(self.weight)
        if self.fiber_weight is not None:
            _reset_kernel(self.fiber_weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor | None,
        kernel_basis: Tensor,
        fiber_basis: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        self_basis: Tensor | None = None,
        plan: SegmentPlan | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Runs the convolution.

        Args:
            x: Features.
            edge_index: Senders and receivers; ``None`` for the dense layout.
            kernel_basis: Basis of each edge.
            fiber_basis: Basis of each pair of orientations (separable only).
            weight: Quadrature weights of the orientations ``[O]``, summing to one. (default: uniform)
            self_basis: Basis of a position with itself, one row like ``kernel_basis``. (default: no such term)
            plan: The edges' plan (:meth:`plan`), to share between layers. (default: made here)
            mask: Which points of a dense batch are real. (default: all)
        """
        if edge_index is None and plan is None:
            flat, edge_index, kernel_basis = _flatten_dense(x, kernel_basis, mask)
            out = self.forward(flat, edge_index, kernel_basis, fiber_basis, weight=weight, self_basis=self_basis)
            return out.view(*x.shape[:2], *out.shape[1:])
        if x.dim() != 3 or x.size(2) != self.in_channels or (self.num_ori is not None and x.size(1) != self.num_ori):
            wanted = (f"|V|, {'O' if self.num_ori is None else self.num_ori}, {self.in_channels}",)
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be ({wanted[0]})")
        if self.separable and fiber_basis is None:
            raise ValueError("fiber_basis is None, but a separable convolution needs it")
        if plan is None:
            plan = self.plan(_edges(edge_index), x.size(0), x.size(1))
        out = self.spatial(x, kernel_basis, weight, self_basis, plan)
        if fiber_basis is not None and self.separable:
            out = self.fiber(out, fiber_basis, weight)
        if self.bias is None:
            return out
        return out.add_(self.bias) if out.dtype == self.bias.dtype else out + self.bias  # out is nobody else's

    def plan(self, edge_index: Tensor, num_nodes: int, num_ori: int) -> SegmentPlan:
        """The order of the sum, which layers of one kind share: of edges, or of pairs of (position, orientation)."""
        if self.separable:
            return SegmentPlan.from_edge_index(edge_index, num_nodes)
        return SegmentPlan.from_edge_index(bundle_edges(edge_index, num_ori), num_nodes * num_ori)

    def spatial(
        self, x: Tensor, kernel_basis: Tensor, weight: Tensor | None, self_basis: Tensor | None, plan: SegmentPlan
    ) -> Tensor:
        """The sum over neighbours (and, in the full convolution, over orientations), without bias."""
        x, kernel = x.to(kernel_basis.dtype), self.weight.to(kernel_basis.dtype)
        if self.separable:
            out = gather_linear_mul_segment_sum(x, kernel_basis, kernel, None, None, plan=plan)
            return out if self_basis is None else out + x * F.linear(self_basis, kernel)
        num_nodes, num_ori, _ = x.shape
        x = x / num_ori if weight is None else x * weight.to(x.dtype).unsqueeze(1)
        points, basis = x.flatten(0, 1), kernel_basis.flatten(0, 2)
        if self.groups == "depthwise":
            out = gather_linear_mul_segment_sum(points.unsqueeze(1), basis.unsqueeze(1), kernel, None, None, plan=plan)
            out = out.view(num_nodes, num_ori, self.out_channels)
            if self_basis is not None:
                out = out + torch.einsum("voc,poc->vpc", x, F.linear(self_basis[0], kernel))
            return out
        per_basis = _sum_per_basis(points, basis, plan).view(num_nodes, num_ori, self.basis_dim, self.in_channels)
        if self_basis is not None:
            per_basis = per_basis + torch.einsum("voc,pob->vpbc", x, self_basis[0])
        return torch.einsum("vpbc,dcb->vpd", per_basis, kernel)

    def fiber(self, x: Tensor, fiber_basis: Tensor, weight: Tensor | None) -> Tensor:
        """The sum over orientations at one position, without bias."""
        if self.fiber_weight is None:
            raise ValueError("fiber_basis is given, but the convolution is not separable")
        dtype = fiber_basis.dtype
        num_ori = fiber_basis.size(1)
        basis = fiber_basis / num_ori if weight is None else fiber_basis * weight.to(dtype).unsqueeze(1)
        kernel = torch.tensordot(basis, self.fiber_weight.to(dtype), ([2], [self.fiber_weight.dim() - 1]))
        x = x.to(dtype)
        return fiber_mul_sum(x, kernel) if kernel.dim() == 3 else torch.einsum("voc,podc->vpd", x, kernel)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.out_channels}, basis_dim={self.basis_dim}, groups={self.groups!r}, "
            f"separable={self.separable}"
        )


class ConvNeXtBlock(nn.Module):
    r"""A convolution and the channel mixing around it: :math:`x + s \cdot \mathrm{MLP}(\mathrm{LN}(\mathrm{conv}(x)))`.

    The block of ConvNeXt (https://arxiv.org/abs/2201.03545) as PONITA uses it: layer norm, a pointwise MLP that widens,
    an optional scale per channel, and the residual where shapes agree. No batch statistics.

    Args:
        channels: Channels of the input.
        conv: The convolution; its ``out_channels`` are the block's.
        widening: Width of the MLP in units of the channels. (default: ``4``)
        act: ``'gelu'``, ``'silu'``, ``'tanh'`` or ``'relu'``. (default: ``'gelu'``)
        layer_scale: Initial value of the scale; ``None``: no scale. (default: ``None``)

    Shapes:
        x :math:`(*, C)`; output :math:`(*, C')`, with the convolution's other arguments passed on to it.

    Symmetry and derivatives:
        Those of the convolution; differentiable twice but for ``'relu'``.

    Example:
        >>> block = ConvNeXtBlock(8, PointConv(8, 8, basis_dim=16))
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> block(torch.randn(3, 8), edge_index, torch.randn(3, 16)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        channels: int,
        conv: nn.Module,
        widening: int = 4,
        act: str = "gelu",
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        out_channels = int(getattr(conv, "out_channels", channels))
        self.channels, self.out_channels, self.widening = channels, out_channels, widening
        self.conv = conv
        self.norm = nn.LayerNorm(out_channels)
        self.lin1 = nn.Linear(out_channels, widening * out_channels)
        self.lin2 = nn.Linear(widening * out_channels, out_channels)
        self.act = activation(act)
        self.layer_scale = layer_scale
        self.scale = nn.Parameter(torch.full((out_channels,), float(layer_scale))) if layer_scale is not None else None

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for module in (self.conv, self.norm, self.lin1, self.lin2):
            module.reset_parameters()  # type: ignore[operator]
        if self.scale is not None and self.layer_scale is not None:
            nn.init.constant_(self.scale, self.layer_scale)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Runs the block; all further arguments go to the convolution."""
        h: Tensor = self.norm(self.conv(x, *args, **kwargs))
        h = self.lin2(self.act(self.lin1(h)))
        if self.scale is not None:
            h = h * self.scale
        return x + h if h.shape == x.shape else h

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.channels}, {self.out_channels}, widening={self.widening}"


def complete_edges(num_graphs: int, num_nodes: int, device: torch.device | None = None) -> Tensor:
    """All ordered pairs, loops included, of each of equally large graphs, sorted by receiver: [2, B N N]."""
    node = torch.arange(num_graphs * num_nodes, device=device).view(num_graphs, num_nodes)
    shape = (num_graphs, num_nodes, num_nodes)
    return torch.stack((node.unsqueeze(1).expand(shape).flatten(), node.unsqueeze(2).expand(shape).flatten()))


def bundle_edges(edge_index: Tensor, num_ori: int) -> Tensor:
    """Each edge joined orientation by orientation, receiving orientation first: [2, E O O] over ``V O`` points."""
    ori = torch.arange(num_ori, device=edge_index.device)
    shape = (edge_index.size(1), num_ori, num_ori)
    source = (edge_index[0].view(-1, 1, 1) * num_ori + ori).expand(shape)
    target = (edge_index[1].view(-1, 1, 1) * num_ori + ori.view(-1, 1)).expand(shape)
    return torch.stack((source.flatten(), target.flatten()))


def _flatten_dense(x: Tensor, kernel_basis: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A dense batch as one sparse graph of the same content."""
    num_graphs, num_nodes = x.shape[:2]
    if kernel_basis.shape[:3] != (num_graphs, num_nodes, num_nodes):
        raise ValueError(
            f"kernel_basis has shape {tuple(kernel_basis.shape)}, but x of shape {tuple(x.shape)} without edge_index "
            f"needs ({num_graphs}, {num_nodes}, {num_nodes}, ...)"
        )
    if mask is not None:
        if mask.shape != (num_graphs, num_nodes) or mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, but must be bool ({num_graphs}, {num_nodes})")
        pair = (mask.unsqueeze(2) & mask.unsqueeze(1)).view(*mask.shape, -1, *([1] * (kernel_basis.dim() - 3)))
        kernel_basis = torch.where(pair, kernel_basis, torch.zeros_like(kernel_basis))
        x = torch.where(mask.view(*mask.shape, *([1] * (x.dim() - 2))), x, torch.zeros_like(x))
    return x.flatten(0, 1), complete_edges(num_graphs, num_nodes, x.device), kernel_basis.flatten(0, 2)


def _sum_per_basis(x: Tensor, basis: Tensor, plan: SegmentPlan) -> Tensor:
    """Sum over neighbours of the outer products of basis and features: [N, B, C], a few basis functions at a time."""
    spread = x.unsqueeze(1)
    parts = []
    for part in basis.split(8, dim=1):
        wide = spread.expand(-1, part.size(1), -1).contiguous()
        parts.append(gather_mul_segment_sum(wide, part.unsqueeze(-1), None, None, plan=plan))
    return torch.cat(parts, 1)


def _edges(edge_index: Tensor | None) -> Tensor:
    if edge_index is None:
        raise ValueError("edge_index is None, but is needed without a plan")
    return edge_index


def _check_groups(groups: str | int, in_channels: int, out_channels: int) -> None:
    if groups not in ("depthwise", 1):
        raise ValueError(f"groups is {groups!r}, but must be 'depthwise' or 1")
    if groups == "depthwise" and in_channels != out_channels:
        raise ValueError(
            f"out_channels is {out_channels}, but depthwise convolutions keep in_channels={in_channels}: use groups=1"
        )


def _reset_kernel(weight: Tensor) -> None:
    """Uniform as in nn.Linear, with the basis (and a dense kernel's input channels) as fan-in."""
    fan_in = math.prod(weight.shape[1:])
    nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
