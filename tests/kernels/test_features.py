from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geo.kernels import FeatureMap, SparseFeatures, features_of, normalized_adjacency, tail_mass
from geo.kernels.ragged import row_sums
from geo.testing import check_derivatives


class Deposits(NamedTuple):
    """Stands for geo.ops.WalkDeposits, with entries of our own."""

    ptr: Tensor
    col: Tensor
    length: Tensor
    value: Tensor


def deposits(dtype: torch.dtype = torch.float64) -> tuple[Deposits, Tensor]:
    """Random deposits of four starts among five nodes, lengths 0 to 3, and the dense M_l [4, 4, 5]."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 5, 4, generator=generator, dtype=torch.float64)  # start, column, length
    dense = dense.where(torch.rand(4, 5, 4, generator=generator) < 0.4, 0.0)
    dense[2] = 0  # a start without deposits
    row, col, length = dense.nonzero(as_tuple=True)  # sorted by (row, column, length)
    ptr = torch.searchsorted(row, torch.arange(5))
    return Deposits(ptr, col, length.int(), dense[row, col, length].to(dtype)), dense.permute(2, 0, 1)


def sparse(seed: int = 0) -> tuple[SparseFeatures, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    dense = dense.where(torch.rand(6, 4, generator=generator) < 0.5, 0.0)
    row, col = dense.nonzero(as_tuple=True)
    return SparseFeatures(torch.searchsorted(row, torch.arange(7)), col, dense[row, col], 4), dense


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("lengths", [1, 2, 4, 7])
def test_features_are_the_sum_over_lengths(lengths):
    walks, dense = deposits()
    f = torch.randn(lengths, dtype=torch.float64)
    expected = torch.einsum("l,lij->ij", f[:4], dense[:lengths])
    actual = features_of(walks, f, 5)
    assert actual.shape == (4, 5)
    torch.testing.assert_close(actual.to_dense(), expected)
    torch.testing.assert_close(actual.to_sparse_csr().to_dense(), expected)
    assert actual.col.size(0) == int((dense[:lengths] != 0).any(0).sum())  # one entry for each pair
    assert torch.equal(actual.row, torch.repeat_interleave(torch.arange(4), actual.ptr.diff()))
    mass = dense.abs().sum((1, 2))
    assert tail_mass(walks, lengths) == pytest.approx(float(mass[lengths:].sum() / mass.sum()))


def test_one_map_serves_all_modulations():
    walks, _ = deposits(torch.float32)
    features = FeatureMap(walks, 5, 4)
    for f in torch.randn(3, 4, dtype=torch.float64):
        first, second = features(f), features_of(walks, f, 5)
        assert torch.equal(first.value, second.value)
        assert torch.equal(first.col, second.col)
        assert first.value.dtype == torch.float32


def test_products():
    phi, dense = sparse()
    for shape in ((4,), (4, 1), (4, 3), (4, 2, 3), (4, 0)):
        v = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(phi.matmul(v), torch.tensordot(dense, v, 1))
        learned = v.clone().requires_grad_()  # the path that keeps gradients
        torch.testing.assert_close(phi.matmul(learned), torch.tensordot(dense, v, 1))
    for shape in ((6,), (6, 3), (6, 2, 3), (6, 0)):
        v = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(phi.t_matmul(v), torch.tensordot(dense.t(), v, 1))
        other = phi.with_value(2 * phi.value)
        torch.testing.assert_close(other.t_matmul(v), torch.tensordot(2 * dense.t(), v, 1))
        learned = v.clone().requires_grad_()
        torch.testing.assert_close(phi.t_matmul(learned), torch.tensordot(dense.t(), v, 1))


def test_rows():
    phi, dense = sparse()
    index = torch.tensor([3, 0, 3, 5])
    assert torch.equal(phi.select_rows(index).to_dense(), dense[index])
    assert phi.select_rows(index[:0]).to_dense().shape == (0, 4)


def test_oracle_7_derivatives_of_features():
    walks, _ = deposits()
    v, w = torch.randn(5, 1, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def product(f: Tensor, value: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi = features_of(walks._replace(value=value), f, 5)
        return phi.matmul(v), phi.t_matmul(w)

    f = torch.randn(3, dtype=torch.float64)
    check_derivatives(product, [f, walks.value, v, w])
    check_derivatives(lambda f: features_of(walks, f, 5).to_dense(), [f], second=False)


def test_nothing_at_all():
    none = Deposits(torch.zeros(1).long(), torch.zeros(0).long(), torch.zeros(0).int(), torch.zeros(0))
    phi = features_of(none, torch.ones(3), 0)
    assert phi.shape == (0, 0)
    assert phi.matmul(torch.zeros(0, 2)).shape == (0, 2)
    assert phi.t_matmul(torch.zeros(0, 2)).shape == (0, 2)
    assert phi.to_dense().shape == (0, 0)
    assert tail_mass(none, 1) == 0


def test_what_is_refused():
    walks, _ = deposits()
    phi, _ = sparse()
    with pytest.raises(ValueError, match=r"num_lengths: expected at least 1"):
        features_of(walks, torch.ones(0), 5)
    with pytest.raises(ValueError, match=r"f: expected 3 floating numbers, got torch.int64 \[3\]"):
        features_of(walks, torch.ones(3).long(), 5)
    with pytest.raises(ValueError, match=r"f: expected one axis"):
        features_of(walks, torch.ones(3, 1), 5)
    with pytest.raises(ValueError, match=r"matmul: expected 4 rows for features \[6, 4\], got \[6\]"):
        phi.matmul(torch.ones(6))
    with pytest.raises(ValueError, match=r"t_matmul: expected 6 rows"):
        phi.t_matmul(torch.ones(4))
    with pytest.raises(ValueError, match=r"value: expected shape"):
        phi.with_value(torch.ones(1))
    with pytest.raises(ValueError, match=r"ptr: expected an int64 tensor"):
        SparseFeatures(torch.zeros(1), torch.zeros(0).long(), torch.zeros(0), 1)
    with pytest.raises(ValueError, match=r"ptr: expected one entry more"):
        SparseFeatures(torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0), 1)
    with pytest.raises(ValueError, match=r"value: expected \[0\] floating numbers"):
        SparseFeatures(torch.zeros(1).long(), torch.zeros(0).long(), torch.zeros(1), 1)


# -- matrices ----------------------------------------------------------------------------------------------------------
def dense_of(csr: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    rowptr, col, weight = csr
    return SparseFeatures(rowptr, col, weight, rowptr.size(0) - 1).to_dense()


def test_normalized_adjacency():
    edge_index = torch.tensor([[3, 0, 1, 1, 2, 0, 2, 0], [0, 1, 0, 2, 1, 1, 2, 3]])  # (0, 1) twice, a loop at 2
    weight = torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0, 2.0, 4.0, 2.0], dtype=torch.float64)
    adjacency = torch.zeros(5, 5, dtype=torch.float64).index_put((*edge_index,), weight, accumulate=True)
    assert torch.equal(adjacency, adjacency.t())  # node 4 has no edge
    rowptr, col, value = normalized_adjacency(edge_index, weight, 5, None)
    assert torch.equal(dense_of((rowptr, col, value)), adjacency)
    for begin, end in zip(rowptr[:-1].tolist(), rowptr[1:].tolist(), strict=True):
        assert (col[begin:end].diff() > 0).all()
    scale = adjacency.sum(1).clamp(min=1e-300) ** -0.5
    scale[4] = 0
    sym = dense_of(normalized_adjacency(edge_index, weight, 5))
    torch.testing.assert_close(sym, scale.unsqueeze(1) * adjacency * scale)
    assert torch.equal(sym, sym.t())
    assert normalized_adjacency(edge_index)[0].size(0) == 5
    assert normalized_adjacency(edge_index)[2].dtype == torch.float32
    assert normalized_adjacency(edge_index, weight.long(), dtype=torch.float64)[2].dtype == torch.float64
    assert [t.tolist() for t in normalized_adjacency(torch.zeros(2, 0).long())] == [[0], [], []]
    assert [t.tolist() for t in normalized_adjacency(torch.zeros(2, 0).long(), num_nodes=2)] == [[0, 0, 0], [], []]


class Names(TorchDispatchMode):
    """The names of all ATen operations on floating numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_sums_have_a_fixed_order():
    """No operation that adds by atomics on a GPU, forward or backward (index_put, which accumulates, sorts there)."""
    edge_index = torch.randint(9, (2, 40))
    weight, f = torch.rand(40, requires_grad=True), torch.rand(4, dtype=torch.float64, requires_grad=True)
    walks, _ = deposits()
    with Names() as names:
        rowptr, _, value = normalized_adjacency(edge_index, weight, 9)
        row_sums(rowptr, value.detach())
        phi = features_of(walks, f, 5)
        out = phi.matmul(torch.ones(5).double()).sum() + phi.t_matmul(torch.ones(4, 2).double()).square().sum()
        slopes = torch.autograd.grad(out + phi.to_dense().square().sum() + value.square().sum(), (weight, f))
    assert len(slopes) == 2
    assert "mul" in names.found
    assert not names.found & {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce"}


@pytest.mark.cuda
def test_same_bits_on_every_run():
    """Without the deterministic algorithms of PyTorch, which the tests switch on elsewhere."""
    edge_index, weight = torch.randint(50, (2, 20000)).cuda(), torch.rand(20000).cuda()
    torch.use_deterministic_algorithms(False)
    found = [normalized_adjacency(edge_index, weight, 50, dtype=torch.float64)[2] for _ in range(20)]
    for again in found[1:]:
        assert torch.equal(again, found[0])


def test_symmetric_to_the_last_place():
    generator = torch.Generator().manual_seed(1)
    half = torch.randint(40, (2, 300), generator=generator)
    weight = torch.rand(300, generator=generator)
    both = torch.cat([half, half.flip(0)], dim=1)
    dense = dense_of(normalized_adjacency(both, weight.repeat(2), 40))
    assert torch.equal(dense, dense.t())


def test_order_of_edges_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    edge_index, weight = torch.randint(30, (2, 200), generator=generator), torch.rand(200, generator=generator)
    rowptr, col, value = normalized_adjacency(edge_index, weight, 30)
    order = torch.randperm(200, generator=generator)
    for a, b in zip(normalized_adjacency(edge_index[:, order], weight[order], 30), (rowptr, col, value), strict=True):
        torch.testing.assert_close(a, b)
    row = torch.repeat_interleave(torch.arange(30), rowptr.diff())
    raw = normalized_adjacency(edge_index, weight, 30, None)
    again = normalized_adjacency(torch.stack([row, col]), raw[2], 30)  # sorted, without repeated edges
    for a, b in zip(again, (rowptr, col, value), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("directed", [False, True])
def test_norm_is_at_most_one(signs, directed):
    generator = torch.Generator().manual_seed(0)
    for seed in range(10):
        edge_index = torch.randint(12, (2, 10 + 3 * seed), generator=generator)
        weight = torch.rand(edge_index.size(1), generator=generator, dtype=torch.float64)
        if signs:
            weight = weight - 0.5
        if not directed:
            edge_index, weight = torch.cat([edge_index, edge_index.flip(0)], dim=1), weight.repeat(2)
        dense = dense_of(normalized_adjacency(edge_index, weight, 12))
        norm = float(torch.linalg.matrix_norm(dense, 2))
        assert norm <= 1 + 1e-12
        if not signs and not directed:
            assert norm > 1 - 1e-12


def test_derivatives_of_normalized_adjacency():
    edge_index = torch.tensor([[0, 1, 1, 2, 2, 0, 0], [1, 0, 2, 1, 0, 2, 1]])
    weight = torch.tensor([1.0, 0.5, 2.0, -2.0, 0.3, 0.7, 0.2])

    def entries(weight: Tensor) -> Tensor:
        return normalized_adjacency(edge_index, weight)[2]

    check_derivatives(entries, [weight])


def test_refused_graphs():
    edge_index = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match=r"edge_index: expected int64 \[2, E\]"):
        normalized_adjacency(edge_index.float())
    with pytest.raises(ValueError, match=r"edge_weight: expected \[2\], got \[3\]"):
        normalized_adjacency(edge_index, torch.ones(3))
    with pytest.raises(ValueError, match="edge_weight: expected finite numbers"):
        normalized_adjacency(edge_index, torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="normalization: expected 'sym' or None, got 'rw'"):
        normalized_adjacency(edge_index, normalization="rw")
    with pytest.raises(ValueError, match="dtype: expected a floating dtype"):
        normalized_adjacency(edge_index, dtype=torch.int64)
    with pytest.raises(IndexError, match=r"edge_index\[1\]"):
        normalized_adjacency(edge_index, num_nodes=2)
    with pytest.raises(IndexError, match=r"edge_index\[0\]\[0\] = -1 is out of range"):
        normalized_adjacency(edge_index - 1)
    with pytest.raises(IndexError, match=r"edge_index\[0\]\[1\] = 7 is out of range \[0, 3\]"):
        normalized_adjacency(torch.tensor([[3, 7], [2, 1]]), num_nodes=4)


def test_edges_may_be_strided():
    pairs = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1]])  # in order, so that they are taken as they are
    strided, copied = normalized_adjacency(pairs.t()), normalized_adjacency(pairs.t().contiguous())
    for got, expected in zip(strided, copied, strict=True):
        assert torch.equal(got, expected)  # and no warning of a copy, which would be an error here
