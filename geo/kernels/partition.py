"""Graph random features of a graph whose nodes are spread over processes: walks travel, the graph stays where it is."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from geo.kernels.features import SparseFeatures
from geo.kernels.ragged import Ragged, ptr_of
from geo.ops import WalkDeposits, bounds
from geo.ops.grf_walks import gains, over_probability, sum_loads
from geo.ops.plan import index_from_csr
from geo.ops.walk_step import LONGEST, WalkLaw, checked_law, walk_step


class Traffic(NamedTuple):
    """What one part sent to others in so many supersteps: walkers, deposits for starts elsewhere, bytes together."""

    supersteps: int
    walkers: int
    deposits: int
    bytes: int


def sample_partitioned(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    *,
    num_walks: int,
    seed: int,
    p_halt: float = 0.5,
    survival: Sequence[float] | Tensor | None = None,
    coupling: str = "antithetic",
    owner: Tensor | None = None,
    node_key: Tensor | None = None,
    first_walk: int = 0,
    max_length: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[WalkDeposits, Traffic]:
    r"""Walks of :func:`geo.ops.grf_walks` on a graph of which each process holds some rows.

    All processes call this together. In supersteps each advances the walkers that are at its nodes by one step and
    hands those that leave to the owners of their new nodes; in the end the deposits go to the owners of the starts. As
    each step is a pure function of the seed, the start, the walk, the step and the neighbours' keys (rendezvous
    choice), and deposits are summed in the order of walks, the rows equal those of one process bit for bit, however the
    nodes are spread. Not differentiable. Tensors on the CPU need a group of backend gloo, on GPUs nccl.

    In a script for ``torchrun --nproc-per-node=4 script.py``::

        torch.distributed.init_process_group("gloo")
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first, last = num_nodes * rank // size, num_nodes * (rank + 1) // size
        rows = rowptr[first : last + 1]  # of the whole matrix U, of which a process may read its part alone
        edges = slice(int(rows[0]), int(rows[-1]))
        deposits, traffic = sample_partitioned(rows - rows[0], col[edges], weight[edges], num_walks=16, seed=0)
        phi = features_of(deposits, series.modulation(20), num_nodes)  # the rows of this process's nodes

    Args:
        rowptr: int64 [n + 1], the first entry of each row of U that this process holds.
        col: int64 [E], the column of each entry, counted over the whole graph.
        weight: [E], the entries, already normalised: that takes the degrees of both ends.
        num_walks: m, walks from each node.
        seed: An integer, the same for all processes, like all that follows.
        p_halt: As in :func:`geo.ops.grf_walks`, like ``survival``, ``first_walk`` and ``max_length``.
        survival: See there.
        coupling: ``'iid'`` or ``'antithetic'``.
        owner: int64 [N], the process that holds each node; the rows are then those of its nodes in ascending order.
            By default process 0 holds the first n nodes, process 1 the next, and so on.
        node_key: int64 [N], by which the random numbers know each node (default: its number).
        first_walk: See there.
        max_length: See there.
        group: The processes that take part (default: all).

    Returns:
        The deposits of this process's rows, their columns counted over the whole graph, and what it sent.

    Raises:
        IndexError: An entry of ``rowptr`` or ``col`` is out of range.
        ValueError: A wrong shape, dtype, probability or coupling, a repeated entry, no process group, or arguments that
            differ between processes.
        RuntimeError: Another process refused its rows.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: just "gloo"
        >>> rowptr, col, weight = torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.tensor([0.5, 0.5])
        >>> deposits, traffic = sample_partitioned(rowptr, col, weight, num_walks=4, seed=0, max_length=1)
        >>> deposits.ptr.tolist(), traffic.bytes
        ([0, 2, 4], 0)
        >>> dist.destroy_process_group()
    """
    if not dist.is_initialized():
        raise ValueError("group: expected a process group, got none: call torch.distributed.init_process_group first")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    refused: ValueError | None = None
    try:
        law = checked_law(num_walks, seed, p_halt, survival, coupling, "rendezvous", first_walk, max_length)
        shared = (law, max_length, weight.dtype, *(_fingerprint(numbers) for numbers in (owner, node_key)))
        setting = zlib.crc32(repr(shared).encode())
    except ValueError as error:
        refused, setting = error, -1  # raised when the others know: they wait for this process
    mine = torch.tensor([rowptr.size(0) - 1, setting], device=rowptr.device)
    counts, settings = _gather(mine, size, group).unbind(1)
    if refused is not None:
        raise refused
    if bool((settings != settings[0]).any()):
        other = int((settings != settings[0]).nonzero()[0])
        raise ValueError(
            "seed, num_walks, p_halt, survival, coupling, first_walk, max_length, dtype of weight, owner and "
            f"node_key: expected the same on all processes, but process {other} differs from process 0"
        )
    place = _Placement(owner, ptr_of(counts))
    part = _walks_of(rank, place, (rowptr, col, weight), node_key, law, max_length)
    inbox: tuple[Tensor, int] | None = None
    while True:
        try:
            letters, target = part.send(inbox)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            result: tuple[WalkDeposits, Traffic] = end.value
            return result
        except (IndexError, MemoryError, RuntimeError, ValueError):
            _gather(counts.new_full((size,), -1), size, group)  # the others are waiting for a number of letters
            raise
        inbox = _exchange(letters, target, rank, size, group)


class PartitionedSampler:
    r"""What :func:`sample_partitioned` does, for all parts in one process: to try a partition and count its messages.

    Args:
        parts: How many blocks of nodes of about one size; or int64 [N], the part of each node.

    Attributes:
        traffic: What each part sent in the last call of :meth:`sample`.

    Example:
        >>> from geo.kernels import normalized_adjacency
        >>> from geo.ops import grf_walks
        >>> ring = torch.stack([torch.arange(8), (torch.arange(8) + 1) % 8])
        >>> graph = normalized_adjacency(torch.cat([ring, ring.flip(0)], dim=1))
        >>> sampler = PartitionedSampler(2)
        >>> found = sampler.sample(*graph, num_walks=4, seed=0)
        >>> whole = grf_walks(*graph, num_walks=4, seed=0, coupling="antithetic", choice="rendezvous")
        >>> all(torch.equal(*pair) for pair in zip(found, whole)), len(sampler.traffic)
        (True, 2)
    """

    def __init__(self, parts: int | Tensor) -> None:
        if isinstance(parts, int) and parts < 1:
            raise ValueError(f"parts: expected at least 1, got {parts}")
        self.parts = parts
        self.traffic: list[Traffic] = []

    def sample(
        self,
        rowptr: Tensor,
        col: Tensor,
        weight: Tensor,
        *,
        node_key: Tensor | None = None,
        max_length: int | None = None,
        **law: Any,
    ) -> WalkDeposits:
        """The deposits of all nodes.

        Args:
            rowptr: int64 [N + 1], the first entry of each row of the whole matrix U.
            col: int64 [E], the column of each entry.
            weight: [E], the entries.
            node_key: As in :func:`sample_partitioned`.
            max_length: See there.
            law: ``num_walks``, ``seed``, ``p_halt``, ``survival``, ``coupling`` and ``first_walk``: see there.

        Returns:
            Those of :func:`geo.ops.grf_walks` with ``choice='rendezvous'``.

        Raises:
            IndexError: An entry of ``rowptr`` or ``col`` is out of range.
            ValueError: A wrong shape, dtype, probability or coupling, or a repeated entry.
        """
        law = {"coupling": "antithetic", **law}
        checked = checked_law(choice="rendezvous", max_length=max_length, **law)
        num_nodes = rowptr.size(0) - 1
        bounds.check_ptr("PartitionedSampler", rowptr, col.size(0))
        if isinstance(self.parts, int):
            size, owner = self.parts, None
            first = torch.arange(size + 1, device=rowptr.device) * num_nodes // size
        else:
            owner = self.parts
            if owner.dtype != torch.int64 or owner.shape != (num_nodes,) or bool((owner < 0).any()):
                raise ValueError(f"parts: expected int64 [{num_nodes}], numbers from 0 on, got {owner}")
            size = int(owner.max()) + 1 if len(owner) else 1
            first = torch.tensor([0, num_nodes], device=rowptr.device)
        place = _Placement(owner, first)
        whole = SparseFeatures(rowptr, col, weight, num_nodes)
        nodes = [place.nodes_of(rank) for rank in range(size)]
        rows = [whole.select_rows(own) for own in nodes]
        graphs = [(own.ptr, own.col, own.value) for own in rows]
        parts = [_walks_of(rank, place, graph, node_key, checked, max_length) for rank, graph in enumerate(graphs)]
        found, traffic = zip(*_in_lockstep(parts), strict=True)
        self.traffic = list(traffic)
        ptr = ptr_of(torch.cat([deposits.ptr.diff() for deposits in found]))
        columns = [torch.cat([deposits[k] for deposits in found]) for k in (1, 2, 3)]
        return WalkDeposits(*Ragged(ptr, *columns).take(torch.cat(nodes).argsort()))


class _Placement(NamedTuple):
    """Which part holds which nodes."""

    owner: Tensor | None  # [N]; None: part r holds the nodes first[r]..first[r + 1] - 1
    first: Tensor

    def part_of(self, node: Tensor) -> Tensor:
        if self.owner is not None:
            return self.owner[node]
        return torch.searchsorted(self.first, node, right=True) - 1

    def nodes_of(self, part: int) -> Tensor:
        if self.owner is not None:
            return (self.owner == part).nonzero().flatten()
        return torch.arange(int(self.first[part]), int(self.first[part + 1]), device=self.first.device)

    @property
    def num_nodes(self) -> int:
        return int(self.first[-1])


def _check_rows(rows: tuple[Tensor, Tensor, Tensor], nodes: Tensor, place: _Placement, node_key: Tensor | None) -> None:
    """What :func:`geo.ops.grf_walks` asks of a whole graph, of the rows of one part."""
    rowptr, col, weight = rows
    for name, numbers in (("owner", place.owner), ("node_key", node_key)):
        if numbers is not None and (numbers.dtype != torch.int64 or numbers.shape != (place.num_nodes,)):
            raise ValueError(f"{name}: expected int64 [{place.num_nodes}], got {numbers.dtype} {list(numbers.shape)}")
    if len(nodes) != rowptr.size(0) - 1:
        raise ValueError(f"rowptr: expected the rows of {len(nodes)} nodes that owner names, got {rowptr.size(0) - 1}")
    if weight.shape != col.shape or not weight.is_floating_point():
        raise ValueError(f"weight: expected {list(col.shape)} real numbers, got {weight.dtype} {list(weight.shape)}")
    bounds.check_ptr("sample_partitioned", rowptr, col.size(0))
    bounds.check_index("sample_partitioned", "col", col, place.num_nodes)
    row = index_from_csr(rowptr, None, col.size(0))
    if node_key is None and bool(((row[1:] > row[:-1]) | (col[1:] > col[:-1])).all()):
        return  # sorted rows, without repetition
    key, order = (col if node_key is None else node_key[col]).sort()
    row, by_row = row[order].sort(stable=True)
    key = key[by_row]
    again = (row[1:] == row[:-1]) & (key[1:] == key[:-1])
    if bool(again.any()):
        node = int(nodes[row[1:][again][0]])
        raise ValueError(
            f"col: expected neighbours with different keys, but two entries in the row of node {node} have one key: "
            "add up repeated entries (coalesce)"
        )


_Post = tuple[Tensor, Tensor]  # letters, int64 [n, c], and the part that each goes to
_Inbox = tuple[Tensor, int]  # letters for one part, and how many letters there were for all parts
_Part = Generator[_Post, _Inbox, tuple[WalkDeposits, Traffic]]


def _walks_of(
    rank: int,
    place: _Placement,
    rows: tuple[Tensor, Tensor, Tensor],
    node_key: Tensor | None,
    law: WalkLaw,
    max_length: int | None,
) -> _Part:
    """The work of one part: it yields what it sends and is sent what it receives.

    All parts yield equally often. Letters have a column for each number; loads travel as the bits of float64.
    """
    nodes = place.nodes_of(rank)
    _check_rows(rows, nodes, place, node_key)
    rowptr, col, weight = rows
    compute = weight.detach() if weight.dtype == torch.float64 else weight.detach().float()
    factor, gain = compute * over_probability(rowptr, None, compute), compute.new_tensor(gains(law))
    edge_key = col if node_key is None else node_key[col]
    start = at = nodes.repeat_interleave(law.num_walks)
    walk = law.first_walk + torch.arange(law.num_walks, device=nodes.device).repeat(len(nodes))
    load = compute.new_ones(len(at))
    deposits = [_letters(start, at, torch.zeros_like(at), walk, load)]
    step = crossed = 0
    longest = LONGEST if max_length is None else max_length
    while step < longest:
        key = start if node_key is None else node_key[start]
        here = torch.searchsorted(nodes, at)
        edge = walk_step(law, rowptr, col.size(0), here, key, walk, step, edge_key=edge_key, op="sample_partitioned")
        going = (edge >= 0).nonzero().flatten()
        start, walk, edge = start[going], walk[going], edge[going]
        load = load[going] * factor[edge] * gain[min(step, len(gain) - 1)]
        at = col[edge]
        step += 1
        deposits.append(_letters(start, at, torch.full_like(at, step), walk, load))
        if step == longest:
            break
        target = place.part_of(at)
        crossed += int((target != rank).sum())
        letters, alive = yield _letters(start, at, walk, load), target
        if not alive:
            break
        (start, at, walk), load = letters[:, :3].t().contiguous(), _load_of(letters, compute)
    sent = torch.cat(deposits)
    target = place.part_of(sent[:, 0].contiguous())
    abroad = int((target != rank).sum())
    letters, _ = yield sent, target
    in_order = (letters[:, 2] * (law.first_walk + law.num_walks) + letters[:, 3]).argsort()  # of length, then walk
    letters = letters[in_order]
    start, at, length = letters[:, :3].t().contiguous()
    row = torch.searchsorted(nodes, start) * place.num_nodes + at
    found = sum_loads(row, length, _load_of(letters, compute), len(nodes), place.num_nodes, law.num_walks)
    found = found._replace(value=found.value.to(weight.dtype))
    return found, Traffic(step, crossed, abroad, 8 * (4 * crossed + 5 * abroad))


def _letters(*columns: Tensor) -> Tensor:
    *numbers, load = columns
    return torch.stack([*numbers, load.double().view(torch.int64)], dim=1)


def _load_of(letters: Tensor, like: Tensor) -> Tensor:
    return letters[:, -1].contiguous().view(torch.float64).to(like.dtype)


def _fingerprint(numbers: Tensor | None) -> int | None:
    return None if numbers is None else zlib.crc32(numbers.cpu().numpy().tobytes())


def _gather(mine: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """The tensors of all processes, one a row."""
    told = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(told, mine, group=group)
    return torch.stack(told)


def _exchange(letters: Tensor, target: Tensor, rank: int, size: int, group: dist.ProcessGroup | None) -> _Inbox:
    """Send letters between processes."""
    sent = torch.bincount(target, minlength=size)
    table = _gather(sent, size, group)  # of letters, from one process (row) to another (column)
    if bool((table < 0).any()):
        refused = int((table < 0).nonzero()[0, 0])
        raise RuntimeError(f"sample_partitioned: process {refused} refused its rows: see its error")
    received = letters.new_empty((int(table[:, rank].sum()), letters.size(1)))
    sorted_letters = letters[target.argsort()]
    dist.all_to_all_single(received, sorted_letters, table[:, rank].tolist(), sent.tolist(), group=group)
    return received, int(table.sum())


def _in_lockstep(parts: list[_Part]) -> list[tuple[WalkDeposits, Traffic]]:
    """Run all parts side by side, and hand their letters over."""
    posts = [next(part) for part in parts]
    while True:
        letters, target = (torch.cat(columns) for columns in zip(*posts, strict=True))
        posts, results = [], []
        for rank, part in enumerate(parts):
            try:
                posts.append(part.send((letters[target == rank], len(letters))))
            except StopIteration as end:
                results.append(end.value)
        if results:
            return results
