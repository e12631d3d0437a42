from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from torch_geometric.loader import DataLoader

from geo.datasets import DamagedFileError, Graph6

SIZES = (0, 1, 2, 3, 7, 12, 62, 63, 64, 130)


def graphs():
    return [networkx.gnp_random_graph(n, 0.3, seed=n) for n in SIZES]


def encoded(graph) -> str:
    return networkx.to_graph6_bytes(graph, header=False).decode().strip()


def assert_same(data, expected):
    assert len(data) == len(expected)
    for item, graph in zip(data, expected, strict=True):
        assert item.num_nodes == graph.number_of_nodes()
        pairs = sorted([*graph.edges, *((b, a) for a, b in graph.edges)])
        assert item.edge_index.t().tolist() == [list(pair) for pair in pairs]
        assert item.edge_index.shape[0] == 2
        assert item.edge_index.dtype == torch.int64


@pytest.mark.parametrize("header", ["", ">>graph6<<"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_files_equal_networkx(tmp_path, header, end):
    path = tmp_path / "all.g6"
    path.write_bytes((header + end.join(encoded(graph) for graph in graphs())).encode())
    assert_same(Graph6(path), graphs())


@pytest.mark.parametrize("dtype", ["U", "S"])
def test_arrays_equal_networkx(tmp_path, dtype):
    pairs = np.array([encoded(graph) for graph in graphs()], dtype=dtype).reshape(-1, 2)
    np.save(tmp_path / "pairs.npy", pairs)
    assert_same(Graph6(tmp_path / "pairs.npy"), graphs())


def test_batches_and_transforms(tmp_path):
    path = tmp_path / "all.g6"
    path.write_text("\n".join(encoded(graph) for graph in graphs()))
    data = Graph6(path, pre_filter=lambda graph: graph.num_nodes > 2)
    batch = next(iter(DataLoader(data, batch_size=len(data))))
    assert batch.num_graphs == len(SIZES) - 3
    assert batch.num_nodes == sum(SIZES) - 3


def test_eight_bytes_of_size(tmp_path):
    """The longest form of the number of nodes holds small ones, too."""
    path = tmp_path / "long.g6"
    path.write_bytes(b"~~?????Bw\n~??Bw")
    assert [(graph.num_nodes, graph.num_edges) for graph in Graph6(path)] == [(3, 6), (3, 6)]


def test_array_of_objects_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array(["Bw", b"Bw"], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedFileError, match="Python objects, which would have to be unpickled"):
        Graph6(tmp_path / "objects.npy")
    np.save(tmp_path / "numbers.npy", np.arange(3))
    with pytest.raises(DamagedFileError, match="an array of int64, not of strings"):
        Graph6(tmp_path / "numbers.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"Bw\nDh", "line 2: 2 bytes, but a graph of 5 nodes has 3"),
        (b"Bw\nDhcc", "line 2: 4 bytes, but a graph of 5 nodes has 3"),
        (b"Bw\n:Fa@x^", "line 2: this is sparse6"),
        (b"&DI?AO?", "line 1: this is digraph6"),
        (b"Bw\nB\x02", r"line 2: b'B\\x02' is not graph6"),
        ("Bé".encode(), "is not graph6"),
        (b"~?", "2 bytes, but"),
        (b"~", "1 bytes, but"),
        (b"\n", "holds no graph"),
    ],
)
def test_malformed_graphs_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.g6"
    path.write_bytes(text)
    with pytest.raises(DamagedFileError, match=message):
        Graph6(path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "pairs.npy"
    np.save(path, np.array(["Bw", "Dhc"]))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedFileError, match=r"pairs\.npy"):
        Graph6(path)
    path.write_bytes(b"Bw")
    with pytest.raises(DamagedFileError, match=r"pairs\.npy"):
        Graph6(path)
    with pytest.raises(DamagedFileError, match="SHA-256"):
        Graph6(path, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match=r"none\.g6"):
        Graph6(tmp_path / "none.g6")


@pytest.mark.parametrize(
    ("name", "count", "degrees"),
    [
        ("sr25/sr251256.g6", 15, {12}),
        ("graph8c/graph8c.g6", 11117, None),
        ("brec/basic.npy", 120, None),
        ("brec/regular.npy", 100, "regular"),
        ("brec/str.npy", 100, "regular"),
        ("brec/extension.npy", 200, None),
        ("brec/cfi.npy", 200, None),
        ("brec/4vtx.npy", 40, "regular"),
        ("brec/dr.npy", 40, "regular"),
    ],
)
def test_published_collections(geo_data, name, count, degrees):
    path = geo_data / "expressiveness" / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = Graph6(path)
    assert len(data) == count
    found = [set(graph.edge_index[0].bincount(minlength=graph.num_nodes).tolist()) for graph in data]
    if degrees == "regular":
        assert all(len(degree) == 1 for degree in found)
    elif degrees is not None:
        assert all(degree == degrees for degree in found)
    if name.endswith(".npy"):
        strings = np.load(path, allow_pickle=False).ravel().tolist()
        texts = [text if isinstance(text, bytes) else text.encode() for text in strings]
        assert_same(data[:20], [networkx.from_graph6_bytes(text) for text in texts[:20]])
