"""Meta's layout against a second implementation, there and back, and what is refused."""

import json
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tests.model import meta_style
from tests.model.heads import IDS, head_logits
from tests.model.meta_style import PARAMS, all_logits, random_weights
from wmtp_worker.assets.convert import convert
from wmtp_worker.errors import InputError
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import load
from wmtp_worker.model.meta import halves_to_pairs, mlp_params, pairs_to_halves
from wmtp_worker.model.mtp import MTPForCausalLM

SHAPES = {
    "four heads": {},
    "one head": {"n_layers": 3, "n_future_tokens": 1},
    "as an old Llama": {"n_layers": 3, "n_future_tokens": None, "n_kv_heads": None, "rope_theta": None},
    "other theta and width": {"rope_theta": 1e6, "ffn_dim_multiplier": 1.3, "multiple_of": 8, "norm_eps": 1e-6},
}


def shaped(name: str) -> tuple[dict, dict]:
    """What stands in params.json, and the same with what the published code assumes where it says nothing."""
    stated = {key: value for key, value in (PARAMS | SHAPES[name]).items() if value is not None}
    assumed = {"n_kv_heads": stated["n_heads"], "rope_theta": 10000.0, "n_future_tokens": 1}
    return stated, assumed | stated


@pytest.fixture
def meta(tmp_path):
    """The published layout, four heads, in a folder."""
    return meta_style.write(tmp_path / "7B_1T_4", PARAMS, random_weights(PARAMS))


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_every_head_are_those_of_metas_code(tmp_path, shape):
    stated, assumed = shaped(shape)
    weights = random_weights(assumed)
    model = load(meta_style.write(tmp_path / "meta", stated, weights), assumed["n_future_tokens"])
    expected = all_logits(weights, assumed, IDS)
    assert len(expected) == model.heads == assumed["n_future_tokens"]
    for own, theirs in zip(head_logits(model), expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    spread = max((one - other).abs().max() for one in expected for other in expected)
    assert shape == "one head" or model.heads == 1 or spread > 1  # heads that differ, or this would prove little


def test_comparison_would_notice_unpermuted_rows(meta):
    weights = random_weights(PARAMS)
    model = load(meta, 4)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.copy_(weights["layers.0.attention.wq.weight"])
    assert (head_logits(model)[0] - all_logits(weights, PARAMS, IDS)[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_no_bit_changes(tmp_path, shape, dtype):
    stated, assumed = shaped(shape)
    weights = random_weights(assumed, dtype)
    meta_style.write(tmp_path / "meta", stated, weights)
    convert(tmp_path / "meta", tmp_path / "ours", "ours")
    convert(tmp_path / "ours", tmp_path / "back", "meta")
    back = torch.load(tmp_path / "back" / "consolidated.pth", weights_only=True)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert meta_style.mlp_width(params) == meta_style.mlp_width(assumed)
    for name in assumed.keys() - {"multiple_of", "ffn_dim_multiplier"}:
        assert params[name] == assumed[name], name


def test_ours_becomes_metas_and_ours_again(config, tmp_path):
    torch.manual_seed(1)
    model = MTPForCausalLM(config(n_future_tokens=3, tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    convert(tmp_path / "ours", tmp_path / "meta", "meta")
    weights = torch.load(tmp_path / "meta" / "consolidated.pth", weights_only=True)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["n_layers"] == 5
    for own, theirs in zip(head_logits(model), all_logits(weights, params, IDS), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)
    convert(tmp_path / "meta", tmp_path / "again", "ours")
    again = load(tmp_path / "again", 3)
    assert again.config.tie_word_embeddings
    for own, other in zip(head_logits(again), head_logits(model), strict=True):
        assert torch.equal(own, other)


def test_as_hugging_face_it_is_a_plain_llama(meta, tmp_path):
    convert(meta, tmp_path / "hf", "hf")
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=IDS).logits, head_logits(load(meta, 4))[0])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0  # where transformers 4 looks for it
    assert "n_future_tokens" not in config


def test_parts_of_at_most_the_size_asked_for(meta, tmp_path):
    from wmtp_worker.model.folder import write_folder

    (tmp_path / "ours").mkdir()
    write_folder(open_stored(meta), tmp_path / "ours", further_heads=True, shard_bytes=30_000)
    parts = sorted((tmp_path / "ours").glob("model-*-of-*.safetensors"))
    assert len(parts) > 3
    assert all(path.stat().st_size < 32_000 for path in parts)
    for own, other in zip(head_logits(load(tmp_path / "ours", 4)), head_logits(load(meta, 4)), strict=True):
        assert torch.equal(own, other)


def anonymous_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_a_model_is_never_in_memory_as_a_whole(tmp_path):
    params = PARAMS | {"dim": 512, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 256, "n_layers": 9}
    weights = random_weights(params, torch.bfloat16)
    size = sum(tensor.nbytes for tensor in weights.values())
    meta_style.write(tmp_path / "meta", params, weights)
    del weights
    before, peak = anonymous_memory(), 0

    def sample() -> None:
        nonlocal peak
        peak = max(peak, anonymous_memory() - before)

    for source, to in (("meta", "ours"), ("ours", "back")):
        convert(tmp_path / source, tmp_path / to, "ours" if to == "ours" else "meta", poll=sample)
    assert size > 50e6
    assert peak < 0.4 * size  # wq and wk, which have to be put in another order


# --- what is refused


class Trap:
    """Code that a pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_model_one_folder_too_deep_is_named(meta, tmp_path):
    (tmp_path / "7b_1t_4").mkdir()
    meta.rename(tmp_path / "7b_1t_4" / "7B_1T_4")
    with pytest.raises(InputError, match="its folders hold some: 7B_1T_4") as caught:
        open_stored(tmp_path / "7b_1t_4")
    assert caught.value.where == str(tmp_path / "7b_1t_4")


def test_code_in_the_weights_is_never_run(meta, tmp_path):
    for protocol in ("zip", "bare"):
        if protocol == "zip":
            torch.save({"layers.0.attention.wq.weight": Trap(tmp_path / "sprung")}, meta / "consolidated.pth")
        else:
            (meta / "consolidated.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        with pytest.raises(InputError, match="do not load") as caught:
            open_stored(meta)
        assert not (tmp_path / "sprung").exists()
        assert caught.value.where == str(meta / "consolidated.pth")


def edit_params(folder, **changes):
    params = json.loads((folder / "params.json").read_text()) | changes
    (folder / "params.json").write_text(json.dumps({name: value for name, value in params.items() if value is not ...}))


def edit_weights(folder, change):
    weights = torch.load(folder / "consolidated.pth", weights_only=True)
    torch.save(change(weights), folder / "consolidated.pth")


def cut(folder):
    path = folder / "consolidated.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def shard(folder):
    for number in ("00", "01"):
        (folder / f"consolidated.{number}.pth").write_bytes((folder / "consolidated.pth").read_bytes())
    (folder / "consolidated.pth").unlink()


def without(gone):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name != gone}


DAMAGES = {
    "cut for two GPUs": (shard, "2 files of a model that was cut for several GPUs"),
    "no weights": (lambda folder: (folder / "consolidated.pth").unlink(), r"no consolidated\.pth"),
    "no params": (lambda folder: (folder / "params.json").unlink(), r"no params\.json"),
    "params cut": (lambda folder: (folder / "params.json").write_text('{"dim": 3'), "not JSON"),
    "params a list": (lambda folder: (folder / "params.json").write_text("[1]"), "holds a list"),
    "no dim": (lambda folder: edit_params(folder, dim=...), "dim=None is no positive number"),
    "heads do not divide": (lambda folder: edit_params(folder, n_heads=5), "n_heads=5 does not divide dim=32"),
    "key heads do not divide": (lambda folder: edit_params(folder, n_kv_heads=3), "n_kv_heads=3 does not divide"),
    "scaled rope": (lambda folder: edit_params(folder, use_scaled_rope=True), "use_scaled_rope"),
    "theta zero": (lambda folder: edit_params(folder, rope_theta=0), "rope_theta=0 is no positive"),
    "other number of layers": (lambda folder: edit_params(folder, n_layers=7), "n_layers=7.* 3 layers and 3 further"),
    "other number of heads": (lambda folder: edit_params(folder, n_future_tokens=2), "n_future_tokens=2; the weights"),
    "other key heads": (lambda folder: edit_params(folder, n_kv_heads=4), r"k_proj.weight has shape \[16, 32\]"),
    "weights cut": (cut, "the weights do not load"),
    "weights empty": (lambda folder: (folder / "consolidated.pth").write_bytes(b""), "the weights do not load"),
    "weights no dictionary": (
        lambda folder: torch.save([torch.ones(1)], folder / "consolidated.pth"),
        "holds a list, not tensors by name",
    ),
    "old style of torch": (
        lambda folder: torch.save(
            random_weights(PARAMS), folder / "consolidated.pth", _use_new_zipfile_serialization=False
        ),
        "the weights do not load",
    ),
    "a number among the tensors": (
        lambda folder: edit_weights(folder, lambda w: {**w, "step": 3}),
        "step is no tensor",
    ),
    "no embedding": (lambda folder: edit_weights(folder, without("tok_embeddings.weight")), "no matrix tok_embeddings"),
    "a tensor gone": (
        lambda folder: edit_weights(folder, without("extra_heads.1.ffn_norm.weight")),
        "1 tensors are missing",
    ),
    "a tensor too many": (
        lambda folder: edit_weights(folder, lambda w: {**w, "layers.0.attention.wq.bias": torch.ones(32)}),
        r"a tensor of no Llama: layers\.0\.attention\.wq\.bias",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_folder_is_refused_with_its_name(meta, damage):
    do, words = DAMAGES[damage]
    do(meta)
    with pytest.raises(InputError, match=words) as caught:
        open_stored(meta)
    assert str(meta) in caught.value.where
    assert caught.value.fix


def test_buffer_of_the_first_llamas_is_left_out(meta):
    edit_weights(meta, lambda weights: {**weights, "rope.freqs": torch.ones(4)})
    assert open_stored(meta).heads == 4


def test_other_number_of_heads_is_an_error(meta):
    with pytest.raises(InputError, match=r"has 4 heads, model\.heads is 2") as caught:
        load(meta, 2)
    assert caught.value.fix == "set model.heads=4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "no place for biases"),
        ({"head_dim": 16}, "attention heads of 16 numbers"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rotary positions of type linear",
        ),
    ],
)
def test_what_metas_layout_has_no_place_for(config, tmp_path, changes, words):
    MTPForCausalLM(config(n_future_tokens=2, **changes)).save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match=words):
        convert(tmp_path / "ours", tmp_path / "meta", "meta")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@given(dim=st.integers(1, 600).map(lambda n: 8 * n), wanted=st.integers(1, 20_000))
def test_metas_code_computes_the_width_that_was_meant(dim, wanted):
    assert meta_style.mlp_width({"dim": dim, **mlp_params(dim, wanted)}) == wanted


def test_7b_has_its_published_width():
    assert mlp_params(4096, 11008) == {"multiple_of": 256}


@given(heads=st.integers(1, 5), pairs=st.integers(1, 4))
def test_order_of_rows_goes_there_and_back(heads, pairs):
    weight = torch.arange(heads * pairs * 2 * 3).view(-1, 3)
    assert torch.equal(halves_to_pairs(pairs_to_halves(weight, heads), heads), weight)


def test_order_of_rows_by_hand():
    weight = torch.arange(8).view(8, 1)  # two heads of two pairs
    assert pairs_to_halves(weight, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
