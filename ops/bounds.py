"""What every op does with a bad index: nothing reads out of bounds, and the caller gets one IndexError.

The kernels check each index while they read it. On the CPU a bad one raises at once. On CUDA the kernel skips the row
and notes the position in a flag that :func:`call` reads after the launch, which waits for the GPU;
``check_bounds(False)`` leaves that reading out (the row is skipped all the same).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MARK = " is out of range "  # every message about a bad index holds these words, in Python, C++ and CUDA
_SENTENCE = re.compile(rf"\w+\[\d+\] = -?\d+{MARK}.*")
_checked = True


def check_bounds(enabled: bool) -> None:
    """Switch the reading of the CUDA out-of-range flag after each call on or off (it is on at first).

    Off, a call does not wait for the GPU; an edge with an index out of range is then silently left out of the result.
    The CPU kernels raise in any case.
    """
    global _checked
    _checked = bool(enabled)


def out_of_range(op: str, name: str, position: int, value: int, low: int, high: int) -> str:
    """The sentence for ``name[position] = value`` outside ``low..high`` (both included)."""
    return f"{op}: {name}[{position}] = {value}{MARK}[{low}, {high}]"


def check_index(op: str, name: str, index: Tensor, size: int) -> None:
    """Raise IndexError unless every entry of ``index`` lies in [0, size)."""
    bad = (index < 0) | (index >= size)
    if bool(bad.any()):
        position = int(bad.to(torch.uint8).argmax())
        raise IndexError(out_of_range(op, name, position, int(index[position]), 0, size - 1))


def check_ptr(op: str, ptr: Tensor, num_edges: int) -> None:
    """Raise IndexError unless ``ptr`` rises from 0 to ``num_edges``."""
    low = torch.cat([ptr.new_zeros(1), ptr[:-1].clamp(0, num_edges)])
    high = torch.full_like(ptr, num_edges)
    high[0] = 0
    low[-1] = num_edges if ptr.numel() > 1 else 0
    bad = (ptr < low) | (ptr > high)
    if ptr.numel() == 1 and num_edges:
        raise IndexError(out_of_range(op, "ptr", 0, int(ptr[0]), num_edges, num_edges))
    if bool(bad.any()):
        i = int(bad.to(torch.uint8).argmax())
        raise IndexError(out_of_range(op, "ptr", i, int(ptr[i]), int(low[i]), int(high[i])))


def refuse_functorch(op: str) -> None:
    """Raise under torch.func (grad, vmap, ...), where the compiled ops have no rule."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"geo.ops.{op} does not work under torch.func: use geo.ops.{op}_reference there")


def call(name: str, op: Any, args: Sequence[Any], checks: Sequence[tuple[str, Tensor | None, int]] = ()) -> Any:
    """Call ``op(*args)`` for the public function ``name``; a bad index arrives as IndexError.

    ``checks`` lists what a CUDA flag refers to, in the kernel's order: (argument's name, tensor, greatest value).
    """
    if torch.compiler.is_compiling():
        return op(*args)
    refuse_functorch(name)
    try:
        out = op(*args)
    except (RuntimeError, IndexError) as err:  # every error of a C++ kernel arrives as RuntimeError
        if (found := _SENTENCE.search(str(err))) is not None:
            raise IndexError(f"{name}: {found[0]}") from None
        raise
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if _checked and first.is_cuda and hasattr(torch.ops.geo, "bounds_flag") and not _capturing():
        _read_flag(name, first, checks)
    return out


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _read_flag(name: str, like: Tensor, checks: Sequence[tuple[str, Tensor | None, int]]) -> None:
    """Read and clear the device's flag: one position per kind of index, or a negative number where all was well."""
    positions = torch.ops.geo.bounds_flag(like).tolist()
    for position, (what, tensor, high) in zip(positions, checks, strict=False):
        if position >= 0 and tensor is not None:
            raise IndexError(out_of_range(name, what, position, int(tensor[position]), 0, high))
