from __future__ import annotations

import numpy as np
import pytest
import torch

from geo.datasets import DamagedFileError, NBody
from geo.datasets.nbody import initial_states, simulate, total_energy


def repelling(num=4):
    """States with like charges only: nothing comes close."""
    pos, vel, charge = initial_states("train", num, 5, 0)
    return pos, vel, np.ones_like(charge)


def test_energy_and_momentum_are_conserved():
    pos, vel, charge = repelling()
    before = total_energy(pos, vel, charge)
    drift = {}
    for step in (1e-3, 1e-4):
        x, v = simulate(pos, vel, charge, round(1 / step), step)
        drift[step] = np.abs(total_energy(x, v, charge) / before - 1).max()
        np.testing.assert_allclose(v.sum(axis=1), vel.sum(axis=1), atol=1e-10)
    assert drift[1e-4] < 1e-3
    assert drift[1e-3] / drift[1e-4] == pytest.approx(10, rel=0.2)  # a first-order integrator


def test_circular_orbit():
    speed = np.sqrt(0.5)  # opposite charges at distance 1 circle each other with v^2 / (1/2) = 1
    pos = np.array([[[0.5, 0, 0], [-0.5, 0, 0]]])
    vel = np.array([[[0, speed, 0], [0, -speed, 0]]])
    period = np.pi / speed
    x, v = simulate(pos, vel, np.array([[1, -1]]), 20000, period / 20000)
    np.testing.assert_allclose(x, pos, atol=2e-3)
    np.testing.assert_allclose(v, vel, atol=2e-3)


def test_force_is_the_published_one():
    pos = np.random.default_rng(0).normal(size=(2, 5, 3))
    pos[1, 1] = pos[1, 0] + [0.03, 0.002, 0]  # so close that the x component is cut off, and not the y component
    charge = np.array([[1, -1, 1, 1, -1], [1, 1, -1, 1, -1]])
    expected = np.zeros_like(pos)
    for s, i, j in np.ndindex(2, 5, 5):
        if i != j:
            r = pos[s, i] - pos[s, j]
            expected[s, i] += charge[s, i] * charge[s, j] * r / np.linalg.norm(r) ** 3
    assert np.abs(expected[1, 0, 0]) > 100
    expected = np.clip(expected, -100, 100)
    assert 50 < np.abs(expected[1, 0, 1]) < 100
    x, v = simulate(pos, np.zeros_like(pos), charge, 1)
    np.testing.assert_allclose(v, 0.001 * expected, rtol=1e-12)
    np.testing.assert_allclose(x, pos + 1e-6 * expected, rtol=1e-12)


def test_chunks_and_samples_are_independent():
    pos, vel, charge = initial_states("val", 300, 3, 1)
    x, v = simulate(pos, vel, charge, 20)
    for i in (0, 255, 256, 299):
        one = simulate(pos[i : i + 1], vel[i : i + 1], charge[i : i + 1], 20)
        np.testing.assert_allclose(one[0][0], x[i], rtol=1e-12)
        np.testing.assert_allclose(one[1][0], v[i], rtol=1e-12)


def test_dataset_is_cached_and_seeded(tmp_path, monkeypatch):
    data = NBody(tmp_path, num_samples=3, progress=False)
    assert data.source == "simulation"
    assert len(data) == 3
    assert {k: tuple(v.shape) for k, v in data[0].to_dict().items()} == dict.fromkeys(("y", "pos", "vel"), (5, 3)) | {
        "charge": (5, 1)
    }
    assert all(v.dtype == torch.float32 for v in data[0].to_dict().values())
    longer = NBody(tmp_path, num_samples=4, progress=False)
    assert torch.equal(longer[2].pos, data[2].pos)  # the number of samples does not change the samples
    assert not torch.equal(NBody(tmp_path, num_samples=3, seed=1, progress=False)[0].pos, data[0].pos)
    assert NBody(tmp_path, num_samples=1, num_particles=7, progress=False)[0].pos.shape == (7, 3)
    monkeypatch.setattr("geo.datasets.nbody.simulate", lambda *_, **__: pytest.fail("simulated again"))
    again = NBody(tmp_path, num_samples=3, progress=False)
    assert torch.equal(again[2].y, data[2].y)
    file = next((tmp_path / "processed").glob("nbody_train_*.npz"))
    for file in (tmp_path / "processed").glob("*"):
        file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DamagedFileError, match="force_reload=True"):
        NBody(tmp_path, num_samples=3, progress=False)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "split='valid' is unknown; allowed: 'train', 'val', 'test'", {"split": "valid"}),
        (ValueError, "num_samples=2001 must be 1 to 2000", {"split": "test", "num_samples": 2001}),
        (ValueError, "num_samples=0", {"num_samples": 0}),
        (ValueError, "num_particles=1", {"num_particles": 1}),
        (ValueError, "source='web'", {"source": "web"}),
        (ValueError, "not 5 and 1", {"source": "file", "seed": 1}),
        (FileNotFoundError, "source='simulation'", {"source": "file"}),
    ],
)
def test_refusals(tmp_path, error, match, arguments):
    with pytest.raises(error, match=match):
        NBody(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_refused(tmp_path):
    file = tmp_path / "nbody_charged" / "nbody_small_charged5_seed43.npz"
    file.parent.mkdir()
    file.write_bytes(b"half a file")
    with pytest.raises(DamagedFileError, match="expected 17f9ee7503"):
        NBody(tmp_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_simulation_equals_the_stored_trajectories(geo_data, tmp_path, split):
    stored = NBody(geo_data, split)
    assert stored.source == "file"
    assert len(stored) == {"train": 3000, "val": 2000, "test": 2000}[split]
    num = 600
    made = NBody(tmp_path, split, num, progress=False)
    a, b = (torch.cat([d.pos for d in data[:num]]).reshape(num, 15) for data in (stored, made))
    assert torch.equal(*(torch.cat([d.charge for d in data[:num]]) for data in (stored, made)))
    # which trajectories are chaotic is found without the file: from a start changed in the 15th digit
    pos, vel, charge = initial_states(split, num, 5, 43)
    other = torch.from_numpy(simulate(pos * (1 + 1e-15), vel, charge, 3100)[0]).reshape(num, 15)
    regular = (other - b).abs().amax(1) < 1e-6
    assert regular.float().mean() > 0.9
    assert (a - b)[regular].abs().max() < 2e-6


def test_stored_input_frame_leads_to_the_stored_target(geo_data):
    data = NBody(geo_data, "test", 500)
    pos, vel, y = (torch.cat([d[key] for d in data]).reshape(500, 5, 3).numpy() for key in ("pos", "vel", "y"))
    charge = torch.cat([d.charge for d in data]).reshape(500, 5).numpy()
    error = np.abs(simulate(pos, vel, charge, 1000)[0] - y).max(axis=(1, 2))
    assert np.median(error) < 1e-6
    assert np.quantile(error, 0.9) < 1e-5
