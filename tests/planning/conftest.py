"""Policies so small that their figures can be counted, and the bytes that a real step holds."""

import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import TINY
from wmtp_worker.settings import load

# of Llama 2 7B, its last four layers as heads: what Meta's 7b_1t_4 is, too
SEVEN = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 29,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture
def seven(tmp_path):
    """A folder that has a 7B model's config.json and nothing else."""
    folder = tmp_path / "7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN))
    return folder


@pytest.fixture
def settings(tmp_path):
    def make(*overrides, preset="smoke", tiny=True):
        chosen = [*(TINY if tiny else ()), f"run.workdir={tmp_path / 'work'}", *overrides]
        return load(preset=preset, overrides=chosen, environ={})

    return make


class Live(TorchDispatchMode):
    """The bytes of all tensors that are alive, and the most there ever were."""

    def __init__(self, *known):
        super().__init__()
        self._sizes, self.now, self.peak = {}, 0, 0
        for tensor in known:
            self._add(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key):
        self.now -= self._sizes.pop(key, 0)


@pytest.fixture
def live():
    return Live
