"""Parameter counts of the published ZINC models: a fingerprint of the structure (check 10).

The paper on SPE (https://arxiv.org/abs/2310.02579) gives them in thousands; to the unit they are those of its code with
the encoding added once at the input. Here they are derived piece by piece, then compared with the modules. The two
models with SPE differ from theirs by one MLP of 26,661 (19,208) weights that is never called there and not made here.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from geo.nn import GINE, SPE, EigenvectorPE, SignNet


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def linear(a, b, bias=True) -> int:
    return a * b + b * bias


def mlp(a, hidden, b, layers=3, norm=True) -> int:
    """Linear maps, with a scale and a shift after each but the last."""
    inner = [a, *[hidden] * (layers - 1)]
    return sum(linear(x, y) for x, y in pairwise(inner)) + linear(hidden, b) + 2 * hidden * (layers - 1) * norm


def gin(a, hidden, b, layers, norm_between) -> int:
    """Layers of a trainable epsilon and an MLP of three linear maps."""
    widths = [a, *[hidden] * (layers - 1), b]
    convs = sum(1 + mlp(x, hidden, y) for x, y in pairwise(widths))
    return convs + 2 * hidden * (layers - 1) * norm_between


def base(hidden) -> int:
    """28 types of atoms, 4 layers with 4 types of bonds each, and the MLP after the mean."""
    layer = 4 * hidden + 1 + mlp(hidden, hidden, hidden)
    return 28 * hidden + 4 * layer + mlp(hidden, hidden, 1)


def deepsets(hidden, layers) -> int:
    """Layers of a linear map of each element and one, without bias, of the sum."""
    widths = [1, *[hidden] * (layers - 1), 1]
    return sum(linear(a, b) + linear(a, b, bias=False) for a, b in pairwise(widths))


def unused(out) -> int:
    """An MLP that the published code makes and never calls, but counts; SPE has none."""
    return mlp(out, 128, out)


def model(hidden, pe=None):
    return GINE(None, hidden, 4, 1, node_types=28, edge_types=4, pe=pe)


PHI_37 = 16 * mlp(1, 16, 1, norm=False)
PHI_8 = 6 * deepsets(16, 4)
RHO_37 = gin(16, 128, 37, 8, norm_between=False)
RHO_8 = gin(6, 128, 8, 8, norm_between=False)


@pytest.mark.parametrize(
    ("pieces", "published"),
    [
        ((base(200),), 575_805),
        ((base(128), linear(37, 128), PHI_37, RHO_37, unused(37)), 650_471),
        ((base(128), linear(37, 128), 16 * mlp(1, 16, 1), RHO_37, unused(37)), 651_495),  # phi with batch norm
        ((base(128), linear(8, 128), PHI_8, RHO_8, unused(8)), 635_971),
        ((base(120), linear(8, 120), gin(1, 120, 4, 8, True), mlp(8 * 4, 120, 8, 8)), 631_585),
        ((base(120), linear(37, 120), gin(1, 120, 120, 8, True), mlp(120, 120, 37, 8)), 663_170),
    ],
    ids=["none", "spe-37", "spe-37-norm", "spe-8", "signnet-8", "signnet-37"],
)
def test_check_10_the_published_counts_decompose(pieces, published):
    assert sum(pieces) == published


def test_check_10_without_encoding():
    assert count(model(200)) == 575_805
    assert count(model(128)) == base(128) == 239_493
    assert count(model(120)) == base(120) == 211_085


def test_check_10_sign_net_with_8_eigenvectors():
    pe = SignNet(
        8, k=8, phi_hidden=120, phi_layers=8, phi_channels=4, mlp_layers=3, rho_hidden=120, rho_layers=8,
        use_eigvals=False,
    )  # fmt: skip
    assert count(model(120, pe)) == 631_585


def test_check_10_sign_net_with_37_eigenvectors():
    pe = SignNet(37, phi_hidden=120, phi_layers=8, mlp_layers=3, rho_hidden=120, rho_layers=8, use_eigvals=False)
    assert count(model(120, pe)) == 663_170


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_either_norm_counts_alike(norm):
    options = {"phi_hidden": 12, "phi_layers": 3, "mlp_layers": 3, "rho_hidden": 12, "norm": norm}
    assert count(SignNet(5, use_eigvals=False, **options)) == gin(1, 12, 12, 3, True) + mlp(12, 12, 5, 2)


def test_plain_eigenvectors():
    assert count(EigenvectorPE(5, 8)) == linear(16, 5)
    assert count(EigenvectorPE(5, 8, use_eigvals=False, num_layers=3)) == mlp(8, 64, 5)


def test_check_10_spe_with_37_eigenvectors():
    pe = SPE(37, 16, phi="mlp", rho="gin", phi_hidden=16, phi_layers=3, rho_hidden=128, rho_layers=8)
    assert count(model(128, pe)) == 650_471 - unused(37)


def test_check_10_spe_with_8_eigenvectors():
    pe = SPE(8, 6, phi="deepsets", rho="gin", phi_hidden=16, phi_layers=4, rho_hidden=128, rho_layers=8)
    assert count(model(128, pe)) == 635_971 - unused(8)
