from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data

from geo.nn import SE2Conv, SE3Conv
from geo.nn.se_conv import complete_edges
from geo.o3 import pair_invariants, rotation_frames
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_derivatives,
    random_rotations,
)

F64 = torch.float64
CONVS = {2: SE2Conv, 3: SE3Conv}


def sample(dim: int, layout: str, num: int = 4, seed: int = 0, num_ori: int | None = None) -> Data:
    torch.manual_seed(seed)
    num_ori = num_ori or (5 if dim == 2 else 12)
    edges = complete_edges(1, num)
    data = Data(pos=torch.randn(num, dim, dtype=F64), edge_index=edges[:, torch.rand(edges.size(1)) < 0.7])
    if layout == "one":
        data.x, data.frame = torch.randn(num, 3, dtype=F64), random_rotations(num, dim, seed=seed)
    else:
        data.x = torch.randn(num, num_ori, 3, dtype=F64)
        if layout == "many":
            frame = random_rotations(max(num * num_ori, 1), dim, seed=seed)[: num * num_ori]
            data.frame = frame.view(num, num_ori, dim, dim)
        else:
            data.grid = rotation_frames(dim, num_ori)
    return data


def frames(data: Data) -> torch.Tensor:
    return data.frame if "frame" in data else data.grid


def build(dim: int, layout: str, **changes):
    torch.manual_seed(0)
    return CONVS[dim](3, 3, 4, separable=layout == "separable", radius=2.5, degree=1, **changes).double()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("layout", ["one", "many", "shared"])
@pytest.mark.parametrize("groups", ["depthwise", 1])
def test_equals_double_loop(dim, layout, groups):
    num_ori = 1 if layout == "one" else 3
    if layout == "shared" and dim == 3:
        num_ori = 12
    data = sample(dim, layout, num_ori=num_ori)
    conv = build(dim, layout, groups=groups)
    x = data.x if data.x.dim() == 3 else data.x.unsqueeze(1)
    ori = frames(data)
    ori = ori.unsqueeze(1) if layout == "one" else ori.expand(4, *ori.shape[-3:])
    pairs = {(j, i) for j, i in data.edge_index.t().tolist() if i != j} | {(i, i) for i in range(4)}
    expected = torch.zeros_like(x)
    for j, i in pairs:
        for p in range(num_ori):
            for o in range(num_ori):
                two = torch.stack((data.pos[i], data.pos[j]))
                attr = pair_invariants(f"SE{dim}", two, torch.tensor([[1], [0]]), torch.stack((ori[i, p], ori[j, o])))
                basis = conv.kernel_basis(attr, (two[1] - two[0]).norm()[None])[0]
                k = conv.conv.weight @ basis
                expected[i, p] += (k * x[j, o] if groups == "depthwise" else k @ x[j, o]) / num_ori
    out = conv(data.x, data.pos, data.edge_index, frames(data))
    torch.testing.assert_close(out, expected.view_as(data.x), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("layout", ["one", "many", "shared", "separable"])
def test_laws(dim, layout):
    conv = build(dim, layout)
    shared = rotation_frames(dim, 5 if dim == 2 else 12)

    def run(d):
        return conv(d.x, d.pos, d.edge_index, d.frame if "frame" in d else shared)

    data = sample(dim, layout)
    data.pop("grid", None)
    assert_permutation_equivariant(run, data)
    graphs = [sample(dim, layout, n, n) for n in (0, 3, 1, 0)]
    for g in graphs:
        g.pop("grid", None)
    assert_alone_equals_batched(run, graphs)
    assert_state_dict_roundtrip(
        lambda: CONVS[dim](3, 3, 4, separable=layout == "separable").double(),
        lambda m: m(data.x, data.pos, data.edge_index, data.frame if "frame" in data else shared),
    )


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("layout", ["one", "many"])
def test_exactly_equivariant_and_chiral(dim, layout):
    conv, data = build(dim, layout), sample(dim, layout)
    expected = conv(data.x, data.pos, data.edge_index, data.frame)
    shift = torch.arange(dim, dtype=F64)
    for g in random_rotations(5, dim, seed=4):
        assert_close(conv(data.x, data.pos @ g.t() + shift, data.edge_index, g @ data.frame), expected)
    s = random_rotations(1, dim, reflect=True)[0]
    flip = torch.eye(dim, dtype=F64)
    flip[-1, -1] = -1
    mirrored = conv(data.x, data.pos @ s.t(), data.edge_index, s @ data.frame @ flip)
    assert (mirrored - expected).abs().max() > 1e-4


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("layout", ["shared", "separable"])
def test_the_group_of_the_grid_permutes_orientations(dim, layout):
    conv, data = build(dim, layout), sample(dim, layout)
    grid = data.grid
    expected = conv(data.x, data.pos, data.edge_index, grid)
    for g in grid:
        moved = g @ grid  # frame o of the data is frame where[o] of the grid after the turn
        where = (moved[:, None] - grid[None]).abs().amax((-1, -2)).argmin(1)
        x = torch.empty_like(data.x)
        x[:, where] = data.x
        actual = conv(x, data.pos @ g.t(), data.edge_index, grid)
        assert_close(actual[:, where], expected)


@pytest.mark.parametrize("layout", ["one", "many", "separable"])
def test_derivatives_with_loops_and_shifts(layout):
    conv, data = build(2, layout), sample(2, layout, num=3)
    edge_index = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]])
    shift = torch.tensor([[0.0, 0], [0, 0], [0, 0], [1.1, 0]], dtype=F64)  # a loop, and an image of node 0
    check_derivatives(lambda p: conv(data.x, p, edge_index, frames(data), shift)[:2], [data.pos])
    moved = conv(data.x, data.pos, edge_index, frames(data), shift)
    assert not torch.allclose(moved, conv(data.x, data.pos, edge_index, frames(data)))


def test_refusals():
    data = sample(3, "one")
    conv = build(3, "one")
    for changes, words in [
        ({"pos": data.pos[:, :2]}, "pos has shape"),
        ({"x": data.x[:, :2]}, "x has shape"),
        ({"ori": data.frame[:2]}, "ori has shape"),
        ({"edge_index": data.edge_index.float()}, "edge_index is torch.float32"),
    ]:
        arguments = {"x": data.x, "pos": data.pos, "edge_index": data.edge_index, "ori": data.frame} | changes
        with pytest.raises(ValueError, match=words):
            conv(**arguments)
    with pytest.raises(ValueError, match="needs a shared grid"):
        build(3, "separable")(data.x, data.pos, data.edge_index, data.frame)
    with pytest.raises(ValueError, match="out_channels is 5"):
        SE3Conv(3, 5)
    assert "SE3Conv(" in repr(conv)
    conv.reset_parameters()
