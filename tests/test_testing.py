"""Each law holds on a layer that obeys it and fails on one that breaks it."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import MLP, GINConv

from geo import testing as law


@pytest.fixture
def pos():
    return torch.randn(6, 3, dtype=torch.float64)


def graph(num_nodes: int, seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(num_nodes, 1), (2, 3 * num_nodes), generator=generator)
    x = torch.randn(num_nodes, 4, generator=generator, dtype=torch.float64)
    return Data(
        x=x, edge_index=edges, edge_attr=torch.randn(edges.size(1), 2, generator=generator), num_nodes=num_nodes
    )


def test_close():
    law.assert_close((torch.ones(2), torch.ones(1, dtype=torch.float64)), (torch.ones(2).double(), torch.ones(1)))
    with pytest.raises(AssertionError, match=r"here \[output 0\]"):
        law.assert_close(torch.ones(2), torch.ones(2) + 1e-3, msg="here")
    with pytest.raises(AssertionError, match="2 tensors"):
        law.assert_close((torch.ones(2), torch.ones(2)), torch.ones(2))
    with pytest.raises(AssertionError):
        law.assert_close(torch.tensor([float("nan")]), torch.ones(1))


@pytest.mark.parametrize("dim", [2, 3])
def test_random_rotations(dim):
    for reflect, det in ((False, 1.0), (True, -1.0)):
        r = law.random_rotations(50, dim, reflect)
        law.assert_close(r @ r.mT, torch.eye(dim, dtype=torch.float64).expand_as(r))
        law.assert_close(torch.linalg.det(r), torch.full((50,), det, dtype=torch.float64))
        assert r.mean(0).abs().max() < 0.5


def test_equivariant(pos):
    def moments(pos):
        c = pos - pos.mean(0)
        return c.square().sum(-1), c, torch.linalg.det(c[:3])

    law.assert_equivariant(moments, {"pos": pos}, {"pos": "point"}, ["scalar", "vector", "pseudoscalar"], group="O3")
    for broken, out in (
        (lambda pos: pos[:, 0], "scalar"),
        (lambda pos: pos * torch.tensor([1.0, 1.0, 1.01]), "vector"),
        (lambda pos: pos.square().sum(-1), "scalar"),  # not invariant to translation
        (lambda pos: torch.linalg.det((pos - pos.mean(0))[:3]), "scalar"),  # changes sign under reflection
    ):
        with pytest.raises(AssertionError, match="equivariance"):
            law.assert_equivariant(broken, {"pos": pos}, {"pos": "point"}, [out], group="O3")
    with pytest.raises(ValueError, match="group='SO4'"):
        law.assert_equivariant(moments, {"pos": pos}, {"pos": "point"}, ["scalar"] * 3, group="SO4")


def test_finite_group():
    quarter = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])
    square = torch.randn(4, 2)
    law.assert_equivariant(lambda p: p.pow(4).sum(-1), {"p": square}, {"p": "vector"}, ["scalar"], group=quarter)
    with pytest.raises(AssertionError):
        law.assert_equivariant(lambda p: p.pow(4).sum(-1), {"p": square}, {"p": "vector"}, ["scalar"], group="SO2")


def test_permutation():
    conv = GINConv(MLP([4, 5], act=None)).double()
    data = graph(7)
    law.assert_permutation_equivariant(lambda d: conv(d.x, d.edge_index), data)
    law.assert_permutation_equivariant(lambda d: d.edge_attr * 2, data, level="edge")
    law.assert_permutation_equivariant(lambda d: d.x.sum(0, keepdim=True), data, level="graph")
    for broken, level in (
        (lambda d: conv(d.x, d.edge_index).cumsum(0), "node"),
        (lambda d: d.edge_attr.cumsum(0), "edge"),
        (lambda d: d.x[:1], "graph"),
    ):
        with pytest.raises(AssertionError, match="permutation"):
            law.assert_permutation_equivariant(broken, data, level=level)


def test_alone_equals_batched():
    conv = GINConv(MLP([4, 5], act=None)).double()
    graphs = [graph(n, seed=n) for n in (3, 0, 1, 5)]
    law.assert_alone_equals_batched(lambda b: conv(b.x, b.edge_index), graphs)
    with pytest.raises(AssertionError, match="alone = in a batch"):
        law.assert_alone_equals_batched(lambda b: b.x - b.x.mean(0), graphs)


def test_state_dict_roundtrip():
    x = torch.randn(3, 4)
    law.assert_state_dict_roundtrip(lambda: torch.nn.Linear(4, 2), lambda m: m(x))

    class Forgetful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.grid = torch.randn(4)

        def forward(self, x):
            return x @ self.grid

    with pytest.raises(AssertionError, match="state_dict round trip"):
        law.assert_state_dict_roundtrip(Forgetful, lambda m: m(x))


def test_ops_checks():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]

    x = torch.randn(5)
    law.check_op(torch.sin, torch.sin, [x])
    law.check_derivatives(torch.sin, [x])
    law.check_compile(torch.sin, [x])
    with pytest.raises(AssertionError, match="gradient of argument 0"):
        law.check_op(WrongGradient.apply, torch.square, [x])
    with pytest.raises(AssertionError, match="forward"):
        law.check_op(torch.cos, torch.sin, [x])
    with pytest.raises(Exception, match="Jacobian mismatch"):
        law.check_derivatives(WrongGradient.apply, [x])
