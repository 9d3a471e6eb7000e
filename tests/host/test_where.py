"""Whose machine this is, by variables, firmware and files; nobody is asked."""

from pathlib import Path

import pytest

from wmtp_worker.host.where import Traces, here, locate, surroundings

EC2 = Traces(vendor="Amazon EC2", board_tag="i-0123456789abcdef0")
OLD_EC2 = Traces(hypervisor="ec2e1916-9099")
GCP = Traces(vendor="Google", product="Google Compute Engine")
AZURE = Traces(vendor="Microsoft Corporation", chassis_tag="7783-7084-3265-9085-8269-3286-77")
KEY = {"CONTAINER_API_KEY": "k"}


@pytest.mark.parametrize(
    ("environ", "traces", "name", "instance", "cloud"),
    [
        # containers that say whose they are
        ({"VAST_CONTAINERLABEL": "C.4711", "CONTAINER_ID": "4711"}, Traces(), "vast", "4711", None),
        ({"VAST_CONTAINERLABEL": "C.4711"}, Traces(), "vast", "4711", None),
        ({"CONTAINER_ID": "4711", **KEY}, Traces(), "vast", "4711", None),
        ({"RUNPOD_POD_ID": "x1y2", "RUNPOD_DC_ID": "EU-1"}, Traces(), "runpod", "x1y2", None),
        ({"TRAINING_JOB_NAME": "job-1"}, EC2, "sagemaker", "job-1", None),
        ({}, Traces(vendor="Amazon EC2", sagemaker=True), "sagemaker", None, None),
        ({"VESSL_RUN_INITIAL_CONFIG": "/c"}, Traces(kubernetes=True), "vessl", None, None),
        ({"VESSL_EXPERIMENT_ID": "12", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, EC2, "vessl", "12", "ec2"),
        ({}, Traces(vessl=True), "vessl", None, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "pod-1"}, GCP, "kubernetes", "pod-1", "gcp"),
        ({}, Traces(kubernetes=True), "kubernetes", None, None),
        # machines of the clouds
        ({"HOSTNAME": "box"}, EC2, "ec2", "i-0123456789abcdef0", "ec2"),
        ({}, OLD_EC2, "ec2", None, "ec2"),
        ({}, GCP, "gcp", None, "gcp"),
        ({}, AZURE, "azure", None, "azure"),
        # what only looks like one of them
        ({"CONTAINER_ID": "4711"}, Traces(), "bare", None, None),
        ({"CONTAINER_ID": "my-box", **KEY}, Traces(), "bare", None, None),
        ({"RUNPOD_API_KEY": "of a laptop"}, Traces(), "bare", None, None),
        ({"VESSL_ACCESS_TOKEN": "t", "VESSL_DEFAULT_ORGANIZATION": "o"}, Traces(), "bare", None, None),
        ({"RUNPOD_POD_ID": "", "VAST_CONTAINERLABEL": "", "TRAINING_JOB_NAME": ""}, Traces(), "bare", None, None),
        ({}, Traces(vendor="Google", product="Eve"), "bare", None, None),
        ({}, Traces(vendor="Microsoft Corporation", product="Virtual Machine"), "bare", None, None),
        ({}, Traces(), "bare", None, None),
    ],
)
def test_the_host_is_found(environ, traces, name, instance, cloud):
    host = locate(environ, traces)
    assert (host.name, host.instance, host.cloud) == (name, instance, cloud)
    assert host.why


@pytest.mark.parametrize(
    ("environ", "traces", "seconds", "restarts", "disk"),
    [
        ({"VAST_CONTAINERLABEL": "C.1"}, Traces(), None, None, "/"),
        ({"RUNPOD_POD_ID": "x"}, Traces(), 5, True, "/workspace"),
        ({"TRAINING_JOB_NAME": "j"}, EC2, 120, False, "/opt/ml/checkpoints"),
        ({"VESSL_WORKLOAD_ID": "3"}, Traces(), 30, None, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, Traces(), 30, None, None),
        ({}, EC2, 120, False, None),
        ({}, GCP, 30, False, None),
        ({}, AZURE, 30, False, None),
        ({}, Traces(), None, None, None),
    ],
)
def test_what_the_host_does(environ, traces, seconds, restarts, disk):
    host = locate(environ, traces)
    assert (host.notice_seconds, host.restarts) == (seconds, restarts)
    assert host.disk == (Path(disk) if disk else None)


def test_only_what_was_said_is_sure():
    assert locate({"VAST_CONTAINERLABEL": "C.1"}).sure
    assert not locate({"CONTAINER_ID": "1", **KEY}).sure
    assert not locate({}).sure


def test_no_secret_is_kept_of_a_host():
    environ = {"VAST_CONTAINERLABEL": "C.1", "CONTAINER_API_KEY": "hidden", "RUNPOD_API_KEY": "hidden"}
    assert "hidden" not in repr(locate(environ))


def test_a_session_by_ssh_asks_the_first_process(machine):
    root = machine({"proc/1/environ": "HOME=/root\0CONTAINER_ID=4711\0CONTAINER_API_KEY=k\0PATH=/bin\0"})
    assert here({"HOME": "/home/me"}, root).instance == "4711"
    assert surroundings({"HOME": "/home/me", "CONTAINER_ID": "12"}, root) == {
        "HOME": "/home/me",
        "CONTAINER_ID": "12",
        "CONTAINER_API_KEY": "k",
    }


def test_files_tell_of_the_machine(machine):
    root = machine(
        {
            "sys/class/dmi/id/sys_vendor": "Amazon EC2\n",
            "sys/class/dmi/id/board_asset_tag": "i-0abc\n",
            "opt/ml/checkpoints/.keep": "",
        }
    )
    assert (here({}, root).name, here({}, root).instance) == ("ec2", "i-0abc")
    machine({"opt/ml/input/config/resourceconfig.json": "{}"})
    assert here({}, root).name == "sagemaker"
    machine({"var/run/secrets/kubernetes.io/serviceaccount/token": "t"})
    assert here({}, root).name == "sagemaker"
