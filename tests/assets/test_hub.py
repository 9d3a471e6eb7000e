"""What is taken from the hub, and what is said when it cannot be had."""

import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from wmtp_worker.assets.fetch import fetch
from wmtp_worker.assets.hub import PUBLIC, Repository, _bar
from wmtp_worker.assets.resolve import dataset_folder, model_folder, tokenizer_folder
from wmtp_worker.errors import DiskFullError, ExhaustedError, InputError, IntegrityError, Interrupted, SettingsError
from wmtp_worker.storage.seal import verify_folder

LARGE = bytes(range(256)) * 64
MODEL = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"{  }",
    "model-00001-of-00002.safetensors": LARGE,
    "model-00002-of-00002.safetensors": LARGE[::-1],
    "model.safetensors.index.json": b"{   }",
    "LICENSE": b"free",
    # what nobody needs, or must not open
    "consolidated.safetensors": LARGE + b"!",
    "pytorch_model.bin": LARGE,
    "pytorch_model.bin.index.json": b"{}",
    "model.gguf": LARGE,
    "model.fp16.safetensors": LARGE,
    "original/params.json": b"{}",
    "onnx/model.onnx": LARGE,
    "modeling.py": b"raise SystemExit",
    "README.md": b"words",
    ".gitattributes": b"*",
}
NEEDED = [name for name in MODEL][:7]


@pytest.fixture
def get(settings, nothing):
    """`get("key=value", …)`: fetch what these settings want, without a bucket."""
    return lambda *overrides, check=nothing: fetch(settings(*overrides), None, check)


def hidden(workdir):
    """Hidden files and folders that a fetch left."""
    return list(workdir.rglob(".*"))


def test_a_model_is_cached_with_what_a_llama_folder_needs(hub, get, settings, workdir):
    commit = hub.model("org/tiny", MODEL).commit
    (done,) = get("model.path=org/tiny")
    folder = workdir / "models" / "org--tiny"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*NEEDED, "manifest.json"])
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == LARGE[::-1]
    assert model_folder(settings("model.path=org/tiny")) == folder
    assert tokenizer_folder(settings("model.path=org/tiny")) == folder
    assert (done.source, done.folder, done.files) == (f"{hub.url}/org/tiny", folder, len(NEEDED))
    assert done.bytes == sum(len(MODEL[name]) for name in NEEDED)
    assert hidden(workdir) == []
    # sealed with what the hub said
    assert verify_folder(folder).files["config.json"].sha256 == hashlib.sha256(b"{}").hexdigest()
    assert json.loads((folder / "manifest.json").read_text())["source"] == f"{hub.url}/org/tiny/tree/{commit}"


def test_pickled_weights_and_a_tokenizers_folder(hub, get, settings, workdir):
    """As older repositories have them: without safetensors, or with the tokenizer apart."""
    needed = [
        "config.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "tokenizer/tokenizer.json",
    ]
    hub.model("org/old", dict.fromkeys([*needed, "training_args.bin", "tokenizer/x.py", "x.safetensors"], LARGE))
    get("model.path=org/old")
    folder = workdir / "models" / "org--old"
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(there) == sorted([*needed, "manifest.json"])
    hub.model("org/tokens", {"tokenizer/tokenizer.model": LARGE, "model.safetensors": LARGE})
    assert get("model.tokenizer=org/tokens")[0].files == 1


def test_what_is_there_is_not_asked_for(hub, get, workdir):
    hub.model("org/tiny", MODEL)
    get("model.path=org/tiny")
    hub.requests.clear()
    assert get("model.path=org/tiny", "model.tokenizer=org/tiny") == []
    assert hub.requests == []
    # a folder by hand, in either spelling, and a path of that name
    shutil.rmtree(workdir / "models" / "org--tiny")
    (workdir / "models" / "org" / "tiny").mkdir(parents=True)
    assert get("model.path=org/tiny") == []
    os.makedirs("other/tiny")
    assert get("model.path=other/tiny") == []
    assert get("model.path=no/such/path", "data.dataset=/no/such/path", "model.tokenizer=~/x") == []
    assert hub.requests == []


def test_a_tokenizer_alone_does_not_bring_the_weights(hub, get, settings, workdir):
    hub.model("org/tiny", MODEL)
    get("model.tokenizer=org/tiny")
    folder = workdir / "models" / "org--tiny--tokenizer"
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "manifest.json", "tokenizer.json"]
    assert tokenizer_folder(settings("model.tokenizer=org/tiny")) == folder
    # and is not taken for the model
    with pytest.raises(InputError, match="is not there"):
        model_folder(settings("model.path=org/tiny"))
    (done,) = get("model.path=org/tiny")
    assert done.folder == workdir / "models" / "org--tiny"


def test_a_dataset_is_its_json_lines(hub, get, settings, workdir):
    hub.dataset("org/mbpp", {"train.jsonl": LARGE, "validation.jsonl": b"{}", "data/x.parquet": LARGE, "x.py": b"1"})
    get("data.dataset=org/mbpp")
    folder = dataset_folder(settings("data.dataset=org/mbpp"))
    assert folder == workdir / "datasets" / "org--mbpp"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "train.jsonl", "validation.jsonl"]


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "x/test.parquet"], slice(0, 2)),
        (["main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"], slice(0, 2)),
        (["openai_humaneval/test-00000-of-00001.parquet", "notes/words.jsonl"], slice(0, 1)),
        (["HumanEval.jsonl.gz"], slice(0, 1)),
    ],
)
def test_a_dataset_may_lie_in_a_folder_and_in_any_format(hub, get, settings, there, taken):
    hub.dataset("org/data", dict.fromkeys(there, b"{}") | {"README.md": b"what it is"})
    get("data.dataset=org/data")
    folder = dataset_folder(settings("data.dataset=org/data"))
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == sorted([*there[taken], "README.md", "manifest.json"])


def test_model_tokenizer_and_dataset_at_once(hub, get):
    hub.model("org/a", MODEL)
    hub.model("org/b", MODEL)
    hub.dataset("org/a", {"mbpp.jsonl": b"{}"})
    done = get("model.path=org/a", "model.tokenizer=org/b", "data.dataset=org/a")
    assert [found.folder.name for found in done] == ["org--a", "org--b--tokenizer", "org--a"]
    assert [found.kind for found in done] == ["models", "models", "datasets"]


def test_what_one_lacks_the_others_are_not_fetched_for(hub, get, workdir):
    hub.model("org/a", MODEL)
    hub.pause = threading.Event()

    # the data set is missed while the model's content is under way
    def go_on():
        end = time.monotonic() + 60
        while not (hub.waiting.is_set() and any("org/none" in line for line in hub.requests)):
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        time.sleep(4)  # for the answer to be told
        hub.pause.set()

    threading.Thread(target=go_on).start()
    with pytest.raises(InputError, match="the hub has no dataset org/none"):
        get("model.path=org/a", "data.dataset=org/none")
    assert not (workdir / "models" / "org--a").exists()
    assert get("model.path=org/a")


@pytest.mark.parametrize(
    ("kind", "files", "what"),
    [
        ("model.path", {"config.json": b"{}", "x.pt": LARGE}, "no model.safetensors, no pytorch_model.bin, only x.pt"),
        ("model.path", {"config.json": b"{}", "consolidated.safetensors": LARGE}, "no model.safetensors"),
        ("model.path", {"config.json": b"{}", "pytorch_model.bin.index.json": b"{}"}, "no pytorch_model.bin"),
        ("model.path", {"model.safetensors": LARGE}, "no config.json"),
        ("model.tokenizer", {"vocab.txt": b"1"}, "no tokenizer.json and no tokenizer.model"),
        ("data.dataset", {"a/train.parquet": LARGE, "b/train.parquet": LARGE}, "a/train.parquet is in none of"),
        ("data.dataset", {"words.csv": LARGE}, "no *.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet"),
    ],
)
def test_a_repository_without_what_matters_is_refused_before_the_download(hub, get, workdir, kind, files, what):
    (hub.dataset if kind == "data.dataset" else hub.model)("org/x", files)
    with pytest.raises(InputError) as caught:
        get(f"{kind}=org/x")
    assert what in caught.value.what
    assert "wmtp assets push" in caught.value.fix
    assert hub.downloads() == []
    assert not list(workdir.glob("*/org*"))


@pytest.mark.parametrize(
    ("token", "access", "what", "fix"),
    [
        (
            None,
            {"gated": True},
            "is gated, and no token was given",
            "accept its licence at {url}/org/x, then set HF_TOK",
        ),
        ("hf_other", {"gated": True}, "is gated, and the token's account has no access", "accept its licence at {url}"),
        (None, {"private": True}, "the hub has no model org/x, or does not show it", "set HF_TOKEN"),
        ("hf_other", {"private": True}, "the hub has no model org/x, or does not show it", "set HF_TOKEN"),
        ("bad-token", {}, "the hub refuses org/x: 401", "set HF_TOKEN to a valid token"),
    ],
)
def test_without_access_the_error_says_what_to_set(hub, get, monkeypatch, workdir, token, access, what, fix):
    hub.model("org/x", MODEL, token="hf_right", **access)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError) as caught:
        get("model.path=org/x")
    assert what in caught.value.what
    assert fix.format(url=hub.url) in caught.value.fix
    assert caught.value.where == f"{hub.url}/org/x"
    assert token is None or token not in str(caught.value)
    assert not list(workdir.glob("models/org*"))


@pytest.mark.parametrize("access", [{"gated": True}, {"private": True}])
def test_the_token_opens_what_is_closed_and_stays_at_the_hub(hub, get, monkeypatch, workdir, access):
    hub.model("org/x", MODEL, token="hf_right", **access)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    get("model.path=org/x")
    assert hub.tokens == {"hf_right"}
    assert hub.tokens_at_content == set()
    assert not any(b"hf_right" in path.read_bytes() for path in workdir.rglob("*") if path.is_file())


def test_no_such_repository(hub, get):
    with pytest.raises(InputError, match="the hub has no dataset org/none") as caught:
        get("data.dataset=org/none")
    assert caught.value.where == f"{hub.url}/datasets/org/none"


def test_an_empty_repository(hub, get):
    hub.model("org/x", {})
    with pytest.raises(InputError, match=r"org/x has no model\.safetensors, no pytorch_model\.bin"):
        get("model.path=org/x")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_says_so_and_asks_nobody(hub, get, monkeypatch, variable):
    hub.model("org/x", MODEL)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(InputError, match=f"org/x is not here, and {variable}=1 forbids to ask the hub"):
        get("model.path=org/x")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("endpoint", "what"),
    [("http://hub.example.org", "is without TLS"), ("hub.example.org", "is no address"), ("ftp://x", "is no address")],
)
def test_a_token_never_goes_over_an_open_line(hub, get, monkeypatch, endpoint, what):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(SettingsError, match=what):
        get("model.path=org/x")


def test_without_an_endpoint_it_is_the_public_hub(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Repository("org/x", "dataset").url == f"{PUBLIC}/datasets/org/x"


def test_a_hub_that_does_not_answer_is_worth_another_start(hub, get, monkeypatch):
    hub.fail = 500
    with pytest.raises(ExhaustedError, match="the hub does not give org/x"):
        get("model.path=org/x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExhaustedError, match="the hub does not give org/x"):
        get("model.path=org/x")


def test_a_hub_in_passing_trouble_is_asked_again(hub, settings, nothing, monkeypatch):
    hub.model("org/x", MODEL)
    hub.fail = 503
    threading.Timer(0.5, setattr, (hub, "fail", 0)).start()
    assert fetch(settings("model.path=org/x", "cloud.patience=20"), None, nothing)


def test_a_cut_download_goes_on_and_a_flipped_byte_is_fetched_again(hub, get, workdir, capfd):
    hub.model("org/x", MODEL)
    hub.cut["model-00001-of-00002.safetensors"] = 1
    hub.flip["model-00002-of-00002.safetensors"] = 1
    hub.flip["config.json"] = 1
    get("model.path=org/x")
    folder = workdir / "models" / "org--x"
    assert {name: (folder / name).read_bytes() for name in NEEDED} == {name: MODEL[name] for name in NEEDED}
    # addresses of the content server are signed: whoever has one may read
    assert "signature" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_file_that_never_arrives_as_it_is_is_refused(hub, get, workdir, name):
    hub.model("org/x", MODEL)
    hub.flip[name] = 100
    with pytest.raises(IntegrityError, match=f"{name} does not have the digest"):
        get("model.path=org/x")
    assert not (workdir / "models" / "org--x").exists()


def test_an_interrupted_fetch_leaves_nothing_to_see_and_goes_on(hub, get, workdir):
    hub.model("org/x", MODEL)
    hub.pause = threading.Event()

    def check():
        if hub.waiting.is_set():
            hub.pause.set()
            raise Interrupted("stopped by a test")

    with pytest.raises(Interrupted):
        get("model.path=org/x", check=check)
    assert not (workdir / "models" / "org--x").exists()
    before = set(hub.downloads())
    assert "config.json" in before
    hub.requests.clear()
    # the commit has moved on meanwhile: a file less, one more, and one that differs
    changed = {name: data for name, data in MODEL.items() if name != "generation_config.json"}
    hub.model("org/x", changed | {"config.json": b'{"a": 1}', "merges.txt": b"1"})
    get("model.path=org/x")
    folder = workdir / "models" / "org--x"
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    assert not (folder / "generation_config.json").exists()
    assert (folder / "merges.txt").exists()
    assert hidden(workdir) == []


def test_finished_files_of_an_interrupted_fetch_are_not_fetched_again(hub, get, workdir):
    hub.model("org/x", MODEL)
    hub.flip["model-00001-of-00002.safetensors"] = 2
    with pytest.raises(IntegrityError):
        get("model.path=org/x")
    hub.requests.clear()
    get("model.path=org/x")
    assert "model-00002-of-00002.safetensors" not in hub.downloads()
    assert "model-00001-of-00002.safetensors" in hub.downloads()


def test_of_several_at_once_one_fetches(hub, get):
    hub.model("org/x", MODEL)
    with ThreadPoolExecutor(4) as pool:
        done = [job.result() for job in [pool.submit(get, "model.path=org/x") for _ in range(4)]]
    assert sorted(map(len, done)) == [0, 0, 0, 1]
    assert hub.downloads().count("config.json") == 1


def test_too_little_room_is_said_before_the_download(hub, get, monkeypatch):
    hub.model("org/x", MODEL)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFullError, match="MB are to be downloaded"):
        get("model.path=org/x")
    assert hub.downloads() == []


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a\\..\\x.safetensors", "\u202e.safetensors\n"])
def test_a_name_that_leads_elsewhere_is_not_used(hub, get, workdir, tmp_path, name):
    hub.model("org/x", {"config.json": b"{}", "b.safetensors": LARGE, name: LARGE})
    try:
        get("model.path=org/x")
    except InputError:
        assert not list(workdir.glob("models/org*"))
    outside = {path for path in tmp_path.rglob("*x.safetensors")}
    assert outside == set()


def test_a_link_in_the_place_of_a_beginning_is_not_followed(hub, get, workdir, tmp_path):
    hub.model("org/x", MODEL)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    building = workdir / "models" / ".partial-org--x-hub"
    building.mkdir(parents=True)
    (building / "config.json").symlink_to(victim)
    with pytest.raises(InputError, match="symbolic link"):
        get("model.path=org/x")
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["org/x/y", "org--a/x", "org/..", "../x", "./x", "org/", "/org/x", "org/x y", "-/x"])
def test_what_is_no_name_never_reaches_the_hub(hub, get, name):
    assert get(f"model.path={name}") == []
    assert hub.requests == []


class Count:
    """A progress that adds up."""

    total = 0

    def start(self, total): ...

    def advance(self, size, files=0):
        self.total += size

    def finish(self): ...


def test_progress_counts_every_byte_once(hub, settings, nothing):
    hub.model("org/x", MODEL)
    progress = Count()
    fetch(settings("model.path=org/x"), None, nothing, progress)
    assert progress.total == sum(len(MODEL[name]) for name in NEEDED)


def test_progress_of_the_clients_other_way_to_download(nothing):
    # as far as that goes without its server
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    count = Count()
    bar = _bar(nothing, count.advance)
    with XetDownloadProgressReporter(reconstruction_desc="x", total=10, log_level=30, tqdm_class=bar) as reporter:
        for done in (4, 10):
            rates = {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": 1.0}
            counts = {"total_bytes_completed": done, "total_transfer_bytes_completed": done, "total_bytes": 10}
            reporter.update_progress(SimpleNamespace(**counts, **rates))
    assert count.total == 10
