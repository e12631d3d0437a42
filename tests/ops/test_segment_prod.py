from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from geo import nn
from geo.ops import SegmentPlan, scatter_mul, segment_reduce
from geo.testing import assert_close, check_compile, check_derivatives

geo = torch.ops.geo
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (1,), (2,), (3,), (8,), (16,), (17,), (64,), (5, 13), (0,), (150,)]
LENGTHS = [3, 0, 1, 20, 16, 7, 2, 0, 1, 33, 300]
HUBS = [20000, 3, 0, 8191, 8192, 1, 100, 0, 12289]
nan, inf = float("nan"), float("inf")


def sorted_and_shuffled(lengths: list[int], device: torch.device | str = "cpu") -> list[tuple[Tensor, ...]]:
    """(ptr, perm, index) with the rows in order, and not."""
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ptr = torch.tensor([0, *lengths], device=device).cumsum(0)
    plan = SegmentPlan(index[torch.randperm(index.numel())].to(device), len(lengths))
    return [(ptr, None, None), (ptr, None, index.to(device)), (plan.ptr, plan.perm, plan.index)]


def rows_of(ptr: Tensor, perm: Tensor | None) -> list[Tensor]:
    order = torch.arange(int(ptr[-1])) if perm is None else perm.cpu()
    return [order[begin:end] for begin, end in pairwise(ptr.tolist())]


def others_by_loop(grad: Tensor, src: Tensor, ptr: Tensor, perm: Tensor | None) -> Tensor:
    """The law itself in float64: without each row in turn, or, in long segments without zeros, divided by it."""
    grad, wide = grad.double().cpu(), src.double().cpu()
    out = torch.zeros_like(wide)
    for i, rows in enumerate(rows_of(ptr, perm)):
        if len(rows) > 50:
            assert bool((wide[rows] != 0).all())
            out[rows] = grad[i] * wide[rows].prod(0) / wide[rows]
        else:
            for e in rows:
                out[e] = grad[i] * wide[rows[rows != e]].prod(0)
    return out


def near_one(*shape: int) -> Tensor:
    """Signed factors of which 300 have a product that is neither 0 nor infinite."""
    return torch.randn(*shape).sign() * (0.9 + 0.2 * torch.rand(*shape))


# src, gradient of each segment, gradient of each row; segments of 3, 2, 0, 1 and 4 rows
TABLE = (
    [2, -3, 4, 0, 5, 7, 0, 2, 0, 3],
    [1, 2, 5, -1, 1],
    [-12, 8, -6, 10, 0, -1, 0, 0, 0, 0],
)


@pytest.mark.parametrize("width", [1, 2, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_table(device, dtype, width):
    src, grad, wanted = (torch.tensor(t, dtype=dtype, device=device).view(-1, 1).expand(-1, width) for t in TABLE)
    ptr = torch.tensor([0, 3, 5, 5, 6, 10], device=device)
    out = geo.segment_prod_grad(grad, src, ptr, None, None)
    assert out.dtype == dtype
    assert torch.equal(out, wanted)
    back = torch.arange(9, -1, -1, device=device)  # the same rows, standing the other way round
    assert torch.equal(geo.segment_prod_grad(grad, src.flip(0), ptr, back, None), wanted.flip(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_loop(device, shape):
    for dtype in FLOATS:
        for ptr, perm, index in sorted_and_shuffled(LENGTHS, device):
            src, grad = (
                near_one(sum(LENGTHS), *shape).to(device, dtype),
                torch.randn(len(LENGTHS), *shape).to(device, dtype),
            )
            assert_close(geo.segment_prod_grad(grad, src, ptr, perm, index), others_by_loop(grad, src, ptr, perm))


@pytest.mark.parametrize("shape", [(), (3,), (70,)], ids=str)
def test_hub(device, shape):
    """Hubs, cut into pieces, among short and empty segments; a zero in a hub leaves this row alone a gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        for ptr, perm, index in sorted_and_shuffled(HUBS, device):
            src = torch.ones(sum(HUBS), *shape, dtype=dtype, device=device)
            src[torch.randint(sum(HUBS), (50,))] = -1  # products are exact
            src[torch.randint(sum(HUBS), (20,))] = 2
            grad = torch.randn(len(HUBS), *shape).to(device, dtype)
            wanted = others_by_loop(grad, src, ptr, perm)
            assert_close(geo.segment_prod_grad(grad, src, ptr, perm, index), wanted)
            rows = rows_of(ptr, perm)
            one, two = rows[0][13000], rows[4][[5, 7000]]  # zeros in one piece of a hub, and in different ones
            src[one], src[two] = 0, 0
            wanted[rows[0]], wanted[rows[4]] = 0, 0
            wanted[one] = (grad[0] * src[rows[0][rows[0] != one]].prod(0)).double().cpu()
            assert_close(geo.segment_prod_grad(grad, src, ptr, perm, index), wanted)


@pytest.mark.parametrize("width", [1, 20])
def test_where_the_product_overflows_and_that_of_the_others_does_not(device, width):
    src = torch.tensor([1e30, 1e30, 1e-30, 1e-30, 1e-30, 1e30], device=device).view(-1, 1).repeat(1, width)
    grad = torch.ones(2, width, device=device)
    out = geo.segment_prod_grad(grad, src, torch.tensor([0, 3, 6], device=device), None, None)
    assert_close(out, torch.tensor([1, 1, inf, 1, 1, 0], device=device).view(-1, 1).repeat(1, width))


@pytest.mark.parametrize("width", [1, 20])
def test_infinity_and_nan(device, width):
    """As they come: what the product of the others gives."""
    src = torch.tensor([inf, 2, 3, nan, 4, inf, 0, 5, -inf], device=device).view(-1, 1).repeat(1, width)
    ptr = torch.tensor([0, 3, 5, 9], device=device)
    out = geo.segment_prod_grad(torch.ones(3, width, device=device), src, ptr, None, None)
    wanted = torch.tensor([6, inf, inf, 4, nan, nan, -inf, nan, nan], device=device).view(-1, 1).repeat(1, width)
    torch.testing.assert_close(out, wanted, equal_nan=True)


def test_non_contiguous(device):
    src, grad = near_one(5, 40, 3).transpose(0, 1)[:, ::2].to(device), torch.randn(3, 6).to(device)[::2].unsqueeze(-1)
    ptr = torch.stack([torch.tensor([0, 13, 40])] * 2, 1).to(device)[:, 0]
    grad = grad[:, :3].expand(2, 3, 3)
    assert_close(geo.segment_prod_grad(grad, src, ptr, None, None), others_by_loop(grad, src, ptr, None))


# -- derivatives -------------------------------------------------------------------------------------------------------
def by_torch_prod(src: Tensor, index: Tensor, num_segments: int) -> Tensor:
    return torch.stack([src[index == i].prod(0) for i in range(num_segments)])


PUBLIC = {
    "scatter_mul": lambda src, index: scatter_mul(src, index, 0, dim_size=5),
    "segment_reduce": lambda src, index: segment_reduce(src, SegmentPlan(index, 5), "mul"),
    "MulAggregation": lambda src, index: nn.MulAggregation()(src, index, dim_size=5),
}


@pytest.mark.parametrize("zeros", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("name", PUBLIC)
def test_every_derivative_equals_that_of_torch_prod(device, name, order, zeros):
    index = torch.tensor([0, 0, 0, 0, 1, 3, 3, 3, 3, 3, 4, 4])  # segment 2 is empty
    index = (index if order == "sorted" else index[torch.randperm(12)]).to(device)
    src = torch.randn(12, 2, dtype=torch.float64).to(device)
    for i in range(5):
        src[(index == i).nonzero()[:zeros]] = 0
    weight = torch.randn(5, 2, dtype=torch.float64).to(device)
    directions = torch.randn(4, 12, 2, dtype=torch.float64).to(device)

    def derivatives(product):
        leaf = src.clone().requires_grad_()
        out = product(leaf, index)
        scalar, found = (weight * out + out.square()).sum(), []
        for direction in directions:
            (grad,) = torch.autograd.grad(scalar, leaf, create_graph=True)
            found.append(grad)
            scalar = (grad * direction).sum()
        return found

    assert_close(derivatives(PUBLIC[name]), derivatives(lambda s, i: by_torch_prod(s, i, 5)))


def test_second_derivative_by_two_zeros(device):
    """The product of the other factors."""
    src = torch.tensor([0.0, 3.0, 0.0, -5.0], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(
        scatter_mul(src, torch.zeros(4, dtype=torch.int64, device=device)), src, create_graph=True
    )
    assert grad.tolist() == [0.0, 0.0, 0.0, 0.0]
    hessian = [torch.autograd.grad(g, src, retain_graph=True)[0].tolist() for g in grad]
    assert hessian == [[0, 0, -15, 0], [0, 0, 0, 0], [-15, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_second_derivative_of_each_dtype(device, dtype):
    src = torch.tensor([2.0, 0.0, 4.0, 3.0], dtype=dtype, device=device, requires_grad=True)
    out = segment_reduce(src, torch.tensor([0, 3, 4], device=device), "mul").sum()
    (grad,) = torch.autograd.grad(out, src, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), src)
    assert second.dtype == dtype
    assert second.tolist() == [4, 6, 2, 0]


@pytest.mark.parametrize("place", [0, 1])
def test_check_derivatives(device, place):
    ptr, perm, index = sorted_and_shuffled([3, 0, 1, 4], device)[2 * place]
    src = torch.randn(8, 2, device=device)
    src[0] = src[-1] = 0
    grad = torch.randn(4, 2, device=device)
    check_derivatives(lambda g, s: geo.segment_prod_grad(g, s, ptr, perm, index), (grad, src))
    for k in (1, 2):
        tangents = torch.randn(k, 8, 2, device=device)
        check_derivatives(lambda v, s: geo.segment_prod_mixed(v, s, ptr, perm, index), (tangents, src))


def test_second_derivative_of_a_hub(device):
    """Of a sum of products of pairs: each row of a hub of ones has the others' sum as its gradient's derivative."""
    index = torch.zeros(9000, dtype=torch.int64, device=device)
    src = torch.ones(9000, dtype=torch.float64, device=device, requires_grad=True)
    direction = torch.randn(9000, dtype=torch.float64).to(device)
    (grad,) = torch.autograd.grad(scatter_mul(src, index), src, create_graph=True)
    (second,) = torch.autograd.grad((grad * direction).sum(), src)
    assert_close(second, direction.sum() - direction)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    for ptr, perm, index in sorted_and_shuffled([3, 0, 1, 4], device):
        src, per_segment = torch.randn(8, 3, device=device), torch.randn(4, 3, device=device)
        src, per_segment = src.requires_grad_(grad), per_segment.requires_grad_(grad)
        torch.library.opcheck(geo.segment_prod.default, (src, ptr, perm, index))
        torch.library.opcheck(geo.segment_prod_grad.default, (per_segment, src, ptr, perm, index))
        for k in (1, 2):
            tangents = torch.randn(k, 8, 3, device=device, requires_grad=grad)
            torch.library.opcheck(geo.segment_prod_mixed.default, (tangents, src, ptr, perm, index))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic, place):
    order = sorted_and_shuffled([3, 0, 1, 4], device)[place]
    src, grad, tangents = (torch.randn(*shape, device=device) for shape in ((8, 3), (4, 3), (1, 8, 3)))
    check_compile(lambda s: geo.segment_prod(s, *order), (src,), dynamic=dynamic)
    check_compile(lambda g, s: geo.segment_prod_grad(g, s, *order), (grad, src), dynamic=dynamic)
    check_compile(lambda v, s: geo.segment_prod_mixed(v, s, *order), (tangents, src), dynamic=dynamic)


# -- the laws of every op ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(), (3,), (17,), (70,)], ids=str)
def test_same_bits_on_any_number_of_threads(shape):
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        src, grad = near_one(sum(HUBS), *shape).to(dtype), torch.randn(len(HUBS), *shape).to(dtype)
        for ptr, perm, index in sorted_and_shuffled(HUBS):
            try:
                results = []
                for count in (1, 2) * 5:
                    torch.set_num_threads(count)
                    results.append(geo.segment_prod_grad(grad, src, ptr, perm, index))
            finally:
                torch.set_num_threads(threads)
            assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("width", [1, 3, 40])
def test_bad_input(width):
    src, grad, ptr = torch.zeros(6, width), torch.zeros(2, width), torch.tensor([0, 2, 6])
    calls = (
        lambda p, q: geo.segment_prod_grad(grad, src, p, q, None),
        lambda p, q: geo.segment_prod_mixed(src.unsqueeze(0), src, p, q, None),
    )
    for call in calls:
        for value in (6, -1, 2**62):
            with pytest.raises((IndexError, RuntimeError), match=rf"edge_perm\[3\] = {value} is out of range \[0, 5\]"):
                call(ptr, torch.tensor([1, 0, 2, value, 4, 5]))
        with pytest.raises((IndexError, RuntimeError), match=r"ptr\[1\] = 7 is out of range \[0, 6\]"):
            call(torch.tensor([0, 7, 6]), None)
        with pytest.raises((IndexError, RuntimeError), match=r"ptr\[2\] = 5 is out of range \[6, 6\]"):
            call(torch.tensor([0, 2, 5]), None)
    for value in (2, -1, 2**62):  # one column is read by index, wider rows through perm alone
        order = torch.tensor([1, 0, 2, 3, 4, 5]), torch.tensor([0, 0, 1, value, 1, 1])
        if width == 1:
            with pytest.raises((IndexError, RuntimeError), match=rf"dst_index\[3\] = {value} is out of range \[0, 1\]"):
                geo.segment_prod_grad(grad, src, ptr, *order)
    hub = torch.arange(9000)
    hub[8999] = 9000
    with pytest.raises((IndexError, RuntimeError), match=r"edge_perm\[8999\] = 9000 is out of range \[0, 8999\]"):
        geo.segment_prod_grad(grad[:1], torch.ones(9000, width), torch.tensor([0, 9000]), hub, None)
