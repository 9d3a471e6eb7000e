"""What the tests of checkpoints share."""

import pytest
import torch

from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER, Snapshot
from wmtp_worker.storage.layout import RunPaths

FACTS = {"settings_digest": "", "worker_version": "0", "torch_version": torch.__version__}


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path, "run")


@pytest.fixture
def snapshot():
    """Makes a snapshot whose tensors all hold the number of its step."""

    def make(step, frozen=None, kind="full", size=1000):
        tensors = {
            MODEL: {"w": torch.full((size,), float(step)), "b": torch.full((3,), step, dtype=torch.bfloat16)},
            OPTIMIZER: {"exp_avg/w": torch.full((size,), float(step))},
        }
        return Snapshot(step, tensors, {"state.json": {"step": step}}, FACTS, frozen=frozen or {}, kind=kind)

    return make
