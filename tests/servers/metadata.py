"""The metadata services of EC2, Google and Azure on loopback, as their public documentation describes them.

By hand, from the root of the repository, in two shells:

    python -m tests.servers.metadata ec2 --after 20        a notice after 20 seconds; prints the variable to set
    AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:PORT wmtp train --preset smoke --set host.notices=ec2
"""

import argparse
import itertools
import json
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

VARIABLES = {
    "ec2": "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "gcp": "GCE_METADATA_HOST",
    "azure": "AZURE_METADATA_SERVICE_ENDPOINT",
}


class MetadataServer(ThreadingHTTPServer):
    """What it will say, and what it was asked. Every attribute may be changed while it serves."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        """No traceback of clients that hang up among what a test captures; of our own bugs there is one."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked = []  # (method, path)
        self.fault = None  # "500", "stall", "garbage", "drip", "reset": for every answer
        self.skew = 0.0  # seconds by which this side's clock is ahead
        self.changed = threading.Condition()
        self.closing = threading.Event()
        # EC2
        self.items = {}  # path under meta-data to text
        self.tokens = set()
        self._numbers = itertools.count(1)
        # Google
        self.values = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
        self.flavor = "Google"
        # Azure
        self.name = "worker_3"
        self.events = []
        self.first_delay = 0.0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def environ(self, provider):
        """The variables that send a watcher here; a proxy that would answer to nobody is not to be used."""
        return {VARIABLES[provider]: self.address.removeprefix("http://" if provider == "gcp" else "")}

    def now(self):
        return time.time() + self.skew

    def interrupt(self, seconds=120.0, action="terminate"):
        moment = datetime.fromtimestamp(self.now() + seconds, UTC)
        self.items["spot/instance-action"] = json.dumps({"action": action, "time": f"{moment:%Y-%m-%dT%H:%M:%SZ}"})

    def rebalance(self):
        self.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": "2026-10-26T11:30:00Z"})

    def set_value(self, item, value):
        with self.changed:
            self.values[item] = value
            self.changed.notify_all()

    def schedule(self, kind="Preempt", seconds=30.0, resources=("worker_3",), event="602d9444", **changes):
        moment = format_datetime(datetime.fromtimestamp(self.now() + seconds, UTC), usegmt=True)
        said = {"EventId": event, "EventType": kind, "ResourceType": "VirtualMachine", "Resources": list(resources)}
        self.events.append(said | {"EventStatus": "Scheduled", "NotBefore": moment, **changes})

    def new_token(self):
        token = f"token-{next(self._numbers)}=="
        self.tokens.add(token)
        return token


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def log_message(self, *_):
        pass

    def date_time_string(self, timestamp=None):
        return format_datetime(datetime.fromtimestamp(self.server.now(), UTC), usegmt=True)

    def do_PUT(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def _serve(self):
        self.server.asked.append((self.command, self.path))
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            if self.server.fault:
                return self._fail(self.server.fault)
            if url.path.startswith("/latest/"):
                return self._ec2(url.path.removeprefix("/latest/"))
            if url.path.startswith("/computeMetadata/v1/"):
                return self._gcp(url.path.removeprefix("/computeMetadata/v1/"), query)
            return self._azure(url.path.removeprefix("/metadata/"), query)
        except OSError:
            pass  # whoever asked is gone

    def _answer(self, status, text="", **headers):
        body = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, fault):
        if fault == "500":
            self._answer(500, "no")
        elif fault == "garbage":
            self._answer(200, "\x00<html>", Metadata_Flavor="Google")
        elif fault == "stall":
            self.server.closing.wait(30)
        elif fault == "reset":
            self.connection.close()
        elif fault == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")

    def _ec2(self, path):
        if path == "api/token":
            seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            if self.command != "PUT" or not seconds.isdecimal() or not 1 <= int(seconds) <= 21600:
                return self._answer(400)
            return self._answer(200, self.server.new_token())
        if self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            return self._answer(401)
        text = self.server.items.get(path.removeprefix("meta-data/"))
        return self._answer(404) if text is None else self._answer(200, text)

    def _gcp(self, item, query):
        if self.headers.get("Metadata-Flavor") != "Google":
            return self._answer(403)
        if item not in self.server.values:
            return self._answer(404, Metadata_Flavor=self.server.flavor)
        with self.server.changed:
            if query.get("wait_for_change") == "true":
                before = query.get("last_etag", self._etag(item))
                seconds = float(query.get("timeout_sec", 60))
                self.server.changed.wait_for(
                    lambda: self._etag(item) != before or self.server.closing.is_set(), seconds
                )
            etag, value = self._etag(item), self.server.values[item]
        return self._answer(200, value, Metadata_Flavor=self.server.flavor, ETag=etag)

    def _etag(self, item):
        return self.server.values[item].encode().hex()

    def _azure(self, path, query):
        if self.headers.get("Metadata") != "true" or "api-version" not in query:
            return self._answer(400, '{"error": "Bad request"}')
        if path == "instance/compute/name":
            return self._answer(200, self.server.name)
        if path != "scheduledevents":
            return self._answer(404)
        delay, self.server.first_delay = self.server.first_delay, 0.0
        self.server.closing.wait(delay)
        return self._answer(200, json.dumps({"DocumentIncarnation": 1, "Events": self.server.events}))


@contextmanager
def serve():
    """A server in a thread of this process, gone afterwards."""
    server = MetadataServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="metadata server")
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        with server.changed:
            server.changed.notify_all()
        server.shutdown()
        thread.join()
        server.server_close()


def main():
    parser = argparse.ArgumentParser(description="A metadata service that announces an interruption.")
    parser.add_argument("provider", choices=VARIABLES)
    parser.add_argument("--after", type=float, default=20, help="seconds until the notice (20)")
    parser.add_argument("--warning", action="store_true", help="only a warning, no interruption")
    options = parser.parse_args()
    with serve() as server:
        for name, value in server.environ(options.provider).items():
            print(f"{name}={value} wmtp train --set host.notices={options.provider}", flush=True)
        time.sleep(options.after)
        if options.provider == "ec2":
            server.rebalance() if options.warning else server.interrupt()
        elif options.provider == "gcp":
            item, value = "maintenance-event" if options.warning else "preempted", "TERMINATE_ON_HOST_MAINTENANCE"
            server.set_value(f"instance/{item}", value if options.warning else "TRUE")
        else:
            server.schedule("Reboot", 900) if options.warning else server.schedule()
        print("announced; Ctrl-C ends this", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
