from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GATConv, GINConv, GPSConv
from torch_geometric.utils import to_dense_batch

from geo.nn import GatedGCNConv, GPSGlobalConv
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)

C = 8


def graph(num_nodes=9, num_edges=30, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, num_nodes), (2, num_edges), generator=g)
    return Data(
        x=torch.randn(num_nodes, C, generator=g, dtype=dtype),
        edge_index=edges,
        edge_attr=torch.randn(num_edges, C, generator=g, dtype=dtype),
        num_nodes=num_nodes,
    )


def graphs(sizes=((0, 0), (1, 0), (1, 3), (3, 6), (20, 50))):
    return [graph(n, e, seed=i) for i, (n, e) in enumerate(sizes)]


class Attention(nn.Module):
    """GPSConv's global module, behind our call."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def reset_parameters(self):
        self.attn._reset_parameters()

    def forward(self, x, edge_index, batch):
        h, mask = to_dense_batch(x, batch)
        h, _ = self.attn(h, h, h, key_padding_mask=~mask, need_weights=False)
        return h[mask]


class GraphMean(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(C, C)

    def forward(self, x, edge_index, batch):
        batch = x.new_zeros(x.size(0), dtype=torch.int64) if batch is None else batch
        one_hot = torch.nn.functional.one_hot(batch, 8).to(x)
        mean = (one_hot.t() @ x) / one_hot.sum(0).clamp(min=1).unsqueeze(-1)
        return one_hot @ self.lin(mean)


def gin():
    return GINConv(nn.Sequential(nn.Linear(C, C), nn.Tanh()))


def layer(conv="gated", **options):
    options = {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}, **options}
    convs = {"gated": lambda: GatedGCNConv(C, residual=False), "gin": gin, None: lambda: None}
    return GPSGlobalConv(C, convs[conv](), GraphMean(), **options)


def run(gps, d, which=0):
    kwargs = {"edge_attr": d.edge_attr} if isinstance(gps.conv, GatedGCNConv) else {}
    out = gps(d.x, d.edge_index, d.batch, **kwargs)
    return out[which] if isinstance(out, tuple) else out


ORACLE = [
    {},
    {"norm": None},
    {"norm": "layer_norm"},
    {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}, "act": "leaky_relu", "act_kwargs": {"negative_slope": 0.3}},
    {"norm": "graph_norm", "act": "gelu"},
]


@pytest.mark.parametrize("options", ORACLE, ids=str)
@pytest.mark.parametrize("conv", [gin, lambda: GATConv(C, C), lambda: None])
@pytest.mark.parametrize("training", [True, False])
def test_equals_gps_conv(conv, options, training):
    theirs = GPSConv(C, conv(), heads=2, **options).double()
    ours = GPSGlobalConv(C, conv(), Attention(nn.MultiheadAttention(C, 2, batch_first=True)), **options).double()
    state = {k.replace("attn.", "global_module.attn.", 1): v for k, v in theirs.state_dict().items()}
    if ours.conv is None:  # GPSConv has a norm for it all the same
        state = {k: v for k, v in state.items() if not k.startswith("norm1.")}
    ours.load_state_dict(state)
    d = Batch.from_data_list(graphs(((5, 9), (1, 0), (12, 40))))
    ours.train(training)
    theirs.train(training)
    x = d.x.requires_grad_()
    actual, expected = (gps(x, d.edge_index, d.batch) for gps in (ours, theirs))
    assert_close(actual, expected)
    weight = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad(out, x, weight) for out in (actual, expected)))
    statistics = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        assert_close(buffer, statistics[name])


def test_dropout_equals_that_of_gps_conv():
    theirs = GPSConv(C, gin(), dropout=0.4).double()
    ours = GPSGlobalConv(C, gin(), Attention(theirs.attn), dropout=0.4).double()
    state = {k.replace("attn.", "global_module.attn.", 1): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    d = graph()
    outputs = []
    for gps in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(gps(d.x, d.edge_index))
    assert_close(*outputs)
    assert (outputs[0] - ours.eval()(d.x, d.edge_index)).abs().max() > 0.1


def test_one_of_the_two_alone():
    d = graph()
    gps = GPSGlobalConv(C, gin(), None, norm=None).double()
    h = gps.conv(d.x, d.edge_index) + d.x
    assert_close(gps(d.x, d.edge_index), h + gps.mlp(h))
    gps = GPSGlobalConv(C, None, lambda x, edge_index, batch: 2 * x, norm=None).double()
    assert_close(gps(d.x, d.edge_index), 3 * d.x + gps.mlp(3 * d.x))


def test_edge_states_come_back():
    gps, d = layer().double(), graph()
    x, e = gps(d.x, d.edge_index, edge_attr=d.edge_attr)
    assert_close(e, gps.conv(d.x, d.edge_index, d.edge_attr)[1])
    assert x.shape == (9, C)


def test_what_the_global_module_gets():
    seen = []

    def spy(*args):
        seen.append(args)
        return args[0]

    d = Batch.from_data_list(graphs())
    gps = GPSGlobalConv(C, None, spy).double()
    gps(d.x, d.edge_index, d.batch)
    gps(d.x, d.edge_index)
    assert all(a is b for a, b in zip(seen[0], (d.x, d.edge_index, d.batch), strict=True))
    assert seen[1][2] is None


def test_permutation():
    for conv in ("gated", "gin", None):
        gps = layer(conv).double()
        assert_permutation_equivariant(lambda d, gps=gps: run(gps, d), graph())
    gps = layer().double()
    assert_permutation_equivariant(lambda d: run(gps, d, 1), graph(), "edge")
    gps = GPSGlobalConv(C, None, lambda x, edge_index, batch: x.cumsum(0)).double()
    with pytest.raises(AssertionError, match="permutation"):
        assert_permutation_equivariant(lambda d: run(gps, d), graph())


def test_alone_equals_batched():
    for conv in ("gated", "gin", None):
        gps = layer(conv).double()
        assert_alone_equals_batched(lambda d, gps=gps: run(gps, d), graphs())
    gps = layer().double()
    assert_alone_equals_batched(lambda d: run(gps, d, 1), graphs(), "edge")
    leaking = layer(norm="batch_norm", norm_kwargs=None).double()
    some = graphs(((5, 9), (3, 6)))
    with pytest.raises(AssertionError, match="alone"):
        assert_alone_equals_batched(lambda d: run(leaking, d), some)
    assert_alone_equals_batched(lambda d: run(leaking.eval(), d), some)


def test_state_dict():
    d = graph(dtype=torch.float32)
    assert_state_dict_roundtrip(layer, lambda gps: run(gps, d))


def test_reset_parameters():
    gps, d = layer(norm="batch_norm", norm_kwargs=None), graph(dtype=torch.float32)
    first = {k: v.clone() for k, v in gps.state_dict().items() if v.dim() == 2}
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        gps.reset_parameters()
        outputs.append(run(gps, d))
    assert torch.equal(*outputs)
    assert len(first) == 5
    assert not any(torch.equal(gps.state_dict()[k], v) for k, v in first.items())
    GPSGlobalConv(C, gin(), lambda x, *_: x, norm=None).reset_parameters()


def test_derivatives():
    gps, d = layer(act="tanh").double(), graph(4, 7)
    gps.conv._act = torch.tanh
    check_derivatives(lambda x, e: gps(x, d.edge_index, edge_attr=e), (d.x, d.edge_attr))


def test_autocast():
    gps, d = layer(), graph(20, 60, dtype=torch.float32)
    exact = run(gps, d)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(gps, d)
    assert (out - exact).abs().max() < 5e-2 * exact.abs().max()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic):
    gps, d = layer(), graph(dtype=torch.float32)
    check_compile(lambda x, e: gps(x, d.edge_index, edge_attr=e), (d.x, d.edge_attr), dynamic=dynamic)


def test_every_device(device):
    gps, d = layer(), graph(dtype=torch.float32)
    expected = run(gps, d)
    assert_close(run(gps.to(device), d.to(device)).cpu(), expected)


def test_refusals():
    with pytest.raises(ValueError, match="conv and global_module are None"):
        GPSGlobalConv(C, None, None)
    with pytest.raises(ValueError, match="channels is 0"):
        GPSGlobalConv(0, gin(), None)
    with pytest.raises(ValueError, match=r"dropout is -0\.1"):
        GPSGlobalConv(C, gin(), None, dropout=-0.1)
    with pytest.raises(ValueError, match=r"norm is LayerNorm.*, but must be a name of PyG's or None"):
        GPSGlobalConv(C, gin(), None, norm=nn.LayerNorm(C))
    with pytest.raises(ValueError, match="Could not resolve 'no_norm'"):
        GPSGlobalConv(C, gin(), None, norm="no_norm")
    gps, d = layer().double(), graph()
    with pytest.raises(ValueError, match=r"x has shape \(9, 7\), but must be \(\|V\|, 8\)"):
        gps(d.x[:, 1:], d.edge_index)
    with pytest.raises(ValueError, match=r"batch has shape \(3,\), but must be \(9,\)"):
        gps(d.x, d.edge_index, torch.zeros(3, dtype=torch.int64))


def test_repr():
    text = repr(layer())
    assert text.startswith("GPSGlobalConv(\n  8, dropout=0.0\n")
    assert "(conv): GatedGCNConv(8, 8, edge_dim=8" in text
