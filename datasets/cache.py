"""Arrays on disk: checked when read, whole or absent when written, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch_geometric.data import Data, InMemoryDataset

Arrays = dict[str, np.ndarray]


class DamagedFileError(ValueError):
    """A file is truncated, altered or not of the promised format.

    Args:
        message: Names the file, what is wrong with it and what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return 12 hex digits that differ whenever the settings differ."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


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


def _digest(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_cache(path: Path, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
    """Write arrays, their settings and their checksum to ``path``: the file appears whole or not at all."""
    meta = {"settings": dict(settings), "sha256": _digest(arrays, settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, meta=np.array(json.dumps(meta)), **dict(arrays))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_cache(path: Path, settings: Mapping[str, Any]) -> Arrays:
    """Read what :func:`write_cache` wrote; a wrong checksum or other settings raise DamagedFileError."""
    remedy = "delete it, or pass force_reload=True, and it is made again"
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        meta = json.loads(str(arrays.pop("meta")))
        intact = meta["settings"] == json.loads(json.dumps(settings)) and meta["sha256"] == _digest(arrays, settings)
    except Exception as error:  # BadZipFile, EOFError, KeyError, ValueError, zlib.error, ...
        raise DamagedFileError(
            f"{path}: this cache cannot be read ({type(error).__name__}: {error}); {remedy}"
        ) from error
    if not intact:
        raise DamagedFileError(f"{path}: this cache does not match its checksum; {remedy}")
    return arrays


def cached(path: Path, settings: Mapping[str, Any], make: Callable[[], Arrays], force_reload: bool = False) -> Arrays:
    """Return the arrays cached at ``path`` for ``settings``; make and store them where they are absent."""
    if path.is_file() and not force_reload:
        return read_cache(path, settings)
    arrays = make()
    write_cache(path, arrays, settings)
    return arrays


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
