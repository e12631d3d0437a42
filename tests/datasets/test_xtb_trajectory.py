from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from geo.datasets import DamagedFileError, XTBTrajectory, xtb_worker
from geo.datasets.xtb_trajectory import COMMON_NAMES, allowed_molecules

pytest.importorskip("ase")
pytest.importorskip("tblite")

SHORT = {"num_frames": 3, "warmup": 2.0, "progress": False}


def test_frames(tmp_path):
    data = XTBTrajectory(tmp_path, "water", **SHORT)
    assert len(data) == 3
    frame = data[0]
    assert frame.z.tolist() == [8, 1, 1]
    assert (frame.pos.dtype, frame.energy.dtype, frame.force.dtype) == (torch.float32, torch.float64, torch.float32)
    mass = torch.tensor([15.999, 1.008, 1.008])[:, None]
    torch.testing.assert_close((mass * frame.pos).sum(0), torch.zeros(3), atol=1e-5, rtol=0)
    bond = (frame.pos[1:] - frame.pos[0]).norm(dim=1)
    assert ((0.8 < bond) & (bond < 1.2)).all()
    assert frame.force.sum(0).abs().max() < 1e-5


def test_forces_are_minus_the_gradient_of_the_energy(tmp_path):
    from ase import Atoms
    from tblite.ase import TBLite

    frame = XTBTrajectory(tmp_path, "water", **SHORT)[2]
    atoms = Atoms(frame.z.numpy(), frame.pos.double().numpy(), calculator=TBLite(method="GFN2-xTB", verbosity=0))

    def energy(pos):
        atoms.set_positions(pos)
        return atoms.get_potential_energy()

    pos, h = atoms.get_positions(), 1e-3
    assert energy(pos) == pytest.approx(frame.energy.item(), abs=1e-5)
    numerical = np.zeros_like(pos)
    for i in np.ndindex(pos.shape):
        step = np.zeros_like(pos)
        step[i] = h
        numerical[i] = -(energy(pos + step) - energy(pos - step)) / (2 * h)
    np.testing.assert_allclose(frame.force.numpy(), numerical, atol=1e-3)


def test_same_seed_same_bits_and_cache(tmp_path, monkeypatch):
    one, two = (XTBTrajectory(tmp_path / name, "methanol", **SHORT) for name in "ab")
    for key in ("pos", "energy", "force"):
        assert torch.equal(one._data[key], two._data[key])
    files = list((tmp_path / "a" / "processed").iterdir())
    assert len(files) == 1
    others = [
        XTBTrajectory(tmp_path / "a", "methanol", **SHORT, **change)
        for change in ({"seed": 1}, {"split": "test"}, {"temperature": 300.0})
    ]
    assert all(not torch.equal(one._data.pos, other._data.pos) for other in others)
    assert len(list((tmp_path / "a" / "processed").iterdir())) == 4
    monkeypatch.setattr("geo.datasets.xtb_trajectory._simulate", lambda *_: pytest.fail("simulated again"))
    assert torch.equal(XTBTrajectory(tmp_path / "a", "methanol", **SHORT)._data.pos, one._data.pos)
    files[0].write_bytes(files[0].read_bytes()[:-30])
    with pytest.raises(DamagedFileError, match="force_reload=True"):
        XTBTrajectory(tmp_path / "a", "methanol", **SHORT)


def test_failed_run_leaves_no_cache(tmp_path, monkeypatch):
    worker = tmp_path / "xtb_worker.py"
    worker.write_text("import sys\nprint(50, flush=True)\nsys.exit('self-consistency was not reached')\n")
    monkeypatch.setattr("geo.datasets.xtb_trajectory.__file__", str(tmp_path / "xtb_trajectory.py"))
    with pytest.raises(RuntimeError, match=r"water train failed \(exit 1\): self-consistency was not reached"):
        XTBTrajectory(tmp_path / "root", "water", **SHORT)
    assert not (tmp_path / "root").exists()


def test_molecules():
    from ase.build import molecule

    known = allowed_molecules()
    assert {"ethanol", "CH3CH2OH", "water", "H2O"} <= set(known)
    assert not {"O2", "CH3", "NO", "H", "OH"} & set(known)  # open shells and atoms
    for name in COMMON_NAMES.values():
        assert name in known
    assert molecule(COMMON_NAMES["dimethyl sulfoxide"]).get_chemical_formula() == "C2H6OS"
    assert molecule(COMMON_NAMES["isopropanol"]).get_chemical_formula() == "C3H8O"
    assert molecule(COMMON_NAMES["methyl formate"]).get_chemical_formula() == "C2H4O2"
    assert molecule(COMMON_NAMES["trimethylamine"]).get_chemical_formula() == "C3H9N"
    assert molecule(COMMON_NAMES["butadiene"]).get_chemical_formula() == "C4H6"


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("molecule='caffeine' is unknown; allowed: .*'?ethanol", {"molecule": "caffeine"}),
        ("molecule='O2' is unknown", {"molecule": "O2"}),
        ("split='valid' is unknown; allowed: 'train', 'val', 'test'", {"split": "valid"}),
        ("num_frames=0", {"num_frames": 0}),
        ("temperature=-1", {"temperature": -1.0}),
        ("warmup=-1", {"warmup": -1.0}),
        ("frame_spacing=0.3 fs must be a multiple of time_step=1.0 fs", {"frame_spacing": 0.3}),
    ],
)
def test_refusals(tmp_path, match, arguments):
    with pytest.raises(ValueError, match=match):
        XTBTrajectory(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("geo.datasets.xtb_trajectory.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"torch-geo\[atoms\]"):
        XTBTrajectory(tmp_path)


def test_dynamics_samples_the_boltzmann_distribution(monkeypatch):
    """With springs in place of xTB the mean potential energy is kT/2 for each of the 3 V coordinates."""
    from ase.calculators.calculator import Calculator, all_changes

    class Springs(Calculator):
        implemented_properties = ("energy", "forces")
        centre = None

        def __init__(self, method, verbosity):
            super().__init__()

        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
            if self.centre is None:
                self.centre = atoms.get_positions()
            away = atoms.get_positions() - self.centre
            self.results = {"energy": 20 * (away**2).sum(), "forces": -40 * away}

    monkeypatch.setattr("tblite.ase.TBLite", Springs)
    settings = {"g2_name": "CH3CH2OH", "entropy": [0, 0], "temperature": 500.0, "time_step": 1.0, "friction": 0.05}
    out = xtb_worker.run({**settings, "stride": 10, "warmup_steps": 500, "num_frames": 1500})
    assert out["pos"].shape == (1500, 9, 3)
    assert out["energy"].mean() == pytest.approx(27 / 2 * 8.617333e-5 * 500, rel=0.05)
    assert out["energy"].std() == pytest.approx(np.sqrt(27 / 2) * 8.617333e-5 * 500, rel=0.15)


@pytest.mark.slow
def test_seven_hundred_ethanol_frames_take_less_than_a_minute(tmp_path):
    start = time.perf_counter()
    train = XTBTrajectory(tmp_path)
    assert time.perf_counter() - start < 60
    test = XTBTrajectory(tmp_path, split="test", num_frames=200)
    assert len(train) == 700
    # no test frame is a training frame, and both trajectories are at 500 K: 21 vibrations share kT/2 each, roughly
    train_pairs, test_pairs = (torch.stack([torch.pdist(d.pos) for d in data]) for data in (train, test))
    assert torch.cdist(test_pairs, train_pairs, compute_mode="donot_use_mm_for_euclid_dist").min() > 0.05
    for data in (train, test):
        assert data._data.energy.std().item() == pytest.approx(np.sqrt(21 / 2) * 8.617333e-5 * 500, rel=0.3)
