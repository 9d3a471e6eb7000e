"""What the numbers say, in sentences that claim no more than they show."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wmtp_worker.tracking.report.chart import spell
from wmtp_worker.tracking.report.record import Numbers, Record

# what must be equal for validation losses to be of the same thing
_MEASURED_BY = ("data.dataset", "data.sequence_length", "evaluation.max_batches", "model.heads", "model.tokenizer")
_SCHEDULE = "training.max_steps"


@dataclass(frozen=True)
class Verdict:
    mark: str  # good, warning, bad
    headline: str
    sentences: list[str]


@dataclass(frozen=True)
class Losses:
    """Validation losses of a run: nats per token, of a value model those of its objective."""

    steps: list[int]
    values: list[float]

    @property
    def best(self) -> int:
        """Where the lowest is."""
        return int(np.argmin(self.values))


def validation(record: Record) -> Losses | None:
    columns = record.of("validation")
    loss = columns["loss" if "loss" in columns else "value_loss"]
    known = np.isfinite(loss)
    if not known.any():
        return None
    return Losses(columns["step"][known].astype(int).tolist(), loss[known].tolist())


def of_run(record: Record) -> Verdict:
    mark, headline = _end(record)
    if mark == "good" and (doubt := _doubt(record)):
        mark, headline = "warning", f"{headline} {doubt}"
    return Verdict(
        mark, headline, [text for text in (_loss(record), _heads(record), _lost(record), _cost(record)) if text]
    )


def _doubt(record: Record) -> str:
    """Why a run that ended as it should is no success; empty if nothing says so."""
    losses, heads = validation(record), _by_head(record)
    if losses is not None and losses.values[-1] > losses.values[0]:
        return "But the validation loss rose."
    if losses is not None and len(losses.values) > 1 and losses.values[-1] == losses.values[0]:
        return "But the validation loss did not fall."
    if heads and not any(values[-1] < values[0] for values in heads):
        return "But no head improved."
    return ""


def _by_head(record: Record) -> list[Numbers]:
    """The validation losses of each head; empty where they were measured less than twice."""
    heads = [values[np.isfinite(values)] for values in record.of("validation").each("head_loss")]
    return [] if not heads or min(map(len, heads)) < 2 else heads


def _end(record: Record) -> tuple[str, str]:
    planned = record.settings.get(_SCHEDULE)
    at = f"step {record.step:,}"
    of = f" of {planned:,}" if isinstance(planned, int) and planned > record.step else ""
    if record.status == "finished":
        if of:
            return "good", f"Finished: stopped early at {at}{of}, as the validation loss fell no more."
        return "good", f"Finished after {counted(record.step, 'step')}."
    if record.status == "notice":
        why = f" ({record.detail})" if record.detail else ""
        return "warning", f"Interrupted at {at}{of}{why}. The same command goes on."
    if record.status == "failed":
        return "bad", f"Ended with an error at {at}{of}: {record.detail or 'see training.log'}"
    return "warning", f"No end is on record at {at}{of}: it is still running, or was killed. The same command goes on."


def _loss(record: Record) -> str:
    losses = validation(record)
    if losses is None:
        return "There is no validation yet, so nothing can be said of what it learned."
    first, last, best = losses.values[0], losses.values[-1], losses.values[losses.best]
    if len(losses.values) == 1:
        return f"Validation loss {spell(first)} at step {losses.steps[0]:,}, measured once."
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    text = f"Validation loss {verb} from {spell(first)} (step {losses.steps[0]:,}) to {spell(last)}"
    if losses.best == len(losses.values) - 1:
        return f"{text}, its lowest."
    return f"{text}; it was lowest at step {losses.steps[losses.best]:,}, with {spell(best)}."


def _heads(record: Record) -> str:
    if not (heads := _by_head(record)):
        return ""
    worse = [number for number, values in enumerate(heads, start=1) if values[-1] >= values[0]]
    if not worse:
        return f"All {len(heads)} heads improved." if len(heads) > 1 else ""
    names = ", ".join(map(str, worse))
    if len(worse) == len(heads):
        return "No head improved."
    return f"Head {names} did not improve, the others did." if len(worse) == 1 else f"Heads {names} did not improve."


def _lost(record: Record) -> str:
    items = record.losses.get("interruptions", [])
    if not items:
        return "Nothing interrupted it." if record.status == "finished" else ""
    lost = counted(int(record.losses["steps"]), "step")
    return f"{counted(len(items), 'interruption')}: {lost} done again."


def _cost(record: Record) -> str:
    if record.running is None:
        return ""
    return f"It ran for {duration(record.running)}{_price(record)}."


def _price(record: Record) -> str:
    if record.cost is None:
        return ""
    if record.unpriced:
        return f"; as far as prices are known, that cost {record.cost:,.2f} in the currency of host.price_per_hour"
    return f", which cost {record.cost:,.2f} in the currency of host.price_per_hour"


def of_comparison(records: Sequence[Record]) -> Verdict:
    """Which run has the lowest validation loss, by how much, and what that is worth."""
    found = [(record, losses) for record in records if (losses := validation(record)) is not None]
    caveats = _caveats(records)
    if len(found) < 2:
        return Verdict("warning", "There is too little to compare: fewer than two runs were validated.", caveats)
    found.sort(key=lambda item: item[1].values[item[1].best])
    lowest = [losses.values[losses.best] for _, losses in found]
    (best, _), (second, _) = found[:2]
    gap = lowest[1] - lowest[0]
    if gap == 0:
        headline = f"{best.name} and {second.name} reach the same validation loss, {spell(lowest[0])}."
    else:
        headline = (
            f"{best.name} has the lowest validation loss, {spell(lowest[0])}: "
            f"{gap:.2g} ({gap / lowest[1]:.2%}) below {second.name}."
        )
    return Verdict("warning" if caveats else "good", headline, [*_spreads(found), *caveats])


def _spreads(found: Sequence[tuple[Record, Losses]]) -> list[str]:
    groups: dict[str, list[float]] = defaultdict(list)
    for record, losses in found:
        groups[record.family].append(losses.values[losses.best])
    return [
        f"{family or 'runs'}: mean {spell(statistics.fmean(values))}, standard deviation "
        f"{statistics.stdev(values):.2g} over {len(values)} runs."
        for family, values in groups.items()
        if len(values) > 1
    ]


def _caveats(records: Sequence[Record]) -> list[str]:
    caveats = []
    differing = [key for key in _MEASURED_BY if len({repr(record.settings.get(key)) for record in records}) > 1]
    if differing:
        caveats.append(f"The losses are not of the same thing: {', '.join(differing)} differ.")
    if len({record.step for record in records}) > 1:
        caveats.append("The runs have not taken equally many steps.")
    seeds: dict[str, set[object]] = defaultdict(set)
    for record in records:
        seeds[record.family].add(record.settings.get("run.seed"))
    if any(len(of_family) < 2 for of_family in seeds.values()):
        caveats.append("One seed: a small difference may be chance. Several seeds of each family would tell.")
    return caveats


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 9.95 * size else 0}f} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1000:.2g} ms"
