from __future__ import annotations

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, GINConv, GINEConv
from torch_geometric.utils import subgraph, to_undirected

from geo.nn import GatedGCNConv, MPNNTokenEncoder, RWFTokenEncoder
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)
from geo.transforms import AddWalkTokens, WalkTokenData

C, E = 4, 3


def tokenized(num_nodes=7, num_edges=9, seed=0, dtype=torch.float64, **options):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, num_nodes), (2, num_edges if num_nodes else 0), generator=g)
    edges = to_undirected(edges, num_nodes=num_nodes)
    data = Data(
        x=torch.randn(num_nodes, C, generator=g, dtype=dtype),
        edge_index=edges,
        edge_attr=torch.randn(edges.size(1), E, generator=g, dtype=dtype),
        num_nodes=num_nodes,
    )
    options = {"walk_length": 3, "num_walks": 2, "num_repeats": 2, "walks": True, "window": 4, **options}
    return AddWalkTokens(**options)(data)


def graphs():
    sizes = ((5, 6), (0, 0), (1, 0), (1, 1), (3, 2), (12, 20))
    return [tokenized(n, e, seed=i) for i, (n, e) in enumerate(sizes)]


def gine():
    return GINEConv(nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C)), edge_dim=E)


MPNN = {
    "gated": lambda: [GatedGCNConv(C, edge_dim=E), GatedGCNConv(C)],
    "gated without edges": lambda: GatedGCNConv(C, edge_dim=0),
    "gine": lambda: [gine(), gine()],
    "gcn": lambda: GCNConv(C, C),
    "gated, then gin": lambda: [GatedGCNConv(C, edge_dim=E), GINConv(nn.Linear(C, C))],
}


def mpnn(which="gated", dtype=torch.float64, **options):
    return MPNNTokenEncoder(MPNN[which](), C, 5, **options).to(dtype)


def rwf(dtype=torch.float64, **options):
    return RWFTokenEncoder(C, 5, **{"edge_dim": E, "window": 4, **options}).to(dtype)


ENCODERS = {
    **{name: (lambda dtype=torch.float64, name=name, **options: mpnn(name, dtype, **options)) for name in MPNN},
    "rwf": rwf,
    "rwf without edges": lambda dtype=torch.float64, **options: rwf(dtype, edge_dim=None, **options),
}


def run(encoder, data):
    names = "gated without edges", "gcn"
    reads = isinstance(encoder, RWFTokenEncoder) or not any(
        repr(encoder.convs) == repr(mpnn(name).convs) for name in names
    )
    return encoder(data.x, data.edge_attr if reads else None, data)


# -- what is computed --------------------------------------------------------------------------------------------------
def members(data):
    ids, size = data.token_node_id.tolist(), data.token_size.tolist()
    start = 0
    for count in size:
        yield ids[start : start + count]
        start += count


@pytest.mark.parametrize("pooling", ["mean+root", "mean", "root", "sum"])
@pytest.mark.parametrize("which", MPNN)
def test_each_token_alone(which, pooling):
    """PyG's own induced subgraphs, one convolution after the other on each of them."""
    data, encoder = tokenized(), mpnn(which, pooling=pooling)
    rows = []
    for token in members(data):
        keep = torch.tensor(sorted(token))
        index, attr = subgraph(keep, data.edge_index, data.edge_attr, relabel_nodes=True, num_nodes=7)
        h = data.x[keep]
        for number, conv in enumerate(encoder.convs):
            if isinstance(conv, GatedGCNConv):
                h, attr = conv(h, index, None if conv.edge_dim == 0 else attr)
            elif isinstance(conv, GINEConv):
                h = conv(h if number == 0 else h.relu(), index, attr)
            else:
                h = conv(h, index)
        root = h[keep.tolist().index(token[0])]
        pooled = {"mean": [h.mean(0)], "sum": [h.sum(0)], "root": [root], "mean+root": [h.mean(0), root]}[pooling]
        rows.append(encoder.lin(torch.cat(pooled)))
    assert_close(run(encoder, data), torch.stack(rows).view(7, 7, 5))


@pytest.mark.parametrize("edge_dim", [E, None])
@pytest.mark.parametrize("kernel_size", [1, 3, 9])
def test_walk_features_position_by_position(kernel_size, edge_dim):
    data, encoder = tokenized(seed=3), rwf(edge_dim=edge_dim, kernel_size=kernel_size)
    adjacent = set(map(tuple, data.edge_index.t().tolist()))
    rows = []
    for v in range(7):
        for j in range(6):
            positions = []
            length = 3 - j // 2
            for walk, edges, moved in zip(
                data.walk_nodes[v, j], data.walk_edge_id[v, j], data.walk_moved[v, j], strict=True
            ):
                w = walk.tolist()[: length + 1]
                features = []
                for t in range(length + 1):
                    parts = [data.x[w[t]]]
                    if edge_dim:
                        parts.append(data.edge_attr[edges[t - 1]] if t and moved[t - 1] else torch.zeros(E))
                    bits = [t >= k and w[t] == w[t - k] for k in range(1, 5)]
                    bits += [t >= k and (w[t], w[t - k]) in adjacent for k in range(2, 5)]
                    features.append(torch.cat([*parts, torch.tensor(bits)]).double())
                weight = [encoder.lin_node.weight, *([encoder.lin_edge.weight] if edge_dim else [])]
                weight = torch.cat([*weight, encoder.lin_bits.weight], 1)
                h = (torch.stack(features) @ weight.t() + encoder.lin_node.bias).relu()
                h = F.conv1d(
                    h.t().unsqueeze(0),
                    encoder.conv_weight.unsqueeze(1),
                    encoder.conv_bias,
                    padding=kernel_size // 2,
                    groups=5,
                )
                positions.append(h[0].t().relu())
            rows.append(encoder.lin_out(torch.cat(positions).mean(0)))
        rows.append(encoder.lin_root(data.x[v]))
    assert any(not data.walk_moved[v, 0].all() for v in range(7))  # one stays where it is
    assert_close(run(encoder, data), torch.stack(rows).view(7, 7, 5))


@pytest.mark.parametrize("name", ["gated", "rwf"])
@pytest.mark.parametrize(
    ("options", "lengths"), [({}, [3, 3, 2, 2, 1, 1, 0]), ({"num_root_tokens": 2}, [3, 3, 2, 2, 1, 1, 0, 0])]
)
def test_levels(name, options, lengths):
    data = tokenized(**options)
    encoder = ENCODERS[name](level_emb=3, **options)
    plain = ENCODERS[name](**options)
    plain.load_state_dict({k: v for k, v in encoder.state_dict().items() if "levels" not in k})
    assert_close(run(encoder, data), run(plain, data) + encoder.levels.weight[lengths])


@pytest.mark.parametrize("num_root_tokens", [0, 2])
@pytest.mark.parametrize("name", ["gated", "rwf"])
def test_number_of_root_tokens(name, num_root_tokens):
    data = tokenized(num_root_tokens=num_root_tokens)
    out = run(ENCODERS[name](num_root_tokens=num_root_tokens), data)
    assert out.shape == (7, 6 + num_root_tokens, 5)
    if num_root_tokens:
        assert torch.equal(out[:, -1], out[:, -2])


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("name", ["gated", "gine", "rwf"])
def test_chunks(name, chunk_size):
    data = tokenized()
    whole, parts = ENCODERS[name](), ENCODERS[name](chunk_size=chunk_size)
    parts.load_state_dict(whole.state_dict())
    results = []
    for encoder in (whole, parts):
        x = data.x.clone().requires_grad_()
        out = encoder(x, data.edge_attr, data)
        inputs = (x, *encoder.parameters())  # the last edge states are not read
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs, materialize_grads=True)))
    assert_close(*results)


# -- laws --------------------------------------------------------------------------------------------------------------
def permuted(data, seed):
    """The same graph and the same tokens, with other numbers for nodes and edges; and the old number of each node."""
    g = torch.Generator().manual_seed(seed)
    node, edge = torch.randperm(data.num_nodes, generator=g), torch.randperm(data.num_edges, generator=g)
    new, new_edge = node.argsort(), edge.argsort()
    tokens = list(zip(members(data), token_edges(data), strict=True))
    length = len(tokens) // data.num_nodes
    tokens = [tokens[v * length + j] for v in node.tolist() for j in range(length)]
    ids, index, edge_id = [], [], []
    for token, (ends, columns) in tokens:
        index += [(i + len(ids), j + len(ids)) for i, j in ends]
        ids += new[token].tolist()
        edge_id += new_edge[columns].tolist()
    walks = {
        "walk_nodes": new[data.walk_nodes[node]],
        "walk_edge_id": new_edge[data.walk_edge_id[node]],
        "walk_moved": data.walk_moved[node],
        "walk_adjacency": data.walk_adjacency[node],
    }
    out = WalkTokenData(
        x=data.x[node],
        edge_index=new[data.edge_index[:, edge]],
        edge_attr=data.edge_attr[edge],
        token_node_id=torch.tensor(ids),
        token_edge_id=torch.tensor(edge_id),
        token_sub_edge_index=torch.tensor(index).t(),
        token_size=torch.tensor([len(token) for token, _ in tokens]),
        token_esize=torch.tensor([len(columns) for _, (_, columns) in tokens]),
        **walks,
    )
    return out, node


def token_edges(data):
    first, start = 0, 0
    for count, size in zip(data.token_esize.tolist(), data.token_size.tolist(), strict=True):
        ends = (data.token_sub_edge_index[:, first : first + count] - start).t().tolist()
        yield ends, data.token_edge_id[first : first + count].tolist()
        first, start = first + count, start + size


@pytest.mark.parametrize("name", ENCODERS)
def test_permutation_with_the_samples_given(name):
    data, encoder = tokenized(seed=3), ENCODERS[name]()
    for seed in range(3):
        other, node = permuted(data, seed)
        assert_close(run(encoder, other), run(encoder, data)[node])
        assert (run(encoder, other) - run(encoder, data)).abs().max() > 0.1


@pytest.mark.parametrize("name", ENCODERS)
def test_alone_equals_batched(name):
    encoder = ENCODERS[name]()
    assert_alone_equals_batched(lambda d: run(encoder, d).reshape(-1, 5), graphs())


def test_batch_norm_is_seen_to_leak():
    encoder = MPNNTokenEncoder(GatedGCNConv(C, edge_dim=E, norm="batch_norm"), C).double()
    some = [g for g in graphs() if g.num_nodes > 2]
    with pytest.raises(AssertionError, match="alone"):
        assert_alone_equals_batched(lambda d: run(encoder, d).reshape(-1, C), some)


@pytest.mark.parametrize("name", ENCODERS)
def test_state_dict(name):
    data = tokenized(dtype=torch.float32)
    assert_state_dict_roundtrip(lambda: ENCODERS[name](torch.float32), lambda encoder: run(encoder, data))


@pytest.mark.parametrize("name", ENCODERS)
def test_reset_parameters(name):
    encoder = ENCODERS[name](level_emb=3)
    before = {k: v.clone() for k, v in encoder.state_dict().items() if v.dim() > 1}
    encoder.reset_parameters()
    assert before
    assert not any(torch.equal(encoder.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", ["gated", "rwf"])
def test_derivatives(name):
    data, encoder = tokenized(4, 4, num_walks=1, num_repeats=1), ENCODERS[name]()
    check_derivatives(lambda x, e: encoder(x, e, data), (data.x, data.edge_attr))


@pytest.mark.parametrize("name", ["gated", "gine", "rwf"])
def test_autocast(name):
    data, encoder = tokenized(dtype=torch.float32), ENCODERS[name](torch.float32)
    exact = run(encoder, data)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(encoder, data)
    assert (out - exact).abs().max() < 5e-2 * exact.abs().max()


@pytest.mark.parametrize("name", ["gated", "gine", "rwf"])
def test_compile(name):
    data, encoder = tokenized(dtype=torch.float32), ENCODERS[name](torch.float32)
    check_compile(lambda x, e: encoder(x, e, data), (data.x, data.edge_attr))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_device(device, name):
    data, encoder = tokenized(dtype=torch.float32), ENCODERS[name](torch.float32)
    expected = run(encoder, data)
    assert_close(run(encoder.to(device), data.to(device)).cpu(), expected)


# -- what tokens can tell apart ----------------------------------------------------------------------------------------
def alike(graph, **options):
    edges = torch.tensor(list(graph.edges)).t()
    data = Data(
        x=torch.ones(graph.number_of_nodes(), C, dtype=torch.float64),
        edge_index=torch.cat((edges, edges.flip(0)), 1),
        num_nodes=graph.number_of_nodes(),
    )
    return AddWalkTokens(num_walks=1, walks=True, non_backtracking=True, window=4, **options)(data)


PAIRS = {
    "C6 and two C3": (nx.cycle_graph(6), nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3))),
    "CSL(11, 2) and CSL(11, 3)": (nx.circulant_graph(11, [1, 2]), nx.circulant_graph(11, [1, 3])),
}


def apart(encoder, pair, **options):
    """How far the vectors of all tokens of one graph are from those of the other, as sets."""
    one, other = (encoder(d.x, None, d).flatten(0, 1) for d in (alike(graph, **options) for graph in PAIRS[pair]))
    distance = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
    return max(distance.min(0).values.max(), distance.min(1).values.max())


@pytest.mark.parametrize("pair", PAIRS)
def test_check_22_walks_separate_what_refinement_cannot(pair):
    """Regular graphs without features: walks close triangles in one of the two, never in the other."""
    encoder = rwf(edge_dim=None)
    assert apart(encoder, pair, walk_length=4, num_repeats=8) > 1e-6
    assert apart(encoder, pair, walk_length=1, num_repeats=8) < 1e-12  # one step sees no triangle


@pytest.mark.parametrize("pair", PAIRS)
def test_check_22_message_passing_in_one_step_of_one_walk_does_not(pair):
    """These tokens are single edges. Longer walks hold triangles, and then a sum tells them apart."""
    gin = GINConv(nn.Sequential(nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, C)))
    for pooling in ("mean+root", "sum"):
        encoder = MPNNTokenEncoder(gin, C, pooling=pooling).double()
        assert apart(encoder, pair, walk_length=1, num_repeats=8) < 1e-12
        assert apart(encoder, pair, walk_length=4, num_repeats=8) > 1e-6


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mpnn(pooling="max"), "pooling is 'max', but must be one of 'mean', 'sum', 'root', 'mean.root'"),
        (lambda: MPNNTokenEncoder([], C), "convs is empty"),
        (lambda: mpnn(chunk_size=0), "chunk_size is 0"),
        (lambda: mpnn(level_emb=-1), "level_emb is -1"),
        (lambda: rwf(kernel_size=4), "kernel_size is 4, but must be odd"),
        (lambda: rwf(window=0), "window is 0"),
        (lambda: rwf(edge_dim=0), "edge_dim is 0"),
        (lambda: rwf(num_root_tokens=-1), "num_root_tokens is -1"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_wrong_inputs():
    data = tokenized()
    with pytest.raises(ValueError, match=r"tokens has no token_node_id: make them with geo\.transforms\.AddWalkTokens"):
        mpnn()(data.x, data.edge_attr, Data(x=data.x))
    with pytest.raises(ValueError, match=r"tokens has no walk_nodes: .*walks=True"):
        rwf()(data.x, data.edge_attr, tokenized(walks=False))
    with pytest.raises(ValueError, match="tokens are 49, but must be as many for each of the 6 nodes"):
        mpnn()(data.x[1:], data.edge_attr, data)
    with pytest.raises(ValueError, match=r"convs return shape \(\d+, 4\), but must return \(\.\.\., 6\)"):
        MPNNTokenEncoder(GCNConv(C, C), 6).double()(data.x, None, data)
    with pytest.raises(ValueError, match="level_emb is 4, but 7 tokens less 1 for the root are no multiple"):
        mpnn(level_emb=4)(data.x, data.edge_attr, data)
    with pytest.raises(ValueError, match="level_emb is 2, but the longest walk has 3 steps"):
        rwf(level_emb=2)(data.x, data.edge_attr, data)
    with pytest.raises(ValueError, match="num_root_tokens is 0, but each node has 1 tokens without walks"):
        rwf(num_root_tokens=0)(data.x, data.edge_attr, data)
    with pytest.raises(ValueError, match="window is 5, but walk_adjacency was stored for 4"):
        rwf(window=5)(data.x, data.edge_attr, data)
    with pytest.raises(ValueError, match=r"walk_nodes has shape \(7, 6, 2, 4\), but must be \(6, s \* m, M, m \+ 1\)"):
        rwf()(data.x[1:], data.edge_attr, data)
    with pytest.raises(ValueError, match="edge_attr is None, but edge_dim is 3"):
        rwf()(data.x, None, data)
    with pytest.raises(ValueError, match=r"edge_attr has shape \(\d+, 2\), but must be \(\|E\|, 3\)"):
        rwf()(data.x, data.edge_attr[:, 1:], data)
    with pytest.raises(ValueError, match=r"x has shape \(7, 3\), but must be \(\|V\|, 4\)"):
        rwf()(data.x[:, 1:], data.edge_attr, data)


def test_batches_of_what_the_transform_makes():
    batch = Batch.from_data_list(graphs())
    assert run(rwf(), batch).shape == run(mpnn(), batch).shape == (batch.num_nodes, 7, 5)


def test_repr():
    assert "(convs): ModuleList" in repr(mpnn())
    assert repr(mpnn()).startswith("MPNNTokenEncoder(\n  4, 5, pooling='mean+root', level_emb=0")
    assert repr(rwf()).startswith("RWFTokenEncoder(\n  4, 5, edge_dim=3, window=4, kernel_size=5, level_emb=0")
