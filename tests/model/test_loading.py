"""Llama-family folders as Hugging Face writes them, our own, and broken ones."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.model.heads import IDS, head_logits
from wmtp_worker.assets.convert import convert
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.errors import InputError
from wmtp_worker.model.loading import base_digest, build, load, load_tensors, tensors
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.settings import load as load_settings


@pytest.fixture
def llama(config, tmp_path):
    """`llama(name, shard=…, **config changes)`: save a random plain Llama, return it and its folder."""

    def make(name="llama", shard="1GB", **changes):
        torch.manual_seed(5)
        model = LlamaForCausalLM(config(**changes)).eval()
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return model, tmp_path / name

    return make


def plain_logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_equal_weights(one: MTPForCausalLM, other: MTPForCausalLM) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    for name, tensor in tensors(one).items():
        assert torch.equal(tensor, tensors(other)[name]), name


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def pickle_weights(folder):
    """The same weights as older tools write them: `pytorch_model.bin`, or its shards with an index."""
    for path in folder.glob("model*.safetensors"):
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in load_file(path).items()}
        torch.save(parameters, folder / pickled_name(path.name))
        path.unlink()
    for index in folder.glob("model.safetensors.index.json"):
        written = json.loads(index.read_text())
        written["weight_map"] = {name: pickled_name(file) for name, file in written["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(written))
        index.unlink()


def pickled_name(name):
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")


class Trap:
    """Code that a pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --- a plain Llama


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_head_one_is_exactly_the_llama(llama, tied, shard, heads):
    plain, folder = llama(shard=shard, tie_word_embeddings=tied)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model = load(folder, heads)
    assert model.heads == heads
    assert torch.equal(head_logits(model)[0], plain_logits(plain))
    assert torch.equal(plain_logits(model.eval()), plain_logits(plain))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_further_heads_start_as_copies_of_the_last_layer(llama):
    _, folder = llama()
    model = load(folder, heads=3)
    last = dict(model.model.layers[-1].named_parameters())
    for head in model.extra_heads:
        for name, parameter in head.named_parameters():
            assert torch.equal(parameter, last[name])
            assert parameter.data_ptr() != last[name].data_ptr()
    first, second, third = head_logits(model)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_loaded_weights_are_fp32_whatever_the_folder_holds(llama, config, tmp_path):
    LlamaForCausalLM(config()).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in tensors(load(tmp_path / "half", 2)).values()} == {torch.float32}


# --- a folder of ours


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_it_is_bit_equal(config, tmp_path, tied):
    torch.manual_seed(1)
    model = MTPForCausalLM(config(n_future_tokens=4, tie_word_embeddings=tied))
    for generation in ("first", "second"):
        model.save_pretrained(tmp_path / generation, max_shard_size="30KB")
        loaded = load(tmp_path / generation, heads=4)
        assert_equal_weights(loaded, model)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        for one, other in zip(head_logits(loaded), head_logits(model), strict=True):
            assert torch.equal(one, other)
        model = loaded


def test_saved_from_a_plain_llama_it_remembers_its_heads(llama, tmp_path):
    plain, folder = llama()
    load(folder, heads=3).save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["n_future_tokens"] == 3
    assert load(tmp_path / "ours", heads=3).heads == 3
    reopened = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(plain_logits(reopened), plain_logits(plain))


def test_a_policy_is_read_without_the_value_head_it_was_trained_with(config, tmp_path):
    torch.manual_seed(1)
    model = MTPForCausalLM(config(n_future_tokens=2))
    bare = dict(tensors(model))
    model.add_value_head(8, seed=3)
    model.save_pretrained(tmp_path)
    assert any(name.startswith("value_head.") for name in load_file(tmp_path / "model.safetensors"))
    loaded = load(tmp_path, heads=2)
    assert loaded.value_head is None
    assert dict(tensors(loaded)).keys() == bare.keys()
    assert all(torch.equal(tensor, bare[name]) for name, tensor in tensors(loaded).items())


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_another_number_of_heads_is_refused(config, tmp_path, asked):
    MTPForCausalLM(config(n_future_tokens=4)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"has 4 heads, model\.heads is {asked}") as caught:
        load(tmp_path, asked)
    assert caught.value.fix == "set model.heads=4"
    assert caught.value.where == str(tmp_path / "config.json")


# --- broken folders

DAMAGES = {
    "no folder content": (lambda folder: [path.unlink() for path in folder.iterdir()], "no layout that is known"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no layout that is known"),
    "config cut": (lambda folder: (folder / "config.json").write_text('{"model_type": "lla'), "not JSON"),
    "config without end": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "not JSON"),
    "config no object": (lambda folder: (folder / "config.json").write_text("[1]"), "holds a list, not an object"),
    "not llama": (lambda folder: edit_config(folder, model_type="gpt2"), "model_type is 'gpt2', not 'llama'"),
    "text for a number": (lambda folder: edit_config(folder, hidden_size="wide"), "makes no model.*hidden_size"),
    "heads do not divide": (lambda folder: edit_config(folder, num_attention_heads=5), "makes no model.*multiple"),
    "unknown activation": (lambda folder: edit_config(folder, hidden_act="zz"), "makes no model.*'zz'"),
    "safetensors under another name": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"the weights do not load",
    ),
    "other safetensors": (
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter.safetensors"),
        "no model.safetensors, no pytorch_model.bin",
    ),
    "pickled, not tensors alone": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            torch.save({"lm_head.weight": "text"}, folder / "pytorch_model.bin"),
        ),
        "lm_head.weight is no tensor",
    ),
    "missing tensor": (
        lambda folder: edit_weights(folder, lambda weights: weights.pop("model.norm.weight")),
        "1 tensors are missing, model.norm.weight",
    ),
    "missing layer": (
        lambda folder: edit_config(folder, num_hidden_layers=4),
        "9 tensors are missing, model.layers.3.input_layernorm.weight",
    ),
    "layer too many": (
        lambda folder: edit_config(folder, num_hidden_layers=2),
        "9 tensors are not part of the model .*, model.layers.2.input_layernorm.weight",
    ),
    "bias that nobody would add": (
        lambda folder: edit_weights(
            folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
        ),
        "1 tensors are not part of the model .*q_proj.bias",
    ),
    "other vocabulary": (
        lambda folder: edit_config(folder, vocab_size=65),
        r"embed_tokens.weight has shape \[64, 32\], .* \[65, 32\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_folder_is_refused_with_its_name(llama, damage):
    _, folder = llama()
    do, words = DAMAGES[damage]
    do(folder)
    with pytest.raises(InputError, match=words) as caught:
        load(folder, heads=2)
    assert str(folder) in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("keep", [0, 5, 20, 0.5, 0.999])
def test_truncated_weights_are_refused(llama, keep):
    _, folder = llama()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match="the weights do not load") as caught:
        load(folder, heads=2)
    assert str(folder) in caught.value.where


@pytest.mark.parametrize("gone", ["model-00002*", "model.safetensors.index.json"])
def test_missing_shard_is_refused(llama, gone):
    _, folder = llama(shard="20KB")
    [path] = folder.glob(gone)
    path.unlink()
    with pytest.raises(InputError, match=f"no {path.name if gone.startswith('model-') else 'model.safetensors'}"):
        load(folder, heads=2)


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pickled_weights_are_the_same_model(llama, tmp_path, tied, shard):
    plain, folder = llama(shard=shard, tie_word_embeddings=tied)
    before = base_digest(folder)
    pickle_weights(folder)
    assert not list(folder.glob("*.safetensors"))
    assert torch.equal(head_logits(load(folder, 2))[0], plain_logits(plain))
    assert base_digest(folder) != before
    for to in ("hf", "meta"):
        convert(folder, tmp_path / to, to)
        assert_equal_weights(load(tmp_path / to, 2), load(folder, 2))


@pytest.mark.parametrize("gone", ["pytorch_model-00002*", "pytorch_model.bin.index.json"])
def test_missing_pickled_shard_is_refused(llama, gone):
    _, folder = llama(shard="20KB")
    pickle_weights(folder)
    [path] = folder.glob(gone)
    path.unlink()
    with pytest.raises(InputError, match=f"no {path.name.removesuffix('.index.json')}"):
        load(folder, heads=2)


def test_code_in_pickled_weights_is_never_run(llama, tmp_path):
    _, folder = llama()
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="do not load") as caught:
        load(folder, heads=2)
    assert not (tmp_path / "sprung").exists()
    assert caught.value.where == str(folder / "pytorch_model.bin")
    assert "weights_only" not in str(caught.value)


def test_pickled_weights_beside_safetensors_are_never_opened(llama):
    plain, folder = llama()
    (folder / "pytorch_model.bin").write_bytes(b"this would not unpickle")
    assert torch.equal(head_logits(load(folder, 1))[0], plain_logits(plain))


# --- a new model


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """`settings(seed=…, …)`: settings of a tiny new model; no .env of a developer's own is read."""
    monkeypatch.chdir(tmp_path)

    def make(seed=1, **changes):
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "layers": 3,
            "attention_heads": 4,
            "key_value_heads": 2,
            "heads": 4,
            "max_position_embeddings": 64,
            "rope_theta": 500.0,
            "tie_embeddings": True,
        }
        overrides = [f"model.{key}={value}" for key, value in (shape | changes).items()]
        return load_settings(overrides=[*overrides, f"run.seed={seed}", "data.sequence_length=64"], environ={})

    return make


TOKENIZER = load_tokenizer(PACKAGED)


def test_new_model_has_the_shape_of_the_settings(settings):
    model = build(settings(), TOKENIZER)
    attention = 32 * 32 + 2 * (32 * 16) + 32 * 32  # q, k and v (2 of 4 heads), o
    layer = attention + 3 * 32 * 48 + 2 * 32  # and the MLP and two norms
    # 3 layers, of which the last is head 1, and 3 further heads; one norm; 2,048 tokens, tied
    assert sum(parameter.numel() for parameter in model.parameters()) == 6 * layer + 32 + 2048 * 32
    assert model.heads == 4
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings == 64
    expected = 1 / 500.0 ** (torch.arange(0, 8, 2) / 8)  # 8 = hidden size / attention heads
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_untied_model_has_its_own_unembedding(settings):
    tied, untied = (build(settings(tie_embeddings=tie), TOKENIZER) for tie in (True, False))
    assert untied.num_parameters() - tied.num_parameters() == 2048 * 32
    assert "lm_head.weight" in tensors(untied)
    assert "lm_head.weight" not in tensors(tied)


def test_one_head_is_a_plain_llama(settings):
    model = build(settings(heads=1), TOKENIZER)
    assert model.heads == 1
    assert len(model.extra_heads) == 0
    assert not [name for name in tensors(model) if "extra_heads" in name]


def test_seed_alone_decides_and_nothing_else_notices(settings):
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    one = build(settings(seed=3), TOKENIZER)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12)
    assert_equal_weights(one, build(settings(seed=3), TOKENIZER))
    other = build(settings(seed=4), TOKENIZER)
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_heads_of_a_new_model_differ_from_each_other(settings):
    model = build(settings(), TOKENIZER)
    layers = [model.model.layers[-1], *model.extra_heads]
    sums = {layer.mlp.up_proj.weight.sum().item() for layer in layers}
    assert len(sums) == 4


# --- tensors by name


def test_load_tensors_copies_everything(config):
    torch.manual_seed(1)
    one = MTPForCausalLM(config(n_future_tokens=3))
    other = MTPForCausalLM(config(n_future_tokens=3))
    pointers = {name: tensor.data_ptr() for name, tensor in tensors(other).items()}
    load_tensors(other, tensors(one), "here")
    assert_equal_weights(one, other)
    assert {name: tensor.data_ptr() for name, tensor in tensors(other).items()} == pointers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.pop("model.norm.weight"), "the checkpoint has no tensor model.norm.weight"),
        (lambda saved: saved.update(spare=torch.zeros(1)), "the model has no tensor spare"),
        (
            lambda saved: saved.update({"model.norm.weight": torch.zeros(31)}),
            r"model.norm.weight has shape \[31\], the model wants \[32\]",
        ),
    ],
    ids=["missing", "left over", "shape"],
)
def test_load_tensors_names_what_does_not_fit(config, change, words):
    model = MTPForCausalLM(config(n_future_tokens=2))
    saved = dict(tensors(model))
    change(saved)
    with pytest.raises(InputError, match=words) as caught:
        load_tensors(model, saved, "step_3")
    assert caught.value.where == "step_3"


def test_base_digest_is_of_config_and_weights(llama):
    _, folder = llama("one", shard="20KB")
    _, same = llama("two", shard="20KB")
    before = base_digest(folder)
    assert base_digest(same) == before
    (folder / "README.md").write_text("no part of the model")
    assert base_digest(folder) == before
    (folder / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    assert base_digest(folder) == before
    check_every_file_counts(folder, "*.safetensors")
    (folder / "model-00001-of-00007.safetensors").rename(folder / "model-00009-of-00007.safetensors")
    assert base_digest(folder) != before


def test_base_digest_is_of_pickled_weights_too(llama):
    _, folder = llama(shard="20KB")
    pickle_weights(folder)
    before = base_digest(folder)
    (folder / "training_args.bin").write_bytes(b"no part of the model")
    (folder / "adapter.safetensors").write_bytes(b"nor this")
    assert base_digest(folder) == before
    check_every_file_counts(folder, "pytorch_model-*.bin")


def check_every_file_counts(folder, weights):
    before, shards = base_digest(folder), list(folder.glob(weights))
    assert len(shards) == 7
    for path in [folder / "config.json", *shards]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert base_digest(folder) != before, path.name
        path.write_bytes(content)
