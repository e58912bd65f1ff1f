"""From /proc: CPU time of a server on this machine, all its processes together; own memory."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Collection
from pathlib import Path

_PROC = Path("/proc")
_LISTENING = "0A"


def find_listener(port: int, names: Collection[str]) -> int | None:
    """The process of one of these names that listens at a TCP port here.

    ``None`` if it can't be seen: where there is no /proc, for other users' processes, for those in
    a container (whose port a proxy listens at: hence the names).
    """
    inodes = _listening_inodes(port)
    for folder in _PROC.glob("[0-9]*/fd") if inodes else ():
        with contextlib.suppress(OSError):
            for descriptor in folder.iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    if (
                        os.readlink(descriptor) in inodes
                        and (folder.parent / "comm").read_text().strip() in names
                    ):
                        return int(folder.parent.name)
    return None


def _listening_inodes(port: int) -> set[str]:
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def cpu_seconds(pid: int) -> float:
    """What a process and all that descend from it have used so far, user and system."""
    children: dict[int, list[int]] = {}
    used: dict[int, int] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # The name, in brackets, may hold blanks; so what follows is counted from its end.
            fields = path.read_text().rpartition(")")[2].split()
            process = int(path.parent.name)
            children.setdefault(int(fields[1]), []).append(process)
            used[process] = int(fields[11]) + int(fields[12])
    total = 0
    wanted = [pid]
    while wanted:
        process = wanted.pop()
        total += used.get(process, 0)
        wanted += children.get(process, [])
    return total / os.sysconf("SC_CLK_TCK")


def resident_mib() -> float:
    """Of this process, garbage not counted."""
    gc.collect()
    pages = int((_PROC / "self" / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20
