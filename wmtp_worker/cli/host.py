"""`wmtp host`: the machine that this process runs on, and its end."""

from typing import Annotated

import typer

from wmtp_worker.cli.options import Set

app = typer.Typer(help="The machine that this process runs on: notices of its end, and how it is stopped.")


@app.command()
def stop(
    destroy: Annotated[bool, typer.Option("--destroy", help="Delete the machine, its disk included.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the exact call, and do nothing.")] = False,
) -> None:
    """Stop the machine that this process runs on, by its host's own API.

    Does not look whether work is safe: start.sh does, with WMTP_WHEN_DONE. On a host whose runs end with their command,
    and on a machine that is not rented, there is nothing to do.

    wmtp host stop --dry-run

    wmtp host stop --destroy
    """
    from wmtp_worker.host.leaving import plan
    from wmtp_worker.host.where import here, surroundings
    from wmtp_worker.redact import redact

    host = here()
    leaving = plan(host, surroundings(), destroy=destroy)
    typer.echo(redact(f"{host.name}: {leaving}{' (not done: --dry-run)' if dry_run else ''}"))
    if not dry_run:
        leaving.go()


@app.command()
def notices(set_: Set = None) -> None:
    """Ask the cloud once whether it takes this machine away; exit code 75 if it does.

    Exit code 0 means that no notice stands, or that nobody is to be asked (host.notices).
    """
    from wmtp_worker.errors import AGAIN
    from wmtp_worker.host.metadata import Unavailable
    from wmtp_worker.host.notices import service_of
    from wmtp_worker.settings import load

    service = service_of(load(overrides=set_ or ()).host.notices)
    try:
        standing = [] if service is None else service.poll()
    except Unavailable as error:
        typer.echo(f"not known: {error}")
        return
    for notice in standing:
        typer.echo(f"{notice.source}: {notice.detail}")
    if any(notice.certain for notice in standing):
        raise typer.Exit(AGAIN)
