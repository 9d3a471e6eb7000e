"""What the two stages are made of: data, model and objective of the value model, and of the policy."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wmtp_worker.assets.resolve import (
    backbone_folder,
    dataset_digest,
    dataset_folder,
    model_folder,
    reward_folder,
    tokenizer_folder,
    value_weights,
)
from wmtp_worker.checkpoint.export import read_facts
from wmtp_worker.data.dataset import Dataset, rewards
from wmtp_worker.data.pairs import Bin, Pair, PairRows, make_pairs
from wmtp_worker.data.problems import Split
from wmtp_worker.data.tokenizer import digest as tokenizer_digest
from wmtp_worker.data.tokenizer import load_tokenizer
from wmtp_worker.errors import InputError
from wmtp_worker.model.compat import Named, check_same_tokens, check_vocabulary
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import base_digest, build, config_with_heads, load
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import MTPForCausalLM, checkpoint_activations
from wmtp_worker.model.stored import map_pickled
from wmtp_worker.model.value import ValueModel, take_over, value_on
from wmtp_worker.settings import Settings
from wmtp_worker.settings.stages import value_name
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.training.auxiliary import AuxiliaryValues, check_data
from wmtp_worker.training.columns import Policy, add_columns
from wmtp_worker.training.families import REWARD
from wmtp_worker.training.frozen import reward_model, value_model
from wmtp_worker.training.group import Group
from wmtp_worker.training.policy import PolicyTask
from wmtp_worker.training.probe import Probe
from wmtp_worker.training.scores import Scorer
from wmtp_worker.training.splits import data_format, load_split
from wmtp_worker.training.values import Exam, ValueTask

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# by dotted key, SHA-256 (hex) of what a setting names: what it holds counts, not where it lies
Digests = Mapping[str, str | None]
# says what is being done, and may raise to stop
Poll = Callable[[str], None]


def policy_task(
    settings: Settings, group: Group, poll: Poll, heartbeat: Heartbeat, scorer: Scorer
) -> tuple[PolicyTask, Digests]:
    """Stage 2, with what frozen models say of the data. Raises `InputError` for data and models that do not fit."""
    data = _Data(settings, poll)
    tokenizer = data.tokenizer
    train, validation = data.split("train"), data.split("validation")
    poll("model")
    with heartbeat.during("model"):
        base = model_folder(settings)
        model = load(base, settings.model.heads, unread=group.world > 1) if base else build(settings, tokenizer)
        check_fit(settings, model.config, tokenizer)
        if settings.lora.rank:
            add_lora(model, **settings.lora.model_dump(), seed=settings.run.seed)
        if settings.training.checkpoint_activations == "full":
            checkpoint_activations(model)
        base_model_digest = base_digest(base, lambda: poll("model")) if base else None
    digests: dict[str, str | None] = {**data.digests, "model.path": base_model_digest}
    if settings.weighting.critic.value == value_name(settings.run.name):
        _check_first_stage(settings, digests, poll)
    values = judge = None
    if settings.weighting.learns_values:
        check_data(settings, train)
        digests["weighting.critic.value"] = _add_value_head(settings, model, train, data.policy, poll)
        values = AuxiliaryValues(settings, model, group)
        judge = values.judge
    train, frozen = add_columns(settings, train, data.policy, scorer)
    record = RunPaths(settings.run.workdir, settings.run.name).record
    probe = Probe(record.weights, settings, train, tokenizer, model, group, judge)
    return PolicyTask(settings, model, group, train, validation, probe, values), digests | frozen


def _add_value_head(settings: Settings, model: MTPForCausalLM, data: Dataset, policy: Policy, poll: Poll) -> str | None:
    """Put the head of stage 1's value model on the policy, or a new one; returns the digest of that model's file."""
    _check_trunk("weighting.critic.auxiliary", "0", "the policy", model)
    if (path := value_weights(settings)) is None:
        model.add_value_head(settings.value.hidden, settings.run.seed)
        return None
    found = value_model(path)
    found.check(policy.tokens, max(len(sample.ids) for sample in data.samples), policy.digest)
    content = map_pickled(path)
    take_over(model, content.get("config", {}), content["model"], str(path))
    return found.digest(lambda: poll("model"))


def _check_trunk(key: str, otherwise: str, name: str, model: MTPForCausalLM) -> None:
    if model.config.num_hidden_layers < 2:
        raise InputError(
            f"the policy has one layer, which is head 1: there is no trunk for {key}",
            where=name,
            fix=f"set {key}={otherwise}",
        )


def _check_first_stage(settings: Settings, digests: Digests, poll: Poll) -> None:
    """Raise `InputError` where this run's own value model was trained on other data, or from another model."""
    path, named = value_weights(settings), settings.flat()
    made_with = {} if path is None else read_facts(path).get("identity", {})
    if not made_with:
        return
    now = {"value.backbone": None, **digests}
    if settings.value.backbone is not None:
        del now["model.path"]
        try:
            folder = backbone_folder(settings)
            now["value.backbone"] = base_digest(folder, lambda: poll("model")) if folder else None
        except InputError as error:  # it is not needed any more, and so not fetched
            log.warning("%s (%s): not compared with what the value model began as", error.what, error.where)
            del now["value.backbone"]
    for key, digest in now.items():
        if (then := made_with.get(key)) != (wanted := digest and f"sha256 {digest}"):
            raise InputError(
                f"the value model of run {settings.run.name!r} was trained with another {key}: {then or 'none'} then, "
                f"{f'{wanted} now ({named[key]})' if wanted else 'none now'}",
                where=str(path),
                fix="set it back, choose another --run-name, train both anew with --resume never, or keep the value "
                f"model on purpose: --set weighting.critic.value={path}",
            )


def check_fit(settings: Settings, config: "LlamaConfig", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raise `InputError` unless the policy has positions for the rows, and an embedding for each token."""
    longest = config.max_position_embeddings
    if settings.data.sequence_length > longest:
        raise InputError(
            f"data.sequence_length={settings.data.sequence_length} is longer than the model's {longest} positions",
            where=settings.sources.get("data.sequence_length", "settings"),
            fix=f"set data.sequence_length to {longest} or less",
        )
    check_vocabulary(Named("model.tokenizer", tokenizer), "the policy", config.vocab_size)


def _check_second_stage(settings: Settings, data: "_Data", longest: int) -> None:
    """Raise what the policy would be refused for before a value model is trained for it."""
    if (base := model_folder(settings)) is not None:
        stored = open_stored(base)
        config = config_with_heads(stored.config, settings.model.heads, str(stored.files[0]))
        check_fit(settings, config, data.tokenizer)
    if (path := reward_folder(settings)) is not None:
        reward_model(path).check(data.policy.tokens, longest)


def value_task(settings: Settings, group: Group, poll: Poll, heartbeat: Heartbeat) -> tuple[ValueTask, Digests]:
    """Stage 1. Raises `InputError` where nothing tells right from wrong, and for models that do not fit."""
    data = _Data(settings, poll)
    train, train_pairs = _labelled(settings, data, "train")
    validation, pairs = _labelled(settings, data, "validation")
    exam = Exam(settings, validation, pairs)
    rows: PairRows | Dataset = train
    if settings.value.objective == "pairwise":
        rows = PairRows(train, train_pairs, settings.run.seed, settings.data.packing)
    poll("model")
    with heartbeat.during("model"):
        base = backbone_folder(settings)
        longest = max(len(sample.ids) for sample in (*train.samples, *validation.samples))
        _check_second_stage(settings, data, longest)
        model = _value_model(settings, base, data, longest, unread=group.world > 1)
        key = "model.path" if settings.value.backbone is None else "value.backbone"
        digests = {**data.digests, key: base_digest(base, lambda: poll("model")) if base else None}
    return ValueTask(settings, model, group, rows, exam), digests


def examination(settings: Settings, model: ValueModel, device: torch.device, check: Callable[[], None]) -> ValueTask:
    """A trained value model with what is needed to validate it; `check` is called now and then, and may raise."""
    data = _Data(settings, lambda phase: check())
    validation, pairs = _labelled(settings, data, "validation")
    check_vocabulary(data.policy.tokens, "the value model", model.config.vocab_size)
    return ValueTask(settings, model.to(device), Group(device), validation, Exam(settings, validation, pairs))


class _Data:
    """The data set and the tokenizer that its samples are made with."""

    def __init__(self, settings: Settings, poll: Poll) -> None:
        poll("data")
        self._settings = settings
        self._poll = poll
        self.folder: Path = dataset_folder(settings)
        tokens = tokenizer_folder(settings)
        self.tokenizer = load_tokenizer(tokens)
        self.policy = Policy(Named(f"the policy ({tokens})", self.tokenizer), tokenizer_digest(tokens))

    def split(self, split: Split, labelled: bool = False) -> Dataset:
        """Those samples that the policy needs, or all that are known to be right or wrong."""
        poll = partial(self._poll, "data")
        return load_split(self._settings, self.folder, split, self.tokenizer, poll, "all" if labelled else None)

    @property
    def digests(self) -> dict[str, str]:
        found = dataset_digest(self.folder, data_format(self._settings))
        return {"data.dataset": found, "model.tokenizer": self.policy.digest}


def _labelled(settings: Settings, data: _Data, split: Split) -> tuple[Dataset, list[Pair]]:
    """All solutions of a split with their rewards, and its pairs. Raises `InputError` where there is no pair."""
    found = data.split(split, labelled=True)
    choice = settings.data.pairs
    try:
        pairs = make_pairs(
            found.samples,
            per_problem=choice.per_problem,
            length_share=choice.length_share,
            seed=settings.run.seed,
            difficulties=found.difficulties,
            bins=[Bin(int(low), int(high), weight) for low, high, weight in choice.difficulty_bins],
        )
    except InputError as error:
        where = f"the {split} split of {data.folder} ({error.where})"
        raise InputError(f"values cannot be learned: {error.what}", where=where, fix=error.fix) from None
    return found.with_columns(**{REWARD: rewards(found.samples)}), pairs


def _value_model(settings: Settings, base: Path | None, data: "_Data", longest: int, unread: bool) -> ValueModel:
    """The value model as it is before it learned anything."""
    value, policy = settings.value, data.policy.tokens
    start = load(base, open_stored(base).heads, unread) if base else build(settings, data.tokenizer)
    name = "the new model" if base is None else f"the value model's backbone ({base})"
    check_vocabulary(policy, name, start.config.vocab_size)
    if base is not None and value.backbone is not None:
        check_same_tokens(policy, Named(name, load_tokenizer(base)))
    if longest > (positions := start.config.max_position_embeddings):
        raise InputError(
            f"{name} has {positions} positions, the longest sample {longest} tokens",
            where="value.backbone",
            fix=f"set data.sequence_length={positions}, or take another model",
        )
    if value.trunk_head:
        _check_trunk("value.trunk_head", "false", name, start)
    model = value_on(start, value.hidden, settings.run.seed, value.trunk_head)
    if value.lora_rank:
        adapters = settings.lora.model_dump() | {"rank": value.lora_rank}
        add_lora(model.backbone, **adapters, seed=settings.run.seed)
    if settings.training.checkpoint_activations == "full":
        checkpoint_activations(model.backbone)
    return model
