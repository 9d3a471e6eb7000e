"""Steps of a few shapes on one CPU thread: predicted by `wmtp plan`'s formulas, and measured; memory likewise.

CPU seconds: each prediction from speeds measured right before the step that it is compared with, alternated, medians.
Memory: the bytes of all live tensors at their most, without the process's own.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import median, record

from tests.planning.live import Live
from wmtp_worker.data.packing import Batch
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.model.loading import build
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import checkpoint_activations
from wmtp_worker.planning.measure import measure, predict
from wmtp_worker.planning.memory import Step, parts
from wmtp_worker.planning.policy import Shape
from wmtp_worker.settings import load
from wmtp_worker.training.loss import head_losses_backward, mtp_labels

ROUNDS = 7
WIDER = ("model.hidden_size=256", "model.intermediate_size=704", "model.attention_heads=4", "model.key_value_heads=2")
RUNS = {
    "128 wide, 4 layers, n = 1": ("smoke", ("model.heads=1",)),
    "128 wide, 4 layers, n = 4": ("smoke", ()),
    "256 wide, 4 layers, n = 2": ("smoke", (*WIDER, "model.heads=2")),
    "256 wide, 6 layers, n = 4": ("local-light", ()),
    "256 wide, 6 layers, n = 4, two micro-batches": (
        "local-light",
        ("training.accumulation=2", "training.micro_batch_size=2"),
    ),
    "128 wide, 4 layers, n = 4, weights from losses": ("smoke", ("weighting.family=gradient",)),
    "128 wide, 4 layers, n = 4, LoRA": ("smoke", ("lora.rank=8",)),
    "256 wide, 4 layers, n = 2, layers recomputed": (
        "smoke",
        (*WIDER, "model.heads=2", "training.checkpoint_activations=full"),
    ),
    "256 wide, 4 layers, n = 2, bf16": ("smoke", (*WIDER, "model.heads=2", "training.precision=bf16")),
}


def one(preset, overrides):
    settings = load(preset=preset, overrides=overrides, environ={})
    training, length = settings.training, settings.data.sequence_length
    model = build(settings, load_tokenizer(PACKAGED)).train()
    if settings.lora.rank:
        add_lora(model, **settings.lora.model_dump())
    if again := training.checkpoint_activations == "full":
        checkpoint_activations(model)
    shape, looks = Shape.of(model), settings.weighting.looks_at_losses
    step = Step(training.micro_batch_size, length, training.precision, cuda=False, recompute=again)
    step = replace(step, looked_at=settings.weighting.weighed_share if looks else None)
    ids = torch.randint(0, shape.vocabulary, (step.rows, length))
    positions, segments = torch.arange(length).repeat(step.rows, 1), torch.ones_like(ids)
    batch, targets = Batch(ids, ids, positions, segments), mtp_labels(ids, segments, model.heads)
    counts = torch.full((model.heads,), float(ids.numel()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def weigh(head):
        return torch.ones_like(head.losses if looks else head.targets, dtype=torch.float32)

    def take():
        optimizer.zero_grad(set_to_none=True)
        for _ in range(training.accumulation):
            head_losses_backward(model, batch, targets, weigh, counts, training.precision)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    take()  # the first one allocates
    ratios, predicted, measured = [], [], []
    for _ in range(ROUNDS):
        before = predict(shape, step, training.accumulation, measure(shape, step, time.process_time))
        begun = time.process_time()
        take()
        taken = time.process_time() - begun
        after = predict(shape, step, training.accumulation, measure(shape, step, time.process_time))
        predicted.append((before + after) / 2)
        measured.append(taken)
        ratios.append(predicted[-1] / taken)
    held = [parameter.data for parameter in model.parameters()]
    held += [tensor for state in optimizer.state.values() for tensor in state.values()]
    with Live(*held) as live:
        take()
    planned = sum(part.bytes for part in parts(shape, step) if part.name != "process")
    return {
        "CPU s predicted": median(predicted),
        "CPU s measured": median(measured),
        "time ratio": median(ratios),
        "MB planned": round(planned / 1e6, 1),
        "MB measured": round(live.peak / 1e6, 1),
        "memory ratio": round(planned / live.peak, 3),
    }


def main() -> None:
    torch.set_num_threads(1)
    record("plan", {"runs": {name: one(*run) for name, run in RUNS.items()}})


if __name__ == "__main__":
    main()
