"""Critic weights: a token counts as much as a value model's expectation rose when it was written.

    TD error     δ_j = r_j + γ·V_j·[j is not the last token] - V_{j-1}      Sutton & Barto (2018), eq. 6.5
    advantage    A_j = Σ_{l≥0} (γλ)^l δ_{j+l}                               GAE: Schulman et al. (2016), eq. 16
    weight       w[t,k] = clip(exp(A_{t+k} / β), low, high)                 AWR: Peng et al. (2019)
    or           w[t,k] = n_t · softmax_k(A_{t+k} / β)                      over the n_t labelled heads at t

V_j is the value after token j was read; r is 0 but for the last token of a sequence, whose reward is the sequence's: a
reward model's score, or 1 and 0 for right and wrong. A is whitened (`statistics`) before it is turned into weights.
"""

import torch

from wmtp_worker.weighting.spans import ahead


def td_errors(
    values: torch.Tensor, rewards: torch.Tensor, segment_ids: torch.Tensor, gamma: float = 1.0
) -> torch.Tensor:
    """δ of each token; 0 for the first one of a sequence, before which there is no value.

    `values`, `rewards`: [batch, time], `rewards` 0 but at the last token of each sequence. `segment_ids`: int64 [batch,
    time]. Returns float32 [batch, time], without gradient.
    """
    values, rewards = values.detach().float(), rewards.detach().float()
    follows = _same_as_next(segment_ids)
    errors = rewards + gamma * values.where(follows, 0)
    out = torch.zeros_like(errors)
    out[:, 1:] = (errors[:, 1:] - values[:, :-1]).where(follows[:, :-1], 0)
    return out


def gae(errors: torch.Tensor, segment_ids: torch.Tensor, gamma: float = 1.0, lam: float = 0.95) -> torch.Tensor:
    """Generalised advantage estimates of each token, from TD errors.

    `errors`: [batch, time]; `segment_ids`: int64 [batch, time]. Returns float32 [batch, time]. The recursion
    A_j = δ_j + c_j·A_{j+1}, c_j = γλ inside a sequence and 0 at its end, is unrolled by doubling: log2(time) passes.
    """
    advantages = errors.detach().float()
    factors = torch.where(_same_as_next(segment_ids), gamma * lam, 0.0)
    reach = 1
    while reach < advantages.shape[1]:
        # of the tokens up to `reach` further, plus of those up to as much again
        later = torch.zeros_like(advantages)
        later[:, :-reach] = advantages[:, reach:]
        advantages = torch.where(factors == 0, advantages, advantages + factors * later)
        beyond = torch.zeros_like(factors)
        beyond[:, :-reach] = factors[:, reach:]
        factors = factors * beyond
        reach *= 2
    return advantages


def lambda_returns(
    values: torch.Tensor, rewards: torch.Tensor, segment_ids: torch.Tensor, gamma: float = 1.0, lam: float = 0.95
) -> torch.Tensor:
    """What V_t should have been, seen from the end of the sequence: float32 [batch, time], without gradient.

    The λ-return G_t = (1-λ) Σ_n λ^(n-1) G_{t:t+n} (Sutton & Barto 2018, eq. 12.2 and 12.3, with the n-step returns of
    eq. 7.1), which is r_{t+1} + γ((1-λ) V_{t+1} + λ G_{t+1}), and r_{t+1} where token t+1 is the last. It equals
    V_t + A_{t+1}. At the last token itself it is the reward: there the outcome is known. Arguments as for `td_errors`;
    with λ = 1 the values cancel out, and the discounted reward is left.
    """
    advantages = gae(td_errors(values, rewards, segment_ids, gamma), segment_ids, gamma, lam)
    later = torch.zeros_like(advantages)
    later[:, :-1] = advantages[:, 1:]
    return torch.where(_same_as_next(segment_ids), values.detach().float() + later, rewards.detach().float())


def weights(advantages: torch.Tensor, labelled: torch.Tensor, beta: float, low: float, high: float) -> torch.Tensor:
    """`clip(exp(A / β), low, high)` of the token that each head predicts.

    `advantages`: [batch, time]; `labelled`: bool [batch, time, heads]; 0 ≤ low ≤ high < ∞. Returns float32 [batch,
    time, heads], without gradient.
    """
    return exponential(ahead(advantages, labelled.shape[-1]), labelled, beta, low, high)


def exponential(advantages: torch.Tensor, labelled: torch.Tensor, beta: float, low: float, high: float) -> torch.Tensor:
    """The same of advantages that each position and head has already: [batch, time, heads]."""
    return (advantages.detach().float() / beta).exp().clamp(low, high).where(labelled, 0)


def head_softmax(advantages: torch.Tensor, labelled: torch.Tensor, beta: float) -> torch.Tensor:
    """`n_t · softmax_k(A_{t+k} / β)`: at each position the heads share what n_t uniform ones would weigh.

    `advantages`: [batch, time]; `labelled`: bool [batch, time, heads]. Returns float32 [batch, time, heads] whose mean
    over the labelled heads of a position is 1, without gradient.
    """
    scores = (ahead(advantages.detach().float(), labelled.shape[-1]) / beta).masked_fill(~labelled, -torch.inf)
    # a position without any label would be NaN
    shares = scores.masked_fill(~labelled.any(-1, keepdim=True), 0).softmax(-1)
    return (shares * labelled.sum(-1, keepdim=True)).where(labelled, 0)


def _same_as_next(segment_ids: torch.Tensor) -> torch.Tensor:
    """bool [batch, time]: whether the next token belongs to the same sequence."""
    same = torch.zeros_like(segment_ids, dtype=torch.bool)
    same[:, :-1] = segment_ids[:, :-1] == segment_ids[:, 1:]
    return same
