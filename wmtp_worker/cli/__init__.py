"""The `wmtp` command: one file per command, and one place where errors become exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from wmtp_worker import errors
from wmtp_worker.host.limits import cap_threads
from wmtp_worker.host.stop import STOP

_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `errors.EXIT_CODES`); never raises."""
    _ensure_streams()
    # before anything slow: a signal that comes while modules load is answered as soon as the command polls
    STOP.install()
    # OpenMP's threads must not spin while they wait: rented machines and containers share their cores (measured: a
    # busy neighbour makes a step up to four times slower otherwise)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cap_threads()
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except (BrokenPipeError, SystemExit):  # rich answers a broken pipe with SystemExit
        code = _BROKEN_PIPE
    except Exception as error:
        code, text = _explain(error)
        with contextlib.suppress(OSError):
            _print(text, "yellow" if code == errors.AGAIN else "red")
    _settle(sys.stdout)
    _settle(sys.stderr)
    return code


def _ensure_streams() -> None:
    """Make the standard streams safe to use, however the command was started.

    After `wmtp … 2>&-` the next file opened, a checkpoint's say, would be number 2, where warnings and the lines about
    signals go. Characters that the stream's encoding lacks must not end a run either.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # open for as long as the process is
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str] | None) -> int:
    import typer

    from wmtp_worker.cli.app import app

    # not app(): it would turn a broken pipe into an exit code of its own
    command = typer.main.get_command(app)
    try:
        with command.make_context("wmtp", list(sys.argv[1:] if argv is None else argv)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return errors.DONE


def _settle(stream: TextIO) -> None:
    """Flush, or forget what cannot be written: python would end with 120 instead of our code."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and what to tell the user, without secrets."""
    from wmtp_worker.redact import redact

    if isinstance(error, errors.Interrupted):
        return error.exit_code, f"wmtp: {redact(str(error))}"
    if isinstance(error, errors.WorkerError):
        return error.exit_code, f"error: {redact(str(error))}"
    if _is_usage_error(error):
        return errors.WRONG, errors.printable(redact(_usage(error)))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "make room there, or set WMTP_WORKDIR to a larger disk"
        return errors.WRONG, f"error: {redact(errors.sentence(str(error), None, fix))}"
    if _is_out_of_memory(error):
        fix = "lower training.micro_batch_size and raise training.accumulation, or shorten data.sequence_length"
        what = f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return errors.WRONG, f"error: {redact(errors.sentence(what, None, fix))}"
    trace = "".join(traceback.format_exception(error))
    return (
        errors.BUG,
        f"{errors.printable(redact(trace))}wmtp: this is a bug of ours; please report it with the lines above",
    )


def _is_out_of_memory(error: Exception) -> bool:
    # torch is not imported for this: CUDA's error has a class of its own, those of the CPU and MPS have only words
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def _is_usage_error(error: Exception) -> bool:
    # typer carries its own copy of click, so its base class is named, not imported
    return any(kind.__name__ == "ClickException" for kind in type(error).__mro__)


def _usage(error: Exception) -> str:
    message = error.format_message()  # type: ignore[attr-defined]
    if not message:  # no command at all: typer has printed the help
        return ""
    context = getattr(error, "ctx", None)
    hint = f"\n{context.get_usage()}\nTry '{context.command_path} --help'." if context else ""
    return f"error: {message}{hint}"


def _print(text: str, color: str) -> None:
    if not text:
        return
    if not sys.stderr.isatty():
        sys.stderr.write(text + "\n")
        return
    from rich.console import Console

    head, colon, rest = text.partition(":")
    console = Console(stderr=True, soft_wrap=True)
    console.print(head + colon, style=f"bold {color}", end="", highlight=False, markup=False)
    console.print(rest, highlight=False, markup=False)
