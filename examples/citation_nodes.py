"""Topics of papers that cite each other: GraphSAGE with aggregations that are monoids, against mean, max and PyG's LCM.

Two SAGEConv layers of PyTorch Geometric, that differ in ``aggr=`` alone:

  mean, max, sum  PyG's
  lcm             PyG's LCMAggregation: a learned operator along a tree, padded to the largest number of neighbours
  gru             geo.nn.MonoidAggregation with the same operator, BinaryGRU: nothing is padded
  gru-random      the same, neighbours shuffled in each step of training
  logsumexp       an exact monoid, the soft maximum with a learned temperature
  ksmallest       an exact monoid, the two smallest values of each channel

Besides the accuracy the table has what happens to far papers when the paper with the most neighbours loses them: as no
path of two steps leads there, their outputs should not change. Those of padded trees do.

  made      default: a graph that grows here. Each new paper cites 1 to 5 earlier ones, most of its own topic, by how
            often they are cited already, and draws its words from those of its topic. Averaging is what such words
            ask for, so accuracies here say little about real papers
  cora      2,708 papers, 1,433 words, 7 topics, in the files of PyG's Planetoid: DIR/Cora/raw/ind.cora.*. citeseer and
            pubmed alike

20 papers of each topic are known. Split 0 of cora, citeseer and pubmed is the published one, all others are drawn.

  python examples/citation_nodes.py                       # five minutes, most of it PyG's LCM
  python examples/citation_nodes.py --root DIR            # cora; lcm takes nine minutes a run, the others seconds
  python examples/citation_nodes.py --root DIR --data citeseer --models mean,max,gru --splits 10 --runs 1
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.nn import LCMAggregation, SAGEConv
from torch_geometric.transforms import RandomNodeSplit
from torch_geometric.utils import degree, k_hop_subgraph, sort_edge_index

from geo.datasets import CitationGraph, DamagedFileError
from geo.nn import BinaryGRU, KSmallest, LogSumExp, MonoidAggregation
from geo.training import (
    Supervised,
    curve_plot,
    fit,
    positive_integer,
    read_log,
    report,
    save_weights,
    start,
    training_flags,
    write_atomic,
)

MODELS = {
    "mean": "mean",
    "max": "max",
    "sum": "sum",
    "lcm": "PyG's LCM",
    "gru": "BinaryGRU",
    "gru-random": "BinaryGRU, shuffled",
    "logsumexp": "LogSumExp",
    "ksmallest": "KSmallest(2)",
}
PEERS = ("mean", "max", "sum", "PyG's LCM")
CITATIONS = ("cora", "citeseer", "pubmed")
EPOCHS = 100
VALIDATE_EVERY = 2  # epochs


# -- data --------------------------------------------------------------------------------------------------------------
def made(num_papers: int, seed: int, num_topics: int = 6, num_words: int = 600) -> Data:
    """A citation graph by Price's rule: the more a paper is cited, the more often it is cited next."""
    random = np.random.default_rng(seed)
    topic = random.integers(num_topics, size=num_papers)
    cited = np.zeros(num_papers)
    pairs = []
    for new in range(1, num_papers):
        pull = (5 + cited[:new]) * np.where(topic[:new] == topic[new], 1, 0.15)
        old = random.choice(new, size=min(new, random.integers(1, 6)), replace=False, p=pull / pull.sum())
        cited[old] += 1
        pairs += [(new, paper) for paper in old]
    common = 1 / (10 + np.arange(num_words))  # a few words are in most papers, most words in a few
    shares = common * np.exp(random.standard_normal((num_topics, num_words)))
    shares /= shares.sum(axis=1, keepdims=True)
    x = np.stack([random.multinomial(12, shares[one]) > 0 for one in topic])
    edges = torch.tensor(np.array(pairs).T)
    return Data(torch.from_numpy(x).float(), torch.cat([edges, edges.flip(0)], dim=1), y=torch.from_numpy(topic))


def load(args: argparse.Namespace) -> Data:
    if args.data == "made":
        data = made(200 if args.smoke else 800, args.seed)
    else:
        try:
            data = CitationGraph(args.root, args.data)[0]
        except (FileNotFoundError, DamagedFileError) as error:
            raise SystemExit(str(error)) from error
    data.edge_index = sort_edge_index(data.edge_index, sort_by_row=False)  # PyG's LCM asks for sorted targets
    return words(data)


def words(data: Data) -> Data:
    """Few words are in a paper: the entries of the rows of ``x``, of length 1, those of a paper from ``first`` on."""
    x = F.normalize(data.x, dim=1)
    paper, data.word = x.nonzero(as_tuple=True)
    data.weight = x[paper, data.word]
    data.first = torch.searchsorted(paper, torch.arange(len(x)))
    return data


def split(data: Data, number: int, seed: int) -> Data:
    """Training, validation and test papers: the published ones, or 20 of each topic, 500 and 1,000 at random."""
    if number == 0 and "train_mask" in data:
        return data
    num_validated = min(500, data.num_nodes // 4)
    draw = RandomNodeSplit("random", num_train_per_class=20, num_val=num_validated, num_test=2 * num_validated)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + number)
        data = draw(copy.copy(data))
    for part in ("train", "val", "test"):
        data[f"{part}_mask"] = data[f"{part}_mask"] & (data.y >= 0)  # some papers have no topic
    return data


# -- model -------------------------------------------------------------------------------------------------------------
def aggregation(name: str, channels: int) -> Any:
    if name == "lcm":
        return LCMAggregation(channels, channels, project=False)
    if name == "gru":
        return MonoidAggregation(BinaryGRU(channels))
    if name == "gru-random":
        return MonoidAggregation(BinaryGRU(channels), order="random")
    if name == "logsumexp":
        return MonoidAggregation(LogSumExp(channels, temperature=0.1), identity="zero")
    if name == "ksmallest":
        return MonoidAggregation(KSmallest(2, top=5.0), channels, channels, project="linear")
    return name


class Classifier(nn.Module):
    """Words to a few channels, as a GRU on all words would be slow; then two layers."""

    def __init__(self, name: str, num_words: int, channels: int, num_topics: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.empty(num_words, channels))
        nn.init.xavier_uniform_(self.words)
        self.conv1 = SAGEConv(channels, channels, aggr=aggregation(name, channels))
        self.conv2 = SAGEConv(channels, num_topics, aggr=aggregation(name, channels))
        self.dropout = dropout

    def forward(self, batch: Any) -> Tensor:
        weight = self.drop(batch.weight)
        x = F.embedding_bag(batch.word, self.words, batch.first, mode="sum", per_sample_weights=weight).relu()
        x = self.conv1(self.drop(x), batch.edge_index).relu()
        return self.conv2(self.drop(x), batch.edge_index)

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def loss(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits[batch.mask], batch.y[batch.mask])


def accuracy(logits: Tensor, batch: Any) -> Tensor:
    return 100 * (logits[batch.mask].argmax(dim=-1) == batch.y[batch.mask]).float().mean()


@torch.no_grad()
def far_change(model: nn.Module, data: Data) -> tuple[float, int, int]:
    """What happens to far papers, those that two steps do not reach, when the paper with most neighbours loses them.

    The largest change of an output, how many papers get another topic, and how many are far.
    """
    hub = int(degree(data.edge_index[1], data.num_nodes).argmax())
    near = k_hop_subgraph(hub, 2, data.edge_index, num_nodes=data.num_nodes)[0]
    far = torch.ones(data.num_nodes, dtype=torch.bool, device=near.device)
    far[near] = False
    without = copy.copy(data)
    without.edge_index = data.edge_index[:, (data.edge_index != hub).all(dim=0)]
    before, after = model(data)[far], model(without)[far]
    moved = int((before.argmax(dim=-1) != after.argmax(dim=-1)).sum())
    return float((before - after).abs().max()) if len(before) else 0.0, moved, len(before)


def picture(path: Path, rows: list[list[Any]], scores: list[list[float]], title: str) -> None:
    """The accuracy of each model, a dot a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.4))
    for place, (row, values) in enumerate(zip(rows, scores, strict=True)):
        axis.barh(place, statistics.mean(values), color="C7" if row[0] in PEERS else "C0", alpha=0.5)
        axis.plot(values, [place] * len(values), "k.", label="a run" if place == 0 else None)
    seen = [value for values in scores for value in values]
    axis.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], xlabel="test accuracy (%)", title=title)
    axis.set_xlim(max(0, min(seen) - 3), min(100, max(seen) + 2))
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", choices=["made", *CITATIONS], default=None, help="(default: cora with --root, made without)"
    )
    parser.add_argument("--models", default="all", help=f"all, or of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument(
        "--splits", type=positive_integer, default=1, help="draws of known papers (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", type=positive_integer, default=3, help="draws of weights a split (default: %(default)s)"
    )
    parser.add_argument("--hidden", type=positive_integer, default=32, help="channels (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.5, help="(default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="(default: %(default)s)")
    training_flags(parser, out="runs/citation_nodes", batch_size=1, lr=2e-2, budget=f"{EPOCHS}")
    args = parser.parse_args(argv)
    names = list(MODELS) if args.models == "all" else [name.strip() for name in args.models.split(",") if name.strip()]
    if not names or [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {args.models}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must be at least 0 and below 1, got {args.dropout}")
    args.data = args.data or ("made" if args.root is None else "cora")
    if args.data in CITATIONS and args.root is None:
        parser.error(f"--data {args.data} needs --root, the folder that PyG's Planetoid was given")
    if args.smoke:
        args.splits = args.runs = 1
    start(args)

    data = load(args)
    num_topics = int(data.y.max()) + 1
    count = degree(data.edge_index[1], data.num_nodes)
    merges = int((count - 1).clamp(min=0).sum())
    padded = data.num_nodes * (int(count.max()) - 1)
    print(
        f"{args.data}: {data.num_nodes} papers, {data.num_edges // 2} edges, at most {int(count.max())} neighbours; "
        f"a layer merges {merges:,} times, padded {padded:,} times",
        flush=True,
    )

    every = 1 if args.smoke else min(VALIDATE_EVERY, args.epochs or VALIDATE_EVERY)
    rows: list[list[Any]] = []
    scores: list[list[float]] = []
    curves = {}
    for name in names:
        values, changes, moved, seconds, trained = [], [], [], 0.0, 0
        for number in range(args.splits):
            batch = Batch.from_data_list([split(data, number, args.seed)])
            graphs = {part: copy.copy(batch) for part in ("train", "val", "test")}
            for part, graph in graphs.items():
                graph.mask = graph[f"{part}_mask"]
            # the whole graph is a batch; a smoke run makes two steps
            train = DataLoader([graphs["train"]] * (2 if args.smoke else 1), batch_size=None)
            for draw in range(args.runs):
                torch.manual_seed(args.seed + draw)
                model = Classifier(name, data.x.size(1), args.hidden, num_topics, args.dropout)
                module = Supervised(model, loss, {"score": accuracy}, lr=args.lr, weight_decay=args.weight_decay)
                run = f"{name}-{number}-{draw}"
                began = time.perf_counter()
                fit(
                    module,
                    train,
                    DataLoader([graphs["val"]], batch_size=None),
                    args,
                    run,
                    epochs=EPOCHS,
                    validate_every=every,
                    monitor=("val_score", "max"),
                )
                seconds += time.perf_counter() - began
                trained += module.epochs_trained
                settings = {"model": name, "num_words": data.x.size(1), "num_topics": num_topics, "split": number}
                save_weights(module, {**settings, **vars(args)}, args.out / run)
                with torch.no_grad():
                    values.append(float(accuracy(module(graphs["test"]), graphs["test"])))
                change, others, num_far = far_change(module, graphs["test"])
                changes.append(change)
                moved.append(others)
                if number == draw == 0:
                    curves[MODELS[name]] = read_log(args.out / run, "val_score")
                print(f"{run}: test accuracy {values[-1]:.1f} %, change of far outputs {change:.2g}", flush=True)
        spread = round(statistics.stdev(values), 1) if len(values) > 1 else None
        size = sum(p.numel() for p in model.parameters())
        each = round(seconds / trained, 3) if trained else None
        measured = [round(statistics.mean(values), 1), spread, size, each]
        rows.append([MODELS[name], *measured, max(changes), round(statistics.mean(moved), 1)])
        scores.append(values)
    title = f"{args.data}, {data.num_nodes} papers, {num_topics} topics"
    picture(args.out / "accuracy.png", rows, scores, title)
    curve_plot(args.out / "learning.png", curves, "epoch", "validation accuracy (%)", title, log=False)
    setting = f"peak lr {args.lr}, weight decay {args.weight_decay}, {torch.get_num_threads()} threads"
    notes = [
        f"Splits {args.splits}, runs each {args.runs}, {args.hidden} channels, dropout {args.dropout}, {setting}.",
        f"Tested are the weights that score best on the validation papers, judged after every {every} epochs.",
        f"Change: the largest of an output of {num_far} papers when the most cited, over two steps away, is cut off;",
        "moved: how many papers get another topic by that, mean over runs.",
        f"A layer has {merges:,} merges; padded to {int(count.max())} neighbours {padded:,}.",
        f"Plots: {args.out}/accuracy.png, {args.out}/learning.png",
    ]
    header = ["aggregation", "accuracy (%)", "std", "parameters", "s/epoch", "change", "moved"]
    report(args, f"Test accuracy on {title}", header, rows, notes)
    return rows


if __name__ == "__main__":
    main()
