"""Samples that share a row know nothing of each other: not in attention, positions, logits or gradients."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmtp_worker.data.packing import Batch, collate
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.model.mtp import MTPForCausalLM, TrunkOutput, packed_attention_mask

HEADS = 3
ROW = 24
id_lists = st.lists(st.lists(st.integers(0, 63), min_size=1, max_size=8), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def model(request):
    torch.manual_seed(2)
    config = request.getfixturevalue("config")
    return MTPForCausalLM(config(n_future_tokens=HEADS))


def sample(ids: Sequence[int]) -> Sample:
    return Sample(np.asarray(ids, dtype=np.int32), 1)


def row(*samples: Sequence[int], length: int = ROW, pad_id: int = 0) -> Batch:
    return collate([[sample(ids) for ids in samples]], length, pad_id)


def logits(model: MTPForCausalLM, batch: Batch) -> torch.Tensor:
    """[heads, time, vocabulary] of a batch of one row."""
    with torch.no_grad():
        trunk = run_trunk(model, batch)
        return torch.stack([model.head_logits(number, trunk)[0] for number in range(1, HEADS + 1)])


def run_trunk(model: MTPForCausalLM, batch: Batch) -> TrunkOutput:
    return model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))


def cut(whole: torch.Tensor, samples: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Per-sample parts of [heads, time, …]; the padding's part is left away."""
    lengths = [len(ids) for ids in samples]
    return whole.split([*lengths, whole.shape[1] - sum(lengths)], dim=1)[:-1]


def test_mask_by_hand():
    mask = packed_attention_mask(torch.tensor([[1, 1, 2, 2, 2, 0, 0]]))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 7, 7)
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_rows_of_a_batch_have_their_own_mask():
    together = packed_attention_mask(torch.tensor([[1, 1, 0], [1, 2, 2]]))
    for number, segments in enumerate(([1, 1, 0], [1, 2, 2])):
        assert torch.equal(together[number], packed_attention_mask(torch.tensor([segments]))[0])


@given(samples=id_lists)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_logits_are_those_of_each_sample_alone(model, samples):
    """Alone means: in a row of its own that has exactly its length, without padding."""
    packed = cut(logits(model, row(*samples)), samples)
    for ids, part in zip(samples, packed, strict=True):
        alone = logits(model, row(ids, length=len(ids)))
        torch.testing.assert_close(part, alone, rtol=1e-4, atol=2e-5)


def test_packing_test_would_notice_a_leak(model):
    """The same comparison fails where it should: with one segment for the whole row."""
    samples = [[3, 5, 7, 9], [3, 5, 7, 9]]
    batch = row(*samples)
    positions_only = Batch(batch.input_ids, batch.labels, batch.position_ids, (batch.segment_ids > 0).long())
    _, second = cut(logits(model, positions_only), samples)
    alone = logits(model, row(samples[1], length=4))
    assert (second - alone).abs().max() > 0.1
    mask_only = Batch(batch.input_ids, batch.labels, torch.arange(ROW)[None], batch.segment_ids)
    assert (cut(logits(model, mask_only), samples)[1] - alone).abs().max() < 1e-4  # rotary positions are relative


@given(samples=id_lists.filter(lambda lists: len(lists) > 1), others=st.integers(1, 63), pad_id=st.integers(0, 63))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changing_other_samples_changes_no_bit(model, samples, others, pad_id):
    before = cut(logits(model, row(*samples)), samples)
    for kept in range(len(samples)):
        changed = [
            ids if number == kept else [(token + others) % 64 for token in ids] for number, ids in enumerate(samples)
        ]
        after = cut(logits(model, row(*changed, pad_id=pad_id)), changed)
        assert torch.equal(after[kept], before[kept])
        for number in set(range(len(samples))) - {kept}:
            assert not torch.equal(after[number], before[number])


def test_later_tokens_change_nothing_before_them(model):
    one, other = (logits(model, row([1, 2, 3, last, 5])) for last in (4, 40))
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.equal(one[:, 3], other[:, 3])


@pytest.mark.parametrize("head", range(1, HEADS + 1))
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_gradient_reaches_only_the_samples_own_tokens(model, chosen, head):
    samples = [[3, 9, 27, 17], [51, 25, 11], [33, 35, 41, 59, 49]]
    segments = row(*samples).segment_ids[0]
    embedded = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: embedded.append(output))
    try:
        trunk = run_trunk(model, row(*samples))
    finally:
        handle.remove()
    own = segments == chosen + 1
    loss = model.head_logits(head, trunk)[0][own].square().sum()
    [gradient] = torch.autograd.grad(loss, embedded)
    assert (gradient[0][own].abs().sum(-1) > 0).all()
    assert (gradient[0][~own] == 0).all()


def test_parameter_gradients_are_the_sum_of_those_alone(model):
    samples = [[3, 9, 27, 17], [51, 25, 11], [33, 35, 41, 59, 49]]

    def gradients(batches: list[Batch]) -> list[torch.Tensor]:
        total = torch.zeros(())
        for batch in batches:
            trunk = run_trunk(model, batch)
            real = batch.segment_ids > 0
            total = total + sum(model.head_logits(head, trunk)[real].square().sum() for head in range(1, HEADS + 1))
        return list(torch.autograd.grad(total, list(model.parameters())))

    packed = gradients([row(*samples)])
    alone = gradients([row(ids, length=len(ids)) for ids in samples])
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_padding_is_finite(model):
    """A query without any key would be NaN, and would spread through the backward pass."""
    assert logits(model, row([1], length=ROW)).isfinite().all()
    assert logits(model, row(length=ROW)).isfinite().all()


def test_heads_share_trunk_norm_and_unembedding(model):
    """Each head by hand: its own layer on the trunk's output, then the one norm and the one unembedding."""
    trunk = run_trunk(model, row([1, 2, 3, 4]))
    layers = [model.model.layers[-1], *model.extra_heads]
    with torch.no_grad():
        for number, layer in enumerate(layers, start=1):
            hidden = layer(
                trunk.hidden, attention_mask=trunk.attention_mask, position_embeddings=trunk.position_embeddings
            )
            expected = model.model.norm(hidden) @ model.lm_head.weight.T
            torch.testing.assert_close(model.head_logits(number, trunk), expected)
    own = [logits(model, row([1, 2, 3, 4]))[number] for number in range(HEADS)]
    assert not torch.equal(own[0], own[1])
    assert not torch.equal(own[1], own[2])


def test_detached_trunk_is_a_leaf_of_the_same_values(model):
    trunk = run_trunk(model, row([1, 2, 3]))
    leaf = trunk.detached()
    assert torch.equal(leaf.hidden, trunk.hidden)
    assert leaf.hidden.is_leaf
    assert leaf.hidden.requires_grad
    assert trunk.hidden.grad_fn is not None
