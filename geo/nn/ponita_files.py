"""Saving and loading `PONITA`: weights as safetensors, arguments as JSON, no pickles."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MODEL, VERSION = "geo.nn.PONITA", 1


def save_model(path: str | os.PathLike[str], state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Path:
    """Writes both files, each to a temporary name first, so that what stands under its own name is complete."""
    save_file = _safetensors().save_file
    weights, settings = _paths(path)
    plain = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    text = json.dumps({"model": MODEL, "version": VERSION, "arguments": dict(arguments)}, indent=2) + "\n"
    _write(weights, lambda part: save_file(plain, part))
    _write(settings, lambda part: Path(part).write_text(text))
    return weights


def load_model(cls: type[nn.Module], path: str | os.PathLike[str], device: torch.device | str) -> nn.Module:
    """Builds the model that the JSON file describes and gives it the weights; refuses whatever it does not know."""
    load_file = _safetensors().load_file
    weights, settings = _paths(path)
    try:
        record = json.loads(settings.read_text())
    except ValueError as error:
        raise ValueError(f"{settings} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("model") != MODEL or record.get("version") != VERSION:
        raise ValueError(f"{settings} is not the description of a {MODEL}, version {VERSION}")
    arguments = record.get("arguments")
    unknown = sorted(set(record) - {"model", "version", "arguments"})
    if unknown or not isinstance(arguments, dict):
        raise ValueError(f"{settings} must hold 'model', 'version' and 'arguments'; unknown keys: {unknown}")
    parameters = inspect.signature(cls).parameters
    unknown = sorted(set(arguments) - set(parameters))
    missing = sorted(n for n, p in parameters.items() if p.default is p.empty and n not in arguments)
    if unknown or missing:
        raise ValueError(
            f"{settings}: unknown arguments {unknown}, missing arguments {missing}; known are {', '.join(parameters)}"
        )
    model = cls(**arguments)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights} does not exist, but {settings} does")
    try:
        state = load_file(str(weights), device=str(device))
    except _safetensors_error() as error:
        raise ValueError(f"{weights} is not a safetensors file: {error}") from None
    wanted = model.state_dict()
    unknown, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
    if unknown or missing:
        raise ValueError(f"{weights}: unknown tensors {unknown}, missing tensors {missing}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"{weights}: {name} has shape {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
    model.load_state_dict(state, assign=True)
    return model.eval()


def _write(target: Path, write: Callable[[str], object]) -> None:
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(str(part))
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("saving and loading models needs safetensors: pip install 'torch-geo[train]'") from error
    return safetensors.torch


def _safetensors_error() -> type[Exception]:
    import safetensors

    error: type[Exception] = safetensors.SafetensorError
    return error


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    stem = os.fspath(path)
    for suffix in (".safetensors", ".json"):
        stem = stem.removesuffix(suffix)
    return Path(stem + ".safetensors"), Path(stem + ".json")
