"""A headless Chromium that a test drives, by the DevTools protocol over a pipe."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The browser, if there is one."""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-extensions "
    "--remote-debugging-pipe --hide-scrollbars"
)
PATIENCE = 60.0
"""Seconds that a test waits for anything."""


class Browser:
    """One page of a browser."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._held, self._last = b"", 0
        self._session: str | None = None
        self.messages: list[str] = []
        """What the page's console said, errors and refusals of its policy included."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def look(self, width: int, height: int = 900, *, dark: bool = False, still: bool = False) -> None:
        """Give the page a size, a theme, and as much movement as its user likes."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        self._call("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Go to an address."""
        self._call("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def run(self, script: str) -> Any:
        """Value of an expression in the page; promises are waited for."""
        done = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < until, f"{condition} was not true within {PATIENCE} s: {self.messages}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Write into what has the focus."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key: Enter, Escape or Tab."""
        code, content = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": content} if content else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """A picture of the window, or of the whole page."""
        found = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        for answer in self._answers():
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)
        raise AssertionError(f"{method}: the browser has gone")

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                self.messages.append(" ".join(str(each.get("value", each)) for each in params["args"]))
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.messages.append(str(details.get("exception", {}).get("description", details["text"])))
            case "Log.entryAdded":
                self.messages.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def _answers(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + PATIENCE
        while True:
            while b"\0" in self._held:
                message, _, self._held = self._held.partition(b"\0")
                yield json.loads(message)
            ready, _, _ = select([self._reading], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"the browser was silent for {PATIENCE} s"
            content = os.read(self._reading, 1 << 20)
            if not content:
                return
            self._held += content


@contextmanager
def browse(folder: Path, flags: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser with an empty page; its profile is in `folder`."""
    assert BROWSER is not None
    to_browser, writing = os.pipe()
    reading, from_browser = os.pipe()
    # The protocol's pipes are the numbers 3 and 4. A shell moves them there; 8 and 9 keep them apart meanwhile.
    move = f'exec 8<&{to_browser} 9>&{from_browser}; exec 3<&8 4>&9 8<&- 9>&-; exec "$@"'
    command = ["bash", "-c", move, "bash", BROWSER, *FLAGS.split(), *flags, f"--user-data-dir={folder / 'profile'}"]
    process = subprocess.Popen(
        command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(reading, writing)
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)
