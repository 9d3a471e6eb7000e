"""A plan from settings to numbers, and the refusals of what cannot fit."""

import json

import pytest

from wmtp_worker.cli import main
from wmtp_worker.errors import InputError, SettingsError
from wmtp_worker.planning.device import GIB
from wmtp_worker.planning.memory import parts, total
from wmtp_worker.planning.plan import MFU, make_plan

SEVEN_B = 6_738_415_616  # Llama 2 7B, as published


@pytest.fixture
def big(settings, seven):
    def make(*overrides):
        return settings(f"model.path={seven}", *overrides, preset="production", tiny=False)

    return make


def memory(plan, stacked=False):
    return {part.name: part.bytes for part in parts(plan.shape, plan.fit.step, stacked)}


def test_seven_billion_on_eight(big):
    plan = make_plan(big(), "h100-sxm", 8, price=2.0)
    assert plan.shape.total.all == plan.shape.total.trained == SEVEN_B
    assert plan.fit.sharding == "full"
    assert (plan.fit.step.rows, plan.fit.passes, plan.tokens_per_step) == (1, 2, 32_768)
    found = memory(plan)
    assert found["weights"] == 4 * SEVEN_B // 8
    assert found["optimizer moments"] == 8 * SEVEN_B // 8
    # states and their gradients, a chunk's logits and what comes of them, a chunk's gradient of the unembedding
    assert found["one head's loss"] == 6 * 4096 * 2048 + 2 * (32_000 + 4096) * 512 + 2 * 32_000 * 4096
    assert memory(plan, stacked=True)["heads' logits and loss"] == 4 * 12 * 32_000 * 2048
    # 6 P a token, the embedding not multiplied, the unembedding four times instead of once, and attention
    linear = SEVEN_B - 2 * 32_000 * 4096 - (2 * 32 + 1) * 4096
    flops = 6 * (linear + 4 * 32_000 * 4096) + 12 * 32 * 4096 * 2048
    assert plan.times.flops == flops * 32_768 // 8
    assert plan.times.by_flops == pytest.approx(plan.times.flops / 989.4e12)
    assert plan.times.expected[0] == pytest.approx(plan.times.by_flops / MFU[1])
    assert plan.money == pytest.approx(tuple(16.0 * hours for hours in plan.hours))
    assert plan.saves.bytes == pytest.approx(12 * SEVEN_B, rel=1e-4)


def test_the_suggested_batch_is_the_largest_that_fits(big):
    plan = make_plan(big("training.accumulation=64"), "h100-sxm", 8)
    best = plan.suggested.step
    assert best.rows * plan.suggested.passes == 8
    assert total(parts(plan.shape, best)) <= plan.device.memory * 0.92
    from dataclasses import replace

    assert best.rows == 8 or total(parts(plan.shape, replace(best, rows=best.rows * 2))) > plan.device.memory * 0.92


def test_what_does_not_fit_says_what_would(big):
    with pytest.raises(SettingsError) as caught:
        make_plan(big(), "h100-sxm", 1)
    error = caught.value
    assert error.exit_code == 78
    assert "one row of 2048 tokens needs 12" in error.what
    assert "--gpus 2" in error.fix
    assert "h200, b200" in error.fix
    assert "lora.rank=16" in error.fix
    make_plan(big(), "h100-sxm", 2)
    make_plan(big(), "h200", 1)
    assert make_plan(big("lora.rank=16"), "h100-sxm", 1).shape.lora


def test_adapters_are_not_proposed_where_they_do_not_help(big):
    with pytest.raises(SettingsError) as caught:
        make_plan(big(), "l4", 1)
    assert "lora" not in caught.value.fix


def test_too_large_a_batch_is_answered_with_one_that_fits_and_makes_the_same_step(big):
    with pytest.raises(SettingsError) as caught:
        make_plan(big("training.micro_batch_size=64", "training.accumulation=1"), "h100-sxm", 2)
    assert caught.value.where == "--set training.micro_batch_size=64"
    found = dict(part.split("=") for part in caught.value.fix.replace(",", "").split() if "=" in part)
    rows, passes = (int(found[f"training.{key}"]) for key in ("micro_batch_size", "accumulation"))
    assert rows * passes == 64
    make_plan(big(f"training.micro_batch_size={rows}", f"training.accumulation={passes}"), "h100-sxm", 2)


def test_rows_must_be_shared_out_evenly(big):
    with pytest.raises(SettingsError, match=r"16 rows of a step.*6 GPUs.*training.accumulation=18"):
        make_plan(big(), "h100-sxm", 6)


def test_a_small_model_is_copied_and_not_sharded(settings):
    plan = make_plan(settings("training.accumulation=4"), "h100-sxm", 4)
    assert plan.fit.sharding == "replicated"
    assert plan.least_devices == 1
    assert plan.times.link_bytes == 2 * 4 * plan.shape.total.trained * 3 // 4


def test_money_of_a_whole_machine(settings):
    plan = make_plan(settings("host.price_per_hour=3", "training.accumulation=2"), "h100-sxm", 2)
    assert plan.money == pytest.approx(tuple(3.0 * hours for hours in plan.hours))
    assert make_plan(settings(), "h100-sxm", 1).money is None


def test_the_interval_between_saves_needs_a_rate(big):
    assert make_plan(big(), "h100-sxm", 8).saves.interval is None
    plan = make_plan(big("checkpoint.interruptions_per_day=2"), "h100-sxm", 8)
    assert "an interruption every 12.0 h" in plan.saves.interval


def test_a_model_that_is_not_there(settings):
    with pytest.raises(InputError, match=r"config.json alone will do"):
        make_plan(settings("model.path=nowhere", tiny=False), "h100-sxm", 1)


def test_sequences_longer_than_the_model(big):
    with pytest.raises(InputError, match="longer than the model's 4096 positions"):
        make_plan(big("data.sequence_length=5000"), "h100-sxm", 8)


def test_several_cpus(settings):
    with pytest.raises(SettingsError, match="--gpus 2"):
        make_plan(settings(), "cpu", 2)


def test_this_machine(settings, one_thread):
    plan = make_plan(settings(), "cpu", 1)
    assert plan.times.expected[0] == plan.times.expected[1] > plan.times.by_flops > 0
    assert "process" in memory(plan)


class TestCommand:
    """`wmtp plan` as people and machines see it."""

    @pytest.fixture(autouse=True)
    def _in(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def run(self, capsys, seven, *more):
        code = main(["plan", "--preset", "production", "--set", f"model.path={seven}", *more])
        return code, *capsys.readouterr()

    def test_json_has_what_it_promises(self, capsys, seven):
        code, out, _ = self.run(capsys, seven, "--gpu", "h100-sxm", "--gpus", "8", "--price", "2", "--json")
        assert code == 0
        found = json.loads(out)
        assert {key: set(value) for key, value in found.items() if isinstance(value, dict)} == JSON
        assert found["memory"]["total"] == sum(part["bytes"] for part in found["memory"]["parts"])
        assert all(set(part) == {"name", "bytes", "formula"} for part in found["memory"]["parts"])
        assert found["memory"]["total"] < 80 * GIB
        assert found["run"]["money"][0] < found["run"]["money"][1]

    def test_people_read_a_table(self, capsys, seven):
        code, out, _ = self.run(capsys, seven, "--gpu", "h100-sxm", "--gpus", "8")
        assert code == 0
        for text in ("stacked logits", "6.738 B parameters", "MFU 20% to 40%, assumed", "NVLink 4", "nvidia.com"):
            assert text in out
        assert "\x1b" not in out
        assert "money" not in out  # nobody said what it costs

    def test_one_error_and_78(self, capsys, seven):
        code, out, err = self.run(capsys, seven, "--gpu", "rtx-4090")
        assert (code, out) == (78, "")
        assert len(err.strip().splitlines()) == 1
        assert err.startswith("error: one row of 2048 tokens needs ")


JSON = {
    "model": {
        *("parameters", "trained", "layers", "heads", "hidden_size", "intermediate_size", "attention_heads"),
        *("vocabulary", "tied"),
    },
    "device": {
        *("key", "name", "count", "memory", "usable", "flops", "bandwidth", "link", "link_name", "source", "peak"),
    },
    "step": {"tokens", "sequence_length", "precision", "micro_batch_size", "accumulation", "sharding"},
    "memory": {"parts", "total", "stacked", "trunk_if_recomputed"},
    "time": {
        *("flops", "bytes", "link_bytes", "by_flops", "by_bandwidth", "by_link", "expected", "basis"),
        "tokens_per_second",
    },
    "run": {"steps", "tokens", "hours", "money"},
    "checkpoint": {
        *("bytes", "frozen_bytes", "export_bytes", "host_memory", "copy_seconds", "write_seconds"),
        *("pause_seconds", "interval"),
    },
    "suggestion": {"micro_batch_size", "accumulation", "sharding", "least_devices"},
}
