"""How a command ends that can't begin, or that finds something wrong."""

from __future__ import annotations


class Misuse(Exception):
    """The command can't begin: wrong arguments or settings.

    The text is one line for a person, without secrets; for Failed, too.
    """


class Failed(Exception):
    """The command has found that something doesn't work."""
