"""Bytes of memory that a training step needs, part by part, from the shape alone.

Weights, gradients and AdamW's two moments are fp32: 4, 4 and 8 bytes a parameter (Rajbhandari et al., "ZeRO", 2020,
section 3.1, without fp16 copies); moments may be bf16. Activations are counted as in Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models" (2022), section 4: what each operation keeps for the backward
pass. Their layer is GPT's; ours is Llama's under transformers: RMSNorm, rotary positions, grouped queries (keys and
values are repeated for all heads before attention), SwiGLU, no dropout, and `scaled_dot_product_attention`, which keeps
the logarithm of a sum a row and not the attention matrix; its mask is one matrix for all layers and heads.
"""

from dataclasses import dataclass

from wmtp_worker.planning.policy import Shape

WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
CHUNK = 512  # tokens whose logits exist at once, in the training's loss
CACHED = 1 << 18  # logits that it works on at a time on a CPU
# CUDA's context, cuBLAS' workspaces, the communicator's buffers
_CUDA = 1 << 30
_PROCESS = 400 << 20  # python, torch and the tokenizer on a CPU


@dataclass(frozen=True)
class Part:
    """One line of the account."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Step:
    """How a device takes its rows: `rows` at once, of `time` tokens, in `precision`; `shards`: devices that share all
    weights, gradients and moments (FSDP, ZeRO stage 3), 1 where each has a whole copy; `copies`: how many there are;
    `recompute`: each layer keeps its input alone, and runs forward again in the backward pass; `moments`: bytes of a
    parameter's two; `looked_at`: where weights follow from the losses, the share of tokens that have one: logits are
    made of all, and of these once more for the unembedding's gradient; None where weights are known before; `sides`:
    2 where each row stands for two, one of correct and one of incorrect solutions."""

    rows: int
    time: int
    precision: str
    shards: int = 1
    copies: int = 1
    cuda: bool = True
    recompute: bool = False
    moments: int = MOMENTS
    looked_at: float | None = None
    sides: int = 1

    @property
    def tokens(self) -> int:
        return self.sides * self.rows * self.time

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.precision == "bf16" else 4


def layer_bytes(shape: Shape, step: Step) -> int:
    """What one layer keeps for its backward pass, a token.

    fp32: 24 h + 16 a + 16 f. bf16 autocast: 26 h + 8 a + 8 f, because the residual stream and the norms stay fp32 and
    each linear layer makes its own copy of its input. Frozen norms keep 8 h less. Beside that: the attention's and
    the norms' statistics, the inner values of adapters.
    """
    h, a, f = shape.hidden, shape.attention, shape.intermediate
    numbers = 26 * h + 8 * a + 8 * f if step.precision == "bf16" else 24 * h + 16 * a + 16 * f
    if shape.lora:
        numbers -= 8 * h
    return numbers + step.width * shape.adapter_inner + 4 * shape.attention_heads + 8


def mask_bytes(step: Step) -> int:
    """The mask, a token: which others it sees, and what is added to its scores."""
    return (1 + step.width) * step.time


def head_bytes(shape: Shape, step: Step) -> int:
    """What one head keeps, a token: its layer, the final norm and its output, and the trunk's gradient."""
    norm = (4 if shape.lora else 8) * shape.hidden
    return layer_bytes(shape, step) + norm + (4 + 4) * shape.hidden


def value_bytes(shape: Shape, step: Step) -> int:
    """What the end of a value model keeps, a token: the norm and its output, the MLP's inside before and after its
    activation, and the gradient that goes back; a layer where the trunk's do not stay, while it runs."""
    h, inside = shape.hidden, 2 * step.width * (shape.value_head.matrices // (shape.hidden + 1))
    copies = step.width * h if step.precision == "bf16" else 0
    layer = layer_bytes(shape, step) if step.recompute or shape.frozen else 0
    return (4 if shape.lora else 8) * h + (4 + 4) * h + copies + inside + layer


def loss_part(shape: Shape, step: Step) -> Part:
    """What the loss of one head needs at its worst: the one place that knows how the loss is computed.

    The states that are multiplied and their gradients; of one chunk the logits, which become their own gradient, and
    what comes of them; with bf16 a copy of them in fp32, on a CPU of some rows, and later the unembedding's gradient of
    a chunk.
    """
    h, v, width, chunk = shape.hidden, shape.vocabulary, step.width, min(CHUNK, step.tokens)
    states, logits = (4 + width) * h * step.tokens, width * (v + h) * chunk
    text = f"{4 + width} B × {h:,} × {step.tokens:,} tokens + {width} B × {v + h:,} × {chunk:,} tokens"
    if step.precision != "bf16":
        return Part("one head's loss", states + logits, text)
    rows = chunk if step.cuda else min(chunk, max(1, CACHED // v))
    product = width * shape.embedding if shape.embedding_trained else 0
    more, how = max((4 * rows * v, f"4 B × {v:,} × {rows:,} tokens"), (product, f"{width} B × {shape.embedding:,}"))
    return Part("one head's loss", states + logits + more, f"{text} + {how}")


def _stacked_loss(shape: Shape, step: Step) -> Part:
    """Whole logits and cross-entropy: log-probabilities, their gradient and the logits', fp32, of all heads at once."""
    size = 12 * shape.heads * shape.vocabulary * step.tokens
    return Part("heads' logits and loss", size, f"{shape.heads} × 12 B × {shape.vocabulary:,} × {step.tokens:,} tokens")


def parts(shape: Shape, step: Step, stacked: bool = False) -> list[Part]:
    """Memory of one device at the worst moment of a step: the backward pass of a head's loss.

    With one micro-batch a step the gradients of the trunk come only after that moment: what is said is never too low.
    `stacked`: as if all heads ran forward before the first ran backward, their logits side by side.
    """
    count, tokens = shape.total, step.tokens
    shared = "" if step.shards == 1 else f" / {step.shards}"
    kept = 0 if shape.frozen else 4 * shape.hidden if step.recompute else layer_bytes(shape, step)
    found = [
        Part("weights", WEIGHT * count.all // step.shards, f"4 B × {count.all:,}{shared}"),
        Part("gradients", GRADIENT * count.trained // step.shards, f"4 B × {count.trained:,}{shared}"),
        Part(
            "optimizer moments",
            step.moments * count.trained // step.shards,
            f"{step.moments} B × {count.trained:,}{shared}",
        ),
        *_under_way(shape, step),
        *_copies(shape, step),
        Part(
            "trunk activations",
            shape.trunk_layers * kept * tokens,
            f"{shape.trunk_layers} layers × {kept:,} B × {tokens:,} tokens",
        ),
        *_ends(shape, step, stacked),
        Part("attention mask", mask_bytes(step) * tokens, f"{mask_bytes(step):,} B × {tokens:,} tokens"),
        Part("CUDA context and workspaces", _CUDA, "allowance")
        if step.cuda
        else Part("process", _PROCESS, "allowance"),
    ]
    return [part for part in found if part.bytes]


def _ends(shape: Shape, step: Step, stacked: bool) -> list[Part]:
    """What follows the trunk: heads and their loss, or the norm and the value head of a value model."""
    tokens = step.tokens
    if not shape.heads:
        size = value_bytes(shape, step)
        return [Part("norm and value head", size * tokens, f"{size:,} B × {tokens:,} tokens")]
    at_once, head = shape.heads if stacked else 1, head_bytes(shape, step)
    text = f"{f'{at_once} × ' if at_once > 1 else ''}{head:,} B × {tokens:,} tokens"
    name = "heads' activations" if stacked else "one head's activations"
    loss = _stacked_loss(shape, step) if stacked else loss_part(shape, step)
    return [Part(name, at_once * head * tokens, text), loss]


def recomputed_bytes(shape: Shape, step: Step) -> int:
    """The trunk's activations where each layer keeps only its input, fp32.

    One layer's own are there in any case, while it runs backward; that is a head's part of the account, as large.
    """
    return 4 * shape.hidden * shape.trunk_layers * step.tokens


def _copies(shape: Shape, step: Step) -> list[Part]:
    """Weights as they are computed with: autocast's bf16 copies, or what FSDP has gathered."""
    unembedding = shape.embedding if shape.heads else 0
    if step.shards == 1:
        if step.precision != "bf16":
            return []
        # autocast keeps a copy of every trained matrix until the end of the backward pass, of a frozen one while needed
        layers = 1 if shape.frozen else min(shape.trunk_layers + 1, shape.layers) if shape.lora else shape.layers
        size = 2 * (layers * shape.layer.matrices + unembedding)
        rest = " + unembedding" if unembedding else ""
        return [Part("bf16 copies of weights", size, f"2 B × ({layers} layers' matrices{rest})")]
    outside = shape.total.all - shape.layers * shape.layer.matrices
    trained = shape.total.trained - shape.layers * shape.layer.trained_matrices
    lower = step.precision == "bf16"
    # a gradient in the type of its weight, and in the message
    layers = 2 * step.width * shape.layer.matrices + (step.width + GRADIENT) * shape.layer.trained_matrices
    text = (
        f"{WEIGHT} B × ({outside:,} shared + gradients) + {step.width} B × 2 layers + {step.width + GRADIENT} B × "
        "gradients of one"
    )
    found = [Part("gathered weights and gradients", WEIGHT * outside + GRADIENT * trained + layers, text)]
    return [*found, Part("bf16 copies of weights", 2 * unembedding, "2 B × unembedding")] if lower else found


def _under_way(shape: Shape, step: Step) -> list[Part]:
    """Whole copies add up their gradients in messages of their own."""
    if step.copies == 1 or step.shards > 1:
        return []
    trained = shape.total.trained
    return [Part("gradients on their way", GRADIENT * trained, f"4 B × {trained:,}")]


def total(found: list[Part]) -> int:
    """Bytes of all parts."""
    return sum(part.bytes for part in found)
