from __future__ import annotations

import math
import pickle
import warnings

import pytest
import torch
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import Compose

from geo.kernels import (
    GRFKernel,
    SparseFeatures,
    features_of,
    heat,
    inverse_cosine,
    katz,
    normalized_adjacency,
    pair,
    personalised_pagerank,
    random_walk,
    regularised_laplacian,
)
from geo.ops import WalkDeposits, grf_walks
from geo.testing import assert_close
from geo.transforms import AddGRF, AddWalkTokens, read_grf


def graph(num_nodes=10, num_edges=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, num_nodes), (2, num_edges), generator=generator)
    return Data(edge_index=torch.cat((edges, edges.flip(0)), 1), x=torch.randn(num_nodes, 2, generator=generator))


def graphs():
    return [graph(n, e, i) for i, (n, e) in enumerate(((0, 0), (1, 0), (1, 1), (3, 3), (20, 30), (6, 0)))]


# -- what is stored ----------------------------------------------------------------------------------------------------
def test_features_are_those_of_the_walks():
    data, series = graph(), heat(2.0)
    matrix = normalized_adjacency(data.edge_index, None, 10, dtype=torch.float64)
    deposits = grf_walks(*matrix, num_walks=8, seed=5, p_halt=0.3)
    out = AddGRF(8, series, p_halt=0.3, seed=5, dtype=torch.float64)(data)
    lengths = int(deposits.length.max()) + 1
    expected = features_of(deposits, math.sqrt(series.scale) * series.modulation(lengths), 10)
    phi = read_grf(out)
    assert isinstance(phi, SparseFeatures)
    assert_close(phi.to_dense(), expected.to_dense())
    assert out.grf_count.sum() == out.grf_index.numel() == out.grf_value.numel()
    assert "grf_index" not in data
    stored = read_grf(AddGRF(8, p_halt=0.3, seed=5, dtype=torch.float64)(data))
    assert isinstance(stored, WalkDeposits)
    for ours, theirs in zip(stored, deposits, strict=True):
        assert torch.equal(ours, theirs)


def test_dot_products_estimate_the_kernel():
    """Beside the diagonal, without bias; twice as many walks have half the squared error."""
    data, series = graph(), regularised_laplacian(1.0, 2.0)
    exact = GRFKernel(data.edge_index, series, num_nodes=10).exact()
    away = ~torch.eye(10, dtype=torch.bool)
    phi = read_grf(AddGRF(8192, series)(data)).to_dense()
    assert ((phi @ phi.t() - exact)[away]).abs().max() < 0.03 * exact.abs().max()
    first = read_grf(AddGRF(4096, series)(data)).to_dense()
    second = read_grf(AddGRF(4096, series, first_walk=4096)(data)).to_dense()
    assert not torch.equal(first, second)
    assert (first @ second.t() - exact).abs().max() < 0.03 * exact.abs().max()


def test_the_encoding_keeps_dot_products():
    """Their mean over projections, and exactly the features times one matrix."""
    data, series = graph(), heat(1.0)
    options = {"num_walks": 4, "series": series, "dtype": torch.float64}
    phi = read_grf(AddGRF(**options)(data)).to_dense()
    wide = AddGRF(**options, dim=1 << 14)(data)
    assert wide.grf.shape == (10, 1 << 14)
    assert (wide.grf @ wide.grf.t() - phi @ phi.t()).abs().max() < 0.04 * (phi @ phi.t()).max()
    projection = AddGRF(**options, dim=1 << 14)._projection(10, 1 << 14, phi)
    assert_close(wide.grf, phi @ projection)
    normal = projection * 128
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.var()) - 1) < 0.01
    assert abs(float((normal**4).mean()) - 3) < 0.1
    assert (torch.corrcoef(normal) - torch.eye(10)).abs().max() < 0.04
    assert (torch.corrcoef(normal.view(-1, 4).t()) - torch.eye(4)).abs().max() < 0.04


def test_the_projection_is_independent_of_the_walks():
    """Neither the end of a walk nor its direction is told by the numbers of its node, walk 0 to 3 and step 0."""
    n = 4096
    ring = torch.arange(n)
    edges = torch.stack((ring, (ring + 1) % n))
    data = Data(edge_index=torch.cat((edges, edges.flip(0)), 1), num_nodes=n)
    normal = AddGRF(4, heat(1.0), dim=16)._projection(n, 16, torch.zeros((), dtype=torch.float64)).view(n, 4, 4)
    radii, angles = (f(normal[..., 0::2], normal[..., 1::2]) for f in (torch.hypot, torch.atan2))
    numbers = torch.cat((normal, radii, angles, angles.abs()), 2).flatten(1)
    for k in range(4):
        deposits = read_grf(AddGRF(1, p_halt=0.5, coupling="iid", max_length=1, first_walk=k)(data))
        row = torch.repeat_interleave(ring, deposits.ptr.diff())
        step = deposits.length == 1
        goes, right = torch.zeros(2, n, dtype=torch.float64)
        goes[row[step]] = 1
        right[row[step]] = torch.where((deposits.col - row)[step] % n == 1, 1.0, -1.0).double()
        for told in (goes, right):
            correlation = torch.corrcoef(torch.cat((told.unsqueeze(0), numbers.t())))[0, 1:]
            assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("dim", [1, 3, 4, 5])
def test_every_width(dim):
    data = AddGRF(4, heat(1.0), dim=dim)(graph())
    assert data.grf.shape == (10, dim)
    assert data.grf.dtype == torch.float32
    wider = AddGRF(4, heat(1.0), dim=8)(graph())
    assert_close(data.grf * math.sqrt(dim), wider.grf[:, :dim] * math.sqrt(8))


def test_weights():
    data = graph()
    data.edge_weight = torch.rand(14).repeat(2)
    weighted, plain = AddGRF(64, heat(1.0))(data), AddGRF(64, heat(1.0), weight_name=None)(data)
    assert not torch.allclose(weighted.grf_value, plain.grf_value)
    data.edge_weight = data.edge_weight.unsqueeze(1)
    assert torch.equal(AddGRF(64, heat(1.0))(data).grf_value, weighted.grf_value)
    data.w, data.edge_weight = data.edge_weight, None
    assert torch.equal(AddGRF(64, heat(1.0), weight_name="w")(data).grf_value, weighted.grf_value)
    assert torch.equal(AddGRF(64, heat(1.0))(data).grf_value, plain.grf_value)


def test_walks_are_cut():
    series = random_walk(p=4)
    deposits = read_grf(AddGRF(64, max_length=2)(graph()))
    assert deposits.length.max() == 2
    cut, whole = AddGRF(64, series)(graph()), AddGRF(64, series, max_length=9)(graph())
    assert_close(read_grf(cut).to_dense(), read_grf(whole).to_dense())


def test_isolated_nodes_and_empty_graphs():
    phi = read_grf(AddGRF(4, heat(1.0))(graph(6, 0)))
    assert_close(phi.to_dense(), math.exp(-0.5) * torch.eye(6))
    for dim in (None, 3):
        out = AddGRF(4, heat(1.0), dim=dim)(graph(0, 0))
        assert (out.grf if dim else read_grf(out).to_dense()).shape == (0, dim or 0)


def test_directed_walks_follow_the_edges():
    data = Data(edge_index=torch.tensor([[0, 1], [1, 2]]), num_nodes=3)
    phi = read_grf(AddGRF(64, heat(1.0))(data)).to_dense()
    assert phi.gt(0).tolist() == [[True, True, True], [False, True, True], [False, False, True]]


def test_dot_products_on_directed_graphs():
    """One set estimates F(W) F(W)^T; with a second one on the flipped graph there is the kernel."""
    data, series = Data(edge_index=torch.tensor([[0, 1, 2, 0], [1, 2, 3, 2]]), num_nodes=4), heat(1.0)
    flipped = Data(edge_index=data.edge_index.flip(0), num_nodes=4)
    first = read_grf(AddGRF(1 << 14, series)(data)).to_dense()
    second = read_grf(AddGRF(1 << 14, series, first_walk=1 << 14)(flipped)).to_dense()
    kernel = GRFKernel(data.edge_index, series, num_nodes=4)
    assert (first @ second.t() - kernel.exact()).abs().max() < 0.01
    matrix = SparseFeatures(*normalized_adjacency(data.edge_index, None, 4), 4).to_dense()
    root = torch.matrix_exp(matrix / 2)
    assert (first @ first.t() - math.exp(-1) * root @ root.t()).abs().max() < 0.01
    assert (first @ first.t() - kernel.exact()).abs().max() > 0.1


def test_a_permutation_changes_the_draw_but_not_its_mean():
    data, order = graph(), torch.randperm(10)
    place = torch.empty_like(order)
    place[order] = torch.arange(10)
    moved = Data(edge_index=place[data.edge_index], num_nodes=10)
    first, second = (read_grf(AddGRF(4096, heat(1.0))(d)).to_dense() for d in (data, moved))
    second = second[place][:, place]
    assert not torch.equal(first, second)
    assert (first - second).abs().max() < 0.05


# -- seeds and batches -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dim", [None, 5])
def test_a_function_of_the_seed(dim):
    name = "grf" if dim else "grf_value"
    torch.manual_seed(1)
    first = AddGRF(8, heat(1.0), dim=dim, seed=3)(graph())[name]
    torch.manual_seed(2)
    assert torch.equal(AddGRF(8, heat(1.0), dim=dim, seed=3)(graph())[name], first)
    other = AddGRF(8, heat(1.0), dim=dim, seed=4)(graph())[name]
    assert other.shape != first.shape or not torch.allclose(other, first)


@pytest.mark.parametrize("series", [heat(1.0), None])
def test_batches_are_block_diagonal(series):
    some = [AddGRF(8, series)(data) for data in graphs()]
    batch = Batch.from_data_list(some)
    together = read_grf(batch)
    if series is None:
        assert together.ptr[-1] == together.col.numel() == together.length.numel()
        matrices = [features_of(deposits, torch.ones(64), int(batch.num_nodes)) for deposits in (together,)]
        alone = [features_of(read_grf(d), torch.ones(64), d.num_nodes).to_dense() for d in some]
        assert_close(matrices[0].to_dense(), torch.block_diag(*alone))
    else:
        alone = [read_grf(d).to_dense() for d in some]
        assert_close(together.to_dense(), torch.block_diag(*alone))
    for data, kept in zip(batch.to_data_list(), some, strict=True):
        for name in kept.keys():  # noqa: SIM118
            assert torch.equal(data[name], kept[name])


def test_a_loader():
    transform = Compose([AddGRF(4, heat(1.0)), AddGRF(4, heat(1.0), "pe", dim=3)])
    (batch,) = DataLoader([transform(d) for d in graphs()], batch_size=6)
    assert read_grf(batch).shape == (31, 31)
    assert batch.pe.shape == (31, 3)


@pytest.mark.parametrize("series", [heat(1.0), regularised_laplacian(0.5, 2.0), None])
def test_goes_to_the_workers_of_a_loader(series):
    """Which are sent the transform as bytes."""
    transform = Compose([AddGRF(4, series, p_halt=0.3, dtype=torch.float64)])
    copy = pickle.loads(pickle.dumps(transform))  # noqa: S301, our own bytes
    for data in graphs():
        expected, out = transform(data), copy(data)
        for name in expected.keys():  # noqa: SIM118
            assert torch.equal(out[name], expected[name])
    assert repr(copy) == repr(transform)


def test_beside_tokens_of_walks():
    tokens = AddWalkTokens(walk_length=2, seed=1)
    batch = Batch.from_data_list([AddGRF(4, heat(1.0))(tokens(data)) for data in graphs()])
    alone = [read_grf(AddGRF(4, heat(1.0))(data)).to_dense() for data in graphs()]
    assert_close(read_grf(batch).to_dense(), torch.block_diag(*alone))


def test_edge_index_of_pyg():
    data = graph()
    plain = AddGRF(4, heat(1.0))(data)
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(10, 10))
    assert torch.equal(AddGRF(4, heat(1.0))(data).grf_value, plain.grf_value)


def test_every_device(device):
    for options in ({}, {"series": heat(1.0)}, {"series": heat(1.0), "dim": 3}):
        expected, out = (AddGRF(8, **options)(graph().to(d)) for d in ("cpu", device))
        for name in expected.keys():  # noqa: SIM118
            assert_close(out[name].cpu(), expected[name])


# -- what is refused ---------------------------------------------------------------------------------------------------
REFUSED = {
    "attr_name is 'edge_grf'": {"attr_name": "edge_grf"},
    "attr_name is 'a b'": {"attr_name": "a b"},
    "dim is 0, but must be an integer of at least 1": {"series": heat(1.0), "dim": 0},
    "dim is 3, but series is None": {"dim": 3},
    "series is katz": {"series": katz(0.1)},
    "series is personalised_pagerank": {"series": personalised_pagerank(0.2)},
    "series is pair": {"series": pair([1.0, 1.0], [1.0])},
    "series is inverse_cosine.*below 0.785398, .*take a series of shorter range": {"series": inverse_cosine(1.0)},
    "num_walks": {"num_walks": 3},
    "p_halt": {"p_halt": 0.0},
    "coupling": {"coupling": "none"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_options(message):
    with pytest.raises(ValueError, match=message):
        AddGRF(**REFUSED[message])


def test_infinite_variance_warns():
    with pytest.warns(UserWarning, match=r"infinite variance with p_halt=0\.5: take p_halt below 0\.36"):
        AddGRF(series=regularised_laplacian(2.0))
    AddGRF(series=regularised_laplacian(2.0), p_halt=0.3)
    AddGRF(series=regularised_laplacian(2.0), max_length=8)


def test_infinite_variance_of_edge_weights_warns():
    """One heavy edge among many at each end: half of its square comes by a step in twenty."""
    star = torch.cat((torch.zeros(1, 21), torch.arange(1, 22).unsqueeze(0))).long()
    data = Data(edge_index=torch.cat((star, star.flip(0)), 1), num_nodes=22)
    series = regularised_laplacian(1.0)
    options = {"num_walks": 4, "p_halt": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AddGRF(series=series, **options)(data)
        data.edge_weight = torch.tensor([100.0] + [1.0] * 20).repeat(2)
        AddGRF(series=heat(1.0), **options)(data)
        AddGRF(series=series, proposal="weight", **options)(data)
        AddGRF(series=series, max_length=4, **options)(data)
        AddGRF(**options)(data)
    with pytest.warns(UserWarning, match=r"infinite variance with p_halt=0\.5 on a graph with such edge weights: .*pr"):
        AddGRF(series=series, **options)(data)
    repeated = Data(edge_index=data.edge_index.repeat_interleave(data.edge_weight.long(), 1), num_nodes=22)
    with pytest.warns(UserWarning, match="on a graph with such edge weights"):
        AddGRF(series=series, **options)(repeated)


def test_refused_data():
    transform = AddGRF()
    for data in (Batch.from_data_list(graphs()), HeteroData()):
        with pytest.raises(ValueError, match=f"data is a {type(data).__name__}, but must be one graph"):
            transform.forward(data)
    with pytest.raises(ValueError, match="data has no edge_index"):
        transform(Data(x=torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="the number of nodes is not given"):
        transform(Data(edge_index=torch.tensor([[0], [1]])))
    with pytest.raises(IndexError, match="edge_index"):
        transform(Data(edge_index=torch.tensor([[0], [5]]), num_nodes=2))
    with pytest.raises(ValueError, match=r"data has no grf_count, .* apply AddGRF\(attr_name='grf'\) without dim"):
        read_grf(AddGRF(4, heat(1.0), dim=3)(graph()))


def test_repr():
    text = repr(AddGRF(8, heat(2.0), seed=7))
    assert text.startswith("AddGRF(series=heat(t=2), num_walks=8, attr_name='grf', dim=None, p_halt=0.5")
    assert "seed=7" in text
    assert repr(AddGRF(8)) != repr(AddGRF(8, seed=1))
