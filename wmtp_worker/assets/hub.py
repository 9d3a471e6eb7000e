"""The Hugging Face hub: one repository's files, in a folder, checked against the digests that the hub has.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and the hub's own cache are heeded, as by every program that uses it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from wmtp_worker.data.files import ENDINGS, data_set
from wmtp_worker.errors import DiskFullError, ExhaustedError, InputError, IntegrityError, SettingsError, WorkerError
from wmtp_worker.settings.checks import is_loopback
from wmtp_worker.storage.atomic import disk_errors, fsync_path, write_text
from wmtp_worker.storage.layout import MANIFEST
from wmtp_worker.storage.seal import FileEntry, Seal
from wmtp_worker.storage.transfer.paths import safe_path

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

log = logging.getLogger(__name__)

Wanted = Literal["model", "tokenizer", "dataset"]

PUBLIC = "https://huggingface.co"
_FILES_AT_ONCE = 4
_TRUE = ("1", "on", "yes", "true")
# names in the repository's root: what a Llama-family folder is read from, and no code
_TOKENIZER = re.compile(
    r"(tokenizer/)?(tokenizer\.json|tokenizer\.model|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.json|merges\.txt|chat_template\.(jinja|json))|LICENSE[^/]*"
)
_READABLE_TOKENIZER = re.compile(r"(tokenizer/)?tokenizer\.(json|model)")
_MODEL = re.compile(rf"{_TOKENIZER.pattern}|config\.json|generation_config\.json")
_ABOUT_DATA = re.compile(r"README\.md|LICENSE[^/]*")
# the first of which there are any, as `model.folder` looks for them
_WEIGHTS = (
    re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"),
    re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json"),
)
_OTHER_WEIGHTS = re.compile(r".+\.(bin|pt|pth|h5|gguf|msgpack|onnx|ot)")


@dataclass(frozen=True)
class Repository:
    """A repository of the hub; `wanted` says which of its files are."""

    name: str
    wanted: Wanted
    allow_http: bool = False

    @property
    def kind(self) -> Literal["model", "dataset"]:
        return "dataset" if self.wanted == "dataset" else "model"

    @property
    def endpoint(self) -> str:
        return (os.environ.get("HF_ENDPOINT") or PUBLIC).rstrip("/")

    @property
    def url(self) -> str:
        """Its page, for people."""
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def download(repository: Repository, folder: Path, check: Callable[[], None], advance: Callable[[int], None]) -> Seal:
    """Fill `folder`, which nobody else looks into, with a repository's newest files and their sealed digests.

    Files that an earlier, interrupted call has finished are not fetched again. `check` is polled and may raise;
    `advance` is told bytes as they come. Raises `InputError` where the hub has no such repository, does not give it or
    has nothing of use in it, `ExhaustedError` where the hub does not answer, `IntegrityError` and `DiskFullError`.
    """
    _check_address(repository)
    with disk_errors(folder.parent), _hub_errors(repository):
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import logging as hub_logging

        # its warnings have signed addresses in them
        hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]

        folder.mkdir(parents=True, exist_ok=True)
        api = HfApi(endpoint=repository.endpoint, library_name="wmtp-worker")
        commit = api.repo_info(repository.name, repo_type=repository.kind).sha
        check()
        listed = api.list_repo_tree(repository.name, recursive=True, revision=commit, repo_type=repository.kind)
        chosen = _choose(repository, {file.path: file for file in listed if isinstance(file, RepoFile)})
        for name in chosen:
            safe_path(folder, name)
        _check_room(folder, chosen)
        entries = _download_all(repository, str(commit), folder, chosen, check, advance)
        _remove_others(folder, chosen.keys())
        seal = Seal(files=entries)
        facts = {"format_version": 1, "source": f"{repository.url}/tree/{commit}", **seal.model_dump()}
        write_text(folder / MANIFEST, json.dumps(facts, indent=1) + "\n")
    return seal


def _choose(repository: Repository, files: "dict[str, RepoFile]") -> "dict[str, RepoFile]":
    """The files that are wanted, by name. Raises `InputError` where what matters is not among them."""
    pattern = {"model": _MODEL, "tokenizer": _TOKENIZER, "dataset": _ABOUT_DATA}[repository.wanted]
    names = {name for name in files if pattern.fullmatch(name)}
    if repository.wanted == "model":
        sets = [{name for name in files if weights.fullmatch(name)} for weights in _WEIGHTS]
        weights = next((found for found in sets if any(not name.endswith(".json") for name in found)), None)
        if weights is None:
            others = sorted(name for name in files if _OTHER_WEIGHTS.fullmatch(name))
            what = f", only {', '.join(others[:3])}{' …' if len(others) > 3 else ''}" if others else ""
            raise _nothing_of_use(
                repository, f"no model.safetensors, no pytorch_model.bin{what}", "name a model in Hugging Face's layout"
            )
        if "config.json" not in names:
            raise _nothing_of_use(repository, "no config.json", "name a Llama-family model")
        names |= weights
    elif repository.wanted == "tokenizer" and not any(map(_READABLE_TOKENIZER.fullmatch, names)):
        what = "no tokenizer.json and no tokenizer.model"
        raise _nothing_of_use(repository, what, "name a repository with a fast or a SentencePiece tokenizer")
    elif repository.wanted == "dataset":
        chosen = data_set(files).keys()
        if not chosen:
            data = [name for name in files if name.endswith(ENDINGS)]
            where = f", {data[0]} is in none of its usual folders" if data else ""
            raise _nothing_of_use(repository, f"no *{', *'.join(ENDINGS)}{where}", "convert it to a train.jsonl")
        names |= chosen
    return {name: files[name] for name in sorted(names)}


def _nothing_of_use(repository: Repository, what: str, fix: str) -> InputError:
    advice = f"{fix}, or set another name; `wmtp assets push FOLDER` puts a folder of yours into the bucket"
    return InputError(f"{repository.name} has {what}", where=repository.url, fix=advice)


def _check_room(folder: Path, files: "dict[str, RepoFile]") -> None:
    begun = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = sum(file.size for file in files.values()) - begun, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{needed / 1e6:,.1f} MB are to be downloaded, {free / 1e6:,.1f} MB are free",
            where=str(folder.parent),
            fix="free some space, or set WMTP_WORKDIR to a larger disk",
        )


def _download_all(
    repository: Repository,
    commit: str,
    folder: Path,
    files: "dict[str, RepoFile]",
    check: Callable[[], None],
    advance: Callable[[int], None],
) -> dict[str, FileEntry]:
    bar = _bar(check, advance)

    def fetch(name: str) -> FileEntry:
        for force in (False, True):
            check()
            _download_file(repository, commit, folder, name, force, bar)
            if (entry := _checked(safe_path(folder, name), files[name])) is not None:
                return entry
            log.warning(
                "%s of %s did not arrive as the hub has it%s", name, repository.name, "" if force else ": again"
            )
        raise IntegrityError(f"{name} does not have the digest that the hub recorded", where=repository.url)

    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="hub") as pool:
        jobs = {pool.submit(fetch, name): name for name in files}
        try:
            return {jobs[job]: job.result() for job in as_completed(jobs)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _download_file(repository: Repository, commit: str, folder: Path, name: str, force: bool, bar: type) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(
        repository.name,
        name,
        repo_type=repository.kind,
        revision=commit,
        local_dir=folder,
        endpoint=repository.endpoint,
        force_download=force,
        library_name="wmtp-worker",
        tqdm_class=bar,
    )


def _checked(path: Path, file: "RepoFile") -> FileEntry | None:
    """Size and SHA-256 of a file that arrived, None where it is not what the hub has: by SHA-256, or git's SHA-1."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as data:
        while block := data.read(1 << 20):
            sha256.update(block)
            if file.lfs is None:
                sha1.update(block)
    right = sha1.hexdigest() == file.blob_id if file.lfs is None else sha256.hexdigest() == file.lfs.sha256
    if size != file.size or not right:
        return None
    fsync_path(path)
    return FileEntry(size=size, sha256=sha256.hexdigest())


def _remove_others(folder: Path, names: Any) -> None:
    """Whatever is not of this commit: the hub client's notes, and files of an earlier one that was interrupted."""
    keep = {safe_path(folder, name) for name in names}
    for parent, folders, files in os.walk(folder, topdown=False):
        for path in (Path(parent, name) for name in files):
            if path not in keep:
                path.unlink()
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                path.unlink()
            elif not any(path in kept.parents for kept in keep):
                path.rmdir()


def _bar(check: Callable[[], None], advance: Callable[[int], None]) -> type:
    """What the hub's client takes for a progress bar: it hands on the bytes, and is where a download can be stopped."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            check()
            advance(int(n or 0))

        # what comes over the line, which is told apart from what is written: not counted twice
        def update_transfer(self, n: float | None = 1) -> None: ...

        def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None: ...

    return Bar


def _check_address(repository: Repository) -> None:
    """Refuse to send a token over an open line, and to ask at all when told to stay offline."""
    endpoint = urlsplit(repository.endpoint)
    if endpoint.scheme not in ("http", "https") or not endpoint.hostname:
        raise SettingsError(f"HF_ENDPOINT={repository.endpoint!r} is no address", fix="write https://host")
    if endpoint.scheme == "http" and not is_loopback(endpoint.hostname) and not repository.allow_http:
        fix = "use https://, or set cloud.allow_http=true if the network between is yours"
        raise SettingsError(f"HF_ENDPOINT={repository.endpoint!r} is without TLS", fix=fix)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").lower() in _TRUE:
            raise _offline(repository, f"{variable}={os.environ[variable]} forbids to ask the hub")


def _offline(repository: Repository, what: str) -> InputError:
    fix = "unset it, or bring the files here first: `wmtp assets push` them to the bucket, or name a local folder"
    return InputError(f"{repository.name} is not here, and {what}", where=repository.url, fix=fix)


@contextmanager
def _hub_errors(repository: Repository) -> Iterator[None]:
    """Turn whatever the hub's client raises into one of the worker's errors."""
    try:
        yield
    except WorkerError:
        raise
    except Exception as error:
        if (explained := _explain(repository, error)) is not None:
            raise explained from error
        raise


def _explain(repository: Repository, error: Exception) -> WorkerError | None:
    """The worker's error for one of the hub client's; None where it is none of those."""
    import httpx2
    from huggingface_hub import errors

    where, name = repository.url, repository.name
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept its licence at {where}, then set HF_TOKEN to a token of that account"
        what = (
            "is gated, and no token was given" if status == 401 else "is gated, and the token's account has no access"
        )
        return InputError(f"{name} {what}", where=where, fix=fix)
    if isinstance(error, errors.RepositoryNotFoundError):
        fix = "check the name, no folder here has it; for a private one set HF_TOKEN to a token that may read it"
        return InputError(f"the hub has no {repository.kind} {name}, or does not show it", where=where, fix=fix)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(repository, "HF_HUB_OFFLINE forbids to ask the hub")
    if isinstance(error, errors.HFValidationError | errors.RevisionNotFoundError | errors.EntryNotFoundError):
        return InputError(f"the hub cannot give {name}: {_line(error)}", where=where, fix="check the name")
    if status in (401, 403):
        fix = "set HF_TOKEN to a valid token that may read it, or unset it for a public one"
        return InputError(f"the hub refuses {name}: {status} {_server_says(error)}", where=where, fix=fix)
    if isinstance(error, httpx2.HTTPError | errors.FileMetadataError | errors.LocalEntryNotFoundError):
        fix = (
            "check the network and HF_ENDPOINT, and start again; or `wmtp assets push` it to the bucket from elsewhere"
        )
        return ExhaustedError(f"the hub does not give {name}: {_line(error)}", where=where, fix=fix)
    if isinstance(error, OSError) and error.errno is None:  # the client's own complaint of a short file
        fix = "start again: what has arrived is kept"
        return ExhaustedError(f"the hub did not send all of {name}: {_line(error)}", where=where, fix=fix)
    return None


def _server_says(error: Exception) -> str:
    return str(getattr(error, "server_message", None) or "").strip() or "no reason given"


def _line(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.strip().removesuffix(".")
