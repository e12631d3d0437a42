"""Binary operators on rows of features, for :class:`geo.nn.MonoidAggregation`: learned ones and exact monoids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geo.nn.mlp import MLP
from geo.ops import bounds, gru_merge, gru_merge_reference


class Monoid(nn.Module):
    r"""A binary operator on rows of features with, where it is known, its identity: what to derive own ones from.

    From "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541):

    .. math::
        (a \circ b) \circ c = a \circ (b \circ c), \qquad a \circ b = b \circ a, \qquad a \circ e = a

    A subclass defines ``forward(a, b)``, and overrides :meth:`identity`, :meth:`width` and :meth:`lift` where these
    defaults do not hold. Any function of two tensors is an operator as well.

    Args:
        channels: Width of the elements that :meth:`lift` takes. (default: ``None``, any)

    Shapes:
        a, b and output :math:`(*, C)`.

    Symmetry and derivatives:
        Those of the subclass. Operators treat rows one by one.

    Example:
        >>> class Hypotenuse(Monoid):
        ...     def forward(self, a, b):
        ...         return torch.hypot(a, b)
        ...     def identity(self):
        ...         return torch.zeros(())
        >>> Hypotenuse()(torch.tensor([3.0]), torch.tensor([4.0])).item()
        5.0
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        if channels is not None and (isinstance(channels, bool) or not isinstance(channels, int) or channels < 1):
            raise ValueError(f"channels is {channels!r}, but must be an integer of at least 1")
        self.channels = channels

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        raise NotImplementedError

    def identity(self) -> Tensor | None:
        """The identity, one number for each channel or one for all; None where it is not known."""
        return None

    def width(self, channels: int) -> int:
        """Width of the states whose elements have ``channels``."""
        return channels

    def lift(self, x: Tensor) -> Tensor:
        """The states of single elements."""
        return x

    def reset_parameters(self) -> None:
        """Draws the parameters anew; here there are none."""

    def extra_repr(self) -> str:
        """Sizes."""
        return "" if self.channels is None else str(self.channels)


class BinaryGRU(Monoid):
    r"""Learned operator: a GRU cell with one element as input and the other as state, averaged over both ways.

    .. math::
        a \circ b = \tfrac12 \bigl( \mathrm{GRU}(a, b) + \mathrm{GRU}(b, a) \bigr)

    From "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541). Commutative by
    construction; that it is associative and has an identity can only be learned, see
    :func:`geo.nn.associativity_loss` and :func:`geo.nn.identity_loss`.

    A level of a tree is one :func:`geo.ops.gru_merge`. What differs from the paper:
    nothing; ``weight`` and ``bias`` hold :class:`torch.nn.GRUCell`'s ``weight_ih`` and ``weight_hh`` one above the
    other, and so the biases.

    Args:
        channels: C.

    Shapes:
        a, b and output :math:`(*, C)`; ``weight`` :math:`(6C, C)`, ``bias`` :math:`(6C)`.

    Symmetry and derivatives:
        :math:`a \circ b = b \circ a` in floating point. Differentiable any number of times. The gates are computed in
        the dtype of the elements, under autocast as well.

    Example:
        >>> op = BinaryGRU(8)
        >>> a, b = torch.randn(2, 5, 8)
        >>> torch.equal(op(a, b), op(b, a))
        True
    """

    channels: int

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.empty(6 * channels, channels))
        self.bias = nn.Parameter(torch.empty(6 * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as :class:`torch.nn.GRUCell` does."""
        bound = 1 / math.sqrt(self.channels)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        num = a.numel() // self.channels
        place = torch.arange(num, device=a.device)
        rows = torch.cat([a.reshape(num, self.channels), b.reshape(num, self.channels)])
        return self.merge(rows, place, place + num).view(a.shape)

    def merge(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The products of rows of ``x``, as ``forward(x[left], x[right])``."""
        if x.dim() != 2:
            return self.forward(x.index_select(0, left), x.index_select(0, right))
        op = gru_merge_reference if bounds.in_functorch() else gru_merge
        merged: Tensor = op(x, left, right, self.weight, self.bias)
        return merged.to(x.dtype)


class SymmetricMLP(Monoid):
    r"""Learned operator: an MLP of symmetric functions of both elements.

    .. math::
        a \circ b = \mathrm{MLP}\bigl(a + b,\; a \odot b,\; |a - b|\bigr)

    A cell for "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541), which has
    the GRU's only. Commutative by construction; that it is associative can only be learned.

    Args:
        channels: C.
        hidden_channels: Width of the one hidden layer. (default: :math:`2 C`)
        act: Activation. (default: ``'gelu'``)

    Shapes:
        a, b and output :math:`(*, C)`.

    Symmetry and derivatives:
        :math:`a \circ b = b \circ a` in floating point. Differentiable where no entries of a and b are equal.

    Example:
        >>> op = SymmetricMLP(8)
        >>> a, b = torch.randn(2, 5, 8)
        >>> torch.equal(op(a, b), op(b, a))
        True
    """

    def __init__(self, channels: int, hidden_channels: int | None = None, act: str = "gelu") -> None:
        super().__init__(channels)
        self.hidden_channels = 2 * channels if hidden_channels is None else hidden_channels
        self.mlp = MLP(3 * channels, self.hidden_channels, channels, 2, None, act)

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        self.mlp.reset_parameters()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        out: Tensor = self.mlp(torch.cat([a + b, a * b, (a - b).abs()], dim=-1))
        return out.to(a.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.channels}, hidden_channels={self.hidden_channels}"


class _Couplings(nn.Module):
    """An invertible map of all vectors: in turn one half is shifted by an MLP of the other."""

    def __init__(self, channels: int, hidden: int, num: int) -> None:
        super().__init__()
        self.sizes = [channels // 2, channels - channels // 2]
        self.shifts = nn.ModuleList(
            MLP(self.sizes[k % 2], hidden, self.sizes[1 - k % 2], 2, None, "tanh") for k in range(num)
        )

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for shift in self.shifts:
            shift.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        parts = list(x.split(self.sizes, dim=-1))
        for k, shift in enumerate(self.shifts):
            parts[1 - k % 2] = parts[1 - k % 2] + shift(parts[k % 2]).to(x.dtype)
        return torch.cat(parts, dim=-1)

    def inverse(self, y: Tensor) -> Tensor:
        parts = list(y.split(self.sizes, dim=-1))
        for k, shift in reversed(list(enumerate(self.shifts))):
            parts[1 - k % 2] = parts[1 - k % 2] - shift(parts[k % 2]).to(y.dtype)
        return torch.cat(parts, dim=-1)


class TransportedSum(Monoid):
    r"""Exact monoid: the sum, seen through an invertible network.

    .. math::
        a \circ b = \varphi^{-1}\bigl(\varphi(a) + \varphi(b)\bigr), \qquad e = \varphi^{-1}(0)

    The monoids that are isomorphic to the sum, a control for "Learnable Commutative Monoids for Graph Neural Networks"
    (https://arxiv.org/abs/2212.08541), which does not have them. :math:`\varphi` is a stack of additive couplings
    (https://arxiv.org/abs/1410.8516), which maps all vectors one to one onto all vectors.

    Args:
        channels: C, at least 2 for the couplings.
        flow: A module with ``forward`` and ``inverse`` in place of the couplings. (default: ``None``)
        hidden_channels: Width of the MLPs of the couplings. (default: :math:`2 C`)
        num_couplings: How many. (default: ``4``)

    Shapes:
        a, b and output :math:`(*, C)`.

    Symmetry and derivatives:
        Commutative in floating point, associative up to rounding. Differentiable any number of times.

    Example:
        >>> op = TransportedSum(8).double()
        >>> a, b, c = torch.randn(3, 5, 8, dtype=torch.float64)
        >>> torch.allclose(op(op(a, b), c), op(a, op(b, c)))
        True
    """

    zero: Tensor

    def __init__(
        self,
        channels: int,
        flow: nn.Module | None = None,
        hidden_channels: int | None = None,
        num_couplings: int = 4,
    ) -> None:
        super().__init__(channels)
        if flow is None and channels < 2:
            raise ValueError(f"channels is {channels}, but couplings need at least 2: give a flow of one channel")
        hidden = 2 * channels if hidden_channels is None else hidden_channels
        self.flow = _Couplings(channels, hidden, num_couplings) if flow is None else flow
        self.register_buffer("zero", torch.zeros(channels), persistent=False)

    def reset_parameters(self) -> None:
        """Draws the weights of the flow anew, where it has a ``reset_parameters``."""
        if hasattr(self.flow, "reset_parameters"):
            self.flow.reset_parameters()  # type: ignore[operator]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        return self._inverse(self.flow(a) + self.flow(b))

    def identity(self) -> Tensor:
        """What the flow maps to zero."""
        return self._inverse(self.zero)

    def _inverse(self, y: Tensor) -> Tensor:
        out: Tensor = self.flow.inverse(y)  # type: ignore[operator]
        return out


class KSmallest(Monoid):
    r"""Exact monoid: the k smallest elements of each channel, in ascending order.

    .. math::
        a \circ b = \text{the } k \text{ smallest of } \{a_1, \dots, a_k, b_1, \dots, b_k\},
        \qquad e = (\infty, \dots, \infty)

    A monoid that solves the "2nd minimum" of "Learnable Commutative Monoids for Graph Neural Networks"
    (https://arxiv.org/abs/2212.08541) by construction; the paper learns it.

    Where fewer than k elements are there, the rest of the state is ``top``: infinite by default, which no linear layer
    bears. Give a finite bound of the elements for those (larger elements then count as ``top``).

    Args:
        k: How many.
        top: What stands for no element. (default: infinity)

    Shapes:
        Elements :math:`(*, C)`; a, b and output :math:`(*, C k)`, the k of a channel side by side.

    Symmetry and derivatives:
        Exactly commutative and associative. Differentiable almost everywhere; where elements tie, they may share the
        gradient. NaN spreads to the whole state of its channel.

    Example:
        >>> op = KSmallest(2)
        >>> a, b = op.lift(torch.tensor([[5.0], [3.0]]))
        >>> op(op(a, b), torch.tensor([4.0, 9.0])).tolist()
        [3.0, 4.0]
    """

    def __init__(self, k: int, top: float = math.inf) -> None:
        super().__init__()
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {k!r}, but must be an integer of at least 1")
        if not float(top) > -math.inf:
            raise ValueError(f"top is {top!r}, but must be a number above all elements")
        self.k, self.top = k, float(top)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        a, b = (t.unflatten(-1, (-1, self.k)) for t in (a, b))
        least = torch.minimum(a, b.flip(-1))  # the k smallest: one side ascends, the other descends
        if self.k == 2:
            low, high = least.unbind(-1)
            least = torch.stack([torch.minimum(low, high), torch.maximum(low, high)], dim=-1)
        elif self.k > 2:
            least = least.sort(dim=-1).values  # NaN goes last
            least = torch.where(least[..., -1:].isnan(), least[..., -1:], least)
        return least.flatten(-2)

    def identity(self) -> Tensor:
        """No elements."""
        return torch.tensor(self.top, dtype=torch.float64)

    def width(self, channels: int) -> int:
        """As many for each channel."""
        return self.k * channels

    def lift(self, x: Tensor) -> Tensor:
        """Each element and k - 1 times ``top``."""
        top: float = self.top
        if not x.is_floating_point():
            limits = (0, 1) if x.dtype == torch.bool else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
            if not limits[0] <= top <= limits[1] or top != int(top):
                raise ValueError(f"x: {x.dtype} holds no {top}, KSmallest's top: give it an integer that fits")
            top = int(top)
        if top < math.inf:
            x = x.clamp(max=top)
        return F.pad(x.unsqueeze(-1), (0, self.k - 1), value=top).flatten(-2)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.k}" if self.top == math.inf else f"{self.k}, top={self.top:g}"


class CircularConv(Monoid):
    r"""Exact monoid: circular convolution, the product of the algebra of polynomials modulo :math:`z^C - 1`.

    .. math::
        (a \circ b)_i = \sum_{j} a_j \, b_{(i - j) \bmod C}, \qquad e = (1, 0, \dots, 0)

    The binding of holographic reduced representations (https://doi.org/10.1109/72.377968), as a bilinear monoid for
    "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541).
    Computed as a product of Fourier transforms, whose moduli multiply: of many elements only those whose moduli are
    close to 1 keep the result from vanishing or overflowing.

    Args:
        channels: C.

    Shapes:
        a, b and output :math:`(*, C)`.

    Symmetry and derivatives:
        Commutative in floating point, associative up to rounding. Differentiable any number of times. Half precision is
        computed in float32.

    Example:
        >>> op = CircularConv(4)
        >>> op(torch.tensor([0.0, 1, 0, 0]), torch.tensor([5.0, 6, 7, 8])).round().tolist()
        [8.0, 5.0, 6.0, 7.0]
    """

    one: Tensor
    channels: int

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("one", torch.eye(1, channels)[0].clone(), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        if a.numel() == 0:  # which some Fourier transforms refuse
            return a * b
        wide = torch.promote_types(a.dtype, torch.float32)
        spectrum = torch.fft.rfft(a.to(wide)) * torch.fft.rfft(b.to(wide))
        out: Tensor = torch.fft.irfft(spectrum, n=self.channels).to(a.dtype)
        return out

    def identity(self) -> Tensor:
        """The polynomial 1."""
        return self.one


class LogSumExp(Monoid):
    r"""Exact monoid: the soft maximum, with a learnable temperature for each channel.

    .. math::
        a \circ b = \tau \log\bigl(e^{a / \tau} + e^{b / \tau}\bigr), \qquad e = -\infty

    The aggregation of a set is :math:`\tau \log \sum_i e^{x_i / \tau}`, close to the maximum for small temperatures; a
    monoid for "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541). It is
    ``exp(log_temperature)``, so that it stays positive.

    Args:
        channels: C.
        temperature: :math:`\tau` at first. (default: ``1.0``)
        learn: Make it a parameter. (default: ``True``)

    Shapes:
        a, b and output :math:`(*, C)`.

    Symmetry and derivatives:
        Commutative in floating point, associative up to rounding. Differentiable any number of times, for finite
        elements.

    Example:
        >>> op = LogSumExp(1)
        >>> round(op(torch.tensor([0.0]), torch.tensor([0.0])).item(), 4)
        0.6931
    """

    log_temperature: Tensor
    channels: int

    def __init__(self, channels: int, temperature: float = 1.0, learn: bool = True) -> None:
        super().__init__(channels)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}, but must be positive and finite")
        self.temperature, self.learn = float(temperature), bool(learn)
        start = torch.full((channels,), math.log(temperature))
        if learn:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)

    def reset_parameters(self) -> None:
        """Back to the temperature of the start."""
        with torch.no_grad():
            self.log_temperature.fill_(math.log(self.temperature))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        tau = self.log_temperature.exp().to(a.dtype)
        far = ~(a - b).isfinite()  # one is infinite: the larger is all there is, and quotients would have no gradient
        near = tau * torch.logaddexp(torch.where(far, 0, a) / tau, torch.where(far, 0, b) / tau)
        return torch.where(far, torch.maximum(a, b), near)

    def identity(self) -> Tensor:
        """Minus infinity."""
        return torch.tensor(-math.inf, dtype=torch.float64)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{self.channels}, temperature={self.temperature:g}, learn={self.learn}"


_ELEMENTWISE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "sum": (torch.add, 0.0),
    "mul": (torch.mul, 1.0),
    "max": (torch.maximum, -math.inf),
    "min": (torch.minimum, math.inf),
    "or": (lambda a, b: a + b - a * b, 0.0),
    "velocity": (lambda a, b: (a + b) / (1 + a * b), 0.0),
}


class ElementwiseMonoid(Monoid):
    r"""Exact monoid of numbers, by name, applied to each channel.

    ======================  =====================  ===================
    name                    a, b                   identity
    ======================  =====================  ===================
    ``'sum'``               a + b                  0
    ``'mul'``               a b                    1
    ``'max'``               max(a, b)              minus infinity
    ``'min'``               min(a, b)              infinity
    ``'or'``                a + b - a b            0
    ``'velocity'``          (a + b) / (1 + a b)    0
    ======================  =====================  ===================

    where ``'or'`` (of independent events) is for numbers in [0, 1], ``'velocity'`` (the sum of velocities, or of the
    arguments of tanh) for those in (-1, 1); nothing checks this. The fixed aggregators that "Learnable Commutative
    Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541) starts from.

    Args:
        kind: One of the names.

    Shapes:
        a, b and output :math:`(*)`.

    Symmetry and derivatives:
        Commutative in floating point, associative up to rounding (``'max'`` and ``'min'`` exactly). Differentiable,
        ``'max'`` and ``'min'`` almost everywhere; where elements tie, they share the gradient.

    Example:
        >>> ElementwiseMonoid("velocity")(torch.tensor([0.5]), torch.tensor([0.5])).item()
        0.800000011920929
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in _ELEMENTWISE:
            raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(map(repr, _ELEMENTWISE))}")
        self.kind = kind

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each entry of ``a`` and the same entry of ``b``."""
        return _ELEMENTWISE[self.kind][0](a, b)

    def identity(self) -> Tensor:
        """The number that changes nothing."""
        return torch.tensor(_ELEMENTWISE[self.kind][1], dtype=torch.float64)

    def extra_repr(self) -> str:
        """The name."""
        return repr(self.kind)


class ProductMonoid(Monoid):
    r"""Direct product of monoids: each acts on its own channels.

    .. math::
        (a_1, \dots, a_m) \circ (b_1, \dots, b_m) = (a_1 \circ_1 b_1, \dots, a_m \circ_m b_m)

    It is associative, commutative and has an identity where all its factors are so and have one. With a learned linear
    map before and after (``project='linear'`` of :class:`geo.nn.MonoidAggregation`) it chooses among fixed
    aggregators, as for "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541).

    Args:
        ops: The factors, :class:`Monoid` or names of an :class:`ElementwiseMonoid`.
        channels: Width of the elements of each.

    Shapes:
        Elements :math:`(*, \sum_i C_i)`; a, b and output :math:`(*, \sum_i W_i)` with the widths of the factors'
        states, :math:`W_i = C_i` for all but :class:`KSmallest`.

    Symmetry and derivatives:
        Those that all its factors share.

    Example:
        >>> op = ProductMonoid(["sum", "max", KSmallest(2)], [1, 1, 1])
        >>> a, b = op.lift(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        >>> op(a, b).tolist()
        [5.0, 5.0, 3.0, 6.0]
    """

    def __init__(self, ops: Sequence[Monoid | str], channels: Sequence[int]) -> None:
        if not ops or len(ops) != len(channels):
            raise ValueError(
                f"channels has {len(channels)} widths for {len(ops)} ops, but needs one for each, at least one"
            )
        super().__init__(sum(channels))
        factors = [ElementwiseMonoid(op) if isinstance(op, str) else op for op in ops]
        for op, num in zip(factors, channels, strict=True):
            if not isinstance(op, Monoid):
                raise ValueError(f"ops holds {op!r}, but must hold geo.nn.Monoid or names")
            if op.channels not in (None, num):
                raise ValueError(f"channels gives {num} to {op}, which takes {op.channels}")
        self.ops, self.sizes = nn.ModuleList(factors), list(channels)
        self.widths = [op.width(num) for op, num in zip(factors, channels, strict=True)]

    def _factors(self) -> list[Monoid]:
        return [op for op in self.ops if isinstance(op, Monoid)]

    def reset_parameters(self) -> None:
        """Draws the parameters of all factors anew."""
        for op in self._factors():
            op.reset_parameters()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of each row of ``a`` and the same row of ``b``."""
        left, right = a.split(self.widths, dim=-1), b.split(self.widths, dim=-1)
        return torch.cat([op(*pair) for op, *pair in zip(self._factors(), left, right, strict=True)], dim=-1)

    def identity(self) -> Tensor | None:
        """The identities of the factors side by side; None where one is not known."""
        parts = [op.identity() for op in self._factors()]
        known = [part.expand(num) for part, num in zip(parts, self.widths, strict=True) if part is not None]
        if len(known) < len(parts):
            return None
        device = next((part.device for part in known if part.device.type != "cpu"), None)
        return torch.cat([part.to(device) for part in known])

    def width(self, channels: int) -> int:
        """The widths of the factors' states together."""
        return sum(self.widths)

    def lift(self, x: Tensor) -> Tensor:
        """The lifted elements of the factors side by side."""
        parts = zip(self._factors(), x.split(self.sizes, dim=-1), strict=True)
        return torch.cat([op.lift(part) for op, part in parts], dim=-1)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"channels={self.sizes}"
