"""From a job that was remembered to the host that has it."""

from collections.abc import Callable, Mapping

from wmtp_worker.errors import InputError
from wmtp_worker.launch.container import Container
from wmtp_worker.launch.detached import Detached
from wmtp_worker.launch.ec2 import Ec2
from wmtp_worker.launch.host import Host
from wmtp_worker.launch.register import Record
from wmtp_worker.launch.shell import LocalShell
from wmtp_worker.launch.ssh import Address, SshShell
from wmtp_worker.launch.vast import Vast
from wmtp_worker.launch.vessl import Vessl

Check = Callable[[], None]


def _ssh(name: str, facts: Mapping[str, str], check: Check) -> Host:
    shell = SshShell(Address.parse(facts["address"]), facts.get("host_key"), check)
    return Detached(shell, name)


def _ssh_docker(name: str, facts: Mapping[str, str], check: Check) -> Host:
    return Container(SshShell(Address.parse(facts["address"]), facts.get("host_key"), check), name)


def _docker(name: str, facts: Mapping[str, str], check: Check) -> Host:
    return Container(LocalShell(check), name, context=facts.get("context"))


def _ec2(name: str, facts: Mapping[str, str], check: Check) -> Host:
    return Ec2(name, facts["region"], check=check)


def _vast(name: str, facts: Mapping[str, str], check: Check) -> Host:
    return Vast(name, instance=facts["instance"], check=check)


def _vessl(name: str, facts: Mapping[str, str], check: Check) -> Host:
    return Vessl(LocalShell(check), name, number=facts["number"], check=check)


_KINDS: Mapping[str, Callable[[str, Mapping[str, str], Check], Host]] = {
    "ssh": _ssh,
    "ssh-docker": _ssh_docker,
    "docker": _docker,
    "ec2": _ec2,
    "vast": _vast,
    "vessl": _vessl,
}


def host_of(record: Record, check: Check = lambda: None) -> Host:
    """Raises `InputError` for a kind that this version does not know."""
    if record.kind not in _KINDS:
        raise InputError(
            f"{record.kind!r} is no kind of host", where=record.name, fix="use the version that launched it"
        )
    return _KINDS[record.kind](record.name, record.facts, check)
