"""AdamW's state as flat, named tensors, so that it fits in safetensors."""

from collections.abc import Mapping

import torch

from wmtp_worker.checkpoint.ranks import Pieces
from wmtp_worker.errors import CheckpointError

SCALAR, MOMENTS = "step", ("exp_avg", "exp_avg_sq")
# by `training.moments`
MOMENT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def moment_bytes(moments: str) -> int:
    """Of a parameter's two; `moments`: as `training.moments`."""
    return len(MOMENTS) * MOMENT_TYPES[moments].itemsize


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
    """The state as `<state key>/<parameter name>` -> tensor; empty before the first step. Not copies."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def expected_tensors(
    names: Mapping[torch.Tensor, str], moments: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The state that AdamW will have for the parameters it trains, before its first step; nothing is allocated.

    Shapes and dtypes are those of `optimizer_tensors`, the content is not there. For what has no `DTensor`s.
    `moments`: the type that they are kept in, here and below.
    """
    trained = {name: parameter for parameter, name in names.items() if parameter.requires_grad}
    meta = {f"{SCALAR}/{name}": torch.empty((), dtype=torch.float32, device="meta") for name in trained}
    for key in MOMENTS:
        for name, parameter in trained.items():
            meta[f"{key}/{name}"] = torch.empty_like(parameter, dtype=moments, device="meta")
    return meta


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    saved: Mapping[str, torch.Tensor],
    where: str,
    moments: torch.dtype = torch.float32,
) -> None:
    """Put `optimizer_tensors`' result back, on the devices of the parameters it belongs to, and take it over.

    Raises `CheckpointError` naming the first tensor that does not fit: AdamW would start a missing moment anew without
    a word, and its fused kernel write past the end of a short one.
    """
    trained = _trained(optimizer, names)
    _check_fit(trained, {flat: (value.shape, value.dtype) for flat, value in saved.items()}, where, moments)
    optimizer.state.clear()
    for parameter, name in trained.items():
        for key in (SCALAR, *MOMENTS):
            # the step counter's device is the optimizer's choice: fused ones want it beside the parameter
            optimizer.state[parameter][key] = saved[f"{key}/{name}"].to(parameter.device)


def read_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.Tensor, str],
    saved: Pieces,
    where: str,
    moments: torch.dtype = torch.float32,
) -> None:
    """As `load_optimizer`, for parameters that are sharded: each rank reads the slices it holds. Same errors."""
    trained = _trained(optimizer, names)
    _check_fit(trained, saved.specs(), where, moments)
    optimizer.state.clear()
    for parameter in trained:
        counter = torch.zeros((), dtype=torch.float32, device=parameter.device)
        both = {key: torch.zeros_like(parameter, dtype=moments, requires_grad=False) for key in MOMENTS}
        optimizer.state[parameter].update({SCALAR: counter, **both})
    saved.read_into(optimizer_tensors(optimizer, names))


def _trained(optimizer: torch.optim.Optimizer, names: Mapping[torch.Tensor, str]) -> dict[torch.Tensor, str]:
    """The parameters that have a state: frozen ones never get one."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: names[parameter] for parameter in parameters if parameter.requires_grad}


def _check_fit(
    trained: Mapping[torch.Tensor, str],
    found: Mapping[str, tuple[torch.Size, torch.dtype]],
    where: str,
    moments: torch.dtype,
) -> None:
    names = {dtype: name for name, dtype in MOMENT_TYPES.items()}
    wanted = {f"{SCALAR}/{name}": (torch.Size(), torch.float32) for name in trained.values()}
    wanted |= {f"{key}/{name}": (parameter.shape, moments) for parameter, name in trained.items() for key in MOMENTS}
    for flat in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(flat), found.get(flat)
        if one == other:
            continue
        if one and other and one[0] == other[0] and {one[1], other[1]} == set(names):
            what = f"it has moments in {names[other[1]]}, and training.moments is {names[one[1]]}"
            raise CheckpointError(what, where=where, fix="set it back, or choose another --run-name")
        raise CheckpointError(
            f"the optimizer's state does not fit the model: {flat}",
            where=where,
            fix="choose another step with --resume STEP",
        )
