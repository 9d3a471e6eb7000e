"""What is known of each token goes the way of the token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_worker.data.dataset import Dataset, rewards
from wmtp_worker.data.packing import collate_column
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import Sample

CAPACITY = 12


def dataset(lengths, **columns):
    samples = [
        Sample(np.arange(length, dtype=np.int32) + 10 * length, 1, reward=number % 2)
        for number, length in enumerate(lengths)
    ]
    return Dataset(samples, PackedSampler(lengths, CAPACITY, seed=3), CAPACITY, 0, columns)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=30), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_column_lies_where_its_tokens_lie(lengths, rows_per_batch):
    plain = dataset(lengths)
    data = plain.with_columns(value=[sample.ids.astype(np.float32) / 2 for sample in plain.samples])
    for batch, without in zip(data.epoch(rows_per_batch), plain.epoch(rows_per_batch), strict=True):
        column = batch.columns["value"]
        assert (column.dtype, column.shape) == (torch.float32, batch.input_ids.shape)
        assert torch.equal(column, batch.input_ids / 2)  # padding is token 0, and 0 in the column
        assert torch.equal(batch.input_ids, without.input_ids)
        assert without.columns == {}


def test_collate_column_by_hand():
    column = collate_column([[np.float32([1, 2]), np.float32([3])], [np.float32([4])]], 4)
    assert column.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]


def test_moving_a_batch_moves_its_columns():
    batch = dataset([3], value=[np.float32([1, 2, 3])]).batch([[0]])
    moved = batch.to(torch.device("meta"))
    assert moved.columns["value"].device.type == "meta"
    assert moved.input_ids.device.type == "meta"


def test_columns_are_added_not_replaced():
    data = dataset([2], one=[np.float32([1, 1])]).with_columns(two=[np.float32([2, 2])])
    assert {name: column.tolist()[0][:2] for name, column in data.batch([[0]]).columns.items()} == {
        "one": [1, 1],
        "two": [2, 2],
    }


@pytest.mark.parametrize("column", [[], [np.float32([1, 2])], [np.float32([1, 2, 3]), np.float32([1])]])
def test_a_column_of_another_length_is_refused(column):
    with pytest.raises(ValueError, match="column value"):
        dataset([3], value=column)


def test_the_reward_stands_at_the_last_token():
    assert [values.tolist() for values in rewards(dataset([3, 2]).samples)] == [[0, 0, 0], [0, 1]]
