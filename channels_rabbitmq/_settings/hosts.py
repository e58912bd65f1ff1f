"""Read the option ``host``, as projects and other tools write it, into URLs.

A URL often comes from an environment variable that other programs read, too. A text with only one
possible meaning is accepted. It may have blanks and quotes around it, as an env file leaves them.
It may be several URLs, as in kombu, or one URL with several hosts: both list the nodes of a
cluster. All other texts are mistakes, and the error shows the right form. No error quotes any of
the text, because a part of it is a password and a text of the wrong form doesn't show which part.
"""

from __future__ import annotations

import re
from itertools import chain

from .._amqp.url import END_OF_AUTHORITY, FORM, BrokerUrl
from .mistakes import read_each

_LIST = f'several URLs go into a list: ["{FORM}", "{FORM}"]'

# The last one is the mark that Windows editors put at the beginning of a file.
_BLANKS = " \t\r\n\v\f\xa0\ufeff"
# Word processors write the last two.
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019"}
# Between two URLs. A scheme must follow, so no part of a vhost's name counts as a separator.
_BETWEEN_URLS = re.compile(r"[\s;,|]+(?=[\"'`\u201c\u2018]?[A-Za-z][A-Za-z0-9+.-]*://)")
_BETWEEN_HOSTS = re.compile("[,;]")
# Finds "@a,bob:" in "alice:secret@a,bob:secret@b". Finds nothing in "alice:p@ss,word@a", where
# the comma belongs to a password.
_SECOND_CREDENTIALS = re.compile(r"@[^@,;]+[,;][^@:]*:")
_ENDS_IN_SEPARATOR = re.compile(r"[\s;,|]+$")

_HINTS = {
    "NoneType": "is an environment variable missing? Without the option the default is used",
    "bytes": "decode() it",
    "dict": f"write it as {FORM}",
    "ParseResult": "take its geturl()",
    "SplitResult": "take its geturl()",
}


def read_hosts(name: str, value: object) -> tuple[BrokerUrl, ...]:
    """Read a URL or a list of URLs; errors call the option ``name``.

    Raises ValueError, or Mistakes if there are several. It makes no look-up.
    """
    if isinstance(value, str):
        return tuple(_read_text(name, value))
    type_name = type(value).__name__
    if not isinstance(value, (list, tuple)) or type_name in _HINTS:
        raise ValueError(f"{name} must be a URL or a list of URLs, {_describe_type(value)}")
    if not value:
        raise ValueError(f"{name} must be a URL or a list of URLs; the list is empty")
    if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):
        raise ValueError(f"{name} must be a URL or a list of URLs; write host and port as {FORM}")
    texts = [(f"{name}[{index}]", text) for index, text in enumerate(value)]
    urls = list(chain.from_iterable(read_each(_read_text, texts)))
    _require_one_virtual_host(name, urls)
    return tuple(urls)


def _describe_type(value: object) -> str:
    type_name = type(value).__name__
    is_builtin = type(value).__module__ == "builtins"
    hint = _HINTS.get(type_name, "" if is_builtin else "convert it by str()")
    return f"not {type_name}{hint and f'; {hint}'}"


def _read_text(name: str, value: object) -> list[BrokerUrl]:
    """Return the URLs in a text, most often one."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a URL, a str, {_describe_type(value)}")
    text = _tidy(value)
    if not text:
        raise ValueError(f"{name} must be a URL, but is empty; {_HINTS['NoneType']}")
    urls = [_tidy(url) for url in _BETWEEN_URLS.split(text) if _tidy(url)]
    if len(urls) == 1:
        return _read_url(name, urls[0])
    urls[-1] = _ENDS_IN_SEPARATOR.sub("", urls[-1])
    numbered = [(f"{name} (URL {number})", url) for number, url in enumerate(urls, start=1)]
    found = list(chain.from_iterable(read_each(_read_url, numbered)))
    _require_one_virtual_host(name, found)
    return found


def _require_one_virtual_host(name: str, urls: list[BrokerUrl]) -> None:
    if len({url.virtual_host for url in urls}) > 1:
        # "amqp://a,amqp://b/vhost" may mean the same virtual host for both.
        raise ValueError(
            f"{name}: the URLs have different virtual hosts; write the same behind each "
            "(processes on different virtual hosts don't get each other's messages)"
        )


def _tidy(text: str) -> str:
    """Return the text without blanks around it, and without quotes that enclose all of it."""
    text = text.strip(_BLANKS)
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip(_BLANKS)
    return text


def _read_url(name: str, text: object) -> list[BrokerUrl]:
    """Return the URL in a text, or one URL for each of its hosts."""
    assert isinstance(text, str)
    problem = _describe_start(text)
    if problem is None:
        try:
            return [BrokerUrl.parse(url) for url in _for_each_host(text)]
        except ValueError as exc:
            several = f". If it is more than one: {_LIST}" if _BETWEEN_HOSTS.search(text) else ""
            problem = f"{exc}{several}"
    raise ValueError(f"{name}: {problem}")


def _describe_start(text: str) -> str | None:
    """Return what is wrong with the beginning or the end of a text; None if nothing is."""
    if text[0] in "[(":
        return f"the text holds a list; {_LIST}"
    if text[0] in "${%<":
        return f"the text begins with {text[0]}, so a variable in it wasn't replaced; write {FORM}"
    if re.match(r"(export\s+|set\s+)?[A-Za-z_][A-Za-z0-9_]*\s*=.*://", text):
        return "the text begins with the name of a variable and a =; remove them"
    if text[0] in _QUOTES or text[-1] in _QUOTES.values():
        return "the URL begins or ends with a quotation mark; remove it"
    if text[-1] in ",;":
        return f"the URL ends with a {text[-1]}; remove it"
    return None


def _for_each_host(url: str) -> list[str]:
    """Split ``amqp://a,b/vhost`` into ``amqp://a/vhost`` and ``amqp://b/vhost``."""
    scheme, separator, rest = url.partition("://")
    end = END_OF_AUTHORITY.search(rest)
    authority, tail = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    credentials, at, hosts = authority.rpartition("@")
    if _SECOND_CREDENTIALS.search(credentials):
        raise ValueError(
            "the URL has several hosts with a user name each, or a password with an unescaped @ "
            "(%40) and comma (%2C)"
        )
    if not _BETWEEN_HOSTS.search(hosts):
        return [url]
    if any(re.fullmatch("[0-9]+", host.strip(_BLANKS)) for host in _BETWEEN_HOSTS.split(hosts)):
        raise ValueError(
            "the URL has a port without a host; of several hosts, each stands before its port: "
            "amqp://user:password@host:port,host:port/vhost"
        )
    return [
        f"{scheme}{separator}{credentials}{at}{host.strip(_BLANKS)}{tail}"
        for host in _BETWEEN_HOSTS.split(hosts)
    ]
