"""Checks of the run that is meant: does what it saves fit, in room and in time, and is what it reads there?"""

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_worker.checkpoint.emergency import ASSUMED_UPLOAD, ASSUMED_WRITE, choose
from wmtp_worker.doctor.case import Case
from wmtp_worker.doctor.check import Check
from wmtp_worker.errors import InputError, StorageError, WorkerError
from wmtp_worker.host.limits import disk_free
from wmtp_worker.host.stop import GRACE
from wmtp_worker.storage.layout import RunPaths, is_hub_name
from wmtp_worker.storage.objects import ObjectStore

if TYPE_CHECKING:  # they bring torch, and a quick look has no time for that
    from wmtp_worker.assets.fetch import Asset
    from wmtp_worker.planning.sizes import Sizes

_PATIENCE = 3.0


def assets(case: Case) -> Check:
    """Model, tokenizer and data: in the work directory, the bucket, or to be had from the hub. Nothing is fetched."""
    from wmtp_worker.assets.fetch import wanted_assets

    settings, said = case.settings, []
    with contextlib.ExitStack() as closing:
        store: ObjectStore | None = None
        for asset in wanted_assets(settings):
            if (path := asset.local(settings.run.workdir)) is not None:
                said.append(f"{asset.key}: {path}")
                continue
            if store is None and settings.cloud.bucket is not None and asset.folder is not None:
                from wmtp_worker.storage.open import open_store

                store = open_store(settings.cloud.model_copy(update={"patience": _PATIENCE}))
                closing.callback(store.close)
            said.append(f"{asset.key}: {_place(asset, store)}")
    return Check("model and data", "pass", "; ".join(said) or "a new model and the packaged sample")


def _place(asset: "Asset", store: ObjectStore | None) -> str:
    """Where it will be fetched from. Raises `InputError` where it is nowhere."""
    if store is not None:
        try:
            if (found := asset.published(store)) is not None:
                return f"in the bucket, {found}"
        except StorageError as error:
            if not is_hub_name(asset.name):
                raise InputError(
                    f"{asset.key}={asset.name!r} is not here, and the bucket does not say: {error}"
                ) from error
    if is_hub_name(asset.name):
        return f"{asset.name}, from the Hugging Face hub (not asked)"
    places = "the bucket" if store is not None else "the work directory"
    fix = f"wmtp assets push FOLDER --name {asset.name}, or set {asset.key} to a path or to org/name on the hub"
    raise InputError(f"{asset.key}={asset.name!r} is not in {places}", fix=fix)


def room(case: Case) -> Check | None:
    """The disk against what the run will keep on it; nothing to say where the model is not here yet."""
    try:
        sizes = case.sizes
    except InputError:
        return None
    settings = case.settings
    paths = RunPaths(settings.run.workdir, settings.run.name)
    kept = settings.checkpoint.keep_last
    if settings.checkpoint.keep_every:
        kept += settings.training.max_steps // settings.checkpoint.keep_every
    return judge_room(sizes, kept, disk_free(paths.checkpoints), _held(paths.checkpoints))


def judge_room(sizes: "Sizes", kept: int, free: int, held: int) -> Check:
    """`kept` checkpoints stay while one more is written; `held` bytes are this run's own already."""
    least = sizes.checkpoint + sizes.frozen + sizes.export
    needed = (kept + 1) * sizes.checkpoint + sizes.frozen + 2 * sizes.export
    found = f"{_size(sizes.checkpoint)} a checkpoint, {_size(needed)} for {kept} and the next, {_size(free)} free"
    if held:
        found += f" and {_size(held)} this run's already"
    if free + held < least:
        return Check("room for saves", "fail", found, "make room, or set WMTP_WORKDIR to a larger disk")
    if free + held < needed:
        advice = "lower checkpoint.keep_last, raise checkpoint.keep_every, or set WMTP_WORKDIR to a larger disk"
        return Check("room for saves", "warn", found, advice)
    return Check("room for saves", "pass", found)


def notice(case: Case) -> Check | None:
    """The time of a last save against the time that this host gives; nothing to say where the model is not here yet."""
    try:
        sizes = case.sizes
    except InputError:
        return None
    seconds, whose = _seconds(case)
    uploads = case.settings.cloud.bucket is not None
    # after a notice of a cloud the disk may go too, a mere signal leaves it
    must_upload = uploads and case.host.cloud is not None and case.settings.host.notices != "none"
    return judge_notice(
        sizes, seconds, whose, case.write_rate, case.upload_rate, uploads=uploads, must_upload=must_upload
    )


def judge_notice(
    sizes: "Sizes",
    seconds: float | None,
    whose: str,
    write_rate: float | None,
    upload_rate: float | None,
    *,
    uploads: bool,
    must_upload: bool,
) -> Check:
    """By the formula by which a run decides what to save in the time that is left; rates in bytes per second."""
    if seconds is None:
        every = "what is lost is the work since the last save"
        return Check("last save", "pass", f"{whose} promises no time: {every}")
    plan = choose(
        step=1,
        saved_step=0,
        full_bytes=sizes.checkpoint,
        trainable_bytes=sizes.trained,
        write_rate=write_rate,
        upload_rate=upload_rate,
        seconds_left=seconds,
        uploads=uploads,
        must_upload=must_upload,
    )
    rates = f"at {(write_rate or ASSUMED_WRITE) / 1e6:.0f} MB/s to the disk"
    if must_upload:
        rates += f", {(upload_rate or ASSUMED_UPLOAD) / 1e6:.0f} MB/s to the bucket"
    found = f"{whose} gives {seconds:.0f} s: {plan.why.removesuffix(f' of {seconds:.0f} s left')} ({rates})"
    if plan.kind == "full" and (plan.reaches_bucket or not must_upload):
        return Check("last save", "pass", found)
    advice = "save more often (checkpoint.every=auto), for the last save will not be whole"
    if not must_upload:
        advice += f"; or give more time: docker stop -t, terminationGracePeriodSeconds, and say so in {GRACE}"
    return Check("last save", "warn", found, advice)


def _seconds(case: Case) -> tuple[float | None, str]:
    with contextlib.suppress(KeyError, ValueError):
        told = float(case.environ[GRACE])
        if math.isfinite(told) and told >= 0:
            return told, GRACE
    return case.host.notice_seconds, case.host.name


def model(case: Case) -> Check | None:
    """Whether a model can be made of what is here; nothing to say where it is to be fetched first."""
    try:
        sizes = case.sizes
    except InputError as error:
        if case.settings.model.path is not None and not Path(case.settings.model.path).expanduser().exists():
            return None
        raise WorkerError(error.what, where=error.where, fix=error.fix) from error
    return Check("model", "pass", f"{_size(sizes.export)} of weights")


def _held(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # swept away meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
