"""Write once in each turn of the event loop, and make writers wait if the peer doesn't read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
from collections.abc import Callable, Sequence

# Senders have to wait if more bytes wait to be written. With so many bytes a busy broker has
# something to read at any time.
HIGH_WATER = 1024 * 1024

# TCP keepalive, in seconds and probes. Without heartbeats the kernel then notices within a minute
# that the other side is gone. TCP_KEEPALIVE is macOS's name for TCP_KEEPIDLE.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def set_options(transport: asyncio.Transport) -> None:
    """Have the system send at once, and notice when the other side is gone."""
    tcp = transport.get_extra_info("socket")
    if tcp is None:  # only in tests
        return
    # asyncio sets it only for sockets that were made with the protocol's number. Without it, what
    # follows an ack within a moment waits until the broker's system has acknowledged that: 40 ms.
    with contextlib.suppress(OSError):  # It isn't TCP, or it is closed.
        tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):  # The system knows the option but refuses it.
                tcp.setsockopt(socket.IPPROTO_TCP, option, value)


def _poll_for(transport: asyncio.Transport) -> Callable[[int], object] | None:
    """Return what asks the system whether there is something to read; None if nothing can."""
    tcp = transport.get_extra_info("socket")
    if tcp is None or not hasattr(select, "poll"):  # in tests; on Windows, or patched away
        return None
    poll = select.poll()
    poll.register(tcp.fileno(), select.POLLIN)
    return poll.poll


class CoalescingTransport:
    """An asyncio transport for writers that write frame by frame.

    One ``send()`` system call for each frame costs the client and the broker about twice the CPU of
    one call for each turn of the loop. But waiting for the end of the turn costs a tenth of a round
    trip. So ``write_now`` is for a message that is probably alone.

    ``write`` and ``write_at_flush`` always accept bytes, because replies and acks must not be held
    up. A writer that can wait first asks ``is_full``, and waits by ``call_when_writable``.
    Otherwise memory would fill up with messages to a peer that doesn't read.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=HIGH_WATER)
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._chunks: list[bytes] = []
        self._size = 0  # of all chunks
        self._last: list[Callable[[], bytes]] = []  # each makes bytes that go behind the chunks
        self._is_flush_due = False
        self._is_paused = False  # asyncio's own buffer is above HIGH_WATER
        self._on_writable: Callable[[], None] | None = None
        self._is_held = False  # writers wait until the socket has been read
        self._poll = _poll_for(transport)

    def flush_soon(self) -> None:
        """Schedule a flush for the loop's next turn, unless one is scheduled.

        Call this right after waking tasks that will write: the flush runs behind them in the same
        turn. If a flush is already scheduled it keeps its place, and their output leaves one turn
        later.
        """
        if not self._is_flush_due:
            self._loop.call_soon(self._flush)
            # Set this afterwards: call_soon() raises in asyncio's debug mode from another thread.
            self._is_flush_due = True

    def write(self, data: bytes) -> None:
        self.flush_soon()
        self._chunks.append(data)
        self._size += len(data)

    def write_now(self, pieces: Sequence[bytes]) -> None:
        """Write at once, or behind the bytes that already wait for the end of the turn."""
        if self._chunks or self._last:
            for piece in pieces:
                self.write(piece)
        elif not self._transport.is_closing():
            self._transport.write(b"".join(pieces))

    def write_at_flush(self, make: Callable[[], bytes]) -> None:
        """Let the next flush write the bytes that ``make()`` returns, behind all other bytes.

        This is for bytes that depend on the whole turn, such as acks. A callback of their own would
        take the loop another turn. ``make`` must not raise. It isn't called after :meth:`abort`,
        and its bytes don't count in :meth:`is_full`.
        """
        self.flush_soon()
        self._last.append(make)

    def flush(self) -> None:
        """Write at once what waits for the end of the turn.

        When it returns the system has the bytes, unless the peer reads too slowly.
        """
        self._flush()

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

    @property
    def tls(self) -> ssl.SSLObject | None:
        """What was agreed on with the peer; None without TLS."""
        tls: ssl.SSLObject | None = self._transport.get_extra_info("ssl_object")
        return tls

    def is_full(self) -> bool:
        """Return whether senders should wait: the buffers are full, or writers are held."""
        return self._is_paused or self._is_held or self._size >= HIGH_WATER

    def call_when_writable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when there is room, or when the connection is closed.

        This is for a writer to which ``is_full`` returned True. The new callback replaces a former
        one.
        """
        self._on_writable = callback

    def _wake_writer(self) -> None:
        if self._on_writable is not None and not self.is_full():
            callback, self._on_writable = self._on_writable, None
            callback()

    def pause(self) -> None:
        """Note that asyncio's buffer is full."""
        self._is_paused = True

    def resume(self) -> None:
        """Note that asyncio's buffer has drained, or that the connection has ended."""
        self._is_paused = False
        self._wake_writer()

    def hold_writers(self) -> None:
        """Make writers that can wait do so, even if there is room."""
        self._is_held = True

    def release_writers(self) -> None:
        """Undo ``hold_writers``."""
        self._is_held = False
        self._wake_writer()

    def is_read(self) -> bool:
        """Return True if nothing of the peer waits to be read, nor its end; False if in doubt."""
        return self._poll is not None and not self._poll(0)

    def close(self) -> None:
        """Close once all written bytes have been sent."""
        self._flush()
        self._transport.close()

    def shut_down(self) -> None:
        """Let the system close the connection. Any thread may call this.

        This doesn't touch asyncio's objects. They notice when the loop runs again.
        """
        tcp = self._transport.get_extra_info("socket")
        with (
            contextlib.suppress(OSError, ValueError),  # The socket is closed already.
            socket.socket(fileno=os.dup(tcp.fileno())) as duplicate,
        ):
            duplicate.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Close at once."""
        self._chunks.clear()
        self._last.clear()
        self._size = 0
        self._transport.abort()
