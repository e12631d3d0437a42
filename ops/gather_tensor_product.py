r"""Gather, Clebsch-Gordan tensor product with per-edge weights, and segment sum in one pass.

Everything here is one quadrilinear form and its derivatives. With :math:`s(e), t(e)` the source and target of an edge
and paths p, each a triple of irreps with coefficients :math:`C^p` and multiplicity U,

.. math::
    T(x, g, Y, w) = \sum_{e,p,u,i,j,k} C^p_{ijk} \; w_{epu} \; x_{s(e)pui} \; Y_{epj} \; g_{t(e)puk} .

The derivative in the ``g`` slot is the convolution itself, that in the ``x`` slot is the same convolution along the
reversed edges with i and k exchanged (``transposed``), and the ``sh`` and ``weight`` slots share what they gather. Two
ops are closed under differentiation to any order: ``gather_tensor_product_segment_sum`` (one slot) and
``gather_tensor_product_grad`` (the three others in one pass). Neither ever stores a tensor of the size of the messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from geo.ops import bounds
from geo.ops.gather_mul import check_edges, check_one_device, check_sources, promote, resolve, widen
from geo.ops.plan import SegmentPlan, complete, index_from_csr
from geo.ops.registration import define

_NAME = "gather_tensor_product_segment_sum"
_COLUMNS = ("x_offset", "sh_offset", "out_offset", "mul", "dim_in", "dim_sh", "dim_out", "has_weight")


# -- the public function -----------------------------------------------------------------------------------------------
def gather_tensor_product_segment_sum(
    x: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    dim_out: int,
    src_index: Tensor | None = None,
    ptr: Tensor | None = None,
    edge_perm: Tensor | None = None,
    *,
    plan: SegmentPlan | None = None,
) -> Tensor:
    r"""Sum over the edges of each target of tensor products of a source's irreps with those of the edge.

    .. math::
        \text{out}_{n,\,p,\,uk} = \sum_{e \in \text{edges}(n)} \text{weight}_{e,pu}
            \sum_{ij} C^p_{ijk} \, x_{\text{src}(e),\,p,\,ui} \; \text{sh}_{e,\,p,\,j}

    where ``edges(n) = edge_perm[ptr[n]:ptr[n + 1]]`` (or ``ptr[n] .. ptr[n + 1]`` without ``edge_perm``). A path reads
    ``mul`` rows of ``dim_in`` components of x from ``x_offset`` on, ``dim_sh`` components of sh, and adds to ``mul``
    rows of ``dim_out`` components; that is e3nn's layout and its mode 'uvu' with one edge irrep. The extra memory does
    not grow with the edges. Differentiable in ``x``, ``sh`` and ``weight``, any number of times; sums run in a
    fixed order, so results are bitwise the same for any number of threads.

    Args:
        x: Features of the sources, [M, dim].
        sh: Irreps of each edge, such as its spherical harmonics, [E, S].
        weight: Weights [E, W] of the paths that have weights, one after the other, ``mul`` for each; [1, W] where all
            edges share them.
        coefficients: Coefficients of the paths, one after the other, float64, ``dim_in * dim_sh * dim_out`` for each;
            not differentiated.
        paths: One row for each path, int64 [P, 8]: x_offset, sh_offset, out_offset, mul, dim_in, dim_sh, dim_out,
            has_weight (0 or 1). The blocks of x, and those of the output, are equal or apart.
        dim_out: Number of columns of the output; those that no path reaches are zero.
        src_index: Source of each edge, [E] int64 in ``[0, M)``. Taken from ``plan`` when that is given.
        ptr: Segment boundaries, [N + 1] int64, from 0 to E. Taken from ``plan`` when that is given.
        edge_perm: Edges ordered by target, [E] int64 (default: already sorted). Taken from ``plan``.
        plan: A :class:`~geo.ops.SegmentPlan` with ``src_index``; it also keeps the transposed order that backward
            needs, which is otherwise computed (a sort) in every backward.

    Returns:
        out: [N, dim_out], in the promoted dtype of ``x``, ``sh`` and ``weight``; 16-bit types accumulate in float32.

    Raises:
        ValueError: A wrong shape, dtype or device, paths that do not fit the other arguments, or not exactly one of
            ``plan`` and ``ptr``.
        IndexError: An index or ``ptr`` out of bounds.

    Example:
        >>> import torch
        >>> from geo.ops import SegmentPlan, gather_tensor_product_segment_sum
        >>> plan = SegmentPlan.from_edge_index(torch.tensor([[0, 1, 2], [1, 1, 0]]), 3)
        >>> x, sh, weight = torch.randn(3, 12), torch.randn(3, 3), torch.rand(3, 4)
        >>> dot = torch.eye(3, dtype=torch.float64).flatten()  # 1o x 1o -> 0e for four channels
        >>> paths = torch.tensor([[0, 0, 0, 4, 3, 3, 1, 1]])
        >>> gather_tensor_product_segment_sum(x, sh, weight, dot, paths, 4, plan=plan).shape
        torch.Size([3, 4])
    """
    src_index, dst_index, ptr, edge_perm = resolve(_NAME, src_index, ptr, edge_perm, plan)
    _check_arguments(x, sh, weight, coefficients, paths, src_index, dim_out)
    x, sh, weight = promote(x, sh, weight)
    t_ptr = t_perm = None
    if plan is not None:
        check_sources(_NAME, plan, x)
        if torch.is_grad_enabled() and (x.requires_grad or sh.requires_grad or weight.requires_grad):
            t_ptr, t_perm = plan.t_ptr, plan.t_perm
    num_edges = sh.size(0)
    checks = (
        ("src_index", src_index, x.size(0) - 1),
        ("dst_index", dst_index, ptr.size(0) - 2),
        ("edge_perm", edge_perm, num_edges - 1),
        ("ptr", ptr, num_edges),
    )
    order = (src_index, dst_index, ptr, edge_perm, t_ptr, t_perm)
    args = (x, sh, weight, coefficients, paths, *order, dim_out, False)
    out: Tensor = bounds.call(_NAME, torch.ops.geo.gather_tensor_product_segment_sum, args, checks)
    return out


def _check_arguments(
    x: Tensor, sh: Tensor, weight: Tensor, coefficients: Tensor, paths: Tensor, src_index: Tensor, dim_out: int
) -> None:
    for name, tensor, layout in (("x", x, "[M, dim]"), ("sh", sh, "[E, S]"), ("weight", weight, "[E, W] or [1, W]")):
        if tensor.dim() != 2:
            raise ValueError(f"{_NAME}: {name} must be {layout}, got shape {list(tensor.shape)}")
    if src_index.size(0) != sh.size(0):
        raise ValueError(
            f"{_NAME}: src_index must have one entry per row of sh ({sh.size(0)}), got {src_index.size(0)}"
        )
    if weight.size(0) not in (sh.size(0), 1):
        raise ValueError(f"{_NAME}: weight must have one row per edge ({sh.size(0)}) or 1, got {list(weight.shape)}")
    if coefficients.dim() != 1 or coefficients.dtype != torch.float64:
        raise ValueError(
            f"{_NAME}: coefficients must be float64 with one axis, got {coefficients.dtype} {list(coefficients.shape)}"
        )
    if paths.dim() != 2 or paths.size(1) != len(_COLUMNS) or paths.dtype != torch.int64:
        raise ValueError(f"{_NAME}: paths must be int64 [P, {len(_COLUMNS)}], got {paths.dtype} {list(paths.shape)}")
    check_one_device(_NAME, x=x, sh=sh, weight=weight, coefficients=coefficients, paths=paths, src_index=src_index)
    if torch.compiler.is_compiling() or not bounds.reads_values(paths):
        return
    _check_paths(x.size(1), sh, weight, coefficients, paths, dim_out)


def _check_paths(dim_x: int, sh: Tensor, weight: Tensor, coefficients: Tensor, paths: Tensor, dim_out: int) -> None:
    """Raise ValueError unless every path lies in its tensors and its blocks are equal to or apart from the others'."""
    blocks: tuple[dict[int, tuple[int, int]], ...] = ({}, {})  # of x and out: first column -> (mul, components)
    rows: list[list[int]] = paths.tolist()
    dim_sh, numel, num_coefficients = sh.size(1), weight.size(1), coefficients.size(0)
    weights = count = 0
    for number, (x0, sh0, out0, mul, d1, d2, d3, has_weight) in enumerate(rows):
        inside = min(x0, sh0, out0, mul) >= 0 and min(d1, d2, d3) >= 1 and has_weight in (0, 1)
        if not inside or x0 + mul * d1 > dim_x or sh0 + d2 > dim_sh or out0 + mul * d3 > dim_out:
            found = ", ".join(f"{name} {value}" for name, value in zip(_COLUMNS, rows[number], strict=True))
            raise ValueError(
                f"{_NAME}: path {number} ({found}) does not fit x, sh and out: {dim_x}, {dim_sh}, {dim_out}"
            )
        weights += mul * has_weight
        count += d1 * d2 * d3
        for kind, first, d in ((0, x0, d1), (1, out0, d3)):
            if mul and blocks[kind].setdefault(first, (mul, d)) != (mul, d):
                raise ValueError(
                    f"{_NAME}: two paths have blocks of different sizes at {first} of {('x', 'out')[kind]}"
                )
    for kind in (0, 1):
        end = 0
        for first, (mul, d) in sorted(blocks[kind].items()):
            if first < end:
                raise ValueError(f"{_NAME}: the block at {first} of {('x', 'out')[kind]} overlaps the one before it")
            end = first + mul * d
    if weights != numel:
        raise ValueError(f"{_NAME}: the paths have {weights} weights, weight has {numel}")
    if count != num_coefficients:
        raise ValueError(f"{_NAME}: the paths have {count} coefficients, got {num_coefficients}")


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
class _Path(NamedTuple):
    """One path: columns of the gathered rows, of sh, of the sums and of weight (None: no weight), coefficients."""

    source: slice
    sh: slice
    target: slice
    weight: slice | None
    mul: int
    cg: Tensor  # [components of a source, of sh, of a target]

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """The path's block of the source of each edge, [E, mul, components]."""
        return x[:, self.source].reshape(x.size(0), self.mul, self.cg.size(0)).index_select(0, index)

    def target_rows(self, g: Tensor, index: Tensor) -> Tensor:
        """Likewise of the target."""
        return g[:, self.target].reshape(g.size(0), self.mul, self.cg.size(2)).index_select(0, index)

    def matrix(self, sh: Tensor) -> Tensor:
        """The coefficients summed with sh, [E, components of a source, of a target]."""
        return torch.einsum("ijk,ej->eik", self.cg, sh[:, self.sh])

    def weighted(self, message: Tensor, weight: Tensor) -> Tensor:
        """[E, mul, ...] times the path's weights."""
        return message if self.weight is None else message * weight[:, self.weight].unsqueeze(-1)


def _read(paths: Tensor, coefficients: Tensor, dtype: torch.dtype, transposed: bool) -> Iterator[_Path]:
    weights = count = 0
    for x0, sh0, out0, mul, d1, d2, d3, has_weight in paths.tolist():
        cg = coefficients[count : count + d1 * d2 * d3].to(dtype).view(d1, d2, d3)
        count += d1 * d2 * d3
        source, target = slice(x0, x0 + mul * d1), slice(out0, out0 + mul * d3)
        if transposed:
            source, target, cg = target, source, cg.transpose(0, 2)
        columns = slice(weights, weights + mul) if has_weight else None
        weights += mul * has_weight
        yield _Path(source, slice(sh0, sh0 + d2), target, columns, mul, cg)


def _put(values: Tensor, columns: slice, size: int) -> Tensor:
    """[E, columns] as [E, size] with zeros elsewhere."""
    return F.pad(values, (columns.start, size - columns.stop))


def gather_tensor_product_segment_sum_reference(
    x: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    dim_out: int,
    src_index: Tensor | None = None,
    ptr: Tensor | None = None,
    edge_perm: Tensor | None = None,
    *,
    plan: SegmentPlan | None = None,
) -> Tensor:
    """:func:`gather_tensor_product_segment_sum` composed of PyTorch ops: the specification, also under torch.func."""
    src_index, dst_index, ptr, edge_perm = resolve(_NAME, src_index, ptr, edge_perm, plan)
    if dst_index is None:
        dst_index = index_from_csr(ptr, edge_perm, sh.size(0))
    x, sh, weight = promote(x, sh, weight)
    return _sum(x, sh, weight, coefficients, paths, src_index, dst_index, ptr.size(0) - 1, dim_out, False)


def _sum(
    x: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    num_out: int,
    dim_out: int,
    transposed: bool,
) -> Tensor:
    dtype = x.dtype
    x, sh, weight = widen(x), widen(sh), widen(weight)
    out = x.new_zeros((num_out, dim_out))
    for path in _read(paths, coefficients, x.dtype, transposed):
        message = path.weighted(path.rows(x, src_index) @ path.matrix(sh), weight).flatten(1)
        out = out.index_add(0, dst_index, _put(message, path.target, dim_out))
    return out.to(dtype)


def _forward_kernel(
    x: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
    dim_out: int,
    transposed: bool,
) -> Tensor:
    dims = (dim_out, x.size(1)) if transposed else (x.size(1), dim_out)
    _check_paths(dims[0], sh, weight, coefficients, paths, dims[1])
    dst_index = check_edges(_NAME, x.size(0), src_index, dst_index, ptr, perm)
    num_out = ptr.size(0) - 1
    return _sum(x, sh, weight, coefficients, paths, src_index, dst_index, num_out, dim_out, transposed)


def _grad_kernel(
    x: Tensor,
    g: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor,
    t_perm: Tensor | None,
    transposed: bool,
    need_x: bool,
    need_sh: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = (g.size(1), x.size(1)) if transposed else (x.size(1), g.size(1))
    _check_paths(dims[0], sh, weight, coefficients, paths, dims[1])
    bounds.check_index("gather_tensor_product_grad", "src_index", src_index, x.size(0))
    bounds.check_index("gather_tensor_product_grad", "dst_index", dst_index, g.size(0))
    dtype = x.dtype
    x, g, sh, weight = widen(x), widen(g), widen(sh), widen(weight)
    dx = x.new_zeros(x.shape if need_x else (0,))
    dsh = sh.new_zeros(sh.shape if need_sh else (0,))
    dweight = weight.new_zeros(weight.shape if need_weight else (0,))
    for path in _read(paths, coefficients, x.dtype, transposed):
        rows, g_rows = path.rows(x, src_index), path.target_rows(g, dst_index)
        back = g_rows @ path.matrix(sh).transpose(1, 2)
        if need_x:
            message = path.weighted(back, weight).flatten(1)
            dx = dx.index_add(0, src_index, _put(message, path.source, x.size(1)))
        if need_sh:
            moment = path.weighted(rows, weight).transpose(1, 2) @ g_rows
            dsh = dsh + _put(torch.einsum("ijk,eik->ej", path.cg, moment), path.sh, sh.size(1))
        if need_weight and path.weight is not None:
            product = (rows * back).sum(-1)
            if weight.size(0) != sh.size(0):
                product = product.sum(0, keepdim=True)
            dweight = dweight + _put(product, path.weight, weight.size(1))
    return dx.to(dtype), dsh.to(dtype), dweight.to(dtype)


# -- shapes ------------------------------------------------------------------------------------------------------------
def _check_shapes(x: Tensor, sh: Tensor, weight: Tensor, coefficients: Tensor, paths: Tensor, index: Tensor) -> None:
    torch._check(x.dim() == 2 and sh.dim() == 2 and weight.dim() == 2 and coefficients.dim() == 1)
    torch._check(paths.dim() == 2 and paths.size(1) == len(_COLUMNS))
    torch._check(index.size(0) == sh.size(0))
    torch._check(x.dtype == sh.dtype and x.dtype == weight.dtype)


def _forward_fake(
    x: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    src_index: Tensor,
    dst_index: Tensor | None,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor | None,
    t_perm: Tensor | None,
    dim_out: int,
    transposed: bool,
) -> Tensor:
    _check_shapes(x, sh, weight, coefficients, paths, src_index)
    return x.new_empty((ptr.size(0) - 1, dim_out))


def _grad_fake(
    x: Tensor,
    g: Tensor,
    sh: Tensor,
    weight: Tensor,
    coefficients: Tensor,
    paths: Tensor,
    src_index: Tensor,
    dst_index: Tensor,
    ptr: Tensor,
    perm: Tensor | None,
    t_ptr: Tensor,
    t_perm: Tensor | None,
    transposed: bool,
    need_x: bool,
    need_sh: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_shapes(x, sh, weight, coefficients, paths, src_index)
    torch._check(g.dim() == 2 and g.dtype == x.dtype)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(sh.shape if need_sh else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
    )


# -- gradients ---------------------------------------------------------------------------------------------------------
class _Form:
    """The form T on given paths and edges, differentiated in any slot."""

    def __init__(
        self,
        table: tuple[Tensor, Tensor],
        ends: tuple[Tensor, Tensor],
        csr: tuple[Tensor, Tensor | None],
        t_csr: tuple[Tensor, Tensor | None],
        transposed: bool,
    ) -> None:
        self.table, self.ends, self.csr, self.t_csr, self.transposed = table, ends, csr, t_csr, transposed

    def of_weights(self) -> _Form:
        """The terms with weights alone: T is linear in the weights only without the others."""
        coefficients, paths = self.table
        paths = torch.cat([paths[:, :3], paths[:, 3:4] * paths[:, 7:], paths[:, 4:]], 1)  # mul 0: nothing to do
        return _Form((coefficients, paths), self.ends, self.csr, self.t_csr, self.transposed)

    def by_g(self, x: Tensor | None, sh: Tensor | None, weight: Tensor | None, dim: int) -> Tensor | None:
        """dT/dg, of ``dim`` columns; ``None`` (zero) when a slot is."""
        if x is None or sh is None or weight is None:
            return None
        out: Tensor = torch.ops.geo.gather_tensor_product_segment_sum(
            x, sh, weight, *self.table, *self.ends, *self.csr, *self.t_csr, dim, self.transposed
        )
        return out

    def by_others(
        self, x: Tensor, g: Tensor, sh: Tensor, weight: Tensor, need: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """[dT/dx, dT/dsh, dT/dweight], ``None`` where not needed."""
        if not any(need):
            return [None, None, None]
        if need == (True, False, False):  # the same convolution along the reversed edges
            flipped = _Form(self.table, self.ends[::-1], self.t_csr, self.csr, not self.transposed)
            return [flipped.by_g(g, sh, weight, x.size(1)), None, None]
        grads = torch.ops.geo.gather_tensor_product_grad(
            x, g, sh, weight, *self.table, *self.ends, *self.csr, *self.t_csr, self.transposed, *need
        )
        return [grad if needed else None for grad, needed in zip(grads, need, strict=True)]


def _total(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:11])
    ctx.transposed = inputs[12]


def _forward_backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
    x, sh, weight, coefficients, paths, src, dst, ptr, perm, t_ptr, t_perm = ctx.saved_tensors
    if g is None:
        return (None,) * 13
    dst, t_ptr, t_perm = complete(src, dst, ptr, perm, t_ptr, t_perm, x.size(0))
    form = _Form((coefficients, paths), (src, dst), (ptr, perm), (t_ptr, t_perm), ctx.transposed)
    return (*form.by_others(x, g, sh, weight, tuple(ctx.needs_input_grad[:3])), *(None,) * 10)


def _grad_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:12])
    ctx.transposed, *ctx.need = inputs[12:]


def _grad_backward(ctx: Any, hx: Tensor | None, hs: Tensor | None, hw: Tensor | None) -> tuple[Tensor | None, ...]:
    # The outputs are derivatives of T, so <h, outputs> = T(hx, g, sh, w) + T(x, g, hs, w) + T(x, g, sh, hw), the last
    # of the paths with weights.
    x, g, sh, weight, coefficients, paths, src, dst, ptr, perm, t_ptr, t_perm = ctx.saved_tensors
    hx, hs, hw = (h if need else None for h, need in zip((hx, hs, hw), ctx.need, strict=True))
    form = _Form((coefficients, paths), (src, dst), (ptr, perm), (t_ptr, t_perm), ctx.transposed)
    need_x, need_g, need_sh, need_weight = ctx.needs_input_grad[:4]
    terms: list[list[Tensor | None]] = [[None, None, None]]
    if hx is not None:
        terms.append(form.by_others(hx, g, sh, weight, (False, need_sh, need_weight)))
    if hs is not None:
        terms.append(form.by_others(x, g, hs, weight, (need_x, False, need_weight)))
    if hw is not None:
        terms.append(form.of_weights().by_others(x, g, sh, hw, (need_x, need_sh, False)))
    dx, dsh, dweight = (_total(*slot) for slot in zip(*terms, strict=True))
    dg = None
    if need_g:
        dim = g.size(1)
        by_weight = None if hw is None else form.of_weights().by_g(x, sh, hw, dim)
        dg = _total(form.by_g(hx, sh, weight, dim), form.by_g(x, hs, weight, dim), by_weight)
    return (dx, dg, dsh, dweight, *(None,) * 12)


define(
    "gather_tensor_product_segment_sum(Tensor x, Tensor sh, Tensor weight, Tensor coefficients, Tensor paths, "
    "Tensor src_index, Tensor? dst_index, Tensor ptr, Tensor? perm, Tensor? t_ptr, Tensor? t_perm, SymInt dim_out, "
    "bool transposed) -> Tensor",
    _forward_kernel,
    _forward_fake,
    _forward_backward,
    _forward_setup,
)
define(
    "gather_tensor_product_grad(Tensor x, Tensor g, Tensor sh, Tensor weight, Tensor coefficients, Tensor paths, "
    "Tensor src_index, Tensor dst_index, Tensor ptr, Tensor? perm, Tensor t_ptr, Tensor? t_perm, bool transposed, "
    "bool need_x, bool need_sh, bool need_weight) -> (Tensor, Tensor, Tensor)",
    _grad_kernel,
    _grad_fake,
    _grad_backward,
    _grad_setup,
)
