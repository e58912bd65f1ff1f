"""Installing Debian packages, where we may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tools import interrupts

# policy-rc.d keeps Debian from starting the services of what is installed, and disabling keeps
# them from starting with the machine: nobody asked for a service. Services that were there before
# are left alone.
POLICY = "/usr/sbin/policy-rc.d"
UNITS = "/lib/systemd/system"
_INSTALL = """\
set -e
policy=$1 units=$2
shift 2
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\\nexit 101\\n' > "$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
fi
before=" $(ls "$units" 2>/dev/null | tr '\\n' ' ')"

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"

for unit in $(cd "$units" && ls | grep -E '^(rabbitmq-server|epmd)' || true); do
    case "$before" in
        *" $unit "*) ;;
        *) systemctl disable "$unit" || update-rc.d "${unit%.service}" disable || true ;;
    esac
done
"""


def may_install() -> bool:
    """Is this Debian (or Ubuntu), and are we root or have sudo without a password?"""
    if shutil.which("apt-get") is None:
        return False
    return os.geteuid() == 0 or (
        shutil.which("sudo") is not None and _succeeds(["sudo", "-n", "true"])
    )


def install(*packages: str) -> bool:
    """``apt-get install``; the services of these packages stay stopped. False if it failed."""
    print(f"Installing {' '.join(packages)} with apt-get...", flush=True)
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    # Killing a package manager halfway leaves a mess. Ctrl-C reaches it, too, and it knows better
    # how to stop.
    with interrupts.held():
        done = subprocess.run(
            [*sudo, "sh", "-c", _INSTALL, "sh", POLICY, UNITS, *packages],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return done.returncode == 0


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0
