"""All writes of one turn of the event loop in one."""

from __future__ import annotations

import asyncio


class CoalescingTransport:
    """An asyncio transport for carehare's classes, which write frame by frame.

    One ``send()`` system call for each frame costs the client and the broker about twice the CPU
    of one for each turn of the loop; waiting for the end of the turn costs no measurable latency.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._chunks: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._chunks:
            self._loop.call_soon(self._flush)
        self._chunks.append(data)

    def _flush(self) -> None:
        chunks, self._chunks = self._chunks, []
        if chunks and not self._transport.is_closing():
            self._transport.write(b"".join(chunks))

    def close(self) -> None:
        """Close once everything that was written has gone out."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._chunks.clear()
        self._transport.abort()
