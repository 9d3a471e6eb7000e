"""Settings that are fine one by one but contradict each other."""

from collections.abc import Iterator

from wmtp_worker.settings.schema import FIELDS, MODEL_SHAPE, Settings
from wmtp_worker.settings.values import Given, Problem, nearest


def contradictions(settings: Settings, given: dict[str, Given]) -> Iterator[Problem]:
    """Every contradiction, with the origin of each value that takes part in it."""
    yield from _model(settings, given)
    yield from _training(settings)
    for key in settings.run.accept_changes:
        if key not in FIELDS:
            near = nearest(key, tuple(FIELDS))
            fix = f"did you mean {near}?" if near else "name settings by dotted key, as training.lr"
            yield Problem(
                f"run.accept_changes names the unknown setting {key!r}",
                settings.sources["run.accept_changes"],
                fix,
            )


def _model(settings: Settings, given: dict[str, Given]) -> Iterator[Problem]:
    model, data = settings.model, settings.data
    if data.sequence_length <= model.heads:
        yield _clash(
            settings,
            "data.sequence_length",
            "must be greater than",
            "model.heads",
            "make the sequence longer",
        )
    if model.path is not None:
        # the folder brings its own shape; one given by hand would silently not count
        for key in MODEL_SHAPE:
            if given[key].explicit:
                what = f"{key} has no effect while model.path={model.path!r} ({settings.sources['model.path']})"
                yield Problem(what, given[key].source, f"drop {key}, or set model.path=null to build a new model")
        return
    if data.sequence_length > model.max_position_embeddings:
        longest = "model.max_position_embeddings"
        yield _clash(
            settings,
            "data.sequence_length",
            "must not be greater than",
            longest,
            "shorten the one or raise the other",
        )
    if model.hidden_size % model.attention_heads:
        yield _clash(
            settings,
            "model.hidden_size",
            "must be a multiple of",
            "model.attention_heads",
            "change one of them",
        )
    elif model.hidden_size // model.attention_heads % 2:
        fix = "rotary positions need an even width per head"
        yield _clash(settings, "model.hidden_size", "must be an even multiple of", "model.attention_heads", fix)
    if model.attention_heads % model.key_value_heads:
        yield _clash(
            settings,
            "model.attention_heads",
            "must be a multiple of",
            "model.key_value_heads",
            "change one of them",
        )


def _training(settings: Settings) -> Iterator[Problem]:
    training, run = settings.training, settings.run
    if training.warmup_steps > training.max_steps:
        yield _clash(
            settings,
            "training.warmup_steps",
            "must not be greater than",
            "training.max_steps",
            "shorten the warm-up",
        )
    if training.early_stopping.patience and not settings.evaluation.every:
        what = "training.early_stopping.patience counts validations, but evaluation.every=0 has only one"
        fix = "set evaluation.every, or patience to 0"
        yield Problem(what, settings.sources["training.early_stopping.patience"], fix)
    if isinstance(run.resume, int) and run.resume > training.max_steps:
        yield _clash(settings, "run.resume", "must not be greater than", "training.max_steps", "take an earlier step")


def _clash(settings: Settings, one: str, relation: str, other: str, fix: str) -> Problem:
    flat, sources = settings.flat(), settings.sources
    what = f"{one}={flat[one]} {relation} {other}={flat[other]}"
    where = sources[one] if sources[one] == sources[other] else f"{sources[one]} and {sources[other]}"
    return Problem(what, where, fix)
