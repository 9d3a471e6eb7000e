"""`best_model.pt` and `final.pt`: the weights alone, for evaluation and for other tools."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from wmtp_worker.checkpoint.tensorfile import in_blocks
from wmtp_worker.errors import CheckpointError
from wmtp_worker.storage.atomic import atomic_path


def save_weights(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
    heed: Callable[[int], object] = lambda size: None,
) -> None:
    """Replace `path` atomically by `{**facts, "model": tensors}`, readable by `torch.load(weights_only=True)`.

    `facts` must be plain JSON-like values, with a `step`. `heed` is called with the size of each block before it is
    written; what it raises ends the writing. Raises `DiskFullError` or `InputError`; the old file then stays.
    """
    model = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as written, written.open("wb", buffering=0) as file:
        torch.save({**facts, "model": model}, cast(IO[bytes], _Blocks(file, heed)))


class _Blocks(io.RawIOBase):
    """Passes on what `torch.save` writes, which is a whole tensor at a time, in blocks."""

    def __init__(self, file: io.FileIO, heed: Callable[[int], object]) -> None:
        self._file, self._heed = file, heed

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for block in in_blocks(whole):
            self._heed(len(block))
            while block:
                block = block[self._file.write(block) or 0 :]
        return len(whole)


def load_weights(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote, on the CPU. Never unpickles anything but tensors and plain values."""
    try:
        return _checked(torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name}", where=str(path.parent), fix="train the run first") from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError and others
        raise CheckpointError(f"{path.name} does not load: {error}", where=str(path), fix="use another one") from None


def read_facts(path: Path) -> dict[str, Any]:
    """What `save_weights` wrote beside the weights, without reading them; nothing where there is no such file."""
    try:
        content = _checked(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        return {key: value for key, value in content.items() if key != "model"}
    except Exception:  # as above
        return {}


def step_of(path: Path) -> int | None:
    """The step whose weights `save_weights` wrote there, without reading them; None where there is no such file."""
    step = read_facts(path).get("step")
    return step if isinstance(step, int) else None


def _checked(content: Any) -> dict[str, Any]:
    content["step"], content["config"], content["model"]
    checked: dict[str, Any] = content
    return checked
