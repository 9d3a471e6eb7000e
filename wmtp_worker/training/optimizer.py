"""AdamW as a run takes it: matrices decay, norms do not; its moments are fp32, or bf16 for half of their memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from wmtp_worker.checkpoint.optimizer import MOMENTS, SCALAR
from wmtp_worker.settings import Settings
from wmtp_worker.training.gradients import local


def make_optimizer(settings: Settings, model: torch.nn.Module) -> torch.optim.AdamW:
    """Of the parameters that are trained, on their device. Raises nothing."""
    training = settings.training

    def having(matrix: bool) -> Iterable[torch.nn.Parameter]:
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        return [parameter for parameter in trained if (parameter.ndim >= 2) == matrix]

    groups: list[dict[str, Any]] = [
        {"params": having(True), "weight_decay": training.weight_decay},
        {"params": having(False), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]  # adapters have no norms
    kind = torch.optim.AdamW if training.moments == "fp32" else LeanAdamW
    return kind(groups, lr=training.lr, betas=(training.beta1, training.beta2), eps=training.eps, fused=True)


class LeanAdamW(torch.optim.AdamW):
    """AdamW with moments in bf16 beside fp32 weights and gradients, as in DeepSeek-V3 (2024), section 3.3.2.

    A step is computed in fp32; then the new moments are rounded to the nearest, so equal runs stay equal. On CUDA
    torch's fused kernel does that where it finds moments of another type than the weights'; elsewhere it has none, and
    one parameter after the other has its moments widened for the time of its step.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for parameter in self._parameters():
            moments = {key: torch.zeros_like(parameter, dtype=torch.bfloat16) for key in MOMENTS}
            counter = torch.zeros((), dtype=torch.float32, device=parameter.device)
            self.state[parameter] = {SCALAR: counter, **moments}

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; there is no closure."""
        if all(parameter.is_cuda for parameter in self._parameters()):
            super().step()
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _step_widened(parameter, self.state[parameter], group)


def _step_widened(parameter: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> None:
    kept = [local(state[key]) for key in MOMENTS]
    first, second = (moment.float() for moment in kept)
    adamw(
        [local(parameter)],
        [local(parameter.grad)],  # type: ignore[arg-type]  # looked at before
        [first],
        [second],
        [],
        [state[SCALAR]],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for moment, wide in zip(kept, (first, second), strict=True):
        moment.copy_(wide)
