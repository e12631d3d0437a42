from __future__ import annotations

import copy
from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv
from torch_geometric.utils import from_networkx

from geo.bench import peak_extra_memory
from geo.nn import BiMamba, GatedGCN, GPSMambaConv, GraphMamba, SelectiveSSM
from geo.testing import assert_close, assert_permutation_equivariant, assert_state_dict_roundtrip, check_compile
from geo.transforms import AddWalkTokens

KINDS = ["no tokens", "mpnn", "rwf"]


def random_graph(num_nodes: int, num_pairs: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Data:
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(max(num_nodes, 1), (2, num_pairs if num_nodes > 1 else 0), generator=generator)
    pairs = pairs[:, pairs[0] != pairs[1]]
    edge_index = torch.cat([pairs, pairs.flip(0)], dim=1)
    data = Data(edge_index=edge_index, num_nodes=num_nodes)
    data.x = torch.randn(num_nodes, 3, generator=generator, dtype=dtype)
    data.edge_attr = torch.randn(edge_index.size(1), 2, generator=generator, dtype=dtype)
    data.pe = torch.randn(num_nodes, 4, generator=generator, dtype=dtype)
    return data


def make(kind: str, **settings: Any) -> GraphMamba:
    given = {
        "walk_length": 0 if kind == "no tokens" else 2,
        "token_encoder": None if kind == "no tokens" else kind,
        "edge_dim": 2,
        "pe_dim": 4,
        "d_state": 4,
        "tie": "wl",
        **settings,
    }
    return GraphMamba(3, 8, 2, 5, **given).double().eval()


def run(model: GraphMamba, data: Any, **given: Any) -> Tensor:
    """The output of a model for data with all it was made for."""
    tokens = data if model.walk_length else None
    return model(data.x, data.edge_index, data.edge_attr, data.pe, getattr(data, "batch", None), tokens, **given)


def with_tokens(data: Data, kind: str) -> Data:
    return data if kind == "no tokens" else AddWalkTokens(2, 3, 2, walks=True, seed=1)(data)


def renumbered(data: Data, order: Tensor, length: int) -> Data:
    """The same graph and the same tokens with node order[i] as node i; every edge keeps its place."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    out = copy.copy(data)
    out.edge_index = place[data.edge_index]
    for name in ("x", "pe"):
        out[name] = data[name][order]
    if "token_size" not in data:
        return out
    blocks = (order.unsqueeze(1) * length + torch.arange(length)).flatten()
    ptr, eptr = (F.pad(data[name].cumsum(0), (1, 0)) for name in ("token_size", "token_esize"))
    rows = torch.cat([torch.arange(ptr[b], ptr[b + 1]) for b in blocks])
    edges = torch.cat([torch.arange(eptr[b], eptr[b + 1]) for b in blocks])
    new_row = torch.empty_like(rows)
    new_row[rows] = torch.arange(len(rows))
    out.token_node_id = place[data.token_node_id[rows]]
    out.token_edge_id = data.token_edge_id[edges]
    out.token_sub_edge_index = new_row[data.token_sub_edge_index[:, edges]]
    out.token_size, out.token_esize = data.token_size[blocks], data.token_esize[blocks]
    out.walk_nodes = place[data.walk_nodes[order]]
    for name in ("walk_edge_id", "walk_moved", "walk_adjacency"):
        out[name] = data[name][order]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_17_permuting_nodes_tokens_and_order_permutes_the_output(kind):
    data = with_tokens(random_graph(11, 20), kind)
    model, score = make(kind), torch.randperm(11).double()
    out = run(model, data, score=score).detach()
    order = torch.randperm(11)
    there = run(model, renumbered(data, order, 5), score=score[order])
    assert float((there.detach() - out[order]).abs().max()) < 1e-12
    other = run(model, renumbered(data, order, 5), score=score)  # the order left as it was
    assert float((other.detach() - out[order]).abs().max()) > 1e-6


def test_18_colours_make_the_order_equivariant_where_no_symmetry_is():
    graph = networkx.Graph([(0, 1), (0, 2), (2, 3), (0, 4), (4, 5), (5, 6)])  # legs of one, two and three nodes
    assert sum(1 for _ in networkx.isomorphism.GraphMatcher(graph, graph).isomorphisms_iter()) == 1
    data = Data(edge_index=from_networkx(graph).edge_index, x=torch.ones(7, 3, dtype=torch.float64))
    model = make("no tokens", edge_dim=None, pe_dim=None)
    assert_permutation_equivariant(lambda data: model(data.x, data.edge_index), data)
    other = make("no tokens", edge_dim=None, pe_dim=None, tie="index")
    with pytest.raises(AssertionError, match="permutation of nodes"):
        assert_permutation_equivariant(lambda data: other(data.x, data.edge_index), data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(), (7,), (6, 1, 9), (0, 6, 0, 1, 3, 0)])
def test_19_alone_equals_batched(kind, sizes):
    model = make(kind)
    graphs = [with_tokens(random_graph(size, 12, seed), kind) for seed, size in enumerate(sizes)]
    if not graphs:
        data = with_tokens(random_graph(0, 0), kind)
        assert run(model, data).shape == (0, 5)
        return
    alone = torch.cat([run(model, graph) for graph in graphs])
    assert_close(run(model, Batch.from_data_list(graphs)), alone)
    assert_close(run(model, Batch.from_data_list(graphs), batch_size=len(graphs)), alone)


def test_19_random_ties_and_training_do_not_depend_on_the_batch():
    model = make("no tokens", tie="random").train()
    graphs = [random_graph(size, 4, seed) for seed, size in enumerate((6, 1, 9))]
    torch.manual_seed(3)
    together = run(model, Batch.from_data_list(graphs))
    alone = []
    for graph in graphs:
        torch.manual_seed(3)
        alone.append(run(model, graph))
    assert_close(together, torch.cat(alone))


def test_20_sequences_of_one_row_are_a_map_of_rows():
    for layer in (SelectiveSSM(4).double(), BiMamba(4).double(), BiMamba(4, combine="hydra").double()):
        x = torch.randn(6, 4, dtype=torch.float64)
        rows = torch.cat([layer(row) for row in x.split(1)])
        assert_close(layer(x, torch.arange(7)), rows)
        order = torch.randperm(6)
        assert_close(layer(x[order], torch.arange(7)), rows[order])
        assert not torch.allclose(layer(x), rows)


def _ends_found(model: GraphMamba) -> tuple[float, float]:
    """Train on paths whose ends must tell each other's bit; the share found at first and at last nodes."""

    def paths(num: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x, edges, batch, ends, bits = [], [], [], [], []
        start = 0
        for graph in range(num):
            size = int(torch.randint(3, 12, ()))
            bit = torch.randint(2, (2,))
            kind = torch.full((size,), 2)
            kind[0], kind[-1] = bit
            path = torch.arange(size - 1) + start
            x.append(F.one_hot(kind, 3).float())
            edges.append(torch.stack([torch.cat([path, path + 1]), torch.cat([path + 1, path])]))
            batch.append(torch.full((size,), graph))
            ends.append(torch.tensor([start, start + size - 1]))
            bits.append(bit.flip(0))
            start += size
        return torch.cat(x), torch.cat(edges, 1), torch.cat(batch), torch.cat(ends), torch.cat(bits)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        x, edge_index, batch, ends, bits = paths(32)
        loss = F.cross_entropy(model(x, edge_index, batch=batch)[ends], bits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, edge_index, batch, ends, bits = paths(200)
    right = (model.eval()(x, edge_index, batch=batch)[ends].argmax(dim=1) == bits).float().view(-1, 2).mean(dim=0)
    return float(right[0]), float(right[1])


def test_21_both_directions_are_needed():
    settings = {"order": "index", "tie": "index", "mpnn": None, "d_state": 4}
    assert _ends_found(GraphMamba(3, 16, 1, 2, **settings)) == (1.0, 1.0)
    first, last = _ends_found(GraphMamba(3, 16, 1, 2, bidirectional=False, **settings))
    assert last == 1.0
    assert 0.35 < first < 0.65  # chance


@pytest.mark.parametrize("kind", KINDS)
def test_23_memory_grows_linearly_with_the_nodes(kind):
    def kept(num_nodes: int) -> int:
        """Bytes that the forward pass keeps for the gradient."""
        data = with_tokens(random_graph(num_nodes, 3 * num_nodes), kind)
        model, seen = make(kind).train(), {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(model, data)
        del out
        return sum(seen.values())

    small, large = kept(300), kept(1200)
    assert 3.0 < large / small < 4.8


@pytest.mark.parametrize("tie", ["random", "wl"])
@pytest.mark.parametrize("kind", ["no tokens", "mpnn"])
def test_23_peak_memory_grows_linearly_around_a_hub(kind, tie):
    """All that a training step holds at a time, tokens and order included."""

    def peak(num_nodes: int) -> int | None:
        leaves = torch.arange(1, num_nodes)
        star = torch.stack([leaves, torch.zeros_like(leaves)])
        data = random_graph(num_nodes, num_nodes)
        data.edge_index = torch.cat([data.edge_index, star, star.flip(0)], dim=1)
        model = make(kind, edge_dim=None, tie=tie).train()

        def step() -> None:
            made = with_tokens(data, kind)
            made.edge_attr = None
            run(model, made).sum().backward()

        return peak_extra_memory(step)

    small, large = peak(2000), peak(8000)
    if small is None or large is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert large < 6 * small, (small, large)


@pytest.mark.parametrize("kind", KINDS)
def test_isolated_nodes_and_no_edges(kind):
    data = with_tokens(random_graph(4, 0), kind)
    model = make(kind)
    data.x.requires_grad_()
    out = run(model, data)
    out.sum().backward()
    assert out.isfinite().all()
    assert data.x.grad.isfinite().all()


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind, edges):
    model = make(kind, edge_dim=2 if edges else None).train()
    data = with_tokens(random_graph(12, 30), kind)
    if not edges:
        data.edge_attr = None
    run(model, data).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # the node itself is the last row: read from the end, it is the first, and has nothing to decay
    assert idle == ([] if kind == "no tokens" else ["layers.1.backward_ssm.A_log"])
    assert all(p.grad is not None for p in model.parameters())  # or training on several devices fails


@pytest.mark.parametrize("make", [lambda: GatedGCN(3, 8, 2, 4), lambda: GPSMambaConv(3, None)])
def test_no_parameter_is_left_out(make):
    model, data = make().double(), random_graph(6, 9)
    model(data.x, data.edge_index).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_averages_random_orders():
    data = random_graph(9, 10)
    model = make("no tokens", tie="random", num_samples=3)
    torch.manual_seed(0)
    out = run(model, data)
    torch.manual_seed(0)
    perm, ptr = model.order(data.edge_index, None, 9, x=data.x, num_samples=3)
    model.num_samples = 1
    one = []
    for order in perm:
        score = torch.empty(9, dtype=torch.float64)
        score[order] = torch.arange(9, dtype=torch.float64)
        one.append(run(model, data, score=score))
    assert_close(out, torch.stack(one).mean(0))
    assert not torch.allclose(one[0], one[1])
    assert ptr.tolist() == [0, 9]
    assert torch.equal(run(model, data, seed=5), run(model, data, seed=5))


def test_presets():
    gmn = GraphMamba.gmn(3, 8, 2, 5, pe_dim=4)
    assert gmn.walk_length == 2
    assert type(gmn.token_encoder).__name__ == "MPNNTokenEncoder"
    assert len(gmn.mpnn) == 2
    minus = GraphMamba.gmn_minus(3, 8, 2, 5, walk_length=4)
    assert minus.walk_length == 4
    assert type(minus.token_encoder).__name__ == "RWFTokenEncoder"
    assert len(minus.mpnn) == 0
    with pytest.raises(ValueError, match="pe_dim is missing"):
        GraphMamba.gmn(3, 8, 2)
    for make, message in (
        (lambda: GraphMamba.gmn(3, 8, 2, pe_dim=4, mpnn=None), "mpnn is None, but GMN passes messages"),
        (lambda: GraphMamba.gmn(3, 8, 2, pe_dim=4, walk_length=0), "walk_length is 0"),
        (lambda: GraphMamba.gmn_minus(3, 8, 2, walk_length=0), "walk_length is 0"),
        (lambda: GraphMamba.gmn_minus(3, 8, 2, mpnn="gine"), "mpnn is 'gine'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("kind", ["no tokens", "mpnn"])
def test_message_passing_of_any_kind(kind):
    data = with_tokens(random_graph(8, 12), kind)
    for mpnn in ("gatedgcn", "gine", lambda channels: SAGEConv(channels, channels)):
        settings = {} if isinstance(mpnn, str) else {"edge_dim": None}
        model = make(kind, mpnn=mpnn, **settings)
        given = data if isinstance(mpnn, str) else data.clone()
        if not isinstance(mpnn, str):
            given.edge_attr = None
        assert run(model, given).shape == (8, 5)
        model.reset_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict(kind):
    data = with_tokens(random_graph(6, 9), kind)
    assert_state_dict_roundtrip(lambda: make(kind), lambda model: run(model, data))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    data = with_tokens(random_graph(9, 15, dtype=torch.float32), kind)
    model = make(kind).float()
    expected = run(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, data)
    assert torch.allclose(out.float(), expected, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_compile(kind):
    graphs = [with_tokens(random_graph(size, 9, size), kind) for size in (4, 5)]
    data = Batch.from_data_list(graphs)
    model = make(kind, tie="index", dropout=0.0)

    def call(x: Tensor) -> Tensor:
        tokens = data if model.walk_length else None
        return model(x, data.edge_index, data.edge_attr, data.pe, data.batch, tokens, batch_size=2)

    check_compile(call, [data.x])


def test_gps_mamba_is_a_drop_in_for_gps_conv():
    conv = GPSMambaConv(6, SAGEConv(6, 6), norm=None, d_state=4).double().eval()
    data = random_graph(7, 9)
    x = torch.randn(7, 6, dtype=torch.float64)
    torch.manual_seed(1)
    out = conv(x, data.edge_index)
    torch.manual_seed(1)
    perm, ptr = conv.global_module.order(data.edge_index, None, 7)
    mixed = torch.empty_like(x)
    mixed[perm] = conv.global_module.mamba(x[perm], ptr)
    h = (x + conv.conv(x, data.edge_index)) + (x + mixed)
    assert_close(out, h + conv.mlp(h))


def test_gps_mamba_alone_equals_batched():
    conv = GPSMambaConv(3, None, tie="wl", norm="layer_norm", norm_kwargs={"mode": "node"}).double().eval()
    graphs = [random_graph(size, 8, seed) for seed, size in enumerate((5, 1, 7))]
    batch = Batch.from_data_list(graphs)
    alone = torch.cat([conv(graph.x, graph.edge_index) for graph in graphs])
    assert_close(conv(batch.x, batch.edge_index, batch.batch), alone)


def test_gated_gcn():
    model = GatedGCN(3, 8, 2, 4, edge_dim=2).double().eval()
    graphs = [random_graph(size, 8, seed) for seed, size in enumerate((5, 1, 7))]
    batch = Batch.from_data_list(graphs)
    alone = torch.cat([model(graph.x, graph.edge_index, graph.edge_attr) for graph in graphs])
    assert_close(model(batch.x, batch.edge_index, batch.edge_attr), alone)
    # its definition, layer by layer
    data = graphs[0]
    x, e = model.encoder(data.x), model.edge_encoder(data.edge_attr)
    for conv in model.convs:
        x, e = conv(x, data.edge_index, e)
    assert_close(alone[:5], model.last(torch.relu(model.lin(model.norm(x)))))
    with pytest.raises(ValueError, match="edge_attr is missing"):
        model(data.x, data.edge_index)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"out_channels": 0}, "out_channels is 0"),
        ({"walk_length": -1}, "walk_length is -1"),
        ({"mpnn": "gat"}, "mpnn is 'gat'"),
        ({"mpnn": "gine"}, "mpnn='gine' needs edge features"),
        ({"hidden_channels": 8.0}, "hidden_channels is 8.0"),
        ({"token_encoder": "rwf"}, "token_encoder is 'rwf', but a model without tokens"),
        ({"num_mpnn_layers": 3}, "num_mpnn_layers is 3, but a model without tokens"),
        ({"mpnn": None, "edge_dim": 2}, "nobody reads edges"),
        ({"mpnn": lambda channels: SAGEConv(channels, channels), "edge_dim": 2}, "SAGEConv, which takes no edge_attr"),
        ({"walk_length": 2, "token_encoder": "cnn"}, "token_encoder is 'cnn'"),
        ({"walk_length": 2, "token_encoder": "mpnn", "mpnn": None}, "needs message passing"),
        ({"order": "ppr"}, "'ppr'"),
        ({"tie": "none"}, "tie is 'none'"),
        ({"act": "swish"}, "act is 'swish'"),
        ({"combine": "max"}, "combine is 'max'"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GraphMamba(**{"in_channels": 3, "hidden_channels": 8, "num_layers": 1, **settings})


def test_refused_inputs():
    data = random_graph(5, 6)
    model = make("no tokens")
    args = (data.x, data.edge_index, data.edge_attr, data.pe)
    for given, message in (
        ((data.x[:, :2], *args[1:]), r"x: expected \[N, 3\], got shape \[5, 2\]"),
        ((data.x, data.edge_index[0], *args[2:]), r"edge_index: expected \[2, E\]"),
        ((data.x, data.edge_index, None, data.pe), "edge_attr is missing, but the model was built with edge_dim=2"),
        ((*args[:3], None), "pe is missing, but the model was built with pe_dim=4"),
        ((*args[:3], data.pe[:4]), r"pe: expected \[5, 4\], got shape \[4, 4\]"),
        ((*args, torch.tensor([0, 1, 0, 1, 1])), "batch is not sorted"),
        ((*args, None, data), "tokens is given, but the model was built with walk_length=0"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*given)
    with pytest.raises(ValueError, match="tokens is missing"):
        make("rwf")(*args)
    for settings, message in (
        ({"walk_length": 3}, "walk_length=3, but the model is for 2"),
        ({"walk_length": 2, "num_root_tokens": 0}, "num_root_tokens=0"),
        ({"walk_length": 2, "induced": False}, "induced=False"),
    ):
        with pytest.raises(ValueError, match=message):
            run(make("mpnn"), AddWalkTokens(**settings)(data))
    for name in ("heads", "attn_type"):
        with pytest.raises(ValueError, match=f"{name} belongs to the attention"):
            GPSMambaConv(8, None, **{name: 4})
