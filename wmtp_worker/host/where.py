"""Whose machine this is: found by its variables, its firmware and a few files. Nothing is asked over the network.

    host = here()            # what stands around this process
    host = locate(environment, traces)     # the same as a pure function

Sources of what each host sets and promises are in `docs/doctor.md`.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal["vast", "runpod", "sagemaker", "vessl", "kubernetes", "ec2", "gcp", "azure", "bare"]
Cloud = Literal["ec2", "gcp", "azure"]

ROOT = Path("/")
# Hyper-V machines elsewhere have the same vendor, but not this tag
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
# the first process of a container has what its host gave it; a session by ssh often has not
_FROM_FIRST_PROCESS = (
    "CONTAINER_API_KEY",
    "CONTAINER_ID",
    "KUBERNETES_SERVICE_HOST",
    "RUNPOD_API_KEY",
    "RUNPOD_POD_ID",
    "RUNPOD_VOLUME_ID",
    "TRAINING_JOB_ARN",
    "TRAINING_JOB_NAME",
    "VAST_CONTAINERLABEL",
    "VESSL_EXPERIMENT_ID",
    "VESSL_RUN_INITIAL_CONFIG",
    "VESSL_WORKLOAD_ID",
)


@dataclass(frozen=True)
class Traces:
    """What firmware and files say about the machine; "" and False where they say nothing."""

    vendor: str = ""  # /sys/class/dmi/id/sys_vendor
    product: str = ""  # …/product_name
    chassis_tag: str = ""  # …/chassis_asset_tag
    board_tag: str = ""  # …/board_asset_tag: EC2 puts the instance's id there
    hypervisor: str = ""  # /sys/hypervisor/uuid
    sagemaker: bool = False  # /opt/ml/input/config/resourceconfig.json is there
    vessl: bool = False  # /opt/vessl/access_token is there
    kubernetes: bool = False  # a service account is mounted


@dataclass(frozen=True)
class Host:
    """Where this process runs, and what that host does with what runs on it."""

    name: Name
    why: str  # what said so, for people
    instance: str | None = None  # the id by which the host knows this machine, container or job
    # seconds between the host's word and the end of the process, at the least; None: it promises nothing
    notice_seconds: float | None = None
    restarts: bool | None = None  # whether the host starts a container that ended again; None: depends, or not known
    disk: Path | None = None  # what lies below it outlives a stop of the instance (not its deletion); None: not known
    cloud: Cloud | None = None  # whose metadata service answers to this process, and may announce the end
    sure: bool = True  # False: inferred from little, or from nothing


def here(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> Host:
    """The host around this process. Reads files, asks nobody; takes well under a millisecond."""
    return locate(surroundings(environ, root), traces(root))


def locate(environ: Mapping[str, str], traces: Traces = Traces()) -> Host:  # frozen
    """The host that variables and traces speak of. A host of containers goes before the cloud that it lives in."""
    cloud = _cloud(traces)
    for find in (_vast, _runpod, _sagemaker, _vessl, _kubernetes):
        if (host := find(environ, traces, cloud)) is not None:
            return host
    if cloud is None:
        return Host("bare", "no variable and no firmware of a known host", sure=False)
    instance = traces.board_tag if cloud == "ec2" and traces.board_tag.startswith("i-") else None
    # 120 s and 30 s are what the clouds promise for spot machines; others are taken away with far longer notice
    seconds = {"ec2": 120.0, "gcp": 30.0, "azure": 30.0}[cloud]
    return Host(cloud, "the machine's firmware", instance, notice_seconds=seconds, restarts=False, cloud=cloud)


def surroundings(environ: Mapping[str, str] = os.environ, root: Path = ROOT) -> dict[str, str]:
    """`environ`, and what the container's first process knows of its host, where that may be read. Holds secrets."""
    found = {}
    with contextlib.suppress(OSError):
        for item in (root / "proc/1/environ").read_bytes().split(b"\0"):
            name, _, value = item.decode(errors="replace").partition("=")
            if name in _FROM_FIRST_PROCESS:
                found[name] = value
    return {**found, **environ}


def traces(root: Path = ROOT) -> Traces:
    """What is to be seen of the machine below `root`. Containers see their machine's firmware too; gVisor hides it."""
    dmi = root / "sys/class/dmi/id"
    return Traces(
        vendor=_text(dmi / "sys_vendor"),
        product=_text(dmi / "product_name"),
        chassis_tag=_text(dmi / "chassis_asset_tag"),
        board_tag=_text(dmi / "board_asset_tag"),
        hypervisor=_text(root / "sys/hypervisor/uuid"),
        sagemaker=_exists(root / "opt/ml/input/config/resourceconfig.json"),
        vessl=_exists(root / "opt/vessl/access_token"),
        kubernetes=_exists(root / "var/run/secrets/kubernetes.io/serviceaccount"),
    )


def _cloud(traces: Traces) -> Cloud | None:
    if traces.vendor == "Amazon EC2" or traces.hypervisor.startswith("ec2"):
        return "ec2"
    # a Chromebook has the same vendor
    if traces.product == "Google Compute Engine":
        return "gcp"
    return "azure" if traces.chassis_tag == _AZURE_TAG else None


def _vast(environ: Mapping[str, str], traces: Traces, cloud: Cloud | None) -> Host | None:
    label, number = environ.get("VAST_CONTAINERLABEL", ""), environ.get("CONTAINER_ID", "")
    if label:
        why = "VAST_CONTAINERLABEL is set"
    elif number.isdecimal() and environ.get("CONTAINER_API_KEY"):  # the number alone could be anybody's
        why = "CONTAINER_ID and CONTAINER_API_KEY are set"
    else:
        return None
    sure = bool(label)
    # the label is C.<number>
    instance = number or label.removeprefix("C.")
    # all of the container's disk stays until the instance is destroyed; no notice is documented, not even a signal
    return Host("vast", why, instance, notice_seconds=None, restarts=None, disk=ROOT, cloud=cloud, sure=sure)


def _runpod(environ: Mapping[str, str], traces: Traces, cloud: Cloud | None) -> Host | None:
    if not (pod := environ.get("RUNPOD_POD_ID")):
        return None
    # spot pods get SIGTERM and, 5 s later, SIGKILL; a container whose command ends is started again
    return Host(
        "runpod", "RUNPOD_POD_ID is set", pod, notice_seconds=5.0, restarts=True, disk=Path("/workspace"), cloud=cloud
    )


def _sagemaker(environ: Mapping[str, str], traces: Traces, cloud: Cloud | None) -> Host | None:
    if job := environ.get("TRAINING_JOB_NAME"):
        why = "TRAINING_JOB_NAME is set"
    elif traces.sagemaker:
        why = "/opt/ml/input/config/resourceconfig.json is there"
    else:
        return None
    # SIGTERM comes 120 s before the end; a spot job starts again by itself after an interruption, and only then.
    # Its firmware is EC2's, but its metadata service is not for us.
    disk = Path("/opt/ml/checkpoints")
    return Host("sagemaker", why, job, notice_seconds=120.0, restarts=False, disk=disk)


def _vessl(environ: Mapping[str, str], traces: Traces, cloud: Cloud | None) -> Host | None:
    # an access token or an organization alone is what a laptop has
    names = ("VESSL_RUN_INITIAL_CONFIG", "VESSL_EXPERIMENT_ID", "VESSL_WORKLOAD_ID")
    if name := next((name for name in names if environ.get(name)), None):
        why = f"{name} is set"
    elif traces.vessl:
        why = "/opt/vessl/access_token is there"
    else:
        return None
    instance = environ.get("VESSL_EXPERIMENT_ID") or environ.get("VESSL_WORKLOAD_ID") or None
    # its runs are pods; it documents no grace period of its own
    return Host("vessl", why, instance, notice_seconds=30.0, restarts=None, cloud=cloud)


def _kubernetes(environ: Mapping[str, str], traces: Traces, cloud: Cloud | None) -> Host | None:
    if environ.get("KUBERNETES_SERVICE_HOST"):
        why = "KUBERNETES_SERVICE_HOST is set"
    elif traces.kubernetes:
        why = "a service account is mounted"
    else:
        return None
    # a pod's host name is its name unless its maker wants otherwise; 30 s unless terminationGracePeriodSeconds says so
    return Host("kubernetes", why, environ.get("HOSTNAME") or None, notice_seconds=30.0, restarts=None, cloud=cloud)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
