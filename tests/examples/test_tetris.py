"""The chiral pair: what a network of Gaunt products cannot do, and what one of brackets can."""

from __future__ import annotations

import argparse
from importlib import import_module

import pytest
import torch
from torch_geometric.data import Batch

from geo.o3 import random_rotations

for package in ("lightning", "matplotlib"):
    pytest.importorskip(package, reason=f"the examples need {package}")


@pytest.fixture(scope="module")
def tetris():
    return import_module("tetris")


@pytest.mark.parametrize(("kind", "layers"), [("gaunt", 3), ("gaunt", 4), ("bracket", 3), ("bracket", 4), ("cg", 3)])
@torch.no_grad()
def test_only_odd_paths_tell_the_chiral_pair_apart(tetris, kind, layers):
    """With any weights: turned alike, mirrored exchanged."""
    torch.set_default_dtype(torch.float64)
    try:
        model = tetris.Tetris(argparse.Namespace(hidden=4, lmax=2, layers=layers, radius=1.1), kind)
        batch = Batch.from_data_list(tetris.pieces(torch.eye(3)[None], 1.1))
        batch.x, batch.pos = batch.x.double(), batch.pos.double()
        logits = model(batch)
        left, right = logits[:2]
        assert (left - right).abs().max() < 1e-11 if kind == "gaunt" else (left - right).abs().max() > 1e-6
        exchanged = right[[1, 0, *range(2, 8)]]
        torch.testing.assert_close(left, exchanged, rtol=1e-9, atol=1e-9)
        for turn in random_rotations(3, dtype=torch.float64):
            turned = batch.clone()
            turned.pos = batch.pos @ turn.t()
            torch.testing.assert_close(model(turned), logits, rtol=1e-9, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_seven_without_brackets_and_eight_with_them(tetris, tmp_path):
    options = ["--epochs", "60", "--accelerator", "cpu", "--threads", "1", "--out", str(tmp_path)]
    (_, gaunt, alike, *_), (_, bracket, apart, *_) = tetris.main([*options, "--models", "gaunt,bracket"])
    assert gaunt == 7
    assert bracket == 8
    assert alike < 1e-5 < 1e-2 < apart


def test_too_few_layers_are_refused(tetris, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tetris.main(["--layers", "2", "--out", str(tmp_path)])
    assert "a pseudoscalar takes three convolutions" in capsys.readouterr().err
