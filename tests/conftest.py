from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic cuBLAS
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # processes side by side share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison_and_seed():
    """Fill uninitialised memory with NaN (``torch.empty``, and outputs of kernels), and seed every test alike."""
    torch.manual_seed(0)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def geo_data() -> Path:
    """The root of the public benchmark data, named by GEO_DATA."""
    root = os.environ.get("GEO_DATA")
    if not root:
        pytest.skip("GEO_DATA is not set: no public data here")
    if not Path(root).is_dir():
        pytest.skip(f"GEO_DATA={root} is not a folder: no public data here")
    return Path(root)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def double():
    """float64 as the default dtype, in which e3nn builds its modules and rotations."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
