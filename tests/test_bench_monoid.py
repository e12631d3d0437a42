from __future__ import annotations

import argparse
import sys
import time

import pytest
import torch

from geo.bench import Timing, monoid
from geo.bench.monoid import CASES, PASSES, Problem, check, main, measure, needs, out_of_memory, power_law

QUICK = ["--fraction", "0.02", "--rounds", "1", "--clock", "cpu", "--memory-limit", "2"]


def test_prints_a_page_of_ratios(capsys):
    threads = torch.get_num_threads()
    assert main([*QUICK, "--only", "regular8", "operators", "million", "--peers", "LCM"]) == 0
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("| all of 8 ")]
    assert len(found) == 1 + len(PASSES)  # its sizes, and a line a pass
    for line in found[1:]:
        ratio, target = (line.split("|")[i].strip() for i in (6, 7))
        assert float(ratio) > 0
        assert target == "1"
    for name in ("BinaryGRU", "KSmallest(2)", "training step: SAGEConv, 19,", "PyG's LCM"):
        assert sum(line.startswith(f"| {name}") for line in lines) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux only")
def test_a_peer_without_memory_says_so(capsys):
    few = ["--fraction", "0.2", "--rounds", "1", "--memory-limit", "0.06", "--only", "power1e4", "--peers", "LCM"]
    assert main(few) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " LCM " in line]
    assert [line.split("|")[4].strip() for line in rows] == ["out of memory at 0.06 GB", "not run: needs about 0.23 GB"]
    assert all(line.split("|")[5].strip() for line in rows)  # ours is measured


def test_a_peer_that_takes_too_long_is_stopped():
    program = (
        "from geo.bench.monoid import _limited_time\n"
        'print(\'{"pass": "forward", "geo": 1}\', flush=True)\n'
        "with _limited_time(1): pass\n"
        "sum(range(10**5))\n"  # no limit here
        "with _limited_time(1):\n"
        "    while True: pass\n"
    )
    found, end = monoid._read([sys.executable, "-c", program])
    assert found == {"forward": {"pass": "forward", "geo": 1}}
    assert end.startswith("stopped at 0.")
    timing = Timing(2.0, 2.0, 2.0).__dict__
    row = {"why": end, "geo": timing, "anew": timing, "geo memory": 10**6}
    args = argparse.Namespace(clock="cpu", device="cpu", patience=1, threads=2)
    ours = "2.00 (2.00-2.00)"
    assert monoid._cells(row, "20", args) == [f"> 1000, {end}", ours, "> 500", "20", ours, "> 500", "", "1"]
    args.clock = "wall"  # the least that two threads need
    assert monoid._cells(row, "20", args)[2] == "> 250"


def test_a_pass_after_a_stopped_one(monkeypatch):
    row = {"pass": PASSES[1], "why": "out of memory at 1 GB"}
    ends = [({}, "stopped at 1 GB"), ({PASSES[1]: row}, "")]
    commands = []
    monkeypatch.setattr(monoid, "_read", lambda command: (commands.append(command), ends.pop(0))[1])
    args = argparse.Namespace(clock="wall", device="cpu", patience=1.0)
    rows, status = monoid.compare("power1e5", "LCM", [], args)
    assert [r[3] for r in rows] == ["stopped at 1 GB", "out of memory at 1 GB"]
    assert [command[-1] for command in commands] == ["0", "1"]
    assert status == 0


def test_slow_peers_are_called_as_often_as_time_allows(monkeypatch):
    args = argparse.Namespace(memory_limit=None, device="cpu", clock="wall", seconds=0.01, rounds=1, patience=60)
    monkeypatch.setattr(monoid, "limit_memory", lambda *args: 1e9)
    for pause, number in ((0.011, 3), (0.1, 1)):
        calls = []

        def slow(calls=calls, pause=pause):
            calls.append(time.sleep(pause))

        rows = measure(Problem(torch.tensor([2, 3]), "cpu"), "GRU", slow, [], 0, args)
        _, first, last = (next(rows) for _ in range(3))  # ours alone, the first call, all of them
        assert first["peer"]["median"] >= 1e3 * pause
        assert last["pass"] == "forward"
        assert len(calls) == number


def test_a_failure_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert main([*QUICK, "--only", "regular8", "--peers", "GRU"]) == 1
    assert capsys.readouterr().out.count("failed, exit status 1") == len(PASSES)


def test_other_errors_of_a_peer_are_raised():
    args = argparse.Namespace(memory_limit=None, device="cpu", clock="cpu", seconds=1.0, rounds=1, patience=60)

    def broken():
        raise RuntimeError("no such kernel")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monoid, "limit_memory", lambda *args: 1e9)  # not of this process
        rows = measure(Problem(torch.tensor([2, 3]), "cpu"), "GRU", broken, [], 0, args)
        assert next(rows)["pass"] == "forward"
        with pytest.raises(RuntimeError, match="no such kernel"):
            next(rows)


@pytest.mark.parametrize(
    "text",
    ["[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "std::bad_alloc", "CUDA out of memory."],
)
def test_texts_of_failed_allocations(text):
    assert out_of_memory(RuntimeError(text))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("no such kernel"))


def test_refuses_a_wrong_result(monkeypatch):
    right = monoid.to_pyg_lcm

    def wrong(aggregation):
        lcm = right(aggregation)
        with torch.no_grad():
            lcm.gru_cell.bias_hh.mul_(1.001)
        return lcm

    monkeypatch.setattr(monoid, "to_pyg_lcm", wrong)
    with pytest.raises(AssertionError, match="LCMAggregation"):
        check("cpu")
    monkeypatch.setattr(monoid, "to_pyg_lcm", right)
    monkeypatch.setattr(monoid, "fold", lambda *args: args[0][:6])
    with pytest.raises(AssertionError, match="fold by KSmallest"):
        check("cpu")


def test_problems():
    degrees = power_law(10_000, 300)
    assert 9.0e4 < degrees.sum() < 9.7e4
    assert degrees.median() == 4
    assert degrees.max() == 300
    beyond = [int((degrees >= n).sum()) for n in (10, 100)]
    assert beyond[0] / beyond[1] == pytest.approx(10**1.3, rel=0.05)  # a density of power -2.3
    problem = Problem(CASES["power1e4"].degrees(0.1), "cpu")
    assert torch.equal(problem.call(), problem.call_anew())
    assert problem.index.bincount().max() == problem.longest
    assert needs("GRU", 100, 10, 1) == pytest.approx(13.2 * 4 * 1000 * 64)
