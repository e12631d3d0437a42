"""Files of datasets: checked when read, never unpickled; arrays on disk are those of geo.transforms.array_cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch_geometric.data import Data, InMemoryDataset

from geo.transforms.array_cache import Arrays, DamagedFileError, cached, read_cache, settings_key, write_cache

__all__ = [
    "Arrays",
    "DamagedFileError",
    "cached",
    "check_sha256",
    "choose",
    "file_sha256",
    "fill",
    "read_cache",
    "read_npz",
    "reading",
    "require_file",
    "settings_key",
    "write_cache",
]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_file(path: Path, what: str) -> Path:
    """Return ``path`` if it is a file, else raise FileNotFoundError saying what was looked for."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}; put it there or give another root")
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raise DamagedFileError when the SHA-256 of ``path`` is not ``expected``."""
    found = file_sha256(path)
    if found != expected.lower():
        raise DamagedFileError(
            f"{path}: SHA-256 is {found}, expected {expected.lower()}; the file is damaged or another version, "
            "fetch it again"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises on a bad file into one DamagedFileError that names the file.

    Missing files and missing packages keep their own errors.
    """
    try:
        yield
    except (DamagedFileError, FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:  # readers raise BadZipFile, EOFError, KeyError, XYZError, zlib.error, ...
        raise DamagedFileError(
            f"{path}: cannot be read, it is damaged, truncated or of another format ({type(error).__name__}: {error}); "
            "fetch or make it again"
        ) from error


def read_npz(path: Path, keys: Iterable[str]) -> Arrays:
    """Read the named arrays of an ``.npz`` file, without unpickling; anything wrong is a DamagedFileError."""
    with reading(path), path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        missing = sorted(set(keys) - set(archive.files))
        if missing:
            raise DamagedFileError(f"{path}: holds no array {missing}; it has {sorted(archive.files)}")
        return {key: archive[key] for key in keys}


def fill(dataset: InMemoryDataset, samples: list[Data]) -> None:
    """Filter, pre-transform and collate ``samples`` into ``dataset``."""
    if dataset.pre_filter is not None:
        samples = [sample for sample in samples if dataset.pre_filter(sample)]
    if dataset.pre_transform is not None:
        samples = [dataset.pre_transform(sample) for sample in samples]
    if not samples:
        raise ValueError(
            f"{type(dataset).__name__}: no sample is left; the split or the pre_filter removed all of them"
        )
    dataset._data, dataset.slices = dataset.collate(samples)
    dataset._data_list = None


def choose(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    options = list(allowed)
    if value not in options:
        raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, options))}")
