"""The templates of the hosts say what the code says: variables, exit codes, grace periods. Their tools take them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from wmtp_worker.errors import AGAIN, DONE, EXIT_CODES, RESTARTED
from wmtp_worker.host.stop import GRACE
from wmtp_worker.launch import ec2
from wmtp_worker.settings import load
from wmtp_worker.settings.environment import KNOWN
from wmtp_worker.settings.secrets import SECRET_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
FINAL = set(EXIT_CODES) - RESTARTED - {DONE}
# 128 + the signals of a death that the worker could not help: ILL, ABRT, BUS, FPE, KILL, SEGV
KILLED = {132, 134, 135, 136, 137, 139}


def read(name):
    return yaml.safe_load((DOCKER / name).read_text())


def vast():
    return json.loads((DOCKER / "vast/template.json").read_text())


def job():
    return read("kubernetes/job.yaml")["spec"]


def worker_of_the_job():
    return job()["template"]["spec"]["containers"][0]


def cloud_init(path):
    return next(file["content"] for file in read("ec2/cloud-init.yaml")["write_files"] if file["path"] == path)


def unit(text=None):
    """A systemd unit, the template's unless given: key to its values."""
    text = (text or cloud_init("/etc/systemd/system/wmtp-worker.service")).replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        key, given, value = line.partition("=")
        if given and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def quick_start_of_vast():
    """The value of --env as a shell would give it to `vastai create instance`."""
    page = (ROOT / "docs/hosts/vast.md").read_text()
    (block,) = re.findall(r"^ *```\n(.*?\n) *```$(?=\n *`--bid_price`)", page, re.DOTALL | re.MULTILINE)
    script = (
        "pip() { :; }; docker() { :; }; vastai() { while (($# > 1)); do shift; [[ $1 != --env ]] || echo $2; done; }\n"
    )
    found = subprocess.run(["bash", "-c", script + block], capture_output=True, text=True, timeout=180, check=True)
    assert found.stdout.count("\n") == 1  # vastai splits at spaces alone
    return shlex.split(found.stdout)


def variables():
    """Template to the variables that it gives the worker."""
    words = shlex.split(vast()["env"])
    vessl = read("vessl.yaml")["env"]
    sky = read("skypilot.yaml")
    env_file = cloud_init("/etc/wmtp/worker.env").splitlines()
    return {
        "vast": dict(word.split("=", 1) for word in words if word != "-e"),
        "vast.md": dict(word.split("=", 1) for word in quick_start_of_vast() if word != "-e"),
        "vessl": {name: v["value"] if isinstance(v, dict) else v for name, v in vessl.items()},
        "ec2": dict(line.split("=", 1) for line in env_file),
        "kubernetes": {one["name"]: one["value"] for one in worker_of_the_job()["env"]},
        "skypilot": sky["envs"] | {name: value or "" for name, value in sky["secrets"].items()},
        "compose": {
            name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)
            for name, value in read("compose.yaml")["services"]["worker"]["environment"].items()
        },
    }


@pytest.mark.parametrize("template", variables())
def test_variables_are_known_and_their_values_are_valid(template):
    found = variables()[template]
    assert all(isinstance(value, str) for value in found.values())
    assert {name for name in found if name.startswith(("WMTP_", "CLOUD_"))} <= set(KNOWN)
    settings = load(environ=found)
    assert settings.cloud.provider == "s3"
    assert settings.cloud.bucket


@pytest.mark.parametrize("template", sorted(set(variables()) - {"compose"}))
def test_what_the_guides_push_is_what_is_trained(template):
    pushed = {"./my-llama": "", "./mbpp": " --dataset"}
    for guide in "README", "ec2", "vast", "vessl":
        page = (ROOT / f"docs/hosts/{guide}.md").read_text()
        assert dict(re.findall(r"wmtp assets push (\S+?)( --dataset|(?=[` ]))", page)) == pushed, guide
    settings = load(environ=variables()[template])
    found = (settings.model.path, settings.data.dataset, settings.cloud.prefix)
    assert found == ("my-llama", "mbpp", "team/project")


def test_a_rented_machine_that_nobody_ends_does_not_idle():
    found = variables()
    assert found["vast"] == found["vast.md"]
    assert (found["vast"]["WMTP_WHEN_DONE"], found["vast"]["WMTP_WHEN_IDLE"]) == ("stop", "stop")


@pytest.mark.parametrize("template", sorted(set(variables()) - {"compose"}))
def test_no_secret_stands_in_a_template(template):
    assert [value for name, value in variables()[template].items() if name in SECRET_VARIABLES and value] == []


def test_start_sh_tells_the_exit_codes_and_restarts_after_those_of_the_code():
    help_text = " ".join((ROOT / "entrypoint/start.sh").read_text().split())
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in help_text
    script = f"source '{ROOT}/entrypoint/lib.sh'; source '{ROOT}/entrypoint/supervise.sh'"
    loop = "for ((code = 0; code < 256; code++)); do if is_worth_a_restart $code; then echo $code; fi; done"
    found = subprocess.run(["bash", "-c", f"{script}; {loop}"], capture_output=True, text=True, timeout=180, check=True)
    assert {int(code) for code in found.stdout.split()} == RESTARTED | KILLED


UNITS = {"template": unit(), "launched": unit(ec2._UNIT)}


@pytest.mark.parametrize("found", UNITS.values(), ids=UNITS)
def test_systemd_restarts_after_the_same(found):
    for key, wanted in {
        "RestartForceExitStatus": RESTARTED | KILLED,
        "SuccessExitStatus": RESTARTED | KILLED,  # else FailureAction acts before any restart
        "RestartPreventExitStatus": FINAL,
    }.items():
        assert {int(code) for code in found[key][0].split()} == wanted


# systemd as a user's manager, which starts only where the machine seems to be booted with it, and sees nobody else
ALONE = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
BOOT = "mount -t tmpfs none /run && mkdir -p /run/systemd/system"
needs_systemd = pytest.mark.skipif(
    not Path("/lib/systemd/systemd").exists()
    or subprocess.run([*ALONE, "sh", "-c", BOOT], capture_output=True).returncode != 0,
    reason="no systemd, or no namespaces for it",
)


@needs_systemd
@pytest.mark.parametrize("found", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize(("code", "starts"), [(0, 1), (75, 2), (137, 2), (78, 1), (125, 1)])
def test_a_real_systemd_starts_again_what_is_worth_it_before_it_powers_off(tmp_path, found, code, starts):
    assert starts_before_it_powers_off(tmp_path, found, code) == starts


def starts_before_it_powers_off(tmp_path, found, code):
    """How often a worker that ends with `code` is started; raises `TimeoutExpired` where the machine stays on."""
    decides = [f"{key}={found[key][0]}" for key in found if key.startswith(("Restart", "Success", "ExecStopPost"))]
    decides = [line.replace("systemctl --no-block poweroff", "systemctl --user --no-block exit") for line in decides]
    lines = [
        *("[Unit]", "DefaultDependencies=no", "StartLimitIntervalSec=3600", "StartLimitBurst=2"),
        *("FailureAction=exit", "StartLimitAction=exit"),  # of a user's manager: its way to power off
        *("[Service]", f"ExecStart=/bin/sh -c 'echo >>{tmp_path}/starts; exit {code}'", *decides, "RestartSec=0"),
    ]
    (tmp_path / "systemd/user").mkdir(parents=True)
    (tmp_path / "systemd/user/worker.service").write_text("\n".join(lines) + "\n")
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)}
    environ |= {"XDG_RUNTIME_DIR": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    # beside the shell: as the first process it would be the system's manager
    command = [*ALONE, "sh", "-c", f"{BOOT}; /lib/systemd/systemd --user --unit=worker.service; true"]
    subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, timeout=180)
    return len((tmp_path / "starts").read_text())


def test_systemd_powers_a_machine_off_that_trains_nothing():
    for found in unit(), unit(ec2._UNIT):
        assert found["FailureAction"] == found["StartLimitAction"] == ["poweroff"]


def test_systemd_waits_longer_than_docker_and_docker_as_long_as_the_worker_is_told():
    found = unit()
    grace = int(variables()["ec2"][GRACE])
    assert f"--time {grace} " in found["ExecStop"][0]
    assert int(found["TimeoutStopSec"][0]) > grace


def test_systemd_knows_every_key_of_the_unit(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    file = tmp_path / "wmtp-worker.service"
    # docker is not where it is on the machine that this is for
    file.write_text(cloud_init(f"/etc/systemd/system/{file.name}").replace("/usr/bin/docker", "/bin/true"))
    found = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=180)
    ours = [line for line in found.stderr.splitlines() if file.name in line and "docker.service" not in line]
    assert (found.returncode, ours) == (0, [])


@pytest.mark.parametrize(
    ("image", "login"),
    [
        ("1234.dkr.ecr.eu-north-1.amazonaws.com/wmtp:1", "docker login --username AWS --password-stdin "),
        ("my-registry/wmtp-worker:latest", ""),
    ],
)
def test_the_image_is_pulled_by_the_role_and_again_where_the_registry_is_away(tmp_path, image, login):
    fakes = """
    aws() { echo "aws $*" >>calls; echo token; }
    docker() {
      echo "docker $*" >>calls
      if [[ $1 == login ]]; then cat >token; fi
      [[ $1 != pull || $(grep -c pull calls) == 2 ]]
    }
    sleep() { :; }
    """
    pull = cloud_init("/etc/wmtp/pull.sh")
    assert pull == (ROOT / "wmtp_worker/launch/pull.sh").read_text()  # which `wmtp launch ec2` sends, too
    script = fakes + pull
    subprocess.run(["bash", "-c", script, "pull.sh", image], cwd=tmp_path, timeout=180, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    once = [f"docker pull --quiet {image}"]
    if login:
        once = ["aws ecr get-login-password --region eu-north-1", login + image.split("/")[0], *once]
    assert sorted(calls) == sorted(once * 2)
    assert "/etc/wmtp/pull.sh ${IMAGE}" in unit()["ExecStartPre"][1]


def test_user_data_is_what_cloud_init_and_ec2_take():
    text = (DOCKER / "ec2/cloud-init.yaml").read_text()
    assert text.startswith("#cloud-config\n")
    assert len(text.encode()) <= 16 * 1024
    assert set(read("ec2/cloud-init.yaml")) == {"write_files", "runcmd"}


def test_kubernetes_fails_the_job_where_a_restart_would_not_help():
    rules = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in job()["podFailurePolicy"]["rules"][1:]}
    # 74 is counted: each try is a new pod, which looks for what is in the bucket
    assert rules == {"FailJob": FINAL, "Ignore": {AGAIN}}
    names = {rule["onExitCodes"]["containerName"] for rule in job()["podFailurePolicy"]["rules"][1:]}
    assert names == {worker_of_the_job()["name"]}
    pod = job()["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # or the policy would not be allowed
    assert int(variables()["kubernetes"][GRACE]) < pod["terminationGracePeriodSeconds"]


def test_skypilot_recovers_on_the_same_exit_codes():
    resources = read("skypilot.yaml")["resources"]
    assert set(resources["job_recovery"]["recover_on_exit_codes"]) == RESTARTED
    assert variables()["skypilot"]["WMTP_RESTART"] == "never"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.tracking.yaml"])
def test_compose_files_follow_the_compose_specification(name):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / name]
    found = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert found.returncode == 0, found.stdout


def test_compose_stops_as_late_as_the_worker_is_told():
    worker = read("compose.yaml")["services"]["worker"]
    assert worker["stop_grace_period"] == f"{worker['environment'][GRACE]}s"
    bucket = yaml.safe_load(read("compose.yaml")["configs"]["identities"]["content"])["identities"][0]["credentials"][0]
    given = (worker["environment"]["AWS_ACCESS_KEY_ID"], worker["environment"]["AWS_SECRET_ACCESS_KEY"])
    assert given == (bucket["accessKey"], bucket["secretKey"])


def test_compose_makes_the_buckets_that_are_asked_for_before_anything_is_written():
    development, tracking = read("compose.yaml")["services"], read("compose.tracking.yaml")["services"]
    bucket = development["worker"]["environment"]["CLOUD_BUCKET"]
    artifacts = development["tracking"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://")
    assert f"-bucket={bucket},{artifacts}" in development["bucket"]["command"]
    assert (
        tracking["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"]
        == f"${{TRACKING_ARTIFACTS:-s3://{artifacts}}}"
    )
    assert f"-bucket={artifacts}" in tracking["store"]["command"]


def test_vast_takes_the_template():
    template = vast()
    # what `vastai create template` sends, 1.9.1
    assert set(template) == {
        *("name", "image", "tag", "href", "repo", "env", "onstart", "jup_direct", "ssh_direct", "use_jupyter_lab"),
        *("runtype", "use_ssh", "jupyter_dir", "docker_login_repo", "extra_filters", "recommended_disk_space"),
        *("readme", "readme_visible", "desc", "private"),
    }
    assert template["onstart"] == (DOCKER / "vast/onstart.sh").read_text()
    assert len(template["onstart"]) <= 4048  # the most that Vast keeps
    assert (template["runtype"], template["use_ssh"], template["private"]) == ("ssh", True, True)


@pytest.mark.parametrize("name", ["vast/onstart.sh", "vessl.yaml", "skypilot.yaml"])
def test_start_sh_is_called_where_the_image_has_it(name):
    assert "COPY --chmod=755 entrypoint /opt/wmtp/entrypoint\n" in (ROOT / "Dockerfile").read_text()
    assert "/opt/wmtp/entrypoint/start.sh --resume" in (DOCKER / name).read_text()
