"""Meta's own layout: `consolidated.pth`, `params.json`, `tokenizer.model`, as published for `7b_1t_4`.

Names and shapes are those of the code published with facebook/multi-token-prediction. It counts the further heads as
layers (`n_layers` = ours + n - 1), and turns neighbouring pairs of a query or key where Hugging Face turns its two
halves, so that the rows of wq and wk are in another order.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from wmtp_worker.errors import InputError
from wmtp_worker.model.stored import Lazy, Stored, map_tensors, read_json, rotary

PARAMS = "params.json"
WEIGHTS = "consolidated.pth"

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_INSIDE_BACK = {ours: theirs for theirs, ours in _INSIDE.items()}
_OUTSIDE_BACK = {ours: theirs for theirs, ours in _OUTSIDE.items()}
# a buffer of the first Llamas, computed anew
_IGNORED = "rope.freqs"
# no file says for how long sequences the model was trained; rotary positions set no limit of their own
_POSITIONS = 4096


def is_meta(folder: Path) -> bool:
    """Whether a folder looks like Meta's layout."""
    return (folder / PARAMS).is_file() or any(folder.glob("consolidated*.pth"))


def read_meta(folder: Path) -> Stored:
    """Open a folder in Meta's layout; weights are mapped, not read. Raises `InputError`."""
    weights = _one_file(folder)
    params = _params(folder / PARAMS)
    tensors = map_tensors(weights)
    tensors.pop(_IGNORED, None)
    named = {_our_name(name, weights): tensor for name, tensor in tensors.items()}
    config = _config(params, named, folder, weights)
    if config["tie_word_embeddings"]:
        del named["lm_head.weight"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kind = name.split(".")[-2]
        return pairs_to_halves(tensor, heads[kind]) if kind in heads else tensor

    return Stored("meta", folder, config, Lazy(named, change), (folder / PARAMS, weights)).check()


def write_meta(source: Stored, folder: Path, poll: Callable[[], None] = lambda: None) -> None:
    """Write `params.json` and `consolidated.pth` into a folder that is there.

    Only wq and wk are copied into memory (a sixth of a 7B model); the rest goes from file to file. `poll` is called
    before each tensor. Raises `InputError` where Meta's layout has no place for something.
    """
    params = _to_params(source)
    llama = LlamaConfig.from_dict(source.config)
    # transformers fills in the second where a config leaves it out
    heads = {"q_proj": llama.num_attention_heads, "k_proj": llama.num_key_value_heads or llama.num_attention_heads}
    content = {}
    for name in source.tensors:
        poll()
        kind = name.split(".")[-2]
        tensor = source.tensors[name]
        if kind in heads:
            tensor = halves_to_pairs(tensor, heads[kind])
        content[_their_name(name, source.path)] = _of_its_own(tensor)
    if llama.tie_word_embeddings:
        content["output.weight"] = content["tok_embeddings.weight"]  # one storage: read back, it is tied again
    poll()
    torch.save(content, folder / WEIGHTS)
    (folder / PARAMS).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def pairs_to_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, [heads · size, width], from Meta's order to Hugging Face's."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def halves_to_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The way back."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _of_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, seen as a storage of exactly this tensor: `torch.save` would write the whole file it lies in."""
    data = tensor.detach().contiguous()
    return torch.from_numpy(data.view(-1).view(torch.uint8).numpy()).view(data.dtype).view(data.shape)


def _one_file(folder: Path) -> Path:
    files = sorted(folder.glob("consolidated*.pth"))
    if not files:
        raise InputError(f"no {WEIGHTS}", where=f"model folder {folder}", fix="download it beside params.json")
    if len(files) > 1:
        raise InputError(
            f"{len(files)} files of a model that was cut for several GPUs ({files[0].name}, …)",
            where=f"model folder {folder}",
            fix="use the Hugging Face version of this model, or merge them with transformers' "
            "convert_llama_weights_to_hf.py and use the folder that makes",
        )
    return files[0]


def _params(path: Path) -> dict[str, Any]:
    params = read_json(path, "put params.json beside consolidated.pth: both belong to one model")

    def wrong(name: str, what: str) -> InputError:
        return InputError(f"{name}={params.get(name)!r} {what}", where=str(path), fix="use the published file")

    for name in ("dim", "n_layers", "n_heads"):
        if type(params.get(name)) is not int or params[name] < 1:
            raise wrong(name, "is no positive number")
    for name in ("n_kv_heads", "n_future_tokens"):
        if params.get(name) is not None and (type(params[name]) is not int or params[name] < 1):
            raise wrong(name, "is no positive number")
    for name in ("norm_eps", "rope_theta"):
        if type(params.get(name, 1.0)) not in (int, float) or params.get(name, 1.0) <= 0:
            raise wrong(name, "is no positive number")
    if params["dim"] % (2 * params["n_heads"]):
        raise wrong("n_heads", f"does not divide dim={params['dim']} into even parts")
    if params["n_heads"] % (params.get("n_kv_heads") or params["n_heads"]):
        raise wrong("n_kv_heads", f"does not divide n_heads={params['n_heads']}")
    if params.get("use_scaled_rope"):
        raise InputError(
            "use_scaled_rope: scaled rotary positions are not read from Meta's layout",
            where=str(path),
            fix="use the Hugging Face version of this model",
        )
    return params


def _config(params: dict[str, Any], named: dict[str, torch.Tensor], folder: Path, weights: Path) -> dict[str, Any]:
    """Hugging Face's configuration; what params.json leaves out is read off the tensors."""
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj.weight"):
        if name not in named or named[name].ndim != 2:
            raise InputError(
                f"no matrix {_their_name(name, weights)}", where=str(weights), fix="use the published file"
            )
    embedding, unembedding = named["model.embed_tokens.weight"], named["lm_head.weight"]
    layers = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("model.layers."))
    further = len({name.split(".")[1] for name in named if name.startswith("extra_heads.")})
    stated = params.get("n_future_tokens") or 1
    if params["n_layers"] != layers + further or stated != 1 + further:
        raise InputError(
            f"n_layers={params['n_layers']}, n_future_tokens={stated}; the weights hold {layers} layers and {further} "
            "further heads, which count as layers too",
            where=f"{folder / PARAMS} and {weights.name}",
            fix="use params.json and weights of the same model",
        )
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": params["dim"],
        "intermediate_size": named["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": _POSITIONS,
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": float(params.get("rope_theta", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": embedding.data_ptr() == unembedding.data_ptr(),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return config | ({"n_future_tokens": stated} if stated > 1 else {})


def _to_params(source: Stored) -> dict[str, Any]:
    llama = LlamaConfig.from_dict(source.config)
    rope = rotary(source.config)
    head_size = llama.head_dim or llama.hidden_size // llama.num_attention_heads
    for what, wrong in {
        f"rotary positions of type {rope['rope_type']}": rope["rope_type"] != "default",
        "biases": llama.attention_bias or llama.mlp_bias,
        f"the activation {llama.hidden_act}": llama.hidden_act != "silu",
        f"attention heads of {head_size} numbers": head_size * llama.num_attention_heads != llama.hidden_size,
    }.items():
        if wrong:
            raise InputError(f"Meta's layout has no place for {what}", where=str(source.path), fix="convert --to hf")
    return {
        "dim": llama.hidden_size,
        "n_layers": llama.num_hidden_layers + source.heads - 1,
        "n_heads": llama.num_attention_heads,
        "n_kv_heads": llama.num_key_value_heads,
        "vocab_size": llama.vocab_size,
        "norm_eps": llama.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "n_future_tokens": source.heads,
        **mlp_params(llama.hidden_size, llama.intermediate_size),
    }


def mlp_params(dim: int, wanted: int) -> dict[str, float]:
    """`multiple_of` and, where it is needed, `ffn_dim_multiplier`, of which Meta's code computes the MLP's width."""
    base = int(2 * 4 * dim / 3)
    if math.ceil(base / 256) * 256 == wanted:
        return {"multiple_of": 256}
    # rounded down, then up to a multiple
    return {"multiple_of": wanted} | ({"ffn_dim_multiplier": (wanted + 0.5) / base} if base > wanted else {})


def _our_name(name: str, weights: Path) -> str:
    parts = name.split(".", 2)
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if len(parts) == 3 and parts[0] in ("layers", "extra_heads") and parts[1].isdecimal() and parts[2] in _INSIDE:
        return f"{'model.' if parts[0] == 'layers' else ''}{parts[0]}.{parts[1]}.{_INSIDE[parts[2]]}"
    raise InputError(f"a tensor of no Llama: {name}", where=str(weights), fix="use the published file")


def _their_name(name: str, where: Path) -> str:
    if name in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[name]
    kind, number, rest = name.removeprefix("model.").split(".", 2)
    if rest not in _INSIDE_BACK:
        raise InputError(f"Meta's layout has no place for {name}", where=str(where), fix="convert --to hf")
    return f"{kind}.{number}.{_INSIDE_BACK[rest]}"
