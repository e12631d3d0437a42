from __future__ import annotations

import json
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
