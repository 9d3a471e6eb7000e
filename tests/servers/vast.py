"""Vast.ai's API on loopback, as https://docs.vast.ai/api-reference describes it: it refuses what that does not have."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "vast-key-of-nobody-0123456789"
_FILTERS = {"verified", "rentable", "rented", "gpu_name", "num_gpus", "reliability", "cuda_max_good", "disk_space"}
_SEARCH = {"type", "order", "limit", "allocated_storage"}
_CREATE = {"client_id", "image", "label", "disk", "env", "onstart", "runtype", "cancel_unavail", "price"}


class VastServer(ThreadingHTTPServer):
    """Offers, instances by number, and every request as (method, path, body)."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """No traceback of clients that hang up among what a test captures; of our own bugs there is one."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.offers: list[dict[str, Any]] = []
        self.instances: dict[int, dict[str, Any]] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.log = b"step 1\nstep 2\n"
        self.log_address: str | None = f"{self.address}/the-log"
        self.taken: set[int] = set()
        self.lost = False  # whether who rents gets no answer

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: VastServer

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body))
        if self.path == "/the-log":
            assert "Authorization" not in self.headers, "the key goes to the API alone"
            return self._send(200, self.server.log)
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self._answer(401, {"success": False, "error": "auth_error", "msg": "Invalid user key"})
        found = re.fullmatch(r"/api/v0/(instances/request_logs|instances|asks|bundles)/(?:(\d+)/)?", self.path)
        if found is None:
            return self._answer(404, {"success": False, "msg": "no such path"})
        kind, number = found[1], int(found[2] or 0)
        return getattr(self, f"_{kind.rpartition('/')[2]}")(number, body)

    do_GET = do_PUT = do_POST = do_DELETE = _serve

    def _bundles(self, _: int, body: dict[str, Any]) -> None:
        filters = {name: value for name, value in body.items() if name not in _SEARCH}
        wrong = [name for name in filters if name not in _FILTERS | {"dph_total"}]
        if self.command != "POST" or wrong or body["type"] not in ("on-demand", "bid", "reserved"):
            return self._answer(400, {"success": False, "msg": f"wrong: {wrong}"})

        def fits(offer: dict[str, Any]) -> bool:
            compare = {"eq": lambda a, b: a == b, "gte": lambda a, b: a >= b, "lte": lambda a, b: a <= b}
            return all(compare[op](offer[name], to) for name, test in filters.items() for op, to in test.items())

        self._answer(200, {"offers": [offer for offer in self.server.offers if fits(offer)][: body["limit"]]})

    def _asks(self, number: int, body: dict[str, Any]) -> None:
        if self.command != "PUT" or set(body) - _CREATE or not isinstance(body["env"], dict):
            return self._answer(400, {"success": False, "msg": "wrong body"})
        if number in self.server.taken:
            return self._answer(404, {"success": False, "error": "no_such_ask", "msg": "no such ask"})
        instance = 7000 + number
        self.server.instances[instance] = {"id": instance, "label": body["label"], "actual_status": "loading"}
        if not self.server.lost:
            self._answer(200, {"success": True, "new_contract": instance})

    def _instances(self, number: int, body: dict[str, Any] | None) -> None:
        if not number:
            return self._answer(200, {"instances": list(self.server.instances.values())})
        if number not in self.server.instances:
            return self._answer(404, {"success": False, "error": "no_such_instance"})
        if self.command == "DELETE":
            del self.server.instances[number]
            return self._answer(200, {"success": True})
        if self.command == "PUT":
            assert body in ({"state": "stopped"}, {"state": "running"})
            self.server.instances[number]["actual_status"] = "exited"
            return self._answer(200, {"success": True})
        self._answer(200, {"instances": self.server.instances[number]})

    def _request_logs(self, number: int, body: dict[str, Any]) -> None:
        assert body["tail"].isdecimal()
        self._answer(200, {"success": True, "result_url": self.server.log_address})

    def _answer(self, status: int, document: Any) -> None:
        self._send(status, json.dumps(document).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def offer(number: int, price: float, **changes: Any) -> dict[str, Any]:
    """An offer with the fields that are looked at."""
    described = {"verified": True, "rentable": True, "rented": False, "gpu_name": "RTX 4090", "num_gpus": 1}
    described |= {"reliability": 0.99, "cuda_max_good": 12.8, "disk_space": 500.0, "geolocation": "Sweden, SE"}
    return {"id": number, "dph_total": price, "is_bid": False, **described, **changes}


@pytest.fixture
def vast_server() -> Iterator[VastServer]:
    server = VastServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
