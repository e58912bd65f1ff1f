"""What the operating system knows of processes that a test didn't start itself."""

from __future__ import annotations

import os
import subprocess


def children(parent: int, part: str) -> list[int]:
    """The ids of this process's children whose command line has this part."""
    # With -ww, since ps cuts its lines where COLUMNS says, if that is set.
    listing = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 2) for line in listing.stdout.splitlines()]
    return [int(pid) for pid, ppid, args in rows if int(ppid) == parent and part in args]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
