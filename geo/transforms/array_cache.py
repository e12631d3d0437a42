"""Arrays on disk: checked when read, whole or absent when written, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Arrays", "DamagedFileError", "cached", "digest", "read_cache", "settings_key", "write_cache"]

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


def digest(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of names, types, shapes and contents of arrays and of settings, as 64 hex digits."""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        total.update(f"{key}|{array.dtype.str}|{array.shape}|".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def write_cache(path: Path, arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> None:
    """Write arrays, their settings and their checksum to ``path``: the file appears whole or not at all."""
    meta = {"settings": dict(settings), "sha256": digest(arrays, settings)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, meta=np.array(json.dumps(meta)), **dict(arrays))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_cache(
    path: Path,
    settings: Mapping[str, Any],
    remedy: str = "delete it, or pass force_reload=True, and it is made again",
) -> Arrays:
    """Read what :func:`write_cache` wrote; a wrong checksum or other settings raise DamagedFileError with a remedy."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        meta = json.loads(str(arrays.pop("meta")))
        intact = meta["settings"] == json.loads(json.dumps(settings)) and meta["sha256"] == digest(arrays, settings)
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
