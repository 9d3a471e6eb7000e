"""`wmtp models`: what a model is, and another layout of it."""

import json

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from tests.model import meta_style
from wmtp_worker.checkpoint.export import save_weights
from wmtp_worker.data.tokenizer import PACKAGED
from wmtp_worker.errors import Interrupted

PARAMS = meta_style.PARAMS


@pytest.fixture
def meta(tmp_path):
    return meta_style.write(tmp_path / "7B_1T_4", PARAMS, meta_style.random_weights(PARAMS, torch.bfloat16))


def test_show_says_what_it_is(command, meta):
    facts = json.loads(command("models", "show", meta, "--json").stdout)
    assert (facts["layout"], facts["heads"], facts["layers"], facts["vocabulary"]) == ("meta", 4, 3, 64)
    assert facts["dtypes"] == {"bfloat16": 57}
    assert facts["bytes"] == 2 * facts["parameters"]
    shown = command("models", "show", meta).stdout
    assert "layout               meta" in shown
    assert f"parameters           {facts['parameters']:,}" in shown


def test_metas_model_becomes_ours_with_a_fast_tokenizer(command, meta, tmp_path):
    with (meta / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["def f(x):", "    return x"] * 20),
            model_writer=file,
            vocab_size=275,
            model_type="bpe",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
    (meta / "LICENSE.txt").write_text("research only")
    done = command("models", "convert", meta, tmp_path / "ours", "--to", "ours", "--json")
    assert json.loads(done.stdout)["layout"] == "ours"
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *("config.json", "model.safetensors", "LICENSE.txt"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
    }
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}
    command("models", "convert", tmp_path / "ours", tmp_path / "back", "--to", "meta")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (meta / "tokenizer.model").read_bytes()


def test_weights_of_a_run_become_a_plain_llama(command, tmp_path):
    from transformers import LlamaConfig

    from wmtp_worker.model.loading import tensors
    from wmtp_worker.model.mtp import MTPForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2048, tie_word_embeddings=True, n_future_tokens=2, **shape)
    model = MTPForCausalLM(config)
    save_weights(
        tmp_path / "final.pt", tensors(model), {"step": 3, "config": json.loads(model.config.to_json_string())}
    )
    bare = command("models", "convert", tmp_path / "final.pt", tmp_path / "bare", "--to", "hf")
    assert "no tokenizer in" in bare.stderr
    done = command("models", "convert", tmp_path / "final.pt", tmp_path / "hf", "--to", "hf", "--tokenizer", PACKAGED)
    assert "WARNING" not in done.stderr
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert not [name for name in saved if name.startswith("extra_heads")]
    assert all(torch.equal(tensor, tensors(model)[name]) for name, tensor in saved.items())


def test_a_run_trains_from_metas_own_folder(command, tiny_settings, tmp_path):
    params = PARAMS | {"vocab_size": 2048}
    folder = meta_style.write(tmp_path / "7B_1T_4", params, meta_style.random_weights(params))
    shapeless = [setting for setting in tiny_settings if not setting.startswith("model.")]
    settings = [f"model.path={folder}", f"model.tokenizer={PACKAGED}", "model.heads=4", "training.max_steps=2"]
    options = [part for setting in [*shapeless, *settings] for part in ("--set", setting)]
    command("train", "--run-name", "tiny", *options, WMTP_WORKDIR=str(tmp_path / "work"))
    final = tmp_path / "work" / "checkpoints" / "tiny" / "final.pt"
    content = torch.load(final, weights_only=True)
    assert content["step"] == 2
    assert str(folder) not in json.dumps(content["config"])  # nothing of this machine
    trained = content["model"]["extra_heads.2.mlp.down_proj.weight"]
    before = torch.load(folder / "consolidated.pth", weights_only=True)["extra_heads.2.feed_forward.w2.weight"]
    assert 0 < (trained - before).abs().max() < 0.1


def test_what_is_there_is_not_overwritten(command, meta, tmp_path):
    done = command("models", "convert", meta, tmp_path / "7B_1T_4", "--to", "hf", code=78)
    assert "is there already" in done.stderr
    assert torch.load(meta / "consolidated.pth", weights_only=True)


def test_a_tokenizer_that_is_not_where_it_is_named(command, meta, tmp_path):
    nowhere = tmp_path / "nowhere"
    done = command("models", "convert", meta, tmp_path / "new", "--to", "hf", "--tokenizer", nowhere, code=78)
    assert done.stderr.startswith(f"error: no tokenizer.json, no tokenizer.model (from {nowhere})")
    assert not (tmp_path / "new").exists()


def test_a_stop_leaves_nothing_behind(meta, tmp_path):
    from wmtp_worker.assets.convert import convert

    calls = 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Interrupted("stopped")

    for to in ("ours", "meta"):
        calls = 0
        with pytest.raises(Interrupted):
            convert(meta, tmp_path / "new", to, poll=poll)
        assert [path.name for path in tmp_path.iterdir()] == ["7B_1T_4"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nowhere"), "there is no such file or folder"),
        (("show", "empty"), "no layout that is known"),
        (("convert", "nowhere", "new", "--to", "gguf"), "'gguf' is no layout to write"),
    ],
)
def test_wrong_arguments_are_one_clear_error(command, tmp_path, arguments, words):
    (tmp_path / "here" / "empty").mkdir()
    done = command("models", *arguments, code=78)
    assert words in done.stderr
    assert not (tmp_path / "here" / "new").exists()
