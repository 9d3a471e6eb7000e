"""The policy of a run, or its value model, on torch's meta device: every tensor's shape and nothing of its content."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig

from wmtp_worker.assets.resolve import backbone_folder, model_folder, tokenizer_folder
from wmtp_worker.data.tokenizer import load_tokenizer
from wmtp_worker.errors import InputError
from wmtp_worker.model.folder import CONFIG
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import build, config_with_heads
from wmtp_worker.model.lora import TARGETS, add_lora
from wmtp_worker.model.mtp import MTPForCausalLM
from wmtp_worker.model.stored import read_json
from wmtp_worker.model.value import ValueModel, value_on
from wmtp_worker.settings import Settings


@dataclass(frozen=True)
class Count:
    """Parameters of a part of the model: all, those that are trained, and of both those that matrices are made of."""

    all: int
    trained: int
    matrices: int
    trained_matrices: int

    @classmethod
    def of(cls, module: torch.nn.Module) -> "Count":
        found = list(module.parameters())
        trained = [parameter for parameter in found if parameter.requires_grad]
        return cls(
            sum(parameter.numel() for parameter in found),
            sum(parameter.numel() for parameter in trained),
            sum(parameter.numel() for parameter in found if parameter.ndim >= 2),
            sum(parameter.numel() for parameter in trained if parameter.ndim >= 2),
        )


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a policy. `layer`: one transformer layer; trunk and heads are made of equal ones.

    A value model is a trunk with a value head: no heads, and no unembedding.
    """

    hidden: int
    intermediate: int
    attention_heads: int
    attention: int  # width of a query, all its heads together
    key_value: int  # the same of a key
    vocabulary: int
    trunk_layers: int
    heads: int
    total: Count
    layer: Count
    value_head: Count  # of a value model, or where values are learned beside the policy
    embedding: int  # parameters of the embedding, as of the unembedding
    tied: bool
    embedding_trained: bool
    adapter_inner: int  # widths of a layer's adapters, summed; 0 without LoRA

    @classmethod
    def of(cls, model: MTPForCausalLM | ValueModel) -> "Shape":
        """Of a policy or a value model, on whatever device. Raises nothing."""
        config, policy = model.config, isinstance(model, MTPForCausalLM)
        backbone = model.model if isinstance(model, MTPForCausalLM) else model.backbone
        value_head = model.value_head if isinstance(model, MTPForCausalLM) else model.head
        layer, embedding = backbone.layers[-1], backbone.embed_tokens.weight
        adapters = [parameter for name, parameter in layer.named_parameters() if ".lora_A." in name]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            attention_heads=config.num_attention_heads,
            attention=config.num_attention_heads * width,
            key_value=(config.num_key_value_heads or config.num_attention_heads) * width,
            vocabulary=config.vocab_size,
            trunk_layers=len(backbone.layers) - policy,
            heads=model.heads if isinstance(model, MTPForCausalLM) else 0,
            total=Count.of(model),
            layer=Count.of(layer),
            value_head=Count.of(value_head or torch.nn.Module()),
            embedding=embedding.numel(),
            tied=isinstance(model, MTPForCausalLM) and embedding is model.lm_head.weight,
            embedding_trained=embedding.requires_grad,
            adapter_inner=sum(adapter.shape[0] for adapter in adapters),
        )

    def with_adapters(self, rank: int) -> "Shape":
        """The same with LoRA on every linear layer, all else frozen."""
        h, a, k, f = self.hidden, self.attention, self.key_value, self.intermediate
        own = rank * (2 * (h + a) + 2 * (h + k) + 3 * (h + f))
        layer = Count(self.layer.all + own, own, self.layer.matrices + own, own)
        more = own * self.layers
        total = Count(self.total.all + more, more, self.total.matrices + more, more)
        return replace(self, total=total, layer=layer, embedding_trained=False, adapter_inner=len(TARGETS) * rank)

    @property
    def frozen(self) -> bool:
        """Whether nothing of the layers is trained, nor below them: they need no backward pass."""
        return self.layer.trained == 0

    @property
    def lora(self) -> bool:
        return self.adapter_inner > 0

    @property
    def layers(self) -> int:
        """Layers of the trunk and of all heads."""
        return self.trunk_layers + self.heads


def policy_on_meta(settings: Settings) -> MTPForCausalLM:
    """The policy that `wmtp train` would train, adapters included, on the meta device.

    Of a model on the disk only the configuration is needed: a folder with `config.json` alone will do. Raises
    `InputError` as `loading.load` does, and where the sequences are longer than the model's positions.
    """
    model = _made(settings, _folder(settings, model_folder))
    if settings.lora.rank:
        add_lora(model, **settings.lora.model_dump(), seed=settings.run.seed)
    if settings.weighting.learns_values:
        with torch.device("meta"):
            model.add_value_head(settings.value.hidden)
    _check_positions(settings, model.config)
    return model


def value_on_meta(settings: Settings) -> ValueModel:
    """The value model that `wmtp train` would train as the first stage, adapters included, on the meta device.

    Raises as `policy_on_meta` does.
    """
    value = settings.value
    start = _made(settings, _folder(settings, backbone_folder))
    with torch.device("meta"):
        model = value_on(start, value.hidden, settings.run.seed, value.trunk_head)
    if value.lora_rank:
        add_lora(model.backbone, **settings.lora.model_dump() | {"rank": value.lora_rank}, seed=settings.run.seed)
    _check_positions(settings, model.config)
    return model


def _check_positions(settings: Settings, config: LlamaConfig) -> None:
    positions = config.max_position_embeddings
    if settings.data.sequence_length > positions:
        raise InputError(
            f"data.sequence_length={settings.data.sequence_length} is longer than the model's {positions} positions",
            where=settings.sources["data.sequence_length"],
            fix=f"set data.sequence_length to {positions} or less",
        )


def _made(settings: Settings, folder: Path | None) -> MTPForCausalLM:
    with torch.device("meta"):
        if folder is None:
            model = build(settings, load_tokenizer(tokenizer_folder(settings)))
        else:
            model = _empty(_config(folder, settings.model.heads), str(folder))
    model.tie_weights()
    return model


def _empty(config: LlamaConfig, where: str) -> MTPForCausalLM:
    try:
        return MTPForCausalLM(config)
    except Exception as error:  # a config that makes no sense raises anything
        reason = " ".join(str(error).split())
        raise InputError(f"its configuration makes no model: {reason}", where=where, fix="replace the file") from error


def _folder(settings: Settings, find: Callable[[Settings], Path | None]) -> Path | None:
    try:
        return find(settings)
    except InputError as error:
        hint = "for a plan, a folder with config.json alone will do"
        raise InputError(error.what, where=error.where, fix=f"{error.fix}; {hint}") from None


def _config(path: Path, heads: int) -> LlamaConfig:
    file = path / CONFIG
    if path.is_dir() and file.is_file():
        stored = read_json(file, "set model.path to a Llama-family folder")
        if stored.get("model_type") != "llama":
            raise InputError(
                f"model_type is {stored.get('model_type')!r}, not 'llama'", where=str(file), fix="use a Llama"
            )
        return config_with_heads(stored, heads, str(file))
    found = open_stored(path)
    return config_with_heads(found.config, heads, str(found.files[0]))
