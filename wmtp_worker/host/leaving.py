"""Stops or destroys the machine that this process runs on, by its host's own API.

    leaving = plan(here(), surroundings(), destroy=False)
    print(leaving)          # the exact call, without its secret
    leaving.go()            # may end this process with its machine

A stop keeps the disk (and its price) where the host has one that stays; a destroyed machine is gone with its disk.
Endpoints: https://docs.vast.ai/api-reference/instances (as `vastai` calls them), https://rest.runpod.io/v1/openapi.json,
https://cloud.google.com/compute/docs/reference/rest/v1/instances,
https://learn.microsoft.com/rest/api/compute/virtual-machines, https://docs.aws.amazon.com/AWSEC2/latest/APIReference
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from types import MappingProxyType
from typing import IO, Any, Protocol
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from wmtp_worker.errors import HostError, SettingsError
from wmtp_worker.host.metadata import ADDRESS, Endpoint, Unavailable
from wmtp_worker.host.where import Host

AZURE = "https://management.azure.com"
APIS: Mapping[str, str] = MappingProxyType(
    {
        "vast": "https://console.vast.ai",
        "runpod": "https://rest.runpod.io/v1",
        "gcp": "https://compute.googleapis.com/compute/v1",
        "azure": AZURE,
    }
)
VAST_URL = "VAST_URL"  # another address for Vast.ai, as its own command takes it

_TRIES = 4
_SECONDS = 30.0  # for one answer
_LARGEST = 1 << 16  # bytes of an answer that are read
_LOCAL = ("127.0.0.1", "localhost", "::1")


class Leaving(Protocol):
    """What would be done. As text it has no secret."""

    def go(self) -> None:
        """Do it. Raises HostError where the host would not, SettingsError where that cannot change by itself."""


@dataclass(frozen=True)
class Nothing:
    """A machine that nobody has to stop, or that cannot be stopped from within."""

    why: str

    def __str__(self) -> str:
        return f"nothing to call: {self.why}"

    def go(self) -> None:
        """There is nothing to do."""


@dataclass(frozen=True)
class Call:
    """One request with a bearer token."""

    method: str
    url: str
    credential: str  # what the token is, for people
    token: Callable[[], str] = field(repr=False)
    body: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        body = "" if self.body is None else f" {json.dumps(self.body)}"
        return f"{self.method} {self.url}{body}, authorized by {self.credential}"

    def go(self) -> None:
        """Ask until the host agrees: up to four times where it is busy or cannot be reached, seconds apart."""
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

        check_address(self.url)
        token = self.token()
        waits = wait_exponential(multiplier=0.5, max=8)
        for attempt in Retrying(
            stop=stop_after_attempt(_TRIES), wait=waits, retry=retry_if_exception_type(HostError), reraise=True
        ):
            with attempt:
                self._ask(token)

    def _ask(self, token: str) -> None:
        data = None if self.body is None else json.dumps(self.body).encode()
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        headers |= {"Content-Type": "application/json"} if data else {"Content-Length": "0"}
        request = Request(self.url, data=data, headers=headers, method=self.method)
        try:
            with build_opener(_NoRedirect).open(request, timeout=_SECONDS) as response:
                said = response.read(_LARGEST).decode("utf-8", "replace")
        except HTTPError as error:
            said = ""
            with error, contextlib.suppress(OSError, HTTPException):  # it may hang up within its answer
                said = error.read(_LARGEST).decode("utf-8", "replace")
            self._refused(error.code, said)
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise HostError(f"the host's API does not answer: {reason}", where=f"{self.method} {self.url}") from None
        else:
            with contextlib.suppress(ValueError, AttributeError):
                if json.loads(said).get("success") is False:  # Vast.ai says so with status 200, too
                    self._refused(400, said)

    def _refused(self, status: int, said: str) -> None:
        where, what = f"{self.method} {self.url}", f"the host's API answers {status}: {' '.join(said.split())[:300]}"
        if status == 404 and self.method == "DELETE":
            return  # an earlier try got through
        if status == 429 or status >= 500:
            raise HostError(what, where=where)
        raise SettingsError(what, where=where, fix=f"see whether {self.credential} may do that, or stop it by hand")


def plan(host: Host, environ: Mapping[str, str], *, destroy: bool = False, apis: Mapping[str, str] = APIS) -> Leaving:
    """What stops (with `destroy`, deletes) the machine `host`, with the secrets in `environ` (`where.surroundings`).

    Asks the metadata service of a cloud for names, nobody else. Raises SettingsError where a credential or an id is
    missing, HostError where the metadata service does not answer.
    """
    match host.name:
        case "vast":
            return _vast(host, environ, destroy, environ.get(VAST_URL) or apis["vast"])
        case "runpod":
            return _runpod(host, environ, destroy, apis["runpod"])
        case "ec2":
            from wmtp_worker.host.leaving_ec2 import Ec2Call

            return Ec2Call(environ, host.instance, destroy)
        case "gcp":
            return _google(environ, destroy, apis["gcp"])
        case "azure":
            return _azure(environ, destroy, apis["azure"])
        case "bare":
            return Nothing("this is no rented machine that wmtp knows")
        case _:
            return Nothing(f"a run on {host.name} ends, and costs no more, when its command ends")


def check_address(url: str) -> None:
    """Raise SettingsError unless a token may go there: TLS, or this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in _LOCAL:
        raise SettingsError(f"{url} is no https:// address, and a token would be sent there", fix="give one with TLS")


class _NoRedirect(HTTPRedirectHandler):
    """Who answers with a redirection does not get the token sent elsewhere."""

    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str) -> None:
        return None


def _variable(name: str, environ: Mapping[str, str], fix: str) -> str:
    if value := environ.get(name):
        return value
    raise SettingsError(f"{name} is not set, so this machine cannot be stopped from here", fix=fix)


def _vast(host: Host, environ: Mapping[str, str], destroy: bool, base: str) -> Call:
    fix = "Vast.ai sets it in each container: give it to this process, as start.sh does, or stop the instance by hand"
    key, number = _variable("CONTAINER_API_KEY", environ, fix), host.instance or ""
    if not number.isdecimal():
        raise SettingsError(f"{number!r} is no number of an instance", where="CONTAINER_ID", fix=fix)
    url = f"{base}/api/v0/instances/{number}/"
    if destroy:
        return Call("DELETE", url, "CONTAINER_API_KEY", lambda: key, {})
    return Call("PUT", url, "CONTAINER_API_KEY", lambda: key, {"state": "stopped"})


def _runpod(host: Host, environ: Mapping[str, str], destroy: bool, base: str) -> Call:
    fix = "put a key that may stop pods into a secret of the pod, or stop the pod by hand"
    key = _variable("RUNPOD_API_KEY", environ, fix)
    url = f"{base}/pods/{quote(host.instance or '', safe='')}"
    if destroy:
        return Call("DELETE", url, "RUNPOD_API_KEY", lambda: key)
    return Call("POST", f"{url}/stop", "RUNPOD_API_KEY", lambda: key)


def _google(environ: Mapping[str, str], destroy: bool, base: str) -> Call:
    from wmtp_worker.host.notices_gcp import HOST

    metadata = Endpoint((environ.get(HOST) or ADDRESS).rstrip("/"))

    def ask(item: str) -> str:
        return _metadata(metadata, f"/computeMetadata/v1/{item}", {"Metadata-Flavor": "Google"})

    def token() -> str:
        return _access_token(ask("instance/service-accounts/default/token"))

    zone = ask("instance/zone").rpartition("/")[2]  # of projects/<number>/zones/<zone>
    url = f"{base}/projects/{ask('project/project-id')}/zones/{zone}/instances/{ask('instance/name')}"
    credential = "the machine's service account"
    return Call("DELETE", url, credential, token) if destroy else Call("POST", f"{url}/stop", credential, token)


def _azure(environ: Mapping[str, str], destroy: bool, base: str) -> Call:
    from wmtp_worker.host.notices_azure import ENDPOINT

    metadata = Endpoint((environ.get(ENDPOINT) or ADDRESS).rstrip("/"))

    def ask(path: str) -> str:
        return _metadata(metadata, f"/metadata/{path}", {"Metadata": "true"})

    def token() -> str:
        scope = quote(f"{AZURE}/", safe="")
        return _access_token(ask(f"identity/oauth2/token?api-version=2018-02-01&resource={scope}"))

    url = base + ask("instance/compute/resourceId?api-version=2021-02-01&format=text")
    credential, version = "the machine's managed identity", "api-version=2024-07-01"
    if destroy:
        return Call("DELETE", f"{url}?{version}", credential, token)
    # a machine that is merely shut down is paid for until it is deallocated
    return Call("POST", f"{url}/deallocate?{version}", credential, token)


def _metadata(endpoint: Endpoint, path: str, headers: Mapping[str, str]) -> str:
    """What a metadata service says, as one word."""
    item = path.partition("?")[0]
    try:
        answer = endpoint.ask(path, headers)
    except Unavailable as error:
        raise HostError(f"the metadata service does not answer: {error}", fix="stop the machine by hand") from None
    if answer.status != 200 or not answer.text.isprintable() or not answer.text:
        fix = "give the machine an identity that may stop it, or stop it by hand"
        raise SettingsError(f"the metadata service answers {answer.status}", where=item, fix=fix)
    return answer.text


def _access_token(said: str) -> str:
    try:
        return str(json.loads(said)["access_token"])
    except (ValueError, KeyError, TypeError):
        raise HostError("the metadata service gives no token", fix="stop the machine by hand") from None
