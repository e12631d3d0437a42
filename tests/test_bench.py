from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Data

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


def test_interleave_spares_the_slow():
    calls = []
    timings = bench.interleave({"a": lambda: calls.append(time.sleep(0.002))}, rounds=9, calls=3, seconds=1e-3)
    assert len(calls) == 1 + 3  # unobserved, and one in each of three turns
    assert timings["a"].low >= 2


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


FEW = [
    "--batch",
    "3",
    "--channels",
    "4",
    "--single-batch",
    "5",
    "--edges",
    "12",
    "--nodes",
    "4",
    "--conv-channels",
    "2",
]
QUICK = [*FEW, "--rounds", "1", "--calls", "1", "--threads", "1", "--quiet"]


@pytest.fixture
def threads():
    """What the benchmarks change in this process, put back."""
    num_threads = torch.get_num_threads()
    yield num_threads
    torch.set_num_threads(num_threads)


def test_tensor_products_writes_page_table_and_plot(tmp_path):
    files = {name: tmp_path / f"rows.{name}" for name in ("csv", "png", "md")}
    options = ["--csv", str(files["csv"]), "--plot", str(files["png"]), "--out", str(files["md"])]
    modes = ["--mode", "uuu", "uvu", "full", "siso", "simo", "mimo", "conv", "--lmax", "1", "--direction", "forward"]
    command = [sys.executable, "-m", "geo", "bench", "tensor-products", *QUICK, "--no-memory", *modes, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == files["md"].read_text().strip()
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "rows.csv.part").exists()
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert {(row["mode"], row["kind"]) for row in rows} == {
        *((mode, kind) for mode in ("uuu", "uvu", "full") for kind in ("even", "odd", "all")),
        *(("siso", "even"), ("siso", "odd"), ("simo", "even"), ("simo", "all"), ("mimo", "even"), ("mimo", "all")),
        *(("conv", "even"), ("conv", "all"), ("conv", "gaunt even"), ("conv", "gaunt all")),
    }
    for row in rows:
        assert row["status"] == "ok" or row["status"].startswith("not available"), row
        if row["status"] == "ok":
            assert float(row["error"]) < 1e-5
            assert float(row["ms"]) > 0
            assert float(row["us_per_output"]) == pytest.approx(float(row["ms"]) * 1e3 / int(row["outputs"]))
    named = {(row["mode"], row["method"]) for row in rows if row["status"] == "ok"}
    for method in (
        "geo auto",
        "geo layer auto, e3nn",
        "e3nn TensorProduct",
        "e3nn FullTensorProduct",
        "torch grid, BIC",
    ):
        assert ("uuu", method) in named
        assert f"| {method} " in done.stdout
    assert {("conv", "geo TensorProductConv"), ("conv", "e3nn TensorProduct")} <= named


@pytest.mark.parametrize("direction", ["forward", "backward", "double"])
def test_tensor_products_refuses_what_differs(threads, monkeypatch, tmp_path, direction):
    """A product that is off by a tenth of a per cent is not timed, in no direction, and the others are."""
    from geo.bench import tensor_product_peers, tensor_products

    good = tensor_product_peers.ops.gaunt_product
    monkeypatch.setattr(tensor_product_peers.ops, "gaunt_product", lambda *args, **kw: good(*args, **kw) * 1.001)
    options = [
        "--lmax",
        "2",
        "--paths",
        "even",
        "--methods",
        "geo auto",
        "e3nn TensorProduct,",
        "--direction",
        direction,
    ]
    path = tmp_path / "rows.csv"
    assert tensor_products.main([*QUICK, "--mode", "uuu", *options, "--csv", str(path)]) == 1
    rows = {row["method"]: row for row in csv.DictReader(path.read_text().splitlines())}
    assert rows["geo auto"]["status"].startswith("refused: off by")
    assert rows["geo auto"]["ms"] == ""
    assert rows["e3nn TensorProduct, no weights"]["status"] == "ok"


def test_tensor_products_continues_where_it_broke_off(threads, monkeypatch, tmp_path, capsys):
    from geo.bench import tensor_products

    path, part = tmp_path / "rows.csv", tmp_path / "rows.csv.part"
    options = [*QUICK, "--mode", "uuu", "--methods", "geo auto", "--direction", "forward", "--csv", str(path)]
    group, done = tensor_products.group, []

    def breaks_at_two(mode, lmax, *rest):
        if lmax == 2:
            raise KeyboardInterrupt
        done.append(lmax)
        return group(mode, lmax, *rest)

    monkeypatch.setattr(tensor_products, "group", breaks_at_two)
    with pytest.raises(KeyboardInterrupt):
        tensor_products.main([*options, "--lmax", "1", "2"])
    assert len(part.read_text().splitlines()) == 1 + 3  # even, odd, all
    with part.open("a") as file:
        file.write("2026-01-01,a line that broke off")
    monkeypatch.setattr(
        tensor_products, "group", lambda mode, lmax, *rest: done.append(lmax) or group(mode, lmax, *rest)
    )
    with pytest.raises(SystemExit, match="other settings"):
        tensor_products.main([*options, "--lmax", "1", "2", "--batch", "4"])
    assert tensor_products.main([*options, "--lmax", "1", "2"]) == 0
    assert done == [1, 2]
    assert not part.exists()
    assert [row["lmax"] for row in csv.DictReader(path.read_text().splitlines())] == ["1"] * 3 + ["2"] * 3
    assert "### uuu, forward" in capsys.readouterr().out


def test_tensor_products_counts_paths():
    """By hand from the table of the literature, and by e3nn's rule for products of irreps."""
    from e3nn.o3 import Irreps

    from geo.bench.tensor_product_problems import count_paths
    from geo.bench.tensor_products import shapes

    published = {1: (4, 5), 2: (11, 15), 3: (23, 34), 4: (42, 65), 6: (106, 175)}
    assert {lmax: (even, even + odd) for lmax in published for even, odd in [count_paths(lmax)]} == published
    for mode in ("uuu", "siso", "simo", "mimo"):
        for lmax in (1, 2, 3):
            for kind, product in shapes(mode, lmax, ["even", "all"], 1).items():
                first, second, out = (Irreps(text) for text in product.irreps())
                found = sum(ir in a * b for _, a in first for _, b in second for _, ir in out)
                assert len(product.paths) == found, (mode, lmax, kind)
                reached = {(p.l3, p.odd) for p in product.paths}
                assert len(reached) == len(out), (mode, lmax, kind)  # no output that does not exist


def test_tensor_products_targets_are_those_of_the_issue():
    from geo.bench.tensor_product_page import targets

    def row(method, ms, lmax=2, direction="forward", kind="even", mode="uuu"):
        values = {"method": method, "ms": ms, "lmax": lmax, "direction": direction, "kind": kind, "mode": mode}
        return values | {"status": "ok", "device": "cpu", "rows": 1, "channels": 1}

    found = [row("geo auto", 1.0), row("geo auto", 3.1, kind="odd"), row("e3nn TensorProduct", 41.0)]
    found.append(row("e3nn TensorProduct, no weights", 39.0))
    found += [row("geo auto", 1.0, 6, "backward"), row("e3nn TensorProduct", 61.0, 6, "backward")]
    found += [row("geo TensorProductConv", 1.0, mode="conv"), row("e3nn TensorProduct", 5.5, mode="conv")]
    assert [line[2:] for line in targets(found)] == [
        ["39.0", ">= 40", "no"],  # of the faster of both
        ["3.10", "<= 3", "no"],
        ["61.0", ">= 60", "yes"],
        ["5.50", ">= 5", "yes"],
    ]


@pytest.fixture
def small_scans(monkeypatch):
    from geo.bench import selective_scan

    equal = selective_scan.Case("4 x 8 x 5", (8,) * 4, 5)
    uneven = selective_scan.Case("4 x 1..15 x 5", selective_scan.ragged(equal, 15), 5, like=equal.name)
    monkeypatch.setattr(selective_scan, "cases", lambda: [equal, uneven])
    threads = torch.get_num_threads()
    yield selective_scan
    torch.set_num_threads(threads)


def test_selective_scan_prints_a_page_of_ratios(small_scans, capsys):
    assert small_scans.main(["--here", "--threads", "1", "--seconds", "0", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = small_scans.page(result, False).splitlines()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    assert len(rows) == 2 * 2 * 3  # cases, passes, peers
    assert [row[3] for row in rows[:3]] == ["mambapy", "reference loop", "eager loop"]
    assert rows[2][6] == "12"
    for row in rows:
        if row[4] != "not available":
            assert float(row[5]) == pytest.approx(float(row[4]) / float(row[2]), rel=0.1, abs=0.1)  # of rounded times
    assert "of the time of 4 x 8 x 5" in lines[2]


def test_selective_scan_refuses_a_wrong_result(small_scans, monkeypatch):
    """Also where the gradients alone are wrong."""
    good = small_scans.ops.selective_scan
    options = ["--here", "--threads", "1", "--seconds", "0", "--rounds", "1"]
    monkeypatch.setattr(small_scans.ops, "selective_scan", lambda *args, **kwargs: good(*args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match="ours, output"):
        small_scans.main(options)

    def wrong_gradient(u, *args, **kwargs):
        return good((u + u.detach()) / 2, *args, **kwargs)

    monkeypatch.setattr(small_scans.ops, "selective_scan", wrong_gradient)
    with pytest.raises(AssertionError, match="ours, u"):
        small_scans.main(options)


def test_selective_scan_draws_ragged_sequences_of_as_many_rows():
    from geo.bench import selective_scan

    for case in selective_scan.cases():
        if case.like:
            equal = next(other for other in selective_scan.cases() if other.name == case.like)
            assert (case.rows, len(case.lengths)) == (equal.rows, len(equal.lengths))
            assert 1 <= min(case.lengths) < max(case.lengths) == 2 * equal.longest - 1


WALKS = ["--nodes", "40", "12000", "--walks", "2", "1", "--tokens", *"221", "--rounds", "1", "--length", "3"]


def test_walk_tokens_prints_both_tables():
    command = [sys.executable, "-m", "geo", "bench", "walk_tokens", *WALKS, "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    small, large = lines[2:4]
    assert small[0] == "N = 40, 2 each"
    assert [small[4], small[9], large[4], large[9]] == ["100", "5", "", "5"]
    assert all(float(small[i]) > 0 for i in (3, 6, 8))
    assert large[2] == large[5] == ""  # nobody waits for walkers in Python there
    small, large = lines[6:]
    assert [small[0], large[0]] == ["N = 40, 120 tokens", "N = 12000, 36000 tokens"]
    assert [small[4], small[7], large[4], large[7]] == ["100", "5", "", "5"]
    assert all(float(small[i]) > 0 for i in (3, 6, 8))
    assert float(large[6]) > 0
    assert large[2] == ""
    assert 120 < int(small[8]) <= 40 * (5 + 3 + 1)


@pytest.mark.cuda
def test_walk_tokens_on_a_gpu(capsys):
    from geo.bench import walk_tokens

    assert walk_tokens.main([*WALKS, "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert out.count("not available") == 2 * (2 + 1)
    assert out.count("| 10000 ") == 2


def test_walk_tokens_needs_a_gpu_for_cuda(monkeypatch, capsys):
    from geo.bench import walk_tokens

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        walk_tokens.main([*WALKS, "--device", "cuda"])
    assert "--device is cuda, but torch sees no GPU" in capsys.readouterr().err


def test_walk_tokens_refuses_wrong_walks(monkeypatch):
    from geo.bench import walk_tokens

    threads = torch.get_num_threads()
    good = walk_tokens.random_walk
    monkeypatch.setattr(walk_tokens, "random_walk", lambda *args, **kwargs: good(*args, **{**kwargs, "seed": 1}))
    with pytest.raises(AssertionError, match="random_walk differs from its reference"):
        walk_tokens.main(WALKS)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("token_size", lambda t: t.add_(1), "the sizes of tokens"),
        ("token_esize", lambda t: t.add_(1), "the sizes of tokens"),
        ("token_node_id", lambda t: t[:2].fill_(3), "the members of tokens"),
        ("token_edge_id", lambda t: t[:2].fill_(3), "the edges of tokens"),
        ("token_sub_edge_index", lambda t: t.copy_(t.flip(0)), "edges of tokens join other members"),
    ],
)
def test_walk_tokens_refuses_wrong_tokens(name, change, message):
    from geo.bench import walk_tokens

    edge_index, rowptr, col = walk_tokens.random_graph(30, 5, "cpu")
    out = walk_tokens.AddWalkTokens(2, 3, 2)(Data(edge_index=edge_index, num_nodes=30))
    walk_tokens.check_tokens(out, rowptr, col, 2, 3, 2)
    change(out[name])
    with pytest.raises(AssertionError, match=message):
        walk_tokens.check_tokens(out, rowptr, col, 2, 3, 2)


def test_walk_tokens_peer_in_blocks(monkeypatch):
    from geo.bench import walk_tokens

    _, rowptr, col = walk_tokens.random_graph(30, 5, "cpu")
    walks = walk_tokens.torch_walk(rowptr, col, torch.arange(30), 3, 12)
    whole = walk_tokens.torch_tokens(rowptr, col, walks, 2, 2)
    monkeypatch.setitem(walk_tokens.BLOCK, "cpu", 1)
    parts = walk_tokens.torch_tokens(rowptr, col, walks, 2, 2)
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_graph_mamba_prints_what_fits(capsys):
    from geo.bench import graph_mamba

    settings = ["--nodes", "50", "100", "--hidden", "8", "--layers", "1", "--rounds", "1", "--threads", "1"]
    assert graph_mamba.main([*settings, "--memory", "1e-9"]) == 0
    printed = capsys.readouterr().out
    for name in ("Graph Mamba", "Graph Mamba, tokens", "GatedGCN", "GPSConv (attention)"):
        assert f"| 50    | {name} " in printed
        assert f"| 100   | {name} " in printed


def test_graph_mamba_judges_by_the_growth():
    from geo.bench.graph_mamba import _too_large

    assert _too_large(None, 1.0, 10**6, 1.0, 1.0) is None  # nothing known yet
    assert _too_large((1000, 1.0, 2.0**30), 1.0, 2000, 3.0, 3 * 2.0**30) is None
    assert _too_large((1000, 1.0, 2.0**30), 2.0, 2000, 3.0, 3 * 2.0**30) == "not run: about 4 s"
    assert _too_large((1000, 0.1, 2.0**30), 2.0, 2000, 3.0, 3 * 2.0**30) == "not run: about 4 GiB"
