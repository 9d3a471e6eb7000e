"""Memory and messages of two ranks that share one model, against what the formulas say."""

import math
import time
import weakref

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.conftest import TINY
from tests.planning.live import Live
from tests.planning.test_against_the_real_thing import ROWS, TIME, WIDER
from tests.ranks import apart
from wmtp_worker.data.packing import Batch
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.model.loading import build
from wmtp_worker.planning.memory import Step, parts
from wmtp_worker.planning.policy import Shape
from wmtp_worker.planning.work import link_bytes
from wmtp_worker.settings import load
from wmtp_worker.training.gradients import local, spread
from wmtp_worker.training.group import join
from wmtp_worker.training.loss import head_losses_backward, mtp_labels

PASSES = 2


class Shared(Live):
    """Storages shrink and grow, as FSDP's do; and the bytes that cross the ranks, two of them.

    gloo's own thread lets go of what it sent a little after the wait for it has ended: what is above `limit` gets time
    to go, once.
    """

    def __init__(self, limit, *known):
        self._storages, self.sent, self._limit = {}, 0, limit
        super().__init__(*known)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].strip("_")
        if name in ("allgather_base", "reduce_scatter_base"):
            self.sent += min(tensor.nbytes for tensor in args[:2])
        elif name == "allreduce":
            self.sent += sum(leaf.nbytes for leaf in tree_leaves(args[0]))
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.now, ends = self._alive(), time.monotonic() + 30
        while self.now > self._limit:
            if time.monotonic() > ends:
                self._limit = math.inf
            time.sleep(0.01)
            self.now = self._alive()
        self.peak = max(self.peak, self.now)
        return result

    def _alive(self):
        return sum(storage.nbytes() for one in self._storages.values() if (storage := one()) is not None)


def account(rank, world, cases):
    made = load(preset="smoke", overrides=[*TINY, *WIDER], environ={})
    with join("cpu", 60) as group:
        for precision, shards in cases:
            model = build(made, load_tokenizer(PACKAGED)).train()
            shape, ids = Shape.of(model), torch.randint(0, model.config.vocab_size, (ROWS, TIME))
            segments, positions = torch.ones_like(ids), torch.arange(TIME).repeat(ROWS, 1)
            batch, targets = Batch(ids, ids, positions, segments), mtp_labels(ids, segments, model.heads)
            counts = torch.full((model.heads,), float(ids.numel()))
            gradients = spread(model, group, shards, precision)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)

            def take(model=model, batch=batch, targets=targets, counts=counts, precision=precision, to=gradients):
                for number in range(PASSES):
                    to.begin(last=number == PASSES - 1)
                    head_losses_backward(model, batch, targets, lambda head: torch.ones(ROWS, TIME), counts, precision)
                to.finish()

            take()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            moments = [value for state in optimizer.state.values() for value in state.values()]
            step = Step(ROWS, TIME, precision, shards=shards, copies=world // shards, cuda=False)
            found = sum(part.bytes for part in parts(shape, step) if part.name != "process")
            limit = 1.02 * found
            with Shared(limit, *(local(tensor.detach()) for tensor in (*model.parameters(), *moments))) as live:
                take()
            case = f"{precision} {shards}: {live.peak / found:.3f} of memory, {live.sent / 1e6:.3f} MB sent"
            print(case, flush=True)
            assert 0.8 * found < live.peak < limit, case
            assert live.sent == pytest.approx(link_bytes(shape, step, PASSES), rel=0.01), case


def test_what_two_ranks_hold_and_send_is_foreseen():
    apart(2, account, [("fp32", 2), ("bf16", 2), ("fp32", 1)])
