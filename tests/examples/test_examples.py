"""Every example runs: two steps, its plots, its last table, its checkpoints, its help."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib import import_module as example
from pathlib import Path

import pytest
import torch

for package in ("lightning", "matplotlib", "ase", "tblite", "sklearn", "trimesh"):
    pytest.importorskip(package, reason=f"the examples need {package}")

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
PLOTS = {
    "citation_nodes": ["accuracy.png", "learning.png"],
    "counting_cycles": ["errors.png", "learning.png"],
    "heterophilic_nodes": ["scores.png", "learning.png"],
    "long_range": ["learning.png"],
    "molecule_regression": ["learning.png", "parity.png", "stability.png"],
    "molecules": ["parity.png", "learning.png", "md_energy.png"],
    "molecules_gaunt": ["parity.png", "learning.png", "cost.png"],
    "multiset_tasks": ["learning.png", "extrapolation.png"],
    "nbody": ["learning.png"],
    "point_clouds": ["digits.png", "learning.png"],
    "shapes": ["accuracy.png", "learning.png"],
    "tetris": ["learning.png"],
}
COMPUTED = {  # examples without epochs, hence without checkpoints
    "graph_gp": ["spectra.png", "calibration.png", "maps.png"],
    "graph_kernels": ["errors.png", "gain.png"],
    "mesh_regression": ["normals.png", "walks.png"],
}


def smoke(name: str, out: Path, *extra: str) -> list[list[object]]:
    return example(name).main(["--smoke", "--accelerator", "cpu", "--threads", "1", "--out", str(out), *extra])


def test_every_example_is_tested():
    assert set(SCRIPTS) == {*PLOTS, *COMPUTED}


def check_output(rows, plots, out, printed):
    assert len(rows) >= 3
    assert all(math.isfinite(value) for row in rows for value in row if isinstance(value, float))
    for plot in plots:
        assert (out / plot).read_bytes().startswith(b"\x89PNG"), plot
    table = (out / "table.md").read_text()
    for row in rows:
        assert str(row[0]) in table
        assert str(row[0]) in printed
    assert not list(out.rglob("*.tmp*")), "a half-written file was left behind"


@pytest.mark.parametrize("name", COMPUTED)
def test_smoke(name, tmp_path, capsys):
    rows = example(name).main(["--smoke", "--threads", "1", "--out", str(tmp_path)])
    check_output(rows, COMPUTED[name], tmp_path, capsys.readouterr().out)


@pytest.mark.parametrize("name", PLOTS)
def test_smoke_and_resume(name, tmp_path, capsys):
    rows = smoke(name, tmp_path)
    check_output(rows, PLOTS[name], tmp_path, capsys.readouterr().out)
    last = next(tmp_path.glob("*/last.ckpt"))
    steps = torch.load(last, weights_only=True)["global_step"]
    assert steps == 2
    smoke(name, tmp_path, "--resume")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert not list(tmp_path.rglob("*.tmp*")), "a half-written file was left behind"


@pytest.mark.parametrize("name", PLOTS)
def test_wrong_models_are_refused_by_name(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        smoke(name, tmp_path, "--models", "gpt")
    assert "--models must be of" in capsys.readouterr().err


def test_help_shows_every_flag():
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "molecules.py"), "--help"], capture_output=True, text=True, check=True
    )
    for flag in ("--data", "--max-time", "--resume", "--devices", "--smoke", "python examples/molecules.py"):
        assert flag in done.stdout


def test_molecules_saves_a_potential_that_loads(tmp_path):
    from ase.build import molecule

    from geo.atoms import GeoCalculator
    from geo.nn import PONITA

    smoke("molecules", tmp_path, "--models", "ponita")
    assert isinstance(PONITA.load(tmp_path / "potential"), PONITA)
    atoms = molecule("CH3CH2OH")
    atoms.calc = GeoCalculator.from_file(tmp_path / "potential")
    # GFN2-xTB's total energy of ethanol is about -310 eV; the shift alone gives it to a few eV.
    assert -330 < atoms.get_potential_energy() < -290
    assert atoms.get_forces().shape == (9, 3)


def test_molecules_reads_a_file(tmp_path):
    from ase.build import molecule
    from ase.calculators.emt import EMT
    from ase.io import write

    frames = []
    for seed in range(20):
        atoms = molecule("CH4")
        atoms.rattle(0.05, seed=seed)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    write(tmp_path / "methane.xyz", frames, format="extxyz")
    rows = smoke("molecules", tmp_path / "out", "--data", str(tmp_path / "methane.xyz"), "--models", "mean,r3")
    assert [row[0] for row in rows] == ["mean predictor", "PONITA, no orientations"]


def test_molecules_names_the_missing_file(tmp_path):
    with pytest.raises(SystemExit, match=r"rmd17_aspirin_train_01\.npz"):
        smoke("molecules", tmp_path, "--data", "rmd17:aspirin", "--root", str(tmp_path))


def test_molecules_reads_rmd17(tmp_path, geo_data):
    rows = smoke("molecules", tmp_path, "--data", "rmd17:aspirin", "--root", str(geo_data), "--models", "mean,schnet")
    # The mean predictor's force error is the mean absolute force of the test frames.
    assert rows[0][2] == pytest.approx(900, rel=0.3)
