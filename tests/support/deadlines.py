"""Deadlines for what tests wait for."""

from __future__ import annotations

import asyncio


def soon(seconds: float = 10.0) -> float:
    """Return a deadline, in the running loop's time."""
    return asyncio.get_running_loop().time() + seconds
