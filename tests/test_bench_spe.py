from __future__ import annotations

import pytest
import torch

from geo.bench import spe
from geo.bench.spe import check, large, loop, main, make, molecule_sizes, molecules


def test_prints_a_page_of_ratios(capsys):
    threads = torch.get_num_threads()
    assert main(["--graphs", "4", "--nodes", "40", "--rounds", "1"]) == 0
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| mlp") for line in lines) == 6
    assert sum(line.startswith("| gin") for line in lines) == 2


def test_refuses_a_wrong_result(monkeypatch):
    monkeypatch.setattr(spe, "loop", lambda *args: loop(*args) * 1.001)
    with pytest.raises(AssertionError, match="rho='mlp'"):
        check(molecules(molecule_sizes(3), 37, 16), "mlp", 8, 3, None)


def test_problems():
    sizes = molecule_sizes(128)
    assert 22 < sum(sizes) / len(sizes) < 24.5
    for eigvecs, filters, ptr, edge_index in (molecules(sizes, 37, 16), large(60, 32, 16)):
        assert filters.shape == (len(ptr) - 1, eigvecs.size(1), 16)
        graph = torch.searchsorted(ptr, edge_index, right=True)
        assert torch.equal(graph[0], graph[1])
        first = eigvecs[: int(ptr[1])]
        kept = min(first.shape)
        torch.testing.assert_close((first.T @ first)[:kept, :kept], torch.eye(kept), atol=1e-5, rtol=0)
    assert sum(p.numel() for p in make("mlp", 8, 2, None).parameters()) == 16 * 8 + 8 + 8 * 8 + 8
