"""What frozen models say of the data: right numbers, computed once, whatever interrupts."""

import dataclasses
import io
import logging
import shutil
import threading

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from wmtp_worker.checkpoint.export import save_weights
from wmtp_worker.data.dataset import Dataset
from wmtp_worker.data.sampler import PackedSampler
from wmtp_worker.data.tokenizer import PACKAGED, Sample, load_tokenizer
from wmtp_worker.errors import InputError, Interrupted
from wmtp_worker.model.compat import Named
from wmtp_worker.model.value import value_from
from wmtp_worker.settings import load
from wmtp_worker.tracking.heartbeat import Heartbeat
from wmtp_worker.training import scores
from wmtp_worker.training.columns import Policy, add_columns, advantages
from wmtp_worker.training.frozen import frozen_models
from wmtp_worker.training.scores import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = load_tokenizer(PACKAGED)
POLICY = Policy(Named("the policy", TOKENIZER), "tokens")


@pytest.fixture(scope="session")
def value_file(tiny_model_folder, tmp_path_factory):
    """A value model that says something, as a run leaves it."""
    value = value_from(tiny_model_folder, 1, width=8, seed=3)
    torch.nn.init.normal_(value.head.output.weight, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("values") / "final.pt"
    save_weights(path, dict(value.named_parameters()), {"step": 1, "config": value.config.to_dict()})
    return path


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "reward"
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        num_labels=1,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def samples(count=11):
    generator = np.random.default_rng(0)
    return [
        Sample(generator.integers(0, 2000, 5 + i % 7).astype(np.int32), 3, i // 2, float(i % 2)) for i in range(count)
    ]


def settings(tmp_path, *overrides):
    small = ["data.sequence_length=30", "data.solutions=all", "model.heads=2"]
    return load(overrides=[*small, *overrides], options={"run.workdir": str(tmp_path)}, environ={})


def with_reference(tmp_path, folder, *overrides):
    chosen = ("weighting.family=rho1_weighted", f"weighting.reference={folder}")
    return settings(tmp_path, *chosen, *overrides)


def scorer(settings, poll=lambda phase: None):
    heartbeat = Heartbeat(settings.run.workdir / "heartbeat.json", "run")
    return Scorer(settings, torch.device("cpu"), poll, heartbeat, Console(file=io.StringIO()))


class Counting:
    """A frozen model that counts how often it is loaded, and the tokens that it reads."""

    def __init__(self, settings):
        (self.frozen,) = frozen_models(settings)
        self.loads, self.passes = 0, []
        self.counted = dataclasses.replace(self.frozen, load=self._load)

    def _load(self, device):
        self.loads += 1
        judge = self.frozen.load(device)

        def count(batch):
            self.passes.append(batch.input_ids.numel())
            return judge(batch)

        return count


def tokens_of(some):
    return sum(len(sample.ids) for sample in some)


def test_the_reference_loss_is_each_tokens_cross_entropy(tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    (frozen,) = frozen_models(chosen)
    found = scorer(chosen).score(frozen, ("m", "t"), samples())
    llama = LlamaForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    for sample, losses in zip(samples(), found, strict=True):
        ids = torch.from_numpy(sample.ids).long()[None]
        with torch.no_grad():
            logits = llama(ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
        assert losses.dtype == np.float32
        assert losses.tolist() == pytest.approx([0, *expected], rel=1e-4)


def test_a_second_time_costs_nothing(tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    first, second = Counting(chosen), Counting(chosen)
    found = scorer(chosen).score(first.counted, ("m", "t"), samples())
    assert sum(first.passes) == tokens_of(samples())  # no padding, nothing twice
    assert max(first.passes) > 20  # several samples in one pass
    again = scorer(chosen).score(second.counted, ("m", "t"), samples())
    assert (second.loads, second.passes) == (0, [])
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
    (folder,) = (tmp_path / "cache" / "scores").iterdir()
    assert [path.name for path in folder.iterdir()] == ["scores.npy"]
    assert not again[0].flags.writeable  # mapped, not read


@pytest.mark.parametrize("change", ["model", "tokenizer", "samples", "precision", "layout"])
def test_other_numbers_have_another_place(change, tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    scorer(chosen).score(Counting(chosen).counted, ("m", "t"), samples())
    override = {"precision": ["training.precision=bf16"], "layout": ["data.sequence_length=40"]}.get(change, [])
    other = with_reference(tmp_path, tiny_model_folder, *override)
    again = Counting(other)
    digests = {"model": ("other", "t"), "tokenizer": ("m", "other")}.get(change, ("m", "t"))
    scorer(other).score(again.counted, digests, samples(10 if change == "samples" else 11))
    assert again.loads == 1


@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_stopped_half_way_it_goes_on(stopped_at, tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(scores, "PART", 3)
    chosen = with_reference(tmp_path, tiny_model_folder)
    expected = scorer(with_reference(tmp_path / "straight", tiny_model_folder)).score(
        Counting(chosen).counted, ("m", "t"), samples()
    )
    first, second, polls = Counting(chosen), Counting(chosen), []

    def poll(phase):
        assert phase == "scores"
        polls.append(1)
        if len(polls) > stopped_at:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        scorer(chosen, poll).score(first.counted, ("m", "t"), samples())
    assert len(first.passes) == stopped_at
    (folder,) = (tmp_path / "cache" / "scores").iterdir()
    (folder / ".tmp-part-3.npy-99").write_bytes(b"of a process that was killed")
    done = [int(path.stem.removeprefix("part-")) for path in folder.glob("part-*")]
    found = scorer(chosen).score(second.counted, ("m", "t"), samples())
    # only the part under way is read again
    kept = sum(tokens_of(samples()[start : start + 3]) for start in done)
    assert sum(second.passes) == tokens_of(samples()) - kept
    assert kept == sum(first.passes) or kept > 0 or stopped_at == 1
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [path.name for path in folder.iterdir()] == ["scores.npy"]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_is_made_anew(damage, tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    found = [values.copy() for values in scorer(chosen).score(Counting(chosen).counted, ("m", "t"), samples())]
    (path,) = (tmp_path / "cache" / "scores").glob("*/scores.npy")
    path.write_bytes(path.read_bytes()[:-4] if damage is None else damage)
    again = scorer(chosen).score(Counting(chosen).counted, ("m", "t"), samples())
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


def test_of_two_that_need_the_same_one_waits(tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    both, results = [Counting(chosen), Counting(chosen)], []

    def work(counting):
        results.append(scorer(chosen).score(counting.counted, ("m", "t"), samples()))

    threads = [threading.Thread(target=work, args=(counting,)) for counting in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert sorted(counting.loads for counting in both) == [0, 1]


def test_numbers_that_are_not_finite_are_refused(tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    (frozen,) = frozen_models(chosen)
    broken = dataclasses.replace(frozen, load=lambda device: lambda batch: batch.input_ids / 0.0)
    with pytest.raises(InputError, match=r"the reference model \(.*\) gives numbers that are not finite"):
        scorer(chosen).score(broken, ("m", "t"), samples())


# --- which models


def test_a_reference_with_another_vocabulary_is_refused_by_name(tmp_path, tiny_model_folder):
    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = TOKENIZER.get_vocab()
    one, two = (token for token in sorted(vocabulary, key=vocabulary.get)[300:302])
    assert text.count(f'"{one}": {vocabulary[one]}') == 1
    text = text.replace(f'"{one}": {vocabulary[one]}', f'"{one}": {vocabulary[two]}', 1)
    text = text.replace(f'"{two}": {vocabulary[two]}', f'"{two}": {vocabulary[one]}', 1)
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    chosen = with_reference(tmp_path, other)
    with pytest.raises(InputError, match=r"the policy and the reference model \(.*other\) have different tokenizers"):
        add_columns(chosen, data(), POLICY, scorer(chosen))
    assert not (tmp_path / "cache").exists()


def data(some=None):
    some = samples() if some is None else some
    return Dataset(some, PackedSampler([len(sample.ids) for sample in some], 30, 1), 30, 0)


def test_a_reference_is_found_by_name_and_must_be_long_enough(tmp_path, tiny_model_folder):
    shutil.copytree(tiny_model_folder, tmp_path / "models" / "mine")
    (frozen,) = frozen_models(with_reference(tmp_path, "mine"))
    assert frozen.path == tmp_path / "models" / "mine"
    frozen.check(POLICY.tokens, 512)
    with pytest.raises(InputError, match="has 512 positions, the longest sample 513 tokens"):
        frozen.check(POLICY.tokens, 513)
    with pytest.raises(InputError, match=r"weighting\.reference='gone' is not there"):
        frozen_models(with_reference(tmp_path, "gone"))


def test_a_model_without_a_tokenizer_is_believed(tmp_path, value_file, caplog):
    chosen = settings(tmp_path, "weighting.family=critic", f"weighting.critic.value={value_file}")
    (frozen,) = frozen_models(chosen)
    with caplog.at_level(logging.WARNING, "wmtp_worker"):
        frozen.check(POLICY.tokens, 10)
    assert "has no tokenizer beside it" in caplog.text


@pytest.mark.parametrize("wanted", ["judge", "folder", "file"])
def test_a_value_model_is_a_runs_name_its_folder_or_a_file(wanted, tmp_path, value_file):
    place = tmp_path / "checkpoints" / "judge" / "final.pt"
    place.parent.mkdir(parents=True)
    shutil.copy(value_file, place)
    name = {"judge": "judge", "folder": place.parent, "file": place}[wanted]
    (frozen,) = frozen_models(settings(tmp_path, "weighting.family=critic", f"weighting.critic.value={name}"))
    assert frozen.path == place
    with pytest.raises(InputError, match=r"weighting\.critic\.value='gone' is not there"):
        frozen_models(settings(tmp_path, "weighting.family=critic", "weighting.critic.value=gone"))


def test_a_value_model_of_another_shape_is_refused(tmp_path, value_file):
    content = torch.load(value_file, weights_only=True)
    content["model"]["head.hidden.weight"] = content["model"]["head.hidden.weight"][:, :5]
    path = tmp_path / "odd.pt"
    torch.save(content, path)
    chosen = settings(tmp_path, "weighting.family=critic", f"weighting.critic.value={path}")
    with pytest.raises(InputError, match=r"head.hidden.weight has shape \[8, 5\], the model wants \[8, 32\]"):
        add_columns(chosen, data(), POLICY, scorer(chosen))


def test_a_policys_weights_are_no_value_model(tmp_path):
    path = tmp_path / "policy.pt"
    config = LlamaConfig(vocab_size=2048, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    torch.save({"step": 1, "config": config.to_dict(), "model": {}}, path)
    chosen = settings(tmp_path, "weighting.family=critic", f"weighting.critic.value={path}")
    with pytest.raises(InputError, match="it is no value model"):
        add_columns(chosen, data(), POLICY, scorer(chosen))


# --- columns


def test_values_and_rewards(tmp_path, value_file, reward_folder):
    family = ("weighting.family=critic", f"weighting.critic.value={value_file}")

    def columns(rewards):
        chosen = settings(tmp_path, *family, f"weighting.critic.reward_model={reward_folder}", rewards)
        found, digests = add_columns(chosen, data(), POLICY, scorer(chosen))
        assert set(digests) <= {"weighting.critic.value", "weighting.critic.reward_model"}
        return found.columns

    by_value = columns("weighting.critic.rewards=value")
    values = by_value["value"]
    assert np.concatenate(values).std() > 0.01
    for column, ends in (
        (by_value["reward"], [one[-1] for one in values]),
        (columns("weighting.critic.rewards=verifiable")["reward"], [sample.reward for sample in samples()]),
    ):
        assert [one[-1] for one in column] == ends
        assert all((one[:-1] == 0).all() for one in column)
    scored = columns("weighting.critic.rewards=reward_model")["reward"]
    llama = LlamaForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = [float(llama(torch.from_numpy(sample.ids).long()[None]).logits) for sample in samples()]
    assert [float(one[-1]) for one in scored] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert all((one[:-1] == 0).all() for one in scored)


def test_a_batch_carries_the_columns(tmp_path, tiny_model_folder):
    chosen = with_reference(tmp_path, tiny_model_folder)
    found, digests = add_columns(chosen, data(), POLICY, scorer(chosen))
    assert set(digests) == {"weighting.reference"}
    batch = found.batch([[2, 0], [1]])
    expected = np.concatenate([found.columns["reference_loss"][i] for i in (2, 0)])
    assert batch.columns["reference_loss"][0, : len(expected)].tolist() == expected.tolist()
    assert (batch.columns["reference_loss"][batch.segment_ids == 0] == 0).all()


def solved(*rewards_by_problem):
    return [
        Sample(np.arange(3, dtype=np.int32), 1, problem, reward)
        for problem, rewards in enumerate(rewards_by_problem)
        for reward in rewards
    ]


def test_advantages_within_each_problem(caplog):
    with caplog.at_level(logging.WARNING, "wmtp_worker"):
        found = advantages(solved([1.0, 0.0], [1.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0]))
    ends = [float(one[0]) for one in found]
    assert ends == pytest.approx([1, -1, 0, 3**0.5, *[-(3**-0.5)] * 3, 0, 0], rel=1e-3)
    assert all(len(one) == 3 and (one == one[0]).all() for one in found)
    assert "2 of 4 problems teach like uniform ones: 1 with one solution, 1 with equal rewards" in caplog.text


@pytest.mark.parametrize(
    ("problems", "what"),
    [(([1.0], [0.0], [1.0]), "one solution"), (([1.0, 1.0], [0.0, 0.0], [1.0]), "only solutions that are equally")],
)
def test_nothing_to_compare(problems, what, tmp_path):
    chosen = settings(tmp_path, "weighting.family=grpo")
    with pytest.raises(InputError, match=rf"every training problem has {what}.*wmtp data label"):
        add_columns(chosen, data(solved(*problems)), POLICY, scorer(chosen))


def test_whoever_learns_from_wrong_solutions_is_told(tmp_path, caplog):
    chosen = settings(tmp_path, "weighting.family=gradient")
    with caplog.at_level(logging.WARNING, "wmtp_worker"):
        found, digests = add_columns(chosen, data(), POLICY, scorer(chosen))
    assert "incorrect solutions are learned like correct ones" in caplog.text
    assert (found.columns, digests) == ({}, {})


@pytest.mark.parametrize(
    ("family", "control", "told"),
    [
        ("uniform", "shuffled", 1),
        ("uniform", "random_matched", 1),
        ("grpo", "shuffled", 1),
        ("grpo", "random_matched", 0),
    ],
)
def test_a_control_that_changes_nothing_is_said_to(family, control, told, tmp_path, caplog):
    chosen = settings(tmp_path, f"weighting.family={family}", f"weighting.control={control}")
    with caplog.at_level(logging.WARNING, "wmtp_worker"):
        add_columns(chosen, data(), POLICY, scorer(chosen))
    assert caplog.text.count(f"weighting.control={control} changes nothing") == told
