from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import geo.datasets
from geo.datasets.cache import (
    DamagedFileError,
    cached,
    check_sha256,
    file_sha256,
    read_cache,
    read_npz,
    settings_key,
    write_cache,
)

ROOT = Path(__file__).parents[2]
SETTINGS = {"seed": 0, "size": [1, 2]}


def arrays() -> dict[str, np.ndarray]:
    return {"pos": np.random.default_rng(0).normal(size=(3, 4)), "z": np.arange(5, dtype=np.uint8)}


def test_round_trip_is_bitwise(tmp_path):
    write_cache(tmp_path / "deep" / "a.npz", arrays(), SETTINGS)
    found = read_cache(tmp_path / "deep" / "a.npz", SETTINGS)
    for key, value in arrays().items():
        assert found[key].dtype == value.dtype
        assert found[key].tobytes() == value.tobytes()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.npz"]


def test_key_depends_on_every_setting():
    keys = {settings_key(s) for s in (SETTINGS, {**SETTINGS, "seed": 1}, {**SETTINGS, "size": [1, 3]})}
    assert len(keys) == 3
    assert settings_key(SETTINGS) == settings_key(dict(reversed(SETTINGS.items())))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_damaged_cache_is_refused_and_made_again_when_asked(tmp_path, damage):
    path = tmp_path / "a.npz"
    write_cache(path, arrays(), SETTINGS)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 3] ^= 0xFF
    path.write_bytes({"truncate": data[:-100], "empty": b"", "text": b"no archive"}.get(damage, data))
    with pytest.raises(DamagedFileError, match=r"a\.npz.*force_reload=True"):
        cached(path, SETTINGS, arrays)
    assert cached(path, SETTINGS, arrays, force_reload=True)["z"].tolist() == [0, 1, 2, 3, 4]
    assert cached(path, SETTINGS, pytest.fail)["z"].tolist() == [0, 1, 2, 3, 4]


def test_a_cache_altered_with_valid_zip_sums_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_cache(path, arrays(), SETTINGS)
    with np.load(path) as archive:
        changed = dict(archive)
    changed["z"] = changed["z"] + 1
    np.savez(path, **changed)
    with pytest.raises(DamagedFileError, match="checksum"):
        read_cache(path, SETTINGS)


def test_other_settings_are_refused(tmp_path):
    write_cache(tmp_path / "a.npz", arrays(), SETTINGS)
    with pytest.raises(DamagedFileError, match="checksum"):
        read_cache(tmp_path / "a.npz", {**SETTINGS, "seed": 1})


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    def half_written(stream, **_):
        stream.write(b"PK half of it")
        raise error

    monkeypatch.setattr(np, "savez_compressed", half_written)
    with pytest.raises(type(error)):
        write_cache(tmp_path / "a.npz", arrays(), SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DamagedFileError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz", ["z"])
    with pytest.raises(DamagedFileError, match=r"a\.npz"):
        read_cache(tmp_path / "a.npz", {})


def test_missing_array_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", z=np.arange(3))
    with pytest.raises(DamagedFileError, match=r"no array \['pos'\]; it has \['z'\]"):
        read_npz(tmp_path / "a.npz", ["z", "pos"])
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "b.npz", ["z"])


def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "a") == expected
    check_sha256(tmp_path / "a", expected.upper())
    with pytest.raises(DamagedFileError, match=r"SHA-256 is ba78.*expected 000"):
        check_sha256(tmp_path / "a", "0" * 64)


def test_import_is_light_and_top_level_name_is_refused():
    code = "import geo.datasets, sys; print(sorted({'torch_geometric', 'torch', 'ase', 'sklearn'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    run = subprocess.run(
        [sys.executable, "-c", "import datasets"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ImportError" in run.stderr
    assert "geo.datasets" in run.stderr


def test_every_public_name_is_there():
    for name in geo.datasets.__all__:
        assert getattr(geo.datasets, name).__name__ == name
        assert name in dir(geo.datasets)
    with pytest.raises(AttributeError, match="NBody"):
        geo.datasets.Nothing  # noqa: B018
