from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.io import read_planetoid_data
from torch_geometric.transforms import NormalizeFeatures
from torch_geometric.utils import coalesce

from geo.datasets import CitationGraph, DamagedFileError

NODES, WORDS, KNOWN = 70, 5, 50
TESTED = [node for node in range(69, 49, -1) if node != 65]


# -- files as Python 2, NumPy 1 and SciPy pickled them, opcode by opcode -----------------------------------------------
def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def text(value: bytes) -> bytes:
    return b"T" + len(value).to_bytes(4, "little") + value


def array(values: np.ndarray) -> bytes:
    dtype = b"cnumpy\ndtype\n" + text(values.dtype.str[1:].encode()) + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"<") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87Rq\x01"
    shape = b"".join(map(number, values.shape)) + (b"\x86" if values.ndim == 2 else b"\x85")
    fortran = values.flags.fnc
    data = text(values.tobytes("F" if fortran else "C"))
    return made + b"(" + number(1) + shape + dtype + (b"\x88" if fortran else b"\x89") + data + b"tb"


def array_file(values: np.ndarray) -> bytes:
    return b"\x80\x02" + array(values) + b"."


def sparse_file(dense: np.ndarray, **changed: np.ndarray) -> bytes:
    row, column = dense.nonzero()
    parts = {
        "indptr": np.searchsorted(row, np.arange(len(dense) + 1)).astype(np.int32),
        "indices": column.astype(np.int32),
        "data": dense[row, column],
        **changed,
    }
    state = text(b"_shape") + number(dense.shape[0]) + number(dense.shape[1]) + b"\x86"
    state += b"".join(text(name.encode()) + array(values) for name, values in parts.items())
    return b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n)\x81}(" + state + b"ub."


def graph_file(graph: dict[int, list[int]]) -> bytes:
    items = b"".join(number(k) + b"](" + b"".join(map(number, v)) + b"e" for k, v in graph.items())
    return b"\x80\x02ccollections\ndefaultdict\nc__builtin__\nlist\n\x85Rq\x01(" + items + b"u."


def many_times(num: int) -> bytes:
    """A graph of so many papers whose neighbours are one list, kept once."""
    nodes = b"".join(number(node) for node in range(num))
    items = number(0) + b"](" + nodes + b"eq\x02" + b"".join(number(node) + b"h\x02" for node in range(1, num))
    return b"\x80\x02ccollections\ndefaultdict\nc__builtin__\nlist\n\x85Rq\x01(" + items + b"u."


def words() -> np.ndarray:
    """Three words a paper, none in paper 65."""
    dense = np.zeros((NODES, WORDS), dtype=np.float32)
    for node in range(NODES):
        dense[node, [(node + k) % WORDS for k in range(3)]] = 1 + node % 7
    dense[65] = 0
    return dense


def write(root: Path) -> Path:
    """A ring of 70 papers with loops and two topics; 65 cites nobody and has no topic, 19 are tested, 4 known."""
    raw = root / "Cora" / "raw"
    raw.mkdir(parents=True)
    topics = np.eye(2, dtype=np.int32)[np.arange(NODES) % 2]
    for name, nodes in (("", slice(4)), ("all", slice(KNOWN)), ("t", TESTED)):
        (raw / f"ind.cora.{name}x").write_bytes(sparse_file(words()[nodes]))
        rows = np.asfortranarray(topics[nodes]) if name == "t" else topics[nodes]
        (raw / f"ind.cora.{name}y").write_bytes(array_file(rows))
    ring = {i: [] if i == 65 else [j for j in (i, (i + 1) % NODES) if j != 65] for i in range(NODES)}
    (raw / "ind.cora.graph").write_bytes(graph_file(ring))
    (raw / "ind.cora.test.index").write_text("".join(f"{node}\n" for node in TESTED))
    return raw


def test_small_files(tmp_path):
    write(tmp_path)
    (data,) = dataset = CitationGraph(tmp_path, "Cora")
    assert dataset.num_classes == 2
    assert torch.equal(data.x, torch.from_numpy(words()))
    assert data.y.tolist() == [-1 if node == 65 else node % 2 for node in range(NODES)]
    pairs = sorted({(i, (i + k) % NODES) for i in range(NODES) for k in (1, -1) if 65 not in (i, (i + k) % NODES)})
    assert data.edge_index.t().tolist() == [list(pair) for pair in pairs]
    assert data.train_mask.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert data.val_mask.nonzero().flatten().tolist() == list(range(4, KNOWN))
    assert data.test_mask.nonzero().flatten().tolist() == sorted(TESTED)


def test_transforms_and_names(tmp_path):
    write(tmp_path)
    (data,) = CitationGraph(tmp_path, "CORA", transform=NormalizeFeatures())
    assert torch.equal(data.x.sum(1).round(decimals=5), (data.y >= 0).float())
    with pytest.raises(ValueError, match="name='karate' is unknown; allowed: 'cora', 'citeseer', 'pubmed'"):
        CitationGraph(tmp_path, "karate")
    with pytest.raises(FileNotFoundError, match=r"PubMed as .*: no file .*PubMed.raw.ind\.pubmed\.x; put it there"):
        CitationGraph(tmp_path, "PubMed")


def test_nothing_that_a_file_names_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = write(tmp_path)
    for part in ("x", "ally", "graph"):
        kept = (raw / f"ind.cora.{part}").read_bytes()
        for evil in (b"\x80\x02cos\nmkdir\n" + text(b"evil") + b"\x85R.", b"cos\nmkdir\n(S'evil'\ntR."):
            (raw / f"ind.cora.{part}").write_bytes(evil)
            with pytest.raises(DamagedFileError, match=rf"ind\.cora\.{part}: cannot be read"):
                CitationGraph(tmp_path, "cora")
        (raw / f"ind.cora.{part}").write_bytes(kept)
    assert not (tmp_path / "evil").exists()


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


EYE = np.eye(2, dtype=np.int32)
RING = {i: [(i + 1) % NODES] for i in range(NODES)}


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("graph", graph_file(RING)[:-5], "ind.cora.graph: cannot be read"),
        ("graph", b"", "ind.cora.graph: cannot be read"),
        ("graph", b"\x80\x02N.", "ind.cora.graph: cannot be read"),
        ("graph", graph_file(RING).replace(number(9), text(b"9")), "nodes must be numbers"),
        ("graph", graph_file(RING | {0: [99]}), "the graph has 71 papers from 0 to 99, but test.index ends with 69"),
        ("graph", graph_file({}), "the graph has no papers"),
        ("graph", graph_file(RING).replace(number(9), b")" + b"\x85" * 200_000), "keys must be numbers or names"),
        ("graph", many_times(5000), "it lists 25000000 neighbours in "),
        ("x", sparse_file(words()[:4])[:-40], "ind.cora.x: cannot be read"),
        ("x", array_file(EYE), "ind.cora.x: cannot be read"),
        ("x", sparse_file(words()[1:5]), "x is not the beginning of allx"),
        ("x", sparse_file(words()[:3]), "x has 3 papers, but y has 4"),
        ("x", sparse_file(words()[:4, :4]), "x has 4 words, but allx has 5"),
        ("x", sparse_file(words()[:4], indices=ints(*[5] * 12)), "columns between 0 and 4"),
        ("x", sparse_file(words()[:4], indices=ints(*[-1] * 12)), "columns between 0 and 4"),
        ("x", sparse_file(words()[:4], indptr=ints(0, 3, 6, 9, 13)), "indptr must rise from 0 to 12 in 4 steps"),
        ("x", sparse_file(words()[:4], indptr=ints(0, 6, 3, 9, 12)), "indptr must rise from 0 to 12 in 4 steps"),
        ("x", sparse_file(words()[:4], data=np.full(12, np.nan)), "weights must be finite"),
        ("x", sparse_file(words()[:4], data=np.ones(11)), "ind.cora.x: cannot be read"),
        ("y", array_file(EYE[[1, 1, 0, 1]]), "y is not the beginning of ally"),
        ("y", array_file(EYE[[0, 1, 0, 1]] * 2), "topics must be rows of zeros and at most a one"),
        ("y", array_file(np.ones((4, 2))), "topics must be rows of zeros and at most a one"),
        ("y", array_file(np.zeros((4, 2), dtype=np.complex64)), "an array must hold numbers"),
        ("ty", array_file(EYE), "tx has 19 papers, but ty has 2"),
        ("ally", array_file(EYE)[:-9], "ind.cora.ally: cannot be read"),
        ("test.index", b"50\n51\n", "test.index names 2 papers, but tx and ty have 19"),
        ("test.index", b"50\nx\n", "ind.cora.test.index: cannot be read"),
        ("test.index", b"50\n" * 19, "test.index must name papers behind the 50 of allx, each once"),
        ("test.index", " ".join(map(str, range(19))).encode(), "test.index must name papers behind the 50 of allx"),
        ("test.index", " ".join(map(str, [*range(50, 68), 10**15])).encode(), f"but test.index ends with {10**15}"),
    ],
)
def test_damaged_files_are_named(tmp_path, part, content, message):
    (write(tmp_path) / f"ind.cora.{part}").write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        CitationGraph(tmp_path, "cora")
    assert message in str(caught.value)


def test_every_missing_file_is_named(tmp_path):
    raw = write(tmp_path)
    for path in sorted(raw.iterdir()):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name.replace(".", r"\.")):
            CitationGraph(tmp_path, "cora")
        path.write_bytes(content)
    CitationGraph(tmp_path, "cora")


@pytest.mark.parametrize(("name", "unlabelled"), [("Cora", 0), ("CiteSeer", 15)])
def test_published_graphs_equal_pyg(geo_data, name, unlabelled):
    root = geo_data / "planetoid"
    (data,) = CitationGraph(root, name)
    expected = read_planetoid_data(str(root / name / "raw"), name.lower())
    labelled = data.y >= 0
    assert int((~labelled).sum()) == unlabelled
    assert torch.equal(data.y[labelled], expected.y[labelled])
    assert torch.equal(data.x, expected.x)
    assert torch.equal(data.edge_index, coalesce(expected.edge_index))
    for mask in ("train_mask", "val_mask", "test_mask"):
        assert torch.equal(data[mask], expected[mask])
