from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geo import bench

ROOT = Path(__file__).parents[1]
SMALL = ["--edges", "60", "--nodes", "9", "--orientations", "3", "--channels", "5", "--basis", "4", "--rounds", "1"]


def test_list_and_unknown_name(capsys):
    assert bench.main(None) == 0
    assert "se_conv" in capsys.readouterr().out
    assert bench.main("no_such") == 2
    assert "'no_such' is not one of se_conv" in capsys.readouterr().err


def test_interleave_counts_and_orders():
    calls = []
    timings = bench.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, calls=3)
    assert "".join(calls) == "aaaabbbb" * 2  # one unobserved call and three timed ones in each turn
    assert all(0 <= t.low <= t.median <= t.high for t in timings.values())


def test_peak_extra_memory_sees_the_temporary_not_the_result():
    if bench.peak_extra_memory(lambda: torch.ones(1)) is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    size = 64 << 20
    with_temporary = bench.peak_extra_memory(lambda: torch.ones(size // 4).add_(1).sum())
    result_only = bench.peak_extra_memory(lambda: torch.ones(size // 4))
    assert with_temporary is not None
    assert result_only is not None
    assert 0.9 * size < with_temporary < 1.5 * size
    assert result_only < 0.25 * size


def test_table():
    assert bench.table([["a", "b"], ["1", "22"]]).splitlines() == ["| a | b  |", "|---|----|", "| 1 | 22 |"]


def test_se_conv_prints_a_page_of_ratios():
    command = [sys.executable, "-m", "geo", "bench", "se_conv", *SMALL, "--malloc", "default"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for row in ("gather_mul_segment_sum forward", "convolution forward", "convolution forward + backward"):
        assert f"| {row} " in done.stdout


def test_se_conv_refuses_a_wrong_result(monkeypatch):
    """The equality check is not for show: a kernel that is off by one per cent is not timed."""
    from geo.bench import se_conv

    good = se_conv.gather_mul_segment_sum
    monkeypatch.setattr(se_conv, "gather_mul_segment_sum", lambda *args, **kwargs: good(*args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match="gather_mul_segment_sum forward"):
        se_conv.main([*SMALL, "--here"])
    monkeypatch.setattr(se_conv, "gather_mul_segment_sum", good)


def test_se_conv_here_is_json(capsys):
    from geo.bench import se_conv

    threads = torch.get_num_threads()
    assert se_conv.main([*SMALL, "--here"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert set(rows) == set(se_conv.TARGETS)
    assert torch.get_num_threads() == threads


TINY = ["--edges", "60", "--features", "3", "--threads", "1", "--seconds", "0", "--rounds", "1"]


def test_scatter_prints_a_page_of_ratios(tmp_path):
    out = tmp_path / "page.md"
    command = [sys.executable, "-m", "geo", "bench", "scatter", *TINY, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == out.read_text().strip()
    head, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out.read_text().splitlines() if "|" in line]
    assert head[:7] == ["op", "pass", "given", "order", "degrees", "E", "F"]
    assert len(rows) == 1 + 8 * 2 * 2 * 2  # the line, then passes x order x degrees x (ptr or plan, index)
    assert {row[2] for row in rows[1:]} == {"ptr", "plan", "index"}
    for row in rows[1:]:
        assert float(row[10]) == pytest.approx(float(row[9]) / float(row[7]), rel=0.35, abs=0.02)  # of rounded times
    assert "of 64 rows reach their target" in out.read_text()
    assert done.stderr.count("\n") == 64  # progress


def test_scatter_refuses_a_wrong_result(monkeypatch):
    """A kernel that is off by one per cent in every row is not timed, be it of sums or of small shares."""
    from geo.bench import scatter

    threads = torch.get_num_threads()
    good = {name: getattr(scatter.ops, name) for name in ("segment_reduce", "segment_softmax")}
    for name, function in good.items():
        monkeypatch.setattr(scatter.ops, name, lambda *args, function=function: function(*args) * 1.01)
        with pytest.raises(AssertionError, match="ours, ptr"):
            scatter.main([*TINY, "--here", "--ops", {"segment_reduce": "max"}.get(name, "softmax")])
        monkeypatch.setattr(scatter.ops, name, function)
    torch.set_num_threads(threads)


def test_scatter_draws_what_it_says():
    from geo.bench import scatter

    for degrees, low, high in (("uniform", 20, 60), ("power-law", 1000, 4000)):
        graph = scatter.draw(scatter.Case("unsorted", degrees, 20_000, 1), "cpu")
        degree = graph.index.bincount(minlength=1000)
        assert graph.ptr is None
        assert graph.num_segments == degree.numel() == 1000
        assert low < int(degree.max()) < high
    assert scatter.draw(scatter.Case("sorted", "uniform", 200, 1), "cpu").ptr is not None


def test_scatter_targets_are_those_of_the_issue():
    from geo.bench.scatter import target

    def of(op, given, features, backward=False, tuned=False):
        return target({"op": op, "given": given, "F": features, "pass": "both" if backward else "forward"}, tuned)

    assert [of("mean", "ptr", f) for f in (1, 16, 128)] == [6, 2, 2]
    assert [of("sum", "plan", f) for f in (1, 16, 128)] == [0.95, 4, 4]
    assert [of("logsumexp", "ptr", 16, b, t) for b in (False, True) for t in (False, True)] == [4, 2, 6, 3]
    assert of("softmax", "index", 1) == of("sum", "ptr", 1, backward=True) == 0.95


def test_pyg_is_timed_without_torch_scatter(tmp_path):
    (tmp_path / "torch_scatter.py").write_text("seen = True\n")
    code = (
        "from geo.bench.scatter import _pyg, _torch_scatter; _pyg()\n"
        "from torch_geometric import typing; assert not typing.WITH_TORCH_SCATTER; assert _torch_scatter().seen"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
