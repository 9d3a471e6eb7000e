"""Host memory that holds a copy of a checkpoint's tensors, made while the next forward and backward go on.

Each file has one flat buffer that holds exactly the bytes of the safetensors file, so writing it is `write`, and
hashing it `sha256`, of one piece of memory. Buffers are kept from one save to the next.
"""

import ctypes
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from wmtp_worker.checkpoint.tensorfile import Layout, Tensors, in_blocks, lay_out, signature
from wmtp_worker.host.limits import memory_available

log = logging.getLogger(__name__)

# of what is free when the buffers are made; the activations of the first step are still to come
_LARGEST_SHARE = 0.6


@dataclass(frozen=True)
class Content:
    """What one file will hold: tensors by name, and the `__metadata__` of its header."""

    tensors: Tensors
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass
class StagedFile:
    """One file's bytes in host memory. A `tensorfile.Source`."""

    signature: object
    layout: Layout
    memory: torch.Tensor  # uint8, `layout.nbytes` of them
    views: Mapping[str, torch.Tensor]

    @classmethod
    def for_(cls, content: Content) -> "StagedFile":
        """A buffer for such tensors, its pages already in place; pinned where CUDA is used."""
        layout = lay_out(content.tensors, content.metadata)
        memory = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized()).zero_()
        memory[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        views = {}
        for name, offset in layout.offsets.items():
            value = content.tensors[name]
            length = value.numel() * value.element_size()
            views[name] = memory[offset : offset + length].view(value.dtype).view(value.shape)
        return cls(signature(content.tensors, content.metadata), layout, memory, views)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def blocks(self) -> Iterator[memoryview]:
        yield from in_blocks(self.memory.numpy().data)


class Buffers:
    """Host memory for the files of one checkpoint."""

    def __init__(self) -> None:
        self.files: dict[str, StagedFile] = {}

    def lay_out(self, contents: Mapping[str, Content]) -> None:
        """Make the buffers fit the tensors; those whose names, shapes and dtypes are as before stay as they are."""
        for name in self.files.keys() - contents.keys():
            del self.files[name]
        for name, content in contents.items():
            there = self.files.get(name)
            if there is None or there.signature != signature(content.tensors, content.metadata):
                self.files.pop(name, None)  # its memory is free before the new one is taken
                self.files[name] = StagedFile.for_(content)

    def fill(self, contents: Mapping[str, Content], copies: "Copies") -> None:
        """Copy every tensor. On return those on the host may be changed, after `copies.wait()` the others too."""
        with copies:
            for name, content in contents.items():
                for key, view in self.files[name].views.items():
                    _copy(view, content.tensors[key])


def _copy(view: torch.Tensor, tensor: torch.Tensor) -> None:
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        # lets go of the GIL, and takes half the CPU time of copy_, which wakes a second team of threads
        ctypes.memmove(view.data_ptr(), tensor.data_ptr(), view.nbytes)
    else:
        view.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Copies:
    """When copies from a CUDA device are complete. All code for devices is here; without one it does nothing.

    Made in the training's thread where the snapshot is taken: the copies, on a stream of their own, come after what
    that thread has queued so far, and `wait` makes what it queues from then on come after the copies, without stopping
    the host.
    """

    def __init__(self) -> None:
        # a process trains on one device
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_initialized() else None
        self._taken = {} if device is None else {device: torch.cuda.current_stream(device).record_event()}
        self._copied: dict[torch.device, torch.cuda.Event] = {}
        self._before: list[torch.cuda.Stream] = []

    def __enter__(self) -> None:
        """Let the copies that this thread queues go on the streams for them."""
        for device, taken in self._taken.items():
            self._before.append(torch.cuda.current_stream(device))
            _stream(device).wait_event(taken)
            torch.cuda.set_stream(_stream(device))

    def __exit__(self, *_: object) -> None:
        self._copied = {device: _stream(device).record_event() for device in self._taken}
        for stream in reversed(self._before):
            torch.cuda.set_stream(stream)

    def wait(self) -> None:
        """In the training's thread: the device goes on with what is queued from here on once it has copied."""
        for device, copied in self._copied.items():
            torch.cuda.current_stream(device).wait_event(copied)

    def synchronize(self) -> None:
        """In the writer's thread: wait until the host has the bytes."""
        for copied in self._copied.values():
            copied.synchronize()


def nbytes(contents: Mapping[str, Content]) -> int:
    """Bytes of host memory that one set of buffers takes."""
    return sum(lay_out(content.tensors, content.metadata).nbytes for content in contents.values())


def affordable(size: int, wanted: int, processes: int = 1, extra: int = 0, to_come: int = 0) -> int:
    """How many sets of `size` bytes, at most `wanted`, host memory can hold; warns where that is fewer.

    With the first set goes `extra`, and `to_come` will be taken by others. `processes` of this machine want the same
    at once. Where nobody knows how much memory there is, all are affordable.
    """
    free = memory_available()
    if free is None:
        return wanted
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # set by torchrun
    free = max(0, free - to_come * here)
    fits = min(wanted, max(0, int(free * _LARGEST_SHARE) - extra * here) // max(size * here, 1))
    if fits < wanted:
        log.warning(
            "%d copies of %.1f MB do not fit into the %.1f MB of memory that are free: %s",
            wanted * here,
            (size + extra / wanted) / 1e6,
            free / 1e6,
            "the training waits for a save where the one before it is not written yet"
            if fits
            else "the training stops for each save until it is on the disk (checkpoint.background=false says the same)",
        )
    return fits
