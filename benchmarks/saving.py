"""What a save costs the training, beside one memcpy of the same bytes, `torch.save`, and torch's own asynchronous save.

    python benchmarks/saving.py [--folder DIR] [--rounds N] [--megabytes 200 2400] [--parts pause slowdown restore]

All sides alternate in one run; medians are compared. At the end: the same on paper for a model of 7B on 8 GPUs. With
`--parts` only those are measured, and nothing is kept.
"""

import argparse
import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the worker does: spinning threads would disturb each other

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import median, record
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from wmtp_worker.checkpoint import restore, store
from wmtp_worker.checkpoint.optimizer import expected_tensors, load_optimizer, optimizer_tensors
from wmtp_worker.checkpoint.saver import Saver
from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER, Snapshot, split_frozen
from wmtp_worker.storage.atomic import fsync_path
from wmtp_worker.storage.layout import RunPaths

FACTS = {"settings_digest": "", "worker_version": "", "torch_version": torch.__version__}
WIDTH, TOKENS = 1024, 192
Note = Callable[[str, float], None]


class Residual(torch.nn.Linear):
    """Without the sum, values would shrink layer by layer to denormal numbers, with which everything is slow."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + super().forward(rows).tanh()


class Training:
    """A model whose weights and two moments have about `size` bytes, and steps that take some time."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        layers = max(2, size // (12 * WIDTH * WIDTH))
        self.model = torch.nn.Sequential(*[Residual(WIDTH, WIDTH) for _ in range(layers)])
        self.names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.rows = torch.randn(TOKENS, WIDTH)
        self.step()

    def step(self, before: Callable[[], object] = lambda: None, gate: Callable[[], object] = lambda: None) -> float:
        """One step with a save at its beginning; its seconds."""
        started = time.perf_counter()
        before()
        self.model(self.rows).square().mean().backward()
        gate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            MODEL: split_frozen(self.model.named_parameters())[0],
            OPTIMIZER: optimizer_tensors(self.optimizer, self.names),
        }

    def snapshot(self, number: int) -> Snapshot:
        return Snapshot(number, self.tensors(), {"state.json": {"step": number}}, FACTS)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(size: int, rounds: int, folder: Path, parts: list[str]) -> dict[str, Any]:
    training = Training(size)
    paths = RunPaths(folder, f"saving-{size}")
    state = training.tensors()
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    expected = {MODEL: state[MODEL], OPTIMIZER: expected_tensors(training.names)}
    result: dict[str, Any] = {"rounds": rounds}
    with Saver(paths, written=lambda step, _: store.prune(paths, 1, step)) as saver:
        result["host memory"] = saver.prepare(expected)
        if "pause" in parts:
            pauses(training, saver, rounds, folder, note)
        if "slowdown" in parts:
            result |= slowdowns(training, saver, rounds, note)
        saver.save(training.snapshot(10**6))
    if "restore" in parts:
        restoring(training, paths, rounds, note)
    result["bytes"] = sum(value.nbytes for tensors in state.values() for value in tensors.values())
    return report(result, {name: statistics.median(values) for name, values in seconds.items()})


def pauses(training: Training, saver: Saver, rounds: int, folder: Path, note: Note) -> None:
    """How long the loop stands still for a save, beside other ways to save the same state."""
    state = training.tensors()
    every = [value for tensors in state.values() for value in tensors.values()]
    target = torch.zeros(sum(value.nbytes for value in every), dtype=torch.uint8)
    stager = DefaultStager(StagingOptions(False, False, True, False))
    blocking, file = RunPaths(folder, "blocking"), folder / "state.pt"

    def copy() -> None:
        at = target.data_ptr()
        for value in every:
            ctypes.memmove(at, value.data_ptr(), value.nbytes)
            at += value.nbytes

    for number in range(rounds + 1):
        told = note if number else lambda name, value: None  # buffers of all sides are warm from the second on
        told("memcpy", timed(copy))
        one_background_save(training, saver, number, told)
        saving = timed(lambda: torch.save(state, file))
        told("torch.save", saving)
        told("torch.save + fsync", saving + timed(lambda: fsync_path(file)))
        file.unlink()
        told("checkpoint", timed(lambda: store.write(blocking, training.snapshot(0))))
        shutil.rmtree(blocking.checkpoints)
        torch_async(training, folder, stager, told)
    stager.close()


def one_background_save(training: Training, saver: Saver, number: int, note: Note) -> list[float]:
    """Steps from one with a save at its beginning to that in which it is on the disk; their seconds."""
    pause = [0.0, 0.0]

    def save() -> None:
        pause[0] = timed(lambda: saver.save(training.snapshot(number)))

    def gate() -> None:
        pause[1] = timed(saver.gate)

    began = time.perf_counter()
    steps = [training.step(save, gate)]
    while saver.pending:
        steps.append(training.step())
    note("behind the training", time.perf_counter() - began)
    note("pause", sum(pause))
    return steps


def slowdowns(training: Training, saver: Saver, rounds: int, note: Note) -> dict[str, Any]:
    """How much slower steps beside a save are than as many before and after; and those than each other: the noise."""
    slowdown, noise, lost = [], [], []
    count = len(one_background_save(training, saver, 0, lambda name, value: None))
    before = [training.step() for _ in range(count)]
    for number in range(1, rounds + 1):
        beside = one_background_save(training, saver, number, note)
        after = [training.step() for _ in range(len(beside))]
        usual = statistics.mean([*before, *after])
        slowdown.append(statistics.mean(beside) / usual - 1)
        noise.append(abs(statistics.mean(after) / statistics.mean(before) - 1))
        lost.append(len(beside) * (statistics.mean(beside) - usual))
        note("step", usual)
        before = after
    return {
        "slowdown of steps beside a save": median(slowdown),
        "slowdown of each round": [round(value, 3) for value in slowdown],
        "difference of steps without a save before and after": median(noise),
        "training lost by a save, s": median(lost),
    }


def torch_async(training: Training, folder: Path, stager: DefaultStager, note: Note) -> None:
    """`async_save` with asynchronous staging: the pause is the call, and the wait for its staging before the step."""
    pending: list[Any] = []
    pause = [0.0, 0.0]

    def save() -> None:
        def call() -> None:
            pending.append(
                dcp.async_save(
                    training.tensors(),
                    checkpoint_id=folder / "dcp",
                    storage_writer=dcp.FileSystemWriter(folder / "dcp", single_file_per_rank=True),
                    async_checkpointer_type=AsyncCheckpointerType.THREAD,
                    async_stager=stager,
                    no_dist=True,
                )
            )

        pause[0] = timed(call)

    def gate() -> None:
        pause[1] = timed(lambda: pending[0].staging_completion.result())

    training.step(save, gate)
    pending[0].upload_completion.result()
    note("async_save", sum(pause))
    for file in (folder / "dcp").iterdir():
        file.unlink()


def restoring(training: Training, paths: RunPaths, rounds: int, note: Note) -> None:
    """Verify, load and copy into model and optimizer, against a plain read of the same files; with a cold cache."""
    (step,) = paths.steps()
    files = [path for path in paths.step(step).iterdir() if path.suffix == ".safetensors"]
    buffer = memoryview(bytearray(8 << 20))

    def forget() -> None:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def read() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def back() -> None:
        checkpoint = restore.find(paths, "auto")
        assert checkpoint is not None
        with torch.no_grad():
            for name, value in checkpoint.tensors(MODEL).items():
                training.model.get_parameter(name).copy_(value)
        load_optimizer(training.optimizer, training.names, checkpoint.tensors(OPTIMIZER), "")

    for _ in range(rounds):
        for name, work in (("plain read", read), ("restore", back)):
            forget()
            note(name, timed(work))
            note(f"{name}, warm", timed(work))


def report(result: dict[str, Any], medians: dict[str, float]) -> dict[str, Any]:
    ratios = [
        ("pause", "memcpy"),
        ("pause", "torch.save"),
        ("pause", "async_save"),
        ("restore", "plain read"),
        ("restore, warm", "plain read, warm"),
    ]
    return {
        **result,
        "seconds": {name: round(value, 5) for name, value in medians.items()},
        **{f"{one} / {other}": round(medians[one] / medians[other], 6) for one, other in ratios if one in medians},
    }


def lora_like(folder: Path) -> dict[str, Any]:
    """Bytes of a save where the trunk is frozen and 1 % is trained, against the same model trained whole."""
    sizes = []
    for trained in (1.0, 0.01):
        layers, names = [torch.nn.Linear(512, 512) for _ in range(100)], {}
        model = torch.nn.Sequential(*layers)
        for layer in layers[int(trained * len(layers)) :]:
            layer.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        names = {parameter: name for name, parameter in model.named_parameters()}
        model(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        trainable, frozen = split_frozen(model.named_parameters())
        paths = RunPaths(folder, f"lora-{trained}")
        for step in (1, 2):
            snapshot = Snapshot(
                step, {MODEL: trainable, OPTIMIZER: optimizer_tensors(optimizer, names)}, {}, FACTS, frozen
            )
            written = store.write(paths, snapshot)
        sizes.append(sum(path.stat().st_size for path in written.iterdir()))
    return {"bytes, all trained": sizes[0], "bytes, 1 % trained": sizes[1], "ratio": round(sizes[1] / sizes[0], 4)}


def on_paper(disk: float = 2e9, line: float = 1.25e9, bus: float = 25e9, per_day: float = 2.0) -> dict[str, Any]:
    """7B parameters, AdamW, fp32 weights and moments, sharded over 8 GPUs of one host.

    `disk`, `line` and `bus` (of each GPU) in bytes/s. Young (1974) and, to first order, Daly (2006): the interval is
    sqrt(2 · cost of a save · mean time between interruptions). The cost is the pause, so what bounds the interval is
    how long a save is on its way.
    """
    state = 7e9 * 12
    written, sent = state / disk, state / line
    between = 86400 / per_day
    pause = 0.005
    young = (2 * pause * between) ** 0.5
    interval = max(young, sent)  # one is on its way at a time
    return {
        "state, bytes": state,
        "bytes a GPU": state / 8,
        "host memory with two copies, bytes": 2 * state,
        "copy over the bus behind forward and backward, s": round(state / 8 / bus, 2),
        "pause on the host, s (assumed: two calls, no copy waited for)": pause,
        "written, s": written,
        "sent, s": round(sent, 1),
        "interruptions a day": per_day,
        "interval by Young and Daly from the pause, s": round(young, 1),
        "interval used: not below the time to send one, s": round(interval, 1),
        "work lost a day, s (half an interval and one upload each)": round(per_day * (interval / 2 + sent), 1),
    }


PARTS = ["pause", "slowdown", "restore"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2400])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        for megabytes in wanted.megabytes:
            rounds = wanted.rounds if megabytes < 1000 else max(3, wanted.rounds // 3)
            measured = measure(megabytes * 10**6, rounds, Path(folder), wanted.parts)
            result[f"{megabytes} MB"] = measured
            print(megabytes, json.dumps(measured, indent=1), flush=True)
        # the larger state's own, for whoever wants rates
        largest = max(result.values(), key=lambda each: each["bytes"])
        result = {"bytes": largest["bytes"], "seconds": largest["seconds"], **result}
        if wanted.parts == PARTS:
            result["1 % trained"] = lora_like(Path(folder))
            result["7B on 8 GPUs, on paper"] = on_paper()
            record("saving", result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
