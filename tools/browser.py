"""A page in headless Chromium, driven by the Chrome DevTools Protocol over a websocket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

_COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START_TIMEOUT = 20.0  # seconds; it takes about one
_STARTS = 3  # On a busy machine a start hung once; the next one didn't.
_COMMAND_TIMEOUT = 20.0

_OPTIONS = [
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-proxy-server",
    "--disable-gpu",
    "--disable-extensions",
    # It is to speak to this machine only.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    # A container's /dev/shm may be too small for it.
    "--disable-dev-shm-usage",
]


class BrowserFailed(RuntimeError):
    """Chromium didn't start, or a script of ours failed in the page."""


def find_chromium() -> str | None:
    """The path of the command, ``None`` if there is none. $CHROMIUM may name it."""
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, _COMMANDS)), None)


@contextlib.asynccontextmanager
async def open_page(chromium: str, url: str, width: int, height: int) -> AsyncIterator[Page]:
    """A page of its own browser, without a trace at the end. Raises ``BrowserFailed``."""
    async with (
        _running(chromium) as address,
        connect(address, proxy=None, max_size=None, ping_interval=None) as socket,
    ):
        page = Page(socket)
        try:
            await page.open(url, width, height)
            yield page
        finally:
            page.stop_listening()


@contextlib.asynccontextmanager
async def _running(chromium: str) -> AsyncIterator[str]:
    """Where a browser listens that runs meanwhile."""
    for starts_left in reversed(range(_STARTS)):
        folder = Path(tempfile.mkdtemp(prefix="channels-rabbitmq-browser-"))
        process = _start(chromium, folder)
        try:
            try:
                address = await _address(process, folder / "DevToolsActivePort")
            except BrowserFailed:
                if starts_left:
                    continue
                raise
            yield address
            return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def _start(chromium: str, folder: Path) -> subprocess.Popen[bytes]:
    # Chromium can't build its sandbox as root. The page is our own.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    return subprocess.Popen(
        [chromium, *_OPTIONS, *sandbox, f"--user-data-dir={folder}", "about:blank"],
        env={**os.environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


async def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    """Where Chromium listens: it writes that into this file."""
    for _ in range(int(_START_TIMEOUT / 0.05)):
        if process.poll() is not None:
            raise BrowserFailed(f"Chromium ended with exit status {process.returncode}")
        lines = _read_lines(file)
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        await asyncio.sleep(0.05)
    raise BrowserFailed(f"Chromium doesn't listen after {_START_TIMEOUT:g} seconds")


def _read_lines(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except FileNotFoundError:
        return []


class Page:
    """A page. Its methods raise ``BrowserFailed``."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._session: dict[str, str] = {}
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda method, params: None
        self.errors: list[str] = []  # exceptions in the page
        self._listening = asyncio.create_task(self._listen())

    async def open(self, url: str, width: int, height: int) -> None:
        target = await self.command("Target.createTarget", url="about:blank")
        attached = await self.command("Target.attachToTarget", **target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        await self.command("Runtime.enable")
        await self.command("Page.enable")
        await self.set_size(width, height)
        await self.command("Page.navigate", url=url)

    async def set_size(self, width: int, height: int, scale: float = 1) -> None:
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    async def set_dark(self, is_dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.command("Emulation.setEmulatedMedia", features=[feature])

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params, **self._session}
        await self._socket.send(json.dumps(message))
        result: dict[str, Any] = await asyncio.wait_for(answer, _COMMAND_TIMEOUT)
        return result

    async def evaluate(self, expression: str) -> Any:
        """What the JavaScript expression is, as JSON has it."""
        result = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise BrowserFailed(f"{expression}: {_describe(result['exceptionDetails'])}")
        return result["result"].get("value")

    async def until(self, expression: str, timeout: float) -> None:
        """Return as soon as the expression is true."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not await self.evaluate(f"Boolean({expression})"):
            if loop.time() > deadline:
                raise BrowserFailed(f"not within {timeout:g} seconds: {expression}")
            await asyncio.sleep(0.05)

    async def click(self, selector: str) -> None:
        """As a person does: in the middle of what can be seen of it."""
        where = await self.evaluate(
            f"(() => {{ const it = document.querySelector({json.dumps(selector)});"
            "it.scrollIntoView({block: 'nearest'}); const box = it.getBoundingClientRect();"
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2}; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.command(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where
            )

    async def type(self, text: str) -> None:
        """Into what has the focus, with Enter behind it."""
        await self.command("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r" if kind == "keyDown" else "",
                windowsVirtualKeyCode=13,
            )

    def stop_listening(self) -> None:
        self._listening.cancel()

    async def _listen(self) -> None:
        async for text in self._socket:
            message = json.loads(text)
            answer = self._answers.pop(message.get("id", 0), None)
            if answer is None:
                self._on_event(message["method"], message["params"])
            elif answer.done():
                pass
            elif "error" in message:
                answer.set_exception(BrowserFailed(message["error"]["message"]))
            else:
                answer.set_result(message["result"])

    def _on_event(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(_describe(params["exceptionDetails"]))
        self.on_event(method, params)


def _describe(details: dict[str, Any]) -> str:
    text: str = details.get("exception", {}).get("description") or details["text"]
    return text
