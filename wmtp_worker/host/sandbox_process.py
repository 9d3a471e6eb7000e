"""The sandbox's own processes. Run in an interpreter of their own, which has nothing of the worker's but its code:

    zygote ─ a fresh fork for each job: the supervisor ─ solution      confined, strange code
                                                       └ judge         confined, the data set's tests

Documents come in on descriptor 0 and leave on 1. A process never holds, at the time it is forked, what the code that
runs in it must not know: the tests arrive when the solution is on its way already.
"""

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wmtp_worker.host import sandbox_confine, sandbox_judge
from wmtp_worker.host.sandbox_judge import receive, send

_PREVENTED = 86  # exit code of a program that needs what the sandbox has not
_ENOUGH = 4096
_END = 3


class _Unconfined(Exception):
    """What this machine does not keep the code from."""


@dataclass
class _Child:
    pid: int
    held: list[str]
    status: int | None = None
    cpu_seconds: float = 0.0

    def ended(self, wait: bool = False) -> bool:
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, 0 if wait else os.WNOHANG)
            if pid:
                self.status, self.cpu_seconds = status, usage.ru_utime + usage.ru_stime
        return self.status is not None

    def end(self) -> None:
        """It and its group, before its number can become another's."""
        if self.status is None:
            for kill in (os.killpg, os.kill):
                try:
                    kill(self.pid, signal.SIGKILL)
                except OSError:
                    continue
            self.ended(wait=True)

    def out_of_time(self, limit: float) -> bool:
        signalled = self.status is not None and os.WIFSIGNALED(self.status)
        return signalled and (os.WTERMSIG(self.status or 0) == signal.SIGXCPU or self.cpu_seconds >= limit)

    def how(self) -> str:
        code = os.waitstatus_to_exitcode(self.status or 0)
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def main() -> None:
    sandbox_confine.unobserved()
    # what every child needs and may not open any more
    null = os.open(os.devnull, os.O_RDWR)
    send(1, {"ready": True})
    zygote = os.getpid()
    while True:
        pid = os.fork()
        if pid == 0:
            sandbox_confine.die_with_parent(zygote)
            _supervise(null)
            return  # only a program that was run for its output comes here: Python ends it as usual
        _, status = os.waitpid(pid, 0)
        if status:
            return


def _supervise(null: int) -> None:
    try:
        job = receive(0)
    except EOFError:
        os._exit(_END)
    deadline = time.monotonic() + job["wall_seconds"]
    try:
        result = _asserted(job, null, deadline) if job["kind"] == "asserts" else _printed(job, null)
    except _Unconfined as error:
        result = {"unconfined": error.args[0], "held": error.args[1]}
    if result is None:
        return
    send(1, result)
    os._exit(0)


def _spawn(body: Callable[[], None] | None, job: dict[str, Any], descriptors: list[int]) -> _Child | None:
    """A confined child whose descriptors 0, 1, 2, … are these; with no `body` the child itself returns, with None."""
    said, say = os.pipe()
    supervisor = os.getpid()
    pid = os.fork()
    if pid:
        os.close(say)
        try:
            report = receive(said)
        except EOFError:
            report = {"held": [], "missing": ["be confined at all"]}
        os.close(said)
        child = _Child(pid, report["held"])
        if report["missing"] and not job["weak"]:
            child.end()
            raise _Unconfined(report["missing"], report["held"])
        return child
    os.setsid()
    sandbox_confine.die_with_parent(supervisor)
    _arrange([*descriptors, say])
    say = len(descriptors)
    held = sandbox_confine.confine(job["cpu_seconds"], job["memory"], tuple(job["means"]))
    missing = sandbox_confine.missing(held)
    send(say, {"held": held, "missing": missing})
    os.close(say)
    if missing and not job["weak"]:
        os._exit(1)
    if body is None:
        return None
    try:
        body()
    finally:
        os._exit(0)


def _arrange(descriptors: list[int]) -> None:
    """Make these the descriptors 0, 1, 2, … and close all others."""
    import fcntl

    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 64) for number in descriptors]
    for number, copy in enumerate(high):
        os.dup2(copy, number)
    os.closerange(len(descriptors), max(high) + 1)


def _asserted(job: dict[str, Any], null: int, deadline: float) -> dict[str, Any]:
    """Solution and judge, joined by two pipes."""
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    heard, tell = os.pipe()
    silent = [null, null, null]
    code = job.pop("code")
    solution = _spawn(lambda: sandbox_judge.serve(code, 3, 4), job, [*silent, asked, answer])
    assert solution is not None
    os.close(asked)
    os.close(answer)
    tests = receive(0)
    children = [solution]
    try:
        judge = _spawn(
            lambda: send(5, sandbox_judge.judge(tests["setup"], tests["tests"], 3, 4)),
            job,
            [*silent, ask, answered, tell],
        )
        assert judge is not None
        children.append(judge)
        for descriptor in (ask, answered, tell):
            os.close(descriptor)
        verdict = _verdict(heard, deadline)
        if verdict["status"] == "gone":
            _wait(solution, min(deadline, time.monotonic() + 0.5))
            how = f": {solution.how()}" if solution.ended() else ""
            verdict = {"status": "failed", "detail": verdict["detail"] + how}
    finally:
        for child in children:
            child.end()
    if any(child.out_of_time(job["cpu_seconds"]) for child in children):
        verdict = {"status": "timeout", "detail": f"more than {job['cpu_seconds']} s of CPU time"}
    return verdict | {"cpu_seconds": solution.cpu_seconds, "held": solution.held}


def _verdict(heard: int, deadline: float) -> dict[str, str]:
    poll = select.poll()
    poll.register(heard, select.POLLIN)
    poll.register(0, 0)  # POLLHUP: the worker is gone
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            if descriptor == 0:
                os._exit(_END)
            try:
                verdict: dict[str, str] = receive(heard, _ENOUGH)
            except (EOFError, ValueError):
                return {"status": "error", "detail": "the tests ended without a verdict"}
            return verdict
    return {"status": "timeout", "detail": "no end in the time it had"}


def _wait(child: _Child, until: float) -> None:
    while not child.ended() and time.monotonic() < until:
        time.sleep(0.005)


# --- programs that read their input and print


def _printed(job: dict[str, Any], null: int) -> dict[str, Any] | None:
    """The program once for each test, each in a process of its own; None in such a process."""
    total = 0.0
    result: dict[str, Any] = {"status": "error", "detail": "there are no tests", "held": []}
    for number in range(job["count"]):
        given = receive(0)["input"]
        stdin, feed = os.pipe()
        read, stdout = os.pipe()
        complaints, stderr = os.pipe()
        child = _spawn(None, job, [stdin, stdout, stderr])
        if child is None:
            _run_program(job["code"])
            return None
        for descriptor in (stdin, stdout, stderr):
            os.close(descriptor)
        deadline = time.monotonic() + job["wall_seconds"]
        output, words, intime = _converse(feed, given.encode(), read, complaints, deadline, job["output"])
        if intime and output is not None:
            _wait(child, deadline)
            intime = child.ended()
        child.end()
        total += child.cpu_seconds
        expected = receive(0)["output"]
        result = _compare(job, child, intime, output, words, expected) | {"held": child.held}
        if result["status"] != "passed":
            result["detail"] = f"test {number + 1}: {result['detail']}"
            for _ in range(2 * (job["count"] - number - 1)):  # the tests that need not be run
                receive(0)
            break
    return result | {"cpu_seconds": total}


def _run_program(code: str) -> None:
    """As `python solution.py` would: what is printed, the exit code, threads and exit handlers as Python has them."""
    sandbox_judge.prepare()
    try:
        exec(compile(code, "<solution>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException as error:
        reason = sandbox_judge.prevented(error)
        words = reason or traceback.format_exception_only(error)[-1]
        os.write(2, words.encode(errors="replace")[:_ENOUGH])
        sys.exit(_PREVENTED if reason else 1)


def _converse(
    feed: int, data: bytes, read: int, complaints: int, deadline: float, most: int
) -> tuple[bytes | None, str, bool]:
    """Feed the input, take output and complaints. Output is None if it was more than `most`; last: whether in time."""
    for descriptor in (feed, read, complaints):
        os.set_blocking(descriptor, False)
    poll = select.poll()
    poll.register(feed, select.POLLOUT)
    poll.register(read, select.POLLIN)
    poll.register(complaints, select.POLLIN)
    poll.register(0, 0)
    view, output, words = memoryview(data), bytearray(), bytearray()
    reading = {read, complaints}

    def done(descriptor: int) -> None:
        poll.unregister(descriptor)
        os.close(descriptor)

    while reading:
        left = deadline - time.monotonic()
        if left <= 0 or len(output) > most:
            return (bytes(output) if left <= 0 else None), words.decode(errors="replace"), left > 0
        for descriptor, event in poll.poll(left * 1000):
            if descriptor == 0 and event & select.POLLHUP:
                os._exit(_END)
            if descriptor == feed:
                try:
                    view = view[os.write(feed, view[:65536]) :]
                except BlockingIOError:
                    continue
                except OSError:  # it reads no more
                    view = view[:0]
                if not view:
                    done(feed)
            elif descriptor in reading:
                if not (part := os.read(descriptor, 65536)):
                    reading.remove(descriptor)
                    done(descriptor)
                elif descriptor == read:
                    output += part
                else:
                    words += part[: _ENOUGH - len(words)]
    return bytes(output), words.decode(errors="replace"), True


def _compare(
    job: dict[str, Any], child: _Child, intime: bool, output: bytes | None, words: str, expected: str
) -> dict[str, Any]:
    def verdict(status: str, detail: str = "") -> dict[str, Any]:
        return {"status": status, "detail": detail[:300]}

    if output is None:
        return verdict("failed", f"more than {job['output']} bytes of output")
    if child.out_of_time(job["cpu_seconds"]):
        return verdict("timeout", f"more than {job['cpu_seconds']} s of CPU time")
    if not intime:
        return verdict("timeout", "no end in the time it had")
    code = os.waitstatus_to_exitcode(child.status or 0)
    if code == _PREVENTED:
        return verdict("error", words)
    if code != 0:
        return verdict("failed", f"{child.how()}: {words}".removesuffix(": "))
    if not same(output.decode(errors="replace"), expected):
        return verdict("failed", sandbox_judge.OTHER_OUTPUT)
    return verdict("passed")


def same(output: str, expected: str) -> bool:
    """Equal word for word, however they are spaced; numbers with a fraction to six digits."""
    ours, theirs = output.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    if "." not in theirs:
        return False
    try:
        number, wanted = float(ours), float(theirs)
    except ValueError:
        return False
    return abs(number - wanted) <= 1e-6 * max(1.0, abs(wanted))
