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
from torch.autograd import forward_ad

from geo.ops.registration import define

MARK = " is out of range "  # every message about a bad index holds these words, in Python, C++ and CUDA
_KINDS = ("src_index", "dst_index", "edge_perm", "ptr")  # the order of the flag: Fault in csrc/segments.h
_SENTENCE = re.compile(rf"\w+\[\d+\] = -?\d+{MARK}.*")
_checked = True


def check_bounds(enabled: bool) -> None:
    """Switch the reading of the CUDA out-of-range flag after each call on or off (it is on at first).

    Off, a call does not wait for the GPU; an edge with an index out of range is then silently left out of the result.
    The CPU kernels raise in any case.

    Args:
        enabled: read the flag.
    """
    global _checked
    _checked = bool(enabled)


def out_of_range(op: str, name: str, position: int, value: int, low: int, high: int) -> str:
    """The sentence for ``name[position] = value`` outside ``low..high`` (both included)."""
    return f"{op}: {name}[{position}] = {value}{MARK}[{low}, {high}]"


def check_index(op: str, name: str, index: Tensor, size: int) -> None:
    """Raise IndexError unless every entry of ``index`` lies in [0, size)."""
    if not reads_values(index):
        return
    bad = (index < 0) | (index >= size)
    if bool(bad.any()):
        position = int(bad.to(torch.uint8).argmax())
        raise IndexError(out_of_range(op, name, position, int(index[position]), 0, size - 1))


def check_ptr(op: str, ptr: Tensor, num_edges: int) -> None:
    """Raise IndexError unless ``ptr`` rises from 0 to ``num_edges``."""
    if not reads_values(ptr):
        return
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


def refuse_functorch(op: str, reference: str | None = None) -> None:
    """Raise under torch.func (grad, vmap, ...), where the compiled ops have no rule, and name what works there."""
    if in_functorch():
        reference = reference or f"{op}_reference"
        raise RuntimeError(f"geo.ops.{op} does not work under torch.func: use geo.ops.{reference} there")


def in_functorch() -> bool:
    """Whether a function transform of torch.func is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _refuse_tangents(op: str, args: Sequence[Any]) -> None:
    """Raise for dual tensors: the ops have no forward-mode rule, and torch would drop the tangents without a word."""
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise RuntimeError(f"geo.ops.{op} has no forward-mode derivative; the functions named *_reference have one")


def call(name: str, op: Any, args: Sequence[Any], checks: Sequence[tuple[str, Tensor | None, int]] = ()) -> Any:
    """Call ``op(*args)`` for the public function ``name``; a bad index arrives as IndexError.

    ``checks`` lists what a CUDA flag may refer to: (argument's name, tensor, greatest value).
    """
    if torch.compiler.is_compiling():
        return op(*args)
    refuse_functorch(name)
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    try:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            out = op(*args)
        else:  # autograd's wrapper, which would find nothing to do, costs 5 microseconds
            with torch._C._AutoDispatchBelowAutograd():
                out = op(*args)
    except (RuntimeError, IndexError) as err:  # every error of a C++ kernel arrives as RuntimeError
        if (found := _SENTENCE.search(str(err))) is not None:
            raise IndexError(f"{name}: {found[0]}") from None
        raise
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if checks and first.is_cuda and reads_values(first):
        _read_flag(name, first, checks)
    return out


def reads_values(like: Tensor) -> bool:
    """Whether values may be looked at now: always on the CPU, on CUDA unless that was switched off or is captured."""
    return not like.is_cuda or (_checked and not torch.cuda.is_current_stream_capturing())


def _read_flag(name: str, like: Tensor, checks: Sequence[tuple[str, Tensor | None, int]]) -> None:
    """Read and clear the device's flag: the least position of each kind of index that a kernel found bad, or -1."""
    positions = dict(zip(_KINDS, torch.ops.geo.bounds_flag(like).tolist(), strict=True))
    for what, tensor, high in checks:
        position = positions.get(what, -1)
        if tensor is None or not 0 <= position < tensor.numel():
            continue
        if what == "ptr":
            check_ptr(name, tensor, high)
        elif not 0 <= (value := int(tensor[position])) <= high:  # else it was noted by a call that did not read
            raise IndexError(out_of_range(name, what, position, value, 0, high))


def _flag_kernel(like: Tensor) -> Tensor:
    """Without the CUDA library no kernel notes anything: the plain-PyTorch kernels raise themselves."""
    return torch.full((len(_KINDS),), -1, dtype=torch.int64, device=like.device)


define("bounds_flag(Tensor like) -> Tensor", _flag_kernel, lambda like: like.new_empty(len(_KINDS), dtype=torch.int64))
