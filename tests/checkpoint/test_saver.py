"""The background saver: what overlaps, what waits, what is dropped, what an error does."""

import logging
import threading
import time

import pytest
import torch

from wmtp_worker.checkpoint import lowly, queue, restore, staging, store
from wmtp_worker.checkpoint import saver as saver_module
from wmtp_worker.checkpoint.optimizer import expected_tensors, optimizer_tensors
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER, Snapshot
from wmtp_worker.errors import DiskFullError, Interrupted, TrainingDiverged

from .conftest import FACTS


class Brake:
    """Stands in for `store.write`: each call stops until it is let go, and counts."""

    def __init__(self, monkeypatch):
        self._write, self._go = store.write, threading.Semaphore(0)
        self.begun = []
        monkeypatch.setattr(saver_module.store, "write", self)

    def __call__(self, paths, snapshot, **options):
        self.begun.append(snapshot.step)
        assert self._go.acquire(timeout=20)
        return self._write(paths, snapshot, **options)

    def let_go(self, times=1):
        self._go.release(times)

    def let_go_soon(self, times=1):
        """While the thread that asks is waiting."""
        threading.Timer(0.1, self.let_go, (times,)).start()

    def wait_for(self, begun):
        limit = time.monotonic() + 20
        while self.begun != begun:
            assert time.monotonic() < limit, self.begun
            time.sleep(0.005)


@pytest.fixture
def brake(monkeypatch):
    return Brake(monkeypatch)


def loaded(paths, step):
    checkpoint = restore.find(paths, step)
    return checkpoint.model_tensors()


def tear(paths, monkeypatch, gated):
    """Save many tensors that are 0, and set them to 1 while half of them are copied; what the checkpoint has."""
    tensors = {f"w{number}": torch.zeros(1000) for number in range(40)}
    copy, copied, half, changed = staging._copy, [], threading.Event(), threading.Event()

    def pause(view, tensor):
        copy(view, tensor)
        copied.append(tensor)
        if len(copied) == 20:
            half.set()
            changed.wait(0.5 if gated else 20)

    monkeypatch.setattr(staging, "_copy", pause)
    with Saver(paths) as saver:
        saver.prepare({MODEL: tensors})
        saver.save(Snapshot(1, {MODEL: tensors}, {}, FACTS))
        if gated:
            saver.gate()
        else:
            assert half.wait(20)
        for value in tensors.values():
            value.fill_(1.0)
        changed.set()
        saver.flush()
    return {float(value.max()) for value in loaded(paths, 1).values()}


def test_no_tensor_is_torn_behind_the_gate(paths, monkeypatch):
    assert tear(paths, monkeypatch, gated=True) == {0.0}


def test_the_gate_is_what_prevents_it(paths, monkeypatch):
    assert tear(paths, monkeypatch, gated=False) == {0.0, 1.0}


def test_a_save_does_not_wait_for_the_disk_and_takes_documents_by_value(paths, snapshot, brake):
    written = []
    with Saver(paths, written=lambda step, folder: written.append((step, folder.name))) as saver:
        taken = snapshot(3)
        saver.save(taken)
        taken.documents["state.json"]["step"] = 99
        saver.gate()
        taken.tensors[MODEL]["w"].fill_(-1)
        brake.wait_for([3])
        assert (saver.pending, saver.writing) == ({3}, 3)
        assert saver.before_now > 8000
        assert not written
        brake.let_go()
        assert saver.flush(20)
    assert written == [(3, "step_3")]
    assert saver.last.step == 3
    assert (saver.pending, saver.writing, saver.before_now) == (frozenset(), None, 0)
    assert (loaded(paths, 3)["w"] == 3).all()
    assert restore.find(paths, 3).document("state.json", dict) == {"step": 3}


def test_the_newest_takes_the_place_of_the_one_that_waits(paths, snapshot, brake, caplog):
    caplog.set_level(logging.INFO)
    with Saver(paths) as saver:
        saver.save(snapshot(1))
        brake.wait_for([1])
        for step in (2, 3, 4):
            saver.save(snapshot(step))
            saver.gate()
        assert saver.pending == {1, 4}
        brake.let_go(2)
        saver.flush()
    assert paths.steps() == [1, 4]
    assert (loaded(paths, 4)["w"] == 4).all()
    assert "step_2 is not written: step_3 came first" in caplog.text
    assert "step_3 is not written: step_4 came first" in caplog.text


def test_with_one_buffer_the_next_save_waits_at_the_gate(paths, snapshot, brake):
    with Saver(paths, buffers=1) as saver:
        assert saver.prepare(snapshot(1).tensors) == sum(
            file.nbytes for buffers in saver._free for file in buffers.files.values()
        )
        saver.save(snapshot(1))
        brake.wait_for([1])
        saver.save(snapshot(2))
        assert paths.steps() == []
        brake.let_go_soon(2)
        saver.gate()
        assert paths.steps()[:1] == [1]
        saver.flush()
    assert paths.steps() == [1, 2]


def test_waiting_ticks_only_while_something_gets_on(paths, snapshot, brake, monkeypatch):
    monkeypatch.setattr(queue, "_TICK_SECONDS", 0.02)
    ticks = []
    with Saver(paths, tick=lambda: ticks.append(1)) as saver:
        saver.save(snapshot(1))
        brake.wait_for([1])
        assert not saver.flush(0.2)  # the writer hangs
        assert len(ticks) <= 1
        limit = time.monotonic() + 20
        while len(ticks) < 4 and time.monotonic() < limit:
            threading.Timer(0.05, saver._queue.moved).start()
            saver.flush(0.1)
        assert len(ticks) >= 4
        brake.let_go()


def test_what_tick_raises_ends_the_waiting_and_the_save_is_not_lost(paths, snapshot, brake):
    stopped = [True]

    def tick():
        if stopped and stopped.pop():
            raise Interrupted("stopped")

    saver = Saver(paths, buffers=1, tick=tick)
    saver.save(snapshot(1))
    brake.wait_for([1])
    saver.save(snapshot(2))
    ended = threading.Event()

    def get_on():
        while not ended.wait(0.05):
            saver._queue.moved()

    thread = threading.Thread(target=get_on)
    thread.start()
    with pytest.raises(Interrupted):
        saver.gate()
    ended.set()
    thread.join()
    brake.let_go(2)
    assert saver.save_now(snapshot(2)).name == "step_2"
    saver.close()
    assert paths.steps() == [1, 2]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_skips_the_save_and_nothing_else(paths, snapshot, monkeypatch, caplog, background):
    write, full, rooms = store.write, [True, True], []

    def sometimes(*args, **options):
        if full and full.pop():
            raise DiskFullError("the disk is full")
        return write(*args, **options)

    monkeypatch.setattr(saver_module.store, "write", sometimes)
    with Saver(paths, background=background, make_room=lambda: rooms.append(1)) as saver:
        saver.save(snapshot(1))
        saver.flush()
        assert (paths.steps(), rooms) == ([], [1])
        assert "step_1 is NOT saved" in caplog.text
        full.append(True)  # room helps
        saver.save(snapshot(2))
        saver.flush()
    assert paths.steps() == [2]


def test_other_errors_are_raised_by_the_next_call_once(paths, snapshot):
    def inspect(step, tensors):
        if not all(value.isfinite().all() for value in tensors[MODEL].values()):
            raise TrainingDiverged(f"not finite after step {step}")

    with Saver(paths, inspect=inspect) as saver:
        bad = snapshot(1)
        bad.tensors[MODEL]["w"][3] = float("nan")
        saver.save(bad)
        with pytest.raises(TrainingDiverged, match="step 1"):
            saver.flush()
        saver.save(snapshot(2))
        saver.flush()
    assert paths.steps() == [2]


def test_an_error_of_the_callback_is_none_of_the_save(paths, snapshot, caplog):
    def written(step, folder):
        raise DiskFullError("the disk is full")

    saver = Saver(paths, written=written)
    saver.save(snapshot(1))
    with pytest.raises(DiskFullError):
        saver.flush()
    saver.close()
    assert paths.steps() == [1]
    assert "NOT saved" not in caplog.text


def test_whatever_goes_wrong_with_a_copy_is_raised_and_nobody_waits_for_it(paths, snapshot, monkeypatch):
    copy, broken = staging._copy, [True]

    def break_once(view, tensor):
        if broken and broken.pop():
            raise KeyError(torch.complex32)
        copy(view, tensor)

    monkeypatch.setattr(staging, "_copy", break_once)
    with Saver(paths, buffers=1) as saver:
        saver.save(snapshot(1))
        saver.gate()
        with pytest.raises(KeyError):
            saver.flush()
        saver.save(snapshot(2))  # its buffers are there again
        saver.flush()
    assert paths.steps() == [2]


def test_the_memory_that_was_prepared_is_what_is_used(paths):
    """In whatever order the names come: the optimizer gives its state parameter by parameter."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, norms = [[p for p in model.parameters() if (p.ndim == 2) == two] for two in (True, False)]
    optimizer = torch.optim.AdamW([{"params": norms}, {"params": matrices}])
    weights = {name: parameter.data for parameter, name in names.items()}
    with Saver(paths, buffers=1) as saver:
        saver.prepare({MODEL: weights, OPTIMIZER: expected_tensors(names)}, weights)
        taken = {name: file.memory.data_ptr() for name, file in saver._free[0].files.items()}
        best = saver._free_for_exports[0].files["weights"].memory.data_ptr()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        state = {MODEL: weights, OPTIMIZER: optimizer_tensors(optimizer, names)}
        saver.export(paths.best, 1, weights, {"step": 1, "config": {}})
        saver.save(Snapshot(1, state, {}, FACTS))
        saver.flush()
        assert {name: file.memory.data_ptr() for name, file in saver._free[0].files.items()} == taken
        assert saver._free_for_exports[0].files["weights"].memory.data_ptr() == best


def test_inline_saves_go_through_the_same_code(paths, snapshot):
    before = set(threading.enumerate())
    written = []

    def note(step, folder):
        written.append(step)
        assert saver.last.pause >= saver.last.write > 0  # all of it, before anybody counts it

    with Saver(paths, background=False, written=note, tick=lambda: written.append("tick")) as saver:
        assert saver.prepare(snapshot(1).tensors) == 0
        saver.save(snapshot(1), since=time.perf_counter() - 5)
        assert written == ["tick", 1]
        assert saver.last.pause > 5
        saver.gate()
        assert set(threading.enumerate()) <= before
    assert (loaded(paths, 1)["w"] == 1).all()


def test_without_memory_for_a_copy_saves_block_and_say_so(paths, snapshot, monkeypatch, caplog):
    size = staging.nbytes(store.contents_of(snapshot(1)))
    monkeypatch.setattr(staging, "memory_available", lambda: 3 * size)
    with Saver(paths) as saver:
        assert saver.prepare(snapshot(1).tensors) == size  # one copy, not two
    assert "waits for a save where the one before it is not written yet" in caplog.text
    monkeypatch.setattr(staging, "memory_available", lambda: size)
    with Saver(paths) as saver:
        assert saver.prepare(snapshot(1).tensors) == 0
        saver.save(snapshot(1))
        assert paths.steps() == [1]
    assert "the training stops for each save" in caplog.text


def test_a_copy_that_gets_no_memory_is_written_at_the_gate(paths, snapshot, monkeypatch, caplog):
    with Saver(paths) as saver:
        saver.prepare({})

        def lay_out(self, contents):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(staging.Buffers, "lay_out", lay_out)
        saver.save(snapshot(1))
        saver.gate()
        assert paths.steps() == [1]
        saver.save(snapshot(2))
        saver.flush()
    assert paths.steps() == [1, 2]
    assert "no copy of step_1 can be made" in caplog.text


def test_only_one_writes_where_a_copy_gets_no_memory(paths, snapshot, brake, monkeypatch):
    with Saver(paths) as saver:
        saver.save(snapshot(1))
        brake.wait_for([1])

        def lay_out(self, contents):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(staging.Buffers, "lay_out", lay_out)
        saver.save(snapshot(2))
        threading.Timer(0.3, lambda: (brake.begun.append("let go"), brake.let_go(2))).start()
        saver.gate()
    assert brake.begun == [1, "let go", 2]
    assert paths.steps() == [1, 2]


def test_a_save_in_the_background_takes_its_time_unless_somebody_waits(paths, snapshot, monkeypatch):
    monkeypatch.setattr(saver_module, "_WORTH_A_PACE", 0)
    monkeypatch.setattr(lowly, "_SHARE", 1e-9)  # it would rest for ever
    with Saver(paths) as saver:
        saver.save(snapshot(1))
        while saver.writing is None:  # not by the gate: while somebody waits for that, the writer does not rest
            time.sleep(0.005)
        time.sleep(0.1)
        assert paths.steps() == []
        saver.save(snapshot(2))  # a newer one waits
        saver.gate()
        while not paths.steps():
            time.sleep(0.005)
        saver.flush()  # and now the training does
        assert saver.last.busy < saver.last.write
    assert paths.steps() == [1, 2]


def test_the_layout_follows_the_tensors(paths, snapshot):
    with Saver(paths) as saver:
        for step, size in ((1, 10), (2, 1000), (3, 5)):
            saver.save(snapshot(step, size=size))
            saver.flush()
    assert [len(loaded(paths, step)["w"]) for step in (1, 2, 3)] == [10, 1000, 5]


def test_an_emergency_save_finishes_the_one_being_written_and_drops_the_one_that_waits(paths, snapshot, brake, caplog):
    caplog.set_level(logging.INFO)
    with Saver(paths) as saver:
        saver.save(snapshot(1))
        brake.wait_for([1])
        saver.save(snapshot(2))
        saver.gate()
        brake.let_go_soon(9)
        saver.save_now(snapshot(3))
        assert paths.steps() == [1, 3]
        assert "step_2 is not written: step_3 came first" in caplog.text
        saver.save(snapshot(4))
        saver.flush()
    assert paths.steps() == [1, 3, 4]


def test_an_emergency_save_of_the_step_being_written_waits_for_it(paths, snapshot, brake):
    with Saver(paths) as saver:
        saver.save(snapshot(1))
        brake.wait_for([1])
        brake.let_go_soon()
        assert saver.save_now(snapshot(1)).name == "step_1"
    assert brake.begun == [1]


def test_an_emergency_save_of_the_weights_alone(paths, snapshot, caplog):
    with Saver(paths) as saver:
        saver.save(snapshot(1))
        saver.flush()
        saver.save_now(snapshot(2), kind="trainable")
        assert saver.last.kind == "trainable"
    assert restore.find(paths, "auto").manifest.step == 1
    assert "--resume 2 takes it" in caplog.text
    checkpoint = restore.find(paths, 2)
    assert checkpoint.manifest.kind == "trainable"
    assert (checkpoint.has(MODEL), checkpoint.has(OPTIMIZER)) == (True, False)


def test_close_finishes_what_was_begun_and_joins_its_threads(paths, snapshot):
    before = set(threading.enumerate())
    saver = Saver(paths)
    saver.save(snapshot(1))
    saver.close()
    saver.close()
    assert paths.steps() == [1]
    assert set(threading.enumerate()) <= before
