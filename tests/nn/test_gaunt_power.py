from __future__ import annotations

import math

import pytest
import torch
from e3nn import o3

from geo.nn import GauntPower, GauntTensorProduct
from geo.o3 import SphereGrid, pack, unpack
from geo.testing import assert_close, assert_state_dict_roundtrip, check_compile, check_derivatives, random_rotations

F64 = torch.float64
BOTH = "2x0e+2x1o+2x1e+2x2e"


def natural(lmax: int, mul: int = 1) -> str:
    return "+".join(f"{mul}x{l}{'eo'[l % 2]}" for l in range(lmax + 1))


def features(irreps, rows=5, dtype=F64) -> torch.Tensor:
    return torch.randn(rows, o3.Irreps(irreps).dim, dtype=dtype)


def build(*args, **options) -> GauntPower:
    return GauntPower(*args, **options).double()


def nested(x: torch.Tensor, irreps: str, order: int) -> tuple[torch.Tensor, o3.Irreps]:
    """x times itself, nothing cut off in between."""
    out, irreps_out = x, o3.Irreps(irreps)
    for _ in range(order - 1):
        tp = GauntTensorProduct(irreps_out, irreps, normalize="gaunt").double()
        out, irreps_out = tp(out, x), tp.irreps_out
    return out, irreps_out


@pytest.mark.parametrize("irreps", [natural(2, 2), natural(3, 2), BOTH, "2x1e+2x0o", "2x1o"])
def test_equals_nested_products(irreps):
    x = features(irreps)
    orders = [nested(x, irreps, order) for order in (1, 2, 3)]
    top = max(ir.l for _, ir in o3.Irreps(irreps))
    wanted = {ir for _, found in orders for _, ir in found if ir.l <= min(top, 2)}
    irreps_out = o3.Irreps([(2, ir) for ir in sorted(wanted)])
    power = build(irreps, irreps_out, 3)
    rms = sum(ir.dim for _, ir in o3.Irreps(irreps)) ** 0.5
    expected = torch.zeros(5, irreps_out.dim, dtype=F64)
    rows = [(parity, l) for parity in (1, -1) for l in range(power._out.lmax(parity) + 1)]
    for order, (value, found) in enumerate(orders, 1):
        scale = rms**-order / math.sqrt(math.prod(range(1, 2 * order, 2)))
        for (_, ir), where in zip(irreps_out, irreps_out.slices(), strict=True):
            weight = power.weight[0, order - 1, rows.index((ir.p * (-1) ** ir.l, ir.l))]
            for (_, other), place in zip(found, found.slices(), strict=True):
                if other == ir:
                    block = value[:, place].view(5, 2, ir.dim) * weight[:, None] * scale
                    expected[:, where] += block.flatten(1)
    assert_close(power(x), expected)


def test_order_one_scales_each_degree():
    power = build(natural(2, 3), natural(2, 3), 1, num_elements=2)
    x, index = features(natural(2, 3)), torch.tensor([0, 1, 1, 0, 1])
    expected = pack(x, natural(2, 3)) / 3 * power.weight[index, 0].repeat_interleave(torch.tensor([1, 3, 5]), 1)
    assert_close(power(x, index), unpack(expected, natural(2, 3)))


def test_the_grid_is_the_smallest():
    """One degree less is wrong; what is cut off between the factors would be missed."""
    power = build(natural(2), natural(2), 3)
    assert power.grid.degree == 8
    assert len(build(natural(3), natural(2), 3).grid) == 72
    x = pack(features(natural(2)), natural(2))
    f = power.grid.to_matrix(2) @ x
    small = SphereGrid(7)
    g = small.to_matrix(2) @ x
    exact, wrong = (
        (grid.to_matrix(2) * grid.weights[:, None]).t() @ field.pow(3) for grid, field in ((power.grid, f), (small, g))
    )
    assert (exact - wrong).abs().max() > 1e-2
    square = GauntTensorProduct(natural(2), natural(2), normalize="gaunt", layout="dense", lmax_out=2)
    assert (square(square(x, x), x) - exact).abs().max() > 1e-2


def test_elements_by_index_and_by_row():
    power = build(natural(1, 4), natural(1, 4), 2, num_elements=3)
    x, index = features(natural(1, 4), 6), torch.tensor([2, 0, 1, 1, 2, 0])
    out = power(x, index)
    assert_close(power(x, torch.nn.functional.one_hot(index, 3)), out)
    for element in range(3):
        alone = build(natural(1, 4), natural(1, 4), 2)
        alone.load_state_dict({"weight": power.weight[element : element + 1].detach()})
        rows = index == element
        assert_close(alone(x[rows]), out[rows])
    grads = []
    for attrs in (index, torch.nn.functional.one_hot(index, 3).double()):
        power.zero_grad()
        power(x, attrs).square().sum().backward()
        grads.append(power.weight.grad.clone())
    assert_close(*grads)


@torch.no_grad()
def test_equivariant_to_rotations_and_inversion(double, representation):
    for irreps, irreps_out in ((natural(3, 2), natural(2, 2)), (BOTH, "2x0e+2x0o+2x1o+2x2o")):
        power = build(irreps, irreps_out, 3)
        x = features(irreps)
        expected = power(x)
        for turn in random_rotations(5):
            for parity in (1, -1):
                d_in = representation(power.irreps_in, parity * turn)
                d_out = representation(power.irreps_out, parity * turn)
                assert (power(x @ d_in.t()) - expected @ d_out.t()).abs().max() < 1e-11 * expected.abs().max()
        if irreps == BOTH:
            assert (power(x @ representation(power.irreps_in, -turn).t()) - expected).abs().max() > 1e-2


def test_powers_have_unit_variance():
    """Of unit inputs: the sum of squares of all coefficients of a power is its mean square over the sphere."""
    power = build(natural(2, 4), natural(6, 4), 3)
    x = features(natural(2, 4), 4000)
    for order in range(3):
        with torch.no_grad():
            power.weight.zero_()
            power.weight[:, order] = 1
        assert abs(power(x).square().sum(1).mean() / 4 - 1) < 0.1


def test_nodes_are_alone_and_there_may_be_none():
    power = build(BOTH, BOTH, 3, num_elements=2)
    x, index = features(BOTH, 6), torch.tensor([0, 1, 1, 0, 0, 1])
    out = power(x, index)
    assert_close(torch.cat([power(x[i : i + 1], index[i : i + 1]) for i in range(6)]), out)
    assert power(x[:0], index[:0]).shape == (0, 24)
    perm = torch.randperm(6)
    assert_close(power(x[perm], index[perm]), out[perm])


def test_dense_layout():
    flat, dense = build(natural(2, 3), natural(1, 3), 3), build(natural(2, 3), natural(1, 3), 3, layout="dense")
    dense.load_state_dict(flat.state_dict())
    x = features(natural(2, 3))
    assert_close(unpack(dense(pack(x, natural(2, 3))), natural(1, 3)), flat(x))


@pytest.mark.parametrize("irreps", ["2x0e+2x1o", "2x0o+2x1o"])
def test_derivatives(irreps):
    power = build(irreps, "2x0e+2x1o", 3, num_elements=2)

    def run(x, weight):
        return torch.func.functional_call(power, {"weight": weight}, (x, torch.tensor([1, 0])))

    check_derivatives(run, [features(irreps, 2), power.weight.detach()])


def test_third_derivative():
    power = build("0e+1o", "0e+1o", 3)

    def force(x):
        return torch.autograd.grad(power(x).pow(2).sum(), x, create_graph=True)

    check_derivatives(force, [features("0e+1o", 1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    power = build(natural(2, 2), natural(2, 2), 3).to(dtype)
    x = features(natural(2, 2), dtype=dtype)
    out = power(x)
    assert out.dtype == dtype
    exact = power.double()(x.double())  # the tables come back as they were made
    assert (out.double() - exact).abs().max() < {torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype] * exact.abs().max()
    fresh = build(natural(2, 2), natural(2, 2), 3)
    fresh.load_state_dict(power.state_dict())
    assert torch.equal(fresh(x.double()), exact)


def test_autocast_multiplies_in_float32():
    power = GauntPower(natural(2, 2), natural(2, 2), 3)
    x = features(natural(2, 2), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = power(x)
    assert torch.equal(out, power(x))


COMPILED = [
    {"backend": "aot_eager"},
    {"backend": "aot_eager", "dynamic": True},
    pytest.param({"backend": "inductor"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("how", COMPILED, ids=str)
def test_compile(how):
    power = GauntPower("2x0e+2x1o", "2x0e+2x1o", 3, num_elements=2)
    x = features("2x0e+2x1o", 4, torch.float32)
    check_compile(power, (x, torch.tensor([0, 1, 1, 0])), **how)
    check_compile(power, (x, torch.rand(4, 2)), **how)


@pytest.mark.parametrize("irreps", [natural(3, 2), BOTH])
def test_float32_on_every_device(device, irreps):
    power, x, index = build(irreps, "2x0e+2x1o", 3, num_elements=2), features(irreps), torch.tensor([0, 1, 1, 0, 1])
    exact = power(x, index)
    out = power.float().to(device)(x.float().to(device), index.to(device))
    assert out.device.type == device.type
    assert_close(out, exact)


def test_state_dict_and_repr():
    x = features(BOTH)
    assert_state_dict_roundtrip(lambda: build(BOTH, BOTH, 2), lambda m: m(x))
    power = GauntPower(BOTH, BOTH, 2)
    assert list(power.state_dict()) == ["weight"]
    assert "2x0e+2x1o+2x1e+2x2e -> 2x0e+2x1o+2x1e+2x2e, correlation=2, num_elements=1" in repr(power)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("2x0e", "3x0e", 2), {}, "irreps_out has multiplicity 3, but powers keep the 2 of irreps_in"),
        (("2x0e+2x1o", "2x1e", 3), {}, "asks for 1e, which no power of 2x0e.2x1o up to 3 reaches"),
        (("2x1o", "2x3o", 2), {}, "asks for 3o"),
        (("2x0e", "2x0e", 0), {}, "correlation is 0"),
        (("2x0e", "2x0e", 2), {"num_elements": True}, "num_elements is True"),
        (("2x0e", "2x0e", 2), {"layout": "flat"}, "layout is 'flat'"),
        (("2x1o", "2x1o", 3), {"layout": "dense"}, "layout 'dense' has rows for every degree"),
    ],
)
def test_refusals(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        GauntPower(*arguments, **options)


def test_wrong_inputs():
    power = GauntPower("2x0e+2x1o", "2x0e", 2, num_elements=2)
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\), but must be \(\.\.\., 8\)"):
        power(x[:, :7], torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"x has shape \(8,\), but must be \(\|V\|, 8\)"):
        power(x[0], torch.zeros(1).long())
    with pytest.raises(ValueError, match="node_attrs is None, but the 2 elements"):
        power(x)
    with pytest.raises(ValueError, match="node_attrs has 2 rows, but x has 3"):
        power(x, torch.zeros(2).long())
    with pytest.raises(
        ValueError, match=r"node_attrs is torch\.float32 \(3, 3\), but must be int64 \(3,\) or \(3, 2\)"
    ):
        power(x, torch.ones(3, 3))
    with pytest.raises(IndexError, match=r"is out of range \[0, 1\]"):
        power(x, torch.tensor([0, 2, 1]))
