"""The bucket's part of the cascade, and pushes that it is pulled from."""

import errno
import json
import os
import shutil
import threading

import pytest

from wmtp_worker.assets.fetch import PUSHING, fetch
from wmtp_worker.assets.inventory import list_assets, verify_bucket, verify_local
from wmtp_worker.assets.publish import push
from wmtp_worker.assets.resolve import (
    dataset_folder,
    model_folder,
    reference_folder,
    reward_folder,
    tokenizer_folder,
)
from wmtp_worker.errors import AccessDenied, ExhaustedError, InputError, IntegrityError, PreconditionFailed
from wmtp_worker.storage.layout import MANIFEST, asset_name
from wmtp_worker.storage.objects import ObjectInfo
from wmtp_worker.storage.seal import verify_folder

LARGE = bytes(range(256)) * 64


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model, with a part in a folder of its own and hidden files."""
    folder = tmp_path / "made" / "model"
    (folder / "extra").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "tokenizer.json").write_bytes(b"{ }")
    (folder / "model.safetensors").write_bytes(LARGE)
    (folder / "extra" / "notes.txt").write_bytes(b"words")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_bytes(b"ref")
    return folder


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "made" / "data"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(b"{}\n")
    (folder / "validation.jsonl").write_bytes(b"{}\n")
    return folder


def content(folder):
    """Names and bytes of all visible files."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in names.items() if not name.startswith(".")}


def hidden(folder):
    return [path for path in folder.rglob(".*") if path.name != ".sync"]


# --- pushed and pulled


def test_what_was_pushed_is_found_by_name_and_by_hub_name(transfer, model, dataset, settings, workdir, nothing, bucket):
    assert push(transfer, model, "models", "org/mine").url == f"{bucket}/models/org--mine/"
    push(transfer, dataset, "datasets", "few")
    assert not (bucket / "models" / "org--mine" / ".git").exists()
    wanted = settings("model.path=org/mine", "data.dataset=few", "model.tokenizer=org--mine")
    done = fetch(wanted, transfer, nothing)
    assert done[0].source == f"{bucket}/models/org--mine/"
    assert model_folder(wanted) == tokenizer_folder(wanted) == workdir / "models" / "org--mine"
    assert content(model_folder(wanted)) == content(model)
    assert content(dataset_folder(wanted)) == content(dataset)
    assert verify_folder(model_folder(wanted)).files.keys() == content(model).keys() - {"manifest.json"}
    assert hidden(workdir) == []
    assert fetch(wanted, None, nothing) == []


def test_frozen_models_are_fetched_by_whoever_needs_them(transfer, model, settings, workdir, nothing):
    for name in ("reference", "judge"):
        push(transfer, model, "models", name)
    named = ["weighting.reference=reference", "weighting.critic.reward_model=judge", "weighting.critic.value=/v"]
    assert fetch(settings(*named), transfer, nothing) == []
    # a model that is the policy's start, too, is fetched once
    rho1 = settings(*named, "weighting.family=rho1_weighted", "model.path=reference", "model.tokenizer=reference")
    assert [done.name for done in fetch(rho1, transfer, nothing)] == ["reference"]
    critic = settings(*named, "weighting.family=critic", "weighting.critic.rewards=reward_model")
    assert [done.name for done in fetch(critic, transfer, nothing)] == ["judge"]
    assert reward_folder(critic) == workdir / "models" / "judge"
    assert reference_folder(rho1) == workdir / "models" / "reference"
    assert (reference_folder(critic), reward_folder(rho1)) == (None, None)
    with pytest.raises(InputError, match=r"weighting\.reference='none' is not there .* set weighting\.reference to"):
        fetch(settings("weighting.family=rho1_weighted", "weighting.reference=none"), transfer, nothing)


def test_the_bucket_goes_before_the_hub(transfer, model, hub, settings, nothing):
    hub.model("org/mine", {"config.json": b"hub", "model.safetensors": LARGE})
    push(transfer, model, "models", "org/mine")
    fetch(settings("model.path=org/mine"), transfer, nothing)
    assert hub.requests == []


def test_what_the_bucket_lacks_comes_from_the_hub_and_is_not_uploaded(transfer, hub, settings, nothing, bucket):
    hub.model("org/mine", {"config.json": b"hub", "model.safetensors": LARGE})
    (done,) = fetch(settings("model.path=org/mine"), transfer, nothing)
    assert done.source == f"{hub.url}/org/mine"
    assert content(bucket) == {}


def test_nowhere_names_every_place_and_what_to_do(transfer, settings, workdir, bucket, nothing):
    with pytest.raises(InputError, match=r"data.dataset='few' is not there") as caught:
        fetch(settings("data.dataset=few"), transfer, nothing)
    assert caught.value.where == f"{workdir / 'datasets' / 'few'} and {bucket}/datasets/few/"
    assert "wmtp assets push FOLDER --name few --dataset" in caught.value.fix
    with pytest.raises(InputError, match=r"model.path='mine' is not there") as caught:
        fetch(settings("model.path=mine"), None, nothing)
    assert "push" not in caught.value.fix


def test_a_folder_of_other_tools_is_taken_with_a_warning(settings, transfer, model, bucket, workdir, nothing, caplog):
    shutil.copytree(model, bucket / "models" / "mine")
    (bucket / "models" / "mine" / "extra" / ".cache").mkdir()
    (bucket / "models" / "mine" / "extra" / ".cache" / "x").write_bytes(b"1")
    (bucket / "models" / "mine" / ".gitattributes").write_bytes(b"1")
    fetch(settings("model.path=mine"), transfer, nothing)
    assert hidden(workdir) == []
    assert "mine/ has no recorded digests: only sizes are checked" in caplog.text
    folder = workdir / "models" / "mine"
    files = content(folder)
    # what arrived is sealed here
    assert verify_folder(folder).files.keys() == files.keys() - {"manifest.json"}
    assert {name: data for name, data in files.items() if name != "manifest.json"} == content(model)
    assert hidden(folder) == []
    # a push records the digests there too, without sending anything but the manifest
    assert push(transfer, folder, "models", "mine").sent
    assert (bucket / "models" / "mine" / "manifest.json").exists()


def test_a_bucket_of_pickled_weights_and_folders_of_splits(
    settings, transfer, tiny_model_folder, bucket, workdir, nothing, one_thread
):
    """`models/<name>/{config.json,pytorch_model.bin,tokenizer/}`, `datasets/<name>/{train,validation}/`."""
    import torch
    from safetensors.torch import load_file

    from wmtp_worker.assets.convert import convert
    from wmtp_worker.data.formats import files_of
    from wmtp_worker.data.tokenizer import digest
    from wmtp_worker.model.loading import load, tensors

    there = bucket / "models" / "7b_1t_4"
    there.mkdir(parents=True)
    shutil.copy(tiny_model_folder / "config.json", there)
    torch.save(load_file(tiny_model_folder / "model.safetensors"), there / "pytorch_model.bin")
    shutil.copytree(tiny_model_folder, there / "tokenizer", ignore=shutil.ignore_patterns("config.json", "model*"))
    sample = dataset_folder(settings())
    for split in ("train", "validation"):
        (bucket / "datasets" / "contest" / split).mkdir(parents=True)
        shutil.copy(sample / f"{split}.jsonl", bucket / "datasets" / "contest" / split / "part-0.jsonl")
    wanted = settings("model.path=7b_1t_4", "data.dataset=contest")
    assert {done.name for done in fetch(wanted, transfer, nothing)} == {"7b_1t_4", "contest"}
    ours, theirs = (tensors(load(path, 1)) for path in (model_folder(wanted), tiny_model_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert digest(tokenizer_folder(wanted)) == digest(tiny_model_folder)
    convert(model_folder(wanted), workdir / "plain", "hf")
    assert digest(workdir / "plain") == digest(tiny_model_folder)
    found = files_of(dataset_folder(wanted), ("train", "validation"))
    assert [path.parent.name for path in found] == ["train", "validation"]


def test_a_push_that_is_not_finished_is_not_taken_for_a_folder_of_other_tools(
    settings, transfer, model, bucket, workdir, nothing, monkeypatch
):
    upload = transfer.upload_file
    sent = []

    def upload_two(path, key, **options):
        if len(sent) == 2:
            raise ExhaustedError("the line is cut")
        sent.append(key)
        return upload(path, key, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "upload_file", upload_two)
        with pytest.raises(ExhaustedError):
            push(transfer, model, "models", "mine")
    assert (bucket / "models" / "mine" / PUSHING).exists()
    with pytest.raises(InputError, match="it is not all there"):
        fetch(settings("model.path=mine"), transfer, nothing)
    assert not (workdir / "models" / "mine").exists()
    # the same again finishes it
    assert push(transfer, model, "models", "mine").sent
    assert not (bucket / "models" / "mine" / PUSHING).exists()
    assert fetch(settings("model.path=mine"), transfer, nothing)


@pytest.mark.parametrize("damage", ["flip", "short", "missing"])
def test_a_damaged_object_is_never_seen(settings, transfer, model, bucket, workdir, nothing, damage):
    push(transfer, model, "models", "mine")
    path = bucket / "models" / "mine" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"X" + LARGE[1:] if damage == "flip" else LARGE[1:])
    with pytest.raises(IntegrityError):
        fetch(settings("model.path=mine"), transfer, nothing)
    assert not (workdir / "models" / "mine").exists()
    finding = verify_bucket(transfer.store, "models", "mine", nothing)
    assert finding.status == "damaged"
    assert "model.safetensors" in finding.problem


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../../escaped", "a\\..\\..\\escaped"])
def test_a_manifest_that_leads_elsewhere_is_refused(settings, transfer, model, bucket, tmp_path, nothing, name):
    push(transfer, model, "models", "mine")
    path = bucket / "models" / "mine" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"]["config.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises((InputError, IntegrityError)):
        fetch(settings("model.path=mine"), transfer, nothing)
    assert list(tmp_path.rglob("escaped")) == []


def test_a_store_that_lists_keys_which_lead_elsewhere(settings, transfer, tmp_path, nothing, monkeypatch):
    store = transfer.store
    keys = ["models/mine/../../../escaped", "models/mine/config.json"]
    monkeypatch.setattr(
        type(store), "list", lambda self, prefix="", after="": iter([ObjectInfo(key, 2, "1") for key in keys])
    )
    monkeypatch.setattr(type(store), "get", lambda self, key, *_: (ObjectInfo(key, 2, "1"), b"{}"))
    monkeypatch.setattr(type(store), "head", lambda self, key: ObjectInfo(key, 2, "1"))
    monkeypatch.setattr("wmtp_worker.assets.fetch.read_seal", lambda store, prefix: None)
    monkeypatch.setattr("wmtp_worker.assets.fetch.PUSHING", "none")
    with pytest.raises(InputError):
        fetch(settings("model.path=mine"), transfer, nothing)
    assert list(tmp_path.rglob("escaped")) == []


def test_one_fetches_and_the_others_find_it(settings, transfer, model, nothing):
    push(transfer, model, "models", "mine")
    done = []
    threads = [
        threading.Thread(target=lambda: done.append(fetch(settings("model.path=mine"), transfer, nothing)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, done)) == [0, 0, 0, 1]


def test_a_bucket_that_cannot_be_asked_is_passed_over_for_the_hub_only(
    settings, transfer, hub, nothing, monkeypatch, caplog
):
    hub.model("org/mine", {"config.json": b"hub", "model.safetensors": LARGE})

    def lost(*_):
        raise ExhaustedError("no connection")

    monkeypatch.setattr("wmtp_worker.assets.fetch.read_seal", lost)
    with pytest.raises(ExhaustedError):
        fetch(settings("model.path=mine"), transfer, nothing)
    assert fetch(settings("model.path=org/mine"), transfer, nothing)
    assert "asking the hub, for the bucket cannot be asked: no connection" in caplog.text

    def denied(*_):
        raise AccessDenied("no")

    monkeypatch.setattr("wmtp_worker.assets.fetch.read_seal", denied)
    hub.model("org/other", {"config.json": b"hub", "model.safetensors": LARGE})
    with pytest.raises(AccessDenied):
        fetch(settings("model.path=org/other"), transfer, nothing)


# --- pushing


def test_a_second_push_sends_nothing_and_a_changed_folder_needs_replace(transfer, model, bucket):
    assert push(transfer, model, "models", "mine").sent
    assert not push(transfer, model, "models", "mine").sent
    (model / "config.json").write_bytes(b"[]")
    with pytest.raises(InputError, match="its digests were recorded before") as caught:
        push(transfer, model, "models", "mine")
    assert "delete its manifest.json" in caught.value.fix
    (model / "manifest.json").unlink()
    (model / "extra" / "notes.txt").unlink()
    with pytest.raises(InputError, match="something else under this name") as caught:
        push(transfer, model, "models", "mine")
    assert "--replace" in caught.value.fix
    assert verify_bucket(transfer.store, "models", "mine", lambda: None).status == "verified"
    assert push(transfer, model, "models", "mine", replace=True).sent
    assert (bucket / "models" / "mine" / "config.json").read_bytes() == b"[]"
    assert not (bucket / "models" / "mine" / "extra" / "notes.txt").exists()


@pytest.mark.parametrize("same", [True, False])
def test_a_push_that_another_one_overtakes(transfer, model, bucket, monkeypatch, same):
    from wmtp_worker.assets import publish

    send = publish.push_sealed

    def overtaken(transfer, folder, prefix, *, replace):
        if not same:
            (bucket / "models" / "mine" / "config.json").write_bytes(b"other")
            manifest = (model / "manifest.json").read_text().replace('"size": 2', '"size": 5')
            (bucket / "models" / "mine" / "manifest.json").write_text(manifest)
        else:
            send(transfer, folder, prefix)
        raise PreconditionFailed("somebody was first")

    monkeypatch.setattr(publish, "push_sealed", overtaken)
    if same:
        assert push(transfer, model, "models", "mine").sent
        assert not (bucket / "models" / "mine" / PUSHING).exists()
    else:
        with pytest.raises(InputError, match="something else under this name"):
            push(transfer, model, "models", "mine")


def test_a_snapshot_of_the_hub_is_pushed_through_its_links(settings, transfer, model, bucket, nothing, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(model, blobs)
    for name in content(model):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    before = sorted(snapshot.parent.rglob("*"))
    done = push(transfer, snapshot, "models", "m")
    assert done.sent
    assert sorted(snapshot.parent.rglob("*")) == before
    assert {name: data for name, data in content(bucket / "models" / "m").items() if name != MANIFEST} == content(model)
    assert not push(transfer, snapshot, "models", "m").sent


@pytest.mark.parametrize("target", ["gone", "folder"])
def test_links_that_lead_to_no_file_are_refused_before_anything_is_written(transfer, model, bucket, tmp_path, target):
    (tmp_path / "folder").mkdir()
    (model / "weights").symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="weights is a link that leads to no file"):
        push(transfer, model, "models", "m")
    assert content(bucket) == {}
    assert not (model / MANIFEST).exists()


def test_links_where_no_hard_links_can_be_made(transfer, model, bucket, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").write_bytes(b"x")
    (model / "weights").symlink_to(tmp_path / "elsewhere")

    def link(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(InputError, match="cp -rL"):
        push(transfer, model, "models", "m")
    assert content(bucket) == {}
    assert not (model / MANIFEST).exists()
    assert not list(model.parent.glob(".tmp-push-*"))


@pytest.mark.parametrize("manifest", [b"{broken", b"[]", b""])
def test_a_damaged_manifest_in_the_bucket_can_be_replaced(transfer, model, bucket, manifest):
    push(transfer, model, "models", "m")
    (bucket / "models" / "m" / MANIFEST).write_bytes(manifest)
    with pytest.raises(IntegrityError, match="--replace"):
        push(transfer, model, "models", "m")
    assert push(transfer, model, "models", "m", replace=True).sent
    assert (bucket / "models" / "m" / MANIFEST).read_bytes() == (model / MANIFEST).read_bytes()
    assert not (bucket / "models" / "m" / ".pushing").exists()


def test_a_new_file_is_not_left_behind_silently(transfer, model):
    push(transfer, model, "models", "mine")
    (model / "merges.txt").write_bytes(b"1")
    with pytest.raises(InputError, match=r"merges.txt is not among the recorded files"):
        push(transfer, model, "models", "mine")


def test_objects_of_other_tools_are_not_deleted_without_replace(transfer, model, bucket):
    (bucket / "models" / "mine").mkdir(parents=True)
    (bucket / "models" / "mine" / "precious.bin").write_bytes(b"1")
    with pytest.raises(InputError, match="something else under this name"):
        push(transfer, model, "models", "mine")
    assert content(bucket) == {"models/mine/precious.bin": b"1"}
    push(transfer, model, "models", "mine", replace=True)
    assert "models/mine/precious.bin" not in content(bucket)


@pytest.mark.parametrize(
    ("kind", "files", "fix"),
    [
        ("models", ["train.jsonl"], "--dataset"),
        ("datasets", ["config.json"], "--dataset out"),
        ("models", [], "--dataset"),
    ],
)
def test_a_folder_of_another_kind_is_refused(transfer, tmp_path, kind, files, fix):
    folder = tmp_path / "x"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"{}")
    with pytest.raises(InputError, match="the folder holds no") as caught:
        push(transfer, folder, kind, "x")
    assert fix in caught.value.fix
    assert os.listdir(folder) == files


@pytest.mark.parametrize("name", ["", ".", "..", "a/b/c", "../x", ".hidden", "a b", "a\\b", "~x", "x" * 201, "a..b"])
def test_what_is_no_name(transfer, model, name):
    assert asset_name(name) is None
    with pytest.raises(InputError, match="is no name for a folder in the bucket"):
        push(transfer, model, "models", name)


@pytest.mark.parametrize(
    ("name", "folder"), [("a", "a"), ("org/a.b-c_d", "org--a.b-c_d"), ("모델", "모델"), ("_x", "_x")]
)
def test_names(name, folder):
    assert asset_name(name) == folder


# --- looking


def test_both_sides_are_listed(transfer, model, dataset, bucket, workdir):
    push(transfer, model, "models", "mine")
    shutil.copytree(dataset, bucket / "datasets" / "raw")
    shutil.copytree(model, workdir / "models" / "mine")
    (workdir / "datasets" / "here").mkdir(parents=True)
    items = {(item.kind, item.name): item for item in list_assets(workdir, transfer.store)}
    assert list(items) == [("datasets", "here"), ("datasets", "raw"), ("models", "mine")]
    mine = items["models", "mine"]
    assert (mine.bucket.files, mine.bucket.recorded, mine.bucket.unfinished) == (4, True, False)
    assert mine.bucket.bytes == mine.local.bytes - 3  # .git/HEAD stays here
    assert mine.local.recorded
    raw = items["datasets", "raw"]
    assert raw.local is None
    assert (raw.bucket.files, raw.bucket.recorded) == (2, False)
    assert items["datasets", "here"].bucket is None


def test_verify_tells_what_is_recorded_and_what_is_not(transfer, model, bucket, workdir, nothing):
    store = transfer.store
    assert verify_bucket(store, "models", "mine", nothing).status == "not there"
    shutil.copytree(model, bucket / "models" / "mine")
    assert verify_bucket(store, "models", "mine", nothing).status == "not recorded"
    assert verify_local(model, workdir, "models", "mine").status == "not recorded"
    push(transfer, model, "models", "mine")
    assert verify_local(model, workdir, "models", "mine").status == "verified"
    for read in (False, True):
        found = verify_bucket(store, "models", "mine", nothing, read=read)
        assert (found.status, found.files, found.bytes) == ("verified", 4, 5 + len(LARGE) + 5)
    (model / "config.json").unlink()
    assert verify_local(model, workdir, "models", "mine").problem == "config.json is missing"


def test_read_does_not_believe_the_recorded_digest(transfer, model, bucket, nothing, monkeypatch):
    push(transfer, model, "models", "mine")
    store = transfer.store
    digests = {path: store.head(path).sha256 for path in (f"models/mine/{name}" for name in content(model))}
    (bucket / "models" / "mine" / "config.json").write_bytes(b"[]")
    head = type(store).head

    def liar(self, key):
        info = head(self, key)
        return ObjectInfo(info.key, info.size, info.version, digests[key])

    monkeypatch.setattr(type(store), "head", liar)
    assert verify_bucket(store, "models", "mine", nothing).status == "verified"
    finding = verify_bucket(store, "models", "mine", nothing, read=True)
    assert finding.problem == "config.json has another SHA-256"


def test_a_real_model_is_the_same_after_hub_cache_and_bucket(
    hub, transfer, settings, workdir, tiny_model_folder, nothing, one_thread
):
    import torch

    from wmtp_worker.data.tokenizer import load_tokenizer
    from wmtp_worker.model.loading import base_digest, load, tensors

    hub.model("org/tiny", tiny_model_folder)
    wanted = settings("model.path=org/tiny")
    fetch(wanted, transfer, nothing)
    push(transfer, workdir / "models" / "org--tiny", "models", "org/tiny")
    shutil.rmtree(workdir / "models")
    (done,) = fetch(wanted, transfer, nothing)
    assert done.source.endswith("bucket/models/org--tiny/")
    folder = model_folder(wanted)
    assert base_digest(folder) == base_digest(tiny_model_folder)
    assert load_tokenizer(tokenizer_folder(wanted)).eos_token_id == load_tokenizer(tiny_model_folder).eos_token_id
    ours, theirs = (tensors(load(path, 1)) for path in (folder, tiny_model_folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
