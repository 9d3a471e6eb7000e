"""Hugging Face's layout, `config.json` and weights: a plain Llama, or ours with its further heads.

Weights are safetensors, else `pytorch_model.bin`, of which nothing but tensors is ever unpickled.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file

from wmtp_worker.errors import InputError
from wmtp_worker.model.stored import Layout, Lazy, Stored, map_tensors, read_json, rotary

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
PICKLED = "pytorch_model.bin"
SHARD_BYTES = 5_000_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Llama whose weights are there. Raises `InputError` for anything else."""
    path = folder / CONFIG
    config = read_json(
        path, "set model.path to a Llama-family folder (config.json and model.safetensors), or a name under models/"
    )
    if config.get("model_type") != "llama":
        raise InputError(
            f"model_type is {config.get('model_type')!r}, not 'llama'",
            where=str(path),
            fix="use a Llama-family checkpoint",
        )
    weights_name(folder)
    return config


def weights_name(folder: Path) -> str:
    """`SAFETENSORS`, or where there are none `PICKLED`: the file with the weights, or with their index. Else raises."""
    for name in (SAFETENSORS, PICKLED):
        if (folder / name).is_file() or _index(folder, name).is_file():
            return name
    raise InputError(
        f"no {SAFETENSORS}, no {PICKLED}",
        where=f"model folder {folder}",
        fix="put the weights there, or, of several files, their index",
    )


def read_folder(folder: Path) -> Stored:
    """Open a folder; weights are mapped, not read. Raises `InputError`."""
    config = read_config(folder)
    if config.get("quantization_config"):
        raise InputError(
            "its weights are quantised", where=str(folder / CONFIG), fix="use the model's version in full precision"
        )
    shards = _shards(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in shards:
        if not path.is_file():
            raise InputError(f"no {path.name}", where=f"model folder {folder}", fix="download the folder again")
        tensors |= map_tensors(path) if path.suffix == ".bin" else _map_safetensors(path)
    if config.get("tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)  # some write it all the same
    # a buffer that transformers wrote before 4.32
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    config, tensors = without_value_head(config, tensors)
    layout: Layout = "ours" if (config.get("n_future_tokens") or 1) > 1 else "hf"
    return Stored(layout, folder, config, Lazy(tensors), (folder / CONFIG, *shards)).check()


def _map_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, OSError, …
        raise InputError(
            f"the weights do not load: {error}", where=str(path), fix="replace the file by a whole one"
        ) from None


def without_value_head(
    config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Of a policy that was trained beside one: it was of use while that trained."""
    plain = {name: value for name, value in config.items() if name != "value_head"}
    return plain, {name: tensor for name, tensor in tensors.items() if not name.startswith("value_head.")}


def _index(folder: Path, weights: str) -> Path:
    return folder / f"{weights}.index.json"


def _shards(folder: Path) -> list[Path]:
    weights = weights_name(folder)
    index = _index(folder, weights)
    if not index.is_file():
        return [folder / weights]
    names = read_json(index, "download the folder again").get("weight_map")
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise InputError("no weight_map of file names", where=str(index), fix="download the folder again")
    return [folder / name for name in sorted(set(names.values()))]


def write_folder(
    source: Stored,
    folder: Path,
    further_heads: bool,
    shard_bytes: int = SHARD_BYTES,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Write `config.json` and safetensors into a folder that is there, in files of at most `shard_bytes`.

    Without `further_heads` the result is a plain Llama, head 1. Dtypes stay as they are; one shard at a time is in
    memory. `poll` is called before each tensor.
    """
    mapped = {
        name: tensor
        for name, tensor in source.tensors.mapped.items()
        if further_heads or not name.startswith("extra_heads.")
    }
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty_like(tensor, device="meta") for name, tensor in mapped.items()}, max_shard_size=shard_bytes
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {}
        for name in names:
            poll()
            shard[name] = source.tensors[name].contiguous()
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _index(folder, SAFETENSORS).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = portable_config(source.config, next(iter(mapped.values())).dtype)
    config.pop("n_future_tokens", None)
    config["architectures"] = ["LlamaForCausalLM"]
    if further_heads and source.heads > 1:
        config |= {"n_future_tokens": source.heads, "architectures": ["MTPForCausalLM"]}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def portable_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same configuration with rotary positions and dtype under their old names too.

    transformers before 5 knows no `rope_parameters`, and would take its own default without a word.
    """
    rope = rotary(config)
    theta = rope.pop("rope_theta")
    scaling = None if rope["rope_type"] == "default" else rope
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "_name_or_path")}
    return {**kept, "rope_theta": theta, "rope_scaling": scaling, "torch_dtype": str(dtype).removeprefix("torch.")}
