"""The groups that the website's consumers join."""

from __future__ import annotations

ROOM = "benchmark.room"


def user_group(user: int) -> str:
    return f"benchmark.user.{user}"
