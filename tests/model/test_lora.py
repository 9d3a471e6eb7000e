"""LoRA on trunk and heads: what trains, what is saved, what merging changes (nothing)."""

import json

import pytest
import torch

from tests.model.heads import IDS, head_logits, inputs
from wmtp_worker.checkpoint.export import save_weights
from wmtp_worker.checkpoint.snapshot import split_frozen
from wmtp_worker.errors import SettingsError
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import load, rebuild, tensors
from wmtp_worker.model.lora import TARGETS, add_lora, has_lora, merge_lora, merged_tensors
from wmtp_worker.model.mtp import MTPForCausalLM


@pytest.fixture
def model(config):
    torch.manual_seed(2)
    return MTPForCausalLM(config(n_future_tokens=3)).eval()


def learn(model: MTPForCausalLM, steps: int = 3) -> None:
    """A few steps of every head, so that adapters are no longer zero."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        trunk = model.trunk(*inputs())
        for head in range(1, model.heads + 1):
            logits = model.head_logits(head, trunk)[:, :-head]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, head:].flatten())
            loss.backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_new_adapters_change_no_logit_and_alone_are_trainable(model):
    before, names = head_logits(model), set(tensors(model))
    add_lora(model, rank=4, alpha=8)
    for one, other in zip(head_logits(model), before, strict=True):
        assert torch.equal(one, other)
    trainable, frozen = split_frozen(model.named_parameters())
    assert {name.split(".")[-3] for name in trainable} == {"lora_A", "lora_B"}
    assert {name.replace(".base_layer", "") for name in frozen} == names
    # five layers (two of the trunk, head 1, two further) of seven matrices each
    assert len(trainable) == 2 * 5 * len(TARGETS)
    assert any(name.startswith("extra_heads.1.mlp") for name in trainable)


def test_only_adapters_learn_and_only_they_are_saved(model):
    add_lora(model, rank=4, alpha=8)
    frozen_before = {name: tensor.clone() for name, tensor in split_frozen(model.named_parameters())[1].items()}
    first = head_logits(model)
    learn(model)
    trainable, frozen = split_frozen(model.named_parameters())
    for name, tensor in frozen.items():
        assert torch.equal(tensor, frozen_before[name]), name
    assert all(tensor.abs().max() > 0 for tensor in trainable.values())
    for one, other in zip(head_logits(model), first, strict=True):
        assert not torch.allclose(one, other)


def test_saved_bytes_are_those_of_the_adapters(config):
    """At 7B's proportions: rank 8 on every matrix is a few thousandths of the model."""
    with torch.device("meta"):
        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
        model = MTPForCausalLM(config(n_future_tokens=4, num_hidden_layers=29, vocab_size=32000, **shape))
        whole = sum(parameter.numel() for parameter in model.parameters())
        add_lora(model, rank=8, alpha=16)
    trainable, _ = split_frozen(model.named_parameters())
    saved = sum(tensor.numel() * 4 for tensor in trainable.values())
    # a matrix of m rows and n columns gets 8 (m + n): 4 of 4096 x 4096, 3 of 4096 x 11008, 32 layers
    assert saved == 4 * 32 * 8 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert 6.7e9 < whole < 6.8e9
    assert saved < 80e6


def test_merged_it_gives_the_same_logits_and_is_a_plain_model_again(model, config):
    names = {name: tensor.shape for name, tensor in tensors(model).items()}
    add_lora(model, rank=4, alpha=8, targets=["q_proj", "down_proj"])
    learn(model)
    learnt = head_logits(model)
    apart = merged_tensors(model)
    assert has_lora(model)
    fresh = MTPForCausalLM(config(n_future_tokens=3))
    fresh.load_state_dict(apart)
    merge_lora(model)
    assert not has_lora(model)
    assert {name: tensor.shape for name, tensor in tensors(model).items()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    for one, other, expected in zip(head_logits(model), head_logits(fresh), learnt, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


def test_seed_alone_decides(config):
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        model = MTPForCausalLM(config(n_future_tokens=2))
        add_lora(model, rank=2, alpha=2, seed=seed)
        return split_frozen(model.named_parameters())[0]

    torch.manual_seed(0)
    state = torch.get_rng_state()
    model = MTPForCausalLM(config(n_future_tokens=2))
    torch.set_rng_state(state)
    add_lora(model, rank=2, alpha=2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = adapters(1), adapters(1), adapters(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_of_the_training_alone(model):
    add_lora(model, rank=4, alpha=8, dropout=0.5)
    learn(model)
    one, other = head_logits(model), head_logits(model)
    assert torch.equal(one[0], other[0])
    model.train()
    assert not torch.equal(head_logits(model)[0], head_logits(model)[0])


@pytest.mark.parametrize(
    ("options", "words", "where"),
    [
        (
            {"rank": 4, "targets": ["q_proj", "query"]},
            "no layer that can have an adapter is called 'query'",
            "lora.targets",
        ),
        # the loss would never give one there a gradient
        ({"rank": 4, "targets": ["lm_head"]}, "no layer that can have an adapter is called 'lm_head'", "lora.targets"),
        ({"rank": 17}, "rank 17 is above the 16 of k_proj", "lora.rank"),
    ],
)
def test_what_cannot_be_is_refused(model, options, words, where):
    with pytest.raises(SettingsError, match=words) as caught:
        add_lora(model, alpha=8, **options)
    assert caught.value.where == where
    assert not has_lora(model)


def test_saved_with_its_adapters_it_is_the_same_model_again_or_a_merged_one(model, tmp_path):
    add_lora(model, rank=4, alpha=6, targets=["v_proj", "gate_proj"])
    learn(model)
    config = json.loads(json.dumps(model.config.to_dict()))
    again = rebuild(config, tensors(model), "final.pt").eval()
    for one, other in zip(head_logits(again), head_logits(model), strict=True):
        assert torch.equal(one, other)
    assert split_frozen(again.named_parameters())[0].keys() == split_frozen(model.named_parameters())[0].keys()
    save_weights(tmp_path / "final.pt", tensors(model), {"step": 3, "config": config})
    stored = open_stored(tmp_path / "final.pt")
    expected = merged_tensors(model)
    assert stored.tensors.keys() == expected.keys()
    assert all(torch.equal(stored.tensors[name], expected[name]) for name in expected)
    assert "lora" not in load(tmp_path / "final.pt", 3).config.to_dict()
