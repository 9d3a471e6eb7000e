"""Stages 1 and 2: the training loop, top to bottom."""

import hashlib
import json
import logging
import math
import time

from rich.console import Console

from wmtp_worker.tracking.console import StepBar
from wmtp_worker.training.compiling import eager
from wmtp_worker.training.gradients import clip
from wmtp_worker.training.prefetch import Prefetcher
from wmtp_worker.training.schedule import learning_rate
from wmtp_worker.training.session import Session, seed_pass

log = logging.getLogger(__name__)


def train(session: Session, console: Console) -> None:
    """Train until `session.finished`.

    Whatever decides about the numbers follows from `session.progress` alone, so a restored session goes on exactly
    where it was: before a validation, before a save, or before a step. When it is saved may follow from the clock, and
    from notices: that changes no number. Raises `Interrupted` when a stop was asked for, with the session
    standing after its last whole step, and `TrainingDiverged` before a bad step is taken.
    """
    progress, settings = session.progress, session.settings
    with (
        Prefetcher(session.task.data, settings.training, session.group) as prefetcher,
        StepBar(console, settings.training.max_steps, progress.step) as bar,
    ):
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
            note = train_step(session, prefetcher)
            bar.update(progress.step, note)


def _due(step: int, every: int, finished: bool) -> bool:
    return finished or (every > 0 and step % every == 0)


def train_step(session: Session, prefetcher: Prefetcher) -> str:
    """One optimizer step: take rows, accumulate gradients over the micro-batches, clip, step. Returns a short note."""
    progress, training, task = session.progress, session.settings.training, session.task
    started = time.perf_counter()
    data = prefetcher.take(progress.position)
    passes = list(enumerate(task.begin(progress.step, data.batches)))
    own = session.group.share(passes)
    waited = time.perf_counter() - started

    rate = learning_rate(progress.step, training)
    for parameters in session.optimizer.param_groups:
        parameters["lr"] = rate
    session.optimizer.zero_grad(set_to_none=True)
    for number, backward in own:
        session.check_together()
        session.heartbeat.beat("train", step=progress.step)
        seed_pass(session.settings.run.seed, progress.step, number)
        session.gradients.begin(last=number == own[-1][0])
        backward()
    session.gradients.finish()
    norm = clip(task.model.parameters(), training.grad_clip or math.inf)
    loss = task.loss()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise session.diverged(f"the loss is {loss}, the gradient's norm {norm}")
    # the last time that ranks talk in a step: where one is lost, the others stand before or after a whole one
    logged = (progress.step + 1) % session.settings.logging.every == 0 or progress.step + 1 == training.max_steps
    taken = task.end(counted=logged)
    session.saving.gate()  # the last save may still be copying what changes now
    session.optimizer.step()

    tokens = sum(batch.real_tokens for batch in data.batches)
    progress.step += 1
    progress.position = data.after
    progress.tokens += tokens
    seconds = time.perf_counter() - started
    session.metrics.write(
        "train",
        progress.step,
        **taken.metrics,
        lr=rate,
        grad_norm=norm,
        tokens=tokens,
        packing=tokens / sum(batch.input_ids.numel() for batch in data.batches),
        rows=hashlib.sha256(json.dumps(data.rows).encode()).hexdigest()[:16],
        seconds=seconds,
        wait=waited,
    )
    session.saving.stepped(seconds)
    session.report("train", loss=loss, tokens_per_second=tokens / seconds)
    note = f"loss {loss:.4f}  {tokens / seconds:,.0f} tokens/s{taken.note}"
    if logged:
        more = f"lr {rate:.2e}  grad norm {norm:.2f}  waited {waited / seconds:.1%}"
        log.info("step %d/%d  %s  %s", progress.step, training.max_steps, note, more)
    return note


def run_validation(session: Session) -> None:
    """Validate, keep the best model, and decide about stopping early."""
    progress, settings = session.progress, session.settings

    def between_batches() -> None:
        session.check_together()
        session.heartbeat.beat("validate", step=progress.step)

    # every rank goes on with the same numbers, to the last bit
    with eager(settings):
        result = session.group.of_first(session.task.validate(between_batches))
    session.gradients.settle()
    if not math.isfinite(result.loss):
        raise session.diverged(f"the validation loss is {result.loss}")
    if progress.validated_at < progress.step:
        session.metrics.write("validation", progress.step, **result.to_json())
    progress.validation = result.to_json()
    progress.validated_at = progress.step
    with eager(settings):
        session.task.record(progress.step)
    session.gradients.settle()
    log.info("step %d  validation %s", progress.step, result)
    stopping = settings.training.early_stopping
    if progress.best_loss is None or result.loss < progress.best_loss - stopping.min_delta:
        progress.best_loss, progress.best_step, progress.without_improvement = result.loss, progress.step, 0
        session.export(session.paths.best, session.whole_weights())
        return
    progress.without_improvement += 1
    if 0 < stopping.patience <= progress.without_improvement and not session.finished:
        progress.stopped_early = True
        log.info("stopping early: no improvement in %d validations", progress.without_improvement)
