"""AdamW's state as flat, named tensors, so that it fits in safetensors."""

from collections.abc import Mapping

import torch

from wmtp_worker.checkpoint.ranks import Pieces
from wmtp_worker.errors import CheckpointError

_SCALAR, _MOMENTS = "step", ("exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The state as `<state key>/<parameter name>` -> tensor; empty before the first step. Not copies."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def expected_tensors(names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The state that AdamW will have for the parameters it trains, before its first step; nothing is allocated.

    Shapes and dtypes are those of `optimizer_tensors`, the content is not there. For what has no `DTensor`s.
    """
    trained = {name: parameter for parameter, name in names.items() if parameter.requires_grad}
    meta = {f"{_SCALAR}/{name}": torch.empty((), dtype=torch.float32, device="meta") for name in trained}
    for key in _MOMENTS:
        meta |= {f"{key}/{name}": torch.empty_like(parameter, device="meta") for name, parameter in trained.items()}
    return meta


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], saved: Mapping[str, torch.Tensor], where: str
) -> None:
    """Put `optimizer_tensors`' result back, on the devices of the parameters it belongs to, and take it over.

    Raises `CheckpointError` naming the first tensor that does not fit: AdamW would start a missing moment anew without
    a word, and its fused kernel write past the end of a short one.
    """
    trained = _trained(optimizer, names)
    _check_fit(trained, {flat: (value.shape, value.dtype) for flat, value in saved.items()}, where)
    optimizer.state.clear()
    for parameter, name in trained.items():
        for key in (_SCALAR, *_MOMENTS):
            # the step counter's device is the optimizer's choice: fused ones want it beside the parameter
            optimizer.state[parameter][key] = saved[f"{key}/{name}"].to(parameter.device)


def read_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str], saved: Pieces, where: str
) -> None:
    """As `load_optimizer`, for parameters that are sharded: each rank reads the slices it holds. Same errors."""
    trained = _trained(optimizer, names)
    _check_fit(trained, saved.specs(), where)
    optimizer.state.clear()
    for parameter in trained:
        counter = torch.zeros((), dtype=torch.float32, device=parameter.device)
        moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in _MOMENTS}
        optimizer.state[parameter].update({_SCALAR: counter, **moments})
    saved.read_into(optimizer_tensors(optimizer, names))


def _trained(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[torch.Tensor, str]:
    """The parameters that have a state: frozen ones never get one."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: names[parameter] for parameter in parameters if parameter.requires_grad}


def _check_fit(
    trained: Mapping[torch.Tensor, str], found: Mapping[str, tuple[torch.Size, torch.dtype]], where: str
) -> None:
    shapes = {f"{_SCALAR}/{name}": torch.Size() for name in trained.values()}
    shapes |= {f"{key}/{name}": parameter.shape for parameter, name in trained.items() for key in _MOMENTS}
    wanted = {flat: (shape, torch.float32) for flat, shape in shapes.items()}
    for flat in sorted(wanted.keys() | found.keys()):
        if wanted.get(flat) != found.get(flat):
            raise CheckpointError(
                f"the optimizer's state does not fit the model: {flat}",
                where=where,
                fix="choose another step with --resume STEP",
            )
