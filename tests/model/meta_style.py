"""Meta's Llama with further heads, written down a second time: plain functions on its own weight names.

Nothing of the package is used. Rotary positions are complex numbers on neighbouring pairs, as Meta has them.
"""

import json
import math
from pathlib import Path

import torch

Weights = dict[str, torch.Tensor]

PARAMS = {
    "dim": 32,
    "n_layers": 6,  # two of the trunk, head 1 and three further heads
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 64,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "n_future_tokens": 4,
}


def mlp_width(params: dict) -> int:
    """As Meta's `FeedForward` computes it."""
    hidden = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    return params["multiple_of"] * ((hidden + params["multiple_of"] - 1) // params["multiple_of"])


def random_weights(params: dict, dtype: torch.dtype = torch.float32, seed: int = 3) -> Weights:
    """Every tensor of the published layout, wide enough that every token matters."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=draw) / math.sqrt(columns) * 1.5).to(dtype)

    dim, width = params["dim"], mlp_width(params)
    key = dim // params["n_heads"] * params.get("n_kv_heads", params["n_heads"])
    further = params.get("n_future_tokens", 1) - 1
    names = [f"layers.{i}" for i in range(params["n_layers"] - further)] + [f"extra_heads.{i}" for i in range(further)]
    weights = {"tok_embeddings.weight": matrix(params["vocab_size"], dim)}
    for name in names:
        shapes = {"attention.wq": (dim, dim), "attention.wk": (key, dim), "attention.wv": (key, dim)}
        shapes |= {"attention.wo": (dim, dim), "feed_forward.w1": (width, dim)}
        shapes |= {"feed_forward.w2": (dim, width), "feed_forward.w3": (width, dim)}
        weights |= {f"{name}.{part}.weight": matrix(*shape) for part, shape in shapes.items()}
        for norm in ("attention_norm", "ffn_norm"):
            weights[f"{name}.{norm}.weight"] = (1 + 0.2 * torch.randn(dim, generator=draw)).to(dtype)
    weights["norm.weight"] = (1 + 0.2 * torch.randn(dim, generator=draw)).to(dtype)
    weights["output.weight"] = matrix(params["vocab_size"], dim)
    return weights


def write(folder: Path, params: dict, weights: Weights, name: str = "consolidated.pth") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(weights, folder / name)
    return folder


def frequencies(size: int, theta: float, scaling: dict | None = None) -> torch.Tensor:
    """One a pair; `scaling`: Llama 3.1's, as its paper and published code have it."""
    found = 1.0 / theta ** (torch.arange(0, size, 2).float() / size)
    if scaling is None:
        return found
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for frequency in found.tolist():
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        scaled.append((1 - share) * frequency / scaling["factor"] + share * frequency)
    return torch.tensor(scaled)


def all_logits(weights: Weights, params: dict, tokens: torch.Tensor, scaling: dict | None = None) -> list[torch.Tensor]:
    """Logits [batch, time, vocabulary] of head 1, 2, …"""
    weights = {name: tensor.float() for name, tensor in weights.items()}
    time, size = tokens.shape[1], params["dim"] // params["n_heads"]
    angles = torch.outer(torch.arange(time).float(), frequencies(size, params["rope_theta"], scaling))
    turn = torch.polar(torch.ones_like(angles), angles)
    eps = params["norm_eps"]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [batch, time, heads, size]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[None, :, None, :]).flatten(-2)

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        def of(part: str) -> torch.Tensor:
            return weights[f"{name}.{part}.weight"]

        y = norm(x, of("attention_norm"))
        q, k, v = ((y @ of(f"attention.w{which}").T).unflatten(-1, (-1, size)) for which in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (z.repeat_interleave(q.shape[2] // z.shape[2], dim=2) for z in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(-2)
        x = x + mixed @ of("attention.wo").T
        y = norm(x, of("ffn_norm"))
        gate = torch.nn.functional.silu(y @ of("feed_forward.w1").T)
        return x + (gate * (y @ of("feed_forward.w3").T)) @ of("feed_forward.w2").T

    def count(kind: str) -> int:
        return len({name.split(".")[1] for name in weights if name.startswith(f"{kind}.")})

    x = weights["tok_embeddings.weight"][tokens]
    layers = count("layers")
    for number in range(layers - 1):
        x = block(x, f"layers.{number}")
    heads = [f"layers.{layers - 1}", *(f"extra_heads.{number}" for number in range(count("extra_heads")))]
    return [norm(block(x, head), weights["norm.weight"]) @ weights["output.weight"].T for head in heads]
