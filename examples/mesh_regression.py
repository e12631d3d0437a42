"""Predict hidden vertex normals of a mesh from the visible ones, with graph kernels from random walks.

A fifth of the vertices are hidden. The normal of hidden vertex i is predicted as sum_j K_ij n_j over the visible
vertices j, with the kernel K = (I - c W)^-2 of the mesh's edges, W the normalised adjacency matrix. Random walks
estimate K without a matrix of N x N numbers. The score is the mean cosine between true and predicted normals of the
hidden vertices. Compared are

  nearest visible vertex    by the length of the way along edges
  mean of the neighbours    the visible ones among the vertices one edge away
  exact kernel              its power series, summed up: cheap for a product, not for single entries
  random features           with 4, 16 and 64 walks from each vertex, independent or coupled
  learned modulation        random features of a series of five coefficients, learned from the visible normals alone

By default the meshes are a torus and a sphere, made on the spot; --root takes a folder of OFF and OBJ files. Where most
vertices are visible the mean of the neighbours is hard to beat; kernels are needed where most are hidden.

  python examples/mesh_regression.py
  python examples/mesh_regression.py --hidden 0.8 --c 0.8 --p-halt 0.2
  python examples/mesh_regression.py --root DIR                               # every mesh in DIR
  python examples/mesh_regression.py --root DIR --data bunny.off,torus
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor
from tqdm import tqdm

from geo.datasets.solids import revolve
from geo.kernels import GRFKernel, Series, SparseFeatures, normalized_adjacency, regularised_laplacian
from geo.nn import LearnableModulation
from geo.training import positive_integer, report, write_atomic

GENERATED = ("torus", "icosphere")
COUPLINGS = ("iid", "antithetic", "repelling", "antithetic+repelling")
BEST = COUPLINGS[-1]
LEARNED = 4  # the longest walks that the learned modulation counts
# What a NumPy prototype, written apart from this package, measured on a torus of 48 x 24 vertices with the defaults.
PROTOTYPE = {"exact kernel": 0.9988, ("iid", 4): 0.9855, ("iid", 16): 0.9967, ("iid", 64): 0.9983}
AZIMUTH, ELEVATION = -60, 25  # of the camera, degrees


class Mesh(NamedTuple):
    vertices: np.ndarray  # [N, 3]
    faces: np.ndarray  # [F, 3]
    edge_index: Tensor  # [2, E], both directions
    normals: Tensor  # [N, 3]; zero where the faces around a vertex have none


# -- meshes ------------------------------------------------------------------------------------------------------------
def read_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of an OFF or OBJ file; polygons are cut into triangles, colours and textures skipped."""
    text = path.read_text("utf-8", "replace").splitlines()
    lines = [(n, words) for n, line in enumerate(text, 1) if (words := line.split("#")[0].split())]
    number = 1
    points: list[list[float]] = []
    triangles: list[tuple[int, int, int]] = []

    def read(part: list[tuple[int, list[str]]]) -> Iterator[list[str]]:
        nonlocal number  # of the line that an error names
        for at, words in part:
            number = at
            yield words

    def add_point(words: list[str]) -> None:
        if len(words) < 3:
            raise ValueError(f"a vertex needs three coordinates, got {len(words)}")
        points.append([float(word) for word in words[:3]])

    def add_face(corners: list[int]) -> None:
        if len(corners) < 3:
            raise ValueError(f"a face needs three corners, got {len(corners)}")
        triangles.extend((corners[0], a, b) for a, b in itertools.pairwise(corners[1:]))

    try:
        if path.suffix.lower() == ".obj":
            for kind, *words in read(lines):
                if kind == "v":
                    add_point(words)
                elif kind == "f":
                    corners = [int(word.split("/")[0]) for word in words]
                    if 0 in corners:
                        raise ValueError("a face names vertex 0, but OBJ counts vertices from 1")
                    add_face([len(points) + corner if corner < 0 else corner - 1 for corner in corners])
        else:
            if not lines or lines[0][1][0] != "OFF":
                raise ValueError("the file must start with the word OFF")
            head = 1 if len(lines[0][1]) > 1 else 2  # the numbers may stand beside the word or on the next line
            counts = [word for words in read(lines[:head]) for word in words][1:]
            if len(counts) < 2:
                raise ValueError("the numbers of vertices and faces are missing")
            vertices, faces = int(counts[0]), int(counts[1])
            if min(vertices, faces) < 0 or len(lines) < head + vertices + faces:
                left = len(lines) - head
                raise ValueError(f"{vertices} vertices and {faces} faces are announced, but {left} lines follow")
            for words in read(lines[head : head + vertices]):
                add_point(words)
            for count, *words in read(lines[head + vertices : head + vertices + faces]):
                if len(words) < int(count):
                    raise ValueError(f"a face of {count} corners names only {len(words)}")
                add_face([int(word) for word in words[: int(count)]])
    except ValueError as error:
        raise SystemExit(f"{path}, line {number}: {error}") from error
    return _checked(path, np.array(points, dtype=np.float64), np.array(triangles, dtype=np.int64))


def _checked(path: Path, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(faces):
        raise SystemExit(f"{path}: has no faces, so its vertices have no normals")
    low, high = int(faces.min()), int(faces.max())
    if low < 0 or high >= len(vertices):
        bad = low if low < 0 else high
        raise SystemExit(f"{path}: a face names vertex {bad}, counted from 0, but there are {len(vertices)} vertices")
    if not np.isfinite(vertices).all():
        raise SystemExit(f"{path}: has coordinates that are infinite or not a number")
    return vertices, faces


def icosphere(times: int) -> tuple[np.ndarray, np.ndarray]:
    """An icosahedron with each triangle cut into four so many times, all vertices on the unit sphere."""
    golden = (1 + math.sqrt(5)) / 2
    corners = [(0, a, b) for a in (-1, 1) for b in (-golden, golden)]
    points = np.array([np.roll(corner, shift) for shift in range(3) for corner in corners], dtype=np.float64)
    close = np.isclose(np.linalg.norm(points[:, None] - points, axis=2), 2)
    triples = itertools.combinations(range(len(points)), 3)
    faces = np.array([(i, j, k) for i, j, k in triples if close[i, j] and close[j, k] and close[i, k]])
    inwards = np.linalg.det(points[faces]) < 0
    faces[inwards] = faces[inwards][:, ::-1]
    for _ in range(times):
        sides = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]], axis=2)
        edges, place = np.unique(sides.reshape(-1, 2), axis=0, return_inverse=True)
        middle = len(points) + place.reshape(-1, 3)  # the new vertices on the three sides
        points = np.concatenate([points, points[edges].mean(axis=1)])
        (a, b, c), (ab, bc, ca) = faces.T, middle.T
        faces = np.stack([a, ab, ca, b, bc, ab, c, ca, bc, ab, bc, ca], axis=1).reshape(-1, 3)
    return points / np.linalg.norm(points, axis=1, keepdims=True), faces


def load(name: str, args: argparse.Namespace) -> Mesh:
    if name == "torus":
        rings, angles = (24, 12) if args.smoke else (48, 24)
        angle = 2 * np.pi * np.arange(angles) / angles
        tube = np.stack([1 + 0.4 * np.cos(angle), 0.4 * np.sin(angle)], axis=1)
        vertices, faces = revolve(tube, closed=True, segments=rings)
    elif name == "icosphere":
        vertices, faces = icosphere(2 if args.smoke else 3)
    else:
        vertices, faces = read_mesh(args.root / name)
        used, faces = np.unique(faces, return_inverse=True)
        if len(used) < len(vertices):
            print(f"{name}: {len(vertices) - len(used)} vertices are in no face and left out")
        vertices, faces = vertices[used][:, [0, 2, 1]] * [1, -1, 1], faces.reshape(-1, 3)  # y points up in files
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    normals = np.zeros_like(vertices)
    for corner in faces.T:  # faces count by their area
        np.add.at(normals, corner, np.cross(b - a, c - a))
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.divide(normals, length, out=np.zeros_like(normals), where=length > 0)
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = np.unique(np.concatenate([sides, sides[:, ::-1]]), axis=0)
    edges = edges[edges[:, 0] != edges[:, 1]]
    return Mesh(vertices, faces, torch.from_numpy(edges.T.copy()), torch.from_numpy(normals))


# -- predictions -------------------------------------------------------------------------------------------------------
def nearest(mesh: Mesh, visible: Tensor) -> Tensor:
    """The normal of the visible vertex with the shortest way along edges; zero where there is no way."""
    i, j = mesh.edge_index.numpy()
    length = np.linalg.norm(mesh.vertices[i] - mesh.vertices[j], axis=1)
    ways = csr_array((length + 1e-12, (i, j)), shape=(len(mesh.vertices),) * 2)
    places = visible.nonzero().flatten().numpy()
    _, _, source = dijkstra(ways, indices=places, min_only=True, return_predecessors=True)
    source = torch.from_numpy(source).long()
    return torch.where((source >= 0).unsqueeze(1), mesh.normals[source.clamp(min=0)], 0.0)


def neighbour_mean(mesh: Mesh, given: Tensor) -> Tensor:
    i, j = mesh.edge_index
    return torch.zeros_like(given).index_add(0, i, given[j])


def exact(mesh: Mesh, given: Tensor, series: Series, terms: int) -> Tensor:
    """The product with the kernel itself: its power series, term by term."""
    rowptr, col, weight = normalized_adjacency(mesh.edge_index, num_nodes=len(given), dtype=torch.float64)
    matrix = SparseFeatures(rowptr, col, weight, len(given))
    out, power = torch.zeros_like(given), given
    for alpha in series.alpha(terms):
        out, power = out + alpha * power, matrix.matmul(power)
    return out


def learn(kernel: GRFKernel, mesh: Mesh, visible: Tensor, steps: int) -> GRFKernel:
    """The kernel whose modulation predicts each visible normal best from all the others, on the same walks."""
    modulation = LearnableModulation(LEARNED, "free", init=kernel.series).double()
    optimizer = torch.optim.LBFGS(modulation.parameters(), max_iter=steps, line_search_fn="strong_wolfe")
    given = mesh.normals * visible.unsqueeze(1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        learned = kernel.with_modulation(modulation())
        others = learned @ given - learned.diag().unsqueeze(1) * given
        value = 1 - torch.cosine_similarity(others, mesh.normals, dim=1)[visible].mean()
        value.backward()
        return value

    optimizer.step(loss)
    return kernel.with_modulation(modulation().detach())


def predictions(mesh: Mesh, visible: Tensor, args: argparse.Namespace, seed: int) -> Iterator[tuple[Any, Tensor]]:
    """Each way of predicting with the normals it gives."""
    given = mesh.normals * visible.unsqueeze(1)
    yield "nearest visible vertex", nearest(mesh, visible)
    yield "mean of the neighbours", neighbour_mean(mesh, given)
    terms = math.ceil(math.log(1e-14) / math.log(args.c)) + 16
    yield "exact kernel", exact(mesh, given, args.series, terms)
    for coupling in COUPLINGS:
        for walks in args.walks:
            kernel = GRFKernel(
                mesh.edge_index,
                args.series,
                num_nodes=len(given),
                num_walks=walks,
                p_halt=args.p_halt,
                coupling=coupling,
                two_sets=False,  # entries off the diagonal are unbiased with one set, too
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
            yield (coupling, walks), kernel @ given
            if coupling == BEST and walks == args.shown:
                yield "learned modulation", learn(kernel, mesh, visible, args.steps) @ given


# -- pictures ----------------------------------------------------------------------------------------------------------
def picture(path: Path, shown: dict[str, tuple[Mesh, Tensor, Tensor, float]], walks: int) -> None:
    """A row for each mesh: true normals as colours, predicted ones, and the angles between them where hidden."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    figure = plt.figure(figsize=(11, 3.3 * len(shown)), layout="constrained")
    azimuth, elevation = math.radians(AZIMUTH), math.radians(ELEVATION)
    eye = np.array([math.cos(azimuth), math.sin(azimuth), math.tan(elevation)]) * math.cos(elevation)
    for row, (name, (mesh, visible, predicted, score)) in enumerate(shown.items()):
        true, hidden = mesh.normals.numpy(), ~visible.numpy()
        guess = np.where(hidden[:, None], torch.nn.functional.normalize(predicted, dim=1).numpy(), true)
        angle = np.degrees(np.arccos(np.clip((guess * true).sum(1), -1, 1)))
        corners = mesh.vertices[mesh.faces]
        front = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) @ eye > 0
        dots = hidden & (true @ eye > 0.1)
        low, high = mesh.vertices.min(0), mesh.vertices.max(0)
        titles = (f"{name}: true normals", f"predicted, cosine {score:.4f} (dots: hidden)", "angle between (degrees)")
        for column, title in enumerate(titles):
            axis: Any = figure.add_subplot(len(shown), 3, 3 * row + column + 1, projection="3d", proj_type="ortho")
            axis.computed_zorder = False  # dots are drawn after faces
            normals = (true, guess, np.zeros_like(true))[column][mesh.faces[front]].mean(1)
            colours = np.clip((normals + 1) / 2, 0, 1) if column < 2 else np.full_like(normals, 0.85)
            axis.add_collection3d(Poly3DCollection(corners[front], facecolors=colours, edgecolors=colours, lw=0.2))
            if column == 1:
                axis.scatter(
                    *mesh.vertices[dots].T, s=min(4, 800 / max(1, dots.sum())), c="k", depthshade=False, zorder=2
                )
            elif column == 2:
                top = max(1.0, float(np.quantile(angle[hidden], 0.98)))
                style: Any = {"cmap": "viridis_r", "vmin": 0, "vmax": top, "depthshade": False, "zorder": 2}
                points = axis.scatter(
                    *mesh.vertices[dots].T, s=min(8, 6000 / max(1, dots.sum())), c=angle[dots], **style
                )
                figure.colorbar(points, ax=axis, shrink=0.6, extend="max")
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
            axis.set_box_aspect(high - low, zoom=1.1)
            axis.view_init(ELEVATION, AZIMUTH)
            axis.set_axis_off()
            axis.set_title(title, fontsize=9)
    figure.suptitle(
        f"Normals as colours; predicted by random features with {walks} walks from each vertex", fontsize=10
    )
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def walk_plot(path: Path, scores: dict[str, dict[Any, list[float]]], args: argparse.Namespace) -> None:
    """What is lost against the number of walks, by coupling; a panel for each mesh."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, (name, found) in zip(axes.flat, scores.items(), strict=False):
        for coupling in COUPLINGS:
            axis.plot(args.walks, [1 - statistics.mean(found[coupling, m]) for m in args.walks], ".-", label=coupling)
        for label, style in (("exact kernel", "k--"), ("nearest visible vertex", "k:")):
            axis.plot(args.walks, [1 - statistics.mean(found[label])] * len(args.walks), style, lw=1, label=label)
        axis.plot(args.shown, 1 - statistics.mean(found["learned modulation"]), "k*", label="learned modulation")
        axis.set(xscale="log", yscale="log", xlabel="walks from each vertex", ylabel="1 - mean cosine", title=name)
        axis.set_xticks(args.walks, [str(m) for m in args.walks], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_axis_off()
    axes[0, 0].legend(fontsize=7)
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def even_numbers(text: str) -> list[int]:
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        values = []
    if not values or any(value < 2 or value % 2 for value in values):
        raise argparse.ArgumentTypeError(
            f"must be even numbers with commas, such as 4,16,64 (walks pair), got {text!r}"
        )
    return values


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, both excluded, got {text!r}")
    return value


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        default=None,
        help=f"of {', '.join(GENERATED)} and files in --root, with commas (default: all files, without --root both)",
    )
    parser.add_argument("--root", type=Path, default=None, help="folder of .off and .obj files")
    parser.add_argument("--hidden", type=share, default=0.2, help="share of hidden vertices (default: %(default)s)")
    parser.add_argument(
        "--c", type=share, default=0.25, help="range of the kernel, between 0 and 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--p-halt",
        type=share,
        default=0.5,
        help="probability that a walk ends at each step; below 1 - c^2 (default: %(default)s)",
    )
    parser.add_argument(
        "--walks", type=even_numbers, default="4,16,64", help="walks from each vertex (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=positive_integer, default=3, help="draws of hidden vertices and walks (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_integer, default=20, help="of learning the modulation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first draw (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="small meshes, one draw, two steps: does it run at all?")
    parser.add_argument("--threads", type=positive_integer, default=None, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/mesh_regression"),
        help="folder for plots and table (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    files = sorted(p.name for p in args.root.glob("*") if p.suffix.lower() in (".off", ".obj")) if args.root else []
    names = list(GENERATED) if args.root is None else files
    if args.data is not None:
        names = [name.strip() for name in args.data.split(",") if name.strip()]
    if unknown := [name for name in names if name not in (*GENERATED, *files)]:
        there = f"{args.root} has {', '.join(files) or 'none'}" if args.root else "--root is not given"
        parser.error(f"--data must be of {', '.join(GENERATED)} and files; got {', '.join(unknown)}, but {there}")
    if not names:
        parser.error(f"no meshes: {args.root} has no .off or .obj files" if args.data is None else "--data is empty")
    if args.smoke:
        args.repeats, args.steps = 1, 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.shown = 16 if 16 in args.walks else args.walks[-1]
    args.series = regularised_laplacian(s=math.sqrt(args.c / (1 - args.c)), d=2.0)  # (I - c W)^-2, up to a factor

    scores: dict[str, dict[Any, list[float]]] = {}
    shown = {}
    meshes = {name: load(name, args) for name in names}
    ways = 4 + len(COUPLINGS) * len(args.walks)
    bar = tqdm(total=len(names) * args.repeats * ways, disable=not sys.stderr.isatty())
    for name, mesh in meshes.items():
        bar.set_description(name)
        found: dict[Any, list[float]] = {}
        usable = mesh.normals.any(dim=1).nonzero().flatten()  # where faces cancel there is nothing to predict
        for seed in range(args.seed, args.seed + args.repeats):
            generator = torch.Generator().manual_seed(seed)
            hidden = usable[torch.randperm(len(usable), generator=generator)[: round(args.hidden * len(usable))]]
            visible = torch.ones(len(mesh.vertices), dtype=torch.bool)
            visible[hidden] = False
            for way, predicted in predictions(mesh, visible, args, seed):
                cosine = torch.cosine_similarity(predicted, mesh.normals, dim=1)[hidden].mean()
                found.setdefault(way, []).append(float(cosine))
                if way == (BEST, args.shown):
                    shown[name] = mesh, visible, predicted, float(cosine)
                bar.update()
        scores[name] = found
        size = f"{len(mesh.vertices)} vertices, {mesh.edge_index.size(1) // 2} edges"
        bar.write(f"{name}: {size}; cosine {statistics.mean(found[BEST, args.shown]):.4f} with {args.shown} walks")
    bar.close()
    picture(args.out / "normals.png", shown, args.shown)
    walk_plot(args.out / "walks.png", scores, args)

    setting = (args.hidden, args.c, args.p_halt)
    comparable = "torus" in names and setting == (0.2, 0.25, 0.5) and not args.smoke
    chosen: list[Any] = ["nearest visible vertex", "mean of the neighbours", "exact kernel"]
    for coupling in COUPLINGS:
        chosen += [(coupling, m) for m in args.walks if coupling in ("iid", BEST) or m == args.shown]
    rows: list[list[object]] = []
    for way in [*chosen, "learned modulation"]:
        label, walks = (f"random features, {way[0]}", way[1]) if isinstance(way, tuple) else (way, None)
        walks = args.shown if way == "learned modulation" else walks
        means = [round(statistics.mean(scores[name][way]), 4) for name in names]
        rows.append([label, walks, *means, *([PROTOTYPE.get(way)] if comparable else [])])
    draws = f"{args.repeats} draws of hidden vertices and walks, seeds from {args.seed}"
    learned = f"modulation learned in {args.steps} steps on visible normals, lengths up to {LEARNED}"
    notes = [
        f"Mean cosine of predicted and true normals where hidden, {args.hidden:.0%} of the vertices; {draws}.",
        f"Kernel (I - c W)^-2 with c {args.c}, halting probability {args.p_halt}, one set of walks; {learned}.",
        f"Plots: {args.out}/normals.png, {args.out}/walks.png",
    ]
    if args.repeats > 1:
        spread = max(statistics.stdev(values) for found in scores.values() for values in found.values())
        notes.insert(1, f"The largest standard deviation over draws is {spread:.4f}.")
    if comparable:
        notes.insert(-1, "Prototype: NumPy, written apart from this package; its walks are independent.")
    header = [
        "prediction",
        "walks",
        *(Path(name).stem for name in names),
        *(["torus, prototype"] if comparable else []),
    ]
    report(args, "Normals of hidden vertices, mean cosine", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
