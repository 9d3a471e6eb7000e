"""The settings of a run's first stage, which is a run of its own."""

from typing import Any

from wmtp_worker.settings.schema import Settings

SUFFIX = "-value"


def value_name(run: str) -> str:
    """The run that trains the value model of `run`."""
    return run + SUFFIX


def value_run(settings: Settings) -> Settings:
    """Those of the run `<name>-value`: what `value` says takes the place of what the policy is trained with.

    The warm-up is the same share of the steps. `run.resume` is the policy's where it is a step.
    """
    value, training, run = settings.value, settings.training, settings.run
    steps = _or(value.max_steps, training.max_steps)
    resume = "auto" if run.stage == "all" and run.resume != "never" else run.resume
    stopping = {"patience": _or(value.patience, training.early_stopping.patience)}
    own_training = {
        "max_steps": steps,
        "warmup_steps": training.warmup_steps * steps // training.max_steps,
        "micro_batch_size": _or(value.micro_batch_size, training.micro_batch_size),
        "lr": _or(value.lr, training.lr),
        "early_stopping": training.early_stopping.model_copy(update=stopping),
    }
    every = {"every": _or(value.evaluation_every, settings.evaluation.every)}
    return settings.model_copy(
        update={
            "run": run.model_copy(update={"name": value_name(run.name), "stage": "value", "resume": resume}),
            "training": training.model_copy(update=own_training),
            "evaluation": settings.evaluation.model_copy(update=every),
        }
    )


def policy_run(settings: Settings) -> Settings:
    """Those of the second stage: `weighting.critic.value` names the run of the first, where there is one."""
    if not settings.trains_values:
        return settings
    critic = settings.weighting.critic.model_copy(update={"value": value_name(settings.run.name)})
    return settings.model_copy(update={"weighting": settings.weighting.model_copy(update={"critic": critic})})


def _or(given: Any, otherwise: Any) -> Any:
    return otherwise if given is None else given
