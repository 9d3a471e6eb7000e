"""Steps of several ranks against the same steps in one process; what crosses the ranks, and how often."""

import dataclasses
import time
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ranks import apart
from tests.training.test_loss import ROW, four_rows, make_model
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.packing import collate
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.model.lora import add_lora
from wmtp_worker.model.mtp import checkpoint_activations, packed_attention_mask
from wmtp_worker.settings import load
from wmtp_worker.training.auxiliary import AuxiliaryValues
from wmtp_worker.training.columns import add_columns
from wmtp_worker.training.gradients import Gradients, clip, spread
from wmtp_worker.training.group import Group, join
from wmtp_worker.training.loss import autocast, head_losses_backward, mtp_labels
from wmtp_worker.training.policy import PolicyTask

STEPS, LAYERS = 2, 3
WIDEST = 48  # of a layer's activations


class Messages(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in function.namespace:
            self.counts[function.__name__.split(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


class Matrices(TorchDispatchMode):
    """The bytes of bf16 tensors larger than any activation of a row: `seen` ever, and what is left of them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bfloat16 and leaf.numel() > ROW * WIDEST:
                self.seen.append(weakref.ref(leaf.untyped_storage()))
        return result

    def bytes(self):
        alive = {storage._cdata: storage.nbytes() for one in self.seen if (storage := one()) is not None}
        return sum(alive.values())


def micro_batches(heads):
    """Four of them, of one row each."""
    batches = [collate([row], ROW, pad_id=0) for row in four_rows()]
    targets = [mtp_labels(batch.labels, batch.segment_ids, heads) for batch in batches]
    counts = torch.stack([(target != -100).sum((0, 1)) for target in targets]).sum(0).float()
    return [(batch, target, counts) for batch, target in zip(batches, targets, strict=True)]


def take_steps(model, gradients, own, precision="fp32"):
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
                head_losses_backward(model, batch, target, lambda head: torch.ones(1, ROW), counts, precision)
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


def with_values(rank, world):
    """Values learned beside the policy, by whole copies and by shards; there are micro-batches without a pair."""
    overrides = ("family=critic", "critic.auxiliary=0.5")
    chosen = load(
        overrides=[
            *(f"weighting.{text}" for text in overrides),
            *("value.trunk_head=true", "run.stage=policy", "data.solutions=all", "training.micro_batch_size=1"),
            *("data.pairs.length_share=1", f"data.sequence_length={ROW}", "model.heads=2"),
        ],
        environ={},
    )
    rows = [
        [dataclasses.replace(one, reward=float(number % 2)) for number, one in enumerate(row)] for row in four_rows()
    ]
    flat = [one for row in rows for one in row]
    data = Dataset(flat, PackedSampler([len(one.ids) for one in flat], ROW, seed=1), ROW, 0)
    data, _ = add_columns(chosen, data, None, None)
    places = iter(range(len(flat)))
    batches = [data.batch([[next(places) for _ in row]]) for row in rows]

    def take(group, shards):
        model = make_model(2, tied=True)
        head = model.add_value_head(8, seed=3)
        torch.nn.init.normal_(head.head.output.weight, generator=torch.Generator().manual_seed(1))
        values = AuxiliaryValues(chosen, model, group)
        gradients = spread(model, group, shards)
        task = PolicyTask(chosen, model, group, data, data, None, values)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=True)
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            own = group.share(list(enumerate(task.begin(step, batches))))
            for number, backward in own:
                gradients.begin(last=number == own[-1][0])
                backward()
            gradients.finish()
            norm = clip(model.parameters(), 0.1)
            loss = task.loss()
            facts = task.end(counted=False).metrics
            optimizer.step()
        return model, norm, loss, facts

    with join("cpu", 60) as group:
        alone, *numbers, facts = take(Group(group.device), 1)
        assert facts["value_pairs"] == 3
        for shards in (1, world):
            model, *others, told = take(group, shards)
            assert others == pytest.approx(numbers, rel=1e-4), shards
            assert told == {key: pytest.approx(value, rel=1e-3, abs=1e-6) for key, value in facts.items()}, shards
            for (name, one), other in zip(alone.named_parameters(), model.parameters(), strict=True):
                assert torch.allclose(one, whole(other), atol=2e-5), f"{shards}: {name}"


def equal_to_one(rank, world, cases):
    with join("cpu", 60) as group:
        assert (group.rank, group.world, group.first) == (rank, world, rank == 0)
        for heads, tied, lora, shards, *more in cases:
            precision = more[0] if more else "fp32"
            alone, model = prepared(heads, tied, lora), prepared(heads, tied, lora)
            norm, optimizer, _ = take_steps(alone, Gradients(), micro_batches(heads), precision)
            own = group.share(micro_batches(heads))
            gradients = spread(model, group, shards, precision)
            norm_here, optimizer_here, counts = take_steps(model, gradients, own, precision)

            case = f"{heads=} {tied=} {lora=} {shards=} {precision=}"
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
            with torch.no_grad(), autocast(group.device, precision):
                batch = own[0][0]
                trunk = model.trunk(batch.input_ids, batch.position_ids, batch.segment_ids[:, None, :, None] >= 0)
                for number in range(1, heads + 1):
                    model.head_logits(number, trunk)
            gradients.settle()
            assert all(hasattr(parameter, "device_mesh") == (shards > 1) for parameter in model.parameters()), case


def trunk_lets_go(rank, world):
    """After a layer ran, no bf16 copy of its weights is left: neither autograd nor autocast's cache keeps one."""
    with join("cpu", 60) as group:
        for recompute in (False, True):
            model = make_model(2, tied=True).train()
            if recompute:
                checkpoint_activations(model)
            gradients = spread(model, group, world, "bf16")
            gradients.begin(last=True)
            batch = micro_batches(2)[0][0]
            with autocast(group.device, "bf16"), Matrices() as matrices:
                trunk = model.trunk(batch.input_ids, batch.position_ids, packed_attention_mask(batch.segment_ids))
                assert matrices.seen
                # gloo's own thread lets go of what it gathered a little after the wait for it has ended
                ends = time.monotonic() + 60
                while matrices.bytes() and time.monotonic() < ends:
                    time.sleep(0.01)
                assert matrices.bytes() == 0, recompute
            trunk.hidden.sum().backward()
            gradients.finish()


TWO = [(1, False, False, 1), (1, False, False, 2), (4, True, False, 1), (4, True, False, 2), (3, False, True, 2)]
TWO += [(2, True, False, 2, "bf16"), (2, False, True, 2, "bf16")]


def test_two_ranks_take_the_steps_of_one_process():
    apart(2, equal_to_one, TWO)


def test_no_rank_keeps_copies_of_all_weights():
    apart(2, trunk_lets_go)


@pytest.mark.slow
def test_four_ranks_with_one_two_and_four_shards():
    cases = [(2, True, False, 1), (2, True, False, 2), (2, False, False, 4), (2, False, True, 1)]
    apart(4, equal_to_one, [*cases, (2, False, False, 2, "bf16")])


def test_values_learned_beside_the_policy_are_those_of_one_process():
    apart(2, with_values)


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join("cpu", 60) as group:
        assert type(spread(make_model(2), group, 1)) is Gradients
