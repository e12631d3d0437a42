from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch, Data

from geo.nn import pad_spectrum
from geo.testing import assert_close
from geo.transforms import AddLaplacianSpectrum


def ring(num_nodes: int) -> Data:
    node = torch.arange(num_nodes)
    edges = torch.stack([node, (node + 1) % num_nodes])
    return Data(edge_index=torch.cat([edges, edges.flip(0)], dim=1), num_nodes=num_nodes)


def isolated(num_nodes: int) -> Data:
    return Data(edge_index=torch.zeros(2, 0, dtype=torch.int64), num_nodes=num_nodes)


def graphs(**kwargs) -> list[Data]:
    transform = AddLaplacianSpectrum(**kwargs)
    return [transform(data) for data in (ring(5), isolated(1), isolated(0), ring(7), isolated(3))]


@pytest.mark.parametrize("kwargs", [{}, {"k": 2}, {"cutoff": 0.5}])
def test_each_graph_finds_its_eigenpairs_in_its_rows(kwargs):
    data_list = graphs(**kwargs)
    batch = Batch.from_data_list(data_list)
    eigvals, eigvecs, mask = pad_spectrum(batch, torch.float64)
    assert eigvals.shape == mask.shape == (5, int(batch.eig_count.max()))
    assert eigvecs.shape == (16, eigvals.size(1))
    for g, data in enumerate(data_list):
        k, n = int(data.eig_count), data.num_nodes
        rows = eigvecs[batch.ptr[g] : batch.ptr[g + 1]]
        assert torch.equal(eigvals[g, :k], data.eigvals)
        assert torch.equal(rows[:, :k], data.eigvecs.view(n, k))
        assert mask[g].tolist() == [True] * k + [False] * (eigvals.size(1) - k)
        assert not eigvals[g, k:].any()
        assert not rows[:, k:].any()


def test_eigenvectors_are_of_the_laplacian():
    data = AddLaplacianSpectrum()(ring(6))
    eigvals, eigvecs, _ = pad_spectrum(data, torch.float64)
    expected = torch.eye(6, dtype=torch.float64)
    expected[data.edge_index[0], data.edge_index[1]] = -0.5
    assert_close(eigvecs @ torch.diag(eigvals[0]) @ eigvecs.T, expected)


def test_a_single_graph_is_a_batch_of_one():
    data = AddLaplacianSpectrum(k=3)(ring(5))
    alone = pad_spectrum(data)
    together = pad_spectrum(Batch.from_data_list([data]))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    assert alone[0].dtype == torch.float32
    assert alone[1].dtype == torch.float32
    assert alone[2].dtype == torch.bool


def test_on_a_device(device):
    data_list = [AddLaplacianSpectrum(k=2)(data.to(device)) for data in (ring(5), ring(4))]
    found = pad_spectrum(Batch.from_data_list(data_list))
    expected = pad_spectrum(Batch.from_data_list([data.cpu() for data in data_list]))
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == device.type
        assert torch.equal(a.cpu(), b)


def test_compiled_equals_eager():
    """Sizes are data, so the graph breaks; the numbers are the same."""
    batch = Batch.from_data_list(graphs(k=2))
    compiled = torch.compile(pad_spectrum, backend="eager")
    for a, b in zip(compiled(batch), pad_spectrum(batch), strict=True):
        assert torch.equal(a, b)


def test_no_graph_and_no_node():
    empty = AddLaplacianSpectrum()(isolated(0))
    for data in (empty, Batch.from_data_list([empty, empty])):
        eigvals, eigvecs, mask = pad_spectrum(data)
        assert eigvals.shape == mask.shape == (data.eig_count.numel(), 0)
        assert eigvecs.shape == (0, 0)


def test_other_names():
    data = AddLaplacianSpectrum(k=1, eigval_name="low_vals", eigvec_name="low")(ring(5))
    data = AddLaplacianSpectrum()(data)
    assert pad_spectrum(data, eigval_name="low_vals", eigvec_name="low")[0].shape == (1, 1)
    assert pad_spectrum(data)[0].shape == (1, 5)
    assert data.low_count.tolist() == [1]


def test_bad_input():
    with pytest.raises(ValueError, match="no eigvals, eigvecs, eig_count; apply AddLaplacianSpectrum"):
        pad_spectrum(ring(3))
    batch = Batch.from_data_list(graphs())
    short = batch.clone()
    short.eigvecs = short.eigvecs[1:]
    with pytest.raises(ValueError, match=r"eigvecs \(83,\).*do not fit together for 16 nodes"):
        pad_spectrum(short)
    del batch.batch
    with pytest.raises(ValueError, match="the spectra of 5 graphs, but has no batch"):
        pad_spectrum(batch)
