"""What checkpoints a run has, for people and machines to read."""

from dataclasses import asdict, dataclass
from typing import Any

from wmtp_worker.checkpoint.manifest import read_manifest, verify
from wmtp_worker.errors import CheckpointError
from wmtp_worker.storage.layout import RunPaths


@dataclass(frozen=True)
class Item:
    """One checkpoint. `status`: `complete` (has a sound manifest), `verified` (every file was read), `damaged`."""

    name: str
    step: int
    created: str | None
    bytes: int | None
    status: str
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_checkpoints(paths: RunPaths, verified: bool = False) -> list[Item]:
    """The run's checkpoint folders by step, oldest first; with `verified` every byte of them is read."""
    items = []
    for step in paths.steps():
        folder = paths.step(step)
        try:
            manifest = verify(folder) if verified else read_manifest(folder)
        except CheckpointError as error:
            if not folder.exists():  # pruned meanwhile by the run itself
                continue
            items.append(Item(folder.name, step, None, None, "damaged", error.what))
            continue
        size = sum(entry.size for entry in manifest.files.values())
        items.append(Item(folder.name, step, manifest.created, size, "verified" if verified else "complete"))
    return items
