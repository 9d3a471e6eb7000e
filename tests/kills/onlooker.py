"""What is left of the run "tiny" on a disk, and in a bucket as a machine sees it that has nothing."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_worker.checkpoint.manifest import verify
from wmtp_worker.errors import CheckpointError, IntegrityError, ObjectNotFound
from wmtp_worker.settings import CloudSettings
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.lease_file import read_lease
from wmtp_worker.storage.published import View, objects_of
from wmtp_worker.tracking.metrics import read

RUN = "tiny"


def on_disk(workdir: Path) -> tuple[int, list[str]]:
    """The newest step whose checkpoint verifies (0: none), and what is wrong with others."""
    paths, whole, torn = RunPaths(workdir, RUN), [0], []
    for step in paths.steps():
        try:
            verify(paths.step(step))
            whole.append(step)
        except CheckpointError as error:
            torn.append(str(error))
    return max(whole), torn


def trained_steps(workdir: Path) -> int:
    """The last step in the record."""
    return max((line["step"] for line in read(RunPaths(workdir, RUN).metrics) if line["kind"] == "train"), default=0)


@dataclass(frozen=True)
class Published:
    """The newest epoch, and for each step that counts the versions of all objects it is made of."""

    epoch: int
    steps: dict[int, Any]


class Onlooker:
    """Looks at the run in one bucket. The credentials have to be in the environment while it is made."""

    def __init__(self, cloud: CloudSettings, folder: Path) -> None:
        self._cloud = CloudSync(cloud, folder)
        self._side = self._cloud.run(RUN)
        self._found_whole: dict[int, Any] = {}  # step to the versions of its objects

    def in_bucket(self) -> tuple[int, list[str]]:
        """The newest step that can be had (0: none), and what is wrong with others. What is new is downloaded."""
        whole, torn = [0], []
        for step, versions in self.published().steps.items():
            shutil.rmtree(self._side.paths.step(step), ignore_errors=True)
            try:
                if self._found_whole.get(step) != versions:
                    self._side.fetch_checkpoint(step)
                    self._found_whole[step] = versions
                whole.append(step)
            except (IntegrityError, ObjectNotFound) as error:
                torn.append(f"in the bucket: {error}")
        return max(whole), torn

    def published(self) -> Published:
        view = self._side.catalogue.look()
        lease = read_lease(self._side.store, self._side.keys.lease)
        epoch = lease.file.epoch if lease is not None and lease.file is not None else 0
        return Published(epoch, {step: _versions(view, step) for step in view.steps})

    def close(self) -> None:
        self._cloud.close()


def _versions(view: View, step: int) -> Any:
    manifest = view.manifests[step]
    named = () if manifest.seal is None else objects_of(view.keys, step, manifest.seal)
    return manifest.version, {key: view.objects[key].version for key in named if key in view.objects}
