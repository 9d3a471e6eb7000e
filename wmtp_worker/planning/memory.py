"""Bytes of memory that a training step needs, part by part, from the shape alone.

Weights, gradients and AdamW's two moments are fp32: 4, 4 and 8 bytes a parameter (Rajbhandari et al., "ZeRO", 2020,
section 3.1, without fp16 copies). Activations are counted as in Korthikanti et al., "Reducing Activation Recomputation
in Large Transformer Models" (2022), section 4: what each operation keeps for the backward pass. Their layer is GPT's;
ours is Llama's under transformers: RMSNorm, rotary positions, grouped queries (keys and values are repeated for all
heads before attention), SwiGLU, no dropout, and `scaled_dot_product_attention`, which keeps the logarithm of a sum a
row and not the attention matrix; its mask is one matrix for all layers and heads.
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
    weights, gradients and moments (FSDP, ZeRO stage 3), 1 where each has a whole copy; `recompute`: each layer keeps
    its input alone, and runs forward again in the backward pass."""

    rows: int
    time: int
    precision: str
    shards: int = 1
    cuda: bool = True
    recompute: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.time

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


def loss_bytes(shape: Shape, step: Step, stacked: bool = False) -> int:
    """What the loss of one head needs at its worst: the one place that knows how the loss is computed.

    The states that are multiplied and their gradients; of one chunk the logits, which become their own gradient, and
    what comes of them; with bf16 a copy of them in fp32, on a CPU of some rows, and later the unembedding's gradient of
    a chunk. `stacked`: whole logits
    and cross-entropy, whose log-probabilities, their gradient and the logits' are there at once, fp32.
    """
    if stacked:
        return 12 * shape.vocabulary * step.tokens
    chunk = min(CHUNK, step.tokens)
    numbers = (4 + step.width) * shape.hidden * step.tokens + step.width * (shape.vocabulary + shape.hidden) * chunk
    if step.precision != "bf16":
        return numbers
    rows = chunk if step.cuda else min(chunk, max(1, CACHED // shape.vocabulary))
    product = step.width * shape.embedding if shape.embedding_trained else 0
    return numbers + max(4 * rows * shape.vocabulary, product)


def parts(shape: Shape, step: Step, stacked: bool = False) -> list[Part]:
    """Memory of one device at the worst moment of a step: the backward pass of a head's loss.

    With one micro-batch a step the gradients of the trunk come only after that moment: what is said is never too low.
    `stacked`: as if all heads ran forward before the first ran backward, their logits side by side.
    """
    count, tokens, at_once = shape.total, step.tokens, shape.heads if stacked else 1
    shared = "" if step.shards == 1 else f" / {step.shards}"
    layer, head, loss = layer_bytes(shape, step), head_bytes(shape, step), loss_bytes(shape, step, stacked)
    kept, chunk = 4 * shape.hidden if step.recompute else layer, min(CHUNK, tokens)
    heads = f"{at_once} × " if at_once > 1 else ""
    found = [
        Part("weights", WEIGHT * count.all // step.shards, f"4 B × {count.all:,}{shared}"),
        Part("gradients", GRADIENT * count.trained // step.shards, f"4 B × {count.trained:,}{shared}"),
        Part("optimizer moments", MOMENTS * count.trained // step.shards, f"8 B × {count.trained:,}{shared}"),
        *_copies(shape, step),
        Part(
            "trunk activations",
            shape.trunk_layers * kept * tokens,
            f"{shape.trunk_layers} layers × {kept:,} B × {tokens:,} tokens",
        ),
        Part(
            "heads' activations" if stacked else "one head's activations",
            at_once * head * tokens,
            f"{heads}{head:,} B × {tokens:,} tokens",
        ),
        Part("attention mask", mask_bytes(step) * tokens, f"{mask_bytes(step):,} B × {tokens:,} tokens"),
        Part("heads' logits and loss", at_once * loss, f"{heads}12 B × {shape.vocabulary:,} × {tokens:,} tokens")
        if stacked
        else Part("one head's loss", loss, f"{step.width} B × {shape.vocabulary:,} × {chunk:,} tokens, states"),
        Part("CUDA context and workspaces", _CUDA, "allowance")
        if step.cuda
        else Part("process", _PROCESS, "allowance"),
    ]
    return [part for part in found if part.bytes]


def recomputed_bytes(shape: Shape, step: Step) -> int:
    """The trunk's activations where each layer keeps only its input, fp32.

    One layer's own are there in any case, while it runs backward; that is a head's part of the account, as large.
    """
    return 4 * shape.hidden * shape.trunk_layers * step.tokens


def _copies(shape: Shape, step: Step) -> list[Part]:
    """Weights as they are computed with: autocast's bf16 copies, or what FSDP has gathered."""
    unembedding = shape.embedding
    if step.shards == 1:
        if step.precision != "bf16":
            return []
        # autocast keeps a copy of every trained matrix until the end of the backward pass, of a frozen one while needed
        layers = shape.trunk_layers + 1 if shape.lora else shape.layers
        size = 2 * (layers * shape.layer.matrices + unembedding)
        return [Part("bf16 copies of weights", size, f"2 B × ({layers} layers' matrices + unembedding)")]
    outside = unembedding if shape.tied else 2 * unembedding
    whole = step.width * (outside + 2 * shape.layer.all)
    trained = (outside if shape.embedding_trained else 0) + shape.layer.trained
    text = f"{step.width} B × (embeddings + 2 layers) + 4 B × their gradients"
    return [Part("gathered weights and gradients", whole + GRADIENT * trained, text)]


def total(found: list[Part]) -> int:
    """Bytes of all parts."""
    return sum(part.bytes for part in found)
