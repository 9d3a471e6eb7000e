"""What hosts do to a container, acted out: however it goes, the run ends with the same bits as one left in peace."""

import hashlib
import json
import re
import shlex
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
import yaml

from tests.servers import metadata
from wmtp_worker.host.notices import INTERVAL

DOCKER = Path(__file__).resolve().parents[2] / "docker"
# steps enough for a command of Docker's to arrive in the middle, also on a machine that has no time
EVERY, STEPS = 5, 100
FIRST_SAVE = f"saved step_{EVERY}:"
SETTINGS = {
    "WMTP_PRESET": "smoke",
    "WMTP_RUN_NAME": "rented",
    "WMTP_MODEL__HIDDEN_SIZE": "32",
    "WMTP_MODEL__INTERMEDIATE_SIZE": "48",
    "WMTP_MODEL__ATTENTION_HEADS": "2",
    "WMTP_TRAINING__MICRO_BATCH_SIZE": "1",
    "WMTP_TRAINING__MAX_STEPS": str(STEPS),
    "WMTP_EVALUATION__EVERY": "0",
    "WMTP_EVALUATION__MAX_BATCHES": "2",
    "WMTP_CHECKPOINT__EVERY": str(EVERY),
    "WMTP_CHECKPOINT__LEASE_SECONDS": "3",
    "WMTP_HOST__THREADS": "1",
}
# the image has no pkill
SIGNAL_THE_WORKER = """for process in /proc/[0-9]*; do
  if [[ $(tr '\\0' ' ' <$process/cmdline) =~ bin/wmtp\\ train ]]; then kill -$0 ${process#/proc/}; fi
done 2>/dev/null; true"""
DIGEST = ("sha256sum", "/workspace/checkpoints/rented/final.pt")


def variables(**more: str) -> tuple[str, ...]:
    return tuple(f"--env={name}={value}" for name, value in (SETTINGS | more).items())


@pytest.fixture(scope="module")
def undisturbed(image, docker) -> str:
    """The digest of the run's final model where nothing happens."""
    command = ("bash", "-c", f"start.sh >&2 && {' '.join(DIGEST)}")
    found = docker("run", "--rm", "--network", "none", *variables(), image, *command, timeout=600)
    return str(found.stdout.split()[0])


@contextmanager
def serve(handler):
    """A server on loopback: its address, and what `handler` adds to the list of what it was asked."""
    asked = []
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"asked": asked, "log_message": lambda *_: None}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def vast_api():
    """Vast.ai's API: what it was asked."""

    class Api(BaseHTTPRequestHandler):
        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.asked.append((self.path, self.headers["Authorization"], json.loads(body)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"success": true}')

    with serve(Api) as found:
        yield found


@pytest.fixture
def ec2_api():
    """EC2's API for StopInstances: what it was asked, and by whose keys."""

    class Api(BaseHTTPRequestHandler):
        def do_POST(self):
            body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            key = re.search("Credential=([^/]+)", self.headers["Authorization"])[1]
            self.asked.append((body["Action"][0], body["InstanceId.1"][0], key))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'<StopInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"/>')

    with serve(Api) as found:
        yield found


def test_vast_replaces_the_entrypoint_kills_and_comes_back(undisturbed, start, docker, vast_api):
    url, asked = vast_api
    own = {"CONTAINER_ID": "4242", "CONTAINER_API_KEY": "of-this-container", "VAST_URL": url, "WMTP_WHEN_DONE": "stop"}
    # in Vast's place: root, a first process that is not the image's, and sessions that lack the container's variables
    options = ("--user", "0:0", "--network", "host", "--entrypoint", "bash", *variables(**own))
    container = start("-c", "sleep infinity & wait", options=options)
    onstart = (DOCKER / "vast/onstart.sh").read_text()

    def session(*command: str) -> str:
        return str(docker("exec", container.name, "env", "-i", "PATH=/usr/bin:/bin", *command).stdout)

    def log() -> str:
        return session("bash", "-c", "cat /workspace/start.log 2>/dev/null || true")

    session("bash", "-c", onstart)
    container.until(lambda: FIRST_SAVE in log(), "checkpoint")
    # a second start is harmless; the first one stands still meanwhile, or it would be done too soon
    session("bash", "-c", SIGNAL_THE_WORKER, "STOP")
    session("bash", "-c", onstart)
    container.until(lambda: "is already being trained by pid" in log(), "word of the lock")
    # out of memory: the kernel kills the worker alone, and start.sh starts it again
    session("bash", "-c", SIGNAL_THE_WORKER, "KILL")
    container.until(lambda: "exit code 137; starting again in 5 s" in log(), "restart")
    container.until(lambda: "resuming from" in log(), "a run that went on")
    # the machine is lost without a word, and comes back with its disk
    docker("kill", container.name)
    docker("start", container.name)
    session("bash", "-c", onstart)
    container.until(lambda: asked, "a call that stops the machine")
    assert asked == [("/api/v0/instances/4242/", "Bearer of-this-container", {"state": "stopped"})]
    assert session(*DIGEST).split()[0] == undisturbed
    assert "of-this-container" not in log()


def template(name):
    return yaml.safe_load((DOCKER / name).read_text())


def tiny(given, bucket, seaweed, **more):
    """A template's variables with the tiny run instead of its model and data, in a bucket that is there."""
    left = {name: value for name, value in given.items() if name not in ("WMTP_MODEL__PATH", "WMTP_DATA__DATASET")}
    return left | SETTINGS | {"CLOUD_BUCKET": bucket, "CLOUD_ENDPOINT_URL": seaweed.endpoint} | more


def published(bucket, seaweed):
    """The digest of the final model in the bucket."""
    client = seaweed.client()
    final = client.get_object(Bucket=bucket, Key="team/project/checkpoints/rented/final.pt")["Body"].read()
    client.close()
    return hashlib.sha256(final).hexdigest()


def on_ec2(volume, env_file):
    """The template's unit, as systemd starts it: options of `docker run` and the command; without GPUs."""
    files = {file["path"]: file["content"] for file in template("ec2/cloud-init.yaml")["write_files"]}
    unit = files["/etc/systemd/system/wmtp-worker.service"].replace("\\\n", " ")
    line = re.search("ExecStart=/usr/bin/docker run --rm --name wmtp-worker --gpus all (.*)", unit)[1]
    options, command = line.split("${IMAGE}")
    options = options.replace("/var/lib/wmtp", volume).replace("/etc/wmtp/worker.env", str(env_file))
    return tuple(shlex.split(options)), tuple(shlex.split(command)), files["/etc/wmtp/worker.env"]


def test_ec2_gives_notice_stops_and_goes_on(undisturbed, start, docker, volume, seaweed, ec2_api, tmp_path):
    ec2, asked = ec2_api
    keys, bucket = seaweed.environ, seaweed.make_bucket()
    firmware = tmp_path / "class/dmi/id"
    firmware.mkdir(parents=True)
    (firmware / "sys_vendor").write_text("Amazon EC2\n")
    (tmp_path / "worker.env").touch()
    options, command, given = on_ec2(volume, tmp_path / "worker.env")
    options += ("--network", "host", "--volume", f"{firmware.parents[1]}:/sys/class:ro")
    with metadata.serve() as machine:
        role = {"AccessKeyId": keys["AWS_ACCESS_KEY_ID"], "SecretAccessKey": keys["AWS_SECRET_ACCESS_KEY"], "Token": ""}
        role |= {"Code": "Success", "Type": "AWS-HMAC", "Expiration": "2099-01-01T00:00:00Z"}
        machine.items |= {
            "instance-id": "i-0123",
            "placement/region": "eu-north-1",
            "iam/security-credentials/": "wmtp-worker",
            "iam/security-credentials/wmtp-worker": json.dumps(role),
        }
        more = {"AWS_ENDPOINT_URL_EC2": ec2, **machine.environ("ec2"), "WMTP_CHECKPOINT__LEASE_SECONDS": "30"}
        found = tiny(dict(line.split("=", 1) for line in given.splitlines()), bucket, seaweed, **more)
        (tmp_path / "worker.env").write_text("".join(f"{name}={value}\n" for name, value in found.items()))

        first = start(*command, options=options)
        first.until(lambda: FIRST_SAVE in first.logs(), "checkpoint")
        # it stands still until the next look at the notices is due, or it would be done before
        docker("pause", first.name)
        machine.interrupt(action="stop")
        time.sleep(INTERVAL)
        docker("unpause", first.name)
        assert first.exit_code() == 75, first.logs()
        assert "a notice of ec2: spot interruption, stop" in first.logs()
        assert asked == []  # nobody stops a machine that goes
        first.remove()

        del machine.items["spot/instance-action"]
        second = start(*command, options=options)
        assert second.exit_code() == 0, second.logs()
        assert asked == [("StopInstances", "i-0123", keys["AWS_ACCESS_KEY_ID"])]
    assert re.search(r"resuming from /workspace/checkpoints/rented/step_\d+", second.logs())
    assert published(bucket, seaweed) == undisturbed


def on_vessl(bucket, seaweed):
    """Options, command and the seconds between SIGTERM and SIGKILL of a run of VESSL's: a shell in place of the image's
    entrypoint, as root; nothing stays."""
    run = template("vessl.yaml")
    given = {name: value["value"] if isinstance(value, dict) else value for name, value in run["env"].items()}
    found = tiny(given, bucket, seaweed, **seaweed.environ, VESSL_EXPERIMENT_ID="1")
    (step,) = run["run"]
    options = ("--user", "0:0", "--workdir", step["workdir"], "--entrypoint", "bash")
    return options, found, ("-c", step["command"]), int(found["WMTP_STOP_GRACE_SECONDS"])


def on_kubernetes(bucket, seaweed):
    """The same of a pod of the Job: the image's entrypoint, locked down, on volumes that go with the pod."""
    pod = template("kubernetes/job.yaml")["spec"]["template"]["spec"]
    (worker,) = pod["containers"]
    assert worker["securityContext"]["readOnlyRootFilesystem"]
    assert worker["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    found = tiny({one["name"]: one["value"] for one in worker["env"]}, bucket, seaweed, **seaweed.environ)
    user, group = pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]
    options = ("--user", f"{user}:{group}", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    for mount in worker["volumeMounts"]:
        options += ("--tmpfs", f"{mount['mountPath']}:exec,mode=2777,gid={group}")
    found["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
    return options, found, tuple(worker["args"]), pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("host", "other"), [(on_vessl, on_kubernetes), (on_kubernetes, on_vessl)])
def test_what_a_host_ends_goes_on_on_the_other(undisturbed, start, docker, seaweed, host, other):
    bucket = seaweed.make_bucket()

    def begin(options, variables, command, grace):
        variables = tuple(f"--env={name}={value}" for name, value in variables.items())
        return start(*command, options=("--network", "host", *options, *variables)), grace

    ended, grace = begin(*host(bucket, seaweed))
    ended.until(lambda: FIRST_SAVE in ended.logs(), "checkpoint")
    docker("stop", "--time", str(grace), ended.name, timeout=grace + 60)
    assert ended.exit_code() == 75, ended.logs()
    ended.remove()

    last, _ = begin(*other(bucket, seaweed))
    assert last.exit_code() == 0, last.logs()
    assert re.search(r"fetched step_\d+ from the bucket", last.logs())
    assert published(bucket, seaweed) == undisturbed
