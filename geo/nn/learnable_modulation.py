"""The coefficients of graph random features as parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.kernels import Series, heat, matern, regularised_laplacian, tail_mass
from geo.nn.mlp import MLP
from geo.ops import WalkDeposits

_CLOSED = {"heat": ("t",), "matern": ("nu", "kappa"), "regularised_laplacian": ("s", "d")}
_SAME = 1e-6  # relative difference of coefficients of one kernel that counts as rounding


class LearnableModulation(nn.Module):
    r"""Learnable modulation of graph random features: a kernel fitted to its task without sampling a walk anew.

    The neural modulation of "General Graph Random Features" (https://arxiv.org/abs/2310.04859). The features of a graph
    are :math:`\Phi = \sum_l f_l M_l`, with the deposits :math:`M_l` of walks of length l on the normalised adjacency
    :math:`W`, so that

    .. math::
        \mathbb E[\Phi_1 \Phi_2^\top] = F(W)^2, \qquad F(x) = \sum_{l=0}^{L} f_l \, x^l

    and f is one of, with :math:`(a)_l` the rising factorial,

    * ``'free'``: L + 1 numbers;
    * ``'mlp'``: :math:`f_l = f^0_l + \mathrm{MLP}(l / L)`;
    * ``'heat'``: :math:`(t/2)^l / l!`, the kernel :math:`e^{-t \mathcal L}`;
    * ``'matern'``: :math:`c^{-l} (\nu/2)_l / l!` with :math:`c = 1 + 2 \nu / \kappa^2`, the kernel
      :math:`(2 \nu / \kappa^2 + \mathcal L)^{-\nu}`;
    * ``'regularised_laplacian'``: :math:`u^l (d/2)_l / l!` with :math:`u = s^2 / (1 + s^2)`, the kernel
      :math:`(1 + s^2 \mathcal L)^{-d}`.

    What differs from the paper: all kinds start at a known kernel (the MLP is added to it, and its last layer starts at
    zero), as coefficients that do not decay give features of infinite variance. The scale of the matrix is part of f,
    so t, s, d, nu and kappa, which all are positive, are learned on walks sampled once.

    Args:
        max_length: L, the longest walks that count. Longer ones are dropped, a bias that :meth:`tail_mass` reports.
        kind: One of the names above. (default: ``'free'``)
        init: The :class:`geo.kernels.Series` to start at; for a closed form, one of that form. (default: ``heat(1.0)``,
            ``matern(1.5, 1.0)`` or ``regularised_laplacian(1.0, 1.0)``)
        positive: Keep f positive by a softplus, as masks of attention need it; closed forms always are.
            (default: ``False``)
        hidden_channels: Width of the two hidden layers of the MLP. (default: ``16``)

    Shapes:
        Output: f :math:`(L + 1)`.

    Symmetry and derivatives:
        A function of length alone: what it makes is equivariant to node permutation and independent of the batch.
        Differentiable any number of times.

    Raises:
        ValueError: An unknown option, or an ``init`` that is not of the closed form, or not positive where it must be.

    Example:
        >>> modulation = LearnableModulation(4, "heat")
        >>> [round(f, 4) for f in modulation().tolist()]
        [1.0, 0.5, 0.125, 0.0208, 0.0026]
        >>> {name: round(value, 6) for name, value in modulation.hyperparameters().items()}
        {'t': 1.0}
    """

    initial: Tensor

    def __init__(
        self,
        max_length: int,
        kind: str = "free",
        init: Series | None = None,
        positive: bool = False,
        hidden_channels: int = 16,
    ) -> None:
        super().__init__()
        if kind not in ("free", "mlp", *_CLOSED):
            names = ", ".join(repr(name) for name in ("free", "mlp", *_CLOSED))
            raise ValueError(f"kind is {kind!r}, but must be one of {names}")
        for name, value, least in (("max_length", max_length, 0), ("hidden_channels", hidden_channels, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        self.max_length, self.kind, self.hidden_channels = max_length, kind, hidden_channels
        self.positive = bool(positive) or kind in _CLOSED
        if init is None:
            default = {"matern": lambda: matern(1.5, 1.0), "regularised_laplacian": regularised_laplacian}
            init = default.get(kind, heat)()
        coefficients = init.modulation(max(max_length, 2) + 1)
        self._constant = float(init.scale)
        self.mlp: MLP | None = None
        if kind in _CLOSED:
            start = _hyperparameters(kind, coefficients)
        else:
            start = coefficients[: max_length + 1]
            if self.positive:
                if bool((start <= 0).any()):
                    at = int((start <= 0).nonzero()[0])
                    raise ValueError(
                        f"init has the coefficient {float(start[at]):.6g} at length {at}, but positive=True needs "
                        "positive ones: take a kernel such as heat(1.0), or positive=False"
                    )
                start = start + torch.log(-torch.expm1(-start))  # the inverse of softplus
        self.register_buffer("initial", start.to(torch.get_default_dtype()))
        if kind == "mlp":
            self.mlp = MLP(1, hidden_channels, 1, 3, None, "gelu")
        self.raw = None if kind == "mlp" else nn.Parameter(self.initial.clone())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the kernel of the start."""
        if self.raw is not None:
            with torch.no_grad():
                self.raw.copy_(self.initial)
        if self.mlp is not None:
            self.mlp.reset_parameters()
            for parameter in self.mlp.lins[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self) -> Tensor:
        """The modulation f, for lengths 0 to ``max_length``."""
        dtype = self.initial.dtype
        with torch.autocast(self.initial.device.type, enabled=False):  # coefficients span many orders of magnitude
            if self.kind in _CLOSED:
                rate, shape = self._closed()
                length = torch.arange(self.max_length + 1, device=rate.device, dtype=torch.float64)
                log = length * torch.log(rate) - torch.lgamma(length + 1)
                if shape is not None:
                    log = log + torch.lgamma(shape + length) - torch.lgamma(shape)
                return log.exp().to(dtype)
            raw = self._learned().clone()
            if self.mlp is not None:
                length = torch.arange(self.max_length + 1, device=raw.device, dtype=dtype)
                raw = raw + self.mlp((length / max(1, self.max_length)).unsqueeze(-1)).squeeze(-1)
            return F.softplus(raw) if self.positive else raw

    def _closed(self) -> tuple[Tensor, Tensor | None]:
        """(u, a) with f_l = u^l (a)_l / l!, or (u, None) with u^l / l!, in float64."""
        value = self._positive()
        if self.kind == "heat":
            return value[0] / 2, None
        if self.kind == "matern":
            return 1 / (1 + 2 * value[0] / value[1].square()), value[0] / 2
        return value[0].square() / (1 + value[0].square()), value[1] / 2

    def _learned(self) -> Tensor:
        return self.initial if self.raw is None else self.raw

    def _positive(self) -> Tensor:
        """The hyper-parameters of a closed form, in float64."""
        return self._learned().double().exp()

    def scale(self) -> Tensor:
        r"""The constant of the kernel, such as :math:`e^{-t}`: it is ``scale() *`` :math:`F(W)^2`.

        Differentiable for closed forms; for the others that of the start.
        """
        if self.kind not in _CLOSED:
            return self.initial.new_tensor(self._constant)
        value = self._positive()
        if self.kind == "heat":
            scale = torch.exp(-value[0])
        elif self.kind == "matern":
            scale = torch.exp(-value[0] * torch.log1p(2 * value[0] / value[1].square()))
        else:
            scale = torch.exp(-value[1] * torch.log1p(value[0].square()))
        return scale.to(self.initial.dtype)

    def hyperparameters(self) -> dict[str, float]:
        """The present values of the parameters of a closed form, by name; of another kind, none."""
        if self.kind not in _CLOSED:
            return {}
        return dict(zip(_CLOSED[self.kind], self._positive().tolist(), strict=True))

    def tail_mass(self, deposits: WalkDeposits) -> float:
        """Share of the absolute deposits that stand beyond ``max_length`` and are dropped.

        Args:
            deposits: What :func:`geo.ops.grf_walks` returned.
        """
        return tail_mass(deposits, self.max_length + 1)

    def extra_repr(self) -> str:
        """Sizes and options."""
        width = f", hidden_channels={self.hidden_channels}" if self.kind == "mlp" else ""
        values = "".join(f", {name}={value:.6g}" for name, value in self.hyperparameters().items())
        return f"{self.max_length}, kind={self.kind!r}, positive={self.positive}{width}{values}"


def _hyperparameters(kind: str, f: Tensor) -> Tensor:
    """Logarithms of the hyper-parameters of a closed form, from its coefficients f_0, f_1, f_2, ..."""
    first = f[1] / f[0]
    length = torch.arange(f.size(0), dtype=torch.float64)
    if kind == "heat":
        values, expected = [2 * first], torch.exp(length * torch.log(first) - torch.lgamma(length + 1))
    else:
        rate = 2 * f[2] / f[1] - first  # f_1 / f_0 = u a and f_2 / f_1 = u (a + 1) / 2
        shape = first / rate
        expected = torch.exp(
            length * torch.log(rate) + torch.lgamma(shape + length) - torch.lgamma(shape) - torch.lgamma(length + 1)
        )
        d = 2 * shape
        values = [d, torch.sqrt(2 * d / (1 / rate - 1))] if kind == "matern" else [torch.sqrt(rate / (1 - rate)), d]
    start = torch.stack(values)
    same = torch.allclose(f / f[0], expected, rtol=_SAME, atol=0.0)
    if not (same and bool(torch.isfinite(start).all()) and bool((start > 0).all())):
        raise ValueError(f"init is not a kernel of kind {kind!r}: its coefficients are {f.tolist()[:4]} ...")
    return torch.log(start)
