r"""Learn the second smallest number of a multiset, with eight aggregations and one encoder and decoder.

Numbers come as their bits, and so does the answer: what a sum or a maximum of learned codes must squeeze into one
vector, a binary operator may work out pair by pair. The task is that of https://arxiv.org/abs/2212.08541. Training
sets have 2 to 16 numbers, fresh ones in each step; test sets up to 128. With --task neighbours the numbers sit on the
nodes of random graphs, and each node is asked for the second smallest of its neighbours, of which it has 2 to 16 in
training: the same aggregations, as aggr= of a layer of PyG.

  sum, max, mean   PyG's
  pna              PyG's mean, max, min and deviation, each with three scalers of the size
  gru              PyG's GRUAggregation, one element after the other
  set_transformer  PyG's SetTransformerAggregation, attention among all elements
  binary_gru       geo.nn.MonoidAggregation(BinaryGRU): a learned operator along balanced trees
  k_smallest       geo.nn.MonoidAggregation(KSmallest(2)): it knows the order of numbers by construction. A linear map
                   makes one number of the bits, and the second smallest is read as the answer; all that is learned,
                   from equal weights, is how much each bit counts

Models are compared after equal steps and after equal time. So that one run serves for both, the learning rate is
constant, and the weights that are tested are moving averages: what stands at a step of the log is what a run of that
length gives. Time is that of the training steps alone, on a CPU as CPU seconds, which other programs on the machine do
not count for, so --max-time, too, is more by the clock on the wall. It runs on one thread unless --threads is given.

Each run logs its accuracies in OUT/MODEL-SEED/accuracy.csv. With --resume finished runs are not repeated, and those
of other calls serve in the table, so that runs may be started one by one.

--batch-size counts multisets, or the nodes of a graph.

  python examples/multiset_tasks.py                                    # 1 minute each, about 12 minutes
  python examples/multiset_tasks.py --task neighbours
  python examples/multiset_tasks.py --max-time 00:00:10:00 --seeds 3 --out runs/multiset_long
  python examples/multiset_tasks.py --max-time 00:00:10:00 --seed 2 --models gru --out runs/multiset_long

The long schedule of PyG's example, on a GPU; call it again with --resume after an interruption:

  python examples/multiset_tasks.py --models binary_gru --hidden 128 --train 65536 --epochs 1000 --batch-size 128 \
      --lr 1e-4 --accelerator gpu --out runs/multiset_gpu
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.nn import SimpleConv
from torch_geometric.nn.aggr import (
    Aggregation,
    DegreeScalerAggregation,
    GRUAggregation,
    MaxAggregation,
    MeanAggregation,
    SetTransformerAggregation,
    SumAggregation,
)

from geo.nn import BinaryGRU, KSmallest, MonoidAggregation
from geo.training import Supervised, fit, report, save_weights, start, training_flags, write_atomic

MODELS = {
    "sum": "sum",
    "max": "max",
    "mean": "mean",
    "pna": "PNA",
    "gru": "GRU",
    "set_transformer": "SetTransformer",
    "binary_gru": "BinaryGRU monoid",
    "k_smallest": "KSmallest(2), linear codec",
}
COLOUR = {name: f"C{place}" for place, name in enumerate(MODELS)}
COMMONEST = "always the commonest answer"
SMALLEST, LARGEST = 2, 16  # sizes in training
SIZES = (8, 16, 32, 64, 128)  # in tests
EPOCH = 100  # steps, where each draws new multisets
HEADS = 4
WARMUP = 100  # steps
EMA = 0.99
SECONDS = 60.0


class Learner(nn.Module):
    """Bits of numbers, encoder, aggregation, decoder, bits of the second smallest; called with a batch.

    With ``k_smallest`` a number is encoded as one number, and the output is the two smallest.
    """

    def __init__(self, name: str, task: str, bits: int, hidden: int) -> None:
        super().__init__()
        aggregation: Aggregation
        self.encoder: nn.Module = nn.Sequential(nn.Linear(bits, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        width = hidden
        if name == "pna":
            sizes = torch.zeros(LARGEST + 1, dtype=torch.long)
            sizes[SMALLEST:] = 1
            scalers = ["identity", "amplification", "attenuation"]
            aggregation = DegreeScalerAggregation(["mean", "max", "min", "std"], scalers, sizes)
            width = 12 * hidden
        elif name == "gru":
            aggregation = GRUAggregation(hidden, hidden)
        elif name == "set_transformer":
            aggregation = SetTransformerAggregation(hidden, heads=HEADS)
        elif name == "binary_gru":
            aggregation = MonoidAggregation(BinaryGRU(hidden), identity="zero")
        elif name == "k_smallest":
            aggregation = MonoidAggregation(KSmallest(2))
        else:
            aggregation = {"sum": SumAggregation, "max": MaxAggregation, "mean": MeanAggregation}[name]()
        self.decoder: nn.Module = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, bits))
        if name == "k_smallest":
            self.encoder, self.decoder = nn.Linear(bits, 1), nn.Identity()
            nn.init.constant_(self.encoder.weight, 1 / bits)
        self.aggregation = SimpleConv(aggregation) if task == "neighbours" else aggregation

    def forward(self, batch: Data) -> Tensor:
        x = self.encoder(batch.x)
        if isinstance(self.aggregation, SimpleConv):
            return self.decoder(self.aggregation(x, batch.edge_index))
        return self.decoder(self.aggregation(x, batch.index, dim_size=batch.num_graphs))


def as_bits(numbers: Tensor, bits: int) -> Tensor:
    return (numbers.unsqueeze(-1) >> torch.arange(bits, device=numbers.device)) & 1


def bit_loss(prediction: Tensor, batch: Data) -> Tensor:
    return F.binary_cross_entropy_with_logits(prediction, as_bits(batch.y, prediction.size(1)).to(prediction))


def right_bits(prediction: Tensor, batch: Data) -> Tensor:
    return ((prediction > 0) == as_bits(batch.y, prediction.size(1)).bool()).all(1)


def number_loss(prediction: Tensor, batch: Data) -> Tensor:
    return F.mse_loss(prediction[:, 1], batch.y / 2.0**batch.bits)


def right_number(prediction: Tensor, batch: Data) -> Tensor:
    return (prediction[:, 1] * 2**batch.bits).round().long() == batch.y


def draw(args: argparse.Namespace, seed: int, sizes: tuple[int, int] | None = None) -> Data:
    """A batch for a seed, the same for all models: multisets of one size, or a graph; by default for training."""
    generator = torch.Generator().manual_seed(seed)
    low, high = sizes or (SMALLEST, LARGEST)
    num = args.batch_size
    if args.task == "set":
        size = int(torch.randint(low, high + 1, (), generator=generator))
        numbers = torch.randint(2**args.bits, (num, size), generator=generator)
        batch = Data(index=torch.arange(num).repeat_interleave(size))
        second = numbers.topk(2, largest=False).values[:, 1]
        numbers = numbers.flatten()
    else:
        num = max(num, 8 * high)  # so that nodes share few neighbours
        numbers = torch.randint(2**args.bits, (num,), generator=generator)
        degree = torch.randint(low, high + 1, (num, 1), generator=generator)
        chance = torch.rand(num, num, generator=generator).fill_diagonal_(-1.0)
        neighbour = chance.topk(high).indices
        there = torch.arange(high) < degree
        batch = Data(edge_index=torch.stack([neighbour[there], there.nonzero()[:, 0]]))
        second = numbers[neighbour].masked_fill(~there, 2**args.bits).topk(2, largest=False).values[:, 1]
    batch.x = 2.0 * as_bits(numbers, args.bits) - 1.0
    batch.y, batch.bits, batch.num_graphs, batch.num_nodes = second, args.bits, num, len(numbers)
    return batch


def tests(args: argparse.Namespace) -> dict[int, list[Data]]:
    """Test batches by size, the same for all models and seeds."""
    lowest = {size: size if args.task == "set" else size // 2 + 1 for size in SIZES}
    found: dict[int, list[Data]] = {size: [] for size in SIZES}
    for size, batches in found.items():
        while sum(batch.num_graphs for batch in batches) < (1 if args.smoke else 1024):
            batches.append(draw(args, -1 - 1000 * size - len(batches), (lowest[size], size)))
    return found


def commonest(test: dict[int, list[Data]]) -> list[float]:
    """The accuracy of the one answer that is right most often at each size."""
    answers = [torch.cat([batch.y for batch in batches]) for batches in test.values()]
    return [round(100 * (y == y.mode().values).double().mean().item(), 1) for y in answers]


class Log:
    """The accuracies of a run: rows of step, seconds, and the percentage of right answers for each test size."""

    header = ("step", "seconds", *map(str, SIZES))

    def __init__(self, folder: Path) -> None:
        self.path = folder / "accuracy.csv"

    def read(self) -> list[list[float]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as handle:
            lines = list(csv.reader(handle))[1:]
        return [[float(cell) for cell in line] for line in lines if len(line) == len(self.header)]

    def write(self, rows: list[list[float]]) -> None:
        with write_atomic(self.path) as path, path.open("w", newline="") as handle:
            csv.writer(handle).writerows([self.header, *rows])


class Timed(Supervised):
    """At a constant rate, by the time of the steps alone, tested at the same steps whatever the budget."""

    def __init__(self, name: str, args: argparse.Namespace, log: Log, test: dict[int, list[Data]]) -> None:
        model = Learner(name, args.task, args.bits, args.hidden)
        loss, self.right = (number_loss, right_number) if name == "k_smallest" else (bit_loss, right_bits)
        # a few weights that have one right value each bear a larger rate
        super().__init__(model, loss, lr=args.lr * (10 if name == "k_smallest" else 1), ema=EMA)
        self.record, self.test = log, test
        self.max_steps, self.max_time = args.max_steps, args.max_time
        self.seconds = 0.0
        self.next_test = EPOCH

    def rate(self, step: int, total: float) -> float:
        return min(1.0, (step + 1) / WARMUP)

    def progress(self, step: int, total: float) -> float:
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = self.seconds / self.max_time if self.max_time else 0.0
        return min(1.0, max(by_steps, by_time))

    def clock(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Forward, backward and update: what is timed."""
        began = self.clock()
        super().optimizer_step(*args, **kwargs)
        self.seconds += self.clock() - began

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        step = self.global_step
        if self.progress(step, 0) == 1:
            self.trainer.should_stop = True
        if self.trainer.should_stop or step == self.next_test:
            earlier = [
                row for row in self.record.read() if row[0] < step
            ]  # a run that was killed may have left later ones
            self.record.write([*earlier, [step, round(self.seconds, 3), *self.accuracies()]])
            self.plan(step)

    def plan(self, step: int) -> None:
        """Tests after a step are farther and farther apart, by a tenth, and at the same steps in every run."""
        while self.next_test <= step:
            self.next_test += EPOCH * max(1, round(0.1 * self.next_test / EPOCH))

    @torch.no_grad()
    def accuracies(self) -> list[float]:
        """Percentages of right answers by size."""
        self.eval()
        found = []
        for batches in self.test.values():
            right = torch.cat([self.right(self(b), b) for b in (batch.to(self.device) for batch in batches)])
            found.append(round(100 * right.double().mean().item(), 2))
        self.train()
        return found

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.log("trained", float(self.global_step))  # the best weights, for fit, are the newest

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        step, self.seconds = checkpoint["global_step"], checkpoint["seconds"]
        self.record.write([row for row in self.record.read() if row[0] <= step])  # of later steps: taken again
        self.plan(step)


class Batches:
    """Training batches of an epoch, by the number of the step, so that a resumed run goes on with the same."""

    def __init__(self, module: Timed, args: argparse.Namespace, seed: int) -> None:
        self.module, self.args, self.seed = module, args, seed

    def __len__(self) -> int:
        return self.args.epoch_steps

    def __iter__(self) -> Iterator[Data]:
        first = self.module.global_step
        for step in range(first, first + len(self)):
            yield draw(self.args, (self.seed << 32) + (step % len(self) if self.args.train else step))


def finished(rows: list[list[float]], args: argparse.Namespace) -> bool:
    """Whether the log of a run goes to the end of the budget."""
    if not rows:
        return False
    step, seconds = rows[-1][:2]
    return (args.max_steps is not None and step >= args.max_steps) or (
        args.max_time is not None and seconds >= args.max_time
    )


def settings(args: argparse.Namespace) -> dict[str, object]:
    """What runs must share to stand in one table."""
    keys = ("task", "bits", "hidden", "batch_size", "lr", "train", "threads", "accelerator", "smoke")
    return {key: getattr(args, key) for key in keys}


def train(name: str, seed: int, args: argparse.Namespace, test: dict[int, list[Data]]) -> list[list[float]]:
    """The log of a run, which is trained if need be."""
    folder = args.out / f"{name}-{seed}"
    log = Log(folder)
    if not (args.resume and (folder / "settings.json").exists()):
        (folder / "last.ckpt").unlink(missing_ok=True)
        log.write([])
        with write_atomic(folder / "settings.json") as path:
            path.write_text(json.dumps(settings(args), indent=2) + "\n")
    if finished(log.read(), args) and (folder / "model.safetensors").exists():
        done = "had finished"
    else:
        torch.manual_seed(seed)
        module = Timed(name, args, log, test)
        budget = argparse.Namespace(**vars(args) | {"max_time": None, "epochs": None})  # the module stops itself
        fit(module, Batches(module, args, seed), None, budget, folder.name, clip=1.0, monitor=("trained", "max"))
        save_weights(module, {"model": name, **vars(args)}, folder)
        done = "finished"
    rows = log.read()
    step, seconds, *right = rows[-1]
    text = ", ".join(f"{value:.1f}" for value in right)
    print(f"{folder.name} {done}: {step:.0f} steps in {seconds:.4g} s; right answers in %: {text}", flush=True)
    return rows


def nearest(rows: list[list[float]], column: int, value: float) -> list[float]:
    return min(rows, key=lambda row: abs(row[column] - value))


def learning(path: Path, runs: dict[str, list[list[list[float]]]], size: str, title: str) -> None:
    """Accuracy at one size over steps and over time, a line for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    column = Log.header.index(str(LARGEST))
    for axis, of, xlabel in zip(axes, (0, 1), ("steps", "seconds of training"), strict=True):
        for name, logs in runs.items():
            for k, rows in enumerate(logs):
                x, y = [row[of] for row in rows], [row[column] for row in rows]
                axis.plot(x, y, color=COLOUR[name], lw=1.2, marker=".", ms=3, label=MODELS[name] if k == 0 else None)
        axis.set(xlabel=xlabel, xscale="log", ylim=(-2, 102))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"right answers at {size} (%)")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title)
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def extrapolation(
    path: Path, found: dict[str, list[list[float]]], base: list[float], columns: list[str], xlabel: str, title: str
) -> None:
    """Mean accuracy over the size, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.6, 4.6))
    axis.axvspan(SIZES[0] / 1.2, LARGEST, color="0.93", label="sizes in training")
    for name, rows in found.items():
        seeds = list(zip(*(row[2:] for row in rows), strict=True))
        axis.plot(SIZES, [fmean(values) for values in seeds], color=COLOUR[name], marker=".", label=MODELS[name])
        low, high = [min(values) for values in seeds], [max(values) for values in seeds]
        axis.fill_between(SIZES, low, high, color=COLOUR[name], alpha=0.15)
    axis.plot(SIZES, base, color="0.4", ls="--", lw=1, label=COMMONEST)
    axis.set(xlabel=xlabel, ylabel="right answers (%)", xscale="log", ylim=(-2, 102), title=title)
    axis.set_xlim(SIZES[0] / 1.2, SIZES[-1] * 1.2)
    axis.set_xticks(SIZES, columns)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    with write_atomic(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str], range]:
    """The flags, the names of the models and the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["set", "neighbours"], default="set", help="(default: %(default)s)")
    parser.add_argument(
        "--models", default="all", help=f"all, or of {', '.join(MODELS)} with commas (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from --seed on (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=8, help="of each number (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="channels (default: %(default)s)")
    parser.add_argument(
        "--train",
        type=int,
        default=None,
        help="multisets or nodes to train on, drawn once; an epoch is all of them "
        f"(default: new ones in each step; an epoch is {EPOCH} steps)",
    )
    training_flags(parser, out="runs/multiset_tasks/TASK", batch_size=256, lr=1e-3, budget="1 minute a run", threads=1)
    args = parser.parse_args(argv)
    names = list(MODELS) if args.models == "all" else [n.strip() for n in args.models.split(",") if n.strip()]
    if (unknown := [name for name in names if name not in MODELS]) or not names:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown) or repr(args.models)}")
    names = [name for name in MODELS if name in names]
    for flag, low, high in (("seeds", 1, 10**4), ("bits", 2, 20), ("hidden", 4, 10**4), ("seed", 0, 10**9)):
        if not low <= (value := getattr(args, flag)) <= high:
            parser.error(f"--{flag} must be from {low} to {high}, got {value}")
    if args.hidden % HEADS:
        parser.error(f"--hidden must be divisible by {HEADS}, the heads of SetTransformer; got {args.hidden}")
    if args.train is not None and args.train < args.batch_size:
        parser.error(f"--train must be at least --batch-size, {args.batch_size}; got {args.train}")
    if args.devices > 1:
        parser.error(f"--devices must be 1, as runs are timed: start other --models beside this; got {args.devices}")
    if args.out.name == "TASK":
        args.out = args.out.with_name(args.task)
    start(args)
    args.epoch_steps = EPOCH if args.train is None else args.train // args.batch_size
    args.max_steps = None if args.epochs is None else args.epochs * args.epoch_steps
    if args.smoke:
        args.max_steps, args.max_time = 4 if args.resume else 2, None
    elif args.epochs is None and args.max_time is None:
        args.max_time = SECONDS
    seeds = range(args.seed, args.seed + args.seeds)
    for path in [args.out / f"{name}-{seed}" / "settings.json" for name in names for seed in seeds]:
        old = json.loads(path.read_text()) if args.resume and path.exists() else settings(args)
        if differ := [f"{key} {old.get(key)}, not {now}" for key, now in settings(args).items() if old.get(key) != now]:
            parser.error(f"--resume: {path.parent} was trained with {'; '.join(differ)}: give another --out")
    return args, names, seeds


def main(argv: list[str] | None = None) -> list[list[object]]:
    args, names, seeds = parse(argv)
    test = tests(args)
    runs = {name: [train(name, seed, args, test) for seed in seeds] for name in names}
    logs = [rows for of_model in runs.values() for rows in of_model]
    steps = max(set[float].intersection(*({row[0] for row in rows} for rows in logs)), default=None)
    seconds = min(rows[-1][1] for rows in logs)
    equal_steps = {} if steps is None else {name: [nearest(rows, 0, steps) for rows in runs[name]] for name in names}
    equal_time = {name: [nearest(rows, 1, seconds) for rows in runs[name]] for name in names}
    base = commonest(test)
    several = args.seeds > 1
    result: list[list[object]] = [[COMMONEST, "-", None, None, *base, *(["-"] if several else [])]]
    for text, picked in (("steps", equal_steps), ("time", equal_time)):
        for name, rows in picked.items():
            step, second, *right = [fmean(column) for column in zip(*rows, strict=True)]
            at = [row[Log.header.index(str(LARGEST))] for row in rows]
            spread = [f"{min(at):.1f} to {max(at):.1f}"] if several else []
            result.append([MODELS[name], text, round(step), round(second, 1), *(round(v, 1) for v in right), *spread])

    each, elements = ("multisets", "numbers") if args.task == "set" else ("nodes", "neighbours")
    columns = [str(size) if args.task == "set" else f"{size // 2 + 1}-{size}" for size in SIZES]
    title = f"The second smallest of {elements}, {args.bits} bits"
    learning(args.out / "learning.png", runs, f"{columns[SIZES.index(LARGEST)]} {elements}", title)
    at_end = f"{title}, {seconds:.4g} s of training"
    extrapolation(args.out / "extrapolation.png", equal_time, base, columns, f"{elements} of a {each[:-1]}", at_end)
    gpu = args.accelerator != "cpu" and (torch.cuda.is_available() or args.accelerator != "auto")
    seed = f"seeds {args.seed} to {seeds[-1]}" if several else f"seed {args.seed}"
    tested = min(sum(batch.num_graphs for batch in batches) for batches in test.values())
    notes = [
        (
            f"Columns {columns[0]} to {columns[-1]}: % of {tested} {each} with so many {elements} whose bits are all "
            f"right; in training they had {SMALLEST} to {LARGEST}."
        ),
        (
            f"Equal steps: at the last test that all runs came to. Equal time: after {seconds:.4g} s of forward, "
            f"backward and update ({'wall clock' if gpu else 'CPU time'}), those of the shortest run."
        ),
        (
            f"{args.hidden} channels, batches of {args.batch_size}, lr {args.lr} after {WARMUP} steps, moving averages "
            f"of {EMA}, {seed}, threads: {torch.get_num_threads()}."
        ),
    ]
    if "k_smallest" in names:
        notes.append(
            "KSmallest(2) knows the order of numbers by construction: of the bits it learns one linear map, from equal "
            "weights, by squared error at 10 times the rate, and the second smallest, rounded, is the answer."
        )
    if "gru" in names and args.task == "set":
        notes.append("The multisets of a batch have one size: PyG's GRU runs on through the padding of smaller ones.")
    elif "gru" in names:
        notes.append("PyG's GRU runs on through padding: its answers depend on the largest neighbourhood of the batch.")
    notes.append(f"Plots: {args.out}/learning.png, {args.out}/extrapolation.png")
    header = ["aggregation", "equal", "steps", "seconds", *columns, *(["seeds at 16"] if several else [])]
    report(args, title, header, result, notes)
    return result


if __name__ == "__main__":
    main()
