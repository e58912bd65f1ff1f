"""On what the figures were made."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path


def describe() -> str:
    """Such as "2 × Intel Xeon ..., 24 GiB, Linux 6.1, CPython 3.11.7"; no names of machines."""
    parts = [f"{os.cpu_count()} × {_processor()}"]
    with contextlib.suppress(OSError, ValueError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        parts.append(f"{memory / 2**30:.0f} GiB")
    parts.append(f"{platform.system()} {platform.release()}")
    parts.append(f"{platform.python_implementation()} {platform.python_version()}")
    return ", ".join(parts)


def _processor() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^model name\s*: (.+)$", text, re.MULTILINE):
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def commit(root: Path) -> str:
    """The commit that is checked out, "(changed)" if files differ from it; empty without git."""
    try:
        name = _git(root, "rev-parse", "--short", "HEAD")
        # What the suite itself writes is no change.
        changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{name} (changed)" if changed else name


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
