"""Molecules made on the spot, with the target of the ZINC benchmark: no file is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import InMemoryDataset

from geo.datasets.cache import Arrays, DamagedFileError, cached, fill, settings_key
from geo.datasets.smiles_table import molecule_graph

# Mean and standard deviation of the three terms over ZINC, as the authors of JT-VAE standardise them.
_LOGP = (2.4570953396190123, 1.434324401111988)
_SYNTHESIS = (-3.0525811293166134, 0.8335207024513095)
_CYCLE = (-0.0485696876403053, 0.2860212110245455)

_RINGS = (
    *("c1ccccc1", "c1ccncc1", "c1cncnc1", "c1ccoc1", "c1ccsc1", "c1cc[nH]c1", "c1cnc[nH]1", "c1cn[nH]c1", "c1cscn1"),
    *("c1cocn1", "c1ccc2ccccc2c1", "c1ccc2[nH]ccc2c1", "c1ccc2ncccc2c1", "c1ccc2occc2c1", "c1ccc2[nH]cnc2c1"),
    *("C1CC1", "C1CCCC1", "C1CCCCC1", "C1CCNC1", "C1CCNCC1", "C1CNCCN1", "C1COCCN1", "C1CCOC1", "C1CCOCC1"),
    *("C1CCc2ccccc2C1", "c1ccc2c(c1)OCO2", "C1CC2CCC1C2", "C1CCCCCC1", "C1CCNCCC1"),
)
_GROUPS = (
    *("C", "C", "C", "CC", "CCC", "CC(C)C", "O", "O", "OC", "N", "NC", "CNC", "COC", "CSC", "S", "F", "F", "Cl"),
    *("Cl", "Br", "C=O", "C(=O)O", "NC=O", "NC=O", "NC(N)=O", "C#N", "CS(C)(=O)=O", "NS(C)(=O)=O", "FC(F)F"),
    *("C=C", "C#C", "O=[NH+][O-]"),
)


def penalized_logp(smiles: str) -> float:
    """Compute the target of the ZINC benchmark, the penalised octanol-water partition coefficient.

    log P by Crippen, minus the synthetic accessibility score of Ertl and Schuffenhauer, minus what the largest ring
    has beyond six atoms, each standardised with the mean and deviation over ZINC that JT-VAE uses
    (https://arxiv.org/abs/1802.04364). The largest ring is that of networkx's cycle basis, as there; of bridged rings
    it can be larger than that of RDKit.

    Args:
        smiles: The molecule.

    Returns:
        The target, without unit; near 0 for a typical molecule of ZINC.

    Raises:
        ValueError: RDKit cannot read the SMILES.
        ImportError: RDKit, or the score in its Contrib folder, is not installed.

    Example:
        >>> from geo.datasets import penalized_logp
        >>> round(penalized_logp('CC(C)(C)c1ccc2occ(CC(=O)Nc3ccccc3F)c2c1'), 4)
        3.1399
    """
    terms = _terms(smiles)
    return sum((term - mean) / std for term, (mean, std) in zip(terms, (_LOGP, _SYNTHESIS, _CYCLE), strict=True))


def _terms(smiles: str) -> tuple[float, float, float]:
    import networkx  # type: ignore[import-untyped]

    try:
        from rdkit import Chem
        from rdkit.Chem import Crippen
        from rdkit.Contrib.SA_Score import sascorer
    except ImportError as error:
        raise ImportError(
            "the target needs RDKit with its Contrib folder (SA_Score): pip install 'torch-geo[molecules]'"
        ) from error
    crippen: Any = Crippen  # its stubs miss what it defines at import
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"RDKit cannot read the SMILES {smiles!r}")
    rings = networkx.cycle_basis(networkx.Graph(Chem.GetAdjacencyMatrix(molecule)))
    largest = max((len(ring) for ring in rings), default=0)
    return crippen.MolLogP(molecule), -sascorer.calculateScore(molecule), -float(max(0, largest - 6))


class EnumeratedMolecules(InMemoryDataset):
    """Distinct molecules joined from rings and groups, with the target of the ZINC benchmark.

    A stand-in that needs no download: rings and functional groups common in drugs are joined by single bonds at random
    atoms that carry a hydrogen until the molecule has the size that was drawn for it, and now and then two atoms of it
    are joined to close another ring. What RDKit's check of valences and aromaticity refuses, and what is there already
    (by canonical SMILES), is left out. The target is :func:`penalized_logp`.

    Items are those of :class:`SmilesTable` with types: ``x`` [V, 1], ``edge_index`` [2, E], ``edge_attr`` [E], ``y``
    [1, 1], ``smiles``. They come in random order, so any part of them is a fair sample. The SMILES and targets are
    stored under ``root/processed`` as an ``.npz`` with a checksum.

    Args:
        root: Folder of the cache.
        num_molecules: How many.
        seed: Seed of everything. Another version of RDKit may write or score molecules otherwise.
        min_atoms: Smallest number of heavy atoms.
        max_atoms: Largest number of heavy atoms.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the molecules for which it is true.
        force_reload: Make the molecules again and replace the cache.

    Raises:
        ValueError: Numbers out of range, or so few atoms that there are not as many molecules.
        ImportError: RDKit is not installed.
        DamagedFileError: The cache does not match its checksum.

    Example:
        >>> from geo.datasets import EnumeratedMolecules
        >>> data = EnumeratedMolecules('data', num_molecules=20)
        >>> len(data), len(set(data.smiles)), data[0].y.shape
        (20, 20, torch.Size([1, 1]))
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_molecules: int = 3000,
        *,
        seed: int = 0,
        min_atoms: int = 10,
        max_atoms: int = 30,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
        force_reload: bool = False,
    ) -> None:
        if num_molecules < 1:
            raise ValueError(f"num_molecules is {num_molecules}, but must be at least 1")
        if not 1 <= min_atoms <= max_atoms:
            raise ValueError(
                f"min_atoms is {min_atoms}, max_atoms is {max_atoms}: must be 1 or more, and in this order"
            )
        super().__init__(os.fspath(root), transform, pre_transform, pre_filter)
        settings = {
            "num_molecules": num_molecules,
            "seed": seed,
            "min_atoms": min_atoms,
            "max_atoms": max_atoms,
            "fragments": [*_RINGS, *_GROUPS],
        }
        path = Path(self.root) / "processed" / f"enumerated_{settings_key(settings)}.npz"

        def make() -> Arrays:
            found = _enumerate(num_molecules, seed, min_atoms, max_atoms)
            return {"smiles": np.array(found), "y": np.array([penalized_logp(smiles) for smiles in found])}

        arrays = cached(path, settings, make, force_reload)
        if arrays["smiles"].shape != (num_molecules,) or arrays["y"].shape != (num_molecules,):
            raise DamagedFileError(f"{path}: holds another number of molecules; delete it and it is made again")
        self.smiles = [str(smiles) for smiles in arrays["smiles"]]
        molecules = []
        for smiles, y in zip(self.smiles, arrays["y"].tolist(), strict=True):
            data = molecule_graph(smiles)
            data.y, data.smiles = torch.tensor([[y]]), smiles
            molecules.append(data)
        fill(self, molecules)


def _enumerate(num: int, seed: int, min_atoms: int, max_atoms: int) -> list[str]:
    """Distinct canonical SMILES in the order in which they were found."""
    from rdkit import Chem

    rng = np.random.default_rng(seed)
    rings, groups = ([Chem.MolFromSmiles(smiles) for smiles in part] for part in (_RINGS, _GROUPS))
    found: dict[str, None] = {}
    failed = 0
    while len(found) < num:
        smiles = _grow(rings, groups, int(rng.integers(min_atoms, max_atoms + 1)), rng)
        molecule = None if smiles is None else Chem.MolFromSmiles(smiles)
        failed += 1
        if molecule is not None and molecule.GetNumAtoms() >= min_atoms:
            canonical = Chem.MolToSmiles(molecule)
            failed = failed if canonical in found else 0
            found[canonical] = None
        if failed > 10_000:
            raise ValueError(
                f"num_molecules is {num}, but with {min_atoms} to {max_atoms} atoms only {len(found)} were found"
            )
    return list(found)


def _grow(rings: list[Any], groups: list[Any], size: int, rng: np.random.Generator) -> str | None:
    """SMILES of a molecule of at most `size` atoms and close to it, or None where even its first part is larger."""
    from rdkit import Chem

    molecule = rings[rng.integers(len(rings))] if rng.random() < 0.9 else groups[rng.integers(len(groups))]
    for _ in range(12):
        parts = rings if rng.random() < 0.35 else groups
        part = parts[rng.integers(len(parts))]
        if molecule.GetNumAtoms() + part.GetNumAtoms() > size:
            continue
        joined = _join(molecule, part, rng)
        molecule = molecule if joined is None else joined
    if rng.random() < 0.1:
        closed = _close(molecule, rng)
        molecule = molecule if closed is None else closed
    return None if molecule.GetNumAtoms() > size else str(Chem.MolToSmiles(molecule))


def _open_atoms(molecule: Any) -> list[int]:
    """Atoms with a hydrogen that a bond can take the place of."""
    return [atom.GetIdx() for atom in molecule.GetAtoms() if atom.GetTotalNumHs() > 0]


def _join(molecule: Any, part: Any, rng: np.random.Generator) -> Any:
    from rdkit import Chem

    left, right = _open_atoms(molecule), _open_atoms(part)
    if not left or not right:
        return None
    a = left[rng.integers(len(left))]
    b = right[rng.integers(len(right))] + molecule.GetNumAtoms()
    return _bonded(Chem.RWMol(Chem.CombineMols(molecule, part)), a, b)


def _close(molecule: Any, rng: np.random.Generator) -> Any:
    """Join two atoms three to seven bonds apart."""
    from rdkit import Chem

    distance = Chem.GetDistanceMatrix(molecule)
    free = [i for i in _open_atoms(molecule) if not molecule.GetAtomWithIdx(i).GetIsAromatic()]
    pairs = [(a, b) for a in free for b in free if a < b and 3 <= distance[a, b] <= 7]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    return _bonded(Chem.RWMol(molecule), a, b)


def _bonded(molecule: Any, a: int, b: int) -> Any:
    """The molecule with a single bond from a to b, or None where it is none."""
    from rdkit import Chem
    from rdkit.rdBase import BlockLogs

    molecule.AddBond(a, b, Chem.BondType.SINGLE)
    for index in (a, b):
        atom = molecule.GetAtomWithIdx(index)
        if atom.GetNumExplicitHs():
            atom.SetNumExplicitHs(atom.GetNumExplicitHs() - 1)
    try:
        with BlockLogs():
            Chem.SanitizeMol(molecule)
    except Chem.MolSanitizeException:
        return None
    return molecule.GetMol()
