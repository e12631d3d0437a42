from __future__ import annotations

import csv
import gzip

import pytest
import torch

from geo.datasets import DamagedFileError, EnumeratedMolecules, penalized_logp

Chem = pytest.importorskip("rdkit.Chem")


def test_molecules_are_valid_distinct_and_canonical(tmp_path):
    data = EnumeratedMolecules(tmp_path, 300)
    assert len(data) == len(set(data.smiles)) == 300
    for graph, smiles in zip(data, data.smiles, strict=True):
        molecule = Chem.MolFromSmiles(smiles)
        assert Chem.MolToSmiles(molecule) == smiles == graph.smiles
        assert 10 <= molecule.GetNumAtoms() == graph.num_nodes <= 30
        assert graph.y.item() == pytest.approx(penalized_logp(smiles), abs=1e-5)
        assert graph.num_edges == 2 * molecule.GetNumBonds()
    assert int(data._data.x.max()) < 28
    assert {len(Chem.GetMolFrags(Chem.MolFromSmiles(smiles))) for smiles in data.smiles} == {1}


def test_seed_and_cache(tmp_path):
    first = EnumeratedMolecules(tmp_path, 20)
    (cache,) = (tmp_path / "processed").glob("enumerated_*.npz")
    made = cache.stat().st_mtime_ns
    assert EnumeratedMolecules(tmp_path, 20).smiles == first.smiles
    assert cache.stat().st_mtime_ns == made
    again = EnumeratedMolecules(tmp_path, 20, force_reload=True)
    assert cache.stat().st_mtime_ns > made
    assert again.smiles == first.smiles
    assert torch.equal(again._data.y, first._data.y)
    assert not set(EnumeratedMolecules(tmp_path, 20, seed=1).smiles) & set(first.smiles)
    # the first ones do not depend on how many are asked for
    assert EnumeratedMolecules(tmp_path, 30).smiles[:20] == first.smiles
    cache.write_bytes(cache.read_bytes()[:-30])
    with pytest.raises(DamagedFileError, match="delete it"):
        EnumeratedMolecules(tmp_path, 20)


def test_target_terms():
    """By hand: a ring of eight is two too large, 2 / 0.286 standard deviations below its mean."""
    from rdkit.Chem import Crippen
    from rdkit.Contrib.SA_Score import sascorer

    for smiles, excess in (("C1CCCCCCC1", 2), ("C1CCCCC1", 0), ("CCO", 0)):
        molecule = Chem.MolFromSmiles(smiles)
        logp, score = Crippen.MolLogP(molecule), sascorer.calculateScore(molecule)
        by_hand = (logp - 2.45710) / 1.43432 + (3.05258 - score) / 0.83352 + (0.04857 - excess) / 0.28602
        assert penalized_logp(smiles) == pytest.approx(by_hand, abs=1e-3)
    with pytest.raises(ValueError, match="RDKit cannot read the SMILES 'C1CC'"):
        penalized_logp("C1CC")


def test_target_equals_the_published_one(geo_data):
    path = geo_data / "zinc" / "zinc_test_targets.csv.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))[::25]
    for row in rows:
        assert penalized_logp(row["smiles"]) == pytest.approx(float(row["y"]), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_molecules": 0}, "num_molecules is 0"),
        ({"min_atoms": 0}, "min_atoms is 0, max_atoms is 30"),
        ({"min_atoms": 9, "max_atoms": 8}, "min_atoms is 9, max_atoms is 8"),
        ({"num_molecules": 500, "min_atoms": 1, "max_atoms": 2}, "with 1 to 2 atoms only"),
    ],
)
def test_refused_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        EnumeratedMolecules(tmp_path, **{"num_molecules": 10, **settings})
