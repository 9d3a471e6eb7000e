"""What turns hidden states into values: on a backbone of its own (`value`), or beside the policy's heads (`mtp`)."""

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class ValueHead(nn.Module):
    """An MLP with one hidden layer: [batch, time, hidden_size] to one number a token, float32 [batch, time].

    Its last layer begins at zero, and so do all values: nothing is preferred before something was learnt.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, width)
        self.output = nn.Linear(width, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.hidden(states.to(self.hidden.weight.dtype)))
        values: torch.Tensor = self.output(hidden).float().squeeze(-1)
        return values


class TrunkValue(nn.Module):
    """A `ValueHead` on a trunk's output, which has no norm yet: one of its own comes before."""

    def __init__(self, hidden_size: int, width: int, eps: float) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(hidden_size, eps=eps)
        self.head = ValueHead(hidden_size, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [batch, time]: at position t, the value after token t. `hidden`: `TrunkOutput.hidden`."""
        values: torch.Tensor = self.head(self.norm(hidden))
        return values
