"""The Graph Mamba examples on what they read from disk, and the tasks they make."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import import_module as example
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("lightning", "matplotlib", "sklearn", "torchmetrics"):
    pytest.importorskip(package, reason=f"the examples need {package}")


def smoke(name: str, out: Path, *extra: str) -> list[list[object]]:
    return example(name).main(["--smoke", "--accelerator", "cpu", "--threads", "1", "--out", str(out), *extra])


def fake_peptides(root, name, size):
    """Files as the Long Range Graph Benchmark has them: lists of (x, edge_attr, edge_index, y)."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "val", "test"):
        graphs = []
        for _ in range(24):
            edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
            y = torch.randint(2, (1, size)).float()
            graphs.append((torch.randint(9, (3, 9)), torch.randint(3, (4, 3)), edge_index, y))
        torch.save(graphs, raw / f"{split}.pt")


@pytest.mark.parametrize(("name", "size"), [("peptides-func", 10), ("peptides-struct", 11)])
def test_long_range_reads_peptides(tmp_path, name, size):
    fake_peptides(tmp_path, name, size)
    rows = smoke("long_range", tmp_path / "out", "--data", name, "--root", str(tmp_path), "--walk-length", "2")
    assert [row[0] for row in rows] == ["Graph Mamba", "... reads forwards only", "GatedGCN"]
    assert rows[0][2] == (70.71 if name == "peptides-func" else 0.2473)


def test_ends_hold_each_others_bit():
    graphs = example("long_range").ends(20, 0, [(3, 4), (8, 8)])
    assert {graph.num_nodes for graph in graphs[::2]} == {3, 4}
    assert {graph.num_nodes for graph in graphs[1::2]} == {8}
    for graph in graphs:
        first, last = graph.x[0].argmax(), graph.x[-1].argmax()
        assert graph.y.tolist() == [last, first]
        assert graph.mask.nonzero().flatten().tolist() == [0, graph.num_nodes - 1]
        assert graph.x[1:-1, 2].eq(1).all()


@pytest.mark.slow
def test_long_range_solves_its_task(tmp_path):
    """100 % where both ends can be known, 75 % where one can, 50 % where none can."""
    rows = example("long_range").main(["--accelerator", "cpu", "--threads", "1", "--out", str(tmp_path)])
    both, forward, none = (row[1] for row in rows)
    assert both == 100
    assert 65 < forward < 85
    assert none < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long_range", "heterophilic_nodes"])
def test_two_devices_train_and_resume(tmp_path, name):
    script = Path(__file__).parents[2] / "examples" / f"{name}.py"
    flags = ["--smoke", "--accelerator", "cpu", "--threads", "1", "--devices", "2", "--out", str(tmp_path)]
    for extra in ([], ["--resume"]):
        done = subprocess.run(
            [sys.executable, str(script), *flags, *extra], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("reads forwards only") == 1


@pytest.mark.parametrize(("name", "folder"), [("long_range", "gmn"), ("heterophilic_nodes", "gmn-0")])
def test_weights_are_saved_with_what_builds_the_model(tmp_path, name, folder):
    from safetensors.torch import load_file

    smoke(name, tmp_path, "--models", "gmn")
    saved, script = json.loads((tmp_path / folder / "model.json").read_text()), example(name)
    args = argparse.Namespace(**saved)
    if name == "long_range":
        model = script.Model(saved["model"], args, saved["in_channels"], saved["out_channels"])
    else:
        data = type("Data", (), {"num_features": saved["in_channels"]})
        model = script.build(saved["model"], args, data, saved["num_classes"])
    model.load_state_dict(load_file(tmp_path / folder / "model.safetensors"))


def test_heterophilic_nodes_times_only_what_it_trained(tmp_path):
    settings = ["--models", "gatedgcn", "--accelerator", "cpu", "--threads", "1", "--out", str(tmp_path)]
    settings += ["--layers", "1", "--mpnn-layers", "1", "--hidden", "4", "--pe", "0", "--epochs", "3"]
    assert example("heterophilic_nodes").main(settings)[0][-1] > 0
    again = example("heterophilic_nodes").main([*settings, "--resume"])
    assert again[0][-2:] == [3, None]
    assert "judged after every 3 epochs" in (tmp_path / "table.md").read_text()
    assert example("long_range").read_log(tmp_path / "gatedgcn-0", "val_score")[0] == [3]


def test_scores_are_the_published_metrics():
    from sklearn.metrics import average_precision_score, roc_auc_score

    generator = np.random.default_rng(0)
    y, out = generator.integers(2, size=(50, 10)), generator.normal(size=(50, 10))
    score = example("long_range").score
    expected = 100 * average_precision_score(y, out, average="macro")
    assert score(torch.as_tensor(out), torch.as_tensor(y)) == pytest.approx(expected, abs=1e-4)
    logits = torch.as_tensor(generator.normal(size=(50, 2)))
    batch = type("Batch", (), {"mask": torch.arange(50) % 2 == 0, "y": torch.as_tensor(y[:, 0])})
    expected = 100 * roc_auc_score(y[::2, 0], (logits[::2, 1] - logits[::2, 0]).numpy())
    assert float(example("heterophilic_nodes").roc_auc(logits, batch)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("preset", ["paper", "tuned"])
def test_heterophilic_nodes_runs_every_model(tmp_path, preset):
    rows = smoke("heterophilic_nodes", tmp_path, "--models", "all", "--splits", "0-1", "--preset", preset)
    assert len(rows) == 6
    assert (tmp_path / "gmn-1" / "last.ckpt").is_file()
    assert all(0 <= row[1] <= 100 for row in rows)


def test_heterophilic_nodes_runs_without_tokens(tmp_path):
    rows = smoke("heterophilic_nodes", tmp_path, "--models", "gmn,no-mpnn,gatedgcn", "--walk-length", "0")
    assert len(rows) == 3
    assert "6 GPS layers of 32" in (tmp_path / "table.md").read_text()


def test_heterophilic_nodes_reads_official_splits(tmp_path, geo_data):
    path = geo_data / "heterophilous" / "minesweeper" / "raw" / "minesweeper.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    (tmp_path / "minesweeper" / "raw").mkdir(parents=True)
    (tmp_path / "minesweeper" / "raw" / path.name).write_bytes(path.read_bytes())
    settings = ["--data", "minesweeper-official", "--models", "gatedgcn", "--pe", "0", "--layers", "1"]
    rows = smoke("heterophilic_nodes", tmp_path / "out", "--root", str(tmp_path), *settings)
    assert rows[0][3] == 87.54


@pytest.mark.parametrize("splits", ["10", "3-1", "all", "-1"])
def test_wrong_splits_are_refused(tmp_path, capsys, splits):
    with pytest.raises(SystemExit):
        smoke("heterophilic_nodes", tmp_path, f"--splits={splits}")
    assert f"must be a split from 0 to 9 or a range such as 0-2, got '{splits}'" in capsys.readouterr().err
