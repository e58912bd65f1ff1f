"""``Misuse``: the one error that the commands have for wrong arguments and settings."""

from __future__ import annotations


class Misuse(Exception):
    """The command can't begin. The text is one line for a person, without secrets."""
