"""Whole runs of both stages: the value model first, then the policy that is weighted by it."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.kills.test_resume_in_process import KILLED, Killed, LineCounter
from tests.training.stopping import StopAfter
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.errors import InputError, Interrupted
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.tracking.metrics import read
from wmtp_worker.training.evaluate import evaluate_run

CRITIC = (
    "weighting.family=critic",
    "training.max_steps=5",
    "evaluation.every=2",
    "evaluation.max_batches=4",
    "value.hidden=8",
    "checkpoint.every=50",
)
VERIFIABLE = ("value.objective=lambda_return", "weighting.critic.rewards=verifiable", "data.solutions=all")
ADAPTERS = ("value.lora_rank=2", "lora.dropout=0.1", "value.max_steps=4", "value.lr=1e-2")
TRUNK = ("value.trunk_head=true",)


@pytest.fixture(scope="module")
def plain_data(tmp_path_factory):
    """Solutions that a few steps are enough to judge: incorrect ones subtract."""
    folder = tmp_path_factory.mktemp("data") / "plain"
    folder.mkdir()
    for name, numbers in (("train", range(16)), ("validation", range(30, 36))):
        write(
            folder / f"{name}.jsonl",
            [
                {
                    "task_id": number,
                    "text": f"Write a function that adds {number}.",
                    "code": f"def add(x):\n    return x + {number}",
                    "test_list": [f"assert add(1) == {1 + number}"],
                    "incorrect_code": [f"def add(x):\n    return x - {number}"],
                }
                for number in numbers
            ],
        )
    return folder


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(workdir, run="tiny-value", kind="train"):
    return [line for line in read(RunPaths(workdir, run).metrics) if line["kind"] == kind]


@pytest.fixture(scope="module")
def two_stages(tiny_run, plain_data):
    """`two_stages(workdir, *overrides)`: both stages on the plain data."""
    return lambda workdir, *chosen, **how: tiny_run(workdir, *CRITIC, f"data.dataset={plain_data}", *chosen, **how)


@pytest.fixture(scope="module")
def straight(two_stages, run_record, tmp_path_factory):
    """What undisturbed runs leave, of both stages: `straight(*overrides)`."""
    known = {}

    def train(*chosen):
        if chosen not in known:
            workdir = tmp_path_factory.mktemp("straight")
            two_stages(workdir, *chosen)
            known[chosen] = workdir, [run_record(workdir, run) for run in ("tiny-value", "tiny")]
        return known[chosen]

    return train


# a judge that knows nothing has the loss log 2, and a quarter
@pytest.mark.parametrize(("objective", "rate", "loss"), [("pairwise", "1e-2", 0.3), ("lambda_return", "5e-3", 0.242)])
def test_values_are_learned(objective, rate, loss, two_stages, tmp_path):
    learning = ("training.max_steps=32", f"training.lr={rate}", "evaluation.every=8", "evaluation.max_batches=0")
    chosen = (f"value.objective={objective}", "run.stage=value", "value.patience=0", "weighting.critic.lam=1.0")
    size = ("value.hidden=32", "value.micro_batch_size=2")
    summary = two_stages(tmp_path, *learning, *chosen, *size, report=objective == "pairwise")
    assert summary.run == "tiny-value"
    assert not RunPaths(tmp_path, "tiny").checkpoints.exists()
    assert summary.validation["value_loss"] < loss
    assert summary.validation["token_explained_variance"] > 0.01
    if objective == "pairwise":
        assert summary.validation["pairwise_accuracy"] == 1
        assert metrics(tmp_path)[-1]["pairwise_accuracy"] == 1
    assert set(summary.files) == {"report", "metrics", "log", "final model", "best model", "checkpoints"}
    assert (RunPaths(tmp_path, "tiny-value").record.report.stat().st_size > 0) == (objective == "pairwise")
    best = torch.load(RunPaths(tmp_path, "tiny-value").best, weights_only=True)
    assert best["validation"]["value_loss"] == min(line["value_loss"] for line in metrics(tmp_path, kind="validation"))


@pytest.mark.parametrize(("chosen", "polls"), [(ADAPTERS, 6), (VERIFIABLE, 6), (VERIFIABLE, 26)])
def test_a_stop_in_either_stage_changes_no_bit(chosen, polls, straight, two_stages, run_record, tmp_path):
    _, expected = straight(*chosen)
    with pytest.raises(Interrupted) as caught:
        two_stages(tmp_path, *chosen, stop=StopAfter(polls))
    assert caught.value.exit_code == 75
    assert RunPaths(tmp_path, "tiny").checkpoints.exists() == (polls > 6)
    two_stages(tmp_path, *chosen)
    assert [run_record(tmp_path, run) for run in ("tiny-value", "tiny")] == expected


@pytest.fixture(scope="module")
def lines(straight, two_stages, tmp_path_factory):
    """How many lines of ours both stages run."""
    straight(*VERIFIABLE)  # imports, too
    with LineCounter(0, list) as counter:
        two_stages(tmp_path_factory.mktemp("counted"), *VERIFIABLE)
    return counter.lines


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_killed_at_any_line_of_either_stage(share, lines, straight, two_stages, run_record, tmp_path):
    _, expected = straight(*VERIFIABLE)
    with LineCounter(int(share * lines), kill), pytest.raises(KILLED):
        two_stages(tmp_path, *VERIFIABLE)
    two_stages(tmp_path, *VERIFIABLE)
    assert [run_record(tmp_path, run) for run in ("tiny-value", "tiny")] == expected


def kill():
    raise Killed


def test_a_value_model_is_evaluated_like_a_policy(straight, plain_data, tiny_settings):
    workdir, _ = straight(*VERIFIABLE)
    chosen = [*tiny_settings, *CRITIC, *VERIFIABLE, f"data.dataset={plain_data}"]
    settings = load(overrides=chosen, options={"run.workdir": str(workdir), "run.name": "tiny-value"}, environ={})
    found = evaluate_run(settings, "final", StopRequest())
    recorded = metrics(workdir, kind="validation")[-1]
    for key in recorded.keys() - {"kind", "time"}:
        assert found[key] == recorded[key], key


def test_a_reward_model_is_judged_where_labels_are(two_stages, tmp_path, caplog):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "models" / "judge")
    load_tokenizer(PACKAGED).save_pretrained(tmp_path / "models" / "judge")
    scored = ("weighting.critic.rewards=reward_model", "weighting.critic.reward_model=judge")
    two_stages(tmp_path, *TRUNK, *scored, "data.solutions=all")
    log = RunPaths(tmp_path, "tiny").training_log.read_text()
    assert re.search(r"the reward model, of 32 solutions and 16 pairs: pairwise accuracy \d+\.\d%  explained", log)


def test_a_value_model_of_another_tokenizer(straight, two_stages, tmp_path, tiny_model_folder):
    workdir, _ = straight(*VERIFIABLE)
    other = tmp_path / "tokenizer"
    shutil.copytree(PACKAGED, other)
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    named = f"weighting.critic.value={RunPaths(workdir, 'tiny-value').final}"
    message = (
        r"the value model \(.*final\.pt\) was trained with another tokenizer than that of the policy \(.*tokenizer\)"
    )
    with pytest.raises(InputError, match=message):
        two_stages(tmp_path, named, f"model.tokenizer={other}")


def test_a_named_value_model_is_the_same_as_ones_own(straight, two_stages, run_record, tmp_path):
    workdir, (_, expected) = straight(*VERIFIABLE)
    final = RunPaths(workdir, "tiny-value").final
    two_stages(tmp_path, *VERIFIABLE, f"weighting.critic.value={final}")
    assert not RunPaths(tmp_path, "tiny-value").checkpoints.exists()
    found = run_record(tmp_path)
    assert found["metrics"] == expected["metrics"]


def test_a_trained_value_model_comes_from_the_bucket(straight, two_stages, run_record, tmp_path):
    _, (_, expected) = straight(*VERIFIABLE)
    cloud = ("cloud.provider=local", f"cloud.bucket={tmp_path}/bucket")
    two_stages(tmp_path / "first", *VERIFIABLE, *cloud, "run.stage=value")
    # another machine: its disk is empty
    second = tmp_path / "second"
    two_stages(second, *VERIFIABLE, *cloud)
    assert [path.name for path in RunPaths(second, "tiny-value").checkpoints.iterdir()] == ["final.pt"]
    assert run_record(second)["metrics"] == expected["metrics"]


def test_a_head_on_the_trunk_leaves_it_alone(straight, two_stages):
    workdir, _ = straight(*TRUNK)
    paths = RunPaths(workdir, "tiny-value")
    final, best = (torch.load(path, weights_only=True)["model"] for path in (paths.final, paths.best))
    # the tiny policy has three layers: two are the trunk
    layers = {name.split(".")[2] for name in final if name.startswith("backbone.layers.")}
    assert layers == {"0", "1"}
    trained = {name for name, tensor in final.items() if name.startswith("head.") or name == "backbone.norm.weight"}
    state = json.loads((paths.step(5) / "manifest.json").read_text())
    assert "model.safetensors" in state["files"]
    assert set(load_file(paths.step(5) / "model.safetensors")) == trained
    assert all(torch.equal(final[name], best[name]) for name in final.keys() - trained)


def test_settings_that_the_value_model_was_not_trained_with(straight, two_stages, tmp_path):
    workdir, _ = straight(*VERIFIABLE)
    for run in ("tiny-value", "tiny"):
        shutil.copytree(RunPaths(workdir, run).checkpoints, RunPaths(tmp_path, run).checkpoints)
    with pytest.raises(InputError, match=r"other settings: value\.hidden: 8 in the checkpoint, 9 now"):
        two_stages(tmp_path, *VERIFIABLE, "value.hidden=9")
    # what concerns the policy alone, concerns the policy alone
    with pytest.raises(InputError, match=r"other settings: weighting\.max: 5\.0 in the checkpoint, 4\.0 now"):
        two_stages(tmp_path, *VERIFIABLE, "weighting.max=4.0")


def test_a_value_model_of_other_data(straight, two_stages, plain_data, tmp_path):
    workdir, _ = straight(*VERIFIABLE)
    shutil.copytree(RunPaths(workdir, "tiny-value").checkpoints, RunPaths(tmp_path, "tiny-value").checkpoints)
    other = tmp_path / "data"
    shutil.copytree(plain_data, other)
    text = (other / "train.jsonl").read_text()
    (other / "train.jsonl").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"'tiny' was trained with another data\.dataset.*--resume never"):
        two_stages(tmp_path, *VERIFIABLE, f"data.dataset={other}")


def test_a_run_that_trained_a_policy_is_no_place_for_values(two_stages, tmp_path):
    two_stages(tmp_path, "weighting.family=uniform", "training.max_steps=2", "evaluation.every=0")
    for run in ("checkpoints", "logs"):
        (tmp_path / run / "tiny").rename(tmp_path / run / "tiny-value")
    with pytest.raises(InputError, match=r"run tiny-value trained a policy, and is to train a value model.*--run-name"):
        two_stages(tmp_path)


def test_data_without_incorrect_solutions(two_stages, plain_data, tmp_path):
    folder = tmp_path / "right"
    shutil.copytree(plain_data, folder)
    for name in ("train", "validation"):
        records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        write(folder / f"{name}.jsonl", [record | {"incorrect_code": []} for record in records])
    message = r"values cannot be learned: no problem has both.*the train split of .*right.*16 problems.*--mutations"
    with pytest.raises(InputError, match=message):
        two_stages(tmp_path, f"data.dataset={folder}")
