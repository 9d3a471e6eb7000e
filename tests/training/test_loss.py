"""The sequential-head loss against plain formulas: labels, values, gradients, memory."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from wmtp_worker.data.packing import IGNORE, Batch, collate
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.model.mtp import MTPForCausalLM, checkpoint_activations, packed_attention_mask
from wmtp_worker.settings import load
from wmtp_worker.training.linear_cross_entropy import CHUNK, LossForm, TokenLosses
from wmtp_worker.training.loss import Head, autocast, head_losses_backward, mtp_labels
from wmtp_worker.training.weights import Weighter

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 64
ROW = 16


def make_model(heads: int, tied: bool = False, dtype: torch.dtype = torch.float32) -> MTPForCausalLM:
    torch.manual_seed(heads)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        n_future_tokens=heads,
    )
    return MTPForCausalLM(config).to(dtype)


def sample(length: int, prompt_length: int, start: int = 1) -> Sample:
    ids = (np.arange(length) * 13 + start * 29) % VOCABULARY
    return Sample(ids.astype(np.int32), prompt_length)


def four_rows() -> list[list[Sample]]:
    return [
        [sample(9, 3, 1), sample(5, 1, 2)],
        [sample(16, 6, 3)],
        [sample(2, 1, 4), sample(3, 2, 5), sample(7, 0, 6)],
        [sample(4, 4, 7)],
    ]


def counts_of(targets: torch.Tensor) -> torch.Tensor:
    return (targets != IGNORE).sum((0, 1)).clamp(min=1).to(torch.float32)


def gradients(model: MTPForCausalLM) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def backward(
    model: MTPForCausalLM,
    rows: Sequence[Sequence[Sample]],
    weights: torch.Tensor | None = None,
    precision: str = "fp32",
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted losses of `head_losses_backward` as the loop calls it, uniform weights unless given."""
    batch = collate(rows, ROW, pad_id=0)
    targets = mtp_labels(batch.labels, batch.segment_ids, model.heads)
    weights = (targets != IGNORE).float() if weights is None else weights
    counts = counts_of(targets) if counts is None else counts
    return head_losses_backward(model, batch, targets, lambda head: weights[..., head.number - 1], counts, precision)[0]


def stacked(model: MTPForCausalLM, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """The formula written down whole: all heads' logits at once, differentiated in one go. Returns [heads]."""
    targets = mtp_labels(batch.labels, batch.segment_ids, model.heads)
    trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
    logits = torch.stack([model.head_logits(number, trunk) for number in range(1, model.heads + 1)], dim=2)
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(targets != IGNORE, -picked * weights, 0.0)
    per_head = losses.sum((0, 1)) / counts_of(targets)
    per_head.mean().backward()
    return per_head.detach()


# --- labels


@given(
    st.integers(1, 3).flatmap(
        lambda rows: st.integers(1, 12).flatmap(
            lambda time: st.tuples(
                st.lists(
                    st.lists(st.sampled_from([IGNORE, 0, 1, 63]), min_size=time, max_size=time),
                    min_size=rows,
                    max_size=rows,
                ),
                st.lists(
                    st.lists(st.integers(0, 3), min_size=time, max_size=time).map(sorted), min_size=rows, max_size=rows
                ),
            )
        )
    ),
    st.integers(1, 6),
)
@settings(deadline=None, max_examples=60)
def test_labels_equal_a_slow_loop(case, heads):
    labels, segments = case
    expected = [
        [
            [row[t + k] if t + k < len(row) and segment[t + k] == segment[t] else IGNORE for k in range(1, heads + 1)]
            for t in range(len(row))
        ]
        for row, segment in zip(labels, segments, strict=True)
    ]
    got = mtp_labels(torch.tensor(labels), torch.tensor(segments), heads)
    assert got.dtype == torch.int64
    assert got.tolist() == expected


def test_labels_by_hand():
    """Prompt 10 11, response 12 13; then prompt 20, response 21; then padding."""
    batch = collate(
        [[Sample(np.array([10, 11, 12, 13], np.int32), 2), Sample(np.array([20, 21], np.int32), 1)]], 7, pad_id=0
    )
    n = IGNORE
    assert mtp_labels(batch.labels, batch.segment_ids, 3)[0].tolist() == [
        [n, 12, 13],
        [12, 13, n],
        [13, n, n],
        [n, n, n],
        [21, n, n],
        [n, n, n],
        [n, n, n],
    ]


# --- values


def test_loss_by_hand():
    """With a zero unembedding every token costs ln 64, and d loss / d logit is w / (n N) (1/64 - [is the label])."""
    model = make_model(heads=2)
    torch.nn.init.zeros_(model.lm_head.weight)
    # 5 tokens, 2 of them prompt: head 1 has labels at positions 1, 2, 3, head 2 at 0, 1, 2
    weights = torch.zeros(1, ROW, 2)
    weights[0, 1:4, 0] = torch.tensor([1.0, 0.5, 0.0])
    weights[0, 0:3, 1] = torch.tensor([2.0, 2.0, 5.0])
    hidden = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: hidden.append(output.detach()[0]))
    losses = backward(model, [[sample(5, 2)]], weights)
    handle.remove()
    assert losses.tolist() == pytest.approx([math.log(64) * 1.5 / 3, math.log(64) * 9 / 3], rel=1e-6)
    assert losses.tolist() == pytest.approx([2.0794415, 12.4766491], rel=1e-6)
    labels = sample(5, 2).ids.tolist()
    by_unembedding = torch.zeros(VOCABULARY, 32)
    for head, positions in ((1, {1: 1.0, 2: 0.5, 3: 0.0}), (2, {0: 2.0, 1: 2.0, 2: 5.0})):
        expected = torch.zeros(ROW, VOCABULARY)
        for position, weight in positions.items():
            expected[position] = weight / (2 * 3) / 64
            expected[position, labels[position + head]] -= weight / (2 * 3)
        by_unembedding += expected.T @ hidden[head - 1]
    torch.testing.assert_close(model.lm_head.weight.grad, by_unembedding, rtol=1e-5, atol=1e-8)


def test_losses_equal_a_sum_in_plain_python():
    model = make_model(heads=3)
    rows = four_rows()
    batch = collate(rows, ROW, pad_id=0)
    targets = mtp_labels(batch.labels, batch.segment_ids, 3)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))
    expected = []
    with torch.no_grad():
        trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
        for head in range(3):
            logits = model.head_logits(head + 1, trunk).tolist()
            total, count = 0.0, 0
            for b, t in np.ndindex(4, ROW):
                label = int(targets[b, t, head])
                if label != IGNORE:
                    top = max(logits[b][t])
                    log_sum = top + math.log(math.fsum(math.exp(logit - top) for logit in logits[b][t]))
                    total += float(weights[b, t, head]) * (log_sum - logits[b][t][label])
                    count += 1
            expected.append(total / count)
    assert backward(model, rows, weights).tolist() == pytest.approx(expected, rel=1e-5)


def test_unweighted_losses_do_not_know_the_weights():
    model, batch = make_model(heads=3), collate(four_rows(), ROW, pad_id=0)
    targets = mtp_labels(batch.labels, batch.segment_ids, 3)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))
    losses = head_losses_backward(
        model, batch, targets, lambda head: weights[..., head.number - 1], counts_of(targets), "fp32"
    )
    torch.testing.assert_close(losses[1], backward(model, four_rows()))
    torch.testing.assert_close(losses[0], backward(model, four_rows(), weights))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_asked_for_head_by_head_with_what_the_head_made(precision):
    model, batch = make_model(heads=3), collate(four_rows(), ROW, pad_id=0)
    targets = mtp_labels(batch.labels, batch.segment_ids, 3)
    seen = []

    def weigh(head):
        seen.append(head.number)
        assert head.batch is batch
        assert head.targets.equal(targets[..., head.number - 1])
        assert not any((head.losses.requires_grad, torch.is_grad_enabled()))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
            logits = model.head_logits(head.number, trunk).float()
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), head.targets.flatten(), reduction="none")
        torch.testing.assert_close(head.losses.flatten(), expected)
        assert (head.losses @ head.losses.T).dtype == torch.float32  # no autocast here
        return torch.ones_like(head.losses)

    head_losses_backward(model, batch, targets, weigh, counts_of(targets), precision)
    assert seen == [1, 2, 3]


# --- gradients


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("uniform", torch.float64),
        ("random", torch.float64),
        ("random", torch.float32),
        ("sparse", torch.float64),
    ],
)
def test_gradients_equal_those_of_the_formula_written_down_whole(kind, heads, tied, dtype):
    batch = collate(four_rows(), ROW, pad_id=0)
    labelled = mtp_labels(batch.labels, batch.segment_ids, heads) != IGNORE
    random = torch.rand(labelled.shape, generator=torch.Generator().manual_seed(3)) * 3
    weights = {
        "uniform": labelled.float(),
        "random": random,  # also where there is no label: must not matter
        "sparse": random * (random > 2),
    }[kind]
    one, other = make_model(heads, tied, dtype), make_model(heads, tied, dtype)
    expected_losses = stacked(other, batch, weights)
    losses = backward(one, four_rows(), weights)
    torch.testing.assert_close(losses, expected_losses.float(), rtol=1e-5, atol=1e-6)
    expected = gradients(other)
    rtol, scale = (1e-5, 1e-6) if dtype == torch.float64 else (1e-3, 1e-5)
    for name, gradient in gradients(one).items():
        assert gradient.dtype == dtype
        atol = scale * float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert float(gradient.abs().max()) > 0


def test_zero_weights_give_zero_gradients():
    model = make_model(2)
    assert backward(model, four_rows(), torch.zeros(4, ROW, 2)).tolist() == [0.0, 0.0]
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_micro_batches_add_up_to_one_large_batch(tied):
    rows, heads = four_rows(), 3
    batch = collate(rows, ROW, pad_id=0)
    counts = counts_of(mtp_labels(batch.labels, batch.segment_ids, heads))
    large, small = make_model(heads, tied, torch.float64), make_model(heads, tied, torch.float64)
    expected = backward(large, rows)
    losses = sum(backward(small, [row], counts=counts) for row in rows)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    whole = gradients(large)
    for name, gradient in gradients(small).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-6 * float(whole[name].abs().max()))


def test_gradient_is_added_to_what_is_there():
    model = make_model(2)
    backward(model, four_rows())
    once = gradients(model)
    backward(model, four_rows())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_head_without_any_label_contributes_nothing(precision):
    """Three tokens give heads 3 and 4 nothing to predict."""
    model = make_model(4)
    losses = backward(model, [[sample(3, 1)], [sample(2, 1), sample(3, 2)]], precision=precision)
    assert losses[2:].tolist() == [0.0, 0.0]
    assert (losses[:2] > 0).all()
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for head, idle in enumerate([False, True, True]):
        # position 0 sees itself alone, so that no gradient reaches its query and key: look at the others
        own = [name for name in found if name.startswith(f"extra_heads.{head}.")]
        assert all(bool((found[name] == 0).all()) == idle for name in own if not re.search("[qk]_proj", name))


def test_batch_without_any_label_has_no_gradient():
    model = make_model(2)
    assert backward(model, [[sample(4, 4)]]).tolist() == [0.0, 0.0]
    assert all((gradient == 0).all() for gradient in gradients(model).values())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bf16_is_close_and_leaves_weights_and_gradients_in_fp32(tied):
    exact, rough = make_model(4, tied), make_model(4, tied)
    expected, losses = backward(exact, four_rows()), backward(rough, four_rows(), precision="bf16")
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, expected)  # bf16 was really used
    torch.testing.assert_close(losses, expected, rtol=0.03, atol=0)
    whole = gradients(exact)
    for name, gradient in gradients(rough).items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), whole[name].flatten(), dim=0) > 0.98, name
        assert float(gradient.norm() / whole[name].norm()) == pytest.approx(1, abs=0.1), name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bf16_is_as_close_to_the_truth_as_the_formula_written_down_whole_in_bf16(tied):
    batch = collate(four_rows(), ROW, pad_id=0)
    weights = torch.rand(4, ROW, 4, generator=torch.Generator().manual_seed(3)) * 3
    exact, naive, one = (make_model(4, tied) for _ in range(3))
    stacked(exact, batch, weights)
    with autocast(torch.device("cpu"), "bf16"):
        stacked(naive, batch, weights)
    backward(one, four_rows(), weights, precision="bf16")
    truth, theirs = gradients(exact), gradients(naive)
    for name, gradient in gradients(one).items():
        assert (gradient - truth[name]).norm() < 1.3 * (theirs[name] - truth[name]).norm(), name
        assert (gradient - theirs[name]).norm() < 0.03 * theirs[name].norm(), name


@pytest.mark.usefixtures("one_thread")
def test_backward_passes_are_deterministic_where_the_training_is():
    seen = []
    model = make_model(2)
    for parameter in (model.model.norm.weight, next(model.model.layers[0].parameters())):
        parameter.register_hook(lambda _: seen.append(torch.get_deterministic_debug_mode()))
    backward(model, four_rows())
    assert set(seen) == {0}
    seen.clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        backward(model, four_rows())
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(seen) == {2}  # raises instead of warning


def test_logits_never_exist_as_a_whole():
    """Twice as many tokens as are looked at together."""
    model = make_model(2)
    rows = [[sample(40, 0, start)] for start in range(2 * CHUNK // 39 + 1)]
    batch = collate(rows, 40, pad_id=0)
    targets = mtp_labels(batch.labels, batch.segment_ids, 2)
    with Logits() as logits:
        head_losses_backward(model, batch, targets, lambda head: head.losses, counts_of(targets), "fp32")
    assert max(logits.tokens) == CHUNK
    assert len(rows) * 39 > 2 * CHUNK


class Logits(TorchDispatchMode):
    """How many rows as long as the vocabulary each operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.tokens += [leaf.numel() // VOCABULARY for leaf in made if leaf.shape[-1:] == (VOCABULARY,)]
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_activations_change_no_bit(precision):
    one, other, calls = make_model(3), make_model(3), []
    checkpoint_activations(other)
    other.train()
    for layer in (other.model.layers[0], other.extra_heads[1]):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert backward(one, four_rows(), precision=precision).equal(backward(other, four_rows(), precision=precision))
    expected = gradients(one)
    assert all(gradient.equal(expected[name]) for name, gradient in gradients(other).items())
    assert len(calls) == 4  # each of the two ran again


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("rho1_weighted", ()),
        ("rho1_tokenskip", ("rho1.share=0.4",)),
        ("gradient", ("gradient.of=logits",)),
        ("gradient", ("gradient.of=hidden",)),
        ("grpo", ("grpo.kl=0.5",)),
    ],
)
def test_families_that_look_at_losses_train_by_weights_from_whole_logits(family, overrides, tied):
    batch = collate(four_rows(), ROW, pad_id=0)
    generator = torch.Generator().manual_seed(7)
    names = ("reference_loss", "advantage")
    columns = {name: torch.rand(batch.labels.shape, generator=generator) * 5 for name in names}
    batch = dataclasses.replace(batch, columns=columns)
    chosen = ("weighting.reference=/m", "data.solutions=all", *(f"weighting.{text}" for text in overrides))
    weighting = load(overrides=[f"weighting.family={family}", *chosen], environ={}).weighting
    one, other = make_model(2, tied, torch.float64), make_model(2, tied, torch.float64)
    targets = mtp_labels(batch.labels, batch.segment_ids, 2)

    [weigh] = Weighter(weighting, 1).begin(0, [batch], [targets])
    found = head_losses_backward(one, batch, targets, weigh, counts_of(targets), "fp32")

    [weigh] = Weighter(weighting, 1).begin(0, [batch], [targets])
    weights = torch.stack([weigh(look_at_whole_logits(other, batch, targets, number)) for number in (1, 2)], -1)
    assert float(weights[targets != IGNORE].std()) > 0.001
    torch.testing.assert_close(found[0], stacked(other, batch, weights).float(), rtol=1e-5, atol=1e-6)
    expected = gradients(other)
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].abs().max()))


def look_at_whole_logits(model: MTPForCausalLM, batch: Batch, targets: torch.Tensor, number: int) -> Head:
    targets = targets[..., number - 1]
    with torch.no_grad():
        trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
        logits = model.head_logits(number, trunk)
    labels = torch.nn.functional.one_hot(targets.clamp(min=0), VOCABULARY)
    by_logits = (logits.softmax(-1) - labels) * (targets != IGNORE)[..., None]
    tokens = TokenLosses(
        -(logits.log_softmax(-1) * labels * (targets != IGNORE)[..., None]).sum(-1),
        by_logits.norm(dim=-1),
        (by_logits @ model.lm_head.weight.detach()).norm(dim=-1),
    )
    return Head(number, batch, targets, lambda: tokens)


def test_smoothing_and_z_loss_are_trained_on_and_not_told_of():
    one, other = make_model(2), make_model(2)
    batch = collate(four_rows(), ROW, pad_id=0)
    targets = mtp_labels(batch.labels, batch.segment_ids, 2)
    plain = backward(one, four_rows())
    losses = head_losses_backward(
        other, batch, targets, lambda head: (head.targets >= 0).float(), counts_of(targets), "fp32", LossForm(0.1, 0.01)
    )
    assert (losses[0] > plain).all()
    torch.testing.assert_close(losses[1], plain)
    assert not gradients(one)["lm_head.weight"].allclose(gradients(other)["lm_head.weight"], rtol=0.01)


def test_trunk_runs_once():
    model = make_model(4)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    backward(model, four_rows())
    handle.remove()
    assert len(calls) == 1
