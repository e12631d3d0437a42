"""What every function of the scatter and segment family promises, asked of each of them by name."""

from __future__ import annotations

import pytest
import torch

from geo import ops
from geo.ops import SegmentPlan

SCATTER = ["sum", "add", "mul", "mean", "min", "max", "std", "logsumexp", "softmax", "log_softmax"]
REDUCES = ["sum", "add", "mean", "min", "max"]
ROWS = 15000  # of which 9000 in one segment: a hub

# name: f(src, index, ptr) with index sorted, or not
BY_INDEX = {f"scatter_{r}": lambda s, i, p, r=r: getattr(ops, f"scatter_{r}")(s, i, 0, dim_size=300) for r in SCATTER}
BY_ORDER = {
    **{f"segment_{r}_coo": lambda s, i, p, r=r: getattr(ops, f"segment_{r}_coo")(s, i, dim_size=300) for r in REDUCES},
    "gather_coo": lambda s, i, p: ops.gather_coo(s[:300], i),
}
BY_PTR = {
    **{f"segment_{r}_csr": lambda s, i, p, r=r: getattr(ops, f"segment_{r}_csr")(s, p) for r in REDUCES},
    **{f"segment_{n}": lambda s, i, p, n=n: getattr(ops, f"segment_{n}")(s, p) for n in SCATTER[6:]},
    "segment_reduce": lambda s, i, p: ops.segment_reduce(s, p, "mul"),
    "gather_csr": lambda s, i, p: ops.gather_csr(s[:300], p, num_out=ROWS),
}
EVERY = {**BY_INDEX, **BY_ORDER, **BY_PTR}


def first(out):
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_ten_runs_on_one_and_two_threads_give_the_same_bits(device, name, dtype):
    """The result and its gradient, and of narrow rows the gradient of that."""
    index = torch.cat([torch.zeros(9000, dtype=torch.int64), torch.randint(300, (ROWS - 9000,))])
    index = index.sort().values if name not in BY_INDEX else index[torch.randperm(ROWS)]
    index = index.to(device)
    ptr = SegmentPlan(index, 300).ptr
    threads = torch.get_num_threads()
    for shape in ((), (40,)):
        src = (1 + 0.01 * torch.randn(ROWS, *shape)).to(device, dtype)
        results = []
        try:
            for count in (1, 2) * 5:
                torch.set_num_threads(count)
                leaf = src.clone().requires_grad_()
                out = first(EVERY[name](leaf, index, ptr))
                (grad,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=True)
                results.append([out.detach(), grad.detach()])
                if not shape:
                    results[-1] += torch.autograd.grad(grad.float().square().sum(), leaf)
        finally:
            torch.set_num_threads(threads)
        for again in results[1:]:
            torch.testing.assert_close(again, results[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("reduce", REDUCES)
def test_bad_index_of_segments(device, reduce, dtype):
    name, src = f"segment_{reduce}_coo", torch.zeros(3, 2, dtype=dtype, device=device)
    for entries, position, value in (([0, 1, 4], 2, 4), ([-1, 0, 1], 0, -1), ([0, 1, 2**62], 2, 2**62)):
        index = torch.tensor(entries, device=device)
        with pytest.raises(IndexError, match=rf"{name}: index\[{position}\] = {value} is out of range \[0, 3\]"):
            getattr(ops, name)(src, index, dim_size=4)


@pytest.mark.parametrize("wrong", [torch.int32, torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_indices_of_a_wrong_dtype(device, name, wrong):
    src = torch.zeros(ROWS, device=device)
    index, ptr = torch.zeros(ROWS, device=device, dtype=wrong), torch.zeros(301, device=device, dtype=wrong)
    with pytest.raises(ValueError, match=rf"{name}: (index|ptr|indptr) must be int64.* got {wrong}"):
        EVERY[name](src, index, ptr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_PTR)
def test_pointers_that_fall_or_end_elsewhere(device, name, dtype):
    src = torch.zeros(ROWS, 2, dtype=dtype, device=device)
    ptr = torch.linspace(0, ROWS, 301, dtype=torch.int64, device=device)
    for position, value, low, high in ((0, 1, 0, 0), (300, ROWS + 1, ROWS, ROWS), (300, ROWS - 1, ROWS, ROWS)):
        bad = ptr.clone()
        bad[position] = value
        with pytest.raises(IndexError, match=rf"{name}: ptr\[{position}\] = {value} is out of range \[{low}, {high}\]"):
            EVERY[name](src, None, bad)
    for position, value in ((7, -1), (7, 2**62), (7, 200)):
        bad = ptr.clone()
        bad[position] = value
        with pytest.raises(IndexError, match=rf"{name}: ptr\[\d\] = \d*-?\d+ is out of range \[\d+, {ROWS}\]"):
            EVERY[name](src, None, bad)


def test_nothing_of_torch_scatter_is_missing():
    names = ["scatter", *(f"scatter_{r}" for r in ("sum", "add", "mul", "mean", "min", "max"))]
    for kind in ("coo", "csr"):
        names += [f"segment_{kind}", f"gather_{kind}"]
        names += [f"segment_{r}_{kind}" for r in ("sum", "add", "mean", "min", "max")]
    names += [f"scatter_{r}" for r in ("std", "logsumexp", "softmax", "log_softmax")]
    assert set(names) <= set(ops.__all__)
