"""What ``bench tensor-products`` computes: bilinear maps of irreps, with their derivatives in float64 as the reference.

A problem says what is computed, in one common layout (dense rows of the degrees that are present, channels last; for
convolutions e3nn's flat one). A candidate computes it in the layout it likes best: ``enter`` and ``leave`` translate,
outside of what is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from geo.o3 import bracket_coefficient, gaunt_coefficient
from geo.ops import SegmentPlan

DIRECTIONS = ("forward", "backward", "double")
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_PIECE = 2**22  # entries of the largest tensor of a piece of the reference
_WORK = 2e9  # multiply-adds of a product's reference, beyond which it takes some of the rows
Function = Callable[..., Tensor]
Translation = Callable[[Tensor], Tensor]


class NotAvailable(Exception):
    """A candidate that does not exist here; the text says why."""


class Path(NamedTuple):
    """One coupling: degrees, and whether their sum is odd, which takes the bracket."""

    l1: int
    l2: int
    l3: int
    odd: bool


@dataclass(frozen=True)
class Product:
    """A sum of couplings of irreps of natural parity: degrees of both inputs, of the outputs by even and odd sums."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    true: tuple[int, ...]
    pseudo: tuple[int, ...]
    mode: str = "uuu"
    channels: tuple[int, int] = (1, 1)

    @property
    def paths(self) -> list[Path]:
        """All couplings between these degrees."""
        return [
            Path(l1, l2, l3, odd)
            for odd, third in ((False, self.true), (True, self.pseudo))
            for l1 in self.first
            for l2 in self.second
            for l3 in third
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == odd
        ]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return math.prod(self.channels) if self.mode == "full" else self.channels[0]

    @property
    def complete(self) -> bool:
        """Whether the inputs have every degree up to the highest, as dense rows want."""
        return all(degrees == tuple(range(len(degrees))) for degrees in (self.first, self.second))

    def irreps(self) -> tuple[str, str, str]:
        """Both inputs and the output, as e3nn writes them."""
        first = _irreps(self.channels[0], self.first, 0)
        second = _irreps(self.channels[1], self.second, 0)
        out = (_irreps(self.out_channels, self.true, 0), _irreps(self.out_channels, self.pseudo, 1))
        return first, second, "+".join(part for part in out if part)

    def coefficient(self, path: Path) -> float:
        """The factor of a path's Wigner symbol: that of the product on the sphere, or of the bracket."""
        return (bracket_coefficient if path.odd else gaunt_coefficient)(*path[:3])

    def tensor(self, absolute: bool = False) -> Tensor:
        """The coefficients of the map, float64 [d1, d2, d3]; ``absolute``: of the paths, their signs left out."""
        places = [starts(degrees) for degrees in (self.first, self.second, self.true, self.pseudo)]
        size = [rows(self.first), rows(self.second), rows(self.true) + rows(self.pseudo)]
        out = torch.zeros(size, dtype=torch.float64)
        for path in self.paths:
            c = self.coefficient(path)
            i, j = places[0][path.l1], places[1][path.l2]
            k = rows(self.true) + places[3][path.l3] if path.odd else places[2][path.l3]
            block = out[i : i + 2 * path.l1 + 1, j : j + 2 * path.l2 + 1, k : k + 2 * path.l3 + 1]
            block += (abs(c) if absolute else c) * wigner_3j(*path[:3])
        return out


def _irreps(channels: int, degrees: Sequence[int], pseudo: int) -> str:
    return "+".join(f"{channels}x{l}{'eo'[(l + pseudo) % 2]}" for l in degrees)


def wigner_3j(l1: int, l2: int, l3: int) -> Tensor:
    """e3nn's symbol in float64."""
    from e3nn import o3

    symbol: Tensor = o3.wigner_3j(l1, l2, l3, dtype=torch.float64, device="cpu")
    return symbol


def rows(degrees: Sequence[int]) -> int:
    """Components of these degrees."""
    return sum(2 * l + 1 for l in degrees)


def starts(degrees: Sequence[int]) -> dict[int, int]:
    """Where each degree begins."""
    return {l: rows(degrees[:i]) for i, l in enumerate(degrees)}


def count_paths(lmax: int) -> tuple[int, int]:
    """Couplings of degrees up to lmax with degrees up to lmax: with even and with odd sum."""
    degrees = tuple(range(lmax + 1))
    paths = Product(degrees, degrees, degrees, degrees).paths
    odd = sum(path.odd for path in paths)
    return len(paths) - odd, odd


# -- problems ----------------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """Something to compute, with its inputs in the common layout and float64.

    Args:
        kind: Which paths.
        leaves: Inputs.
        by_row: Of each leaf: whether a piece of the rows needs only these rows of it.
        function: The reference on a piece of rows, ``function(piece, *leaves)``.
        out_by_row: Whether it gives these rows of the output; otherwise the pieces' outputs add up.
        paths: Couplings in it.
        outputs: Irreps in the output, a channel counted as one.
        step: Rows of a piece.
        checked: The rows that the reference computes, of leaves and output by row. (default: all)
    """

    kind: str
    leaves: list[Tensor]
    by_row: list[bool]
    function: Function
    out_by_row: bool
    paths: int
    outputs: int
    step: int
    checked: Tensor | None = None
    _results: dict[str, list[Tensor]] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def directions(self) -> tuple[list[Tensor], Tensor]:
        """The tangents of the inputs and the cotangent of the output."""
        (out,) = self.results("forward")
        size = (self._num_rows, *out.shape[1:]) if self.out_by_row else out.shape
        generator = torch.Generator().manual_seed(1)

        def draw(shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(out.device)

        return [draw(leaf.shape) for leaf in self.leaves], draw(size)

    @property
    def _num_rows(self) -> int:
        return next(leaf.size(0) for leaf, cut in zip(self.leaves, self.by_row, strict=True) if cut)

    def flags(self, direction: str) -> list[bool]:
        """Of each result whether it has rows."""
        inputs = [] if direction == "forward" else self.by_row
        return inputs if direction == "backward" else [*inputs, self.out_by_row]

    def results(self, direction: str) -> list[Tensor]:
        """The output; or the gradients of the inputs; or the gradients of these, of inputs and cotangent."""
        if direction not in self._results:
            self._results[direction] = self._compute(direction)
        return self._results[direction]

    def _compute(self, direction: str) -> list[Tensor]:
        tangents, cotangent = ([], None) if direction == "forward" else self.directions
        sources, flags, num_rows = self.leaves, self.flags(direction), self._num_rows
        if self.checked is not None:
            sources, tangents = (
                [t[self.checked] if cut else t for t, cut in zip(some, self.by_row, strict=False)]
                for some in (sources, tangents)
            )
            cotangent = cotangent[self.checked] if cotangent is not None and self.out_by_row else cotangent
            num_rows = len(self.checked)
        parts: list[list[Tensor]] = [[] for _ in flags]
        for start in range(0, num_rows, self.step):
            piece = slice(start, start + self.step)
            leaves, moved = (
                [leaf[piece] if cut else leaf for leaf, cut in zip(some, self.by_row, strict=False)]
                for some in (sources, tangents)
            )
            g = cotangent[piece] if cotangent is not None and self.out_by_row else cotangent

            def function(*leaves: Tensor, piece: slice = piece) -> Tensor:
                return self.function(piece, *leaves)

            for found, part, cut in zip(
                parts, derivatives(function, leaves, g, moved, direction)(), flags, strict=True
            ):
                if cut or not found:
                    found.append(part)
                else:
                    found[0] += part
        return [torch.cat(found) if cut else found[0] for found, cut in zip(parts, flags, strict=True)]


def derivatives(
    function: Function, leaves: Sequence[Tensor], cotangent: Tensor | None, tangents: Sequence[Tensor], direction: str
) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: forward; forward and backward; these and the backward of the backward."""
    leaves = [leaf.detach().clone() for leaf in leaves]
    if direction == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*leaves),)

        return forward
    assert cotangent is not None
    g = cotangent.detach().clone()
    for leaf in leaves:
        leaf.requires_grad_()
    if direction == "backward":
        return lambda: torch.autograd.grad(function(*leaves), leaves, g)
    g.requires_grad_()

    def double() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*leaves), leaves, g, create_graph=True)
        return torch.autograd.grad(first, [*leaves, g], tangents)

    return double


def product_problem(kind: str, product: Product, x: Tensor, y: Tensor, tensor: Tensor | None = None) -> Problem:
    """A product of x [B, d1, C1] and y [B, d2, C2]."""
    couplings = (product.tensor() if tensor is None else tensor).to(x.device)
    one, two = product.channels

    def function(piece: slice, x: Tensor, y: Tensor) -> Tensor:
        if product.mode == "full":
            x, y = x.repeat_interleave(two, -1), y.repeat(1, 1, one)
        outer = (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1, 2)
        return torch.einsum("bnc,nk->bkc", outer, couplings.flatten(0, 1))

    size = couplings.size(0) * couplings.size(1) * product.out_channels
    step, fewer = max(1, _PIECE // size), max(64, int(_WORK / (size * couplings.size(2))))
    checked = torch.linspace(0, len(x) - 1, fewer).round().long().to(x.device) if fewer < len(x) else None
    outputs = (len(product.true) + len(product.pseudo)) * product.out_channels
    return Problem(kind, [x, y], [True, True], function, True, len(product.paths), outputs, step, checked)


class Graph(NamedTuple):
    """Edges with a plan for their receivers."""

    source: Tensor
    target: Tensor
    num_nodes: int
    plan: SegmentPlan


class Convolution(NamedTuple):
    """A 'uvu' convolution as e3nn states it."""

    irreps_in: str
    irreps_sh: str
    irreps_out: str
    instructions: list[tuple[int, int, int, str, bool]]
    paths: list[Path]

    @classmethod
    def of(cls, product: Product) -> Convolution:
        """One output irrep a path, sorted by parity and degree."""
        order = sorted(product.paths, key=lambda path: (path.odd, path.l3))
        places = [{l: i for i, l in enumerate(degrees)} for degrees in (product.first, product.second)]
        instructions = [(places[0][p.l1], places[1][p.l2], k, "uvu", True) for k, p in enumerate(order)]
        mul = product.channels[0]
        out = "+".join(_irreps(mul, (p.l3,), int(p.odd)) for p in order)
        return cls(*product.irreps()[:2], out, instructions, order)


def conv_problem(kind: str, product: Product, graph: Graph, x: Tensor, sh: Tensor, weight: Tensor) -> Problem:
    """e3nn's 'uvu' product with weights of every edge and path, summed over the edges of a node; flat layouts."""
    conv, mul = Convolution.of(product), product.channels[0]
    first, second = starts(product.first), starts(product.second)
    symbols = [math.sqrt(2 * p.l3 + 1) * wigner_3j(*p[:3]).to(x.device) for p in conv.paths]

    def function(piece: slice, x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        sent, blocks = x[graph.source[piece]], []
        for n, (p, symbol) in enumerate(zip(conv.paths, symbols, strict=True)):
            start = mul * first[p.l1]
            one = sent[:, start : start + mul * (2 * p.l1 + 1)].unflatten(1, (mul, 2 * p.l1 + 1))
            matrix = torch.einsum("ej,ijk->eik", sh[:, second[p.l2] : second[p.l2] + 2 * p.l2 + 1], symbol)
            blocks.append((one @ matrix * weight[:, n * mul : (n + 1) * mul, None]).flatten(1))
        message = torch.cat(blocks, 1)
        return message.new_zeros(graph.num_nodes, message.size(1)).index_add(0, graph.target[piece], message)

    count = len(conv.paths)
    step = max(1, _PIECE // (mul * rows([p.l3 for p in conv.paths])))
    return Problem(kind, [x, sh, weight], [False, True, True], function, False, count, count * mul, step)


def gaunt_conv_problem(kind: str, product: Product, graph: Graph, x: Tensor, sh: Tensor, weight: Tensor) -> Problem:
    """Gaunt products of the senders with the edge's function, weighted [E, L+1, C] by the latter's degree, summed."""
    couplings = product.tensor().to(x.device).flatten(0, 1)

    def function(piece: slice, x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        scaled = sh * torch.cat(
            [weight[:, i : i + 1].expand(-1, 2 * l + 1, -1) for i, l in enumerate(product.second)], 1
        )
        outer = (x[graph.source[piece]].unsqueeze(2) * scaled.unsqueeze(1)).flatten(1, 2)
        message = torch.einsum("bnc,nk->bkc", outer, couplings)
        return message.new_zeros(graph.num_nodes, *message.shape[1:]).index_add(0, graph.target[piece], message)

    outputs = (len(product.true) + len(product.pseudo)) * product.channels[0]
    step = max(1, _PIECE // (couplings.size(0) * product.channels[0]))
    leaves = [x, sh, weight]
    return Problem(kind, leaves, [False, True, True], function, False, len(product.paths), outputs, step)


# -- candidates --------------------------------------------------------------------------------------------------------
def same(x: Tensor) -> Tensor:
    """No translation."""
    return x


@dataclass(frozen=True)
class Candidate:
    """A way to compute a problem: ``leave(function(*[enter(leaf)]))`` is its output."""

    problem: Problem
    function: Function
    enter: Sequence[Translation]
    leave: Translation = same
    note: str = ""
    outputs: int | None = None  # where it gives more irreps than the problem asks for

    def call(self, direction: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed, in the candidate's own layouts."""
        leaves = self._entered(self.problem.leaves, dtype)
        if direction == "forward":
            return derivatives(self.function, leaves, None, [], direction)
        tangents, g = self.problem.directions
        with torch.no_grad():
            like = self.function(*leaves)
        cotangent = _transposed(self.leave, like, g.to(dtype))
        return derivatives(self.function, leaves, cotangent, self._entered(tangents, dtype), direction)

    def error(self, direction: str, results: Sequence[Tensor]) -> float:
        """The largest difference to the reference, over its largest entry."""
        problem, worst = self.problem, 0.0
        leaves, flags = problem.leaves, problem.flags(direction)
        for i, (result, want, by_row) in enumerate(zip(results, problem.results(direction), flags, strict=True)):
            if direction == "forward" or i == len(leaves):
                common = self.leave(result)
            else:
                common = _transposed(self.enter[i], leaves[i].to(result.dtype), result)
            if by_row and problem.checked is not None:
                common = common[problem.checked]
            if common.shape != want.shape:
                return math.inf
            worst = max(worst, float((common.double() - want).abs().amax() / want.abs().amax().clamp(min=1e-30)))
        return worst if math.isfinite(worst) else math.inf

    def _entered(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [enter(t.to(dtype)).contiguous() for enter, t in zip(self.enter, tensors, strict=True)]


def _transposed(linear: Translation, like: Tensor, cotangent: Tensor) -> Tensor:
    """The transpose of a linear map of tensors like ``like``."""
    zero = torch.zeros_like(like).requires_grad_()
    (out,) = torch.autograd.grad(linear(zero), zero, cotangent)
    return out.contiguous()


def flat(x: Tensor, degrees: Sequence[int]) -> Tensor:
    """Dense rows as e3nn's flat layout."""
    return torch.cat([block.transpose(1, 2).flatten(1) for block in x.split([2 * l + 1 for l in degrees], 1)], 1)


def unflat(x: Tensor, degrees: Sequence[int]) -> Tensor:
    """e3nn's flat layout as dense rows."""
    channels = x.size(1) // max(1, rows(degrees))
    blocks = x.split([channels * (2 * l + 1) for l in degrees], 1)
    return torch.cat([b.unflatten(1, (channels, -1)).transpose(1, 2) for b in blocks], 1)
