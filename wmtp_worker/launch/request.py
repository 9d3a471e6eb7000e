"""What another machine is asked to run: the command of `wmtp train`, its variables, its secrets."""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from wmtp_worker.errors import InputError, SettingsError
from wmtp_worker.redact import MASK, redact
from wmtp_worker.settings import Settings, load
from wmtp_worker.settings.environment import variable
from wmtp_worker.settings.files import configs, display, names
from wmtp_worker.settings.schema import SETTABLE

JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_DIGEST = re.compile(r"@(sha256:[0-9a-f]{64})$")
# what the host needs to reach the bucket
_SECRETS: Mapping[str, tuple[str, ...]] = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "gcs": ("GOOGLE_APPLICATION_CREDENTIALS_JSON",),
    "azure": (
        "AZURE_STORAGE_CONNECTION_STRING",
        "AZURE_STORAGE_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_CLIENT_SECRET",
    ),
    "local": (),
}
_PLAIN: Mapping[str, tuple[str, ...]] = {
    "s3": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "gcs": (),
    "azure": ("AZURE_STORAGE_ACCOUNT", "AZURE_TENANT_ID", "AZURE_CLIENT_ID"),
    "local": (),
}
_HUB = ("HF_TOKEN",)
_MLFLOW = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_OF_THE_HOST = ("run.workdir", "run.name", "run.resume")  # told in other ways
_FALLBACK = {"recipe": "baseline", "preset": "local-light"}


@dataclass(frozen=True)
class Request:
    """One job: `arguments` follow `wmtp train`, `variables` may be read by anybody, `secrets` by nobody.

    `cloud` says where the bucket is, without secrets.
    """

    name: str
    run: str
    arguments: tuple[str, ...]
    variables: Mapping[str, str]
    secrets: Mapping[str, str] = field(repr=False)
    cloud: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """For people."""
        return shlex.join(["wmtp", "train", *self.arguments])

    def shown(self) -> dict[str, str]:
        """The environment with `***` for each secret."""
        return {**self.variables, **dict.fromkeys(self.secrets, MASK)}

    def exports(self, *, secrets: bool = True) -> bytes:
        """Lines that a POSIX shell evaluates."""
        chosen = {**self.variables, **(self.secrets if secrets else {})}
        return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in chosen.items()).encode()


def make_request(
    *,
    name: str | None,
    recipe: str | None,
    preset: str | None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    passed: Sequence[str] = (),
    credentials: bool = True,
    image: str | None = None,
    environ: MutableMapping[str, str] | None = None,
) -> tuple[Request, Settings]:
    """Resolve the settings here, and say what is to be run elsewhere.

    `passed` names further variables that travel, as secrets. Without `credentials` none of the bucket's are sent:
    the host has a role of its own. Where `image` is named by its digest, the run's record has that. Raises
    `SettingsError` where no bucket is set (the work would end with the machine), or where its keys are not to be
    had here; `InputError` for a bad name.
    """
    environ = os.environ if environ is None else environ
    settings = load(recipe=recipe, preset=preset, overrides=overrides, options=options, environ=environ)
    job = settings.run.name if name is None else name
    if not JOB_NAME.fullmatch(job):
        raise InputError(f"{job!r} is no name of a job", where="--name", fix="letters, digits, '.', '_' and '-'")
    if settings.cloud.bucket is None:
        raise SettingsError(
            "no bucket is set, and without one the work ends with the machine",
            where=settings.sources.get("cloud.bucket"),
            fix="set CLOUD_PROVIDER and CLOUD_BUCKET, here or in .env (docs/cloud.md)",
        )
    arguments, hidden = _arguments(settings)
    provider = settings.cloud.provider
    secrets = {**hidden, **(_credentials(provider, environ) if credentials else {})}
    wanted = [*_HUB, *(_MLFLOW if settings.tracking.uri else ()), *passed]
    secrets |= {name: environ[name] for name in wanted if environ.get(name)}
    if missing := [name for name in passed if not environ.get(name)]:
        raise SettingsError(
            f"{missing[0]} is not set here", where=f"--env {missing[0]}", fix="export it, or drop --env"
        )
    variables = {name: environ[name] for name in (*_PLAIN[provider], "HF_ENDPOINT") if environ.get(name)}
    if provider == "s3" and settings.cloud.region is None and not _has_region(variables):
        variables |= _region(environ)
    if digest := _DIGEST.search(image or ""):
        variables["WMTP_IMAGE_DIGEST"] = digest[1]
    cloud = {key: getattr(settings.cloud, key) for key in ("provider", "bucket", "prefix", "endpoint_url", "region")}
    request = Request(
        job, settings.run.name, tuple(arguments), variables, secrets, cloud, tuple(_notes(settings, environ, secrets))
    )
    return request, settings


def with_region(request: Request, region: str) -> Request:
    """The same with the bucket in AWS's `region`, where nothing else says in which it is."""
    if request.cloud["region"] is not None or _has_region(request.variables):
        return request
    return replace(request, variables={**request.variables, "AWS_REGION": region})


def without_secrets(request: Request) -> Request:
    """The same for a host where others could read them; it has a role of its own instead of the bucket's keys."""
    role = {name for names in _SECRETS.values() for name in names}
    left = sorted(set(request.secrets) - role)
    notes = [note for note in request.notes if "temporary" not in note]
    notes += [f"{name} is not sent: others could read it there" for name in left]
    return replace(request, secrets={}, notes=tuple(notes))


def _arguments(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The options that give the same settings elsewhere, and as variables those with a secret in them.

    Recipes and presets of the package are there by their names; of other files all values are sent.
    """
    packaged = f"{display(configs())}/"
    files = [source for source in settings.sources.values() if re.search(r"\.ya?ml:\d+$", source)]
    whole = any(not source.startswith(packaged) for source in files)
    arguments: list[str] = []
    for kind, chosen in (("recipe", settings.recipe), ("preset", settings.preset)):
        arguments += [f"--{kind}", _FALLBACK[kind] if whole and chosen not in names(kind) else chosen]
    arguments += ["--run-name", settings.run.name, "--resume", str(settings.run.resume)]
    values = _flat(settings.model_dump(mode="json"))
    if whole and settings.tracking.experiment is None:
        parts = (settings.tracking.experiment_prefix, settings.recipe)
        values["tracking.experiment"] = "/".join(part for part in parts if part)
    secrets = {}
    for key in SETTABLE:
        source = settings.sources.get(key, packaged)
        if key == "run.workdir" and source.startswith("--set"):
            pass  # a person who says it in this very command means the other machine
        elif key in _OF_THE_HOST or (not whole and source.startswith(packaged)):
            continue
        text = _spell(values[key])
        if redact(text) == text:
            arguments += ["--set", f"{key}={text}"]
        else:
            secrets[variable(key)] = text
    return arguments, secrets


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= {key: value} if key in SETTABLE or not isinstance(value, dict) else _flat(value, f"{key}.")
    return found


def _spell(value: Any) -> str:
    """As `--set` reads it again."""
    return value if isinstance(value, str) else json.dumps(value)


def _credentials(provider: str, environ: Mapping[str, str]) -> dict[str, str]:
    found = {name: environ[name] for name in _SECRETS[provider] if environ.get(name)}
    if provider == "gcs" and not found and (path := environ.get("GOOGLE_APPLICATION_CREDENTIALS")):
        try:
            with open(path, encoding="utf-8") as file:
                found[_SECRETS["gcs"][0]] = file.read()
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{path} cannot be read: {error}", where="GOOGLE_APPLICATION_CREDENTIALS", fix="name a readable file"
            ) from error
    if provider == "s3" and not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= found.keys():
        found = _profile(environ)
    if not found and provider != "local":
        raise SettingsError(
            "there are no credentials for the bucket here",
            where=f"cloud.provider={provider}",
            fix=f"set {' and '.join(_SECRETS[provider][:2])}, or --no-credentials if the host has a role of its own",
        )
    return found


@contextmanager
def _aws(environ: Mapping[str, str]) -> Iterator[Any]:
    """botocore's session: what AWS_PROFILE, ~/.aws and the like give here, and the host does not have."""
    import botocore.exceptions
    import botocore.session

    try:
        yield botocore.session.Session(profile=environ.get("AWS_PROFILE"))
    except botocore.exceptions.BotoCoreError as error:
        raise SettingsError(str(error), where="AWS_PROFILE", fix="name a profile that is in ~/.aws") from error


def _has_region(variables: Mapping[str, str]) -> bool:
    return not variables.keys().isdisjoint(_PLAIN["s3"])


def _region(environ: Mapping[str, str]) -> dict[str, str]:
    with _aws(environ) as session:
        found = session.get_config_variable("region")
    return {"AWS_REGION": found} if found else {}


def _profile(environ: Mapping[str, str]) -> dict[str, str]:
    with _aws(environ) as session:
        found = session.get_credentials()
    if found is None:
        return {}
    keys = found.get_frozen_credentials()
    values = zip(_SECRETS["s3"], (keys.access_key, keys.secret_key, keys.token), strict=True)
    return {name: value for name, value in values if value}


def _notes(settings: Settings, environ: Mapping[str, str], secrets: Mapping[str, str]) -> Iterator[str]:
    for key, value in (("model.path", settings.model.path), ("data.dataset", settings.data.dataset)):
        if value is not None and value.startswith((".", "/", "~")):
            yield f"{key}={value} is a path: it has to be there on the host (`wmtp assets push` makes it a name)"
    if secrets.get("AWS_SESSION_TOKEN"):
        yield "these credentials are temporary: once they expire, checkpoints stay on the host until the next launch"
    if settings.cloud.provider == "local":
        yield f"cloud.bucket={settings.cloud.bucket} is a folder of the host: is it on a disk that outlives it?"
