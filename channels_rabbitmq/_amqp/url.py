"""The URL of a broker: RabbitMQ's URI specification and its query parameters.

The URL is parsed by hand and not by ``urllib.parse``. That drops some
characters unseen, and some of its errors quote the whole authority, and so the
password. No error of this module quotes a text that could be a part of the
password.

A password that holds an unescaped ``/``, ``?`` or ``#`` ends the authority too
early and leaves an ``@`` behind it. No other part may hold an ``@``, so that is
checked first. After this check the password can only be in the authority,
before its last ``@``. Errors don't quote the host and port either, because the
user may have left out the ``@host`` behind the password.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, unquote_to_bytes

# The form of a URL, for errors.
FORM = "amqp://user:password@host:port/vhost"

DEFAULT_HEARTBEAT = 20
"""Seconds; RabbitMQ's own 60 would notice a half-open connection after minutes."""
# In characters: pamqp refuses longer ones.
_LONGEST_VIRTUAL_HOST = 127

# Schemes, and whether they mean TLS: RabbitMQ's own, and those of kombu, .NET and hosted RabbitMQs.
SCHEMES = {
    "amqp": False,
    "amqps": True,
    "pyamqp": False,
    "pyamqps": True,
    "librabbitmq": False,
    "rabbitmq": False,
    "rabbitmqs": True,
    "amqp+ssl": True,
    "amqp+tls": True,
}
_OTHER_SCHEMES = {
    "redis": "is Redis's",
    "rediss": "is Redis's",
    "http": "is for RabbitMQ's management, at a port of its own",
    "https": "is for RabbitMQ's management, at a port of its own",
    "mqtt": "is for MQTT",
    "mqtts": "is for MQTT",
    "stomp": "is for STOMP",
}
# Milliseconds. Users mean a smaller number as seconds.
SHORTEST_CONNECTION_TIMEOUT = 100
FEWEST_CHANNELS = 3  # AMQP channels that the layer needs on one connection
_FILE_PARAMETERS = ("cacertfile", "certfile", "keyfile")
_TLS_PARAMETERS = (*_FILE_PARAMETERS, "verify", "server_name_indication")
PARAMETERS = (
    "heartbeat",
    "connection_timeout",
    "channel_max",
    "auth_mechanism",
    *_TLS_PARAMETERS,
)

_PARAMETER = re.compile(f"&({'|'.join(PARAMETERS)})=")
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029]")
END_OF_AUTHORITY = re.compile(r"[/?#]")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NOT_IN_HOST = re.compile(r"[\x00-\x20\x7f/?#@:\[\]<>\\^`{|}\"%]")


@dataclass(frozen=True)
class BrokerUrl:
    """The place of a broker and the login.

    ``str()`` and ``repr()`` leave the password out; ``==`` compares it.
    """

    tls: bool
    # An IPv6 address has no brackets here.
    host: str
    port: int
    username: str
    password: str = field(repr=False)
    virtual_host: str
    # Seconds between heartbeats, before the negotiation with the broker; 0: none.
    heartbeat: int = DEFAULT_HEARTBEAT
    # Seconds for one attempt to connect; None: the caller's limit.
    connection_timeout: float | None = None
    # AMQP channels of one connection; None: as many as the broker allows.
    channel_max: int | None = None
    # Paths of PEM files; None: the system's CAs, no client certificate, the key is in certfile.
    cacertfile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    # Whether the broker's certificate must be signed by a known CA for the right name.
    verify: bool = True
    # The name the certificate must be for; None: the host.
    server_name_indication: str | None = None

    @classmethod
    def parse(cls, url: str) -> BrokerUrl:
        """Read ``amqp[s]://[user[:password]@]host[:port][/vhost][?parameter=value&...]``.

        User, password, host and virtual host are percent-decoded. If they are
        left out, the user and the password are ``guest``, the virtual host is
        ``/``, and the port is 5672, or 5671 with TLS. A path of ``/`` also means
        the virtual host ``/``, and so does ``//``, as kombu writes it. By the
        specification a path of ``/`` means a virtual host with an empty name,
        but no user means that. Schemes of other tools are accepted, too.

        Raises ``ValueError`` for any other text. The error never holds the
        password. This makes no look-up and opens no file.
        """
        scheme, separator, rest = url.partition("://")
        tls = SCHEMES.get(scheme.lower()) if separator else None
        if tls is None:
            raise ValueError(_describe_scheme(scheme.lower()))
        if _UNPRINTABLE.search(rest):
            raise ValueError(_describe_unprintable(rest))

        end = END_OF_AUTHORITY.search(rest)
        authority, tail = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
        if "@" in tail:
            raise ValueError(
                "the URL has an @ after the place where its host ends. If the user name or "
                "password holds a / or ? or #, percent-encode it there (%2F, %3F, %23); "
                "an @ in the virtual host or in a parameter is written %40"
            )
        if "#" in tail:
            raise ValueError("the URL holds a #; percent-encode it (%23)")
        path, _, query = tail.partition("?")

        _require_no_parameter(path)
        username, password, host, port = _parse_authority(authority, 5671 if tls else 5672)
        parameters = _parse_query(query, tls=tls)
        connection_timeout = _parse_connection_timeout(parameters)
        channel_max = _parse_number(parameters, "channel_max", 0, 2**16 - 1)
        if channel_max and channel_max < FEWEST_CHANNELS:
            raise ValueError(
                f"the URL's query parameter channel_max must be at least {FEWEST_CHANNELS}, or 0"
            )
        heartbeat = _parse_number(parameters, "heartbeat", 0, 2**16 - 1)
        return cls(
            tls=tls,
            host=host,
            port=port,
            username=username,
            password=password,
            virtual_host=_parse_virtual_host(path),
            heartbeat=DEFAULT_HEARTBEAT if heartbeat is None else heartbeat,
            connection_timeout=None if connection_timeout is None else connection_timeout / 1000,
            # AMQP's 0 is "no limit".
            channel_max=channel_max or None,
            cacertfile=parameters.get("cacertfile"),
            certfile=parameters.get("certfile"),
            keyfile=parameters.get("keyfile"),
            verify=parameters.get("verify") != "verify_none",
            server_name_indication=parameters.get("server_name_indication"),
        )

    def __str__(self) -> str:
        """The URL without its password and parameters, for logs."""
        scheme = "amqps" if self.tls else "amqp"
        user = quote(self.username, safe="")
        # The % in an IPv6 address starts its zone.
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else self.host
        return f"{scheme}://{user}@{host}:{self.port}/{quote(self.virtual_host, safe='')}"


def _describe_scheme(scheme: str) -> str:
    problem = f"the URL must start with amqp:// or amqps://, such as {FORM}"
    other = _OTHER_SCHEMES.get(scheme)
    return f"{problem}; {scheme}:// {other}" if other else problem


def _describe_unprintable(rest: str) -> str:
    before, comment, after = rest.partition(" #")
    if comment and "@" not in after and not _UNPRINTABLE.search(before.rstrip()):
        return "the URL is followed by a comment, which begins with a #; remove it"
    return "the URL holds white space or a control character; percent-encode it"


def _parse_authority(authority: str, default_port: int) -> tuple[str, str, str, int]:
    """Return user name, password, host and port."""
    # Split at the last @: an unescaped @ in a password is common, and a host can't hold one.
    credentials, separator, address = authority.rpartition("@")
    _require_no_parameter(address)
    username = password = "guest"
    if separator:
        raw_username, colon, raw_password = credentials.partition(":")
        username = _decode(raw_username, "user name")
        if colon:
            password = _decode(raw_password, "password")
        if "\0" in username or "\0" in password:
            # SASL PLAIN separates user name and password by a zero byte.
            raise ValueError("the URL's user name or password holds a zero byte")

    if address.startswith("["):
        raw_host, bracket, rest = address[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("the URL's host is no IPv6 address in brackets")
        host = _check_ipv6(_decode(raw_host, "host"))
        raw_port = rest[1:]
    else:
        raw_host, _, raw_port = address.partition(":")
        if ":" in raw_port:
            raise ValueError(
                "the URL's host and port hold more than one colon; an IPv6 "
                "address must be in brackets"
            )
        host = _check_host_name(_decode(raw_host, "host"))
    return username, password, host, _parse_port(raw_port, default_port)


def _check_ipv6(host: str) -> str:
    try:
        ipaddress.IPv6Address(host)
        is_address = _UNPRINTABLE.search(host) is None
    except ValueError:
        is_address = False
    if not is_address:
        raise ValueError("the URL's host is no IPv6 address in brackets")
    return host


def _check_host_name(host: str) -> str:
    if not host:
        raise ValueError(f"the URL names no host; write {FORM}")
    try:
        # The module socket does this later. It refuses an empty or overlong label.
        host.encode("idna")
        is_name = len(host) <= 255 and _NOT_IN_HOST.search(host) is None
    except UnicodeError:
        is_name = False
    if not is_name:
        raise ValueError("the URL's host is not a valid host name")
    return host


def _parse_port(raw_port: str, default_port: int) -> int:
    if not raw_port:
        return default_port
    if not re.fullmatch("[0-9]{1,5}", raw_port) or not 1 <= int(raw_port) <= 65535:
        raise ValueError(
            "the URL's port must be a number from 1 to 65535. If the URL holds a user name "
            "and password, they stand before an @ and the host, and a / or ? or # in them is "
            "percent-encoded (%2F, %3F, %23)"
        )
    return int(raw_port)


def _parse_virtual_host(path: str) -> str:
    raw_virtual_host = path[1:]
    if raw_virtual_host in ("", "/"):
        return "/"
    if "/" in raw_virtual_host:
        raise ValueError(
            "the URL's virtual host holds an unescaped /. A / before or after its name is left "
            "out; one in it is written %2F (the virtual host / itself is /%2F, or left out)"
        )
    virtual_host = _decode(raw_virtual_host, "virtual host")
    if len(virtual_host) > _LONGEST_VIRTUAL_HOST or len(virtual_host.encode()) > 255:
        raise ValueError(
            f"the URL's virtual host is longer than {_LONGEST_VIRTUAL_HOST} characters or 255 bytes"
        )
    return virtual_host


def _require_no_parameter(text: str) -> None:
    """Refuse a part of the URL before the ``?`` that holds what belongs behind it."""
    found = _PARAMETER.search(text)
    if found:
        raise ValueError(
            f"the URL has the query parameter {found[1]} behind a &, and no ? before it; the first "
            "parameter begins with a ?. (A & in the virtual host is written %26)"
        )


def _parse_query(query: str, *, tls: bool) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for piece in query.split("&"):
        if not piece:
            continue
        name, separator, raw_value = piece.partition("=")
        if name not in PARAMETERS:
            # Quote only a text that looks like a name.
            quoted = f" {name}" if separator and re.fullmatch("[A-Za-z_]{1,40}", name) else ""
            raise ValueError(
                f"the URL has an unknown query parameter{quoted}; known are {', '.join(PARAMETERS)}"
            )
        decode = _decode_path if name in _FILE_PARAMETERS else _decode
        value = decode(raw_value, f"query parameter {name}")
        if not value or "\0" in value:
            raise ValueError(f"the URL's query parameter {name} is empty or holds a zero byte")
        # By the specification only auth_mechanism may come more than once.
        if name in parameters and name != "auth_mechanism":
            raise ValueError(f"the URL's query parameter {name} is given more than once")
        if name == "auth_mechanism" and value.lower() != "plain":
            raise ValueError("the URL's query parameter auth_mechanism can only be plain")
        if name == "verify" and value not in ("verify_peer", "verify_none"):
            raise ValueError("the URL's query parameter verify must be verify_peer or verify_none")
        if name in _TLS_PARAMETERS and not tls:
            raise ValueError(f"the URL's query parameter {name} needs amqps://")
        parameters[name] = value
    if "keyfile" in parameters and "certfile" not in parameters:
        raise ValueError("the URL's query parameter keyfile needs certfile")
    return parameters


def _parse_number(parameters: dict[str, str], name: str, smallest: int, largest: int) -> int | None:
    if name not in parameters:
        return None
    value = parameters[name]
    if not re.fullmatch("[0-9]{1,10}", value) or not smallest <= int(value) <= largest:
        raise ValueError(
            f"the URL's query parameter {name} must be a whole number from {smallest} to {largest}"
        )
    return int(value)


def _parse_connection_timeout(parameters: dict[str, str]) -> int | None:
    name = "connection_timeout"
    try:
        return _parse_number(parameters, name, SHORTEST_CONNECTION_TIMEOUT, 2**32 - 1)
    except ValueError as err:
        problem = f"{err}, of milliseconds"
    seconds = re.fullmatch(r"([0-9]{1,5}(?:\.[0-9]{1,3})?)s?", parameters[name])
    if seconds and (milliseconds := round(float(seconds[1]) * 1000)):
        problem += f"; for {float(seconds[1]):g} seconds write {name}={milliseconds}"
    raise ValueError(problem)


def _decode_path(text: str, what: str) -> str:
    """Percent-decode a path, which may hold any bytes where the system allows that."""
    if _BAD_PERCENT.search(text):
        return _decode(text, what)  # raises
    try:
        return os.fsdecode(unquote_to_bytes(os.fsencode(text)))
    except UnicodeError:
        return _decode(text, what)


def _decode(text: str, what: str) -> str:
    """Percent-decode strictly. Errors chain no error of a codec, which would hold the text."""
    if _BAD_PERCENT.search(text):
        raise ValueError(
            f"the URL's {what} holds a % without two hexadecimal digits; "
            "the character % itself is written %25"
        )
    decoded: str | None
    try:
        decoded = unquote(text, errors="strict")
        # Lone surrogates, as in a badly decoded environment variable, can't be sent.
        decoded.encode()
    except UnicodeError:
        decoded = None
    if decoded is None:
        raise ValueError(f"the URL's {what} is not valid UTF-8 (after percent-decoding)")
    return decoded
