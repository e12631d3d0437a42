from __future__ import annotations

import tarfile

import numpy as np
import pytest
import torch
from torch_geometric.loader import DataLoader

from geo.datasets import DamagedFileError, ForceField, energy_shift
from geo.datasets.molecules import KCAL_PER_MOL, make_frame

RANDOM = np.random.default_rng(0)
Z = np.array([8, 1, 1])
POS = RANDOM.normal(size=(3, 3, 3))
FORCE = RANDOM.normal(size=(3, 3, 3))
ENERGY = np.array([-76.1, -76.2, -76.3])


@pytest.fixture
def rmd17(tmp_path):
    path = tmp_path / "rmd17" / "rmd17_ethanol_train_02.npz"
    path.parent.mkdir()
    np.savez(path, nuclear_charges=Z.astype(np.uint8), coords=POS, energies=ENERGY, forces=FORCE)
    return path


def xyz_text(energy="energy", force="forces", lattice="", pbc="F F F"):
    text = ""
    for pos, e, f in zip(POS, ENERGY, FORCE, strict=True):
        text += f'3\n{lattice}Properties=species:S:1:pos:R:3:{force}:R:3 {energy}={e:.12f} pbc="{pbc}"\n'
        for symbol, p, g in zip("OHH", pos, f, strict=True):
            text += f"{symbol} " + " ".join(f"{v:.12f}" for v in (*p, *g)) + "\n"
    return text


@pytest.fixture
def deepmd(tmp_path):
    path = tmp_path / "box"
    for i, frames in enumerate((slice(0, 2), slice(2, 3))):
        folder = path / f"set.{i:03d}"
        folder.mkdir(parents=True)
        np.save(folder / "coord.npy", POS[frames].reshape(-1, 9))
        np.save(folder / "force.npy", FORCE[frames].reshape(-1, 9))
        np.save(folder / "energy.npy", ENERGY[frames])
        np.save(folder / "box.npy", np.tile(5 * np.eye(3).ravel(), (frames.stop - frames.start, 1)))
    (path / "type.raw").write_text("0\n1\n1\n")
    (path / "type_map.raw").write_text("O\nH\n")
    return path


def assert_frames(data, unit=1.0):
    assert len(data) == 3
    for i, frame in enumerate(data):
        assert frame.z.tolist() == [8, 1, 1]
        assert frame.z.dtype == torch.int64
        torch.testing.assert_close(frame.pos, torch.tensor(POS[i], dtype=torch.float32))
        torch.testing.assert_close(frame.force, torch.tensor(unit * FORCE[i], dtype=torch.float32))
        torch.testing.assert_close(frame.energy, torch.tensor([unit * ENERGY[i]], dtype=torch.float64))


def test_rmd17(rmd17, tmp_path):
    assert_frames(ForceField(tmp_path, "rmd17:ethanol", "train", fold=2), KCAL_PER_MOL)
    assert_frames(ForceField(tmp_path, "rmd17:ethanol", "train", fold=2, energy_unit="eV"))
    assert_frames(ForceField("/", str(rmd17), "all"), KCAL_PER_MOL)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["rmd17", rmd17.name]  # nothing is written


def test_kcal_per_mol():
    assert KCAL_PER_MOL == pytest.approx(4184 / (1.602176634e-19 * 6.02214076e23), rel=1e-12)


def test_xyz(tmp_path):
    pytest.importorskip("ase")
    (tmp_path / "a.xyz").write_text(xyz_text())
    data = ForceField(tmp_path, "a.xyz", "all")
    assert_frames(data)
    assert "cell" not in data[0]
    (tmp_path / "b.extxyz").write_text(xyz_text("dft_energy", "dft_force"))
    assert_frames(ForceField(tmp_path, "b.extxyz", "all", energy_key="dft_energy", force_key="dft_force"))
    with pytest.raises(DamagedFileError, match=r"frame 0 has no energy 'energy'; it has \['dft_energy'\]"):
        ForceField(tmp_path, "b.extxyz", "all")
    (tmp_path / "c.xyz").write_text(xyz_text(lattice='Lattice="4 0 0 0 5 0 0 0 6" ', pbc="T T F"))
    data = ForceField(tmp_path, "c.xyz", "all", energy_unit="kcal/mol")
    assert_frames(data, KCAL_PER_MOL)
    assert data[1].cell.tolist() == [[[4, 0, 0], [0, 5, 0], [0, 0, 6]]]
    assert data[1].pbc.tolist() == [[True, True, False]]
    (tmp_path / "d.xyz").write_text("1\nProperties=species:S:1:pos:R:3 energy=-1.0\nH 0 0 0\n")
    data = ForceField(tmp_path, "d.xyz", "all")
    assert len(data) == 1
    assert "force" not in data[0]
    (tmp_path / "e.xyz").write_text(xyz_text() + (tmp_path / "d.xyz").read_text())
    with pytest.raises(DamagedFileError, match="only 3 of 4 frames have forces"):
        ForceField(tmp_path, "e.xyz", "all")


def test_deepmd(deepmd, tmp_path):
    pytest.importorskip("ase")
    data = ForceField(tmp_path, "box", "all")
    assert_frames(data)
    assert data[0].cell.tolist() == (5 * torch.eye(3))[None].tolist()
    assert data[0].pbc.all()
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch.energy.shape == (3,)
    assert batch.cell.shape == (3, 3, 3)
    assert batch.pbc.shape == (3, 3)
    assert batch.force.shape == (9, 3)
    assert ForceField(tmp_path, "box", "all", type_map=["C", "N"])[0].z.tolist() == [6, 7, 7]
    (deepmd / "nopbc").touch()
    assert "cell" not in ForceField(tmp_path, "box", "all")[0]
    (deepmd / "type_map.raw").unlink()
    with pytest.raises(FileNotFoundError, match="type_map="):
        ForceField(tmp_path, "box", "all")


def test_random_split_is_seeded_and_a_partition(tmp_path):
    zero = np.zeros((20, 1, 3))
    np.savez(tmp_path / "a.npz", nuclear_charges=[1], coords=zero, energies=np.arange(20.0), forces=zero)

    def energies(split, **settings):
        data = ForceField(tmp_path, "a.npz", split, energy_unit="eV", **settings)
        return [round(frame.energy.item()) for frame in data]

    parts = [energies(split) for split in ("train", "val", "test")]
    assert [len(p) for p in parts] == [16, 2, 2]
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(20)) == energies("all")
    assert energies("train") == parts[0]
    assert energies("train", seed=1) != parts[0]
    assert len(energies("test", fractions=(0.5, 0.0, 0.5))) == 10
    with pytest.raises(ValueError, match="no sample is left"):
        energies("val", fractions=(0.5, 0.0, 0.5))
    with pytest.raises(ValueError, match="fractions="):
        energies("val", fractions=(0.5, 0.5, 0.5))


def test_transforms(rmd17, tmp_path):
    calls = []

    def before(data):
        calls.append("before")
        data.mark = torch.ones(1)
        return data

    def each(data):
        calls.append("each")
        return data

    data = ForceField(
        tmp_path,
        "rmd17:ethanol",
        fold=2,
        transform=each,
        pre_transform=before,
        pre_filter=lambda frame: frame.energy.item() > -76.25 * KCAL_PER_MOL,
    )
    assert len(data) == 2
    assert calls == ["before", "before"]
    assert data[0].mark.item() == data[0].mark.item() == 1
    assert calls[2:] == ["each", "each"]
    assert data.energy_shift()[8] != 0
    assert calls[4:] == []
    assert len(data[1:]) == 1


def test_damaged_files(rmd17, deepmd, tmp_path):
    whole = rmd17.read_bytes()
    rmd17.write_bytes(whole[:-200])
    with pytest.raises(DamagedFileError, match=r"rmd17_ethanol_train_02\.npz"):
        ForceField(tmp_path, "rmd17:ethanol", fold=2)
    rmd17.write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"SHA-256 is .*, expected 00"):
        ForceField(tmp_path, "rmd17:ethanol", fold=2, sha256="0" * 64)
    published = rmd17.with_name("rmd17_ethanol_train_01.npz")
    published.write_bytes(whole)
    with pytest.raises(DamagedFileError, match="expected 096946747b8d"):
        ForceField(tmp_path, "rmd17:ethanol")
    assert_frames(ForceField(tmp_path, "rmd17:ethanol", verify=False), KCAL_PER_MOL)
    np.savez(rmd17, nuclear_charges=Z, coords=POS, energies=ENERGY[:2], forces=FORCE)
    with pytest.raises(DamagedFileError, match=r"energy has shape \(2,\), expected \(3,\)"):
        ForceField(tmp_path, "rmd17:ethanol", fold=2)
    np.savez(rmd17, nuclear_charges=Z, coords=POS * np.nan, energies=ENERGY, forces=FORCE)
    with pytest.raises(DamagedFileError, match="pos holds values that are not finite"):
        ForceField(tmp_path, "rmd17:ethanol", fold=2)

    pytest.importorskip("ase")
    text = xyz_text()
    for cut in (text[:-20] + "\n", text[: -len(text.splitlines()[-1]) - 1], text[:-1], "", "no xyz\n", text[:4] + "\n"):
        (tmp_path / "a.xyz").write_text(cut)
        with pytest.raises(DamagedFileError, match=r"a\.xyz"):
            ForceField(tmp_path, "a.xyz", "all")

    file = deepmd / "set.000" / "force.npy"
    whole = file.read_bytes()
    for cut in (whole[:-8], whole[:20], b""):
        file.write_bytes(cut)
        with pytest.raises(DamagedFileError, match=r"force\.npy"):
            ForceField(tmp_path, "box", "all")
    np.save(file, FORCE[:1].reshape(1, 9))
    with pytest.raises(DamagedFileError, match=r"force has shape \(1, 3, 3\)"):
        ForceField(tmp_path, "box", "all")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"force\.npy"):
        ForceField(tmp_path, "box", "all")
    (deepmd / "type.raw").write_text("0\n1\n7\n")
    with pytest.raises(DamagedFileError, match=r"needs types 0 to 7, type_map is \['O', 'H'\]"):
        ForceField(tmp_path, "box", "all")


def test_archive_with_a_wrong_checksum_is_refused(tmp_path):
    (tmp_path / "acac").mkdir()
    (tmp_path / "train_300K.xyz").write_text(xyz_text())
    archive = tmp_path / "acac" / "dataset_acac.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "train_300K.xyz", "dataset_acac/train_300K.xyz")
    with pytest.raises(DamagedFileError, match="expected fac37eaf369d"):
        ForceField(tmp_path, "acac")
    pytest.importorskip("ase")
    assert_frames(ForceField(tmp_path, "acac", verify=False))
    with pytest.raises(DamagedFileError, match="train_600K"):
        ForceField(tmp_path, "acac", "train_600K", verify=False)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "'nothing' is unknown.*'aspirin'", {"name": "rmd17:nothing"}),
        (ValueError, "split='val' is unknown; allowed: 'train', 'test'", {"split": "val"}),
        (ValueError, "fold=6", {"fold": 6}),
        (ValueError, "energy_unit='J'", {"energy_unit": "J"}),
        (ValueError, "name='ethanol' is unknown.*rmd17:MOLECULE", {"name": "ethanol"}),
        (ValueError, "must end in", {"name": "a.pdb"}),
        (ValueError, "test_H_transfer", {"name": "acac", "split": "nothing"}),
        (FileNotFoundError, "rmd17_ethanol_train_01.npz", {}),
        (FileNotFoundError, "train_300K.xyz", {"name": "3bpa"}),
        (FileNotFoundError, "a.xyz", {"name": "a.xyz"}),
    ],
)
def test_refusals(tmp_path, error, match, arguments):
    with pytest.raises(error, match=match):
        ForceField(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_energy_shift():
    def frame(z, energy):
        return make_frame(np.array(z), np.zeros((len(z), 3)), energy)

    shift = energy_shift([frame([1, 1], -2.0), frame([1, 8], -11.0), frame([8, 8], -20.0)])
    assert shift.shape == (119,)
    torch.testing.assert_close(shift[[1, 8]], torch.tensor([-1.0, -10.0], dtype=torch.float64))
    assert shift.count_nonzero() == 2
    shift = energy_shift([frame([1, 1, 8], -9.0), frame([8, 1, 1], -11.0)])  # one molecule: the mean energy
    assert shift[[1, 1, 8]].sum().item() == pytest.approx(-10.0)
    with pytest.raises(ValueError, match="no frames"):
        energy_shift([])


@pytest.mark.parametrize("molecule", ["aspirin", "azobenzene", "benzene", "ethanol", "malonaldehyde", "toluene"])
def test_published_rmd17(geo_data, molecule):
    train, test = (ForceField(geo_data, f"rmd17:{molecule}", split) for split in ("train", "test"))
    assert len(train) == len(test) == 1000
    seen = {frame.pos.numpy().tobytes() for frame in train}
    assert not any(frame.pos.numpy().tobytes() in seen for frame in test)
    # forces sum to zero, and the spread of energies is that of a molecule at 500 K, in eV
    net = torch.stack([frame.force.sum(0) for frame in train])
    assert net.abs().max() < 0.02
    kT = 8.617e-5 * 500
    dof = 3 * train[0].num_nodes - 6
    spread = torch.cat([frame.energy for frame in train]).std().item()
    assert spread == pytest.approx(kT * np.sqrt(dof / 2), rel=0.5)


def test_published_xyz(geo_data):
    io = pytest.importorskip("ase.io")
    data = ForceField(geo_data, "3bpa")
    assert len(data) == 500
    assert data[0].num_nodes == 27
    for i, atoms in enumerate(io.read(geo_data / "3bpa" / "train_300K.xyz", "::100")):
        torch.testing.assert_close(data[100 * i].pos, torch.tensor(atoms.positions, dtype=torch.float32))
        assert data[100 * i].energy.item() == atoms.get_potential_energy()
    with pytest.raises(FileNotFoundError, match="random split"):
        ForceField(geo_data, "3bpa", "test_600K")
    assert [len(ForceField(geo_data, "3bpa/train_300K.xyz", s)) for s in ("train", "val", "test")] == [400, 50, 50]
    sizes = {"train": 500, "train_600K": 500, "test": 650, "test_600K": 650, "test_dihedral": 45, "test_H_transfer": 15}
    for split, size in sizes.items():
        data = ForceField(geo_data, "acac", split)
        assert len(data) == size
        assert data[0].num_nodes == 15
        assert ("force" in data[0]) == (size > 45)


def test_published_water(geo_data):
    pytest.importorskip("ase")
    data = ForceField(geo_data, "water", "all")
    assert len(data) == 80
    assert data[0].z.bincount().tolist() == [0, 128] + 6 * [0] + [64]
    torch.testing.assert_close(data[0].cell[0].diag(), torch.full((3,), 12.4447), atol=1e-4, rtol=0)
    assert len(ForceField(geo_data, "water", "train")) == 64
