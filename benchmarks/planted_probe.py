"""What a checkpoint knows of each kind of token, and how the training weighs the kinds from there."""

import io
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from planted_data import END, FILLER, MISTAKEN, PLANTED, kinds
from rich.console import Console

from wmtp_worker.assets.resolve import dataset_folder, tokenizer_folder
from wmtp_worker.checkpoint.ledger import Ledger, Phases
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import IGNORE
from wmtp_worker.data.tokenizer import load_tokenizer
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.model.mtp import packed_attention_mask
from wmtp_worker.settings import Settings
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.tracking.metrics import MetricsLog
from wmtp_worker.training.bucket import RunBucket
from wmtp_worker.training.follower import NoTracking
from wmtp_worker.training.group import Group
from wmtp_worker.training.loss import Head, Weigh, head_losses_backward, mtp_labels
from wmtp_worker.training.policy import PolicyTask
from wmtp_worker.training.session import Session
from wmtp_worker.training.setup import build_session
from wmtp_worker.training.splits import load_split
from wmtp_worker.training.weights import Weighter
from wmtp_worker.weighting.spans import ahead

NAMES = {PLANTED: "planted", MISTAKEN: "mistaken", FILLER: "noise", END: "end"}
_KIND = "kind"


def open_session(settings: Settings, trains: bool = False) -> Session:
    """The session that `wmtp train` would train; with `trains` it can be."""
    paths, stop = RunPaths(settings.run.workdir, settings.run.name), StopRequest()
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    bucket = RunBucket(settings, paths, stop.check)
    heartbeat, console = Heartbeat(paths.heartbeat, paths.run), Console(file=io.StringIO())
    session = build_session(settings, paths, Group(torch.device("cpu")), stop, heartbeat, bucket, console)
    session.tracking = NoTracking()
    if trains:
        ledger = Ledger.begin(paths.ledger, paths.metrics, Phases(), gpus=1)
        session.open(MetricsLog(paths.metrics, 0), ledger)
    return session


class Probe:
    """A run as its checkpoints left it, with data whose batches also say the kind of each token."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._session = open_session(settings)
        task = self._session.task
        assert isinstance(task, PolicyTask)
        self._task, self._model, self._train = task, task.model, _with_kinds(task.data)
        tokenizer = load_tokenizer(tokenizer_folder(settings))
        folder = dataset_folder(settings)
        self._validation = _with_kinds(load_split(settings, folder, "validation", tokenizer, lambda: None))

    def points(self) -> list[dict[str, Any]]:
        """What there is to say of each checkpoint, in the order of the steps."""
        found = []
        for step in self._session.paths.steps():
            checkpoint = find(self._session.paths, step)
            assert checkpoint is not None  # a wanted step is there or an error
            self._session.restore(checkpoint)
            found.append({"step": step, "losses": self.losses()} | self.weight_mass())
        return found

    @torch.no_grad()
    def losses(self) -> dict[str, Any]:
        """Of the validation split by kind, nats: "head 1" and the mean of "heads"; "accuracy" of head 1."""
        model, rows = self._model, self._settings.training.micro_batch_size
        sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for batch in self._validation.epoch(rows):
            trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
            targets = mtp_labels(batch.labels, batch.segment_ids, model.heads)
            kind = ahead(batch.columns[_KIND], model.heads)
            for head in range(model.heads):
                logits, target = model.head_logits(head + 1, trunk), targets[..., head]
                loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="none")
                right = (logits.argmax(-1) == target).float()
                for code, name in NAMES.items():
                    chosen = (target != IGNORE) & (kind[..., head] == code)
                    found = [float(chosen.sum()), float(loss.view_as(right)[chosen].sum()), float(right[chosen].sum())]
                    sums[name, head] = [one + more for one, more in zip(sums[name, head], found, strict=True)]
        out = {}
        for name in NAMES.values():
            if sums[name, 0][0]:
                mean = [sums[name, head][1] / sums[name, head][0] for head in range(model.heads)]
                accuracy = sums[name, 0][2] / sums[name, 0][0]
                out[name] = {"head 1": mean[0], "heads": sum(mean) / len(mean), "accuracy": accuracy}
        return out

    def weight_mass(self, steps: int = 4) -> dict[str, Any]:
        """Share of all weight that each kind gets in the next steps' batches, weighed by the training's own code.

        "share": of the labelled positions, what uniform weights would give. The model is left as it is.
        """
        settings, progress, model = self._settings, self._session.progress, self._model
        weighter = Weighter(settings.weighting, settings.run.seed)
        weighter.memory.averages = self._task.averages
        weight, count, position = torch.zeros(len(NAMES)), torch.zeros(len(NAMES)), progress.position
        for step in range(steps):
            rows, position = self._train.sampler.take(position, settings.training.micro_batch_size)
            batch = self._train.batch(rows)
            targets = mtp_labels(batch.labels, batch.segment_ids, model.heads)
            (weigh,) = weighter.begin(progress.step + step, [batch], [targets])
            seen: list[torch.Tensor] = []
            counts = (targets != IGNORE).sum((0, 1)).float()
            head_losses_backward(model, batch, targets, _watched(weigh, seen), counts, settings.training.precision)
            model.zero_grad()
            labelled = targets != IGNORE
            kind = ahead(batch.columns[_KIND], model.heads)[labelled].long()
            weight.index_add_(0, kind, torch.stack(seen, -1)[labelled])
            count.index_add_(0, kind, torch.ones(len(kind)))
        return {
            "mass": {name: float(weight[code] / weight.sum()) for code, name in NAMES.items()},
            "share": {name: float(count[code] / count.sum()) for code, name in NAMES.items()},
        }


def _with_kinds(data: Dataset) -> Dataset:
    return data.with_columns(**{_KIND: [kinds(sample).astype("float32") for sample in data.samples]})


def _watched(weigh: Weigh, seen: list[torch.Tensor]) -> Weigh:
    def watched(head: Head) -> torch.Tensor:
        seen.append(weigh(head))
        return seen[-1]

    return watched
