"""Linear attention under a mask that knows the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geo.kernels import FeatureMap, SparseFeatures, heat, normalized_adjacency
from geo.nn.learnable_modulation import LearnableModulation
from geo.ops import WalkDeposits, csr_from_index, grf_walks

_CHUNK = 1 << 25  # numbers of one array of a chunk
_FLOOR = 1e-3  # of the map 'relu', which else leaves nodes without any weight

Walks = FeatureMap | WalkDeposits | SparseFeatures


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _relu(x: Tensor) -> Tensor:
    return F.relu(x) + _FLOOR


def _softmax(x: Tensor) -> Tensor:
    return F.softmax(x, dim=-1)


_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu": _elu, "relu": _relu, "softmax": _softmax}


class GRFLinearAttention(nn.Module):
    r"""Attention of all nodes to all nodes of their graph, under a mask learned from its topology, in linear time.

    The layer of "Linear Transformer Topological Masking with Graph Random Features"
    (https://arxiv.org/abs/2410.03462). With queries q, keys k and values v of a head, a feature map :math:`\phi`, and
    the mask :math:`M = \Psi_1 \Psi_2^\top` of sparse random features, whose mean is the kernel
    :math:`F(W)^2` of :class:`LearnableModulation` on the normalised adjacency :math:`W`,

    .. math::
        x'_i = W_o \, \frac{\sum_j M_{ij} \, \phi(q_i)^\top \phi(k_j) \, v_j}{\sum_j M_{ij} \, \phi(q_i)^\top \phi(k_j)}

    where neither M nor the attention is ever formed: numerator and denominator are
    :math:`\sum_r \phi(q)_r \odot \Psi_1 \Psi_2^\top (\phi(k)_r \odot [v, 1])`, a few columns r at a time. Nodes of
    other graphs, and of other components, are not seen; an isolated node sees itself.

    The paper leaves the sign of the denominator open. Here it is positive by three rules: f is positive
    (``positive=True`` or a closed form), edge weights are not negative, and feature maps are not either;
    ``normalize=False`` has no denominator and no rule. A negative denominator is an error; compiled layers do not
    look for one, and return zero there.

    Walks start from the nodes of each graph under their numbers in it, so that a graph's mask does not depend on its
    batch. They follow the edges from row 0 of ``edge_index`` to row 1: a node attends to those it reaches, and the
    second set goes the other way, which for undirected graphs is the same.

    Sampling walks takes about as long as a layer. Layers share walks drawn once by :meth:`sample` and passed as
    ``walks``; for one graph ``cached=True`` keeps them; for undirected graphs of a dataset
    :class:`geo.transforms.AddGRF` draws them once, without a series, and with another ``first_walk`` for the second
    set.

    Args:
        channels: Width of the nodes.
        heads: Number of heads, each of ``channels / heads``. (default: ``1``)
        feature_map: ``'elu'`` (elu + 1), ``'relu'`` (relu + 0.001), ``'softmax'`` over features, or a function on the
            last axis with no negative values. (default: ``'elu'``)
        modulation: A :class:`LearnableModulation`; its ``max_length`` cuts the walks. (default: free and positive, from
            ``heat(1.0)``, up to length 8)
        num_walks: Walks from each node in each set. (default: ``8``)
        p_halt: Probability of a walk to end before each step. (default: ``0.5``)
        coupling: As of :func:`geo.ops.grf_walks`. (default: ``'antithetic+repelling'``)
        proposal: As of :func:`geo.ops.grf_walks`. (default: ``'uniform'``)
        two_sets: Independent walks for :math:`\Psi_2`, so that M is unbiased. With one set it costs half, is symmetric,
            and has its mean beside the diagonal, which is biased up; on directed graphs its mean is
            :math:`F(W) F(W)^\top`. (default: ``True``)
        normalize: Divide by the denominator. (default: ``True``)
        fresh_walks: In training draw other walks in each call, from PyTorch's generator; else, and after ``eval()``,
            they are those of the seed, which :meth:`resample` changes. (default: ``False``)
        cached: Keep the walks of the first call, for one graph whose edges do not change. (default: ``False``)
        bias: Of the four linear maps. (default: ``True``)

    Shapes:
        x :math:`(|V|, C)`, edge_index :math:`(2, |E|)`, batch :math:`(|V|)` in any order, edge_weight :math:`(|E|)`;
        output :math:`(|V|, C)`.

    Symmetry and derivatives:
        Equivariant to node permutation with the walks given; the walks themselves depend on the numbering, in
        distribution they do not. Differentiable twice in x, all parameters, those of the modulation too, and
        ``edge_weight``. A graph's output does not depend on its batch.

    Raises:
        ValueError: An unknown option, inputs that do not fit, or a denominator that is negative.

    Example:
        >>> import torch
        >>> attention = GRFLinearAttention(8, heads=2)
        >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> x = torch.randn(4, 8)  # node 3 is alone
        >>> out = attention(x, path)
        >>> out.shape, torch.allclose(out[3], attention.lin_out(attention.lin_v(x[3])), atol=1e-6)
        (torch.Size([4, 8]), True)
    """

    seed: Tensor

    def __init__(
        self,
        channels: int,
        heads: int = 1,
        feature_map: str | Callable[[Tensor], Tensor] = "elu",
        modulation: LearnableModulation | None = None,
        num_walks: int = 8,
        *,
        p_halt: float = 0.5,
        coupling: str = "antithetic+repelling",
        proposal: str = "uniform",
        two_sets: bool = True,
        normalize: bool = True,
        fresh_walks: bool = False,
        cached: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads), ("num_walks", num_walks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least 1")
        if channels % heads:
            raise ValueError(f"heads is {heads}, but must divide channels, which is {channels}")
        if not callable(feature_map) and feature_map not in _MAPS:
            raise ValueError(f"feature_map is {feature_map!r}, but must be 'elu', 'relu', 'softmax' or a function")
        if fresh_walks and cached:
            raise ValueError("fresh_walks and cached are both True, but walks are either drawn in each call or kept")
        modulation = LearnableModulation(8, init=heat(1.0), positive=True) if modulation is None else modulation
        if normalize and not modulation.positive:
            raise ValueError(
                "modulation may be negative, and so may the denominator: build it with positive=True, take a closed "
                "form, or set normalize=False"
            )
        self.channels, self.heads, self.num_walks, self.p_halt = channels, heads, num_walks, float(p_halt)
        self.feature_map, self.coupling, self.proposal = feature_map, coupling, proposal
        self.two_sets, self.normalize = bool(two_sets), bool(normalize)
        self.fresh_walks, self.cached = bool(fresh_walks), bool(cached)
        self._map = feature_map if callable(feature_map) else _MAPS[feature_map]
        self.modulation = modulation
        self.lin_q = nn.Linear(channels, channels, bias)
        self.lin_k = nn.Linear(channels, channels, bias)
        self.lin_v = nn.Linear(channels, channels, bias)
        self.lin_out = nn.Linear(channels, channels, bias)
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self._kept: tuple[torch.dtype, torch.device, tuple[FeatureMap, FeatureMap]] | None = None
        self.resample()
        # refuses what the walks would refuse
        grf_walks(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), **self._law(0))

    def reset_parameters(self) -> None:
        """Draws the weights and the seed anew; the modulation goes back to its start."""
        for module in (self.lin_q, self.lin_k, self.lin_v, self.lin_out, self.modulation):
            module.reset_parameters()
        self.resample()

    def resample(self, generator: torch.Generator | None = None) -> None:
        """Draw a new seed of the walks, and forget those kept."""
        self.seed.fill_(_draw_seed(generator))
        self._kept = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._kept = None  # walks of another seed

    def _law(self, seed: int) -> dict[str, Any]:
        return {
            "num_walks": self.num_walks,
            "seed": seed,
            "p_halt": self.p_halt,
            "coupling": self.coupling,
            "proposal": self.proposal,
            "max_length": self.modulation.max_length,
        }

    @torch.compiler.disable  # sizes are data
    def sample(
        self,
        edge_index: Tensor,
        num_nodes: int,
        batch: Tensor | None = None,
        edge_weight: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[FeatureMap, FeatureMap]:
        """Walks of one or more graphs, for the argument ``walks`` of this layer and of others like it.

        Given those, the layer compiles as one graph. Other layers need a modulation of the same ``max_length``,
        whatever its values.

        Args:
            edge_index: The edges.
            num_nodes: Number of nodes.
            batch: The graph of each node. (default: one graph)
            edge_weight: Not negative. (default: ones)
            dtype: Of the loads.

        Raises:
            ValueError: Weights that are negative or do not fit.
        """
        if self.normalize and edge_weight is not None and bool((edge_weight < 0).any()):
            raise ValueError(
                f"edge_weight has {float(edge_weight.detach().min()):.6g}, but must not be negative, as then the "
                "denominator may be; set normalize=False"
            )
        seed = _draw_seed(None) if self.fresh_walks and self.training else int(self.seed)
        law = {**self._law(seed), "node_key": None if batch is None else _place(batch)}
        rowptr, col, weight = normalized_adjacency(edge_index, edge_weight, num_nodes, dtype=dtype)
        lengths = self.modulation.max_length + 1
        first = FeatureMap(grf_walks(rowptr, col, weight, **law), num_nodes, lengths)
        if not self.two_sets:
            return first, first
        ptr, perm = csr_from_index(col, num_nodes)
        row = torch.repeat_interleave(torch.arange(num_nodes, device=col.device), rowptr.diff())
        deposits = grf_walks(ptr, row[perm], weight[perm], first_walk=self.num_walks, **law)
        return first, FeatureMap(deposits, num_nodes, lengths)

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        batch: Tensor | None = None,
        edge_weight: Tensor | None = None,
        *,
        walks: tuple[Walks, Walks] | None = None,
    ) -> Tensor:
        """Runs the layer.

        Args:
            x: States of the nodes.
            edge_index: The edges; not read where walks are given.
            batch: The graph of each node. (default: one graph)
            edge_weight: Not negative. (default: ones)
            walks: Both sets: what :meth:`sample` returned, deposits of :func:`geo.ops.grf_walks` on the normalised
                adjacency and its transpose, or features, to which the modulation has no access.
        """
        if x.dim() != 2 or x.size(1) != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be (|V|, {self.channels})")
        if batch is not None and batch.shape != x.shape[:1]:
            raise ValueError(f"batch has shape {tuple(batch.shape)}, but must be ({x.size(0)},)")
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        psi1, psi2 = self._features(x, edge_index, batch, edge_weight, walks, dtype)
        q, k, v = (
            lin(x).to(dtype).view(x.size(0), self.heads, self.channels // self.heads)
            for lin in (self.lin_q, self.lin_k, self.lin_v)
        )
        with torch.autocast(x.device.type, enabled=False):
            out = masked_linear_attention(self._map(q), self._map(k), v, psi1, psi2, self.normalize)
        attended: Tensor = self.lin_out(out.flatten(1).to(x.dtype))
        return attended

    def _features(
        self,
        x: Tensor,
        edge_index: Tensor,
        batch: Tensor | None,
        edge_weight: Tensor | None,
        walks: tuple[Walks, Walks] | None,
        dtype: torch.dtype,
    ) -> tuple[SparseFeatures, SparseFeatures]:
        num_nodes = x.size(0)
        if walks is not None and (isinstance(walks, WalkDeposits) or len(walks) != 2):
            raise ValueError("walks must be both sets of walks: give (walks, walks) where one set serves as both")
        if walks is None:
            if self.cached and edge_weight is not None and edge_weight.requires_grad:
                raise ValueError(
                    "edge_weight requires grad, but cached=True keeps walks of fixed weights: set it False"
                )
            if self._kept is not None and self._kept[:2] == (dtype, x.device):
                walks = self._kept[2]
            else:
                drawn = self.sample(edge_index, num_nodes, batch, edge_weight, dtype)
                self._kept = (dtype, x.device, drawn) if self.cached else None
                walks = drawn
        f = self.modulation()
        maps = [
            FeatureMap(item, num_nodes, f.size(0)) if isinstance(item, WalkDeposits) else item
            for item in (walks if walks[1] is not walks[0] else walks[:1])
        ]
        for item in maps:
            if isinstance(item, FeatureMap) and item.num_lengths != f.size(0):
                raise ValueError(
                    f"walks are kept up to length {item.num_lengths - 1}, but the modulation has max_length "
                    f"{f.size(0) - 1}: give deposits in their place, or sample by a layer with this max_length"
                )
        psi = [item(f) if isinstance(item, FeatureMap) else item for item in maps]
        for features in psi:
            if features.shape != (num_nodes, num_nodes):
                raise ValueError(
                    f"walks are those of {features.num_rows} nodes, but x has {num_nodes}; cached=True is for one graph"
                )
        return psi[0], psi[-1]

    def extra_repr(self) -> str:
        """Sizes and options."""
        name = (
            self.feature_map
            if isinstance(self.feature_map, str)
            else getattr(self.feature_map, "__name__", type(self.feature_map).__name__)
        )
        return (
            f"{self.channels}, heads={self.heads}, feature_map={name!r}, num_walks={self.num_walks}, "
            f"p_halt={self.p_halt}, coupling={self.coupling!r}, proposal={self.proposal!r}, "
            f"two_sets={self.two_sets}, normalize={self.normalize}, fresh_walks={self.fresh_walks}, "
            f"cached={self.cached}"
        )


def masked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    psi1: SparseFeatures,
    psi2: SparseFeatures,
    normalize: bool = True,
    chunk: int = _CHUNK,
) -> Tensor:
    r"""The attention :math:`(q k^\top \odot \Psi_1 \Psi_2^\top) \, v`, in time linear in the entries of the features.

    Args:
        q: [N, H, R], features of the queries.
        k: [N, H, R], features of the keys.
        v: [N, H, D].
        psi1: N rows.
        psi2: N rows and as many columns as ``psi1``.
        normalize: Divide by the same with ones for v; where that underflows the result is zero.
        chunk: Numbers in one of the few arrays held at a time. Where one chunk is not enough, the backward pass
            computes each anew.

    Returns:
        [N, H, D].

    Raises:
        ValueError: A denominator is negative (not looked for while compiling).
    """
    num_nodes, heads, width = q.shape
    values = torch.cat((v, v.new_ones(num_nodes, heads, 1)), -1) if normalize else v
    columns = max(1, chunk // max(1, num_nodes * values.size(-1)))
    per_head = max(1, min(width, columns))
    heads_at_once = max(1, columns // per_head) if per_head == width else 1

    def part(q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        there = psi2.t_matmul((k.unsqueeze(-1) * values.unsqueeze(-2)).flatten(1))
        back = psi1.matmul(there).view(num_nodes, *k.shape[1:], values.size(-1))
        return (q.unsqueeze(-2) @ back).squeeze(-2)

    blocks = []
    keeps = columns >= heads * width or not torch.is_grad_enabled()
    for h in range(0, heads, heads_at_once):
        there = slice(h, h + heads_at_once)
        total: Tensor | None = None
        for r in range(0, width, per_head):
            args = (q[:, there, r : r + per_head], k[:, there, r : r + per_head], values[:, there])
            added = part(*args) if keeps else checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
            total = added if total is None else total + added
        blocks.append(cast("Tensor", total))
    out = torch.cat(blocks, 1)
    if not normalize:
        return out
    numerator, denominator = out[..., :-1], out[..., -1:]
    if not torch.compiler.is_compiling() and bool((denominator < 0).any()):
        raise ValueError(
            f"the denominator has {float(denominator.detach().min()):.6g}, but must not be negative: feature_map, the "
            "values of walks and edge weights must not be, or set normalize=False"
        )
    lost = denominator < torch.finfo(out.dtype).tiny  # NaN stays
    return torch.where(lost, 0, numerator) / torch.where(lost, 1, denominator)


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _place(batch: Tensor) -> Tensor:
    """The number of each node in its own graph."""
    ptr, perm = csr_from_index(batch, int(batch.max()) + 1 if batch.numel() else 0, "batch")
    rank = torch.arange(batch.numel(), device=batch.device) - ptr[batch[perm]]
    return torch.empty_like(rank).scatter_(0, perm, rank)
