"""The benchmark of graph random features: its page, its checks, its peers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geo.bench import grf, grf_page
from geo.kernels import normalized_adjacency

ROOT = Path(__file__).parents[1]
TINY = ["--nodes", "60", "200", "--walks", "4", "2", "--exact", "20", "60", "--features", "300", "--stream", "200"]
QUICK = [*TINY, "--rounds", "1", "--threads", "1", "--seconds", "0"]


@pytest.fixture(autouse=True)
def threads():
    """What the benchmark changes in this process, put back."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_prints_all_tables_and_draws(tmp_path):
    plot, out = tmp_path / "time.png", tmp_path / "page.md"
    command = [sys.executable, "-m", "geo", "bench", "grf", *QUICK, "--plot", str(plot), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == out.read_text().split()
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = {
        row[0]: row
        for row in ([c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line)
    }
    small = rows["N = 60, 4 each, p 0.2"]
    assert float(small[2]) > float(small[1].split()[0]), "walks in Python are slower"
    assert small[4] == "100"
    assert rows["60"][-2:] != ["", ""]
    assert rows["200"][-2:] == ["", ""], "no exact kernel, no error"
    assert rows["features from the graph (sampling, pattern, modulation)"][2] == "2000"
    assert rows["product with a vector, Phi (Phi^T v)"][2] == "100"
    assert {"sampling, iid, p 0.2", "sampling and features"} < set(rows)
    assert int(rows["10"][1].replace(",", "")) > int(rows["1"][1]) > 0, "more edges, more walks to simulate"
    assert done.stdout.count("Nodes from which features of") == 2


@pytest.mark.cuda
def test_on_a_gpu(capsys):
    parts = ["--parts", "memory", "sampling", "exact", "large"]
    assert grf.main([*QUICK, *parts, "--device", "cuda", "--here"]) == 0
    assert '"nodes": 1000000, "walks": 16' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "--device is cuda, but torch sees no GPU"),
        (["--walks", "4"], "--walks has 1 numbers and --nodes 4"),
    ],
)
def test_refuses_wrong_flags(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        grf.main(flags)
    assert message in capsys.readouterr().err


def test_refuses_walks_that_are_not_the_references(monkeypatch):
    good = grf.grf_walks
    monkeypatch.setattr(grf, "grf_walks", lambda *args, **kwargs: good(*args, **{**kwargs, "seed": 5}))
    with pytest.raises(AssertionError, match="grf_walks differs from its reference, coupling='iid'"):
        grf.main([*QUICK, "--here"])


@pytest.mark.parametrize("name", ["torch_walks", "python_walks"])
def test_refuses_a_peer_that_is_biased(monkeypatch, name):
    good = getattr(grf, name)

    def biased(*args):
        row, col, length, value = good(*args)
        return row, col, length, value * 1.5

    monkeypatch.setattr(grf, name, biased)
    with pytest.raises(AssertionError, match="the error of U\\^1 is"):
        grf.check("cpu")


def test_refuses_an_update_that_is_wrong(monkeypatch):
    monkeypatch.setattr(grf.Toggle, "__call__", lambda self: None)
    with pytest.raises(AssertionError, match="an update of 1 edges differs from sampling anew"):
        grf.main([*QUICK, "--parts", "streaming", "--here"])


def test_peers_deposit_once_for_each_place_and_length():
    """On a directed path walks go one way: deposits are (i, i + l, l), with the value of the share that got there."""
    index = torch.arange(9)
    matrix = normalized_adjacency(torch.stack([index, index + 1]), num_nodes=10, normalization=None)
    torch.manual_seed(0)
    for peer in (
        grf.torch_walks(matrix, torch.arange(10), 5000, 0.2, block=20_000),
        grf.python_walks(*grf.arrays(matrix), range(10), 5000, 0.2),
    ):
        row, col, length, value = peer
        key = (row * 10 + col) * 10 + length
        assert torch.equal(key, key.unique()), "sorted, each once"
        assert torch.equal(col - row, length)
        assert len(row) == 55
        assert torch.allclose(value, torch.ones(55), atol=0.25)  # at length 9: 1 +- sqrt(1 / (0.8^9 * 5000))
        assert torch.allclose(value[length == 0], torch.ones(10), atol=1e-3)  # 5000 times 1/5000


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((0.5, 0.1), "< 100"), ((4.0, 2.0), "> 400"), ((0.5, 2.0), "> 400"), ((2.0, 0.5), "200"), ((4.0, 0.5), "252")],
)
def test_crossover(ratios, expected):
    rows = [
        {"nodes": n, "ours": {"median": r}, "theirs": {"median": 1.0}} for n, r in zip((100, 400), ratios, strict=True)
    ]
    assert grf_page.crossover([*rows, {"nodes": 1000, "ours": {"median": 1.0}}], "ours", "theirs") == expected


def test_new_edges_are_new():
    edge_index = grf._edges(50, 10)
    new = grf._new_edges(edge_index, 50, 30)
    assert new.size(1) == 60
    old = set(map(tuple, edge_index.t().tolist()))
    found = set(map(tuple, new.t().tolist()))
    assert len(found) == 60
    assert not found & old
    assert found == {(v, u) for u, v in found}
