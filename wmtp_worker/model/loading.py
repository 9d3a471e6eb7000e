"""Building the policy from settings, from a Llama-family folder, and from a checkpoint's tensors."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig
from transformers.utils import logging as transformers_logging

from wmtp_worker.errors import InputError
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build(settings: Settings, tokenizer: "PreTrainedTokenizerFast") -> MTPForCausalLM:
    """A new fp32 policy of the shape in `settings.model`, random weights drawn from `run.seed` alone."""
    shape = settings.model
    config = LlamaConfig(  # type: ignore[call-arg]  # transformers keeps unknown keys
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # a padding row in the embedding would be frozen at zero
        n_future_tokens=shape.heads,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.run.seed)
        return MTPForCausalLM(config)


def load(folder: Path, heads: int) -> MTPForCausalLM:
    """An fp32 policy from a Llama-family folder (`config.json` and safetensors).

    A folder without further heads gets them as copies of its last layer. A folder of ours has its own number of
    heads, which must be `heads`. Raises `InputError` for another architecture, pickled weights, damaged files, and
    tensors that are missing, left over or of another shape.
    """
    config = _read_config(folder)
    own_heads = config.get("n_future_tokens")
    if own_heads not in (None, heads):
        raise InputError(
            f"the model has {own_heads} heads, model.heads is {heads}",
            where=str(folder / "config.json"),
            fix=f"set model.heads={own_heads}",
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        llama = LlamaConfig.from_pretrained(folder)
        llama.update({"n_future_tokens": heads})
        loaded: Any = MTPForCausalLM.from_pretrained(
            folder,
            config=llama,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except Exception as error:  # a broken folder raises anything: SafetensorError, KeyError, ImportError, …
        reason = " ".join(str(error).split())  # some are several lines long
        raise InputError(
            f"the model does not load: {type(error).__name__}: {reason}",
            where=f"folder {folder}",
            fix="check or replace the folder's files",
        ) from error
    model: MTPForCausalLM = loaded[0]
    model.config.name_or_path = ""  # a path of this machine: it has no business in checkpoints
    _check_tensors(loaded[1], folder, new_heads=own_heads is None)
    if own_heads is None:
        last = model.model.layers[-1].state_dict()
        for head in model.extra_heads:
            head.load_state_dict(last)
    return model


def _check_tensors(info: dict[str, Any], folder: Path, new_heads: bool) -> None:
    missing = {name for name in info["missing_keys"] if not (new_heads and name.startswith("extra_heads."))}
    for wrong, names in {
        "missing": missing,
        "of another shape than config.json says": {name for name, *_ in info["mismatched_keys"]},
        "not part of the model that config.json describes": set(info["unexpected_keys"]),
    }.items():
        if names:
            raise InputError(
                f"{len(names)} tensors are {wrong}, {min(names)} among them",
                where=f"folder {folder}",
                fix="check that config.json and all safetensors files are there and belong together",
            )


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no config.json",
            where=f"model folder {folder}",
            fix="set model.path to a Llama-family folder (config.json and *.safetensors), or a name under models/",
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path), fix="replace the file") from None
    if not isinstance(config, dict) or config.get("model_type") != "llama":
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"model_type is {found!r}, not 'llama'", where=str(path), fix="use a Llama-family checkpoint")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            "no *.safetensors",
            where=f"model folder {folder}",
            fix="convert the weights to safetensors: pickled ones (*.bin) are never opened",
        )
    return config


def base_digest(folder: Path, poll: Callable[[], None] = lambda: None) -> str:
    """SHA-256 (hex) over config and weights of a model folder, in name order; `poll` is called before each file."""
    total = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        poll()
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def tensors(model: MTPForCausalLM) -> dict[str, torch.Tensor]:
    """Every parameter by name, tied ones once; the tensors themselves, not copies."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def rebuild(config: dict[str, Any], saved: Mapping[str, torch.Tensor], where: str) -> MTPForCausalLM:
    """The policy that was saved as `config` and tensors. Raises `InputError` where they make none."""
    try:
        model = MTPForCausalLM(LlamaConfig.from_dict(config))
    except Exception as error:  # a config that makes no sense raises anything
        reason = " ".join(str(error).split())
        raise InputError(f"its config makes no model: {reason}", where=where, fix="use other weights") from error
    load_tensors(model, saved, where)
    return model


def load_tensors(model: MTPForCausalLM, saved: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy `saved` into the model. Raises `InputError` naming the first tensor that does not fit."""
    own = tensors(model)
    for name in sorted(own.keys() ^ saved.keys()):
        side = "the model has no" if name in saved else "the checkpoint has no"
        raise InputError(f"{side} tensor {name}", where=where, fix="use the settings that the checkpoint was made with")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise InputError(
                    f"{name} has shape {list(saved[name].shape)}, the model wants {list(tensor.shape)}",
                    where=where,
                    fix="use the settings that the checkpoint was made with",
                )
            tensor.copy_(saved[name])
