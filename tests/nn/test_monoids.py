from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch
from torch import nn

import geo.nn
from geo.nn.monoids import (
    BinaryGRU,
    CircularConv,
    ElementwiseMonoid,
    KSmallest,
    LogSumExp,
    Monoid,
    ProductMonoid,
    SymmetricMLP,
    TransportedSum,
)
from geo.ops import fold, tree_reduce
from geo.testing import assert_close, assert_state_dict_roundtrip, check_compile, check_derivatives

F64 = torch.float64
EXACT = {
    "sum": lambda: ElementwiseMonoid("sum"),
    "mul": lambda: ElementwiseMonoid("mul"),
    "max": lambda: ElementwiseMonoid("max"),
    "min": lambda: ElementwiseMonoid("min"),
    "or": lambda: ElementwiseMonoid("or"),
    "velocity": lambda: ElementwiseMonoid("velocity"),
    "transported sum": lambda: TransportedSum(4),
    "smallest": lambda: KSmallest(1),
    "2 smallest": lambda: KSmallest(2),
    "3 smallest": lambda: KSmallest(3),
    "2 smallest, bounded": lambda: KSmallest(2, top=5.0),
    "circular convolution": lambda: CircularConv(4),
    "log-sum-exp": lambda: LogSumExp(4, 0.5),
    "log-sum-exp, fixed": lambda: LogSumExp(4, 2.0, learn=False),
    "product": lambda: ProductMonoid(["max", KSmallest(2), CircularConv(2)], [1, 1, 2]),
}
LEARNED = {"GRU": lambda: BinaryGRU(4), "MLP": lambda: SymmetricMLP(4)}
ALL = EXACT | LEARNED
INTEGER = ["sum", "mul", "max", "min", "smallest", "2 smallest", "3 smallest"]


def build(name):
    op = ALL[name]().double()
    for parameter in op.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7)
    return op


def elements(op, *shape):
    """In (0, 1), where all are defined."""
    return op.lift(torch.rand(*shape, 4, dtype=F64) * 0.8 + 0.1)


def ptr_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("name", EXACT)
def test_laws_of_exact_monoids(name):
    op = build(name)
    a, b, c = (elements(op, 7) for _ in range(3))
    assert_close(op(op(a, b), c), op(a, op(b, c)))
    e = op.identity().to(F64).expand_as(a)
    assert_close(op(a, e), a)
    assert_close(op(e, a), a)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_operators_are_not_associative_at_first(name):
    op = build(name)
    a, b, c = (elements(op, 7) for _ in range(3))
    with pytest.raises(AssertionError):
        assert_close(op(op(a, b), c), op(a, op(b, c)))
    assert op.identity() is None


@pytest.mark.parametrize("name", ALL)
def test_oracle_3_commutativity_is_exact(name):
    op = build(name)
    a, b = (elements(op, 64) for _ in range(2))
    assert torch.equal(op(a, b), op(b, a))
    pairs, ptr = torch.stack([a, b], dim=1), torch.arange(65) * 2
    out = tree_reduce(pairs.flatten(0, 1), ptr, op)
    assert torch.equal(out, tree_reduce(pairs.flip(1).flatten(0, 1), ptr, op))


def test_a_plain_cell_does_not_commute():
    cell = nn.GRUCell(4, 4).double()
    a, b = torch.rand(2, 64, 4, dtype=F64)
    assert not torch.allclose(cell(a, b), cell(b, a))


@pytest.mark.parametrize("name", INTEGER)
def test_oracle_1_tree_equals_fold_bitwise(name):
    op, ptr = ALL[name](), ptr_of([*range(17), 0, 100, 1])
    x = op.lift(torch.randint(1, 9, (int(ptr[-1]), 3)).double()).long()  # where elements lack, the least integer
    assert torch.equal(tree_reduce(x, ptr, op), fold(x, ptr, op))


@pytest.mark.parametrize("name", EXACT)
def test_oracle_1_tree_equals_fold(name):
    op, ptr = build(name), ptr_of([3, 0, 1, 7, 2, 0, 9])
    x = elements(op, 22)
    e = op.identity().to(F64).expand(x.size(1))
    assert_close(tree_reduce(x, ptr, op, identity=e), fold(x, ptr, op, identity=e))


@pytest.mark.parametrize("name", ALL)
def test_derivatives(name):
    op = build(name)
    names = [n for n, _ in op.named_parameters()]
    with torch.no_grad():  # results of merges: the k smallest of them are k numbers
        a, b = tree_reduce(elements(op, 18), ptr_of([3] * 6), op).chunk(2)

    def run(a, b, *values):
        return torch.func.functional_call(op, dict(zip(names, values, strict=True)), (a, b))

    check_derivatives(run, [a, b, *(p.detach() for p in op.parameters())])


@pytest.mark.parametrize("name", ALL)
def test_any_number_of_axes(name):
    op = build(name)
    a, b = elements(op, 2, 3), elements(op, 2, 3)
    out = op(a, b)
    assert out.shape == a.shape == (2, 3, op.width(4))
    assert_close(out, torch.stack([op(a[0], b[0]), op(a[1], b[1])]))
    assert op(a[:0], b[:0]).shape == (0, 3, op.width(4))
    assert op(a[0, 0], b[0, 0]).shape == (op.width(4),)


@pytest.mark.parametrize("name", ALL)
def test_compiles(name):
    op = build(name).float()
    a, b = elements(op, 5).float(), elements(op, 5).float()
    check_compile(op, [a, b])


@pytest.mark.parametrize("name", ALL)
def test_autocast_keeps_the_dtype_of_the_states(name):
    op = build(name).float()
    a, b = elements(op, 50).float(), elements(op, 50).float()
    expected = op(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(a, b)
    assert out.dtype == torch.float32
    assert_close(out, expected.bfloat16())
    half = copy.deepcopy(op).bfloat16()
    assert half(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ALL)
def test_nan_stays_in_its_row_and_channel_group(name):
    op = build(name)
    a, b = elements(op, 5), elements(op, 5)
    clean = op(a, b)
    a[2, 0] = math.nan
    out = op(a, b)
    assert out[2].isnan().any()
    others = torch.tensor([0, 1, 3, 4])
    assert_close(out[others], clean[others])


def test_nan_is_not_lost_among_the_smallest():
    for k in (1, 2, 3):
        op = KSmallest(k)
        x = torch.randn(40, 2, dtype=F64)
        x[17, 1] = math.nan
        out = tree_reduce(op.lift(x), ptr_of([40]), op)[0].view(2, k)
        assert_close(out[0], x[:, 0].sort().values[:k])
        assert out[1].isnan().all()


def test_bounded_smallest_have_no_infinities():
    op = KSmallest(3, top=5.0)
    x = torch.tensor([[4.0], [1.0], [7.0]])
    assert tree_reduce(op.lift(x), ptr_of([3]), op).tolist() == [[1.0, 4.0, 5.0]]
    assert op.lift(x)[0].tolist() == [4.0, 5.0, 5.0]
    assert KSmallest(3).lift(x)[0].tolist() == [4.0, math.inf, math.inf]


def test_binary_gru_is_the_mean_of_two_cells():
    op, cell = build("GRU"), nn.GRUCell(4, 4).double()
    with torch.no_grad():
        for theirs, ours in zip(cell.parameters(), (*op.weight.chunk(2), *op.bias.chunk(2)), strict=True):
            theirs.copy_(ours)
    a, b = torch.randn(2, 9, 4, dtype=F64)
    assert_close(op(a, b), (cell(a, b) + cell(b, a)) / 2)
    assert_close(op(a[0], b[0]), op(a, b)[0])
    left, right = torch.tensor([8, 0, 3]), torch.tensor([1, 2, 8])
    assert_close(op.merge(a, left, right), op(a[left], a[right]))
    deep = torch.randn(9, 2, 4, dtype=F64)
    assert_close(op.merge(deep, left, right), op(deep[left], deep[right]))
    many = torch.randint(9, (2, 1300))  # more than a block
    assert_close(op.merge(a, *many), (cell(a[many[0]], a[many[1]]) + cell(a[many[1]], a[many[0]])) / 2)
    deep = torch.randn(2, 600, 3, 4, dtype=F64)
    assert_close(op(*deep), op(*deep.transpose(1, 2)).transpose(0, 1))
    assert torch.equal(op(*deep), op(*deep.flip(0)))
    assert sum(p.numel() for p in BinaryGRU(64).parameters()) == 24_960


def test_closed_forms():
    a, b = torch.rand(2, 5, 4, dtype=F64)
    index = (torch.arange(4)[:, None] - torch.arange(4)) % 4
    assert_close(CircularConv(4)(a, b), torch.einsum("pj,pij->pi", a, b[:, index]))
    assert_close(ElementwiseMonoid("velocity")(a / 2, b / 2), torch.tanh(torch.atanh(a / 2) + torch.atanh(b / 2)))
    assert_close(ElementwiseMonoid("or")(a, b), 1 - (1 - a) * (1 - b))
    x = torch.randn(7, 4, dtype=F64)
    op = LogSumExp(4, 0.3).double()
    assert_close(
        tree_reduce(x, ptr_of([7]), op), 0.3 * torch.logsumexp(x / 0.3, 0, keepdim=True), factor=1e4
    )  # log(0.3) in float32
    flow = TransportedSum(5).double()
    total = flow.flow.inverse(flow.flow(torch.cat([x, x[:, :1]], dim=1)).sum(0))
    assert_close(tree_reduce(torch.cat([x, x[:, :1]], dim=1), ptr_of([7]), flow)[0], total)


def test_a_flow_of_ones_own():
    class Log(nn.Module):
        def forward(self, x):
            return x.log()

        def inverse(self, y):
            return y.exp()

    op = TransportedSum(1, Log()).double()
    op.reset_parameters()
    assert_close(op(torch.tensor([2.0]), torch.tensor([3.0])), torch.tensor([6.0]))
    assert_close(op.identity(), torch.ones(1, dtype=F64))


def test_products():
    op = ProductMonoid(["sum", KSmallest(2), ProductMonoid(["max", "min"], [1, 1])], [1, 1, 2])
    assert (op.channels, op.width(4)) == (4, 5)
    x = op.lift(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
    assert op(*x).tolist() == [6.0, 2.0, 6.0, 7.0, 4.0]
    assert op.identity().tolist() == [0.0, math.inf, math.inf, -math.inf, math.inf]
    assert ProductMonoid(["sum", BinaryGRU(2)], [1, 2]).identity() is None


@pytest.mark.parametrize("name", [n for n in ALL if n != "product" and list(ALL[n]().parameters())])
def test_state_dict_and_reset(name):
    a, b = torch.rand(2, 5, 4)

    def make():
        op = ALL[name]()
        return op.requires_grad_()

    if name == "log-sum-exp":  # starts at a constant
        op = make()
        nn.init.zeros_(op.log_temperature)
        op.reset_parameters()
        assert torch.equal(op.log_temperature, make().log_temperature)
        return
    assert_state_dict_roundtrip(make, lambda op: op(a, b))
    op = make()
    before = op(a, b)
    op.reset_parameters()
    assert not torch.equal(op(a, b), before)


def test_a_product_resets_all_factors():
    op = ProductMonoid([BinaryGRU(2), SymmetricMLP(2)], [2, 2])
    before = [p.clone() for p in op.parameters()]
    op.reset_parameters()
    assert not any(torch.equal(p, old) for p, old in zip(op.parameters(), before, strict=True))


def test_repr():
    assert repr(BinaryGRU(4)) == "BinaryGRU(4)"
    assert repr(KSmallest(2)) == "KSmallest(2)"
    assert repr(KSmallest(2, top=9)) == "KSmallest(2, top=9)"
    assert repr(ElementwiseMonoid("max")) == "ElementwiseMonoid('max')"
    assert repr(LogSumExp(4)) == "LogSumExp(4, temperature=1, learn=True)"
    assert repr(CircularConv(4)) == "CircularConv(4)"
    assert "SymmetricMLP(\n  4, hidden_channels=8" in repr(SymmetricMLP(4))
    assert "channels=[1, 2]" in repr(ProductMonoid(["sum", "max"], [1, 2]))


def test_refusals():
    with pytest.raises(ValueError, match="channels is 0, but must be an integer of at least 1"):
        BinaryGRU(0)
    with pytest.raises(ValueError, match="k is 0, but must be an integer of at least 1"):
        KSmallest(0)
    with pytest.raises(ValueError, match="top is nan, but must be a number"):
        KSmallest(2, top=math.nan)
    with pytest.raises(ValueError, match=r"temperature is 0\.0, but must be positive"):
        LogSumExp(2, 0.0)
    with pytest.raises(ValueError, match="channels is 1, but couplings need at least 2"):
        TransportedSum(1)
    with pytest.raises(ValueError, match="kind is 'mean', but must be one of 'sum'"):
        ElementwiseMonoid("mean")
    with pytest.raises(ValueError, match="channels has 1 widths for 2 ops"):
        ProductMonoid(["sum", "max"], [2])
    with pytest.raises(ValueError, match=r"channels gives 3 to BinaryGRU\(2\), which takes 2"):
        ProductMonoid([BinaryGRU(2)], [3])
    with pytest.raises(ValueError, match=r"but must hold geo\.nn\.Monoid or names"):
        ProductMonoid([torch.add], [3])
    with pytest.raises(NotImplementedError):
        Monoid()(torch.zeros(1), torch.zeros(1))


OPERATORS = [BinaryGRU, CircularConv, ElementwiseMonoid, KSmallest, LogSumExp, Monoid, ProductMonoid, SymmetricMLP]


@pytest.mark.parametrize("thing", [*OPERATORS, TransportedSum])
def test_exported_and_documented(thing):
    assert getattr(geo.nn, thing.__name__) is thing
    text = inspect.getdoc(thing)
    for part in (
        ":math:" if "math::" not in text else "math::",
        "Args:",
        "Shapes:",
        "Symmetry and",
        "Example:",
        "https://",
    ):
        assert part in text


def test_log_sum_exp_has_gradients_at_its_identity():
    op = LogSumExp(3).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    loss = geo.nn.identity_loss(op, x, op.identity())
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(op.log_temperature.grad, torch.zeros(3, dtype=torch.float64))
    nothing = torch.full((1, 3), -math.inf, dtype=torch.float64)
    assert torch.equal(op(nothing, nothing), nothing)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gru_merges_what_it_multiplies(dtype):
    """One operator for rows with more axes and of another dtype than the weights, under autocast as well."""
    op, x = BinaryGRU(4), torch.randn(6, 3, 4).to(dtype)
    left, right = torch.tensor([0, 2, 2]), torch.tensor([1, 3, 5])
    expected = torch.stack([op.merge(x[:, i], left, right) for i in range(3)], dim=1)
    assert expected.dtype == dtype
    assert torch.equal(op.merge(x, left, right), expected)
    assert torch.equal(op(x[left], x[right]), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(op(x[left], x[right]), expected)


@pytest.mark.parametrize("top", [math.inf, 4.5, 300.0, -300.0])
def test_k_smallest_of_integers_needs_a_top_that_they_hold(top):
    x = torch.tensor([[3], [7]], dtype=torch.int8)
    with pytest.raises(ValueError, match=f"torch.int8 holds no {top}, KSmallest's top"):
        KSmallest(2, top).lift(x)
    out = KSmallest(2, 5.0).lift(x)
    assert out.dtype == torch.int8
    assert out.tolist() == [[3, 5], [5, 5]]
