"""What the formulas say, against real models, optimizers, steps and checkpoints."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wmtp_worker.checkpoint.optimizer import optimizer_tensors
from wmtp_worker.data.packing import Batch
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.model.loading import build
from wmtp_worker.model.lora import add_lora
from wmtp_worker.planning.measure import measure, predict
from wmtp_worker.planning.memory import CACHED, CHUNK, Step, layer_bytes, parts
from wmtp_worker.planning.plan import make_plan
from wmtp_worker.planning.policy import Shape, policy_on_meta
from wmtp_worker.planning.work import token_flops
from wmtp_worker.training import linear_cross_entropy
from wmtp_worker.training.loss import head_losses_backward, mtp_labels

ROWS, TIME = 2, 96
WIDER = ("model.hidden_size=64", "model.intermediate_size=160", "model.layers=4", "model.heads=3")


@pytest.fixture(params=["full", "lora"])
def policy(request, settings, one_thread):
    """The settings, and the policy that the worker builds of them."""
    lora = ("lora.rank=4",) if request.param == "lora" else ()
    made = settings(*WIDER, *lora)
    model = build(made, load_tokenizer(PACKAGED))
    if lora:
        add_lora(model, **made.lora.model_dump())
    return made, model


def step(model, precision="fp32", passes=1):
    """One optimizer step on random tokens, as the loop takes it; returns the optimizer."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TIME))
    segments, positions = torch.ones_like(ids), torch.arange(TIME).repeat(ROWS, 1)
    batch, targets = Batch(ids, ids, positions, segments), mtp_labels(ids, segments, model.heads)
    counts = torch.full((model.heads,), float(ids.numel()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):  # the moments are there in the second one
        optimizer.zero_grad(set_to_none=True)
        for _ in range(passes):
            head_losses_backward(model, batch, targets, lambda head: torch.ones_like(head.losses), counts, precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


def test_the_policy_on_paper_is_the_one_that_is_built(policy):
    made, model = policy
    assert Shape.of(policy_on_meta(made)) == Shape.of(model)


def test_parameters_are_counted_by_hand(settings):
    shape = Shape.of(policy_on_meta(settings()))
    h, f, vocabulary = 32, 48, 2048
    layer = 2 * h * h + 2 * h * 16 + 3 * h * f + 2 * h  # q, o; k, v of one of two heads; the MLP; two norms
    assert shape.layer.all == layer
    assert shape.total.all == 4 * layer + vocabulary * h + h  # 3 layers and one further head, tied embedding, norm
    assert (shape.trunk_layers, shape.heads, shape.layers) == (2, 2, 4)


def test_static_memory_is_that_of_the_real_objects(policy):
    _, model = policy
    optimizer = step(model)
    found = {part.name: part.bytes for part in parts(Shape.of(model), Step(ROWS, TIME, "fp32"))}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    assert found["gradients"] == sum(p.grad.nbytes for p in trained)
    moments = [
        value for key, value in optimizer_tensors(optimizer, names(model)).items() if not key.startswith("step/")
    ]
    assert found["optimizer moments"] == sum(value.nbytes for value in moments)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_largest_memory_of_a_real_step_is_foreseen(policy, live, precision):
    _, model = policy
    watch = live(*(p.data for p in model.parameters()))
    with watch:
        step(model, precision, passes=2)
    found = parts(Shape.of(model), Step(ROWS, TIME, precision, cuda=False))
    assert sum(part.bytes for part in found if part.name != "process") == pytest.approx(watch.peak, rel=0.05)


def test_less_memory_and_more_work_where_layers_run_again(policy, live):
    _, model = policy
    model.activation_checkpointing_enable()
    model.train()
    watch = live(*(p.data for p in model.parameters()))
    with watch:
        step(model, passes=2)
    account = Step(ROWS, TIME, "fp32", cuda=False, recompute=True)
    found = sum(part.bytes for part in parts(Shape.of(model), account) if part.name != "process")
    # a head's layer and its loss never are there at once
    assert watch.peak <= found < 1.25 * watch.peak
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model)
    assert token_flops(Shape.of(model), account) * ROWS * TIME * 2 == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_grouped_queries_and_separate_unembedding_are_foreseen_too(settings, live, one_thread):
    made = settings(*WIDER, "model.tie_embeddings=false", "model.attention_heads=4", "model.key_value_heads=1")
    model = build(made, load_tokenizer(PACKAGED))
    watch = live(*(p.data for p in model.parameters()))
    with watch:
        step(model, passes=2)
    found = parts(Shape.of(model), Step(ROWS, TIME, "fp32", cuda=False))
    assert sum(part.bytes for part in found if part.name != "process") == pytest.approx(watch.peak, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_layer_keeps_is_what_autograd_saves(policy, precision):
    _, model = policy
    ids = torch.zeros(ROWS, TIME, dtype=torch.int64)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        is_mask = tensor.shape[-2:] == (TIME, TIME)
        if (
            storage.data_ptr() not in weights
            and not is_mask
            and tensor.shape[0] * tensor.shape[-2] != model.config.hidden_size
        ):
            saved[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    mask = torch.ones(ROWS, 1, TIME, TIME, dtype=torch.bool).tril()
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        model.trunk(ids, torch.arange(TIME).repeat(ROWS, 1), mask)
    # autocast's copies of weights are another part of the account
    kept = sum(size for tensor, size in saved.values() if tensor.numel() % (ROWS * TIME) == 0)
    layers = Shape.of(model).trunk_layers
    assert kept / layers / ROWS / TIME == pytest.approx(
        layer_bytes(Shape.of(model), Step(ROWS, TIME, precision)), rel=0.06
    )


def test_the_chunk_is_that_of_the_loss():
    assert (CHUNK, CACHED) == (linear_cross_entropy.CHUNK, linear_cross_entropy._CACHED)


def test_flops_are_those_that_torch_counts(policy):
    _, model = policy
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model)
    # what a frozen first layer need not compute is small, and is not left out
    foreseen = token_flops(Shape.of(model), Step(ROWS, TIME, "fp32")) * ROWS * TIME * 2
    assert foreseen == pytest.approx(counter.get_total_flops(), rel=0.04)


def test_the_bytes_of_a_checkpoint_are_those_on_the_disk(policy, tmp_path):
    from wmtp_worker.checkpoint.saver import Saver
    from wmtp_worker.checkpoint.snapshot import MODEL, OPTIMIZER, Snapshot, split_frozen
    from wmtp_worker.storage.layout import RunPaths

    made, model = policy
    optimizer = step(model)
    trained, frozen = split_frozen(model.named_parameters())
    paths = RunPaths(tmp_path, "run")
    paths.checkpoints.mkdir(parents=True)
    tensors = {MODEL: trained, OPTIMIZER: optimizer_tensors(optimizer, names(model))}
    with Saver(paths) as saver:
        facts = dict.fromkeys(("settings_digest", "worker_version", "torch_version"), "none")
        saver.save(Snapshot(1, tensors, {}, facts, frozen))
    on_disk = sum(file.stat().st_size for file in paths.step(1).glob("*.safetensors"))
    planned = make_plan(made, "h100-sxm", 1).saves
    assert planned.bytes == on_disk
    shared = sum(file.stat().st_size for file in paths.checkpoints.glob("shared/*"))
    assert planned.frozen_bytes == shared


def test_a_step_takes_about_as_long_as_predicted(settings, one_thread):
    """Loosely, because machines are noisy: benchmarks/plan.py says how well."""
    import statistics
    import time

    made = settings("model.hidden_size=128", "model.intermediate_size=352", "model.attention_heads=4", tiny=False)
    model = build(made, load_tokenizer(PACKAGED))
    speeds = measure(Shape.of(model), Step(ROWS, TIME, "fp32", cuda=False), time.process_time)
    taken = []
    for _ in range(3):
        begun = time.process_time()
        step(model)  # is two
        taken.append((time.process_time() - begun) / 2)
    predicted = predict(Shape.of(model), Step(ROWS, TIME, "fp32", cuda=False), 1, speeds)
    assert 0.4 < predicted / statistics.median(taken) < 2.5


def names(model):
    return {parameter: name for name, parameter in model.named_parameters()}
