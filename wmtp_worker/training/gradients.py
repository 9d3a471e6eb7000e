"""One model on several ranks: whole on each, or in shards; and the sum of all ranks' gradients.

    gradients = spread(model, group, shards, precision)
    for number, backward in enumerate(own_micro_batches):
        gradients.begin(last=number == len(own_micro_batches) - 1)
        backward()                       # of each head, one after the other, then of the trunk
    gradients.finish()                   # `.grad` is the sum over the ranks

Sums, not means: losses are divided by what all ranks count together. A unit is one decoder layer, of the trunk or of a
head, and has one gradient a micro-batch. All else (embedding, norm, unembedding) is shared by the heads, which add up
what they find for it on each rank: it crosses the ranks once a step, however many heads and micro-batches there are.
"""

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from wmtp_worker.checkpoint.ranks import copy_own
from wmtp_worker.model.mtp import heads_of, layers_of
from wmtp_worker.model.unread import Read, unread
from wmtp_worker.training.group import Group


class Gradients:
    """Of a model on one rank: nothing to do. The base of the others, and the contract."""

    shards = 1

    def begin(self, last: bool) -> None:
        """Before each micro-batch of this rank; `last`: of this step."""

    def finish(self) -> None:
        """After the last one, on every rank: each trained parameter's `.grad` is the sum over all ranks.

        Parameters are what the optimizer knows and a checkpoint holds: their shards, where there are some.
        """

    def settle(self) -> None:
        """The same for the parameters after forward passes without a backward."""


def spread(model: nn.Module, group: Group, shards: int, precision: str = "fp32") -> Gradients:
    """Let each rank hold 1/`shards` of every parameter, which divides the number of ranks; 1: all of it.

    `precision`: what it is computed with, `fp32`, or `bf16` where it always runs under autocast.

    With fewer shards than ranks there are several copies (hybrid sharding). The model, the same on every rank, lies on
    the group's device. Where there are shards it may lie on the CPU, or be unread: then only its shards go to the
    device, or are read at all. Afterwards `model.parameters()` are `DTensor`s where `shards` is above 1: an optimizer
    must be made of these.
    """
    if group.world == 1:
        return Gradients()
    if shards == 1:
        return _Replicas(model)
    return _Shards(model, group, shards, precision)


@torch.no_grad()
def fill(model: nn.Module, stored: Mapping[str, Read], device: torch.device) -> None:
    """Give parameters that are unread memory on `device` and their content, one after the other; of shards, only what
    this rank holds. `stored`: by name, from `unread`, before there were shards. Tied ones stay so.
    """
    parameters = dict(model.named_parameters())
    for name, read in stored.items():
        parameter = parameters[name]
        filled = torch.empty_like(parameter, device=device)
        copy_own(filled, read())
        # who has the parameter has it still
        torch.utils.swap_tensors(parameter, nn.Parameter(filled, parameter.requires_grad))


def gather_whole(tensor: torch.Tensor) -> torch.Tensor:
    """Put the shards of a tensor together, on every rank; what is whole stays as it is. Every rank must call this."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that lies on this rank, the tensor itself where it is whole: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip(parameters: Iterable[torch.Tensor], largest: float) -> float:
    """Scale the gradients so that the norm of them all, over all shards, is at most `largest`; what it was before."""
    return float(gather_whole(torch.nn.utils.clip_grad_norm_(parameters, largest)))


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


class _Replicas(Gradients):
    """Every rank has all (DDP). A layer's gradients set off when its last one is there, behind the backward."""

    def __init__(self, model: nn.Module) -> None:
        self._units = [_trained(layer.parameters()) for layer in layers_of(model)]
        in_layers = {parameter for unit in self._units for parameter in unit}
        self._shared = [parameter for parameter in _trained(model.parameters()) if parameter not in in_layers]
        self._missing = [0] * len(self._units)
        self._under_way: dict[int, tuple[list[torch.Tensor], torch.Tensor, dist.Work]] = {}
        self._last = False
        for number, unit in enumerate(self._units):
            for parameter in unit:
                parameter.register_post_accumulate_grad_hook(self._accumulated(number))

    def _accumulated(self, number: int) -> Any:
        def hook(parameter: torch.Tensor) -> None:
            self._missing[number] -= 1
            if self._last and not self._missing[number]:
                self._send(number, self._units[number])

        return hook

    def begin(self, last: bool) -> None:
        self._last = last
        self._missing = [len(unit) for unit in self._units]

    def finish(self) -> None:
        rest = [unit for number, unit in enumerate(self._units) if number not in self._under_way]
        # also layers that are not run, or in parts
        self._send(-1, [parameter for unit in (*rest, self._shared) for parameter in unit])
        for gradients, flat, work in self._under_way.values():
            work.wait()
            torch._foreach_copy_(gradients, _views(flat, gradients))
        self._under_way = {}

    def _send(self, number: int, parameters: list[nn.Parameter]) -> None:
        """Begin to add up what the parameters have, in one message."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            self._under_way[number] = (gradients, flat, work)


def _views(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]


class _Shards(Gradients):
    """FSDP2. A layer is gathered when it is run and its gradients are scattered with each micro-batch: kept whole until
    the end of a step, those of all layers would not fit. What the heads share is gathered once a step and kept.

    With bf16 a layer's matrices are gathered as bf16. Gathered as fp32 they would be copied by autocast, and neither
    autograd nor autocast's cache would let go of the copies: each rank would hold the whole model.
    """

    def __init__(self, model: nn.Module, group: Group, shards: int, precision: str) -> None:
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        self.shards = shards
        mesh = group.mesh(shards)
        stored = unread(model)
        layers = layers_of(model)
        heads = heads_of(model)
        lower = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # norms are computed in fp32, and FSDP has one precision a unit: these few numbers go with what is shared
        vectors = nn.ParameterList(one for layer in layers for one in layer.parameters() if one.ndim < 2)
        for layer in layers:
            # a head's backward follows its forward at once
            again = layer not in heads
            fully_shard(layer, mesh=mesh, reshard_after_forward=again, mp_policy=policy, ignored_params=set(vectors))
        model.vectors = vectors  # where FSDP finds them
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        del model.vectors
        assert isinstance(model, FSDPModule)
        if stored:
            fill(model, stored, group.device)
            model.to(group.device)  # FSDP sees its new parameters
        self._units: list[FSDPModule] = [model, *layers]  # type: ignore[list-item]  # fully_shard changed their class
        for unit in self._units:
            # NCCL's own division by 1 is one more kernel, and gloo has none
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        # what FSDP guesses itself would be the head before, whose backward is over
        before: nn.Module = model
        for layer in layers:
            layer.set_modules_to_backward_prefetch([model if layer in heads else before])  # type: ignore[operator]
            before = layer
        # every backward ends with all units, and there is one for each head: what they share waits for `finish`
        model.set_requires_gradient_sync(False, recurse=False)
        model.set_reshard_after_backward(False, recurse=False)
        self._model = model
        model.pass_on = MethodType(_pass_on, model)  # type: ignore[assignment]  # as a method of its own
        for method in ("trunk", "pass_on"):  # the policy is not run by its `forward`
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)

    def begin(self, last: bool) -> None:
        # with several copies each adds up its own micro-batches before all are added up
        self._model.set_requires_all_reduce(last)
        self._model.set_requires_gradient_sync(False, recurse=False)
        self._model.set_reshard_after_backward(False, recurse=False)

    def finish(self) -> None:
        self._model.set_requires_gradient_sync(True, recurse=False)
        self._model.set_reshard_after_backward(True, recurse=False)
        # FSDP adds up at the end of a backward: one through nothing
        self._model.pass_on(torch.zeros(1, requires_grad=True)).backward()  # type: ignore[operator]

    def settle(self) -> None:
        for unit in self._units:
            unit.reshard()


def _pass_on(model: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1
