"""Parameters whose numbers are still on the disk: they lie on torch's meta device, and each knows how to read them.

model = load(path, heads, unread=True)
add_lora(model, …)                # what is not stored has memory as ever
numbers(parameter)                # read now, and not kept
unread(model)                     # for whoever gives them memory: `training.gradients.fill`
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# the whole tensor, in the type and order in which it lies there
Read = Callable[[], torch.Tensor]

_READ = "read_stored"


def leave_unread(parameter: nn.Parameter, read: Read) -> None:
    """Let a parameter on the meta device remember what it begins with."""
    mine: Any = parameter
    setattr(mine, _READ, read)


def is_unread(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, _READ)


def unread(model: nn.Module) -> dict[str, Read]:
    """How to read each parameter that has no memory yet, by name, tied ones once."""
    return {name: getattr(parameter, _READ) for name, parameter in model.named_parameters() if is_unread(parameter)}


def numbers(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter itself, or, where it is unread, its content in a tensor of its dtype on the CPU."""
    if not is_unread(parameter):
        return parameter
    whole: torch.Tensor = getattr(parameter, _READ)()
    return whole.to(parameter.dtype)
