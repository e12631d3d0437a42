"""Orders of the nodes of each graph, by importance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geo.ops import SegmentPlan, bounds, gather_coo, gather_mul_segment_sum, scatter, segment_csr
from geo.ops.random_walk import philox

_ROUNDS = 3  # of colour refinement
_KIND = 16  # of the random numbers of ties: the walks' are below
_REACH = 1024  # walks of a node that are followed for its return probabilities: 2 steps both ways at 22 neighbours
_WALKS = 2**20  # held at once, or four times the number of edges

Key = str | Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


class NodeOrder(nn.Module):
    r"""Order of the nodes of each graph for sequence models: ascending importance, so that hubs come last.

    The order of Graph Mamba (https://arxiv.org/abs/2402.08678), where a node reads those that come before it,

    .. math::
        \text{perm} = \mathrm{lexsort}(\text{graph}, \text{key}, \text{tie})

    with one of these keys:

    * ``'degree'``: number of edges (or sum of weights) that end in the node;
    * ``'pagerank'``: PageRank with :math:`\alpha = 0.85`, links followed from source to target (the paper's "PPR" names
      no set to teleport to), to an absolute error of 1e-10;
    * ``'kcore'``: the largest k such that the node is in a subgraph where all have k neighbours; directions, parallel
      edges, loops and weights do not count;
    * ``'index'``: as the nodes stand.

    The paper leaves ties open, and they are most of the order: nearly all nodes share their degree with another.
    Here they are broken

    * ``'random'``: at random, anew in each call;
    * ``'wl'``: by the colours of three rounds of Weisfeiler-Leman refinement (from the features `x`, where given), then
      by the sum of the return probabilities of walks, then, in training, at random and, after ``eval()``, as the nodes
      stand. Nodes that refinement cannot tell apart also stay tied where more than 1024 walks of half the length (2
      steps) lead on from them or up to them, that is, next to a hub or beyond about 22 neighbours: to count returns
      would there take time and memory quadratic in the neighbours of the hub. Elsewhere hardly any but those that an
      automorphism swaps stay tied, so that the sampled order is nearly always the same for all numberings;
    * ``'index'``: as the nodes stand, which depends on their numbering.

    Keep the order of a fixed graph where it costs much: for 10,000 nodes with 8 neighbours on one core ``'pagerank'``
    takes 0.1 s, ``'wl'`` 0.05 s more than other ties, ``'kcore'`` 0.03 s, the rest 4 ms. All but ``'kcore'`` grow
    linearly; ``'wl'`` takes 2 to 6 microseconds for a node up to 8 neighbours, and 30 in stars of 500, its worst.

    Where ``geo.ops.check_bounds(False)`` leaves checks out on CUDA, or a graph is captured, the keys ``'degree'`` and
    ``'index'`` with a given `batch_size` read nothing on the host, nor does ``'wl'`` without `rwse_steps`.

    Args:
        key: One of the names above, or a function called as ``key(edge_index, batch, num_nodes, edge_weight)`` that
            returns a number for each node. (default: ``'degree'``)
        descending: Most important first. (default: ``False``)
        tie: One of the names above. (default: ``'random'``)
        num_samples: Orders to draw, which differ in the random ties. (default: ``1``)
        rwse_steps: Longest walk whose return probabilities break ties of ``'wl'``; 0 for none. (default: ``4``)

    Shapes:
        edge_index :math:`(2, |E|)`, batch :math:`(|V|)` sorted; output: perm :math:`(|V|)`, the nodes in order, with
        several samples :math:`(S, |V|)`, and ptr :math:`(B + 1)`: graph b is ``perm[..., ptr[b]:ptr[b + 1]]``.

    Symmetry and derivatives:
        Equivariant to node permutation where nothing is tied, in distribution where ties are random. A graph's order
        does not depend on its batch, also at random: the random numbers belong to the place of a node in its graph and
        the seed. Not differentiable.

    Raises:
        ValueError: An unknown option, a batch that is not sorted, a key with NaN or of another size, negative weights.
        IndexError: An edge to a node that is not there.

    Example:
        >>> import torch
        >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> NodeOrder("degree", tie="index")(path, num_nodes=3)
        (tensor([0, 2, 1]), tensor([0, 3]))
    """

    def __init__(
        self,
        key: Key = "degree",
        descending: bool = False,
        tie: str = "random",
        num_samples: int = 1,
        *,
        rwse_steps: int = 4,
    ) -> None:
        super().__init__()
        if not callable(key) and key not in ("degree", "pagerank", "kcore", "index"):
            raise ValueError(f"key is {key!r}, but must be 'degree', 'pagerank', 'kcore', 'index' or a function")
        if tie not in ("random", "wl", "index"):
            raise ValueError(f"tie is {tie!r}, but must be 'random', 'wl' or 'index'")
        for name, value, least in (("num_samples", num_samples, 1), ("rwse_steps", rwse_steps, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but must be an integer of at least {least}")
        self.key, self.descending, self.tie = key, bool(descending), tie
        self.num_samples, self.rwse_steps = num_samples, rwse_steps

    def reset_parameters(self) -> None:
        """There are none."""

    @torch.no_grad()
    def forward(
        self,
        edge_index: Tensor,
        batch: Tensor | None = None,
        num_nodes: int | None = None,
        edge_weight: Tensor | None = None,
        *,
        x: Tensor | None = None,
        score: Tensor | None = None,
        batch_size: int | None = None,
        num_samples: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Orders the nodes of each graph; returns (perm, ptr).

        Args:
            edge_index: Senders and receivers.
            batch: The graph of each node, sorted. (default: one graph)
            num_nodes: Number of nodes. (default: that of batch, score or x, else the largest in edge_index and one)
            edge_weight: Weights of the edges for ``'degree'``, ``'pagerank'`` and return probabilities. (default: 1)
            x: Features that tell nodes apart in ``'wl'``; equal means equal in every bit.
            score: Importance of each node, in place of `key`.
            batch_size: Number of graphs; needed where the last ones are empty. (default: ``batch[-1] + 1``)
            num_samples: In place of the layer's.
            generator: Draws the seed of random ties. (default: torch's of the device)
            seed: The seed itself; the same one gives the same order.
        """
        num_nodes, batch, ptr = _graphs(edge_index, batch, num_nodes, batch_size, (score, x))
        eager = not torch.compiler.is_compiling()
        for row in range(2 * eager):
            bounds.check_index("NodeOrder", f"edge_index[{row}]", edge_index[row], num_nodes)
        for name, tensor in (("edge_weight", edge_weight), ("x", x), ("score", score)):
            size = edge_index.size(1) if name == "edge_weight" else num_nodes
            if tensor is not None and (tensor.size(0) != size or (name != "x" and tensor.dim() != 1)):
                shape = f"({size}, ...)" if name == "x" else f"({size},)"
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but must be {shape}")
        num_samples = self.num_samples if num_samples is None else num_samples
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, but must be at least 1")
        if score is None:
            score = self._importance(edge_index, batch, ptr, edge_weight)
            if not callable(self.key) and score.is_floating_point():
                score = score.float()  # nodes that are alike differ by rounding, and must be tied
        reads = eager and bounds.reads_values(batch)
        if reads and score.is_floating_point() and bool(score.isnan().any()):
            raise ValueError(f"score is NaN for node {int(score.isnan().nonzero()[0])}, but must be a number")
        place = torch.arange(num_nodes, device=batch.device) - gather_coo(ptr, batch)
        group = _split(batch, score, self.descending)
        if self.tie == "wl":
            group = _split(group, _colours(edge_index, num_nodes, x))
            if self.rwse_steps:
                tied = scatter(torch.ones_like(group), group, dim_size=num_nodes + 1)[group] > 1
                returns = _return_probabilities(edge_index, num_nodes, edge_weight, tied, self.rwse_steps)
                group = _split(group, returns.float())
        if self.tie == "random" or (self.tie == "wl" and self.training):
            if seed is None:
                device = batch.device if generator is None else generator.device
                drawn: Any = torch.randint(2**63 - 1, (), generator=generator, device=device)
                if device != batch.device:
                    drawn = int(drawn)
            else:
                drawn = seed
            sample = torch.arange(num_samples, device=batch.device).unsqueeze(-1)
            zero = torch.zeros_like(place)
            tie = philox(drawn, place, sample, zero, zero + _KIND)[0]
        else:
            tie = place.expand(num_samples, num_nodes)
        perm = (group << 32 | tie).sort(dim=-1, stable=True).indices
        return (perm if num_samples > 1 else perm[0]), ptr

    def _importance(self, edge_index: Tensor, batch: Tensor, ptr: Tensor, edge_weight: Tensor | None) -> Tensor:
        num_nodes = batch.size(0)
        if callable(self.key):
            score: Tensor = self.key(edge_index, batch, num_nodes, edge_weight)
            if score.shape != (num_nodes,):
                raise ValueError(f"key returned a tensor of shape {tuple(score.shape)}, but must be ({num_nodes},)")
            return score
        if self.key == "pagerank":
            rank: Tensor = _pagerank(edge_index, batch, ptr, edge_weight)
            return rank
        if self.key == "kcore":
            core: Tensor = _core_number(edge_index, num_nodes)
            return core
        if self.key == "degree":
            return _degree(edge_index[1], num_nodes, edge_weight)
        return torch.arange(num_nodes, device=batch.device)

    def extra_repr(self) -> str:
        """Options."""
        key = self.key if isinstance(self.key, str) else getattr(self.key, "__name__", type(self.key).__name__)
        return f"{key!r}, descending={self.descending}, tie={self.tie!r}, num_samples={self.num_samples}"


def _graphs(
    edge_index: Tensor,
    batch: Tensor | None,
    num_nodes: int | None,
    batch_size: int | None,
    of_nodes: tuple[Tensor | None, ...],
) -> tuple[int, Tensor, Tensor]:
    """(number of nodes, batch, ptr) from what was given."""
    if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.dtype != torch.int64:
        raise ValueError(f"edge_index is {edge_index.dtype} {tuple(edge_index.shape)}, but must be int64 (2, |E|)")
    if num_nodes is None:
        sizes = [tensor.size(0) for tensor in (batch, *of_nodes) if tensor is not None]
        num_nodes = sizes[0] if sizes else int(edge_index.max()) + 1 if edge_index.numel() else 0
    if batch is None:
        batch = edge_index.new_zeros(num_nodes)
        batch_size = 1 if batch_size is None else batch_size
    if batch.shape != (num_nodes,) or batch.dtype != torch.int64:
        raise ValueError(f"batch is {batch.dtype} {tuple(batch.shape)}, but must be int64 ({num_nodes},)")
    if not torch.compiler.is_compiling() and num_nodes and bounds.reads_values(batch):
        if bool((batch[1:] < batch[:-1]).any()):
            raise ValueError("batch is not sorted, but the nodes of each graph must stand together, graph after graph")
        last = int(batch[-1])
        if int(batch[0]) < 0 or (batch_size is not None and last >= batch_size):
            raise ValueError(f"batch has graphs {int(batch[0])} to {last}, but batch_size is {batch_size}")
    if batch_size is None:
        batch_size = int(batch[-1]) + 1 if num_nodes else 0
    return num_nodes, batch, torch.searchsorted(batch, torch.arange(batch_size + 1, device=batch.device))


def _split(group: Tensor, key: Tensor, descending: bool = False) -> Tensor:
    """Numbers of the groups, rising with (group, key), of nodes with the same group and key."""
    order = key.sort(stable=True, descending=descending).indices
    order = order[group[order].sort(stable=True).indices]
    first = torch.zeros_like(order, dtype=torch.bool)
    for value in (group[order], key[order]):
        first |= value != value.roll(1)  # the very first wraps round to the last, which does no harm
    return torch.empty_like(order).scatter_(0, order, first.cumsum(0))


def _degree(index: Tensor, num_nodes: int, edge_weight: Tensor | None) -> Tensor:
    weight = torch.ones_like(index) if edge_weight is None else edge_weight.double()
    return scatter(weight, index, dim_size=num_nodes)


def _transition(edge_index: Tensor, num_nodes: int, edge_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The probability of each edge among those of its source, and whether a source has any."""
    if edge_weight is None:
        edge_weight = torch.ones(edge_index.size(1), device=edge_index.device)
    elif not torch.compiler.is_compiling() and bounds.reads_values(edge_weight) and bool((edge_weight < 0).any()):
        raise ValueError(f"edge_weight has {float(edge_weight.min())}, but must not be negative")
    weight = edge_weight.double()
    total = scatter(weight, edge_index[0], dim_size=num_nodes)
    return weight / gather_coo(total, edge_index[0]).clamp(min=torch.finfo(torch.float64).tiny), total > 0


@torch.compiler.disable  # a loop, which would be unrolled
def _pagerank(
    edge_index: Tensor, batch: Tensor, ptr: Tensor, edge_weight: Tensor | None, alpha: float = 0.85
) -> Tensor:
    """PageRank, in float64; a node without edges to follow goes anywhere in its graph.

    As many rounds as always suffice: stopping on convergence would let the slowest graph of a batch decide for all.
    """
    num_nodes = batch.size(0)
    probability, goes_on = _transition(edge_index, num_nodes, edge_weight)
    plan = SegmentPlan.from_edge_index(edge_index, num_nodes)
    uniform = 1 / gather_coo(ptr.diff(), batch).double()
    rank = uniform
    for _ in range(math.ceil(math.log(0.5e-10) / math.log(alpha))):  # the error is at most 2 alpha^rounds
        flow = gather_mul_segment_sum(rank.unsqueeze(-1), probability.unsqueeze(-1), plan=plan).squeeze(-1)
        stuck = gather_coo(segment_csr(torch.where(goes_on, 0.0, rank), ptr), batch)
        rank = alpha * (flow + stuck * uniform) + (1 - alpha) * uniform
    return rank


@torch.compiler.disable  # as many rounds as the values say
def _core_number(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Core numbers of the simple undirected graph: nodes of least degree are peeled off, all at once."""
    both = torch.cat((edge_index, edge_index.flip(0)), 1)
    both = both[:, (both[0] != both[1]) & _inside(both, num_nodes)]
    pair = torch.unique(both[0] * num_nodes + both[1])
    source, target = pair // max(1, num_nodes), pair % max(1, num_nodes)
    ptr = torch.searchsorted(source, torch.arange(num_nodes + 1, device=pair.device))
    degree = ptr.diff()
    core = torch.full_like(degree, -1)
    k = 0
    while bool((left := core < 0).any()):
        k = max(k, int(degree[left].min()))
        peeled = (left & (degree <= k)).nonzero().flatten()
        while peeled.numel():
            core[peeled] = k
            neighbour, lost = target[_spread(ptr, peeled)[1]].unique(return_counts=True)
            degree[neighbour] -= lost
            peeled = neighbour[(core[neighbour] < 0) & (degree[neighbour] <= k)]
    return core


def _hash(a: Tensor, b: Tensor) -> Tensor:
    """62 bits of two int64."""
    words = philox(0, a, a >> 32, b, b >> 32)
    return words[0] << 30 | words[1] >> 2


def _colours(edge_index: Tensor, num_nodes: int, x: Tensor | None) -> Tensor:
    """Colours of Weisfeiler-Leman refinement as hashes; of sums, so the order of the edges does not matter."""
    short = 22  # sums of 40 bits have room for 2^23 neighbours
    colour = edge_index.new_zeros(num_nodes)
    if x is not None:
        bits = (x.detach().reshape(num_nodes, math.prod(x.shape[1:])).double() + 0.0).view(torch.int64)  # + 0: -0 is 0
        column = torch.arange(bits.size(1), device=bits.device).expand_as(bits)
        colour = (_hash(bits, column) >> short).sum(-1)
    source, target = edge_index
    for _ in range(_ROUNDS):
        sent = _hash(colour, torch.full_like(colour, -1)) >> short
        received = scatter(gather_coo(sent, source), target, dim_size=num_nodes)
        answered = scatter(gather_coo(sent, target), source, dim_size=num_nodes)
        colour = _hash(_hash(colour, received), answered)
    return colour


@torch.compiler.disable  # sparse matrices cannot be traced
def _return_probabilities(
    edge_index: Tensor, num_nodes: int, edge_weight: Tensor | None, wanted: Tensor, steps: int
) -> Tensor:
    """Sum over walk lengths 1 to `steps` of the probability to be back, [num_nodes], in float64; 0 where not counted.

    A walk of a + b steps is back where one of a steps forward meets one of b steps backward, so that half the length
    is followed. Only nodes that are wanted and have no more than _REACH such walks are counted.
    """
    probability, _ = _transition(edge_index, num_nodes, edge_weight)
    inside = _inside(edge_index, num_nodes)
    edges, probability = edge_index[:, inside], probability[inside]
    reach = edge_index.new_zeros(num_nodes)
    ways = []
    for way, length in ((edges, (steps + 1) // 2), (edges.flip(0), steps // 2)):
        count = torch.zeros_like(reach)
        for _ in range(length):
            count = scatter(gather_coo(count + 1, way[1]), way[0], dim_size=num_nodes).clamp(max=_REACH + 1)
        reach += count
        ways.append((_sparse(way, probability, (num_nodes, num_nodes)), length))
    nodes = (wanted & (reach <= _REACH)).nonzero().flatten()
    portion = reach[nodes].cumsum(0) // max(_WALKS, 4 * edges.size(1))  # each costs a pass over the edges
    back = probability.new_zeros(num_nodes)
    for start in nodes.split(portion.unique_consecutive(return_counts=True)[1].tolist()):
        here = torch.stack((torch.arange(start.size(0), device=start.device), start))
        at = _sparse(here, probability.new_ones(start.size(0)), (start.size(0), num_nodes))
        forward, backward = ([at], [at])
        with warnings.catch_warnings():  # of a product of COO tensors, which PyTorch forms by way of CSR
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            for rows, (move, length) in zip((forward, backward), ways, strict=True):
                for _ in range(length):
                    rows.append(torch.sparse.mm(rows[-1], move).coalesce())
        for step in range(1, steps + 1):
            met = (forward[(step + 1) // 2] * backward[step // 2]).coalesce()
            back[start] += scatter(met.values(), met.indices()[0], dim_size=start.size(0))
    return back


def _inside(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Which edges join nodes that are there: without checks others were not refused, and are left out."""
    return ((edge_index >= 0) & (edge_index < num_nodes)).all(0)


def _sparse(index: Tensor, value: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(index, value, size, check_invariants=False).coalesce()


def _spread(ptr: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """All entries of some nodes of a CSR graph: (which of the nodes, position of the entry)."""
    count = ptr[nodes + 1] - ptr[nodes]
    which = torch.repeat_interleave(torch.arange(nodes.size(0), device=nodes.device), count)
    return which, torch.arange(which.size(0), device=nodes.device) + (ptr[nodes] - count.cumsum(0) + count)[which]
