"""The example of graph kernels: its exact kernels, its estimates, what it reads and what it refuses."""

from __future__ import annotations

import argparse
import math
from importlib import import_module

import numpy as np
import pytest
import torch

for package in ("lightning", "matplotlib"):
    pytest.importorskip(package, reason=f"the examples need {package}")


@pytest.fixture(scope="module")
def script():
    return import_module("graph_kernels")


def settings(script, **given):
    values = {"walks": [8], "kernels": list(script.KERNELS), "c": 0.25, "p_halt": 0.5, "trials": 20, "seed": 0, "at": 8}
    return argparse.Namespace(**(values | given))


def test_graphs_are_those_of_the_published_experiments(script):
    sizes = {name: (n, edge_index.size(1) // 2) for name, (edge_index, _, n) in script.graphs().items()}
    assert sizes["karate"] == (34, 78)
    assert sizes["binary tree"] == (127, 126)
    assert sizes["10-regular"] == (100, 500)
    assert 90 <= sizes["Erdos-Renyi"][0] <= 100
    for edge_index, _, n in script.graphs().values():
        assert torch.equal(edge_index.unique(), torch.arange(n)), "no node without a neighbour"
        assert edge_index.unique(dim=1).size(1) == edge_index.size(1)


def test_series_and_exact_kernels_are_the_same_kernels(script):
    """Two computations: power series through eigenvalues, and SciPy's functions of the matrix."""
    graph = script.graphs()["karate"]
    one = torch.from_numpy(script.exact_kernels(graph, 0.25)["2-step"])
    w = 4 * (torch.linalg.eigh(one)[0].clamp(min=0).sqrt() - 1)  # the kernel is (I + W / 4)^2
    for name, series in script.series_of(0.25).items():
        exact = torch.from_numpy(script.exact_kernels(graph, 0.25)[name])
        found = (series.alpha(64) * w.unsqueeze(1).pow(torch.arange(64))).sum(1)
        assert torch.allclose(found.sort().values, torch.linalg.eigvalsh(exact), atol=1e-12), name


def test_couplings_and_walks_lower_the_error_as_they_should(script):
    errors = script.measure("binary tree", script.graphs()["binary tree"], settings(script, walks=[2, 8]))
    for kernel in script.KERNELS:
        assert script.gain(errors, "binary tree", kernel, 8) > 2
        assert script.slope(errors, "binary tree", kernel, "iid", [2, 8]) == pytest.approx(-0.5, abs=0.05)
    theirs = script.PROTOTYPE_SQUARED["binary tree", "heat"]
    for coupling, expected in zip(script.COUPLINGS, theirs, strict=True):
        ours = errors["binary tree", "heat", coupling, 8] ** 2
        assert abs(script.deviation(ours, expected, 300, 1e-5)) < 4, coupling


def test_trials_are_independent(script):
    """Copies of the graph side by side have walks of their own, and so has every block of copies."""
    graph = script.graphs()["karate"]
    block = script.BLOCK
    script.BLOCK = 3 * 34**2
    try:
        maps = list(script.estimates(graph, settings(script), "iid", 4, 0))
    finally:
        script.BLOCK = block
    assert len(maps) == 7
    first, all_lengths = torch.eye(script.TERMS)[0], torch.ones(script.TERMS)
    starts, features = (torch.cat([m(f).to_dense() for m in maps]).view(20, 34, 34) for f in (first, all_lengths))
    assert torch.equal(starts, torch.eye(34).expand(20, -1, -1))
    assert len({tuple(f.flatten().tolist()) for f in features}) == 20


def test_deviation_of_equal_and_of_other_means(script):
    ours = np.random.default_rng(0).normal(1.0, 0.1, 400)
    assert abs(script.deviation(ours, 1.0, 400, 1e-3)) < 3
    assert script.deviation(ours, 0.9, 400, 1e-3) == pytest.approx(0.1 / (0.1 * math.sqrt(2 / 400)), rel=0.2)


def test_reads_a_list_of_edges(script, tmp_path, capsys):
    file = tmp_path / "ring.txt"
    file.write_text("# a ring\n" + "".join(f"n{i} n{(i + 1) % 12} 2.0\n" for i in range(12)) + "\nn1,n0,2.0  # again\n")
    edge_index, weight, num_nodes = script.read_graph(file)
    assert num_nodes == 12
    assert edge_index.size(1) == 24
    assert weight.unique().tolist() == [2.0]
    flags = ["--trials", "3", "--walks", "2,4", "--kernels", "heat", "--threads", "1", "--out", str(tmp_path)]
    rows = script.main(["--graph", str(file), *flags])
    assert rows[0][0] == "ring, heat: squared error"
    assert all(row[2] == "" for row in rows), "the prototype knows other graphs"
    assert "ring: 12 nodes, 12 edges" in capsys.readouterr().out
    assert (tmp_path / "errors.png").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [("a b\nc\n", "line 2: expected 'u v'"), ("a b heavy\n", "line 1: expected"), ("# none\n", "holds no edge")],
)
def test_files_that_are_no_lists_of_edges(script, tmp_path, text, message):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(SystemExit, match=message):
        script.read_graph(tmp_path / "bad.txt")


def test_too_large_a_graph_is_refused(script, tmp_path):
    (tmp_path / "long.txt").write_text("".join(f"{i} {i + 1}\n" for i in range(2100)))
    with pytest.raises(SystemExit, match="2101 nodes, but exact kernels are computed up to 2000"):
        script.read_graph(tmp_path / "long.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--walks", "2,3"], "expected even numbers"),
        (["--kernels", "rbf"], "expected names of 1-reg"),
        (["--c", "0.6"], "the variance of cos is infinite"),
        (["--c", "0.8", "--kernels", "2-reg"], "the variance of 2-reg is infinite"),
        (["--c", "1", "--kernels", "heat"], "--c must be between 0 and 1"),
        (["--p-halt", "1"], "--p-halt must be between 0 and 1"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--graph", "nowhere.txt"], "there is no file nowhere.txt"),
    ],
)
def test_wrong_flags_are_refused_in_one_sentence(script, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        script.main([*flags, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
