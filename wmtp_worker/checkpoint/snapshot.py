"""What a checkpoint holds, before it is written."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
FROZEN = "frozen.safetensors"

Kind = Literal["full", "trainable"]


@dataclass(frozen=True)
class Snapshot:
    """Everything a checkpoint holds: tensors by file and name, JSON documents by file, and facts for the manifest.

    Tensors are the live ones, not copies; `DTensor`s stand for the piece that lies on this rank. `frozen` are those
    that no optimizer changes: they are kept once a run, by their digest.
    """

    step: int
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    documents: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kind: Kind = "full"

    def by_value(self) -> "Snapshot":
        """The same with documents and facts that nobody can change any more; the tensors are still the live ones."""
        return replace(self, documents=json.loads(json.dumps(dict(self.documents))), facts=dict(self.facts))

    def trainable_only(self) -> "Snapshot":
        """The trained weights without the optimizer's state: less to write on a machine that is about to be taken."""
        tensors = {name: value for name, value in self.tensors.items() if name != OPTIMIZER}
        return replace(self, tensors=tensors, kind="trainable")


def split_frozen(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`(trainable, frozen)`, by name, of `model.named_parameters()`; the tensors themselves, not copies."""
    trainable: dict[str, torch.Tensor] = {}
    frozen: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        (trainable if parameter.requires_grad else frozen)[name] = parameter.data
    return trainable, frozen
