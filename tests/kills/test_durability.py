"""What a power cut leaves: nothing may get its name before all that it stands for is on the disk."""

import os

import pytest
import torch

from wmtp_worker.checkpoint import store
from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER, Snapshot
from wmtp_worker.storage.layout import MANIFEST, RunPaths

FACTS = {"settings_digest": "", "worker_version": "0", "torch_version": torch.__version__}
DOCUMENT = "state.json"


@pytest.fixture
def events(monkeypatch):
    """What was synced and renamed, in order, by inode: it stays when a file or folder gets its name."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def on_fsync(descriptor):
        seen.append(("synced", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def on_replace(source, target):
        seen.append(("named", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(os, "replace", on_replace)
    return seen


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, events):
    paths = RunPaths(tmp_path, "run")
    tensors = {MODEL: {"w": torch.ones(10)}, OPTIMIZER: {"exp_avg/w": torch.zeros(10)}}
    snapshot = Snapshot(1, tensors, {DOCUMENT: {"step": 1}}, FACTS, frozen={"f": torch.ones(20)})
    folder = store.write(paths, snapshot)
    (blob,) = paths.shared.iterdir()
    assert {path.name for path in folder.iterdir()} == {MODEL, OPTIMIZER, DOCUMENT, MANIFEST}

    def first(what, path, after=-1):
        """When that happened to a path for the first time since another event."""
        event = (what, path.stat().st_ino)
        assert event in events[after + 1 :], f"{path} is never {what} after event {after}"
        return events.index(event, after + 1)

    manifest, whole = first("named", folder / MANIFEST), first("named", folder)
    # the content of each file, before the manifest that vouches for it
    for path in (folder / MODEL, folder / OPTIMIZER, folder / DOCUMENT, blob):
        assert first("synced", path) < manifest
    # what has a name, had its content before, and keeps it
    for path in (folder / DOCUMENT, blob):
        assert first("synced", path) < first("named", path)
    assert first("synced", paths.shared, after=first("named", blob)) < manifest
    # the manifest; all names in the folder; the folder's own name, which comes last, and is kept
    assert first("synced", folder / MANIFEST) < manifest
    assert first("synced", folder, after=manifest) < whole
    assert first("synced", paths.checkpoints, after=whole) == len(events) - 1
