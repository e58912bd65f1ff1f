"""What to do about what ``check`` has found: what the log can't say, since it doesn't know it.

What the log says, too, is in ``_broker/advice.py``.
"""

from __future__ import annotations

import asyncio
import re
import ssl

from .._amqp.stages import Stage
from .._amqp.url import BrokerUrl
from .._broker.advice import advise, shell_word
from .check_permissions import PERMISSIONS, Need

LOOK_AT_IT = "look at it by `rabbitmq-diagnostics status` on its machine, and at its log"
_NO_NAME = (
    "look at the host in the URL; in Docker and Kubernetes it is the name of RabbitMQ's "
    "service, and both must be on the same network"
)
_NO_NAME_SERVER = (
    "the name server is away, not RabbitMQ: look at /etc/resolv.conf; an IP address in the URL "
    "needs no name server"
)
_NO_WAY = (
    "nothing answers: is the address right, does a firewall or security group let this machine "
    "through to this port, is RabbitMQ's machine up?"
)
_NOT_RABBITMQ = "look at the port in the URL: RabbitMQ's is 5672, and with TLS 5671"
_SILENT = (
    f"if it is RabbitMQ, it is frozen, overloaded or starting: {LOOK_AT_IT}; if not, look at the "
    "host and port, and at what stands behind a proxy or load balancer"
)
_SILENT_LOGIN = (
    f"RabbitMQ may be frozen, or wait for LDAP, OAuth or HTTP to know the user: {LOOK_AT_IT}"
)
_TLS_FILES = (
    "look at cacertfile, certfile and keyfile in the URL: this user must be able to read them"
)
_NO_TLS = "write amqp:// instead of amqps://, or RabbitMQ's port for TLS, which is 5671"
_ONLY_TLS = "write amqps:// instead of amqp://, or RabbitMQ's port without TLS, which is 5672"
_NO_VHOST_FOR_USER = re.compile(r"access to vhost .* refused for user '[^']*'$")
FROZEN = f"RabbitMQ has stopped answering, so it is frozen or overloaded: {LOOK_AT_IT}"
_LIMIT = (
    "raise that limit (rabbitmqctl list_vhost_limits, list_user_limits), or look who needs so "
    "much: rabbitmqctl list_connections user client_properties"
)


def advise_on_stage(reached: int, exc: Exception, url: BrokerUrl, groups_exchange: str) -> str:
    """Return what to do if an attempt to connect has come to a stage, 0 if to none, and failed."""
    text = str(exc)
    if _NO_VHOST_FOR_USER.search(text):
        return advise_on_permissions(url, groups_exchange, only_sends=False)
    known = advise_on(exc, url)
    if known:
        return known
    if "doesn't speak TLS" in text:
        return _NO_TLS
    if "TLS answers there" in text:
        return _ONLY_TLS
    if "name server" in text:
        return _NO_NAME if "knows no address" in text else _NO_NAME_SERVER
    if getattr(exc, "filename", None) or "files for TLS" in text:
        return _TLS_FILES
    if reached < Stage.TCP:
        return _NO_WAY
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        return _SILENT if reached < Stage.GREETED else _SILENT_LOGIN
    return _NOT_RABBITMQ if reached < Stage.GREETED and not isinstance(exc, ssl.SSLError) else ""


def advise_on(exc: Exception, url: BrokerUrl) -> str:
    """Return what to do about an error of any step, or ""."""
    return advise(exc, url) or advise_on_reason(str(exc))


def advise_on_reason(reason: str) -> str:
    """Return what to do about RabbitMQ's words, where ``advise`` doesn't know them."""
    return _LIMIT if re.search(r"\blimit\b", reason) else ""


def advise_on_permissions(url: BrokerUrl, groups_exchange: str, *, only_sends: bool) -> str:
    """Return the command that gives the layer what it needs."""
    exchange = groups_exchange.replace(".", r"\.")
    everything = rf"^({exchange}|crq\..*)$"
    patterns = (f"^{exchange}$", f"^{exchange}$", "") if only_sends else (everything,) * 3
    vhost, user = shell_word(url.virtual_host), shell_word(url.username)
    quoted = " ".join(f"'{pattern}'" for pattern in patterns)
    return f"rabbitmqctl set_permissions -p {vhost} {user} {quoted}"


def describe_needs(missing: list[Need], needs: list[Need], id_: str) -> str:
    """Return what may not be done: "configure crq.*; write 'groups'"."""
    told = []
    for permission in PERMISSIONS:
        names = [need.name for need in missing if need.permission == permission]
        own = {name for name in names if name.startswith(id_)}
        of_all = {n.name for n in needs if n.permission == permission and n.name.startswith(id_)}
        shown = [f"'{name}'" for name in dict.fromkeys(names) if name not in own]
        if own == of_all and own:
            shown.append("crq.*")
        else:
            shown += sorted(name.replace(id_, "crq.*") for name in own)
        if shown:
            told.append(f"{permission} {', '.join(shown)}")
    return "; ".join(told)
