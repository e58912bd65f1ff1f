"""The system checks of ``manage.py check``: what is wrong, or odd, in ``CHANNEL_LAYERS``.

Nothing here connects to a broker. ``check`` on the command line does that.
"""

from __future__ import annotations

import ipaddress
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from channels.exceptions import InvalidChannelLayerError
from django.apps import apps
from django.conf import settings as django_settings
from django.core import checks
from django.utils.module_loading import import_string

from .._amqp.url import BrokerUrl
from .._settings.foreign_options import OF_CHANNELS_REDIS, notes_for
from .._settings.mistakes import Mistakes
from .._settings.settings import OPTIONS, Settings
from ..core import RabbitmqChannelLayer
from .project import is_in_memory, tell

TAG = "channels_rabbitmq"

# Seconds after which daphne gives a websocket up that a consumer has neither accepted nor closed
# (daphne 4.2: --websocket_connect_timeout, for runserver --websocket_handshake_timeout)
DAPHNES_HANDSHAKE = 5

_UNKNOWN = re.compile("unknown option '([^']*)'(?:: |; )(.*)", re.DOTALL)
_MANUAL = 'The manual\'s page "Settings" has all options, with their values.'


def check_channel_layers(app_configs: object = None, **kwargs: object) -> list[checks.CheckMessage]:
    """Return what is to be said of all layers of this package in ``CHANNEL_LAYERS``."""
    configs = getattr(django_settings, "CHANNEL_LAYERS", {})
    if not isinstance(configs, Mapping):
        return []  # Channels says so at the first use.
    found: list[checks.CheckMessage] = []
    valid: dict[str, Settings] = {}
    for alias, entry in configs.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("BACKEND"), str):
            continue
        where = f"CHANNEL_LAYERS[{alias!r}]"
        try:
            backend = import_string(entry["BACKEND"])
        except Exception as err:
            found += _describe_backend(where, entry["BACKEND"], err)
            continue
        if isinstance(backend, type) and issubclass(backend, RabbitmqChannelLayer):
            settings = _read(where, backend, entry.get("CONFIG", {}), found)
            if settings is not None and not is_in_memory(backend):
                valid[alias] = settings
                found += _warn(where, settings)
    return [*found, *_warn_of_shared_exchanges(valid)]


def _describe_backend(where: str, path: str, err: Exception) -> Iterator[checks.CheckMessage]:
    if path.partition(".")[0] == "channels_rabbitmq":
        yield checks.Error(
            f"{where}: BACKEND {path!r} can't be imported: {tell(err)}",
            hint="Write channels_rabbitmq.core.RabbitmqChannelLayer.",
            id="channels_rabbitmq.E004",
        )


def _read(
    where: str, backend: type[RabbitmqChannelLayer], config: Any, found: list[checks.CheckMessage]
) -> Settings | None:
    """Return the layer's settings; None if there are mistakes, which are added to ``found``."""
    if not isinstance(config, Mapping):
        problem = f"CONFIG must be a dict, not {type(config).__qualname__}"
        found.append(_describe_mistake(where, problem))
        return None
    found += _describe_notes(where, config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of group_expiry
            if backend.__init__ is RabbitmqChannelLayer.__init__:
                Settings.from_config(config)  # Its error tells the mistakes apart.
            return backend(**config)._settings
    except Mistakes as err:
        found += [_describe_mistake(where, mistake) for mistake in err.found]
    except InvalidChannelLayerError as err:
        found.append(_describe_mistake(where, str(err)))
    except Exception as err:  # of a project's own class
        found.append(_describe_mistake(where, tell(err)))
    return None


def _describe_mistake(where: str, mistake: str) -> checks.CheckMessage:
    unknown = _UNKNOWN.fullmatch(mistake)
    if unknown is None:
        return checks.Error(f"{where}: {mistake}", hint=_MANUAL, id="channels_rabbitmq.E001")
    option, answer = unknown.groups()
    hint = _sentence(answer)
    if option in OF_CHANNELS_REDIS:
        text = f"{where}: {option!r} is an option of channels_redis, and not of channels_rabbitmq"
        return checks.Error(text, hint=hint, id="channels_rabbitmq.E003")
    return checks.Error(
        f"{where}: there is no option {option!r}", hint=hint, id="channels_rabbitmq.E002"
    )


def _sentence(text: str) -> str:
    """Return a text with a capital, unless it begins with the name of an option."""
    end = "" if text.endswith("?") else "."
    is_option = text.split(maxsplit=1)[0] in OPTIONS
    return f"{text}{end}" if is_option else f"{text[0].upper()}{text[1:]}{end}"


def _describe_notes(where: str, config: Mapping[str, object]) -> Iterator[checks.CheckMessage]:
    for note in notes_for(config):
        text, _, hint = note.partition("; ")
        yield checks.Warning(
            f"{where}: {text}",
            hint=_sentence(hint) if hint else _MANUAL,
            id="channels_rabbitmq.W001",
        )


def _warn(where: str, settings: Settings) -> Iterator[checks.CheckMessage]:
    for url in settings.urls:
        if url.username == "guest" and not _is_local(url.host):
            yield checks.Warning(
                f"{where}: {url}: RabbitMQ lets guest log in from its own machine only",
                hint="Add a user (rabbitmqctl add_user, set_permissions). Only a RabbitMQ whose "
                "loopback_users was emptied, as in Docker's image, takes guest from elsewhere: "
                "then everybody who reaches it may do everything.",
                id="channels_rabbitmq.W002",
            )
        if not url.verify:
            yield checks.Warning(
                f"{where}: {url}: verify_none: nothing checks RabbitMQ's certificate",
                hint="A machine in between can read and change everything. Name the CA of the "
                "certificate by the parameter cacertfile.",
                id="channels_rabbitmq.W003",
            )
    yield from _warn_of_daphne(where, settings)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _warn_of_daphne(where: str, settings: Settings) -> Iterator[checks.CheckMessage]:
    limit = settings.operation_timeout
    if apps.is_installed("daphne") and limit >= DAPHNES_HANDSHAKE:
        yield checks.Warning(
            f"{where}: operation_timeout is {limit:g} s, but daphne gives a websocket up that "
            f"isn't accepted after {DAPHNES_HANDSHAKE} s",
            hint="While RabbitMQ is away, clients see an aborted handshake instead of an answer. "
            f"Set operation_timeout to {DAPHNES_HANDSHAKE - 1}, or start daphne with "
            f"--websocket_connect_timeout {limit + DAPHNES_HANDSHAKE:.0f} (runserver: "
            "--websocket_handshake_timeout) and silence this warning.",
            id="channels_rabbitmq.W004",
        )


def _warn_of_shared_exchanges(layers: Mapping[str, Settings]) -> Iterator[checks.CheckMessage]:
    for (alias, one), (other, another) in combinations(layers.items(), 2):
        if one.groups_exchange == another.groups_exchange and _share_a_broker(one, another):
            yield checks.Warning(
                f"CHANNEL_LAYERS: {alias!r} and {other!r} use the same exchange, "
                f"{one.groups_exchange!r}, on the same virtual host",
                hint="What is sent to a group of one reaches the members in the other, too. If "
                "that isn't meant, give each a groups_exchange of its own.",
                id="channels_rabbitmq.W005",
            )


def _share_a_broker(one: Settings, another: Settings) -> bool:
    return not _places(one.urls).isdisjoint(_places(another.urls))


def _places(urls: tuple[BrokerUrl, ...]) -> set[tuple[str, int, str]]:
    return {(url.host.lower(), url.port, url.virtual_host) for url in urls}
