"""The n-head multi-token prediction policy on a Llama trunk.

Shape of Gloeckle et al., "Better & Faster Large Language Models via Multi-token Prediction" (2024), as in Meta's
`7b_1t_4`: the trunk is every layer but the last; head 1 is the last layer; heads 2…n are further layers of the same
kind. All read the trunk's output, and all share one final norm and one unembedding::

    embed ─ layer 1 … layer L-1 ─┬─ layer L ───────┐
             (the trunk)         ├─ extra_heads[0] ├─ norm ─ lm_head ─ logits of the token k ahead
                                 ├─ …              ┘
                                 └─ value_head: where one is trained beside them
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from wmtp_worker.model.value_head import TrunkValue


@dataclass(frozen=True)
class TrunkOutput:
    """What every head reads. `hidden`: [batch, time, hidden_size]; the rest is what attention needs.

    `attention_mask`: what is added to scores, 0 or -inf, [batch, 1, time, time].
    """

    hidden: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    attention_mask: torch.Tensor

    def detached(self) -> "TrunkOutput":
        """The same values as a leaf that collects the heads' gradients."""
        return replace(self, hidden=self.hidden.detach().requires_grad_())


class MTPForCausalLM(LlamaForCausalLM):
    """A Llama with `config.n_future_tokens - 1` further heads.

    Parameter names are Hugging Face's own plus `extra_heads.<i>.…`, so a Llama folder loads as it is, and what is
    saved opens as a plain Llama (head 1) too. `forward` and `generate` are Llama's and use head 1.
    """

    value_head: TrunkValue | None

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        first = config.num_hidden_layers
        self.extra_heads = nn.ModuleList(
            LlamaDecoderLayer(config, first + number) for number in range(config.n_future_tokens - 1)
        )
        self.register_module("value_head", None)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def heads(self) -> int:
        """How many tokens ahead are predicted (n)."""
        return 1 + len(self.extra_heads)

    def add_value_head(self, width: int, seed: int = 0) -> TrunkValue:
        """Put a trainable value head beside the heads, drawn from `seed` alone; `config.value_head` remembers it."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.value_head = TrunkValue(self.config.hidden_size, width, self.config.rms_norm_eps)
        self.config.value_head = {"width": width}
        return self.value_head

    def trunk(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor) -> TrunkOutput:
        """Run the trunk once.

        `input_ids`, `position_ids`: int64 [batch, time]. `attention_mask`: bool [batch, 1, time, time], True where
        the query (row) may look at the key (column).
        """
        return run_layers(self.model, len(self.model.layers) - 1, input_ids, position_ids, attention_mask)

    def head_hidden(self, number: int, trunk: TrunkOutput) -> torch.Tensor:
        """What the unembedding reads for head `number` (1…n): [batch, time, hidden_size], normed."""
        layer = self.model.layers[-1] if number == 1 else self.extra_heads[number - 2]
        hidden = layer(trunk.hidden, attention_mask=trunk.attention_mask, position_embeddings=trunk.position_embeddings)
        normed: torch.Tensor = self.model.norm(hidden)
        return normed

    def head_logits(self, number: int, trunk: TrunkOutput) -> torch.Tensor:
        """Logits [batch, time, vocabulary] of head `number` (1…n): at position t they predict token t + number."""
        logits: torch.Tensor = self.lm_head(self.head_hidden(number, trunk))
        return logits


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in the order of the model: trunk, head 1, further heads."""
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let each decoder layer keep its input alone, and run a second time in the backward pass."""
    model.activation_checkpointing_enable()
    # it makes embeddings require gradients, which this kind of checkpoint does not need: a frozen trunk would be
    # differentiated for nothing
    model.disable_input_require_grads()


def heads_of(model: nn.Module) -> set[nn.Module]:
    """Those of the decoder layers that are heads; a model that is no policy has none."""
    return {model.model.layers[-1], *model.extra_heads} if isinstance(model, MTPForCausalLM) else set()


def run_layers(
    llama: LlamaModel, count: int, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
) -> TrunkOutput:
    """The output of a Llama's first `count` layers, not normed; the other arguments as for `MTPForCausalLM.trunk`."""
    hidden = llama.embed_tokens(input_ids)
    attention_mask = _added_to_scores(attention_mask, hidden.dtype)
    position_embeddings = llama.rotary_emb(hidden, position_ids=position_ids)
    for layer in llama.layers[:count]:
        hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=position_embeddings)
    return TrunkOutput(hidden, position_embeddings, attention_mask)


def _added_to_scores(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as attention uses it, in its type: made once, or each layer would make and keep a copy of its own."""
    device = mask.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def packed_attention_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each segment only.

    `segment_ids`: int64 [batch, time]. Returns bool [batch, 1, time, time]. Padding is a segment of its own, so no
    row of the mask is empty (an empty row would make the softmax NaN).
    """
    same_segment = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same_segment.tril()
