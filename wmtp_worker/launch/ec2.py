"""An EC2 instance, by spot unless told otherwise: a role instead of keys, systemd runs the image and goes on with it.

User data can be read on the instance and by whoever may describe it: no secret is ever in it.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import yaml

from wmtp_worker.errors import HostError, InputError, SettingsError
from wmtp_worker.launch.detached import held, kept
from wmtp_worker.launch.host import State, Write
from wmtp_worker.launch.request import Request

# AWS's own image with Docker and NVIDIA's runtime, by the parameter that names the newest
AMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
TAG = "wmtp-job"
_STOP_SECONDS = 110  # of the two minutes after a spot notice
_LARGEST_USER_DATA = 16 << 10
_PHASES = {"pending": "starting", "shutting-down": "stopping", "terminated": "ended", "stopped": "stopped"}
_ALIVE = ["pending", "running", "stopping", "stopped"]
_WRONG = ("InvalidAMIID", "InvalidParameter", "InvalidSubnet", "InvalidGroup", "InvalidInstance", "Unsupported")
_DENIED = ("UnauthorizedOperation", "AuthFailure", "InvalidClientTokenId", "AccessDenied", "RequestExpired")
_POLL = 2.0  # seconds

_UNIT = """\
[Unit]
Description=wmtp-worker: trains, and goes on where it was stopped
Wants=network-online.target
After=network-online.target docker.service
Requires=docker.service
StartLimitIntervalSec=3600
StartLimitBurst=10
# what is not started again would idle, and cost: the disk stays
FailureAction=poweroff
StartLimitAction=poweroff

[Service]
ExecStartPre=-/usr/bin/docker rm --force wmtp-worker
ExecStart=/bin/bash /etc/wmtp/run.sh
ExecStop=/usr/bin/docker stop --time {stop} wmtp-worker
# done: off, also where the role may not stop the machine
ExecStopPost=/bin/sh -c '[ "$$EXIT_STATUS" != 0 ] || systemctl --no-block poweroff'
TimeoutStartSec=infinity
TimeoutStopSec={wait}
StandardOutput=journal+console
StandardError=journal+console
Restart=on-abnormal
RestartSec=10
# 74, 75: the same command goes on; 128 + a signal: killed, by the kernel's OOM killer say
RestartForceExitStatus=74 75 132 134 135 136 137 139
RestartPreventExitStatus=70 78 79
# what is started again is no failure: FailureAction would act first, and on `systemctl stop` too
SuccessExitStatus=74 75 132 134 135 136 137 139

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Machine:
    """What is asked for. `ami`: an id, or an SSM parameter that has one; `disk` in GiB; `role`: an instance profile."""

    type: str
    role: str
    ami: str = AMI
    disk: int = 200
    spot: bool = True
    subnet: str | None = None
    security_group: str | None = None
    gpus: str = "all"


class Ec2:
    """The instance that has the tag `wmtp-job=NAME` in one region. See `host.Host`.

    Raises `SettingsError` without credentials, region or permission,
    `HostError` where there is no capacity or no way.
    """

    def __init__(
        self,
        name: str,
        region: str | None,
        image: str = "",
        machine: Machine | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._image = image
        self._machine = machine
        self._check = check
        with self._errors():
            import boto3

            session = boto3.session.Session(region_name=region)
            self._ec2: Any = session.client("ec2")
            self._ssm: Any = session.client("ssm")
        self.region = str(self._ec2.meta.region_name)
        self.where = f"EC2 in {self.region}"

    # --- what is asked for -----------------------------------------------------------------------------------

    def user_data(self, request: Request) -> str:
        """cloud-init's. Raises `SettingsError` where it is longer than EC2 allows."""
        assert self._machine is not None
        names = [*request.variables, "WMTP_STOP_GRACE_SECONDS", "WMTP_WHEN_DONE"]
        gpus = ["--gpus", self._machine.gpus] if self._machine.gpus else []
        command = [
            *("exec", "docker", "run", "--rm", "--name", "wmtp-worker", *gpus, "--shm-size", "8g", "--user", "0:0"),
            *("--volume", "/var/lib/wmtp:/workspace", *(word for name in names for word in ("--env", name))),
            *(self._image, "train", *request.arguments),
        ]
        script = (
            "set -e\n"
            + request.exports(secrets=False).decode()
            + f"export WMTP_STOP_GRACE_SECONDS={_STOP_SECONDS} WMTP_WHEN_DONE=stop\n"
            + f"bash /etc/wmtp/pull.sh {shlex.quote(self._image)} || true\n"
            + shlex.join(command)
            + "\n"
        )
        pull = files("wmtp_worker.launch").joinpath("pull.sh").read_text(encoding="utf-8")
        unit = _UNIT.format(stop=_STOP_SECONDS, wait=_STOP_SECONDS + 10)
        document = {
            "write_files": [
                {"path": "/etc/wmtp/run.sh", "permissions": "0600", "content": script},
                {"path": "/etc/wmtp/pull.sh", "permissions": "0644", "content": pull},
                {"path": "/etc/systemd/system/wmtp-worker.service", "permissions": "0644", "content": unit},
            ],
            "runcmd": [
                ["systemctl", "daemon-reload"],
                ["systemctl", "enable", "--now", "--no-block", "wmtp-worker.service"],
            ],
        }
        text = "#cloud-config\n" + yaml.safe_dump(document, sort_keys=False, width=4096)
        if len(text) > _LARGEST_USER_DATA:
            raise SettingsError("the settings do not fit into user data (16 KB)", fix="use a recipe of the package")
        return text

    def _wanted(self, request: Request, ami: str, root: str) -> dict[str, Any]:
        assert self._machine is not None
        machine = self._machine
        tags = [{"Key": "Name", "Value": f"wmtp-{request.name}"}, {"Key": TAG, "Value": request.name}]
        tags.append({"Key": "project", "Value": "wmtp-worker"})  # the policy of docs/hosts/ec2.md asks for it
        tagged = ["instance", "volume", *(["spot-instances-request"] if machine.spot else [])]
        disk = {"VolumeSize": machine.disk, "VolumeType": "gp3", "Encrypted": True, "DeleteOnTermination": True}
        wanted: dict[str, Any] = {
            "ImageId": ami,
            "InstanceType": machine.type,
            "MinCount": 1,
            "MaxCount": 1,
            "IamInstanceProfile": {"Name": machine.role},
            "UserData": self.user_data(request),
            # a container is one hop further than the instance itself
            "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 2, "HttpEndpoint": "enabled"},
            "BlockDeviceMappings": [{"DeviceName": root, "Ebs": disk}],
            "InstanceInitiatedShutdownBehavior": "stop",
            "TagSpecifications": [{"ResourceType": kind, "Tags": tags} for kind in tagged],
        }
        if machine.spot:
            # the disk outlives an interruption, and the machine comes back when there is room
            options = {"SpotInstanceType": "persistent", "InstanceInterruptionBehavior": "stop"}
            wanted["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
        if machine.subnet:
            wanted["SubnetId"] = machine.subnet
        if machine.security_group:
            wanted["SecurityGroupIds"] = [machine.security_group]
        return wanted

    def preview(self, request: Request) -> str:
        assert self._machine is not None
        wanted = self._wanted(request, self._machine.ami, "the AMI's root device")
        data = wanted.pop("UserData")
        return f"run_instances in {self.region}:\n{yaml.safe_dump(wanted, sort_keys=False)}\nUserData:\n{data}"

    def prices(self) -> tuple[float, float] | None:
        """The least and the most that the machine costs an hour by spot, now, by zone, in USD; None: not known."""
        assert self._machine is not None
        if not self._machine.spot:
            return None
        with self._errors():
            found = self._ec2.describe_spot_price_history(
                InstanceTypes=[self._machine.type],
                ProductDescriptions=["Linux/UNIX"],
                StartTime=datetime.now(UTC),  # the one that holds now, of each zone
            )["SpotPriceHistory"]
        prices = [float(entry["SpotPrice"]) for entry in found]
        return (min(prices), max(prices)) if prices else None

    # --- the instance ----------------------------------------------------------------------------------------

    def start(self, request: Request) -> Mapping[str, str]:
        assert self._machine is not None
        if (found := self._find(_ALIVE)) is not None:
            if found["State"]["Name"] == "stopped":
                way = f"`aws ec2 start-instances --region {self.region} --instance-ids {found['InstanceId']}`"
                raise kept(self._name, self.where, way)
            raise held(self._name, self.where)
        with self._errors():
            ami = self._machine.ami
            if ami.startswith("/"):
                ami = self._ssm.get_parameter(Name=ami)["Parameter"]["Value"]
            images = self._ec2.describe_images(ImageIds=[ami])["Images"]
            root = images[0].get("RootDeviceName") or "/dev/sda1"
            made = self._ec2.run_instances(**self._wanted(request, ami, root))["Instances"][0]
        return {"instance": made["InstanceId"]}

    def find(self) -> Mapping[str, str] | None:
        found = self._find(_ALIVE)
        return None if found is None else {"instance": found["InstanceId"]}

    def _find(self, states: list[str]) -> dict[str, Any] | None:
        filters = [
            {"Name": f"tag:{TAG}", "Values": [self._name]},
            {"Name": "instance-state-name", "Values": states},
        ]
        with self._errors():
            found = self._ec2.describe_instances(Filters=filters)["Reservations"]
        instances = [instance for reservation in found for instance in reservation["Instances"]]
        return max(instances, key=lambda one: one["LaunchTime"], default=None)

    def state(self) -> State:
        found = self._find([*_ALIVE, "shutting-down"]) or self._find(["terminated"])
        if found is None:
            return State("unknown", None, "there is no such instance")
        state = found["State"]["Name"]
        reason = found.get("StateTransitionReason") or ""
        return State(_PHASES.get(state, state), None, f"{found['InstanceId']} {reason}".strip())

    def logs(self, write: Write, follow: bool) -> None:
        """The console's last 64 KB, as EC2 keeps them."""
        if follow:
            raise SettingsError(
                "EC2 has no log to follow",
                where=self.where,
                fix="drop --follow; the run's own log goes to the bucket: logs/<run>/training.log",
            )
        found = self._find([*_ALIVE, "shutting-down"])
        if found is None:
            raise InputError("there is no such instance any more", where=self.where, fix="its logs are in the bucket")
        with self._errors():
            said = self._ec2.get_console_output(InstanceId=found["InstanceId"], Latest=True).get("Output") or ""
        write(said.encode() + b"\n")

    def stop(self, grace: float) -> State:
        """Shut it down, so that systemd stops the worker and that saves. Machine and disk are kept: see `give_back`."""
        found = self._find(_ALIVE)
        if found is None:
            return self.state()
        instance = found["InstanceId"]
        if found["State"]["Name"] == "stopped":
            self._keep_down(found)
            return self._stopped(instance)
        with self._errors():
            self._ec2.stop_instances(InstanceIds=[instance])
        end = time.monotonic() + grace
        while (self._find(["stopped"]) or {}).get("InstanceId") != instance:
            if time.monotonic() > end:
                return State("stopping", None, f"{instance} is being shut down")
            self._check()
            time.sleep(_POLL)
        return self._stopped(instance)

    def _keep_down(self, found: Mapping[str, Any]) -> None:
        """After an interruption AWS would start it again; what a person stopped ("disabled") stays down by itself.

        That one's request is kept, for without it a machine by spot cannot be started again.
        """
        if request := found.get("SpotInstanceRequestId"):
            with self._errors():
                asked = self._ec2.describe_spot_instance_requests(SpotInstanceRequestIds=[request])
                if asked["SpotInstanceRequests"][0]["State"] != "disabled":
                    self._ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=[request])

    @staticmethod
    def _stopped(instance: str) -> State:
        return State("stopped", None, f"{instance}: its disk is kept, and costs; --destroy gives both back")

    def give_back(self) -> State:
        found = self._find(_ALIVE)
        if found is None:
            return self.state()
        instance = found["InstanceId"]
        with self._errors():
            if request := found.get("SpotInstanceRequestId"):
                # or it would start another one; before it is stopped, a machine by spot could not have been
                self._ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=[request])
            self._ec2.terminate_instances(InstanceIds=[instance])
        return State("ended", None, f"{instance} and its disk were given back")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import botocore.exceptions as aws

        where = getattr(self, "where", "EC2")
        try:
            yield
        except aws.ClientError as error:
            code, said = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
            if code.startswith(_DENIED):
                raise SettingsError(
                    f"AWS refuses: {said}", where=where, fix="check the keys and their policy"
                ) from error
            if code.startswith((*_WRONG, "ParameterNotFound", "ValidationError")):
                raise InputError(
                    f"AWS refuses: {said}", where=where, fix="docs/launch.md says what is needed"
                ) from error
            fix = "try again, another --type, or --on-demand"
            raise HostError(f"no instance: {code}: {said}", where=where, fix=fix) from error
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.NoRegionError, aws.ProfileNotFound) as error:
            fix = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; and AWS_REGION, or --region"
            raise SettingsError(str(error), where=where, fix=fix) from error
        except aws.ParamValidationError as error:
            raise InputError(str(error), where=where, fix="correct the option") from error
        except aws.BotoCoreError as error:
            raise HostError(str(error), where=where, fix="try again") from error
