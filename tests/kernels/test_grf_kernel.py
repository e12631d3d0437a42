from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geo.kernels import (
    GRFKernel,
    Series,
    StitchedKernel,
    custom,
    heat,
    inverse_cosine,
    katz,
    normalized_adjacency,
    pair,
    personalised_pagerank,
    random_walk,
    regularised_laplacian,
)
from geo.ops import grf_walks
from geo.testing import assert_close, check_derivatives


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def graph(num_nodes: int = 12, num_edges: int = 20, directed: bool = False) -> tuple[Tensor, Tensor]:
    """With a loop, repeated edges and, as the last, an isolated node; positive weights."""
    generator = seeded(5)
    edge_index = torch.randint(num_nodes - 1, (2, num_edges), generator=generator)
    weight = 0.3 + torch.rand(num_edges, generator=generator, dtype=torch.float64)
    if not directed:
        edge_index, weight = torch.cat([edge_index, edge_index.flip(0)], dim=1), weight.repeat(2)
    return torch.cat([edge_index, torch.zeros(2, 1).long()], dim=1), torch.cat([weight, weight.new_ones(1)])


def make(series: Series | None = None, directed: bool = False, **options) -> GRFKernel:
    edge_index, weight = graph(directed=directed)
    options = {"num_nodes": 12, "num_walks": 6, "generator": seeded(), **options}
    return GRFKernel(edge_index, series or heat(t=1.0), weight, **options)


def ring(num_nodes: int) -> Tensor:
    edges = torch.stack([torch.arange(num_nodes), (torch.arange(num_nodes) + 1) % num_nodes])
    return torch.cat([edges, edges.flip(0)], dim=1)


KINDS = {
    "two sets": {},
    "one set": {"two_sets": False},
    "debiased": {"two_sets": False, "coupling": "iid", "debias_diag": True},
    "symmetrised": {"symmetrise": True},
    "directed": {"directed": True},
    "pagerank": {"series": personalised_pagerank(a=0.4)},
    "pair": {"series": pair([0.0, 1.0, 0.5], f1=[1.0, 0.2])},
    "pair, one set, debiased": {
        "series": pair([0.0, 1.0, 0.5], f1=[1.0, 0.2]),
        "two_sets": False,
        "coupling": "iid",
        "debias_diag": True,
    },
    "pair, one set, symmetrised": {
        "series": pair([0.0, 1.0, 0.5], f1=[1.0, 0.2]),
        "two_sets": False,
        "symmetrise": True,
    },
    "katz": {"series": katz(beta=0.1)},
    "by weight": {"proposal": "weight", "p_halt": 0.3},
    "survival": {"survival": [1.0, 0.9, 0.5]},
    "rendezvous": {"choice": "rendezvous", "coupling": "antithetic"},
    "two steps": {"series": random_walk(p=2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_read_a_kernel_agree(kind):
    kernel = make(**KINDS[kind])
    dense = kernel.dense()
    assert dense.shape == kernel.shape == (12, 12)
    assert dense.dtype == torch.float64
    for shape in ((12,), (12, 3), (12, 2, 2)):
        v = torch.randn(shape, dtype=torch.float64)
        assert_close(kernel @ v, torch.tensordot(dense, v, 1))
    assert_close(kernel.diag(), dense.diagonal())
    i, j = torch.tensor([3, 0, -1, 3]), torch.tensor([[2], [11], [0]])
    mask = torch.arange(12) % 3 == 0
    for index in (
        (2, 3), (-1, -1), 4, slice(2, 9, 3), (slice(None), 5), (5, slice(None)), (slice(1, 4), slice(0, 12, 2)),
        i, (i, i), (i, j), (i, 1), (2, i), (i, slice(3)), (slice(-4, None), j), mask, (mask, slice(None)),
        ([1, 2], [3, 4]), (i[:0], i[:0]), (i[:0], slice(None)),
    ):  # fmt: skip
        assert_close(kernel[index], dense[index])
    phi1, phi2 = kernel.features()
    if kind in ("two sets", "one set", "directed", "katz", "by weight"):
        assert_close(dense, kernel.series.scale * phi1.to_dense() @ phi2.to_dense().t())
    assert (phi1 is phi2) == (kind in ("one set", "debiased"))
    if kind in ("one set", "debiased", "symmetrised", "pair, one set, symmetrised"):
        assert_close(dense, dense.t())
    if kind == "one set":
        assert torch.linalg.eigvalsh(dense).min() > -1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind):
    """The mean of many walks, and the same kernel from the series alone."""
    options = {"num_walks": 100 if "debiased" in kind else 2000, **KINDS[kind]}
    kernel = make(**options)
    exact, series = kernel.exact(), kernel.series
    rowptr, col, weight = normalized_adjacency(*graph(directed=kernel.directed), 12, series.normalization)
    matrix = torch.zeros(12, 12, dtype=torch.float64)
    matrix[torch.repeat_interleave(torch.arange(12), rowptr.diff()), col] = weight
    powers = torch.stack([torch.linalg.matrix_power(matrix, k) for k in range(80)])
    expected = series.scale * torch.einsum("k,kij->ij", series.alpha(80), powers)
    if kind == "pagerank":
        _, _, raw = normalized_adjacency(*graph(), 12, None)
        degree = torch.zeros(12, dtype=torch.float64).index_add(
            0, torch.repeat_interleave(torch.arange(12), rowptr.diff()), raw
        )
        degree[degree == 0] = 1
        walk = torch.zeros_like(matrix)
        walk[torch.repeat_interleave(torch.arange(12), rowptr.diff()), col] = raw
        expected = 0.4 * torch.linalg.inv(torch.eye(12).double() - 0.6 * walk / degree.unsqueeze(1))
    assert_close(exact, expected)
    if kind != "survival":  # whose walks of three steps at most are a bias
        off = torch.linalg.matrix_norm(kernel.dense() - exact)
        assert off < 0.1 * math.sqrt(2000 / kernel.num_walks) * torch.linalg.matrix_norm(exact)


def test_isolated_nodes_and_empty_graphs():
    for two_sets in (True, False):
        kernel = make(two_sets=two_sets)
        expected = torch.zeros(12, dtype=torch.float64)
        expected[-1] = math.exp(-1.0)
        assert torch.equal(kernel.dense()[-1], expected)
        assert torch.equal(kernel.dense()[:, -1], expected)
        none = torch.zeros(2, 0).long()
        for size in (0, 1, 3):
            kernel = GRFKernel(none, regularised_laplacian(), num_nodes=size, two_sets=two_sets, generator=seeded())
            assert torch.equal(kernel.dense(), kernel.exact())
            assert_close(kernel.exact(), 0.5 * torch.eye(size))
            assert (kernel @ torch.ones(size, 2)).shape == (size, 2)
            assert kernel.diag().shape == (size,)
    kernel = GRFKernel(none, heat(), generator=seeded(), coupling="iid", two_sets=False, debias_diag=True)
    assert kernel.dense().shape == kernel.exact_variance().shape == (0, 0)
    assert kernel.exact_bias().shape == (0,)
    kernel = GRFKernel(none, katz(beta=5.0), num_nodes=2, generator=seeded())  # no edges: it converges for any beta
    assert torch.equal(kernel.dense(), torch.eye(2))


@pytest.mark.parametrize("proposal", ["uniform", "weight"])
def test_negative_weights(proposal):
    edge_index, weight = graph()
    sign = torch.where((edge_index[0] + edge_index[1]) % 2 == 0, 1.0, -1.0)
    kernel = GRFKernel(edge_index, heat(), weight * sign, 12, 4000, proposal=proposal, generator=seeded())
    assert kernel.exact().min() < -0.02
    assert (kernel.dense() - kernel.exact()).abs().max() < 0.1


def test_seeds():
    first, second = (make(generator=seeded(3)) for _ in range(2))
    assert torch.equal(first.dense(), second.dense())
    assert first.seed == second.seed
    before = first.dense()
    assert first.resample(seeded(4)) is first
    assert not torch.equal(first.dense(), before)
    assert torch.equal(first.resample(seeded(3)).dense(), before)
    torch.manual_seed(0)
    third = make(generator=None)
    torch.manual_seed(0)
    assert torch.equal(third.dense(), make(generator=None).dense())
    phi1, phi2 = first.features()
    assert not torch.equal(phi1.to_dense(), phi2.to_dense())  # two sets are drawn apart


def test_sets_are_those_of_grf_walks():
    """The second set has the walks that come after the first, on a directed graph along the transposed matrix."""
    kernel = make(directed=True)
    edge_index, weight = graph(directed=True)
    options = {"num_walks": 6, "seed": kernel.seed}
    f = kernel.series.modulation(60)
    for k, (edges, phi) in enumerate(zip((edge_index, edge_index.flip(0)), kernel.features(), strict=True)):
        deposits = grf_walks(*normalized_adjacency(edges, weight, 12), first_walk=6 * k, **options)
        rows = torch.repeat_interleave(torch.arange(12), deposits.ptr.diff())
        expected = torch.zeros(12, 12, dtype=torch.float64)
        expected.index_put_((rows, deposits.col), f[deposits.length.long()] * deposits.value, accumulate=True)
        assert_close(phi.to_dense(), expected)


def test_other_series_on_the_same_walks():
    kernel = make()
    assert torch.equal(kernel.with_series(heat(t=0.3)).dense(), make(series=heat(t=0.3)).dense())
    ranked = personalised_pagerank(a=0.5)
    assert torch.equal(kernel.with_series(ranked).dense(), make(series=ranked).dense())
    f = heat(t=1.0).modulation(40)
    assert_close(kernel.with_modulation(f, scale=math.exp(-1)).dense(), kernel.dense())
    assert_close(kernel.with_modulation(f, scale=math.exp(-1)).exact(), kernel.exact())
    assert torch.equal(kernel.dense(), make().dense())  # the kernel itself is left alone
    short = make(series=random_walk(p=2))
    assert short.expected_cost() == 6 * 2 * 1.5  # lengths 0 and 1 alone are walked
    with pytest.raises(ValueError, match=r"heat\(t=1\) needs walks longer than 1"):
        short.with_series(heat())
    with pytest.raises(ValueError, match="sample anew"):
        short.with_modulation(torch.ones(3))
    with pytest.raises(ValueError, match="normalization=None, the walks 'sym'"):
        kernel.with_series(katz(beta=0.1))


def test_oracle_7_derivatives_of_kernels():
    small = {"num_walks": 2, "max_length": 4}
    kernels = [make(**KINDS[kind], **small) for kind in ("two sets", "debiased", "symmetrised", "directed")]
    v = torch.randn(12, dtype=torch.float64)

    def outputs(f: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        learned = [kernel.with_modulation(f, scale=0.7) for kernel in kernels]
        phi1, phi2 = kernels[0].features(f)
        product = phi1.matmul(phi2.t_matmul(v))
        return product, *(kernel @ v for kernel in learned), *(kernel[3] for kernel in learned)

    check_derivatives(outputs, [torch.randn(2, dtype=torch.float64), v], second=False)
    check_derivatives(lambda f: kernels[0].with_modulation(f) @ v, [torch.randn(2, dtype=torch.float64)])
    # dK/df_l = M_l Phi_2^T + Phi_1 N_l^T on the walks that were drawn
    f = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    phi1, phi2 = (phi.to_dense() for phi in kernels[0].features(f))
    for length in range(3):
        m, n = (phi.to_dense() for phi in kernels[0].features(torch.eye(3, dtype=torch.float64)[length]))
        step = 1e-6 * torch.eye(3, dtype=torch.float64)[length]
        up, down = (kernels[0].with_modulation(f + s).dense() for s in (step, -step))
        torch.testing.assert_close((up - down) / 2e-6, m @ phi2.t() + phi1 @ n.t(), rtol=1e-7, atol=1e-8)


def test_gradients_reach_weights():
    edge_index, weight = graph()

    def product(weight: Tensor) -> Tensor:
        return GRFKernel(edge_index, heat(), weight, 12, 4, generator=seeded()) @ torch.ones(12, dtype=torch.float64)

    weight = weight.requires_grad_()
    (slope,) = torch.autograd.grad(product(weight).sum(), weight)
    step = torch.zeros_like(weight)
    step[3] = step[23] = 1e-6  # both directions of an edge: a graph that is no longer symmetric has other walks
    with torch.no_grad():
        expected = (product(weight + step) - product(weight - step)).sum() / 2e-6
    torch.testing.assert_close(slope[3] + slope[23], expected, rtol=1e-6, atol=1e-8)


def test_debiased_diagonal_by_hand():
    """The mean of phi_k . phi_k' over pairs of different walks."""
    kernel = make(**KINDS["debiased"])
    edge_index, weight = graph()
    f = kernel.series.modulation(60)
    features = []
    for walk in range(6):
        deposits = grf_walks(
            *normalized_adjacency(edge_index, weight, 12),
            num_walks=1,
            first_walk=walk,
            seed=kernel.seed,
            coupling="iid",
        )
        phi = torch.zeros(12, 12, dtype=torch.float64)
        rows = torch.repeat_interleave(torch.arange(12), deposits.ptr.diff())
        features.append(
            phi.index_put((rows, deposits.col), f[deposits.length.long()] * deposits.value, accumulate=True)
        )
    pairs = [(a * b).sum(1) for a in features for b in features if a is not b]
    assert_close(kernel.diag(), kernel.series.scale * torch.stack(pairs).mean(0))


def test_stitched():
    kernels = [make(series=heat(t=0.5), generator=seeded(k)) for k in range(2)]
    stitched = StitchedKernel(kernels)
    v = torch.randn(12, 2, dtype=torch.float64)
    assert_close(stitched @ v, kernels[0].dense() @ kernels[1].dense() @ v)
    many = StitchedKernel([make(series=heat(t=0.5), num_walks=600, generator=seeded(k)) for k in range(2)])
    exact = make(series=heat(t=1.0)).exact()
    assert (many @ torch.eye(12, dtype=torch.float64) - exact).abs().max() < 0.1
    assert "StitchedKernel" in repr(stitched)
    with pytest.raises(ValueError, match="kernels: expected at least one factor"):
        StitchedKernel([])
    with pytest.raises(ValueError, match="kernels: expected factors of one shape"):
        StitchedKernel([kernels[0], GRFKernel(torch.zeros(2, 0).long(), heat(), num_nodes=3)])


def test_expected_cost():
    assert make(p_halt=0.25).expected_cost() == 6 * 2 / 0.25
    assert make(p_halt=0.25, two_sets=False).expected_cost() == 6 / 0.25
    assert make(survival=[1.0, 0.5, 0.25, 0.0]).expected_cost() == pytest.approx(6 * 2 * 1.75)
    assert make(survival=[1.0, 1.0, 0.5]).expected_cost() == pytest.approx(6 * 2 * 3)
    assert make(max_length=2).expected_cost() == pytest.approx(6 * 2 * 1.75)
    assert make(max_length=0, survival=[1.0, 1.0, 0.5]).expected_cost() == pytest.approx(6 * 2)
    kernel = GRFKernel(ring(1000), heat(), num_walks=64, p_halt=0.3, generator=seeded())
    found = kernel.with_modulation(torch.ones(1)).features()[0].value.sum()
    assert found == 1000
    assert "num_nodes=1000" in repr(kernel)


def test_dtypes_and_products_between_them():
    edge_index, weight = graph()
    kernel = GRFKernel(edge_index, heat(), weight, generator=seeded(), dtype=torch.float32)
    assert kernel.dense().dtype == kernel.exact().dtype == torch.float32
    assert (kernel @ torch.ones(11)).dtype == torch.float32
    assert (kernel @ torch.ones(11, dtype=torch.float64)).dtype == torch.float64
    assert GRFKernel(edge_index, heat(), generator=seeded()).dense().dtype == torch.float32


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_oracle_10_options_that_are_refused():
    cases = [
        ({"p_halt": 0.0}, r"p_halt: expected a probability between 0 and 1, both excluded, got 0"),
        ({"p_halt": 1.0}, r"p_halt: expected a probability between 0 and 1"),
        ({"num_walks": 5}, r"num_walks: coupling='antithetic\+repelling' needs an even number, got 5"),
        ({"num_walks": 0}, r"num_walks: expected at least 1"),
        ({"coupling": "reinforced"}, r"coupling: expected one of"),
        ({"proposal": "degree"}, r"proposal: expected 'uniform' or 'weight'"),
        ({"choice": "rendezvous"}, r"choice: 'rendezvous' needs coupling='iid' or 'antithetic'"),
        ({"debias_diag": True}, r"debias_diag: needs coupling='iid', got 'antithetic\+repelling'"),
        ({"debias_diag": True, "coupling": "iid"}, r"debias_diag: two sets have an unbiased diagonal already"),
        (
            {"debias_diag": True, "coupling": "iid", "two_sets": False, "num_walks": 1},
            r"debias_diag: needs num_walks of at least 2, got 1",
        ),
        ({"directed": True, "two_sets": False}, r"two_sets: a directed graph needs two sets"),
        ({"directed": True, "symmetrise": True}, r"symmetrise: the kernel of a directed graph is not symmetric"),
        ({"directed": True, "series": personalised_pagerank(0.5)}, r"needs an undirected graph .* katz\(beta=1 - a\)"),
        ({"symmetrise": True, "series": personalised_pagerank(0.5)}, r"needs an undirected graph and symmetrise=False"),
        ({"num_nodes": 12, "max_length": -1}, r"max_length: expected None or a number from 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match=r"alpha: the first coefficient must be positive .* pair\(alpha, f1\)"):
        make(series=custom([0.0, 1.0]))
    with pytest.raises(ValueError, match="exact_variance: needs coupling='iid'"):
        make().exact_variance()
    with pytest.raises(ValueError, match="exact_bias: needs coupling='iid'"):
        make(two_sets=False).exact_bias()
    large = GRFKernel(ring(301), heat(), coupling="iid", num_walks=1)
    with pytest.raises(ValueError, match="exact_variance: for up to 300 nodes, got 301"):
        large.exact_variance()
    kernel = make()
    with pytest.raises(ValueError, match=r"matmul: expected 12 rows, one a node, got \[11\]"):
        kernel @ torch.ones(11)
    with pytest.raises(ValueError, match=r"f: expected floating numbers along one axis"):
        kernel.with_modulation(torch.ones(2).long())
    with pytest.raises(ValueError, match=r"f: expected at least one number along one axis, got \[0\]"):
        kernel.features(torch.ones(0))
    for index in (12, (0, -13), torch.tensor([0, 12]), (slice(None), [12])):
        with pytest.raises(IndexError, match=r"node -?1[23] is out of range for a kernel of 12 nodes"):
            kernel[index]
    with pytest.raises(IndexError, match="a mask must have 12 entries"):
        kernel[torch.ones(11).bool()]
    with pytest.raises(IndexError, match="an index must be an integer"):
        kernel[1.0]
    with pytest.raises(IndexError, match="one or two integers, slices, lists or tensors"):
        kernel[1, 2, 3]


def test_oracle_10_series_that_diverge():
    edge_index, weight = graph()
    loops = torch.arange(3).repeat(2, 1)
    with pytest.raises(
        ValueError, match=r"katz\(beta=0\.5\) converges for spectral radii below 2, but the matrix has 2.5"
    ):
        GRFKernel(loops, katz(beta=0.5), torch.full((3,), 2.5))
    GRFKernel(loops, katz(beta=0.3), torch.full((3,), 2.5), p_halt=0.4)
    with pytest.raises(ValueError, match="but the matrix has 2: divide edge_weight by more than 1"):
        GRFKernel(loops, katz(beta=0.5), torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="custom converges for spectral radii below"):
        GRFKernel(edge_index, custom([1.0, 2.0]), weight)
    with pytest.raises(ValueError, match="inverse_cosine"):
        GRFKernel(edge_index, inverse_cosine(c=0.8), weight)
    # a matrix of spectral radius 1.5 with signs, which walks do not see cancel
    edges = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    with pytest.raises(ValueError, match="the matrix has 2:"):
        GRFKernel(edges, katz(beta=0.6), torch.tensor([1.0, 1.0, 1.0, -1.0]))
    # directed: without a cycle every series ends
    chain = torch.tensor([[0, 1, 2], [1, 2, 3]])
    kernel = GRFKernel(chain, katz(beta=50.0), num_walks=2, generator=seeded(), dtype=torch.float64)
    assert_close(kernel.exact()[0], torch.tensor([1.0, 50.0, 2500.0, 125000.0]).double())
    # and a cycle has the geometric mean of its weights
    cycle = torch.tensor([[0, 1, 2], [1, 2, 0]])
    with pytest.raises(ValueError, match="the matrix has 2:"):
        GRFKernel(cycle, katz(beta=0.5), torch.tensor([1.0, 2.0, 4.0]))


def test_oracle_10_infinite_variance_warns(named_graph):
    edges = named_graph("karate")
    with pytest.warns(UserWarning, match=r"the variance of inverse_cosine.* is infinite .* no p_halt helps"):
        GRFKernel(edges, inverse_cosine(), generator=seeded())
    GRFKernel(edges, inverse_cosine(c=0.25), generator=seeded())
    GRFKernel(edges, regularised_laplacian(s=1.0), p_halt=0.74, generator=seeded())  # c^2 = 1/4 < 1 - p
    with pytest.warns(UserWarning, match=r"with p_halt=0.76: take p_halt below 0.75, or cut the walks by max_length"):
        GRFKernel(edges, regularised_laplacian(s=1.0), p_halt=0.76, generator=seeded())
    GRFKernel(edges, regularised_laplacian(s=1.0), p_halt=0.76, max_length=9, generator=seeded())
    GRFKernel(edges, random_walk(p=2), p_halt=0.99, num_walks=400, generator=seeded())
    GRFKernel(torch.zeros(2, 0).long(), regularised_laplacian(s=10.0), num_nodes=3, generator=seeded())  # no walks
    GRFKernel(edges, inverse_cosine(), survival=[1.0, 0.5, 0.0], generator=seeded())
    # loads of a star of very different weights, by uniform steps and in proportion to the weights
    star = torch.stack([torch.zeros(20).long(), torch.arange(1, 21)])
    star, weight = torch.cat([star, star.flip(0)], dim=1), torch.logspace(0, 3, 20).repeat(2)
    with pytest.warns(UserWarning, match="or proposal='weight'"):
        GRFKernel(star, regularised_laplacian(s=1.0), weight, p_halt=0.6, generator=seeded())
    GRFKernel(star, regularised_laplacian(s=1.0), weight, p_halt=0.6, proposal="weight", generator=seeded())


def test_oracle_10_infinite_variance_of_the_second_set():
    """Walks against the edges of a directed graph meet other degrees: both directions decide."""
    cycle, sources = torch.tensor([[0, 1, 2], [1, 2, 0]]), torch.arange(3, 33)
    into = torch.stack([sources.repeat(3), torch.arange(3).repeat_interleave(30)])
    edges = torch.cat([cycle, into], dim=1)
    options = {"num_walks": 2, "coupling": "iid", "dtype": torch.float64, "generator": seeded()}
    for edge_index in (edges, edges.flip(0)):
        with pytest.warns(UserWarning, match=r"the variance of katz.* is infinite"):
            kernel = GRFKernel(edge_index, katz(0.5), **options)
        with pytest.raises(ValueError, match="their variance is infinite or nearly so"):
            kernel.exact_variance()
    for max_length in (2, 3):  # finite, and of a pair of nodes the same as of the pair the other way round
        cut = {**options, "max_length": max_length, "num_walks": 4000}
        found = [GRFKernel(edge_index, katz(0.5), **cut).exact_variance() for edge_index in (edges, edges.flip(0))]
        assert_close(found[0], found[1].t())


@pytest.mark.parametrize("t", [10.0, 20.0, 50.0])
def test_large_errors_warn(t):
    """Finite variances may be huge: the warning's number is below the exact one, by what a diagonal is below 1."""
    options = {"coupling": "iid", "dtype": torch.float64, "generator": seeded()}
    with pytest.warns(UserWarning, match=r"the error of heat\(t=\d+\) from 16 walks .*StitchedKernel") as caught:
        kernel = GRFKernel(ring(20), heat(t), **options)
    estimated = float(str(caught[0].message).split("estimated at ")[1].split(" times")[0])
    exact = kernel.exact()
    error = float(kernel.exact_variance().sum().sqrt() / torch.linalg.matrix_norm(exact))
    assert 1 <= estimated <= error
    assert error < 1.2 * estimated / float(exact.diag().mean())
    remedied = GRFKernel(ring(20), heat(t), **options, p_halt=2 / t)  # no warning
    assert float(remedied.exact_variance().sum().sqrt() / torch.linalg.matrix_norm(exact)) < 1
    with pytest.warns(UserWarning, match="the error of heat"):
        GRFKernel(ring(20), heat(1.0), **options).with_series(heat(t))
    GRFKernel(ring(20), heat(1.0), **options).with_modulation(heat(t).modulation(90))  # one's own: no check


def test_modulations_beyond_their_dtype_warn():
    with pytest.warns(UserWarning, match="estimated at inf times the kernel"):
        GRFKernel(ring(6), heat(t=300.0), p_halt=0.006, dtype=torch.float32, generator=seeded())


@pytest.mark.filterwarnings("ignore:series. the error of heat")
def test_exact_at_large_times():
    for t in (720.0, 800.0, 5000.0):
        assert_close(
            GRFKernel(ring(20), heat(t), generator=seeded(), dtype=torch.float64, max_length=3).exact(),
            torch.full((20, 20), 0.05, dtype=torch.float64),
        )
    one_way = ring(5)[:, :5]
    with pytest.raises(ValueError, match="or its sum is beyond float64"):
        GRFKernel(one_way, heat(t=800.0), generator=seeded(), max_length=3).exact()


def test_two_modulations_of_equal_values_learn_apart():
    kernel = make(two_sets=False)
    f1, f2 = (heat().modulation(6).requires_grad_() for _ in range(2))
    v = torch.randn(12, dtype=torch.float64)
    phi1, phi2 = kernel.features((f1, f2))
    slopes = torch.autograd.grad(phi1.matmul(phi2.t_matmul(v)).dot(v), (f1, f2))
    assert_close(slopes[0], slopes[1])  # of a symmetric function
    assert slopes[0].abs().min() > 0
    phi1, phi2 = kernel.features((f1, f1))
    assert phi1 is phi2
    (both,) = torch.autograd.grad(phi1.matmul(phi2.t_matmul(v)).dot(v), f1)
    assert_close(both, 2 * slopes[0])


def test_spectral_radius_of_squares_is_that_of_the_rule(named_graph):
    """A.5: c^2 / (1 - p) on any unweighted graph; the same by power iteration where weights are given."""
    edges = named_graph("karate")
    ones = torch.ones(edges.size(1))
    with pytest.warns(UserWarning, match=r"take p_halt below 0.75,"):
        GRFKernel(edges, regularised_laplacian(s=1.0), ones, p_halt=0.7501, generator=seeded())
    GRFKernel(edges, regularised_laplacian(s=1.0), ones, p_halt=0.7499, generator=seeded())
