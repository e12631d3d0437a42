from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geo import _native
from geo.bench import peak_extra_memory
from geo.ops import pair_mlp, pair_mlp_reference, spectral_filter
from geo.testing import assert_close, check_compile, check_derivatives, check_op

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZES = [[], [0], [1], [2, 63], [4, 4], [3, 1, 0, 5, 4], [40, 3, 17, 0], [150, 5]]
# widths of the channels and of the layers, whether a ReLU comes first
NETWORKS = [
    (3, [], False),
    (3, [], True),
    (1, [1], False),
    (5, [7], True),
    (16, [32, 32], False),
    (37, [70, 2, 33], True),
]


def problem(
    sizes: list[int],
    widths: list[int],
    channels: int,
    leading: bool,
    rank: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """Arguments; random, of the size that keeps each layer's output near 1."""
    ptr = torch.tensor([0, *sizes], device=device).cumsum(0)
    eigvecs, filters = torch.randn(sum(sizes), rank), torch.randn(len(sizes), rank, channels) / max(rank, 1) ** 0.5
    pairs = list(zip(widths, [channels, *widths], strict=False))
    weights = [torch.randn(a, b) * (2 / max(b, 1)) ** 0.5 for a, b in pairs]
    biases = [torch.randn(a) for a in widths]
    floats = [eigvecs, filters, *weights, *biases, *([torch.randn(channels)] if leading else [])]
    eigvecs, filters, *layers = (t.to(device, dtype) for t in floats)
    return [
        eigvecs,
        filters,
        ptr,
        layers[: len(widths)],
        layers[len(widths) : 2 * len(widths)],
        layers[-1] if leading else None,
    ]


def flat(args: list[Any]) -> list[Any]:
    """For the helpers that differentiate positional tensors."""
    eigvecs, filters, ptr, weights, biases, first = args
    return [eigvecs, filters, ptr, *weights, *biases, *([] if first is None else [first])]


def from_flat(op: Any, count: int) -> Any:
    def call(eigvecs: Tensor, filters: Tensor, ptr: Tensor, *layers: Tensor) -> Tensor:
        first = layers[-1] if len(layers) > 2 * count else None
        return op(eigvecs, filters, ptr, layers[:count], layers[count : 2 * count], first)

    return call


def test_table():
    """Two nodes with V = [[1, 2], [3, 4]], z = (1, 10): W = 41, 83, 83, 169; f(w) = relu(2 relu(w - 50) - 7)."""
    eigvecs, filters = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0], [10.0]]], requires_grad=True)
    layer = torch.tensor([[2.0]]), torch.tensor([-7.0])
    out = pair_mlp(eigvecs, filters, torch.tensor([0, 2]), layer[:1], layer[1:], torch.tensor([-50.0]))
    assert out.flatten().tolist() == [59.0, 290.0]
    out[:, 0].sum().backward()  # dW / dz = products of columns: 3 twice and 9, 8 twice and 16, times the slope 2
    assert filters.grad.flatten().tolist() == [30.0, 64.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("channels", "widths", "leading"), NETWORKS)
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_reference(sizes, channels, widths, leading, dtype, device):
    args = flat(problem(sizes, widths, channels, leading, device=device, dtype=dtype))
    count, factor = len(widths), max(1, sum(sizes)) ** 0.5
    check_op(from_flat(pair_mlp, count), from_flat(pair_mlp_reference, count), args, factor)


@pytest.mark.parametrize("rank", [0, 1, 16, 33])
def test_equals_reference_at_every_rank(rank):
    args = flat(problem([23, 9], [64, 64], 16, False, rank, dtype=torch.float32))
    check_op(from_flat(pair_mlp, 2), from_flat(pair_mlp_reference, 2), args, 6)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_equals_reference_on_2100_nodes(device):
    """More than 64 blocks of 32 nodes: the blocks are larger."""
    args = flat(problem([3, 2100], [2], 2, True, 2, device))
    check_op(from_flat(pair_mlp, 1), from_flat(pair_mlp_reference, 1), args, 2100**0.5)


@pytest.mark.parametrize("sizes", [[], [4, 70]])
def test_no_features(sizes):
    args = problem(sizes, [], 0, True, 0)
    args[0].requires_grad_()
    out = pair_mlp(*args)
    assert out.shape == (sum(sizes), 0)
    assert torch.autograd.grad(out.sum(), args[0])[0].shape == args[0].shape
    constant = problem(sizes, [3], 0, False, 0)
    assert_close(pair_mlp(*constant), pair_mlp_reference(*constant))


@pytest.mark.parametrize("leading", [False, True])
def test_equals_a_module_in_tiles(leading):
    """An independent path: spectral_filter with a network of torch.nn."""
    eigvecs, filters, ptr, weights, biases, first = problem([70, 4], [6, 8], 3, leading)
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        linear = nn.Linear(*weight.t().shape).double()
        linear.weight.data, linear.bias.data = weight, bias
        layers += [linear, nn.ReLU()]
    network = nn.Sequential(*layers)
    fn = network if first is None else lambda w: network((w + first).relu())
    with torch.no_grad():
        assert_close(
            pair_mlp(eigvecs, filters, ptr, weights, biases, first), spectral_filter(eigvecs, filters, ptr, fn)
        )


@pytest.mark.parametrize(("channels", "widths", "leading"), [(3, [], True), (2, [4], False), (3, [4, 2], True)])
def test_derivatives(channels, widths, leading):
    args = problem([3, 1, 0, 4], widths, channels, leading, 2)
    ptr = args[2]
    call = from_flat(pair_mlp, len(widths))
    given = flat(args)
    del given[2]
    check_derivatives(lambda v, z, *layers: call(v, z, ptr, *layers), given)


def test_only_what_is_asked_for_gets_a_gradient():
    eigvecs, filters, ptr, weights, biases, _ = problem([30, 6], [8, 8], 4, False)
    weights[1].requires_grad_()
    pair_mlp(eigvecs, filters, ptr, weights, biases).sum().backward()
    assert eigvecs.grad is None
    assert weights[0].grad is None
    expected = weights[1].detach().clone().requires_grad_()
    pair_mlp_reference(eigvecs, filters, ptr, [weights[0], expected], biases).sum().backward()
    assert_close(weights[1].grad, expected.grad, 10)


@pytest.mark.parametrize("device", DEVICES)
def test_not_contiguous(device):
    eigvecs, filters, ptr, weights, biases, first = problem([30, 6], [8], 4, True, device=device)
    expected = pair_mlp(eigvecs, filters, ptr, weights, biases, first)
    strided = [t.t().contiguous().t() for t in (eigvecs, *weights)]
    filters = filters.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = pair_mlp(strided[0], filters, torch.stack([ptr, ptr], 1)[:, 0], strided[1:], biases, first)
    assert_close(out, expected)
    (grad,) = torch.autograd.grad(out, filters, torch.ones(1, 1, dtype=out.dtype, device=device).expand_as(out))
    plain = pair_mlp_reference(strided[0], filters, ptr, weights, biases, first)
    assert_close(grad, torch.autograd.grad(plain.sum(), filters)[0], 10)


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_does_not_see_the_others(device):
    """Up to rounding, since large graphs are cut by their share of the batch; and a NaN stays in its graph."""
    sizes = [5, 90, 4]
    eigvecs, filters, ptr, weights, biases, first = problem(sizes, [20, 3], 4, True, device=device, dtype=torch.float32)
    out = pair_mlp(eigvecs, filters, ptr, weights, biases, first)
    begin = ptr.tolist()
    for g, size in enumerate(sizes):
        own = slice(begin[g], begin[g + 1])
        alone = pair_mlp(
            eigvecs[own], filters[g : g + 1], torch.tensor([0, size], device=device), weights, biases, first
        )
        assert_close(out[own], alone)
    eigvecs[5:95] = torch.nan
    holes = pair_mlp(eigvecs, filters, ptr, weights, biases, first).isnan().all(1)
    assert holes.tolist() == [False] * 5 + [True] * 90 + [False] * 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype, device):
    eigvecs, filters, ptr, weights, biases, first = problem([30, 5], [8, 4], 3, True, device=device, dtype=dtype)
    out = pair_mlp(eigvecs, filters, ptr, weights, biases, first)
    assert out.dtype == dtype
    wide = [t.float() for t in (eigvecs, filters, first)]
    layers = [[t.float() for t in ts] for ts in (weights, biases)]
    assert torch.equal(out, pair_mlp(wide[0], wide[1], ptr, *layers, wide[2]).to(dtype))
    assert pair_mlp(eigvecs, wide[1], ptr, weights, biases, first).dtype == torch.float32


def test_autocast_changes_nothing():
    args = problem([30, 5], [8, 4], 3, False, dtype=torch.float32)
    expected = pair_mlp(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pair_mlp(*args), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_compile(device):
    args = flat(problem([30, 5, 0], [8, 4], 3, True, device=device, dtype=torch.float32))
    check_compile(from_flat(pair_mlp, 2), args)


@pytest.mark.slow
def test_inductor():
    args = flat(problem([30, 5, 0], [8, 4], 3, True, dtype=torch.float32))
    check_compile(from_flat(pair_mlp, 2), args, backend="inductor", dynamic=True)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    """The backward's own derivative looks at ``ptr``, so it is not traced."""
    eigvecs, filters, ptr, weights, biases, _ = problem([6, 2], [4], 3, False, device=device)
    params = torch.cat([weights[0].flatten(), biases[0]]).requires_grad_()
    args = (eigvecs.requires_grad_(), filters.requires_grad_(), ptr, params, [4], False)
    torch.library.opcheck(torch.ops.geo.pair_mlp, args)
    given = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    for need in (True, False):
        torch.library.opcheck(torch.ops.geo.pair_mlp_backward, (torch.randn(8, 4).to(eigvecs), *given, need))


@pytest.mark.skipif(not _native.have("cpu"), reason="the sums of plain PyTorch are torch's")
def test_same_bits_on_any_number_of_threads():
    """A large graph, which is cut, and small ones, which are not."""
    eigvecs, filters, ptr, weights, biases, first = problem([300, *[20] * 40], [32, 16], 8, True, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (eigvecs, filters, *weights, *biases, first)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = pair_mlp(eigvecs, filters, ptr, weights, biases, first)
            found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)


def test_memory_is_that_of_a_tile():
    """900 nodes: one layer of 32 channels of all pairs i <= j is 52 MB."""
    eigvecs, filters, ptr, weights, biases, _ = problem([900], [32, 32], 8, False, 16, dtype=torch.float32)
    filters.requires_grad_()
    peak = peak_extra_memory(lambda: pair_mlp(eigvecs, filters, ptr, weights, biases).sum().backward())
    if peak is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert peak < 15e6, peak


def test_refused():
    eigvecs, filters, ptr, weights, biases, first = problem([3, 2], [4, 2], 3, True)
    for given, message in (
        ((eigvecs[0], filters, ptr, weights, biases), r"eigvecs must be \[N, K\], got \[5\]"),
        ((eigvecs, filters[:1], ptr, weights, biases), r"filters must be \[2, 5, M\], got \[1, 5, 3\]"),
        ((eigvecs, filters, ptr.int(), weights, biases), "ptr must be int64"),
        ((eigvecs, filters, ptr, weights[1:], biases[1:]), r"weights\[0\] must be \[F, 3\], got \[2, 4\]"),
        ((eigvecs, filters, ptr, weights, biases[::-1]), r"biases\[0\] must be \[4\], got \[2\]"),
        ((eigvecs, filters, ptr, weights, biases[1:]), "each layer has a weight and a bias, got 2 and 1"),
        ((eigvecs, filters, ptr, weights, biases, first[1:]), r"first_bias must be \[3\], got \[2\]"),
        ((eigvecs.long(), filters.long(), ptr, [], []), "expected floating tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_mlp(*given)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.pair_mlp_reference"):
        torch.func.grad(lambda z: pair_mlp(eigvecs, z, ptr, weights, biases).sum())(filters)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [[1, 3, 5], [0, 4, 3, 5], [0, 3, 6], [0, -1, 5], [0, 3, 4]])
def test_bad_ptr(bad, device):
    eigvecs, filters, _, weights, biases, first = problem([5, *[0] * (len(bad) - 2)], [4], 3, True, device=device)
    for op in (pair_mlp, pair_mlp_reference):
        with pytest.raises(IndexError, match="is out of range"):
            op(eigvecs, filters, torch.tensor(bad, device=device), weights, biases, first)


@pytest.mark.parametrize("op", [pair_mlp, pair_mlp_reference])
def test_no_graphs_have_zero_gradients(op):
    eigvecs, filters, ptr, weights, biases, _ = problem([], [8], 4, False)
    leaves = [eigvecs.requires_grad_(), filters.requires_grad_(), weights[0].requires_grad_()]
    grads = torch.autograd.grad(op(eigvecs, filters, ptr, weights, biases).sum(), leaves)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_too_many_layers():
    with pytest.raises(ValueError, match="weights must be of at most 63 layers, got 64"):
        pair_mlp(*problem([3], [2] * 64, 2, False))
