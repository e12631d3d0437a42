"""The laws every layer and op of ``geo`` obeys, as assertions anyone can use on their own models.

>>> import torch
>>> from geo.testing import assert_equivariant
>>> def centred(pos):
...     return pos - pos.mean(0)
>>> assert_equivariant(centred, {"pos": torch.randn(5, 3)}, {"pos": "point"}, ["vector"], group="O3")

Transforms are drawn and applied in float64; a helper that passes says nothing, one that fails raises AssertionError
with the largest error. Tolerances come from one table, :data:`TOLERANCES`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geo import o3

__all__ = [
    "TOLERANCES",
    "assert_alone_equals_batched",
    "assert_close",
    "assert_equivariant",
    "assert_permutation_equivariant",
    "assert_state_dict_roundtrip",
    "check_compile",
    "check_derivatives",
    "check_op",
    "random_rotations",
]

#: (rtol, atol) of a comparison in each dtype: about 1000 units in the last place for sums of a few hundred terms.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (3e-2, 3e-2),
    torch.float16: (5e-3, 5e-3),
}

Rep = Literal["scalar", "vector", "point", "pseudoscalar"]
Group = Literal["SO2", "O2", "SO3", "O3"]
Level = Literal["node", "edge", "graph"]


def _tensors(value: Any) -> list[Tensor]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)]


def assert_close(actual: Any, expected: Any, factor: float = 1.0, msg: str = "") -> None:
    """Assert equality of tensors (or tuples of them) within :data:`TOLERANCES` of the coarser dtype.

    Args:
        actual: Tensor or (nested) sequence of tensors.
        expected: The same structure; may have another floating dtype.
        factor: Multiplies both tolerances; say why where it is not 1.
        msg: Put in front of the error message.

    Raises:
        AssertionError: If a shape differs, a tensor is not finite where the other is, or an entry is off.
    """
    left, right = _tensors(actual), _tensors(expected)
    if len(left) != len(right):
        raise AssertionError(f"{msg}: {len(left)} tensors, expected {len(right)}")
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        coarse = max((TOLERANCES.get(t.dtype, (0.0, 0.0)) for t in (a, b)), key=lambda t: t[0])
        rtol, atol = (factor * t for t in coarse)
        common = torch.promote_types(a.dtype, b.dtype)
        torch.testing.assert_close(
            a.detach().to(common),
            b.detach().to(a.device, common),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            msg=partial("{} [output {}]: {}".format, msg or "assert_close", i),
        )


def random_rotations(num: int, dim: int = 3, reflect: bool = False, seed: int = 0) -> Tensor:
    """Haar-distributed rotations, or with ``reflect`` their negative-determinant kin, float64 [num, dim, dim]."""
    generator = torch.Generator().manual_seed(seed)
    rotations = o3.random_rotations(num, dim, torch.float64, generator=generator)
    if reflect:
        rotations[:, 0] *= -1
    return rotations


def _elements(group: Group | Tensor, num: int, seed: int) -> Tensor:
    if isinstance(group, Tensor):
        return group.to(torch.float64)
    if group not in ("SO2", "O2", "SO3", "O3"):
        raise ValueError(f"group={group!r} is not one of 'SO2', 'O2', 'SO3', 'O3' or a tensor of matrices [k, n, n]")
    dim = int(group[-1])
    proper = random_rotations(num, dim, seed=seed)
    if group.startswith("S"):
        return proper
    return torch.cat([proper, random_rotations(num, dim, reflect=True, seed=seed + 1)])


def _act(value: Tensor, rep: Rep, rotation: Tensor, shift: Tensor) -> Tensor:
    if rep == "scalar":
        return value
    if rep == "pseudoscalar":
        sign: Tensor = torch.linalg.det(rotation).sign()
        return value * sign.to(value)
    turned: Tensor = value.to(torch.float64) @ rotation.T.to(value.device)
    if rep == "vector":
        return turned.to(value.dtype)
    if rep == "point":
        turned = turned + shift.to(value.device)
        return turned.to(value.dtype)
    raise ValueError(f"rep={rep!r} is not one of 'scalar', 'pseudoscalar', 'vector', 'point'")


def assert_equivariant(
    fn: Callable[..., Any],
    inputs: Mapping[str, Any],
    reps: Mapping[str, Rep],
    out: Sequence[Rep],
    group: Group | Tensor = "SO3",
    translate: bool = True,
    num: int = 3,
    factor: float = 1.0,
    seed: int = 0,
) -> None:
    """Assert ``fn(g . inputs) = g . fn(inputs)`` for random elements g of a group of rotations (and translations).

    Args:
        fn: Called as ``fn(**inputs)``; returns a tensor or a tuple of tensors.
        inputs: Arguments of ``fn``; those named in ``reps`` are transformed along their last axis.
        reps: How each input transforms; inputs left out are invariant.
        out: How each output transforms.
        group: ``'SO3'``, ``'O3'``, ``'SO2'``, ``'O2'``, or the matrices themselves [k, n, n] (a finite group).
        translate: Also shift every ``'point'``.
        num: Elements drawn (twice as many for O(n): as many reflections).
        factor: Multiplies the tolerance.
        seed: Of the draw.

    Raises:
        AssertionError: If an output differs.
    """
    expected = _tensors(fn(**inputs))
    if len(expected) != len(out):
        raise ValueError(f"out names {len(out)} outputs, fn returned {len(expected)}")
    elements = _elements(group, num, seed)
    generator = torch.Generator().manual_seed(seed)
    for k, rotation in enumerate(elements):
        shift = torch.randn(rotation.size(0), dtype=torch.float64, generator=generator) * float(translate)
        moved = {name: _act(v, reps[name], rotation, shift) if name in reps else v for name, v in inputs.items()}
        actual = _tensors(fn(**moved))
        for i, (a, e, rep) in enumerate(zip(actual, expected, out, strict=True)):
            name = f"equivariance, element {k} (det {torch.linalg.det(rotation).item():+.0f}), output {i} as {rep}"
            assert_close(a, _act(e, rep, rotation, shift), factor, name)


def assert_permutation_equivariant(
    fn: Callable[[Any], Any], data: Any, level: Level = "node", factor: float = 1.0, seed: int = 0
) -> None:
    """Assert that renumbering the nodes and shuffling the edges of a graph only renumbers the output.

    Args:
        fn: Takes a :class:`torch_geometric.data.Data`, returns a tensor or a tuple of tensors.
        data: The graph; which attributes belong to nodes or edges is asked of PyG.
        level: What the rows of the outputs stand for: ``'node'``, ``'edge'`` or ``'graph'`` (invariant).
        factor: Multiplies the tolerance.
        seed: Of the permutation.

    Raises:
        AssertionError: If an output differs.
    """
    generator = torch.Generator().manual_seed(seed)
    num_nodes = int(data.num_nodes)
    node = torch.randperm(num_nodes, generator=generator)
    rank = torch.empty_like(node)
    rank[node] = torch.arange(num_nodes)
    permuted = copy.copy(data)
    edge = torch.arange(0)
    if getattr(data, "edge_index", None) is not None:
        edge = torch.randperm(int(data.num_edges), generator=generator)
    for key, value in data:
        if key == "edge_index":
            permuted[key] = rank[value[:, edge]]
        elif isinstance(value, Tensor) and data.is_node_attr(key):
            permuted[key] = value[node]
        elif isinstance(value, Tensor) and edge.numel() and data.is_edge_attr(key):
            permuted[key] = value[edge]
    order: Tensor | slice = {"node": node, "edge": edge}.get(level, slice(None))
    expected = [t[order] for t in _tensors(fn(data))]
    assert_close(_tensors(fn(permuted)), expected, factor, f"permutation of nodes and edges, level={level!r}")


def assert_alone_equals_batched(
    fn: Callable[[Any], Any], data_list: Sequence[Any], level: Level = "node", factor: float = 1.0
) -> None:
    """Assert that a graph gets the same output alone as in a batch with others.

    Args:
        fn: Takes a PyG ``Batch``, returns a tensor or a tuple of tensors.
        data_list: Graphs; include ones of 0, 1 and 3 nodes.
        level: What the rows of the outputs stand for.
        factor: Multiplies the tolerance.

    Raises:
        AssertionError: If an output differs.
    """
    from torch_geometric.data import Batch

    together = _tensors(fn(Batch.from_data_list(list(data_list))))
    alone = [_tensors(fn(Batch.from_data_list([data]))) for data in data_list]
    for i, rows in enumerate(together):
        expected = torch.cat([outputs[i] for outputs in alone])
        assert_close(rows, expected, factor, f"alone = in a batch, output {i}, level={level!r}")


def assert_state_dict_roundtrip(make: Callable[[], nn.Module], run: Callable[[nn.Module], Any]) -> None:
    """Assert that a module built anew and given another's ``state_dict`` computes bitwise the same.

    Args:
        make: Builds the module; must draw its parameters from torch's global generator.
        run: Applies a module to fixed inputs.

    Raises:
        AssertionError: If an output differs in any bit, or the two modules did not differ before loading.
    """
    torch.manual_seed(0)
    first = make()
    torch.manual_seed(1)
    second = make()
    expected = [t.clone() for t in _tensors(run(first))]
    second.load_state_dict(first.state_dict())
    for i, (a, b) in enumerate(zip(_tensors(run(second)), expected, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"state_dict round trip: output {i} is off by {(a - b).abs().max().item():.3g}")


def _leaves(inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    def leaf(v: Any) -> Any:
        if isinstance(v, Tensor) and v.is_floating_point():
            return v.detach().to(dtype or v.dtype).clone().requires_grad_()
        return v

    return [leaf(v) for v in inputs]


def check_op(
    op: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Any], factor: float = 1.0, seed: int = 0
) -> None:
    """Assert that an op equals its reference: the outputs and the gradient of every floating input.

    Args:
        op: The op under test.
        reference: Its plain-PyTorch definition, run in float64 (in the given dtype where an output is not floating).
        inputs: Positional arguments; floating tensors get gradients.
        factor: Multiplies the tolerance.
        seed: Of the cotangents.

    Raises:
        AssertionError: If an output or a gradient differs; gradients are named by position.
    """
    ours, theirs = _leaves(inputs), _leaves(inputs, torch.float64)
    actual, expected = _tensors(op(*ours)), _tensors(reference(*theirs))
    assert_close(actual, expected, factor, "forward")
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device) for t in expected]
    pairs = [(a, e, g) for a, e, g in zip(actual, expected, cotangents, strict=True) if e.requires_grad]
    if not pairs:
        return
    names = [i for i, v in enumerate(theirs) if isinstance(v, Tensor) and v.requires_grad]
    wanted = torch.autograd.grad([e for _, e, _ in pairs], [theirs[i] for i in names], [g for *_, g in pairs])
    got = torch.autograd.grad([a for a, *_ in pairs], [ours[i] for i in names], [g.to(a.dtype) for a, _, g in pairs])
    for i, a, e in zip(names, got, wanted, strict=True):
        scale = max(1.0, math.sqrt(max(1, e.abs().max().item() if e.numel() else 1.0)))
        assert_close(a, e, factor * scale, f"gradient of argument {i}")


def check_derivatives(fn: Callable[..., Any], inputs: Sequence[Any], second: bool = True) -> None:
    """Run ``gradcheck`` and, with ``second``, ``gradgradcheck`` in float64 on copies of the inputs."""
    leaves = _leaves(inputs, torch.float64)
    if not torch.autograd.gradcheck(fn, leaves):
        raise AssertionError("gradcheck failed")
    if second and not torch.autograd.gradgradcheck(fn, leaves):
        raise AssertionError("gradgradcheck failed")


def check_compile(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    backend: str = "aot_eager",
    dynamic: bool | None = None,
    factor: float = 1.0,
) -> None:
    """Assert that ``torch.compile(fn, fullgraph=True)`` equals eager, outputs and first gradients.

    Raises:
        AssertionError: If an output or a gradient differs.
    """
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend, dynamic=dynamic)
    eager_in, compiled_in = _leaves(inputs), _leaves(inputs)
    eager, traced = _tensors(fn(*eager_in)), _tensors(compiled(*compiled_in))
    assert_close(traced, eager, factor, f"compiled with {backend}")
    if not any(t.requires_grad for t in eager):
        return
    for outputs in (eager, traced):
        sum(t.square().sum() for t in outputs if t.requires_grad).backward()  # type: ignore[union-attr]
    for i, (a, b) in enumerate(zip(compiled_in, eager_in, strict=True)):
        if isinstance(b, Tensor) and b.grad is not None:
            assert_close(a.grad, b.grad, factor, f"compiled with {backend}, gradient of argument {i}")
