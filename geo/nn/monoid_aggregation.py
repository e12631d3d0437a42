"""Aggregation by any binary operator, and how far an operator is from a commutative monoid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.nn.aggr import Aggregation, LCMAggregation

from geo.nn.monoids import BinaryGRU, ElementwiseMonoid
from geo.ops import SegmentPlan, TreePlan, csr_from_index, tree_reduce
from geo.ops.plan import index_from_csr
from geo.ops.random_walk import philox

Op = Callable[[Tensor, Tensor], Tensor]
_KIND = 17  # of the random numbers of shuffles


class _Segments(NamedTuple):
    """Segment i holds the rows ``perm[ptr[i]:ptr[i + 1]]`` (without ``perm``: those rows)."""

    ptr: Tensor
    perm: Tensor | None
    tree: TreePlan


class MonoidAggregation(Aggregation):
    r"""Aggregation by a binary operator along balanced trees, one for each group, all of them level by level.

    .. math::
        x'_i = \bigl((x_1 \circ x_2) \circ (x_3 \circ x_4)\bigr) \circ x_5
        \quad \text{for the elements } x_1, \dots, x_5 \text{ of group } i, \qquad x'_i = e \text{ for none}

    From "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541). A group of n
    elements takes n - 1 merges of depth :math:`\lceil \log_2 n \rceil`. Any PyG layer takes it as ``aggr=``, so that
    no layer of its own is needed:

    * ``SAGEConv(8, 16, aggr=MonoidAggregation(BinaryGRU(8)))``
    * ``GINConv(MLP(8, ...), aggr=MonoidAggregation(KSmallest(2, top=9.0), 8, 8, project="linear"))``

    What differs from the paper and PyG's :class:`~torch_geometric.nn.aggr.LCMAggregation`: nothing is padded, so a
    group's output does not depend on the others (PyG folds zeros up to the largest group into it), an empty group gives
    the identity, the index need not be sorted, and time and memory are proportional to the elements, not to groups
    times the largest. On groups of one size both compute the same; see :func:`to_pyg_lcm`.

    The order of the elements matters unless the operator is associative and commutative. It is

    * ``'given'``: that of the input;
    * ``'random'``: in training shuffled in each call, so that the operator learns not to care. A call draws one number
      from `generator` (by default PyTorch's of the CPU, which ``torch.manual_seed`` seeds), and from that a permutation
      for each size, so that for the same number, too, a group's output does not depend on the others. After ``eval()``
      it is the given order or, with several `num_orders`, fixed shuffles;
    * ``'sorted'``: ascending by the sum of an element's channels, ties by a hash of 64 bits of all of them: exactly
      invariant to permutation, but for elements that differ and yet tie in both. Not continuous where sums cross.

    With `num_orders` the outputs for that many shuffles are averaged.

    The plan of the trees is kept for the next call, and used if that has an equal index, or `ptr`.
    ``forward(..., plan=)`` takes a :class:`geo.ops.TreePlan` of sorted elements in place of both.

    Args:
        op: The operator: a :class:`Monoid`, any module or function of two tensors of rows, or a name of
            :class:`ElementwiseMonoid`.
        in_channels: Width of the input. (default: that of `op`)
        out_channels: Width of the output. (default: that of the states of `op`)
        project: Map the input to the elements by a learned linear map and a ReLU, as PyG does, and the result, if it
            has not ``out_channels``, by a linear map. With ``'linear'`` the ReLU is left out. (default: ``False``)
        identity: What an empty group gives: ``'learn'`` stands for the identity of `op` or, where that is not known,
            for a parameter that starts at zero; ``'zero'``, for identities that are infinite where a linear layer comes
            next; or a tensor, one number for each channel of a state or one for all. (default: ``'learn'``)
        order: One of the names above. (default: ``'given'``)
        num_orders: Shuffles to average over, for ``'random'``. (default: ``1``)
        keep_states: Keep the elements and all results of merges of the latest call as ``last_states``
            :math:`(N, W)`, for :func:`associativity_loss` and :func:`identity_loss`. (default: ``False``)
        generator: A CPU generator for the shuffles. (default: PyTorch's)

    Shapes:
        x :math:`(*, |E|, F)`, index :math:`(|E|)` in any order, or ptr :math:`(|V| + 1)`; output
        :math:`(*, |V|, W)`. Another `dim` of the elements may be named; of the others the last holds the channels.

    Symmetry and derivatives:
        Equivariant to the order of the groups; invariant to that of their elements where `op` is a commutative monoid,
        or for ``'sorted'``. Differentiable as often as `op`. A group's output does not depend on its batch; NaN stays
        in its group.

    Raises:
        ValueError: Widths that do not fit, an unknown option, an operator that changes width or dtype.
        IndexError: A negative index, or a ``ptr`` that does not rise.

    Example:
        >>> from torch_geometric.nn import SAGEConv
        >>> conv = SAGEConv(8, 16, aggr=MonoidAggregation(BinaryGRU(8)))
        >>> conv(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 1]])).shape
        torch.Size([3, 16])
    """

    last_states: Tensor | None

    def __init__(
        self,
        op: Op | str,
        in_channels: int | None = None,
        out_channels: int | None = None,
        project: bool | str = False,
        identity: str | Tensor = "learn",
        order: str = "given",
        num_orders: int = 1,
        *,
        keep_states: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not (isinstance(op, str) or callable(op)):
            raise ValueError(f"op is {op!r}, but must be an operator of two tensors or its name")
        if project not in (False, True, "linear"):
            raise ValueError(f"project is {project!r}, but must be False, True or 'linear'")
        if order not in ("given", "random", "sorted"):
            raise ValueError(f"order is {order!r}, but must be 'given', 'random' or 'sorted'")
        if isinstance(num_orders, bool) or not isinstance(num_orders, int) or num_orders < 1:
            raise ValueError(f"num_orders is {num_orders!r}, but must be an integer of at least 1")
        if num_orders > 1 and order != "random":
            raise ValueError(f"num_orders is {num_orders}, but must be 1 unless order='random': nothing else is drawn")
        self.op: Any = ElementwiseMonoid(op) if isinstance(op, str) else op
        self.project, self.order, self.num_orders = project, order, num_orders
        self.keep_states, self.generator = bool(keep_states), generator
        self._widths(in_channels, out_channels)
        self.identity = self._set_identity(identity)
        self.last_states = None
        self._latest: tuple[Tensor, tuple[int | None, bool], _Segments] | None = None

    def _widths(self, in_channels: int | None, out_channels: int | None) -> None:
        name, taken = _name(self.op), getattr(self.op, "channels", None)
        if self.project and in_channels is None:
            raise ValueError("in_channels: expected a width for project, got None")
        given = (out_channels or in_channels) if self.project else in_channels
        if not self.project and None not in (in_channels, taken) and in_channels != taken:
            raise ValueError(
                f"in_channels is {in_channels}, but {name} takes {taken}: map them with project=True or 'linear'"
            )
        self.element_channels: int | None = given if taken is None else taken
        self.state_channels = None if self.element_channels is None else _width(self.op, self.element_channels)
        self.lin = self.lin_out = None
        if self.project:
            self.lin = nn.Linear(in_channels, self.element_channels)  # type: ignore[arg-type]
            if out_channels not in (None, self.state_channels):
                self.lin_out = nn.Linear(self.state_channels, out_channels)  # type: ignore[arg-type]
        elif out_channels not in (None, self.state_channels):
            width = "any number of channels: give in_channels"
            if self.state_channels is not None:
                width = f"{self.state_channels}: map them with project=True or 'linear'"
            raise ValueError(f"out_channels is {out_channels}, but the states of {name} have {width}")
        self.in_channels = in_channels if self.project else self.element_channels
        self.out_channels = self.state_channels if out_channels is None else out_channels

    def _set_identity(self, identity: str | Tensor) -> str:
        """What an empty group gives, as ``self.empty``; whose it is."""
        self.empty: Tensor | None
        if isinstance(identity, Tensor):
            if identity.shape not in {(), (self.state_channels or identity.numel(),)}:
                raise ValueError(
                    f"identity: expected [{self.state_channels}] numbers or one, got {list(identity.shape)}"
                )
            self.register_buffer("empty", identity.detach().clone())
            return "given"
        if identity not in ("learn", "zero"):
            raise ValueError(f"identity is {identity!r}, but must be 'learn', 'zero' or a tensor")
        known = getattr(self.op, "identity", None)
        if identity == "zero" or (known is not None and known() is not None):
            self.empty = None
            return "zero" if identity == "zero" else "op"
        if self.state_channels is None:
            raise ValueError(
                f"identity is 'learn', but {_name(self.op)} has no width: give in_channels, or identity='zero'"
            )
        self.empty = nn.Parameter(torch.zeros(self.state_channels))
        return "learn"

    def reset_parameters(self) -> None:
        """Draws the parameters anew; a learned identity goes back to zero."""
        for module in (self.op, self.lin, self.lin_out):
            if module is not None and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if isinstance(self.empty, nn.Parameter):
            nn.init.zeros_(self.empty)

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
        *,
        plan: TreePlan | None = None,
    ) -> Tensor:
        """Aggregates.

        Args:
            x: Features, one row per element.
            index: The group of each element, in any order.
            ptr: Bounds of the groups of sorted elements; goes before ``index``.
            dim_size: Number of groups. (default: ``index.max() + 1``)
            dim: The dimension of the elements.
            max_num_elements: Taken as PyG's layers pass it, and not needed.
            plan: The trees of sorted elements; goes before ``ptr``.
        """
        segments = self._segments(x.size(dim), index, ptr, dim_size, plan)
        rows = self._elements(x.movedim(dim, 0))
        states: list[Tensor] | None = [rows] if self.keep_states else None
        outs = []
        as_given = self.order == "given" or (self.order == "random" and not self.training and self.num_orders == 1)
        tree = segments.tree
        for perm in [segments.perm] if as_given else self._orders(rows, segments):
            ordered = rows if perm is None else rows.index_select(0, perm)
            outs.append(tree_reduce(ordered, tree.ptr, self.op, tree, self._identity_of(rows), states))
        out = outs[0] if len(outs) == 1 else torch.stack(outs).mean(0)
        self.last_states = None if states is None else torch.cat(states)
        if self.lin_out is not None:
            out = self.lin_out(out)
        return out.movedim(0, dim)

    def _elements(self, rows: Tensor) -> Tensor:
        """The states of single elements."""
        if self.in_channels is not None and (rows.dim() < 2 or rows.size(-1) != self.in_channels):
            raise ValueError(
                f"x: expected {self.in_channels} channels for {_name(self.op)}, got rows {list(rows.shape[1:])}; "
                "give in_channels and project=True or 'linear' to map them"
            )
        if self.lin is not None:
            mapped: Tensor = self.lin(rows)
            rows = mapped.to(rows.dtype) if self.project == "linear" else mapped.relu().to(rows.dtype)
        return self.op.lift(rows) if hasattr(self.op, "lift") else rows

    def _identity_of(self, rows: Tensor) -> Tensor | None:
        if self.identity == "zero":
            return None
        value = self.op.identity() if self.identity == "op" else self.empty
        assert isinstance(value, Tensor)
        if not rows.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"identity: {rows.dtype} holds no {value.tolist()}: give identity='zero' or a tensor")
        return value.to(rows).expand(rows.shape[1:])

    @torch.compiler.disable
    def _segments(
        self, num_rows: int, index: Tensor | None, ptr: Tensor | None, dim_size: int | None, plan: TreePlan | None
    ) -> _Segments:
        if plan is not None:
            return _Segments(plan.ptr, None, plan)
        key = index if ptr is None else ptr
        assert key is not None  # PyG's Aggregation.__call__ puts one index where neither was given
        if ptr is None and key.shape != (num_rows,):
            raise ValueError(f"index: expected one entry for each of {num_rows} elements, got {list(key.shape)}")
        kind = (dim_size, ptr is None)
        if self._latest is not None:
            latest, then, segments = self._latest
            if then == kind and latest.shape == key.shape and latest.device == key.device and torch.equal(latest, key):
                return segments
        with torch.inference_mode(False):  # a plan made in validation serves training, too
            key = key.clone()  # whatever happens to the caller's memory
            if ptr is None:
                order = SegmentPlan(key, dim_size)
                segments = _Segments(order.ptr, order.perm, TreePlan(order.ptr, num_rows))
            else:
                segments = _Segments(key, None, TreePlan(key, num_rows))
        self._latest = (key, kind, segments)
        return segments

    @torch.compiler.disable
    def _orders(self, rows: Tensor, segments: _Segments) -> list[Tensor | None]:
        """The rows of all groups, one group after the other, for each output to average."""
        num_rows, ptr = segments.tree.num_rows, segments.ptr
        index = index_from_csr(ptr, None, num_rows)
        if self.order == "sorted":
            base = rows if segments.perm is None else rows.index_select(0, segments.perm)
            by_key = [_ascending(base.detach())]
        else:
            place = torch.arange(num_rows, device=ptr.device) - ptr[index]
            seed = 0
            if self.training:
                seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
            by_key = [_random(seed, k, ptr)[place].argsort(stable=True) for k in range(self.num_orders)]
        orders = [key[csr_from_index(index[key], ptr.size(0) - 1)[1]] for key in by_key]
        return [order if segments.perm is None else segments.perm[order] for order in orders]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_latest": None, "last_states": None}

    def __repr__(self) -> str:
        options = {"project": False, "identity": "learn", "order": "given", "num_orders": 1}
        given = {name: getattr(self, name) for name in options}
        given["identity"] = "learn" if self.identity == "op" else self.identity
        text = "".join(f", {name}={value!r}" for name, value in given.items() if value != options[name])
        return f"{type(self).__name__}({_name(self.op)}, {self.in_channels}, {self.out_channels}{text})"


def _name(op: Any) -> str:
    return repr(op) if isinstance(op, nn.Module) else getattr(op, "__name__", type(op).__name__)


def _width(op: Any, channels: int) -> int:
    return int(op.width(channels)) if hasattr(op, "width") else channels


def _random(seed: int, number: int, ptr: Tensor) -> Tensor:
    """A random number for each place in a group, up to the longest."""
    longest = int(ptr.diff().max()) if ptr.size(0) > 1 else 0
    place = torch.arange(longest, device=ptr.device)
    zero = torch.zeros_like(place)
    words = philox(seed, place, torch.full_like(place, number), zero, torch.full_like(place, _KIND))
    return words[0] << 31 | words[1] >> 1


def _ascending(rows: Tensor) -> Tensor:
    """The order of rows by their sums, ties by their hashes: it depends on the content alone."""
    flat = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    values = flat.to(torch.float64) + 0.0  # of -0.0, too, makes 0.0
    bits = values.view(torch.int64)
    column = torch.arange(flat.size(1), device=rows.device)
    odd = (column * -0x61C8864680B583EB + 0x1F123BB5159A55E5) | 1
    mixed = (bits ^ bits >> 32) * odd
    mixed = (mixed ^ mixed >> 29) * -0x40A7B892E31B1A47
    by_hash = (mixed ^ mixed >> 32).sum(1).argsort(stable=True)
    return by_hash[values.sum(1)[by_hash].argsort(stable=True)]


def associativity_loss(op: Op, states: Tensor, num: int = 256, generator: torch.Generator | None = None) -> Tensor:
    r"""How far an operator is from associative on triples of given states: 0 for a monoid.

    .. math::
        L = \frac{1}{W} \, \mathrm{mean}_{(a, b, c)} \, \bigl\| (a \circ b) \circ c - a \circ (b \circ c) \bigr\|^2

    The soft constraint of "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541),
    to be added to a loss with a weight of 0.01 to 1. Draw from elements and from results of merges alike:
    ``last_states`` of :class:`MonoidAggregation` holds both.

    Args:
        op: The operator.
        states: What to draw from.
        num: Triples drawn, with replacement.
        generator: Of the device of ``states``. (default: PyTorch's)

    Shapes:
        states :math:`(N, W)`; output: a scalar.

    Symmetry and derivatives:
        Invariant to the order of the states in distribution. Differentiable as often as `op`.

    Raises:
        ValueError: No states, or ``num`` below 1.

    Example:
        >>> from geo.nn import KSmallest
        >>> associativity_loss(KSmallest(2), torch.randn(10, 2).sort().values).item()
        0.0
    """
    if states.dim() < 2 or states.size(0) == 0:
        raise ValueError(f"states: expected [N, W] with N of at least 1, got {list(states.shape)}")
    if num < 1:
        raise ValueError(f"num is {num}, but must be at least 1")
    picked = torch.randint(states.size(0), (3 * num,), generator=generator, device=states.device)
    a, b, c = states.index_select(0, picked).chunk(3)
    return _difference(op(op(a, b), c), op(a, op(b, c))).square().mean()


def identity_loss(op: Op, states: Tensor, identity: Tensor) -> Tensor:
    r"""How far an element is from the identity of an operator on given states: 0 for a monoid.

    .. math::
        L = \frac{1}{W} \, \mathrm{mean}_{a} \, \| a \circ e - a \|^2

    The soft constraint of "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541).

    Args:
        op: The operator.
        states: The elements a.
        identity: e, for :class:`MonoidAggregation` with a learned one its ``empty``.

    Shapes:
        states :math:`(N, W)`, identity :math:`(W)` or a scalar; output: a scalar.

    Symmetry and derivatives:
        Invariant to the order of the states. Differentiable as often as `op`.

    Example:
        >>> identity_loss(torch.add, torch.randn(10, 2), torch.zeros(2)).item()
        0.0
    """
    return _difference(op(states, identity.to(states).expand_as(states)), states).square().mean()


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """The difference, and 0 where both are infinite and equal."""
    return torch.where(a == b, 0.0, a - b)


@torch.no_grad()
def order_sensitivity(
    aggr: Aggregation, x: Tensor, index: Tensor, num_perms: int = 8, generator: torch.Generator | None = None
) -> dict[str, float]:
    r"""How much an aggregation depends on the order inside the groups, over random permutations: 0 for a monoid.

    .. math::
        \text{rel\_std} = \frac{\mathrm{mean} \, \sigma_\text{perms}}{\mathrm{mean} \, \sigma_\text{groups}}, \qquad
        \text{max\_abs} = \max |x'_p - x'_1|

    with the deviation :math:`\sigma_\text{perms}` of each output over the permutations, and
    :math:`\sigma_\text{groups}` of each channel over the groups. For "Learnable Commutative Monoids for Graph Neural
    Networks" (https://arxiv.org/abs/2212.08541), whose operators are commutative, and associative only as far as they
    have learned it. Compare it at equal accuracy: a model that does not use its input scores 0.

    Args:
        aggr: Any aggregation; PyG's that need a sorted index get one.
        x: Elements.
        index: The group of each element.
        num_perms: Permutations drawn.
        generator: Of the device of ``x``. (default: PyTorch's)

    Shapes:
        x :math:`(|E|, F)`, index :math:`(|E|)`; output: the two numbers by name.

    Symmetry and derivatives:
        Invariant to the order of elements and groups in distribution. Not differentiable.

    Example:
        >>> from geo.nn import MonoidAggregation
        >>> order_sensitivity(MonoidAggregation("max"), torch.randn(9, 2), torch.arange(9) % 3)
        {'rel_std': 0.0, 'max_abs': 0.0}
    """
    if num_perms < 2:
        raise ValueError(f"num_perms is {num_perms}, but must be at least 2")
    outs = []
    for _ in range(num_perms):
        shuffled = torch.randperm(index.size(0), generator=generator, device=index.device)
        perm = shuffled[index[shuffled].argsort(stable=True)]
        outs.append(aggr(x.index_select(0, perm), index.index_select(0, perm)).double())
    out = torch.stack(outs)
    change = _difference(out, out[:1])
    groups = torch.where(torch.isfinite(out[0]), out[0], 0.0)
    spread = float(groups.std(0, correction=0).mean())
    rel_std = float(change.std(0, correction=0).mean())
    if rel_std:
        rel_std = rel_std / spread if spread else math.inf
    return {"rel_std": rel_std, "max_abs": float(change.abs().max())}


def to_pyg_lcm(aggregation: MonoidAggregation) -> LCMAggregation:
    r"""PyG's :class:`~torch_geometric.nn.aggr.LCMAggregation` with the weights of a :class:`BinaryGRU` aggregation.

    .. math::
        W_{ih} = W_{1:3C}, \qquad W_{hh} = W_{3C+1:6C}

    Both compute "Learnable Commutative Monoids for Graph Neural Networks" (https://arxiv.org/abs/2212.08541), and the
    same on groups of one size. On others PyG's outputs depend on the largest group, as it folds padding in; it
    has no identity, and needs a sorted index.

    Args:
        aggregation: With a :class:`BinaryGRU`, ``project`` False or True, and no map after it.

    Shapes:
        Those of its parameters; nothing is computed.

    Symmetry and derivatives:
        The weights are copied, not shared.

    Raises:
        ValueError: What PyG's does not have.

    Example:
        >>> from geo.nn import BinaryGRU
        >>> to_pyg_lcm(MonoidAggregation(BinaryGRU(8)))
        LCMAggregation(8, 8, project=False)
    """
    op = aggregation.op
    if not isinstance(op, BinaryGRU) or aggregation.project == "linear" or aggregation.lin_out is not None:
        raise ValueError(f"{aggregation} is not an LCMAggregation: that is a BinaryGRU, with a ReLU after project")
    lcm = LCMAggregation(aggregation.in_channels, op.channels, bool(aggregation.project)).to(op.weight)
    with torch.no_grad():
        for theirs, ours in _shared(lcm, aggregation):
            theirs.copy_(ours)
    return lcm


def from_pyg_lcm(lcm: LCMAggregation, **options: Any) -> MonoidAggregation:
    r"""The :class:`MonoidAggregation` with the weights of PyG's :class:`~torch_geometric.nn.aggr.LCMAggregation`.

    .. math::
        W = (W_{ih}; W_{hh})

    See :func:`to_pyg_lcm`; both are from "Learnable Commutative Monoids for Graph Neural Networks"
    (https://arxiv.org/abs/2212.08541).

    Args:
        lcm: PyG's.
        options: ``identity``, ``order`` and so on of :class:`MonoidAggregation`.

    Shapes:
        Those of its parameters; nothing is computed.

    Symmetry and derivatives:
        The weights are copied, not shared.

    Example:
        >>> from torch_geometric.nn import LCMAggregation
        >>> from_pyg_lcm(LCMAggregation(4, 8))
        MonoidAggregation(BinaryGRU(8), 4, 8, project=True)
    """
    aggregation: MonoidAggregation = MonoidAggregation(
        BinaryGRU(lcm.out_channels), lcm.in_channels, lcm.out_channels, bool(lcm.project), **options
    ).to(lcm.gru_cell.weight_ih)
    with torch.no_grad():
        for theirs, ours in _shared(lcm, aggregation):
            ours.copy_(theirs)
    return aggregation


def _shared(lcm: LCMAggregation, aggregation: MonoidAggregation) -> list[tuple[Tensor, Tensor]]:
    """Pairs of the same parameters."""
    cell, op = lcm.gru_cell, aggregation.op
    weight_ih, weight_hh = op.weight.chunk(2)
    bias_ih, bias_hh = op.bias.chunk(2)
    pairs = [
        (cell.weight_ih, weight_ih),
        (cell.weight_hh, weight_hh),
        (cell.bias_ih, bias_ih),
        (cell.bias_hh, bias_hh),
    ]
    if aggregation.lin is not None:
        pairs += [(lcm.lin.weight, aggregation.lin.weight), (lcm.lin.bias, aggregation.lin.bias)]
    return pairs
