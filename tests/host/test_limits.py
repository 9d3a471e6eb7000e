"""The limits of machines and containers of every kind, shown as files."""

import os
import subprocess
import sys

import pytest

from wmtp_worker.host.limits import (
    cap_threads,
    cpu_limit,
    disk_free,
    memory_available,
    memory_limit,
    process_limit,
    shm_size,
    visible_cpus,
)

GIB = 1 << 30
MEMINFO = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree:  1 kB\n"}
V2 = {"proc/self/cgroup": "0::/\n"}
V2_NESTED = {"proc/self/cgroup": "0::/user.slice/worker.service\n"}
V1 = {
    "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc\n"
}


@pytest.fixture
def machine(tmp_path):
    def build(*parts):
        for part in parts:
            for name, content in part.items():
                file = tmp_path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(content)
        return tmp_path

    return build


def cgroup(**files):
    return {f"sys/fs/cgroup/{name}": content for name, content in files.items()}


@pytest.fixture
def many_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ([], 64),
        ([V2, cgroup(**{"cpu.max": "max 100000\n"})], 64),
        ([V2, cgroup(**{"cpu.max": "250000 100000\n"})], 2.5),
        ([V2, cgroup(**{"cpu.max": "50000 100000\n"})], 0.5),
        ([V2, cgroup(**{"cpu.max": "max\n"})], 64),
        ([V2, cgroup(**{"cpu.max": "25600000 100000\n"})], 64),
        ([V2_NESTED, cgroup(**{"user.slice/worker.service/cpu.max": "100000 100000\n"})], 1),
        (
            [
                V2_NESTED,
                cgroup(
                    **{
                        "user.slice/cpu.max": "300000 100000\n",
                        "user.slice/worker.service/cpu.max": "max 100000\n",
                    }
                ),
            ],
            3,
        ),
        ([V1, cgroup(**{"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})], 64),
        ([V1, cgroup(**{"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"})], 2.5),
        ([V1, cgroup(**{"cpu,cpuacct/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/cpu.cfs_period_us": "200000\n"})], 2),
        (
            [
                V1,
                cgroup(
                    **{
                        "cpu/docker/abc/cpu.cfs_quota_us": "150000\n",
                        "cpu/docker/abc/cpu.cfs_period_us": "100000\n",
                    }
                ),
            ],
            1.5,
        ),
        ([V1, cgroup(**{"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "0\n"})], 64),
        # inside a container without a cgroup namespace, our path is not below the mount: the mount itself is ours
        ([{"proc/self/cgroup": "0::/docker/abc\n"}, cgroup(**{"cpu.max": "250000 100000\n"})], 2.5),
        # v1, with v2 mounted beside it, where it has no controllers
        (
            [
                V1,
                cgroup(
                    **{
                        "unified/cgroup.procs": "1\n",
                        "cpu/cpu.cfs_quota_us": "4600000\n",
                        "cpu/cpu.cfs_period_us": "100000\n",
                    }
                ),
            ],
            46,
        ),
    ],
)
def test_cpu_limit(machine, files, cores):
    assert cpu_limit(machine(*files)) == cores


def test_cpu_limit_is_never_more_than_the_cpus_we_may_run_on(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert cpu_limit(machine(V2, cgroup(**{"cpu.max": "800000 100000\n"}))) == 1


@pytest.mark.parametrize(
    ("files", "size"),
    [
        ([], None),
        ([MEMINFO], 16 * GIB),
        ([MEMINFO, V2, cgroup(**{"memory.max": "max\n"})], 16 * GIB),
        ([MEMINFO, V2, cgroup(**{"memory.max": f"{2 * GIB}\n"})], 2 * GIB),
        ([V2, cgroup(**{"memory.max": f"{2 * GIB}\n"})], 2 * GIB),
        ([MEMINFO, V2, cgroup(**{"memory.max": f"{32 * GIB}\n"})], 16 * GIB),
        (
            [
                MEMINFO,
                V2_NESTED,
                cgroup(**{"user.slice/memory.max": f"{GIB}\n", "user.slice/worker.service/memory.max": "max\n"}),
            ],
            GIB,
        ),
        ([MEMINFO, V1, cgroup(**{"memory/memory.limit_in_bytes": "9223372036854771712\n"})], 16 * GIB),
        ([V1, cgroup(**{"memory/memory.limit_in_bytes": "9223372036854771712\n"})], None),
        ([MEMINFO, V1, cgroup(**{"memory/memory.limit_in_bytes": f"{3 * GIB}\n"})], 3 * GIB),
        ([MEMINFO, V1, cgroup(**{"memory/docker/abc/memory.limit_in_bytes": f"{GIB}\n"})], GIB),
        ([MEMINFO, V2, cgroup(**{"memory.max": "\n"})], 16 * GIB),
        ([MEMINFO, V2, cgroup(**{"memory.max": f"{4 * GIB}\n", "memory.high": f"{3 * GIB}\n"})], 3 * GIB),
        # the limit of a pod, outside of what its container sees
        (
            [
                MEMINFO,
                V1,
                cgroup(
                    **{
                        "memory/memory.limit_in_bytes": "9223372036854771712\n",
                        "memory/memory.stat": f"cache 1\nhierarchical_memory_limit {5 * GIB}\ntotal_rss 7\n",
                    }
                ),
            ],
            5 * GIB,
        ),
        (
            [
                V1,
                cgroup(
                    **{
                        "memory/memory.limit_in_bytes": f"{GIB}\n",
                        "memory/memory.stat": "hierarchical_memory_limit 9223372036854771712\n",
                    }
                ),
            ],
            GIB,
        ),
    ],
)
def test_memory_limit(machine, files, size):
    assert memory_limit(machine(*files)) == size


def test_memory_available(machine):
    own = {"proc/self/statm": "9 1 0 0 0 0 0\n"}  # one resident page
    free = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 4194304 kB\n"}
    assert memory_available(machine(free, own)) == 4 * GIB
    assert memory_available(machine(V2, cgroup(**{"memory.max": f"{GIB}\n"}))) == GIB - os.sysconf("SC_PAGE_SIZE")
    assert memory_available(machine({"proc/meminfo": ""}, cgroup(**{"memory.max": "max\n"}))) is None


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], None),
        ([V2, cgroup(**{"pids.max": "max\n", "pids.current": "9\n"})], None),
        ([V2, cgroup(**{"pids.max": "100\n", "pids.current": "9\n"})], (100, 9)),
        ([V2, cgroup(**{"pids.max": "100\n"})], (100, 0)),
        (
            [
                V2_NESTED,
                cgroup(
                    **{
                        "user.slice/pids.max": "300\n",
                        "user.slice/pids.current": "290\n",
                        "user.slice/worker.service/pids.max": "100\n",
                        "user.slice/worker.service/pids.current": "9\n",
                    }
                ),
            ],
            (300, 290),
        ),
        (
            [
                {"proc/self/cgroup": "8:pids:/docker/abc\n0::/\n"},
                cgroup(**{"pids/pids.max": "64\n", "pids/pids.current": "5\n"}),
            ],
            (64, 5),
        ),
    ],
)
def test_process_limit(machine, files, found):
    assert process_limit(machine(*files)) == found


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize(
    ("quota", "before", "after"),
    [
        ("250000 100000", {}, {"OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2"}),
        ("50000 100000", {}, {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}),
        ("250000 100000", {"OMP_NUM_THREADS": "7"}, {"OMP_NUM_THREADS": "7", "RAYON_NUM_THREADS": "2"}),
        ("max 100000", {}, {}),
        ("6400000 100000", {}, {}),
    ],
)
def test_pools_of_threads_follow_the_quota(machine, quota, before, after):
    environ = dict(before)
    cap_threads(environ, machine(V2, cgroup(**{"cpu.max": quota})))
    assert environ == after


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_a_cpuset_narrows_the_affinity():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from wmtp_worker.host.limits import cpu_limit; print(cpu_limit() <= 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_this_machine():
    assert 0 < cpu_limit() <= visible_cpus() <= (os.cpu_count() or 1)
    assert (memory_limit() or 0) > 64 << 20


def test_disk_free_of_a_folder_that_is_not_there_yet(tmp_path):
    before = disk_free(tmp_path)
    assert before > 0
    # others write to the same disk meanwhile
    assert disk_free(tmp_path / "not/there/yet") == pytest.approx(before, rel=0.2)
    assert disk_free(tmp_path / ("long" * 100) / "yet") == pytest.approx(before, rel=0.2)


def test_shared_memory(tmp_path):
    assert shm_size(tmp_path) is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert (shm_size(tmp_path) or 0) > 0
