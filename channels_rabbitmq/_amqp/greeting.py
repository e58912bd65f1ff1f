"""Tell from a server's first bytes whether it is RabbitMQ, and which server it is if not.

A client of AMQP 0-9-1 speaks first. The broker answers with a frame: a method (1) on AMQP channel
0. No other kind of server begins so. Some servers close the connection. Some wait for the end of a
line or of an HTTP request: the layer sends that before it gives the attempt up. Redis doesn't
answer even then, since it looks for the line's end before our first zero byte.
"""

from __future__ import annotations

# Some HTTP servers answer to this. RabbitMQ would take it for a broken frame.
PROVOCATION = b"\r\n\r\n"
# The first bytes of the frame of a Connection.Start.
_EXPECTED = b"\x01\x00\x00"
# So many bytes are enough to tell protocols apart.
_ENOUGH = 8
# So many characters of an answer are shown.
_SHOWN = 60

_PREFIXES = (
    (b"HTTP/", "an HTTP server"),
    (b"<", "an HTTP server"),
    (b"-ERR", "Redis"),
    (b"-NOAUTH", "Redis"),
    (b"-DENIED", "Redis"),
    (b"SSH-", "an SSH server"),
    (b"220", "a mail or FTP server"),
    (b"* OK", "a mail server"),
    (b"+OK", "a mail server"),
    (b"ERROR", "a server of STOMP or memcached"),
)
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")  # an alert, a handshake
_OURS = b"AMQP\x00\x00\x09\x01"
_HTTP_2_SETTINGS = b"\x04\x00\x00\x00\x00\x00"
_MYSQL_VERSION = 10  # of its protocol, in its greeting


def is_rabbitmq(start: bytes) -> bool | None:
    """Return whether these first bytes are RabbitMQ's; None if more bytes are needed."""
    if start.startswith(_EXPECTED):
        return True
    if _EXPECTED.startswith(start):
        return None
    is_whole = len(start) >= _ENOUGH or start.endswith(b"\n")
    return False if is_whole or start.startswith(_TLS_RECORDS) else None


def describe(start: bytes) -> str:
    """Return one sentence about the server whose first bytes these are."""
    if start.startswith(_TLS_RECORDS):
        return "not RabbitMQ but TLS answers there: the URL must start with amqps://"
    if start.startswith(b"AMQP"):
        return f"not RabbitMQ but {_describe_amqp(start)} answers there"
    first_line = start.split(b"\n")[0][:_SHOWN].decode("ascii", "replace").replace("\ufffd", "?")
    shown = "".join(c if c.isprintable() else "?" for c in first_line.strip())
    return f"not RabbitMQ but {_name(start)} answers there: {shown!r}"


def _name(start: bytes) -> str:
    for prefix, name in _PREFIXES:
        if start.startswith(prefix):
            return name
    if start[3:9] == _HTTP_2_SETTINGS:
        return "an HTTP/2 server"
    if start[3:5] == bytes([0, _MYSQL_VERSION]):
        return "MySQL"
    return "another service"


def _describe_amqp(start: bytes) -> str:
    """Name the server by its header. It sends that if it speaks another version of AMQP."""
    header = start[:8]
    if header == _OURS:
        return "a server that sends back what it is sent"
    if len(header) < len(_OURS):
        return "another version of AMQP"
    kind, major, minor, revision = header[4:]
    if major == 1 and minor == revision == 0:  # also with SASL (3) or TLS (2)
        return "a server of AMQP 1.0 (the layer speaks AMQP 0-9-1)"
    # Older versions have their number in the last two bytes.
    version = f"{major}-{minor}-{revision}" if kind == 0 else f"{minor}-{revision}"
    return f"a server of AMQP {version} (the layer speaks AMQP 0-9-1)"
