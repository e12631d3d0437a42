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

  python examples/multiset_tasks.py                                   # 6 bits, 1 minute each: about 12 minutes
  python examples/multiset_tasks.py --task neighbours
  python examples/multiset_tasks.py --bits 8 --max-time 00:00:10:00 --seeds 3 --out runs/multiset_8
  python examples/multiset_tasks.py --bits 8 --max-time 00:00:10:00 --models binary_gru --seed 1 --out runs/multiset_8

The long schedule of PyG's example, on a GPU; call it again with --resume after an interruption:

  python examples/multiset_tasks.py --bits 8 --hidden 128 --models binary_gru --train 65536 --epochs 1000 \
      --batch-size 128 --lr 1e-4 --accelerator gpu --out runs/multiset_long
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
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
from geo.training import Supervised, fit, save_weights, start, training_flags, write_atomic

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
SMALLEST, LARGEST = 2, 16  # sizes in training
SIZES = (8, 16, 32, 64, 128)  # in tests
EPOCH = 100  # steps, where each draws new multisets
WARMUP = 100  # steps
EMA = 0.99
SECONDS = 60.0


class Second(nn.Module):
    """The second of two channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:]


class Learner(nn.Module):
    """Bits of numbers, encoder, aggregation, decoder, bits of the second smallest; called with a batch."""

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
            aggregation = SetTransformerAggregation(hidden, heads=4)
        elif name == "binary_gru":
            aggregation = MonoidAggregation(BinaryGRU(hidden), identity="zero")
        elif name == "k_smallest":
            aggregation = MonoidAggregation(KSmallest(2))
        else:
            aggregation = {"sum": SumAggregation, "max": MaxAggregation, "mean": MeanAggregation}[name]()
        self.decoder: nn.Module = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, bits))
        if name == "k_smallest":
            self.encoder, self.decoder = nn.Linear(bits, 1), Second()
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
    return F.mse_loss(prediction.squeeze(1), batch.y / 2.0**batch.bits)


def right_number(prediction: Tensor, batch: Data) -> Tensor:
    return (prediction.squeeze(1) * 2**batch.bits).round().long() == batch.y


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
        num = max(num, high + 1)
        numbers = torch.randint(2**args.bits, (num,), generator=generator)
        size = torch.randint(low, high + 1, (num, 1), generator=generator)
        chance = torch.rand(num, num, generator=generator).fill_diagonal_(-1.0)
        neighbour = chance.topk(high).indices
        there = torch.arange(high) < size
        batch = Data(edge_index=torch.stack([neighbour[there], there.nonzero()[:, 0]]))
        second = numbers[neighbour].masked_fill(~there, 2**args.bits).topk(2, largest=False).values[:, 1]
    batch.x = 2.0 * as_bits(numbers, args.bits) - 1.0
    batch.y, batch.bits, batch.num_graphs, batch.num_nodes = second, args.bits, num, len(numbers)
    return batch


def tests(args: argparse.Namespace) -> dict[int, list[Data]]:
    """Test batches by size, the same for all models and seeds."""
    lowest = {size: size if args.task == "set" else size // 2 + 1 for size in SIZES}
    count = 1 if args.smoke else -(-1024 // args.batch_size)
    return {size: [draw(args, -1 - 1000 * size - k, (lowest[size], size)) for k in range(count)] for size in SIZES}


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
            self.record.write([*self.record.read(), [step, round(self.seconds, 3), *self.accuracies()]])
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


def train(name: str, seed: int, args: argparse.Namespace, test: dict[int, list[Data]]) -> list[list[float]]:
    """The log of a run, which is trained if need be."""
    folder = args.out / f"{name}-{seed}"
    log = Log(folder)
    settings = {key: getattr(args, key) for key in ("task", "bits", "hidden", "batch_size", "lr", "train", "threads")}
    path = folder / "settings.json"
    if args.resume and path.exists():
        if (found := json.loads(path.read_text())) != settings:
            differ = [
                f"{key} {found.get(key)} (now {value})" for key, value in settings.items() if found.get(key) != value
            ]
            raise SystemExit(f"{folder} was trained with other settings: {', '.join(differ)}; give another --out")
        if finished(log.read(), args):
            return log.read()
    else:
        log.path.unlink(missing_ok=True)
        with write_atomic(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    torch.manual_seed(seed)
    module = Timed(name, args, log, test)
    budget = argparse.Namespace(**vars(args) | {"max_time": None, "epochs": None})  # the module stops itself
    fit(module, Batches(module, args, seed), None, budget, folder.name, clip=1.0, monitor=("trained", "max"))
    save_weights(module, {"model": name, **vars(args)}, folder)
    return log.read()


def main(argv: list[str] | None = None) -> list[list[object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["set", "neighbours"], default="set", help="(default: %(default)s)")
    parser.add_argument(
        "--models", default="all", help=f"all, or of {', '.join(MODELS)} with commas (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, from --seed on (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=6, help="of each number (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=64, help="channels (default: %(default)s)")
    parser.add_argument(
        "--train", type=int, default=None, help="multisets to train on, drawn once (default: new ones in each step)"
    )
    training_flags(parser, out="runs/multiset_tasks/TASK", batch_size=256, lr=1e-3, budget="1 minute a run", threads=1)
    args = parser.parse_args(argv)
    names = list(MODELS) if args.models == "all" else [n.strip() for n in args.models.split(",") if n.strip()]
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}; got {', '.join(unknown)}")
    for flag, low, high in (("seeds", 1, None), ("bits", 2, 20), ("hidden", 4, None), ("seed", 0, 2**30)):
        value = getattr(args, flag)
        if value < low or (high is not None and value > high):
            parser.error(f"--{flag} must be {f'from {low} to {high}' if high else f'at least {low}'}, got {value}")
    if args.hidden % 4:
        parser.error(f"--hidden must be divisible by 4, the heads of SetTransformer, got {args.hidden}")
    if args.devices > 1:
        parser.error(
            f"--devices must be 1: a run is timed on one, and others may be started beside it; got {args.devices}"
        )
    if args.out.name == "TASK":
        args.out = args.out.with_name(args.task)
    start(args)
    if args.train is not None and args.train < args.batch_size:
        parser.error(f"--train must be at least --batch-size, {args.batch_size}, got {args.train}")
    args.epoch_steps = EPOCH if args.train is None else args.train // args.batch_size
    args.max_steps = None if args.epochs is None else args.epochs * args.epoch_steps
    if args.smoke:
        args.max_steps, args.max_time = 4 if args.resume else 2, None
    elif args.epochs is None and args.max_time is None:
        args.max_time = SECONDS

    test = tests(args)
    runs = {
        name: {seed: train(name, seed, args, test) for seed in range(args.seed, args.seed + args.seeds)}
        for name in names
    }
    for name, logs in runs.items():
        for seed, rows in logs.items():
            print(name, seed, rows[-1])
    return []


if __name__ == "__main__":
    main()
