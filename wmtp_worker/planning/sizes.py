"""How large what a run saves will be, from its settings alone."""

from dataclasses import dataclass

import torch

from wmtp_worker.checkpoint.optimizer import MOMENT_TYPES, expected_tensors
from wmtp_worker.checkpoint.snapshot import split_frozen
from wmtp_worker.checkpoint.staging import Content, nbytes
from wmtp_worker.planning.policy import policy_on_meta
from wmtp_worker.settings import Settings


@dataclass(frozen=True)
class Sizes:
    """Bytes of files: `checkpoint` of each save, `trained` the part of it without the optimizer's moments, `frozen`
    what is kept once a run, `export` of `final.pt` and of `best_model.pt`."""

    checkpoint: int
    trained: int
    frozen: int
    export: int

    @classmethod
    def of(cls, model: torch.nn.Module, moments: str) -> "Sizes":
        """`moments`: what AdamW keeps them in, as `training.moments`."""
        trainable, frozen = split_frozen(model.named_parameters())
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        state = expected_tensors(names, MOMENT_TYPES[moments])
        return cls(
            checkpoint=nbytes({"model": Content(trainable), "optimizer": Content(state)}),
            trained=nbytes({"model": Content(trainable)}),
            frozen=nbytes({"frozen": Content(frozen)}) if frozen else 0,
            export=nbytes({"weights": Content({**trainable, **frozen})}),
        )


def sizes_of(settings: Settings) -> Sizes:
    """Sizes of the policy's run. No weights are read. Raises `InputError` as `policy_on_meta` does."""
    return Sizes.of(policy_on_meta(settings), settings.training.moments)
