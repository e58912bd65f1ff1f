"""``python -m channels_rabbitmq``: see ``_tools/cli.py``."""

from __future__ import annotations

import sys

from ._tools.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
