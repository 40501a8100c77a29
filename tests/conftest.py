"""One thread for each test process: several workers with several threads each would fight over the cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import build, save_mixed

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels' modules are read
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved adapter, for tests that only read it."""
    return save_mixed(tmp_path_factory.mktemp("saved") / "a")


@pytest.fixture(scope="module")
def base() -> Any:
    """One model for all refusals: each must leave it as it was."""
    return build()
