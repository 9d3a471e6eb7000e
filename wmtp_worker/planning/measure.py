"""A CPU's speeds, measured in some seconds at the run's own sizes, and the step that follows from them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from wmtp_worker.planning.memory import CACHED, CHUNK, Step
from wmtp_worker.planning.policy import Shape
from wmtp_worker.planning.work import attention_flops, eager_bytes, seen_again, token_flops

Clock = Callable[[], float]
_REPEATS = 5
_SHORTEST = 0.05  # seconds of one measurement


@dataclass(frozen=True)
class Speeds:
    """What this machine does a second, forward and backward together, on torch's threads as they are.

    `products`: FLOP of matrix products. `attention`: FLOP of attention beside its projections, the softmax inside.
    `simple`: bytes read and written by the operations between them, as `eager_bytes` counts. `loss`: logits that
    become their gradient.
    """

    products: float
    attention: float
    simple: float
    loss: float


def measure(
    shape: Shape, step: Step, clock: Clock = time.perf_counter, poll: Callable[[], None] = lambda: None
) -> Speeds:
    """The medians of some measurements at the sizes of the run, because caches decide about all of them.

    `poll` is called between measurements and may raise to stop.
    """
    runs = (_products, _attention, _simple, _loss)
    found = []
    for speed in runs:
        poll()
        found.append(speed(shape, step, clock))
    return Speeds(*found)


def predict(shape: Shape, step: Step, passes: int, speeds: Speeds) -> float:
    """Seconds of a step of `passes` micro-batches on a machine that does one thing after the other."""
    tokens = passes * step.tokens
    attention = attention_flops(shape, step.time)
    logits = shape.heads * shape.vocabulary * (1 + seen_again(shape, step))
    return (
        tokens * (token_flops(shape, step) - attention) / speeds.products
        + tokens * attention / speeds.attention
        + eager_bytes(shape, step, passes) / speeds.simple
        + tokens * logits / speeds.loss
    )


def _products(shape: Shape, step: Step, clock: Clock) -> float:
    """The MLP and the unembedding, forward and for both gradients, in a step's proportion."""
    seconds = flops = 0.0
    for width, times in ((shape.intermediate, 3 * shape.layers), (shape.vocabulary, shape.heads)):
        states, weight, after = (
            torch.randn(size, dtype=_dtype(step))
            for size in ((step.tokens, shape.hidden), (width, shape.hidden), (step.tokens, width))
        )

        def run(
            states: torch.Tensor = states, weight: torch.Tensor = weight, after: torch.Tensor = after
        ) -> tuple[torch.Tensor, ...]:
            return states @ weight.t(), after @ weight, after.t() @ states

        seconds += times * _seconds(run, clock) if times else 0.0
        flops += times * 6.0 * step.tokens * shape.hidden * width
    return flops / seconds


def _attention(shape: Shape, step: Step, clock: Clock) -> float:
    rows = step.rows * step.sides
    size = (rows, shape.attention_heads, step.time, shape.attention // shape.attention_heads)
    query, key, value = (torch.randn(size, dtype=_dtype(step), requires_grad=True) for _ in range(3))
    mask = torch.ones(rows, 1, step.time, step.time, dtype=torch.bool).tril()

    def run() -> None:
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

    return 12.0 * step.tokens * step.time * shape.attention / _seconds(run, clock)


def _simple(shape: Shape, step: Step, clock: Clock) -> float:
    """What stands between a layer's matrix products: norm, rotary positions, residual, SwiGLU; forward and backward."""
    h, k, f, heads = shape.hidden, shape.key_value, shape.intermediate, shape.attention_heads
    rows, width = step.rows * step.sides, shape.attention // heads
    states, gate, up = (torch.randn(rows, step.time, size, requires_grad=True) for size in (h, f, f))
    query, key = (torch.randn(rows, step.time, size, requires_grad=True) for size in (shape.attention, k))
    cos = sin = torch.randn(rows, step.time, width)
    norm = LlamaRMSNorm(h)

    def run() -> None:
        turned = (one.view(rows, step.time, -1, width).transpose(1, 2) for one in (query, key))
        ends = [norm(states) + states, *apply_rotary_pos_emb(*turned, cos, sin), F.silu(gate) * up]
        torch.autograd.backward(ends, [torch.ones_like(end) for end in ends])

    numbers = step.tokens * ((26 + 6) * h + 25 * (shape.attention + k) + 14 * f)
    return 4 * numbers / _seconds(run, clock)


def _loss(shape: Shape, step: Step, clock: Clock) -> float:
    """A softmax in place, of as many logits at a time as a cache holds."""
    logits = torch.randn(min(CHUNK, step.tokens), shape.vocabulary)
    rows = max(1, CACHED // shape.vocabulary)

    def run() -> None:
        for some in logits.split(rows):
            torch.log_softmax(some, -1, out=some).exp_()

    return logits.numel() / _seconds(run, clock)


def _dtype(step: Step) -> torch.dtype:
    return torch.bfloat16 if step.precision == "bf16" else torch.float32


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    """Median seconds of one call."""
    run()  # allocates
    count, taken = 1, 0.0
    while (taken := _timed(run, count, clock)) < _SHORTEST:
        count *= 2
    return statistics.median([taken, *(_timed(run, count, clock) for _ in range(_REPEATS - 1))]) / count


def _timed(run: Callable[[], object], count: int, clock: Clock) -> float:
    begun = clock()
    for _ in range(count):
        run()
    return clock() - begun
