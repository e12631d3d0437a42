"""Citation graphs from the files of Planetoid: pickles, which are read and never loaded."""

from __future__ import annotations

import os
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import DamagedFileError, choose, fill, reading, require_file

_FOLDER = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}
_FEATURES, _TOPICS = ("x", "tx", "allx"), ("y", "ty", "ally")
_NUM_VALIDATION = 500
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class CitationGraph(InMemoryDataset):
    """Papers that cite each other, with words and topics: Cora, CiteSeer and PubMed in the files of Planetoid.

    The graphs and the split of "Revisiting Semi-Supervised Learning with Graph Embeddings"
    (https://arxiv.org/abs/1603.08861), from a local folder as :class:`torch_geometric.datasets.Planetoid` keeps it:
    ``root/Cora/raw/ind.cora.{x,tx,allx,y,ty,ally,graph,test.index}``. Those files are pickles, and whoever loads a
    pickle runs what it names. Here they are read opcode by opcode, and nothing in them is imported or called; that they
    fit together is checked.

    The one item has ``x`` [V, F] float32 (words, as the file weighs them), ``y`` [V] int64, ``edge_index`` [2, E] int64
    (both directions, sorted by source and target, without loops and repetitions), and ``train_mask``, ``val_mask``,
    ``test_mask`` [V] bool: 20 papers of each topic, 500 and 1,000. It equals that of PyG but for the order of the edges
    and for the 15 papers of CiteSeer without words and topic: their ``y`` is -1, where PyG says topic 0.

    Args:
        root: The folder that PyG's Planetoid was given.
        name: ``'cora'``, ``'citeseer'`` or ``'pubmed'``, in small letters or not.
        transform: Applied on every access, such as :class:`torch_geometric.transforms.NormalizeFeatures`.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the sample where it is true.

    Raises:
        ValueError: Another name.
        FileNotFoundError: A file is not there.
        DamagedFileError: A file is damaged or of another format, or two do not fit together.

    Example:
        >>> from geo.datasets import CitationGraph
        >>> CitationGraph('data', 'Cora')
        Traceback (most recent call last):
        ...
        FileNotFoundError: Cora as PyG's Planetoid keeps it: no file data/Cora/raw/ind.cora.x; ...
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str,
        *,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        choose("name", name.lower(), _FOLDER)
        super().__init__(os.fspath(root), transform, pre_transform, pre_filter)
        self.name = name.lower()
        raw = Path(root) / _FOLDER[self.name] / "raw"
        names, what = (*_FEATURES, *_TOPICS, "graph", "test.index"), f"{raw.parent.name} as PyG's Planetoid keeps it"
        paths = {part: require_file(raw / f"ind.{self.name}.{part}", what) for part in names}
        parts = {}
        for part, path in paths.items():
            with reading(path):
                parts[part] = _read(part, path.read_bytes())
        tested = parts.pop("test.index")
        if misfit := _misfit(parts, tested):
            raise DamagedFileError(f"{raw}: {misfit}; the files are damaged or of different graphs, fetch them again")
        fill(self, [_assemble(parts, tested)])


def _assemble(parts: dict[str, np.ndarray], tested: np.ndarray) -> Data:
    """The first papers are those of allx and ally; tx and ty are in the order of test.index."""
    num_nodes, known, num_train = int(tested.max()) + 1, len(parts["allx"]), len(parts["x"])
    x = np.zeros((num_nodes, parts["allx"].shape[1]), dtype=np.float32)
    y = np.full(num_nodes, -1, dtype=np.int64)
    for nodes, features, topics in ((slice(known), "allx", "ally"), (tested, "tx", "ty")):
        x[nodes], y[nodes] = parts[features], parts[topics]
    pairs = parts["graph"][parts["graph"][:, 0] != parts["graph"][:, 1]]
    edges = np.unique(np.concatenate([pairs, pairs[:, ::-1]]), axis=0).T
    data = Data(torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(edges)), y=torch.from_numpy(y))
    validated = slice(num_train, min(num_train + _NUM_VALIDATION, known))
    for name, nodes in (("train", slice(num_train)), ("val", validated), ("test", tested)):
        mask = np.zeros(num_nodes, dtype=bool)
        mask[nodes] = True
        data[f"{name}_mask"] = torch.from_numpy(mask)
    return data


def _misfit(parts: dict[str, np.ndarray], tested: np.ndarray) -> str | None:
    """What does not fit together, in words."""
    size = {part: len(array) for part, array in parts.items()}
    for features, topics in zip(_FEATURES, _TOPICS, strict=True):
        if size[features] != size[topics]:
            return f"{features} has {size[features]} papers, but {topics} has {size[topics]}"
        if parts[features].shape[1] != parts["allx"].shape[1]:
            return f"{features} has {parts[features].shape[1]} words, but allx has {parts['allx'].shape[1]}"
    for part, whole in (("x", "allx"), ("y", "ally")):
        if not np.array_equal(parts[part], parts[whole][: size[part]]):
            return f"{part} is not the beginning of {whole}"
    if size["tx"] != len(tested):
        return f"test.index names {len(tested)} papers, but tx and ty have {size['tx']}"
    if len(tested) == 0 or len(np.unique(tested)) < len(tested) or tested.min() < size["allx"]:
        return f"test.index must name papers behind the {size['allx']} of allx, each once"
    listed = np.unique(parts["graph"])
    if len(listed) != tested.max() + 1 or listed[0] != 0 or listed[-1] != tested.max():
        of = f"{len(listed)} papers from {listed[0]} to {listed[-1]}" if len(listed) else "no papers"
        return f"the graph has {of}, but test.index ends with {tested.max()}"
    return None


# -- one file ----------------------------------------------------------------------------------------------------------
def _read(part: str, data: bytes) -> np.ndarray:
    if part == "test.index":
        return np.array([int(word) for word in data.split()], dtype=np.int64)
    made = _read_objects(data)
    if part in _TOPICS:
        return _topics(_array(made))
    name = "collections defaultdict" if part == "graph" else "scipy.sparse.csr csr_matrix"
    if made.name != name:
        raise ValueError(f"it must hold a {name}, not {made.name}")
    if part == "graph":
        # a list may be there many times for a few bytes each
        if (num := sum(map(len, made.entries.values()))) > len(data):
            raise ValueError(f"it lists {num} neighbours in {len(data)} bytes")
        return _pairs(made.entries)
    return _words(made.state)


def _pairs(neighbours: dict[int, list[int]]) -> np.ndarray:
    """[E, 2]; each node with itself, too, so that those without neighbours are there."""
    pairs = [(node, other) for node, others in neighbours.items() for other in [node, *others]]
    if not all(type(node) is int for pair in pairs for node in pair):
        raise ValueError("nodes must be numbers")
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _words(state: dict[str, Any]) -> np.ndarray:
    """A sparse matrix by rows, as SciPy keeps it, made dense."""
    num_rows, num_columns = state["_shape"]
    ptr, column, weight = (_array(state[name]) for name in ("indptr", "indices", "data"))
    if len(ptr) != num_rows + 1 or ptr[0] != 0 or (np.diff(ptr) < 0).any() or ptr[-1] != len(column):
        raise ValueError(f"indptr must rise from 0 to {len(column)} in {num_rows} steps")
    with np.errstate(over="ignore"):
        weight = weight.astype(np.float32)
    if column.min(initial=0) < 0 or column.max(initial=-1) >= num_columns or not np.isfinite(weight).all():
        raise ValueError(f"weights must be finite, and columns between 0 and {num_columns - 1}")
    dense = np.zeros((num_rows, num_columns), dtype=np.float32)
    np.add.at(dense, (np.repeat(np.arange(num_rows), np.diff(ptr)), column), weight)
    return dense


def _topics(one_hot: np.ndarray) -> np.ndarray:
    """The place of the one in each row; -1 where there is none."""
    if one_hot.ndim != 2 or not np.isin(one_hot, (0, 1)).all() or one_hot.sum(axis=1).max(initial=0) > 1:
        raise ValueError("topics must be rows of zeros and at most a one")
    return np.where(one_hot.any(axis=1), one_hot.argmax(axis=1), -1)


def _array(made: _Made) -> np.ndarray:
    """A NumPy array as NumPy 1 wrote it: (version, shape, dtype, in Fortran's order, bytes)."""
    _, shape, dtype, fortran, data = made.state
    kind = dtype.state[1] + dtype.arguments[0]
    if made.name != "numpy.core.multiarray _reconstruct" or kind not in ("<i4", "<i8", "<f4", "<f8"):
        raise ValueError(f"an array must hold numbers, not {made.name} of {kind}")
    return np.frombuffer(data.encode("latin-1"), dtype=kind).reshape(shape, order="F" if fortran else "C")


class _Made:
    """What an opcode would have called: its name and arguments, and what was put into it later."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = ()
        self.entries: dict[Any, Any] = {}


def _read_objects(data: bytes) -> Any:
    """The numbers, strings, lists, tuples and dictionaries in a pickle, opcode by opcode.

    To load a pickle is to run what it names. Here nothing is imported or called: what is named stays a name.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        taken = stack[at:]
        del stack[at:]
        return taken

    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in ("PROTO", "STOP"):
            continue
        if name in ("BININT", "BININT1", "BININT2", "SHORT_BINSTRING", "BINSTRING", "GLOBAL"):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = since_mark() if name == "TUPLE" else [stack.pop() for _ in range(int(name[5:]))][::-1]
            stack.append(tuple(items))
        elif name == "SETITEMS":
            items = since_mark()
            if not all(type(key) in (int, str) for key in items[::2]):
                raise ValueError("keys must be numbers or names")
            entries = stack[-1] if isinstance(stack[-1], dict) else stack[-1].entries
            entries.update(zip(items[::2], items[1::2], strict=True))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack.append(_Made(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        else:
            raise ValueError(f"it has the opcode {name}, which lists and arrays of numbers do not need")
    (result,) = stack
    return result
