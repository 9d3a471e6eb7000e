"""LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021) by peft, on trunk and heads alike.

Adapters are put into the model where its linear layers are, so that it stays the class it is. A layer's weight is then
called `….base_layer.weight`; beside it are `….lora_A.default.weight` and `….lora_B.default.weight`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wmtp_worker.errors import SettingsError
from wmtp_worker.model.stored import Lazy
from wmtp_worker.model.unread import is_unread

# every linear layer of a Llama but the unembedding
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"


def add_lora(
    model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = TARGETS, seed: int = 0
) -> None:
    """Freeze the model and give every linear layer whose name ends in one of `targets` a trainable adapter.

    The adapter adds `alpha / rank · B A dropout(x)`; A is drawn from `seed` alone, B is zero, so that the outputs are
    what they were. `model.config.lora` remembers the arguments. Raises `SettingsError` for a target that no layer has,
    and for a rank above a layer's width.
    """
    from peft import LoraConfig, inject_adapter_in_model

    # the loss multiplies by the unembedding itself: an adapter there would never learn
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] != "lm_head"
    }
    for target in targets:
        found = [module for name, module in layers.items() if name.rsplit(".", 1)[-1] == target]
        if not found:
            names = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise SettingsError(
                f"no layer that can have an adapter is called {target!r}",
                where="lora.targets",
                fix=f"choose from {', '.join(names)}",
            )
        if (width := min(min(module.weight.shape) for module in found)) < rank:
            raise SettingsError(
                f"rank {rank} is above the {width} of {target}", where="lora.rank", fix="set a lower one"
            )
    facts: Any = model.config
    facts.lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": list(targets)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none")  # type: ignore[arg-type]  # alpha may be any number
        with _stand_ins(layers.values()):
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER)


@contextmanager
def _stand_ins(layers: Iterable[nn.Linear]) -> Iterator[None]:
    """Inside, weights that are unread have empty ones on the CPU in their place: peft puts an adapter on the device of
    its layer's weight, and on the meta device it would lose its numbers."""
    away = {layer: layer.weight for layer in layers if is_unread(layer.weight)}
    for layer in away:
        layer.weight = nn.Parameter(torch.empty(0))
    try:
        yield
    finally:
        for layer, weight in away.items():
            layer.weight = weight.requires_grad_(False)  # as peft leaves all that it finds


def has_lora(model: nn.Module) -> bool:
    """Whether there are adapters."""
    return next(_adapted(model), None) is not None


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to their weights and take them away; the model then is as it was before `add_lora`."""
    for name, layer in list(_adapted(model)):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    facts: Any = model.config
    del facts.lora
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def merged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter under its name without adapters, what they add included. The model stays as it is.

    Tensors that have no adapter are the live ones; the others are new.
    """
    adapted = {f"{name}.base_layer.weight": layer for name, layer in _adapted(model)}
    merged = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in adapted:
                # in the order in which peft merges, so that both ways give the same bits
                delta = adapted[name].get_delta_weight(_ADAPTER)
                merged[name.replace(".base_layer.", ".")] = parameter.data + delta
            elif ".lora_" not in name:
                merged[name.replace(".base_layer.", ".")] = parameter.data
    return merged


def merge_saved(config: dict[str, Any], saved: dict[str, torch.Tensor]) -> Lazy:
    """What `merged_tensors` would give, of a saved config and tensors; nothing is added before it is asked for."""
    scale = config["lora"]["alpha"] / config["lora"]["rank"]
    base = {name.replace(".base_layer.", "."): saved[name] for name in saved if ".lora_" not in name}

    def merge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if f"{layer}.base_layer.weight" not in saved:
            return tensor
        a, b = (saved[f"{layer}.lora_{which}.{_ADAPTER}.weight"] for which in "AB")
        merged: torch.Tensor = tensor + b @ a * scale
        return merged

    return Lazy(base, merge)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
