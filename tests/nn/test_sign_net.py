from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv

from geo.nn import EigenvectorPE, SignNet
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)


def spectrum(num_nodes, edges):
    adj = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    adj[edges[0], edges[1]] = 1
    return torch.linalg.eigh(adj.sum(1).diag() - adj)


def graph(num_nodes=7, k=None, seed=0):
    """A random graph with the first k eigenpairs of its Laplacian (all: None), flat."""
    g = torch.Generator().manual_seed(seed)
    upper = torch.rand(num_nodes, num_nodes, generator=g).triu(1) > 0.5
    edges = (upper | upper.t()).nonzero().t()
    eigvals, eigvecs = spectrum(num_nodes, edges)
    k = num_nodes if k is None else k
    weight = torch.rand(edges.size(1), generator=g, dtype=torch.float64) + 0.5
    return Data(
        eigvals=eigvals[:k], eigvecs=eigvecs[:, :k].flatten(), edge_index=edges, weight=weight, num_nodes=num_nodes
    )


def padded(graphs, k=None, fill=0.0):
    """eigvals [B, K], eigvecs [N, K], edge_index, batch, eig_mask, edge_weight of graphs with spectra of any width."""
    k = max([g.eigvals.numel() for g in graphs], default=0) if k is None else k
    eigvals = torch.full((len(graphs), k), fill, dtype=torch.float64)
    eigvecs = torch.full((sum(g.num_nodes for g in graphs), k), fill, dtype=torch.float64)
    mask = torch.zeros(len(graphs), k, dtype=torch.bool)
    edges, weight, batch, start = [], [], [], 0
    for i, g in enumerate(graphs):
        width = g.eigvals.numel()
        eigvals[i, :width] = g.eigvals
        eigvecs[start : start + g.num_nodes, :width] = g.eigvecs.view(g.num_nodes, width)
        mask[i, :width] = True
        edges.append(g.edge_index + start)
        weight.append(g.weight)
        batch += [i] * g.num_nodes
        start += g.num_nodes
    return eigvals, eigvecs, torch.cat(edges, 1), torch.tensor(batch, dtype=torch.int64), mask, torch.cat(weight)


def run(module, batch):
    graphs = batch.to_data_list() if isinstance(batch, Batch) else [batch]
    return module(*padded(graphs))


def modules(out=3, **kwargs):
    return [
        SignNet(out, phi_hidden=8, phi_layers=3, rho_hidden=8, **kwargs).double(),
        SignNet(out, k=5, phi_hidden=8, phi_layers=2, phi_channels=4, rho_hidden=8, **kwargs).double(),
        EigenvectorPE(out, 5, num_layers=2, **kwargs).double().eval(),
    ]


everyone = pytest.mark.parametrize("which", [0, 1, 2], ids=["sum", "concat", "eigenvectors"])
both = pytest.mark.parametrize("which", [0, 1], ids=["sum", "concat"])


class Plain(nn.Module):
    """SignNet for one graph, with PyG's GIN and a loop over eigenvectors, with the weights of ours."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.convs = nn.ModuleList(GINConv(mlp, train_eps=True) for mlp in module.phi.mlps)
        for conv, eps in zip(self.convs, module.phi.eps, strict=True):
            conv.eps = nn.Parameter(eps.detach().clone().squeeze(0))

    def phi(self, x, edge_index):
        for conv, norm in zip(self.convs, self.module.phi.norms, strict=True):
            x = norm(conv(x, edge_index))
        return x

    def forward(self, eigvals, eigvecs, edge_index):
        parts = []
        for lam, v in zip(eigvals, eigvecs.t(), strict=True):
            lam = lam.expand_as(v)
            parts += [sum(self.phi(torch.stack((x, lam), 1), edge_index) for x in (v, -v))]
        return parts


@both
def test_equals_a_loop_over_eigenvectors(which):
    module = modules()[which]
    with torch.no_grad():
        for eps in module.phi.eps:
            eps.copy_(torch.randn(1))
    plain = Plain(module)  # draws the weights of the MLPs anew
    graphs = [graph(7), graph(3, seed=1), graph(6, k=2, seed=2)]
    out = []
    for g in graphs:
        g.edge_index = g.edge_index[:, (g.edge_index[0] + 2 * g.edge_index[1]) % 3 != 1]  # some in one direction only
        parts = plain(g.eigvals, g.eigvecs.view(g.num_nodes, -1), g.edge_index)
        if module.k is None:
            z = sum(parts)
        else:
            parts = (parts + [torch.zeros_like(parts[0])] * module.k)[: module.k]
            z = torch.cat(parts, 1)
        out.append(module.rho(z))
    args = padded(graphs)[:5]
    assert_close(module(*args), torch.cat(out))
    assert_close(module(graphs[0].eigvals[None], graphs[0].eigvecs.view(7, 7), graphs[0].edge_index), out[0])


def test_plain_eigenvectors_by_hand():
    pe = EigenvectorPE(4, 2).double().eval()
    with torch.no_grad():
        pe.mlp.lins[0].weight.copy_(torch.eye(4))
        pe.mlp.lins[0].bias.zero_()
    eigvals, eigvecs = torch.tensor([[0.5, 2.0, 3.0], [7.0, 9.0, 9.0]]), torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    edges, batch = torch.empty(2, 0, dtype=torch.int64), torch.tensor([1, 0])
    out = pe(eigvals, eigvecs, edges, batch, mask)
    assert out.tolist() == [[0, 0, 7, 0], [3, 4, 0.5, 2]]
    narrow = pe(eigvals[:, :1], eigvecs[:, :1], edges, batch)
    assert narrow.tolist() == [[0, 0, 7, 0], [3, 0, 0.5, 0]]


@both
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", None])
def test_signs_are_not_seen_at_all(which, norm):
    module = modules(norm=norm)[which].eval()
    for dtype in (torch.float64, torch.float32):
        eigvals, eigvecs, *rest = padded([graph(7), graph(3, seed=1)])
        signs = torch.where(torch.rand_like(eigvals) < 0.5, -1.0, 1.0)
        flipped = eigvecs * signs[rest[1]]
        assert not torch.equal(flipped, eigvecs)
        module = module.to(dtype)
        assert torch.equal(module(eigvals, eigvecs, *rest), module(eigvals, flipped, *rest))


def test_plain_eigenvectors_see_signs():  # what the test above would find
    pe = modules()[2]
    eigvals, eigvecs, *rest = padded([graph(7)])
    assert not torch.allclose(pe(eigvals, eigvecs, *rest), pe(eigvals, -eigvecs, *rest), atol=1e-3)


def test_signs_are_drawn_for_each_graph_and_eigenvector_in_training_only():
    pe = EigenvectorPE(4, 4, use_eigvals=False).double()
    with torch.no_grad():
        pe.mlp.lins[0].weight.copy_(torch.eye(4))
        pe.mlp.lins[0].bias.zero_()
    args = padded([graph(5, seed=s) for s in range(40)])
    v, batch = args[1][:, :4], args[3]
    ratio = pe.train()(*args) / v
    sign = torch.stack([ratio[batch == i].nanmean(0) for i in range(40)])
    assert_close(sign.abs(), torch.ones(40, 4))
    assert_close(ratio.nan_to_num(1.0), torch.where(v == 0, 1.0, sign[batch]))
    assert 0.3 < (sign > 0).double().mean() < 0.7
    assert not torch.equal(pe(*args), pe(*args))
    assert_close(pe.eval()(*args), v)
    pe.random_sign = False
    assert_close(pe.train()(*args), v)


@everyone
def test_permutation(which):
    module = modules()[which]
    d = graph(7, k=6)
    d.eigvals, d.eigvecs = d.eigvals[None], d.eigvecs.view(7, 6)

    def fn(d):
        return module(d.eigvals, d.eigvecs, d.edge_index, None, None, d.weight)

    assert_permutation_equivariant(fn, d)


@everyone
def test_alone_equals_batched(which):
    module = modules()[which]
    graphs = [graph(7), graph(0), graph(1), graph(3, seed=4), graph(8, k=3, seed=5)]
    assert_alone_equals_batched(lambda batch: run(module, batch), graphs)


@everyone
def test_padding_is_never_read(which):
    module = modules()[which]
    graphs = [graph(7), graph(3, seed=1)]
    expected = module(*padded(graphs))
    assert torch.equal(module(*padded(graphs, fill=float("nan"))), expected)
    assert_close(module(*padded(graphs, k=11, fill=float("nan"))), expected)


@both
def test_no_mask_is_a_full_mask(which):
    module = modules()[which]
    args = padded([graph(6), graph(6, seed=1)])
    assert args[4].all()
    assert torch.equal(module(*args[:4], None, args[5]), module(*args))


@both
def test_batch_in_any_order(which):
    module = modules()[which]
    eigvals, eigvecs, edges, batch, mask, weight = padded([graph(5), graph(4, seed=1)])
    perm = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    expected = module(eigvals, eigvecs, edges, batch, mask, weight)[perm]
    assert_close(module(eigvals, eigvecs[perm], perm.argsort()[edges], batch[perm], mask, weight), expected)


@everyone
@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0, 2], [1, 1]])
def test_small_graphs(which, sizes):
    module = modules()[which]
    if not sizes:
        edges = torch.empty(2, 0, dtype=torch.int64)
        out = module(torch.empty(0, 0), torch.empty(0, 0), edges, torch.empty(0, dtype=torch.int64))
    else:
        out = run(module, Batch.from_data_list([graph(n) for n in sizes]))
    assert out.shape == (sum(sizes), 3)
    assert out.isfinite().all()


@everyone
def test_no_eigenvector_at_all(which):
    module = modules()[which]
    eigvals, eigvecs, edges, batch, mask, _ = padded([graph(5), graph(4, seed=1)])
    none = module(eigvals, eigvecs, edges, batch, torch.zeros_like(mask))
    assert_close(none, none[:1].expand_as(none))
    assert_close(module(eigvals[:, :0], eigvecs[:, :0], edges, batch), none)


def test_eigenvalues_and_weights_are_read_where_asked():
    eigvals, eigvecs, edges, batch, mask, weight = padded([graph(6)])
    for seen in (True, False):
        module = SignNet(3, use_eigvals=seen).double()
        out = module(eigvals, eigvecs, edges, batch, mask, weight)
        assert torch.equal(out, module(eigvals + 1, eigvecs, edges, batch, mask, weight)) != seen
        assert not torch.allclose(out, module(eigvals, eigvecs, edges, batch, mask))
        pe = EigenvectorPE(3, 4, use_eigvals=seen).double().eval()
        assert torch.equal(pe(eigvals, eigvecs, edges), pe(eigvals + 1, eigvecs, edges)) != seen


def test_another_basis_of_an_eigenspace_is_seen():
    ring = torch.arange(8)
    edges = torch.cat((torch.stack((ring, ring.roll(1))), torch.stack((ring.roll(1), ring))), 1)
    eigvals, eigvecs = spectrum(8, edges)
    turn = torch.eye(8, dtype=torch.float64)
    turn[1:3, 1:3] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert_close(eigvals[1], eigvals[2])
    module = modules()[0]
    assert (module(eigvals[None], eigvecs, edges) - module(eigvals[None], eigvecs @ turn, edges)).abs().max() > 1e-6


@both
def test_derivatives(which):
    module = modules(act="tanh")[which]
    eigvals, eigvecs, edges, batch, mask, weight = padded([graph(4), graph(2, seed=1)])
    names = [name for name, p in module.named_parameters() if p.numel() < 40]

    def fn(weight, *values):
        params = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, params, (eigvals, eigvecs, edges, batch, mask, weight))

    check_derivatives(fn, [weight, *(module.get_parameter(name).detach() for name in names)], second=False)


@everyone
def test_every_parameter_learns(which):
    module = modules()[which]
    module(*padded([graph(7), graph(4, seed=1)])).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@everyone
def test_state_dict_roundtrip(which):
    args = padded([graph(7), graph(3, seed=1)])
    assert_state_dict_roundtrip(lambda: modules()[which], lambda module: module(*args))


@everyone
def test_copies_and_new_weights(which):
    module, args = modules()[which], padded([graph(7)])
    expected = module(*args)
    assert torch.equal(copy.deepcopy(module)(*args), expected)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.5)
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(not p.any() for name, p in module.named_parameters() if ".eps." in name)
    fresh = module(*args)
    assert fresh.std() > 1e-3
    torch.manual_seed(3)
    module.reset_parameters()
    assert torch.equal(module(*args), fresh)


@everyone
def test_autocast(which):
    module = modules()[which].float()
    args = padded([graph(7), graph(3, seed=1)])
    expected = module(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*args)
    assert out.dtype == torch.bfloat16
    assert_close(out, expected, 4)  # a chain of layers, each rounded


@everyone
def test_noncontiguous(which):
    module = modules()[which]
    eigvals, eigvecs, *rest = padded([graph(7), graph(3, seed=1)])
    assert torch.equal(module(eigvals.t().contiguous().t(), eigvecs.t().contiguous().t(), *rest),
                       module(eigvals, eigvecs, *rest))  # fmt: skip


@everyone
def test_compile(which):
    module = modules()[which]
    args = padded([graph(6), graph(6, seed=1)])
    check_compile(lambda weight: module(*args[:4], None, weight), [args[5]])


@pytest.mark.slow
@both
def test_compile_with_a_mask(which):  # the number of eigenvectors in all is data: a break, and the same result
    module = modules()[which]
    args = padded([graph(6), graph(3, seed=1)])
    assert_close(torch.compile(module, backend="aot_eager")(*args), module(*args))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"k": 0}, "k is 0"),
        ({"phi_layers": 0}, "phi_layers is 0"),
        ({"phi_hidden": 2.0}, "phi_hidden is 2.0"),
        ({"norm": "graph"}, "norm is 'graph'"),
        ({"act": "sin"}, "act is 'sin'"),
    ],
)
def test_bad_options(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SignNet(3, **kwargs)


def test_bad_options_of_eigenvectors():
    with pytest.raises(ValueError, match="k is 0"):
        EigenvectorPE(3, 0)
    with pytest.raises(ValueError, match="norm is 'x'"):
        EigenvectorPE(3, 2, num_layers=2, norm="x")


@everyone
def test_bad_inputs(which):
    module = modules()[which]
    eigvals, eigvecs, edges, batch, mask, weight = padded([graph(4), graph(3, seed=1)])
    good = {
        "eigvals": eigvals, "eigvecs": eigvecs, "edge_index": edges, "batch": batch, "eig_mask": mask,
        "edge_weight": weight,
    }  # fmt: skip
    module(**good)
    for bad, match in [
        ({"eigvals": eigvals[0]}, r"eigvals is .*\(4,\)"),
        ({"eigvals": eigvals[:, :2]}, "eigvals is"),
        ({"eigvals": eigvals.long()}, "eigvals is torch.int64"),
        ({"eigvecs": eigvecs[:, 0]}, "eigvecs is"),
        ({"eigvecs": eigvecs.clone().requires_grad_()}, "eigvecs requires a gradient"),
        ({"eigvals": eigvals.clone().requires_grad_()}, "eigvals requires a gradient"),
        ({"edge_index": edges[0]}, "edge_index is"),
        ({"edge_index": edges.int()}, "edge_index is torch.int32"),
        ({"batch": None}, "eigvals has 2 graphs"),
        ({"batch": batch[:3]}, "batch is"),
        ({"batch": batch.float()}, "batch is torch.float32"),
        ({"eig_mask": mask[:1]}, "eig_mask is"),
        ({"eig_mask": mask.double()}, "eig_mask is torch.float64"),
        ({"edge_weight": weight[:1]}, "edge_weight has shape"),
    ]:
        with pytest.raises(ValueError, match=match):
            module(**{**good, **bad})
    with pytest.raises(IndexError):
        module(**{**good, "batch": batch + 1})


@both
def test_edges_between_graphs_carry_what_both_have(which):
    module = modules()[which]
    eigvals, eigvecs, edges, batch, mask, _ = padded([graph(4), graph(3, k=1, seed=1)])
    wide = torch.cat((edges, torch.tensor([[0, 5], [5, 1]])), 1)
    first = torch.arange(mask.size(1)) < 1
    masked = module(eigvals, eigvecs, wide, batch, mask & first)
    assert module(eigvals, eigvecs, wide, batch, mask).isfinite().all()
    assert not torch.allclose(masked, module(eigvals, eigvecs, edges, batch, mask & first))


@both
def test_edges_out_of_range(which):
    module = modules()[which]
    eigvals, eigvecs, edges, batch, mask, weight = padded([graph(4), graph(3, seed=1)])
    for off in (7, -1):
        bad = edges.clone()
        bad[0, 0] = off
        with pytest.raises(IndexError):
            module(eigvals, eigvecs, bad, batch, mask, weight)


def test_repr():
    assert repr(SignNet(3)).startswith("SignNet(3, k=None, phi_hidden=64")
    assert repr(EigenvectorPE(3, 5)).startswith("EigenvectorPE(3, k=5")
