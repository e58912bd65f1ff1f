"""``Content``: the header and the body of a message, which follow a method frame by frame."""

from __future__ import annotations

from . import frames
from .errors import unexpected_frame

# Bytes: no RabbitMQ lets a larger message through, whatever its max_message_size. A broker that
# announces a larger one could have memory fill up with it.
LARGEST_BODY = 512 * 1024 * 1024


class Content:
    """The content of one message at a time; ``header`` and ``body`` once ``add`` says it is whole.

    ``is_due`` is true from the method that announces the content to the content's last frame.
    """

    def __init__(self) -> None:
        self.is_due = False
        self.header = b""  # the payload of its frame
        self._missing: int | None = None  # bytes of the body; None: the header is due
        self._pieces: list[bytes] = []

    def begin(self) -> None:
        """Expect a header and a body."""
        if self.is_due:
            raise unexpected_frame("a method instead of a message's body")
        self.is_due = True
        self._missing = None
        self._pieces.clear()

    def add(self, frame_type: int, data: bytes, start: int, end: int) -> bool:
        """Take the frame whose payload is ``data[start:end]``; return whether that was the last."""
        expected = frames.HEADER if self._missing is None else frames.BODY
        if not self.is_due or frame_type != expected:
            raise unexpected_frame("a header or body out of place")
        if self._missing is None:
            self._missing = frames.read_body_size(data, start, end)
            if self._missing > LARGEST_BODY:
                raise unexpected_frame("a body larger than RabbitMQ's limit")
            self.header = data[start:end]
        else:
            self._missing -= end - start
            if self._missing < 0:
                raise unexpected_frame("a body longer than its header said")
            self._pieces.append(data[start:end])
        self.is_due = self._missing > 0
        return not self.is_due

    def take_body(self) -> bytes:
        """Return the body of the message that is whole, and forget it."""
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        return body
