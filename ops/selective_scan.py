r"""The selective scan of Mamba over ragged batches: a linear recurrence along the rows of each segment.

``geo::selective_scan_backward`` computes h again instead of keeping it, so nothing of size [T, E, N] is ever stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from geo.ops import bounds
from geo.ops.gather_mul import check_one_device, widen
from geo.ops.registration import define

DISCRETIZATIONS = ("euler", "zoh")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def selective_scan(
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
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Selective state-space scan ("Mamba", https://arxiv.org/abs/2312.00752) along the rows of each segment.

    With :math:`\Delta = \text{softplus}(\text{delta} + \text{delta\_bias})` (or without softplus), along each segment

    .. math::
        h_t = e^{\Delta_t A} \odot h_{t-1} + v_t \, B_t u_t, \qquad
        y_t = (\langle C_t, h_t \rangle + D u_t) \, \text{SiLU}(z_t)

    where :math:`v_t = \Delta_t` (Euler, as every Mamba implementation has it) or
    :math:`v_t = (e^{\Delta_t A} - 1) / A` (zero-order hold, as the paper writes it; :math:`\Delta_t` where
    :math:`A = 0`). h starts at ``initial_state``, or 0, in every segment: nothing passes from one to another.

    Memory is O(T E (1 + N / 16)): no tensor [T, E, N] is stored, also not for the gradient. Results are bitwise the
    same on any number of threads. Second derivatives, of any order, run in plain PyTorch, in eager mode, and do need
    about ten tensors [T, E, N]. A NaN in ``delta`` or ``u`` reaches, of the output, the rows of its segment from its
    own on (in the order of the scan), in its channel alone; an infinity may become one there. The CPU kernels count
    subnormal numbers as 0, which sparse inputs would pay for with six to nine times the time.

    Args:
        u: Input, [T, E]: the rows of all segments.
        delta: Step sizes, [T, E].
        A: Decay rates, [E, N], negative where the scan should forget.
        B: Input weights, [T, N].
        C: Output weights, [T, N].
        D: Weight of the input in the output, [E]. (default: 0)
        z: Gate, [T, E]. (default: no gate)
        delta_bias: Added to ``delta``, [E]. (default: 0)
        delta_softplus: Take the softplus of that. (default: ``False``)
        ptr: int64 [S + 1], rising from 0 to T: segment s is rows ``ptr[s]`` to ``ptr[s + 1] - 1``; empty ones are
            allowed. (default: one segment)
        reverse: Scan each segment from its last row to its first. (default: ``False``)
        discretization: ``'euler'`` or ``'zoh'``. (default: ``'euler'``)
        initial_state: h before the first row that is scanned, [S, E, N]. (default: 0)
        return_last_state: Return h after the last row that is scanned, too. (default: ``False``)

    Returns:
        y: [T, E] in the promoted dtype of ``u, delta, B, C, z`` (float64 where any argument is). Where that has 16
        bits, A, D, the bias, states and all arithmetic are float32. With ``return_last_state``, ``(y, state)``, where
        state [S, E, N] is the initial one for an empty segment.

    Raises:
        IndexError: ``ptr`` does not rise from 0 to T.
        ValueError: Shapes that do not fit together, or an unknown discretization.
        TypeError: Something else than a tensor where one is needed, or tensors of other types.

    Example:
        >>> import torch
        >>> from geo.ops import selective_scan
        >>> one = torch.ones(4, 1)
        >>> y = selective_scan(one, one, torch.zeros(1, 1), one, one, ptr=torch.tensor([0, 3, 4]))
        >>> y.flatten().tolist()
        [1.0, 2.0, 3.0, 1.0]
    """
    tensors, rest = _prepare(u, delta, A, B, C, D, z, delta_bias, ptr, discretization, initial_state)
    flags = (bool(delta_softplus), bool(reverse), discretization == "zoh")
    args = (*tensors, rest, *flags, bool(return_last_state))
    checks = (("ptr", rest, u.size(0)),)
    y, state = bounds.call("selective_scan", torch.ops.geo.selective_scan, args, checks)
    return (y, state) if return_last_state else cast(Tensor, y)


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    ptr: Tensor | None,
    discretization: str,
    initial_state: Tensor | None,
) -> tuple[list[Tensor | None], Tensor]:
    """The nine tensors in the dtypes of the op, and ``ptr``; what does not fit is refused."""
    if discretization not in DISCRETIZATIONS:
        raise ValueError(f"discretization is {discretization!r}, but must be one of 'euler', 'zoh'")
    for name, required in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if not isinstance(required, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(required).__name__}")
    if u.dim() != 2:
        raise ValueError(f"u: expected [T, E], got shape {list(u.shape)}")
    if A.dim() != 2 or A.size(0) != u.size(1):
        raise ValueError(f"A: expected [E, N] with E = {u.size(1)} as in u, got shape {list(A.shape)}")
    ptr = one_segment(u) if ptr is None else ptr
    check_ptr_tensor(ptr, u)
    (rows, channels), states, segments = u.shape, A.size(1), ptr.size(0) - 1
    storage = {"u": u, "delta": delta, "B": B, "C": C, "z": z}
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    tensors["initial_state"] = initial_state
    layouts = {
        "delta": ("[T, E]", (rows, channels)),
        "B": ("[T, N]", (rows, states)),
        "C": ("[T, N]", (rows, states)),
        "D": ("[E]", (channels,)),
        "z": ("[T, E]", (rows, channels)),
        "delta_bias": ("[E]", (channels,)),
        "initial_state": ("[S, E, N]", (segments, channels, states)),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in layouts and tuple(tensor.shape) != layouts[name][1]:
            layout, shape = layouts[name]
            raise ValueError(f"{name}: expected {layout} = {list(shape)}, got shape {list(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    check_one_device("selective_scan", **{name: t for name, t in tensors.items() if t is not None})
    given = [t for t in tensors.values() if t is not None]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in storage.values() if t is not None))
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    return [t if t is None else t.to(dtype if name in storage else wide) for name, t in tensors.items()], ptr


def one_segment(rows: Tensor) -> Tensor:
    """``ptr`` of a single segment of all rows."""
    return torch.arange(2, device=rows.device) * rows.size(0)


def check_ptr_tensor(ptr: Tensor, rows: Tensor) -> None:
    """Raise an error unless ``ptr`` can be one; its values are the kernels' to check."""
    if not isinstance(ptr, Tensor):
        raise TypeError(f"ptr: expected an int64 tensor [S + 1], got {type(ptr).__name__}")
    if ptr.dim() != 1 or ptr.size(0) < 1 or ptr.dtype != torch.int64:
        raise ValueError(f"ptr: expected int64 [S + 1], got {ptr.dtype} {list(ptr.shape)}")
    if ptr.device != rows.device:
        raise ValueError(f"ptr: expected it on {rows.device} as the rows, got it on {ptr.device}")


# -- plain PyTorch -----------------------------------------------------------------------------------------------------
def selective_scan_reference(
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
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`selective_scan` in plain PyTorch: the specification, also under torch.func. It keeps every state."""
    tensors, ptr = _prepare(u, delta, A, B, C, D, z, delta_bias, ptr, discretization, initial_state)
    bounds.check_ptr("selective_scan", ptr, u.size(0))
    flags = (bool(delta_softplus), bool(reverse), discretization == "zoh")
    y, state = _forward(tensors, ptr, flags, bool(return_last_state))
    return (y, state) if return_last_state else y


# A segment is cut into chunks of about the square root of its rows. The chunks of all segments are scanned at once, row
# by row, from a state of 0; their ends are joined along each segment, where exp(A * sum of Delta) takes a state through
# a chunk; and a second scan of the chunks, now from the right states, gives the output. No power of A is ever divided
# by, so nothing overflows. The chunks at work are sorted by length: those not done yet come first.
_GROUP = 1 << 22  # numbers in a state of the chunks that are scanned at once, where not all are


class _Chunks(NamedTuple):
    first: Tensor  # [S + 1] the chunks of segment s are first[s] to first[s + 1] - 1, in the order of the scan
    segment: Tensor  # of each chunk
    start: Tensor  # row where its scan starts
    length: Tensor
    step: int  # from row to row: 1 or -1


class _Walk(NamedTuple):
    """Chunks that are scanned at once: at step k the first ``counts[k]`` of them are at ``rows`` of their own."""

    ids: Tensor
    counts: list[int]
    place: Tensor  # [rows] which of ``ids``
    rows: Tensor


class _Inputs(NamedTuple):
    """What the recurrence sees, widened; ``delta`` as it is discretised."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    zoh: bool

    def decay(self, delta: Tensor) -> Tensor:
        return (delta[:, :, None] * self.A).exp()

    def gain(self, delta: Tensor) -> Tensor:
        wide = delta[:, :, None]
        return wide * _phi(wide * self.A) if self.zoh else wide


def _steps(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    """The step sizes; softplus(x) is x above 20."""
    wide = widen(delta)
    wide = wide if delta_bias is None else wide + delta_bias
    return softplus(wide) if delta_softplus else wide


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    out = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        out = out * x + coefficient
    return out


_NEAR = 0.3  # below, the closed forms cancel
_FACTORIALS = [functools.reduce(lambda a, b: a * b, range(1, n + 1), 1) for n in range(18)]
_PHI = [1 / _FACTORIALS[n + 1] for n in range(14)]
_PSI = [(n + 1) / _FACTORIALS[n + 2] for n in range(14)]


def _phi(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x."""
    near = x.abs() < _NEAR
    far = torch.where(near, 1, x)
    return torch.where(near, _series(torch.where(near, x, 0), _PHI), far.expm1() / far)


def _psi(x: Tensor) -> Tensor:
    """The derivative of :func:`_phi`, (x exp(x) - exp(x) + 1) / x^2."""
    near = x.abs() < _NEAR
    far = torch.where(near, 1, x)
    return torch.where(near, _series(torch.where(near, x, 0), _PSI), (far * far.exp() - far.expm1()) / far.square())


def _cut(ptr: Tensor, reverse: bool) -> _Chunks:
    lengths = ptr.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    size = max(1, longest) if longest <= 32 else max(16, int(longest**0.5))
    pieces = (lengths + size - 1) // size
    first = torch.cat([pieces.new_zeros(1), pieces.cumsum(0)])
    segment = torch.repeat_interleave(torch.arange(lengths.numel(), device=ptr.device), pieces)
    offset = (torch.arange(segment.numel(), device=ptr.device) - first[segment]) * size
    length = (lengths[segment] - offset).clamp(max=size)
    start = ptr[1:][segment] - 1 - offset if reverse else ptr[:-1][segment] + offset
    return _Chunks(first, segment, start, length, -1 if reverse else 1)


def _active(sizes: Tensor) -> list[int]:
    """How many of ``sizes`` are above 0, above 1, ..."""
    return (sizes.numel() - sizes.bincount().cumsum(0))[:-1].tolist() if sizes.numel() else []


def _walks(chunks: _Chunks, ids: Tensor, at_once: int | None) -> Iterator[_Walk]:
    if not ids.numel():
        return
    ids = ids[chunks.length[ids].argsort(descending=True, stable=True)]
    for group in ids.split(at_once or ids.numel()):
        counts = _active(chunks.length[group])
        count = torch.tensor(counts, device=ids.device)
        step = torch.repeat_interleave(torch.arange(len(counts), device=ids.device), count)
        place = torch.arange(step.numel(), device=ids.device) - (count.cumsum(0) - count)[step]
        yield _Walk(group, counts, place, chunks.start[group][place] + chunks.step * step)


def _inverse(perm: Tensor) -> Tensor:
    return torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.numel(), device=perm.device))


def _totals(walk: _Walk, delta: Tensor) -> Tensor:
    return delta.new_zeros(walk.ids.numel(), delta.size(1)).index_add(0, walk.place, delta)


def _scan(x: _Inputs, walk: _Walk, state: Tensor, with_output: bool = True) -> tuple[list[Tensor], Tensor]:
    """The outputs of a walk's rows, <C, h>, step by step, and the states at its chunks' ends."""
    parts = [t[walk.rows].split(walk.counts) for t in (x.u, x.delta, x.B, x.C)]
    outputs: list[Tensor] = []
    done: list[Tensor] = []
    for u, delta, B, C in zip(*parts, strict=True):
        if len(u) < len(state):
            done.append(state[len(u) :].clone())  # a view would keep all of it
        bu = u[:, :, None] * B[:, None, :]
        state = x.decay(delta) * state[: len(u)] + x.gain(delta) * bu
        if with_output:
            outputs.append((state * C[:, None, :]).sum(-1))
    return outputs, torch.cat([state, *reversed(done)])


class _Joints(NamedTuple):
    """Where chunks of a segment meet: chunk ``later[i]`` follows ``later[i] - 1``.

    They stand by their place in the segment, and then by the segment's number of chunks, falling.
    """

    segments: Tensor  # those with more than one chunk, so sorted
    counts: list[int]
    later: Tensor
    rank: Tensor  # of each chunk that is a later one, in ``later``


def _joints(chunks: _Chunks) -> _Joints:
    pieces = chunks.first.diff()
    order = pieces.argsort(descending=True, stable=True)
    segments = order[pieces[order] > 1]
    counts = _active(pieces[segments])[1:]
    later = [chunks.first[segments[:count]] + place for place, count in enumerate(counts, 1)]
    ids = torch.cat(later) if later else segments
    rank = torch.full_like(chunks.segment, -1)
    rank[ids] = torch.arange(ids.numel(), device=ids.device)
    return _Joints(segments, counts, ids, rank)


def _starts(
    x: _Inputs, chunks: _Chunks, joints: _Joints, initial: Tensor | None, at_once: int | None
) -> tuple[Tensor, Tensor]:
    """States (a table) and, for each chunk, which of them it starts from."""
    states = x.A.new_zeros(1, *x.A.shape) if initial is None else initial
    which = torch.zeros_like(chunks.segment) if initial is None else chunks.segment
    if not joints.counts:
        return states, which
    walks = list(_walks(chunks, joints.later - 1, at_once))
    zero = x.A.new_zeros(1, *x.A.shape)
    ends = torch.cat([_scan(x, walk, zero.expand(walk.ids.numel(), -1, -1), False)[1] for walk in walks])
    totals = torch.cat([_totals(walk, x.delta[walk.rows]) for walk in walks])
    order = _inverse(joints.rank[torch.cat([walk.ids for walk in walks]) + 1])
    state = states[joints.segments if initial is not None else torch.zeros_like(joints.segments)]
    tables = [states]
    split = zip(ends[order].split(joints.counts), totals[order].split(joints.counts), strict=True)
    for end, total in split:
        state = x.decay(total) * state[: len(end)] + end
        tables.append(state)
    return torch.cat(tables), torch.where(joints.rank >= 0, states.size(0) + joints.rank, which)


def _forward(
    tensors: Sequence[Any],
    ptr: Tensor,
    flags: Sequence[bool],
    return_last_state: bool,
    at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, z, delta_bias, initial_state = tensors
    delta_softplus, reverse, zoh = flags
    x = _Inputs(widen(u), _steps(delta, delta_bias, delta_softplus), A, widen(B), widen(C), zoh)
    chunks = _cut(ptr, reverse)
    table, which = _starts(x, chunks, _joints(chunks), initial_state, at_once)
    outputs: list[Tensor] = []
    ends: list[tuple[Tensor, Tensor]] = []
    walks = list(_walks(chunks, torch.arange(chunks.segment.numel(), device=u.device), at_once))
    for walk in walks:
        steps, end = _scan(x, walk, table[which[walk.ids]])
        outputs += steps
        if return_last_state:
            last = (walk.ids + 1 == chunks.first[1:][chunks.segment[walk.ids]]).nonzero().flatten()
            ends.append((chunks.segment[walk.ids[last]], end[last]))
    y = x.u.new_zeros(u.shape) if not outputs else torch.cat(outputs)[_inverse(torch.cat([w.rows for w in walks]))]
    y = y if D is None else y + D * x.u
    y = y if z is None else y * silu(widen(z))
    state = A.new_zeros(0)
    if return_last_state:
        state = A.new_zeros(ptr.numel() - 1, *A.shape) if initial_state is None else initial_state
        if ends:
            state = state.index_copy(0, torch.cat([s for s, _ in ends]), torch.cat([end for _, end in ends]))
    return y.to(u.dtype), state


def _at_once(A: Tensor, rows: int = 1) -> int:
    return max(1, _GROUP // max(1, rows * A.numel()))


def _scan_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    u, A, initial_state, ptr = args[0], args[2], args[8], args[9]
    bounds.check_ptr("selective_scan", ptr, u.size(0))
    y, state = _forward(args[:9], ptr, args[10:13], args[13], _at_once(A))
    return y, state.clone() if state is initial_state else state


def _adjoint(x: _Inputs, walk: _Walk, g_y: Tensor, arriving: Tensor) -> Tensor:
    """What leaves a walk's chunks at their starts: a_t g_t there, with g_t = g_y C + a_{t+1} g_{t+1}."""
    out = arriving.clone()
    for g, delta, C in reversed(
        list(zip(*(t[walk.rows].split(walk.counts) for t in (g_y, x.delta, x.C)), strict=True))
    ):
        out[: len(g)] = x.decay(delta) * (out[: len(g)] + g[:, :, None] * C[:, None, :])
    return out


def _arrivals(
    x: _Inputs, chunks: _Chunks, joints: _Joints, g_y: Tensor, g_state: Tensor | None, at_once: int
) -> tuple[Tensor, Tensor]:
    """What reaches the ends of chunks from behind (a table) and, for each chunk, which of them it is."""
    zero = x.A.new_zeros(1, *x.A.shape)
    states = zero if g_state is None else g_state
    segments = torch.zeros_like(chunks.segment) if g_state is None else chunks.segment
    own = x.A.new_empty(joints.later.numel(), *x.A.shape)
    totals = x.delta.new_empty(joints.later.numel(), x.delta.size(1))
    for walk in _walks(chunks, joints.later, at_once):
        to = joints.rank[walk.ids]
        own[to] = _adjoint(x, walk, g_y, zero.expand(walk.ids.numel(), -1, -1))
        totals[to] = _totals(walk, x.delta[walk.rows])
    carry = states[joints.segments if g_state is not None else torch.zeros_like(joints.segments)]
    for out, total in reversed(list(zip(own.split(joints.counts), totals.split(joints.counts), strict=True))):
        out += x.decay(total) * carry[: len(out)]
        carry[: len(out)] = out
    follows = torch.cat([joints.rank[1:], joints.rank.new_full((1,), -1)])[: joints.rank.numel()]
    return torch.cat([states, own]), torch.where(follows >= 0, states.size(0) + follows, segments)


class _Gradients(NamedTuple):
    """What the walks fill in; ``y`` is <C, h>, which the gradient of the gate needs."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    y: Tensor
    A: Tensor


def _walk_back(x: _Inputs, walk: _Walk, g_y: Tensor, state: Tensor, arriving: Tensor, to: _Gradients) -> Tensor:
    """Fill in the gradients of a walk's rows; what leaves at the chunks' starts."""
    parts = list(zip(*(t[walk.rows].split(walk.counts) for t in (x.u, x.delta, x.B, x.C, g_y)), strict=True))
    states = [state]
    for u, delta, B, *_ in parts:
        bu = u[:, :, None] * B[:, None, :]
        states.append(x.decay(delta) * states[-1][: len(u)] + x.gain(delta) * bu)
    by_step: list[tuple[Tensor, ...]] = []
    for (u, delta, B, C, g_out), h, before in reversed(list(zip(parts, states[1:], states[:-1], strict=True))):
        decay, wide, B = x.decay(delta), delta[:, :, None], B[:, None, :]
        g = arriving[: len(u)] + g_out[:, :, None] * C[:, None, :]
        gv, ga = g * x.gain(delta), g * decay
        w = ga * before[: len(u)]
        by_delta = ((ga if x.zoh else g) * B).sum(-1) * u + (w * x.A).sum(-1)
        by_A = w * wide
        if x.zoh:
            by_A += g * B * u[:, :, None] * wide.square() * _psi(wide * x.A)
        to.A.add_(by_A.sum(0))
        by_B, by_C = (gv * u[:, :, None]).sum(1), (h * g_out[:, :, None]).sum(1)
        by_step.append(((gv * B).sum(-1), by_delta, by_B, by_C, (h * C[:, None, :]).sum(-1)))
        arriving[: len(u)] = ga
    for out, steps in zip(to, zip(*reversed(by_step), strict=True), strict=False):
        out[walk.rows] = torch.cat(steps)
    return arriving


def _backward_kernel(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    ptr: Tensor,
    delta_softplus: bool,
    reverse: bool,
    zoh: bool,
) -> tuple[Tensor, ...]:
    bounds.check_ptr("selective_scan", ptr, u.size(0))
    x = _Inputs(widen(u), _steps(delta, delta_bias, delta_softplus), A, widen(B), widen(C), zoh)
    g_o = widen(grad_y)
    g_y = g_o if z is None else g_o * silu(widen(z))
    chunks = _cut(ptr, reverse)
    joints = _joints(chunks)
    starts, start_of = _starts(x, chunks, joints, initial_state, _at_once(A))
    arrivals, arrival_of = _arrivals(x, chunks, joints, g_y, grad_last_state, _at_once(A))
    to = _Gradients(*(torch.zeros_like(t) for t in (x.u, x.u, x.B, x.C, x.u, A)))
    by_state = A.new_empty(0)
    if initial_state is not None:
        by_state = torch.zeros_like(initial_state) if grad_last_state is None else grad_last_state.clone()
    longest = int(chunks.length.max()) if chunks.length.numel() else 1
    for walk in _walks(chunks, torch.arange(chunks.segment.numel(), device=u.device), _at_once(A, longest)):
        state, arriving = starts[start_of[walk.ids]], arrivals[arrival_of[walk.ids]]
        leaving = _walk_back(x, walk, g_y, state, arriving, to)
        if initial_state is not None:
            heads = (walk.ids == chunks.first[chunks.segment[walk.ids]]).nonzero().flatten()
            by_state[chunks.segment[walk.ids[heads]]] = leaving[heads]
    by_u = to.u if D is None else to.u + D * g_y
    by_D = A.new_empty(0) if D is None else (g_y * x.u).sum(0)
    by_z = u.new_empty(0)
    if z is not None:
        gate = widen(z)
        share, y = gate.sigmoid(), to.y if D is None else to.y + D * x.u
        by_z = (g_o * y * share * (1 + gate * (1 - share))).to(u.dtype)
    by_raw = to.delta
    if delta_softplus:
        raw = widen(delta) if delta_bias is None else widen(delta) + delta_bias
        by_raw = torch.where(raw > 20, by_raw, by_raw * raw.sigmoid())
    by_bias = A.new_empty(0) if delta_bias is None else by_raw.sum(0)
    dtype = u.dtype
    return by_u.to(dtype), by_raw.to(dtype), to.A, to.B.to(dtype), to.C.to(dtype), by_D, by_z, by_bias, by_state


# -- shapes ------------------------------------------------------------------------------------------------------------
def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, ptr: Tensor) -> None:
    torch._check(u.dim() == 2 and delta.dim() == 2 and A.dim() == 2 and B.dim() == 2 and C.dim() == 2)
    torch._check(ptr.dim() == 1)
    torch._check(A.size(0) == u.size(1))
    torch._check(B.size(1) == A.size(1))


def _scan_fake(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    ptr, return_last_state = rest[4], rest[8]
    _check_shapes(u, delta, A, B, C, ptr)
    shape = (ptr.size(0) - 1, A.size(0), A.size(1)) if return_last_state else (0,)
    return u.new_empty(u.shape), A.new_empty(shape)


def _backward_fake(grad_y: Tensor, grad_last_state: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, ptr, *_ = inputs
    _check_shapes(u, delta, A, B, C, ptr)
    narrow = tuple(u.new_empty(t.shape) for t in (u, delta, B, C))
    by_z = u.new_empty(0 if z is None else z.shape)
    by_D, by_bias, by_state = (A.new_empty(0 if t is None else t.shape) for t in (D, delta_bias, initial_state))
    return *narrow[:2], A.new_empty(A.shape), *narrow[2:], by_D, by_z, by_bias, by_state


# -- gradients ---------------------------------------------------------------------------------------------------------
def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.flags = inputs[10:]


def _scan_backward(ctx: Any, g_y: Tensor | None, g_state: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *flags, return_last_state = ctx.flags
    g_y = torch.zeros_like(tensors[0]) if g_y is None else g_y
    grads = torch.ops.geo.selective_scan_backward(g_y, g_state if return_last_state else None, *tensors, *flags)
    return *(None if t is None else grad for grad, t in zip(grads, tensors[:9], strict=True)), *[None] * 5


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:12])
    ctx.flags = inputs[12:]


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """By autograd, of the plain forward; that is differentiable itself, hence derivatives of any order."""
    *given, ptr = ctx.saved_tensors
    again = torch.is_grad_enabled()

    def leaf(t: Tensor | None) -> Tensor | None:  # its own even where two arguments are one tensor
        if t is None:
            return None
        return t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        leaves = [leaf(t) for t in given]
        g_y, g_state, *inputs = leaves
        y, state = _forward(inputs, ptr, ctx.flags, g_state is not None)
        first = _vjp([(y, g_y), (state, g_state)], inputs, create_graph=True)
    second = _vjp(list(zip(first, grads, strict=True)), leaves, create_graph=again)
    return *(g if need else None for g, need in zip(second, ctx.needs_input_grad, strict=False)), *[None] * 4


def _vjp(
    given: list[tuple[Tensor | None, Tensor | None]], leaves: list[Tensor | None], create_graph: bool
) -> list[Tensor | None]:
    """The gradient in each leaf of a sum over pairs (output, its gradient); None where there is none."""
    pairs = [(out, grad) for out, grad in given if out is not None and out.requires_grad and grad is not None]
    there = [t for t in leaves if t is not None]
    if not pairs:
        return [None] * len(leaves)
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            there,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    )
    return [None if t is None else next(found) for t in leaves]


_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor ptr, bool delta_softplus, bool reverse, bool zoh"
)
# u, delta, z, y, B, C and their gradients share one dtype; all others are in the type it is accumulated in. What
# belongs to an absent argument, and a last state that is not asked for, is [0].
define(
    f"selective_scan({_TENSORS}, bool return_last_state) -> (Tensor y, Tensor last_state)",
    _scan_kernel,
    _scan_fake,
    _scan_backward,
    _scan_setup,
)
define(
    f"selective_scan_backward(Tensor grad_y, Tensor? grad_last_state, {_TENSORS}) -> (Tensor du, Tensor ddelta, "
    "Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dinitial_state)",
    _backward_kernel,
    _backward_fake,
    _backward_backward,
    _backward_setup,
)
