"""Rho-1 weighted: a token counts by how much the policy could still learn about it from the reference model's view.

    excess loss  e[t,k] = CE_policy,k(token t+k) - CE_reference(token t+k)      Lin et al. (2024), Rho-1, §2.2
    weight       w[t,k] = N · softmax_t(max(e[t,k], minimum) / τ)               over the N labelled positions t of the
                                                                                sequence, for each head k apart

Rho-1 itself selects (`rho1_tokenskip`); the softmax is its graded form. τ → ∞ is uniform, τ → 0 the single token with
the largest excess. The minimum keeps tokens that the policy knows better than the reference from being told apart.
"""

import torch

from wmtp_worker.weighting.spans import sequence_counts, sequence_softmax


def excess_loss(losses: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Policy's minus reference's cross-entropy of the same tokens: float32 [batch, time, heads], without gradient.

    `losses`, `reference`: [batch, time, heads], nats; entry (t, k-1) is about token t + k in both, so the reference's
    comes from its logits at t + k - 1.
    """
    return losses.detach().float() - reference.detach().float()


def weights(
    excess: torch.Tensor,
    labelled: torch.Tensor,
    sequence: torch.Tensor,
    temperature: float,
    minimum: float = -torch.inf,
) -> torch.Tensor:
    """`N · softmax(max(e, minimum) / τ)` inside each sequence.

    `excess`: [batch, time, heads], nats; `labelled`: bool, same shape; `sequence`: int64 [batch, time] from
    `spans.sequences`. Returns float32 [batch, time, heads] with mean 1 over each sequence, without gradient.
    """
    scores = excess.detach().float().clamp(min=minimum) / temperature
    return sequence_softmax(scores, labelled, sequence) * sequence_counts(labelled, sequence)
