"""The environment and `.env`: which variables there are, and the settings they carry."""

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from dotenv.parser import parse_stream

from wmtp_worker.settings.files import display
from wmtp_worker.settings.schema import SETTABLE
from wmtp_worker.settings.values import Given, Problem, nearest, parse, plain

# short names of settings that are set all the time
SHORT: Mapping[str, str] = MappingProxyType(
    {
        "WMTP_WORKDIR": "run.workdir",
        "WMTP_RUN_NAME": "run.name",
        "WMTP_RESUME": "run.resume",
        "CLOUD_PROVIDER": "cloud.provider",
        "CLOUD_BUCKET": "cloud.bucket",
        "CLOUD_PREFIX": "cloud.prefix",
        "CLOUD_ENDPOINT_URL": "cloud.endpoint_url",
        "MLFLOW_TRACKING_URI": "tracking.uri",
        "MLFLOW_EXPERIMENT_NAME": "tracking.experiment",
        "S3_BUCKET_NAME": "cloud.bucket",
        "BUCKET_NAME": "cloud.bucket",
    }
)
# what other tools call the bucket: none of our business where runs are kept locally
BORROWED = ("S3_BUCKET_NAME", " BUCKET_NAME")
# what is not a setting of a run, but known all the same
OTHER: Mapping[str, str] = MappingProxyType(
    {
        "WMTP_RECIPE": "recipe, by name or path, unless --recipe is given (baseline)",
        "WMTP_PRESET": "preset, by name or path, unless --preset is given (local-light)",
        "WMTP_ENV_FILE": "file to read instead of ./.env",
        "WMTP_VENV": "where start.sh and test.sh keep their Python environment (.venv at the root)",
        "WMTP_IMAGE": "set to 1 by the image: use its Python and make no environment",
        "WMTP_IMAGE_DIGEST": "digest of the image that runs, for the record of a run",
        "WMTP_GIT_COMMIT": "commit of the worker that runs, for the record of a run (found out in a checkout)",
        "WMTP_STOP_GRACE_SECONDS": "seconds from SIGTERM to SIGKILL on this host (not known: a full save is tried)",
        "WMTP_RESTART": "whether start.sh starts a worker again that ended with 74 or 75, or was killed: always, "
        "never, or auto: unless the image's entrypoint runs it (auto)",
        "WMTP_RESTART_LIMIT": "how often start.sh starts again at most in WMTP_RESTART_WINDOW (10)",
        "WMTP_RESTART_WINDOW": "seconds in which restarts are counted (3600)",
        "WMTP_WHEN_DONE": "what start.sh does with a rented machine after exit code 0: nothing, stop, destroy",
        "WMTP_WHEN_IDLE": "and after any other end, when it starts nothing again: nothing, stop",
        "WMTP_DOCTOR": "whether start.sh has `wmtp doctor` look at the machine before the first worker, and starts "
        "nothing on a rented one that fails: quick, never (quick)",
        "WMTP_BASE_IMAGE": "base image of the container tests",
        "WMTP_REQUIRE_CONTAINERS": "1 makes the container tests fail, not skip, where there is no Docker engine",
        "WMTP_KILLS": "how often the kill tests kill a worker (60)",
        "WMTP_KILLS_SEED": "by which seed they choose where (1)",
        "WMTP_KILLS_UNTIL": "Unix time after which they begin no more chains of kills (no limit)",
        "WMTP_TEST_DATA": "folder that holds mbpp/mbpp.jsonl, for the tests and benchmarks on real data",
        "WMTP_TEST_COMPILE": "1 runs the test of compiled layers, which takes minutes, too",
        "WMTP_TEST_MACHINES": "1 runs the test of two torchrun agents, which starts torch seven times, too",
    }
)


def variable(key: str) -> str:
    """The environment variable of a setting: training.lr is WMTP_TRAINING__LR."""
    return "WMTP_" + key.upper().replace(".", "__")


SETTING_VARIABLES: Mapping[str, str] = MappingProxyType({variable(key): key for key in SETTABLE} | dict(SHORT))
KNOWN: tuple[str, ...] = (*SETTING_VARIABLES, *OTHER)


def read_env_file(environ: Mapping[str, str], problems: list[Problem]) -> dict[str, tuple[str, str]]:
    """Variable to (value, `file:line`) of $WMTP_ENV_FILE, or of ./.env if there is one."""
    named = environ.get("WMTP_ENV_FILE")
    path = Path(os.path.expanduser(named)) if named else Path(".env")
    if not named and not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            bindings = list(parse_stream(io.StringIO(plain(file.read()))))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        where = "WMTP_ENV_FILE" if named else None
        problems.append(
            Problem(f"{display(path)} cannot be read: {reason}", where, "give a readable file, or unset it")
        )
        return {}
    found = {}
    for binding in bindings:
        # what dotenv calls the line of a binding is where the blank lines before it begin
        text = binding.original.string
        blank = text[: len(text) - len(text.lstrip())].count("\n")
        where = f"{display(path)}:{binding.original.line + blank}"
        if binding.error or (binding.key and binding.value is None):
            problems.append(Problem("a line that is no NAME=value", where, "write NAME=value, or # for a comment"))
        elif binding.key and binding.value is not None:
            found[binding.key] = (binding.value, where)
    return found


def settings_of(variables: Mapping[str, tuple[str, str]], problems: list[Problem]) -> dict[str, Given]:
    """Dotted key to value of the settings among `variables` (name to value and source).

    An empty variable counts as not set: templates for compose and clouds leave many empty. `null` is null.
    """
    values: dict[str, Given] = {}
    names: dict[str, str] = {}
    for name, (text, where) in variables.items():
        if problem := _refused(name, where):
            problems.append(problem)
        key = SETTING_VARIABLES.get(name)
        if key is None or not text.strip():
            continue
        try:
            value = Given(parse(text, key), where, explicit=True)
        except ValueError as error:
            problems.append(Problem(f"{key}={text!r} {error}", where, "give a plain value"))
            continue
        if key in values and values[key].value != value.value:
            what = f"{names[key]} and {name} both set {key}, to different values"
            problems.append(Problem(what, where, "keep one of the two"))
        values[key], names[key] = value, name
    return values


def _refused(name: str, where: str) -> Problem | None:
    if name.startswith("WMTP_") and name not in KNOWN:
        near = nearest(name, KNOWN)
        fix = f"did you mean {near}?" if near else "unset it; docs/settings.md lists every variable"
        return Problem(f"unknown variable {name}", where, fix)
    if name.startswith("CLOUD_") and name not in KNOWN and (near := nearest(name, [*SHORT], 0.85)):
        return Problem(f"unknown variable {name}", where, f"did you mean {near}?")
    return None


def foreign(variables: Iterable[str]) -> list[str]:
    """Those variables that are not ours: credentials and options of the libraries we use."""
    return [name for name in variables if not name.startswith("WMTP_") and name not in SETTING_VARIABLES]
