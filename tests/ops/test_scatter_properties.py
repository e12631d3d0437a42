"""Every reduction equals a loop over entries in float64, for random shapes and random laws of segments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import geo.ops as ops
from geo.ops import SegmentPlan
from geo.testing import assert_close

RUNS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
REDUCES = ["sum", "mul", "mean", "min", "max", "std", "logsumexp"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def one(result):
    return result[0] if isinstance(result, tuple) else result


@st.composite
def segments(draw, size, count):
    """``count`` segments below ``size``: uniform, one hub, a power law, nothing but the last, or sorted runs."""
    law = draw(st.sampled_from(["uniform", "hub", "power", "last", "runs"]))
    seed = draw(st.integers(0, 2**31 - 1))
    u = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if law == "hub":
        u = torch.where(u < 0.7, 0.4, u)
    elif law == "power":
        u = u**4
    elif law == "last":
        u = torch.ones_like(u)
    elif law == "runs":
        u = u.sort().values
    return (u * size).long().clamp(max=size - 1)


@st.composite
def calls(draw):
    """(src, index, dim, size): any number of axes, an index that is a vector, has leading axes, or is full."""
    shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=2))
    dim = draw(st.integers(0, len(shape)))
    rows = draw(st.sampled_from([0, 1, 2, 3, 17, 64]))
    shape.insert(dim, rows)
    size = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["vector", "lead", "full", "ones"]))
    index_shape = {
        "vector": [rows],
        "lead": shape[: dim + 1] if dim else [rows],  # one axis is read as the axis of the rows
        "full": shape,
        "ones": [n if axis == dim or draw(st.booleans()) else 1 for axis, n in enumerate(shape)],
    }[kind]
    index = draw(segments(size, math.prod(index_shape))).view(index_shape)
    seed = draw(st.integers(0, 2**31 - 1))
    src = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if draw(st.booleans()):
        src = src.round()  # ties
    return src, index, dim if draw(st.booleans()) else dim - src.dim(), size


def full_index(src, index, dim):
    """``index`` at every entry of ``src``."""
    lead = dim % src.dim() if index.dim() == 1 else 0
    return index.view([1] * lead + list(index.shape) + [1] * (src.dim() - lead - index.dim())).expand_as(src)


def loop(src, index, dim, size, reduce):
    """(values, positions) entry by entry, in Python's float64."""
    dim = dim % src.dim()
    shape = [*src.shape[:dim], size, *src.shape[dim + 1 :]]
    groups: dict[tuple[int, ...], list[tuple[float, int]]] = {}
    for place in torch.cartesian_prod(*(torch.arange(n) for n in src.shape)).view(-1, src.dim()).tolist():
        key = (*place[:dim], int(index[tuple(place)]), *place[dim + 1 :])
        groups.setdefault(key, []).append((float(src[tuple(place)]), place[dim]))
    values = torch.full(shape, 1.0 if reduce == "mul" else 0.0, dtype=torch.float64)
    places = torch.full(shape, src.size(dim))
    for key, entries in groups.items():
        xs = [x for x, _ in entries]
        mean = sum(xs) / len(xs)
        if reduce in ("min", "max"):
            values[key] = (min if reduce == "min" else max)(xs)
            places[key] = next(e for x, e in entries if x == values[key])
        else:
            values[key] = {
                "sum": lambda xs=xs: math.fsum(xs),
                "mul": lambda xs=xs: math.prod(xs),
                "mean": lambda mean=mean: mean,
                "std": lambda xs=xs, m=mean: math.sqrt(sum((x - m) ** 2 for x in xs) / (max(len(xs) - 1, 1) + 1e-6)),
                "logsumexp": lambda xs=xs: math.log(sum(math.exp(x) for x in xs)),
            }[reduce]()
    return values, places


@pytest.mark.parametrize("reduce", REDUCES)
@RUNS
@given(call=calls(), dtype=st.sampled_from(DTYPES))
def test_scatter_equals_a_loop(reduce, call, dtype):
    src, index, dim, size = call
    src = src.to(dtype)
    values, places = loop(src, full_index(src, index, dim), dim, size, reduce)
    result = getattr(ops, f"scatter_{reduce}")(src, index, dim, dim_size=size)
    assert_close(one(result), values.to(dtype), 4)
    if reduce in ("min", "max"):
        assert torch.equal(result[1], places)
    elif reduce not in ("std", "logsumexp"):
        assert torch.equal(one(result), ops.scatter(src, index, dim, None, size, reduce))


@RUNS
@given(call=calls())
def test_softmax_equals_a_loop(call):
    src, index, dim, size = call
    total = loop(src, full_index(src, index, dim), dim, size, "logsumexp")[0]
    wanted = src - total.gather(dim, full_index(src, index, dim))
    assert_close(ops.scatter_log_softmax(src, index, dim, dim_size=size), wanted)
    assert_close(ops.scatter_softmax(src, index, dim, size), wanted.exp())


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
@RUNS
@given(data=st.data())
def test_segments_equal_a_loop(reduce, data):
    """segment_csr and segment_coo, with the leading axes of ptr and index shared or not, and a plan."""
    size, rows = data.draw(st.integers(1, 7)), data.draw(st.sampled_from([0, 1, 5, 40]))
    copies, width = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 3))
    shared = data.draw(st.booleans())
    index = data.draw(segments(size, (1 if shared else copies) * rows)).view(
        -1 if rows else (1 if shared else copies), rows
    )
    index = index.sort(-1).values
    ptr = torch.stack([torch.searchsorted(row.contiguous(), torch.arange(size + 1)) for row in index])
    src = torch.randn(copies, rows, width, dtype=torch.float64)
    values, places = loop(src, index.unsqueeze(-1).expand(copies, rows, width), 1, size, reduce)
    for result in (
        getattr(ops, f"segment_{reduce}_csr")(src, ptr),
        getattr(ops, f"segment_{reduce}_coo")(src, index, None, size),
    ):
        assert_close(one(result), values)
        if reduce in ("min", "max"):
            assert torch.equal(result[1], places)
    plan = SegmentPlan(index[0], size)
    assert_close(one(getattr(ops, f"segment_{reduce}_coo")(src[0], plan)), values[0])
    back = ops.gather_csr(values, ptr, num_out=rows)
    assert torch.equal(back, values.gather(1, index.unsqueeze(-1).expand(copies, rows, width)))
    assert torch.equal(back, ops.gather_coo(values, index))


@RUNS
@given(call=calls(), reduce=st.sampled_from(["sum", "mul", "mean", "min", "max"]))
def test_integers_are_exact(call, reduce):
    src, index, dim, size = call
    src = (3 * src).round().clamp(-4, 4).long()
    values, places = loop(src, full_index(src, index, dim), dim, size, reduce)
    result = getattr(ops, f"scatter_{reduce}")(src, index, dim, dim_size=size)
    if reduce != "mul" or float(values.abs().max() if values.numel() else 0) < 2**53:
        assert torch.equal(one(result), values.floor().long())
    if reduce in ("min", "max"):
        assert torch.equal(result[1], places)


@pytest.mark.parametrize("reduce", ["sum", "mul", "mean", "min", "max"])
@RUNS
@given(call=calls())
def test_out_is_one_entry_more(reduce, call):
    """Reducing into ``out`` is reducing ``out`` along with the entries (the mean counts the entries alone)."""
    src, index, dim, size = call
    fresh = ops.scatter(src, index, dim, None, size, reduce)
    out = torch.randn_like(fresh)
    filled = ops.scatter_sum(torch.ones_like(src), index, dim, dim_size=size)
    before = out.clone()
    wanted = {
        "sum": lambda: before + fresh,
        "mul": lambda: before * fresh,
        "mean": lambda: before / filled.clamp(min=1) + fresh,
        "min": lambda: torch.where(filled > 0, torch.minimum(before, fresh), before),
        "max": lambda: torch.where(filled > 0, torch.maximum(before, fresh), before),
    }[reduce]()
    result = getattr(ops, f"scatter_{reduce}")(src, index, dim, out)
    assert one(result) is out
    assert_close(out, wanted)
    if reduce in ("min", "max"):
        assert torch.equal(result[1] < src.size(dim), out != before)
