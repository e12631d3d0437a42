"""Statistics of the estimates against exact moments and against the papers' experiments.

Names of tests in this folder give the oracle of A.12 that they are. 2, 6 and the frequencies of neighbours in 5 stand
in tests/ops/test_grf_walks.py, 9 in tests/nn/test_grf_linear_attention.py and tests/test_gp.py.

Seeds are fixed. Repeats are copies of a graph side by side, each with walks of its own.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geo.kernels import (
    GRFKernel,
    Series,
    heat,
    inverse_cosine,
    pair,
    random_walk,
    regularised_laplacian,
)

KERNELS = {  # in powers of U = W / 4, as in the papers' experiments
    "1-reg": regularised_laplacian(s=3**-0.5, d=1.0),
    "2-reg": regularised_laplacian(s=3**-0.5, d=2.0),
    "2-step": random_walk(p=2, a=5.0),
    "heat": heat(t=0.25),
    "cos": inverse_cosine(c=0.25),
}
COUPLINGS = ("iid", "antithetic", "repelling", "antithetic+repelling")


def weighted(directed: bool = False, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Fourteen nodes with loops, of very different degrees and weights."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = (torch.rand(2, 30, generator=generator).square() * 14).long()
    edge_index[:, 0] = 13
    weight = 0.2 + torch.rand(30, generator=generator, dtype=torch.float64)
    if directed:
        return edge_index, weight
    return torch.cat([edge_index, edge_index.flip(0)], dim=1), weight.repeat(2)


def copies(edge_index: Tensor, weight: Tensor | None, num_nodes: int, many: int) -> dict[str, Tensor | int | None]:
    """So many copies of a graph side by side."""
    shift = (num_nodes * torch.arange(many)).repeat_interleave(edge_index.size(1))
    return {
        "edge_index": edge_index.repeat(1, many) + shift,
        "edge_weight": None if weight is None else weight.repeat(many),
        "num_nodes": num_nodes * many,
    }


def blocks(kernel: GRFKernel, num_nodes: int) -> Tensor:
    """The estimate of each copy, [copies, N, N]."""
    many = kernel.num_nodes // num_nodes

    def dense(k: int) -> Tensor:
        phi = kernel.features()[k]
        out = torch.zeros(many * num_nodes, num_nodes, dtype=torch.float64)
        out.index_put_((phi.row, phi.col % num_nodes), phi.value.double())
        return out.view(many, num_nodes, num_nodes)

    out = kernel.series.scale * dense(0) @ dense(1).transpose(1, 2)
    if kernel.debias_diag:
        out.diagonal(dim1=1, dim2=2).copy_(kernel.diag().view(many, num_nodes))
    return out


def estimates(
    edge_index: Tensor, series: Series, repeats: int, weight: Tensor | None = None, seed: int = 0, **options
) -> Tensor:
    num_nodes = int(edge_index.max()) + 1
    graph = copies(edge_index, weight, num_nodes, repeats)
    options = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(seed), **options}
    return blocks(GRFKernel(**graph, series=series, **options), num_nodes)


def relative_errors(edge_index: Tensor, series: Series, repeats: int, **options) -> Tensor:
    """The relative Frobenius error of each repeat."""
    exact = GRFKernel(edge_index, series, num_walks=2, dtype=torch.float64).exact()
    off = estimates(edge_index, series, repeats, **options) - exact
    return torch.linalg.matrix_norm(off) / torch.linalg.matrix_norm(exact)


PAIR = pair([0.0, 1.0, 0.5], f1=[1.0, 0.2])
CASES = {
    "karate": (regularised_laplacian(s=3**-0.5, d=2.0), {}),
    "weighted": (heat(t=1.0), {}),
    "by weight": (heat(t=1.0), {"proposal": "weight"}),
    "directed": (heat(t=1.0), {}),
    "survival": (heat(t=1.0), {"survival": [1.0, 0.5, 0.3, 0.1]}),
    "symmetrised": (heat(t=1.0), {"symmetrise": True}),
    "pair": (PAIR, {}),
    "pair, symmetrised": (PAIR, {"symmetrise": True}),
    "pair, one set": (PAIR, {"two_sets": False}),
    "pair, one set, symmetrised": (PAIR, {"two_sets": False, "symmetrise": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_oracle_3_variance(case, named_graph):
    """The entries of a row vary together: scores of one small graph are few, so that twenty graphs are put together."""
    series, options = CASES[case]
    options = {"num_walks": 4, "coupling": "iid", **options}
    graphs = (
        [(named_graph("karate"), None)] if case == "karate" else [weighted(case == "directed", k) for k in range(20)]
    )
    repeats = 3000 if case == "karate" else 2500
    scores, totals, variances = [], [], []
    for seed, (edge_index, weight) in enumerate(graphs):
        kernel = GRFKernel(edge_index, series, weight, **options, dtype=torch.float64)
        variance = kernel.exact_variance()
        off = estimates(edge_index, series, repeats, weight, seed=seed, **options) - kernel.exact()
        if options.get("symmetrise"):
            off = (off + off.transpose(1, 2)) / 2
        off.masked_fill_(variance.isnan(), 0.0)  # the diagonal of one set
        known = variance > 1e-12 * variance.nan_to_num().max()
        assert (off[:, ~known].abs() < 1e-6).all()
        scores.append(off.mean(0)[known] / (variance[known] / repeats).sqrt())
        totals.append(off.square().sum((1, 2)))
        variances.append(float(variance.nansum()))
    score, total = torch.cat(scores), torch.stack(totals)
    spread = float((total.var(1) / repeats).sum().sqrt()) / sum(variances)
    ratio = float(total.mean(1).sum()) / sum(variances)
    rms = float(score.square().mean().sqrt())
    print(f"{case}: variance ratio {ratio:.4f} +- {spread:.4f}, rms z {rms:.3f}, max |z| {score.abs().max():.2f}")
    assert ratio == pytest.approx(1, abs=0.03)
    assert spread < 0.01
    assert 0.9 <= rms <= 1.1
    assert score.abs().max() < 5


@pytest.mark.parametrize("case", ["karate", "weighted", "by weight", "survival"])
def test_oracle_3_bias_of_the_diagonal_of_one_set(case, named_graph):
    series, options = CASES[case]
    edge_index, weight = (named_graph("karate"), None) if case == "karate" else weighted()
    options = {"num_walks": 4, "coupling": "iid", "two_sets": False, **options}
    kernel = GRFKernel(edge_index, series, weight, **options, dtype=torch.float64)
    bias, exact, variance = kernel.exact_bias(), kernel.exact(), kernel.exact_variance()
    assert variance.diagonal().isnan().all()
    repeats = 3000 if case == "karate" else 15000
    off = estimates(edge_index, series, repeats, weight, **options) - exact
    found = off.diagonal(dim1=1, dim2=2)
    spread = float(found.sum(1).std() / math.sqrt(repeats) / bias.sum())
    ratio = float(found.sum(1).mean() / bias.sum())
    print(f"{case}: bias ratio {ratio:.4f} +- {spread:.4f}, relative bias {float((bias / exact.diag()).mean()):.4f}")
    assert ratio == pytest.approx(1, abs=0.03)
    apart = ~torch.eye(len(exact), dtype=torch.bool) & (variance > 1e-12 * variance.nan_to_num().max())
    assert float(off[:, apart].square().mean(0).sum() / variance[apart].sum()) == pytest.approx(1, abs=0.03)
    assert spread < 0.01
    score = off[:, apart].mean(0) / (variance[apart] / repeats).sqrt()
    assert score.abs().max() < 5


@pytest.mark.parametrize("proposal", ["uniform", "weight"])
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_oracle_3_two_sets_are_independent(coupling, proposal):
    """With two walks, sets that had anything in common would show in the mean, first of all on the diagonal."""
    half = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
    edge_index, weight = torch.cat([half, half.flip(0)], dim=1), torch.tensor([1.0, 3.0, 0.1, 2.0, 5.0]).repeat(2)
    series, options = regularised_laplacian(s=0.8, d=2.0), {"num_walks": 2, "coupling": coupling, "proposal": proposal}
    exact = GRFKernel(edge_index, series, weight, **options, dtype=torch.float64).exact()
    off = estimates(edge_index, series, 20000, weight, **options) - exact
    score = off.mean(0) / (off.std(0) / math.sqrt(20000))
    assert score.abs().max() < 4.5


def test_debiased_diagonal_is_unbiased(named_graph):
    """What is left of the bias is within four standard errors of zero, and far below the bias itself."""
    edge_index, series = named_graph("karate"), KERNELS["2-reg"]
    options = {"num_walks": 4, "coupling": "iid", "two_sets": False}
    kernel = GRFKernel(edge_index, series, **options, dtype=torch.float64)
    found = estimates(edge_index, series, 2000, **options, debias_diag=True).diagonal(dim1=1, dim2=2)
    rest = (found - kernel.exact().diag()).sum(1)
    error = float(rest.std() / math.sqrt(2000))
    assert abs(float(rest.mean())) < 4 * error
    assert 4 * error < 0.2 * float(kernel.exact_bias().sum())


def test_karate_has_the_published_bias(named_graph):
    """A.4: 3.2 % of the diagonal for the 2-regularised kernel, c = 1/4, p = 1/2, m = 4."""
    kernel = GRFKernel(
        named_graph("karate"), KERNELS["2-reg"], num_walks=4, coupling="iid", two_sets=False, dtype=torch.float64
    )
    assert float((kernel.exact_bias() / kernel.exact().diag()).mean()) == pytest.approx(0.032, abs=5e-4)


@pytest.mark.parametrize("coupling", ["iid", "antithetic+repelling"])
def test_oracle_4_error_falls_as_the_root_of_the_number_of_walks(coupling, named_graph):
    edge_index = named_graph("karate")
    walks = torch.tensor([4, 16, 64, 256])
    errors = torch.stack(
        [relative_errors(edge_index, KERNELS["2-reg"], 40, num_walks=int(m), coupling=coupling).mean() for m in walks]
    )
    table = torch.stack([torch.ones(4), walks.log()], dim=1).double()
    slope = float(torch.linalg.lstsq(table, errors.log().unsqueeze(1)).solution[1])
    print(f"{coupling}: errors {errors.tolist()}, slope {slope:.3f}")
    if coupling == "iid":
        assert slope == pytest.approx(-0.5, abs=0.03)
    else:  # the more repelling walks stand at one node, the more evenly they leave it: it falls faster
        assert -1.0 < slope < -0.6


@pytest.mark.parametrize("name", ["karate", "er100", "tree127", "reg100"])
def test_oracle_5_couplings_lower_the_error(name, named_graph):
    edge_index = named_graph(name)
    for kernel in ("2-reg", "heat"):
        errors = {}
        for coupling in COUPLINGS:
            options = {"num_walks": 8, "two_sets": False, "coupling": coupling}
            squares = relative_errors(edge_index, KERNELS[kernel], 40, **options).square()
            errors[coupling] = float(squares.mean())
        print(name, kernel, {coupling: f"{error:.2e}" for coupling, error in errors.items()})
        assert errors["antithetic+repelling"] <= errors["iid"]
        assert max(errors.values()) == errors["iid"]
        if name in ("er100", "tree127"):
            assert errors["antithetic+repelling"] <= errors["iid"] / 2


# Relative Frobenius errors with U = W / 4, p = 1/2, one set, for 2, 4, 8 and 16 walks: means over 20 trials. (For heat
# on karate with 8 walks they had 0.090, four standard errors off; here stands the root of the mean square of 300.)
TABLE = {
    ("karate", "1-reg"): (0.180, 0.119, 0.087, 0.064),
    ("karate", "2-reg"): (0.367, 0.266, 0.179, 0.124),
    ("karate", "2-step"): (0.345, 0.241, 0.169, 0.120),
    ("karate", "heat"): (0.166, 0.118, 0.084, 0.059),
    ("karate", "cos"): (0.182, 0.129, 0.084, 0.060),
    ("er100", "1-reg"): (0.177, 0.123, 0.086, 0.061),
    ("er100", "2-reg"): (0.371, 0.256, 0.181, 0.123),
    ("er100", "2-step"): (0.326, 0.233, 0.164, 0.114),
    ("er100", "heat"): (0.165, 0.114, 0.082, 0.058),
    ("er100", "cos"): (0.168, 0.123, 0.085, 0.061),
    ("tree127", "1-reg"): (0.172, 0.119, 0.086, 0.059),
    ("tree127", "2-reg"): (0.369, 0.249, 0.169, 0.117),
    ("tree127", "2-step"): (0.306, 0.209, 0.146, 0.106),
    ("tree127", "heat"): (0.159, 0.108, 0.079, 0.054),
    ("tree127", "cos"): (0.157, 0.115, 0.080, 0.056),
    ("reg100", "1-reg"): (0.180, 0.127, 0.092, 0.065),
    ("reg100", "2-reg"): (0.384, 0.262, 0.187, 0.130),
    ("reg100", "2-step"): (0.350, 0.243, 0.170, 0.120),
    ("reg100", "heat"): (0.174, 0.122, 0.086, 0.060),
    ("reg100", "cos"): (0.179, 0.128, 0.089, 0.063),
}


# Mean squared relative Frobenius errors of the couplings, 8 walks, one set, U = W / 4, p = 1/2, 300 trials.
SQUARES = {
    ("karate", "2-reg"): (3.42e-2, 2.88e-2, 2.15e-2, 1.77e-2),
    ("karate", "heat"): (7.09e-3, 6.42e-3, 4.21e-3, 3.51e-3),
    ("er100", "2-reg"): (3.27e-2, 2.71e-2, 1.54e-2, 1.03e-2),
    ("er100", "heat"): (6.76e-3, 5.73e-3, 2.64e-3, 1.56e-3),
    ("tree127", "2-reg"): (2.96e-2, 1.98e-2, 1.53e-2, 7.18e-3),
    ("tree127", "heat"): (6.03e-3, 4.21e-3, 2.51e-3, 1.08e-3),
    ("reg100", "2-reg"): (3.46e-2, 3.26e-2, 2.36e-2, 2.31e-2),
    ("reg100", "heat"): (7.47e-3, 7.08e-3, 4.73e-3, 4.72e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["karate", "er100", "tree127", "reg100"])
def test_table_of_couplings(name, named_graph):
    """Four standard errors of 300 trials of theirs and 300 of ours, and rounding."""
    edge_index = named_graph(name)
    for kernel in ("2-reg", "heat"):
        for coupling, expected in zip(COUPLINGS, SQUARES[name, kernel], strict=True):
            options = {"num_walks": 8, "two_sets": False, "coupling": coupling}
            trials = [relative_errors(edge_index, KERNELS[kernel], 100, seed=k, **options) for k in range(3)]
            squares = torch.cat(trials).square()
            found, spread = float(squares.mean()), float(squares.std() * math.sqrt(2 / 300))
            print(f"{name} {kernel} {coupling}: {found:.3e} ({expected:.2e}), standard error {spread:.1e}")
            assert found == pytest.approx(expected, abs=4 * spread + 5e-3 * expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["karate", "er100", "tree127", "reg100"])
def test_table_of_accuracies(name, named_graph):
    """Means over 100 trials, against a table of means over 20: four standard errors of the two, and rounding."""
    edge_index = named_graph(name)
    for kernel, series in KERNELS.items():
        row = []
        for walks, expected in zip((2, 4, 8, 16), TABLE[name, kernel], strict=True):
            errors = relative_errors(edge_index, series, 100, num_walks=walks, coupling="iid", two_sets=False)
            row.append((float(errors.mean()), float(errors.std() * math.sqrt(1 / 20 + 1 / 100)), expected))
        print(name, kernel, " ".join(f"{mean:.3f} ({expected:.3f})" for mean, _, expected in row))
        for mean, spread, expected in row:
            assert mean == pytest.approx(expected, abs=4 * spread + 5e-4)
