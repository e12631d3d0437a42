from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from geo import gp as gp_module
from geo.gp import GraphGP, conjugate_gradients
from geo.kernels import GRFKernel, SparseFeatures, custom, heat, pair, personalised_pagerank, regularised_laplacian
from geo.nn import LearnableModulation
from geo.testing import assert_close, assert_state_dict_roundtrip

N = 30


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cycle(num_nodes=N):
    node = torch.arange(num_nodes)
    edges = torch.stack((node, (node + 1) % num_nodes))
    return torch.cat((edges, edges.flip(0)), 1)


def kernel(series=None, num_nodes=N, **options):
    options = {"two_sets": False, "generator": seeded(1), "dtype": torch.float64, **options}
    return GRFKernel(cycle(num_nodes), heat(3.0) if series is None else series, **options)


def problem(outputs=None, seed=0):
    """Twenty nodes in any order, with targets."""
    nodes = torch.randperm(N, generator=seeded(seed))[:20]
    wave = torch.sin(nodes.double() * 2 * math.pi / N)
    noise = torch.randn(20, outputs or 1, dtype=torch.float64, generator=seeded(seed))
    y = wave.unsqueeze(1) + 0.2 * noise + torch.arange(outputs or 1)
    return nodes, y if outputs else y.squeeze(1)


class Dense:
    """The same process by Cholesky factors of dense matrices, zero mean."""

    def __init__(self, phi, nodes, scale, noise):
        self.full = scale * phi @ phi.t()
        self.nodes = nodes
        self.seen = self.full[nodes][:, nodes] + noise * torch.eye(len(nodes), dtype=torch.float64)
        self.factor = torch.linalg.cholesky(self.seen)

    def mean(self, y):
        return self.full[:, self.nodes] @ torch.cholesky_solve(y.view(len(y), -1), self.factor)

    def covariance(self):
        return self.full - self.full[:, self.nodes] @ torch.cholesky_solve(self.full[self.nodes], self.factor)

    def log_likelihood(self, y):
        y = y.view(len(y), -1)
        log_det = 2 * self.factor.diag().log().sum()
        fit = (y * torch.cholesky_solve(y, self.factor)).sum()
        return -0.5 * (fit + y.size(1) * (log_det + len(y) * math.log(2 * math.pi)))


def dense(gp, nodes):
    """The dense process at the present parameters, differentiable in them."""
    phi, constant = gp._features()
    return Dense(phi.to_dense(), nodes, gp.log_scale.exp() * constant, gp.log_noise.exp())


# -- oracle 9: dense Cholesky ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("series", [heat(3.0), regularised_laplacian(1.0, 2.0)])
def test_oracle_9_posterior_equals_dense_cholesky(series, outputs):
    gp = GraphGP(kernel(series), noise=0.05, scale=1.7, mean="zero")
    nodes, y = problem(outputs)
    assert gp.fit(nodes, y, steps=0) == []
    mean, variance = gp.predict()
    expected = dense(gp, nodes)
    assert mean.shape == (N, 3) if outputs else (N,)
    assert (mean - expected.mean(y).view_as(mean)).abs().max() < 1e-7
    assert (variance - expected.covariance().diag()).abs().max() < 1e-7
    some = torch.tensor([5, 0, 5])
    mean_of_some, variance_of_some = gp.predict(some)
    assert_close(mean_of_some, mean[some])
    assert (variance_of_some - variance[some]).abs().max() < 1e-7
    mask = torch.zeros(N, dtype=torch.bool)
    mask[some] = True
    assert_close(gp.predict(mask)[0], mean[mask])


def test_the_constant_of_the_kernel_counts():
    k = kernel(heat(3.0))
    phi = k.features()[0]
    nodes, y = problem()
    ours, theirs = GraphGP(k), GraphGP(phi, scale=math.exp(-3.0))
    for gp in (ours, theirs):
        gp.fit(nodes, y, steps=0)
    assert_close(ours.predict(), theirs.predict(), 1e3)  # two runs of conjugate gradients to 1e-8
    modulated = GraphGP(kernel(heat(1.0)), LearnableModulation(60, "heat", heat(3.0)).double())
    modulated.fit(nodes, y, steps=0)
    assert (modulated.predict()[0] - ours.predict()[0]).abs().max() < 1e-5  # t starts in float32


def test_constant_mean():
    gp = GraphGP(kernel(), mean="constant")
    nodes, y = problem(2)
    gp.fit(nodes, y, steps=0)
    centred = GraphGP(kernel(), mean="zero")
    centred.fit(nodes, y - y.mean(0), steps=0)
    assert_close(gp.predict()[0], centred.predict()[0] + y.mean(0))
    assert_close(gp.predict()[1], centred.predict()[1])
    first, second = (p.sample(2, generator=seeded()) for p in (gp, centred))
    assert_close(first, second + y.mean(0))


def test_missing_targets():
    gp, whole = GraphGP(kernel()), GraphGP(kernel())
    nodes, y = problem(2)
    whole.fit(nodes[:15], y[:15], steps=0)
    y[15:] = math.nan
    gp.fit(nodes, y, steps=0)
    assert_close(gp.predict(), whole.predict())
    every = torch.full((N, 2), math.nan, dtype=torch.float64)
    every[nodes] = y
    gp.fit(torch.ones(N, dtype=torch.bool), every, steps=0)
    assert_close(gp.predict(), whole.predict(), 1e3)  # in another order
    gp.fit(nodes[:0], y[:0], steps=0)
    mean, variance = gp.predict()
    assert torch.equal(mean, torch.zeros(N, 2, dtype=torch.float64))
    assert_close(variance, dense(gp, nodes).full.diag())


def test_permutation_with_the_features_given():
    phi = kernel().features()[0].to_dense()
    order = torch.randperm(N)
    place = torch.empty_like(order)
    place[order] = torch.arange(N)
    nodes, y = problem()
    results = []
    for matrix, at in ((phi, nodes), (phi[order][:, order], place[nodes])):
        csr = matrix.to_sparse_coo()
        row, col = csr.indices()
        features = SparseFeatures(torch.searchsorted(row, torch.arange(N + 1)), col, csr.values(), N)
        gp = GraphGP(features)
        gp.fit(at, y, steps=0)
        results.append(gp.predict())
    assert_close(results[1], [t[order] for t in results[0]], 1e3)  # conjugate gradients to 1e-8


# -- log-determinant, marginal likelihood ------------------------------------------------------------------------------
@pytest.mark.parametrize("noise", [0.5, 1e-3])
def test_log_determinant_within_its_standard_error(noise):
    gp = GraphGP(kernel(), noise=noise)
    nodes, y = problem()
    gp.fit(nodes, y, steps=0)
    expected = float(torch.linalg.slogdet(dense(gp, nodes).seen.detach())[1])
    runs = [gp.log_determinant(32, seeded(k)) for k in range(40)]
    z = torch.tensor([(value - expected) / error for value, error in runs])
    assert z.abs().max() < 4.5
    assert 0.7 < float(z.square().mean().sqrt()) < 1.4


def basis(n, k, like, generator):
    """Probes that make every trace exact."""
    return math.sqrt(n) * torch.eye(n, dtype=like.dtype)


@pytest.mark.parametrize("outputs", [None, 3])
@pytest.mark.parametrize("kind", [None, "free", "matern"])
def test_marginal_likelihood_and_its_gradient_with_exact_traces(kind, outputs, monkeypatch):
    monkeypatch.setattr(gp_module, "_signs", basis)
    modulation = None if kind is None else LearnableModulation(12, kind).double()
    gp = GraphGP(kernel(), modulation, noise=0.1, scale=1.3, mean="zero")
    nodes, y = problem(outputs)
    gp.fit(nodes, y, steps=0)
    found = gp.log_marginal_likelihood(20)
    expected = dense(gp, nodes).log_likelihood(y)
    assert (found - expected).abs() < 1e-6 * expected.abs()
    parameters = list(gp.parameters())
    assert len(parameters) == (2 if kind is None else 3)
    for ours, theirs in zip(*(torch.autograd.grad(v, parameters) for v in (found, expected)), strict=True):
        assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_marginal_likelihood_is_unbiased():
    gp = GraphGP(kernel(), LearnableModulation(5).double(), noise=0.1, mean="zero")
    nodes, y = problem(2)
    gp.fit(nodes, y, steps=0)
    parameters, rows = list(gp.parameters()), []
    for k in range(400):
        value = gp.log_marginal_likelihood(2, seeded(k))
        grads = torch.autograd.grad(value, parameters)
        rows.append(torch.cat([value.detach().view(1), *(g.flatten() for g in grads)]))
    found = torch.stack(rows)
    expected = dense(gp, nodes).log_likelihood(y)
    grads = torch.autograd.grad(expected, parameters)
    wanted = torch.cat([expected.detach().view(1), *(g.flatten() for g in grads)])
    z = (found.mean(0) - wanted) / (found.std(0) / math.sqrt(len(rows)))
    assert z.abs().max() < 4


def test_gradient_of_given_features(monkeypatch):
    monkeypatch.setattr(gp_module, "_signs", basis)
    phi = kernel().features()[0]
    value = phi.value.detach().clone().requires_grad_()
    gp = GraphGP(phi.with_value(value), mean="zero")
    nodes, y = problem()
    gp.fit(nodes, y, steps=0)
    (ours,) = torch.autograd.grad(gp.log_marginal_likelihood(20), value)
    (theirs,) = torch.autograd.grad(dense(gp, nodes).log_likelihood(y), value)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_fit_learns_the_process_that_drew_the_targets():
    """From a start far from it, nearly to its likelihood."""
    k = kernel(heat(4.0), 200, num_walks=64)
    truth = GraphGP(k, noise=0.05, scale=40.0, mean="zero")
    nodes = torch.randperm(200, generator=seeded())[:150]
    noise = math.sqrt(0.05) * torch.randn(150, dtype=torch.float64, generator=seeded(3))
    y = truth.sample(1, nodes, seeded(2))[0] + noise
    truth.fit(nodes, y, steps=0)
    gp = GraphGP(k, LearnableModulation(20, "heat", heat(1.0)).double(), noise=1.0, mean="zero")
    losses = gp.fit(nodes, y, steps=60, lr=0.15, num_probes=8, generator=seeded(4))
    assert len(losses) == 60
    found, wanted = (-p.log_marginal_likelihood(64, seeded(5)).item() / 150 for p in (gp, truth))
    assert found < wanted + 0.04
    assert found < losses[0] - 1
    assert gp.modulation.hyperparameters()["t"] == pytest.approx(4.0, rel=0.3)
    assert math.exp(gp.log_noise.item()) < 0.3


# -- samples -----------------------------------------------------------------------------------------------------------
def test_pathwise_samples_have_the_moments_of_the_posterior():
    gp = GraphGP(kernel(), noise=0.05, scale=20.0, mean="zero")
    nodes, y = problem()
    gp.fit(nodes, y, steps=0)
    count = 20000
    paths = gp.sample(count, generator=seeded())
    assert paths.shape == (count, N)
    expected = dense(gp, nodes)
    variance = expected.covariance().diag().detach()
    z = (paths.mean(0) - expected.mean(y).squeeze(1).detach()) / (variance / count).sqrt()
    assert z.abs().max() < 4.5
    covariance = expected.covariance().detach()
    assert (torch.cov(paths.t()) - covariance).norm() < 0.05 * covariance.norm()
    mean, estimate = gp.predict(num_samples=4000, generator=seeded(1))
    assert_close(mean, gp.predict()[0])
    assert (estimate / variance - 1).abs().max() < 0.15


def test_prior_samples():
    gp = GraphGP(kernel(), scale=3.0)
    paths = gp.sample(20000, generator=seeded())
    prior = dense(gp, torch.arange(2)).full.detach()
    assert (torch.cov(paths.t()) - prior).norm() < 0.05 * prior.norm()


def test_samples_of_several_outputs():
    gp = GraphGP(kernel(), noise=1e-4, scale=20.0)
    nodes, y = problem(3)
    gp.fit(nodes, y, steps=0)
    paths = gp.sample(5, nodes, seeded())
    assert paths.shape == (5, 20, 3)
    near = gp.predict(nodes)[0]
    assert (paths - near).abs().max() < 0.1
    assert (paths[:, :, 0] - paths[:, :, 1] + 1).abs().max() > 1e-3
    assert torch.equal(gp.sample(5, nodes, seeded()), paths)


# -- solver ------------------------------------------------------------------------------------------------------------
def test_conjugate_gradients():
    a = torch.randn(25, 25, dtype=torch.float64, generator=seeded())
    a = a @ a.t() + 0.1 * torch.eye(25, dtype=torch.float64)
    b = torch.randn(25, 4, dtype=torch.float64, generator=seeded(1))
    b[:, 2] = 0
    b[:, 3] = torch.linalg.eigh(a).eigenvectors[:, 0]  # one iteration is enough
    solution = conjugate_gradients(lambda v: a @ v, b, 1e-12)
    assert (solution.x - torch.linalg.solve(a, b)).abs().max() < 1e-8
    assert solution.residual.max() < 1e-10
    assert (solution.diagonal[1:, 3] == 1).all()
    assert (solution.off_diagonal[:, 2] == 0).all()
    assert solution.diagonal[0, 3] == pytest.approx(float(torch.linalg.eigvalsh(a)[0]), rel=1e-6)
    short = conjugate_gradients(lambda v: a @ v, b, 1e-12, 3)
    t = torch.diag(short.diagonal[:, 0])
    t = t + torch.diag(short.off_diagonal[:-1, 0], 1) + torch.diag(short.off_diagonal[:-1, 0], -1)
    krylov, _ = torch.linalg.qr(torch.stack([b[:, 0], a @ b[:, 0], a @ a @ b[:, 0]], 1))
    assert_close(torch.linalg.eigvalsh(t), torch.linalg.eigvalsh(krylov.t() @ a @ krylov), 1e3)
    assert short.residual[0] > 1e-3
    assert conjugate_gradients(lambda v: a @ v, b[:, :0]).x.shape == (25, 0)


def test_what_conjugate_gradients_cannot_solve():
    b = torch.ones(3, 2, dtype=torch.float64)
    for diagonal in ([1.0, 2.0, -9.0], [0.0, 0.0, 0.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]):
        a = torch.tensor(diagonal, dtype=torch.float64).unsqueeze(1)
        with pytest.raises(ValueError, match="the matrix is not positive definite, or not finite"):
            conjugate_gradients(lambda v, a=a: a * v, b)
    for bad in (math.nan, math.inf):
        b[0, 1] = bad
        with pytest.raises(ValueError, match="b has infinite or NaN entries"):
            conjugate_gradients(lambda v: v, b)


def test_the_tridiagonal_matrix_ends_with_its_column():
    """Columns that need few iterations beside one that needs many have the quadrature they have alone."""
    a = torch.logspace(-6, 0, 40, dtype=torch.float64).unsqueeze(1)
    b = torch.randn(40, 3, dtype=torch.float64, generator=seeded())
    b[4:, 0] = 0
    b[10:, 1] = 0
    together = conjugate_gradients(lambda v: a * v, b, 1e-3)
    found = gp_module._log_determinants(together.diagonal, together.off_diagonal, 40)
    for k in range(3):
        alone = conjugate_gradients(lambda v: a * v, b[:, k : k + 1], 1e-3)
        assert (together.off_diagonal[len(alone.diagonal) - 1 :, k] == 0).all()
        assert_close(found[k : k + 1], gp_module._log_determinants(alone.diagonal, alone.off_diagonal, 40))
        weight = b[:, k].square() / b[:, k].square().sum()
        exact = 40 * (weight * a.squeeze(1).log()).sum()
        assert float(found[k]) == pytest.approx(float(exact), rel=1e-3)
    assert len(together.diagonal) > 12


def test_a_solve_that_does_not_converge_warns():
    gp = GraphGP(kernel(), noise=1e-6, max_iter=3)
    gp.fit(*problem(), steps=0)
    with pytest.warns(RuntimeWarning, match=r"stopped after 3 iterations at a relative residual of .*, or max_iter"):
        gp.predict(torch.tensor([0]))
    gp = GraphGP(kernel(num_walks=2), noise=1e-11, scale=1e3)
    nodes, y = problem()
    gp.fit(nodes.repeat(2), torch.cat((y, y + 1)), steps=0)
    with pytest.warns(RuntimeWarning, match="float64 has no more digits for this condition number, raise noise or tol"):
        gp.predict(return_var=False)


@pytest.mark.slow
def test_iterations_grow_no_faster_than_the_root_of_the_nodes():
    """On cycles, at a noise that falls as 1 / N, so that the condition number grows as N."""
    sizes, counts = [1 << k for k in range(6, 15, 2)], []
    for n in sizes:
        gp = GraphGP(kernel(heat(4.0), n, num_walks=16), noise=4.0 / n, scale=10.0)
        nodes = torch.arange(0, n, 2)
        gp.fit(nodes, torch.randn(n // 2, generator=seeded()), steps=0)
        gp.log_determinant(4, seeded())
        counts.append(gp.iterations)
        print(f"{n:6d} nodes, {gp.iterations:4d} iterations, {gp.iterations / math.sqrt(n):.2f} sqrt(N)")
    assert all(count < 6 * math.sqrt(n) for n, count in zip(sizes, counts, strict=True))
    assert counts[-1] > 2 * counts[0]


# -- mean and variance -------------------------------------------------------------------------------------------------
def test_the_mean_alone_takes_one_solve(monkeypatch):
    gp = GraphGP(kernel())
    nodes, y = problem(2)
    gp.fit(nodes, y, steps=0)
    expected = gp.predict()[0]
    widths, solve = [], gp_module.conjugate_gradients

    def counted(matvec, b, tol, max_iter):
        widths.append(b.size(1))
        return solve(matvec, b, tol, max_iter)

    monkeypatch.setattr(gp_module, "conjugate_gradients", counted)
    assert torch.equal(gp.predict(return_var=False), expected)
    assert torch.equal(gp.predict(nodes, return_var=False), expected[nodes])
    assert widths == [2, 2]


def test_variances_of_many_nodes_are_sampled(monkeypatch):
    """In blocks whose size does not matter; exact on request."""
    gp = GraphGP(kernel(), noise=0.05, scale=20.0)
    nodes, y = problem(2)
    gp.fit(nodes, y, steps=0)
    exact = gp.predict()[1]
    monkeypatch.setattr(gp_module, "_EXACT", N - 1)
    sampled = gp.predict(generator=seeded())[1]
    assert torch.equal(sampled, gp.predict(num_samples=256, generator=seeded())[1])
    z = (sampled / exact - 1) / math.sqrt(2 / 256)
    assert 0 < z.abs().max() < 4.5
    assert (gp.predict(nodes)[1] - exact[nodes]).abs().max() < 1e-7
    assert torch.equal(gp.predict(num_samples=0)[1], exact)
    monkeypatch.setattr(gp_module, "_BLOCK", 7 * N)
    blocks = gp.predict(num_samples=2000, generator=seeded())[1]
    assert (blocks / exact - 1).abs().max() < 4.5 * math.sqrt(2 / 2000)
    assert (gp.predict(num_samples=1)[1] >= 0).all()


# -- the module --------------------------------------------------------------------------------------------------------
def test_walks_sampled_anew_are_seen():
    k = kernel()
    gp = GraphGP(k, mean="zero")
    nodes, y = problem()
    gp.fit(nodes, y, steps=0)
    first = gp.predict()[0]
    k.resample(seeded(7))
    second = gp.predict()[0]
    assert not torch.allclose(first, second)
    assert (second - dense(gp, nodes).mean(y).squeeze(1)).abs().max() < 1e-7


def test_a_trained_modulation_stays_trained():
    modulation = LearnableModulation(4, "mlp")
    with torch.no_grad():
        for parameter in modulation.parameters():
            parameter += 0.1
    before = modulation().detach()
    gp = GraphGP(kernel(), modulation)
    assert torch.equal(modulation(), before)
    gp.reset_parameters()
    assert_close(modulation(), heat(1.0).modulation(5).float())


class Modulation(nn.Module):
    """The least that is asked for: without a constant, without a start."""

    def __init__(self):
        super().__init__()
        self.f = nn.Parameter(heat(3.0).modulation(40))

    def forward(self):
        return self.f


def test_any_function_is_a_modulation():
    nodes, y = problem()
    means = []
    for modulation in (None, Modulation(), lambda: heat(3.0).modulation(40)):
        gp = GraphGP(kernel(), modulation, noise=0.3)
        gp.fit(nodes, y, steps=2, generator=seeded())
        gp.reset_parameters()
        if isinstance(modulation, Modulation):
            assert not torch.equal(modulation.f, heat(3.0).modulation(40))
        else:
            means.append(gp.predict(return_var=False))
    assert math.exp(gp.log_noise.item()) == pytest.approx(0.3)
    assert_close(means[1], means[0], 1e3)  # conjugate gradients to 1e-8


def test_fit_where_edge_weights_and_features_learn_elsewhere():
    nodes, y = problem()
    weight = torch.full((2 * N,), 0.7, dtype=torch.float64, requires_grad=True)
    twice = {"edge_weight": weight.detach()}, {"edge_weight": weight}
    losses = [GraphGP(kernel(**o)).fit(nodes, y, steps=3, generator=seeded()) for o in twice]
    assert weight.grad is None
    assert losses[0] == losses[1]
    phi = kernel(edge_weight=weight).features()[0]
    assert phi.value.requires_grad
    assert GraphGP(phi, scale=heat(3.0).scale).fit(nodes, y, steps=3, generator=seeded()) == pytest.approx(losses[0])


def test_targets_without_variation_warn():
    gp = GraphGP(kernel())
    gp.fit(torch.tensor([3]), torch.tensor([2.0]), steps=0)
    assert gp.predict(return_var=False).allclose(torch.tensor(2.0, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match=r"y never differs from its mean .* give targets that vary, or steps=0"):
        gp.fit(torch.tensor([3]), torch.tensor([2.0]), steps=1)


def test_nodes_that_come_and_go():
    k = kernel(coupling="antithetic", choice="rendezvous")
    gp = GraphGP(k, mean="zero")
    nodes, y = problem()
    gp.fit(nodes, y, steps=0)
    k.update(nodes_added=1, edges_added=torch.tensor([[0, N], [N, 0]]))
    assert (gp.predict(return_var=False) - dense(gp, nodes).mean(y).squeeze(1)).abs().max() < 1e-7
    k.update(nodes_removed=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"kernel has lost nodes since fit\(\), .*: call fit\(nodes, y\) again"):
        gp.predict()
    gp.fit(nodes[nodes > 0] - 1, y[nodes > 0], steps=0)
    assert gp.predict(return_var=False).shape == (N,)


def test_state_dict_and_reset():
    nodes, y = problem()
    k = kernel()

    def make():
        gp = GraphGP(k, LearnableModulation(6))
        for parameter in gp.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        return gp

    def run(gp):
        gp.fit(nodes, y, steps=0)
        return gp.predict()

    assert_state_dict_roundtrip(make, run)
    gp = GraphGP(k, LearnableModulation(6), noise=0.3)
    before = run(gp)
    gp.fit(nodes, y, steps=3)
    assert not torch.allclose(gp.predict()[0], before[0])
    gp.reset_parameters()
    assert torch.equal(gp.predict()[0], before[0])


def test_float32_kernels_are_solved_in_float64():
    gp = GraphGP(kernel(dtype=torch.float32), noise=1e-4)
    nodes, y = problem()
    gp.fit(nodes, y.float(), steps=0)
    mean, _ = gp.predict()
    assert mean.dtype == torch.float64
    offset = y.float().double().mean()
    assert (mean - offset - dense(gp, nodes).mean(y.float().double() - offset).squeeze(1)).abs().max() < 1e-6


def test_every_device(device):
    nodes, y = problem()
    results = []
    for d in ("cpu", device):
        phi = kernel().features()[0]
        moved = SparseFeatures(*(t.to(d) for t in (phi.ptr, phi.col, phi.value)), N)
        gp = GraphGP(moved)
        gp.fit(nodes, y, steps=0)
        results.append([t.cpu() for t in gp.predict()])
    assert_close(results[1], results[0], 1e3)  # conjugate gradients to 1e-8


def test_refusals():
    for name in ("noise", "scale", "tol", "max_iter"):
        with pytest.raises(ValueError, match=f"{name} is 0, but must be positive and finite"):
            GraphGP(kernel(), **{name: 0})
    with pytest.raises(ValueError, match="mean is 'linear', but must be 'constant' or 'zero'"):
        GraphGP(kernel(), mean="linear")
    with pytest.raises(ValueError, match="modulation is given with features"):
        GraphGP(kernel().features()[0], LearnableModulation(4))
    for series in (personalised_pagerank(0.6), pair([1.0, 1.0], [1.0])):
        with pytest.raises(ValueError, match=r"kernel is GRFKernel.*but must be symmetric"):
            GraphGP(kernel(series))
    with pytest.raises(ValueError, match="but must be symmetric: on an undirected graph"):
        GraphGP(GRFKernel(torch.tensor([[0, 1], [1, 2]]), heat(1.0)))
    gp, (nodes, y) = GraphGP(kernel()), problem()
    for call in (gp.predict, gp.log_marginal_likelihood, gp.log_determinant):
        with pytest.raises(ValueError, match=r"there are no targets yet: call fit\(nodes, y\) first"):
            call()
    with pytest.raises(ValueError, match=r"y has shape \(19,\), but must be \(20,\) or \(20, T\)"):
        gp.fit(nodes, y[1:])
    with pytest.raises(ValueError, match=r"y\[2\] has some outputs missing"):
        gp.fit(nodes, torch.where(torch.arange(40).view(20, 2) == 5, math.nan, 1.0))
    with pytest.raises(ValueError, match="y has infinite entries"):
        gp.fit(nodes, y / 0)
    with pytest.raises(ValueError, match=r"nodes is torch.float64 \(20,\), but must be int64 indices \(n,\) or a mask"):
        gp.fit(nodes.double(), y)
    with pytest.raises(ValueError, match=r"nodes has 0 to 30, but must be in 0\.\.29"):
        gp.fit(torch.tensor([0, 30]), y[:2])
    gp.fit(nodes, y, steps=0)
    with pytest.raises(ValueError, match="num_probes is 1, but a standard error needs at least 2"):
        gp.log_determinant(1)
    with pytest.raises(ValueError, match="num_probes is 0, but must be at least 1"):
        gp.log_marginal_likelihood(0)
    with pytest.raises(ValueError, match="num_samples is -1, but must be at least 1, or 0 for the exact variance"):
        gp.predict(num_samples=-1)


def test_indefinite_kernels_are_refused():
    for scale in (-1.0, 0.0):
        with pytest.raises(ValueError, match=f"kernel has the constant {scale:g}, but must be positive semi-definite"):
            GraphGP(kernel(custom([1.0, 0.5], scale=scale)))
    modulation = LearnableModulation(1, init=custom([1.0, 0.5], scale=-1.0))
    with pytest.raises(
        ValueError, match="kernel has the constant -1, but must be positive semi-definite: give the seri"
    ):
        GraphGP(kernel(), modulation)
    debiased = kernel(coupling="iid", debias_diag=True)
    with pytest.raises(ValueError, match="with debias_diag=True, which may have negative eigenvalues: build it with"):
        GraphGP(debiased)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    phi = kernel().features()[0]
    value = phi.value.clone()
    value[0] = bad
    with pytest.raises(ValueError, match="kernel has features that are infinite or NaN"):
        GraphGP(phi.with_value(value))
    gp = GraphGP(kernel(), LearnableModulation(4))
    gp.fit(*problem(), steps=0)
    with torch.no_grad():
        gp.modulation.raw[1] = bad
    for call in (gp.predict, gp.sample, gp.log_determinant, gp.log_marginal_likelihood):
        with pytest.raises(ValueError, match=r"kernel has features that are infinite or NaN: .* of the modulation"):
            call()
    gp = GraphGP(kernel())
    gp.fit(*problem(), steps=0)
    with torch.no_grad():
        gp.log_noise.fill_(bad)
    with pytest.raises(ValueError, match=r"the matrix is not positive definite, or not finite, .*: raise the noise"):
        gp.predict()


def test_repr():
    text = repr(GraphGP(kernel(), LearnableModulation(4), noise=0.25))
    assert text.startswith("GraphGP(\n  30, noise=0.25, scale=1, mean='constant', tol=1e-08, max_iter=10000\n")
    assert "(modulation): LearnableModulation(4, kind='free'" in text
