from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.utils import erdos_renyi_graph

from geo.nn import GINE
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)


class Spectral(nn.Module):
    """An encoding with the call of SPE: the eigenvalues' sum beside squared eigenvectors."""

    def __init__(self, out_channels: int = 3) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.lin = nn.Linear(2, out_channels)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()

    def forward(self, eigvals, eigvecs, edge_index, batch=None, eig_mask=None, edge_weight=None):
        batch = torch.zeros(eigvecs.size(0), dtype=torch.long) if batch is None else batch
        weight = eigvals if eig_mask is None else eigvals * eig_mask
        both = torch.stack([weight.sum(1)[batch], (eigvecs.square() * weight[batch]).sum(1)], dim=1)
        return self.lin(both)


def graph(num_nodes: int = 7, seed: int = 0, kind: str = "types", dtype: torch.dtype = torch.float64) -> Data:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    edge_index = erdos_renyi_graph(num_nodes, 0.4) if num_nodes > 1 else torch.empty(2, 0, dtype=torch.long)
    pairs = edge_index.size(1)
    if kind == "types":
        x, edge_attr = torch.randint(5, (num_nodes, 1), generator=g), torch.randint(4, (pairs,), generator=g)
    else:
        x = torch.randn(num_nodes, 6, generator=g, dtype=dtype)
        edge_attr = torch.randn(pairs, 2, generator=g, dtype=dtype)
    pe = torch.randn(num_nodes, 3, generator=g, dtype=dtype)
    return Data(x=x, edge_index=edge_index, edge_attr=edge_attr, pe=pe, num_nodes=num_nodes)


def make(kind: str = "types", **options) -> GINE:
    sizes = {"node_types": 5, "edge_types": 4} if kind == "types" else {"in_channels": 6, "edge_dim": 2}
    settings = {"in_channels": None, "hidden_channels": 8, "num_layers": 2, "out_channels": 3, "pe_dim": 3, **sizes}
    return GINE(**{**settings, **options}).double().eval()


def run(model: GINE, data: Data) -> Tensor:
    batch = getattr(data, "batch", None)
    size = getattr(data, "num_graphs", None) if batch is not None else None
    return model(data.x, data.edge_index, data.edge_attr, batch, pe=data.pe, batch_size=size)


KINDS = ["types", "features"]


@pytest.mark.parametrize("residual", [True, False])
def test_equals_its_formula(residual):
    model, data = make(pool="sum", residual=residual), graph()
    h = model.encoder.weight[data.x[:, 0]] + data.pe @ model.pe_lin.weight.t() + model.pe_lin.bias
    for conv, embedding in zip(model.convs, model.edge_encoders, strict=True):
        with torch.no_grad():
            conv.eps.fill_(0.3)
        rows = []
        for i in range(data.num_nodes):
            row = 1.3 * h[i]
            for e, (source, target) in enumerate(data.edge_index.t().tolist()):
                if target == i:
                    row = row + (h[source] + embedding.weight[data.edge_attr[e]]).clamp(min=0)
            rows.append(row)
        update = conv.nn(torch.stack(rows))
        h = h + update if residual else update
    assert_close(run(model, data), model.head(h.sum(0, keepdim=True)))


def test_mlp_is_linear_maps_with_norm_and_act_between():
    model = make(mlp_layers=3)
    x = torch.randn(4, 8, dtype=torch.float64)
    a, b, c = model.head.lins
    norm = [
        lambda y, k=k: nn.functional.layer_norm(y, (8,), model.head.norms[k].weight, model.head.norms[k].bias)
        for k in (0, 1)
    ]
    assert_close(model.head(x), c(norm[1](b(norm[0](a(x)).relu())).relu()))


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm"])
def test_published_parameter_counts(norm):
    """No encoding, 575,805: the paper's 575k; with one, the base network is 128 wide and has 239,493."""

    def count(hidden: int) -> int:
        model = GINE(None, hidden, 4, 1, node_types=28, edge_types=4, norm=norm)
        return sum(p.numel() for p in model.parameters())

    assert count(200) == 575_805
    assert count(128) == 239_493


@pytest.mark.parametrize("pool", ["mean", "sum", None])
@pytest.mark.parametrize("kind", KINDS)
def test_permutation(kind, pool):
    model = make(kind, pool=pool)
    level = "node" if pool is None else "graph"
    assert_permutation_equivariant(lambda data: run(model, data), graph(kind=kind), level=level)


@pytest.mark.parametrize("pool", ["mean", "sum", None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(7,), (6, 1, 9), (0, 6, 0, 1, 3, 0)])
def test_alone_equals_batched(kind, pool, sizes):
    model = make(kind, pool=pool)
    graphs = [graph(size, seed, kind) for seed, size in enumerate(sizes)]
    level = "node" if pool is None else "graph"
    assert_alone_equals_batched(lambda batch: run(model, batch), graphs, level=level)


def test_batch_norm_sees_the_batch_in_training_only():
    graphs = [graph(size, seed) for seed, size in enumerate((6, 4, 9))]
    for norm, training, same in (("layer_norm", True, True), ("batch_norm", False, True), ("batch_norm", True, False)):
        model = make(norm=norm, pool=None).train(training)
        together = run(model, Batch.from_data_list(graphs))
        alone = torch.cat([run(model, data) for data in graphs])
        assert torch.allclose(together, alone) == same


def test_mean_and_sum_of_the_nodes():
    data = graph()
    nodes = make(out_channels=None, pool=None)
    for pool in ("mean", "sum"):
        model = make(out_channels=None, pool=pool)
        model.load_state_dict(nodes.state_dict())
        assert_close(run(model, data), getattr(run(nodes, data), pool)(dim=0, keepdim=True))


def test_encoding_from_the_spectrum():
    model = make(pe=Spectral(), pe_dim=None)
    graphs = [graph(size, seed) for seed, size in enumerate((4, 6))]
    eigvals, eigvecs = torch.rand(2, 5, dtype=torch.float64), torch.randn(10, 5, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    batch = Batch.from_data_list(graphs)
    args = (batch.x, batch.edge_index, batch.edge_attr, batch.batch)
    out = model(*args, spectrum=(eigvals, eigvecs, mask))
    plain = make()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pe.")})
    pe = model.pe(eigvals, eigvecs, batch.edge_index, batch=batch.batch, eig_mask=mask)
    assert_close(out, plain(*args, pe=pe))
    first = graphs[0]
    alone = model(first.x, first.edge_index, first.edge_attr, spectrum=(eigvals[:1], eigvecs[:4], mask[:1]))
    assert_close(out[:1], alone)


def test_encoding_is_used():
    data = graph()
    model = make()
    other = data.clone()
    other.pe = data.pe + 1
    assert not torch.allclose(run(model, data), run(model, other))


def test_edges_are_optional():
    data = graph()
    model = make(edge_types=None)
    assert len(model.edge_encoders) == 0
    out = model(data.x, data.edge_index, pe=data.pe)
    zero = make()
    zero.load_state_dict(model.state_dict(), strict=False)
    for embedding in zero.edge_encoders:
        nn.init.zeros_(embedding.weight)
    assert_close(out, run(zero, data))


@pytest.mark.parametrize("kind", KINDS)
def test_isolated_nodes_and_no_nodes(kind):
    model = make(kind)
    lonely = graph(1, kind=kind)
    out = run(model, lonely)
    out.sum().backward()
    assert out.isfinite().all()
    assert run(model, graph(0, kind=kind)).shape == (1, 3)
    assert run(make(kind, pool=None), graph(0, kind=kind)).shape == (0, 3)


def test_derivatives():
    model, data = make("features", act="tanh", hidden_channels=4), graph(4, kind="features")

    def call(x: Tensor, edge_attr: Tensor, pe: Tensor) -> Tensor:
        return model(x, data.edge_index, edge_attr, pe=pe)

    check_derivatives(call, [data.x, data.edge_attr, data.pe])


@pytest.mark.parametrize("pool", ["mean", None])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind, pool):
    model, data = make(kind, pool=pool), graph(9, kind=kind)
    data.x = torch.arange(9).remainder(5) if kind == "types" else data.x
    data.edge_attr = torch.arange(data.num_edges).remainder(4) if kind == "types" else data.edge_attr
    run(model, data).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    data = graph(kind=kind)
    assert_state_dict_roundtrip(lambda: make(kind), lambda model: run(model, data))


def test_reset_parameters():
    model, data = make(pe=Spectral(), pe_dim=None), graph(4)
    before = {name: p.clone() for name, p in model.named_parameters() if "norm" not in name and "eps" not in name}
    model.reset_parameters()
    after = dict(model.named_parameters())
    assert [name for name, p in before.items() if torch.equal(p, after[name])] == []
    assert model(data.x, data.edge_index, data.edge_attr, spectrum=(*spectrum(4), None)).shape == (1, 3)


def spectrum(num_nodes: int) -> tuple[Tensor, Tensor]:
    return torch.rand(1, num_nodes, dtype=torch.float64), torch.randn(num_nodes, num_nodes, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    data = graph(9, kind=kind, dtype=torch.float32)
    data.pe = data.pe.float()
    model = make(kind).float()
    expected = run(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, data)
    assert torch.allclose(out.float(), expected, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    data = Batch.from_data_list([graph(size, size, kind) for size in (4, 5)])
    model = make(kind)

    def call(pe: Tensor) -> Tensor:
        return model(data.x, data.edge_index, data.edge_attr, data.batch, pe=pe, batch_size=2)

    check_compile(call, [data.pe])


def test_repr():
    assert repr(make()) == (
        "GINE(None, 8, num_layers=2, out_channels=3, node_types=5, edge_types=4, pe_dim=3, pool='mean', "
        "norm='layer_norm')"
    )
    assert "edge_dim=2, pe=Spectral" in repr(make("features", pe=Spectral(), pe_dim=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"hidden_channels": 8.0}, "hidden_channels is 8.0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"in_channels": 3}, "in_channels is 3, node_types is 5: give just one"),
        ({"node_types": None}, "in_channels is None, node_types is None: give just one"),
        ({"edge_dim": 3}, "edge_dim is 3, edge_types is 4: give at most one"),
        ({"pe": Spectral()}, "pe_dim is 3, but pe is given"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"norm": "group"}, "norm is 'group'"),
        ({"act": "swish"}, "act is 'swish'"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_refused_inputs():
    data, model = graph(5), make()
    args = (data.x, data.edge_index, data.edge_attr, None, None, data.pe)
    more = torch.cat([data.edge_attr, data.edge_attr])
    for given, message in (
        ((data.x.double(), *args[1:]), r"x: expected integer types \[\*\] or \[\*, 1\], got torch.float64"),
        ((data.x + 5, *args[1:]), "x holds the type [5-9], but the model knows 0 to 4"),
        ((data.x - 9, *args[1:]), "x holds the type -"),
        ((data.x, data.edge_index[0], *args[2:]), r"edge_index: expected \[2, E\]"),
        ((*args[:2], None, *args[3:]), "edge_attr is missing, but the model is GINE"),
        ((*args[:2], more, *args[3:]), "edge_attr has"),
        ((*args[:3], torch.zeros(4, dtype=torch.long), None, data.pe), r"batch: expected \[5\], got shape \[4\]"),
        ((*args[:5], None), "pe is missing"),
        ((*args[:5], data.pe[:4]), r"pe: expected \[5, 3\], got shape \[4, 3\]"),
        ((*args[:4], spectrum(5), data.pe), "spectrum is given"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*given)
    features = graph(5, kind="features")
    with pytest.raises(ValueError, match=r"x: expected \[\*, 6\], got shape \[5, 4\]"):
        make("features")(features.x[:, :4], features.edge_index, features.edge_attr, pe=features.pe)
