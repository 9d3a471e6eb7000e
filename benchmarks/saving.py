"""What a save costs the training, beside one memcpy of the same bytes, `torch.save`, and torch's own asynchronous save.

    python benchmarks/saving.py [--folder DIR] [--rounds N] [--megabytes 200 2400]

All sides alternate in one run; medians are compared. At the end: the same on paper for a model of 7B on 8 GPUs.
"""

import argparse
import ctypes
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


def measure(size: int, rounds: int, folder: Path) -> dict[str, Any]:
    training = Training(size)
    paths = RunPaths(folder, f"saving-{size}")
    state = training.tensors()
    every = [value for tensors in state.values() for value in tensors.values()]
    target = torch.zeros(sum(value.nbytes for value in every), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {}
    slowdown: list[float] = []

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    def copy() -> None:
        at = target.data_ptr()
        for value in every:
            ctypes.memmove(at, value.data_ptr(), value.nbytes)
            at += value.nbytes

    stager = DefaultStager(StagingOptions(False, False, True, False))
    expected = {MODEL: state[MODEL], OPTIMIZER: expected_tensors(training.names)}
    with Saver(paths, written=lambda step, _: store.prune(paths, 1, step)) as saver:
        memory = saver.prepare(expected)
        for number in range(rounds + 1):
            note("memcpy", timed(copy))
            one_background_save(training, saver, number, note, slowdown)
            file = folder / "state.pt"
            note("torch.save", timed(lambda: torch.save(state, file)))  # noqa: B023
            note("torch.save + fsync", seconds["torch.save"][-1] + timed(lambda: fsync_path(file)))  # noqa: B023
            file.unlink()
            blocking = RunPaths(folder, "blocking")
            note("checkpoint", timed(lambda: store.write(blocking, training.snapshot(0))))  # noqa: B023
            shutil.rmtree(blocking.checkpoints)
            torch_async(training, folder, stager, note)
            print({name: round(values[-1], 4) for name, values in seconds.items()}, flush=True)
            if number == 0:  # buffers of all sides are warm from here on
                seconds.clear()
                slowdown.clear()
        restoring(training, paths, rounds, note)
    stager.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return report(target.nbytes, memory, len(slowdown), medians, slowdown)


def one_background_save(
    training: Training, saver: Saver, number: int, note: Callable[[str, float], None], slowdown: list[float]
) -> None:
    """The pause of a save, and how much slower steps are than those before and after it."""
    pause = [0.0, 0.0]

    def save() -> None:
        pause[0] = timed(lambda: saver.save(training.snapshot(number)))

    def gate() -> None:
        pause[1] = timed(saver.gate)

    around = [training.step() for _ in range(3)]
    began = time.perf_counter()
    during = [training.step(save, gate)]
    while saver.pending:
        during.append(training.step())
    note("behind the training", time.perf_counter() - began)
    around += [training.step() for _ in range(3)]
    note("pause", sum(pause))
    note("step", statistics.median(around))
    slowdown.append(statistics.mean(during) / statistics.mean(around) - 1)


def torch_async(training: Training, folder: Path, stager: DefaultStager, note: Callable[[str, float], None]) -> None:
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


def restoring(training: Training, paths: RunPaths, rounds: int, note: Callable[[str, float], None]) -> None:
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


def report(size: int, memory: int, rounds: int, medians: dict[str, float], slowdown: list[float]) -> dict[str, Any]:
    pause = medians["pause"]
    return {
        "bytes": size,
        "host memory": memory,
        "rounds": rounds,
        "seconds": {name: round(value, 5) for name, value in medians.items()},
        "pause / memcpy": round(pause / medians["memcpy"], 5),
        "pause / torch.save": round(pause / medians["torch.save"], 6),
        "pause / async_save": round(pause / medians["async_save"], 5),
        "slowdown of steps during a save": median(slowdown),
        "slowdown of each round": [round(value, 3) for value in slowdown],
        "restore / plain read": round(medians["restore"] / medians["plain read"], 3),
        "restore / plain read, warm": round(medians["restore, warm"] / medians["plain read, warm"], 3),
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2400])
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
        for megabytes in wanted.megabytes:
            rounds = wanted.rounds if megabytes < 1000 else max(2, wanted.rounds // 3)
            result[f"{megabytes} MB"] = measure(megabytes * 10**6, rounds, Path(folder))
            print(megabytes, result[f"{megabytes} MB"], flush=True)
        # the larger state's own, for whoever wants rates
        largest = max(result.values(), key=lambda each: each["bytes"])
        result = {"bytes": largest["bytes"], "seconds": largest["seconds"], **result}
        result["1 % trained"] = lora_like(Path(folder))
    result["7B on 8 GPUs, on paper"] = on_paper()
    record("saving", result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
