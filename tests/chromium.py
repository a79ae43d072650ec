"""A headless Chromium, driven by the DevTools protocol over pipes: no port, no client library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
SECONDS = 120


def program() -> str | None:
    """The browser's path, None where there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Look:
    """What a page is like once it is open."""

    errors: list[str]
    """Errors of the console, refusals by the content-security policy among them."""
    requests: list[str]
    """Addresses that it asked for, itself left out; no data addresses."""
    scroll_width: int
    client_width: int
    height: int
    text: str
    """What is read on it, folded parts open."""


class Chromium:
    """A context manager; pages are opened one after another."""

    def __enter__(self) -> Chromium:
        self._home = tempfile.mkdtemp(prefix="chromium-")
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()

        def wire() -> None:  # the browser reads from 3 and writes to 4
            spare = os.dup(from_child), os.dup(to_child)
            os.dup2(spare[1], 3)
            os.dup2(spare[0], 4)
            for each in (3, 4):
                os.set_inheritable(each, True)

        found = program()
        assert found is not None
        self._process = subprocess.Popen(
            [found, *OPTIONS, f"--user-data-dir={self._home}", "about:blank"],
            preexec_fn=wire,  # noqa: PLW1509
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_child)
        os.close(from_child)
        self._number, self._rest, self._events = 0, b"", list[dict[str, Any]]()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._home, ignore_errors=True)

    def look(self, page: Path, *, width: int, dark: bool, picture: Path | None = None, height: int = 900) -> Look:
        """Open a page and tell what it is like.

        Args:
            width, height: of the window in CSS pixels; 360 is a phone.
            dark: whether the system asks for dark pages.
            picture: where to write a picture of the whole page, at most 12,000 pixels high.
        """
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", session, features=scheme)
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1 if width > 500 else 2,
            "mobile": width < 500,
        }
        self._call("Emulation.setDeviceMetricsOverride", session, **metrics)
        self._events.clear()
        address = page.resolve().as_uri()
        self._call("Page.navigate", session, url=address)
        self._wait_for("Page.loadEventFired")
        size = self._evaluate(session, "[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        if picture is not None:
            whole = self._evaluate(session, "document.documentElement.scrollHeight")
            clip = {"x": 0, "y": 0, "width": width, "height": min(whole, 12000), "scale": 1}
            taken = self._call("Page.captureScreenshot", session, clip=clip, captureBeyondViewport=True)
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(base64.b64decode(taken["data"]))
        self._evaluate(session, "document.querySelectorAll('details').forEach(each => { each.open = true }), 0")
        opened = self._evaluate(
            session, "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        text = self._evaluate(session, "document.body.innerText")
        look = Look(
            errors=[line for event in self._events if (line := _error(event))],
            requests=[url for event in self._events if (url := _request(event)) and url != address],
            scroll_width=max(size[0], opened[0]),
            client_width=size[1],
            height=opened[1],
            text=text,
        )
        self._call("Target.closeTarget", targetId=target)
        return look

    def _evaluate(self, session: str, expression: str) -> Any:
        return self._call("Runtime.evaluate", session, expression=expression, returnByValue=True)["result"]["value"]

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        content = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._events.append(answer)

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            part = os.read(self._in, 2**20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def _error(event: dict[str, Any]) -> str:
    parameters = event.get("params", {})
    if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
        return str(parameters["entry"]["text"])
    if event.get("method") == "Runtime.exceptionThrown":
        return str(parameters["exceptionDetails"])
    if event.get("method") == "Runtime.consoleAPICalled":
        return str(parameters["args"])
    return ""


def _request(event: dict[str, Any]) -> str:
    url = event["params"]["request"]["url"] if event.get("method") == "Network.requestWillBeSent" else ""
    return "" if url.startswith("data:") else url
