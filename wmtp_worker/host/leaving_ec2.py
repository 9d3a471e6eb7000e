"""Stops or terminates the EC2 instance that this process runs on, with whatever credentials boto3 finds."""

from collections.abc import Mapping
from typing import Any

from wmtp_worker.errors import HostError, SettingsError
from wmtp_worker.host.metadata import Unavailable
from wmtp_worker.host.notices_ec2 import Ec2, disabled

_FIX = "stop the instance by hand, or by `shutdown -h now` as root on the machine itself"


class Ec2Call:
    """StopInstances or TerminateInstances for this instance alone.

    The credentials in the environment win over the instance's role, as everywhere in AWS's tools.
    """

    def __init__(self, environ: Mapping[str, str], instance: str | None, destroy: bool) -> None:
        """Asks the metadata service for the region and, where `instance` is None, the instance's id."""
        if disabled(environ):
            raise SettingsError("the instance is not known: AWS_EC2_METADATA_DISABLED is set", fix=_FIX)
        metadata = Ec2(environ)
        try:
            region = metadata.item("placement/region")
            instance = instance or metadata.item("instance-id")
        except Unavailable as error:
            fix = f"allow containers a hop limit of 2 (docs/interruptions.md), or {_FIX}"
            raise HostError(f"the metadata service does not answer: {error}", fix=fix) from None
        if not region or not instance:
            raise HostError("the metadata service does not name this instance", fix=_FIX)
        self.region, self.instance, self.destroy = region, instance, destroy

    def __str__(self) -> str:
        action = "TerminateInstances" if self.destroy else "StopInstances"
        return f"ec2:{action} {self.instance} in {self.region}, authorized by AWS credentials or the instance's role"

    def go(self) -> None:
        """Do it. A one-time spot instance cannot be stopped, only terminated: that is a SettingsError."""
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            client: Any = boto3.client("ec2", region_name=self.region)
            (client.terminate_instances if self.destroy else client.stop_instances)(InstanceIds=[self.instance])
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            kind: type[HostError | SettingsError] = HostError if status >= 500 else SettingsError
            raise kind(str(error), where=str(self), fix=_FIX) from None
        except BotoCoreError as error:
            raise HostError(str(error), where=str(self), fix=_FIX) from None
