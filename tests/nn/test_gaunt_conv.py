from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch_geometric.data import Data
from torch_geometric.nn.aggr import SumAggregation as PyGSum

from geo.nn import GauntConv, GauntTensorProduct, MeanAggregation, SumAggregation
from geo.o3 import pack, unpack
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
    random_rotations,
)

F64 = torch.float64
TRUE, BOTH = "2x0e+2x1o+2x2e", "2x0e+2x0o+2x1o+2x1e"


def build(*args, **options) -> GauntConv:
    return GauntConv(*args, **{"radius": 2.5, "hidden_channels": 8, **options}).double()


def sample(num: int, seed: int = 0, irreps: str = TRUE, dtype=F64) -> Data:
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(num), torch.arange(num)).t()
    edge_index = pairs[:, torch.rand(pairs.size(1)) < 0.7]
    return Data(
        x=torch.randn(num, o3.Irreps(irreps).dim, dtype=dtype),
        pos=torch.randn(num, 3, dtype=dtype),
        edge_index=edge_index,
        edge_attr=torch.randn(edge_index.size(1), 3, dtype=dtype),
        edge_shift=torch.randint(-1, 2, (edge_index.size(1), 3)).to(dtype),
    )


def run(conv: GauntConv, d: Data) -> torch.Tensor:
    return conv(d.x, d.pos, d.edge_index, d.edge_attr if conv.edge_dim else None, d.edge_shift)


CASES = {
    "uvu": (TRUE, {}),
    "uvu bracket": (TRUE, {"antisymmetric": "bracket"}),
    "both parities": (BOTH, {"antisymmetric": "bracket", "lmax": 3}),
    "uvw": (BOTH, {"antisymmetric": "bracket", "mode": "uvw", "irreps_out": "3x0e+3x1e+3x0o", "aggr": "mean"}),
    "edge_attr": (TRUE, {"edge_dim": 3, "lmax": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_edges(case):
    """Harmonics of e3nn, and for each edge a product that has e3nn's paths."""
    irreps, options = CASES[case]
    conv, d = build(irreps, **options), sample(5, irreps=irreps)
    out = torch.zeros(5, conv.tp.irreps_out.dim, dtype=F64)
    terms = GauntTensorProduct(
        irreps, conv.tp.irreps_in2, conv.tp.irreps_out, mode="uvu", antisymmetric=conv.antisymmetric, weights="per_l"
    ).double()
    delta = conv.softening * conv.radius
    for e, (j, i) in enumerate(d.edge_index.t().tolist()):
        r = d.pos[j] + d.edge_shift[e] - d.pos[i]
        distance = (r.square().sum() + delta**2).sqrt()
        if distance >= conv.radius:
            continue
        y = o3.spherical_harmonics(conv.tp.irreps_in2, r / distance, False, "component")
        basis = torch.cos(distance * (torch.arange(8, dtype=F64) + 0.5) * torch.pi / conv.radius) * 2**0.5
        if conv.edge_dim:
            basis = torch.cat((basis, d.edge_attr[e]))
        u = distance / conv.radius
        window = 1 - 28 * u**6 + 48 * u**7 - 21 * u**8
        radial = conv.lin2(1.6765 * torch.nn.functional.silu(conv.lin1(basis))) * window
        radial = radial.view(conv.tp.num_terms, conv.lmax + 1, 2)
        with torch.no_grad():  # the radial weights as those of the second input, and ones for the others
            parts = []
            for shapes, w in zip(terms._shapes, radial, strict=True):
                parts += [torch.ones(shapes[0]).flatten(), w.flatten(), torch.ones(shapes[2]).flatten()]
            terms.weight.copy_(torch.cat([p.double() for p in parts]))
        out[i] += terms(d.x[j], y)
    if options.get("aggr") == "mean":
        out = out / d.edge_index[1].bincount(minlength=5).clamp(min=1)[:, None]
    if conv.mode == "uvw":
        dense = pack(out, conv.tp.irreps_out)
        degrees = [l for parity in (1, -1) for l in range(conv._out.lmax(parity) + 1)]
        rows = torch.repeat_interleave(torch.tensor([2 * l + 1 for l in degrees]))
        out = unpack(torch.einsum("nkc,kcd->nkd", dense, conv.weight[rows]) / 2**0.5, conv.irreps_out)
    assert_close(run(conv, d), out)


@pytest.mark.parametrize("case", CASES)
def test_laws(case):
    irreps, options = CASES[case]
    conv = build(irreps, **options)
    assert_permutation_equivariant(lambda d: run(conv, d), sample(6, irreps=irreps))
    assert_alone_equals_batched(lambda d: run(conv, d), [sample(n, n, irreps) for n in (0, 3, 1, 0, 5)])
    d = sample(5, irreps=irreps)
    assert_state_dict_roundtrip(lambda: build(irreps, **options), lambda m: run(m, d))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equivariant_to_o3_and_translations(case, representation):
    irreps, options = CASES[case]
    conv, d = build(irreps, **options), sample(5, irreps=irreps)
    expected = run(conv, d)
    assert expected.abs().max() > 0.1
    for turn in random_rotations(4):
        for parity in (1, -1):
            moved = d.clone()
            moved.x = d.x @ representation(conv.irreps_in, parity * turn).t()
            moved.pos = parity * d.pos @ turn.t() + torch.randn(3, dtype=F64)
            moved.edge_shift = parity * d.edge_shift @ turn.t()
            wanted = expected @ representation(conv.irreps_out, parity * turn).t()
            assert (run(conv, moved) - wanted).abs().max() < 1e-11 * expected.abs().max()
            moved.pos = d.pos
            assert (run(conv, moved) - wanted).abs().max() > 1e-3


def test_without_the_bracket_no_pseudo_features():
    with pytest.raises(ValueError, match=r"asks for 0o, which no product .* reaches; antisymmetric='bracket' adds"):
        build(TRUE, "2x0e+2x0o")
    assert all(ir.p == (-1) ** ir.l for _, ir in build(TRUE).irreps_out)
    assert {str(ir) for _, ir in build(TRUE, antisymmetric="bracket").irreps_out} == {"0e", "1o", "2e", "1e", "2o"}


def test_nodes_without_edges():
    conv = build(TRUE)
    d = sample(4)
    out = conv(d.x, d.pos, torch.tensor([[0, 1], [1, 1]]))
    assert out[[0, 2, 3]].eq(0).all()
    assert out[1].abs().min() > 0
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert conv(d.x, d.pos, none).eq(0).all()
    assert conv(d.x[:0], d.pos[:0], none).shape == (0, 18)
    leaf = d.x.clone().requires_grad_()
    conv(leaf, d.pos, none).sum().backward()
    assert leaf.grad.eq(0).all()


def test_an_edge_of_length_zero_has_degree_zero_only():
    conv = build("2x0e", "2x0e+2x1o+2x2e")
    pos = torch.zeros(2, 3, dtype=F64)
    out = conv(torch.ones(2, 2, dtype=F64), pos, torch.tensor([[0], [1]]))
    assert out[1, :2].abs().min() > 0
    assert out[1, 2:].abs().max() < 1e-14


def test_smooth_where_edges_have_no_length_and_at_the_radius():
    conv = build("1x0e+1x1o", "1x0e+1x1o+1x1e", lmax=2, antisymmetric="bracket")
    edge_index = torch.tensor([[0, 1, 0, 2], [1, 0, 0, 1]])  # a pair in one place, a loop, and a far one
    pos = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1.1, 0.4, 0]], dtype=F64)
    check_derivatives(lambda x, p: conv(x, p, edge_index), [torch.randn(3, 4), pos])
    end = conv.radius * (1 - conv.softening**2) ** 0.5
    values = [
        conv(torch.ones(2, 4, dtype=F64), torch.tensor([[0.0, 0, 0], [0, end + step, 0]], dtype=F64), edge_index[:, :1])
        for step in (-1e-3, 0, 1e-3)
    ]
    assert values[1].abs().max() < 1e-20
    assert values[2].eq(0).all()
    assert 0 < values[0].abs().max() < 1e-7  # vanishes with the third power


def test_derivatives_of_weights_and_third_order():
    conv = build("1x0e+1x1o", "1x0e+1x1o", mode="uvw", lmax=1, num_basis=2, hidden_channels=2)
    d = sample(3, irreps="1x0e+1x1o")
    names = [name for name, _ in conv.named_parameters()]

    def call(*weights):
        return torch.func.functional_call(conv, dict(zip(names, weights, strict=True)), (d.x, d.pos, d.edge_index))

    check_derivatives(call, [p.detach() for p in conv.parameters()])

    def forces(pos):
        energy = conv(d.x, pos, d.edge_index)[:, 0].pow(2).sum()
        return torch.autograd.grad(energy, pos, create_graph=True)

    check_derivatives(forces, [d.pos])


def test_dense_layout():
    options = {"antisymmetric": "bracket", "irreps_out": "2x0e+2x1o+2x1e+2x0o", "lmax": 1}
    flat, dense = build(BOTH, **options), build(BOTH, layout="dense", **options)
    dense.load_state_dict(flat.state_dict())
    d = sample(4, irreps=BOTH)
    out = dense(pack(d.x, BOTH), d.pos, d.edge_index)
    assert_close(unpack(out, flat.irreps_out), flat(d.x, d.pos, d.edge_index))


def test_any_aggregation_module():
    conv, d = build(TRUE), sample(5)
    for aggr, factor in ((SumAggregation(), 1), (PyGSum(), 1), ("add", 1), (MeanAggregation(), 0.5)):
        other = build(TRUE, aggr=aggr)
        other.load_state_dict(conv.state_dict())
        pair = torch.tensor([[0, 1], [2, 2]])
        assert_close(other(d.x, d.pos, pair), conv(d.x, d.pos, pair) * factor)


@pytest.mark.parametrize("mode", ["uvu", "uvw"])
def test_autocast_and_half_precision(mode):
    conv = GauntConv(TRUE, antisymmetric="bracket", radius=2.5, mode=mode)
    d = sample(6, dtype=torch.float32)
    exact = conv(d.x, d.pos, d.edge_index)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(d.x, d.pos, d.edge_index)
    assert (out - exact).abs().max() < 3e-2 * exact.abs().max()
    for half in (conv, conv.bfloat16()):
        out = half(d.x.bfloat16(), d.pos, d.edge_index)
        assert out.dtype == torch.bfloat16
        assert (out - exact).abs().max() < 3e-2 * exact.abs().max()


COMPILED = [
    {"backend": "aot_eager"},
    {"backend": "aot_eager", "dynamic": True},
    pytest.param({"backend": "inductor"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("how", COMPILED, ids=str)
@pytest.mark.parametrize("mode", ["uvu", "uvw"])
def test_compile(mode, how):
    conv = GauntConv("2x0e+2x1o", mode=mode, radius=2.5, antisymmetric="bracket")
    d = sample(4, irreps="2x0e+2x1o", dtype=torch.float32)
    check_compile(lambda x, pos, shift: conv(x, pos, d.edge_index, None, shift), (d.x, d.pos, d.edge_shift), **how)


@pytest.mark.parametrize("case", CASES)
def test_float32_on_every_device(device, case):
    irreps, options = CASES[case]
    conv, d = build(irreps, **options), sample(6, irreps=irreps)
    exact = run(conv, d)
    out = run(
        conv.float().to(device),
        sample(6, irreps=irreps).apply(lambda t: (t.float() if t.is_floating_point() else t).to(device)),
    )
    assert out.device.type == device.type
    assert_close(out, exact)


@pytest.mark.parametrize("mode", ["uvu", "uvw"])
def test_unit_variance(mode):
    """One neighbour at half the radius, in any direction: messages have the size of the features."""
    values = []
    for seed in range(40):
        torch.manual_seed(seed)
        conv = GauntConv("16x0e+16x1o", "16x0e+16x1o", mode=mode, radius=2.0, aggr="mean")
        pos = torch.nn.functional.normalize(torch.randn(2, 50, 3), dim=-1) / 2
        pos[1] = -pos[0]
        edge_index = torch.stack((torch.arange(50), torch.arange(50) + 50))
        out = conv(torch.randn(100, 64), pos.flatten(0, 1), edge_index)[50:]
        window = 1 - 28 / 2**6 + 48 / 2**7 - 21 / 2**8
        values.append(out.detach().square().mean() / window**2)
    assert 0.7 < float(torch.stack(values).mean()) < 1.4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aggr": "max"}, "aggr is 'max', but must be 'sum', 'mean' or an aggregation that commutes"),
        ({"mode": "uuu"}, "mode is 'uuu', but must be one of 'uvu', 'uvw'"),
        ({"radius": 0.0}, "radius is 0"),
        ({"softening": -1.0}, "softening is -1"),
        ({"lmax": -1}, "lmax is -1"),
        ({"edge_dim": True}, "edge_dim is True"),
        ({"antisymmetric": True}, "antisymmetric is True"),
        ({"irreps_out": "3x0e"}, "irreps_out has multiplicity 3, but mode 'uvu' makes 2"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        build(TRUE, **options)


def test_wrong_inputs():
    conv, d = build(TRUE, edge_dim=3), sample(3)
    with pytest.raises(ValueError, match=r"x has shape \(3, 17\), but must be \(\.\.\., 18\)"):
        conv(d.x[:, 1:], d.pos, d.edge_index, d.edge_attr)
    with pytest.raises(ValueError, match=r"x has shape \(18,\), but must be \(\|V\|, 18\)"):
        conv(d.x[0], d.pos, d.edge_index, d.edge_attr)
    with pytest.raises(ValueError, match=r"pos has shape \(2, 3\), but must be \(3, 3\)"):
        conv(d.x, d.pos[:2], d.edge_index, d.edge_attr)
    with pytest.raises(ValueError, match=r"edge_index is torch\.int32"):
        conv(d.x, d.pos, d.edge_index.int(), d.edge_attr)
    with pytest.raises(ValueError, match="edge_attr is None, but edge_dim is 3"):
        conv(d.x, d.pos, d.edge_index)
    with pytest.raises(ValueError, match=r"edge_attr has shape"):
        conv(d.x, d.pos, d.edge_index, d.edge_attr[:, :2])
    with pytest.raises(ValueError, match=r"edge_shift has shape"):
        conv(d.x, d.pos, d.edge_index, d.edge_attr, d.edge_shift[:1])
    for row in (0, 1):
        for bad in (-1, 3):
            edge_index = d.edge_index.clone()
            edge_index[row, 1] = bad
            with pytest.raises(IndexError, match=f"{bad} is out of range"):
                conv(d.x, d.pos, edge_index, d.edge_attr)


def test_repr():
    text = repr(build(TRUE, "2x0e+2x1e", antisymmetric="bracket"))
    assert text.startswith("GauntConv(2x0e+2x1o+2x2e -> 2x0e+2x1e, lmax=2, radius=2.5, mode='uvu'")
