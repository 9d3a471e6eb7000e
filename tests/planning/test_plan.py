"""A plan from settings to numbers, and the refusals of what cannot fit."""

import json
import re

import pytest

from wmtp_worker.cli import main
from wmtp_worker.errors import InputError, SettingsError
from wmtp_worker.planning.device import GIB
from wmtp_worker.planning.fit import suggest
from wmtp_worker.planning.memory import parts, total
from wmtp_worker.planning.plan import MFU, make_plan

SEVEN_B = 6_738_415_616  # Llama 2 7B, as published
LAYER = 4 * 4096 * 4096 + 3 * 4096 * 11008  # its matrices


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


@pytest.mark.parametrize("family", ["uniform", "critic", "rho1_weighted", "rho1_tokenskip", "gradient", "grpo"])
def test_weights_that_follow_from_losses_take_a_second_pass_over_the_logits(big, family):
    """Where the training makes one: 8 and not 6 a parameter of the unembedding, of the tokens that have a weight."""

    more = {
        "critic": ("weighting.critic.value=elsewhere", "run.stage=policy"),
        "grpo": ("weighting.grpo.kl=0.1", "data.solutions=all", "weighting.reference=reference"),
        "rho1_weighted": ("weighting.reference=reference",),
        "rho1_tokenskip": ("weighting.reference=reference", "weighting.rho1.share=0.5", "weighting.normalise=mean1"),
    }
    settings = big(f"weighting.family={family}", *more.get(family, ()))
    looked_at = make_plan(settings, "h100-sxm", 8).fit.step.looked_at
    assert (looked_at is not None) == settings.weighting.looks_at_losses
    each = 4 + 4 * looked_at if looked_at else 6
    assert looked_at in (None, 0.5 if family == "rho1_tokenskip" else 1.0)
    linear = SEVEN_B - 2 * 32_000 * 4096 - (2 * 32 + 1) * 4096
    flops = 6 * linear + each * 4 * 32_000 * 4096 + 12 * 32 * 4096 * 2048
    assert make_plan(settings, "h100-sxm", 8).times.flops == flops * 32_768 // 8


def test_the_suggested_batch_is_the_largest_that_fits(big):
    plan = make_plan(big("training.accumulation=64"), "h100-sxm", 8)
    best = plan.suggested.step
    assert best.rows * plan.suggested.passes == 8
    assert total(parts(plan.shape, best)) <= plan.device.memory * 0.92
    from dataclasses import replace

    assert best.rows == 8 or total(parts(plan.shape, replace(best, rows=best.rows * 2))) > plan.device.memory * 0.92


def test_the_sharding_that_is_suggested_leaves_room_for_the_largest_batch(big, settings, seven):
    config = seven / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 11}))
    copied = ("parallel.shards=1", "training.accumulation=128")
    plan = make_plan(big(*copied), "h100-sxm", 8)
    assert plan.fit.sharding == "replicated"
    assert (plan.suggested.sharding, plan.suggested.step.shards) == ("full", 8)
    alone = suggest(plan.shape, plan.fit.step, plan.fit.step.rows * plan.fit.passes, plan.device)
    assert plan.suggested.step.rows > alone.step.rows
    # where copies take as many rows, there is nothing to send for
    assert make_plan(settings("training.accumulation=8"), "h100-sxm", 8).suggested.sharding == "replicated"
    # more than one machine: as many rows with a copy on each
    two = make_plan(big("training.accumulation=64"), "h100-sxm", 16).suggested
    assert (two.sharding, two.step.shards, two.step.copies) == ("hybrid", 8, 2)


@pytest.mark.parametrize(("inside", "sharding"), [(11008, "replicated"), (11456, "full")], ids=["57.9 %", "59.3 %"])
def test_copies_of_nearly_60_percent_of_a_sheets_memory_are_more_than_60_of_what_is_reported(
    big, seven, inside, sharding
):
    config = seven / "config.json"
    shape = json.loads(config.read_text()) | {"num_hidden_layers": 8, "intermediate_size": inside}
    config.write_text(json.dumps(shape))
    plan = make_plan(big(), "h100-sxm", 8)
    assert plan.fit.sharding == sharding
    assert 20 * plan.shape.total.all < 0.6 * 80 * GIB


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
        make_plan(big("training.micro_batch_size=32", "training.accumulation=2"), "h100-sxm", 2)
    assert caught.value.where == "--set training.micro_batch_size=32"
    found = dict(part.split("=") for part in caught.value.fix.replace(",", "").split() if "=" in part)
    rows, passes = (int(found[f"training.{key}"]) for key in ("micro_batch_size", "accumulation"))
    assert rows * passes == 64
    make_plan(big(f"training.micro_batch_size={rows}", f"training.accumulation={passes}"), "h100-sxm", 2)


@pytest.mark.parametrize(
    ("rows", "passes", "gpus", "enough"), [(1, 16, 6, 18), (8, 2, 8, 8)], ids=["16 on 6", "2 of 8 rows on 8"]
)
def test_what_the_trainer_would_refuse_is_refused(big, rows, passes, gpus, enough):
    wanted = rf"accumulation={passes} .* cannot be shared by {gpus} processes.*training.accumulation={enough},"
    with pytest.raises(SettingsError, match=wanted):
        make_plan(big(f"training.micro_batch_size={rows}", f"training.accumulation={passes}"), "h100-sxm", gpus)
    with pytest.raises(SettingsError, match="8 processes cannot hold copies of 3 shards each"):
        make_plan(big("parallel.shards=3"), "h100-sxm", 8)


def test_shards_are_those_of_the_trainer(big, seven):
    plan = make_plan(big("parallel.shards=4"), "h100-sxm", 8)
    assert (plan.fit.sharding, plan.fit.step.shards, plan.fit.step.copies, plan.fit.devices) == ("hybrid", 4, 2, 8)
    assert memory(plan)["weights"] == 4 * SEVEN_B // 4
    # copies of 3.1 B would fit, but take more than the trainer's 60 % of a GPU
    config = seven / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 11}))
    assert make_plan(big(), "h100-sxm", 8).fit.sharding == "full"
    assert make_plan(big("parallel.shards=1"), "h100-sxm", 8).fit.sharding == "replicated"


def test_recomputing_is_proposed_where_it_is_enough(big):
    wanted = r"-> set training.checkpoint_activations=full; or shard it over 3 or more \(--gpus 4\)"
    with pytest.raises(SettingsError, match=wanted):
        make_plan(big("data.sequence_length=4096"), "h100-sxm", 2)
    make_plan(big("data.sequence_length=4096", "training.checkpoint_activations=full"), "h100-sxm", 2)


def test_a_small_model_is_copied_and_not_sharded(settings):
    plan = make_plan(settings("training.accumulation=4"), "h100-sxm", 4)
    assert plan.fit.sharding == "replicated"
    assert plan.least_devices == 1
    assert plan.times.link_bytes == 2 * 4 * plan.shape.total.trained * 3 // 4
    assert memory(plan)["gradients on their way"] == 4 * plan.shape.total.trained


def test_more_than_a_machine_has_is_no_figure_of_its_link(big):
    assert not any("network" in note for note in make_plan(big(), "h100-sxm", 8).notes)
    assert any("16 GPUs" in note and "network" in note for note in make_plan(big(), "h100-sxm", 16).notes)


def test_the_formula_of_the_loss_is_all_of_it(big):
    plan = make_plan(big(), "h100-sxm", 8)
    loss = next(part for part in parts(plan.shape, plan.fit.step) if part.name == "one head's loss")
    assert eval(re.sub(r"[,a-z]", "", loss.formula.replace("B", "").replace("×", "*"))) == loss.bytes


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


VALUES = ("weighting.family=critic", "value.lora_rank=0", "value.max_steps=5000")


def test_a_value_model_that_is_trained_first_is_planned_too(big):
    """All layers of head 1 and no unembedding; of each pair two rows."""
    plan, alone = (
        make_plan(big(*VALUES, f"run.stage={stage}"), "h100-sxm", 8, price=2.0) for stage in ("all", "value")
    )
    first = plan.first
    assert first.to_json() == alone.to_json()
    layers, head = SEVEN_B - 2 * 32_000 * 4096 - (2 * 32 + 1) * 4096 - 3 * LAYER, 4096 * 256 + 256
    assert first.shape.total.all == layers + (2 * 29 + 1) * 4096 + 32_000 * 4096 + head + 256 + 1
    assert (first.shape.layers, first.shape.heads, first.steps) == (29, 0, 5000)
    assert first.tokens_per_step == 2 * plan.tokens_per_step
    assert first.times.flops == (6 * (layers + head) + 12 * 29 * 4096 * 2048) * first.tokens_per_step // 8
    expected = (
        first.steps * a + plan.steps * b for a, b in zip(first.times.expected, plan.times.expected, strict=True)
    )
    assert plan.hours == pytest.approx(tuple(seconds / 3600 for seconds in expected))
    assert plan.money == pytest.approx(tuple(16.0 * hours for hours in plan.hours))
    assert any("value model is in the hours" in note for note in plan.notes)
    assert make_plan(big(*VALUES, "weighting.critic.value=elsewhere"), "h100-sxm", 8).first is None


def test_one_side_where_values_are_regressed_and_no_backward_under_a_frozen_trunk(big):
    regressed = make_plan(big(*VALUES, "run.stage=value", "value.objective=lambda_return"), "h100-sxm", 8)
    assert regressed.tokens_per_step == 32_768
    frozen = make_plan(big(*VALUES, "run.stage=value", "value.trunk_head=true"), "h100-sxm", 1)
    assert frozen.times.flops < 0.4 * 28 / 29 * regressed.times.flops * 2 * 8
    assert "trunk activations" not in memory(frozen)


def test_a_value_model_that_does_not_fit_is_told_before_the_policy_is_planned(big):
    with pytest.raises(SettingsError, match=r"2 rows of 2048 tokens of the value model need .*value\.lora_rank=16"):
        make_plan(big(*VALUES, "lora.rank=16"), "h100-sxm", 1)
    make_plan(big("weighting.family=critic", "lora.rank=16"), "h100-sxm", 1)  # the preset's adapters
    with pytest.raises(
        SettingsError, match=r"64 rows .* set value\.micro_batch_size=\d+, which makes smaller"
    ) as caught:
        make_plan(big(*VALUES, "value.micro_batch_size=32"), "h100-sxm", 8)
    assert caught.value.where == "--set value.micro_batch_size=32"


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
        assert found["value_model"] is None
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
    "step": {"tokens", "sequence_length", "precision", "micro_batch_size", "accumulation", "sharding", "shards"},
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
    "suggestion": {"micro_batch_size", "accumulation", "sharding", "shards", "least_devices"},
}
