from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import geo.ops
from geo.ops import TreePlan, fold, tree_reduce
from geo.testing import assert_close, check_compile, check_derivatives

F64 = torch.float64
RAGGED = [3, 0, 1, 7, 2, 0, 4, 1, 13, 0]


def ptr_of(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def ragged(device="cpu"):
    """200 segments of 0 to 39 rows, one of 513, one of 0, one of 1, in any order."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.cat([torch.randint(40, (200,), generator=generator), torch.tensor([513, 0, 1])])
    lengths = lengths[torch.randperm(203, generator=generator)]
    return ptr_of(lengths.tolist(), device)


def two_smallest(a, b):
    return torch.cat([a, b], dim=-1).sort(dim=-1).values[..., :2]


INTEGER = {
    "sum": (torch.add, (3,), 0),
    "max": (torch.maximum, (3,), -(2**62)),
    "min": (torch.minimum, (3,), 2**62),
    "two smallest": (two_smallest, (2,), 2**62),
    "xor": (torch.bitwise_xor, (), 0),
    "matrix product mod 97": (lambda a, b: (a @ b) % 97, (2, 2), None),
}


@pytest.mark.parametrize("name", INTEGER)
def test_oracle_1_tree_equals_fold_bitwise(name, device):
    op, shape, identity = INTEGER[name]
    ptr = ragged(device)
    x = torch.randint(97, (int(ptr[-1]), *shape), device=device)
    if name == "two smallest":
        x = x.sort(dim=-1).values
    e = torch.eye(2, dtype=torch.int64) if identity is None else torch.full(shape, identity)
    e = e.to(device)
    out = tree_reduce(x, ptr, op, identity=e)
    assert torch.equal(out, fold(x, ptr, op, identity=e))
    assert torch.equal(out, one_by_one(x, ptr, op, e))


def one_by_one(x, ptr, op, identity):
    rows = []
    for a, b in zip(ptr.tolist(), ptr[1:].tolist(), strict=False):
        state = identity
        for row in x[a:b]:
            state = row if state is identity else op(state[None], row[None])[0]
        rows.append(state)
    return torch.stack(rows)


def test_a_product_that_does_not_commute_needs_its_order():
    ptr = ragged()
    x = torch.randint(97, (int(ptr[-1]), 2, 2))
    swapped = tree_reduce(x, ptr, lambda a, b: (b @ a) % 97)
    assert not torch.equal(swapped, fold(x, ptr, lambda a, b: (a @ b) % 97))


def test_oracle_1_circular_convolution():
    def convolve(a, b):
        return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b), n=8)

    ptr = ptr_of(RAGGED)
    x = torch.randn(int(ptr[-1]), 8, dtype=F64)
    assert_close(tree_reduce(x, ptr, convolve), fold(x, ptr, convolve))


@pytest.mark.parametrize("num", [0, 1, 2, 63, 1000])
def test_one_segment_of_any_length(num, device):
    x = torch.randint(97, (num, 2), device=device)
    out = tree_reduce(x, ptr_of([num], device), torch.add)
    assert torch.equal(out, x.sum(0, keepdim=True))


def test_the_tree_by_hand(device):
    x = torch.tensor([16.0, 1.0, 4.0, 2.0, 32.0, 7.0], device=device)
    out = tree_reduce(x, ptr_of([5, 0, 1], device), torch.sub)
    assert out.tolist() == [((16.0 - 1.0) - (4.0 - 2.0)) - 32.0, 0.0, 7.0]
    assert fold(x, ptr_of([5, 0, 1], device), torch.sub).tolist() == [16.0 - 1.0 - 4.0 - 2.0 - 32.0, 0.0, 7.0]
    seven = torch.tensor([2.0**k for k in range(7)], device=device)
    assert tree_reduce(seven, ptr_of([7], device), torch.sub).tolist() == [((1 - 2) - (4 - 8)) - ((16 - 32) - 64)]


class Counting:
    """An op that counts its calls and applications."""

    def __init__(self, op=torch.add):
        self.op, self.calls, self.applications = op, 0, 0

    def __call__(self, a, b):
        self.calls += 1
        self.applications += a.size(0)
        return self.op(a, b)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1, 1, 0], [2], [5, 0, 1], [8, 8], [9, 1], RAGGED, [513, 3, 40]])
def test_oracle_7_numbers_of_applications_and_calls(lengths):
    op, ptr = Counting(), ptr_of(lengths)
    tree_reduce(torch.randn(int(ptr[-1]), 2), ptr, op)
    merges = sum(n - 1 for n in lengths if n)
    assert op.applications == merges
    assert op.calls == max((math.ceil(math.log2(n)) for n in lengths if n), default=0)
    plan = TreePlan(ptr)
    assert (plan.num_merges, plan.num_levels) == (op.applications, op.calls)


def dense(x, ptr, op):
    """What PyG's LCMAggregation does: a tree over segments padded to the longest with zeros."""
    length = ptr.diff()
    rows = x.new_zeros(length.numel(), int(length.max()), *x.shape[1:])
    for i, (a, b) in enumerate(zip(ptr.tolist(), ptr[1:].tolist(), strict=False)):
        rows[i, : b - a] = x[a:b]
    return tree_reduce(rows.flatten(0, 1), ptr_of([rows.size(1)] * rows.size(0)), op)


def check_alone_equals_batched(reduce):
    torch.manual_seed(3)
    weight, ptr = torch.randn(4, 4, dtype=F64), ptr_of(RAGGED)
    x = torch.randn(int(ptr[-1]), 4, dtype=F64)

    def op(a, b):
        return torch.tanh(a @ weight + b @ weight.t() + 1)

    together = reduce(x, ptr, op)
    for i, n in enumerate(RAGGED):
        assert_close(together[i : i + 1], reduce(x[ptr[i] : ptr[i + 1]], ptr_of([n]), op))
    bare = [n for n in RAGGED if n]
    assert_close(together[[n > 0 for n in RAGGED]], reduce(x, ptr_of(bare), op))


def test_oracle_2_alone_equals_batched():
    check_alone_equals_batched(tree_reduce)
    with pytest.raises(AssertionError):
        check_alone_equals_batched(dense)


def test_oracle_2_bitwise_where_rows_are_alone():
    ptr = ptr_of(RAGGED)
    x = torch.randn(int(ptr[-1]), 4)
    together = tree_reduce(x, ptr, torch.sub)
    for i, n in enumerate(RAGGED):
        assert torch.equal(together[i : i + 1], tree_reduce(x[ptr[i] : ptr[i + 1]], ptr_of([n]), torch.sub))


def test_oracle_4_one_row_and_none():
    x, e = torch.randn(2, 3), torch.randn(3)
    out = tree_reduce(x, ptr_of([1, 0, 0, 1, 0]), torch.mul, identity=e)
    assert torch.equal(out, torch.stack([x[0], e, e, x[1], e]))
    assert torch.equal(fold(x, ptr_of([1, 0, 0, 1, 0]), torch.mul, e), out)
    assert tree_reduce(x[:0], ptr_of([]), torch.mul).shape == (0, 3)
    assert fold(x[:0], ptr_of([]), torch.mul).shape == (0, 3)
    assert tree_reduce(x[:0], ptr_of([0, 0]), torch.mul).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("reduce", [tree_reduce, fold])
def test_oracle_4_derivatives_on_ragged_input(reduce):
    ptr = ptr_of([3, 0, 1, 5, 2, 0])

    def run(x, weight, identity):
        return reduce(x, ptr, lambda a, b: torch.sin(a @ weight) * b, identity=identity)

    inputs = [torch.randn(11, 2, dtype=F64), torch.randn(2, 2, dtype=F64), torch.randn(2, dtype=F64)]
    check_derivatives(run, inputs)


def test_works_under_torch_func_and_forward_mode():
    ptr, x, v = ptr_of(RAGGED), torch.randn(31, 2, dtype=F64), torch.randn(31, 2, dtype=F64)
    plan = TreePlan(ptr)

    def run(x):
        return tree_reduce(x, plan.ptr, torch.mul, plan).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(run(leaf), leaf)
    assert_close(torch.func.grad(run)(x), expected)
    assert_close(torch.func.jvp(run, (x,), (v,))[1], (expected * v).sum())
    assert_close(torch.func.vmap(run)(torch.stack([x, v])), torch.stack([run(x), run(v)]))


def test_a_plan_serves_many_calls(device):
    ptr = ragged(device)
    plan = TreePlan(ptr)
    for shape in ((), (2,), (2, 3)):
        x = torch.randn(int(ptr[-1]), *shape, device=device, requires_grad=True)
        out = tree_reduce(x, ptr.clone(), torch.sub, plan)
        assert torch.equal(out, tree_reduce(x, ptr, torch.sub))
        out.sum().backward()
        assert torch.equal(x.grad.abs(), torch.ones_like(x))
    assert repr(plan) == f"TreePlan(num_rows={ptr[-1]}, num_segments=203, num_merges={plan.num_merges}, num_levels=10)"


def test_a_plan_moves():
    ptr = ptr_of(RAGGED)
    plan = TreePlan(ptr)
    moved = plan.to("meta")
    tensors = [moved.ptr, moved.singles, moved.order, *(level.rows for level in moved.levels)]
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.num_rows, moved.num_merges) == (31, plan.num_merges)
    assert plan.ptr.device.type == "cpu"
    x = torch.randn(31)
    assert torch.equal(tree_reduce(x, ptr, torch.sub, plan.to("cpu")), tree_reduce(x, ptr, torch.sub, plan))


def test_every_row_is_used_once():
    plan = TreePlan(ragged())
    num = plan.num_rows - plan.singles.numel()
    used = torch.cat([plan.levels[0].rows, plan.singles])
    assert torch.equal(used.sort().values, torch.arange(plan.num_rows))
    for level in plan.levels:
        assert level.rows.numel() == num
        if level is not plan.levels[0]:
            assert torch.equal(level.rows.sort().values, torch.arange(num))
        num = level.num_pairs - level.num_done + level.num_kept
    assert num == 0


def test_equal_lengths_stand_in_order_already():
    assert TreePlan(ptr_of([4, 4, 4])).order is None
    assert TreePlan(ptr_of([3, 4, 4])).order is None  # both have two levels
    assert TreePlan(ptr_of([4, 2])).order is not None
    x = torch.randn(11)
    assert torch.equal(
        tree_reduce(x, ptr_of([3, 4, 4]), torch.sub), tree_reduce(x, ptr_of([3, 4, 4, 0]), torch.sub)[:3]
    )


class Gathering(nn.Module):
    """An op that gathers its operands itself."""

    def forward(self, a, b):
        raise AssertionError("merge goes first")

    def merge(self, x, left, right):
        return torch.tanh(x[left] - 2 * x[right])


def test_an_op_may_gather_its_operands_itself():
    x, ptr = torch.randn(31, 3, dtype=F64), ptr_of(RAGGED)
    out = tree_reduce(x, ptr, Gathering())
    assert torch.equal(out, tree_reduce(x, ptr, lambda a, b: torch.tanh(a - 2 * b)))
    check_derivatives(lambda x: tree_reduce(x, ptr, Gathering()), [x])


def test_states_are_the_results_of_each_level():
    states = []
    out = tree_reduce(torch.tensor([1, 2, 4, 8, 16]), ptr_of([3, 2]), torch.add, states=states)
    assert [s.sort().values.tolist() for s in states] == [[3, 24], [7]]
    assert out.tolist() == [7, 24]


def test_nan_stays_in_its_segment():
    x, ptr = torch.randn(31, 3), ptr_of(RAGGED)
    weight = torch.randn(3, 3)
    clean = tree_reduce(x, ptr, lambda a, b: torch.tanh(a @ weight + b))
    x[5] = math.nan  # of segment 3
    out = tree_reduce(x, ptr, lambda a, b: torch.tanh(a @ weight + b))
    assert out[3].isnan().all()
    others = torch.arange(10) != 3
    assert_close(out[others], clean[others])


def test_any_layout_of_rows(device):
    x, ptr = torch.randn(3, 31, device=device).t(), ptr_of(RAGGED, device)
    assert not x.is_contiguous()
    assert torch.equal(tree_reduce(x, ptr, torch.sub), tree_reduce(x.contiguous(), ptr, torch.sub))
    flags = torch.tensor([True, False, False], device=device)
    assert tree_reduce(flags, ptr_of([2, 1], device), torch.logical_or).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = torch.randn(31, 3).to(dtype)
    out = tree_reduce(x, ptr_of(RAGGED), torch.maximum, identity=torch.zeros(3))
    assert out.dtype == dtype
    assert torch.equal(out, fold(x, ptr_of(RAGGED), torch.maximum))


def test_autocast_keeps_the_dtype_of_the_states():
    x, ptr, weight = torch.randn(31, 4), ptr_of(RAGGED), torch.randn(4, 4) / 4
    expected = tree_reduce(x, ptr, lambda a, b: torch.tanh((a + b) @ weight))
    with torch.autocast("cpu", torch.bfloat16):
        out = tree_reduce(x, ptr, lambda a, b: torch.tanh((a + b) @ weight))
        assert out.dtype == torch.float32
        assert_close(out, expected.bfloat16(), factor=2)  # products rounded at each of four levels


def test_compiles_whole_with_a_plan():
    plan = TreePlan(ptr_of(RAGGED))
    weight = torch.randn(3, 3)

    def run(x, e):
        return tree_reduce(x, plan.ptr, lambda a, b: torch.tanh(a @ weight + b), plan, e)

    check_compile(run, [torch.randn(31, 3), torch.randn(3)])


def test_compiles_in_parts_without_one():
    # the sizes of the levels are data: the compiler breaks the graph where the plan reads them
    torch.compiler.reset()
    compiled = torch.compile(lambda x, ptr: tree_reduce(x, ptr, torch.sub), backend="aot_eager")
    for lengths in (RAGGED, [31], [1] * 31):
        x = torch.randn(31, 3)
        assert torch.equal(compiled(x, ptr_of(lengths)), tree_reduce(x, ptr_of(lengths), torch.sub))


@pytest.mark.parametrize("reduce", [tree_reduce, fold])
def test_refusals(reduce):
    name, x, ptr = reduce.__name__, torch.randn(4, 2), ptr_of([3, 1])
    with pytest.raises(
        ValueError, match=rf"{name}: op must return .* torch.float32 \[\d, 2\], got torch.float32 \[\d, 4\]"
    ):
        reduce(x, ptr, lambda a, b: torch.cat([a, b], dim=1))
    with pytest.raises(ValueError, match=rf"{name}: op must return .* got torch.float64"):
        reduce(x, ptr, lambda a, b: (a + b).double())
    with pytest.raises(ValueError, match=rf"{name}: op must return .* got None"):
        reduce(x, ptr, lambda a, b: None)
    with pytest.raises(ValueError, match=rf"{name}: identity must have .* \[2\] torch.float32 cpu, got \[3\]"):
        reduce(x, ptr, torch.add, identity=torch.zeros(3))
    with pytest.raises(ValueError, match=rf"{name}: identity must have .* torch.int64 cpu, got \[2\] torch.float32"):
        reduce(x.long(), ptr, torch.add, identity=torch.zeros(2))
    with pytest.raises(IndexError, match=rf"{name}: ptr\[1\] = -1 is out of range"):
        reduce(x, torch.tensor([0, -1, 4]), torch.add)
    with pytest.raises(IndexError, match=rf"{name}: ptr\[2\] = 3 is out of range \[4, 4\]"):
        reduce(x, torch.tensor([0, 2, 3]), torch.add)
    with pytest.raises(ValueError, match=rf"{name}: ptr must be int64 \[S \+ 1\], got torch.int32"):
        reduce(x, ptr.int(), torch.add)
    with pytest.raises(ValueError, match=rf"{name}: x must have one row per element"):
        reduce(torch.tensor(1.0), ptr, torch.add)
    with pytest.raises(ValueError, match=rf"{name}: x is on meta, ptr on cpu"):
        reduce(x.to("meta"), ptr, torch.add)


def test_refused_plans():
    x, ptr = torch.randn(4, 2), ptr_of([3, 1])
    with pytest.raises(ValueError, match="x has 4 rows, the plan was built for 5"):
        tree_reduce(x, ptr, torch.add, TreePlan(ptr_of([3, 2])))
    with pytest.raises(ValueError, match="ptr differs from the one that the plan was built for"):
        tree_reduce(x, ptr, torch.add, TreePlan(ptr_of([2, 2])))
    with pytest.raises(ValueError, match=r"the plan on meta: move it with plan\.to"):
        tree_reduce(x, ptr, torch.add, TreePlan(ptr).to("meta"))
    with pytest.raises(IndexError, match=r"TreePlan: ptr\[1\] = 5 is out of range"):
        TreePlan(torch.tensor([0, 5, 3]))
    with pytest.raises(ValueError, match="TreePlan: ptr must be int64"):
        TreePlan(torch.zeros(0, dtype=torch.int64))


def test_exported():
    assert {"TreePlan", "fold", "tree_reduce"} <= set(geo.ops.__all__)


def test_a_plan_keeps_its_own_segments():
    ptr = torch.tensor([0, 2, 4])
    plan, x = TreePlan(ptr), torch.tensor([1.0, 2.0, 4.0, 8.0])
    ptr[1] = 1
    with pytest.raises(ValueError, match="ptr differs"):
        tree_reduce(x, ptr, torch.add, plan)
    with pytest.raises(IndexError, match="TreePlan"):
        TreePlan(torch.tensor([0, -3]))
