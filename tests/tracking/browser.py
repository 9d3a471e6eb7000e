"""A headless Chromium, driven over its pipe (DevTools protocol): no driver, no port."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

SECONDS = 60


def find_chromium() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Browser:
    """One tab. What its page complains of and asks for is kept in `complaints` and `requests`."""

    def __init__(self, binary: str) -> None:
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        # Chromium reads commands from descriptor 3, and answers on 4
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", binary, *self._options()],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._received, self._count = b"", 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tab(f"{domain}.enable")

    def _options(self) -> list[str]:
        offline = "--host-resolver-rules=MAP * ~NOTFOUND"
        return [
            "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", offline, f"--user-data-dir={self._home.name}",
            "--allow-pre-commit-input",  # else keys that come before the first frame are dropped
        ]  # fmt: skip

    def open(self, page: Path, width: int, dark: bool = False, height: int = 900) -> None:
        """Show a file in a window of this many CSS pixels, and wait until it is drawn."""
        self.complaints.clear()
        self.requests.clear()
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.tab("Emulation.setDeviceMetricsOverride", size)
        self._scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tab("Emulation.setEmulatedMedia", {"media": "", "features": [self._scheme]})
        self.evaluate("window.before = true")  # the page before may still be there when the answer comes
        self.tab("Page.navigate", {"url": page.absolute().as_uri()})
        end = time.monotonic() + SECONDS
        while not self.evaluate("!window.before && document.readyState == 'complete'"):
            assert time.monotonic() < end
            time.sleep(0.05)

    def print(self) -> None:
        """The page as paper gets it, with the colours that were set, until the next one is opened."""
        self.tab("Emulation.setEmulatedMedia", {"media": "print", "features": [self._scheme]})

    def evaluate(self, script: str) -> Any:
        answer = self.tab("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path, height: float = 0, top: float = 0) -> None:
        """The whole page as a PNG, or `height` CSS pixels of it from `top` on."""
        size = self.tab("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self.tab("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(shot["data"]))

    def tab(self, method: str, parameters: Mapping[str, Any] | None = None) -> Any:
        return self.call(method, parameters, session=self._session)

    def call(self, method: str, parameters: Mapping[str, Any] | None = None, session: str | None = None) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters or {}}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _next(self) -> Any:
        while b"\0" not in self._received:
            assert select.select([self._read], [], [], SECONDS)[0], "Chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium is gone"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str | None, facts: Mapping[str, Any]) -> None:
        if event in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.complaints.append(json.dumps(facts))
        elif event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(SECONDS)
        os.close(self._write)
        os.close(self._read)
        self._home.cleanup()
