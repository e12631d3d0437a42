from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geo import _native
from geo.bench import peak_extra_memory
from geo.ops import gru_merge, gru_merge_reference, tree_reduce
from geo.testing import assert_close, check_compile, check_derivatives, check_op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# rows, pairs, features
SIZES = [(1, 1, 1), (5, 0, 4), (0, 0, 3), (9, 7, 3), (4, 100, 16), (300, 50, 33), (20, 1000, 64), (60, 47, 130)]


def problem(
    rows: int, pairs: int, features: int, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Arguments; rows occur many times, also as both of a pair."""
    left, right = torch.randint(max(rows, 1), (2, pairs), device=device)
    weight = torch.randn(6 * features, features) / max(features, 1) ** 0.5
    x, weight, bias = (t.to(device, dtype) for t in (torch.randn(rows, features), weight, torch.randn(6 * features)))
    return [x, left, right, weight, bias]


def with_index(op: Any, left: Tensor, right: Tensor) -> Any:
    return lambda x, weight, bias: op(x, left, right, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_the_mean_of_two_cells(dtype):
    """An independent path: torch.nn.GRUCell, whose values are exact also where all of them are tiny."""
    x, left, right, weight, bias = problem(30, 40, 20, dtype=dtype)
    cell = nn.GRUCell(20, 20, dtype=dtype)
    for theirs, ours in zip(cell.parameters(), (*weight.chunk(2), *bias.chunk(2)), strict=True):
        theirs.data = ours
    with torch.no_grad():
        a, b = x[left], x[right]
        assert_close(gru_merge(x, left, right, weight, bias), (cell(a, b) + cell(b, a)) / 2)
        cell.bias_ih.zero_()
        cell.bias_hh.zero_()
        a, b = a * 1e-6, b * 1e-6
        tiny = gru_merge(x * 1e-6, left, right, weight, torch.zeros_like(bias))
        assert_close(tiny * 1e6, (cell(a, b) + cell(b, a)) / 2 * 1e6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("rows", "pairs", "features"), SIZES)
def test_equals_reference(rows, pairs, features, dtype, device):
    check_op(gru_merge, gru_merge_reference, problem(rows, pairs, features, device, dtype), max(1, pairs) ** 0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_many_pairs(device):
    """More than fit into the parts of the gradient one by one."""
    check_op(gru_merge, gru_merge_reference, problem(900, 20_011, 8, device), 150)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_saturated_gates(dtype, device):
    """Sums of gates far beyond the range of exp, infinite and NaN rows; they stay in their pairs."""
    x, left, right, weight, bias = problem(8, 0, 5, device, dtype)
    x *= torch.tensor([1, 1e2, 1e4, 1e30, 0, 1, 1, 1], device=device, dtype=dtype)[:, None]
    left, right = torch.arange(8, device=device), torch.arange(8, device=device).flip(0)
    args = (left, right, weight, bias)
    assert_close(gru_merge(x, *args), gru_merge_reference(x, *args), 10)
    x[7] = torch.nan
    assert gru_merge(x, *args).isnan().all(1).tolist() == [True, *[False] * 6, True]
    x[7] = torch.inf
    assert gru_merge(x, *args).isfinite().all(1).tolist() == [False, *[True] * 6, False]


@pytest.mark.parametrize("device", DEVICES)
def test_error_where_scales_differ(device):
    """It is relative to the larger row and the larger weight, as documented; not to each of them."""
    x, left, right, weight, bias = problem(100, 200, 64, device, torch.float32)
    weight[3 * 64 :] *= 1e-3
    x[::2] *= 100
    exact = gru_merge_reference(x.double(), left, right, weight.double(), bias.double())
    states = x.abs().amax(1)
    largest = torch.maximum(states[left], states[right])[:, None]
    bound = 4 * torch.finfo(torch.float32).eps * weight.abs().max() * largest * (1 + largest)
    assert bool(((gru_merge(x, left, right, weight, bias) - exact).abs() <= bound).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("features", [1, 3, 64])
def test_commutative_bit_for_bit(features, device):
    x, left, right, weight, bias = problem(50, 70, features, device, torch.float32)
    assert torch.equal(gru_merge(x, left, right, weight, bias), gru_merge(x, right, left, weight, bias))


@pytest.mark.skipif(not _native.have("cpu"), reason="the products of plain PyTorch are torch's")
@pytest.mark.parametrize("device", DEVICES)
def test_a_pair_does_not_see_the_others(device):
    x, left, right, weight, bias = problem(50, 100, 20, device, torch.float32)
    out = gru_merge(x, left, right, weight, bias)
    for p in (0, 47, 48, 99):
        alone = gru_merge(x, left[p : p + 1], right[p : p + 1], weight, bias)
        assert torch.equal(alone, out[p : p + 1])


@pytest.mark.parametrize("device", DEVICES)
def test_derivatives(device):
    x, left, right, weight, bias = problem(4, 5, 3, device)
    check_derivatives(with_index(gru_merge, left, right), [x, weight, bias])


def test_third_derivative():
    x, left, right, weight, bias = problem(3, 2, 2)

    def second(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(gru_merge(x, left, right, weight, bias).sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return found

    check_derivatives(second, [x], second=False)


@pytest.mark.parametrize("device", DEVICES)
def test_only_what_is_asked_for_gets_a_gradient(device):
    x, left, right, weight, bias = problem(30, 20, 8, device)
    weight.requires_grad_()
    gru_merge(x, left, right, weight, bias).sum().backward()
    expected = weight.detach().clone().requires_grad_()
    gru_merge_reference(x, left, right, expected, bias).sum().backward()
    assert_close(weight.grad, expected.grad, 10)
    assert x.grad is None
    assert bias.grad is None
    given = (torch.ones(20, 8, dtype=x.dtype, device=device), x, left, right, weight.detach(), bias)
    sides, *both = torch.ops.geo.gru_merge_backward(*given, True, False)  # frozen weights cost nothing
    assert [t.numel() for t in both] == [0, 0]
    all_sides, *_ = torch.ops.geo.gru_merge_backward(*given, True, True)
    assert torch.equal(sides, all_sides)
    leaf = weight.detach().requires_grad_()  # and so for second derivatives
    first = [
        torch.autograd.grad(op(x, left, right, leaf, bias).sum(), leaf, create_graph=True)[0]
        for op in (gru_merge, gru_merge_reference)
    ]
    ours, theirs = (torch.autograd.grad(f.square().sum(), leaf)[0] for f in first)
    assert_close(ours, theirs, 100)


@pytest.mark.parametrize("device", DEVICES)
def test_not_contiguous(device):
    x, left, right, weight, bias = problem(30, 20, 8, device)
    strided = [t.t().contiguous().t() for t in (x, weight)]
    both = torch.stack([left, right], 1)
    leaves = [strided[0].requires_grad_(), strided[1].requires_grad_(), bias.requires_grad_()]
    out = gru_merge(leaves[0], both[:, 0], both[:, 1], *leaves[1:])
    plain = gru_merge_reference(leaves[0], left, right, *leaves[1:])
    assert_close(out, plain)
    ones = torch.ones(1, 1, dtype=out.dtype, device=device).expand_as(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, ones), torch.autograd.grad(plain, leaves, ones), strict=True
    ):
        assert_close(ours, theirs, 10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype, device):
    x, left, right, weight, bias = problem(30, 50, 20, device, dtype)
    out = gru_merge(x, left, right, weight, bias)
    assert out.dtype == dtype
    assert torch.equal(out, gru_merge(x.float(), left, right, weight.float(), bias.float()).to(dtype))
    assert gru_merge(x, left, right, weight.float(), bias).dtype == torch.float32


def test_autocast_changes_nothing():
    args = problem(30, 50, 20, dtype=torch.float32)
    expected, plain = gru_merge(*args), gru_merge_reference(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gru_merge(*args), expected)
        assert torch.equal(gru_merge_reference(*args), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    x, left, right, weight, bias = problem(30, 50, 20, device, torch.float32)
    check_compile(with_index(gru_merge, left, right), [x, weight, bias])


@pytest.mark.slow
def test_inductor():
    x, left, right, weight, bias = problem(30, 50, 20, dtype=torch.float32)
    check_compile(with_index(gru_merge, left, right), [x, weight, bias], backend="inductor", dynamic=True)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, left, right, weight, bias = problem(6, 5, 3, device)
    leaves = (x.requires_grad_(), left, right, weight.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.geo.gru_merge, leaves)
    given = [t.detach() for t in leaves]
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.geo.gru_merge_backward, (torch.randn_like(x)[:5], *given, *need))


@pytest.mark.skipif(not _native.have("cpu"), reason="the products of plain PyTorch are torch's")
def test_same_bits_on_any_number_of_threads():
    x, left, right, weight, bias = problem(700, 3000, 33, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = with_index(gru_merge, left, right)(*leaves)
            found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not _native.have("cpu"), reason="plain PyTorch keeps all gates")
def test_memory_is_that_of_the_results():
    """20000 pairs of 64 features: the six products of each row are 61 MB, results and gradients of the rows 20 MB."""
    x, left, right, weight, bias = problem(20_000, 20_000, 64, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    peak = peak_extra_memory(lambda: with_index(gru_merge, left, right)(*leaves).sum().backward())
    if peak is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert peak < 35e6, peak


@pytest.mark.skipif(not _native.have("cpu"), reason="plain PyTorch keeps all gates")
def test_sums_of_weights_are_not_kept_for_every_part():
    """12288 pairs of 512 features: 32 parts would be 201 MB, of which 32 are allowed; results and gradients are 101."""
    x, left, right, weight, bias = problem(20, 12_288, 512, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    peak = peak_extra_memory(lambda: with_index(gru_merge, left, right)(*leaves).sum().backward())
    if peak is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert peak < 200e6, peak


@pytest.mark.parametrize("device", DEVICES)
def test_as_the_operation_of_a_tree(device):
    """tree_reduce hands it rows and indices."""
    x, _, _, weight, bias = problem(70, 0, 12, device)
    ptr = torch.tensor([0, 33, 33, 34, 70], device=device)

    class Fused:
        def merge(self, rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
            return gru_merge(rows, left, right, weight, bias)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        rows, number = torch.cat([a, b]), torch.arange(len(a), device=device)
        return gru_merge_reference(rows, number, number + len(a), weight, bias)

    assert_close(tree_reduce(x, ptr, Fused()), tree_reduce(x, ptr, plain))


def test_refused():
    x, left, right, weight, bias = problem(5, 4, 3)
    for given, message in (
        ((x[0], left, right, weight, bias), r"x must be \[R, F\], got \[3\]"),
        ((x, left.int(), right, weight, bias), "left must be int64"),
        ((x, left, right[None], weight, bias), "right must be int64"),
        ((x, left, right[1:], weight, bias), "left has 4 rows and right 3"),
        ((x, left, right, weight[1:], bias), r"weight must be \[18, 3\] for x \[5, 3\], got \[17, 3\]"),
        ((x, left, right, weight, bias[1:]), r"bias must be \[18\] for x \[5, 3\], got \[17\]"),
        ((x.long(), left, right, weight.long(), bias.long()), "expected floating tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            gru_merge(*given)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gru_merge_reference"):
        torch.func.grad(lambda x: gru_merge(x, left, right, weight, bias).sum())(x)


def test_reference_under_func():
    x, left, right, weight, bias = problem(5, 4, 3)
    found = torch.func.grad(lambda x: gru_merge_reference(x, left, right, weight, bias).sum())(x)
    gru_merge(x.requires_grad_(), left, right, weight, bias).sum().backward()
    assert_close(x.grad, found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [-1, 5, 1 << 60])
@pytest.mark.parametrize("which", ["left", "right"])
def test_bad_index(which, bad, device):
    x, left, right, weight, bias = problem(5, 100, 3, device)
    (left if which == "left" else right)[60] = bad
    for op in (gru_merge, gru_merge_reference):
        with pytest.raises(IndexError, match=rf"{which}\[60\] = {bad} is out of range \[0, 4\]"):
            op(x, left, right, weight, bias)


@pytest.mark.skipif(not _native.have("cpu"), reason="plain PyTorch looks at all left ones first")
def test_the_first_bad_index_is_named():
    """On any number of threads: by position, of a pair the left one."""
    x, left, right, weight, bias = problem(5, 400, 3)
    before = torch.get_num_threads()
    try:
        for where, name in ((((right, 3), (left, 200)), "right"), (((left, 3), (right, 3)), "left")):
            for index, position in where:
                index[position] = 9
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with pytest.raises(IndexError, match=rf"{name}\[3\] = 9 is out of range"):
                    gru_merge(x, left, right, weight, bias)
            left[200] = right[3] = 0
    finally:
        torch.set_num_threads(before)
