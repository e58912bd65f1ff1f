"""``check``: tries the settings and the broker step by step."""

from __future__ import annotations

import argparse

from .project import find_layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "url", nargs="?", help="amqp://... to check a broker without Django's settings"
    )
    parser.add_argument(
        "--layer", metavar="ALIAS", default="default", help="its key in CHANNEL_LAYERS"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Check, and return 1 if something is wrong."""
    layer = find_layer(arguments.layer)
    print(f"ok    settings    {layer!r}")
    return 0
