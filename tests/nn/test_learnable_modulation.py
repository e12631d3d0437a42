from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from geo.kernels import (
    FeatureMap,
    SparseFeatures,
    custom,
    features_of,
    heat,
    inverse_cosine,
    matern,
    normalized_adjacency,
    regularised_laplacian,
    tail_mass,
)
from geo.nn import LearnableModulation
from geo.ops import grf_walks
from geo.testing import assert_close, assert_state_dict_roundtrip, check_compile, check_derivatives

KINDS = ("free", "mlp", "heat", "matern", "regularised_laplacian")
STARTS = {
    "free": inverse_cosine(0.5),
    "mlp": inverse_cosine(0.5),
    "heat": heat(2.5),
    "matern": matern(2.0, 3.0),
    "regularised_laplacian": regularised_laplacian(0.7, 1.3),
}


def graph(num_nodes=12, num_edges=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(num_nodes, (2, num_edges), generator=generator)
    return torch.cat((edges, edges.flip(0)), 1)


def walks(max_length=None, num_walks=8):
    rowptr, col, weight = normalized_adjacency(graph(), num_nodes=12, dtype=torch.float64)
    return grf_walks(rowptr, col, weight, num_walks=num_walks, seed=3, max_length=max_length)


@pytest.mark.parametrize("max_length", [0, 1, 2, 9, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_the_series(kind, max_length, double):
    start = STARTS[kind]
    modulation = LearnableModulation(max_length, kind, start)
    f = modulation()
    assert f.dtype == torch.float64
    assert_close(f, start.modulation(max_length + 1), 1e-2)
    assert modulation.scale().item() == pytest.approx(start.scale, rel=1e-12)
    default = LearnableModulation(max_length, kind)()
    expected = {"matern": matern(1.5, 1.0), "regularised_laplacian": regularised_laplacian(1.0, 1.0)}
    assert_close(default, expected.get(kind, heat(1.0)).modulation(max_length + 1), 1e-2)


def test_hyperparameters_are_read_off_the_series(double):
    assert LearnableModulation(5, "heat", heat(2.5)).hyperparameters() == pytest.approx({"t": 2.5})
    found = LearnableModulation(5, "matern", matern(0.3, 7.0)).hyperparameters()
    assert found == pytest.approx({"nu": 0.3, "kappa": 7.0}, rel=1e-9)
    found = LearnableModulation(0, "regularised_laplacian", regularised_laplacian(3.0, 0.5)).hyperparameters()
    assert found == pytest.approx({"s": 3.0, "d": 0.5}, rel=1e-9)
    assert LearnableModulation(5).hyperparameters() == {}


@pytest.mark.parametrize("kind", ["heat", "matern", "regularised_laplacian"])
def test_closed_forms_are_the_named_kernels_at_every_hyperparameter(kind, double):
    """F(W)^2 times the scale, against dense functions of the Laplacian."""
    rowptr, col, weight = normalized_adjacency(graph(), num_nodes=12)
    w = SparseFeatures(rowptr, col, weight, 12).to_dense().numpy()
    laplacian, eye = np.eye(12) - w, np.eye(12)
    modulation = LearnableModulation(150, kind)
    with torch.no_grad():
        modulation.raw += torch.tensor([0.3, -0.2])[: modulation.raw.numel()]
    value = modulation.hyperparameters()
    if kind == "heat":
        expected = expm(-value["t"] * laplacian)
    else:
        if kind == "matern":
            base, power = 2 * value["nu"] / value["kappa"] ** 2 * eye + laplacian, value["nu"]
        else:
            base, power = eye + value["s"] ** 2 * laplacian, value["d"]
        eigval, eigvec = np.linalg.eigh(base)
        expected = (eigvec * eigval**-power) @ eigvec.T
    total, step = np.zeros((12, 12)), eye
    for f in modulation().tolist():
        total, step = total + f * step, step @ w
    assert np.abs(modulation.scale().item() * total @ total - expected).max() < 1e-10


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind, positive):
    modulation = LearnableModulation(6, kind, None if positive else STARTS[kind], positive).double()
    names = [name for name, _ in modulation.named_parameters()]
    values = [p.detach() + 0.1 for p in modulation.parameters()]

    def run(*values):
        module = dict(zip(names, values, strict=True))
        f = torch.func.functional_call(modulation, module, ())
        return f.square() + f

    check_derivatives(run, values)
    modulation().sum().backward()
    assert all(p.grad is not None for p in modulation.parameters())


def test_the_gradient_of_a_kernel_on_fixed_walks():
    """dK / df_l = M_l Phi^T + Phi M_l^T, and finite differences."""
    deposits = walks()
    modulation = LearnableModulation(5).double()
    maps = FeatureMap(deposits, 12, 6)
    cotangent = torch.randn(12, 12, dtype=torch.float64)

    def kernel(f):
        phi = maps(f)
        return phi.matmul(phi.to_dense().t())

    check_derivatives(kernel, [modulation().detach()])
    (kernel(modulation()) * cotangent).sum().backward()
    phi = maps(modulation().detach()).to_dense()
    for length in range(6):
        one = maps(torch.eye(6, dtype=torch.float64)[length]).to_dense()
        expected = ((one @ phi.t() + phi @ one.t()) * cotangent).sum()
        assert_close(modulation.raw.grad[length], expected)


@pytest.mark.parametrize("kind", ["free", "mlp"])
def test_positive(kind):
    modulation = LearnableModulation(6, kind, positive=True)
    for parameter in modulation.parameters():
        nn.init.normal_(parameter, std=1.0 if kind == "mlp" else 4.0)
    assert bool((modulation() > 0).all())
    modulation = LearnableModulation(6, kind)
    for parameter in modulation.parameters():
        nn.init.normal_(parameter, std=1.0 if kind == "mlp" else 4.0)
    assert bool((modulation() < 0).any())


def test_a_kernel_is_learned_from_its_matrix():
    """The Frobenius fit of the paper: a free modulation finds the kernel of a graph that it does not start at."""
    rowptr, col, weight = normalized_adjacency(graph(), num_nodes=12, dtype=torch.float64)
    deposits = grf_walks(rowptr, col, weight, num_walks=4096, seed=0)
    w = SparseFeatures(rowptr, col, weight, 12).to_dense()
    target = torch.linalg.inv(1.5 * torch.eye(12, dtype=torch.float64) - w)
    modulation = LearnableModulation(10).double()
    maps = FeatureMap(deposits, 12, 11)
    optimizer = torch.optim.Adam(modulation.parameters(), 0.03)
    errors = []
    for _ in range(200):
        phi = maps(modulation()).to_dense()
        error = (phi @ phi.t() - target).norm() / target.norm()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[0] > 0.3
    assert errors[-1] < 0.05


def test_tail_mass():
    deposits = walks()
    modulation = LearnableModulation(3)
    expected = deposits.value.abs()[deposits.length > 3].sum() / deposits.value.abs().sum()
    assert modulation.tail_mass(deposits) == pytest.approx(float(expected))
    assert modulation.tail_mass(deposits) == tail_mass(deposits, 4)
    assert 0 < modulation.tail_mass(deposits) < 0.5
    assert LearnableModulation(3).tail_mass(walks(max_length=3)) == 0.0
    features = features_of(deposits, modulation(), 12).to_dense()
    assert_close(features, features_of(walks(max_length=3), modulation(), 12).to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    def make():
        modulation = LearnableModulation(4, kind)
        for parameter in modulation.parameters():
            nn.init.normal_(parameter)
        return modulation

    assert_state_dict_roundtrip(make, lambda m: (m(), m.scale()))


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters(kind):
    modulation = LearnableModulation(4, kind)
    first = modulation().detach()
    with torch.no_grad():
        for parameter in modulation.parameters():
            parameter += 1
    assert not torch.allclose(modulation(), first)
    modulation.reset_parameters()
    assert torch.equal(modulation(), first)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    modulation = LearnableModulation(4, kind)
    if kind == "mlp":
        nn.init.normal_(modulation.mlp.lins[-1].weight)
    with torch.autocast("cpu", torch.bfloat16):
        f = modulation()
    assert f.dtype == torch.float32
    assert torch.equal(f, modulation())


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    modulation = LearnableModulation(4, kind)
    check_compile(lambda x: x * modulation(), (torch.ones(5),))


def test_every_device(device):
    modulation = LearnableModulation(4, "matern").to(device)
    assert_close(modulation().cpu(), LearnableModulation(4, "matern")())


def test_refusals():
    with pytest.raises(ValueError, match="kind is 'q', but must be one of 'free', 'mlp', 'heat'"):
        LearnableModulation(4, "q")
    for value in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f"max_length is {value}, but must be an integer of at least 0"):
            LearnableModulation(value)
    with pytest.raises(ValueError, match="hidden_channels is 0"):
        LearnableModulation(4, "mlp", hidden_channels=0)
    with pytest.raises(ValueError, match="init is not a kernel of kind 'heat'"):
        LearnableModulation(4, "heat", matern(1.0, 1.0))
    for kind in ("matern", "regularised_laplacian"):
        with pytest.raises(ValueError, match=f"init is not a kernel of kind '{kind}'"):
            LearnableModulation(4, kind, heat(1.0))
        with pytest.raises(ValueError, match=f"init is not a kernel of kind '{kind}'"):
            LearnableModulation(4, kind, custom([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"init has the coefficient -0\.09\d* at length 2, but positive=True"):
        LearnableModulation(4, init=inverse_cosine(0.5), positive=True)


def test_repr():
    assert repr(LearnableModulation(4, "heat")) == "LearnableModulation(4, kind='heat', positive=True, t=1)"
    assert repr(LearnableModulation(4)) == "LearnableModulation(4, kind='free', positive=False)"
    assert "kind='mlp', positive=True, hidden_channels=8" in repr(
        LearnableModulation(4, "mlp", positive=True, hidden_channels=8)
    )
    assert math.isclose(LearnableModulation(4, "matern").hyperparameters()["nu"], 1.5, rel_tol=1e-6)
