"""Models so small that a forward pass takes a millisecond."""

from collections.abc import Callable

import pytest
from transformers import LlamaConfig


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Every test of this room."""


@pytest.fixture(scope="session")
def config() -> Callable[..., LlamaConfig]:
    """`config(tie_word_embeddings=True, …)`: a tiny Llama's, with the changes made."""

    def make(**changes: object) -> LlamaConfig:
        shape = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            # far wider than usual, so that attention is not nearly uniform and every token matters
            "initializer_range": 0.3,
            "pad_token_id": None,
        }
        return LlamaConfig(**(shape | changes))

    return make
