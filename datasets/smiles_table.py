"""Molecules as graphs: tables of SMILES and measured or computed values."""

from __future__ import annotations

import csv
import gzip
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import DamagedFileError, check_sha256, choose, fill, reading, require_file

#: The 28 atom types of the ZINC benchmark in its order: element, hydrogens where SMILES must write them, charge.
ATOM_TYPES = (
    *("C", "O", "N", "F", "CH", "S", "Cl", "O-", "NH+", "Br", "NH3+", "NH2+", "N+", "N-", "S-", "I", "P", "OH+"),
    *("NH-", "O+", "S+", "PH", "PH2", "CH2-", "P+", "SH+", "CH-", "PH+"),
)
_ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")  # of rich features; others share one column
_SHOWN = 3  # rows that a warning names


class SmilesTable(InMemoryDataset):
    r"""Molecules of a table with SMILES in one column and numbers in others: ESOL, FreeSolv, lipophilicity, ZINC, QM8.

    Reads ``.csv`` and ``.csv.gz`` with a header, and makes each SMILES a graph of its heavy atoms with both directions
    of each bond. Rows whose SMILES RDKit cannot read, or that lack a number, are left out; how many and where is in one
    warning and in ``skipped``, and ``strict=True`` makes it an error.

    Two kinds of features:

    * 'types', as the ZINC benchmark has them: ``x`` [V, 1] int64 is an index into its 28 atom types (element, charge,
      hydrogens where they must be written), 28 for any other atom; ``edge_attr`` [E] int64 is 1, 2 or 3 for single,
      double and triple bonds of the Kekulé form, or with ``kekulize=False`` 4 for aromatic bonds.
    * 'rich': ``x`` [V, 25] float32: element one-hot (C, N, O, F, P, S, Cl, Br, I, other), neighbours 0 to 4 or more
      one-hot, hydrogens 0 to 4 or more one-hot, sp, sp2, aromatic, in a ring, charge; ``edge_attr`` [E, 6] float32:
      single, double, triple, aromatic, conjugated, in a ring.

    Items also have ``y`` [1, T] float32, the numbers in the units of the table, and ``smiles``. Nothing is stored.

    Args:
        path: The table.
        smiles: Name of the column of SMILES.
        target: Name or names of the columns of numbers.
        features: 'types' or 'rich'.
        kekulize: Whether aromatic bonds become single and double ones; None: for 'types' only.
        max_rows: Read only so many rows, from the first on.
        strict: Whether a row that cannot be read is an error.
        sha256: SHA-256 that the file must have.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the molecules for which it is true.

    Raises:
        ValueError: Unknown features, a column that is not there, or with ``strict`` a row that cannot be read.
        FileNotFoundError: The file is not there.
        DamagedFileError: It is truncated, not a table, no row of it can be read, or its checksum is wrong.

    Example:
        >>> from geo.datasets import SmilesTable
        >>> with open('table.csv', 'w') as file:
        ...     _ = file.write('name,smiles,logS\nethanol,CCO,1.1\nbenzene,c1ccccc1,-1.6\n')
        >>> data = SmilesTable('table.csv', 'smiles', 'logS')
        >>> len(data), data[0].x.flatten().tolist(), data[1].edge_attr.tolist(), data[0].y.shape
        (2, [0, 0, 1], [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2], torch.Size([1, 1]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        smiles: str = "smiles",
        target: str | Sequence[str] = "y",
        *,
        features: str = "types",
        kekulize: bool | None = None,
        max_rows: int | None = None,
        strict: bool = False,
        sha256: str | None = None,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        choose("features", features, ("types", "rich"))
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, but must be at least 1")
        super().__init__(None, transform, pre_transform, pre_filter)
        self.path = require_file(Path(path), "a table of SMILES")
        if sha256 is not None:
            check_sha256(self.path, sha256)
        #: Rows left out: (line of the file, SMILES, why).
        self.skipped: list[tuple[int, str, str]] = []
        targets = [target] if isinstance(target, str) else list(target)
        molecules, rows = [], 0
        for line, text, numbers in _rows(self.path, smiles, targets, max_rows):
            rows += 1
            try:
                data = molecule_graph(text, rich=features == "rich", kekulize=kekulize)
                data.y = torch.tensor([[_number(number) for number in numbers]])
            except ValueError as error:
                self.skipped.append((line, text, str(error)))
                continue
            data.smiles = text
            molecules.append(data)
        if self.skipped:
            shown = "; ".join(f"line {line}: {why}" for line, _, why in self.skipped[:_SHOWN])
            more = "; ..." if len(self.skipped) > _SHOWN else ""
            message = f"{self.path}: {len(self.skipped)} of {rows} rows cannot be read ({shown}{more})"
            if strict:
                raise ValueError(message)
            if not molecules:
                raise DamagedFileError(f"{message}; is {smiles!r} the column of SMILES?")
            warnings.warn(f"{message}; they are left out", stacklevel=2)
        if not molecules:
            raise DamagedFileError(f"{self.path}: holds no row under its header")
        fill(self, molecules)


def molecule_graph(smiles: str, *, rich: bool = False, kekulize: bool | None = None) -> Data:
    """Make the graph of a molecule, with ``x``, ``edge_index`` and ``edge_attr`` of :class:`SmilesTable`.

    Args:
        smiles: The molecule.
        rich: Features 'rich' in place of 'types'.
        kekulize: Make aromatic bonds single and double ones; None: for 'types' only.

    Returns:
        The graph; its edges are sorted by bond, both directions side by side.

    Raises:
        ValueError: RDKit cannot read the SMILES, or it has no atom.

    Example:
        >>> from geo.datasets import molecule_graph
        >>> molecule_graph('C#N').edge_attr.tolist()
        [3, 3]
    """
    Chem = _rdkit()
    from rdkit.rdBase import BlockLogs

    with BlockLogs():  # RDKit would print every failure
        molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ValueError(f"RDKit cannot read the SMILES {smiles!r}" if molecule is None else "no atom")
    atoms = [_rich_atom(atom) if rich else [_atom_type(atom)] for atom in molecule.GetAtoms()]
    if not rich if kekulize is None else kekulize:
        Chem.Kekulize(molecule, clearAromaticFlags=True)
    bonds = list(molecule.GetBonds())
    ends = np.array([(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in bonds], dtype=np.int64).reshape(-1, 2)
    both = np.stack([ends, ends[:, ::-1]], axis=1).reshape(-1, 2)
    kinds = [_bond(bond, rich) for bond in bonds]
    shape = (0, 6) if rich else (0,)
    edge_attr = torch.tensor(kinds) if kinds else torch.empty(shape, dtype=torch.float32 if rich else torch.long)
    return Data(
        x=torch.tensor(atoms),
        edge_index=torch.as_tensor(both.T).contiguous(),
        edge_attr=edge_attr.repeat_interleave(2, dim=0),
    )


def _rdkit() -> Any:
    try:
        from rdkit import Chem
    except ImportError as error:
        raise ImportError("reading SMILES needs RDKit: pip install 'torch-geo[molecules]'") from error
    return Chem


def _rows(path: Path, smiles: str, targets: list[str], limit: int | None) -> Iterator[tuple[int, str, list[str]]]:
    """Line, SMILES and numbers as text of each row."""
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path), opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
        table = csv.reader(stream, strict=True)
        header = next(table, None)
        if not header:
            raise DamagedFileError(f"{path}: is empty, not a table with a header")
        missing = [name for name in (smiles, *targets) if name not in header]
        place = [] if missing else [header.index(name) for name in (smiles, *targets)]
        for row in table if place else ():
            if not row:
                continue
            if len(row) != len(header):
                raise DamagedFileError(
                    f"{path}, line {table.line_num}: {len(row)} fields, the header has {len(header)}"
                )
            yield table.line_num, row[place[0]].strip(), [row[at] for at in place[1:]]
            limit = None if limit is None else limit - 1
            if limit == 0:
                return
    if missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, header))}")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a number")
    return value


def _atom_type(atom: Any) -> int:
    charge, hydrogens = atom.GetFormalCharge(), atom.GetTotalNumHs()
    stereo = str(atom.GetChiralTag()) != "CHI_UNSPECIFIED"
    written = hydrogens if charge or stereo or atom.GetSymbol() == "P" else 0
    name = atom.GetSymbol()
    if written:
        name += "H" if written == 1 else f"H{written}"
    if charge:
        name += ("+" if charge > 0 else "-") * abs(charge)
    return ATOM_TYPES.index(name) if name in ATOM_TYPES else len(ATOM_TYPES)


def _one_hot(value: int, size: int) -> list[float]:
    return [float(i == min(value, size - 1)) for i in range(size)]


def _rich_atom(atom: Any) -> list[float]:
    symbol, hybrid = atom.GetSymbol(), str(atom.GetHybridization())
    element = _ELEMENTS.index(symbol) if symbol in _ELEMENTS else len(_ELEMENTS)
    return [
        *_one_hot(element, len(_ELEMENTS) + 1),
        *_one_hot(atom.GetDegree(), 5),
        *_one_hot(atom.GetTotalNumHs(), 5),
        float(hybrid == "SP"),
        float(hybrid == "SP2"),
        float(atom.GetIsAromatic()),
        float(atom.IsInRing()),
        float(atom.GetFormalCharge()),
    ]


def _bond(bond: Any, rich: bool) -> int | list[float]:
    kinds = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
    name = str(bond.GetBondType())
    kind = kinds.index(name) if name in kinds else 0  # dative bonds and the like count as single ones
    if not rich:
        return kind + 1
    return [*_one_hot(kind, 4), float(bond.GetIsConjugated()), float(bond.IsInRing())]
