"""A reward model: a Llama that scores whole sequences, trained elsewhere and only read here."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging as transformers_logging

from wmtp_worker.errors import InputError
from wmtp_worker.model.folder import CONFIG, read_config
from wmtp_worker.model.stored import first_sentence
from wmtp_worker.model.value import backbone_states


class RewardModel(nn.Module):
    """`LlamaForSequenceClassification` with one label, on packed rows."""

    def __init__(self, llama: LlamaForSequenceClassification) -> None:
        super().__init__()
        self.llama = llama
        self.config = llama.config

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Float32 [batch, time]: at position t, the score of the sequence that ends with token t.

        Arguments as for the policy's trunk. The score of a whole sequence is the one at its last token.
        """
        states = backbone_states(self.llama.model, input_ids, position_ids, attention_mask)
        scores: torch.Tensor = self.llama.score(states).float().squeeze(-1)
        return scores


def reward_config(folder: Path) -> dict[str, Any]:
    """The configuration of a reward model. Raises `InputError` for a model that gives no single score."""
    config = read_config(folder)
    labels = len(config.get("id2label") or {}) or config.get("num_labels", 2)
    if labels != 1:
        raise InputError(
            f"a classifier with {labels} labels; a reward model has one",
            where=str(folder / CONFIG),
            fix='use a reward model: LlamaForSequenceClassification saved with "num_labels": 1',
        )
    return config


def load_reward(folder: Path) -> RewardModel:
    """An fp32 reward model, in evaluation mode. Raises `InputError` for a model that gives no single score."""
    reward_config(folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = LlamaForSequenceClassification.from_pretrained(
            folder,
            config=LlamaConfig.from_pretrained(folder),
            dtype=torch.float32,
            weights_only=True,  # of a pytorch_model.bin; safetensors go before it
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a broken folder raises anything
        raise InputError(
            f"the reward model does not load: {first_sentence(error)}", where=f"folder {folder}", fix="replace it"
        ) from error
    model, info = loaded
    if names := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise InputError(
            f"{len(names)} tensors are missing or left over, {names[0]} among them",
            where=f"folder {folder}",
            fix="use a whole LlamaForSequenceClassification, not a language model",
        )
    return RewardModel(model).eval()
