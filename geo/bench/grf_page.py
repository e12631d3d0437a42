"""The page of the benchmark of graph random features: tables, where curves cross, a plot."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any

from geo.bench import Timing, table

TARGETS = {10_000: 7, 100_000: 5, 1_000_000: 2}  # ratios to the vectorised peer on one CPU thread
PYTHON_TARGET, FEATURES_TARGET, PRODUCT_TARGET, MEMORY_TARGET = 100, 2.0, 0.1, 2.0  # x, s, s, x
GPU_TARGET = 16  # ms for 10^6 nodes, 16 walks each of 5 steps on average


def page_of(result: dict[str, Any], args: argparse.Namespace) -> str:
    """Markdown of one setting."""
    one_thread = result["machine"].endswith(", 1 thread")
    pieces = [result["machine"]]
    for part, text in TEXTS.items():
        if rows := [row for row in result["rows"] if row["part"] == part]:
            pieces.append(text(rows, one_thread and args.device == "cpu"))
    return "\n\n".join(pieces)


def _sampling_text(rows: list[dict[str, Any]], one_thread: bool) -> str:
    head = ["walks", "geo", "Python", "x", "target", "PyTorch", "x", "target", "million deposits", "per second"]
    lines = [head]
    for row in rows:
        ours = Timing(**row["geo"])
        python = ["not run", "", ""]
        if "python" in row:
            theirs = row["python"]["median"] / row["share"]
            scaled = f"{theirs:.0f}" + (f" ({row['share']:.1%} run)" if row["share"] < 1 else "")
            python = [scaled, f"{theirs / ours.median:.0f}", str(PYTHON_TARGET) if one_thread else ""]
        theirs = Timing(**row["torch"])
        target = TARGETS.get(row["nodes"]) if one_thread else None
        cells = [str(theirs), f"{theirs.median / ours.median:.1f}", "" if target is None else str(target)]
        # The deposits before they are summed: one for each walk and length.
        made = row["nodes"] * row["walks"] / row["p"] / 1e6
        label = f"N = {row['nodes']:,}, {row['walks']} each, p {row['p']:g}"
        if "python" not in row and (row["nodes"], row["walks"]) == (1_000_000, 16):  # on a GPU
            label += f" (target {GPU_TARGET} ms)"
        lines.append([label, str(ours), *python, *cells, f"{made:.1f}", f"{made / ours.median * 1e3:.0f}"])
    return table(lines)


def _exact_text(rows: list[dict[str, Any]], one_thread: bool) -> str:
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    lines = [["nodes", *names, "error, 4 walks", "error, 16 walks"]]
    for row in rows:
        cells = [str(Timing(**row[name])) if name in row else "" for name in names]
        errors = [f"{row[f'error {m}']:.3f}" if f"error {m}" in row else "" for m in (4, 16)]
        lines.append([f"{row['nodes']:,}", *cells, *errors])
    found = []
    for m in ("4 walks", "16 walks"):
        at = ", ".join(f"{name} {crossover(rows, m, name)}" for name in names if not name.endswith("walks"))
        found.append(f"Nodes from which features of {m} and a product are faster: {at}.")
    about = (
        "A kernel and its product with a vector: heat for features, exponentials and eigh; (I - W / 2)^-1 for inverse "
        "and solve. expm_multiply and solve make no kernel: each further vector costs them as much, features only a "
        "product with them."
    )
    return "\n\n".join([about, table(lines), *found])


def crossover(rows: list[dict[str, Any]], ours: str, theirs: str) -> str:
    """The number of nodes from which ours stays faster, between measured ones on straight lines of logarithms."""
    both = [(row["nodes"], row[ours]["median"] / row[theirs]["median"]) for row in rows if theirs in row]
    if both[-1][1] >= 1:
        return f"> {both[-1][0]}"
    for (n, ratio), (after, then) in itertools.pairwise(reversed(both)):
        if then >= 1:
            share = math.log(then) / math.log(then / ratio)
            return f"{after * (n / after) ** share:.0f}"
    return f"< {both[0][0]}"


def _large_text(rows: list[dict[str, Any]], one_thread: bool) -> str:
    targets = {"features from the": f"{FEATURES_TARGET * 1e3:.0f}", "product with a ve": f"{PRODUCT_TARGET * 1e3:.0f}"}
    lines = [["a large graph, 4 walks each", "ms", "target"]]
    for row in rows:
        timing = Timing(row["median"], row["low"], row["high"])
        lines.append([row["what"], str(timing), targets.get(row["what"][:17], "")])
    return table(lines)


def _memory_text(rows: list[dict[str, Any]], one_thread: bool) -> str:
    lines = [["peak memory", "result, MB", "peak over result", "target"]]
    for row in rows:
        ratio = "not available" if row["x"] is None else f"{row['x']:.2f}"
        lines.append([row["what"], f"{row['MB']:.0f}", ratio, f"{MEMORY_TARGET:g}"])
    return table(lines)


def _streaming_text(rows: list[dict[str, Any]], one_thread: bool) -> str:
    lines = [["edges changed", "walks simulated", "update", "matrix and walks anew", "x"]]
    for row in rows:
        ours, theirs = Timing(**row["update"]), Timing(**row["anew"])
        ratio = f"{theirs.median / ours.median:.1f}"
        lines.append([f"{row['edges']:,}", f"{row['walks']:,}", str(ours), str(theirs), ratio])
    return table(lines)


TEXTS = {
    "sampling": _sampling_text,
    "exact": _exact_text,
    "large": _large_text,
    "memory": _memory_text,
    "streaming": _streaming_text,
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time and error over the number of nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4))
    names = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    for name in names:
        at = [row for row in rows if name in row]
        style = "o-" if name.endswith("walks") else "s--"
        label = f"features of {name}" if name.endswith("walks") else name
        left.plot([row["nodes"] for row in at], [row[name]["median"] for row in at], style, ms=4, lw=1.3, label=label)
    left.set(xscale="log", yscale="log", xlabel="nodes", ylabel="ms, kernel and a product with a vector")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    for num_walks in (4, 16):
        at = [row for row in rows if f"error {num_walks}" in row]
        errors = [row[f"error {num_walks}"] for row in at]
        right.plot([row["nodes"] for row in at], errors, "o-", ms=4, lw=1.3, label=f"features of {num_walks} walks")
    right.set(xscale="log", xlabel="nodes", ylabel="relative Frobenius error, heat kernel", xlim=left.get_xlim())
    right.set_ylim(bottom=0)
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
