"""What the examples share: flags, schedule, resume, tables, atomic files."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

pytest.importorskip("lightning", reason="needs the extra train")

from geo import training


def flags(tmp_path, *extra: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    training.training_flags(parser, out=str(tmp_path), batch_size=4, lr=0.05, budget="one epoch")
    args = parser.parse_args(["--accelerator", "cpu", "--out", str(tmp_path), *extra])
    training.start(args)
    return args


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, batch):
        return self.linear(batch.x)


def loaders(size: int = 16) -> list[DataLoader]:
    x = torch.linspace(-1, 1, size).view(-1, 1, 1)
    frames = [Data(x=value, y=3 * value + 1) for value in x]
    return [DataLoader(frames, batch_size=4), DataLoader(frames, batch_size=16)]


def squared(prediction, batch):
    return (prediction - batch.y).pow(2).mean()


def supervised(**kwargs) -> training.Supervised:
    torch.manual_seed(0)
    return training.Supervised(Line(), squared, {"mse": squared}, lr=0.05, **kwargs)


def test_parse_time_reads_lightning_spans():
    assert training.parse_time("01:02:03:04") == 24 * 3600 + 2 * 3600 + 3 * 60 + 4


@pytest.mark.parametrize("text", ["90", "1:30", "00:00:01:30:00", "a:b:c:d", ""])
def test_parse_time_refuses(text):
    with pytest.raises(ValueError, match=r"max-time must be written DD:HH:MM:SS"):
        training.parse_time(text)


@pytest.mark.parametrize(
    "wrong", [["--epochs", "0"], ["--max-time", "90"], ["--batch-size", "-3"], ["--epochs", "two"]]
)
def test_flags_refuse_with_the_value(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        flags(tmp_path, *wrong)
    assert repr(wrong[1]) in capsys.readouterr().err


def test_threads_have_a_default_of_their_own():
    parser = argparse.ArgumentParser()
    training.training_flags(parser, out="runs", batch_size=4, lr=0.05, budget="one epoch", threads=3)
    assert parser.parse_args([]).threads == 3
    assert "CPU threads (default: 3)" in " ".join(parser.format_help().split())


def test_fit_learns_logs_and_keeps_the_best(tmp_path):
    args, (train, val) = flags(tmp_path, "--epochs", "60"), loaders()
    module = supervised()
    training.fit(module, train, val, args, "line")
    assert not module.training
    batch = next(iter(val))
    with torch.no_grad():
        assert float(squared(module(batch), batch)) < 1e-2
    epochs, values = training.read_log(tmp_path / "line", "val_mse")
    assert epochs == list(range(1, 61))
    assert values[-1] < values[0]
    assert {path.name for path in (tmp_path / "line").glob("*.ckpt")} == {"best.ckpt", "last.ckpt"}


def test_resume_goes_on_where_the_run_ended(tmp_path):
    train, val = loaders()
    steps = []
    for extra in (["--epochs", "2"], ["--epochs", "5", "--resume"]):
        trainer = training.fit(supervised(ema=0.9), train, val, flags(tmp_path, *extra), "line")
        steps.append(trainer.global_step)
    assert steps == [8, 20]
    assert training.read_log(tmp_path / "line", "val_loss")[0] == [1, 2, 3, 4, 5]


def test_resume_without_a_checkpoint_says_so(tmp_path, capsys):
    training.fit(supervised(), *loaders(), flags(tmp_path, "--epochs", "1", "--resume"), "line")
    assert "no checkpoint" in capsys.readouterr().out


def test_same_seed_same_weights(tmp_path):
    results = []
    for name in ("a", "b"):
        module = supervised()
        training.fit(module, *loaders(), flags(tmp_path, "--epochs", "3"), name)
        results.append(module.model.linear.weight.detach().clone())
    assert torch.equal(*results)


def test_weight_decay_is_of_matrices_that_do_not_refuse_it(tmp_path):
    class Mixed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.log = nn.Parameter(torch.zeros(3, 2))
            self.log._no_weight_decay = True

    module = training.Supervised(Mixed(), squared, weight_decay=0.5)
    trainer = training.fit(module, *loaders(), flags(tmp_path, "--smoke"), "line")
    groups = trainer.optimizers[0].param_groups
    names = {parameter: name for name, parameter in module.model.named_parameters()}
    found = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert found == {"linear.weight": 0.5, "linear.bias": 0.0, "log": 0.0}


def test_epochs_of_this_session_are_counted(tmp_path):
    counts = []
    for extra in (["--epochs", "2"], ["--epochs", "5", "--resume"], ["--epochs", "5", "--resume"]):
        module = supervised()
        training.fit(module, *loaders(), flags(tmp_path, *extra), "line")
        counts.append(module.epochs_trained)
    assert counts == [2, 3, 0]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_saved_weights_predict_the_same(tmp_path, ema):
    from safetensors.torch import load_file

    module, (train, val) = supervised(ema=ema), loaders()
    training.fit(module, train, val, flags(tmp_path, "--epochs", "2"), "line")
    path = training.save_weights(module, {"hidden": 3, "out": tmp_path}, tmp_path / "line")
    assert json.loads(path.with_suffix(".json").read_text()) == {"hidden": 3, "out": str(tmp_path)}
    model, batch = Line(), next(iter(val))
    model.load_state_dict(load_file(path))
    assert torch.equal(model(batch), module(batch))


def test_saved_weights_may_be_shared(tmp_path):
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    path = training.save_weights(training.Supervised(model, squared), {}, tmp_path)
    assert torch.equal(load_file(path)["1.weight"], model[0].weight)


def test_schedule_rises_then_falls_to_zero(tmp_path):
    class Spy(training.Supervised):
        def on_train_batch_start(self, batch, batch_idx):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    module = Spy(Line(), squared, lr=0.05, warmup=0.1)
    training.fit(module, *loaders(), flags(tmp_path, "--epochs", "25"), "line")
    top = int(np.argmax(rates))
    assert 5 <= top <= 15
    assert rates[top] == pytest.approx(0.05, rel=0.05)
    assert rates[-1] < 1e-3 * 0.05
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


def test_another_schedule_is_a_subclass(tmp_path):
    class Constant(training.Supervised):
        def rate(self, step, total):
            return min(1.0, (step + 1) / 3)

        def on_train_batch_end(self, *args):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[float] = []
    module = Constant(Line(), squared, lr=0.06)
    training.fit(module, *loaders(), flags(tmp_path, "--epochs", "2"), "constant")
    assert rates == pytest.approx([0.04, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06, 0.06])  # of the next step


def test_time_budget_ends_the_run_and_the_schedule(tmp_path):
    module = supervised()
    trainer = training.fit(module, *loaders(), flags(tmp_path, "--max-time", "00:00:00:02"), "line")
    assert trainer.global_step > 10
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.01 * 0.05


def test_time_budget_survives_resume(tmp_path):
    first = training.fit(supervised(), *loaders(), flags(tmp_path, "--max-time", "00:00:00:01"), "line")
    again = training.fit(supervised(), *loaders(), flags(tmp_path, "--max-time", "00:00:00:01", "--resume"), "line")
    assert again.global_step <= first.global_step + 2


class Reordered(Line):
    """Its copies have their buffers in another order, as those of e3nn's tensor products may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("small", torch.zeros(2))
        self.register_buffer("large", torch.zeros(3))

    def __deepcopy__(self, memo):
        copy = Reordered()
        copy.load_state_dict(self.state_dict())
        copy._buffers = dict(reversed(copy._buffers.items()))
        return copy


def test_average_of_parameters_and_newest_buffers():
    module = training.Supervised(Reordered(), squared, ema=0.9)
    before = module.average.linear.weight.clone()
    with torch.no_grad():
        module.model.linear.weight += 1
        module.model.large += 2
    module.on_train_batch_end(None, None, 0)
    torch.testing.assert_close(module.average.linear.weight, before + 0.1)
    assert module.average.large.tolist() == [2, 2, 2]
    assert module.predictor is module.model
    assert module.eval().predictor is module.average


class Spring(nn.Module):
    """E = k sum |pos|^2 per graph, in units of the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.1))

    def forward(self, batch):
        pos = batch.pos.detach().requires_grad_()
        energy = torch.zeros(batch.num_graphs).index_add_(0, batch.batch, self.k * pos.pow(2).sum(-1))
        (gradient,) = torch.autograd.grad(energy.sum(), pos, create_graph=self.training)
        return energy, -gradient


def springs() -> list[Data]:
    generator = torch.Generator().manual_seed(0)
    frames = []
    for _ in range(12):
        pos = torch.randn(3, 3, generator=generator)
        energy = 2.0 * pos.pow(2).sum() - 1000.0 - 2 * 20.0
        frames.append(Data(z=torch.tensor([8, 1, 1]), pos=pos, energy=energy.double().view(1), force=-4.0 * pos))
    return frames


def test_energy_forces_adds_shift_and_scale_back(tmp_path):
    shift = torch.zeros(9, dtype=torch.float64)
    shift[8], shift[1] = -1000.0, -20.0
    frames = springs()
    scale = float(torch.cat([frame.force for frame in frames]).pow(2).mean().sqrt())
    module = training.EnergyForces(Spring(), shift, scale, lr=0.1, ema=None)
    train, val = DataLoader(frames, batch_size=4), DataLoader(frames, batch_size=12)
    training.fit(module, train, val, flags(tmp_path, "--epochs", "80"), "spring")
    energy, force = module(next(iter(val)))
    assert energy.dtype == torch.float64
    assert float(module.model.k.detach()) * scale == pytest.approx(2.0, rel=1e-2)
    assert torch.allclose(energy, torch.cat([frame.energy for frame in frames]), atol=0.3)
    assert torch.allclose(force, torch.cat([frame.force for frame in frames]), atol=0.1)
    assert training.read_log(tmp_path / "spring", "val_force_mae")[1][-1] < 50.0


def test_write_atomic_leaves_the_old_file_when_the_block_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail():
        with training.write_atomic(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match="rows must have 2 cells"):
        training.format_table(["a", "b"], [[1]])


def test_table_markdown():
    text = training.format_table(["model", "error"], [["mean", 12.0], ["ours", None]], markdown=True)
    assert text.splitlines()[1:3] == ["|-------|------:|", "| mean  |    12 |"]


def test_plots_are_written(tmp_path):
    truth = np.linspace(0, 1, 20)
    training.parity_plot(tmp_path / "p.png", {"energy (eV)": (truth, {"a": truth + 0.1, "b": truth})})
    training.curve_plot(tmp_path / "c.png", {"a": ([1, 2], [0.1, math.pi])}, "x", "y", reference={"paper": 0.5})
    for name in ("p.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_missing_lightning_names_the_extra():
    code = "import sys; sys.modules['lightning'] = None; import geo.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pip install 'torch-geo[train]'" in done.stderr


def test_a_slice_stops_early_and_the_next_goes_on(tmp_path):
    train, val = loaders()
    args = flags(tmp_path, "--max-time", "00:00:01:00")
    first = training.fit(supervised(warmup=0.0), train, val, args, "line", slice_seconds=0.5)
    spent = first.optimizers[0].param_groups[0]["lr"]
    assert first.global_step > 0
    assert spent > 0.9 * 0.05, "the schedule is that of the whole budget, hardly begun"
    again = flags(tmp_path, "--max-time", "00:00:01:00", "--resume")
    second = training.fit(supervised(warmup=0.0), train, val, again, "line", slice_seconds=0.5)
    assert second.global_step > first.global_step
