"""One stream of rows, the same from wherever it is taken up again."""

import json
from dataclasses import asdict

from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_worker.data.packing import pack
from wmtp_worker.data.sampler import PackedSampler, Position

LENGTHS = [3, 9, 4, 10, 1, 7, 7, 2, 5, 6, 8, 3, 2, 2, 9, 4]
CAPACITY = 10
Rows = list[list[int]]


def sampler(seed: int = 7, packing: bool = True, lengths: list[int] = LENGTHS) -> PackedSampler:
    return PackedSampler(lengths, CAPACITY, seed, packing)


def flat(rows: Rows) -> list[int]:
    return [index for row in rows for index in row]


def stream(source: PackedSampler, epochs: int) -> Rows:
    return [row for epoch in range(epochs) for row in source.rows(epoch)]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    packing=st.booleans(),
    lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=30),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
)
def test_taken_in_any_portions_it_is_the_same_stream(seed, packing, lengths, counts):
    """Each portion comes from a new sampler and a position that went through JSON, as after a restart."""
    taken: Rows = []
    state = json.dumps(Position().to_json())
    for count in counts:
        rows, position = sampler(seed, packing, lengths).take(Position(**json.loads(state)), count)
        assert len(rows) == count
        taken += rows
        state = json.dumps(position.to_json())
    whole = stream(sampler(seed, packing, lengths), epochs=1 + len(taken))[: len(taken)]
    assert taken == whole


@given(seed=st.integers(0, 2**32), packing=st.booleans(), epoch=st.integers(0, 1000))
def test_every_epoch_is_every_sample_once(seed, packing, epoch):
    rows = sampler(seed, packing).rows(epoch)
    assert sorted(flat(rows)) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[index] for index in row) <= CAPACITY for row in rows)


def test_epochs_and_seeds_differ():
    orders = {tuple(flat(sampler(seed, packing=False).rows(epoch))) for seed in range(5) for epoch in range(20)}
    assert len(orders) == 100
    assert tuple(range(len(LENGTHS))) not in orders


def test_epoch_does_not_depend_on_what_was_asked_before():
    wandering = sampler()
    for epoch in (5, 0, 3, 3, 5):
        assert wandering.rows(epoch) == sampler().rows(epoch)


def test_packing_off_is_one_sample_a_row_in_the_same_order():
    alone = sampler(packing=False).rows(4)
    assert all(len(row) == 1 for row in alone)
    assert sampler(packing=True).rows(4) == pack(flat(alone), LENGTHS, CAPACITY)
    assert len(sampler(packing=True).rows(4)) < len(alone)


def test_take_goes_across_epochs():
    source = sampler(packing=False)
    rows, position = source.take(Position(epoch=2, row=14), 2 + 16 + 3)
    assert rows == source.rows(2)[14:] + source.rows(3) + source.rows(4)[:3]
    assert position == Position(epoch=4, row=3)


def test_end_of_an_epoch_is_the_start_of_the_next():
    assert sampler(packing=False).take(Position(), 16)[1] == Position(epoch=1, row=0)


def test_position_given_is_left_alone():
    position = Position(epoch=1, row=2)
    sampler().take(position, 9)
    assert asdict(position) == {"epoch": 1, "row": 2}
    assert position.to_json() == {"epoch": 1, "row": 2}


def test_taking_nothing_moves_nothing():
    assert sampler().take(Position(epoch=1, row=2), 0) == ([], Position(epoch=1, row=2))
