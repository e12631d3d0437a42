from __future__ import annotations

import pytest
import torch

from geo.o3 import pack, unpack
from geo.ops import pack_irreps, pack_irreps_reference, unpack_irreps, unpack_irreps_reference
from geo.testing import check_compile, check_derivatives, check_op


def places(mul: int) -> tuple[list[int], list[int], int]:
    """Blocks of degrees 3, 0, 1 with a gap of 2 before the last one; degree 2 is absent."""
    return [0, 1, 2, 3], [7 * mul, 8 * mul + 2, -1, 0], 11 * mul + 2


def test_table(device):
    x = torch.arange(8.0, device=device)
    rows = pack_irreps(x, [1, 0], [2, 0], 2)
    assert rows.tolist() == [[2, 5], [3, 6], [4, 7], [0, 1]]
    assert unpack_irreps(rows, [1, 0], [2, 0], 2, 8).tolist() == x.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mul", [0, 1, 2, 16, 37])
def test_kernel_and_inverse(device, dtype, mul):
    degrees, starts, size = places(mul)
    for rows in (0, 1, 2, 63):
        x = torch.randn(rows, size).to(device, dtype)
        check_op(
            lambda x: pack_irreps(x, degrees, starts, mul),
            lambda x: pack_irreps_reference(x, degrees, starts, mul),
            [x],
        )
        y = pack_irreps(x, degrees, starts, mul)
        assert y.shape == (rows, 16, mul)
        assert not y[:, 4:9].any()
        check_op(
            lambda y: unpack_irreps(y, degrees, starts, mul, size),
            lambda y: unpack_irreps_reference(y, degrees, starts, mul, size),
            [y],
        )
        back = unpack_irreps(y, degrees, starts, mul, size)
        gap = torch.zeros_like(x)
        gap[:, 8 * mul : 8 * mul + 2] = x[:, 8 * mul : 8 * mul + 2]
        assert torch.equal(back, x - gap)


@pytest.mark.parametrize("irreps", ["20x0e+20x1o+20x2e+20x6e+20x7o", "17x2e+17x1e+17x0e+17x0o", "3x8e"])
def test_the_layout_of_e3nn(device, irreps):
    from geo.o3.gaunt import parse_signals

    signals = parse_signals(irreps)
    x = torch.randn(2, 5, signals.size, device=device)
    found = pack_irreps(x, signals.row_degrees, signals.row_starts, signals.mul)
    assert torch.equal(found, pack(x, irreps))
    assert torch.equal(unpack_irreps(found, signals.row_degrees, signals.row_starts, signals.mul, signals.size), x)
    assert torch.equal(unpack(found, irreps), x)


def test_derivatives_opcheck_and_compile(device):
    degrees, starts, size = places(2)
    x = torch.randn(3, size, device=device, dtype=torch.float64, requires_grad=True)
    check_derivatives(lambda x: pack_irreps(x, degrees, starts, 2), [x])
    y = torch.randn(3, 16, 2, device=device, dtype=torch.float64, requires_grad=True)
    check_derivatives(lambda y: unpack_irreps(y, degrees, starts, 2, size), [y])
    op = torch.ops.geo.pack_irreps.default
    torch.library.opcheck(op, (x, degrees, starts, 2, size, False))
    torch.library.opcheck(op, (y, degrees, starts, 2, size, True))
    check_compile(lambda x: pack_irreps(torch.sin(x), degrees, starts, 2), (x.detach(),))


def test_refusals():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"2 channels of degree 1 from 3 on do not lie in \[0, 8\)"):
        pack_irreps(x, [0, 1], [0, 3], 2)
    with pytest.raises(ValueError, match="the block of degree 1 from 1 on overlaps the one before it"):
        pack_irreps(x, [0, 1], [0, 1], 2)
    with pytest.raises(ValueError, match="got 1 degrees and 2 starts"):
        pack_irreps(x, [0], [0, 2], 2)
    with pytest.raises(ValueError, match=r"x has shape \(3, 8\), but must be \(\.\.\., 4, 2\)"):
        unpack_irreps(x, [0, 1], [0, 2], 2, 8)
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.pack_irreps_reference there"):
        torch.func.vmap(lambda x: pack_irreps(x, [0, 1], [0, 2], 2))(x)
