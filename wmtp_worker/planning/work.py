"""What a training step has to compute, and to move: lower bounds of its time.

Floating-point operations: 2 a parameter of a matrix and token forward, 4 backward (Kaplan et al., "Scaling Laws for
Neural Language Models", 2020, section 2.1), and 12 · width · time a layer and token for the attention matrix
(Chowdhery et al., "PaLM", 2022, appendix B, which defines model FLOPs utilisation, MFU, by these). Heads run one after
the other, each through the unembedding, which therefore counts n times. A frozen matrix needs no gradient: 4, not 6.
"""

from wmtp_worker.planning.memory import GRADIENT, MOMENTS, WEIGHT, Step, head_bytes, layer_bytes
from wmtp_worker.planning.policy import Shape


def token_flops(shape: Shape, step: Step) -> int:
    """Floating-point operations of a step, a token, forward and backward."""
    layer, unembedding = shape.layer, shape.embedding
    matrices = shape.layers * (4 * layer.matrices + 2 * layer.trained_matrices)
    heads = shape.heads * unembedding * (6 if shape.embedding_trained else 4)
    attention = attention_flops(shape, step.time)
    again = 2 * shape.layers * layer.matrices + attention // 3 if step.recompute else 0
    return matrices + heads + attention + again


def attention_flops(shape: Shape, time: int) -> int:
    """The part of `token_flops` that attention has beside its projections."""
    return 12 * shape.layers * shape.attention * time


def step_bytes(shape: Shape, step: Step, passes: int) -> int:
    """Bytes that a device must at least read and write in a step of `passes` micro-batches.

    Each weight is read forward and backward, the unembedding by each head; gradients are written, or added to; AdamW
    reads weight, gradient and moments and writes all but the gradient, and clipping reads twice and writes once; what
    is kept for the backward pass is written once and read once; logits are written, become their gradient, and are read
    for two products: five times.
    """
    count, trunk, heads = shape.total, shape.trunk_layers, shape.heads
    weights = 2 * step.width * (shape.layers * shape.layer.all + heads * shape.embedding)
    gradients = GRADIENT * count.trained * 2
    kept = trunk * layer_bytes(shape, step) + heads * head_bytes(shape, step)
    logits = 5 * step.width * heads * shape.vocabulary
    optimizer = (2 * WEIGHT + GRADIENT + 2 * MOMENTS + 3 * GRADIENT) * count.trained // step.shards
    return passes * (weights + gradients + step.tokens * (2 * kept + logits)) + optimizer


def link_bytes(shape: Shape, step: Step, passes: int, devices: int) -> int:
    """Bytes that a device sends in a step.

    Sharded: weights are gathered forward and backward and gradients scattered, each micro-batch (ZeRO, section 7.2).
    Whole copies: one ring all-reduce of the gradients a step (Patarasuk and Yuan, 2009).
    """
    count = shape.total
    if step.shards > 1:
        return passes * (2 * step.width * count.all + GRADIENT * count.trained) * (devices - 1) // devices
    return 2 * GRADIENT * count.trained * (devices - 1) // devices


def eager_bytes(shape: Shape, step: Step, passes: int) -> int:
    """Bytes that the simple operations between the matrix products read and write in a step, each by itself (fp32).

    What torch runs without a compiler: for a layer 32 h + 12 k + 5 f numbers a token forward (norms, rotary positions,
    repeated keys and values, residuals, SwiGLU), 70 h + 17 k + 9 f backward, and the mask; the embedding's gradient;
    clipping and AdamW as in `step_bytes`. The loss is not among them.
    """
    h, k, f = shape.hidden, shape.key_value, shape.intermediate
    layer = 102 * h + 29 * k + 14 * f + 3 * step.time
    tokens = step.tokens * (shape.layers * layer + shape.heads * 26 * h)
    embedding = shape.embedding * (4 + 3 * (shape.heads - 1)) if shape.embedding_trained else 0
    again = 3 * shape.total.trained * (passes - 1)
    return 4 * (passes * (tokens + embedding) + again + 10 * shape.total.trained)
