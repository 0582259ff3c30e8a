"""A real browser without a screen, driven over a pipe by the Chrome DevTools Protocol.

Debian's chromium and nothing besides: the protocol is JSON objects, each ended by a NUL, on
descriptors 3 and 4 of the browser. Source: https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pyforwarder.runtime.slowness import scaled_s

PROGRAM: Final = "chromium"
DEADLINE_S: Final = scaled_s(20.0)
# Only what is asked for: no first run, no updates. As root it has no sandbox.
_ARGUMENTS: Final = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--mute-audio"),
    *("--hide-scrollbars", "--force-color-profile=srgb"),
)


class BrowserError(AssertionError):
    """The browser refused, or did not answer in time."""


class Browser:
    """One process; `page` opens a tab of its own."""

    def __init__(self, home: Path) -> None:
        """Start it; its profile is in `home`, which the caller removes. `close` ends it."""
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # dup2() in the child would overwrite one of them if it were 3 or 4 already.
        high = [_above_ten(fd) for fd in (to_browser, from_browser)]
        command = [PROGRAM, *_ARGUMENTS, f"--user-data-dir={home}", "about:blank"]
        self._errors = (home / "stderr").open("wb")
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=high,
            start_new_session=True,
        )
        for fd in (to_browser, from_browser, *high):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._received = b""
        self._number = 0
        self._results: dict[int, Mapping[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """The result of a method.

        Raises:
            BrowserError: it says no, has died, or does not answer in time.
        """
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + DEADLINE_S
        while number not in self._results:
            self.listen(deadline_s - time.monotonic())
            if time.monotonic() >= deadline_s:
                raise BrowserError(f"no answer to {method}")
        answer = self._results.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def listen(self, timeout_s: float) -> None:
        """Take in what it says within this time, if anything."""
        if not select.select([self._from], [], [], max(0.0, timeout_s))[0]:
            return
        piece = os.read(self._from, 1 << 20)
        if not piece:
            raise BrowserError(f"the browser has ended with {self.process.wait(DEADLINE_S)}")
        *messages, self._received = (self._received + piece).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._results[message["id"]] = message
            elif message.get("sessionId") in self._pages:
                self._pages[message["sessionId"]].heard(message["method"], message["params"])

    def page(self, *, width: int = 1200, height: int = 900) -> Page:
        """A new tab, in a context without cookies and passwords of others."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        page = self._pages[session] = Page(self, session, target["targetId"], context)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        return page

    def forget(self, page: Page) -> None:
        """Close a tab and its context."""
        self._pages.pop(page.session, None)
        self.call("Target.disposeBrowserContext", browserContextId=page.context)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait(timeout=DEADLINE_S)
        self._errors.close()
        os.close(self._to)
        os.close(self._from)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self._browser = browser
        self.session = session
        self.target = target
        self.context = context
        # What a person would find in the console: errors, warnings, refused loads.
        self.complaints: list[str] = []
        self.requests: list[str] = []  # the addresses of everything that was asked for
        self._login: tuple[str, str] | None = None

    def call(self, method: str, **parameters: Any) -> Any:
        """A method of this tab."""
        return self._browser.call(method, self.session, **parameters)

    def heard(self, method: str, parameters: Mapping[str, Any]) -> None:
        """Take in an event."""
        match method:
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                thrown = details.get("exception", {}).get("description", "")
                self.complaints.append(f"{details['text']} {thrown}")
            case "Runtime.consoleAPICalled":
                said = [str(one.get("value", one.get("description"))) for one in parameters["args"]]
                self.complaints.append(f"console.{parameters['type']}: {' '.join(said)}")
            case "Log.entryAdded":
                entry = parameters["entry"]
                self.complaints.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])

    def login(self, name: str, password: str) -> None:
        """Say these wherever a password is asked for, as a person would whom the browser asks."""
        word = base64.b64encode(f"{name}:{password}".encode()).decode()
        self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {word}"})

    def resize(self, width: int, height: int, *, scale: float = 1.0) -> None:
        """Another screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """What the person prefers: `color_scheme="dark"`, `reduced_motion="reduce"`."""
        wanted = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def open(self, url: str) -> None:
        """Go there, and wait until its modules have run."""
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, or of what it promises; what it throws is an error here."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            thrown = details.get("exception", {}).get("description", details["text"])
            raise BrowserError(f"{script}: {thrown}")
        return answer["result"].get("value")

    def wait(self, condition: str, *, deadline_s: float = DEADLINE_S) -> Any:
        """The first value of an expression that counts as true."""
        ends_s = time.monotonic() + deadline_s
        while True:
            try:
                value = self.run(condition)
            except BrowserError:  # between two documents
                value = None
            if value:
                return value
            if time.monotonic() >= ends_s:
                text = self.run("document.body.innerText")
                raise BrowserError(f"never: {condition}\n{self.complaints}\n{text}")
            self._browser.listen(0.05)

    def text(self, selector: str) -> str:
        """The text of the first element that fits."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''"))

    def wait_for_text(self, selector: str, part: str) -> str:
        """The text of an element, once it has this in it."""
        inner = f"(document.querySelector({json.dumps(selector)})?.textContent ?? '')"
        self.wait(f"{inner}.includes({json.dumps(part)})")
        return self.text(selector)

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of an element."""
        where = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=where[0],
                y=where[1],
                button="left",
                clickCount=1,
            )

    def type(self, selector: str, text: str) -> None:
        """Put the text into a field, in place of what was there."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.focus(); "
            "e.select(); })()"
        )
        self.press("Delete")
        if text:
            self.call("Input.insertText", text=text)

    def press(self, key: str, *, times: int = 1) -> None:
        """A key by its name, as KeyboardEvent.key has it."""
        codes = {
            "Tab": 9,
            "Enter": 13,
            "Escape": 27,
            "PageUp": 33,
            "PageDown": 34,
            "End": 35,
            "Home": 36,
            "ArrowUp": 38,
            "ArrowDown": 40,
            "Delete": 46,
        }
        more = {"text": "\r"} if key == "Enter" else {}
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=codes[key],
                    **(more if kind == "keyDown" else {}),
                )

    def focused(self) -> str:
        """The id of the element that has the focus, or its tag and text."""
        return str(
            self.run(
                "(() => { const e = document.activeElement; "
                "return e.id || `${e.tagName} ${e.textContent}`; })()"
            )
        )

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is told of, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def screenshot(self, path: Path) -> None:
        """What is seen, as a PNG."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Close the tab."""
        self._browser.forget(self)


def _above_ten(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is gone afterwards, with all that it wrote."""
    with tempfile.TemporaryDirectory(
        prefix="pyforwarder-browser-", ignore_cleanup_errors=True
    ) as home:
        one = Browser(Path(home))
        try:
            yield one
        finally:
            one.close()
