"""The command line: ``python -m channels_rabbitmq COMMAND``.

Each command is a module with two functions: ``add_arguments(parser)``, and ``run(arguments)``,
which prints to ``sys.stdout`` and returns the exit status. It imports Django only in ``run``, and
only if it has to: a machine without Django can run the others.

A command may raise ``Misuse``, ``Failed``, ``InvalidChannelLayerError`` or ``BrokerUnavailable``.
These, Ctrl-C and a reader that has gone end in one line on stderr, and never in a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, Protocol

from channels.exceptions import InvalidChannelLayerError

from ..exceptions import BrokerUnavailable
from . import check, status
from .errors import Failed, Misuse

_PROGRAM = "channels_rabbitmq"
DESCRIPTION = "Tools for channel layers of channels_rabbitmq."

# Exit statuses. A shell has the last two for programs that a signal has ended.
FAILED = 1
MISUSED = 2
INTERRUPTED = 130
NOT_READ = 141


class Command(Protocol):
    """What a command's module has."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add its arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do its work and return the exit status."""


COMMANDS: Mapping[str, tuple[Command, str]] = {
    "check": (check, "try the settings and the broker step by step, and say what is wrong"),
    "status": (status, "show all processes that use the layer, and what is wrong with them"),
}


class _Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{_PROGRAM}: {message} (`{self.prog} --help` tells more)\n")


def main(argv: Sequence[str]) -> int:
    """Run a command line, and return the exit status."""
    parser = _Parser(prog=f"python -m {_PROGRAM}", description=DESCRIPTION)
    add_commands(parser)
    arguments = parser.parse_args(argv)
    if arguments.settings is not None:
        os.environ["DJANGO_SETTINGS_MODULE"] = arguments.settings
    status, message = run(arguments)
    if message:
        print(f"{_PROGRAM}: {message}", file=sys.stderr)
    return status


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add each command, with its arguments, to a parser."""
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (command, text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        # Before manage.py runs a command, it has looked for this.
        subparser.add_argument(
            "--settings",
            metavar="MODULE",
            help="Django's settings, in place of $DJANGO_SETTINGS_MODULE",
        )
        command.add_arguments(subparser)


def run(arguments: argparse.Namespace) -> tuple[int, str]:
    """Run the command; return the exit status, and what to say on stderr, or ""."""
    command, _ = COMMANDS[arguments.command]
    try:
        status = command.run(arguments)
        if sys.stdout is not None:  # as it is if the shell has closed it
            sys.stdout.flush()
    except Misuse as err:
        return MISUSED, str(err)
    except (Failed, InvalidChannelLayerError, BrokerUnavailable) as err:
        return FAILED, str(err)
    except KeyboardInterrupt:
        return INTERRUPTED, "interrupted"
    except BrokenPipeError:
        _discard_stdout()
        return NOT_READ, "nobody reads the output any more"
    except OSError as err:  # of the output: a full disk, say
        _discard_stdout()
        return FAILED, f"{type(err).__name__}: {err}"
    return status, ""


def _discard_stdout() -> None:
    """Have the rest of the output go nowhere: Python writes it at the end, too."""
    # A stream that call_command() was given may have no number.
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
