"""The potential with each of the three products: its symmetry, its batches, its paths, its runs."""

from __future__ import annotations

import argparse
import math
from importlib import import_module

import pytest
import torch
from torch_geometric.data import Batch, Data

from geo.o3 import random_rotations
from geo.transforms import AddRadiusGraph

for package in ("lightning", "matplotlib", "ase", "tblite"):
    pytest.importorskip(package, reason=f"the example needs {package}")

KINDS = ("cg", "gaunt", "bracket")


@pytest.fixture(scope="module")
def example():
    return import_module("molecules_gaunt")


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Where the first run leaves its frames for the others."""
    return tmp_path_factory.mktemp("frames")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)  # e3nn builds its products in it
    yield
    torch.set_default_dtype(torch.float32)


def potential(example, kind, **sizes):
    torch.manual_seed(0)
    args = {"hidden": 4, "lmax": 2, "layers": 2, "correlation": 2, "cutoff": 3.0} | sizes
    return example.Potential(argparse.Namespace(**args), kind, num_elements=2, degree=4.0).eval()


def molecule(num_atoms: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    elements = torch.arange(num_atoms) % 2
    pos = 1.5 * torch.randn(num_atoms, 3, generator=generator)
    return AddRadiusGraph(3.0)(Data(x=torch.eye(2)[elements], pos=pos))


@pytest.mark.parametrize("sizes", [{}, {"correlation": 3}, {"layers": 3}, {"lmax": 1, "layers": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_energy_stays_and_forces_turn(example, float64, kind, sizes):
    model, molecules = potential(example, kind, **sizes), [molecule(7, 0), molecule(5, 1)]
    batch = Batch.from_data_list(molecules)
    energy, force = model(batch)
    assert energy.shape == (2,)
    assert force.abs().max() > 1e-3
    for turn in (*random_rotations(3, dtype=torch.float64), -torch.eye(3)):
        turned = batch.clone()
        turned.pos = batch.pos @ turn.t() + torch.tensor([1.0, -2.0, 3.0])
        energies, forces = model(turned)
        torch.testing.assert_close(energies, energy, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(forces, force @ turn.t(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_alone_as_in_a_batch(example, float64, kind):
    model, molecules = potential(example, kind), [molecule(7, 0), molecule(1, 1), molecule(5, 2)]
    energy, force = model(Batch.from_data_list(molecules))
    alone = [model(Batch.from_data_list([one])) for one in molecules]
    torch.testing.assert_close(torch.cat([pair[0] for pair in alone]), energy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([pair[1] for pair in alone]), force, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_forces_are_the_gradient_of_the_energy(example, float64, kind):
    model, batch = potential(example, kind), Batch.from_data_list([molecule(6, 0)])
    force = model(batch)[1]
    step = torch.zeros_like(batch.pos)
    step[2] = torch.tensor([2e-5, -1e-5, 3e-5])
    ends = []
    for sign in (1, -1):
        moved = batch.clone()
        moved.pos = batch.pos + sign * step
        ends.append(model(moved)[0])
    torch.testing.assert_close((ends[1] - ends[0]).sum(), 2 * (force * step).sum(), rtol=1e-6, atol=1e-12)


def test_paths_are_those_that_are_multiplied(example):
    """15 Clebsch-Gordan paths of true features up to degree 2, 11 of them even; brackets bring the others back."""
    count = {kind: potential(example, kind, layers=3).layers for kind in KINDS}
    for kind, layers in count.items():
        for layer in layers:
            product = layer.conv.tp
            assert layer.num_paths[0] == len(product.instructions if kind == "cg" else product.paths)
    assert [layers[1].num_paths[0] for layers in count.values()] == [15, 11, 15]
    assert count["cg"][2].num_paths[0] == count["bracket"][2].num_paths[0]
    for layer in count["cg"]:
        assert layer.num_paths[1] == len(layer.power.products[0].instructions)


@pytest.mark.parametrize("kind", KINDS)
def test_smoke(example, frames, tmp_path, kind):
    flags = ["--smoke", "--accelerator", "cpu", "--threads", "1", "--out", str(tmp_path), "--root", str(frames)]
    row, *paper = example.main([*flags, "--models", kind, "--hidden", "4", "--correlation", "3", "--layers", "3"])
    assert all(math.isfinite(value) and value > 0 for value in row[1:-1])
    assert [errors[1:3] for errors in paper] == [[3.0, 8.8], [2.9, 9.2]]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_sizes_are_refused(example, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main(["--correlation", "1", "--out", str(tmp_path)])
    assert "--correlation is 1, but must be at least 2" in capsys.readouterr().err
