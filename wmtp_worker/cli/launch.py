"""`wmtp launch`: make another machine run a training, and find it again."""

from typing import TYPE_CHECKING, Annotated

import typer

from wmtp_worker.cli.launching import (
    Count,
    DryRun,
    Env,
    Gpu,
    Gpus,
    Grace,
    Image,
    Name,
    NoCredentials,
    NoLogs,
    Price,
    Volume,
    Yes,
    ask,
    echo,
    estimate,
    for_new_machine,
    host_of,
    overrides_of,
    published,
    refuse_repeated_start,
    request_of,
    show_and_launch,
)
from wmtp_worker.cli.options import Json, Preset, Recipe, Resume, RunName, Set
from wmtp_worker.cli.text import printable

if TYPE_CHECKING:
    from wmtp_worker.launch.host import Host

app = typer.Typer(no_args_is_help=True, help="Run a training on another machine, and find it again.")


@app.command()
def ssh(
    host: Annotated[str, typer.Argument(metavar="[USER@]HOST[:PORT]", help="Names of ~/.ssh/config work too.")],
    image: Image = None,
    accept_host_key: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256:…", help="Trust a host key that is not in ~/.ssh/known_hosts, by its fingerprint."
        ),
    ] = None,
    checkout: Annotated[
        str, typer.Option(metavar="DIR", help="Checkout on the host whose start.sh runs; without it, wmtp on PATH.")
    ] = "wmtp-worker",
    workdir: Annotated[str, typer.Option(metavar="DIR", help="Work directory on the host.")] = "wmtp-work",
    gpus: Gpus = "all",
    volume: Volume = "wmtp",
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    name: Name = None,
    env: Env = None,
    no_credentials: NoCredentials = False,
    no_logs: NoLogs = False,
    gpu: Gpu = None,
    count: Count = 1,
    price: Price = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Run it on a machine that you reach by ssh, detached: the laptop may go to sleep.

    wmtp launch ssh ubuntu@203.0.113.7 --image me/wmtp-worker --preset production --set model.path=llama

    wmtp launch ssh gpu-box --preset smoke         [dim]without docker: a checkout or an installed wmtp there[/dim]

    wmtp launch logs baseline-smoke --follow       [dim]and status, and stop[/dim]

    Model and data come from the bucket straight to that machine, and checkpoints go straight back.
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.launch.container import Container
    from wmtp_worker.launch.detached import Detached
    from wmtp_worker.launch.ssh import Address, SshShell

    overrides = overrides_of(set_, no_logs)
    request, settings = request_of(recipe, preset, run_name, resume, overrides, name, env, no_credentials, image)
    address = Address.parse(host)
    shell = SshShell(address, accept_host_key, STOP.check)
    facts = {"address": str(address)}
    if accept_host_key:
        facts["host_key"] = accept_host_key
    place: Host
    if image is None:
        place, kind = Detached(shell, request.name, workdir, checkout), "ssh"
    else:
        place, kind = Container(shell, request.name, image, gpus=gpus, volume=volume), "ssh-docker"
    shown = {"host": f"{address} by ssh", "image": image or f"none: {checkout} there, or the wmtp that is installed"}
    shown |= estimate(settings, gpu, count, price)
    show_and_launch(place, kind, str(address), request, facts, shown, yes, dry_run)


@app.command()
def docker(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The worker's image, here or in a registry.")],
    context: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="An engine of `docker context ls`; without it, docker's own choice."),
    ] = None,
    gpus: Gpus = "all",
    volume: Volume = "wmtp",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="OPTION", help="A further option of docker run; repeatable.")
    ] = None,
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    name: Name = None,
    env: Env = None,
    no_credentials: NoCredentials = False,
    no_logs: NoLogs = False,
    gpu: Gpu = None,
    count: Count = 1,
    price: Price = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Run the image in a container of this machine's docker, or of a docker context's.

    wmtp launch docker wmtp-worker --preset production --set model.path=llama

    wmtp launch docker me/wmtp-worker --context gpu-box --option=--memory=64g
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.launch.container import Container
    from wmtp_worker.launch.shell import LocalShell

    overrides = overrides_of(set_, no_logs)
    request, settings = request_of(recipe, preset, run_name, resume, overrides, name, env, no_credentials, image)
    place = Container(
        LocalShell(STOP.check), request.name, image, gpus=gpus, volume=volume, options=option or (), context=context
    )
    where = f"docker context {context}" if context else "docker"
    facts = {"context": context} if context else {}
    shown = {"host": where, "image": image} | estimate(settings, gpu, count, price)
    show_and_launch(place, "docker", where, request, facts, shown, yes, dry_run)


@app.command()
def ec2(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The worker's image, in a registry it may read.")],
    type_: Annotated[str, typer.Option("--type", metavar="TYPE", help="Instance type, as g6e.xlarge or p5.48xlarge.")],
    role: Annotated[
        str, typer.Option(metavar="NAME", help="Instance profile that may use the bucket: no keys are sent.")
    ] = "wmtp-worker",
    region: Annotated[str | None, typer.Option(metavar="REGION", help="[dim]Default: AWS_REGION.[/dim]")] = None,
    ami: Annotated[
        str | None,
        typer.Option(metavar="AMI", help="[dim]Default: AWS's newest Deep Learning Base AMI (Ubuntu).[/dim]"),
    ] = None,
    disk: Annotated[int, typer.Option(metavar="GIB", min=8, help="Size of its disk.")] = 200,
    on_demand: Annotated[bool, typer.Option("--on-demand", help="Not by spot.")] = False,
    subnet: Annotated[str | None, typer.Option(metavar="ID", help="Subnet, for a VPC of your own.")] = None,
    security_group: Annotated[str | None, typer.Option(metavar="ID", help="Nothing has to come in.")] = None,
    gpus: Gpus = "all",
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    name: Name = None,
    no_logs: NoLogs = False,
    gpu: Gpu = None,
    count: Count = 1,
    price: Price = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Rent an EC2 instance, by spot, that runs the image and goes on with it after interruptions.

    wmtp launch ec2 me/wmtp-worker --type g6e.xlarge --preset production --set model.path=llama

    `wmtp launch stop` has it save and keeps its disk; with --destroy it is given back.
    """
    import os

    from wmtp_worker.errors import SettingsError
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.launch.ec2 import AMI, Ec2, Machine
    from wmtp_worker.launch.request import with_region, without_secrets

    request, settings = request_of(
        recipe, preset, run_name, resume, overrides_of(set_, no_logs), name, None, True, image
    )
    refuse_repeated_start(settings)
    if settings.cloud.provider != "s3":
        raise SettingsError(
            f"an instance's role opens no bucket of cloud.provider={settings.cloud.provider}, and no keys are sent",
            where=settings.sources["cloud.provider"],
            fix="use a bucket of S3's, or launch by ssh on an instance of yours",
        )
    request = for_new_machine(request, settings, dry_run)
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    machine = Machine(type_, role, ami or AMI, disk, not on_demand, subnet, security_group, gpus)
    place = Ec2(request.name, region, image, machine, STOP.check)
    request = with_region(without_secrets(request), place.region)
    between = place.prices() if price is None and not dry_run else None
    if between is not None:
        price = between[1]
    shown = {
        "host": f"{type_} {'on demand' if on_demand else 'by spot'} in {place.region}, role {role}",
        "image": image,
    }
    shown |= estimate(settings, gpu, count, price)
    if between is not None:
        shown["price"] = "{:,.3g} to {:,.3g} an hour by zone, the spot market's now".format(*between)
    show_and_launch(place, "ec2", place.where, request, {"region": place.region}, shown, yes, dry_run)


@app.command()
def vast(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The worker's image, in a registry it may read.")],
    gpu_name: Annotated[str, typer.Option("--gpu-name", metavar="NAME", help="As Vast.ai spells it: 'RTX 4090'.")],
    num_gpus: Annotated[int, typer.Option("--num-gpus", metavar="N", min=1, help="How many of it.")] = 1,
    disk: Annotated[int, typer.Option(metavar="GB", min=8, help="Size of its disk.")] = 100,
    max_price: Annotated[float | None, typer.Option(metavar="USD", min=0, help="Most that an hour may cost.")] = None,
    interruptible: Annotated[
        bool, typer.Option("--interruptible", help="Bid for a machine that a higher bid may take away.")
    ] = False,
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    name: Name = None,
    env: Env = None,
    no_credentials: NoCredentials = False,
    no_logs: NoLogs = False,
    gpu: Gpu = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Rent the cheapest machine of Vast.ai that fits, and run the image on it. VAST_API_KEY is needed.

    wmtp launch vast me/wmtp-worker --gpu-name 'RTX 4090' --preset production --set model.path=llama

    `wmtp launch stop` kills it and keeps its disk; with --destroy it is given back.
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.launch.vast import Vast, Wish

    overrides = overrides_of(set_, no_logs)
    request, settings = request_of(recipe, preset, run_name, resume, overrides, name, env, no_credentials, image)
    refuse_repeated_start(settings)
    request = for_new_machine(request, settings, dry_run)
    wish = Wish(gpu_name, num_gpus, disk, max_price, interruptible)
    place = Vast(request.name, image, wish, check=STOP.check)
    shown = {"host": f"Vast.ai, the cheapest {num_gpus} × {gpu_name} with {disk} GB", "image": image}
    cost = None
    if not dry_run:
        offer = place.offer()
        cost = place.price()
        shown["offer"] = f"{offer.get('id')}, {offer.get('geolocation') or 'somewhere'}: {cost:.3f} USD an hour now"
    show_and_launch(
        place, "vast", place.where, request, {}, shown | estimate(settings, gpu, num_gpus, cost), yes, dry_run
    )


@app.command()
def vessl(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The worker's image, in a registry it may read.")],
    cluster: Annotated[str, typer.Option(metavar="NAME", help="A cluster of `vessl cluster list`.")],
    resource_preset: Annotated[
        str, typer.Option("--resource-preset", metavar="NAME", help="One of the cluster's resource presets.")
    ],
    recipe: Recipe = None,
    preset: Preset = None,
    run_name: RunName = None,
    resume: Resume = None,
    set_: Set = None,
    name: Name = None,
    env: Env = None,
    no_credentials: NoCredentials = False,
    no_logs: NoLogs = False,
    gpu: Gpu = None,
    count: Count = 1,
    price: Price = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Run the image on VESSL, by its own command (pip install vessl; vessl configure).

    wmtp launch vessl me/wmtp-worker --cluster my-cluster --resource-preset gpu-l4 --preset production --dry-run
    """
    from wmtp_worker.host.stop import STOP
    from wmtp_worker.launch.shell import LocalShell
    from wmtp_worker.launch.vessl import Place, Vessl

    overrides = overrides_of(set_, no_logs)
    request, settings = request_of(recipe, preset, run_name, resume, overrides, name, env, no_credentials, image)
    request = for_new_machine(request, settings, dry_run)
    place = Vessl(LocalShell(STOP.check), request.name, image, Place(cluster, resource_preset), check=STOP.check)
    shown = {"host": f"VESSL, {resource_preset} in {cluster}", "image": image}
    show_and_launch(
        place, "vessl", place.where, request, {}, shown | estimate(settings, gpu, count, price), yes, dry_run
    )


JobName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the job, as `wmtp launch status` lists it.")]


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One job; without it, all.")] = None,
    as_json: Json = False,
) -> None:
    """Say how the jobs are that were launched from here; each host is asked.

    wmtp launch status

    wmtp launch status baseline-smoke --json
    """
    import dataclasses
    import json
    import time

    from wmtp_worker.launch.register import every, recall

    found = [(record, *ask(record)) for record in ([recall(name)] if name else every())]
    if as_json:
        rows = [
            {**dataclasses.asdict(record), "state": state and dataclasses.asdict(state), "error": error}
            for record, state, error in found
        ]
        echo(json.dumps(rows, indent=1))
        return
    for record, state, error in found:
        hours = (time.time() - record.began) / 3600
        echo(f"{record.name}  {record.kind} {record.where}, launched {hours:.1f} h ago: {error or state}")
    if not found:
        echo("no job was launched from here")


@app.command()
def logs(
    name: JobName, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False
) -> None:
    """Show the end of a job's log. With --follow a lost connection, or a laptop that slept, loses no line.

    wmtp launch logs baseline-smoke --follow
    """
    from wmtp_worker.launch.register import recall
    from wmtp_worker.redact import redact

    kept = b""

    def write(data: bytes) -> None:
        nonlocal kept
        *lines, kept = (kept + data).split(b"\n")
        for line in lines:
            typer.echo(printable(redact(line.decode(errors="replace"))))

    host_of(recall(name)).logs(write, follow)
    if kept:
        write(b"\n")


@app.command()
def stop(
    name: JobName,
    grace: Grace = 120,
    destroy: Annotated[
        bool, typer.Option("--destroy", help="Then delete a machine that was rented for it, with its disk.")
    ] = False,
) -> None:
    """Ask a job to save and end, wait for that, and say what is safe. Vast.ai asks nobody: it kills.

    wmtp launch stop baseline-smoke

    wmtp launch stop baseline-ec2 --destroy        [dim]the rented machine, too: its disk is gone[/dim]

    Ends with exit code 74 where the job still saves after --grace seconds.
    """
    from wmtp_worker.errors import NotSafeError, SettingsError
    from wmtp_worker.launch.host import Rented
    from wmtp_worker.launch.register import recall

    record = recall(name)
    host = host_of(record)
    if destroy and not isinstance(host, Rented):
        raise SettingsError("no machine was rented for it", where=record.where, fix="drop --destroy")
    state = host.stop(grace)
    echo(f"{name}: {state}")
    safe = published(record)
    if safe:
        echo(safe)
    if state.alive:
        raise NotSafeError(
            f"{name} has not ended in {grace:g} s", where=record.where, fix="it may still be saving: ask again"
        )
    if destroy and isinstance(host, Rented):
        echo(f"{name}: {host.give_back()}")
