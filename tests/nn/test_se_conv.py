from __future__ import annotations

import itertools

import pytest
import torch
from torch_geometric.data import Data

from geo.nn import ConvNeXtBlock, KernelBasis, PointConv, PoniConv
from geo.nn.kernel_basis import num_polynomial_features, polynomial_features, radial_window
from geo.nn.se_conv import bundle_edges, complete_edges
from geo.o3 import grid_invariants, orientation_points
from geo.testing import (
    assert_alone_equals_batched,
    assert_close,
    assert_permutation_equivariant,
    assert_state_dict_roundtrip,
    check_compile,
    check_derivatives,
)

F64 = torch.float64


def full_edges(num: int) -> torch.Tensor:
    return complete_edges(1, num)


# -- the kernel's basis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "degree"), [(1, 1), (1, 3), (2, 3), (3, 3), (4, 2), (12, 2), (5, 4)])
def test_polynomial_features_are_the_distinct_monomials(dim, degree):
    x = torch.randn(6, dim, dtype=F64)
    expected = [
        torch.stack([x[:, i] for i in factors]).prod(0)
        for k in range(1, degree + 1)
        for factors in itertools.combinations_with_replacement(range(dim), k)
    ]
    features = polynomial_features(x, degree)
    assert features.shape == (6, num_polynomial_features(dim, degree))
    torch.testing.assert_close(features, torch.stack(expected, 1))


def test_three_nine_nineteen():
    assert [num_polynomial_features(d, 3) for d in (1, 2, 3)] == [3, 9, 19]


def test_window_is_twice_differentiable_at_its_end():
    for p in (3, 6, 9):
        x = torch.tensor([1e-9, 2.0 - 1e-6, 2.0, 2.0 + 1e-6, 7.0], dtype=F64, requires_grad=True)
        value = radial_window(x, 2.0, p)
        (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        assert value[0] == 1
        assert value[2:].eq(0).all()
        for derivative in (value, first, second):
            assert derivative[1].abs() < 1e-2
            assert derivative[2:].abs().max() == 0
    x = torch.linspace(0, 1, 101, dtype=F64)
    expected = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    torch.testing.assert_close(radial_window(x, 1.0), torch.where(x < 1, expected, 0.0), rtol=1e-12, atol=1e-12)
    assert (radial_window(x, 1.0).diff() <= 0).all()


def test_basis_shapes_window_and_scale():
    basis = KernelBasis(2, 8, hidden=16, r_max=1.5)
    attr, dist = torch.randn(5, 4, 2), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    out = basis(attr, dist)
    assert out.shape == (5, 4, 8)
    assert out[3:].eq(0).all()
    plain = KernelBasis(2, 8, hidden=16)
    plain.load_state_dict(basis.state_dict())
    torch.testing.assert_close(out, plain(attr) * radial_window(dist, 1.5).view(5, 1, 1))
    torch.testing.assert_close(plain(attr, scale=dist), plain(attr) * dist.view(5, 1, 1))
    with pytest.raises(ValueError, match="dist is needed"):
        basis(attr)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (700, 16), (5000,), (300, 4, 4)])
@pytest.mark.parametrize("scaled", [True, False])
def test_tiles_change_nothing(shape, scaled):
    """Fixed invariants take the tiled path, others the plain one: equal, to the second derivative."""
    basis = KernelBasis(2, 8, hidden=6).double()
    attr = torch.randn(*shape, 2, dtype=F64)
    scale = torch.rand(shape[0], dtype=F64) if scaled else None
    cotangent = torch.randn(*shape, 8, dtype=F64)
    results = []
    for moving in (False, True):
        out = basis(attr.clone().requires_grad_(moving), scale=scale)
        plain = torch.autograd.grad(out, list(basis.parameters()), cotangent, retain_graph=True)
        c = cotangent.clone().requires_grad_()
        first = torch.autograd.grad(out, list(basis.parameters()), c, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(loss, [*basis.parameters(), c])
        with torch.no_grad():
            results.append((out, basis(attr, scale=scale), plain, first, second))
    assert_close(results[0], results[1])


def test_basis_calibration_whitens():
    """Hidden units vary by one with a mean in [-1, 1], functions too, and the unit of length makes no difference."""
    attr = torch.randn(400, 5, 2, dtype=F64)
    dist = 2 * torch.rand(400, dtype=F64)
    basis = KernelBasis(2, 16, hidden=12, r_max=2.0).double()
    fresh = {k: v.clone() for k, v in basis.state_dict().items()}
    weight = basis.window(dist)
    assert basis.calibrate([(attr, weight)]) is basis
    share = (weight / weight.sum()).view(-1, 1, 1) / 5
    hidden = basis.lin1(polynomial_features(attr, 3))
    for z, most in ((hidden, 1.0), (basis.lin2(basis.act(hidden)), 0.5)):
        mean = (z * share).sum((0, 1))
        assert mean.abs().max() <= most + 1e-9
        torch.testing.assert_close(((z - mean).square() * share).sum((0, 1)).sqrt(), torch.ones_like(mean))
    # Hidden units are no longer multiples of each other, as they are when they follow the largest monomial.
    rank = torch.linalg.matrix_rank((hidden - hidden.mean((0, 1))).flatten(0, 1), rtol=1e-2)
    assert rank == 9
    values = basis(attr, dist)
    parts = [(attr[:150], weight[:150]), (attr[150:], weight[150:])]
    for samples, scale in ((parts, 1.0), ([(7.0 * attr, weight)], 7.0)):
        basis.load_state_dict(fresh)
        basis.calibrate(samples)
        torch.testing.assert_close(basis(scale * attr, dist), values, rtol=1e-8, atol=1e-8)


def test_basis_calibration_where_little_varies():
    basis = KernelBasis(2, 8).double()
    fresh = {k: v.clone() for k, v in basis.state_dict().items()}
    with pytest.raises(ValueError, match="samples is empty"):
        basis.calibrate([])
    for attr in (torch.ones(6, 2, dtype=F64), torch.full((7, 2), 0.1, dtype=F64), torch.zeros(0, 2, dtype=F64)):
        basis.calibrate([(attr, None)])
        assert all(torch.equal(v, fresh[k]) for k, v in basis.state_dict().items())
    two = torch.tensor([[1.0, 2.0], [1.0, -3.0]], dtype=F64).repeat(5, 1)  # one direction varies, one does not
    basis.calibrate([(two, None)])
    assert basis(torch.randn(50, 2, dtype=F64)).isfinite().all()
    assert basis(two).std(0).min() > 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"degree": 0}, "degree is 0"),
        ({"act": "swish"}, "act is 'swish'"),
        ({"r_max": -1.0}, "r_max is -1"),
        ({"p": 2}, "p is 2"),
    ],
)
def test_basis_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        KernelBasis(2, 8, **arguments)


# -- oracles: loops over the definition --------------------------------------------------------------------------------


def draw(num=5, num_ori=4, channels=3, basis_dim=6, separable=True):
    torch.manual_seed(1)
    edge_index = full_edges(num)[:, torch.randperm(num * num)[: num * 3]]
    x = torch.randn(num, num_ori, channels, dtype=F64)
    shape = (num_ori,) if separable else (num_ori, num_ori)
    kernel = torch.randn(edge_index.size(1), *shape, basis_dim, dtype=F64)
    fiber = torch.randn(num_ori, num_ori, basis_dim, dtype=F64)
    weight = torch.rand(num_ori, dtype=F64)
    return x, edge_index, kernel, fiber, weight / weight.sum()


@pytest.mark.parametrize("groups", ["depthwise", 1])
@pytest.mark.parametrize("loops", [True, False])
def test_separable_equals_double_loop(groups, loops):
    x, edge_index, kernel, fiber, w = draw()
    out_channels = 3 if groups == "depthwise" else 2
    conv = PoniConv(3, out_channels, 6, groups).double()
    torch.nn.init.normal_(conv.bias)
    self_basis = torch.randn(1, 4, 6, dtype=F64) if loops else None
    expected = torch.zeros(5, 4, out_channels, dtype=F64)
    first = torch.zeros(5, 4, 3, dtype=F64)
    for e, (j, i) in enumerate(edge_index.t().tolist()):
        for o in range(4):
            first[i, o] += (conv.weight @ kernel[e, o]) * x[j, o]
    if loops:
        first += (self_basis @ conv.weight.t()) * x
    for i, p, o in itertools.product(range(5), range(4), range(4)):
        k = conv.fiber_weight @ fiber[p, o]
        expected[i, p] += w[o] * (k * first[i, o] if groups == "depthwise" else k @ first[i, o])
    out = conv(x, edge_index, kernel, fiber, weight=w, self_basis=self_basis)
    torch.testing.assert_close(out, expected + conv.bias, rtol=1e-11, atol=1e-12)
    uniform = conv(x, edge_index, kernel, fiber, self_basis=self_basis)
    given = conv(x, edge_index, kernel, fiber, weight=torch.full((4,), 0.25, dtype=F64), self_basis=self_basis)
    torch.testing.assert_close(uniform, given, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("groups", ["depthwise", 1])
@pytest.mark.parametrize("loops", [True, False])
def test_full_equals_double_loop(groups, loops):
    x, edge_index, kernel, _, w = draw(separable=False)
    out_channels = 3 if groups == "depthwise" else 2
    conv = PoniConv(3, out_channels, 6, groups, separable=False, bias=False).double()
    self_basis = torch.randn(1, 4, 4, 6, dtype=F64) if loops else None
    expected = torch.zeros(5, 4, out_channels, dtype=F64)
    terms = [(i, j, kernel[e]) for e, (j, i) in enumerate(edge_index.t().tolist())]
    if loops:
        terms += [(i, i, self_basis[0]) for i in range(5)]
    for i, j, basis in terms:
        for p, o in itertools.product(range(4), range(4)):
            k = conv.weight @ basis[p, o]
            expected[i, p] += w[o] * (k * x[j, o] if groups == "depthwise" else k @ x[j, o])
    out = conv(x, edge_index, kernel, weight=w, self_basis=self_basis)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("groups", ["depthwise", 1])
def test_point_conv_equals_loop(groups):
    x, edge_index, kernel, _, _ = draw()
    x, kernel = x[:, 0], kernel[:, 0]
    conv = PointConv(3, 3, 6, groups).double()
    self_basis = torch.randn(1, 6, dtype=F64)
    expected = torch.zeros(5, 3, dtype=F64)
    for e, (j, i) in enumerate(edge_index.t().tolist()):
        k = conv.weight @ kernel[e]
        expected[i] += k * x[j] if groups == "depthwise" else k @ x[j]
    k = conv.weight @ self_basis[0]
    expected += k * x if groups == "depthwise" else x @ k.t()
    torch.testing.assert_close(conv(x, edge_index, kernel, self_basis=self_basis), expected + conv.bias)


def test_full_conv_with_a_product_kernel_is_the_separable_one():
    """With phi = (phi1 phi2 flattened) and W = the outer product of the factors' weights, k = k1 k2."""
    x, edge_index, kernel, fiber, w = draw()
    separable = PoniConv(3, 3, 6, bias=False).double()
    full = PoniConv(3, 3, 36, separable=False, bias=False).double()
    # k1 sees the sender's orientation: axis 1 of the full basis is the receiver's, axis 2 the sender's.
    product = torch.einsum("eob,poc->epobc", kernel, fiber).flatten(3)
    with torch.no_grad():
        full.weight.copy_(torch.einsum("kb,kc->kbc", separable.weight, separable.fiber_weight).flatten(1))
    expected = separable(x, edge_index, kernel, fiber, weight=w)
    torch.testing.assert_close(full(x, edge_index, product, weight=w), expected, rtol=1e-11, atol=1e-12)


def test_sends_along_edges_and_not_against_them():
    x = torch.tensor([[[1.0]], [[10.0]]])
    conv = PoniConv(1, 1, 1, bias=False)
    torch.nn.init.ones_(conv.weight)
    torch.nn.init.ones_(conv.fiber_weight)
    out = conv(x, torch.tensor([[0], [1]]), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    assert out.flatten().tolist() == [0.0, 1.0]


# -- dense layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["point", "separable", "full"])
def test_dense_equals_sparse(kind):
    num_graphs, num, num_ori = 3, 4, 5
    mask = torch.arange(num).expand(num_graphs, num) < torch.tensor([[4], [1], [0]])
    lead = (num_graphs, num)
    ori = () if kind == "point" else (num_ori,)
    x = torch.randn(*lead, *ori, 3, dtype=F64)
    pair = (num_ori, num_ori) if kind == "full" else ori
    kernel = torch.randn(num_graphs, num, num, *pair, 6, dtype=F64)
    x[~mask] = float("nan")
    if kind == "point":
        conv, extra = PointConv(3, 3, 6).double(), ()
    else:
        conv = PoniConv(3, 3, 6, separable=kind == "separable").double()
        extra = (torch.randn(num_ori, num_ori, 6, dtype=F64),)
    out = conv(x, None, kernel, *extra, mask=mask)
    assert out.shape == x.shape
    for b, count in enumerate([4, 1, 0]):
        alone = conv(
            x[b, :count], full_edges(count), kernel[b, :count, :count].reshape(count * count, *pair, 6), *extra
        )
        torch.testing.assert_close(out[b, :count], alone)
    with pytest.raises(ValueError, match="kernel_basis has shape"):
        conv(x, None, kernel[:, :2], *extra)
    with pytest.raises(ValueError, match="mask is"):
        conv(x, None, kernel, *extra, mask=mask.float())


# -- laws --------------------------------------------------------------------------------------------------------------


class OnGraph(torch.nn.Module):
    """The convolution of a graph whose bases come from its geometry."""

    def __init__(self, separable: bool = True, block: bool = False) -> None:
        super().__init__()
        self.register_buffer("grid", orientation_points(3, 4))
        self.separable = separable
        self.kernel = KernelBasis(2 if separable else 4, 6, r_max=4.0)
        self.fiber = KernelBasis(1, 6)
        conv = PoniConv(3, 3, 6, separable=separable)
        self.conv = ConvNeXtBlock(3, conv, widening=2, layer_scale=0.5) if block else conv

    def forward(self, x, pos, edge_index):
        attr, fiber = grid_invariants("R3xS2", pos, edge_index, self.grid.to(pos.dtype), separable=self.separable)
        dist = (pos[edge_index[0]] - pos[edge_index[1]]).square().sum(-1).add(1e-6).sqrt()
        return self.conv(x, edge_index, self.kernel(attr, dist), None if fiber is None else self.fiber(fiber))


def sample(num: int, seed: int = 0) -> Data:
    torch.manual_seed(seed)
    pairs = full_edges(num)
    return Data(
        x=torch.randn(num, 4, 3, dtype=F64),
        pos=torch.randn(num, 3, dtype=F64),
        edge_index=pairs[:, torch.rand(pairs.size(1)) < 0.7],
    )


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_laws(separable, block):
    model = OnGraph(separable, block).double()
    run = lambda d: model(d.x, d.pos, d.edge_index)  # noqa: E731
    assert_permutation_equivariant(run, sample(6))
    assert_alone_equals_batched(run, [sample(n, n) for n in (0, 3, 1, 0, 5)])
    data = sample(5)
    assert_state_dict_roundtrip(
        lambda: OnGraph(separable, block).double(), lambda m: m(data.x, data.pos, data.edge_index)
    )


def test_a_layer_that_breaks_the_laws_is_caught():
    model = OnGraph().double()

    def numbered(d):
        return model(d.x, d.pos, d.edge_index) + torch.arange(d.num_nodes).view(-1, 1, 1)

    with pytest.raises(AssertionError):
        assert_permutation_equivariant(numbered, sample(6))
    with pytest.raises(AssertionError):
        assert_alone_equals_batched(numbered, [sample(2), sample(3)])


@pytest.mark.parametrize("groups", ["depthwise", 1])
@pytest.mark.parametrize("separable", [True, False])
def test_gradients(groups, separable):
    x, edge_index, kernel, fiber, w = draw(num=3, num_ori=2, channels=2, basis_dim=2, separable=separable)
    edge_index, kernel = edge_index[:, :4], kernel[:4]
    conv = PoniConv(2, 2, 2, groups, separable).double()
    self_basis = torch.randn(1, *kernel.shape[1:], dtype=F64)

    def run(x, kernel, fiber, self_basis):
        return conv(x, edge_index, kernel, fiber if separable else None, weight=w, self_basis=self_basis)

    check_derivatives(run, [x, kernel, fiber, self_basis])


@pytest.mark.parametrize("separable", [True, False])
def test_compile(separable):
    x, edge_index, kernel, fiber, _ = draw(separable=separable)
    conv = PoniConv(3, 3, 6, separable=separable).double()
    check_compile(lambda x, k, f: conv(x, edge_index, k, f if separable else None), [x, kernel, fiber])


def test_bf16_basis():
    x, edge_index, kernel, fiber, _ = draw()
    conv = PoniConv(3, 3, 6)
    exact = conv(x.float(), edge_index, kernel.float(), fiber.float())
    rough = conv(x.float(), edge_index, kernel.bfloat16(), fiber.bfloat16())
    assert (rough - exact).norm() < 0.03 * exact.norm()


# -- the block ---------------------------------------------------------------------------------------------------------


def test_block_by_hand_and_without_residual():
    x, edge_index, kernel, fiber, _ = draw()
    block = ConvNeXtBlock(3, PoniConv(3, 3, 6), widening=2, layer_scale=0.1).double()
    h = block.norm(block.conv(x, edge_index, kernel, fiber))
    h = torch.nn.functional.linear(h, block.lin1.weight, block.lin1.bias)
    h = torch.nn.functional.linear(torch.nn.functional.gelu(h), block.lin2.weight, block.lin2.bias)
    torch.testing.assert_close(block(x, edge_index, kernel, fiber), x + 0.1 * h)
    wider = ConvNeXtBlock(3, PoniConv(3, 5, 6, groups=1)).double()
    assert wider(x, edge_index, kernel, fiber).shape == (5, 4, 5)
    assert wider.scale is None
    before = [p.clone() for p in block.parameters()]
    block.reset_parameters()
    assert not torch.equal(before[0], next(iter(block.parameters())))
    assert torch.equal(block.scale, torch.full((3,), 0.1, dtype=F64))


def test_bundle_edges_and_complete_edges():
    edges = complete_edges(2, 2)
    assert edges.tolist() == [[0, 1, 0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]]
    lifted = bundle_edges(torch.tensor([[1], [0]]), 2)
    assert lifted.tolist() == [[2, 3, 2, 3], [0, 0, 1, 1]]


def test_empty():
    conv = PoniConv(3, 3, 6)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert conv(torch.zeros(0, 4, 3), none, torch.zeros(0, 4, 6), torch.zeros(4, 4, 6)).shape == (0, 4, 3)
    out = conv(torch.ones(2, 4, 3), none, torch.zeros(0, 4, 6), torch.ones(4, 4, 6))
    assert out.eq(0).all()


def test_refusals():
    with pytest.raises(ValueError, match="out_channels is 5"):
        PoniConv(3, 5, 6)
    with pytest.raises(ValueError, match="groups is 2"):
        PointConv(4, 4, 6, groups=2)
    conv = PoniConv(3, 3, 6, num_ori=4)
    x, edge_index, kernel, fiber, _ = (t.float() if t.is_floating_point() else t for t in draw())
    with pytest.raises(ValueError, match=r"x has shape \(5, 4, 2\)"):
        conv(x[..., :2], edge_index, kernel, fiber)
    with pytest.raises(ValueError, match=r"x has shape \(5, 3, 3\)"):
        conv(x[:, :3], edge_index, kernel, fiber)
    with pytest.raises(ValueError, match="fiber_basis is None"):
        conv(x, edge_index, kernel)
    with pytest.raises(IndexError, match="7"):
        conv(x, torch.full_like(edge_index, 7), kernel, fiber)
    assert "separable=True" in repr(conv)
    assert repr(PointConv(3, 3, 6)) == "PointConv(3, 3, basis_dim=6, groups='depthwise')"
