"""Llama's relatives, each in the layout in which it is published, made small: their own config.json, other numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model import meta_style
from tests.model.heads import IDS, head_logits
from wmtp_worker.assets.convert import convert
from wmtp_worker.errors import InputError
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import load
from wmtp_worker.model.meta import halves_to_pairs

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "use_cache": True,
}
LLAMA_3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# the keys of the published files, with the dimensions left to SMALL
FAMILIES = {
    "CodeLlama-7b-hf": {
        **{"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 16384},
        **{"num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
        **{"rope_theta": 1000000, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        "transformers_version": "4.33.0.dev0",
    },
    "Meta-Llama-3-8B": {
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2},
        **{"initializer_range": 0.02, "max_position_embeddings": 8192, "num_key_value_heads": 2, "pretraining_tp": 1},
        **{"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False},
        **{"torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0"},
    },
    "Llama-3.1-8B-Instruct": {
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3, 4]},
        **{"initializer_range": 0.02, "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 2},
        **{"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA_3, "rope_theta": 500000.0},
        **{"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.3"},
    },
    "Llama-3.2-1B": {
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8},
        **{"initializer_range": 0.02, "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 2},
        **{"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {**LLAMA_3, "factor": 32.0}},
        **{"rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        "transformers_version": "4.45.0.dev0",
    },
    "SmolLM2-135M": {
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0},
        **{"initializer_range": 0.041666666666666664, "is_llama_config": True, "max_position_embeddings": 8192},
        **{"mlp_bias": False, "num_attention_heads": 4, "num_key_value_heads": 2, "pretraining_tp": 1},
        **{"rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
        **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1"},
    },
    "Sheared-LLaMA-1.3B": {
        **{"_name_or_path": "princeton-nlp/Sheared-LLaMA-1.3B", "bos_token_id": 1, "eos_token_id": 2},
        **{"initializer_range": 0.02, "max_position_embeddings": 4096, "num_key_value_heads": 4, "pad_token_id": 0},
        **{"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False},
        **{"torch_dtype": "float32", "transformers_version": "4.31.0"},
    },
}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    """Config, weights by Hugging Face's names, folder; weights are as wide as in the other tests."""
    config = SMALL | FAMILIES[request.param]
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config | {"initializer_range": 0.3}))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dtype = getattr(torch, config["torch_dtype"])
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    stored = dict(weights)
    if request.param.startswith("Sheared"):  # as transformers 4.31 wrote them
        stored |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(3)}
    folder = tmp_path / request.param
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return config, weights, folder


def in_metas_words(config, weights):
    """The same model for the second implementation."""
    names = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo"}
    names |= {"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"}
    names |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    theirs = {}
    for name, tensor in weights.items():
        if name.startswith("model.layers."):
            number, kind = name.split(".")[2], name.split(".")[-2]
            tensor = halves_to_pairs(tensor, heads[kind]) if kind in heads else tensor
            theirs[f"layers.{number}.{names[kind]}.weight"] = tensor
    theirs["tok_embeddings.weight"] = weights["model.embed_tokens.weight"]
    theirs["norm.weight"] = weights["model.norm.weight"]
    theirs["output.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    params = {"dim": config["hidden_size"], "n_heads": config["num_attention_heads"]}
    return theirs, params | {"norm_eps": config["rms_norm_eps"], "rope_theta": config.get("rope_theta", 10000.0)}


def test_logits_are_those_of_transformers_and_of_the_second_implementation(family):
    config, weights, folder = family
    model = load(folder, 2)
    assert model.config.tie_word_embeddings == config["tie_word_embeddings"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    long = torch.arange(300)[None] * 7 % 64  # far enough for scaled rotary positions to differ
    for ids in (IDS, long):
        first, second = head_logits(model, ids)
        with torch.no_grad():
            assert torch.equal(first, plain(input_ids=ids).logits)
        assert torch.equal(first, second)
        theirs, params = in_metas_words(config, weights)
        [expected] = meta_style.all_logits(theirs, params, ids, config.get("rope_scaling"))
        torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-3)


def test_converted_it_is_bit_equal_and_says_rotary_positions_in_both_ways(family, tmp_path):
    config, weights, folder = family
    convert(folder, tmp_path / "copy", "hf")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == weights.keys()
    assert all(
        torch.equal(copied[name], weights[name]) and copied[name].dtype == weights[name].dtype for name in weights
    )
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["rope_theta"] == config.get("rope_theta", 10000.0)
    assert (written["rope_scaling"] or {}).get("factor") == (config["rope_scaling"] or {}).get("factor")
    again, before = (LlamaConfig.from_pretrained(path) for path in (tmp_path / "copy", folder))
    assert again.rope_parameters == before.rope_parameters
    assert again.eos_token_id == before.eos_token_id
    assert torch.equal(head_logits(load(tmp_path / "copy", 1))[0], head_logits(load(folder, 1))[0])


def test_our_heads_survive_in_the_config_of_transformers_5(config, tmp_path):
    """What `save_pretrained` writes today: `rope_parameters` and `dtype`."""
    from wmtp_worker.model.mtp import MTPForCausalLM

    rope = {**LLAMA_3, "rope_theta": 5e5}
    model = MTPForCausalLM(config(n_future_tokens=3, rope_parameters=rope, max_position_embeddings=16384))
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "copy", "ours")
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]["factor"], written["n_future_tokens"]) == (5e5, 8.0, 3)
    for one, other in zip(head_logits(load(tmp_path / "copy", 3)), head_logits(model), strict=True):
        assert torch.equal(one, other)


def test_pickled_weights_read_the_same(family):
    *_, folder = family
    before = dict(open_stored(folder).tensors)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    stored = open_stored(folder)
    assert stored.layout == "hf"
    assert stored.tensors.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored.tensors.items())


def test_quantised_folder_is_refused(family):
    config, _, folder = family
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="quantised"):
        open_stored(folder)
