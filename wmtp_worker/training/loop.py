"""Stage 2: the training loop, top to bottom."""

import hashlib
import json
import logging
import math
import time

import torch
from rich.console import Console

from wmtp_worker.data.packing import IGNORE
from wmtp_worker.tracking.console import StepBar
from wmtp_worker.training.loss import head_losses_backward, mtp_labels
from wmtp_worker.training.schedule import learning_rate
from wmtp_worker.training.session import Session, seed_step
from wmtp_worker.training.validation import validate

log = logging.getLogger(__name__)


def train(session: Session, console: Console) -> None:
    """Train until `session.finished`.

    Whatever decides about the numbers follows from `session.progress` alone, so a restored session goes on exactly
    where it was: before a validation, before a save, or before a step. When it is saved may follow from the clock, and
    from notices: that changes no number. Raises `Interrupted` when a stop was asked for, with the session
    standing after its last whole step, and `TrainingDiverged` before a bad step is taken.
    """
    progress, settings = session.progress, session.settings
    with StepBar(console, settings.training.max_steps, progress.step) as bar:
        while True:
            if _due(progress.step, settings.evaluation.every, session.finished) and (
                progress.validated_at < progress.step or progress.best_is_lost
            ):
                run_validation(session)
            # asked again: a validation may have stopped the run early
            if progress.saved_at < progress.step and session.wants_save():
                session.save()
            if session.finished:
                return
            note = train_step(session)
            bar.update(progress.step, note)


def _due(step: int, every: int, finished: bool) -> bool:
    return finished or (every > 0 and step % every == 0)


def train_step(session: Session) -> str:
    """One optimizer step: take rows, accumulate gradients over the micro-batches, clip, step. Returns a short note."""
    progress, training, model = session.progress, session.settings.training, session.model
    started = time.perf_counter()
    rows, after = session.train_data.sampler.take(progress.position, training.micro_batch_size * training.accumulation)
    size = training.micro_batch_size
    batches = [session.train_data.batch(rows[i : i + size]) for i in range(0, len(rows), size)]
    waited = time.perf_counter() - started
    targets = [mtp_labels(batch.labels, batch.segment_ids, model.heads) for batch in batches]
    # every micro-batch is divided by the same counts, so accumulation equals one large batch
    counts = torch.stack([(target != IGNORE).sum((0, 1)) for target in targets]).sum(0).clamp(min=1)
    counts = counts.to(session.device, torch.float32)

    seed_step(session.settings.run.seed, progress.step)
    rate = learning_rate(progress.step, training)
    for group in session.optimizer.param_groups:
        group["lr"] = rate
    session.optimizer.zero_grad(set_to_none=True)
    weighs = session.weighter.begin(progress.step, batches, targets)
    losses = torch.zeros(2, model.heads, device=session.device)
    for batch, target, weigh in zip(batches, targets, weighs, strict=True):
        session.check()
        session.heartbeat.beat("train", step=progress.step)
        batch, target = batch.to(session.device), target.to(session.device)
        losses += head_losses_backward(model, batch, target, weigh, counts, training.precision)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip or math.inf))
    head_loss, unweighted = losses.tolist()
    loss = sum(head_loss) / model.heads
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise session.diverged(f"the loss is {loss}, the gradient's norm {norm}")
    session.saving.gate()  # the last save may still be copying what changes now
    session.optimizer.step()

    tokens = sum(batch.real_tokens for batch in batches)
    weighting = session.weighter.end()
    progress.step += 1
    progress.position = after
    progress.tokens += tokens
    seconds = time.perf_counter() - started
    session.metrics.write(
        "train",
        progress.step,
        loss=loss,
        head_loss=head_loss,
        unweighted_loss=sum(unweighted) / model.heads,
        unweighted_head_loss=unweighted,
        **weighting,
        lr=rate,
        grad_norm=norm,
        tokens=tokens,
        packing=tokens / sum(batch.input_ids.numel() for batch in batches),
        rows=hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        seconds=seconds,
        wait=waited,
    )
    session.saving.stepped(seconds)
    session.report("train", loss=loss, tokens_per_second=tokens / seconds)
    note = f"loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s"
    if weighting.get("weight_std"):
        note += f"  weights ±{weighting['weight_std']:.2f} entropy {weighting['weight_entropy']:.3f}"
    if progress.step % session.settings.logging.every == 0 or session.finished:
        more = f"lr {rate:.2e}  grad norm {norm:.2f}  waited {waited / seconds:.1%}"
        log.info("step %d/%d  %s  %s", progress.step, training.max_steps, note, more)
    return note


def run_validation(session: Session) -> None:
    """Validate, keep the best model, and decide about stopping early."""
    progress, settings = session.progress, session.settings

    def between_batches() -> None:
        session.check()
        session.heartbeat.beat("validate", step=progress.step)

    result = validate(
        session.model,
        session.validation_data.epoch(settings.training.micro_batch_size, settings.evaluation.max_batches),
        session.device,
        settings.training.precision,
        between_batches,
    )
    if not math.isfinite(result.loss):
        raise session.diverged(f"the validation loss is {result.loss}")
    if progress.validated_at < progress.step:
        session.metrics.write("validation", progress.step, **result.to_json())
    progress.validation = result.to_json()
    progress.validated_at = progress.step
    accuracy = " ".join(f"{share:.1%}" for share in result.head_accuracy)
    log.info(
        "step %d  validation loss %.4f  perplexity of head 1 %.2f  accuracy by head %s",
        progress.step,
        result.loss,
        result.perplexity,
        accuracy,
    )
    stopping = settings.training.early_stopping
    if progress.best_loss is None or result.loss < progress.best_loss - stopping.min_delta:
        progress.best_loss, progress.best_step, progress.without_improvement = result.loss, progress.step, 0
        session.export(best=True)
        return
    progress.without_improvement += 1
    if 0 < stopping.patience <= progress.without_improvement and not session.finished:
        progress.stopped_early = True
        log.info("stopping early: no improvement in %d validations", progress.without_improvement)
