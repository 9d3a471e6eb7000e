"""What is deleted and moved in the bucket, in which order, and what stops it; on a bucket in memory."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.storage.memory import MemoryStore
from tests.storage.protocol import Direct, write_checkpoint
from wmtp_worker.errors import Interrupted
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.storage.lease import Lease
from wmtp_worker.storage.lease_file import read_lease
from wmtp_worker.storage.runs import RunSync


@pytest.fixture
def bucket():
    return MemoryStore(lambda: datetime.now(UTC).timestamp())


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path, "tiny")


@pytest.fixture
def life(bucket, paths):
    """`life(step)`: the run's side under a lease of its own, that went on from that step."""

    def begin(step=0, check=lambda: None):
        lease = Lease.acquire(bucket, paths.keys, seconds=30, workdir_id="w")
        if step is not None:
            lease.began(step)
        return RunSync(Direct(bucket), paths, lease, check)

    return begin


def publish(side, *steps):
    for step in steps:
        write_checkpoint(side.paths, step, "somebody")
        side.publish(step)


def test_later_steps_do_not_count_before_the_first_of_them_is_deleted(bucket, life, monkeypatch):
    publish(life(), 1, 2, 3)
    side, deleted, delete = life(step=None), [], bucket.delete

    def watched(key, **options):
        deleted.append((key, read_lease(bucket, side.keys.lease).file.epochs))
        delete(key, **options)

    monkeypatch.setattr(bucket, "delete", watched)
    assert side.set_aside_after(1) == [2, 3]
    assert len(deleted) > 4
    assert {epochs for _, epochs in deleted} == {((1, 0), (2, 1))}
    assert side.published_steps() == [1]


def test_what_several_steps_share_is_moved_once(bucket, life, monkeypatch):
    publish(life(), 1, 2, 3, 4)
    copied, copy = [], bucket.copy

    def counted(source, target):
        copied.append(source)
        copy(source, target)

    monkeypatch.setattr(bucket, "copy", counted)
    side = life(step=None)
    side.publish(1)
    copied.clear()
    side.set_aside_after(1)
    assert [key for key in copied if "/shared/e1/" in key and key.endswith(".safetensors")]
    assert len(copied) == len(set(copied))


@pytest.mark.parametrize("what", ["prune", "sweep", "set aside"])
def test_a_stop_is_heeded_between_two_deletions(bucket, life, what):
    publish(life(), 1, 2, 3, 4)
    stopping = False

    def check():
        if stopping:
            raise Interrupted("stopped")

    side = life(4 if what != "set aside" else None, check)
    for number in range(5):
        bucket.put(side.keys.file(9, 1, f"part-{number}"), b"x")
    if what == "set aside":
        side.publish(1)
    stopping, before = True, bucket.changes
    with pytest.raises(Interrupted):
        {
            "prune": lambda: side.prune(1, 4),
            "sweep": side.sweep,
            "set aside": lambda: side._retention.set_aside_after(1),
        }[what]()
    assert bucket.changes == before


def test_of_the_multiples_only_whole_ones_stay(bucket, life):
    side = life()
    publish(side, 2, 3, 4, 5, 6)
    bucket.delete(side.keys.file(2, 1, "state.json"))
    assert side.prune(1, 6, keep_every=2) == [2, 3, 5]


def test_probes_of_killed_workers_are_swept(bucket, life):
    side = life()
    old = datetime.now(UTC) - timedelta(hours=2)
    bucket._now = old.timestamp
    bucket.put(f"{side.keys.probes}old", b"1")
    bucket._now = datetime.now(UTC).timestamp
    bucket.put(f"{side.keys.probes}of-one-that-starts-now", b"1")
    assert side.sweep() == 1
    assert [info.key for info in bucket.list(side.keys.probes)] == [f"{side.keys.probes}of-one-that-starts-now"]


def test_a_look_at_many_steps_goes_through_the_objects_once(bucket, life):
    side = life()
    publish(side, 1, 2)
    view = side.catalogue.look()
    assert view.of_step(1) == view.by_step[1]
    assert sorted(view.of_step(2)) == [side.keys.file(2, 1, "model.safetensors"), side.keys.file(2, 1, "state.json")]
    assert view.of_step(3) == []


def test_a_full_disk_leaves_no_half_copy_of_the_metrics(bucket, life, paths, monkeypatch):
    from wmtp_worker.errors import DiskFullError
    from wmtp_worker.storage import publish as module

    side = life()
    write_checkpoint(paths, 1, "somebody")
    paths.logs.mkdir(parents=True)
    paths.metrics.write_text("1\n")

    def full(source, target):
        target.write_text("a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(DiskFullError):
        side.publish(1)
    assert list(paths.logs.iterdir()) == [paths.metrics]
    assert not list(paths.checkpoints.glob(".tmp-*"))


def test_what_an_older_epoch_sent_whole_is_copied_not_sent(bucket, life, monkeypatch):
    side = life()
    write_checkpoint(side.paths, 1, "somebody")
    side._publisher._put_manifest = lambda *arguments: 1 / 0  # killed before
    with pytest.raises(ZeroDivisionError):
        side.publish(1)
    side, sent, put = life(), [], bucket.put

    def watched(key, *arguments, **options):
        sent.append(key)
        return put(key, *arguments, **options)

    monkeypatch.setattr(bucket, "put", watched)
    side.publish(1)
    frozen = [key for key in bucket.objects if "/shared/e2/" in key and key.endswith(".safetensors")]
    assert len(frozen) == 1
    assert frozen[0] not in sent  # small files are sent as quickly as they are copied
    assert side.catalogue.look().whole(1)
