"""The page and the plot of ``bench tensor-products``, from its rows."""

from __future__ import annotations

import argparse
import datetime
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from geo.bench import machine, table
from geo.bench.tensor_product_problems import count_paths

SINGLE = ("siso", "simo", "mimo")
TITLES = {"forward": "forward", "backward": "forward + backward", "double": "forward + backward + double backward"}
KINDS = {
    "even": "even paths: the product on the sphere",
    "odd": "odd paths: the bracket",
    "all": "all paths: product and bracket",
    "gaunt even": "Gaunt product in place of the even paths: another function, one output a degree",
    "gaunt all": "Gaunt product and bracket in place of all paths: another function, two outputs a degree",
}
FAMILIES = (
    "geo layer",
    "geo",
    "e3nn TensorProduct",
    "e3nn FullTensorProduct",
    "torch grid",
    "torch dense tensor",
    "cuEquivariance",
    "OpenEquivariance",
)
Row = dict[str, Any]


def introduction(args: argparse.Namespace) -> str:
    """Title, machine and settings."""
    tunables = os.environ.get("GLIBC_TUNABLES")
    title = f"## tensor products, {datetime.date.today().isoformat()}"
    where = machine(args.device) + (f", GLIBC_TUNABLES={tunables}" if tunables else "")
    clock, root = args.clock if args.device == "cpu" else "GPU", math.isqrt(args.channels)
    text = (
        f"{args.dtype}. Rows x channels: uuu and uvu {args.batch} x {args.channels}, full {args.batch} x {root} x "
        f"{root}, siso, simo and mimo {args.single_batch} x 1; conv: {args.edges} edges, {args.nodes} nodes, "
        f"{args.conv_channels} channels. Inputs up to degree L; outputs up to L, in simo and mimo up to 2L. Median "
        f"{clock} ms of up to {args.rounds * args.calls} calls, interleaved; spread, error against float64 and "
        "more are in the CSV. In brackets: the time of the fastest e3nn TensorProduct of the same function over this "
        "one. Memory: the peak beyond inputs and results."
    )
    return "\n\n".join((title, where, text))


def page(found: Sequence[Row]) -> str:
    """Markdown of all tables."""
    parts = []
    aims = targets(found)
    if aims:
        reached = sum(row[-1] == "yes" for row in aims)
        head = ["what", "L", "ratio", "target", "reached"]
        parts.append(f"### Targets: {reached} of {len(aims)} reached\n\n{table([head, *aims])}")
    for mode, direction in dict.fromkeys((row["mode"], row["direction"]) for row in found):
        some = [row for row in found if (row["mode"], row["direction"]) == (mode, direction)]
        parts.append(f"### {mode}, {TITLES[direction]}")
        for kind in dict.fromkeys(row["kind"] for row in some):
            here = [row for row in some if row["kind"] == kind]
            parts.append(f"{KINDS[kind][0].upper()}{KINDS[kind][1:]}. ms\n\n{table(_pivot(here, _time(some)))}")
            if mode in SINGLE:
                parts.append(f"The same, microseconds per output irrep\n\n{table(_pivot(here, _per_output))}")
            if any(row["memory"] != "" for row in here if row["status"] == "ok"):
                parts.append(f"The same, MiB\n\n{table(_pivot(here, _memory))}")
    notes = _listed("note", [row for row in found if row["note"]])
    absent = _listed("status", [row for row in found if row["status"] != "ok"])
    parts.append(f"### Expressivity: couplings reached, all degrees up to L\n\n{expressivity(found)}")
    parts += [f"### Notes\n\n{notes}"] * bool(notes) + [f"### Not timed\n\n{absent}"] * bool(absent)
    return "\n" + "\n\n".join(parts)


def _listed(key: str, found: Sequence[Row]) -> str:
    """Lines of what the rows say under a key, with the modes and degrees where they say it."""
    said: dict[tuple[str, str], dict[str, set[int]]] = {}
    for row in found:
        said.setdefault((row["method"], row[key]), {}).setdefault(row["mode"], set()).add(row["lmax"])
    return "\n".join(
        f"- {method}: {text} ({'; '.join(f'{mode} L = {_numbers(degrees)}' for mode, degrees in where.items())})"
        for (method, text), where in said.items()
    )


def _numbers(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def expressivity(found: Sequence[Row]) -> str:
    """A table of the couplings that each kind of product has."""
    lines = [["L", "Gaunt product (even)", "bracket (odd)", "both = Clebsch-Gordan"]]
    for lmax in sorted({row["lmax"] for row in found}):
        even, odd = count_paths(lmax)
        lines.append([str(lmax), str(even), str(odd), str(even + odd)])
    return table(lines)


def _pivot(found: Sequence[Row], cell: Callable[[Row], str]) -> list[list[str]]:
    """A line for each method, a column for each lmax."""
    degrees = sorted({row["lmax"] for row in found})
    lines = [["method", *(f"L = {lmax}" for lmax in degrees)]]
    for method in dict.fromkeys(row["method"] for row in found):
        cells = {row["lmax"]: cell(row) if row["status"] == "ok" else "-" for row in found if row["method"] == method}
        lines.append([method, *(cells.get(lmax, "-") for lmax in degrees)])
    paths = {row["lmax"]: str(row["paths"]) for row in found}
    lines.append(["couplings", *(paths[lmax] for lmax in degrees)])
    return lines


def _time(found: Sequence[Row]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        e3nn = best(found, "e3nn TensorProduct", lmax=row["lmax"], kind=row["kind"])
        return _digits(row["ms"]) + ("" if e3nn is None else f" ({_digits(e3nn / row['ms'])}x)")

    return cell


def _per_output(row: Row) -> str:
    return _digits(row["us_per_output"])


def _memory(row: Row) -> str:
    return "-" if row["memory"] == "" else f"{row['memory'] / 2**20:.1f}"


def _digits(value: float) -> str:
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def best(found: Sequence[Row], prefix: str, **wanted: Any) -> float | None:
    """The least time of methods that begin so, in the rows that are as wanted."""
    times = [
        row["ms"]
        for row in found
        if row["status"] == "ok"
        and row["method"].startswith(prefix)
        and all(row[key] == value for key, value in wanted.items())
    ]
    return min(times, default=None)


def targets(found: Sequence[Row]) -> list[list[str]]:
    """The ratios that were aimed at, for what was measured, and whether they were reached."""
    lines = []

    def add(what: str, lmax: int, over: float | None, under: float | None, target: float, most: bool = False) -> None:
        if over is None or under is None:
            return
        ratio = over / under
        reached = ratio <= target if most else ratio >= target
        limit = f"{'<=' if most else '>='} {target:g}"
        lines.append([what, str(lmax), _digits(ratio), limit, "yes" if reached else "no"])

    e3nn, grid, ours = "e3nn TensorProduct", "torch grid", "geo auto"
    aims = {
        "forward": dict.fromkeys((2, 3, 4, 5, 6), 40.0),
        "backward": {2: 12.0, 4: 25.0, 6: 60.0},
        "double": dict.fromkeys((2, 3, 4), 10.0),
    }
    for direction, wanted in aims.items():
        for lmax, target in wanted.items():
            here = [row for row in found if (row["mode"], row["lmax"], row["direction"]) == ("uuu", lmax, direction)]
            even, odd = best(here, ours, kind="even"), best(here, ours, kind="odd")
            title = TITLES[direction]
            add(f"uuu {title}, e3nn / geo auto", lmax, best(here, e3nn, kind="even"), even, target)
            if (direction, lmax) == ("forward", 4):
                add(f"uuu {title}, best torch grid / geo auto", lmax, best(here, grid, kind="even"), even, 4)
            add(f"uuu {title}, bracket / product", lmax, odd, even, 3, most=True)
    for direction in ("forward", "backward"):
        for lmax in (1, 2, 3):
            here = [row for row in found if (row["mode"], row["lmax"], row["direction"]) == ("conv", lmax, direction)]
            for kind in ("even", "all"):
                conv = best(here, "geo TensorProductConv", kind=kind)
                what = f"conv {TITLES[direction]}, {kind} paths, e3nn + index_add / TensorProductConv"
                add(what, lmax, best(here, e3nn, kind=kind), conv, 5)
    for lmax, microseconds in ((4, 100.0), (8, 450.0)):
        here = [row for row in found if row["device"] == "cuda" and row["rows"] * row["channels"] == 10**6]
        time = best(here, ours, mode="uuu", lmax=lmax, direction="forward", kind="even")
        add(
            "uuu forward, a million channels, us",
            lmax,
            None if time is None else time * 1e3,
            1.0,
            microseconds,
            most=True,
        )
    return lines


def plot(found: Sequence[Row], path: Path) -> None:
    """Time, and time per output irrep, against lmax: of each family its fastest member."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'torch-geo[train]'") from error
    modes, directions = (list(dict.fromkeys(row[key] for row in found)) for key in ("mode", "direction"))
    size = (4.8 * len(directions), 7 * len(modes) + 1.5)
    figure, axes = plt.subplots(2 * len(modes), len(directions), figsize=size, squeeze=False)
    handles: dict[str, Any] = {}
    for i, mode in enumerate(modes):
        for pair, direction in zip(axes[2 * i : 2 * i + 2].T, directions, strict=True):
            for (kind, family), times in sorted(curves(found, mode, direction).items()):
                style = {"color": f"C{FAMILIES.index(family)}", "ls": {"even": "-", "odd": ":"}.get(kind, "--")}
                style |= {"marker": "x" if kind.startswith("gaunt") else "."}
                for axis, values in zip(pair, zip(*times.values(), strict=True), strict=True):
                    (handles[f"{family}, {kind}"],) = axis.plot(list(times), values, **style)
            degrees = sorted({row["lmax"] for row in found if row["mode"] == mode})
            for axis, label in zip(pair, ("ms", "us per output irrep"), strict=True):
                axis.set(title=f"{mode}, {direction}", xlabel="lmax", ylabel=label, xticks=degrees, yscale="log")
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(directions) + 1, fontsize="small")
    lines = math.ceil(len(handles) / (len(directions) + 1))
    figure.tight_layout(rect=(0, (0.22 * lines + 0.2) / size[1], 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def curves(found: Sequence[Row], mode: str, direction: str) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    """By kind and family, at each lmax: the least ms, and the least microseconds per output irrep."""
    lines: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for row in found:
        if (row["mode"], row["direction"], row["status"]) != (mode, direction, "ok"):
            continue
        family = next(name for name in FAMILIES if row["method"].startswith(name))
        line = lines.setdefault((row["kind"], family), {})
        ms, each = line.get(row["lmax"], (math.inf, math.inf))
        line[row["lmax"]] = min(ms, row["ms"]), min(each, row["us_per_output"])
    return lines
