from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import networkx
import numpy
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

from geo.bench import peak_extra_memory
from geo.bench.spe import loop
from geo.nn import SPE, SignNet, pad_spectrum, spe_rho
from geo.ops import pair_mlp, spectral_filter
from geo.testing import assert_alone_equals_batched, assert_permutation_equivariant, assert_state_dict_roundtrip
from geo.transforms import AddLaplacianSpectrum

Graph = tuple[Tensor, Tensor, Tensor]  # adjacency, eigenvalues, eigenvectors


def spectrum(adjacency: Tensor) -> Graph:
    """A graph with the eigenpairs of its normalised Laplacian, by numpy; an isolated node has L_ii = 0."""
    a = adjacency.numpy().astype(numpy.float64)
    degree = a.sum(1)
    scale = numpy.where(degree > 0, 1 / numpy.sqrt(numpy.maximum(degree, 1e-300)), 0.0)
    eigvals, eigvecs = numpy.linalg.eigh(numpy.diag((degree > 0) * 1.0) - scale[:, None] * a * scale)
    return adjacency, torch.from_numpy(eigvals), torch.from_numpy(eigvecs)


def random_graph(num_nodes: int, seed: int = 0) -> Graph:
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(num_nodes, num_nodes, generator=generator).lt(0.4).double().triu(1)
    return spectrum(upper + upper.T)


def batched(graphs: list[Graph]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of the layer: eigvals, eigvecs, edge_index, batch, eig_mask."""
    width = max(len(eigvals) for _, eigvals, _ in graphs)
    eigvals = torch.zeros(len(graphs), width, dtype=torch.float64)
    eig_mask = torch.zeros(len(graphs), width, dtype=torch.bool)
    eigvecs, edges, batch, first = [], [], [], 0
    for g, (adjacency, values, vectors) in enumerate(graphs):
        eigvals[g, : len(values)], eig_mask[g, : len(values)] = values, True
        eigvecs.append(nn.functional.pad(vectors, (0, width - vectors.size(1))))
        edges.append(adjacency.nonzero().T + first)
        batch.append(torch.full((len(adjacency),), g))
        first += len(adjacency)
    return eigvals, torch.cat(eigvecs), torch.cat(edges, dim=1), torch.cat(batch), eig_mask


def make(phi: str = "mlp", rho: str = "gin", **options: Any) -> SPE:
    given = {"rho_hidden": 8, "rho_layers": 3, "act": "tanh", **options}
    return SPE(5, 4, phi, rho, **given).double().eval()


def naive(spe: SPE, graphs: list[Graph]) -> Tensor:
    """The definition with rho='gin' and the sum, graph by graph on dense matrices."""
    out = []
    for adjacency, eigvals, eigvecs in graphs:
        z = spe.phi(eigvals.unsqueeze(0)).squeeze(0)
        x = torch.einsum("ik,km,jk->ijm", eigvecs, z, eigvecs)
        network = spe.rho.columns.network
        for eps, mlp in zip(network.eps, network.mlps, strict=True):
            x = mlp((1 + eps) * x + torch.einsum("is,sjc->ijc", adjacency.double(), x))
        out.append(spe.rho.last(x).sum(1))
    return torch.cat(out)


# -- graphs and filters ------------------------------------------------------------------------------------------------
class Elementwise(nn.Module):
    """A phi of given functions."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, eigvals: Tensor, eig_mask: Tensor) -> Tensor:
        return torch.stack([function(eigvals) for function in self.functions], dim=-1)


def adjacency_of(graph: networkx.Graph) -> Tensor:
    return torch.from_numpy(networkx.to_numpy_array(graph))


def cycle(n: int) -> Tensor:
    return adjacency_of(networkx.cycle_graph(n))


def rook() -> Tensor:
    return adjacency_of(networkx.line_graph(networkx.complete_bipartite_graph(4, 4)))


def shrikhande() -> Tensor:
    cells = list(itertools.product(range(4), repeat=2))
    steps = {(0, 1), (0, 3), (1, 0), (3, 0), (1, 1), (3, 3)}
    return torch.tensor([[float(((a - c) % 4, (b - d) % 4) in steps) for c, d in cells] for a, b in cells]).double()


def petersen() -> Tensor:
    return adjacency_of(networkx.petersen_graph())


def hypercube() -> Tensor:
    return adjacency_of(networkx.hypercube_graph(3))


DEGENERATE = {
    "cycle": cycle(12),
    "complete": torch.ones(7, 7).double() - torch.eye(7).double(),
    "rook": rook(),
    "petersen": petersen(),
    "disconnected": torch.block_diag(cycle(4), cycle(4), cycle(3)),
    "isolated": torch.block_diag(cycle(5), torch.zeros(3, 3)),
}


def laplacian(adjacency: Tensor) -> Tensor:
    _, eigvals, eigvecs = spectrum(adjacency)
    return eigvecs * eigvals @ eigvecs.T


def filtered(eigvals: Tensor, eigvecs: Tensor, *functions: Callable[[Tensor], Tensor]) -> Tensor:
    """W [m, n, n] of one graph, for given functions."""
    spe = SPE(2, len(functions), Elementwise(*functions), "mlp").double()
    pairs, pair_ptr, row, col = spe.weight_matrices(eigvals.unsqueeze(0), eigvecs)
    n = len(eigvals)
    assert pair_ptr.tolist() == [0, n * n]
    assert torch.equal(row * n + col, torch.arange(n * n))
    return pairs.view(n, n, -1).permute(2, 0, 1)


def apart(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max()) if expected.numel() else 0.0


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert actual.shape == expected.shape
    error = apart(actual, expected)
    assert error <= tolerance * scale, error / scale


# -- 1: closed forms ---------------------------------------------------------------------------------------------------
def bump(x: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.3 * x**2


@pytest.mark.parametrize("n", [3, 8, 11])
def test_check_1_cycles(n):
    k, i = torch.arange(n).double(), torch.arange(n).double()
    waves = torch.cos(2 * math.pi * k.view(-1, 1, 1) * (i.view(-1, 1) - i) / n)
    expected = (bump(1 - torch.cos(2 * math.pi * k / n)).view(-1, 1, 1) * waves).sum(0) / n
    close(filtered(*spectrum(cycle(n))[1:], bump)[0], expected, 1e-14)


@pytest.mark.parametrize("n", [2, 6])
def test_check_1_complete_graphs(n):
    one, eye = torch.ones(n, n).double() / n, torch.eye(n).double()
    at = bump(torch.tensor([0.0, n / (n - 1)], dtype=torch.float64))
    close(filtered(*spectrum(torch.ones(n, n).double() - eye)[1:], bump)[0], at[0] * one + at[1] * (eye - one), 1e-14)


@pytest.mark.parametrize("name", DEGENERATE)
def test_check_1_matrix_functions(name):
    adjacency, eigvals, eigvecs = spectrum(DEGENERATE[name])
    matrix, eye = laplacian(adjacency), torch.eye(len(adjacency)).double()
    heat, polynomial, one = filtered(
        eigvals, eigvecs, lambda x: torch.exp(-1.7 * x), lambda x: 1 - 2 * x + x**3, torch.ones_like
    )
    close(heat, torch.linalg.matrix_exp(-1.7 * matrix))
    close(polynomial, eye - 2 * matrix + matrix @ matrix @ matrix)
    close(one, eye)


@pytest.mark.parametrize("make_graph", [rook, shrikhande, petersen])
def test_check_1_strongly_regular_graphs(make_graph):
    """W is a combination of the identity, the adjacency and the rest."""
    adjacency, eigvals, eigvecs = spectrum(make_graph())
    w = filtered(eigvals, eigvecs, bump)[0]
    eye = torch.eye(len(w)).double()
    basis = torch.stack([eye, adjacency, 1 - eye - adjacency]).flatten(1).T
    fit = torch.linalg.lstsq(basis, w.reshape(-1, 1)).solution
    close(basis @ fit, w.reshape(-1, 1))


def test_check_1_hypercube_and_path():
    """On the cube W is a function of the distance; on a path cos(pi k i / (n - 1)) are the eigenvectors."""
    eigvals, eigvecs = spectrum(hypercube())[1:]
    w = filtered(eigvals, eigvecs, bump)[0]
    distance = torch.tensor([[(a ^ b).bit_count() for b in range(8)] for a in range(8)])
    for d, expected in (
        (d, sum(bump(torch.tensor(2 * k / 3, dtype=torch.float64)) * _krawtchouk(d, k) / 8 for k in range(4)))
        for d in range(4)
    ):
        close(w[distance == d], expected.expand(int((distance == d).sum())))
    n = 7
    angle = math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / (n - 1)
    weight = torch.tensor([0.5, *[1.0] * (n - 2), 0.5]).double()  # the ends have half the degree
    vectors = angle.cos() * weight.sqrt().unsqueeze(1)
    vectors = vectors / vectors.norm(dim=0)
    values = 1 - torch.cos(math.pi * torch.arange(n).double() / (n - 1))
    path = adjacency_of(networkx.path_graph(n))
    close(filtered(*spectrum(path)[1:], bump)[0], vectors * bump(values) @ vectors.T)


def _krawtchouk(d: int, k: int) -> int:
    return sum((-1) ** j * math.comb(d, j) * math.comb(3 - d, k - j) for j in range(k + 1))


# -- 2, 3: symmetry ----------------------------------------------------------------------------------------------------
KINDS = [("mlp", "gin"), ("spline", "mlp"), ("deepsets", "deepsets"), ("deepsets", "gin")]


@pytest.mark.parametrize(("phi", "rho"), KINDS)
@pytest.mark.parametrize("make_graph", [lambda: cycle(9), rook, petersen, hypercube])
def test_check_2_all_nodes_of_a_vertex_transitive_graph_are_equal(make_graph, phi, rho):
    graph = spectrum(make_graph())
    out = make(phi, rho)(*batched([graph]))
    close(out, out[:1].expand_as(out), 1e-12)
    assert float((graph[2] - graph[2][:1]).abs().max()) > 0.1  # the eigenvectors themselves are not


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("phi", "rho"), KINDS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_check_3_signs_bases_and_permutations(name, phi, rho, dtype):
    adjacency, eigvals, eigvecs = spectrum(DEGENERATE[name])
    spe, tolerance = make(phi, rho).to(dtype), 1e-12 if dtype == torch.float64 else 1e-4
    expected = spe(*batched([(adjacency, eigvals, eigvecs)]))
    signs = torch.randint(2, (len(eigvals),)).mul(2).sub(1)
    close(spe(*batched([(adjacency, eigvals, eigvecs * signs)])), expected, tolerance)
    turned = eigvecs.clone()
    for value in eigvals:
        space = (eigvals - value).abs() < 1e-8
        turned[:, space] = (
            eigvecs[:, space] @ torch.linalg.qr(torch.randn(int(space.sum()), int(space.sum())).double())[0]
        )
    assert float((turned - eigvecs).abs().max()) > 0.1
    close(spe(*batched([(adjacency, eigvals, turned)])), expected, tolerance)
    order = torch.randperm(len(adjacency))
    close(spe(*batched([spectrum(adjacency[order][:, order])])), expected[order], tolerance)


# -- 4: stability ------------------------------------------------------------------------------------------------------
def steep(phi: str, **options: Any) -> SPE:
    """A layer whose filters want to be steeper than they may."""
    spe = SPE(3, 4, phi, "mlp", **options).double().requires_grad_(False)
    for parameter in spe.phi.parameters():
        parameter.mul_(6)
    return spe


def weights_of(spe: SPE, matrices: Tensor) -> Tensor:
    """W of symmetric matrices [B, n, n] by one decomposition of all, [B, n * n * m]."""
    eigvals, eigvecs = torch.linalg.eigh(matrices)
    num, n, _ = matrices.shape
    batch = torch.arange(num).repeat_interleave(n)
    return spe.weight_matrices(eigvals, eigvecs.reshape(-1, n), batch)[0].view(num, -1)


def random_laplacians(num: int, n: int) -> Tensor:
    adjacency = torch.rand(num, n, n).lt(0.5).double().triu(1)
    adjacency = adjacency + adjacency.mT
    scale = adjacency.sum(2).clamp(min=1).rsqrt()
    return torch.diag_embed((adjacency.sum(2) > 0).double()) - scale.unsqueeze(2) * adjacency * scale.unsqueeze(1)


def perturbations(num: int, n: int, size: Tensor) -> Tensor:
    noise = torch.randn(num, n, n).double()
    noise = noise + noise.mT
    return noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1) * size.view(-1, 1, 1)


@pytest.mark.parametrize("bound", [0.3, 2.0])
@pytest.mark.parametrize("phi", ["mlp", "spline"])
def test_check_4_the_bound_holds_in_10000_draws(phi, bound):
    spe = steep(phi, lipschitz=bound)
    assert steep(phi).lipschitz_bound() > 5 * bound
    assert spe.lipschitz_bound() == bound
    before = random_laplacians(10_000, 7)
    size = 10 ** (torch.rand(10_000).double() * 7 - 7)
    after = before + perturbations(10_000, 7, size)
    ratio = (weights_of(spe, after) - weights_of(spe, before)).norm(dim=1) / (after - before).flatten(1).norm(dim=1)
    assert float(ratio.max()) <= bound * (1 + 1e-6)
    assert float(ratio.max()) > 0.02 * bound  # and says something: ReLU layers that align are rare


def test_check_4_the_bound_is_attained():
    """phi = K relu(x - .5) by its weights: the inequality is an equality for a shift of the spectrum."""
    spe = SPE(3, 1, "mlp", "mlp", phi_layers=2, phi_hidden=1, lipschitz=1.5).double().requires_grad_(False)
    for value, tensor in zip((10.0, 10.0, -5.0, 0.0), (*spe.phi.weights, *spe.phi.biases), strict=True):
        tensor.fill_(value)
    before = 1.2 * torch.eye(4).double().unsqueeze(0)
    ratio = (weights_of(spe, before + 0.1 * torch.eye(4).double()) - weights_of(spe, before)).norm() / 0.2
    assert abs(float(ratio) - 1.5) < 1e-9


@pytest.mark.parametrize("phi", ["mlp", "spline"])
def test_check_4_single_edges(phi):
    spe = steep(phi, lipschitz=0.7)
    for seed in range(20):
        before = random_graph(9, seed)[0]
        for i, j in before.triu().nonzero().tolist():
            after = before.clone()
            after[i, j] = after[j, i] = 0
            matrices = torch.stack([laplacian(before), laplacian(after)])
            moved = weights_of(spe, matrices).diff(dim=0).norm()
            assert float(moved) <= 0.7 * float(matrices.diff(dim=0).norm()) * (1 + 1e-9)


def test_check_4_a_hard_indicator_breaks_every_bound():
    spe = SPE(2, 1, Elementwise(lambda x: (x < 1 - 1e-12).double()), "mlp")
    before = laplacian(cycle(4)).unsqueeze(0)  # has the eigenvalue 1
    for size in (1e-2, 1e-4, 1e-6):
        after = before + perturbations(1, 4, torch.tensor([size]).double())
        assert float((weights_of(spe, after) - weights_of(spe, before)).norm()) / size > 0.3 / size


@pytest.mark.parametrize("make_graph", [lambda: cycle(12), rook, petersen])
def test_check_4_flat_over_six_decades(make_graph):
    """The response to a perturbation by its size: flat, where raw eigenvectors and SignNet answer with 1 / size."""
    adjacency = make_graph()
    n = len(adjacency)
    edge_index = adjacency.nonzero().T
    before = laplacian(adjacency)
    noise = perturbations(1, n, torch.ones(1).double())[0]
    spe, sign_net = make(), SignNet(5, phi_hidden=8, phi_layers=2, norm=None, act="tanh").double().eval()
    sizes = [10.0**-k for k in range(2, 9)]
    response: dict[str, list[float]] = {"spe": [], "sign_net": [], "raw": []}
    eigvals, eigvecs = torch.linalg.eigh(before)
    for size in sizes:
        moved = torch.linalg.eigh(before + size * noise)
        for name, layer in (("spe", spe), ("sign_net", sign_net), ("raw", lambda values, vectors, edges: vectors)):
            old = layer(eigvals.unsqueeze(0), eigvecs, edge_index)
            new = layer(moved[0].unsqueeze(0), moved[1], edge_index)
            response[name].append(float((new - old).detach().norm()) / size)
    decades = numpy.log10(sizes)
    slope = {name: numpy.polyfit(decades, numpy.log10(values), 1)[0] for name, values in response.items()}
    assert abs(slope["spe"]) < 0.1, response
    assert abs(slope["sign_net"] + 1) < 0.1, response
    assert abs(slope["raw"] + 1) < 0.1, response


# -- 5: truncation -----------------------------------------------------------------------------------------------------
def _responses(spe: SPE, **options: Any) -> list[float]:
    """How much W of the first eigenpairs of the rook's graph moves with its edge weights, by the size of the change."""
    edge_index = rook().nonzero().T
    noise = torch.rand(16, 16).double()
    noise = (noise + noise.T)[edge_index[0], edge_index[1]]
    out = []
    for size in (1e-2, 1e-4, 1e-6, 1e-8):
        found = []
        for weight in (torch.ones_like(noise), 1 + size * noise):
            data = Data(edge_index=edge_index, edge_weight=weight, num_nodes=16)
            eigvals, eigvecs, mask = pad_spectrum(AddLaplacianSpectrum(**options)(data), torch.float64)
            found.append(spe.weight_matrices(eigvals, eigvecs, None, mask)[0])
        out.append(float((found[1] - found[0]).detach().norm()) / size)
    return out


def test_check_5_a_cut_inside_an_eigenspace_and_two_cures():
    plain, tapered = SPE(2, 4).double(), SPE(2, 4, taper=2 / 3).double()
    with pytest.warns(UserWarning, match="gap|eigenspace|cut"):
        broken = _responses(plain, k=3, snap=None)
    assert broken[-1] > 1e4 * broken[0]
    for cured in (
        _responses(plain, k=3, snap="up", tol=0.1),  # all 6 of the broken eigenspace, also where they have parted
        _responses(tapered, cutoff=2 / 3, snap=None),  # a taper right there: what comes and goes weighs nothing
    ):
        assert max(cured) < 10
        assert min(cured) > 0


def test_check_5_below_a_taper_the_rest_is_not_needed():
    spe = steep("mlp", taper=0.9, lipschitz=1.0)
    _, eigvals, eigvecs = random_graph(12, 3)
    low = eigvals < 0.9
    assert 0 < int(low.sum()) < 12
    full = spe.weight_matrices(eigvals.unsqueeze(0), eigvecs)[0]
    part = spe.weight_matrices(eigvals[low].unsqueeze(0), eigvecs[:, low])[0]
    close(part, full)
    assert float(full.detach().abs().max()) > 1e-3


# -- 6: padding and batch ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_check_6_padding_is_never_read(phi, rho):
    graphs = [random_graph(n, seed) for seed, n in enumerate((4, 8, 1))]
    spe = make(phi, rho)
    eigvals, eigvecs, edge_index, batch, mask = batched(graphs)
    expected = spe(eigvals, eigvecs, edge_index, batch, mask)
    wider = [nn.functional.pad(t, (0, 5), value=7.0 if t is eigvals else 0) for t in (eigvals, eigvecs, mask)]
    close(spe(wider[0], wider[1], edge_index, batch, wider[2]), expected)
    alone = torch.cat([spe(*batched([graph])) for graph in graphs])
    close(expected, alone)
    unmasked = spe(eigvals, eigvecs, edge_index, batch)
    if phi == "deepsets":  # zero is an eigenvalue
        assert apart(unmasked, expected) > 1e-6
    else:
        close(unmasked, expected)


def test_check_6_batch_norm_reads_the_batch_in_training_only():
    graphs = [random_graph(n, seed) for seed, n in enumerate((4, 8, 1, 6))]
    for rho in ("gin", "mlp"):
        spe = make(rho=rho, norm="batch_norm")
        alone = torch.cat([spe(*batched([graph])) for graph in graphs])
        close(spe(*batched(graphs)), alone)
        spe.train()
        together = spe(*batched(graphs))
        assert apart(together[:4], spe(*batched(graphs[:1]))) > 1e-3
        # statistics of the pairs that there are, once each
        spe.reset_parameters()
        spe(*batched(graphs))
        norm = next(module for module in spe.modules() if isinstance(module, nn.BatchNorm1d))
        assert int(norm.num_batches_tracked) == 1


# -- 7: against loops, derivatives -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tile", [None, 1, 13, 40])
def test_check_7_ragged_equals_a_loop_with_gradients(tile):
    graphs = [random_graph(n, seed) for seed, n in enumerate((5, 1, 9, 3, 9, 7))]
    spe = make(tile=tile)
    out, expected = spe(*batched(graphs)), naive(spe, graphs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, list(spe.parameters()), grad)
    wanted = torch.autograd.grad(expected, list(spe.parameters()), grad)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["layer_norm", None])
@pytest.mark.parametrize("hidden", [8, 32])  # the first layer of an MLP is applied to the filters where that is cheaper
@pytest.mark.parametrize("rho", ["gin", "mlp"])
def test_check_7_ragged_equals_padded_with_gradients(rho, hidden, norm):
    graphs = [random_graph(n, seed) for seed, n in enumerate((5, 1, 9, 3, 9, 7))]
    eigvals, eigvecs, edge_index, batch, mask = batched(graphs)
    spe = make(rho=rho, norm=norm, act="relu", rho_hidden=hidden)
    filters = spe.phi(eigvals) * mask.unsqueeze(2)
    ptr = torch.tensor([0, 5, 1, 9, 3, 9, 7]).cumsum(0)
    out, expected = spe(eigvals, eigvecs, edge_index, batch, mask), loop(spe.rho, eigvecs, filters, ptr, edge_index)
    close(out, expected)
    grad, weights = torch.randn_like(out), list(spe.parameters())
    for got, wanted in zip(
        torch.autograd.grad(out, weights, grad), torch.autograd.grad(expected, weights, grad), strict=True
    ):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_check_7_derivatives(phi, rho):
    eigvals, eigvecs, edge_index, batch, mask = batched([random_graph(n, n) for n in (3, 1, 4)])
    spe = SPE(2, 2, phi, rho, phi_hidden=5, phi_layers=2, rho_hidden=3, rho_layers=2, act="tanh", tile=5).double()
    weight = torch.rand(edge_index.size(1)).double().requires_grad_()
    inputs = (weight, *spe.parameters())

    def call(weight: Tensor, *_: Tensor) -> Tensor:
        return spe(eigvals, eigvecs, edge_index, batch, mask, weight)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_check_7_no_gradient_goes_through_the_decomposition():
    eigvals, eigvecs, edge_index, batch, mask = batched([random_graph(4)])
    spe = make()
    for name, given in (
        ("eigvals", (eigvals.clone().requires_grad_(), eigvecs)),
        ("eigvecs", (eigvals, eigvecs.clone().requires_grad_())),
    ):
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            spe(*given, edge_index, batch, mask)
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            spe.weight_matrices(*given)


# -- 8: what is told apart ---------------------------------------------------------------------------------------------
def _summed(spe: SPE, adjacency: Tensor) -> Tensor:
    return spe(*batched([spectrum(adjacency)])).sum(0)


def test_check_8_what_the_spectrum_tells_apart():
    one, two = cycle(6), torch.block_diag(cycle(3), cycle(3))
    for rho in ("gin", "mlp"):
        spe = make(rho=rho)
        assert apart(_summed(spe, one), _summed(spe, two)) > 1e-3
        close(_summed(spe, rook()), _summed(spe, shrikhande()), 1e-11)
    # phi = 1: W is the identity. A GIN with a marked node needs no spectrum for this pair, an MLP of W sees nothing
    for rho, told in (("gin", True), ("mlp", False)):
        spe = SPE(
            5, 2, Elementwise(torch.ones_like, torch.ones_like), rho, rho_hidden=8, rho_layers=4, act="tanh"
        ).double()
        assert (apart(_summed(spe, one), _summed(spe, two)) > 1e-6) is told


# -- the laws of every layer -------------------------------------------------------------------------------------------
def as_data(graph: Graph) -> Data:
    adjacency, eigvals, eigvecs = graph
    return Data(
        edge_index=adjacency.nonzero().T,
        eigvals=eigvals,
        eigvecs=eigvecs.flatten(),
        eig_count=torch.tensor([len(eigvals)]),
        num_nodes=len(adjacency),
    )


@pytest.mark.parametrize("aggr", ["sum", "mean"])
@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_alone_equals_batched(phi, rho, aggr):
    spe = make(phi, rho, aggr=aggr)

    def run(data: Any) -> Tensor:
        eigvals, eigvecs, mask = pad_spectrum(data, torch.float64)
        return spe(eigvals, eigvecs, data.edge_index, data.batch, mask)

    assert_alone_equals_batched(run, [as_data(random_graph(n, n)) for n in (4, 0, 1, 3, 9)])


@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_permutation(phi, rho):
    spe = make(phi, rho)
    _, eigvals, eigvecs = graph = random_graph(8)
    data = Data(edge_index=graph[0].nonzero().T, x=eigvecs, num_nodes=8)
    data.edge_weight = torch.rand(data.num_edges).double()
    assert_permutation_equivariant(
        lambda data: spe(eigvals.unsqueeze(0), data.x, data.edge_index, edge_weight=data.edge_weight), data
    )


def test_edge_weights_multiply_messages():
    adjacency, eigvals, eigvecs = random_graph(7)
    spe = make()
    doubled = torch.cat([adjacency.nonzero().T] * 2, dim=1)
    weight = torch.full((adjacency.count_nonzero(),), 2.0)
    expected = spe(eigvals.unsqueeze(0), eigvecs, doubled)
    close(spe(eigvals.unsqueeze(0), eigvecs, adjacency.nonzero().T, edge_weight=weight), expected)


def test_empty_and_single():
    for phi, rho in KINDS:
        spe = make(phi, rho)
        none = torch.zeros(2, 0, dtype=torch.int64)
        eigvecs = torch.zeros(0, 0, dtype=torch.float64)
        assert spe(torch.zeros(0, 0), eigvecs, none, none[0]).shape == (0, 5)
        assert spe(torch.zeros(1, 3), torch.zeros(0, 3), none).shape == (0, 5)
        assert spe(torch.zeros(1, 1), torch.ones(1, 1), none).shape == (1, 5)
        spe(torch.zeros(1, 3), torch.zeros(0, 3), none).sum().backward()


@pytest.mark.parametrize("aggr", ["sum", "mean"])
def test_spline_is_smooth_and_interpolates_nothing_it_should_not(aggr):
    """Equal control points are a constant, a line of them a line; the second derivative has no jumps."""
    spe = make("spline", "mlp", phi_hidden=9, aggr=aggr)
    x = torch.linspace(0, 2, 1001).double().unsqueeze(0)
    with torch.no_grad():
        spe.phi.points.copy_(torch.arange(9).double().unsqueeze(1).expand(-1, 4))
        close(spe.phi(x), (1 + x.unsqueeze(2) * 3).expand(-1, -1, 4))  # 6 pieces of 1/3: point i stands at (i - 1) / 3
        spe.phi.reset_parameters()
        second = spe.phi(x).diff(n=2, dim=1) * 500**2
        assert float(second.diff(dim=1).abs().max()) < 0.02 * float(second.abs().max())
        steepest = (spe.phi(x).diff(dim=1) * 500).norm(dim=2).max()
    assert 0.4 * spe.lipschitz_bound() < float(steepest) <= spe.lipschitz_bound()


def test_columns_that_are_drawn_give_the_sum_on_average():
    args = batched([random_graph(n, n) for n in (5, 2, 8)])
    for rho in ("gin", "mlp"):
        spe = make(rho=rho, num_columns=3)
        expected = spe(*args).detach()  # all columns in eval()
        spe.train()
        drawn = torch.stack([spe(*args).detach() for _ in range(1000)])
        close(drawn[:, 5:7], expected[5:7].expand(1000, -1, -1))  # a graph of two nodes has no more columns
        error = (drawn.mean(0) - expected).abs() / (drawn.std(0) / 1000**0.5).clamp(min=1e-9)
        assert float(error.max()) < 5
        assert float(drawn.std(0)[7:].max()) > 1e-3
        spe(*args).sum().backward()
        assert all(p.grad is not None for p in spe.parameters())


def test_modules_of_ones_own():
    class Rho(nn.Module):
        def forward(self, pairs: Tensor, row: Tensor, col: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            return torch.zeros(len(batch), 4).double().index_add(0, row, pairs * col.unsqueeze(1))

    graphs = [random_graph(n, n) for n in (4, 3)]
    spe = SPE(4, 4, Elementwise(*[torch.ones_like] * 4), Rho())
    close(spe(*batched(graphs)), torch.arange(7).double().unsqueeze(1).expand(-1, 4))
    spe = SPE(4, 3, Elementwise(torch.ones_like), "gin").double()
    with pytest.raises(ValueError, match=r"phi returned shape \(2, 4, 1\), but must return \(2, 4, 3\)"):
        spe(*batched(graphs))
    assert spe.lipschitz_bound() == math.inf


def test_memory_is_that_of_a_tile():
    adjacency, eigvals, eigvecs = random_graph(300)
    spe = SPE(8, 8, "mlp", "gin", rho_hidden=32, rho_layers=3, tile=3000)
    args = eigvals.unsqueeze(0).float(), eigvecs.float(), adjacency.nonzero().T
    tiled = peak_extra_memory(lambda: spe(*args).sum().backward())
    if tiled is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert tiled < 50e6  # one tensor of all pairs is 12 MB, and a gradient needs about 30


def test_every_parameter_learns():
    for (phi, rho), norm in itertools.product(KINDS, ("layer_norm", None)):
        spe = make(phi, rho, norm=norm)
        spe(*batched([random_graph(6)])).square().sum().backward()
        assert not [name for name, p in spe.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_state_dict(phi, rho):
    args = batched([random_graph(6), random_graph(4)])
    assert_state_dict_roundtrip(lambda: make(phi, rho), lambda spe: spe(*args))


def test_reset_parameters_and_repr():
    spe = make(lipschitz=2.0, taper=1.5)
    before = [p.clone() for p in spe.parameters()]
    torch.manual_seed(1)
    spe.reset_parameters()
    assert all(
        p.ndim == 0 or p.std() == 0 or not torch.equal(p, q) for p, q in zip(spe.parameters(), before, strict=True)
    )
    assert "lipschitz=2.0, taper=1.5" in repr(spe)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_autocast(phi, rho, recompute):
    args = batched([random_graph(n, n) for n in (6, 3, 9)])
    spe = make(phi, rho, recompute=recompute).float()
    expected = spe(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = spe(*args)
        loss = out.float().square().sum()
    loss.backward()  # outside, as one does
    assert apart(out.float(), expected) < 0.05 * float(expected.detach().abs().max())
    assert all(p.grad.isfinite().all() for p in spe.parameters())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by dynamo
@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_compile(phi, rho):  # the sizes of the graphs are data: the graph breaks there
    args = batched([random_graph(n, n) for n in (6, 3)])
    spe = make(phi, rho)
    torch.compiler.reset()
    compiled = torch.compile(spe, backend="aot_eager")
    out, expected = compiled(*args), spe(*args)
    close(out, expected)
    for got, wanted in zip(
        torch.autograd.grad(out.sum(), list(spe.parameters())),
        torch.autograd.grad(expected.sum(), list(spe.parameters())),
        strict=True,
    ):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_channels": 0}, "out_channels is 0"),
        ({"num_channels": True}, "num_channels is True"),
        ({"num_columns": 0}, "num_columns is 0"),
        ({"tile": 0}, "tile is 0"),
        ({"phi": "transformer"}, "phi is 'transformer'"),
        ({"rho": "ppgn"}, "rho is 'ppgn'"),
        ({"norm": "graph_norm"}, "norm is 'graph_norm'"),
        ({"aggr": "max"}, "aggr is 'max'"),
        ({"act": "swish"}, "act is 'swish'"),
        ({"lipschitz": 0.0}, "lipschitz is 0.0"),
        ({"lipschitz": math.inf}, "lipschitz is inf"),
        ({"taper": -1.0}, "taper is -1.0"),
        ({"phi": "deepsets", "lipschitz": 1.0}, "lipschitz is 1.0, but phi is 'deepsets'"),
        ({"phi": Elementwise(torch.sin), "lipschitz": 1.0}, "lipschitz is 1.0, but phi is 'Elementwise'"),
        ({"phi": "deepsets", "taper": 1.0}, "taper is 1.0, but phi is 'deepsets'"),
        ({"phi": "spline", "phi_hidden": 3}, "phi_hidden is 3"),
        ({"rho": "deepsets", "num_columns": 3}, "num_columns is 3"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SPE(**{"out_channels": 4, **settings})


def test_refused_inputs():
    spe = make()
    eigvals, eigvecs, edge_index, batch, mask = batched([random_graph(4), random_graph(3)])
    for given, message in (
        ((eigvals[0], eigvecs, edge_index, batch), r"eigvals is torch.float64 \(4,\), but must be floating \(B, 4\)"),
        ((eigvals, eigvecs[:, :3], edge_index, batch), r"eigvals is .* \(2, 4\), but must be floating \(B, 3\)"),
        ((eigvals, eigvecs, edge_index[0], batch), "edge_index is torch.int64"),
        ((eigvals, eigvecs, edge_index), "eigvals has 2 graphs, but without batch it must be one"),
        (
            (eigvals, eigvecs, edge_index, batch[1:]),
            r"batch is torch.int64 \(6,\), but must be int64 \(7,\)",
        ),
        ((eigvals, eigvecs, edge_index, batch.flip(0)), "batch is not sorted"),
        ((eigvals, eigvecs, edge_index, batch + 1), "batch goes from 1 to 2, but eigvals has 2 rows"),
        ((eigvals, eigvecs, edge_index, batch, mask.double()), r"eig_mask is torch.float64 .* must be bool \(2, 4\)"),
        ((eigvals, eigvecs, edge_index, batch, mask[:1]), r"eig_mask is torch.bool \(1, 4\)"),
        ((eigvals, eigvecs, edge_index, batch, mask, batch.double()), "edge_weight has shape"),
        ((eigvals, eigvecs, torch.tensor([[0], [6]]), batch, mask), "edge_index joins nodes 0 and 6 of two graphs"),
    ):
        with pytest.raises(ValueError, match=message):
            spe(*given)
    for bad in (-1, 7):
        with pytest.raises(IndexError, match="out of range"):
            spe(eigvals, eigvecs, torch.tensor([[0], [bad]]), batch, mask)
    limited = make(lipschitz=1.0)
    cut = mask.clone()
    cut[1, 2] = False
    assert limited(eigvals, eigvecs, edge_index, batch, mask).shape == (7, 5)
    with pytest.raises(ValueError, match="graph 1 has 3 nodes and 2 eigenpairs, but lipschitz needs the full spectrum"):
        limited(eigvals, eigvecs, edge_index, batch, cut)
    assert make(lipschitz=1.0, taper=1.0)(eigvals, eigvecs, edge_index, batch, cut).shape == (7, 5)


def test_inside_a_checkpoint():
    args = batched([random_graph(n, n) for n in (6, 3)])
    spe = make()
    expected = torch.autograd.grad(spe(*args).sum(), list(spe.parameters()))
    out = torch.utils.checkpoint.checkpoint(lambda: spe(*args), use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(out.sum(), list(spe.parameters())), expected, strict=True):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_padding_is_never_read(phi, rho):
    eigvals, eigvecs, edge_index, batch, mask = batched([random_graph(n, n) for n in (6, 3)])
    spe = make(phi, rho)
    assert not mask.all()
    garbage = eigvals.masked_fill(~mask, math.nan), eigvecs.masked_fill(~mask[batch], math.nan)
    assert torch.equal(spe(*garbage, edge_index, batch, mask), spe(eigvals, eigvecs, edge_index, batch, mask))


@pytest.mark.parametrize(("phi", "rho"), KINDS)
def test_equal_nodes_stay_equal_under_autocast(phi, rho):
    """On a ring all nodes are alike, whatever basis the eigenspaces got; with W in bfloat16 they are not."""
    args = batched([spectrum(cycle(12))])
    spe = make(phi, rho).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = spe(*args).float().detach()
    assert apart(out, out[:1].expand_as(out)) < 1e-3 * float(out.abs().max())


@pytest.mark.parametrize("rho", ["gin", "mlp", "deepsets"])
def test_states_are_kept_up_to_a_limit(rho, monkeypatch):
    """By default what is small is kept and what is large is made again, with the same gradients."""
    args = batched([random_graph(n, n) for n in (6, 3, 9)])
    spe = make(rho=rho)
    found = {}
    for limit in (0, 1 << 30):
        monkeypatch.setitem(spe_rho.KEPT, "cpu", limit)
        out = spe(*args)
        names = []
        nodes = [out.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None:
                names.append(type(node).__name__)
                nodes += [n for n, _ in node.next_functions]
        found[limit] = "_SumTilesBackward" in names, torch.autograd.grad(out.square().sum(), list(spe.parameters()))
    assert found[0][0]
    assert not found[1 << 30][0]
    for got, wanted in zip(found[0][1], found[1 << 30][1], strict=True):
        close(got, wanted, 1e-10)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("norm", "act"), [(None, "relu"), ("layer_norm", "relu"), (None, "silu")])
@pytest.mark.parametrize(("channels", "layers"), [(4, 1), (4, 2), (4, 4), (1, 3)])
def test_mlp_as_an_op_equals_tiles(channels, layers, norm, act, frozen, monkeypatch):
    """With ReLU and no norm an MLP over pairs is one op, also where its first layer is folded into the filters."""
    eigvecs = torch.randn(25, 6, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(2, 6, channels, dtype=torch.float64, requires_grad=True)
    ptr = torch.tensor([0, 21, 25])
    calls = []
    monkeypatch.setattr(spe_rho, "pair_mlp", lambda *args: calls.append(1) or pair_mlp(*args))
    network = spe_rho.RowNetwork(channels, 7, layers, norm, act).double()
    wanted = [eigvecs, filters, *network.parameters()]
    if frozen and layers > 1:
        network.mlp.linears[-1].weight.requires_grad_(False)
        wanted = [t for t in wanted if t.requires_grad]
    out = spe_rho.ColumnSum(network, None, None, None)(
        eigvecs, filters, ptr, torch.empty(2, 0, dtype=torch.int64), None
    )
    expected = spectral_filter(eigvecs, filters, ptr, network.mlp)
    assert bool(calls) == (norm is None and act == "relu")
    close(out, expected)
    cotangent = torch.randn_like(out)
    found, right = (torch.autograd.grad(o, wanted, cotangent) for o in (out, expected))
    for a, b in zip(found, right, strict=True):
        close(a, b, 1e-11)
