"""Which layer a command is about: one of the project's, or a URL with the default options."""

from __future__ import annotations

import argparse

from .._settings.hosts import read_hosts
from .._settings.settings import Settings
from .errors import Misuse
from .project import find_layer, is_in_memory


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the arguments that ``read_target`` reads. ``verb``: what is done with a URL, for help."""
    parser.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help=f"{verb}, amqp://user:password@host/vhost, without Django and its settings",
    )
    parser.add_argument(
        "--layer", metavar="ALIAS", help="the layer's key in CHANNEL_LAYERS, if it isn't 'default'"
    )
    parser.add_argument(
        "--groups-exchange", metavar="NAME", help="with a URL: the exchange, if it isn't 'groups'"
    )


def read_target(arguments: argparse.Namespace) -> tuple[str, Settings]:
    """Return the layer in words, and its settings.

    Raises Misuse for wrong arguments, and InvalidChannelLayerError if ``CONFIG`` is wrong.
    """
    if arguments.url is None:
        if arguments.groups_exchange is not None:
            raise Misuse("--groups-exchange is for a URL; a layer has it in CHANNEL_LAYERS")
        alias = arguments.layer or "default"
        layer = find_layer(alias)
        if is_in_memory(type(layer)):
            raise Misuse(f"the channel layer {alias!r} is in memory: it uses no broker")
        return f"layer {alias!r}", layer._settings
    if arguments.layer is not None:
        raise Misuse("give either a URL or --layer")
    if not arguments.url.strip(" \"'"):
        raise Misuse(
            "the URL is empty; is an environment variable missing? Without a URL, the command "
            "takes the layer of CHANNEL_LAYERS"
        )
    try:
        read_hosts("URL", arguments.url)
        config = {"host": arguments.url}
        if arguments.groups_exchange is not None:
            config["groups_exchange"] = arguments.groups_exchange
        return "URL", Settings.from_config(config)
    except ValueError as err:
        raise Misuse(str(err)) from None
