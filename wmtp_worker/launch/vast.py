"""A machine of Vast.ai, by its REST API (https://docs.vast.ai/api-reference): the cheapest offer that fits.

Variables and secrets are the instance's environment: Vast.ai keeps them with it, and whoever owns the machine could
read them there. They travel in the body of one HTTPS request, never in an address.
"""

import contextlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from wmtp_worker.errors import HostError, InputError, SettingsError
from wmtp_worker.launch.detached import held, kept
from wmtp_worker.launch.host import State, Write
from wmtp_worker.launch.request import Request
from wmtp_worker.redact import MASK

ADDRESS = "https://console.vast.ai"
KEY_FILE = "~/.config/vastai/vast_api_key"  # of Vast.ai's own command
_LARGEST_ONSTART = 4048  # characters
_TIMEOUT = 60.0  # seconds
_LOG_TIMEOUT = 10.0
_POLL = 3.0
_LOG_LINES = 1000
_STOPPED = ("exited", "stopped")
# what process 1 says, `launch logs` shows; process 1 is not ours, so a signal has to go to start.sh
_ONSTART = """\
#!/bin/bash
cd /workspace || exit 1
touch start.log
nohup tail -n 0 -F start.log >/proc/1/fd/1 2>/dev/null &
nohup /opt/wmtp/entrypoint/start.sh {arguments} >>start.log 2>&1 &
echo "$(date -u +%FT%TZ) start.sh is process $!" >>start.log
"""
# what entrypoint/supervise.sh takes over from the container's first process
ADOPTED = re.compile(
    "^(WMTP|CLOUD|AWS|AZURE|GOOGLE|HF|MLFLOW|RUNPOD|VAST|CONTAINER|NCCL|CUDA|(PY)?TORCH)_[A-Za-z0-9_]*$|^(S3_)?BUCKET_NAME$|^DATA_DIRECTORY$"
    "|^(OMP|RAYON)_NUM_THREADS$|^((http|https|no)_proxy|(HTTP|HTTPS|NO)_PROXY)$"
)
_STARTING = dict.fromkeys((None, "created", "loading"), "starting")
# what is off line for a moment is not gone: its disk costs, and it may come back
_PHASES = {**_STARTING, "exited": "stopped", "offline": "unreachable"}


@dataclass(frozen=True)
class Wish:
    """What is looked for: `gpu` as Vast.ai spells it ("RTX 4090"), `disk` in GB, `most` in dollars an hour."""

    gpu: str
    gpus: int = 1
    disk: int = 100
    most: float | None = None
    interruptible: bool = False
    cuda: float = 12.6


class Vast:
    """The instance with the label `wmtp-NAME`. See `host.Host`.

    Raises `SettingsError` without an API key or where it is refused; `InputError` where no offer fits; `HostError`
    where the service does not answer, or the offer is gone.
    """

    where = "Vast.ai"

    def __init__(
        self,
        name: str,
        image: str = "",
        wish: Wish | None = None,
        instance: str | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        import urllib3

        self._name = name
        self._image = image
        self._wish = wish
        self._instance = instance
        self._offer: dict[str, Any] | None = None
        self._check = check
        self._address = os.environ.get("VAST_URL", ADDRESS).rstrip("/")
        url = urlsplit(self._address)
        if url.scheme != "https" and url.hostname not in ("127.0.0.1", "localhost", "::1"):
            raise SettingsError("a key is sent by https alone", where=f"VAST_URL={self._address}", fix="unset it")
        # nothing is tried again by itself: a second PUT would rent a second machine
        self._http = urllib3.PoolManager(retries=False, timeout=_TIMEOUT, cert_reqs="CERT_REQUIRED")

    def _key(self) -> str:
        if key := os.environ.get("VAST_API_KEY", "").strip():
            return key
        path = Path(KEY_FILE).expanduser()
        try:
            if path.is_file():
                return path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise SettingsError(f"{path} cannot be read: {error}", where=KEY_FILE, fix="set VAST_API_KEY") from error
        raise SettingsError(
            "there is no key of Vast.ai's API", where=f"VAST_API_KEY, {KEY_FILE}", fix="make one at cloud.vast.ai"
        )

    # --- what is asked for -----------------------------------------------------------------------------------

    def offer(self) -> dict[str, Any]:
        """The cheapest offer that fits, as Vast.ai describes it: searched once, so what was shown is what is taken."""
        if self._offer is None:
            self._offer = self._search()
        return self._offer

    def price(self) -> float:
        """Dollars an hour that the offer costs, or that are bid for it: never more than is wished."""
        assert self._wish is not None
        found, most = _price(self.offer()), self._wish.most
        return found if most is None else min(found, most)

    def _search(self) -> dict[str, Any]:
        wish = self._wish
        assert wish is not None
        query: dict[str, Any] = {
            "type": "bid" if wish.interruptible else "on-demand",
            "verified": {"eq": True},
            "rentable": {"eq": True},
            "rented": {"eq": False},
            "gpu_name": {"eq": wish.gpu.replace("_", " ")},
            "num_gpus": {"eq": wish.gpus},
            "reliability": {"gte": 0.98},
            "cuda_max_good": {"gte": wish.cuda},
            "disk_space": {"gte": wish.disk},
            "allocated_storage": wish.disk,
            "order": [["dph_total", "asc"]],
            "limit": 10,
        }
        if wish.most is not None:
            query["dph_total"] = {"lte": wish.most}
        found = self._ask("POST", "/api/v0/bundles/", query).get("offers") or []
        offers = [found] if isinstance(found, dict) else found
        if not offers:
            raise InputError(
                f"nobody offers {wish.gpus} × {wish.gpu} with {wish.disk} GB",
                where=self.where,
                fix="look at cloud.vast.ai how it is spelled and what it costs; --gpu-name, --max-price, --disk",
            )
        cheapest: dict[str, Any] = min(offers, key=_price)
        return cheapest

    def _body(self, request: Request, bid: float, environ: Mapping[str, str]) -> dict[str, Any]:
        assert self._wish is not None
        for name in environ:
            if not ADOPTED.search(name):
                what = f"{name} would not reach the worker: on Vast.ai start.sh takes over certain variables alone"
                raise SettingsError(what, where=f"--env {name}", fix=f"a name that matches {ADOPTED.pattern}")
        onstart = _ONSTART.format(arguments=shlex.join(request.arguments))
        if len(onstart) > _LARGEST_ONSTART:
            raise SettingsError("the settings do not fit into onstart", fix="use a recipe of the package")
        body: dict[str, Any] = {
            "client_id": "me",
            "image": self._image,
            "label": self._label,
            "disk": self._wish.disk,
            "env": {**environ, "WMTP_RESTART": "always", "WMTP_WHEN_DONE": "destroy", "WMTP_WHEN_IDLE": "stop"},
            "onstart": onstart,
            "runtype": "ssh",
            "cancel_unavail": True,
        }
        if self._wish.interruptible:
            body["price"] = bid
        return body

    @property
    def _label(self) -> str:
        return f"wmtp-{self._name}"

    def preview(self, request: Request) -> str:
        body = self._body(request, 0.0, request.shown())
        return f"PUT {self._address}/api/v0/asks/OFFER/\nAuthorization: Bearer {MASK}\n\n{json.dumps(body, indent=1)}"

    # --- the instance ----------------------------------------------------------------------------------------

    def start(self, request: Request) -> Mapping[str, str]:
        if (instance := self._labelled()) is not None:
            where = f"{self.where}, instance {instance.get('id')}"
            if instance.get("actual_status") in _STOPPED:
                raise kept(self._name, where, f"`vastai start instance {instance.get('id')}`")
            raise held(self._name, where)
        offer, price = self.offer(), round(self.price(), 4)
        body = self._body(request, price, {**request.variables, **request.secrets})
        try:
            made = self._ask("PUT", f"/api/v0/asks/{offer['id']}/", body)
        except _Missing as error:
            raise HostError("somebody else took that offer", where=self.where, fix="launch again") from error
        if not made.get("new_contract"):
            raise HostError("no instance was made", where=self.where, fix="look at cloud.vast.ai before trying again")
        return {"instance": str(made["new_contract"]), "price": f"{price:.4f}"}

    def find(self) -> Mapping[str, str] | None:
        found = self._labelled()
        return None if found is None else {"instance": str(found["id"])}

    def _labelled(self) -> dict[str, Any] | None:
        instances = self._ask("GET", "/api/v0/instances/").get("instances") or []
        return next((one for one in instances if one.get("label") == self._label), None)

    def _show(self) -> dict[str, Any] | None:
        try:
            found = self._ask("GET", f"/api/v0/instances/{self._instance}/").get("instances")
        except _Missing:
            return None
        return found if isinstance(found, dict) else None

    def state(self) -> State:
        found = self._show()
        if found is None:
            return State("ended", None, "the instance was given back")
        status = found.get("actual_status")
        said = str(found.get("status_msg") or "").strip()
        return State(_PHASES.get(status, str(status)), None, f"instance {self._instance} {said}".strip())

    def logs(self, write: Write, follow: bool) -> None:
        """The last lines of the container, which Vast.ai puts at an address of its own when asked."""
        import urllib3

        if follow:
            raise SettingsError(
                "Vast.ai has no log to follow",
                where=self.where,
                fix="drop --follow; or ssh to the instance: tail -f /workspace/start.log",
            )
        asked = {"tail": str(_LOG_LINES)}
        found = self._ask("PUT", f"/api/v0/instances/request_logs/{self._instance}/", asked)
        url, trouble = str(found.get("result_url") or ""), "Vast.ai does not say where it is"
        for _ in range(10 if url else 0):
            self._pause(_POLL / 3)
            try:
                # a signed address: the key is none of its business
                answer = self._http.request("GET", url, redirect=False, timeout=_LOG_TIMEOUT)
            except urllib3.exceptions.HTTPError as error:
                trouble = f"its address does not answer ({type(error).__name__})"
                continue
            if answer.status == 200:
                write(answer.data + b"\n")
                return
            trouble = f"its address answers {answer.status}"
        raise HostError(f"the log did not come: {trouble}", where=self.where, fix="try again")

    def stop(self, grace: float) -> State:
        """Stop the instance, which kills the worker; its disk is kept with what was not published: see `give_back`."""
        try:
            if self._show() is None:
                return self.state()
            self._ask("PUT", f"/api/v0/instances/{self._instance}/", {"state": "stopped"})
        except _Missing:
            return self.state()
        end = time.monotonic() + grace
        while (found := self._show()) and found.get("actual_status") not in (*_STOPPED, None):
            if time.monotonic() > end:
                return State("stopping", None, f"instance {self._instance} is being stopped; it still costs")
            self._pause(_POLL)
        if found is None:
            return self.state()
        detail = f"instance {self._instance} was killed: its disk is kept, and costs; --destroy gives both back"
        return State("stopped", None, detail)

    def give_back(self) -> State:
        with contextlib.suppress(_Missing):
            self._ask("DELETE", f"/api/v0/instances/{self._instance}/")
        return State("ended", None, f"instance {self._instance} and its disk were given back")

    def _pause(self, seconds: float) -> None:
        self._check()
        time.sleep(seconds)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        import urllib3

        headers = {"Authorization": f"Bearer {self._key()}", "Accept": "application/json"}
        try:
            answer = self._http.request(method, self._address + path, json=body, headers=headers, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise HostError(
                f"no answer: {error}", where=self.where, fix="try again; if it was a launch, look first"
            ) from error
        try:
            found = json.loads(answer.data or b"{}")
        except ValueError:
            found = {}
        found = found if isinstance(found, dict) else {}
        if answer.status >= 300 or found.get("success") is False:
            self._refused(answer.status, str(found.get("msg") or found.get("detail") or found.get("error") or ""))
        return found

    def _refused(self, status: int, said: str) -> NoReturn:
        what = f"Vast.ai says {status}: {re.sub(r'[^ -~]', ' ', said)[:300]}"
        if status in (401, 403):
            raise SettingsError(what, where=self.where, fix="check VAST_API_KEY, its permissions and the credit")
        if status == 404:
            raise _Missing(what, where=self.where, fix="it is gone: look at cloud.vast.ai")
        if status == 400:
            raise InputError(what, where=self.where, fix="correct the image or the options")
        raise HostError(what, where=self.where, fix="the offer is gone, or the service is busy: try again")


class _Missing(InputError):
    """There is no such instance, or no such offer any more."""


def _price(offer: Mapping[str, Any]) -> float:
    """Dollars an hour, the disk included; for an interruptible offer a tenth above the least bid."""
    if offer.get("is_bid"):
        return float(offer.get("min_bid") or 0.0) * 1.1
    return float(offer.get("dph_total") or 0.0)
