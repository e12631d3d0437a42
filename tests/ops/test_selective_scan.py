"""The checks that are numbered are those of the specification's list for the scan."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from geo import _native, bench
from geo.ops import segment_causal_conv1d, selective_scan, selective_scan_reference
from geo.ops import selective_scan as public
from geo.testing import assert_close, check_compile, check_derivatives

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAWS = [(reverse, law) for reverse in (False, True) for law in ("euler", "zoh")]
LENGTHS = [3, 0, 1, 40, 7, 0, 100, 1]  # empty, single, and cut into chunks
SIZES = [(1, 1), (3, 4), (16, 8), (17, 16), (64, 17)]  # E, N
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
nan = float("nan")
Scan = Callable[..., Any]
module = sys.modules[public.__module__]


def segments(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def draw(lengths: list[int], E: int, N: int, device="cpu", dtype=torch.float32, full: bool = True) -> dict[str, Any]:
    """Arguments of a scan; without ``full``, none that may be left out, and steps that are positive as they are."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, count = sum(lengths), len(lengths)
    shapes = {"u": (rows, E), "delta": (rows, E), "A": (E, N), "B": (rows, N), "C": (rows, N)}
    if full:
        shapes |= {"D": (E,), "z": (rows, E), "delta_bias": (E,), "initial_state": (count, E, N)}
    args: dict[str, Any] = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    args["A"] = -args["A"].exp()
    args["A"][:, -1:] = 0  # an accumulator
    if not full:
        args["delta"] = softplus(args["delta"])
    narrow = ("u", "delta", "B", "C", "z")
    args = {name: t.to(device, dtype if name in narrow else wide) for name, t in args.items()}
    return {**args, "delta_softplus": full, "ptr": segments(lengths, device)}


_NODES, _WEIGHTS = (torch.from_numpy(t) for t in np.polynomial.legendre.leggauss(16))


def mean_of_exponential(x: Tensor) -> Tensor:
    """The integral of exp(s x) over s in [0, 1], (exp(x) - 1) / x: near 0 by quadrature, which is exact there."""
    near = x.abs() < 1
    far = torch.where(near, 1, x)
    points = torch.where(near, x, 0)[..., None] * (1 + _NODES.to(x)) / 2
    return torch.where(near, points.exp() @ _WEIGHTS.to(x) / 2, far.expm1() / far)


def loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    ptr: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "euler",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Any:
    """One row after the other, as the formula stands."""
    step = delta if delta_bias is None else delta + delta_bias
    step = softplus(step) if delta_softplus else step
    bounds = [0, len(u)] if ptr is None else ptr.tolist()
    rows: dict[int, Tensor] = {}
    ends = []
    for s, (begin, end) in enumerate(pairwise(bounds)):
        h = torch.zeros_like(A) if initial_state is None else initial_state[s]
        for t in reversed(range(begin, end)) if reverse else range(begin, end):
            x = step[t, :, None] * A
            gain = step[t, :, None] * (mean_of_exponential(x) if discretization == "zoh" else 1)
            h = x.exp() * h + gain * B[t] * u[t, :, None]
            rows[t] = h @ C[t]
        ends.append(h)
    y = torch.stack([rows[t] for t in range(len(u))]) if rows else u
    y = y if D is None else y + D * u
    y = y if z is None else y * silu(z)
    return (y, torch.stack(ends)) if return_last_state else y


def results(scan: Scan, args: dict[str, Any], cotangents: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
    """Output (and state), then the gradient of every tensor that is given, in the order of NAMES."""
    names = [name for name in NAMES if args.get(name) is not None]
    leaves = {name: args[name].detach().clone().requires_grad_() for name in names}
    out = scan(**{**args, **leaves, **options})
    out = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    if cotangents is None:
        cotangents = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in out]
    pairs = [(o, c.to(o.device, o.dtype)) for o, c in zip(out, cotangents, strict=True) if o.requires_grad]
    grads = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if pairs:  # without rows, the reference has nothing to differentiate
        outputs, given = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, list(leaves.values()), given, allow_unused=True, materialize_grads=True)
    for name, grad in zip(names, grads, strict=True):
        assert grad.dtype == args[name].dtype, name
    return [o.detach() for o in out] + list(grads)


def wide(args: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in args.items()}


def assert_all_close(actual: list[Tensor], expected: list[Tensor], factor: float = 1.0) -> None:
    """With a tolerance that grows with the root of the largest entry, as for sums of that many terms."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = max(1.0, math.sqrt(float(e.abs().max()))) if e.numel() else 1.0
        assert_close(a, e, factor * scale, f"result {i}")


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit by the compiled kernels; the order of torch's sums depends on shapes and strides."""
    if actual.is_cuda or _native.have("cpu"):
        assert torch.equal(actual, expected)
    assert_close(actual, expected)


def compare(scan: Scan, reference: Scan, args: dict[str, Any], factor: float = 1.0, **options: Any) -> None:
    """Results equal those in float64; the cotangent of a 16-bit output is rounded for both."""
    shapes = [torch.randn(args["u"].shape)]
    if options.get("return_last_state"):
        shapes.append(torch.randn(args["ptr"].numel() - 1, *args["A"].shape))
    cotangents = [shapes[0].to(args["u"].dtype).double(), *(s.double() for s in shapes[1:])]
    actual = results(scan, args, cotangents, **options)
    assert_all_close(actual, results(reference, wide(args), cotangents, **options), factor)


# -- definition --------------------------------------------------------------------------------------------------------
def test_table(device):
    """Decay 1/2 a row, by hand: h = 1, 5/2 | 3 forward and 2, 2 | 3 backward, and what zero-order hold makes of it."""
    u = torch.tensor([[1.0], [2.0], [3.0]], device=device)
    one, A, D = (
        torch.ones_like(u),
        torch.full((1, 1), -math.log(2), device=device),
        torch.full((1,), 10.0, device=device),
    )
    ptr = torch.tensor([0, 2, 2, 3], device=device)
    expected = {False: ([1.0, 2.5, 3.0], [2.5, 8.0, 3.0]), True: ([2.0, 2.0, 3.0], [2.0, 8.0, 3.0])}
    state = torch.tensor([0.0, 8.0, 0.0], device=device).view(3, 1, 1)
    for reverse, (h, last) in expected.items():
        for law, gain in (("euler", 1.0), ("zoh", 0.5 / math.log(2))):
            y, end = selective_scan(
                u,
                one,
                A,
                one,
                one,
                D,
                None,
                ptr=ptr,
                reverse=reverse,
                discretization=law,
                initial_state=state * gain,
                return_last_state=True,
            )
            h_t = torch.tensor(h, device=device)
            assert_close(y.flatten(), gain * h_t + 10 * u.flatten())
            assert_close(end.flatten(), gain * torch.tensor(last, device=device))
    gated = selective_scan(u, one, A, one, one, z=one, delta_bias=one[0], ptr=ptr)
    decayed = torch.tensor([2.0, 4.5, 6.0], device=device)  # two steps at once: decay 1/4, gain 2
    assert_close(gated.flatten(), decayed / (1 + math.exp(-1)))


@pytest.mark.parametrize(("reverse", "law"), LAWS)
@pytest.mark.parametrize("full", [False, True])
def test_reference_equals_loop(device, reverse, law, full):
    """In float64: the reference, the plain kernels behind it and what is compiled, with all arguments and with few."""
    args = draw(LENGTHS, 3, 4, device, torch.float64, full)
    for scan in (selective_scan_reference, selective_scan):
        compare(scan, loop, args, reverse=reverse, discretization=law, return_last_state=full)


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 1000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_equals_reference(device, dtype, rows, reverse, law):
    third = rows // 3
    ragged = [third, 0, 1 if rows else 0, max(0, rows - third - 1)]
    for E, N in SIZES if rows < 1000 else SIZES[2:4]:
        for lengths in ([rows], ragged) if rows < 1000 else (ragged,):
            args = draw(lengths, E, N, device, dtype)
            compare(
                selective_scan,
                selective_scan_reference,
                args,
                reverse=reverse,
                discretization=law,
                return_last_state=True,
            )
    args = draw([rows], 5, 3, device, dtype, full=False)
    compare(selective_scan, selective_scan_reference, args, reverse=reverse, discretization=law)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 60), max_size=8),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    reverse=st.booleans(),
    law=st.sampled_from(["euler", "zoh"]),
    given=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_any_size_and_any_arguments(seed, lengths, sizes, reverse, law, given):
    torch.manual_seed(seed)
    args = draw(lengths, *sizes, dtype=torch.float64)
    for name, there in zip(("D", "z", "delta_bias", "initial_state"), given, strict=False):
        if not there:
            del args[name]
    args["delta_softplus"] = given[4]
    if not given[4]:
        args["delta"] = args["delta"].abs() + 2  # positive also with the bias, or nearly
    compare(
        selective_scan,
        selective_scan_reference,
        args,
        reverse=reverse,
        discretization=law,
        return_last_state=given[5],
    )


def test_non_contiguous(device):
    args = draw(LENGTHS, 5, 3, device, torch.float64)
    strided = {
        name: torch.stack([v, v], -1)[..., 0] if isinstance(v, Tensor) and v.dim() == 1 else v
        for name, v in args.items()
    }
    strided |= {name: v.mT.contiguous().mT for name, v in args.items() if isinstance(v, Tensor) and v.dim() > 1}
    assert not any(v.is_contiguous() for v in strided.values() if isinstance(v, Tensor) and v.numel() > 1)
    given = [torch.randn(5, sum(LENGTHS)).T, torch.randn(len(LENGTHS), 3, 5).mT]
    for a, b in zip(
        results(selective_scan, strided, given, return_last_state=True),
        results(selective_scan, args, [g.contiguous() for g in given], return_last_state=True),
        strict=True,
    ):
        assert_same(a, b)


# -- the numbered checks -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [[2, 0, 1], [3], [1, 1], [0, 0]], ids=str)
@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_check_1_derivatives(device, lengths, reverse, law):
    """(1) First and second derivatives in float64: ragged with empty and single rows, one segment, no rows."""
    args = draw(lengths, 2, 2, device)
    tensors = [args.pop(name) for name in NAMES]
    fixed = {**args, "reverse": reverse, "discretization": law}

    def scan(*values: Tensor) -> Any:
        return selective_scan(**dict(zip(NAMES, values, strict=True)), **fixed, return_last_state=True)

    check_derivatives(scan, tensors)
    if lengths == [2, 0, 1]:
        few = draw(lengths, 2, 2, device, full=False)
        fixed = {"ptr": few["ptr"], "reverse": reverse, "discretization": law}
        check_derivatives(lambda *t: selective_scan(*t, **fixed), [few[name] for name in NAMES[:5]])


def test_check_1_third_derivative(device):
    """(1) Derivatives of any order run through the plain kernels; also where two arguments are one tensor."""
    args = wide(draw([3, 0, 2], 2, 2, device))
    found = []
    for scan in (selective_scan, selective_scan_reference):
        u, delta = args["u"].clone().requires_grad_(), args["delta"].clone().requires_grad_()
        value = scan(u, delta, args["A"], args["B"], args["B"], z=u, delta_softplus=True, ptr=args["ptr"])
        for power in (1, 2, 3):
            value = sum(g.pow(power).sum() for g in torch.autograd.grad(value.sum(), (u, delta), create_graph=True))
        found.append(value.detach())
    assert_close(*found)


@pytest.mark.parametrize("reverse", [False, True])
def test_check_2_dense_pairwise_form(device, reverse):
    """(2) y = M u with M[e, t, s] = sum_n C_tn exp(A_en (sum of Delta between s and t)) B_sn Delta_se."""
    args = draw([20, 0, 1, 9], 3, 4, device, torch.float64, full=False)
    ptr, delta = args["ptr"], args["delta"]
    segment = torch.repeat_interleave(torch.arange(4, device=device), ptr.diff())
    row = torch.arange(30, device=device)
    total = delta.flip(0).cumsum(0).flip(0) if reverse else delta.cumsum(0)
    before = (row[None] >= row[:, None]) if reverse else (row[None] <= row[:, None])  # [t, s]
    between = total[:, None] - total[None]  # [t, s, E]
    kernel = (args["A"] * between[..., None]).clamp(max=0).exp()  # the other half is masked
    M = torch.einsum("tn,tsen,sn,se->ets", args["C"], kernel, args["B"], delta)
    M = M * (before & (segment[:, None] == segment[None]))
    expected = torch.einsum("ets,se->te", M, args["u"])
    torch.testing.assert_close(selective_scan(**args, reverse=reverse), expected, rtol=1e-12, atol=1e-12)


def test_check_3_gates_zeroed_at_starts(device):
    """(3) One scan over all rows, with the decay set to 0 where a segment starts, as users of other scans do it."""
    args = draw(LENGTHS, 3, 4, device, torch.float64, full=False)
    decay = (args["delta"][..., None] * args["A"]).exp()
    decay[args["ptr"][:-1][args["ptr"].diff() > 0]] = 0
    added = args["delta"][..., None] * args["B"][:, None] * args["u"][..., None]
    h, states = torch.zeros_like(args["A"]), []
    for a, x in zip(decay, added, strict=True):
        h = a * h + x
        states.append(h)
    expected = (torch.stack(states) * args["C"][:, None]).sum(-1)
    torch.testing.assert_close(selective_scan(**args), expected, rtol=1e-12, atol=1e-12)


def test_check_3_mambapy(device):
    """(3) mambapy's parallel scan, on the same rows."""
    pscan = pytest.importorskip("mambapy.pscan").pscan
    args = draw(LENGTHS, 3, 4, device, torch.float64, full=False)
    decay = (args["delta"][..., None] * args["A"]).exp()
    decay[args["ptr"][:-1][args["ptr"].diff() > 0]] = 0
    states = pscan(decay[None], (args["delta"][..., None] * args["B"][:, None] * args["u"][..., None])[None])[0]
    expected = (states * args["C"][:, None]).sum(-1)
    torch.testing.assert_close(selective_scan(**args), expected, rtol=1e-12, atol=1e-12)


def test_check_3_equal_lengths_as_mamba_has_them(device):
    """(3) The formula of mamba_ssm's reference on [batch, channels, length], in float32, which it casts to."""
    batch, length, E, N = 5, 33, 6, 4
    args = draw([length] * batch, E, N, device)
    del args["initial_state"]
    by_batch = {name: args[name].view(batch, length, -1).transpose(1, 2) for name in ("u", "delta", "B", "C", "z")}
    step = softplus(by_batch["delta"] + args["delta_bias"][:, None])
    decay = torch.einsum("bdl,dn->bdln", step, args["A"]).exp()
    added = torch.einsum("bdl,bnl,bdl->bdln", step, by_batch["B"], by_batch["u"])
    h, rows = torch.zeros(batch, E, N, device=device), []
    for t in range(length):
        h = decay[:, :, t] * h + added[:, :, t]
        rows.append(torch.einsum("bdn,bn->bd", h, by_batch["C"][:, :, t]))
    y = (torch.stack(rows, 2) + by_batch["u"] * args["D"][:, None]) * silu(by_batch["z"])
    out, last = selective_scan(**args, return_last_state=True)
    torch.testing.assert_close(out.view(batch, length, E).transpose(1, 2), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, h, rtol=1e-5, atol=1e-5)


def alone(scan: Scan) -> Scan:
    """Segment by segment."""

    def one(initial_state: Tensor | None = None, **args: Any) -> tuple[Tensor, Tensor]:
        ptr, outputs = args.pop("ptr"), []
        for s, (begin, end) in enumerate(pairwise(ptr.tolist())):
            rows = {name: args[name][begin:end] for name in ("u", "delta", "B", "C", "z") if args.get(name) is not None}
            state = None if initial_state is None else initial_state[s : s + 1]
            whole = torch.tensor([0, end - begin], device=ptr.device)
            outputs.append(scan(**{**args, **rows}, ptr=whole, initial_state=state))
        return torch.cat([y for y, _ in outputs]), torch.cat([state for _, state in outputs])

    return one


def padded(scan: Scan, neutral: bool = True) -> Scan:
    """Each segment filled up with rows to one length: of step 0, or of 0 before bias and softplus, which is wrong."""

    def run(**args: Any) -> tuple[Tensor, Tensor]:
        ptr = args.pop("ptr")
        lengths, longest = ptr.diff().tolist(), max(1, int(ptr.diff().max()))
        step = args["delta"] + args["delta_bias"]
        if neutral:
            args |= {"delta": softplus(step), "delta_bias": None, "delta_softplus": False}
        for name in ("u", "delta", "B", "C", "z"):
            args[name] = torch.cat([pad(t, (0, 0, 0, longest - len(t))) for t in args[name].split(lengths)])
        y, state = scan(**args, ptr=torch.arange(len(lengths) + 1, device=ptr.device) * longest)
        return torch.cat([t[:n] for t, n in zip(y.split(longest), lengths, strict=True)]), state

    return run


def ragged_equals(scan: Scan, other: Scan, device: torch.device) -> None:
    """Check 4, of output, last state and all gradients."""
    args = draw(LENGTHS, 3, 4, device, torch.float64)
    args["delta_bias"] += 1
    for reverse, law in LAWS:
        options = {"reverse": reverse, "discretization": law, "return_last_state": True}
        assert_all_close(results(scan, args, **options), results(other, args, **options))


def test_check_4_ragged_equals_alone_equals_padded(device):
    """(4) Forward, last state and all gradients."""
    ragged_equals(selective_scan, alone(selective_scan), device)
    ragged_equals(selective_scan, padded(selective_scan), device)


def flipped(ptr: Tensor) -> Tensor:
    """The rows of each segment in the other order."""
    segment = torch.repeat_interleave(torch.arange(ptr.numel() - 1, device=ptr.device), ptr.diff())
    return (ptr[:-1] + ptr[1:] - 1)[segment] - torch.arange(segment.numel(), device=ptr.device)


def reverse_is_flipped(scan: Scan, device: torch.device) -> None:
    """Check 5, of output, last state and all gradients."""
    args = draw(LENGTHS, 3, 4, device, torch.float64)
    rev = flipped(args["ptr"])
    assert torch.equal(rev[rev], torch.arange(rev.numel(), device=device))

    def by_flip(**given: Any) -> tuple[Tensor, Tensor]:
        rows = {name: given[name][rev] for name in ("u", "delta", "B", "C", "z")}
        y, state = selective_scan(**{**given, **rows, "reverse": False})
        return y[rev], state

    for law in ("euler", "zoh"):
        options = {"reverse": True, "discretization": law, "return_last_state": True}
        assert_all_close(results(scan, args, **options), results(by_flip, args, **options))


def test_check_5_reverse_is_the_flipped_scan(device):
    """(5) reverse(x) = flip(forward(flip(x))), flipped in each segment."""
    reverse_is_flipped(selective_scan, device)


@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_check_6_order_of_segments_permutes_the_bits(device, reverse, law):
    """(6) Output and gradients by rows are the same bits wherever a segment stands, in tiles of the same blocks."""
    args = draw(LENGTHS, 17, 5, device)
    order = [6, 0, 3, 1, 7, 2, 4, 5]
    where = torch.cat([torch.arange(*pair, device=device) for pair in pairwise(args["ptr"].tolist())])
    parts = where.split(LENGTHS)
    rows = torch.cat([parts[i] for i in order])
    moved = {name: args[name][rows] for name in ("u", "delta", "B", "C", "z")}
    moved |= {"initial_state": args["initial_state"][order], "ptr": segments([LENGTHS[i] for i in order], device)}
    given = [torch.randn(len(rows), 17, device=device), torch.randn(len(order), 17, 5, device=device)]
    options = {"reverse": reverse, "discretization": law, "return_last_state": True}
    y, state, *grads = results(selective_scan, args, given, **options)
    other, other_state, *others = results(
        selective_scan, {**args, **moved}, [given[0][rows], given[1][order]], **options
    )
    assert_same(other, y[rows])
    assert_same(other_state, state[order])
    for name, grad, moved_grad in zip(NAMES, grads, others, strict=True):
        if name in ("u", "delta", "B", "C", "z"):
            assert_same(moved_grad, grad[rows])
    assert_same(others[-1], grads[-1][order])


@pytest.mark.parametrize("law", ["euler", "zoh"])
def test_check_7_time_invariant_is_a_convolution(device, law):
    """(7) With constant Delta, B and C: a causal convolution with the kernel sum_n C A^k B."""
    args = wide(draw([50, 0, 7], 3, 4, device, full=False))
    u, A, ptr = args["u"], args["A"], args["ptr"]
    delta, B, C = (args[name][:1].expand_as(args[name]) for name in ("delta", "B", "C"))
    step = delta[0, :, None]
    gain = torch.where(A == 0, step, (step * A).expm1() / torch.where(A == 0, 1, A)) if law == "zoh" else step
    taps = torch.stack([((step * A * k).exp() * gain * B[0] * C[0]).sum(1) for k in range(50)], 1)
    expected = torch.cat(
        [
            torch.nn.functional.conv1d(pad(part.T[None], (49, 0)), taps.flip(1)[:, None], groups=3)[0].T
            for part in u.tensor_split(ptr[1:-1].cpu())
            if len(part)
        ]
    )
    assert_close(selective_scan(u, delta, A, B, C, ptr=ptr, discretization=law), expected)


@pytest.mark.parametrize("law", ["euler", "zoh"])
def test_check_7_no_decay_is_a_cumulative_sum(device, law):
    """(7) A = 0: the running sum of Delta B u, met with C, whatever the discretisation."""
    args = wide(draw([50, 0, 7], 3, 4, device, full=False))
    added = args["delta"][..., None] * args["B"][:, None] * args["u"][..., None]
    total = torch.cat([part.cumsum(0) for part in added.split([50, 7])])
    args["A"].zero_()
    assert_close(selective_scan(**args, discretization=law), (total * args["C"][:, None]).sum(-1))


@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_check_8_split_with_state_equals_one_pass(device, reverse, law):
    """(8) A segment in two, the last state of the one being the first of the other; and all gradients."""
    args = draw([61], 3, 4, device, torch.float64)

    def split(**given: Any) -> tuple[Tensor, Tensor]:
        parts = []
        for begin, end in ((0, 20), (20, 61)):
            rows = {name: given[name][begin:end] for name in ("u", "delta", "B", "C", "z")}
            parts.append({**given, **rows, "ptr": torch.tensor([0, end - begin], device=device)})
        first, second = reversed(parts) if reverse else parts
        y1, state = selective_scan(**first)
        y2, last = selective_scan(**{**second, "initial_state": state})
        return torch.cat([y2, y1] if reverse else [y1, y2]), last

    options = {"reverse": reverse, "discretization": law, "return_last_state": True}
    assert_all_close(results(split, args, **options), results(selective_scan, args, **options))


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize(
    "lengths", [[9000], [20] * 300 + [0, 1, 2000], [7] * 50 + [17001, 2000, 0] + [7] * 50], ids=["one", "many", "huge"]
)
@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_check_9_same_bits_on_any_number_of_threads(lengths, reverse, law):
    """(9) Output, state and gradients, of one long segment, of many, and of one that holds most rows."""
    args = draw(lengths, 40, 8)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(results(selective_scan, args, reverse=reverse, discretization=law, return_last_state=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_check_10_a_global_flip_fails_check_5(device):
    """(10) All rows flipped at once, and the boundaries kept: the classic mistake."""

    def mutant(**args: Any) -> tuple[Tensor, Tensor]:
        rows = {name: args[name].flip(0) for name in ("u", "delta", "B", "C", "z")}
        y, state = selective_scan(**{**args, **rows, "reverse": False})
        return y.flip(0), state

    with pytest.raises(AssertionError):
        reverse_is_flipped(mutant, device)


def test_check_10_a_state_that_is_not_reset_fails_check_4(device):
    """(10) One scan over all segments."""

    def mutant(**args: Any) -> tuple[Tensor, Tensor]:
        state, ptr = args["initial_state"], torch.tensor([0, len(args["u"])], device=device)
        y, last = selective_scan(**{**args, "ptr": ptr, "initial_state": state[:1]})
        return y, torch.cat([last, state[1:]])

    with pytest.raises(AssertionError):
        ragged_equals(mutant, alone(selective_scan), device)


def test_check_10_padding_before_softplus_fails_check_4(device):
    """(10) Padding whose step is softplus(bias), not 0: states decay beyond the end of their segments."""
    with pytest.raises(AssertionError):
        ragged_equals(selective_scan, padded(selective_scan, neutral=False), device)


def test_check_10_a_convolution_without_reset_fails_check_4(device):
    """(10) The convolution before the scan has to start anew, too."""
    x, weight, ptr = torch.randn(9, 3, device=device), torch.randn(3, 4, device=device), segments([4, 0, 5], device)

    def ragged_equals_alone(conv: Scan) -> None:
        expected = torch.cat([segment_causal_conv1d(part, weight) for part in x.split([4, 5])])
        assert_close(conv(x, weight, None, ptr), expected)

    ragged_equals_alone(segment_causal_conv1d)
    with pytest.raises(AssertionError):
        ragged_equals_alone(lambda x, weight, bias, ptr: segment_causal_conv1d(x, weight, bias))


@pytest.mark.parametrize("reverse", [False, True])
def test_check_11_float32_is_accurate_over_a_long_segment(device, reverse):
    """(11) 20000 rows: float32 within 1e-5 of float64, and of rows in bfloat16 with a state in float32."""
    args = draw([20000], 4, 8, device)
    args["delta_bias"] -= 4  # steps as Mamba starts with them: the state remembers hundreds of rows
    args["A"] = -torch.arange(1.0, 9.0, device=device).expand(4, 8)
    del args["z"], args["initial_state"]
    for dtype in (torch.float32, torch.bfloat16):
        rows = {name: args[name].to(dtype) for name in ("u", "delta", "B", "C")}
        y, state = selective_scan(**{**args, **rows}, reverse=reverse, return_last_state=True)
        wanted, end = selective_scan(**wide({**args, **rows}), reverse=reverse, return_last_state=True)
        assert y.dtype == dtype
        assert state.dtype == torch.float32
        assert (state - end).abs().max() < 1e-5 * end.abs().max()
        unit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # the output's own rounding
        assert (y - wanted).abs().max() < unit * wanted.abs().max()


# -- numbers at the edge -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("law", ["euler", "zoh"])
def test_extreme_steps_and_decays(device, dtype, law):
    """Decays that underflow (factorised, they would overflow), and A from 0 up to where the closed forms begin."""
    A = -torch.cat([torch.zeros(1), torch.logspace(-30, 2, 65)]).to(device, dtype).expand(3, -1)
    rows = torch.tensor([0.0, 1e-20, 1e-6, 1e-3, 0.1, 0.3, 1.0, 30.0, 1e4], dtype=dtype, device=device)
    delta = rows[torch.randint(9, (300, 3), device=device)]
    u, B, C = (torch.randn(300, n, device=device, dtype=dtype) for n in (3, 66, 66))
    args = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "ptr": segments([250, 0, 50], device)}
    compare(selective_scan, loop, args, 10, discretization=law)  # entries up to 1e4 cancel


@pytest.mark.parametrize(
    ("dtype", "rate", "step"),
    [
        (torch.float32, -1e-30, 1e-9),
        (torch.float32, -1e-38, 1e-3),
        (torch.float32, 0.0, 1e-20),
        (torch.float64, -1e-300, 1e-9),
        (torch.float64, -1e-30, 1e-9),
    ],
)
def test_zero_order_hold_of_a_product_that_underflows(device, dtype, rate, step):
    """v is Delta then, and with u = 1 / Delta each row adds 1: nothing is small enough to hide behind a tolerance."""
    ones = torch.ones(3, 1, device=device, dtype=dtype)
    A, delta = torch.full_like(ones[:1], rate), torch.full_like(ones, step)
    for scan in (selective_scan, selective_scan_reference):
        y = scan(1 / delta, delta, A, ones, ones, discretization="zoh")
        torch.testing.assert_close(y[:, 0], torch.arange(1, 4, device=device, dtype=dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rate", [-1e38, -math.inf])
def test_zero_order_hold_of_a_huge_rate(device, rate):
    """v is -1 / A then, which is 0 to float32, and not Delta."""
    ones = torch.ones(3, 1, device=device)
    for scan in (selective_scan, selective_scan_reference):
        y = scan(ones, ones, rate * ones[:1], ones, ones, discretization="zoh")
        torch.testing.assert_close(y, 0 * ones, rtol=0, atol=2e-38)


def test_extreme_softplus(device):
    """Around the threshold of 20, where softplus becomes the identity, and where it underflows."""
    args = draw([9], 1, 2, device, torch.float64)
    args["delta"] = torch.tensor([-800.0, -100.0, -30.0, 0.0, 19.0, 19.99, 20.01, 25.0, 100.0], device=device).double()[
        :, None
    ]
    args["delta_bias"] = torch.zeros(1, dtype=torch.float64, device=device)
    compare(selective_scan, loop, args)


@pytest.mark.parametrize("name", ["delta", "u"])
@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_nan_stays_in_its_segment_and_channel(device, name, reverse, law):
    """A NaN reaches the rows from its own on, in the order of the scan; of gradients, no row of another segment."""
    lengths = [5, 0, 60, 9]
    args = draw(lengths, 20, 3, device)
    args[name][40, 17] = nan
    y, state, *grads = results(selective_scan, args, reverse=reverse, discretization=law, return_last_state=True)
    expected = torch.zeros(74, 20, dtype=torch.bool, device=device)
    expected[slice(5, 41) if reverse else slice(40, 65), 17] = True
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(
        state.isnan().any(-1),
        torch.zeros(4, 20, device=device).index_fill_(0, torch.tensor(2), 1).bool()
        & (torch.arange(20, device=device) == 17),
    )
    outside = torch.tensor([*range(5), *range(65, 74)], device=device)
    for label, grad in zip(NAMES, grads, strict=True):
        if label in ("u", "delta", "B", "C", "z"):
            assert grad[outside].isfinite().all(), label
        elif label in ("A", "D", "delta_bias"):
            assert grad[torch.arange(20, device=device) != 17].isfinite().all(), label
        else:
            assert grad[[0, 1, 3]].isfinite().all()


def test_empty_segments_keep_the_initial_state(device):
    for lengths in ([], [0], [0, 0, 0], [0, 4, 0]):
        args = draw(lengths, 3, 2, device)
        y, state, *_ = results(selective_scan, args, return_last_state=True)
        empty = args["ptr"].diff() == 0
        assert y.shape == (sum(lengths), 3)
        assert torch.equal(state[empty], args["initial_state"][empty])
        del args["initial_state"]
        assert not selective_scan(**args, return_last_state=True)[1][empty].any()


@pytest.mark.parametrize(("rows", "E", "N"), [(5, 0, 3), (5, 3, 0), (0, 3, 2), (0, 0, 0)])
def test_no_channels_no_states_no_segments(device, rows, E, N):
    args = draw([rows] if rows else [], E, N, device)
    compare(selective_scan, selective_scan_reference, args, return_last_state=True)


# -- how it is computed ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_plain_kernels_in_groups_of_chunks(device, monkeypatch, reverse, law):
    """However many chunks the plain kernels take at once, the results agree with the reference."""
    args = draw([300, 3, 0, 40, *[1] * 30], 3, 4, device, torch.float64)
    flags = (True, reverse, law == "zoh")
    tensors = [args[name] for name in NAMES]
    g_y, g_state = torch.randn_like(args["u"]), torch.randn_like(args["initial_state"])
    expected = results(
        selective_scan_reference, args, [g_y, g_state], reverse=reverse, discretization=law, return_last_state=True
    )
    for group in (1, 100, 1000, 1 << 22):
        monkeypatch.setattr(module, "_GROUP", group)
        found = module._scan_kernel(*tensors, args["ptr"], *flags, True)
        grads = module._backward_kernel(g_y, g_state, *tensors, args["ptr"], *flags)
        assert_all_close([*found, *grads], expected)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize(("reverse", "law"), LAWS)
def test_long_segment_in_windows(reverse, law):
    """Rows enough for several windows, and more threads than blocks of channels, against the plain kernels."""
    args, threads = draw([5, 20011, 3], 18, 9, dtype=torch.float64), torch.get_num_threads()
    inputs = (*(args[name] for name in NAMES), args["ptr"], True, reverse, law == "zoh")
    g_y, g_state = torch.randn_like(args["u"]), torch.randn_like(args["initial_state"])
    try:
        torch.set_num_threads(8)
        found = torch.ops.geo.selective_scan(*inputs, True)
        grads = torch.ops.geo.selective_scan_backward(g_y, g_state, *inputs)
    finally:
        torch.set_num_threads(threads)
    expected = [*module._scan_kernel(*inputs, True), *module._backward_kernel(g_y, g_state, *inputs)]
    assert_all_close([*found, *grads], expected)


@pytest.mark.skipif(not _native.have("cpu"), reason="no compiled CPU kernels")
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("E", [16, 64])
def test_memory_of_threads(threads, E):
    """What threads share of a long segment does not grow with it."""
    rows, before = 131072, torch.get_num_threads()
    args = draw([rows], E, 16)
    tensors = (*(args[name] for name in NAMES), args["ptr"], True, False, False)
    grad = torch.randn(rows, E)
    try:
        torch.set_num_threads(threads)
        first = bench.peak_extra_memory(lambda: torch.ops.geo.selective_scan(*tensors, False))
        second = bench.peak_extra_memory(lambda: torch.ops.geo.selective_scan_backward(grad, None, *tensors))
    finally:
        torch.set_num_threads(before)
    if first is None or second is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    assert first < rows * E * 4
    assert second < 4 * rows * E * 4


@pytest.mark.parametrize(("plain", "threads"), [(False, 1), (False, 2), pytest.param(True, 1, marks=pytest.mark.slow)])
def test_memory_grows_with_rows_and_channels_alone(monkeypatch, request, plain, threads):
    """Nothing like [T, E, N], of one long segment or of single rows: N = 16 would be 16 times [T, E]."""
    if not plain and not _native.have("cpu"):
        pytest.skip("no compiled CPU kernels")
    monkeypatch.setattr(module, "_GROUP", 1 << 18)
    rows, E, N = 32768, 64, 16
    unit = rows * E * 4
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    request.addfinalizer(lambda: torch.set_num_threads(before))
    for lengths in ([rows], [64] * (rows // 64), [1] * rows):
        args = draw(lengths, E, N, full=False)
        tensors = (*(args[name] for name in NAMES[:5]), None, None, None, None, args["ptr"], False, False, False)
        grad = torch.randn(rows, E)
        forward = module._scan_kernel if plain else torch.ops.geo.selective_scan
        backward = module._backward_kernel if plain else torch.ops.geo.selective_scan_backward
        with torch.no_grad():
            first = bench.peak_extra_memory(lambda f=forward, t=tensors: f(*t, False))
            second = bench.peak_extra_memory(lambda b=backward, g=grad, t=tensors: b(g, None, *t))
        if first is None or second is None:
            pytest.skip("the peak of resident memory cannot be reset here")
        assert first < (12 if plain else 2) * unit, (lengths[0], first / unit)
        assert second < (14 if plain else 4) * unit, (lengths[0], second / unit)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(device, grad, dtype):
    """The backward's own derivative looks at ``ptr``, so it is not traced."""
    for full in (False, True):
        args = draw([3, 0, 2], 3, 2, device, dtype, full)
        tensors = [args.get(name) for name in NAMES]
        leaves = [t if t is None else t.clone().requires_grad_(grad) for t in tensors]
        op, backward = torch.ops.geo.selective_scan.default, torch.ops.geo.selective_scan_backward.default
        torch.library.opcheck(op, (*leaves, args["ptr"], full, True, full, full))
        g_state = torch.randn(3, 3, 2, device=device) if full else None
        given = (torch.randn(5, 3, device=device).to(dtype), g_state, *tensors, args["ptr"], full, False, not full)
        torch.library.opcheck(backward, given)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic):
    args = draw([3, 0, 2], 3, 2, device)
    tensors, ptr = [args[name] for name in NAMES], args["ptr"]

    def scan(u: Tensor, *rest: Tensor) -> Any:
        return selective_scan(
            **dict(zip(NAMES, (torch.sin(u), *rest), strict=True)), delta_softplus=True, ptr=ptr, return_last_state=True
        )

    check_compile(scan, tensors, dynamic=dynamic)
    check_compile(lambda *t: selective_scan(*t, reverse=True, discretization="zoh"), tensors[:5], dynamic=dynamic)


@pytest.mark.slow
def test_inductor(device):
    args = draw([3, 0, 2], 3, 2, device, full=False)
    check_compile(
        lambda *t: selective_scan(*t, ptr=args["ptr"]).tanh(), [args[n] for n in NAMES[:5]], backend="inductor"
    )


def test_plain_pytorch_passes_the_same_tests():
    """What the kernels are compared with is also what runs without them."""
    if not _native.have("cpu"):
        pytest.skip("the other tests have run on them")
    wanted = "table or loop or bad or nan or empty or check_2 or check_3 or check_4 or check_5 or check_8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", wanted, __file__]
    env = {**os.environ, "GEO_DISABLE_NATIVE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ptr", "sentence"),
    [
        ([0, 4, 2, 6], r"ptr\[2\] = 2 is out of range \[4, 6\]"),
        ([1, 6], r"ptr\[0\] = 1 is out of range \[0, 0\]"),
        ([0, 5], r"ptr\[1\] = 5 is out of range \[6, 6\]"),
        ([0, -1, 6], r"ptr\[1\] = -1 is out of range \[0, 6\]"),
        ([0], r"ptr\[0\] = 0 is out of range \[6, 6\]"),
    ],
)
def test_bad_ptr(device, ptr, sentence):
    args = draw([6], 3, 2, device, full=False)
    args["ptr"] = torch.tensor(ptr, device=device)
    for scan in (selective_scan, selective_scan_reference):
        with pytest.raises(IndexError, match=f"selective_scan: {sentence}"):
            scan(**args)
    tensors = (*(args[name] for name in NAMES[:5]), None, None, None, None, args["ptr"], False, False, False)
    if device.type == "cpu":
        with pytest.raises((IndexError, RuntimeError), match=sentence):
            torch.ops.geo.selective_scan_backward(args["u"], None, *tensors)


def test_refusals():
    args = draw([4, 2], 3, 2)
    cases = [
        ({"u": args["u"][0]}, r"u: expected \[T, E\], got shape \[3\]"),
        ({"delta": args["delta"][:5]}, r"delta: expected \[T, E\] = \[6, 3\], got shape \[5, 3\]"),
        ({"A": args["A"][:2]}, r"A: expected \[E, N\] with E = 3 as in u, got shape \[2, 2\]"),
        ({"B": args["B"][:, :1]}, r"B: expected \[T, N\] = \[6, 2\], got shape \[6, 1\]"),
        ({"C": args["C"].T}, r"C: expected \[T, N\] = \[6, 2\], got shape \[2, 6\]"),
        ({"D": args["D"][:2]}, r"D: expected \[E\] = \[3\], got shape \[2\]"),
        ({"z": args["z"][0]}, r"z: expected \[T, E\] = \[6, 3\], got shape \[3\]"),
        ({"delta_bias": args["D"][:1]}, r"delta_bias: expected \[E\] = \[3\], got shape \[1\]"),
        ({"initial_state": args["A"]}, r"initial_state: expected \[S, E, N\] = \[2, 3, 2\], got shape \[3, 2\]"),
        ({"ptr": args["ptr"].int()}, r"ptr: expected int64 \[S \+ 1\], got torch\.int32 \[3\]"),
        ({"ptr": args["ptr"][:0]}, r"ptr: expected int64 \[S \+ 1\], got torch\.int64 \[0\]"),
        ({"discretization": "exact"}, r"discretization is 'exact', but must be one of 'euler', 'zoh'"),
    ]
    for change, sentence in cases:
        for scan in (selective_scan, selective_scan_reference):
            with pytest.raises(ValueError, match=sentence):
                scan(**{**args, **change})
    with pytest.raises(TypeError, match="B: expected a tensor, got NoneType"):
        selective_scan(**{**args, "B": None})
    with pytest.raises(TypeError, match=r"ptr: expected an int64 tensor \[S \+ 1\], got list"):
        selective_scan(**{**args, "ptr": [0, 6]})
    with pytest.raises(ValueError, match=r"all tensors must be on one device, got u on cpu, .*A on meta"):
        selective_scan(**{**args, "A": args["A"].to("meta")})
    with pytest.raises(TypeError, match=r"B: expected float16, bfloat16, float32 or float64, got torch\.int64"):
        selective_scan(**{**args, "B": args["B"].long()})
    with pytest.raises(RuntimeError, match=r"use geo\.ops\.selective_scan_reference there"):
        torch.func.grad(lambda u: selective_scan(**{**args, "u": u}).sum())(args["u"])
    grad = torch.func.grad(lambda u: selective_scan_reference(**{**args, "u": u}).sum())(args["u"])
    u = args["u"].clone().requires_grad_()
    assert_close(grad, torch.autograd.grad(selective_scan(**{**args, "u": u}).sum(), u)[0])


def test_dtypes():
    """16-bit rows stay so and states are float32; float64 anywhere makes all of it float64."""
    args = draw([4, 2], 3, 2)
    for change, dtype, state_dtype in (
        ({}, torch.float32, torch.float32),
        ({name: args[name].bfloat16() for name in ("u", "delta", "B", "C", "z")}, torch.bfloat16, torch.float32),
        ({"u": args["u"].half()}, torch.float32, torch.float32),
        ({"A": args["A"].double()}, torch.float64, torch.float64),
    ):
        y, state = selective_scan(**{**args, **change}, return_last_state=True)
        assert (y.dtype, state.dtype) == (dtype, state_dtype)
