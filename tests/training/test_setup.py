"""What happens before and behind the training, without a run."""

import pytest
import torch

from wmtp_worker.assets.resolve import dataset_folder, tokenizer_folder
from wmtp_worker.data.tokenizer import load_tokenizer
from wmtp_worker.errors import InputError, Interrupted
from wmtp_worker.settings import load
from wmtp_worker.training.session import _is_finite
from wmtp_worker.training.splits import load_split


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


def split(tiny_settings, name, *overrides):
    settings = load(overrides=[*tiny_settings, *overrides], environ={})
    tokenizer = load_tokenizer(tokenizer_folder(settings))
    return load_split(settings, dataset_folder(settings), name, tokenizer, lambda: None)


def test_wrong_solutions_are_trained_on_where_asked_and_never_validated_on(tiny_settings):
    rewards = {
        (name, which): {sample.reward for sample in split(tiny_settings, name, f"data.solutions={which}").samples}
        for name in ("train", "validation")
        for which in ("correct", "all")
    }
    assert rewards == {
        ("train", "correct"): {1.0},
        ("train", "all"): {0.0, 1.0},
        ("validation", "correct"): {1.0},
        ("validation", "all"): {1.0},
    }


def test_a_format_is_believed(tiny_settings):
    found = split(tiny_settings, "validation", "data.format=mbpp").samples
    assert len(found) == len(split(tiny_settings, "validation").samples)
    with pytest.raises(InputError, match=r"question: Field required"):
        split(tiny_settings, "validation", "data.format=gsm8k")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_numbers(dtype):
    values = torch.linspace(-1, 1, 1000, dtype=dtype)
    assert _is_finite(values)
    assert _is_finite(values[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert not _is_finite(values.clone().index_fill_(0, torch.tensor([500]), bad))
