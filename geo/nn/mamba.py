"""Selective state-space layers on ragged sequences: one direction, and both."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.ops import segment_causal_conv1d, selective_scan

_DELTA_RANGE = (1e-3, 1e-1)  # the steps that a fresh layer takes, as in Mamba
_DELTA_FLOOR = 1e-4


class SelectiveSSM(nn.Module):
    r"""Mamba's selective state-space mixer over ragged sequences (https://arxiv.org/abs/2312.00752), any device.

    With :math:`P` the rows of one sequence and all maps linear,

    .. math::
        U = \mathrm{SiLU}(\mathrm{conv}(W_\text{in} P)), \quad B = W_B U, \quad C = W_C U, \quad
        \Delta = \mathrm{softplus}(W_\Delta U + b)

        h_t = e^{\Delta_t A} h_{t-1} + \Delta_t B_t u_t, \quad y_t = \langle C_t, h_t \rangle + D u_t, \quad
        Y = W_1 (y \cdot \mathrm{SiLU}(W_2 P))

    Lines 3 to 9 of Algorithm 2 of Graph Mamba Networks (https://arxiv.org/abs/2402.08678), whose normalisation stands
    in :class:`BiMamba`. It differs from ``mamba_ssm.Mamba`` in that sequences of any lengths stand behind one another
    in one tensor, without padding: the convolution and the state start anew at each. It runs on CPUs, in float64 and
    backwards, and its state is float32 where the inputs have 16 bits. The paper leaves the details open; the defaults
    are Mamba's, with ``expand=1``.

    Args:
        channels: Size of a row.
        d_state: States of each channel.
        d_conv: Width of the causal convolution; 0 leaves it out.
        expand: Inner channels are this many times `channels`.
        dt_rank: Rank of :math:`W_\Delta`, or ``'auto'``: a sixteenth of `channels`, rounded up.
        d_skip: Use the term :math:`D u`.
        discretization: ``'euler'``, as every implementation of Mamba, or ``'zoh'``, as its equations.
        bias: Use biases in the maps into and out of the layer.

    Shapes:
        x :math:`(T, \text{channels})`: all rows of all sequences; ptr :math:`(S + 1)` int64: sequence s is the rows
        from ptr[s] to ptr[s + 1], one sequence where it is None; output :math:`(T, \text{channels})`.

    Symmetry and derivatives:
        Rows of one sequence do not depend on the others; ``reverse`` is the same layer on sequences read from
        their ends. Differentiable twice.

    Raises:
        ValueError: Sizes that are not positive, an unknown name, or rows of another size.
        IndexError: A ptr that falls or does not end at T.

    Example:
        >>> layer = SelectiveSSM(16)
        >>> x, ptr = torch.randn(7, 16), torch.tensor([0, 3, 3, 7])
        >>> layer(x, ptr).shape
        torch.Size([7, 16])
    """

    def __init__(
        self,
        channels: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 1,
        dt_rank: int | str = "auto",
        d_skip: bool = True,
        discretization: Literal["euler", "zoh"] = "euler",
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(channels=channels, d_state=d_state)
        if d_conv < 0:
            raise ValueError(f"d_conv is {d_conv}, but must be 0 (no convolution) or more")
        inner = int(expand * channels)
        if inner < 1:
            raise ValueError(f"expand is {expand}, but expand * channels must be at least 1")
        if dt_rank == "auto":
            dt_rank = math.ceil(channels / 16)
        if not isinstance(dt_rank, int) or dt_rank < 1:
            raise ValueError(f"dt_rank is {dt_rank!r}, but must be 'auto' or a positive integer")
        if discretization not in ("euler", "zoh"):
            raise ValueError(f"discretization is {discretization!r}, but must be 'euler' or 'zoh'")
        self.channels, self.inner_channels, self.d_state, self.d_conv = channels, inner, d_state, d_conv
        self.dt_rank, self.discretization = dt_rank, discretization
        self.in_proj = nn.Linear(channels, 2 * inner, bias=bias)  # W_in and W_2
        self.conv_weight = nn.Parameter(torch.empty(inner, d_conv)) if d_conv else None
        self.conv_bias = nn.Parameter(torch.empty(inner)) if d_conv else None
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)  # W_Delta's first half, W_B, W_C
        self.dt_proj = nn.Linear(dt_rank, inner)
        self.A_log: nn.Parameter | None = _undecayed(inner, d_state)
        self.D = _undecayed(inner) if d_skip else None
        self.out_proj = nn.Linear(inner, channels, bias=bias)  # W_1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew; A, D and the steps start as in Mamba."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            linear.reset_parameters()
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = 1 / math.sqrt(self.d_conv)
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            _fresh_delta_bias(self.dt_proj.bias)
            if self.A_log is not None:
                self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
            if self.D is not None:
                self.D.fill_(1)

    def forward(self, x: Tensor, ptr: Tensor | None = None, reverse: bool = False) -> Tensor:
        """Mixes the rows of each sequence.

        Args:
            x: Rows, [T, channels].
            ptr: Where sequences begin and end, [S + 1].
            reverse: Read each sequence from its end.

        Returns:
            out: [T, channels].
        """
        _check_rows(x, self.channels)
        return self._mix(x, ptr, reverse, self.A_log)

    def _mix(self, x: Tensor, ptr: Tensor | None, reverse: bool, A_log: Tensor | None) -> Tensor:
        u, gate = self._in(x)
        if self.conv_weight is not None:
            u = segment_causal_conv1d(u, self.conv_weight, self.conv_bias, ptr, reverse)
        assert A_log is not None
        y = self._scan(F.silu(u), A_log, self.D, gate, ptr, reverse)
        out: Tensor = self.out_proj(y)
        return out

    def _in(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W_in and W_2 of the rows, in a tensor each: the ops want whole rows."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        halves = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
        u, gate = (F.linear(x, w, b) for w, b in zip(*halves, strict=True))
        return u, gate

    def _scan(
        self, u: Tensor, A_log: Tensor, D: Tensor | None, gate: Tensor | None, ptr: Tensor | None, reverse: bool
    ) -> Tensor:
        delta, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan(
            u,
            F.linear(delta, self.dt_proj.weight),
            _negative_exp(A_log),
            B,
            C,
            D=D,
            z=gate,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            ptr=ptr,
            reverse=reverse,
            discretization=self.discretization,
        )
        return cast(Tensor, y)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.channels}, d_state={self.d_state}, d_conv={self.d_conv}, "
            f"inner_channels={self.inner_channels}, dt_rank={self.dt_rank})"
        )


class BiMamba(nn.Module):
    r"""Bidirectional Mamba over ragged sequences, of Graph Mamba Networks (https://arxiv.org/abs/2402.08678).

    Algorithm 2 of the paper: two :class:`SelectiveSSM` read each normalised sequence, one from its start and one from
    its end,

    .. math::
        \mathrm{out} = \Phi + \mathrm{dropout}\bigl(W_\text{out} (Y_\rightarrow + Y_\leftarrow)\bigr), \quad
        Y_{\rightarrow, \leftarrow} = \mathrm{SSM}_{\rightarrow, \leftarrow}(\mathrm{LayerNorm}(\Phi))

    The residual and the dropout are not in the paper and can be turned off. ``combine='concat'`` is
    :math:`W_\text{out} [Y_\rightarrow \| Y_\leftarrow]`. ``combine='hydra'`` is the quasiseparable mixer of Hydra
    (https://arxiv.org/abs/2407.09941): both directions share all projections, each gives a row what came strictly
    before it, and the row itself enters once, through a diagonal :math:`D` of its own; the sum of two whole scans
    counts it twice. Its convolution is the sum of a causal one in each direction.

    Args:
        channels: Size of a row.
        combine: ``'sum'``, ``'concat'`` or ``'hydra'``.
        bidirectional: Use both directions; False is the paper's ablation, which reads forwards alone.
        share_A: One :math:`A` for both directions, which the paper's notation allows; elsewhere each has its own.
        fold: Leave :math:`W_\text{out}` out, which follows another linear map (with ``combine='sum'`` alone).
        dropout: Probability in training.
        residual: Add the input.
        norm: ``'layer_norm'`` or None.
        **kwargs: Of :class:`SelectiveSSM`: d_state, d_conv, expand, dt_rank, d_skip, discretization, bias.

    Shapes:
        x :math:`(T, \text{channels})`, ptr :math:`(S + 1)` int64 or None; output :math:`(T, \text{channels})`.

    Symmetry and derivatives:
        Rows of one sequence do not depend on the others. Turning all sequences round exchanges the two directions.
        Differentiable twice.

    Raises:
        ValueError: Unknown names, sizes that are not positive, or rows of another size.
        IndexError: A ptr that falls or does not end at T.

    Example:
        >>> layer = BiMamba(16, d_state=8)
        >>> x, ptr = torch.randn(7, 16), torch.tensor([0, 3, 3, 7])
        >>> layer(x, ptr).shape
        torch.Size([7, 16])
    """

    def __init__(
        self,
        channels: int,
        *,
        combine: str = "sum",
        bidirectional: bool = True,
        share_A: bool = False,
        fold: bool = False,
        dropout: float = 0.0,
        residual: bool = True,
        norm: str | None = "layer_norm",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if combine not in ("sum", "concat", "hydra"):
            raise ValueError(f"combine is {combine!r}, but must be 'sum', 'concat' or 'hydra'")
        if fold and combine != "sum":
            raise ValueError(
                f"fold merges W_out into the maps before it, which combine='sum' has and {combine!r} has not"
            )
        if not bidirectional and combine != "sum":
            raise ValueError(f"combine is {combine!r}, but there is nothing to combine with bidirectional=False")
        if norm not in ("layer_norm", None):
            raise ValueError(f"norm is {norm!r}, but must be 'layer_norm' or None")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout}, but must be a probability")
        self.channels, self.combine, self.bidirectional = channels, combine, bidirectional
        self.share_A, self.dropout, self.residual = share_A, dropout, residual
        self.norm = nn.LayerNorm(channels) if norm else None
        self.backward_ssm: SelectiveSSM | None = None
        self.out_proj: nn.Linear | None = None
        if combine == "hydra":
            self.forward_ssm: SelectiveSSM | _Hydra = _Hydra(channels, share_A=share_A, **kwargs)
            self.reset_parameters()
            return
        self.forward_ssm = SelectiveSSM(channels, **kwargs)
        if bidirectional:
            self.backward_ssm = SelectiveSSM(channels, **kwargs)
            if share_A:
                self.backward_ssm.A_log = None
        if not fold:
            width = 2 * channels if combine == "concat" else channels
            self.out_proj = nn.Linear(width, channels, bias=self.forward_ssm.out_proj.bias is not None)

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        for module in (self.norm, self.forward_ssm, self.backward_ssm, self.out_proj):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        """Mixes the rows of each sequence.

        Args:
            x: Rows, [T, channels].
            ptr: Where sequences begin and end, [S + 1].

        Returns:
            out: [T, channels].
        """
        _check_rows(x, self.channels)
        rows = x if self.norm is None else self.norm(x)
        out = self.forward_ssm(rows, ptr)
        if self.backward_ssm is not None:
            A_log = self.forward_ssm.A_log if self.share_A else self.backward_ssm.A_log
            other = self.backward_ssm._mix(rows, ptr, True, A_log)
            out = torch.cat([out, other], dim=-1) if self.combine == "concat" else out + other
        if self.out_proj is not None:
            out = self.out_proj(out)
        out = F.dropout(out, self.dropout, self.training)
        return x + out if self.residual else out

    def __repr__(self) -> str:
        how = f"combine={self.combine!r}" if self.bidirectional else "bidirectional=False"
        return f"{type(self).__name__}({self.channels}, d_state={self.forward_ssm.d_state}, {how})"


class _Hydra(nn.Module):
    """Both directions with shared projections: what came before, what comes after, and the row itself once."""

    shift: Tensor

    def __init__(self, channels: int, share_A: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.ssm = SelectiveSSM(channels, **kwargs)
        if self.ssm.D is None:
            raise ValueError("d_skip is False, but with combine='hydra' a row reaches itself through D alone")
        self.d_state = self.ssm.d_state
        weight = self.ssm.conv_weight
        self.A_log = None if share_A else _undecayed(self.ssm.inner_channels, self.ssm.d_state)
        self.conv_weight = None if weight is None else nn.Parameter(torch.empty_like(weight))
        self.register_buffer("shift", torch.tensor([0.0, 1.0]), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.ssm.reset_parameters()
        with torch.no_grad():
            if self.A_log is not None and self.ssm.A_log is not None:
                self.A_log.copy_(self.ssm.A_log)
            if self.conv_weight is not None:
                bound = 1 / math.sqrt(self.ssm.d_conv)
                nn.init.uniform_(self.conv_weight, -bound, bound)

    def forward(self, x: Tensor, ptr: Tensor | None = None) -> Tensor:
        ssm = self.ssm
        u, gate = ssm._in(x)
        if ssm.conv_weight is not None and self.conv_weight is not None:
            before = segment_causal_conv1d(u, ssm.conv_weight, ssm.conv_bias, ptr)
            u = before + segment_causal_conv1d(u, self.conv_weight, None, ptr, reverse=True)
        u = F.silu(u)
        shift = self.shift.to(u.dtype).expand(u.size(-1), 2)
        assert ssm.D is not None
        assert ssm.A_log is not None
        mixed = ssm.D * u
        for reverse in (False, True):
            A_log = self.A_log if reverse and self.A_log is not None else ssm.A_log
            y = ssm._scan(u, A_log, None, None, ptr, reverse)
            mixed = mixed + segment_causal_conv1d(y, shift, None, ptr, reverse)  # what a row gets is the one before's
        out: Tensor = ssm.out_proj(mixed.to(gate.dtype) * F.silu(gate))
        return out


def _undecayed(*size: int) -> nn.Parameter:
    """A parameter that optimisers should not decay, marked as in mamba_ssm."""
    parameter = nn.Parameter(torch.empty(size))
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def _negative_exp(log: Tensor) -> Tensor:
    return -(log if log.dtype == torch.float64 else log.float()).exp()


def _fresh_delta_bias(bias: Tensor) -> None:
    """Fills a bias so that softplus of it is log-uniform, as in Mamba."""
    low, high = map(math.log, _DELTA_RANGE)
    delta = torch.empty_like(bias, dtype=torch.float64).uniform_(low, high).exp().clamp(min=_DELTA_FLOOR)
    bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")


def _check_rows(x: Tensor, channels: int) -> None:
    if x.dim() != 2 or x.size(1) != channels:
        raise ValueError(f"x: expected [T, {channels}], got shape {list(x.shape)}")
