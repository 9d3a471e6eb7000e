"""GGUF files of Llamas, by llama.cpp's own package: each tensor is expanded to fp32 when it is asked for.

Quantised weights are read as the numbers they stand for. transformers reads the same files, in minutes where this takes
seconds, and drops scaled rotary positions without a word.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wmtp_worker.errors import InputError
from wmtp_worker.model.meta import pairs_to_halves
from wmtp_worker.model.stored import Lazy, Stored

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a folder. Raises `InputError` for several."""
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise InputError(
            f"{len(files)} GGUF files ({files[0].name}, …)",
            where=f"folder {path}",
            fix="name one of them, not the folder",
        )
    return files[0] if files else None


def read_gguf(path: Path) -> Stored:
    """Open a GGUF file of a Llama; weights are mapped, not read. Raises `InputError`."""
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
        # of the tokenizer, which is long, only which token is which
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.") or name.endswith("_id")
        }
        found = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader raises what it stumbles on: ValueError, IndexError, …
        raise InputError(f"no whole GGUF file: {error}", where=str(path), fix="download it again") from None
    _check(fields, found, path)
    named = {_our_name(name, path): tensor for name, tensor in found.items()}
    config = _config(fields, found, path)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def expand(name: str, placeholder: torch.Tensor) -> torch.Tensor:
        tensor, kind = named[name], name.split(".")[-2]
        values = np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W")  # fp32 is the file itself
        numbers = torch.from_numpy(values).reshape(placeholder.shape)
        return pairs_to_halves(numbers, heads[kind]) if kind in heads else numbers

    shapes = {
        name: torch.empty(tuple(int(n) for n in reversed(tensor.shape)), dtype=torch.float32, device="meta")
        for name, tensor in named.items()
    }
    return Stored("gguf", path, config, Lazy(shapes, expand), (path,)).check()


def _check(fields: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"its architecture is {architecture!r}, not 'llama'", where=str(path), fix="use a Llama")
    if "rope_freqs.weight" in tensors or fields.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(
            "scaled rotary positions are not read from GGUF",
            where=str(path),
            fix="use the Hugging Face version of this model",
        )


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any], path: Path) -> dict[str, Any]:
    def number(name: str, default: int | None = None) -> int:
        value = fields.get(f"llama.{name}", default)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"llama.{name} is {value!r}, no positive number", where=str(path), fix="use another file")
        return value

    width, heads = number("embedding_length"), number("attention.head_count")
    head_size = number("attention.key_length", width // heads)
    if (turned := number("rope.dimension_count", head_size)) != head_size:
        raise InputError(
            f"rotary positions on {turned} of {head_size} numbers", where=str(path), fix="use an ordinary Llama"
        )
    if "token_embd.weight" not in tensors:
        raise InputError("no tensor token_embd.weight", where=str(path), fix="download it again")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": width,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": float(fields.get("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": None,
    }


def _our_name(name: str, path: Path) -> str:
    if name in _NAMES:
        return _NAMES[name]
    kind, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if kind == "blk" and number.isdecimal() and part in _INSIDE:
        return f"model.layers.{number}.{_INSIDE[part]}"
    raise InputError(f"a tensor of no ordinary Llama: {name}", where=str(path), fix="use another model")
