"""`best_model.pt` and `final.pt`: the weights alone, for evaluation and for other tools."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wmtp_worker.errors import CheckpointError
from wmtp_worker.storage.atomic import atomic_path


def save_weights(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Replace `path` atomically by `{**facts, "model": tensors}`, readable by `torch.load(weights_only=True)`.

    `facts` must be plain JSON-like values. Raises `DiskFullError` or `InputError`; the old file then stays.
    """
    model = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as written, written.open("wb") as file:
        torch.save({**facts, "model": model}, file)


def load_weights(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote, on the CPU. Never unpickles anything but tensors and plain values."""
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        content["step"], content["config"], content["model"]
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name}", where=str(path.parent), fix="train the run first") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others
        raise CheckpointError(f"{path.name} does not load: {error}", where=str(path), fix="use another one") from None
    loaded: dict[str, Any] = content
    return loaded
