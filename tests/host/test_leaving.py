"""Stopping one's own machine: the exact call of each host, to servers on loopback; secrets in the header alone."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from wmtp_worker.errors import HostError, SettingsError
from wmtp_worker.host import leaving
from wmtp_worker.host.leaving import Nothing, check_address, plan
from wmtp_worker.host.where import Host

KEY = "secret-6f1c0a"
VAST = {"CONTAINER_API_KEY": KEY}


class Api(ThreadingHTTPServer):
    """Any host's API and metadata service: remembers what it was asked, answers what it was told to."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = []  # (method, path, authorization, body)
        self.answers = []  # (status, text), the last one for good
        self.items = {}  # path of a metadata service: text

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.path in self.server.items:
            status, text = 200, self.server.items[self.path]
        elif self.path.startswith(("/computeMetadata", "/metadata", "/latest")):
            status, text = 404, ""
        else:
            self.server.asked.append((self.command, self.path, self.headers["Authorization"], body))
            answers = self.server.answers
            status, text = answers.pop(0) if len(answers) > 1 else (answers or [(200, "{}")])[0]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if text == "silence":
            threading.Event().wait(4)  # time.sleep is patched here
        self.wfile.write(text.encode())

    do_GET = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, *_):
        pass


@pytest.fixture
def api():
    with Api() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def apis(api):
    return dict.fromkeys(leaving.APIS, api.url)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


def test_vast_is_stopped_and_destroyed_with_the_key_of_the_container(api, apis):
    host = Host("vast", "", instance="4242")
    for destroy, method, body in ((False, "PUT", {"state": "stopped"}), (True, "DELETE", {})):
        call = plan(host, VAST, destroy=destroy, apis=apis)
        assert KEY not in f"{call} {call!r}"
        assert str(call).startswith(f"{method} {api.url}/api/v0/instances/4242/ ")
        call.go()
        asked = api.asked.pop()
        assert asked[:3] == (method, "/api/v0/instances/4242/", f"Bearer {KEY}")
        assert json.loads(asked[3]) == body
    assert api.asked == []


def test_runpod_is_stopped_and_destroyed(api, apis):
    host = Host("runpod", "", instance="pod/1")
    for destroy, method, path in ((False, "POST", "/pods/pod%2F1/stop"), (True, "DELETE", "/pods/pod%2F1")):
        plan(host, {"RUNPOD_API_KEY": KEY}, destroy=destroy, apis=apis).go()
        assert api.asked.pop() == (method, path, f"Bearer {KEY}", "")


def test_google_is_stopped_as_its_service_account(api, apis):
    items = {
        "instance/zone": "projects/123/zones/europe-west4-a",
        "instance/name": "worker-1",
        "project/project-id": "my-project",
        "instance/service-accounts/default/token": json.dumps({"access_token": KEY, "expires_in": 3599}),
    }
    api.items = {f"/computeMetadata/v1/{item}": text for item, text in items.items()}
    environ = {"GCE_METADATA_HOST": api.url.removeprefix("http://")}
    path = "/projects/my-project/zones/europe-west4-a/instances/worker-1"
    for destroy, call in ((False, ("POST", f"{path}/stop")), (True, ("DELETE", path))):
        plan(Host("gcp", ""), environ, destroy=destroy, apis=apis).go()
        assert api.asked.pop() == (*call, f"Bearer {KEY}", "")


def test_azure_is_deallocated_as_its_managed_identity(api, apis):
    resource = "/subscriptions/s/resourceGroups/g/providers/Microsoft.Compute/virtualMachines/worker"
    scope = "https%3A%2F%2Fmanagement.azure.com%2F"
    api.items = {
        "/metadata/instance/compute/resourceId?api-version=2021-02-01&format=text": resource,
        f"/metadata/identity/oauth2/token?api-version=2018-02-01&resource={scope}": json.dumps({"access_token": KEY}),
    }
    environ = {"AZURE_METADATA_SERVICE_ENDPOINT": api.url}
    version = "?api-version=2024-07-01"
    for destroy, call in ((False, ("POST", f"{resource}/deallocate{version}")), (True, ("DELETE", resource + version))):
        plan(Host("azure", ""), environ, destroy=destroy, apis=apis).go()
        assert api.asked.pop() == (*call, f"Bearer {KEY}", "")


def test_machine_without_an_identity_is_told_what_to_do(api, apis):
    api.items = {"/metadata/instance/compute/resourceId?api-version=2021-02-01&format=text": "/vm"}
    call = plan(Host("azure", ""), {"AZURE_METADATA_SERVICE_ENDPOINT": api.url}, apis=apis)
    with pytest.raises(SettingsError, match=r"metadata/identity/oauth2/token.* -> give the machine an identity"):
        call.go()
    assert api.asked == []


def test_busy_host_is_asked_again_and_one_that_refuses_is_not(api, apis):
    call = plan(Host("vast", "", instance="1"), VAST, apis=apis)
    api.answers = [(503, "busy"), (429, "slow down"), (200, '{"success": true}')]
    call.go()
    assert len(api.asked) == 3

    for answer in ((401, "who are\nyou?"), (200, '{"success": false, "msg": "no such instance"}'), (302, "elsewhere")):
        api.asked, api.answers = [], [answer]
        with pytest.raises(SettingsError, match=r"the host's API answers \d+: .* -> see whether CONTAINER_API_KEY may"):
            call.go()
        assert len(api.asked) == 1

    api.asked, api.answers = [], [(500, "down")]
    with pytest.raises(HostError, match=r"answers 500: down \(from PUT http"):
        call.go()
    assert len(api.asked) == 4


def test_a_refusal_that_breaks_off_is_still_one(api, apis, monkeypatch):
    monkeypatch.setattr(leaving, "_SECONDS", 1.5)
    api.answers = [(403, "silence")]
    with pytest.raises(SettingsError, match="the host's API answers 403"):
        plan(Host("vast", "", instance="1"), VAST, apis=apis).go()


def test_machine_that_is_gone_already_is_no_error(api, apis):
    api.answers = [(503, "half done"), (404, "no such instance")]
    plan(Host("vast", "", instance="1"), VAST, destroy=True, apis=apis).go()


def test_host_that_cannot_be_reached_is_an_error_without_the_key(api, apis):
    call = plan(Host("vast", "", instance="1"), VAST, apis={"vast": "http://127.0.0.1:9"})
    with pytest.raises(HostError) as found:
        call.go()
    assert KEY not in str(found.value)


@pytest.mark.parametrize(
    ("host", "environ", "words"),
    [
        (Host("vast", "", instance="1"), {}, "CONTAINER_API_KEY is not set"),
        (Host("vast", "", instance="../x"), VAST, "'../x' is no number of an instance"),
        (Host("runpod", "", instance="p"), {}, "RUNPOD_API_KEY is not set"),
        (Host("ec2", ""), {"AWS_EC2_METADATA_DISABLED": "true"}, "AWS_EC2_METADATA_DISABLED is set"),
    ],
)
def test_missing_credential_is_a_clear_error(host, environ, words):
    with pytest.raises(SettingsError, match=words):
        plan(host, environ)


def test_token_goes_nowhere_without_tls():
    with pytest.raises(SettingsError, match="no https://"):
        plan(Host("vast", "", instance="1"), VAST | {"VAST_URL": "http://console.vast.ai"}).go()
    check_address("https://console.vast.ai/api")


@pytest.mark.parametrize("name", ["bare", "vessl", "kubernetes", "sagemaker"])
def test_nothing_is_called_where_nothing_has_to_be(name):
    found = plan(Host(name, ""), {})
    assert isinstance(found, Nothing)
    found.go()


def test_ec2_stops_and_terminates_itself(monkeypatch):
    moto = pytest.importorskip("moto")
    import boto3

    from tests.servers.metadata import serve

    monkeypatch.setenv("MOTO_EC2_LOAD_DEFAULT_AMIS", "false")  # thousands, which take seconds
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with moto.mock_aws():
        client = boto3.client("ec2", region_name="eu-north-1")
        began = client.run_instances(ImageId="ami-12345678", MinCount=2, MaxCount=2)["Instances"]
        own, other = (instance["InstanceId"] for instance in began)

        def state(instance):
            found = client.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
            return found["State"]["Name"]

        with serve() as metadata:
            metadata.items |= {"placement/region": "eu-north-1", "instance-id": own}
            environ = metadata.environ("ec2")
            call = plan(Host("ec2", ""), environ)
            assert str(call).startswith(f"ec2:StopInstances {own} in eu-north-1, ")
            call.go()
            assert (state(own), state(other)) == ("stopped", "running")
            plan(Host("ec2", "", instance=own), environ, destroy=True).go()
            assert (state(own), state(other)) == ("terminated", "running")

            metadata.items["instance-id"] = "i-00000000000000000"
            with pytest.raises(SettingsError, match=r"InvalidInstanceID.* -> stop the instance by hand"):
                plan(Host("ec2", ""), environ).go()


def wmtp(*arguments, **environ):
    command = [sys.executable, "-m", "wmtp_worker", "host", *arguments]
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, env=path | environ, capture_output=True, text=True, timeout=180)


def test_dry_run_shows_the_call_and_does_nothing(api):
    environ = VAST | {"CONTAINER_ID": "77", "VAST_URL": api.url}
    found = wmtp("stop", "--dry-run", **environ)
    call = f'vast: PUT {api.url}/api/v0/instances/77/ {{"state": "stopped"}}, authorized by CONTAINER_API_KEY'
    assert (found.returncode, found.stdout, found.stderr) == (0, f"{call} (not done: --dry-run)\n", "")
    assert api.asked == []
    found = wmtp("stop", "--destroy", **environ)
    assert found.returncode == 0
    assert [asked[0] for asked in api.asked] == ["DELETE"]


def test_command_asks_for_a_notice_that_stands():
    from tests.servers.metadata import serve

    with serve() as metadata:
        environ = metadata.environ("ec2") | {"WMTP_HOST__NOTICES": "ec2"}
        assert wmtp("notices", **environ).returncode == 0
        metadata.rebalance()
        assert wmtp("notices", **environ).returncode == 0
        metadata.interrupt()
        found = wmtp("notices", **environ)
        assert found.returncode == 75
        assert found.stdout.startswith("ec2: spot interruption, terminate at ")
    assert wmtp("notices", **environ).stdout.startswith("not known: ")
