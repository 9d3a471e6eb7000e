"""Variables, .env and secrets from files."""

import pytest

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings import load
from wmtp_worker.settings.environment import SETTING_VARIABLES, variable
from wmtp_worker.settings.schema import SETTABLE
from wmtp_worker.settings.secrets import SECRET_VARIABLES

S3 = {"CLOUD_PROVIDER": "s3", "CLOUD_BUCKET": "b"}


def refusal(**environ):
    with pytest.raises(SettingsError) as caught:
        load(environ=environ)
    return str(caught.value)


@pytest.mark.parametrize("key", SETTABLE)
def test_every_setting_can_be_set_by_its_variable(key):
    default = load(environ={})
    value = default.flat()[key]
    settings = load(environ={variable(key): "null" if value in (None, "") else str(value)})
    assert settings.flat() == default.flat()
    assert settings.sources[key] == f"variable {variable(key)}"


def test_no_two_settings_share_a_variable():
    assert len({variable(key) for key in SETTABLE}) == len(SETTABLE)
    assert set(SETTING_VARIABLES.values()) == set(SETTABLE)


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"WMTP_TRAINING__LRR": "1"},
            "unknown variable WMTP_TRAINING__LRR (from variable WMTP_TRAINING__LRR) -> did you mean WMTP_TRAINING__LR?",
        ),
        ({"WMTP_WORK_DIR": "/x"}, "did you mean WMTP_WORKDIR?"),
        ({"WMTP_ZZZZZZZZZZZZZZZ": ""}, "unset it; docs/settings.md lists every variable"),
        ({"WMTP_TRAINING__LR": "fast"}, "training.lr='fast' is not a number (from variable WMTP_TRAINING__LR)"),
        (
            {"WMTP_WORKDIR": "/a", "WMTP_RUN__WORKDIR": "/b"},
            "WMTP_WORKDIR and WMTP_RUN__WORKDIR both set run.workdir, to different values",
        ),
        (
            {"CLOUD_BUCKET": "b"},
            "cloud.bucket='b' is set, but not which provider has it (from variable CLOUD_BUCKET) "
            "-> set CLOUD_PROVIDER to s3, gcs or azure; local for a folder",
        ),
        ({"CLOUD_PROVIDER": "gcs"}, "needs a bucket -> set CLOUD_BUCKET, or CLOUD_PROVIDER=local"),
        (
            {"CLOUD_PROVIDER": "s3", "CLOUD_BUCKET": "s3://b/p/q"},
            "set CLOUD_PROVIDER=s3 CLOUD_BUCKET=b CLOUD_PREFIX=p/q",
        ),
        ({"CLOUD_PROVIDER": "s3", "CLOUD_BUCKET": "b", "CLOUD_PREFIX": "a/../b"}, "has an empty, '.' or '..' part"),
        (
            {**S3, "CLOUD_ENDPOINT_URL": "http://minio.example:9000"},
            "is without TLS (from variable CLOUD_ENDPOINT_URL)",
        ),
        ({**S3, "CLOUD_ENDPOINT_URL": "minio:9000"}, "is no address"),
        ({**S3, "CLOUD_ENDPOINT_URL": "https://h:x"}, "is no address"),
        ({**S3, "CLOUD_ENDPOINT_URL": "https://u:p@h"}, "has credentials in it"),
        ({**S3, "WMTP_CLOUD__KMS_KEY": "k"}, "cloud.kms_key needs cloud.sse=aws:kms"),
        ({"CLOUD_PROVIDER": "gcs", "CLOUD_BUCKET": "b", "WMTP_CLOUD__SSE": "AES256"}, "cloud.sse has no effect"),
        ({**S3, "BUCKET_NAME": "c"}, "both set cloud.bucket, to different values"),
        ({"CLOUD_PROVIDOR": "s3"}, "unknown variable CLOUD_PROVIDOR (from variable CLOUD_PROVIDOR)"),
        (
            {"WMTP_ENV_FILE": "/nowhere/.env"},
            "/nowhere/.env cannot be read: No such file or directory (from WMTP_ENV_FILE)",
        ),
        ({"WMTP_ENV_FILE": "/"}, "/ cannot be read: Is a directory"),
    ],
)
def test_variables_that_are_refused(environ, line):
    assert line in refusal(**environ)


@pytest.mark.parametrize("name", ["CLOUD_BUCKET", "S3_BUCKET_NAME", "BUCKET_NAME"])
def test_every_name_of_the_bucket(name):
    assert load(environ={"CLOUD_PROVIDER": "s3", name: "b"}).cloud.bucket == "b"
    # one that other tools use means nothing where no provider is chosen
    if name != "CLOUD_BUCKET":
        assert load(environ={name: "b"}).cloud.bucket is None


@pytest.mark.parametrize("url", ["http://localhost:9000", "http://127.0.0.1:1", "http://[::1]:1", "https://r2.example"])
def test_endpoints_that_are_fine(url):
    assert load(environ={**S3, "CLOUD_ENDPOINT_URL": url}).cloud.endpoint_url == url


def test_plain_http_can_be_allowed():
    environ = {**S3, "CLOUD_ENDPOINT_URL": "http://minio:9000", "WMTP_CLOUD__ALLOW_HTTP": "true"}
    assert load(environ=environ).cloud.allow_http


def test_a_prefix_is_a_plain_path():
    assert load(environ={**S3, "CLOUD_PREFIX": "/team/project/"}).cloud.prefix == "team/project"


def test_variables_of_others_are_left_alone():
    assert (
        load(environ={"CLOUD_ML_REGION": "x", "CLOUDSDK_CONFIG": "y", "PATH": "/bin"}).flat() == load(environ={}).flat()
    )


def test_both_names_of_a_setting_may_agree():
    assert load(environ={"WMTP_RUN_NAME": "a", "WMTP_RUN__NAME": "a"}).run.name == "a"


def test_env_file_of_the_users_choice(elsewhere):
    (elsewhere / ".env").write_text("WMTP_RUN_NAME=here\n")
    (elsewhere / "other").write_text("export WMTP_RUN_NAME='there'  # why not\n")
    assert load(environ={}).run.name == "here"
    settings = load(environ={"WMTP_ENV_FILE": "other"})
    assert settings.run.name == "there"
    assert settings.sources["run.name"] == "other:1 WMTP_RUN_NAME"


def test_env_file_passes_on_what_is_not_ours_unless_it_is_set(elsewhere):
    (elsewhere / ".env").write_text("AWS_REGION=eu-west-1\nHF_HOME=/from/file\nWMTP_RUN_NAME=a\nPRICE=${HOME}$5\n")
    environ = {"HF_HOME": "/from/environment"}
    load(environ=environ)
    assert environ == {"AWS_REGION": "eu-west-1", "HF_HOME": "/from/environment", "PRICE": "${HOME}$5"}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("A=1\nthis is no assignment\n", "a line that is no NAME=value (from .env:2)"),
        ("A=1\n\n# fine\nWMTP_RUN_NAME\n", "a line that is no NAME=value (from .env:4)"),
        (
            "WMTP_RUN_NAMES=x\n",
            "unknown variable WMTP_RUN_NAMES (from .env:1 WMTP_RUN_NAMES) -> did you mean WMTP_RUN_NAME?",
        ),
        ("\nWMTP_TRAINING__LR=x\n", "training.lr='x' is not a number (from .env:2 WMTP_TRAINING__LR)"),
        ("CLOUD_BUCKET=b\n", "cloud.bucket='b' is set, but not which provider has it (from .env:1 CLOUD_BUCKET)"),
        ("AWS_REGION=a\0b\n", ".env cannot be read: it is not UTF-8 text"),
    ],
)
def test_an_env_file_that_is_wrong(elsewhere, content, line):
    (elsewhere / ".env").write_text(content)
    assert line in refusal()


@pytest.mark.parametrize("name", SECRET_VARIABLES)
@pytest.mark.parametrize(
    ("content", "value"), [("s3cr3t\n", "s3cr3t"), ("s3cr3t\r\n", "s3cr3t"), (" a b \n\n", " a b \n")]
)
def test_a_secret_from_a_file(elsewhere, name, content, value):
    (elsewhere / "secret").write_bytes(content.encode())
    environ = {f"{name}_FILE": str(elsewhere / "secret")}
    load(environ=environ)
    assert environ[name] == value
    load(environ=environ)  # a second time in the same process, or in a child


def test_a_secret_file_named_in_env_file(elsewhere):
    (elsewhere / "secret").write_text("s3cr3t\n")
    (elsewhere / ".env").write_text("HF_TOKEN_FILE=secret\n")
    environ = {}
    load(environ=environ)
    assert environ["HF_TOKEN"] == "s3cr3t"


def test_a_secret_both_ways(elsewhere):
    (elsewhere / "secret").write_text("from-the-file\n")
    text = refusal(HF_TOKEN="from-the-variable", HF_TOKEN_FILE=str(elsewhere / "secret"))
    assert text == "both HF_TOKEN and HF_TOKEN_FILE are set (from the environment) -> keep only one of them"


def test_secret_files_that_are_wrong(elsewhere):
    (elsewhere / "empty").write_text("\n")
    (elsewhere / "binary").write_bytes(b"\xff\xfe")
    assert "cannot be read: No such file" in refusal(HF_TOKEN_FILE="/nowhere")
    assert "cannot be read: Is a directory" in refusal(HF_TOKEN_FILE="/")
    assert "is an empty file" in refusal(HF_TOKEN_FILE=str(elsewhere / "empty"))
    assert "it is not UTF-8 text" in refusal(HF_TOKEN_FILE=str(elsewhere / "binary"))
    (elsewhere / "binary").write_bytes(b"a\0b")  # no variable may hold it
    assert "it is not UTF-8 text" in refusal(HF_TOKEN_FILE=str(elsewhere / "binary"))
