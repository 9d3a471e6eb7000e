"""An optimizer's state as flat, named tensors, so that it fits in safetensors."""

from collections.abc import Mapping

import torch


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The state as `<state key>/<parameter name>` -> tensor; empty before the first step. Not copies."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], saved: Mapping[str, torch.Tensor]
) -> None:
    """Put `optimizer_tensors`' result back, on the devices of the parameters it belongs to."""
    parameters = {name: parameter for parameter, name in names.items()}
    optimizer.state.clear()
    for flat, value in saved.items():
        key, name = flat.split("/", 1)
        parameter = parameters[name]
        # the step counter's device is the optimizer's choice: fused ones want it beside the parameter
        optimizer.state[parameter][key] = value.clone().to(parameter.device)
