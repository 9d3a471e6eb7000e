"""Policies so small that their figures can be counted, and the bytes that a real step holds."""

import json

import pytest

from tests.conftest import TINY
from tests.planning.live import Live
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


@pytest.fixture
def live():
    return Live
