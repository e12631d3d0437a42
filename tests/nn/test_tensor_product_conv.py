from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from e3nn import o3
from torch import Tensor
from torch_geometric.data import Data

from geo.nn import TensorProductConv
from geo.ops import SegmentPlan
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
NATURAL, SH = "4x0e+4x1o+4x2e", "0e+1o+2e"
BOTH = "3x0e+2x0o+5x1o+1x1e+4x2e"
PATHS = [  # several into one block, one without weight, path weights, an empty block
    (2, 1, 0, "uvu", True),
    (2, 0, 1, "uvu", True, 2.0),
    (2, 2, 1, "uvu", False, 0.3),
    (2, 2, 1, "uvu", True),
    (0, 1, 2, "uvu", True),
    (3, 0, 3, "uvu", False),
    (5, 0, 4, "uvu", True),
]
CASES = {
    "uvu": (NATURAL, SH, "0e+1o+2e", "uvu", {}),
    "all parities": (BOTH, "0e+1o+2e+3o", "0e+0o+1e+1o+2e+2o+3e+3o", "uvu", {}),
    "pseudo harmonics": (BOTH, "1e+0o+1o", "7x0e+9x1o+1x1e", "uvu", {}),
    "instructions": (BOTH + "+0x1o", SH, "5x1e+5x1o+3x1o+1x1e+0x1o", PATHS, {}),
    "norm, path": (NATURAL, SH, "0e+1o+2e", "uvu", {"irrep_normalization": "norm", "path_normalization": "path"}),
    "none": (BOTH, SH, "5x1e+5x1o+3x1o+1x1e", PATHS[:6], {"irrep_normalization": "none", "path_normalization": "none"}),
    "high degrees": ("2x3o+1x5o", "2e+4e", "3o+4o+5o+7o", "uvu", {}),
}


def build(case: str, **options) -> TensorProductConv:
    irreps_in, irreps_sh, irreps_out, instructions, more = CASES[case]
    return TensorProductConv(irreps_in, irreps_sh, irreps_out, instructions, **more, **options).double()


def sample(conv: TensorProductConv, num: int, seed: int = 0, dtype=F64) -> Data:
    torch.manual_seed(seed)
    pairs = torch.cartesian_prod(torch.arange(num), torch.arange(num)).t()
    edge_index = pairs[:, torch.rand(pairs.size(1)) < 0.7]
    num_edges = edge_index.size(1)
    return Data(
        x=torch.randn(num, conv.irreps_in.dim, dtype=dtype),
        edge_index=edge_index,
        edge_sh=torch.randn(num_edges, conv.irreps_sh.dim, dtype=dtype),
        edge_weight=torch.randn(num_edges, conv.weight_numel, dtype=dtype),
        num_nodes=num,
    )


def run(conv: TensorProductConv, d: Data) -> Tensor:
    return conv(d.x, d.edge_index, d.edge_sh, None if conv.shared_weights else d.edge_weight)


def theirs(conv: TensorProductConv, **options) -> o3.TensorProduct:
    """e3nn's own module on the same irreps and instructions; the default dtype must be float64."""
    return o3.TensorProduct(
        conv.irreps_in, conv.irreps_sh, conv.irreps_out, conv.instructions, internal_weights=False, **options
    )


@pytest.mark.parametrize("case", CASES)
def test_equals_e3nn(double, case):
    conv = build(case)
    more = CASES[case][4]
    tp = theirs(conv, shared_weights=False, **more)
    assert tp.weight_numel == conv.weight_numel
    d = sample(conv, 7)
    inputs = [t.requires_grad_() for t in (d.x, d.edge_sh, d.edge_weight)]
    source, target = d.edge_index
    expected = torch.zeros(7, conv.irreps_out.dim).index_add(0, target, tp(d.x[source], d.edge_sh, d.edge_weight))
    out = run(conv, d)
    assert (out - expected).abs().max() < 1e-11 * expected.abs().max()
    g = torch.randn_like(out)
    for ours, wanted in zip(torch.autograd.grad(out, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        assert (ours - wanted).abs().max() < 1e-11 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_shared_weights_equal_e3nn(double, case):
    conv = build(case, shared_weights=True)
    tp = theirs(conv, shared_weights=True, **CASES[case][4])
    d = sample(conv, 6)
    source, target = d.edge_index
    assert conv.weight.shape == (conv.weight_numel,)
    expected = torch.zeros(6, conv.irreps_out.dim).index_add(0, target, tp(d.x[source], d.edge_sh, conv.weight))
    out = run(conv, d)
    assert (out - expected).abs().max() < 1e-11 * expected.abs().max()
    g = torch.randn_like(out)
    ours, wanted = (torch.autograd.grad(t, conv.weight, g)[0] for t in (out, expected))
    assert (ours - wanted).abs().max() < 1e-11 * wanted.abs().max()


def test_uvu_is_the_rule_of_mace():
    """All paths to a wanted irrep, blocks sorted by Irreps.sort, and paths in their order."""
    irreps_in, irreps_sh, wanted = o3.Irreps(BOTH), o3.Irreps("0e+1o+2e"), o3.Irreps("0e+1o+1e+2e")
    blocks, paths = [], []
    for i, (mul, ir) in enumerate(irreps_in):
        for j, (_, edge) in enumerate(irreps_sh):
            for out in ir * edge:
                if out in wanted:
                    paths.append((i, j, len(blocks), "uvu", True))
                    blocks.append((mul, out))
    blocks, order, _ = o3.Irreps(blocks).sort()
    paths = sorted([(i, j, order[k], *rest) for i, j, k, *rest in paths], key=lambda path: path[2])
    conv = TensorProductConv(irreps_in, irreps_sh, wanted)
    assert conv.irreps_out == blocks
    assert [path[:5] for path in conv.instructions] == paths
    assert conv.weight_numel == sum(mul for mul, _ in blocks)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_laws(case, shared):
    conv = build(case, shared_weights=shared)
    assert_permutation_equivariant(lambda d: run(conv, d), sample(conv, 6))
    assert_alone_equals_batched(lambda d: run(conv, d), [sample(conv, n, n) for n in (0, 3, 1, 0, 5)])
    d = sample(conv, 5)
    if shared:
        assert_state_dict_roundtrip(lambda: build(case, shared_weights=True), lambda m: run(m, d))
    else:
        assert not conv.state_dict()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equivariant_to_o3(case, representation):
    conv = build(case)
    d = sample(conv, 5)
    expected = run(conv, d)
    assert expected.abs().max() > 0.1
    for turn in random_rotations(3):
        for g in (turn, -turn):
            moved = d.clone()
            moved.x = d.x @ representation(conv.irreps_in, g).t()
            assert (run(conv, moved) - expected).abs().max() > 1e-3
            moved.edge_sh = d.edge_sh @ representation(conv.irreps_sh, g).t()
            wanted = expected @ representation(conv.irreps_out, g).t()
            assert (run(conv, moved) - wanted).abs().max() < 1e-11 * expected.abs().max()


def test_equivariant_with_spherical_harmonics(representation):
    """Turn the points: harmonics turn with them."""
    conv = build("all parities")
    d = sample(conv, 5)
    vectors = torch.randn(d.edge_index.size(1), 3, dtype=F64)
    turn = -random_rotations(1)[0]
    d.edge_sh = o3.spherical_harmonics(conv.irreps_sh, vectors, True, "component")
    out = run(conv, d)
    d.edge_sh = o3.spherical_harmonics(conv.irreps_sh, vectors @ turn.t(), True, "component")
    d.x = d.x @ representation(conv.irreps_in, turn).t()
    assert (run(conv, d) - out @ representation(conv.irreps_out, turn).t()).abs().max() < 1e-11 * out.abs().max()


def test_nodes_without_edges():
    conv = build("uvu")
    d = sample(conv, 4)
    pair = torch.tensor([[0, 1], [1, 1]])
    out = conv(d.x, pair, d.edge_sh[:2], d.edge_weight[:2])
    assert out[[0, 2, 3]].eq(0).all()
    assert out[1].abs().min() > 0
    none = torch.zeros(2, 0, dtype=torch.int64)
    leaf = d.x.clone().requires_grad_()
    out = conv(leaf, none, d.edge_sh[:0], d.edge_weight[:0])
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), leaf)[0].eq(0).all()
    assert conv(d.x[:0], none, d.edge_sh[:0], d.edge_weight[:0]).shape == (0, conv.irreps_out.dim)


def test_between_two_sets_of_nodes():
    conv = build("uvu")
    d = sample(conv, 5)
    edge_index = torch.stack([d.edge_index[0], d.edge_index[1] % 3])
    square = conv(d.x, edge_index, d.edge_sh, d.edge_weight)
    out = conv(d.x, edge_index, d.edge_sh, d.edge_weight, size=(5, 3))
    assert out.shape == (3, conv.irreps_out.dim)
    assert torch.equal(out, square[:3])
    plan = SegmentPlan.from_edge_index(edge_index, (5, 3))
    assert torch.equal(conv(d.x, edge_index, d.edge_sh, d.edge_weight, plan=plan), out)


@pytest.mark.parametrize("shared", [False, True])
def test_derivatives(shared):
    conv = TensorProductConv("2x0e+1x1o", "0e+1o", "0e+1o+1e", shared_weights=shared).double()
    d = sample(conv, 3)
    names = [name for name, _ in conv.named_parameters()]

    def call(x, sh, *weights):
        args = (x, d.edge_index, sh, *([] if shared else weights))
        return torch.func.functional_call(conv, dict(zip(names, weights, strict=True)) if shared else {}, args)

    weights = [p.detach() for p in conv.parameters()] if shared else [d.edge_weight]
    check_derivatives(call, [d.x, d.edge_sh, *weights])

    def forces(x, sh):
        energy = call(x, sh, *weights).pow(2).sum()
        return torch.autograd.grad(energy, (x, sh), create_graph=True)

    check_derivatives(forces, [d.x, d.edge_sh])


def test_coefficients_stay_in_float64(double):
    """A layer that was cast to bfloat16 and back computes what it did."""
    conv = build("all parities")
    d = sample(conv, 5)
    expected = run(conv, d)
    assert torch.equal(run(conv.bfloat16(), d), expected)
    assert torch.equal(run(conv.half().double(), d), expected)


def test_autocast_and_half_precision():
    conv = build("all parities", shared_weights=True).float()
    d = sample(conv, 6, dtype=torch.float32)
    exact = run(conv, d)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(conv, d)
    assert (out - exact).abs().max() < 3e-2 * exact.abs().max()
    out = conv.bfloat16()(d.x.bfloat16(), d.edge_index, d.edge_sh.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 3e-2 * exact.abs().max()


def test_autocast_with_a_radial_network():
    conv = build("uvu").float()
    d = sample(conv, 6, dtype=torch.float32)
    radial = torch.nn.Linear(4, conv.weight_numel)
    basis = torch.randn(d.edge_index.size(1), 4)
    exact = conv(d.x, d.edge_index, d.edge_sh, radial(basis))
    with torch.autocast("cpu", torch.bfloat16):
        weight = radial(basis)
        assert weight.dtype == torch.bfloat16
        out = conv(d.x, d.edge_index, d.edge_sh, weight)
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() < 3e-2 * exact.abs().max()


COMPILED = [{}, {"dynamic": True}, pytest.param({"backend": "inductor"}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("how", COMPILED, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_compile(shared, how):
    conv = build("instructions", shared_weights=shared).float()
    d = sample(conv, 4, dtype=torch.float32)
    inputs = (d.x, d.edge_sh) if shared else (d.x, d.edge_sh, d.edge_weight)
    check_compile(lambda x, sh, *weight: conv(x, d.edge_index, sh, *weight), inputs, **how)


@pytest.mark.parametrize("case", CASES)
def test_float32_on_every_device(device, case):
    conv = build(case)
    d = sample(conv, 6)
    exact = run(conv, d)
    moved = d.clone().apply(lambda t: (t.float() if t.is_floating_point() else t).to(device))
    out = run(conv.float().to(device), moved)
    assert out.device.type == device.type
    assert_close(out, exact)


def test_unit_variance():
    """Independent inputs of unit variance give components of unit variance, from one edge."""
    conv = TensorProductConv("16x0e+16x1o+16x2e", "0e+1o+2e", "0e+1o+2e+1e")
    num = 400
    edge_index = torch.arange(num).expand(2, num)
    x, sh = torch.randn(num, conv.irreps_in.dim), torch.randn(num, 9)
    out = conv(x, edge_index, sh, torch.randn(num, conv.weight_numel))
    assert 0.9 < float(out.square().mean()) < 1.1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((NATURAL, "2x0e", "0e"), "irreps_sh has 2x0e, but each irrep of the edges must have multiplicity 1"),
        ((NATURAL, SH, "0e", "uvw"), "instructions is 'uvw', but must be 'uvu' or a list"),
        ((NATURAL, SH, "0o"), "no path leads from irreps_in = 4x0e.* to 1x0o"),
        ((NATURAL, SH, "4x0e", [(0, 0, 0, "uvw", True)]), r"instruction 0, .* has mode 'uvw', but only 'uvu' is there"),
        ((NATURAL, SH, "4x0e", [(0, 0, 0)]), r"instruction 0, \(0, 0, 0\), must be"),
        ((NATURAL, SH, "4x0e", [(0, 0, 1, "uvu", True)]), "names block 1 of irreps_out = 4x0e, which has 1"),
        ((NATURAL, SH, "4x0e", [(-1, 0, 0, "uvu", True)]), "names block -1 of irreps_in"),
        ((NATURAL, SH, "3x0e", [(0, 0, 0, "uvu", True)]), "leads from 4x0e to 3x0e: the multiplicities must be equal"),
        ((NATURAL, SH, "4x0o", [(0, 0, 0, "uvu", True)]), "leads from 0e and 0e to 0o, which their product does not"),
        ((NATURAL, SH, "4x2o", [(0, 1, 0, "uvu", True)]), "leads from 0e and 1o to 2o, which"),
        ((NATURAL, SH, "4x0e", [(0, 0, 0, "uvu", True, -1.0)]), "has path weight -1.0, but its square root is taken"),
    ],
)
def test_refusals(args, words):
    with pytest.raises(ValueError, match=words):
        TensorProductConv(*args)


@pytest.mark.parametrize("name", ["irrep_normalization", "path_normalization"])
def test_unknown_normalization(name):
    with pytest.raises(ValueError, match=f"{name} is 'all', but must be one of"):
        TensorProductConv(NATURAL, SH, "0e", **{name: "all"})


def test_what_is_no_irreps_or_no_block():
    with pytest.raises(ValueError, match="irreps_sh is '8x0q', which e3nn does not read"):
        TensorProductConv("4x0e", "8x0q", "4x0e")
    with pytest.raises(ValueError, match="names block 'a' of irreps_in, but blocks are counted by integers"):
        TensorProductConv("4x0e", "0e", "4x0e", [("a", 0, 0, "uvu", True)])


def test_wrong_inputs():
    conv, shared = build("uvu"), build("uvu", shared_weights=True)
    d = sample(conv, 3)
    with pytest.raises(ValueError, match=r"x has shape \(3, 35\), but must be \(\|V\|, 36\)"):
        conv(d.x[:, 1:], d.edge_index, d.edge_sh, d.edge_weight)
    with pytest.raises(ValueError, match=r"edge_index is torch\.int32"):
        conv(d.x, d.edge_index.int(), d.edge_sh, d.edge_weight)
    with pytest.raises(ValueError, match=r"edge_sh has shape \(\d, 8\), but must be \(\d, 9\)"):
        conv(d.x, d.edge_index, d.edge_sh[:, 1:], d.edge_weight)
    with pytest.raises(ValueError, match=r"weight has shape \(\d, \d+\), but must be"):
        conv(d.x, d.edge_index, d.edge_sh, d.edge_weight[:, 1:])
    with pytest.raises(ValueError, match="weight is None, but must be"):
        conv(d.x, d.edge_index, d.edge_sh)
    with pytest.raises(ValueError, match="weight is given, but the layer has shared weights"):
        shared(d.x, d.edge_index, d.edge_sh, d.edge_weight)
    with pytest.raises(ValueError, match=r"size is \(4, 3\), but x has 3 rows"):
        conv(d.x, d.edge_index, d.edge_sh, d.edge_weight, size=(4, 3))
    plan = SegmentPlan.from_edge_index(d.edge_index, 3)
    with pytest.raises(ValueError, match=r"size is \(3, 7\), but plan is of 3 receivers"):
        conv(d.x, d.edge_index, d.edge_sh, d.edge_weight, size=(3, 7), plan=plan)
    for row in (0, 1):
        for bad in (-1, 3):
            edge_index = d.edge_index.clone()
            edge_index[row, 1] = bad
            with pytest.raises(IndexError, match=f"{bad} is out of range"):
                conv(d.x, edge_index, d.edge_sh, d.edge_weight)


def test_without_trained_paths_no_weight_is_asked_for():
    conv = TensorProductConv("4x1o", "1o", "4x0e", [(0, 0, 0, "uvu", False)]).double()
    d = sample(conv, 3)
    out = conv(d.x, d.edge_index, d.edge_sh)
    message = (d.x.view(3, 4, 3)[d.edge_index[0]] * d.edge_sh[:, None]).sum(-1) / math.sqrt(3)
    assert_close(out, torch.zeros(3, 4, dtype=F64).index_add(0, d.edge_index[1], message))


def test_importing_does_not_import_e3nn():
    code = "import sys, geo.nn; geo.nn.TensorProductConv; sys.exit('e3nn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_repr():
    text = repr(build("uvu", shared_weights=True))
    assert text.startswith("TensorProductConv(4x0e+4x1o+4x2e x 1x0e+1x1o+1x2e -> 4x0e")
    assert text.endswith("paths, 44 weights, shared)")
