"""What starting and ending a server takes, however busy the machine is."""

import contextlib
import os
import random
import socket
import subprocess
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on.

    None is of those that the kernel gives to outgoing connections: between now and the server's start, any of the
    tests that run beside this one may make one.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 32768
    candidates = list(range(10_000, first) if first > 12_000 else range(61_000, 65_536))
    # those of the processes of one pytest are apart: each is given long before its server listens
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    candidates = [port for port in candidates if port % 8 == own % 8]
    random.SystemRandom().shuffle(candidates)  # another copy of the tests draws others
    found: list[int] = []
    while len(found) < count:
        port = candidates.pop()
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a server to end, and end it where it does not."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
