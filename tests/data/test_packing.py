"""Packing loses nothing, overfills nothing, and lays samples side by side without touching."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_worker.data.packing import IGNORE, WINDOW, Batch, collate, pack
from wmtp_worker.data.tokenizer import Sample

CAPACITY = 20
length_lists = st.lists(st.integers(1, CAPACITY), max_size=200)
orders = length_lists.flatmap(lambda lengths: st.tuples(st.just(lengths), st.permutations(range(len(lengths)))))


def flat(rows: list[list[int]]) -> list[int]:
    return [index for row in rows for index in row]


def sample(ids: list[int], prompt_length: int) -> Sample:
    return Sample(np.asarray(ids, dtype=np.int32), prompt_length)


# --- pack


@given(orders)
def test_every_sample_exactly_once_and_no_row_overfull(case):
    lengths, order = case
    rows = pack(order, lengths, CAPACITY)
    assert sorted(flat(rows)) == list(range(len(lengths)))
    assert all(row for row in rows)
    assert all(sum(lengths[index] for index in row) <= CAPACITY for row in rows)


@given(orders)
def test_packing_is_a_function_of_its_arguments(case):
    lengths, order = case
    before = (list(lengths), list(order))
    assert pack(order, lengths, CAPACITY) == pack(tuple(order), tuple(lengths), CAPACITY)
    assert (lengths, list(order)) == before


@given(orders)
def test_never_more_rows_than_best_fit_promises(case):
    """No two rows of a window can both be at most half full: one's samples would have fitted into the other."""
    lengths, order = case
    rows = pack(order, lengths, CAPACITY)
    half_empty = [row for row in rows if 2 * sum(lengths[index] for index in row) <= CAPACITY]
    assert len(half_empty) <= 1


def test_best_fit_decreasing_by_hand():
    # 6, then 5 in a row of its own, 4 into the fuller one that has room, 3 and 2 beside 5, the other 3 alone
    assert pack(range(6), [6, 5, 4, 3, 3, 2], 10) == [[0, 2], [1, 3, 5], [4]]
    # 7 and 6; 3 goes where it fits exactly, though the first row was there first
    assert pack(range(4), [6, 7, 3, 4], 10) == [[0, 3], [1, 2]]


def test_rows_come_in_the_order_of_their_longest_samples():
    assert pack([2, 0, 1], [9, 8, 7], 10) == [[2], [0], [1]]


def test_windows_are_packed_one_after_the_other():
    lengths = [6] * WINDOW + [4] * WINDOW
    rows = pack(range(2 * WINDOW), lengths, 10)
    assert rows[:WINDOW] == [[index] for index in range(WINDOW)]
    assert len(rows) == WINDOW + WINDOW // 2


def test_nothing_to_pack():
    assert pack([], [], CAPACITY) == []


@settings(max_examples=25)
@given(st.lists(st.integers(CAPACITY // 2 + 1, CAPACITY), min_size=65, max_size=150), st.integers(1, 9))
def test_closing_rows_loses_no_sample(large, small):
    """Samples over half a row never share, so that far more than 64 rows are opened."""
    lengths = large + [small] * 30
    rows = pack(range(len(lengths)), lengths, CAPACITY)
    assert len(rows) >= len(large)
    assert sorted(flat(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= CAPACITY for row in rows)


# --- collate


def test_collate_by_hand():
    batch = collate([[sample([5, 6, 7], 2), sample([8, 9], 1)], [sample([4, 3, 2, 1], 3)]], 7, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 99, 99], [4, 3, 2, 1, 99, 99, 99]]
    assert batch.labels.tolist() == [
        [IGNORE, IGNORE, 7, IGNORE, 9, IGNORE, IGNORE],
        [IGNORE, IGNORE, IGNORE, 1, IGNORE, IGNORE, IGNORE],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert batch.real_tokens == 9


samples = st.lists(st.integers(0, 30), min_size=1, max_size=8).flatmap(
    lambda ids: st.builds(sample, st.just(ids), st.integers(0, len(ids)))
)


@settings(max_examples=40)
@given(st.lists(st.lists(samples, max_size=4), min_size=1, max_size=3), st.integers(0, 5))
def test_every_sample_can_be_read_back_from_its_segment(rows, spare):
    length = max(sum(len(one.ids) for one in row) for row in rows) + spare + 1
    batch = collate(rows, length, pad_id=77)
    for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids):
        assert tensor.dtype == torch.int64
        assert tensor.shape == (len(rows), length)
    for number, row in enumerate(rows):
        for segment, one in enumerate(row, start=1):
            where = batch.segment_ids[number] == segment
            ids = one.ids.tolist()
            assert batch.input_ids[number][where].tolist() == ids
            assert batch.position_ids[number][where].tolist() == list(range(len(ids)))
            assert batch.labels[number][where].tolist() == [IGNORE] * one.prompt_length + ids[one.prompt_length :]
        padding = batch.segment_ids[number] == 0
        assert int(padding.sum()) == length - sum(len(one.ids) for one in row)
        assert set(batch.input_ids[number][padding].tolist()) <= {77}
        assert set(batch.labels[number][padding].tolist()) <= {IGNORE}
    assert batch.real_tokens == sum(len(one.ids) for row in rows for one in row)
    assert 0 <= int(batch.position_ids.min()) <= int(batch.position_ids.max()) < length


def test_full_row_has_no_padding():
    batch = collate([[sample([1, 2, 3], 1), sample([4], 0)]], 4, pad_id=0)
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2]]


def test_row_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="broadcast"):
        collate([[sample([1, 2, 3], 1)]], 2, pad_id=0)


def test_moving_a_batch_keeps_every_tensor_in_its_place():
    batch = collate([[sample([5, 6, 7], 2), sample([8, 9], 1)]], 7, pad_id=99)
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, Batch)
    for name in ("input_ids", "labels", "position_ids", "segment_ids"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
