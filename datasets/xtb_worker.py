"""Run one Langevin trajectory with GFN2-xTB: the program that :mod:`geo.datasets.xtb_trajectory` starts.

Reads its settings as JSON from the command line, prints the number of frames done on lines of their own, and writes
``z, pos, energy, force`` to the ``.npz`` named by ``out``. It imports nothing of ``geo``, so it starts at once, and it
stands in its own process because the OpenMP runtime of tblite reads its thread count when it is first loaded.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def run(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """BAOAB Langevin dynamics (Leimkuhler and Matthews 2013); lengths in Angstrom, energies in eV, times in fs."""
    import ase.units
    from ase.build import molecule
    from tblite.ase import TBLite

    atoms = molecule(settings["g2_name"])
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    random = np.random.default_rng(settings["entropy"])
    mass = atoms.get_masses()[:, None]
    thermal = np.sqrt(ase.units.kB * settings["temperature"] / mass)
    step = settings["time_step"] * ase.units.fs
    keep = np.exp(-settings["friction"] * settings["time_step"])
    stride, warmup, num_frames = settings["stride"], settings["warmup_steps"], settings["num_frames"]

    pos, force = atoms.get_positions(), atoms.get_forces()
    velocity = thermal * random.standard_normal(pos.shape)
    frames: dict[str, list[Any]] = {"pos": [], "energy": [], "force": []}
    for done in range(1, warmup + stride * (num_frames - 1) + 2):
        velocity += 0.5 * step * force / mass
        pos += 0.5 * step * velocity
        velocity = keep * velocity + np.sqrt(1 - keep**2) * thermal * random.standard_normal(pos.shape)
        pos += 0.5 * step * velocity
        atoms.set_positions(pos)
        force = atoms.get_forces()
        velocity += 0.5 * step * force / mass
        if done > warmup and (done - 1 - warmup) % stride == 0:
            frames["pos"].append(pos - (mass * pos).sum(axis=0) / mass.sum())
            frames["energy"].append(np.float64(atoms.get_potential_energy()))
            frames["force"].append(force.copy())
        if done % 50 == 0:
            print(done, flush=True)
    return {"z": atoms.get_atomic_numbers(), **{key: np.stack(value) for key, value in frames.items()}}


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file: its modules must not shadow anybody's
    request = json.loads(sys.argv[1])
    np.savez(request["out"], allow_pickle=False, **run(request))
