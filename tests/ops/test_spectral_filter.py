from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from geo.bench import peak_extra_memory
from geo.ops import spectral_filter, spectral_filter_reference
from geo.testing import assert_close, check_derivatives

SIZES = [[], [0], [1], [4, 4], [3, 1, 0, 5, 4], [40, 3, 17, 0]]


def problem(sizes: list[int], width: int = 5, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    eigvecs = torch.randn(sum(sizes), width, dtype=torch.float64)
    return eigvecs, torch.randn(len(sizes), width, channels, dtype=torch.float64), ptr


def network(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def test_table():
    """Two nodes with V = [[1, 2], [3, 4]], z = (1, 10): W = V diag(z) V^T by hand."""
    eigvecs, filters = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0], [10.0]]])
    ptr = torch.tensor([0, 2])
    assert spectral_filter(eigvecs, filters, ptr).flatten().tolist() == [41.0, 83.0, 83.0, 169.0]
    assert spectral_filter(eigvecs, filters, ptr, lambda w: w**2).flatten().tolist() == [8570.0, 35450.0]


@pytest.mark.parametrize("sizes", SIZES)
def test_all_pairs(sizes):
    eigvecs, filters, ptr = problem(sizes)
    for tile in (1, 20, 8192):
        assert_close(
            spectral_filter(eigvecs, filters, ptr, tile=tile), spectral_filter_reference(eigvecs, filters, ptr)
        )


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("tile", [1, 10, 50, 300, 8192])
@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sum(sizes)])
def test_sums_and_gradients(sizes, tile, recompute):
    eigvecs, filters, ptr = problem(sizes)
    fn = network()
    inputs = [eigvecs.requires_grad_(), filters.requires_grad_(), *fn.parameters()]
    out = spectral_filter(eigvecs, filters, ptr, fn, tile=tile, recompute=recompute)
    expected = spectral_filter_reference(eigvecs, filters, ptr, fn)
    assert_close(out, expected)
    with torch.no_grad():
        assert_close(spectral_filter(eigvecs, filters, ptr, fn, tile=tile), expected)
    grad = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad))


@pytest.mark.parametrize("tile", [4, 100])
def test_derivatives(tile):
    eigvecs, filters, ptr = problem([3, 1, 0, 4], 2)
    fn = network()
    check_derivatives(lambda v, z: spectral_filter(v, z, ptr, tile=tile), [eigvecs, filters])
    check_derivatives(lambda v, z: spectral_filter(v, z, ptr, torch.sin, tile=tile), [eigvecs, filters])
    inputs = (eigvecs.requires_grad_(), filters.requires_grad_(), *fn.parameters())

    def call(v: Tensor, z: Tensor, *_: Tensor) -> Tensor:
        return spectral_filter(v, z, ptr, fn, tile=tile)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_only_what_is_asked_for_gets_a_gradient():
    eigvecs, filters, ptr = problem([3, 6])
    fn = network()
    fn[0].weight.requires_grad_(False)
    out = spectral_filter(eigvecs, filters.requires_grad_(), ptr, fn, tile=7)
    out.sum().backward()
    assert filters.grad is not None
    assert fn[0].weight.grad is None
    assert fn[2].bias.grad.tolist() == [3 * 3 + 6 * 6] * 2


def test_a_graph_does_not_see_the_others():
    eigvecs, filters, ptr = problem([5, 9, 4])
    fn = network()
    alone = [
        spectral_filter(eigvecs[a:b], filters[g : g + 1], torch.tensor([0, b - a]), fn)
        for g, (a, b) in enumerate(zip(ptr.tolist(), ptr[1:].tolist(), strict=False))
    ]
    assert_close(spectral_filter(eigvecs, filters, ptr, fn), torch.cat(alone))
    eigvecs[5:14] = torch.nan
    assert_close(
        spectral_filter(eigvecs, filters, ptr, fn)[[*range(5), *range(14, 18)]], torch.cat([alone[0], alone[2]])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    eigvecs, filters, ptr = problem([30, 5])
    expected = spectral_filter_reference(eigvecs, filters, ptr, torch.tanh)
    for tile in (64, 8192):
        out = spectral_filter(eigvecs.to(dtype), filters.to(dtype), ptr, torch.tanh, tile=tile)
        assert out.dtype == dtype
        assert_close(out, expected, 30 if dtype == torch.bfloat16 else 1)  # sums of 30 terms of either sign


def test_memory_is_that_of_a_tile():
    """Forward and gradient of 900 nodes with 32 hidden channels: one of all pairs i <= j is 52 MB."""
    eigvecs, filters, ptr = problem([900], 16, 8)
    eigvecs, filters = eigvecs.float(), filters.float().requires_grad_()
    fn = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())

    def step(recompute: bool) -> None:
        spectral_filter(eigvecs, filters, ptr, fn, tile=2048, recompute=recompute).sum().backward()

    step(True)  # what a first call loads is no memory of the op
    peaks = [peak_extra_memory(lambda: step(True)) for _ in range(3)]
    kept = peak_extra_memory(lambda: step(False))
    if kept is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    tiled = min(peaks)  # the allocator may fetch more than it needs
    assert tiled < 15e6, tiled
    assert kept > 60e6, kept


def test_refused():
    eigvecs, filters, ptr = problem([3, 2])
    layer = nn.Linear(3, 2).double()
    for given, error, message in (
        ((eigvecs[0], filters, ptr), ValueError, r"eigvecs must be \[N, K\], got \[5\]"),
        ((eigvecs, filters[:1], ptr), ValueError, r"filters must be \[2, 5, M\], got \[1, 5, 3\]"),
        ((eigvecs, filters, ptr.int()), ValueError, "ptr must be int64"),
        ((eigvecs, filters, ptr + 1), IndexError, r"ptr\[0\] = 1 is out of range"),
        ((eigvecs.long(), filters.long(), ptr), ValueError, "expected floating tensors"),
        ((eigvecs, filters, ptr, lambda w: layer(w)), ValueError, "give it as a Module"),
    ):
        with pytest.raises(error, match=message):
            spectral_filter(*given)
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        spectral_filter(eigvecs, filters, ptr, tile=0)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.spectral_filter_reference"):
        torch.func.grad(lambda z: spectral_filter(eigvecs, z, ptr).sum())(filters)
