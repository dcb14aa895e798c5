"""Headless Chromium, where one is installed, spoken to over its debugging pipe: no package is needed for that."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
_EXEC = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The pipes must be the browser's descriptors 3 and 4."""


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty page; skips the test where none is installed."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(_NAMES)} is on the PATH")
    to_read, to_write = os.pipe(), os.pipe()  # it reads from the one, and writes into the other
    with tempfile.TemporaryDirectory(prefix="pentad-browser-", ignore_cleanup_errors=True) as profile:
        options = ["--remote-debugging-pipe", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += [f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", _EXEC, str(to_read[0]), str(to_write[1]), found, *options],
            pass_fds=(to_read[0], to_write[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read[0])
        os.close(to_write[1])
        try:
            yield Browser(to_read[1], to_write[0])
        finally:
            os.close(to_read[1])
            os.close(to_write[0])
            process.kill()
            process.wait()


class Browser:
    """One page of a browser.

    Args:
        to, of: descriptors of the pipe.
    """

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of, self._buffer, self._number = to, of, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        """What its console said, and exceptions of scripts."""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, file: Path, width: int, height: int = 1000, *, dark: bool = False) -> None:
        """Shows a file in a window of a size, and waits until its script has run."""
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=file.as_uri())
        while not self.value("document.readyState === 'complete' && !!document.documentElement.dataset.ready"):
            time.sleep(0.02)
        # The second frame comes after the observers of sizes have drawn.
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, file: Path) -> None:
        """Saves the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the debugging protocol, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._of, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        match message.get("method"), message.get("params", {}):
            case "Runtime.exceptionThrown", about:
                self.complaints.append(str(about["exceptionDetails"]))
            case "Runtime.consoleAPICalled", about:
                self.complaints.append(str(about["args"]))
            case "Log.entryAdded", about:
                self.complaints.append(about["entry"]["text"])
            case "Network.requestWillBeSent", about:
                self.requests.append(about["request"]["url"])
        return message
