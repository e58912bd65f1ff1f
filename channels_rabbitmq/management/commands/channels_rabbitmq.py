"""``manage.py channels_rabbitmq check``: the commands of ``python -m channels_rabbitmq``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from ..._tools import cli


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Runs a command of ``cli.COMMANDS`` with the settings that ``manage.py`` has."""

    help = cli.DESCRIPTION
    # To find out what is wrong is what it is for.
    requires_system_checks: list[str] = []  # noqa: RUF012 - as Django wants it

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        cli.add_commands(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        # call_command() may name a stream; Django's own wrapper of it would double the line ends.
        with contextlib.redirect_stdout(options.get("stdout") or sys.stdout):
            status, message = cli.run(argparse.Namespace(**options))
        if message:
            raise CommandError(message, returncode=status)
        if status:
            sys.exit(status)
