"""The weighted multi-token prediction loss, one head at a time.

    L = 1/n · Σ_k 1/N_k · Σ_t w[t,k] · CE(logits_k[t], token[t+k])          k = 1…n

with N_k the number of labelled positions of head k in the whole optimizer step: the weighted form of eq. 2 in
Gloeckle et al. (2024), averaged over heads so that it reads as nats per token. The trunk runs once; each head runs
forward and backward and is freed before the next (their section "Memory-efficient implementation"), its logits a chunk
of tokens at a time (`linear_cross_entropy`); then the trunk runs backward once with the sum of the heads' gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wmtp_worker.data.packing import IGNORE, Batch
from wmtp_worker.host.device import deterministic_backward
from wmtp_worker.model.mtp import MTPForCausalLM, TrunkOutput, packed_attention_mask
from wmtp_worker.training.linear_cross_entropy import PLAIN, LinearCrossEntropy, LossForm, TokenLosses


def mtp_labels(labels: torch.Tensor, segment_ids: torch.Tensor, heads: int) -> torch.Tensor:
    """What each head should predict: `out[b, t, k-1] = labels[b, t+k]`, within the segment of position t.

    `labels`, `segment_ids`: int64 [batch, time]. Returns int64 [batch, time, heads], -100 where there is no label:
    past the end of the segment or of the row, in prompts and in padding.
    """
    targets = torch.full((*labels.shape, heads), IGNORE, dtype=labels.dtype, device=labels.device)
    for ahead in range(1, heads + 1):
        same = segment_ids[:, :-ahead] == segment_ids[:, ahead:]
        targets[:, :-ahead, ahead - 1] = labels[:, ahead:].where(same, IGNORE)
    return targets


@dataclass(frozen=True)
class Head:
    """What one head made of one micro-batch, without gradient: what its weights may be computed from.

    `number`: 1…n. `targets`: int64 [batch, time]. `look`: what its tokens cost; asking for it, as the properties do,
    costs a second pass over the logits, so weights that do not depend on it should not.
    """

    number: int
    batch: Batch
    targets: torch.Tensor
    look: Callable[[], TokenLosses]

    @property
    def losses(self) -> torch.Tensor:
        """Cross-entropies in nats, float32 [batch, time]."""
        return self.look().cross_entropy


# a head's weights: float32 [batch, time]
Weigh = Callable[[Head], torch.Tensor]
# reads the trunk before the heads do: may add to the gradient of `hidden`; returns the batch with what it knows of it
Beside = Callable[[TrunkOutput, Batch], Batch]


def head_losses_backward(
    model: MTPForCausalLM,
    batch: Batch,
    targets: torch.Tensor,
    weigh: Weigh,
    counts: torch.Tensor,
    precision: str,
    form: LossForm = PLAIN,
    beside: Beside | None = None,
) -> torch.Tensor:
    """Add the gradient of L on this micro-batch to the parameters' `.grad`.

    `targets`: int64 [batch, time, heads]; `weigh` is asked for each head's weights, the heads in order,
    of the batch as `beside` returned it; `counts`: N_k
    over the whole optimizer step, float32 [heads]. Returns this micro-batch's share of each head's loss, weighted in
    row 0 and, the plain cross-entropy, unweighted in row 1, float32 [2, heads], detached: summed over the
    micro-batches they are the heads' losses, and the mean of row 0 is L.
    """
    heads = model.heads
    losses = torch.zeros(2, heads, device=targets.device)
    with autocast(targets.device, precision):
        trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
        leaf = trunk.detached()
        if beside is not None:
            batch = beside(leaf, batch)
        for number in range(1, heads + 1):
            scale = 1 / (counts[number - 1] * heads)
            weighted, plain = _head_loss(model, number, leaf, batch, targets[..., number - 1], weigh, scale, form)
            with deterministic_backward():
                weighted.backward()
            losses[0, number - 1] = weighted.detach() * heads
            losses[1, number - 1] = plain / counts[number - 1]
            del weighted  # and what it was made from, before the next head
    if trunk.hidden.requires_grad:  # not where only heads are trained
        with deterministic_backward():
            trunk.hidden.backward(leaf.hidden.grad)
    return losses


def _head_loss(
    model: MTPForCausalLM,
    number: int,
    leaf: TrunkOutput,
    batch: Batch,
    targets: torch.Tensor,
    weigh: Weigh,
    scale: torch.Tensor,
    form: LossForm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One head's loss, summed over its tokens: weighted, scaled and to be differentiated; plain."""
    unembedding = model.lm_head.weight
    if unembedding.requires_grad and unembedding.grad is None:
        unembedding.grad = torch.zeros_like(unembedding)
    loss = LinearCrossEntropy(model.head_hidden(number, leaf), unembedding, targets, form)
    # weights are computed in fp32, whatever the model is
    with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
        weights = weigh(Head(number, batch, targets, loss.tokens))
    return loss.weighted_sum(weights * scale, into=unembedding.grad)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast where `precision` asks for it, else nothing. Weights and gradients stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
