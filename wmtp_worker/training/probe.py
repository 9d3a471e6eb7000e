"""A few training samples that are weighed again and again, for people to see what a weighting looks at.

`weights.jsonl` in the run's logs: in the first line the samples (the end of the prompt, the solution's tokens as text),
then a line for each step at which they were weighed, with `weights[sample][token][head]`. The weights are the ones the
training would give these samples if they were its next step, and stand at the token that the head predicts.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import Batch, pack
from wmtp_worker.errors import WorkerError
from wmtp_worker.model.mtp import MTPForCausalLM, TrunkOutput, packed_attention_mask
from wmtp_worker.settings import Settings
from wmtp_worker.storage.atomic import write_text
from wmtp_worker.training.group import Group
from wmtp_worker.training.linear_cross_entropy import LinearCrossEntropy, LossForm, TokenLosses
from wmtp_worker.training.loss import Beside, Head, Weigh, autocast, mtp_labels
from wmtp_worker.training.weights import Weighter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# so the file stays below about 1 MB, however long the run
SAMPLES, TOKENS, PROMPT, RECORDS = 3, 160, 600, 24


@dataclass(frozen=True)
class _Chosen:
    """A sample of the data, and where it lies in the probe's rows."""

    index: int
    row: int
    start: int


class Probe:
    """The first correct solution of each of the first problems that fit: the same for every family on the same data."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        data: Dataset,
        tokenizer: "PreTrainedTokenizerFast",
        model: MTPForCausalLM,
        group: Group,
        judge: Beside | None = None,
    ) -> None:
        """`judge`: says what the weights follow from and no column has, as `head_losses_backward` is told by."""
        self._path = path
        self._settings = settings
        self._data = data
        self._model = model
        self._device = group.device
        self._writes = group.first
        self._judge = judge
        self._form = LossForm(settings.training.label_smoothing, settings.training.z_loss)
        indices = _first_correct(data)
        self._rows = pack(indices, [len(sample.ids) for sample in data.samples], data.sequence_length)
        places = [
            _Chosen(index, row, _start(data, line, index)) for row, line in enumerate(self._rows) for index in line
        ]
        self._chosen = sorted(places, key=lambda chosen: chosen.index)
        weighting = settings.weighting
        self._header = {
            "family": weighting.family,
            "control": weighting.control,
            "heads": model.heads,
            "samples": [_described(data, chosen.index, tokenizer) for chosen in self._chosen],
        }

    def record(self, step: int, weighter: Weighter) -> None:
        """Weigh the samples as `weighter` would now, and write that down, in the place of what was said of later steps.

        Nothing that the training depends on is changed, and nothing raised where it cannot be: that is warned of.
        """
        if not self._chosen or not self._is_due(step):
            return
        try:
            weights = self._weigh(step, weighter.aside())  # every rank may have a part of the model
            if not self._writes:
                return
            # a process before this one may have come further than its checkpoint
            records = [line for line in self._recorded() if line["step"] < step]
            lines = [self._header, *records, {"step": step, "weights": weights}]
            write_text(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        except WorkerError as error:
            log.warning("the probe's weights of step %d are not recorded: %s", step, error)

    def _is_due(self, step: int) -> bool:
        """At the last step, and at every validation or, where those are many, every so many."""
        every, last = self._settings.evaluation.every, self._settings.training.max_steps
        if every == 0 or step >= last:
            return True
        stride = math.ceil(last / every / RECORDS)
        return step // every % stride == 0

    def _recorded(self) -> list[dict[str, Any]]:
        """The records there are, unless they are of other samples."""
        try:
            header, *records = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):
            return []
        return records if header == self._header else []

    def _weigh(self, step: int, weighter: Weighter) -> list[list[list[float]]]:
        size = self._settings.training.micro_batch_size
        batches = [self._data.batch(self._rows[i : i + size]) for i in range(0, len(self._rows), size)]
        targets = [mtp_labels(batch.labels, batch.segment_ids, self._model.heads) for batch in batches]
        weighs = weighter.begin(step, batches, targets)
        self._model.eval()  # type: ignore[no-untyped-call]
        try:
            found = [
                self._weigh_batch(batch.to(self._device), target.to(self._device), weigh)
                for batch, target, weigh in zip(batches, targets, weighs, strict=True)
            ]
        finally:
            self._model.train()
        weights = torch.cat(found)
        return [self._at_tokens(weights[chosen.row], chosen) for chosen in self._chosen]

    @torch.no_grad()
    def _weigh_batch(self, batch: Batch, targets: torch.Tensor, weigh: Weigh) -> torch.Tensor:
        """Every head's weights, [batch, time, heads]; the policy runs only where the family looks at what it makes."""
        precision = self._settings.training.precision

        @cache
        def trunk() -> TrunkOutput:
            return self._model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))

        @cache
        def look(number: int) -> TokenLosses:
            with autocast(self._device, precision):
                hidden = self._model.head_hidden(number, trunk())
                return LinearCrossEntropy(
                    hidden, self._model.lm_head.weight, targets[..., number - 1], self._form
                ).tokens()

        if self._judge is not None:
            with autocast(self._device, precision):
                batch = self._judge(trunk(), batch)
        numbers = range(1, self._model.heads + 1)
        heads = [Head(number, batch, targets[..., number - 1], partial(look, number)) for number in numbers]
        return torch.stack([weigh(head).cpu() for head in heads], -1)

    def _at_tokens(self, weights: torch.Tensor, chosen: _Chosen) -> list[list[float]]:
        """What each head gives to each token of a solution: head k stands k positions before it."""
        sample = self._data.samples[chosen.index]
        first = chosen.start + sample.prompt_length
        end = min(chosen.start + len(sample.ids), first + TOKENS)
        heads = range(1, self._model.heads + 1)
        return [
            [_rounded(weights[at - k, k - 1]) if at - k >= chosen.start else 0.0 for k in heads]
            for at in range(first, end)
        ]


def _first_correct(data: Dataset) -> list[int]:
    found: dict[int, int] = {}
    for index, sample in enumerate(data.samples):
        if sample.reward == 1 and len(found) < SAMPLES:
            found.setdefault(sample.problem, index)
    return list(found.values())


def _start(data: Dataset, row: Sequence[int], index: int) -> int:
    return sum(len(data.samples[other].ids) for other in row[: row.index(index)])


def _described(data: Dataset, index: int, tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    sample = data.samples[index]
    prompt, solution = sample.ids[: sample.prompt_length].tolist(), sample.ids[sample.prompt_length :].tolist()
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    return {
        "problem": sample.problem,
        "prompt": text[-PROMPT:],
        "tokens": pieces(tokenizer, solution[:TOKENS]),
        "left_out": max(0, len(solution) - TOKENS),
    }


def pieces(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> list[str]:
    """The text of each token; together they are the text of all. A character of several tokens is the last one's."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        text = text if end == len(ids) else text.rstrip("\ufffd")  # the replacement of an unfinished character
        texts.append(text[len(before) :])
        before = text
    return texts


def _rounded(weight: torch.Tensor) -> float:
    return float(f"{float(weight):.3g}")
