"""What is asked for elsewhere gives the settings that were resolved here, and its secrets stay secrets."""

import io
import json
import shutil
import subprocess
import sys

import pytest

from wmtp_worker.errors import SettingsError
from wmtp_worker.launch import container, detached
from wmtp_worker.launch.request import make_request, without_secrets
from wmtp_worker.settings import load

KEYS = {"AWS_ACCESS_KEY_ID": "AKEYOFNOBODY0000", "AWS_SECRET_ACCESS_KEY": "secret-of-nobody"}
HERE = {"WMTP_ENV_FILE": "/dev/null", "CLOUD_PROVIDER": "s3", "CLOUD_BUCKET": "lab", "WMTP_WORKDIR": "/here/only"}


def request_of(**given):
    environ = HERE | KEYS | given.pop("environ", {})
    return make_request(name=given.pop("name", None), environ=environ, **{"recipe": None, "preset": None, **given})


def region_of(**given):
    return request_of(preset="smoke", **given)[0].variables.get("AWS_REGION")


def there(request):
    """The settings of the host that runs the request, with nothing of its own."""
    options = dict(zip(*[iter(request.arguments)] * 2, strict=True)) if "--set" not in request.arguments else {}
    words, overrides = list(request.arguments), []
    while words:
        name, value, *words = words
        if name == "--set":
            overrides.append(value)
        else:
            options[name] = value
    return load(
        recipe=options["--recipe"],
        preset=options["--preset"],
        overrides=overrides,
        options={"run.name": options["--run-name"], "run.resume": options["--resume"]},
        environ={"WMTP_ENV_FILE": "/dev/null", **request.variables, **request.secrets},
    )


def same(one, other, but=("workdir",)):
    trees = [settings.model_dump(mode="json") for settings in (one, other)]
    for tree in trees:
        for key in but:
            del tree["run"][key]
    return trees[0] == trees[1]


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "smoke"},
        {"preset": "smoke", "recipe": "gradient", "overrides": ["training.lr=1e-5", "tracking.tags=[a=b, c=d]"]},
        {"preset": "smoke", "options": {"run.resume": "never", "run.name": "first"}},
        {"environ": {"WMTP_PRESET": "smoke", "WMTP_TRAINING__LR": "0.25", "CLOUD_PREFIX": "team/x"}},
        {"preset": "smoke", "overrides": ["data.dataset=it's; $HOME `x`", "checkpoint.every=auto"]},
    ],
)
def test_the_same_settings_are_resolved_there(given):
    request, settings = request_of(**given)
    assert same(settings, there(request))


def test_of_a_recipe_in_a_file_all_values_are_sent(tmp_path):
    recipe = tmp_path / "recipe.mine.yaml"
    recipe.write_text("weighting:\n  family: gradient\ntraining:\n  lr: 3.0e-4\n")
    request, settings = request_of(recipe=str(recipe), preset="smoke")
    found = there(request)
    assert found.recipe == "baseline"
    assert found.tracking.experiment == "wmtp/mine"
    assert found.run.name == "mine-smoke"
    trees = [one.model_dump(mode="json", exclude={"recipe"}) for one in (settings, found)]
    for tree in trees:
        del tree["run"]["workdir"], tree["tracking"]["experiment"]
    assert trees[0] == trees[1]


def test_a_setting_that_looks_like_a_secret_is_no_argument():
    key = "AKIAABCDEFGHIJKLMNOP"
    request, settings = request_of(preset="smoke", overrides=[f"tracking.tags=[by={key}]"])
    assert key not in " ".join(request.arguments)
    assert key in request.secrets["WMTP_TRACKING__TAGS"]
    assert same(settings, there(request))
    assert key not in repr(request)


def test_only_what_the_job_needs_is_sent(tmp_path):
    around = {
        "AZURE_STORAGE_KEY": "another-clouds",
        "HOME": "/home/me",
        "HF_TOKEN": "hf_x",
        "MLFLOW_TRACKING_TOKEN": "t",
    }
    request, _ = request_of(preset="smoke", environ=around | {"MY_KEY": "mine", "AWS_REGION": "r"}, passed=["MY_KEY"])
    assert set(request.secrets) == {*KEYS, "HF_TOKEN", "MY_KEY"}
    assert request.variables == {"AWS_REGION": "r"}
    assert set(request_of(preset="smoke", credentials=False)[0].secrets) == set()
    bare = without_secrets(request)
    assert bare.secrets == {}
    assert "HF_TOKEN is not sent: others could read it there" in bare.notes


def test_keys_of_a_profile_and_of_a_file(tmp_path, monkeypatch):
    credentials = tmp_path / "credentials"
    credentials.write_text("[lab]\naws_access_key_id = PROFILEKEY\naws_secret_access_key = profile-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    config = tmp_path / "config"
    config.write_text("[profile lab]\nregion = eu-north-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    for name in (*KEYS, "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    profile = {"AWS_PROFILE": "lab", **dict.fromkeys(KEYS, "")}
    assert request_of(preset="smoke", environ=profile)[0].secrets["AWS_SECRET_ACCESS_KEY"] == "profile-secret"
    assert region_of(environ=profile) == "eu-north-1"  # the host has no such profile
    assert region_of(environ=profile | {"AWS_REGION": "us-west-2"}) == "us-west-2"
    assert region_of(environ=profile, overrides=["cloud.region=us-west-2"]) is None  # --set says it there, too
    with pytest.raises(SettingsError, match="nobody"):
        request_of(preset="smoke", environ=profile | {"AWS_PROFILE": "nobody"})

    key = tmp_path / "key.json"
    key.write_text(json.dumps({"type": "service_account"}))
    google = {"CLOUD_PROVIDER": "gcs", "GOOGLE_APPLICATION_CREDENTIALS": str(key)}
    found = request_of(preset="smoke", environ=google)[0].secrets
    assert found == {"GOOGLE_APPLICATION_CREDENTIALS_JSON": key.read_text()}


def test_a_shell_reads_the_variables_back():
    value = "a b\n'c' \"d\" $HOME `e` \\ ü"
    request, _ = request_of(preset="smoke", environ={"MY_KEY": value}, passed=["MY_KEY"])
    script = 'eval "$(cat)"; printf %s "$MY_KEY"'
    done = subprocess.run(["sh", "-c", script], input=request.exports(), capture_output=True, check=True)
    assert done.stdout.decode() == value


@pytest.mark.parametrize(
    "script",
    [detached._START, detached._STATE, detached._STOP, detached._READ, container._RECEIVE, container._DELIVER],
)
def test_shellcheck_takes_what_runs_elsewhere(script):
    shellcheck = [shutil.which("shellcheck") or "shellcheck", "-s", "dash", "-e", "SC2154,SC2034,SC2016", "-"]
    done = subprocess.run(shellcheck, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("answer", "said"), [("n\n", "nothing was launched"), ("y\n", "there is no docker")])
def test_a_person_at_a_terminal_is_asked(laptop, monkeypatch, answer, said):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    given = ("docker", "wmtp-worker", "--preset", "smoke")
    done = laptop.launch(*given, code=0 if answer == "n\n" else 78, PATH="/nowhere")
    assert "launch it?" in done.stderr
    assert said in done.stdout + done.stderr


def test_the_record_has_the_image_that_was_named_by_its_digest():
    digest = "sha256:" + "0a" * 32
    named = request_of(preset="smoke", image=f"ghcr.io/me/wmtp-worker:1@{digest}")[0].variables
    tagged = request_of(preset="smoke", image="ghcr.io/me/wmtp-worker:1")[0].variables
    assert named == {**tagged, "WMTP_IMAGE_DIGEST": digest}
    assert "WMTP_IMAGE_DIGEST" not in tagged
