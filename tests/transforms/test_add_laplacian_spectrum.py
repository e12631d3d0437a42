from __future__ import annotations

import math
import warnings

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data, HeteroData, InMemoryDataset
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import AddLaplacianEigenvectorPE

from geo.testing import assert_close
from geo.transforms import (
    AddDirectedRandomWalkPE,
    AddLaplacianSpectrum,
    AddMagneticLaplacianSpectrum,
    sparse_spectrum,
    spectrum_solver,
)
from geo.transforms.add_laplacian_spectrum import laplacian_matrix, read_edges, symmetrize
from geo.transforms.array_cache import DamagedFileError

NO_EDGE = torch.zeros(2, 0, dtype=torch.int64)


def undirected(graph: nx.Graph) -> Data:
    graph = nx.convert_node_labels_to_integers(graph)
    edges = torch.tensor([*graph.edges], dtype=torch.int64).view(-1, 2).t()
    return Data(edge_index=torch.cat([edges, edges.flip(0)], dim=1), num_nodes=graph.number_of_nodes())


def rook() -> Data:
    return undirected(nx.line_graph(nx.complete_bipartite_graph(4, 4)))


def vectors(data: Data) -> Tensor:
    return data.eigvecs.view(data.num_nodes, -1)


def weighted(num_nodes: int = 12, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    data = undirected(nx.gnp_random_graph(num_nodes, 0.4, seed=seed))
    weight = torch.rand(data.num_edges // 2, generator=generator) + 0.5
    data.edge_weight = torch.cat([weight, weight])
    return data


def dense(data: Data, normalize: bool) -> np.ndarray:
    """The Laplacian by networkx, which puts 0 on the diagonal of an isolated node."""
    graph = nx.Graph()
    graph.add_nodes_from(range(data.num_nodes))
    weight = data.edge_weight.tolist() if "edge_weight" in data else [1.0] * data.num_edges
    graph.add_weighted_edges_from((a, b, w) for (a, b), w in zip(data.edge_index.t().tolist(), weight, strict=True))
    make = nx.normalized_laplacian_matrix if normalize else nx.laplacian_matrix
    return make(graph).toarray().astype(float)


GRAPHS = {
    "rook": rook(),
    "petersen": undirected(nx.petersen_graph()),
    "barbell": undirected(nx.barbell_graph(4, 2)),
    "isolated nodes and two parts": undirected(
        nx.disjoint_union_all([nx.cycle_graph(4), nx.empty_graph(3), nx.path_graph(3)])
    ),
    "weighted": weighted(),
    "single": Data(edge_index=NO_EDGE, num_nodes=1),
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("normalization", ["sym", None])
def test_check_9_full_spectrum_equals_networkx_and_numpy(name, normalization):
    data = AddLaplacianSpectrum(normalization=normalization)(GRAPHS[name])
    laplacian = dense(GRAPHS[name], normalization == "sym")
    eigvecs = vectors(data)
    assert_close(data.eigvals, torch.from_numpy(np.linalg.eigvalsh(laplacian)))
    assert_close(eigvecs @ data.eigvals.diag() @ eigvecs.t(), torch.from_numpy(laplacian))
    assert_close(eigvecs.t() @ eigvecs, torch.eye(data.num_nodes, dtype=torch.float64))
    assert data.eig_count.tolist() == [data.num_nodes]
    assert data.eig_gap.tolist() == [math.inf]
    assert data.eigvals.min() >= 0


def test_check_9_eigenvectors_of_pyg():
    """Where the spectrum is simple and the graph connected, PyG's are ours from the second on, up to random signs."""
    graph = undirected(nx.barbell_graph(4, 3))
    graph.edge_index = torch.cat([graph.edge_index, torch.tensor([[0, 5], [5, 0]])], dim=1)
    ours = AddLaplacianSpectrum(k=3)(graph)
    assert ours.eigvals.diff().min() > 1e-3
    theirs = AddLaplacianEigenvectorPE(2, attr_name="pe", is_undirected=True)(graph).pe
    assert_close((vectors(ours)[:, 1:].float().t() @ theirs).abs(), torch.eye(2))


def closed_form(graph: nx.Graph, normalization: str | None) -> Tensor:
    data = AddLaplacianSpectrum(normalization=normalization)(undirected(graph))
    return data.eigvals


def test_closed_forms():
    n = 9
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    assert_close(closed_form(nx.cycle_graph(n), "sym"), (1 - angle.cos()).sort().values)
    assert_close(closed_form(nx.complete_graph(n), "sym"), torch.tensor([0.0] + [n / (n - 1)] * (n - 1)))
    half = math.pi * torch.arange(n, dtype=torch.float64)
    assert_close(closed_form(nx.path_graph(n), None), 2 - 2 * (half / n).cos())
    assert_close(closed_form(nx.path_graph(n), "sym"), 1 - (half / (n - 1)).cos())
    bits = torch.tensor([bin(i).count("1") for i in range(16)], dtype=torch.float64)
    assert_close(closed_form(nx.hypercube_graph(4), None), (2 * bits).sort().values)
    assert_close(closed_form(nx.hypercube_graph(4), "sym"), (bits / 2).sort().values)
    union = nx.disjoint_union_all([nx.cycle_graph(4), nx.cycle_graph(4), nx.empty_graph(2)])
    assert_close(closed_form(union, "sym"), torch.tensor([0.0] * 4 + [1.0] * 4 + [2.0] * 2))


def test_number_of_zeros_is_number_of_components():
    """Isolated nodes count; unlike in PyG, which puts 1 on their diagonal."""
    data = AddLaplacianSpectrum(k=1)(GRAPHS["isolated nodes and two parts"])
    assert data.eig_count.tolist() == [5]
    assert not data.eigvals.round(decimals=12).any()


@pytest.mark.parametrize(("snap", "kept", "gap"), [("up", 7, 1 / 3), ("down", 1, 2 / 3)])
def test_snap_at_a_degenerate_cut(snap, kept, gap):
    """The rook's graph has eigenvalues 0, 2/3 (6 times) and 4/3 (9 times)."""
    data = AddLaplacianSpectrum(k=3, snap=snap)(rook())
    assert data.eig_count.tolist() == [kept]
    assert_close(data.eig_gap, torch.tensor([2 / 3], dtype=torch.float64))
    projector = vectors(data) @ vectors(data).t()
    full = AddLaplacianSpectrum()(rook())
    assert_close(projector, vectors(full)[:, :kept] @ vectors(full)[:, :kept].t())


def test_no_snap_warns_once():
    transform = AddLaplacianSpectrum(k=3, snap=None)
    with pytest.warns(UserWarning, match="after 3 eigenpairs splits an eigenspace"):
        data = transform(rook())
    assert data.eig_count.tolist() == [3]
    assert abs(float(data.eig_gap)) < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(rook())
        AddLaplacianSpectrum(k=7, snap=None)(rook())
        AddLaplacianSpectrum(snap=None)(rook())


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({"cutoff": 0.0}, 1),
        ({"cutoff": 0.6}, 1),
        ({"cutoff": 0.67}, 7),
        ({"cutoff": 2.0}, 16),
        ({"cutoff": 2 / 3 - 1e-7, "tol": 1e-6}, 7),
        ({"cutoff": 2 / 3 - 1e-7, "tol": 1e-8}, 1),
        ({"k": 1}, 1),
        ({"k": 8}, 16),
        ({"k": 8, "snap": "down"}, 7),
        ({"k": 40}, 16),
        ({"k": 1, "snap": "down", "tol": 1.0}, 0),
        ({"k": 1, "tol": 1.0}, 16),
    ],
)
def test_what_is_kept(kwargs, kept):
    data = AddLaplacianSpectrum(**kwargs)(rook())
    assert data.eig_count.tolist() == [kept]
    assert data.eigvals.shape == (kept,)
    assert data.eigvecs.shape == (16 * kept,)
    expected = {0: 0.0, 16: math.inf}.get(kept, 2 / 3)
    assert float(data.eig_gap) == pytest.approx(expected, abs=1e-12)


def test_signs_are_deterministic():
    transform = AddLaplacianSpectrum()
    first, second = transform(weighted()), transform(weighted())
    assert torch.equal(first.eigvecs, second.eigvecs)
    for column in vectors(first).t():
        assert column[(column.abs() >= column.abs().max() * (1 - 1e-6)).nonzero()[0]] > 0
    flipped = spectrum_solver.fix_phases(-vectors(first).numpy())
    assert_close(torch.from_numpy(flipped), vectors(first))


@pytest.mark.parametrize("dense_nodes", [1000, 0])
def test_check_9_edge_order_repetition_and_loops_change_nothing(dense_nodes):
    data = weighted(60)
    order = torch.randperm(data.num_edges)
    again, loops = order[:20], torch.arange(5).repeat(2, 1)
    changed = Data(
        edge_index=torch.cat([data.edge_index[:, order], data.edge_index[:, again], loops], dim=1),
        edge_weight=torch.cat([data.edge_weight[order], data.edge_weight[again], torch.full((5,), 7.0)]),
        num_nodes=60,
    )
    transform = AddLaplacianSpectrum(k=4, dense_nodes=dense_nodes)
    expected, found = transform(data), transform(changed)
    assert torch.equal(found.eigvals, expected.eigvals)
    assert torch.equal(found.eigvecs, expected.eigvecs)


def test_repeated_edges_count_with_their_mean():
    edges = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    data = Data(edge_index=edges, edge_weight=torch.tensor([1.0, 2.0, 4.0, 5.0]), num_nodes=2)
    assert_close(AddLaplacianSpectrum(normalization=None)(data).eigvals, torch.tensor([0.0, 6.0]))


def test_edges_in_one_direction():
    edges = torch.tensor([[0, 2, 2], [1, 1, 3]])
    message = r"edge \(0, 1\) has no equal in the other direction.*ToUndirected.*is_undirected=True"
    with pytest.raises(ValueError, match=message):
        AddLaplacianSpectrum()(Data(edge_index=edges, num_nodes=4))
    found = AddLaplacianSpectrum(is_undirected=True)(Data(edge_index=edges, num_nodes=4))
    assert_close(found.eigvals, AddLaplacianSpectrum()(undirected(nx.path_graph(4))).eigvals)
    both = Data(edge_index=torch.tensor([[0, 1], [1, 0]]), edge_weight=torch.tensor([1.0, 4.0]), num_nodes=2)
    with pytest.raises(ValueError, match="not symmetric"):
        AddLaplacianSpectrum()(both)
    assert_close(AddLaplacianSpectrum(None, None, is_undirected=True)(both).eigvals, torch.tensor([0.0, 5.0]))


def test_an_edge_of_weight_zero_is_none():
    data = undirected(nx.path_graph(3))
    data.edge_weight = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = AddLaplacianSpectrum()(undirected(nx.disjoint_union(nx.path_graph(2), nx.empty_graph(1))))
    assert_close(AddLaplacianSpectrum()(data).eigvals, expected.eigvals)


def test_weights_by_another_name_or_none():
    data = weighted()
    data.strength = data.edge_weight.view(-1, 1)
    plain = Data(edge_index=data.edge_index, num_nodes=data.num_nodes)
    assert torch.equal(AddLaplacianSpectrum(weight_name="strength")(data).eigvals, AddLaplacianSpectrum()(data).eigvals)
    assert torch.equal(AddLaplacianSpectrum(weight_name=None)(data).eigvals, AddLaplacianSpectrum()(plain).eigvals)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "k=0 must be an integer of at least 1"),
        ({"k": 2.0}, "k=2.0 must be"),
        ({"k": 2, "cutoff": 1.0}, r"k=2 and cutoff=1\.0 are both given"),
        ({"cutoff": -1.0}, r"cutoff=-1\.0 must be"),
        ({"cutoff": math.nan}, "cutoff=nan must be"),
        ({"snap": "round"}, "snap='round' is unknown; allowed: 'up', 'down', None"),
        ({"tol": -1.0}, r"tol=-1\.0 must be"),
        ({"normalization": "rw"}, "normalization='rw' is unknown; allowed: 'sym', None"),
        ({"dtype": torch.int64}, r"dtype=torch\.int64 must be a floating"),
        ({"dense_nodes": -1}, "dense_nodes=-1 must not be negative"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AddLaplacianSpectrum(**kwargs)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([1.0, math.nan, 1.0, 1.0]), "edge_weight is nan at edge 1"),
        (torch.tensor([1.0, 1.0, math.inf, 1.0]), "edge_weight is inf at edge 2"),
        (torch.tensor([-1.0, 1.0, -1.0, 1.0]), r"edge_weight is -1\.0 at edge 0"),
        (torch.ones(4, requires_grad=True), "requires grad, but no gradient goes through"),
        (torch.ones(3), r"edge_weight is \(3,\).*\[4\]"),
        ("heavy", "edge_weight is str"),
    ],
)
def test_bad_weights(weight, message):
    data = undirected(nx.path_graph(3))
    data.edge_weight = weight
    with pytest.raises(ValueError, match=message):
        AddLaplacianSpectrum()(data)


def test_bad_graphs():
    with pytest.raises(ValueError, match=r"entries from 0 to 5, outside 0\.\.2"):
        AddLaplacianSpectrum()(Data(edge_index=torch.tensor([[0, 5], [5, 0]]), num_nodes=3))
    with pytest.raises(ValueError, match="edge_index is float32"):
        AddLaplacianSpectrum()(Data(edge_index=torch.zeros(2, 1), num_nodes=1))
    with pytest.raises(ValueError, match="HeteroData"):
        AddLaplacianSpectrum()(HeteroData())


def test_nothing_and_a_single_node():
    for kwargs in ({}, {"k": 3}, {"cutoff": 1.0}):
        empty = AddLaplacianSpectrum(**kwargs)(Data(num_nodes=0))
        assert empty.eig_count.tolist() == [0]
        assert empty.eigvals.shape == empty.eigvecs.shape == (0,)
        assert empty.eig_gap.tolist() == [math.inf]
        single = AddLaplacianSpectrum(**kwargs)(Data(num_nodes=1))
        assert single.eigvals.tolist() == [0.0]
        assert single.eigvecs.tolist() == [1.0]


def test_names_dtype_and_repr():
    transform = AddLaplacianSpectrum(2, eigval_name="low_vals", eigvec_name="low", dtype=torch.float32)
    data = transform(rook())
    assert {"low_vals", "low", "low_count", "low_gap"} <= set(data.keys())
    assert data.low_vals.dtype == data.low.dtype == data.low_gap.dtype == torch.float32
    assert repr(transform) == "AddLaplacianSpectrum(k=2, normalization='sym', cutoff=None, snap='up', tol=1e-06)"
    assert "low" not in rook()


def molecules(num: int = 40) -> list[Data]:
    out = []
    for seed in range(num):
        graph = nx.random_labeled_tree(4 + seed % 7, seed=seed)
        graph.add_edge(0, 3)
        out.append(undirected(graph))
    return out


@pytest.mark.parametrize("kwargs", [{}, {"k": 3}, {"cutoff": 1.0, "snap": "down"}])
def test_many_equal_one_by_one(kwargs, monkeypatch):
    monkeypatch.setattr("geo.transforms.add_laplacian_spectrum._BLOCK", 16)
    data_list = [*molecules(), Data(edge_index=NO_EDGE, num_nodes=0), undirected(nx.path_graph(100))]
    transform = AddLaplacianSpectrum(**kwargs, dense_nodes=50)
    many = transform.transform_many(data_list)
    assert "eigvals" not in data_list[0]
    for data, found in zip(data_list, many, strict=True):
        expected = transform(data)
        for key in ("eigvals", "eigvecs", "eig_count", "eig_gap"):
            assert torch.equal(found[key], expected[key]), key
    assert transform.transform_many([]) == []


def test_many_with_a_progress_bar(capsys):
    AddLaplacianSpectrum().transform_many(molecules(3), progress=True)
    assert "spectra" in capsys.readouterr().err


def test_many_warns_once():
    with pytest.warns(UserWarning, match="splits an eigenspace") as record:
        AddLaplacianSpectrum(k=3, snap=None).transform_many([rook(), rook()])
    assert len(record) == 1


def test_batches_of_different_widths():
    data_list = [AddLaplacianSpectrum(k=3)(data) for data in (rook(), *molecules(5))]
    batch = next(iter(DataLoader(data_list, batch_size=6)))
    assert batch.eig_count.tolist() == [int(data.eig_count) for data in data_list]
    assert torch.equal(batch.eigvals, torch.cat([data.eigvals for data in data_list]))
    for data, found in zip(data_list, Batch.to_data_list(batch), strict=True):
        assert torch.equal(found.eigvecs, data.eigvecs)


class Rings(InMemoryDataset):
    def __init__(self, root, pre_transform=None):
        super().__init__(root, pre_transform=pre_transform)
        self.load(self.processed_paths[0])

    @property
    def processed_file_names(self):
        return "rings.pt"

    def process(self):
        self.save([self.pre_transform(undirected(nx.cycle_graph(n))) for n in (3, 8, 5)], self.processed_paths[0])


def test_as_pre_transform_of_a_saved_dataset(tmp_path, capfd):
    transform = AddLaplacianSpectrum(k=4)
    Rings(str(tmp_path), transform)
    for data, n in zip(Rings(str(tmp_path), transform), (3, 8, 5), strict=True):
        expected = transform(undirected(nx.cycle_graph(n)))
        assert torch.equal(data.eigvals, expected.eigvals)
        assert torch.equal(data.eigvecs, expected.eigvecs)


# --- sparse methods --------------------------------------------------------------------------------------------------

SPARSE = {
    "grid": nx.grid_2d_graph(18, 18),  # exactly degenerate pairs
    "expander": nx.random_regular_graph(6, 400, seed=1),
    "hypercube": nx.hypercube_graph(8),  # eigenspaces of 1, 8, 28, ... dimensions
    "path": nx.path_graph(300),
    "hub": nx.barabasi_albert_graph(300, 2, seed=0),
    "weak link": nx.barbell_graph(120, 0),
    "parts": nx.disjoint_union_all(
        [nx.grid_2d_graph(12, 12), nx.grid_2d_graph(12, 12), nx.path_graph(5), nx.empty_graph(3)]
    ),
}


@pytest.fixture(params=["shift-invert", "chebyshev"])
def method(request, monkeypatch):
    """Force a method, and see that it is used."""
    used = []
    solve = sparse_spectrum._Iteration.solve

    def spy(self, *args):
        used.append(type(self).__name__)
        return solve(self, *args)

    monkeypatch.setattr(sparse_spectrum._Iteration, "solve", spy)
    if request.param == "chebyshev":
        monkeypatch.setattr(sparse_spectrum, "dissect", lambda *_: None)
    yield request.param
    assert set(used) == {"_ShiftInvert" if request.param == "shift-invert" else "_Chebyshev"}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("kwargs", [{"k": 8}, {"k": 8, "normalization": None}, {"k": 8, "snap": "down"}], ids=str)
def test_sparse_equals_dense(name, kwargs, method):
    data = undirected(SPARSE[name])
    expected = AddLaplacianSpectrum(**kwargs)(data)
    found = AddLaplacianSpectrum(**kwargs, dense_nodes=0)(data)
    assert torch.equal(found.eig_count, expected.eig_count)
    assert_close(found.eigvals, expected.eigvals)
    assert_close(found.eig_gap, expected.eig_gap)
    # a residual of 1e-10 and a gap of 1e-4 leave 1e-6 of rotation
    distance = vectors(found) @ vectors(found).t() - vectors(expected) @ vectors(expected).t()
    assert distance.abs().max() < 1e-6


def test_sparse_cutoff_equals_dense(method):
    data = undirected(SPARSE["grid"])
    expected = AddLaplacianSpectrum(cutoff=0.15)(data)
    found = AddLaplacianSpectrum(cutoff=0.15, dense_nodes=0)(data)
    assert int(expected.eig_count) > sparse_spectrum._FIRST
    assert_close(found.eigvals, expected.eigvals)


def test_sparse_snap_extends_until_the_eigenspace_closes(method):
    """1 + 8 + 28 eigenpairs of the hypercube, of which 10 are asked for."""
    found = AddLaplacianSpectrum(k=10, dense_nodes=0)(undirected(SPARSE["hypercube"]))
    assert found.eig_count.tolist() == [37]
    assert_close(found.eigvals, torch.tensor([0.0] + [0.25] * 8 + [0.5] * 28))


def test_sparse_is_deterministic(method):
    data = undirected(SPARSE["expander"])
    transform = AddLaplacianSpectrum(k=8, dense_nodes=0)
    assert torch.equal(transform(data).eigvecs, transform(data).eigvecs)


def test_parts_are_solved_one_by_one_and_small_ones_densely(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        sparse_spectrum,
        "solve_dense",
        lambda m: sizes.append((len(m), m[0].diagonal.size)) or spectrum_solver.solve_dense(m),
    )
    data = undirected(nx.disjoint_union_all([nx.path_graph(90), *[nx.path_graph(4)] * 3, nx.empty_graph(9)]))
    found = AddLaplacianSpectrum(k=13, dense_nodes=10)(data)
    assert sorted(sizes) == [(3, 4), (9, 1)]
    assert found.eig_count.tolist() == [13]
    assert found.eigvals.max() < 1e-15
    assert_close(found.eig_gap, torch.tensor([1 - math.cos(math.pi / 89)], dtype=torch.float64))


def matrix_of(graph: nx.Graph) -> spectrum_solver.HermitianMatrix:
    return laplacian_matrix(symmetrize(read_edges(undirected(graph), None), False), normalize=True)


@pytest.mark.parametrize("name", ["grid", "expander", "hypercube", "path", "hub"])
def test_fill_is_known_before_factoring(name):
    laplacian = sparse_spectrum._sparse(matrix_of(SPARSE[name]))
    order, bound = sparse_spectrum.dissect(laplacian, 10**9)
    assert np.array_equal(np.sort(order), np.arange(laplacian.shape[0]))
    factor = sparse_spectrum.factorize(laplacian, 1e-3, order)
    assert factor.L.nnz <= bound
    assert np.array_equal(factor.perm_r, factor.perm_c)
    assert sparse_spectrum.dissect(laplacian, bound) is not None
    assert sparse_spectrum.dissect(laplacian, bound - 1) is None


def test_fill_bound_tells_grids_from_expanders():
    """A grid of n nodes fills as n log n, an expander as n^2."""
    grid = sparse_spectrum.dissect(sparse_spectrum._sparse(matrix_of(nx.grid_2d_graph(60, 60))), 10**9)
    expander = sparse_spectrum.dissect(
        sparse_spectrum._sparse(matrix_of(nx.random_regular_graph(6, 3600, seed=0))), 10**9
    )
    assert grid[1] < 60 * 3600
    assert expander[1] > 600 * 3600
    star = sparse_spectrum.dissect(sparse_spectrum._sparse(matrix_of(nx.star_graph(2000))), 10**9)
    assert star[1] <= 2 * 2001


@pytest.mark.parametrize("name", ["grid", "hypercube"])
def test_a_missed_eigenpair_is_found(name, method, monkeypatch):
    """The first solve loses an eigenpair, as a block may of a wide eigenspace: the second solve brings it back."""
    solve, calls = sparse_spectrum._Iteration.solve, []

    def lossy(self, wanted, known):
        calls.append(wanted)
        eigvals, eigvecs = solve(self, wanted + 1, known)
        if len(calls) == 1:
            return np.delete(eigvals, 1), np.delete(eigvecs, 1, axis=1)
        return eigvals[:wanted], eigvecs[:, :wanted]

    monkeypatch.setattr(sparse_spectrum._Iteration, "solve", lossy)
    data = undirected(SPARSE[name])
    found = AddLaplacianSpectrum(k=8, dense_nodes=0)(data)
    expected = AddLaplacianSpectrum(k=8)(data)
    assert len(calls) >= 3
    assert_close(found.eigvals, expected.eigvals)


def test_a_wrong_eigenpair_is_refused(method, monkeypatch):
    solve = sparse_spectrum._Iteration.solve

    def wrong(self, wanted, known):
        eigvals, eigvecs = solve(self, wanted, known)
        return eigvals + 1e-6, eigvecs

    monkeypatch.setattr(sparse_spectrum._Iteration, "solve", wrong)
    with pytest.raises(RuntimeError, match=r"an eigenpair has residual 1\.0e-06 where 2\.0e-09 is allowed"):
        AddLaplacianSpectrum(k=4, dense_nodes=0)(undirected(SPARSE["grid"]))


def test_a_wrong_dense_eigenpair_is_refused(monkeypatch):
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: (eigh(a)[0] + 1e-6, eigh(a)[1]))
    with pytest.raises(RuntimeError, match="dense eigh: an eigenpair has residual"):
        AddLaplacianSpectrum()(rook())


def test_what_does_not_fit_is_refused():
    data = undirected(SPARSE["grid"])
    with pytest.raises(ValueError, match=r"dense matrices of 324 nodes need .* above max_fill_bytes=1000"):
        AddLaplacianSpectrum(dense_nodes=100, max_fill_bytes=1000)(data)
    with pytest.raises(ValueError, match="5 eigenvectors of 324 nodes need"):
        AddLaplacianSpectrum(k=4, dense_nodes=100, max_fill_bytes=1000)(data)


def test_chebyshev_gives_up_in_words(monkeypatch):
    monkeypatch.setattr(sparse_spectrum, "dissect", lambda *_: None)
    monkeypatch.setattr(sparse_spectrum, "_PRODUCTS", 50)
    with pytest.raises(RuntimeError, match=r"Chebyshev: residual .* after \d+ products.*a larger max_fill_bytes"):
        AddLaplacianSpectrum(k=4, dense_nodes=0)(undirected(SPARSE["path"]))


# --- cache -----------------------------------------------------------------------------------------------------------


def keys(data: Data) -> dict[str, list[float]]:
    return {key: data[key].tolist() for key in ("eigvals", "eigvecs", "eig_count", "eig_gap")}


def test_cache_is_read_and_equal(tmp_path, monkeypatch):
    data_list = [rook(), Data(edge_index=NO_EDGE, num_nodes=0), *molecules(5)]
    transform = AddLaplacianSpectrum(k=3, cache_dir=tmp_path / "deep")
    expected = [keys(data) for data in transform.transform_many(data_list)]
    alone = keys(transform(data_list[0]))
    assert len(list((tmp_path / "deep").iterdir())) == 2
    monkeypatch.setattr(np.linalg, "eigh", pytest.fail)
    assert [keys(data) for data in transform.transform_many(data_list)] == expected
    assert keys(transform(data_list[0])) == alone == expected[0]
    assert keys(AddLaplacianSpectrum(k=3, cache_dir=tmp_path / "deep", eigval_name="eigvals")(rook())) == alone


def test_other_settings_or_graphs_have_another_file(tmp_path):
    changed = rook()
    changed.edge_weight = torch.full((changed.num_edges,), 2.0)
    for kwargs in (
        {"k": 3},
        {"k": 4},
        {"k": 3, "normalization": None},
        {"k": 3, "snap": "down"},
        {"k": 3, "tol": 1e-7},
    ):
        AddLaplacianSpectrum(**kwargs, cache_dir=tmp_path)(rook())
    AddLaplacianSpectrum(k=3, normalization=None, cache_dir=tmp_path)(changed)
    AddLaplacianSpectrum(k=3, cache_dir=tmp_path)(undirected(nx.cycle_graph(16)))
    assert len(list(tmp_path.iterdir())) == 7


def test_damaged_cache_is_refused(tmp_path):
    transform = AddLaplacianSpectrum(k=3, cache_dir=tmp_path)
    transform(rook())
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DamagedFileError, match=r"spectrum-\w+\.npz.*delete it, and it is made again"):
        transform(rook())


def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def half_written(stream, **_):
        stream.write(b"PK half of it")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", half_written)
    with pytest.raises(OSError, match="disk full"):
        AddLaplacianSpectrum(cache_dir=tmp_path)(rook())
    assert not list(tmp_path.iterdir())


def test_a_batch_is_refused():
    batch = Batch.from_data_list([undirected(nx.complete_graph(3))] * 2)
    for transform in (AddLaplacianSpectrum(), AddMagneticLaplacianSpectrum(), AddDirectedRandomWalkPE(2)):
        with pytest.raises(ValueError, match="batch of 2 graphs; apply the transform to each"):
            transform(batch)


def test_the_gap_of_nothing_kept():
    """Four components of one node: 'down' keeps nothing of the kernel, and the gap is not infinite."""
    data = AddLaplacianSpectrum(k=1, snap="down")(Data(edge_index=torch.empty(2, 0, dtype=torch.int64), num_nodes=4))
    assert (data.eig_count.item(), data.eig_gap.item()) == (0, 0.0)


def test_one_name_for_both_and_weights_that_overflow_are_refused():
    with pytest.raises(ValueError, match="eigvec_name='v' is eigval_name"):
        AddLaplacianSpectrum(eigval_name="v", eigvec_name="v")
    data = undirected(nx.complete_graph(3))
    data.edge_weight = torch.full((6,), 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match="edge_weight sums to 6"):
        AddLaplacianSpectrum()(data)
