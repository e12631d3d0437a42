from __future__ import annotations

import json

import pytest
import torch

from geo.nn import PONITA

NONE = torch.zeros(2, 0, dtype=torch.int64)


def build(**changes) -> PONITA:
    torch.manual_seed(0)
    return PONITA(
        **({"in_channels": 3, "hidden_channels": 8, "out_channels": 2, "num_layers": 2, "num_ori": 6} | changes)
    )


def good() -> dict:
    torch.manual_seed(0)
    return {
        "x": torch.randn(4, 3),
        "pos": torch.randn(4, 3),
        "edge_index": torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]]),
        "batch": torch.tensor([0, 0, 1, 1]),
    }


def with_nan(t: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[4] = value
    return t


BAD = {
    "x shape": ({"x": torch.randn(4, 5)}, ValueError, r"x has shape \(4, 5\), but must be \(\|V\|, 3\)"),
    "x axes": ({"x": torch.randn(3)}, ValueError, r"x has shape \(3,\)"),
    "x dtype": (
        {"x": torch.zeros(4, 3, dtype=torch.int64)},
        ValueError,
        "x is torch.int64, but the model is torch.float32",
    ),
    "x double": ({"x": torch.zeros(4, 3).double()}, ValueError, "x is torch.float64, but the model is torch.float32"),
    "x none": ({"x": None}, ValueError, "x is NoneType"),
    "x nan": ({"x": with_nan(torch.randn(4, 3))}, ValueError, r"x\[1, 1\] is nan, but must be finite"),
    "pos shape": (
        {"pos": torch.randn(4, 2)},
        ValueError,
        r"pos has shape \(4, 2\), but x of shape \(4, 3\) needs \(4, 3\)",
    ),
    "pos rows": ({"pos": torch.randn(5, 3)}, ValueError, r"pos has shape \(5, 3\)"),
    "pos nan": ({"pos": with_nan(torch.randn(4, 3))}, ValueError, r"pos\[1, 1\] is nan, but must be finite"),
    "pos inf": ({"pos": with_nan(torch.randn(4, 3), float("inf"))}, ValueError, r"pos\[1, 1\] is inf"),
    "pos list": ({"pos": [[0.0, 0, 0]] * 4}, ValueError, "pos is list"),
    "edge shape": (
        {"edge_index": torch.zeros(4, 2, dtype=torch.int64)},
        ValueError,
        r"edge_index is torch.int64 \(4, 2\)",
    ),
    "edge dtype": ({"edge_index": torch.zeros(2, 4)}, ValueError, "edge_index is torch.float32"),
    "edge large": ({"edge_index": torch.tensor([[0], [4]])}, IndexError, r"edge_index\[1, 0\] is 4, .* \[0, 4\)"),
    "edge negative": ({"edge_index": torch.tensor([[-1], [0]])}, IndexError, r"edge_index\[0, 0\] is -1"),
    "batch shape": ({"batch": torch.zeros(3, dtype=torch.int64)}, ValueError, r"batch is torch.int64 \(3,\)"),
    "batch dtype": ({"batch": torch.zeros(4)}, ValueError, "batch is torch.float32"),
    "batch size": ({"batch_size": 1}, IndexError, r"batch\[2\] is 1, .* \[0, 1\)"),
    "batch negative, all pairs": (
        {"batch": torch.tensor([0, 0, -1, 1]), "edge_index": None},
        IndexError,
        r"batch\[2\] is -1",
    ),
    "batch negative": ({"batch": torch.tensor([0, 0, -1, 1])}, IndexError, r"batch\[2\] is -1"),
    "vec": ({"vec": torch.randn(4, 1, 3)}, ValueError, "vec is given, but in_vec is 0"),
    "ori": ({"ori": torch.randn(4, 3)}, ValueError, "ori is given, but num_ori is 6"),
    "mask": ({"mask": torch.ones(4).bool()}, ValueError, "mask is given, but x of shape"),
    "shift shape": (
        {"edge_shift": torch.zeros(3, 3)},
        ValueError,
        r"edge_shift has shape \(3, 3\), but must be \(4, 3\)",
    ),
    "shift dtype": ({"edge_shift": torch.zeros(4, 3).double()}, ValueError, "edge_shift is torch.float64"),
    "shift nan": ({"edge_shift": with_nan(torch.zeros(4, 3))}, ValueError, r"edge_shift\[1, 1\] is nan"),
    "shift alone": ({"edge_index": None, "edge_shift": torch.zeros(4, 3)}, ValueError, "edge_index is None"),
    "proj": ({"proj_index": torch.zeros(4, dtype=torch.int64)}, ValueError, "proj_index is given, but num_ori is 6"),
    "dense edges": (
        {"x": torch.randn(2, 4, 3), "pos": torch.randn(2, 4, 3), "batch": None},
        ValueError,
        "edge_index is given",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence(case):
    changes, error, words = BAD[case]
    with pytest.raises(error, match=words):
        build(readout="add")(**(good() | changes))


def test_vectors_and_orientations():
    with pytest.raises(ValueError, match="num_ori is 0 with in_vec=1 and out_vec=0"):
        build(num_ori=0, in_vec=1)
    with pytest.raises(ValueError, match="num_ori is 0 with in_vec=0 and out_vec=2"):
        build(num_ori=0, out_vec=2)
    with pytest.raises(ValueError, match="vec is given, but in_vec is 0"):
        build(num_ori=0)(**good(), vec=torch.randn(4, 1, 3))
    with pytest.raises(ValueError, match="vec is missing, but in_vec is 1"):
        build(in_vec=1)(**good())
    with pytest.raises(ValueError, match=r"vec has shape \(4, 3\), but must be \(4, 1, 3\)"):
        build(in_vec=1)(**good(), vec=torch.randn(4, 3))
    with pytest.raises(ValueError, match="ori is missing, but num_ori is -1"):
        build(num_ori=-1)(**good())
    with pytest.raises(ValueError, match=r"ori has shape \(4, 2\)"):
        build(num_ori=-1)(**good(), ori=torch.randn(4, 2))
    model = build(num_ori=-1)
    with pytest.raises(IndexError, match="7"):
        model(**good(), ori=torch.randn(4, 3), proj_index=torch.tensor([0, 0, 7, 1]), num_proj=2)
    with pytest.raises(ValueError, match=r"proj_index is torch.int64 \(3,\)"):
        model(**good(), ori=torch.randn(4, 3), proj_index=torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 0}, "in_channels"),
        ({"out_channels": 0}, "out_channels"),
        ({"hidden_channels": 0}, "hidden_channels is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 2.5}, "num_layers is 2.5"),
        ({"num_ori": -2}, "num_ori is -2"),
        ({"num_ori": 2, "out_vec": 1}, "num_ori is 2"),
        ({"dim": 4}, "dim is 4"),
        ({"readout": "max"}, "readout is 'max'"),
        ({"rotate": "never"}, "rotate is 'never'"),
        ({"invariants": "complete"}, "kind is 'complete'"),
        ({"invariants": "chiral"}, "blind to mirror images"),
        ({"invariants": "chiral", "dim": 2, "separable": False}, "kind is 'chiral'"),
        ({"space": "SE2"}, "space is 'SE2'"),
        ({"space": "SE3"}, "num_ori is 6"),
        ({"space": "SE3", "num_ori": 0}, "frames are orientations"),
        ({"grid": "cube"}, "kind is 'cube'"),
        ({"radius": 0.0}, "r_max is 0.0"),
        ({"length_scale": 0}, "length_scale is 0"),
        ({"groups": 3}, "groups is 3"),
        ({"degree": 0}, "degree is 0"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)


@pytest.mark.parametrize(
    "settings", [{}, {"num_ori": 0}, {"separable": False, "num_ori": 4}, {"space": "SE3", "num_ori": 12}]
)
@pytest.mark.parametrize("readout", ["node", "add", "mean"])
def test_empty_graph_single_atom_and_no_edges(settings, readout):
    model = build(readout=readout, radius=2.0, **settings)
    for num in (0, 1, 3):
        x, pos = torch.randn(num, 3), torch.randn(num, 3)
        rows = num if readout == "node" else 1
        for edges in ({"edge_index": NONE}, {}):
            out, vector = model(x, pos, **edges)
            assert out.shape == (rows, 2)
            assert torch.isfinite(out).all()
            assert vector is None
            batch = torch.zeros(num, dtype=torch.int64)
            assert torch.allclose(model(x, pos, **edges, batch=batch, batch_size=1)[0], out)
    more = model(torch.randn(2, 3), torch.randn(2, 3), NONE, torch.tensor([0, 2]), batch_size=5)[0]
    assert more.shape == (2 if readout == "node" else 5, 2)
    if readout != "node":
        assert more[[1, 3, 4]].eq(0).all()
        assert model(torch.zeros(0, 3), torch.zeros(0, 3), NONE)[0].eq(0).all()
        none = torch.zeros(0, dtype=torch.int64)
        assert model(torch.zeros(0, 3), torch.zeros(0, 3), NONE, none)[0].shape == (0, 2)
    dense = model(torch.zeros(2, 0, 3), torch.zeros(2, 0, 3))[0]
    assert dense.shape == ((2, 0, 2) if readout == "node" else (2, 2))


def test_energies_of_nothing():
    model = build(out_channels=1, readout="add")
    for num in (0, 1):
        energy, forces = model.energy_and_forces(torch.randn(num, 3), torch.randn(num, 3), NONE)
        assert energy.shape == (1,)
        assert forces.shape == (num, 3)
        assert forces.eq(0).all()


def test_atoms_at_one_place():
    model = build(out_channels=1, readout="add", radius=2.0)
    energy, forces = model.energy_and_forces(torch.randn(3, 3), torch.zeros(3, 3), torch.tensor([[0, 1, 2], [1, 2, 0]]))
    assert torch.isfinite(energy).all()
    assert torch.isfinite(forces).all()


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_ori": 0, "radius": 3.0},
        {"in_vec": 1, "out_vec": 2, "layer_scale": 1e-6, "rotate": "train", "readout": "mean"},
        {"space": "SE3", "num_ori": 24, "invariants": "universal"},
        {"separable": False, "invariants": "chiral", "grid": "random"},
        {"num_ori": -1, "dim": 2, "groups": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load(tmp_path, settings, dtype):
    model = build(**settings).to(dtype).eval()
    arguments = {k: v for k, v in good().items() if k != "batch"}
    arguments["pos"] = arguments["pos"][:, : model.dim]
    if model.in_vec:
        arguments["vec"] = torch.randn(4, model.in_vec, model.dim)
    if model.num_ori == -1:
        arguments["ori"] = torch.nn.functional.normalize(torch.randn(4, model.dim), dim=1)
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arguments.items()}
    expected = model(**arguments)
    path = model.save(tmp_path / "best.v1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.v1.json", "best.v1.safetensors"]
    for name in (tmp_path / "best.v1", path, str(tmp_path / "best.v1.json")):
        loaded = PONITA.load(name)
        assert not loaded.training
        actual = loaded(**arguments)
        assert torch.equal(actual[0], expected[0])
        assert expected[1] is None or torch.equal(actual[1], expected[1])
    assert repr(loaded) == repr(model)


def rewrite(path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_load_refuses_what_it_does_not_know(tmp_path):
    from safetensors.torch import load_file, save_file

    model = build()
    stem, weights, settings = tmp_path / "m", tmp_path / "m.safetensors", tmp_path / "m.json"

    def fresh() -> None:
        model.save(stem)

    changes = [
        (lambda r: r["arguments"].update(depth=3), "unknown arguments .'depth'."),
        (lambda r: r["arguments"].pop("in_channels"), "missing arguments .'in_channels'."),
        (lambda r: r.update(note="x"), "unknown keys: .'note'."),
        (lambda r: r.update(version=2), "version 1"),
        (lambda r: r.update(model="torch.nn.Linear"), "not the description"),
        (lambda r: r.update(arguments=[1]), "must hold"),
        (lambda r: r["arguments"].update(num_layers=3), "missing tensors"),
        (lambda r: r["arguments"].update(num_layers=1), "unknown tensors"),
        (lambda r: r["arguments"].update(hidden_channels=16), "has shape"),
    ]
    for change, words in changes:
        fresh()
        rewrite(settings, change)
        with pytest.raises(ValueError, match=words):
            PONITA.load(stem)
    fresh()
    settings.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        PONITA.load(stem)
    fresh()
    save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"unknown tensors .'extra'."):
        PONITA.load(stem)
    fresh()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        PONITA.load(stem)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"m\.safetensors"):
        PONITA.load(stem)
    with pytest.raises(FileNotFoundError):
        PONITA.load(tmp_path / "other")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = build()
    model.save(tmp_path / "m")
    before = (tmp_path / "m.safetensors").read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        build(hidden_channels=4).save(tmp_path / "m")
    assert (tmp_path / "m.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_repr_and_reset():
    model = build(in_vec=1, out_vec=1)
    assert "num_layers=2, in_vec=1, out_vec=1, space='R3xS2', num_ori=6" in repr(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_parameters()
    after = model.state_dict()
    assert not torch.equal(after["blocks.0.conv.weight"], before["blocks.0.conv.weight"])
    assert torch.equal(after["grid.ori"], before["grid.ori"])
