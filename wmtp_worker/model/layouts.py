"""Which layout a model on the disk has, found out by looking."""

from pathlib import Path

import torch

from wmtp_worker.errors import InputError
from wmtp_worker.model.folder import CONFIG, PICKLED, read_folder, weights_name, without_value_head
from wmtp_worker.model.gguf import gguf_file, read_gguf
from wmtp_worker.model.lora import merge_saved
from wmtp_worker.model.meta import PARAMS, is_meta, read_meta
from wmtp_worker.model.stored import Lazy, Stored, map_pickled


def open_stored(path: Path) -> Stored:
    """A folder of Hugging Face, of ours, of Meta; a GGUF file; a run's `final.pt` or `best_model.pt`.

    Raises `InputError` for anything else, and for what is damaged or does not fit together.
    """
    if not path.exists():
        raise InputError("there is no such file or folder", where=str(path), fix="name a model that is there")
    if path.is_dir() and (path / CONFIG).is_file():
        return read_folder(path)
    if path.is_dir() and is_meta(path):
        return read_meta(path)
    if (file := gguf_file(path)) is not None:
        return read_gguf(file)
    if path.suffix == ".pt":
        return _read_run(path)
    # what a download of facebook/multi-token-prediction looks like, for one
    if inner := sorted(found.name for found in path.glob("[!.]*") if (found / CONFIG).is_file() or is_meta(found)):
        raise InputError(
            f"no model itself; its folders hold some: {', '.join(inner)}",
            where=str(path),
            fix="move the files of one of them up, beside the tokenizer, or give it a name under models/ of its own",
        )
    raise InputError(
        "no layout that is known",
        where=str(path),
        fix="name a folder with config.json and model.safetensors or pytorch_model.bin, Meta's folder with params.json "
        "and consolidated.pth, a *.gguf file, or a run's final.pt",
    )


def model_files(path: Path) -> list[Path]:
    """The files that determine the model at `path`, configuration and weights. Raises `InputError`."""
    if path.is_file():
        return [path]
    if (path / CONFIG).is_file():
        shards = "pytorch_model*.bin" if weights_name(path) == PICKLED else "*.safetensors"
        return [path / CONFIG, *path.glob(shards)]
    return [found for pattern in (PARAMS, "consolidated*.pth", "*.gguf") for found in path.glob(pattern)]


def _read_run(path: Path) -> Stored:
    content = map_pickled(path)
    config, tensors = content.get("config"), content.get("model")
    if not isinstance(config, dict) or not isinstance(tensors, dict):
        raise InputError("not what a run leaves: config and model", where=str(path), fix="name a run's final.pt")
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError("holds more than tensors", where=str(path), fix="name a run's final.pt")
    config, tensors = without_value_head(config, tensors)
    merged = merge_saved(config, tensors) if config.get("lora") else Lazy(tensors)
    plain = {name: value for name, value in config.items() if name != "lora"}
    return Stored("run", path, plain, merged, (path,)).check()
