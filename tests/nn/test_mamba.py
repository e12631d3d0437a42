from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from geo.nn import BiMamba, SelectiveSSM
from geo.testing import assert_close, assert_state_dict_roundtrip, check_compile, check_derivatives

PTR = torch.tensor([0, 3, 3, 4, 9, 9])
FLIP = torch.tensor([2, 1, 0, 3, 8, 7, 6, 5, 4])  # the rows of each sequence of PTR from its end


def oracle(layer: SelectiveSSM, rows: Tensor) -> Tensor:
    """One sequence, row by row, as Algorithm 2 of the paper writes it (lines 3 to 9, Euler)."""
    inner, n, rank = layer.inner_channels, layer.d_state, layer.dt_rank
    W_in, W_2 = layer.in_proj.weight[:inner], layer.in_proj.weight[inner:]
    W_delta, W_B, W_C = layer.x_proj.weight.split([rank, n, n])
    state, history, out = torch.zeros(inner, n, dtype=rows.dtype), [], []
    for row in rows:
        history.append(W_in @ row)
        u = layer.conv_bias.clone()
        for back in range(layer.d_conv):
            if back < len(history):
                u = u + layer.conv_weight[:, back] * history[-1 - back]
        u = u * torch.sigmoid(u)
        delta = torch.log1p(torch.exp(layer.dt_proj.weight @ (W_delta @ u) + layer.dt_proj.bias))
        for e in range(inner):
            a = torch.exp(-delta[e] * torch.exp(layer.A_log[e]))
            state = state.clone()
            state[e] = a * state[e] + delta[e] * (W_B @ u) * u[e]
        y = state @ (W_C @ u) + layer.D * u
        gate = W_2 @ row
        out.append(layer.out_proj.weight @ (y * gate * torch.sigmoid(gate)))
    return torch.stack(out)


def spread(layer: torch.nn.Module) -> torch.nn.Module:
    """Weights of the size of 1, so that no part of the layer is negligible."""
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer


@pytest.mark.parametrize("settings", [{}, {"expand": 2, "d_state": 3, "d_conv": 2, "dt_rank": 2}])
def test_equals_the_algorithm_row_by_row(settings):
    layer = spread(SelectiveSSM(5, **settings).double())
    x = torch.randn(9, 5, dtype=torch.float64)
    expected = [oracle(layer, x[a:b]) for a, b in itertools.pairwise(PTR.tolist()) if b > a]
    assert_close(layer(x, PTR), torch.cat(expected))
    assert not torch.allclose(layer(x), torch.cat(expected))  # one long sequence is another thing


def test_reverse_is_each_sequence_read_from_its_end():
    layer = spread(SelectiveSSM(4).double())
    x = torch.randn(9, 4, dtype=torch.float64)
    assert_close(layer(x, PTR, reverse=True), layer(x[FLIP], PTR)[FLIP])
    whole = layer(x.flip(0), PTR).flip(0)  # turning the whole tensor round is the classic error
    assert not torch.allclose(layer(x, PTR, reverse=True), whole)


@pytest.mark.parametrize("combine", ["sum", "concat", "hydra"])
def test_alone_equals_batched(combine):
    layer = spread(BiMamba(6, combine=combine, d_state=4).double()).eval()
    x = torch.randn(9, 6, dtype=torch.float64)
    out = layer(x, PTR)
    for a, b in itertools.pairwise(PTR.tolist()):
        assert_close(out[a:b], layer(x[a:b], torch.tensor([0, b - a])))
        assert_close(out[a:b], layer(x[a:b]))


@pytest.mark.parametrize("combine", ["sum", "concat"])
def test_turning_sequences_round_exchanges_the_directions(combine):
    layer = spread(BiMamba(4, combine=combine).double())
    other = BiMamba(4, combine=combine).double()
    state = layer.state_dict()
    swap = {"forward_ssm": "backward_ssm", "backward_ssm": "forward_ssm"}
    state = {
        ".".join([swap.get(name.split(".")[0], name.split(".")[0]), *name.split(".")[1:]]): v
        for name, v in state.items()
    }
    if combine == "concat":
        state["out_proj.weight"] = torch.cat(layer.out_proj.weight.chunk(2, dim=1)[::-1], dim=1)
    other.load_state_dict(state)
    x = torch.randn(9, 4, dtype=torch.float64)
    assert_close(other(x[FLIP], PTR)[FLIP], layer(x, PTR))
    assert not torch.allclose(layer(x[FLIP], PTR)[FLIP], layer(x, PTR))


def test_sum_is_two_layers():
    layer = spread(BiMamba(4).double())
    x = torch.randn(9, 4, dtype=torch.float64)
    rows = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    rows = rows * layer.norm.weight + layer.norm.bias
    both = layer.forward_ssm(rows, PTR) + layer.backward_ssm(rows[FLIP], PTR)[FLIP]
    assert_close(layer(x, PTR), x + both @ layer.out_proj.weight.t())


def test_fold_merges_the_last_two_maps():
    layer = spread(BiMamba(4).double())
    folded = BiMamba(4, fold=True).double()
    state = layer.state_dict()
    last = state.pop("out_proj.weight")
    for name in ("forward_ssm", "backward_ssm"):
        state[f"{name}.out_proj.weight"] = last @ state[f"{name}.out_proj.weight"]
    folded.load_state_dict(state)
    x = torch.randn(9, 4, dtype=torch.float64)
    assert_close(folded(x, PTR), layer(x, PTR))


def test_hydra_counts_a_row_once():
    """The matrix of the mixer: below its diagonal one scan, above it the other, on it D alone."""
    layer = spread(BiMamba(3, combine="hydra", norm=None, residual=False, d_state=2, d_conv=0).double())
    ssm, x = layer.forward_ssm.ssm, torch.randn(6, 3, dtype=torch.float64)
    u, gate = (x @ w.t() for w in ssm.in_proj.weight.chunk(2))
    u = u * torch.sigmoid(u)
    delta, B, C = (u @ ssm.x_proj.weight.t()).split([ssm.dt_rank, 2, 2], dim=1)
    delta = torch.nn.functional.softplus(delta @ ssm.dt_proj.weight.t() + ssm.dt_proj.bias)
    mixed = torch.zeros_like(u)
    for e in range(3):
        matrix = torch.zeros(6, 6, dtype=torch.float64)
        for t in range(6):
            for s in range(6):
                if t == s:
                    matrix[t, s] = ssm.D[e]
                    continue
                # what reached the row before t, on its side of s
                end, A_log, between = (
                    (t - 1, ssm.A_log, delta[s + 1 : t, e])
                    if s < t
                    else (t + 1, layer.forward_ssm.A_log, delta[t + 1 : s, e])
                )
                matrix[t, s] = (C[end] * torch.exp(-A_log[e].exp() * between.sum()) * B[s]).sum() * delta[s, e]
        mixed[:, e] = matrix @ u[:, e]
    expected = (mixed * gate * torch.sigmoid(gate)) @ ssm.out_proj.weight.t()
    assert_close(layer(x), expected)


def test_fresh_layers_start_as_mamba():
    layer = SelectiveSSM(64, d_state=5)
    assert_close(layer.A_log.exp(), torch.arange(1.0, 6).expand(64, 5))
    assert layer.D.eq(1).all()
    delta = torch.nn.functional.softplus(layer.dt_proj.bias)
    assert delta.min() >= 1e-3 * (1 - 1e-4)
    assert delta.max() <= 1e-1 * (1 + 1e-4)
    assert 0.2 < ((delta.log10() + 3) / 2).mean() < 0.8  # log-uniform: about a half
    assert layer.dt_rank == math.ceil(64 / 16)
    assert layer.dt_proj.weight.abs().max() <= layer.dt_rank**-0.5


@pytest.mark.parametrize("combine", ["sum", "hydra"])
def test_share_A(combine):
    layer = spread(BiMamba(4, combine=combine, share_A=True).double())
    apart = BiMamba(4, combine=combine).double()
    state = layer.state_dict()
    kept = [name for name in state if name.endswith("A_log")]
    assert len(kept) == 1  # each tensor once, as safetensors asks
    other = "backward_ssm.A_log" if combine == "sum" else "forward_ssm.A_log"
    apart.load_state_dict(state | {other: state[kept[0]]})
    x = torch.randn(9, 4, dtype=torch.float64)
    assert_close(layer(x, PTR), apart(x, PTR))
    layer.reset_parameters()


def test_what_is_not_decayed_is_marked():
    marked = {name for name, p in BiMamba(4).named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {f"{ssm}.{name}" for ssm in ("forward_ssm", "backward_ssm") for name in ("A_log", "D")}


def test_forward_only_does_not_look_ahead():
    x = torch.randn(6, 4)
    later = x.clone()
    later[3:] = torch.randn(3, 4)
    one, both = BiMamba(4, bidirectional=False), BiMamba(4)
    assert torch.equal(one(x)[:3], one(later)[:3])
    assert not torch.allclose(both(x)[:3], both(later)[:3])


@pytest.mark.parametrize("combine", ["sum", "concat", "hydra"])
def test_derivatives(combine):
    layer = spread(BiMamba(2, combine=combine, d_state=2, d_conv=2).double())
    check_derivatives(lambda x: layer(x, torch.tensor([0, 2, 2, 3])), [torch.randn(3, 2, dtype=torch.float64)])


@pytest.mark.parametrize("combine", ["sum", "concat", "hydra"])
def test_compile(combine):
    layer = BiMamba(4, combine=combine, d_state=4)
    check_compile(lambda x: layer(x, PTR), [torch.randn(9, 4)])


@pytest.mark.parametrize("combine", ["sum", "concat", "hydra"])
def test_sizes_without_rows(combine):
    layer = BiMamba(4, combine=combine)
    for rows, ptr in ((0, [0]), (0, [0, 0, 0]), (1, [0, 1]), (1, [0, 0, 1])):
        x = torch.randn(rows, 4, requires_grad=True)
        out = layer(x, torch.tensor(ptr))
        assert out.shape == (rows, 4)
        out.sum().backward()
        assert x.grad.isfinite().all()


def test_autocast_and_casts():
    layer = BiMamba(8)
    x = torch.randn(9, 8)
    expected = layer(x, PTR)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, PTR)
        out.sum().backward()
    assert torch.allclose(out.float(), expected, atol=0.1)
    low = layer.bfloat16()(x.bfloat16(), PTR)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), expected, atol=0.2)


@pytest.mark.parametrize("make", [lambda: SelectiveSSM(4), lambda: BiMamba(4), lambda: BiMamba(4, combine="hydra")])
def test_state_dict(make):
    x = torch.randn(9, 4)
    assert_state_dict_roundtrip(make, lambda layer: layer(x, PTR))


def test_dropout_is_of_training_alone():
    layer = BiMamba(4, dropout=1.0)
    x = torch.randn(9, 4)
    assert torch.equal(layer(x, PTR), x)
    assert not torch.equal(layer.eval()(x, PTR), x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectiveSSM(0), "channels is 0"),
        (lambda: SelectiveSSM(16.0), "channels is 16.0"),
        (lambda: SelectiveSSM(4, d_state=0), "d_state is 0"),
        (lambda: SelectiveSSM(4, d_conv=-1), "d_conv is -1"),
        (lambda: SelectiveSSM(4, expand=0), "expand is 0"),
        (lambda: SelectiveSSM(4, dt_rank="full"), "dt_rank is 'full'"),
        (lambda: SelectiveSSM(4, discretization="exact"), "discretization is 'exact'"),
        (lambda: BiMamba(4, combine="mean"), "combine is 'mean'"),
        (lambda: BiMamba(4, combine="concat", fold=True), "fold merges"),
        (lambda: BiMamba(4, combine="concat", bidirectional=False), "nothing to combine"),
        (lambda: BiMamba(4, combine="hydra", d_skip=False), "d_skip is False"),
        (lambda: BiMamba(4, norm="batch_norm"), "norm is 'batch_norm'"),
        (lambda: BiMamba(4, dropout=2), "dropout is 2"),
        (lambda: BiMamba(4)(torch.randn(3, 5)), r"x: expected \[T, 4\], got shape \[3, 5\]"),
        (lambda: BiMamba(4)(torch.randn(1, 3, 4)), r"x: expected \[T, 4\], got shape \[1, 3, 4\]"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_ptr():
    with pytest.raises(IndexError, match=r"ptr\[2\] = 2"):
        SelectiveSSM(4)(torch.randn(5, 4), torch.tensor([0, 3, 2, 5]))


def test_repr():
    assert repr(BiMamba(4)) == "BiMamba(4, d_state=16, combine='sum')"
    assert repr(SelectiveSSM(4)) == "SelectiveSSM(4, d_state=16, d_conv=4, inner_channels=4, dt_rank=1)"
