"""GRPO weights: a token counts by how much better its solution is than the others for the same problem.

    advantage    A_i = (r_i - mean(r of the group)) / (std(r of the group) + ε)   DeepSeekMath, Shao et al. (2024), §4.1
    with KL      A_ij = A_i - κ·KL_ij of head 1,  KL_ij = exp(d) - d - 1, d = log π_ref - log π  (their eq. 4, k3)
    weight       w[t,k] = clip(exp(clip(A_{t+k}, ±c) / β), low, high)                     as `critic.weights`

KL compares next-token distributions: further heads, which lack k-1 tokens that the reference sees, have none.
Off-policy and without negative weights: bad solutions are learned from less, not unlearned. ε as in TRL.
"""

import torch

_EPSILON = 1e-4


def group_advantages(rewards: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Each reward relative to its group.

    `rewards`: [solutions]; `groups`: int64 [solutions], the problem of each, numbered from 0. Returns float32
    [solutions]; a group of one, or of equal rewards, has advantage 0.
    """
    rewards = rewards.detach().double()
    shape = (int(groups.max()) + 1,)
    counts = rewards.new_zeros(shape).index_add(0, groups, torch.ones_like(rewards)).clamp(min=1)
    mean = rewards.new_zeros(shape).index_add(0, groups, rewards) / counts
    centred = rewards - mean[groups]
    std = (rewards.new_zeros(shape).index_add(0, groups, centred.square()) / counts).sqrt()
    return (centred / (std[groups] + _EPSILON)).float()


def kl_penalty(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(π ‖ π_ref) for each token: float32, not negative, without gradient.

    `policy`, `reference`: cross-entropies in nats (minus log-probabilities), same shape.
    """
    difference = (policy.detach().float() - reference.detach().float()).clamp(-30, 30)
    return difference.exp() - difference - 1
