"""Convolution with full Clebsch-Gordan tensor products of irreps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geo.ops import SegmentPlan, gather_tensor_product_segment_sum

if TYPE_CHECKING:
    from e3nn.o3 import Irreps

Instruction = tuple[int, int, int, str, bool, float]


class TensorProductConv(nn.Module):
    r"""Clebsch-Gordan convolution: tensor products of senders with the irreps of edges, summed over neighbours.

    The convolution of Tensor Field Networks (https://arxiv.org/abs/1802.08219) as NequIP and MACE use it, with a weight
    for each edge, path and channel,

    .. math::
        f'_{i,p,uk} = \sqrt{\alpha_p} \sum_{j \in N(i)} w_{ij,pu} \sum_{m n} C^p_{mnk} \; f_{j,um} \; Y_n(r_{ij})

    It is the same function of the same inputs, weights in the same order, as
    ``e3nn.o3.TensorProduct(irreps_in, irreps_sh, irreps_out, instructions)`` on the gathered features and a sum over
    the edges of each receiver. What differs is the cost: gather, product and sum are one op
    (:func:`geo.ops.gather_tensor_product_segment_sum`), and no tensor of the size of the messages exists.

    Args:
        irreps_in: Irreps of the nodes, any multiplicities and parities.
        irreps_sh: Irreps of the edges, each of multiplicity 1, such as ``o3.Irreps.spherical_harmonics(2)``.
        irreps_out: Irreps of the output.
        instructions: Paths as e3nn writes them: (index in `irreps_in`, in `irreps_sh`, in `irreps_out`, ``'uvu'``,
            has_weight) and perhaps a path weight. ``'uvu'`` alone: every path from an irrep of `irreps_in` and one of
            `irreps_sh` to one that occurs in `irreps_out`, whose multiplicities do not count here. Each path then has
            an output block of its own with the multiplicity of its input; blocks are sorted by irrep as
            ``Irreps.sort`` does, and paths, and so weights, stand in the order of their blocks. ``.irreps_out`` and
            ``.instructions`` say what came out. This is MACE's ``tp_out_irreps_with_instructions``, and NequIP's rule
            but for the order of the weights. (default: ``'uvu'``)
        shared_weights: The layer has one weight vector for all edges, in place of weights given in the call.
            (default: ``False``)
        irrep_normalization: ``'component'``, ``'norm'`` or ``'none'``, as in e3nn. (default: ``'component'``)
        path_normalization: ``'element'``, ``'path'`` (here the same) or ``'none'``, as in e3nn. (default:
            ``'element'``)

    Shapes:
        x :math:`(|V|, \text{dim})`, edge_index :math:`(2, |E|)`, edge_sh :math:`(|E|, \text{dim}_{sh})`, weight
        :math:`(|E|, \text{weight\_numel})`; output :math:`(|V|, \text{dim}')`, in the finest dtype of x, edge_sh and
        weight. Between two sets of nodes, x has a row for each sender and the output one for each receiver.

    Symmetry and derivatives:
        Equivariant to O(3), to which edge_sh is transformed with x, and to node permutation; differentiable any number
        of times in x, edge_sh and weight. A graph's output does not depend on its batch.

    Raises:
        ValueError: Irreps of the edges with other multiplicities than 1, paths that are not allowed, or inputs that do
            not fit together.
        IndexError: An edge to a node that is not there.

    Example:
        >>> conv = TensorProductConv("8x0e + 8x1o", "0e + 1o + 2e", "0e + 1o")
        >>> conv.irreps_out, conv.weight_numel
        (8x0e+8x0e+8x1o+8x1o+8x1o, 40)
        >>> edge_index, edge_sh = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.randn(3, 9)
        >>> conv(torch.randn(3, 32), edge_index, edge_sh, torch.randn(3, conv.weight_numel)).shape
        torch.Size([3, 88])
    """

    def __init__(
        self,
        irreps_in: str | Irreps,
        irreps_sh: str | Irreps,
        irreps_out: str | Irreps,
        instructions: str | Sequence[Sequence[Any]] = "uvu",
        *,
        shared_weights: bool = False,
        irrep_normalization: str = "component",
        path_normalization: str = "element",
    ) -> None:
        from e3nn.o3 import Irreps

        super().__init__()
        for name, value, allowed in (
            ("irrep_normalization", irrep_normalization, ("component", "norm", "none")),
            ("path_normalization", path_normalization, ("element", "path", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")
        parsed = []
        for name, irreps in (("irreps_in", irreps_in), ("irreps_sh", irreps_sh), ("irreps_out", irreps_out)):
            try:
                parsed.append(Irreps(irreps))
            except (ValueError, TypeError, AssertionError) as err:
                raise ValueError(f"{name} is {irreps!r}, which e3nn does not read: {err}") from None
        self.irreps_in, self.irreps_sh, self.irreps_out = parsed
        for mul, ir in self.irreps_sh:
            if mul != 1:
                raise ValueError(f"irreps_sh has {mul}x{ir}, but each irrep of the edges must have multiplicity 1")
        if isinstance(instructions, str):
            if instructions != "uvu":
                raise ValueError(f"instructions is {instructions!r}, but must be 'uvu' or a list of instructions")
            self.irreps_out, self.instructions = _all_paths(self.irreps_in, self.irreps_sh, self.irreps_out)
        else:
            irreps = (self.irreps_in, self.irreps_sh, self.irreps_out)
            self.instructions = [_checked(number, path, irreps) for number, path in enumerate(instructions)]
        self.weight_numel = sum(self.irreps_in[i].mul for i, *_, trained, _ in self.instructions if trained)
        self.shared_weights = bool(shared_weights)
        self.irrep_normalization, self.path_normalization = irrep_normalization, path_normalization
        self._dims = (self.irreps_in.dim, self.irreps_sh.dim, self.irreps_out.dim)  # torch.compile cannot ask Irreps
        paths, coefficients = self._tables()
        self.register_buffer("_paths", paths, persistent=False)
        # as integers of the same bits: a cast of the module must leave these in float64
        self.register_buffer("_coefficients", coefficients.view(torch.int64), persistent=False)
        self.weight: nn.Parameter | None
        weight = nn.Parameter(torch.empty(self.weight_numel)) if self.shared_weights else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def _tables(self) -> tuple[Tensor, Tensor]:
        """The tables of :func:`geo.ops.gather_tensor_product_segment_sum`, normalised as e3nn does."""
        from e3nn.o3 import wigner_3j

        irreps = (self.irreps_in, self.irreps_sh, self.irreps_out)
        slices = [which.slices() for which in irreps]
        rows, coefficients = [], [torch.zeros(0, dtype=torch.float64)]
        for *ends, _, trained, path_weight in self.instructions:
            mul = self.irreps_in[ends[0]].mul
            degrees = [which[end].ir.l for which, end in zip(irreps, ends, strict=True)]
            dims = [2 * l + 1 for l in degrees]
            scale = {"component": dims[2], "norm": dims[0] * dims[1], "none": 1}[self.irrep_normalization] * path_weight
            if self.path_normalization != "none":
                scale /= sum(path[2] == ends[2] for path in self.instructions)
            starts = [where[end].start for where, end in zip(slices, ends, strict=True)]
            rows.append([*starts, mul, *dims, int(trained)])
            coefficients.append(math.sqrt(scale) * wigner_3j(*degrees, dtype=torch.float64).flatten())
        return torch.tensor(rows, dtype=torch.int64).view(-1, 8), torch.cat(coefficients)

    def reset_parameters(self) -> None:
        """Draws the shared weights anew, if there are any."""
        if self.weight is not None:
            nn.init.normal_(self.weight)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_sh: Tensor,
        weight: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        plan: SegmentPlan | None = None,
    ) -> Tensor:
        """Runs the convolution.

        Args:
            x: Features of the senders.
            edge_index: Senders and receivers.
            edge_sh: Irreps of the edges.
            weight: Weights of each edge, in the order of `instructions`; not with `shared_weights`.
            size: Numbers of senders and receivers. (default: those of x)
            plan: The :class:`geo.ops.SegmentPlan` of `edge_index`, to share between layers; it is what is read then.
                (default: made here)
        """
        self._check(x, edge_index, edge_sh, weight, size, plan)
        if plan is None:
            plan = SegmentPlan.from_edge_index(edge_index, x.size(0) if size is None else size)
        if self.weight is not None:
            weight = self.weight.unsqueeze(0)
        elif weight is None:  # no path has one
            weight = edge_sh.new_zeros(1, 0)
        tables = (self.get_buffer("_coefficients").view(torch.float64), self.get_buffer("_paths"))
        return gather_tensor_product_segment_sum(x, edge_sh, weight, *tables, self._dims[2], plan=plan)

    def _check(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_sh: Tensor,
        weight: Tensor | None,
        size: tuple[int, int] | None,
        plan: SegmentPlan | None,
    ) -> None:
        if x.dim() != 2 or x.size(1) != self._dims[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self._dims[0]})")
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
            raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")
        num_edges = edge_index.size(1)
        if edge_sh.shape != (num_edges, self._dims[1]):
            wanted = (num_edges, self._dims[1])
            raise ValueError(f"edge_sh has shape {tuple(edge_sh.shape)}, but must be {wanted}")
        if self.shared_weights:
            if weight is not None:
                raise ValueError("weight is given, but the layer has shared weights of its own")
        elif weight is None:
            if self.weight_numel:
                raise ValueError(f"weight is None, but must be ({num_edges}, {self.weight_numel})")
        elif weight.shape != (num_edges, self.weight_numel):
            wanted = (num_edges, self.weight_numel)
            raise ValueError(f"weight has shape {tuple(weight.shape)}, but must be {wanted}")
        if size is not None and (not isinstance(size, tuple) or len(size) != 2 or size[0] != x.size(0)):
            raise ValueError(f"size is {size!r}, but x has {x.size(0)} rows: it must be (that, number of receivers)")
        if plan is not None and size is not None and plan.dim_size != size[1]:
            raise ValueError(f"size is {size!r}, but plan is of {plan.dim_size} receivers")

    def extra_repr(self) -> str:
        """Sizes and options."""
        sizes = f"{self.irreps_in} x {self.irreps_sh} -> {self.irreps_out}"
        numbers = f"{len(self.instructions)} paths, {self.weight_numel} weights"
        return f"{sizes} | {numbers}{', shared' if self.shared_weights else ''}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _all_paths(irreps_in: Irreps, irreps_sh: Irreps, irreps_out: Irreps) -> tuple[Irreps, list[Instruction]]:
    """Every path to an irrep that occurs in ``irreps_out``, each to a block of its own, sorted by block."""
    from e3nn.o3 import Irreps

    ends = [
        (i, j, mul, ir)
        for i, (mul, ir_in) in enumerate(irreps_in)
        for j, (_, ir_sh) in enumerate(irreps_sh)
        for ir in ir_in * ir_sh
        if ir in irreps_out
    ]
    if not ends:
        raise ValueError(f"no path leads from irreps_in = {irreps_in} and irreps_sh = {irreps_sh} to {irreps_out}")
    ends.sort(key=lambda end: end[3])  # stable, as Irreps.sort is
    blocks = Irreps([(mul, ir) for _, _, mul, ir in ends])
    return blocks, [(i, j, number, "uvu", True, 1.0) for number, (i, j, _, _) in enumerate(ends)]


def _checked(number: int, path: Sequence[Any], irreps: tuple[Irreps, Irreps, Irreps]) -> Instruction:
    """An instruction of e3nn with its path weight, or a ValueError."""
    what = f"instruction {number}, {tuple(path)},"
    if len(path) not in (5, 6):
        raise ValueError(f"{what} must be (in, sh, out, 'uvu', has_weight) with or without a path weight")
    i, j, k, mode, trained = path[:5]
    path_weight = float(path[5]) if len(path) == 6 else 1.0
    for name, end, which in zip(("irreps_in", "irreps_sh", "irreps_out"), (i, j, k), irreps, strict=True):
        if isinstance(end, bool) or not isinstance(end, int):
            raise ValueError(f"{what} names block {end!r} of {name}, but blocks are counted by integers")
        if not 0 <= end < len(which):
            raise ValueError(f"{what} names block {end} of {name} = {which}, which has {len(which)}")
    if mode != "uvu":
        raise ValueError(f"{what} has mode {mode!r}, but only 'uvu' is there: the channels of the nodes stay apart")
    (mul, ir), (_, ir_sh), (mul_out, ir_out) = irreps[0][i], irreps[1][j], irreps[2][k]
    if mul != mul_out:
        raise ValueError(f"{what} leads from {mul}x{ir} to {mul_out}x{ir_out}: the multiplicities must be equal")
    if ir_out not in ir * ir_sh:
        raise ValueError(f"{what} leads from {ir} and {ir_sh} to {ir_out}, which their product does not hold")
    if not path_weight >= 0 or not math.isfinite(path_weight):
        raise ValueError(f"{what} has path weight {path_weight}, but its square root is taken")
    return i, j, k, mode, bool(trained), path_weight
