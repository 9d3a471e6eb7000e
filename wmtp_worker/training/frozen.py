"""Models that only look at the data, before the policy is trained on it: reference, value and reward model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from wmtp_worker.assets.resolve import reference_folder, reward_folder, value_weights
from wmtp_worker.data.packing import Batch
from wmtp_worker.data.tokenizer import load_tokenizer, tokenizer_files
from wmtp_worker.errors import InputError
from wmtp_worker.model.compat import Named, check_same_tokens, check_vocabulary
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import base_digest, load
from wmtp_worker.model.mtp import packed_attention_mask
from wmtp_worker.model.reward import load_reward, reward_config
from wmtp_worker.model.stored import map_pickled
from wmtp_worker.model.value import rebuild_value
from wmtp_worker.settings import Settings
from wmtp_worker.training.families import REFERENCE_LOSS, REWARD, VALUE
from wmtp_worker.training.linear_cross_entropy import LinearCrossEntropy
from wmtp_worker.training.loss import mtp_labels

log = logging.getLogger(__name__)

# what a model says of each token of a batch, both on its device: float32 [rows, time]
Judge = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Frozen:
    """A model whose configuration was read, and nothing else yet.

    `column` is what it says of each token, `key` the setting that names it; `load` gives it on a device.
    """

    column: str
    key: str
    path: Path
    config: LlamaConfig
    load: Callable[[torch.device], Judge]
    tokenizer: str | None = None  # digest of the one that it was trained with, where that is known

    @property
    def name(self) -> str:
        return f"the {self.column.split('_')[0]} model ({self.path})"

    def digest(self, poll: Callable[[], None]) -> str:
        """SHA-256 (hex) over its files; `poll` is called before each."""
        return base_digest(self.path, poll)

    def check(self, policy: Named, longest: int, tokenizer: str = "") -> None:
        """Raise `InputError` unless it reads the policy's tokens, and samples of `longest` tokens.

        `tokenizer`: digest of the policy's.
        """
        check_vocabulary(policy, self.name, self.config.vocab_size)
        if self.tokenizer is not None:
            if self.tokenizer != tokenizer:
                raise InputError(
                    f"{self.name} was trained with another tokenizer than that of {policy.name}",
                    where=self.key,
                    fix="use the tokenizer that it was trained with, or train another one",
                )
        elif tokenizer_files(self.path):
            check_same_tokens(policy, Named(self.name, load_tokenizer(self.path)))
        else:
            log.warning("%s has no tokenizer beside it: believed to have the policy's", self.name)
        if longest > (positions := self.config.max_position_embeddings):
            raise InputError(
                f"{self.name} has {positions} positions, the longest sample {longest} tokens",
                where=self.key,
                fix=f"set data.sequence_length={positions}, or take another model",
            )


def frozen_models(settings: Settings) -> list[Frozen]:
    """Those that the weighting family needs. Raises `InputError` for what is not there or is no such model."""
    found = []
    if (path := reference_folder(settings)) is not None:
        found.append(_reference(path))
    if (path := value_weights(settings)) is not None and not settings.weighting.learns_values:
        found.append(value_model(path))
    if (path := reward_folder(settings)) is not None:
        found.append(reward_model(path))
    return found


def _reference(path: Path) -> Frozen:
    stored = open_stored(path)

    def on(device: torch.device) -> Judge:
        model = load(path, stored.heads).to(device).eval()  # type: ignore[arg-type]  # transformers hides nn.Module.to

        def losses(batch: Batch) -> torch.Tensor:
            """Cross-entropy of each token by head 1, in nats; 0 for the first of a sequence, which nothing predicts."""
            mask = packed_attention_mask(batch.segment_ids)
            trunk = model.trunk(batch.input_ids, batch.position_ids, mask)
            targets = mtp_labels(batch.input_ids, batch.segment_ids, 1)[..., 0]
            found = LinearCrossEntropy(model.head_hidden(1, trunk), model.lm_head.weight, targets).results()
            return F.pad(found.cross_entropy[:, :-1], (1, 0))

        return losses

    return Frozen(REFERENCE_LOSS, "weighting.reference", path, LlamaConfig.from_dict(stored.config), on)


def value_model(path: Path) -> Frozen:
    """A value model that was trained before. Raises `InputError` for a file that holds none."""
    content = map_pickled(path)
    config: dict[str, Any] = content.get("config", {})
    try:
        llama, tensors = LlamaConfig.from_dict(config), dict(content["model"])
    except Exception as error:  # a config that makes no sense raises anything
        raise InputError(
            "holds no config and model", where=str(path), fix="use the weights of a run that trained values"
        ) from error

    def on(device: torch.device) -> Judge:
        return _per_token(rebuild_value(config, tensors, str(path)).to(device).eval())

    # a run of ours remembers it
    tokenizer = str(content.get("identity", {}).get("model.tokenizer", "")).removeprefix("sha256 ")
    return Frozen(VALUE, "weighting.critic.value", path, llama, on, tokenizer or None)


def reward_model(path: Path) -> Frozen:
    """A reward model. Raises `InputError` for one that gives no single score."""

    def on(device: torch.device) -> Judge:
        return _per_token(load_reward(path).to(device).eval())

    key = "weighting.critic.reward_model"
    return Frozen(REWARD, key, path, LlamaConfig.from_dict(reward_config(path)), on)


def _per_token(model: torch.nn.Module) -> Judge:
    def judge(batch: Batch) -> torch.Tensor:
        found: torch.Tensor = model(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
        return found

    return judge
