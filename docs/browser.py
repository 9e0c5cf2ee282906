"""A Chromium that a script drives, by its DevTools protocol over two pipes: no driver to install, no port to open.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
# Key -> code of the key, its number, the text that it types. https://www.w3.org/TR/uievents-code/
_KEYS = {
    "Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), " ": ("Space", 32, " "), "Escape": ("Escape", 27, ""),
}  # fmt: skip
_SHIFT = 8


def browser_path() -> str:
    """Raises ValueError if there is none on PATH."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise ValueError(f"none of {', '.join(BROWSERS)} is on PATH; install a Chromium browser.")
    return browser


class PageLeft(RuntimeError):
    """The page that was asked has been left for another."""


class Browser:
    """One browser with one page. Use it as a context."""

    def __init__(self, seconds: float = 30) -> None:
        """seconds: that any answer of the browser, and any condition, may take."""
        self._seconds, self._number, self._rest = seconds, 0, b""
        self._profile = tempfile.TemporaryDirectory()
        theirs, self._to = os.pipe()
        self._from, theirs_too = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3</dev/fd/{theirs} 4>/dev/fd/{theirs_too}'
        options = [*QUIET, f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe", "about:blank"]
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", browser_path(), *options],
            pass_fds=(theirs, theirs_too), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs), os.close(theirs_too)
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []  # what the page has reported since `open`
        self.open_page()

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._to), os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def open_page(self) -> None:
        """Go on with a new page, whose storage is empty, in place of the one before."""
        self._session, before = None, self._session
        if before is not None:
            self.call("Target.disposeBrowserContext", browserContextId=self._context)
        self._context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=self._context)["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Network.enable", maxPostDataSize=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a method of the protocol answers. Raises RuntimeError with its message."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            said = answer["error"]["message"]
            raise (PageLeft if "navigated" in said else RuntimeError)(f"{method}: {said}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        parts = [self._rest]
        while b"\0" not in parts[-1]:
            if not select.select([self._from], [], [], self._seconds)[0]:
                raise TimeoutError(f"the browser said nothing for {self._seconds} s")
            parts.append(os.read(self._from, 1 << 20))
            if not parts[-1]:
                raise RuntimeError("the browser has ended")
        message, _, self._rest = b"".join(parts).partition(b"\0")
        result: dict[str, Any] = json.loads(message)
        return result

    def look(self, width: int, height: int, is_dark: bool = False) -> None:
        """The size of the window in pixels, and the scheme of colours that a person prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Load a page, with its scripts; what they then ask may still be on its way."""
        self.events.clear()
        if problem := self.call("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {problem}")
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url.split('?')[0])})")

    def reload(self) -> None:
        """Load the page again, as `open` does."""
        self.run("window.isBefore = true")
        self.call("Page.reload")
        self.wait("!window.isBefore && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited. Raises RuntimeError with what it throws."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']['exception'].get('description')}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> Any:
        """The first true value of a JavaScript expression. Raises AssertionError, with what the page shows."""
        deadline = time.monotonic() + self._seconds
        while True:
            with suppress(PageLeft):
                if value := self.run(condition):
                    return value
            assert time.monotonic() < deadline, f"{condition}\nis not so:\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, key: str, is_shifted: bool = False) -> None:
        """Press and release a key: one of Tab, Enter, Escape, and the space."""
        code, number, text = _KEYS[key]
        common = {
            "key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": _SHIFT if is_shifted else 0,
        }  # fmt: skip
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.call("Input.insertText", text=text)

    def drop(self, file: Path, selector: str) -> None:
        """Drag a file from outside over an element, and drop it there."""
        x, y = self.run(
            f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screenshot(self, out: Path) -> None:
        """Write what the window shows as WebP: a third of a JPEG, and texts stay sharp."""
        shot = self.call("Page.captureScreenshot", format="webp", quality=85)
        out.write_bytes(base64.b64decode(shot["data"]))
