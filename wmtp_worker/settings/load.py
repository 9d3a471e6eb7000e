"""From the layers to `Settings`: defaults, preset, recipe, .env, environment, command line; later wins."""

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from pydantic import ValidationError

from wmtp_worker.errors import SettingsError
from wmtp_worker.settings.checks import contradictions
from wmtp_worker.settings.environment import BORROWED, foreign, read_env_file, settings_of
from wmtp_worker.settings.files import configs, find, read
from wmtp_worker.settings.schema import SETTABLE, Settings
from wmtp_worker.settings.secrets import read_secret_files
from wmtp_worker.settings.values import Given, Problem, allowed, nearest, parse, unknown

_DEFAULT_CHOICE = {"recipe": "baseline", "preset": "local-light"}
_OPTIONS = {"run.name": "--run-name", "run.resume": "--resume"}


def load(
    *,
    recipe: str | None = None,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    environ: MutableMapping[str, str] | None = None,
    needs_bucket: bool = True,
) -> Settings:
    """Read every layer and return the settings of one run.

    `overrides` are `key=value` as behind `--set`, the last of a key wins; `options` are values of dedicated
    options by dotted key (None: not given). `recipe` and `preset` are names, or paths of YAML files.
    `environ` (os.environ) is added to: variables of `.env` that are not ours, unless already there, and
    secrets that `VAR_FILE` names. Without `needs_bucket`, for who has a bucket's URL, a provider alone will do.

    Raises SettingsError with everything that is wrong, each with its key, value and origin.
    """
    environ = os.environ if environ is None else environ
    problems: list[Problem] = []
    env_file = read_env_file(environ, problems)
    surroundings = {name: (value, f"variable {name}") for name, value in environ.items()}
    from_env_file = {name: (value, f"{where} {name}") for name, (value, where) in env_file.items()}

    chosen: dict[str, Given] = {}
    files = [configs() / "defaults.yaml"]
    for kind, asked in (("preset", preset), ("recipe", recipe)):
        choice = _choose(kind, asked, surroundings, from_env_file)
        if layer := find(kind, choice.value, choice.source, problems):
            files.append(layer.path)
            chosen[kind] = Given(layer.name, choice.source)

    values: dict[str, Given] = {}
    for path in files:
        values |= read(path, problems)
    values |= settings_of(from_env_file, problems)
    values |= settings_of(surroundings, problems)
    values |= _command_line(overrides, options or {}, problems)

    for name in foreign(env_file):
        environ.setdefault(name, env_file[name][0])
    problems += read_secret_files(environ)

    settings = _validate(values, chosen, problems, needs_bucket)
    if settings is None or problems:
        raise _all(problems)
    return settings


def _choose(kind: str, asked: str | None, *layers: Mapping[str, tuple[str, str]]) -> Given:
    if asked:
        return Given(asked, f"--{kind}")
    for layer in layers:
        value, source = layer.get(f"WMTP_{kind.upper()}", ("", ""))
        if value.strip():
            return Given(value.strip(), source)
    return Given(_DEFAULT_CHOICE[kind], "default")


def _command_line(overrides: Sequence[str], options: Mapping[str, Any], problems: list[Problem]) -> dict[str, Given]:
    values: dict[str, Given] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key, source = key.strip(), f"--set {text}"
        if not equals:
            problems.append(
                Problem(f"--set {text} has no value", None, "write --set key=value, as --set training.lr=1e-4")
            )
        elif problem := unknown(key, source):
            problems.append(problem)
        else:
            _take(values, key, value, source, problems)
    by_set = dict(values)
    for key, given in options.items():
        if given is None:
            continue
        source = f"{_OPTIONS.get(key, f'--{key}')} {given}"
        _take(values, key, given, source, problems)
        if key in by_set and key in values and by_set[key].value != values[key].value:
            problems.append(
                Problem(f"{key} is given twice", f"{by_set[key].source} and {source}", "keep one of the two")
            )
    return values


def _take(values: dict[str, Given], key: str, value: Any, source: str, problems: list[Problem]) -> None:
    try:
        values[key] = Given(parse(value, key) if isinstance(value, str) else value, source, explicit=True)
    except ValueError as error:
        problems.append(Problem(f"{key}={value!r} {error}", source, "give a plain value"))


def _validate(
    values: dict[str, Given], chosen: dict[str, Given], problems: list[Problem], needs_bucket: bool
) -> Settings | None:
    """The settings, or None with the reasons added to `problems`."""
    if len(chosen) < 2:
        # without the preset or the recipe, other complaints would only mislead
        return None
    values = {key: values[key] for key in SETTABLE if key in values}
    values = chosen | values
    if (bucket := values.get("cloud.bucket")) and bucket.source.endswith(BORROWED) and _keeps_local(values):
        values["cloud.bucket"] = Given(None, "default")
    name = values.get("run.name")
    if name is not None and name.value is None:
        made = f"{chosen['recipe'].value}-{chosen['preset'].value}"
        values["run.name"] = Given(made, "recipe and preset")
    try:
        settings = Settings.model_validate(_tree(values))
    except ValidationError as error:
        problems += _explain(error, values)
        return None
    settings._sources.update({key: given.source for key, given in values.items()})
    problems += contradictions(settings, values, needs_bucket)
    return settings


def _keeps_local(values: Mapping[str, Given]) -> bool:
    provider = values.get("cloud.provider")
    return provider is None or provider.value == "local"


def _tree(values: Mapping[str, Given]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, given in values.items():
        *groups, leaf = key.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[leaf] = given.value
    return tree


def _explain(error: ValidationError, values: Mapping[str, Given]) -> Iterator[Problem]:
    reported = set()
    for detail in error.errors(include_url=False):
        path = [str(part) for part in detail["loc"]]
        # pydantic goes on into lists and unions; the setting is the longest part of the way that is one
        key = next((k for k in (".".join(path[:n]) for n in range(len(path), 0, -1)) if k in values), ".".join(path))
        if key in reported:
            continue
        reported.add(key)
        if key not in values:
            yield Problem(
                f"{key} has no value",
                None,
                "the file configs/defaults.yaml of this installation is not whole",
            )
            continue
        given = values[key]
        complaint, fix = _in_words(key, given.value, detail["type"], detail.get("ctx", {}), detail["msg"])
        yield Problem(f"{key}={_show(given.value)} {complaint}", given.source, fix)


def _in_words(key: str, value: Any, kind: str, context: Mapping[str, Any], message: str) -> tuple[str, str]:
    if kind == "value_error":
        complaint, _, fix = str(context["error"]).partition("; ")
        return complaint, fix
    if kind == "literal_error":
        near = nearest(str(value), allowed(key))
        return "is not one of its choices", (
            f"did you mean {near}? " if near else ""
        ) + f"set one of {', '.join(allowed(key))}"
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        bound = bounds[kind]
        return "is out of range", f"set a number {words[bound]} {context[bound]:g}"
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return "is not a whole number", "set a whole number, as 100"
    if kind in ("float_type", "float_parsing", "finite_number"):
        return "is not a number", "set a number, as 0.1 or 1e-4"
    if kind == "bool_type":
        return "is neither true nor false", "set true or false"
    if kind == "string_too_short":
        return "is empty", "give a value, or null where it may be left out"
    if kind == "string_type":
        return "is not text", "give text"
    if kind == "list_type":
        return "is not a list", "write [a, b]"
    return f"is wrong: {message}", "see docs/settings.md"


def _show(value: Any) -> str:
    """A value as it is written in YAML, for the few that Python spells otherwise."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _all(problems: Sequence[Problem]) -> SettingsError:
    if len(problems) == 1:
        only = problems[0]
        return SettingsError(only.what, where=only.where, fix=only.fix)
    lines = "\n".join(f"  - {problem}" for problem in problems)
    return SettingsError(f"{len(problems)} settings are wrong:\n{lines}")
