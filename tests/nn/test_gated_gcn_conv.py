from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.nn import MessagePassing

from geo.nn import GatedGCNConv
from geo.ops import SegmentPlan
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)


def graph(num_nodes=9, num_edges=30, channels=4, edge_dim=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, num_nodes), (2, num_edges), generator=g)
    return Data(
        x=torch.randn(num_nodes, channels, generator=g, dtype=dtype),
        edge_index=edges,
        edge_attr=torch.randn(edges.size(1), edge_dim, generator=g, dtype=dtype),
        num_nodes=num_nodes,
    )


def run(conv, d):
    return conv(d.x, d.edge_index, d.edge_attr)


class Plain(MessagePassing):
    """The layer in PyG's own terms, with the weights of ours."""

    def __init__(self, conv):
        super().__init__(aggr="sum", node_dim=0)
        self.conv = conv

    def forward(self, x, edge_index, edge_attr):
        weight, bias = self.conv.lin_node.weight.chunk(4), self.conv.lin_node.bias.chunk(4)
        a, b, d, e = (x @ w.t() + v for w, v in zip(weight, bias, strict=True))
        hat = d[edge_index[1]] + e[edge_index[0]] + edge_attr @ self.conv.lin_edge.weight.t()
        gate = 1 / (1 + (-hat).exp())
        both = self.propagate(edge_index, size=(x.size(0), x.size(0)), sent=b, gate=gate)
        num, den = both.chunk(2, -1)
        h = self.conv.norm_node(a + num / (den + 1e-6)).clamp(min=0)
        return x + h, edge_attr + self.conv.norm_edge(hat).clamp(min=0)

    def message(self, sent_j, gate):
        return torch.cat((gate * sent_j, gate), -1)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", None])
def test_equals_the_layer_in_pyg(norm):
    conv, d = GatedGCNConv(4, norm=norm).double(), graph()
    d.x.requires_grad_()
    inputs = (d.x, d.edge_attr.requires_grad_(), *conv.parameters())
    expected = Plain(conv)(d.x, d.edge_index, d.edge_attr)
    actual = run(conv, d)
    assert_close(actual, expected)
    weights = [torch.randn_like(t) for t in expected]
    assert_close(torch.autograd.grad(actual, inputs, weights), torch.autograd.grad(expected, inputs, weights))


def test_a_hand_computed_case():
    conv = GatedGCNConv(1, norm=None, act="tanh", residual=False).double()
    with torch.no_grad():
        conv.lin_node.weight.copy_(torch.tensor([[0.5], [2.0], [0.0], [0.0]]))
        conv.lin_node.bias.zero_()
        conv.lin_edge.weight.fill_(1.0)
    x = torch.tensor([[1.0], [3.0], [4.0]], dtype=torch.float64)
    e = torch.tensor([[3.0], [1.0]], dtype=torch.float64).log()  # gates 3/4 and 1/2
    h, e_new = conv(x, torch.tensor([[0, 1], [2, 2]]), e)
    mean = (0.75 * 2 + 0.5 * 6) / (1.25 + 1e-6)
    assert_close(h, torch.tensor([[0.5], [1.5], [2 + mean]], dtype=torch.float64).tanh())
    assert_close(e_new, e + e.tanh())


def test_states_that_start_at_zero():
    conv, d = GatedGCNConv(4).double(), graph()
    zero = torch.zeros_like(d.edge_attr)
    assert_close(conv(d.x, d.edge_index), conv(d.x, d.edge_index, zero))
    first = GatedGCNConv(4, edge_dim=0).double()
    assert first.lin_edge is None
    first.load_state_dict({k: v for k, v in conv.state_dict().items() if "lin_edge" not in k})
    assert_close(first(d.x, d.edge_index), conv(d.x, d.edge_index))


def test_widths():
    d = graph(channels=3, edge_dim=2)
    x, e = GatedGCNConv(3, 5, 2).double()(d.x, d.edge_index, d.edge_attr)
    assert x.shape == (9, 5)
    assert e.shape == (30, 5)


def test_without_new_edge_states():
    conv, last, d = GatedGCNConv(4).double(), GatedGCNConv(4, update_edges=False).double(), graph()
    last.load_state_dict({k: v for k, v in conv.state_dict().items() if "norm_edge" not in k})
    x, e = run(last, d)
    assert e is d.edge_attr
    assert_close(x, run(conv, d)[0])


def test_dropout_is_on_the_updates_alone():
    conv, d = GatedGCNConv(4, dropout=1.0).double(), graph()
    x, e = run(conv, d)
    assert torch.equal(x, d.x)
    assert torch.equal(e, d.edge_attr)
    assert not torch.equal(run(conv.eval(), d)[0], d.x)


@pytest.mark.parametrize("level", ["node", "edge"])
def test_permutation(level):
    conv = GatedGCNConv(4).double()
    which = {"node": 0, "edge": 1}[level]
    assert_permutation_equivariant(lambda d: run(conv, d)[which], graph(), level)

    def broken(d):
        return run(conv, d)[which] * torch.arange(1, (d.num_nodes, d.num_edges)[which] + 1).unsqueeze(-1)

    with pytest.raises(AssertionError, match="permutation"):
        assert_permutation_equivariant(broken, graph(), level)


def graphs(sizes=((0, 0), (1, 0), (1, 3), (3, 6), (20, 50))):
    return [graph(n, e, seed=i) for i, (n, e) in enumerate(sizes)]


@pytest.mark.parametrize("level", ["node", "edge"])
def test_alone_equals_batched(level):
    conv = GatedGCNConv(4).double()
    which = {"node": 0, "edge": 1}[level]
    assert_alone_equals_batched(lambda d: run(conv, d)[which], graphs(), level)
    leaking = GatedGCNConv(4, norm="batch_norm").double()
    with pytest.raises(AssertionError, match="alone"):
        assert_alone_equals_batched(lambda d: run(leaking, d)[which], graphs(((5, 9), (3, 6))), level)


def test_isolated_nodes_and_no_edges():
    conv, d = GatedGCNConv(4).double(), graph(num_edges=0)
    x, e = run(conv, d)
    own = d.x @ conv.lin_node.weight[:4].t() + conv.lin_node.bias[:4]
    assert_close(x, d.x + conv.norm_node(own).relu())
    assert e.shape == (0, 4)
    out, e = run(conv, graph(0, 0))
    assert out.shape == e.shape == (0, 4)


def test_state_dict():
    d = graph(dtype=torch.float32)
    assert_state_dict_roundtrip(lambda: GatedGCNConv(4), lambda conv: run(conv, d))


def test_reset_parameters():
    conv, d = GatedGCNConv(4, norm="batch_norm"), graph(dtype=torch.float32)
    torch.manual_seed(5)
    conv.reset_parameters()
    first = run(conv, d)
    torch.manual_seed(5)
    conv.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(first, run(conv, d), strict=True))
    GatedGCNConv(4, edge_dim=0, norm=None, update_edges=False).reset_parameters()


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", None])
def test_derivatives(norm):
    conv, d = GatedGCNConv(3, norm=norm, act="tanh").double(), graph(4, 7, 3, 3)
    check_derivatives(lambda x, e: conv(x, d.edge_index, e), (d.x, d.edge_attr))


def test_bitwise_the_same_for_any_number_of_threads():
    conv, d = GatedGCNConv(16), graph(500, 6000, 16, 16, dtype=torch.float32)
    d.x.requires_grad_()

    def results():
        x, e = run(conv, d)
        return x, e, torch.autograd.grad((x.sum() + e.square().sum()), d.x)[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(one, results(), strict=True))
    finally:
        torch.set_num_threads(before)


def test_a_plan_to_share():
    conv, d = GatedGCNConv(4).double(), graph()
    plan = SegmentPlan.from_edge_index(d.edge_index, 9)
    assert_close(conv(d.x, d.edge_index, d.edge_attr, plan=plan), run(conv, d), factor=0)


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", None])
def test_autocast_and_half_precision(norm):
    conv, d = GatedGCNConv(16, norm=norm), graph(20, 60, 16, 16, dtype=torch.float32)
    exact = run(conv, d)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(conv, d)
    halves = run(conv.bfloat16(), d.clone().apply(lambda t: t.bfloat16() if t.is_floating_point() else t))
    for a, b, e in zip(outputs, halves, exact, strict=True):
        assert a.dtype == torch.float32
        assert b.dtype == torch.bfloat16
        assert (a - e).abs().max() < 5e-2 * e.abs().max()
        assert (b - e).abs().max() < 5e-2 * e.abs().max()


COMPILED = [
    {"backend": "aot_eager"},
    {"backend": "aot_eager", "dynamic": True},
    pytest.param({"backend": "inductor"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("how", COMPILED, ids=str)
def test_compile(how):
    conv, d = GatedGCNConv(4), graph(dtype=torch.float32)
    check_compile(lambda x, e: conv(x, d.edge_index, e), (d.x, d.edge_attr), **how)


def test_every_device(device):
    conv, d = GatedGCNConv(4), graph(dtype=torch.float32)
    expected = run(conv, d)
    assert_close([t.cpu() for t in run(conv.to(device), d.to(device))], expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "group"}, "norm is 'group', but must be 'layer_norm', 'batch_norm' or None"),
        ({"act": "elu"}, "act is 'elu', but must be one of"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"edge_dim": -1}, "edge_dim is -1"),
        ({"edge_dim": True}, "edge_dim is True"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        GatedGCNConv(4, **options)


def test_wrong_inputs():
    conv, d = GatedGCNConv(4).double(), graph()
    with pytest.raises(ValueError, match=r"x has shape \(9, 3\), but must be \(\|V\|, 4\)"):
        conv(d.x[:, 1:], d.edge_index)
    with pytest.raises(ValueError, match=r"edge_index is torch\.int32 \(2, 30\)"):
        conv(d.x, d.edge_index.int())
    with pytest.raises(ValueError, match=r"edge_attr has shape \(29, 4\), but must be \(30, 4\)"):
        conv(d.x, d.edge_index, d.edge_attr[1:])
    with pytest.raises(ValueError, match="edge_attr is given, but edge_dim is 0"):
        GatedGCNConv(4, edge_dim=0).double()(d.x, d.edge_index, d.edge_attr)
    with pytest.raises(ValueError, match="plan is of 10 nodes, but x has 9"):
        conv(d.x, d.edge_index, plan=SegmentPlan.from_edge_index(d.edge_index, 10))
    with pytest.raises(ValueError, match="must be that of the 30 edges, with their senders"):
        conv(d.x, d.edge_index, plan=SegmentPlan(d.edge_index[1], 9))
    for row in (0, 1):
        edge_index = d.edge_index.clone()
        edge_index[row, 1] = 9
        with pytest.raises(IndexError, match="9 is out of range"):
            conv(d.x, edge_index)


def test_repr():
    text = "GatedGCNConv(4, 5, edge_dim=2, norm='layer_norm', act='relu', dropout=0.0)"
    assert repr(GatedGCNConv(4, 5, 2)) == text
