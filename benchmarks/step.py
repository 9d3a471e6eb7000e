"""What settings and choices of the training step cost beside each other: CPU seconds and live memory, by ratios.

    python benchmarks/step.py [validation] [chunk] [compile] [--rounds N]

`validation`: a batch through all heads, losses and accuracies in chunks of tokens against whole logits. `chunk`:
one head's loss, forward and backward, by the tokens of a chunk. `compile`: forward and backward pass with compiled
decoder layers against eager ones, and the first of them, compiling included: cold where `TORCHINDUCTOR_CACHE_DIR` has
nothing yet.

Both sides alternate on the same model in one process; the median of their ratios counts. Memory is that of all live
tensors at their most, beyond what the model has.
"""

import argparse
import copy
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does
sys.path.insert(0, str(Path(__file__).parent.parent))  # for what the tests count memory with

import torch
import torch.nn.functional as F
from common import median, record
from transformers import LlamaConfig

from tests.planning.live import Live
from wmtp_worker.data.packing import Batch
from wmtp_worker.model.mtp import MTPForCausalLM, layers_of, packed_attention_mask
from wmtp_worker.training.group import Group
from wmtp_worker.training.linear_cross_entropy import CHUNK, LinearCrossEntropy
from wmtp_worker.training.loss import autocast, head_losses_backward, mtp_labels
from wmtp_worker.training.validation import validate

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "vocab_size": 32_000}
PRECISIONS = ("fp32", "bf16")


def model_of(layers: int, heads: int) -> MTPForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, n_future_tokens=heads, use_cache=False, **SHAPE)
    return MTPForCausalLM(config).train()


def batch_of(rows: int, time: int) -> Batch:
    """Every token is labelled."""
    ids = torch.randint(SHAPE["vocab_size"], (rows, time), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids, torch.arange(time).expand_as(ids), torch.ones_like(ids), {})


def alternate(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """CPU seconds of each way, and the median of their ratios to the first."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            started = time.process_time()
            run()
            if number:  # the first allocates
                found[way].append(time.process_time() - started)
    first = next(iter(found.values()))
    return {
        way: {
            "cpu": median(each),
            "ratio": round(statistics.median(a / b for a, b in zip(each, first, strict=True)), 3),
        }
        for way, each in found.items()
    }


def peak(run: Callable[[], object], *known: torch.Tensor) -> float:
    """Megabytes beyond the known tensors."""
    with Live(*known) as live:
        before = live.now
        run()
    return round((live.peak - before) / 1e6, 1)


# --- validation


@torch.no_grad()
def whole_logits(model: MTPForCausalLM, batch: Batch, precision: str) -> None:
    targets = mtp_labels(batch.labels, batch.segment_ids, model.heads)
    with autocast(CPU, precision):
        trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
        for number in range(model.heads):
            labels = targets[..., number]
            logits, labels = model.head_logits(number + 1, trunk)[labels >= 0].float(), labels[labels >= 0]
            F.cross_entropy(logits, labels, reduction="sum")
            (logits.argmax(-1) == labels).sum()


def validation(rounds: int) -> dict[str, Any]:
    model, batch, found = model_of(layers=3, heads=4), batch_of(4, 512), {}
    for precision in PRECISIONS:
        ways = {
            "whole logits": lambda precision=precision: whole_logits(model, batch, precision),
            "in chunks": lambda precision=precision: validate(model, [batch], Group(CPU), precision, lambda: None),
        }
        found[precision] = alternate(ways, rounds)
        for way, run in ways.items():
            found[precision][way]["megabytes"] = peak(run, *model.parameters())
    return found


# --- chunk


def chunks(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    width, vocabulary, tokens, found = SHAPE["hidden_size"], SHAPE["vocab_size"], 2048, {}
    # as a trained model has them: else most probabilities would be denormal numbers, which are slow
    hidden = torch.randn(tokens, width, requires_grad=True)
    matrix = (0.02 * torch.randn(vocabulary, width)).requires_grad_()
    targets, weights = torch.randint(vocabulary, (tokens,)), torch.ones(tokens)
    matrix.grad = torch.zeros_like(matrix)
    for precision in PRECISIONS:

        def step(chunk: int, precision: str = precision) -> None:
            with autocast(CPU, precision):
                loss = LinearCrossEntropy(hidden, matrix, targets, chunk=chunk)
                loss.weighted_sum(weights, into=matrix.grad)[0].backward()

        ways = {
            str(chunk): functools.partial(step, chunk) for chunk in (CHUNK, CHUNK // 4, CHUNK // 2, 2 * CHUNK, tokens)
        }
        found[precision] = alternate(ways, rounds)
        for way, run in ways.items():
            found[precision][way]["megabytes"] = peak(run, hidden, matrix, matrix.grad)
    return found


# --- compile


def compiled(rounds: int) -> dict[str, Any]:
    eager, batch, found = model_of(layers=5, heads=2), batch_of(4, 512), {}
    targets = mtp_labels(batch.labels, batch.segment_ids, eager.heads)
    counts = (targets >= 0).sum((0, 1)).float()
    models = {"eager": eager, "compiled": copy.deepcopy(eager)}
    for layer in layers_of(models["compiled"]):
        layer.compile(dynamic=False)
    for precision in PRECISIONS:

        def step(model: MTPForCausalLM, precision: str = precision) -> None:
            model.zero_grad(set_to_none=True)
            head_losses_backward(model, batch, targets, lambda head: torch.ones(targets.shape[:2]), counts, precision)

        started = time.perf_counter()
        step(models["compiled"])
        first = time.perf_counter() - started
        ways = {way: functools.partial(step, model) for way, model in models.items()}
        found[precision] = alternate(ways, rounds) | {"first compiled step, wall seconds": round(first, 1)}
    return found


PARTS = {"validation": validation, "chunk": chunks, "compile": compiled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        record(f"step-{part}", PARTS[part](options.rounds))


if __name__ == "__main__":
    main()
