"""Value and reward models: one number a token, packed like the policy's rows."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from tests.model import meta_style
from tests.model.heads import IDS, inputs
from wmtp_worker.checkpoint.snapshot import split_frozen
from wmtp_worker.errors import InputError
from wmtp_worker.model.loading import tensors
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import MTPForCausalLM, packed_attention_mask
from wmtp_worker.model.reward import load_reward
from wmtp_worker.model.value import rebuild_value, value_from, value_on

LENGTHS = (7, 3, 5)


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row of three samples and padding."""
    segments = torch.tensor([[1] * 7 + [2] * 3 + [3] * 5 + [0] * 2])
    positions = torch.cat([torch.arange(length) for length in (*LENGTHS, 2)])[None]
    return IDS[:1], positions, packed_attention_mask(segments)


def alone() -> list[torch.Tensor]:
    return [part[None] for part in IDS[0].split([*LENGTHS, 2])[:-1]]


def learnt(module):
    """With values that are not zero."""
    torch.manual_seed(4)
    for parameter in module.head.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.fixture
def llama(config, tmp_path):
    torch.manual_seed(5)
    plain = LlamaForCausalLM(config()).eval()
    plain.save_pretrained(tmp_path / "llama")
    return plain, tmp_path / "llama"


def test_a_new_value_model_says_zero_on_the_backbone_it_was_given(llama):
    plain, folder = llama
    value = value_from(folder, 1, width=16, seed=1)
    out = value(*inputs())
    assert out.shape == IDS.shape
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.zeros_like(out))
    learnt(value)
    with torch.no_grad():
        states = plain.model(input_ids=IDS).last_hidden_state
        expected = value.head.output(torch.nn.functional.gelu(value.head.hidden(states)))[..., 0]
        torch.testing.assert_close(value(*inputs()), expected)


def test_layers_of_a_policy_with_heads_serve_too(tmp_path):
    params = meta_style.PARAMS
    folder = meta_style.write(tmp_path / "meta", params, meta_style.random_weights(params))
    value = value_from(folder, 4, width=16, seed=1)
    assert len(value.backbone.layers) == 3
    assert not [name for name in tensors(value) if "extra_heads" in name or "lm_head" in name]


def test_packed_values_are_those_of_each_sample_alone(llama):
    value = learnt(value_from(llama[1], 1, width=16, seed=1))
    with torch.no_grad():
        together = value(*packed())[0].split([*LENGTHS, 2])
        for part, ids in zip(together, alone(), strict=False):
            torch.testing.assert_close(part, value(*inputs(ids))[0], rtol=1e-4, atol=1e-5)
            assert part.std() > 0.01


def test_values_look_back_and_never_ahead(llama):
    value = learnt(value_from(llama[1], 1, width=16, seed=1))
    changed = IDS.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    with torch.no_grad():
        one, other = value(*inputs()), value(*inputs(changed))
    assert torch.equal(one[:, :9], other[:, :9])
    assert (one[:, 9:] != other[:, 9:]).any(dim=0).all()


def test_seed_alone_decides_the_head(llama):
    torch.manual_seed(3)
    one, same, other = (value_from(llama[1], 1, width=16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.head.hidden.weight, same.head.hidden.weight)
    assert not torch.equal(one.head.hidden.weight, other.head.hidden.weight)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_saved_and_rebuilt_it_is_equal(llama):
    value = learnt(value_from(llama[1], 1, width=16, seed=1))
    config = json.loads(json.dumps(value.config.to_dict()))
    again = rebuild_value(config, tensors(value), "final.pt")
    assert tensors(again).keys() == tensors(value).keys()
    with torch.no_grad():
        assert torch.equal(again(*inputs()), value(*inputs()))


def test_checkpoint_of_another_shape_is_refused(llama):
    value = value_from(llama[1], 1, width=16, seed=1)
    config = value.config.to_dict()
    with pytest.raises(InputError, match=r"head\.hidden\.weight has shape \[16, 32\], the model wants \[8, 32\]"):
        rebuild_value(config | {"value_width": 8}, tensors(value), "final.pt")
    with pytest.raises(InputError, match=r"no tensor backbone\.layers\.2"):
        rebuild_value(config | {"num_hidden_layers": 2}, tensors(value), "final.pt")
    with pytest.raises(InputError, match="no value model") as caught:
        rebuild_value(llama[0].config.to_dict(), tensors(value), "final.pt")
    assert caught.value.where == "final.pt"
    with pytest.raises(InputError, match="makes no value model"):
        rebuild_value(config | {"num_attention_heads": 5}, tensors(value), "final.pt")


def test_lora_leaves_backbone_frozen_and_the_head_can_be_trained(llama):
    value = value_from(llama[1], 1, width=16, seed=1)
    add_lora(value.backbone, rank=2, alpha=4)
    trainable, frozen = split_frozen(value.named_parameters())
    assert {name for name in trainable if "lora_" not in name} == {
        *("head.hidden.weight", "head.hidden.bias", "head.output.weight", "head.output.bias")
    }
    assert all(name.startswith("backbone.") for name in frozen)
    for tensor in trainable.values():
        torch.nn.init.normal_(tensor)
    again = rebuild_value(json.loads(json.dumps(value.config.to_dict())), tensors(value), "final.pt")
    with torch.no_grad():
        assert torch.equal(again(*inputs()), value(*inputs()))


def test_a_head_on_the_policys_trunk(config):
    torch.manual_seed(1)
    policy = MTPForCausalLM(config(n_future_tokens=2))
    with torch.no_grad():
        trunk = policy.trunk(*inputs())
    value = learnt(value_on(policy, width=16, seed=1, trunk_head=True))
    out = value(*inputs())
    with torch.no_grad():
        torch.testing.assert_close(out, value.head(value.backbone.norm(trunk.hidden)))
    out.sum().backward()
    reached = {name for name, parameter in value.named_parameters() if parameter.grad is not None}
    trainable, frozen = split_frozen(value.named_parameters())
    assert reached == set(trainable)
    assert {name.partition(".")[0] for name in trainable} == {"head", "backbone"}
    assert [name for name in trainable if name.startswith("backbone")] == ["backbone.norm.weight"]
    assert len(value.backbone.layers) == len(trunk_layers(frozen)) == policy.config.num_hidden_layers - 1
    again = rebuild_value(json.loads(json.dumps(value.config.to_dict())), tensors(value), "final.pt")
    with torch.no_grad():
        assert torch.equal(again(*inputs()), value(*inputs()))


def trunk_layers(names):
    return {name.split(".")[2] for name in names if name.startswith("backbone.layers.")}


# --- the reward model


@pytest.fixture
def classifier(config, tmp_path):
    torch.manual_seed(6)
    model = LlamaForSequenceClassification(config(num_labels=1, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "reward")
    return model, tmp_path / "reward"


def test_scores_are_those_of_transformers_packed_or_not(classifier):
    model, folder = classifier
    reward = load_reward(folder)
    with torch.no_grad():
        expected = [model(input_ids=ids).logits.item() for ids in alone()]
        together = reward(*packed())[0]
    assert together.dtype == torch.float32
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    torch.testing.assert_close(together[ends], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert max(expected) - min(expected) > 0.1


def test_a_reward_model_may_be_pickled(classifier):
    _, folder = classifier
    expected = load_reward(folder)(*packed())
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    assert torch.equal(load_reward(folder)(*packed()), expected)
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:100])
    with pytest.raises(InputError, match="does not load"):
        load_reward(folder)


def test_language_models_and_other_classifiers_give_no_reward(classifier, llama, config, tmp_path):
    LlamaForSequenceClassification(config(num_labels=3)).save_pretrained(tmp_path / "three")
    with pytest.raises(InputError, match="3 labels"):
        load_reward(tmp_path / "three")
    with pytest.raises(InputError, match="2 labels"):
        load_reward(llama[1])
    path = classifier[1] / "model.safetensors"
    weights = load_file(path)
    del weights["score.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors are missing or left over, score\.weight"):
        load_reward(classifier[1])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="does not load") as caught:
        load_reward(classifier[1])
    assert str(classifier[1]) in caught.value.where
