"""An instance by the real API's calls, answered by moto on loopback."""

import base64
import json
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.stub import Stubber

from tests.launch.conftest import SECRET
from tests.servers.processes import end, free_ports
from wmtp_worker.launch import ec2

pytestmark = pytest.mark.xdist_group("moto")
ROOT = Path(__file__).resolve().parents[2]
BASE = ("--type", "g5.xlarge", "--preset", "smoke", "--yes")


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=out, stderr=out
        )
        try:
            until = time.monotonic() + 120
            while "Running on" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)


@pytest.fixture(scope="module")
def region(moto):
    """EC2 in a region where the role is."""
    keys = {"aws_access_key_id": "PLANTEDACCESSKEY00", "aws_secret_access_key": SECRET}
    session = boto3.session.Session(region_name="eu-north-1", **keys)
    iam = session.client("iam", endpoint_url=moto)
    iam.create_instance_profile(InstanceProfileName="wmtp-worker")
    iam.close()
    client = session.client("ec2", endpoint_url=moto)
    yield client
    client.close()


@pytest.fixture(scope="module")
def ami(region):
    # all images that moto knows take seconds
    return region.register_image(Name="tests", RootDeviceName="/dev/sda1")["ImageId"]


@pytest.fixture
def cloud(moto, region, laptop):
    """The same from the laptop; what a test leaves there is the next one's too, so names differ."""
    laptop.environ.update({"AWS_ENDPOINT_URL": moto, "AWS_REGION": "eu-north-1", "CLOUD_ENDPOINT_URL": ""})
    return region


def instance_of(cloud, name):
    filters = [{"Name": "tag:wmtp-job", "Values": [name]}]
    (found,) = cloud.describe_instances(Filters=filters)["Reservations"]
    return found["Instances"][0]


def user_data_of(cloud, instance):
    value = cloud.describe_instance_attribute(InstanceId=instance, Attribute="userData")["UserData"]["Value"]
    return base64.b64decode(value).decode()


def state(laptop, name):
    return json.loads(laptop.launch("status", name, "--json").stdout)[0]["state"]["phase"]


def test_a_spot_instance_with_a_role_and_no_keys(cloud, laptop, ami):
    said = laptop.launch(
        *("ec2", "me/wmtp", *BASE, "--ami", ami, "--name", "one", "--set", "training.lr=1e-3"),
        HF_TOKEN="hf_" + "x" * 20,
    )
    assert "HF_TOKEN is not sent" in said.stdout
    made = instance_of(cloud, "one")
    assert made["InstanceLifecycle"] == "spot"
    assert made["MetadataOptions"]["HttpTokens"] == "required"
    assert made["MetadataOptions"]["HttpPutResponseHopLimit"] == 2
    assert made["IamInstanceProfile"]["Arn"].endswith("instance-profile/wmtp-worker")
    tags = {tag["Key"]: tag["Value"] for tag in made["Tags"]}
    assert tags == {"Name": "wmtp-one", "wmtp-job": "one", "project": "wmtp-worker"}
    assert '"aws:ResourceTag/project": "wmtp-worker"' in (ROOT / "docs/hosts/ec2.md").read_text()
    volume = made["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
    (disk,) = cloud.describe_volumes(VolumeIds=[volume])["Volumes"]
    assert (disk["Size"], disk["Encrypted"]) == (200, True)

    text = user_data_of(cloud, made["InstanceId"])
    for secret in (SECRET, "PLANTEDACCESSKEY00", "hf_" + "x" * 20):
        assert secret not in text
    files = {file["path"]: file["content"] for file in yaml.safe_load(text)["write_files"]}
    script = files["/etc/wmtp/run.sh"]
    assert "\nbash /etc/wmtp/pull.sh me/wmtp || true\nexec docker run " in script
    assert files["/etc/wmtp/pull.sh"] == (ROOT / "wmtp_worker/launch/pull.sh").read_text()
    assert "--set training.lr=0.001" in script
    assert "export AWS_REGION=eu-north-1\n" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    assert state(laptop, "one") == "running"
    laptop.registered[0].unlink()  # another laptop: what is found there can be stopped from here
    assert "runs there already" in laptop.launch("ec2", "me/wmtp", *BASE, "--ami", ami, "--name", "one", code=79).stderr
    assert "has no log to follow" in laptop.launch("logs", "one", "--follow", code=78).stderr
    assert "its disk is kept" in laptop.launch("stop", "one").stdout
    assert state(laptop, "one") == "stopped"
    again = laptop.launch("ec2", "me/wmtp", *BASE, "--ami", ami, "--name", "one", code=79).stderr
    assert f"start-instances --region eu-north-1 --instance-ids {made['InstanceId']}" in again
    assert "its disk is kept" in laptop.launch("stop", "one").stdout
    assert "were given back" in laptop.launch("stop", "one", "--destroy").stdout
    assert state(laptop, "one") == "ended"


@pytest.mark.parametrize(("request_is", "cancelled"), [("open", True), ("disabled", False)])
def test_a_machine_that_an_interruption_stopped_does_not_come_back(monkeypatch, request_is, cancelled):
    # moto's instances do not know their requests; the stubber holds all to the API's own description
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody's")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody's")
    place = ec2.Ec2("one", "eu-north-1")
    launched = datetime(2026, 1, 1, tzinfo=UTC)
    instance = {"InstanceId": "i-1", "State": {"Name": "stopped"}, "SpotInstanceRequestId": "sir-1"}
    wanted = {"SpotInstanceRequestIds": ["sir-1"]}
    with Stubber(place._ec2) as stub:
        stub.add_response(
            "describe_instances", {"Reservations": [{"Instances": [instance | {"LaunchTime": launched}]}]}
        )
        found = {"SpotInstanceRequests": [{"State": request_is}]}
        stub.add_response("describe_spot_instance_requests", found, wanted)
        if cancelled:
            stub.add_response("cancel_spot_instance_requests", {}, wanted)
        assert place.stop(1).phase == "stopped"  # and nothing else was asked, not to stop what is stopped
        stub.assert_no_pending_responses()


def test_on_demand(cloud, laptop, ami):
    laptop.launch("ec2", "me/wmtp", *BASE, "--ami", ami, "--on-demand", "--disk", 80, "--name", "two")
    made = instance_of(cloud, "two")
    assert "InstanceLifecycle" not in made
    laptop.launch("stop", "two", "--destroy")
    assert state(laptop, "two") == "ended"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd")
def test_systemd_takes_the_unit(cloud, laptop, ami, tmp_path):
    laptop.launch("ec2", "me/wmtp", *BASE, "--ami", ami, "--name", "three")
    text = user_data_of(cloud, instance_of(cloud, "three")["InstanceId"])
    laptop.launch("stop", "three", "--destroy")
    unit = tmp_path / "wmtp-worker.service"
    unit.write_text(yaml.safe_load(text)["write_files"][-1]["content"])
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert "\nFailureAction=poweroff\n" in unit.read_text()  # what idles costs
    # what this machine lacks is none of the unit's business
    ours = [line for line in done.stderr.splitlines() if unit.name in line and "docker" not in line]
    assert ours == []


def test_what_is_wrong_is_said(cloud, laptop):
    assert "AWS refuses" in laptop.launch("ec2", "i", *BASE, "--ami", "ami-0", "--name", "no", code=78).stderr
    assert "region" in laptop.launch("ec2", "i", *BASE, code=78, AWS_REGION="").stderr
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    assert "credentials" in laptop.launch("ec2", "i", *BASE, code=78, **nobody).stderr
    for resume in ("never", 10):
        assert "repeats the same" in laptop.launch("ec2", "i", *BASE, "--resume", resume, code=78).stderr
    assert "run_instances in" in laptop.launch("ec2", "i", *BASE, "--dry-run").stdout
    # the bucket's region is the machine's where nothing says another
    for here, there in (("", "us-west-2"), ("eu-north-1", "eu-north-1")):
        said = laptop.launch("ec2", "i", *BASE, "--dry-run", "--region", "us-west-2", AWS_REGION=here).stdout
        assert "run_instances in us-west-2" in said
        assert f"export AWS_REGION={there}\n" in said
    far = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    assert "Could not connect" in laptop.launch("ec2", "i", *BASE, code=75, **far).stderr


def test_a_model_that_is_not_in_the_bucket_is_missed_before_the_question(moto, cloud, laptop):
    keys = {"aws_access_key_id": "PLANTEDACCESSKEY00", "aws_secret_access_key": SECRET}
    client = boto3.session.Session(region_name="us-east-1", **keys).client("s3", endpoint_url=moto)
    client.create_bucket(Bucket="lab")
    client.put_object(Bucket="lab", Key="models/llama/config.json", Body=b"{}")
    client.close()
    options = ("ec2", "i", *BASE[:-1], "--price", 1)
    said = laptop.launch(*options, "--set", "model.path=llama", code=78)
    assert "nobody is here to be asked" in said.stderr
    assert "could not be asked" not in said.stdout
    other = ("--set", "model.path=lama")
    assert "model.path=lama is not in the bucket" in laptop.launch(*options, *other, code=78).stderr
    assert "could not be asked from here" in laptop.launch(*options, *other, code=78, CLOUD_BUCKET="other").stdout
    laptop.launch(*options, *other, "--dry-run")


def test_a_bucket_that_the_role_does_not_open(laptop):
    said = laptop.launch("ec2", "me/wmtp-worker", *BASE, code=78, CLOUD_PROVIDER="gcs", CLOUD_ENDPOINT_URL="")
    assert "opens no bucket of cloud.provider=gcs" in said.stderr


def test_nothing_is_rented_where_it_could_not_be_found_again(cloud, laptop, ami, tmp_path):
    (tmp_path / "file").touch()
    options = (*BASE, "--ami", ami, "--name", "unseen", "--on-demand")
    said = laptop.launch("ec2", "me/wmtp-worker", *options, code=78, XDG_STATE_HOME=str(tmp_path / "file"))
    assert "launched jobs cannot be remembered" in said.stderr
    assert not cloud.describe_instances(Filters=[{"Name": "tag:wmtp-job", "Values": ["unseen"]}])["Reservations"]


def test_the_price_is_that_of_all_zones_now(cloud, laptop, ami):
    options = ("--type", "g5.xlarge", "--preset", "smoke", "--ami", ami, "--name", "priced")
    said = laptop.launch("ec2", "me/wmtp-worker", *options, code=78)
    least, most = re.search(r"([\d.e-]+) to ([\d.e-]+) an hour by zone, the spot market's now", said.stdout).groups()
    assert 0 < float(least) <= float(most)
    assert "nobody is here to be asked" in said.stderr
