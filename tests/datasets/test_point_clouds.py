from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from geo.datasets import DamagedFileError, DigitPoints, ModelNet10Points
from geo.datasets.modelnet10_points import farthest_points, random_rotations, surface_voxels
from geo.datasets.solids import SOLIDS, extrude, revolve, sample_solid, sample_surface


class TestDigitPoints:
    @pytest.fixture(autouse=True)
    def _sklearn(self):
        pytest.importorskip("sklearn")

    def test_points_are_the_pixels(self):
        from sklearn.datasets import load_digits

        digits = load_digits()
        data = DigitPoints(split="all")
        assert len(data) == 1797
        for i in (0, 17, 1796):
            image = torch.zeros(8, 8)
            column, row = (data[i].pos * torch.tensor([1, -1]) + 3.5).round().long().T
            image[row, column] = 16 * data[i].x[:, 0]
            assert torch.equal(image, torch.tensor(digits.images[i], dtype=torch.float32))
            assert data[i].y.item() == digits.target[i]

    def test_splits_are_a_fixed_partition(self):
        parts = [DigitPoints(split=split) for split in ("train", "val", "test")]
        assert [len(p) for p in parts] == [1257, 180, 360]
        seen = sorted(d.x.numpy().tobytes() + d.pos.numpy().tobytes() for part in parts for d in part)
        assert seen == sorted(d.x.numpy().tobytes() + d.pos.numpy().tobytes() for d in DigitPoints(split="all"))
        assert torch.equal(DigitPoints()[5].pos, parts[0][5].pos)

    def test_rotation(self):
        upright, turned, again = DigitPoints(split="test"), *(DigitPoints(split="test", rotate=True) for _ in range(2))
        for a, b, c in zip(upright, turned, again, strict=True):
            assert a.angle.item() == 0
            assert torch.equal(b.pos, c.pos)
            torch.testing.assert_close(torch.pdist(a.pos), torch.pdist(b.pos), atol=1e-4, rtol=1e-4)
            turn = torch.view_as_complex(b.pos) / torch.view_as_complex(a.pos)
            torch.testing.assert_close(turn, torch.exp(1j * b.angle).expand_as(turn), atol=1e-5, rtol=1e-5)
        assert not torch.equal(DigitPoints(split="test", rotate=True, seed=1)[0].pos, turned[0].pos)

    def test_refusals(self, monkeypatch):
        with pytest.raises(ValueError, match="split='valid'"):
            DigitPoints(split="valid")
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(ImportError, match=r"torch-geo\[points\]"):
            DigitPoints()


def test_surface_voxels():
    grid = np.zeros((1, 5, 5, 5), dtype=bool)
    grid[0, 1:4, 1:4, 1:4] = True
    surface = surface_voxels(grid)
    assert surface.sum() == 26
    assert not surface[0, 2, 2, 2]
    assert surface_voxels(np.ones((1, 4, 4, 4))).sum() == 64 - 8  # outside the grid is empty


def test_farthest_points():
    points = np.array([[0.0, 0, 0], [0.1, 0, 0], [10, 0, 0], [0, 4, 0]])
    assert farthest_points(points, 3).tolist() == [2, 3, 1]
    assert sorted(farthest_points(points, 4).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["z", "so3"])
def test_random_rotations(kind):
    r = random_rotations(2000, kind, 0)
    np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.broadcast_to(np.eye(3), r.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(r), 1)
    assert np.abs(r.mean(axis=0)[:2]).max() < 0.06
    np.testing.assert_allclose(r[:, 2, 2].mean(), 1 if kind == "z" else 0, atol=0.05)
    if kind == "z":
        assert np.array_equal(r[:, 2], np.broadcast_to([0, 0, 1], (2000, 3)))


def test_meshes_have_the_right_area():
    def area(mesh):
        corner = mesh[0][mesh[1]]
        return np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1).sum() / 2

    assert area(extrude(4)) == pytest.approx(2 * 2 + 4 * 2 * np.sqrt(2))
    assert area(extrude(48)) == pytest.approx(6 * np.pi, rel=0.01)
    assert area(extrude(48, top=0)) == pytest.approx(np.pi * (1 + np.sqrt(5)), rel=0.01)
    angle = np.linspace(-np.pi / 2, np.pi / 2, 49)
    assert area(revolve(np.stack([np.cos(angle), np.sin(angle)], 1))) == pytest.approx(4 * np.pi, rel=0.01)
    angle = 2 * np.pi * np.arange(48) / 48
    torus = revolve(np.stack([1 + 0.3 * np.cos(angle), 0.3 * np.sin(angle)], 1), closed=True)
    assert area(torus) == pytest.approx(4 * np.pi**2 * 0.3, rel=0.01)


def test_solids_are_sampled_uniformly_on_the_surface():
    random = np.random.default_rng(0)
    points = sample_surface(extrude(4), 20000, random)
    half = np.sqrt(0.5)  # a square of circumradius 1, parallel to the axes
    inside = np.abs(points) - [half, half, 1]
    np.testing.assert_allclose(inside.max(axis=1), 0, atol=1e-12)
    share = (np.abs(points[:, 2]) > 1 - 1e-9).mean()
    assert share == pytest.approx(4 / (4 + 8 * np.sqrt(2)), abs=0.01)
    for name in SOLIDS:
        assert np.isfinite(sample_solid(name, 50, random)).all()


def write_voxels(folder, monkeypatch):
    file = folder / "modelnet10_voxels" / "modelnet10.npz"
    file.parent.mkdir()
    grids = np.zeros((4, 30, 30, 30), dtype=np.int32)
    grids[0, 5:15, 5:15, 5:15] = 1
    grids[1, 3, 4, 5:8] = 1
    grids[3, 10:20, 10:12, 10:30] = 1  # grid 2 stays empty
    y = np.array([0, 0, 1, 9])
    np.savez_compressed(file, X_train=grids, y_train=y, X_test=grids[:1], y_test=y[:1])
    from geo.datasets.cache import file_sha256

    monkeypatch.setattr("geo.datasets.modelnet10_points._FILE_SHA256", file_sha256(file))
    return file


class TestModelNet10Points:
    def test_voxels(self, tmp_path, monkeypatch):
        write_voxels(tmp_path, monkeypatch)
        data = ModelNet10Points(tmp_path, num_points=100)
        assert data.source == "voxels"
        assert data._data.y.tolist() == [0, 0, 9]
        assert [d.num_nodes for d in data] == [100, 3, 100]
        assert data.class_names[9] == "toilet"
        torch.testing.assert_close(data[1].pos[:, 2].sort()[0], torch.tensor([-1.0, 0, 1]))
        for sampling in ("farthest", "random"):
            whole = ModelNet10Points(tmp_path, num_points=10000, sampling=sampling)
            assert [d.num_nodes for d in whole] == [1000 - 512, 3, 10 * 2 * 20]
            torch.testing.assert_close(whole[0].pos.norm(dim=1).max(), torch.tensor(1.0))
        assert len(ModelNet10Points(tmp_path, "test")) == 1
        assert len(ModelNet10Points(tmp_path, num_samples=2)) == 2
        with pytest.raises(ValueError, match="num_samples=4 must be at most 3"):
            ModelNet10Points(tmp_path, num_samples=4)

    def test_damaged_voxels_are_refused(self, tmp_path, monkeypatch):
        file = write_voxels(tmp_path, monkeypatch)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DamagedFileError, match=r"modelnet10\.npz.*SHA-256"):
            ModelNet10Points(tmp_path)
        assert not (tmp_path / "processed").exists()

    def test_solids(self, tmp_path, monkeypatch):
        data = ModelNet10Points(tmp_path, num_points=32, num_samples=20)
        assert data.source == "solids"
        assert data._data.y.tolist() == 2 * list(range(10))
        assert data[0].pos.shape == (32, 3)
        assert data._data.pos.norm(dim=1).max() <= 1 + 1e-6
        assert not torch.equal(data[0].pos, data[10].pos)
        test = ModelNet10Points(tmp_path, "test", num_points=32, num_samples=20)
        assert not torch.equal(test[0].pos, data[0].pos)
        monkeypatch.setattr("geo.datasets.modelnet10_points.sample_solid", lambda *_: pytest.fail("made again"))
        turned = ModelNet10Points(tmp_path, num_points=32, num_samples=20, rotate="so3")
        for a, b in zip(data, turned, strict=True):
            assert not torch.allclose(a.pos, b.pos)
            torch.testing.assert_close(torch.pdist(a.pos), torch.pdist(b.pos), atol=1e-4, rtol=1e-4)
        turned = ModelNet10Points(tmp_path, num_points=32, num_samples=20, rotate="z")
        torch.testing.assert_close(turned[3].pos[:, 2], data[3].pos[:, 2])

    def test_default_sizes(self, tmp_path):
        assert len(ModelNet10Points(tmp_path, num_points=4, sampling="random")) == 1000
        data = ModelNet10Points(tmp_path, "test", num_points=4, sampling="random")
        assert data._data.y.bincount().tolist() == [30] * 10

    @pytest.mark.parametrize(
        ("error", "match", "arguments"),
        [
            (ValueError, "split='val'", {"split": "val"}),
            (ValueError, "num_points=0", {"num_points": 0}),
            (ValueError, "num_samples=0", {"num_samples": 0}),
            (ValueError, "source='mesh'", {"source": "mesh"}),
            (ValueError, "sampling='grid'", {"sampling": "grid"}),
            (ValueError, "rotate='x' is unknown; allowed: None, 'z', 'so3'", {"rotate": "x"}),
            (FileNotFoundError, "source='solids'", {"source": "voxels"}),
        ],
    )
    def test_refusals(self, tmp_path, error, match, arguments):
        with pytest.raises(error, match=match):
            ModelNet10Points(tmp_path, **arguments)
        assert list(tmp_path.iterdir()) == []

    def test_published_file(self, geo_data, tmp_path):
        (tmp_path / "modelnet10_voxels").symlink_to(geo_data / "modelnet10_voxels")
        data = ModelNet10Points(tmp_path, "test", num_points=64, sampling="random")
        assert len(data) == 907
        assert data._data.y.bincount().tolist() == [50, 100, 100, 85, 86, 100, 86, 100, 100, 100]
        tables = torch.cat([d.pos[:, 2] for d in data if data.class_names[d.y] == "table"])
        assert tables.median() > 0.03  # upright: the top of a table is above its centre
