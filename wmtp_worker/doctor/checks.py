"""The checks, in their order. Earlier ones measure what later ones judge by."""

from collections.abc import Callable, Iterator

from wmtp_worker.doctor import gpus, machine, remote, run
from wmtp_worker.doctor.case import Case
from wmtp_worker.doctor.check import Check, Probe, Status, examine
from wmtp_worker.settings import Settings

# seconds: torch's libraries may lie on a cold network disk
_IMPORT = 120.0


def checks(settings: Settings, *, quick: bool = False, poll: Callable[[], None] = lambda: None) -> Iterator[Check]:
    """Every check for the run these settings describe, in order, each made when it is asked for.

    `quick`: only those that need neither torch nor a server beyond this machine: under a second, but for a metadata
    service that does not answer. `poll` may raise to stop. Never raises for what it finds.
    """
    case = Case(settings)
    return examine((probe for probe in probes(case, quick=quick) if probe.quick or not quick), poll)


def probes(case: Case, *, quick: bool = False) -> tuple[Probe, ...]:
    workdir = case.settings.run.workdir
    # start.sh refuses a machine for a failure of the quick ones: neither for what is slow once, nor for a full disk,
    # where the worker that goes on sweeps first and counts older saves as room
    at_worst: Status = "warn" if quick else "fail"
    return (
        Probe("python", machine.python),
        Probe("torch", lambda: machine.torch_version(imported=not quick), seconds=_IMPORT, late=at_worst),
        Probe("host", lambda: machine.host(case)),
        Probe("driver", lambda: gpus.driver(case), seconds=30, late=at_worst),
        Probe("device", lambda: machine.device(case.settings.host.device), seconds=60, late="fail", quick=False),
        Probe("architecture", lambda: gpus.architecture(case), seconds=60, quick=False),
        Probe("gpu health", lambda: gpus.health(case)),
        Probe("gpu memory", lambda: gpus.memory(case)),
        Probe("nccl", lambda: gpus.nccl(case), seconds=gpus.COLLECTIVE_SECONDS + 30, late="fail", quick=False),
        Probe("cpu", machine.cpu),
        Probe("memory", machine.memory),
        Probe("processes", machine.processes),
        Probe("/dev/shm", machine.shared_memory),
        Probe("work directory", lambda: machine.workdir(workdir), late=at_worst),
        Probe("disk", lambda: machine.disk(workdir, full=at_worst)),
        Probe("disk speed", lambda: machine.disk_speed(case), seconds=30, quick=False),
        Probe("packaged files", machine.packaged_files),
        Probe("metadata", lambda: remote.metadata(case)),
        Probe("clock", lambda: _clock(case, quick)),
        Probe("bucket", lambda: remote.bucket(case), seconds=60, late="fail", quick=False),
        Probe("model and data", lambda: run.assets(case), seconds=20, quick=False),
        Probe("model", lambda: run.model(case), seconds=_IMPORT, quick=False),
        Probe("room for saves", lambda: run.room(case), quick=False),
        Probe("last save", lambda: run.notice(case), quick=False),
        Probe("tracking", lambda: remote.tracking(case), seconds=60, quick=False),
    )


def _clock(case: Case, quick: bool) -> Check:
    if not quick:
        remote.ask_clock(case)
    return machine.clock(case)
