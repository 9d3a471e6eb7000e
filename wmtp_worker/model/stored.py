"""A model as it lies on a disk, in whatever layout: our config, our names, tensors read when they are asked for."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LlamaConfig

from wmtp_worker.errors import InputError
from wmtp_worker.model.mtp import MTPForCausalLM

Layout = Literal["meta", "hf", "ours", "gguf", "run"]


def _unchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Lazy(Mapping[str, torch.Tensor]):
    """Tensors that lie mapped in a file; each goes through `change` when it is asked for, and is not kept.

    `change` leaves shape and dtype as they are. Where there is nothing to map (GGUF), `mapped` says only these two.
    """

    mapped: Mapping[str, torch.Tensor]
    change: Callable[[str, torch.Tensor], torch.Tensor] = _unchanged

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.change(name, self.mapped[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.mapped)

    def __len__(self) -> int:
        return len(self.mapped)

    def __contains__(self, name: object) -> bool:
        return name in self.mapped  # Mapping's own would make the tensor


@dataclass(frozen=True)
class Stored:
    """A model on a disk. Holds no weights in memory.

    `config` is what `LlamaConfig.from_dict` takes, with `n_future_tokens` only where further heads are stored.
    `tensors` are named as `MTPForCausalLM` names them; a tied unembedding is not among them.
    """

    layout: Layout
    path: Path
    config: dict[str, Any]
    tensors: Lazy
    files: tuple[Path, ...] = field(default=())  # everything that determines the model

    @property
    def heads(self) -> int:
        """How many tokens ahead it predicts."""
        return int(self.config.get("n_future_tokens") or 1)

    def check(self) -> "Stored":
        """Itself, once every tensor has name and shape as the config says. Raises `InputError` with the first."""
        expected = expected_tensors(self.config, str(self.path))
        for wrong, names in {
            "missing": expected.keys() - self.tensors.keys(),
            "not part of the model that its configuration describes": self.tensors.keys() - expected.keys(),
        }.items():
            if names:
                raise InputError(
                    f"{len(names)} tensors are {wrong}, {min(names)} among them",
                    where=str(self.path),
                    fix="check that configuration and weights are whole and belong together",
                )
        for name, shape in expected.items():
            if self.tensors.mapped[name].shape != shape:
                raise InputError(
                    f"{name} has shape {list(self.tensors.mapped[name].shape)}, the configuration says {list(shape)}",
                    where=str(self.path),
                    fix="check that configuration and weights belong together",
                )
        return self

    def describe(self) -> dict[str, Any]:
        """What `wmtp models show` prints, as JSON values; `bytes` are those of the tensors as stored."""
        llama = LlamaConfig.from_dict(self.config)
        mapped = self.tensors.mapped
        return {
            "layout": self.layout,
            "heads": self.heads,
            "layers": llama.num_hidden_layers,
            "hidden_size": llama.hidden_size,
            "intermediate_size": llama.intermediate_size,
            "attention_heads": llama.num_attention_heads,
            "key_value_heads": llama.num_key_value_heads,
            "vocabulary": llama.vocab_size,
            "positions": llama.max_position_embeddings,
            "rope": rotary(self.config),
            "tied": llama.tie_word_embeddings,
            "parameters": sum(tensor.numel() for tensor in mapped.values()),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in mapped.values()),
            "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in mapped.values())),
        }


def expected_tensors(config: dict[str, Any], where: str) -> dict[str, torch.Size]:
    """Name and shape of every tensor of the policy of this config, tied ones once. Raises `InputError`."""
    try:
        with torch.device("meta"):
            model = MTPForCausalLM(LlamaConfig.from_dict({"n_future_tokens": 1, **config}))
    except Exception as error:  # a config that makes no sense raises anything
        reason = " ".join(str(error).split())
        raise InputError(f"its configuration makes no model: {reason}", where=where, fix="replace the file") from error
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions, `rope_theta` and `rope_type` among them, by whatever names the config has them."""
    found = LlamaConfig.from_dict(config).rope_parameters
    assert found is not None  # a Llama always has them
    return dict(found)


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {path.name}", where=f"model folder {path.parent}", fix=fix) from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path), fix="replace the file") from None
    if not isinstance(content, dict):
        raise InputError(f"holds a {type(content).__name__}, not an object", where=str(path), fix="replace the file")
    return content


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """`map_pickled` of a file that holds weights alone. Raises `InputError`."""
    content = map_pickled(path)
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} is no tensor", where=str(path), fix="use the published file")
    return {name: tensor.detach() for name, tensor in content.items()}  # some hold parameters


def map_pickled(path: Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, its tensors mapped, not read. Unpickles tensors and plain values only."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # UnpicklingError for code, RuntimeError for a broken or old-style file, and others
        raise InputError(
            f"the weights do not load: {first_sentence(error)}",
            where=str(path),
            fix="use a file that holds tensors alone, saved by torch 1.6 or newer; code in it is never run",
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"holds a {type(content).__name__}, not tensors by name", where=str(path), fix="replace it")
    return content


def first_sentence(error: Exception) -> str:
    """What went wrong. torch goes on with advice to load code."""
    return " ".join(str(error).split()).split(". ")[0]
