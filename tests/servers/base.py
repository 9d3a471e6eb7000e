"""What every server of the tests looks like to a test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from wmtp_worker.settings import CloudSettings, load


@dataclass(frozen=True)
class Server:
    """A bucket server on loopback (or a folder), the variables with its credentials, and a way to make buckets."""

    provider: str
    endpoint: str | None
    environ: Mapping[str, str]
    make_bucket: Callable[[], str]
    # the same variables with credentials that the server refuses; empty where there are no credentials
    wrong_environ: Mapping[str, str] = field(default_factory=dict)

    def variables(self, bucket: str, **changes: object) -> dict[str, str]:
        """The environment in which a worker uses that bucket; `changes` are settings of `cloud`, by name."""
        settings = {"bucket": bucket, "endpoint_url": self.endpoint, "patience": 5, **changes}
        chosen = {f"WMTP_CLOUD__{name.upper()}": str(value) for name, value in settings.items() if value is not None}
        return {**self.environ, "CLOUD_PROVIDER": self.provider, **chosen}

    def cloud(self, bucket: str, **changes: object) -> CloudSettings:
        """The same as settings. The credentials have to be in the environment when a store is opened."""
        return load(preset="smoke", environ=self.variables(bucket, **changes)).cloud
