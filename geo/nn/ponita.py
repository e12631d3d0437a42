"""PONITA: a network of SE(n) weight-sharing convolutions with scalar and vector inputs and outputs."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geo.nn.kernel_basis import KernelBasis
from geo.nn.orientation_grid import FrameGrid, OrientationGrid
from geo.nn.ponita_calibration import batch_arguments, center_and_spread, inverse_or_one
from geo.nn.ponita_files import load_model, save_model
from geo.nn.ponita_inputs import Expected, Inputs, check_size, flat_inputs
from geo.nn.se_conv import ConvNeXtBlock, PointConv, PoniConv
from geo.o3 import num_grid_invariants, num_pair_invariants, random_rotations, safe_norm
from geo.o3.invariants import grid_invariants_from_vectors, pair_invariants_from_vectors, zero_invariants
from geo.ops import SegmentPlan, segment_reduce

READOUTS = ("node", "add", "mean")
ROTATE = (None, "train", "always")


class _Graph(NamedTuple):
    """What all layers share: the kernel's bases, the order of the sums, and each node's rotation."""

    kernel_basis: Tensor
    self_basis: Tensor | None
    fiber_basis: Tensor | None
    plan: SegmentPlan
    weight: Tensor | None
    rotation: Tensor | None


class _Invariants(NamedTuple):
    """What the bases are functions of: invariants of edges, of a node with itself and of pairs of orientations."""

    attr: Tensor
    dist: Tensor | None
    scale: Tensor | None
    zero: Tensor
    fiber_attr: Tensor | None
    rotation: Tensor | None


class PONITA(nn.Module):
    r"""Network of SE(n) weight-sharing convolutions on functions of position and orientation.

    From "Fast, Expressive SE(n) Equivariant Networks through Weight-Sharing in Position-Orientation Space"
    (https://arxiv.org/abs/2310.02970), with the complete invariants of https://arxiv.org/abs/2504.03299.

    Features are functions of position and orientation, :math:`f(x_i, n_o)`. Each layer is

    .. math::
        f \leftarrow f + \mathrm{MLP}\Big(\mathrm{LN}\Big(\sum_o w_o\, k_2(n \cdot n_o)
        \sum_{j \in N(i) \cup i} k_1(r_{ij} \cdot n_o, |r_{ij}|)\, f(x_j, n_o)\Big)\Big),
        \qquad r_{ij} = x_j + s_{ij} - x_i ,

    with kernels that are linear in bases computed once for all layers. Scalars enter as constants over orientations and
    vectors as :math:`v \cdot n`; a mean over orientations and the dual frame read them out.

    It differs from the official code: the grid of orientations is converged, seeded and saved; vectors are read out
    with the dual frame and without bias; attributes are smooth, ``(r.n, |r|)`` in place of ``(r.n, |r_perp|)`` (kept as
    ``invariants='ponita'``; forces then jump at bonds parallel to a grid axis); each node's own term is added without
    edges, and self-loops in ``edge_index`` do not count twice; :meth:`calibrate` is explicit.

    Args:
        in_channels: Scalar features of a node.
        hidden_channels: Width :math:`C`.
        out_channels: Scalar outputs.
        num_layers: Number of blocks.
        in_vec: Vector features of a node. (default: ``0``)
        out_vec: Vector outputs. (default: ``0``)
        dim: 2 or 3. (default: ``3``)
        num_ori: Orientations :math:`O` at each node; 0: none, a point cloud in R^n (distances only); -1: one
            orientation per node, given as ``ori`` (see :class:`geo.transforms.LiftToPositionOrientation`). (default:
            ``16``)
        basis_dim: Functions of the kernel basis. (default: ``hidden_channels``)
        degree: Degree of the polynomials of the invariants. (default: ``3``)
        radius: Where the kernel's smooth window ends, in the unit of ``pos``: the cutoff of the graph. ``None``: no
            window, right only if all pairs are connected. (default: ``None``)
        invariants: ``'universal'``, ``'ponita'`` or ``'chiral'``, see :func:`geo.o3.pair_invariants`.
            (default: ``'universal'``)
        separable: Separable convolutions; otherwise full ones, O times the work. (default: ``True``)
        widening: Width of the blocks' MLP in units of C. (default: ``4``)
        layer_scale: Initial scale of each block (1e-6 for N-body in the paper). (default: ``None``)
        multiple_readouts: Mean of a readout after every layer, or the last alone. (default: ``True``)
        readout: ``'node'``, or ``'add'`` and ``'mean'`` over each graph. (default: ``'node'``)
        rotate: Turn the grid by a random rotation per graph and call: ``'train'`` (in training), ``'always'`` or never.
            (default: ``None``)
        groups: ``'depthwise'`` or 1 (dense kernels). (default: ``'depthwise'``)
        space: ``'SE2'`` or ``'SE3'`` to use frames in place of directions (in SE3 ``num_ori`` is 12, 24 or 60 with the
            platonic grid). (default: chosen by ``dim`` and ``num_ori``)
        grid: Kind of grid, see :class:`OrientationGrid` and :class:`FrameGrid`. (default: ``'repulsion'``, frames
            ``'platonic'``)
        self_loops: Add each node's own term. (default: ``True``)
        length_scale: The length that invariants are measured in, in the unit of ``pos``. About the largest distance
            keeps monomials near one, which matters most in full convolutions: they hold powers of :math:`|r|^2`.
            (default: ``1.0``)

    Shapes:
        x :math:`(|V|, F)`, pos :math:`(|V|, n)`, edge_index :math:`(2, |E|)`, batch :math:`(|V|)`, vec
        :math:`(|V|, F_v, n)`, edge_shift :math:`(|E|, n)`; output :math:`(|V|, F')` and :math:`(|V|, F'_v, n)` or
        ``None``, with :math:`|G|` rows for a graph readout. Dense: x :math:`(B, N, F)`, pos :math:`(B, N, n)`, mask
        :math:`(B, N)`, no edges; output with leading axes :math:`(B, N)` or :math:`(B)`.

    Symmetry and derivatives:
        Equivariant to node permutation, translation, and E(n) (SE(n) for ``'chiral'``, SE2, SE3 and 2-D): exactly for
        rotations that map the grid to itself, within the grid's error for others (2 % at O = 20, 0.2 % at O = 96);
        exact for ``num_ori`` 0 and -1. Differentiable twice, also at self-loops. A graph's output does not depend on
        its batch.

    Example:
        >>> model = PONITA(4, 32, 1, num_layers=2, in_vec=1, out_vec=1, readout="add")
        >>> x, pos, vec = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 1, 3)
        >>> scalar, vector = model(x, pos, vec=vec)
        >>> scalar.shape, vector.shape
        (torch.Size([1, 1]), torch.Size([1, 1, 3]))
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int,
        in_vec: int = 0,
        out_vec: int = 0,
        dim: int = 3,
        num_ori: int = 16,
        basis_dim: int | None = None,
        degree: int = 3,
        radius: float | None = None,
        invariants: str = "universal",
        separable: bool = True,
        widening: int = 4,
        layer_scale: float | None = None,
        multiple_readouts: bool = True,
        readout: str = "node",
        rotate: str | None = None,
        groups: str | int = "depthwise",
        space: str | None = None,
        grid: str | None = None,
        self_loops: bool = True,
        length_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("in_channels", "out_channels", "in_vec", "out_vec"):
            check_size(name, self.arguments[name], 0)
        for name in ("hidden_channels", "num_layers", "widening", "degree"):
            check_size(name, self.arguments[name], 1)
        check_size("num_ori", num_ori, -1)
        if in_channels + in_vec == 0 or out_channels + out_vec == 0:
            raise ValueError("in_channels + in_vec and out_channels + out_vec must be positive")
        if not (isinstance(length_scale, (int, float)) and 0 < length_scale < math.inf):
            raise ValueError(f"length_scale is {length_scale!r}, but must be a positive length")
        if dim not in (2, 3):
            raise ValueError(f"dim is {dim!r}, but must be 2 or 3")
        if readout not in READOUTS:
            raise ValueError(f"readout is {readout!r}, but must be 'node', 'add' or 'mean'")
        if rotate not in ROTATE:
            raise ValueError(f"rotate is {rotate!r}, but must be None, 'train' or 'always'")
        if num_ori == 0 and in_vec + out_vec > 0:
            raise ValueError(
                f"num_ori is 0 with in_vec={in_vec} and out_vec={out_vec}, but vectors need orientations: num_ori > 0"
            )
        bundle = f"R{dim}xS{dim - 1}"
        if space is None:
            space = f"R{dim}" if num_ori == 0 else bundle
        elif space != f"SE{dim}" and space != (f"R{dim}" if num_ori == 0 else bundle):
            raise ValueError(f"space is {space!r}, which does not fit dim={dim} and num_ori={num_ori}")
        elif space == f"SE{dim}" and num_ori == 0:
            raise ValueError(f"space is {space!r}, but num_ori is 0: frames are orientations")
        self.space, self.dim, self.num_ori, self.invariants = space, dim, num_ori, invariants
        self.in_channels, self.hidden_channels, self.out_channels = in_channels, hidden_channels, out_channels
        self.num_layers, self.in_vec, self.out_vec, self.radius = num_layers, in_vec, out_vec, radius
        self.separable = separable or num_ori <= 0
        self.readout, self.rotate, self.self_loops, self.length_scale = readout, rotate, self_loops, length_scale
        basis_dim = hidden_channels if basis_dim is None else basis_dim

        self.grid: OrientationGrid | FrameGrid | None = None
        if num_ori > 0:
            attr_dim, fiber_dim = num_grid_invariants(space, invariants, separable)
            if space in ("SE2", "SE3"):
                self.grid = FrameGrid(dim, num_ori, grid or "platonic")
            else:
                self.grid = OrientationGrid(dim, num_ori, grid or "repulsion")
            if in_vec + out_vec > 0 and not self.grid.spans:
                raise ValueError(f"num_ori is {num_ori}, but {num_ori} orientations do not span all vectors: use more")
        else:
            attr_dim, fiber_dim = num_pair_invariants(space, "universal" if num_ori == 0 else invariants), 0
        vec_factor = dim if space == f"SE{dim}" else 1
        self.kernel_basis = KernelBasis(attr_dim, basis_dim, degree=degree, r_max=radius)
        self.fiber_basis = KernelBasis(fiber_dim, basis_dim, degree=degree) if fiber_dim else None
        self.embed = nn.Linear(in_channels + vec_factor * in_vec, hidden_channels, bias=False)
        convs: list[nn.Module] = []
        for _ in range(num_layers):
            if num_ori > 0:
                convs.append(PoniConv(hidden_channels, hidden_channels, basis_dim, groups, separable))
            else:
                convs.append(PointConv(hidden_channels, hidden_channels, basis_dim, groups))
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(hidden_channels, conv, widening, layer_scale=layer_scale) for conv in convs
        )
        num_readouts = num_layers if multiple_readouts else 1
        self.read_scalar = nn.ModuleList(
            nn.Linear(hidden_channels, out_channels) for _ in range(num_readouts if out_channels else 0)
        )
        self.read_vector = nn.ModuleList(
            nn.Linear(hidden_channels, out_vec * vec_factor, bias=False) for _ in range(num_readouts if out_vec else 0)
        )
        self.calibrated: Tensor
        self.register_buffer("calibrated", torch.tensor(False))

    def reset_parameters(self) -> None:
        """Draws the weights anew (the grid stays)."""
        for module in (self.kernel_basis, self.embed, *self.blocks, *self.read_scalar, *self.read_vector):
            module.reset_parameters()  # type: ignore[operator]
        if self.fiber_basis is not None:
            self.fiber_basis.reset_parameters()
        self.calibrated.fill_(False)

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
        vec: Tensor | None = None,
        ori: Tensor | None = None,
        mask: Tensor | None = None,
        edge_shift: Tensor | None = None,
        batch_size: int | None = None,
        proj_index: Tensor | None = None,
        num_proj: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Runs the network.

        Args:
            x: Scalar features.
            pos: Positions.
            edge_index: Senders (row 0) and receivers (row 1). (default: all pairs of nodes of a graph)
            batch: The graph of each node. (default: one graph)
            vec: Vector features, needed if ``in_vec > 0``.
            ori: One orientation (or frame) per node, with ``num_ori=-1`` only.
            mask: Which nodes of a dense batch (``x`` with three axes) are real. (default: all)
            edge_shift: Shift of each edge's sender to the periodic image that is meant. (default: zero)
            batch_size: Number of graphs; saves reading ``batch``, and counts empty graphs at the end.
            proj_index: With ``num_ori=-1``, the base node of each lifted node: node outputs are means over the lifted
                nodes of a base node, and graph readouts sum those means.
            num_proj: Number of base nodes. (default: the largest of ``proj_index`` plus one)

        Returns:
            Scalars (``None`` if ``out_channels`` is 0) and vectors (``None`` if ``out_vec`` is 0).

        Raises:
            ValueError: An argument of wrong shape or dtype, or with a value that is not finite.
            IndexError: A node or graph that does not exist.
        """
        inputs = flat_inputs(self._expected(), x, pos, edge_index, batch, vec, ori, mask, edge_shift, batch_size)
        graph = self._graph(inputs, self._invariants(inputs))
        h = self._embed(inputs, graph)
        hidden = []
        for block in self.blocks:
            h = self._block(block, h, graph)
            hidden.append(h)
        scalar, vector = self._read(hidden, inputs, graph)
        share = None
        if proj_index is not None:
            share, num_proj = self._share(proj_index, num_proj, inputs)
        outputs = [self._pool(t, inputs, share, proj_index, num_proj) for t in (scalar, vector)]
        if x.dim() == 3 and self.readout == "node":
            outputs = [None if t is None else t.view(*x.shape[:2], *t.shape[1:]) for t in outputs]
        return outputs[0], outputs[1]

    def energy_and_forces(
        self,
        x: Tensor,
        pos: Tensor,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
        edge_shift: Tensor | None = None,
        create_graph: bool | None = None,
        vec: Tensor | None = None,
        mask: Tensor | None = None,
        batch_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energies of graphs, and forces: minus the exact gradient with respect to positions.

        Needs ``out_channels=1``, ``out_vec=0`` and ``readout='add'``. If ``pos`` requires grad it is kept in the graph,
        so second derivatives with respect to it can be taken. Works under ``no_grad`` and ``inference_mode``, and under
        ``torch.compile`` with a graph break, in evaluation: AOTAutograd cannot differentiate forces a second time.

        Args:
            x: Scalar features, as in :meth:`forward`.
            pos: Positions.
            edge_index: Senders and receivers.
            batch: The graph of each node.
            edge_shift: Shift of each edge's sender.
            create_graph: Keep the graph for a loss on forces. (default: in training)
            vec: Vector features.
            mask: Which nodes of a dense batch are real.
            batch_size: Number of graphs.

        Returns:
            Energies :math:`(|G|)` and forces, of the shape of ``pos``.

        Raises:
            ValueError: A model whose output is not one scalar per graph, and whatever :meth:`forward` raises.
        """
        if self.out_channels != 1 or self.out_vec or self.readout != "add":
            raise ValueError(
                f"out_channels={self.out_channels}, out_vec={self.out_vec} and readout={self.readout!r}, but energies "
                "need out_channels=1, out_vec=0 and readout='add'"
            )
        if self.num_ori == -1:
            raise ValueError("num_ori is -1: orientations given as `ori` depend on positions, so no forces can be had")
        create_graph = self.training if create_graph is None else create_graph
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._energy_and_forces(
                x, pos, edge_index, batch, edge_shift, create_graph, vec, mask, batch_size, torch.is_grad_enabled()
            )
        with torch.inference_mode(False):
            plain = [
                t.clone() if isinstance(t, Tensor) and t.is_inference() else t
                for t in (x, pos, edge_index, batch, edge_shift, vec, mask)
            ]
            x, pos, edge_index, batch, edge_shift, vec, mask = plain  # type: ignore[assignment]
            return self._energy_and_forces(x, pos, edge_index, batch, edge_shift, False, vec, mask, batch_size, False)

    def _energy_and_forces(
        self,
        x: Tensor,
        pos: Tensor,
        edge_index: Tensor | None,
        batch: Tensor | None,
        edge_shift: Tensor | None,
        create_graph: bool,
        vec: Tensor | None,
        mask: Tensor | None,
        batch_size: int | None,
        outer_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            if not (pos.requires_grad and outer_grad):
                pos = pos.detach().requires_grad_()
            scalar, _ = self.forward(
                x, pos, edge_index, batch, vec=vec, mask=mask, edge_shift=edge_shift, batch_size=batch_size
            )
            assert scalar is not None
            energy = scalar.squeeze(-1)
            (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=create_graph)
        if not outer_grad:
            energy, gradient = energy.detach(), gradient.detach()
        return energy, -gradient

    @torch.no_grad()
    def calibrate(self, data: Any) -> PONITA:
        """Turns the freshly drawn weights into a start that learns fast; call it once, before training.

        First the bases: their functions become as varied as the invariants of the data are (:meth:`KernelBasis.
        calibrate`), whatever the unit of length. Then, layer by layer, kernels are scaled and biases set so that what a
        convolution returns has mean 0 in each channel and unit spread: otherwise most of it is one and the same vector
        at every node, and the norm after it keeps that. Every layer sees inputs that went through the calibrated layers
        before it. The official code scales kernels to the spread of their inputs, means included, on the first training
        batch, unasked, after the batch was used; here it is a call. With ``torch.distributed`` initialised all ranks
        share their statistics and end with the same weights.

        Args:
            data: A batch, or an iterable of batches: a PyG ``Data`` or a mapping whose entries are named like the
                arguments of :meth:`forward`.

        Returns:
            The model.

        Raises:
            ValueError: No batch, or one that lacks ``x`` or ``pos``.
        """
        inputs = [flat_inputs(self._expected(), **arguments) for arguments in batch_arguments(data)]
        found = [self._invariants(i) for i in inputs]
        self._calibrate_bases(inputs, found)
        graphs = [self._graph(i, f) for i, f in zip(inputs, found, strict=True)]
        hidden = [self._embed(i, g) for i, g in zip(inputs, graphs, strict=True)]
        for block in self.blocks:
            conv = block.conv
            if not isinstance(conv, (PointConv, PoniConv)):
                raise TypeError(f"cannot calibrate a {type(conv).__name__}")
            pairs = list(zip(hidden, graphs, strict=True))
            if isinstance(conv, PoniConv):
                out = [conv.spatial(h, g.kernel_basis, g.weight, g.self_basis, g.plan) for h, g in pairs]
            else:
                out = [conv.spatial(h, g.kernel_basis, g.self_basis, g.plan) for h, g in pairs]
            mean, ratio = center_and_spread(out)
            ratio = inverse_or_one(ratio)
            conv.weight.mul_(ratio.to(conv.weight))
            if isinstance(conv, PoniConv) and conv.fiber_weight is not None:
                out = [
                    conv.fiber(h * ratio.to(h), g.fiber_basis, g.weight)
                    for h, g in zip(out, graphs, strict=True)
                    if g.fiber_basis is not None
                ]
                mean, ratio = center_and_spread(out)
                ratio = inverse_or_one(ratio)
                conv.fiber_weight.mul_(ratio.to(conv.fiber_weight))
            if conv.bias is not None:
                conv.bias.copy_(-mean * ratio)
            hidden = [self._block(block, h, g) for h, g in pairs]
        self.calibrated.fill_(True)
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``<path>.safetensors`` (weights and grid) and ``<path>.json`` (arguments), each whole or not at all.

        Args:
            path: Path without suffix.

        Returns:
            The path of the weights.
        """
        return save_model(path, self.state_dict(), self.arguments)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> PONITA:
        """Reads a model that :meth:`save` wrote, in evaluation mode.

        Args:
            path: Path without suffix.
            device: Where the model is put. (default: ``'cpu'``)

        Raises:
            FileNotFoundError: No such files.
            ValueError: Files that are not such a model, or do not fit each other.
        """
        model = load_model(cls, path, device)
        assert isinstance(model, PONITA)
        return model

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.in_channels}, {self.hidden_channels}, {self.out_channels}, num_layers={self.num_layers}, "
            f"in_vec={self.in_vec}, out_vec={self.out_vec}, space={self.space!r}, num_ori={self.num_ori}, "
            f"invariants={self.invariants!r}, separable={self.separable}, radius={self.radius}, "
            f"readout={self.readout!r}, rotate={self.rotate!r}"
        )

    # What forward and calibrate are made of.

    def _expected(self) -> Expected:
        weight = self.embed.weight
        frames = self.space == f"SE{self.dim}"
        return Expected(self.in_channels, self.in_vec, self.dim, self.num_ori, frames, weight.dtype, weight.device)

    def _invariants(self, inputs: Inputs) -> _Invariants:
        x, pos, edge_index, batch = inputs.x, inputs.pos, inputs.edge_index, inputs.batch
        source, target = edge_index[0], edge_index[1]
        r = pos[source] - pos[target]
        if inputs.edge_shift is not None:
            r = r + inputs.edge_shift
        rotation = None
        if self.grid is not None and (self.rotate == "always" or (self.rotate == "train" and self.training)):
            drawn = random_rotations(max(inputs.num_graphs, 1), self.dim, dtype=pos.dtype, device=pos.device)
            rotation = drawn[batch] if batch is not None else drawn[:1].expand(x.size(0), -1, -1)
            r = torch.einsum("en,enm->em", r, rotation[target])
        scale = None
        if self.self_loops:
            loop = source == target
            if inputs.edge_shift is not None:
                loop = loop & (inputs.edge_shift == 0).all(-1)
            if torch.compiler.is_compiling() or loop.is_cuda or bool(loop.any()):
                scale = (~loop).to(r.dtype)
        if inputs.node_mask is not None:
            pair = (inputs.node_mask[source] & inputs.node_mask[target]).to(r.dtype)
            scale = pair if scale is None else scale * pair
        dist = safe_norm(r) if self.radius is not None else None
        if self.length_scale != 1.0:
            r = r / self.length_scale

        fiber_attr = None
        kind = "universal" if self.num_ori == 0 else self.invariants
        if self.grid is None:
            if inputs.ori is None:
                attr = pair_invariants_from_vectors(self.space, r, None, None, kind)
            else:
                attr = pair_invariants_from_vectors(self.space, r, inputs.ori[target], inputs.ori[source], kind)
            zero = zero_invariants(self.space, None, kind, like=r)
        else:
            grid = self.grid.ori.to(r.dtype)
            attr, fiber_attr = grid_invariants_from_vectors(self.space, r, grid, kind, self.separable)
            zero = zero_invariants(self.space, grid, kind, self.separable)
        return _Invariants(attr, dist, scale, zero, fiber_attr, rotation)

    def _graph(self, inputs: Inputs, found: _Invariants) -> _Graph:
        kernel_basis = self.kernel_basis(found.attr, found.dist, found.scale)
        self_basis = fiber_basis = None
        if self.self_loops:
            self_basis = self.kernel_basis(found.zero, None if found.dist is None else found.dist.new_zeros(1))
        if self.fiber_basis is not None and found.fiber_attr is not None:
            fiber_basis = self.fiber_basis(found.fiber_attr)
        edge_index, num_nodes = inputs.edge_index, inputs.x.size(0)
        if self.separable:
            plan = SegmentPlan.from_edge_index(edge_index, num_nodes)
        else:
            plan = self.blocks[0].conv.plan(edge_index, num_nodes, self.num_ori)  # type: ignore[union-attr, operator]
        weight = None if self.grid is None else self.grid.weight.to(found.attr.dtype)
        return _Graph(kernel_basis, self_basis, fiber_basis, plan, weight, found.rotation)

    def _calibrate_bases(self, inputs: list[Inputs], found: list[_Invariants]) -> None:
        samples: list[tuple[Tensor, Tensor | None]] = []
        for i, f in zip(inputs, found, strict=True):
            window = self.kernel_basis.window(f.dist, f.scale)
            samples.append((f.attr, window))
            if self.self_loops:
                count = i.x.size(0) if i.node_mask is None else int(i.node_mask.sum())
                samples.append((f.zero, f.zero.new_full((1,), float(count))))
        self.kernel_basis.calibrate(samples)
        if self.fiber_basis is not None:
            self.fiber_basis.calibrate([(f.fiber_attr, None) for f in found[:1] if f.fiber_attr is not None])

    def _embed(self, inputs: Inputs, graph: _Graph) -> Tensor:
        vec, weight = inputs.vec, self.embed.weight
        if vec is not None and graph.rotation is not None:
            vec = torch.einsum("vcn,vnm->vcm", vec, graph.rotation)
        if self.grid is not None:
            if vec is None:  # the same on all orientations: multiply once
                constant: Tensor = self.embed(inputs.x)
                return constant.unsqueeze(1).expand(-1, self.num_ori, -1).contiguous()
            lifted: Tensor = self.embed(self.grid.lift(inputs.x, vec))
            return lifted
        features = inputs.x
        if vec is not None and inputs.ori is not None:
            along = torch.einsum("vcn,vn...->vc...", vec, inputs.ori).flatten(1)
            features = torch.cat((features, along), -1)
        return nn.functional.linear(features, weight)

    def _block(self, block: nn.Module, h: Tensor, graph: _Graph) -> Tensor:
        if self.grid is None:
            out: Tensor = block(h, None, graph.kernel_basis, self_basis=graph.self_basis, plan=graph.plan)
        else:
            shared = {"weight": graph.weight, "self_basis": graph.self_basis, "plan": graph.plan}
            out = block(h, None, graph.kernel_basis, graph.fiber_basis, **shared)
        return out

    def _read(self, hidden: list[Tensor], inputs: Inputs, graph: _Graph) -> tuple[Tensor | None, Tensor | None]:
        scalar: Tensor | None = None
        vector: Tensor | None = None
        for read, h in zip(self.read_scalar, hidden[-len(self.read_scalar) :] if self.read_scalar else [], strict=True):
            part = read(h if self.grid is None else self.grid.scalar(h))
            scalar = part if scalar is None else scalar + part
        for read, h in zip(self.read_vector, hidden[-len(self.read_vector) :] if self.read_vector else [], strict=True):
            part = read(h)
            vector = part if vector is None else vector + part
        if scalar is not None:
            scalar = scalar / len(self.read_scalar)
        if vector is not None:
            vector = vector / len(self.read_vector)
            if self.grid is not None:
                vector = self.grid.vector(vector)
            elif inputs.ori is not None:
                ori = inputs.ori.to(vector.dtype)
                if ori.dim() == 3:
                    vector = torch.einsum("vcm,vnm->vcn", vector.unflatten(-1, (-1, self.dim)), ori)
                else:
                    vector = vector.unsqueeze(-1) * ori.unsqueeze(1)
            if graph.rotation is not None:
                vector = torch.einsum("vcm,vnm->vcn", vector, graph.rotation.to(vector.dtype))
        return scalar, vector

    def _share(self, proj_index: Tensor, num_proj: int | None, inputs: Inputs) -> tuple[Tensor, int]:
        """One over the number of lifted nodes that share each lifted node's base node, and the number of base nodes."""
        if self.num_ori != -1:
            raise ValueError(f"proj_index is given, but num_ori is {self.num_ori}: it goes with num_ori=-1")
        if proj_index.shape != (inputs.x.size(0),) or proj_index.dtype != torch.int64:
            raise ValueError(
                f"proj_index is {proj_index.dtype} {tuple(proj_index.shape)}, but must be int64 ({inputs.x.size(0)},)"
            )
        if num_proj is None:
            num_proj = int(proj_index.max()) + 1 if proj_index.numel() else 0
        plan = SegmentPlan(proj_index, num_proj)
        count = plan.ptr.diff()
        return 1 / count[proj_index].to(inputs.pos.dtype), num_proj

    def _pool(
        self,
        value: Tensor | None,
        inputs: Inputs,
        share: Tensor | None,
        proj_index: Tensor | None,
        num_proj: int | None,
    ) -> Tensor | None:
        """Nodes' outputs as they are asked for: of nodes, base nodes or graphs."""
        if value is None:
            return None
        ones = (-1, *([1] * (value.dim() - 1)))
        if inputs.node_mask is not None:
            value = torch.where(inputs.node_mask.view(ones), value, torch.zeros_like(value))
        if share is not None and proj_index is not None and num_proj is not None:
            value = value * share.to(value.dtype).view(ones)
            if self.readout == "node":
                return _segment_sum(value, proj_index, num_proj)
        if self.readout == "node":
            return value
        if inputs.batch is None:
            total = value.sum(0, keepdim=True)
            if inputs.num_graphs > 1:
                total = torch.cat((total, total.new_zeros(inputs.num_graphs - 1, *total.shape[1:])))
            count = total.new_full((total.size(0),), 0.0)
            count[0] = value.size(0) if share is None else float(share.sum())
        else:
            total = _segment_sum(value, inputs.batch, inputs.num_graphs)
            if self.readout == "add":
                return total
            each = total.new_ones(value.size(0)) if share is None else share.to(value.dtype)
            if inputs.node_mask is not None:
                each = each * inputs.node_mask.to(each.dtype)
            count = _segment_sum(each, inputs.batch, inputs.num_graphs)
        if self.readout == "add":
            return total
        return total / count.clamp(min=1).view(ones)


def _segment_sum(value: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum of rows with equal index, in a fixed order."""
    plan = SegmentPlan(index, size)
    total: Tensor = segment_reduce(value if plan.perm is None else value[plan.perm], plan.ptr, "sum")
    return total
