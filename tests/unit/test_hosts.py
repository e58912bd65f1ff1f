"""``host`` as other tools write it: what it can only mean is taken, the rest is told in words."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from django.utils.functional import SimpleLazyObject
from hypothesis import example, given
from hypothesis import strategies as st

from channels_rabbitmq._settings.hosts import read_hosts
from channels_rabbitmq._settings.mistakes import Mistakes
from tests.support.urls import SECRET, delimiters, text_of

FORM = "amqp://user:password@host:port/vhost"


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        ('"amqp://a/v"', ["amqp://a/v"]),
        ("'amqp://a/v'", ["amqp://a/v"]),
        ("\u201camqp://a/v\u201d", ["amqp://a/v"]),
        (""" "'amqp://a/v'" """, ["amqp://a/v"]),
        ("  amqp://a/v\n", ["amqp://a/v"]),
        ("\ufeffamqp://a/v\r\n", ["amqp://a/v"]),
        ("amqp://a;amqp://b", ["amqp://a", "amqp://b"]),
        ("amqp://a//;amqp://b//", ["amqp://a", "amqp://b"]),
        ("pyamqp://a//;pyamqp://b//;", ["amqp://a", "amqp://b"]),
        ("amqp://a/v,amqp://b/v", ["amqp://a/v", "amqp://b/v"]),
        ("amqp://a/v, amqps://b/v", ["amqp://a/v", "amqps://b/v"]),
        ("amqp://a/v\namqp://b/v\n", ["amqp://a/v", "amqp://b/v"]),
        ('"amqp://a/v;amqp://b/v"', ["amqp://a/v", "amqp://b/v"]),
        ('"amqp://a/v", "amqp://b/v"', ["amqp://a/v", "amqp://b/v"]),
        ("amqp://a,b,c/v", ["amqp://a/v", "amqp://b/v", "amqp://c/v"]),
        ("amqp://a,b:9,[::1]:7?heartbeat=3", ["amqp://a", "amqp://b:9", "amqp://[::1]:7"]),
        ("amqp://u:p@a:1, b:2/v", ["amqp://u:p@a:1/v", "amqp://u:p@b:2/v"]),
        ("amqp://a//,amqp://b/%2F", ["amqp://a", "amqp://b"]),
        ("amqps://u:p,w@a;b/v", ["amqps://u:p,w@a/v", "amqps://u:p,w@b/v"]),
        ("amqp://a,b/v;amqp://c/v", ["amqp://a/v", "amqp://b/v", "amqp://c/v"]),
        ("amqp://u:p@ss,word@a/v", ["amqp://u:p%40ss,word@a/v"]),
        ("amqp://a/v,w", ["amqp://a/v,w"]),
        (["amqp://a", " amqp://b,c "], ["amqp://a", "amqp://b", "amqp://c"]),
        (("amqp://a",), ["amqp://a"]),
        (";amqp://a", ["amqp://a"]),
        (SimpleLazyObject(lambda: "amqp://a/v"), ["amqp://a/v"]),
    ],
)
def test_what_is_taken(value: object, urls: list[str]) -> None:
    found = read_hosts("host", value)
    assert [str(url) for url in found] == [str(url) for [url] in (read_hosts("x", u) for u in urls)]
    for url, text in zip(found, urls, strict=True):
        [expected] = read_hosts("host", text)
        assert url.password == expected.password


def test_several_hosts_share_all_else() -> None:
    a, b = read_hosts("host", "amqps://u:p%2C@a:1,b/v?heartbeat=7&cacertfile=ca,1.pem")
    assert (a.host, a.port, b.host, b.port) == ("a", 1, "b", 5671)
    for url in (a, b):
        assert (url.username, url.password, url.virtual_host) == ("u", "p,", "v")
        assert (url.heartbeat, url.cacertfile) == (7, "ca,1.pem")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "host must be a URL or a list of URLs, not NoneType; is an environment variable"),
        (["amqp://a", None], "host[1] must be a URL, a str, not NoneType; is an environment"),
        ("", "host must be a URL, but is empty; is an environment variable missing?"),
        (' " " ', "host must be a URL, but is empty"),
        (["amqp://a", ""], "host[1] must be a URL, but is empty"),
        (b"amqp://a:hush@b", "host must be a URL or a list of URLs, not bytes; decode() it"),
        ([b"amqp://a:hush@b"], "host[0] must be a URL, a str, not bytes; decode() it"),
        ({"host": "hush"}, f"not dict; write it as {FORM}"),
        ([{"host": "hush"}], f"host[0] must be a URL, a str, not dict; write it as {FORM}"),
        (("127.0.0.1", 5672), f"write host and port as {FORM}"),
        ([("127.0.0.1", 5672)], "host[0] must be a URL, a str, not tuple"),
        (urlsplit("amqp://a:hush@b"), "not SplitResult; take its geturl()"),
        ("rabbit.example.com:5672", f"must start with amqp:// or amqps://, such as {FORM}"),
        ('["amqp://a:hush@b"]', f'the text holds a list; several URLs go into a list: ["{FORM}"'),
        ("$RABBITMQ_URL", "begins with $, so a variable in it wasn't replaced"),
        ("{{ rabbitmq_url }}", "begins with {, so a variable in it wasn't replaced"),
        ('"amqp://a:hush@b', "begins or ends with a quotation mark"),
        ("amqp://a:hush@b/v'", "begins or ends with a quotation mark"),
        ("RABBITMQ_URL=amqp://a:hush@b", "begins with the name of a variable and a ="),
        ('export URL="amqp://a:hush@b"', "begins with the name of a variable and a ="),
        ("amqp://a:hush@b  # hush", "followed by a comment"),
        ("amqp://a:hush", "port must be a number"),
        ("amqp://a:hush,b/v", "port must be a number"),
        (
            "amqp://a:hush@b,a:hush@c/v",
            "a user name each, or a password with an unescaped @ (%40) and comma (%2C). If it is "
            f'more than one: several URLs go into a list: ["{FORM}"',
        ),
        ("amqp://a:hush@b/v,c/v", "If it is more than one: several URLs go into a list"),
        ("amqp://a:hush@b/v,", "the URL ends with a ,; remove it"),
        ("amqp://a:hush@b;", "the URL ends with a ;; remove it"),
        ("host=a;username=b;password=hush", "must start with amqp:// or amqps://, such as"),
        ("amqp://a,,b/v", "the URL names no host"),
        ("amqp://a,amqp://b/v", "host: the URLs have different virtual hosts"),
        (["amqp://a:hush@b/v;amqp://a:hush@b/w"], "host[0]: the URLs have different virtual hosts"),
        (["amqp://a:hush@b/v", "amqp://a:hush@c/w"], "host: the URLs have different virtual hosts"),
        ("amqp://a:hush@b:5672,5673/v", "the URL has a port without a host; of several hosts"),
        ("amqp://a:hush@b,5673/v", "the URL has a port without a host; of several hosts"),
        (Path("amqp:"), "not PosixPath; convert it by str()"),
        ("amqp://a:hush@b;redis://c", "host (URL 2): the URL must start with amqp://"),
        ("amqp://a:hu/sh@b;amqp://c", "host (URL 1): the URL has an @ after the place"),
    ],
)
def test_what_is_refused(value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        read_hosts("host", value)
    assert "hush" not in text_of(caught.value)


def test_all_wrong_urls_are_told() -> None:
    with pytest.raises(Mistakes) as caught:
        read_hosts("host", ["amqp://;amqp://a:0", "amqp://a", ""])
    assert [mistake.partition(":")[0] for mistake in caught.value.found] == [
        "host[0] (URL 1)",
        "host[0] (URL 2)",
        "host[2] must be a URL, but is empty; is an environment variable missing? Without the "
        "option the default is used",
    ]


pieces = st.one_of(delimiters, st.sampled_from([",", ";", '"', "'", "amqp://", "=", "$", "u:p@"]))


@given(
    password=st.lists(st.one_of(st.just(SECRET), pieces), max_size=6).map("".join),
    before=st.lists(pieces, max_size=2).map("".join),
    rest=st.lists(pieces, max_size=4).map("".join),
)
@example(f'x";{SECRET}', '"', '"')
@example(f"1,{SECRET}", "", ",b:c@d")
@example(f"x;amqp://{SECRET}/y", "", "")
def test_any_text_gives_urls_or_an_error_without_the_password(
    password: str, before: str, rest: str
) -> None:
    problem: ValueError | None = None
    try:
        found = read_hosts("host", f"{before}amqp://alice:{password}@broker{rest}")
    except ValueError as exc:
        problem = exc
    if problem is None:
        assert found
    else:
        assert type(problem) in (ValueError, Mistakes)
        assert SECRET not in text_of(problem).lower()
