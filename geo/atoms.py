"""An ASE calculator for trained potentials.

A potential is a ``geo.nn.PONITA`` with one scalar output per graph, and four facts about how it was trained: which
elements its input channels stand for, each element's own energy, the unit of its output, and the cutoff of its graph.
The model is saved by ``PONITA.save`` (safetensors and JSON); the four facts stand in ``<path>.potential.json``.

Needs the extra ``atoms``: ``pip install torch-geo[atoms]``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from geo.nn import PONITA
from geo.transforms import AddRadiusGraph

try:
    from ase.calculators.calculator import Calculator, all_changes
    from ase.data import chemical_symbols
except ImportError as error:
    raise ImportError("geo.atoms needs ASE: pip install 'torch-geo[atoms]'") from error

__all__ = ["GeoCalculator", "one_hot"]


def one_hot(z: Tensor, species: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Input channels of the atoms: one per element, in the order of ``species``.

    Args:
        z: Atomic numbers [V].
        species: Atomic numbers of the elements.
        dtype: Of the result.

    Returns:
        Zeros and ones, [V, len(species)].

    Raises:
        ValueError: If an atom is of another element.

    Example:
        >>> import torch
        >>> one_hot(torch.tensor([6, 1]), [1, 6, 8]).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    hot = z.view(-1, 1) == torch.as_tensor(list(species), device=z.device).view(1, -1)
    if not torch.compiler.is_compiling() and not bool(hot.any(dim=1).all()):
        unknown = sorted({int(v) for v in z[~hot.any(dim=1)]})
        raise ValueError(
            f"z must hold only the elements {list(species)} the potential was trained on, got {unknown} too"
        )
    return hot.to(dtype)


class GeoCalculator(Calculator):
    """Energy (eV) and forces (eV/Å) of a trained ``PONITA`` for ASE.

    The energy is ``scale * model(x, pos) + sum_i energy_shift[z_i]``, the forces are its exact negative gradient; both
    work with and without a periodic cell. The stress is not offered.

    Args:
        model: A model with ``out_channels=1`` and ``readout='add'``; ``in_channels`` is the number of species.
        species: Atomic numbers in the order of the model's input channels.
        cutoff: Radius of the graph in Å.
        energy_shift: Energy of each element in eV, by atomic number. (default: zero)
        scale: eV (and eV/Å) per unit of the model's output.
        max_edges: Refuse structures with more edges than this; None for no bound.
        dtype: Precision of the evaluation; float64 conserves energy better in long runs.
        device: Where the model runs.

    Example:
        >>> import torch
        >>> from ase.build import molecule
        >>> from geo.nn import PONITA
        >>> model = PONITA(2, 8, 1, num_layers=1, num_ori=6, radius=4.0, readout="add")
        >>> atoms = molecule("CH4")
        >>> atoms.calc = GeoCalculator(model, species=[1, 6], cutoff=4.0)
        >>> atoms.get_forces().shape
        (5, 3)
    """

    # ASE declares these as class attributes.
    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012

    def __init__(
        self,
        model: PONITA,
        species: Sequence[int],
        cutoff: float,
        energy_shift: Mapping[int, float] | None = None,
        scale: float = 1.0,
        max_edges: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        if not cutoff > 0:
            raise ValueError(f"cutoff must be a positive length in Å, got {cutoff}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.species = [int(number) for number in species]
        if len(set(self.species)) != len(self.species) or not self.species:
            raise ValueError(f"species must be distinct atomic numbers, got {list(species)}")
        self.cutoff, self.scale = float(cutoff), float(scale)
        self.energy_shift = {int(z): float(value) for z, value in (energy_shift or {}).items()}
        self.dtype, self.device = dtype, torch.device(device)
        self.model = model.to(device=self.device, dtype=dtype).eval().requires_grad_(False)
        self.graph = AddRadiusGraph(self.cutoff, max_edges=max_edges)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<path>.safetensors`` and ``<path>.json`` (the model) and ``<path>.potential.json`` (the four facts).

        Args:
            path: Path without suffix.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.model.save(path)
        facts = {
            "species": self.species,
            "cutoff": self.cutoff,
            "energy_shift": {str(z): value for z, value in self.energy_shift.items()},
            "scale": self.scale,
            "units": {"energy": "eV", "length": "Angstrom"},
        }
        target = path.with_name(path.name + ".potential.json")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(temporary, target)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> GeoCalculator:
        """Read what ``save`` wrote.

        Args:
            path: The same path without suffix.
            dtype: Precision of the evaluation.
            device: Where the model runs.

        Raises:
            FileNotFoundError: If one of the three files is missing.
            ValueError: If the potential's JSON lacks a fact.
        """
        path = Path(path)
        target = path.with_name(path.name + ".potential.json")
        if not target.exists():
            raise FileNotFoundError(f"path must name a potential saved by GeoCalculator.save; there is no {target}")
        facts = json.loads(target.read_text())
        missing = sorted({"species", "cutoff", "energy_shift", "scale"} - set(facts))
        if missing:
            raise ValueError(f"{target} must give species, cutoff, energy_shift and scale; it lacks {missing}")
        shift = {int(z): float(value) for z, value in facts["energy_shift"].items()}
        model = PONITA.load(path)
        return cls(model, facts["species"], facts["cutoff"], shift, facts["scale"], dtype=dtype, device=device)

    def calculate(
        self, atoms: Any = None, properties: Sequence[str] = ("energy",), system_changes: Sequence[str] = all_changes
    ) -> None:
        """Evaluate the model; called by ASE.

        Args:
            atoms: The structure.
            properties: What is wanted; energy and forces are always computed together.
            system_changes: What moved since the last call.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        atoms = self.atoms
        z = torch.as_tensor(np.asarray(atoms.numbers), dtype=torch.int64)
        positions = torch.as_tensor(np.asarray(atoms.positions), dtype=self.dtype)
        data = Data(z=z, pos=positions, num_nodes=len(z))
        if atoms.pbc.any():
            data.cell = torch.as_tensor(np.asarray(atoms.cell.array), dtype=self.dtype).view(1, 3, 3)
            data.pbc = torch.as_tensor(np.asarray(atoms.pbc)).view(1, 3)
        try:
            x = one_hot(z, self.species, self.dtype)
        except ValueError:
            known, given = (
                [chemical_symbols[int(v)] for v in group] for group in (self.species, sorted(set(z.tolist())))
            )
            raise ValueError(f"atoms must hold only the elements {known} of the potential, got {given}") from None
        data = self.graph(data).to(self.device)
        with torch.enable_grad():
            energy, forces = self.model.energy_and_forces(
                x.to(self.device),
                data.pos,
                data.edge_index,
                edge_shift=data.edge_shift.to(self.dtype),
                create_graph=False,
            )
        total = float(energy.detach().double().sum()) * self.scale + sum(self.energy_shift.get(int(v), 0.0) for v in z)
        values = forces.detach().double().cpu().numpy() * self.scale
        self.results = {"energy": total, "free_energy": total, "forces": values}
