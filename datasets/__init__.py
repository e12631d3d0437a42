"""The door: files or simulators in, PyTorch Geometric :class:`~torch_geometric.data.Data` out.

Every dataset is an :class:`~torch_geometric.data.InMemoryDataset` with ``root``, ``transform`` and ``pre_transform``,
the published split where one exists, and units in its docstring. Files are read without unpickling anything; what is
generated is cached as a checksummed ``.npz`` whose name holds a hash of the settings. A damaged file, a wrong checksum
or an unknown name raises one error that says what to do.
"""

from __future__ import annotations

if __name__ == "datasets":
    raise ImportError("this folder is the package geo.datasets: write `import geo.datasets`, not `import datasets`")

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geo.datasets.cache import DamagedFileError
    from geo.datasets.citation_graph import CitationGraph
    from geo.datasets.cycle_counting import CycleCounting, count_cycles, count_directed_cycles
    from geo.datasets.digit_points import DigitPoints
    from geo.datasets.enumerated_molecules import EnumeratedMolecules, penalized_logp
    from geo.datasets.force_field import ForceField
    from geo.datasets.graph6 import Graph6
    from geo.datasets.minesweeper import Minesweeper
    from geo.datasets.modelnet10_points import ModelNet10Points
    from geo.datasets.molecules import MoleculeDataset, energy_shift
    from geo.datasets.nbody import NBody
    from geo.datasets.smiles_table import SmilesTable, molecule_graph
    from geo.datasets.xtb_trajectory import XTBTrajectory

_HOME = {
    "CitationGraph": "citation_graph",
    "CycleCounting": "cycle_counting",
    "DamagedFileError": "cache",
    "DigitPoints": "digit_points",
    "EnumeratedMolecules": "enumerated_molecules",
    "ForceField": "force_field",
    "Graph6": "graph6",
    "Minesweeper": "minesweeper",
    "ModelNet10Points": "modelnet10_points",
    "MoleculeDataset": "molecules",
    "NBody": "nbody",
    "SmilesTable": "smiles_table",
    "XTBTrajectory": "xtb_trajectory",
    "count_cycles": "cycle_counting",
    "count_directed_cycles": "cycle_counting",
    "energy_shift": "molecules",
    "molecule_graph": "smiles_table",
    "penalized_logp": "enumerated_molecules",
}

__all__ = [
    "CitationGraph",
    "CycleCounting",
    "DamagedFileError",
    "DigitPoints",
    "EnumeratedMolecules",
    "ForceField",
    "Graph6",
    "Minesweeper",
    "ModelNet10Points",
    "MoleculeDataset",
    "NBody",
    "SmilesTable",
    "XTBTrajectory",
    "count_cycles",
    "count_directed_cycles",
    "energy_shift",
    "molecule_graph",
    "penalized_logp",
]


def __getattr__(name: str) -> Any:
    """Import a dataset when it is first asked for, so that ``import geo.datasets`` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
