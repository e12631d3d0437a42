"""The CUDA kernels of products on the sphere where they change: degrees, channels, tiles, dtypes, streams."""

from __future__ import annotations

import pytest
import torch

from geo.ops import gaunt_product
from geo.testing import assert_close

pytestmark = pytest.mark.cuda

op = torch.ops.geo.gaunt_product
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# rows and channels: one of each, tiles not full, few channels, warps not full, several steps of a sum
SHAPES = [(1, 1), (131, 1), (43, 3), (13, 7), (5, 9), (3, 32), (2, 33), (3, 100)]
STRAIGHT = [(0, 0, 0), (1, 1, 1), (2, 1, 2), (0, 2, 2), (2, 2, 2), (3, 3, 3), (4, 4, 4)]
EQUAL = [(degree,) * 3 for degree in range(3, 9)]
UNEQUAL = [(2, 3, 4), (0, 5, 5), (6, 2, 7), (9, 9, 9), (12, 5, 10)]


def check(degrees: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, bracket: bool, method: str) -> None:
    """Each kind of operand against matrix products in float64; a second call gives the same bits."""
    rows, channels = shape
    x, y = (torch.randn(rows, (top + 1) ** 2, channels, device="cuda").to(dtype) for top in degrees[:2])
    a, b, c = (
        torch.randn(n, top + 1, wide, device="cuda").to(dtype)
        for n, top, wide in zip((rows, 1, rows), degrees, (1, channels, channels), strict=True)
    )
    for first, second, out, factors in (
        (x, y, channels, (None, None, None)),
        (x[..., :1].contiguous(), y, channels, (a, None, c)),
        (x, y, 1, (a, b, None)),
        (x, y[..., :1].contiguous(), 1, (None, b, c)),
    ):
        found = op(first, second, *factors, *degrees, out, bracket, method)
        wide = [t if t is None else t.double() for t in (first, second, *factors)]
        expected = torch.ops.geo.gaunt_product_grid(*wide, *degrees, out, bracket)
        size = expected.abs().amax().clamp(min=1)
        assert found.dtype == dtype
        assert_close((found.double() / size).to(dtype), (expected / size).to(dtype))
        assert torch.equal(found, op(first, second, *factors, *degrees, out, bracket, method))


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("degrees", STRAIGHT, ids=str)
def test_straight(degrees, dtype, bracket):
    for shape in SHAPES:
        check(degrees, shape, dtype, bracket, "auto")


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("degrees", EQUAL, ids=str)
def test_separable_with_equal_degrees(degrees, dtype, bracket):
    for shape in SHAPES:
        check(degrees, shape, dtype, bracket, "separable")


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("degrees", UNEQUAL, ids=str)
def test_any_degrees(degrees, dtype, bracket):
    for shape in SHAPES:
        check(degrees, shape, dtype, bracket, "separable")
        if max(degrees) < 9:
            check(degrees, shape, dtype, bracket, "sparse")


@pytest.mark.parametrize("bracket", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_samples_fit_in_shared_memory(dtype, bracket):
    check((20, 20, 20), (2, 3), dtype, bracket, "separable")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_largest_degrees(dtype):
    """In float64 with room for one sample a block on an H200. A constant times x is x, its bracket with x zero."""
    x = torch.randn(2, 65**2, 3, device="cuda", dtype=dtype)
    y = torch.zeros_like(x)
    y[:, 0] = 2
    for left, right in ((x, y), (y, x)):
        found = gaunt_product(left, right, 128)
        assert_close(found[:, : 65**2], 2 * x, factor=10)  # sums of hundreds of terms
        assert_close(found[:, 65**2 :], torch.zeros_like(found[:, 65**2 :]), factor=10)
    tail = gaunt_product(x, y, 128, bracket=True) / 64**2  # sums of slopes
    assert_close(tail, torch.zeros_like(tail), factor=10)


@pytest.mark.parametrize("degree", [2, 4, 6, 9])
def test_a_row_alone(degree):
    """Which bits a row gets depends on nothing but itself."""
    x, y = torch.randn(2, 300, (degree + 1) ** 2, 24, device="cuda")
    for channels in (24, 3):
        left, right = x[..., :channels].contiguous(), y[..., :channels].contiguous()
        together = gaunt_product(left, right, degree)
        for row in (0, 17, 299):
            assert torch.equal(together[row], gaunt_product(left[row], right[row], degree))


def test_non_default_stream():
    x, y = torch.randn(2, 5000, 25, 32, device="cuda")
    expected = gaunt_product(x, y, 4)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gaunt_product(x.clone(), y.clone(), 4)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for degree in (2, 6, 9):  # a kernel of each kind
        x, y = torch.randn(2, 100, (degree + 1) ** 2, 5)
        a, b = (gaunt_product(x.to(d), y.to(d), degree) for d in ("cuda:0", "cuda:1"))
        assert b.device == torch.device("cuda:1")
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("degree", [2, 6, 9])
def test_graph_capture(degree):
    """The first call of each choice of degrees makes tables on the device; from then on a call can be captured."""
    x, y = torch.randn(2, 100, (degree + 1) ** 2, 5, device="cuda")
    gaunt_product(x, y, degree)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gaunt_product(x, y, degree)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, gaunt_product(x, y, degree))


def test_more_samples_than_a_grid_has_blocks():
    """Blocks take several tiles: 2^27 samples of degree 0 with one channel."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB")
    rows = (1 << 27) + 77
    x, y = torch.randn(2, rows, 1, 1, device="cuda")
    found = gaunt_product(x, y, 0)
    assert torch.equal(found, x * y)
