"""What a training step has to compute, and to move: lower bounds of its time.

Floating-point operations: 2 a parameter of a matrix and token forward, 4 backward (Kaplan et al., "Scaling Laws for
Neural Language Models", 2020, section 2.1), and 12 · width · time a layer and token for the attention matrix
(Chowdhery et al., "PaLM", 2022, appendix B, which defines model FLOPs utilisation, MFU, by these). Heads run one after
the other, each through the unembedding, which therefore counts n times. A frozen matrix needs no gradient: 4, not 6.
Where weights follow from the losses, a trained unembedding counts 8: its gradient takes a second pass over the logits.
"""

from wmtp_worker.planning.memory import GRADIENT, WEIGHT, Step, head_bytes, layer_bytes
from wmtp_worker.planning.policy import Shape


def token_flops(shape: Shape, step: Step) -> int:
    """Floating-point operations of a step, a token, forward and backward."""
    layer, unembedding = shape.layer, shape.embedding
    matrices = shape.layers * ((2 if shape.frozen else 4) * layer.matrices + 2 * layer.trained_matrices)
    heads = round(shape.heads * unembedding * (4 + 2 * _outer(shape, step) + 2 * seen_again(shape, step)))
    attention = attention_flops(shape, step.time)
    values = 6 * shape.value_head.matrices
    again = 2 * shape.layers * layer.matrices + attention // 3 if step.recompute and not shape.frozen else 0
    return matrices + heads + attention + values + again


def seen_again(shape: Shape, step: Step) -> float:
    """The share of tokens whose logits are made a second time, as `training.linear_cross_entropy` does."""
    return step.looked_at or 0.0 if shape.embedding_trained else 0.0


def _outer(shape: Shape, step: Step) -> float:
    """The share of tokens that the unembedding's gradient is made of."""
    if not shape.embedding_trained:
        return 0.0
    return 1.0 if step.looked_at is None else step.looked_at


def attention_flops(shape: Shape, time: int) -> int:
    """The part of `token_flops` that attention has beside its projections."""
    return (4 if shape.frozen else 12) * shape.layers * shape.attention * time


def step_bytes(shape: Shape, step: Step, passes: int) -> int:
    """Bytes that a device must at least read and write in a step of `passes` micro-batches.

    Each weight is read forward and backward, the unembedding by each head; gradients are written, or added to; AdamW
    reads weight, gradient and moments and writes all but the gradient, and clipping reads twice and writes once; what
    is kept for the backward pass is written once and read once; logits are written, become their gradient, and are read
    for each product: five times, or four and four where they are made twice.
    """
    count, trunk, heads, again = shape.total, shape.trunk_layers, shape.heads, seen_again(shape, step)
    unembedding = heads * shape.embedding * (3 if again else 2)
    weights = step.width * ((1 if shape.frozen else 2) * shape.layers * shape.layer.all + unembedding)
    gradients = GRADIENT * count.trained * 2
    kept = heads * head_bytes(shape, step) + (0 if shape.frozen else trunk * layer_bytes(shape, step))
    logits = round((4 + _outer(shape, step) + 3 * again) * step.width * heads * shape.vocabulary)
    optimizer = (2 * WEIGHT + GRADIENT + 2 * step.moments + 3 * GRADIENT) * count.trained // step.shards
    return passes * (weights + gradients + step.tokens * (2 * kept + logits)) + optimizer


def link_bytes(shape: Shape, step: Step, passes: int) -> int:
    """Bytes that a device sends in a step.

    Sharded: the layers' matrices are gathered, forward and backward, of a head once, and their gradients scattered,
    each micro-batch (ZeRO, section 7.2); all else is gathered and scattered once, in fp32. Several copies: one ring
    all-reduce of the gradients a step (Patarasuk and Yuan, 2009), of shards where there are some.
    """
    count, layer, shards, copies = shape.total, shape.layer, step.shards, step.copies
    runs = passes * (2 * shape.trunk_layers + shape.heads)
    gathered = runs * step.width * layer.matrices + WEIGHT * (count.all - shape.layers * layer.matrices)
    scattered = GRADIENT * (count.trained + (passes - 1) * shape.layers * layer.trained_matrices)
    added = 2 * GRADIENT * (count.trained // shards) * (copies - 1) // copies
    return (gathered + scattered) * (shards - 1) // shards + added


def eager_bytes(shape: Shape, step: Step, passes: int) -> int:
    """Bytes that the simple operations between the matrix products read and write in a step, each by itself (fp32).

    What torch runs without a compiler: for a layer 32 h + 12 k + 5 f numbers a token forward (norms, rotary positions,
    repeated keys and values, residuals, SwiGLU), 70 h + 17 k + 9 f backward, and the mask; the embedding's gradient;
    clipping and AdamW as in `step_bytes`. The loss is not among them.
    """
    h, k, f = shape.hidden, shape.key_value, shape.intermediate
    forward, backward = 32 * h + 12 * k + 5 * f, 0 if shape.frozen else 70 * h + 17 * k + 9 * f
    layers = shape.layers * (forward + backward + 3 * step.time) + (
        shape.trunk_layers * forward if step.recompute and not shape.frozen else 0
    )
    tokens = step.tokens * (layers + shape.heads * 26 * h)
    embedding = shape.embedding * (4 + 3 * (shape.heads - 1)) if shape.embedding_trained else 0
    again = 3 * shape.total.trained * (passes - 1)
    return 4 * (passes * (tokens + embedding) + again + 10 * shape.total.trained)
