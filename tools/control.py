"""The demo's page, and what its buttons do to processes, at an address of this machine only.

The page isn't served by the processes that it kills. A POST to ``/NAME`` does the action NAME and
answers when it is done. Since actions kill processes, nobody else's page may ask for one:

- The Host must be ours: a foreign name that resolves to 127.0.0.1 is refused, for GET too.
- The Origin must be ours: a browser says truly which page asks.
- A token must be in a header. Only who can read our page knows it, and a page of another origin
  couldn't set the header without a permission that we never give.
"""

from __future__ import annotations

import contextlib
import html
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template

from tools.environment import ROOT

PAGE = ROOT / "example" / "demo" / "page"
TOKEN_HEADER = "X-Demo-Token"

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


class Control:
    """Serves the page and its actions, in threads of its own, while ``running()``."""

    def __init__(
        self,
        processes: Sequence[str],
        actions: Mapping[str, Callable[[], None]],
        *,
        port: int = 0,
    ) -> None:
        """``processes``: the addresses to which the page opens websockets.

        Takes the port, or any if another program has it.
        """
        self._actions = actions
        self._locks = {name: threading.Lock() for name in actions}
        self._failure: Exception | None = None
        self._token = secrets.token_urlsafe()
        handler = type("Handler", (_Handler,), {"control": self})
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        except OSError:
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._own_hosts = (f"127.0.0.1:{self.port}", f"localhost:{self.port}")
        self._files = self._read_files(processes)
        sockets = " ".join(address.replace("http", "ws", 1) for address in processes)
        self.policy = (
            f"default-src 'self'; connect-src 'self' {sockets}; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def _read_files(self, processes: Sequence[str]) -> dict[str, bytes]:
        files = {f"/{path.name}": path.read_bytes() for path in PAGE.iterdir()}
        values = {
            "token": self._token,
            "processes": json.dumps([*processes]),
            "actions": json.dumps([*self._actions]),
        }
        page = Template(files.pop("/index.html").decode())
        escaped = {name: html.escape(value) for name, value in values.items()}
        files["/"] = page.substitute(escaped).encode()
        return files

    @contextlib.contextmanager
    def running(self) -> Iterator[Control]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()
            # What an action works on ends after this.
            for lock in self._locks.values():
                lock.acquire()

    def check(self) -> None:
        """Raises what an action has raised."""
        if self._failure is not None:
            raise self._failure

    def file(self, path: str) -> bytes | None:
        return self._files.get(path)

    def is_own_host(self, host: str | None) -> bool:
        return host in self._own_hosts

    def may_act(self, origin: str | None, token: str | None) -> bool:
        is_own = origin in [f"http://{host}" for host in self._own_hosts]
        return is_own and secrets.compare_digest((token or "").encode(), self._token.encode())

    def act(self, name: str) -> int:
        """Does it, unless it is being done already. Returns the HTTP status."""
        if name not in self._actions:
            return 404
        if not self._locks[name].acquire(blocking=False):
            return 409
        try:
            self._actions[name]()
        except Exception as exc:
            self._failure = exc
            return 500
        finally:
            self._locks[name].release()
        return 204


class _Handler(BaseHTTPRequestHandler):
    control: Control
    timeout = 10  # seconds for a request; browsers open connections that they may never use

    def do_GET(self) -> None:
        if not self.control.is_own_host(self.headers["Host"]):
            self._answer(403)
            return
        path = self.path.partition("?")[0]
        content = self.control.file(path)
        if content is None:
            self._answer(404)
        else:
            self._answer(200, content, _TYPES[Path(path).suffix or ".html"])

    def do_POST(self) -> None:
        headers = self.headers
        if not self.control.is_own_host(headers["Host"]) or not self.control.may_act(
            headers["Origin"], headers[TOKEN_HEADER]
        ):
            self._answer(403)
            return
        self._answer(self.control.act(self.path.removeprefix("/")))

    def _answer(self, status: int, content: bytes = b"", content_type: str = "text/plain") -> None:
        # The page may be closed meanwhile.
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", f"{content_type}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Content-Security-Policy", self.control.policy)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is for what happens to the processes."""
