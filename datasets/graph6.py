"""Graphs from graph6 files and from arrays of graph6 strings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data, InMemoryDataset

from geo.datasets.cache import DamagedFileError, check_sha256, fill, reading, require_file

_HEADER = b">>graph6<<"
_LOW, _HIGH = 63, 126  # the printable bytes that stand for 0 to 63


class Graph6(InMemoryDataset):
    r"""Small graphs in McKay's graph6 format, the format of most collections of graphs that are hard to tell apart.

    Two kinds of files: text with one graph a line (``.g6``, with or without the header ``>>graph6<<``), and NumPy
    arrays of graph6 strings (``.npy``, as those of BREC). Arrays are read in row-major order: of an array of pairs, the
    items 2i and 2i + 1 are a pair. Nothing is unpickled: an array of Python objects is refused. sparse6 and digraph6
    are other formats and refused, too.

    Items have ``edge_index`` [2, E] int64 with both directions of each edge, sorted by source and target, and
    ``num_nodes``; no features.

    Args:
        path: The file.
        sha256: SHA-256 that the file must have.
        transform: Applied on every access.
        pre_transform: Applied once, when the dataset is built; not stored.
        pre_filter: Keeps the samples for which it is true.

    Raises:
        FileNotFoundError: The file is not there.
        DamagedFileError: It is no such file, a graph in it is malformed, or its checksum is wrong; the message names
            the graph.

    Example:
        >>> from geo.datasets import Graph6
        >>> with open('two.g6', 'w') as file:
        ...     _ = file.write('Bw\nDhc\n')  # a triangle, a cycle of five
        >>> data = Graph6('two.g6')
        >>> [(graph.num_nodes, graph.num_edges) for graph in data]
        [(3, 6), (5, 10)]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sha256: str | None = None,
        transform: Callable[..., Any] | None = None,
        pre_transform: Callable[..., Any] | None = None,
        pre_filter: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(None, transform, pre_transform, pre_filter)
        self.path = require_file(Path(path), "graphs in graph6 format")
        if sha256 is not None:
            check_sha256(self.path, sha256)
        with reading(self.path):
            graphs = [_decode(text, f"{self.path}, {where}") for where, text in _strings(self.path)]
        if not graphs:
            raise DamagedFileError(f"{self.path}: holds no graph")
        fill(self, graphs)


def _strings(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where in the file each graph stands, and its bytes."""
    if path.suffix != ".npy":
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            text = line.removeprefix(_HEADER) if number == 1 else line
            if text.strip():
                yield f"line {number}", text.strip()
        return
    with path.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        dtype = header(stream)[2]
    if dtype.kind not in "SU":
        why = "Python objects, which would have to be unpickled" if dtype.hasobject else f"{dtype}"
        raise DamagedFileError(f"{path}: an array of {why}, not of strings; save it as an array of strings")
    array = np.load(path, allow_pickle=False)
    for number, text in enumerate(array.ravel().tolist()):
        yield f"graph {number}", text.encode("ascii") if isinstance(text, str) else text


def _decode(text: bytes, where: str) -> Data:
    """One graph: its number of nodes in 1, 4 or 8 bytes, then its upper triangle column by column, six bits a byte."""
    if text[:1] in (b":", b"&"):
        name = "sparse6" if text[:1] == b":" else "digraph6"
        raise DamagedFileError(f"{where}: this is {name}, not graph6")
    codes = np.frombuffer(text, dtype=np.uint8)
    if codes.size == 0 or codes.min() < _LOW or codes.max() > _HIGH:
        raise DamagedFileError(f"{where}: {text[:20]!r} is not graph6, whose bytes are {_LOW} to {_HIGH}")
    values = codes.astype(np.int64) - _LOW
    start, digits = (0, 1) if values[0] < 63 else (1, 3) if values[1:2].tolist() != [63] else (2, 6)
    num_nodes = 0
    for value in values[start : start + digits].tolist():
        num_nodes = 64 * num_nodes + value
    body = values[start + digits :]
    num_pairs = num_nodes * (num_nodes - 1) // 2
    if values.size < start + digits or body.size != -(-num_pairs // 6):
        raise DamagedFileError(
            f"{where}: {values.size} bytes, but a graph of {num_nodes} nodes has {start + digits + -(-num_pairs // 6)}"
        )
    bits = (body[:, None] >> np.arange(5, -1, -1)) & 1
    present = bits.ravel()[:num_pairs].astype(bool)
    row, column = np.tril_indices(num_nodes, -1)  # (1, 0), (2, 0), (2, 1), ...: the columns of the upper triangle
    row, column = row[present], column[present]
    pairs = np.stack([np.concatenate([row, column]), np.concatenate([column, row])])
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    return Data(edge_index=torch.as_tensor(pairs.astype(np.int64)), num_nodes=num_nodes)
