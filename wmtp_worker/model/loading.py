"""Building the policy from settings, from a Llama-family folder, and from a checkpoint's tensors."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from wmtp_worker.errors import InputError
from wmtp_worker.model.layouts import model_files, open_stored
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.model.stored import Stored
from wmtp_worker.model.unread import leave_unread
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


def load(path: Path, heads: int, unread: bool = False) -> MTPForCausalLM:
    """An fp32 policy from a model on the disk, in any layout that `open_stored` knows.

    A model without further heads gets them as copies of its last layer. One that has some has its own number of heads,
    which must be `heads`. `unread`: its parameters take no memory yet, see `model.unread`. Raises `InputError` for
    another architecture, pickled code, damaged files, and tensors that are missing, left over or of another shape.
    """
    stored = open_stored(path)
    config = config_with_heads(stored.config, heads, str(stored.files[0]))
    # drawing 7 billion numbers takes minutes
    with no_init_weights(), torch.device("meta" if unread else "cpu"):
        model = MTPForCausalLM(config)
    model.tie_weights()
    if unread:
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # buffers are computed, not stored
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            read = partial(stored.tensors.__getitem__, _stored_name(name, stored))
            if unread:
                leave_unread(parameter, read)
            else:
                parameter.copy_(read())
    model.config.name_or_path = ""  # a path of this machine: it has no business in checkpoints
    return model


def config_with_heads(config: dict[str, Any], heads: int, where: str) -> LlamaConfig:
    """The fp32 policy's configuration. Raises `InputError` for one of another number of heads, and for nonsense."""
    own_heads = config.get("n_future_tokens")
    if own_heads not in (None, heads):
        raise InputError(
            f"the model has {own_heads} heads, model.heads is {heads}", where=where, fix=f"set model.heads={own_heads}"
        )
    try:
        return LlamaConfig.from_dict(config | {"n_future_tokens": heads, "dtype": "float32"})
    except Exception as error:  # a config that makes no sense raises anything
        reason = " ".join(str(error).split())
        raise InputError(f"its configuration makes no model: {reason}", where=where, fix="replace the file") from error


def _stored_name(name: str, stored: Stored) -> str:
    """Where a tensor's first values come from: a further head that is new begins as a copy of the last layer."""
    if name in stored.tensors:
        return name
    last = stored.config["num_hidden_layers"] - 1
    return f"model.layers.{last}.{name.split('.', 2)[2]}"


def base_digest(path: Path, poll: Callable[[], None] = lambda: None) -> str:
    """SHA-256 (hex) over the files that make a model, in name order. Raises `InputError`.

    `poll` is called before each file.
    """
    total = hashlib.sha256()
    for part in sorted(model_files(path)):
        poll()
        with part.open("rb") as file:
            total.update(f"{part.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by name, tied ones once; the tensors themselves, not copies."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def rebuild(config: dict[str, Any], saved: Mapping[str, torch.Tensor], where: str) -> MTPForCausalLM:
    """The policy that was saved as `config` and tensors. Raises `InputError` where they make none."""
    try:
        model = MTPForCausalLM(LlamaConfig.from_dict(config))
        if lora := config.get("lora"):
            add_lora(model, **lora)
        if head := config.get("value_head"):
            model.add_value_head(**head)
    except Exception as error:  # a config that makes no sense raises anything
        reason = " ".join(str(error).split())
        raise InputError(f"its config makes no model: {reason}", where=where, fix="use other weights") from error
    load_tensors(model, saved, where)
    return model


def load_tensors(model: nn.Module, saved: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy `saved` into the model. Raises `InputError` naming the first tensor that does not fit."""
    own = tensors(model)
    check_names(own, saved, where)
    with torch.no_grad():
        for name, tensor in own.items():
            value = saved[name]  # may be read now
            check_shapes({name: tensor}, {name: value.shape}, where)
            tensor.copy_(value)


_SAME_SETTINGS = "use the settings that the checkpoint was made with"


def check_names(own: Mapping[str, object], saved: Mapping[str, object], where: str) -> None:
    """Raise `InputError` naming the first tensor that only one of both has."""
    for name in sorted(own.keys() ^ saved.keys()):
        side = "the model has no" if name in saved else "the checkpoint has no"
        raise InputError(f"{side} tensor {name}", where=where, fix=_SAME_SETTINGS)


def check_shapes(own: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], where: str) -> None:
    """Raise `InputError` naming the first tensor that is missing, left over or of another shape."""
    check_names(own, shapes, where)
    for name, tensor in own.items():
        if tensor.shape != shapes[name]:
            what = f"{name} has shape {list(shapes[name])}, the model wants {list(tensor.shape)}"
            raise InputError(what, where=where, fix=_SAME_SETTINGS)
