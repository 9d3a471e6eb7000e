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
from wmtp_worker.model.mtp import checkpoint_activations, packed_attention_mask
from wmtp_worker.model.value import value_on
from wmtp_worker.planning.measure import measure, predict
from wmtp_worker.planning.memory import CACHED, CHUNK, Step, layer_bytes, parts
from wmtp_worker.planning.plan import make_plan
from wmtp_worker.planning.policy import Shape, policy_on_meta, value_on_meta
from wmtp_worker.planning.work import token_flops
from wmtp_worker.training import linear_cross_entropy
from wmtp_worker.training.loss import autocast, head_losses_backward, mtp_labels

ROWS, TIME = 2, 96
VALUES = (
    *("weighting.family=critic", "weighting.critic.auxiliary=0.1", "value.trunk_head=true", "data.solutions=all"),
    *("value.hidden=96", "run.stage=policy"),
)
WIDER = ("model.hidden_size=64", "model.intermediate_size=160", "model.layers=4", "model.heads=3")


@pytest.fixture(params=["full", "lora", "values"])
def policy(request, settings, one_thread):
    """The settings, and the policy that the worker builds of them."""
    lora = ("lora.rank=4",) if request.param == "lora" else ()
    values = VALUES if request.param == "values" else ()
    made = settings(*WIDER, *lora, *values)
    model = build(made, load_tokenizer(PACKAGED))
    if lora:
        add_lora(model, **made.lora.model_dump())
    if values:
        model.add_value_head(made.value.hidden)
    return made, model


def known(head):
    return torch.ones(head.targets.shape)


def by_losses(head):
    """Weights that follow from the losses; a quarter of the tokens has none."""
    return (head.losses > head.losses.quantile(0.25)).float()


def step(model, precision="fp32", passes=1, weigh=known):
    """Two optimizer steps on random tokens, as the loop takes them; returns the optimizer."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TIME))
    segments, positions = torch.ones_like(ids), torch.arange(TIME).repeat(ROWS, 1)
    batch, targets = Batch(ids, ids, positions, segments), mtp_labels(ids, segments, model.heads)
    counts = torch.full((model.heads,), float(ids.numel()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def beside(trunk, batch):
        model.value_head(trunk.hidden).sum().backward()
        return batch

    look = None if model.value_head is None else beside
    for _ in range(2):  # the moments are there in the second one
        optimizer.zero_grad(set_to_none=True)
        for _ in range(passes):
            head_losses_backward(model, batch, targets, weigh, counts, precision, beside=look)
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
    checkpoint_activations(model)
    model.train()
    watch = live(*(p.data for p in model.parameters()))
    with watch:
        step(model, passes=2)
    account = Step(ROWS, TIME, "fp32", cuda=False, recompute=True)
    found = sum(part.bytes for part in parts(Shape.of(model), account) if part.name != "process")
    # a head's layer and its loss never are there at once
    assert watch.peak <= found < 1.25 * watch.peak
    assert token_flops(Shape.of(model), account) * ROWS * TIME * 2 == pytest.approx(counted_flops(model), rel=0.04)


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


@pytest.fixture(params=["full", "lora", "trunk"])
def values(request, settings, one_thread):
    """The settings of a value model and the model that the worker builds of them."""
    chosen = {"lora": ["value.lora_rank=4"], "trunk": ["value.trunk_head=true"]}.get(request.param, [])
    made = settings(*WIDER, "weighting.family=critic", "value.hidden=96", *chosen)
    model = value_on(build(made, load_tokenizer(PACKAGED)), 96, 0, made.value.trunk_head)
    if made.value.lora_rank:
        add_lora(model.backbone, **made.lora.model_dump() | {"rank": 4})
    return made, model.train()


def learn(model, precision="fp32"):
    """Two optimizer steps of a value model, of two micro-batches each."""
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TIME))
    positions, mask = torch.arange(TIME).repeat(ROWS, 1), packed_attention_mask(torch.ones_like(ids))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(2):
            with autocast(ids.device, precision):
                said = model(ids, positions, mask)
            (said - 1).square().mean().backward()
            del said
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize(("precision", "again"), [("fp32", False), ("bf16", False), ("fp32", True)])
def test_memory_and_flops_of_a_value_model_are_foreseen(values, live, precision, again):
    made, model = values
    shape = Shape.of(model)
    assert Shape.of(value_on_meta(made)) == shape
    if again:
        checkpoint_activations(model.backbone)
    watch = live(*(p.data for p in model.parameters()))
    with watch:
        learn(model, precision)
    account = Step(ROWS // 2, TIME, precision, cuda=False, recompute=again, sides=2)
    found = sum(part.bytes for part in parts(shape, account) if part.name != "process")
    assert watch.peak < 1.05 * found
    # where layers run without keeping anything, a whole one is counted beside the rest
    assert found < (1.5 if again or shape.frozen else 1.05) * watch.peak
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learn(model, precision)
    # torch stops a layer's second forward before its last product, whose result nobody keeps
    foreseen = token_flops(shape, account) * ROWS * TIME * 4
    assert foreseen == pytest.approx(counter.get_total_flops(), rel=0.06 if again else 0.04)


def addmm_flop(total, left, right, **_):
    """Of the one in place, which the counter does not know."""
    return 2 * left[0] * left[1] * right[1]


def counted_flops(model, weigh=known):
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter,
    ):
        step(model, weigh=weigh)
    return counter.get_total_flops()


@pytest.mark.parametrize(("weigh", "looked_at"), [(known, None), (by_losses, 0.75)], ids=["known", "by losses"])
def test_flops_are_those_that_torch_counts(policy, weigh, looked_at):
    _, model = policy
    # what a frozen first layer need not compute is small, and is not left out
    foreseen = token_flops(Shape.of(model), Step(ROWS, TIME, "fp32", looked_at=looked_at)) * ROWS * TIME * 2
    assert foreseen == pytest.approx(counted_flops(model, weigh), rel=0.04)


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
    shape, one = Shape.of(model), Step(ROWS, TIME, "fp32", cuda=False)
    ratios = []
    for _ in range(5):  # alternated: what the neighbours do changes from one second to the next
        speeds = measure(shape, one, time.process_time)
        begun = time.process_time()
        step(model)  # is two
        ratios.append(2 * predict(shape, one, 1, speeds) / (time.process_time() - begun))
    assert 0.2 < statistics.median(ratios) < 5


def names(model):
    return {parameter: name for name, parameter in model.named_parameters()}
