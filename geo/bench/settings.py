"""One benchmark in several settings: a process for each number of threads and each allocator."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from geo.bench import machine

#: Memory that was freed stays with the process: without it, large tensors cost page faults each time.
TUNED = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


def add_settings(parser: argparse.ArgumentParser, seconds: float, seconds_help: str) -> None:
    """Add the flags that :func:`run_settings` reads."""
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--malloc", choices=["default", "tuned", "both"], default="default")
    parser.add_argument("--seconds", type=float, default=seconds, help=seconds_help)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: with --threads 1 on a busy machine"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="write the page to this file, too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)


def run_settings(
    name: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    introduction: str,
    measure: Callable[[argparse.Namespace], Iterable[dict[str, Any]]],
    page: Callable[[dict[str, Any], bool], str],
) -> int:
    """Measure in each setting and print a page of tables; returns the exit status.

    Args:
        name: Of the benchmark.
        argv: Its command line, which the processes get, too.
        args: What was parsed of it.
        introduction: Text above the tables; ``{}`` in it becomes the clock.
        measure: Gives the rows of one setting.
        page: Markdown of ``{"machine": ..., "rows": [...]}`` and of whether the allocator is tuned.
    """
    if args.here:
        torch.set_num_threads(args.threads[0])
        print(json.dumps({"machine": machine(args.device), "rows": list(measure(args))}))
        return 0
    clock = args.clock if args.device == "cpu" else "GPU"
    parts = [f"## {name}, {datetime.date.today().isoformat()}", introduction.format(clock)]
    print("\n\n".join(parts), flush=True)
    allocators: dict[str, dict[str, str]] = {}
    if args.malloc != "tuned" or args.device == "cuda":
        allocators["default allocator"] = {}
    if args.malloc != "default" and args.device == "cpu":
        allocators[f"GLIBC_TUNABLES={TUNED}"] = {"GLIBC_TUNABLES": TUNED}
    all_threads = args.threads if args.device == "cpu" else args.threads[:1]
    status = 0
    for threads, (allocator, env) in itertools.product(all_threads, allocators.items()):
        command = [sys.executable, "-m", "geo", "bench", name, *argv, "--threads", str(threads), "--here"]
        done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            status = 1
            body = "failed"
        else:
            body = page(json.loads(done.stdout.splitlines()[-1]), bool(env))
        parts.append(f"### {allocator}\n\n{body}")
        print(f"\n{parts[-1]}", flush=True)
        if args.out is not None:
            args.out.write_text("\n\n".join(parts) + "\n")
    return status
