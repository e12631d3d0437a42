from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from geo.nn import pad_spectrum
from geo.testing import assert_close
from geo.transforms import AddLaplacianSpectrum, AddMagneticLaplacianSpectrum, sparse_spectrum


def directed(graph: nx.DiGraph) -> Data:
    edges = torch.tensor([*graph.edges], dtype=torch.int64).view(-1, 2).t()
    return Data(edge_index=edges.contiguous(), num_nodes=graph.number_of_nodes())


def reversed_edges(data: Data) -> Data:
    return Data(edge_index=data.edge_index.flip(0), num_nodes=data.num_nodes)


def vectors(data: Data) -> Tensor:
    return torch.view_as_complex(data.mag_eigvecs).view(data.num_nodes, -1)


def magnetic(data: Data, q: float, normalize: bool) -> np.ndarray:
    """By the formula, with dense matrices."""
    adjacency = np.zeros((data.num_nodes, data.num_nodes))
    adjacency[data.edge_index[0], data.edge_index[1]] = 1
    np.fill_diagonal(adjacency, 0)
    support = np.maximum(adjacency, adjacency.T)
    degree = support.sum(1)
    moved = support * np.exp(2j * np.pi * q * (adjacency - adjacency.T))
    if not normalize:
        return np.diag(degree) - moved
    root = np.where(degree > 0, degree, 1) ** -0.5
    return np.diag((degree > 0).astype(float)) - root[:, None] * moved * root


RANDOM = directed(nx.gnp_random_graph(11, 0.25, seed=1, directed=True))
GRAPHS = {
    "random": RANDOM,
    "ring": directed(nx.cycle_graph(7, create_using=nx.DiGraph)),
    "isolated": Data(edge_index=torch.tensor([[0, 1, 1], [1, 0, 3]]), num_nodes=5),
    "loops and repetitions": Data(edge_index=torch.tensor([[0, 0, 1, 1, 2], [1, 1, 1, 2, 1]]), num_nodes=3),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("normalization", ["sym", None])
def test_equals_the_formula(name, normalization):
    data = AddMagneticLaplacianSpectrum(q=0.17, normalization=normalization, relative_q=False)(GRAPHS[name])
    expected = torch.from_numpy(magnetic(GRAPHS[name], 0.17, normalization == "sym"))
    eigvecs = vectors(data)
    assert_close(torch.view_as_real(eigvecs @ (data.mag_eigvals * eigvecs.conj()).t()), torch.view_as_real(expected))
    assert_close(data.mag_eigvals, torch.from_numpy(np.linalg.eigvalsh(expected.numpy())))


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 1 / 3])
def test_directed_ring(q):
    """Eigenvalues 2 - 2 cos(2 pi (j / n + q))."""
    n = 9
    data = directed(nx.cycle_graph(n, create_using=nx.DiGraph))
    found = AddMagneticLaplacianSpectrum(q=q, normalization=None, relative_q=False)(data)
    angle = 2 * math.pi * (torch.arange(n, dtype=torch.float64) / n + q)
    assert_close(found.mag_eigvals, (2 - 2 * angle.cos()).sort().values)


def test_q_zero_and_opposite_edges_give_the_laplacian():
    both = Data(edge_index=torch.cat([RANDOM.edge_index, RANDOM.edge_index.flip(0)], dim=1), num_nodes=11)
    expected = AddLaplacianSpectrum(k=4, eigval_name="mag_eigvals", eigvec_name="mag_eigvecs")(both)
    basis = expected.mag_eigvecs.view(11, -1)
    for data, q in ((RANDOM, 0.0), (both, 0.2)):
        found = AddMagneticLaplacianSpectrum(k=4, q=q)(data)
        assert_close(found.mag_eigvals, expected.mag_eigvals)
        assert_close(found.mag_eig_gap, expected.mag_eig_gap)
        assert_close((vectors(found) @ vectors(found).mH).real, basis @ basis.t())
        assert_close((vectors(found) @ vectors(found).mH).imag, torch.zeros(11, 11))


@pytest.mark.parametrize("normalization", ["sym", None])
def test_reversing_all_edges_conjugates(normalization):
    transform = AddMagneticLaplacianSpectrum(normalization=normalization, q=0.2, relative_q=False)
    forth, back = transform(RANDOM), transform(reversed_edges(RANDOM))
    assert forth.mag_eigvals.diff().min() > 1e-3
    assert_close(back.mag_eigvals, forth.mag_eigvals)
    assert_close(back.mag_eigvecs[:, 0], forth.mag_eigvecs[:, 0])
    assert_close(back.mag_eigvecs[:, 1], -forth.mag_eigvecs[:, 1])
    assert forth.mag_eigvecs[:, 1].abs().max() > 0.1


def test_spectrum_of_a_tree_does_not_depend_on_q():
    tree = nx.random_labeled_tree(14, seed=2)
    data = directed(nx.DiGraph([(a, b) if (a + b) % 2 else (b, a) for a, b in tree.edges]))
    low, high = (AddMagneticLaplacianSpectrum(q=q, relative_q=False)(data).mag_eigvals for q in (0.0, 0.3))
    assert_close(low, high)
    ring = directed(nx.cycle_graph(14, create_using=nx.DiGraph))
    low, high = (AddMagneticLaplacianSpectrum(q=q, relative_q=False)(ring).mag_eigvals for q in (0.0, 0.3))
    assert (low - high).abs().max() > 0.05


def test_relative_q():
    """Divided by the number of one-way edges, or of nodes where these are fewer."""
    path = Data(edge_index=torch.tensor([[0, 1, 2, 3, 2, 0], [1, 2, 3, 2, 0, 3]]), num_nodes=4)  # one of five both ways
    dense = directed(nx.gnp_random_graph(6, 0.9, seed=0, directed=True).edge_subgraph([]))
    many = Data(edge_index=torch.combinations(torch.arange(4)).t(), num_nodes=4)
    for data, divisor in ((path, 4), (many, 4), (directed(nx.path_graph(3, create_using=nx.DiGraph)), 2)):
        found = AddMagneticLaplacianSpectrum(q=0.25)(data)
        expected = AddMagneticLaplacianSpectrum(q=0.25 / divisor, relative_q=False)(data)
        assert torch.equal(found.mag_eigvals, expected.mag_eigvals)
    assert AddMagneticLaplacianSpectrum()(dense).mag_eigvals.shape == (0,)


def test_phases_are_deterministic():
    data = AddMagneticLaplacianSpectrum(q=0.2, relative_q=False)(RANDOM)
    for column in vectors(data).t():
        pivot = column[(column.abs() >= column.abs().max() * (1 - 1e-6)).nonzero()[0]]
        assert abs(float(pivot.imag)) < 1e-15
        assert float(pivot.real) > 0


def test_several_potentials_are_stored_and_padded():
    data_list = [AddMagneticLaplacianSpectrum(k=3, q=[0.0, 0.1, 0.25])(GRAPHS[name]) for name in GRAPHS]
    batch = Batch.from_data_list(data_list)
    assert batch.mag_eig_count.shape == batch.mag_eig_gap.shape == (4, 3)
    eigvals, eigvecs, mask = pad_spectrum(batch, torch.float64, "mag_eigvals", "mag_eigvecs")
    width = int(batch.mag_eig_count.max())
    assert eigvals.shape == mask.shape == (4, 3, width)
    assert eigvecs.shape == (batch.num_nodes, 3, width, 2)
    for g, name in enumerate(GRAPHS):
        for at, q in enumerate((0.0, 0.1, 0.25)):
            alone = AddMagneticLaplacianSpectrum(k=3, q=q)(GRAPHS[name])
            k = int(alone.mag_eig_count)
            assert alone.mag_eig_count.shape == (1,)
            assert mask[g, at].sum() == k
            assert torch.equal(eigvals[g, at, :k], alone.mag_eigvals)
            rows = eigvecs[batch.ptr[g] : batch.ptr[g + 1], at]
            assert torch.equal(rows[:, :k], alone.mag_eigvecs.view(-1, k, 2))
            assert not rows[:, k:].any()


def test_one_potential_is_padded_without_an_axis():
    data = AddMagneticLaplacianSpectrum(k=3)(RANDOM)
    eigvals, eigvecs, mask = pad_spectrum(data, None, "mag_eigvals", "mag_eigvecs")
    assert eigvals.shape == mask.shape == (1, 3)
    assert eigvecs.shape == (11, 3, 2)


def test_beside_the_real_spectrum():
    data = AddMagneticLaplacianSpectrum(k=2)(AddLaplacianSpectrum(k=3, is_undirected=True)(RANDOM))
    assert int(data.eig_count) >= 3
    assert int(data.mag_eig_count) == 2


@pytest.mark.parametrize("chebyshev", [False, True])
@pytest.mark.parametrize("normalization", ["sym", None])
def test_sparse_equals_dense(chebyshev, normalization, monkeypatch):
    if chebyshev:
        monkeypatch.setattr(sparse_spectrum, "dissect", lambda *_: None)
    grid = nx.convert_node_labels_to_integers(nx.grid_2d_graph(14, 14))
    graph = nx.disjoint_union(nx.DiGraph([(a, b) for a, b in grid.edges]), nx.path_graph(4, create_using=nx.DiGraph))
    data = directed(graph)
    kwargs = {"k": 7, "q": [0.05, 0.3], "normalization": normalization, "relative_q": False}
    expected = AddMagneticLaplacianSpectrum(**kwargs)(data)
    found = AddMagneticLaplacianSpectrum(**kwargs, dense_nodes=0)(data)
    assert torch.equal(found.mag_eig_count, expected.mag_eig_count)
    assert_close(found.mag_eigvals, expected.mag_eigvals)
    first = int(expected.mag_eig_count[0, 0])
    found, expected = vectors(found)[:, :first], vectors(expected)[:, :first]
    # a residual of 1e-10 and a gap of 1e-3 leave 1e-7 of rotation
    assert (found @ found.mH - expected @ expected.mH).abs().max() < 1e-7


def test_cache_and_many(tmp_path, monkeypatch):
    data_list = list(GRAPHS.values())
    transform = AddMagneticLaplacianSpectrum(k=2, q=[0.1, 0.2], cache_dir=tmp_path)
    first = transform.transform_many(data_list)
    monkeypatch.setattr(np.linalg, "eigh", pytest.fail)
    for found, expected in zip(transform.transform_many(data_list), first, strict=True):
        for key in ("mag_eigvals", "mag_eigvecs", "mag_eig_count", "mag_eig_gap"):
            assert torch.equal(found[key], expected[key])
    monkeypatch.undo()
    alone = AddMagneticLaplacianSpectrum(k=2, q=[0.1, 0.2])(RANDOM)
    assert torch.equal(first[0].mag_eigvecs, alone.mag_eigvecs)


def test_nothing_and_a_single_node():
    empty = AddMagneticLaplacianSpectrum()(Data(num_nodes=0))
    assert empty.mag_eigvecs.shape == (0, 2)
    single = AddMagneticLaplacianSpectrum(k=3)(Data(num_nodes=1))
    assert single.mag_eigvals.tolist() == [0.0]
    assert single.mag_eigvecs.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"q": []}, r"q=\[\] must be a finite number or a list of at least one"),
        ({"q": math.nan}, "q=nan must be"),
        ({"q": [0.1, math.inf]}, r"q=\[0\.1, inf\] must be"),
        ({"normalization": "rw"}, "normalization='rw' is unknown"),
        ({"k": 2, "cutoff": 0.1}, "both given"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AddMagneticLaplacianSpectrum(**kwargs)


def test_repr():
    assert repr(AddMagneticLaplacianSpectrum(k=2, q=[0.1])) == (
        "AddMagneticLaplacianSpectrum(k=2, q=[0.1], normalization='sym', relative_q=True, cutoff=None, snap='up', "
        "tol=1e-06)"
    )
