"""Validation against a count token by token in double precision."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from tests.planning.live import Live
from wmtp_worker.data.packing import Batch, collate
from wmtp_worker.data.tokenizer import Sample
from wmtp_worker.errors import Interrupted
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.training.group import Group
from wmtp_worker.training.validation import validate

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
HEADS = 3


def make_model(**changes: object) -> MTPForCausalLM:
    torch.manual_seed(4)
    shape = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "n_future_tokens": HEADS,
    }
    return MTPForCausalLM(LlamaConfig(**(shape | changes)))


def sample(ids: list[int], prompt_length: int) -> Sample:
    return Sample(np.asarray(ids, dtype=np.int32), prompt_length)


# repeated tokens: an untrained model with tied embeddings tends to say its input again, so some of them it gets right
ROWS = [
    [sample([3, 3, 3, 3, 5, 5, 5, 2], 2), sample([7, 7, 1, 2], 1)],
    [sample([9, 9, 9, 9, 9, 9, 2], 3)],
    [sample([4, 11, 4, 4, 2], 1), sample([6, 2], 1), sample([8, 8, 8], 3)],
]


def batches(rows_each: int = 2) -> list[Batch]:
    return [collate(ROWS[start : start + rows_each], 14, pad_id=0) for start in range(0, len(ROWS), rows_each)]


def run(model: MTPForCausalLM, data: list[Batch], precision: str = "fp32"):
    return validate(model, data, Group(CPU), precision, lambda: None)


def slowly(model: MTPForCausalLM) -> tuple[list[float], list[float], list[int]]:
    """Each sample alone, each position alone: mean loss, accuracy and number of labels per head."""
    model = model.double().eval()
    losses: list[list[float]] = [[] for _ in range(HEADS)]
    right: list[list[bool]] = [[] for _ in range(HEADS)]
    for one in (one for row in ROWS for one in row):
        ids = one.ids.tolist()
        causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
        with torch.no_grad():
            trunk = model.trunk(torch.tensor([ids]), torch.arange(len(ids))[None], causal)
            for k in range(1, HEADS + 1):
                probabilities = model.head_logits(k, trunk)[0].softmax(-1).tolist()
                for t in range(len(ids) - k):
                    if t + k >= one.prompt_length:
                        losses[k - 1].append(-math.log(probabilities[t][ids[t + k]]))
                        right[k - 1].append(max(range(16), key=probabilities[t].__getitem__) == ids[t + k])
    mean = [math.fsum(values) / len(values) for values in losses]
    return mean, [sum(hits) / len(hits) for hits in right], [len(values) for values in losses]


@pytest.mark.parametrize("rows_each", [1, 2, 3])
def test_numbers_equal_a_slow_count(rows_each):
    result = run(make_model(), batches(rows_each))
    loss, accuracy, labels = slowly(make_model())
    # by hand: responses of 6, 3, 4, 4 and 1 tokens, none in the last sample, which is prompt alone
    assert labels[0] == 6 + 3 + 4 + 4 + 1
    assert result.tokens == 18
    assert result.head_loss == pytest.approx(loss, rel=1e-5)
    assert result.head_accuracy == pytest.approx(accuracy, abs=1e-12)
    assert 0 < result.head_accuracy[0] < 1
    assert result.loss == pytest.approx(sum(loss) / 3, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss[0]), rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_never_exist_as_a_whole(precision):
    model = make_model(vocab_size=40_000, hidden_size=8, num_attention_heads=1, num_key_value_heads=1)
    model.config.max_position_embeddings = 1200
    [batch] = [collate([[sample([1 + number % 9 for number in range(1100)], 1)]], 1100, pad_id=0)]
    with Live(*model.parameters()) as live:
        run(model, [batch], precision)
    # 512 tokens at once, of 1,100
    logits = (2 if precision == "bf16" else 4) * 40_000
    assert 512 * logits < live.peak < 1.2 * 512 * logits


def test_model_that_knows_nothing_by_hand():
    """A zero unembedding: every token costs ln 16, and the most likely token is the first, number 0."""
    model = make_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    result = run(model, [collate([[sample([1, 0, 0, 5, 0], 1)]], 8, pad_id=0)])
    assert result.head_loss == pytest.approx([math.log(16)] * 3)
    assert result.perplexity == pytest.approx(16)
    # labels 0 0 5 0, and for the further heads 0 5 0 and 5 0
    assert result.head_accuracy == pytest.approx([3 / 4, 2 / 3, 1 / 2])
    assert result.tokens == 4


def test_head_without_labels_is_zero_not_nan():
    result = run(make_model(), [collate([[sample([1, 2, 3], 1)]], 8, pad_id=0)])
    assert result.head_loss[2] == 0
    assert result.head_accuracy[2] == 0
    assert math.isfinite(result.loss)


def test_hopeless_loss_still_has_a_finite_perplexity():
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1e4)
    result = run(model, batches())
    assert result.head_loss[0] > 1000
    assert math.isfinite(result.perplexity)


def test_bf16_is_close():
    exact, rough = run(make_model(), batches()), run(make_model(), batches(), "bf16")
    assert rough.head_loss != exact.head_loss
    assert rough.head_loss == pytest.approx(exact.head_loss, rel=0.03)


def test_nothing_of_the_model_changes():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first = run(model, batches())
    assert run(model, batches()) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_validating_and_on_again_after():
    model = make_model(attention_dropout=0.5).train()
    assert run(model, batches()).head_loss == run(make_model(), batches()).head_loss
    assert model.training
    assert all(module.training for module in model.modules())


def test_between_is_called_before_each_batch():
    events: list[str] = []

    def told() -> Iterator[Batch]:
        for number, batch in enumerate(batches(1)):
            events.append(f"batch {number}")
            yield batch

    model = make_model()
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: events.append("forward"))
    validate(model, told(), Group(CPU), "fp32", lambda: events.append("between"))
    handle.remove()
    assert events == [word for number in range(3) for word in (f"batch {number}", "between", "forward")]


def test_stop_between_batches_leaves_a_model_that_trains():
    model = make_model().train()
    seen = []

    def stop_at_the_second() -> None:
        assert not model.training or not seen
        seen.append(1)
        if len(seen) == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        validate(model, batches(1), Group(CPU), "fp32", stop_at_the_second)
    assert len(seen) == 2
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_json_is_plain():
    result = run(make_model(), batches())
    assert result.to_json() == {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "head_loss": result.head_loss,
        "head_accuracy": result.head_accuracy,
        "tokens": result.tokens,
    }
