"""What happens before and behind the training, without a run."""

import pytest
import torch

from wmtp_worker.assets.resolve import dataset_folder, tokenizer_folder
from wmtp_worker.data.tokenizer import load_tokenizer
from wmtp_worker.errors import Interrupted
from wmtp_worker.settings import load
from wmtp_worker.training.session import _is_finite
from wmtp_worker.training.setup import load_split


def test_tokenizing_heeds_a_stop(tiny_settings, tmp_path):
    settings = load(overrides=tiny_settings, options={"run.workdir": str(tmp_path)}, environ={})
    tokenizer = load_tokenizer(tokenizer_folder(settings))
    polls = []

    def poll():
        polls.append(1)
        if len(polls) == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        load_split(settings, dataset_folder(settings), "validation", tokenizer, poll)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_numbers(dtype):
    values = torch.linspace(-1, 1, 1000, dtype=dtype)
    assert _is_finite(values)
    assert _is_finite(values[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not _is_finite(values.clone().index_fill_(0, torch.tensor([500]), bad))
