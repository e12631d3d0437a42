"""Convolutions over SE(2) and SE(3): points that carry frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geo.nn.kernel_basis import KernelBasis
from geo.nn.se_conv import PointConv, PoniConv, bundle_edges
from geo.o3 import num_grid_invariants, num_pair_invariants, safe_norm
from geo.o3.invariants import (
    edge_vectors,
    grid_invariants_from_vectors,
    pair_invariants_from_vectors,
    zero_invariants,
)


class _FrameConv(nn.Module):
    """The layer of both groups; see `SE3Conv`."""

    dim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        basis_dim: int | None = None,
        groups: str | int = "depthwise",
        separable: bool = False,
        radius: float | None = None,
        degree: int = 2,
        self_loops: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.separable = in_channels, out_channels, separable
        self.radius, self.self_loops = radius, self_loops
        basis_dim = in_channels if basis_dim is None else basis_dim
        space = f"SE{self.dim}"
        self.fiber_basis: KernelBasis | None = None
        self.conv: PoniConv | PointConv
        if separable:
            attr_dim, fiber_dim = num_grid_invariants(space)
            self.fiber_basis = KernelBasis(fiber_dim, basis_dim, degree=degree)
            self.conv = PoniConv(in_channels, out_channels, basis_dim, groups, bias=bias)
        else:
            attr_dim = num_pair_invariants(space)
            self.conv = PointConv(in_channels, out_channels, basis_dim, groups, bias=bias)
        self.kernel_basis = KernelBasis(attr_dim, basis_dim, degree=degree, r_max=radius)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        self.kernel_basis.reset_parameters()
        self.conv.reset_parameters()
        if self.fiber_basis is not None:
            self.fiber_basis.reset_parameters()

    def forward(
        self, x: Tensor, pos: Tensor, edge_index: Tensor, ori: Tensor, edge_shift: Tensor | None = None
    ) -> Tensor:
        """Runs the convolution.

        Args:
            x: Features.
            pos: Positions.
            edge_index: Senders and receivers.
            ori: Rotation matrices: of each node, of each node and orientation, or one grid that all nodes share.
            edge_shift: Shift of each edge's sender to the periodic image that is meant. (default: zero)
        """
        self._check(x, pos, edge_index, ori)
        r = edge_vectors(pos, edge_index, edge_shift)
        loop = edge_index[0] == edge_index[1]
        if edge_shift is not None:
            loop = loop & (edge_shift == 0).all(-1)
        scale = (~loop).to(r.dtype) if self.self_loops else None
        space = f"SE{self.dim}"
        dist = safe_norm(r) if self.radius is not None else None
        if isinstance(self.conv, PoniConv) and self.fiber_basis is not None:
            attr, fiber_attr = grid_invariants_from_vectors(space, r, ori)
            assert fiber_attr is not None
            self_basis = self._self_basis(zero_invariants(space, ori)) if self.self_loops else None
            out: Tensor = self.conv(
                x, edge_index, self.kernel_basis(attr, dist, scale), self.fiber_basis(fiber_attr), self_basis=self_basis
            )
            return out
        if x.dim() == 2:
            attr = pair_invariants_from_vectors(space, r, ori[edge_index[1]], ori[edge_index[0]])
            self_basis = self._self_basis(zero_invariants(space, None, like=pos)) if self.self_loops else None
            point: Tensor = self.conv(x, edge_index, self.kernel_basis(attr, dist, scale), self_basis=self_basis)
            return point
        # Each node carries O frames: a cloud of V O points, where an edge joins all frames of its two ends.
        num_nodes, num_ori, _ = x.shape
        if self.self_loops:  # the node's own term joins its O frames among themselves
            node = torch.arange(num_nodes, device=x.device)
            edge_index = torch.cat((edge_index, node.expand(2, -1)), 1)
            r = torch.cat((r, r.new_zeros(num_nodes, self.dim)))
            dist = None if dist is None else torch.cat((dist, dist.new_zeros(num_nodes)))
            scale = None if scale is None else torch.cat((scale, scale.new_ones(num_nodes)))
        frames = ori.expand(num_nodes, -1, -1, -1) if ori.dim() == 3 else ori
        pairs = bundle_edges(edge_index, num_ori)
        points = frames.flatten(0, 1)
        square = num_ori * num_ori
        attr = pair_invariants_from_vectors(space, r.repeat_interleave(square, 0), points[pairs[1]], points[pairs[0]])
        dist = None if dist is None else dist.repeat_interleave(square)
        scale = None if scale is None else scale.repeat_interleave(square)
        out = self.conv(x.flatten(0, 1) / num_ori, pairs, self.kernel_basis(attr, dist, scale))
        return out.view(num_nodes, num_ori, self.out_channels)

    def _self_basis(self, attr: Tensor) -> Tensor:
        return self.kernel_basis(attr, None if self.radius is None else attr.new_zeros(1))  # type: ignore[no-any-return]

    def _check(self, x: Tensor, pos: Tensor, edge_index: Tensor, ori: Tensor) -> None:
        dim, num = self.dim, pos.size(0)
        if pos.dim() != 2 or pos.size(1) != dim:
            raise ValueError(f"pos has shape {tuple(pos.shape)}, but must be (|V|, {dim})")
        if x.dim() not in (2, 3) or x.size(0) != num or x.size(-1) != self.in_channels:
            wanted = f"({num}, {self.in_channels}) or ({num}, O, {self.in_channels})"
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be {wanted}")
        if x.dim() == 2:
            allowed: list[tuple[int, ...]] = [(num, dim, dim)]
        else:
            allowed = [(x.size(1), dim, dim), (num, x.size(1), dim, dim)]
        if self.separable:
            if x.dim() == 2:
                raise ValueError(f"x has shape {tuple(x.shape)}, but separable=True needs a shared grid: (|V|, O, C)")
            allowed = allowed[:1]
        if tuple(ori.shape) not in allowed:
            raise ValueError(f"ori has shape {tuple(ori.shape)}, but must be {' or '.join(map(str, allowed))}")
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
            raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.in_channels}, {self.out_channels}, separable={self.separable}, radius={self.radius}"


class SE3Conv(_FrameConv):
    r"""Convolution over SE(3): every node carries one rotation or several, and the kernel sees the whole relative pose.

    .. math::
        f'(x_i, R_p) = \sum_{j \in N(i) \cup i} \frac{1}{O} \sum_o k(R_p^T r_{ij},\, R_p^T R_o)\, f(x_j, R_o)

    the case :math:`X = G` of "Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in
    Position-Orientation Space" (https://arxiv.org/abs/2310.02970), which the official code does not have.
    :math:`g_i^{-1} g_j` is the complete invariant, so mirror images are told apart. The separable form factors
    the kernel as in :class:`geo.nn.PoniConv`: :math:`k_1(R_p^T r)` at equal frames, then :math:`k_2(R_p^T R_o)` at
    equal positions.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; with ``'depthwise'`` the same.
        basis_dim: Functions of the kernel basis. (default: ``in_channels``)
        groups: ``'depthwise'``, or 1 for a dense kernel. (default: ``'depthwise'``)
        separable: Factor the kernel; needs one grid that all nodes share. (default: ``False``)
        radius: Where the kernel's smooth window ends; ``None``: no window. (default: ``None``)
        degree: Degree of the polynomials of the invariants (12 of them, 90 monomials at 2). (default: ``2``)
        self_loops: Add each node's own term (loops in ``edge_index`` then do not count). (default: ``True``)
        bias: Adds a bias. (default: ``True``)

    Shapes:
        x :math:`(|V|, C)` with ori :math:`(|V|, 3, 3)`; or x :math:`(|V|, O, C)` with ori :math:`(O, 3, 3)` (shared,
        see :func:`geo.o3.rotation_frames`) or :math:`(|V|, O, 3, 3)`; pos :math:`(|V|, 3)`, edge_index
        :math:`(2, |E|)`; output like x with :math:`C'` channels.

    Symmetry and derivatives:
        Equivariant to node permutation, translation and SE(3) acting on positions and frames, exactly; on a shared
        group of frames to the rotations of that group. Differentiable twice; a graph's output does not depend on
        its batch.

    Example:
        >>> from geo.o3 import rotation_frames
        >>> conv = SE3Conv(8, 8, radius=2.0)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 12, 8), torch.randn(3, 3), edge_index, rotation_frames(3, 12).float()).shape
        torch.Size([3, 12, 8])
    """

    dim = 3


class SE2Conv(_FrameConv):
    r"""Convolution over SE(2), the plane's :class:`SE3Conv`.

    .. math::
        f'(x_i, \theta_p) = \sum_{j \in N(i) \cup i} \frac{1}{O} \sum_o
        k(R(\theta_p)^T r_{ij},\, \theta_o - \theta_p)\, f(x_j, \theta_o)

    From https://arxiv.org/abs/2310.02970. The turn enters as its cosine and its sine, where the official code has the
    cosine alone and loses its sign.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; with ``'depthwise'`` the same.
        basis_dim: Functions of the kernel basis. (default: ``in_channels``)
        groups: ``'depthwise'``, or 1 for a dense kernel. (default: ``'depthwise'``)
        separable: Factor the kernel; needs one grid that all nodes share. (default: ``False``)
        radius: Where the kernel's smooth window ends; ``None``: no window. (default: ``None``)
        degree: Degree of the polynomials of the invariants. (default: ``2``)
        self_loops: Add each node's own term (loops in ``edge_index`` then do not count). (default: ``True``)
        bias: Adds a bias. (default: ``True``)

    Shapes:
        As :class:`SE3Conv`, with pos :math:`(|V|, 2)` and 2 by 2 matrices.

    Symmetry and derivatives:
        Equivariant to node permutation, translation and SE(2) acting on positions and frames, exactly; on a shared grid
        to the turns that map it to itself. Differentiable twice; a graph's output does not depend on its batch.

    Example:
        >>> from geo.o3 import rotation_frames
        >>> conv = SE2Conv(8, 8, separable=True)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 6, 8), torch.randn(3, 2), edge_index, rotation_frames(2, 6).float()).shape
        torch.Size([3, 6, 8])
    """

    dim = 2
