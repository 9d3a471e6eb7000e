"""AdamW's state as flat, named tensors, so that it fits in safetensors."""

from collections.abc import Mapping

import torch

from wmtp_worker.errors import CheckpointError

_SCALAR, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The state as `<state key>/<parameter name>` -> tensor; empty before the first step. Not copies."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], saved: Mapping[str, torch.Tensor], where: str
) -> None:
    """Put `optimizer_tensors`' result back, on the devices of the parameters it belongs to.

    Raises `CheckpointError` naming the first tensor that does not fit: AdamW would start a missing moment anew without
    a word, and its fused kernel write past the end of a short one.
    """
    shapes = {f"{_SCALAR}/{name}": torch.Size() for name in names.values()}
    shapes |= {f"{key}/{name}": parameter.shape for parameter, name in names.items() for key in _MOMENTS}
    wanted = {flat: (shape, torch.float32) for flat, shape in shapes.items()}
    found = {flat: (value.shape, value.dtype) for flat, value in saved.items()}
    for flat in sorted(wanted.keys() | found.keys()):
        if wanted.get(flat) != found.get(flat):
            raise CheckpointError(
                f"the optimizer's state does not fit the model: {flat}",
                where=where,
                fix="choose another step with --resume STEP",
            )
    optimizer.state.clear()
    for parameter, name in names.items():
        for key in (_SCALAR, *_MOMENTS):
            # the step counter's device is the optimizer's choice: fused ones want it beside the parameter
            optimizer.state[parameter][key] = saved[f"{key}/{name}"].clone().to(parameter.device)
