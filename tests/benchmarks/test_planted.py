"""The planted task: what each token is, what is read off the curves, and a whole tiny study."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from wmtp_worker.data.formats import read_split
from wmtp_worker.data.tokenizer import encode_all, load_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _beside_each_other():
    """The scripts find each other as they do when they are run; what they say to the log counts for them alone."""
    log = logging.getLogger("wmtp_worker")
    level = log.level
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield
        log.setLevel(level)
        for name in [name for name in sys.modules if name.startswith("planted")]:
            del sys.modules[name]


def samples(folder, wrong=2):
    import planted_data as data

    data.write(folder / "data", train=20, validation=2, seed=0, wrong=wrong)
    data.write_tokenizer(folder / "words")
    tokenizer = load_tokenizer(folder / "words")
    problems = enumerate(read_split(folder / "data", "train"))
    return tokenizer, [
        sample for number, problem in problems for sample in encode_all(tokenizer, problem, number, "all")
    ]


def test_a_token_is_what_its_text_says(tmp_path):
    import planted_data as data

    tokenizer, found = samples(tmp_path)
    assert len(found) == 20 * (data.RIGHT + data.WRONG)
    for sample in found:
        words, kinds = tokenizer.convert_ids_to_tokens(sample.ids), data.kinds(sample)
        assert words[: sample.prompt_length][:2] == ["<s>", "Q"]
        assert words[sample.prompt_length - 1] == "A"
        assert "<unk>" not in words
        constant, value = int(words[2]), int(words[4])
        for word, kind in zip(words[sample.prompt_length : -1], kinds[sample.prompt_length : -1], strict=True):
            assert (kind == data.FILLER) == word.startswith("w")
            if kind != data.FILLER:
                assert (kind == data.PLANTED) == (int(word) == (value**2 + constant) % data.MODULUS)
                value = int(word)
        assert (data.MISTAKEN in kinds) == (sample.reward == 0)
        assert np.isin(kinds, (data.PLANTED, data.MISTAKEN)).sum() == data.TERMS


def test_a_reference_reads_right_solutions_only(tmp_path):
    import planted_data as data

    _, found = samples(tmp_path, wrong=0)
    assert [sample.reward for sample in found] == [1.0] * 20 * data.RIGHT
    assert not any(data.MISTAKEN in data.kinds(sample) for sample in found)


def curve(*losses):
    return {"curve": [{"step": 10 * n, "losses": {"planted": {"head 1": loss}}} for n, loss in enumerate(losses, 1)]}


def test_steps_to_a_loss_lie_on_the_line_between_two_points():
    from planted import steps_to

    assert steps_to(curve(3.0, 2.0, 1.0), 1.5) == pytest.approx(25)
    assert steps_to(curve(3.0, 2.0, 1.0), 3.5) == 10
    assert steps_to(curve(3.0, 2.0, 1.0), 0.5) is None
    # the first time counts
    assert steps_to(curve(3.0, 1.0, 2.0, 1.0), 2.0) == pytest.approx(15)


@pytest.mark.slow
def test_a_tiny_study(tmp_path, one_thread, monkeypatch):
    import planted
    from planted_picture import draw
    from planted_runs import QUICK

    from wmtp_worker.training import report

    # the runs' reports take longer than the runs
    monkeypatch.setattr(report, "write_report", lambda records, path: path.touch())
    plan = replace(QUICK, families=("rho1_tokenskip",))
    monkeypatch.setattr(type(plan), "arms", lambda self: [planted.Arm("uniform"), planted.Arm("rho1_tokenskip")])
    document = planted.study(plan, tmp_path, seeds=1, jobs=1)
    uniform, skipping = document["runs"]
    for point in uniform["curve"]:
        assert point["mass"] == pytest.approx(point["share"])
    for point in skipping["curve"]:
        assert sum(point["mass"].values()) == pytest.approx(1)
        assert point["mass"] != pytest.approx(point["share"])
    assert document["arms"]["uniform"]["planted loss less uniform's"] == [0, 0]
    assert document["cost"]["scoring, cpu seconds"]["rho1_tokenskip"] > 0
    draw(document, tmp_path / "planted.png")
    assert (tmp_path / "planted.png").stat().st_size > 10_000
    # what was run is not run again
    monkeypatch.setattr(planted, "carry_out", lambda job: pytest.fail(f"{job.name} is run again"))
    assert planted.study(plan, tmp_path, seeds=1, jobs=1)["runs"] == document["runs"]
