"""One training step by several ways to the loss: CPU seconds, and peak memory over weights, gradients and moments.

    python benchmarks/loss.py [--rounds N] [--shape llama smol] [--precision fp32 bf16] [--heads 1 2 4 8]

Times: all ways alternate on the same model in one process; the median of their ratios to stacked logits counts. Memory:
a fresh process each, the kernel's high-water mark of its resident memory. Products: the matrix products of a step in
the chunks' shapes, at the speed that they reach alone, against the whole step, and where the rest goes. With --shape,
--precision or --heads only that is measured, and nothing is kept.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does
# for the processes that measure memory: what is freed is given back at once, so the high-water mark is that of what is
# in use. By default glibc keeps up to 200 MB of freed pieces here, and saves a few per cent of the CPU seconds by it
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import torch
import torch.nn.functional as F
from common import RESULTS, median, record
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from wmtp_worker.data.packing import Batch
from wmtp_worker.model.mtp import MTPForCausalLM, checkpoint_activations, packed_attention_mask
from wmtp_worker.training import linear_cross_entropy
from wmtp_worker.training.loss import Head, autocast, head_losses_backward, mtp_labels

SHAPES: dict[str, dict[str, Any]] = {
    # 6 layers of trunk
    "llama": {
        "config": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "vocab_size": 32_000},
        "layers": 7,
        "rows": (4, 512),
        "heads": (1, 2, 4, 8),
    },
    # SmolLM2-135M's width and vocabulary on fewer layers: tied, grouped queries
    "smol": {
        "config": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
        "layers": 5,
        "rows": (2, 512),
        "heads": (4,),
    },
}
PRECISIONS = ("fp32", "bf16")


class Step:
    """A model and one batch, every token of which is labelled."""

    def __init__(self, shape: str, heads: int, precision: str) -> None:
        torch.manual_seed(0)
        facts = SHAPES[shape]
        config = LlamaConfig(
            num_hidden_layers=facts["layers"], n_future_tokens=heads, use_cache=False, **facts["config"]
        )
        self.model = MTPForCausalLM(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.precision = precision
        ids = torch.randint(config.vocab_size, facts["rows"])
        ones = torch.ones_like(ids)
        self.batch = Batch(ids, ids, torch.arange(ids.shape[1]).expand_as(ids), ones, {})
        self.targets = mtp_labels(self.batch.labels, ones, heads)
        self.counts = (self.targets >= 0).sum((0, 1)).float()

    def take(self, backward: Callable[["Step"], object]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        backward(self)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def trunk(self) -> Any:
        batch = self.batch
        return self.model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))


def stacked(step: Step) -> None:
    """All heads' logits side by side, one cross-entropy, one backward pass."""
    heads = range(1, step.model.heads + 1)
    with autocast(torch.device("cpu"), step.precision):
        trunk = step.trunk()
        logits = torch.stack([step.model.head_logits(number, trunk) for number in heads], dim=2)
        losses = F.cross_entropy(logits.flatten(0, 2).float(), step.targets.flatten(), reduction="none")
        loss = (losses.view_as(step.targets).sum((0, 1)) / step.counts).mean()
    del logits, losses
    loss.backward()


def sequential(step: Step) -> None:
    """Head by head, each with all its logits."""

    def head_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = step.model.lm_head(hidden).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="none").sum()

    _head_by_head(step, head_loss)


def torchs(step: Step) -> None:
    """Head by head by `F.linear_cross_entropy`, in chunks as large as ours."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=linear_cross_entropy.CHUNK)

    def head_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        matrix = step.model.lm_head.weight
        if step.precision == "bf16":  # autocast does not know it
            hidden, matrix = hidden.bfloat16(), matrix.bfloat16()
        return F.linear_cross_entropy(
            hidden.flatten(0, 1), matrix, targets.flatten(), reduction="none", options=options
        ).sum()

    _head_by_head(step, head_loss)


def _head_by_head(step: Step, head_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    with autocast(torch.device("cpu"), step.precision):
        trunk = step.trunk()
        leaf = trunk.detached()
        for number in range(1, step.model.heads + 1):
            loss = head_loss(step.model.head_hidden(number, leaf), step.targets[..., number - 1])
            (loss / (step.counts[number - 1] * step.model.heads)).backward()
            del loss
    trunk.hidden.backward(leaf.hidden.grad)


def ours(step: Step) -> None:
    """The worker's."""
    _ours(step, lambda head: torch.ones(head.targets.shape))


def looking(step: Step) -> None:
    """The worker's, with weights that depend on the losses."""
    _ours(step, lambda head: head.losses / head.losses.mean())


def checkpointed(step: Step) -> None:
    """The worker's, with training.checkpoint_activations=full."""
    checkpoint_activations(step.model)
    ours(step)
    step.model.activation_checkpointing_disable()


def _ours(step: Step, weigh: Callable[[Head], torch.Tensor]) -> None:
    head_losses_backward(step.model, step.batch, step.targets, weigh, step.counts, step.precision)


def transformers_loop(step: Step) -> None:
    """The plain loop of transformers, which knows one head."""
    with autocast(torch.device("cpu"), step.precision):
        loss = step.model(input_ids=step.batch.input_ids, labels=step.batch.labels).loss
    loss.backward()


WAYS = {
    "stacked": stacked,
    "sequential": sequential,
    "F.linear_cross_entropy": torchs,
    "ours": ours,
    "ours, weights from losses": looking,
    "ours, checkpointed": checkpointed,
}
PLAIN = "transformers"


def ways(heads: int) -> dict[str, Callable[[Step], None]]:
    return {**({PLAIN: transformers_loop} if heads == 1 else {}), **WAYS}


# --- memory


def resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def measure_memory(shape: str, heads: int, precision: str, way: str) -> None:
    """In a process of its own: print the megabytes of a step beyond weights, gradients and moments."""
    step = Step(shape, heads, precision)
    backward = ways(heads)[way]
    step.take(backward)  # what libraries allocate once counts as there
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step.take(backward)
    print(json.dumps(round(resident("VmHWM") - before, 1)))


def memory(shape: str, heads: int, precision: str, way: str) -> float:
    command = [sys.executable, __file__, "--alone", shape, str(heads), precision, way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# --- time


def seconds(shape: str, heads: int, precision: str, rounds: int) -> dict[str, dict[str, float]]:
    step = Step(shape, heads, precision)
    found: dict[str, list[float]] = {way: [] for way in ways(heads)}
    for number in range(rounds + 1):
        for way, backward in ways(heads).items():
            started = time.process_time()
            step.take(backward)
            if number:  # the first allocates
                found[way].append(time.process_time() - started)
    return {
        way: {
            "cpu": median(each),
            "ratio": round(statistics.median(a / b for a, b in zip(each, found["stacked"], strict=True)), 3),
        }
        for way, each in found.items()
    }


# --- products


def products(shape: str, heads: int, precision: str, rounds: int) -> dict[str, Any]:
    """The floating-point operations of a step of ours over the speed of products alone, and the step's profile."""
    step = Step(shape, heads, precision)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flop}) as counter:
        step.take(ours)
    operations = counter.get_total_flops()
    speed = _speed(step, rounds)
    cpu = []
    for _ in range(rounds):
        started = time.process_time()
        step.take(ours)
        cpu.append(time.process_time() - started)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.take(ours)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:14]
    return {
        "teraflop": round(operations / 1e12, 3),
        "gigaflop a CPU second": round(speed / 1e9, 1),
        "at that speed": round(operations / speed, 2),
        "cpu": median(cpu),
        "over": round(statistics.median(cpu) * speed / operations, 3),
        "profile": {event.key: round(event.self_cpu_time_total / total, 3) for event in largest},
    }


def _addmm_flop(total: torch.Size, left: torch.Size, right: torch.Size, **_: Any) -> int:
    """Of the one in place, which the counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def _speed(step: Step, rounds: int) -> float:
    """Operations a CPU second of the three products of one chunk."""
    matrix = step.model.lm_head.weight.detach()
    states = torch.randn(linear_cross_entropy.CHUNK, matrix.shape[1])
    if step.precision == "bf16":
        matrix, states = matrix.bfloat16(), states.bfloat16()
    logits, total, each = states @ matrix.T, torch.zeros_like(matrix), []
    for _ in range(4 * rounds):
        started = time.process_time()
        torch.mm(states, matrix.T, out=logits)
        logits @ matrix
        torch.mm(logits.T, states, out=total)
        each.append(time.process_time() - started)
    return 3 * 2 * len(states) * matrix.numel() / statistics.median(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--heads", nargs="+", type=int)
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        shape, heads, precision, way = options.alone
        measure_memory(shape, int(heads), precision, way)
        return
    result: dict[str, Any] = {"ways": {}, "products": {}}
    for shape in options.shape or SHAPES:
        for precision in options.precision or PRECISIONS:
            for heads in options.heads or SHAPES[shape]["heads"]:
                name = f"{shape} {precision} n={heads}"
                result["ways"][name] = times = seconds(shape, heads, precision, options.rounds)
                for way, facts in times.items():
                    facts["megabytes"] = memory(shape, heads, precision, way)
                for way, facts in times.items():
                    facts["memory ratio"] = round(facts["megabytes"] / times["stacked"]["megabytes"], 3)
                    print(f"{name:20s} {way:30s}", facts, flush=True)
                if heads == 4:
                    result["products"][name] = products(shape, heads, precision, options.rounds)
                    print(f"{name:20s} products", result["products"][name], flush=True)
    if not (options.shape or options.precision or options.heads):
        record("loss", result)
        draw(result["ways"], RESULTS / "loss.png")


def draw(found: dict[str, dict[str, dict[str, float]]], picture: Path) -> None:
    """Memory and CPU seconds of a step against the number of heads, of the first shape."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    # Okabe and Ito's colours, told apart with any kind of colour vision
    styles = dict(
        zip([*WAYS, PLAIN], ("#D55E00", "#E69F00", "#999999", "#009E73", "#0072B2", "#CC79A7", "k"), strict=True)
    )
    figure = Figure(figsize=(11, 8), layout="constrained")
    heads = SHAPES["llama"]["heads"]
    for row, precision in zip(figure.subplots(2, 2), PRECISIONS, strict=True):
        for axes, key, label in zip(row, ("megabytes", "cpu"), ("peak memory, MB", "CPU seconds"), strict=True):
            for number, (way, colour) in enumerate(styles.items()):
                points = [(n, found[f"llama {precision} n={n}"].get(way)) for n in heads]
                known = [(n, facts[key]) for n, facts in points if facts]
                marker = "osD^vPX"[number]
                axes.plot(*zip(*known, strict=True), marker=marker, color=colour, label=way, alpha=0.85)
            axes.set(title=f"{precision}: {label}", xlabel="heads", xticks=heads, yscale="log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(which="both", alpha=0.3)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), fontsize=8)
    figure.suptitle("One training step by the way to the loss: 6 layers of trunk, vocabulary 32,000, 2,048 tokens")
    with picture.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


if __name__ == "__main__":
    main()
