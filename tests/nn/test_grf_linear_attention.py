from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv
from torch_geometric.transforms import Compose

from geo.kernels import FeatureMap, GRFKernel, SparseFeatures, heat, inverse_cosine, normalized_adjacency
from geo.nn import GPSGlobalConv, GRFLinearAttention, LearnableModulation
from geo.nn.grf_linear_attention import masked_linear_attention
from geo.ops import grf_walks
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)
from geo.transforms import AddGRF, read_grf

C = 8


def graph(num_nodes=10, num_edges=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(max(1, num_nodes), (2, num_edges), generator=generator)
    weight = torch.rand(num_edges, generator=generator, dtype=dtype)
    return Data(
        x=torch.randn(num_nodes, C, generator=generator, dtype=dtype),
        edge_index=torch.cat((edges, edges.flip(0)), 1),
        edge_weight=weight.repeat(2),
        num_nodes=num_nodes,
    )


def graphs(sizes=((0, 0), (1, 0), (1, 2), (3, 4), (20, 30))):
    return [graph(n, e, seed=i) for i, (n, e) in enumerate(sizes)]


def run(layer, data, **kwargs):
    return layer(data.x, data.edge_index, data.get("batch"), data.edge_weight, **kwargs)


def dense(layer, x, psi1, psi2):
    """The formula with the attention and the mask written out."""
    n = x.size(0)
    q, k, v = (lin(x).view(n, layer.heads, -1) for lin in (layer.lin_q, layer.lin_k, layer.lin_v))
    attention = torch.einsum("ihr,jhr->hij", layer._map(q), layer._map(k)) * (psi1 @ psi2.t())
    if layer.normalize:
        attention = attention / attention.sum(-1, keepdim=True)
    return layer.lin_out(torch.einsum("hij,jhd->ihd", attention, v).flatten(1))


# -- oracle ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("two_sets", [True, False])
@pytest.mark.parametrize(("heads", "feature_map"), [(1, "elu"), (2, "relu"), (4, "softmax"), (2, torch.exp)])
def test_oracle_9_equals_the_dense_masked_formula(heads, feature_map, two_sets, normalize):
    layer = GRFLinearAttention(C, heads, feature_map, two_sets=two_sets, normalize=normalize).double()
    data = graph()
    walks = layer.sample(data.edge_index, 10, None, data.edge_weight, torch.float64)
    psi = [walk(layer.modulation()).to_dense() for walk in walks]
    assert torch.equal(*psi) != two_sets
    assert_close(run(layer, data), dense(layer, data.x, *psi))
    assert_close(run(layer, data, walks=walks), dense(layer, data.x, *psi))


@pytest.mark.parametrize("chunk", [1, 40, 200, 500, 10**6])
def test_oracle_9_chunks_are_the_whole(chunk):
    layer, data = GRFLinearAttention(C, 2).double(), graph()
    psi = [walk(layer.modulation()) for walk in layer.sample(data.edge_index, 10, dtype=torch.float64)]
    values = [psi[k].value.detach().requires_grad_() for k in (0, 1)]
    inputs = [torch.rand(10, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def attend(chunk):
        features = [phi.with_value(value) for phi, value in zip(psi, values, strict=True)]
        return masked_linear_attention(*inputs, *features, chunk=chunk)

    q, k, v = inputs
    attention = torch.einsum("ihr,jhr->hij", q, k) * (psi[0].to_dense() @ psi[1].to_dense().t())
    expected = torch.einsum("hij,jhd->ihd", attention / attention.sum(-1, keepdim=True), v)
    out = attend(chunk)
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs + values, cotangent)
    assert_close(grads, torch.autograd.grad(attend(10**6), inputs + values, cotangent))
    with torch.no_grad():
        assert_close(attend(chunk), expected)


def test_chunks_bound_memory():
    """What one array holds is below the chunk, in the backward pass too."""
    n, heads, width = 64, 2, 16
    eye = torch.arange(n + 1)
    psi = SparseFeatures(eye, eye[:-1], torch.ones(n), n)
    largest = []
    inputs = [torch.rand(n, heads, width).requires_grad_() for _ in range(3)]

    def keep(tensor):
        largest.append(tensor.numel())
        return tensor

    for chunk in (1 << 12, 1 << 30):
        largest.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = masked_linear_attention(*inputs, psi, psi, chunk=chunk)
        out.sum().backward()
        assert (max(largest) <= 1 << 12) == (chunk == 1 << 12)


def test_the_mask_becomes_the_kernel():
    """With many walks the layer is attention under the exact kernel."""
    data = graph(dtype=torch.float32)
    layer = GRFLinearAttention(C, 2, modulation=LearnableModulation(12, "heat", heat(2.0)), num_walks=1 << 11)
    exact = GRFKernel(data.edge_index, heat(2.0), data.edge_weight, 10).exact()
    expected = dense(layer, data.x, exact, torch.eye(10))
    few = GRFLinearAttention(C, 2, modulation=layer.modulation, num_walks=2)
    few.load_state_dict(layer.state_dict())
    assert (run(layer, data) - expected).abs().max() < 0.05
    assert (run(few, data) - expected).abs().max() > 0.1


def test_directed_graphs_attend_along_their_edges():
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    layer = GRFLinearAttention(C, num_walks=64)
    x = torch.randn(4, C, requires_grad=True)
    for i in range(4):
        (grad,) = torch.autograd.grad(layer(x, edges)[i].sum(), x)
        assert grad.abs().sum(1).gt(0).tolist() == [j >= i for j in range(4)]


def test_isolated_nodes_see_themselves():
    data = graph(6, 0)
    layer = GRFLinearAttention(C, 2).double()
    assert_close(run(layer, data), layer.lin_out(layer.lin_v(data.x)))


def test_a_denominator_that_underflows_gives_zero():
    layer = GRFLinearAttention(C, bias=False)
    with torch.no_grad():
        layer.lin_q.weight.zero_()
        layer.lin_q.weight[0] = -1e4
    layer._map = torch.relu
    x = torch.rand(3, C).requires_grad_()
    out = layer(x, torch.zeros(2, 0, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(3, C))
    out.sum().backward()
    assert bool(x.grad.isfinite().all())


NEGATIVE = r"the denominator has -\d.*, but must not be negative: feature_map, the values of walks and edge weights"


def test_negative_denominators_are_refused():
    data = graph(dtype=torch.float32)
    layer = GRFLinearAttention(C, 2)
    matrix = normalized_adjacency(data.edge_index, None, 10)
    first, second = (grf_walks(*matrix, num_walks=8, seed=0, first_walk=8 * k, max_length=8) for k in (0, 1))
    walks = (first._replace(value=-first.value), second)
    with pytest.raises(ValueError, match=NEGATIVE):
        layer(data.x, data.edge_index, walks=walks)
    with pytest.raises(ValueError, match=NEGATIVE):
        run(GRFLinearAttention(C, 2, torch.tanh), data)
    free = GRFLinearAttention(C, 2, torch.tanh, normalize=False)
    assert bool(run(free, data).isfinite().all())


def test_negative_denominators_give_zero_in_compiled_layers():
    eye = torch.arange(4)
    psi = SparseFeatures(eye, eye[:-1], torch.ones(3), 3)
    torch.compiler.reset()
    compiled = torch.compile(masked_linear_attention, backend="aot_eager")
    q, k, v = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1), torch.ones(3, 1, 1), torch.full((3, 1, 2), 5.0)
    out = compiled(q, k, v, psi, psi)
    assert out.flatten().tolist() == [5.0, 5.0, 0.0, 0.0, 0.0, 0.0]


def test_nan_stays_nan():
    data = graph(3, 0)
    data.x[1, 0] = math.nan
    assert run(GRFLinearAttention(C).double(), data).isnan().all(1).tolist() == [False, True, False]


# -- laws --------------------------------------------------------------------------------------------------------------
def test_permutation_with_the_walks_given():
    """Walks under keys that move with their nodes."""
    layer, data = GRFLinearAttention(C, 2, coupling="antithetic").double(), graph()
    data.key = torch.arange(10)
    lengths = layer.modulation.max_length

    def attend(d):
        matrix = normalized_adjacency(d.edge_index, d.edge_weight, 10)
        options = {"num_walks": 8, "seed": 1, "coupling": "antithetic", "choice": "rendezvous", "max_length": lengths}
        walks = [grf_walks(*matrix, node_key=d.key, first_walk=8 * k, **options) for k in (0, 1)]
        return run(layer, d, walks=tuple(walks))

    assert_permutation_equivariant(attend, data)
    with pytest.raises(AssertionError, match="permutation"):
        assert_permutation_equivariant(lambda d: run(layer, d), data)


def test_alone_equals_batched():
    layer = GRFLinearAttention(C, 2).double()
    assert_alone_equals_batched(lambda d: run(layer, d), graphs())
    with pytest.raises(AssertionError, match="alone"):
        assert_alone_equals_batched(lambda d: layer(d.x, d.edge_index, None, d.edge_weight), graphs())


def test_batches_need_not_be_sorted():
    layer, some = GRFLinearAttention(C, 2).double(), graphs()
    data = Batch.from_data_list(some)
    order = torch.randperm(data.num_nodes)
    graph_of = data.batch[order]
    order = order[graph_of.sort(stable=True).indices.sort().indices]  # mixed, but in order inside each graph
    within = torch.empty_like(order)
    for b in range(len(some)):
        within[graph_of == b] = (data.batch == b).nonzero().flatten()
    place = torch.empty_like(within)
    place[within] = torch.arange(data.num_nodes)
    out = layer(data.x[within], place[data.edge_index], graph_of, data.edge_weight)
    assert_close(out, run(layer, data)[within])


def test_empty_and_single():
    layer = GRFLinearAttention(C).double()
    for n in (0, 1):
        assert run(layer, graph(n, 0)).shape == (n, C)
    assert layer(torch.randn(2, C).double(), torch.zeros(2, 0, dtype=torch.int64), torch.tensor([3, 3])).shape == (2, C)


def test_derivatives():
    layer, data = GRFLinearAttention(4, 2, modulation=LearnableModulation(3, positive=True), num_walks=4), graph(5, 6)
    layer = layer.double()
    walks = layer.sample(data.edge_index, 5, dtype=torch.float64)
    names = ["modulation.raw", "lin_q.weight", "lin_v.bias"]
    state = dict(layer.named_parameters())

    def attend(x, *values):
        module = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, module, (x, data.edge_index), {"walks": walks})

    check_derivatives(attend, [data.x[:, :4], *(state[name].detach() for name in names)])


def test_every_parameter_gets_a_gradient():
    layer, data = GRFLinearAttention(C, 2).double(), graph()
    run(layer, data).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert bool(parameter.grad.abs().sum() > 0), name


def test_edge_weights_on_request():
    layer, data = GRFLinearAttention(4, 2, num_walks=2, coupling="antithetic").double(), graph(4, 4)

    def attend(half):
        return layer(data.x[:, :4], data.edge_index, None, half.repeat(2))

    check_derivatives(attend, [data.edge_weight[:4] + 0.5])


def test_learns_whom_to_listen_to():
    """A target that is an average over the graph's neighbourhoods: only the modulation of the mask can tell."""
    data = graph(30, 45, dtype=torch.float32)
    kernel = GRFKernel(data.edge_index, heat(6.0), num_nodes=30).exact()
    target = (kernel / kernel.sum(1, keepdim=True)) @ data.x
    layer = GRFLinearAttention(C, modulation=LearnableModulation(16, "heat", heat(0.5)), num_walks=256)
    with torch.no_grad():
        for lin in (layer.lin_q, layer.lin_k):
            lin.weight.zero_()
        layer.lin_v.weight.copy_(torch.eye(C))
        layer.lin_out.weight.copy_(torch.eye(C))
        for lin in (layer.lin_q, layer.lin_k, layer.lin_v, layer.lin_out):
            lin.bias.zero_()
    walks = layer.sample(data.edge_index, 30)
    optimizer = torch.optim.Adam(layer.modulation.parameters(), 0.1)
    for _ in range(80):
        loss = (layer(data.x, data.edge_index, walks=walks) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert layer.modulation.hyperparameters()["t"] == pytest.approx(6.0, rel=0.15)


def test_autocast():
    layer, data = GRFLinearAttention(C, 2), graph(20, 30, dtype=torch.float32)
    exact = run(layer, data)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(layer, data)
    assert (out - exact).abs().max() < 3e-2 * exact.abs().max()


def test_half_precision():
    layer, data = GRFLinearAttention(C, 2), graph(20, 30, dtype=torch.float32)
    exact = run(layer, data)
    out = layer.to(torch.bfloat16)(data.x.bfloat16(), data.edge_index, None, data.edge_weight)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 5e-2 * exact.abs().max()


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_walks_given(dynamic):
    layer, data = GRFLinearAttention(C, 2), graph(dtype=torch.float32)
    walks = layer.sample(data.edge_index, 10)
    check_compile(lambda x: layer(x, data.edge_index, walks=walks), (data.x,), dynamic=dynamic)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compile():
    """The walks break the graph, as their number is data."""
    layer, data = GRFLinearAttention(C, 2), graph(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        out = run(module, data)
        out.square().sum().backward()
        results.append([out, *(p.grad.clone() for p in layer.parameters())])
    assert_close(results[1], results[0])


def test_state_dict():
    data = graph(dtype=torch.float32)
    assert_state_dict_roundtrip(lambda: GRFLinearAttention(C, 2), lambda layer: run(layer, data))
    assert GRFLinearAttention(C).state_dict()["seed"] != GRFLinearAttention(C).state_dict()["seed"]


def test_reset_parameters():
    layer, data = GRFLinearAttention(C, 2), graph(dtype=torch.float32)
    before = {k: v.clone() for k, v in layer.state_dict().items() if not k.startswith("modulation")}
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        layer.reset_parameters()
        outputs.append(run(layer, data))
    assert torch.equal(*outputs)
    assert len(before) == 9
    assert not any(torch.equal(layer.state_dict()[k], v) for k, v in before.items())


def test_every_device(device):
    layer, data = GRFLinearAttention(C, 2), graph(dtype=torch.float32)
    expected = run(layer, data)
    assert_close(run(layer.to(device), data.to(device)).cpu(), expected)


# -- walks -------------------------------------------------------------------------------------------------------------
def test_fixed_resampled_and_fresh_walks():
    data = graph()
    layer = GRFLinearAttention(C, 2).double()
    first = run(layer, data)
    assert torch.equal(run(layer, data), first)
    layer.resample(torch.Generator().manual_seed(1))
    second = run(layer, data)
    assert not torch.allclose(second, first)
    layer.resample(torch.Generator().manual_seed(1))
    assert torch.equal(run(layer, data), second)
    fresh = GRFLinearAttention(C, 2, fresh_walks=True).double()
    fresh.load_state_dict(layer.state_dict())
    assert not torch.allclose(run(fresh, data), run(fresh, data))
    fresh.eval()
    assert torch.equal(run(fresh, data), second)


def test_cached_walks():
    data = graph()
    layer = GRFLinearAttention(C, 2, cached=True).double()
    first = run(layer, data)
    assert torch.equal(layer(data.x, data.edge_index[:, :0]), first)
    loose = GRFLinearAttention(C, 2).double()
    loose.load_state_dict(layer.state_dict())
    assert torch.equal(run(loose, data), first)
    with torch.no_grad():
        layer.modulation.raw += 1
    assert not torch.allclose(run(layer, data), first)
    assert layer.float()(data.x.float(), data.edge_index).dtype == torch.float32
    layer.double().reset_parameters()
    assert_close(run(layer, graph(6, 0)), layer.lin_out(layer.lin_v(graph(6, 0).x)))
    with pytest.raises(ValueError, match="walks are those of 6 nodes, but x has 10; cached=True is for one graph"):
        run(layer, data)
    weight = data.edge_weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="edge_weight requires grad, but cached=True"):
        layer(data.x, data.edge_index, None, weight)


def test_cached_walks_of_a_checkpoint():
    """A layer that has run before it is loaded is the one that was saved."""
    data = graph()
    layer, other = (GRFLinearAttention(C, 2, cached=True).double() for _ in range(2))
    expected = run(layer, data)
    assert not torch.allclose(run(other, data), expected)
    holder = nn.ModuleList([other])
    holder.load_state_dict({f"0.{name}": value for name, value in layer.state_dict().items()})
    assert torch.equal(run(other, data), expected)


def test_walks_given():
    data = graph()
    layers = [GRFLinearAttention(C, 2).double() for _ in range(2)]
    walks = layers[0].sample(data.edge_index, 10, None, data.edge_weight, torch.float64)
    assert torch.equal(run(layers[0], data, walks=walks), run(layers[0], data))
    layers[1].seed.copy_(layers[0].seed)
    assert torch.equal(run(layers[1], data, walks=walks), run(layers[1], data))
    features = tuple(walk(layers[0].modulation()) for walk in walks)
    assert torch.equal(run(layers[0], data, walks=features), run(layers[0], data))
    matrix = normalized_adjacency(data.edge_index, data.edge_weight, 10)
    options = {"num_walks": 8, "seed": int(layers[0].seed), "max_length": 8}
    deposits = tuple(grf_walks(*matrix, first_walk=8 * k, **options) for k in (0, 1))
    assert torch.equal(run(layers[0], data, walks=deposits), run(layers[0], data))
    assert isinstance(walks[0], FeatureMap)


def test_walks_of_a_dataset():
    """Drawn by transforms before batching, they are those that the layer draws."""
    layer = GRFLinearAttention(C, 2).double()
    options = {"num_walks": 8, "max_length": 8, "seed": int(layer.seed), "dtype": torch.float64}
    add = Compose([AddGRF(**options), AddGRF(**options, attr_name="second", first_walk=8)])
    data = Batch.from_data_list([add(d) for d in graphs()])
    walks = (read_grf(data), read_grf(data, "second"))
    assert_close(layer(data.x, data.edge_index, data.batch, walks=walks), run(layer, data))


def test_as_the_global_module_of_gps():
    options = {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}
    gps = GPSGlobalConv(C, SAGEConv(C, C), GRFLinearAttention(C, 2), **options).double()
    assert_alone_equals_batched(lambda d: gps(d.x, d.edge_index, d.batch), graphs())
    data = graph()
    walks = gps.global_module.sample(data.edge_index, 10, dtype=torch.float64)
    out = gps(data.x, data.edge_index, global_kwargs={"walks": walks})
    assert torch.equal(out, gps(data.x, data.edge_index))
    weighted = gps(data.x, data.edge_index, global_kwargs={"edge_weight": data.edge_weight})
    assert not torch.allclose(weighted, out)
    gps.reset_parameters()
    assert not torch.allclose(gps(data.x, data.edge_index), out)


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_refusals():
    for name in ("channels", "heads", "num_walks"):
        options = {"channels": C, name: 0}
        with pytest.raises(ValueError, match=f"{name} is 0, but must be an integer of at least 1"):
            GRFLinearAttention(**options)
    with pytest.raises(ValueError, match="heads is 3, but must divide channels, which is 8"):
        GRFLinearAttention(C, 3)
    with pytest.raises(ValueError, match="feature_map is 'exp', but must be 'elu', 'relu', 'softmax' or a function"):
        GRFLinearAttention(C, feature_map="exp")
    with pytest.raises(ValueError, match=r"modulation may be negative.*positive=True.*normalize=False"):
        GRFLinearAttention(C, modulation=LearnableModulation(4))
    with pytest.raises(ValueError, match="fresh_walks and cached are both True"):
        GRFLinearAttention(C, fresh_walks=True, cached=True)
    with pytest.raises(ValueError, match="num_walks"):
        GRFLinearAttention(C, num_walks=3)
    with pytest.raises(ValueError, match="p_halt"):
        GRFLinearAttention(C, p_halt=1.0)
    layer, data = GRFLinearAttention(C).double(), graph()
    with pytest.raises(ValueError, match=r"x has shape \(10, 7\), but must be \(\|V\|, 8\)"):
        layer(data.x[:, 1:], data.edge_index)
    with pytest.raises(ValueError, match=r"batch has shape \(3,\), but must be \(10,\)"):
        layer(data.x, data.edge_index, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"edge_weight has -1, but must not be negative"):
        layer(data.x, data.edge_index, None, torch.full_like(data.edge_weight, -1))
    with pytest.raises(ValueError, match="edge_weight"):
        layer(data.x, data.edge_index, None, data.edge_weight[1:])
    walks = grf_walks(*normalized_adjacency(data.edge_index, None, 10), num_walks=2, seed=0)
    with pytest.raises(ValueError, match="walks must be both sets of walks"):
        layer(data.x, data.edge_index, walks=walks)
    longer = GRFLinearAttention(C, modulation=LearnableModulation(9, "heat")).sample(data.edge_index, 10)
    with pytest.raises(
        ValueError, match=r"walks are kept up to length 9, but the modulation has max_length 8: give dep"
    ):
        layer(data.x, data.edge_index, walks=longer)
    negative = LearnableModulation(4, init=inverse_cosine(0.5))
    free = GRFLinearAttention(C, modulation=negative, normalize=False).double()
    assert free(data.x, data.edge_index, None, -data.edge_weight).shape == (10, C)


def test_repr():
    text = repr(GRFLinearAttention(C, 2, nn.Softplus()))
    assert text.startswith("GRFLinearAttention(\n  8, heads=2, feature_map='Softplus', num_walks=8, p_halt=0.5")
    assert "(modulation): LearnableModulation(8, kind='free', positive=True)" in text
