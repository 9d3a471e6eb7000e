"""Moments in bf16: the same step as in fp32, and half of the bytes, in memory, in checkpoints and on paper."""

import json
import shutil

import pytest
import torch

from tests.conftest import TINY, TINY_RUN
from wmtp_worker.checkpoint.optimizer import MOMENTS
from wmtp_worker.checkpoint.restore import find
from wmtp_worker.checkpoint.snapshot import OPTIMIZER
from wmtp_worker.errors import CheckpointError, InputError
from wmtp_worker.planning.plan import make_plan
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.training.optimizer import LeanAdamW, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = "training.moments=bf16"


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))


def make(model, *overrides):
    return make_optimizer(load(overrides=[*TINY, *overrides], environ={}), model)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_a_step_is_that_of_fp32_with_moments_rounded_afterwards():
    lean, plain = layers(), layers()
    optimizers = make(lean, BF16), make(plain)
    for seed in range(4):
        for model, optimizer in zip((lean, plain), optimizers, strict=True):
            gradients(model, seed)
            optimizer.step()
        for state in optimizers[1].state.values():
            for key in MOMENTS:
                state[key] = state[key].bfloat16().float()
    assert isinstance(optimizers[0], LeanAdamW)
    for one, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
        states = optimizers[0].state[one], optimizers[1].state[other]
        assert states[0]["step"] == states[1]["step"] == 4
        for key in MOMENTS:
            assert states[0][key].dtype == torch.bfloat16
            assert torch.equal(states[0][key].float(), states[1][key])


def test_matrices_decay_and_a_parameter_without_a_gradient_stays():
    model = layers()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = make(model, BF16)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))


def test_a_resumed_run_is_equal_and_its_state_half_as_large(tiny_run, run_record, tmp_path):
    tiny_run(tmp_path, BF16)
    straight, paths = run_record(tmp_path), RunPaths(tmp_path, TINY_RUN)
    state = dict(find(paths, "auto").tensors(OPTIMIZER))
    assert {value.dtype for name, value in state.items() if not name.startswith("step/")} == {torch.bfloat16}
    shutil.rmtree(paths.step(12))
    assert tiny_run(tmp_path, BF16).resumed_from == 9
    assert run_record(tmp_path) == straight
    with pytest.raises(InputError, match=r"training\.moments: 'bf16' in the checkpoint, 'fp32' now"):
        tiny_run(tmp_path)
    # moments that are believed to be of another type are not reinterpreted
    with pytest.raises(CheckpointError, match=r"moments in bf16, and training\.moments is fp32 .*another --run-name"):
        tiny_run(tmp_path, "run.accept_changes=[training.moments]", resume=9)


def test_a_plan_counts_the_bytes(tmp_path):
    def plan(*overrides):
        settings = load(overrides=[*TINY, *overrides], options={"run.workdir": str(tmp_path)}, environ={})
        found = json.loads(json.dumps(make_plan(settings, "h100-sxm", 1, None).to_json()))
        return {part["name"]: part["bytes"] for part in found["memory"]["parts"]}, found["checkpoint"]["bytes"]

    (parts, size), (lean, lean_size) = plan(), plan(BF16)
    assert lean["optimizer moments"] == parts["optimizer moments"] // 2
    assert size - lean_size == pytest.approx(lean["optimizer moments"], rel=0.01)
