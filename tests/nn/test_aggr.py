from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torch_geometric.nn as pyg
from torch_geometric.data import Data
from torch_geometric.nn import aggr as theirs

import geo.nn
from geo.nn import aggr as ours
from geo.ops import SegmentPlan
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)

F64 = torch.float64
CASES = {
    "sum": ("SumAggregation", {}),
    "mean": ("MeanAggregation", {}),
    "max": ("MaxAggregation", {}),
    "min": ("MinAggregation", {}),
    "mul": ("MulAggregation", {}),
    "var": ("VarAggregation", {}),
    "var, semi-gradient": ("VarAggregation", {"semi_grad": True}),
    "std": ("StdAggregation", {}),
    "std, semi-gradient": ("StdAggregation", {"semi_grad": True}),
    "softmax": ("SoftmaxAggregation", {}),
    "softmax, t": ("SoftmaxAggregation", {"t": 0.3}),
    "softmax, semi-gradient": ("SoftmaxAggregation", {"semi_grad": True, "t": 2.0}),
    "softmax, learnt": ("SoftmaxAggregation", {"learn": True, "t": 0.5}),
    "softmax, learnt per channel": ("SoftmaxAggregation", {"learn": True, "channels": 4}),
    "multi": ("MultiAggregation", {"aggrs": ["sum", "mean", "max", "std", "softmax"]}),
    "multi, mean": ("MultiAggregation", {"aggrs": ["mean", "var"], "mode": "mean"}),
    "multi, PyG's among them": ("MultiAggregation", {"aggrs": ["min", "powermean", "add"]}),
}
SIMPLE = [name for name, (_, options) in CASES.items() if "semi_grad" not in options]


def build(module, name: str):
    kind, options = CASES[name]
    aggregation = getattr(module, kind)(**options).double()
    for parameter in aggregation.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return aggregation


def pair(name: str):
    """Ours, and PyG's with the same parameters."""
    mine, other = build(ours, name), build(theirs, name)
    other.load_state_dict(mine.state_dict())
    return mine, other


def sample(num: int = 7, num_edges: int = 30, seed: int = 0) -> Data:
    """A random graph whose last node has no edges."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(max(num - 1, 1), (2, num_edges if num > 1 else 0), generator=generator)
    x = torch.randn(num, 4, dtype=F64, generator=generator)
    return Data(x=x, edge_index=edge_index, num_nodes=num)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["index", "sorted", "ptr"])
def test_equals_pyg(name, order):
    index = torch.tensor([3, 0, 3, 1, 0, 3, 5, 1, 3, 3])  # 2, 4 and 6 are empty, 5 holds one row
    x = torch.randn(10, 4, dtype=F64)
    if order != "index":
        index = index.sort().values
    mine, other = pair(name)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    given = {"ptr": SegmentPlan(index, 7).ptr} if order == "ptr" else {}
    out = mine(leaves[0], None if order == "ptr" else index, dim_size=7, **given)
    expected = other(leaves[1], index, dim_size=7)
    assert_close(out, expected)
    weight = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((o * weight).sum(), [leaf, *m.parameters()])
        for o, leaf, m in ((out, leaves[0], mine), (expected, leaves[1], other))
    ]
    assert_close(*gradients)


@pytest.mark.parametrize("name", [n for n in CASES if n != "softmax, learnt per channel"])
@pytest.mark.parametrize("dim", [0, 1, -2, -1])
def test_any_dimension(name, dim):
    mine, other = pair(name)
    x, index = torch.rand(6, 6, 6, dtype=F64), torch.tensor([0, 2, 2, 0, 3, 2])
    assert_close(mine(x, index, dim=dim, dim_size=5), other(x, index, dim=dim, dim_size=5))


def test_a_temperature_per_channel_in_three_dimensions():
    mine = build(ours, "softmax, learnt per channel")
    x, index = torch.randn(2, 5, 4, dtype=F64), torch.tensor([0, 1, 1, 0, 1])
    assert_close(mine(x, index), torch.stack([mine(x[0], index), mine(x[1], index)]))


@pytest.mark.parametrize("name", CASES)
def test_empty_and_defaults(name):
    mine, other = pair(name)
    no_rows, no_index = torch.zeros(0, 4, dtype=F64), torch.zeros(0, dtype=torch.int64)
    assert_close(mine(no_rows, no_index), other(no_rows, no_index))
    assert_close(mine(no_rows, no_index, dim_size=3), other(no_rows, no_index, dim_size=3))
    x = torch.rand(5, 4, dtype=F64)
    assert_close(mine(x), other(x))  # one group
    assert_close(mine(x, torch.tensor([0, 2, 2, 0, 3])), other(x, torch.tensor([0, 2, 2, 0, 3])))


@pytest.mark.parametrize("name", SIMPLE)
def test_derivatives(name):
    aggregation = build(ours, name)
    index = torch.tensor([3, 0, 3, 1, 0, 3])
    x = torch.rand(6, 4, dtype=F64) + 0.5
    names, parameters = zip(*aggregation.named_parameters(), strict=True) if "learn" in name else ((), ())

    def run(x, *values):
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(aggregation, weights, (x, index), {"dim_size": 5})

    check_derivatives(run, [x, *(p.detach() for p in parameters)])


@pytest.mark.parametrize("name", ["var, semi-gradient", "std, semi-gradient", "softmax, semi-gradient"])
def test_semi_gradients_differ_from_the_whole(name):
    kind, options = CASES[name]
    x, index = torch.randn(6, 4, dtype=F64), torch.tensor([1, 0, 1, 1, 0, 1])
    gradients = []
    for semi_grad in (True, False):
        leaf = x.clone().requires_grad_()
        aggregation = getattr(ours, kind)(**(options | {"semi_grad": semi_grad}))
        gradients += torch.autograd.grad(aggregation(leaf, index).sum(), leaf)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_laws_in_a_real_layer(name):
    def make():
        return pyg.SAGEConv(4, 3, aggr=build(ours, name)).double()

    torch.manual_seed(0)
    conv = make()

    def run(data):
        return conv(data.x, data.edge_index)

    assert_permutation_equivariant(run, sample())
    assert_alone_equals_batched(run, [sample(n, 4 * n, n) for n in (3, 0, 5, 1)])
    data = sample()
    assert_state_dict_roundtrip(make, lambda module: module(data.x, data.edge_index))


@pytest.mark.parametrize(
    "layer",
    [
        lambda a: pyg.GINConv(torch.nn.Linear(4, 4), aggr=a),
        lambda a: pyg.GATv2Conv(4, 4, heads=2, aggr=a),
        lambda a: pyg.GENConv(4, 4, aggr=a),
        lambda a: pyg.GraphConv(4, 4, aggr=a),
        lambda a: pyg.EdgeConv(torch.nn.Linear(8, 4), aggr=a),
    ],
    ids=["GINConv", "GATv2Conv", "GENConv", "GraphConv", "EdgeConv"],
)
@pytest.mark.parametrize("name", ["sum", "max", "std", "softmax, learnt"])
def test_layers_equal_pyg(layer, name):
    data = sample()
    mine, other = (layer(a).double() for a in pair(name))
    other.load_state_dict(mine.state_dict())
    assert_close(mine(data.x, data.edge_index), other(data.x, data.edge_index))


def test_a_list_of_aggregations():
    """PyG wraps a list in its own MultiAggregation."""
    data = sample()
    kinds = ["SumAggregation", "MaxAggregation", "StdAggregation"]
    mine, other = (pyg.SAGEConv(4, 3, aggr=[getattr(m, k)() for k in kinds]).double() for m in (ours, theirs))
    other.load_state_dict(mine.state_dict())
    assert_close(mine(data.x, data.edge_index), other(data.x, data.edge_index))


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name):
    aggregation = build(ours, name)
    index = torch.tensor([3, 0, 3, 1, 0, 3])
    check_compile(lambda x: aggregation(x, index, dim_size=5), [torch.rand(6, 4, dtype=F64)])


def test_a_layer_compiles_whole():
    conv = pyg.SAGEConv(4, 3, aggr=ours.MultiAggregation(["mean", "max", "std"])).double()
    data = sample()
    check_compile(lambda x: conv(x, data.edge_index), [data.x])


@pytest.mark.parametrize("name", ["sum", "mean", "max", "std", "softmax", "softmax, learnt", "multi"])
def test_bfloat16_autocast(name):
    data = sample()
    conv = pyg.SAGEConv(4, 3, aggr=build(ours, name)).float()
    x = data.x.float()
    expected = conv(x, data.edge_index)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x, data.edge_index)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, factor=2)  # the messages and the linear layers are rounded, too
    half = build(ours, name).float()
    rows, index = torch.randn(4000, 4).bfloat16(), torch.zeros(4000, dtype=torch.int64)
    assert_close(half(rows, index).bfloat16(), half(rows.float(), index).bfloat16())  # 4000 terms summed in float32


def test_variance_keeps_its_digits_far_from_zero():
    x = torch.randn(1000, 1) + 1e4
    index = torch.arange(1000) % 3
    exact = ours.VarAggregation()(x.double(), index)
    assert_close(ours.VarAggregation()(x, index), exact.float())
    assert not torch.allclose(theirs.VarAggregation()(x, index), exact.float(), rtol=0.1)


def test_std_has_pyg_threshold():
    x = torch.tensor([[1.0], [1.0], [1.0], [1.004], [1.0], [1.01]], dtype=F64, requires_grad=True)
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    out = ours.StdAggregation()(x, index)
    assert_close(out, theirs.StdAggregation()(x, index))
    assert out[:2].tolist() == [[0.0], [0.0]]
    assert out[2] > 0.004
    assert not torch.autograd.grad(out.sum(), x)[0][:4].any()


def test_the_gradient_of_a_tie_goes_to_the_first():
    x = torch.tensor([[2.0], [2.0], [1.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(ours.MaxAggregation()(x, torch.tensor([0, 0, 0])).sum(), x)
    assert grad.tolist() == [[1.0], [0.0], [0.0]]


def test_multi_sorts_once_and_knows_its_own(monkeypatch):
    plans = []

    class Counting(SegmentPlan):
        def __init__(self, *args):
            plans.append(args)
            super().__init__(*args)

    monkeypatch.setattr(ours, "SegmentPlan", Counting)
    multi = ours.MultiAggregation(["add", "mul", "softmax"], [{}, {}, {"learn": True}])
    multi(torch.randn(4, 2), torch.tensor([1, 0, 1, 0]))
    assert len(plans) == 1
    assert [type(a) for a in multi.aggrs] == [ours.SumAggregation, ours.MulAggregation, ours.SoftmaxAggregation]
    assert multi.aggrs[2].learn
    multi.reset_parameters()
    assert "SumAggregation" in repr(multi)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("proj", {"in_channels": 4, "out_channels": 5}),
        ("attn", {"in_channels": 4, "out_channels": 6, "num_heads": 2}),
        ("logsumexp", None),
    ],
)
def test_multi_combines_as_pyg(mode, options):
    mine, other = (m.MultiAggregation(["sum", "std"], mode=mode, mode_kwargs=options).double() for m in (ours, theirs))
    other.load_state_dict(mine.state_dict())
    x, index = torch.randn(6, 4, dtype=F64), torch.tensor([1, 0, 1, 3, 0, 1])
    assert_close(mine(x, index), other(x, index))


def test_refusals():
    x, index = torch.randn(3, 2), torch.tensor([0, 2, 1])
    for name in ("sum", "max", "softmax"):
        aggregation = build(ours, name)
        with pytest.raises(ValueError, match=r"invalid 'dim_size' \(got '2' but expected >= '3'\)"):
            aggregation(x, index, dim_size=2)
        with pytest.raises(IndexError, match=r"index\[1\] = -2 is out of range \[0, 2\]"):
            aggregation(x, torch.tensor([0, -2, 1]), dim_size=3)
        with pytest.raises(IndexError, match=r"ptr\[1\] = 5 is out of range"):
            aggregation(x, ptr=torch.tensor([0, 5, 3]))
        with pytest.raises(ValueError, match="invalid dimension"):
            aggregation(x, index, dim=2)
    with pytest.raises(ValueError, match="src must be floating for reduce='mean'"):
        ours.MeanAggregation()(torch.ones(3, 1, dtype=torch.int64), index)
    assert ours.SumAggregation()(torch.ones(3, 1, dtype=torch.int64), index).tolist() == [[1], [1], [1]]
    with pytest.raises(ValueError, match="semi_grad"):
        ours.SoftmaxAggregation(learn=True, semi_grad=True)
    with pytest.raises(ValueError, match="invalid length"):
        ours.MultiAggregation(["sum", "std"], [{}])


@pytest.mark.parametrize("name", ours.__all__)
def test_docstring_has_its_parts(name):
    aggregation = getattr(ours, name)
    text = inspect.getdoc(aggregation)
    assert issubclass(aggregation, theirs.Aggregation)
    for part in (":math:", "Shapes:", "Symmetry and derivatives:", "Example:", "Differs from PyG's:"):
        assert part in text
    assert ("Args:" in text) == bool(inspect.signature(aggregation).parameters)
    assert "https://" in text


def test_imported_on_first_use():
    code = "import sys, geo.nn; assert 'torch_geometric' not in sys.modules; geo.nn.aggr.SumAggregation()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match=r"'geo\.nn' has no attribute 'no_such'"):
        geo.nn.no_such  # noqa: B018
