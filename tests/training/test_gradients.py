"""Steps of several ranks against the same steps in one process; what crosses the ranks, and how often."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import apart
from tests.training.test_loss import ROW, four_rows, make_model
from wmtp_worker.data.packing import collate
from wmtp_worker.model.lora import add_lora
from wmtp_worker.training.gradients import Gradients, spread
from wmtp_worker.training.group import join
from wmtp_worker.training.loss import head_losses_backward, mtp_labels

STEPS, LAYERS = 2, 3


class Messages(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            self.counts[function.__name__.split(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


def micro_batches(heads):
    """Four of them, of one row each."""
    batches = [collate([row], ROW, pad_id=0) for row in four_rows()]
    targets = [mtp_labels(batch.labels, batch.segment_ids, heads) for batch in batches]
    counts = torch.stack([(target != -100).sum((0, 1)) for target in targets]).sum(0).float()
    return [(batch, target, counts) for batch, target in zip(batches, targets, strict=True)]


def take_steps(model, gradients, own):
    """Steps that are clipped hard; returns the last norm, the optimizer, and what crossed the ranks."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # a large eps: else steps of gradients that are almost 0 follow from their last bits
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, fused=True)
    with Messages() as messages:
        for _ in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            for number, (batch, target, counts) in enumerate(own):
                gradients.begin(last=number == len(own) - 1)
                # a head's weights may look at what the ranks do not share
                head_losses_backward(model, batch, target, lambda head: torch.ones(1, ROW), counts, "fp32")
            gradients.finish()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return norm, optimizer, messages.counts


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def prepared(heads, tied, lora):
    model = make_model(heads, tied)
    if lora:
        add_lora(model, rank=2, alpha=4.0)
    return model


def equal_to_one(rank, world, cases):
    with join("cpu", 60) as group:
        assert (group.rank, group.world, group.first) == (rank, world, rank == 0)
        for heads, tied, lora, shards in cases:
            alone, model = prepared(heads, tied, lora), prepared(heads, tied, lora)
            norm, optimizer, _ = take_steps(alone, Gradients(), micro_batches(heads))
            own = group.share(micro_batches(heads))
            gradients = spread(model, group, shards)
            norm_here, optimizer_here, counts = take_steps(model, gradients, own)

            case = f"{heads=} {tied=} {lora=} {shards=}"
            assert torch.allclose(whole(norm_here), norm, rtol=1e-5), case
            for (name, one), other in zip(alone.named_parameters(), model.parameters(), strict=True):
                assert torch.allclose(one, whole(other), atol=1e-5), f"{case}: {name}"
                for key, value in optimizer.state[one].items():
                    assert torch.allclose(value, whole(optimizer_here.state[other][key]), atol=1e-5), f"{case}: {key}"
            if shards > 1:  # each rank has its part, and nothing more
                held = sum(parameter.to_local().numel() for parameter in model.parameters())
                assert held < 1.2 * sum(parameter.numel() for parameter in alone.parameters()) / shards, case

            # a layer of the trunk is gathered for forward and backward, a head once, what they share once a step
            layers, shared = LAYERS - 1 + heads, 0 if lora else 1
            gathered = (2 * (LAYERS - 1) + heads) * len(own) + 1
            if shards == 1:
                assert counts == {"allreduce": STEPS * (layers + shared)}, case
            else:
                assert counts["allgather_base"] == STEPS * gathered, case
                assert counts["reduce_scatter_base"] == STEPS * (layers * len(own) + shared), case
                # the sum over the copies: once a step, not with each micro-batch
                copies = STEPS * (layers + shared) if shards < world else 0
                assert counts["allreduce"] == copies, case

            # forward passes without a backward leave it as it was
            with torch.no_grad():
                batch = own[0][0]
                trunk = model.trunk(batch.input_ids, batch.position_ids, batch.segment_ids[:, None, :, None] >= 0)
                for number in range(1, heads + 1):
                    model.head_logits(number, trunk)
            gradients.settle()
            assert all(hasattr(parameter, "device_mesh") == (shards > 1) for parameter in model.parameters()), case


TWO = [(1, False, False, 1), (1, False, False, 2), (4, True, False, 1), (4, True, False, 2), (3, False, True, 2)]


def test_two_ranks_take_the_steps_of_one_process():
    apart(2, equal_to_one, TWO)


@pytest.mark.slow
def test_four_ranks_with_one_two_and_four_shards():
    apart(4, equal_to_one, [(2, True, False, 1), (2, True, False, 2), (2, False, False, 4), (2, False, True, 1)])


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu", 60) as group:
        assert type(spread(make_model(2), group, 1)) is Gradients
