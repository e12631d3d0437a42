"""Grids of orientations as modules: lifting scalars and vectors onto a grid and reading them back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geo.o3 import orientation_points, quadrature_weights, rotation_frames


class OrientationGrid(nn.Module):
    r"""Functions on the circle or the sphere, sampled on a fixed grid of unit vectors.

    A vector is lifted to the function :math:`f(n) = v \cdot n` and read back with the dual frame
    :math:`\tilde n_o = S^{-1} n_o`, :math:`S = \sum_o w_o n_o n_o^T`, so that
    :math:`\sum_o w_o f(n_o) \tilde n_o = v` exactly, also on a grid whose frame is not tight.

    The PONITA code (https://arxiv.org/abs/2310.02970) draws an unseeded grid that is not saved with the weights, and
    reads back with :math:`n_o`, which is :math:`v / 3` and off by percents. Here the grid is converged,
    seeded and saved, and sums over it carry quadrature weights (:func:`geo.o3.quadrature_weights`) in place of 1/O.

    Args:
        dim: 2 (circle) or 3 (sphere). (default: ``3``)
        num_ori: Number of orientations :math:`O`. (default: ``16``)
        kind: ``'repulsion'``, ``'fibonacci'``, ``'platonic'`` (O is 4, 6, 8, 12 or 20) or ``'random'``; the circle is
            equispaced but for ``'random'``. (default: ``'repulsion'``)
        seed: Seed of ``'repulsion'`` and ``'random'``. (default: ``0``)
        antipodal: With each orientation its opposite. (default: ``False``)
        dual: Read vectors back with the dual frame; otherwise with :math:`n\, n_o`, :math:`n` the dimension.
            (default: ``True``)

    Shapes:
        ``ori``, ``dual``: :math:`(O, n)` and ``weight``: :math:`(O)`, float64 buffers that are cast where they are
        used.

    Symmetry and derivatives:
        Rotating the grid (:meth:`rotated`) rotates what :meth:`vector` returns; linear, hence smooth.

    Example:
        >>> grid = OrientationGrid(dim=3, num_ori=20)
        >>> v = torch.randn(5, 2, 3, dtype=torch.float64)
        >>> (grid.vector(grid.lift(vec=v)) - v).abs().max() < 1e-12
        tensor(True)
    """

    ori: Tensor
    dual: Tensor
    weight: Tensor

    def __init__(
        self,
        dim: int = 3,
        num_ori: int = 16,
        kind: str = "repulsion",
        seed: int = 0,
        antipodal: bool = False,
        dual: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.num_ori, self.kind = dim, num_ori, kind
        ori = orientation_points(dim, num_ori, kind, seed, antipodal)
        weight = quadrature_weights(ori)
        frame = torch.einsum("o,oa,ob->ab", weight, ori, ori)
        #: Whether every vector can be read back: not on two points or a plane of them.
        self.spans = bool(torch.linalg.eigvalsh(frame)[0] > 1e-6)
        self.register_buffer("ori", ori)
        self.register_buffer("dual", ori @ torch.linalg.pinv(frame) if dual else dim * ori)
        self.register_buffer("weight", weight)

    @property
    def vec_factor(self) -> int:
        """Channels that one lifted vector takes."""
        return 1

    def lift(self, scalar: Tensor | None = None, vec: Tensor | None = None) -> Tensor:
        """``scalar`` [V, Cs] (constant over the grid) and ``vec`` [V, Cv, n] (``v.n``) as features [V, O, Cs + Cv]."""
        parts = []
        if scalar is not None:
            parts.append(scalar.unsqueeze(1).expand(-1, self.num_ori, -1))
        if vec is not None:
            parts.append(torch.einsum("vcn,on->voc", vec, self.ori.to(vec.dtype)))
        if not parts:
            raise ValueError("lift needs scalar or vec, got neither")
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def scalar(self, x: Tensor) -> Tensor:
        """Mean over the grid: [V, O, C] to [V, C]."""
        return torch.einsum("voc,o->vc", x, self.weight.to(x.dtype))

    def vector(self, x: Tensor) -> Tensor:
        """The vector part: [V, O, C] to [V, C, n]."""
        weighted = (self.weight.unsqueeze(1) * self.dual).to(x.dtype)
        return torch.einsum("voc,on->vcn", x, weighted)

    def rotated(self, rotation: Tensor) -> Tensor:
        """The orientations turned by ``rotation`` [n, n] or [G, n, n]: [O, n] or [G, O, n]."""
        return self.ori.to(rotation.dtype) @ rotation.transpose(-1, -2)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"dim={self.dim}, num_ori={self.num_ori}, kind={self.kind!r}"


class FrameGrid(nn.Module):
    r"""Functions on SO(2) or SO(3), sampled on a fixed grid of rotation matrices; the companion of `OrientationGrid`.

    A vector is lifted to its components in each frame, :math:`R_o^T v` (n channels), and read back as
    :math:`\sum_o w_o R_o u_o`; the round trip is exact on every grid.

    Args:
        dim: 2 or 3. (default: ``3``)
        num_ori: Number of frames; in three dimensions the groups have 12, 24 or 60. (default: ``24``)
        kind: ``'platonic'`` or ``'random'``. (default: ``'platonic'``)
        seed: Seed of ``'random'``. (default: ``0``)

    Shapes:
        ``ori``: :math:`(O, n, n)` and ``weight``: :math:`(O)`, float64 buffers.

    Example:
        >>> grid = FrameGrid(num_ori=12)
        >>> v = torch.randn(5, 2, 3, dtype=torch.float64)
        >>> (grid.vector(grid.lift(vec=v)) - v).abs().max() < 1e-12
        tensor(True)
    """

    ori: Tensor
    weight: Tensor
    spans = True

    def __init__(self, dim: int = 3, num_ori: int = 24, kind: str = "platonic", seed: int = 0) -> None:
        super().__init__()
        self.dim, self.num_ori, self.kind = dim, num_ori, kind
        self.register_buffer("ori", rotation_frames(dim, num_ori, kind, seed))
        self.register_buffer("weight", torch.full((num_ori,), 1 / num_ori, dtype=torch.float64))

    @property
    def vec_factor(self) -> int:
        """Channels that one lifted vector takes."""
        return self.dim

    def lift(self, scalar: Tensor | None = None, vec: Tensor | None = None) -> Tensor:
        """``scalar`` [V, Cs] and ``vec`` [V, Cv, n] as features [V, O, Cs + n Cv]."""
        parts = []
        if scalar is not None:
            parts.append(scalar.unsqueeze(1).expand(-1, self.num_ori, -1))
        if vec is not None:
            parts.append(torch.einsum("vcn,onm->vocm", vec, self.ori.to(vec.dtype)).flatten(2))
        if not parts:
            raise ValueError("lift needs scalar or vec, got neither")
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def scalar(self, x: Tensor) -> Tensor:
        """Mean over the grid: [V, O, C] to [V, C]."""
        return torch.einsum("voc,o->vc", x, self.weight.to(x.dtype))

    def vector(self, x: Tensor) -> Tensor:
        """Vectors whose components in each frame are ``x``: [V, O, n C] to [V, C, n]."""
        weighted = (self.weight[:, None, None] * self.ori).to(x.dtype)
        return torch.einsum("vocm,onm->vcn", x.unflatten(-1, (-1, self.dim)), weighted)

    def rotated(self, rotation: Tensor) -> Tensor:
        """The frames turned by ``rotation`` [n, n] or [G, n, n]: [O, n, n] or [G, O, n, n]."""
        return rotation.unsqueeze(-3) @ self.ori.to(rotation.dtype)

    def extra_repr(self) -> str:
        """Sizes and kind."""
        return f"dim={self.dim}, num_ori={self.num_ori}, kind={self.kind!r}"
