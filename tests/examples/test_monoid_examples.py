"""The examples of learned monoids: their data, their logs, and what their tables compare."""

from __future__ import annotations

import argparse
import copy
import json
from importlib import import_module as example
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.utils import degree

from geo.nn import to_pyg_lcm
from geo.testing import assert_close

for package in ("lightning", "matplotlib"):
    pytest.importorskip(package, reason=f"the examples need {package}")


# --- multiset_tasks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def multisets():
    return example("multiset_tasks")


def task(name: str, batch_size: int = 32) -> argparse.Namespace:
    return argparse.Namespace(task=name, bits=8, batch_size=batch_size, smoke=False)


def call(script, out: Path, *flags: str) -> list[list[object]]:
    small = ["--batch-size", "128", "--hidden", "32", "--accelerator", "cpu", "--threads", "1", "--out", str(out)]
    return script.main([*small, *flags])


def numbers(bits: torch.Tensor) -> list[int]:
    return [sum(1 << k for k, bit in enumerate(row) if bit > 0) for row in bits.tolist()]


def test_multisets_hold_their_answer(multisets):
    seen = set()
    for seed in range(20):
        batch = multisets.draw(task("set"), seed)
        groups: dict[int, list[int]] = {}
        for group, number in zip(batch.index.tolist(), numbers(batch.x), strict=True):
            groups.setdefault(group, []).append(number)
        assert [sorted(groups[group])[1] for group in range(32)] == batch.y.tolist()
        seen |= {len(group) for group in groups.values()}
    assert seen <= set(range(2, 17))
    assert len(seen) > 8


@pytest.mark.parametrize("sizes", [None, (9, 16)])
def test_graphs_hold_their_answer(multisets, sizes):
    batch = multisets.draw(task("neighbours"), 3, sizes)
    value, (source, target) = numbers(batch.x), batch.edge_index.tolist()
    heard = [[s for s, t in zip(source, target, strict=True) if t == node] for node in range(batch.num_graphs)]
    assert target == sorted(target)  # PyG's GRU and SetTransformer need it
    for node, neighbours in enumerate(heard):
        assert len(set(neighbours)) == len(neighbours)
        assert node not in neighbours
        assert sorted(value[n] for n in neighbours)[1] == batch.y[node]
    low, high = sizes or (2, 16)
    assert {len(neighbours) for neighbours in heard} == set(range(low, high + 1))


def test_a_seed_draws_the_same(multisets):
    a, b, other = (multisets.draw(task("set"), seed) for seed in (5, 5, 6))
    assert torch.equal(a.x, b.x)
    assert not torch.equal(a.y, other.y)


@pytest.fixture
def quick(multisets, monkeypatch):
    """Short runs that learn: averages of the last steps alone, and tests at every tenth step."""
    for name, value in (("EPOCH", 10), ("WARMUP", 5), ("EMA", 0.5)):
        monkeypatch.setattr(multisets, name, value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["set", "neighbours"])
def test_two_smallest_solve_both_tasks_at_any_size(multisets, tmp_path, monkeypatch, name):
    monkeypatch.setattr(multisets, "EPOCH", 100)
    flags = ["--task", name, "--models", "k_smallest", "--epochs", "3", "--lr", "3e-3"]
    *_, by_time = call(multisets, tmp_path, *flags)
    assert by_time[:2] == ["KSmallest(2), linear codec", "time"]
    assert by_time[4:] == [100.0] * 5


def logged(script, out: Path, name: str) -> list[list[float]]:
    """Steps and accuracies of a run, without its seconds."""
    return [[row[0], *row[2:]] for row in script.Log(out / name).read()]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("at", "kept"), [(12, [10]), (25, [10, 20])])
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(multisets, tmp_path, monkeypatch, at, kept):
    # epochs, hence checkpoints, of 15 steps; the crash at 25 takes the test at 20 back, that at 12 begins anew
    flags = ["--models", "gru", "--train", "1920", "--epochs", "2", "--lr", "0.01"]
    call(multisets, tmp_path / "whole", *flags)
    draw = multisets.draw

    def crash(args, seed, sizes=None):
        if sizes is None and count.append(seed) is None and len(count) == at:
            raise OSError("power cut")
        return draw(args, seed, sizes)

    count: list[int] = []
    monkeypatch.setattr(multisets, "draw", crash)
    with pytest.raises(OSError, match="power cut"):
        call(multisets, tmp_path / "cut", *flags)
    assert [row[0] for row in logged(multisets, tmp_path / "cut", "gru-0")] == kept
    call(multisets, tmp_path / "cut", *flags, "--resume")
    whole = logged(multisets, tmp_path / "whole", "gru-0")
    assert [row[0] for row in whole] == [10, 20, 30]
    assert logged(multisets, tmp_path / "cut", "gru-0") == whole
    load_file = pytest.importorskip("safetensors.torch").load_file
    states = [load_file(tmp_path / name / "gru-0" / "model.safetensors") for name in ("cut", "whole")]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.usefixtures("quick")
def test_a_shorter_run_is_the_beginning_of_a_longer_one(multisets, tmp_path):
    for epochs in ("2", "4"):
        call(multisets, tmp_path / epochs, "--models", "max", "--epochs", epochs, "--lr", "0.01")
    short, long = (logged(multisets, tmp_path / epochs, "max-0") for epochs in ("2", "4"))
    assert [row[0] for row in long] == [10, 20, 30, 40]
    assert len({tuple(row[1:]) for row in long}) == 4  # it learns
    assert short == long[:2]


@pytest.mark.usefixtures("quick")
def test_a_longer_budget_goes_on_and_keeps_the_places_of_tests(multisets, tmp_path):
    call(multisets, tmp_path, "--models", "sum", "--train", "128", "--epochs", "13")
    call(multisets, tmp_path, "--models", "sum", "--train", "128", "--epochs", "21", "--resume")
    assert [row[0] for row in logged(multisets, tmp_path, "sum-0")] == [10, 13, 20, 21]


def written(script, out: Path, logs: dict[str, list[list[float]]], **changed: object) -> None:
    settings = {"task": "set", "bits": 8, "hidden": 32, "batch_size": 128, "lr": 0.001, "train": None, "threads": 1}
    settings |= {"accelerator": "cpu", "smoke": False}
    for name, rows in logs.items():
        script.Log(out / name).write(rows)
        (out / name / "settings.json").write_text(json.dumps(settings | changed))
        (out / name / "model.safetensors").touch()


def test_tables_are_of_finished_runs(multisets, tmp_path, monkeypatch, capsys):
    # by hand: all were tested at step 200 last, and the shortest took 60 s
    logs = {
        "sum-0": [
            [100, 10, 1, 1, 0, 0, 0],
            [200, 20, 2, 3, 0, 0, 0],
            [300, 30, 3, 7, 0, 0, 0],
            [650, 65, 4, 9, 0, 0, 0],
        ],
        "sum-1": [
            [100, 10, 1, 1, 0, 0, 0],
            [200, 22, 4, 4, 0, 0, 0],
            [300, 31, 3, 7, 0, 0, 0],
            [600, 60, 6, 8, 0, 0, 0],
        ],
        "gru-0": [[100, 25, 5, 5, 5, 5, 5], [200, 50, 8, 8, 8, 8, 8], [240, 60, 9, 9, 9, 9, 9]],
        "gru-1": [[100, 25, 5, 5, 5, 5, 5], [200, 50, 6, 6, 6, 6, 6], [240, 60, 7, 7, 7, 7, 7]],
    }
    written(multisets, tmp_path, logs)
    monkeypatch.delattr(multisets, "fit")  # nothing is trained
    rows = call(multisets, tmp_path, "--models", "gru,sum", "--seeds", "2", "--max-time", "00:00:01:00", "--resume")
    assert rows[1:] == [
        ["sum", "steps", 200, 21.0, 3.0, 3.5, 0.0, 0.0, 0.0, "3.0 to 4.0"],
        ["GRU", "steps", 200, 50.0, 7.0, 7.0, 7.0, 7.0, 7.0, "6.0 to 8.0"],
        ["sum", "time", 625, 62.5, 5.0, 8.5, 0.0, 0.0, 0.0, "8.0 to 9.0"],
        ["GRU", "time", 240, 60.0, 8.0, 8.0, 8.0, 8.0, 8.0, "7.0 to 9.0"],
    ]
    assert rows[0][0] == "always the commonest answer"
    assert "Equal time: after 60 s of forward" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().count("| sum ") == 2


def test_runs_of_other_settings_do_not_mix(multisets, tmp_path, capsys):
    written(multisets, tmp_path, {"max-0": [[100, 60, 1, 1, 1, 1, 1]]}, bits=6)
    with pytest.raises(SystemExit):
        call(multisets, tmp_path, "--resume")
    said = " ".join(capsys.readouterr().err.split())
    assert f"--resume: {tmp_path / 'max-0'} was trained with bits 6, not 8: give another --out" in said


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--models", "sum,gpt"], "--models must be of sum, max,"),
        (["--models", ","], "got ','"),
        (["--seeds", "0"], "--seeds must be from 1"),
        (["--bits", "1"], "--bits must be from 2 to 20, got 1"),
        (["--hidden", "30"], "--hidden must be divisible by 4"),
        (["--train", "3"], "--train must be at least --batch-size, 128; got 3"),
        (["--devices", "2"], "--devices must be 1"),
    ],
)
def test_flags_that_make_no_sense(multisets, tmp_path, capsys, flags, text):
    with pytest.raises(SystemExit):
        call(multisets, tmp_path, *flags)
    assert text in " ".join(capsys.readouterr().err.split())


def test_neighbours_by_a_layer_of_pyg(multisets, tmp_path):
    rows = multisets.main(["--smoke", "--task", "neighbours", "--accelerator", "cpu", "--out", str(tmp_path)])
    assert len(rows) == 1 + 2 * len(multisets.MODELS)
    assert "33-64" in (tmp_path / "table.md").read_text()


# --- citation_nodes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def citations():
    return example("citation_nodes")


@pytest.fixture(scope="module")
def papers(citations):
    return citations.load(argparse.Namespace(data="made", smoke=False, seed=0))


def test_made_papers_cite_as_papers_do(citations, papers):
    assert papers.is_undirected()
    assert not papers.has_self_loops()
    assert torch.equal(papers.edge_index[1], papers.edge_index[1].sort().values)
    count = degree(papers.edge_index[1], papers.num_nodes)
    assert count.min() >= 1
    assert count.max() > 6 * count.median(), "a few papers are cited very often"
    same = (papers.y[papers.edge_index[0]] == papers.y[papers.edge_index[1]]).float().mean()
    assert 0.4 < same < 0.8
    again, other = citations.made(800, 0), citations.made(800, 1)
    assert torch.equal(again.x, papers.x)
    assert not torch.equal(other.x, papers.x)


def test_splits_hold_no_paper_twice_and_none_without_topic(citations, papers):
    data = copy.copy(papers)
    data.y = data.y.masked_fill(torch.arange(800) % 10 == 0, -1)
    drawn = [citations.split(data, number, 0) for number in (0, 1)]
    for part in drawn:
        masks = torch.stack([part.train_mask, part.val_mask, part.test_mask])
        assert masks.sum(0).max() == 1
        assert not masks[:, data.y < 0].any()
        assert data.y[part.train_mask].bincount().tolist() == [20] * 6
        assert 150 < int(part.val_mask.sum()) < int(part.test_mask.sum()) <= 400
    assert not torch.equal(drawn[0].train_mask, drawn[1].train_mask)
    assert torch.equal(citations.split(data, 1, 0).train_mask, drawn[1].train_mask)
    assert "train_mask" not in data
    assert citations.split(drawn[1], 0, 0) is drawn[1], "a published split is kept"


def test_words_are_those_of_the_rows_of_unit_length(citations, papers):
    data = copy.copy(papers)
    data.x = torch.zeros(4, 5)
    data.x[1, [0, 3]], data.x[2, 4] = torch.tensor([3.0, 4.0]), 2.0  # neither the first nor the last paper has words
    citations.words(data)
    assert data.word.tolist() == [0, 3, 4]
    assert_close(data.weight, torch.tensor([0.6, 0.8, 1.0]))
    assert data.first.tolist() == [0, 0, 2, 3]
    data.edge_index = torch.zeros(2, 0, dtype=torch.int64)
    model = citations.Classifier("sum", 5, 3, 2, 0.5).eval()
    x = (torch.nn.functional.normalize(data.x, dim=1) @ model.words).relu()
    expected = model.conv2(model.conv1(x, data.edge_index).relu(), data.edge_index)
    assert_close(model(data), expected)


def test_far_papers_change_only_where_trees_are_padded(citations):
    papers = citations.load(argparse.Namespace(data="made", smoke=True, seed=0))
    hub = int(degree(papers.edge_index[1]).argmax())
    without = copy.copy(papers)
    without.edge_index = papers.edge_index[:, (papers.edge_index != hub).all(dim=0)]
    for name in citations.MODELS:
        torch.manual_seed(0)
        model = citations.Classifier(name, papers.x.size(1), 4, 6, 0.5).eval()
        change, moved, num_far = citations.far_change(model, papers)
        assert 20 < num_far < 100
        if name == "lcm":
            assert change > 1e-4
        else:
            assert change < 1e-6, name
            assert moved == 0, name
        near = papers.edge_index[0, papers.edge_index[1] == hub]
        with torch.no_grad():
            assert float((model(papers) - model(without))[near].abs().max()) > 1e-4, "what is near does change"


def test_trees_of_pyg_agree_where_all_have_as_many_neighbours(citations):
    ring = torch.arange(12)
    edges = torch.cat([torch.stack([(ring + k) % 12, ring]) for k in (-2, -1, 1, 2)], dim=1)
    data = citations.words(Data(torch.eye(12), edges[:, edges[1].argsort(stable=True)]))
    ours = citations.Classifier("gru", 12, 8, 3, 0.5).eval()
    theirs = copy.deepcopy(ours)
    for conv in (theirs.conv1, theirs.conv2):
        conv.aggr_module = to_pyg_lcm(conv.aggr_module)
    assert_close(ours(data), theirs(data))


def test_topics_are_learned(citations, tmp_path, capsys):
    rows = citations.main(
        ["--models", "mean,gru", "--runs", "1", "--epochs", "40", "--threads", "1", "--out", str(tmp_path)]
    )
    assert [row[0] for row in rows] == ["mean", "BinaryGRU"]
    assert all(row[1] > 55 for row in rows), "of six topics"
    assert all(row[5:] == [0.0, 0] for row in rows)
    printed = capsys.readouterr().out
    assert "made: 800 papers" in printed
    assert "a layer merges 3,912 times, padded 48,800 times" in printed


def test_cora_by_its_root(citations, geo_data, tmp_path):
    root = str(geo_data / "planetoid")
    flags = ["--smoke", "--accelerator", "cpu", "--threads", "1", "--out", str(tmp_path), "--root", root]
    rows = citations.main([*flags, "--models", "mean,max"])
    assert len(rows) == 2
    assert "Test accuracy on cora, 2708 papers, 7 topics" in (tmp_path / "table.md").read_text()
    assert "7,848 merges; padded to 168 neighbours 452,236" in (tmp_path / "table.md").read_text()


def test_wrong_flags_and_files_of_citations(citations, tmp_path, capsys):
    for flags, message in (
        (["--data", "cora"], "--data cora needs --root, the folder that PyG's Planetoid was given"),
        (["--models", ""], "--models must be of mean, max, sum, lcm, gru"),
        (["--runs", "0"], "--runs: must be a positive integer, got '0'"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--data", "karate"], "invalid choice: 'karate'"),
    ):
        with pytest.raises(SystemExit):
            citations.main([*flags, "--out", str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"Cora as PyG's Planetoid keeps it: no file .*ind\.cora\.x; put it there"):
        citations.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")])
    (tmp_path / "Cora" / "raw").mkdir(parents=True)
    for part in ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index"):
        (tmp_path / "Cora" / "raw" / f"ind.cora.{part}").write_bytes(b"\x80\x02N.")
    with pytest.raises(SystemExit, match=r"ind\.cora\.x: cannot be read, it is damaged"):
        citations.main(["--root", str(tmp_path), "--out", str(tmp_path / "out")])
