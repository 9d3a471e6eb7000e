"""Which layer wins, what a value may look like, and where it says it came from."""

import itertools

import pytest
import yaml

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings import Settings, load
from wmtp_worker.settings.files import configs, names, read
from wmtp_worker.settings.schema import FIELDS, SETTABLE

KEY = "training.weight_decay"


def write(path, values):
    tree = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[leaf] = value
    path.write_text(yaml.safe_dump(tree))
    return str(path)


# every layer above the defaults, lowest first: how to give KEY a value there
LAYERS = ["preset", "recipe", ".env", "environment", "--set"]


def load_with(directory, values):
    arguments = {"environ": {}, "preset": "smoke"}
    for layer in ("preset", "recipe"):
        if layer in values:
            arguments[layer] = write(directory / f"{layer}.mine.yaml", {KEY: values[layer]})
    if ".env" in values:
        (directory / ".env").write_text(f"WMTP_TRAINING__WEIGHT_DECAY={values['.env']}\n")
    if "environment" in values:
        arguments["environ"]["WMTP_TRAINING__WEIGHT_DECAY"] = str(values["environment"])
    if "--set" in values:
        arguments["overrides"] = [f"{KEY}={values['--set']}"]
    return load(**arguments)


@pytest.mark.parametrize(("lower", "higher"), list(itertools.combinations(LAYERS, 2)))
def test_the_later_layer_wins(elsewhere, lower, higher):
    settings = load_with(elsewhere, {lower: 0.25, higher: 0.75})
    assert settings.training.weight_decay == 0.75


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("preset", "preset.mine.yaml:2"),
        ("recipe", "recipe.mine.yaml:2"),
        (".env", ".env:1 WMTP_TRAINING__WEIGHT_DECAY"),
        ("environment", "variable WMTP_TRAINING__WEIGHT_DECAY"),
        ("--set", "--set training.weight_decay=0.5"),
    ],
)
def test_every_layer_beats_the_defaults_and_is_named_as_source(elsewhere, layer, source):
    settings = load_with(elsewhere, {layer: 0.5})
    assert settings.training.weight_decay == 0.5
    assert settings.sources[KEY] == source


def test_every_setting_has_a_default_and_every_value_a_source():
    assert set(read(configs() / "defaults.yaml", [])) == set(SETTABLE)
    settings = load(environ={})
    assert set(settings.sources) == set(settings.flat()) == set(FIELDS)


# what a recipe cannot know
NEEDED = {
    "rho1_weighted": ["weighting.reference=/model"],
    "rho1_tokenskip": ["weighting.reference=/model"],
}


@pytest.mark.parametrize("preset", names("preset"))
@pytest.mark.parametrize("recipe", names("recipe"))
def test_everything_in_configs_loads(preset, recipe):
    settings = load(preset=preset, recipe=recipe, overrides=NEEDED.get(recipe, []), environ={})
    assert (settings.preset, settings.recipe) == (preset, recipe)
    assert settings.run.name == f"{recipe}-{preset}"


@pytest.mark.parametrize("recipe", NEEDED)
def test_a_recipe_says_what_it_needs(recipe):
    what = NEEDED[recipe][0].partition("=")[0]
    with pytest.raises(SettingsError, match=f"weighting.family=.* needs a .* model -> set {what}"):
        load(recipe=recipe, environ={})


def test_the_last_set_of_a_key_wins():
    settings = load(overrides=["training.lr=1e-2", "training.lr=1e-5"], environ={})
    assert settings.training.lr == 1e-5


def test_preset_comes_from_the_option_then_the_environment_then_env_file(elsewhere):
    (elsewhere / ".env").write_text("WMTP_PRESET=production\n")
    assert load(environ={}).preset == "production"
    assert load(environ={"WMTP_PRESET": "smoke"}).preset == "smoke"
    assert load(environ={"WMTP_PRESET": "smoke"}, preset="local-light").preset == "local-light"


def test_short_variables(elsewhere):
    environ = {"WMTP_WORKDIR": "here", "WMTP_RUN_NAME": "first", "WMTP_RESUME": "12", "CLOUD_PROVIDER": "local"}
    settings = load(environ=environ)
    assert settings.run.workdir == elsewhere / "here"
    assert (settings.run.name, settings.run.resume, settings.cloud.provider) == ("first", 12, "local")
    assert settings.sources["run.workdir"] == "variable WMTP_WORKDIR"


def test_dedicated_options_are_parsed_like_set_and_none_is_not_given():
    settings = load(options={"run.resume": "7", "run.name": None}, preset="smoke", environ={})
    assert settings.run.resume == 7
    assert settings.run.name == "baseline-smoke"
    assert settings.sources["run.resume"] == "--resume 7"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.lr=1e-4", 1e-4),
        ("training.lr=1E-4", 1e-4),
        ("training.lr=.5", 0.5),
        ("training.lr=1", 1.0),
        ("training.max_steps=1_000", 1000),
        ("data.packing=false", False),
        ("model.path=null", None),
        ("model.path=", None),
        ("model.path=7", "7"),
        ("run.name=2026-01-01", "2026-01-01"),
        ("run.name=1e5", "1e5"),
        ("run.name=null", "baseline-local-light"),
        ("run.resume=auto", "auto"),
        ("run.resume=0", 0),
        ("run.accept_changes=[training.lr, training.eps]", ["training.lr", "training.eps"]),
        ("run.accept_changes=training.lr, training.eps", ["training.lr", "training.eps"]),
        ("run.accept_changes=", []),
        ("data.dataset=a=b", "a=b"),
    ],
)
def test_values_as_people_write_them(override, value):
    key = override.partition("=")[0]
    found = load(overrides=[override], environ={}).flat()[key]
    assert found == value
    assert type(found) is type(value)


def test_text_in_yaml_needs_no_quotes(elsewhere):
    (elsewhere / "mine.yaml").write_text("run: {name: 2026-01-01}\ntraining:\n  lr: 1e-4\nmodel:\n")
    settings = load(preset="mine.yaml", environ={})
    assert (settings.run.name, settings.training.lr) == ("2026-01-01", 1e-4)


def test_an_empty_variable_is_not_set():
    environ = {"WMTP_RUN_NAME": "", "WMTP_TRAINING__LR": " ", "WMTP_PRESET": "", "HF_TOKEN_FILE": ""}
    assert load(environ=environ).flat() == load(environ={}).flat()


def test_null_in_a_variable_undoes_a_preset():
    environ = {"WMTP_MODEL__PATH": "null", "WMTP_DATA__SEQUENCE_LENGTH": "512"}
    assert load(preset="production", environ=environ).model.path is None


def test_the_home_directory_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load(overrides=["run.workdir=~/runs"], environ={}).run.workdir == tmp_path / "home/runs"


def test_settings_cannot_be_changed():
    settings = load(environ={})
    with pytest.raises(ValueError, match="frozen"):
        settings.training.lr = 1.0
    assert isinstance(settings, Settings)
