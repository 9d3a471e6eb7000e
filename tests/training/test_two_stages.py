"""Whole runs of both stages: the value model first, then the policy that is weighted by it."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.kills.test_resume_in_process import KILLED, Killed, LineCounter
from tests.training.stopping import StopAfter
from wmtp_worker.data.tokenizer import PACKAGED
from wmtp_worker.errors import ExhaustedError, InputError, Interrupted, NotSafeError
from wmtp_worker.host.stop import StopRequest
from wmtp_worker.model.layouts import open_stored
from wmtp_worker.model.loading import load as load_model
from wmtp_worker.settings import load
from wmtp_worker.storage.cloud import CloudSync, Synced
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
BESIDE = (*VERIFIABLE, *TRUNK, "weighting.critic.auxiliary=0.5", "training.micro_batch_size=2")
# no first stage; adapters on the policy, values by pairs
FROM_ZERO = (*TRUNK, "data.solutions=all", "weighting.critic.auxiliary=0.5", "run.stage=policy", "lora.rank=2",
             "lora.dropout=0.1", "training.micro_batch_size=4", "training.lr=1e-2")  # fmt: skip


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


def records(run_record, workdir):
    """Of both stages, or of the only one."""
    return [run_record(workdir, run) for run in ("tiny-value", "tiny") if RunPaths(workdir, run).metrics.exists()]


@pytest.fixture(scope="module")
def straight(two_stages, run_record, tmp_path_factory):
    """What undisturbed runs leave, of both stages: `straight(*overrides)`."""
    known = {}

    def train(*chosen):
        if chosen not in known:
            workdir = tmp_path_factory.mktemp("straight")
            two_stages(workdir, *chosen)
            known[chosen] = workdir, records(run_record, workdir)
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


@pytest.mark.parametrize(
    ("chosen", "polls"), [(ADAPTERS, 6), (VERIFIABLE, 6), (VERIFIABLE, 26), (BESIDE, 22), (FROM_ZERO, 9)]
)
def test_a_stop_in_either_stage_changes_no_bit(chosen, polls, straight, two_stages, run_record, tmp_path):
    _, expected = straight(*chosen)
    with pytest.raises(Interrupted) as caught:
        two_stages(tmp_path, *chosen, stop=StopAfter(polls))
    assert caught.value.exit_code == 75
    assert RunPaths(tmp_path, "tiny").checkpoints.exists() == (polls > 6)
    two_stages(tmp_path, *chosen)
    assert records(run_record, tmp_path) == expected


@pytest.fixture(scope="module")
def lines(straight, two_stages, tmp_path_factory):
    """How many lines of ours both stages run."""
    straight(*VERIFIABLE)  # imports, too
    with LineCounter(0, list) as counter:
        two_stages(tmp_path_factory.mktemp("counted"), *VERIFIABLE)
    return counter.lines


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_killed_at_any_line_of_either_stage(share, lines, straight, two_stages, run_record, tmp_path):
    _, expected = straight(*VERIFIABLE)
    with LineCounter(int(share * lines), kill), pytest.raises(KILLED):
        two_stages(tmp_path, *VERIFIABLE)
    two_stages(tmp_path, *VERIFIABLE)
    assert records(run_record, tmp_path) == expected


class KillAfter(StopAfter):
    def request(self, reason):
        kill()


def test_killed_in_the_midst_of_a_step_while_values_are_learned_beside_it(straight, two_stages, run_record, tmp_path):
    _, expected = straight(*FROM_ZERO)
    with pytest.raises(KILLED):
        two_stages(tmp_path, *FROM_ZERO, "checkpoint.every=1", stop=KillAfter(9))
    assert [path.name for path in sorted(RunPaths(tmp_path, "tiny").checkpoints.glob("step_*"))]
    two_stages(tmp_path, *FROM_ZERO)
    assert records(run_record, tmp_path) == expected


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
    make_judge(tmp_path / "models" / "judge", PACKAGED)
    scored = ("weighting.critic.rewards=reward_model", "weighting.critic.reward_model=judge")
    two_stages(tmp_path, *TRUNK, *scored, "data.solutions=all")
    log = RunPaths(tmp_path, "tiny").training_log.read_text()
    assert re.search(r"the reward model, of 32 solutions and 16 pairs: pairwise accuracy \d+\.\d%  explained", log)


def make_judge(folder, tokenizer, labels=1):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


@pytest.mark.parametrize("wrong", ["absent", "labels", "tokenizer"])
def test_what_the_policy_would_be_refused_for_no_value_model_is_trained_for(wrong, two_stages, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(PACKAGED, tokenizer)
    if wrong == "tokenizer":
        content = json.loads((tokenizer / "tokenizer.json").read_text())
        ids = content["model"]["vocab"]
        *_, one, other = ids
        ids[one], ids[other] = ids[other], ids[one]
        (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    if wrong != "absent":
        make_judge(tmp_path / "judge", tokenizer, labels=3 if wrong == "labels" else 1)
    scored = ("weighting.critic.rewards=reward_model", f"weighting.critic.reward_model={tmp_path / 'judge'}")
    with pytest.raises(InputError, match=r"judge"):
        two_stages(tmp_path, *TRUNK, *scored, "data.solutions=all")
    assert not RunPaths(tmp_path, "tiny-value").metrics.exists()
    assert not RunPaths(tmp_path, "tiny-value").steps()


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


def test_a_value_model_that_the_bucket_lacks_is_published_by_the_next_process(two_stages, tmp_path, monkeypatch):
    cloud = ("cloud.provider=local", f"cloud.bucket={tmp_path}/bucket", "cloud.patience=0.2")
    here = tmp_path / "here"
    two_stages(here, *VERIFIABLE, "run.stage=value")  # as if the bucket had been away
    there = tmp_path / "bucket" / "checkpoints" / "tiny-value"
    push, tried = CloudSync.push_run, []

    def away_at_first(cloud, run):
        tried.append(run)
        return Synced(failed={"final.pt": ExhaustedError("away")}) if len(tried) == 1 else push(cloud, run)

    monkeypatch.setattr(CloudSync, "push_run", away_at_first)
    assert two_stages(here, *VERIFIABLE, *cloud).run == "tiny"
    assert tried == ["tiny-value"] * 2  # before the policy was trained, and after it
    assert (there / "final.pt").read_bytes() == RunPaths(here, "tiny-value").final.read_bytes()
    assert list(there.glob("step_5/manifest.json"))
    monkeypatch.setattr(CloudSync, "push_run", lambda cloud, run: Synced(failed={"final.pt": ExhaustedError("away")}))
    with pytest.raises(NotSafeError, match=r"final\.pt; away.*wmtp checkpoints push tiny-value"):
        two_stages(here, *VERIFIABLE, *cloud)


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


def test_a_head_is_trained_on_from_where_the_first_stage_left_it(straight, two_stages, run_record, tmp_path):
    workdir, (_, expected) = straight(*BESIDE)
    values = RunPaths(workdir, "tiny-value").final
    before = torch.load(values, weights_only=True)["model"]
    paths = RunPaths(workdir, "tiny")
    final, best = (torch.load(path, weights_only=True)["model"] for path in (paths.final, paths.best))
    saved = load_file(paths.step(5) / "model.safetensors")
    moments = load_file(paths.step(5) / "optimizer.safetensors")
    for name in ("norm.weight", "head.hidden.weight", "head.hidden.bias", "head.output.weight", "head.output.bias"):
        began = before[f"backbone.{name}" if name.startswith("norm") else name]
        assert 0 < (final[f"value_head.{name}"] - began).abs().max() < 0.01  # some steps of the policy's learning rate
        assert saved[f"value_head.{name}"].equal(final[f"value_head.{name}"])
        assert best[f"value_head.{name}"].shape == began.shape
        assert any(f"value_head.{name}" in key for key in moments)
    told = metrics(workdir, "tiny")
    assert all(
        {"value_loss", "token_explained_variance", "td_error_std", "advantage_ema_std"} <= set(one) for one in told
    )
    # named, it is the same; the settings that made it do not count
    two_stages(tmp_path, *BESIDE, f"weighting.critic.value={values}", "value.hidden=9")
    assert run_record(tmp_path)["metrics"] == expected["metrics"]


def test_a_policy_that_had_values_beside_it_is_a_policy(straight, plain_data, tiny_settings):
    workdir, _ = straight(*FROM_ZERO)
    paths = RunPaths(workdir, "tiny")
    assert not RunPaths(workdir, "tiny-value").checkpoints.exists()
    final = torch.load(paths.final, weights_only=True)["model"]
    assert final["value_head.head.output.weight"].abs().max() > 0
    stored = open_stored(paths.final)
    assert not [name for name in stored.tensors if "value" in name or "lora" in name]
    assert not hasattr(load_model(paths.final, 2).config, "value_head")
    chosen = [*tiny_settings, *CRITIC, *FROM_ZERO, f"data.dataset={plain_data}"]
    settings = load(overrides=chosen, options={"run.workdir": str(workdir), "run.name": "tiny"}, environ={})
    found = evaluate_run(settings, "final", StopRequest())
    recorded = metrics(workdir, "tiny", "validation")[-1]
    assert all(found[key] == recorded[key] for key in recorded.keys() - {"kind", "time"})
    # people are shown what the head weighs by, as it changes
    _, first, *_, last = [json.loads(line) for line in paths.record.weights.read_text().splitlines()]
    assert first["weights"] != last["weights"]


def test_values_that_are_no_head_on_the_policys_trunk(straight, two_stages, tmp_path):
    own = RunPaths(straight(*VERIFIABLE)[0], "tiny-value").final
    with pytest.raises(
        InputError, match=r"backbone of its own, weighting\.critic\.auxiliary.*value\.trunk_head=true"
    ) as caught:
        two_stages(tmp_path, *BESIDE, f"weighting.critic.value={own}")
    assert caught.value.exit_code == 78
    trunk = RunPaths(straight(*BESIDE)[0], "tiny-value").final
    with pytest.raises(InputError, match=r"backbone\.embed_tokens\.weight is not the policy's: weighting"):
        two_stages(tmp_path, *BESIDE, f"weighting.critic.value={trunk}", "run.seed=9")
    with pytest.raises(InputError, match=r"one layer, which is head 1: there is no trunk for weighting\.critic\.aux"):
        two_stages(tmp_path, *BESIDE, "model.layers=1", "run.stage=policy")


def test_both_stages_begin_anew_when_asked_to(straight, two_stages, run_record, tmp_path):
    workdir, expected = straight(*VERIFIABLE)
    for run in ("tiny-value", "tiny"):
        shutil.copytree(RunPaths(workdir, run).checkpoints, RunPaths(tmp_path, run).checkpoints)
        (RunPaths(tmp_path, run).step(5) / "mark").touch()
    two_stages(tmp_path, *VERIFIABLE, resume="never")
    assert records(run_record, tmp_path) == expected
    for run in ("tiny-value", "tiny"):
        (aside,) = RunPaths(tmp_path, run).checkpoints.glob("set-aside-*")
        assert {"final.pt", "best_model.pt", "step_5"} <= {path.name for path in aside.iterdir()}
        assert (aside / "step_5" / "mark").exists()
        assert not (RunPaths(tmp_path, run).step(5) / "mark").exists()


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


def test_a_value_model_of_another_backbone(two_stages, tiny_model_folder, tmp_path):
    backbones = [tmp_path / name for name in ("one", "two")]
    for folder in backbones:
        shutil.copytree(tiny_model_folder, folder)
    weights = load_file(backbones[1] / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, backbones[1] / "model.safetensors", metadata={"format": "pt"})
    chosen = (*VERIFIABLE, "value.max_steps=2", "value.evaluation_every=0")
    one, two = (f"value.backbone={folder}" for folder in backbones)
    two_stages(tmp_path, *chosen, one, "run.stage=value")
    with pytest.raises(InputError, match=r"another value\.backbone: sha256 (\w+) then, sha256 (?!\1)\w+ now \(.*two\)"):
        two_stages(tmp_path, *chosen, two)
    # of no use any more, it need not be there
    shutil.rmtree(backbones[0])
    assert two_stages(tmp_path, *chosen, one).run == "tiny"


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
