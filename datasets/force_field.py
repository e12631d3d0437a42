"""Published energies and forces, in the three formats they come in: rMD17 ``.npz``, extended xyz, DeePMD folders."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

from geo.datasets.cache import DamagedFileError, check_sha256, choose, fill, read_npz, reading, require_file
from geo.datasets.molecules import KCAL_PER_MOL, MoleculeDataset, make_frame

_UNITS = {"eV": 1.0, "kcal/mol": KCAL_PER_MOL}
_RANDOM_SPLITS = ("train", "val", "test", "all")
_RMD17 = (
    "aspirin",
    "azobenzene",
    "benzene",
    "ethanol",
    "malonaldehyde",
    "naphthalene",
    "paracetamol",
    "salicylic",
    "toluene",
    "uracil",
)
#: Published split -> file, per data set.
_XYZ_SPLITS = {
    "3bpa": {
        "train": "train_300K.xyz",
        "train_mixedT": "train_mixedT.xyz",
        "test": "test_300K.xyz",
        "test_300K": "test_300K.xyz",
        "test_600K": "test_600K.xyz",
        "test_1200K": "test_1200K.xyz",
        "test_dihedral": "test_dih.xyz",
    },
    "acac": {
        "train": "train_300K.xyz",
        "train_600K": "train_600K.xyz",
        "test": "test_MD_300K.xyz",
        "test_300K": "test_MD_300K.xyz",
        "test_600K": "test_MD_600K.xyz",
        "test_dihedral": "test_dihedral.xyz",
        "test_H_transfer": "test_H_transfer.xyz",
    },
}
#: SHA-256 of published files, by path below the root.
_SHA256 = {
    "rmd17/rmd17_aspirin_test_01.npz": "a3c3b61e782d01e6dd649a126004903f7873e8e7ee5034135abfdb8873be711d",
    "rmd17/rmd17_aspirin_train_01.npz": "d460f0e43a1a9411b55cdcd9cdbeb9466ae62851ac91392516ab88e4ebc68143",
    "rmd17/rmd17_azobenzene_test_01.npz": "e83c87fe541a95e7349684e47294821ada708a780b59c469d3792588213cfc05",
    "rmd17/rmd17_azobenzene_train_01.npz": "7a2ce543773f6cb7a2cccecbc37fd479781e27ec2d0bb4e5f9ecff8e404e5857",
    "rmd17/rmd17_benzene_test_01.npz": "4aad4aa2f5ae6aa78d2d9f5da7cb285c97864cfbdf054b67de12a1429b249534",
    "rmd17/rmd17_benzene_train_01.npz": "6e69deb5dc8663c2d2461cc50e522c74742acea7b4185da348fc08585a15cdc7",
    "rmd17/rmd17_ethanol_test_01.npz": "c3594a0f93d5992e02f9eb671392fb2e5021b3fa4f902417886966d1e4f64e1e",
    "rmd17/rmd17_ethanol_train_01.npz": "096946747b8d9dcfa042b44f8debbd3da387dfe1586b659e3be789cc4927316a",
    "rmd17/rmd17_malonaldehyde_test_01.npz": "147404574d4fe3204dea7eb3799426d264e36b7900012f27fd2d26a26832fdaf",
    "rmd17/rmd17_malonaldehyde_train_01.npz": "95723385cdfd7f8446a84cdff607f14901e4c2b3949db7a965147dc5098d8ee1",
    "rmd17/rmd17_paracetamol_test_01.npz": "99e09ff10b54c55830c011c0959b643bede0512a89ae5b5b9a11e8abea9b3eaa",
    "rmd17/rmd17_paracetamol_train_01.npz": "819513d42011a63773ff1baf61b06f9f0884370fbdb6539d6f11fc6cb580a0ba",
    "rmd17/rmd17_toluene_test_01.npz": "8a658b9bf1b7a5c1abaa03846ee6302725e02bdcd2ab720ef94da0be55625faa",
    "rmd17/rmd17_toluene_train_01.npz": "24d0642f897a1da1fdc4dbdd0a9c2a7f6082dd88e02954b12896a45a7a5fbac7",
    "acac/dataset_acac.tar.gz": "fac37eaf369d81633e681f530f32a2a4775938bf7daebaaee1be925080c0c8e3",
    "3bpa/iso_atoms.xyz": "e12a2465a2612bf38fd5dabdf64d4b57fc58ce9610a858c54ea1142d517c053f",
    "3bpa/train_300K.xyz": "d109971fab90e2231ad931a83eb704c8d940f5c7d7a8de27fe3b84ea18634c0a",
    "water_deepmd/data_0/set.000/box.npy": "88376dc931e272a3569cabcab0f1ee4320168c73ee183ae60f7086b473fc719d",
    "water_deepmd/data_0/set.000/coord.npy": "58554d0ef240b54a242a8163e112d673872f5be5198c86c4eb8d5f39602ff645",
    "water_deepmd/data_0/set.000/energy.npy": "920c4628018c12a4d38c22aef7f41ca483a02747319a42dd4e4f703e2a9f70c8",
    "water_deepmd/data_0/set.000/force.npy": "fae9be94125902c089720416a4cea521380a415709ead1f9134b7f64f46f1e58",
}


class ForceField(MoleculeDataset):
    r"""Energies and forces from published files, in eV and Angstrom.

    Items are those of :class:`MoleculeDataset`: ``z`` [V], ``pos`` [V, 3] (Angstrom), ``energy`` [1] (eV), ``force``
    [V, 3] (eV/Angstrom; absent where the file has energies only), and for periodic systems ``cell`` [1, 3, 3] and
    ``pbc`` [1, 3].
    Files are read and checked anew each time (well under a second), nothing is stored, so ``root`` may be read-only.

    ``name`` is one of

    * ``'rmd17:MOLECULE'``: revised MD17 (`arXiv:2007.09593 <https://arxiv.org/abs/2007.09593>`_, PBE/def2-SVP, CC0),
      read from ``rmd17/rmd17_MOLECULE_{train,test}_0FOLD.npz``; published splits 'train' and 'test', 1000 frames each,
      five folds. The frames are a time series: do not train on more than 1000. kcal/mol becomes eV.
    * ``'3bpa'`` (`arXiv:2107.08970 <https://arxiv.org/abs/2107.08970>`_, wB97X/6-31G(d), MIT), 27 atoms, read from
      ``3bpa/``: 'train' (500 frames at 300 K), 'train_mixedT', 'test' = 'test_300K', 'test_600K', 'test_1200K',
      'test_dihedral'.
    * ``'acac'`` (`arXiv:2205.06643 <https://arxiv.org/abs/2205.06643>`_, PBE-D3/def2-SVP, MIT), 15 atoms, read from
      ``acac/*.xyz`` or the archive ``acac/dataset_acac.tar.gz``: 'train' (500 at 300 K), 'train_600K' (500), 'test' =
      'test_300K' (650), 'test_600K' (650), and with energies only 'test_dihedral' (45), 'test_H_transfer' (15).
    * ``'water'``: liquid water from the DeePMD-kit examples (LGPL-3.0), periodic, 192 atoms, read from
      ``water_deepmd/data_0`` (80 frames; energies are stored in float32, 2 meV apart).
    * a path, absolute or below ``root``, of an ``.npz`` with the keys of rMD17, of an extended xyz file (``.xyz``,
      ``.extxyz``) or of a DeePMD folder (``type.raw``, ``type_map.raw``, ``set.*/{coord,energy,force,box}.npy``).

    'water' and paths have no published split: 'train', 'val' and 'test' are then a random split drawn from ``seed``,
    80:10:10 unless ``fractions`` says otherwise, and 'all' is every frame in the order of the file.

    Args:
        root: Folder of the data.
        name: Data set, as above.
        split: Split, as above.
        fold: Which of the five published splits of rMD17.
        fractions: Shares of train, val and test of a random split; they sum to 1.
        seed: Seed of a random split.
        energy_unit: 'eV' or 'kcal/mol' (then forces are kcal/mol/Angstrom); by default that of the format: kcal/mol for
            ``.npz``, eV otherwise.
        energy_key: Name of the energy in an xyz file.
        force_key: Name of the forces in an xyz file.
        type_map: Element symbols of the types of a DeePMD folder, in place of its ``type_map.raw``.
        sha256: SHA-256 that the file must have; by default that of the published file, where it is known.
        verify: Whether to check published files against their known SHA-256.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the frames for which it is true.

    Raises:
        ValueError: Unknown name, split or unit.
        FileNotFoundError: The file is not there.
        DamagedFileError: It is truncated, malformed, not finite, or its checksum is wrong.

    Example:
        >>> from geo.datasets import ForceField
        >>> frame = '1\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1.0\nH 0 0 0 0 0 1\n'
        >>> with open('two.xyz', 'w') as file:
        ...     _ = file.write(frame * 2)
        >>> data = ForceField('.', 'two.xyz', split='all')
        >>> len(data), data[0].force.tolist(), round(data.energy_shift()[1].item(), 6)
        (2, [[0.0, 0.0, 1.0]], -1.0)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str = "rmd17:ethanol",
        split: str = "train",
        *,
        fold: int = 1,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        seed: int = 0,
        energy_unit: str | None = None,
        energy_key: str = "energy",
        force_key: str = "forces",
        type_map: Sequence[str] | None = None,
        sha256: str | None = None,
        verify: bool = True,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        if energy_unit is not None:
            choose("energy_unit", energy_unit, _UNITS)
        super().__init__(os.fspath(root), transform, pre_transform, pre_filter)
        self.name, self.split = name, split
        path, member = _locate(Path(self.root), name, split, fold)
        _verify(path, sha256, verify)

        def unit(default: str) -> float:
            return _UNITS[energy_unit or default]

        if path.is_dir():
            frames = _read_deepmd(path, unit("eV"), type_map)
        elif path.suffix == ".npz":
            frames = _read_rmd17(path, unit("kcal/mol"))
        else:
            frames = _read_xyz(path, member, unit("eV"), energy_key, force_key)
        if not _is_published(name):
            frames = _random_split(frames, split, fractions, seed)
        fill(self, frames)


def _is_published(name: str) -> bool:
    return name.startswith("rmd17:") or name in _XYZ_SPLITS


def _locate(root: Path, name: str, split: str, fold: int) -> tuple[Path, str | None]:
    """Return the existing file or folder that holds ``name``, and the member of it where it is an archive."""
    if name.startswith("rmd17:"):
        molecule = name.removeprefix("rmd17:")
        choose("name: the molecule of rmd17", molecule, _RMD17)
        choose("split", split, ("train", "test"))
        choose("fold", fold, range(1, 6))
        return require_file(root / "rmd17" / f"rmd17_{molecule}_{split}_{fold:02d}.npz", f"name={name!r}"), None
    if name in _XYZ_SPLITS:
        choose("split", split, _XYZ_SPLITS[name])
        path = root / name / _XYZ_SPLITS[name][split]
        archive = root / name / f"dataset_{name}.tar.gz"
        if not path.is_file() and archive.is_file():
            return archive, f"dataset_{name}/{path.name}"
        hint = "; for a random split of one file give its path as name" if path.parent.is_dir() else ""
        return require_file(path, f"name={name!r}, split={split!r}{hint}"), None
    choose("split", split, _RANDOM_SPLITS)
    path = root / ("water_deepmd/data_0" if name == "water" else name)
    if path.is_dir():
        return path, None
    if not path.exists() and not path.suffix:
        known = ", ".join(["'rmd17:MOLECULE'", *map(repr, _XYZ_SPLITS), "'water'"])
        raise ValueError(f"name={name!r} is unknown and {path} does not exist; allowed: {known} or a path")
    if path.suffix not in (".npz", ".xyz", ".extxyz"):
        raise ValueError(f"name={name!r}: {path} must end in .npz, .xyz or .extxyz, or be a DeePMD folder")
    return require_file(path, f"name={name!r}"), None


def _verify(path: Path, sha256: str | None, verify: bool) -> None:
    """Check the SHA-256 that the caller gave, else those of the published files at this place."""
    if sha256 is not None:
        if path.is_dir():
            raise ValueError(f"sha256={sha256!r} is for one file, and {path} is a folder; leave it out")
        check_sha256(path, sha256)
    elif verify:
        for file in sorted(path.rglob("*.npy")) if path.is_dir() else [path]:
            for place, expected in _SHA256.items():
                if file.as_posix().endswith(f"/{place}"):
                    check_sha256(file, expected)


def _frames(
    path: Path,
    z: np.ndarray,
    pos: np.ndarray,
    energy: np.ndarray,
    force: np.ndarray | None,
    cell: np.ndarray | None = None,
) -> list[Data]:
    """Frames of one system: z [V], pos [F, V, 3], energy [F], force [F, V, 3], cell [F, 3, 3]; shapes are checked."""
    if len(pos) == 0:
        raise DamagedFileError(f"{path}: holds no frame")
    shapes = {"energy": (energy.shape, pos.shape[:1]), "z": (z.shape, pos.shape[1:2])}
    if force is not None:
        shapes["force"] = (force.shape, pos.shape)
    for key, (found, expected) in shapes.items():
        if found != expected:
            raise DamagedFileError(f"{path}: {key} has shape {found}, expected {expected} to go with pos {pos.shape}")
    for key, array in {"pos": pos, "energy": energy, "force": force, "cell": cell}.items():
        if array is not None and not np.isfinite(array).all():
            raise DamagedFileError(f"{path}: {key} holds values that are not finite")
    return [
        make_frame(z, pos[i], energy[i], None if force is None else force[i], None if cell is None else cell[i])
        for i in range(len(pos))
    ]


def _read_rmd17(path: Path, unit: float) -> list[Data]:
    arrays = read_npz(path, ("nuclear_charges", "coords", "energies", "forces"))
    with reading(path):
        energy, force = arrays["energies"].reshape(-1) * unit, arrays["forces"] * unit
        return _frames(path, arrays["nuclear_charges"], arrays["coords"], energy, force)


def _read_xyz(path: Path, member: str | None, unit: float, energy_key: str, force_key: str) -> list[Data]:
    try:
        from ase.io import read
    except ImportError as error:
        raise ImportError("xyz files need the package ase: pip install 'torch-geo[atoms]'") from error
    with reading(path):
        if member is None:
            text = path.read_text()
        else:
            with tarfile.open(path) as archive:
                stream = archive.extractfile(member)
                assert stream is not None, f"{member} is not a file"
                text = stream.read().decode()
        if not text.endswith("\n"):
            raise DamagedFileError(f"{path}: the last line has no end, the file is truncated; fetch or make it again")
        frames = []
        for number, atoms in enumerate(read(io.StringIO(text), index=":", format="extxyz")):
            results = atoms.calc.results if atoms.calc is not None else {}
            energy = atoms.info.get(energy_key, results.get(energy_key))
            force = atoms.arrays.get(force_key, results.get(force_key))
            if energy is None:
                raise DamagedFileError(
                    f"{path}: frame {number} has no energy {energy_key!r}; it has {sorted({*atoms.info, *results})} "
                    "(give the name as energy_key)"
                )
            periodic = bool(atoms.pbc.any())
            frames += _frames(
                path,
                atoms.numbers,
                atoms.positions[None],
                np.array([float(energy) * unit]),
                None if force is None else np.asarray(force)[None] * unit,
                np.asarray(atoms.cell)[None] if periodic else None,
            )
            if periodic:
                frames[-1].pbc[0] = torch.as_tensor(atoms.pbc)
    with_force = sum("force" in frame for frame in frames)
    if with_force not in (0, len(frames)):
        raise DamagedFileError(f"{path}: only {with_force} of {len(frames)} frames have forces {force_key!r}")
    if not frames:
        raise DamagedFileError(f"{path}: holds no frame")
    return frames


def _read_deepmd(path: Path, unit: float, type_map: Sequence[str] | None) -> list[Data]:
    try:
        from ase.data import atomic_numbers
    except ImportError as error:
        raise ImportError("DeePMD folders need the package ase: pip install 'torch-geo[atoms]'") from error
    with reading(path / "type.raw"):
        types = np.array(require_file(path / "type.raw", "DeePMD folder").read_text().split(), dtype=np.int64)
    if type_map is None:
        source = path / "type_map.raw"
        if not source.is_file():
            raise FileNotFoundError(f"{source} is missing: give the element symbols as type_map=[...]")
        type_map = source.read_text().split()
    unknown = [symbol for symbol in type_map if symbol not in atomic_numbers]
    if unknown or types.size == 0 or types.min() < 0 or types.max() >= len(type_map):
        raise DamagedFileError(
            f"{path}: type.raw needs types 0 to {types.max(initial=0)}, type_map is {list(type_map)}"
        )
    z = np.array([atomic_numbers[symbol] for symbol in type_map])[types]
    periodic = not (path / "nopbc").exists()
    frames: list[Data] = []
    folders = sorted(folder for folder in path.glob("set.*") if folder.is_dir())
    if not folders:
        raise DamagedFileError(f"{path}: holds no folder set.000; it is not a DeePMD folder")
    for folder in folders:
        arrays = {}
        for key in ("coord", "energy", "force", *(["box"] if periodic else [])):
            file = require_file(folder / f"{key}.npy", f"DeePMD set {folder.name}")
            with reading(file):
                arrays[key] = np.load(file, allow_pickle=False).astype(np.float64)
        with reading(folder):
            pos, force = arrays["coord"].reshape(-1, len(z), 3), arrays["force"].reshape(-1, len(z), 3) * unit
            cell = arrays["box"].reshape(-1, 3, 3) if periodic else None
            if cell is not None and len(cell) != len(pos):
                raise DamagedFileError(f"{folder}: box has {len(cell)} frames, coord {len(pos)}")
            frames += _frames(folder, z, pos, arrays["energy"].reshape(-1) * unit, force, cell)
    return frames


def _random_split(frames: list[Data], split: str, fractions: tuple[float, float, float], seed: int) -> list[Data]:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions={fractions} must be three shares of 0 or more that sum to 1")
    if split == "all":
        return frames
    order = np.random.default_rng(seed).permutation(len(frames))
    ends = np.round(np.cumsum(fractions) * len(frames)).astype(int)
    start = {"train": 0, "val": ends[0], "test": ends[1]}[split]
    end = {"train": ends[0], "val": ends[1], "test": len(frames)}[split]
    return [frames[i] for i in order[start:end]]
