from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geo import _native
from geo.ops import (
    SegmentPlan,
    gather_tensor_product_segment_sum,
    gather_tensor_product_segment_sum_reference,
)
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
F64 = torch.float64
native = pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")

# Blocks of x and of the output, each (mul, components), and paths: block of x, first column and components of sh, block
# of the output, has_weight. Any coefficients will do: only the layer knows of Clebsch and Gordan.
TABLES = {
    "one path": ([(32, 3)], [(32, 3)], [(0, 0, 3, 0, 1)]),
    "scalars": ([(1, 1)], [(1, 1)], [(0, 0, 1, 0, 1)]),
    "several": (
        [(5, 1), (33, 3), (17, 5)],
        [(5, 3), (33, 1), (33, 3), (17, 9)],
        [(0, 1, 3, 0, 1), (1, 1, 3, 1, 1), (1, 0, 1, 2, 0), (1, 1, 3, 2, 1), (2, 4, 5, 3, 1)],
    ),
    "wide": ([(64, 7), (80, 1)], [(64, 7), (80, 7)], [(0, 0, 7, 0, 1), (0, 7, 1, 0, 1), (1, 0, 7, 1, 1)]),
    "high degrees": ([(3, 13), (3, 11)], [(3, 9), (3, 15)], [(0, 0, 9, 0, 1), (1, 2, 5, 1, 1), (0, 1, 2, 1, 0)]),
    "no weights": ([(4, 3)], [(4, 2)], [(0, 0, 3, 0, 0)]),
    "even sizes": ([(6, 2), (6, 4)], [(6, 4), (6, 2)], [(0, 0, 2, 0, 1), (1, 1, 4, 1, 1), (1, 0, 3, 0, 1)]),
    "columns left out": ([(2, 1), (4, 3)], [(4, 3), (2, 5)], [(1, 2, 3, 0, 1)]),
    "empty block": ([(0, 3), (4, 3)], [(0, 1), (4, 3)], [(0, 0, 3, 0, 1), (1, 0, 3, 1, 1)]),
    "no paths": ([(2, 1)], [(2, 1)], []),
}


class Table:
    """Paths with random coefficients, and the number of columns of each tensor."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        blocks_in, blocks_out, paths = TABLES[name]
        starts = []
        for blocks in (blocks_in, blocks_out):
            ends = torch.tensor([mul * d for mul, d in blocks]).cumsum(0).tolist()
            starts.append([0, *ends])
        rows, coefficients, self.weights = [], [], 0
        for i, sh, dim_sh, o, has_weight in paths:
            (mul, d1), (_, d3) = blocks_in[i], blocks_out[o]
            rows.append([starts[0][i], sh, starts[1][o], mul, d1, dim_sh, d3, has_weight])
            values = torch.randn(d1 * dim_sh * d3, dtype=F64) / (d1 * dim_sh) ** 0.5
            coefficients.append(torch.where(torch.rand_like(values) < 0.3, 0, values))
            self.weights += mul * has_weight
        self.dim_x, self.dim_out = starts[0][-1], starts[1][-1]
        self.dim_sh = max([1, *(row[1] + row[5] for row in rows)])
        self.paths = torch.tensor(rows, dtype=torch.int64).view(-1, 8).to(device)
        self.coefficients = torch.cat([torch.zeros(0, dtype=F64), *coefficients]).to(device)


def graph(num_edges: int, num_src: int, num_dst: int, device: torch.device | str = "cpu") -> SegmentPlan:
    edge_index = torch.stack([torch.randint(num_src, (num_edges,)), torch.randint(num_dst, (num_edges,))])
    return SegmentPlan.from_edge_index(edge_index.to(device), (num_src, num_dst))


def tensors(plan: SegmentPlan, table: Table, dtype=torch.float32, shared: bool = False) -> list[Tensor]:
    num_edges, device = plan.index.size(0), plan.index.device
    x = torch.randn(plan.src_size, table.dim_x)
    sh = torch.randn(num_edges, table.dim_sh)
    weight = torch.randn(1 if shared else num_edges, table.weights)
    return [t.to(device, dtype) for t in (x, sh, weight)]


def with_plan(plan: SegmentPlan, table: Table):
    args = (table.coefficients, table.paths, table.dim_out)
    return lambda x, sh, weight: gather_tensor_product_segment_sum(x, sh, weight, *args, plan=plan)


def without_plan(plan: SegmentPlan, table: Table):
    args = (table.coefficients, table.paths, table.dim_out, plan.src_index, plan.ptr, plan.perm)
    return lambda x, sh, weight: gather_tensor_product_segment_sum(x, sh, weight, *args)


def reference(plan: SegmentPlan, table: Table):
    def conv(*inputs: Tensor) -> Tensor:
        args = (table.coefficients, table.paths, table.dim_out)
        out = gather_tensor_product_segment_sum_reference(*inputs, *args, plan=plan)
        return out + 0 * sum(t.sum() for t in inputs)  # where no path reads one, its gradient is zero

    return conv


def test_table(device):
    """Cross products of two channels, and scalar products of one of them."""
    plan = SegmentPlan.from_edge_index(torch.tensor([[0, 1, 1], [1, 0, 1]], device=device), (2, 3))
    x = torch.tensor([[1.0, 0, 0, 0, 2, 0], [0, 0, 1, 1, 1, 1]], device=device)
    sh = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 3, 0]], device=device)
    weight = torch.tensor([[1.0, 10], [2, 20], [3, 30]], device=device)
    cross = torch.zeros(3, 3, 3, dtype=F64)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        cross[i, j, k], cross[j, i, k] = 1, -1
    coefficients = torch.cat([cross.flatten(), torch.eye(3, dtype=F64).flatten()]).to(device)
    paths = torch.tensor([[0, 0, 1, 2, 3, 3, 3, 1], [3, 0, 0, 1, 3, 3, 1, 0]], device=device)
    for conv in (gather_tensor_product_segment_sum, gather_tensor_product_segment_sum_reference):
        with_blocks = paths.clone()
        with_blocks[1, 0], with_blocks[1, 3] = 0, 2  # both channels: the blocks of x are equal
        with_blocks[0, 2] = 2
        out = conv(x, sh, weight, coefficients, with_blocks, 8, plan=plan)
        assert out.tolist() == [
            [0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 20.0, -20.0],
            [0.0, 2.0 + 3.0, -9.0, 0.0, 1.0, -90.0, 0.0, 90.0],
            [0.0] * 8,
        ]


@pytest.mark.parametrize("num_edges", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equals_reference(device, dtype, num_edges):
    plan = graph(num_edges, 31, 17, device)
    for name in TABLES:
        table = Table(name, device)
        check_op(with_plan(plan, table), reference(plan, table), tensors(plan, table, dtype), factor=10)
    table = Table("several", device)
    check_op(without_plan(plan, table), reference(plan, table), tensors(plan, table, dtype), factor=10)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shared_weights(device, dtype):
    for num_edges in (0, 1, 1000):
        plan = graph(num_edges, 31, 17, device)
        for name in ("several", "no weights", "wide"):
            table = Table(name, device)
            inputs = tensors(plan, table, dtype, shared=True)
            check_op(with_plan(plan, table), reference(plan, table), inputs, factor=50)  # sums over all edges


@pytest.mark.parametrize("needed", [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_each_gradient_alone_equals_reference(device, needed, shared):
    plan = graph(200, 31, 17, device)
    for name in ("several", "wide", "high degrees"):
        table = Table(name, device)
        inputs = tensors(plan, table, F64, shared)
        inputs = [t.requires_grad_(bool(n)) for t, n in zip(inputs, needed, strict=True)]
        leaves = [t for t in inputs if t.requires_grad]
        g = torch.randn(17, table.dim_out, device=device, dtype=F64)
        got = torch.autograd.grad(with_plan(plan, table)(*inputs), leaves, g)
        assert_close(got, torch.autograd.grad(reference(plan, table)(*inputs), leaves, g))


def test_equals_reference_where_sorted_or_crowded(device):
    """Edges sorted by target or by source, all into one node, far more nodes than edges, several chunks."""
    table = Table("several", device)
    for index, src, num_dst, num_src in (
        (torch.randint(9, (3000,)).sort().values, torch.randint(7, (3000,)), 9, 7),
        (torch.randint(9, (3000,)), torch.randint(7, (3000,)).sort().values, 9, 7),
        (torch.full((3000,), 2), torch.randint(7, (3000,)), 5, 7),
        (torch.randint(5, (3000,)), torch.full((3000,), 6), 5, 7),
        (torch.randint(900, (300,)), torch.randint(800, (300,)), 900, 800),
    ):
        plan = SegmentPlan(index.to(device), num_dst, src.to(device), num_src)
        check_op(with_plan(plan, table), reference(plan, table), tensors(plan, table, F64), factor=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_gradient_of_weight(device, dtype):
    """Above a few megabytes it is stored past the caches."""
    plan, table = graph(6000, 50, 40, device), Table("wide", device)
    check_op(with_plan(plan, table), reference(plan, table), tensors(plan, table, dtype), factor=100)


def test_non_contiguous(device):
    plan, table = graph(40, 6, 5, device), Table("several", device)
    x = torch.randn(table.dim_x, 6, device=device).t()
    sh = torch.randn(40, 2 * table.dim_sh, device=device)[:, ::2]
    weight = torch.randn(table.weights, 40, device=device).t()
    check_op(with_plan(plan, table), reference(plan, table), (x, sh, weight), factor=10)
    check_op(with_plan(plan, table), reference(plan, table), (x, sh, weight[:1].expand(40, -1)), factor=10)


def test_dtypes_are_promoted(device):
    plan, table = graph(10, 4, 4, device), Table("several", device)
    x, sh, weight = tensors(plan, table)
    out = with_plan(plan, table)(x, sh.double(), weight.bfloat16())
    assert out.dtype == F64
    assert_close(out, reference(plan, table)(x.double(), sh.double(), weight.bfloat16().double()))


def test_sixteen_bits_accumulate_in_float32(device):
    """4096 terms of one: bfloat16 sums would stop at 256, float16 ones at 2048."""
    zeros = torch.zeros(4096, dtype=torch.int64, device=device)
    plan = SegmentPlan(zeros, 1, zeros, 1)
    paths = torch.tensor([[0, 0, 0, 3, 1, 1, 1, 1]], device=device)
    one = torch.ones(1, dtype=F64, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        x, sh, weight = (torch.ones(s, dtype=dtype, device=device) for s in ((1, 3), (4096, 1), (1, 3)))
        weight.requires_grad_()
        out = gather_tensor_product_segment_sum(x, sh, weight, one, paths, 3, plan=plan)
        assert out.tolist() == [[4096.0] * 3]
        assert torch.autograd.grad(out.sum(), weight)[0].tolist() == [[4096.0] * 3]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_edges=st.integers(0, 700),
    mul=st.integers(1, 70),
    degrees=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_size(seed, num_edges, mul, degrees, shared, dtype):
    torch.manual_seed(seed)
    plan = graph(num_edges, 7, 5)
    sizes = [tuple(2 * l + 1 for l in triple) for triple in degrees]
    TABLES["drawn"] = (
        [(mul, d) for d, _, _ in sizes],
        [(mul, d) for _, _, d in sizes],
        [(n, n, d, n, int(n != 1)) for n, (_, d, _) in enumerate(sizes)],
    )
    table = Table("drawn")
    del TABLES["drawn"]
    inputs = tensors(plan, table, dtype, shared)
    check_op(with_plan(plan, table), reference(plan, table), inputs, factor=50)


@native
def test_same_bits_on_any_number_of_threads():
    index = torch.cat([torch.full((3000,), 3), torch.randint(50, (2000,))])[torch.randperm(5000)]
    plan = SegmentPlan(index, 50, torch.randint(40, (5000,)), 40)
    threads = torch.get_num_threads()
    table = Table("several")
    for shared in (False, True):
        inputs = [t.requires_grad_() for t in tensors(plan, table, shared=shared)]
        results = []
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                out = with_plan(plan, table)(*inputs)
                results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


SMALL = ([(2, 1), (2, 3)], [(2, 3), (2, 1)], [(0, 1, 3, 0, 1), (1, 1, 3, 1, 0), (1, 0, 1, 0, 1)])
TABLES["small"] = SMALL


@pytest.mark.parametrize("shared", [False, True])
def test_derivatives(device, shared):
    plan, table = graph(6, 4, 3, device), Table("small", device)
    inputs = tensors(plan, table, F64, shared)
    check_derivatives(with_plan(plan, table), inputs)
    check_derivatives(without_plan(plan, table), inputs)


@pytest.mark.parametrize("shared", [False, True])
def test_third_derivative(device, shared):
    plan, table = graph(4, 3, 3, device), Table("small", device)
    inputs = [t.requires_grad_() for t in tensors(plan, table, F64, shared)]

    def first(x: Tensor, sh: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        energy = with_plan(plan, table)(x * x, sh * sh, weight * weight).square().sum()
        return torch.autograd.grad(energy, (x, sh, weight), create_graph=True)

    def second(x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        norm = sum(f.square().sum() for f in first(x, sh, weight))
        grads = torch.autograd.grad(norm, (x, sh, weight), create_graph=True)
        return torch.cat([g.flatten() for g in grads])

    assert torch.autograd.gradcheck(second, inputs)
    # three times the gradient of everything, against the reference
    results = []
    for conv in (with_plan(plan, table), reference(plan, table)):
        value = conv(*(t.sin() for t in inputs)).pow(3).sum()
        for _ in range(3):
            value = sum(g.square().sum() for g in torch.autograd.grad(value, inputs, create_graph=True))
        results.append(torch.autograd.grad(value, inputs))
    assert_close(*results, factor=100)  # high powers


def test_gradient_ops_are_closed(device):
    """gradcheck and gradgradcheck of the gradient op itself, in both directions."""
    plan, table = graph(4, 3, 2, device), Table("small", device)
    x, sh, weight = tensors(plan, table, F64)
    order = (plan.src_index, plan.index, plan.ptr, plan.perm, plan.t_ptr, plan.t_perm)

    def grad(x: Tensor, g: Tensor, sh: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        table_args = (table.coefficients, table.paths)
        return torch.ops.geo.gather_tensor_product_grad(x, g, sh, weight, *table_args, *order, False, True, True, True)

    def reverse(g: Tensor, x: Tensor, sh: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        table_args = (table.coefficients, table.paths)
        back = (plan.index, plan.src_index, plan.t_ptr, plan.t_perm, plan.ptr, plan.perm)
        return torch.ops.geo.gather_tensor_product_grad(g, x, sh, weight, *table_args, *back, True, True, True, True)

    g = torch.randn(2, table.dim_out, device=device, dtype=F64)
    check_derivatives(grad, (x, g, sh, weight))
    check_derivatives(reverse, (g, x, sh, weight))
    assert_close(grad(x, g, sh, weight)[1:], reverse(g, x, sh, weight)[1:])


def test_force_training_equals_reference(device):
    """The double backward of a force loss, in float32 through the kernels, against the reference in float64."""
    plan, table = graph(300, 20, 20, device), Table("wide", device)
    inputs = tensors(plan, table)

    def loss(conv, *inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        energy = conv(*leaves).tanh().square().mean()
        forces = torch.autograd.grad(energy, leaves[:2], create_graph=True)
        return list(torch.autograd.grad(sum(f.square().sum() for f in forces), leaves))

    ours = loss(with_plan(plan, table), *inputs)
    theirs = loss(reference(plan, table), *(t.double() for t in inputs))
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max()
        assert (a.double() / scale - b / scale).abs().max() < 1e-4


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(device, grad, shared):
    plan, table = graph(9, 4, 3, device), Table("several", device)
    x, sh, weight = (t.requires_grad_(grad) for t in tensors(plan, table, shared=shared))
    g = torch.randn(3, table.dim_out, device=device, requires_grad=grad)
    src, dst, order = plan.src_index, plan.index, (plan.ptr, plan.perm, plan.t_ptr, plan.t_perm)
    fixed = (table.coefficients, table.paths)
    op = torch.ops.geo.gather_tensor_product_segment_sum.default
    torch.library.opcheck(op, (x, sh, weight, *fixed, src, dst, *order, table.dim_out, False))
    torch.library.opcheck(op, (x, sh, weight, *fixed, src, None, plan.ptr, plan.perm, None, None, table.dim_out, False))
    back = (dst, src, plan.t_ptr, plan.t_perm, plan.ptr, plan.perm)
    torch.library.opcheck(op, (g, sh, weight, *fixed, *back, table.dim_x, True))
    op = torch.ops.geo.gather_tensor_product_grad.default
    for need in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        torch.library.opcheck(op, (x, g, sh, weight, *fixed, src, dst, *order, False, *need))


@pytest.mark.parametrize("how", [{}, {"dynamic": True}, pytest.param({"backend": "inductor"}, marks=pytest.mark.slow)])
def test_compile(device, how):
    table = Table("several", device)
    edge_index = torch.randint(4, (2, 9), device=device)
    inputs = tensors(SegmentPlan.from_edge_index(edge_index, 4), table)

    def model(x: Tensor, sh: Tensor, weight: Tensor, edge_index: Tensor) -> Tensor:
        plan = SegmentPlan.from_edge_index(edge_index, x.size(0))
        args = (table.coefficients, table.paths, table.dim_out)
        return gather_tensor_product_segment_sum(torch.sin(x), sh, weight, *args, plan=plan)

    check_compile(model, (*inputs, edge_index), **how)


def test_bad_index(device):
    plan = SegmentPlan(torch.tensor([0, 0, 1, 1, 1], device=device), 2, torch.tensor([0, 3, 1, 2, 0], device=device), 4)
    table = Table("several", device)
    inputs, fixed = tensors(plan, table), (table.coefficients, table.paths, table.dim_out)
    src, ptr = plan.src_index, plan.ptr
    assert gather_tensor_product_segment_sum(*inputs, *fixed, src, ptr).shape == (2, table.dim_out)
    for position, value in ((1, 4), (4, -1), (0, 2**62)):
        bad = src.clone()
        bad[position] = value
        with pytest.raises(IndexError, match=rf"src_index\[{position}\] = {value} is out of range \[0, 3\]"):
            gather_tensor_product_segment_sum(*inputs, *fixed, bad, ptr)
    perm = torch.tensor([0, 1, 5, 2, 3], device=device)
    with pytest.raises(IndexError, match=r"edge_perm\[2\] = 5 is out of range \[0, 4\]"):
        gather_tensor_product_segment_sum(*inputs, *fixed, src, ptr, perm)
    for bad, message in (([0, 7, 5], r"ptr\[1\] = 7"), ([0, 3, 4], r"ptr\[2\] = 4"), ([1, 3, 5], r"ptr\[0\] = 1")):
        with pytest.raises(IndexError, match=message):
            gather_tensor_product_segment_sum(*inputs, *fixed, src, torch.tensor(bad, device=device))
    with pytest.raises(IndexError):
        gather_tensor_product_segment_sum_reference(*inputs, *fixed, src + 9, ptr)


@native
def test_bad_index_in_the_gradient_op():
    plan, table = graph(5, 4, 3), Table("several")
    x, sh, weight = tensors(plan, table)
    fixed = (table.coefficients, table.paths)
    args = [x, torch.randn(3, table.dim_out), sh, weight, *fixed, plan.src_index, plan.index + 2, plan.ptr, plan.perm]
    op = torch.ops.geo.gather_tensor_product_grad
    with pytest.raises(RuntimeError, match=r"dst_index\[\d\] = \d is out of range \[0, 2\]"):
        op(*args, plan.t_ptr, plan.t_perm, False, True, True, True)
    args[7] = plan.index
    with pytest.raises(RuntimeError, match=r"t_perm\[0\] = 7 is out of range \[0, 4\]"):
        op(*args, plan.t_ptr, torch.full((5,), 7), False, False, True, True)
    with pytest.raises(RuntimeError, match=r"ptr\[4\] = 4 is out of range \[5, 5\]"):
        op(*args, torch.tensor([0, 1, 2, 3, 4]), None, False, False, True, True)


@pytest.mark.parametrize(
    ("column", "value"), [(0, -1), (0, 180), (1, 9), (2, 10**9), (3, 60), (4, 0), (4, 2**62), (6, 2), (7, 2)]
)
def test_bad_paths_in_the_op_itself(column, value):
    """The kernels look at the table on their own: a compiled graph has nobody else who does."""
    plan, table = graph(5, 4, 3), Table("several")
    paths = table.paths.clone()
    paths[1, column] = value
    with pytest.raises((RuntimeError, ValueError), match=r"path|block"):
        torch.ops.geo.gather_tensor_product_segment_sum(
            *tensors(plan, table), table.coefficients, paths, plan.src_index, None, plan.ptr, plan.perm, None, None,
            table.dim_out, False,
        )  # fmt: skip


def test_bad_index_in_a_compiled_graph():
    torch.compiler.reset()
    plan, table = graph(5, 4, 3), Table("several")
    inputs, fixed = tensors(plan, table), (table.coefficients, table.paths, table.dim_out)
    compiled = torch.compile(
        lambda s: gather_tensor_product_segment_sum(*inputs, *fixed, s, plan.ptr),
        fullgraph=True,
        backend="aot_eager",
        dynamic=False,
    )
    with pytest.raises((RuntimeError, IndexError), match=r"src_index\[1\] = 4 is out of range \[0, 3\]"):
        compiled(torch.tensor([0, 4, 1, 2, 0]))


def test_refusals():
    plan, table = graph(5, 4, 3), Table("several")
    x, sh, weight = tensors(plan, table)
    src, ptr, cg, paths, dim = plan.src_index, plan.ptr, table.coefficients, table.paths, table.dim_out
    conv = gather_tensor_product_segment_sum
    with pytest.raises(ValueError, match="needs src_index and ptr, or a plan"):
        conv(x, sh, weight, cg, paths, dim)
    with pytest.raises(ValueError, match="either plan or src_index"):
        conv(x, sh, weight, cg, paths, dim, src, ptr, plan=plan)
    with pytest.raises(ValueError, match="x has 3 rows, the plan was built for 4 sources"):
        conv(x[1:], sh, weight, cg, paths, dim, plan=plan)
    with pytest.raises(ValueError, match=r"x must be \[M, dim\], got shape \[4\]"):
        conv(x[..., 0], sh, weight, cg, paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"src_index must have one entry per row of sh \(5\), got 4"):
        conv(x, sh, weight, cg, paths, dim, src[:4], ptr)
    with pytest.raises(ValueError, match=r"weight must have one row per edge \(5\) or 1, got \[4, "):
        conv(x, sh, weight[:4], cg, paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"coefficients must be float64 with one axis, got torch\.float32"):
        conv(x, sh, weight, cg.float(), paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"paths must be int64 \[P, 8\], got torch\.int32"):
        conv(x, sh, weight, cg, paths.int(), dim, src, ptr)
    with pytest.raises(ValueError, match=r"path 4 \(x_offset 104, .* does not fit x, sh and out: 188, 9, 300"):
        conv(x[:, 1:], sh, weight, cg, paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"path 4 .* does not fit"):
        conv(x, sh[:, 1:], weight, cg, paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"path 4 .* does not fit"):
        conv(x, sh, weight, cg, paths, dim - 1, src, ptr)
    with pytest.raises(ValueError, match=rf"the paths have {table.weights} weights, weight has {table.weights - 1}"):
        conv(x, sh, weight[:, 1:], cg, paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"the paths have \d+ coefficients, got \d+"):
        conv(x, sh, weight, cg[1:], paths, dim, src, ptr)
    shifted = paths.clone()
    shifted[3, 2] += 1
    with pytest.raises(ValueError, match=r"the block at \d+ of out overlaps the one before it"):
        conv(x, sh, weight, cg, shifted, dim, src, ptr)
    narrow = paths.clone()
    narrow[3, 3] -= 1
    with pytest.raises(ValueError, match=r"two paths have blocks of different sizes at 5 of x"):
        conv(x, sh, weight, cg, narrow, dim, src, ptr)
    with pytest.raises(ValueError, match=r"expected floating tensors, got torch\.int64"):
        conv(x.long(), sh.long(), weight.long(), cg, paths, dim, src, ptr)
    with pytest.raises(ValueError, match=r"src_index must be int64 with one axis, got torch\.int32"):
        conv(x, sh, weight, cg, paths, dim, src.int(), ptr)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gather_tensor_product_segment_sum_reference there"):
        torch.func.grad(lambda x: conv(x, sh, weight, cg, paths, dim, src, ptr).sum())(x)


def test_reference_under_torch_func():
    plan, table = graph(9, 4, 3), Table("several")
    x, sh, weight = tensors(plan, table, F64)
    grad = torch.func.grad(lambda w: reference(plan, table)(x, sh, w).square().sum())(weight)
    weight.requires_grad_()
    assert_close(grad, torch.autograd.grad(with_plan(plan, table)(x, sh, weight).square().sum(), weight)[0])


@native
def test_memory_is_the_output():
    """Forward allocates the output, backward the gradients: nothing of the size of the messages."""
    from torch.profiler import ProfilerActivity, profile

    plan, table = graph(2000, 50, 40), Table("wide")
    plan.t_ptr  # noqa: B018 (built and kept)
    inputs = [t.requires_grad_() for t in tensors(plan, table)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out = with_plan(plan, table)(*inputs)
        grads = torch.autograd.grad(out, inputs, out)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in prof.key_averages())
    assert allocated <= 4 * (out.numel() + sum(g.numel() for g in grads)) + 4096
    assert allocated < 4 * 2000 * table.dim_x
