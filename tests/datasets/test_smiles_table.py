from __future__ import annotations

import gzip

import pytest
import torch
from torch_geometric.loader import DataLoader

from geo.datasets import DamagedFileError, SmilesTable, molecule_graph
from geo.datasets.smiles_table import ATOM_TYPES

Chem = pytest.importorskip("rdkit.Chem")

TABLE = """name,smiles,logS,melting
ethanol,CCO,1.1,-114
benzene,c1ccccc1,-1.6,5.5
"acid, zwitterion",C[C@H]([NH3+])C(=O)[O-],0.2,297
methane,C,-0.9,-182
"""


def write(path, text=TABLE):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def names(data) -> list[str]:
    return [ATOM_TYPES[i] for i in data.x.flatten().tolist()]


def edges(data) -> dict[tuple[int, int], int]:
    return dict(zip(map(tuple, data.edge_index.t().tolist()), data.edge_attr.tolist(), strict=True))


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_molecules(tmp_path, name):
    data = SmilesTable(write(tmp_path / name), "smiles", ["melting", "logS"])
    assert len(data) == 4
    assert data.skipped == []
    ethanol, benzene, acid, methane = data
    assert ethanol.y.tolist() == [[-114.0, pytest.approx(1.1)]]
    assert names(ethanol) == ["C", "C", "O"]
    assert edges(ethanol) == {(0, 1): 1, (1, 0): 1, (1, 2): 1, (2, 1): 1}
    assert names(benzene) == ["C"] * 6
    assert sorted(benzene.edge_attr.tolist()) == [1] * 6 + [2] * 6
    assert names(acid) == ["C", "CH", "NH3+", "C", "O", "O-"]
    assert edges(acid)[3, 4] == 2
    assert (methane.edge_index.shape, methane.edge_attr.shape) == ((2, 0), (0,))
    assert [data.x.dtype, data.edge_attr.dtype, data.y.dtype] == [torch.int64, torch.int64, torch.float32]
    assert acid.smiles == "C[C@H]([NH3+])C(=O)[O-]"


@pytest.mark.parametrize("features", ["types", "rich"])
def test_batches(tmp_path, features):
    data = SmilesTable(write(tmp_path / "table.csv"), target="logS", features=features)
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch.y.shape == (4, 1)
    assert batch.x.size(0) == 3 + 6 + 6 + 1
    assert batch.edge_attr.size(0) == batch.edge_index.size(1) == 2 * (2 + 6 + 5)
    for graph in data:
        assert graph.is_undirected()
        backward = torch.arange(graph.num_edges).view(-1, 2).flip(1).flatten()
        assert torch.equal(graph.edge_index[:, backward], graph.edge_index.flip(0))
        assert torch.equal(graph.edge_attr[backward], graph.edge_attr)


def test_aromatic_bonds():
    assert molecule_graph("c1ccccc1", kekulize=False).edge_attr.tolist() == [4] * 12
    assert sorted(molecule_graph("c1ccccc1").edge_attr.tolist()) == [1] * 6 + [2] * 6


EXAMPLES = """C C,O O,N N,F F,S S,Cl Cl,Br Br,I I,CH C[C@H](F)Cl,O- C[O-],NH+ C[NH+](C)C,NH3+ C[NH3+],NH2+ C[NH2+]C,
N+ C[N+](C)(C)C,N- C[N-]C,S- C[S-],P CP(C)C,OH+ C[OH+]C,NH- C[NH-],O+ C[O+](C)C,S+ C[S+](C)C,PH CPC,PH2 CP,CH2- C[CH2-],
P+ C[P+](C)(C)C,SH+ C[SH+]C,CH- C[CH-]C,PH+ C[PH+](C)C"""


def test_every_type_has_a_molecule():
    assert len(ATOM_TYPES) == len(set(ATOM_TYPES)) == 28
    examples = dict(pair.split() for pair in EXAMPLES.split(","))
    assert set(examples) == set(ATOM_TYPES)
    for name, smiles in examples.items():
        assert name in names(molecule_graph(smiles)), smiles
    assert molecule_graph("C[Si](C)(C)C").x.flatten().tolist() == [0, 28, 0, 0, 0]
    assert names(molecule_graph("c1cc[nH]c1")) == ["C", "C", "C", "N", "C"]


def test_rich_features():
    data = molecule_graph("C#Cc1cc[nH]c1.[Na+]", rich=True)
    assert data.x.shape == (8, 25)
    assert data.edge_attr.shape == (14, 6)
    assert data.x[:, :10].argmax(1).tolist() == [0, 0, 0, 0, 0, 1, 0, 9]  # element
    assert data.x[:, 10:15].argmax(1).tolist() == [1, 2, 3, 2, 2, 2, 2, 0]  # neighbours
    assert data.x[:, 15:20].argmax(1).tolist() == [1, 0, 0, 1, 1, 1, 1, 0]  # hydrogens
    assert data.x[:, 20:].t().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    bond = {tuple(e): f.tolist() for e, f in zip(data.edge_index.t().tolist(), data.edge_attr, strict=True)}
    assert bond[0, 1] == [0, 0, 1, 0, 1, 0]  # conjugated with the ring
    assert bond[2, 3] == bond[3, 2] == [0, 0, 0, 1, 1, 1]
    assert bond[1, 2][0] == 1
    assert data.x[:, :20].sum(1).eq(3).all()
    assert molecule_graph("C", rich=True).edge_attr.shape == (0, 6)


BAD = "smiles,y\nCCO,1\nC1CC,2\nCC,\nC(C)(C)(C)(C)C,4\n,5\nCCC,nan\nCCN,7\n"


def test_unreadable_rows_are_reported(tmp_path, capfd):
    with pytest.warns(UserWarning, match=r"5 of 7 rows cannot be read \(line 3: RDKit .* line 5: .*; \.\.\.\)") as log:
        data = SmilesTable(write(tmp_path / "bad.csv", BAD))
    assert "they are left out" in str(log[0].message)
    assert [graph.y.item() for graph in data] == [1, 7]
    assert [(line, smiles) for line, smiles, _ in data.skipped] == [
        (3, "C1CC"),
        (4, "CC"),
        (5, "C(C)(C)(C)(C)C"),
        (6, ""),
        (7, "CCC"),
    ]
    assert data.skipped[1][2] == "'' is not a number"
    assert data.skipped[3][2] == "no atom"
    assert data.skipped[4][2] == "'nan' is not a number"
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match="5 of 7 rows cannot be read"):
        SmilesTable(tmp_path / "bad.csv", strict=True)


def test_mark_of_spreadsheets(tmp_path):
    """Some programs put a byte order mark in front of the first name."""
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbfsmiles,y\r\nCCO,1\r\n")
    assert SmilesTable(path)[0].y.item() == 1


def test_max_rows(tmp_path):
    path = write(tmp_path / "bad.csv", BAD)
    assert len(SmilesTable(path, max_rows=1)) == 1
    with pytest.warns(UserWarning, match="2 of 3 rows"):
        assert len(SmilesTable(path, max_rows=3)) == 1
    with pytest.raises(ValueError, match="max_rows is 0"):
        SmilesTable(path, max_rows=0)


def test_wrong_questions_are_refused(tmp_path):
    path = write(tmp_path / "table.csv")
    with pytest.raises(ValueError, match=r"has no column 'SMILES'; it has 'name', 'smiles', 'logS', 'melting'"):
        SmilesTable(path, "SMILES", "logS")
    with pytest.raises(ValueError, match="has no column 'y'"):
        SmilesTable(path)
    with pytest.raises(ValueError, match="features='all' is unknown"):
        SmilesTable(path, target="logS", features="all")
    with pytest.raises(DamagedFileError, match=r"4 of 4 rows .* is 'name' the column of SMILES\?"):
        SmilesTable(path, "name", "logS")
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        SmilesTable(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="RDKit cannot read the SMILES 'C1CC'"):
        molecule_graph("C1CC")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"smiles,y\n", "holds no row"),
        (b"smiles,y\nCCO,1\nCC,1,2\n", "line 3: 3 fields, the header has 2"),
        (b"smiles,y\nCCO\n", "line 2: 1 fields, the header has 2"),
        (b"smiles,y\n\xff\xfe,1\n", "cannot be read"),
        (b'smiles,y\n"CCO,1\n', "cannot be read"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_bytes(text)
    with pytest.raises(DamagedFileError, match=message):
        SmilesTable(path)


def test_damaged_archives_are_refused(tmp_path):
    path = write(tmp_path / "table.csv.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DamagedFileError, match=r"table\.csv\.gz: cannot be read"):
        SmilesTable(path, target="logS")
    path.write_bytes(TABLE.encode())
    with pytest.raises(DamagedFileError, match=r"table\.csv\.gz: cannot be read"):
        SmilesTable(path, target="logS")
    with pytest.raises(DamagedFileError, match="SHA-256"):
        SmilesTable(path, target="logS", sha256="0" * 64)


@pytest.mark.parametrize(
    ("name", "smiles", "target", "count"),
    [
        ("moleculenet/esol/raw/delaney-processed.csv", "smiles", "measured log solubility in mols per litre", 1128),
        ("moleculenet/chemprop/freesolv.csv", "smiles", "freesolv", 642),
        ("moleculenet/chemprop/lipo.csv", "smiles", "lipo", 4200),
        ("zinc/zinc_test_targets.csv.gz", "smiles", ["y", "logP"], 500),
    ],
)
def test_published_tables(geo_data, name, smiles, target, count):
    path = geo_data / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = SmilesTable(path, smiles, target, max_rows=500 if name.startswith("zinc") else None)
    assert len(data) == count
    assert data.skipped == []
    if name.startswith("zinc"):
        assert int(data._data.x.max()) < 28
        assert set(data._data.edge_attr.tolist()) == {1, 2, 3}
