"""Secrets: which variables carry them, and how each may come from a file instead (`VAR_FILE`)."""

from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

from wmtp_worker.settings.values import Problem, plain

# entrypoint/entrypoint.sh has the same list; a test holds the two equal
SECRETS: Mapping[str, str] = MappingProxyType(
    {
        "AWS_ACCESS_KEY_ID": "access key for S3",
        "AWS_SECRET_ACCESS_KEY": "secret key for S3",
        "AWS_SESSION_TOKEN": "session token of temporary S3 credentials",
        "AZURE_STORAGE_CONNECTION_STRING": "connection string for Azure Blob Storage",
        "AZURE_STORAGE_KEY": "account key for Azure Blob Storage",
        "AZURE_STORAGE_SAS_TOKEN": "shared access signature for Azure Blob Storage",
        "AZURE_CLIENT_SECRET": "secret of an Azure service principal",
        "GOOGLE_APPLICATION_CREDENTIALS_JSON": "content of a Google credentials file, where only variables can be set",
        "HF_TOKEN": "token for private models on the Hugging Face hub",
        "MLFLOW_TRACKING_USERNAME": "user of the MLflow server",
        "MLFLOW_TRACKING_PASSWORD": "password of the MLflow server",
        "MLFLOW_TRACKING_TOKEN": "token of an MLflow server that wants one instead",
    }
)
SECRET_VARIABLES: tuple[str, ...] = tuple(SECRETS)


def read_secret_files(environ: MutableMapping[str, str]) -> list[Problem]:
    """Put every secret that `VAR_FILE` names into `VAR` and return what is wrong, in order.

    A trailing newline is dropped, nothing else. `VAR` and `VAR_FILE` together are wrong unless they agree, so
    reading twice is harmless. Values never appear in the messages.
    """
    problems: list[Problem] = []
    for name in SECRET_VARIABLES:
        path = environ.get(f"{name}_FILE")
        if not path:
            continue
        try:
            with open(path, encoding="utf-8") as file:
                value = plain(file.read()).removesuffix("\n").removesuffix("\r")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            fix = f"make the file readable, or set {name} itself"
            problems.append(Problem(f"{name}_FILE={path!r} cannot be read: {reason}", f"{name}_FILE", fix))
            continue
        if environ.get(name, value) != value:
            problems.append(Problem(f"both {name} and {name}_FILE are set", "the environment", "keep only one of them"))
        elif not value:
            problems.append(Problem(f"{name}_FILE={path!r} is an empty file", f"{name}_FILE", "put the secret in it"))
        else:
            environ[name] = value
    return problems
