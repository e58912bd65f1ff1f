"""One write for each turn of the event loop, and no more than the peer takes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

# Bytes that may wait to be written before senders have to wait. It is enough for a busy broker to
# have something to read at any time.
HIGH_WATER = 1024 * 1024

# TCP keepalive, in seconds: where no heartbeats pass, the kernel notices within a minute that the
# other side is gone. (macOS calls the first one otherwise.)
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def keep_alive(transport: asyncio.Transport) -> None:
    """Have the system notice when the other side is gone."""
    tcp = transport.get_extra_info("socket")
    if tcp is None:  # in tests
        return
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):  # The system knows it and doesn't have it.
                tcp.setsockopt(socket.IPPROTO_TCP, option, value)


class CoalescingTransport:
    """An asyncio transport for writers that write frame by frame.

    One ``send()`` system call for each frame costs the client and the broker about twice the CPU
    of one for each turn of the loop. But waiting for the end of the turn costs a tenth of a round
    trip: ``write_now`` is for a message that is probably alone.

    ``write`` and ``write_at_flush`` are never refused: replies and acks must not be held up. A
    writer that can wait asks ``is_full`` before, and waits by ``call_when_writable``. Otherwise
    memory would fill up with messages to a peer that doesn't read.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._chunks: list[bytes] = []
        self._size = 0  # of all chunks
        self._last: list[Callable[[], bytes]] = []  # each makes bytes behind them
        self._is_flush_due = False
        self._is_paused = False  # asyncio's own buffer is above HIGH_WATER
        self._on_writable: Callable[[], None] | None = None
        self._is_held = False  # it is to be read before anything is written

    def flush_soon(self) -> None:
        """Schedule a flush for the loop's next turn, unless one is scheduled.

        Call this right after waking tasks that will write: the flush runs behind them in the same
        turn. If a flush is already scheduled it keeps its place, and their output leaves one turn
        later.
        """
        if not self._is_flush_due:
            self._loop.call_soon(self._flush)
            # Not before: asyncio's debug mode refuses a call from another thread.
            self._is_flush_due = True

    def write(self, data: bytes) -> None:
        self.flush_soon()
        self._chunks.append(data)
        self._size += len(data)

    def write_now(self, pieces: Sequence[bytes]) -> None:
        """Write without waiting for the end of the turn, unless something waits for it already."""
        if self._chunks or self._last:
            for piece in pieces:
                self.write(piece)
        elif not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def write_at_flush(self, make: Callable[[], bytes]) -> None:
        """Have the next flush write what ``make()`` returns, behind all other bytes.

        For bytes that depend on the whole turn, such as acks: a callback of its own would take the
        loop another turn. ``make`` must not raise. It isn't called after :meth:`abort`, and its
        bytes don't count in :meth:`is_full`.
        """
        self.flush_soon()
        self._last.append(make)

    def _flush(self) -> None:
        self._is_flush_due = False
        chunks, self._chunks = self._chunks, []
        self._size = 0
        last, self._last = self._last, []
        chunks += [make() for make in last]
        data = b"".join(chunks)
        if data and not self._transport.is_closing():
            self._transport.write(data)
        self._wake_writer()

    def is_full(self) -> bool:
        """Return whether senders should wait: the buffers are full, or writers are held."""
        return self._is_paused or self._is_held or self._size >= HIGH_WATER

    def call_when_writable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when there is room, or when the connection is closed.

        For a writer that has found it full. It replaces the callback that was given before.
        """
        self._on_writable = callback

    def _wake_writer(self) -> None:
        if self._on_writable is not None and not self.is_full():
            callback, self._on_writable = self._on_writable, None
            callback()

    def pause(self) -> None:
        """asyncio's buffer is full."""
        self._is_paused = True

    def resume(self) -> None:
        """asyncio's buffer has drained, or the connection has ended."""
        self._is_paused = False
        self._wake_writer()

    def hold_writers(self) -> None:
        """Have writers that can wait do so, whatever room there is."""
        self._is_held = True

    def release_writers(self) -> None:
        """The opposite of ``hold_writers``."""
        self._is_held = False
        self._wake_writer()

    def close(self) -> None:
        """Close once everything that was written has gone out."""
        self._flush()
        self._transport.close()

    def shut_down(self) -> None:
        """Have the system close the connection. From any thread.

        asyncio's objects aren't touched: they find it closed when the loop runs again.
        """
        tcp = self._transport.get_extra_info("socket")
        with (
            contextlib.suppress(OSError, ValueError),  # It is closed already.
            socket.socket(fileno=os.dup(tcp.fileno())) as duplicate,
        ):
            duplicate.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Close at once."""
        self._chunks.clear()
        self._last.clear()
        self._size = 0
        self._transport.abort()
