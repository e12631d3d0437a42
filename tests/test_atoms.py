"""The ASE calculator: units, derivatives, files, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("ase", reason="needs the extra atoms")

from ase import Atoms, units
from ase.build import molecule
from ase.md.verlet import VelocityVerlet

from geo.atoms import GeoCalculator, one_hot
from geo.nn import PONITA


def network(species: int = 2, radius: float = 3.0) -> PONITA:
    torch.manual_seed(0)
    return PONITA(species, 16, 1, num_layers=2, num_ori=8, radius=radius, readout="add")


def calculator(**kwargs) -> GeoCalculator:
    return GeoCalculator(network(), **{"species": [1, 6], "cutoff": 3.0, "dtype": torch.float64, **kwargs})


def methane(calc: GeoCalculator) -> Atoms:
    atoms = molecule("CH4")
    atoms.rattle(0.05, seed=1)
    atoms.calc = calc
    return atoms


def crystal(calc: GeoCalculator) -> Atoms:
    cell = [[4.0, 0.0, 0.0], [0.5, 4.2, 0.0], [0.0, 0.3, 3.9]]
    atoms = Atoms(
        "CHHC", scaled_positions=[[0, 0, 0], [0.3, 0.1, 0.2], [0.1, 0.7, 0.5], [0.6, 0.5, 0.4]], cell=cell, pbc=True
    )
    atoms.calc = calc
    return atoms


def numerical_forces(atoms: Atoms, step: float = 1e-4) -> np.ndarray:
    forces = np.zeros((len(atoms), 3))
    for i in range(len(atoms)):
        for c in range(3):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.positions[i, c] += sign * step
                moved.calc = atoms.calc
                energies.append(moved.get_potential_energy())
            forces[i, c] = -(energies[0] - energies[1]) / (2 * step)
    return forces


@pytest.mark.parametrize("build", [methane, crystal])
def test_forces_are_minus_the_central_difference_of_the_energy(build):
    atoms = build(calculator(scale=2.5))
    forces = atoms.get_forces()
    assert abs(forces).max() > 1e-3
    np.testing.assert_allclose(forces, numerical_forces(atoms), atol=1e-6)


def test_energy_is_scale_times_model_plus_shift():
    shift = {1: -13.6, 6: -1028.0}
    plain = methane(calculator()).get_potential_energy()
    atoms = methane(calculator(scale=3.0, energy_shift=shift))
    assert atoms.get_potential_energy() == pytest.approx(3.0 * plain - 1028.0 - 4 * 13.6, abs=1e-9)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()


def test_supercell_has_eight_times_the_energy_and_wrapping_changes_nothing():
    atoms = crystal(calculator())
    energy = atoms.get_potential_energy()
    large = atoms.repeat(2)
    large.calc = calculator()
    assert large.get_potential_energy() == pytest.approx(8 * energy, rel=1e-9)
    atoms.positions += [7.0, -5.0, 11.0]
    atoms.wrap()
    assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-9)


def test_molecule_in_a_cell_without_periodicity_is_the_molecule():
    atoms = methane(calculator())
    energy = atoms.get_potential_energy()
    atoms.set_cell([2.0, 2.0, 2.0])
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)


def test_nve_dynamics_conserves_energy():
    atoms = methane(calculator(scale=0.5))
    start = atoms.get_potential_energy() + atoms.get_kinetic_energy()
    VelocityVerlet(atoms, timestep=0.2 * units.fs).run(50)
    assert atoms.get_kinetic_energy() > 1e-4
    change = atoms.get_potential_energy() + atoms.get_kinetic_energy() - start
    assert abs(change) < 0.02 * atoms.get_kinetic_energy()


def test_file_round_trip_is_exact(tmp_path):
    saved = calculator(scale=1.7, energy_shift={1: -0.25, 6: -3.5}, dtype=torch.float32)
    energy = methane(saved).get_potential_energy()
    saved.save(tmp_path / "deep" / "potential")
    read = GeoCalculator.from_file(tmp_path / "deep" / "potential")
    assert methane(read).get_potential_energy() == energy
    assert (read.species, read.cutoff, read.scale) == ([1, 6], 3.0, 1.7)
    names = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert names == ["potential.json", "potential.potential.json", "potential.safetensors"]
    assert isinstance(PONITA.load(tmp_path / "deep" / "potential"), PONITA)


def test_file_errors_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.potential\.json"):
        GeoCalculator.from_file(tmp_path / "nothing")
    calculator().save(tmp_path / "p")
    facts = json.loads((tmp_path / "p.potential.json").read_text())
    del facts["scale"]
    (tmp_path / "p.potential.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"it lacks \['scale'\]"):
        GeoCalculator.from_file(tmp_path / "p")


def test_refuses_unknown_elements():
    atoms = molecule("H2O")
    atoms.calc = calculator()
    with pytest.raises(ValueError, match=r"only the elements \['H', 'C'\].*\['H', 'O'\]"):
        atoms.get_potential_energy()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"cutoff": 0.0}, "cutoff must"), ({"scale": -1.0}, "scale must"), ({"species": [1, 1]}, "species must")],
)
def test_refuses_wrong_facts(wrong, text):
    with pytest.raises(ValueError, match=text):
        calculator(**wrong)


def test_stress_is_not_offered():
    from ase.calculators.calculator import PropertyNotImplementedError

    with pytest.raises(PropertyNotImplementedError):
        crystal(calculator()).get_stress()


def test_one_hot_refuses_unknown_elements():
    with pytest.raises(ValueError, match=r"z must hold only the elements \[1, 6\].*\[8\]"):
        one_hot(torch.tensor([1, 8]), [1, 6])


def test_missing_ase_names_the_extra():
    code = "import sys; sys.modules['ase'] = None; import geo.atoms"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'torch-geo[atoms]'" in done.stderr
