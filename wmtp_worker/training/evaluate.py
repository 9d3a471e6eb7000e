"""Validation of weights that were saved, without training them."""

from collections.abc import Mapping
from typing import Any

from wmtp_worker.assets.resolve import dataset_folder, tokenizer_folder
from wmtp_worker.checkpoint.export import load_weights
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.checkpoint.snapshot import FROZEN, MODEL
from wmtp_worker.data.tokenizer import load_tokenizer
from wmtp_worker.errors import SettingsError
from wmtp_worker.host.device import make_deterministic, resolve_device, set_threads
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.model.loading import rebuild
from wmtp_worker.model.value import is_value_model, rebuild_value
from wmtp_worker.settings import Settings
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.group import Group
from wmtp_worker.training.session import CONFIG
from wmtp_worker.training.splits import load_split
from wmtp_worker.training.stages import check_fit, examination
from wmtp_worker.training.validation import validate


def evaluate_run(settings: Settings, weights: str, stop: StopRequest) -> dict[str, Any]:
    """Numbers of `Validation` or, of a value model, `ValueReport`; and `run`, `weights`, `step`, `dataset`, `samples`.

    `weights`: `final`, `best`, or a checkpoint's step; what is not here comes from the bucket. Raises
    `CheckpointError`, `InputError`, `SettingsError`, and the bucket's `StorageError`.
    """
    paths = RunPaths(settings.run.workdir, settings.run.name)
    with RunBucket(settings, paths, stop.check) as bucket:
        bucket.fetch_weights(weights)
    set_threads(settings.host.threads)
    device = resolve_device(settings.host.device)
    make_deterministic(device)
    step, config, tensors, where = _read(paths, weights)
    what = {"run": paths.run, "weights": weights, "step": step, "dataset": settings.data.dataset}
    if is_value_model(config):
        judge = rebuild_value(config, dict(tensors), where)
        return {**what, **examination(settings, judge, device, stop.check).validate(stop.check).to_json()}
    model = rebuild(config, tensors, where)
    tokenizer = load_tokenizer(tokenizer_folder(settings))
    check_fit(settings, model.config, tokenizer)
    data = load_split(settings, dataset_folder(settings), "validation", tokenizer, stop.check)
    rows = settings.training.micro_batch_size
    batches = data.epoch(rows, settings.evaluation.max_batches)
    model.to(device)  # type: ignore[arg-type]  # transformers hides nn.Module.to's signature
    result = validate(model, batches, Group(device), settings.training.precision, stop.check)
    return {**what, "samples": len(data.samples), **result.to_json()}


def _read(paths: RunPaths, weights: str) -> tuple[int, dict[str, Any], Mapping[str, Any], str]:
    if weights in ("final", "best"):
        path = paths.final if weights == "final" else paths.best
        content = load_weights(path)
        return content["step"], content["config"], content["model"], str(path)
    if not weights.isdecimal():
        raise SettingsError(f"{weights!r} names no weights", where="--weights", fix="use final, best or a step")
    checkpoint = find(paths, int(weights), read=(MODEL, FROZEN))
    assert checkpoint is not None  # a wanted step is there or an error
    return int(weights), checkpoint.document(CONFIG, dict[str, Any]), checkpoint.model_tensors(), str(checkpoint.folder)
