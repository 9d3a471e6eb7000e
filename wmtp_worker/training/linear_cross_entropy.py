"""Cross-entropy of the outputs of a linear layer, a chunk of tokens at a time: logits never exist as a whole.

    p = softmax(z), z = W·h        y: the label        V: the vocabulary's size        Z = Σ_v exp(z_v)
    cross-entropy    CE = -log p_y
    objective        (1 - ε)·CE - ε/V · Σ_v log p_v + ζ·log²Z
    its gradient     ∂/∂z = g = (1 + 2ζ·log Z)·p - (1 - ε)·1_y - ε/V,   ∂/∂h = Wᵀg,   ∂/∂W = Σ_t w_t · g_t·h_tᵀ

ε: label smoothing, Szegedy et al. (2016), "Rethinking the Inception Architecture for Computer Vision". ζ: z-loss,
Chowdhery et al. (2022), "PaLM". A token's weight w_t goes for all of its objective. A chunk's logits become their own
gradient in place, as in Liger Kernel (Hsu et al., 2024) and Cut Cross-Entropy (Wijmans et al., 2024).

The gradient of a hidden state scales with its token's weight, so it can be made before weights are known. That of W
cannot: where weights follow from the losses, a chunk's logits are made once more, of the tokens that have a weight.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from wmtp_worker.data.packing import IGNORE

# tokens: enough for efficient products; more only cost memory (benchmarks/step.py chunk)
CHUNK = 512
# elements that a core's cache holds: on a CPU a pass over memory costs as much as what is computed in it
_CACHED = 1 << 18


@dataclass(frozen=True)
class LossForm:
    """ε and ζ of the objective."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = LossForm()


@dataclass(frozen=True)
class TokenLosses:
    """What tokens cost, without gradient: float32 (float64 from float64), shaped as the targets; 0 at ignored ones.

    `cross_entropy`, in nats; `logit_gradient_norm`, `hidden_gradient_norm`: ‖∂/∂z‖₂ and ‖∂/∂h‖₂ of the objective.
    """

    cross_entropy: torch.Tensor
    logit_gradient_norm: torch.Tensor
    hidden_gradient_norm: torch.Tensor


@dataclass(frozen=True)
class TokenResults:
    """How tokens are predicted, shaped as the targets. `cross_entropy`: as in `TokenLosses`; `right`: bool, whether the
    likeliest token is the label (the first one of equally likely ones); False at ignored tokens.
    """

    cross_entropy: torch.Tensor
    right: torch.Tensor


# works on some rows of logits, in place: logits, labels, where to write what was found
_Work = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class _Seen:
    """What a pass over the labelled tokens found. `losses`: CE, objective, ‖g‖, [3, tokens]; `gradient`: Wᵀg, [tokens,
    hidden_size].
    """

    losses: torch.Tensor
    gradient: torch.Tensor


class LinearCrossEntropy:
    """The loss of one set of hidden states; only labelled tokens are looked at.

    `tokens` says what they cost before their weights are known. `weighted_sum` is what is differentiated: one pass over
    the tokens, or after `tokens` a second one, for the gradient of the unembedding alone. `results` is for models that
    are only looked at.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        unembedding: torch.Tensor,
        targets: torch.Tensor,
        form: LossForm = PLAIN,
        chunk: int = CHUNK,
    ) -> None:
        """`hidden`: [..., hidden_size]; `unembedding`: [vocabulary, hidden_size]; `targets`: int64 [...], -100 ignored.

        They are multiplied in `hidden`'s type or, like those of any linear layer, in autocast's where that is on;
        everything else is at least float32.
        """
        self._hidden, self._unembedding, self._targets = hidden, unembedding, targets
        self._form, self._chunk = form, chunk
        device = hidden.device.type
        operand = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        self._exact = torch.promote_types(hidden.dtype, torch.float32)
        self._labelled = (targets.flatten() != IGNORE).nonzero()[:, 0]
        self._labels = targets.flatten()[self._labelled, None]
        self._states = hidden.detach().flatten(0, -2)[self._labelled].to(operand)
        self._matrix = unembedding.detach().to(operand)
        self._seen: _Seen | None = None

    def tokens(self) -> TokenLosses:
        """What each token costs."""
        if self._seen is None:
            with torch.no_grad(), _no_autocast(self._states):
                self._seen = self._pass(norms=True)
        cross_entropy, _, norm = self._seen.losses
        hidden_norm = torch.linalg.vector_norm(self._seen.gradient, dim=-1)
        return TokenLosses(*(self._spread(one).view_as(self._targets) for one in (cross_entropy, norm, hidden_norm)))

    @torch.no_grad()
    def results(self) -> TokenResults:
        """How each token is predicted: the logits once, and no gradient."""
        found = self._states.new_zeros(2, len(self._states), dtype=self._exact)
        with _no_autocast(self._states):
            for _ in self._chunks(self._states, self._labels, found, self._examine):
                pass
        cross_entropy, right = (self._spread(one).view_as(self._targets) for one in found)
        return TokenResults(cross_entropy, right > 0)

    def weighted_sum(
        self, weights: torch.Tensor, into: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ w·objective, to be differentiated by hidden states and unembedding, and Σ CE, which is not.

        `weights`: shaped as the targets, constants; those of ignored tokens do not matter. `into`: a sum, at least
        float32, to which the unembedding's gradient is added here and now instead of being made anew by the backward
        pass. That must follow, once, without any factor: on a CPU it raises `ValueError` for one.
        """
        chosen = weights.detach().flatten()[self._labelled].to(self._exact)
        inputs = self._hidden, self._unembedding, chosen, self, into
        objective, cross_entropy = _WeightedSum.apply(*inputs)  # type: ignore[no-untyped-call]
        return objective, cross_entropy

    def gradients(self, weights: torch.Tensor, of_unembedding: torch.Tensor | None) -> tuple[_Seen, torch.Tensor]:
        """What the tokens cost, and the gradient of Σ w·objective by the hidden states.

        `weights`: [labelled]. The gradient by the unembedding is added to `of_unembedding`, where there is one.
        """
        seen = self._seen
        if seen is None:
            seen = self._pass(False, weights, of_unembedding)
        elif of_unembedding is not None:
            self._unembedding_pass(weights, of_unembedding)
        gradient = self._spread(seen.gradient * weights[:, None]).view_as(self._hidden)
        return seen, gradient.to(self._hidden.dtype)

    def new_sum(self) -> torch.Tensor:
        """Zeros to sum the unembedding's gradient up in."""
        return torch.zeros_like(self._matrix, dtype=self._exact)

    def _pass(
        self, norms: bool, weights: torch.Tensor | None = None, matrix_gradient: torch.Tensor | None = None
    ) -> _Seen:
        """Look at every token; add to the unembedding's gradient, where there is one."""
        losses = self._states.new_zeros(3, len(self._states), dtype=self._exact)
        gradient = torch.empty_like(self._states, dtype=self._exact)
        for part, g in self._logit_gradients(self._states, self._labels, losses, norms):
            gradient[part] = g @ self._matrix
            if weights is not None and matrix_gradient is not None:
                _add_outer(matrix_gradient, g, self._states[part] * weights[part, None])
        return _Seen(losses, gradient)

    def _unembedding_pass(self, weights: torch.Tensor, matrix_gradient: torch.Tensor) -> None:
        """Add to the unembedding's gradient, of tokens that were looked at before."""
        kept = weights.nonzero()[:, 0]
        states, labels, weights = self._states[kept], self._labels[kept], weights[kept, None]
        losses = states.new_empty(3, len(kept), dtype=self._exact)
        for part, g in self._logit_gradients(states, labels, losses, norms=False):
            _add_outer(matrix_gradient, g, states[part] * weights[part])

    def _logit_gradients(
        self, states: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, norms: bool
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """g of one chunk after the other, [chunk, vocabulary]. Fills `losses` as `_Seen` has them."""
        return self._chunks(states, labels, losses, partial(self._differentiate, norms=norms))

    def _chunks(
        self, states: torch.Tensor, labels: torch.Tensor, found: torch.Tensor, work: _Work
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """What `work` makes of the logits of one chunk after the other, [chunk, vocabulary], in one buffer. `found`:
        [numbers, tokens], for `work` to fill.
        """
        buffer = states.new_empty(min(self._chunk, len(states)), len(self._matrix))
        rows = _rows_at_once(buffer)
        for start in range(0, len(states), self._chunk):
            part = slice(start, start + self._chunk)
            logits = torch.mm(states[part], self._matrix.T, out=buffer[: len(states[part])])
            for block in zip(logits.split(rows), labels[part].split(rows), found[:, part].split(rows, 1), strict=True):
                work(*block)
            yield part, logits

    def _examine(self, logits: torch.Tensor, labels: torch.Tensor, found: torch.Tensor) -> None:
        """Write the cross-entropies of some rows, and whether they are right, into `found`; the logits are used up."""
        z = logits.to(self._exact)
        found[1] = z.argmax(-1) == labels[:, 0]
        torch.log_softmax(z, -1, out=z)
        found[0] = -z.gather(1, labels)[:, 0]

    def _differentiate(self, logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, norms: bool) -> None:
        """Turn logits into g, in place; write their CE, objective and, if wanted, ‖g‖ into `losses`."""
        z = logits.to(self._exact)  # itself, or a copy of a few rows
        smoothing, z_loss = self._form.label_smoothing, self._form.z_loss
        picked = z.gather(1, labels)
        torch.log_softmax(z, -1, out=z)
        cross_entropy = -z.gather(1, labels)
        objective = cross_entropy
        if smoothing:
            objective = (1 - smoothing) * cross_entropy - smoothing * z.mean(-1, keepdim=True)
        p = z.exp_()
        if z_loss:
            log_z = picked + cross_entropy
            objective = objective + z_loss * log_z.square()
            p.mul_(1 + 2 * z_loss * log_z)
        # exact where p_y is nearly 1, whatever the logits' type
        p.scatter_(1, labels, p.gather(1, labels) - (1 - smoothing))
        if smoothing:
            p.sub_(smoothing / p.shape[-1])
        losses[0], losses[1] = cross_entropy[:, 0], objective[:, 0]
        if norms:
            losses[2] = torch.linalg.vector_norm(p, dim=-1)
        if p.dtype != logits.dtype:
            logits.copy_(p)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """What labelled tokens have, as rows of all tokens: 0 for the others."""
        rows = values.new_zeros(self._targets.numel(), *values.shape[1:])
        return rows.index_copy_(0, self._labelled, values)


class _WeightedSum(torch.autograd.Function):
    """`LinearCrossEntropy.weighted_sum`: the gradients are made in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        unembedding: torch.Tensor,
        weights: torch.Tensor,
        loss: LinearCrossEntropy,
        into: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trained = ctx.needs_input_grad[1]
        total = (loss.new_sum() if into is None else into) if trained else None
        with _no_autocast(hidden):
            seen, gradient = loss.gradients(weights, total)
        ctx.save_for_backward(gradient, total if into is None else None)
        ctx.once, ctx.dtype = into is not None, unembedding.dtype
        cross_entropy, objective, _ = seen.losses
        plain = cross_entropy.sum()
        ctx.mark_non_differentiable(plain)
        return (objective * weights).sum(), plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, unembedding = ctx.saved_tensors
        # asking a GPU would wait for it
        if ctx.once and factor.device.type == "cpu" and factor != 1:
            raise ValueError(f"the unembedding's gradient is summed up already: it cannot be multiplied by {factor}")
        if unembedding is not None:
            unembedding = (unembedding * factor).to(ctx.dtype)
        return (hidden * factor).to(hidden.dtype), unembedding, None, None, None


def _add_outer(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += leftᵀ·right`: in the type of `left` the products of one chunk, in the type of `total` their sum."""
    right = right.to(left.dtype)
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    product = left.T @ right
    rows = _rows_at_once(product)
    for some, more in zip(total.split(rows), product.split(rows), strict=True):
        some += more.to(some.dtype)  # four times as fast as leaving the conversion to the addition


def _rows_at_once(matrix: torch.Tensor) -> int:
    """On a CPU as many as a core's cache holds, elsewhere all."""
    return max(1, _CACHED // matrix.shape[1]) if matrix.device.type == "cpu" else max(1, len(matrix))


def _no_autocast(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
