"""Models and data sets put into the bucket, each under its name, with the digests of its files."""

from dataclasses import dataclass
from pathlib import Path

from wmtp_worker.assets.fetch import PUSHING
from wmtp_worker.assets.links import own_files
from wmtp_worker.data.files import ENDINGS
from wmtp_worker.errors import InputError, IntegrityError, PreconditionFailed
from wmtp_worker.storage.layout import MANIFEST, AssetKind, asset_name, asset_prefix
from wmtp_worker.storage.objects import ObjectStore
from wmtp_worker.storage.seal import Seal, seal_folder, verify_folder
from wmtp_worker.storage.sealed import push_sealed, read_seal
from wmtp_worker.storage.transfer import Transfer

# any one of them makes a folder what it is said to be
_SIGNS = {
    "models": ("config.json", "tokenizer.json", "params.json", "tokenizer.model", "*.gguf"),
    "datasets": tuple(f"{place}*{ending}" for place in ("", "*/") for ending in ENDINGS),
}


@dataclass(frozen=True)
class Pushed:
    """What is in the bucket now; `sent` is False where it had been there already, all of it."""

    name: str
    url: str
    files: int
    bytes: int
    sent: bool


def push(transfer: Transfer, folder: Path, kind: AssetKind, name: str, *, replace: bool = False) -> Pushed:
    """Put a local folder into the bucket as `models/<name>` or `datasets/<name>`; hidden files stay here.

    The digests of its files are recorded first, in its `manifest.json`, which is sent last: before that, nobody takes
    the folder for a whole one. Links to files, as in the hub's cache, stand for these. Raises `InputError`
    where the folder is none of that kind or was changed since its
    digests were recorded, and where, without `replace`, the bucket has something else under the name.
    """
    stored = asset_name(name)
    if stored is None:
        fix = "use letters and digits, then also '.', '_' and '-', or the hub's org/name"
        raise InputError(f"{name!r} is no name for a folder in the bucket", fix=fix)
    with own_files(folder) as own:
        return _push(transfer, own, kind, stored, replace=replace)


def _push(transfer: Transfer, folder: Path, kind: AssetKind, stored: str, *, replace: bool) -> Pushed:
    seal = _seal(folder, kind)
    prefix = asset_prefix(kind, stored)
    store = transfer.store
    url = f"{store.url}/{prefix}"
    published = _published(store, prefix, replace=replace)
    if published is None and not replace:
        _check_room_for(transfer, prefix, seal)
    # until the manifest is there, this tells a push from a folder that other tools made
    if published != seal:
        if published is not None and not replace:
            raise _taken(url)
        store.put(prefix + PUSHING, b"")
    try:
        sent = push_sealed(transfer, folder, prefix, replace=replace)
    except PreconditionFailed as error:
        # somebody else's push came between; of the same files it is as good as ours
        if _published(store, prefix, replace=replace) != seal:
            raise _taken(url) from error
        sent = True
    store.delete(prefix + PUSHING)
    return Pushed(stored, url, len(seal.files), seal.bytes, sent)


def _published(store: ObjectStore, prefix: str, *, replace: bool) -> Seal | None:
    """What the bucket has under the name; None also for a manifest that cannot be read and may be replaced."""
    try:
        published = read_seal(store, prefix)
    except IntegrityError as error:
        if replace:
            return None
        raise IntegrityError(error.what, where=error.where, fix="add --replace to push it anew") from error
    return None if published is None else published[0]


def _seal(folder: Path, kind: AssetKind) -> Seal:
    """The folder's digests, recorded before or now; see `push`."""
    signs = _SIGNS[kind]
    if not any(next(folder.glob(sign), None) for sign in signs):
        what = "model or tokenizer" if kind == "models" else "data set"
        fix = "add --dataset for a data set" if kind == "models" else "leave --dataset out for a model or tokenizer"
        lacking = ", ".join(sign for sign in signs if not sign.startswith("*/"))
        raise InputError(f"the folder holds no {what}: none of {lacking}", where=str(folder), fix=fix)
    if not (folder / MANIFEST).exists():
        return seal_folder(folder)
    try:
        seal = verify_folder(folder)
    except IntegrityError as error:
        fix = f"restore it, or, if it is as you want it, delete its {MANIFEST}: its digests are then recorded anew"
        raise InputError(f"{error.what} (its digests were recorded before)", where=error.where, fix=fix) from error
    if more := sorted(_visible(folder) - seal.files.keys()):
        fix = f"remove it, or delete {MANIFEST} there: the digests are then recorded anew"
        raise InputError(f"{more[0]} is not among the recorded files", where=str(folder), fix=fix)
    return seal


def _visible(folder: Path) -> set[str]:
    """The files of a folder that are pushed, by relative name."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {name for path in paths if not _hidden(name := path.as_posix())} - {MANIFEST}


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _check_room_for(transfer: Transfer, prefix: str, seal: Seal) -> None:
    """Raise `InputError` where objects without a manifest would be overwritten or deleted."""
    store = transfer.store
    there = {info.key.removeprefix(prefix): info.size for info in store.list(prefix)}
    if PUSHING in there:
        return
    sizes = {name: entry.size for name, entry in seal.files.items()}
    # neither hidden files nor what consoles make for an empty folder are part of an asset
    parts = {name: size for name, size in there.items() if name and not _hidden(name)}
    if any(sizes.get(name) != size for name, size in parts.items()):
        raise _taken(f"{store.url}/{prefix}")


def _taken(url: str) -> InputError:
    fix = "choose another --name, or add --replace"
    return InputError("the bucket has something else under this name", where=url, fix=fix)
