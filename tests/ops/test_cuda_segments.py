"""The CUDA kernels of the segment and scatter ops where their layout changes: widths, lengths, alignment, hubs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo.ops import (
    SegmentPlan,
    csr_from_index,
    csr_from_index_reference,
    gather_csr,
    gather_mul_segment_sum,
    gather_mul_segment_sum_reference,
    scatter_max,
    scatter_mean,
    scatter_min,
    scatter_sum,
    segment_reduce,
    segment_reduce_reference,
)
from geo.testing import assert_close

pytestmark = pytest.mark.cuda

REDUCES = ["sum", "mean", "mul", "min", "max"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 3, 4, 5, 8, 16, 33, 64, 128, 257]
# around each length from which on more threads share a segment: 16 to 64 rows, 32 to 1024, two chunks
LENGTHS = [0, 1, 2, 5, 15, 16, 17, 31, 32, 33, 0, 63, 64, 127, 128, 129, 300, 511, 512, 1023, 1024, 1025, 3000, 8191]
HUBS = [8192, 3, 0, 12289, 20000, 1]
nan = float("nan")


def ptr_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows_for(reduce: str, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows with ties for extremes, factors whose product stays in range, and terms that do not cancel."""
    if reduce == "mul":
        return (1 + torch.rand(num_rows, width) / 1e4).to(dtype) * torch.randn(num_rows, width).sign().to(dtype)
    if reduce in ("min", "max"):
        return torch.randint(-50, 50, (num_rows, width)).to(dtype)
    return torch.rand(num_rows, width).to(dtype)


def misaligned(src: Tensor) -> Tensor:
    """The same on the GPU, one element past an aligned address."""
    room = torch.empty(src.numel() + 1, dtype=src.dtype, device="cuda")
    return room[1:].view(src.shape).copy_(src)


def first_extremes(src: Tensor, ptr: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The law of extremes: 0 and E for no rows, else the first NaN, else the first extreme."""
    num_rows, columns = src.size(0), torch.arange(src.size(1))
    out, arg = src.new_zeros(ptr.numel() - 1, src.size(1)), torch.full((ptr.numel() - 1, src.size(1)), num_rows)
    for i, (begin, end) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        if begin == end:
            continue
        rows = src[begin:end]
        extreme = rows.amax(0) if largest else rows.amin(0)
        arg[i] = begin + ((rows == extreme) | rows.isnan()).to(torch.uint8).argmax(0)
        out[i] = src[arg[i], columns]
    return out, arg


@pytest.mark.parametrize("lengths", [LENGTHS, HUBS, [0], [1], []], ids=["lengths", "hubs", "empty", "one", "none"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_reductions(width, dtype, lengths):
    ptr = ptr_of(lengths)
    num_rows = int(ptr[-1])
    for reduce in REDUCES:
        src = rows_for(reduce, num_rows, width, dtype)
        index = torch.repeat_interleave(torch.arange(len(lengths)), ptr.diff())
        shuffled = torch.randperm(num_rows)
        plan = SegmentPlan(index[shuffled].cuda(), len(lengths))
        wanted = segment_reduce_reference(src.double(), ptr, reduce)
        outs = [segment_reduce(x, ptr.cuda(), reduce) for x in (src.cuda(), misaligned(src))]
        outs += [segment_reduce(x, plan, reduce) for x in (src[shuffled].cuda(), misaligned(src[shuffled]))]
        assert torch.equal(outs[0], outs[1])  # the order does not depend on the width of loads
        assert torch.equal(outs[2], outs[3])
        for out in outs:
            assert out.dtype == dtype
            if reduce in ("min", "max"):
                assert torch.equal(out.cpu().double(), wanted)
            else:
                assert_close(out.cpu(), wanted)


@pytest.mark.parametrize("lengths", [LENGTHS, HUBS], ids=["lengths", "hubs"])
@pytest.mark.parametrize("width", WIDTHS)
def test_extremes_are_the_first(width, lengths):
    ptr = ptr_of(lengths)
    num_rows = int(ptr[-1])
    src = torch.randint(-3, 4, (num_rows, width)).float()
    src[torch.randperm(num_rows)[: num_rows // 2000]] = nan
    src[:: max(1, num_rows // 50)] *= 0.0  # zeros of both signs tie
    index = torch.repeat_interleave(torch.arange(len(lengths)), ptr.diff())
    for dtype in FLOATS:
        for largest, scatter_extreme in ((True, scatter_max), (False, scatter_min)):
            wanted, arg = first_extremes(src.to(dtype), ptr, largest)
            plan = SegmentPlan(index.cuda(), len(lengths))
            for x in (src.to(dtype).cuda(), misaligned(src.to(dtype))):
                values, rows = torch.ops.geo.segment_extreme(x, ptr.cuda(), None, largest)
                assert torch.equal(rows.cpu(), arg)
                assert torch.equal(values.cpu().nan_to_num(99), wanted.nan_to_num(99))
                values, rows = scatter_extreme(x, plan, 0)
                assert torch.equal(rows.cpu(), arg)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_segment_alone(width):
    """Which bits a segment gets depends on its own rows, not on its neighbours or where it lies."""
    lengths = [*LENGTHS, *HUBS]
    ptr = ptr_of(lengths)
    src = torch.randn(int(ptr[-1]), width).cuda()
    for reduce in ("sum", "mul"):
        together = segment_reduce(src, ptr.cuda(), reduce)
        for i, length in enumerate(lengths):
            alone = segment_reduce(src[ptr[i] : ptr[i + 1]], torch.tensor([0, length]).cuda(), reduce)
            assert torch.equal(alone[0].nan_to_num(), together[i].nan_to_num())


@pytest.mark.parametrize("num_rows", [0, 1, 1000, 30000])
@pytest.mark.parametrize("width", WIDTHS)
def test_scatter_sum_and_gather_index(width, num_rows):
    size = 40
    index = torch.randint(size, (num_rows,))
    index[: num_rows // 2] = 7  # a hub among 30000
    for dtype in FLOATS:
        src, values = torch.rand(num_rows, width).to(dtype), torch.randn(size, width).to(dtype)
        for mean in (False, True):
            wanted = torch.zeros(size, width, dtype=torch.float64).index_add(0, index, src.double())
            if mean:
                wanted /= torch.bincount(index, minlength=size).clamp(min=1).unsqueeze(1)
            for x in (src.cuda(), misaligned(src)):
                out = torch.ops.geo.scatter_sum(x, index.cuda(), size, mean)
                assert out.dtype == dtype
                assert_close(out.cpu(), wanted)
        for x in (values.cuda(), misaligned(values)):
            assert torch.equal(torch.ops.geo.gather_index(x, index.cuda()).cpu(), values[index])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.complex128], ids=str)
def test_gather_index_copies_any_dtype(dtype):
    values, index = torch.randint(0, 2, (9, 3)).to(dtype), torch.tensor([8, 0, 3, 3])
    assert torch.equal(torch.ops.geo.gather_index(values.cuda(), index.cuda()).cpu(), values[index])


@pytest.mark.parametrize("width", WIDTHS)
def test_gather_csr(width):
    lengths = [*LENGTHS, *HUBS]
    ptr = ptr_of(lengths)
    index = torch.repeat_interleave(torch.arange(len(lengths)), ptr.diff())
    perm = torch.randperm(index.numel())
    for dtype in FLOATS:
        values = torch.randn(len(lengths), width).to(dtype)
        wanted = values[index]
        permuted = torch.empty_like(wanted)
        permuted[perm] = wanted
        for x in (values.cuda(), misaligned(values)):
            assert torch.equal(gather_csr(x, ptr.cuda()).cpu(), wanted)
            out = torch.ops.geo.gather_csr(x, ptr.cuda(), perm.cuda(), None, index.numel())
            assert torch.equal(out.cpu(), permuted)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 100000])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 70000])
def test_csr_from_index(size, num_rows):
    index = torch.randint(size, (num_rows,))
    for order in (index, index.sort().values, torch.full_like(index, size - 1)):
        ptr, perm = csr_from_index(order.cuda(), size)
        wanted_ptr, wanted_perm = csr_from_index_reference(order, size)
        assert torch.equal(ptr.cpu(), wanted_ptr)
        assert torch.equal(perm.cpu(), wanted_perm)


@pytest.mark.parametrize("shared", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 16), (9, 32), (1, 257)], ids=str)
def test_weighted_sums(shape, shared):
    lengths = [*LENGTHS, *HUBS]
    ptr = ptr_of(lengths)
    num_rows, weights = int(ptr[-1]), [1 if k in shared else n for k, n in enumerate(shape)]
    source = torch.randint(50, (num_rows,))
    for dtype in FLOATS:
        x, w = torch.rand(50, *shape).to(dtype), torch.rand(num_rows, *weights).to(dtype)
        wanted = gather_mul_segment_sum_reference(x.double(), w.double(), source, ptr)
        out = gather_mul_segment_sum(x.cuda(), w.cuda(), source.cuda(), ptr.cuda())
        assert_close(out.cpu(), wanted)


def test_ten_runs_give_the_same_bits():
    num_rows = 200000
    index = (torch.rand(num_rows) ** 8 * 5000).long().cuda()  # a power law with hubs
    for width in (1, 7, 64):
        src = torch.randn(num_rows, width, device="cuda")
        first = scatter_sum(src, index, 0, dim_size=5000), scatter_mean(src, index, 0, dim_size=5000)
        for _ in range(9):
            again = scatter_sum(src, index, 0, dim_size=5000), scatter_mean(src, index, 0, dim_size=5000)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("value", [5, -1, 2**62, -(2**62)])
@pytest.mark.parametrize("width", [1, 4, 33])
def test_bad_entries_raise_and_the_gpu_stays_usable(width, value):
    src, ptr = torch.ones(6, width, device="cuda"), torch.tensor([0, 2, 2, 4, 6, 6], device="cuda")
    bad, perm = torch.tensor([0, 1, 4, 2, 0, 3], device="cuda"), torch.arange(6, device="cuda")
    bad[3] = value
    sentence = rf"index\[3\] = {value} is out of range \[0, 4\]"
    with pytest.raises(IndexError, match=sentence):
        scatter_sum(src, bad, 0, dim_size=5)
    with pytest.raises(IndexError, match=sentence):
        scatter_max(src, bad, 0, dim_size=5)
    with pytest.raises(IndexError, match=sentence):
        csr_from_index(bad, 5)
    x = torch.ones(6, width, device="cuda", requires_grad=True)
    assert scatter_sum(x, perm % 5, 0, dim_size=5).sum().item() == 6 * width

    plan = SegmentPlan(torch.tensor([4, 0, 2, 2, 0, 4], device="cuda"), 5)
    plan.perm = perm.clone()
    plan.perm[2] = 6 if value == 5 else value
    for reduce in REDUCES:
        with pytest.raises(IndexError, match=r"edge_perm\[2\] = -?\d+ is out of range \[0, 5\]"):
            segment_reduce(src, plan, reduce)
    broken = ptr.clone()
    broken[2] = value if value != 5 else 7
    for reduce in REDUCES:
        with pytest.raises(IndexError, match=r"ptr\[\d\] = -?\d+ is out of range"):
            segment_reduce(src, broken, reduce)
    assert segment_reduce(src, ptr, "sum")[:, 0].tolist() == [2, 0, 2, 2, 0]


def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    src, index = torch.randn(1000, 5), torch.randint(40, (1000,))
    a, b = (scatter_sum(src.to(d), index.to(d), 0, dim_size=40) for d in ("cuda:0", "cuda:1"))
    assert b.device == torch.device("cuda:1")
    assert torch.equal(a.cpu(), b.cpu())
    with pytest.raises(IndexError, match="out of range"):
        scatter_sum(src.to("cuda:1"), index.to("cuda:1"), 0, dim_size=int(index.max()))


def test_graph_capture():
    """A captured call gives, replayed, what the inputs then hold: nothing is read on the host."""
    num_rows, size = 30000, 20
    src, index = torch.randn(num_rows, 8, device="cuda"), torch.randint(size, (num_rows,), device="cuda")
    ptr = ptr_of([0, 9000, 1000, num_rows - 10000]).cuda()

    def call() -> tuple[Tensor, ...]:
        reduced = [segment_reduce(src, ptr, reduce) for reduce in REDUCES]
        summed = scatter_sum(src, index, 0, dim_size=size)
        return (*reduced, summed, gather_csr(reduced[0], ptr), torch.ops.geo.gather_index(summed, index))

    call()  # the flag of the device is made at the first call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        src.copy_(torch.randn_like(src))
        index.copy_(torch.randint_like(index, size))
        graph.replay()
        for left, right in zip(captured, call(), strict=True):
            assert torch.equal(left.nan_to_num(), right.nan_to_num())
