from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from geo.nn import SPE

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
        eigvecs.append(torch.nn.functional.pad(vectors, (0, width - vectors.size(1))))
        edges.append(adjacency.nonzero().T + first)
        batch.append(torch.full((len(adjacency),), g))
        first += len(adjacency)
    return eigvals, torch.cat(eigvecs), torch.cat(edges, dim=1), torch.cat(batch), eig_mask


def make(phi: str = "mlp", rho: str = "gin", **options: object) -> SPE:
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
