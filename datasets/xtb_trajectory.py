"""Molecular dynamics of a small molecule, made on the spot by a real quantum-chemical method."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from geo.datasets.cache import Arrays, cached, choose, fill, settings_key
from geo.datasets.molecules import MoleculeDataset, make_frame

#: Common names of molecules in the G2 set of ASE.
COMMON_NAMES = {
    "acetaldehyde": "CH3CHO",
    "acetamide": "CH3CONH2",
    "acetic acid": "CH3COOH",
    "acetone": "CH3COCH3",
    "acetonitrile": "CH3CN",
    "acetylene": "C2H2",
    "ammonia": "NH3",
    "benzene": "C6H6",
    "butadiene": "butadiene",
    "butane": "trans-butane",
    "cyclobutane": "cyclobutane",
    "dimethyl ether": "CH3OCH3",
    "dimethyl sulfoxide": "C2H6SO",
    "dimethylamine": "C2H6NH",
    "ethane": "C2H6",
    "ethanol": "CH3CH2OH",
    "ethylamine": "CH3CH2NH2",
    "ethylene": "C2H4",
    "formaldehyde": "H2CO",
    "formic acid": "HCOOH",
    "furan": "C4H4O",
    "glyoxal": "OCHCHO",
    "hydrogen peroxide": "H2O2",
    "isobutane": "isobutane",
    "isopropanol": "C2H6CHOH",
    "methane": "CH4",
    "methanol": "CH3OH",
    "methyl formate": "HCOOCH3",
    "methylamine": "H3CNH2",
    "nitromethane": "CH3NO2",
    "oxirane": "CH2OCH2",
    "propane": "C3H8",
    "pyridine": "C5H5N",
    "pyrrole": "C4H4NH",
    "thiophene": "C4H4S",
    "trimethylamine": "C3H9N",
    "water": "H2O",
}
_STREAM = {"train": 0, "val": 1, "test": 2}


def allowed_molecules() -> list[str]:
    """Names that :class:`XTBTrajectory` accepts: common ones, then the closed-shell molecules of ASE's G2 set."""
    from ase.build import molecule
    from ase.collections import g2

    closed = []
    for name in g2.names:
        atoms = molecule(name)
        if len(atoms) > 1 and not atoms.get_initial_magnetic_moments().any() and atoms.numbers.sum() % 2 == 0:
            closed.append(name)
    return sorted(COMMON_NAMES) + sorted(set(closed) - set(COMMON_NAMES))


class XTBTrajectory(MoleculeDataset):
    r"""Frames of a molecule in Langevin dynamics, with energies and forces of the tight-binding method GFN2-xTB.

    The method is that of "GFN2-xTB: An Accurate and Broadly Parametrized Self-Consistent Tight-Binding Quantum Chemical
    Method with Multipole Electrostatics and Density-Dependent Dispersion Contributions"
    (https://doi.org/10.1021/acs.jctc.8b01176).

    Energies and forces are computed here by the packages ``tblite`` and ``ase`` (extra ``atoms``); nothing is
    downloaded. The dynamics :math:`m\dot v = -\nabla E - \gamma m v + \sqrt{2 \gamma m k_B T}\,\xi` (integrator BAOAB)
    starts from the G2 geometry with Maxwell-Boltzmann velocities and a warm-up that is thrown away. The centre of mass
    of each frame is moved to the origin. The splits 'train', 'val' and 'test' are three trajectories with independent
    random streams, so test frames are never neighbours in time of training frames. The run happens in a process of its
    own with one OpenMP thread (a step takes about 1.5 ms for ethanol; with many threads 50 ms) and is bitwise the same
    for a seed on one machine. It is stored under ``root/processed`` as an ``.npz`` with a checksum, its name holding a
    hash of all settings.

    Items are those of :class:`MoleculeDataset`: ``z`` [V], ``pos`` [V, 3] (Angstrom), ``energy`` [1] (eV, the total
    energy of GFN2-xTB, valence electrons), ``force`` [V, 3] (eV/Angstrom).

    Args:
        root: Folder of the cache.
        molecule: Common name ('ethanol') or name in ASE's G2 set ('CH3CH2OH'); closed shells only.
        split: 'train', 'val' or 'test'.
        num_frames: Number of frames of this split.
        temperature: Temperature of the bath in kelvin.
        time_step: Time step in fs. BAOAB samples positions without error in the harmonic limit, so 1 fs is fine.
        frame_spacing: Time between frames in fs, a multiple of ``time_step``.
        friction: Friction :math:`\gamma` in 1/fs.
        warmup: Time thrown away at the start, in fs.
        seed: Seed of the trajectory; the split is mixed in.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the frames for which it is true.
        force_reload: Compute again and replace the cache.
        progress: Show a progress bar.

    Raises:
        ValueError: Unknown molecule (the message lists the known ones) or split, or a setting out of range.
        DamagedFileError: The cache does not match its checksum.
        ImportError: ``ase`` or ``tblite`` is missing.

    Example:
        >>> from geo.datasets import XTBTrajectory
        >>> data = XTBTrajectory('data', 'water', num_frames=3, warmup=5.0, progress=False)
        >>> len(data), data[0].pos.shape, data[0].energy.dtype
        (3, torch.Size([3, 3]), torch.float64)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        molecule: str = "ethanol",
        split: str = "train",
        num_frames: int = 700,
        *,
        temperature: float = 500.0,
        time_step: float = 1.0,
        frame_spacing: float = 5.0,
        friction: float = 0.02,
        warmup: float = 1000.0,
        seed: int = 0,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
        force_reload: bool = False,
        progress: bool = True,
    ) -> None:
        choose("split", split, _STREAM)
        for package in ("ase", "tblite"):
            if find_spec(package) is None:
                raise ImportError(f"XTBTrajectory needs the package {package}: pip install 'torch-geo[atoms]'")
        known = allowed_molecules()
        if molecule not in known:
            raise ValueError(f"molecule={molecule!r} is unknown; allowed: {', '.join(known)}")
        for name, value in (("num_frames", num_frames), ("temperature", temperature), ("time_step", time_step)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0")
        for name, value in (("friction", friction), ("warmup", warmup), ("seed", seed)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must be 0 or greater")
        stride = round(frame_spacing / time_step)
        if stride < 1 or abs(stride * time_step - frame_spacing) > 1e-9:
            raise ValueError(f"frame_spacing={frame_spacing} fs must be a multiple of time_step={time_step} fs")
        settings = {
            "version": 1,
            "g2_name": COMMON_NAMES.get(molecule, molecule),
            "entropy": [int(seed), _STREAM[split]],
            "num_frames": int(num_frames),
            "temperature": float(temperature),
            "time_step": float(time_step),
            "stride": stride,
            "friction": float(friction),
            "warmup_steps": round(warmup / time_step),
        }
        super().__init__(os.fspath(root), transform, pre_transform, pre_filter)
        self.molecule, self.split = molecule, split
        path = Path(self.processed_dir) / f"xtb_{molecule.replace(' ', '_')}_{split}_{settings_key(settings)}.npz"
        arrays = cached(path, settings, lambda: _simulate(settings, f"{molecule} {split}", progress), force_reload)
        frames = zip(arrays["pos"], arrays["energy"], arrays["force"], strict=True)
        fill(self, [make_frame(arrays["z"], pos, energy, force) for pos, energy, force in frames])


def _simulate(settings: dict[str, Any], label: str, progress: bool) -> Arrays:
    """Run the worker with one thread and return its arrays z [V], pos [F, V, 3], energy [F], force [F, V, 3]."""
    from tqdm import tqdm

    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    steps = settings["warmup_steps"] + settings["stride"] * (settings["num_frames"] - 1) + 1
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "frames.npz"
        errors = Path(folder) / "errors.txt"
        command = [
            sys.executable,
            str(Path(__file__).with_name("xtb_worker.py")),
            json.dumps({**settings, "out": str(out)}),
        ]
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **threads}
            ) as process,
            tqdm(total=steps, desc=f"GFN2-xTB {label}", unit="step", disable=not progress) as bar,
        ):
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip().isdigit():
                        bar.update(int(line) - bar.n)
                if process.wait() == 0:
                    bar.update(steps - bar.n)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0 or not out.is_file():
            lines = errors.read_text().strip().splitlines() or ["no message"]
            raise RuntimeError(f"GFN2-xTB dynamics of {label} failed (exit {process.returncode}): {lines[-1]}")
        with np.load(out, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise RuntimeError(f"GFN2-xTB dynamics of {label} gave values that are not finite; take a smaller time_step")
    return arrays
