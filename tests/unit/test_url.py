"""BrokerUrl: RabbitMQ's URI specification, and errors that keep the password."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from channels_rabbitmq._amqp.url import FORM, BrokerUrl
from tests.support.urls import SECRET, delimiters, text_of


def test_everything_left_out_has_its_default() -> None:
    url = BrokerUrl.parse("amqp://broker")
    assert url == BrokerUrl(
        tls=False,
        host="broker",
        port=5672,
        username="guest",
        password="guest",
        virtual_host="/",
        heartbeat=20,
        connection_timeout=None,
        channel_max=None,
        cacertfile=None,
        certfile=None,
        keyfile=None,
        verify=True,
        server_name_indication=None,
    )


def test_everything_given() -> None:
    url = BrokerUrl.parse(
        "AMQPS://al%69ce:p%40ss%2Fw%C3%B6rd@rabbit.example.com:5999/v%2Fhost"
        "?heartbeat=5&connection_timeout=1500&channel_max=64&auth_mechanism=PLAIN"
        "&cacertfile=/etc/ssl/ca+1.pem&certfile=/a%20b.pem&keyfile=k.pem&verify=verify_none"
        "&server_name_indication=inner.example.com"
    )
    assert url == BrokerUrl(
        tls=True,
        host="rabbit.example.com",
        port=5999,
        username="alice",
        password="p@ss/wörd",
        virtual_host="v/host",
        heartbeat=5,
        connection_timeout=1.5,
        channel_max=64,
        cacertfile="/etc/ssl/ca+1.pem",
        certfile="/a b.pem",
        keyfile="k.pem",
        verify=False,
        server_name_indication="inner.example.com",
    )


def test_the_default_port_with_tls_is_5671() -> None:
    assert BrokerUrl.parse("amqps://broker").port == 5671
    assert BrokerUrl.parse("amqps://broker").verify is True
    assert BrokerUrl.parse("amqps://broker?verify=verify_peer").verify is True


@pytest.mark.parametrize(
    ("path", "virtual_host"),
    [
        ("", "/"),
        ("/", "/"),
        ("/%2F", "/"),
        ("//", "/"),
        ("//?heartbeat=3", "/"),
        ("/%2f", "/"),
        ("/asgi", "asgi"),
        ("/%2Fasgi%2f", "/asgi/"),
        ("/a%20b", "a b"),
        ("/%C3%A4", "ä"),
        ("/ä", "ä"),
        ("?heartbeat=3", "/"),
        ("/?heartbeat=3", "/"),
        ("/asgi?", "asgi"),
        ("/" + 127 * "v", 127 * "v"),
    ],
)
def test_virtual_host(path: str, virtual_host: str) -> None:
    assert BrokerUrl.parse(f"amqp://broker{path}").virtual_host == virtual_host


@pytest.mark.parametrize(
    ("credentials", "username", "password"),
    [
        ("alice:secret@", "alice", "secret"),
        ("alice@", "alice", "guest"),
        ("alice:@", "alice", ""),
        (":@", "", ""),
        ("@", "", "guest"),
        ("a%3Ab:c%40d@", "a:b", "c@d"),
        ("alice:a:b@", "alice", "a:b"),
        # Not valid, but seen often, and there is only one way to read it.
        ("alice:a@b@", "alice", "a@b"),
        ("alice:a+b@", "alice", "a+b"),
    ],
)
def test_credentials(credentials: str, username: str, password: str) -> None:
    url = BrokerUrl.parse(f"amqp://{credentials}broker/asgi")
    assert (url.username, url.password) == (username, password)
    assert (url.host, url.virtual_host) == ("broker", "asgi")


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:1", "127.0.0.1", 1),
        ("broker:65535", "broker", 65535),
        ("broker:", "broker", 5672),
        ("my_rabbit-1.", "my_rabbit-1.", 5672),
        ("r%61bbit", "rabbit", 5672),
        ("bücher.example", "bücher.example", 5672),
        ("[::1]", "::1", 5672),
        ("[::1]:5673", "::1", 5673),
        ("[fe80::1%25eth0]:5673", "fe80::1%eth0", 5673),
    ],
)
def test_host_and_port(address: str, host: str, port: int) -> None:
    for prefix in ("", "guest:guest@"):
        url = BrokerUrl.parse(f"amqp://{prefix}{address}/asgi")
        assert (url.host, url.port, url.virtual_host) == (host, port, "asgi")


@pytest.mark.parametrize(
    ("scheme", "tls"),
    [
        ("AMQP", False),
        ("amqpS", True),
        ("pyamqp", False),
        ("librabbitmq", False),
        ("rabbitmq", False),
        ("rabbitmqs", True),
        ("amqp+ssl", True),
        ("AMQP+TLS", True),
    ],
)
def test_schemes(scheme: str, tls: bool) -> None:
    url = BrokerUrl.parse(f"{scheme}://broker/asgi")
    assert (url.tls, url.port) == (tls, 5671 if tls else 5672)
    assert str(url).startswith("amqps://guest@" if tls else "amqp://guest@")


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such paths")
@pytest.mark.parametrize("name", ["cacertfile", "certfile", "keyfile"])
@pytest.mark.parametrize("text", ["/etc/caf%E9.pem", "/etc/caf\udce9.pem"])
def test_a_path_that_is_not_utf_8(name: str, text: str) -> None:
    with_certificate = "certfile=c.pem&" if name == "keyfile" else ""
    url = BrokerUrl.parse(f"amqps://broker?{with_certificate}{name}={text}")
    assert os.fsencode(getattr(url, name)) == b"/etc/caf\xe9.pem"


def test_an_ampersand_in_the_virtual_host() -> None:
    assert BrokerUrl.parse("amqp://broker/a&b=c").virtual_host == "a&b=c"
    assert BrokerUrl.parse("amqp://broker/a%26verify=c").virtual_host == "a&verify=c"


def test_the_shortest_connection_timeout() -> None:
    assert BrokerUrl.parse("amqp://broker?connection_timeout=100").connection_timeout == 0.1


def test_heartbeat_and_channel_max_of_zero() -> None:
    """0 turns heartbeats off; for channel_max AMQP means "no limit" by it."""
    url = BrokerUrl.parse("amqp://broker?heartbeat=0&channel_max=0")
    assert url.heartbeat == 0
    assert url.channel_max is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "must start with amqp:// or amqps://"),
        ("broker:5672", "must start with amqp:// or amqps://"),
        ("amqp:broker", "must start with amqp:// or amqps://"),
        ("http://broker", "must start with amqp:// or amqps://"),
        (" amqp://broker", "must start with amqp:// or amqps://"),
        ("amqp://", "names no host"),
        ("amqp:///asgi", "names no host"),
        ("amqp://u:p@/asgi", "names no host"),
        ("amqp://:5672", f"names no host; write {FORM}"),
        ("amqp://broker/asgi&heartbeat=3", "the query parameter heartbeat behind a &, and no ?"),
        ("amqp://u:p@broker&heartbeat=3", "the query parameter heartbeat behind a &, and no ?"),
        ("amqp://broker/asgi&verify=x?heartbeat=3", "the query parameter verify behind a &"),
        ("amqp://broker\n", "white space or a control character"),
        ("amqp://bro ker", "white space or a control character"),
        ("amqp://broker/a\tb", "white space or a control character"),
        ("amqp://bro%20ker", "not a valid host name"),
        ("amqp://a..b", "not a valid host name"),
        ("amqp://" + 64 * "a", "not a valid host name"),
        ("amqp://" + 60 * "abcdef.", "not a valid host name"),
        ("amqp://a%2Fb", "not a valid host name"),
        ("amqp://[::1", "no IPv6 address in brackets"),
        ("amqp://[::1]5672", "no IPv6 address in brackets"),
        ("amqp://[broker]", "no IPv6 address in brackets"),
        ("amqp://[]", "no IPv6 address in brackets"),
        ("amqp://[127.0.0.1]", "no IPv6 address in brackets"),
        ("amqp://::1", "more than one colon"),
        ("amqp://broker:0", "from 1 to 65535"),
        ("amqp://broker:65536", "from 1 to 65535"),
        ("amqp://broker:-1", "from 1 to 65535"),
        ("amqp://broker:amqp", "from 1 to 65535"),
        ("amqp://broker:٥٦٧٢", "from 1 to 65535"),
        ("amqp://broker/a/b", "unescaped /"),
        ("amqp://broker//asgi", "unescaped /"),
        ("amqp://broker/asgi/", "unescaped /"),
        ("amqp://broker///", "unescaped /"),
        ("redis://broker", "must start with amqp:// or amqps://, such as amqp://user:password@"),
        ("redis://broker", "redis:// is Redis's"),
        ("http://broker:15672", "http:// is for RabbitMQ's management"),
        ("amqp://broker/asgi # production", "followed by a comment"),
        ("amqp://a:b #c@broker", "white space or a control character"),
        ("amqp://broker/" + 128 * "v", "longer than 127 characters"),
        ("amqp://broker/" + 127 * "\U0001f407", "or 255 bytes"),
        ("amqp://broker/%FF", "virtual host is not valid UTF-8"),
        ("amqp://broker/%4", "virtual host holds a % without"),
        ("amqp://broker/\udcff", "virtual host is not valid UTF-8"),
        ("amqp://u%:p@broker", "user name holds a % without"),
        ("amqp://u:100%@broker", "password holds a % without"),
        ("amqp://u:%FF@broker", "password is not valid UTF-8"),
        ("amqp://u%00:p@broker", "zero byte"),
        ("amqp://u:%00@broker", "zero byte"),
        ("amqp://broker/asgi#top", "holds a #"),
        ("amqp://broker#", "holds a #"),
        ("amqp://broker?heartbeat", "heartbeat is empty"),
        ("amqp://broker?heartbeat=", "heartbeat is empty"),
        ("amqp://broker?heartbeat=five", "heartbeat must be a whole number"),
        ("amqp://broker?heartbeat=1.5", "heartbeat must be a whole number"),
        ("amqp://broker?heartbeat=-1", "heartbeat must be a whole number"),
        ("amqp://broker?heartbeat=65536", "heartbeat must be a whole number"),
        ("amqp://broker?heartbeat=" + 5000 * "9", "heartbeat must be a whole number"),
        ("amqp://broker?heartbeat=5&heartbeat=5", "heartbeat is given more than once"),
        ("amqp://broker?connection_timeout=0", "from 100 to 4294967295, of milliseconds"),
        ("amqp://broker?connection_timeout=infinity", "of milliseconds"),
        (
            "amqp://broker?connection_timeout=30",
            "connection_timeout must be a whole number from 100 to 4294967295, of milliseconds; "
            "for 30 seconds write connection_timeout=30000",
        ),
        ("amqp://broker?connection_timeout=99", "milliseconds; for 99 seconds write"),
        ("amqp://broker?connection_timeout=05", "for 5 seconds write connection_timeout=5000"),
        ("amqp://broker?connection_timeout=5s", "for 5 seconds write connection_timeout=5000"),
        ("amqp://broker?connection_timeout=0.5", "for 0.5 seconds write connection_timeout=500"),
        ("amqp://broker?channel_max=65536", "channel_max must be a whole number"),
        ("amqp://broker?channel_max=2", "channel_max must be at least 3"),
        ("amqp://broker?hartbeat=5", "unknown query parameter hartbeat; known are heartbeat,"),
        ("amqp://broker?Heartbeat=5", "unknown query parameter Heartbeat"),
        ("amqp://broker?frame_max=5", "unknown query parameter frame_max"),
        ("amqp://broker?auth_mechanism=external", "auth_mechanism can only be plain"),
        ("amqp://broker?auth_mechanism=plain&auth_mechanism=amqplain", "can only be plain"),
        ("amqps://broker?verify=yes", "verify must be verify_peer or verify_none"),
        ("amqps://broker?keyfile=k.pem", "keyfile needs certfile"),
        ("amqps://broker?cacertfile=%00", "cacertfile is empty or holds a zero byte"),
        ("amqp://broker?cacertfile=ca.pem", "cacertfile needs amqps://"),
        ("amqp://broker?certfile=c.pem", "certfile needs amqps://"),
        ("amqp://broker?verify=verify_none", "verify needs amqps://"),
        ("amqp://broker?server_name_indication=b", "server_name_indication needs amqps://"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        BrokerUrl.parse(text)


def test_auth_mechanism_may_come_twice() -> None:
    assert BrokerUrl.parse("amqp://broker?auth_mechanism=plain&&auth_mechanism=plain")


@pytest.mark.parametrize("character", ["/", "?", "#"])
def test_an_unescaped_character_in_the_password_gets_a_hint(character: str) -> None:
    with pytest.raises(ValueError, match="percent-encode") as caught:
        BrokerUrl.parse(f"amqp://alice:hush{character}hush@broker/asgi")
    assert "hush" not in str(caught.value)


def test_a_forgotten_host_does_not_show_the_password() -> None:
    with pytest.raises(ValueError, match="port must be") as caught:
        BrokerUrl.parse("amqp://alice:hush")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqp://broker", "amqp://guest@broker:5672/%2F"),
        ("amqps://alice:hush@broker/asgi?heartbeat=5", "amqps://alice@broker:5671/asgi"),
        ("amqp://a%40b%2F:hush@[::1]:99/%2Fa%3F", "amqp://a%40b%2F@[::1]:99/%2Fa%3F"),
        ("amqp://u:hush@[fe80::1%25eth0]", "amqp://u@[fe80::1%25eth0]:5672/%2F"),
    ],
)
def test_str_leaves_the_password_out(text: str, shown: str) -> None:
    url = BrokerUrl.parse(text)
    assert str(url) == shown
    again = BrokerUrl.parse(shown)
    assert (again.username, again.host, again.port) == (url.username, url.host, url.port)
    assert again.virtual_host == url.virtual_host
    assert "hush" not in repr(url)


printable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@settings(deadline=None)
@given(
    username=printable, password=printable, virtual_host=printable.filter(bool), ipv6=st.booleans()
)
def test_percent_encoding_round_trip(
    username: str, password: str, virtual_host: str, ipv6: bool
) -> None:
    def encode(text: str) -> str:
        return "".join(f"%{byte:02x}" for byte in text.encode())

    host = "[2001:db8::1]" if ipv6 else "broker"
    url = BrokerUrl.parse(
        f"amqp://{encode(username)}:{encode(password)}@{host}/{encode(virtual_host)}"
    )
    assert (url.username, url.password) == (username, password)
    assert url.virtual_host == virtual_host
    again = BrokerUrl.parse(str(url))
    assert (again.username, again.host, again.virtual_host) == (username, url.host, virtual_host)


def parse(text: str) -> BrokerUrl | ValueError:
    """The URL or the error; any other exception fails the test."""
    try:
        return BrokerUrl.parse(text)
    except ValueError as exc:
        return exc


@given(
    scheme=st.sampled_from(["amqp", "amqps"]),
    username=st.one_of(st.just("alice"), st.lists(delimiters, max_size=3).map("".join)),
    password=st.lists(st.one_of(st.just(SECRET), delimiters), max_size=6).map("".join),
    rest=st.one_of(
        st.sampled_from(["broker", "broker:5672/asgi", "[::1]:5672", "broker?heartbeat=5"]),
        st.lists(delimiters, max_size=4).map("".join),
    ),
)
@example("amqp", "alice", f"1?{SECRET}=1", "broker")
@example("amqp", "alice", f"1/{SECRET}", "broker")
@example("amqp", "alice", f"x@{SECRET}/y", "broker")
@example("amqp", "alice", f"[{SECRET}", "broker")
@example("amqp", "alice", f"{SECRET}℀", "broker")
@example("amqp", "alice", f"{SECRET}%ff", "broker")
@example("amqp", "alice", f"{SECRET}\udcff", "broker")
def test_the_password_is_never_shown(scheme: str, username: str, password: str, rest: str) -> None:
    result = parse(f"{scheme}://{username}:{password}@{rest}")
    if isinstance(result, ValueError):
        assert type(result) is ValueError
        assert SECRET not in text_of(result).lower()
    else:
        assert SECRET not in (str(result) + repr(result)).lower()


@given(
    st.one_of(
        st.text(),
        st.text().map("amqp://".__add__),
        st.lists(st.one_of(delimiters, st.text(max_size=3))).map(
            lambda pieces: "amqps://" + "".join(pieces)
        ),
    )
)
def test_any_text_gives_a_url_or_a_value_error(text: str) -> None:
    url = parse(text)
    if isinstance(url, ValueError):
        assert type(url) is ValueError
        return
    assert url.host
    assert 1 <= url.port <= 65535
    # The URL without its password is still one, of the same place.
    again = BrokerUrl.parse(str(url))
    assert (again.tls, again.host, again.port) == (url.tls, url.host, url.port)
    assert (again.username, again.virtual_host) == (url.username, url.virtual_host)
