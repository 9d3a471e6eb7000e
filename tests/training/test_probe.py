"""The samples that people are shown: weighed as the training would, without a trace in it."""

import dataclasses
import json

import pytest
import torch

from tests.training.stopping import StopAfter
from wmtp_worker.assets.resolve import dataset_folder
from wmtp_worker.data.tokenizer import PACKAGED, load_tokenizer
from wmtp_worker.errors import Interrupted
from wmtp_worker.model.loading import build
from wmtp_worker.settings import load
from wmtp_worker.storage.layout import RunPaths
from wmtp_worker.training import probe as module
from wmtp_worker.training.group import Group
from wmtp_worker.training.probe import Probe, pieces
from wmtp_worker.training.report import write_report
from wmtp_worker.training.splits import load_split
from wmtp_worker.training.weights import Weighter

# weights of every kind: of the policy's losses, with a memory, and with chance
LIVELY = ("weighting.family=gradient", "weighting.warmup=1", "weighting.control=shuffled")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PACKAGED)


@pytest.fixture
def probed(tiny_settings, tokenizer, tmp_path, one_thread):
    """`probed(*overrides)`: a probe of the packaged sample, its settings and its file."""

    def make(*overrides):
        settings = load(overrides=[*tiny_settings, *overrides], environ={})
        data = load_split(settings, dataset_folder(settings), "train", tokenizer, lambda: None)
        path = RunPaths(tmp_path, "r").record.weights
        return (
            Probe(path, settings, data, tokenizer, build(settings, tokenizer), Group(torch.device("cpu"))),
            settings,
            data,
        )

    return make


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TargetsAsWeights:
    """A weighter that gives each position the number of the token it is to predict."""

    def aside(self):
        return self

    def begin(self, step, batches, targets):
        return [lambda head: head.targets.float()] * len(batches)


def test_weights_stand_at_the_tokens_they_weigh(probed, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "TOKENS", 9)
    monkeypatch.setattr(module, "_rounded", float)
    probe, _, data = probed()
    probe.record(4, TargetsAsWeights())
    header, record = lines(tmp_path / "logs" / "r" / "weights.jsonl")
    assert record["step"] == 4
    assert len(record["weights"]) == module.SAMPLES
    chosen = [sample for sample in data.samples if sample.reward == 1][: module.SAMPLES]
    for sample, described, weights in zip(chosen, header["samples"], record["weights"], strict=True):
        ids = sample.ids[sample.prompt_length :].tolist()
        assert weights == [[token] * 2 for token in ids[:9]]
        assert described["left_out"] == len(ids) - 9
        assert len(described["tokens"]) == 9
        assert "### Response:" in described["prompt"]


def test_families_that_ask_the_policy_get_what_it_says(probed, tmp_path):
    probe, settings, _ = probed("weighting.family=gradient", "weighting.normalise=none", "weighting.warmup=1")
    with torch.no_grad():
        probe._model.lm_head.weight.mul_(15)  # a policy that is sure of something
    weighter = Weighter(settings.weighting, 1)
    probe.record(4, weighter)
    weights = lines(tmp_path / "logs" / "r" / "weights.jsonl")[1]["weights"]
    assert len({weight for sample in weights for token in sample for weight in token}) > 10
    assert weighter.memory.averages == {}
    assert weighter.memory.moments == {}


def test_samples_are_of_different_problems_and_correct(probed):
    data = probed()[2]
    first = data.samples[0]
    wrong, again = dataclasses.replace(first, reward=0.0), dataclasses.replace(first, reward=1.0)
    mixed = dataclasses.replace(data, samples=[wrong, again, again, *data.samples[1:]])
    assert module._first_correct(mixed) == [1, 3, 4]


@pytest.mark.parametrize(("every", "last", "expected"), [(0, 7, [7]), (5, 20, [5, 10, 15, 20]), (1, 100, None)])
def test_the_file_is_bounded_however_long_the_run(every, last, expected, probed):
    probe, *_ = probed(f"evaluation.every={every}", f"training.max_steps={last}")
    due = [
        step for step in range(1, last + 1) if ((every and step % every == 0) or step == last) and probe._is_due(step)
    ]
    assert due == expected or (expected is None and len(due) <= module.RECORDS and due[-1] == last)


def test_what_is_said_of_later_steps_or_other_samples_is_replaced(probed, tmp_path):
    probe, settings, _ = probed()
    weighter, path = Weighter(settings.weighting, 1), tmp_path / "logs" / "r" / "weights.jsonl"
    for step in (4, 8, 12, 8):
        probe.record(step, weighter)
    assert [line.get("step") for line in lines(path)] == [None, 4, 8]
    path.write_text('{"samples": []}\n{"step": 4, "weights": []}\n')
    probe.record(8, weighter)
    assert [line.get("step") for line in lines(path)] == [None, 8]


def test_a_disk_that_does_not_take_it_stops_nothing(probed, tmp_path, caplog):
    probe, settings, _ = probed()
    (tmp_path / "logs").write_text("")
    probe.record(4, Weighter(settings.weighting, 1))
    assert "weights of step 4 are not recorded" in caplog.text


@pytest.fixture(scope="module")
def runs(tiny_run, tmp_path_factory):
    """Work directories of the same run without a probe, with it, and stopped after the validation of step 4."""
    without, probed, stopped = (tmp_path_factory.mktemp(name) for name in ("without", "with", "stopped"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Probe, "record", lambda *_: None)
        tiny_run(without, *LIVELY)
    tiny_run(probed, *LIVELY)
    with pytest.raises(Interrupted):
        tiny_run(stopped, *LIVELY, stop=StopAfter(17))
    tiny_run(stopped, *LIVELY)
    return without, probed, stopped


def test_the_probe_changes_no_bit_of_a_run(runs, run_record):
    without, probed, _ = runs
    assert run_record(probed) == run_record(without)


def test_a_stop_changes_nothing_of_the_probe(runs):
    _, probed, stopped = (RunPaths(workdir, "tiny").record.weights for workdir in runs)
    assert [line.get("step") for line in lines(probed)] == [None, 4, 8, 12]
    assert stopped.read_bytes() == probed.read_bytes()


def test_the_report_of_real_runs(runs, tmp_path):
    _, probed, stopped = (RunPaths(workdir, "tiny").record for workdir in runs)
    page = tmp_path / "page.html"
    write_report([stopped], page)
    assert "Finished after 12 steps." in page.read_text()
    assert "1 interruption: 0 steps done again." in page.read_text()
    write_report([probed, stopped], page)
    assert "tiny and tiny reach the same validation loss" in page.read_text()


def test_pieces_are_the_whole_text(tokenizer):
    text = "def f(é):\n    return '🙂' + \"</s>\"\n"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids)).strip() == text.strip()
    assert len(pieces(tokenizer, ids)) == len(ids)
