"""Stage 3's numbers: validation loss, perplexity, per-head accuracy."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.model.mtp import MTPForCausalLM, packed_attention_mask
from wmtp_worker.training.group import Group
from wmtp_worker.training.linear_cross_entropy import LinearCrossEntropy
from wmtp_worker.training.loss import autocast, mtp_labels


@dataclass(frozen=True)
class Validation:
    """Means over every labelled token of the validation set, in nats.

    `loss`: mean over the heads. `perplexity`: exp of head 1's loss, the ordinary next-token perplexity.
    `head_accuracy`: share of tokens whose most likely prediction is right, per head.
    """

    loss: float
    perplexity: float
    head_loss: list[float]
    head_accuracy: list[float]
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        accuracy = " ".join(f"{share:.1%}" for share in self.head_accuracy)
        return f"loss {self.loss:.4f}  perplexity of head 1 {self.perplexity:.2f}  accuracy by head {accuracy}"


@torch.no_grad()
def validate(
    model: MTPForCausalLM,
    batches: Iterable[Batch],
    group: Group,
    precision: str,
    between: Callable[[], None],
) -> Validation:
    """Run every batch through every head; `between` is called before each batch and may raise to stop.

    With several ranks each takes one of as many batches, and `between` is called before these.
    """
    heads = model.heads
    # double on the host: MPS has no float64
    sums = torch.zeros(3, heads, dtype=torch.float64)
    loss_sums, correct, counts = sums
    model.eval()  # type: ignore[no-untyped-call]
    try:
        for some in _rounds(batches, group.world):
            between()
            # a rank without a batch of its own helps the others to gather the layers
            counted = group.rank < len(some)
            batch = some[group.rank if counted else 0].to(group.device)
            targets = mtp_labels(batch.labels, batch.segment_ids, heads)
            with autocast(group.device, precision):
                trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
                for head in range(heads):
                    hidden = model.head_hidden(head + 1, trunk)
                    if not counted:
                        continue
                    labels = targets[..., head]
                    found = LinearCrossEntropy(hidden, model.lm_head.weight, labels).results()
                    loss_sums[head] += float(found.cross_entropy.sum())
                    correct[head] += float(found.right.sum())
                    counts[head] += float((labels != IGNORE).sum())
    finally:
        model.train()
    loss_sums, correct, counts = group.sum(sums)
    head_loss = (loss_sums / counts.clamp(min=1)).tolist()
    return Validation(
        loss=sum(head_loss) / heads,
        perplexity=math.exp(min(head_loss[0], 700.0)),
        head_loss=head_loss,
        head_accuracy=(correct / counts.clamp(min=1)).tolist(),
        tokens=int(counts[0]),
    )


def _rounds(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    waiting = iter(batches)
    while some := list(islice(waiting, size)):
        yield some
