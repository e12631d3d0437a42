from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geo import _native
from geo.ops import (
    Blocks,
    gaunt_product,
    gaunt_product_irreps,
    gaunt_product_irreps_reference,
    gaunt_product_reference,
    pack_irreps_reference,
    unpack_irreps_reference,
)
from geo.ops.gaunt import auto_method
from geo.testing import assert_close, check_compile, check_derivatives, check_op

F64 = torch.float64
METHODS = ["grid", "sparse", "separable"]
SIZES = [(0, 0, 0, 3), (1, 1, 1, 4), (2, 1, 3, 5), (1, 3, 2, 1), (3, 3, 3, 2)]  # L1, L2, L3, C


def tensors(rows: int, sizes: tuple[int, int, int, int], device="cpu", dtype=torch.float32) -> list[Tensor]:
    lmax1, lmax2, _, channels = sizes
    x, y = torch.randn(rows, (lmax1 + 1) ** 2, channels), torch.randn(rows, (lmax2 + 1) ** 2, channels)
    return [t.to(device, dtype) for t in (x, y)]


def scaled(x, y, a, b, c, lmax=2, bracket=False, method="grid"):
    return gaunt_product(x, y, lmax, bracket, a, b, c, method)


def scales(device="cpu", rows: int = 3, channels: int = 2) -> list[Tensor]:
    return [
        torch.randn(shape, dtype=F64, device=device) for shape in ((2, channels), (rows, 2, 1), (rows, 3, channels))
    ]


def test_table(device):
    r"""With Y_1 = sqrt(3) u: vectors a, b have the product 3 (a.u)(b.u), of mean a.b, and the bracket 3 u.(a x b)."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64, device=device)[:, None]
    y = torch.tensor([0.0, 4.0, -5.0, 6.0], dtype=F64, device=device)[:, None]
    assert_close(gaunt_product(x, y, 0).flatten(), torch.tensor([4.0 - 10 + 18], dtype=F64))
    cross = torch.linalg.cross(x[1:, 0], y[1:, 0]) * 3**0.5
    assert_close(gaunt_product(x, y, 1, bracket=True).flatten(), torch.cat((cross[:1] * 0, cross)))
    one = torch.tensor([1.0, 0, 0, 0], dtype=F64, device=device)[:, None]
    assert_close(gaunt_product(one, y, 1), y)
    assert gaunt_product(one, y, bracket=True).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_methods_and_dtypes(device, dtype, bracket, method):
    for rows in (0, 1, 2, 63):
        for sizes in SIZES:
            check_op(
                lambda x, y, top=sizes[2]: gaunt_product(x, y, top, bracket, method=method),
                lambda x, y, top=sizes[2]: gaunt_product_reference(x, y, top, bracket, method="grid"),
                tensors(rows, sizes, device, dtype),
                factor=10,  # sums of up to 60 terms of size 5
            )


WIDE = [(2, 2, 2, 40), (3, 3, 3, 16), (4, 4, 4, 20), (6, 5, 7, 17), (0, 3, 3, 33), (9, 8, 9, 2), (12, 2, 11, 16)]


@pytest.mark.parametrize("method", ["auto", "sparse", "separable"])
@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("sizes", WIDE, ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_channels_beyond_a_vector_and_high_degrees(device, dtype, sizes, bracket, method):
    """Also one channel for many, the sum over channels (a gradient's) and factors of every kind."""
    op = torch.ops.geo.gaunt_product
    *lmax, channels = sizes
    x, y = tensors(3, sizes, device, dtype)
    a, b, c = (
        torch.randn(rows, top + 1, wide, device=device, dtype=dtype)
        for rows, top, wide in zip((3, 1, 3), lmax, (1, channels, channels), strict=True)
    )
    for first, second, out, factors in (
        (x, y, channels, (None, None, None)),
        (x, y, 1, (a, b, None)),
        (x[..., :1], y, channels, (a, None, c)),
        (x, y[..., :1], 1, (None, b, c)),
    ):
        found = op(first, second, *factors, *lmax, out, bracket, method)
        wide = [t if t is None else t.double() for t in (first, second, *factors)]
        expected = torch.ops.geo.gaunt_product_grid(*wide, *lmax, out, bracket)
        assert_close(found / expected.abs().amax(), (expected / expected.abs().amax()).to(dtype))


def test_auto_and_the_limit_of_lists(device):
    like = torch.empty(0, device=device)
    assert auto_method(like, 1, 1, 1) == "sparse"
    assert auto_method(like, 10, 10, 10) in ("grid", "separable")
    if device.type == "cpu" and _native.have("cpu"):  # the crossover of benchmarks/tensor_products.md
        for degrees, bracket, method in (
            ((4, 4, 4), False, "sparse"),
            ((6, 6, 6), False, "separable"),
            ((5, 5, 5), True, "sparse"),
            ((6, 6, 6), True, "separable"),
            ((6, 1, 6), False, "sparse"),
            ((5, 3, 5), False, "separable"),
        ):
            assert auto_method(like, *degrees, bracket) == method, (degrees, bracket)
    x = torch.randn(1, 14**2, 2, device=device)
    with pytest.raises(ValueError, match="method 'sparse' lists the couplings of degrees up to 12, got 13"):
        gaunt_product(x, x, 1, method="sparse")
    assert_close(gaunt_product(x, x, 1), gaunt_product(x, x, 1, method="grid"), factor=10)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_changes_nothing(device, method):
    x, y = tensors(5, (2, 1, 2, 3), device)
    x.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            out = gaunt_product(x, y, 2, method=method)
            (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bracket", [False, True])
def test_leading_axes_broadcast_and_channels_repeat(device, bracket):
    x, y = torch.randn(5, 1, 4, 3, dtype=F64, device=device), torch.randn(2, 9, 1, dtype=F64, device=device)
    out = gaunt_product(x, y, 2, bracket)
    assert out.shape == (5, 2, 9, 3)
    for i, j, c in ((0, 0, 0), (4, 1, 2)):
        alone = gaunt_product(x[i, 0, :, c : c + 1], y[j], 2, bracket)
        assert_close(out[i, j, :, c : c + 1], alone)
    assert gaunt_product(x[..., :0], y, 2).shape == (5, 2, 9, 0)
    wide = x.transpose(0, 2).contiguous().transpose(0, 2)
    assert_close(gaunt_product(wide, y, 2, bracket), out)


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_scales_are_factors_of_degrees(device, bracket, method):
    x, y = tensors(3, (1, 1, 2, 2), device, F64)
    a, b, c = scales(device)
    spread = [torch.repeat_interleave(s, torch.tensor([1, 3, 5][: s.size(-2)], device=device), -2) for s in (a, b, c)]
    expected = spread[2] * gaunt_product(x * spread[0], y * spread[1], 2, bracket, method="grid")
    assert_close(scaled(x, y, a, b, c, 2, bracket, method), expected)


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_derivatives(device, bracket, method):
    def product(x, y):
        return gaunt_product(x, y, 2, bracket, method=method)

    check_derivatives(product, tensors(2, (1, 2, 2, 2), device, F64))


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("channels", [(2, 1), (1, 2), (1, 1)])
def test_derivatives_with_scales_and_one_channel(device, bracket, channels):
    x, y = (torch.randn(2, 4, c, dtype=F64, device=device) for c in channels)
    check_derivatives(lambda *t: scaled(*t, bracket=bracket), [x, y, *scales(device, rows=2)])


@pytest.mark.parametrize("bracket", [False, True])
def test_third_derivative(device, bracket):
    """gradgradcheck of the gradient of a cubic function of the product."""
    x, y = tensors(2, (1, 1, 2, 1), device, F64)
    a, b, c = scales(device, rows=2, channels=1)

    def force(*inputs):
        energy = scaled(*inputs, bracket=bracket).pow(3).sum()
        return torch.autograd.grad(energy, inputs, create_graph=True)

    check_derivatives(force, (x, y, a, b, c))


@pytest.mark.parametrize("bracket", [False, True])
def test_gradients_are_the_op_itself(bracket):
    """The op keeps its operands alone, no field on the grid, and its gradient comes from the op."""
    x, y = (t.requires_grad_() for t in tensors(4, (2, 2, 2, 3), dtype=F64))
    out = torch.ops.geo.gaunt_product(x, y, None, None, None, 2, 2, 2, 3, bracket, "auto")
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), y.data_ptr()]
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert "gaunt_product" in dx.grad_fn.name()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(device, method, grad):
    x, y = (t.requires_grad_(grad) for t in tensors(3, (1, 1, 2, 2), device, F64))
    a, b, c = (torch.randn(n, 2, 1, dtype=F64, device=device, requires_grad=grad) for n in (1, 3, 1))
    grid = method == "grid"
    op = torch.ops.geo.gaunt_product_grid.default if grid else torch.ops.geo.gaunt_product.default
    last = () if grid else (method,)
    torch.library.opcheck(op, (x, y, None, None, None, 1, 1, 2, 2, False, *last))
    torch.library.opcheck(op, (x, y, a, b, c, 1, 1, 1, 2, True, *last))
    torch.library.opcheck(op, (x, y[:, :, :1].detach().requires_grad_(grad), a, b, c, 1, 1, 1, 1, True, *last))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    x, y = tensors(5, (1, 2, 2, 3), device)
    check_compile(lambda x, y: gaunt_product(torch.sin(x), y, 2), (x, y), dynamic=dynamic)
    check_compile(
        lambda x, y, s: gaunt_product(x, y, 2, True, scale_y=s),
        (x, y, torch.randn(3, 1, device=device)),
        dynamic=dynamic,
    )


IRREPS = [  # starts of x, y and the output, over channels: in order; absent degrees and gaps; one channel of the second
    ((0, 1, 4), (0, 1, 4), (0, 1, 4), 0, False),
    ((3, 0, -1, 4), (0, 1, 4), (7, -1, 0), 2, False),
    ((0, 1, 4), (0, 3), (-1, 3, 6), 0, True),
]


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 16, 21])
@pytest.mark.parametrize("case", IRREPS, ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_features_as_e3nn_has_them(device, dtype, case, channels, bracket):
    """The op on blocks [mul, 2l+1] is the packed one, with and without factors, in both methods."""
    *starts, gap, single = case
    muls = (channels, 1 if single else channels, channels)
    blocks = []
    for first, mul in zip(starts, muls, strict=True):
        top = max(s + 2 * l + 1 for l, s in enumerate(first))
        blocks.append(Blocks(tuple(s * mul if s >= 0 else -1 for s in first), mul, top * mul + gap))
    x, y = (torch.randn(5, b.size).to(device, dtype) for b in blocks[:2])
    a, c = (torch.randn(rows, len(blocks[i].starts), channels).to(device, dtype) for i, rows in ((0, 5), (2, 1)))
    packed = [
        pack_irreps_reference(t, range(len(b.starts)), b.starts, b.mul) for t, b in zip((x, y), blocks[:2], strict=True)
    ]
    for method in ("sparse", "separable", "grid"):
        for factors in ((None, None, None), (a, None, c)):
            expected = gaunt_product_reference(*packed, len(blocks[2].starts) - 1, bracket, *factors)
            degrees = range(len(blocks[2].starts))
            expected = unpack_irreps_reference(expected, degrees, blocks[2].starts, blocks[2].mul, blocks[2].size)
            found = gaunt_product_irreps(x, y, *blocks, bracket, *factors, method)
            assert_close(found, expected, factor=20)


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_derivatives_of_features_as_e3nn_has_them(device, bracket, single):
    blocks = (
        Blocks((0, 2, -1), 2, 9),
        Blocks((0, 1), 1, 4) if single else Blocks((6, 0), 2, 8),
        Blocks((8, 2, -1), 2, 11),
    )
    x, y = (torch.randn(2, b.size, dtype=F64, device=device) for b in blocks[:2])
    a, b, c = (torch.randn(r, n, 2, dtype=F64, device=device) for r, n in ((2, 3), (1, 2), (1, 3)))
    check_derivatives(lambda x, y: gaunt_product_irreps(x, y, *blocks, bracket), [x, y])
    check_derivatives(lambda *t: gaunt_product_irreps(*t[:2], *blocks, bracket, *t[2:]), [x, y, a, b, c])
    op = torch.ops.geo.gaunt_product_irreps.default
    places = [list(b.starts) for b in blocks]
    torch.library.opcheck(
        op,
        (x.requires_grad_(), y, a, None, c, *places, 2, blocks[1].mul, 11, 2, bracket, "auto"),
    )
    check_compile(lambda x, y: gaunt_product_irreps(torch.sin(x), y, *blocks, bracket), (x.detach(), y))


def test_torch_func_uses_the_reference():
    x, y = tensors(3, (1, 1, 2, 2), dtype=F64)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gaunt_product_reference there"):
        torch.func.vmap(gaunt_product)(x, y)
    assert_close(torch.func.vmap(gaunt_product_reference)(x, y), gaunt_product(x, y))
    grad = torch.func.grad(lambda x: gaunt_product_reference(x, y).square().sum())(x)
    leaf = x.clone().requires_grad_()
    gaunt_product(leaf, y).square().sum().backward()
    assert_close(grad, leaf.grad)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.ones(2, 5, 3)}, ValueError, r"x: expected \[\.\.\., \(L\+1\)\^2, C\].*where 5 is no such square"),
        ({"y": torch.ones(4)}, ValueError, r"y: expected \[\.\.\., \(L\+1\)\^2, C\], got shape \[4\]"),
        ({"x": torch.ones(2, 4, 3).long()}, TypeError, r"x: expected a floating-point tensor, got torch\.int64"),
        ({"y": torch.ones(2, 4, 2)}, ValueError, "3 and 2 channels"),
        ({"y": torch.ones(3, 4, 3)}, ValueError, "do not broadcast"),
        ({"lmax_out": -1}, ValueError, "lmax_out is -1"),
        ({"lmax_out": 129}, ValueError, "lmax_out is 129"),
        ({"method": "fft"}, ValueError, "method is 'fft', but must be one of 'auto', 'sparse', 'grid', 'separable'"),
        ({"scale_x": torch.ones(3, 3)}, ValueError, r"scale_x: expected \[\.\.\., 2, C\], one row a degree"),
        ({"scale_out": torch.ones(3, 1).long()}, TypeError, "scale_out: expected a floating-point tensor"),
    ],
)
def test_refusals(changes, error, words):
    arguments = {"x": torch.ones(2, 4, 3), "y": torch.ones(2, 4, 3)} | changes
    with pytest.raises(error, match=words):
        gaunt_product(**arguments)


def test_leading_axes_and_mixed_types_of_features_as_e3nn_has_them(device):
    blocks = Blocks((0, 2), 2, 8)
    x, y = torch.randn(2, 3, 8, device=device), torch.randn(3, 8, dtype=F64, device=device)
    found = gaunt_product_irreps(x, y, blocks, blocks, blocks, scale_x=torch.rand(3, 2, 1, device=device))
    assert found.dtype == F64
    assert found.shape == (2, 3, 8)
    same = gaunt_product_irreps(x, x.double(), blocks, blocks, blocks)
    for i, j in ((0, 1), (1, 2)):
        alone = gaunt_product_irreps(x[i, j].double(), x[i, j].double(), blocks, blocks, blocks, method="grid")
        assert_close(same[i, j], alone, factor=1e4)  # x has the digits of float32
    x, y = x[0].double(), y
    expected = gaunt_product_irreps_reference(x, y, blocks, blocks, blocks, True)
    found = torch.func.vmap(lambda x, y: gaunt_product_irreps_reference(x, y, blocks, blocks, blocks, True))(x, y)
    assert_close(found, expected)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.gaunt_product_irreps_reference there"):
        torch.func.vmap(lambda x, y: gaunt_product_irreps(x, y, blocks, blocks, blocks))(x, y)


@pytest.mark.parametrize("method", ["auto", "grid"])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.ones(2, 9)}, ValueError, r"x: expected \[\.\.\., 8\], got shape \[2, 9\]"),
        ({"y": torch.ones(2, 8).long()}, TypeError, r"expected floating-point tensors, got torch\.int64"),
        ({"blocks_out": Blocks((0, 1), 1, 4)}, ValueError, r"operands have \[2\] channels, the output 1"),
        ({"blocks_y": Blocks((0, 3), 1, 8), "scale_x": torch.ones(2, 5)}, ValueError, r"\[1, 2, 5\] channels"),
        ({"blocks_x": Blocks((0, 1), 2, 8)}, ValueError, "blocks_x: the block of degree 1 from 1 on overlaps"),
        ({"blocks_x": Blocks((0, 3), 2, 8)}, ValueError, r"degree 1 from 3 on do not lie in \[0, 8\)"),
        ({"blocks_x": Blocks((), 2, 8)}, ValueError, "blocks_x has 0 degrees, but must have from 1 to 65"),
        ({"scale_x": torch.ones(3, 1)}, ValueError, r"scale_x: expected \[\.\.\., 2, C\], one row a degree"),
    ],
)
def test_refusals_of_features_as_e3nn_has_them(changes, error, words, method):
    blocks = Blocks((0, 2), 2, 8)
    arguments = {"x": torch.ones(2, 8), "y": torch.ones(2, 8)}
    arguments |= {"blocks_x": blocks, "blocks_y": blocks, "blocks_out": blocks}
    with pytest.raises(error, match=words):
        gaunt_product_irreps(**(arguments | changes), method=method)
