"""``python -m channels_rabbitmq``: see ``_tools/cli.py``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        # The import takes a second on a busy machine: Ctrl-C may come meanwhile.
        from ._tools.cli import main

        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("channels_rabbitmq: interrupted", file=sys.stderr)
        sys.exit(130)
