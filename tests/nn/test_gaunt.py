from __future__ import annotations

import itertools
import math

import pytest
import torch
from e3nn import o3

from geo.nn import GauntTensorProduct, as_e3nn
from geo.o3 import gaunt_coefficient, pack, unpack
from geo.testing import assert_close, assert_state_dict_roundtrip, check_compile, check_derivatives, random_rotations

F64 = torch.float64
BOTH1, BOTH2 = "2x0e+2x1o+2x1e+2x2e", "2x1o+2x0e+2x2o"


def natural(lmax: int, mul: int = 1) -> str:
    return "+".join(f"{mul}x{l}{'eo'[l % 2]}" for l in range(lmax + 1))


def features(irreps, rows=5, dtype=F64) -> torch.Tensor:
    return torch.randn(rows, o3.Irreps(irreps).dim, dtype=dtype)


def build(*args, **options) -> GauntTensorProduct:
    return GauntTensorProduct(*args, **options).double()


CASES = {
    "uuu": (BOTH1, BOTH2, {"antisymmetric": "bracket"}),
    "uuu even": (BOTH1, BOTH2, {"normalize": "gaunt", "lmax_out": 3}),
    "uuu weights": (BOTH1, BOTH2, {"antisymmetric": "bracket", "weights": "per_l", "rank": 2, "lmax_out": 2}),
    "uvu": (natural(2, 3), "0e+1o+2o", {"mode": "uvu", "antisymmetric": "bracket", "normalize": "gaunt"}),
    "uvu weights": (natural(2, 3), natural(3), {"mode": "uvu", "weights": "per_l", "lmax_out": 2}),
    "full": ("2x0e+2x1o", "3x1o+3x2e", {"mode": "full", "antisymmetric": "bracket"}),
    "full weights": ("2x0e+2x1o", "3x1o+3x2e", {"mode": "full", "weights": "per_l", "rank": 2}),
    "uvw": ("3x0e+3x1o", "2x1o+2x2e", {"mode": "uvw", "rank": 2, "antisymmetric": "bracket", "lmax_out": 2}),
    "uvw out": ("3x0e+3x1o", "2x1o", {"mode": "uvw", "irreps_out": "5x1e+5x0e", "antisymmetric": "bracket"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_e3nn_written_out(case):
    one, two, options = CASES[case]
    tp = build(one, two, **options)
    theirs = as_e3nn(tp, F64)
    assert theirs.irreps_out == tp.irreps_out
    x, y = features(one), features(two)
    out = tp(x, y)
    assert (out - theirs(x, y)).abs().max() < 1e-11 * max(1, out.abs().max())
    assert len(tp.paths) == len(theirs.instructions)
    for method in ("sparse", "grid", "separable"):
        tp.method = method
        assert (tp(x, y) - out).abs().max() < 1e-11 * max(1, out.abs().max())


@pytest.mark.parametrize("normalization", ["component", "norm"])
def test_is_the_sum_of_paths_of_the_full_tensor_product(double, normalization):
    """Gaunt = sum over even paths of s FTP, with s from the middle entry of wigner_3j."""
    one, two = "0e+1o+2e+1e", "0e+1o+2o"
    tp = build(one, two, normalize="gaunt")
    full = o3.FullTensorProduct(one, two, irrep_normalization=normalization)
    x, y = features(one), features(two)
    paths, out = full(x, y), tp(x, y)
    slices = full.irreps_out.slices()
    for (_, ir), where in zip(tp.irreps_out, tp.irreps_out.slices(), strict=True):
        expected = torch.zeros(5, ir.dim)
        for path in full.instructions:
            l1, l2 = full.irreps_in1[path.i_in1].ir.l, full.irreps_in2[path.i_in2].ir.l
            if full.irreps_out[path.i_out].ir != ir or (l1 + l2 + ir.l) % 2:
                continue
            g = gaunt_coefficient(l1, l2, ir.l)
            s = g / math.sqrt(2 * ir.l + 1 if normalization == "component" else (2 * l1 + 1) * (2 * l2 + 1))
            expected += s * paths[:, slices[path.i_out]]
        assert (out[:, where] - expected).abs().max() < 1e-11


def test_is_the_pointwise_product_and_the_bracket(double):
    """Values at random points of functions, against values of the products."""
    tp = build(natural(2), natural(3), normalize="gaunt", antisymmetric="bracket")
    x, y = features(tp.irreps_in1), features(tp.irreps_in2)
    u = torch.nn.functional.normalize(torch.randn(7, 3), dim=1).requires_grad_()

    def values(c, u):
        lmax = math.isqrt(c.size(-1)) - 1
        return o3.spherical_harmonics(list(range(lmax + 1)), u, True, "component") @ c

    out = pack(tp(x, y), tp.irreps_out)[..., 0]
    for n in range(5):
        f, h = values(x[n], u), values(y[n], u)
        assert_close(values(out[n, :36], u), f * h)
        (df,), (dh,) = (torch.autograd.grad(v.sum(), u) for v in (f, h))
        bracket = (u * torch.linalg.cross(df, dh)).sum(1)
        assert_close(values(out[n, 36:], u), bracket)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(F64, 1e-11), (torch.float32, 1e-5)], ids=["float64", "float32"])
@torch.no_grad()
def test_equivariant_to_rotations_and_inversion(case, dtype, bound, representation):
    one, two, options = CASES[case]
    tp = build(one, two, **options).to(dtype)
    x, y = features(one), features(two)
    expected = tp(x.to(dtype), y.to(dtype)).double()
    scale = expected.abs().max()
    inversion = -torch.eye(3, dtype=F64)[None]
    for g in torch.cat([random_rotations(20), random_rotations(20, reflect=True), inversion]):
        d1, d2, d3 = (representation(irreps, g) for irreps in (tp.irreps_in1, tp.irreps_in2, tp.irreps_out))
        out = tp((x @ d1.t()).to(dtype), (y @ d2.t()).to(dtype)).double()
        assert (out - expected @ d3.t()).abs().max() < bound * scale
        broken = tp((x @ d1.t()).to(dtype), y.to(dtype)).double()  # one input left where it is
        assert (broken - expected @ d3.t()).abs().max() > 0.1 * scale


def test_the_bracket_of_vectors_is_the_cross_product():
    tp = build("1o", "1o", "1e", antisymmetric="bracket", normalize="gaunt")
    x, y = features("1o"), features("1o")
    assert_close(tp(x, y), torch.linalg.cross(x, y) * math.sqrt(3))
    unit = build("1o", "1o", "1e", antisymmetric="bracket")
    assert_close(unit(x, y), torch.linalg.cross(x, y) / math.sqrt(2))


def bracket_of(f: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """{f, h} in the dense layout without loss; the pseudo-signal is handed back as a true one."""
    lmax = [math.isqrt(t.size(-2)) - 1 for t in (f, h)]
    tp = build(
        natural(lmax[0]),
        natural(lmax[1]),
        antisymmetric="bracket",
        normalize="gaunt",
        layout="dense",
        lmax_out=sum(lmax),
    )
    return tp(f, h)[..., (sum(lmax) + 1) ** 2 :, :]


def product_of(f: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    lmax = [math.isqrt(t.size(-2)) - 1 for t in (f, h)]
    return build(natural(lmax[0]), natural(lmax[1]), normalize="gaunt", layout="dense")(f, h)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rows of zeros that one of them has at the end."""
    rows = max(a.size(-2), b.size(-2))
    a, b = (torch.nn.functional.pad(t, (0, 0, 0, rows - t.size(-2))) for t in (a, b))
    return bool((a - b).abs().max() < 1e-11 * max(1, a.abs().max()))


def test_algebra():
    """Commutative, associative; antisymmetric, Jacobi, Leibniz: at full bandwidth, where nothing is cut off."""
    f, g, h = (torch.randn(3, (l + 1) ** 2, 1, dtype=F64) for l in (1, 2, 2))
    assert same(product_of(f, g), product_of(g, f))
    assert same(product_of(product_of(f, g), h), product_of(f, product_of(g, h)))
    assert same(bracket_of(f, g), -bracket_of(g, f))
    assert bracket_of(h, h).abs().max() < 1e-11
    fgh, ghf, hfg = (bracket_of(a, bracket_of(b, c)) for a, b, c in ((f, g, h), (g, h, f), (h, f, g)))
    assert same(fgh + ghf, -hfg)
    assert not same(fgh, ghf)
    left = bracket_of(product_of(f, g), h)
    right = [product_of(f, bracket_of(g, h)), product_of(bracket_of(f, h), g)]
    assert same(left, sum(right))
    assert not same(left, right[0])
    cut = product_of(product_of(f, g)[:, :4], h)  # cut at degree 1 in between, the law fails
    assert not same(cut, product_of(f, product_of(g, h)))


@pytest.mark.parametrize("lmax", [1, 2, 3])
def test_number_of_paths(lmax):
    """Even paths without the bracket, all Clebsch-Gordan paths with it."""
    triples = [(a, b, c) for a, b, c in itertools.product(range(lmax + 1), repeat=3) if abs(a - b) <= c <= a + b]
    even = [t for t in triples if sum(t) % 2 == 0]
    assert len(GauntTensorProduct(natural(lmax), natural(lmax), lmax_out=lmax).paths) == len(even)
    both = GauntTensorProduct(natural(lmax), natural(lmax), lmax_out=lmax, antisymmetric="bracket")
    assert len(both.paths) == len(triples)
    for i, j, k, bracket in both.paths:
        l1, l2, l3 = both.irreps_in1[i].ir.l, both.irreps_in2[j].ir.l, both.irreps_out[k].ir.l
        assert (l1 + l2 + l3) % 2 == bracket
        assert both.irreps_out[k].ir in both.irreps_in1[i].ir * both.irreps_in2[j].ir


@pytest.mark.parametrize("antisymmetric", [False, "bracket"])
@pytest.mark.parametrize("irreps", [("0e+1o+2e", "0e+1o+2e"), ("0e+1o+1e", "1o+0e+2o"), ("1o+3o", "0e+2e")])
def test_components_have_unit_variance(irreps, antisymmetric):
    """Exactly: over all pairs of unit inputs, the squares of every output component add to one."""
    tp = build(*irreps, antisymmetric=antisymmetric)
    dims = tp.irreps_in1.dim, tp.irreps_in2.dim
    x = torch.eye(dims[0], dtype=F64)[:, None].expand(-1, dims[1], -1)
    y = torch.eye(dims[1], dtype=F64).expand(dims[0], -1, -1)
    assert_close(tp(x, y).square().sum((0, 1)), torch.ones(tp.irreps_out.dim, dtype=F64))


@pytest.mark.parametrize("mode", ["uuu", "uvw"])
def test_weights_keep_the_variance(mode):
    variances = []
    for seed in range(30):
        torch.manual_seed(seed)
        tp = build(natural(1, 16), natural(1, 16), mode=mode, weights="per_l", rank=3, antisymmetric="bracket")
        variances.append(tp(features(tp.irreps_in1, 50), features(tp.irreps_in2, 50)).detach().square().mean())
    assert 0.8 < float(torch.stack(variances).mean()) < 1.25


@pytest.mark.parametrize("mode", ["uuu", "uvu", "full", "uvw"])
def test_dense_layout(mode):
    one, two = "2x0e+2x1o+2x0o+2x1e", {"uvu": "0e+1o"}.get(mode, "2x0e+2x1o")
    options = {"mode": mode, "antisymmetric": "bracket", "weights": "per_l", "lmax_out": 2}
    flat, dense = build(one, two, **options), build(one, two, layout="dense", **options)
    dense.load_state_dict(flat.state_dict())
    x, y = features(one), features(two)
    out = dense(pack(x, one), pack(y, two))
    assert out.shape == (5, 18, 4 if mode == "full" else 2)
    assert_close(unpack(out, flat.irreps_out), flat(x, y))


def test_rows_and_leading_axes():
    tp = build(BOTH1, BOTH2, antisymmetric="bracket", weights="per_l")
    x, y = features(BOTH1, 6), features(BOTH2, 6)
    out = tp(x, y)
    assert_close(torch.cat([tp(x[i : i + 1], y[i : i + 1]) for i in range(6)]), out)
    assert_close(tp(x.view(3, 2, -1), y[0]), torch.stack([tp(x[:, None], y[0])[:, 0]]).view(3, 2, -1))
    assert tp(x[:0], y[:0]).shape == (0, tp.irreps_out.dim)
    none = build("0x0e+0x1o", "0x0e+0x1o", antisymmetric="bracket", weights="per_l")
    assert none(torch.ones(4, 0, dtype=F64), torch.ones(4, 0, dtype=F64)).shape == (4, 0)
    assert tp(x[0], y[0]).shape == (tp.irreps_out.dim,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["none", "per_l"])
def test_half_precision(dtype, weights):
    tp = build(BOTH1, BOTH2, antisymmetric="bracket", weights=weights).to(dtype)
    x, y = features(BOTH1, dtype=dtype), features(BOTH2, dtype=dtype)
    out = tp(x, y)
    assert out.dtype == dtype
    exact = tp.double()(x.double(), y.double())
    assert (out.double() - exact).abs().max() < {torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype] * exact.abs().max()


@pytest.mark.parametrize("mode", ["uuu", "uvu", "full", "uvw"])
def test_derivatives(mode):
    two = {"uvu": "0e+1o"}.get(mode, "2x0e+2x1o")
    tp = build("2x0e+2x1o", two, mode=mode, antisymmetric="bracket", weights="per_l", lmax_out=1)

    def run(x, y, weight):
        return torch.func.functional_call(tp, {"weight": weight}, (x, y))

    check_derivatives(run, [features("2x0e+2x1o", 2), features(two, 2), tp.weight.detach()])


def test_third_derivative():
    """A loss on forces: gradgradcheck of a gradient."""
    tp = build("0e+1o", "0e+1o", antisymmetric="bracket")

    def force(x):
        return torch.autograd.grad(tp(x, x.square()).pow(3).sum(), x, create_graph=True)

    check_derivatives(force, [features("0e+1o", 1)])


def test_state_dict_and_repr():
    options = {"antisymmetric": "bracket", "weights": "per_l", "rank": 2}
    x, y = features(BOTH1), features(BOTH2)
    assert_state_dict_roundtrip(lambda: build(BOTH1, BOTH2, **options), lambda m: m(x, y))
    tp = build(BOTH1, BOTH2, **options)
    assert list(tp.state_dict()) == ["weight"]
    assert tp.weight.numel() == tp.weight_numel
    assert not GauntTensorProduct(BOTH1, BOTH2).state_dict()
    assert "rank=2, antisymmetric='bracket'" in repr(tp)


def test_compile():
    tp = GauntTensorProduct("2x0e+2x1o", "2x0e+2x1o", antisymmetric="bracket", weights="per_l")
    check_compile(tp, (features("2x0e+2x1o", 4, torch.float32), features("2x0e+2x1o", 4, torch.float32)))


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("2x0e+3x1o", "2x0e"), {}, "irreps_in1 is '2x0e.3x1o', but the multiplicities of signals"),
        (("2x0e+2x1o+2x1o", "2x0e"), {}, "which has 1o twice"),
        (("2x0e", "2xx0e"), {}, "irreps_in2 is '2xx0e', which e3nn does not read"),
        (("2x0e", "3x0e"), {}, "mode 'uuu' needs equal multiplicities, got 2 in irreps_in1 and 3 in irreps_in2"),
        (("2x0e", "2x0e"), {"mode": "uvu"}, "mode 'uvu' needs multiplicity 1 in irreps_in2, got 2"),
        (("2x1o", "2x1o", "3x0e"), {}, "irreps_out has multiplicity 3, but mode 'uuu' makes 2"),
        (("2x1o", "2x1o", "2x0e+2x1e"), {}, "asks for 1e, which no product .* reaches; antisymmetric='bracket' adds"),
        (("2x1o", "2x1o", "2x1o"), {"antisymmetric": "bracket"}, "asks for 1o, which no product .* reaches$"),
        (("2x1o", "2x1o", "2x3e"), {}, "asks for 3e"),
        (("2x1o", "2x1o", "2x0e"), {"lmax_out": 2}, "irreps_out and lmax_out were both given"),
        (("2x1o", "2x2e"), {"lmax_out": 0}, "lmax_out is 0, and no degree up to it is reached"),
        (("2x1o", "2x2e"), {"lmax_out": -1}, "lmax_out is -1"),
        (("2x1o", "2x1o"), {"mode": "uuv"}, "mode is 'uuv', but must be one of 'uuu', 'uvu', 'uvw', 'full'"),
        (("2x1o", "2x1o"), {"weights": "all"}, "weights is 'all'"),
        (("2x1o", "2x1o"), {"antisymmetric": True}, "antisymmetric is True, but must be one of False, 'bracket'"),
        (("2x1o", "2x1o"), {"normalize": "e3nn"}, "normalize is 'e3nn'"),
        (("2x1o", "2x1o"), {"method": "fft"}, "method is 'fft'"),
        (("2x1o", "2x1o"), {"layout": "flat"}, "layout is 'flat'"),
        (("2x1o", "2x1o"), {"rank": 0}, "rank is 0"),
        (("2x1o", "2x1o"), {"rank": 2}, "it needs weights='per_l'"),
        (("2x1o", "2x0e+2x1o"), {"layout": "dense"}, "layout 'dense' has rows for every degree .* irreps_in1 has not"),
        (("2x0e+2x1o", "2x0e+2x1o", "2x2e"), {"layout": "dense"}, r"irreps_out leaves out \{0, 1\}"),
    ],
)
def test_refusals(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        GauntTensorProduct(*arguments, **options)


def test_wrong_shapes():
    tp = GauntTensorProduct("2x0e+2x1o", "2x0e+2x1o")
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\), but must be \(\.\.\., 8\)"):
        tp(torch.ones(3, 7), torch.ones(3, 8))
    dense = GauntTensorProduct("2x0e+2x1o", "2x0e+2x1o", layout="dense")
    with pytest.raises(ValueError, match=r"y has shape \(3, 8\), but must be \(\.\.\., 4, 2\)"):
        dense(torch.ones(3, 4, 2), torch.ones(3, 8))
