"""PyG aggregations on :mod:`geo.ops`: any PyG layer takes them as ``aggr=``.

Their names, options, parameters and calls are those of :mod:`torch_geometric.nn.aggr`; nothing of PyG is changed.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch_geometric.nn import aggr

from geo.ops import SegmentPlan, gather_csr, scatter, segment_reduce, segment_softmax, segment_std
from geo.ops.segment import Reduce

__all__ = [
    "MaxAggregation",
    "MeanAggregation",
    "MinAggregation",
    "MulAggregation",
    "MultiAggregation",
    "SoftmaxAggregation",
    "StdAggregation",
    "SumAggregation",
    "VarAggregation",
]

Segments = Tensor | SegmentPlan  # ptr of sorted rows, or the plan of any


def _segments(index: Tensor | None, ptr: Tensor | None, dim_size: int | None) -> Segments:
    if ptr is not None:
        return ptr
    assert index is not None  # PyG's Aggregation.__call__ puts one index where neither was given
    return SegmentPlan(index, dim_size)


class _SegmentAggregation(aggr.Aggregation):
    """One row per segment of rows; see `SumAggregation`."""

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """Aggregates.

        Args:
            x: Features, one row per element.
            index: The group of each element, in any order.
            ptr: Bounds of the groups of sorted elements; goes before ``index``.
            dim_size: Number of groups. (default: ``index.max() + 1``)
            dim: The dimension of the elements.
        """
        return self.aggregate(x.movedim(dim, 0), _segments(index, ptr, dim_size)).movedim(0, dim)

    def aggregate(self, rows: Tensor, segments: Segments) -> Tensor:
        """Rows ``(|E|, *)`` to ``(|V|, *)``."""
        raise NotImplementedError


class _Reduction(_SegmentAggregation):
    """The reductions, which need no order of the rows when they are alone."""

    _reduce: Reduce

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """Aggregates; see `_SegmentAggregation`."""
        if ptr is not None or index is None or not x.is_floating_point():
            return super().forward(x, index, ptr, dim_size, dim)
        return scatter(x, index, dim, None, dim_size, self._reduce)

    def aggregate(self, rows: Tensor, segments: Segments) -> Tensor:
        """Rows ``(|E|, *)`` to ``(|V|, *)``."""
        return segment_reduce(rows, segments, self._reduce)


class SumAggregation(_Reduction):
    r"""Sum of each group, :math:`x'_i = \sum_{e \in i} x_e`; an empty group gives 0.

    The aggregation of "How Powerful are Graph Neural Networks?" (https://arxiv.org/abs/1810.00826).

    Shapes:
        x :math:`(*, |E|, F)`, index :math:`(|E|)` or ptr :math:`(|V| + 1)`; output :math:`(*, |V|, F)`.

    Symmetry and derivatives:
        Invariant to the order inside a group, equivariant to that of the groups. Differentiable any number of times;
        a group's output does not depend on the others.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import GINConv
        >>> conv = GINConv(torch.nn.Linear(8, 16), aggr=SumAggregation())
        >>> conv(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]])).shape
        torch.Size([3, 16])

    Differs from PyG's: bitwise the same on every run and for every number of threads; float16 and bfloat16 are summed
    in float32.
    """

    _reduce = "sum"


class MeanAggregation(_Reduction):
    r"""Mean of each group, :math:`x'_i = \frac{1}{|i|} \sum_{e \in i} x_e`; an empty group gives 0.

    The aggregation of "Inductive Representation Learning on Large Graphs" (https://arxiv.org/abs/1706.02216).

    Shapes:
        As :class:`SumAggregation`.

    Symmetry and derivatives:
        As :class:`SumAggregation`.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SAGEConv
        >>> conv = SAGEConv(8, 16, aggr=MeanAggregation())
        >>> conv(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]])).shape
        torch.Size([3, 16])

    Differs from PyG's: as :class:`SumAggregation`; integers are refused.
    """

    _reduce = "mean"


class MaxAggregation(_Reduction):
    r"""Largest entry of each group, :math:`x'_i = \max_{e \in i} x_e` for each feature; an empty group gives 0.

    The aggregation of "PointNet" (https://arxiv.org/abs/1612.00593).

    Shapes:
        As :class:`SumAggregation`.

    Symmetry and derivatives:
        As :class:`SumAggregation`; where entries tie, the gradient alone depends on their order.

    Example:
        >>> import torch
        >>> MaxAggregation()(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 0, 1])).tolist()
        [[3.0], [2.0]]

    Differs from PyG's: the whole gradient goes to the first entry that attains the maximum, in place of equal shares.
    """

    _reduce = "max"


class MinAggregation(_Reduction):
    r"""Smallest entry of each group, :math:`x'_i = \min_{e \in i} x_e` for each feature; an empty group gives 0.

    The mirror image of :class:`MaxAggregation`, one of the aggregators of https://arxiv.org/abs/2004.05718.

    Shapes:
        As :class:`SumAggregation`.

    Symmetry and derivatives:
        As :class:`MaxAggregation`.

    Example:
        >>> import torch
        >>> MinAggregation()(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 0, 1])).tolist()
        [[1.0], [2.0]]

    Differs from PyG's: as :class:`MaxAggregation`.
    """

    _reduce = "min"


class MulAggregation(_Reduction):
    r"""Product of each group, :math:`x'_i = \prod_{e \in i} x_e` for each feature; an empty group gives 1.

    No paper; one of the aggregations of PyG (https://pytorch-geometric.readthedocs.io).

    Shapes:
        As :class:`SumAggregation`.

    Symmetry and derivatives:
        As :class:`SumAggregation`.

    Example:
        >>> import torch
        >>> MulAggregation()(torch.tensor([[2.0], [3.0], [5.0]]), torch.tensor([0, 0, 1])).tolist()
        [[6.0], [5.0]]

    Differs from PyG's: takes ``ptr``, too; the gradient is right where factors are 0.
    """

    _reduce = "mul"


class VarAggregation(_SegmentAggregation):
    r"""Variance of each group, :math:`x'_i = \frac{1}{|i|} \sum_{e \in i} (x_e - \bar x_i)^2`; an empty group gives 0.

    One of the aggregators of "Principal Neighbourhood Aggregation" (https://arxiv.org/abs/2004.05718).

    Args:
        semi_grad: Hold the mean of squares constant in the backward pass. (default: ``False``)

    Shapes:
        As :class:`SumAggregation`.

    Symmetry and derivatives:
        As :class:`SumAggregation`.

    Example:
        >>> import torch
        >>> VarAggregation()(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 0, 1])).tolist()
        [[1.0], [0.0]]

    Differs from PyG's: the mean is taken off before squaring. PyG subtracts the square of the mean from the mean of the
    squares, which in float32 leaves nothing right, or a negative number, where the mean is some 1000 deviations.
    """

    def __init__(self, semi_grad: bool = False) -> None:
        super().__init__()
        self.semi_grad = semi_grad

    def aggregate(self, rows: Tensor, segments: Segments) -> Tensor:
        """Rows ``(|E|, *)`` to ``(|V|, *)``."""
        return _variance(rows, segments, self.semi_grad)


class StdAggregation(_SegmentAggregation):
    r"""Standard deviation of each group, the root of :class:`VarAggregation`.

    One of the aggregators of "Principal Neighbourhood Aggregation" (https://arxiv.org/abs/2004.05718). As in PyG, a
    variance of :math:`10^{-5}` or less counts as 0 and has gradient 0; so an empty group and a group of one give 0.
    :func:`geo.ops.segment_std` has no such threshold.

    Args:
        semi_grad: Hold the mean of squares constant in the backward pass. (default: ``False``)

    Shapes:
        As :class:`SumAggregation`.

    Symmetry and derivatives:
        As :class:`SumAggregation`.

    Example:
        >>> import torch
        >>> StdAggregation()(torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([0, 0, 1])).tolist()
        [[1.0], [0.0]]

    Differs from PyG's: as :class:`VarAggregation`.
    """

    def __init__(self, semi_grad: bool = False) -> None:
        super().__init__()
        self.semi_grad = semi_grad

    def aggregate(self, rows: Tensor, segments: Segments) -> Tensor:
        """Rows ``(|E|, *)`` to ``(|V|, *)``."""
        if self.semi_grad:
            std = _variance(rows, segments, semi_grad=True).clamp(min=_FLAT).sqrt()
        else:
            std = segment_std(rows, segments, unbiased=False)
        return std.masked_fill(std <= math.sqrt(_FLAT), 0.0)


_FLAT = 1e-5  # PyG's threshold


def _variance(rows: Tensor, segments: Segments, semi_grad: bool) -> Tensor:
    x = rows.detach() if semi_grad else rows
    mean = segment_reduce(x, segments, "mean")
    centred = x - gather_csr(mean, segments, num_out=x.size(0))
    variance = segment_reduce(centred * centred, segments, "mean")
    if not semi_grad:
        return variance
    mean = segment_reduce(rows, segments, "mean")
    return variance - (mean * mean - (mean * mean).detach())


class SoftmaxAggregation(_SegmentAggregation, aggr.SoftmaxAggregation):
    r"""Mean of each group weighted by the softmax of its entries, for each feature; an empty group gives 0.

    .. math::
        x'_i = \sum_{e \in i} \frac{\exp(t\, x_e)}{\sum_{e' \in i} \exp(t\, x_{e'})}\, x_e

    From "DeeperGCN: All You Need to Train Deeper GCNs" (https://arxiv.org/abs/2006.07739): the mean at :math:`t = 0`,
    the maximum as :math:`t` grows.

    Args:
        t: Inverse temperature, at first if it is learnt. (default: ``1.0``)
        learn: Make ``t`` a parameter. (default: ``False``)
        semi_grad: Hold the weights constant in the backward pass; not with ``learn``. (default: ``False``)
        channels: Temperatures to learn: 1, or one for each feature. (default: ``1``)

    Shapes:
        As :class:`SumAggregation`; ``t`` :math:`(\text{channels})`.

    Symmetry and derivatives:
        As :class:`SumAggregation`, by ``t`` as well.

    Example:
        >>> import torch
        >>> aggregation = SoftmaxAggregation(t=0.1, learn=True, channels=8)
        >>> aggregation(torch.randn(3, 8), torch.tensor([0, 0, 1])).shape
        torch.Size([2, 8])

    Differs from PyG's: the weights of a group add up to 1 exactly, PyG adds :math:`10^{-16}` to what it divides by; one
    temperature per feature goes with any number of dimensions.
    """

    def aggregate(self, rows: Tensor, segments: Segments) -> Tensor:
        """Rows ``(|E|, *)`` to ``(|V|, *)``."""
        scaled = rows * self.t if self.learn or self.t != 1 else rows
        weight = segment_softmax(scaled.detach() if self.semi_grad else scaled, segments)
        return segment_reduce(rows * weight, segments, "sum")


_BY_NAME: dict[str, type[_SegmentAggregation]] = {
    "add": SumAggregation,
    "sum": SumAggregation,
    "mean": MeanAggregation,
    "max": MaxAggregation,
    "min": MinAggregation,
    "mul": MulAggregation,
    "var": VarAggregation,
    "std": StdAggregation,
    "softmax": SoftmaxAggregation,
}


class MultiAggregation(aggr.MultiAggregation):
    r"""Several aggregations of the same groups, concatenated or combined; the groups are sorted once for all of them.

    .. math::
        x'_i = \mathrm{combine}\bigl(\mathrm{aggr}_1(x_e : e \in i), \dots, \mathrm{aggr}_K(x_e : e \in i)\bigr)

    From "Principal Neighbourhood Aggregation for Graph Nets" (https://arxiv.org/abs/2004.05718) and "Adaptive Filters
    and Aggregator Fusion" (https://arxiv.org/abs/2104.01481).

    Args:
        aggrs: Aggregations; a name that this module knows means the one of this module, any other that of PyG.
        aggrs_kwargs: Options of those that are named. (default: ``None``)
        mode: ``'cat'``, ``'proj'``, ``'sum'``, ``'mean'``, ``'max'``, ``'min'``, ``'logsumexp'``, ``'std'``,
            ``'var'`` or ``'attn'``. (default: ``'cat'``)
        mode_kwargs: Of ``'proj'`` and ``'attn'``: ``in_channels``, ``out_channels`` and, for the latter, ``num_heads``.

    Shapes:
        As :class:`SumAggregation`, with :math:`K F` features for ``'cat'``, ``out_channels`` for ``'proj'`` and
        ``'attn'``, otherwise :math:`F`.

    Symmetry and derivatives:
        Those that all its aggregations share.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import SAGEConv
        >>> conv = SAGEConv(8, 16, aggr=MultiAggregation(["mean", "max", "std"]))
        >>> conv(torch.randn(3, 8), torch.tensor([[0, 1, 2], [1, 2, 0]])).shape
        torch.Size([3, 16])

    Differs from PyG's: as its aggregations do. PyG's own ``MultiAggregation`` takes them, too, and so does a list as
    ``aggr``; then each sorts for itself.
    """

    def __init__(
        self,
        aggrs: list[aggr.Aggregation | str],
        aggrs_kwargs: list[dict[str, Any]] | None = None,
        mode: str = "cat",
        mode_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(aggrs, aggrs_kwargs, mode, mode_kwargs)
        for i, name in enumerate(aggrs):
            if isinstance(name, str) and name in _BY_NAME:
                self.aggrs[i] = _BY_NAME[name](**({} if aggrs_kwargs is None else aggrs_kwargs[i]))
        self.fused_aggr = None  # PyG's way for its own simple aggregations; forward here does not ask for it

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
    ) -> Tensor:
        """Aggregates.

        Args:
            x: Features, one row per element.
            index: The group of each element, in any order.
            ptr: Bounds of the groups of sorted elements; goes before ``index``.
            dim_size: Number of groups. (default: ``index.max() + 1``)
            dim: The dimension of the elements.
        """
        rows, segments = x.movedim(dim, 0), _segments(index, ptr, dim_size)
        outs = [
            a.aggregate(rows, segments).movedim(0, dim)
            if isinstance(a, _SegmentAggregation)
            else a(x, index, ptr, dim_size, dim)
            for a in self.aggrs
        ]
        combined: Tensor = self.combine(outs)
        return combined
