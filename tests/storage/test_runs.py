"""The resume table, publishing and pruning, on every kind of bucket."""

import hashlib
import json
import shutil
from contextlib import contextmanager
from datetime import timedelta

import pytest

from wmtp_worker.errors import BucketNotFound, IntegrityError, ObjectNotFound, TransientError
from wmtp_worker.storage import CloudSync
from wmtp_worker.storage.layout import MANIFEST, RunPaths
from wmtp_worker.storage.seal import seal_folder, verify_folder

RUN = "tiny"


@pytest.fixture
def machine(server, use_environ, tmp_path):
    """`machine(name)` is a work directory with its `CloudSync`; all share one bucket."""
    use_environ(server.environ)
    bucket, opened = server.make_bucket(), []

    def make(name: str, **settings) -> CloudSync:
        cloud = CloudSync(server.cloud(bucket, prefix="team/project", **settings), tmp_path / name)
        opened.append(cloud)
        return cloud

    yield make
    for cloud in opened:
        cloud.close(5)


def checkpoint(cloud: CloudSync, step: int, content: str = "weights") -> None:
    """A sealed folder as a run makes it, with what belongs to it."""
    paths = RunPaths(cloud.workdir, RUN)
    folder = paths.step(step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"{content} {step}")
    (folder / "state.json").write_text(json.dumps({"step": step}))
    seal_folder(folder)
    paths.logs.mkdir(parents=True, exist_ok=True)
    paths.metrics.write_text("".join(f"{number}\n" for number in range(step)))
    paths.best.write_text(f"best of {step}")


def content(cloud: CloudSync, step: int) -> str:
    return (RunPaths(cloud.workdir, RUN).step(step) / "model.safetensors").read_text()


@contextmanager
def holding(cloud: CloudSync, began: int | None = None):
    """The run's side under a lease of its own, that went on from the newest published step."""
    side = cloud.run(RUN)
    lease = cloud.hold(side)
    lease.began(max(side.published_steps(), default=0) if began is None else began)
    try:
        yield side
    finally:
        cloud.let_go(lease)


def publish(cloud: CloudSync, *steps: int) -> None:
    with holding(cloud) as side:
        for step in steps:
            checkpoint(cloud, step)
            side.publish_logs()
            assert side.publish(step) > 0


def of_step(cloud: CloudSync, step: int, name: str) -> str:
    """The key of a published file, whoever published it."""
    return next(info.key for info in cloud.store.list(f"checkpoints/{RUN}/step_{step}/") if info.key.endswith(name))


@pytest.mark.parametrize(
    ("local", "remote", "fetched"),
    [
        ([], [], None),
        ([40], [], None),
        ([], [40], 40),
        ([40], [60], 60),
        ([60], [40], None),
        ([40], [40], None),
        ([40], [20, 60], 60),
    ],
)
def test_the_resume_table(machine, local, remote, fetched):
    publish(machine("other"), *remote)
    here = machine("here")
    for step in local:
        checkpoint(here, step, "local")
    assert here.run(RUN).fetch_checkpoint("auto") == fetched
    steps = RunPaths(here.workdir, RUN).steps()
    assert steps == sorted({*local, *([fetched] if fetched else [])})
    for step in local:
        assert content(here, step) == f"local {step}"
    if fetched:
        paths = RunPaths(here.workdir, RUN)
        assert content(here, fetched) == f"weights {fetched}"
        assert paths.best.read_text() == f"best of {fetched}"
        assert paths.metrics.read_text().count("\n") == fetched
        assert [path.name for path in paths.checkpoints.iterdir() if path.name.startswith((".tmp", ".partial"))] == []


def test_a_damaged_local_one_is_set_aside_for_the_buckets(machine):
    publish(machine("other"), 60)
    here = machine("here")
    checkpoint(here, 60)
    paths = RunPaths(here.workdir, RUN)
    (paths.step(60) / "model.safetensors").write_text("WEIGHTS 60")
    assert here.run(RUN).fetch_checkpoint("auto") == 60
    assert content(here, 60) == "weights 60"
    assert [path.read_text() for path in paths.checkpoints.glob("set-aside-*/step_60/model.safetensors")] == [
        "WEIGHTS 60"
    ]


@pytest.mark.parametrize("damage", ["changed", "missing", "manifest"])
def test_a_damaged_one_in_the_bucket_is_passed_over_loudly(machine, caplog, damage):
    other = machine("other")
    publish(other, 40, 60)
    key = of_step(other, 60, "manifest.json" if damage == "manifest" else "model.safetensors")
    if damage == "missing":
        other.store.delete(key)
    else:
        other.store.put(key, b"{" if damage == "manifest" else b"WEIGHTS 60")
    here = machine("here")
    with caplog.at_level("WARNING", "wmtp_worker"):
        assert here.run(RUN).fetch_checkpoint("auto") == 40
    assert "passed over step_60 in the bucket" in caplog.text
    assert RunPaths(here.workdir, RUN).steps() == [40]
    with pytest.raises(IntegrityError):
        here.run(RUN).fetch_checkpoint(60)


def test_a_step_that_is_asked_for(machine):
    publish(machine("other"), 20, 40)
    here = machine("here")
    assert here.run(RUN).fetch_checkpoint(20) == 20
    assert here.run(RUN).fetch_checkpoint(20) is None
    assert here.run(RUN).fetch_checkpoint("never") is None
    assert here.run(RUN).fetch_checkpoint(30) is None  # nowhere: the run says which there are
    assert RunPaths(here.workdir, RUN).steps() == [20]


def test_publishing_again_sends_nothing(machine):
    here = machine("here")
    publish(here, 20)
    with holding(here) as side:
        assert side.publish(20) is None


def test_another_checkpoint_under_the_same_name_is_replaced_by_a_later_epoch(machine):
    publish(machine("other"), 20)
    here = machine("here")
    checkpoint(here, 20, "other weights")
    with holding(here, began=0) as side:
        assert side.publish(20)
    assert {info.key.split("/")[3] for info in here.store.list(f"checkpoints/{RUN}/step_20/")} == {
        "manifest.json",
        "e1",
        "e2",
    }
    with holding(here) as side:
        assert side.sweep() == 2 + 2  # files of step 20, best model and metrics
    third = machine("third")
    assert third.run(RUN).fetch_checkpoint("auto") == 20
    assert content(third, 20) == "other weights 20"


def test_half_sent_checkpoints_do_not_exist_and_are_completed(machine):
    other, here = machine("other"), machine("here")
    publish(other, 20, 40)
    other.store.delete(f"checkpoints/{RUN}/step_40/manifest.json")
    other.store.put(f"checkpoints/{RUN}/step_40/e1/left-over", b"of another try")
    assert here.run(RUN).published_steps() == [20]
    with holding(other) as side:
        assert side.publish(40)
        side.sweep()
    keys = {info.key for info in other.store.list(f"checkpoints/{RUN}/step_40/")}
    assert keys == {
        f"checkpoints/{RUN}/step_40/{name}" for name in ("manifest.json", "e2/model.safetensors", "e2/state.json")
    }


def steps_left(cloud: CloudSync) -> set[str]:
    return {info.key.split("/")[2] for info in cloud.store.list(f"checkpoints/{RUN}/step_")}


def test_pruning_keeps_the_last_and_removes_half_sent_ones(machine):
    here = machine("here")
    publish(here, 10, 20, 30, 40, 60)
    here.store.delete(f"checkpoints/{RUN}/step_10/manifest.json")
    with holding(here) as side:
        here.store.put(f"checkpoints/{RUN}/step_70/e2/model.safetensors", b"on its way")
        # 60 is later than the one just saved: it takes nobody's place
        assert side.prune(keep_last=2, newest=40) == [20]
        assert side.published_steps() == [30, 40, 60]
    assert steps_left(here) == {"step_30", "step_40", "step_60", "step_70"}
    assert here.store.head(f"checkpoints/{RUN}/best_model.pt").size > 0


def test_without_a_lease_what_is_half_sent_stays_for_days(machine, monkeypatch):
    here = machine("here")
    side = here.run(RUN)
    for step in (10, 20, 40):
        checkpoint(here, step)
        assert side.publish(step)
    assert {info.key.split("/")[3] for info in here.store.list(f"checkpoints/{RUN}/step_10/")} == {
        "manifest.json",
        "model.safetensors",
        "state.json",
    }
    here.store.delete(f"checkpoints/{RUN}/step_10/manifest.json")
    assert side.prune(keep_last=1, newest=40) == [20]
    # 10 may be on its way right now; days later nobody sends it any more
    assert steps_left(here) == {"step_10", "step_40"}
    monkeypatch.setattr("wmtp_worker.storage.retention._ABANDONED", timedelta(seconds=-60))
    monkeypatch.setattr(type(here.store), "sweep", lambda *arguments: 0)
    side.prune(keep_last=1, newest=40)
    assert steps_left(here) == {"step_40"}


def test_multiples_and_the_newest_that_verifies_stay(machine):
    here = machine("here")
    publish(here, 10, 20, 30, 40, 50)
    with holding(here) as side:
        here.store.put(of_step(here, 50, "model.safetensors"), b"WEIGHTS 50")
        here.store.put(of_step(here, 40, "model.safetensors"), b"WEIGHTS 40")
        assert side.prune(keep_last=1, newest=50, keep_every=20) == [10]
        assert side.published_steps() == [20, 30, 40, 50]


def test_later_steps_are_set_aside_in_the_bucket(machine):
    here = machine("here")
    publish(here, 20, 40, 60)
    with holding(here, began=20) as side:
        assert side.set_aside_after(20) == [40, 60]
        assert side.published_steps() == [20]
    aside = sorted(info.key.split("/", 3)[3] for info in here.store.list(f"checkpoints/{RUN}/set-aside-"))
    assert [name for name in aside if not name.startswith(("step_", "shared/"))] == [
        "best_model.pt",
        "logs/metrics.jsonl",
    ]
    assert len([name for name in aside if name.startswith("shared/e1/")]) == 4
    assert not here.run(RUN).fetch_file(RunPaths(here.workdir, RUN).best)
    aside = [name for name in aside if name.startswith("step_")]
    assert aside == [
        f"step_{step}/{name}"
        for step in (40, 60)
        for name in ("e1/model.safetensors", "e1/state.json", "manifest.json")
    ]


def test_sync_checkpoints_brings_both_sides_to_the_newest(machine):
    here, there = machine("here"), machine("there")
    publish(here, 20)
    checkpoint(here, 40)
    (RunPaths(here.workdir, RUN).final).write_text("final")
    result = here.sync_checkpoints(RUN, keep_last=1)
    assert (result.fetched, result.published, result.not_safe) == (None, [40], {})
    assert here.run(RUN).published_steps() == [40]
    result = there.sync_checkpoints(RUN)
    assert (result.fetched, result.published, result.not_safe) == (40, [], {})
    assert here.sync_logs(RUN)


def test_sync_checkpoints_warns_and_keeps_where_the_bucket_is_missing(server, use_environ, tmp_path, caplog):
    use_environ(server.environ)
    bucket = server.make_bucket()
    missing = str(tmp_path / "no" / "such") if server.provider == "local" else f"no-{bucket}"[:60]
    with CloudSync(server.cloud(missing, patience=0), tmp_path / "work") as cloud:
        checkpoint(cloud, 20)
        with pytest.raises(BucketNotFound):
            cloud.upload_file(RunPaths(cloud.workdir, RUN).best, "x")
        assert list(cloud.sync_checkpoints(RUN).not_safe) == ["step_20"]
        assert cloud.sync_logs(RUN) is False
    assert "stay where they are" in caplog.text


def test_the_methods_that_carry_one_thing(machine, tmp_path):
    here = machine("here")
    source = tmp_path / "folder"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "sub" / "b.txt").write_text("b")
    here.upload_file(source / "a.txt", "single/a.txt")
    assert here.upload_directory(source, "many").files == 2
    assert here.upload_directory(source, "many").files == 0
    here.download_file("single/a.txt", tmp_path / "back.txt")
    assert (tmp_path / "back.txt").read_text() == "a"
    here.download_directory("many", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "b.txt").read_text() == "b"
    with pytest.raises(ObjectNotFound):
        here.download_file("single/none", tmp_path / "none")
    shutil.rmtree(source)


def test_what_is_passed_over_leaves_logs_and_best_model_as_they_are(machine):
    other, here = machine("other"), machine("here")
    publish(other, 60)
    other.store.put(of_step(other, 60, "model.safetensors"), b"WEIGHTS 60")
    checkpoint(here, 40, "local")
    paths = RunPaths(here.workdir, RUN)
    before = paths.best.read_text(), paths.metrics.read_text()
    assert here.run(RUN).fetch_checkpoint("auto") is None
    assert (paths.best.read_text(), paths.metrics.read_text()) == before


def test_a_manifest_that_is_no_checkpoints_is_passed_over(machine):
    other, here = machine("other"), machine("here")
    publish(other, 40, 60)

    def accept(manifest: bytes, folder: str) -> None:
        if folder == "step_60":
            raise IntegrityError("no checkpoint of this worker")

    assert here.run(RUN).fetch_checkpoint("auto", accept) == 40


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"files": {"../../x": {"size": 1, "sha256": "' + b"0" * 64 + b'"}}}',
        b'{"files": {"x": {"size": 1000000000000000000, "sha256": "' + b"0" * 64 + b'"}}}',
        b'{"files": {}}',
        b"[" * 100_000,
        b"",
    ],
    ids=["outside", "enormous", "no files", "deep", "empty"],
)
def test_a_hostile_manifest_is_passed_over(machine, manifest):
    other, here = machine("other"), machine("here")
    publish(other, 40)
    other.store.put(f"checkpoints/{RUN}/step_60/manifest.json", manifest)
    assert here.run(RUN).fetch_checkpoint("auto") == 40
    # and where the run comes to that step itself, it is replaced
    checkpoint(here, 60)
    with holding(here, began=40) as side:
        assert side.publish(60)
    assert machine("third").run(RUN).fetch_checkpoint("auto") == 60


def test_a_published_checkpoint_that_rots_is_repaired(machine):
    here = machine("here")
    publish(here, 20)
    here.store.put(of_step(here, 20, "model.safetensors"), b"WEIGHTS 20")
    with holding(here) as side:
        assert side.publish(20)
    third = machine("third")
    assert third.run(RUN).fetch_checkpoint("auto") == 20
    assert content(third, 20) == "weights 20"


def test_pruning_does_not_count_what_is_not_whole(machine):
    here = machine("here")
    publish(here, 20, 40)
    here.store.delete(of_step(here, 40, "model.safetensors"))
    with holding(here) as side:
        assert side.prune(keep_last=1, newest=40) == []
        assert side.published_steps() == [20, 40]


def test_files_that_vanish_while_they_are_published_take_the_manifest_back(machine, monkeypatch):
    here = machine("here")
    checkpoint(here, 20)
    put = type(here.store).put

    def put_and_lose(store, key, data, **options):
        if key.endswith("step_20/manifest.json"):
            store.delete(f"checkpoints/{RUN}/step_20/e1/model.safetensors")  # somebody's hand
        return put(store, key, data, **options)

    monkeypatch.setattr(type(here.store), "put", put_and_lose)
    with holding(here) as side:
        with pytest.raises(TransientError, match="while they were published"):
            side.publish(20)
        assert side.published_steps() == []


def test_markers_of_empty_folders_are_in_nobodys_way(machine, server, monkeypatch):
    here = machine("here")
    publish(here, 20, 40)
    if server.provider != "local":  # a folder needs no markers
        # the worker makes none: consoles do
        monkeypatch.setattr(f"wmtp_worker.storage.{server.provider}.check_key", lambda *arguments: None)
        for marker in (f"checkpoints/{RUN}/", f"checkpoints/{RUN}/step_20/", f"logs/{RUN}/"):
            here.store.put(marker, b"")
        monkeypatch.undo()
    checkpoint(here, 60)
    with holding(here) as side:
        assert side.publish(60)
        assert side.prune(keep_last=1, newest=60) == [20, 40]
        assert side.set_aside_after(20) == [60]


def test_beginnings_that_nobody_goes_on_with_are_removed(machine):
    publish(machine("other"), 40)
    here = machine("here")
    beginning = RunPaths(here.workdir, RUN).checkpoints / ".partial-step_20-0123456789ab"
    beginning.mkdir(parents=True)
    (beginning / "model.safetensors").write_text("a part")
    assert here.run(RUN).fetch_checkpoint("auto") == 40
    # it may be another process that fetches: who holds the run's lock removes them
    assert beginning.exists()
    here.sync_checkpoints(RUN)
    assert not beginning.exists()


def test_shared_tensors_that_are_damaged_here_come_from_the_bucket(machine):
    first, second = machine("first"), machine("second")
    frozen = b"what no optimizer changes"
    digest = hashlib.sha256(frozen).hexdigest()
    checkpoint(first, 1)
    paths = RunPaths(first.workdir, RUN)
    paths.shared.mkdir()
    paths.blob(digest).write_bytes(frozen)
    manifest = paths.step(1) / MANIFEST
    shared = {"frozen.safetensors": {"size": len(frozen), "sha256": digest}}
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "shared": shared}))
    with holding(first) as side:
        assert side.publish(1)

    here = RunPaths(second.workdir, RUN)
    here.shared.mkdir(parents=True)
    here.blob(digest).write_bytes(frozen[::-1])
    assert second.run(RUN).fetch_checkpoint("auto") == 1
    assert here.blob(digest).read_bytes() == frozen
    verify_folder(here.step(1))
    assert [path.read_bytes() for path in here.checkpoints.glob("set-aside-*/*")] == [frozen[::-1]]
