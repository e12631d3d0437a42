from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch

from geo.datasets import Minesweeper


def _violations(x: torch.Tensor, y: torch.Tensor, edge_index: torch.Tensor) -> int:
    """How many nodes break the rule: one-hot features that say 'unknown' or the number of mines around, 5 for more."""
    around = torch.zeros(len(y), dtype=torch.long)
    for source, target in edge_index.t().tolist():
        around[target] += y[source]
    known = x[:, 0] == 0
    wrong = known & (x[:, 1:].argmax(dim=1) != around.clamp(max=5))
    return int(wrong.sum()) + int((x.sum(dim=1) != 1).sum())


def test_rule_and_grid():
    size = 12
    data = Minesweeper(size=size, seed=3)[0]
    assert _violations(data.x, data.y, data.edge_index) == 0
    assert (int(data.y.sum()), int(data.x[:, 0].sum())) == (round(0.2 * size**2), round(0.5 * size**2))
    oracle = networkx.strong_product(networkx.path_graph(size), networkx.path_graph(size))  # king's moves
    pairs = {(a * size + b, c * size + d) for (a, b), (c, d) in oracle.edges}
    expected = sorted(pairs | {(j, i) for i, j in pairs})
    assert sorted(map(tuple, data.edge_index.t().tolist())) == expected
    assert data.edge_index.t().tolist() == [list(pair) for pair in expected]  # and in this order

    broken = data.x.clone()
    broken[(data.x[:, 0] == 0).nonzero()[0]] = torch.eye(7)[6]
    assert _violations(broken, data.y, data.edge_index) == 1


def test_splits_are_stratified_partitions():
    data = Minesweeper(size=20, num_splits=4)[0]
    masks = torch.stack([data.train_mask, data.val_mask, data.test_mask]).long()
    assert masks.sum(dim=0).eq(1).all()
    assert masks.sum(dim=1).tolist() == [[200] * 4, [100] * 4, [100] * 4]
    assert (masks * data.y.view(1, -1, 1)).sum(dim=1).tolist() == [[40] * 4, [20] * 4, [20] * 4]
    assert not torch.equal(data.train_mask[:, 0], data.train_mask[:, 1])


def test_seed():
    first, again, other = (Minesweeper(size=10, seed=seed)[0] for seed in (0, 0, 1))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in first.to_dict().items())
    assert not torch.equal(first.y, other.y)


def test_one_cell():
    data = Minesweeper(size=1, num_splits=1)[0]
    assert data.edge_index.shape == (2, 0)
    assert data.x.shape == (1, 7)


def test_published_file_follows_the_same_rule(geo_data):
    path = geo_data / "heterophilous" / "minesweeper" / "raw" / "minesweeper.npz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with np.load(path, allow_pickle=False) as file:
        x, y, edges = (torch.as_tensor(file[key]) for key in ("node_features", "node_labels", "edges"))
        masks = [file[f"{name}_masks"] for name in ("train", "val", "test")]
    ours = Minesweeper()[0]
    both = torch.cat([edges.t(), edges.t().flip(0)], dim=1)
    assert _violations(x, y, both) == 0
    assert sorted(map(tuple, both.t().tolist())) == list(map(tuple, ours.edge_index.t().tolist()))
    assert (x.shape, int(y.sum()), int(x[:, 0].sum())) == (ours.x.shape, int(ours.y.sum()), int(ours.x[:, 0].sum()))
    for mask, name in zip(masks, ("train", "val", "test"), strict=True):
        assert mask.sum(axis=1).tolist() == ours[f"{name}_mask"].sum(dim=0).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"size": 0}, "size is 0"), ({"num_splits": 0}, "num_splits is 0"), ({"mine_ratio": 1.5}, "mine_ratio is 1.5")],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Minesweeper(**settings)
