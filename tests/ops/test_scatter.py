from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import geo.ops as ops
from geo.ops import SegmentPlan, scatter, scatter_reference, segment_csr, segment_csr_reference
from geo.testing import assert_close, check_compile, check_derivatives, check_op

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.uint8]
REDUCES = ["sum", "mul", "mean", "min", "max"]
SORTED = ["sum", "mean", "min", "max"]
COMPOSITES = ["std", "logsumexp", "softmax", "log_softmax"]
nan, inf = float("nan"), float("inf")


def one(result):
    return result[0] if isinstance(result, tuple) else result


def function(name):
    return getattr(ops, name)


# Five rows in five segments: 0 (rows 1 and 4), 2 (rows 0 and 2), 3 (row 3); 1 and 4 are empty. Rows 1 and 4 tie.
ROWS = [[1, 5], [10, 2], [7, 3], [2, 0], [4, 2]]
INDEX = [2, 0, 2, 3, 0]
ORDER = [1, 4, 0, 2, 3]  # sorted by index
PTR = [0, 2, 2, 4, 5, 5]
TABLE = {
    "sum": [[14, 4], [0, 0], [8, 8], [2, 0], [0, 0]],
    "mul": [[40, 4], [1, 1], [7, 15], [2, 0], [1, 1]],
    "mean": [[7, 2], [0, 0], [4, 4], [2, 0], [0, 0]],
    "min": [[4, 2], [0, 0], [1, 3], [2, 0], [0, 0]],
    "max": [[10, 2], [0, 0], [7, 5], [2, 0], [0, 0]],
}
PLACES = {
    "min": [[4, 1], [5, 5], [0, 2], [3, 3], [5, 5]],
    "max": [[1, 1], [5, 5], [2, 0], [3, 3], [5, 5]],
}
SORTED_PLACES = {
    "min": [[1, 0], [5, 5], [2, 3], [4, 4], [5, 5]],
    "max": [[0, 0], [5, 5], [3, 2], [4, 4], [5, 5]],
}


def table_inputs(device, dtype):
    src = torch.tensor(ROWS, dtype=dtype, device=device)
    return src, torch.tensor(INDEX, device=device), torch.tensor(PTR, device=device)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("reduce", REDUCES)
def test_table(device, reduce, dtype):
    src, index, ptr = table_inputs(device, dtype)
    ordered, sorted_index = src[torch.tensor(ORDER)], index.sort().values
    plan, by_index = SegmentPlan(index, 5), function(f"scatter_{reduce}")
    full = index.view(5, 1)
    calls = [
        by_index(src, index, 0, None, 5),
        by_index(src, plan, 0),
        by_index(src.t(), index, dim_size=5),
        by_index(src.t(), plan),
        by_index(src, full.expand(5, 2), -2, dim_size=5),
        by_index(src, full.repeat(1, 2), 0, dim_size=5),
        by_index(src.view(1, 5, 2), full.repeat(1, 2).view(1, 5, 2), 1, dim_size=5),
    ]
    check_table(calls, TABLE[reduce], PLACES.get(reduce), dtype)
    assert torch.equal(scatter(src, index, 0, dim_size=5, reduce=reduce), one(calls[0]))
    assert torch.equal(scatter(src, plan, 0, reduce=reduce), one(calls[0]))
    if reduce == "mul":
        return
    by_coo, by_ptr = function(f"segment_{reduce}_coo"), function(f"segment_{reduce}_csr")
    calls = [
        by_coo(ordered, sorted_index, None, 5),
        by_coo(ordered.t(), sorted_index.view(1, 5), dim_size=5),
        by_coo(ordered.t(), sorted_index.repeat(2, 1), dim_size=5),
        by_ptr(ordered, ptr),
        by_ptr(ordered.unsqueeze(0), ptr.unsqueeze(0)),
        by_ptr(ordered.t(), ptr.repeat(2, 1)),
    ]
    check_table(calls, TABLE[reduce], SORTED_PLACES.get(reduce), dtype)
    assert torch.equal(ops.segment_coo(ordered, sorted_index, dim_size=5, reduce=reduce), one(calls[0]))
    assert torch.equal(segment_csr(ordered, ptr, reduce=reduce), one(calls[0]))
    check_table(
        [by_coo(src, index, None, 5), by_coo(src, plan), by_ptr(src, plan)], TABLE[reduce], PLACES.get(reduce), dtype
    )


def check_table(calls, values, places, dtype):
    """Each result, [5, 2] up to an axis of size 1 or a transposition."""
    for call in calls:
        results = call if isinstance(call, tuple) else (call,)
        value, *arg = (t.t() if t.shape == (2, 5) else t.view(5, 2) for t in results)
        assert value.dtype == dtype
        assert value.tolist() == values
        assert [t.dtype for t in arg] == [torch.int64] * len(arg)
        assert [t.tolist() for t in arg] == [places] * len(arg)


def test_add_is_sum(device):
    src, index, ptr = table_inputs(device, torch.float32)
    assert ops.scatter_add(src, index, 0).tolist() == TABLE["sum"][:4]
    assert scatter(src, index, 0, reduce="add").tolist() == TABLE["sum"][:4]
    for result in (ops.segment_add_csr(src, ptr), ops.segment_csr(src, ptr, reduce="add")):
        assert result.tolist() == ops.segment_sum_csr(src, ptr).tolist()
    for result in (ops.segment_add_coo(src, index), ops.segment_coo(src, index, reduce="add")):
        assert result.tolist() == TABLE["sum"][:4]


def test_bool_table(device):
    src = torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.bool, device=device)
    index, ptr = torch.tensor([2, 0, 2], device=device), torch.tensor([0, 2, 2, 3], device=device)
    value, arg = ops.scatter_max(src, index, 0)  # any
    assert value.tolist() == [[True, True], [False, False], [True, False]]
    assert arg.tolist() == [[1, 1], [3, 3], [0, 0]]
    assert ops.scatter_min(src, index, 0)[0].tolist() == [[True, True], [False, False], [False, False]]  # all
    assert ops.segment_min_csr(src, ptr)[0].tolist() == [[True, False], [False, False], [False, False]]
    assert ops.segment_max_coo(src, index.sort().values)[0].dtype == torch.bool
    assert ops.gather_csr(src, ptr).tolist() == [[True, False], [True, False], [False, False]]
    out = torch.tensor([[False, False], [True, False], [False, False]], device=device)
    ops.scatter_max(src, index, 0, out=out)
    assert out.tolist() == [[True, True], [True, False], [True, False]]
    for reduce in ("sum", "mul", "mean", "std"):
        with pytest.raises(ValueError, match=r"src is bool, which has only min and max: cast it"):
            function(f"scatter_{reduce}")(src, index, 0)
    for reduce in ("sum", "mean"):
        with pytest.raises(ValueError, match=r"src is bool, which has only min and max: cast it"):
            function(f"segment_{reduce}_csr")(src, ptr)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_composite_table(device, dtype):
    src = torch.tensor([1, 5, 3], dtype=dtype, device=device).log()
    index = torch.tensor([2, 0, 2], device=device)
    for given in (index, SegmentPlan(index, 3)):
        wanted = torch.tensor([0.25, 1.0, 0.75], dtype=dtype, device=device)
        assert_close(ops.scatter_softmax(src, given), wanted)
        assert_close(ops.scatter_log_softmax(src, given).exp(), wanted)
        total = ops.scatter_logsumexp(src, given)
        assert total.dtype == dtype
        assert_close(total.exp(), torch.tensor([5.0, 1.0, 4.0], dtype=dtype, device=device))
        assert total[1] == 0
    src = torch.tensor([1, 9, 4], dtype=dtype, device=device)
    wanted = [0, 0, (4.5 / (1 + 1e-6)) ** 0.5]
    assert_close(ops.scatter_std(src, index), torch.tensor(wanted, dtype=dtype, device=device))
    wanted = [0, 0, (4.5 / (2 + 1e-6)) ** 0.5]
    assert_close(ops.scatter_std(src, index, unbiased=False), torch.tensor(wanted, dtype=dtype, device=device))


def test_composites_at_the_edges(device):
    index = torch.tensor([0, 0, 1, 2], device=device)
    src = torch.tensor([-inf, -inf, inf, nan], device=device)
    for eps in (1e-12, 1e-2):
        out = ops.scatter_logsumexp(src, index, dim_size=4, eps=eps)
        assert_close(out, torch.tensor([0.0, inf, nan, 0.0], device=device))
    large = torch.tensor([1e4, 1e4, -1e4, 0.0], device=device)
    assert_close(ops.scatter_logsumexp(large, index), torch.tensor([1e4 + 0.6931, -1e4, 0.0], device=device))
    assert_close(ops.scatter_softmax(large, index), torch.tensor([0.5, 0.5, 1.0, 1.0], device=device))
    assert ops.scatter_std(torch.tensor([1, 3], device=device), index[:2]).dtype == torch.get_default_dtype()


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5])
def test_eps(device, eps):
    """``eps`` is added to the sum of exponentials less the maximum."""
    src, index = torch.randn(30, dtype=torch.float64, device=device), torch.arange(30, device=device) % 4
    top = ops.scatter_max(src, index)[0]
    total = ops.scatter_sum((src - top[index]).exp(), index) + eps
    assert_close(ops.scatter_logsumexp(src, index, dim_size=4, eps=eps), top + total.log(), 0.1)
    assert_close(ops.scatter_log_softmax(src, index, 0, eps), src - (top + total.log())[index], 0.1)


def test_gather_table(device):
    src = torch.tensor([[5, 1], [6, 2], [7, 3]], device=device)
    ptr, index = torch.tensor([0, 2, 2, 3], device=device), torch.tensor([2, 0, 0], device=device)
    assert ops.gather_csr(src, ptr).tolist() == [[5, 1], [5, 1], [7, 3]]
    assert ops.gather_coo(src, index).tolist() == [[7, 3], [5, 1], [5, 1]]
    assert ops.gather_csr(src.t(), ptr.repeat(2, 1)).tolist() == [[5, 5, 7], [1, 1, 3]]
    assert ops.gather_coo(src.t(), index.view(1, 3)).tolist() == [[7, 5, 5], [3, 1, 1]]
    assert ops.gather_coo(src.t(), torch.stack([index, 2 - index])).tolist() == [[7, 5, 5], [1, 3, 3]]
    plan = SegmentPlan(index, 3)
    assert ops.gather_coo(src, plan).tolist() == ops.gather_csr(src, plan).tolist() == [[7, 3], [5, 1], [5, 1]]
    out = torch.zeros(3, 2, dtype=torch.int64, device=device)
    assert ops.gather_csr(src, ptr, out) is out
    assert out.tolist() == [[5, 1], [5, 1], [7, 3]]
    assert ops.gather_coo(src, index, out) is out
    assert out.tolist() == [[7, 3], [5, 1], [5, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_out(device, dtype):
    """scatter and segment_coo reduce into ``out``; segment_csr overwrites it."""
    src = torch.tensor([2, 6, 4, 3], dtype=dtype, device=device)
    index, ptr = torch.tensor([0, 0, 2, 2], device=device), torch.tensor([0, 2, 2, 4], device=device)
    wanted = {
        "sum": ([18, 20, 12], [8, 0, 7]),
        "mul": ([120, 20, 60], None),
        "mean": ([9, 20, 6], [4, 0, 3 if dtype == torch.int64 else 3.5]),
        "min": ([2, 20, 3], [2, 0, 3]),
        "max": ([10, 20, 5], [6, 0, 4]),
    }
    for reduce, (into, over) in wanted.items():
        for name in (f"scatter_{reduce}", *([f"segment_{reduce}_coo"] if over else [])):
            for strided in (False, True):
                out = torch.tensor([10, 20, 5], dtype=dtype, device=device)
                if strided:
                    out = torch.stack([out, out], 1)[:, 0]
                result = function(name)(src, index, out=out)
                assert one(result) is out
                assert out.tolist() == into, name
                if isinstance(result, tuple):
                    assert result[1].tolist() == ([0, 4, 3] if reduce == "min" else [4, 4, 4])
        if over:
            out = torch.tensor([10, 20, 5], dtype=dtype, device=device)
            assert one(function(f"segment_{reduce}_csr")(src, ptr, out)) is out
            assert out.tolist() == over


def test_out_of_composites(device):
    src, index = torch.tensor([1.0, 3.0, 9.0], device=device), torch.tensor([0, 0, 2], device=device)
    out = torch.tensor([1.0, 4.0, 0.0], device=device)
    assert_close(ops.scatter_std(src, index, out=out), torch.tensor([3.0**0.5, 2.0, 0.0], device=device))
    assert_close(out, torch.tensor([3.0, 4.0, 0.0], device=device))  # the sum of squares was added
    out = torch.tensor([2.0, 7.0, 9.0], device=device)
    assert ops.scatter_logsumexp(src, index, out=out) is out
    wanted = [torch.tensor([1.0, 2.0, 3.0]).logsumexp(0).item(), 7.0, 9.0 + torch.tensor(2.0).log().item()]
    assert_close(out, torch.tensor(wanted, device=device))


def test_means_of_integers(device):
    src, index, ptr = (torch.tensor(t, device=device) for t in ([-3, -4, 7, 4], [0, 0, 1, 1], [0, 2, 4]))
    assert ops.scatter_mean(src, index).tolist() == [-4, 5]  # down
    assert ops.segment_mean_csr(src, ptr).tolist() == [-3, 5]  # towards 0, as torch_scatter's
    assert ops.segment_mean_coo(src, index).tolist() == [-3, 5]
    big = torch.tensor([2**62, 2**62 - 1], device=device)
    assert ops.scatter_sum(big, index[:2]).tolist() == [2**63 - 1]
    assert ops.scatter_mean(big[1:], index[:1]).tolist() == [2**62 - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_are_summed_in_float32(device, dtype):
    src = torch.ones(4096, dtype=dtype, device=device)
    index, ptr = torch.zeros(4096, dtype=torch.int64, device=device), torch.tensor([0, 4096], device=device)
    for result in (
        ops.scatter_sum(src, index),
        ops.segment_sum_csr(src, ptr),
        ops.scatter_logsumexp(src.log(), index).exp(),
    ):
        assert result.dtype == dtype
        assert_close(result, torch.tensor([4096.0], dtype=dtype, device=device))
    assert ops.scatter_mean(src, index).tolist() == [1.0]


def test_means_whose_sums_do_not_fit(device):
    index = torch.zeros(300, dtype=torch.int64, device=device)
    src = torch.full((300,), 200, dtype=torch.uint8, device=device)
    assert ops.scatter_mean(src, index).tolist() == [200]
    assert ops.scatter_mean(src[:255], index[:255], out=src[:1].clone()).tolist() == [200]
    src = torch.full((300,), 1000, dtype=torch.float16, device=device)
    assert ops.scatter_mean(src, index).tolist() == [1000]
    assert ops.scatter_mean(src, index, out=torch.zeros_like(src[:1])).tolist() == [1000]


@pytest.mark.parametrize("reduce", ["min", "max"])
def test_nan_and_inf(device, reduce):
    src = torch.tensor([1, nan, 3, nan, inf, -inf, -1, -inf], device=device)
    index = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2], device=device)
    value, arg = scatter_like = function(f"scatter_{reduce}")(src, index)
    assert_close(value, torch.tensor([nan, inf if reduce == "max" else -inf, -inf], device=device))
    assert arg.tolist() == [1, 4 if reduce == "max" else 5, 7]
    for a, b in zip(scatter_like, function(f"segment_{reduce}_coo")(src, index), strict=True):
        assert_close(a, b)
    out = torch.tensor([2.0, nan, 0.0], device=device)
    arg = function(f"scatter_{reduce}")(src, index, out=out)[1]
    assert_close(out, torch.tensor([nan, nan, 0.0 if reduce == "max" else -inf], device=device))
    assert arg.tolist() == [1, 8, 8 if reduce == "max" else 7]


# (shape of src, shape of index, dim)
LAYOUTS = [
    ((12,), (12,), 0),
    ((12, 3), (12,), 0),
    ((3, 12), (12,), -1),
    ((2, 12, 3), (12,), 1),
    ((2, 12, 3), (2, 12), 1),
    ((2, 12, 3), (2, 12, 3), -2),
    ((2, 12, 3), (1, 12, 3), 1),
    ((12, 2, 3), (12, 1, 3), 0),
    ((12, 2), (1, 2), 0),
    ((1, 2), (1, 2), 0),
    ((0, 3), (0,), 0),
    ((12, 0), (12, 0), 0),
    ((0, 2, 3), (0, 2), 1),
]


def layout(case, device="cpu", size=5):
    shape, index_shape, dim = case
    return torch.randn(shape, device=device), torch.randint(size, index_shape, device=device), dim


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_layouts_equal_reference(device, reduce, case):
    src, index, dim = layout(case, device)
    for dtype in (torch.float32, torch.bfloat16) if reduce != "mul" else (torch.float32,):

        def call(src, index):
            return one(function(f"scatter_{reduce}")(src, index, dim, dim_size=7))

        def reference(src, index):
            return scatter_reference(src, index, dim, 7, reduce)

        check_op(call, reference, (src.to(dtype), index), factor=4)
        assert call(src, index).is_contiguous()


@pytest.mark.parametrize("reduce", ["min", "max"])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_positions(device, reduce, case):
    """A position names a row of its segment that has the value; where it is E, the segment has no rows."""
    src, index, dim = layout(case, device)
    value, arg = function(f"scatter_{reduce}")(src, index, dim, dim_size=7)
    size = src.size(dim)
    count = ops.scatter_sum(torch.ones_like(src), index, dim, dim_size=7)
    assert torch.equal(arg == size, count == 0)
    if src.numel() == 0:
        return
    inside = arg.clamp(max=size - 1)
    assert torch.equal(src.gather(dim, inside)[arg < size], value[arg < size])
    lead = dim % src.dim() if index.dim() == 1 else 0
    full = index.view(*[1] * lead, *index.shape, *[1] * (src.dim() - lead - index.dim())).expand_as(src)
    segment = torch.arange(7, device=device).view(-1, *[1] * (src.dim() - 1 - dim % src.dim())).expand_as(arg)
    assert torch.equal(full.gather(dim, inside)[arg < size], segment[arg < size])


@pytest.mark.parametrize("num_rows", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_sizes_equal_reference(device, reduce, num_rows):
    for shape, dtype in (((), torch.float32), ((3,), torch.float16), ((64,), torch.float32), ((2, 9), torch.float64)):
        src = (0.5 + torch.rand(num_rows, *shape)).to(device, dtype)
        index = torch.randint(20, (num_rows,), device=device)
        for given in (index, SegmentPlan(index, 20), index.sort().values):
            plain = given.index if isinstance(given, SegmentPlan) else given

            def call(src, given=given):
                return one(function(f"scatter_{reduce}")(src, given, 0, dim_size=20))

            def reference(src, plain=plain):
                return scatter_reference(src, plain, 0, 20, reduce)

            check_op(call, reference, (src,), factor=20 if reduce == "mul" else 4)


@pytest.mark.parametrize("lead", [((), ()), ((3,), (3,)), ((3,), (1,)), ((2, 3), (2, 1))], ids=str)
@pytest.mark.parametrize("reduce", SORTED)
def test_csr_equals_reference(device, reduce, lead):
    cuts = torch.randint(41, (*lead[1], 6)).sort(-1).values
    ptr = torch.cat([torch.zeros_like(cuts[..., :1]), cuts, torch.full_like(cuts[..., :1], 40)], -1).to(device)
    index = torch.randint(7, (*lead[1], 40), device=device)
    for shape in ((), (5,)):
        src = torch.randn(*lead[0], 40, *shape, device=device)
        check_op(lambda s: segment_csr(s, ptr, reduce=reduce), lambda s: segment_csr_reference(s, ptr, reduce), (src,))
        values = torch.randn(*lead[0], 7, *shape, device=device)
        check_op(lambda s: ops.gather_csr(s, ptr), lambda s: ops.gather_csr_reference(s, ptr), (values,))
        check_op(lambda s: ops.gather_coo(s, index), lambda s: ops.gather_coo_reference(s, index), (values,))


def test_nothing_at_all(device):
    """An empty index, an empty ptr, no features: shapes as torch_scatter's."""
    index = torch.zeros(0, dtype=torch.int64, device=device)
    src = torch.zeros(0, 0, 3, device=device)
    for reduce in REDUCES:
        assert scatter(src, index, 0, reduce=reduce).shape == (0, 0, 3)
        assert scatter(src, index, 0, dim_size=2, reduce=reduce).shape == (2, 0, 3)
    for reduce in COMPOSITES:
        assert function(f"scatter_{reduce}")(src, index, 0).shape == (0, 0, 3)
    for reduce in SORTED:
        assert ops.segment_coo(src, index, reduce=reduce).shape == (0, 0, 3)
        assert segment_csr(src, index, reduce=reduce).shape == (0, 0, 3)
    assert ops.gather_coo(src, index).shape == ops.gather_csr(src, index).shape == (0, 0, 3)
    value, arg = ops.scatter_max(torch.zeros(0, 2, device=device), index, 0, dim_size=3)
    assert value.tolist() == arg.tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("grad", [False, True])
def test_sort_by_index(device, grad):
    src, index, _ = table_inputs(device, torch.float32)
    src.requires_grad_(grad)
    for given in (index, SegmentPlan(index, 5)):
        ordered, ptr, perm = ops.sort_by_index(src, given, 5)
        assert perm.tolist() == ORDER
        assert ptr.tolist() == PTR
        assert ordered.tolist() == [ROWS[i] for i in ORDER]
        assert segment_csr(ordered, ptr).tolist() == TABLE["sum"]
    ordered, ptr, perm = ops.sort_by_index(src, index.sort().values)
    assert ordered is src
    assert perm is None


# -- derivatives -------------------------------------------------------------------------------------------------------
SMALL = [((6,), (6,), 0), ((2, 6), (6,), -1), ((2, 6, 2), (2, 6), 1), ((3, 2), (3, 2), 0)]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_derivatives(device, reduce, case):
    src, index, dim = layout(case, device, 3)
    check_derivatives(lambda s: one(function(f"scatter_{reduce}")(s, index, dim, dim_size=4)), (src,))


@pytest.mark.parametrize("reduce", [*REDUCES, "logsumexp"])
def test_derivatives_with_out(device, reduce):
    src, index, dim = layout(SMALL[2], device, 3)
    out = torch.randn(2, 4, 2, device=device)

    def call(src, out):
        return one(function(f"scatter_{reduce}")(src, index, dim, out=out.clone()))

    check_derivatives(call, (src, out))


@pytest.mark.parametrize("reduce", ["logsumexp", "log_softmax"])
def test_derivatives_with_eps(device, reduce):
    src, index, dim = layout(SMALL[0], device, 3)
    check_derivatives(lambda s: function(f"scatter_{reduce}")(s, index, dim, dim_size=4, eps=0.3), (src,))


@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_derivatives_of_a_plan(device, reduce):
    plan = SegmentPlan(torch.tensor([2, 0, 2, 3, 0], device=device), 5)
    src = torch.randn(2, 5, device=device)
    check_derivatives(lambda s: one(function(f"scatter_{reduce}")(s, plan)), (src,))


@pytest.mark.parametrize("reduce", SORTED)
def test_derivatives_of_segments(device, reduce):
    ptr = torch.tensor([[0, 2, 2, 5], [0, 0, 4, 5]], device=device)
    src, values = torch.randn(2, 5, 2, device=device), torch.randn(2, 3, 2, device=device)
    check_derivatives(lambda s: segment_csr(s, ptr, reduce=reduce), (src,))
    check_derivatives(lambda s: segment_csr(s, ptr, torch.zeros_like(values).to(s), reduce), (src,))
    check_derivatives(lambda s: ops.gather_csr(s * s, ptr, num_out=5), (values,))
    index = torch.tensor([[0, 1, 1, 2, 2], [0, 0, 0, 2, 2]], device=device)
    check_derivatives(lambda s: ops.segment_coo(s, index, None, 3, reduce), (src,))
    check_derivatives(lambda s: ops.gather_coo(s * s, index), (values,))


def test_product_with_zeros(device):
    """The derivative of a product by a factor of 0 is the product of the others."""
    src = torch.tensor([0.0, 2.0, 3.0, 0.0, 0.0, 5.0], device=device, requires_grad=True)
    ops.scatter_mul(src, torch.tensor([0, 0, 0, 1, 1, 1], device=device)).sum().backward()
    assert src.grad.tolist() == [6, 0, 0, 0, 0, 0]


def test_extreme_gradient_goes_to_the_first(device):
    src = torch.tensor([3.0, 5.0, 5.0, 1.0], device=device, requires_grad=True)
    ops.scatter_max(src, torch.tensor([1, 1, 1, 0], device=device), dim_size=3)[0].sum().backward()
    assert src.grad.tolist() == [0, 1, 0, 1]


# -- the ops -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, grad):
    index = torch.tensor([2, 0, 2, 1], device=device)
    src = torch.randn(4, 3, device=device, requires_grad=grad)
    for mean in (False, True):
        torch.library.opcheck(torch.ops.geo.scatter_sum.default, (src, index, 4, mean))
    torch.library.opcheck(torch.ops.geo.gather_index.default, (src, index))
    torch.library.opcheck(torch.ops.geo.flat_index.default, (index.view(2, 2), 3))
    torch.library.opcheck(torch.ops.geo.flat_ptr.default, (torch.tensor([[0, 1, 3], [0, 3, 3]], device=device), 3))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_compile(device, reduce, dynamic):
    def call(src, index, full):
        first = one(function(f"scatter_{reduce}")(torch.sin(src), index, 1, dim_size=7))
        return first, one(function(f"scatter_{reduce}")(src, full, 0, dim_size=7))

    src = torch.randn(6, 12, device=device)
    index, full = torch.randint(5, (12,), device=device), torch.randint(5, (6, 12), device=device)
    check_compile(call, (src, index, full), dynamic=dynamic)


@pytest.mark.parametrize("reduce", SORTED)
def test_compile_segments(device, reduce):
    ptr, both = torch.tensor([0, 2, 2, 5], device=device), torch.tensor([[0, 2, 2, 5], [0, 0, 4, 5]], device=device)

    def call(src, values, ptr, both):
        index = torch.zeros(5, dtype=torch.int64, device=src.device)
        return (
            segment_csr(src, both, reduce=reduce),
            segment_csr(src[0], ptr, reduce=reduce),
            ops.segment_coo(src[0], index, None, 3, reduce),
            ops.scatter(src[0], index, 0, values[0].clone(), reduce=reduce),
            ops.gather_csr(values, both, num_out=5),
            ops.gather_coo(values[0], index),
        )

    check_compile(call, (torch.randn(2, 5, 2, device=device), torch.randn(2, 3, 2, device=device), ptr, both))


@pytest.mark.slow
def test_inductor(device):
    index = torch.tensor([2, 0, 2, 1], device=device)

    def call(src):
        return ops.scatter_softmax(src, index, 0, 4), ops.scatter_mean(torch.sin(src), index, 0, dim_size=4)

    check_compile(call, (torch.randn(4, 3, device=device),), "inductor")


@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_same_bits_on_every_run_and_any_number_of_threads(device, reduce):
    threads = torch.get_num_threads()
    index = torch.cat([torch.zeros(9000, dtype=torch.int64), torch.randint(300, (6000,))])[torch.randperm(15000)]
    index = index.to(device)
    for shape in ((), (17,)):
        src = (1 + 0.01 * torch.randn(15000, *shape)).to(device)
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for _ in range(5 if shape else 10):
                    leaf = src.clone().requires_grad_()
                    out = one(function(f"scatter_{reduce}")(leaf, index, 0, dim_size=300))
                    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
                    results.append((out.detach(), grad))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_plain_pytorch_passes_the_same_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k"]
    wanted = "table or layouts or bad"
    root = Path(__file__).parents[2]
    env = {**os.environ, "GEO_DISABLE_NATIVE": "1"}
    done = subprocess.run(
        [*command, wanted, "tests/ops/test_scatter.py"], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("reduce", [*REDUCES, *COMPOSITES])
def test_bad_index(device, reduce, dtype):
    if reduce in COMPOSITES and not dtype.is_floating_point:
        pytest.skip("floating only")
    name = f"scatter_{reduce}"
    src = torch.zeros(3, 2, dtype=dtype, device=device)
    for entries, position, value in (([0, 4, 1], 1, 4), ([0, 1, -1], 2, -1), ([9, -1, 0], 0, 9)):
        index = torch.tensor(entries, device=device)
        with pytest.raises(IndexError, match=rf"{name}: index\[{position}\] = {value} is out of range \[0, 3\]"):
            function(name)(src, index, 0, dim_size=4)
        full = torch.stack([torch.zeros_like(index), index], 1)
        with pytest.raises(IndexError, match=rf"{name}: index\[\d\] = {value} is out of range \[0, 3\]"):
            function(name)(src, full, 0, dim_size=4)
    with pytest.raises(IndexError, match=rf"{name}: index\[1\] = -1 is out of range"):
        function(name)(src, torch.tensor([0, -1, 2], device=device), 0)
    with pytest.raises(IndexError, match=rf"{name}: index\[0\] = -1 is out of range"):
        function(name)(src, torch.tensor([-1, -1, -1], device=device), 0)


def test_bad_index_of_gather(device):
    src = torch.zeros(3, 2, device=device)
    for entries, position, value in (([0, 3], 1, 3), ([-1, 0], 0, -1)):
        index = torch.tensor(entries, device=device)
        for given, values in ((index, src), (index.repeat(2, 1), src.t())):
            with pytest.raises(
                IndexError, match=rf"gather_coo: index\[{position}\] = {value} is out of range \[0, 2\]"
            ):
                ops.gather_coo(values, given)
    with pytest.raises(IndexError, match=r"gather_coo: index\[0\] = 0 is out of range \[0, -1\]"):
        ops.gather_coo(src[:0], torch.zeros(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("ptr", "sentence"),
    [
        ([1, 6], r"ptr\[0\] = 1 is out of range \[0, 0\]"),
        ([0, 5], r"ptr\[1\] = 5 is out of range \[6, 6\]"),
        ([0, 4, 3, 6], r"ptr\[2\] = 3 is out of range \[4, 6\]"),
        ([0, -1, 6], r"ptr\[1\] = -1 is out of range \[0, 6\]"),
        ([], r"ptr\[0\] = 0 is out of range \[6, 6\]"),
    ],
)
def test_bad_ptr(device, ptr, sentence):
    ptr = torch.tensor(ptr, dtype=torch.int64, device=device)
    for reduce in SORTED:
        for dtype in (torch.float32, torch.int64):
            src = torch.zeros(6, 2, dtype=dtype, device=device)
            with pytest.raises(IndexError, match=f"segment_{reduce}_csr: {sentence}"):
                function(f"segment_{reduce}_csr")(src, ptr)
    if ptr.numel():
        good = torch.full_like(ptr, 6)
        good[0] = 0
        with pytest.raises(IndexError, match=f"segment_csr: {sentence}"):
            segment_csr(src.t(), torch.stack([good, ptr]))
        with pytest.raises(IndexError, match=f"gather_csr: {sentence}"):
            ops.gather_csr(src[: ptr.numel() - 1], ptr, num_out=6)


def test_refusals(device):
    src, index, ptr = table_inputs(device, torch.float32)
    plan = SegmentPlan(index, 5)
    refused = [
        (lambda: scatter(src, index, 0, reduce="prod"), "one of 'sum', 'add', 'mean', 'min', 'max', 'mul', got 'prod'"),
        (lambda: segment_csr(src, ptr, reduce="mul"), "one of 'sum', 'add', 'mean', 'min', 'max', got 'mul'"),
        (lambda: ops.segment_coo(src, index, reduce="x"), "segment_coo: reduce must be one of"),
        (lambda: ops.scatter_sum(src, index.int(), 0), r"scatter_sum: index must be int64, got torch\.int32"),
        (lambda: ops.scatter_max(src, src, 0), r"scatter_max: index must be int64, got torch\.float32"),
        (lambda: segment_csr(src, ptr.int()), r"segment_csr: indptr must be int64, got torch\.int32"),
        (lambda: ops.gather_coo(src, index.bool()), r"gather_coo: index must be int64, got torch\.bool"),
        (lambda: ops.scatter_sum(src, index), r"index \[5\] does not broadcast to \[5, 2\] along dim 1"),
        (lambda: ops.scatter_sum(src, index[:4], 0), r"index \[4\] does not broadcast to \[5, 2\] along dim 0"),
        (lambda: ops.scatter_sum(src, index.view(5, 1, 1), 0), r"index \[5, 1, 1\] does not broadcast"),
        (lambda: ops.scatter_sum(src, plan), "src has 2 rows along dim 1, the plan 5"),
        (lambda: ops.scatter_sum(src, plan, 0, None, 6), "the output has 6 segments, the plan 5"),
        (lambda: ops.gather_coo(src[:4], plan), "src has 4 segments along dim 0, the plan 5"),
        (lambda: ops.scatter_sum(src, index, 0, None, -1), "dim_size must not be negative, got -1"),
        (lambda: ops.scatter_sum(src, index, 0, src[0]), r"out must have the 2 axes of src, got \[2\]"),
        (lambda: ops.scatter_sum(src, index, 0, src[:, :1]), r"out must be torch\.float32 \[5, 2\], got .* \[5, 1\]"),
        (lambda: ops.scatter_max(src, index, 0, src.long()), r"out must be torch\.float32 \[5, 2\], got torch\.int64"),
        (lambda: ops.scatter_std(src, index, 0, src.long()), r"scatter_std: out must be torch\.float32"),
        (lambda: segment_csr(src, ptr, src[:4]), r"segment_csr: out must be .* \[5, 2\], got .* \[4, 2\]"),
        (lambda: ops.gather_csr(src, ptr, src[:, :1]), r"gather_csr: out must be torch\.float32 \[5, 2\]"),
        (lambda: ops.gather_csr(src[:3], ptr), r"src must have ptr\.numel\(\) - 1 = 5 rows along dim 0, got \[3, 2\]"),
        (lambda: segment_csr(src, ptr.view(1, 1, 6)), r"indptr must have 1 to 2 axes, got \[1, 1, 6\]"),
        (lambda: segment_csr(src, ptr.repeat(3, 1)), r"indptr \[3, 6\] does not broadcast"),
        (lambda: ops.segment_coo(src, index.sum()), r"index must have 1 to 2 axes, got \[\]"),
        (lambda: ops.scatter_sum(src.sum(), index), "src must have at least one axis, got a scalar"),
        (
            lambda: ops.scatter_sum(src.to(torch.complex64), index, 0),
            r"src must be floating, integer or bool, got .*complex64",
        ),
        (lambda: ops.scatter_softmax(src.long(), index, 0), r"scatter_softmax: src must be floating, got torch\.int64"),
        (lambda: ops.scatter_logsumexp(src.long(), index, 0), "scatter_logsumexp: src must be floating"),
        (lambda: ops.sort_by_index(src, index.view(5, 1).repeat(1, 2)), "sort_by_index: index must be one vector"),
        (lambda: ops.scatter_sum(src, index.to("meta"), 0), "index on meta: they must be on one device"),
        (lambda: segment_csr(src, ptr.to("meta")), "indptr on meta: they must be on one device"),
        (lambda: ops.scatter_sum(src, index, 0, torch.zeros(5, 2, device="meta")), "out is on meta"),
    ]
    for call, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            call()
    for dim in (2, -3):
        with pytest.raises(IndexError, match=rf"scatter_sum: dim = {dim} is out of range \[-2, 1\] for src \[5, 2\]"):
            ops.scatter_sum(src, index, dim)


def test_torch_func(device):
    src, index, ptr = table_inputs(device, torch.float64)
    refused = {
        "scatter_max": (lambda s: one(ops.scatter_max(s, index, 0)), "scatter_reference"),
        "segment_sum_coo": (lambda s: ops.segment_sum_coo(s, index), "scatter_reference"),
        "scatter_softmax": (lambda s: ops.scatter_softmax(s, index, 0), "scatter_reference"),
        "segment_csr": (lambda s: segment_csr(s, ptr), "segment_csr_reference"),
        "gather_csr": (lambda s: ops.gather_csr(s, ptr), "gather_csr_reference"),
        "gather_coo": (lambda s: ops.gather_coo(s, index), "gather_coo_reference"),
    }
    for name, (call, reference) in refused.items():
        with pytest.raises(
            RuntimeError, match=rf"geo\.ops\.{name} does not work under torch\.func: use geo\.ops\.{reference} there"
        ):
            torch.func.grad(lambda s, call=call: call(s).sum())(src)
    full = index.view(5, 1).repeat(1, 2)
    for reduce in [*REDUCES, *COMPOSITES]:
        for given in (index, full):
            leaf = src.clone().requires_grad_()
            one(function(f"scatter_{reduce}")(leaf, given, 0, dim_size=5)).square().sum().backward()
            grad = torch.func.grad(lambda s: scatter_reference(s, given, 0, 5, reduce).square().sum())(src)  # noqa: B023
            assert_close(grad, leaf.grad)
    leaf = src.clone().requires_grad_()
    values = torch.func.vmap(lambda s: segment_csr_reference(s, ptr, "mean"))(torch.stack([src, 2 * src]))
    assert_close(values[1], 2 * segment_csr(src, ptr, reduce="mean"))
    assert_close(
        torch.func.vmap(lambda s: ops.gather_csr_reference(s, ptr, 5))(src.expand(2, 5, 2))[1], ops.gather_csr(src, ptr)
    )
    assert_close(
        torch.func.vmap(lambda s: ops.gather_coo_reference(s, index))(src.expand(2, 5, 2))[1],
        ops.gather_coo(src, index),
    )
