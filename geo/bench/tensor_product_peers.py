"""Who takes part in ``bench tensor-products``: this library, e3nn, plain PyTorch, cuEquivariance, OpenEquivariance."""

from __future__ import annotations

import functools
import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geo import ops
from geo.bench.tensor_product_problems import (
    Candidate,
    Convolution,
    Function,
    Graph,
    NotAvailable,
    Problem,
    Product,
    flat,
    product_problem,
    same,
    unflat,
    wigner_3j,
)
from geo.nn import GauntTensorProduct
from geo.nn.gaunt import as_e3nn
from geo.o3 import SphereGrid

Builders = dict[str, Callable[[], Candidate]]
METHODS = ("auto", "sparse", "grid", "separable")
MOST_BYTES = 4e9  # of the temporary of an outer product, above which it is not tried


def products(problem: Problem, product: Product, dtype: torch.dtype, layouts: Sequence[str]) -> Builders:
    """Every way to compute a product."""
    found: Builders = {}
    if product.complete and product.mode != "full":
        for method in METHODS:
            found[f"geo {method}"] = functools.partial(_op, problem, product, method)
        if product.channels == (1, 1):
            found["geo auto, rows as channels"] = functools.partial(_op_of_rows, problem, product)
    for layout in layouts if product.complete else ("e3nn",):
        for method in ("auto",) if product.complete and product.mode != "full" else METHODS:
            name = f"geo layer {method}, {layout}"
            found[name] = functools.partial(_layer, problem, product, method, layout, dtype)
    found["e3nn TensorProduct"] = functools.partial(_e3nn, problem, product, dtype)
    if problem.kind == "odd" and product.complete:
        return found  # of interest for what a bracket costs
    found["e3nn TensorProduct, no weights"] = functools.partial(_e3nn_bare, problem, product, dtype)
    if product.mode == "uuu":
        found["e3nn FullTensorProduct"] = functools.partial(_e3nn_full, problem, product, dtype)
    if not product.pseudo:
        for layout in ("BIC", "BCI"):
            found[f"torch grid, {layout}"] = functools.partial(_grid, problem, product, layout)
        found["torch grid, oneDNN"] = functools.partial(_grid, problem, product, "oneDNN", dtype)
    if product.mode != "full":
        found["torch dense tensor"] = functools.partial(_dense_tensor, problem, product)
    found["cuEquivariance"] = functools.partial(_cuequivariance, problem, product)
    return found


# -- this library ------------------------------------------------------------------------------------------------------
def _multiply(product: Product, method: str) -> Function:
    true, pseudo = max(product.true, default=-1), max(product.pseudo, default=-1)

    def function(x: Tensor, y: Tensor) -> Tensor:
        outs = [ops.gaunt_product(x, y, true, method=method)] if true >= 0 else []
        outs += [ops.gaunt_product(x, y, pseudo, True, method=method)] if pseudo >= 0 else []
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    return function


def _leave_dense(product: Product) -> Callable[[Tensor], Tensor]:
    """Of the rows of all degrees those that are asked for."""
    start = (max(product.true, default=-1) + 1) ** 2
    wanted = [l * l + m for l in product.true for m in range(2 * l + 1)]
    wanted += [start + l * l + m for l in product.pseudo for m in range(2 * l + 1)]
    return lambda out: out[:, wanted]


def _op(problem: Problem, product: Product, method: str) -> Candidate:
    return Candidate(problem, _multiply(product, method), [same, same], _leave_dense(product))


def _op_of_rows(problem: Problem, product: Product) -> Candidate:
    """One channel: rows in the place of channels, where kernels have their lanes."""
    enter = [lambda x: x.permute(2, 1, 0)] * 2
    leave = _leave_dense(product)
    return Candidate(problem, _multiply(product, "auto"), enter, lambda out: leave(out).permute(2, 1, 0), "[1, I, B]")


def _tensor_product(product: Product, method: str, layout: str) -> GauntTensorProduct:
    first, second, out = product.irreps()
    kind = "bracket" if product.pseudo else False
    options: dict[str, Any] = {"antisymmetric": kind, "normalize": "gaunt", "method": method, "layout": layout}
    return GauntTensorProduct(first, second, out, mode=product.mode, **options)


def _layer(problem: Problem, product: Product, method: str, layout: str, dtype: torch.dtype) -> Candidate:
    layer = _tensor_product(product, method, layout).to(problem.leaves[0].device, dtype)
    if layout == "dense":
        return Candidate(problem, layer, [same, same], _leave_dense(product))
    return Candidate(problem, layer, *_flat(product))


def _flat(product: Product) -> tuple[list[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    enter = [functools.partial(flat, degrees=degrees) for degrees in (product.first, product.second)]
    return [*enter], functools.partial(unflat, degrees=(*product.true, *product.pseudo))


# -- e3nn --------------------------------------------------------------------------------------------------------------
def _e3nn(problem: Problem, product: Product, dtype: torch.dtype) -> Candidate:
    module = as_e3nn(_tensor_product(product, "auto", "e3nn"), dtype).to(problem.leaves[0].device)
    return Candidate(problem, module, *_flat(product))


def _e3nn_bare(problem: Problem, product: Product, dtype: torch.dtype) -> Candidate:
    """Path weights under a root, as e3nn has them: the same function up to the signs of paths."""
    places = [{l: i for i, l in enumerate(degrees)} for degrees in (product.first, product.second, product.true)]
    pseudo = {l: len(product.true) + i for i, l in enumerate(product.pseudo)}
    mode = "uvuv" if product.mode == "full" else product.mode
    instructions = [
        (
            places[0][p.l1],
            places[1][p.l2],
            (pseudo if p.odd else places[2])[p.l3],
            mode,
            False,
            product.coefficient(p) ** 2,
        )
        for p in product.paths
    ]
    module = e3nn_tensor_product(*product.irreps(), instructions, dtype, "none").to(problem.leaves[0].device)
    x, y = problem.leaves
    unsigned = product_problem(problem.kind, product, x, y, product.tensor(absolute=True))
    return Candidate(unsigned, module, *_flat(product), note="path coefficients without signs")


def e3nn_tensor_product(
    first: str,
    second: str,
    out: str,
    instructions: Sequence[tuple[Any, ...]],
    dtype: torch.dtype,
    normalization: str = "",
) -> Any:
    """An ``o3.TensorProduct`` with its symbols computed in float64; without ``normalization``, as e3nn has it."""
    from e3nn import o3

    options: dict[str, Any] = (
        {"irrep_normalization": normalization, "path_normalization": normalization} if normalization else {}
    )
    if any(instruction[4] for instruction in instructions):
        options |= {"shared_weights": False, "internal_weights": False}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return o3.TensorProduct(first, second, out, list(instructions), **options).to(dtype)
    finally:
        torch.set_default_dtype(default)


def _e3nn_full(problem: Problem, product: Product, dtype: torch.dtype) -> Candidate:
    """Paths apart, on rows of one channel; the comparison sums them with the product's coefficients."""
    from e3nn import o3

    first, second, _ = Product(product.first, product.second, (), ()).irreps()
    signs = [(l, (-1) ** l) for l in product.true] + [(l, -((-1) ** l)) for l in product.pseudo]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = o3.FullTensorProduct(first, second, filter_ir_out=[o3.Irrep(*ir) for ir in signs])
    finally:
        torch.set_default_dtype(default)
    channels = product.out_channels
    spans: dict[tuple[int, int], list[tuple[int, float]]] = {ir: [] for ir in signs}
    slices = module.irreps_out.slices()
    for one, two, third in ((ins.i_in1, ins.i_in2, ins.i_out) for ins in module.instructions):
        ir = module.irreps_out[third].ir
        l1, l2 = module.irreps_in1[one].ir.l, module.irreps_in2[two].ir.l
        path = next(p for p in product.paths if p[:3] == (l1, l2, ir.l))
        spans[ir.l, ir.p].append((slices[third].start, product.coefficient(path) / (2 * ir.l + 1) ** 0.5))

    def leave(out: Tensor) -> Tensor:
        blocks = []
        for (l, _), parts in spans.items():
            block = out.new_zeros(len(out), 2 * l + 1)
            for start, c in parts:
                block = block + c * out[:, start : start + 2 * l + 1]
            blocks.append(block)
        apart: Tensor = torch.cat(blocks, 1).unflatten(0, (-1, channels))
        return apart.transpose(1, 2)

    module = module.to(problem.leaves[0].device, dtype)
    outputs = len(module.irreps_out) * channels
    return Candidate(problem, module, [_single] * 2, leave, "outputs more: every path apart", outputs)


def _single(x: Tensor) -> Tensor:
    """Rows of one channel."""
    return x.transpose(1, 2).flatten(0, 1)


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
class _Linear(torch.autograd.Function):
    """``x @ weight.t()`` by oneDNN, for a constant weight given with its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transpose: Tensor) -> Tensor:
        ctx.save_for_backward(weight, transpose)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return out

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor | None, ...]:
        weight, transpose = ctx.saved_tensors
        return _linear(g[0].contiguous(), transpose, weight), None, None


def _linear(x: Tensor, weight: Tensor, transpose: Tensor) -> Tensor:
    out: Tensor = _Linear.apply(x, weight, transpose)  # type: ignore[no-untyped-call]
    return out


def _grid(problem: Problem, product: Product, layout: str, onednn: torch.dtype | None = None) -> Candidate:
    """To the smallest exact grid, multiply, and back: three matrix products with the harmonics at the nodes."""
    device = problem.leaves[0].device
    if onednn is not None and (device.type != "cpu" or not torch.backends.mkldnn.is_available()):
        raise NotAvailable("not available: oneDNN is for the CPU")
    if onednn == torch.float64:
        raise NotAvailable("not available: oneDNN has no float64")
    degrees = (product.first, product.second, product.true)
    grid = SphereGrid(sum(max(d) for d in degrees))
    wanted = [[l * l + m for l in d for m in range(2 * l + 1)] for d in degrees]
    values = [grid.to_matrix(max(d))[:, w] for d, w in zip(degrees, wanted, strict=True)]
    values[2] = values[2] * grid.weights[:, None]
    full = product.mode == "full"

    @functools.cache
    def tables(dtype: torch.dtype) -> list[Tensor]:
        made = [values[0], values[1], values[2].t()]
        return [t.to(device, dtype).contiguous() for v in made for t in (v, v.t())]

    def function(x: Tensor, y: Tensor) -> Tensor:
        a, a_t, b, b_t, c, c_t = tables(x.dtype)
        if layout == "BIC":
            f, h = torch.matmul(a, x), torch.matmul(b, y)
            return torch.matmul(c, (f.unsqueeze(3) * h.unsqueeze(2)).flatten(2) if full else f * h)
        if onednn is not None:
            f, h = _linear(x, a, a_t), _linear(y, b, b_t)
        else:
            f, h = torch.matmul(x, a_t), torch.matmul(y, b_t)
        fh = (f.unsqueeze(2) * h.unsqueeze(1)).flatten(1, 2) if full else f * h
        return _linear(fh, c, c_t) if onednn is not None else torch.matmul(fh, c_t)

    turn = same if layout == "BIC" else _turn
    note = "[B, I, C]" if layout == "BIC" else "[B, C, I]"
    return Candidate(problem, function, [turn, turn], turn, f"{note}, the fewest nodes that are exact")


def _turn(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _dense_tensor(problem: Problem, product: Product) -> Candidate:
    """All pairs of components times the coefficients as one matrix."""
    couplings = product.tensor().to(problem.leaves[0].device)
    shared = product.mode == "uvu"
    needed = problem.leaves[0].size(0) * couplings[..., 0].numel() * (1 if shared else product.out_channels) * 4
    if needed > MOST_BYTES:
        raise NotAvailable(f"not run: its outer product takes {needed / 2**30:.0f} GiB")

    @functools.cache
    def table(dtype: torch.dtype) -> Tensor:
        return (couplings.permute(1, 2, 0).flatten(1) if shared else couplings.flatten(0, 1)).to(dtype).contiguous()

    def function(x: Tensor, y: Tensor) -> Tensor:
        if shared:  # y [B, d2] as matrices [B, d3, d1]
            return torch.matmul((y[..., 0] @ table(y.dtype)).unflatten(1, (couplings.size(2), couplings.size(0))), x)
        return (x.unsqueeze(3) * y.unsqueeze(2)).flatten(2) @ table(x.dtype)

    return Candidate(problem, function, [same, same] if shared else [_turn, _turn], same if shared else _turn)


# -- cuEquivariance and OpenEquivariance -------------------------------------------------------------------------------
def _imported(name: str, package: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library of its own that does not load
        raise NotAvailable(f"not available: {package}: {error}") from error


def _cuet(device: torch.device) -> tuple[types.ModuleType, types.ModuleType, str]:
    """cuEquivariance, its torch part, and its fastest method here: its kernels are CUDA alone, in a closed package."""
    package = "cuequivariance-torch"
    cue, cuet = _imported("cuequivariance", package), _imported("cuequivariance_torch", package)
    if device.type == "cpu":
        return cue, cuet, "naive"
    _imported("cuequivariance_ops_torch", "cuequivariance-ops-torch")
    return cue, cuet, "uniform_1d"


def _cuequivariance(problem: Problem, product: Product) -> Candidate:
    device = problem.leaves[0].device
    cue, cuet, method = _cuet(device)
    subscripts = {"uuu": "iu,ju,ku+ijk", "uvu": "iu,j,ku+ijk", "full": "iu,jv,kuv+ijk"}[product.mode]
    stp = cue.SegmentedTensorProduct.from_subscripts(subscripts)
    one, two = product.channels
    extra: list[tuple[int, ...]] = [(one,), () if product.mode == "uvu" else (two,), (one,)]
    if product.mode == "full":
        extra[2] = (one, two)
    for operand, degrees in enumerate((product.first, product.second, (*product.true, *product.pseudo))):
        for l in degrees:
            stp.add_segment(operand, (2 * l + 1, *extra[operand]))
    for p in product.paths:
        third = len(product.true) + product.pseudo.index(p.l3) if p.odd else product.true.index(p.l3)
        place = (product.first.index(p.l1), product.second.index(p.l2), third)
        stp.add_path(*place, c=(product.coefficient(p) * wigner_3j(*p[:3])).numpy())
    module = cuet.SegmentedPolynomial(cue.SegmentedPolynomial.eval_last_operand(stp), method=method).to(device)

    def function(x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = module([x.flatten(1), y.flatten(1)])[0].unflatten(1, (-1, product.out_channels))
        return out

    return Candidate(problem, function, [same, same], note=method)


def convolutions(problem: Problem, product: Product, graph: Graph, dtype: torch.dtype) -> Builders:
    """Every way to compute the 'uvu' convolution of e3nn."""
    conv = Convolution.of(product)
    arguments = (problem, conv, graph)
    return {
        "geo TensorProductConv": functools.partial(_geo_conv, *arguments, dtype),
        "e3nn TensorProduct": functools.partial(_e3nn_conv, *arguments, dtype),
        "cuEquivariance": functools.partial(_cuequivariance_conv, *arguments, product, False),
        "cuEquivariance, indexed": functools.partial(_cuequivariance_conv, *arguments, product, True),
        "OpenEquivariance": functools.partial(_openequivariance, *arguments, dtype),
    }


def _geo_conv(problem: Problem, conv: Convolution, graph: Graph, dtype: torch.dtype) -> Candidate:
    import geo.nn

    layer: Any = geo.nn.TensorProductConv(conv.irreps_in, conv.irreps_sh, conv.irreps_out, conv.instructions)
    layer = layer.to(graph.source.device, dtype)
    edge_index = torch.stack([graph.source, graph.target])

    def function(x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = layer(x, edge_index, sh, weight, plan=graph.plan)
        return out

    return Candidate(problem, function, [same] * 3)


def _summed(graph: Graph, message: Tensor) -> Tensor:
    return message.new_zeros(graph.num_nodes, *message.shape[1:]).index_add(0, graph.target, message)


def _e3nn_conv(problem: Problem, conv: Convolution, graph: Graph, dtype: torch.dtype) -> Candidate:
    module = e3nn_tensor_product(conv.irreps_in, conv.irreps_sh, conv.irreps_out, conv.instructions, dtype)
    module = module.to(graph.source.device)

    def function(x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        return _summed(graph, module(x.index_select(0, graph.source), sh, weight))

    return Candidate(problem, function, [same] * 3, note="index_select and index_add")


def _cuequivariance_conv(
    problem: Problem, conv: Convolution, graph: Graph, product: Product, indexed: bool
) -> Candidate:
    """In its own order of paths and its own layout, components before channels."""
    device = graph.source.device
    cue, cuet, method = _cuet(device)
    mul = product.channels[0]
    irreps = [cue.Irreps("O3", text) for text in (conv.irreps_in, conv.irreps_sh, conv.irreps_out)]
    wanted = list(dict.fromkeys(ir for _, ir in irreps[2]))
    options = {"layout": cue.ir_mul, "shared_weights": False, "internal_weights": False, "method": method}
    module = cuet.ChannelWiseTensorProduct(*irreps[:2], wanted, **options).to(device)
    descriptor = cue.descriptors.channelwise_tensor_product(*irreps[:2], wanted).polynomial.operations[0][1]
    ours = {
        (ins[0], ins[1], path.l3): n for n, (ins, path) in enumerate(zip(conv.instructions, conv.paths, strict=True))
    }
    order: dict[int, int] = {}  # their place of a path to ours, and the sign and size of their symbol over e3nn's
    scale = torch.ones(len(conv.paths), dtype=torch.float64)
    for path in descriptor.paths:
        weight, one, two, out = path.indices
        l3 = (descriptor.operands[3].segments[out][0] - 1) // 2
        n = ours[one, two, l3]
        p = conv.paths[n]
        order[weight] = n
        symbol = (2 * p.l3 + 1) ** 0.5 * wigner_3j(*p[:3])
        scale[weight] = float((torch.from_numpy(path.coefficients) * symbol).sum() / (2 * p.l3 + 1))
    places = [order[i] for i in range(len(order))]

    def enter_weight(weight: Tensor) -> Tensor:
        parts: Tensor = weight.unflatten(1, (-1, mul))[:, places] / scale.to(weight)[:, None]
        return parts.flatten(1)

    def leave(out: Tensor) -> Tensor:  # from [2l+1, C] in their order
        blocks = out.split([mul * (2 * conv.paths[n].l3 + 1) for n in places], 1)
        turned = {n: b.unflatten(1, (-1, mul)).transpose(1, 2).flatten(1) for n, b in zip(places, blocks, strict=True)}
        return torch.cat([turned[n] for n in range(len(places))], 1)

    def function(x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        if not indexed:
            return _summed(graph, module(x.index_select(0, graph.source), sh, weight))
        indices = {"indices_1": graph.source, "indices_out": graph.target, "size_out": graph.num_nodes}
        out: Tensor = module(x, sh, weight, **indices)
        return out

    def enter_x(x: Tensor) -> Tensor:
        return unflat(x, product.first).flatten(1)

    note = f"{method}, {'its own gather and scatter' if indexed else 'index_select and index_add'}"
    return Candidate(problem, function, [enter_x, same, enter_weight], leave, note)


def _openequivariance(problem: Problem, conv: Convolution, graph: Graph, dtype: torch.dtype) -> Candidate:
    if graph.source.device.type == "cpu":
        raise NotAvailable("not available: OpenEquivariance needs a GPU")
    oeq = _imported("openequivariance", "openequivariance")
    from e3nn import o3

    irreps = [o3.Irreps(text) for text in (conv.irreps_in, conv.irreps_sh, conv.irreps_out)]
    kinds = {"irrep_dtype": oeq.torch_to_oeq_dtype(dtype), "weight_dtype": oeq.torch_to_oeq_dtype(dtype)}
    tpp = oeq.TPProblem(*irreps, conv.instructions, shared_weights=False, internal_weights=False, **kinds)
    module = oeq.TensorProductConv(tpp, deterministic=False)

    def function(x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = module(x, sh, weight, graph.target, graph.source)
        return out

    return Candidate(problem, function, [same] * 3)


def gaunt_convolutions(problem: Problem, product: Product, graph: Graph) -> Builders:
    """Gaunt products in the place of e3nn's: fewer outputs and a weight for each degree in place of each path."""
    source = ops.SegmentPlan(graph.source, graph.num_nodes)
    true, pseudo = max(product.true), max(product.pseudo, default=-1)

    def function(x: Tensor, sh: Tensor, weight: Tensor, method: str) -> Tensor:
        sent = ops.gather_coo(x, source)
        message = ops.gaunt_product(sent, sh, true, scale_y=weight, method=method)
        if pseudo >= 0:
            bracket = ops.gaunt_product(sent, sh, pseudo, True, scale_y=weight, method=method)
            message = torch.cat((message, bracket), 1)
        return ops.segment_reduce(message, graph.plan, "sum")

    def build(method: str) -> Candidate:
        leave = _leave_dense(product)
        return Candidate(problem, functools.partial(function, method=method), [same] * 3, leave, "another function")

    return {f"geo {method}": functools.partial(build, method) for method in METHODS}
