"""The value model: how good a solution is, judged after each of its tokens.

A Llama with a small MLP on top: one of its own, or the policy's trunk, which then stays as it is, unless the policy
takes the MLP over to train it on.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from wmtp_worker.errors import InputError
from wmtp_worker.model.loading import load, load_tensors
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import MTPForCausalLM, run_layers
from wmtp_worker.model.unread import numbers
from wmtp_worker.model.value_head import ValueHead

_WIDTH = "value_width"  # in the config of a saved value model


class ValueModel(nn.Module):
    """A Llama backbone with a `ValueHead`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = LlamaModel(config)
        self.head = ValueHead(config.hidden_size, getattr(config, _WIDTH))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Float32 [batch, time]: at position t, the value after token t.

        `input_ids`, `position_ids`: int64 [batch, time]. `attention_mask`: bool [batch, 1, time, time], as for the
        policy, so that samples packed into one row do not see each other.
        """
        values: torch.Tensor = self.head(backbone_states(self.backbone, input_ids, position_ids, attention_mask))
        return values


def backbone_states(
    backbone: LlamaModel, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """The last hidden states, normed, [batch, time, hidden_size]; arguments as for `ValueModel.forward`."""
    last = run_layers(backbone, len(backbone.layers), input_ids, position_ids, attention_mask)
    normed: torch.Tensor = backbone.norm(last.hidden)
    return normed


def value_from(folder: Path, heads: int, width: int, seed: int) -> ValueModel:
    """`value_on` the layers of a stored policy that has `heads` heads, or of a plain Llama (1).

    Raises `InputError` where the folder does not load.
    """
    return value_on(load(folder, heads), width, seed)


def value_on(policy: MTPForCausalLM, width: int, seed: int, trunk_head: bool = False) -> ValueModel:
    """A new fp32 value model on the policy's layers, which become its own; its MLP is drawn from `seed` alone.

    Without `trunk_head` they are all those of head 1, with its norm. With it they are the trunk, frozen, under a norm
    that is new; then the policy must have at least two layers.
    """
    config = LlamaConfig.from_dict(policy.config.to_dict() | {_WIDTH: width})
    backbone = policy.model
    if trunk_head:
        config.num_hidden_layers -= 1
        backbone.layers = backbone.layers[:-1]
        backbone.requires_grad_(False)
        backbone.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.device("meta"):
            value = ValueModel(config)
        value.head = ValueHead(config.hidden_size, width)
    value.backbone = backbone
    value.backbone.config = config
    return value


def is_value_model(config: dict[str, Any]) -> bool:
    """Whether a saved config is that of a value model."""
    return type(config.get(_WIDTH)) is int


def rebuild_value(config: dict[str, Any], saved: dict[str, torch.Tensor], where: str) -> ValueModel:
    """The value model that was saved as `value.config.to_dict()` and its parameters by name.

    Raises `InputError` where they make none, naming the first tensor that does not fit.
    """
    if not is_value_model(config):
        raise InputError("it is no value model", where=where, fix="use the weights of a run that trained values")
    try:
        value = ValueModel(LlamaConfig.from_dict(config))
        if lora := config.get("lora"):
            add_lora(value.backbone, **lora)
    except Exception as error:  # a config that makes no sense raises anything
        reason = " ".join(str(error).split())
        raise InputError(f"its config makes no value model: {reason}", where=where, fix="use other weights") from error
    load_tensors(value, saved, where)
    return value


def take_over(policy: MTPForCausalLM, config: dict[str, Any], saved: dict[str, torch.Tensor], where: str) -> None:
    """Give the policy, as it is before it learns, the head of a value model that was trained on its frozen trunk.

    `config` and `saved` as for `rebuild_value`. Raises `InputError` for a value model that is none, for one with a
    backbone of its own, and for a head on another trunk than the policy's.
    """
    if not is_value_model(config):
        raise InputError("it is no value model", where=where, fix="use the weights of a run that trained values")
    needs = "weighting.critic.auxiliary trains on a head on the policy's trunk"
    anew = "train the value model with value.trunk_head=true on the same policy, or set weighting.critic.auxiliary=0"
    trunk = len(policy.model.layers) - 1
    if config.get("lora") or config.get("num_hidden_layers") != trunk:
        raise InputError(f"the value model has a backbone of its own, {needs}", where=where, fix=anew)
    own = {name.replace(".base_layer.", "."): tensor for name, tensor in policy.model.named_parameters()}
    head = {}
    for name, tensor in saved.items():
        if name.startswith("head.") or name == "backbone.norm.weight":
            head[name.removeprefix("backbone.")] = tensor
        elif not torch.equal(numbers(own.get(name.removeprefix("backbone."), tensor[:0])), tensor):
            raise InputError(f"{name} is not the policy's: {needs}", where=where, fix=anew)
    load_tensors(policy.add_value_head(config[_WIDTH]), head, where)
